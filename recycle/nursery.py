"""Ask a birth for the weights of new units, write them, and refuse units that could never learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recycle.births import Birth, Born, Elements, Newborns, like_init
from recycle.fresh import Init, fresh_rows
from recycle.graph import Axis, NotRecyclable, Observer, UnitGroup, per_unit, tensor_at
from recycle.junction import Junction
from recycle.outputs import answers, difference, tolerance
from recycle.response import responses
from recycle.tracing import undisturbed
from recycle.trial import LossTrial

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Evidence:
    """What births that look at data are given."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """What the layers read lately, see :attr:`recycle.stats.Stats.inputs`."""
    junction: Junction | str = "no pass was sampled"
    """See :attr:`recycle.stats.Stats.junction`."""
    loss: Callable[[], Tensor] | None = None
    """The loss of a batch."""


def overwrite(
    group: UnitGroup,
    units: Tensor,
    birth: Birth | None,
    *,
    parents: Sequence[int] | None = None,
    soft: Sequence[nn.Module] = (),
    init: Init | None = None,
    generator: torch.Generator | None = None,
    evidence: Evidence = Evidence(),
) -> None:
    """Give units of a group the incoming weights that a birth says, and outgoing weights of zero.

    Args:
        group: the units' group.
        units: which, ``(units,)``.
        birth: see :mod:`recycle.births`; None: the module's own initialisation.
        parents: one live unit for each, for births that look at one.
        soft: target networks whose units get the same, seen from their own weights.
        init: how this model initialises.
        generator: source of randomness.
        evidence: what births that look at data are given.
    """
    told = _told(group, units, birth, init, generator, evidence)
    for module in (group.module, *soft):
        born = (birth or like_init)(_newborns(group, module, units, parents, told))
        if isinstance(born, Born):
            raise NotRecyclable("this birth says outgoing weights, which only Grow takes; a Reset leaves them at zero")
        _write(group, module, units, born, None)


def raise_units(
    group: UnitGroup,
    units: Tensor,
    birth: Birth | None,
    *,
    parents: Sequence[int] | None = None,
    soft: Sequence[nn.Module] = (),
    init: Init | None = None,
    generator: torch.Generator | None = None,
    evidence: Evidence = Evidence(),
) -> None:
    """Give units that were just added, and are zero on both sides, what a birth says; arguments as for
    :func:`overwrite`.

    What a birth says of outgoing weights holds for target networks too.

    Raises:
        NotRecyclable: the units could never learn, or the output does not stay as the birth claims.
    """
    told = _told(group, units, birth, init, generator, evidence)
    told |= {
        "consumers": group.outgoing,
        "sent": _sent(group, units, generator) if told["draws"] else (),
        "read": partial(_read, group, units),
        "slope": partial(_slope, group, units),
        "redraw": lambda: (fresh_rows(group, units, init, generator), _sent(group, units, generator)),
        "junction": evidence.junction,
        "trial": None if evidence.loss is None else LossTrial(group, units, evidence.loss),
        "normalised": _normalised(group),
        "why_not_foldable": group.why_not_foldable,
    }
    born: Elements | Born = ()
    for module in (group.module, *soft):
        if not isinstance(born, Born):
            born = (birth or like_init)(_newborns(group, module, units, parents, told))
        if isinstance(born, Born):
            _place(group, module, units, born)
        else:
            _refuse_stuck(born, None, group.incoming)
            _write(group, module, units, born, None)


def _place(group: UnitGroup, module: nn.Module, units: Tensor, born: Born) -> None:
    _refuse_stuck(born.incoming, born.outgoing, group.incoming)
    checked = born.exact and module is group.module
    if checked:
        _write(group, module, units, born.incoming, None)
        before = answers_of(group)
    _write(group, module, units, born.incoming, born.outgoing)
    if born.rest is not None and bool(born.rest.any()):
        if group.why_not_foldable:
            raise NotRecyclable(
                f"what these units give at rest cannot be taken off their consumers: {group.why_not_foldable}"
            )
        add_constant(group, module, units, -born.rest)
    if checked:
        change, allowed = difference(before, answers_of(group)), tolerance(before)
        if change > allowed:
            raise NotRecyclable(f"the new units would change the output by {change:.1e}")


def add_constant(group: UnitGroup, module: nn.Module, units: Tensor, values: Tensor) -> None:
    """Add what units would contribute that always give ``values``, ``(units,)``, to their consumers' biases."""
    for axis in group.outgoing:
        assert axis.bias is not None
        weight, bias = tensor_at(module, axis.name), tensor_at(module, axis.bias)
        moved = torch.zeros_like(weight)
        columns = axis.read(weight, units)
        axis.write(moved, units, columns * values.to(columns)[:, None, None])
        out_dim = 1 if axis.dim == 0 else 0
        bias += moved.sum([d for d in range(moved.dim()) if d != out_dim])


