"""Mutation score of single modules: which small changes of the source does no test notice?

    python experiments/mutation/mutate.py search/knn.py tests/search/test_knn.py [--sample 25 --seed 0] [--only 3,17]

The mutants are those of mutmut's operators and a few of ours, each made in memory alone: a process forked off one that
has the libraries loaded imports the mutated text and runs the tests. README.md has the results.
"""

import argparse
import difflib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from pathlib import Path

import libcst as cst
import libcst.matchers as m
import pytest
from mutmut.mutation.mutators import mutation_operators
from typing_extensions import override

ROOT = Path(__file__).parents[2]
# What is left alone: types, calls as mutmut leaves them alone, and sentences (mutmut leaves f-strings alone anyway)
ALONE = (
    m.Annotation()
    | m.Import()
    | m.ImportFrom()
    | m.Assign(value=m.Subscript(value=m.Name("Literal") | m.Name("dict")) | m.Call(func=m.Name("TypeVar")))
    | m.Call(func=m.Name("len") | m.Name("isinstance"))
    | m.SimpleString(value=m.MatchRegex(r".*\s.*"))
)


def ours(node):
    """What mutmut lacks: a statement, a context or a decorator left out."""
    if m.matches(node, m.Expr(value=~m.SimpleString() & ~m.ConcatenatedString())):
        yield cst.Pass()
    if m.matches(node, m.With(items=[m.WithItem(asname=None)])):
        yield node.with_changes(items=[cst.WithItem(cst.parse_expression("__import__('contextlib').nullcontext()"))])
    if isinstance(node, cst.FunctionDef):
        for one in node.decorators:
            if not m.matches(one.decorator, m.Name("override") | m.Name("staticmethod") | m.Name("contextmanager")):
                yield node.with_changes(decorators=[d for d in node.decorators if d is not one])


def mutants(text):
    """Line and text of every mutant, in the order of the source."""
    tree = cst.metadata.MetadataWrapper(cst.parse_module(text))
    places = tree.resolve(cst.metadata.PositionProvider)
    found = []

    def visit(node):
        if m.matches(node, ALONE):
            return
        changed = [new for kind, operator in mutation_operators if isinstance(node, kind) for new in operator(node)]
        for new in [*changed, *ours(node)]:
            code = tree.module.deep_replace(node, new).code
            if code != text:
                found.append((places[node].start.line if node in places else 0, code))
        for child in node.children:
            visit(child)

    visit(tree.module)
    return [found[i] for i in sorted(range(len(found)), key=lambda i: (found[i][0], i))]


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from another text."""

    def __init__(self, module, path, text):
        self.module, self.path, self.text = module, str(path), text

    @override
    def find_spec(self, fullname, path, target=None):
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.module else None

    @override
    def get_filename(self, fullname):
        return self.path

    @override
    def get_data(self, path):
        return self.text.encode()


def outcome(module, path, text, tests, limit):
    """What the tests say of this text: killed, survived or timeout."""
    child = os.fork()
    if not child:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.meta_path.insert(0, Mutated(module, path, text))
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--durations=0", *tests])))
    for _ in range(int(limit * 100)):  # without what the machine slept, or this process was halted
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main():
    """Run the mutants of one module; print those that no test notices, and the score."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module", help="under src/panda_lightning")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="numbers of mutants, with commas")
    options = parser.parse_args()

    path = ROOT / "src/panda_lightning" / options.module
    module = "panda_lightning." + options.module.removesuffix(".py").replace("/", ".")
    text = path.read_text()
    every = mutants(text)
    numbers = range(len(every))
    if options.sample is not None:
        numbers = sorted(random.Random(options.seed).sample(numbers, options.sample))
    if options.only:
        numbers = [int(n) for n in options.only.split(",")]

    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    sys.dont_write_bytecode = True
    for name in ("torchvision", "timm", "pytorch_lightning.cli", "torchmetrics", "wandb", "sklearn.metrics", "faiss"):
        importlib.import_module(name)
    importlib.import_module("scipy.ndimage")
    begin = time.monotonic()
    if outcome(module, path, text, options.tests, 600) != "survived":
        sys.exit("The tests fail without a mutation.")
    limit = 10 + 5 * (time.monotonic() - begin)
    print(f"{len(every)} mutants, {len(numbers)} run; the tests take {time.monotonic() - begin:.1f} s", flush=True)
    found = {}
    for number in numbers:
        line, code = every[number]
        found[number] = outcome(module, path, code, options.tests, limit)
        if found[number] != "killed":
            print(f"--- {number}, line {line}: {found[number]}")
            changes = difflib.unified_diff(text.splitlines(), code.splitlines(), n=0, lineterm="")
            print("\n".join([c for c in changes if not c.startswith(("---", "+++", "@@"))]), flush=True)
    lived = [n for n, what in found.items() if what == "survived"]
    print(
        f"{options.module}: {len(found)} mutants, {len(found) - len(lived)} killed "
        f"({sum(what == 'timeout' for what in found.values())} by time), {len(lived)} survived "
        f"= {1 - len(lived) / len(found):.1%}; {time.monotonic() - begin:.0f} s; survivors {','.join(map(str, lived))}"
    )


if __name__ == "__main__":
    main()
