"""Several hosts in one run: they join, leave, die, freeze and are cut off; the descent is the same.

Hosts are processes of this machine, on its loopback or with networks of their own (root). The
oracle is the run of one process.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL, TINY, read_events, run_cordee, train_small
from tests.drills.hosts import (
    LONG_RUN,
    HostGroup,
    all_exit_within,
    check_run,
    clean_digest,
    free_port,
)
from tests.drills.network_namespaces import NetworkNamespaces, require_namespaces
from tests.etcd_server import EtcdServer

ON_BOTH_REGISTERS = pytest.mark.parametrize(
    "register", ["folder", pytest.param("etcd", marks=pytest.mark.nightly)], indirect=True
)


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the long run on one process."""
    return clean_digest(tmp_path_factory.mktemp("clean") / "run")


@pytest.fixture
def register(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The override that names a register of this kind."""
    if request.param == "folder":
        yield "launch.register=folder"
    else:
        with EtcdServer(tmp_path / "etcd") as server:
            yield f"launch.register={server.url}"


def wait_for_islands(host_group: HostGroup, islands: int) -> None:
    """So many islands compute, and a few steps go by."""
    host_group.wait_for_islands(islands)
    host_group.wait_for_step(host_group.last_step + 5)


@ON_BOTH_REGISTERS
def test_hosts_are_killed_and_join_again_the_founder_too(
    reference_digest: str, run_dir: Path, register: str
) -> None:
    with HostGroup(run_dir, register) as host_group:
        founder, joiner = host_group.start_first(), host_group.join()
        wait_for_islands(host_group, 2)
        worker_pids = joiner.kill()
        host_group.wait_for_next_step()
        assert all_exit_within(worker_pids, 30.0)
        last_joiner = host_group.join()
        wait_for_islands(host_group, 2)
        worker_pids = founder.kill()
        host_group.wait_for_next_step()
        assert all_exit_within(worker_pids, 30.0)
        overrides = (*SMALL, *LONG_RUN, f"run.dir={run_dir}", "launch.processes=1")
        second_result = run_cordee("train", *overrides, f"launch.listen=127.0.0.1:{free_port()}")
        assert second_result.returncode == 2
        assert "another process trains in this folder" in second_result.stderr
        assert last_joiner.wait_exit() == 0, host_group.transcript()
    event_names = [event["event"] for event in check_run(run_dir, reference_digest)]
    assert event_names.count("host_joined") == 2
    assert event_names.count("host_silent") == 2


def test_who_may_not_join_is_told_why_and_disturbs_nobody(
    reference_digest: str, run_dir: Path
) -> None:
    secret_path = run_dir.with_name("secret")
    secret_path.write_text("ab" * 32)
    secret_path.chmod(0o600)
    fake_packages = run_dir.with_name("fake")
    (fake_packages / "torch-0.1.dist-info").mkdir(parents=True)
    (fake_packages / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    foreign_folder = run_dir.with_name("foreign")
    train_small(foreign_folder, "run.steps=1", "run.seed=5", "launch.processes=1")
    for record in [*foreign_folder.glob("*.jsonl"), foreign_folder / "run.toml"]:
        record.unlink()
    shutil.rmtree(foreign_folder / "checkpoints")
    with HostGroup(run_dir, "fault.silence_s=200") as host_group:
        founder = host_group.start_first()
        other_lr_host = host_group.join("optim.lr=0.001")
        # The run stands still until all are refused: it must not end before the slowest has come.
        host_group.wait_for_step(3)
        founder_ranks = founder.rank_pids
        for pid in founder_ranks:
            os.kill(pid, signal.SIGSTOP)
        old_torch_host = host_group.join(path=str(fake_packages))
        (foreign_folder / "secret").write_bytes((run_dir / "secret").read_bytes())
        (foreign_folder / "secret").chmod(0o600)
        other_data_host = host_group.join(folder=foreign_folder)
        other_secret_host = host_group.join(f"launch.secret={secret_path}")
        readable_path = run_dir.with_name("readable")
        shutil.copy(run_dir / "secret", readable_path)
        readable_path.chmod(0o644)
        open_secret_host = host_group.join(f"launch.secret={readable_path}")
        wrong_address_host = host_group.join(join_address=f"127.0.0.1:{free_port()}")
        for host, message in (
            (other_lr_host, "optim.lr"),
            (old_torch_host, "0.1"),
            (other_data_host, "data's digest"),
            (other_secret_host, "the secret differs"),
            (open_secret_host, "chmod 600"),
            (wrong_address_host, "nobody has answered"),
        ):
            assert host.wait_exit(40) == 2, host_group.transcript()
            assert message in host.output
        for pid in founder_ranks:
            os.kill(pid, signal.SIGCONT)
        assert founder.wait_exit() == 0, host_group.transcript()
        assert "optim.lr" in founder.output
    event_records = check_run(run_dir, reference_digest)
    assert "quorum" not in [event["event"] for event in event_records]


@pytest.mark.slow
def test_an_etcd_that_is_away_stops_no_step_and_changes_wait(
    reference_digest: str, run_dir: Path, tmp_path: Path
) -> None:
    with (
        EtcdServer(tmp_path / "etcd") as server,
        HostGroup(run_dir, f"launch.register={server.url}") as host_group,
    ):
        founder, joiner = host_group.start_first(), host_group.join()
        wait_for_islands(host_group, 2)
        server.stop()
        wait_for_islands(host_group, 2)
        refused_host = host_group.join()
        assert refused_host.wait_exit(40) == 2, host_group.transcript()
        assert "the register cannot be used: etcd at 127.0.0.1" in refused_host.output
        joiner.kill()
        host_group.wait_until(
            lambda: "membership wait for the register: etcd at 127.0.0.1" in founder.output, 30
        )
        step = host_group.last_step
        server.start()
        host_group.wait_for_step(step + 1)
        assert founder.wait_exit() == 0, host_group.transcript()
        assert founder.output.count("wait for the register") == 1, host_group.transcript()
        assert founder.output.count("the register answers again") == 1
    event_names = [event["event"] for event in check_run(run_dir, reference_digest)]
    assert event_names.count("host_silent") == 1
    assert not (run_dir / "members.json").exists(), "the folder has no part in it"


@pytest.mark.slow
@ON_BOTH_REGISTERS
def test_a_frozen_host_is_fenced_and_comes_back_the_founder_too(
    reference_digest: str, run_dir: Path, register: str
) -> None:
    with HostGroup(run_dir, register) as host_group:
        founder, joiner = host_group.start_first(), host_group.join()
        for host, workers_first in ((joiner, False), (founder, True)):
            wait_for_islands(host_group, 2)
            host.freeze()
            host_group.wait_for_next_step()
            host_group.wait_for_step(host_group.last_step + 3)
            host.thaw(workers_first=workers_first)
            host_group.wait_for_islands(2)
        assert [joiner.wait_exit(), founder.wait_exit()] == [0, 0], host_group.transcript()
        assert "fenced" in joiner.output
        assert "fenced" in founder.output
    check_run(run_dir, reference_digest)


@pytest.mark.slow
def test_one_to_four_to_two_to_three_to_four_islands(reference_digest: str, run_dir: Path) -> None:
    with HostGroup(run_dir) as host_group:
        founder = host_group.start_first()
        pair_host, single_host = host_group.join(ranks=2), host_group.join()
        wait_for_islands(host_group, 4)
        worker_pids = pair_host.worker_pids
        pair_host.send_signal(signal.SIGTERM)
        assert pair_host.wait_exit() == 143
        assert all_exit_within(worker_pids, 30.0)
        wait_for_islands(host_group, 2)
        third_host = host_group.join()
        wait_for_islands(host_group, 3)
        founder.kill()
        host_group.wait_for_next_step()
        wait_for_islands(host_group, 2)
        last_host = host_group.join(ranks=2, join_address=host_group.listen_address(third_host))
        wait_for_islands(host_group, 4)
        assert [single_host.wait_exit(), third_host.wait_exit(), last_host.wait_exit()] == [
            0,
            0,
            0,
        ], host_group.transcript()
    check_run(run_dir, reference_digest)


@pytest.mark.slow
@ON_BOTH_REGISTERS
def test_all_are_asked_to_leave_at_once_and_the_last_one_saves(
    reference_digest: str, run_dir: Path, register: str
) -> None:
    with HostGroup(run_dir, register) as host_group:
        founder, joiner = host_group.start_first(), host_group.join()
        wait_for_islands(host_group, 2)
        founder.send_signal(signal.SIGINT)
        host_group.wait_for_next_step()
        assert founder.wait_exit() == 130
        wait_for_islands(host_group, 1)
        joiner.send_signal(signal.SIGINT)
        assert joiner.wait_exit() == 130
        hosts = [host_group.start_first(), host_group.join()]
        wait_for_islands(host_group, 2)
        step = host_group.last_step
        for host in hosts:
            host.send_signal()
        assert [host.wait_exit() for host in hosts] == [143, 143], host_group.transcript()
        last_host = host_group.start_first()
        assert last_host.wait_exit() == 0
        assert f"resumed after step {step}" in last_host.output or host_group.last_step > step
    check_run(run_dir, reference_digest)


@pytest.mark.slow
@ON_BOTH_REGISTERS
def test_who_joins_at_the_end_ends_well_too(
    reference_digest: str, run_dir: Path, register: str
) -> None:
    with HostGroup(run_dir, register) as host_group:
        founder = host_group.start_first()
        host_group.wait_for_step(155)
        joiner = host_group.join()
        assert [founder.wait_exit(), joiner.wait_exit(40)] == [0, 0], host_group.transcript()
    check_run(run_dir, reference_digest)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1], ids=["founder", "joined"])
def test_a_host_is_lost_without_a_word(reference_digest: str, run_dir: Path, who: int) -> None:
    """Its wire is taken away, then it dies: nobody gets a last packet."""
    require_namespaces()
    with NetworkNamespaces(2) as net, HostGroup(run_dir, address=f"{net.ip(0)}:7000") as host_group:
        hosts = [
            host_group.start_first(prefix=net.command_prefix(0)),
            host_group.join(prefix=net.command_prefix(1)),
        ]
        host_group.wait_for_islands(2)
        old_sent_bytes = net.sent_bytes(1)
        host_group.wait_for_step(host_group.last_step + 5)
        assert net.sent_bytes(1) - old_sent_bytes > 100_000, (
            "gradients do not travel over this wire"
        )
        net.unplug(who)
        worker_pids = hosts[who].kill()
        host_group.wait_for_next_step()
        assert all_exit_within(worker_pids, 30.0)
        assert hosts[1 - who].wait_exit() == 0, host_group.transcript()
    check_run(run_dir, reference_digest)


@pytest.mark.slow
def test_what_is_left_of_an_island_is_saved_and_waits(reference_digest: str, run_dir: Path) -> None:
    """An island of two hosts loses one: the other holds its part, copied, and saves the whole."""
    overrides = ("layout.shard=2", "fault.copy_every=5")
    with HostGroup(run_dir, *overrides) as host_group:
        founder, joiner = host_group.start_first(ranks=2), host_group.join(ranks=2)
        wait_for_islands(host_group, 2)
        for host in (founder, joiner):  # one rank each is left: together they are an island
            old_step = host_group.last_step
            os.kill(max(host.rank_pids), signal.SIGTERM)
            host_group.wait_until(lambda host=host: len(host.rank_pids) == 1, 20)  # type: ignore[misc]
            host_group.wait_for_step(old_step + 7)
        assert host_group.last_island_count == 1
        founder.kill()
        host_group.wait_until(lambda: "rescued" in _event_names(run_dir), 30)
        assert "no island is whole: 1 of 2 ranks are ready here" in joiner.output
        joiner.kill()
    (save_event,) = [event for event in read_events(run_dir) if event["event"] == "rescued"]
    assert 0 <= int(str(save_event["step"])) - int(str(save_event["state_of_step"])) <= 5, (
        save_event
    )
    with HostGroup(run_dir, *overrides) as host_group:
        assert host_group.start_first(ranks=2).wait_exit() == 0, host_group.transcript()
    event_records = check_run(run_dir, reference_digest)
    resume_events = [event for event in event_records if event["event"] == "resumed"]
    assert [event["checkpoint"] for event in resume_events] == [save_event["path"]]


def _event_names(folder: Path) -> list[str]:
    return [str(event["event"]) for event in read_events(folder)]


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
    require_namespaces()
    overrides, run_dir = (*TINY, f"run.steps={steps}"), tmp_path / "run"
    reference_digest = clean_digest(tmp_path / "clean", *overrides)
    with (
        NetworkNamespaces(2) as net,
        HostGroup(run_dir, *overrides, address=f"{net.ip(0)}:7000") as host_group,
    ):
        hosts = [
            host_group.start_first(prefix=net.command_prefix(0)),
            host_group.join(prefix=net.command_prefix(1)),
        ]
        for host_index, time_s in zip((1, 0), times_s, strict=False):
            wait_for_islands(host_group, 2)
            time.sleep(2)  # deadlines follow from heartbeats that were seen
            start_s = time.monotonic()
            if kind == "cut":
                net.cut(host_index)
            else:
                net.block_sending(host_index, other_number=1 - host_index)
            host_group.wait_for_next_step()
            time.sleep(max(0.0, start_s + time_s - time.monotonic()))
            net.heal(host_index)
            host_group.wait_for_islands(2)
        assert [host.wait_exit() for host in hosts] == [0, 0], host_group.transcript()
        fence_count = sum(host.output.count("asks to be let in again") for host in hosts)
        assert fence_count == len(times_s), host_group.transcript()
    check_run(run_dir, reference_digest, steps)
