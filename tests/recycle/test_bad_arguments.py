"""Whatever is passed to whatever is public: it works, or one line of ours says why not and nothing has changed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import agents
import recycle
from recycle.births import mirror, revive, zero_out
from recycle.methods.triggers import Every, Plateau, Rank, Score

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) for name in ("recycle", "agents"))
EXAMPLES = 1000
MANY = int(os.environ.get("BAD_ARGUMENTS", "10000"))
MADE_BY_US = {"Edit", "Graph", "NotRecyclable", "Report", "UnitGroup"}
"""Public names that nobody calls: what our functions return, of which the methods are called, and a union of types."""


class World:
    """A network that trains, all that belongs to it, and what it looked like before anybody touched it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        self.x = torch.randn(4, 2)
        self.other = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.learn()
        self.target = copy.deepcopy(self.net)
        self.graph = recycle.trace(self.net, lambda: self.net(self.x))
        self.elsewhere = recycle.trace(self.other, lambda: self.other(self.x))
        self.recycler = recycle.Recycler(
            self.graph, recycle.METHODS["redo"](), optimizers=[self.optimizer], sample_every=1
        )
        with self.recycler.listening():
            self.learn()
        self.recycler.detach()
        self.state = self.recycler.state_dict()
        self.report = self.recycler.report()
        self.modules = list(self.net.modules())
        self.tensors = self._tensors()
        self.kept = [tensor.clone() for tensor in self.tensors]
        self.hooks = self._hooks()

    def learn(self) -> None:
        """One update."""
        self.net(self.x).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _tensors(self) -> list[Tensor]:
        held = [state for of in self.optimizer.state.values() for state in of.values()]
        both = (self.net, self.target, self.other)
        return [*(p.detach() for net in both for p in net.parameters()), *(t for t in held if isinstance(t, Tensor))]

    def _hooks(self) -> list[int]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        modules = [*self.net.modules(), *self.target.modules(), *self.other.modules()]
        return [len(getattr(module, kind)) for module in modules for kind in kinds] + [
            len(self.optimizer._optimizer_step_post_hooks), len(self.optimizer._optimizer_step_pre_hooks)
        ]  # fmt: skip

    def resized(self) -> bool:
        """Whether there are other tensors or layers than before."""
        now = self._tensors()
        layers = list(self.net.modules())
        return (
            len(layers) != len(self.modules)
            or any(a is not b for a, b in zip(layers, self.modules, strict=True))
            or len(now) != len(self.tensors)
            or any(a.shape != b.shape or a.data_ptr() != b.data_ptr() for a, b in zip(now, self.tensors, strict=True))
        )

    def changed(self) -> str:
        """What is not as it was; "" if all is."""
        if self.resized():
            return "a tensor or a layer has been replaced"
        if not all(map(torch.equal, self.tensors, self.kept)):
            return "a tensor has other values"
        if self._hooks() != self.hooks:
            return "a hook stays"
        return ""

    def restored(self) -> World:
        """This one as it was, or a new one where it has other layers now."""
        self.recycler.detach()
        if self.resized() or self._hooks() != self.hooks:
            return World()
        for tensor, value in zip(self.tensors, self.kept, strict=True):
            tensor.copy_(value)
        for network in (self.net, self.target, self.other):
            network.requires_grad_(True).train()
            network.zero_grad()
        self.recycler.load_state_dict(self.state)
        return self


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 5, -1, -7, 2**31, 2**63, -(2**70), 0.0, 0.5, 1.0, -0.5, 1.5, 1e-300, 1e300, math.nan, math.inf,
     -math.inf, True, False]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["", "0", "2", "redo", "spilt", "fresh", "mean", "identity", "every:1", "rank:2", "plateau:", "score:x", "0.weight",
     "no.such.path", "nul\0", "Ünïcode ☃", "a:b", ".:x", "os:path", "x" * 300, "NaN", "1e3", "builtins:len"]
)  # fmt: skip
TENSORS = st.sampled_from(
    [torch.zeros(0), torch.tensor(1), torch.tensor([0, 2]), torch.tensor([0.5, 1]), torch.tensor([True, False, True]),
     torch.zeros(2, 2), torch.full((1, 2), math.nan), torch.zeros(1, 2, dtype=torch.long)]
)  # fmt: skip
UNITS = st.lists(st.integers(0, 3), max_size=3) | st.sampled_from([[0], [1, 1], [-1], [99], [2**63], range(2), (0, 2)])
JUNK = (
    NUMBERS | TEXTS | TENSORS | UNITS
    | st.sampled_from([None, object(), int, nn.ReLU, nn.ReLU(), b"0", {}, {"a": 1}, [], (), [None], ["0"], {0}, [[]],
                       len, print, lambda: None, lambda *a, **k: None, lambda: 1 / 0, [0.5], [True, False], Path("x"),
                       float("nan"), torch.float32, complex(1, 2), Every(1), [object()]])
)  # fmt: skip


