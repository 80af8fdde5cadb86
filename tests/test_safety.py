"""Nothing that comes from a file is run: what the package's sources may call."""

import ast
import builtins
import pyexpat
from pathlib import Path
from xml.etree import ElementTree

import pytest

import panda_lightning

ROOT = Path(panda_lightning.__file__).parent
UNPICKLER = "datamodules/cifar.py"  # has the one unpickler, which builds plain containers and arrays
ALLOWED = {
    ("tools/certificate.py", "torch.export.load"),  # opens a program that the same process has just written
    ("tables/plan.py", "importlib.import_module"),  # of a class_path, as the command line does: configurations are code
    # asks git for the commit, and starts this Python anew for a run on several devices
    *(("tables/rows.py", name) for name in ("subprocess", "subprocess.run", "subprocess.CalledProcessError")),
}
BANNED = """
builtins: eval exec compile __import__
os: system popen execv execve execl execvp spawnl spawnv posix_spawn startfile
importlib: import_module machinery util.spec_from_file_location util.module_from_spec
shutil: unpack_archive
numpy: lib.npyio lib.format.read_array
torch: jit.load hub package export.load serialization
yaml: load load_all full_load full_load_all unsafe_load unsafe_load_all Loader FullLoader UnsafeLoader
pandas: read_pickle eval
xml: dom sax etree.cElementTree
pickle: load loads Unpickler
_pickle: cPickle: cloudpickle: dill: joblib: jsonpickle: marshal: shelve: subprocess: pty: runpy: code: codeop: lxml:
"""  # and what is below these


def banned():
    """Dotted names, from the table above."""
    for line in BANNED.split("\n"):
        module, _, rest = line.partition(": ")
        if rest and ":" not in rest:
            yield from (f"{module}.{name}" for name in rest.split())
        else:
            yield from line.replace(":", "").split()


def used(tree):
    """Dotted names that a source imports or uses, whatever it calls them: (name, node)."""
    alias = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield item.name, node
                alias[item.asname or item.name.split(".")[0]] = item.name if item.asname else item.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for item in node.names:
                yield f"{node.module}.{item.name}", node
                alias[item.asname or item.name] = f"{node.module}.{item.name}"
    for node in ast.walk(tree):
        parts, root = [], node
        while isinstance(root, ast.Attribute):
            parts, root = [root.attr, *parts], root.value
        if isinstance(root, ast.Name) and (root.id in alias or hasattr(builtins, root.id)):
            yield ".".join([alias.get(root.id, f"builtins.{root.id}"), *parts]), node


def literal(call, keyword):
    """The value of a keyword argument, if it is written there; None where it is absent, ... where it is computed."""
    if any(k.arg is None for k in call.keywords):
        return ...
    values = [k.value for k in call.keywords if k.arg == keyword]
    return getattr(values[0], "value", ...) if values else None


def checked_archives(tree):
    """Calls that unpack an archive in a block that may refuse its members; a tar by Python's filter, if it has one."""
    for block in ast.walk(tree):
        if isinstance(block, ast.With) and "_refuse(" in (text := ast.unparse(block)):
            filtered = ".extraction_filter = getattr(tarfile, 'data_filter', None)" in text
            kinds = ("zipfile.ZipFile(", "tarfile.open(")[: 1 + filtered]
            opened = {
                ast.unparse(i.optional_vars) for i in block.items if ast.unparse(i.context_expr).startswith(kinds)
            }
            for call in ast.walk(block):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"{name}.extractall" for name in opened}:
                    yield call


