"""Edits of single units, as data. :func:`apply` edits weights, optimizer state and target networks together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle import optimizers as optimizer_state
from recycle.births import Birth, Newborns, like_init
from recycle.graph import Axis, NotRecyclable, UnitGroup, tensor_at

Init: TypeAlias = Callable[[str, Tensor, torch.Generator | None], None]
"""``(parameter name, tensor, generator) -> None``: fills the tensor as the model's builder would have.

The tensor comes filled by the layer's own ``reset_parameters``; leaving it alone keeps that.
"""


@dataclass(frozen=True)
class Split:
    """Give each slot a copy of a live parent and divide the parent's outgoing weights between the two.

    The output stays as it was if the slot's consumers saw zero from it (and ``noise`` is 0).

    Args:
        parents: live units, one for each slot; a unit may be named more than once.
        into: slots to overwrite. None would widen the layer and is refused for now.
        share: part of the parent's outgoing weights that the newborn takes, in [0, 1).
        noise: length of the noise on the incoming weights, relative to the row's norm. It is antisymmetric
            (newborn and parent move apart so that the output changes to second order only) and the rows keep
            their norm.
        balanced: multiply incoming *and* outgoing weights by the square root of the share instead. For ReLU-like
            units SGD, momentum and weight decay then stay on the unsplit trajectory. Refused for others.
        rescale: first balance the parent's incoming and outgoing norms without changing its function. ReLU-like
            units only.
        moments: ``"fresh"`` gives the newborn the optimizer's initial state and leaves the parent's alone: the
            two part. ``"transform"`` gives both the state that they would have had: the two hardly part.
    """

    parents: Sequence[int]
    into: Sequence[int] | None = None
    share: float = field(default=0.5, kw_only=True)
    noise: float = field(default=0.0, kw_only=True)
    balanced: bool = field(default=False, kw_only=True)
    rescale: bool = field(default=False, kw_only=True)
    moments: Literal["fresh", "transform"] = field(default="fresh", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", _ints(self.parents))
        object.__setattr__(self, "into", None if self.into is None else _ints(self.into))

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit overwrites."""
        return self.into or ()

    def only(self, keep: Collection[int]) -> Split:
        """The same edit for those of its slots that are in ``keep``."""
        pairs = [(p, s) for p, s in zip(self.parents, self.slots, strict=True) if s in keep]
        return replace(self, parents=[p for p, _ in pairs], into=[s for _, s in pairs])


@dataclass(frozen=True)
class Reset:
    """Give units fresh incoming weights and silence their outgoing ones.

    Args:
        units: units to overwrite.
        birth: where the incoming weights come from, see :mod:`recycle.births`; None: the module's own
            initialisation.
        parents: one live unit for each, for births that look at one.
    """

    units: Sequence[int]
    birth: Birth | None = None
    parents: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", _ints(self.units))
        object.__setattr__(self, "parents", None if self.parents is None else _ints(self.parents))

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit overwrites."""
        return self.units

    def only(self, keep: Collection[int]) -> Reset:
        """The same edit for those of its units that are in ``keep``."""
        kept = [i for i, unit in enumerate(self.units) if unit in keep]
        parents = None if self.parents is None else [self.parents[i] for i in kept]
        return replace(self, units=[self.units[i] for i in kept], parents=parents)


@dataclass(frozen=True)
class Fold:
    """Move what constant units contribute into their consumers' biases, and silence their outgoing weights.

    Exact for a unit whose output is always ``means[i]``; otherwise the mean contribution is kept.
    Refused where a consumer has no bias or pads its input with zeros.
    """

    units: Sequence[int]
    means: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", _ints(self.units))
        object.__setattr__(self, "means", tuple(map(float, self.means)))

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit overwrites."""
        return self.units

    def only(self, keep: Collection[int]) -> Fold:
        """The same edit for those of its units that are in ``keep``."""
        kept = [i for i, unit in enumerate(self.units) if unit in keep]
        return replace(self, units=[self.units[i] for i in kept], means=[self.means[i] for i in kept])


Edit: TypeAlias = Split | Reset | Fold


