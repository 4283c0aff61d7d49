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

from cordee.cli.arguments import Words, parser, read, say
from cordee.cli.places import refuse_other, replacing
from cordee.config.check import check
from cordee.config.hub import on_paper
from cordee.config.model import ModelSettings
from cordee.config.paths import home
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.layout.census import model_census
from cordee.layout.tensors import parameters
from cordee.machine import measured_cluster
from cordee.plan.cluster import Cluster, read_cluster
from cordee.plan.plan import Plan, devices_of, finished, holds_plan, make_plan, without_axes
from cordee.plan.rank import RankView, view_rank
from cordee.plan.recipe import for_machine
from cordee.plan.report import assumed, count_text, job_text, plan_text, rank_text
from cordee.plan.search import Ranking, search


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
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
    made.add_argument("--cluster", metavar="FILE", help="devices as TOML instead of this machine")
    made.add_argument("--top", type=int, default=8, metavar="N", help="rows of the table")
    made.add_argument("--vocabulary", type=int, default=256, metavar="N", help="tokens, 256: bytes")
    made.add_argument("--models", action="store_true", help="list the presets")
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.add_argument("--save", metavar="FILE", help="write the picked plan as JSON")
    made.add_argument("--no-probe", action="store_true", help="do not measure this machine")
    made.add_argument("--dry-run", action="store_true", help="build one rank's modules on meta")
    made.add_argument("--rank", type=int, metavar="R", help="which: what it holds and sends")
    words = read(made, argv, rest=1)
    if words.flags.models:
        print(_models(_at_least("--vocabulary", words.flags.vocabulary, 2), words.flags.json))
        return 0
    wanted = _run_of(words)
    check(wanted)
    wanted = on_paper(wanted)
    vocabulary = _at_least("--vocabulary", words.flags.vocabulary, 2)
    top = _at_least("--top", words.flags.top, 1)
    rank = _rank_of(words, wanted)
    cluster, profile = _devices(words, wanted)
    devices = devices_of(wanted, cluster)
    wanted, text = for_machine(wanted, cluster, vocabulary)
    if text:
        say(f"recipe  {text}")
    plan = replace(make_plan(wanted, cluster, vocabulary), profile=profile)
    view = None
    if rank is not None:
        view = view_rank(wanted, plan, rank, model_census(wanted.model, vocabulary))
    if words.flags.save:
        _save(Path(home(words.flags.save)), plan)
    if view is not None:
        print(_dry_run(wanted, devices, plan, view, vocabulary, words.flags.json))
        return 0
    ranking = search(without_axes(wanted), devices, vocabulary)
    if words.flags.json:
        print(json.dumps(_as_json(wanted, devices, plan, ranking, top)))
    else:
        print(plan_text(wanted, devices, plan, ranking, top))
    return 0


def _devices(words: Words, wanted: Run) -> tuple[Cluster, dict[str, Any]]:
    """The cluster of a file, or this machine with its profile."""
    if words.flags.cluster:
        return read_cluster(words.flags.cluster), {}
    return measured_cluster(wanted.launch.probe and not words.flags.no_probe)


def _run_of(words: Words) -> Run:
    """The run that file and overrides describe; a bare word stands for model.preset=WORD."""
    if not words.rest:
        return words.load().run
    name, presets = words.rest[0], list(model_presets())
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1, cutoff=0.5)
        raise ConfigError(
            "there is no such preset",
            values={"word": name, "presets": presets},
            fix=f"did you mean {near[0]}?" if near else "cordee plan --models",
        )
    return replace(words, overrides=(f"model.preset={name}", *words.overrides)).load().run


def _rank_of(words: Words, wanted: Run) -> int | None:
    """The rank of a dry run; None when there is none to be."""
    rank: int | None = words.flags.rank
    if words.flags.dry_run is not (rank is not None):
        told = {"--dry-run": words.flags.dry_run, "--rank": rank}
        raise ConfigError(
            "--dry-run and --rank go together", values=told, fix=f"--dry-run --rank {rank or 0}"
        )
    if words.flags.dry_run and wanted.model.hub:
        raise ConfigError(
            "--dry-run builds the house's own models",
            values={"model.hub": wanted.model.hub},
            fix="cordee plan --models lists them",
        )
    return rank


def _dry_run(
    run: Run, cluster: Cluster, plan: Plan, view: RankView, vocabulary: int, as_json: bool
) -> str:
    """One rank of the plan: by the tables, and as its modules were built."""
    from cordee.rehearse import rehearse
    from cordee.system import peak_bytes

    rehearsal = {**rehearse(run, plan, view.rank, vocabulary), "memory": peak_bytes()}
    if as_json:
        rank = {**asdict(view), "rehearsal": rehearsal}
        layout = plan.to_dict()["layout"]
        return json.dumps({"layout": layout, "zero": plan.zero, "why": plan.why, "rank": rank})
    parts = [job_text(run, cluster, plan), f"layout   {plan.layout.describe()}"]
    return "\n".join(parts) + "\n\n" + rank_text(view, rehearsal)


def _models(vocabulary: int, as_json: bool) -> str:
    """The presets with their parameter counts."""
    presets = model_presets()
    counts = {n: parameters(m, m.vocabulary or vocabulary) for n, m in presets.items()}
    if as_json:
        return json.dumps({n: {**asdict(m), "parameters": counts[n]} for n, m in presets.items()})
    lines = [_model_line(name, model, counts[name]) for name, model in presets.items()]
    return "\n".join([f"{'preset':<16}{'parameters':>23}   shape", *lines])


def _model_line(name: str, model: ModelSettings, count: int) -> str:
    shape = f"{model.layers} layers x width {model.width}"
    if model.classifies:
        image = model.image
        shape += f", {model.kind} on {image.channels} x {image.side} x {image.side} pixels"
    else:
        keys = f" ({model.kv_heads} of keys)" if model.kv_heads else ""
        shape += f", {model.heads} heads{keys}, {model.mlp}"
    if model.moe.experts:
        shape += f", {model.moe.active} of {model.moe.experts} experts"
    return f"{name:<16}{count:>15,} {count_text(count):>7}   {shape}"


def _as_json(
    run: Run, cluster: Cluster, plan: Plan, ranking: Ranking, top: int
) -> dict[str, object]:
    ranked = [finished(run, cluster, c, "").to_dict() for c in ranking.ranked[:top]]
    for row in ranked:
        del row["why"], row["splits"], row["stages"]
    return {
        "picked": plan.to_dict(),
        "ranked": ranked,
        "rejected": [asdict(r) for r in ranking.rejected],
        "assumed": {
            **asdict(cluster),
            **{f"{k} (words)": v for k, v in assumed(run, cluster).items()},
        },
    }


def _at_least(flag: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(
            f"{flag} is at least {least}", values={flag: value}, fix=f"{flag} {least}"
        )
    return value


def _save(path: Path, plan: Plan) -> None:
    refuse_other(path, "--save", holds_plan)
    with replacing(path, "--save") as beside:
        beside.write_text(plan.to_json() + "\n")
    say(f"plan written to {path}")
