"""Data-parallel training: several processes see what one would have seen, and edit alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.recycle import data_parallel
from tests.recycle.data_parallel import BATCH, METHODS, run


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, at whatever depth."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_alike(ranks: list[dict[str, Any]], alone: dict[str, Any], tolerance: float) -> None:
    """Ranks agree to the last bit, and with one process that saw everything but for rounding."""
    for rank in ranks[1:]:
        for key, value in ranks[0].items():
            assert same(value, rank[key]), key
    assert apart(ranks[0]["weights"], alone["weights"]) <= tolerance
    for report, expected in zip(ranks[0]["reports"], alone["reports"], strict=True):
        found = [(name, type(edit), edit.slots, getattr(edit, "parents", None)) for name, edit in report.edits]
        assert found == [(n, type(e), e.slots, getattr(e, "parents", None)) for n, e in expected.edits]
        assert [group.samples for group in report.groups.values()] == [g.samples for g in expected.groups.values()]
        assert [group.dead for group in report.groups.values()] == [g.dead for g in expected.groups.values()]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_stay_alike_and_train_as_one_process_does(world: int) -> None:
    found = run(world, "in_turns", "uneven", "seen", "spoiled", "failing", "polyak")
    alone = data_parallel.in_turns(0, 1)
    assert sum(report.recycled for report in alone["reports"]) > 100
    check_alike([ranks["in_turns"] for ranks in found], alone, 1e-9)

    alone = data_parallel.uneven(0, 1)
    assert sum(report.recycled for report in alone["reports"]) > 20
    check_alike([ranks["uneven"] for ranks in found], alone, 1e-9)

    for ranks in found[1:]:
        assert same(ranks["seen"], found[0]["seen"])
    check_seen(found[0]["seen"], data_parallel.seen(0, 1), world)

    for ranks in found:
        spoiled, healthy = ranks["spoiled"]
        assert not spoiled.edits and "NaN or infinite" in spoiled.groups["0"].note
        assert healthy.recycled, healthy.groups

    for rank, ranks in enumerate(found):
        for name in ("plain", "polyak"):
            error = ranks["failing"][name]
            told = f"RanksDiffer: the end of step() failed on rank {world - 1}: ValueError: no more ideas"
            assert error == ("ValueError: no more ideas" if rank == world - 1 else told)
        assert same(ranks["failing"]["later"], found[0]["failing"]["later"])

    for ranks in found:
        ((name, reset),) = [edit for edit in ranks["polyak"][0].edits if edit[0] == "0"]
        assert 0 in reset.slots and 1 not in reset.slots
        assert "1 still alive in the target network" in ranks["polyak"][0].groups[name].note


def check_seen(found: dict[str, Any], alone: dict[str, Any], world: int) -> None:
    """A method is told of the whole batch: rows of the ranks stand in their order, which is that of the batch."""
    assert len(found["told"]) == len(alone["told"]) == 4
    for told, expected in zip(found["told"], alone["told"], strict=True):
        window = range(6) if expected["event"] == 2 else range(6, 9)
        mean = sum(10 * update + rank for update in window for rank in range(world)) / len(window) / world
        assert told.pop("recorded")["loss"] == pytest.approx(mean)
        expected.pop("recorded")
        assert told.pop("group") == expected.pop("group")
        assert told["activations"].shape[0] == BATCH
        assert told["silence"].max() > 1 and (told["silence"] == 0).any()
        for key, value in expected.items():
            torch.testing.assert_close(told[key], value, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}")
    assert 0 in found["reports"][-1].jumps
    for report, expected in zip(found["reports"], alone["reports"], strict=True):
        for group, other in zip(report.groups.values(), expected.groups.values(), strict=True):
            assert (group.samples, group.dead, group.note) == (other.samples, other.dead, other.note)
            assert group.effective_rank == pytest.approx(other.effective_rank)


def test_what_is_refused_is_refused_on_every_rank_and_keeps_none_waiting() -> None:
    scenarios = ("refusals", "resizing", "resumed", "normalised", "resized_elsewhere", "reads_inside", "absent")
    first, last = run(2, *scenarios)
    expected = {
        "weights": "RanksDiffer: Recycler(process_group=...): rank 1 differs from rank 0 in the parameter '2.weight'",
        "options": "RanksDiffer: Recycler(process_group=...): rank 1 differs from rank 0 in the option warmup",
        "groups": "RanksDiffer: Recycler(process_group=...): rank 1 differs from rank 0 in group '2' of the graph",
        "method": "RanksDiffer: Recycler(process_group=...): rank 1 differs from rank 0 in the option method",
        "zero": "ValueError: ZeroRedundancyOptimizer has no state of single units on every rank",
        "target": "TypeError: a target network is wrapped in DistributedDataParallel: pass its .module",
        "growth": "ValueError: the method reads 'junction', for new units, but units and layers cannot come or go",
        "group": "TypeError: process_group is a torch.distributed ProcessGroup that holds this process",
        "wrapper": "TypeError: trace needs the network inside of DistributedDataParallel: pass net.module",
        "sharded": "ValueError: parameter '2.weight' is sharded over the ranks",
        "by itself": "this is one of 2 processes and the Recycler knows none of the others",
        "drifted": "RanksDiffer: step(): rank 1 differs from rank 0 in the parameter '4.bias'",
        "calls": "RanksDiffer: rank 0 is at step(), rank 1 at report(): every rank must call the same",
        "init": "RanksDiffer: the end of step(): rank 1 differs from rank 0 in the parameter '0.weight'",
    }
    for told in (first["refusals"], last["refusals"]):
        assert told.keys() == expected.keys()
        for name, beginning in expected.items():
            assert told[name].startswith(beginning), told[name]
            assert "\n" not in told[name]

    for told in (first["resizing"], last["resizing"]):
        assert "cannot come or go in data-parallel training" in told["near_zero"].groups["0"].note
        for name in ("net2deeper", "plasticity_injection"):
            assert "cannot come or go in data-parallel training" in told[name].note
        assert not any(report.edits or report.interventions for report in told.values())

    for told in (first["resumed"], last["resumed"]):
        assert same(told["0"], told["1"]) and same(told["0"], told["2"])

    assert not torch.equal(first["normalised"].pop("means"), last["normalised"].pop("means"))
    assert same(first["normalised"], last["normalised"])
    assert sum(report.recycled for report in first["normalised"]["reports"]) > 0

    for told in (first["resized_elsewhere"], last["resized_elsewhere"]):
        assert all("was resized by something other" in report.groups["0"].note for report in told)

    assert "NotRecyclable: step() inside listening()" in last["reads_inside"]
    assert first["reads_inside"].startswith("RanksDiffer: the end of step() failed on rank 1: NotRecyclable: step()")

    assert first["absent"]["error"].startswith("RanksDiffer: step(): another rank did not come to it, or ended (")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_method_edits_alike_on_all_ranks_for_100_events(world: int) -> None:
    found = run(world, "one_by_one")
    alone = data_parallel.one_by_one(0, 1)
    for name in METHODS:
        recycled = sum(report.recycled for report in alone[name]["reports"])
        off = apart(found[0]["one_by_one"][name]["weights"], alone[name]["weights"])
        print(f"{name}: {recycled} units recycled in 100 events; {world} ranks end {off:.1e} from one process")
        assert recycled > 0, name
        check_alike([ranks["one_by_one"][name] for ranks in found], alone[name], 1e-6)
