"""Edits of whole layers, as data: what methods that act on networks rather than on units ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias


class Layers(Protocol):
    """What a method may know of a network's layers: no tensor, no optimizer."""

    @property
    def depth(self) -> Mapping[str, int]:
        """Path of each layer -> how far from the output: 1 for output layers, 0 where nothing tells.

        Layers that cannot be touched are not listed: nothing of theirs is trained, they do not say how they begin
        (no ``reset_parameters``), or their units were excluded.
        """
        ...

    @property
    def injected(self) -> bool:
        """Whether plasticity has been injected already."""
        ...


@dataclass(frozen=True)
class Shrink:
    """Multiply the layers' parameters by ``keep`` and add ``perturb`` times freshly initialised ones.

    Buffers (running statistics) stay. ``moments``: ``"fresh"`` lets the optimizer begin anew on these parameters,
    its step count included; ``"keep"`` leaves its state alone.
    """

    layers: Sequence[str]
    keep: float = field(kw_only=True)
    perturb: float = field(kw_only=True)
    moments: Literal["fresh", "keep"] = field(default="fresh", kw_only=True)


@dataclass(frozen=True)
class Renew:
    """Initialise layers again, buffers included, in place: the optimizer keeps holding them and forgets their past.

    ``weights=False`` only lets the optimizer forget.
    """

    layers: Sequence[str]
    weights: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class Pull:
    """Draw parameters towards the values at which recycling began, at every optimizer step.

    ``"penalty"`` adds the gradient of ``strength * ||p - p0||^2`` to theirs for the step, as if it stood in the loss;
    ``"decoupled"`` moves them by the learning rate times that gradient first, as AdamW decays weights.
    """

    layers: Sequence[str]
    strength: float = field(kw_only=True)
    mode: Literal["penalty", "decoupled"] = field(default="penalty", kw_only=True)


Intervention: TypeAlias = Shrink | Renew
