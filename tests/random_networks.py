"""Random networks: a hypothesis strategy that draws programs, one typed operation after another.

A program is the source of an ``nn.Module``: what a failing example prints can be pasted into a file and run.
Every line is executed as it is drawn, so that shapes are read from tensors rather than computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BATCH = 3
LARGEST = 160  # elements of one sample; larger values are reduced before anything else happens to them

Pick = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Program:
    """The source of a network, with what is needed to call it."""

    source: str
    inputs: tuple[str, ...]  # expressions that draw each input
    entries: tuple[str, ...]  # methods that are called with all inputs
    makers: tuple[tuple[str, int], ...]  # (parameter, axis) whose entries are rows of units
    training: bool  # the mode in which the network is traced

    def __repr__(self) -> str:
        return f"\n{self.source}\n# inputs: {', '.join(self.inputs)}; training={self.training}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print the fields, the source in one line

    def build(self, seed: int = 0) -> tuple[nn.Module, Calls]:
        """The network, in float64, and its entry points on the inputs of that seed."""
        with double(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
            exec(compile(self.source, "<random network>", "exec"), names)
            net: nn.Module = names["Net"]()
            net.train(self.training)
        return net, Calls(net, self)


class Calls:
    """Entry points of a network; ``draw`` gives them other inputs."""

    def __init__(self, net: nn.Module, program: Program) -> None:
        self.program = program
        self.held: list[Tensor] = []
        self.draw(0)
        self.all = [self._call(net, entry) for entry in program.entries]

    def _call(self, net: nn.Module, entry: str) -> Callable[[], Any]:
        return lambda: getattr(net, entry)(*self.held)

    def draw(self, seed: int) -> None:
        with double(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.held[:] = [eval(code, {"torch": torch}) for code in self.program.inputs]


@contextmanager
def double() -> Any:
    """New tensors are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Value:
    """A variable of the program. ``kind``: flat (B, F), time (B, T, F), line (B, C, L), map (B, C, H, W), grid (B, H, W, C)."""  # noqa: E501

    name: str
    kind: str
    tensor: Tensor = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def axis(self) -> int:
        """Where the features are."""
        return {"flat": 1, "time": 2, "line": 1, "map": 1, "grid": 3}[self.kind]

    @property
    def width(self) -> int:
        return self.tensor.shape[self.axis]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


class Writer:
    """Writes a program line by line and runs each line at once."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self.parts: list[str] = []
        self.lines: list[str] = []
        self.makers: dict[str, int] = {}
        self.layers: dict[str, tuple[str, int, str]] = {}  # layer -> kind and width it takes, kind it gives
        self.holder = nn.Module()
        self.names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.holder}
        self.values: list[Value] = []
        self.fixed: list[Tensor] = []  # what no line may write to: inputs, and what autograd guards
        self.count = 0

    def part(self, code: str, letter: str = "l") -> str:
        """A new layer, parameter or buffer: ``self.l0``."""
        name = f"{letter}{len(self.parts)}"
        made = eval(code, self.names)
        if isinstance(made, Tensor) and not isinstance(made, nn.Parameter):
            self.holder.register_buffer(name, made)
            self.parts.append(f"self.register_buffer({name!r}, {code})")
        else:
            setattr(self.holder, name, made)
            self.parts.append(f"self.{name} = {code}")
        return f"self.{name}"

    def let(self, code: str, kind: str, at: int | None = None) -> Value:
        """``v3 = code``."""
        self.count += 1
        name = f"v{self.count}"
        line = f"{name} = {code}"
        exec(line, self.names)
        self.lines.append(line)
        value = Value(name, kind, self.names[name])
        self.values.append(value)
        return value

    def run(self, line: str) -> None:
        """A line that makes no value."""
        exec(line, self.names)
        self.lines.append(line)

    def writable(self, value: Value) -> bool:
        held = {t.untyped_storage().data_ptr() for t in self.fixed}
        strided = value.tensor.numel() and all(
            s for s, n in zip(value.tensor.stride(), value.shape, strict=True) if n > 1
        )
        return value.tensor.untyped_storage().data_ptr() not in held and bool(strided)

    def other(self, like: Value, *, same_width: bool = True) -> Value | None:
        """Another value that can meet this one element by element."""
        fits = [
            v
            for v in self.values
            if v.kind == like.kind
            and v.name != like.name
            and all(
                a == b for d, (a, b) in enumerate(zip(v.shape, like.shape, strict=True)) if same_width or d != v.axis
            )
        ]
        return self.pick(fits) if fits else None


Step = Callable[[Writer, Value], None]
STEPS: dict[str, list[Step]] = {kind: [] for kind in ("flat", "time", "line", "map", "grid")}
EVERY = ("flat", "time", "line", "map", "grid")


def step(*kinds: str, weight: int = 1) -> Callable[[Step], Step]:
    """Offer an operation for values of these kinds, ``weight`` times as often."""

    def add(function: Step) -> Step:
        for kind in kinds:
            STEPS[kind] += [function] * weight
        return function

    return add


def index(value: Value, part: str) -> str:
    """``v[:, part]`` along the features."""
    return f"{value}[{':, ' * value.axis}{part}]"


def along(value: Value, code: str) -> str:
    """A vector's expression, shaped to meet the features."""
    return code + {"flat": "", "time": "", "line": "[:, None]", "map": "[:, None, None]", "grid": ""}[value.kind]


