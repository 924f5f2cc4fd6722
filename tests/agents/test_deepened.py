"""Models that gained hidden layers while they trained: saved, loaded by stable-baselines3 alone, trained on."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from torch import nn

import recycle
from agents import RecycleCallback, networks_of
from agents.deepened import deepened, remember_depth
from agents.elastic import elastic
from recycle import Deepen, Prune
from tests.agents.test_elastic import learn, made, optimizers, same

CASES: list[tuple[str, dict[str, Any], bool]] = [  # and whether net_arch can say the new layers
    ("ppo", {}, True),
    ("ppo with halves", {"most": 2}, True),
    ("ppo", {"kind": "blend"}, False),
    ("ppo", {"kind": "pair"}, False),
    ("dqn", {}, True),
    ("dqn", {"kind": "residual", "most": 2}, False),
    ("sac", {}, True),
    ("crossq", {}, False),  # no BatchRenorm in the new layer
    ("ppo cnn", {"layers": ("features_extractor.linear.0", "features_extractor.cnn.2")}, False),
]


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_deeper_model_is_saved_loaded_and_trains_on(
    name: str, options: dict[str, Any], plain: bool, tmp_path: Any
) -> None:
    model = made(name)
    callback = RecycleCallback(method="net2deeper", method_kwargs=options, every=32, jumps=True)
    learn(model, 160, callback=callback)
    events = [report for reports in callback.reports for report in reports.values()]
    edits = sum(len(report.interventions) for report in events)
    assert edits == options.get("most", 1) * len(networks_of(model)) and not any(r.note for r in events)
    assert all(report.jumps[0] < 1e-5 for report in events if report.interventions)  # in float32
    assert (model.policy_class is not deepened) is plain
    before = made(name)
    assert len(list(model.policy.parameters())) > len(list(before.policy.parameters()))
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert str(loaded.policy) == str(model.policy) and same(model, loaded)
    for _ in range(5):
        seen = model.observation_space.sample()
        old, new = (one.predict(seen, deterministic=True)[0] for one in (model, loaded))
        assert np.array_equal(old, new)
    again = RecycleCallback(method="net2deeper", method_kwargs=options, every=32, jumps=True)
    for one, who in ((model, callback), (loaded, again)):
        held = {id(p) for optimizer in optimizers(one) for group in optimizer.param_groups for p in group["params"]}
        trained = {n: p for n, p in one.policy.named_parameters() if "target" not in n}
        assert {id(p) for p in trained.values()} <= held
        values = {n: p.detach().clone() for n, p in trained.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*statistics begin anew")  # its state is used
            learn(one, 64, callback=who, reset_num_timesteps=False)
        assert not any(r.interventions for r in who.reports[-1].values())  # deep enough
        moved = [n for n, p in trained.items() if not torch.equal(p, values[n])]
        assert len(moved) > len(trained) / 2


def test_a_tanh_policy_takes_another_kind() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=1, seed=0, device="cpu")
    refused = RecycleCallback(method="net2deeper", every=32)
    with pytest.warns(UserWarning, match="Tanh"):
        model.learn(96, callback=refused)
    assert "Tanh is not the identity on what Tanh gives" in refused.reports[0]["policy"].note
    taken = RecycleCallback(method="net2deeper", method_kwargs={"kind": "blend"}, every=32)
    with pytest.warns(UserWarning, match="Tanh"):
        model.learn(96, callback=taken, reset_num_timesteps=False)
    assert sum(len(reports["policy"].interventions) for reports in taken.reports) == 1


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_layers_that_net_arch_can_say_need_nothing_of_ours_to_load(name: str, tmp_path: Any) -> None:
    model = made(name)
    learn(model, 96, callback=RecycleCallback(method="net2deeper", every=32))
    model.save(tmp_path / "model.zip")
    code = (
        f"import sys; from stable_baselines3 import {name.upper()}; "
        f"print({name.upper()}.load({str(tmp_path / 'model.zip')!r}, device='cpu').policy.net_arch); "
        "assert not any(name.split('.')[0] in ('agents', 'recycle') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({"ppo": {"pi": [16, 16, 16], "vf": [16, 16, 16]}, "dqn": [16, 16, 16]}[name])


@pytest.mark.parametrize("kind", ["identity", "residual"])
def test_widths_and_layers_change_in_turn(kind: Any, tmp_path: Any) -> None:
    model = made("dqn")
    [network] = networks_of(model)
    held: dict[str, Any] = {"optimizers": network.optimizers, "targets": network.targets}
    targets = [target for target, _ in network.targets]
    for _ in range(2):
        learn(model, 64)
        recycle.apply(Prune([0, 3]), next(iter(network.trace())), **held)
        edit = Deepen(["q_net.0"], kind=kind)
        inserted = recycle.deepen(edit, network.trace(), optimizers=network.optimizers, targets=targets)
        remember_depth(model, [(network, each) for each in inserted])
    assert model.policy_class is (elastic if kind == "residual" else type(model.policy))
    model.save(tmp_path / "model.zip")
    loaded = DQN.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert str(loaded.policy) == str(model.policy) and same(model, loaded)
    learn(loaded, 64)
    assert sum(isinstance(layer, nn.Linear) for layer in loaded.q_net.modules()) == (5 if kind == "identity" else 7)
