"""Scores predicted masks on the splits of a dataset under published protocols, and compares two methods.

Expressions are read, counted and forgotten a few at a time, so memory does not grow with a split.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from samlove.data.audit import parse_rows
from samlove.data.dataset import RefAvsFolder, image_size, load_mask
from samlove.data.index import add_cues
from samlove.errors import RequestError, SamloveError
from samlove.scoring.compare import Difference, Pair, paired_bootstrap, paired_bootstrap_mix
from samlove.scoring.evaluate import CUES, SPLITS
from samlove.scoring.mask_formats import MaskBins
from samlove.scoring.masks import Masks, grey_logits
from samlove.scoring.protocols import PROTOCOLS, Measure, measure, summarise

MIXED = ("test_s", "test_u")  # their mean is the mix
AHEAD = 64  # expressions that are counted before the first of their results is used
EMPTY = grey_logits(np.zeros((1, 1)), 255)  # a missing frame
# What is counted besides the expressions themselves, and what each counts as.
REMARKS = {
    "missing": "without any mask: every frame counts as an empty mask",
    "incomplete": "without a mask on some frames: these frames count as empty masks",
    "long": "with masks after the last frame of the video: not used",
    "other_size": "with masks of another size than the ground truth: resized as each protocol resizes predictions",
    "shared": "of a uid that an earlier row has, without masks of their own: scored with the masks of that uid",
}
SCALES = {"J": 100, "F": 100, "J&F": 100, "S": 1}  # percent, and a fraction
COMPARED = {"J": 100, "J&F": 100, "S": 1}


class Scored(NamedTuple):
    # {protocol: {split or "mix": {"J", "F", "J&F", "S"}}}; J, F and J&F in percent, S a fraction, None: no score
    protocols: dict[str, dict[str, dict[str, float | None]]]
    counts: dict[str, dict[str, int]]  # {split: {"expressions", "null" and each of REMARKS: number of expressions}}
    # One per expression, by row_id: split, null, object, cues, each of REMARKS (bool) and {J,F,J&F,S}_{protocol}, each
    # expression scored by itself; as fractions, NaN: no score
    rows: pd.DataFrame


def read_rows(folder: RefAvsFolder, splits: Collection[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All rows of the dataset's metadata.csv, and those of `splits` with their cues if there is a cues.csv.

    Raises RequestError if a split has no rows, SamloveError if one of its rows does not name a video and an object.
    """
    rows = parse_rows(folder.metadata())
    found = set(rows["split"])
    if missing := [split for split in splits if split not in found]:
        known = ", ".join(sorted(found))
        raise RequestError(f"{folder.root}: no rows of split {', '.join(missing)}; its splits are {known}")
    chosen = pd.concat([rows[rows["split"] == split] for split in splits])
    if not (bad := chosen[chosen["kind"] == ""]).empty:
        raise SamloveError(
            f"{folder.root / 'metadata.csv'}:{bad.index[0]}: {bad['uid'].iloc[0]} does not name a video and an object; "
            f"run: samlove audit {folder.root}"
        )
    return rows, add_cues(chosen, folder)[0]


def score_splits(
    masks: Masks,
    rows: pd.DataFrame,
    folder: RefAvsFolder,
    protocols: Sequence[str],
    frames: int,
    bar: Callable[..., tqdm] = tqdm,
) -> Scored:
    """Score every row under each of the protocols.

    rows: of the splits to score, in the order of metadata.csv: row_id, uid, split, media_id, fid, object, null, cues.
    frames: of a video; a shorter one is scored on those it has.
    Raises RequestError if the masks have none of a split's expressions, SamloveError with the path of a mask, of the
    prediction or the ground truth, that cannot be read.
    """
    keys = set(masks.keys())
    for split, part in rows.groupby("split", sort=False):
        if not (part["row_id"].isin(keys) | part["uid"].isin(keys)).any():
            raise RequestError(
                f"{masks.path}: no masks of split {split}; expected some of its {len(part):,} expressions"
            )
    targets = _Targets(folder, frames)

    def work(row: dict[str, Any]) -> tuple[dict[str, Measure], set[str]]:
        key = next((key for key in (row["row_id"], row["uid"]) if key in keys), None)
        found = masks.read(key) if key is not None else {}
        true = targets.of(row)
        pairs = [(found.get(t, EMPTY), target) for t, target in enumerate(true)]
        present = found.keys() & range(len(true))
        remarks = {
            "missing": not present,
            "incomplete": 0 < len(present) < len(true),
            "long": len(found) > len(present),
            "other_size": any(found[t].shape != true[t].shape for t in present),
            "shared": key is not None and key != row["row_id"],
        }
        return measure(pairs, bool(row["null"]), protocols), {name for name, holds in remarks.items() if holds}

    measures: dict[str, dict[str, list[Measure]]] = {}
    counts: dict[str, dict[str, int]] = {}
    scores = []
    records = rows.to_dict("records")
    results = bar(
        _in_threads(work, records), desc=f"score {masks.path.name}", total=len(records), unit="row", mininterval=2
    )
    for record, (measured, remarks) in zip(records, results, strict=True):
        split = record["split"]
        counted = counts.setdefault(split, dict.fromkeys(("expressions", "null", *REMARKS), 0))
        for name in ("expressions", *remarks, *(["null"] if record["null"] else [])):
            counted[name] += 1
        for name in protocols:
            measures.setdefault(name, {}).setdefault(split, []).append(measured[name])
        alone = {name: summarise([measured[name]], PROTOCOLS[name]) for name in protocols}
        of_row = {f"{score}_{name}": value for name, of in alone.items() for score, value in of.items()}
        scores.append({name: name in remarks for name in REMARKS} | of_row)
    keep = [c for c in ("row_id", "split", "null", "object", *CUES) if c in rows]
    table = pd.concat([rows[keep].reset_index(drop=True), pd.DataFrame(scores)], axis=1).set_index("row_id")
    found = {}
    for name in protocols:
        if PROTOCOLS[name].needs_scores and not masks.has_scores:
            table[[f"F_{name}", f"J&F_{name}"]] = np.nan
        found[name] = _summary(measures[name], name, masks.has_scores)
    return Scored(found, counts, table)


