"""The machine profile: what this machine was measured to do, kept in the user's cache folder.

Reading and writing only, without torch; `cordee/launcher/probe.py` measures. A profile belongs to
one processor, core count, CPU quota and version of torch: `Host` says which.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from cordee.dist.process_group import cache_folder, instruction_limits
from cordee.hardware.system import read_text

FORMAT = 2
"""Version of the file; another one is measured anew."""

PRECISIONS = ("fp32", "bf16", "fp16")

MAX_BYTES = 1 << 16
"""A profile is a few hundred bytes; a larger file is none."""

NOISY_SPREAD = 0.30
"""Spread of repeated figures from which on a machine counts as busy."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a profile depends on. `quota` is the control group's CPU time in cores (0: no limit);
    `limits` are the environment variables that hold libraries to fewer instructions."""

    cpu: str
    cores: int
    quota: float
    torch: str
    limits: str = ""

    @property
    def digest(self) -> str:
        """Names the file: hosts that share a home folder do not overwrite each other's."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured rates. `products[precision][i]` is what `threads[i]` threads of one process reach
    together in matrix products (operations per second); likewise `passes` (bytes read and written
    per second by an element-wise operator in cache) and `memory` (the same beyond the caches)."""

    host: Host
    threads: tuple[int, ...]
    products: Mapping[str, tuple[float, ...]]
    passes: tuple[float, ...]
    memory: tuple[float, ...]
    regions: tuple[float, ...]
    """Seconds of an operator that is just large enough to be shared by the threads, which sleep
    until it wakes them."""
    operator_s: float
    """A small operator, forward and backward."""
    message_s: float
    """A small message from one local process to another, library included; 0: not measured."""
    reduce_s: float
    """A sum of a few numbers over two local processes; 0: not measured."""
    reduce_bytes_per_s: float
    """What each of two processes sends while they sum a few megabytes; 0: not measured."""
    device: str = ""
    """Name of the accelerator; empty: there is none."""
    device_products: Mapping[str, float]
    """Rates of one accelerator by precision, operations per second."""
    spread: float
    """Largest relative difference between repeated measurements of one figure."""
    seconds: float
    """How long the measurement took."""

    @property
    def is_noisy(self) -> bool:
        """Whether the machine was too busy for figures that repeat."""
        return self.spread > NOISY_SPREAD

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal profile back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Reads what `to_json` wrote; ValueError with the reason for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({type(error).__name__})") from error
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        version = values.pop("format", None)
        if version != FORMAT:
            raise ValueError(f"it was written by another version (format {version!r})")
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"its keys differ: {sorted(set(values) ^ names)}")
        return cls(**_validate_values(values))


def local_host() -> Host:
    """This process's processor, cores and quota, and the installed torch, without importing it."""
    info = read_text("/proc/cpuinfo")
    flags = field_of(info, "flags") or field_of(info, "Features")
    name = field_of(info, "model name") or field_of(info, "CPU part") or os.uname().machine
    instructions = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = "none"
    return Host(
        cpu=f"{name} ({instructions})",
        cores=usable_cores(),
        quota=cpu_quota(),
        torch=torch_version,
        limits=" ".join(f"{name}={value}" for name, value in instruction_limits().items()),
    )


def profile_path(host: Host) -> Path | None:
    """Where the profile of `host` lies; None where the user has no home folder."""
    folder = cache_folder()
    return None if folder is None else folder / f"profile-{host.digest}.json"


def read_profile(host: Host) -> tuple[Profile | None, str]:
    """The kept profile of `host`, or None and why ("": there is no file)."""
    path = profile_path(host)
    if path is None:
        return None, ""
    try:
        with open(path, "rb", opener=_open_regular) as stream:
            text = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read: {error}"
    try:
        if len(text) > MAX_BYTES:
            raise ValueError("it is too long")
        profile = Profile.from_json(text.decode())
    except ValueError as error:
        return None, f"{path} is no profile: {error}"
    if profile.host != host:
        return None, f"{path} is of another machine: {profile.host.cpu}"
    return profile, ""


def write_profile(profile: Profile) -> str:
    """Keeps the profile; says why not where that fails ("" when it is kept)."""
    path = profile_path(profile.host)
    if path is None:
        return "there is no home folder"
    temporary_path = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary_path = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "w") as stream:
            stream.write(profile.to_json() + "\n")
        os.replace(temporary_path, path)
    except OSError as error:
        if temporary_path is not None:
            Path(temporary_path).unlink(missing_ok=True)
        return f"{path.parent}: {error.strerror}"
    return ""


