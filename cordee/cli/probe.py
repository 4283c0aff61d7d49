"""`cordee probe`: measures this machine anew and keeps its profile for plans and runs."""

from __future__ import annotations

import json
from dataclasses import asdict

from cordee.cli.arguments import make_parser, parse_arguments
from cordee.dist.streams import print_to_stderr
from cordee.errors import RunError
from cordee.launcher.local_cluster import probe_machine
from cordee.planner.cluster import fastest_precision, local_cluster, precision_text
from cordee.planner.profile import Profile, local_host, profile_path, spread_text


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "probe",
        "Measures matrix products in fp32, bf16 and fp16 by threads, memory, a small operator and\n"
        "messages between two processes, in about 2 seconds, and keeps the profile in the cache\n"
        "folder ($XDG_CACHE_HOME/cordee). Plans and run.precision=auto rest on it.",
        "cordee probe --json",
        "[--json]",
    )
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv)
    host = local_host()
    profile = probe_machine(host)
    if profile is None:
        raise RunError("this machine could not be measured", fix="cordee doctor")
    if args.flags.json:
        print(json.dumps({"file": str(profile_path(host)), **asdict(profile)}))
        return 0
    print(profile_text(profile))
    print_to_stderr(f"kept in {profile_path(host)}")
    return 0


def profile_text(profile: Profile) -> str:
    """The profile as a table: a row for each number of threads."""
    headings = ["threads", *profile.products, "element passes", "memory"]
    rows = [
        [
            str(count),
            *(f"{rates[i] / 1e9:,.1f}" for rates in profile.products.values()),
            f"{profile.passes[i] / 1e9:,.1f}",
            f"{profile.memory[i] / 1e9:,.1f}",
        ]
        for i, count in enumerate(profile.threads)
    ]
    lines = ["  ".join([row[0].rjust(7), *(f"{cell:>14}" for cell in row[1:])])
             for row in (headings, *rows)]  # fmt: skip
    cluster = local_cluster(profile)
    best_precision = fastest_precision(cluster)
    quota = f", {profile.host.quota:g} cores of CPU time granted" if profile.host.quota else ""
    return "\n".join(
        [
            f"{profile.host.cpu}, {profile.host.cores} cores{quota}, torch {profile.host.torch}"
            + (f", {profile.host.limits}" if profile.host.limits else ""),
            "GFLOP/s of matrix products, GB/s read and written",
            *lines,
            f"small operator {profile.operator_s * 1e6:.1f} us, message {_us(profile.message_s)},"
            f" sum of two processes {_us(profile.reduce_s)},"
            f" {profile.reduce_bytes_per_s / 1e9:.2f} GB/s",
            *([f"{profile.device}: " + ", ".join(
                f"{p} {rate / 1e12:,.1f} TFLOP/s" for p, rate in profile.device_products.items()
            )] if profile.device else []),
            spread_text(profile)
            + (": the machine is busy, and plans allow for it" if profile.is_noisy else ""),
            f"run.precision=auto is {best_precision} ({precision_text(best_precision, cluster)})",
        ]
    )  # fmt: skip


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds else "not measured"
