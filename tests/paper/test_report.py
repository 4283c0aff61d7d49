"""The report of a run: what it reads, what it concludes, and that the page stands alone.

Real folders as runs leave them: finished, killed in the middle of a line, resumed, half empty.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cordee
from cordee.cli.report import run
from cordee.config.load import dump, load
from cordee.errors import ConfigError
from cordee.report.charts import Chart, ChartSeries, downsample_extremes, figure_html, smooth
from cordee.report.html import report_page
from cordee.report.reader import read_metrics, read_run
from cordee.report.summary import format_amount, format_number, format_seconds, summarise
from cordee.report.svg import log_ticks, ticks

VOID_TAGS = {"meta", "link", "br", "rect", "line", "circle", "path"}


def make_row(step: int, **fields: Any) -> dict[str, Any]:
    """A line of metrics.jsonl of a run that goes well."""
    loss = 1.4 + 4.1 * math.exp(-step / 40) + 0.02 * math.sin(7 * step)
    return {
        "step": step, "loss": loss, "bits_per_byte": loss / math.log(2), "grad_norm": 0.5,
        "lr": 0.01, "tokens": 4096 * step, "tokens_per_s": 40960.0, "step_s": 0.1, "data_s": 0.002,
        "comm_s": 0.01, "bytes_sent": 7_600_000, "memory_bytes": 200_000_000, "mfu": None,
        "islands": 2, "quorum": 1, "skipped": False, "elapsed_s": 0.1 * step,
    } | fields  # fmt: skip


def make_event(name: str, step: int = 0, **fields: Any) -> dict[str, Any]:
    return {"time": f"2026-11-14T10:{step % 60:02}:00+00:00", "event": name, "step": step, **fields}


FINISHED = make_event(
    "finished", 300, weights_sha256="ab" * 32, held_out_bits_per_byte=2.25, held_out_loss=1.56,
    sample="def <script>alert(1)</script>",
)  # fmt: skip


def write_run_dir(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    events: list[dict[str, Any]] | None = None,
    layers: list[dict[str, Any]] | None = None,
) -> Path:
    """Writes a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "metrics": [make_row(s) for s in range(1, 301)] if rows is None else rows,
        "events": [make_event("started"), FINISHED] if events is None else events,
        "layers": layers or [],
    }
    for name, file_records in files.items():
        text = "".join(json.dumps(line) + "\n" for line in file_records)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "run.toml").write_text(dump(load(None, ["optim.lr=0.015", "run.steps=300"]).run))
    plan = {"predicted": {"step_s": 0.09, "bytes_sent": 7_600_000, "memory_bytes": 210_000_000}}
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def layer_records(blocks: dict[str, float], growing_layer: str = "") -> list[dict[str, Any]]:
    """Layer records over 300 steps; the layer `growing_layer` grows a hundredfold."""
    return [
        {
            "step": s,
            "grad_norm": {
                name: norm * (10 ** (2 * s / 300) if name == growing_layer else 1)
                for name, norm in {"embed": 0.2, **blocks, "norm": 0.01, "head": 0.4}.items()
            },
        }
        for s in range(1, 301, 10)
    ]


def verdict_of(folder: Path) -> str:
    return summarise(read_run(folder)).verdict