# ---------------------------------------------------------------- layers

WIDTHS = (2, 3, 4, 5, 6)


@step("flat", "time", "grid", weight=7)
def linear(w: Writer, v: Value) -> None:
    n = w.pick((4, 3, 2, 5, 6))
    layer = w.part(f"nn.Linear({v.width}, {n}, bias={w.pick((True, True, False))})")
    w.makers[f"{layer[5:]}.weight"] = 0
    w.layers[layer] = (v.kind, v.width, v.kind)
    w.let(f"{layer}({v})", v.kind)


@step("flat", "time", "grid", weight=2)
def bare_product(w: Writer, v: Value) -> None:
    n = w.pick((4, 3, 2))
    last = "bmm" if v.kind == "time" else "addmm" if v.kind == "flat" else "@"
    form = w.pick(("@", "einsum", "linear", "part", last, last))
    letters = {"flat": "b", "time": "bt", "grid": "bhw"}[v.kind]
    big = w.part(f"nn.Parameter(torch.randn({v.width + 2}, {n}) / 2)" if form == "part" else
                 f"nn.Parameter(torch.randn({n}, {v.width}) / 2)" if form == "linear" else
                 f"nn.Parameter(torch.randn({v.width}, {n}) / 2)", "p")  # fmt: skip
    w.makers[big[5:]] = 0 if form == "linear" else 1
    if form == "einsum":
        w.let(f"torch.einsum('{letters}f,fo->{letters}o', {v}, {big})", v.kind)
    elif form == "bmm":
        w.let(f"torch.bmm({v}, {big}.expand({v}.shape[0], -1, -1))", v.kind)
    elif form == "linear":
        w.let(f"F.linear({v}, {big})", v.kind)
    elif form == "part":
        start = w.pick((0, 1, 2))
        w.let(f"{v} @ {big}[{start}:{start + v.width}]", v.kind)
    elif form == "addmm":
        bias = w.part(f"nn.Parameter(torch.randn({n}))", "p")
        w.let(f"torch.addmm({bias}, {v}, {big})", v.kind)
    else:
        w.let(f"{v} @ {big}", v.kind)


@step("flat", "time")
def slices_of_one_parameter(w: Writer, v: Value) -> None:
    n = w.pick((2, 3))
    big = w.part(f"nn.Parameter(torch.randn({2 * n}, {v.width}) / 2)", "p")
    w.makers[big[5:]] = 0
    one = w.let(f"F.linear({v}, {big}[:{n}])", v.kind)
    two = w.let(f"F.linear({v}, {big}[{n}:])", v.kind)
    if w.pick((True, False)):
        w.let(f"{one} * torch.sigmoid({two})", v.kind)


