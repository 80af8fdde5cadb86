"""Folders as they come, unpacked twice, linked or with other files between the images; and what files are called."""

import os
import stat
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from panda_lightning.pictures.pixels import ENDINGS


def find_folder(root: Path, *choices: str) -> Path | None:
    """The folder of one of these paths in root or in a folder of it; where it is doubled, the inner one."""
    for above in ("", "*/"):
        for choice in choices:
            first, last = choice.split("/")[0], choice.split("/")[-1]
            for pattern in (f"{choice}/{last}", f"{first}/{choice}", choice):
                for path in sorted(root.glob(above + pattern)):
                    if path.is_dir():
                        return path
    return None


def named(folder: Path, name: str) -> Path:
    """A folder in a folder by its name, in upper or lower case where it is not there as written."""
    alike = [path for path in folders_in(folder) if path.name.lower() == name]
    return folder / name if (folder / name).is_dir() or len(alike) != 1 else alike[0]


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is a system's own: hidden, macOS's, a notebook's."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, links to folders too; none where it does not exist."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not is_junk(path.name))


def images_in(folder: Path) -> list[Path]:
    """Files of images in a folder itself, sorted; none where it does not exist."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in ENDINGS and not is_junk(path.name))


@dataclass(frozen=True, eq=False)
class Files(Sequence[Path]):
    """N files as arrays: a million takes tens of megabytes, and processes share them; paths are made when asked for.

    Attributes:
        folders: Those that hold them.
        within: (N,) places of theirs in ``folders``.
        called: (N,) their names there, encoded for the file system.
        sizes: (N,) in bytes.
        times: (N,) when they were last changed, in nanoseconds.
    """

    folders: tuple[Path, ...]
    within: npt.NDArray[np.int32]
    called: npt.NDArray[np.bytes_]
    sizes: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "Files":
        """Files of any folders, in this order, as they are now.

        Raises:
            OSError: If one is not there.
        """
        folders: dict[Path, int] = {}
        within = [folders.setdefault(path.parent, len(folders)) for path in paths]
        stats = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)]
        sizes, times = np.array(stats, dtype=np.int64).reshape(-1, 2).T
        return cls(tuple(folders), np.array(within, dtype=np.int32), _encoded(p.name for p in paths), sizes, times)

    @classmethod
    def joined(cls, parts: Iterable["Files"]) -> "Files":
        """Several one after the other."""
        several = [cls.of(()), *parts]
        before = np.cumsum([0, *(len(part.folders) for part in several)], dtype=np.int32)
        within = np.concatenate([part.within + start for part, start in zip(several, before, strict=False)])
        called, sizes, times = (np.concatenate([getattr(p, n) for p in several]) for n in ("called", "sizes", "times"))
        return cls(tuple(folder for part in several for folder in part.folders), within, called, sizes, times)

    def __len__(self) -> int:
        return len(self.called)

    @overload
    def __getitem__(self, row: int) -> Path: ...
    @overload
    def __getitem__(self, row: slice) -> "Files": ...
    def __getitem__(self, row: int | slice) -> "Path | Files":
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        row = index(row)
        path: Path = self.folders[self.within[row]] / os.fsdecode(self.called[row])
        return path

    def take(self, rows: npt.NDArray[np.int64]) -> "Files":
        """Those of these rows, in their order."""
        return Files(self.folders, self.within[rows], self.called[rows], self.sizes[rows], self.times[rows])

    def names(self, by: Callable[[Path], str]) -> list[str]:
        """What ``by``, which is ``readable`` or a ``relative``, makes of each: it is asked once a folder."""
        return [name for part in self._chunks(by) for name, _ in part]

    def pieces(self, root: Path) -> Iterator[bytes]:
        """What ``fingerprint`` makes of a list of pairs of each name below ``root`` and size."""
        yield f"{len(self)} in order".encode()
        for part in self._chunks(lambda path: relative(path, root)):
            yield "".join(f"2 in order{name!r}{size}" for name, size in part).encode()

    def _chunks(self, by: Callable[[Path], str]) -> Iterator[Iterable[tuple[str, int]]]:
        """Names and sizes, some at a time."""
        starts = [by(folder / "x")[:-1] for folder in self.folders]
        for first in range(0, len(self), 2**14):
            within, called, sizes = (a[first : first + 2**14].tolist() for a in (self.within, self.called, self.sizes))
            yield ((starts[w] + readable(c), s) for w, c, s in zip(within, called, sizes, strict=True))


def images_below(folder: Path) -> list[Path]:
    """Files of images in a folder and its subfolders, sorted."""
    return list(listed(folder)[0])


def listed(folder: Path) -> tuple[Files, Counter[str]]:
    """Files of images in a folder and its subfolders, sorted; and how many of what else there is, by ending.

    Links to folders are followed, but for those that lead back to a folder above; hidden and system files do not count.
    Every folder is read once.
    """
    images: list[Files] = []
    others: Counter[str] = Counter()
    if folder.is_dir():
        _list(folder, {_identity(place) for place in (folder, *folder.absolute().parents)}, images, others)
    return Files.joined(images), others


def _list(folder: Path, above: set[tuple[int, int]], images: list[Files], others: Counter[str]) -> None:
    """Append what a folder holds; ``above`` are it and those that hold it."""
    names: list[str] = []
    sizes, times = array("q"), array("q")
    inner: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:  # what may not be read is passed over
        for entry in entries:
            if is_junk(entry.name):
                continue
            found = None
            with suppress(OSError):
                found = entry.stat()
            if found is not None and stat.S_ISDIR(found.st_mode):
                inner.append(entry.name)
            elif found is not None and stat.S_ISREG(found.st_mode) and _ending(entry.name) in ENDINGS:
                names.append(entry.name)
                sizes.append(found.st_size)
                times.append(found.st_mtime_ns)
            else:
                others["dead links" if found is None else _ending(entry.name) or "without ending"] += 1
    keys = [os.path.normcase(name) for name in names]
    order = np.array(sorted(range(len(names)), key=keys.__getitem__), dtype=np.int64)
    keys.sort()
    here = Files((folder,), np.zeros(len(names), dtype=np.int32), _encoded(names), np.array(sizes), np.array(times))
    done = 0
    for name in sorted(inner, key=os.path.normcase):  # files and folders of a folder are sorted together
        itself = _identity(folder / name)
        if itself in above:
            others["links to a folder above"] += 1
            continue
        before, done = done, bisect(keys, os.path.normcase(name))
        images.append(here.take(order[before:done]))
        _list(folder / name, above | {itself}, images, others)
    images.append(here.take(order[done:]))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # a million times, where Path.suffix takes four times as long


def _encoded(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    encoded = [os.fsencode(name) for name in names]
    return np.array(encoded, dtype=np.bytes_) if encoded else np.array([], dtype="S1")


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def passed_over(others: Counter[str]) -> tuple[str, ...]:
    """A note of the files that are no images by their ending, if there are any."""
    if not others:
        return ()
    kinds = ", ".join(f"{ending} {number}" for ending, number in others.most_common())
    return (f"{others.total()} files are ignored: {kinds}. Images end in {', '.join(ENDINGS)}.",)


def masks_of(images: Sequence[Path], below: Path, masks: Path) -> list[Path | None]:
    """The masks of images: ``x_mask.*`` or ``x.*`` for ``x.*`` in the same folder below, in upper or lower case.

    Args:
        images: Files below ``below``.
        below: The folder whose folders ``masks`` repeats.
        masks: Where they are.
    """
    files = images_below(masks)
    exact = {_stem(path, masks): path for path in reversed(files)}
    loose = {stem.lower(): path for stem, path in exact.items()}

    stems = [_stem(image, below) for image in images]
    names = [(f"{stem}_mask", stem) for stem in stems]
    found = [next((exact[name] for name in several if name in exact), None) for several in names]
    free = {name: path for name, path in loose.items() if path not in found}  # what belongs to no other image
    lower = [next((free[name.lower()] for name in several if name.lower() in free), None) for several in names]
    return [mask or other for mask, other in zip(found, lower, strict=True)]


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def relative(path: Path, root: Path) -> str:
    r"""A file's name below the data set's folder, with forward slashes; bytes that are not UTF-8 as ``\xNN``."""
    return readable(Path(os.path.relpath(path, root)).as_posix())


def readable(path: str | bytes | Path) -> str:
    r"""A path as text that every file can hold: bytes that are not UTF-8 are ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
