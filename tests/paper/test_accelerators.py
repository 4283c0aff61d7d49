"""What the planner recognises without torch, from trees of files as kernels show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cordee.config.load import load
from cordee.errors import ConfigError
from cordee.hardware import devices
from cordee.hardware.devices import BACKENDS, DEVICES, Accelerators, detect_accelerators
from cordee.layout.axes import MODEL_AXES, Layout
from cordee.planner.cluster import gpu_cluster, local_cluster
from cordee.planner.plan import Plan, make_plan, select_cluster
from cordee.planner.search import search

VERSION_TEXT = "__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = {hip}\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine without accelerators, with a torch that is built for all of them."""
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    monkeypatch.setattr(devices, "_is_built_for", lambda backend: True)
    return tmp_path


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def make_amd_devices(
    root: Path, version: int, count: int, memory_bytes: int, visible_count: int
) -> None:
    """`count` GPUs and a CPU in the topology, `visible_count` of them with a device file."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write_files(
        root, {"dev/kfd": "", f"{nodes}/0/properties": "cpu_cores_count 64\nsimd_count 0\n"}
    )
    for n in range(1, count + 1):
        properties = f"simd_count 1216\ngfx_target_version {version}\ndrm_render_minor {127 + n}\n"
        bank_text = f"heap_type 1\nsize_in_bytes {memory_bytes}\n"
        write_files(root, {f"{nodes}/{n}/properties": properties,
                     f"{nodes}/{n}/mem_banks/0/properties": bank_text})  # fmt: skip
        if n <= visible_count:
            write_files(root, {f"dev/dri/renderD{127 + n}": ""})


def make_intel_device(root: Path, driver: str, vendor: str, mapped_bytes: int) -> None:
    node = "sys/class/drm/renderD128"
    rows = f"0x0 0x{16 << 20:x} 0x1\n0x1000000000 0x{0x1000000000 + mapped_bytes - 1:x} 0x2\n"
    write_files(root, {f"{node}/device/vendor": f"{vendor}\n", f"{node}/device/resource": rows,
                 "dev/dri/renderD128": "", f"drivers/{driver}/x": ""})  # fmt: skip
    (root / node / "device/driver").symlink_to(root / "drivers" / driver)


def fake_apple_machine(monkeypatch: pytest.MonkeyPatch, **sysctl_values: int) -> None:
    sysctl_numbers = {"hw.optional.arm64": 1, "sysctl.proc_translated": 0} | {
        name.replace("__", "."): value for name, value in sysctl_values.items()
    }
    monkeypatch.setattr(devices, "sysctl_number", sysctl_numbers.__getitem__)
    monkeypatch.setattr(devices, "sysctl_text", lambda name: "Apple M2 Pro")
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 24 << 30)


def test_a_machine_without_any(root: Path) -> None:
    assert detect_accelerators() is None
    assert local_cluster().device == "cpu"


@pytest.mark.parametrize(
    ("model", "name"),
    [("NVIDIA H100 80GB HBM3", "2 H100"), ("Quadro 1", "2 Quadro 1 (as A100)"),
     ("", "2 GPU (as A100)")],
)  # fmt: skip
def test_nvidia(root: Path, model: str, name: str) -> None:
    write_files(root, {f"dev/{n}": "" for n in ("nvidia0", "nvidia1", "nvidia-uvm", "nvidiactl")})
    if model:
        write_files(
            root, {"proc/driver/nvidia/gpus/0000:1:0/information": f"Model: \t {model}\nIRQ: 7\n"}
        )
    cluster = local_cluster()
    kind = "H100" if "H100" in model else "A100"
    assert cluster == replace(gpu_cluster(kind, 2, cores=cluster.cores), name=name)


def test_amd_is_a_cuda_device_with_its_own_figures(root: Path) -> None:
    make_amd_devices(root, 90402, 8, 206 << 30, visible_count=8)
    cluster = local_cluster()
    assert (cluster.device, cluster.name, cluster.devices) == ("cuda", "8 MI300X", 8)
    assert cluster.memory_bytes == 206 << 30 and cluster.flops_bf16 == 1307e12
    plan = make_plan(load(None, ["model.preset=xl"]).run, cluster)
    assert plan.device == "cuda" and plan.processes == 8


@pytest.mark.parametrize(("version", "model"), [(90010, "MI250X"), (110000, "gfx1100")])
def test_amd_by_its_instructions_and_only_what_a_container_was_passed(
    root: Path, version: int, model: str
) -> None:
    make_amd_devices(root, version, 4, 24 << 30, visible_count=1)
    assert detect_accelerators() == Accelerators("cuda", "AMD", model, 1, 24 << 30)
    has_figures = model.startswith("MI")
    assert local_cluster().name == (f"1 {model}" if has_figures else f"1 {model} (as A100)")


def test_a_card_that_torch_here_is_not_built_for_is_named_and_left(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_amd_devices(root, 90402, 1, 206 << 30, visible_count=1)
    monkeypatch.setattr(devices, "_is_built_for", lambda backend: backend != "hip")
    cluster = local_cluster()
    assert cluster.device == "cpu" and "its AMD GPU is left" in cluster.name
    with pytest.raises(ConfigError, match="there is no cuda device") as exc_info:
        select_cluster(load(None, ["launch.device=cuda"]).run, cluster)
    assert "AMD GPU is left" in str(exc_info.value.values)


@pytest.mark.parametrize(
    ("driver", "vendor", "mapped_bytes", "expected"),
    [
        ("xe", "0x8086", 64 << 30, 64 << 30),
        ("i915", "0x8086", 256 << 20, 5 << 30),
        ("vfio-pci", "0x8086", 64 << 30, None),
        ("xe", "0x1234", 64 << 30, None),
    ],
)
def test_intel(
    root: Path, monkeypatch: pytest.MonkeyPatch,
    driver: str, vendor: str, mapped_bytes: int, expected: int | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 10 << 30)
    make_intel_device(root, driver, vendor, mapped_bytes)
    gpus = detect_accelerators()
    assert (gpus and gpus.memory_bytes) == expected
    if gpus:
        cluster = local_cluster()
        assert cluster.device == "xpu" and cluster.name == "1 Intel GPU (as A100)"


def test_apple(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apple_machine(monkeypatch)
    cluster = local_cluster()
    assert (cluster.device, cluster.name) == ("mps", "1 Apple M2 Pro (as M1)")
    assert cluster.memory_bytes == 16 << 30
    fake_apple_machine(monkeypatch, sysctl__proc_translated=1)
    assert detect_accelerators() is None


def test_of_two_makers_the_one_that_torch_is_built_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(root, {"dev/nvidia0": ""})
    make_intel_device(root, "xe", "0x8086", 16 << 30)
    for target, vendor in (("cuda", "NVIDIA"), ("xpu", "Intel"), ("", "NVIDIA")):
        monkeypatch.setattr(
            devices, "_is_built_for", lambda backend, target=target: backend == target
        )
        gpus = detect_accelerators()
        assert gpus is not None and (gpus.vendor, gpus.is_usable) == (vendor, bool(target))


def test_what_torch_is_built_for_is_read_from_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: FakeModuleSpec(tmp_path / name))
    assert devices._is_built_for("cuda"), "nothing to ask"
    text = VERSION_TEXT.format(cuda="'12.8'", hip="None")
    (tmp_path / "torch/version.py").write_text(text)
    assert devices._is_built_for("cuda") and not devices._is_built_for("hip")
    assert devices._is_built_for("xpu"), "an old torch does not say"


class FakeModuleSpec:
    def __init__(self, folder: Path) -> None:
        self.origin = str(folder / "__init__.py")


# ---- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in DEVICES if k != "cpu"])
def test_every_kind_is_planned(kind: str, tmp_path: Path) -> None:
    cluster = replace(gpu_cluster("H100", 1), device=kind)
    plan = make_plan(load(None, ["model.preset=small", f"launch.device={kind}"]).run, cluster)
    assert plan.device == kind and Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match="has the wrong type"):
        Plan.from_json(plan.to_json().replace(f'"{kind}"', '"tpu"', 1))


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_bits_are_refused_where_nobody_has_seen_them_repeat(kind: str) -> None:
    cluster = replace(gpu_cluster("H100", 1), device=kind)
    run = load(None, ["model.preset=small", "run.exact=true", "run.steps=9"]).run
    with pytest.raises(ConfigError, match="promises bits"):
        make_plan(run, cluster)
    make_plan(run, gpu_cluster("H100", 1))


def test_islands_of_several_devices_need_messages_between_them() -> None:
    cluster = replace(gpu_cluster("M1", 1), hosts=4)
    overrides = ["model.preset=small", "batch.microbatches=8"]
    assert {c.layout for c in search(load(None, overrides).run, cluster).candidates} == {
        Layout(island=n) for n in (1, 2, 3, 4)
    }
    for axis in MODEL_AXES[:2]:
        run = load(None, [*overrides, f"layout.{axis}=2"]).run
        with pytest.raises(ConfigError, match="which mps cannot"):
            make_plan(run, cluster)


def test_messages() -> None:
    assert BACKENDS == {
        "cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl", "mps": "cpu:gloo",
    }  # fmt: skip
