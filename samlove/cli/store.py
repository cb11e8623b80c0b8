"""`samlove store`: show, verify and compare artefacts, retry failed items, export and import feature stores."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samlove.cli.help import examples
from samlove.errors import printable

if TYPE_CHECKING:
    from stores.inspect import Artefact, Difference

WIDTH = 11  # of the first column
SHOWN = 5  # at most so many keys and failures are listed; the counts are complete

store = typer.Typer(
    help="Inspect, verify and compare feature stores, shard sets, predictions files and checkpoints.",
    no_args_is_help=True,
)
Place = Annotated[
    Path, typer.Argument(help="A feature store (or its export), a shard set, a predictions file or a checkpoint.")
]


@store.command(epilog=examples("samlove store info data/micro/features/visual"))
def info(path: Place) -> None:
    """Show an artefact's kind, size, fingerprint and coverage of each split."""
    from stores.inspect import open_artefact

    artefact = open_artefact(path)
    print(f"{path}: {artefact.kind}")
    for name, text in _lines(artefact, path):
        print(f"  {name:{WIDTH}}{printable(text)}")


@store.command(epilog=examples("samlove store verify --deep --live data/micro/features/visual"))
def verify(
    path: Place,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare checksums.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Recompute a few items and compare them.")] = False,
) -> None:
    """Check an artefact's files: names and sizes or, with --deep, every byte.

    Lists each truncated, missing or extra file and, with --deep, each altered one, one per line. Exits with status 1
    if there are any.
    """
    from stores.inspect import open_artefact
    from stores.verify import verify as faults_of

    faults = faults_of(path, deep)
    for fault in faults:
        print(printable(fault))
    if not faults:
        artefact = open_artefact(path)
        checked = "all checksums match" if deep else "names and sizes match (--deep checks every byte)"
        size = f"{_counted(artefact.files, 'file')}, {_bytes(artefact.bytes)}"
        print(f"{path}: {_counted(len(artefact.keys), 'item')}, {size}: {checked}")
        if live:
            faults += _verify_live(path)
    if faults:
        raise typer.Exit(1)


def _verify_live(path: Path) -> list[str]:
    """Compare the golden sample and print the result. Returns the faults."""
    from samlove.cli.stages import job_of, store_name
    from samlove.features.golden import TOLERANCE, check_live
    from stores import FeatureStore
    from stores.fingerprint import differing

    found, job = FeatureStore.open(path), job_of(store_name(path))
    for name, (stored, now) in differing(found.manifest["fingerprint"], job.encoder.fingerprint()).items():
        print(f"  differs from the current setup: {name}: {stored!r} stored, {now!r} now")
    rows = check_live(job, found)
    for row in rows:
        print(f"  {row}")
    bad = [str(row) for row in rows if not row.good]
    print(
        f"  {len(rows) - len(bad)} of {len(rows)} arrays of {len({row.key for row in rows})} recomputed items are "
        f"within {TOLERANCE} of the stored ones (norm of the difference divided by the norm of the array)"
    )
    return bad


@store.command(epilog=examples("samlove store diff data/refavs/features/visual data/clip/features/visual"))
def diff(first: Place, second: Place) -> None:
    """Compare two artefacts: fingerprints, keys and every value. Exits with status 1 if they differ."""
    from stores.inspect import diff as difference_of

    difference = difference_of(first, second)
    for line in _difference(difference):
        print(printable(line))
    if difference:
        raise typer.Exit(1)
    print("no difference")


@store.command(epilog=examples("samlove store retry data/micro/features/audio"))
def retry(path: Annotated[Path, typer.Argument(help="A feature store of this project.")]) -> None:
    """Retry the items in the failure log; all others stay as they are."""
    from dataclasses import replace

    from samlove.cli.stages import job_of, stage_of, store_name
    from samlove.data.digest import code_digest
    from samlove.errors import SamloveError
    from samlove.features.cluster import chosen_cluster
    from samlove.features.encoders.base import Sources
    from samlove.features.extract import extract
    from stores import FeatureStore
    from stores.fingerprint import check_fingerprint

    name = store_name(path)
    stage = stage_of(name)
    found = FeatureStore.open(path)
    failed = {failure.key for failure in found.failures}
    if not failed:
        print(f"{path}: no failed items")
        return
    job = job_of(name)
    made = {**found.manifest["fingerprint"], "code": found.manifest.get("code")}
    asked = {**job.encoder.fingerprint(), "code": code_digest(type(job.encoder))}
    check_fingerprint(made, asked, path, f"dvc repro {stage}")
    known = dict.fromkeys([*found.keys(), *failed])
    if gone := [key for key in known if key not in job.sources]:
        raise SamloveError(
            f"{path}: {len(gone)} of its items are no longer in the index, first {gone[0]!r}; "
            f"the index has changed; run: dvc repro {stage}"
        )
    sources = Sources((key for key in job.sources if key in known), job.sources.__getitem__)
    print(f"{name}: {extract(replace(job, sources=sources), chosen_cluster())}")
    left = FeatureStore.open(path).failures
    print(f"{path}: recovered {len(failed) - len(left)} of {len(failed)} failed items; now run: dvc commit {stage}")
    for failure in left[:SHOWN]:
        print(f"  {printable(f'{failure.key}: {failure.error}')}")


