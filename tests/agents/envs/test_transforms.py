from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest

from agents.envs import DRIFTS
from tests.agents.envs.playing import BOXES, Fixed, build, content, on_task

FLOATING = ("symmetric", "uneven", "double", "huge")
OBSERVERS = [(name, box) for name in ("permute", "mask") for box in BOXES]
OBSERVERS += [(name, box) for name in ("offset", "scale") for box in FLOATING]


@pytest.mark.parametrize(("name", "box"), OBSERVERS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_bounds_hold_every_observation_of_every_task(name, box):
    space = BOXES[box]
    env = DRIFTS[name](Fixed(space), frozen=True)
    assert (env.observation_space.shape, env.observation_space.dtype) == (space.shape, space.dtype)
    space.seed(0)
    corners = [np.where(np.isfinite(bound), bound, 0).astype(space.dtype) for bound in (space.low, space.high)]
    for task in range(25):
        env.set_task(task)
        env.reset()
        for observation in [*corners, *(space.sample() for _ in range(10))]:
            seen = env.observation(observation)
            assert seen.dtype == space.dtype
            assert env.observation_space.contains(seen)


def test_the_bounds_are_no_wider_than_they_must_be():
    space = gym.spaces.Box(np.float32([-3, 0.5]), np.float32([-1, 2]))
    low_and_high = {
        name: (DRIFTS[name](Fixed(space)).observation_space.low, DRIFTS[name](Fixed(space)).observation_space.high)
        for name in ("permute", "offset", "scale", "mask")
    }
    expected = {
        "permute": ([-3, -3], [2, 2]),
        "offset": ([-4, -0.5], [0, 3]),
        "scale": ([-6, 0.25], [-0.5, 4]),
        "mask": ([-3, 0], [0, 2]),
    }
    for name, bounds in expected.items():
        np.testing.assert_array_equal(low_and_high[name], np.float32(bounds))


@pytest.mark.parametrize("name", ["permute", "mask"])
def test_images_keep_their_space_and_their_kind(name):
    inner = Fixed(BOXES["pixels"])
    env = DRIFTS[name](inner, frozen=True)
    assert env.observation_space is inner.observation_space
    image = BOXES["pixels"].sample() | 1  # no zeros of its own
    env.set_task(2)
    env.reset()
    seen = env.observation(image)
    assert not np.array_equal(seen, image)
    if name == "permute":
        np.testing.assert_array_equal(np.sort(seen, axis=None), np.sort(image, axis=None))
    else:
        assert (seen == 0).sum() == round(0.25 * image.size)
        np.testing.assert_array_equal(seen[seen > 0], image[seen > 0])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1"])  # two actions, three actions
def test_action_mappings_are_permutations_and_never_the_last_one(env_id):
    mappings = [mapping.tolist() for mapping in content("remap", "mapping", range(60), env_id)]
    count = len(mappings[0])
    assert mappings[0] == list(range(count))
    assert all(sorted(mapping) == mappings[0] for mapping in mappings)
    assert all(before != after for before, after in pairwise(mappings))
    if count == 2:
        assert mappings == [[0, 1], [1, 0]] * 30
    else:
        assert len({tuple(mapping) for mapping in mappings}) == 6
        assert mappings.count([0, 1, 2]) == 1


def test_remapped_actions_reach_the_environment_with_their_start():
    env = DRIFTS["remap"](Fixed(BOXES["symmetric"]), frozen=True)
    env.set_task(1)
    env.reset()
    received = []
    for action in (2, 3, 4):
        env.step(np.int64(action))
        received.append(int(env.env.received))
    assert sorted(received) == [2, 3, 4]
    assert received != [2, 3, 4]
    for action in (1, 5):
        with pytest.raises(
            gym.error.InvalidAction, match=rf"expects an action of Discrete\(3, start=2\), got {action}"
        ):
            env.step(action)


def test_all_permutations_of_one_kind_are_equally_likely():
    orders = content("permute", "order", range(1, 2401, 2))
    counts = np.unique([order.tolist() for order in orders], axis=0, return_counts=True)[1]
    assert len(counts) == 12  # the odd half of 24
    assert (abs(counts - 100) < 50).all()  # five deviations


def test_offsets_fill_their_strength_and_factors_theirs():
    offsets = np.array(content("offset", "offset", range(1, 101), drift_kwargs={"strength": 2.0}))
    assert offsets.shape == (100, 4)
    assert 1.9 < offsets.max() <= 2
    assert -2 <= offsets.min() < -1.9
    assert abs(offsets.mean()) < 0.3
    factors = np.array(content("scale", "factor", range(1, 101), drift_kwargs={"strength": 4.0}))
    assert 3.7 < factors.max() <= 4
    assert 0.25 <= factors.min() < 0.27
    assert abs(np.log(factors).mean()) < 0.2


@pytest.mark.parametrize(("fraction", "masked"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (0.99, 3)])
def test_masks_blank_their_fraction_and_differ(fraction, masked):
    masks = content("mask", "masked", range(40), drift_kwargs={"fraction": fraction})
    assert [mask.sum() for mask in masks] == [0] + [masked] * 39
    assert all((before != after).any() for before, after in pairwise(masks))
    shares = np.mean(masks[1:], axis=0)
    assert shares.min() > 0.15  # every element has its turn
    other = content("mask", "masked", range(40), drift_kwargs={"fraction": fraction}, seed=1)
    assert (np.array(masks) != np.array(other)).any()


def test_rewards_are_scaled_within_their_range_and_flipped_in_turn():
    factors = np.array(content("reward_scale", "factor", range(200), drift_kwargs={"low": 0.5, "high": 4.0}))
    assert factors[0] == 1
    assert 0.5 <= factors[1:].min() < 0.53
    assert 3.8 < factors[1:].max() <= 4
    assert content("reward_flip", "sign", range(4)) == [1, -1, 1, -1]
    for name, expected in (("reward_scale", factors[3]), ("reward_flip", -1)):
        options = {"drift_kwargs": {"low": 0.5, "high": 4.0}} if name == "reward_scale" else {}
        env = on_task(3, name, "CartPole-v1", **options)
        env.reset()
        assert env.step(0)[1] == expected


NESTED = gym.spaces.Dict(a=gym.spaces.Box(0, 1, (2,)))
ONE = gym.spaces.Box(0, 1, (1,))


@pytest.mark.parametrize(
    ("name", "env", "error", "message"),
    [
        ("permute", Fixed(NESTED), TypeError, "PermuteObservation expects a Box observation space, got Dict.*Flatten"),
        ("mask", Fixed(gym.spaces.Discrete(5)), TypeError, "MaskObservation expects a Box.* got Discrete.*Flatten"),
        ("offset", Fixed(NESTED), TypeError, "OffsetObservation expects a Box observation space, got Dict"),
        ("offset", Fixed(BOXES["pixels"]), TypeError, "OffsetObservation expects floating-point .*uint8.* Use permute"),
        ("scale", Fixed(BOXES["pixels"]), TypeError, "ScaleObservation expects floating-point .*uint8.* Use permute"),
        ("scale", Fixed(BOXES["bits"]), TypeError, "ScaleObservation expects floating-point .*bool"),
        ("remap", Fixed(ONE, ONE), TypeError, "RemapAction expects a Discrete action space, got Box.* Change"),
        ("remap", Fixed(ONE, gym.spaces.Discrete(1)), ValueError, "RemapAction expects two actions or more"),
        ("permute", Fixed(ONE), ValueError, r"PermuteObservation expects two .* got shape \(1,\). Use offset"),
        ("mask", Fixed(ONE), ValueError, r"MaskObservation expects two .* got shape \(1,\). Use offset"),
    ],
)
def test_unsupported_spaces_are_refused(name, env, error, message):
    with pytest.raises(error, match=message):
        DRIFTS[name](env)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("offset", {"strength": 0}, "OffsetObservation expects a strength above 0, got 0"),
        ("offset", {"strength": float("nan")}, "a strength above 0, got nan"),
        ("scale", {"strength": 1}, "ScaleObservation expects a strength above 1, got 1"),
        ("mask", {"fraction": 1}, "MaskObservation expects a fraction between 0 and 1, got 1"),
        ("reward_scale", {"low": 2, "high": 1}, "ScaleReward expects 0 < low < high, got low=2 and high=1"),
        ("reward_scale", {"low": 0}, "ScaleReward expects 0 < low < high, got low=0"),
        ("reward_scale", {"stregnth": 2}, "No chosen drift knows the option 'stregnth'.* low, high, mid_episode"),
        ("permute", {"seed": 2}, "No chosen drift knows the option 'seed'. Valid options are permute: mid_episode"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, "CartPole-v1", drift_kwargs=options)
