"""Prove a group on the real calls: trials on random parameters that must not change any output.

On a worn network a wrong group can pass, because its units contribute nothing; so all parameters are replaced
by random values that keep units alive, and put back bit by bit. Units that are all alive may look alike and not
be: one is clamped, its neighbour is not. So the units also change places on values of both signs and of all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recycle.graph import NotRecyclable, UnitGroup
from recycle.outputs import Call, Plain, difference, live_outputs, outputs, repeatable, tolerance
from recycle.resize import FEWEST, Layout, resized, why_layers_are_fixed, with_more, without

_SHARE = 0.3
_FEW = 4
"""Below so many units one of them alone does the work of all in a trial; there is another for the others."""
_FAR = 32.0
"""Every other pair of biases is as much larger: past where a clamp or a ReLU6 bends, not only a ReLU."""


class _Trial(NamedTuple):
    """Units that fall silent, and who does the work of the others then, which must change no output.

    Each of ``places`` takes over the weights of its source, and its share of what that gives to consumers.
    """

    silent: Tensor
    places: Tensor
    sources: Tensor
    shares: Tensor


def _ring(width: int, *, mirrored: bool = False) -> _Trial:
    """The odd units are silent; then those on either side of each even one do its work: 0 -> 1 and 2, 2 -> 3 and 4...

    All units are linked: were there two kinds, some neighbours would be of different kinds. Of an odd number the last
    is silent as well, and three do the work of one. Of two or three, unit 0 stays in its place; ``mirrored``, where
    units are counted from the last to the first, it does not.
    """
    places = torch.arange(width)
    sources = ((places - 1) % width // 2 * 2).clamp_max(width - 2 - width % 2)
    silent = torch.ones(width, dtype=torch.bool)
    silent[sources] = False
    shares = torch.where(places % 2 > 0, 1 - _SHARE, torch.tensor(_SHARE, dtype=torch.double))
    shares /= torch.zeros_like(shares).index_add(0, sources, shares)[sources]
    if mirrored:
        return _Trial(places[silent.flip(0)], places, width - 1 - sources.flip(0), shares.flip(0))
    return _Trial(places[silent], places, sources, shares)


def _split(parents: Tensor, slots: Tensor) -> _Trial:
    """Silent units get a part of what the parents give their consumers."""
    shares = torch.tensor([1 - _SHARE, _SHARE], dtype=torch.double).repeat_interleave(len(parents))
    return _Trial(slots, torch.cat([parents, slots]), parents.repeat(2), shares)


class _Tried:
    """A group whose units are edited in trials, with the tensors that hold them, looked up once."""

    def __init__(self, group: UnitGroup) -> None:
        self.name, self.width, self.exact = group.name, group.width, group.exact
        self.incoming = [(axis, group.tensor(axis.name)) for axis in group.incoming]
        self.outgoing = [(axis, group.tensor(axis.name)) for axis in group.outgoing]

    def silence(self, units: Tensor) -> None:
        """Nothing consumes these units any more."""
        for axis, tensor in self.outgoing:
            axis.fill(tensor, units, 0.0)

    def divide(self, trial: _Trial) -> None:
        """Let the places of a trial do the work of its sources."""
        for axis, tensor in self.incoming:
            axis.write(tensor, trial.places, axis.read(tensor, trial.sources))
        shares = trial.shares[:, None, None]
        for axis, tensor in self.outgoing:
            columns = axis.read(tensor, trial.sources)
            axis.write(tensor, trial.places, columns.mul_(shares.to(columns)))

    def roll(self) -> None:
        """Let every unit take the place of the one before."""
        everything = torch.arange(self.width)
        for axis, tensor in (*self.incoming, *self.outgoing):
            axis.write(tensor, everything, axis.read(tensor, everything.roll(1)))

    def scale(self, factor: float) -> None:
        """Weights and biases by a factor, and inversely those of the consumers."""
        everything = torch.arange(self.width)
        for axis, tensor in self.incoming:
            if axis.role in ("weight", "bias"):
                axis.write(tensor, everything, axis.read(tensor, everything) * factor)
        for axis, tensor in self.outgoing:
            axis.write(tensor, everything, axis.read(tensor, everything) / factor)


def prove(
    groups: Sequence[UnitGroup],
    module: nn.Module,
    calls: Sequence[Call],
    *,
    dropout: bool,
    reductions: Collection[Any] = (),
) -> dict[str, str]:
    """The groups whose trial splits change an output, or that reach none: ``{name: reason}``.

    Units do the work of others, and change places with their neighbours on biases of every sign and size. All groups
    are tried together; only if that fails, in halves.
    ``dropout``: the calls drop activations at random, which the trials leave out. ``reductions``: what mixes units
    beside the normalisations that torch knows by name (see :func:`described`); trials of inexact groups hold it.
    """
    if not groups:
        return {}
    calls = repeatable(module, calls)
    failed: dict[str, str] = {}
    with _randomised(groups, module) as values:
        tried = [_Tried(group) for group in groups]
        for swapped in (None, False, True):
            if swapped is not None:
                values.bend(swapped=swapped)
            test = _prove if swapped is None else _exchange
            for exact in (True, False):
                part = [group for group in tried if group.exact is exact and group.name not in failed]
                if not part:
                    continue
                plain = Plain(unmixed=not exact, reductions=reductions) if dropout or not exact else nullcontext()
                with plain:
                    failed |= test(part, calls, values.restore)
    return failed


def _exchange(groups: Sequence[_Tried], calls: Sequence[Call], restore: Callable[[], None]) -> dict[str, str]:
    """The groups whose units cannot change places, in everything that the group names: ``{name: reason}``."""

    def shifted(part: Sequence[_Tried]) -> str:
        for group in part:
            group.roll()
        change = difference(reference, outputs(calls))
        restore()
        return "" if change <= allowed else f"units that change places change the output by {change:.1e}"

    reference = outputs(calls)
    allowed = tolerance(reference)
    if isinstance(reference, str) or not all(bool(t.isfinite().all()) for t in reference):
        return {}  # such values say nothing; the trial splits have been passed
    if not shifted(groups):
        return {}
    return {group.name: reason for group in groups if (reason := shifted([group]))}


def _prove(groups: Sequence[_Tried], calls: Sequence[Call], restore: Callable[[], None]) -> dict[str, str]:
    trials = {width: _ring(width) for width in {group.width for group in groups}}
    for group in groups:
        group.silence(trials[group.width].silent)
    with torch.enable_grad():
        results = live_outputs(calls)
    if isinstance(results, str):
        restore()
        return {group.name: results for group in groups}
    before = [t.detach().clone() for t in results]
    heard = _heard(groups, results)
    reason = _changed(groups, trials, calls, before)
    restore()
    silent = _silent([group for group in groups if group.name not in heard], calls, restore)
    audible = [group for group in groups if group.name not in silent]
    failed = silent | (_broken(audible, trials, calls, restore) if reason else {})
    few = [group for group in audible if group.width < _FEW and group.name not in failed]
    return failed | _broken(few, {n: _ring(n, mirrored=True) for n in range(2, _FEW)}, calls, restore)


def _silent(groups: Sequence[_Tried], calls: Sequence[Call], restore: Callable[[], None]) -> dict[str, str]:
    """Those of the groups that give no output anything: a path that carries no gradient may carry values."""
    found = {}
    reference = outputs(calls) if groups else []
    for group in groups:
        group.silence(torch.arange(group.width))
        if difference(reference, outputs(calls)) < 1e-6:
            found[group.name] = "no output of the calls depends on it, so nothing can be proved"
        restore()
    return found


def _broken(
    groups: Sequence[_Tried], trials: Mapping[int, _Trial], calls: Sequence[Call], restore: Callable[[], None]
) -> dict[str, str]:
    """The groups whose trials change an output, and by how much: found by halving, since few do."""
    if not groups:
        return {}
    reason = _try(groups, trials, calls)
    restore()
    if not reason:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    half = len(groups) // 2
    return _broken(groups[:half], trials, calls, restore) | _broken(groups[half:], trials, calls, restore)


def _heard(groups: Sequence[_Tried], results: Sequence[Tensor]) -> set[str]:
    """Groups through whose outgoing weights a gradient flows to some output: one backward pass for all."""
    weights = [(group.name, weight) for group in groups for _, weight in group.outgoing]
    moved: set[int] = set()

    def note(weight: Tensor, gradient: Tensor) -> Tensor:
        if bool((gradient != 0).any()):
            moved.add(id(weight))
        return gradient.new_zeros(()).expand_as(gradient)  # all gradients together are as large as the model

    leaves = {id(w): w for _, w in weights if w.requires_grad}.values()
    handles = [leaf.register_hook(partial(note, leaf)) for leaf in leaves]  # type: ignore[no-untyped-call]
    with torch.enable_grad():
        try:
            outputs = [t for t in results if t.requires_grad]
            total = sum((t.double() * torch.linspace(1, 2, t.numel(), device=t.device).reshape(t.shape)).sum()
                        for t in outputs)  # fmt: skip
            if not isinstance(total, Tensor):
                return set()
            torch.autograd.grad(total, [weight for _, weight in weights], allow_unused=True)
        except RuntimeError:
            return set()
        finally:
            for handle in handles:
                handle.remove()
    return {name for name, weight in weights if id(weight) in moved}


def prove_homogeneous(group: UnitGroup, module: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether scaling the units' weights and biases, and their consumers' inversely, changes no output.

    Biases of both signs and large and small factors reach every piece of a piecewise activation.
    """
    calls = repeatable(module, calls)
    with _randomised([group], module) as values, Plain():
        values.bend()
        reference = outputs(calls)
        for factor in (2.0**12, 2.0**-12):
            _Tried(group).scale(factor)
            change = difference(reference, outputs(calls))
            values.restore()
            if change > tolerance(reference):
                return False
        return True


