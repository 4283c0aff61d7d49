"""What a run may ask of its devices, on paper: fp8, offload, and how the plan counts them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cordee.config.load import load
from cordee.config.run import Run
from cordee.config.validate import validate_run
from cordee.errors import ConfigError
from cordee.planner.cluster import Cluster, gpu_cluster, without_accelerators
from cordee.planner.plan import Plan, make_plan

H100_CLUSTER = gpu_cluster("H100", 8)


def run_of(*overrides: str) -> Run:
    return load(None, ("model.preset=xl", *overrides)).run


def plan_of(cluster: Cluster, *overrides: str) -> Plan:
    return make_plan(run_of(*overrides), cluster, processes=1)


@pytest.mark.parametrize(
    "cluster",
    [
        gpu_cluster("A100", 8),
        without_accelerators(H100_CLUSTER),
        replace(H100_CLUSTER, flops_fp8=0.0),
    ],
)
def test_fp8_is_refused_where_devices_do_not_have_it(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"run\.precision=bf16"):
        plan_of(cluster, "run.precision=fp8")


def test_fp8_makes_products_faster_and_nothing_else() -> None:
    bf16, fp8 = (plan_of(H100_CLUSTER, f"run.precision={p}").predicted for p in ("bf16", "fp8"))
    assert fp8.time_items["matrices"] == pytest.approx(bf16.time_items["matrices"] * 989 / 1979)
    assert fp8.time_items["attention"] == bf16.time_items["attention"]
    assert fp8.memory_items == bf16.memory_items
    assert fp8.peak_flops == bf16.peak_flops


def test_fp16_is_planned_as_bf16() -> None:
    bf16, fp16 = (plan_of(H100_CLUSTER, f"run.precision={p}").predicted for p in ("bf16", "fp16"))
    assert bf16 == fp16


def test_offload_is_refused_on_a_host_and_empties_a_device() -> None:
    with pytest.raises(ConfigError, match=r"memory\.offload=none"):
        plan_of(without_accelerators(H100_CLUSTER), "memory.offload=parameters")
    base, offload = (
        plan_of(H100_CLUSTER, f"memory.offload={kind}").predicted for kind in ("none", "parameters")
    )
    assert "optimiser" not in offload.memory_items
    assert "parameters" not in offload.memory_items
    assert offload.memory_items["gathered parameters"] == base.memory_items["parameters"]
    assert offload.memory_bytes < base.memory_bytes
    zero3 = plan_of(H100_CLUSTER, "memory.offload=parameters", "layout.zero=3").predicted
    assert zero3.memory_items["gathered parameters"] < base.memory_items["parameters"] / 2
    assert zero3.memory_bytes < offload.memory_bytes / 2


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (("model.width=72", "model.heads=4"), "model.width=64"),
        (("model.width=96", "model.heads=12", "model.kv_heads=1"), "model.kv_heads=12"),
        (("model.ffn=100",), "model.ffn=96"),
        (("data.sequence=100", "batch.microbatch=2"), "data.sequence=96"),
    ],
)
def test_dims_of_fp8(overrides: tuple[str, ...], fix: str) -> None:
    run = load(None, overrides).run
    validate_run(run)
    with pytest.raises(ConfigError) as exc_info:
        validate_run(load(None, (*overrides, "run.precision=fp8")).run)
    assert exc_info.value.fix == fix
    validate_run(load(None, (*overrides, "run.precision=fp8", fix)).run)
