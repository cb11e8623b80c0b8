"""What a user sees when a command fails: one line and an exit status."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from samlove.errors import RequestError, SamloveError, absence, one_line_errors
from tests.plain_user import ROOT, run_as_plain_user


def failure(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit status and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        one_line_errors(main)()  # type: ignore[arg-type]
    return ended.value.code, capsys.readouterr().err


def program(body: str) -> str:
    """A program whose main is `body`."""
    return (
        f"import resource\nfrom samlove.errors import one_line_errors\n@one_line_errors\ndef main():\n {body}\nmain()"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, line = failure(lambda: Path("/dev/full").write_text("too much"), capsys)
    assert status == 1
    assert line == "error: No space left on device; free some space and run the same command again\n"
    with open("/dev/full", "w") as full:  # the output itself does not fit
        done = subprocess.run(
            [sys.executable, "-c", program("print('x')")], cwd=ROOT, stdout=full, stderr=-1, text=True
        )
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.parametrize(("kind", "status"), [(SamloveError, 1), (RequestError, 2)])
def test_each_kind_of_error_has_its_exit_status(
    kind: type[SamloveError], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise kind("expected this, found that")

    assert failure(main, capsys) == (status, "error: expected this, found that\n")


def test_names_from_a_file_cannot_break_the_line_or_change_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise SamloveError("key 'a\nb\x1b[31m\u2028\x9d東京': damaged")

    assert failure(main, capsys) == (1, "error: key 'a\\nb\\x1b[31m\\u2028\\x9d東京': damaged\n")


@pytest.mark.parametrize(
    ("name", "act", "reason"),
    [
        ("gone", Path.read_text, "No such file or directory"),
        ("folder", Path.read_text, "Is a directory"),
        ("file", Path.mkdir, "File exists"),
        ("file/below", Path.mkdir, "Not a directory"),
        ("loop", Path.read_text, "Too many levels of symbolic links"),
        ("x" * 300, Path.mkdir, "File name too long"),
        ("folder", Path.rmdir, "Directory not empty"),
    ],
)
def test_an_error_of_the_system_is_one_line_that_names_the_path(
    name: str, act: Callable[[Path], object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder" / "content").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    assert failure(lambda: act(path), capsys) == (1, f"error: {path}: {reason}\n")


def test_an_error_of_two_paths_names_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert failure(lambda: old.rename(new), capsys) == (1, f"error: {old} -> {new}: No such file or directory\n")


def test_too_many_open_files_and_a_forbidden_one_are_one_line(tmp_path: Path) -> None:
    many = program(
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n" + f" files = [open({str(tmp_path)!r} + '/x', 'w')]\n"
        " while True: files.append(open(files[0].name))"
    )
    done = run_as_plain_user("-c", many)
    assert done.returncode == 1
    assert (
        done.stderr == f"error: {tmp_path}/x: Too many open files; raise the limit, for example with: ulimit -n 4096\n"
    )
    (tmp_path / "x").chmod(0)
    done = run_as_plain_user("-c", program(f"open({str(tmp_path / 'x')!r})"))
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path}/x: Permission denied\n")


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    body = "os.kill(os.getpid(), signal.SIGTERM)\n  time.sleep(9)"
    main = program(f"try:\n  {body}\n finally:\n  print('cleaned up')").replace(
        "import resource", "import os, signal, time"
    )
    done = subprocess.run([sys.executable, "-c", main], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "cleaned up\n", "stopped; run the same command again\n")


def test_a_bug_keeps_its_traceback() -> None:
    @one_line_errors
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main()


def test_the_end_of_the_reader_ends_the_command_without_a_word() -> None:
    printing = subprocess.Popen(
        [sys.executable, "-c", program("while True: print('x' * 1000)")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert printing.stdout is not None and printing.stderr is not None
    assert printing.stdout.readline() == b"x" * 1000 + b"\n"
    printing.stdout.close()
    assert printing.stderr.read() == b""
    assert printing.wait() == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gone", "no such file"),
        ("folder", "a folder"),
        ("file", "a file"),
        ("file/below", "not a directory"),
        ("dangling", "link to nowhere, which does not exist"),
        ("loop", "link to loop, which leads back to it"),
        ("chain", "link to dangling, which does not exist"),
        ("x" * 300, "file name too long"),
    ],
)
def test_absence_says_what_is_there_instead(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for link, target in (("dangling", "nowhere"), ("loop", "loop"), ("chain", "dangling")):
        (tmp_path / link).symlink_to(target)
    assert absence(tmp_path / name) == found
    if found.startswith("link"):
        assert absence(tmp_path / name / "below") == f"{tmp_path / name} is a {found}"
