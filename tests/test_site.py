"""The site is built without a warning, and links lead somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    lines = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_first_pages_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
            assert not anchor or anchor in headings(ROOT / target), f"{target}#{anchor}"


def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    """Zensical reports pages, anchors and names that do not exist; --strict makes errors of them."""
    skip = shutil.ignore_patterns("site", ".cache", "__pycache__", "runs", "rows", "hardest", "locks")
    for name in ("docs", "experiments", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    build = [sys.executable, tmp_path / "docs/build.py"]
    done = subprocess.run(build, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "docs/site").rglob("*.html"))
    assert len(pages) == len(list((tmp_path / "docs/pages").rglob("*.md"))) + 1  # and 404.html
    for page in pages:
        fetched = re.findall(
            r'(?:src|srcset)="(https?:[^"]+)"|<link[^>]+href="(https?:[^"]+)"', page.read_text("utf-8")
        )
        assert not fetched, page.name
    reference = (tmp_path / "docs/site/reference/python.html").read_text("utf-8")
    assert "<math" in reference
    assert ".. math" not in reference
    assert not re.search(r"See (DN2|PANDA|Estimator)\b", reference)
