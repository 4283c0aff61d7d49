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

from cordee.config.hub import on_paper
from cordee.config.load import load
from cordee.config.run import Run
from cordee.fault.handshake import differences, table
from cordee.fault.orders import Ready, assign
from cordee.plan.cluster import gpu_cluster
from cordee.plan.plan import Plan, make_plan, on_devices
from cordee.rendezvous import greeting

KINDS = ("cpu", "cuda")
Reports = dict[str, dict[str, Any]]


@st.composite
def reports(draw: st.DrawFn, inside: int) -> Reports:
    """Hosts with workers of which some had seats, in islands of one kind each."""
    found: Reports = {}
    seats = {kind: 0 for kind in KINDS}
    for number in range(draw(st.integers(1, 4))):
        workers = draw(st.integers(0, 7))
        wants = draw(st.integers(0, workers + 1))
        device = draw(st.sampled_from(KINDS))
        seated = draw(st.integers(0, min(wants, workers)))
        ready = [Ready(f"h{number}", n, 100 + n, None, 0) for n in range(workers)]
        for n in range(seated):
            # The i-th seat of a kind: every second island was of that kind.
            at, place = divmod(seats[device], inside)
            rank = (2 * at + KINDS.index(device)) * inside + place
            seats[device] += 1
            if draw(st.integers(0, 4)):
                ready[n] = replace(ready[n], rank=rank, generation=7)
        found[f"h{number}"] = {
            "name": f"host{number}", "wants": wants, "device": device, "begun": True,
            "stranded": False,
            "ready": [worker.to_list() for worker in ready],
        }  # fmt: skip
    return found


def orders_of(found: Reports, inside: int, most: int = 99) -> tuple[dict[str, Any], list[str]]:
    """What is ordered, and the kinds that the plan was asked for."""
    asked: list[str] = []

    def plan_for(islands: int, devices: Sequence[str]) -> tuple[str, int]:
        assert islands == max(1, len(devices))
        asked.extend(devices)
        return "{}", min(islands, most)

    return assign(found, inside, plan_for), asked


