"""The version stands in setup.cfg alone; whatever else names it agrees."""

import configparser
import re
from importlib.metadata import version
from pathlib import Path

import yaml

from panda_lightning.command.parser import VERSION

ROOT = Path(__file__).parents[1]
NUMBER = r"(\d+\.\d+\.\d+(?:\.?(?:a|b|rc|dev|post)\d+)?)"
TOLD = re.compile(rf"{NUMBER} \(panda-lightning\)|panda[-_]lightning(?:==|[ -]){NUMBER}")  # of --version, pip, a wheel


def own() -> str:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["metadata"]["version"]


def test_what_is_installed_and_what_commands_say_is_the_version():
    assert version("panda-lightning") == own(), "install the package again: make install"
    assert VERSION.split() == [own(), "(panda-lightning)"]


def test_the_changelog_has_unreleased_first_and_then_the_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2] == ["Unreleased", own()]


def test_the_citation_names_no_other_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8")).get("version", own()) == own()


def test_pages_and_forms_name_no_other_version():
    """Recorded results keep the version that made them."""
    pages = [p for p in (ROOT / "docs/pages").rglob("*.md") if p.name != "results.md"]
    found = {}
    for path in [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.*"), *pages]:
        told = {one or other for one, other in TOLD.findall(path.read_text("utf-8"))}
        if path.suffix in (".md", ".yml") and told - {own()}:
            found[path.relative_to(ROOT).as_posix()] = told
    assert not found


def test_the_sources_hold_no_version():
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"__version__ *=|" + re.escape(f'"{own()}"'), path.read_text("utf-8")), path


def test_a_version_is_seen():
    for text in ("0.2.0 (panda-lightning)", "panda-lightning==0.2.0", "panda-lightning 0.2.0", "panda_lightning-0.2.0"):
        assert TOLD.search(text), text
