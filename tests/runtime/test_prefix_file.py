import fcntl
import os

from panda_lightning.runtime.prefix_file import new_file


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    for name, age in (("orphan", 1000), ("others", 1000), ("fresh", 0)):
        path = tmp_path / f"{name}.part"
        path.write_bytes(b"")
        now = path.stat().st_mtime
        os.utime(path, (now - age, now - age))
    with (tmp_path / "others.part").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with new_file(tmp_path / "a.hidden", 100) as part:
            assert {p.name for p in tmp_path.iterdir()} == {"others.part", "fresh.part", part.name}
            assert part.stat().st_size == 100
    assert {p.name for p in tmp_path.iterdir()} == {"others.part", "fresh.part", "a.hidden"}
