"""Build the site in docs/site: python docs/build.py. Every warning is an error; nothing is fetched.

The page of results is written from experiments/RESULTS.md. Links that leave the site are listed in external_links.txt,
since no test can follow them offline.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = DOCS / "pages"
EXPERIMENTS = DOCS.parent / "experiments"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def results() -> str:
    """RESULTS.md as a page: its pictures are copied, and files that are not on the site are named."""

    def moved(found: re.Match[str]) -> str:
        picture, text, target, _ = found.groups()
        if "://" in target:
            return found[0]
        path = EXPERIMENTS / target
        if picture:
            (PAGES / "assets/results").mkdir(exist_ok=True)
            shutil.copyfile(path, PAGES / "assets/results" / path.name)
            return f"![{text}](assets/results/{path.name})"
        name = path.resolve().relative_to(DOCS.parent)
        return f"`{name}`" if text.strip("`") == path.name else f"{text} (`{name}`)"

    return LINK.sub(moved, (EXPERIMENTS / "RESULTS.md").read_text("utf-8"))


def external_links() -> list[str]:
    """Addresses of other sites that pages name."""
    text = "\n".join(path.read_text("utf-8") for path in PAGES.rglob("*.md"))
    return sorted(set(re.findall(r"https?://[\w-]+\.[^\s)>\]\"'`]+", text)))


def main() -> int:
    """Build, and say where the site is."""
    (PAGES / "results.md").write_text(results(), "utf-8")
    searched = os.pathsep.join([str(DOCS), os.environ.get("PYTHONPATH", "")])
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=DOCS,
        env={**os.environ, "PYTHONPATH": searched},
    )
    if built.returncode:
        return built.returncode
    links = external_links()
    (DOCS / "site/external_links.txt").write_text("\n".join(links) + "\n", "utf-8")
    print(f"{len(links)} links to other sites are in docs/site/external_links.txt")
    print("Read the site, with its search: python -m http.server --directory docs/site")
    return 0


if __name__ == "__main__":
    sys.exit(main())
