"""The plan as text, as JSON and as a command; clusters from TOML; what is refused.

The golden tables are rewritten by running this file as a program
(`python -m tests.paper.test_plan_text`) and are reviewed as diffs. They are machine-independent:
every cluster is made here.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cordee.cli.plan import run as plan_command
from cordee.config.presets import model_presets
from cordee.errors import ConfigError
from cordee.planner.cluster import Cluster, gpu_cluster, local_cluster, read_cluster
from cordee.planner.plan import Plan, make_plan, without_axes
from cordee.planner.report import comparison_text, plan_text
from cordee.planner.search import search
from tests.paper.test_plan import CPU, run_of

GOLDEN_DIR = Path(__file__).parent.parent / "golden"

GOLDEN_CASES = {
    "plan_cpu": (CPU, 256, ["model.preset=small", "batch.microbatches=8"]),
    "plan_exact": (CPU, 256, ["run.exact=true", "run.steps=9", "batch.microbatches=12",
                              "layout.islands=3"]),
    "plan_gpu": (gpu_cluster("H100", 8, hosts=4), 50304,
                 ["model.preset=xl", "run.precision=bf16", "optim.name=adamw",
                  "batch.microbatches=96", "data.sequence=2048"]),
}  # fmt: skip


def golden_text(name: str) -> str:
    cluster, vocabulary, overrides = GOLDEN_CASES[name]
    run = run_of(*overrides)
    plan = make_plan(run, cluster, vocabulary)
    ranking = search(without_axes(run), cluster, vocabulary)
    return plan_text(run, cluster, plan, ranking) + "\n"


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "overrides", "processes", "message", "fix"),
    [
        (CPU, ["batch.microbatches=4"], 5, "cannot give work to 5", "batch.microbatches=5"),
        (CPU, ["batch.microbatches=9", "layout.shard=2"], 2, "do not divide",
         "batch.microbatches=10"),
        (CPU, ["layout.tensor=3"], None, "model.heads=4", "layout.tensor=2"),
        (CPU, ["layout.shard=3"], 4, "do not divide the processes", "launch.processes=3"),
        (CPU, ["batch.microbatches=99"], 99, "more processes than make sense", "processes=4"),
        (gpu_cluster("A100", 2), ["batch.microbatches=8"], 4, "more processes than devices",
         "launch.processes=2"),
        (gpu_cluster("A100", 2), ["batch.microbatches=8", "launch.processes=3"], None,
         "more processes than devices", "launch.processes=2"),
        (CPU, ["launch.device=cuda"], None, "no cuda device", "launch.device=cpu"),
        (gpu_cluster("H100", 8, hosts=2048), ["model.preset=llama3-405b"], None,
         "no layout", "batch.microbatches=2048"),
        (CPU, ["optim.name=adafactor", "layout.shard=2"], None, "rows and columns", "adamw"),
    ],
)  # fmt: skip
def test_refusals_name_the_nearest_fix(
    cluster: Cluster, overrides: list[str], processes: int | None, message: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as exc_info:
        make_plan(run_of(*overrides), cluster, processes=processes)
    assert message in str(exc_info.value) and fix in str(exc_info.value.fix)
    assert exc_info.value.exit_code == 2 and exc_info.value.values


# ---- files ---------------------------------------------------------------------------------------


def test_a_plan_survives_json_and_nothing_else_does() -> None:
    plan = make_plan(run_of("batch.microbatches=6", "sync.codec=bf16"), CPU, processes=4)
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    for bad_plan in (
        "{", "[]", {**data, "extra": 1}, {k: v for k, v in data.items() if k != "splits"},
        {**data, "processes": "4"}, {**data, "protocol": "gossip"}, {**data, "splits": [[0, "6"]]},
        {**data, "layout": {"island": 4}},
        {**data, "predicted": {**data["predicted"], "step_s": "slow"}},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="not a plan"):
            Plan.from_json(bad_plan if isinstance(bad_plan, str) else json.dumps(bad_plan))


def test_clusters_from_toml(tmp_path: Path) -> None:
    def parse_cluster(text: str) -> Cluster:
        path = tmp_path / "c.toml"
        path.write_text(text)
        return read_cluster(path)

    cluster = parse_cluster('kind = "H200"\ndevices = 4\nhosts = 2\nlink_bytes_per_s = 1e9\n')
    assert cluster == replace(gpu_cluster("H200", 4, hosts=2), link_bytes_per_s=1e9)
    assert cluster.slots == 8
    assert parse_cluster('kind = "local"\ndevice = "cpu"\ncores = 3\n').cores == 3
    for text, message in [
        ('kind = "H300"', "did you mean H"),
        ('kind = "H100"\nhostz = 2', "did you mean hosts"),
        ('kind = "H100"\nhosts = "two"', "a whole number"),
        ('kind = "H100"\nhosts = 1.5', "a whole number"),
        ('kind = "H100"\nhosts = true', "a whole number"),
        ('kind = "H100"\nhosts = 0', "above 0"),
        ('kind = "H100"\ndevices = 0', "has devices"),
        ('kind = "H100"\ndevice = "tpu"', "no such kind"),
        ('device = "cpu"\nname = "x"', "lacks a field"),
        ('kind = "H100"\nmeasured = true', "has pass_bytes_per_s and operator_s"),
        ("kind = ", "not valid TOML"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_cluster(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_cluster(tmp_path / "missing.toml")


def test_this_machine_is_read_without_a_library() -> None:
    cluster = local_cluster()
    assert cluster.cores >= 1 and cluster.memory_bytes > 1 << 28 and cluster.flops_fp32 > 1e9
    assert cluster.device in ("cpu", "cuda") and cluster.slots >= 1


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_the_table_is_as_reviewed(name: str) -> None:
    assert golden_text(name) == (GOLDEN_DIR / f"{name}.txt").read_text()


def test_no_line_of_the_table_is_endless() -> None:
    for name in GOLDEN_CASES:
        assert max(map(len, golden_text(name).splitlines())) <= 120


def test_compare_says_how_far_off() -> None:
    plan = make_plan(run_of("batch.microbatches=4"), CPU, processes=2)
    prediction = plan.predicted
    text = comparison_text(
        plan,
        {
            "step_s": 2 * prediction.high_s,
            "bytes_sent": prediction.bytes_sent,
            "memory_bytes": 3 << 20,
        },
    )
    assert "outside" in text and "to the byte" in text and "3.0 MiB" in text
    match_text = comparison_text(
        plan, {"step_s": prediction.step_s, "bytes_sent": 5.0, "memory_bytes": math.nan}
    )
    assert "within" in match_text and "1.00" in match_text and "memory" not in match_text
    assert comparison_text(plan, {"step_s": math.nan}).count("\n") == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_path, cluster_path = tmp_path / "plan.json", tmp_path / "c.toml"
    cluster_path.write_text('kind = "H100"\ndevices = 2\n')
    arguments = ["small", "batch.microbatches=6", "--cluster", str(cluster_path)]
    assert plan_command([*arguments, "--json", "--top", "2", "--save", str(plan_path)]) == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output) == {"picked", "ranked", "rejected", "assumed"}
    assert (
        output["ranked"][0]["layout"] == output["picked"]["layout"] and len(output["ranked"]) == 2
    )
    assert {"layout", "reason"} == set(output["rejected"][0])
    assert Plan.from_json(plan_path.read_text()).to_dict() == output["picked"]
    assert plan_command(arguments) == 0
    assert "<- pick" in capsys.readouterr().out
    assert plan_command(["--models"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in model_presets()) and "1,049,984" in listing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smal"], "did you mean small"),
        (["small", "model.width=100"], "even multiple"),
        (["small", "layout.shrd=2"], "layout.shard"),
        (["--vocabulary", "1"], "--vocabulary 2"),
        (["--top", "0"], "--top 1"),
        (["small", "tiny"], "a word too many"),
        (["--save", "/nowhere/at/all.json"], "cannot be written"),
        (["--cluster", "/nowhere/c.toml"], "cannot be read"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as exc_info:
        plan_command(arguments)
    assert message in str(exc_info.value)


def test_the_command_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from cordee.cli.plan import run; run(['tiny', '--json']);"
        "print([m for m in ('torch', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stderr.strip() == "[]"
    assert json.loads(result.stdout)["picked"]["processes"] >= 1


if __name__ == "__main__":
    GOLDEN_DIR.mkdir(exist_ok=True)
    for case in GOLDEN_CASES:
        (GOLDEN_DIR / f"{case}.txt").write_text(golden_text(case))
