"""Docstrings as the site reads them: their formulas become fences of Markdown."""

import re
import textwrap
from typing import Any

import griffe

FORMULA = re.compile(r"^( *)\.\. math:: *(.*\n(?:(?:\1 +.*)?\n)*)", re.MULTILINE)


class FormulaFences(griffe.Extension):  # type: ignore[misc]  # griffe is not there for mypy
    """Writes ``.. math::`` blocks as fences."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = FORMULA.sub(_fence, obj.docstring.value + "\n").rstrip()


def _fence(found: re.Match[str]) -> str:
    lines = textwrap.dedent(found[2]).strip()
    return textwrap.indent(f"\n```math\n{lines}\n```\n\n", found[1])
