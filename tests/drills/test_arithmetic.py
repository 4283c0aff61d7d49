"""One arithmetic in an exact run: golden digests, and who computes other bits is refused."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

from cordee.cli.main import main
from cordee.config.load import RUN_FILE, recorded
from cordee.model.arithmetic import fingerprint, libraries, portable_roots
from cordee.plan.arithmetic import NEEDS
from cordee.plan.cluster import processor_flags
from tests.conftest import SMALL, TINY, clean_environment, cordee, digest, events
from tests.drills.hosts import Rope

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "arithmetic.json").read_text())
OTHER = {"ATEN_CPU_CAPABILITY": "default"}
"""Another processor: PyTorch's loops without vector instructions."""

WORDS = (*SMALL, *TINY, "run.exact=true", "run.steps=4", "evaluate.sample=0", "evaluate.tokens=0",
         "launch.processes=1")  # fmt: skip


def maker() -> str:
    """The vendor_id of this machine's processor."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else ""


@pytest.mark.parametrize("arithmetic", GOLDEN["weights_sha256"])
def test_unlike_processors_end_with_the_same_bits(arithmetic: str, run_dir: Path) -> None:
    """The digests that other machines gave: of any maker's, or of this one's."""
    if not processor_flags() >= NEEDS or torch.__version__.split("+")[0] != GOLDEN["torch"]:
        pytest.skip(f"for x86 processors that have AVX2, and torch {GOLDEN['torch']}")
    known = GOLDEN["weights_sha256"][arithmetic]
    expected = known.get("any") or known.get(maker())
    if expected is None:
        pytest.skip(f"no digest of {maker()} under {arithmetic}")
    words = (f"run.arithmetic={arithmetic}", f"run.dir={run_dir}")
    done = cordee("train", *GOLDEN["run"], *words, **OTHER)
    assert done.returncode == 0, done.stderr
    assert f"bits    of {arithmetic} (as asked)" in done.stderr
    seen = digest(run_dir)[: len(expected)]
    if seen != expected and maker() != "GenuineIntel":
        pytest.xfail(f"{maker()} ends with {seen}: not measured there before ({expected})")
    assert seen == expected


def test_a_caller_that_has_imported_torch_is_not_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is wider than AVX2, auto would take avx2: too late in this process."""
    monkeypatch.setattr("cordee.begin.processor_flags", lambda: NEEDS)
    assert main(["train", *WORDS, f"run.dir={run_dir}"]) == 0
    assert 'arithmetic = "native"' in (run_dir / RUN_FILE).read_text()
    assert main(["train", *WORDS, f"run.dir={run_dir}-2", "run.arithmetic=avx2"]) == 2


def test_fingerprints_tell_arithmetics_apart() -> None:
    again = fingerprint.__wrapped__("cpu", "fp32", "native")
    found = {
        fingerprint("cpu", precision, arithmetic)
        for precision in ("fp32", "bf16") for arithmetic in ("native", "compatible")
    }  # fmt: skip
    assert again in found
    assert len(found) == 4


def test_portable_roots_are_roots() -> None:
    x = torch.rand(4001, generator=torch.Generator().manual_seed(3)) * 9
    before = x.sqrt()
    with portable_roots(True):
        special = torch.tensor([0.0, 1.0, 4.0, float("inf"), -1.0]).sqrt().tolist()
        inside, of_list, wide = x.sqrt(), torch._foreach_sqrt([x])[0], x.double().sqrt()
        in_place, out = x.clone().sqrt_(), torch.sqrt(x, out=torch.empty_like(x))
        y = x.clone().requires_grad_()
        y.sqrt().sum().backward()
    assert special[:4] == [0.0, 1.0, 2.0, float("inf")]
    assert special[4] != special[4]
    for same in (of_list, in_place, out):
        assert torch.equal(same, inside)
    assert torch.equal(inside, x.rsqrt().reciprocal())
    torch.testing.assert_close(inside.double(), wide, rtol=2e-7, atol=0.0)
    exact = torch.from_numpy(x.double().numpy() ** 0.5)
    torch.testing.assert_close(wide, exact, rtol=4e-16, atol=0.0)
    torch.testing.assert_close(y.grad, 0.5 / before)
    assert torch.equal(x.sqrt(), before)


