"""How a process becomes a rank: reads the environment, joins the others, leaves cleanly.

The only reader of environment variables. A launcher's (torchrun and Kubernetes, Slurm, Open MPI,
Ray) are taken as they are; without any, the process is rank 0 of 1. A worker of our own supervisor
gets its rank over its channel, generation by generation.
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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from cordee.errors import ConfigError, RunError
from cordee.hardware.devices import BACKENDS, DEVICES, HOST_GLOO
from cordee.hardware.system import die_with_parent

RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
"""Where launchers write rank, world size and local rank, in the order in which they are asked."""

LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""Where they write how many ranks this host has; Slurm writes the number of hosts instead."""

HOST_COUNT_VARIABLES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")

CHANNEL_VARIABLE = "CORDEE_LINE"
"""Descriptors that a worker inherits: channel, config, progress, standard output and error."""
PLAN_FILE = "plan.json"
"""The plan of the newest start, in the run's folder."""
LOOPBACK_INTERFACE = "lo"
"""The interface of a host to itself (Linux), which nobody else reaches."""
MAX_OPEN_FILES = 1 << 20
"""Files that a process may have open, at most; more would only make tables."""
PARENT_VARIABLE = "CORDEE_PARENT"
CACHE_VARIABLE = "XDG_CACHE_HOME"
"""The user's folder for what can be made anew."""
CPU_LIMIT_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
"""Variables that hold the libraries of a CPU to fewer instructions than it has."""
LIFELINE_VARIABLE = "CORDEE_LIFELINE"
"""The parent's process id, and the descriptor of a pipe whose other end it alone has."""
ARITHMETIC_VARIABLES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "compatible": {
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}  # fmt: skip
"""What run.arithmetic sets: PyTorch's own loops, MKL's and oneDNN's. They are read when torch is
imported, or at a library's first call."""
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has started these ranks anew."""

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How OpenMP's threads wait for each other: the standard's own name, libgomp's and libomp's."""


@dataclass(frozen=True)
class LaunchInfo:
    """What a launcher told this process. `store_file` is a rendezvous file (of tests), else empty;
    `host_count` is 1 unless the launcher says otherwise. A worker of our supervisor has a
    `channel_descriptor`, a `config_descriptor` to read its run and plan from, a
    `progress_descriptor` to note in what it does, and the `terminal_descriptors`; its rank comes
    later."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store_file: str = ""
    has_launcher: bool = False
    host_count: int = 1
    channel_descriptor: int = -1
    config_descriptor: int = -1
    progress_descriptor: int = -1
    terminal_descriptors: tuple[int, int] = (1, 2)

    @property
    def is_supervised(self) -> bool:
        """Whether this process is a worker of our own supervisor."""
        return self.channel_descriptor >= 0

    def read_config(self) -> str:
        """What our supervisor has every worker do (`launcher/prepare.py`, JSON)."""
        size = os.fstat(self.config_descriptor).st_size
        return os.pread(self.config_descriptor, size, 0).decode()


@dataclass(frozen=True)
class RankProcess:
    """This process among its peers. `device` is a torch device string ("cpu", "cuda:0")."""

    rank: int
    size: int
    local_rank: int
    device: str
    host: str
    pid: int

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def read_launch_info(environment: Mapping[str, str] | None = None) -> LaunchInfo:
    """Reads the launcher's variables; ConfigError when they contradict each other."""
    env = os.environ if environment is None else environment
    if CHANNEL_VARIABLE in env:
        channel, config, progress, stdout, stderr = map(int, env[CHANNEL_VARIABLE].split(","))
        return LaunchInfo(
            has_launcher=True,
            channel_descriptor=channel,
            config_descriptor=config,
            progress_descriptor=progress,
            terminal_descriptors=(stdout, stderr),
        )
    for rank_name, size_name, local_name in RANK_VARIABLES:
        if rank_name not in env or size_name not in env:
            continue
        try:
            rank, size = int(env[rank_name]), int(env[size_name])
            local_rank = int(env.get(local_name, rank))
            host_count = _count_hosts(env, rank_name, size)
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
            return LaunchInfo(rank, size, local_rank, "", True, host_count)
    return LaunchInfo()