# -- what a birth is told ----------------------------------------------------------------------------------


def _told(
    group: UnitGroup,
    units: Tensor,
    birth: Birth | None,
    init: Init | None,
    generator: torch.Generator | None,
    evidence: Evidence,
) -> dict[str, Any]:
    """What all networks' newborns have in common."""
    fresh = fresh_rows(group, units, init, generator)
    draws = () if birth in (None, like_init) else tuple(_normal(part, generator) for part in fresh)
    return {"fresh": fresh, "draws": draws, "responses": responses(group, units, evidence.inputs)}


def _newborns(
    group: UnitGroup, module: nn.Module, units: Tensor, parents: Sequence[int] | None, told: dict[str, Any]
) -> Newborns:
    """The same, with what a network's own units are."""
    stays = torch.ones(group.width, dtype=torch.bool)
    stays[units] = False
    stay = stays.nonzero()[:, 0]
    named = None if parents is None else _elements(group.incoming, module, torch.tensor(parents))
    others = _elements(group.incoming, module, stay)
    spoken = _elements(group.outgoing, module, stay) if "consumers" in told else ()
    return Newborns(group.incoming, parents=named, others=others, spoken=spoken, **told)


def _elements(axes: Sequence[Axis], module: nn.Module, units: Tensor) -> Elements:
    return tuple(axis.read(tensor_at(module, axis.name), units) for axis in axes)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.double).to(like)


def _sent(group: UnitGroup, units: Tensor, generator: torch.Generator | None) -> Elements:
    return tuple(_normal(axis.read(group.tensor(axis.name), units), generator) for axis in group.outgoing)


def _normalised(group: UnitGroup) -> str:
    for axis in group.incoming:
        owner = axis.name.rpartition(".")[0]
        if axis.role == "buffer" or isinstance(group.module.get_submodule(owner), _NORMS):
            return owner
    return ""


def _read(group: UnitGroup, units: Tensor, rows: Elements) -> Elements:
    """What the consumers read of the units with these incoming elements, on the traced calls, and once more disturbed:
    what depends on other units does so on the inputs, even if these are all alike in the calls.
    """
    with undisturbed(group.module), torch.no_grad():
        plain = _run(group, units, rows)
        with _disturbed(group.module):
            other = _run(group, units, rows)
        return tuple(torch.cat(values).double().cpu() for values in zip(plain, other, strict=True))


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    """All parameters a little different."""
    generator = torch.Generator().manual_seed(0)
    saved = [(p, p.detach().clone()) for p in module.parameters() if p.is_floating_point()]
    try:
        for parameter, value in saved:
            draw = torch.rand(value.shape, generator=generator, dtype=torch.double)
            parameter.copy_(value * (0.9 + 0.2 * draw).to(value))
        yield
    finally:
        for parameter, value in saved:
            parameter.copy_(value)


