"""The errors that a user sees as one clear line, and the wrapper that prints them."""

import errno
import functools
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file size limit exceeded


class SamloveError(Exception):
    """The work failed: the message says what was expected, what was found, where, and how to fix it."""

    exit_status = 1


class RequestError(SamloveError):
    """The request was wrong: a bad argument, a bad setting, a missing input."""

    exit_status = 2


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` end with one line on stderr: exit status 1 or 2 for a SamloveError, 1 for a full disk or Ctrl-C."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except SamloveError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_status)
        except OSError as error:
            if error.errno not in FULL:
                raise
            print(f"error: {error}; free some space and run the same command again", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("stopped; run the same command again to resume (some stages start over)", file=sys.stderr)
            sys.exit(1)

    return wrapped
