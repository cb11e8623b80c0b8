"""`samlove store`: say what an artefact is, check it, compare two, try failed rows again, give and take stores."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stores.inspect import Artefact, Difference

INDEX = Path("data/index")
WIDTH = 11  # of the first column
SHOWN = 5  # keys, failures and faults named; the counts say how many there are

store = typer.Typer(
    help="Feature stores, shard sets, predictions files, checkpoints: what they are, whether whole, how they differ.",
    no_args_is_help=True,
)
Place = Annotated[
    Path, typer.Argument(help="A feature store, exported or not, a shard set, a predictions file, or a checkpoint.")
]


@store.command()
def info(path: Place) -> None:
    """Say what an artefact is, how much, from what, and how much of each split it covers."""
    from stores.inspect import open_artefact

    artefact = open_artefact(path)
    print(f"{path}: {artefact.kind}")
    for name, text in _lines(artefact):
        print(f"  {name:{WIDTH}}{text}")


@store.command()
def verify(
    path: Place,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare checksums.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Compute a few rows anew and compare them.")] = False,
) -> None:
    """Check that the files are those that were written: names and sizes or, with --deep, every byte.

    A flipped bit, a truncated, missing or extra file are named, a line each; exit status 1 where there is any.
    """
    from stores.inspect import open_artefact
    from stores.verify import verify as faults_of

    faults = faults_of(path, deep)
    for fault in faults:
        print(fault)
    if not faults:
        artefact = open_artefact(path)
        checked = "every byte has its checksum" if deep else "names and sizes are right (--deep reads every byte)"
        size = f"{_counted(artefact.files, 'file')}, {_bytes(artefact.bytes)}"
        print(f"{path}: {_counted(len(artefact.keys), 'item')}, {size}: {checked}")
        if live:
            faults += _verify_live(path)
    if faults:
        raise typer.Exit(1)


def _verify_live(path: Path) -> list[str]:
    """Print the golden sample's comparison; its faults."""
    from samlove.cli.stages import job_of, stage_of
    from samlove.features.golden import TOLERANCE, check_live
    from stores import FeatureStore
    from stores.fingerprint import differing

    found, job = FeatureStore.open(path), job_of(stage_of(path))
    for name, (stored, now) in differing(found.manifest["fingerprint"], job.encoder.fingerprint()).items():
        print(f"  made otherwise than today: {name}: {stored!r} then, {now!r} now")
    rows = check_live(job, found)
    for row in rows:
        print(f"  {row}")
    bad = [str(row) for row in rows if not row.good]
    print(
        f"  {len(rows) - len(bad)} of {len(rows)} arrays of {len({row.key for row in rows})} rows, computed now, ",
        end="",
    )
    print(f"lie within {TOLERANCE} of the stored ones (length of the difference over that of the array)")
    return bad


@store.command()
def diff(first: Place, second: Place) -> None:
    """Say how two artefacts differ: what made them, their keys, every value. Exit status 1 where they do."""
    from stores.inspect import diff as difference_of

    difference = difference_of(first, second)
    for line in _difference(difference):
        print(line)
    if difference:
        raise typer.Exit(1)
    print("no difference")


@store.command()
def retry(path: Annotated[Path, typer.Argument(help="A feature store of this project.")]) -> None:
    """Try the rows of the failure ledger again; all others stay as they are."""
    from dataclasses import replace

    from samlove.cli.stages import job_of, stage_of
    from samlove.data.digest import code_digest
    from samlove.errors import SamloveError
    from samlove.features.cluster import chosen_cluster
    from samlove.features.extract import extract
    from stores import FeatureStore
    from stores.fingerprint import check_fingerprint

    stage = stage_of(path)
    found = FeatureStore.open(path)
    failed = {failure.key for failure in found.failures}
    if not failed:
        print(f"{path}: no failed rows")
        return
    job = job_of(stage)
    made = {**found.manifest["fingerprint"], "code": found.manifest.get("code")}
    asked = {**job.encoder.fingerprint(), "code": code_digest(type(job.encoder))}
    check_fingerprint(made, asked, path, f"dvc repro {stage}")
    if gone := [key for key in [*found.keys(), *failed] if key not in job.sources]:
        raise SamloveError(
            f"{path}: expected all its items in data/index, found {len(gone)} gone, first {gone[0]!r}; "
            f"the index has changed since: dvc repro {stage}"
        )
    sources = {key: source for key, source in job.sources.items() if key in found or key in failed}
    print(f"{stage}: {extract(replace(job, sources=sources), chosen_cluster())}")
    left = FeatureStore.open(path).failures
    print(f"{path}: {len(failed) - len(left)} of {len(failed)} failed rows are there now; then: dvc commit {stage}")
    for failure in left[:SHOWN]:
        print(f"  {failure.key}: {failure.error}")


class Kept(StrEnum):
    float16 = "float16"
    float32 = "float32"


@store.command("export")
def export_(
    path: Annotated[Path, typer.Argument(help="A feature store, such as data/features/audio.")],
    file: Annotated[Path, typer.Argument(help="The HDF5 file to write; new.")],
) -> None:
    """Write a feature store to one HDF5 file, which `samlove store import` takes back, equal to the last bit."""
    from stores import export_store

    print(f"{file}: {export_store(path, file):,} items of {path}")


@store.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file that export wrote, or a folder of MEDIA_ID.pt.")],
    path: Annotated[Path, typer.Argument(help="The store to write; new.")],
    dtype: Annotated[Kept, typer.Option(help="Of a folder's tensors; as `dtype` in audio.yaml.")] = Kept.float16,
) -> None:
    """Bring in a feature store: one that was exported, or the audio_embed/*.pt of another Ref-AVS project.

    The latter are tensors of 10x128, read without unpickling anything else; what made them is not known, and the
    store's fingerprint says `imported`.
    """
    if source.is_dir():
        from samlove.features.audio_embed import import_audio_embed

        count = import_audio_embed(source, path, dtype.value)
    else:
        from stores import import_store

        count = import_store(source, path)
    print(f"{path}: {count:,} items of {source}")


def _lines(artefact: "Artefact") -> Iterator[tuple[str, str]]:
    """Name and text of each line; the name empty where it is the line's above."""
    from stores.inspect import flat

    count, failures = len(artefact.keys), artefact.failures
    each = f", {_bytes(artefact.bytes / count)} an item" if count else ""
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
    for number, (split, (there, wanted)) in enumerate(_coverage(artefact.keys).items()):
        yield "" if number else "coverage", f"{split}: {there:,} of {wanted:,}"


def _coverage(keys: list[str]) -> dict[str, tuple[int, int]]:
    """By split, of the index's clips, rows or texts, whichever the keys are; {} where there is no index."""
    import pandas as pd

    from stores.inspect import coverage

    there = set(keys)
    for table, column in (("videos", "media_id"), ("expressions", "row_id"), ("expressions", "exp")):
        path = INDEX / f"{table}.parquet"
        if path.is_file():
            rows = pd.read_parquet(path, columns=[column, "split"])
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
        yield f"{len(found.changed)} items of both with other values: {_some(found.changed)}"
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
