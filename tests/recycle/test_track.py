"""What the tracker says it saw, against numpy and autograd on the very same numbers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import recycle
from recycle.stats import Window
from recycle.targets import peak
from recycle.track import Tracker


class Wire(nn.Module):
    """A network whose forward pass is a plain function of its named parts."""

    def __init__(self, wiring: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.wiring = wiring

    def forward(self, *inputs: Tensor) -> Any:
        return self.wiring(self, *inputs)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def mlp() -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))


def hand_set(*rows: float) -> nn.Module:
    """One input, one unit for each of ``rows`` (its weight; no bias shift), one output that sums them."""
    net = nn.Sequential(nn.Linear(1, len(rows)), nn.ReLU(), nn.Linear(len(rows), 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(rows).double()[:, None])
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
        net[2].bias.zero_()
    return net


def agrees(stats: Any, seen: np.ndarray) -> None:
    """``seen``: every value of each unit, ``(values, width)``."""
    assert stats.samples == len(seen)
    for name, expected in {
        "firing_rate": (seen != 0).mean(0),
        "mean": seen.mean(0),
        "mean_abs": np.abs(seen).mean(0),
        "variance": seen.var(0),
    }.items():
        np.testing.assert_allclose(getattr(stats, name).numpy(), expected, rtol=1e-12, atol=1e-14, err_msg=name)
    np.testing.assert_array_equal(stats.minimum.numpy(), seen.min(0))
    np.testing.assert_array_equal(stats.maximum.numpy(), seen.max(0))


BATCHES = [rand(n, 3, seed=n) for n in (4, 1, 7, 1, 2)]


# ---------------------------------------------------------------- activations


def test_one_screen_of_numbers_by_hand() -> None:
    net = hand_set(1.0, -1.0, 0.0)
    graph = recycle.trace(net, lambda: net(torch.ones(2, 1).double()))
    tracker = Tracker(graph, sample_every=1)
    with tracker:
        net(torch.tensor([[1.0], [3.0], [-2.0], [0.0]]).double())
    stats = tracker.stats(graph["0"])
    assert stats.samples == 4
    assert stats.firing_rate.tolist() == [0.5, 0.25, 0.0]
    assert stats.mean.tolist() == [1.0, 0.5, 0.0]
    assert stats.minimum.tolist() == [0, 0, 0]
    assert stats.maximum.tolist() == [3, 2, 0]
    assert stats.variance.tolist() == pytest.approx([1.5, 0.75, 0.0])
    assert stats.dead.tolist() == [False, False, True]
    assert stats.score.tolist() == pytest.approx([2.0, 1.0, 0.0])
    assert stats.utility.tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert stats.incoming_norm.tolist() == [1, 1, 0]
    assert stats.outgoing_norm.tolist() == [1, 1, 1]


def test_linear_over_several_batch_sizes() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        for x in BATCHES:
            net(x)
    agrees(tracker.stats(graph["0"]), torch.cat([net[1](net[0](x)) for x in BATCHES]).detach().numpy())


@pytest.mark.parametrize("sizes", [(8,), (1, 2), tuple(range(1, 41))], ids=str)
def test_a_buffer_that_is_filled_again_and_again_by_passes_of_other_sizes(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recycle.stats._BUFFER", 300)
    monkeypatch.setattr("recycle.stats._PLACES", 5)
    net = mlp()
    batches = [rand(sizes[n % len(sizes)], 3, seed=n) for n in range(120)]
    graph = recycle.trace(net, lambda: net(batches[0]))
    with Tracker(graph, sample_every=1) as tracker:
        for x in batches:
            net(x)
    agrees(tracker.stats(graph["0"]), torch.cat([net[1](net[0](x)) for x in batches]).detach().numpy())


def test_a_window_that_was_pickled_and_cleared_sees_what_is_new() -> None:
    window = Window()
    for seed in range(3):
        window.add(rand(4, 3, seed=seed))
    window.clear()
    for other in (copy.deepcopy(window), pickle.loads(pickle.dumps(window))):
        for value in (5.0, 6.0, 7.0):
            other.add(torch.full((4, 3), value).double())
        assert other.read()["mean"].tolist() == [6.0, 6.0, 6.0]


def test_time_axis_counts_as_samples() -> None:
    net = mlp()
    x = rand(4, 6, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    agrees(tracker.stats(graph["0"]), net[1](net[0](x)).detach().reshape(-1, 5).numpy())


@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_over_batch_and_space(dims: int) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    net = built(lambda: nn.Sequential(conv(2, 3, 3), nn.ReLU(), conv(3, 2, 2), nn.Flatten()))
    batches = [rand(n, 2, *[6] * dims, seed=n) for n in (3, 1, 5)]
    graph = recycle.trace(net, lambda: net(batches[0]))
    with Tracker(graph, sample_every=1) as tracker:
        for x in batches:
            net(x)
    seen = [net[1](net[0](x)).detach().movedim(1, -1).reshape(-1, 3) for x in batches]
    agrees(tracker.stats(graph["0"]), torch.cat(seen).numpy())


def test_an_image_without_a_batch_axis() -> None:
    net = built(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2)))
    x = rand(2, 6, 6)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    agrees(tracker.stats(graph["0"]), net[1](net[0](x)).detach().movedim(0, -1).reshape(-1, 3).numpy())


def test_flatten_boundary_sums_up_each_channel() -> None:
    net = built(lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    batches = [rand(n, 1, 3, 3, seed=n) for n in (2, 1, 4)]
    graph = recycle.trace(net, lambda: net(batches[0]))
    assert graph["0"].outgoing[0].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with Tracker(graph, sample_every=1) as tracker:
        for x in batches:
            net(x)
    seen = [net[1](net[0](x)).detach().reshape(len(x), 3, 4).movedim(1, 2).reshape(-1, 3) for x in batches]
    agrees(tracker.stats(graph["0"]), torch.cat(seen).numpy())


def test_channels_last_flatten_is_seen_with_stride() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.conv(x)).permute(0, 2, 3, 1).flatten(1))  # position-major columns

    net = built(lambda: Wire(forward, conv=nn.Conv2d(1, 3, 2), out=nn.Linear(12, 2)))
    x = rand(4, 1, 3, 3)
    graph = recycle.trace(net, lambda: net(x))
    assert graph["conv"].outgoing[0].index.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    agrees(tracker.stats(graph["conv"]), F.relu(net.conv(x)).detach().movedim(1, -1).reshape(-1, 3).numpy())


def test_functional_and_shared_activations_are_seen_after_the_nonlinearity() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.act(m.fc2(F.relu(m.fc1(x)) + 0)))

    net = built(lambda: Wire(forward, fc1=nn.Linear(3, 4), fc2=nn.Linear(4, 5), out=nn.Linear(5, 2), act=nn.ReLU()))
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        for x in BATCHES:
            net(x)
    one = [F.relu(net.fc1(x)).detach() for x in BATCHES]
    two = [F.relu(net.fc2(h)).detach() for h in one]
    agrees(tracker.stats(graph["fc1"]), torch.cat(one).numpy())
    agrees(tracker.stats(graph["fc2"]), torch.cat(two).numpy())


def test_part_of_a_concatenation_is_seen_as_that_part() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.cat([F.relu(m.one(x)), F.relu(m.two(x))], 1))

    net = built(lambda: Wire(forward, one=nn.Linear(3, 4), two=nn.Linear(3, 2), out=nn.Linear(6, 2)))
    x = rand(6, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    agrees(tracker.stats(graph["one"]), F.relu(net.one(x)).detach().numpy())
    agrees(tracker.stats(graph["two"]), F.relu(net.two(x)).detach().numpy())


def test_a_unit_is_as_alive_as_its_liveliest_consumer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.one(F.relu(h)) + m.two(F.relu(-h))  # two values of each unit: on for x > 0, on for x < 0

    net = built(lambda: Wire(forward, fc=nn.Linear(1, 2), one=nn.Linear(2, 1), two=nn.Linear(2, 1)))
    with torch.no_grad():
        net.fc.weight.copy_(torch.tensor([[1.0], [0.0]]))
        net.fc.bias.zero_()
    graph = recycle.trace(net, lambda: net(rand(5, 1)))
    with Tracker(graph, sample_every=1) as tracker:
        net(torch.tensor([[-1.0], [-3.0]]).double())  # the first consumer sees zero of both units
    stats = tracker.stats(graph["fc"])
    assert stats.dead.tolist() == [False, True]
    assert stats.firing_rate.tolist() == [1.0, 0.0]
    assert stats.mean_abs.tolist() == [2.0, 0.0]
    assert (stats.minimum.tolist(), stats.maximum.tolist()) == ([0, 0], [3, 0])


def test_two_consumers_of_one_value_count_it_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.one(h) + m.two(h)

    net = built(lambda: Wire(forward, fc=nn.Linear(3, 4), one=nn.Linear(4, 1), two=nn.Linear(4, 1)))
    x = rand(6, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    agrees(tracker.stats(graph["fc"]), F.relu(net.fc(x)).detach().numpy())


def test_two_consumers_of_different_time_steps_are_both_seen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))  # (batch, 2 steps, units): both consumers read views of one tensor
        return m.early(h[:, 0]) + m.late(h[:, 1])

    net = built(lambda: Wire(forward, fc=nn.Linear(1, 2), early=nn.Linear(2, 1), late=nn.Linear(2, 1)))
    with torch.no_grad():
        net.fc.weight.fill_(1.0)
        net.fc.bias.zero_()
    graph = recycle.trace(net, lambda: net(rand(3, 2, 1)))
    with Tracker(graph, sample_every=1) as tracker:
        net(torch.tensor([[[-1.0], [1.0]], [[-2.0], [2.0]]]).double())  # silent early, firing late
    assert tracker.stats(graph["fc"]).dead.tolist() == [False, False]


def test_a_layer_called_twice_in_a_pass_is_seen_both_times() -> None:
    net = built(lambda: Wire(lambda m, a, b: m.out(F.relu(m.fc(a))) - m.out(F.relu(m.fc(b))), fc=nn.Linear(1, 2),
                             out=nn.Linear(2, 1)))  # fmt: skip
    with torch.no_grad():
        net.fc.weight.fill_(1.0)
        net.fc.bias.zero_()
    off, on = -torch.ones(2, 1).double(), torch.tensor([[1.0], [2.0]]).double()
    graph = recycle.trace(net, lambda: net(off, on))
    with Tracker(graph, sample_every=2) as tracker:
        for _ in range(8):
            net(off, on)
    assert tracker.stats(graph["fc"]).dead.tolist() == [False, False]


def test_half_precision_activations_are_counted_exactly() -> None:
    net = hand_set(1.0, 1.0).bfloat16()
    x = torch.ones(300, 1, dtype=torch.bfloat16)
    x[0] = -1
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    assert tracker.stats(graph["0"]).firing_rate.tolist() == pytest.approx([299 / 300] * 2, abs=1e-12)
    assert tracker.stats(graph["0"]).mean.tolist() == pytest.approx([299 / 300] * 2, abs=1e-12)


def test_float16_sums_do_not_overflow() -> None:
    net = hand_set(1.0, 1.0).half()
    x = torch.full((300, 1), 1000.0, dtype=torch.half)
    graph = recycle.trace(net, lambda: net(x[:2] / 1000))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    assert tracker.stats(graph["0"]).finite
    assert tracker.stats(graph["0"]).mean.tolist() == [1000.0, 1000.0]


# ---------------------------------------------------------------- gradients


def test_gradient_is_that_of_the_pre_activation() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias[3] = -1e3  # dead: its output's gradient is not zero, its pre-activation's is
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    x = rand(6, 3)
    with Tracker(graph, sample_every=1) as tracker:
        net(x).square().mean().backward()
    z = net[0](x)
    (expected,) = torch.autograd.grad(net[2](F.relu(z)).square().mean(), z)
    torch.testing.assert_close(tracker.stats(graph["0"]).gradient, expected.abs().mean(0), rtol=1e-12, atol=0)
    assert tracker.stats(graph["0"]).gradient[3] == 0


def test_gradient_of_a_convolution_is_averaged_over_space() -> None:
    net = built(lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    x = rand(5, 1, 3, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x).square().sum().backward()
    z = net[0](x)
    (expected,) = torch.autograd.grad(net[3](F.relu(z).flatten(1)).square().sum(), z)
    torch.testing.assert_close(tracker.stats(graph["0"]).gradient, expected.abs().mean((0, 2, 3)), rtol=1e-12, atol=0)


def test_gradient_through_an_inplace_relu() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)))
    x = rand(6, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x).square().mean().backward()
    z = net[0](x)
    (expected,) = torch.autograd.grad(net[2](F.relu(z)).square().mean(), z)
    torch.testing.assert_close(tracker.stats(graph["0"]).gradient, expected.abs().mean(0), rtol=1e-12, atol=0)


def test_gradient_is_the_mean_over_passes() -> None:
    net = hand_set(1.0, -1.0)
    graph = recycle.trace(net, lambda: net(torch.ones(2, 1).double()))
    with Tracker(graph, sample_every=1) as tracker:
        (net(torch.tensor([[1.0], [-1.0]]).double()) * 4).sum().backward()  # |dL/dz| is 4 where the unit is on
        net(torch.tensor([[1.0], [1.0], [1.0]]).double()).sum().backward()
    assert tracker.stats(graph["0"]).gradient.tolist() == [(2 + 1) / 2, (2 + 0) / 2]  # whatever their sizes


def test_gradient_of_summed_branches_is_not_that_of_one_dead_branch() -> None:
    net = built(lambda: Wire(lambda m, x: m.out(F.relu(m.a(x)) + m.b(x)), a=nn.Linear(3, 2), b=nn.Linear(3, 2),
                             out=nn.Linear(2, 1)))  # fmt: skip
    with torch.no_grad():
        net.a.bias.fill_(-1e3)  # branch a is dead, branch b learns
    x = rand(4, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x).square().sum().backward()
    assert not (tracker.stats(graph["a"]).gradient == 0).any()  # its own, or NaN: not observed


def test_weight_gradient_is_that_of_the_rows_at_the_step() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    seen = []
    with Tracker(graph, optimizers=[optimizer], sample_every=1) as tracker:
        for x in (rand(6, 3, seed=1), rand(6, 3, seed=2)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            seen.append(net[0].weight.grad.abs().mean(1))
            optimizer.step()
    torch.testing.assert_close(tracker.stats(graph["0"]).weight_gradient, sum(seen) / 2, rtol=1e-12, atol=0)


def test_what_was_not_observed_is_nan_and_not_zero() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        net(BATCHES[0])  # no backward, no optimizer
    stats = tracker.stats(graph["0"])
    assert stats.gradient.isnan().all() and stats.weight_gradient.isnan().all()
    assert Tracker(graph).stats(graph["0"]).mean.isnan().all()
    assert not Tracker(graph).stats(graph["0"]).dead.any()


def test_an_overflowed_backward_is_not_counted() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    x = rand(6, 3)
    with Tracker(graph, sample_every=1) as tracker:
        (net(x).square().mean() * float("inf")).backward()
        net(x).square().mean().backward()
    z = net[0](x)
    (expected,) = torch.autograd.grad(net[2](F.relu(z)).square().mean(), z)
    torch.testing.assert_close(tracker.stats(graph["0"]).gradient, expected.abs().mean(0), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- which passes count


def test_every_third_training_pass_is_sampled_beginning_with_the_first() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    passes = [rand(2, 3, seed=s) for s in range(8)]
    with Tracker(graph, sample_every=3) as tracker:
        for x in passes:
            net(x)
    seen = [net[1](net[0](passes[i])).detach() for i in (0, 3, 6)]
    agrees(tracker.stats(graph["0"]), torch.cat(seen).numpy())
    assert tracker.passes == 8


def test_passes_through_another_entry_point_are_counted_on_behind_a_load_and_a_resize() -> None:
    """Without optimizers and calls of the module itself, calls of its layers alone tell updates."""
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))

    def passes(tracker: Tracker, count: int) -> tuple[int, int]:
        before = tracker.samples
        for _ in range(count):
            net[2](net[1](net[0](BATCHES[0])))
        return tracker.passes, (tracker.samples - before) // len(BATCHES[0])

    with Tracker(graph, sample_every=2) as tracker:
        assert passes(tracker, 5) == (5, 3)
    with Tracker(graph, sample_every=2) as other:
        other.load_state_dict(tracker.state_dict())
        assert passes(other, 3) == (8, 1)
        recycle.apply(recycle.Grow(1), graph["0"])
        other.resized(graph["0"], [*range(graph["0"].width - 1), -1])
        assert passes(other, 3) == (11, 2)


def test_passes_without_gradients_or_in_evaluation_mode_do_not_count() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        with torch.no_grad():
            net(BATCHES[0])
        with torch.inference_mode():
            net(BATCHES[0])
        net.eval()
        net(BATCHES[0])
    assert (tracker.stats(graph["0"]).samples, tracker.passes) == (0, 0)
    net.train()
    with Tracker(graph, sample_every=1, training_only=False) as tracker, torch.no_grad():
        net(BATCHES[0])
    assert tracker.stats(graph["0"]).samples == len(BATCHES[0])


@pytest.mark.parametrize("bad", [0, -1])
def test_sampling_every_zeroth_pass_is_refused(bad: int) -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with pytest.raises(ValueError, match=f"at least 1, got {bad}"):
        Tracker(graph, sample_every=bad)


def test_an_empty_batch_is_no_pass() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        net(torch.zeros(0, 3).double())
        net(BATCHES[0])
    agrees(tracker.stats(graph["0"]), net[1](net[0](BATCHES[0])).detach().numpy())


def test_one_sample_is_not_enough_to_call_a_unit_dead() -> None:
    net = hand_set(1.0, 0.0)
    graph = recycle.trace(net, lambda: net(torch.ones(2, 1).double()))
    with Tracker(graph, sample_every=1) as tracker:
        net(torch.ones(1, 1).double())
        assert not tracker.stats(graph["0"]).dead.any()
        net(2 * torch.ones(1, 1).double())
    assert tracker.stats(graph["0"]).dead.tolist() == [False, True]


def test_clear_begins_a_new_window_and_keeps_ages() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        for x in BATCHES[:3]:
            net(x)
        tracker.born["0"][1] = 2
        tracker.clear()
        assert tracker.stats(graph["0"]).samples == 0
        net(BATCHES[3])
    agrees(tracker.stats(graph["0"]), net[1](net[0](BATCHES[3])).detach().numpy())
    assert tracker.stats(graph["0"]).age.tolist() == [4, 2, 4, 4, 4]


# ---------------------------------------------------------------- hooks


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_hooks_never_wait_for_the_device() -> None:
    net = built(lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(),
                                      nn.Linear(4, 2)))  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
    x = rand(5, 1, 3, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, optimizers=[optimizer], sample_every=1), _Operations() as seen:
        for _ in range(600):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    waits = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
    assert "amax" in seen.names  # the hooks did run, and took moments
    assert not waits & set(seen.names)


def test_passes_that_are_not_sampled_cost_no_operation() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with _Operations() as plain:
        net(BATCHES[0])
    with Tracker(graph, sample_every=8):
        net(BATCHES[0])
        with _Operations() as watched:
            net(BATCHES[0])
    assert watched.names == plain.names


def test_attaching_twice_hooks_once_and_detaching_leaves_none() -> None:
    def hooks() -> tuple[int, int]:
        layers = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
        return layers, len(optimizer._optimizer_step_pre_hooks)

    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    tracker = Tracker(graph, optimizers=[optimizer], sample_every=1)
    assert hooks() == (0, 0)
    tracker.attach()
    tracker.attach()
    with tracker.listening():
        assert hooks() == (2, 1)
    assert hooks() == (2, 1)  # those that were there before the block stay
    tracker.detach()
    assert (hooks(), tracker.attached) == ((0, 0), False)
    with tracker.listening():
        assert hooks() == (2, 1)
    assert hooks() == (0, 1)  # optimizer.step() may stand outside the block
    tracker.detach()
    assert hooks() == (0, 0)


def test_a_consumer_that_is_called_by_keyword_is_seen() -> None:
    net = built(lambda: Wire(lambda m, x: m.out(input=F.relu(m.fc(x))), fc=nn.Linear(3, 4), out=nn.Linear(4, 2)))
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        net(BATCHES[0])
    agrees(tracker.stats(graph["fc"]), F.relu(net.fc(BATCHES[0])).detach().numpy())


def test_groups_whose_consumers_no_hook_sees_are_named() -> None:
    bare = built(lambda: Wire(lambda m, x: F.relu(m.fc(x)) @ m.w, fc=nn.Linear(3, 4),
                              w=nn.Parameter(torch.randn(4, 2))))  # fmt: skip
    graph = recycle.trace(bare, lambda: bare(BATCHES[0]))
    with Tracker(graph, sample_every=1) as tracker:
        bare(BATCHES[0]).sum().backward()
    assert list(tracker.unobserved) == ["fc"]
    assert tracker.stats(graph["fc"]).samples == 0


# ---------------------------------------------------------------- state


def test_state_round_trip_goes_on_bit_for_bit() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    graph = recycle.trace(net, lambda: net(BATCHES[0]))

    def train(tracker: Tracker, batches: list[Tensor]) -> None:
        with tracker:
            for x in batches:
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()

    start = {k: v.clone() for k, v in net.state_dict().items()}
    whole = Tracker(graph, optimizers=[optimizer], sample_every=2)
    train(whole, BATCHES)
    net.load_state_dict(start)
    first = Tracker(graph, optimizers=[optimizer], sample_every=2)
    train(first, BATCHES[:3])
    saved = first.state_dict()
    train(first, BATCHES[3:])  # what goes on after saving must not reach the saved copy
    net.load_state_dict(start)
    again = Tracker(graph, optimizers=[optimizer], sample_every=2)
    train(Tracker(graph), BATCHES[:3])
    again.load_state_dict(saved)
    train(again, BATCHES[3:])
    one, other = whole.stats(graph["0"]), again.stats(graph["0"])
    for name in ("firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum", "gradient", "weight_gradient"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.samples, one.age.tolist()) == (other.samples, other.age.tolist())
    assert torch.equal(whole.latest(graph["0"]), again.latest(graph["0"]))


def test_state_of_another_network_is_refused() -> None:
    net, other = mlp(), built(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))
    saved = Tracker(recycle.trace(other, lambda: other(BATCHES[0]))).state_dict()
    with pytest.raises(ValueError, match=r"saved for the groups \{'0': 6\}, this graph has \{'0': 5\}"):
        Tracker(recycle.trace(net, lambda: net(BATCHES[0]))).load_state_dict(saved)


def test_latest_is_the_last_sampled_pass() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    tracker = Tracker(graph, sample_every=2)
    assert tracker.latest(graph["0"]) is None
    with tracker:
        for x in BATCHES[:4]:
            net(x)
    assert torch.equal(tracker.latest(graph["0"]), net[1](net[0](BATCHES[2])).detach())


# ---------------------------------------------------------------- another network on one batch


def test_peak_is_the_largest_output_in_the_other_network_and_leaves_its_flags() -> None:
    net, target = mlp(), mlp()
    with torch.no_grad():
        target[0].weight.mul_(-1)
        target[0].bias.mul_(-1)
        target[0].bias[2] = -1e3
    graph = recycle.trace(net, lambda: net(BATCHES[0]))
    target[1].eval()  # one part in another mode than the rest
    x = rand(6, 3)
    highest = peak(graph["0"], target, ((x,), {}))
    assert torch.equal(highest, F.relu(target[0](x)).detach().amax(0))
    assert highest[2] == 0
    assert [m.training for m in target.modules()] == [True, True, False, True]
    assert not any(m._forward_pre_hooks for m in target.modules())


# -- where a unit is seen ----------------------------------------------------------------------------------


NORMED = {
    "activation, then norm": lambda: (nn.Linear(3, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 2)),
    "norm, then activation": lambda: (nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)),
    "two groups of channels": lambda: (nn.Conv2d(3, 6, 1), nn.ReLU(), nn.GroupNorm(2, 6), nn.Flatten(),
                                       nn.Linear(6, 2)),
}  # fmt: skip


@pytest.mark.parametrize("order", NORMED)
def test_a_dead_unit_is_seen_before_and_behind_a_normalisation(order: str) -> None:
    net = built(lambda: nn.Sequential(*NORMED[order]()))
    with torch.no_grad():
        (net[1] if order.startswith("norm") else net[0]).bias[[1, 4]] = -100.0
    x = rand(64, 3, 1, 1) if "channels" in order else rand(64, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    assert not graph["0"].exact
    assert tracker.stats(graph["0"]).dead.nonzero()[:, 0].tolist() == [1, 4]


def test_layers_carry_hooks_once_for_each_sampled_update(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    x = rand(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    tracker = Tracker(recycle.trace(net, lambda: net(x)), optimizers=[optimizer], sample_every=4)
    attached: list[int] = []
    attach = Tracker._attach_to_layers
    monkeypatch.setattr(Tracker, "_attach_to_layers", lambda self: (attached.append(self.passes), attach(self)))
    tracker.attach()
    for _ in range(16):  # one update between a rollout and the next, as DQN does it
        tracker.pause()
        tracker.resume()
        net(x).sum().backward()
        optimizer.step()
    assert attached == [0, 0, 4, 8, 12]  # the first before anything was known
    assert tracker.stats(tracker.graph["0"]).samples == 4 * len(x)


@pytest.mark.parametrize("updates", [1, 3, 8])
def test_every_sampled_update_is_seen_however_many_a_phase_has(updates: int) -> None:
    net = mlp()
    x = rand(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    tracker = Tracker(recycle.trace(net, lambda: net(x)), optimizers=[optimizer], sample_every=2)
    tracker.attach()
    for _ in range(3):  # rollouts before training begins
        tracker.pause()
        tracker.resume()
    for _ in range(24 // updates):
        tracker.pause()
        tracker.resume()
        for _ in range(updates):
            net(x).sum().backward()
            optimizer.step()
    assert tracker.stats(tracker.graph["0"]).samples == 12 * len(x)


def test_a_constant_behind_batch_norm_is_folded_when_both_modes_agree_on_it() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)))
    with torch.no_grad():
        net[2].running_mean.copy_(rand(6, seed=1).abs())
        net[0].bias[2] = -100.0
    x = rand(12, 3)
    graph = recycle.trace(net, lambda: net(x))
    method = recycle.find("split")(noise=0.0)
    made = {}
    for passes in (3, 400):
        with Tracker(graph, sample_every=1) as tracker:
            for _ in range(passes):
                net(x)
        stats = tracker.stats(graph["0"])
        assert stats.settled is not None
        assert bool(stats.settled[2]) is (passes == 400)
        stats = dataclasses.replace(stats, maximum=stats.maximum.index_fill(0, torch.tensor(2), 0.5),
                                    minimum=stats.minimum.index_fill(0, torch.tensor(2), 0.5))  # fmt: skip
        made[passes] = [type(edit).__name__ for edit in method(graph["0"], stats)]
    assert made == {3: [], 400: ["Fold", "Split"]}


RECURRENT = {
    "lstm": lambda: nn.LSTM(3, 6, batch_first=True),
    "gru": lambda: nn.GRU(3, 6),
    "both ways": lambda: nn.GRU(3, 6, bidirectional=True),
    "last of two layers": lambda: nn.RNN(3, 6, 2, nonlinearity="relu"),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_units_of_the_last_recurrent_layer_are_seen_in_its_output(kind: str) -> None:
    layer = built(RECURRENT[kind])
    net = nn.ModuleDict({"r": layer, "head": built(lambda: nn.Linear(6 * (1 + layer.bidirectional), 2))})
    x = rand(4, 5, 3)
    graph = recycle.trace(net, lambda: net["head"](net["r"](x)[0]))
    with Tracker(graph, sample_every=1) as tracker:
        net["head"](net["r"](x)[0])
    seen = layer(x)[0].detach().reshape(20, -1).numpy()
    last = f"_l{layer.num_layers - 1}"
    for group in graph:
        if kind == "last of two layers" and not any(last in axis.name for axis in group.incoming):
            assert "no hook sees" in tracker.unobserved[group.name]
            continue
        backwards = any("reverse" in axis.name for axis in group.incoming)
        agrees(tracker.stats(group), seen[:, 6:] if backwards else seen[:, :6])


def test_units_of_a_cell_in_a_loop_are_seen() -> None:
    def loop(m: Any, x: Tensor) -> Tensor:
        h = c = torch.zeros(4, 5, dtype=torch.double)
        for step in x:
            h, c = m.cell(step, (h, c))
        return m.head(h)

    net = Wire(loop, cell=built(lambda: nn.LSTMCell(3, 5)), head=built(lambda: nn.Linear(5, 2)))
    x = rand(7, 4, 3)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    assert tracker.stats(graph["cell"]).samples == 4  # the head reads the last step only
    assert sum(w.count for w in tracker._seen["cell"].windows) == 4 + 7 * 4


def test_a_packed_sequence_is_seen_too() -> None:
    net = Wire(lambda m, x: m.head(m.r(nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2]))[0].data),
               r=built(lambda: nn.GRU(2, 4)), head=built(lambda: nn.Linear(4, 2)))  # fmt: skip
    x = rand(5, 3, 2)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x)
    assert tracker.stats(graph["r"]).samples == 10


class BeforeRecurrence(nn.Module):
    """A ReLU layer that a recurrent layer, or a cell in a loop, reads."""

    def __init__(self, kind, **options):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.memory = kind(6, 5, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 2)

    def forward(self, steps, lengths=None):
        hidden = torch.relu(self.first(steps))
        if isinstance(self.memory, nn.RNNCellBase):
            state = None
            for step in hidden:
                state = self.memory(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)
        if lengths is not None:
            hidden = nn.utils.rnn.pack_padded_sequence(hidden, lengths)
        read, _ = self.memory(hidden)
        return self.head(read.data if lengths is not None else read)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {}), (nn.LSTM, {"bidirectional": True}), (nn.LSTM, {"num_layers": 2}), (nn.GRU, {}), (nn.RNN, {}),
     (nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {})],
)  # fmt: skip
def test_what_a_recurrent_layer_reads_is_watched(kind, options):
    net, steps = BeforeRecurrence(kind, **options), torch.randn(4, 7, 3)
    with torch.no_grad():
        net.first.bias[2] = -1e3
    graph = recycle.trace(net, lambda: net(steps))
    with Tracker(graph, sample_every=1) as tracker:
        net(steps).sum().backward()
    stats, wanted = tracker.stats(graph["first"]), torch.relu(net.first(steps)).flatten(0, 1).double()
    assert "first" not in tracker.unobserved and stats.samples == 28 and stats.dead[2]
    assert torch.allclose(stats.mean, wanted.mean(0), atol=1e-6)


def test_packed_sequences_are_watched_without_their_padding():
    net, steps, lengths = BeforeRecurrence(nn.LSTM), torch.randn(4, 2, 3), torch.tensor([4, 1])
    graph = recycle.trace(net, lambda: net(steps))
    with Tracker(graph, sample_every=1) as tracker:
        net(steps, lengths).sum().backward()
    stats, read = tracker.stats(graph["first"]), torch.relu(net.first(steps)).double()
    assert stats.samples == 5
    assert torch.allclose(stats.mean, torch.cat([read[:, 0], read[:1, 1]]).mean(0), atol=1e-6)


def test_a_recurrent_layer_with_a_forward_of_its_own_hides_what_it_reads():
    class Mine(nn.LSTM):
        def forward(self, steps, state=None):
            return super().forward(steps * 2, state)

    net, steps = BeforeRecurrence(Mine), torch.randn(4, 7, 3)
    graph = recycle.trace(net, lambda: net(steps))
    assert "no hook sees what it reads" in Tracker(graph).unobserved["first"]


def test_a_tracker_stops_when_another_hand_resizes_the_module():
    net, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 3)
    graph, other = recycle.trace(net, lambda: net(x)), recycle.trace(net, lambda: net(x))
    with Tracker(graph, sample_every=1) as tracker:
        net(x).sum().backward()
        assert tracker.samples == 5
        recycle.apply(recycle.Prune([5, 1]), other["0"])
        with pytest.warns(UserWarning, match=r"'0' was resized by .* \(6x3, 6 became 4x3, 4\); trace again"):
            net(x).sum().backward()
        net(x).sum().backward()
        assert not tracker.attached and tracker.samples == 0
        assert not (net[0]._forward_hooks or net[2]._forward_pre_hooks)
    stats = tracker.stats(graph["0"])
    assert stats.samples == 0 and stats.incoming_norm.isnan().all()
    tracker.attach()
    assert not tracker.attached


# ---------------------------------------------------------------- what layers read


def test_inputs_are_kept_only_where_a_method_needs_them() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = recycle.trace(net, lambda: net(torch.randn(5, 3)))
    x = torch.randn(5, 3)
    for asked in (False, True):
        tracker = Tracker(graph, inputs=asked)
        with tracker:
            hooks = [len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in net]
            net(x).sum().backward()
        assert hooks == [1 + asked, 0, 1]
        found = tracker.stats(graph["0"]).inputs
        assert (found is None) is not asked
    assert list(found) == ["0.weight"] and torch.equal(found["0.weight"], x)
    tracker.clear()
    assert tracker.stats(graph["0"]).inputs == {}


def test_inputs_are_those_of_the_latest_training_pass_and_outlive_what_is_done_to_them() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = recycle.trace(net, lambda: net(torch.randn(5, 3)))
    x = torch.arange(6.0).reshape(2, 3)
    with Tracker(graph, inputs=True, sample_every=1) as tracker:
        net(torch.ones(2, 3))
        net(x)
        with torch.no_grad():
            net(torch.zeros(2, 3))
    x.zero_()
    assert tracker.stats(graph["0"]).inputs["0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    other = Tracker(graph, inputs=True)
    other.load_state_dict(tracker.state_dict())
    assert other.stats(graph["0"]).inputs["0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "spatial", "kept"),
    [
        ((1000, 4), 0, (250, 4)),  # every 4th of a thousand
        ((7, 11, 4), 0, (77, 4)),
        ((4,), 0, (1, 4)),
        ((100, 4, 84, 84), 2, (25, 4, 84, 84)),  # 32 images at most
        ((4, 84, 84), 2, (1, 4, 84, 84)),
        ((40, 2, 5, 3), 2, (20, 2, 5, 3)),
        ((100, 9, 4), 0, (225, 4)),  # 25 sequences
        ((257, 5000), 0, (29, 5000)),  # as many as images, of very long vectors
    ],
)
def test_a_bounded_part_of_the_inputs_is_kept(shape: tuple[int, ...], spatial: int, kept: tuple[int, ...]) -> None:
    layer = nn.Conv2d(shape[-3], 2, 1) if spatial else nn.Linear(shape[-1], 2)
    net = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(2, 2, 1) if spatial else nn.Linear(2, 2))
    graph = recycle.trace(net, lambda: net(torch.zeros(3, *shape[-1 - spatial :])))
    with Tracker(graph, inputs=True) as tracker:
        net(torch.zeros(shape))
    assert tracker.stats(graph["0"]).inputs["0.weight"].shape == kept


def test_inputs_of_convolutions_and_recurrent_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm, self.head = nn.Conv2d(2, 3, 3), nn.LSTM(12, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).relu().flatten(1)
            return self.head(self.lstm(y[:, None])[0])

    net = Net()
    x = torch.randn(5, 2, 4, 4)
    graph = recycle.trace(net, lambda: net(x))
    with Tracker(graph, inputs=True) as tracker:
        net(x)
    assert torch.equal(tracker.stats(graph["conv"]).inputs["conv.weight"], x)
    (recurrent,) = (g for g in graph if g.name.startswith("lstm"))
    found = tracker.stats(recurrent).inputs
    assert list(found) == ["lstm.weight_ih_l0"]
    assert torch.equal(found["lstm.weight_ih_l0"], net.conv(x).relu().flatten(1).detach())


def test_inputs_are_forgotten_at_a_resize() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = recycle.trace(net, lambda: net(torch.randn(5, 3)))
    with Tracker(graph, inputs=True) as tracker:
        net(torch.randn(5, 3))
    recycle.apply(recycle.Prune([1]), graph["0"])
    tracker.resized(graph["0"], [0, 2, 3])
    assert tracker.stats(graph["2"]).inputs == {}
