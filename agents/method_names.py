"""Methods by the names and options that users type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import recycle
from recycle.kinds import check_arguments
from recycle.methods.together import check_together, joined
from recycle.names import did_you_mean
from recycle.recycler import AnyMethod


def build_methods(
    names: str | Sequence[str], options: Mapping[str, Any] | None = None
) -> AnyMethod | Sequence[AnyMethod]:
    """One method by its name, or several in a list or joined by ``+``, with their options.

    Raises:
        ValueError: no such method (with a suggestion), an option that it does not have, or methods that do not go
            together.
    """
    check_arguments(build_methods, "a Recycler", names=names, options=options)
    named = names.split("+") if isinstance(names, str) else list(names)
    if not named:
        raise ValueError("name a method, such as split; monitor only watches")
    if len(named) == 1:
        return build_method(named[0], options)
    own: dict[str, dict[str, Any]] = {name: {} for name in named}
    for key, value in (options or {}).items():
        name, dot, option = str(key).rpartition(".")
        if not dot and key in own and isinstance(value, Mapping):
            own[key].update(value)
        elif dot and name in own:
            own[name][option] = value
        else:
            raise ValueError(f"of several methods, options say whose they are ({named[0]}.NAME), got {key!r}")
    built = joined([build_method(name, own[name]) for name in named])
    check_together(built)
    return built if len(built) > 1 else built[0]


def build_method(name: str, options: Mapping[str, Any] | None = None) -> AnyMethod:
    """The method of that name, with its options.

    Raises:
        ValueError: no such method (with a suggestion), or an option that it does not have.
    """
    kind = recycle.find(name)
    given = dict(options or {})
    if is_dataclass(kind):
        known = [f.name for f in fields(kind) if f.init]
        for option in given:
            if option not in known:
                raise ValueError(f"method {name!r} has no option {option!r}: {did_you_mean(str(option), known)}")
    try:
        built: AnyMethod = kind(**given)
    except TypeError as error:
        raise ValueError(f"method {name!r} cannot be made with the options {given}: {error}") from error
    if not (callable(built) or hasattr(built, "on_networks")):
        raise ValueError(f"{name!r} makes a {type(built).__name__}, which is no method. Name a class of methods")
    return built
