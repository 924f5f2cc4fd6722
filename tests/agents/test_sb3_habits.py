"""What stable-baselines3's own tests ask of a model still holds of one that trains with a RecycleCallback."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from agents import RecycleCallback

torch.set_num_threads(1)

RELU = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (PPO, {"n_steps": 32, "batch_size": 16, "n_epochs": 1}),
    "a2c": (A2C, {"n_steps": 8}),
    "dqn": (DQN, {"learning_starts": 10, "buffer_size": 300, "batch_size": 8}),
}
METHODS = ["monitor", "split", "redo", "tests.agents.test_elastic:Widen"]  # the last changes the widths


def made(name: str, env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    """A small model, three units of whose first layers are dead for good."""
    kind, own = KINDS[name]
    model = kind("MlpPolicy", env, seed=0, device="cpu", **({"policy_kwargs": RELU} | own | kwargs))
    with torch.no_grad():
        for layer in (m for m in model.policy.modules() if isinstance(m, nn.Linear) and m.out_features == 16):
            layer.bias[[1, 3, 5]] = -1e3
    return model


def recycler(method: str = "split", **kwargs: Any) -> RecycleCallback:
    return RecycleCallback(**({"method": method, "every": 32, "sample_every": 1} | kwargs))


def trained(name: str, method: str = "split", steps: int = 96, env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    callback = recycler(method)
    model = made(name, env, **kwargs).learn(steps, callback=callback)
    edited = sum(len(report.edits) for reports in callback.reports for report in reports.values())
    assert (edited > 0) is (method != "monitor")
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def seen(model: Any, count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *model.observation_space.shape)).astype(np.float32)


# Saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_loads_without_env_and_trains_on_once_it_has_one(name, method, tmp_path):
    model = trained(name, method)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert loaded.get_env() is None and same(weights(model), weights(loaded))
    asked = seen(model)
    assert np.array_equal(*(m.predict(asked, deterministic=True)[0] for m in (model, loaded)))
    loaded.set_env(make_vec_env("CartPole-v1", 1, seed=0))
    before = weights(loaded)
    loaded.learn(64, callback=recycler(method))
    assert not same(before, weights(loaded))


@pytest.mark.parametrize("name", KINDS)
def test_parameters_and_attributes_can_be_left_out_or_kept(name, tmp_path):
    model = trained(name)
    model.save(tmp_path / "without", exclude=["recycle_state", "learning_rate"])
    loaded = type(model).load(tmp_path / "without", learning_rate=1e-3, device="cpu")
    assert not hasattr(loaded, "recycle_state") and same(weights(model), weights(loaded))
    model.save(tmp_path / "with", exclude=["recycle_state", "seed"], include=["recycle_state"])
    assert type(model).load(tmp_path / "with", device="cpu").recycle_state.keys() == model.recycle_state.keys()


@pytest.mark.parametrize("name", KINDS)
def test_a_torch_variable_of_the_users_is_saved_beside_ours(name, tmp_path, monkeypatch):
    kind, own = KINDS[name]

    class Mine(kind):
        def _setup_model(self):
            super()._setup_model()
            self.mine = nn.Parameter(torch.zeros(3))

        def _get_torch_save_params(self):
            states, variables = super()._get_torch_save_params()
            return states, [*variables, "mine"]

    monkeypatch.setitem(KINDS, name, (Mine, own))
    model = trained(name)
    model.mine.data = torch.arange(3.0)
    model.save(tmp_path / "model")
    assert torch.equal(Mine.load(tmp_path / "model", device="cpu").mine, torch.arange(3.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_the_policy_is_saved_and_loaded_alone(name, method, tmp_path):
    model = trained(name, method)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert same(weights(model), {k: v for k, v in loaded.state_dict().items()})
    asked = seen(model)
    assert np.array_equal(model.predict(asked, deterministic=True)[0], loaded.predict(asked, deterministic=True)[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_q_network_is_saved_and_loaded_alone(method, tmp_path):
    model = trained("dqn", method)
    model.q_net.save(tmp_path / "q_net")
    loaded = type(model.q_net).load(tmp_path / "q_net", device="cpu")
    asked = torch.as_tensor(seen(model))
    assert torch.equal(model.q_net(asked), loaded(asked))


@pytest.mark.parametrize("method", METHODS)
def test_the_replay_buffer_is_saved_and_training_goes_on_with_it(method, tmp_path):
    model = trained("dqn", method)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DQN.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert np.array_equal(loaded.replay_buffer.observations, model.replay_buffer.observations)
    loaded.learn(64, callback=recycler(method), reset_num_timesteps=False)
    assert loaded.num_timesteps == 160 and loaded.replay_buffer.pos == 160


class Targets(BaseCallback):
    """Whether the target equals the online network at every rollout end, just before the online one learns."""

    def _init_callback(self) -> None:
        self.equal: list[bool] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.equal.append(same(self.model.q_net.state_dict(), self.model.q_net_target.state_dict()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("interval", [1, 10_000])
def test_the_target_follows_at_its_own_interval(method, interval):
    targets = Targets()
    made("dqn", target_update_interval=interval).learn(96, callback=[recycler(method), targets])
    learned = targets.equal[-20:]
    assert len(learned) == 20 and (all(learned) if interval == 1 else not any(learned))


@pytest.mark.parametrize("name", KINDS)
def test_no_file_is_left_open(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        model = made(name)
        model.learn(64, callback=recycler(edits=tmp_path / "edits.jsonl"))
        model.save(tmp_path / "model")
        type(model).load(tmp_path / "model", device="cpu")
    assert (tmp_path / "edits.jsonl").read_text().count("\n") >= 2


@pytest.mark.parametrize("name", KINDS)
def test_without_net_arch_the_default_widths_are_found_again(name, tmp_path):
    kwargs = {"net_arch": None, "activation_fn": nn.ReLU}
    model = made(name, policy_kwargs=kwargs)
    model.learn(64, callback=recycler("random", method_kwargs={"count": 1}))
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert loaded.policy_kwargs["net_arch"] is None and same(weights(model), weights(loaded))


# Callbacks -----------------------------------------------------------------------------------------------------


class Cancel(BaseCallback):
    """Ends the run at this step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        return self.num_timesteps < self.at