def _count_hosts(env: Mapping[str, str], rank_name: str, size: int) -> int:
    """How many hosts the ranks of this world are on, as far as the launcher tells."""
    if rank_name.startswith("SLURM"):
        host_count = next((int(env[name]) for name in HOST_COUNT_VARIABLES if name in env), 1)
        return max(1, min(host_count, size))
    local_size = next((int(env[name]) for name in LOCAL_SIZE_VARIABLES if name in env), size)
    return -(-size // max(1, local_size))


def find_compiler(device: str) -> tuple[str, bool]:
    """What torch.compile would build its kernels with on a kind of device: (name, whether it and
    Python's headers are there)."""
    names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if DEVICES[device].compiler == "CC":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    has_compiler = any(shutil.which(name) for name in names)
    return " or ".join(names), has_compiler and headers.exists()


def cache_folder() -> Path | None:
    """Where what can be made anew is kept for this user; None where there is no home folder."""
    cache_home = os.environ.get(CACHE_VARIABLE, "")
    if os.path.isabs(cache_home):  # the XDG specification ignores relative ones
        return Path(cache_home) / "cordee"
    try:
        return Path.home() / ".cache" / "cordee"
    except RuntimeError:
        return None


def instruction_limits() -> dict[str, str]:
    """Those of LIMITS that are set, with their values."""
    return _present_variables(CPU_LIMIT_VARIABLES)


def loopback_environment() -> dict[str, str]:
    """This environment for processes whose peers are all on this host."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    interface_variables = {"GLOO_SOCKET_IFNAME": names[0]} if names else {}
    return {**os.environ, **passive_wait_variables(), **interface_variables}


def exit_with_parent() -> None:
    """Dies with the process that launched this one, so that no orphan trains on."""
    parent_pid = os.environ.get(PARENT_VARIABLE)
    if parent_pid is not None:
        die_with_parent(int(parent_pid), int(os.environ[LIFELINE_VARIABLE]))


def python_command() -> list[str]:
    """How this very package is started as a command, whatever else is called cordee: by its path,
    and with nothing of the current folder imported (-P)."""
    return [sys.executable, "-P", str(Path(__file__).resolve().parents[1] / "__main__.py")]


def module_command(name: str) -> list[str]:
    """The same for a module of the package that is a program of its own."""
    return [*python_command(), "--module", name]


def raise_file_limit() -> None:
    """As many open files as this process may have: a thousand, the usual default, is soon taken up
    by strangers that connect and say nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < new_limit:
        with suppress(OSError, ValueError):  # macOS says a limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))


def passive_wait_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What lets OpenMP's threads sleep while they wait for each other; nothing where the user says
    how they wait.

    Threads that spin hold a core that the one they wait for needs, as soon as another program wants
    one: two threads a rank were 20 times slower than one then (benchmarks/threads.py measures it).
    """
    env = os.environ if environment is None else environment
    return {} if any(name in env for name in WAIT_VARIABLES) else {WAIT_VARIABLES[0]: "PASSIVE"}


def set_passive_wait() -> None:
    """Does so in this process, and in those that it starts. Before torch is imported: OpenMP reads
    its variables once, when it is loaded."""
    os.environ.update(passive_wait_variables())


def worker_environment(lifeline_descriptor: int, threads: int, interface: str) -> dict[str, str]:
    """The environment of workers that our supervisor starts, but for `channel_environment`;
    `interface`: the network interface that peers reach them by ("": whatever this host's name
    stands for)."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
    # On one host a user's own choice stands; with several it must be the one that others dial.
    interface_variables = {
        name: interface
        for name in names
        if not (interface == LOOPBACK_INTERFACE and name in os.environ)
    }
    return {
        **os.environ,
        **passive_wait_variables(),
        **interface_variables,
        PARENT_VARIABLE: str(os.getpid()),
        LIFELINE_VARIABLE: str(lifeline_descriptor),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def channel_environment(descriptors: Sequence[int]) -> dict[str, str]:
    """What a worker is told beside `worker_environment`: the descriptors that `LaunchInfo` has."""
    return {CHANNEL_VARIABLE: ",".join(map(str, descriptors))}


def set_environment(variables: Mapping[str, str]) -> None:
    """Sets these variables in this process."""
    os.environ.update(variables)


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


def present_cpu_variables() -> dict[str, str]:
    """Of the variables that choose a CPU's code, those that this process was given."""
    return _present_variables(
        sorted({name for values in ARITHMETIC_VARIABLES.values() for name in values})
    )


def _present_variables(names: Sequence[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


@contextmanager
def arithmetic_environment(arithmetic: str) -> Iterator[None]:
    """The environment of run.arithmetic, for processes that are started in it."""
    old_values = {name: os.environ.get(name) for name in ARITHMETIC_VARIABLES.get(arithmetic, {})}
    os.environ.update(ARITHMETIC_VARIABLES.get(arithmetic, {}))
    try:
        yield
    finally:
        for name, value in old_values.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def can_set_arithmetic(arithmetic: str) -> bool:
    """Whether this very process can still compute so: torch is not imported, or was with the same
    variables."""
    variables = ARITHMETIC_VARIABLES.get(arithmetic, {})
    return "torch" not in sys.modules or all(os.environ.get(n) == v for n, v in variables.items())


def set_arithmetic(arithmetic: str) -> None:
    """Lets this very process compute so. ConfigError: torch is imported, and so it is too late."""
    variables = ARITHMETIC_VARIABLES.get(arithmetic, {})
    current_values = {name: os.environ.get(name, "") for name in variables}
    if not can_set_arithmetic(arithmetic):
        raise ConfigError(
            "torch is imported already, and chose its instructions then",
            values={"run.arithmetic": arithmetic, **current_values},
            fix="before Python starts: " + " ".join(f"{n}={v}" for n, v in variables.items()),
        )
    os.environ.update(variables)


@contextmanager
def join_process_group(
    launch_info: LaunchInfo,
    device: str,
    threads: int,
    timeout_s: float,
    *,
    force_group: bool = False,
    store: Any = None,
    has_mixed_devices: bool = False,
) -> Iterator[RankProcess]:
    """Joins the process group, pins threads, and leaves the group at the end, whatever happened.

    `device` is a kind (`devices.py`); `force_group`: make a group also of one process (FSDP2 needs
    one); `store`: the rendezvous, a torch Store (None: what the launcher told);
    `has_mixed_devices`: other ranks are on devices of another kind. Raises RunError when the others
    cannot be reached, ConfigError when torch has no such device.
    """
    import torch  # late: errors above must not cost an import of torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    random.seed(0)
    torch.manual_seed(0)
    device_string = "cpu"
    if device != "cpu":
        _check_accelerator(device, launch_info.local_rank)
        torch.accelerator.set_device_index(launch_info.local_rank)
        device_string = f"{device}:{launch_info.local_rank}"
    backend = HOST_GLOO if has_mixed_devices and device != "cpu" else BACKENDS[device]
    if launch_info.size > 1 or (launch_info.has_launcher and store is None):
        _init_process_group(launch_info, backend, timeout_s, store)
    elif force_group:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield RankProcess(
            launch_info.rank, launch_info.size, launch_info.local_rank, device_string,
            socket.gethostname(), os.getpid(),
        )  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_accelerator(device: str, index: int) -> None:
    """ConfigError when torch has no such device: paper only knows what the kernel shows."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device_count = torch.accelerator.device_count() if accelerator is not None else 0
    if accelerator is None or accelerator.type != device or index >= device_count:
        raise ConfigError(
            f"this torch has no device {device}:{index}",
            values={
                "torch": torch.__version__,
                "devices": f"{device_count} {accelerator.type if accelerator else ''}",
            },
            fix="launch.device=cpu, or a torch and a driver for that device",
        )


def _init_process_group(
    launch_info: LaunchInfo, backend: str, timeout_s: float, store: Any
) -> None:
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    try:
        group_store = store
        if group_store is None and RESTARTS_VARIABLE in os.environ and not launch_info.store_file:
            # torchrun keeps its store over restarts, with the addresses of the dead in it.
            torch_dist: Any = dist  # not typed there
            base_store, _, _ = next(
                torch_dist.rendezvous("env://", launch_info.rank, launch_info.size, timeout=timeout)
            )
            prefix = f"cordee/{os.environ[RESTARTS_VARIABLE]}"
            group_store = torch_dist.PrefixStore(prefix, base_store)
        method = f"file://{launch_info.store_file}" if launch_info.store_file else "env://"
        dist.init_process_group(
            backend, init_method=None if group_store is not None else method, store=group_store,
            rank=launch_info.rank, world_size=launch_info.size, timeout=timeout,
        )  # fmt: skip
    except (dist.DistError, ValueError, OSError, RuntimeError) as error:
        if store is not None:  # the generation's end, which its worker knows of
            raise
        address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        if "in use" in str(error) or "EADDRINUSE" in str(error):
            raise ConfigError(
                "the rendezvous port is in use by another process",
                values={"MASTER_ADDR:MASTER_PORT": address, "rank": launch_info.rank},
                fix="set MASTER_PORT to a free port (0 lets torchrun choose with --standalone)",
            ) from error
        raise RunError(
            "the ranks could not find each other",
            values={"rank": launch_info.rank, "world": launch_info.size,
                    "at": launch_info.store_file or address},
            fix="start every rank with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
        ) from error  # fmt: skip