@step(*EVERY, weight=2)
def call_again(w: Writer, v: Value) -> None:
    fits = [layer for layer, (kind, width, _) in w.layers.items() if (kind, width) == (v.kind, v.width)]
    if fits:
        layer = w.pick(fits)
        w.let(f"{layer}({v})", w.layers[layer][2])


@step("flat", weight=3)
def tied(w: Writer, v: Value) -> None:
    fits = [layer for layer in w.layers if w.layers[layer][0] == "flat" and w.layers[layer][1] > 1
            and eval(f"{layer}.weight.shape", w.names)[0] == v.width]  # fmt: skip
    if fits:
        w.let(f"F.linear({v}, {w.pick(fits)}.weight.t())", "flat")


@step("line", "map", weight=6)
def convolution(w: Writer, v: Value) -> None:
    n, dims = w.pick((4, 3, 2, 6)), 1 if v.kind == "line" else 2
    kernel = w.pick((1, 2, 3)) if min(v.shape[2:]) >= 3 else 1
    padding = w.pick((0, 0, kernel - 1))
    mode = w.pick(("zeros", "reflect", "circular")) if padding and padding < min(v.shape[2:]) else "zeros"
    groups = w.pick([g for g in (1, 1, 1, v.width, 2) if v.width % g == 0])
    n = n if n % groups == 0 else groups * w.pick((1, 2))
    layer = w.part(
        f"nn.Conv{dims}d({v.width}, {n}, {kernel}, padding={padding}, padding_mode={mode!r}, groups={groups}, "
        f"stride={w.pick((1, 1, 2))}, bias={w.pick((True, False))})"
    )
    w.makers[f"{layer[5:]}.weight"] = 0
    if padding == 0 and kernel == 1:
        w.layers[layer] = (v.kind, v.width, v.kind)
    w.let(f"{layer}({v})", v.kind)


@step("line", "map")
def transposed_convolution(w: Writer, v: Value) -> None:
    dims = 1 if v.kind == "line" else 2
    groups = w.pick([g for g in (1, 1, 2, v.width) if v.width % g == 0])
    layer = w.part(f"nn.ConvTranspose{dims}d({v.width}, {groups * w.pick((2, 3, 1))}, 2, groups={groups})")
    w.makers[f"{layer[5:]}.weight"] = 1
    w.let(f"{layer}({v})", v.kind)


@step("time", weight=3)
def recurrent_layer(w: Writer, v: Value) -> None:
    kind, n = w.pick(("LSTM", "GRU", "RNN")), w.pick((3, 2))
    more = w.pick(("", ", bidirectional=True", ", num_layers=2", ", proj_size=1" if kind == "LSTM" else ""))
    layer = w.part(f"nn.{kind}({v.width}, {n}, batch_first=True{more})")
    w.makers[f"{layer[5:]}.weight_ih_l0"] = 0
    w.let(f"{layer}({v})[0]", "time")


@step("time", weight=2)
def recurrent_cell(w: Writer, v: Value) -> None:
    kind, n = w.pick(("LSTMCell", "GRUCell", "RNNCell")), w.pick((3, 2))
    cell = w.part(f"nn.{kind}({v.width}, {n})")
    w.makers[f"{cell[5:]}.weight_ih"] = 0
    w.count += 1
    state = f"h{w.count}"
    w.run(f"{state} = None")
    for t in range(v.shape[1]):
        w.run(f"{state} = {cell}({v}[:, {t}], {state})")
    w.let(f"{state}[0]" if kind == "LSTMCell" else state, "flat")


@step("time")
def attention(w: Writer, v: Value) -> None:
    if w.pick((True, False)):
        w.let(f"F.scaled_dot_product_attention({v}, {v}, {v})", "time")
    elif v.width % 2 == 0:
        layer = w.part(f"nn.MultiheadAttention({v.width}, 2, batch_first=True)")
        w.let(f"{layer}({v}, {v}, {v})[0]", "time")


