import hashlib
import http.server
import io
import multiprocessing
import os
import stat
import tarfile
import threading
import time
import zipfile

import pytest

from panda_lightning import Digits, PandaError
from panda_lightning.datamodules.download import fetch, unpack

CONTENT = os.urandom(3_000_000)
SHA = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def server():
    """A server on loopback that can break off, ignore ranges, and remembers what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        ranges, break_after, honours_ranges = [], None, True

        def do_GET(self):
            asked = self.headers.get("Range")
            self.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.honours_ranges else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start : None if self.break_after is None else start + self.break_after])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield Handler, f"http://127.0.0.1:{httpd.server_port}/archive.zip"
        httpd.shutdown()


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    handler, url = server
    handler.break_after = 1_000_000
    with pytest.raises(PandaError, match="cannot be downloaded .*run again to resume the download"):
        fetch(url, tmp_path, SHA)
    handler.break_after = None
    path = fetch(url, tmp_path, SHA)
    assert path.read_bytes() == CONTENT
    assert handler.ranges == [None, "bytes=1000000-"]
    assert fetch(url, tmp_path, SHA) == path
    assert len(handler.ranges) == 2  # what is there is not fetched


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    handler, url = server
    handler.honours_ranges = False
    (tmp_path / "archive.zip.part").write_bytes(b"old")
    assert fetch(url, tmp_path, SHA).read_bytes() == CONTENT


def test_a_whole_part_is_taken(server, tmp_path):
    _, url = server
    (tmp_path / "archive.zip.part").write_bytes(CONTENT)
    assert fetch(url, tmp_path, SHA).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path):
    _, url = server
    with pytest.raises(PandaError, match="its md5 is .* instead of 00"):
        fetch(url, tmp_path, "md5:00")
    assert not list(tmp_path.iterdir())


def test_no_network_names_the_way_out(tmp_path):
    with pytest.raises(PandaError, match="cannot be downloaded .*save it as .*x.zip"):
        fetch("http://127.0.0.1:9/x.zip", tmp_path, SHA)


def make_zip(path, name, mode=None):
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("fine/a.txt", "a")
        info = zipfile.ZipInfo(name)
        if mode:
            info.external_attr = mode << 16
        bundle.writestr(info, "target")
    return path


def make_tar(path, name, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as tar:
        for member_name, member_kind in (("fine/a.txt", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(member_name)
            info.type, info.linkname, info.size = member_kind, "/etc/passwd", 1 if member_kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"a") if info.size else None)
    return path


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_archives_are_unpacked(tmp_path, make):
    unpack(make(tmp_path / "x.archive", "fine/b/c.txt"), tmp_path)
    assert sorted(p.name for p in (tmp_path / "fine").rglob("*.txt")) == ["a.txt", "c.txt"]
    unpack(tmp_path / "x.archive", tmp_path)  # the same again: a killed run may have got so far
    (tmp_path / "fine" / "a.txt").write_text("other")
    with pytest.raises(PandaError, match="fine already exists and differs from the file in .*x.archive"):
        unpack(tmp_path / "x.archive", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"x.archive", "fine"}


def unpack_after(archive, folder, seconds):
    time.sleep(seconds)
    unpack(archive, folder)


def test_processes_that_unpack_at_the_same_time_leave_all_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as bundle:
        for i in range(3000):
            bundle.writestr(f"pets/{i}.jpg", b"x" * 100)
        bundle.writestr("readme", "r")
    start = time.perf_counter()
    unpack(tmp_path / "x.zip", tmp_path / "alone")
    alone = time.perf_counter() - start
    context = multiprocessing.get_context()
    delays = [share * alone for share in (0, 0.3, 0.6, 0.9, 1.0, 1.1)]
    workers = [context.Process(target=unpack_after, args=(tmp_path / "x.zip", tmp_path / "in", d)) for d in delays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    assert {p.name for p in (tmp_path / "in").iterdir()} == {"pets", "readme"}
    assert len(list((tmp_path / "in" / "pets").iterdir())) == 3000


class Made(Digits):
    """Digits that are there once a file says so; who makes it, and how often, is counted."""

    def present(self):
        return (self.root / "made").is_file()

    def obtain(self):
        with (self.root / "count").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        (self.root / "made").write_text("")


def test_jobs_that_start_together_obtain_the_files_once(tmp_path):
    context = multiprocessing.get_context()
    workers = [context.Process(target=Made(root=str(tmp_path)).prepare_data) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 5
    assert (tmp_path / "count").read_text() == "x"


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name", ["../outside", "fine/../../outside", "/outside", "C:/outside"])
def test_members_that_climb_out_are_refused_and_nothing_is_unpacked(tmp_path, make, name):
    (tmp_path / "in").mkdir()
    with pytest.raises(PandaError, match="outside.* would be written outside its folder"):
        unpack(make(tmp_path / "x.archive", name), tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars_are_refused(tmp_path, kind):
    (tmp_path / "in").mkdir()
    with pytest.raises(PandaError, match="odd is a link or a device"):
        unpack(make_tar(tmp_path / "x.tar.gz", "odd", kind), tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_links_in_zips_are_refused(tmp_path):
    with pytest.raises(PandaError, match="odd is a link or a device"):
        unpack(make_zip(tmp_path / "x.zip", "odd", stat.S_IFLNK | 0o777), tmp_path)


def test_a_damaged_archive_is_said(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(PandaError, match="x.tar.gz cannot be unpacked"):
        unpack(tmp_path / "x.tar.gz", tmp_path)
