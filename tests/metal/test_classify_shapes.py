"""examples/classify_shapes.py: its data is the same everywhere, its models learn, on any ranks."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.conftest import clean_environment, read_events, weights_digest

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "classify_shapes.py"
MODELS = ("mlp", "cnn", "vit")
OVERRIDES = ("run.exact=true", "run.steps=40", "launch.probe=false", "run.arithmetic=native")
KNOWN_DIGEST = "188afb7076557b1c6b65a0c1cd452336b147accb8b9703c339785c4a214939fc"


@cache
def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classify_shapes", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(model: str, folder: Path, *launcher: str) -> float:
    """Trains and returns the accuracy that the program ends with."""
    words = [*launcher, str(PROGRAM), "--model", model, *OVERRIDES, f"run.dir={folder}"]
    result = subprocess.run(
        [sys.executable, *words],
        env=clean_environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("accuracy ")]
    return float(line.split()[1].rstrip("%")) / 100


def test_shapes_are_the_same_everywhere_and_always() -> None:
    program = load_program()
    images, labels = program.draw_shapes(1000, 0)
    assert images.shape == (1000, 16, 16) and images.dtype == np.uint8
    assert np.bincount(labels).min() > 50 and labels.max() == len(program.SHAPES) - 1 == 9
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert digest == KNOWN_DIGEST
    assert not np.array_equal(images, program.draw_shapes(1000, 1)[0])


def test_a_shape_stands_out_of_its_ground_and_leaves_no_corner() -> None:
    images = load_program().draw_shapes(500, 3)[0].astype(int)
    edge = np.ones((16, 16), dtype=bool)
    edge[1:-1, 1:-1] = False
    ground = np.median(images[:, edge], axis=1)[:, None, None]
    stands_out = np.abs(images - ground) > 35
    share = stands_out.mean((1, 2))
    assert share.min() > 0.01 and share.max() < 0.6


@pytest.mark.parametrize("name", MODELS)
def test_images_of_a_microbatch_do_not_meet(name: str) -> None:
    """Alone or together an image has the same logits, and every parameter has a gradient."""
    torch.manual_seed(0)
    program = load_program()
    model = program.MODELS[name]()
    images, labels = program.make_dataset(6, seed=0).tensors
    assert images.shape == (6, 1, 16, 16) and -1 <= images.min() < images.max() <= 1
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    program.loss(model, images, labels).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("cnn", "vit"))]
)
def test_it_learns_the_same_on_one_rank_and_on_two(name: str, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    accuracies = [run_program(name, tmp_path / "1"), run_program(name, tmp_path / "2", *torchrun)]
    # Of ten classes and 1,000 images: chance is 0.1, and 0.15 is five deviations above it.
    assert accuracies[0] == accuracies[1] > 0.15
    assert weights_digest(tmp_path / "1") == weights_digest(tmp_path / "2")
    finished_event = read_events(tmp_path / "2")[-1]
    assert float(str(finished_event["held_out_loss"])) < np.log(10)
    # The command again trains nothing and measures the same.
    assert run_program(name, tmp_path / "1") == accuracies[0]


def test_it_is_as_short_as_it_says() -> None:
    assert len(PROGRAM.read_text().splitlines()) <= 200
