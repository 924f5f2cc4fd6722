"""A birth whose incoming weights somebody else has worked out."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle.births.newborns import Newborns
from recycle.births.revive import between_fresh_and_live
from recycle.graph import NotRecyclable


class Given:
    """Incoming weights that a method worked out itself, the bias last where there is one: ``(units, fan_in)``.

    Args:
        rows: of the newborns, in their order. Their layer must be made of one weight, with at most a bias.
        usual_length: scale each row so that its weights are as long as those of :func:`revive`, between a fresh and a
            live row. For ReLU-like units, whose hinge that leaves where it is.
    """

    def __init__(self, rows: Tensor, usual_length: bool = False) -> None:
        self.rows, self.usual_length = rows, usual_length

    def __call__(self, newborns: Newborns) -> tuple[Tensor, ...]:
        """The rows, as the newborns' layer holds them."""
        roles = [axis.role for axis in newborns.axes]
        if roles.count("weight") != 1 or roles.count("bias") > 1 or set(roles) - {"weight", "bias"}:
            raise NotRecyclable(f"given rows are for units with one weight and at most a bias, these have {roles}")
        at = roles.index("weight")
        size, own = newborns.fresh[at][0].numel(), newborns.fresh[at]
        if tuple(self.rows.shape) != (len(own), size + roles.count("bias")):
            raise NotRecyclable(
                f"{len(own)} newborns with {size} weights and {roles.count('bias')} biases each got rows of shape "
                f"{tuple(self.rows.shape)}"
            )
        rows = self.rows.to(own)
        if self.usual_length:
            norm = rows[:, :size].norm(dim=1, keepdim=True)
            usual = between_fresh_and_live(own, newborns.others[at]).reshape(-1)[0]
            rows = rows * torch.where(norm > 0, usual / norm, 1.0)
        weights, bias = rows[:, :size].reshape_as(own), rows[:, size:]
        return tuple(
            weights if role == "weight" else bias.reshape_as(f) for role, f in zip(roles, newborns.fresh, strict=True)
        )

    def first(self, count: int) -> Given:
        """Those of the first so many units."""
        return Given(self.rows[:count], self.usual_length)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Given) and self.usual_length == other.usual_length and torch.equal(self.rows, other.rows)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Given({len(self.rows)} rows)"
