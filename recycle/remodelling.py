"""Change whole layers of a network, and go on watching the groups that it has then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recycle.books import Books
from recycle.deepening import Insertion, deepen
from recycle.graph import Graph, NotRecyclable, UnitGroup
from recycle.injection import inject
from recycle.interventions import Deepen, Inject, Intervention, Renew
from recycle.layers import NetworkLayers
from recycle.stats import Stats
from recycle.track import Tracker


def each_asked_for(
    methods: Sequence[Any],
    layers: Callable[[], NetworkLayers],
    stats: Mapping[str, Stats],
    change: Callable[[Intervention], None],
) -> tuple[list[Intervention], str]:
    """Make what methods for whole networks ask for, each all or none, no layer twice: what was made, and why not all.

    Args:
        methods: have ``on_networks``, see :class:`recycle.methods.NetworkMethod`.
        layers: the network's as they are now.
        stats: of its groups, before the event.
        change: makes one, or raises :class:`recycle.NotRecyclable`.
    """
    made: list[Intervention] = []
    notes = []
    taken: set[str] = set()
    for method in methods:
        for wanted in method.on_networks([layers()], stats):
            twice = sorted(taken & set(wanted.layers))
            if twice:
                notes.append(f"{type(wanted).__name__} of {', '.join(twice)}: changed at this event already")
                continue
            try:
                change(wanted)
            except NotRecyclable as error:
                notes.append(str(error))
                continue
            made.append(wanted)
            taken |= set(wanted.layers)
    return made, "; ".join(notes)


def renewed(graph: Graph, interventions: Sequence[Intervention]) -> list[str]:
    """Groups whose layers began anew, and with them their units."""
    layers = {path for i in interventions if isinstance(i, Renew) and i.weights for path in i.layers}
    return [g.name for g in graph if any(axis.name.rpartition(".")[0] in layers for axis in g.incoming)]


class Remodelling:
    """Insert or inject layers, and find the groups of the network that there is then.

    Args:
        graph: the network before.
        tracker: watches it; to be detached meanwhile, since its hooks may stand on layers that go.
        books: of its groups.

    Raises:
        NotRecyclable: nobody said how to trace the network again.
    """

    def __init__(self, graph: Graph, tracker: Tracker, books: Books) -> None:
        if graph.again is None:
            raise NotRecyclable("a network with other layers must be traced again: pass what recycle.trace returned")
        self.graph, self.tracker, self.books, self._again = graph, tracker, books, graph.again
        self._owners: dict[tuple[Tensor, int], dict[int, str]] = {}  # group by parameter, axis and entry
        for group in graph:
            for axis in group.incoming:
                owner = self._owners.setdefault((group.tensor(axis.name), axis.dim), {})
                owner |= dict.fromkeys(axis.index.flatten().tolist(), group.name)
        self._parameters = set(graph.module.parameters())

    def make(self, wanted: Inject | Deepen, targets: Sequence[nn.Module], **how: Any) -> list[Insertion]:
        """Change the module; what was inserted."""
        if isinstance(wanted, Inject):
            inject(self.graph, targets=targets, **how)
            return []
        return deepen(wanted, self.graph, targets=targets, **how)

    def follow(self, watching: Callable[[Graph], Tracker]) -> tuple[Graph, Tracker, Books]:
        """Groups that were watched before, and those that are new; ages and books go along where a group stayed.

        ``watching``: makes the tracker of a graph.
        """
        found = self._again()
        before = {group.name: self._before(group) for group in found}
        graph = found.select([name for name, names in before.items() if "" not in names])
        tracker, books = watching(graph), Books(graph)
        tracker.count_on(self.tracker)
        books.windows = self.books.windows
        for group in graph:
            old = next(iter(before[group.name]), None)
            if old is not None and len(self.tracker.born[old]) == group.width:
                tracker.born[group.name] = self.tracker.born[old]
                books.carry(group.name, self.books, old)
        return graph, tracker, books

    def _before(self, group: UnitGroup) -> list[str]:
        """What the groups were called that held a group's entries; "" for entries of a parameter that none held."""
        names = []
        for axis in group.incoming:
            tensor = group.tensor(axis.name)
            owner = self._owners.get((tensor, axis.dim), {})
            if owner or tensor in self._parameters:
                names.append(owner.get(int(axis.index[0, 0]), ""))
        return names
