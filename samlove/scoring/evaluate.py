"""Scores stored predictions: the result table, per-row scores, breakdowns and controls.

Two protocols, named in every output:
- `per_expression`: each expression is scored by itself; the score of a split is the mean over its expressions.
- `official_batch`: like the script of Ref-AVS Bench, which scores each batch of 4 expressions, in file order, as one
  video and averages over batches; the best threshold of F and the root of S are then per batch.

Breakdowns and controls are always per expression.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from samlove.data.dataset import RefAvsFolder
from samlove.data.digest import rows_digest
from samlove.data.targets import Targets
from samlove.errors import RequestError, SamloveError
from samlove.scoring import protocols
from samlove.scoring.metrics import EDGES, JACCARD_BIN, NULL_BIN, THRESHOLD_BINS, Scores, histogram, scores_of
from samlove.scoring.presence import SCORES, UNGATED, curve, empty_scores
from samlove.scoring.standard_error import standard_errors
from stores import PredictionReader
from stores.fingerprint import check_fingerprint, flat
from stores.manifest import replace_folder

OFFICIAL = protocols.PROTOCOLS["official"]
LEVELS = protocols.Levels(THRESHOLD_BINS, JACCARD_BIN, NULL_BIN)  # of stored bins
SPLITS = ("val", "test_s", "test_u", "test_n")
CONTROLS = ("swapped_audio", "permuted_text", "true_mask")
CUES = ("sight", "sound", "time")
PROTOCOLS = ("per_expression", "official_batch")
# How Ref-AVS makes a video of null expressions; the key begins the name of its folder, as in samlove.synth.write.
NULLS = {"null_m-": "sound removed", "null_c-": "sound of another video"}


class Evaluation(NamedTuple):
    metrics: dict  # content of metrics.json: percent for J, F, J&F, a fraction for S
    # One per expression; J, F, JF, S and {J,F,JF,S}_{control} as fractions, NaN: no score. late: whether the
    # ground-truth masks show the target, but not on frame 0.
    rows: pd.DataFrame
    # protocols, standard errors, cues, late, categories, nulls, presence, controls; the evaluate stage adds published
    details: dict


def evaluate(
    expressions: pd.DataFrame,
    folder: RefAvsFolder | Targets,
    predictions: Path,
    protocol: str,
    bar: Callable[..., tqdm] = tqdm,
) -> Evaluation:
    """Score every expression of the evaluation splits, and average the scores.

    expressions: the index's table, in file order. folder: reads the ground-truth masks; Targets decodes those of an
    object once, RefAvsFolder for each of its expressions. predictions: the folder of {split}/{predictions,CONTROL}.h5;
    val and each control are scored if their files exist.
    Raises RequestError if the predictions of a test split are missing, SamloveError if those of an expression are
    missing, if a file was made for different rows than the index's, or if files differ in checkpoint, features or
    settings.
    """
    flags = {cue: expressions[cue].fillna(False).astype(bool) for cue in CUES if cue in expressions}
    expressions = expressions.assign(**flags)  # a row with unknown cues counts as needing none
    tables, batches = [], {}
    _check_same_run(predictions, {split: expressions[expressions["split"] == split] for split in SPLITS})
    for split in SPLITS:
        rows = expressions[expressions["split"] == split]
        source = predictions / split / "predictions.h5"
        if split == "val" and not source.exists():
            continue
        if rows.empty:
            continue
        if not source.exists():
            raise RequestError(f"{source}: no such file; run: dvc repro infer")
        table, batches[split] = _score_split(rows, folder, source.parent, bar)
        tables.append(table)
    if not tables:
        raise RequestError(f"expected expressions of {', '.join(SPLITS[1:])} in the index, found none")
    scored = pd.concat(tables, ignore_index=True)
    results = {
        "per_expression": _result_table({s: scored[scored["split"] == s] for s in batches}, "per_expression"),
        "official_batch": _result_table(batches, "official_batch"),
    }
    details = {
        "protocol": "per_expression",
        "protocols": results,
        "standard_errors": standard_errors(scored),
        "cues": _by_cue(scored),
        "late": _late(scored),
        "categories": _by_category(scored),
        "nulls": _by_null(scored),
        "presence": _presence(scored, predictions),
        "controls": _controls(scored),
    }
    metrics = {k: v for k, v in results[protocol].items() if k != "val"}
    return Evaluation(metrics, scored, details)


# --- scoring ---------------------------------------------------------------------------------------------------------


def _score_split(
    rows: pd.DataFrame, folder: RefAvsFolder | Targets, source: Path, bar: Callable[..., tqdm]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of each expression, also under every available control, and of each of Ref-AVS Bench's batches."""
    readers = {name: _open(source / f"{name}.h5") for name in CONTROLS if (source / f"{name}.h5").exists()}
    main = _open(source / "predictions.h5")
    ungated = _open(source / f"{UNGATED}.h5") if (source / f"{UNGATED}.h5").exists() else None
    absent = [row_id for row_id in rows["row_id"] if row_id not in main]
    if absent:
        raise SamloveError(
            f"{source / 'predictions.h5'}: expected predictions of {len(rows)} expressions, {len(absent)} are missing, "
            f"first: {absent[0]}; run: dvc repro -f -s infer"
        )
    keep = [c for c in ("row_id", "split", "media_id", "fid", "object", "exp", "null", "template", *CUES) if c in rows]
    scored, measures = [], []
    records = rows[keep].to_dict("records")
    for record in bar(iterable=records, desc=f"evaluate {source.name}", unit="row", mininterval=2):
        row = {str(key): value for key, value in record.items()}
        bins = main.read(row["row_id"])
        target = _target(folder, row, bins.shape)
        counts = histogram(bins, target)
        at_or_above = counts[:, :, ::-1].cumsum(-1)[:, :, ::-1]
        measures.append(protocols.measure_counts(at_or_above, bool(row["null"]), OFFICIAL, LEVELS))
        row["late"] = bool(target.any() and not target[0].any())
        scores = scores_of(counts)
        row |= _columns(scores, row["null"])
        if ungated is not None:
            if row["row_id"] in ungated:
                scores = scores_of(histogram(ungated.read(row["row_id"]), target))
            row |= {f"{k}_{UNGATED}": v for k, v in _columns(scores, row["null"]).items()}
            row |= empty_scores(target) | {"object_score": ungated.attrs[SCORES][row["row_id"]]}
        for name, reader in readers.items():
            if row["row_id"] in reader:
                scores = scores_of(histogram(reader.read(row["row_id"]), target))
                row |= {f"{k}_{name}": v for k, v in _columns(scores, row["null"]).items()}
        scored.append(row)
    return pd.DataFrame(scored), pd.DataFrame(list(_batch_scores(measures)))


