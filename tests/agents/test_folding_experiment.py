"""The experiment on 1000 small networks: its parts against plain torch and the library, and the command as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import recycle
from agents.experiments import __main__ as command
from agents.experiments import folding
from agents.experiments.folding import ARMS, Nets
from recycle.folding import fold
from recycle.mistakes import mistakes_of

SMALL = ["--networks", "4", "--steps", "3", "--seeds", "1", "--workers", "1", "--tasks", "period"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(networks: int, hidden: int) -> Nets:
    return folding.initial(networks, hidden, seeded()).of(slice(None))


def alone(nets: Nets, one: int) -> nn.Sequential:
    """One of the networks as a module."""
    hidden = nets.incoming.shape[1]
    net = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2)).double()
    with torch.no_grad():
        for layer, weight in ((net[0], nets.incoming[one]), (net[2], nets.outgoing[one])):
            layer.weight.copy_(weight[:, :-1])
            layer.bias.copy_(weight[:, -1])
    return net


@pytest.mark.parametrize("name", folding.TASKS)
def test_tasks_have_as_many_points_as_said_of_two_classes(name: str) -> None:
    x, y = folding.task(name, 0)
    assert x.shape == (folding.POINTS, 2) and y.shape == (folding.POINTS,)
    assert 0.3 < y.double().mean() < 0.7
    again, other = folding.task(name, 0), folding.task(name, 1)
    assert torch.equal(x, again[0]) and not torch.equal(x, other[0])


def test_points_near_the_sine_are_left_out_and_classes_are_its_sides() -> None:
    x, y = folding.task("sine", 2)
    apart = x[:, 1] - x[:, 0].sin()
    assert apart.abs().min() >= 0.25 and torch.equal(apart > 0, y == 1)


@pytest.mark.parametrize("hidden", [2, 3])
def test_gradients_are_autograds(hidden: int) -> None:
    nets, (x, y) = doubles(5, hidden), folding.task("sine", 0)
    weights = [nets.incoming.clone().requires_grad_(), nets.outgoing.clone().requires_grad_()]
    outputs = Nets(*weights)(x.double())
    loss = cross_entropy(outputs.flatten(0, 1), y.repeat(5), reduction="none").view(5, -1).mean(1).sum()
    for got, wanted in zip(
        folding.gradients(nets, x.double(), y.double()), torch.autograd.grad(loss, weights), strict=True
    ):
        assert torch.allclose(got, wanted, atol=1e-14)


def test_side_by_side_is_what_each_would_learn_alone() -> None:
    nets, (x, y) = doubles(3, 2), folding.task("stacked", 0)
    net = alone(nets, 1)
    adam = torch.optim.Adam(net.parameters(), lr=folding.LEARNING_RATE)
    for _ in range(20):
        cross_entropy(net(x.double()), y).backward()
        adam.step()
        adam.zero_grad()
    trained = folding.train(nets, x.double(), y, 20)
    assert torch.allclose(trained.incoming[1, :, :2], net[0].weight, atol=1e-9)
    assert torch.allclose(trained.outgoing[1, :, -1], net[2].bias, atol=1e-9)


def test_the_experiment_folds_as_the_library_folds_a_traced_network() -> None:
    """The same functions, told the same by a stack of networks as by the hooks on one."""
    x, y = folding.task("interleaved", 0)
    nets, x = folding.train(doubles(3, 2), x.double(), y, 30), x.double()
    for one in range(3):
        net = alone(nets, one)
        graph = recycle.trace(net, lambda net=net: net(x))

        def examples(net: nn.Module = net) -> Any:
            outputs = net(x)
            return outputs, cross_entropy(outputs, y, reduction="none"), y

        hooked = fold(mistakes_of(graph["0"], examples), generator=seeded())
        stacked = fold(folding.mistakes(nets.of(slice(one, one + 1)), x, y), generator=seeded())
        for name in ("found", "reached", "typical", "mispredicted"):
            assert torch.equal(getattr(hooked, name), getattr(stacked, name))
        for name in ("instance", "point", "weight", "bias"):
            assert torch.allclose(getattr(hooked, name), getattr(stacked, name), atol=1e-9)
        assert stacked.found.all()


def test_a_stack_is_folded_net_by_net() -> None:
    """Scores, margins and losses of one net do not depend on its neighbours."""
    x, y = folding.task("period", 0)
    nets, x = doubles(4, 2), x.double()
    all_of_them, second = folding.mistakes(nets, x, y), folding.mistakes(nets.of(slice(1, 2)), x, y)
    row, point, directions = torch.tensor([3, 5, 7, 9]), x[:4], x[None, :6].expand(4, -1, -1)
    assert torch.allclose(all_of_them.margin(row, point)[1:2], second.margin(row[1:2], point[1:2]))
    assert torch.allclose(all_of_them.score(point, directions)[1:2], second.score(point[1:2], directions[1:2]))
    assert torch.allclose(all_of_them.losses[1], second.losses[0])


def test_widened_networks_say_what_they_said() -> None:
    nets, (x, _) = doubles(6, 2), folding.task("sine", 0)
    wide = folding.widened(nets, torch.randn(6, 3, generator=seeded()).double())
    assert wide.incoming.shape == (6, 3, 3) and wide.outgoing.shape == (6, 2, 4)
    assert (wide(x.double()) - nets(x.double())).abs().max() < 1e-15
    assert not wide.outgoing[:, :, 2].any() and torch.equal(wide.outgoing[:, :, 3], nets.outgoing[:, :, 2])


def test_counts_are_within_the_best_of_the_data_set() -> None:
    accurate = np.array([[0.95, 0.9, 0.94], [0.93, 0.945, 0.2]])
    assert folding.counts([{"accuracy": accurate}], 0.005).tolist() == [[1, 1]]
    assert folding.counts([{"accuracy": accurate}], 0.02).tolist() == [[2, 2]]
    errors = folding.standard_error(np.array([[50.0, 0.0], [50.0, 100.0]]), 100)
    assert errors.tolist() == pytest.approx([np.sqrt(25 + 25) / 2, 0])


def test_the_command_keeps_what_is_there_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["folding", *SMALL, "--log-folder", str(tmp_path)]
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert all(arm in out for arm in ARMS) and "of 4 networks 2-3-2" in out
    assert {path.name for path in tmp_path.iterdir()} == {"period-0.npz", "folding.txt", "folding.png"}
    with np.load(tmp_path / "period-0.npz") as saved:
        assert saved["accuracy"].shape == (len(ARMS), 4)
        assert (saved["found"][:2] == 0).all() and (saved["reached"] <= saved["found"]).all()
        assert len(saved["before"]) == 12 and len(saved["after"]) == len(saved["trained"]) == 17
    kept = (tmp_path / "period-0.npz").stat().st_mtime_ns
    assert command.main(argv) == 0
    assert (tmp_path / "period-0.npz").stat().st_mtime_ns == kept
    assert command.main([*argv, "--steps", "4"]) == 0
    assert (tmp_path / "period-0.npz").stat().st_mtime_ns != kept


@pytest.mark.parametrize("wrong", [["--tasks", "cosine"], ["--seeds", "0"], ["--workers", "0"]])
def test_bad_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    assert command.main(["folding", *SMALL, "--log-folder", str(tmp_path / "new"), *wrong]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error:")
    assert not (tmp_path / "new").exists()
