"""`samlove score`: predicted masks of any method under the published protocols, and two methods compared."""

import math
import os
from pathlib import Path
from typing import Any

from samlove.config import DatasetConfig
from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, absence, path_text
from samlove.scoring.compare import CONFIDENCE, Difference
from samlove.scoring.evaluate import NAMES
from samlove.scoring.mask_formats import open_masks
from samlove.scoring.masks import Masks
from samlove.scoring.protocols import PROTOCOLS
from samlove.scoring.splits import REMARKS, Scored, compare, read_rows, score_splits
from stores.manifest import write_json

FRAMES = DatasetConfig.model_fields["frames"].default  # of a video of Ref-AVS
EXPECTED = "expected the folder of a dataset with metadata.csv, media/ and gt_mask/; choose another --dataset"
PARTS = ("cue", "category")
BREAKDOWN = "simtoken"  # the protocol of comparisons by cue and category, if it is asked for and has a J&F
NOT_COMPUTED = "Not computed: F and J&F of {}. The masks are binary, and F's curve needs a score per pixel."


def run(paths: list[Path], dataset: Path, splits: list[str], protocol: str, out: Path | None) -> None:
    """Score each of one or two methods, print the results, and write them to `out` as JSON.

    Raises RequestError for an invalid request, before anything is scored.
    """
    names = list(PROTOCOLS) if protocol == "all" else list(dict.fromkeys(protocol.split(",")))
    if unknown := [name for name in names if name not in PROTOCOLS]:
        raise RequestError(f"--protocol {unknown[0]}: expected all or one of {', '.join(PROTOCOLS)}")
    if out is not None:
        _check_out(out, paths)
    folder = RefAvsFolder(dataset)
    if not dataset.is_dir():
        raise RequestError(f"{dataset}: {absence(dataset)}; {EXPECTED}")
    every, rows = read_rows(folder, splits)
    for name, needed in (("gt_mask", not rows["null"].all()), ("media", rows["null"].any())):
        if needed and not (dataset / name).is_dir():
            raise RequestError(f"{dataset / name}: {absence(dataset / name)}; {EXPECTED}")
    methods = [open_masks(path, every, splits, FRAMES) for path in paths]
    scored = []
    for masks in methods:
        scored.append(score_splits(masks, rows, folder, names, FRAMES))
        print(render(masks, scored[-1]), end="\n\n")
    content: dict[str, Any] = {
        "dataset": path_text(dataset),
        "unit": "percent for J, F and J&F, a fraction for S; null: no score",
        "used_by": {name: PROTOCOLS[name].used_by for name in names},
        "methods": [_as_record(masks, of_masks) for masks, of_masks in zip(methods, scored, strict=True)],
    }
    if len(methods) == 2:
        content["difference"] = _compare(paths, scored[0], scored[1], names)
    if out is not None:
        write_json(out, content)
        print(f"{out}: written")


def _check_out(out: Path, inputs: list[Path]) -> None:
    """Raise RequestError unless results can be written to `out` without harm to the masks."""
    if not out.parent.is_dir():
        raise RequestError(f"{out.parent}: {absence(out.parent)}; create the folder or choose another path")
    if not os.access(out.parent, os.W_OK):
        raise RequestError(f"{out.parent}: no permission to write; choose another --out")
    if os.path.lexists(out) and not out.is_file():
        raise RequestError(f"{out}: {absence(out)}; expected a new file, or one to replace; choose another --out")
    if out.exists() and any(path.exists() and path.samefile(out) for path in inputs):
        raise RequestError(f"{out}: holds masks to score and would be replaced; choose another --out")


# --- one method ------------------------------------------------------------------------------------------------------


def render(masks: Masks, scored: Scored) -> str:
    """The scores of one method as text: what was read, what is odd about it, a table, and who uses each protocol."""
    lines = [f"{masks.path}: {masks.what}, {'with scores' if masks.has_scores else 'binary'}"]
    lines += [f"  {remark}" for remark in _remarks(masks, scored)]
    lines += ["", *_table(scored), "", "J, F and J&F in percent, S a fraction. Used by:"]
    lines += [f"  {name:<13}{PROTOCOLS[name].used_by}" for name in scored.protocols]
    if curves := [name for name in scored.protocols if PROTOCOLS[name].needs_scores and not masks.has_scores]:
        lines.append(NOT_COMPUTED.format(", ".join(curves)))
    return "\n".join(lines)


