"""What a second reading of the code found: each of these was wrong once."""

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
