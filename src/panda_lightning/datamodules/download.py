"""Fetch an archive once, check it, and unpack it without leaving its folder."""

import hashlib
import stat
import tarfile
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from panda_lightning.runtime.whole import new_folder
from panda_lightning.types import PandaError


def fetch(url: str, folder: Path, checksum: str) -> Path:
    """Download a file, going on where a broken download stopped; a file of that name that is there is taken as it is.

    Args:
        url: What to fetch.
        folder: Where to put it; made if need be.
        checksum: ``md5:...`` or ``sha256:...`` of the whole file.

    Raises:
        PandaError: If it cannot be fetched, or is not what it should be.
    """
    target = folder / PurePosixPath(url).name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        _transfer(url, part)
    except (OSError, URLError) as error:
        raise PandaError(
            f"{url} cannot be downloaded ({error}): run again to resume the download, or download it elsewhere "
            f"and save it as {target}."
        ) from error
    kind, _, expected = checksum.partition(":")
    found = _digest(part, kind)
    if found != expected:
        part.unlink()
        raise PandaError(f"{url} is damaged or has changed: its {kind} is {found} instead of {expected}. Run again.")
    part.replace(target)
    return target


def _transfer(url: str, part: Path) -> None:
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except HTTPError as error:
        if error.code == 416:  # nothing lies beyond what is there
            return
        raise
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with response, Progress(*columns, transient=True) as progress:
        resumed = response.status == 206  # a server may send the whole file again instead
        rest = int(response.headers.get("Content-Length") or 0)
        total = rest + (have if resumed else 0)
        task = progress.add_task(part.stem, total=total or None, completed=have if resumed else 0)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if total and part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip archive; all of it or, if a member would leave the folder, nothing.

    What is there already must be the same: another process has been quicker, or an earlier one was killed at the end.

    Raises:
        PandaError: Naming the member that is absolute, climbs out with ``..``, or is a link or a device.
    """
    with new_folder(folder) as part:
        _extract(archive, part)
        for entry in part.iterdir():
            target = folder / entry.name
            if not target.exists():
                try:
                    entry.rename(target)
                    continue
                except OSError:
                    if not target.exists():  # else another process was quicker
                        raise
            if _sizes(entry) != _sizes(target):
                raise PandaError(
                    f"{target} already exists and differs from the file in {archive}: remove one of them, and "
                    "run again."
                )


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of a file, or of each file of a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {p.relative_to(path).as_posix(): p.stat().st_size for p in files}


def _extract(archive: Path, part: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle:
                for info in bundle.infolist():
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    _refuse(archive, info.filename, kind not in (0, stat.S_IFREG, stat.S_IFDIR))
                bundle.extractall(part)
        else:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _refuse(archive, member.name, not (member.isfile() or member.isdir()))
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 have none
                tar.extractall(part)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise PandaError(
            f"{archive} cannot be unpacked ({error}): remove it, and run again to download it again."
        ) from error


def _refuse(archive: Path, name: str, special: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if special or path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
        what = "is a link or a device" if special else "would be written outside its folder"
        raise PandaError(f"{archive} is refused: its member {name} {what}.")
