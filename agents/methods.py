"""What there is to choose from: ``python -m agents.methods`` lists every method, its options and its paper."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any

import tyro

import recycle
from agents.command_line import reported


@dataclass(frozen=True)
class Args:
    """List the methods of --method with their options, which --method-kwargs takes as key:value."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Only these methods, of recycle.METHODS or my_module:MyMethod; none: all built-in ones."""


@dataclass(frozen=True)
class Option:
    """One option of a method."""

    name: str
    default: Any
    """The value that it has if nothing is said; ``dataclasses.MISSING`` if something must be."""
    text: str
    """Its docstring on one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the list; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.methods")
    return reported(lambda: print("\n\n".join(described(name) for name in args.names or recycle.METHODS)))


def described(name: str) -> str:
    """A method's line, its paper and its options, as text.

    Raises:
        ValueError: there is no such method.
    """
    method = recycle.find(name)
    lines = [f"{name}: {' '.join((inspect.getdoc(method) or 'not described').split(chr(10) * 2)[0].split())}"]
    cited = paper(method)
    lines += [f"    {cited}"] * bool(cited)
    for option in options(method):
        default = "" if option.default is MISSING else f" = {option.default!r}"
        lines += textwrap.wrap(f"{option.name}{default}  {option.text}", 112, initial_indent="    ",
                               subsequent_indent="        ")  # fmt: skip
    return "\n".join(lines).replace("``", "")


def paper(method: Callable[..., Any]) -> str:
    """Authors, year and place as the first line of the method's file has them in brackets, "" if it has none."""
    first = (inspect.getdoc(sys.modules[method.__module__]) or "").partition("\n")[0]
    cited = re.search(r"\(([^()]*\b(?:19|20)\d\d\b.*)\)", first)
    return cited.group(1) if cited else ""


def options(method: Callable[..., Any]) -> Iterator[Option]:
    """The fields of a method's class that its constructor takes; nothing for what is no dataclass."""
    if not is_dataclass(method):
        return
    texts = _field_docstrings(method)
    for field in fields(method):
        if field.init:
            made = field.default if field.default_factory is MISSING else field.default_factory()
            yield Option(field.name, made, texts.get(field.name, ""))


def _field_docstrings(kind: Any) -> dict[str, str]:
    """The strings below the fields of a class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


if __name__ == "__main__":
    raise SystemExit(main())
