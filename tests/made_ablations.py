"""Finished ablation runs with made-up scores, in the format that `make ablations` leaves."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from dvclive import Live

from samlove.scoring.evaluate import Evaluation, _result_table, write

SPLITS = ("val", "test_s", "test_u", "test_n")


def make_ablation_run(
    folder: Path,
    run: str,
    seed: int = 0,
    shift: float = 0.0,
    noise: float = 0.02,
    expressions: int = 120,
    changes: dict[str, list] | None = None,
    epochs: int = 7,
    splits: tuple[str, ...] = SPLITS,
) -> None:
    """Write {folder}/{run}/seed{seed}: J and F of all runs are alike, plus `shift` (a fraction) and own noise."""
    place = folder / run / f"seed{seed}"
    shared, own = np.random.default_rng(0), np.random.default_rng([seed, *run.encode()])
    tables = [_score(split, expressions, shift + (split == "test_u") * 0.05, noise, shared, own) for split in splits]
    rows = pd.concat(tables, ignore_index=True)
    metrics = _result_table({split: rows[rows["split"] == split] for split in splits}, "per_expression")
    metrics.pop("val", None)
    place.mkdir(parents=True)
    write(Evaluation(metrics, rows, {"protocol": "per_expression"}), place / "metrics.json", place / "evaluation")
    with Live(str(place / "dvclive"), save_dvc_exp=False, dvcyaml=None) as live:
        for epoch in range(epochs):
            live.log_metric("train/loss", 0.4 - shift + math.exp(-epoch / 3) + 0.01 * float(own.normal()))
            live.log_metric("val/J&F", 100 * (0.7 + shift - 0.4 * math.exp(-epoch / 2)) + float(own.normal()))
            live.next_step()
    record = {
        "run": run, "seed": seed, "changes": changes or {},
        "seconds": {"train": 153.4 + 60 * seed, "infer": 41.2, "evaluate": 9.6},
        "device": "cpu, 1 thread", "devices": 1,
        "parameters": 1234567, "epochs": epochs, "best_epoch": epochs - 1, "expressions_per_s": 163.2,
    }  # fmt: skip
    (place / "run.json").write_text(json.dumps(record))


def _score(
    split: str, count: int, shift: float, noise: float, shared: np.random.Generator, own: np.random.Generator
) -> pd.DataFrame:
    """Expressions of a split with their scores; every third of `val` is null, all of `test_n` are."""
    level = shared.uniform(0.2, 0.85, count)
    J, F = (np.clip(level + shift + own.normal(0, noise, count) + more, 0, 1) for more in (0.0, 0.06))
    null = np.full(count, split == "test_n") | ((split == "val") & (np.arange(count) % 3 == 0))
    table = pd.DataFrame(
        {"row_id": [f"{split}_{i}" for i in range(count)], "split": split, "null": null, "object": "disc"}
    )
    scores = {"J": J, "F": F, "JF": (J + F) / 2}
    return table.assign(
        **{k: np.where(null, np.nan, v) for k, v in scores.items()}, S=np.where(null, 0.3 - shift, np.nan)
    )
