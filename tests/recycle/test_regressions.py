"""What a second reading of the code found: each of these was wrong once."""

import pytest
import torch
from torch import nn

import recycle
from recycle import Recycler, Reset
from recycle.methods import SplitDead


def test_a_bias_with_a_second_use_is_no_place_to_fold_into() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.g = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x))) * torch.sigmoid(self.g(x)) + self.b.bias

    net, x = Net().double(), torch.randn(5, 3).double()
    assert "no bias of its own" in recycle.trace(net, lambda: net(x))["a"].why_not_foldable


def test_fresh_weights_leave_the_random_numbers_of_gpus_alone(monkeypatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    recycle.apply(Reset([1]), recycle.trace(net, lambda: net(x))["0"])
    assert seeded == []


def test_a_copy_that_has_not_parted_from_its_parent_is_counted() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(16, 3)
    with torch.no_grad():
        net[0].bias[:] = torch.tensor([1.0, 1.0, 1.0, -99.0])
    recycler = Recycler(recycle.trace(net, lambda: net(x)), SplitDead(noise=0.0), sample_every=1)
    found = []
    for _ in range(2):
        with recycler.listening():
            net(x).sum().backward()
        found.append(recycler.step().groups["0"])
    assert (found[0].recycled, found[0].unparted, found[1].unparted) == (1, 0, 1)


class _Wired(nn.Module):
    """A forward pass written as a function of the module and its input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.wiring = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wiring(self, x)


def _frozen(net: nn.Module, width: int) -> dict[str, str]:
    x = 0.1 * torch.randn(5, width).double()
    return recycle.trace(net.double(), lambda: net(x)).frozen


@pytest.mark.parametrize("bend", [torch.relu, lambda h: h.clamp(max=6.0), nn.functional.relu6])
def test_an_activation_of_some_units_makes_them_another_kind(bend) -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.a(x)
        return net.b(torch.cat([bend(h[:, :1]), h[:, 1:]], 1))

    frozen = _frozen(_Wired(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), 3)
    assert "one unit alone" in frozen["a[0:1]"] and "a[1:4]" not in frozen


def _behind_torchs_back(h: torch.Tensor, bend) -> torch.Tensor:
    """Its first unit changed where no operation is seen: what only the proof can find."""
    values = h.detach().numpy()
    values[:, :1] = bend(values[:, :1])
    return h


@pytest.mark.parametrize("bend", [lambda h: h.clip(0), lambda h: h.clip(max=6), lambda h: h.clip(0, 6)])
def test_units_that_are_alike_only_where_all_are_alive(bend) -> None:
    net = _Wired(lambda m, x: m.b(_behind_torchs_back(m.a(x), bend)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    frozen = _frozen(net, 3)
    assert "change places" in frozen["a"] or "trial split" in frozen["a"]


def test_a_layer_that_is_summed_with_a_frozen_one_is_named_too() -> None:
    net = _Wired(
        lambda m, x: m.c((m.a(x) + m.b(x)).sort(1).values), a=nn.Linear(3, 4), b=nn.Linear(3, 4), c=nn.Linear(4, 2)
    )
    frozen = _frozen(net, 3)
    assert "sort" in frozen["a"] and frozen["b"] == frozen["a"]


def test_a_layer_that_is_summed_with_one_that_failed_its_trial_is_named_too() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.c(_behind_torchs_back(net.a(x) + net.b(x), lambda h: h.clip(0)))

    frozen = _frozen(_Wired(forward, a=nn.Linear(3, 4), b=nn.Linear(3, 4), c=nn.Linear(4, 2)), 3)
    assert "change" in frozen["a"] and frozen["b"] == frozen["a"]


def test_units_may_be_one_with_others_that_come_later() -> None:
    """Where products of activations ask for another run, units begin as one with some that only a later call makes."""
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "norm": nn.InstanceNorm1d(3, affine=True)}
    net = _Wired(lambda m, x: m.b(attend(torch.relu(m.a(x)))), **layers, gain=nn.Linear(3, 3), out=nn.Linear(9, 1))

    def attend(h: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(h, h, h)

    def second() -> torch.Tensor:
        h = net.norm(torch.relu(x * net.gain.bias[:, None]))
        return net.out((h * torch.sigmoid(net.gain(h.mean(-1)))[:, :, None]).flatten(1))

    net, x = net.double(), torch.randn(4, 3, 3).double()
    assert "bmm" in recycle.trace(net, lambda: net(x), second).frozen["a"]


def test_a_network_without_any_unit_says_why() -> None:
    assert "as a whole" in _frozen(nn.Sequential(nn.Linear(1, 1)), 1)["0"]


def test_a_call_that_changes_a_buffer_can_be_repeated() -> None:
    """Spectral norm iterates at every call, so that two calls differ: no reason to refuse what comes behind it."""
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    net, x = nn.Sequential(first, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double(), torch.randn(5, 3).double()
    before = [b.clone() for b in net.buffers()]
    assert [group.name for group in recycle.trace(net, lambda: net(x))] == ["1"]
    assert all(map(torch.equal, before, net.buffers()))


def test_values_of_different_heads_are_different_even_where_all_heads_weigh_alike() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        weights = (q @ k.transpose(-1, -2) / 1e6).softmax(-1)  # so even that no trial tells the heads apart
        return net.out((weights @ v).transpose(1, 2).flatten(2))

    net = _Wired(forward, q=nn.Linear(5, 6), k=nn.Linear(5, 6), v=nn.Linear(5, 6), out=nn.Linear(6, 2))
    x = torch.randn(2, 4, 5)
    values = recycle.trace(net, lambda: net(x), heads=False)
    assert [(group.name, group.width) for group in values] == [("v[0:3]", 3), ("v[3:6]", 3)]
    assert [(group.name, group.width) for group in recycle.trace(net, lambda: net(x))] == [("q", 2)]