def test_libraries_are_those_that_the_model_is_made_of() -> None:
    foreign = type("Layer", (nn.Linear,), {"__module__": "numpy.layers"})
    wrapped = type("Wrapped", (foreign,), {"__module__": "torch.distributed.fsdp"})
    beside = type("Mine", (nn.Module,), {"__module__": "a_file_beside_the_script"})
    model = nn.Sequential(nn.Linear(2, 2), beside(), wrapped(2, 2))
    assert libraries(model) == {"numpy": version("numpy"), "torch": version("torch")}
    assert libraries(nn.ReLU()) == {"torch": version("torch")}


@pytest.fixture
def stopped(run_dir: Path) -> Path:
    """An exact run that can be gone on with: four steps of it are saved, its end is not known."""
    assert main(["train", *WORDS, f"run.dir={run_dir}"]) == 0
    path = run_dir / "events.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"finished"' not in line]
    path.write_text("\n".join(kept) + "\n")
    return run_dir


def test_runs_and_checkpoints_record_what_computes(stopped: Path) -> None:
    told = recorded(stopped / RUN_FILE)
    assert told == {
        "arithmetic": fingerprint("cpu", "fp32", "native"), "torch": version("torch")
    }  # fmt: skip
    [manifest] = (stopped / "checkpoints").glob("step-*/manifest.json")
    assert told["arithmetic"] in manifest.read_text()
    assert main(["train", *WORDS, f"run.dir={stopped}"]) == 0
    assert events(stopped)[-1]["event"] == "finished"


def test_nothing_is_recorded_where_no_bits_are_promised(run_dir: Path) -> None:
    assert main(["train", *WORDS, "run.exact=false", f"run.dir={run_dir}"]) == 0
    assert recorded(run_dir / RUN_FILE) == {}


@pytest.mark.parametrize(
    "name, fix", [("arithmetic", "run.arithmetic=compatible"), ("torch", "the same versions")]
)
def test_what_would_compute_other_bits_does_not_resume(
    name: str, fix: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped / RUN_FILE
    file.write_text(file.read_text().replace(recorded(file)[name], "another"))
    before = contents(stopped)
    assert main(["train", *WORDS, f"run.dir={stopped}"]) == 2
    said = capsys.readouterr().err
    assert f"{name} when it began='another'" in said
    assert fix in said
    assert contents(stopped) == before


def test_a_checkpoint_of_another_processor_is_not_gone_on_with(stopped: Path) -> None:
    """Also where the run's own file tells nothing. By ranks of a supervisor: the same words."""
    file = stopped / RUN_FILE
    file.write_text(file.read_text().partition("\n[recorded]")[0])
    before = (stopped / "events.jsonl").read_bytes()
    done = cordee("train", *WORDS, "launch.processes=2", f"run.dir={stopped}", **OTHER)
    assert done.returncode == 2, done.stderr
    assert "other code would compute them" in done.stderr
    assert "run.arithmetic=compatible" in done.stderr
    assert (stopped / "events.jsonl").read_bytes() == before


def test_a_host_that_computes_other_bits_is_not_let_in(run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        first = rope.found()
        rope.until_step(2)
        other = rope.join(prefix=("env", *(f"{n}={v}" for n, v in OTHER.items())))
        assert other.end() == 2
        assert "the run did not let this host in" in other.said
        assert "run.arithmetic=compatible" in other.said
        rope.goes_on()
        assert first.end() == 0
    assert [e["event"] for e in events(run_dir)].count("quorum") == 0


def test_ranks_of_a_launcher_that_differ_end_alike(run_dir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "cordee", "train", *WORDS[:-1], f"run.dir={run_dir}"]
    ranks = [
        subprocess.Popen(
            command, env={**clean_environment(), **world, "RANK": rank, "LOCAL_RANK": rank, **more},
            stderr=subprocess.PIPE, text=True,
        ) for rank, more in (("0", {}), ("1", OTHER))
    ]  # fmt: skip
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert all("arithmetic on rank 1=" in words for words in said)
    assert not (run_dir / RUN_FILE).exists()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): path.read_bytes() for path in files}
