"""Formulas of the site as MathML, which browsers show without a script: fences, and $`...`$ within a sentence."""

from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


def block(source: str, *args: Any, **kwargs: Any) -> str:
    """A fence of LaTeX."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'


class Inline(InlineProcessor):
    """LaTeX within a sentence."""

    def handleMatch(self, m: Any, data: str) -> tuple[Any, int, int]:  # noqa: N802  # Python-Markdown's name
        """Its MathML, and where it stands."""
        return self.md.htmlStash.store(convert(m.group(1).strip())), m.start(0), m.end(0)


class Formulas(Extension):
    """For ``markdown_extensions``."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Look for formulas before code."""
        md.inlinePatterns.register(Inline(r"\$`([^`]+)`\$", md), "formula", 200)


def makeExtension(**kwargs: Any) -> Extension:  # noqa: N802
    """As Python-Markdown calls it."""
    return Formulas(**kwargs)
