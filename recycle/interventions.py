"""Edits of whole layers, as data: what methods that act on networks rather than on units ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from recycle.kinds import check_fields


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

    @property
    def gaps(self) -> Sequence[str]:
        """Paths of the hidden layers behind which there is a place for another one, in forward order."""
        ...

    @property
    def deepened(self) -> int:
        """How often layers have been inserted already."""
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


@dataclass(frozen=True)
class Inject:
    """Freeze every head and add a new one less a frozen copy of it, see :func:`recycle.injection.inject`."""

    layers: Sequence[str] = ()
    """Not looked at: it finds the heads itself."""


@dataclass(frozen=True)
class Deepen:
    """Insert a hidden layer behind each of these, without changing the output, see :func:`recycle.deepen`.

    Args:
        layers: paths of Linear layers or convolutions, as they are called before the edit.
        kind: what the new layer of n units is.

            - ``"identity"``: ``s(I h + 0)`` (Net2Net). Exact where ``s(s(x)) = s(x)``: ReLU, ReLU6, hardtanh; behind
              a PReLU the new one begins with slope 1. A convolution's kernel is Dirac's.
            - ``"pair"``: ``[I, -I] relu([I; -I] h)``, 2n units, for signals of both signs.
            - ``"blend"``: ``(1 - p) h + p s(I h + 0)`` with a learned ``p`` for each unit that begins at 0, for any
              ``s``.
            - ``"residual"``: ``h + V s(U h + c)`` with ``V = 0`` and ``U`` as the network initialises, for any ``s``.
        activation: name of a class in ``torch.nn`` for ``s``; None: the activation that stands before the gap, or a
            ReLU where that is no module of its own. A pair has ReLUs.
        kernel: size of a new convolution's kernel, odd.
        batch_norm: normalise before ``s``. The gain and the shift begin as what undoes it on the traced calls; in
            training mode, where each batch is another, only a residual branch is exact.
    """

    layers: Sequence[str]
    kind: Literal["identity", "pair", "blend", "residual"] = field(default="identity", kw_only=True)
    activation: str | None = field(default=None, kw_only=True)
    kernel: int = field(default=3, kw_only=True)
    batch_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))
        check_fields(self)
        object.__setattr__(self, "layers", tuple(self.layers))


Intervention: TypeAlias = Shrink | Renew | Inject | Deepen
