"""Whether two runs differ: 95 % intervals of the difference between their scores.

- One seed: a paired bootstrap over expressions (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
  13). Its interval covers the choice of test expressions, not the randomness of training.
- Several seeds: Student's t over the differences of runs with the same seed. Its interval covers the randomness of
  training, not the choice of test expressions.

All functions take a run and the base to compare it with; a positive difference means that the run's score is higher.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from samlove.errors import SamloveError

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0  # of the resamples: equal scores give equal intervals
CHUNK = 2**18  # resampled values in memory at a time
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)

Pair = tuple[pd.Series, pd.Series]  # scores of a run and of its base, each by row_id


class Difference(NamedTuple):
    """The mean of n differences and its 95 % interval, in the unit of the scores.

    mean is NaN without differences, low and high are NaN with fewer than two.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def distinct(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class Repeats(NamedTuple):
    """Mean and sample standard deviation of n seeds' scores; the deviation of a single seed is NaN."""

    mean: float
    std: float
    n: int


def paired_bootstrap(run: pd.Series, base: pd.Series) -> Difference:
    """The mean difference over expressions, with the percentile interval of 10,000 resamples of expressions.

    run, base: scores by row_id, such as the column JF of the rows of one split (samlove.scoring.evaluate); the order of
    rows does not matter. A row in which either is NaN is left out. The results of `evaluate` average J and F one by
    one, so their J&F differs slightly where an expression has J but no F.
    Raises SamloveError unless both have the same rows, each once.
    """
    differences = _differences(run, base)
    means = _resampled_means(differences, np.random.default_rng(SEED))
    return _difference(_mean(differences), means, len(differences))


def paired_bootstrap_mix(seen: Pair, unseen: Pair) -> Difference:
    """Like `paired_bootstrap`, for the mean of two splits: each is resampled by itself. n: expressions of both."""
    parts = [_differences(*pair) for pair in (seen, unseen)]
    generator = np.random.default_rng(SEED)
    means = np.mean([_resampled_means(part, generator) for part in parts], axis=0)
    return _difference(sum(map(_mean, parts)) / 2, means, sum(map(len, parts)))


def repeats(scores: Mapping[int, float]) -> Repeats:
    """Mean and standard deviation of a run's scores {seed: score}."""
    values = np.array([*scores.values()], dtype=float)
    return Repeats(_mean(values), float(values.std(ddof=1)) if len(values) > 1 else float("nan"), len(values))


def paired_t(run: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """The mean difference of runs with the same seed, with Student's t interval.

    run, base: {seed: score}. Raises SamloveError unless both have the same seeds.
    """
    if run.keys() != base.keys():
        raise SamloveError(f"expected scores of the same seeds, found {sorted(run)} and {sorted(base)}")
    mean, std, n = repeats({seed: run[seed] - base[seed] for seed in sorted(run)})
    half = float(stdtrit(n - 1, TAILS[1])) * std / np.sqrt(n) if n > 1 else float("nan")
    return Difference(mean, mean - half, mean + half, n)


def _differences(run: pd.Series, base: pd.Series) -> np.ndarray:
    """run - base, float64, by increasing row_id, without NaN."""
    run, base = run.sort_index(), base.sort_index()
    if not run.index.is_unique or not run.index.equals(base.index):
        own = len(run.index.symmetric_difference(base.index))
        raise SamloveError(
            f"expected scores of the same expressions, each once, found {len(run)} and {len(base)}, {own} of them in "
            "only one of the runs; run: dvc repro"
        )
    differences = run.to_numpy(dtype=float) - base.to_numpy(dtype=float)
    return differences[~np.isnan(differences)]


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The means (RESAMPLES,) of samples with replacement; NaN if there are fewer than two values."""
    n = len(values)
    if n < 2:
        return np.full(RESAMPLES, np.nan)
    means = np.empty(RESAMPLES)
    step = max(CHUNK // n, 1)
    for start in range(0, RESAMPLES, step):
        part = means[start : start + step]
        part[:] = values[generator.integers(n, size=(len(part), n), dtype=np.int32)].mean(axis=1)
    return means


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _difference(mean: float, means: np.ndarray, n: int) -> Difference:
    low, high = np.quantile(means, TAILS)
    return Difference(mean, float(low), float(high), n)
