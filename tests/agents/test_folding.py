"""Agents that grow by folding where their critics are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TQC, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import Tensor, nn

from agents import RecycleCallback, networks_of
from agents.td_errors import Critic, TDErrors
from recycle import Grow, NotRecyclable, Report
from tests.agents.test_algorithms import outputs
from tests.agents.test_elastic import same, widths_of
from tests.agents.test_growth import reseed

torch.set_num_threads(1)
RELU = {"net_arch": [8, 8], "activation_fn": nn.ReLU}
ON = {"n_steps": 32, "batch_size": 16, "n_epochs": 1}
OFF = {"learning_starts": 16, "buffer_size": 200, "batch_size": 8}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ppo": (PPO, "CartPole-v1", ON),
    "dqn": (DQN, "CartPole-v1", OFF | {"target_update_interval": 20}),
    "qrdqn": (QRDQN, "CartPole-v1", OFF),
    "sac": (SAC, "Pendulum-v1", OFF),
    "tqc": (TQC, "Pendulum-v1", OFF),
    "td3": (TD3, "Pendulum-v1", OFF),
    "recurrent_ppo": (RecurrentPPO, "CartPole-v1", ON),
}


def made(name: str, env: Any = None, **kwargs: Any) -> Any:
    kind, usual, own = KINDS[name]
    policy = kwargs.pop("policy", "MlpLstmPolicy" if name == "recurrent_ppo" else "MlpPolicy")
    return kind(policy, env or usual, policy_kwargs=dict(RELU), seed=0, device="cpu", **own | kwargs)


class Folding(RecycleCallback):
    """Remembers by how much each event moved what the networks say."""

    moved: tuple[float, ...] = ()

    def __init__(self, *, method: str = "folding", **options: Any) -> None:
        super().__init__(method=method, every=64, sample_every=1, **options)

    def _step(self) -> dict[str, Report]:
        before = outputs(self.model)
        reports = super()._step()
        far = [float((a - b).abs().max()) for a, b in zip(before, outputs(self.model), strict=True)]
        self.moved = (*self.moved, max(far))
        return reports

    def notes(self, event: int = 0) -> dict[str, str]:
        reports = self.reports[event].values()
        return {name: group.note for report in reports for name, group in report.groups.items()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def critic(model: Any) -> Critic:
    found = networks_of(model)[-1].critic
    assert isinstance(found, Critic)
    return found


# ---------------------------------------------------------------- growing


ACTORS = {
    "mlp_extractor.policy_net.0": "no example is mispredicted because of 'mlp_extractor.policy_net.0'",
    "latent_pi.2": "an actor predicts no value, so it has no mispredicted example",
}


@pytest.mark.parametrize(("name", "method"), [("ppo", "folding"), ("dqn", "grow+folding"), ("sac", "folding")])
def test_an_agent_grows_by_folding_is_saved_and_loads(name: str, method: str, tmp_path: Path) -> None:
    model = made(name)
    options = {"folding": {"most": 9}} | ({"grow": {"when": "every:1"}} if "+" in method else {})
    callback = Folding(method=method, method_kwargs=options if "+" in method else options["folding"])
    start = widths_of(model)
    model.learn(140, callback=callback)
    edits = [edit for reports in callback.reports for report in reports.values() for _, edit in report.edits]
    assert edits and all(isinstance(edit, Grow) for edit in edits)
    assert max(callback.moved) < 1e-6
    grown = {group for group, width in widths_of(model).items() if width == 9}
    learnt = {group for group in start if not any(part in group for part in ("policy_net", "latent_pi"))}
    assert all(note.startswith(ACTORS[layer]) for layer, note in callback.notes().items() if layer in ACTORS)
    assert grown == learnt and all(widths_of(model)[group] == 8 for group in start.keys() - learnt)
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", device="cpu")
    assert same(model, loaded)
    for one, other in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_a_loaded_agent_folds_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    """PPO stops behind a rollout whose returns the next event looks at; the replay buffer begins anew in both."""
    told, ended = [], []
    for reload in (False, True):
        path = tmp_path / f"edits{reload}.jsonl"
        model, callback = made(name), Folding(edits=path)
        model.learn(128, callback=callback)
        assert (callback.recyclers["policy" if name == "ppo" else "q_net"].examples.drawn is None) is (name == "dqn")  # type: ignore[union-attr]
        if reload:
            model.save(tmp_path / "model.zip")
            model, callback = type(model).load(tmp_path / "model.zip", env=model.get_env()), Folding(edits=path)
        reseed(model)
        model.learn(128, callback=callback, reset_num_timesteps=False)
        told.append([json.loads(line) for line in path.read_text().splitlines()])
        ended.append(model)
    assert told[0] == told[1] and same(*ended)
    assert sum(len(line["edits"]) for line in told[0][-3:]) >= 2


def test_an_agent_is_deepened_behind_a_fold_and_loads(tmp_path: Path) -> None:
    model, callback = made("ppo"), Folding(method_kwargs={"most": 9, "deepen": 1})
    model.learn(160, callback=callback)
    assert max(callback.moved) < 1e-6
    widths = [layer.out_features for layer in model.policy.mlp_extractor.value_net if isinstance(layer, nn.Linear)]
    assert widths == [9, 9, 9, 9]
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    assert same(model, loaded) and all(map(torch.equal, outputs(model), outputs(loaded)))


class Drawing(BaseCallback):
    """Draws examples at every rollout's end, and says what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = generator()
        self.returns: list[Tensor] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        given, targets = critic(self.model).draw(self.generator)
        if isinstance(self.model, PPO):
            self.returns.append(targets)
            buffer = self.model.rollout_buffer
            seen = torch.as_tensor(buffer.observations).reshape(-1, 4)
            rows = [int((seen == row).all(1).nonzero()[0, 0]) for row in given]
            assert len(set(rows)) == len(rows) == buffer.returns.size
            assert torch.equal(torch.as_tensor(buffer.returns).reshape(-1, 1)[rows], targets)


