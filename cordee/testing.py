"""Runs a function on several ranks of this machine: gloo, a file store, a deadline.

For tests, examples and notebooks. The function and its arguments travel by name and value to other
processes, so the function must live at the top of a module. On Linux these are forks of a server
that has torch and the trainer imported: a world costs a tenth of a second, not imports of two. The
first rank to fail ends the others, and its traceback is what is raised. `slowed` makes a device of
unequal speed out of a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cordee.dist.start import Launched, World
from cordee.dist.start import world as join
from cordee.errors import RunError

PATHS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""Environment variables that say where a Python that starts finds modules."""

MEETINGS = 3
"""How often the ranks of a world try to find each other."""

PRELOADED = ["cordee.train"]
"""Modules that the server imports when the first world starts; later additions do nothing."""


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int,
    threads: int = 1,
    deadline_s: float = 300.0,
) -> list[Any]:
    """`function(world, *arguments)` on `ranks` processes; returns what each returned, by rank.

    Environment variables are those of the first call, where the server took them. Raises RunError
    with the first failing rank's traceback, or when the deadline passes.
    """
    # Elsewhere a fork of what has loaded the system's own libraries is not safe, or not there.
    linux = sys.platform.startswith("linux")
    context: Any = multiprocessing.get_context("forkserver" if linux else "spawn")
    if linux:
        context.set_forkserver_preload(PRELOADED)
    for _ in range(MEETINGS - 1):
        # gloo now and then fails to connect beside other worlds; nothing has been called by then.
        with suppress(_NotMet):
            return _world(context, function, arguments, ranks, threads, deadline_s)
    return _world(context, function, arguments, ranks, threads, deadline_s)


class _NotMet(RunError):
    """The ranks have not found each other."""


def _world(
    context: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    ranks: int,
    threads: int,
    deadline_s: float,
) -> list[Any]:
    """One world from its start to its end; the function is called once all ranks have met."""
    with tempfile.TemporaryDirectory(prefix="cordee-") as folder:
        pairs = [context.Pipe() for _ in range(ranks)]
        receivers = [receiver for receiver, _ in pairs]
        processes = []
        for rank, (_, sender) in enumerate(pairs):
            told = Launched(rank, ranks, rank, str(Path(folder) / "store"), True)
            paths = {name: os.environ.get(name) for name in PATHS}
            job = (told, threads, deadline_s, sender, paths, function, arguments)
            processes.append(context.Process(target=_rank, args=job, daemon=True))
        try:
            with _no_current_folder():
                for process in processes:
                    process.start()
            for _, sender in pairs:
                sender.close()
            try:
                _collect(receivers, deadline_s)
            except RunError as error:
                raise _NotMet(error.what, values=error.values, fix=error.fix) from error
            for receiver in receivers:
                receiver.send(None)
            return _collect(receivers, deadline_s, fetched=True)
        finally:
            for process in processes:
                process.join(1.0)
                if process.is_alive():
                    process.kill()
                    process.join()


@contextmanager
def slowed(pid: int, part: float = 1 / 3, period_s: float = 0.06) -> Iterator[None]:
    """While this lasts, process `pid` runs that part of the time and is stopped for the rest."""
    enough = threading.Event()

    def stop_and_go() -> None:
        with suppress(ProcessLookupError):
            while not enough.wait(part * period_s):
                os.kill(pid, signal.SIGSTOP)
                enough.wait((1 - part) * period_s)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


@contextmanager
def _no_current_folder() -> Iterator[None]:
    """While this lasts, a Python that starts imports nothing of the current folder, and finds this
    very package: the server would take what lies there for the modules that it imports first."""
    before = {name: os.environ.get(name) for name in PATHS}
    root = str(Path(__file__).resolve().parents[1])
    found = PathFinder.find_spec("cordee", sys.path if sys.flags.safe_path else sys.path[1:])
    if found is None or not Path(str(found.origin)).resolve().is_relative_to(root):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, before["PYTHONPATH"])))
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        _put(before)


def _put(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _rank(
    told: Launched,
    threads: int,
    deadline_s: float,
    sender: Connection,
    paths: Mapping[str, str | None],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    _end_with_launcher()
    _put(paths)
    try:
        with join(told, "cpu", threads, deadline_s) as here:
            sender.send((True, None))
            sender.recv()  # all have met
            sender.send((True, function(here, *arguments)))
            # A tensor travels as a handle that this process serves: stay until it was fetched.
            with suppress(EOFError):
                sender.recv()
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def _end_with_launcher() -> None:
    """Ends this rank when the process that called `launch` ends. The system's own signal of a
    parent's death is no help: the parent is the server, which lives as long as its forks."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _collect(receivers: list[Connection], deadline_s: float, *, fetched: bool = False) -> list[Any]:
    """A word of every rank; `fetched`: each is told that its word is here."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + deadline_s
    left = dict(zip(receivers, range(len(receivers)), strict=True))
    while left:
        ready = wait(list(left), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RunError(
                "ranks did not end before the deadline",
                values={"ranks": sorted(left.values()), "deadline_s": deadline_s},
                fix="a longer deadline_s, or look for a collective that not all ranks reach",
            )
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = left.pop(receiver)
            try:
                good, value = receiver.recv()
                if good and fetched:
                    receiver.send(None)
            except EOFError:
                good, value = False, "it died without a word"
            if not good:
                raise RunError(f"rank {rank} failed first:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


__all__ = ["World", "launch", "slowed"]