@step("time", weight=2)
def attention_heads(w: Writer, v: Value) -> None:
    count, size = w.pick((2, 3)), w.pick((2, 1))
    n = count * size
    bias = w.pick((True, False))
    if w.pick((True, False)):
        packed = w.part(f"nn.Linear({v.width}, {3 * n}, bias={bias})")
        w.makers[f"{packed[5:]}.weight"] = 0
        parts = [f"{w.let(f'{packed}({v})', 'time')}[..., {i * n}:{(i + 1) * n}]" for i in range(3)]
    else:
        layers = [w.part(f"nn.Linear({v.width}, {n}, bias={bias})") for _ in range(3)]
        w.makers.update({f"{layer[5:]}.weight": 0 for layer in layers})
        parts = [f"{layer}({v})" for layer in layers]
    query, key, value = (f"{part}.unflatten(-1, ({count}, {size})).transpose(1, 2)" for part in parts)
    if w.pick((True, False)):
        mixed = f"(({query} @ {key}.transpose(-1, -2)) * {size**-0.5}).softmax(-1) @ {value}"
    else:
        mixed = f"F.scaled_dot_product_attention({query}, {key}, {value})"
    out = w.part(f"nn.Linear({n}, {w.pick((3, 4))})")
    w.makers[f"{out[5:]}.weight"] = 0
    w.let(f"{out}(({mixed}).transpose(1, 2).flatten(2))", "time")


@step("flat", "time")
def parametrized(w: Writer, v: Value) -> None:
    wrap = w.pick(("nn.utils.parametrizations.weight_norm", "nn.utils.parametrizations.spectral_norm"))
    w.let(f"{w.part(f'{wrap}(nn.Linear({v.width}, 3))')}({v})", v.kind)


# ---------------------------------------------------------------- pointwise

ACTIVATIONS = (
    "torch.relu({})", "F.leaky_relu({}, 0.1)", "torch.tanh({})", "F.gelu({})", "F.silu({})", "F.elu({})",
    "F.softplus({})", "torch.sigmoid({})", "F.hardtanh({})", "F.relu6({})", "F.hardswish({})", "{}.abs()",
    "torch.where({} > 0, {}, 0.1 * {})", "{}.clamp(min=0)", "0.5 * {} + 1", "torch.maximum({}, torch.zeros_like({}))",
    "F.mish({})", "-{}", "F.threshold({}, 0.1, 0.0)", "torch.sin({})", "{}.clone()", "{} * 1.5",
)  # fmt: skip


@step(*EVERY, weight=5)
def activation(w: Writer, v: Value) -> None:
    w.let(w.pick(ACTIVATIONS).replace("{}", str(v)), v.kind)


@step(*EVERY)
def activation_module(w: Writer, v: Value) -> None:
    again = [p.split(" = ")[0] for p in w.parts if "nn.ReLU" in p or "nn.Tanh" in p]
    kinds = ("nn.ReLU()", "nn.Tanh()", "nn.PReLU()", f"nn.PReLU({v.width})", "nn.RReLU()")
    kinds += ("nn.Dropout(0.3)",) if w.writable(v) else ()  # it gives back its own input when it is off
    inplace = ("nn.ReLU(inplace=True)", "nn.LeakyReLU(inplace=True)") if w.writable(v) else ()
    usual = kinds if v.kind not in ("time", "grid") else tuple(k for k in kinds if k != f"nn.PReLU({v.width})")
    if again and w.pick((True, False)):
        layer = w.pick(again)
        if "inplace" not in next(p for p in w.parts if p.startswith(layer + " ")) or w.writable(v):
            w.let(f"{layer}({v})", v.kind)
            return
    w.let(f"{w.part(w.pick((*usual, *inplace)))}({v})", v.kind)


WRITES = ("F.relu({}, inplace=True)", "{}.tanh_()", "{}.mul_(0.7)", "{}.add_(0.1)", "{}.clamp_(min=0)")


@step("flat", "line", "map")
def slope_of_each_unit(w: Writer, v: Value) -> None:
    w.let(f"{w.part(f'nn.PReLU({v.width})')}({v})", v.kind)


