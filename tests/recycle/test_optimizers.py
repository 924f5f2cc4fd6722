"""The optimizer's state of single units: what is fresh, what is transformed, what no edit may touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import Tensor, nn

import recycle
from recycle import Fold, NotRecyclable, Reset, Split

DEAD, PARENT, SHARE = 3, 1, 0.25

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2),
    "adamw_amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2),
    "rmsprop_centred": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "rmsprop_tf_like": lambda ps: RMSpropTFLike(ps, lr=1e-2),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, initial_accumulator_value=0.5),
}
# state key -> (initial value, power of the gradient)
KEYS = {
    "adam": {"exp_avg": (0, 1), "exp_avg_sq": (0, 2)},
    "adamw_amsgrad": {"exp_avg": (0, 1), "exp_avg_sq": (0, 2), "max_exp_avg_sq": (0, 2)},
    "sgd_momentum": {"momentum_buffer": (0, 1)},
    "rmsprop": {"square_avg": (0, 2)},
    "rmsprop_centred": {"square_avg": (0, 2), "grad_avg": (0, 1), "momentum_buffer": (0, 0)},
    "rmsprop_tf_like": {"square_avg": (1, 2)},
    "adagrad": {"sum": (0.5, 2)},
}
kinds = pytest.mark.parametrize("kind", list(OPTIMIZERS))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def trained(kind: str, activation: Callable[[], nn.Module] = nn.ReLU) -> tuple[nn.Module, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 5), activation(), nn.Linear(5, 2)).double()
    optimizer = OPTIMIZERS[kind](net.parameters())
    x = rand(8, 2, seed=1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net, optimizer, recycle.trace(net, lambda: net(x))["0"]


def state(net: nn.Module, optimizer: Any) -> dict[tuple[str, str], Tensor]:
    names = {p: name for name, p in net.named_parameters()}
    return {
        (names[p], key): torch.as_tensor(value).clone()
        for p, held in optimizer.state.items()
        for key, value in held.items()
        if value is not None
    }


def unit(name: str, values: Tensor, number: int) -> Tensor:
    return values[:, number] if name == "2.weight" else values[number]


def rest(name: str, values: Tensor, *touched: int) -> Tensor:
    keep = [u for u in range(5) if u not in touched]
    return values[:, keep] if name == "2.weight" else values[keep]


@kinds
@pytest.mark.parametrize("edit", [Split([PARENT], into=[DEAD], share=SHARE), Reset([DEAD])], ids=["split", "reset"])
def test_fresh_state_is_the_optimizers_own_first_value_for_the_newborn_alone(kind: str, edit: Any) -> None:
    net, optimizer, group = trained(kind)
    before = state(net, optimizer)
    recycle.apply(edit, group, optimizers=[optimizer])
    after = state(net, optimizer)
    assert before.keys() == after.keys()
    assert {key for _, key in before if key != "step"} == set(KEYS[kind])
    for (name, key), values in after.items():
        if key == "step" or name == "2.bias":
            assert torch.equal(values, before[name, key]), (name, key)
            continue
        assert (unit(name, values, DEAD) == KEYS[kind][key][0]).all(), (name, key)
        assert torch.equal(rest(name, values, DEAD), rest(name, before[name, key], DEAD)), (name, key)


@kinds
@pytest.mark.parametrize("balanced", [False, True])
def test_transformed_state_by_hand(kind: str, balanced: bool) -> None:
    net, optimizer, group = trained(kind)
    before = state(net, optimizer)
    edit = Split([PARENT], into=[DEAD], share=SHARE, balanced=balanced, moments="transform")
    recycle.apply(edit, group, optimizers=[optimizer])
    for (name, key), values in state(net, optimizer).items():
        old = before[name, key]
        if key == "step" or name == "2.bias":
            assert torch.equal(values, old), (name, key)
            continue
        # the gradient of an incoming weight takes the share, that of an outgoing one none of it; the root of it both
        power = KEYS[kind][key][1] * (0.5 if balanced else float(name != "2.weight"))
        parent = unit(name, old, PARENT)
        torch.testing.assert_close(unit(name, values, DEAD), parent * SHARE**power, rtol=1e-14, atol=0)
        torch.testing.assert_close(unit(name, values, PARENT), parent * (1 - SHARE) ** power, rtol=1e-14, atol=0)
        assert torch.equal(rest(name, values, DEAD, PARENT), rest(name, old, DEAD, PARENT))


@kinds
def test_rescale_moves_the_parents_state_with_its_weights(kind: str) -> None:
    net, optimizer, group = trained(kind)
    before, row = state(net, optimizer), net[0].weight[PARENT].clone()
    recycle.apply(Split([PARENT], into=[DEAD], share=0.0, rescale=True), group, optimizers=[optimizer])
    factor = float((net[0].weight[PARENT].norm() / row.norm()).detach())
    assert factor != pytest.approx(1.0, abs=1e-3)
    for (name, key), values in state(net, optimizer).items():
        if key == "step" or name == "2.bias":
            continue
        power = KEYS[kind][key][1] * (1 if name == "2.weight" else -1)  # gradients scale against their weights
        expected = unit(name, before[name, key], PARENT) * factor**power
        torch.testing.assert_close(unit(name, values, PARENT), expected, rtol=1e-12, atol=0)


@kinds
def test_fold_leaves_the_state_of_the_consumers_bias(kind: str) -> None:
    net, optimizer, group = trained(kind)
    before = state(net, optimizer)
    recycle.apply(Fold([DEAD], [0.5]), group, optimizers=[optimizer])
    for (name, key), values in state(net, optimizer).items():
        if name == "2.weight" and key != "step":
            assert (values[:, DEAD] == KEYS[kind][key][0]).all()
            assert torch.equal(rest(name, values, DEAD), rest(name, before[name, key], DEAD))
        else:
            assert torch.equal(values, before[name, key])


@kinds
def test_an_optimizer_that_has_not_stepped_gets_no_state(kind: str) -> None:
    net, _, group = trained(kind)
    unused = OPTIMIZERS[kind](net.parameters())
    before = {k: len(v) for k, v in unused.state.items()}
    recycle.apply(Split([PARENT], into=[DEAD]), group, optimizers=[unused])
    assert {k: len(v) for k, v in unused.state.items()} == before


def test_an_optimizer_of_other_parameters_is_left_alone() -> None:
    _, _, group = trained("adam")
    other, foreign, _ = trained("adam")
    before = state(other, foreign)
    recycle.apply(Split([PARENT], into=[DEAD]), group, optimizers=[foreign])
    assert all(torch.equal(v, before[k]) for k, v in state(other, foreign).items())


def test_the_next_step_goes_where_a_fresh_optimizer_state_sends_it() -> None:
    """Plain momentum: the newborn's first step is the bare gradient, every other unit's has its momentum."""
    net, optimizer, group = trained("sgd_momentum")
    recycle.apply(Split([PARENT], into=[DEAD]), group, optimizers=[optimizer])
    row, buffer = net[0].weight.detach().clone(), optimizer.state[net[0].weight]["momentum_buffer"].clone()
    optimizer.zero_grad()
    net(rand(8, 2, seed=1)).square().mean().backward()
    gradient = net[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight[DEAD], row[DEAD] - 1e-2 * gradient[DEAD], rtol=1e-13, atol=0)
    torch.testing.assert_close(net[0].weight, row - 1e-2 * (0.9 * buffer + gradient), rtol=1e-13, atol=1e-16)


def test_a_parameter_held_twice_is_edited_once_in_each_optimizer() -> None:
    net, adam, group = trained("adam")
    sgd = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    net(rand(8, 2)).sum().backward()
    sgd.step()
    edit = Split([PARENT], into=[DEAD], share=SHARE, moments="transform")
    parent = adam.state[net[0].weight]["exp_avg_sq"][PARENT].clone()
    momentum = sgd.state[net[0].weight]["momentum_buffer"][PARENT].clone()
    recycle.apply(edit, group, optimizers=[adam, sgd])
    torch.testing.assert_close(adam.state[net[0].weight]["exp_avg_sq"][DEAD], parent * SHARE**2)
    torch.testing.assert_close(sgd.state[net[0].weight]["momentum_buffer"][DEAD], momentum * SHARE)


class _Odd(torch.optim.SGD):
    """Keeps one number for each row: no rule says what that is for one unit."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = torch.zeros(p.shape[0])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda ps: torch.optim.LBFGS(list(ps)), "LBFGS has no state of single units: it keeps one flat history"),
        (torch.optim.Adafactor, "Adafactor has no state of single units: it factorises its second moment"),
        (lambda ps: _Odd(ps, lr=0.1), r"_Odd keeps 'row' of shape \(5,\) for a parameter of shape \(5, 2\)"),
    ],
    ids=["lbfgs", "adafactor", "odd"],
)
def test_state_of_another_shape_is_refused_by_name(make: Any, reason: str) -> None:
    net, _, group = trained("adam")
    optimizer = make(net.parameters())
    net(rand(8, 2)).sum().backward()
    if not isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(NotRecyclable, match=reason):
        recycle.apply(Split([PARENT], into=[DEAD]), group, optimizers=[optimizer])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