@pytest.mark.parametrize("name", KINDS)
def test_it_works_among_all_the_usual_callbacks(name, tmp_path):
    best = StopTrainingOnRewardThreshold(reward_threshold=1e6)
    stale = StopTrainingOnNoModelImprovement(max_no_improvement_evals=100)
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", 1, seed=1), callback_on_new_best=best, callback_after_eval=stale,
        best_model_save_path=str(tmp_path), log_path=str(tmp_path), eval_freq=32, n_eval_episodes=1, verbose=0,
    )  # fmt: skip
    checkpoint = CheckpointCallback(1, str(tmp_path), "at")
    ours = recycler("tests.agents.test_elastic:Widen")
    stop = StopTrainingOnMaxEpisodes(max_episodes=1000)
    model = made(name)
    model.learn(128, callback=[evaluation, EveryNTimesteps(32, checkpoint), ours, stop])
    assert ours.reports and list(np.load(tmp_path / "evaluations.npz")["timesteps"]) == [32, 64, 96, 128]
    saved = sorted(tmp_path.glob("at_*_steps.zip"), key=lambda path: int(path.stem.split("_")[1]))
    assert [path.stem for path in saved] == [f"at_{step}_steps" for step in (32, 64, 96, 128)]
    for path in (*saved, tmp_path / "best_model.zip"):
        assert type(model).load(path, env=model.get_env(), device="cpu").num_timesteps in (32, 64, 96, 128)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_cancelled_run_is_left_in_order(name, first):
    ours, cancel = recycler("redo"), Cancel(70)
    model = made(name)
    model.learn(1000, callback=CallbackList([ours, cancel] if first else [cancel, ours]))
    assert model.num_timesteps == 70
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.policy.modules())
    model.learn(96, callback=ours, reset_num_timesteps=False)
    assert model.num_timesteps >= 166


@pytest.mark.parametrize("first", [True, False])
def test_evaluations_are_logged_at_their_own_step(first, tmp_path):
    model = made("ppo")
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    evaluation = EvalCallback(make_vec_env("CartPole-v1", 1, seed=1), eval_freq=32, n_eval_episodes=1, verbose=0)
    ours = recycler("split")
    model.learn(128, callback=[ours, evaluation] if first else [evaluation, ours])
    model.logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [32, 64, 96, 128]
    assert [event.step for event in events.Scalars("recycle/policy/dead")] == [32, 64, 96, 128]


# The logger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_no_two_keys_fall_together_on_the_terminal(name, tmp_path, capsys):
    model = made(name, verbose=1)
    model.set_logger(configure(str(tmp_path), ["stdout", "log", "csv", "json", "tensorboard"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # histograms go to TensorBoard alone: nothing is unsupported
        model.learn(128, callback=recycler("split", edits=tmp_path / "edits.jsonl"))
    model.logger.close()
    table = capsys.readouterr().out
    rows = [row.split("|")[1].strip() for row in table.splitlines() if row.count("|") == 3]
    assert {"dead", "dormant", "recycled"} <= {row.rpartition("/")[2] for row in rows}
    assert not any(row.endswith("...") for row in rows)
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"]


# Determinism, several copies, normalisation --------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_watching_changes_no_bit_and_recycling_repeats(name):
    assert same(weights(made(name).learn(128)), weights(trained(name, "monitor", 128)))
    for method in METHODS[1:]:
        assert same(weights(trained(name, method, 128)), weights(trained(name, method, 128)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train_freq", [4, 1])
def test_off_policy_with_several_copies(method, train_freq):
    env = make_vec_env("CartPole-v1", 3, seed=0)
    model = trained("dqn", method, 120, env, train_freq=train_freq, gradient_steps=-1)
    assert model._n_updates > 30


@pytest.mark.parametrize("name", KINDS)
def test_normalised_observations(name, tmp_path):
    def env() -> VecNormalize:
        return VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))

    plain, watched, split = env(), env(), env()
    assert same(weights(made(name, plain).learn(128)), weights(trained(name, "monitor", 128, watched)))
    assert np.array_equal(plain.obs_rms.mean, watched.obs_rms.mean)
    trained(name, "split", 128, split).save(tmp_path / "model")
    assert split.obs_rms.count == plain.obs_rms.count > 64
    type_ = KINDS[name][0]
    loaded = type_.load(tmp_path / "model", env=split, device="cpu")
    assert loaded.get_vec_normalize_env() is split


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_state_dependent_exploration(name, method, tmp_path):
    model = trained(name, method, env=gym.make("Pendulum-v1"), use_sde=True, sde_sample_freq=4)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert same(weights(model), weights(loaded))
