"""Hooks of mkdocs.yml: equations become MathML, which needs no scripts; reference.md gets the names of api.md."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = '<div style="overflow: auto hidden; padding: 0.3em 0">{}</div>'  # wide equations scroll on a narrow page
SECTION_OR_NAME = re.compile(r"^### (.+)$|^\| `((?:samlove|stores)(?:\.\w+)*\.[A-Za-z]\w*)` \|", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **build: Any) -> str:
    if page.file.src_uri == "reference.md":
        markdown += signatures(Path(__file__).with_name("api.md").read_text(encoding="utf-8"))
    return EQUATION.sub(lambda found: BLOCK.format(convert(found[1].strip(), display="block")), markdown)


def signatures(api: str) -> str:
    """The names in the tables of api.md's part "Python", by section, each for mkdocstrings to describe."""
    python = api.partition("\n## Python\n")[2].partition("\n## ")[0]
    return "\n".join(f"\n::: {name}" if name else f"\n## {title}" for title, name in SECTION_OR_NAME.findall(python))