@step(*EVERY)
def in_place(w: Writer, v: Value) -> None:
    if w.writable(v):
        w.run(w.pick(WRITES).format(v))


@step(*EVERY)
def in_place_part(w: Writer, v: Value) -> None:
    if w.writable(v) and v.width > 1:
        part = index(v, w.pick((":1", "1:", "::2")))
        w.run(f"{part} = {w.pick((f'torch.relu({part})', '0.0', f'{part} * 2', '0.5'))}")


@step(*EVERY, weight=2)
def per_unit(w: Writer, v: Value) -> None:
    gain = along(v, w.part(f"nn.Parameter(torch.randn({v.width}))", "g"))
    w.let(
        w.pick((f"{v} * {gain}", f"{v} + {gain}", f"{v} - {gain}", f"{gain} * {v}", f"{v} * torch.sigmoid({gain})")),
        v.kind,
    )


@step(*EVERY)
def one_number(w: Writer, v: Value) -> None:
    gain = w.part("nn.Parameter(torch.randn(1))", "g")
    w.let(f"{v} {w.pick(('*', '+'))} {gain}", v.kind)


@step("time")
def position(w: Writer, v: Value) -> None:
    w.let(f"{v} + {w.part(f'nn.Parameter(torch.randn({v.shape[1]}, {v.width}))', 'g')}", "time")


@step(*EVERY, weight=2)
def two_values(w: Writer, v: Value) -> None:
    u = w.other(v)
    if u is not None:
        forms = ("{} + {}", "{} + {}", "{} * torch.sigmoid({})", "{} - {}", "{} * {}", "torch.maximum({}, {})",
                 "torch.where({} > 0, {}, 0.0)", "torch.lerp({}, {}, 0.3)")  # fmt: skip
        w.let(w.pick(forms).format(v, u), v.kind)


@step(*EVERY)
def add_in_place(w: Writer, v: Value) -> None:
    u = w.other(v)
    if u is not None and w.writable(v):
        w.run(f"{v} {w.pick(('+=', '*='))} {u}")


@step(*EVERY)
def broadcast(w: Writer, v: Value) -> None:
    u = w.other(v)
    if u is not None:
        first = index(u, ":1")
        w.let(
            w.pick((f"{v} + {u}.mean(0, keepdim=True)", f"{v} + {first}", f"{v} * {first}", f"{v} + {u}[:1]")), v.kind
        )


@step("line", "map")
def gate_of_channels(w: Writer, v: Value) -> None:
    axes, more = ("-1", "[:, :, None]") if v.kind == "line" else ("(-2, -1)", "[:, :, None, None]")
    mean = w.let(f"{v}.mean({axes})", "flat")
    first = w.let(f"torch.relu({w.part(f'nn.Linear({v.width}, 2)')}({mean}))", "flat")
    w.let(f"{v} * torch.sigmoid({w.part(f'nn.Linear(2, {v.width})')}({first})){more}", v.kind)


# ---------------------------------------------------------------- normalisation


@step("flat", "line", "map", weight=2)
def batch_norm(w: Writer, v: Value) -> None:
    if v.kind != "flat" or v.shape[0] > 1:
        dims = "2d" if v.kind == "map" else "1d"
        how = w.pick(("", "", ", affine=False", ", track_running_stats=False"))
        w.let(f"{w.part(f'nn.BatchNorm{dims}({v.width}{how})')}({v})", v.kind)


@step("line", "map")
def channel_norm(w: Writer, v: Value) -> None:
    dims, place = ("2d", v.shape[2:]) if v.kind == "map" else ("1d", v.shape[2:])
    kinds = [f"nn.GroupNorm({v.width}, {v.width})", f"nn.GroupNorm(1, {v.width})"]
    kinds += [f"nn.GroupNorm({v.width // 2}, {v.width})"] if v.width % 2 == 0 else []
    kinds += [f"nn.InstanceNorm{dims}({v.width}{w.pick(('', ', affine=True', ', track_running_stats=True'))})"]
    if place.numel() > 1 if isinstance(place, torch.Size) else torch.Size(place).numel() > 1:
        w.let(f"{w.part(w.pick(kinds))}({v})", v.kind)