@pytest.mark.parametrize("name", ["ppo", "dqn", "sac", "td3"])
def test_drawing_examples_changes_nothing(name: str) -> None:
    one = made(name)
    one.learn(96)
    after = torch.get_rng_state(), np.random.get_state()[1]
    other, drawing = made(name), Drawing()
    other.learn(96, callback=drawing)
    assert torch.equal(after[0], torch.get_rng_state()) and np.array_equal(after[1], np.random.get_state()[1])
    assert same(one, other) and not torch.equal(drawing.generator.get_state(), generator().get_state())
    assert name != "ppo" or drawing.returns[0].std() > 0  # and they were the buffer's own


# ---------------------------------------------------------------- TD errors


def learnt(name: str, *, copies: int = 1, **options: Any) -> Any:
    """A model with normalised observations and rewards that has learnt a little."""
    env = VecNormalize(make_vec_env(KINDS[name][1], n_envs=copies), gamma=0.99)
    model = made(name, env, **options)
    model.learn(60)
    model.policy.set_training_mode(True)
    return model


def replayed(model: Any) -> Any:
    """The same examples, drawn by hand; what is drawn behind them (actions, noise) is the same then, too."""
    seed = int(torch.randint(2**31, (), generator=generator()))
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.replay_buffer.sample(model.replay_buffer.size(), env=model.get_vec_normalize_env())


@pytest.mark.parametrize("name", ["dqn", "qrdqn"])
def test_td_errors_of_taken_actions_are_those_worked_out_by_hand(name: str) -> None:
    model = learnt(name, copies=2)
    errors = TDErrors(critic(model), generator())
    values, losses, targets = errors()
    values_now = values.detach()
    seen = replayed(model)
    kind = "q_net" if name == "dqn" else "quantile_net"
    net, target = getattr(model, kind), getattr(model, f"{kind}_target")
    assert len(values) == len(seen.rewards) == model.replay_buffer.size()
    for i in range(len(values)):
        now, then = net(seen.observations[i : i + 1])[0].detach(), target(seen.next_observations[i : i + 1])[0]
        if name == "qrdqn":
            now, then = now.mean(0), then.mean(0)
        value = float(now[int(seen.actions[i])])
        wanted = float(seen.rewards[i]) + (0.0 if seen.dones[i] else 0.99 * float(then.detach().max()))
        assert float(values_now[i]) == pytest.approx(value, abs=1e-5)
        assert float(targets[i]) == pytest.approx(wanted, abs=1e-5)
        assert float(losses.detach()[i]) == pytest.approx(abs(value - wanted), abs=1e-5)
    assert values.requires_grad and not targets.requires_grad and seen.dones.any()
    assert all(torch.equal(a, b) for a, b in zip((values, losses, targets), errors(), strict=True))
    errors.forget()
    assert not torch.equal(errors()[2], targets)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("name", ["sac", "tqc", "td3"])
