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

from cordee.cli.arguments import make_parser, parse_arguments
from cordee.dist.process_group import RankProcess, python_command
from cordee.errors import CordeeError
from cordee.launcher.local_cluster import probe_machine
from cordee.planner.cluster import fastest_precision, local_cluster
from cordee.planner.profile import local_host, profile_text, read_profile
from cordee.report.reader import read_records

SMALL_RUN = (
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
    arg_parser = make_parser(
        "doctor",
        "Checks this machine: versions, cores, memory, disk, an exchange, a killed restart.",
        "cordee doctor --json",
        "[--json]",
    )
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv)
    findings = []
    for finding in _run_all_checks():
        findings.append(finding)
        if not args.flags.json:
            print(f"{finding.state:<5} {finding.what}")
            if finding.fix:
                print(f"      fix: {finding.fix}")
    if args.flags.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _run_all_checks() -> Iterator[Finding]:
    yield from _check_environment()
    yield from _check_machine()
    yield _run_check("exchange on 2 ranks", _check_exchange)
    yield _run_check("restart after SIGKILL", _check_restart)


def _check_environment() -> Iterator[Finding]:
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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        module = torch.get_device_module(accelerator.type)
        name = module.get_device_name(0) if hasattr(module, "get_device_name") else accelerator.type
        yield Finding("ok", f"{torch.accelerator.device_count()} x {name}")


def _check_machine() -> Iterator[Finding]:
    cluster = local_cluster()
    memory = cluster.memory_bytes / 2**30
    yield Finding("ok", f"{cluster.cores} cores, {memory:.1f} GiB of memory ({cluster.name})")
    yield _check_profile()
    load = os.getloadavg()[0]
    if load > cluster.cores:
        yield Finding(
            "warn",
            f"the machine is busy: load {load:.1f} on {cluster.cores} cores",
            "figures of speed will be low; wait, or expect it",
        )
    free_bytes = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
    state = "ok" if free_bytes > 2**30 else "warn"
    fix = "" if state == "ok" else "make room, or run.dir on another disk"
    yield Finding(state, f"{free_bytes / 2**30:.1f} GiB free on this disk", fix)


def _check_profile() -> Finding:
    """The machine profile, measured now where none is kept."""
    host = local_host()
    profile = read_profile(host)[0] or probe_machine(host)
    if profile is None:
        return Finding("warn", "this machine could not be measured", "plans take nominal figures")
    state = "warn" if profile.is_noisy else "ok"
    cluster = local_cluster(profile)
    best_precision = fastest_precision(cluster)
    return Finding(
        state,
        f"profile: {profile_text(profile)}; run.precision=auto is {best_precision}",
        "cordee probe, when the machine is quiet" if profile.is_noisy else "",
    )


def _run_check(label: str, check: Callable[[], str]) -> Finding:
    start_s = time.perf_counter()
    try:
        detail = check()
    except (CordeeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Finding("fail", f"{label}: {error}", "the words above name the cause")
    return Finding("ok", f"{label}: {detail} ({time.perf_counter() - start_s:.1f} s)")


def _check_exchange() -> str:
    from cordee.launcher.run_ranks import launch

    sums = launch(add_on_ranks, ranks=2, deadline_s=60.0)
    if sums[0] != sums[1]:
        raise RuntimeError(f"the ranks hold different sums: {sums}")
    return "both ranks hold the same bits, equal to the sum on one"


def add_on_ranks(world: RankProcess) -> float:
    """On each of two ranks: the exchange's sum against the sum that one rank computes."""
    import torch
    import torch.distributed as dist

    from cordee.dist.codecs import IdentityCodec
    from cordee.dist.tree_all_reduce import TreeAllReduce
    from cordee.layout.microbatches import TreeSum, fold, split_evenly

    leaves = [torch.randn(10_001, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    ranges = split_evenly(7, world.size)
    partial_sums: list[tuple[tuple[int, int], torch.Tensor]] = []
    for index in ranges[world.rank]:
        TreeSum(ranges[world.rank], 7).feed(partial_sums, index, leaves[index].clone(), torch.add)
    total = TreeAllReduce(dist.group.WORLD, ranges, IdentityCodec()).all_reduce(partial_sums)
    expected_total = fold((0, 7), {(i, i + 1): leaf for i, leaf in enumerate(leaves)}, torch.add)
    if not torch.equal(total, expected_total):
        raise RuntimeError("the exchange's sum differs from the sum on one rank")
    return float(total.double().sum())


def _check_restart() -> str:
    with tempfile.TemporaryDirectory(prefix="cordee-doctor-") as folder:
        clean_dir, killed_dir = Path(folder) / "clean", Path(folder) / "killed"
        _run_training(clean_dir, 0)
        _run_training(killed_dir, 1, "fault.kill=step.agree:13:1", "fault.recover=false")
        _run_training(killed_dir, 0)
        digests = {
            read_records(f / "events.jsonl")[-1]["weights_sha256"] for f in (clean_dir, killed_dir)
        }
    if len(digests) != 1:
        raise RuntimeError("the killed run ended in other bits than the undisturbed one")
    return "the same bits as the undisturbed run"


def _run_training(folder: Path, expected_code: int, *extra_words: str) -> None:
    command = [*python_command(), "train", *SMALL_RUN, f"run.dir={folder}", *extra_words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode != expected_code:
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr.strip()[-400:]}")
