"""The pages: links lead somewhere, every command on them exists with its options, and their examples run."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dvc.cli import parse_args

from samlove.cli.main import app
from samlove.data.index import audit_folder

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NAV = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
OPERATORS = ("&&", ";", "|", "||", "&")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def outside_code(text: str) -> str:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$|`[^`\n]*`", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    titles = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


# --- links -----------------------------------------------------------------------------------------------------------


@by_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(text_of(page))):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page if not path else (page.parent / path).resolve()
            assert target.is_file(), f"{link}: no such file"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"
            assert page.parent != DOCS or target.parent == DOCS, f"{link}: not on the site"


def test_the_site_and_the_readme_have_every_page() -> None:
    pages = {page.name for page in DOCS.glob("*.md")}
    assert sorted(NAV) == sorted(pages)
    assert {f"docs/{name}" for name in pages} <= set(re.findall(r"\]\((docs/\w+\.md)\)", text_of(ROOT / "README.md")))


# --- commands --------------------------------------------------------------------------------------------------------


def code_lines(page: Path) -> Iterator[str]:
    """The lines of a page's blocks of code, except Python's."""
    language, inside = "", False
    for line in text_of(page).splitlines():
        if line.startswith("```"):
            language, inside = line[3:], not inside
        elif inside and language in ("", "bash", "sh", "shell", "console"):
            yield line
        elif not inside and line.startswith("    "):
            yield line.strip()


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's blocks of code, without comments and assignments of variables."""
    for line in code_lines(page):
        if not re.search(r"\b(samlove|dvc|make|python|pytest)\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word in OPERATORS:
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def all_commands(program: str) -> list[Any]:
    found = {(page.stem, *words[1:]) for page in PAGES for words in commands(page) if words[0] == program}
    return [pytest.param(list(words), id=" ".join([page, *words])) for page, *words in sorted(found)]


@pytest.mark.parametrize("words", all_commands("samlove"))
def test_samlove_command_is_valid(words: list[str]) -> None:
    if words[0] == "COMMAND" or words == ["--help"]:
        return
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("samlove", words)


@by_page
def test_commands_in_sentences_exist(page: Path) -> None:
    known: Any = typer.main.get_command(app)
    for name, part in re.findall(r"`samlove ([a-z]+)(?: ([a-z]+))?", text_of(page)):
        assert name in known.commands
        assert not part or part in getattr(known.commands[name], "commands", [part])


@pytest.mark.parametrize("words", all_commands("dvc"))
def test_dvc_command_is_valid(words: list[str]) -> None:
    parse_args(words)


@pytest.mark.parametrize("words", all_commands("make"))
def test_make_target_exists(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", all_commands("python"))
def test_python_module_exists(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1]), f"{words[1]}: no such module"


# --- single pages ----------------------------------------------------------------------------------------------------


def test_the_dataset_of_the_page_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```$", text_of(DOCS / "dataset.md"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "docs/dataset.md", "exec"), {})
    audit = audit_folder(tmp_path / "mine")
    assert not audit.faults
    assert set(audit.expressions["split"]) == {"train", "val", "test_s", "test_u", "test_n"}
    assert set(audit.expressions.loc[audit.expressions["null"], "split"]) == {"test_n"}


@pytest.mark.parametrize(("column", "profile"), [(2, "refavs"), (3, "micro")])
def test_the_sizes_of_the_method_are_those_of_the_profiles(column: int, profile: str) -> None:
    settings: dict[str, Any] = {}
    for path in (ROOT / "configs" / profile).glob("*.yaml"):
        if path.stem != "ablations":
            settings |= yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = re.findall(r"^\| \w+ \| [^|]*\(`(\w+)`\) \| (\d+) \| (\d+) \|$", text_of(DOCS / "method.md"), re.MULTILINE)
    shown = {row[0]: int(row[column - 1]) for row in rows if row[0] in settings}
    assert len(shown) >= 6 and shown == {name: settings[name] for name in shown}
