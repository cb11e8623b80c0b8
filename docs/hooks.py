"""Hooks of mkdocs.yml: equations become MathML, which browsers show without scripts."""

import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = '<div style="overflow-x: auto">{}</div>'  # wide equations scroll on a narrow page


def on_page_markdown(markdown: str, **page: Any) -> str:
    return EQUATION.sub(lambda found: BLOCK.format(convert(found[1].strip(), display="block")), markdown)
