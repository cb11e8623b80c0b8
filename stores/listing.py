"""The list of an artefact's files: files.arrow, beside the manifest, with the size and crc32c of each file.

The manifest lists only the few files next to it, files.arrow among them, so its size does not depend on the number of
items. Artefacts of schema 1 list all files in the manifest; they are still read.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from samlove.errors import SamloveError
from stores.manifest import NAME, check_part, crc32c_file, file_entry, write_manifest
from stores.remote import AnyPath
from stores.table import TEXT, Table, TableWriter

FILES = "files.arrow"
COLUMNS = {"path": TEXT, "bytes": "int64", "crc32c": "uint32"}


class File(NamedTuple):
    """A file of an artefact: its path in the folder, its size, and its crc32c as 8 hex digits."""

    path: str
    bytes: int
    crc32c: str

    @classmethod
    def read(cls, folder: Path, path: str) -> "File":
        """The entry of a file; reads all of its bytes."""
        return cls(path, (folder / path).stat().st_size, crc32c_file(folder / path))


def seal_folder(folder: Path, manifest: Mapping[str, Any], listed: Iterable[File]) -> None:
    """Write files.arrow and the manifest of a folder that is otherwise complete.

    listed: the files of the shards, in order. The manifest lists all other files, which must be directly in `folder`.
    """
    for name in (NAME, FILES):
        (folder / name).unlink(missing_ok=True)
    writer = TableWriter(COLUMNS, folder=folder)
    paths = set()
    for file in listed:
        writer.add(path=file.path, bytes=file.bytes, crc32c=int(file.crc32c, 16))
        paths.add(file.path)
    writer.write(folder / FILES)
    beside = [path for path in folder.iterdir() if path.is_file() and path.name not in paths]
    write_manifest(folder, manifest, {path.name: file_entry(path) for path in sorted(beside)})


def check_beside(folder: AnyPath, manifest: Mapping[str, Any], remedy: str) -> None:
    """Raise SamloveError unless the files next to the manifest have the sizes that it lists; schema 1 lists none."""
    for file in _beside(folder, manifest, remedy) if manifest.get("schema", 1) > 1 else ():
        check_part(file.path, folder / NAME)
        try:
            found: object = (folder / file.path).stat().st_size
        except OSError:
            found = "no such file"
        if found != file.bytes:
            raise SamloveError(f"{folder / file.path}: expected {file.bytes} bytes, found {found}; {remedy}")


def listed_files(folder: AnyPath, manifest: Mapping[str, Any], remedy: str) -> Iterator[File]:
    """All files that an artefact lists, except its manifest. Raises SamloveError if the list is damaged."""
    beside = _beside(folder, manifest, remedy)
    yield from beside
    if any(file.path == FILES for file in beside) or (not manifest and (folder / FILES).is_file()):
        table = Table(folder / FILES, COLUMNS, remedy)
        sizes, checksums = table.numbers("bytes"), table.numbers("crc32c")
        for row, path in enumerate(table.texts("path")):
            yield File(path, int(sizes[row]), f"{checksums[row]:08x}")


def _beside(folder: AnyPath, manifest: Mapping[str, Any], remedy: str) -> list[File]:
    """The files in the manifest's list."""
    try:
        return [File(str(path), entry["bytes"], entry["crc32c"]) for path, entry in manifest.get("files", {}).items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise SamloveError(f"{folder / NAME}: damaged list of files ({error!r}); {remedy}") from None
