"""Several hosts in one run: they join, leave, die, freeze and are cut off; the descent is the same.

Hosts are processes of this machine, on its loopback or with networks of their own (root). The
oracle is the run of one process.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL, TINY, cordee, events, train
from tests.drills.hosts import (
    LONG,
    Rope,
    check_run,
    clean_digest,
    free_port,
    gone_within,
)
from tests.drills.wires import Net, need_namespaces


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the long run on one process."""
    return clean_digest(tmp_path_factory.mktemp("clean") / "run")


def settle(rope: Rope, islands: int) -> None:
    """So many islands compute, and a few steps go by."""
    rope.until_islands(islands)
    rope.until_step(rope.step + 5)


def test_hosts_are_killed_and_join_again_the_founder_too(clean: str, run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        founder, joined = rope.found(), rope.join()
        settle(rope, 2)
        workers = joined.kill()
        rope.goes_on()
        assert gone_within(workers, 30.0)
        last = rope.join()
        settle(rope, 2)
        workers = founder.kill()
        rope.goes_on()
        assert gone_within(workers, 30.0)
        words = (*SMALL, *LONG, f"run.dir={run_dir}", "launch.processes=1")
        second = cordee("train", *words, f"launch.listen=127.0.0.1:{free_port()}")
        assert second.returncode == 2
        assert "another process trains in this folder" in second.stderr
        assert last.end() == 0, rope.told()
    found = [event["event"] for event in check_run(run_dir, clean)]
    assert found.count("host_joined") == 2
    assert found.count("host_silent") == 2


def test_who_may_not_join_is_told_why_and_disturbs_nobody(clean: str, run_dir: Path) -> None:
    secret = run_dir.with_name("secret")
    secret.write_text("ab" * 32)
    secret.chmod(0o600)
    fake = run_dir.with_name("fake")
    (fake / "torch-0.1.dist-info").mkdir(parents=True)
    (fake / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    foreign = run_dir.with_name("foreign")
    train(foreign, "run.steps=1", "run.seed=5", "launch.processes=1")
    for record in [*foreign.glob("*.jsonl"), foreign / "run.toml"]:
        record.unlink()
    shutil.rmtree(foreign / "checkpoints")
    with Rope(run_dir) as rope:
        founder = rope.found()
        other = rope.join("optim.lr=0.001")
        old = rope.join(path=str(fake))
        (foreign / "secret").write_bytes((run_dir / "secret").read_bytes())
        (foreign / "secret").chmod(0o600)
        elsewhere = rope.join(folder=foreign)
        stranger = rope.join(f"launch.secret={secret}")
        readable = run_dir.with_name("readable")
        shutil.copy(run_dir / "secret", readable)
        readable.chmod(0o644)
        careless = rope.join(f"launch.secret={readable}")
        lost = rope.join(through=f"127.0.0.1:{free_port()}")
        for host, word in (
            (other, "optim.lr"),
            (old, "0.1"),
            (elsewhere, "data's digest"),
            (stranger, "the secret differs"),
            (careless, "chmod 600"),
            (lost, "nobody has answered"),
        ):
            assert host.end(40) == 2, rope.told()
            assert word in host.said
        assert founder.end() == 0, rope.told()
        assert "optim.lr" in founder.said
    found = check_run(run_dir, clean)
    assert "quorum" not in [event["event"] for event in found]


@pytest.mark.slow
def test_a_frozen_host_is_fenced_and_comes_back_the_founder_too(clean: str, run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        founder, joined = rope.found(), rope.join()
        for host, first in ((joined, False), (founder, True)):
            settle(rope, 2)
            host.freeze()
            rope.goes_on()
            rope.until_step(rope.step + 3)
            host.thaw(workers_first=first)
            rope.until_islands(2)
        assert [joined.end(), founder.end()] == [0, 0], rope.told()
        assert "fenced" in joined.said
        assert "fenced" in founder.said
    check_run(run_dir, clean)


@pytest.mark.slow
def test_one_to_four_to_two_to_three_to_four_islands(clean: str, run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        founder = rope.found()
        pair, single = rope.join(ranks=2), rope.join()
        settle(rope, 4)
        workers = pair.workers
        pair.ask(signal.SIGTERM)
        assert pair.end() == 143
        assert gone_within(workers, 30.0)
        settle(rope, 2)
        third = rope.join()
        settle(rope, 3)
        founder.kill()
        rope.goes_on()
        settle(rope, 2)
        last = rope.join(ranks=2, through=rope.address_of(third))
        settle(rope, 4)
        assert [single.end(), third.end(), last.end()] == [0, 0, 0], rope.told()
    check_run(run_dir, clean)


@pytest.mark.slow
def test_all_are_asked_to_leave_at_once_and_the_last_one_saves(clean: str, run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        founder, joined = rope.found(), rope.join()
        settle(rope, 2)
        founder.ask(signal.SIGINT)
        rope.goes_on()
        assert founder.end() == 130
        settle(rope, 1)
        joined.ask(signal.SIGINT)
        assert joined.end() == 130
        again = [rope.found(), rope.join()]
        settle(rope, 2)
        step = rope.step
        for host in again:
            host.ask()
        assert [host.end() for host in again] == [143, 143], rope.told()
        last = rope.found()
        assert last.end() == 0
        assert f"resumed after step {step}" in last.said or rope.step > step
    check_run(run_dir, clean)


@pytest.mark.slow
def test_who_joins_at_the_end_ends_well_too(clean: str, run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        founder = rope.found()
        rope.until_step(155)
        late = rope.join()
        assert [founder.end(), late.end(40)] == [0, 0], rope.told()
    check_run(run_dir, clean)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1], ids=["founder", "joined"])
def test_a_host_is_lost_without_a_word(clean: str, run_dir: Path, who: int) -> None:
    """Its wire is taken away, then it dies: nobody gets a last packet."""
    need_namespaces()
    with Net(2) as net, Rope(run_dir, address=f"{net.ip(0)}:7000") as rope:
        hosts = [rope.found(prefix=net.prefix(0)), rope.join(prefix=net.prefix(1))]
        rope.until_islands(2)
        before = net.sent_bytes(1)
        rope.until_step(rope.step + 5)
        assert net.sent_bytes(1) - before > 100_000, "gradients do not travel over this wire"
        net.unplug(who)
        workers = hosts[who].kill()
        rope.goes_on()
        assert gone_within(workers, 30.0)
        assert hosts[1 - who].end() == 0, rope.told()
    check_run(run_dir, clean)


@pytest.mark.slow
def test_what_is_left_of_an_island_is_saved_and_waits(clean: str, run_dir: Path) -> None:
    """An island of two hosts loses one: the other holds its part, copied, and saves the whole."""
    words = ("layout.shard=2", "fault.copy_every=5")
    with Rope(run_dir, *words) as rope:
        founder, joined = rope.found(ranks=2), rope.join(ranks=2)
        settle(rope, 2)
        for host in (founder, joined):  # one rank each is left: together they are an island
            before = rope.step
            os.kill(max(host.workers), signal.SIGTERM)
            rope.wait(lambda host=host: len(host.workers) == 1, 20)  # type: ignore[misc]
            rope.until_step(before + 7)
        assert rope.islands == 1
        founder.kill()
        rope.wait(lambda: "rescued" in _names(run_dir), 30)
        assert "no island is whole: 1 of 2 ranks are ready here" in joined.said
        joined.kill()
    (saved,) = [event for event in events(run_dir) if event["event"] == "rescued"]
    assert 0 <= int(str(saved["step"])) - int(str(saved["state_of_step"])) <= 5, saved
    with Rope(run_dir, *words) as rope:
        assert rope.found(ranks=2).end() == 0, rope.told()
    found = check_run(run_dir, clean)
    resumed = [event for event in found if event["event"] == "resumed"]
    assert [event["checkpoint"] for event in resumed] == [saved["path"]]


def _names(folder: Path) -> list[str]:
    return [str(event["event"]) for event in events(folder)]


@pytest.mark.parametrize(
    ("kind", "times_s", "steps"),
    [
        pytest.param("cut", (3,), 1200, marks=pytest.mark.slow),
        pytest.param("deaf", (3,), 1200, marks=pytest.mark.nightly),
        pytest.param("cut", (3, 30), 5000, marks=pytest.mark.nightly),
        pytest.param("deaf", (3, 30), 5000, marks=pytest.mark.nightly),
    ],
)
def test_partitions_heal(kind: str, times_s: tuple[int, ...], steps: int, tmp_path: Path) -> None:
    """One of the two goes on, the other is fenced and comes back by itself."""
    need_namespaces()
    words, run_dir = (*TINY, f"run.steps={steps}"), tmp_path / "run"
    clean = clean_digest(tmp_path / "clean", *words)
    with Net(2) as net, Rope(run_dir, *words, address=f"{net.ip(0)}:7000") as rope:
        hosts = [rope.found(prefix=net.prefix(0)), rope.join(prefix=net.prefix(1))]
        for who, for_s in zip((1, 0), times_s, strict=False):
            settle(rope, 2)
            time.sleep(2)  # deadlines follow from heartbeats that were seen
            began = time.monotonic()
            if kind == "cut":
                net.cut(who)
            else:
                net.deafen(who, towards=1 - who)
            rope.goes_on()
            time.sleep(max(0.0, began + for_s - time.monotonic()))
            net.heal(who)
            rope.until_islands(2)
        assert [host.end() for host in hosts] == [0, 0], rope.told()
        fenced = sum(host.said.count("asks to be let in again") for host in hosts)
        assert fenced == len(times_s), rope.told()
    check_run(run_dir, clean, steps)
