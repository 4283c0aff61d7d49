"""Every verb on one real run, as a user would type it."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

from cordee.cli.main import VERBS
from tests.conftest import SMALL, cordee, events, rows

TEXT = "def first(n):\n    return [x * n for x in range(n)]\n\n\nclass Node:\n    pass\n\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a finished run on it at runs/small."""
    folder = tmp_path_factory.mktemp("home")
    for number in range(12):
        (folder / f"part{number}.txt").write_text(f"# part {number}\n" + TEXT * 60)
    done = cordee(
        "train", *SMALL, "data.path=part*.txt", "data.tokens=0", "run.steps=40",
        "run.name=small", "launch.processes=2", "evaluate.every=15", "evaluate.sample=60",
        "checkpoint.every=20", "--json", folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["event"] == "finished"
    assert told["run"] == "runs/small"
    assert told["exit_code"] == 0
    return folder


def asked(home: Path, *words: str, code: int = 0) -> dict[str, object]:
    """A verb's one JSON object."""
    done = cordee(*words, "--json", folder=home)
    assert done.returncode == code, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def test_the_run_folder_keeps_the_contract(home: Path) -> None:
    folder = home / "runs" / "small"
    for name in ("run.toml", "plan.json", "metrics.jsonl", "events.jsonl", "checkpoints"):
        assert (folder / name).exists()
    wanted = {
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s", "comm_s",
        "bytes_sent", "memory_bytes", "mfu", "islands", "quorum",
    }  # fmt: skip
    for row in rows(folder):
        assert wanted <= set(row)
    row = rows(folder)[-1]
    assert 0 < float(str(row["data_s"])) < float(str(row["step_s"]))
    assert 0 < float(str(row["comm_s"])) < float(str(row["step_s"]))
    assert 0 < float(str(row["mfu"])) < 1
    assert row["tokens"] == 40 * 12 * 2 * 32
    told = events(folder)
    assert all({"time", "event", "step"} <= set(event) for event in told)
    assert {"pid", "rank", "host"} <= set(told[0])
    assert [e["step"] for e in told if e["event"] == "evaluated"] == [15, 30]
    assert told[-1]["event"] == "finished"
    assert float(str(told[-1]["held_out_bits_per_byte"])) < 8


def test_report(home: Path) -> None:
    told = asked(home, "report", "small")
    page = Path(home / str(told["report"])).read_text()
    assert page.count("<svg") >= 4
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert cordee("report", "smal", folder=home).returncode == 2
    assert "runs/small" in cordee("report", "smal", folder=home).stderr


def test_fingerprint_is_the_digest_of_the_file_that_export_writes(home: Path) -> None:
    told = asked(home, "export", "runs/small")
    assert told["step"] == 40
    printed = asked(home, "fingerprint", "runs/small")["weights_sha256"]
    assert printed == events(home / "runs" / "small")[-1]["weights_sha256"]
    newest = sorted((home / "runs/small/checkpoints").glob("step-*"))[-1]
    assert cordee("fingerprint", str(newest), folder=home).stdout.strip() == printed
    with safe_open(home / str(told["file"]), framework="np") as file:
        names = sorted(file.keys())
        assert {"embed.weight", "head.weight", "blocks.0.mlp.down.weight"} <= set(names)
        total = sum(file.get_tensor(name).size for name in names)
        assert file.metadata()["model.width"] == "64"
    block = 4 * 64 * 64 + 2 * 64 * 256 + 2 * 64
    assert total == 2 * 256 * 64 + block + 64


def test_sample_is_the_same_text_for_the_same_seed(home: Path) -> None:
    words = ("sample", "small", "--prompt", "class ", "--tokens", "40")
    first, again = (asked(home, *words)["text"] for _ in range(2))
    assert first == again
    assert str(first).startswith("class ")
    # The text is so simple that the model knows it by heart: only heat makes seeds differ.
    hot = (*words, "--temperature", "3")
    assert asked(home, *hot, "--seed", "1")["text"] != asked(home, *hot, "--seed", "2")["text"]
    refused = cordee("sample", "small", "--temperature", "-1", folder=home)
    assert refused.returncode == 2


def test_data_prepare_inspect_verify_and_train_on_it(home: Path) -> None:
    made = asked(home, "data", "prepare", "part*.txt", "shards", "--held-out", "0.2")
    assert asked(home, "data", "inspect", "shards") == made
    assert cordee("data", "verify", "shards", folder=home).returncode == 0
    done = cordee(
        "train", *SMALL, "data.path=shards", "data.tokens=0", "run.steps=3", "run.dir=on-shards",
        folder=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shard = next(path for path in (home / "shards").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    broken = cordee("data", "verify", "shards", folder=home)
    assert broken.returncode != 0
    assert shard.name in broken.stderr


def test_config_show_is_a_file_that_gives_the_same_run(home: Path) -> None:
    shown = cordee("config", "show", "model.preset=micro", "optim.name=adamw", folder=home)
    (home / "mine.toml").write_text(shown.stdout)
    one = asked(home, "config", "show", "mine.toml")
    two = asked(home, "config", "show", "model.preset=micro", "optim.name=adamw")
    assert one == two
    assert one["optim.name"] == "adamw"
    assert "learning rate" in cordee("config", "explain", "optim.lr").stdout
    assert "optim.lr" in cordee("config", "explain", "optim").stdout
    unknown = cordee("config", "explain", "optim.rate")
    assert unknown.returncode == 2
    assert "optim." in unknown.stderr


def test_plan_is_what_train_obeys(home: Path) -> None:
    done = cordee("plan", *SMALL, "--json", "launch.processes=2", folder=home)
    picked = json.loads(done.stdout)["picked"]
    kept = json.loads((home / "runs/small/plan.json").read_text())
    assert picked["processes"] == kept["processes"] == 2
    assert picked["splits"] == kept["splits"]
    # Other shares, should the machine be uneven, have other subtrees to send.
    even = [row for row in rows(home / "runs" / "small") if row["shares"] == [6, 6]]
    sent = {row["bytes_sent"] for row in even}
    assert sent == {kept["predicted"]["bytes_sent"]}


def test_lr_finds_a_band_and_draws_it(home: Path) -> None:
    words = (*SMALL, "run.dir=rates", "optim.name=adamw", "batch.microbatches=2")
    told = asked(home, "lr", *words, "--steps", "500", "--seeds", "2")
    low, high = told["band"]  # type: ignore[misc]
    assert 1e-5 < low <= float(str(told["suggestion"])) <= high < 1
    assert "optim.lr=" in str(told["command"])
    picture = (home / "rates" / "lr.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 400
    assert height > 300
    # It set nothing: the folder is free for the run that it suggests.
    rate = f"optim.lr={told['suggestion']}"
    done = cordee("train", *words, rate, "run.steps=3", folder=home)
    assert done.returncode == 0, done.stderr


def test_doctor(home: Path) -> None:
    done = cordee("doctor", "--json", folder=home)
    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert all(f["state"] != "fail" for f in told["findings"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str) -> None:
    done = cordee(verb, "--help")
    assert done.returncode == 0
    assert f"cordee {verb}" in done.stdout.split("example:")[1]


def test_the_digest_can_be_made_by_others(home: Path) -> None:
    """Name, dtype, shape, little-endian fp32 bytes, in name order: from the exported file."""
    told = asked(home, "export", "small", "--output", "for-digest.safetensors")
    digest = hashlib.sha256()
    with safe_open(home / str(told["file"]), framework="np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} torch.float32 {tensor.shape}\n".encode())
            digest.update(tensor.astype("<f4").tobytes())
    assert digest.hexdigest() == asked(home, "fingerprint", "small")["weights_sha256"]
