import gymnasium as gym
import numpy as np
import pytest

from agents.envs import CartPolePhysics, make_env

NOMINAL = {"gravity": 9.8, "masscart": 1.0, "masspole": 0.1, "length": 0.5, "force_mag": 10.0}


def play(env, steps=12):
    """The observations of a fixed sequence of actions from a fixed start."""
    observations = [env.reset(seed=7)[0]]
    for step in range(steps):
        observations.append(env.step(np.int64(step % 3 == 0))[0])
    return np.array(observations)


def on_task(task, **options):
    env = make_env("CartPole-v1", drift="physics", drift_kwargs=options, frozen=True)
    env.set_task(task)
    return env


def values(env):
    return {name: getattr(env.unwrapped, name) for name in NOMINAL}


@pytest.mark.parametrize("parameter", NOMINAL)
def test_each_parameter_alone_changes_the_trajectory(parameter):
    drifted, plain = on_task(1, parameters=parameter), gym.make("CartPole-v1")
    difference = np.abs(play(drifted) - play(plain)).max(axis=1)
    assert difference[0] == 0  # the same start
    assert difference[-1] > 1e-3
    changed = {name for name, value in values(drifted).items() if value != NOMINAL[name]}
    assert changed == {parameter}


def test_the_motion_is_that_of_a_cartpole_built_with_these_values():
    drifted, built = on_task(3), gym.make("CartPole-v1")
    observed = play(drifted)
    for name, value in values(drifted).items():
        setattr(built.unwrapped, name, value)
    built.unwrapped.total_mass = built.unwrapped.masscart + built.unwrapped.masspole
    built.unwrapped.polemass_length = built.unwrapped.masspole * built.unwrapped.length
    np.testing.assert_array_equal(observed, play(built))
    assert drifted.unwrapped.total_mass == pytest.approx(sum(values(drifted)[m] for m in ("masscart", "masspole")))


def test_task_0_restores_the_values_that_the_environment_came_with():
    plain = gym.make("CartPole-v1")
    plain.unwrapped.gravity = 3.7
    reference = play(plain)
    env = CartPolePhysics(plain, frozen=True)
    env.set_task(5)
    assert np.abs(play(env) - reference).max() > 1e-3
    assert env.unwrapped.gravity != 3.7
    env.set_task(0)
    np.testing.assert_array_equal(play(env), reference)
    assert values(env) == {**NOMINAL, "gravity": 3.7}
    assert (env.unwrapped.total_mass, env.unwrapped.polemass_length) == (1.1, 0.05)


def test_values_fill_the_documented_ranges_and_no_more():
    env = on_task(0)
    drawn = {name: [] for name in NOMINAL}
    for task in range(1, 201):
        env.set_task(task)
        env.reset()
        for name, value in values(env).items():
            drawn[name].append(value)
    assert set(CartPolePhysics.ranges) == set(NOMINAL)
    for name, (low, high) in CartPolePhysics.ranges.items():
        assert low <= min(drawn[name]) < low * 1.1
        assert high / 1.1 < max(drawn[name]) <= high
        assert low < NOMINAL[name] < high
        assert len(set(drawn[name])) == 200


def test_choosing_fewer_parameters_does_not_move_the_others():
    every, one, two = on_task(4), on_task(4, parameters=["masscart"]), on_task(4, parameters="masscart, length")
    for env in (every, one, two):
        env.reset()
    assert values(one) == {**NOMINAL, "masscart": values(every)["masscart"]}
    assert values(two) == {**values(one), "length": values(every)["length"]}


def test_another_environment_or_parameter_is_refused():
    with pytest.raises(TypeError, match=r"CartPolePhysics expects a CartPoleEnv, got AcrobotEnv. Choose"):
        make_env("Acrobot-v1", drift="physics")
    for bad in ("mass", ["masscart", "tau"], "", []):
        with pytest.raises(ValueError, match=r"parameters out of gravity, masscart, .* Name one or more"):
            make_env("CartPole-v1", drift="physics", drift_kwargs={"parameters": bad})
