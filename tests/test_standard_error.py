import numpy as np
import pandas as pd
import pytest

from samlove.scoring.standard_error import standard_error


def test_one_expression_a_video_gives_the_usual_standard_error():
    values = pd.Series(np.random.default_rng(0).random(30))
    found = standard_error(values, pd.Series([f"video{n}" for n in range(30)]))
    assert found == pytest.approx(values.std(ddof=1) / np.sqrt(30))


def test_repeated_expressions_tell_nothing_new():
    values, videos = pd.Series([0.2, 0.9, 0.4, 0.7]), pd.Series(list("abcd"))
    repeated = standard_error(pd.concat([values] * 5, ignore_index=True), pd.concat([videos] * 5, ignore_index=True))
    assert repeated == pytest.approx(standard_error(values, videos))


def test_it_agrees_with_resampled_videos():
    rng = np.random.default_rng(1)
    videos = np.repeat(np.arange(200), rng.integers(1, 8, 200))
    values = 0.3 * rng.normal(size=200)[videos] + 0.2 * rng.normal(size=len(videos))
    members = [values[videos == video] for video in range(200)]
    means = [np.concatenate([members[k] for k in rng.integers(200, size=200)]).mean() for _ in range(3000)]
    assert standard_error(pd.Series(values), pd.Series(videos)) == pytest.approx(np.std(means), rel=0.08)


def test_missing_scores_are_left_out_and_one_video_has_no_error():
    values, videos = pd.Series([0.2, np.nan, 0.9, 0.4]), pd.Series(list("abcd"))
    known = values.notna()
    assert standard_error(values, videos) == pytest.approx(standard_error(values[known], videos[known]))
    assert standard_error(values[:1], videos[:1]) is None
    assert standard_error(values[:0], videos[:0]) is None