class HtmlChecker(HTMLParser):
    """Every tag is closed in order, and nothing points outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.figure_count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        assert not names & {"src", "href", "onclick"}, (tag, attrs)
        assert tag not in ("link", "iframe", "img", "base")
        self.figure_count += tag == "figure"
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_TAGS:
            assert self.open_tags.pop() == tag


def test_page_is_whole_and_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run_dir(
        tmp_path / "runs" / "a", layers=layer_records({"blocks.0": 0.1, "blocks.1": 0.1})
    )
    assert run([str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "Finished: 300 steps" in captured.err
    text = (folder / "report.html").read_text()
    checker = HtmlChecker()
    checker.feed(text)
    assert checker.open_tags == [] and checker.figure_count == 9
    own_text = text.replace("https://github.com/leeoniya/uPlot", "")  # in the library's banner
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", own_text)
    assert "Copyright (c) 2022 Leon Sorokin" in text, "its licence goes with it"
    policy = re.search(r'Policy" content="([^"]+)"', text)
    assert policy and policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; script-")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy[1]) == digests and len(digests) == 2
    assert len(text) < 250_000
    assert "prefers-color-scheme:dark" in text
    assert "&lt;script&gt;alert" in text and "<script>alert" not in text
    for words in ("Loss", "Bits per byte", "Learning rate", "Gradient norm of each layer"):
        assert f"<h3>{words}" in text
    assert "planned" in text and "1.11" in text, "0.1 s measured of 0.09 s planned"
    assert "optim.lr" in text and "0.015" in text
    assert [p.name for p in folder.iterdir() if "part" in p.name] == []


def test_json_is_the_one_thing_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run_dir(tmp_path / "a")
    target = tmp_path / "mail.html"
    assert run([str(folder), "--json", "--output", str(target)]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["state"] == "finished" and output["steps"] == 300 and output["last_step"] == 300
    assert output["last_loss"] == pytest.approx(make_row(300)["loss"])
    assert output["held_out_bits_per_byte"] == 2.25 and output["weights_sha256"] == "ab" * 32
    assert output["skipped"] == 0 and "fell" in output["verdict"]
    assert output["medians"]["step_s"] == 0.1 and output["medians"]["mfu"] is None
    assert output["report"] == str(target) and target.exists()
    assert not (folder / "report.html").exists()


def test_verb_runs_without_torch_and_numpy(tmp_path: Path) -> None:
    folder = write_run_dir(tmp_path / "a")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None;"
        " from cordee.cli.report import run; sys.exit(run(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["state"] == "finished"


def test_missing_run_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run_dir(tmp_path / "runs" / "tiny")
    write_run_dir(tmp_path / "runs" / "muon-small")
    monkeypatch.chdir(tmp_path)
    for run_name, nearest_run in (("runs/tiiny", "tiny"), ("muon-smal", "muon-small")):
        with pytest.raises(ConfigError) as exc_info:
            run([run_name])
        assert exc_info.value.exit_code == 2
        assert exc_info.value.fix == f"cordee report {Path('runs') / nearest_run}"
        assert not Path(run_name).exists()
    with pytest.raises(ConfigError, match="holds no run"):
        run(["runs"])
    with pytest.raises(ConfigError, match="which run"):
        run([])
    with pytest.raises(ConfigError):
        run(["runs/tiny", "optim.lr=1"])
    assert run(["tiny"]) == 0 and Path("runs/tiny/report.html").exists()


def test_page_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    folder = write_run_dir(tmp_path / "a")
    for bad_path in (tmp_path / "no" / "such" / "x.html", folder):
        with pytest.raises(ConfigError):
            run([str(folder), "--output", str(bad_path)])


def test_torn_line_and_strange_values_are_met(tmp_path: Path) -> None:
    folder = write_run_dir(tmp_path / "a", events=[make_event("started")])
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('[1, 2]\n"text"\n{"no": "step"}\n{"step": 301, "loss": NaN}\n')
        stream.write('{"step": 302, "loss": "high", "grad_norm": Infinity}\n{"step": 303, "los')
    (folder / "events.jsonl").write_text('{"event": 3}\n{"half": \n')
    records = read_run(folder)
    assert records.steps[-1] == 302 and records.columns["loss"][-2:] == [None, None]
    summary = summarise(records)
    assert summary.last_loss == pytest.approx(make_row(300)["loss"])
    assert "<figure" in report_page(records, summary)


@pytest.mark.parametrize(
    "present_files", [(), ("metrics.jsonl",), ("events.jsonl",), ("run.toml",)]
)
def test_any_file_may_be_missing(tmp_path: Path, present_files: tuple[str, ...]) -> None:
    folder = write_run_dir(tmp_path / "a")
    for name in ("metrics.jsonl", "events.jsonl", "layers.jsonl", "run.toml", "plan.json"):
        if name not in present_files:
            (folder / name).unlink()
    records = read_run(folder)
    checker = HtmlChecker()
    checker.feed(report_page(records, summarise(records)))
    assert checker.open_tags == []


def test_any_key_may_be_missing(tmp_path: Path) -> None:
    for key in make_row(1):
        if key != "step":
            rows = [{k: v for k, v in make_row(s).items() if k != key} for s in range(1, 50)]
            records = read_run(write_run_dir(tmp_path / key, rows=rows))
            assert "</html>" in report_page(records, summarise(records))
    records = read_run(write_run_dir(tmp_path / "bare", rows=[{"step": s} for s in range(1, 50)]))
    assert "</html>" in report_page(records, summarise(records))


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    """Steps 1-50, back to 20, on to 30: the records of 31-50 belong to no parameters."""
    rows = [make_row(s) for s in range(1, 51)] + [make_row(s, loss=9.0) for s in range(21, 31)]
    records = read_run(write_run_dir(tmp_path / "a", rows=rows))
    assert records.steps == list(range(1, 31))
    assert records.columns["loss"][20:] == [9.0] * 10
    assert all(len(column) == 30 for column in records.columns.values())


def test_state_is_read_off_the_last_events_and_the_process(tmp_path: Path) -> None:
    host = socket.gethostname()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        start_event = make_event("started", pid=child.pid, host=host)
        folder = write_run_dir(tmp_path / "a", events=[start_event])
        assert summarise(read_run(folder)).state == "running"
    finally:
        child.kill()
        child.wait()
    assert summarise(read_run(folder)).state == "stopped"
    assert "without a last word" in verdict_of(folder)
    remote_folder = write_run_dir(
        tmp_path / "b", events=[make_event("started", pid=1, host="another")]
    )
    assert summarise(read_run(remote_folder)).state == "running"
    assert summarise(read_run(remote_folder), now_s=time.time() + 3600).state == "stopped"
    write_run_dir(folder, events=[start_event, make_event("interrupted", 300, signal="SIGTERM")])
    assert "Interrupted (SIGTERM)" in verdict_of(folder)
    write_run_dir(folder, events=[start_event, make_event("stopped", 300, cause="not finite")])
    assert "Stopped (not finite)" in verdict_of(folder)
    write_run_dir(
        folder,
        events=[start_event, make_event("interrupted", 200), make_event("resumed", 200), FINISHED],
    )
    assert summarise(read_run(folder)).state == "finished"


def test_good_run_has_nothing_against_it(tmp_path: Path) -> None:
    layers = layer_records({"blocks.0": 0.1, "blocks.1": 0.05})
    summary = summarise(read_run(write_run_dir(tmp_path / "a", layers=layers)))
    assert {remark.kind for remark in summary.remarks} == {"good"}
    assert "Nothing speaks against it" in summary.verdict
    assert any("88% compute, 10% communication, 2% waiting" in r.text for r in summary.remarks)


def test_verdict_names_what_is_wrong(tmp_path: Path) -> None:
    flat_rows = [make_row(s, loss=5.5 + 0.01 * math.sin(s)) for s in range(1, 301)]
    assert "did not fall" in verdict_of(write_run_dir(tmp_path / "flat", rows=flat_rows))
    rising_rows = [make_row(s, loss=2 + abs(s - 150) / 100) for s in range(1, 301)]
    assert "rose again" in verdict_of(write_run_dir(tmp_path / "rose", rows=rising_rows))
    slow_rows = [make_row(s, data_s=0.05) for s in range(1, 301)]
    assert "Reading is too slow" in verdict_of(write_run_dir(tmp_path / "slow", rows=slow_rows))
    skipped_rows = [
        make_row(s, skipped=s in (7, 9), loss=None if s in (7, 9) else 2.0) for s in range(1, 301)
    ]
    events = [make_event("step_skipped", 9, cause="the loss is not finite"), FINISHED]
    verdict = verdict_of(write_run_dir(tmp_path / "skipped", rows=skipped_rows, events=events))
    assert "2 steps were skipped (last: 9)" in verdict and "the loss is not finite" in verdict
    evaluations = [
        make_event("evaluated", s, held_out_loss=1.5 + abs(s - 100) / 500) for s in (50, 100, 200)
    ]
    events = [
        *evaluations,
        make_event("evaluated", 250, held_out_loss=1.8),
        FINISHED | {"held_out_loss": 1.9},
    ]
    assert "best at step 100" in verdict_of(write_run_dir(tmp_path / "over", events=events))


def test_gradients_that_explode_or_vanish_name_the_layer(tmp_path: Path) -> None:
    even_norms = {f"blocks.{i}": 0.1 for i in range(6)}
    verdict = verdict_of(
        write_run_dir(tmp_path / "grow", layers=layer_records(even_norms, growing_layer="blocks.4"))
    )
    assert "Exploding gradients: the norm of blocks.4" in verdict
    fading_layers = layer_records(even_norms | {"blocks.0": 1e-5})
    verdict = verdict_of(write_run_dir(tmp_path / "fade", layers=fading_layers))
    assert re.search(r"Vanishing gradients: .* 10,000 times that of blocks\.0", verdict)
    verdict = verdict_of(
        write_run_dir(tmp_path / "tower", layers=layer_records(even_norms | {"blocks.0": 500.0}))
    )
    assert "Exploding gradients: the norm of blocks.0 is 5,000 times" in verdict
    verdict = verdict_of(
        write_run_dir(tmp_path / "dead", layers=layer_records(even_norms | {"blocks.2": 0.0}))
    )
    assert "No gradient reaches blocks.2" in verdict
    lost_layers = layer_records(even_norms)
    for record in lost_layers:
        record["grad_norm"]["blocks.3"] = None
    assert "blocks.3 is not finite" in verdict_of(
        write_run_dir(tmp_path / "lost", layers=lost_layers)
    )


def test_messages_inside_an_island_are_drawn_and_not_called_compute(tmp_path: Path) -> None:
    axes = {"tensor": 3_000_000, "sums": 500}
    inside_rows = [make_row(s, bytes_inside=axes, bytes_sent=0, islands=1) for s in range(1, 40)]
    for name, rows, is_drawn in (("cut", inside_rows, True), ("islands", None, False)):
        records = read_run(write_run_dir(tmp_path / name, rows))
        summary = summarise(records)
        html = report_page(records, summary)
        assert summary.medians["bytes_inside"] == (3_000_500 if is_drawn else None)
        assert ("Sent in a step inside the island" in html) is is_drawn
        assert ("compute and messages inside the island" in html) is is_drawn
        assert ("compute and messages" in " ".join(r.text for r in summary.remarks)) is is_drawn
        assert ("communication between islands" in html) is is_drawn


def test_shares_of_unequal_islands_are_told(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "before": [6, 6], "after": [9, 3], "seconds_per_microbatch": [0.01, 0.03],
        "why": "island 1 takes 3.0 times as long",
    }  # fmt: skip
    odd_fields = {"after": [9, "3"], "seconds_per_microbatch": [None]}
    for name, changes, is_drawn in (
        ("even", [], False), ("odd", [odd_fields], False), ("unequal", [fields, fields], True),
    ):  # fmt: skip
        rebalances = [make_event("rebalanced", 7, **change) for change in changes]
        records = read_run(write_run_dir(tmp_path / name, events=[*rebalances, FINISHED]))
        summary = summarise(records)
        html = report_page(records, summary)
        assert (
            '<td class="n">9</td><td class="n">10 ms</td><td class="n">90 ms' in html
        ) is is_drawn
        sentence = "From step 7 on, the last of 2 changes: island 1 takes 3.0 times as long."
        assert (sentence in [r.text for r in summary.remarks]) is is_drawn


def test_entropy_is_drawn_as_the_floor(tmp_path: Path) -> None:
    events = [make_event("started", entropy_bits=2.0), FINISHED]
    records = read_run(write_run_dir(tmp_path / "a", events=events))
    text = report_page(records, summarise(records))
    assert "entropy of the data <b>1.386</b>" in text, "2 bits in nats"
    assert "entropy of the data <b>2</b>" in text


def test_long_run_of_a_deep_model_stays_small(tmp_path: Path) -> None:
    norms = {f"blocks.{i}": 0.1 for i in range(96)}
    folder = write_run_dir(tmp_path / "a", rows=[make_row(s) for s in range(1, 20_001)])
    lines = [json.dumps({"step": s, "grad_norm": norms}) for s in range(1, 20_001, 10)]
    (folder / "layers.jsonl").write_text("\n".join(lines))
    records = read_run(folder)
    assert len(report_page(records, summarise(records)).encode()) < 1_600_000


def figure_numbers(html: str) -> list[dict[str, Any]]:
    """What the script is given to draw, figure by figure."""
    return [json.loads(text) for text in re.findall(r"/json\">(.*?)</script>", html, re.DOTALL)]


def test_names_of_layers_and_events_end_no_element(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    folder = write_run_dir(
        tmp_path / "a",
        events=[make_event("resumed", 7), make_event("step_skipped", 9, **{name: name})],
        layers=layer_records({f"blocks.{name}": 0.1}),
    )
    checker, html = HtmlChecker(), render_page(folder)
    checker.feed(html)
    assert checker.open_tags == [] and "<script>alert" not in html
    evil = ChartSeries(label=name, x=[1, 2], y=[1.0, 2.0], colour=name)
    html = figure_html(Chart(title=name, series=[evil], step_marks=[(name, 1.0)]), (1, 2))
    assert html.count("</script>") == 1
    assert figure_numbers(html)[0]["marks"] == [[name, 1.0]]


def test_every_series_of_the_page_has_its_column(tmp_path: Path) -> None:
    evaluations = [make_event("evaluated", step, held_out_loss=2.0) for step in (100, 50, 100)]
    layers = layer_records({"blocks.0": 0.1, "blocks.1": 0.1})
    html = render_page(write_run_dir(tmp_path / "a", events=evaluations, layers=layers))
    figures = figure_numbers(html)
    assert [len(figure["series"]) for figure in figures] == [3, 2, 1, 2, 5, 2, 3, 1, 1]
    for figure in figures:
        columns = [(table[0], column) for table in figure["tables"] for column in table[1:]]
        assert len(columns) == len(figure["series"]) and figure["x"] == [1, 300]
        for steps, column in columns:
            assert len(steps) == len(column) and steps == sorted(set(steps))
    assert figures[0]["tables"][-1] == [[50, 100], [2, 2]], "the held-out loss"


def test_faults_are_marked_in_the_charts_of_the_loss(tmp_path: Path) -> None:
    loss = make_event("lost", 9, says="rank 1 was killed")
    events = [loss, make_event("step_skipped", 12), make_event("checkpoint", 50)]
    html = render_page(write_run_dir(tmp_path / "a", events=events))
    marks = [["rank 1 was killed", 9], ["step skipped at step 12", 12]]
    assert [figure["marks"] for figure in figure_numbers(html)][:3] == [marks, marks, []]
    events = [make_event("step_skipped", step) for step in range(1, 301)]
    html = render_page(write_run_dir(tmp_path / "b", events=events))
    assert [step for _, step in figure_numbers(html)[0]["marks"]] == list(range(201, 301))


@pytest.mark.slow
def test_a_browser_draws_every_figure(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no chromium to look with")
    events = [make_event("started", entropy_bits=2.0), make_event("resumed", 7), FINISHED]
    layers = layer_records({f"blocks.{i}": 0.1 for i in range(20)})
    rows = [make_row(s, loss=None if s == 9 else 2.0, data_s=0.0) for s in range(1, 301)]
    folders = {
        "full": write_run_dir(tmp_path / "full", rows, events=events, layers=layers),
        "one step": write_run_dir(tmp_path / "one", rows[:1], events=[]),
    }
    for name, folder in folders.items():
        page = folder / "report.html"
        page.write_text(render_page(folder))
        options = ["--headless", "--no-sandbox", "--enable-logging=stderr", "--dump-dom"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
        result = subprocess.run(
            [browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert "Uncaught" not in result.stderr and "Refused" not in result.stderr, result.stderr
        figure_count = result.stdout.count("<figure class")
        assert result.stdout.count("<canvas") == figure_count >= 8, name
        if name == "full":
            assert result.stdout.count('class="mark"') == 2, "in both charts of the loss"
            assert result.stdout.count('class="level"') == 12, "6 of them in legends"


def test_figure_without_values_is_left_out() -> None:
    assert figure_html(Chart(title="nothing"), (1, 2)) == ""
    nulls = [ChartSeries(label="a", x=[1, 2], y=[None, None])]
    assert figure_html(Chart(title="nulls", series=nulls), (1, 2)) == ""
    zeros = [ChartSeries(label="a", x=[1, 2], y=[0.0, 0.0])]
    log_only = Chart(title="zeros", series=zeros, scale="log", has_scale_toggle=False)
    assert figure_html(log_only, (1, 2)) == ""
    html = figure_html(Chart(title="zeros", series=zeros, scale="log"), (1, 2))
    assert 'data-scale="linear"' in html and "toggle" not in html


def test_a_gap_stays_a_gap_and_a_run_of_one_step_has_an_axis() -> None:
    series = [ChartSeries(label="a", x=range(5), y=[1.0, 2.0, None, 4.00001, 1 / 3])]
    (numbers,) = figure_numbers(figure_html(Chart(title="t", series=series), (0, 4)))
    assert numbers["tables"] == [[[0, 1, 2, 3, 4], [1, 2, None, 4.0, 0.33333]]]
    (numbers,) = figure_numbers(figure_html(Chart(title="t", series=series), (4, 4)))
    assert numbers["x"] == [4, 5]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_even_and_inside(low: float, width: float) -> None:
    high = low + width
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return
    positions = ticks(low, high)
    slack = 1e-6 * (high - low)
    assert all(low - slack <= t <= high + slack for t in positions)
    assert 1 < len(positions) <= 7 and positions == sorted(positions)


@given(st.floats(-12, 12), st.floats(0.05, 20))
def test_log_ticks_are_few_and_inside(power: float, decades: float) -> None:
    low, high = 10**power, 10 ** (power + decades)
    positions = log_ticks(low, high)
    assert 1 <= len(positions) <= 9 and positions == sorted(positions)
    assert all(low * 0.99 <= t <= high * 1.01 for t in positions)
    assert len({format_number(t) for t in positions}) == len(positions)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=300), st.integers(2, 50))
def test_fewer_points_keep_the_extremes(y: list[float | None], points: int) -> None:
    few_x, few_y = downsample_extremes(range(len(y)), y, points)
    assert len(few_x) == len(few_y) <= max(points, 2) and few_x == sorted(few_x)
    values = [v for v in y if v is not None]
    few_values = [v for v in few_y if v is not None]
    assert bool(few_values) == bool(values)
    if values:
        assert (min(few_values), max(few_values)) == (min(values), max(values))
    assert all(y[int(i)] == v for i, v in zip(few_x, few_y, strict=True))


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=200), st.integers(1, 30), st.booleans())
def test_smoothing_stays_between_the_extremes(
    y: list[float], half_width: int, log_scale: bool
) -> None:
    x, smooth_y = smooth(list(range(len(y))), y, 50, max_half_width=half_width, log_scale=log_scale)
    assert len(x) == len(smooth_y) <= 51 and x[0] == 0 and x[-1] == len(y) - 1
    assert all(v is not None and min(y) * 0.999 <= v <= max(y) * 1.001 for v in smooth_y)
    assert smooth_y[0] == pytest.approx(y[0]), "the first step is left alone"


def test_metrics_as_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row(s, shares=[2, 2], samples="6b9e") for s in (1, 2, 3)]
    rows += [make_row(2, loss=None, bytes_inside={"tensor": 5, "sums": 2}), {"step": 3, "late": 1}]
    write_run_dir(tmp_path / "runs" / "a", rows=rows)
    with open(tmp_path / "runs" / "a" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    monkeypatch.chdir(tmp_path)
    columns = cordee.read_metrics("a")
    assert columns.keys() == read_metrics(tmp_path / "runs" / "a").keys()
    assert columns["step"] == [1, 2, 3] and {len(column) for column in columns.values()} == {3}
    assert columns["loss"][0] == make_row(1)["loss"] and math.isnan(columns["loss"][1])
    assert columns["bytes_inside"][1] == 7.0 and columns["late"][2] == 1.0
    assert columns["skipped"][:2] == [0.0, 0.0] and all(map(math.isnan, columns["mfu"]))
    assert not {"shares", "samples"} & columns.keys(), "numbers only"
    assert {type(v) for name in columns if name != "step" for v in columns[name]} == {float}
    with pytest.raises(ConfigError, match="no metrics"):
        read_metrics("b")


JUNK = (
    "NaN", "-Infinity", "1e400", "1e-320", "9" * 400, "9" * 5000, "null", "true", '"x"', "[]",
    '{"a": {"b": 1}}', "-1", "0", "2.5",
)  # fmt: skip


def render_page(folder: Path) -> str:
    records = read_run(folder)
    return report_page(records, summarise(records))


@pytest.mark.parametrize("name", ["metrics", "events", "layers", "plan"])
def test_any_value_may_stand_anywhere(name: str, tmp_path: Path) -> None:
    """Damaged records make no traceback: what is no number is an absence."""
    evaluation = make_event("evaluated", 200, held_out_loss=1.6, held_out_bits_per_byte=2.3)
    start_event = make_event("started", 1, entropy_bits=1.3)
    layers, events = layer_records({"blocks.0": 0.1})[:2], [start_event, evaluation, FINISHED]
    folder = write_run_dir(tmp_path / "a", [make_row(s) for s in (1, 2, 3)], events, layers)
    path = folder / ("plan.json" if name == "plan" else f"{name}.jsonl")
    settings = read_run(folder).run
    (folder / "run.toml").unlink()  # read once: it is not what is damaged here

    def render_damaged() -> None:
        records = replace(read_run(folder), run=settings)
        assert "</html>" in report_page(records, summarise(records))

    lines = path.read_text().splitlines()
    for key in json.loads(lines[-1]):
        for junk in JUNK:
            damaged_line = json.dumps(json.loads(lines[-1]) | {key: "@"}).replace('"@"', junk)
            path.write_text("\n".join([*lines[:-1], damaged_line]))
            render_damaged()
    for junk in ("[" * 100_000, '{"step":' * 100_000, "9" * 6000, "\0", "null"):
        path.write_text("\n".join([junk, *lines]))
        render_damaged()


def test_numbers_as_a_person_writes_them() -> None:
    assert [format_number(v) for v in (0, 1.5, 1234.5, 0.00002, 3e9)] == [
        "0", "1.5", "1,234", "2e-5", "3e9",
    ]  # fmt: skip
    assert [format_seconds(v) for v in (0, 0.0981, 84.2, 150, 10_500)] == [
        "0 s", "98.1 ms", "84.2 s", "2 min 30 s", "2 h 55 min",
    ]  # fmt: skip
    assert [format_amount(v, "B") for v in (12, 7.6e6, 2.1e9)] == ["12 B", "7.6 MB", "2.1 GB"]
