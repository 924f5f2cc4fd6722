"""The house plan: imports point down, each file has one place, everything public says what it is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "recycle").rglob("*.py"), *(ROOT / "agents").rglob("*.py")])

# From the ground up; a module may import from its own floor and from those below.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "recycle.names",
            "recycle.kinds",
            "recycle.clock",
            "recycle.graph",
            "recycle.rows",
            "recycle.labels",
            "recycle.firing",
            "recycle.injected",
        }
    ),
    frozenset({"recycle.response", "recycle.activations", "recycle.growth_sample", "recycle.natural_gradient"}),
    frozenset(
        {
            "recycle.elementwise",
            "recycle.products",
            "recycle.births",
            "recycle.clusters",
            "recycle.folding",
            "recycle.optimizers",
            "recycle.stats",
            "recycle.samples",
            "recycle.intervals",
            "recycle.junction",
            "recycle.merged",
            "recycle.outputs",
        }
    ),
    frozenset(
        {
            "recycle.rules",
            "recycle.heads",
            "recycle.resize",
            "recycle.proof",
            "recycle.edits",
            "recycle.fresh",
            "recycle.interventions",
            "recycle.inserted",
        }
    ),
    frozenset(
        {
            "recycle.tracing",
            "recycle.kept",
            "recycle.seen",
            "recycle.track",
            "recycle.surgery",
            "recycle.metrics",
            "recycle.bounds",
            "recycle.layers",
            "recycle.anchor",
            "recycle.injection",
            "recycle.deepening",
            "recycle.jumps",
            "recycle.nursery",
            "recycle.trial",
            "recycle.mistakes",
            "recycle.targets",
            "recycle.books",
        }
    ),
    frozenset({"recycle.methods", "recycle.report", "recycle.ranks", "recycle.editing", "recycle.remodelling"}),
    frozenset({"recycle.recycler"}),
    frozenset({"recycle"}),  # __init__: the public names
    frozenset({"agents"}),
)
LIBRARIES = {"torch", "numpy", "recycle"}  # all that recycle/ may know besides the standard library
NO_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in SOURCES}


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, also inside functions."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else base


def floor(module: str) -> int:
    """The floor that a module lives on: its own, or that of the nearest package that has one."""
    name = module
    while name:
        if name != "recycle" or module == "recycle":
            for level, members in enumerate(FLOORS):
                if name in members:
                    return level
        name = name.rpartition(".")[0]
    raise AssertionError(f"{module} has no place in the house: add it to FLOORS in {Path(__file__).name}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    for line, name in imports(module):
        if name in MODULES:
            assert floor(name) <= floor(module), f"{MODULES[module]}:{line} imports {name}, which stands above it"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.split(".")[0] == "recycle"))
def test_recycle_knows_only_torch_and_numpy(module: str) -> None:
    for line, name in imports(module):
        top = name.split(".")[0]
        assert top in LIBRARIES or top in sys.stdlib_module_names, f"{MODULES[module]}:{line} imports {name}"


def test_there_are_no_circles() -> None:
    edges = {m: {n for _, n in imports(m) if n in MODULES and n != m} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for below in sorted(edges[module]):
                visit(below, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_surgery_reads_no_statistic_and_methods_see_no_module() -> None:
    for module in MODULES:
        found = {name for _, name in imports(module)}
        if module == "recycle.surgery":
            assert not found & {"recycle.track", "recycle.metrics"}
        if module.startswith("recycle.methods"):
            assert not found & {
                "recycle.tracing",
                "recycle.proof",
                "recycle.outputs",
                "recycle.optimizers",
                "torch.nn",
                "torch.optim",
            }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_are_named_for_what_they_hold(module: str) -> None:
    assert not NO_NAMES & set(module.lower().split("."))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_everything_public_has_a_docstring(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{module} has no docstring"
    bare = [f"{module}.{name}" for name, node in public(tree) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {', '.join(bare)}"


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Every public class and function, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            last = node.body[-1]
            if isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...:
                continue  # an overload, or a protocol's signature
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")
