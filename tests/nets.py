"""A zoo of small networks, each with what a careful reader would say about its units.

The expectations are written by hand from the networks' definitions.
`test_laws.py` runs every law over every network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]
Index = Any  # whatever may stand between a tensor's square brackets
Owned = Callable[[int], Sequence[tuple[str, Index]]]
Calls = Callable[[nn.Module, tuple[Tensor, ...]], Sequence[Callable[[], Any]]]

at = np.s_  # at[:, 3] is the index that stands between the brackets
BATCH = 7
SHUFFLED = [3, 0, 7, 5, 1, 6, 2, 4]


@dataclass(frozen=True)
class Net:
    """A small network and what must be found in it."""

    name: str
    build: Callable[[], nn.Module]  # always the same weights, in float64
    inputs: Inputs
    groups: Mapping[str, int]  # editable group -> width
    frozen: Mapping[str, str]  # "name" or "one|other" -> a part of the reason
    inexact: Mapping[str, str] = field(default_factory=dict)  # editable but approximate -> a part of why
    optional: frozenset[str] = frozenset()  # groups that may also be frozen
    either: bool = False  # the specification leaves it open: whatever is offered must be sound
    train: bool = False  # exact in training mode too, where BatchNorm uses the batch's statistics
    random: bool = False  # training mode draws random numbers
    kill: Mapping[str, str] = field(default_factory=dict)  # group -> parameter; an entry at -1e3 silences
    constant: Mapping[str, float] = field(default_factory=dict)  # group -> value of a unit: zero row, bias .7
    unfoldable: Mapping[str, str] = field(default_factory=dict)  # group -> a part of Fold's refusal
    owned: Mapping[str, Owned] = field(default_factory=dict)  # group -> all elements that are one unit's own
    homogeneous: frozenset[str] = frozenset()  # f(c x) = c f(x) for c > 0: a balanced split is exact
    calls: Calls = field(default=lambda net, inputs: (lambda: net(*inputs),))


class Wire(nn.Module):
    """A network whose forward pass is a plain function of its named parts."""

    def __init__(self, wiring: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.wiring = wiring

    def forward(self, *inputs: Tensor) -> Any:
        return self.wiring(self, *inputs)


ZOO: dict[str, Net] = {}


def zoo(inputs: Inputs, **expected: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Add the network that the decorated function builds, under the function's name."""

    def add(define: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = define.__name__
        if name in ZOO:
            raise ValueError(f"two networks are called {name!r}")
        expected.setdefault("groups", {})
        expected.setdefault("frozen", {})

        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(map(ord, name)))
                return define().double()

        ZOO[name] = Net(name=name, build=build, inputs=inputs, **expected)
        return define

    return add


def rows(*shapes: tuple[int, ...], batch: int = BATCH) -> Inputs:
    """Inputs of these shapes, one for each argument, normally distributed."""

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)

    return draw


def tokens(count: int, length: int) -> Inputs:
    """Integer inputs below `count`."""
    return lambda generator: (torch.randint(count, (BATCH, length), generator=generator),)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[0]))


Linear, ReLU = nn.Linear, nn.ReLU

# ---------------------------------------------------------------- plain layers and activations


def _linear(name: str, *consumers: str) -> Owned:
    """One row, its bias, and the same-numbered column of every consumer."""
    return lambda u: [
        (f"{name}.weight", at[u]),
        (f"{name}.bias", at[u]),
        *((f"{c}.weight", at[:, u]) for c in consumers),
    ]


_SEQUENTIAL: dict[str, Any] = {
    "groups": {"0": 8, "2": 6},
    "frozen": {"4": "output"},
    "owned": {"0": _linear("0", "2"), "2": _linear("2", "4")},
}
_THREE: dict[str, Any] = {
    "groups": {"fc1": 8, "fc2": 6},
    "frozen": {"out": "output"},
    "owned": {"fc1": _linear("fc1", "fc2"), "fc2": _linear("fc2", "out")},
}
_RELU_SEQUENTIAL: dict[str, Any] = {
    "kill": {"0": "0.bias", "2": "2.bias"},
    "constant": {"0": 0.7, "2": 0.7},
    "homogeneous": frozenset({"0", "2"}),
}
_RELU_THREE: dict[str, Any] = {
    "kill": {"fc1": "fc1.bias", "fc2": "fc2.bias"},
    "constant": {"fc1": 0.7, "fc2": 0.7},
    "homogeneous": frozenset({"fc1", "fc2"}),
}


@zoo(rows((5,)), **_SEQUENTIAL, **_RELU_SEQUENTIAL)
def mlp() -> nn.Module:
    return nn.Sequential(Linear(5, 8), ReLU(), Linear(8, 6), ReLU(), Linear(6, 3))


@zoo(rows((5,), batch=1), **_SEQUENTIAL, **_RELU_SEQUENTIAL)
def batch_of_one() -> nn.Module:
    return nn.Sequential(Linear(5, 8), ReLU(), Linear(8, 6), ReLU(), Linear(6, 3))


@zoo(rows((5,)), **_THREE, **_RELU_THREE)
def functional_relu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc2(F.relu(m.fc1(x)))))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), **_THREE, **_RELU_THREE)
def one_relu_for_all() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.act(m.fc2(m.act(m.fc1(x)))))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3), act=ReLU())


@zoo(rows((5,)), **_SEQUENTIAL, **_RELU_SEQUENTIAL)
def inplace_relu() -> nn.Module:
    return nn.Sequential(Linear(5, 8), ReLU(inplace=True), Linear(8, 6), ReLU(inplace=True), Linear(6, 3))


@zoo(rows((5,)), **_SEQUENTIAL, constant={"0": math.tanh(0.7), "2": math.tanh(0.7)})
def tanh() -> nn.Module:
    return nn.Sequential(Linear(5, 8), nn.Tanh(), Linear(8, 6), nn.Tanh(), Linear(6, 3))


@zoo(rows((5,)), **_SEQUENTIAL, constant={"0": 0.7 * 0.5 * (1 + math.erf(0.7 / math.sqrt(2)))})
def gelu() -> nn.Module:
    return nn.Sequential(Linear(5, 8), nn.GELU(), Linear(8, 6), nn.GELU(), Linear(6, 3))


@zoo(
    rows((5,)),
    groups={"0": 8, "2": 6},
    frozen={"4": "output"},
    constant={"0": 0.7, "2": 0.7},
    owned={
        "0": lambda u: [*_linear("0", "2")(u), ("1.weight", at[u])],
        "2": lambda u: [*_linear("2", "4")(u), ("3.weight", at[u])],
    },
)
def prelu_per_unit() -> nn.Module:
    return nn.Sequential(Linear(5, 8), nn.PReLU(8), Linear(8, 6), nn.PReLU(6), Linear(6, 3))


@zoo(rows((5,)), **_SEQUENTIAL, constant={"0": 0.7})
def prelu_shared() -> nn.Module:
    return nn.Sequential(Linear(5, 8), nn.PReLU(), Linear(8, 6), nn.PReLU(), Linear(6, 3))


@zoo(rows((5,)), **_SEQUENTIAL, constant={"0": 0.7}, homogeneous=frozenset({"0", "2"}))
def leaky_relu() -> nn.Module:
    return nn.Sequential(Linear(5, 8), nn.LeakyReLU(), Linear(8, 6), nn.LeakyReLU(), Linear(6, 3))


@zoo(
    rows((5,)),
    groups={"0": 8, "2": 6},
    frozen={"4": "output"},
    unfoldable={"0": "bias", "2": "bias"},
    owned={
        "0": lambda u: [("0.weight", at[u]), ("2.weight", at[:, u])],
        "2": lambda u: [("2.weight", at[u]), ("4.weight", at[:, u])],
    },
    homogeneous=frozenset({"0", "2"}),
)
def no_bias() -> nn.Module:
    return nn.Sequential(Linear(5, 8, bias=False), ReLU(), Linear(8, 6, bias=False), ReLU(), Linear(6, 3, bias=False))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"out": "output"}, owned={"fc": _linear("fc", "out")})
def written_with_where() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.out(torch.where(h > 0, h * torch.sigmoid(h), h.exp() - 1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    owned={"fc": lambda u: [*_linear("fc", "out")(u), ("gain", at[u]), ("shift", at[u])]},
)
def learned_gain() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(x) * m.gain + m.shift) * m.heat)

    parts = {"gain": nn.Parameter(torch.rand(8) + 0.5), "shift": nn.Parameter(torch.randn(8))}
    return Wire(forward, fc=Linear(5, 8), **parts, heat=nn.Parameter(torch.tensor(1.5)), out=Linear(8, 3))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"out": "output"}, random=True, kill={"fc": "fc.bias"})
def dropout() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.drop(F.relu(m.fc(x))))

    return Wire(forward, fc=Linear(5, 8), drop=nn.Dropout(0.3), out=Linear(8, 3))


@zoo(rows((4, 5)), groups={"fc1": 8, "fc2": 6}, frozen={"out": "output"}, **_RELU_THREE)
def linear_over_time() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc1(x))  # (batch, time, 8)
        return m.out(F.relu(m.fc2(h)).mean(1))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"out": "output"}, owned={"fc": _linear("fc", "out")})
