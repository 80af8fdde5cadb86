"""Every command and every block of Python in README, the site and configuration files runs, in a small form.

A page's blocks run in order in a folder that holds what readers have: ``conf``; ``data`` with their own ``bottles`` and
the published data sets; ``photos`` and ``outliers``.
"""

import doctest
import functools
import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl

from panda_lightning import tools
from panda_lightning.cli import main
from tests.conftest import make_clouds, picture, small_network
from tests.datamodules import official

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs/pages").rglob("*.md") if p.name != "results.md")]
HEADERS = sorted([*ROOT.glob("conf/*.yaml"), *ROOT.glob("conf/variants/*.yaml")])
SOURCES = sorted(ROOT.glob("src/**/*.py"))
BLOCK = re.compile(r"^( *)```(bash|python|yaml)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

PAGES = [path for path in TEXTS if BLOCK.search(path.read_text("utf-8"))]

# ---- What makes a command small ----
ELSEWHERE = ("pip", "make", "wandb", "sbatch", "python")  # see `exists`
DROPPED = ("--trainer.devices", "--trainer.num_nodes", "--trainer.strategy", "--trainer.accelerator")
ALWAYS = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SCRATCH = ("deep_svdd", "mhrot", "ocsvm", "pretrain_tiny")  # no backbone to name
SIZES = {"deep_svdd": "32", "mhrot": "32", "ocsvm": "32"}  # by variant; 64 elsewhere
METHODS = {
    "mhrot": ["--model.depth=10", "--model.width=1"],
    "oe": ["--data.outliers=outliers"],
    "spade": ["--model.k=2"],
}
SETS = {
    "pretrain_tiny": ["--model.teacher=panda_tiny", "--model.teacher_size=32", "--data.batch_size=8"],
    "dior": ["--data.min_side=20", "--data.min_count=2"],
    "hyper_kvasir": ["--data.test_normals=4"],
}
NETWORK = re.compile(r"\b(resnet|wide_resnet|mobilenet|efficientnet|tf_efficientnet|convnext|timm/)[\w./-]*")
TRANSFORMER = re.compile(r"\b(vit|deit|hf-hub:timm/vit)[\w./:-]*")
TOOLS = {  # further words of `panda`
    "table": ["--classes=3", "--words=--data.train_limit=9 --data.test_limit=30 --trainer.max_epochs=1"],  # of digits
    "fisher": ["--samples=8", "--image_size=32"],
}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What readers have in their folder."""
    root = tmp_path_factory.mktemp("house")
    official.make_everything(root / "data")
    shutil.copytree(ROOT / "conf", root / "conf")
    official.make_mvtec(root / "data", "bottles", train=100, test=8)
    official.make_mvtec(root / "data", "leather")
    make_clouds(root / "outliers", 12)
    make_pictures(root / "photos", "spot", range(500, 504))
    make_pictures(root / "photos", "stripe", range(600, 603))
    small_network(root / "vit", "vit")
    for part in ("train", "val"):
        for kind, start in (("spot", 0), ("stripe", 50)):
            make_pictures(root / f"data/tiny-imagenet-200/{part}/{kind}", kind, range(start, start + 8))
    shutil.copy(ROOT / "src/panda_lightning/weights/panda_tiny/fisher.safetensors", root / "fisher.safetensors")
    for name in ("examples", "experiments", "Makefile", "setup.cfg"):
        (root / name).symlink_to(ROOT / name)
    return root


def make_pictures(folder: Path, kind: str, numbers: range) -> None:
    """Write small pictures of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(kind, number).save(folder / f"{number}.png")


@pytest.fixture
def place(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A folder of one's own with all of it; W&B, which is started for each run, works where it is written about."""
    if "wandb" not in request.node.name:
        monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.copytree(house, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.syspath_prepend(str(tmp_path / "place"))
    monkeypatch.setattr(pl.Trainer, "__init__", _few_epochs(pl.Trainer.__init__))
    yield tmp_path / "place"
    for name, module in list(sys.modules.items()):  # the next page's file may have the same name
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    import wandb

    if wandb.run is not None:
        wandb.finish()


def _few_epochs(start: Any) -> Any:
    @functools.wraps(start)  # jsonargparse reads its arguments
    def init(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"max_epochs": min(kwargs.get("max_epochs") or 1, 2), "enable_progress_bar": False}
        kwargs |= {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
        start(self, *args, **kwargs)

    return init


def small(word: str) -> str:
    """A word, or code, with a small network where it names a large one."""
    return TRANSFORMER.sub("local-dir:vit", NETWORK.sub("panda_tiny", word))


def commands(code: str) -> list[list[str]]:
    """Commands of a block, each as its words."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    found = [shlex.split(line.split(" # ")[0]) for line in lines if line.strip() and not line.strip().startswith("#")]
    return [words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :] for words in found]


def run(words: list[str]) -> None:
    """Run a command in its small form."""
    program, *rest = words
    if program == "lightning":
        main(lightning(rest))
    elif program == "panda":
        assert tools.main(panda(rest)) in (0, None), words
    else:
        assert program in ELSEWHERE, f"{shlex.join(words)}: no rule for {program}"
        exists(program, rest)


def lightning(words: list[str]) -> list[str]:
    """Words of `lightning` as those of a small run."""
    if words[0].startswith("-") or any(word in ("--help", "--print_config") or ".help" in word for word in words):
        return words
    found: list[str] = []
    for word in words:  # as --key=value
        if word.startswith("-") or not found or "=" in found[-1] or not found[-1].startswith("-"):
            found.append(word)
        else:
            found[-1] += f"={word}"
    found = [small(word) for word in found if not word.startswith(DROPPED)]
    given = {word.partition("=")[0]: word.partition("=")[2] for word in found}
    files = [Path(word.partition("=")[2]).stem for word in found if word.startswith("--config=")]
    variant = next((name for name in reversed(files) if (ROOT / f"conf/variants/{name}.yaml").is_file()), files[:1])
    name = variant if isinstance(variant, str) else "".join(variant)
    found = [_less(word, files) for word in found]
    if "--ckpt_path" in given and "--config" not in given:
        return [*found, *ALWAYS]
    more = [*ALWAYS, *METHODS.get(name, []), *SETS.get(files[0] if files else "", [])]
    more += [f"--data.image_size={SIZES.get(name, '64')}"]
    if files and (ROOT / f"conf/{files[0]}.yaml").is_file():
        more += ["--data.root=data"] if files[0] not in ("digits", "folder", "pretrain_tiny") else []
        more += ["--data.train_limit=9", "--data.test_limit=30"] if files[0] == "digits" else []
        more += ["--data.root=data/bottles"] if files[0] == "folder" else []
        more += ["--model.backbone=panda_tiny"] if name not in SCRATCH else []
    more += ["--trainer.max_epochs=1"] if found[0] == "fit" else []
    return [*found, *(word for word in more if word.partition("=")[0] not in given)]


def _less(word: str, files: list[str]) -> str:
    """A word with a smaller number."""
    key, _, value = word.partition("=")
    if key == "--trainer.max_epochs":
        return f"{key}={min(int(value), 2)}"
    if key == "--data.image_size" and value.isdecimal():
        return f"{key}={min(int(value), 64)}"
    if key == "--data.image_size" and value.startswith("["):
        return f"{key}=[32,64]"
    return word


def panda(words: list[str]) -> list[str]:
    """Words of `panda` as those of a small run."""
    words = [small(word) for word in words]
    less = " --data.image_size=64 --trainer.max_epochs=1"
    words = [word + less * word.startswith("--words=") for word in words]
    given = {word.partition("=")[0] for word in words}
    return [*words, *(word for word in TOOLS.get(words[0], []) if word.partition("=")[0] not in given)]


def exists(program: str, words: list[str]) -> None:
    """What other programs are asked to use is there; the examples, and what make runs, have tests of their own."""
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        asked = [word for word in words if "=" not in word]
        assert set(asked) <= set(targets), words
    elif program in ("python", "sbatch"):
        file = next((word for word in words if word.endswith((".py", ".sbatch", ".sh"))), None)
        assert file is None or Path(file).is_file(), words
        assert file or words[:1] in (["-m"], ["-c"]), words
    elif program == "wandb":
        assert words[0] == "sync"
        assert list(Path().glob(words[1])), words
    else:
        settings = (ROOT / "setup.cfg").read_text("utf-8")
        for word in words[1:]:  # after install
            extra = re.fullmatch(r"\.\[(\w+)\]", word)
            assert word == "." or re.search(rf"^{extra[1]} =" if extra else rf"^ +{word}\b", settings, re.MULTILINE), (
                word
            )


def python(code: str, names: dict[str, Any]) -> None:
    """Run a block in its small form."""
    code = re.sub(r"\b(ImageFolder|CIFAR10|CIFAR100|FashionMNIST|CatsVsDogs|MVTecAD)\((?![^)]*image_size)",
                  r"\1(image_size=64, ", small(code))  # fmt: skip
    exec(compile(code, names["__name__"], "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page(page: Path, place: Path) -> None:
    names = vars(ModuleType(page.stem))
    for _, language, code in BLOCK.findall(page.read_text("utf-8")):
        first = code.split("\n", 1)[0]
        if named := re.fullmatch(r"# ([\w/-]+\.(?:yaml|py))", first.strip()):
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(small(code), "utf-8")
        elif language == "bash":
            for words in commands(code):
                run(words)
        elif language == "python":
            python(code, names)


@pytest.mark.parametrize("file", HEADERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_header_of_a_configuration(file: Path, place: Path) -> None:
    header = re.match(r"(?:#.*\n)+", file.read_text("utf-8"))
    assert header
    found = re.findall(r"(?:^# *|: +)((?:lightning|panda) .*)$", header[0], re.MULTILINE)
    assert found
    for command in found:
        run(commands(command)[0])


@pytest.mark.parametrize("path", [p for p in SOURCES if ">>>" in p.read_text("utf-8")], ids=lambda p: p.stem)
def test_examples_in_docstrings(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


def test_pages_hold_commands_and_code() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    counts = [sum(language == kind for _, language, _ in BLOCK.findall(text)) for kind in ("bash", "python")]
    assert min(counts) > 20, counts
