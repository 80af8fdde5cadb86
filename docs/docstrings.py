"""Docstrings as the site reads them: formulas become fences of Markdown, and "See DN2" what DN2 says."""

import re
import textwrap
from typing import Any

import griffe

from panda_lightning.command.parser import explained

FORMULA = re.compile(r"^( *)\.\. math:: *(.*\n(?:(?:\1 +.*)?\n)*)", re.MULTILINE)
ARGUMENT = re.compile(r"^( +)(\w+): (See .*(?:\n\1 +.*)*)", re.MULTILINE)


class Readable(griffe.Extension):  # type: ignore[misc]  # griffe is not there for mypy
    """Writes docstrings for readers of one page."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            text = ARGUMENT.sub(_explained, obj.docstring.value)
            obj.docstring.value = FORMULA.sub(_fence, text + "\n").rstrip()


def _explained(found: re.Match[str]) -> str:
    told = explained(found[2], " ".join(found[3].split()))
    return f"{found[1]}{found[2]}: {' '.join(told.split())}"


def _fence(found: re.Match[str]) -> str:
    lines = textwrap.dedent(found[2]).strip()
    return textwrap.indent(f"\n```math\n{lines}\n```\n\n", found[1])
