"""One line that stands for the content of a folder.

The index stage writes one for the data set's media and one for its masks, and later stages depend on these lines:
DVC then walks the folder, a hundred thousand files in Ref-AVS, for one stage and not for a dozen.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def folder_digest(folder: Path) -> str:
    """SHA-256, as hex, over the relative paths and the contents of all files below `folder`, in order of path.

    A folder that is not there has the digest of an empty one; `folder` itself may be a link.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing and reading leave other threads their turn
        for path, content in zip(paths, pool.map(_file_digest, paths), strict=True):
            whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
