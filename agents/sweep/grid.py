"""A grid of runs, from a yaml file or from options: methods x environments x drifts x algorithms x seeds.

```yaml
algos: [ppo, dqn]
envs:
  - CartPole-v1
  - {env: DigitsBandit-v1, env_kwargs: {images: 200}, n_timesteps: 50_000}
drifts: [none, permute, permute+scale]
methods:
  - none
  - split
  - {method: redo, method_kwargs: {tau: 0.1}, tag: tau-0.1}
seeds: 5                  # 0 to 4; a list names them
options: {n_timesteps: 100_000, every: 1000, change: "every:5000"}    # of agents.train, for every run
```

An entry is a name, or a mapping of options of ``agents.train`` that its runs have, its name among them. Entries stand
above ``options``, and of two entries that of the later axis counts (algos, envs, drifts, methods, seeds); ``key:value``
options are joined key by key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from agents.command_line import words
from agents.options import Args, is_pairs
from recycle.names import did_you_mean

AXES = {"algos": "algo", "envs": "env", "drifts": "drift", "methods": "method", "seeds": "seed"}
"""Name of an axis, and the option of ``agents.train`` that its entries set."""

OURS = ("resume", "log_folder", "overwrite", "progress")
"""What a run of a grid cannot say for itself."""

TYPES = get_type_hints(Args)
KNOWN = sorted({*TYPES, "n_timesteps"} - {*OURS, "n"})

Axes = Mapping[str, Sequence[Any]]


def read(path: Path) -> tuple[Args, dict[str, list[Any]]]:
    """The options of every run, and the axes of the grid in a yaml file.

    Raises:
        ValueError: the file is no grid; the message is one line that names it.
        OSError: it cannot be read.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no yaml: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a mapping with {', '.join(AXES)} and options, got {given!r}")
    known = (*AXES, "options")
    for key in given:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}: {did_you_mean(str(key), known)}")
    options = given.pop("options", None) or {}
    try:
        if not isinstance(options, dict):
            raise ValueError(f"options: expected a mapping, got {options!r}")
        return with_options(Args(), options), {axis: entries(axis, value) for axis, value in given.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def entries(axis: str, value: Any) -> list[Any]:
    """What one axis names, as a list; of seeds also how many.

    Raises:
        ValueError: it names nothing.
    """
    if axis == "seeds" and type(value) is int:
        value = list(range(value))
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    if not found:
        raise ValueError(f"{axis} is empty: a grid needs at least one entry on each axis that it names")
    return found


def expand(base: Args, axes: Axes) -> list[Args]:
    """Every run of a grid, those of the first seed first. An axis that is not named has one entry, that of ``base``.

    Raises:
        ValueError: an entry is not one.
    """
    single = [axis for axis in AXES if axis in axes]
    listed = [[(axis, entry) for entry in axes[axis]] for axis in sorted(single, key=lambda axis: axis != "seeds")]
    found = []
    for chosen in itertools.product(*listed):
        args = base
        for axis, entry in sorted(chosen, key=lambda pair: single.index(pair[0])):
            args = with_options(args, _options(axis, entry))
        found.append(args)
    return found


def _options(axis: str, entry: Any) -> Mapping[str, Any]:
    name = AXES[axis]
    if not isinstance(entry, dict):
        if entry is None:
            raise ValueError(f"{axis}: expected a name, got nothing. Write none as a word")
        return {name: entry}
    if name not in entry:
        raise ValueError(f"{axis}: an entry names its {name}, got {entry}")
    return entry


def with_options(args: Args, given: Mapping[str, Any]) -> Args:
    """The options with some set, as yaml writes them.

    Raises:
        ValueError: there is no such option, or the value is not one of it.
    """
    changed: dict[str, Any] = {}
    for key, value in given.items():
        name = {"n_timesteps": "n"}.get(str(key).replace("-", "_"), str(key).replace("-", "_"))
        if name in OURS:
            raise ValueError(f"{key} is not for a run of a grid: the sweep sees to it")
        if name not in TYPES:
            raise ValueError(f"agents.train has no option {key!r}: {did_you_mean(str(key), KNOWN)}")
        if name == "drift" and isinstance(value, str):
            value = [] if value == "none" else value.split("+")
        if is_pairs(name):
            changed[name] = getattr(args, name) + _pairs(key, value)
        else:
            changed[name] = _value(key, TYPES[name], value)
    return dataclasses.replace(args, **changed)


def _pairs(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key}: expected a mapping of names to values, got {value!r}")
    return words(value)


def _value(key: str, kind: Any, value: Any) -> Any:
    """``value`` as an option of that type has it."""
    if get_origin(kind) is types.UnionType:  # "X | None"
        (kind,) = (each for each in get_args(kind) if each is not type(None))
        return None if value is None else _value(key, kind, value)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, (str, list)):
        return tuple(_value(key, str, each) for each in ([value] if isinstance(value, str) else value))
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, str):  # yaml takes 1e-4 for a word
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind is float or (kind is int and float(value).is_integer()):
            return kind(value)
    elif kind is str and isinstance(value, str):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(kind)
    if get_origin(kind) is Literal:
        expected = f"one of {', '.join(map(str, get_args(kind)))}"
    raise ValueError(f"{key}: expected {expected or 'a word or a list of words'}, got {value!r}")
