"""Every algorithm with every kind of policy: recycled and resized while it trains, saved, loaded, trained on."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import CrossQ
from sb3_contrib.crossq.policies import CrossQPolicy
from stable_baselines3 import DDPG, DQN, PPO
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN

from agents import RecycleCallback, networks_of
from recycle import Grow, Prune, Split
from tests.agents.test_algorithms import EVERY, build, kill, learn, named, outputs, shape
from tests.agents.test_elastic import moving, moving_with_numbers, same, shapes

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DEAD = (1, 2)
QUICK = {(PPO, "Cnn"), (DQN, "Cnn"), (DDPG, "MultiInput"), (CrossQ, "Cnn")}
"""Of the policies with convolutions, of which tracing takes a while, those that every run of the tests takes."""
CASES = [
    pytest.param(kind, policy, marks=[] if policy == "Mlp" or (kind, policy) in QUICK else pytest.mark.slow)
    for kind in EVERY
    for policy in ("Mlp", "Cnn", "MultiInput")
]


def made(kind: Any, policy: str) -> Any:
    """A small model. sb3-contrib names no CnnPolicy for CrossQ, but its policy takes any features extractor."""
    widths: dict[str, Any] = {"net_arch": [16] if policy == "Mlp" else []}
    if kind is not CrossQ or policy == "Mlp":
        return build(kind, policy, policy_kwargs=widths)
    extractor, options, env = {
        "Cnn": (NatureCNN, {"features_dim": 16}, moving),
        "MultiInput": (CombinedExtractor, {"cnn_output_dim": 16}, moving_with_numbers),
    }[policy]
    widths |= {"features_extractor_class": extractor, "features_extractor_kwargs": options}
    steps = {"learning_starts": 4, "batch_size": 8, "buffer_size": 200}
    return CrossQ(CrossQPolicy, env(), seed=0, device="cpu", policy_kwargs=widths, **steps)


class Everything:
    """A split in place, then a removal, then new units, one event after the other; all of units that are dead."""

    needs = ("minimum", "maximum")

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        call = self.calls[group.name] = self.calls.get(group.name, 0) + 1
        edits = {1: [Split([0], [DEAD[0]], noise=0.1)], 2: [Prune([DEAD[1]])], 3: [Split([0, 3], noise=0.1), Grow(1)]}
        return edits.get(call, [])


@pytest.mark.parametrize(("kind", "policy"), CASES, ids=named)
def test_recycled_and_resized_while_it_trains(kind: Any, policy: str, tmp_path: Any) -> None:
    model = made(kind, policy)
    assert all(kill(model, DEAD).values())
    before = {network.name: dict(shape(network.trace())) for network in networks_of(model)}
    callback = RecycleCallback(method=f"{__name__}:Everything", every=40, sample_every=1)
    learn(model, 240, callback)
    assert {name: [g.name for g in r.graph] for name, r in callback.recyclers.items()} == {
        k: [*v] for k, v in before.items()
    }
    for name, recycler in callback.recyclers.items():
        for group in recycler.graph:
            edits = [type(edit) for event in callback.reports for n, edit in event[name].edits if n == group.name]
            notes = [event[name].groups[group.name].note for event in callback.reports]
            fixed = group.name.startswith("lstm")
            assert edits == ([Split] if fixed else [Split, Prune, Split, Grow]), notes
            assert group.width == before[name][group.name] + (0 if fixed else 2)
    model.save(tmp_path / "model.zip")
    loaded = kind.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert same(model, loaded)
    assert all(torch.equal(old, new) for old, new in zip(outputs(model), outputs(loaded), strict=True))
    for _ in range(5):
        seen = model.observation_space.sample()
        assert np.array_equal(*(one.predict(seen, deterministic=True)[0] for one in (model, loaded)))
    values = copy.deepcopy(loaded.policy.state_dict())
    learn(loaded, 32, RecycleCallback(every=16, sample_every=1))
    now = loaded.policy.state_dict()
    assert sum(not torch.equal(value, now[key]) for key, value in values.items()) > len(values) / 2
    assert all(value.isfinite().all() for value in now.values())
    assert all(shapes(n.module) == shapes(target) for n in networks_of(loaded) for target, _ in n.targets)