def describe(edit: Edit) -> dict[str, Any]:
    """The edit as plain numbers and strings, for JSON."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(edit).items() if v is not None}
    if "birth" in values:
        birth = values["birth"]
        options = ", ".join(f"{k}={v}" for k, v in getattr(birth, "keywords", {}).items())
        named = getattr(birth, "func", birth)
        values["birth"] = getattr(named, "__name__", type(named).__name__) + (f"({options})" if options else "")
    return {"edit": type(edit).__name__, **values}


@torch.no_grad()
def apply(
    edit: Edit,
    group: UnitGroup,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[tuple[nn.Module, float]] = (),
    generator: torch.Generator | None = None,
    init: Init | None = None,
) -> None:
    """Make one edit: weights, optimizer state and target networks together, or nothing at all.

    Args:
        edit: a :class:`Split`, :class:`Reset` or :class:`Fold`.
        group: an editable group of :func:`recycle.trace`.
        optimizers: every optimizer that holds the parameters. Only the state of the units named changes; the
            ``step`` count, one for a whole tensor, never does.
        targets: ``(target network, tau)``. A hard target (``tau`` = 1) is left alone until its next copy; a
            Polyak average gets the same edit of its *own* weights, with the same random numbers.
        generator: source of randomness; None: torch's global one.
        init: how this model initialises, for fresh units; None: each layer's ``reset_parameters``.

    Raises:
        NotRecyclable: the edit cannot be made as asked; nothing has changed.
    """
    check(edit, group, optimizers=optimizers, targets=targets)
    if not edit.slots:
        return
    soft = [module for module, tau in targets if tau < 1]
    with all_or_none(group, optimizers, targets):
        if isinstance(edit, Split):
            _split(edit, group, optimizers, soft, generator)
        elif isinstance(edit, Reset):
            _reset(edit, group, optimizers, soft, generator, init)
        else:
            _fold(edit, group, optimizers, soft)


@contextmanager
def all_or_none(
    group: UnitGroup, optimizers: Sequence[Optimizer] = (), targets: Sequence[tuple[nn.Module, float]] = ()
) -> Iterator[None]:
    """Put back everything that edits of ``group`` can change if the block raises, a birth of one's own perhaps."""
    names = {axis.name for axis in (*group.incoming, *group.outgoing)}
    names |= {axis.bias for axis in group.outgoing if axis.bias is not None}
    touched = [tensor_at(module, n) for module in (group.module, *(m for m, tau in targets if tau < 1)) for n in names]
    touched += [state for n in names for state, _, _ in optimizer_state.states(optimizers, group.tensor(n))]
    saved = [tensor.detach().clone() for tensor in touched]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(touched, saved, strict=True):
                tensor.copy_(value)
        raise


# -- refusing ----------------------------------------------------------------------------------------------


def check(
    edit: Edit,
    group: UnitGroup,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[tuple[nn.Module, float]] = (),
) -> None:
    """Raise what :func:`apply` would raise, and change nothing."""
    if not isinstance(group, UnitGroup) or not isinstance(edit, (Split, Reset, Fold)):
        raise TypeError(
            "an edit is a Split, Reset or Fold of a traced graph's group: "
            f"got {type(edit).__name__} of {type(group).__name__}. Pass graph['name']"
        )
    if torch._C._current_graph_task_id() != -1:
        raise NotRecyclable("an edit inside a backward pass would corrupt its gradients; edit after optimizer.step()")
    if isinstance(edit, Split):
        _refuse_split(edit, group)
    elif isinstance(edit, Fold):
        if len(edit.means) != len(edit.units):
            raise NotRecyclable(f"Fold needs a mean for each unit: got {len(edit.means)} for {len(edit.units)} units")
        if not all(map(math.isfinite, edit.means)):
            raise NotRecyclable(f"Fold needs finite means, got {edit.means}")
        if group.why_not_foldable:
            raise NotRecyclable(f"units of {group.name!r} cannot be folded: {group.why_not_foldable}")
    elif edit.parents is not None:
        _refuse_parents(edit.parents, edit.units, group)
    _refuse_units(edit.slots, group, "unit")
    _refuse_tensors(group, targets)
    optimizer_state.check(optimizers, (group.tensor(a.name) for a in (*group.incoming, *group.outgoing)))


