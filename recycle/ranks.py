"""The processes of a data-parallel training: what they tell one another at an event, and what they must agree on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.graph import Graph
from recycle.merged import condensed, merged
from recycle.optimizers import REFUSED
from recycle.report import Report
from recycle.seen import settled
from recycle.stats import Stats
from recycle.track import Tracker

NO_RESIZE = (
    "units and layers cannot come or go in data-parallel training: DistributedDataParallel would wait for the "
    "gradients of the parameters that were replaced, and those of the new ones would differ from rank to rank"
)
_FOR_NEWBORNS = ("junction", "growth", "mistakes")
_WHOLE = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_SHARDED = ("DTensor", "FlatParameter")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksDiffer(RuntimeError):
    """Processes that should do the same do not: which rank, and in what. Nothing can go on from there."""


def ranks_of(
    process_group: dist.ProcessGroup | None,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    targets: Sequence[tuple[nn.Module, float]],
    needs: Sequence[str],
) -> Ranks | None:
    """The ranks of a process group; None, with a warning where there are others, for a process by itself."""
    if process_group is not None:
        return Ranks(process_group, module, optimizers, targets, needs)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"this is one of {dist.get_world_size()} processes and the Recycler knows none of the others: in "
            "data-parallel training their weights would part. Pass process_group=torch.distributed.group.WORLD",
            stacklevel=3,
        )
    return None


class Ranks:
    """All processes that train one network, each on its own part of every batch.

    They talk at events alone: one exchange of what each saw, one of what came of it, and one for every group that a
    Polyak target is asked about. An exchange is two collectives (sizes, then bytes), whatever a rank has to say, so
    that one that saw nothing, or that failed, keeps no other waiting. Every rank then works out the same from the same
    numbers; checksums of all parameters, before and behind the edits, tell whether it did.

    Bytes travel as CPU tensors (gloo), or on the network's device where the backend is nccl, which is not tested.

    Args:
        process_group: of this process and the others.
        module: the network, not wrapped.
        optimizers: those of the recycler.
        targets: those of the recycler.
        needs: statistics that its methods read.

    Raises:
        TypeError: ``process_group`` is none, or a target is wrapped.
        ValueError: parameters or optimizer state are spread over the ranks, or a statistic serves new units alone.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        module: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        targets: Sequence[tuple[nn.Module, float]] = (),
        needs: Sequence[str] = (),
    ) -> None:
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group is a torch.distributed ProcessGroup that holds this process "
                f"(torch.distributed.group.WORLD after init_process_group), got {process_group!r}"
            )
        for name in needs:
            if name in _FOR_NEWBORNS:
                raise ValueError(f"the method reads {name!r}, for new units, but {NO_RESIZE}")
        for target, _ in targets:
            if isinstance(target, _WHOLE):
                raise TypeError(f"a target network is wrapped in {type(target).__name__}: pass its .module")
        for optimizer in optimizers:
            if type(optimizer).__name__ in REFUSED:
                name = type(optimizer).__name__
                raise ValueError(f"{name} has no state of single units on every rank: {REFUSED[name]}. Use Adam or SGD")
        for name, parameter in module.named_parameters():
            if type(parameter).__name__ in _SHARDED or type(parameter.data).__name__ in _SHARDED:
                raise ValueError(f"parameter {name!r} is sharded over the ranks; units need it whole. Use DDP")
        self.process_group, self.module = process_group, module
        self._settled: dict[str, Tensor | None] = {}

    # -- agreeing ------------------------------------------------------------------------------------------

    def begin_alike(self, graph: Graph, options: dict[str, Any], generator: torch.Generator) -> None:
        """Refuse ranks that begin with other weights, groups or options; all take rank 0's state of the generator.

        Raises:
            RanksDiffer: says which rank differs from rank 0, and in what.
        """
        doing = "Recycler(process_group=...)"

        def beginning() -> dict[str, Any]:
            same: dict[str, Any] = {f"the option {name}": value for name, value in options.items()}
            same |= {f"group {group.name!r} of the graph": _described(group) for group in graph}
            return {"same": same | self._weights(), "generator": generator.get_state()}

        generator.set_state(self._exchange(doing, beginning)[0]["generator"])

    def event(
        self,
        doing: str,
        act: Callable[[], Report],
        *,
        tracker: Tracker,
        recorded: dict[str, tuple[int, float | Tensor]],
        books: dict[str, Any],
        generator: torch.Generator,
        keep_window: bool,
    ) -> Report:
        """What ``act`` returns, which is called while ``tracker`` and ``recorded`` hold what all ranks saw.

        Of jumps, which each rank sees on a batch of its own, it holds the farthest.

        Args:
            doing: what the user called, for errors.
            act: reads statistics and edits; it must do the same on every rank.
            tracker: of this rank.
            recorded: what this rank's training loop measured: how often, and the sum.
            books: numbers that must be the same on every rank.
            generator: the recycler's.
            keep_window: go on with this rank's own window behind it.

        Raises:
            RanksDiffer: ranks do different things, differ before or after ``act``, or another rank failed. What this
                rank raises itself is raised as it is.
        """
        own: dict[str, Any] = {}
        measured = dict(recorded)
        reports: list[Report] = []

        def same() -> dict[str, Any]:
            return {"the random generator": _checksum(generator.get_state()).tolist(), **self._weights()}

        def seen() -> dict[str, Any]:
            own.update(tracker.state_dict())
            return {
                "same": {f"the number of {name}": value for name, value in books.items()} | same(),
                "tracker": condensed(own),
                "recorded": {name: (count, float(total)) for name, (count, total) in recorded.items()},
                "outdated": tracker.outdated,
                "settled": {} if tracker.outdated else {group.name: settled(group) for group in tracker.graph},
            }

        def acted() -> dict[str, Any]:
            self._take(found, own, tracker, recorded)
            reports.append(act())
            return {"same": same(), "jumps": dict(reports[0].jumps)}

        found = self._exchange(doing, seen)
        try:
            ended = self._exchange(f"the end of {doing}", acted)
        except BaseException:
            keep_window = True
            raise
        finally:
            if keep_window:
                tracker.load_state_dict(_with_firing(own, tracker.state_dict()))
                recorded.clear()
                recorded.update(measured)
        jumps = {at: max(told["jumps"].get(at, 0.0) for told in ended) for told in ended for at in told["jumps"]}
        return replace(reports[0], jumps=jumps)

    def _take(
        self,
        found: Sequence[dict[str, Any]],
        own: dict[str, Any],
        tracker: Tracker,
        recorded: dict[str, tuple[int, float | Tensor]],
    ) -> None:
        """Let a rank's tracker and measurements be those of all."""
        tracker.load_state_dict(merged([told["tracker"] for told in found], own))
        outdated = next((told["outdated"] for told in found if told["outdated"]), "")
        if outdated:
            tracker.outdated = outdated
            tracker.detach()
            tracker.clear()
        recorded.clear()
        for told in found:
            for name, (count, total) in told["recorded"].items():
                before = recorded.get(name, (0, 0.0))
                recorded[name] = before[0] + count, before[1] + total
        self._settled = {}
        for name in found[0]["settled"]:
            parts = [told["settled"].get(name) for told in found]
            known = [part for part in parts if part is not None]
            self._settled[name] = torch.stack(known).all(0) if known else None

    def agreed(self, name: str, stats: Stats) -> Stats:
        """A group's statistics without what differs from rank to rank: buffers may, and say which units settled."""
        return replace(stats, settled=self._settled.get(name))

    def largest(self, values: Tensor | None, doing: str) -> Tensor | None:
        """The largest of all ranks' values, element by element; None where no rank has any."""
        found = [told["values"] for told in self._exchange(doing, lambda: {"values": values})]
        known = [one for one in found if one is not None]
        return torch.stack(known).amax(0) if known else None

    def _weights(self) -> dict[str, Any]:
        """A checksum of the bits of each parameter."""
        held = self.module.named_parameters()
        return {f"the parameter {name!r}": [*p.shape, *_checksum(p).tolist()] for name, p in held}

    # -- talking -------------------------------------------------------------------------------------------

    def _exchange(self, doing: str, tell: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """What every rank tells, in their order. Where one fails all raise, and none is left waiting."""
        failure: Exception | None = None
        try:
            told = {"doing": doing, "error": "", "same": {}, **tell()}
        except RanksDiffer:
            raise  # an exchange inside of this one: all ranks know
        except Exception as error:
            failure = error
            told = {"doing": doing, "error": f"{type(error).__name__}: {_line(error)}", "same": {}}
        found = self._gather(told, doing)
        if failure is not None:
            raise failure
        for rank, other in enumerate(found):
            if other["error"]:
                raise RanksDiffer(f"{other['doing']} failed on rank {rank}: {other['error']}")
        for rank, other in enumerate(found):
            if other["doing"] != found[0]["doing"]:
                raise RanksDiffer(
                    f"rank 0 is at {found[0]['doing']}, rank {rank} at {other['doing']}: every rank must call the same "
                    "after the same update"
                )
            for key in found[0]["same"] | other["same"]:
                if other["same"].get(key) != found[0]["same"].get(key):
                    raise RanksDiffer(f"{doing}: rank {rank} differs from rank 0 in {key}. {_ADVICE}")
        return found

    def _gather(self, told: dict[str, Any], doing: str) -> list[dict[str, Any]]:
        group, size = self.process_group, dist.get_world_size(self.process_group)
        device = torch.device("cpu")
        if dist.get_backend(group) == "nccl":
            device = next(self.module.parameters()).device
        file = io.BytesIO()
        torch.save(told, file)
        mine = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(device)
        try:
            lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(size)]
            dist.all_gather(lengths, torch.tensor([len(mine)], device=device), group=group)
            most = int(max(lengths))
            parts = [mine.new_empty(most) for _ in range(size)]
            dist.all_gather(parts, torch.cat([mine, mine.new_zeros(most - len(mine))]), group=group)
        except RuntimeError as error:
            raise RanksDiffer(f"{doing}: another rank did not come to it, or ended ({_line(error)})") from error
        raw = [part[: int(length)].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]
        return [torch.load(io.BytesIO(each), weights_only=True) for each in raw]


_ADVICE = "All must begin with the same weights, see the same updates, and draw from the recycler's generator alone"


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _with_firing(own: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A tracker's own state, in which the passes that were kept apart have counted."""
    seen = {}
    for name, mine in own["seen"].items():
        counted = [window["firing"] for window in now["seen"][name]["windows"]]
        windows = [window | {"firing": f} for window, f in zip(mine["windows"], counted, strict=True)]
        seen[name] = mine | {"windows": windows}
    return own | {"seen": seen}


def _described(group: Any) -> list[Any]:
    """What a group is made of, to compare."""
    axes = (*group.incoming, *group.outgoing)
    parts = [[axis.name, axis.dim, axis.role, *_checksum(axis.index).tolist()] for axis in axes]
    return [group.width, group.exact, *parts]


def _checksum(values: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as integers, and their sum weighted by place: equal for equal tensors."""
    values = torch.view_as_real(values.detach()) if values.is_complex() else values.detach()
    bits = values.contiguous().flatten().view(_INTEGERS[values.element_size()]).long()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * places).sum()])
