import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from sklearn.datasets import load_digits
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from agents.envs import DigitsBandit, make_env

DATA = load_digits()


def test_both_checkers_accept_it(recwarn):
    check_env(DigitsBandit())
    check_env(gym.make("DigitsBandit-v1").unwrapped)
    check_env_for_sb3(DigitsBandit())
    assert not [str(w.message) for w in recwarn if "DigitsBandit" in str(w.message)]


def test_the_true_class_pays_one_and_any_other_nothing():
    env = DigitsBandit()
    label_of = {image.tobytes(): label for image, label in zip(env.pixels, DATA.target, strict=True)}
    assert len(label_of) == 1797
    observation, _ = env.reset(seed=0)
    paid = []
    for step in range(20):
        answer = label_of[observation.tobytes()] if step % 2 == 0 else (label_of[observation.tobytes()] + 1) % 10
        observation, reward, terminated, truncated, _ = env.step(answer)
        paid.append(reward)
        assert (terminated, truncated) == (step == 19, False)
    assert paid == [1.0, 0.0] * 10


def test_observations_are_the_data_scaled_to_one():
    env = DigitsBandit()
    assert env.observation_space == gym.spaces.Box(0, 1, (64,), np.float32)
    assert env.action_space == gym.spaces.Discrete(10)
    np.testing.assert_array_equal(env.pixels, (DATA.data / 16).astype(np.float32))
    assert (env.pixels.min(), env.pixels.max(), env.pixels.dtype) == (0.0, 1.0, np.float32)


def images_of(env, seed, steps=60):
    shown = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observation, _, terminated, _, _ = env.step(0)
        shown.append(env.reset()[0] if terminated else observation)
    return np.array(shown)


def test_the_reset_seed_decides_the_images():
    one, other = DigitsBandit(), DigitsBandit()
    np.random.seed(1)
    first = images_of(one, 5)
    np.random.seed(2)
    np.testing.assert_array_equal(first, images_of(other, 5))
    assert (first != images_of(other, 6)).any(axis=1).mean() > 0.9


def test_a_pool_of_images_uses_the_first_ones_only():
    env = gym.make("DigitsBandit-v1", images=3, episode_length=7).unwrapped
    np.testing.assert_array_equal(np.unique(images_of(env, 0), axis=0), np.unique(env.pixels[:3], axis=0))
    assert env.answers.tolist() == [0, 1, 2]
    env.reset()
    assert [env.step(0)[2] for _ in range(7)] == [False] * 6 + [True]


def test_copies_share_one_table_that_nobody_can_write():
    one, other = DigitsBandit(), DigitsBandit()
    assert np.shares_memory(one.pixels, other.pixels)
    with pytest.raises(ValueError, match=r"read-only"):
        one.pixels[0] = 0
    for observation in (one.reset(seed=0)[0], one.step(0)[0]):
        observation[:] = 9  # the user's own array
    assert one.pixels.max() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "1 to 1797 images, got 0"),
        ({"images": 1798}, "1 to 1797 images, got 1798"),
        ({"episode_length": 0}, "episode_length of 1 or more, got 0"),
        ({"render_mode": "human"}, "cannot be rendered, got render_mode='human'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DigitsBandit(**options)


def test_relabelling_redraws_every_answer_uniformly_and_task_0_has_the_true_ones():
    env = make_env("DigitsBandit-v1", drift="relabel", frozen=True)
    bandit, tables = env.unwrapped, []
    for task in range(6):
        env.set_task(task)
        env.reset()
        tables.append(bandit.answers)
    np.testing.assert_array_equal(tables[0], DATA.target)
    for table in tables[1:]:
        assert table.shape == (1797,)
        counts = np.bincount(table, minlength=10)
        assert counts.sum() == 1797
        assert (abs(counts - 179.7) < 65).all()  # five deviations of a binomial count
        same = table == DATA.target
        assert same.mean() == pytest.approx(0.1, abs=0.04)
    assert (tables[1] == tables[2]).mean() == pytest.approx(0.1, abs=0.04)
    np.testing.assert_array_equal(bandit.labels, DATA.target)


def test_relabelling_pays_for_the_new_answers():
    env = make_env("DigitsBandit-v1", drift="relabel", frozen=True, env_kwargs={"images": 1})
    env.set_task(2)
    env.reset()
    answer = int(env.unwrapped.answers[0])
    assert env.step(answer)[1] == 1.0
    assert env.step((answer + 1) % 10)[1] == 0.0


def test_relabelling_another_environment_is_refused():
    with pytest.raises(TypeError, match=r"Relabel expects a DigitsBandit, got CartPoleEnv. Use DigitsBandit-v1"):
        make_env("CartPole-v1", drift="relabel")