def centred_over_the_batch() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.out(h - h.mean(0, keepdim=True))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    owned={"fc": lambda u: [("fc.weight", at[u]), ("fc.bias", at[u]), ("out.weight", at[:, SHUFFLED.index(u)])]},
    constant={"fc": 0.7},
)
def shuffled_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(x))[:, SHUFFLED])

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), groups={"fc1": 8, "fc2": 6}, frozen={"out": "output"}, **_RELU_THREE)
def unused_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc2(F.relu(m.fc1(x)))))

    return Wire(forward, unused=Linear(5, 8), fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


# ---------------------------------------------------------------- several consumers, several outputs


@zoo(
    rows((5,)),
    groups={"trunk": 8, "pi": 6, "vf": 4},
    frozen={"actor": "output", "critic": "output"},
    kill={"trunk": "trunk.bias", "pi": "pi.bias", "vf": "vf.bias"},
    constant={"trunk": 0.7, "pi": 0.7, "vf": 0.7},
    owned={"trunk": _linear("trunk", "pi", "vf")},
)
def actor_critic() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.trunk(x))
        return m.actor(F.relu(m.pi(h))), m.critic(F.relu(m.vf(h)))

    parts = {"pi": Linear(8, 6), "vf": Linear(8, 4), "actor": Linear(6, 2), "critic": Linear(4, 1)}
    return Wire(forward, trunk=Linear(5, 8), **parts)


def _two_entry_points(net: nn.Module, inputs: tuple[Tensor, ...]) -> Sequence[Callable[[], Any]]:
    return (lambda: net.act(*inputs), lambda: net.judge(*inputs))


@zoo(
    rows((5,)),
    groups={"trunk": 8},
    frozen={"actor": "output", "critic": "output"},
    kill={"trunk": "trunk.bias"},
    constant={"trunk": 0.7},
    owned={"trunk": _linear("trunk", "actor", "critic")},
    calls=_two_entry_points,
)
def two_entry_points() -> nn.Module:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.actor, self.critic = Linear(5, 8), Linear(8, 2), Linear(8, 1)

        def act(self, x: Tensor) -> Tensor:
            return self.actor(F.relu(self.trunk(x)))

        def judge(self, x: Tensor) -> Tensor:
            return self.critic(F.relu(self.trunk(x)))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.act(x), self.judge(x)

    return ActorCritic()


@zoo(
    rows((5,)),
    groups={"trunk": 8, "advantage.0": 6, "value.0": 6},
    frozen={"value.2|advantage.2": ""},
    kill={"trunk": "trunk.bias", "value.0": "value.0.bias"},
)
def dueling() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.trunk(x))
        advantage = m.advantage(h)
        return m.value(h) + advantage - advantage.mean(1, keepdim=True)

    value = nn.Sequential(Linear(8, 6), ReLU(), Linear(6, 1))
    advantage = nn.Sequential(Linear(8, 6), ReLU(), Linear(6, 3))
    return Wire(forward, trunk=Linear(5, 8), value=value, advantage=advantage)


@zoo(rows((5,)), **_THREE, **_RELU_THREE)
def dictionary_of_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        h = F.relu(m.fc2(F.relu(m.fc1(x))))
        y = m.out(h)
        return {"q": y, "best": (y.argmax(1), [y.max(1).values])}

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "output", "out": "output"}, kill={"fc1": "fc1.bias"})
def features_are_returned_too() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.fc2(F.relu(m.fc1(x))))
        return m.out(h), h

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(
    rows((5,)),
    groups={"fc1": 8, "fc2": 6},
    frozen={"aux": "output", "out": "output"},
    owned={"fc1": _linear("fc1", "aux", "fc2")},
    **_RELU_THREE,
)
def deep_supervision() -> nn.Module:
    def forward(m: Any, x: Tensor) -> list[Tensor]:
        h1 = F.relu(m.fc1(x))
        h2 = F.relu(m.fc2(h1))
        return [m.aux(h1), m.out(h2)]

    return Wire(forward, fc1=Linear(5, 8), aux=Linear(8, 2), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"actor": "output", "critic": "output"}, constant={"fc": 0.7})
def detached_critic() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.fc(x))
        return m.actor(h), m.critic(h.detach())

    return Wire(forward, fc=Linear(5, 8), actor=Linear(8, 2), critic=Linear(8, 1))


# ---------------------------------------------------------------- concatenating and slicing


@zoo(
    rows((5,), (2,)),
    groups={"encoder": 6, "fc": 8},
    frozen={"out": "output"},
    kill={"encoder": "encoder.bias", "fc": "fc.bias"},
    constant={"encoder": 0.7, "fc": 0.7},
    owned={
        "encoder": lambda u: [
            ("encoder.weight", at[u]),
            ("encoder.bias", at[u]),
            ("fc.weight", at[:, 2 + u]),
        ]
    },
)
def critic_with_actions() -> nn.Module:
    def forward(m: Any, obs: Tensor, action: Tensor) -> Tensor:
        h = F.relu(m.encoder(obs))
        return m.out(F.relu(m.fc(torch.cat([action, h], 1))))

    return Wire(forward, encoder=Linear(5, 6), fc=Linear(8, 8), out=Linear(8, 1))


@zoo(
    rows((5,)),
    groups={"fa": 4, "fb": 6},
    frozen={"out": "output"},
    constant={"fa": 0.7, "fb": 0.7},
    owned={
        "fa": _linear("fa", "out"),
        "fb": lambda u: [("fb.weight", at[u]), ("fb.bias", at[u]), ("out.weight", at[:, 4 + u])],
    },
)
def concatenated_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.cat([F.relu(m.fa(x)), F.relu(m.fb(x))], 1))

    return Wire(forward, fa=Linear(5, 4), fb=Linear(5, 6), out=Linear(10, 3))


@zoo(
    rows((5,)),
    groups={"fc1": 8, "fc2": 6},
    frozen={"out": "output"},
    owned={
        "fc1": lambda u: [
            ("fc1.weight", at[u]),
            ("fc1.bias", at[u]),
            ("fc2.weight", at[:, 5 + u]),
            ("out.weight", at[:, 6 + u]),
        ]
    },
    **_RELU_THREE,
)
def dense_skips() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h1 = F.relu(m.fc1(x))
        h2 = F.relu(m.fc2(torch.cat([x, h1], 1)))
        return m.out(torch.cat([h2, h1, x], 1))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(13, 6), out=Linear(19, 3))


@zoo(
    rows((5,)),
    groups={"fc[0:4]": 4, "fc[4:8]": 4},
    frozen={"left": "output", "right": "output"},
    owned={
        "fc[0:4]": _linear("fc", "left"),
        "fc[4:8]": lambda u: [("fc.weight", at[4 + u]), ("fc.bias", at[4 + u]), ("right.weight", at[:, u])],
    },
)
def chunked() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = F.relu(m.fc(x)).chunk(2, dim=1)
        return m.left(a), m.right(b)

    return Wire(forward, fc=Linear(5, 8), left=Linear(4, 2), right=Linear(4, 3))


@zoo(
    rows((5,)),
    groups={"fc[0:3]": 3, "fc[3:8]": 5},
    frozen={"left": "output", "right": "output"},
    owned={"fc[3:8]": lambda u: [("fc.weight", at[3 + u]), ("fc.bias", at[3 + u]), ("right.weight", at[:, u])]},
)
def sliced() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.fc(x))
        return m.left(h[:, :3]), m.right(h[:, 3:])

    return Wire(forward, fc=Linear(5, 8), left=Linear(3, 2), right=Linear(5, 3))


@zoo(rows((5,)), either=True)
def overlapping_slices() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.fc(x))
        return m.left(h[:, :5]), m.right(h[:, 3:])

    return Wire(forward, fc=Linear(5, 8), left=Linear(5, 2), right=Linear(5, 3))


@zoo(rows((5,)), groups={"fa": 4, "fb": 4}, frozen={"out": "output"}, optional=frozenset({"fa", "fb"}))
def written_into_a_buffer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 8)
        h[:, :4] = F.relu(m.fa(x))
        h[:, 4:] = F.relu(m.fb(x))
        return m.out(h)

    return Wire(forward, fa=Linear(5, 4), fb=Linear(5, 4), out=Linear(8, 3))


@zoo(
    rows((3, 3)),
    groups={"first": 5, "fc[1:4]": 3},
    frozen={"fc[0:1]": "one unit alone", "out": "output"},
    owned={"fc[1:4]": lambda u: [("fc.weight", at[1 + u]), ("fc.bias", at[1 + u]), ("out.weight", at[:, 1 + u :: 4])]},
)
def relu_written_over_one_unit() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(m.first(x))
        h[:, :, :1] = torch.relu(h[:, :, :1])  # which shows only where it is negative
        return m.out(h.flatten(1))

    return Wire(forward, first=Linear(3, 5), fc=Linear(5, 4), out=Linear(12, 3))


@zoo(rows((5,)), groups={"fc[0:3]": 3, "fc[3:8]": 5}, frozen={"out": "output"})
def relu_in_place_on_some_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        h[:, 3:].relu_()
        return m.out(h)

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), groups={"fc[0:4]": 4, "fc[4:8]": 4}, frozen={"out": "output"})
def two_kinds_of_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.out(torch.cat([F.relu(h[:, :4]), torch.tanh(h[:, 4:])], 1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), either=True)
def two_kinds_in_turn() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.out(torch.stack([F.relu(h[:, ::2]), torch.tanh(h[:, 1::2])], 2).flatten(1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((2, 4, 4)), either=True)
def maps_flattened_in_two_ways() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv(x))
        return m.out(torch.cat([h[:, ::2].flatten(1), h[:, 1::2].transpose(2, 3).flatten(1)], 1))

    return Wire(forward, conv=nn.Conv2d(2, 8, 3), out=Linear(32, 3))


@zoo(rows((5,)), either=True)
def two_kinds_by_a_number() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.out(torch.cat([h[:, :2], 2 * h[:, 2:4], h[:, 4:6], 2 * h[:, 6:]], 1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"left": "output", "right": "output"}, unfoldable={"fc": ""})
def two_activations_of_one_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.fc(x)
        return m.left(F.relu(h)), m.right(torch.tanh(h))  # a constant unit has another value for each

    return Wire(forward, fc=Linear(5, 8), left=Linear(8, 2), right=Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    owned={"fc": lambda u: [("fc.weight", at[u]), ("fc.bias", at[u]), ("out.weight", at[:, [u, 8 + u]])]},
)
def both_signs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.out(F.relu(torch.cat([h, -h], 1)))

    return Wire(forward, fc=Linear(5, 8), out=Linear(16, 3))


