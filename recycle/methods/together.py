"""Which methods can act on one network together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from recycle.methods.grow import Growth
from recycle.methods.l2_init import L2Init
from recycle.methods.monitor import Monitor
from recycle.methods.net2deeper import Net2Deeper
from recycle.methods.plasticity_injection import PlasticityInjection
from recycle.names import did_you_mean
from recycle.stats import Stats


def edits_units(method: Any) -> bool:
    """Whether it decides about single units; ``monitor`` looks and leaves them alone."""
    return callable(method) and not isinstance(method, Monitor)


def joined(methods: Sequence[Any]) -> list[Any]:
    """The same methods, where ``grow`` grows by the one that edits units beside it: ``grow+gradmax``."""
    growth = [method for method in methods if isinstance(method, Growth) and method.by is None]
    others = [method for method in methods if edits_units(method) and not isinstance(method, Growth)]
    if len(growth) != 1 or len(others) != 1:
        return list(methods)
    made = replace(growth[0], by=others[0])
    return [made if method is growth[0] else method for method in methods if method is not others[0]]


def check_method(method: Any) -> None:
    """Raise a TypeError or ValueError that says what is missing, if this is no method."""
    if isinstance(method, type) or not (callable(method) or hasattr(method, "on_networks")):
        raise TypeError(f"a method is an object called with (group, stats), got {method!r}. Pass ReDo(), not ReDo")
    known = [f.name for f in fields(Stats)] + [k for k, v in vars(Stats).items() if isinstance(v, property)]
    for name in getattr(method, "needs", ()):
        if name not in known:
            raise ValueError(
                f"{type(method).__name__} needs {name!r}, no such statistic: {did_you_mean(str(name), known)}"
            )
    if not hasattr(method, "needs"):
        raise TypeError(f"{type(method).__name__} must name the statistics it reads in `needs`; () if none")


def check_together(methods: Sequence[Any]) -> None:
    """Raise a ValueError that says why, if these methods cannot act together.

    One that edits units goes with any that act on whole layers: ``redo`` with ``l2_init``, say.
    """
    if not methods:
        raise ValueError("a Recycler needs a method; to watch only, pass monitor")
    names = [type(method).__name__ for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice; pass one, with one set of options")
    if any(isinstance(method, PlasticityInjection) for method in methods) and not all(
        isinstance(method, (PlasticityInjection, Monitor)) for method in methods
    ):
        others = [name for name in names if name not in ("PlasticityInjection", "Monitor")]
        raise ValueError(
            f"plasticity_injection freezes weights, and {', '.join(others)} would change them. "
            "Pass it alone, or with monitor"
        )
    growth = next((method for method in methods if isinstance(method, Growth)), None)
    others = [method for method in methods if edits_units(method) and method is not growth]
    if growth is not None and growth.by is None and others:
        name = type(others[0]).__name__
        raise ValueError(f"to grow by what {name} proposes, pass Growth({name}()) in place of the two")
    deepens = any(
        isinstance(m, Net2Deeper) or getattr(m, "layer_cost", None) is not None or getattr(m, "deepen", 0)
        for m in methods
    )
    if deepens and any(isinstance(m, L2Init) for m in methods):
        raise ValueError(
            "l2_init draws layers to where they began, and inserted ones begin later, under paths that others had. "
            "Pass one of them"
        )
    editors = [type(method).__name__ for method in methods if edits_units(method)]
    if len(editors) > 1:
        raise ValueError(
            f"{' and '.join(editors)} both edit single units, and the second would judge the first one's newborns by "
            "what their places showed before. Pass one of them; those that act on whole layers go with any"
        )