@step("flat", "time", "grid")
def layer_norm(w: Writer, v: Value) -> None:
    n = v.width
    kind = w.pick((f"nn.LayerNorm({n})", f"nn.LayerNorm({n}, elementwise_affine=False)", f"nn.RMSNorm({n})"))
    w.let(f"{w.part(kind)}({v})", v.kind)


@step(*EVERY)
def mixed(w: Writer, v: Value) -> None:
    a = v.axis
    w.let(
        w.pick((f"torch.softmax({v}, {a})", f"F.normalize({v}, dim={a})", f"{v}.cumsum({a})", f"{v}.sort({a}).values",
                f"{v} - {v}.mean({a}, keepdim=True)", f"{v} * (torch.arange({v.width}) > 0).to({v})[{'None, ' * a}:"
                f"{', None' * (v.tensor.dim() - a - 1)}]")),
        v.kind,
    )  # fmt: skip


@step(*EVERY)
def centred(w: Writer, v: Value) -> None:
    forms = [
        f"{v} - {v}.mean(0)",
        f"{v} / (1 + {v}.abs().amax(0, keepdim=True))",
        f"{v}.detach()",
        f"{v} - {v}.detach()",
    ]
    forms += [f"F.dropout({v}, 0.2, self.training)"] if w.writable(v) else []
    w.let(w.pick(forms), v.kind)


# ---------------------------------------------------------------- moving units


@step(*EVERY, weight=3)
def moved(w: Writer, v: Value) -> None:
    n, a = v.width, v.axis
    if n < 2:
        return
    order = sorted(range(n), key=lambda i: (i * 7 + w.count) % n)
    some = [0, n - 1]
    after = 2 * (v.tensor.dim() - 1 - a)
    forms = [
        f"{v}.flip({a})", f"{v}.roll(1, {a})", index(v, "1:"), index(v, f":{n - 1}"), index(v, "::2"),
        index(v, str(order)), index(v, str(some)), index(v, w.part(f"torch.tensor({order})", "i")), index(v, "[0, 0]"),
        f"torch.index_select({v}, {a}, torch.tensor({some}))", f"F.pad({v}, ({'0, ' * after}0, 1))",
        f"F.pad({v}, ({'0, ' * after}1, 0))", f"torch.cat([{index(v, '1:')}, {index(v, ':1')}], {a})",
        f"{v}.repeat_interleave(2, {a})", f"torch.gather({v}, {a}, torch.zeros_like({v}, dtype=torch.long))",
    ]  # fmt: skip
    w.let(w.pick(forms), v.kind)


@step("time", "line", "map", "grid")
def moved_beside(w: Writer, v: Value) -> None:
    d = 1 if v.kind in ("time", "grid") else 2
    forms = [f"{v}.flip({d})", f"{v}.roll(1, {d})", f"{v}.cumsum({d})"]
    if v.shape[d] > 2:
        forms += [
            f"{v}.narrow({d}, 1, {v.shape[d] - 1})",
            f"torch.gather({v}, {d}, torch.zeros_like({v}, dtype=torch.long))",
        ]
    if v.kind == "time":
        forms += [
            f"F.pad({v}, (0, 0, 1, 0))",
            f"{v}[:, [0, 0]]",
            f"torch.cat([torch.zeros_like({v}[:, :1]), {v}[:, 1:]], 1)",
        ]
    w.let(w.pick(forms), v.kind)


@step(*EVERY)
def chunked(w: Writer, v: Value) -> None:
    if v.width % 2 == 0:
        w.fixed.append(v.tensor)  # autograd lets nobody write to a piece of a split
        one = w.let(f"{v}.chunk(2, {v.axis})[0]", v.kind)
        two = w.let(f"{v}.chunk(2, {v.axis})[1]", v.kind)
        form = w.pick(("", "{} * torch.sigmoid({})", "torch.cat([{1}, {0}], {2})", "glu"))
        if form:
            code = f"F.glu({v}, {v.axis})" if form == "glu" else form.format(one, two, v.axis)
            w.let(code, v.kind)


