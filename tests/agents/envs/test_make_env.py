import gymnasium as gym
import numpy as np
import pytest

from agents.envs import OffsetObservation, PermuteObservation, make_env
from tests.agents.envs.playing import content, play, tasks_of


def test_stacked_drifts_share_one_clock_and_one_task():
    env = make_env("CartPole-v1", drift=("physics", "offset", "remap"), change="every:20", seed=3, n_envs=2)
    assert str(env).startswith("<RemapAction<OffsetObservation<CartPolePhysics<")
    seen = play(env, 70, seed=0)
    assert tasks_of(seen) == sorted(tasks_of(seen))
    assert max(tasks_of(seen)) >= 4
    drifts = [env, env.env, env.env.env]
    assert [drift.drift_clock for drift in drifts] == [140] * 3
    env.set_drift_clock(200)
    env.reset()
    assert [drift.drift_task for drift in drifts] == [10] * 3
    alone = content("offset", "offset", [10], seed=3)[0]
    np.testing.assert_array_equal(env.env.offset, alone)  # what lies around it does not matter


def test_a_stacked_frozen_copy_follows_as_one():
    env = make_env("CartPole-v1", drift=["permute", "reward_flip"], frozen=True)
    env.set_task(5)
    env.reset()
    assert [env.drift_task, env.env.drift_task] == [5, 5]
    assert env.step(0)[1] == -1.0


@pytest.mark.parametrize(
    "other", [{"change": "every:20"}, {"n_envs": 2}, {"mid_episode": True}, {"frozen": True}, {"change": "random:10"}]
)
def test_stacked_drifts_with_different_clocks_are_refused(other):
    inner = PermuteObservation(gym.make("CartPole-v1"), change="every:10")
    with pytest.raises(ValueError, match=r"OffsetObservation expects the .* of PermuteObservation .* one clock"):
        OffsetObservation(inner, **({"change": "every:10"} | other))


def test_a_drift_put_on_a_running_one_joins_its_clock():
    inner = PermuteObservation(gym.make("CartPole-v1"), change="every:10")
    inner.set_drift_clock(35)
    outer = OffsetObservation(inner, change="every:10")
    assert outer.reset()[1]["drift/task"] == inner.drift_task == outer.drift_task == 3


def test_each_option_goes_to_every_drift_that_knows_it():
    env = make_env(
        "CartPole-v1", drift=("offset", "scale", "mask"), drift_kwargs={"strength": 3.0, "fraction": 0.5}, frozen=True
    )
    env.set_task(1)
    env.reset()
    assert env.masked.sum() == 2
    limits = 24 * np.pi / 180  # of the angle, in radians
    assert env.observation_space.high[2] == pytest.approx((limits + 3) * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"drift": "permut"}, "no drift 'permut': did you mean 'permute'.* there are permute, offset, "),
        ({"drift": ("offset", "xyz")}, "no drift 'xyz': there are permute, offset, "),
        ({"drift": ("offset", "offset")}, "named once; got 'offset' twice"),
        ({"drift_kwargs": {"strength": 1}}, "'strength'. Valid options are none without a drift"),
        ({"env_id": "CartPol-v1"}, "got 'CartPol-v1': .*Did you mean: `CartPole`"),
        ({"env_id": "CartPole-v9"}, "got 'CartPole-v9': .*v1"),
        ({"drift": "offset", "n_envs": 0}, "n_envs of 1 or more, got 0"),
        ({"drift": "offset", "change": "often"}, "A schedule is one of .* got 'often'"),
        ({"rank": -1}, "rank of 0 or more, got -1"),
    ],
)
def test_make_env_refuses_what_it_does_not_know(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_env(**({"env_id": "CartPole-v1"} | call))
    assert "\n" not in str(refusal.value)


def test_copies_differ_by_rank_only_in_their_resets():
    starts = [make_env("CartPole-v1", drift="offset", seed=2, rank=rank).reset()[0] for rank in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).all()
