"""Run the loss with newborn units in their places, and ask for its derivatives there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recycle.births import Elements
from recycle.graph import Axis, NotRecyclable, UnitGroup
from recycle.tracing import undisturbed


class LossTrial:
    """What a loss says of units that stand in a network already: :class:`recycle.births.newborns.Trial`.

    Runs leave no mark but on the units' own elements: gradients, buffers and random states come back, and each run
    sees the same random numbers. Normalisations and dropout are in evaluation mode.

    Args:
        group: of which the newborns are units already.
        units: the newborns' numbers.
        loss: the loss of a batch, a scalar; the same batch whenever it is called.
    """

    def __init__(self, group: UnitGroup, units: Tensor, loss: Callable[[], Tensor]) -> None:
        self.group, self.units, self._loss = group, units, loss

    def loss(self, incoming: Elements, outgoing: Elements) -> float:
        """The loss with these elements."""
        self._place(incoming, outgoing)
        with undisturbed(self.group.module), torch.no_grad():
            return float(self._value())

    def gradients(self, incoming: Elements, outgoing: Elements) -> tuple[Elements, Elements]:
        """Gradients of the loss at both sides; zero for buffers."""
        self._place(incoming, outgoing)
        with undisturbed(self.group.module), torch.enable_grad():
            loss = self._value()
            parts = [self._read(loss, axes) for axes in (self.group.incoming, self.group.outgoing)]
        return parts[0], parts[1]

    @contextmanager
    def pairing(self, incoming: Elements) -> Iterator[LossPairing]:
        """Mixed second derivatives around units with these incoming elements and no outgoing ones."""
        group = self.group
        self._place(incoming, None)
        with undisturbed(group.module), torch.enable_grad():
            loss = self._value()
            try:
                yield LossPairing(self, self._read(loss, group.incoming, create_graph=True))
            except RuntimeError as error:
                if "derivative" not in str(error) and "double backward" not in str(error):
                    raise
                raise NotRecyclable(f"the loss cannot be differentiated twice: {error}") from error

    def _value(self) -> Tensor:
        value = self._loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or not math.isfinite(float(value.detach())):
            raise NotRecyclable(f"loss must return one finite number as a tensor, got {value!r:.60}")
        return value.reshape(())

    def _place(self, incoming: Elements, outgoing: Elements | None) -> None:
        with torch.no_grad():
            for axis, rows in zip(self.group.incoming, incoming, strict=True):
                axis.write(self.group.tensor(axis.name), self.units, rows)
            for i, axis in enumerate(self.group.outgoing):
                if outgoing is None:
                    axis.fill(self.group.tensor(axis.name), self.units, 0.0)
                else:
                    axis.write(self.group.tensor(axis.name), self.units, outgoing[i])

    def _read(self, of: Tensor, axes: Sequence[Axis], *, create_graph: bool = False) -> Elements:
        """Gradients of a number at the units' elements along these axes."""
        tensors = [self.group.tensor(axis.name) for axis in axes]
        leaves = list({id(t): t for t in tensors if isinstance(t, nn.Parameter)}.values())
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if of.requires_grad:
            found = torch.autograd.grad(of, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True)
        by_id = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
        return tuple(
            axis.read(tensor.detach() * 0 if (g := by_id.get(id(tensor))) is None else g, self.units)
            for axis, tensor in zip(axes, tensors, strict=True)
        )


class LossPairing:
    """Two backward passes through a gradient: :class:`recycle.births.newborns.Pairing`."""

    def __init__(self, trial: LossTrial, into: Elements) -> None:
        self._trial, self._into = trial, into
        self._probe = tuple(torch.zeros_like(part, requires_grad=True) for part in into)
        self._out = self._told(self._probe, create_graph=True)  # linear in the probe

    def incoming(self, outgoing: Elements) -> Elements:
        """Gradient at the incoming elements of units with these outgoing ones."""
        total = _product(self._out, outgoing)
        if not total.requires_grad:
            return tuple(torch.zeros_like(part) for part in self._probe)
        found = torch.autograd.grad(total, self._probe, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(p) if f is None else f.detach() for p, f in zip(self._probe, found, strict=True))

    def outgoing(self, incoming: Elements) -> Elements:
        """Its transpose: a little of these incoming elements, the gradient at the outgoing ones."""
        return tuple(part.detach() for part in self._told(incoming))

    def _told(self, incoming: Elements, *, create_graph: bool = False) -> Elements:
        total = _product(self._into, incoming)
        return self._trial._read(total, self._trial.group.outgoing, create_graph=create_graph)


def _product(one: Elements, other: Elements) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