def test_td_errors_of_critics_are_those_of_the_algorithms_own_loss(name: str) -> None:
    model = learnt(name)
    values, losses, targets = TDErrors(critic(model), generator())()
    seen = replayed(model)
    with torch.no_grad():
        if name == "td3":
            noise = torch.randn_like(seen.actions).mul(0.2).clamp(-0.5, 0.5)
            actions, bonus = (model.actor_target(seen.next_observations) + noise).clamp(-1, 1), torch.zeros(1)
        else:
            actions, log_prob = model.actor.action_log_prob(seen.next_observations)
            bonus = -model.log_ent_coef.exp() * log_prob[:, None]
        said = model.critic_target(seen.next_observations, actions)
        if name == "tqc":
            kept = [sorted(row.flatten().tolist())[: 2 * 25 - 2 * 2] for row in said]
            least = torch.tensor(kept).mean(1, keepdim=True)
        else:
            least = torch.minimum(*said)
        wanted = seen.rewards + 0.99 * (1 - seen.dones) * (least + bonus)
    now = model.critic(seen.observations, seen.actions)
    now = now.mean(2) if name == "tqc" else torch.cat(now, 1)
    assert values.shape == targets.shape == now.shape == (len(seen.rewards), 2)
    assert torch.allclose(values, now) and torch.allclose(targets, wanted.expand(-1, 2), atol=1e-5)
    assert torch.allclose(losses, (now - wanted).abs().mean(1), atol=1e-5)


def test_n_step_targets_have_their_own_discounts() -> None:
    model = learnt("dqn", n_steps=3)
    _, _, targets = TDErrors(critic(model), generator())()
    seen = replayed(model)
    then = model.q_net_target(seen.next_observations).amax(1, keepdim=True)
    assert seen.discounts is not None and seen.discounts.unique().numel() > 1
    assert torch.allclose(targets, seen.rewards + (1 - seen.dones) * seen.discounts * then)


# ---------------------------------------------------------------- what cannot be folded, and says so


def test_a_recurrent_critic_is_refused_by_reason() -> None:
    callback = Folding()
    made("recurrent_ppo").learn(140, callback=callback)
    notes = callback.notes()
    assert notes["mlp_extractor.value_net.0"].startswith("a recurrent critic predicts from all steps before")
    assert all(notes.values())


class Forgetting(BaseCallback):
    """Empties the replay buffer before each rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps % 64 == 0:
            self.model.replay_buffer.reset()  # type: ignore[attr-defined]


def test_an_empty_replay_buffer_is_nothing_to_look_at() -> None:
    callback = Folding()
    made("dqn").learn(140, callback=[Forgetting(), callback])
    assert set(callback.notes().values()) == {"the replay buffer is empty: there is no example to look at"}


def test_hindsight_waits_for_an_episode_that_has_ended() -> None:
    env = BitFlippingEnv(n_bits=3, max_steps=30)
    model = made("dqn", env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=1000)
    model._setup_learn(100)
    model.replay_buffer.pos = 5
    with pytest.raises(NotRecyclable, match="the replay buffer has no example yet: Unable to sample before"):
        TDErrors(critic(model), generator())()
    model.replay_buffer.reset()
    model.learn(100)
    values, losses, _ = TDErrors(critic(model), generator())()
    assert values.shape == (100, 1) and losses.isfinite().all()


def test_a_rollout_that_nobody_kept_has_no_returns() -> None:
    model = made("ppo")
    with pytest.raises(NotRecyclable, match="no rollout has ended since the last event"):
        TDErrors(critic(model), generator())()


def test_examples_of_ones_own_come_first() -> None:
    def none() -> Any:
        raise NotRecyclable("these are mine")

    callback = Folding(method_kwargs={"examples": none})
    made("dqn").learn(140, callback=callback)
    assert set(callback.notes().values()) == {"these are mine"}


def test_observations_of_a_discrete_space_can_be_looked_at() -> None:
    model, callback = made("ppo", "FrozenLake-v1"), Folding(jumps=True)
    model.learn(140, callback=callback)
    assert not callback.notes()["mlp_extractor.value_net.0"]
    assert any(reports["policy"].jumps for reports in callback.reports)
