"""Births for growth: what they claim of the output, the published traps, and each closed form against brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Grow, NotRecyclable, Recycler, Reset, Split, metrics
from recycle.births import Born, firefly, gradmax, mirror, near_zero, paired, tiny, zero_out
from recycle.births.gradmax import strongest
from recycle.births.tiny import best_features, gain_of_present
from recycle.junction import Branch, Junction
from recycle.track import Tracker


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(define: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return define().double()


def mlp(act: type[nn.Module] = nn.ReLU, out: int = 3) -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, out)))


class Task:
    """A network, a batch and the loss on it."""

    def __init__(self, net: nn.Module, x: Tensor, group: str = "0") -> None:
        self.net, self.x = net, x
        self.y = rand(*net(x).shape, seed=9)
        self.graph = recycle.trace(net, lambda: net(x))
        self.group = self.graph[group]

    def loss(self) -> Tensor:
        return (self.net(self.x) - self.y).square().sum(-1).mean()

    def junction(self) -> Any:
        with Tracker(self.graph, sample_every=1, junction=True) as tracker:
            self.loss().backward()
        self.net.zero_grad()
        return tracker.stats(self.group).junction

    def grow(self, count: int, birth: Any, **how: Any) -> float:
        """Largest change of the output."""
        before = self.net(self.x).detach()
        recycle.apply(Grow(count, birth), self.group, generator=seeded(), **how)
        return (self.net(self.x) - before).abs().max().item()

    def gradients(self, count: int) -> Tensor:
        """Norms of the loss's gradients at the incoming weights and bias of the last units, ``(count,)``."""
        self.net.zero_grad()
        self.loss().backward()
        layer = self.net.get_submodule(self.group.name)
        assert layer.weight.grad is not None and layer.bias.grad is not None
        rows = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)[-count:]
        return rows.norm(dim=1)


WIRINGS: dict[str, Callable[[], Task]] = {
    "linear": lambda: Task(mlp(), rand(64, 4)),
    "tanh": lambda: Task(mlp(nn.Tanh), rand(64, 4), "2"),
    "sigmoid": lambda: Task(mlp(nn.Sigmoid), rand(64, 4)),
    "sequences": lambda: Task(mlp(), rand(16, 5, 4)),
    "strided convolution": lambda: Task(
        built(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 2, stride=2),
                                    nn.Flatten(), nn.Linear(12, 2))), rand(20, 2, 9, 9)),
    "padded convolution": lambda: Task(
        built(lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(),
                                    nn.Conv1d(4, 3, 3, padding=2, dilation=2), nn.Flatten(), nn.Linear(21, 2))),
        rand(20, 2, 7)),
    "convolution to linear": lambda: Task(
        built(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))), rand(24, 1, 4, 4)),
}  # fmt: skip


# ---------------------------------------------------------------- what a unit that never learns looks like (seed 000)


@pytest.mark.parametrize("name", WIRINGS)
def test_expansion_keeps_the_loss_and_can_be_learned_from(name: str) -> None:
    """The two goals of on-the-fly expansion. New outgoing weights move at the first update, incoming at the second."""
    task = WIRINGS[name]()
    loss = task.loss().item()
    task.grow(2, zero_out)
    assert task.loss().item() == pytest.approx(loss, rel=1e-12)
    layer = task.net.get_submodule(task.group.name)
    optimizer = torch.optim.SGD(task.net.parameters(), lr=0.1)
    rows = []
    for _ in range(3):
        rows.append(layer.weight[-2:].detach().clone())
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
    assert torch.equal(rows[0], rows[1])
    assert (rows[2] != rows[1]).flatten(1).any(1).all()


def test_zero_on_both_sides_is_refused() -> None:
    task = WIRINGS["linear"]()
    with pytest.raises(NotRecyclable, match="zero on both sides"):
        task.grow(2, lambda newborns: tuple(torch.zeros_like(fresh) for fresh in newborns.fresh))
    assert task.group.width == 6


