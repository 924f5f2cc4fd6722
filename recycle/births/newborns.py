"""What a birth is told of the units about to be born, and what it may say of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from recycle.graph import Axis, NotRecyclable
from recycle.junction import Junction
from recycle.response import Response

Elements: TypeAlias = tuple[Tensor, ...]
"""One tensor ``(units, span, everything else)`` for each of several axes, as :meth:`recycle.graph.Axis.read` returns
them."""
_ONLY_GROW = "this birth says outgoing weights, which only Grow takes; a Reset leaves them at zero"


@dataclass(frozen=True, eq=False)
class Newborns:
    """Units about to be born, with everything that a birth may look at.

    Tensors are shaped ``(units, span, everything else)``, as :meth:`recycle.graph.Axis.read` returns them.
    """

    axes: tuple[Axis, ...]
    """The incoming axes of the group: weight rows, biases, gains, running statistics."""
    fresh: Elements
    """What the module's own initialisation gives these units, one tensor for each axis."""
    parents: Elements | None
    """The live elements of each newborn's parent, or None where the edit names no parents."""
    others: Elements = ()
    """The elements of all units that stay, ``(units that stay, span, ...)``."""
    draws: Elements = ()
    """Standard normal numbers shaped like ``fresh``; a target network's newborns get the same ones."""
    responses: tuple[Response | None, ...] = ()
    """For each axis: what rows give on the layer's latest inputs, ``(values, units, span)`` without any bias. None
    where these are unknown: for biases, recurrent weights, or where no inputs were kept."""

    # Of units that Grow adds:
    consumers: tuple[Axis, ...] = ()
    """The outgoing axes of the group: the columns of every consumer."""
    spoken: Elements = ()
    """The outgoing elements of all units that stay, one tensor for each consumer."""
    sent: Elements = ()
    """Standard normal numbers shaped like the newborns' own outgoing elements."""
    read: Callable[[Elements], Elements] | None = None
    """What the consumers would read of newborns with these incoming elements, ``(values, units)`` for each distinct
    value that is consumed: on the traced calls, and once more with all other parameters of the network disturbed. None
    outside of a Grow."""
    slope: Callable[[Elements], Tensor] | None = None
    """How strongly what the consumers read depends on the incoming weights, if these are a newborn's elements, by
    torch's derivatives on the traced calls: ``(units,)``."""
    redraw: Callable[[], tuple[Elements, Elements]] | None = None
    """Another draw of ``fresh`` and of ``sent``."""
    junction: Junction | str = "no pass was sampled: pass junction="
    """What one pass showed on both sides of the units, or why that is not known."""
    trial: Trial | None = None
    """Runs the loss with the newborns in place; None where no loss was passed."""
    normalised: str = ""
    """The normalisation that these units pass through, or ""."""
    why_not_foldable: str = ""
    """Why consumers' biases cannot make up for what newborns say at rest, or ""."""

    def refuse_normalised(self, birth: str) -> None:
        """Raise :class:`recycle.NotRecyclable` if a normalisation stands behind the units' weights."""
        if self.normalised:
            raise NotRecyclable(
                f"{birth} needs units whose size their weights decide; {self.normalised!r} normalises them"
            )

    def resting(self, lift: float) -> Elements:
        """Incoming elements of units that give the same for every input: weights of zero, a first bias of ``lift``.

        Gains and the like are fresh ones.
        """
        rows, lifted = [], False
        for axis, fresh in zip(self.axes, self.fresh, strict=True):
            if axis.role == "bias" and not lifted:
                rows.append(torch.full_like(fresh, lift))
                lifted = True
            else:
                rows.append(torch.zeros_like(fresh) if axis.role in ("weight", "bias") else fresh)
        return tuple(rows)

    def at_rest(self, lift: float) -> tuple[Elements, Tensor]:
        """The :meth:`resting` elements, and the one value that the consumers read of each unit then: ``(units,)``.

        Raises:
            NotRecyclable: what they read is not one value (a recurrent unit's state goes on changing).
        """
        rows = self.resting(lift)
        values = self._read(rows)
        low, high = torch.cat(values).amin(0), torch.cat(values).amax(0)
        if bool((high - low > 1e-9 * high.abs()).any()):
            raise NotRecyclable(
                "units at rest are not constant: what is read of them depends on the data (a state, a factor)"
            )
        return rows, high

    def refuse_deaf(self, rows: Elements) -> None:
        """Raise :class:`recycle.NotRecyclable` if units with these incoming elements have no gradient there."""
        if self.slope is None:
            raise NotRecyclable(_ONLY_GROW)
        if not bool((self.slope(rows) > 0).all()):
            raise NotRecyclable(
                "new units without incoming weights would have no gradient: their activation is flat there (a ReLU's "
                "derivative at zero is zero), and no bias of their own lifts them off it. Use zero_out"
            )

    @property
    def usual_outgoing(self) -> float:
        """Length of the outgoing elements of the units that stay, their mean."""
        if not self.spoken:
            raise NotRecyclable(_ONLY_GROW)
        return float(_lengths(self.spoken).mean())

    def outgoing_of_length(self, directions: Elements, scale: float) -> Elements:
        """Each unit's outgoing elements, ``scale`` times as long as those of the units that stay are on average."""
        usual = self.usual_outgoing
        length = _lengths(directions).clamp_min(torch.finfo(directions[0].dtype).tiny)
        factor = (scale * usual / length).to(directions[0])[:, None, None]
        return tuple(factor * part for part in directions)

    def _read(self, rows: Elements) -> Elements:
        if self.read is None:
            raise NotRecyclable(_ONLY_GROW)
        return self.read(rows)


@dataclass(frozen=True, eq=False)
class Born:
    """What new units are on both sides."""

    incoming: Elements
    """One tensor for each of ``newborns.axes``."""
    outgoing: Elements
    """One tensor for each of ``newborns.consumers``."""
    rest: Tensor | None = None
    """What each unit gives at rest, ``(units,)``: times its outgoing weights this is taken off the consumers' biases.
    None: nothing is. Refused where a consumer has no bias or pads with zeros, as :class:`recycle.Fold` is."""
    exact: bool = True
    """Whether the network's output stays as it was. It is compared on the traced calls, without dropout (which drops
    units that cancel each other apart from one another), and where it does not stay nothing is born."""


class Pairing(Protocol):
    """The bilinear form of incoming and outgoing elements by which the loss falls when units get a little of both."""

    def incoming(self, outgoing: Elements) -> Elements:
        """Gradient at the incoming elements of units with these outgoing ones."""
        ...

    def outgoing(self, incoming: Elements) -> Elements:
        """Its transpose: a little of these incoming elements, the gradient at the outgoing ones."""
        ...


class Trial(Protocol):
    """Runs the loss with the newborns in their places."""

    def loss(self, incoming: Elements, outgoing: Elements) -> float:
        """The loss with these elements."""
        ...

    def gradients(self, incoming: Elements, outgoing: Elements) -> tuple[Elements, Elements]:
        """Gradients of the loss at both sides."""
        ...

    def pairing(self, incoming: Elements) -> AbstractContextManager[Pairing]:
        """Derivatives around units with these incoming elements and no outgoing ones."""
        ...


Birth: TypeAlias = Callable[[Newborns], Elements | Born]


def _lengths(parts: Elements) -> Tensor:
    """L2 norm of each unit's elements over all axes, ``(units,)``."""
    squares = [part.double().square().sum((1, 2)).cpu() for part in parts]
    return torch.stack(squares).sum(0).sqrt()