def _slope(group: UnitGroup, units: Tensor, rows: Elements) -> Tensor:
    """Norm of the derivative of a weighted sum of what the consumers read, by each unit's incoming weights."""
    axes = [axis for axis in group.incoming if axis.role == "weight"]
    weights = [group.tensor(axis.name) for axis in axes]
    with undisturbed(group.module), torch.enable_grad():
        values = torch.cat([part.flatten().double() for part in _run(group, units, rows)])
        if not values.requires_grad:
            raise NotRecyclable("the traced calls run without gradients, so nothing is known of those of new units")
        total = (values * torch.linspace(1, 2, len(values), dtype=torch.double, device=values.device)).sum()
        found = torch.autograd.grad(total, weights, allow_unused=True)
    parts = [
        axis.read(torch.zeros_like(w) if g is None else g, units).double().cpu().square().sum((1, 2))
        for axis, w, g in zip(axes, weights, found, strict=True)
    ]
    return torch.stack(parts).sum(0).sqrt()


def _run(group: UnitGroup, units: Tensor, rows: Elements) -> list[Tensor]:
    """What the consumers read of the units, for each distinct value: ``(values, units)``."""
    with torch.no_grad():
        _write(group, group.module, units, rows, None)
    observers = group.observers()
    if not observers or not group.calls:
        raise NotRecyclable("no hook sees what the consumers would read of the new units, so nothing can be proved")
    seen: list[list[Tensor]] = [[] for _ in observers]
    with _watching(group, observers, units, seen):
        for call in group.calls:
            call()
    if not all(seen):
        raise NotRecyclable("the traced calls do not run a consumer of these units")
    return [torch.cat(values) for values in seen]


@contextmanager
def _watching(
    group: UnitGroup, observers: Sequence[Observer], units: Tensor, seen: Sequence[list[Tensor]]
) -> Iterator[None]:
    def watch(
        observer: Observer, kept: list[Tensor], layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        act = observer.value(args, kwargs, output)
        kept.append(per_unit(act, layer, observer.index.to(act.device))[:, units.to(act.device)])

    handles = [
        group.module.get_submodule(observer.name).register_forward_hook(
            partial(watch, observer, kept), with_kwargs=True
        )
        for observer, kept in zip(observers, seen, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answers_of(group: UnitGroup) -> list[Tensor] | str:
    """Outputs of the calls on which the group was traced, as they are now; see :func:`recycle.outputs.answers`."""
    with undisturbed(group.module):
        return answers(group.module, group.calls)


# -- writing -----------------------------------------------------------------------------------------------


def _write(group: UnitGroup, module: nn.Module, units: Tensor, incoming: Elements, outgoing: Elements | None) -> None:
    """Incoming elements first: recurrent weights are both."""
    for axis, rows in zip(group.incoming, incoming, strict=True):
        axis.write(tensor_at(module, axis.name), units, rows)
    for i, axis in enumerate(group.outgoing):
        if outgoing is None:
            axis.fill(tensor_at(module, axis.name), units, 0.0)
        else:
            axis.write(tensor_at(module, axis.name), units, outgoing[i])


def _refuse_stuck(incoming: Elements, outgoing: Elements | None, axes: Sequence[Axis]) -> None:
    """Raise where a unit is zero on both sides, or where two are equal on both."""
    learned = [rows.flatten(1) for axis, rows in zip(axes, incoming, strict=True) if axis.role in ("weight", "bias")]
    both = torch.cat([*learned, *(part.flatten(1).to(learned[0]) for part in outgoing or ())], 1)
    if not bool(both.isfinite().all()):
        raise NotRecyclable("the birth gave weights that are not finite")
    if bool((both == 0).all(1).any()):
        raise NotRecyclable(
            "a new unit would be zero on both sides: neither gets a gradient from the other, so it could never learn. "
            "Let one side be random (zero_out)"
        )
    if len(torch.unique(both, dim=0)) < len(both):
        raise NotRecyclable(
            "new units would be equal on both sides: they would get equal gradients and stay equal for ever. Let one "
            "side be random (zero_out), or name different parents"
        )
