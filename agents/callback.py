"""Recycling inside stable-baselines3: when to step, what to log, where to keep the state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import safe_mean
from torch import nn

import recycle
from agents import curves
from agents.deepened import remember_depth
from agents.elastic import remember_widths
from agents.injected import remember_injection
from agents.layered import CReLU
from agents.method_names import build_methods
from agents.networks import Network, networks_of
from agents.observations import evaluating, recent
from agents.td_errors import TDErrors
from recycle import Graph, Recycler, Report
from recycle.interventions import Inject
from recycle.kinds import check_arguments
from recycle.methods.grow import Growth
from recycle.methods.plasticity_injection import PlasticityInjection
from recycle.names import did_you_mean
from recycle.recycler import AnyMethod
from recycle.targets import moved

_WATCHING: WeakKeyDictionary[BaseAlgorithm, list[Recycler]] = WeakKeyDictionary()
"""Those with hooks on a model that trains, or did when it was interrupted: SB3 tells callbacks of no exception."""


class RecycleCallback(BaseCallback):
    """Watch a model's networks while it trains, and recycle their dead units. ::

        model = PPO("MlpPolicy", env, policy_kwargs=dict(activation_fn=nn.ReLU), tensorboard_log="runs")
        model.learn(500_000, callback=RecycleCallback(method="redo", every=10_000))

    Edits are made at ``on_rollout_start``, the one moment at which no buffer and no graph depends on the old
    weights. Do not wrap it in ``EveryNTimesteps``: that forwards no rollout events; it keeps its own schedule.

    Args:
        method: a name in :data:`recycle.METHODS`, or ``"my_module:MyMethod"``; several that go together in a list,
            or joined by ``+``: ``"redo+l2_init"``. ``"grow+gradmax"`` grows by what the second proposes.
        method_kwargs: the method's own options; of several, ``{"redo": {"tau": 0.1}}`` or ``{"redo.tau": 0.1}``.
        every: environment steps (of all copies together) from event to event. Events fall between a training phase
            and the next rollout, so ``learn(n)`` with ``every=n`` ends before the first.
        warmup: environment steps before the first edit; events before it only report.
        cooldown: events for which a unit that was just recycled is left alone.
        cap: largest part of a layer's units that one event may recycle, in (0, 1].
        sample_every: statistics look at the passes of every so many updates; 1 sees all of them.
        include: only these groups, of whichever network (a name stands for all below it); None: all.
        exclude: not these groups.
        jumps: also log how far each event moves the outputs, at once and 5, 20, 50 and 200 updates later, on 64
            observations of the latest rollout; six passes over them an event.
        edits: file to which every event is appended, one JSON object a line; None: ``edits.jsonl`` in the
            logger's folder, if it has one.
        keep_reports: how many events :attr:`reports` holds, the latest: a run that goes on for days makes many.
            ``edits.jsonl`` has them all.
        seed: of the private random generator; training's own random numbers are not touched.
        verbose: 1 prints every report.

    Raises:
        ValueError: an option is out of range, or (when training begins) nothing can be recycled, with reasons.
    """

    def __init__(
        self,
        *,
        method: str | Sequence[str] = "split",
        method_kwargs: Mapping[str, Any] | None = None,
        every: int = 10_000,
        warmup: int = 0,
        cooldown: int = 0,
        cap: float = 1.0,
        sample_every: int = 8,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        jumps: bool = False,
        edits: str | Path | None = None,
        keep_reports: int = 1000,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        check_arguments(
            RecycleCallback.__init__, "RecycleCallback", every=every, warmup=warmup, cooldown=cooldown, cap=cap,
            sample_every=sample_every, include=_listed(include), exclude=_listed(exclude), jumps=jumps, edits=edits,
            keep_reports=keep_reports, seed=seed, verbose=verbose,
        )  # fmt: skip
        super().__init__(verbose)
        if not 0 <= seed < 2**63:
            raise ValueError(f"a seed is 0 or more, and below 2**63, got {seed}")
        if every < 1 or warmup < 0:
            raise ValueError(
                f"every and warmup count environment steps: every >= 1, warmup >= 0, got {every}, {warmup}"
            )
        self.method = build_methods(method, method_kwargs)
        self.every, self.warmup = every, warmup
        self.options = {"cooldown": cooldown, "cap": cap, "sample_every": sample_every}
        self.include, self.exclude = include, exclude
        self.jumps = jumps
        self._batch: Any = None  # on which jumps are measured until the next event
        self._next_batch: Any = None
        self.edits = None if edits is None else Path(edits)
        self.seed = seed
        self.recyclers: dict[str, Recycler] = {}
        """One for each network of the model, once training has begun."""
        self.reports: list[dict[str, Report]] = []
        """What the latest events saw and did, by network."""
        self.keep_reports = keep_reports
        self._networks: dict[str, Network] = {}
        self._examples: dict[str, TDErrors] = {}
        self._totals: dict[str, dict[str, int]] = {}
        self._last_event = 0
        self._since = 0  # steps from the last event to the end of the last learn()
        self._recording: list[Recycler] = []  # those with methods that look at what training logs
        self._trained = 0  # updates, when that was last looked at
        self._owner: BaseAlgorithm | None = None
        if keep_reports < 1:
            raise ValueError(f"keep_reports counts events: expected 1 or more, got {keep_reports}")
        if not 0 < cap <= 1 or cooldown < 0 or sample_every < 1:
            raise ValueError(
                "expected 0 < cap <= 1 (a part of a layer), cooldown >= 0 (events), sample_every >= 1 (passes), "
                f"got cap={cap}, cooldown={cooldown}, sample_every={sample_every}"
            )

    # -- stable-baselines3's events ------------------------------------------------------------------------

    def _init_callback(self) -> None:
        if isinstance(self.parent, EventCallback):
            warnings.warn(
                f"{type(self.parent).__name__} forwards no rollout events, so this RecycleCallback will never act; "
                "pass it to learn() directly and set every=",
                stacklevel=2,
            )
        if "train" in vars(self.model):
            raise ValueError(
                "model.train has been replaced (rl-zoo's ParallelTrainCallback does that): the weights are then "
                "changed by another thread, and no moment is safe for an edit. Remove it"
            )
        for recycler in _WATCHING.pop(self.model, []):  # of a learn() that was interrupted
            recycler.detach()
        self.prepare(self.model)

    def prepare(self, model: BaseAlgorithm) -> None:
        """Trace the model's networks now, rather than when training begins; a second call does nothing.

        Raises:
            ValueError: nothing can be recycled in this model, with the reasons.
        """
        if hasattr(model, "cg_max_steps") and PlasticityInjection in _kinds(self.method):
            raise ValueError("TRPO differentiates by every parameter, and plasticity_injection freezes some. Use PPO")
        networks = networks_of(model)
        watched = [network for network in networks if network.name in self.recyclers]
        if self._owner is model and all(self.recyclers[n.name].optimizers == n.optimizers for n in watched):
            return
        for recycler in self.recyclers.values():
            recycler.detach()
        self.recyclers = self._build(networks, type(model).__name__)
        self._networks = {network.name: network for network in networks}
        self._owner = model
        self._totals = {name: {"recycled": 0, "re_died": 0} for name in self.recyclers}
        self._last_event = model.num_timesteps
        self._load(model)
        self._recording = [recycler for recycler in self.recyclers.values() if "recorded" in recycler.needs]
        self._trained = max(recycler.tracker.passes for recycler in self.recyclers.values())
        _say_what_tanh_means(networks)

    def _on_training_start(self) -> None:
        if self.num_timesteps < self._last_event + self._since:  # learn() counts from zero again: go on from here
            self._last_event = self.num_timesteps - self._since
        for recycler in self.recyclers.values():
            recycler.attach()
        _WATCHING.setdefault(self.model, []).extend(self.recyclers.values())
        curves.lay_out(self.logger, self.recyclers)

    def _on_rollout_start(self) -> None:
        if self._recording:
            self._record_training()
        if self.num_timesteps - self._last_event >= self.every:
            self._last_event = self.num_timesteps
            early = self.num_timesteps < self.warmup
            self._batch = self._batch if self._next_batch is None else self._next_batch
            reports = self._observe() if early else self._step()
            for name, report in reports.items():
                self._networks[name].follow(self.recyclers[name].graph, report)
                self._examples[name].forget()
            self._event(reports)
        for recycler in self.recyclers.values():
            recycler.tracker.pause()  # no training pass comes from a rollout

    def _record_training(self) -> None:
        """Hand what stable-baselines3 has just logged of a training phase to methods that watch it.

        The latest phase's ``train/...`` are still there: they are written out during the next rollout.
        """
        watching = [recycler for recycler in self._recording if recycler.tracker.passes > self._trained]
        if not watching:
            return
        self._trained = max(recycler.tracker.passes for recycler in watching)
        logged = {k: v for k, v in self.logger.name_to_value.items() if k.startswith("train/")}
        if self.model.ep_info_buffer:
            logged["rollout/ep_rew_mean"] = safe_mean([episode["r"] for episode in self.model.ep_info_buffer])
        for name, value in logged.items():
            if isinstance(value, (int, float, np.number)):
                for recycler in watching:
                    recycler.record(name, float(value))

    def _on_rollout_end(self) -> None:
        if self.num_timesteps - self._last_event >= self.every:
            if self.jumps:
                self._next_batch = recent(self.model)
            for name, recycler in self.recyclers.items():
                if "mistakes" in recycler.needs:
                    self._examples[name].rollout_ended()
        for recycler in self.recyclers.values():
            recycler.tracker.resume()

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """Look at stable-baselines3's own dict: to copy it would cost more than all else that a step does."""
        self.locals = locals_

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._record_training()
        self._since = self.num_timesteps - self._last_event
        if any(recycler.tracker.samples for recycler in self.recyclers.values()):
            self._event({name: r.observe(keep_window=True) for name, r in self.recyclers.items()})
        else:
            self.keep_state()
        for recycler in self.recyclers.values():
            recycler.detach()
        _WATCHING.pop(self.model, None)

    # -- building ------------------------------------------------------------------------------------------

    def _build(self, networks: Sequence[Network], kind: str) -> dict[str, Recycler]:
        graphs = {network.name: network.trace() for network in networks}
        names = [group.name for graph in graphs.values() for group in graph]
        if not names:
            frozen = "; ".join(f"{name}: {why}" for graph in graphs.values() for name, why in graph.frozen.items())
            raise ValueError(f"nothing can be recycled in this {kind}: {frozen or 'it has no hidden units'}")
        chosen = _chosen(graphs, _listed(self.include), _listed(self.exclude) or [])
        if not chosen:
            raise ValueError(f"include and exclude leave no group of {', '.join(names)}; drop one of them")
        if Growth in _kinds(self.method) and not any(group.resizable for graph in chosen.values() for group in graph):
            fixed = "; ".join(f"{group.name}: {group.why_fixed}" for graph in chosen.values() for group in graph)
            raise ValueError(f"nothing can grow in this {kind}: {fixed}")
        found, self._examples = {}, {}
        for number, network in enumerate(networks):
            graph = chosen.get(network.name)
            if graph is None:
                continue
            generator = torch.Generator().manual_seed(self.seed + number)
            self._examples[network.name] = TDErrors(network.critic, generator)
            found[network.name] = Recycler(
                graph,
                _of(network, self.method),
                optimizers=network.optimizers,
                targets=network.targets,
                init=network.init,
                certify=None if network.box is None else partial(self._certify, network),
                probe=partial(self._probe, network) if self.jumps else None,
                examples=self._examples[network.name],
                generator=generator,
                **self.options,  # type: ignore[arg-type]
            )
        return found

    def _probe(self, network: Network) -> Any:
        if self._batch is None:
            return ()
        with evaluating(list(self.model.policy.modules())):
            return network.watch(self._batch)

    def _certify(self, network: Network) -> dict[str, torch.Tensor]:
        assert network.box is not None
        return recycle.certify(self.recyclers[network.name].graph, *network.box)

    # -- an event ------------------------------------------------------------------------------------------

    def _observe(self) -> dict[str, Report]:
        return {name: recycler.observe() for name, recycler in self.recyclers.items()}

    def _step(self) -> dict[str, Report]:
        """Edit all networks. Ctrl-C may come between two of their layers: what was resized by then can be saved."""
        before = self._shapes()
        deep = {name: len(recycler.insertions) for name, recycler in self.recyclers.items()}
        try:
            return {name: recycler.step() for name, recycler in self.recyclers.items()}
        except BaseException:
            self._owner = None  # half of the books are of before: the next learn() begins anew
            raise
        finally:
            now = self._shapes()
            if any(len(recycler.insertions) > deep[name] for name, recycler in self.recyclers.items()):
                made = {name: r.insertions[deep[name] :] for name, r in self.recyclers.items()}
                remember_depth(self.model, [(self._networks[name], each) for name in made for each in made[name]])
            elif any(now[held] != before[held] for held in now.keys() & before.keys()):  # injection makes new ones
                remember_widths(self.model)

    def _shapes(self) -> dict[tuple[int, str], torch.Size]:
        """Of everything that makes units, by the layer that holds it: insertions change paths."""
        found = {}
        for recycler in self.recyclers.values():
            for group in recycler.graph:
                for axis in group.incoming:
                    owner, _, leaf = axis.name.rpartition(".")
                    found[id(group.module.get_submodule(owner)), leaf] = group.tensor(axis.name).shape
        return found

    def _event(self, reports: dict[str, Report]) -> None:
        self.reports.append(reports)
        del self.reports[: -self.keep_reports]
        logger = Logger(self.logger.get_dir(), self.logger.output_formats)  # a row of our own: theirs is half full
        for name, report in reports.items():
            self._totals[name]["recycled"] += report.recycled
            self._totals[name]["re_died"] += report.re_died
            curves.record(logger, name, report, self._totals[name])
            curves.draw_histograms(logger, name, self.recyclers[name], self.num_timesteps)
            if self.verbose:
                print(f"{name}, step {self.num_timesteps}: {report}")
        if any(isinstance(made, Inject) for report in reports.values() for made in report.interventions):
            remember_injection(self.model)
        folder = self.logger.get_dir()
        path = self.edits or (Path(folder) / "edits.jsonl" if folder else None)
        if path is not None:
            curves.write_edits(path, self.num_timesteps, reports)
        self.keep_state()
        infos = self.locals.get("infos")
        if infos and "drift/task" in infos[0]:
            logger.record("drift/task", int(infos[0]["drift/task"]), exclude=curves.QUIET)
        logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        logger.dump(self.num_timesteps)

    # -- state ---------------------------------------------------------------------------------------------

    def keep_state(self) -> None:
        """Keep the state in a plain dict on the model, where SB3's own ``save`` picks it up."""
        self.model.recycle_state = {  # type: ignore[attr-defined]
            "last_event": self._last_event,
            "since": self._since,
            "batch": moved(self._batch, torch.device("cpu")),
            "examples": {name: examples.state_dict() for name, examples in self._examples.items()},
            "totals": {name: dict(counts) for name, counts in self._totals.items()},
            "recyclers": {name: r.state_dict() for name, r in self.recyclers.items()},
        }

    def _load(self, model: BaseAlgorithm) -> None:
        state = getattr(model, "recycle_state", None)
        if state is None:
            return
        try:
            for name, recycler in self.recyclers.items():
                recycler.load_state_dict(state["recyclers"][name])
        except (KeyError, ValueError) as error:
            warnings.warn(f"the model's recycling state is not used, statistics begin anew: {error}", stacklevel=2)
            self.recyclers = self._build(networks_of(model), type(model).__name__)
            return
        self._last_event, self._since = state["last_event"], state["since"]
        self._batch = moved(state.get("batch"), model.device)
        for name, examples in self._examples.items():
            examples.load_state_dict(state.get("examples", {}).get(name), model.device)
        self._totals = {k: dict(v) for k, v in state["totals"].items()}


