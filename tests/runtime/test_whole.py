import fcntl
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from panda_lightning.runtime.whole import alone, new_file, new_folder


def aged(path: Path, seconds: float):
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_has_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with new_file(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.suffix == ".part"  # nobody takes it for one of the finished files
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError), new_file(path) as part:
        part.write_text("half \ud800")  # the disk is full, say
    assert path.read_text() == "new"
    assert names(path.parent) == {"a.txt"}
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # others of the group may read it


def test_space_is_taken_beforehand(tmp_path):
    with new_file(tmp_path / "a.hidden", 100) as part:
        assert part.stat().st_size == 100
    with pytest.raises(OSError, match="space|large"), new_file(tmp_path / "b.hidden", 2**60):
        pass
    assert names(tmp_path) == {"a.hidden"}


def test_a_folder_to_fill_goes_with_what_is_left_in_it(tmp_path):
    parent = tmp_path / "deep" / "er"
    with new_folder(parent) as part:
        (part / "a").mkdir()
        (part / "b").write_text("")
        (part / "a").rename(parent / "a")
    assert names(parent) == {"a"}
    with new_folder(parent) as part:
        part.rename(parent / "b")  # nothing is left in it
    assert names(parent) == {"a", "b"}


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    for name in ("orphan", "others", "fresh"):
        (tmp_path / f".panda-{name}").write_bytes(b"")
        (tmp_path / f".panda-{name}-folder").mkdir()
        (tmp_path / f".panda-{name}-folder" / "file").write_bytes(b"")
    for path in tmp_path.iterdir():
        aged(path, 0 if "fresh" in path.name else 1000)
    kept = {".panda-others", ".panda-others-folder", ".panda-fresh", ".panda-fresh-folder"}
    held = [os.open(tmp_path / name, os.O_RDONLY) for name in kept if "others" in name]
    for handle in held:
        fcntl.flock(handle, fcntl.LOCK_EX)
    with new_file(tmp_path / "a.txt") as part:
        assert names(tmp_path) == {*kept, part.name}
    assert names(tmp_path) == {*kept, "a.txt"}
    for handle in held:
        os.close(handle)


def one_at_a_time(folder: Path, row: int):
    with alone(folder):
        seen = len(list(folder.glob("*.made")))
        time.sleep(0.02)
        (folder / f"{seen}.made").write_text(str(row))


def test_processes_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=one_at_a_time, args=(tmp_path, row)) for row in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(names(tmp_path)) == [f"{i}.made" for i in range(6)]  # so each saw what the others had made


def test_who_comes_second_says_so_and_waits_for_the_first_to_end(tmp_path, caplog):
    folder, order = tmp_path / "deep" / "er", []

    def second():
        with alone(folder):
            order.append("second")

    with caplog.at_level("INFO"), ThreadPoolExecutor(1) as pool:
        with alone(folder):
            waiting, end = pool.submit(second), time.monotonic() + 10
            while "waiting for it" not in caplog.text and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(0.05)
            order.append("first")
        waiting.result(10)
    assert f"Another process is making files in {folder}: waiting for it." in caplog.text
    assert order == ["first", "second"]


def test_a_file_system_without_locks_lets_everyone_in(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with alone(tmp_path), new_file(tmp_path / "a.txt") as part, new_folder(tmp_path) as folder:
        assert part.exists()
        assert folder.is_dir()
    assert names(tmp_path) == {"a.txt"}