def _check_same_run(predictions: Path, splits: dict[str, pd.DataFrame]) -> None:
    """Raise SamloveError if a file is of a different split, control or rows than expected, or differs from the others.

    Fields that a file does not record are not compared; older files have fewer.
    """
    first: tuple[Path, dict] | None = None
    for split, rows in splits.items():
        for name in ("predictions", UNGATED, *CONTROLS):
            path = predictions / split / f"{name}.h5"
            if rows.empty or not path.exists():
                continue
            attrs = _open(path).attrs
            own = {"split": split, "variant": name, "rows_sha256": rows_digest(rows)}
            said = {field: attrs[field] for field in own if field in attrs}
            check_fingerprint(said, {field: own[field] for field in said}, path, "dvc repro -f -s infer")
            shared = flat({field: value for field, value in attrs.items() if field not in (*own, SCORES)})
            first = first or (path, shared)
            check_fingerprint(shared, first[1], f"{path}, compared with {first[0]}", "dvc repro infer")


def _open(path: Path) -> PredictionReader:
    reader = PredictionReader(path)
    if not np.array_equal(np.asarray(reader.edges, dtype=np.float32), EDGES):
        raise SamloveError(f"{path}: its bin edges differ from samlove.scoring.metrics.EDGES; run: dvc repro infer")
    return reader