def _of(network: Network, method: Any) -> Any:
    """A copy of a method, or of each of several: what it remembers is of one network."""
    if isinstance(method, (list, tuple)):
        return [_of(network, one) for one in method]
    own = copy.deepcopy(method)
    return own.for_network(network.name) if hasattr(own, "for_network") else own


def _kinds(method: AnyMethod | Sequence[AnyMethod]) -> list[type]:
    return [type(each) for each in (method if isinstance(method, (list, tuple)) else [method])]


def _listed(names: Sequence[str] | None) -> Sequence[str] | None:
    return None if names is None else [names] if isinstance(names, str) else names


def _chosen(graphs: Mapping[str, Graph], include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, Graph]:
    """The groups to watch in each network, without networks that have none; a name need be known to one network."""
    for name in (*(include or ()), *exclude):
        if not any(graph.knows(name) for graph in graphs.values()):
            names = [group.name for graph in graphs.values() for group in graph]
            raise ValueError(f"no group is called {name!r}; {did_you_mean(name, names)}")
    found = {}
    for network, graph in graphs.items():
        wanted = None if include is None else [name for name in include if graph.knows(name)]
        kept = graph.select(wanted, [name for name in exclude if graph.knows(name)])
        if len(kept):
            found[network] = kept
    return found


def attach(model: BaseAlgorithm, *, sample_every: int = 8) -> dict[str, Recycler]:
    """Watch a model without ever changing it: one attached monitor for each of its networks.

    ``print(attach(model)["policy"].report())`` after some training shows the health of every layer.
    """
    check_arguments(attach, "attach", model=model, sample_every=sample_every)
    found = {}
    for network in networks_of(model):
        graph = network.trace()
        recycler = Recycler(
            graph,
            recycle.find("monitor")(),
            optimizers=network.optimizers,
            sample_every=sample_every,
            certify=None if network.box is None else partial(recycle.certify, graph, *network.box),
        )
        recycler.attach()
        found[network.name] = recycler
    return found


def _say_what_tanh_means(networks: Sequence[Network]) -> None:
    layers = [layer for network in networks for layer in network.module.modules()]
    if any(isinstance(m, nn.Tanh) for m in layers) and not any(isinstance(m, (nn.ReLU, CReLU)) for m in layers):
        warnings.warn(
            "this network is built with Tanh, whose units do not die by being zero: constant and saturated units are "
            "reported instead. For ReLU pass policy_kwargs=dict(activation_fn=nn.ReLU)",
            stacklevel=2,
        )
