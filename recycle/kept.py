"""All rows that are kept of a network: where they come from for each need of the methods, and what becomes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from recycle import growth_sample, junction, samples
from recycle.graph import Graph, UnitGroup
from recycle.rows import Examples, Look, Record, inputs_of

NEEDS = ("sample", "inputs", "junction", "growth")
"""The fields of :class:`recycle.stats.Stats` that are made of rows."""


class Kept:
    """The records of a graph.

    Args:
        graph: what is watched.
        needs: which of :data:`NEEDS` any method reads; nothing is kept for the others.
    """

    def __init__(self, graph: Graph, needs: Collection[str]) -> None:
        self._by: dict[str, dict[str, Record]] = {need: {} for need in NEEDS if need in needs}
        if "sample" in needs:
            self._by["sample"] = {group.name: Record(samples.looks(group)) for group in graph}
        if "inputs" in needs:
            layers = {axis.name: layer for group in graph for layer, axis in group.fed()}
            self._by["inputs"] = {name: Record([Look(layer, name)]) for name, layer in layers.items()}
        if "junction" in needs:
            self._by["junction"] = {group.name: Record(junction.looks(group), beside=group) for group in graph}
        if "growth" in needs:
            examples, able = Examples(), {group: looks for group in graph if (looks := growth_sample.looks(group))}
            first = min(able, key=lambda group: group.first, default=None)
            self._by["growth"] = {
                group.name: Record(looks, rows=growth_sample.ROWS, examples=examples, first=group is first)
                for group, looks in able.items()
            }

    def __iter__(self) -> Iterator[Record]:
        for records in self._by.values():
            yield from records.values()

    def read(self, group: UnitGroup) -> dict[str, Any]:
        """The fields of :class:`recycle.stats.Stats` that are made of rows; None where no method asked for one."""
        found: dict[str, Any] = dict.fromkeys(NEEDS)
        for need, read in (
            ("sample", samples.sample_of), ("junction", junction.junction_of), ("growth", growth_sample.growth_of),
        ):  # fmt: skip
            record = self._by.get(need, {}).get(group.name)
            found[need] = None if record is None else read(group, record.passes)
        if "inputs" in self._by:
            found["inputs"] = inputs_of(group, self._by["inputs"])
        return found

    def follow(self, group: UnitGroup, kept: Sequence[int], width: int) -> None:
        """A group that had that width was resized, see :meth:`recycle.rows.Record.follow`."""
        for record in self:
            record.follow(group, kept, width)

    def clear(self) -> None:
        """Forget all rows."""
        for record in self:
            record.clear()

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {need: {name: r.state() for name, r in records.items()} for need, records in self._by.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; rows that nobody needs now are left out."""
        for need, records in self._by.items():
            for name, record in records.items():
                record.load(state.get(need, {}).get(name, []))
