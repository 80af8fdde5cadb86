import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from panda_lightning.runtime import systems
from panda_lightning.runtime.whole import alone, held, new_file, new_folder
from tests.windows import WINDOWS, lock_as_there

LOCK = ".panda.lock"


@pytest.fixture(autouse=True, params=["here", "as on Windows"])
def _locks(request, monkeypatch):
    if request.param != "here":
        lock_as_there(monkeypatch)


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
    if WINDOWS:
        return
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
    for name in ("orphan", "early orphan", "others", "fresh", "written"):
        (tmp_path / f".panda-{name}").mkdir()
        if name != "early orphan":  # killed before it could lock
            (tmp_path / f".panda-{name}" / LOCK).write_bytes(b"")
            (tmp_path / f".panda-{name}" / "new.part").mkdir()
            (tmp_path / f".panda-{name}" / "new.part" / "file").write_bytes(b"")
            aged(tmp_path / f".panda-{name}" / "new.part", 0 if name in ("fresh", "written") else 1000)
        aged(tmp_path / f".panda-{name}", 0 if name == "fresh" else 1000)
    kept = {".panda-others", ".panda-fresh", ".panda-written"}
    with held(tmp_path / ".panda-others" / LOCK), new_file(tmp_path / "a.txt") as part:
        assert names(tmp_path) == {*kept, part.parent.name}
    assert names(tmp_path) == {*kept, "a.txt"}


def one_at_a_time(folder: Path, row: int):
    with alone(folder):
        seen = len(list(folder.glob("*.made")))
        time.sleep(0.02)
        (folder / f"{seen}.made").write_text(str(row))


def test_processes_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context()
    workers = [context.Process(target=one_at_a_time, args=(tmp_path, row)) for row in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert names(tmp_path) == {LOCK, *(f"{i}.made" for i in range(6))}  # so each saw what the others had made


def write_again_and_again(folder: Path, row: int):
    for count in range(60):
        with new_file(folder / f"{row}-{count % 3}.txt") as part:
            part.write_text(str(row))
        with new_folder(folder) as part:
            (part / "a").write_text("")


def test_processes_that_write_into_one_folder_do_not_disturb_each_other(tmp_path):
    context = multiprocessing.get_context()
    workers = [context.Process(target=write_again_and_again, args=(tmp_path, row)) for row in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    files = {f"{row}-{count}.txt" for row in range(4) for count in range(3)}
    assert WINDOWS or names(tmp_path) == files  # there a look at what is to go may delay it


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
    assert f"Another process is writing files in {folder}: waiting for it." in caplog.text
    assert order == ["first", "second"]


def test_what_is_held_is_nobody_elses_and_free_again_afterwards(tmp_path):
    with held(tmp_path / "a") as mine:
        assert mine is not None
        with held(tmp_path / "a") as other, held(tmp_path / "b") as another:
            assert other is None
            assert another is not None
    with held(tmp_path / "a") as mine:
        assert mine is not None


def hold(path: Path, told):
    with held(path) as mine:
        told.send(mine is not None)
        time.sleep(60)


def test_a_lock_goes_with_the_process_that_is_killed(tmp_path):
    context = multiprocessing.get_context()
    ours, theirs = context.Pipe()
    worker = context.Process(target=hold, args=(tmp_path / "a", theirs))
    worker.start()
    assert ours.recv()
    with held(tmp_path / "a") as mine:
        assert mine is None
    worker.kill()
    worker.join()
    with held(tmp_path / "a") as mine:
        assert mine is not None


def test_a_file_system_without_locks_lets_everyone_in(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(systems, "_lock", no_locks)
    with alone(tmp_path), new_file(tmp_path / "a.txt") as part, new_folder(tmp_path) as folder:
        with alone(tmp_path):
            assert part.exists()
        assert folder.is_dir()
    assert names(tmp_path) == {LOCK, "a.txt"}


def test_a_folder_that_cannot_be_written_to_lets_everyone_in(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # the folder is removed before monkeypatch ends
        patch.setattr(os, "open", refused)
        with alone(tmp_path), alone(tmp_path):
            assert not names(tmp_path)