def _refuse_tensors(group: UnitGroup, targets: Sequence[tuple[nn.Module, float]]) -> None:
    for axis in (*group.incoming, *group.outgoing):
        tensor = group.tensor(axis.name)
        if axis.role != "buffer" and not tensor.requires_grad:
            raise NotRecyclable(f"group {group.name!r} is frozen: {axis.name!r} has requires_grad=False")
        for module, _ in targets:
            if tensor_at(module, axis.name).shape != tensor.shape:
                raise NotRecyclable(f"{axis.name!r} has another shape in the target network")


def _refuse_split(edit: Split, group: UnitGroup) -> None:
    if edit.into is None:
        raise NotRecyclable(f"group {group.name!r} cannot be widened: {group.why_fixed}. Pass into=(slots)")
    if not 0 <= edit.share < 1:
        raise NotRecyclable(f"Split needs 0 <= share < 1, got share={edit.share}")
    if edit.balanced and not edit.share:
        raise NotRecyclable("a balanced Split needs share > 0: at 0 the newborn is all zeros and can never learn")
    if not 0 <= edit.noise < float("inf"):
        raise NotRecyclable(f"Split needs a finite noise >= 0, got noise={edit.noise}")
    if edit.moments not in ("fresh", "transform"):
        raise NotRecyclable(f"Split needs moments='fresh' or 'transform', got {edit.moments!r}")
    _refuse_parents(edit.parents, edit.into, group)
    if (edit.balanced or edit.rescale) and not group.homogeneous:
        asked = "balanced" if edit.balanced else "rescale"
        raise NotRecyclable(
            f"{asked}=True needs units whose output scales with their weights (ReLU, leaky ReLU); those of "
            f"{group.name!r} do not. Pass {asked}=False"
        )


def _refuse_parents(parents: Sequence[int], slots: Sequence[int], group: UnitGroup) -> None:
    if len(parents) != len(slots):
        raise NotRecyclable(f"each slot needs a parent: got {len(parents)} parents and {len(slots)} slots")
    _refuse_units(dict.fromkeys(parents), group, "parent")
    both = sorted(set(parents) & set(slots))
    if both:
        raise NotRecyclable(f"a parent cannot be a slot of the same edit: units {both} of {group.name!r} are both")


def _refuse_units(units: Iterable[int], group: UnitGroup, what: str) -> None:
    units = list(units)
    if units and (min(units) < 0 or max(units) >= group.width):
        outside = sorted(u for u in units if not 0 <= u < group.width)
        raise NotRecyclable(f"{what}s {outside} are out of range: {group.name!r} has units 0 to {group.width - 1}")
    if len(set(units)) < len(units):
        twice = sorted({u for u in units if units.count(u) > 1})
        raise NotRecyclable(f"{what}s {twice} of {group.name!r} are named more than once")


# -- editing -----------------------------------------------------------------------------------------------


def _split(
    edit: Split,
    group: UnitGroup,
    optimizers: Sequence[Optimizer],
    soft: Sequence[nn.Module],
    generator: torch.Generator | None,
) -> None:
    """Copy the incoming elements, then divide the outgoing ones: recurrent weights are both."""
    slots = torch.tensor(edit.slots)
    parents, which, count = torch.unique(torch.tensor(edit.parents), return_inverse=True, return_counts=True)
    order = torch.argsort(which, stable=True)
    rank = torch.empty_like(which)
    rank[order] = torch.arange(len(which)) - (count.cumsum(0) - count)[which[order]]
    child = edit.share * (1 - edit.share) ** rank.double()  # what each newborn takes of the parent's output
    parent = (1 - edit.share) ** count.double()  # what the parent keeps
    draws = {axis.name: _noise(edit, group, axis, len(slots), generator) for axis in group.incoming}
    for module in (group.module, *soft):
        scale = _balance(group, module, parents) if edit.rescale else torch.ones(len(parents), dtype=torch.double)
        keep_in, keep_out = scale.clone(), parent / scale
        born_in, born_out = scale[which].clone(), child / scale[which]
        if edit.balanced:
            keep_in, keep_out = keep_in * parent.sqrt(), parent.sqrt() / scale
            born_in, born_out = born_in * child.sqrt(), child.sqrt() / scale[which]
        for axis in group.incoming:
            tensor = tensor_at(module, axis.name)
            scaled = axis.role in ("weight", "bias")
            rows = axis.read(tensor, parents)
            born, kept = _part(rows, which, draws[axis.name], child, parent)
            axis.write(tensor, slots, _times(born, born_in) if scaled else born)
            if scaled and (edit.noise or edit.balanced or edit.rescale):
                axis.write(tensor, parents, _times(kept, keep_in))
        for axis in group.outgoing:
            tensor = tensor_at(module, axis.name)
            columns = axis.read(tensor, parents)
            axis.write(tensor, slots, _times(columns[which], born_out))
            axis.write(tensor, parents, _times(columns, keep_out))
        if module is group.module:
            _split_state(edit, group, optimizers, (parents, which, slots), (parent, child, scale))