@zoo(rows((5,)), either=True)
def two_uses_in_opposite_order() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.out(torch.stack([F.relu(h), torch.tanh(h.flip(1))], 2).flatten(1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(16, 3))


@zoo(rows((5,)), either=True)
def neighbours_multiplied() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.out(h * h.roll(1, 1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), either=True)
def mixture_of_experts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate = torch.softmax(m.gate(x), 1)
        experts = torch.stack([F.relu(m.one(x)), F.relu(m.two(x)), F.relu(m.three(x))], 1)
        return m.out((gate[:, :, None] * experts).sum(1))

    parts = {"gate": Linear(5, 3), "one": Linear(5, 6), "two": Linear(5, 6), "three": Linear(5, 6)}
    return Wire(forward, **parts, out=Linear(6, 3))


@zoo(rows((8,), batch=1), either=True)
def routed_by_the_input() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.out(h.gather(1, x.argsort(1)))  # which column a unit meets is up to the data

    return Wire(forward, fc=Linear(8, 8), out=Linear(8, 3))


# ---------------------------------------------------------------- gating, residuals


@zoo(
    rows((5,)),
    groups={"fc": 4},
    frozen={"out": "output"},
    owned={
        "fc": lambda u: [
            ("fc.weight", at[[u, u + 4]]),
            ("fc.bias", at[[u, u + 4]]),
            ("out.weight", at[:, u]),
        ]
    },
)
def gated_halves() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.fc(x).chunk(2, dim=1)
        return m.out(a * torch.sigmoid(b))

    return Wire(forward, fc=Linear(5, 8), out=Linear(4, 3))


@zoo(
    rows((5,)),
    groups={"fa": 4},
    frozen={"out": "output"},
    owned={"fa": lambda u: [*_linear("fa", "out")(u), ("fb.weight", at[u]), ("fb.bias", at[u])]},
)
def gated_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.fa(x) * torch.sigmoid(m.fb(x)))

    return Wire(forward, fa=Linear(5, 4), fb=Linear(5, 4), out=Linear(4, 3))


@zoo(rows((5,), (2,)), groups={"fc": 6}, frozen={"out": "output"})
def film() -> nn.Module:
    def forward(m: Any, x: Tensor, condition: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(x) * m.scale(condition) + m.shift(condition)))

    return Wire(forward, fc=Linear(5, 6), scale=Linear(2, 6), shift=Linear(2, 6), out=Linear(6, 3))


@zoo(rows((5,), (3, 2)), groups={"fa": 6}, frozen={"out": "output"})
def added_along_time() -> nn.Module:
    def forward(m: Any, x: Tensor, sequence: Tensor) -> Tensor:
        return m.out(F.relu(m.fa(x).unsqueeze(1) + m.fb(sequence)))

    return Wire(forward, fa=Linear(5, 6), fb=Linear(2, 6), out=Linear(6, 3))


def _residual(u: int) -> Sequence[tuple[str, Index]]:
    return [*_linear("fc1", "fc2", "out")(u), ("fc2.weight", at[u]), ("fc2.bias", at[u])]


@zoo(rows((5,)), groups={"fc1": 6}, frozen={"out": "output"}, owned={"fc1": _residual})
def residual_before_activation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x)
        return m.out(F.relu(h + m.fc2(F.relu(h))))

    return Wire(forward, fc1=Linear(5, 6), fc2=Linear(6, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc1": 6}, frozen={"out": "output"}, owned={"fc1": _residual})
def residual_after_activation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc1(x))
        return m.out(h + F.relu(m.fc2(h)))

    return Wire(forward, fc1=Linear(5, 6), fc2=Linear(6, 6), out=Linear(6, 3))


@zoo(
    rows((5,)),
    groups={"fc1": 6, "up": 8},
    frozen={"out": "output"},
    kill={"up": "up.bias"},
    constant={"up": 0.7},
    owned={
        "up": _linear("up", "down"),
        "fc1": lambda u: [*_linear("fc1", "up", "out")(u), ("down.weight", at[u]), ("down.bias", at[u])],
    },
)
def residual_bottleneck() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc1(x)
        return m.out(h + m.down(F.relu(m.up(h))))

    return Wire(forward, fc1=Linear(5, 6), up=Linear(6, 8), down=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"block": "aten.add", "out": "output"}, kill={"fc": "fc.bias"})
def residual_of_the_input() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(x + m.block(x))))

    return Wire(forward, block=Linear(5, 5), fc=Linear(5, 8), out=Linear(8, 3))


# ---------------------------------------------------------------- convolutions


def _conv_head(columns: Callable[[int], Index]) -> Owned:
    return lambda u: [("conv2.weight", at[u]), ("conv2.bias", at[u]), ("fc.weight", columns(u))]


@zoo(
    rows((2, 8, 8)),
    groups={"features.0": 4, "features.2": 6, "head.0": 8},
    frozen={"head.2": "output"},
    kill={"features.0": "features.0.bias", "features.2": "features.2.bias", "head.0": "head.0.bias"},
    constant={"features.0": 0.7, "features.2": 0.7, "head.0": 0.7},
    homogeneous=frozenset({"features.0", "features.2", "head.0"}),
    owned={
        "features.0": _linear("features.0", "features.2"),
        "features.2": lambda u: [
            ("features.2.weight", at[u]),
            ("features.2.bias", at[u]),
            (
                "head.0.weight",
                at[:, 4 * u : 4 * u + 4],
            ),  # channels first: a 2x2 map is contiguous
        ],
        "head.0": _linear("head.0", "head.2"),
    },
)
def nature_cnn() -> nn.Module:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(2, 4, 3), ReLU(), nn.Conv2d(4, 6, 3, stride=2), ReLU(), nn.Flatten()
            )
            self.head = nn.Sequential(Linear(24, 8), ReLU(), Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x))

    return Agent()


@zoo(
    rows((2, 6, 6)),
    groups={"conv1": 4, "conv2": 6, "fc": 8},
    frozen={"out": "output"},
    constant={"conv2": 0.7},
    owned={"conv2": _conv_head(lambda u: at[:, u::6])},  # channels last: a channel is every sixth column
)
def channels_last_flatten() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv2(F.relu(m.conv1(x))))
        return m.out(F.relu(m.fc(h.permute(0, 2, 3, 1).flatten(1))))

    return Wire(forward, conv1=nn.Conv2d(2, 4, 3), conv2=nn.Conv2d(4, 6, 3), fc=Linear(24, 8), out=Linear(8, 3))


@zoo(
    rows((3, 10)),
    groups={"conv1": 4, "conv2": 6},
    frozen={"fc": "output"},
    constant={"conv1": 0.7, "conv2": 0.7},
    owned={"conv2": _conv_head(lambda u: at[:, 3 * u : 3 * u + 3])},
)
def conv1d() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(F.relu(m.conv2(F.relu(m.conv1(x)))).flatten(1))

    return Wire(forward, conv1=nn.Conv1d(3, 4, 3), conv2=nn.Conv1d(4, 6, 3, stride=2), fc=Linear(18, 3))


def _batchnorm(name: str, u: int) -> list[tuple[str, Index]]:
    return [(f"{name}.{part}", at[u]) for part in ("weight", "bias", "running_mean", "running_var")]


@zoo(
    rows((2, 6, 6)),
    groups={"0": 4, "4": 6},
    frozen={"9": "output"},
    train=True,
    kill={"0": "1.bias", "4": "5.bias"},
    unfoldable={"0": "pad"},
    owned={
        "0": lambda u: [*_linear("0", "4")(u), *_batchnorm("1", u)],
        "4": lambda u: [
            ("4.weight", at[u]),
            ("4.bias", at[u]),
            *_batchnorm("5", u),
            ("9.weight", at[:, 9 * u : 9 * u + 9]),
        ],
    },
)
def conv_batchnorm_maxpool() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        ReLU(inplace=True),
        nn.Identity(),
        nn.Flatten(),
        Linear(54, 3),
    )


@zoo(
    rows((5,)),
    groups={"0": 8},
    frozen={"3": "output"},
    train=True,
    owned={"0": lambda u: [*_linear("0", "3")(u), *_batchnorm("2", u)]},
)
def relu_then_batchnorm() -> nn.Module:
    return nn.Sequential(Linear(5, 8), ReLU(), nn.BatchNorm1d(8), Linear(8, 3))


@zoo(rows((5,)), groups={"0": 8}, frozen={"3": "output"}, train=True)
def batchnorm_without_memory() -> nn.Module:
    norm = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
    return nn.Sequential(Linear(5, 8), norm, ReLU(), Linear(8, 3))


@zoo(rows((2, 6, 6)), groups={"0": 4, "2": 6}, frozen={"6": "output"}, constant={"0": 0.7, "2": 0.7})
def adaptive_average_pool() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        ReLU(),
        nn.Conv2d(4, 6, 3),
        ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Linear(6, 3),
    )


@zoo(rows((2, 6, 6)), groups={"0": 4, "2": 6}, frozen={"5": "output"}, unfoldable={"0": "pad"})
def average_pool_and_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        Linear(24, 3),
    )


@zoo(
    rows((2, 5, 5)),
    groups={"conv": 4, "point": 6},
    frozen={"out": "output"},
    owned={"conv": lambda u: [*_linear("conv", "point")(u), ("depth.weight", at[u]), ("depth.bias", at[u])]},
)
def depthwise() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.depth(F.relu(m.conv(x))))
        return m.out(F.relu(m.point(h)).flatten(1))

    return Wire(
        forward,
        conv=nn.Conv2d(2, 4, 1),
        depth=nn.Conv2d(4, 4, 3, groups=4),
        point=nn.Conv2d(4, 6, 1),
        out=Linear(54, 3),
    )


