"""docs/api.md: every name on the page exists, and its examples run."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import typer

import stores
from samlove.cli.main import app

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^\| `((?:samlove|stores)\.[\w.]+)` \|", PAGE, re.MULTILINE)
COMMANDS = re.findall(r"^\| `samlove ([\w ]+)` \|", PAGE, re.MULTILINE)
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_name_is_importable_from_where_the_page_says(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_page_lists_every_public_name_of_stores() -> None:
    assert {f"stores.{name}" for name in stores.__all__} <= set(NAMES)


def test_metrics_are_the_same_under_both_names() -> None:
    for name in ("jaccard", "f_score", "null_score"):
        assert getattr(import_module("samlove.metrics"), name) is getattr(
            import_module("samlove.scoring.metrics"), name
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    found = typer.main.get_command(app)
    for part in command.split():
        found = found.commands[part]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/api.md", "exec"), {})