def _split_state(
    edit: Split,
    group: UnitGroup,
    optimizers: Sequence[Optimizer],
    units: tuple[Tensor, Tensor, Tensor],
    shares: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients scale inversely to the weights that a rescale multiplies, and with the share on the incoming side."""
    parents, which, slots = units
    parent, child, scale = shares
    for incoming, axes in ((True, group.incoming), (False, group.outgoing)):
        for axis in axes:
            rescaled = (1 / scale if incoming else scale) if axis.role != "gain" else torch.ones_like(scale)
            for state, power, fresh in optimizer_state.states(optimizers, group.tensor(axis.name)):
                held = axis.read(state, parents)
                born, kept = held[which], _times(held, rescaled**power)
                if edit.moments == "fresh":
                    born = torch.full_like(born, fresh)
                else:
                    exponent = power * (1.0 if axis.role == "gain" else 0.5 if edit.balanced else float(incoming))
                    born = _times(born, rescaled[which] ** power * child**exponent)
                    kept = _times(kept, parent**exponent)
                axis.write(state, slots, born)
                if edit.rescale or edit.moments == "transform":
                    axis.write(state, parents, kept)


def _reset(
    edit: Reset,
    group: UnitGroup,
    optimizers: Sequence[Optimizer],
    soft: Sequence[nn.Module],
    generator: torch.Generator | None,
    init: Init | None,
) -> None:
    units = torch.tensor(edit.units)
    fresh = fresh_rows(group, units, init, generator)
    for module in (group.module, *soft):
        parents = None
        if edit.parents is not None:
            named = torch.tensor(edit.parents)
            parents = tuple(axis.read(tensor_at(module, axis.name), named) for axis in group.incoming)
        born = (edit.birth or like_init)(Newborns(group.incoming, fresh, parents))
        for axis, rows in zip(group.incoming, born, strict=True):
            axis.write(tensor_at(module, axis.name), units, rows)
        for axis in group.outgoing:
            _fill_units(axis, tensor_at(module, axis.name), units, 0.0)
    _freshen(group, (*group.incoming, *group.outgoing), units, optimizers)


def _fold(edit: Fold, group: UnitGroup, optimizers: Sequence[Optimizer], soft: Sequence[nn.Module]) -> None:
    units, means = torch.tensor(edit.units), torch.tensor(edit.means, dtype=torch.double)
    for module in (group.module, *soft):
        for axis in group.outgoing:
            assert axis.bias is not None
            weight, bias = tensor_at(module, axis.name), tensor_at(module, axis.bias)
            part = weight.index_select(axis.dim, axis.entries(units, weight.device))
            value = means.repeat_interleave(axis.span).to(part)
            shape = [-1 if d == axis.dim else 1 for d in range(part.dim())]
            out_dim = 1 if axis.dim == 0 else 0
            moved = (part * value.reshape(shape)).sum([d for d in range(part.dim()) if d != out_dim])
            bias += moved
            _fill_units(axis, weight, units, 0.0)
    _freshen(group, group.outgoing, units, optimizers)


def _freshen(group: UnitGroup, axes: Iterable[Axis], units: Tensor, optimizers: Sequence[Optimizer]) -> None:
    for axis in axes:
        for state, _, fresh in optimizer_state.states(optimizers, group.tensor(axis.name)):
            _fill_units(axis, state, units, fresh)


def _fill_units(axis: Axis, tensor: Tensor, units: Tensor, value: float) -> None:
    tensor.index_fill_(axis.dim, axis.entries(units, tensor.device), value)


def _times(values: Tensor, factors: Tensor) -> Tensor:
    return values * factors.to(values)[:, None, None]


def _noise(edit: Split, group: UnitGroup, axis: Axis, count: int, generator: torch.Generator | None) -> Tensor | None:
    """A random direction of unit length for each newborn's row, or None."""
    if not edit.noise or axis.role != "weight":
        return None
    like = axis.read(group.tensor(axis.name), torch.zeros(count, dtype=torch.long))
    draw = torch.randn(like.shape, generator=generator, dtype=torch.double)
    return edit.noise * draw / draw.square().sum((1, 2), keepdim=True).sqrt()


def _part(rows: Tensor, which: Tensor, noise: Tensor | None, child: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of newborns and parents, moved apart so that their weighted sum stays; norms as before."""
    if noise is None:
        return rows[which], rows
    norm = rows.square().sum((1, 2), keepdim=True).sqrt()
    step = noise.to(rows) * norm[which] * 2 * (parent / (parent + child.new_zeros(len(parent)).index_add(
        0, which, child))).to(rows)[which, None, None]  # fmt: skip
    back = torch.zeros_like(rows).index_add(0, which, _times(step, child)) / parent.to(rows)[:, None, None]
    return _with_norm(rows[which] + step, norm[which]), _with_norm(rows - back, norm)


def _with_norm(rows: Tensor, norm: Tensor) -> Tensor:
    now = rows.square().sum((1, 2), keepdim=True).sqrt()
    return rows * torch.where(now > 0, norm / now, 1.0)


def _balance(group: UnitGroup, module: nn.Module, units: Tensor) -> Tensor:
    """The factor for each unit that makes its incoming and outgoing norms equal, ``(units,)``."""

    def norm(axes: Iterable[Axis]) -> Tensor:
        parts = [a.read(tensor_at(module, a.name), units).double().square().sum((1, 2)).cpu() for a in axes]
        return torch.stack(parts).sum(0).sqrt()

    into, out = norm(a for a in group.incoming if a.role in ("weight", "bias")), norm(group.outgoing)
    return torch.where((into > 0) & (out > 0), (out / into).sqrt(), 1.0)


# -- fresh units -------------------------------------------------------------------------------------------


def fresh_rows(
    group: UnitGroup, units: Tensor, init: Init | None, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """What the module's own initialisation gives ``units``, one tensor for each incoming axis.

    A bare parameter, which no ``reset_parameters`` knows, gets rows of the scale of the units that stay.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn: dict[str, dict[str, Tensor]] = {}
    result = []
    for axis in group.incoming:
        owner, _, leaf = axis.name.rpartition(".")
        if owner not in drawn:
            drawn[owner] = _reinitialised(group.module.get_submodule(owner), seed + len(drawn))
        tensor = group.tensor(axis.name)
        fresh = drawn[owner].get(leaf)
        if fresh is None:
            rows = _like_the_others(axis, tensor, units, generator)
            fresh = tensor.detach().clone()
            axis.write(fresh, units, rows)
        if init is not None:
            init(axis.name, fresh, generator)
        result.append(axis.read(fresh, units).to(tensor))
    return tuple(result)


def _reinitialised(layer: nn.Module, seed: int) -> dict[str, Tensor]:
    """Freshly initialised copies of a layer's own tensors, by ``reset_parameters``; {} if it has none."""
    reset = getattr(type(layer), "reset_parameters", None)
    if reset is None:
        return {}
    twin = copy.copy(layer)
    twin._parameters = {
        k: None if p is None else nn.Parameter(torch.empty_like(p, device="cpu").copy_(p.detach()))
        for k, p in layer._parameters.items()
    }
    twin._buffers = {k: None if b is None else b.detach().cpu().clone() for k, b in layer._buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset(twin)
    return {k: t.detach() for k, t in (*twin._parameters.items(), *twin._buffers.items()) if t is not None}


def _like_the_others(axis: Axis, tensor: Tensor, units: Tensor, generator: torch.Generator | None) -> Tensor:
    stays = torch.ones(len(axis.index), dtype=torch.bool)
    stays[units] = False
    others = axis.read(tensor.detach(), (stays if stays.any() else ~stays).nonzero()[:, 0])
    like = axis.read(tensor.detach(), units)
    if axis.role == "weight":
        draw = torch.randn(like.shape, generator=generator, dtype=torch.double).to(like)
        return draw * others.square().mean().sqrt()
    return torch.zeros_like(like) if axis.role == "bias" else others.mean(0, keepdim=True).expand_as(like)


def _ints(values: Iterable[int]) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        values = values.tolist()
    return tuple(map(int, values))
