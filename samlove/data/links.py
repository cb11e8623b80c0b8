"""Finds what DVC cannot watch below a folder: links to folders, above all, in which it would notice no change."""

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

IGNORED = (".git", ".hg")  # as DVC does


def unwatched(folder: Path) -> Iterator[str]:
    """One message, "what; remedy", for everything below `folder` that DVC passes over or fails at.

    DVC passes over a link to a folder, and over a folder that is a DVC repository. It fails at dangling links, names
    that are not UTF-8, folders that may not be read, .dvcignore files and sockets, and waits forever for a pipe.
    It follows links to files, and `folder` itself may be a link. A missing folder gives nothing.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        chmod = f"run: chmod -R a+rX {shlex.quote(str(folder))}"
        remedy = chmod if isinstance(error, PermissionError) else "replace it with a folder"
        yield f"{folder}: folder cannot be read: {error.strerror}; {remedy}"
        return
    for entry in entries:
        path = Path(entry.path)
        if not _is_utf8(entry.name):
            shown = os.fsencode(path).decode(errors="backslashreplace")
            yield f"{shown}: name is not UTF-8, which DVC requires; rename it"
        elif entry.name == ".dvc" and entry.is_dir():
            yield (
                f"{folder}: folder is a DVC repository of its own, which DVC does not watch from outside; use links to "
                f"its files instead: mkdir NEW && cp -rLs {shlex.quote(os.path.realpath(folder))}/* NEW"
            )
        elif entry.name == ".dvcignore":
            yield f"{path}: DVC accepts no such file in a dataset; remove it"
        elif entry.is_symlink():
            yield from link_problem(path)
        elif entry.is_dir():
            if entry.name not in IGNORED:
                yield from unwatched(path)
        elif not entry.is_file():
            yield f"{path}: neither a file nor a folder; remove it"


def link_problem(link: Path) -> Iterator[str]:
    """One message, as `unwatched` gives, for a link to anything but a file; none for a link to a file."""
    target = os.readlink(link)
    try:
        mode = link.stat().st_mode
    except FileNotFoundError:
        yield f"{link}: link to {target}, which does not exist; remove the link, or bring its target back"
    except OSError as error:
        yield f"{link}: link to {target}, which cannot be followed: {error.strerror}; replace it with the file"
    else:
        if stat.S_ISDIR(mode):
            yield f"{link}: link to a folder, {target}, in which DVC would notice no change; {_remedy(link)}"
        elif not stat.S_ISREG(mode):
            yield f"{link}: link to {target}, which is neither a file nor a folder; remove it"


def _remedy(link: Path) -> str:
    place, target = (os.path.realpath(path) for path in (link.parent, link))
    if os.path.commonpath([place, target]) == target:
        return "remove it: it leads back to a folder above"
    old, new = shlex.quote(target), shlex.quote(str(link))
    return f"put the folder in its place, or links to its files: rm {new} && cp -rLs {old} {new}"


def _is_utf8(name: str) -> bool:
    try:
        os.fsencode(name).decode()  # its bytes, whatever the locale
    except UnicodeDecodeError:
        return False
    return True
