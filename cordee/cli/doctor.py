"""`cordee doctor`: is this machine fit? Environment, the exchange on two ranks, a killed restart.

Each line is ok, warn or fail, with the fix beside it. The two self-tests are real: two processes
over the loopback, and a small run that is killed with SIGKILL and must end in the same bits.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from cordee.cli.arguments import parser, read
from cordee.dist.start import World, python_command
from cordee.errors import CordeeError
from cordee.machine import probe
from cordee.metrics.sinks import read_lines
from cordee.plan.cluster import local_cluster
from cordee.plan.devices import fastest_precision
from cordee.plan.profile import describe, read_profile, this_host

SMALL = (
    "data.path=builtin:markov", "data.tokens=40000", "data.sequence=32", "model.preset=micro",
    "batch.microbatch=2", "run.steps=24", "run.exact=true", "checkpoint.every=8",
    "evaluate.sample=0", "evaluate.tokens=1024", "launch.processes=2",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, warn or fail."""

    state: str
    what: str
    fix: str = ""


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "doctor",
        "Checks this machine: versions, cores, memory, disk, an exchange, a killed restart.",
        "cordee doctor --json",
        "[--json]",
    )
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv)
    findings = []
    for finding in _findings():
        findings.append(finding)
        if not words.flags.json:
            print(f"{finding.state:<5} {finding.what}")
            if finding.fix:
                print(f"      fix: {finding.fix}")
    if words.flags.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _findings() -> Iterator[Finding]:
    yield from _environment()
    yield from _machine()
    yield _tried("exchange on 2 ranks", _exchange)
    yield _tried("restart after SIGKILL", _restart)


def _environment() -> Iterator[Finding]:
    import torch

    yield Finding("ok", f"python {platform.python_version()}, torch {torch.__version__}")
    for name in ("torchvision", "torchaudio"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if ("+cpu" in torch.__version__) != ("+cpu" in version):
            yield Finding(
                "warn",
                f"{name} {version} was not built with torch {torch.__version__}",
                f"install {name} from where torch came from, or remove it",
            )
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        yield Finding("fail", "this torch has no gloo", "install a torch with distributed support")
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None:
        module = torch.get_device_module(here.type)
        name = module.get_device_name(0) if hasattr(module, "get_device_name") else here.type
        yield Finding("ok", f"{torch.accelerator.device_count()} x {name}")


def _machine() -> Iterator[Finding]:
    cluster = local_cluster()
    memory = cluster.memory_bytes / 2**30
    yield Finding("ok", f"{cluster.cores} cores, {memory:.1f} GiB of memory ({cluster.name})")
    yield _profile()
    load = os.getloadavg()[0]
    if load > cluster.cores:
        yield Finding(
            "warn",
            f"the machine is busy: load {load:.1f} on {cluster.cores} cores",
            "figures of speed will be low; wait, or expect it",
        )
    free = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
    state = "ok" if free > 2**30 else "warn"
    fix = "" if state == "ok" else "make room, or run.dir on another disk"
    yield Finding(state, f"{free / 2**30:.1f} GiB free on this disk", fix)


def _profile() -> Finding:
    """The machine profile, measured now where none is kept."""
    host = this_host()
    profile = read_profile(host)[0] or probe(host)
    if profile is None:
        return Finding("warn", "this machine could not be measured", "plans take nominal figures")
    state = "warn" if profile.noisy else "ok"
    cluster = local_cluster(profile)
    best = fastest_precision(cluster)
    return Finding(
        state,
        f"profile: {describe(profile)}; run.precision=auto is {best}",
        "cordee probe, when the machine is quiet" if profile.noisy else "",
    )


def _tried(what: str, check: Callable[[], str]) -> Finding:
    began = time.perf_counter()
    try:
        said = check()
    except (CordeeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Finding("fail", f"{what}: {error}", "the words above name the cause")
    return Finding("ok", f"{what}: {said} ({time.perf_counter() - began:.1f} s)")


def _exchange() -> str:
    from cordee.testing import launch

    sums = launch(add_on_ranks, ranks=2, deadline_s=60.0)
    if sums[0] != sums[1]:
        raise RuntimeError(f"the ranks hold different sums: {sums}")
    return "both ranks hold the same bits, equal to the sum on one"


def add_on_ranks(world: World) -> float:
    """On each of two ranks: the exchange's sum against the sum that one rank computes."""
    import torch
    import torch.distributed as dist

    from cordee.dist.exchange import Exchange
    from cordee.layout.split import TreeSum, fold, split_evenly
    from cordee.sync.codecs import Identity

    leaves = [torch.randn(10_001, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    ranges = split_evenly(7, world.size)
    partial: list[tuple[tuple[int, int], torch.Tensor]] = []
    for index in ranges[world.rank]:
        TreeSum(ranges[world.rank], 7).feed(partial, index, leaves[index].clone(), torch.add)
    total = Exchange(dist.group.WORLD, ranges, Identity()).add(partial)
    alone = fold((0, 7), {(i, i + 1): leaf for i, leaf in enumerate(leaves)}, torch.add)
    if not torch.equal(total, alone):
        raise RuntimeError("the exchange's sum differs from the sum on one rank")
    return float(total.double().sum())


def _restart() -> str:
    with tempfile.TemporaryDirectory(prefix="cordee-doctor-") as place:
        clean, killed = Path(place) / "clean", Path(place) / "killed"
        _train(clean, 0)
        _train(killed, 1, "fault.kill=step.agree:13:1", "fault.recover=false")
        _train(killed, 0)
        digests = {read_lines(f / "events.jsonl")[-1]["weights_sha256"] for f in (clean, killed)}
    if len(digests) != 1:
        raise RuntimeError("the killed run ended in other bits than the undisturbed one")
    return "the same bits as the undisturbed run"


def _train(folder: Path, expected: int, *more: str) -> None:
    command = [*python_command(), "train", *SMALL, f"run.dir={folder}", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != expected:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
