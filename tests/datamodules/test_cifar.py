import pickle
import struct
import subprocess

import numpy as np
import pytest
from torchvision import datasets as official

from panda_lightning import PandaError
from panda_lightning.datamodules import CIFAR10, CIFAR100, cifar
from tests.datamodules.official import SUPERCLASS, make_cifar10, make_cifar100, pack_cifar


def test_pickles_are_read_as_torchvision_reads_them(tmp_path, monkeypatch):
    make_cifar10(tmp_path)
    monkeypatch.setattr(official.CIFAR10, "_check_integrity", lambda self: True)  # ours are not the official bytes
    monkeypatch.setattr(official.CIFAR10, "_load_meta", lambda self: None)
    for split in ("train", "test"):
        there = official.CIFAR10(str(tmp_path), train=split == "train")
        here = CIFAR10(root=str(tmp_path)).read(split)
        np.testing.assert_array_equal(here.sources, there.data)
        np.testing.assert_array_equal(here.targets, there.targets)


def test_addresses_and_checksums_are_torchvisions():
    for ours, theirs in ((CIFAR10, official.CIFAR10), (CIFAR100, official.CIFAR100)):
        assert (ours.url, ours.checksum, ours.folder) == (theirs.url, f"md5:{theirs.tgz_md5}", theirs.base_folder)


def test_cifar100_is_read_by_superclass(tmp_path):
    make_cifar100(tmp_path)
    data = CIFAR100(root=str(tmp_path), normal_class="fish")
    data.setup("fit")
    assert len(data.classes) == len(set(SUPERCLASS.values())) == 20
    assert len(data.normal_images) == 3
    np.testing.assert_array_equal(data.test_images.targets, np.arange(40) % 20)
    assert data.test_images.sources.shape == (40, 32, 32, 3)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_files_that_are_there_are_not_fetched(tmp_path, monkeypatch, kind):
    make_cifar10(tmp_path)
    make_cifar100(tmp_path)
    monkeypatch.setattr(cifar, "fetch", lambda *a: pytest.fail("fetched"))
    kind(root=str(tmp_path)).prepare_data()


def test_a_missing_batch_is_named(tmp_path):
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(PandaError, match="data_batch_3 is missing"):
        CIFAR10(root=str(tmp_path)).read("train")


class Runs:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


