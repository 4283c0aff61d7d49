"""Where the hosts of a run meet: addresses, the shared secret, what must be equal, the witness.

Hosts of one run share its folder (a network disk, or one machine), in which the witness of their
votes lies. The launching process needs no torch.
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
from cordee.checkpoint.folders import MAX_GENERATION, list_generations, scan_step_folders
from cordee.config.load import flatten
from cordee.config.run import CHANGEABLE_ON_RESUME, Run
from cordee.dist.process_group import module_command, present_cpu_variables
from cordee.elastic.address import format_address, parse_address, resolve
from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.hosts import RendezvousConfig
from cordee.elastic.membership import Member
from cordee.elastic.message_schema import message_error
from cordee.elastic.secret import make_secret, read_secret
from cordee.elastic.transport import Transport
from cordee.elastic.witness import FileWitness
from cordee.errors import ConfigError
from cordee.hardware.system import interface_of
from cordee.planner.cluster import processor_flags
from cordee.report.jsonl import as_count, iter_records, record_step
from cordee.report.metrics_writer import last_event, write_atomically
from cordee.report.reader import finite_number

CHECKPOINT_DIR = "checkpoints"
WITNESS_FILE = "members.json"
FOLDER_ID_FILE = "members.id"
SECRET_FILE = "secret"
ARITHMETIC_DIR = "arithmetic"
"""Folder of the run's, of the fingerprints that its hosts have measured."""
BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
"""Names one start of one machine (Linux)."""

LOOPBACK = "127.0.0.1"

HOST_SILENCE_S = 3.0
"""Least silence of a host that is gone: machines with twice as many busy processes as cores leave
one unheard for a second or two."""


def make_rendezvous_config(
    run: Run, dataset_fingerprint: str, island_layout: str, device: str
) -> RendezvousConfig:
    """How this host's supervisor meets the others. `dataset_fingerprint` is the dataset's
    fingerprint, `island_layout` how an island is cut: both must be equal everywhere; `device` is
    the kind of this host's. ConfigError: no secret, or no way there."""
    folder, newest_generation = Path(run.run.dir), last_generation(Path(run.run.dir))
    timeouts = make_timeouts(run)

    def is_finished() -> bool:
        with suppress(ConfigError):
            return read_end_event(run) is not None
        return False

    if not is_multi_host(run):
        return RendezvousConfig(
            None,
            lambda host_id, **member_args: Member(
                host_id, timeouts, last_generation=newest_generation, **member_args
            ),
            is_finished,
            device,
        )
    fingerprint = measure_arithmetic(run, device) if run.requires_same_bits else ""
    witness = FileWitness(folder / WITNESS_FILE)
    secret_file = Path(run.launch.secret or folder / SECRET_FILE)
    if run.launch.join:
        secret = read_secret(secret_file)
        bind_address = format_address(own_ip(run.launch.join), 0)
    else:
        secret, bind_address = make_secret(secret_file), run.launch.listen
        witness.clear_view()
        if not (folder / FOLDER_ID_FILE).exists():
            (folder / FOLDER_ID_FILE).write_text(uuid.uuid4().hex)
    identity = run_identity(run, dataset_fingerprint, island_layout, device, fingerprint)
    return RendezvousConfig(
        lambda: Transport.open(bind_address, secret, identity, message_error=message_error),
        lambda host_id, **member_args: Member(
            host_id, timeouts, last_generation=newest_generation, witness=witness, **member_args
        ),
        is_finished,
        device,
        run.launch.join,
    )


def make_timeouts(run: Run) -> Timeouts:
    """The seconds by which hosts judge each other."""
    fault = run.fault
    least_s = fault.host_silence_s or min(HOST_SILENCE_S, fault.silence_s)
    return Timeouts(max_silence_s=max(fault.silence_s, least_s), min_silence_s=least_s)


def check_rendezvous(run: Run) -> None:
    """ConfigError when this host could not meet others as it is told to: found out before anything
    is written."""
    secret_file = Path(run.launch.secret or Path(run.run.dir) / SECRET_FILE)
    if run.launch.listen:
        Transport.check_bind(run.launch.listen)
        if os.path.lexists(secret_file):
            read_secret(secret_file)
    elif run.launch.join:
        own_ip(run.launch.join)
        read_secret(secret_file)


def is_multi_host(run: Run) -> bool:
    """Whether this run has, or may get, more than one host by itself (no launcher)."""
    return bool(run.launch.listen or run.launch.join)


def run_identity(
    run: Run, dataset_fingerprint: str, island_layout: str, device: str, fingerprint: str = ""
) -> dict[str, Any]:
    """What hosts of one run must have in common, by name. Where bits are promised, or compared,
    that includes the kind of device, the `fingerprint` of what it computes, and the very
    build of the libraries whose code computes the model."""
    promises_bits = run.requires_same_bits
    shared_settings = {
        key: value
        for key, value in flatten(run).items()
        if not key.startswith(CHANGEABLE_ON_RESUME)
    }
    folder_id_file = Path(run.run.dir) / FOLDER_ID_FILE
    return {
        **shared_settings,
        "cordee": __version__,
        "torch": _package_version("torch")
        if promises_bits
        else _package_version("torch").partition("+")[0],
        "transformers": _package_version("transformers")
        if promises_bits and run.model.hub
        else None,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "data's digest": dataset_fingerprint,
        "an island": island_layout,
        "device (bits are the same only among like devices)": device if promises_bits else None,
        f"arithmetic (other bits; {remedy(run, device)})": fingerprint or None,
        "run.dir is one folder": folder_id_file.read_text() if folder_id_file.exists() else "",
        "about.name": socket.gethostname(),
    }


