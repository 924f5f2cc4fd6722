"""Rows of training passes that say what a new unit would be worth: what it reads, what there is, what is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recycle.graph import UnitGroup, plain

_ROWS = 2048
"""Examples that are kept, at most: those of the latest passes."""


@dataclass(frozen=True, eq=False)
class GrowthSample:
    """Rows of the latest sampled passes at the layer that makes a group's units and at those that read them.

    Float64, on the CPU. A row is an example (a position of a sequence); each example counts once, as it was seen last,
    with the mean of its gradients: the same observation with other actions and rewards says more than one of them.
    """

    inputs: Tensor
    """What a unit's weights meet: ``(rows, fan_in)``, with a last column of ones where the layer has a bias."""
    activations: Tensor
    """The units as their consumers read them, ``(rows, width)``."""
    gradients: Tensor
    """Gradient of the loss at the consumers' outputs, ``(rows, outputs of all consumers)``; of a mean loss it carries
    1 / batch."""
    preactivations: Tensor
    """The units before their activation, ``(rows, width)``."""
    beside: Tensor
    """What else the consumers read: ``(rows, features)``, with a last column of ones where one has a bias."""
    biased: bool
    """Whether ``inputs`` ends with a column of ones."""
    outgoing: Tensor
    """What the consumers make of the units now, ``(outputs of all consumers, width)``."""


@dataclass(eq=False)
class _Pass:
    """One pass while its gradients are on their way."""

    inputs: Tensor
    preactivations: Tensor
    examples: Tensor
    shape: torch.Size
    activations: Tensor | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)
    spoiled: bool = False


class Examples:
    """Tells which rows of several passes are the same example: one for all layers of a network.

    Rows are known by what the first layer of a pass reads, so that a rollout buffer or a small data set that is passed
    over again and again does not look larger than it is.
    """

    def __init__(self) -> None:
        self._latest = torch.zeros(0, 0)

    def of(self, inputs: Tensor, first: bool) -> Tensor:
        """What the first layer of this pass read, row by row: ``(rows, features)``."""
        if first or len(self._latest) != len(inputs):
            self._latest = inputs
        return self._latest