def test_constant_new_units_are_refused() -> None:
    """All with the same weights, and zero on the other side: all would stay equal."""
    task = WIRINGS["linear"]()
    with pytest.raises(NotRecyclable, match="equal on both sides"):
        task.grow(2, lambda newborns: tuple(torch.full_like(fresh, 0.5) for fresh in newborns.fresh))
    with pytest.raises(NotRecyclable, match="equal on both sides"):
        recycle.apply(Grow(2, mirror, parents=[1, 1]), task.group)
    recycle.apply(Grow(2, mirror, parents=[0, 1]), task.group)
    assert task.group.width == 8


def test_exact_halves_never_part_and_are_seen() -> None:
    task = WIRINGS["tanh"]()
    recycle.apply(Split([1]), task.group)
    start = task.net[2].weight.detach().clone()
    optimizer = torch.optim.Adam(task.net.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
    rows = task.net.get_submodule("2").weight.detach()
    torch.testing.assert_close(rows[1], rows[-1], rtol=1e-12, atol=1e-12)
    assert float((rows[1] - start[1]).norm()) > 0.1
    assert metrics.duplicates(task.group).nonzero().flatten().tolist() == [1, 5]


def test_literal_gradmax_units_have_no_gradient_in_torch_and_lifted_ones_do() -> None:
    """The published trap: a ReLU's derivative at zero is zero, so nothing incoming and no bias never moves."""

    def literal(newborns: Any) -> Born:
        return Born(newborns.resting(0.0), newborns.sent)

    task = WIRINGS["linear"]()
    assert task.grow(2, literal) <= 1e-15
    assert task.gradients(2).tolist() == [0, 0]
    task = WIRINGS["linear"]()
    assert task.grow(2, gradmax, junction=task.junction()) <= 1e-14
    assert float(task.gradients(2).min()) > 1e-3


# ---------------------------------------------------------------- by hand


def test_near_zero_by_hand() -> None:
    """A sigmoid gives 1/2 for nothing: half of the new outgoing weights is taken off the next bias."""
    task = WIRINGS["sigmoid"]()
    bias = task.net[2].bias.detach().clone()
    task.grow(2, partial(near_zero, size=1e-4))
    new = task.net[2].weight[:, -2:].detach()
    assert 1e-6 < float(new.abs().max()) < 1e-3
    torch.testing.assert_close(task.net[2].bias.detach(), bias - 0.5 * new.sum(1), rtol=1e-12, atol=0)


def test_paired_by_hand() -> None:
    task = WIRINGS["linear"]()
    old = task.net[2].weight.detach().clone()
    assert task.grow(4, partial(paired, scale=2.0)) <= 1e-15
    rows, columns = task.net[0].weight.detach()[-4:], task.net[2].weight.detach()[:, -4:]
    assert torch.equal(rows[:2], rows[2:]) and torch.equal(columns[:, :2], -columns[:, 2:])
    assert not torch.equal(rows[0], rows[1])
    assert columns.norm(dim=0).tolist() == pytest.approx([2 * float(old.norm(dim=0).mean())] * 4)
    assert float(task.gradients(4).min()) > 0
    with pytest.raises(NotRecyclable, match="two units at a time"):
        task.grow(3, paired)


def test_net2wider_by_hand() -> None:
    """A unit and its two copies take a third each; one copied once keeps half."""
    task = WIRINGS["linear"]()
    rows, columns = task.net[0].weight.detach().clone(), task.net[2].weight.detach().clone()
    recycle.apply(Split([4, 1, 4], share=None), task.group)
    assert torch.equal(task.net[0].weight.detach(), rows[[0, 1, 2, 3, 4, 5, 4, 1, 4]])
    parts = torch.tensor([1, 1 / 2, 1, 1, 1 / 3, 1, 1 / 3, 1 / 2, 1 / 3]).double()
    wanted = columns[:, [0, 1, 2, 3, 4, 5, 4, 1, 4]] * parts
    torch.testing.assert_close(task.net[2].weight.detach(), wanted, rtol=1e-6, atol=0)


def test_gradmax_by_hand() -> None:
    """Samples x = (1, 0), (0, 1) with gradients (3, 0), (0, 1): the best outgoing weights are (1, 0), then (0, 1)."""
    x, told = torch.eye(2).double(), torch.tensor([[3.0, 0], [0, 1]]).double()
    branch = Branch(x[:, None], torch.ones(2, 1).double(), told, True)
    values, vectors = strongest(Junction((branch,)))
    assert values.tolist() == pytest.approx([3, 1])
    assert vectors.abs().tolist() == [[1, 0], [0, 1]]


def test_tiny_by_hand() -> None:
    """One input that is 2 or -2 with the gradient 1 or -1 at the output, which its own weights cannot change.

    Row and rows' mean square: x = +-2, S = 4. A pre-activation of mean square 1 needs |w| = 1/2, and lowers the loss
    by |1 * 1 + 1 * 1| = 2.
    """
    x, told = torch.tensor([[2.0], [-2.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
    branch = Branch(x[:, None], torch.ones(2, 1).double(), told, True)
    values, incoming, outgoing = best_features(Junction((branch,)))
    assert (values.tolist(), incoming.abs().tolist(), outgoing.abs().tolist()) == ([2.0], [[0.5]], [[1.0]])
    assert float(incoming * outgoing) < 0  # against the gradient
    explained = Branch(x[:, None], x, told, True)  # one more row than inputs: the present weight does it all
    assert best_features(Junction((explained,)))[0].tolist() == [0]
    assert gain_of_present(Junction((explained,))) == pytest.approx(2)  # a step of rms 1: the same 2


def test_firefly_keeps_the_candidates_that_lower_the_loss_most_and_steps_improve_them() -> None:
    """The first of 16 candidates are the 4 of another growth with the same seed."""

    def slope(candidates: int, steps: int) -> float:
        task = WIRINGS["linear"]()
        usual = task.net[2].weight.detach().norm(dim=0).mean().item()
        before = task.loss().item()
        task.grow(1, partial(firefly, candidates=candidates, steps=steps, size=1e-5), loss=task.loss)
        assert task.net[2].weight[:, -1].norm().item() == pytest.approx(1e-5 * usual, rel=1e-5)
        return (before - task.loss().item()) / (1e-5 * usual)

    few, many, improved = slope(4, 0), slope(16, 0), slope(4, 5)
    assert 0 < few < many
    assert 1.2 * few < improved


# ---------------------------------------------------------------- against brute force


@pytest.mark.parametrize("name", WIRINGS)
def test_gradmax_units_have_the_largest_gradient_that_outgoing_weights_of_their_length_can_give(name: str) -> None:
    task = WIRINGS[name]()
    twins = [copy.deepcopy(task.net) for _ in range(2)]
    count = 2 if task.group.why_not_foldable else 1
    assert task.grow(count, gradmax, junction=task.junction()) <= 1e-14
    best = task.gradients(count)[0].item()
    assert best > 0
    for net, how in zip(twins, ("random", "ascent"), strict=True):
        other = Task(net, task.x, task.group.name)
        found = _brute_force(other, how)
        assert found <= best * (1 + 1e-6)
        assert how == "random" or found > 0.999 * best


def _brute_force(task: Task, how: str) -> float:
    """Largest gradient at a unit with nothing incoming but its bias, over outgoing weights of the usual length.

    The pair (v, -v) keeps the output exactly, whatever reads it. Ascent moves v along the numerical gradient of the
    norm: the norm is that of a linear map, so differences are exact.
    """
    usual = _columns(task, slice(None)).flatten(1).norm(dim=1).mean()

    def born(newborns: Any) -> Born:
        sent = newborns.outgoing_of_length(tuple(s[:1] for s in newborns.sent), 1.0)
        return Born(newborns.resting(0.1), tuple(torch.cat([s, -s]) for s in sent))

    task.grow(2, born)
    consumer = task.net.get_submodule(task.group.outgoing[0].name.rpartition(".")[0])

    def norm(v: Tensor) -> float:
        with torch.no_grad():
            for axis in task.group.outgoing:
                pair = torch.tensor([task.group.width - 2, task.group.width - 1])
                like = axis.read(consumer.weight, pair)
                axis.write(consumer.weight, pair, torch.stack([v, -v]).reshape(like.shape))
        return task.gradients(2)[0].item()

    size = _columns(task, slice(-1, None)).numel()
    if how == "random":
        draws = [rand(size, seed=seed) for seed in range(40)]
        return max(norm(v * usual / v.norm()) for v in draws)
    columns = torch.stack([_incoming_gradient(task, norm, basis * usual) for basis in torch.eye(size).double()])
    gram = columns @ columns.T
    v = rand(size)
    for _ in range(400):  # projected ascent
        v = v / v.norm()
        v = v + gram @ v / gram.trace() * 10
    return norm(v * usual / v.norm())


def _incoming_gradient(task: Task, norm: Callable[[Tensor], float], v: Tensor) -> Tensor:
    norm(v)
    layer = task.net.get_submodule(task.group.name)
    return torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)[-2].clone()


def _columns(task: Task, units: slice) -> Tensor:
    (axis,) = task.group.outgoing
    return axis.read(task.group.tensor(axis.name).detach(), torch.arange(task.group.width)[units])


@pytest.mark.parametrize("name", WIRINGS)
def test_the_linear_map_finds_what_the_closed_form_has(name: str) -> None:
    """All units at once, by two backward passes a step: any wiring has it, and here both must agree."""
    closed, mapped = WIRINGS[name](), WIRINGS[name]()
    count = 4 if closed.group.why_not_foldable else 2
    junction = closed.junction()
    assert isinstance(junction, Junction)
    closed.grow(count, gradmax, junction=junction)
    assert mapped.grow(count, gradmax, loss=mapped.loss) <= 1e-14
    torch.testing.assert_close(mapped.gradients(count), closed.gradients(count), rtol=1e-5, atol=0)
    one, other = (_columns(task, slice(-count, None)).flatten(1) for task in (closed, mapped))
    assert (torch.cosine_similarity(one, other).abs() > 0.999).all()


def test_several_gradmax_units_are_orthogonal_and_no_more_than_there_are_outputs() -> None:
    task = Task(mlp(out=2), rand(64, 4), "2")
    with pytest.raises(NotRecyclable, match="only 2 directions of outgoing weights have a gradient, 3 were asked for"):
        task.grow(3, gradmax, junction=task.junction())
    task.grow(2, gradmax, junction=task.junction())
    new = task.net[4].weight.detach()[:, -2:]
    assert abs((new[:, 0] @ new[:, 1]).item()) < 1e-12


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
def test_gradmax_through_a_pool_needs_the_loss(pool: nn.Module) -> None:
    net = built(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(12, 4)))
    task = Task(net, rand(24, 1, 6, 6))
    with pytest.raises(NotRecyclable, match=r"no closed form here .*: pass loss="):
        task.grow(1, gradmax, junction=task.junction())
    assert task.grow(2, gradmax, loss=task.loss) <= 1e-14
    assert task.gradients(2).min().item() > 1e-3


@pytest.mark.parametrize("name", ["linear", "tanh", "strided convolution"])
def test_tiny_units_lower_the_loss_by_what_was_said_and_no_others_by_more(name: str) -> None:
    """Brute force over both sides: the decrease per root mean square of the pre-activation and outgoing norm."""
    task = WIRINGS[name]()
    junction = task.junction()
    values, incoming, outgoing = best_features(junction)
    (branch,) = junction.branches
    wanted = junction.paired([-branch.left_over()])
    rows = branch.inputs.flatten(0, 1)

    def decrease(w: Tensor, v: Tensor) -> float:
        rms = (rows @ w).square().mean().sqrt()
        return float(v @ wanted @ w / rms / v.norm())

    assert decrease(incoming[0], outgoing[0]) == pytest.approx(values[0].item())
    w, v = rand(rows.shape[1]), rand(len(wanted), seed=1)
    assert max(decrease(rand(rows.shape[1], seed=s), rand(len(wanted), seed=s + 50)) for s in range(50)) < values[0]
    w.requires_grad_(), v.requires_grad_()
    optimizer = torch.optim.Adam([w, v], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = -(v @ wanted @ w) / (rows @ w).square().mean().sqrt() / v.norm()
        loss.backward()
        optimizer.step()
    assert decrease(w.detach(), v.detach()) == pytest.approx(values[0].item(), rel=1e-3)


def test_a_tiny_unit_lowers_the_loss_by_its_value_times_the_square_of_the_amplitude() -> None:
    """To first order, for a tanh, with what the consumer's own weights can do left out by fitting them first."""
    net = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    task = Task(net, rand(64, 4))
    with torch.no_grad():
        held = torch.cat([torch.tanh(net[0](task.x)), torch.ones(64, 1).double()], 1)
        best = torch.linalg.lstsq(held, task.y).solution
        net[2].weight.copy_(best[:-1].T), net[2].bias.copy_(best[-1])
    junction = task.junction()
    values = best_features(junction)[0]
    before, usual = task.loss().item(), net[2].weight.norm(dim=0).mean().item()
    task.grow(1, partial(tiny, amplitude=1e-3), junction=junction)
    assert (before - task.loss().item()) / (1e-6 * usual) == pytest.approx(values[0].item(), rel=1e-2)


def test_with_a_loss_tiny_takes_the_amplitude_that_lowers_it_most() -> None:
    found = {}
    for amplitude in [2.0**-k for k in range(6)]:
        task = WIRINGS["linear"]()
        task.grow(2, partial(tiny, amplitude=amplitude), junction=task.junction())
        found[amplitude] = task.loss().item()
    task = WIRINGS["linear"]()
    task.grow(2, tiny, junction=task.junction(), loss=task.loss)
    assert task.loss().item() == pytest.approx(min(found.values()), rel=1e-9)


# ---------------------------------------------------------------- refusals


def test_births_that_a_normalisation_would_undo_are_refused_by_its_name() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    task = Task(net, rand(64, 4))
    for birth in (gradmax, near_zero, tiny):
        with pytest.raises(NotRecyclable, match=f"{birth.__name__} needs .*; '1' normalises them"):
            task.grow(2, birth, junction=task.junction(), loss=task.loss)
    net.eval()
    assert task.grow(2, paired) <= 1e-14
    layers = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.raises(NotRecyclable, match="LayerNorm mixes the units"):
        Task(layers, rand(64, 4)).grow(2, gradmax)


def test_what_births_lack_is_said() -> None:
    task = WIRINGS["linear"]()
    for birth, said in ((firefly, "pass loss="), (gradmax, "no pass was sampled"), (tiny, "no pass was sampled")):
        with pytest.raises(NotRecyclable, match=said):
            task.grow(1, birth)
    with pytest.raises(NotRecyclable, match="only Grow takes"):
        recycle.apply(Reset([1, 2], paired), task.group)
    with pytest.raises(NotRecyclable, match="one finite number"):
        task.grow(1, firefly, loss=lambda: task.net(task.x))
    flat = Task(built(lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))), rand(64, 4))
    with pytest.raises(NotRecyclable, match="would have no gradient"):
        flat.grow(1, gradmax, junction=flat.junction())
    assert flat.group.width == task.group.width == 6


def test_a_birth_that_claims_to_be_exact_and_is_not_is_refused() -> None:
    task = WIRINGS["linear"]()
    with pytest.raises(NotRecyclable, match="would change the output by"):
        task.grow(1, lambda newborns: Born(newborns.fresh, newborns.sent))
    assert task.group.width == 6
    assert task.grow(1, lambda newborns: Born(newborns.fresh, newborns.sent, exact=False)) > 1e-3


def test_places_that_do_not_match_have_no_closed_form() -> None:
    """What the consumer reads is no function of what is made in the same place: flipped, added to, or cut off."""

    class Flipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(2)

    conv = [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3), nn.Flatten(), nn.Linear(9, 2)]
    task = Task(built(lambda: nn.Sequential(conv[0], Flipped(), *conv[1:])), rand(20, 2, 7))
    assert "no function of what is made in the same place" in task.junction()


