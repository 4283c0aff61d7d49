"""A run's folder after anything: the same command goes on, and says what it passed over.

In one process: a run that was cut off is copied, one thing in it is spoiled, and the
command is given again. The oracle is the digest of the undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.format import decode_checked_json, encode_checked_json
from cordee.cli.main import main
from tests.conftest import SMALL, TINY, read_events, read_rows, weights_digest

OVERRIDES = (
    *SMALL, *TINY, "run.steps=8", "checkpoint.every=2", "evaluate.tokens=0", "evaluate.sample=0",
    "launch.processes=1",
)  # fmt: skip


def run_train(folder: Path, *overrides: str) -> int:
    """The command, in this process."""
    return main(["train", *OVERRIDES, f"run.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with five rows and checkpoints of steps 2 and 4, and the digest that it is to reach."""
    home = tmp_path_factory.mktemp("damaged")
    assert run_train(home / "clean") == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="drill"):
        # Saves end within a step.
        patch.setattr(Checkpointer, "status", property(lambda checkpointer: checkpointer.join()))
        run_train(home / "cut", "fault.crash=step.start:6:0")
    return home / "cut", weights_digest(home / "clean")


@pytest.fixture
def run(interrupted_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the run that was cut off."""
    shutil.copytree(interrupted_run[0], tmp_path / "run")
    return tmp_path / "run"


def append_line(name: str, line: bytes) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        with open(run / name, "ab") as stream:
            stream.write(line + b"\n")

    return damage


def replace_file(name: str, create: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        (run / name).unlink()
        create(run / name)

    return damage


def newest_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004.g1"


FORGED_EVENT = (
    b'{"event": "finished", "step": 8, "tokens": 1024, "saved": true, "weights_sha256": "0"}'
)
DAMAGES: dict[str, Callable[[Path], object]] = {
    "backup": lambda run: shutil.copytree(
        newest_checkpoint(run), f"{newest_checkpoint(run)}.g2.bak"
    ),
    "half a number": lambda run: os.mkdir(f"{newest_checkpoint(run)}.5"),
    "copied by a file manager": lambda run: os.mkdir(f"{newest_checkpoint(run)} (copy)"),
    "a large generation": lambda run: os.mkdir(f"{newest_checkpoint(run)}{'9' * 17}"),
    "finished, forged": append_line("events.jsonl", FORGED_EVENT),
    "finished too early": append_line("events.jsonl", FORGED_EVENT.replace(b"8", b"4", 1)),
    "generation, forged": append_line("events.jsonl", b'{"event": "x", "generation": "g7"}'),
    **{
        f"{name}: {line[:24]!r}": append_line(name, line)
        for name in ("metrics.jsonl", "layers.jsonl", "events.jsonl")
        for line in (b'{"step": NaN}', b'{"loss": 1}', b"\xff\xfe", b"[" * 9999, b"[1]")
    },
    "digits": append_line("metrics.jsonl", b'{"step": ' + b"9" * 6000 + b"}"),
    "a step of the future": append_line("metrics.jsonl", b'{"step": 900719925474099}'),
    **{
        f"{name} is {kind}": replace_file(name, by)
        for name in ("metrics.jsonl", "events.jsonl", "plan.json")
        for kind, by in (
            ("a pipe", os.mkfifo),
            ("a folder", os.mkdir),
            ("endless", lambda path: path.symlink_to("/dev/zero")),
        )
    },
}


@pytest.mark.parametrize("spoil", DAMAGES.values(), ids=DAMAGES)
def test_the_same_command_goes_on(
    spoil: Callable[[Path], object], run: Path, interrupted_run: tuple[Path, str]
) -> None:
    spoil(run)
    assert run_train(run) == 0
    event_records = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()
            if line.startswith(b"{") and b"NaN" not in line]  # fmt: skip
    assert (
        event_records[-1]["event"] == "finished"
        and event_records[-1]["weights_sha256"] == interrupted_run[1]
    )


def change_manifest(run: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = newest_checkpoint(run) / "manifest.json"
    body = decode_checked_json(manifest.read_bytes())
    assert isinstance(body, dict)
    change(body)
    manifest.write_bytes(encode_checked_json(body))


def rename_checkpoint(run: Path) -> None:
    newest_checkpoint(run).rename(run / "checkpoints" / "step-00000005.g1")


def link_checkpoint(run: Path) -> None:
    newest_checkpoint(run).rename(run / "elsewhere")
    newest_checkpoint(run).symlink_to(run / "elsewhere")


UNFIT_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "progress of another step": (
        lambda run: change_manifest(run, lambda body: body["meta"]["progress"].update(step=2)),  # type: ignore[index]
        "the progress in it of step 2",
    ),
    "folder of another step": (rename_checkpoint, "not of this folder"),
    "no manifest": (
        lambda run: (newest_checkpoint(run) / "manifest.json").unlink(),
        "no manifest.json",
    ),
    "link": (link_checkpoint, "is a link"),
}


@pytest.mark.parametrize(("spoil", "reason"), UNFIT_CHECKPOINTS.values(), ids=UNFIT_CHECKPOINTS)
def test_an_unfit_checkpoint_is_named_and_an_older_one_taken(
    spoil: Callable[[Path], object], reason: str, run: Path, interrupted_run: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(run)
    capsys.readouterr()
    assert main(["fingerprint", str(run)]) == 0
    assert reason in capsys.readouterr().err
    assert run_train(run) == 0
    assert weights_digest(run) == interrupted_run[1]
    assert [row["step"] for row in read_rows(run)] == list(range(1, 9))
    (rejection,) = [e for e in read_events(run) if str(e["event"]).startswith("checkpoint_")
               and reason in str(e.get("cause"))]  # fmt: skip
    (resume_event,) = [e for e in read_events(run) if e["event"] == "resumed"]
    assert resume_event["checkpoint"] == "step-00000002.g1" and str(rejection["path"]).startswith(
        "step-"
    )


def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_again(
    interrupted_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(interrupted_run[0].with_name("clean"), tmp_path / "run")
    assert run_train(tmp_path / "run") == 0 and "is finished" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    old_metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_train(tmp_path / "run") == 2
    assert "put checkpoints/ back" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == old_metrics