@zoo(rows((2, 5, 5)), groups={"stem": 4, "conv1": 6}, frozen={"out": "output"}, train=True)
def residual_convolutions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        r = m.norm2(m.conv2(F.relu(m.norm1(m.conv1(h)))))
        return m.out(F.relu(h + r).mean((2, 3)))

    return Wire(
        forward,
        stem=nn.Conv2d(2, 4, 3, padding=1),
        conv1=nn.Conv2d(4, 6, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 4, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(4),
        out=Linear(4, 3),
    )


@zoo(rows((2, 5, 5)), groups={"conv": 4, "squeeze": 3}, frozen={"out": "output"})
def squeeze_and_excite() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv(x))
        gate = torch.sigmoid(m.excite(F.relu(m.squeeze(h.mean((2, 3))))))
        return m.out((h * gate[:, :, None, None]).amax((2, 3)))

    return Wire(forward, conv=nn.Conv2d(2, 4, 3), squeeze=Linear(4, 3), excite=Linear(3, 4), out=Linear(4, 3))


@zoo(
    rows((2, 3, 3)),
    groups={"enc": 4, "dec": 6},
    frozen={"out": "output"},
    optional=frozenset({"enc", "dec"}),
    owned={
        "enc": lambda u: [("enc.weight", at[u]), ("enc.bias", at[u]), ("dec.weight", at[u])],
        "dec": lambda u: [("dec.weight", at[:, u]), ("dec.bias", at[u]), ("out.weight", at[:, u])],
    },
)
def transposed_convolution() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.dec(F.relu(m.enc(x)))).mean((2, 3)))

    return Wire(forward, enc=nn.Conv2d(2, 4, 2), dec=nn.ConvTranspose2d(4, 6, 3, stride=2), out=Linear(6, 3))


@zoo(rows((2, 4, 4)), groups={"0": 4, "2": 6}, frozen={"5": "output"}, optional=frozenset({"0", "2"}))
def reflected_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        Linear(6, 3),
    )


@zoo(rows((2, 3, 3)), either=True)
def upsampled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2),
        ReLU(),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(4, 6, 3),
        ReLU(),
        nn.Flatten(),
        Linear(24, 3),
    )


@zoo(
    rows((2, 4, 4)),
    groups={"0[0:3]": 3, "0[3:6]": 3, "2[0:3]": 3, "2[3:6]": 3},
    frozen={"5": "output"},
    kill={"0[0:3]": "0.bias", "2[0:3]": "2.bias"},
    homogeneous=frozenset({"0[0:3]", "0[3:6]", "2[0:3]", "2[3:6]"}),
    owned={
        "0[0:3]": lambda u: [("0.weight", at[u]), ("0.bias", at[u]), ("2.weight", at[:3, u])],
        "0[3:6]": lambda u: [("0.weight", at[3 + u]), ("0.bias", at[3 + u]), ("2.weight", at[3:, u])],
        "2[0:3]": lambda u: [("2.weight", at[u]), ("2.bias", at[u]), ("5.weight", at[:, 4 * u : 4 * u + 4])],
    },
)
def grouped_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 2), ReLU(), nn.Conv2d(6, 6, 2, groups=2), ReLU(), nn.Flatten(), Linear(24, 3))


_MIXED = [0, 3, 1, 4, 2, 5]  # which channel stands where after a shuffle of two groups of three: 2 and 3 go over


@zoo(
    rows((2, 6)),
    groups={
        "stem[0:2]": 2,
        "stem[2:4]": 2,
        "first[0:2]": 2,
        "first[4:6]": 2,
        "last[0:4]": 4,
        "last[4:8]": 4,
    },
    frozen={"first[2:3]": "one unit alone", "first[3:4]": "one unit alone", "out": "output"},
    owned={
        "first[0:2]": lambda u: [("first.weight", at[u]), ("first.bias", at[u]), ("last.weight", at[:4, [0, 2][u]])],
        "first[4:6]": lambda u: [
            ("first.weight", at[4 + u]),
            ("first.bias", at[4 + u]),
            ("last.weight", at[4:, [0, 2][u]]),
        ],
    },
)
def shuffled_between_groups() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(torch.tanh(m.stem(x))))
        return m.out(torch.tanh(m.last(h[:, _MIXED])).mean(2))

    parts = {"first": nn.Conv1d(4, 6, 1, groups=2), "last": nn.Conv1d(6, 8, 3, groups=2), "out": Linear(8, 3)}
    return Wire(forward, stem=nn.Conv1d(2, 4, 3), **parts)


@zoo(
    rows((10,)),
    groups={"W1[0:3]": 3, "W1[3:6]": 3, "W2[0:4]": 4, "W2[4:8]": 4},
    frozen={"out": "output"},
    homogeneous=frozenset({"W1[0:3]", "W1[3:6]", "W2[0:4]", "W2[4:8]"}),
    owned={
        "W1[0:3]": lambda u: [("W1", at[u]), ("b1", at[u]), ("W2", at[:4, u])],
        "W1[3:6]": lambda u: [("W1", at[3 + u]), ("b1", at[3 + u]), ("W2", at[4:, u])],
        "W2[4:8]": lambda u: [("W2", at[4 + u]), ("b2", at[4 + u]), ("out.weight", at[:, 4 + u])],
    },
)
def two_networks_in_one_product() -> nn.Module:
    """Blocks of a weight's rows as a batch of matrices, on either side: a grouped convolution in other words."""

    def forward(m: Any, x: Tensor) -> Tensor:
        each = x.reshape(len(x), 2, 5).permute(1, 2, 0)
        h = F.relu(torch.baddbmm(m.b1.view(2, 3, 1), m.W1.view(2, 3, 5), each)).mT
        h = F.relu(torch.baddbmm(m.b2.view(2, 1, 4), h, m.W2.view(2, 4, 3).mT))
        return m.out(h.transpose(0, 1).flatten(1))

    biases = {"b1": nn.Parameter(torch.randn(6)), "b2": nn.Parameter(torch.randn(8))}
    return Wire(forward, W1=weights(6, 5), W2=weights(8, 3), out=Linear(8, 3), **biases)


@zoo(
    rows((2, 5, 5)),
    groups={"stem": 8, "reduce[0:2]": 2, "reduce[2:4]": 2, "middle[0:2]": 2, "middle[2:4]": 2},
    frozen={"out": "output"},
    unfoldable={"reduce[0:2]": "pad"},
    owned={
        "stem": lambda u: [
            *_linear("stem", "reduce", "out")(u),
            *[("expand.weight", at[u]), ("expand.bias", at[u])],
        ],
        "reduce[2:4]": lambda u: [
            ("reduce.weight", at[2 + u]),
            ("reduce.bias", at[2 + u]),
            ("middle.weight", at[2:, u]),
        ],
    },
)
def residual_block_in_groups() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        return m.out((h + m.expand(F.elu(m.middle(F.elu(m.reduce(h)))))).mean((2, 3)))

    return Wire(
        forward,
        stem=nn.Conv2d(2, 8, 2),
        reduce=nn.Conv2d(8, 4, 1),
        middle=nn.Conv2d(4, 4, 3, padding=1, groups=2),
        expand=nn.Conv2d(4, 8, 1),
        out=Linear(8, 3),
    )


@zoo(
    rows((2, 6)),
    groups={"conv": 4},
    frozen={"out": "output"},
    owned={
        "conv": lambda u: [
            *[("conv.weight", at[u]), ("conv.bias", at[u])],
            *[("depth.weight", at[2 * u : 2 * u + 2]), ("depth.bias", at[2 * u : 2 * u + 2])],
            ("out.weight", at[:, 2 * u : 2 * u + 2]),
        ]
    },
)
def two_depthwise_kernels_a_channel() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.depth(F.relu(m.conv(x))).mean(2))

    return Wire(forward, conv=nn.Conv1d(2, 4, 2), depth=nn.Conv1d(4, 8, 3, groups=4), out=Linear(8, 3))


@zoo(
    rows((2, 3, 3)),
    groups={"conv": 4, "mixed": 4},
    frozen={"out": "output"},
    owned={"conv": lambda u: [*_linear("conv", "mixed")(u), ("up.weight", at[u]), ("up.bias", at[u])]},
)
def depthwise_transposed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.mixed(F.relu(m.up(m.conv(x))))).mean((2, 3)))

    parts = {"up": nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), "mixed": nn.Conv2d(4, 4, 1), "out": Linear(4, 3)}
    return Wire(forward, conv=nn.Conv2d(2, 4, 2), **parts)


@zoo(rows((2, 3, 3)), frozen={"conv": "'up.weight' in 2 groups has no rule", "up": "", "out": "output"})
def transposed_in_groups() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.up(m.conv(x))).mean((2, 3)))

    return Wire(forward, conv=nn.Conv2d(2, 4, 2), up=nn.ConvTranspose2d(4, 4, 2, groups=2), out=Linear(4, 3))


@zoo(rows((2, 3, 3)), either=True)
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 2),
        ReLU(),
        nn.PixelShuffle(2),
        nn.Conv2d(2, 4, 3),
        ReLU(),
        nn.Flatten(),
        Linear(16, 3),
    )


@zoo(rows((2, 4, 4)), groups={"conv1": 4}, frozen={"conv2": "output"}, unfoldable={"conv1": "pad"})
def zeros_padded_by_hand() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv2(F.pad(F.relu(m.conv1(x)), (1, 1, 1, 1)))

    return Wire(forward, conv1=nn.Conv2d(2, 4, 3), conv2=nn.Conv2d(4, 3, 3))


# ---------------------------------------------------------------- units that meet one another


