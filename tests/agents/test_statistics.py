import math
import warnings

import numpy as np
import pytest

from agents.statistics import align, band, estimate, interval, iqm, paired_difference


def test_iqm_averages_the_middle_half():
    assert iqm([100.0, 4.0, 1.0, 3.0, -50.0, 2.0, 5.0, 6.0]) == 3.5  # of 2, 3, 4 and 5
    assert iqm([0.0, 10.0, 20.0, 90.0, 1000.0]) == 40.0  # one cut from each end
    assert iqm([1.0, 2.0, 6.0]) == 3.0  # too few to cut: the mean
    assert iqm([7.0]) == 7.0


def test_interval_of_two_values_is_their_span():
    # Resampled means are 0 (1/4), 5 (1/2) and 10 (1/4): the 2.5 % and 97.5 % points are the ends.
    assert interval([0.0, 10.0]) == (0.0, 10.0)
    assert interval([0.0, 10.0], confidence=0.4) == (5.0, 5.0)


def test_interval_agrees_with_every_resample_counted():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    every = np.array(np.meshgrid(*[values] * 4)).reshape(4, -1)  # all 256 resamples, equally likely
    middle = np.sort(every, axis=0)[1:3].mean(axis=0)
    low, high = interval(values, resamples=20_000)
    assert low == pytest.approx(np.quantile(middle, 0.025), abs=0.5)
    assert high == pytest.approx(np.quantile(middle, 0.975), abs=0.5)


def test_interval_repeats_and_covers_more_with_more_confidence():
    values = np.random.default_rng(0).normal(size=9)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)
    assert interval(values, confidence=0.99)[0] < interval(values, confidence=0.5)[0]


def test_interval_of_equal_values_is_that_value_and_of_one_is_unknown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
        assert all(map(math.isnan, interval([3.0])))
    alone = estimate([3.0])
    assert (alone.value, alone.n) == (3.0, 1)
    assert math.isnan(alone.low)


def test_band_is_the_interval_of_each_column():
    curves = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [9.0, 5.0], [4.0, 5.0]])
    middle, low, high = band(curves)
    assert middle.tolist() == [3.0, 5.0]
    assert (low[0], high[0]) == interval(curves[:, 0])
    assert (low[1], high[1]) == (5.0, 5.0)


def test_paired_difference_cancels_what_a_seed_does_to_both():
    difference = paired_difference([11.0, 102.0, 1003.0], [10.0, 100.0, 1000.0])
    assert difference.value == 2.0  # 1, 2 and 3
    assert 1.0 <= difference.low <= 2.0 <= difference.high <= 3.0
    assert difference.n == 3


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf"), 1.0], [[1.0, 2.0]]])
def test_values_that_cannot_be_averaged_are_refused(values):
    with pytest.raises(ValueError, match="Expected"):
        iqm(values)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval([1.0, 2.0], confidence=95)


def test_align_keeps_shared_steps_exactly():
    steps = np.array([3, 7, 20])
    x, values = align([(steps, np.array([1.0, 2.0, 3.0])), (steps, np.array([5.0, 6.0, 7.0]))], 20, 200)
    assert x.tolist() == [3, 7, 20]
    assert values.tolist() == [[1, 2, 3], [5, 6, 7]]


def test_align_averages_in_bins_and_fills_nothing_in():
    ends = np.arange(1, 41)  # one value per step, but for a gap from 21 to 24 in one of the runs
    holey = np.delete(ends, slice(20, 24))
    x, values = align([(ends, ends.astype(float)), (holey, holey.astype(float))], 40, 10)
    assert x.tolist() == [2, 6, 10, 14, 18, 26, 30, 34, 38]  # the bin (20, 24] is missing
    assert values[0].tolist() == [2.5, 6.5, 10.5, 14.5, 18.5, 26.5, 30.5, 34.5, 38.5]
    assert values[1].tolist() == values[0].tolist()


def test_align_takes_wider_bins_where_values_are_sparse():
    sparse = [(np.arange(10 * k, 401, 10), np.ones(41 - k)) for k in (1, 2)]  # steps differ
    assert len(align(sparse, 400, 160)[0]) == 39  # 160 and 80 bins are too many, 40 will do
    assert len(align(sparse, 400, 160, least=2)[0]) == 20


def test_align_ends_where_it_is_told():
    curve = (np.array([1, 2, 30]), np.array([1.0, 2.0, 3.0]))
    assert align([curve], 2, 200)[0].tolist() == [1, 2]
