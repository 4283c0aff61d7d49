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

from cordee.checkpoint.format import seal, unseal
from cordee.checkpoint.save import Saver
from cordee.cli.main import main
from tests.conftest import SMALL, TINY, digest, events, rows

WORDS = (
    *SMALL, *TINY, "run.steps=8", "checkpoint.every=2", "evaluate.tokens=0", "evaluate.sample=0",
    "launch.processes=1",
)  # fmt: skip


def begin(folder: Path, *words: str) -> int:
    """The command, in this process."""
    return main(["train", *WORDS, f"run.dir={folder}", *words])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with five rows and checkpoints of steps 2 and 4, and the digest that it is to reach."""
    place = tmp_path_factory.mktemp("damaged")
    assert begin(place / "clean") == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="drill"):
        patch.setattr(Saver, "poll", lambda saver: saver.join())  # saves end within a step
        begin(place / "cut", "fault.crash=step.start:6:0")
    return place / "cut", digest(place / "clean")


@pytest.fixture
def run(base: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the run that was cut off."""
    shutil.copytree(base[0], tmp_path / "run")
    return tmp_path / "run"


def append(name: str, line: bytes) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        with open(run / name, "ab") as stream:
            stream.write(line + b"\n")

    return spoil


def replace(name: str, by: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        (run / name).unlink()
        by(run / name)

    return spoil


def copy_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004.g1"


FORGED = b'{"event": "finished", "step": 8, "tokens": 1024, "saved": true, "weights_sha256": "0"}'
SPOILS: dict[str, Callable[[Path], object]] = {
    "backup": lambda run: shutil.copytree(copy_of(run), f"{copy_of(run)}.g2.bak"),
    "half a number": lambda run: os.mkdir(f"{copy_of(run)}.5"),
    "copied by a file manager": lambda run: os.mkdir(f"{copy_of(run)} (copy)"),
    "a large generation": lambda run: os.mkdir(f"{copy_of(run)}{'9' * 17}"),
    "finished, forged": append("events.jsonl", FORGED),
    "finished too early": append("events.jsonl", FORGED.replace(b"8", b"4", 1)),
    "generation, forged": append("events.jsonl", b'{"event": "x", "generation": "g7"}'),
    **{
        f"{name}: {line[:24]!r}": append(name, line)
        for name in ("metrics.jsonl", "layers.jsonl", "events.jsonl")
        for line in (b'{"step": NaN}', b'{"loss": 1}', b"\xff\xfe", b"[" * 9999, b"[1]")
    },
    "digits": append("metrics.jsonl", b'{"step": ' + b"9" * 6000 + b"}"),
    "a step of the future": append("metrics.jsonl", b'{"step": 900719925474099}'),
    **{
        f"{name} is {kind}": replace(name, by)
        for name in ("metrics.jsonl", "events.jsonl", "plan.json")
        for kind, by in (
            ("a pipe", os.mkfifo), ("a folder", os.mkdir),
            ("endless", lambda path: path.symlink_to("/dev/zero")),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_the_same_command_goes_on(
    spoil: Callable[[Path], object], run: Path, base: tuple[Path, str]
) -> None:
    spoil(run)
    assert begin(run) == 0
    told = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()
            if line.startswith(b"{") and b"NaN" not in line]  # fmt: skip
    assert told[-1]["event"] == "finished" and told[-1]["weights_sha256"] == base[1]


def reseal(run: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = copy_of(run) / "manifest.json"
    body = unseal(manifest.read_bytes())
    assert isinstance(body, dict)
    change(body)
    manifest.write_bytes(seal(body))


def rename(run: Path) -> None:
    copy_of(run).rename(run / "checkpoints" / "step-00000005.g1")


def link(run: Path) -> None:
    copy_of(run).rename(run / "elsewhere")
    copy_of(run).symlink_to(run / "elsewhere")


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "progress of another step": (
        lambda run: reseal(run, lambda body: body["meta"]["progress"].update(step=2)),  # type: ignore[index]
        "the progress in it of step 2",
    ),
    "folder of another step": (rename, "not of this folder"),
    "no manifest": (lambda run: (copy_of(run) / "manifest.json").unlink(), "no manifest.json"),
    "link": (link, "is a link"),
}


@pytest.mark.parametrize(("spoil", "reason"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_checkpoint_is_named_and_an_older_one_taken(
    spoil: Callable[[Path], object], reason: str, run: Path, base: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(run)
    capsys.readouterr()
    assert main(["fingerprint", str(run)]) == 0
    assert reason in capsys.readouterr().err
    assert begin(run) == 0
    assert digest(run) == base[1]
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
    (told,) = [e for e in events(run) if str(e["event"]).startswith("checkpoint_")
               and reason in str(e.get("cause"))]  # fmt: skip
    (resumed,) = [e for e in events(run) if e["event"] == "resumed"]
    assert resumed["checkpoint"] == "step-00000002.g1" and str(told["path"]).startswith("step-")


def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_again(
    base: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base[0].with_name("clean"), tmp_path / "run")
    assert begin(tmp_path / "run") == 0 and "is finished" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert begin(tmp_path / "run") == 2
    assert "put checkpoints/ back" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
