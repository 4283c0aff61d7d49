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
from cordee.config.load import RUN_FILE, recorded_settings
from cordee.model.arithmetic import arithmetic_fingerprint, library_versions, portable_sqrt
from cordee.planner.cluster import AVX2_FLAGS, processor_flags
from tests.conftest import SMALL, TINY, clean_environment, read_events, run_cordee, weights_digest
from tests.drills.hosts import HostGroup

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "arithmetic.json").read_text())
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default"}
"""Another processor: PyTorch's loops without vector instructions."""

OVERRIDES = (
    *SMALL,
    *TINY,
    "run.exact=true",
    "run.steps=4",
    "evaluate.sample=0",
    "evaluate.tokens=0",
    "launch.processes=1",
)


def cpu_vendor() -> str:
    """The vendor_id of this machine's processor."""
    match = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else ""


@pytest.mark.parametrize("arithmetic", GOLDEN["weights_sha256"])
def test_unlike_processors_end_with_the_same_bits(arithmetic: str, run_dir: Path) -> None:
    """The digests that other machines gave: of any maker's, or of this one's."""
    if not processor_flags() >= AVX2_FLAGS or torch.__version__.split("+")[0] != GOLDEN["torch"]:
        pytest.skip(f"for x86 processors that have AVX2, and torch {GOLDEN['torch']}")
    digests = GOLDEN["weights_sha256"][arithmetic]
    expected_digest = digests.get("any") or digests.get(cpu_vendor())
    if expected_digest is None:
        pytest.skip(f"no digest of {cpu_vendor()} under {arithmetic}")
    overrides = (f"run.arithmetic={arithmetic}", f"run.dir={run_dir}")
    result = run_cordee("train", *GOLDEN["run"], *overrides, **OTHER_PROCESSOR)
    assert result.returncode == 0, result.stderr
    assert f"bits    of {arithmetic} (as asked)" in result.stderr
    actual_digest = weights_digest(run_dir)[: len(expected_digest)]
    if actual_digest != expected_digest and cpu_vendor() != "GenuineIntel":
        pytest.xfail(
            f"{cpu_vendor()} ends with {actual_digest}: not measured there before"
            f" ({expected_digest})"
        )
    assert actual_digest == expected_digest