@zoo(rows((5,)), groups={"fc": 8}, frozen={"out": "output"}, inexact={"fc": "layernorm"})
def layernorm_over_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.norm(m.fc(x))))

    return Wire(forward, fc=Linear(5, 8), norm=nn.LayerNorm(8), out=Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    constant={"fc": 0.7},
    owned={"fc": _linear("fc", "out")},
)
def layernorm_of_the_input() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(m.norm(x))))

    return Wire(forward, norm=nn.LayerNorm(5), fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), either=True)
def softmax_over_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.softmax(m.fc2(F.relu(m.fc1(x))), 1))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc": 8}, frozen={"out": "output"}, inexact={"fc": "linalgvectornormmixestheunits"})
def unit_length() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.normalize(F.relu(m.fc(x)), dim=1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((4, 4, 4)), either=True)
def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 2), nn.GroupNorm(3, 6), ReLU(), nn.Conv2d(6, 4, 2), nn.GroupNorm(4, 4), ReLU(),
        nn.Flatten(), Linear(16, 3),
    )  # fmt: skip


@zoo(
    rows((2, 4, 4)),
    groups={"0": 4, "3": 6},
    frozen={"7": "output"},
    train=True,
    kill={"0": "1.bias"},
    owned={
        "0": lambda u: [*_linear("0", "3")(u), ("1.weight", at[u]), ("1.bias", at[u])],
        "3": lambda u: [
            *[("3.weight", at[u]), ("3.bias", at[u]), *_batchnorm("4", u)],
            ("7.weight", at[:, 4 * u : 4 * u + 4]),
        ],
    },
)
def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True), ReLU(),
        nn.Conv2d(4, 6, 2), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.Tanh(),
        nn.Flatten(), Linear(24, 3),
    )  # fmt: skip


@zoo(rows((5,)), groups={"0": 8}, frozen={"3": "output"}, inexact={"0": "aten.meanmixestheunits"})
def rms_norm() -> nn.Module:
    return nn.Sequential(Linear(5, 8), nn.RMSNorm(8), ReLU(), Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"stream": 6, "up": 8},
    frozen={"out": "output"},
    inexact={"stream": "aten.meanmixestheunits"},
    kill={"up": "up.bias"},
)
def rms_norm_by_hand_in_a_residual_stream() -> nn.Module:
    def normed(h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stream(x)
        h = h + m.down(F.relu(m.up(normed(h) * m.gain)))
        return m.out(normed(h) * m.last_gain)

    parts = {"stream": Linear(5, 6), "up": Linear(6, 8), "down": Linear(8, 6), "out": Linear(6, 3)}
    return Wire(forward, gain=nn.Parameter(torch.rand(6)), last_gain=nn.Parameter(torch.rand(6)), **parts)


@zoo(rows((2, 4, 4)), groups={"conv": 6}, frozen={"out": "output"}, inexact={"conv": "mixestheunits"})
def layernorm_of_channels_by_hand() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.conv(x)
        h = (h - h.mean(1, keepdim=True)) / torch.sqrt(h.var(1, keepdim=True, unbiased=False) + 1e-5)
        return m.out(F.relu(h * m.gain[:, None, None] + m.shift[:, None, None]).mean((2, 3)))

    parts = {"gain": nn.Parameter(torch.rand(6) + 0.5), "shift": nn.Parameter(torch.randn(6))}
    return Wire(forward, conv=nn.Conv2d(2, 6, 2), out=Linear(6, 3), **parts)


@zoo(rows((5,)), groups={"fc2": 6}, frozen={"fc1": "aten.mean reduces over the units", "out": "output"})
def mean_of_units_scales_others() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc1(x))
        return m.out(F.relu(m.fc2(h)) * h.mean(1, keepdim=True))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), frozen={"fc": "aten.mean reduces over the units", "out": "output"})
def norm_with_its_gain_inside() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.out(h * (torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * m.gain))

    return Wire(forward, fc=Linear(5, 8), gain=nn.Parameter(torch.rand(8) + 0.5), out=Linear(8, 3))


# ---------------------------------------------------------------- attention


def _per_head(rows: Sequence[str], columns: str, *, at_once: int = 2, heads: int = 0) -> Owned:
    """Neighbouring rows of queries, keys and values, and columns of the output projection.

    ``heads``: one tensor holds all three, one behind the other, and so many heads each.
    """

    def owned(head: int) -> list[tuple[str, Index]]:
        starts = [at_once * (head + heads * part) for part in range(3 if heads else 1)]
        parts = [slice(start, start + at_once) for start in starts]
        own = slice(at_once * head, at_once * (head + 1))
        return [*((name, at[part]) for name in rows for part in parts), (columns, at[:, own])]

    return owned


def _linears(*names: str) -> list[str]:
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, time, channels of a head)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    return (scores @ v).transpose(1, 2).flatten(2)


@zoo(
    rows((4, 5)),
    groups={"q": 3},
    frozen={"out": "output"},
    train=True,
    owned={"q": _per_head(_linears("q", "k", "v"), "out.weight")},
)
def heads_by_hand() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(_attend(*(_by_head(part(x), 3) for part in (m.q, m.k, m.v))))

    return Wire(forward, q=Linear(5, 6), k=Linear(5, 6), v=Linear(5, 6), out=Linear(6, 3))


@zoo(
    rows((4, 5)),
    groups={"qkv": 3},
    frozen={"out": "output"},
    owned={"qkv": _per_head(_linears("qkv"), "out.weight", heads=3)},
)
def heads_of_one_projection() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(_attend(*(_by_head(part, 3) for part in m.qkv(x).chunk(3, -1))))

    return Wire(forward, qkv=Linear(5, 18), out=Linear(6, 3))


@zoo(
    rows((4, 5)),
    groups={"qkv": 3, "mlp": 6},
    frozen={"out": "output", "last": "output"},
    owned={
        "qkv": lambda u: [
            ("qkv.weight", at[6 * u : 6 * u + 6]),
            ("qkv.bias", at[6 * u : 6 * u + 6]),
            ("out.weight", at[:, 2 * u : 2 * u + 2]),
        ],
        "mlp": _linear("mlp", "last"),
    },
)
def causal_heads_with_sdpa() -> nn.Module:
    """Queries, keys and values of a head lie side by side."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = _by_head(m.qkv(x), 3).chunk(3, -1)
        x = m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)) + x
        return x + m.last(F.relu(m.mlp(x)))

    return Wire(forward, qkv=Linear(5, 18), out=Linear(6, 5), mlp=Linear(5, 6), last=Linear(6, 5))


@zoo(
    rows((4, 5)),
    groups={"q": 3},
    frozen={"out": "output"},
    owned={
        "q": lambda u: [
            *_per_head(_linears("q", "k", "v"), "out.weight", at_once=4)(u),
            ("temperature", at[u]),
        ]
    },
)
def rotary_heads() -> nn.Module:
    """Rotations of time, norms inside of each head and a temperature of its own."""

    def turned(x: Tensor) -> Tensor:
        angles = torch.arange(4.0, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype).repeat(2)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (_by_head(part(x), 3) for part in (m.q, m.k, m.v))
        return m.out(_attend(turned(m.norm(q)) * m.temperature, turned(m.norm(k)), v))

    parts = {name: Linear(5, 12) for name in "qkv"}
    return Wire(forward, **parts, out=Linear(12, 3), norm=nn.RMSNorm(4), temperature=weights(3, 1, 1))


@zoo(
    rows((4, 5)),
    groups={"q": 2},
    frozen={"out": "output"},
    owned={
        "q": lambda u: [
            *((n, at[4 * u : 4 * u + 4]) for n in _linears("q")),
            *((n, at[2 * u : 2 * u + 2]) for n in _linears("k", "v")),
            ("out.weight", at[:, 4 * u : 4 * u + 4]),
        ]
    },
)
def queries_that_share_keys() -> nn.Module:
    """Every two heads have one key and one value: four heads are two units."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q = _by_head(m.q(x), 4)
        k, v = (_by_head(part(x), 2).repeat_interleave(2, 1) for part in (m.k, m.v))
        return m.out(_attend(q, k, v))

    return Wire(forward, q=Linear(5, 8), k=Linear(5, 4), v=Linear(5, 4), out=Linear(8, 3))


@zoo(
    rows((4, 5)),
    groups={"q": 3},
    frozen={"out": "output"},
    owned={"q": _per_head(_linears("q", "k", "v"), "out.weight", at_once=4)},
)
def heads_of_a_fixed_size() -> nn.Module:
    """As many heads as there are rows for: heads come and go."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (m.q, m.k, m.v))
        return m.out(_attend(q, k, v))

    return Wire(forward, q=Linear(5, 12), k=Linear(5, 12), v=Linear(5, 12), out=Linear(12, 3))


@zoo(
    rows((4, 5)),
    groups={"v[0:2]": 2, "v[2:4]": 2, "v[4:6]": 2},
    frozen={"q": "aten.bmm", "k": "aten.bmm", "out": "output"},
)
def heads_with_slopes() -> nn.Module:
    """Each head looks back as far as its number says: they are not of a kind, the channels inside of them are."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (_by_head(part(x), 3) for part in (m.q, m.k, m.v))
        slopes = torch.tensor([1.0, 0.5, 0.25], dtype=x.dtype)[:, None, None] * torch.arange(4)
        scores = torch.softmax(q @ k.transpose(-1, -2) + slopes, -1)
        return m.out((scores @ v).transpose(1, 2).flatten(2))

    return Wire(forward, q=Linear(5, 6), k=Linear(5, 6), v=Linear(5, 6), out=Linear(6, 3))


