"""Continual Backprop: always replace the least useful mature units (Dohare et al. 2024, Nature 632, algorithm 1)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.selection import Units, fold
from recycle.stats import Stats


@dataclass(frozen=True)
class ContinualBackprop:
    """Reset a small share of the mature units at every event, dead or not: those of least utility.

    The paper updates utilities with a decay of .99 and replaces after every update. Here both happen at events: the
    window's mean stands for the running average, which remembers 100 updates, and the units that became due in the
    window are replaced together. Every unit is seen for the whole window, so none needs a correction for its age.
    A replaced unit's mean activation is moved into its consumers' biases, which the reference code announces and
    does not do.
    """

    rate: float = 1e-4
    """Share of the mature units that is replaced for each update; the paper's value for PPO. What is less than a
    unit adds up from event to event."""
    maturity: int = 10_000
    """Updates for which a unit is protected after its birth."""
    utility: Literal["contribution", "zero_contribution", "adaptable"] = "contribution"
    """``contribution``: mean |activation| times outgoing norm. ``zero_contribution``: of the activation without its
    mean (its standard deviation). ``adaptable``: that over the incoming norm."""

    _owed: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it reads."""
        own = ("mean_abs",) if self.utility == "contribution" else ("variance",)
        return (*own, "outgoing_norm", "incoming_norm", "age", "minimum", "maximum")

    def __post_init__(self) -> None:
        check_fields(self, "cbp")
        if not 0 <= self.rate <= 1 or self.maturity < 0:
            raise ValueError(
                f"cbp needs a rate in [0, 1] (a share of the units for each update) and maturity >= 0 (updates), got "
                f"rate={self.rate}, maturity={self.maturity}"
            )

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the least useful mature units say on average, then reset them."""
        mature = (stats.age > self.maturity).nonzero()[:, 0]
        owed = self._owed.get(group.name, 0.0) + self.rate * len(mature) * stats.updates
        count = min(int(owed), len(mature))
        self._owed[group.name] = owed - int(owed)
        if not count:
            return []
        units = mature[torch.argsort(self.usefulness(stats)[mature], stable=True)][:count]
        return [*fold(group, stats, units), Reset(units.tolist())]

    def usefulness(self, stats: Stats) -> Tensor:
        """The utility of each unit, ``(width,)``."""
        if self.utility == "contribution":
            return stats.utility
        value = stats.variance.sqrt() * stats.outgoing_norm
        return value / stats.incoming_norm.clamp_min(1e-12) if self.utility == "adaptable" else value

    def state_dict(self) -> dict[str, Any]:
        """What is due and not yet a whole unit, by group."""
        return {"owed": dict(self._owed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._owed.clear()
        self._owed.update(state["owed"])
