"""Widen layers with copies of live units (Chen, Goodfellow and Shlens 2016, "Net2Net", ICLR)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recycle.edits import Edit, Split
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.methods.widths import check_width, room
from recycle.stats import Stats


@dataclass(frozen=True)
class Net2Wider:
    """Add copies of random units; a unit and its copies share its outgoing weights in equal parts.

    Exact without noise. But equal halves get equal gradients, and only what the optimizer remembers parts them, or
    nothing: as in the paper a little noise does. It is antisymmetric, so that the output changes by its square only.
    """

    count: int = 1
    """Units that each layer gains at an event."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    noise: float = 0.01
    """Length of the noise on the incoming weights, relative to the row; 0: exact copies."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "net2wider")
        check_width("net2wider", self.count, self.most)
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"net2wider needs a noise >= 0, got noise={self.noise}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One split of random units, some perhaps more than once."""
        count = room(group, self.count, self.most)
        parents = torch.randint(group.width, (count,), generator=stats.generator)
        return [Split(parents.tolist(), share=None, noise=self.noise)] if count else []
