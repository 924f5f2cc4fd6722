"""Attention heads as units: beside other groups, in one tensor with them, and in a recycler's hands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Fold, Recycler, Reset, Split
from recycle.methods.mirror import Mirror
from recycle.methods.redo import ReDo
from recycle.methods.split import SplitDead

from ..nets import ZOO, Wire

every_net = pytest.mark.parametrize("name", list(ZOO))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(name: str) -> tuple[nn.Module, Tensor]:
    return ZOO[name].build(), ZOO[name].inputs(seeded(1))[0]


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def projections(width: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(5, width) for name in ("q", "k", "v")}


X = torch.randn(7, 4, 5, generator=seeded(), dtype=torch.double)


def traced(net: nn.Module, **options: Any) -> Any:
    net = net.double()
    return recycle.trace(net, lambda: net(X), **options)


def widths(graph: Any) -> dict[str, int]:
    return {group.name: group.width for group in graph}


@every_net
def test_no_element_belongs_to_units_of_two_groups(name: str) -> None:
    net = ZOO[name].build()
    graph = recycle.trace(net, *ZOO[name].calls(net, ZOO[name].inputs(seeded(1))))
    taken: set[tuple[str, int, int]] = set()
    for group in graph:
        own = {(a.name, a.dim, i) for a in group.incoming for i in a.index.flatten().tolist()}
        assert not own & taken, group.name
        taken |= own


def test_without_heads_the_channels_of_their_values_are_units() -> None:
    net, x = built("heads_by_hand")
    graph = recycle.trace(net, lambda: net(x), heads=False)
    assert widths(graph) == {"v[0:2]": 2, "v[2:4]": 2, "v[4:6]": 2}
    assert {"q", "k"} <= graph.frozen.keys()
    assert graph.again is not None and widths(graph.again()) == widths(graph)


def test_a_single_head_has_no_other_to_be_split_with() -> None:
    net = Wire(lambda m, x: m.out(attended(m.q(x), m.k(x), m.v(x), 1)), **projections(6), out=nn.Linear(6, 3))
    assert widths(traced(net)) == {"v": 6}


def test_rows_beside_the_heads_of_one_weight_are_units_of_their_own() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v, h = m.into(x).split([6, 6, 6, 8], -1)
        return m.out(torch.cat([attended(q, k, v, 3), F.relu(h)], -1))

    graph = traced(Wire(forward, into=nn.Linear(5, 26), out=nn.Linear(14, 3)))
    assert widths(graph) == {"into[0:18]": 3, "into[18:26]": 8}
    assert list(graph.frozen) == ["out"]


def test_heads_that_are_no_units_stay_frozen_beside_others_that_are() -> None:
    """One weight makes both: of the second attention the keys of each head stand in an order of their own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v, q2, k2, v2 = m.into(x).split([4, 4, 4, 8, 8, 8], -1)
        k2 = torch.cat([k2[..., :4], k2[..., 4:].flip(-1)], -1)
        return m.out(torch.cat([attended(q, k, v, 2), attended(q2, k2, v2, 2)], -1))

    graph = traced(Wire(forward, into=nn.Linear(5, 36), out=nn.Linear(12, 3)))
    assert widths(graph) == {"into[0:12]": 2, "into[28:32]": 4, "into[32:36]": 4}
    assert any("aten.bmm" in why for name, why in graph.frozen.items() if name.startswith("into["))


def test_averaged_attention_weights_freeze_heads_only_if_they_are_used() -> None:
    def used(m: Any, x: Tensor) -> Tensor:
        y, weights = m.attention(x, x, x)
        return y * weights.mean()

    def unused(m: Any, x: Tensor) -> Tensor:
        return m.attention(x, x, x)[0]  # type: ignore[no-any-return]

    for wiring, heads in ((unused, 5), (used, 0)):
        graph = traced(Wire(wiring, attention=nn.MultiheadAttention(5, 5, batch_first=True)))
        assert widths(graph).get("attention.in_proj_weight", 0) == heads, str(graph)


@pytest.mark.parametrize("training", [False, True])
def test_both_modes_of_a_fused_layer_give_the_same_groups(training: bool) -> None:
    net, x = built("transformer_layer")
    net.train(training)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    graph = recycle.trace(net, lambda: net(x))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before
    assert graph["1.self_attn.in_proj_weight"].exact
    assert graph["1.self_attn.in_proj_weight"].width == 2


def test_learned_mixing_of_heads_consumes_one_kind_and_belongs_to_the_other() -> None:
    """Talking heads (Shazeer et al. 2020): scores of some heads are mixed into those of others."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (3, -1)).transpose(1, 2) for part in (m.q, m.k, m.v))
        mixed = torch.einsum("bhij,hg->bgij", q @ k.transpose(-1, -2), m.mix).softmax(-1)
        return m.out((mixed @ v).transpose(1, 2).flatten(2))

    mix = nn.Parameter(torch.randn(3, 3, generator=seeded()))
    graph = traced(Wire(forward, **projections(6), mix=mix, out=nn.Linear(6, 3)))
    assert widths(graph) == {"q": 3, "v": 3}
    assert [axis.name for axis in graph["q"].outgoing] == ["mix"]
    assert "mix" in [axis.name for axis in graph["v"].incoming]


@pytest.mark.parametrize("method", [SplitDead(noise=0.0), ReDo(), Mirror()])
def test_a_head_whose_values_are_zero_is_seen_dead_and_recycled(method: Any) -> None:
    net, x = built("heads_by_hand")
    with torch.no_grad():
        net.v.weight[4:6] = 0.0  # type: ignore[union-attr,operator,index]
        net.v.bias[4:6] = 0.0  # type: ignore[union-attr,operator,index]
    adam = torch.optim.Adam(net.parameters())
    recycler = Recycler(recycle.trace(net, lambda: net(x)), method, optimizers=[adam], sample_every=1)
    with recycler.listening():
        before = net(x)
        before.square().mean().backward()
    report = recycler.step()
    assert report.groups["q"].dead == pytest.approx(1 / 3)
    assert [edit.slots for _, edit in report.edits] == [(2,)]
    assert float((net(x) - before).detach().abs().max()) <= 1e-12
    adam.step()


def test_a_constant_head_is_folded_into_the_bias_of_the_projection() -> None:
    net, x = built("heads_by_hand")
    graph = recycle.trace(net, lambda: net(x))
    with torch.no_grad():
        net.v.weight[0:2] = 0.0  # type: ignore[union-attr,operator,index]
        net.v.bias[0:2] = 0.7  # type: ignore[union-attr,operator,index]
    before = net(x)
    recycle.apply(Fold([0], [0.7]), graph["q"])
    recycle.apply(Split([1], [0]), graph["q"])
    assert float((net(x) - before).detach().abs().max()) <= 1e-12
    certain = recycle.certify(graph, net, torch.full_like(x, -1.0), torch.full_like(x, 1.0))
    assert certain["q"].tolist() == [False, False, False]
    recycle.apply(Reset([2]), graph["q"], generator=seeded())
    assert float(net.out.weight[:, 4:6].abs().max()) == 0.0  # type: ignore[union-attr,operator,index]
