"""What a user sees when a command fails: one line and an exit status."""

from pathlib import Path

import pytest

from samlove.errors import RequestError, SamloveError, one_line_errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main() -> None:
        Path("/dev/full").write_text("too much")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip() == (
        "error: [Errno 28] No space left on device; free some space and run the same command again"
    )


@pytest.mark.parametrize(("kind", "status"), [(SamloveError, 1), (RequestError, 2)])
def test_each_kind_of_error_has_its_exit_status(
    kind: type[SamloveError], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @one_line_errors
    def main() -> None:
        raise kind("expected this, found that")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert capsys.readouterr().err == "error: expected this, found that\n"


def test_a_bug_keeps_its_traceback() -> None:
    @one_line_errors
    def main() -> None:
        open("no/such/file")

    with pytest.raises(FileNotFoundError):
        main()