def profile_text(profile: Profile) -> str:
    """The profile in one line."""
    rates = ", ".join(
        f"{precision} {rate[-1] / 1e9:,.0f}" for precision, rate in profile.products.items()
    )
    threads = profile.threads[-1]
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    words = [f"products {rates} GFLOP/s ({count})", f"memory {profile.memory[-1] / 1e9:.1f} GB/s"]
    if profile.device_products:
        rates = ", ".join(f"{p} {r / 1e12:,.0f}" for p, r in profile.device_products.items())
        words.append(f"{profile.device} {rates} TFLOP/s")
    words.append(f"operator {profile.operator_s * 1e6:.1f} us")
    if profile.reduce_s:
        words.append(f"sum of 2 processes {profile.reduce_s * 1e6:.0f} us")
    if profile.is_noisy:
        words.append(f"machine busy: {spread_text(profile)}")
    return ", ".join(words)


def spread_text(profile: Profile) -> str:
    """How well the figures repeat."""
    if profile.spread > 1:
        return f"repeated figures differ by up to a factor of {1 + profile.spread:,.1f}"
    return f"repeated figures differ by up to {profile.spread:.0%}"


def usable_cores() -> int:
    """Cores that this process may use: its CPU mask, or fewer where a control group grants less
    time (at least one)."""
    mask = getattr(os, "sched_getaffinity", None)
    count = len(mask(0)) if mask else os.cpu_count() or 1
    quota = cpu_quota()
    return min(count, max(1, int(quota))) if quota else count


def cpu_quota() -> float:
    """CPU time that the control groups around this process grant, in cores; 0: no limit."""
    limits = [group_quota(folder) for folder in control_groups("cpu")]
    return min((limit for limit in limits if limit), default=0.0)


def group_quota(folder: Path) -> float:
    """CPU time that one control group grants, in cores; 0: no limit."""
    quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")  # version 2
    if not quota:
        quota = read_text(folder / "cpu.cfs_quota_us").strip()  # version 1; -1: no limit
        period = read_text(folder / "cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return 0.0


CGROUP_ROOT = Path("/sys/fs/cgroup")


def control_groups(
    controller: str, root: Path = CGROUP_ROOT, table: str | None = None
) -> list[Path]:
    """Folders of the control groups that this process is in, innermost first, up to the root: each
    of them limits it. `table`: the text of /proc/self/cgroup."""
    folders = []
    table = read_text("/proc/self/cgroup") if table is None else table
    for line in table.splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        top = root / names if names else root
        folder = Path(os.path.normpath(top / path.lstrip("/")))
        # From within a container the path may lie outside of what is mounted: the root counts.
        folder = folder if folder.is_relative_to(top) and folder.is_dir() else top
        folders += [p for p in (folder, *folder.parents) if p.is_relative_to(top)]
    return folders or [root]


def field_of(text: str, name: str) -> str:
    """The first `name: value` of such a file."""
    match = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _open_regular(path: str, flags: int) -> int:
    """Opens a regular file only: a pipe in its place would be waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a file")
    return descriptor


def _validate_values(values: dict[str, Any]) -> dict[str, Any]:
    """Values as the fields want them; ValueError for a wrong type or a rate that is none."""
    host, threads = values["host"], values["threads"]
    if not isinstance(host, dict) or set(host) != {f.name for f in fields(Host)}:
        raise ValueError("its host is none")
    if (
        not _are_positive_numbers(threads)
        or not all(isinstance(t, int) for t in threads)
        or threads[0] != 1
    ):
        raise ValueError("its threads are none")
    products, device = values["products"], values["device_products"]
    if not isinstance(products, dict) or set(products) != set(PRECISIONS):
        raise ValueError("its products are none")
    if not isinstance(device, dict) or (
        device
        and not (set(device) == set(PRECISIONS) and _are_positive_numbers(list(device.values())))
    ):
        raise ValueError("its device's products are none")
    for rates in (*products.values(), *(values[name] for name in _RATE_FIELDS)):
        if not _are_positive_numbers(rates) or len(rates) != len(threads):
            raise ValueError("a rate is missing")
    times = [values[name] for name in _TIME_FIELDS]
    if not all(_is_number(time) and time >= 0 for time in times) or not values["operator_s"]:
        raise ValueError("a time is missing")
    if not isinstance(values["device"], str):
        raise ValueError("its device is none")
    return {
        **values,
        "host": Host(**host),
        "threads": tuple(threads),
        "products": {precision: tuple(rates) for precision, rates in products.items()},
        **{name: tuple(values[name]) for name in _RATE_FIELDS},
    }


_RATE_FIELDS = ("passes", "memory", "regions")
_TIME_FIELDS = ("operator_s", "message_s", "reduce_s", "reduce_bytes_per_s", "spread", "seconds")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_positive_numbers(values: Any) -> bool:
    """Whether `values` is a list of numbers above 0."""
    return (
        isinstance(values, list) and bool(values) and all(_is_number(v) and v > 0 for v in values)
    )