def faults(source, file="x.py"):
    """What a source does that could run what is in a file."""
    tree = ast.parse(source)
    names = list(used(tree))
    bases = [base for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for base in cls.bases]
    found = {
        name for name, node in names for other in banned()
        if f"{name}.".startswith(f"{other}.") and not (file == UNPICKLER and node in bases)
        and (file, name) not in ALLOWED
    }  # fmt: skip
    checked, of = list(checked_archives(tree)), {node: name for name, node in names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        name, attribute = of.get(call.func, ""), getattr(call.func, "attr", "")
        if (name == "torch.load" or attribute == "load_from_checkpoint") and literal(call, "weights_only") is not True:
            found.add(f"{ast.unparse(call)}: weights_only=True is missing")
        if name == "numpy.load" and (literal(call, "allow_pickle") not in (None, False) or len(call.args) > 2):
            found.add(f"{ast.unparse(call)}: allow_pickle")
        if attribute == "extractall" and literal(call, "filter") != "data" and call not in checked:
            found.add(f'{ast.unparse(call)}: filter="data" is missing')
        if attribute == "extract":
            found.add(f"{ast.unparse(call)}: single members are not checked")
    functions = [call.func for call in calls]
    uncalled = [node for name, node in names if name in ("torch.load", "numpy.load") and node not in functions]
    return found | {
        f"{ast.unparse(node)} under another name" for node in uncalled if not isinstance(node, ast.ImportFrom)
    }


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_what_a_file_holds(path):
    assert faults(path.read_text("utf-8"), path.relative_to(ROOT).as_posix()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "import pickle as p\np.loads(b'')",
        "from pickle import load",
        "from pickle import Unpickler\nclass Mine(Unpickler): ...",
        "import pickle\nread = pickle.Unpickler",
        "import _pickle",
        "import joblib",
        "from marshal import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import torch\ntorch.load(path, **options)",
        "import torch\nread = torch.load",
        "from torch import load\nread = load",
        "from torch import load\nload(path)",
        "import torch.jit as j\nj.load(path)",
        "import torch\ntorch.hub.load('x', 'y')",
        "import torch\ntorch.serialization.add_safe_globals([x])",
        "Detector.load_from_checkpoint(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, None, True)",
        "from numpy import load\nload(path, allow_pickle=maybe)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import tarfile\ntarfile.open(p).extractall(q)",
        "import tarfile\ntarfile.open(p).extractall(q, filter='tar')",
        "import tarfile\nwith tarfile.open(p) as t:\n    _refuse(t)\n    t.extractall(q)",
        "import tarfile\nwith tarfile.open(p) as t:\n    t.extraction_filter = getattr(tarfile, 'data_filter', None)\n"
        "    t.extractall(q)",
        "import zipfile\nwith zipfile.ZipFile(p) as z:\n    z.extractall(q)",
        "import zipfile\nwith zipfile.ZipFile(p) as z:\n    _refuse(z)\n    other.extractall(q)",
        "tar.extract(member)",
        "import shutil\nshutil.unpack_archive(p)",
        "eval('1')",
        "exec(text)",
        "run = eval",
        "import subprocess",
        "from os import system",
        "import os\nos.popen('ls')",
        "from xml.dom import minidom",
        "import xml.sax",
        "from lxml import etree",
        "from importlib import import_module",
    ],
)
def test_the_rule_sees(source):
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True, mmap=True)\ntorch.compile(net)",
        "import numpy as np\nnp.load(path, mmap_mode='r')",
        "import yaml\nyaml.safe_load(text)",
        "tar.extractall(folder, filter='data')",
        "import zipfile\nwith zipfile.ZipFile(p) as z:\n    _refuse(z)\n    z.extractall(q)",
        "import tarfile\nwith tarfile.open(p) as t:\n    _refuse(t)\n"
        "    t.extraction_filter = getattr(tarfile, 'data_filter', None)\n    t.extractall(q)",
        "from panda_lightning.runtime.features import extract\nextract(1)",
        "from pickle import UnpicklingError",
        "from xml.etree import ElementTree\nElementTree.parse(path)",
        "from importlib.util import find_spec",
        "code = 3\ncode.load()",
    ],
)
def test_the_rule_lets_pass(source):
    assert faults(source) == set()


def test_the_unpickler_is_where_it_should_be():
    source = (ROOT / UNPICKLER).read_text()
    assert "pickle.Unpickler" in source
    assert faults(source, "elsewhere.py")


def test_entities_in_xml_do_not_grow_without_bound():
    """ElementTree leaves this to expat, which limits it since 2.4.1; entities in other files it never opens."""
    assert pyexpat.version_info >= (2, 4, 1)
    tens = "".join(f"<!ENTITY a{n + 1} '{f'&a{n};' * 10}'>" for n in range(11))
    laughs = f"<!DOCTYPE r [<!ENTITY a0 'ha'>{tens}]><r>&a11;</r>"
    with pytest.raises(ElementTree.ParseError, match="amplification"):
        ElementTree.fromstring(laughs)
    with pytest.raises(ElementTree.ParseError, match="undefined entity"):
        ElementTree.fromstring("<!DOCTYPE r [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><r>&a;</r>")
