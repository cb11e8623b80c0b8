"""The index of a Ref-AVS folder: the rows and videos to use, and an audit that explains why the others are left out.

videos.parquet       one row per video: media_id, vid, split, kind, frames, width, height, audio_seconds,
                     audio_rate; the last five are <NA> if the media were not checked or cannot be read
expressions.parquet  one row per expression, in the order of metadata.csv: row_id, uid, vid, media_id, split, fid,
                     object, exp, null; if there is a cues.csv, also template, sight, sound, time, late
audit.json           counts per split, found and kept, and every fault with its location
media.sha256         digest of the folder media/, on which later stages depend (samlove.data.digest)
gt_mask.sha256       digest of the folder gt_mask/
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from samlove.config import SPLITS, Policy
from samlove.data.audit import (
    KINDS,
    UNUSABLE,
    Fault,
    normalise,
    parse_rows,
    row_faults,
    split_leaks,
)
from samlove.data.audit_media import MediaInfo, media_faults
from samlove.data.dataset import RefAvsFolder
from samlove.data.digest import folder_digest
from samlove.data.hashes import FileHashes
from samlove.errors import RequestError, SamloveError

POLICIES: dict[str, Policy] = {kind: policy for kind, (policy, _) in KINDS.items()}
EXPRESSION_COLUMNS = ["row_id", "uid", "vid", "media_id", "split", "fid", "object", "exp", "null"]
CUE_FLAGS = ["sight", "sound", "time", "late"]  # cues that an expression needs; late: its target is not in frame 0


@dataclass(frozen=True)
class Audit:
    """The faults of a folder, and the rows and videos that its policies keep."""

    root: Path
    media_checked: bool
    policy: dict[str, Policy]
    faults: list[Fault]
    found: pd.DataFrame  # all rows, from samlove.data.audit.parse_rows
    expressions: pd.DataFrame  # the rows kept
    videos: pd.DataFrame

    @property
    def failing(self) -> dict[str, int]:
        """Number of faults of each kind with policy fail; empty if the folder passes."""
        return {kind: n for kind, n in self._count().items() if self.policy[kind] == "fail"}

    @property
    def failed(self) -> bool:
        return bool(self.failing)

    def _count(self) -> dict[str, int]:
        counts = Counter(fault.kind for fault in self.faults)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    def as_dict(self) -> dict[str, Any]:
        """The content of audit.json."""
        shared = shared_vids(self.found)
        return {
            "schema": 1,
            "root": str(self.root),
            "media_checked": self.media_checked,
            "rows": {"found": len(self.found), "kept": len(self.expressions)},
            "splits": {
                split: {"found": _sizes(self.found, split), "kept": _sizes(self.expressions, split)}
                for split in _splits(self.found)
            },
            "distinct_texts": {
                "found": int(self.found["raw_exp"].nunique()),
                "kept": int(self.expressions["exp"].nunique()),
            },
            "objects_only_in_test_u": unseen_objects(self.expressions),
            "shared_vids": [{"splits": list(pair), "vids": n} for pair, n in shared.items()],
            "faults": {
                kind: {
                    "policy": self.policy[kind],
                    "meaning": meaning,
                    "count": len(faults := [f for f in self.faults if f.kind == kind]),
                    "rows": len({line for f in faults for line in f.rows}),
                    "examples": [{"where": f.where, "found": f.found, "lines": list(f.rows)} for f in faults],
                }
                for kind, (_, meaning) in KINDS.items()
            },
        }

    def render(self, examples: int = 3) -> str:
        """The audit as text: a table by split, then all faults with policy fail and `examples` of each other kind."""
        report = self.as_dict()
        media = "media checked" if self.media_checked else "media not checked"
        rows = report["rows"]
        lines = [f"{self.root}: {rows['found']:,} rows found, {rows['kept']:,} kept; {media}", ""]
        heads = "".join(f"{head:>9}" for head in ("rows", "vids", "folders", "null"))
        lines += [f"{'':8}{'found':>36}   {'kept':>36}", f"{'split':8}{heads}   {heads}"]
        for split, sizes in report["splits"].items():
            cells = ("".join(f"{n:>9,}" for n in sizes[part].values()) for part in ("found", "kept"))
            lines.append(f"{split:8}" + "   ".join(cells))
        texts, unseen = report["distinct_texts"], report["objects_only_in_test_u"]
        lines += ["", f"distinct expressions: {texts['found']:,} as written, {texts['kept']:,} kept and normalised"]
        lines.append(f"objects only in test_u: {len(unseen)}{': ' if unseen else ''}{', '.join(unseen)}")
        shared = (f"{' and '.join(pair['splits'])} {pair['vids']:,}" for pair in report["shared_vids"])
        lines += [f"vids in two splits: {', '.join(shared) or 'none'}", ""]
        found = {kind: fault for kind, fault in report["faults"].items() if fault["count"]}
        lines.append(f"{'fault':18}{'policy':>8}{'count':>8}{'rows':>8}" if found else "no faults")
        for kind, fault in found.items():
            lines.append(f"{kind:18}{fault['policy']:>8}{fault['count']:>8,}{fault['rows']:>8,}  {fault['meaning']}")
            shown = fault["count"] if fault["policy"] == "fail" else examples
            lines += [f"    {example['where']}: {example['found']}" for example in fault["examples"][:shown]]
            if fault["count"] > shown:
                lines.append(f"    and {fault['count'] - shown:,} more")
        if self.failed:
            lines += ["", self.failure()]
        return "\n".join(lines)

    def failure(self) -> str:
        """One line: what fails, and how to fix it."""
        kinds = ", ".join(f"{kind} ({n:,})" for kind, n in self.failing.items())
        first = next(f for f in self.faults if f.kind in self.failing)
        return (
            f"{self.root}: faults with policy 'fail': {kinds}; first: {first.where}: {first.found}; "
            "fix the folder, or set policy: {KIND: drop} (or keep) in configs/<profile>/dataset.yaml"
        )


def audit_folder(root: Path, check_media: bool = True, policy: dict | None = None, frames: int = 10) -> Audit:
    """Audit the Ref-AVS folder at `root` without changing it.

    policy: fault kind -> drop, keep or fail; overrides POLICIES. drop removes the affected rows; keep leaves them
    (a feature stage that then cannot read a file records this in its failure log); fail leaves them and makes the
    audit fail. frames: the expected number of frames per video, one per second.
    Raises RequestError if there is no metadata.csv, if DVC could not watch the folder (RefAvsFolder.check_links), or if
    a policy is invalid; SamloveError if metadata.csv is not a table in the format of Ref-AVS Bench.
    """
    policies = merge_policies(policy or {})
    folder = RefAvsFolder(root)
    folder.check_links()
    found = parse_rows(folder.metadata())
    faults = list(row_faults(found, folder.root / "metadata.csv"))
    kept = _apply(found, faults, policies)
    faults += (leaks := list(split_leaks(kept)))
    kept = _apply(kept, leaks, policies)
    kept, missing = add_cues(kept, folder)
    faults += missing
    kept = _apply(kept, missing, policies)
    infos = [MediaInfo(media_id) for media_id in kept["media_id"].unique()]
    if check_media:
        infos, broken = media_faults(kept, folder, frames)
        faults += broken
        kept = _apply(kept, broken, policies)
    cues = [c for c in ("template", *CUE_FLAGS) if c in kept]
    expressions = kept[EXPRESSION_COLUMNS + cues].reset_index(drop=True)
    return Audit(folder.root, check_media, policies, faults, found, expressions, _videos(kept, infos))


def merge_policies(policy: dict) -> dict[str, Policy]:
    """POLICIES, overridden by `policy`. Raises RequestError for an unknown kind or policy."""
    for kind, value in policy.items():
        if kind not in POLICIES:
            raise RequestError(f"policy: unknown fault kind {kind!r}; expected one of {', '.join(POLICIES)}")
        if value not in ("drop", "keep", "fail"):
            raise RequestError(f"policy: {kind}: expected drop, keep or fail, found {value!r}")
        if value == "keep" and kind in UNUSABLE:
            raise RequestError(f"policy: {kind}: expected drop or fail, found keep: no stage can use such a row")
    return POLICIES | cast(dict[str, Policy], policy)


def write_index(audit: Audit, out: Path, hashes: FileHashes | None = None) -> None:
    """Write the tables, audit.json and the digests into the folder `out`.

    hashes: of the dataset's files; None: hash every file. Existing files are replaced, never edited, and only when all
    new ones are complete.
    Raises SamloveError, and writes nothing, if the audit fails or leaves no row.
    """
    if audit.failed:
        raise SamloveError(audit.failure())
    if audit.expressions.empty:
        raise SamloveError(f"{audit.root}: no row is left after applying the policies; run: samlove audit {audit.root}")
    out.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    audit.videos.to_parquet(partial / "videos.parquet", index=False)
    audit.expressions.to_parquet(partial / "expressions.parquet", index=False)
    report = json.dumps(audit.as_dict(), indent=1, ensure_ascii=False) + "\n"
    (partial / "audit.json").write_text(report, encoding="utf-8")
    for part in ("media", "gt_mask"):
        digest = folder_digest(audit.root / part, hashes, f"hash {part}")
        (partial / f"{part}.sha256").write_text(f"{digest}\n", encoding="utf-8")
    for path in sorted(partial.iterdir()):
        os.replace(path, out / path.name)
    partial.rmdir()


def shared_vids(rows: pd.DataFrame) -> dict[tuple[str, str], int]:
    """Number of vids that each pair of splits shares; pairs that share none are left out."""
    vids = {split: set(rows.loc[rows["split"] == split, "vid"]) for split in _splits(rows)}
    pairs = [(a, b) for i, a in enumerate(vids) for b in list(vids)[i + 1 :]]
    return {(a, b): len(vids[a] & vids[b]) for a, b in pairs if vids[a] & vids[b]}


def unseen_objects(rows: pd.DataFrame) -> list[str]:
    """Objects, other than those of null expressions, that occur only in test_u."""
    real = rows[~rows["null"]]
    unseen = real["split"] == "test_u"
    return sorted(set(real.loc[unseen, "object"]) - set(real.loc[~unseen, "object"]))


def _apply(rows: pd.DataFrame, faults: list[Fault], policies: dict[str, Policy]) -> pd.DataFrame:
    gone = {line for f in faults if policies[f.kind] == "drop" or f.kind in UNUSABLE for line in f.rows}
    return rows[~rows.index.isin(gone)]


def add_cues(rows: pd.DataFrame, folder: RefAvsFolder) -> tuple[pd.DataFrame, list[Fault]]:
    """The rows with the columns of cues.csv, if there is one, and its faults; rows without an entry get <NA>."""
    cues = folder.cues()
    if cues is None:
        return rows, []
    path = folder.root / "cues.csv"
    flags = [column for column in CUE_FLAGS if column in cues]
    for column in flags:
        if odd := set(cues[column]) - {"0", "1"}:
            raise SamloveError(f"{path}: column {column}: expected 0 or 1, found {sorted(odd)}")
    if odd := {f for f in cues["fid"] if not f.isdecimal()}:
        raise SamloveError(f"{path}: column fid: expected integers, found {sorted(odd)}")
    cues = cues.assign(fid=cues["fid"].astype(int), exp=cues["exp"].map(normalise))
    cues[flags] = cues[flags] == "1"
    key = ["uid", "fid", "exp"]
    cues = cues[[*key, "template", *flags]].drop_duplicates(key)
    joined = rows.merge(cues, how="left", on=key).set_axis(rows.index)
    absent = joined["template"].isna()
    joined[flags] = joined[flags].astype("boolean" if absent.any() else "bool")
    found = [
        Fault("missing_cues", str(path), f"no row for uid {uid}, fid {fid}, {exp!r}", (int(str(line)),))
        for line, uid, fid, exp in joined.loc[absent, key].itertuples()
    ]
    return joined, found


def _videos(rows: pd.DataFrame, infos: list[MediaInfo]) -> pd.DataFrame:
    """One row per video (and per split, if a leak is kept), in the order of the expressions."""
    videos = rows[["media_id", "vid", "split", "kind"]].drop_duplicates(["media_id", "split"])
    found = pd.DataFrame([asdict(info) for info in infos], columns=list(MediaInfo.__dataclass_fields__))
    whole = dict.fromkeys(("frames", "width", "height", "audio_rate"), "Int64")
    return videos.merge(found.astype({**whole, "audio_seconds": "Float64"}), on="media_id", how="left")


def _splits(rows: pd.DataFrame) -> list[str]:
    """The splits of Ref-AVS Bench, then any others in `rows`."""
    return [*SPLITS, *sorted(set(rows["split"]) - set(SPLITS))]


def _sizes(rows: pd.DataFrame, split: str) -> dict[str, int]:
    part = rows[rows["split"] == split]
    counts = {"rows": len(part), "vids": part["vid"].nunique(), "media": part["media_id"].nunique()}
    return {**counts, "null_rows": int(part["null"].sum())}
