"""Who is recycled, when, into what: one paper in a file.

A method is an object called with ``(group, stats)`` that returns a list of edits, and names in ``needs`` the
statistics it reads. It sees a group's shape and its statistics, never a module or an optimizer.

A method for whole networks has ``on_networks(networks, stats)`` instead, see :class:`NetworkMethod`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from recycle.edits import Edit
from recycle.interventions import Intervention, Layers
from recycle.kinds import check_arguments
from recycle.methods.cbp import ContinualBackprop
from recycle.methods.expand import Expand
from recycle.methods.firefly import Firefly
from recycle.methods.folding import Folding
from recycle.methods.gradient_cutoff import GradientCutoff
from recycle.methods.gradmax import GradMax
from recycle.methods.grow import Growth
from recycle.methods.l2_init import L2Init
from recycle.methods.layer_reset import LayerReset
from recycle.methods.mirror import Mirror
from recycle.methods.monitor import Monitor
from recycle.methods.near_zero import NearZero
from recycle.methods.net2deeper import Net2Deeper
from recycle.methods.net2wider import Net2Wider
from recycle.methods.plasticity_injection import PlasticityInjection
from recycle.methods.random import Random
from recycle.methods.redo import ReDo
from recycle.methods.regrama import ReGraMa
from recycle.methods.replay import Replay
from recycle.methods.revive import Revive
from recycle.methods.s2d import SteepestDescent
from recycle.methods.selection import Units
from recycle.methods.senn import SelfExpanding
from recycle.methods.shrink_perturb import ShrinkPerturb
from recycle.methods.snr import SelfNormalizedResets
from recycle.methods.split import SplitDead
from recycle.methods.tiny import Tiny
from recycle.names import did_you_mean
from recycle.stats import Stats


class Method(Protocol):
    """What a recycler needs of a method. No base class, no registration.

    One that remembers something from event to event also has ``state_dict()`` and ``load_state_dict(state)``; one that
    cannot do without an option names it in ``lacks`` (an empty string: nothing is missing); one that differs from
    network to network of a model has ``for_network(name)``, which returns a method; one that chooses among layers has
    ``survey(groups, stats)``, which is called before any group is edited, with all of them and the statistics of those
    that may be edited, and returns all names in the order in which to edit. A call may raise
    :class:`recycle.NotRecyclable`: then nothing is done, and the report says why.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the :class:`recycle.stats.Stats` fields that it reads; a class attribute will do."""
        ...

    def __call__(self, group: Units, stats: Stats) -> Sequence[Edit]:
        """The edits to make now; slots that matter most come first, since a cap may cut the rest."""
        ...


class NetworkMethod(Protocol):
    """What a recycler needs of a method that acts on whole layers, by schedule rather than by what is dead.

    One that acts at every optimizer step too has ``at_updates(networks)``, which returns
    :class:`recycle.interventions.Pull` objects.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the :class:`recycle.stats.Stats` fields that it reads; a class attribute will do."""
        ...

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> Sequence[Intervention]:
        """What to do at an event. A recycler passes its one network, and the statistics of each group by name."""
        ...


METHODS: dict[str, Callable[..., Method | NetworkMethod]] = {
    "monitor": Monitor,
    "random": Random,
    "split": SplitDead,
    "mirror": Mirror,
    "s2d": SteepestDescent,
    "revive": Revive,
    "redo": ReDo,
    "cbp": ContinualBackprop,
    "snr": SelfNormalizedResets,
    "regrama": ReGraMa,
    "gradient_cutoff": GradientCutoff,
    "shrink_perturb": ShrinkPerturb,
    "l2_init": L2Init,
    "layer_reset": LayerReset,
    "replay": Replay,
    "plasticity_injection": PlasticityInjection,
    "grow": Growth,
    "expand": Expand,
    "near_zero": NearZero,
    "net2wider": Net2Wider,
    "net2deeper": Net2Deeper,
    "gradmax": GradMax,
    "tiny": Tiny,
    "firefly": Firefly,
    "folding": Folding,
    "senn": SelfExpanding,
}
"""The built-in methods by their names on the command line."""


def find(name: str) -> Callable[..., Any]:
    """The method class of that name, or of ``"my_module:MyMethod"``.

    Raises:
        ValueError: there is none; the message says which one may have been meant.
    """
    check_arguments(find, "find", name=name)
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return _imported(name)
    raise ValueError(f"no method {name!r}: {did_you_mean(name, METHODS)}, or my_module:MyMethod")


def _imported(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"no method {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"no method {name!r}: it is a {type(found).__name__}, not a class")
    method: Callable[..., Any] = found
    return method