class Kept(StrEnum):
    float16 = "float16"
    float32 = "float32"


@store.command("export", epilog=examples("samlove store export data/micro/features/audio audio.h5"))
def export_(
    path: Annotated[Path, typer.Argument(help="A feature store, such as data/micro/features/audio.")],
    file: Annotated[Path, typer.Argument(help="The HDF5 file to write; must not exist.")],
) -> None:
    """Export a feature store to one HDF5 file; `samlove store import` restores it bit for bit."""
    from stores import export_store

    print(f"{file}: {export_store(path, file):,} items of {path}")


@store.command(
    "import",
    epilog=examples(
        "samlove store import audio.h5 data/micro/features/audio",
        "samlove store import audio_embed/ data/refavs/features/audio",
    ),
)
def import_(
    source: Annotated[Path, typer.Argument(help="A file written by export, or a folder of MEDIA_ID.pt files.")],
    path: Annotated[Path, typer.Argument(help="The feature store to write; must not exist.")],
    dtype: Annotated[Kept, typer.Option(help="How to store the tensors; as `dtype` in audio.yaml.")] = Kept.float16,
) -> None:
    """Import an exported feature store, or the audio_embed/*.pt files of another Ref-AVS project.

    The .pt files are tensors of 10x128; nothing else in them is unpickled. Their origin is unknown, so the store's
    fingerprint says `imported`.
    """
    if source.is_dir():
        from samlove.features.audio_embed import import_audio_embed

        count = import_audio_embed(source, path, dtype.value)
    else:
        from stores import import_store

        count = import_store(source, path)
    print(f"{path}: {count:,} items of {source}")


def _lines(artefact: "Artefact", path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each line; the name is empty if it is that of the line above."""
    from stores.inspect import flat

    count, failures = len(artefact.keys), artefact.failures
    each = f", {_bytes(artefact.bytes / count)} per item" if count else ""
    shards, files = _counted(artefact.shards, "shard"), _counted(artefact.files, "file")
    yield "items", f"{count:,} in {shards}, {files} of {_bytes(artefact.bytes)}{each}"
    for number, (name, spec) in enumerate(artefact.arrays.items()):
        yield "" if number else "arrays", f"{name} {tuple(spec['shape'])} {spec['dtype']}"
    yield "failed", f"{len(failures)}{': see failures.csv' if failures else ''}"
    for failure in failures[:SHOWN]:
        yield "", f"{failure.key}: {failure.error}"
    for number, (name, value) in enumerate(flat(artefact.fingerprint).items()):
        lines = str(value).splitlines()
        yield "" if number else "made by", f"{name}: {lines[0] if lines else ''}{' ...' * (len(lines) > 1)}"
    for number, (split, (there, wanted)) in enumerate(_coverage(artefact.keys, path).items()):
        yield "" if number else "coverage", f"{split}: {there:,} of {wanted:,}"


def _coverage(keys: list[str], path: Path) -> dict[str, tuple[int, int]]:
    """By split: how many of the index's videos, rows or texts, whichever the keys are, an artefact has, and how many
    there are. {} if there is no index in any folder above the artefact."""
    import pandas as pd

    from stores.inspect import coverage

    there = set(keys)
    index = next((p / "index" for p in path.resolve().parents if (p / "index" / "expressions.parquet").is_file()), None)
    if index is None:
        return {}
    for table, column in (("videos", "media_id"), ("expressions", "row_id"), ("expressions", "exp")):
        rows = pd.read_parquet(index / f"{table}.parquet", columns=[column, "split"])
        if there.intersection(rows[column]):
            return coverage(there, zip(rows[column], rows["split"], strict=True))
    return {}


def _difference(found: "Difference") -> Iterator[str]:
    if found.kinds:
        yield f"kind: {found.kinds[0]} and {found.kinds[1]}"
    for name, (a, b) in {**found.fingerprint, **found.arrays}.items():
        yield f"{name}: {a!r} and {b!r}"
    for what, keys in (("only in the first", found.only_first), ("only in the second", found.only_second)):
        if keys:
            yield f"{len(keys)} items {what}: {_some(keys)}"
    if found.changed:
        yield f"{len(found.changed)} common items with different values: {_some(found.changed)}"
        for name, largest in found.largest.items():
            yield f"  {name}: by {largest:.3g} at most"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