def _target(folder: RefAvsFolder | Targets, row: dict, shape: tuple[int, ...]) -> np.ndarray:
    """Ground-truth masks, bool, of the predictions' shape (T, H, W); empty for a null expression, which has none."""
    if row["null"]:
        return np.zeros(shape, dtype=bool)
    frames, height, width = shape
    if height != width:
        raise SamloveError(f"{row['row_id']}: expected square predictions, found {height}x{width}")
    return folder.load_masks(row["media_id"], int(row["fid"]), frames, width)


def _columns(scores: Scores, null: bool) -> dict[str, float]:
    """J, F and their mean, or S for a null expression; NaN for the others."""
    nan = float("nan")
    if null:
        return {"J": nan, "F": nan, "JF": nan, "S": scores.S}
    return {"J": scores.J, "F": scores.F, "JF": (scores.J + scores.F) / 2, "S": nan}


def _batch_scores(measures: list[protocols.Measure]) -> Iterator[dict]:
    """Scores of batches of 4 in file order, each scored as one long video, null expressions and others apart."""
    for null in (False, True):
        for batch in protocols.grouped([m for m in measures if m.null == null], OFFICIAL.group):
            J, F = protocols.group_scores(batch)
            S = protocols.null_scores(batch, OFFICIAL)[0]
            yield {"null": null, "expressions": len(batch), **_columns(Scores(J, F, S), null)}


# --- averaging -------------------------------------------------------------------------------------------------------


def _mean(values: pd.Series, scale: float, digits: int) -> float | None:
    """Mean of the scores that are not NaN; None (null in JSON) if there are none."""
    mean = values.mean()
    return None if pd.isna(mean) else round(float(mean) * scale, digits)


