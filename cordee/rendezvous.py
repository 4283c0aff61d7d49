"""Where the hosts of a run meet: addresses, the shared secret, what must be equal, the witness.

Paper: the launching process needs no torch. Hosts of one run share its folder (a network disk, or
one machine), in which the witness of their votes lies. Not here: messages (`fault/link.py`) and
votes (`fault/members.py`). Traded away: hosts without a common folder; their checkpoints would be
in pieces on several disks.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import uuid
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cordee import __version__
from cordee.checkpoint.folders import MOST_GENERATIONS, generations, scan
from cordee.config.load import flatten
from cordee.config.run import FREE_ON_RESUME, Run
from cordee.dist.start import chosen_variables, module_command
from cordee.errors import ConfigError
from cordee.fault.address import joined, resolve, split
from cordee.fault.hosts import Meeting
from cordee.fault.link import Link
from cordee.fault.members import Member
from cordee.fault.pace import Rules
from cordee.fault.schema import fault_of
from cordee.fault.secret import make_secret, read_secret
from cordee.fault.witness import FileWitness
from cordee.metrics.lines import records, step_of, whole_number
from cordee.metrics.records import number
from cordee.metrics.sinks import last_event, write_whole
from cordee.plan.cluster import processor_flags
from cordee.system import interface_of

CHECKPOINTS = "checkpoints"
WITNESS_FILE = "members.json"
FOLDER_ID = "members.id"
SECRET_FILE = "secret"
ARITHMETIC = "arithmetic"
"""Folder of the run's, of the fingerprints that its hosts have measured."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Names one start of one machine (Linux)."""

LOOPBACK = "127.0.0.1"

HOST_SILENCE_S = 3.0
"""Least silence of a host that is gone: machines with twice as many busy processes as cores leave
one unheard for a second or two."""


def meet(run: Run, data: str, inside: str, device: str) -> Meeting:
    """How this host's supervisor meets the others. `data` is the dataset's fingerprint, `inside`
    how an island is cut: both must be equal everywhere; `device` is the kind of this host's.
    ConfigError: no secret, or no way there."""
    folder, last = Path(run.run.dir), last_generation(Path(run.run.dir))
    rules = rules_of(run)

    def finished() -> bool:
        with suppress(ConfigError):
            return end_of(run) is not None
        return False

    if not several(run):
        return Meeting(
            None, lambda me, **given: Member(me, rules, last=last, **given), finished, device
        )
    fingerprint = measure(run, device) if run.promises_bits else ""
    witness = FileWitness(folder / WITNESS_FILE)
    secret_file = Path(run.launch.secret or folder / SECRET_FILE)
    if run.launch.join:
        secret = read_secret(secret_file)
        bind = joined(own_ip(run.launch.join), 0)
    else:
        secret, bind = make_secret(secret_file), run.launch.listen
        witness.forget()
        if not (folder / FOLDER_ID).exists():
            (folder / FOLDER_ID).write_text(uuid.uuid4().hex)
    hello = greeting(run, data, inside, device, fingerprint)
    return Meeting(
        lambda: Link.open(bind, secret, hello, fault_of=fault_of),
        lambda me, **given: Member(me, rules, last=last, witness=witness, **given),
        finished,
        device,
        run.launch.join,
    )


def rules_of(run: Run) -> Rules:
    """The seconds by which hosts judge each other."""
    fault = run.fault
    least_s = fault.host_silence_s or min(HOST_SILENCE_S, fault.silence_s)
    return Rules(silence_s=max(fault.silence_s, least_s), least_s=least_s)


def check_meeting(run: Run) -> None:
    """ConfigError when this host could not meet others as it is told to: found out before anything
    is written."""
    secret = Path(run.launch.secret or Path(run.run.dir) / SECRET_FILE)
    if run.launch.listen:
        Link.check(run.launch.listen)
        if os.path.lexists(secret):
            read_secret(secret)
    elif run.launch.join:
        own_ip(run.launch.join)
        read_secret(secret)


def several(run: Run) -> bool:
    """Whether this run has, or may get, more than one host by itself (no launcher)."""
    return bool(run.launch.listen or run.launch.join)


def greeting(
    run: Run, data: str, inside: str, device: str, fingerprint: str = ""
) -> dict[str, Any]:
    """What hosts of one run must have in common, by name. Where bits are promised, or compared,
    that includes the kind of device, the `fingerprint` of what it computes, and the very build of
    the libraries whose code computes the model."""
    bits = run.promises_bits
    keys = {key: value for key, value in flatten(run).items() if not key.startswith(FREE_ON_RESUME)}
    identity = Path(run.run.dir) / FOLDER_ID
    return {
        **keys,
        "cordee": __version__,
        "torch": _version("torch") if bits else _version("torch").partition("+")[0],
        "transformers": _version("transformers") if bits and run.model.hub else None,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "data's digest": data,
        "an island": inside,
        "device (bits are the same only among like devices)": device if bits else None,
        f"arithmetic (other bits; {remedy(run, device)})": fingerprint or None,
        "run.dir is one folder": identity.read_text() if identity.exists() else "",
        "about.name": socket.gethostname(),
    }