@zoo(
    rows((4, 5)),
    groups={"v[0:2]": 2, "v[2:4]": 2},
    frozen={"q": "aten.bmm", "k": "aten.bmm", "out": "output"},
)
def heads_that_differ_inside() -> nn.Module:
    """In the second head the keys stand in another order: entry by entry the heads do not correspond."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (_by_head(part(x), 2) for part in (m.q, m.k, m.v))
        return m.out(_attend(q, torch.stack([k[:, 0], k[:, 1].flip(-1)], 1), v))

    return Wire(forward, q=Linear(5, 4), k=Linear(5, 4), v=Linear(5, 4), out=Linear(4, 3))


@zoo(
    rows((4, 8)),
    groups={"embed": 8, "attention.in_proj_weight": 2},
    frozen={"out": "output"},
    owned={
        "embed": lambda u: [
            *((name, at[u]) for name in _linears("embed", "attention.out_proj")),
            *((name, at[:, u]) for name in ("attention.in_proj_weight", "out.weight")),
        ],
        "attention.in_proj_weight": _per_head(
            ["attention.in_proj_weight", "attention.in_proj_bias"], "attention.out_proj.weight", at_once=4, heads=2
        ),
    },
)
def multihead_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        return m.out(F.relu(h + m.attention(h, h, h, need_weights=False)[0]).mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Wire(forward, embed=Linear(8, 8), attention=attention, out=Linear(8, 3))


@zoo(
    rows((4, 6), (3, 5)),
    groups={"attention.q_proj_weight": 3},
    frozen={"attention.out_proj": "output"},
    owned={
        "attention.q_proj_weight": lambda u: [
            *((f"attention.{name}_proj_weight", at[2 * u : 2 * u + 2]) for name in "qkv"),
            *(("attention.in_proj_bias", at[6 * part + 2 * u : 6 * part + 2 * u + 2]) for part in range(3)),
            ("attention.out_proj.weight", at[:, 2 * u : 2 * u + 2]),
        ]
    },
)
def cross_attention_whose_weights_are_not_read() -> nn.Module:
    return Wire(
        lambda m, x, y: m.attention(x, y, y)[0],
        attention=nn.MultiheadAttention(6, 3, kdim=5, vdim=5, batch_first=True),
    )


@zoo(
    rows((4, 6)),
    groups={"attention.in_proj_weight[12:14]": 2, **{f"attention.in_proj_weight[{i}:{i + 2}]": 2 for i in (14, 16)}},
    frozen={
        "attention.in_proj_weight[0:6]": "aten.bmm",  # torch scales the queries before they meet the keys
        "attention.in_proj_weight[6:12]": "aten.bmm",
        "attention.out_proj": "output",
    },
)
def attention_weights_returned() -> nn.Module:
    return Wire(lambda m, x: m.attention(x, x, x), attention=nn.MultiheadAttention(6, 3, batch_first=True))


_ENCODER: dict[str, Any] = {
    "groups": {"0": 8, "1.self_attn.in_proj_weight": 2, "1.linear1": 16},
    "frozen": {"3": "output"},
    "inexact": {"0": "layernormmixes"},
    "owned": {
        "1.self_attn.in_proj_weight": _per_head(
            ["1.self_attn.in_proj_weight", "1.self_attn.in_proj_bias"],
            "1.self_attn.out_proj.weight",
            at_once=4,
            heads=2,
        ),
        "1.linear1": _linear("1.linear1", "1.linear2"),
    },
}


@zoo(rows((4, 8)), **_ENCODER, kill={"1.linear1": "1.linear1.bias"}, homogeneous=frozenset({"1.linear1"}))
def transformer_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(Linear(8, 8), layer, nn.Flatten(), Linear(32, 3))


@zoo(rows((4, 8)), **_ENCODER, random=True)
def transformer_layer_with_dropout() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, activation="gelu", norm_first=True, batch_first=True)
    return nn.Sequential(Linear(8, 8), layer, nn.Flatten(), Linear(32, 3))


@zoo(rows((4, 5)), groups={"v": 6}, frozen={"q": "aten.bmm", "k": "aten.bmm", "out": "output"})
def attention_by_hand() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        scores = torch.softmax(m.q(x) @ m.k(x).transpose(1, 2) / 2, -1)
        return m.out((scores @ m.v(x)).flatten(1))

    return Wire(forward, q=Linear(5, 4), k=Linear(5, 4), v=Linear(5, 6), out=Linear(24, 3))


@zoo(rows((4, 5)), groups={"a": 8}, frozen={"b": "aten.bmm multiplies it", "out": "output"})
def products_of_all_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.b(F.relu(m.a(x)))
        return m.out((h @ h.transpose(1, 2)).flatten(1))

    return Wire(forward, a=Linear(5, 8), b=Linear(8, 6), out=Linear(16, 3))


# ---------------------------------------------------------------- sums and orders of units


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "sum"}, kill={"fc1": "fc1.bias"})
def sum_over_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.fc2(F.relu(m.fc1(x)))).sum(1).exp()

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "mean", "out": "output"}, kill={"fc1": "fc1.bias"})
def mean_over_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc2(F.relu(m.fc1(x)))).mean(1, keepdim=True))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(1, 3))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "sort", "out": "output"}, kill={"fc1": "fc1.bias"})
def sorted_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.fc2(F.relu(m.fc1(x))).sort(dim=1).values)

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "cumsum", "out": "output"}, kill={"fc1": "fc1.bias"})
def cumulative_units() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.fc2(F.relu(m.fc1(x))).cumsum(1))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,), batch=1), groups={"fc1": 8}, frozen={"fc2": "", "out": "output"})
def gathered_by_rank() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc2(F.relu(m.fc1(x)))
        return m.out(h.gather(1, h.argsort(1)))  # with one row of data, the order looks like a fixed one

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": ""}, optional=frozenset({"fc1"}))
def looked_up_by_argmax() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.table(m.fc2(F.relu(m.fc1(x))).argmax(1))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), table=nn.Embedding(6, 3))


@zoo(rows((5,)), groups={"fc2": 6}, frozen={"fc1": "", "out": "output"})
def scaled_by_a_python_number() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = float(F.relu(m.fc1(x)).square().mean())
        return m.out(F.relu(m.fc2(x)) * scale)

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(5, 6), out=Linear(6, 3))


@zoo(rows((5,)), either=True)
def winners_only() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.out(h * (h > h.mean(1, keepdim=True)))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), either=True)
def maxout() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.fc(x).view(-1, 4, 2).amax(-1))

    return Wire(forward, fc=Linear(5, 8), out=Linear(4, 3))


@zoo(rows((5,)), either=True)
def outer_product() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out((m.fa(x)[:, :, None] * m.fb(x)[:, None, :]).flatten(1))

    return Wire(forward, fa=Linear(5, 4), fb=Linear(5, 3), out=Linear(12, 3))


# ---------------------------------------------------------------- shared, tied, computed and fixed weights


@zoo(
    rows((5,), (5,)),
    groups={"enc": 6},
    frozen={"out": "output"},
    kill={"enc": "enc.bias"},
    constant={"enc": 0.7},
    owned={"enc": lambda u: [("enc.weight", at[u]), ("enc.bias", at[u]), ("out.weight", at[:, [u, 6 + u]])]},
)
def siamese() -> nn.Module:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return m.out(torch.cat([F.relu(m.enc(a)), F.relu(m.enc(b))], 1))

    return Wire(forward, enc=Linear(5, 6), out=Linear(12, 3))


@zoo(
    rows((5,), (5,)),
    groups={"enc": 6},
    frozen={"out": "output"},
    owned={"enc": _linear("enc", "out")},
)
def siamese_difference() -> nn.Module:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return m.out((F.relu(m.enc(a)) - F.relu(m.enc(b))).abs())

    return Wire(forward, enc=Linear(5, 6), out=Linear(6, 3))


@zoo(rows((5,), (5,)), either=True)
def two_layers_with_one_weight() -> nn.Module:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return m.out(torch.cat([F.relu(m.one(a)), F.relu(m.other(b))], 1))

    net = Wire(forward, one=Linear(5, 6), other=Linear(5, 6), out=Linear(12, 3))
    net.other.weight = net.one.weight
    return net


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"left|right": "output"},  # the bias makes them one
    unfoldable={"fc": "bias"},
    owned={"fc": _linear("fc", "left", "right")},
)
def two_consumers_with_one_bias() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.fc(x))
        return m.left(h), m.right(h)

    net = Wire(forward, fc=Linear(5, 8), left=Linear(8, 3), right=Linear(8, 3))
    net.right.bias = net.left.bias
    return net


@zoo(rows((5,)), either=True)
def one_bias_for_two_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc2(F.relu(m.fc1(x) + m.b)) + m.b))

    parts = {"fc1": Linear(5, 6, bias=False), "fc2": Linear(6, 6, bias=False), "out": Linear(6, 3)}
    return Wire(forward, b=nn.Parameter(torch.randn(6)), **parts)


@zoo(rows((5,)), either=True, train=True)
def one_batchnorm_for_two_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.norm(m.fc2(F.relu(m.norm(m.fc1(x)))))))

    return Wire(forward, fc1=Linear(5, 6), fc2=Linear(6, 6), norm=nn.BatchNorm1d(6), out=Linear(6, 3))


@zoo(rows((5,)), either=True)
def one_gain_in_two_parts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc1(x) * m.gain[:6])
        return m.out(F.relu(m.fc2(h) * m.gain[3:]))

    parts = {"fc1": Linear(5, 6), "fc2": Linear(6, 6), "out": Linear(6, 3)}
    return Wire(forward, gain=nn.Parameter(torch.rand(9) + 0.5), **parts)


@zoo(rows((5,)), groups={"fc2": 6}, frozen={"fc1": "", "out": "output"})
def penalty_is_returned() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.fc2(F.relu(m.fc1(x))))
        return m.out(h), m.fc1.weight.square().sum()

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,), (5,)), either=True)
def bilinear() -> nn.Module:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return m.out(F.relu(m.pair(F.relu(m.fa(a)), F.relu(m.fb(b)))))

    return Wire(forward, fa=Linear(5, 4), fb=Linear(5, 4), pair=nn.Bilinear(4, 4, 6), out=Linear(6, 3))


@zoo(rows((6,)), frozen={"a": "", "out": "output"})
def applied_to_itself() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.a(F.relu(m.a(x)))))

    return Wire(forward, a=Linear(6, 6), out=Linear(6, 3))


@zoo(rows((5,)), either=True)
def one_consumer_for_two_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fa(x))) + m.out(F.relu(m.fb(x)))

    return Wire(forward, fa=Linear(5, 6), fb=Linear(5, 6), out=Linear(6, 3))


@zoo(rows((5,)), frozen={"enc": ""})
def tied_autoencoder() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.enc(x)) @ m.enc.weight + m.shift

    return Wire(forward, enc=Linear(5, 6), shift=nn.Parameter(torch.randn(5)))


@zoo(
    rows((5,)),
    groups={"W1": 8},
    frozen={"W2": "output"},
    kill={"W1": "b1"},
    owned={"W1": lambda u: [("W1", at[:, u]), ("b1", at[u]), ("W2", at[u])]},
)
def bare_parameters() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(x @ m.W1 + m.b1) @ m.W2 + m.b2

    zeros = nn.Parameter(torch.zeros(3))
    return Wire(forward, W1=weights(5, 8), b1=nn.Parameter(torch.randn(8)), W2=weights(8, 3), b2=zeros)


@zoo(
    rows((6,)),
    either=True,
    owned={
        "W[0:8]": lambda u: [("W", at[u]), ("b", at[u]), ("out.weight", at[:, u])],
        "W[8:12]": lambda u: [("W", at[8 + u]), ("b", at[8 + u]), ("out.weight", at[:, 8 + u])],
    },
)
def rows_of_one_parameter() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = F.relu(F.linear(x, m.W[:8], m.b[:8]))
        b = torch.tanh(F.linear(x.flip(1), m.W[8:], m.b[8:]))
        return m.out(torch.cat([a, b], 1))

    return Wire(forward, W=weights(12, 6), b=nn.Parameter(torch.randn(12)), out=Linear(12, 3))


@zoo(rows((5,)), groups={"W1": 8}, frozen={"W2": "output"}, optional=frozenset({"W1"}))
def einsum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(torch.einsum("bi,oi->bo", x, m.W1))
        return torch.einsum("bi,oi->bo", h, m.W2)

    return Wire(forward, W1=weights(8, 5), W2=weights(3, 8))


@zoo(rows((4, 5)), groups={"fc": 8}, frozen={"mix": "as a whole", "out": "output"}, owned={"fc": _linear("fc", "out")})
def einsum_over_time() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.einsum("btc,ts->bsc", torch.tanh(m.fc(x)), m.mix))

    return Wire(forward, fc=Linear(5, 8), mix=weights(4, 3), out=Linear(8, 3))


@zoo(
    rows((4, 5)),
    groups={"fc": 8},
    frozen={"out": "output"},
    kill={"fc": "fc.bias"},
    owned={"fc": lambda u: [*_linear("fc", "out")(u), ("filters", at[:, :, u])]},
)
def einsum_with_a_filter_for_each_unit() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.einsum("btc,tsc->bsc", F.relu(m.fc(x)), m.filters))

    return Wire(forward, fc=Linear(5, 8), filters=weights(4, 3, 8), out=Linear(8, 3))


@zoo(
    rows((4, 5)),
    groups={"fc": 6, "up": 8},
    frozen={"tokens1": "as a whole", "tokens2": "as a whole", "out": "output"},
    kill={"up": "up.bias"},
    owned={
        "fc": lambda u: [*_linear("fc", "up", "out")(u), ("down.weight", at[u]), ("down.bias", at[u])],
        "up": _linear("up", "down"),
    },
)
def mlp_mixer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        h = h + m.tokens2(F.gelu(m.tokens1(h.transpose(1, 2)))).transpose(1, 2)
        return m.out((h + m.down(F.relu(m.up(h)))).mean(1))

    tokens = {"tokens1": Linear(4, 7), "tokens2": Linear(7, 4)}
    return Wire(forward, fc=Linear(5, 6), up=Linear(6, 8), down=Linear(8, 6), out=Linear(6, 3), **tokens)


@zoo(rows((4, 5)), groups={"fc1": 8, "fc2": 6}, frozen={"out": "output"}, **_RELU_THREE)
def graph_convolution() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.bmm(m.neighbours.expand(len(x), 4, 4), F.relu(m.fc1(x)))
        return m.out((m.neighbours @ F.relu(m.fc2(h))).amax(1))

    neighbours = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.25], [0, 0, 0.5, 0.5]])
    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), neighbours=neighbours, out=Linear(6, 3))


@zoo(
    rows((5,)),
    groups={"W1": 8, "W2": 6},
    frozen={"W3": "output"},
    owned={
        "W1": lambda u: [("W1", at[:, :, u]), ("b1", at[:, :, u]), ("W2", at[:, u])],
        "W2": lambda u: [("W2", at[:, :, u]), ("b2", at[:, :, u]), ("W3", at[:, u])],
    },
    unfoldable={"W1": "bias"},
    homogeneous=frozenset({"W1", "W2"}),
)
def ensemble_in_one_tensor() -> nn.Module:
    """A unit is one neuron in each member: they are split and recycled together."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(torch.baddbmm(m.b1, x.expand(2, *x.shape), m.W1))
        h = F.relu(torch.bmm(h, m.W2) + m.b2)
        return torch.bmm(h, m.W3)

    matrices = {"W1": weights(2, 5, 8), "W2": weights(2, 8, 6), "W3": weights(2, 6, 3)}
    return Wire(forward, b1=weights(2, 1, 8), b2=weights(2, 1, 6), **matrices)


