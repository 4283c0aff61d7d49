"""What launchers say in the environment, and what this program makes of it."""

from __future__ import annotations

import resource

import pytest

from cordee.config.run import Run
from cordee.dist.process_group import (
    MAX_OPEN_FILES,
    LaunchInfo,
    channel_environment,
    passive_wait_variables,
    raise_file_limit,
    read_launch_info,
    worker_environment,
)
from cordee.errors import ConfigError
from cordee.launcher.rendezvous import network_interface

LAUNCHERS = {
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        LaunchInfo(5, 8, 1, "", True, 2),
    ),
    "slurm": (
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"},
        LaunchInfo(3, 4, 1, "", True, 2),
    ),
    "open mpi": (
        {
            "OMPI_COMM_WORLD_RANK": "2",
            "OMPI_COMM_WORLD_SIZE": "6",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        LaunchInfo(2, 6, 0, "", True, 3),
    ),
    "ours": (
        channel_environment((5, 6, 7, 8, 9)),
        LaunchInfo(
            has_launcher=True,
            channel_descriptor=5,
            config_descriptor=6,
            progress_descriptor=7,
            terminal_descriptors=(8, 9),
        ),
    ),
    "a shell inside a Slurm allocation": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
        LaunchInfo(),
    ),
    "nobody": ({"PATH": "/bin"}, LaunchInfo()),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_is_taken_as_it_is(name: str) -> None:
    environment, expected = LAUNCHERS[name]
    assert read_launch_info(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "two", "WORLD_SIZE": "4"},
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "some"},
    ],
)
def test_contradictions_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as exc_info:
        read_launch_info(environment)
    assert "RANK" in exc_info.value.sentence()


def test_ranks_of_one_host_listen_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    name = network_interface(Run())
    assert name == "lo"
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(key, raising=False)
        assert worker_environment(9, 1, name)[key] == "lo"
        monkeypatch.setenv(key, "eth7")
        assert worker_environment(9, 1, name)[key] == "eth7", "a user's own choice"
        assert worker_environment(9, 1, "eth0")[key] == "eth0", "what other hosts dial"


def test_the_limit_of_open_files_is_raised() -> None:
    previous_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, previous_limit[1]), previous_limit[1]))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(
            previous_limit[1], MAX_OPEN_FILES
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, previous_limit)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_threads_of_workers_sleep_unless_the_user_says_how_they_wait(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(variable, raising=False)
    environment = worker_environment(9, 2, "")
    assert (environment["OMP_WAIT_POLICY"], environment["OMP_NUM_THREADS"]) == ("PASSIVE", "2")
    monkeypatch.setenv(name, "300")
    environment = worker_environment(9, 2, "")
    assert environment[name] == "300" and (
        name == "OMP_WAIT_POLICY" or "OMP_WAIT_POLICY" not in environment
    )
    assert passive_wait_variables({name: "1"}) == {}