def remedy(run: Run, device: str) -> str:
    """What lets unlike machines take part in one run whose bits are promised, if anything does."""
    if device != "cpu":
        return "only like devices agree on bits"
    if run.run.arithmetic == "compatible":
        return "these processors agree under no setting"
    return "a new run takes both in with run.arithmetic=compatible run.precision=fp32"


def measure(run: Run, device: str) -> str:
    """The fingerprint of this host's arithmetic; once for each start of this machine, environment
    and build of torch, and then from the run's folder. Where it fails, why: nobody else says so."""
    boot = BOOT_ID.read_text() if BOOT_ID.exists() else uuid.uuid4().hex
    asked = [device, run.run.precision, run.run.arithmetic, __version__, _version("torch")]
    known = [boot, *asked, *sorted(processor_flags()), *chosen_variables().items()]
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    kept = Path(run.run.dir) / ARITHMETIC / name
    if kept.exists():
        return kept.read_text()
    found, well = _measured(run, device)
    if well:
        kept.parent.mkdir(exist_ok=True)
        write_whole(kept, found.encode())
    return found


def _measured(run: Run, device: str) -> tuple[str, bool]:
    """(the fingerprint or what went wrong, whether it went well), by a process of its own: this one
    has no torch, and workers are not there yet."""
    words = [device, run.run.precision, run.run.arithmetic]
    command = [*module_command("cordee.model.arithmetic"), *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = (done.stdout if done.returncode == 0 else done.stderr).split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    if done.returncode:
        return f"not known on {socket.gethostname()}: {last}", False
    return last, True


def interface(run: Run) -> str:
    """The network interface by which its ranks are reached: by other hosts, or, in a run on one
    host, by nobody else (the loopback); "": whatever this host's name stands for."""
    ip = LOOPBACK
    if several(run):
        ip = own_ip(run.launch.join) if run.launch.join else resolve(run.launch.listen)[0][1][0]
    return interface_of(ip)


def own_ip(towards: str) -> str:
    """This host's address on the way to HOST:PORT. ConfigError: there is no way."""
    try:
        family, place = resolve(towards)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect(place)
            return str(asking.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"the host to join cannot be reached: {error.strerror or error}",
            values={"launch.join": towards},
            fix="the address that the first host was given as --listen",
        ) from error


def last_generation(folder: Path) -> int:
    """The newest generation that a run's folder knows of; 0 when there is none."""
    told = (whole_number(e.get("generation")) or 0 for e in records(folder / "events.jsonl"))
    likely = (number for number in told if number <= MOST_GENERATIONS)
    return max([0, *generations(folder / CHECKPOINTS), *likely])


def end_of(run: Run) -> dict[str, Any] | None:
    """The last event of a run that is at its end: it says so, a checkpoint of that step is there,
    and a limit of the run is reached. None: it goes on, whatever a log says. ConfigError: it says
    so, and all its checkpoints are gone."""
    folder, limits = Path(run.run.dir), run.run
    last = last_event(folder)
    if last.get("event") != "finished":
        return None
    step, seconds = step_of(last) or 0, number(last.get("elapsed_s")) or 0.0
    tokens = whole_number(last.get("tokens")) or 0
    reached = (
        (0 < limits.steps <= step) or (0 < limits.tokens <= tokens) or bool(limits.epochs)
        or (0 < 60 * limits.minutes <= seconds + 0.001)
    )  # fmt: skip
    try:
        steps = [found.step for found in scan(folder / CHECKPOINTS) if found.complete]
    except OSError:
        steps = []
    if reached and last.get("saved", True) and not steps:
        raise ConfigError(
            "the run's records say that it is finished, and it has no checkpoint",
            values={"run.dir": str(folder), "step": step},
            fix="put checkpoints/ back; or run.dir=... elsewhere to train it again",
        )
    return last if reached and step in steps else None


def check_addresses(run: Run) -> None:
    """ConfigError for addresses that are none, or a host that both founds and joins."""
    for key in ("listen", "join"):
        if word := getattr(run.launch, key):
            split(word)
    if run.launch.listen and run.launch.join:
        raise ConfigError(
            "a host founds a run or joins one",
            values={"launch.listen": run.launch.listen, "launch.join": run.launch.join},
            fix=f"launch.join={run.launch.join} alone",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
