"""Hosts on devices of different kinds: whom a run lets in, whole islands of one kind, the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.config.from_hf import with_hub_shape
from cordee.config.load import load
from cordee.config.run import Run
from cordee.elastic.assignment import AvailableWorker, assign_ranks
from cordee.elastic.handshake import differences, format_differences
from cordee.launcher.rendezvous import run_identity
from cordee.planner.cluster import gpu_cluster
from cordee.planner.plan import Plan, make_plan, with_devices

DEVICE_KINDS = ("cpu", "cuda")
HostReports = dict[str, dict[str, Any]]


@st.composite
def host_reports(draw: st.DrawFn, island_size: int) -> HostReports:
    """Hosts with workers of which some had seats, in islands of one kind each."""
    reports: HostReports = {}
    rank_counts = {kind: 0 for kind in DEVICE_KINDS}
    for host_index in range(draw(st.integers(1, 4))):
        worker_count = draw(st.integers(0, 7))
        wanted_count = draw(st.integers(0, worker_count + 1))
        device = draw(st.sampled_from(DEVICE_KINDS))
        ranked_count = draw(st.integers(0, min(wanted_count, worker_count)))
        available = [
            AvailableWorker(f"h{host_index}", n, 100 + n, None, 0) for n in range(worker_count)
        ]
        for n in range(ranked_count):
            # The i-th seat of a kind: every second island was of that kind.
            island_index, local_rank = divmod(rank_counts[device], island_size)
            rank = (2 * island_index + DEVICE_KINDS.index(device)) * island_size + local_rank
            rank_counts[device] += 1
            if draw(st.integers(0, 4)):
                available[n] = replace(available[n], rank=rank, generation=7)
        reports[f"h{host_index}"] = {
            "name": f"host{host_index}", "wants": wanted_count, "device": device, "begun": True,
            "stranded": False,
            "ready": [worker.to_list() for worker in available],
        }  # fmt: skip
    return reports


def assign_and_record(
    reports: HostReports, island_size: int, max_islands: int = 99
) -> tuple[dict[str, Any], list[str]]:
    """What is ordered, and the kinds that the plan was asked for."""
    plan_devices: list[str] = []

    def plan_for(islands: int, devices: Sequence[str]) -> tuple[str, int]:
        assert islands == max(1, len(devices))
        plan_devices.extend(devices)
        return "{}", min(islands, max_islands)

    return assign_ranks(reports, island_size, plan_for), plan_devices


@given(st.data(), st.integers(1, 3))
def test_islands_are_whole_and_of_one_kind(data: st.DataObject, island_size: int) -> None:
    reports = data.draw(host_reports(island_size))
    max_islands = data.draw(st.integers(1, 9))
    assignment, kinds = assign_and_record(reports, island_size, max_islands)
    usable_workers = {
        kind: sum(
            min(r["wants"], len(r["ready"])) for r in reports.values() if r["device"] == kind
        )
        for kind in DEVICE_KINDS
    }  # fmt: skip
    island_count = sum(count // island_size for count in usable_workers.values())
    assert len(kinds) == island_count
    if not island_count:
        assert assignment == {}
        return
    ranked_workers = assignment["ranks"]
    assert len(ranked_workers) == min(island_count, max_islands) * island_size
    assert len({(host, number) for host, number, _ in ranked_workers}) == len(ranked_workers)
    for rank, (host, _, _) in enumerate(ranked_workers):
        assert reports[host]["device"] == kinds[rank // island_size]
    for host, report in reports.items():
        assert sum(ranked_worker[0] == host for ranked_worker in ranked_workers) <= report["wants"]


@given(st.data(), st.integers(1, 3), st.sampled_from(DEVICE_KINDS))
def test_hosts_of_one_kind_are_ordered_as_ever(
    data: st.DataObject, island_size: int, kind: str
) -> None:
    """Whole islands' survivors by rank, the other survivors, the rest: the slow, obvious list."""
    reports = data.draw(host_reports(island_size))
    for report in reports.values():
        report["device"] = kind
    available = [
        AvailableWorker(host, *entry)
        for host, report in reports.items()
        for entry in report["ready"]
    ]
    last_generation = max((w.generation for w in available), default=0)
    by_rank = {
        w.rank: w for w in available if w.rank is not None and w.generation == last_generation
    }
    complete_ranks = {
        r
        for r in by_rank
        if all(r // island_size * island_size + i in by_rank for i in range(island_size))
    }
    worker_order = [by_rank[r] for r in sorted(complete_ranks)] + [
        by_rank[r] for r in sorted(set(by_rank) - complete_ranks)
    ]
    worker_order += [w for w in available if w not in worker_order]
    open_slots = {host: report["wants"] for host, report in reports.items()}
    expected_ranks = []
    for worker in worker_order:
        if open_slots[worker.host]:
            open_slots[worker.host] -= 1
            expected_ranks.append([worker.host, worker.number, worker.pid])
    expected_ranks = expected_ranks[: len(expected_ranks) // island_size * island_size]
    assignment, _ = assign_and_record(reports, island_size)
    assert assignment.get("ranks", []) == expected_ranks


def test_who_survived_stays_in_front() -> None:
    """An island that lost a rank is filled up by its own kind, and keeps its place."""
    cuda_report = {"name": "a", "wants": 2, "device": "cuda", "begun": True, "stranded": False}
    cuda_report["ready"] = [[1, 11, 0, 3]]
    cpu_report = {**cuda_report, "device": "cpu", "ready": [[1, 21, None, 0], [2, 22, None, 0]]}
    assignment, kinds = assign_and_record({"a": cuda_report, "b": cpu_report}, 2)
    assert (kinds, [host for host, _, _ in assignment["ranks"]]) == (["cpu"], ["b", "b"])
    cuda_report["ready"].append([2, 12, None, 0])
    assignment, kinds = assign_and_record({"b": cpu_report, "a": cuda_report}, 2)
    assert (kinds, [host for host, _, _ in assignment["ranks"]]) == (["cuda", "cpu"], [*"aabb"])


def run_identities(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """What a CPU and a CUDA host of that run say at the door."""
    run = load(None, [*overrides, f"run.dir={folder}"]).run
    return [run_identity(run, "data", "1 island", kind) for kind in DEVICE_KINDS]


@pytest.mark.parametrize("setting", ["run.exact=true", "data.placement=replicate"])
def test_bits_only_among_like_devices(setting: str, tmp_path: Path) -> None:
    rows = differences(*run_identities(tmp_path, setting))
    assert [row[1:] for row in rows] == [("cpu", "cuda")]
    assert "bits are the same only among like devices" in format_differences(rows)
    assert "torch" in run_identities(tmp_path, setting)[0]


def test_other_runs_let_another_kind_in(tmp_path: Path) -> None:
    assert differences(*run_identities(tmp_path)) == []
    identity = run_identities(tmp_path)[0]
    assert "+" not in identity["torch"], "a build for a CPU may meet one for CUDA"
    assert differences(identity, run_identities(tmp_path, "optim.lr=0.5")[1])


def run_and_plan(*overrides: str) -> tuple[Run, Plan]:
    run = with_hub_shape(load(None, ["model.preset=micro", "launch.processes=3", *overrides]).run)
    return run, make_plan(run, gpu_cluster("H100", 8), 256)


def test_a_plan_for_one_kind_is_the_plan() -> None:
    run, plan = run_and_plan()
    assert with_devices(plan, run, ["cuda"] * 3) is plan
    assert not plan.has_mixed_devices


@given(st.lists(st.sampled_from(DEVICE_KINDS), min_size=3, max_size=5), st.integers(3, 40))
def test_a_plan_for_two_kinds(devices: list[str], microbatches: int) -> None:
    """It foretells nothing, and starts CPUs beside accelerators with the least."""
    run, plan = run_and_plan(f"batch.microbatches={microbatches}")
    mixed_plan = with_devices(plan, run, devices)
    kinds = set(devices[:3])
    assert Plan.from_json(mixed_plan.to_json()) == mixed_plan
    assert mixed_plan.has_mixed_devices == (len(kinds) == 2)
    if kinds == {"cuda"}:
        return
    assert mixed_plan.devices == tuple(devices[:3])
    assert mixed_plan.predicted.step_s == mixed_plan.predicted.memory_bytes == 0
    assert mixed_plan.predicted.parameters == plan.predicted.parameters
    assert "nothing is foretold" in mixed_plan.note
    microbatch_ids = [index for start, stop in mixed_plan.splits for index in range(start, stop)]
    assert microbatch_ids == list(range(microbatches))
    if mixed_plan.has_mixed_devices:
        cpu_shares = [
            n
            for n, kind in zip(mixed_plan.island_microbatches, mixed_plan.devices, strict=True)
            if kind == "cpu"
        ]
        cuda_shares = [
            n
            for n, kind in zip(mixed_plan.island_microbatches, mixed_plan.devices, strict=True)
            if kind == "cuda"
        ]
        assert set(cpu_shares) == {1}
        assert max(cuda_shares) - min(cuda_shares) <= 1
    else:
        assert mixed_plan.splits == plan.splits


def test_shares_that_the_user_keeps_equal_stay_so() -> None:
    run, plan = run_and_plan("batch.microbatches=12", "layout.balance=false")
    assert with_devices(plan, run, ["cuda", "cpu", "cpu"]).island_microbatches == [4, 4, 4]


def test_an_island_of_several_ranks_starts_with_one_for_each() -> None:
    overrides = (
        "batch.microbatches=12",
        "launch.processes=4",
        "layout.islands=2",
        "layout.shard=2",
    )
    run, plan = run_and_plan(*overrides)
    mixed_plan = with_devices(plan, run, ["cpu", "cuda"])
    assert mixed_plan.island_microbatches == [2, 10]
    assert json.loads(mixed_plan.to_json())["devices"] == ["cpu", "cuda"]