def test_a_caller_that_has_imported_torch_is_not_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is wider than AVX2, auto would take avx2: too late in this process."""
    monkeypatch.setattr("cordee.launcher.prepare.processor_flags", lambda: AVX2_FLAGS)
    assert main(["train", *OVERRIDES, f"run.dir={run_dir}"]) == 0
    assert 'arithmetic = "native"' in (run_dir / RUN_FILE).read_text()
    assert main(["train", *OVERRIDES, f"run.dir={run_dir}-2", "run.arithmetic=avx2"]) == 2


def test_fingerprints_tell_arithmetics_apart() -> None:
    fresh_fingerprint = arithmetic_fingerprint.__wrapped__("cpu", "fp32", "native")
    fingerprints = {
        arithmetic_fingerprint("cpu", precision, arithmetic)
        for precision in ("fp32", "bf16") for arithmetic in ("native", "compatible")
    }  # fmt: skip
    assert fresh_fingerprint in fingerprints
    assert len(fingerprints) == 4


def test_portable_roots_are_roots() -> None:
    x = torch.rand(4001, generator=torch.Generator().manual_seed(3)) * 9
    native_roots = x.sqrt()
    with portable_sqrt(True):
        special_roots = torch.tensor([0.0, 1.0, 4.0, float("inf"), -1.0]).sqrt().tolist()
        roots, foreach_roots, double_roots = (
            x.sqrt(),
            torch._foreach_sqrt([x])[0],
            x.double().sqrt(),
        )
        in_place_roots, out_roots = x.clone().sqrt_(), torch.sqrt(x, out=torch.empty_like(x))
        y = x.clone().requires_grad_()
        y.sqrt().sum().backward()
    assert special_roots[:4] == [0.0, 1.0, 2.0, float("inf")]
    assert special_roots[4] != special_roots[4]
    for other_roots in (foreach_roots, in_place_roots, out_roots):
        assert torch.equal(other_roots, roots)
    assert torch.equal(roots, x.rsqrt().reciprocal())
    torch.testing.assert_close(roots.double(), double_roots, rtol=2e-7, atol=0.0)
    exact_roots = torch.from_numpy(x.double().numpy() ** 0.5)
    torch.testing.assert_close(double_roots, exact_roots, rtol=4e-16, atol=0.0)
    torch.testing.assert_close(y.grad, 0.5 / native_roots)
    assert torch.equal(x.sqrt(), native_roots)


def test_libraries_are_those_that_the_model_is_made_of() -> None:
    foreign_class = type("Layer", (nn.Linear,), {"__module__": "numpy.layers"})
    wrapper_class = type("Wrapped", (foreign_class,), {"__module__": "torch.distributed.fsdp"})
    script_class = type("Mine", (nn.Module,), {"__module__": "a_file_beside_the_script"})
    model = nn.Sequential(nn.Linear(2, 2), script_class(), wrapper_class(2, 2))
    assert library_versions(model) == {"numpy": version("numpy"), "torch": version("torch")}
    assert library_versions(nn.ReLU()) == {"torch": version("torch")}


@pytest.fixture
def stopped_run(run_dir: Path) -> Path:
    """An exact run that can be gone on with: four steps of it are saved, its end is not known."""
    assert main(["train", *OVERRIDES, f"run.dir={run_dir}"]) == 0
    path = run_dir / "events.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"finished"' not in line]
    path.write_text("\n".join(lines) + "\n")
    return run_dir


def test_runs_and_checkpoints_record_what_computes(stopped_run: Path) -> None:
    record = recorded_settings(stopped_run / RUN_FILE)
    assert record == {
        "arithmetic": arithmetic_fingerprint("cpu", "fp32", "native"), "torch": version("torch")
    }  # fmt: skip
    [manifest] = (stopped_run / "checkpoints").glob("step-*/manifest.json")
    assert record["arithmetic"] in manifest.read_text()
    assert main(["train", *OVERRIDES, f"run.dir={stopped_run}"]) == 0
    assert read_events(stopped_run)[-1]["event"] == "finished"


def test_nothing_is_recorded_where_no_bits_are_promised(run_dir: Path) -> None:
    assert main(["train", *OVERRIDES, "run.exact=false", f"run.dir={run_dir}"]) == 0
    assert recorded_settings(run_dir / RUN_FILE) == {}


@pytest.mark.parametrize(
    "name, fix", [("arithmetic", "run.arithmetic=compatible"), ("torch", "the same versions")]
)
def test_what_would_compute_other_bits_does_not_resume(
    name: str, fix: str, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped_run / RUN_FILE
    file.write_text(file.read_text().replace(recorded_settings(file)[name], "another"))
    old_contents = file_contents(stopped_run)
    assert main(["train", *OVERRIDES, f"run.dir={stopped_run}"]) == 2
    stderr_text = capsys.readouterr().err
    assert f"{name} when it began='another'" in stderr_text
    assert fix in stderr_text
    assert file_contents(stopped_run) == old_contents


def test_a_checkpoint_of_another_processor_is_not_gone_on_with(stopped_run: Path) -> None:
    """Also where the run's own file tells nothing. By ranks of a supervisor: the same words."""
    file = stopped_run / RUN_FILE
    file.write_text(file.read_text().partition("\n[recorded]")[0])
    old_events = (stopped_run / "events.jsonl").read_bytes()
    result = run_cordee(
        "train", *OVERRIDES, "launch.processes=2", f"run.dir={stopped_run}", **OTHER_PROCESSOR
    )
    assert result.returncode == 2, result.stderr
    assert "other code would compute them" in result.stderr
    assert "run.arithmetic=compatible" in result.stderr
    assert (stopped_run / "events.jsonl").read_bytes() == old_events


def test_a_host_that_computes_other_bits_is_not_let_in(run_dir: Path) -> None:
    with HostGroup(run_dir) as host_group:
        founder = host_group.start_first()
        host_group.wait_for_step(2)
        joiner = host_group.join(prefix=("env", *(f"{n}={v}" for n, v in OTHER_PROCESSOR.items())))
        assert joiner.wait_exit() == 2
        assert "the run did not let this host in" in joiner.output
        assert "run.arithmetic=compatible" in joiner.output
        host_group.wait_for_next_step()
        assert founder.wait_exit() == 0
    assert [e["event"] for e in read_events(run_dir)].count("quorum") == 0


def test_ranks_of_a_launcher_that_differ_end_alike(run_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher_environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "cordee", "train", *OVERRIDES[:-1], f"run.dir={run_dir}"]
    ranks = [
        subprocess.Popen(
            command,
            env={
                **clean_environment(),
                **launcher_environment,
                "RANK": rank,
                "LOCAL_RANK": rank,
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, environment in (("0", {}), ("1", OTHER_PROCESSOR))
    ]
    stderr_texts = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], stderr_texts
    assert all("arithmetic on rank 1=" in text for text in stderr_texts)
    assert not (run_dir / RUN_FILE).exists()


def file_contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): path.read_bytes() for path in files}
