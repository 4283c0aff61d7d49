"""Why layouts are refused: each rule with its values, and fixes that end in a legal layout."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.cli.plan import run as plan_command
from cordee.config.load import load
from cordee.config.run import Run
from cordee.config.validate import validate_run
from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import MODEL_AXES, Layout
from cordee.layout.validate import round_microbatches, violation_texts
from cordee.planner.cluster import gpu_cluster
from cordee.planner.plan import make_plan

MOE = ("model.moe.experts=6", "model.moe.width=48", "model.moe.shared=3")


def run_of(*overrides: str) -> Run:
    return load(None, ("run.precision=bf16", *overrides)).run


CASES = {
    "heads": ((), {"tensor": 3}, "tensor=3 does not divide model.heads=4", "layout.tensor=2"),
    "keys": (("model.kv_heads=2",), {"tensor": 4}, "model.kv_heads=2", "layout.tensor=2"),
    "ffn": (("model.heads=6", "model.width=96", "model.ffn=100"), {"tensor": 3}, "100",
            "layout.tensor=2"),
    "shared experts": ((*MOE, "model.moe.width=33", "model.moe.shared=1"), {"tensor": 2}, "33",
                       "layout.tensor=1"),
    "vocabulary": (("model.vocabulary=258",), {"tensor": 4}, "the vocabulary, 258",
                   "layout.tensor=2"),
    "split sequence": (("data.sequence=36",), {"tensor": 4, "context": 3}, "36 in 6 chunks",
                       "layout.tensor=2"),
    "chunks": (("data.sequence=36",), {"context": 4}, "data.sequence=36", "layout.context=3"),
    "layers": ((), {"pipeline": 6}, "model.layers=5", "layout.pipeline=5"),
    "stages": (("layout.schedule=zero_bubble",), {"pipeline": 3}, "2 a rank", "layout.pipeline=2"),
    "no experts": ((), {"expert": 2}, "the model has no experts", "layout.expert=1"),
    "experts": (MOE, {"expert": 4}, "model.moe.experts=6", "layout.expert=3"),
    "experts' rows": (MOE, {"shard": 5}, "along which experts are sharded", "layout.shard=4"),
    "rows": ((), {"shard": 200}, "exceeds the 128 rows", "layout.shard=128"),
    "cut rows": ((), {"shard": 100, "tensor": 2}, "exceeds the 64 rows", "layout.shard=64"),
    "tied": (("model.tied=true",), {"pipeline": 2}, "model.tied", "layout.pipeline=1"),
    "whole gradients": (("layout.zero=3",), {"pipeline": 2}, "layout.zero=3", "layout.zero=1"),
    "canonical": (("layout.zero=2", "sync.protocol=exchange"), {"shard": 2}, "canonical",
                  "layout.zero=1"),
    "nothing to shard": (("layout.zero=2",), {"island": 2}, "layout.zero=2", "layout.zero=1"),
    "split backwards": (("layout.schedule=zero_bubble", "memory.recompute=full"), {"pipeline": 2},
                        "memory.recompute=full", "memory.recompute=none"),
    "compiled": (("layout.schedule=zero_bubble", "run.compile=blocks"), {"pipeline": 2},
                 "run.compile=blocks", "run.compile=none"),
    "1f1b": (("batch.microbatches=6",), {"pipeline": 4, "island": 2}, "3 microbatches a worker",
             "batch.microbatches=8"),
    "rounds": (("batch.microbatches=5", "layout.schedule=interleaved"), {"pipeline": 2}, "5",
               "batch.microbatches=6"),
    "workers": (("batch.microbatches=3",), {"island": 2, "shard": 2}, "work to 4 workers",
                "batch.microbatches=4"),
    "uneven": (("batch.microbatches=6",), {"island": 2, "shard": 2}, "do not divide over 4",
               "batch.microbatches=8"),
    "uneven cuts": (("batch.microbatches=3",), {"island": 2, "tensor": 2}, "do not divide over 2",
                    "batch.microbatches=4"),
    "exact": (("run.exact=true", "run.steps=1"), {"tensor": 2}, "run.exact", "layout.tensor=1"),
    "adafactor": (("optim.name=adafactor",), {"tensor": 2}, "rows and columns", "adamw"),
    "replicated": (("data.placement=replicate",), {"context": 2}, "whole islands of one",
                   "layout.context=1"),
    "units of agc": (("clip.kind=agc",), {"tensor": 2}, "rows of matrices", "clip.kind=norm"),
    "experts of agc": ((*MOE, "clip.kind=agc"), {"shard": 2}, "cuts experts", "clip.kind=norm"),
    "exact experts": ((*MOE, "run.exact=true", "run.steps=1"), {"shard": 2}, "run.exact",
                      "layout.shard=1"),
    "exchanged experts": ((*MOE, "sync.codec=bf16"), {"shard": 2}, "sync.codec=bf16",
                          "layout.shard=1"),
    "capacity": ((*MOE, "model.moe.capacity=1.5"), {"tensor": 2}, "model.moe.capacity=1.5",
                 "model.moe.capacity=0"),
    "capacity of positions": ((*MOE, "model.moe.capacity=1"), {"context": 2}, "splits tokens",
                              "model.moe.capacity=0"),
    "fp8 heads": (("run.precision=fp8", "model.heads=8", "model.width=64"), {"tensor": 8},
                  "leaves 8 of 64 queries", "layout.tensor=4"),
    "fp8 hidden": (("run.precision=fp8", "model.ffn=336"), {"tensor": 2}, "leaves 168 of 336",
                   "layout.tensor=1"),
    "fp8 tokens": (("run.precision=fp8", "data.sequence=48", "batch.microbatch=1"),
                   {"context": 2}, "leaves 24 tokens", "layout.context=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_rule_names_values_and_the_nearest_fix(name: str) -> None:
    overrides, degrees, message, fix = CASES[name]
    violations = violation_texts(run_of(*overrides), Layout(**degrees))
    assert any(message in reason and fix in suggestion for reason, suggestion in violations), (
        violations
    )


def test_what_is_legal_is_not_refused() -> None:
    run = run_of("batch.microbatches=16", "model.layers=8", *MOE, "data.sequence=64")
    single_axes = [Layout(**{axis: 2}) for axis in ("island", *MODEL_AXES)]
    axis_pairs = [Layout(**{a: 2, b: 2}) for a in MODEL_AXES for b in MODEL_AXES if a < b]
    all_axes = Layout(island=2, pipeline=2, context=2, expert=2, shard=2, tensor=2)
    for layout in (Layout(), *single_axes, *axis_pairs, all_axes):
        assert violation_texts(run, layout) == [], layout
    for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble"):
        scheduled_run = replace(run, layout=replace(run.layout, schedule=schedule))
        assert violation_texts(scheduled_run, Layout(pipeline=2, tensor=2)) == []
    # Islands alone may have unequal shares, and shards of one keep nothing.
    assert violation_texts(run_of("batch.microbatches=5"), Layout(island=3)) == []
    assert violation_texts(run_of("layout.zero=3"), Layout()) == []


DEGREES = st.sampled_from([1, 1, 1, 2, 3, 4, 5, 6, 8])


@given(
    degrees=st.tuples(DEGREES, DEGREES, DEGREES, DEGREES, DEGREES, DEGREES),
    microbatches=st.integers(1, 40),
    model=st.sampled_from([(), ("model.tied=true",), MOE, ("model.kv_heads=2",)]),
    extra_overrides=st.sampled_from([
        (), ("run.exact=true", "run.steps=1"), ("optim.name=adafactor",), ("layout.zero=3",),
        ("layout.schedule=interleaved",), ("layout.schedule=zero_bubble", "memory.recompute=full"),
        ("data.placement=replicate",), ("sync.codec=bf16", "layout.zero=2"),
    ]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_following_the_fixes_ends_in_a_legal_layout(
    degrees: tuple[int, ...],
    microbatches: int,
    model: tuple[str, ...],
    extra_overrides: tuple[str, ...],
) -> None:
    axes = dict(zip(("island", *MODEL_AXES), degrees, strict=True))
    overrides = [f"batch.microbatches={microbatches}", *model, *extra_overrides]
    for _ in range(12):
        violations = violation_texts(run_of(*overrides), Layout(**axes))
        if not violations:
            return
        reason, fix = violations[0]
        key, _, value = re.split(", | ", fix)[0].partition("=")
        if key.removeprefix("layout.") in axes:
            assert axes[key.removeprefix("layout.")] != int(value), (reason, fix)
            axes[key.removeprefix("layout.")] = int(value)
        else:
            overrides.append(f"{key}={value}")
        reasons = [
            other_reason for other_reason, _ in violation_texts(run_of(*overrides), Layout(**axes))
        ]
        assert reason not in reasons, "a fix repairs its own rule"
    raise AssertionError(violations)


@given(st.integers(1, 60), st.integers(2, 12), st.sampled_from(["1f1b", "interleaved", "gpipe"]))
@settings(deadline=None)
def test_microbatch_rounding_matches_torch(microbatches: int, ranks: int, schedule: str) -> None:
    layout_settings = replace(run_of().layout, schedule=schedule)

    def is_accepted(m: int) -> bool:
        if schedule == "1f1b":
            return m >= ranks
        return schedule == "gpipe" or m % max(1, m // ranks) == 0

    nearest_count = round_microbatches(layout_settings, ranks, microbatches)
    assert nearest_count == next(m for m in range(microbatches, 200) if is_accepted(m))


def test_plans_refuse_before_anything_starts() -> None:
    cluster = gpu_cluster("H100", 8)
    for overrides in (("layout.tensor=3",), ("layout.pipeline=8",), ("layout.zero=3",
                  "layout.tensor=2"), ("layout.context=2", "data.sequence=255")):  # fmt: skip
        with pytest.raises(LayoutError) as exc_info:
            make_plan(run_of("batch.microbatches=8", *overrides), cluster)
        assert exc_info.value.exit_code == 2 and exc_info.value.fix and exc_info.value.values
    with pytest.raises(ConfigError, match=r"model\.vocabulary=300"):
        make_plan(run_of("model.vocabulary=299"), cluster, vocabulary=300)
    assert make_plan(run_of("model.vocabulary=300"), cluster, vocabulary=300)
    with pytest.raises(ConfigError, match=r"layout\.chunks=2"):
        validate_run(run_of("layout.schedule=interleaved", "layout.chunks=1"))


def test_the_table_lists_what_is_illegal(
    tmp_path: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster_path = f"{tmp_path}/c.toml"
    with open(cluster_path, "w") as stream:
        stream.write('kind = "H100"\ndevices = 8\nhosts = 2\n')
    assert plan_command(["tiny", "batch.microbatches=12", "--cluster", cluster_path]) == 0
    output = capsys.readouterr().out
    for line in (
        "pipeline 6, 7, 8, 16", "model.layers=5", "does not divide model.heads=4",
        "data.sequence=256", "the model has no experts", "do not divide batch.microbatches=12",
    ):  # fmt: skip
        assert line in output
    assert len(output.splitlines()) < 90
