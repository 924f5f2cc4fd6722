"""What was seen of one group's units since the last event, and the statistics that it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.graph import Axis, Observer, UnitGroup
from recycle.stats import Gradients, Window, joined, largest

_NAMES = ("firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum", "silence", "rarity")


class Seen:
    """A group's windows, one for each place at which something of its units shows.

    Args:
        group: the units.
        firing: keep the times between each unit's firings as well.
        apart: those of passes that count later, see :class:`recycle.firing.Firing`.
    """

    def __init__(self, group: UnitGroup, firing: bool, apart: bool = False) -> None:
        self.windows = [Window(firing, apart) for _ in watched(group)]
        """Of the consumers' inputs, then of the normalisations': as :func:`watched` lists them."""
        self.gradients = [Gradients() for _ in group.producers()]
        """At the pre-activations, by producer."""
        self.weights = Gradients()
        """Of the incoming weights."""
        self._consumers = len(group.observers())

    def clear(self) -> None:
        """Begin a new window."""
        for window in self.windows:
            window.clear()
        for gradients in (*self.gradients, self.weights):
            gradients.clear()

    def resized(self, kept: Sequence[int]) -> None:
        """Begin anew after a resize: new unit i was unit ``kept[i]``, or is new where that is -1."""
        self.windows = [window.following(kept) for window in self.windows]
        self.gradients = [Gradients() for _ in self.gradients]
        self.weights = Gradients()

    def reborn(self, units: Sequence[int], width: int) -> None:
        """Other units stand in these places."""
        for window in self.windows:
            if window.firing is not None and units:
                window.firing.follow([-1 if unit in units else unit for unit in range(width)])

    @property
    def latest(self) -> Tensor | None:
        """Up to 256 activations of the latest sampled pass, ``(values, width)``, or None."""
        return self.windows[0].latest if self.windows else None

    def read(self, group: UnitGroup) -> dict[str, Any]:
        """The fields of :class:`recycle.stats.Stats` that windows give. Waits for the device."""
        samples = min((window.count for window in self.windows), default=0)
        nan = torch.full((group.width,), float("nan"), dtype=torch.double)
        found: dict[str, Any] = dict.fromkeys(_NAMES, nan)
        finite = True
        if samples:
            found |= _active(group, [window.read() for window in self.windows], self._consumers)
            finite = bool(found["mean_abs"].isfinite().all() and found["variance"].isfinite().all())
        return found | {
            "samples": samples,
            "finite": finite,
            "gradient": largest([seen.mean(group.width) for seen in self.gradients], nan),
            "weight_gradient": self.weights.mean(group.width),
        }

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "windows": [window.state() for window in self.windows],
            "gradients": [seen.state() for seen in self.gradients],
            "weights": self.weights.state(),
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        for window, saved in zip(self.windows, state["windows"], strict=True):
            window.load(saved, device)
        for seen, saved in zip(self.gradients, state["gradients"], strict=True):
            seen.load(saved, device)
        self.weights.load(state["weights"], device)


def watched(group: UnitGroup) -> list[Observer]:
    """Where a group's outputs show: what its consumers read, and then what normalisations of its units read.

    A norm's input says what is dead before it, but not what the consumers read: alone it would say too much.
    """
    consumers = group.observers()
    return [*consumers, *group.norms()] if consumers else []


def _active(group: UnitGroup, seen: list[dict[str, Tensor]], consumers: int) -> dict[str, Tensor]:
    """The units as their activation leaves them.

    Behind a normalisation nothing looks dead (its shift is trained, it mixes units), and before one that precedes the
    activation nothing does either: so it is where they fire least. A unit that is dead before a batch normalisation
    gives its consumers the shift, if that is what they saw.
    """
    read = joined(seen[:consumers])
    if not seen[consumers:]:
        return read
    before = joined(seen[consumers:])
    if float(before["firing_rate"].mean()) >= float(read["firing_rate"].mean()):
        return read
    shift = group.shift()
    if shift is None:
        return before
    low, high = read["minimum"], read["maximum"]
    slack = (high - low) + 1e-3 * (1 + shift.abs())
    as_told = (shift >= low - slack) & (shift <= high + slack)
    dead = before["minimum"] == before["maximum"]
    found = before | {"mean": torch.where(dead & as_told, shift, read["mean"])}
    for key in ("minimum", "maximum"):
        found[key] = torch.where(dead, torch.where(as_told, shift, read[key]), before[key])
    return found


def settled(group: UnitGroup) -> Tensor | None:
    """Where running variances have come down to nothing, as those of a constant do, and the means with them."""
    units, found = torch.arange(group.width), None
    for axis in group.incoming:
        owner, _, leaf = axis.name.rpartition(".")
        eps = getattr(group.module.get_submodule(owner), "eps", None)
        if leaf in ("running_var", "ra_var") and eps is not None:
            largest_of = axis.read(group.tensor(axis.name), units).flatten(1).amax(1).cpu()
            found = (largest_of <= 1e-6 * eps) & (True if found is None else found)
    return found


def norm(group: UnitGroup, axes: Sequence[Axis], order: int) -> Tensor:
    """Of all elements of each unit on these axes, ``(width,)``."""
    units = torch.arange(group.width)
    with torch.no_grad():
        parts = [axis.read(group.tensor(axis.name), units).double().flatten(1).cpu() for axis in axes]
        norms: Tensor = torch.linalg.vector_norm(torch.cat(parts, 1), order, dim=1)
        return norms


def of_rows(values: Tensor, index: Tensor | None) -> Tensor:
    """The mean over each unit's entries ``(width, span)``, or all in order where that is None: ``(width,)``."""
    if index is None:
        return values
    return values[index[:, 0]] if index.shape[1] == 1 else values[index].mean(1)