class Recorder:
    """Hooks that keep the rows of one group.

    Args:
        group: one of which :func:`why_not_sampled` says "".
        examples: shared by all groups of a network.
        first: whether its layer is the first of those watched in a pass.
    """

    def __init__(self, group: UnitGroup, examples: Examples, first: bool) -> None:
        self.examples, self.first = examples, first
        ((self.producer, axis),) = group.producers()
        self.units = axis.index[:, 0]
        self.biased = any(axis.role == "bias" for axis in group.incoming)
        self.columns = group.outgoing[0].index[:, 0]
        self.consumers: list[Any] = _consumers(group)
        self.passes: list[tuple[Tensor, ...]] = []  # inputs, pre-activations, examples, activations, gradients
        self._open: _Pass | None = None

    def points(self) -> Iterator[tuple[nn.Module, Any]]:
        """The consumers and their forward hooks; the producer's is :meth:`begin`."""
        for number, layer in enumerate(self.consumers):
            yield layer, partial(self._read, number)

    def begin(self, inputs: Tensor | None, output: Any) -> None:
        """A sampled pass comes by the producer; None: one that does not count."""
        self._open = None
        if inputs is not None:
            kept = _rows(inputs)
            examples = self.examples.of(kept, self.first)
            self._open = _Pass(kept, _rows(output), examples, inputs.shape[:-1])

    def _read(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        here = self._open
        if here is None or not args or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if args[0].shape[:-1] != here.shape or number in here.gradients:
            here.spoiled = True
            return
        if here.activations is None:
            here.activations = _rows(args[0])
        here.gradients[number] = torch.empty(0)  # on its way
        output.register_hook(partial(self._arrive, here, number))  # type: ignore[no-untyped-call]

    def _arrive(self, here: _Pass, number: int, gradient: Tensor) -> None:
        here.gradients[number] = _rows(gradient)
        if here.spoiled or len(here.gradients) < len(self.consumers) or here.activations is None:
            return
        wanted = [here.gradients[i] for i in range(len(self.consumers))]
        if all(len(part) == len(here.inputs) for part in wanted):
            gradients = torch.cat(wanted, 1)
            self.passes.append((here.inputs, here.preactivations, here.examples, here.activations, gradients))
            while sum(len(kept[0]) for kept in self.passes[1:]) >= _ROWS:
                del self.passes[0]

    def clear(self) -> None:
        """Forget everything."""
        self.passes.clear()
        self._open = None

    def sample(self) -> GrowthSample | None:
        """What was kept, or None where no gradient has come yet."""
        if not self.passes:
            return None
        passes = [[part.cpu().double() for part in kept] for kept in self.passes]
        inputs, before, examples, read, gradients = (torch.cat(parts)[-_ROWS:] for parts in zip(*passes, strict=True))
        which = torch.unique(examples, dim=0, return_inverse=True)[1]
        rows = torch.arange(len(which))
        latest = torch.zeros(int(which.max()) + 1, dtype=torch.long)
        latest = latest.scatter_reduce_(0, which, rows, "amax").sort().values
        told = torch.zeros(len(latest), gradients.shape[1], dtype=torch.double).index_add_(0, which, gradients)
        told /= which.bincount()[:, None]
        ones = torch.ones(len(latest), 1, dtype=torch.double)
        other = torch.ones(read.shape[1], dtype=torch.bool)
        other[self.columns] = False
        has_bias = any(getattr(layer, "bias", None) is not None for layer in self.consumers)
        return GrowthSample(
            inputs=torch.cat([inputs[latest], ones], 1) if self.biased else inputs[latest],
            activations=read[latest][:, self.columns],
            gradients=told[which[latest]],
            preactivations=before[latest][:, self.units],
            beside=torch.cat([read[latest][:, other], *([ones] if has_bias else [])], 1),
            biased=self.biased,
            outgoing=torch.cat([layer.weight.detach()[:, self.columns].cpu().double() for layer in self.consumers]),
        )

    def state(self) -> list[list[Tensor]]:
        """Plain tensors."""
        return [[part.to("cpu", copy=True) for part in kept] for kept in self.passes]

    def load(self, state: list[list[Tensor]]) -> None:
        """Go on from :meth:`state`."""
        self.passes = [tuple(part.clone() for part in kept) for kept in state]


def why_not_sampled(group: UnitGroup) -> str:
    """Why there are no such rows of a group, or "" where there are."""
    made = [axis.name for axis in group.incoming if axis.role == "weight"]
    producers = [layer for layer, _ in group.producers()]
    if len(made) != 1 or len(producers) != 1 or not isinstance(producers[0], nn.Linear):
        return f"its units are not made by one Linear layer alone but by {', '.join(made)}"
    others = [axis.name for axis in group.incoming if axis.role not in ("weight", "bias")]
    if others:
        return f"{others[0]!r} stands between the layer and its activation"
    for axis in group.outgoing:
        layer = group.module.get_submodule(axis.name.rpartition(".")[0])
        if not (axis.hooked and isinstance(layer, nn.Linear) and plain(layer) and axis.dim == 1 and axis.span == 1):
            return f"consumer {axis.name!r} is no Linear layer with one column for each unit"
        if len(group.outgoing) > 1 and axis.size(group.tensor(axis.name)) != group.width:
            return f"consumer {axis.name!r}, one of several, reads other features beside the units"
    if len(_consumers(group)) < len(group.outgoing) or not group.one_value:
        return "its consumers read different values of it"
    return ""


def _consumers(group: UnitGroup) -> list[nn.Module]:
    layers = [group.module.get_submodule(axis.name.rpartition(".")[0]) for axis in group.outgoing]
    return list(dict.fromkeys(layers))


def _rows(values: Tensor) -> Tensor:
    """A copy with one row for each sample and position; at most 2048, spread over all of them."""
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows[:: max(1, -(-len(rows) // _ROWS))].clone()
