"""How a process becomes a rank: reads the environment, joins the others, leaves cleanly.

The only reader of environment variables in the house. A launcher's variables (torchrun and
Kubernetes, Slurm, Open MPI, Ray, or our own `launch.py`) are taken as they are; without any, the
process is rank 0 of 1. A worker of our own supervisor (`fault/supervise.py`) is told its rank over
its line, generation by generation. Not here: starting other processes.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cordee.devices import BACKENDS, DEVICES, HOST_ONLY
from cordee.errors import ConfigError, RunError
from cordee.system import die_with_parent

RANK_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
"""Where launchers write rank, world size and local rank, in the order in which they are asked."""

HOST_RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""Where they write how many ranks this host has; Slurm writes the number of hosts instead."""

HOSTS = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")

LINE = "CORDEE_LINE"
"""Descriptors that a worker inherits: line, plan, mark, standard output, standard error."""
PLAN_FILE = "plan.json"
"""The plan of the newest start, in the run's folder."""
LOOPBACK = "lo"
"""The interface of a host to itself (Linux), which nobody else reaches."""
MOST_FILES = 1 << 20
"""Files that a process may have open, at most; more would only make tables."""
PARENT = "CORDEE_PARENT"
CACHE = "XDG_CACHE_HOME"
"""The user's folder for what can be made anew."""
LIMITS = (
    "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
"""Variables that hold the libraries of a CPU to fewer instructions than it has."""
LIFELINE = "CORDEE_LIFELINE"
"""The parent's process id, and the descriptor of a pipe whose other end it alone has."""
VARIABLES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "compatible": {
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}  # fmt: skip
"""What run.arithmetic sets: PyTorch's own loops, MKL's and oneDNN's. They are read when torch is
imported, or at a library's first call."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has started these ranks anew."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How OpenMP's threads wait for each other: the standard's own name, libgomp's and libomp's."""


@dataclass(frozen=True)
class Launched:
    """What a launcher told this process. `store` is a rendezvous file (of tests), else empty;
    `hosts` is 1 unless the launcher says otherwise. A worker of our supervisor has a `line`, and
    descriptors of the `plan`, of the `mark` where it notes what it does, and of the `terminal`; its
    rank comes later."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: str = ""
    by_launcher: bool = False
    hosts: int = 1
    line: int = -1
    plan: int = -1
    mark: int = -1
    terminal: tuple[int, int] = (1, 2)

    @property
    def supervised(self) -> bool:
        """Whether this process is a worker of our own supervisor."""
        return self.line >= 0

    def read_plan(self) -> str:
        """The plan that our supervisor made (JSON); empty when there is none."""
        if self.plan < 0:
            return ""
        return os.pread(self.plan, os.fstat(self.plan).st_size, 0).decode()


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` is a torch device string ("cpu", "cuda:0")."""

    rank: int
    size: int
    local_rank: int
    device: str
    host: str
    pid: int

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """Reads the launcher's variables; ConfigError when they contradict each other."""
    env = os.environ if environment is None else environment
    if LINE in env:
        line, plan, mark, out, err = map(int, env[LINE].split(","))
        told = Launched(by_launcher=True, line=line, plan=plan, mark=mark)
        return replace(told, terminal=(out, err))
    for rank_name, size_name, local_name in RANK_NAMES:
        if rank_name not in env or size_name not in env:
            continue
        try:
            rank, size = int(env[rank_name]), int(env[size_name])
            local = int(env.get(local_name, rank))
            hosts = _hosts(env, rank_name, size)
        except ValueError as error:
            raise ConfigError(
                "the launcher's variables are not numbers",
                values={name: env.get(name) for name in (rank_name, size_name, local_name)},
                fix=f"unset {rank_name}, or set it to a rank",
            ) from error
        if not 0 <= rank < size:
            raise ConfigError(
                "the launcher's rank lies outside its world",
                values={rank_name: rank, size_name: size},
                fix=f"{rank_name}=0 with {size_name}=1",
            )
        # Slurm sets these for a single interactive shell too: a world of one is no launcher.
        if size > 1 or rank_name == "RANK":
            return Launched(rank, size, local, "", True, hosts)
    return Launched()


def _hosts(env: Mapping[str, str], rank_name: str, size: int) -> int:
    """How many hosts the ranks of this world are on, as far as the launcher tells."""
    if rank_name.startswith("SLURM"):
        told = next((int(env[name]) for name in HOSTS if name in env), 1)
        return max(1, min(told, size))
    of_host = next((int(env[name]) for name in HOST_RANKS if name in env), size)
    return -(-size // max(1, of_host))


def compiler(device: str) -> tuple[str, bool]:
    """What torch.compile would build its kernels with on a kind of device: (name, whether it and
    Python's headers are there)."""
    names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if DEVICES[device].compiler == "CC":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    found = any(shutil.which(name) for name in names)
    return " or ".join(names), found and headers.exists()


def cache_folder() -> Path | None:
    """Where what can be made anew is kept for this user; None where there is no home folder."""
    place = os.environ.get(CACHE, "")
    if os.path.isabs(place):  # the XDG specification ignores relative ones
        return Path(place) / "cordee"
    try:
        return Path.home() / ".cache" / "cordee"
    except RuntimeError:
        return None


def instruction_limits() -> dict[str, str]:
    """Those of LIMITS that are set, with their values."""
    return _set_of(LIMITS)


def loopback_environment() -> dict[str, str]:
    """This environment for processes whose peers are all on this host."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    ours = {"GLOO_SOCKET_IFNAME": names[0]} if names else {}
    return {**os.environ, **passive_threads(), **ours}


def follow_parent() -> None:
    """Dies with the process that launched this one, so that no orphan trains on."""
    parent = os.environ.get(PARENT)
    if parent is not None:
        die_with_parent(int(parent), int(os.environ[LIFELINE]))


def python_command() -> list[str]:
    """How this very package is started as a command, whatever else is called cordee: by its path,
    and with nothing of the current folder imported (-P)."""
    return [sys.executable, "-P", str(Path(__file__).resolve().parents[1] / "__main__.py")]


def module_command(name: str) -> list[str]:
    """The same for a module of the package that is a program of its own."""
    return [*python_command(), "--module", name]


def raise_limits() -> None:
    """As many open files as this process may have: a thousand, the usual default, is soon taken up
    by strangers that connect and say nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS says a limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def passive_threads(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What lets OpenMP's threads sleep while they wait for each other; nothing where the user says
    how they wait.

    Threads that spin hold a core that the one they wait for needs, as soon as another program wants
    one: two threads a rank were 20 times slower than one then (benchmarks/threads.py measures it).
    """
    env = os.environ if environment is None else environment
    return {} if any(name in env for name in WAITING) else {WAITING[0]: "PASSIVE"}


def wait_passively() -> None:
    """Does so in this process, and in those that it starts. Before torch is imported: OpenMP reads
    its variables once, when it is loaded."""
    os.environ.update(passive_threads())


def worker_environment(
    descriptors: Sequence[int], lifeline: int, threads: int, interface: str
) -> dict[str, str]:
    """The environment of a worker that our supervisor starts; `interface`: the network interface
    that its peers reach it by ("": whatever this host's name stands for)."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
    # On one host a user's own choice stands; with several it must be the one that others dial.
    ours = {n: interface for n in names if not (interface == LOOPBACK and n in os.environ)}
    return {
        **os.environ,
        **passive_threads(),
        **ours,
        LINE: ",".join(map(str, descriptors)),
        PARENT: str(os.getpid()),
        LIFELINE: str(lifeline),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def broadcast_text(text: str) -> str:
    """Rank 0's text on every rank of the process group."""
    import torch
    import torch.distributed as dist

    size = torch.tensor([len(text.encode())])
    dist.broadcast(size, 0)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if dist.get_rank() == 0:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return data.numpy().tobytes().decode()


def chosen_variables() -> dict[str, str]:
    """Of the variables that choose a CPU's code, those that this process was given."""
    return _set_of(sorted({name for values in VARIABLES.values() for name in values}))


def _set_of(names: Sequence[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


@contextmanager
def arithmetic_environment(arithmetic: str) -> Iterator[None]:
    """The environment of run.arithmetic, for processes that are started in it."""
    before = {name: os.environ.get(name) for name in VARIABLES.get(arithmetic, {})}
    os.environ.update(VARIABLES.get(arithmetic, {}))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def may_take(arithmetic: str) -> bool:
    """Whether this very process can still compute so: torch is not imported, or was with the same
    variables."""
    wants = VARIABLES.get(arithmetic, {})
    return "torch" not in sys.modules or all(os.environ.get(n) == v for n, v in wants.items())


def take_arithmetic(arithmetic: str) -> None:
    """Lets this very process compute so. ConfigError: torch is imported, and so it is too late."""
    wants = VARIABLES.get(arithmetic, {})
    has = {name: os.environ.get(name, "") for name in wants}
    if not may_take(arithmetic):
        raise ConfigError(
            "torch is imported already, and chose its instructions then",
            values={"run.arithmetic": arithmetic, **has},
            fix="before Python starts: " + " ".join(f"{n}={v}" for n, v in wants.items()),
        )
    os.environ.update(wants)


@contextmanager
def world(
    told: Launched, device: str, threads: int, timeout_s: float, *, always: bool = False,
    store: Any = None, mixed: bool = False,
) -> Iterator[World]:  # fmt: skip
    """Joins the process group, pins threads, and leaves the group at the end, whatever happened.

    `device` is a kind (`devices.py`); `always`: make a group also of one process (FSDP2 needs one);
    `store`: the rendezvous, a torch Store (None: what the launcher told); `mixed`: other ranks are
    on devices of another kind.
    Raises RunError when the others cannot be reached, ConfigError when torch has no such device.
    """
    import torch  # late: errors above must not cost an import of torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    random.seed(0)
    torch.manual_seed(0)
    place = "cpu"
    if device != "cpu":
        _check_accelerator(device, told.local_rank)
        torch.accelerator.set_device_index(told.local_rank)
        place = f"{device}:{told.local_rank}"
    backend = HOST_ONLY if mixed and device != "cpu" else BACKENDS[device]
    if told.size > 1 or (told.by_launcher and store is None):
        _join(told, backend, timeout_s, store)
    elif always:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield World(told.rank, told.size, told.local_rank, place, socket.gethostname(), os.getpid())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_accelerator(device: str, index: int) -> None:
    """ConfigError when torch has no such device: paper only knows what the kernel shows."""
    import torch

    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here is not None else 0
    if here is None or here.type != device or index >= count:
        raise ConfigError(
            f"this torch has no device {device}:{index}",
            values={"torch": torch.__version__, "devices": f"{count} {here.type if here else ''}"},
            fix="launch.device=cpu, or a torch and a driver for that device",
        )


def _join(told: Launched, backend: str, timeout_s: float, store: Any) -> None:
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    try:
        given = store
        if given is None and RESTARTS in os.environ and not told.store:
            # torchrun keeps its store over restarts, with the addresses of the dead in it.
            meet, under = dist.rendezvous, dist.PrefixStore  # type: ignore[attr-defined]
            found, _, _ = next(meet("env://", told.rank, told.size, timeout=limit))
            given = under(f"cordee/{os.environ[RESTARTS]}", found)
        method = None if given is not None else f"file://{told.store}" if told.store else "env://"
        dist.init_process_group(
            backend,
            init_method=method,
            store=given,
            rank=told.rank,
            world_size=told.size,
            timeout=limit,
        )
    except (dist.DistError, ValueError, OSError, RuntimeError) as error:
        if store is not None:  # the generation's end, which its worker knows of
            raise
        address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        busy = "in use" in str(error) or "EADDRINUSE" in str(error)
        if busy:
            raise ConfigError(
                "the rendezvous port is in use by another process",
                values={"MASTER_ADDR:MASTER_PORT": address, "rank": told.rank},
                fix="set MASTER_PORT to a free port (0 lets torchrun choose with --standalone)",
            ) from error
        raise RunError(
            "the ranks could not find each other",
            values={"rank": told.rank, "world": told.size, "at": told.store or address},
            fix="start every rank with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
        ) from error