def plausible(name: str, hint: str, world: World) -> list[Any]:
    """Values that an argument of that name may take, of this world and of another."""
    found = {
        "edit": [recycle.Reset([1]), recycle.Split([0], [2], noise=0.1), recycle.Fold([0], [0.5]), recycle.Merge(0, 1),
                 recycle.Reset([0], revive), recycle.Reset([9]), recycle.Deepen(["0"]), recycle.Deepen(["9"])],
        "group": [world.graph["0"], world.graph["2"], world.elsewhere["0"]],
        "graph": [world.graph, world.elsewhere],
        "optimizers": [[world.optimizer], (), [world.optimizer, world.optimizer], world.optimizer,
                       [torch.optim.LBFGS(world.net.parameters())], [torch.optim.SGD(world.other.parameters(), 0.1)]],
        "targets": [[(world.target, 0.5)], [(world.target, 1.0)], [(world.other, 0.5)], [world.target],
                    [(world.target, math.nan)], [(world.target, 2)], [(world.target,)]],
        "generator": [torch.Generator().manual_seed(1), None],
        "method": [recycle.METHODS[name]() for name in ("monitor", "redo", "l2_init")] + ["redo",
                   recycle.METHODS["redo"]],
        "module": [world.net, world.other],
        "calls": [lambda: world.net(world.x), lambda: world.other(world.x)],
        "call": [world.net, world.other, lambda x: x, lambda x: world.net(x.unsqueeze(3))],
        "low": [torch.zeros(1, 2), [torch.zeros(1, 2)], {"a": torch.zeros(1, 2)}],
        "high": [torch.ones(1, 2), [torch.ones(1, 2)], {"b": torch.ones(1, 2)}, -torch.ones(1, 2)],
        "birth": [zero_out, mirror, revive, None, lambda newborns: newborns],
        "state": [world.state, {}, world.state | {"tracker": {}}, world.state | {"generator": 1},
                  {k: v for k, v in world.state.items() if k != "parent"}, world.state | {"events": "x"}],
        "loss": [lambda: world.net(world.x).sum(), None], "probe": [lambda: world.net(world.x), None],
        "examples": [lambda: (world.net(world.x), world.net(world.x).square().sum(1), torch.zeros(4, 2)),
                     lambda: world.net(world.x), None],
        "name": ["0", "2", "4", "redo", "split", "0.weight"], "names": ["redo", "redo+l2_init", ["split"],
                 "redo+split"],
        "when": ["rank:0.5", "every:2", "plateau:loss,1", "score", Every(1), Rank(), Plateau(), Score()],
        "by": [recycle.METHODS["gradmax"](), recycle.METHODS["redo"](), recycle.METHODS["senn"]()],
        "units": [[0], [1, 2]], "parents": [[0], [0, 1]], "into": [[2], [1, 2], None], "means": [[0.5], [0.0, 1.0]],
        "along": [[[1.0, 0.0, 0.5]], [[0.0, 0.0, 0.0]]], "count": [1, 2, 0], "child": [0], "parent": [1, "utility"],
        "layers": [["0"], ["2"], "0", ["0", "0"], ["9"]], "value": [0.5, torch.tensor(2.0)],
    }  # fmt: skip
    typed = {"int": [0, 1, 2, 5], "float": [0.0, 0.1, 0.5, 2], "bool": [True, False], "str": ["0", "redo"]}
    of_kind = [value for kind, values in typed.items() if kind in hint for value in values]
    return found.get(name, of_kind)


