"""The errors that a user sees as one clear line, and the wrapper that prints them."""

import errno
import functools
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file size limit exceeded
OPEN_FILES = (errno.EMFILE, errno.ENFILE)  # too many open files: of this process, of the machine
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # the file system has no file locks
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
STOPPED = "stopped; run the same command again"
RESUMES = f"{STOPPED} to resume (some stages start over)"
UTF8 = "run: export PYTHONUTF8=1, and the same command again"


class SamloveError(Exception):
    """The work failed: the message says what was expected, what was found, where, and how to fix it."""

    exit_status = 1


class RequestError(SamloveError):
    """The request was wrong: a bad argument, a bad setting, a missing input."""

    exit_status = 2


def one_line_errors(main: Callable[..., None], stopped: str = STOPPED) -> Callable[..., None]:
    """Make `main` end with one line on stderr: exit status 1 or 2 for a SamloveError, 1 for an OSError or Ctrl-C.

    SIGTERM is the same as Ctrl-C, so that whatever cleans up after one also does after the other.
    stopped: the line for both.
    Printing never fails: a character that is missing in the locale's encoding is printed as an escape sequence.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _terminated_as_by_ctrl_c():
                main(*args, **kwargs)
            print(end="", flush=True)  # what is still in the buffer may not fit on the disk
        except SamloveError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            sys.exit(error.exit_status)
        except OSError as error:
            if not _reader_gone(error):
                print(f"error: {printable(os_error_line(error))}", file=sys.stderr)
            _drop_unwritable_output()
            sys.exit(1)
        except UnicodeEncodeError as error:  # printing raises none, so it is the name of a file
            if sys.getfilesystemencoding() == "utf-8":
                raise
            name = error.object.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            print(f"error: {name}: not a file name in this locale ({error.encoding}); {UTF8}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
            sys.exit(1)

    return wrapped


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too, unless that is ignored or handled already."""
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def printable(text: str) -> str:
    """A text as one line, with escape sequences in place of control characters, which could change the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def path_text(path: Path | str) -> str:
    """A path as text that UTF-8 can encode: a name that is no UTF-8 gets replacement characters."""
    return os.fsencode(path).decode("utf-8", "replace")


def _reader_gone(error: OSError) -> bool:
    """Whether the program that reads our output has ended, as `head` does; nobody wants the rest."""
    if not isinstance(error, BrokenPipeError) or sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # 0: report only that the other end is closed
    return bool(poll.poll(0))


def _drop_unwritable_output() -> None:
    """Drop what stdout still holds if it cannot be written: Python would try and fail once more when it exits."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def os_error_line(error: OSError) -> str:
    """An OSError as one line: the path, what the system says and, where it is known, what to do."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    line = ": ".join([" -> ".join(paths), reason]) if paths else reason
    if error.errno in FULL:
        return f"{line}; free some space and run the same command again"
    if error.errno in OPEN_FILES:
        return f"{line}; raise the limit, for example with: ulimit -n 4096"
    return line


def absence(path: Path) -> str:
    """What is at `path` instead of what was expected, such as "no such file", "a folder" or "permission denied".

    Names the link if the path is, or leads through, one whose target does not exist.
    """
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            return f"{'' if part == path else f'{part} is a '}link to {os.readlink(part)}, {_dead_end(part)}"
    try:
        path.stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null character
        return str(getattr(error, "strerror", error)).lower()
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "a device, pipe or socket"


def _dead_end(link: Path) -> str:
    try:
        link.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "which leads back to it"
        if error.errno == errno.EACCES:
            return "which may not be read"
    return "which does not exist"