def _half(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round((a + b) / 2, 4)


def aggregate(rows: pd.DataFrame, suffix: str = "") -> dict:
    """J, F and J&F in percent, and the number of expressions, without null expressions. None: no score.

    rows: one per expression or per batch.
    """
    rows = rows[~rows["null"].astype(bool)]
    J, F = (_mean(rows[name + suffix], 100, 4) for name in "JF")
    return {"J": J, "F": F, "J&F": _half(J, F), "n": _count(rows)}


def _count(rows: pd.DataFrame) -> int:
    return int(rows["expressions"].sum()) if "expressions" in rows else len(rows)


def _aggregate_null(rows: pd.DataFrame) -> dict:
    rows = rows[rows["null"].astype(bool)]
    return {"S": _mean(rows["S"], 1, 6), "n": _count(rows)}


def _mix(seen: dict, unseen: dict) -> dict:
    """Mean of both splits, like the paper's Mix (S+U)."""
    return {k: _half(seen[k], unseen[k]) for k in ("J", "F", "J&F")} | {"n": seen["n"] + unseen["n"]}


def _result_table(splits: dict[str, pd.DataFrame], protocol: str) -> dict:
    empty = pd.DataFrame({"null": [], "J": [], "F": [], "S": []})
    table = {split: aggregate(splits.get(split, empty)) for split in ("test_s", "test_u")}
    table["mix"] = _mix(table["test_s"], table["test_u"])
    table["test_n"] = _aggregate_null(splits.get("test_n", empty))
    if "val" in splits:
        null = _aggregate_null(splits["val"])
        table["val"] = aggregate(splits["val"]) | {"S": null["S"], "n_null": null["n"]}
    return table | {"protocol": protocol}


def _by_cue(rows: pd.DataFrame) -> dict[str, dict]:
    """For each test split, {"sight", "sight+sound", ...: scores}, by the set of cues that an expression needs."""
    if not set(CUES) <= set(rows):
        return {}
    found: dict[str, dict] = {}
    for split in ("test_s", "test_u"):
        part = rows[rows["split"] == split]
        sets = [c for k in range(1, len(CUES) + 1) for c in combinations(CUES, k)]
        groups = {
            "+".join(c): part[(part[list(CUES)].astype(bool) == [x in c for x in CUES]).all(axis=1)] for c in sets
        }
        found[split] = {name: aggregate(group) for name, group in groups.items() if len(group)}
    return found


def _late(rows: pd.DataFrame) -> dict[str, dict]:
    """The scores of each test split on targets that are out of sight in frame 0; {} if there are none."""
    late = rows[rows["late"]]
    return {split: aggregate(part) for split in ("test_s", "test_u") if len(part := late[late["split"] == split])}


def _by_category(rows: pd.DataFrame) -> dict[str, dict]:
    """For each test split, {category: scores}, best first."""
    found = {}
    for split in ("test_s", "test_u"):
        part = rows[rows["split"] == split]
        groups = {str(name): aggregate(group) for name, group in part.groupby("object")}
        found[split] = dict(sorted(groups.items(), key=lambda item: -(item[1]["J&F"] or 0)))
    return found


def _by_null(rows: pd.DataFrame) -> dict[str, dict]:
    """{kind in NULLS: S} of the null split; a kind without rows is left out."""
    part = rows[rows["split"] == "test_n"]
    kinds = {kind: part[part["media_id"].str.startswith(prefix)] for prefix, kind in NULLS.items()}
    return {kind: _aggregate_null(of_kind) for kind, of_kind in kinds.items() if len(of_kind)}


def _presence(rows: pd.DataFrame, predictions: Path) -> dict[str, Any] | None:
    """The curve of S against J&F over the threshold of the object score; None if the run has no such threshold."""
    if "object_score" not in rows:
        return None
    path = next(path for split in SPLITS if (path := predictions / split / f"{UNGATED}.h5").exists())
    return curve(rows[rows["split"] != "val"], _open(path).attrs["threshold"])


def _controls(rows: pd.DataFrame) -> dict[str, dict]:
    """The effect of each control, on exactly the rows that it was run on.

    swapped_audio: J&F with the audio of another video, on rows that need sound (all rows if cues are unknown);
    permuted_text: J&F with another expression of the same video; both with the drop in points.
    true_mask: J that the same SAM 2 gets from the ground-truth mask of frame 0, and the model's J as a share of it.
    """
    found: dict[str, dict] = {}
    for control in CONTROLS:
        if f"J_{control}" not in rows:
            continue
        known = control == "swapped_audio" and "sound" in rows
        part = rows[rows[f"J_{control}"].notna()]
        part = part[part["sound"].astype(bool)] if known else part
        pairs = {}
        for split in ("test_s", "test_u"):
            of_split = part[part["split"] == split]
            pairs[split] = aggregate(of_split), aggregate(of_split, f"_{control}")
        (seen, seen_changed), (unseen, unseen_changed) = pairs.values()
        pairs["mix"] = _mix(seen, unseen), _mix(seen_changed, unseen_changed)
        compared = {split: _compare(control, *pair) for split, pair in pairs.items()}
        found[control] = {"rows": "that need sound" if known else "all"} | compared
    return found


def _compare(control: str, normal: dict, changed: dict) -> dict:
    if control == "true_mask":
        J, ceiling = normal["J"], changed["J"]
        ratio = None if not ceiling else round(J / ceiling, 4)
        return {"J": J, "J_true_mask": ceiling, "ratio": ratio, "n": normal["n"]}
    before, after = normal["J&F"], changed["J&F"]
    drop = None if before is None or after is None else round(before - after, 4)
    return {"J&F": before, f"J&F_{control}": after, "drop": drop, "n": normal["n"]}


# --- output ----------------------------------------------------------------------------------------------------------


def write(evaluation: Evaluation, metrics: Path, folder: Path) -> None:
    """Write metrics.json to `metrics`, and rows.parquet and details.json into `folder`.

    Both are written beside their place and then renamed, so existing files are replaced as a whole, never edited.
    """
    new = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed run
    new.mkdir(parents=True)
    evaluation.rows.to_parquet(new / "rows.parquet", index=False)
    for name, values in (("details.json", evaluation.details), (metrics.name, evaluation.metrics)):
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (new / name).write_text(text, encoding="utf-8")
    (new / metrics.name).replace(metrics)
    replace_folder(new, folder)


NAMES = {"val": "validation", "test_s": "seen", "test_u": "unseen", "mix": "mix", "test_n": "null"}
CONTROL_NAMES = {"swapped_audio": "audio of another video", "permuted_text": "another expression of the same video"}


def number(value: float | None, digits: int = 1) -> str:
    """A score as text; a dash if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def plus_minus(error: float | None, digits: int = 1) -> str:
    """A standard error as text of 7 characters, or more; blank if there is none."""
    return f"{'' if error is None else f'±{error:.{digits}f}':>7}"


def render_table(metrics: dict, details: dict) -> str:
    """The results and controls as text for a terminal."""
    lines = [f"Results (protocol {metrics['protocol']}; J, F, J&F in percent, S a fraction; mix: mean of both)"]
    errors = details.get("standard_errors", {})  # not in older files
    lines.append(f"  {'split':<8}{'n':>6}{'J':>8}{'F':>8}{'J&F':>8}{'':>7}{'S':>8}")
    for split in ("test_s", "test_u", "mix"):
        row = metrics[split]
        scores = "".join(f"{number(row[k]):>8}" for k in ("J", "F", "J&F"))
        lines.append(f"  {NAMES[split]:<8}{row['n']:>6}{scores}{plus_minus(errors.get(split, {}).get('J&F'))}".rstrip())
    null = metrics["test_n"]
    spread = plus_minus(errors.get("test_n", {}).get("S"), 3)
    lines.append(f"  {NAMES['test_n']:<8}{null['n']:>6}{'':>31}{number(null['S'], 3):>8}{spread}".rstrip())
    if errors:
        lines.append("  ±: standard error over test videos (per_expression); other seeds differ in addition")
    if nulls := details.get("nulls"):  # not in older files
        kinds = (f"{kind} {number(of_kind['S'], 3)} (n {of_kind['n']})" for kind, of_kind in nulls.items())
        lines.append(f"  S by kind of null: {', '.join(kinds)}")
    if presence := details.get("presence"):
        lines.append(f"  Masks are left empty below an object score of {presence['threshold']:.2f}, chosen on val")
    for control, result in details["controls"].items():
        lines += ["", *_render_control(control, result)]
    return "\n".join(lines)


def _render_control(control: str, result: dict) -> list[str]:
    if control == "true_mask":
        lines = ["Upper bound: the same SAM 2, prompted with the ground-truth mask of frame 0 (per_expression)"]
        columns = {"J": "J", "bound": "J_true_mask", "share": "ratio"}
    else:
        which = "all expressions" if result["rows"] == "all" else f"expressions {result['rows']}"
        lines = [f"Control: {CONTROL_NAMES[control]} (per_expression; {which})"]
        columns = {"J&F": "J&F", "control": f"J&F_{control}", "drop": "drop"}
    lines.append(f"  {'split':<8}{'n':>6}" + "".join(f"{title:>9}" for title in columns))
    for split in ("test_s", "test_u", "mix"):
        cells = "".join(f"{number(result[split][k], 3 if k == 'ratio' else 1):>9}" for k in columns.values())
        lines.append(f"  {NAMES[split]:<8}{result[split]['n']:>6}{cells}")
    return lines
