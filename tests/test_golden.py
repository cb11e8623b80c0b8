"""The distance between two arrays, and that the golden sample's tolerance separates rounding from real changes."""

import numpy as np
import pytest

from samlove.features.golden import TOLERANCE, Row, distance


def test_rounding_is_within_the_tolerance_and_a_real_change_is_not() -> None:
    values = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    stored = values.astype(np.float16)
    assert distance(stored, stored) == 0
    assert 0 < distance(values, stored.astype(np.float32)) < TOLERANCE / 10
    assert distance(stored, (values * 1.01).astype(np.float16)) > TOLERANCE
    assert distance(stored, np.roll(stored, 1, axis=0)) > 1


@pytest.mark.parametrize("other", [np.zeros(3, np.float32), np.zeros(4, np.float16), np.ones(3, np.float16)])
def test_arrays_that_cannot_be_compared_are_infinitely_far_apart(other: np.ndarray) -> None:
    stored = np.zeros(3, np.float16)
    assert distance(stored, other) == float("inf")
    assert distance(stored, stored) == 0


def test_a_row_is_good_if_within_the_tolerance_and_without_a_fault() -> None:
    assert Row("a", "x", TOLERANCE).good
    assert not Row("a", "x", TOLERANCE * 1.1).good
    assert not Row("a", "", 0.0, "gone").good