@step(*EVERY, weight=2)
def joined(w: Writer, v: Value) -> None:
    u = w.other(v, same_width=False)
    if u is not None and v.width + u.width <= 10:
        w.let(f"torch.cat([{v}, {u}], {v.axis})", v.kind)


@step("line", "map")
def shuffled(w: Writer, v: Value) -> None:
    if v.width % 2 == 0 and v.width > 2:
        rest = ", ".join(map(str, v.shape[2:]))
        w.let(f"{v}.reshape(-1, 2, {v.width // 2}, {rest}).transpose(1, 2).reshape(-1, {v.width}, {rest})", v.kind)


@step("map", weight=4)
def space_from_channels(w: Writer, v: Value) -> None:
    if v.width % 4 == 0:
        w.let(f"F.pixel_shuffle({v}, 2)", "map")


# ---------------------------------------------------------------- changing layout


@step("flat")
def to_time(w: Writer, v: Value) -> None:
    if v.width % 2 == 0 and v.width > 2:
        w.let(
            w.pick((f"{v}.view(-1, {v.width // 2}, 2)", f"{v}.view(-1, 2, {v.width // 2})")), w.pick(("time", "line"))
        )
    else:
        w.let(f"torch.stack([{v}, {v}.flip(0)], 1)", "time")


@step("time", weight=2)
def from_time(w: Writer, v: Value) -> None:
    forms = (f"{v}.mean(1)", f"{v}.sum(1)", f"{v}.amax(1)", f"{v}[:, -1]", f"{v}.flatten(1)", f"{v}.max(1).values",
             f"torch.einsum('btf,t->bf', {v}, {w.part(f'nn.Parameter(torch.randn({v.shape[1]}))', 'g')})")  # fmt: skip
    w.let(w.pick(forms), "flat")


@step("time")
def time_to_line(w: Writer, v: Value) -> None:
    w.let(w.pick((f"{v}.transpose(1, 2)", f"{v}.permute(0, 2, 1).contiguous()")), "line")


@step("line")
def line_to_time(w: Writer, v: Value) -> None:
    w.let(f"{v}.transpose(1, 2)", "time")


@step("line", "map", weight=2)
def from_channels(w: Writer, v: Value) -> None:
    axes = "-1" if v.kind == "line" else "(-2, -1)"
    w.let(w.pick((f"{v}.mean({axes})", f"{v}.flatten(1)", f"{v}.amax({axes})", f"{v}.sum({axes})")), "flat")


@step("map")
def map_to_grid(w: Writer, v: Value) -> None:
    w.let(w.pick((f"{v}.permute(0, 2, 3, 1)", f"{v}.movedim(1, -1).contiguous()")), "grid")


@step("map")
def map_to_line(w: Writer, v: Value) -> None:
    w.let(w.pick((f"{v}.flatten(2)", f"{v}.mean(-1)")), "line")


@step("grid", weight=2)
def from_grid(w: Writer, v: Value) -> None:
    code, kind = w.pick(
        ((f"{v}.permute(0, 3, 1, 2)", "map"), (f"{v}.flatten(1)", "flat"), (f"{v}.flatten(1, 2)", "time"))
    )
    w.let(code, kind)


@step("line", "map", weight=2)
def pooled(w: Writer, v: Value) -> None:
    d = "1d" if v.kind == "line" else "2d"
    if min(v.shape[2:]) >= 2:
        forms = (f"F.max_pool{d}({v}, 2)", f"F.avg_pool{d}({v}, 2, padding=1)", f"F.adaptive_avg_pool{d}({v}, 1)",
                 f"F.adaptive_max_pool{d}({v}, 2)", f"F.interpolate({v}, scale_factor=2)",
                 f"F.pad({v}, (1, 0), mode='replicate')" if d == "1d" else f"F.pad({v}, (0, 1, 1, 0))")  # fmt: skip
        w.let(w.pick(forms), v.kind)


