"""Agents that grow while they train: saved, loaded by stable-baselines3 alone, trained and grown on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from agents import RecycleCallback, networks_of
from agents.method_names import build_methods
from recycle import Grow
from recycle.births import revive
from recycle.methods.grow import Growth
from tests.agents.test_elastic import same, shapes, widths_of

torch.set_num_threads(1)
RELU = {"net_arch": [8, 8], "activation_fn": nn.ReLU}
OFF = {"learning_starts": 10, "buffer_size": 200, "batch_size": 8}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ppo": (PPO, "CartPole-v1", {"n_steps": 32, "batch_size": 16, "n_epochs": 1}),
    "dqn": (DQN, "CartPole-v1", OFF | {"target_update_interval": 20}),
    "dqn polyak": (DQN, "CartPole-v1", OFF | {"target_update_interval": 1, "tau": 0.1}),
    "sac": (SAC, "Pendulum-v1", OFF),
}


def made(name: str, **kwargs: Any) -> Any:
    kind, env, own = KINDS[name]
    return kind("MlpPolicy", env, seed=0, device="cpu", **({"policy_kwargs": dict(RELU)} | own | kwargs))


def alive(model: Any) -> Any:
    """The same model with all units of its hidden layers firing."""
    with torch.no_grad():
        for layer in (m for m in model.policy.modules() if isinstance(m, nn.Linear) and m.out_features == 8):
            layer.bias.fill_(2.0)
    return model


def growing(path: Any = None, *, method: str = "grow", **options: Any) -> RecycleCallback:
    given = {"when": "every:2", "count": 2, "birth": "revive", "most": 17} | options
    return RecycleCallback(method=method, method_kwargs=given, every=32, sample_every=1, edits=path)


def widths(reports: dict[str, Any]) -> dict[str, int]:
    return {f"{n} {name}": group.width_after for n, report in reports.items() for name, group in report.groups.items()}


def reseed(model: BaseAlgorithm) -> None:
    """What stable-baselines3 does not save."""
    torch.manual_seed(1)
    np.random.seed(1)
    env = model.get_env()
    assert env is not None
    env.seed(1)
    env.action_space.seed(1)
    model.action_space.seed(1)
    model._last_obs = None
    if hasattr(model, "replay_buffer"):
        model.replay_buffer.reset()


@pytest.mark.parametrize("name", KINDS)
def test_an_agent_grows_is_saved_loaded_and_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Any) -> None:
    told, ended = [], []
    for reload in (False, True):
        path = tmp_path / f"edits{reload}.jsonl"
        model, callback = made(name), growing(path)
        start = widths_of(model)
        model.learn(200, callback=callback)
        grown = widths_of(model)
        assert set(start.values()) == {8} and all(8 < width < 17 for width in grown.values())
        assert widths(callback.reports[-1]) == grown
        if reload:
            model.save(tmp_path / "model.zip")
            loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
            assert same(model, loaded) and widths_of(loaded) == grown
            observations = np.random.default_rng(0).normal(size=(16, *model.observation_space.shape))
            acts = [one.predict(observations.astype(np.float32), deterministic=True)[0] for one in (model, loaded)]
            assert np.array_equal(*acts)
            model, callback = loaded, growing(path)
        reseed(model)
        model.learn(200, callback=callback, reset_num_timesteps=False)
        assert all(width > grown[group] for group, width in widths_of(model).items())
        for network in networks_of(model):
            assert all(shapes(network.module) == shapes(target) for target, _ in network.targets)
        told.append([json.loads(line) for line in path.read_text().splitlines()])
        ended.append(model)
    assert told[0] == told[1]
    assert same(*ended)
    edits = [edit for line in told[0] for edit in line["edits"]]
    assert edits and all(edit["edit"] == "Grow" and edit["birth"] == "revive" for edit in edits)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_a_grown_model_needs_nothing_of_ours_to_load(name: str, tmp_path: Any) -> None:
    model = made(name)
    model.learn(100, callback=growing(birth="init"))
    model.save(tmp_path / "model.zip")
    assert type(model).load(tmp_path / "model.zip").policy_class is type(model.policy)
    units = [width for _, width in sorted(widths_of(model).items())]
    arch = model.policy_kwargs["net_arch"]
    assert units == (arch["pi"] + arch["vf"] if name == "ppo" else arch) and max(units) > 8


def test_newborns_are_as_old_as_their_growth(tmp_path: Any) -> None:
    model, callback = made("ppo"), growing()
    model.learn(160, callback=callback)
    model.save(tmp_path / "model.zip")
    born = PPO.load(tmp_path / "model.zip").recycle_state["recyclers"]["policy"]["tracker"]["born"]
    for units in born.values():
        assert units[:8].eq(0).all() and units[8:].gt(0).all() and len(units) == 12
        assert units[8:].tolist() == sorted(units[8:].tolist())


@pytest.mark.parametrize("words", ["plateau:train/value_loss,1,9", "plateau:rollout/ep_rew_mean,1,9,max"])
def test_a_plateau_is_read_off_what_stable_baselines_logs(words: str) -> None:
    """A relative change of 9 is never an improvement: it fires at every second event that saw a value."""
    model, callback = made("ppo"), growing(when=words, count=1)
    model.learn(224, callback=callback)
    counts = [sum(isinstance(edit, Grow) for _, edit in reports["policy"].edits) for reports in callback.reports]
    assert sum(counts) >= 8 and counts[0] == 0
    assert not any(group.note for reports in callback.reports[1:] for group in reports["policy"].groups.values())


def test_a_plateau_of_what_is_not_logged_says_what_is() -> None:
    model, callback = made("ppo"), growing(when="plateau:train/critic_loss")
    model.learn(96, callback=callback)
    note = next(iter(callback.reports[0]["policy"].groups.values())).note
    assert note.startswith("the plateau of 'train/critic_loss' cannot be seen: train/approx_kl, train/clip_fraction, ")


def test_the_mean_of_the_phases_since_the_last_event_is_watched() -> None:
    """DQN trains many times between two events, and writes its log whenever an episode ends."""
    model, callback = made("dqn"), growing(when="plateau:train/loss,3")
    model.learn(64, callback=callback)
    callback.every = 10**9
    callback.prepare(model)
    model.learn(40, callback=callback, reset_num_timesteps=False)
    recorded = callback.recyclers["q_net"].state_dict()["recorded"]
    count, total = recorded["train/loss"]
    assert count >= 9 and 0 < total / count < 10 and recorded["rollout/ep_rew_mean"][0] == count


def test_width_goes_to_tensorboard_and_to_progress(tmp_path: Any) -> None:
    model, callback = made("ppo", tensorboard_log=str(tmp_path)), growing()
    model.learn(128, callback=callback)
    events = EventAccumulator(str(next(tmp_path.iterdir())))
    events.Reload()
    names = [name for name in callback.reports[0]["policy"].groups]
    for name in names:
        points = events.Scalars(f"recycle/policy/{name}/width")
        assert [(p.step, p.value) for p in points] == [(32, 8), (64, 10), (96, 10), (128, 10)]
    assert [p.value for p in events.Scalars("recycle/policy/units")] == [32, 40, 40, 40]


def test_a_model_in_which_nothing_can_grow_is_refused_with_reasons() -> None:
    class Fixed(nn.Module):
        def __init__(self, observation_space: Any) -> None:
            super().__init__()
            self.features_dim, self.make = 3, nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.make(x).relu().view(-1, 6))

    kwargs = {"features_extractor_class": Fixed, "net_arch": [], "activation_fn": nn.ReLU}
    model = made("ppo", policy_kwargs=kwargs)
    callback = RecycleCallback(method="grow", include=["features_extractor.make"])
    with pytest.raises(ValueError, match=r"nothing can grow in this PPO: features_extractor\.make: with 3 units"):
        callback.prepare(model)
    RecycleCallback(method="monitor", include=["features_extractor.make"]).prepare(model)


def test_grow_takes_the_method_beside_it_as_what_it_grows_by() -> None:
    made: Any = build_methods("grow+split", {"grow.when": "every:3", "split.noise": 0.2})
    assert isinstance(made, Growth) and made.when == "every:3" and made.by.noise == 0.2
    several: Any = build_methods("grow+split+shrink_perturb", {})
    assert [type(method).__name__ for method in several] == ["Growth", "ShrinkPerturb"]
    alone: Any = build_methods("grow", {"birth": "revive", "when": "rank:0.5"})
    assert alone == Growth(when="rank:0.5", birth="revive")


def test_the_rank_trigger_under_a_budget_with_a2c() -> None:
    model = A2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=dict(RELU), n_steps=16)
    callback = growing(when="rank:0.5", budget=40, most=None)
    model.learn(320, callback=callback)
    totals = [reports["policy"].units for reports in callback.reports]
    assert totals[0] > 32 and totals[-1] == 40 and sorted(totals) == totals
    assert revive in [edit.birth for reports in callback.reports for _, edit in reports["policy"].edits]


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_units_move_between_layers_while_their_number_stays(name: str) -> None:
    model = alive(made(name))
    callback = growing(when="every:1", where="best", prune="utility", maturity=0, count=1, most=None)
    model.learn(300, callback=callback)
    reports = [report for reports in callback.reports for report in reports.values()]
    assert {report.units for report in reports} == {32 if name == "ppo" else 16}
    kinds = [[type(edit).__name__ for _, edit in report.edits] for report in reports]
    assert sum("Grow" in made and "Prune" in made for made in kinds) >= 6
    assert sum(widths_of(model).values()) == reports[-1].units
    assert all(shapes(n.module) == shapes(target) for n in networks_of(model) for target, _ in n.targets)


def test_a_unit_that_lives_in_the_polyak_target_makes_no_room() -> None:
    model = alive(made("dqn polyak"))
    callback = growing(when="every:1", where="best", prune="utility", maturity=0, count=1, most=None)
    model.learn(200, callback=callback)
    reports = [reports["q_net"] for reports in callback.reports]
    assert {report.units for report in reports} == {16}
    notes = {group.note for report in reports for group in report.groups.values()}
    assert "1 still alive in the target network" in notes
    assert "it is to grow, but there is no room for another unit (budget=16)" in notes
