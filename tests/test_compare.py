"""Intervals of differences: coverage, agreement with SciPy, rows without a score, order of rows."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlove.errors import SamloveError
from samlove.scoring import compare
from samlove.scoring.compare import paired_bootstrap, paired_bootstrap_mix, paired_t, repeats

Pair = tuple[pd.Series, pd.Series]


def scores(n: int, seed: int, gain: float = 0.0, first: int = 0) -> Pair:
    """Scores of a run and of its base on the same rows; the true difference is `gain`."""
    generator = np.random.default_rng(seed)
    rows = [f"row{i:04d}" for i in range(first, first + n)]
    base = generator.beta(4, 2, n)
    run = base + gain + generator.normal(0, 0.2, n)
    return pd.Series(run, rows), pd.Series(base, rows)


def test_equal_runs_do_not_differ() -> None:
    run, _ = scores(50, 0)
    assert paired_bootstrap(run, run) == (0, 0, 0, 50) and not paired_bootstrap(run, run).distinct
    assert paired_bootstrap_mix((run, run), (run[:20], run[:20])) == (0, 0, 0, 70)
    same = {0: 61.5, 1: 62.25, 2: 60.0}
    assert paired_t(same, same) == (0, 0, 0, 3) and not paired_t(same, same).distinct


def test_a_clear_difference_is_distinct_and_changes_sign_with_the_order_of_runs() -> None:
    run, base = scores(200, 0, gain=0.1)
    forth, back = paired_bootstrap(run, base), paired_bootstrap(base, run)
    assert forth.distinct and back.distinct and forth.low > 0 > back.high
    assert forth.mean == pytest.approx((run - base).mean()) == pytest.approx(-back.mean)
    np.testing.assert_allclose([forth.low, forth.high], [-back.high, -back.low], atol=1e-12)


def test_the_pairing_counts() -> None:
    """Runs that differ little on each expression are told apart, although expressions differ much among themselves."""
    base = pd.Series(np.random.default_rng(0).uniform(0, 1, 100))
    run = base + np.random.default_rng(1).normal(0.01, 0.02, 100)
    found = paired_bootstrap(run, base)
    assert found.distinct and found.high - found.low < 0.01


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_95_percent_of_the_intervals_contain_the_true_difference(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 1000)  # for speed
    found = [paired_bootstrap(*scores(100, seed, gain)) for seed in range(300)]
    assert 0.91 < np.mean([d.low <= gain <= d.high for d in found]) < 0.98
    mixed = [paired_bootstrap_mix(scores(60, seed, gain), scores(120, seed + 999, gain)) for seed in range(300)]
    assert 0.91 < np.mean([d.low <= gain <= d.high for d in mixed]) < 0.98
    generator = np.random.default_rng(0)
    seeds = [dict(enumerate(generator.normal(60, 1, 3))) for _ in range(600)]
    changed = [{s: v + gain + generator.normal(0, 0.5) for s, v in base.items()} for base in seeds]
    repeated = [paired_t(run, base) for run, base in zip(changed, seeds, strict=True)]
    assert 0.92 < np.mean([d.low <= gain <= d.high for d in repeated]) < 0.98


def test_the_bootstrap_agrees_with_scipy() -> None:
    run, base = scores(40, 3, gain=0.05)
    expected = stats.bootstrap(
        (run.to_numpy(), base.to_numpy()),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    found = paired_bootstrap(run, base)
    width = found.high - found.low
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.05 * width)


def test_the_interval_of_the_mix_is_that_of_independent_means() -> None:
    seen, unseen = scores(300, 1, gain=0.1), scores(80, 2, gain=-0.02, first=300)
    found = paired_bootstrap_mix(seen, unseen)
    differences = [run - base for run, base in (seen, unseen)]
    assert found.n == 380 and found.mean == pytest.approx(np.mean([d.mean() for d in differences]))
    error = np.sqrt(sum(d.var(ddof=0) / len(d) for d in differences)) / 2
    expected = found.mean + np.array([-1.96, 1.96]) * error
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.2 * error)


def test_rows_without_a_score_are_left_out() -> None:
    run, base = scores(60, 4)
    kept = run.index[5:]
    expected = paired_bootstrap(run[kept], base[kept])
    run.iloc[:3], base.iloc[2:5] = np.nan, np.nan
    assert paired_bootstrap(run, base) == expected and expected.n == 55
    assert np.isnan(paired_bootstrap(run * np.nan, base)[:3]).all()


def test_the_order_of_rows_does_not_matter() -> None:
    run, base = scores(60, 5)
    shuffled = run.sample(frac=1, random_state=0)
    assert list(shuffled.index) != list(run.index)
    assert paired_bootstrap(shuffled, base) == paired_bootstrap(run, base)
    assert paired_bootstrap_mix((shuffled, base), (run, base[::-1])) == paired_bootstrap_mix((run, base), (run, base))


def test_runs_of_different_rows_or_seeds_are_refused() -> None:
    run, base = scores(10, 0)
    with pytest.raises(SamloveError, match="found 9 and 10, 1 of them in only one"):
        paired_bootstrap(run[1:], base)
    with pytest.raises(SamloveError, match="each once"):
        paired_bootstrap(run.rename({"row0001": "row0000"}), base.rename({"row0001": "row0000"}))
    with pytest.raises(SamloveError, match=r"\[0, 1\] and \[0, 2\]"):
        paired_t({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0})


def test_one_value_has_no_interval() -> None:
    run, base = scores(1, 0, gain=0.3)
    for found in (paired_bootstrap(run, base), paired_t({0: 70.0}, {0: 60.0})):
        assert found.n == 1 and found.mean > 0 and np.isnan([found.low, found.high]).all() and not found.distinct
    assert repeats({0: 70.0})[::2] == (70.0, 1) and np.isnan(repeats({0: 70.0}).std)


def test_the_t_interval_agrees_with_scipy() -> None:
    run, base = {0: 63.1, 1: 64.0, 2: 61.2, 7: 62.2}, {2: 60.9, 1: 62.5, 0: 62.8, 7: 60.1}
    found = paired_t(run, base)
    a, b = (np.array([by_seed[seed] for seed in (0, 1, 2, 7)]) for by_seed in (run, base))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], rtol=1e-9)
    assert repeats(run) == (pytest.approx(a.mean()), pytest.approx(a.std(ddof=1)), 4)


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    run, base = scores(100, 6)
    found = paired_bootstrap(run, base)
    monkeypatch.setattr(compare, "CHUNK", 777)
    assert paired_bootstrap(run, base) == found