@zoo(rows((5,)), groups={"fc2": 6}, frozen={"fc1": "", "out": "output"})
def masked_weights() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, m.fc1.weight * m.mask, m.fc1.bias))
        return m.out(F.relu(m.fc2(h)))

    mask = (torch.rand(8, 5) > 0.3).float()
    return Wire(forward, fc1=Linear(5, 8), mask=mask, fc2=Linear(8, 6), out=Linear(6, 3))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "a weight computed from 'out.weight'"})
def masked_consumer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc2(F.relu(m.fc1(x))))
        return F.linear(h, m.out.weight * m.mask, m.out.bias)

    mask = (torch.rand(3, 6) > 0.3).float()
    return Wire(forward, fc1=Linear(5, 8), mask=mask, fc2=Linear(8, 6), out=Linear(6, 3))


def _noisy(m: Any, name: str, x: Tensor) -> Tensor:
    """Fortunato et al. (2018): every weight is a mean plus a trained multiple of factorised noise."""
    into, out = getattr(m, f"{name}_noise_in"), getattr(m, f"{name}_noise_out")
    weight = getattr(m, f"{name}_mu") + getattr(m, f"{name}_sigma") * torch.outer(out, into)
    return F.linear(x, weight, getattr(m, f"{name}_bias") + getattr(m, f"{name}_bias_sigma") * out)


def _noisy_parts(name: str, into: int, out: int) -> dict[str, Tensor]:
    matrices = {f"{name}_mu": weights(out, into), f"{name}_sigma": weights(out, into)}
    vectors = {f"{name}_bias": nn.Parameter(torch.randn(out)), f"{name}_bias_sigma": nn.Parameter(torch.randn(out))}
    return {**matrices, **vectors, f"{name}_noise_in": torch.randn(into), f"{name}_noise_out": torch.randn(out)}


@zoo(
    rows((5,)),
    groups={"fc1": 8},
    frozen={
        "fc2": "a weight computed from 'hidden_mu' and 'hidden_sigma'",
        "hidden_mu": "as a whole",
        "hidden_sigma": "as a whole",
        "out_mu": "as a whole",
    },
    kill={"fc1": "fc1.bias"},
)
def noisy_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc2(F.relu(m.fc1(x))))
        return _noisy(m, "out", F.relu(_noisy(m, "hidden", h)))

    parts = {**_noisy_parts("hidden", 6, 6), **_noisy_parts("out", 6, 3)}
    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), **parts)


@zoo(rows((5,)), either=True)
def weight_norm() -> nn.Module:
    wrap = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(wrap(Linear(5, 8)), ReLU(), wrap(Linear(8, 6)), ReLU(), Linear(6, 3))


@zoo(rows((5,)), either=True)
def spectral_norm() -> nn.Module:
    wrap = torch.nn.utils.parametrizations.spectral_norm
    return nn.Sequential(Linear(5, 8), ReLU(), wrap(Linear(8, 6)), ReLU(), Linear(6, 3))


@zoo(
    rows((5,)),
    groups={"fc3": 6},
    frozen={"fc1": "requires_grad", "fc2": "requires_grad", "out": "output"},
    kill={"fc3": "fc3.bias"},
)
def fixed_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc3(F.relu(m.fc2(F.relu(m.fc1(x)))))))

    fixed = Linear(8, 6).requires_grad_(False)
    return Wire(forward, fc1=Linear(5, 8), fc2=fixed, fc3=Linear(6, 6), out=Linear(6, 3))


@zoo(
    tokens(7, 3),
    groups={"table": 4, "fc": 8},
    frozen={"out": "output"},
    optional=frozenset({"table"}),
    owned={"table": lambda u: [("table.weight", at[:, u]), ("fc.weight", at[:, u::4])]},
)
def embedding() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(m.table(x).flatten(1))))

    return Wire(forward, table=nn.Embedding(7, 4), fc=Linear(12, 8), out=Linear(8, 3))


# ---------------------------------------------------------------- recurrence


