"""Runs a function on several ranks of this machine: gloo, a file store, a deadline.

For tests, examples and notebooks. The function and its arguments travel by name and value to other
processes, so the function must live at the top of a module. On Linux these are forks of a server
that has torch and the trainer imported: a world costs a tenth of a second, not imports of two. The
first rank to fail ends the others, and its traceback is what is raised. `throttle` makes a device
of unequal speed out of a process.
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

from cordee.dist.process_group import LaunchInfo, RankProcess, join_process_group
from cordee.errors import RunError

PATH_VARIABLES = ("PYTHONPATH", "PYTHONSAFEPATH")
"""Environment variables that say where a Python that starts finds modules."""

MAX_CONNECT_TRIES = 3
"""How often the ranks of a world try to find each other."""

PRELOAD_MODULES = ["cordee.training.worker"]
"""Modules that the server imports when the first world starts; later additions do nothing."""


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int,
    threads: int = 1,
    deadline_s: float = 300.0,
) -> list[Any]:
    """`function(world, *arguments)` on `ranks` processes; returns what each returned, by
    rank.

    Environment variables are those of the first call, where the server took them. Raises RunError
    with the first failing rank's traceback, or when the deadline passes.
    """
    # Elsewhere a fork of what has loaded the system's own libraries is not safe, or not there.
    is_linux = sys.platform.startswith("linux")
    context: Any = multiprocessing.get_context("forkserver" if is_linux else "spawn")
    if is_linux:
        context.set_forkserver_preload(PRELOAD_MODULES)
    for _ in range(MAX_CONNECT_TRIES - 1):
        # gloo now and then fails to connect beside other worlds; nothing has been called by then.
        with suppress(_ConnectError):
            return _run_world(context, function, arguments, ranks, threads, deadline_s)
    return _run_world(context, function, arguments, ranks, threads, deadline_s)


class _ConnectError(RunError):
    """The ranks have not found each other."""


def _run_world(
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
            launch_info = LaunchInfo(rank, ranks, rank, str(Path(folder) / "store"), True)
            path_variables = {name: os.environ.get(name) for name in PATH_VARIABLES}
            rank_args = (
                launch_info,
                threads,
                deadline_s,
                sender,
                path_variables,
                function,
                arguments,
            )
            processes.append(context.Process(target=_run_rank, args=rank_args, daemon=True))
        try:
            with _safe_import_path():
                for process in processes:
                    process.start()
            for _, sender in pairs:
                sender.close()
            try:
                _collect(receivers, deadline_s)
            except RunError as error:
                raise _ConnectError(error.message, values=error.values, fix=error.fix) from error
            for receiver in receivers:
                receiver.send(None)
            return _collect(receivers, deadline_s, acknowledges=True)
        finally:
            for process in processes:
                process.join(1.0)
                if process.is_alive():
                    process.kill()
                    process.join()


@contextmanager
def throttle(pid: int, fraction: float = 1 / 3, period_s: float = 0.06) -> Iterator[None]:
    """While this lasts, process `pid` runs that part of the time and is stopped for the rest."""
    stop_event = threading.Event()

    def stop_and_go() -> None:
        with suppress(ProcessLookupError):
            while not stop_event.wait(fraction * period_s):
                os.kill(pid, signal.SIGSTOP)
                stop_event.wait((1 - fraction) * period_s)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_event.set()
        thread.join()


@contextmanager
def _safe_import_path() -> Iterator[None]:
    """While this lasts, a Python that starts imports nothing of the current folder, and finds this
    very package: the server would take what lies there for the modules that it imports first."""
    previous_values = {name: os.environ.get(name) for name in PATH_VARIABLES}
    root = str(Path(__file__).resolve().parents[1])
    package_spec = PathFinder.find_spec("cordee", sys.path if sys.flags.safe_path else sys.path[1:])
    if package_spec is None or not Path(str(package_spec.origin)).resolve().is_relative_to(root):
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (root, previous_values["PYTHONPATH"]))
        )
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        _set_environment(previous_values)


def _set_environment(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _run_rank(
    launch_info: LaunchInfo,
    threads: int,
    deadline_s: float,
    sender: Connection,
    path_variables: Mapping[str, str | None],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    _exit_with_launcher()
    _set_environment(path_variables)
    try:
        with join_process_group(launch_info, "cpu", threads, deadline_s) as process:
            sender.send((True, None))
            sender.recv()  # all have met
            sender.send((True, function(process, *arguments)))
            # A tensor travels as a handle that this process serves: stay until it was fetched.
            with suppress(EOFError):
                sender.recv()
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def _exit_with_launcher() -> None:
    """Ends this rank when the process that called `launch` ends. The system's own signal of a
    parent's death is no help: the parent is the server, which lives as long as its forks."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def _collect(
    receivers: list[Connection], deadline_s: float, *, acknowledges: bool = False
) -> list[Any]:
    """A word of every rank; `acknowledges`: each is told that its word is here."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + deadline_s
    pending = dict(zip(receivers, range(len(receivers)), strict=True))
    while pending:
        ready_receivers = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready_receivers:
            raise RunError(
                "ranks did not end before the deadline",
                values={"ranks": sorted(pending.values()), "deadline_s": deadline_s},
                fix="a longer deadline_s, or look for a collective that not all ranks reach",
            )
        for receiver in ready_receivers:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                is_success, value = receiver.recv()
                if is_success and acknowledges:
                    receiver.send(None)
            except EOFError:
                is_success, value = False, "it died without a word"
            if not is_success:
                raise RunError(f"rank {rank} failed first:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


__all__ = ["RankProcess", "launch", "throttle"]
