"""Things that are done by several processes at a time, each with its share of the machine."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_all_start_methods, get_context
from typing import Any, TypeVar

import torch

from panda_lightning.command.endings import pass_over_imports, silence
from panda_lightning.command.words import find_own_classes
from panda_lightning.runtime.systems import ENDING, TRY_AGAIN
from panda_lightning.types import PandaError

Thing = TypeVar("Thing")
Done = TypeVar("Done")


def done_by(jobs: int, do: Callable[[Thing], Done], things: Sequence[Thing]) -> Iterator[Done]:
    """What a function returns for each of some things, as it comes.

    A process that is free takes the next thing. All of them end with this one, at the latest when they are done with
    the thing in hand; where this one is told to end, they are told so too.

    Args:
        jobs: How many processes.
        do: Can be pickled, as can what it takes and returns.
        things: For which it is called.

    Raises:
        Exception: What ``do`` raised.
        PandaError: If a process was killed.
        SystemExit: With the status of a process that has ended; told to end, with 75 where one of them can go on.
    """
    context, todo = _context(), iter(things)
    processes: dict[Any, Any] = {}  # by this end of the pipe

    def give(pipe: Any) -> None:
        try:
            pipe.send(next(todo))
        except StopIteration:
            pipe.close()
            processes.pop(pipe).join()
        except BrokenPipeError:
            pass  # the process has ended, which is the next that is received

    with _ended_by_a_signal():
        try:
            for share in _shares(min(jobs, len(things))):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(do, theirs, *share))
                process.start()
                processes[mine] = process
                theirs.close()
                give(mine)
            while processes:
                for pipe in connection.wait(list(processes)):
                    yield _received(pipe, processes)
                    give(pipe)
        except SystemExit as told:
            _end(processes.values())
            again = any(process.exitcode == TRY_AGAIN for process in processes.values())
            raise SystemExit(TRY_AGAIN if again else told.code) from None
        finally:
            _end(processes.values())


def _end(processes: Iterable[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _context() -> Any:
    """How processes start: as copies of one that has imported everything, where there are such, else on their own.

    A copy of this process would have its threads' locks without the threads.
    """
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["panda_lightning.tables.rows"])
    return context


def _serve(do: Callable[[Any], Any], pipe: Any, threads: int, gpus: str | None) -> None:
    torch.set_num_threads(threads)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # before anything asks for a GPU
    silence()
    pass_over_imports()
    find_own_classes()
    with suppress(EOFError, BrokenPipeError):  # nobody is there any more
        while True:
            thing = pipe.recv()
            try:
                found: Any = do(thing)
            except Exception as error:
                found = error
            pipe.send(found)


def _received(pipe: Any, processes: dict[Any, Any]) -> Any:
    try:
        found = pipe.recv()
    except (EOFError, ConnectionResetError):
        process = processes.pop(pipe)
        process.join()
        code = process.exitcode
        if code < 0 and -code not in (signal.SIGINT, *ENDING):
            raise PandaError(
                f"a process that made a run was killed by signal {-code}, perhaps because memory ran out: run the same "
                "command again, with fewer --jobs."
            ) from None
        raise SystemExit(128 - code if code < 0 else code or TRY_AGAIN) from None
    if isinstance(found, Exception):
        raise found
    return found


def _shares(jobs: int) -> list[tuple[int, str | None]]:
    """Threads and GPUs of each process; several share a GPU where there are fewer."""
    threads = max(1, torch.get_num_threads() // max(1, jobs))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    own = [gpus[job::jobs] or (gpus[job % len(gpus) :][:1] if gpus else []) for job in range(jobs)]
    return [(threads, ",".join(some) if some else None) for some in own]


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """What tells a run to end does so as Ctrl-C does, by an exception."""
    before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