@given(st.data(), st.integers(1, 3))
def test_islands_are_whole_and_of_one_kind(data: st.DataObject, inside: int) -> None:
    found = data.draw(reports(inside))
    most = data.draw(st.integers(1, 9))
    orders, kinds = orders_of(found, inside, most)
    usable = {
        kind: sum(
            min(r["wants"], len(r["ready"])) for r in found.values() if r["device"] == kind
        )
        for kind in KINDS
    }  # fmt: skip
    islands = sum(count // inside for count in usable.values())
    assert len(kinds) == islands
    if not islands:
        assert orders == {}
        return
    seats = orders["ranks"]
    assert len(seats) == min(islands, most) * inside
    assert len({(host, number) for host, number, _ in seats}) == len(seats)
    for rank, (host, _, _) in enumerate(seats):
        assert found[host]["device"] == kinds[rank // inside]
    for host, report in found.items():
        assert sum(seat[0] == host for seat in seats) <= report["wants"]


@given(st.data(), st.integers(1, 3), st.sampled_from(KINDS))
def test_hosts_of_one_kind_are_ordered_as_ever(data: st.DataObject, inside: int, kind: str) -> None:
    """Whole islands' survivors by rank, the other survivors, the rest: the slow, obvious list."""
    found = data.draw(reports(inside))
    for report in found.values():
        report["device"] = kind
    ready = [Ready(host, *entry) for host, report in found.items() for entry in report["ready"]]
    newest = max((w.generation for w in ready), default=0)
    had = {w.rank: w for w in ready if w.rank is not None and w.generation == newest}
    whole = {r for r in had if all(r // inside * inside + i in had for i in range(inside))}
    ordered = [had[r] for r in sorted(whole)] + [had[r] for r in sorted(set(had) - whole)]
    ordered += [w for w in ready if w not in ordered]
    left = {host: report["wants"] for host, report in found.items()}
    wanted = []
    for worker in ordered:
        if left[worker.host]:
            left[worker.host] -= 1
            wanted.append([worker.host, worker.number, worker.pid])
    wanted = wanted[: len(wanted) // inside * inside]
    orders, _ = orders_of(found, inside)
    assert orders.get("ranks", []) == wanted


def test_who_survived_stays_in_front() -> None:
    """An island that lost a rank is filled up by its own kind, and keeps its place."""
    cuda = {"name": "a", "wants": 2, "device": "cuda", "begun": True, "stranded": False}
    cuda["ready"] = [[1, 11, 0, 3]]
    cpu = {**cuda, "device": "cpu", "ready": [[1, 21, None, 0], [2, 22, None, 0]]}
    orders, kinds = orders_of({"a": cuda, "b": cpu}, 2)
    assert (kinds, [host for host, _, _ in orders["ranks"]]) == (["cpu"], ["b", "b"])
    cuda["ready"].append([2, 12, None, 0])
    orders, kinds = orders_of({"b": cpu, "a": cuda}, 2)
    assert (kinds, [host for host, _, _ in orders["ranks"]]) == (["cuda", "cpu"], [*"aabb"])


def greetings(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What a CPU and a CUDA host of that run say at the door."""
    run = load(None, [*words, f"run.dir={folder}"]).run
    return [greeting(run, "data", "1 island", kind) for kind in KINDS]


@pytest.mark.parametrize("word", ["run.exact=true", "data.placement=replicate"])
def test_bits_only_among_like_devices(word: str, tmp_path: Path) -> None:
    different = differences(*greetings(tmp_path, word))
    assert [row[1:] for row in different] == [("cpu", "cuda")]
    assert "bits are the same only among like devices" in table(different)
    assert "torch" in greetings(tmp_path, word)[0]


def test_other_runs_let_another_kind_in(tmp_path: Path) -> None:
    assert differences(*greetings(tmp_path)) == []
    said = greetings(tmp_path)[0]
    assert "+" not in said["torch"], "a build for a CPU may meet one for CUDA"
    assert differences(said, greetings(tmp_path, "optim.lr=0.5")[1])


def planned(*words: str) -> tuple[Run, Plan]:
    run = on_paper(load(None, ["model.preset=micro", "launch.processes=3", *words]).run)
    return run, make_plan(run, gpu_cluster("H100", 8), 256)


def test_a_plan_for_one_kind_is_the_plan() -> None:
    run, plan = planned()
    assert on_devices(plan, run, ["cuda"] * 3) is plan
    assert not plan.mixed


@given(st.lists(st.sampled_from(KINDS), min_size=3, max_size=5), st.integers(3, 40))
def test_a_plan_for_two_kinds(devices: list[str], microbatches: int) -> None:
    """It foretells nothing, and starts CPUs beside accelerators with the least."""
    run, plan = planned(f"batch.microbatches={microbatches}")
    made = on_devices(plan, run, devices)
    kinds = set(devices[:3])
    assert Plan.from_json(made.to_json()) == made
    assert made.mixed == (len(kinds) == 2)
    if kinds == {"cuda"}:
        return
    assert made.devices == tuple(devices[:3])
    assert made.predicted.step_s == made.predicted.memory_bytes == 0
    assert made.predicted.parameters == plan.predicted.parameters
    assert "nothing is foretold" in made.note
    covered = [index for start, stop in made.splits for index in range(start, stop)]
    assert covered == list(range(microbatches))
    if made.mixed:
        least = [n for n, kind in zip(made.shares, made.devices, strict=True) if kind == "cpu"]
        most = [n for n, kind in zip(made.shares, made.devices, strict=True) if kind == "cuda"]
        assert set(least) == {1}
        assert max(most) - min(most) <= 1
    else:
        assert made.splits == plan.splits


def test_shares_that_the_user_keeps_equal_stay_so() -> None:
    run, plan = planned("batch.microbatches=12", "layout.balance=false")
    assert on_devices(plan, run, ["cuda", "cpu", "cpu"]).shares == [4, 4, 4]


def test_an_island_of_several_ranks_starts_with_one_for_each() -> None:
    words = ("batch.microbatches=12", "launch.processes=4", "layout.islands=2", "layout.shard=2")
    run, plan = planned(*words)
    made = on_devices(plan, run, ["cpu", "cuda"])
    assert made.shares == [2, 10]
    assert json.loads(made.to_json())["devices"] == ["cpu", "cuda"]
