"""The kinds of faults of a Ref-AVS folder, and those that the rows of its table have.

samlove.data.audit_media finds the faults of the media that the rows refer to. Both modules only report faults;
samlove.data.index applies a policy to each kind.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from samlove.config import SPLITS, Policy

KINDS: dict[str, tuple[Policy, str]] = {  # kind -> default policy, meaning
    "bad_row": ("fail", "uid, vid or fid that does not name a video and an object"),
    "todo_split": ("drop", "row without a split yet (TODO)"),
    "unknown_split": ("fail", f"split other than {', '.join(SPLITS)}"),
    "wrong_split": ("fail", "null expression in test_s or test_u, or any other expression in test_n"),
    "no_expression": ("drop", "the annotator's NO. instead of an expression"),
    "tool_error": ("drop", "the annotation tool's [Error] message instead of an expression"),
    "empty_expression": ("drop", "only whitespace instead of an expression"),
    "edge_blanks": ("keep", "whitespace before or after an expression; removed"),
    "inner_blanks": ("keep", "whitespace other than single spaces inside an expression; replaced by one space"),
    "non_ascii": ("keep", "non-ASCII characters in an expression; left as they are"),
    "repeated_uid": ("keep", "uid that an earlier row already has; row_id distinguishes the rows"),
    "repeated_row": ("keep", "row that equals an earlier one in every column; also counted as repeated_uid"),
    "split_leak": (
        "fail",
        "video in more than one of train, val and test, or in several test splits; drop keeps it only in the last one",
    ),
    "missing_cues": ("fail", "row without an entry in cues.csv"),
    "stray_file": ("keep", "file or folder that the layout of Ref-AVS does not have; ignored"),
    "bad_folder": ("fail", "folder that cannot be read, or a file in its place"),
    "missing_media": ("fail", "media folder missing"),
    "missing_frame": ("fail", "frame missing although a later frame or a mask exists, or no frames at all"),
    "bad_frame": ("fail", "frame that cannot be read or decoded"),
    "frame_count": ("keep", "fewer or more frames than configured; the last is repeated, extra frames are ignored"),
    "frame_size": ("keep", "frames of different sizes in one video"),
    "turned_frame": (
        "keep",
        "frame whose EXIF orientation is not upright; it is turned, and its masks must match",
    ),
    "missing_audio": ("fail", "audio.wav missing"),
    "bad_audio": ("fail", "audio.wav that cannot be read or decoded completely"),
    "short_audio": ("keep", "audio shorter than the video; padded"),
    "long_audio": ("keep", "audio longer than the video; trimmed"),
    "missing_mask": ("fail", "mask missing"),
    "bad_mask": ("fail", "mask that cannot be read or decoded"),
    "unclear_mask": ("fail", "mask that can be read as different masks, or is in a lossy format; no stage reads it"),
    "mask_values": ("fail", "mask with several values > 0: grey levels, colours or labels; all are read as the object"),
    "whole_mask": ("fail", "mask that covers the whole frame or all of its edges; its background may be white"),
    "turned_mask": ("fail", "mask with the width and height of its frame swapped; resized anyway"),
    "mask_size": ("keep", "mask and frame of different sizes; both are resized to the same square"),
    "empty_mask": ("keep", "object whose masks are all empty"),
}
UNUSABLE = ("bad_row", "empty_expression")  # never kept: no stage can use such rows

_UID = re.compile(r"(?P<media_id>(?:(?P<kind>null_[mc])-)?(?P<vid>[^/\\]+))_(?P<object>[^_/\\]+)_\d+")
_TEST = ("test_s", "test_u", "test_n")


@dataclass(frozen=True)
class Fault:
    kind: str  # a key of KINDS
    where: str  # a path, or file:line
    found: str
    rows: tuple[int, ...]  # affected lines of metadata.csv


def normalise(text: str) -> str:
    """Replace each run of whitespace by one space and strip both ends; all else stays, including typography."""
    return " ".join(text.split())


def parse_rows(raw: pd.DataFrame) -> pd.DataFrame:
    """Parse the fields of metadata.csv; same rows, same index (the line in the file).

    Columns: row_id (unique: the uid; later rows with the same uid get uid#2, uid#3, ...), uid, vid, media_id,
    split, fid (int, -1 if it is not a number), object, kind (real, null_m, null_c, or '' for a bad_row),
    exp (normalised), raw_exp, null.
    """
    parsed = [_UID.fullmatch(uid) for uid in raw["uid"]]
    rows = raw[["uid", "vid", "split"]].copy()
    again = raw.groupby("uid").cumcount() + 1
    rows.insert(0, "row_id", [uid if n == 1 else f"{uid}#{n}" for uid, n in zip(raw["uid"], again, strict=True)])
    rows["media_id"] = [m["media_id"] if m else "" for m in parsed]
    rows["object"] = [m["object"] if m else "" for m in parsed]
    rows["null"] = raw["uid"].str.startswith("null_")
    rows["fid"] = [int(fid) if re.fullmatch(r"[0-9]{1,9}", fid) else -1 for fid in raw["fid"]]
    rows["kind"] = [
        (m["kind"] or "real")
        if m and m["vid"] == vid and fid >= 0 and (m["object"] == "null") == bool(m["kind"])
        else ""
        for m, vid, fid in zip(parsed, raw["vid"], rows["fid"], strict=True)
    ]
    rows["raw_exp"] = raw["exp"]
    rows["exp"] = raw["exp"].map(normalise)
    return rows


def row_faults(rows: pd.DataFrame, table: Path) -> Iterator[Fault]:
    """Faults that a row shows by itself or compared with an earlier row. `rows`: from parse_rows."""

    def faults(kind: str, chosen: pd.Series, found: Iterable[str]) -> Iterator[Fault]:
        for (line, uid), what in zip(rows.loc[chosen, "uid"].items(), itertools.compress(found, chosen), strict=True):
            yield Fault(kind, f"{table}:{line}", f"{uid}: {what}", (int(str(line)),))

    exp, split = rows["exp"], rows["split"]
    expected = "expected uid = [null_m-|null_c-]{vid}_{object}_{number} (object null if prefixed) and an integer fid"
    yield from faults("bad_row", rows["kind"] == "", [f"vid {v}: {expected}" for v in rows["vid"]])
    yield from faults("todo_split", split == "TODO", split)
    yield from faults("unknown_split", ~split.isin([*SPLITS, "TODO"]), split)
    wrong = (rows["null"] & split.isin(["test_s", "test_u"])) | (~rows["null"] & (split == "test_n"))
    yield from faults("wrong_split", wrong, split)
    tool_error, blank = exp.str.startswith("[Error]"), exp == ""
    yield from faults("no_expression", exp == "NO.", exp)
    yield from faults("tool_error", tool_error, exp)
    yield from faults("empty_expression", blank, exp)
    stripped = rows["raw_exp"].str.strip()
    quoted = rows["raw_exp"].map(repr)
    yield from faults("edge_blanks", (stripped != rows["raw_exp"]) & ~blank, quoted)
    yield from faults("inner_blanks", stripped != exp, quoted)
    yield from faults("non_ascii", ~exp.map(str.isascii) & ~tool_error, exp)
    yield from _repeats(rows, table)


def _repeats(rows: pd.DataFrame, table: Path) -> Iterator[Fault]:
    columns = ["vid", "split", "fid", "raw_exp"]
    for uid, same in rows[rows["uid"].duplicated(keep=False)].groupby("uid", sort=False):
        records = list(same[columns].itertuples(index=False))
        for i, line in list(enumerate(same.index))[1:]:
            where, lines = f"{table}:{line}", (int(line),)
            if records[i] in records[:i]:
                first = same.index[records.index(records[i])]
                yield Fault("repeated_row", where, f"{uid}: same as line {first} in every column", lines)
            other = [c.removeprefix("raw_") for c, a, b in zip(columns, records[0], records[i], strict=True) if a != b]
            differs = f"different {' and '.join(other)}" if other else "otherwise the same"
            yield Fault("repeated_uid", where, f"{uid}: first on line {same.index[0]}; {differs}", lines)


def split_leaks(rows: pd.DataFrame) -> Iterator[Fault]:
    """Videos in more than one of train, val and test, and media folders in more than one test split.

    A vid in both test_s and test_n is not a leak: null expressions are made from videos of the seen test split.
    The rows of a fault are those to drop: all but the rows of its last split.
    """
    rows = rows[rows["split"].isin(SPLITS)]
    rank = rows["split"].map({"train": 0, "val": 1} | dict.fromkeys(_TEST, 2))
    for vid in _in_several(rows["vid"], rank):
        here = rows["vid"] == vid
        lost = rows.index[here & (rank < rank[here].max())]
        yield Fault("split_leak", f"vid {vid}", _in_splits(rows[here]), tuple(map(int, lost)))
    tests = rows[rank == 2]
    order = tests["split"].map(SPLITS.index)
    for media_id in _in_several(tests["media_id"], order):
        here = tests["media_id"] == media_id
        lost = tests.index[here & (order < order[here].max())]
        yield Fault("split_leak", f"media folder {media_id}", _in_splits(tests[here]), tuple(map(int, lost)))


def _in_several(keys: pd.Series, groups: pd.Series) -> list[str]:
    counts = groups.groupby(keys).nunique()
    return list(counts.index[counts > 1])


def _in_splits(rows: pd.DataFrame) -> str:
    return "in " + " and ".join(s for s in SPLITS if s in set(rows["split"]))