def _remarks(masks: Masks, scored: Scored) -> list[str]:
    found = []
    for split, counts in scored.counts.items():
        found.append(f"{split}: {counts['expressions']:,} expressions, {counts['null']:,} of them null")
        rows = scored.rows[scored.rows["split"] == split]
        for key, text in REMARKS.items():
            if counts[key]:
                found.append(f"{split}: {counts[key]:,} {text}; for example {rows.index[rows[key]][0]}")
    odd = {
        "doubled: only the first is used": masks.doubled,
        "of no expression or no known format: not used": masks.unused,
    }
    found += [f"{len(places):,} masks {text}; for example {places[0]}" for text, places in odd.items() if places]
    return found


def _table(scored: Scored) -> list[str]:
    """A row per protocol; columns for the scores that each split can have."""
    columns = []
    splits = list(next(iter(scored.protocols.values())))
    for split in splits:
        counts = scored.counts.get(split, {"expressions": 1, "null": 0})  # the mix
        columns += [(split, key) for key in ("J", "F", "J&F") if counts["expressions"] > counts["null"]]
        columns += [(split, "S")] if counts["null"] else []
    firsts = [i == 0 or columns[i - 1][0] != split for i, (split, _) in enumerate(columns)]
    titles = [NAMES.get(split, split) if first else "" for (split, _), first in zip(columns, firsts, strict=True)]
    lines = [f"{'':<13}" + "".join(f"{title:>8}" for title in titles)]
    lines.append(f"{'protocol':<13}" + "".join(f"{key:>8}" for _, key in columns))
    for name, of_splits in scored.protocols.items():
        cells = (_number(of_splits[split][key], 4 if key == "S" else 2) for split, key in columns)
        lines.append(f"{name:<13}" + "".join(f"{cell:>8}" for cell in cells))
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _as_record(masks: Masks, scored: Scored) -> dict[str, Any]:
    return {
        "masks": path_text(masks.path),
        "format": masks.what,
        "binary": not masks.has_scores,
        "rows": scored.counts,
        "doubled": len(masks.doubled),
        "unused": len(masks.unused),
        "scores": scored.protocols,
    }


# --- two methods -----------------------------------------------------------------------------------------------------


def _compare(paths: list[Path], own: Scored, other: Scored, names: list[str]) -> dict[str, Any]:
    """Print how far the first method is above the second; returns the same as JSON."""
    found: dict[str, Any] = {}
    print(f"Difference, {paths[0]} minus {paths[1]}: mean over expressions, each scored by itself, with its")
    print(f"{CONFIDENCE:.0%} interval (paired bootstrap over expressions); * where the interval excludes 0")
    chosen = next((name for name in (BREAKDOWN, *names) if name in names and _has_f(own, other, name)), names[0])
    for name in names:
        parts = ("split", *(PARTS if name == chosen else ()))
        found[name] = {part: compare(own, other, name, part) for part in parts}
        for part, groups in found[name].items():
            for group, scores in groups.items():
                cells = "  ".join(_cell(score, difference) for score, difference in scores.items())
                n = max(difference.n for difference in scores.values())
                print(f"  {name:<13}{part if part != 'split' else '':<9}{NAMES.get(group, group):<18}{n:>6}  {cells}")
    return {
        name: {
            part: {g: {s: _as_json(d) for s, d in scores.items()} for g, scores in groups.items()}
            for part, groups in parts.items()
        }
        for name, parts in found.items()
    }


def _as_json(difference: Difference) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in difference._asdict().items()}


def _has_f(own: Scored, other: Scored, name: str) -> bool:
    return all(scored.rows[f"F_{name}"].notna().any() for scored in (own, other))


def _cell(score: str, difference: Difference) -> str:
    digits = 4 if score == "S" else 2
    mean, low, high = (f"{value:+.{digits}f}" for value in difference[:3])
    interval = "[no interval]" if math.isnan(difference.low) else f"[{low}, {high}]"  # of a single expression
    return f"{score} {mean} {interval}{'*' if difference.distinct else ' '}"