def test_a_target_network_gets_the_same_new_units() -> None:
    for birth in (gradmax, paired, near_zero):
        task = WIRINGS["sigmoid"]()
        target = copy.deepcopy(task.net)
        with torch.no_grad():
            for p in target.parameters():
                p.mul_(1.3)
        before = target(task.x).detach()
        task.grow(2, birth, junction=task.junction(), targets=[(target, 0.01)])
        assert (target(task.x) - before).abs().max().item() <= (1e-2 if birth is near_zero else 1e-14)
        assert torch.equal(target[2].weight[:, -2:], task.net[2].weight[:, -2:])


# ---------------------------------------------------------------- methods in a recycler

NAMES = ["expand", "near_zero", "net2wider", "gradmax", "tiny", "firefly"]


def recycler_of(task: Task, name: str, **options: Any) -> tuple[Recycler, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam(task.net.parameters(), lr=1e-2)
    method = recycle.find(name)(**options)
    return Recycler(task.graph, method, optimizers=[optimizer], sample_every=1, loss=task.loss), optimizer


def train(task: Task, recycler: Recycler, optimizer: torch.optim.Optimizer, updates: int = 1) -> None:
    for _ in range(updates):
        optimizer.zero_grad()
        with recycler.listening():
            task.loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wiring", ["linear", "strided convolution"])
def test_a_network_grows_while_it_trains_up_to_its_most(name: str, wiring: str) -> None:
    task = WIRINGS[wiring]()
    task.graph = task.graph.select(task.group.name)
    recycler, optimizer = recycler_of(task, name, count=2, most=task.group.width + 3)
    width = task.group.width
    train(task, recycler, optimizer, 3)
    before, state = task.net(task.x).detach(), torch.get_rng_state()
    report = recycler.step()
    (edit,) = [edit for _, edit in report.edits]
    assert isinstance(edit, Split if name == "net2wider" else Grow), report.groups
    assert torch.equal(state, torch.get_rng_state())
    change = (task.net(task.x) - before).abs().max().item()
    note = report.groups[task.group.name].note
    if name in ("expand", "gradmax"):
        assert change <= 1e-13 and note == ""
    else:
        assert f"the output moved by {change / before.abs().max().item():.1e}" in note
    layer = task.net.get_submodule(task.group.name)
    newborn = layer.weight[-2:].detach().clone()
    train(task, recycler, optimizer, 3)
    assert ((layer.weight[-2:] != newborn).flatten(1).any(1)).all()
    recycler.step()
    train(task, recycler, optimizer)
    assert recycler.step().edits == ()
    assert task.group.width == width + 3


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: mlp(),
    "convolutions": lambda: built(lambda: nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 3, 2), nn.ReLU(), nn.Conv1d(3, 2, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", ["gradmax", "tiny"])
@pytest.mark.parametrize("chain", CHAINS)
def test_neighbouring_layers_grow_at_the_same_event(name: str, chain: str) -> None:
    """What a pass showed of a layer stays of use when the one before it is wider: new inputs were silent in it."""
    task = Task(CHAINS[chain](), rand(64, 4) if chain == "linear" else rand(64, 2, 7))
    recycler, optimizer = recycler_of(task, name)
    if name == "tiny":
        recycler.loss = None
    train(task, recycler, optimizer)
    recycler.optimizers[0].zero_grad()
    before = task.net(task.x).detach()
    report = recycler.step()
    assert [group for group, _ in report.edits] == [group.name for group in task.graph][: len(report.edits)]
    assert len(report.edits) == len(list(task.graph))
    if name == "gradmax":
        assert (task.net(task.x) - before).abs().max().item() <= 1e-14
        task.loss().backward()
        for group in task.graph:
            assert task.net.get_submodule(group.name).weight.grad[-1].norm().item() > 0
    train(task, recycler, optimizer)
    assert len(recycler.step().edits) == len(report.edits)


def test_of_consumers_that_read_one_value_all_are_heard() -> None:
    """Two heads on one layer: the best outgoing weights are those of both together."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.mean, self.spread = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.trunk(x))
            return torch.cat([self.mean(h), self.spread(h)], 1)

    task = Task(built(Heads), rand(64, 4), "trunk")
    recycler, optimizer = recycler_of(task, "gradmax", count=3)
    train(task, recycler, optimizer)
    ((_, edit),) = recycler.step().edits
    assert edit.count == 3
    new = torch.cat([task.net.mean.weight, task.net.spread.weight])[:, -3:].detach()
    gram = new.T @ new
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-12, rtol=0)
    train(task, recycler, optimizer)
    assert recycler.report().groups["trunk"].width == 9


@pytest.mark.parametrize("name", ["gradmax", "tiny"])
def test_scores_say_where(name: str) -> None:
    """A layer that already has all that it needs scores zero, one that lacks something more."""
    task = WIRINGS["linear"]()
    recycler, optimizer = recycler_of(task, name)
    optimizer.param_groups[0]["lr"] = 0.0
    train(task, recycler, optimizer)
    relative, absolute = recycler.method.score(task.group, recycler.tracker.stats(task.group))
    assert relative > 0 and absolute > 0
    task.y = task.net(task.x).detach()
    train(task, recycler, optimizer)
    assert recycler.method.score(task.group, recycler.tracker.stats(task.group)) == (0, 0)
    pooled = Task(built(lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 2))),
                  rand(20, 1, 6))  # fmt: skip
    recycler, optimizer = recycler_of(pooled, name)
    train(pooled, recycler, optimizer)
    assert recycler.method.score(pooled.group, recycler.tracker.stats(pooled.group)) == (0, 0)


def test_running_the_loss_is_no_training_pass() -> None:
    task = WIRINGS["linear"]()
    recycler, optimizer = recycler_of(task, "firefly")
    recycler.attach()
    train(task, recycler, optimizer, 2)
    gradients = [p.grad.clone() for p in list(task.net.parameters())[-1:] if p.grad is not None]
    report = recycler.step()
    assert len(report.edits) == 2 and not recycler.tracker.outdated
    assert recycler.tracker.samples == 0 and recycler.tracker.passes == 2
    assert torch.equal(list(task.net.parameters())[-1].grad, gradients[0])  # the head's bias was not replaced
    train(task, recycler, optimizer)
    assert recycler.report().groups["0"].samples == 64
    recycler.detach()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("expand", {"count": 0}), ("expand", {"active": 1.0}), ("near_zero", {"size": 0.0}),
        ("net2wider", {"noise": -1.0}),
        ("gradmax", {"scale": 0.0}), ("gradmax", {"lift": 0.0}), ("tiny", {"amplitude": 0.0}), ("tiny", {"most": 1}),
        ("firefly", {"candidates": 0}), ("firefly", {"size": 0.0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name} needs .* got "):
        recycle.find(name)(**options)