def _recurrent(name: str, gates: int, width: int, suffix: str = "_l0") -> Owned:
    def owned(u: int) -> Sequence[tuple[str, Index]]:
        blocks = [u + width * g for g in range(gates)]
        incoming = [(f"{name}.{part}{suffix}", at[blocks]) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return [*incoming, (f"{name}.weight_hh{suffix}", at[:, u]), ("out.weight", at[:, u])]

    return owned


@zoo(
    rows((4, 3)),
    groups={"lstm": 5},
    frozen={"out": "output"},
    optional=frozenset({"lstm"}),
    owned={"lstm": _recurrent("lstm", 4, 5)},
)
def lstm() -> nn.Module:
    return Wire(lambda m, x: m.out(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(3, 5, batch_first=True), out=Linear(5, 3))


@zoo(
    rows((4, 3)),
    groups={"gru": 5},
    frozen={"out": "output"},
    optional=frozenset({"gru"}),
    owned={"gru": _recurrent("gru", 3, 5)},
)
def gru() -> nn.Module:
    return Wire(lambda m, x: m.out(m.gru(x)[0].mean(1)), gru=nn.GRU(3, 5, batch_first=True), out=Linear(5, 3))


@zoo(
    rows((4, 3)),
    groups={"cell": 5},
    frozen={"out": "output"},
    optional=frozenset({"cell"}),
    owned={"cell": _recurrent("cell", 1, 5, suffix="")},
)
def rnn_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5)
        for step in x.unbind(1):
            h = m.cell(step, h)
        return m.out(h)

    return Wire(forward, cell=nn.RNNCell(3, 5), out=Linear(5, 3))


@zoo(rows((3,), (5,)), frozen={"cell": ""}, either=True)
def state_from_outside() -> nn.Module:
    def forward(m: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = m.cell(x, h)
        return m.out(h), h

    return Wire(forward, cell=nn.GRUCell(3, 5), out=Linear(5, 3))


@zoo(rows((4, 3)), either=True)
def two_lstm_layers() -> nn.Module:
    return Wire(
        lambda m, x: m.out(m.lstm(x)[0][:, -1]),
        lstm=nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True),
        out=Linear(8, 3),
    )


# ---------------------------------------------------------------- what no trace of operations can follow


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "", "out": "output"}, optional=frozenset({"fc1"}))
def through_numpy() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc2(F.relu(m.fc1(x)))
        return m.out(torch.from_numpy(h.detach().numpy() * 2.0))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


class _SortInNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sort(x.detach().numpy(), axis=1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "", "out": "output"}, optional=frozenset({"fc1"}))
def own_function_in_numpy() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(_SortInNumpy.apply(m.fc2(F.relu(m.fc1(x)))))

    return Wire(forward, fc1=Linear(5, 8), fc2=Linear(8, 6), out=Linear(6, 3))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(1)


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    optional=frozenset({"fc"}),
    owned={"fc": lambda u: [("fc.weight", at[u]), ("fc.bias", at[u]), ("out.weight", at[:, 7 - u])]},
)
def own_function_in_torch() -> nn.Module:
    return Wire(lambda m, x: m.out(_Reverse.apply(F.relu(m.fc(x)))), fc=Linear(5, 8), out=Linear(8, 3))


# ---------------------------------------------------------------- more layouts, weights and cells


@zoo(rows((2, 6, 6)), groups={"conv": 8}, frozen={"out": "output"})
def channel_shuffle() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv(x))
        return m.out(h.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2).mean((2, 3)))

    return Wire(forward, conv=nn.Conv2d(2, 8, 3), out=Linear(8, 3))


@zoo(rows((5,)), groups={"fc1": 8}, frozen={"fc2": "aten.add", "out": "output"})
def layer_scale() -> nn.Module:
    return Wire(
        lambda m, x: m.out(x + m.scale * m.fc2(F.relu(m.fc1(x)))),
        fc1=Linear(5, 8),
        fc2=Linear(8, 5),
        scale=weights(5),
        out=Linear(5, 3),
    )


@zoo(rows((4, 5)), groups={"fc": 8}, frozen={"out": "output"})
def summed_over_a_set() -> nn.Module:
    return Wire(lambda m, x: m.out(F.relu(m.fc(x)).sum(1)), fc=Linear(5, 8), out=Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    owned={"fc": lambda u: [("fc.weight", at[u]), ("fc.bias", at[u]), ("out.weight", at[:, 7 - u])]},
)
def flipped() -> nn.Module:
    return Wire(lambda m, x: m.out(F.relu(m.fc(x)).flip(-1)), fc=Linear(5, 8), out=Linear(8, 3))


@zoo(rows((5,)), groups={}, frozen={"w": "'w' is used by aten.tanh as a whole", "out": "output"})
def weights_computed_from_parameters() -> nn.Module:
    return Wire(lambda m, x: m.out(F.relu(F.linear(x, m.w.tanh()))), w=weights(8, 5), out=Linear(8, 3))


@zoo(rows((4, 5)), groups={"v": 4}, frozen={"q": "aten.bmm", "k": "aten.bmm", "out": "output"})
def attention_with_sdpa() -> nn.Module:
    return Wire(
        lambda m, x: m.out(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        q=Linear(5, 4),
        k=Linear(5, 4),
        v=Linear(5, 4),
        out=Linear(4, 3),
    )


@zoo(rows((4, 3)), groups={"lstm": 6, "lstm (lstm.weight_hr_l0)": 4}, frozen={"out": "output"})
def lstm_with_projection() -> nn.Module:
    return Wire(
        lambda m, x: m.out(m.lstm(x)[0][:, -1]),
        lstm=nn.LSTM(3, 6, proj_size=4, batch_first=True),
        out=Linear(4, 3),
    )


# ---------------------------------------------------------------- zeros beside units, copies, compiled layers


@zoo(
    rows((2, 4, 4)),
    groups={"conv1": 4},
    frozen={"out": "output"},
    kill={"conv1": "conv1.bias"},
    owned={"conv1": lambda u: [("conv1.weight", at[u]), ("conv1.bias", at[u]), ("out.weight", at[:, 2 + u])]},
    unfoldable={"conv1": "zeros"},
)
def channels_padded_with_zeros() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.pad(F.relu(m.conv1(x)), (0, 0, 0, 0, 2, 1)).amax((2, 3)))

    return Wire(forward, conv1=nn.Conv2d(2, 4, 2), out=Linear(7, 3))


@zoo(rows((2, 6)), groups={"conv1": 4, "conv2": 6}, frozen={"out": "output"}, unfoldable={"conv1": "zeros"})
def causal_convolutions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv1(F.pad(x, (2, 0))))
        h = F.elu(m.conv2(F.pad(h, (4, 0))))
        return m.out(h[:, :, -1])

    parts = {"conv1": nn.Conv1d(2, 4, 3), "conv2": nn.Conv1d(4, 6, 3, dilation=2), "out": Linear(6, 3)}
    return Wire(forward, **parts)


@zoo(
    rows((5,)),
    groups={"fc": 8},
    frozen={"out": "output"},
    kill={"fc": "fc.bias"},
    owned={"fc": lambda u: [("fc.weight", at[u]), ("fc.bias", at[u]), ("out.weight", at[:, SHUFFLED.index(u)])]},
)
def gathered_by_a_constant() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = torch.tensor(SHUFFLED).expand(len(x), 8)
        return m.out(torch.gather(F.relu(m.fc(x)), 1, order))

    return Wire(forward, fc=Linear(5, 8), out=Linear(8, 3))


@zoo(
    rows((5,)),
    groups={"fa": 4, "fb": 3},
    frozen={"out": "output"},
    kill={"fa": "fa.bias"},
    owned={
        "fa": lambda u: [("fa.weight", at[u]), ("fa.bias", at[u]), ("out.weight", at[:, 1 + u])],
        "fb": lambda u: [("fb.weight", at[u]), ("fb.bias", at[u]), ("out.weight", at[:, 6 + u])],
    },
)
def written_in_slices() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 10)
        h[:, 1:5] = F.relu(m.fa(x))
        h[:, 6:9] = torch.tanh(m.fb(x))
        return m.out(h)

    return Wire(forward, fa=Linear(5, 4), fb=Linear(5, 3), out=Linear(10, 3))


@zoo(
    rows((2, 5, 5)),
    groups={"conv": 4, "fc": 6},
    frozen={"out": "output"},
    kill={"conv": "conv.bias", "fc": "fc.bias"},
    owned={"conv": _linear("conv", "fc"), "fc": _linear("fc", "out")},
)
def linear_over_channels_last() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv(x)).permute(0, 2, 3, 1).contiguous()
        return m.out(F.relu(m.fc(h)).mean((1, 2)))

    return Wire(forward, conv=nn.Conv2d(2, 4, 2), fc=Linear(4, 6), out=Linear(6, 3))


@zoo(
    rows((2, 5, 5)),
    groups={"0": 4, "2": 6},
    frozen={"5": "output"},
    owned={"2": lambda u: [("2.weight", at[u]), ("2.bias", at[u]), ("5.weight", at[:, 9 * u : 9 * u + 9])]},
)
def channels_last_memory() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 4, 2), ReLU(), nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Flatten(), Linear(54, 3))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@zoo(
    rows((5,)),
    groups={"fc1": 8, "fc2": 6},
    frozen={"out": "output"},
    kill={"fc1": "fc1.bias", "fc2": "fc2.bias"},
    owned={"fc1": lambda u: [*_linear("fc1", "fc2")(u), ("gain", at[2 * u if u < 4 else 15 - 2 * u])]},
)
def gain_copied_before_it_is_used() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        gains = torch.cat([m.gain, m.gain.flip(0)])
        h = F.relu(m.fc1(x)) * gains[::2]
        return m.out(F.relu(m.fc2(h)))

    return Wire(forward, fc1=Linear(5, 8), gain=nn.Parameter(torch.rand(8) + 0.5), fc2=Linear(8, 6), out=Linear(6, 3))