def batch(**changes):
    """What test_batch holds, with some entries in place of others."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": [0, 9, 3, 3]} | {name.encode(): value for name, value in changes.items()}


def read(tmp_path, content):
    """Read a test_batch of this content."""
    (tmp_path / CIFAR10.folder).mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
    (tmp_path / CIFAR10.folder / "test_batch").write_bytes(content)
    return CIFAR10(root=str(tmp_path)).read("test")


def refused(tmp_path, content, reason):
    start = r"cifar-10-batches-py/test_batch differs from the file in https://\S+cifar-10-python.tar.gz \("
    with pytest.raises(
        PandaError, match=rf"{start}{reason}.*\): remove \S+batches-py, and unpack the archive again\.$"
    ):
        read(tmp_path, content)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, protocol, order):
    made = batch()
    made[b"data"] = np.asarray(made[b"data"], order=order)
    found = read(tmp_path, pickle.dumps(made, protocol=protocol))
    np.testing.assert_array_equal(found.sources.transpose(0, 3, 1, 2).reshape(4, 3072), made[b"data"])
    assert found.targets.tolist() == [0, 9, 3, 3]


@pytest.mark.parametrize("before", [b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"])
def test_both_names_of_numpys_module_are_known(tmp_path, before):
    """NumPy 2 renamed it; the official files are older."""
    here = b"cnumpy._core.multiarray\n" if np.__version__ >= "2" else b"cnumpy.core.multiarray\n"
    assert read(tmp_path, pickle.dumps(batch(), protocol=2).replace(here, before)).sources.shape == (4, 32, 32, 3)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["alone", "data", "labels", "unread"])
def test_nothing_in_a_file_is_run(tmp_path, protocol, place):
    for function, words in (
        (open, (str(tmp_path / "run"), "w")),
        (eval, (f"open({str(tmp_path / 'run')!r}, 'w')",)),
        (exec, (f"open({str(tmp_path / 'run')!r}, 'w')",)),
        (subprocess.check_call, (["touch", str(tmp_path / "run")],)),
        (np.save, (str(tmp_path / "run"), 3)),
        (getattr, (3, "real")),
    ):
        bad = Runs(function, *words)
        content = pickle.dumps(bad if place == "alone" else batch(**{place: bad}), protocol=protocol)
        refused(
            tmp_path, content, rf"it cannot be read: it asks for \S+\.{function.__name__}, which images do not need"
        )
    assert not list(tmp_path.glob("run*"))


def array(shape, content, kind=b"U\x02u1", after=b""):
    """Opcodes of a NumPy array; ``after`` follows with its type on the stack."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    dtype = b"cnumpy\ndtype\n(" + kind + b"I0\nI1\ntRq\x07"
    text = b"T" + struct.pack("<i", len(content)) + content
    return made + b"(I1\n" + shape + dtype + b"I00\n" + text + b"tb" + after


def test_sizes_that_a_file_states_lead_nowhere(tmp_path):
    """NumPy's own types would: a type that is enlarged once the array is there reads, and writes, beyond its memory."""
    head, labels, end = b"\x80\x02}(U\x04data", b"U\x06labels](I1\ne", b"u."
    whole = array(b"(I1\nI3072\nt", bytes(3072))
    assert read(tmp_path, head + whole + labels + end).targets.tolist() == [1]
    enlarged = b"h\x07(I3\nU\x01|NNNI1048576\nI1\nI0\ntb0"
    assert read(tmp_path, head + array(b"(I1\nI3072\nt", bytes(3072), after=enlarged) + labels + end).sources.sum() == 0
    refused(tmp_path, head + array(b"(I9\nI3072\nt", bytes(3072)) + labels + end, "it cannot be read: cannot reshape")
    refused(tmp_path, head + array(b"(I1\nI3072\nt", bytes(8), b"U\x01O") + labels + end, "it cannot be read: an array")
    written = b"I99999999\nI1\ns"  # data[99999999] = 1
    refused(tmp_path, head + whole + written + labels + end, "it cannot be read: '_Array' object does not support")


WHOLE = pickle.dumps(batch(), protocol=2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it cannot be read: Ran out of input"),
        (b"\x89PNG no pickle", "it cannot be read: "),
        (b"<html>not found</html>", "it cannot be read: "),
        (WHOLE[:-1], "it cannot be read: "),
        (WHOLE[: len(WHOLE) // 2], "it cannot be read: pickle data was truncated"),
        (WHOLE[:40], "it cannot be read: "),
        ([1, 2], r"its data is not an array \(N, 3072\) of bytes"),
        ({}, "its data is not an array"),
        ({b"data": batch()[b"data"]}, "its labels are not a list of numbers from 0 to 9"),
        ({"data": batch()[b"data"], "labels": [0, 1, 2, 3]}, "its data is not an array"),  # keys are bytes
        (batch(data=np.zeros((4, 3071), np.uint8)), "its data is not an array"),
        (batch(data=np.zeros((4, 32, 32, 3), np.uint8)), "its data is not an array"),
        (batch(data=np.zeros((0, 3072), np.uint8)), "it cannot be read: it asks for __builtin__.bytes"),
        (pickle.dumps(batch(data=np.zeros((0, 3072), np.uint8)), protocol=3), "its data is not an array"),
        (batch(data=np.zeros((4, 3072))), "it cannot be read: an array is of b?'?f8'? instead of bytes"),
        (batch(data=b"0" * 4 * 3072), "its data is not an array"),
        (batch(labels=[0, 1, 2, 10]), "its labels are not a list of numbers from 0 to 9"),
        (batch(labels=[0, 1, 2, -1]), "its labels are not"),
        (batch(labels=[0, 1, 2, 3.0]), "its labels are not"),
        (batch(labels=["0", "1", "2", "3"]), "its labels are not"),
        (batch(labels=np.zeros(4, np.uint8)), "its labels are not"),
        (batch(labels=[0, 1, 2]), "it holds 4 images and 3 labels"),
    ],
)
def test_what_is_not_of_the_official_form_is_refused_in_a_sentence(tmp_path, content, reason):
    refused(tmp_path, content, reason)


def test_files_cut_off_anywhere_are_refused(tmp_path):
    for length in (*range(0, len(WHOLE), 97), len(WHOLE) - 2):
        refused(tmp_path, WHOLE[:length], "it cannot be read: ")


@pytest.mark.slow
def test_real_images_of_cifar10(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "cifar10"], check=True)
    pack_cifar(tmp_path / "cifar10", tmp_path)
    data = CIFAR10(root=str(tmp_path), normal_class="airplane")
    data.setup("fit")
    assert len(data.normal_images) == 5000
    assert np.bincount(data.test_images.targets).tolist() == [1000] * 10


@pytest.mark.slow
def test_real_images_of_cifar100(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "cifar100"], check=True)
    pack_cifar(tmp_path / "cifar100", tmp_path, coarse=True)
    data = CIFAR100(root=str(tmp_path), normal_class="fish")
    data.setup("fit")
    assert np.bincount(data.read("test").targets).tolist() == [250] * 20
    assert len(data.normal_images) == 2500
