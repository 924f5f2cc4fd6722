import copy
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.envs.schedule import At, Cyclic, Every, Random, parse

intervals = st.integers(1, 5_000)
seeds = st.integers(0, 2**32)
schedules = st.one_of(
    st.builds(Every, intervals),
    st.builds(At, st.sets(st.integers(1, 20_000), min_size=1, max_size=8).map(lambda s: tuple(sorted(s)))),
    st.builds(Cyclic, intervals, st.integers(2, 5)),
    st.builds(Random, st.integers(20, 5_000), seeds),
)
steps = st.integers(0, 20_000)


@pytest.mark.parametrize(
    ("spec", "tasks", "points"),
    [
        ("every:10", [0, 0, 1, 1, 2], [10, 20]),
        ("at:5,19,20", [0, 1, 1, 2, 3], [5, 19, 20]),
        ("cyclic:10", [0, 0, 1, 1, 0], [10, 20]),
        ("cyclic:5,3", [0, 1, 2, 0, 1], [5, 10, 15, 20]),
        ("random:1", [0, 9, 10, 19, 20], list(range(1, 25))),
    ],
)
def test_a_schedule_written_out(spec, tasks, points):
    schedule = parse(spec)
    assert [schedule.task_at(step) for step in (0, 9, 10, 19, 20)] == tasks
    assert schedule.change_points(25) == points


@given(schedules, steps)
def test_the_task_changes_at_the_change_points_and_nowhere_else(schedule, horizon):
    points = schedule.change_points(horizon)
    assert points == sorted(set(points))
    assert all(0 < point < horizon for point in points)
    for point in points[:50]:
        assert schedule.task_at(point) != schedule.task_at(point - 1)
    for start, end in zip([0, *points][:50], [*points, horizon][:50], strict=True):
        if start < end:
            assert schedule.task_at(start) == schedule.task_at((start + end) // 2) == schedule.task_at(end - 1)


@given(schedules, steps, steps)
def test_the_task_counts_the_changes(schedule, one, other):
    early, late = sorted((one, other))
    changes = len(schedule.change_points(late + 1))
    if isinstance(schedule, Cyclic):
        changes %= schedule.tasks
    else:
        assert schedule.task_at(early) <= schedule.task_at(late)
    assert schedule.task_at(0) == 0
    assert schedule.task_at(late) == changes


@given(schedules, steps, steps)
def test_a_longer_horizon_only_adds_change_points(schedule, one, other):
    near, far = sorted((one, other))
    points = schedule.change_points(far)
    assert schedule.change_points(near) == [point for point in points if point < near]


@given(schedules, steps)
def test_copies_of_a_schedule_agree(schedule, step):
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert twin.task_at(step) == schedule.task_at(step)


@given(st.integers(2, 5_000), seeds)
def test_random_intervals_stay_within_half_of_the_mean(mean, seed):
    points = [0, *parse(f"random:{mean}", seed).change_points(40 * mean)]
    lengths = [later - earlier for earlier, later in pairwise(points)]
    assert min(lengths) >= mean - mean // 2
    assert max(lengths) <= mean + mean // 2


def test_random_intervals_have_the_stated_mean_and_follow_the_seed():
    points = parse("random:100", 3).change_points(1_000_000)
    assert abs(points[-1] / len(points) - 100) < 1  # 10,000 draws with a deviation of 29: 3 sigma are 0.9
    assert parse("random:100", 3).change_points(5_000) == points[: len(parse("random:100", 3).change_points(5_000))]
    assert parse("random:100", 4).change_points(5_000) != parse("random:100", 3).change_points(5_000)


def test_numbers_may_be_written_as_people_write_them():
    assert parse("every:10_000") == parse("every:1e4") == parse("every: 10000") == Every(10_000)
    assert parse("cyclic:10") == Cyclic(10, 2)
    assert parse("cyclic:10,4") == Cyclic(10, 4)
    assert parse("at:5000,20000") == At((5_000, 20_000))
    assert parse("random:7", 5) == Random(7, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sometimes:10", "one of .*every:10000.* got 'sometimes:10'"),
        ("10000", "one of .*every:10000.* got '10000'"),
        (10_000, "one of .*every:10000.* got 10000"),
        ("", "one of .*every:10000.* got ''"),
        ("every", "whole numbers of 1 or more: got '' in 'every'"),
        ("every:0", "whole numbers of 1 or more: got '0'"),
        ("every:-5", "whole numbers of 1 or more: got '-5'"),
        ("every:2.5", "whole numbers of 1 or more: got '2.5'"),
        ("every:inf", "whole numbers of 1 or more: got 'inf'"),
        ("every:nan", "whole numbers of 1 or more: got 'nan'"),
        ("every:soon", "whole numbers of 1 or more: got 'soon'"),
        ("every:10,20", 'at most 1 number: .*Use "at:"'),
        ("random:10,20", "at most 1 number: "),
        ("cyclic:10,2,3", "at most 2 numbers: "),
        ("cyclic:10,1", "2 tasks or more"),
        ("at:", "whole numbers of 1 or more: got '' in 'at:'"),
        ("at:0,5", "whole numbers of 1 or more: got '0'"),
        ("at:20,10", "increasing steps: got 'at:20,10'"),
        ("at:10,10", "increasing steps"),
    ],
)
def test_a_bad_schedule_is_refused_in_one_sentence_of_advice(spec, message):
    with pytest.raises(ValueError, match=message) as refusal:
        parse(spec)
    assert "\n" not in str(refusal.value)


def test_steps_before_the_beginning_and_negative_seeds_are_refused():
    for spec in ("every:10", "at:10", "cyclic:10", "random:10"):
        with pytest.raises(ValueError, match=r"counted from 0: got -1"):
            parse(spec).task_at(-1)
    with pytest.raises(ValueError, match=r"seed of 0 or more: got -1"):
        parse("random:10", -1)