# ---------------------------------------------------------------- a whole program

INPUTS = {
    "flat": "torch.randn({b}, {n})",
    "time": "torch.randn({b}, 3, {n})",
    "line": "torch.randn({b}, {n}, 5)",
    "map": "torch.randn({b}, {n}, 4, 4)",
    "tokens": "torch.randint(5, ({b}, 3))",
}


def _body(w: Writer, inputs: list[tuple[str, str]], steps: int) -> list[str]:
    """One entry point: lines that end in a return."""
    w.lines, w.values = [], []
    for i, (kind, code) in enumerate(inputs):
        tensor = eval(code, {"torch": torch})
        w.names[f"x{i}"] = tensor
        w.fixed.append(tensor)
        if kind == "tokens":
            table = w.part(f"nn.Embedding(5, {w.pick((3, 4))})")
            w.makers[f"{table[5:]}.weight"] = 1
            w.let(f"{table}(x{i})", "time")
        else:
            w.values.append(Value(f"x{i}", kind, tensor))
    for _ in range(steps):
        recent = w.values[-4:]
        v = w.pick([recent[-1], *recent])
        if v.tensor[0].numel() > LARGEST:
            v = _reduced(w, v)
        if v.width and v.tensor.numel():
            w.pick(STEPS[v.kind])(w, v)
    return w.lines


def _reduced(w: Writer, v: Value) -> Value:
    if v.kind == "time":
        return w.let(f"{v}.mean(1)", "flat")
    if v.kind == "grid":
        return w.let(f"{v}.mean((1, 2))", "flat")
    return (
        w.let(f"{v}.mean({'-1' if v.kind == 'line' else '(-2, -1)'})", "flat")
        if v.kind != "flat"
        else w.let(f"{v}[:, :8]", "flat")
    )


def _returned(w: Writer) -> str:
    """One to three heads, sometimes a raw value."""
    given = []
    last = w.values[-1]
    for v in dict.fromkeys((last, *(w.pick(w.values) for _ in range(w.pick((0, 1, 1, 2)))))):
        flat = (
            v
            if v.kind == "flat"
            else w.let(f"{v}.flatten(1)" if v.tensor[0].numel() <= LARGEST else f"{_reduced(w, v)}", "flat")
        )
        if flat.tensor.numel() == 0:
            continue
        head = w.part(f"nn.Linear({flat.width}, {w.pick((1, 2))})")
        w.makers[f"{head[5:]}.weight"] = 0
        given.append(w.let(f"{head}({flat})", "flat").name)
    if w.pick((False, False, False, True)):
        given.append(w.pick(w.values).name)
    return f"return {', '.join(given)}"


@st.composite
def programs(draw: Any, steps: int = 16) -> Program:
    """Networks of up to ``steps`` operations in each of one or two entry points."""

    def pick(options: Sequence[Any]) -> Any:
        return options[draw(st.integers(0, len(options) - 1))]

    with double(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        w = Writer(pick)
        inputs = []
        for _ in range(pick((1, 1, 2))):
            kind = pick(("flat", "flat", "time", "line", "map", "tokens"))
            inputs.append((kind, INPUTS[kind].format(b=BATCH, n=pick((3, 2, 4)))))
        entries = ["forward", "second"][: pick((1, 1, 1, 2))]
        bodies = []
        for entry in entries:
            _body(w, inputs, 4 + draw(st.integers(0, steps - 4)))
            w.lines.append(_returned(w))
            bodies.append((entry, list(w.lines)))
    arguments = ", ".join(f"x{i}" for i in range(len(inputs)))
    text = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    text += [f"        {line}" for line in w.parts]
    for entry, lines in bodies:
        text += ["", f"    def {entry}(self, {arguments}):", *(f"        {line}" for line in lines)]
    makers = tuple(w.makers.items())
    return Program("\n".join(text), tuple(code for _, code in inputs), tuple(entries), makers, pick((True, False)))
