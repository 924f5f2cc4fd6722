"""Who is recycled, when, into what: one paper in a file.

A method is an object called with ``(group, stats)`` that returns a list of edits, and names in ``needs`` the
statistics it reads. It sees a group's shape and its statistics, never a module or an optimizer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from recycle.edits import Edit
from recycle.methods.cbp import ContinualBackprop
from recycle.methods.gradient_cutoff import GradientCutoff
from recycle.methods.mirror import Mirror
from recycle.methods.monitor import Monitor
from recycle.methods.random import Random
from recycle.methods.redo import ReDo
from recycle.methods.regrama import ReGraMa
from recycle.methods.revive import Revive
from recycle.methods.selection import Units
from recycle.methods.split import SplitDead
from recycle.names import did_you_mean
from recycle.stats import Stats


class Method(Protocol):
    """What a recycler needs of a method. No base class, no registration.

    One that remembers something from event to event also has ``state_dict()`` and ``load_state_dict(state)``.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the :class:`recycle.stats.Stats` fields that it reads; a class attribute will do."""
        ...

    def __call__(self, group: Units, stats: Stats) -> Sequence[Edit]:
        """The edits to make now; slots that matter most come first, since a cap may cut the rest."""
        ...


METHODS: dict[str, Callable[..., Method]] = {
    "monitor": Monitor,
    "random": Random,
    "split": SplitDead,
    "mirror": Mirror,
    "revive": Revive,
    "redo": ReDo,
    "cbp": ContinualBackprop,
    "regrama": ReGraMa,
    "gradient_cutoff": GradientCutoff,
}
"""The built-in methods by their names on the command line."""


def find(name: str) -> Callable[..., Method]:
    """The method class of that name, or of ``"my_module:MyMethod"``.

    Raises:
        ValueError: there is none; the message says which one may have been meant.
    """
    if name in METHODS:
        built_in: Callable[..., Method] = METHODS[name]
        return built_in
    if ":" in name:
        return _imported(name)
    raise ValueError(f"no method {name!r}: {did_you_mean(name, METHODS)}, or my_module:MyMethod")


def _imported(name: str) -> Callable[..., Method]:
    path, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no method {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"no method {name!r}: it is a {type(found).__name__}, not a class")
    method: Callable[..., Method] = found
    return method
