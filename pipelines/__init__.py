"""What all stages have in common."""

import functools
from collections.abc import Callable, Sequence

from samlove.data.layout import layout
from samlove.environment import check_code, check_repository, check_user
from samlove.errors import RESUMES, RequestError, one_line_errors

REHASH = "--rehash"


def stage(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` the entry point of a stage.

    Errors are one line, surroundings in which DVC would fail are refused at once, and the results of other profiles are
    kept.
    """

    @functools.wraps(main)
    def wrapped(*arguments: str) -> None:
        check_code()
        check_user()
        layout().check_folders()
        keep_other_profiles()
        main(*arguments)

    return one_line_errors(wrapped, RESUMES)


def wants_rehash(arguments: Sequence[str]) -> bool:
    """Whether a stage is to hash every file again. Raises RequestError if there is any argument but --rehash."""
    if unknown := [argument for argument in arguments if argument != REHASH]:
        raise RequestError(f"expected no argument but {REHASH}, found {' '.join(unknown)}")
    return bool(arguments)


def keep_other_profiles() -> None:
    """Make DVC forget which outputs it has linked so far.

    `dvc exp run`, and `dvc pull` and `dvc checkout` without targets, delete every output that DVC has linked and that
    is not in the graph. Only the active profile is in the graph, so they would delete the results of all others.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            repo.state.links.clear()
    except NotDvcRepoError:  # the stage runs by hand elsewhere
        pass
    except DvcException:
        check_repository()
        raise