def remedy(run: Run, device: str) -> str:
    """What lets unlike machines take part in one run whose bits are promised, if anything does."""
    if device != "cpu":
        return "only like devices agree on bits"
    if run.run.arithmetic == "compatible":
        return "these processors agree under no setting"
    return "a new run takes both in with run.arithmetic=compatible run.precision=fp32"


def measure_arithmetic(run: Run, device: str) -> str:
    """The fingerprint of this host's arithmetic; once for each start of this machine, environment
    and build of torch, and then from the run's folder. Where it fails, why: nobody else says so."""
    boot_id = BOOT_ID_FILE.read_text() if BOOT_ID_FILE.exists() else uuid.uuid4().hex
    arguments = [
        device,
        run.run.precision,
        run.run.arithmetic,
        __version__,
        _package_version("torch"),
    ]
    cache_key = [boot_id, *arguments, *sorted(processor_flags()), *present_cpu_variables().items()]
    name = hashlib.sha256(repr(cache_key).encode()).hexdigest()[:16]
    cache_file = Path(run.run.dir) / ARITHMETIC_DIR / name
    if cache_file.exists():
        return cache_file.read_text()
    fingerprint, is_valid = _run_measurement(run, device)
    if is_valid:
        cache_file.parent.mkdir(exist_ok=True)
        write_atomically(cache_file, fingerprint.encode())
    return fingerprint


def _run_measurement(run: Run, device: str) -> tuple[str, bool]:
    """(the fingerprint or what went wrong, whether it went well), by a process of its own: this one
    has no torch, and workers are not there yet."""
    arguments = [device, run.run.precision, run.run.arithmetic]
    command = [*module_command("cordee.model.arithmetic"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output_lines = (result.stdout if result.returncode == 0 else result.stderr).split("\n")
    last_line = next((line.strip() for line in reversed(output_lines) if line.strip()), "")
    if result.returncode:
        return f"not known on {socket.gethostname()}: {last_line}", False
    return last_line, True


def network_interface(run: Run) -> str:
    """The network interface by which its ranks are reached: by other hosts, or, in a run on one
    host, by nobody else (the loopback); "": whatever this host's name stands for."""
    ip = LOOPBACK
    if is_multi_host(run):
        ip = own_ip(run.launch.join) if run.launch.join else resolve(run.launch.listen)[0][1][0]
    return interface_of(ip)


def own_ip(target_address: str) -> str:
    """This host's address on the way to HOST:PORT. ConfigError: there is no way."""
    try:
        family, socket_address = resolve(target_address)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe_socket:
            probe_socket.connect(socket_address)
            return str(probe_socket.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"the host to join cannot be reached: {error.strerror or error}",
            values={"launch.join": target_address},
            fix="the address that the first host was given as --listen",
        ) from error


def last_generation(folder: Path) -> int:
    """The newest generation that a run's folder knows of; 0 when there is none."""
    event_generations = (
        as_count(e.get("generation")) or 0 for e in iter_records(folder / "events.jsonl")
    )
    valid_generations = (number for number in event_generations if number <= MAX_GENERATION)
    return max([0, *list_generations(folder / CHECKPOINT_DIR), *valid_generations])


def read_end_event(run: Run) -> dict[str, Any] | None:
    """The last event of a run that is at its end: it says so, a checkpoint of that step is there,
    and a limit of the run is reached. None: it goes on, whatever a log says. ConfigError: it says
    so, and all its checkpoints are gone."""
    folder, limits = Path(run.run.dir), run.run
    end_event = last_event(folder)
    if end_event.get("event") != "finished":
        return None
    step, seconds = record_step(end_event) or 0, finite_number(end_event.get("elapsed_s")) or 0.0
    tokens = as_count(end_event.get("tokens")) or 0
    is_at_limit = (
        (0 < limits.steps <= step) or (0 < limits.tokens <= tokens) or bool(limits.epochs)
        or (0 < 60 * limits.minutes <= seconds + 0.001)
    )  # fmt: skip
    try:
        checkpoint_steps = [
            checkpoint.step
            for checkpoint in scan_step_folders(folder / CHECKPOINT_DIR)
            if checkpoint.is_complete
        ]
    except OSError:
        checkpoint_steps = []
    if is_at_limit and end_event.get("saved", True) and not checkpoint_steps:
        raise ConfigError(
            "the run's records say that it is finished, and it has no checkpoint",
            values={"run.dir": str(folder), "step": step},
            fix="put checkpoints/ back; or run.dir=... elsewhere to train it again",
        )
    return end_event if is_at_limit and step in checkpoint_steps else None


def check_addresses(run: Run) -> None:
    """ConfigError for addresses that are none, or a host that both founds and joins."""
    for key in ("listen", "join"):
        if address := getattr(run.launch, key):
            parse_address(address)
    if run.launch.listen and run.launch.join:
        raise ConfigError(
            "a host founds a run or joins one",
            values={"launch.listen": run.launch.listen, "launch.join": run.launch.join},
            fix=f"launch.join={run.launch.join} alone",
        )


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
