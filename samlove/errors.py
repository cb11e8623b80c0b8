"""The errors that reach a user as one clear line, and the wrapper that prints them so."""

import errno
import functools
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, one's share of it, or the largest file allowed


class SamloveError(Exception):
    """The work failed: the message says what was expected, what was found, where, and what to do."""

    exit_status = 1


class RequestError(SamloveError):
    """The request was wrong: a bad argument, a bad configuration value, a missing input."""

    exit_status = 2


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Let `main` end with one line on stderr and exit status 1 or 2 on a SamloveError, or 1 on a full disk."""

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
            print("stopped; the same command takes the work up again", file=sys.stderr)
            sys.exit(1)

    return wrapped
