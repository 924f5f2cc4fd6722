"""Ask the methods about one group, hold back what may not be done now, and make the rest, all or none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.books import Books
from recycle.edits import Edit, Fold, Grow, Prune, Split, kept, renumbered, resizes
from recycle.fresh import Init
from recycle.graph import NotRecyclable, UnitGroup
from recycle.nursery import answers_of
from recycle.outputs import difference, tolerance
from recycle.stats import Stats
from recycle.surgery import all_or_none, apply, check

_NO_OPTIMIZER = (
    "this Recycler edits weights and knows no optimizer: momentum and second moments stay those of the units that were "
    "overwritten. Pass optimizers=[...]"
)


@dataclass(frozen=True)
class Editor:
    """Makes one event's edits, group by group; what it is made of is told at :class:`recycle.Recycler`."""

    methods: Sequence[Any]
    """Those that edit units."""
    optimizers: Sequence[Optimizer]
    targets: Sequence[tuple[nn.Module, float]]
    peak: Callable[[UnitGroup], Tensor | None] | None
    """Largest |output| of a group's units in the targets that are Polyak averages; None where there are none."""
    books: Books
    cooldown: int
    cap: float
    init: Init | None
    generator: torch.Generator
    loss: Callable[[], Tensor] | None
    fixed: str
    """Why units can neither come nor go, or ""."""
    unwatched: Callable[[], AbstractContextManager[None]]
    """Inside, passes are no training passes: births may run the loss."""

    def edit(self, group: UnitGroup, stats: Stats) -> tuple[list[Edit], str]:
        """Make the methods' edits of one group, all or none: those made, and why not all that were asked for."""
        held: dict[str, Any] = {"optimizers": self.optimizers, "targets": self.targets}
        try:
            wanted = [edit for method in self.methods for edit in method(group, stats)]
            for edit in wanted:
                check(edit, group, **held)
            allowed, note = self._allowed(group, wanted)
            edits = [edit for edit in (e.only(allowed) for e in wanted) if edit.slots or resizes(edit)]
            edits = [edit for edit in edits if not (isinstance(edit, Prune) and not edit.units)]
            if edits and not self.optimizers:
                warnings.warn(_NO_OPTIMIZER, stacklevel=5)
            if any(map(resizes, edits)):
                return ([], self.fixed) if self.fixed else self._resize(group, edits, note, stats)
            with all_or_none(group, **held):
                for edit in edits:
                    apply(edit, group, **held, generator=self.generator, init=self.init, inputs=stats.inputs)
        except NotRecyclable as error:
            return [], str(error)
        return edits, note

    def _allowed(self, group: UnitGroup, edits: Sequence[Edit]) -> tuple[set[int], str]:
        """Slots that cooldown, target networks and the cap let through, and what was held back."""
        slots = list(dict.fromkeys(slot for edit in edits for slot in edit.slots))
        ready = self.books.ready(group, slots, self.cooldown)
        notes = [f"{len(slots) - len(ready)} cooling down"] * (len(ready) < len(slots))
        if ready and self.peak is not None:
            highest = self.peak(group)
            if highest is None:
                return set(), "no batch was seen on which to check the target network"
            folded = [slot for edit in edits if isinstance(edit, Fold) for slot in edit.slots]
            highest[folded] = torch.inf  # the target's own constant is another one
            dead = [slot for slot in ready if highest[slot] == 0]
            notes += [f"{len(ready) - len(dead)} still alive in the target network"] * (len(dead) < len(ready))
            ready = dead
        most = max(1, math.floor(self.cap * group.width + 1e-9))
        notes += [f"{len(ready) - most} over the cap"] * (len(ready) > most)
        return set(ready[:most]), "; ".join(notes)

    def _resize(self, group: UnitGroup, edits: Sequence[Edit], note: str, stats: Stats) -> tuple[list[Edit], str]:
        """Make edits of which some resize, and see whether the output stayed as it was."""
        with self.unwatched():
            before = answers_of(group) if any(map(_may_move_the_output, edits)) else []
            made, note = self._one_by_one(group, edits, note, stats)
            moved = difference(before, answers_of(group)) if before and made else 0.0
        if moved > tolerance(before):
            note = "; ".join(filter(None, (f"the output moved by {moved:.1e} of its largest value", note)))
        return made, note

    def _one_by_one(self, group: UnitGroup, edits: Sequence[Edit], note: str, stats: Stats) -> tuple[list[Edit], str]:
        """Each all or none. Units keep their numbers until the last is made."""
        now = {unit: unit for unit in range(group.width)}
        made: list[Edit] = []
        how: dict[str, Any] = {"generator": self.generator, "init": self.init, "inputs": stats.inputs}
        how |= {"junction": stats.junction or "no pass was sampled", "loss": self.loss}
        for edit in edits:
            try:
                order = kept(renumbered(edit, now), group.width)
                apply(renumbered(edit, now), group, optimizers=self.optimizers, targets=self.targets, **how)
            except KeyError as error:
                return made, f"{type(edit).__name__} names unit {error}, which an earlier edit of the event removed"
            except NotRecyclable as error:
                return made, str(error)
            made.append(edit)
            place = {old: new for new, old in enumerate(order) if old >= 0}
            now = {unit: place[at] for unit, at in now.items() if at in place}
        return made, note


def _may_move_the_output(edit: Edit) -> bool:
    """Whether units come with weights that are not exact by themselves."""
    return bool(edit.birth if isinstance(edit, Grow) else isinstance(edit, Split) and edit.noise)
