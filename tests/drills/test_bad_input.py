"""What is wrong before the start: exit code 2, the values, the nearest fix, nothing written."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.conftest import SMALL, run_cordee, train_small

CASES = {
    "unknown key": (("optim.lrr=0.1",), "did you mean optim.lr"),
    "unknown verb value": (("optim.name=mumon",), "optim.name=muon"),
    "wrong type": (("run.steps=ten",), "run.steps"),
    "missing data": (("data.path=nowhere.txt",), "nowhere.txt"),
    "unknown builtin": (("data.path=builtin:markow",), "builtin:markov"),
    "short data": (("data.tokens=20",), "data.sequence"),
    "few microbatches": (("batch.microbatches=2", "launch.processes=4"), "batch.microbatches"),
    "does not divide": (("layout.shard=2", "launch.processes=3"), "launch.processes"),
    "unequal shards": (
        ("layout.shard=2", "launch.processes=2", "batch.microbatches=5"),
        "batch.microbatches",
    ),
    "heads that do not divide": (("layout.tensor=3", "launch.processes=3"), "layout.tensor=2"),
    "many processes": (("launch.processes=5000", "batch.microbatches=5000"), "launch.processes"),
    "width": (("model.width=65",), "model.width"),
    "shared keys": (("model.kv_heads=3",), "model.kv_heads=2"),
    "exact by the clock": (("run.exact=true", "run.minutes=1"), "run.minutes"),
    "fp8 on a CPU": (("run.precision=fp8", "launch.device=cpu"), "run.precision=bf16"),
    "loss scaling with bf16": (("run.loss_scale=1024",), "run.loss_scale=0"),
    "a scale that rounds": (("run.loss_scale=1000", "run.precision=fp16"), "run.loss_scale=1024"),
    "dims of fp8": (("run.precision=fp8", "model.ffn=100"), "model.ffn=96"),
    "offload on a CPU": (("memory.offload=parameters", "launch.device=cpu"), "memory.offload=none"),
    "missing file": (("nowhere.toml",), "nowhere.toml"),
    "a name of nobody": (("launch.listen=no.such.host.invalid:7433",), "no.such.host.invalid"),
    "another machine's address": (("launch.listen=192.0.2.7:0",), "192.0.2.7"),
    "every address": (("launch.listen=0.0.0.0:0",), "0.0.0.0"),
    "a register of no kind": (
        ("launch.register=zookeeper://a:1", "launch.listen=127.0.0.1:0"),
        "launch.register=folder, or etcd://HOST:PORT",
    ),
    "a register for one host": (("launch.register=etcd://127.0.0.1:9",), "launch.listen"),
    "an etcd that is away": (
        ("launch.register=etcd://127.0.0.1:9", "launch.listen=127.0.0.1:0"),
        "the register cannot be used: etcd at 127.0.0.1:9: Connection refused",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    overrides, message = CASES[name]
    folder = tmp_path / "run"
    result = run_cordee("train", *SMALL, f"run.dir={folder}", *overrides, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "nearest fix" in result.stderr
    assert "Traceback" not in result.stderr
    assert not folder.exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_compiling_without_a_compiler(processes: int, run_dir: Path) -> None:
    overrides = ("run.compile=blocks", "launch.device=cpu", f"launch.processes={processes}")
    result = run_cordee("train", *SMALL, *overrides, f"run.dir={run_dir}", CXX="no-such-compiler")
    assert result.returncode == 2, result.stderr
    assert "no-such-compiler" in result.stderr and "run.compile=none" in result.stderr
    assert not run_dir.exists()


def test_malformed_toml(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[run\nsteps = 3")
    result = run_cordee("train", "bad.toml", folder=tmp_path)
    assert result.returncode == 2
    assert "TOML" in result.stderr
    assert os.listdir(tmp_path) == ["bad.toml"]


def test_unreadable_toml(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    result = run_cordee("train", "folder.toml", folder=tmp_path)
    assert result.returncode == 2
    assert "cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place", ["/proc/no/run", "taken", "/dev/null/run"])
def test_a_run_folder_that_cannot_be_written(place: str, processes: int, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    result = run_cordee(
        "train", *SMALL, f"run.dir={place}", f"launch.processes={processes}", folder=tmp_path
    )
    assert result.returncode == 2, result.stderr
    assert "cannot be written" in result.stderr
    assert "nearest fix" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["taken"]


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    result = run_cordee("train", "data.path=empty.txt", folder=tmp_path)
    assert result.returncode == 2
    assert os.listdir(tmp_path) == ["empty.txt"]


def test_folder_of_another_run(run_dir: Path) -> None:
    train_small(run_dir, "run.steps=3")
    result = run_cordee("train", *SMALL, f"run.dir={run_dir}", "run.steps=3", "optim.lr=0.5")
    assert result.returncode == 2
    assert "optim.lr" in result.stderr and "0.5" in result.stderr
    never_result = run_cordee(
        "train", *SMALL, f"run.dir={run_dir}", "run.steps=3", "run.resume=never"
    )
    assert never_result.returncode == 2


def test_port_in_use_is_said(run_dir: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        result = run_cordee(
            "train", *SMALL, f"run.dir={run_dir}", "run.steps=3",
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(listener.getsockname()[1]),
        )  # fmt: skip
    assert result.returncode == 2, result.stderr[-1500:]
    assert "in use" in result.stderr


def test_changed_data_is_said_and_harmless(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    overrides = [word for word in SMALL if not word.startswith("data.") or "sequence" in word]
    command = (
        "train",
        *overrides,
        f"data.path={text}",
        f"run.dir={tmp_path / 'run'}",
        "run.steps=12",
    )
    drill = ("fault.kill=step.start:10:0", "fault.recover=false")
    kill_result = run_cordee(*command, "checkpoint.every=4", *drill)
    assert kill_result.returncode != 0
    text.write_text("another text")
    result = run_cordee(*command, "checkpoint.every=4")
    assert result.returncode == 0, result.stderr
    assert "data_changed" in (tmp_path / "run" / "events.jsonl").read_text()