def subjects() -> dict[str, Callable[[World], Callable[..., Any]]]:
    """Everything public that can be called, by name, found by reflection."""
    found: dict[str, Callable[[World], Callable[..., Any]]] = {}
    for package in (recycle, agents):
        for name, thing in vars(package).items():
            ours = getattr(thing, "__module__", "").split(".")[0] in ("recycle", "agents")
            if not name.startswith("_") and callable(thing) and ours and name not in MADE_BY_US:
                found[f"{package.__name__}.{name}"] = lambda world, thing=thing: thing
    for name, kind in recycle.METHODS.items():
        found[f"METHODS[{name!r}]"] = lambda world, kind=kind: kind
    for kind in (Every, Rank, Plateau, Score):
        found[kind.__name__] = lambda world, kind=kind: kind
    held = {
        recycle.Graph: lambda world: world.graph,
        recycle.UnitGroup: lambda world: world.graph["0"],
        recycle.Report: lambda world: world.report,
        recycle.Recycler: lambda world: world.recycler,
    }
    for kind, of in held.items():
        for name, _ in inspect.getmembers(kind, inspect.isfunction):
            fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else ()
            if name not in fields and (not name.startswith("_") or name in ("__getitem__", "__contains__")):
                found[f"{kind.__name__}.{name}"] = lambda world, of=of, name=name: getattr(of(world), name)
    return found


SUBJECTS = subjects()


def arguments(draw: st.DrawFn, call: Callable[..., Any], world: World) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call: those it needs and some others, all plausible but perhaps one."""
    parameters = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    bad = draw(st.sampled_from([None, *(p.name for p in parameters)]))
    given, named = [], {}
    for parameter in parameters:
        needed = parameter.default is parameter.empty
        if not needed and parameter.name != bad and draw(st.integers(0, 3)):
            continue
        known = plausible(parameter.name, str(parameter.annotation), world)
        value = draw(JUNK if parameter.name == bad or not known else st.sampled_from(known))
        if parameter.kind is parameter.KEYWORD_ONLY or not needed:
            named[parameter.name] = value
        else:
            given.append(value)
    return given, named


def why_not_ours(error: BaseException) -> str:
    """Why an error is not one that our code raises on purpose about what it was given; "" if it is."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if not last.filename.startswith(OURS) or not (last.line or "").startswith("raise "):
        return f"it comes from {last.filename}:{last.lineno}: {last.line}"
    if not isinstance(error, (ValueError, TypeError, KeyError)):
        return "it is of a kind that nobody documents"
    return "" if len(str(error)) > 15 else "it says too little"


def use(made: Any, world: World) -> None:
    """What somebody does with an edit, a method or a recycler that could be made; not what would take hours."""
    counts = vars(made).values() if dataclasses.is_dataclass(made) else ()
    if not isinstance(made, recycle.Edit) and any(isinstance(each, int) and each > 1000 for each in counts):
        return
    if isinstance(made, recycle.Edit):
        recycle.apply(made, world.graph["0"], optimizers=[world.optimizer], targets=[(world.target, 0.5)])
    elif dataclasses.is_dataclass(made) and (hasattr(made, "on_networks") or hasattr(made, "needs")):
        if hasattr(made, "state_dict") and isinstance(made, (Every, Rank, Plateau, Score)):
            return
        if not isinstance(made, (Every, Rank, Plateau, Score)):
            made = recycle.Recycler(world.graph, made, optimizers=[world.optimizer], sample_every=1)
    if isinstance(made, recycle.Recycler):
        with made.listening():
            world.learn()
        try:
            made.step()
        finally:
            made.detach()


def check(draw: st.DrawFn, held: list[World], counts: Counter[str]) -> None:
    world = held[0]
    name = draw(st.sampled_from(sorted(SUBJECTS)))
    call = SUBJECTS[name](world)
    given, named = arguments(draw, call, world)
    shown = f"{name}(*{given!r}, **{named!r})"
    counts["calls"] += 1
    problem = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = call(*given, **named)
        except Exception as error:
            counts["refused"] += 1
            if problem := why_not_ours(error) or world.changed():
                problem = f"{shown} ends in {type(error).__name__}: {error}\n{problem}"
        else:
            try:
                use(made, world)
            except Exception as error:
                counts["refused later"] += 1
                if problem := why_not_ours(error):
                    problem = f"{shown} was made, and ends in {type(error).__name__}: {error}\n{problem}"
    assert not problem, problem
    held[0] = world.restored()


def run(examples: int, number: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    held = [World()]

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(st.data())
    def every(data: st.DataObject) -> None:
        try:
            check(data.draw, held, counts)
        except BaseException:
            held[0] = World()
            raise

    every()
    return counts


def test_bad_arguments_are_refused_in_one_line() -> None:
    counts = run(EXAMPLES, 0)
    assert counts["refused"] > EXAMPLES // 4
    assert counts["calls"] - counts["refused"] > EXAMPLES // 8


@pytest.mark.slow
def test_many_bad_arguments_are_refused_in_one_line() -> None:
    counts = run(MANY, 1)
    print(counts)
    assert counts["refused"] > MANY // 4
