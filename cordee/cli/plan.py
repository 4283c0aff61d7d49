"""`cordee plan`: what a run will cost, which layout is best, and why not the others.

Paper: it starts no process and imports no torch, but for --dry-run, which builds one rank's modules
on meta. The table goes to standard output, as does the one JSON object of --json.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cordee.cli.arguments import ParsedArguments, make_parser, parse_arguments
from cordee.config.from_hf import with_hub_shape
from cordee.config.model import ModelSettings
from cordee.config.paths import expand_home
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.config.validate import validate_run
from cordee.dist.streams import print_to_stderr
from cordee.errors import ConfigError
from cordee.launcher.local_cluster import measure_cluster
from cordee.launcher.run_paths import atomic_write, refuse_overwrite
from cordee.layout.counts import count_model_tensors
from cordee.layout.tensors import count_parameters
from cordee.planner.cluster import Cluster, read_cluster
from cordee.planner.plan import (
    Plan,
    is_plan_file,
    make_plan,
    plan_of_candidate,
    select_cluster,
    without_axes,
)
from cordee.planner.recipe import resolve_for_machine
from cordee.planner.report import (
    RankView,
    assumptions,
    count_text,
    job_text,
    plan_text,
    rank_text,
    view_rank,
)
from cordee.planner.search import Ranking, search


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "plan",
        "Which layouts these devices can run, what a step of each costs in time, memory and\n"
        "bytes, and why the others are out. Starts nothing.",
        "cordee plan small batch.microbatches=16\n"
        "  cordee plan xl run.precision=bf16 --cluster eight-h100.toml\n"
        "  cordee plan recipes/llama3-405b.toml --cluster recipes/h100-16384.toml"
        " --dry-run --rank 9000\n"
        "  cordee plan --models",
        "[CONFIG.toml | PRESET] [key=value ...] [--cluster FILE] [--top N] [--vocabulary N]"
        " [--models] [--json] [--save FILE] [--no-probe] [--dry-run --rank R]",
    )
    arg_parser.add_argument(
        "--cluster", metavar="FILE", help="devices as TOML instead of this machine"
    )
    arg_parser.add_argument("--top", type=int, default=8, metavar="N", help="rows of the table")
    arg_parser.add_argument(
        "--vocabulary", type=int, default=256, metavar="N", help="tokens, 256: bytes"
    )
    arg_parser.add_argument("--models", action="store_true", help="list the presets")
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    arg_parser.add_argument("--save", metavar="FILE", help="write the picked plan as JSON")
    arg_parser.add_argument("--no-probe", action="store_true", help="do not measure this machine")
    arg_parser.add_argument(
        "--dry-run", action="store_true", help="build one rank's modules on meta"
    )
    arg_parser.add_argument("--rank", type=int, metavar="R", help="which: what it holds and sends")
    args = parse_arguments(arg_parser, argv, max_positionals=1)
    vocabulary = _check_at_least("--vocabulary", args.flags.vocabulary, 2)
    if args.flags.models:
        print(_models_text(vocabulary, args.flags.json))
        return 0
    run_config = _load_run(args)
    validate_run(run_config)
    run_config = with_hub_shape(run_config)
    top = _check_at_least("--top", args.flags.top, 1)
    rank = _parse_rank(args, run_config)
    cluster, profile = _load_cluster(args, run_config)
    run_cluster = select_cluster(run_config, cluster)
    run_config, recipe_text = resolve_for_machine(run_config, cluster, vocabulary)
    if recipe_text:
        print_to_stderr(f"recipe  {recipe_text}")
    plan = replace(make_plan(run_config, cluster, vocabulary), profile=profile)
    rank_view = None
    if rank is not None:
        tensor_counts = count_model_tensors(run_config.model, vocabulary)
        rank_view = view_rank(run_config, plan, rank, tensor_counts)
    if args.flags.save:
        _save_plan(Path(expand_home(args.flags.save)), plan)
    if rank_view is not None:
        print(_dry_run_text(run_config, run_cluster, plan, rank_view, vocabulary, args.flags.json))
        return 0
    ranking = search(without_axes(run_config), run_cluster, vocabulary)
    if args.flags.json:
        print(json.dumps(_plan_document(run_config, run_cluster, plan, ranking, top)))
    else:
        print(plan_text(run_config, run_cluster, plan, ranking, top))
    return 0


def _load_cluster(args: ParsedArguments, run_config: Run) -> tuple[Cluster, dict[str, Any]]:
    """The cluster of a file, or this machine with its profile."""
    if args.flags.cluster:
        return read_cluster(args.flags.cluster), {}
    return measure_cluster(run_config.launch.probe and not args.flags.no_probe)


def _load_run(args: ParsedArguments) -> Run:
    """The run that file and overrides describe; a bare word stands for model.preset=WORD."""
    if not args.positionals:
        return args.load().run
    name, presets = args.positionals[0], list(model_presets())
    if name not in presets:
        close_matches = difflib.get_close_matches(name, presets, n=1, cutoff=0.5)
        raise ConfigError(
            "there is no such preset",
            values={"word": name, "presets": presets},
            fix=f"did you mean {close_matches[0]}?" if close_matches else "cordee plan --models",
        )
    return replace(args, overrides=(f"model.preset={name}", *args.overrides)).load().run


def _parse_rank(args: ParsedArguments, run_config: Run) -> int | None:
    """The rank of a dry run; None when there is none to be."""
    rank: int | None = args.flags.rank
    if args.flags.dry_run is not (rank is not None):
        flag_values = {"--dry-run": args.flags.dry_run, "--rank": rank}
        raise ConfigError(
            "--dry-run and --rank go together",
            values=flag_values,
            fix=f"--dry-run --rank {rank or 0}",
        )
    if args.flags.dry_run and run_config.model.hub:
        raise ConfigError(
            "--dry-run builds the house's own models",
            values={"model.hub": run_config.model.hub},
            fix="cordee plan --models lists them",
        )
    return rank


def _dry_run_text(
    run: Run, cluster: Cluster, plan: Plan, rank_view: RankView, vocabulary: int, as_json: bool
) -> str:
    """One rank of the plan: by the tables, and as its modules were built."""
    from cordee.hardware.system import peak_bytes
    from cordee.training.dry_run import dry_run

    measurements = {**dry_run(run, plan, rank_view.rank, vocabulary), "memory": peak_bytes()}
    if as_json:
        rank = {**asdict(rank_view), "rehearsal": measurements}
        layout = plan.to_dict()["layout"]
        return json.dumps({"layout": layout, "zero": plan.zero, "why": plan.why, "rank": rank})
    paragraphs = [job_text(run, cluster, plan), f"layout   {plan.layout.describe()}"]
    return "\n".join(paragraphs) + "\n\n" + rank_text(rank_view, measurements)


def _models_text(vocabulary: int, as_json: bool) -> str:
    """The presets with their parameter counts."""
    presets = model_presets()
    counts = {n: count_parameters(m, m.vocabulary or vocabulary) for n, m in presets.items()}
    if as_json:
        return json.dumps({n: {**asdict(m), "parameters": counts[n]} for n, m in presets.items()})
    lines = [_model_line(name, model, counts[name]) for name, model in presets.items()]
    return "\n".join([f"{'preset':<16}{'parameters':>23}   shape", *lines])


def _model_line(name: str, model: ModelSettings, count: int) -> str:
    keys = f" ({model.kv_heads} of keys)" if model.kv_heads else ""
    shape = f"{model.layers} layers x width {model.width}, {model.heads} heads{keys}, {model.mlp}"
    if model.moe.experts:
        shape += f", {model.moe.active} of {model.moe.experts} experts"
    return f"{name:<16}{count:>15,} {count_text(count):>7}   {shape}"


def _plan_document(
    run: Run, cluster: Cluster, plan: Plan, ranking: Ranking, top: int
) -> dict[str, object]:
    ranked_plans = [
        plan_of_candidate(run, cluster, c, "").to_dict() for c in ranking.candidates[:top]
    ]
    for row in ranked_plans:
        del row["why"], row["splits"], row["stages"]
    return {
        "picked": plan.to_dict(),
        "ranked": ranked_plans,
        "rejected": [asdict(r) for r in ranking.rejections],
        "assumed": {
            **asdict(cluster),
            **{f"{k} (words)": v for k, v in assumptions(run, cluster).items()},
        },
    }


def _check_at_least(flag: str, value: int, minimum: int) -> int:
    if value < minimum:
        raise ConfigError(
            f"{flag} is at least {minimum}", values={flag: value}, fix=f"{flag} {minimum}"
        )
    return value


def _save_plan(path: Path, plan: Plan) -> None:
    refuse_overwrite(path, "--save", is_plan_file)
    with atomic_write(path, "--save") as temporary_path:
        temporary_path.write_text(plan.to_json() + "\n")
    print_to_stderr(f"plan written to {path}")
