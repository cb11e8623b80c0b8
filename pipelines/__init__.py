"""What all stages have in common."""

import functools
from collections.abc import Callable

from samlove.errors import one_line_errors


def stage(main: Callable[[], None]) -> Callable[[], None]:
    """Make `main` the entry point of a stage: errors are one line, and the results of other profiles are kept."""

    @functools.wraps(main)
    def wrapped() -> None:
        keep_other_profiles()
        main()

    return one_line_errors(wrapped)


def keep_other_profiles() -> None:
    """Make DVC forget which outputs it has linked so far.

    `dvc exp run`, and `dvc pull` and `dvc checkout` without targets, delete every output that DVC has linked and that
    is not in the graph. Only the active profile is in the graph, so they would delete the results of all others.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            repo.state.links.clear()
    except NotDvcRepoError:  # the stage runs by hand elsewhere
        pass