def prove_unchanged(
    edit: Callable[[], None], groups: Sequence[UnitGroup], module: nn.Module, calls: Sequence[Call]
) -> str:
    """Make an edit that must change no output, and say by how much it does on parameters of any sign and size, or "".

    It is made while the parameters of ``module`` are random, so it must not look at them, and is not undone.
    """
    calls = repeatable(module, calls)
    own = outputs(calls)
    with _randomised(groups, module) as values, Plain():
        values.bend()
        reference = outputs(calls)
        edit()
        now = outputs(calls)
        change, allowed = difference(reference, now), tolerance(reference)
    if isinstance(now, str):
        return now
    if change <= allowed:
        change, allowed = difference(own, outputs(calls)), tolerance(own)
    return "" if change <= allowed else f"the output would change by {change:.1e} (at most {allowed:.1e})"


def prove_resizable(group: UnitGroup, module: nn.Module, calls: Sequence[Call]) -> str:
    """Why units can be neither removed nor added, or "" after doing both and undoing it.

    Correct indices are not enough: a forward pass that hard-codes a width fails, or gives something else.
    """
    if not group.exact:
        return f"a trial could not be exact: {group.why}"
    fixed = why_layers_are_fixed(group)
    if fixed:
        return fixed
    calls = repeatable(module, calls)
    with _randomised([group], module) as values, Plain():
        try:
            if group.width > FEWEST:
                units = sorted({0, group.width // 2, group.width - 1})[: group.width - FEWEST]
                _Tried(group).silence(torch.tensor(units))
                _resized_trial(group, without(group, units), calls, outputs(calls), [])
                values.restore()
            _resized_trial(group, with_more(group, 2), calls, outputs(calls), [group.width, group.width + 1])
        except NotRecyclable as error:
            return str(error)
    return ""


def _resized_trial(
    group: UnitGroup, layout: Layout, calls: Sequence[Call], before: list[Tensor] | str, newborns: list[int]
) -> None:
    """Resize, compare outputs, split into the newborns, compare again; always undone."""

    class Done(Exception):
        pass

    try:
        with resized(group, layout):
            change, allowed = difference(before, outputs(calls)), tolerance(before)
            if change > allowed:
                raise NotRecyclable(f"a trial with {layout.width} units changed the output by {change:.1e}")
            if newborns:
                split = _split(torch.arange(len(newborns)), torch.tensor(newborns))
                reason = _try([_Tried(group)], {group.width: split}, calls)
                if reason:
                    raise NotRecyclable(reason)
            raise Done
    except Done:
        return


def _try(groups: Sequence[_Tried], trials: Mapping[int, _Trial], calls: Sequence[Call]) -> str:
    """How a trial, by width, changes an output, or ""; not undone."""
    for group in groups:
        group.silence(trials[group.width].silent)
    return _changed(groups, trials, calls, outputs(calls))


def _changed(
    groups: Sequence[_Tried], trials: Mapping[int, _Trial], calls: Sequence[Call], before: list[Tensor] | str
) -> str:
    """The second half of a trial, where the outputs of its first are known."""
    for group in groups:
        group.divide(trials[group.width])
    change, allowed = difference(before, outputs(calls)), tolerance(before)
    return "" if change <= allowed else f"trial split changed the output by {change:.1e} (at most {allowed:.1e})"


class _Values:
    """Random values of a module's parameters and per-unit statistics, put back after every trial.

    Biases and gains lie in [.5, 1.5], which keeps units alive.
    """

    def __init__(self, groups: Sequence[UnitGroup], tensors: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            _draw(tensor, generator)
        incoming = {axis.name for group in groups for axis in group.incoming}
        written = incoming.union(axis.name for group in groups for axis in group.outgoing)
        self._tensors = [(tensor, tensor.detach().clone()) for name, tensor in tensors.items() if name in written]
        self._vectors = [(t, t.detach().clone()) for t in tensors.values() if t.dim() <= 1 and t.requires_grad]
        self._added = {
            id(tensors[axis.name]) for group in groups for axis in group.incoming if axis.role == "bias"
        }  # fmt: skip

    def restore(self) -> None:
        """Undo what a trial has written."""
        for tensor, value in self._tensors:
            tensor.copy_(value)

    def bend(self, *, swapped: bool = False) -> None:
        """Let neighbouring units stand on different sides of every bend.

        Biases and gains take both signs, those that are added to units also two sizes, in turn; ``swapped``: the small
        ones are large and the large ones small. Units that change places in both cases have met every sign and size,
        but for the first and the last of an odd number, which miss a small one.
        """
        for tensor, upright in self._vectors:
            signs, far = _bends(upright.numel(), swapped)
            bent = upright.flatten() * signs.to(upright)
            if id(tensor) in self._added:
                bent = torch.where(far.to(bent.device), bent * _FAR, bent)
            tensor.copy_(bent.reshape(tensor.shape))
        for tensor, value in self._tensors:
            if tensor.dim() <= 1:
                value.copy_(tensor)


@lru_cache(64)
def _bends(count: int, swapped: bool) -> tuple[Tensor, Tensor]:
    """Signs of so many biases, and which of them are large."""
    place = torch.arange(count)
    signs, far = torch.where(place % 2 > 0, 1.0, -1.0), (place % 4 > 1) != swapped
    if count % 2:  # the last and the first, who are neighbours, would have one sign for ever
        signs[-1], far[-1] = 1.0 if swapped else -1.0, True
    return signs, far


def _draw(tensor: Tensor, generator: torch.Generator) -> None:
    """Overwrite a tensor, in place where its device and precision can be drawn in."""
    here = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    place = tensor if here else torch.empty(tensor.shape)
    if tensor.dim() > 1:
        place.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    else:
        place.uniform_(0.5, 1.5, generator=generator)
    if not here:
        tensor.copy_(place)


@contextmanager
def _randomised(groups: Sequence[UnitGroup], module: nn.Module) -> Iterator[_Values]:
    """Random values in place of all parameters and of the units' running statistics, which come back bit by bit."""
    state = {axis.name for group in groups for axis in group.incoming if axis.role == "buffer"}
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    tensors |= {name: b for name, b in module.named_buffers() if name in state}
    saved = [t.detach().clone() for t in tensors.values()]
    with torch.no_grad():
        try:
            yield _Values(groups, tensors)
        finally:
            for tensor, value in zip(tensors.values(), saved, strict=True):
                tensor.copy_(value)