def score_run(expressions: pd.DataFrame, folder: RefAvsFolder, predictions: Path) -> dict[str, dict]:
    """The test splits of a run under every protocol: Scored.protocols.

    expressions: the index's table. predictions: holds {split}/predictions.h5, as the infer stage writes them.
    {} if the frames of a null expression are not here: the protocols need their size, and features can be shared
    without frames.
    """
    files = {split: predictions / split / "predictions.h5" for split in SPLITS if split != "val"}
    rows = expressions[expressions["split"].isin([split for split, file in files.items() if file.exists()])]
    if not all(folder.frame_path(media_id, 0).exists() for media_id in rows.loc[rows["null"], "media_id"].unique()):
        return {}
    masks = MaskBins(predictions, [file for file in files.values() if file.exists()])
    return score_splits(masks, rows, folder, list(PROTOCOLS), masks.frames).protocols


class _Targets:
    """Ground-truth masks at the size of their files."""

    def __init__(self, folder: RefAvsFolder, frames: int) -> None:
        self._folder, self._frames = folder, frames
        self._load = lru_cache(maxsize=8)(self._load_object)  # an object's expressions follow each other

    def of(self, row: dict[str, Any]) -> list[np.ndarray]:
        """bool (H, W) of each frame; empty and of the size of the frames for a null expression, which has no masks."""
        frames = min(self._folder.frame_count(row["media_id"]) or self._frames, self._frames)
        if not row["null"]:
            return self._load(row["media_id"], int(row["fid"]), frames)
        width, height = image_size(self._folder.frame_path(row["media_id"], 0))
        return [np.zeros((height, width), dtype=bool)] * frames

    def _load_object(self, media_id: str, fid: int, frames: int) -> list[np.ndarray]:
        return [load_mask(self._folder.mask_path(media_id, fid, t)) for t in range(frames)]


def _in_threads(work: Callable[[dict], Any], records: Sequence[dict]) -> Iterator[Any]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding, resizing and counting release the GIL
        for start in range(0, len(records), AHEAD):
            yield from pool.map(work, records[start : start + AHEAD])


def _summary(measures: dict[str, list[Measure]], name: str, has_scores: bool) -> dict[str, dict[str, float | None]]:
    protocol = PROTOCOLS[name]
    table = {split: summarise(of_split, protocol) for split, of_split in measures.items()}
    if set(MIXED) <= set(table):
        table["mix"] = {key: (table[MIXED[0]][key] + table[MIXED[1]][key]) / 2 for key in SCALES}
    if protocol.needs_scores and not has_scores:
        table = {split: scores | {"F": np.nan, "J&F": np.nan} for split, scores in table.items()}
    digits = {1: 6, 100: 4}
    return {
        split: {key: None if np.isnan(scores[key]) else round(scores[key] * k, digits[k]) for key, k in SCALES.items()}
        for split, scores in table.items()
    }


# --- two methods -----------------------------------------------------------------------------------------------------


def compare(own: Scored, other: Scored, protocol: str, part: str) -> dict[str, dict[str, Difference]]:
    """How far a method is above another, expression by expression: {group: {score: Difference}}.

    part: the groups are the "split"s (with "mix"), the sets of "cue"s that an expression needs, or the "category"s.
    Scores are J and J&F in points, and S as a fraction; those that no expression of a group has are left out.
    """
    tables = own.rows, other.rows
    labels = {
        "split": lambda: own.rows["split"],
        "category": lambda: own.rows["object"],
        "cue": lambda: _cues(own.rows),
    }
    of_row = labels[part]().to_numpy()
    named = ~own.rows["null"].to_numpy(dtype=bool) if part != "split" else np.ones(len(of_row), dtype=bool)
    found: dict[str, dict[str, Difference]] = {}
    for group in pd.unique(of_row[named & (of_row != "")]):
        pairs = {score: _pair(tables, of_row == group, f"{score}_{protocol}", k) for score, k in COMPARED.items()}
        found[group] = {score: paired_bootstrap(*pair) for score, pair in pairs.items() if _known(pair)}
    if part == "split" and set(MIXED) <= set(found):
        found["mix"] = {}
        for score in ("J", "J&F"):
            seen, unseen = (_pair(tables, of_row == split, f"{score}_{protocol}", COMPARED[score]) for split in MIXED)
            if _known(seen) and _known(unseen):
                found["mix"][score] = paired_bootstrap_mix(seen, unseen)
    return {group: scores for group, scores in found.items() if scores}


def _pair(tables: tuple[pd.DataFrame, ...], here: np.ndarray, column: str, scale: float) -> Pair:
    own, other = (table.loc[here, column] * scale for table in tables)
    return own, other


def _known(pair: Pair) -> bool:
    return bool((pair[0].notna() & pair[1].notna()).any())


def _cues(table: pd.DataFrame) -> pd.Series:
    """The cues that each row needs, such as "sight+sound"; empty for none, or if they are not known."""
    if not set(CUES) <= set(table):
        return pd.Series("", index=table.index)
    flags = table[list(CUES)].fillna(False).astype(bool)
    return flags.apply(lambda row: "+".join(cue for cue in CUES if row[cue]), axis=1)
