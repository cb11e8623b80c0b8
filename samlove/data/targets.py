"""Ground-truth masks in the form in which predictions are scored: decoded once, for all expressions and all runs.

    SCRATCH/ID.bits   8 hex digits: crc32c of the rest; then, for each object, its masks with one bit per pixel
    SCRATCH/lock      held while a file is written

Decoding and resizing an object's masks takes far longer than scoring an expression, and an object has several
expressions. ID stands for all that determines the bits. A damaged file is written again. Deleting the folder is safe
and costs only time.
"""

import fcntl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import google_crc32c
import numpy as np
import pandas as pd
from tqdm import tqdm

from samlove.data.dataset import RefAvsFolder
from samlove.data.digest import code_digest
from samlove.errors import NO_LOCKS
from stores.fingerprint import fingerprint_id
from stores.manifest import crc32c_file

CHECKSUM = 8  # bytes at the start of a file
LOCK = "lock"


class Targets:
    """The ground-truth masks of the objects of some rows, from a file in `scratch`.

    rows: of expressions.parquet; null expressions have no masks. digest: of all ground-truth masks
    (Layout.mask_digest). scratch: a folder for these files only. The first `load_masks` opens the file or, if it is
    missing or damaged, decodes all objects and writes it; files made from other masks are then removed. Several
    processes can use one folder: one of them writes, the others wait for it.
    """

    def __init__(self, folder: RefAvsFolder, rows: pd.DataFrame, digest: str, scratch: Path) -> None:
        named = rows[~rows["null"].astype(bool)]
        objects = sorted(set(zip(named["media_id"], named["fid"].astype(int), strict=True)))
        self._numbers = {of_video: number for number, of_video in enumerate(objects)}
        self._folder, self._digest, self._scratch = folder, digest, scratch
        self._opened: dict[tuple[int, int], np.ndarray] = {}

    def load_masks(self, media_id: str, fid: int, frames: int, size: int) -> np.ndarray:
        """What `RefAvsFolder.load_masks` returns: bool (frames, size, size).

        Raises KeyError if no row has the object, SamloveError with the path of a mask of any object that is missing or
        cannot be read, OSError if the file cannot be written.
        """
        number = self._numbers[media_id, fid]
        self.prepare(frames, size)
        bits = np.unpackbits(self._opened[frames, size][number], count=frames * size * size)
        return bits.view(bool).reshape(frames, size, size)

    def prepare(self, frames: int, size: int) -> None:
        """Open the file, or decode all objects and write it; raises as `load_masks`."""
        if self._numbers and (frames, size) not in self._opened:
            self._opened[frames, size] = self._open(frames, size)

    def _open(self, frames: int, size: int) -> np.ndarray:
        """The bits of all objects, uint8 (objects, bytes per object), as a memory-mapped file."""
        path = self._scratch / f"{self._id(frames, size)}.bits"
        shape = (len(self._numbers), -(-frames * size * size // 8))
        found = _opened(path, shape)
        if found is None:
            self._scratch.mkdir(parents=True, exist_ok=True)
            with _alone(self._scratch / LOCK) as alone:
                found = _opened(path, shape)  # another process may have written it meanwhile
                if found is None:
                    if alone:
                        _remove_all(self._scratch)
                    self._write(path, frames, size)
                    found = _opened(path, shape)
        assert found is not None, path
        return found

    def _id(self, frames: int, size: int) -> str:
        """12 hex digits that change with the masks, what is read of them, and the code that reads them."""
        lengths = {media_id: self._folder.frame_count(media_id) for media_id, _ in self._numbers}
        objects = [[media_id, fid, min(lengths[media_id], frames)] for media_id, fid in self._numbers]
        code = code_digest(RefAvsFolder)
        return fingerprint_id({"masks": self._digest, "frames": frames, "size": size, "objects": objects, "code": code})

    def _write(self, path: Path, frames: int, size: int) -> None:
        def bits(of_video: tuple[str, int]) -> bytes:
            return np.packbits(self._folder.load_masks(*of_video, frames, size)).tobytes()

        partial = path.with_name(f"{path.stem}.{uuid4().hex}.partial")
        try:
            with open(partial, "wb") as file, ThreadPoolExecutor() as pool:  # decoding releases the GIL
                file.write(bytes(CHECKSUM))
                crc, parts = 0, pool.map(bits, self._numbers)
                for part in tqdm(parts, desc="decode masks", total=len(self._numbers), unit="object", mininterval=2):
                    crc = google_crc32c.extend(crc, part)
                    file.write(part)
                file.seek(0)
                file.write(f"{crc:08x}".encode())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _opened(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The bits in a file; None if it is missing or damaged."""
    try:
        if path.stat().st_size != CHECKSUM + shape[0] * shape[1]:
            return None
        with open(path, "rb") as file:
            checksum = file.read(CHECKSUM)
        if checksum != crc32c_file(path, CHECKSUM).encode():
            return None
        return np.memmap(path, np.uint8, "r", CHECKSUM, shape)
    except FileNotFoundError:
        return None


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Wait until no other process holds the lock. Yields False if the file system has no locks."""
    with open(lock, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            alone = False  # several processes may write the same file, each under its own name; the last rename counts
        yield alone


def _remove_all(folder: Path) -> None:
    """Remove the files that were made from other masks, are damaged, or were left by a killed run."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink(missing_ok=True)
