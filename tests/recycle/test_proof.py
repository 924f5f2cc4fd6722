"""What trials on random parameters find out where labels are told something wrong, or see nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle.graph import Axis, UnitGroup
from recycle.proof import _ring, prove

X = torch.randn(6, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
WIDTHS = range(2, 9)
UNITS = [(width, unit) for width in WIDTHS for unit in range(width)]


class Hidden(nn.Module):
    """Some units are also read by what no tracer sees: values that take a way through numpy."""

    def __init__(self, width: int, seen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(3, width), nn.Linear(width, 2), seen

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        there_and_back = torch.from_numpy(self.seen(h).detach().numpy() * 1.0)
        return self.last(h) + there_and_back.sum(-1, keepdim=True)


def built(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def group_of(net: Any, width: int, outgoing: list[int] | None = None, bias: list[int] | None = None) -> UnitGroup:
    """The hidden units of ``first -> last``, with these columns and entries of the bias as theirs."""
    own = torch.arange(width)[:, None]
    columns = own if outgoing is None else torch.tensor(outgoing)[:, None]
    entries = own if bias is None else torch.tensor(bias)[:, None]
    incoming = (Axis("first.weight", 0, own, "weight"), Axis("first.bias", 0, entries, "bias"))
    return UnitGroup("first", width, incoming, (Axis("last.weight", 1, columns, "consumer"),), net)


def failed(net: Any, *groups: UnitGroup) -> dict[str, str]:
    with torch.no_grad():
        return prove(groups, net, [lambda: net(X)], dropout=False)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("width", [*WIDTHS, 63, 64])
def test_a_ring_links_all_units_and_gives_away_all_of_each_source(width: int, mirrored: bool) -> None:
    ring = _ring(width, mirrored=mirrored)
    assert ring.places.tolist() == list(range(width))
    sources = set(ring.sources.tolist())
    assert sources.isdisjoint(ring.silent.tolist()) and len(sources) + len(ring.silent) == width
    for source in sources:
        assert float(ring.shares[ring.sources == source].sum()) == pytest.approx(1, abs=1e-15)
    assert bool((ring.shares > 0.2).all())
    linked = {0}
    for _ in range(width):
        for pair in zip(ring.places.tolist(), ring.sources.tolist(), strict=True):
            linked |= set(pair) if linked & set(pair) else set()
    assert linked == set(range(width))


@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_every_unit_takes_anothers_place_of_few_as_well(width: int) -> None:
    stays = [(ring.places == ring.sources).tolist() for ring in (_ring(width), _ring(width, mirrored=True))]
    assert not any(map(all, zip(*stays, strict=True)))
    assert width < 4 or not any(stays[0])


@pytest.mark.parametrize("width", [2, 3])
def test_units_of_few_that_are_silent_on_most_inputs_are_still_tried(width: int) -> None:
    """Without a bias a unit may be silent on all inputs that there are; then others have to show what is wrong."""

    class Largest(Hidden):
        def __init__(self) -> None:
            super().__init__(width, lambda h: h)
            self.first = nn.Linear(3, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.first(x))
            return self.last(h * (h == h.amax(1, keepdim=True)))

    net, own = built(Largest), torch.arange(width)[:, None]
    axes = (Axis("first.weight", 0, own, "weight"),), (Axis("last.weight", 1, own, "consumer"),)
    group, found = UnitGroup("first", width, *axes, net), 0
    for seed in range(24):
        x = torch.randn(7, 3, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found += bool(prove([group], net, [lambda x=x: net(x)], dropout=False))
    assert found >= 22  # one ring alone finds 14 of two units, 19 of three


@pytest.mark.parametrize("width", WIDTHS)
def test_a_right_group_passes(width: int) -> None:
    net = built(lambda: Hidden(width, lambda h: h[:, :0]))
    assert failed(net, group_of(net, width)) == {}
    assert [group.width for group in recycle.trace(net, lambda: net(X))] == [width]


@pytest.mark.parametrize(("width", "unit"), UNITS)
def test_another_reader_of_any_one_unit_is_found(width: int, unit: int) -> None:
    net = built(lambda: Hidden(width, lambda h: h[:, unit : unit + 1]))
    assert failed(net, group_of(net, width))
    assert len(recycle.trace(net, lambda: net(X))) == 0


@pytest.mark.parametrize("which", ["columns", "biases"])
@pytest.mark.parametrize(("width", "unit"), UNITS)
def test_any_two_units_whose_elements_are_mixed_up_are_found(width: int, unit: int, which: str) -> None:
    for other in range(unit):
        order = list(range(width))
        order[unit], order[other] = other, unit
        net = built(lambda: Hidden(width, lambda h: h[:, :0]))
        wrong = group_of(net, width, **{"outgoing" if which == "columns" else "bias": order})
        assert failed(net, wrong), f"{unit} and {other} of {width}"


@pytest.mark.parametrize("bend", [torch.relu, torch.tanh, lambda h: h.clamp(-6, 6), lambda h: -h])
@pytest.mark.parametrize(("width", "unit"), UNITS)
def test_any_one_unit_with_another_activation_is_found(width: int, unit: int, bend: Any) -> None:
    class Bent(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = F.leaky_relu(self.first(x))
            mask = torch.arange(width) == unit
            return self.last(torch.where(mask, bend(h), h))

    net = built(lambda: Bent(width, lambda h: h))
    assert failed(net, group_of(net, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_what_no_output_depends_on_is_said_to_be_so_and_does_not_spoil_the_others(width: int) -> None:
    class Beside(Hidden):
        def __init__(self) -> None:
            super().__init__(width, lambda h: h)
            self.unread, self.lost = nn.Linear(3, width), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.lost(F.relu(self.unread(x)))
            return self.last(F.relu(self.first(x)))

    net = built(Beside)
    graph = recycle.trace(net, lambda: net(X))
    assert [group.name for group in graph] == ["first"]
    assert graph.frozen["unread"] == "no output of the calls depends on it, so nothing can be proved"


@pytest.mark.parametrize("width", WIDTHS)
def test_values_that_carry_no_gradient_are_heard(width: int) -> None:
    net = built(lambda: Hidden(width, lambda h: h[:, :0]))
    assert [group.name for group in recycle.trace(net, lambda: net(X).detach())] == ["first"]
