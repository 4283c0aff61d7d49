"""Image classifiers: their modules against the table, their data, and the same descent anywhere."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.config.load import load
from cordee.config.model import ImageSettings, InitialSettings, ModelSettings
from cordee.config.presets import model_presets
from cordee.data.dataset import open_dataset
from cordee.data.loader import TokenLoader
from cordee.data.order import SampleOrder
from cordee.data.prepare import check_sources, inspect_dataset, prepare, verify_dataset
from cordee.data.records import check_images
from cordee.data.shapes import FIGURES, shape_records
from cordee.errors import DataError
from cordee.layout.classifier import classifier_tensors
from cordee.layout.tensors import count_parameters
from cordee.model.classifier import ConvClassifier, MlpClassifier, make_classifier, scaled
from cordee.model.init_weights import init_weights
from cordee.optim.optimizer import parameter_group
from cordee.planner.classifier import activation_bytes
from cordee.planner.compute_cost import microbatch_cost
from cordee.training.evaluate import evaluate
from tests.conftest import read_events, read_rows, run_cordee, weights_digest

IMAGE = ImageSettings(side=9, channels=3, classes=7)
SMALL = {
    kind: ModelSettings(kind=kind, layers=3, width=12, image=IMAGE)  # type: ignore[arg-type]
    for kind in ("mlp", "conv")
}
KINDS = pytest.mark.parametrize("kind", SMALL)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(kind: str) -> torch.nn.Module:
    model = make_classifier(SMALL[kind])
    init_weights(model, InitialSettings(head="same", residual="same"), 0, 3)
    return model


def tokens_of(count: int, image: ImageSettings = IMAGE, seed: int = 0) -> torch.Tensor:
    """Rows as the loader hands them over: label, pixels, and the next label."""
    chance = np.random.default_rng(seed)
    tokens = torch.from_numpy(chance.integers(0, 256, (count, image.record_bytes + 1)))
    tokens[:, 0] %= image.classes
    return tokens


# ---- modules -------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(["mlp", "conv"]), layers=st.integers(1, 6), width=st.integers(1, 20),
    side=st.integers(1, 33), channels=st.integers(1, 4), classes=st.integers(2, 256),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_table_is_the_model(
    kind: str, layers: int, width: int, side: int, channels: int, classes: int
) -> None:
    image = ImageSettings(side=side, channels=channels, classes=classes)
    model = ModelSettings(kind=kind, layers=layers, width=width, image=image)  # type: ignore[arg-type]
    with torch.device("meta"):
        module = make_classifier(model)
        logits = module(torch.zeros((2, image.record_bytes), dtype=torch.int64))
    assert logits.shape == (2, classes)
    built = [(n, tuple(p.shape), parameter_group(n, p.ndim)) for n, p in module.named_parameters()]
    assert built == list(classifier_tensors(model))
    assert count_parameters(model, 256) == sum(p.numel() for p in module.parameters())


def test_sides_are_those_of_the_image_in_the_model() -> None:
    model = replace(SMALL["conv"], layers=5)
    module = make_classifier(model)
    seen = []
    for block in (module.stem, *module.blocks):
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-1]))
    module(tokens_of(2))
    assert seen == model.block_sides == [9, 9, 5, 3, 3, 3]


@KINDS
def test_loss_is_the_cross_entropy_of_the_labels(kind: str) -> None:
    model, tokens = made(kind), tokens_of(5)
    logits = model(tokens[:, :-1])
    given = float(model(tokens[:, :-1], tokens[:, 1:]).detach())
    by_hand = sum(
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits.tolist(), tokens[:, 0].tolist(), strict=True)
    )
    assert given == pytest.approx(by_hand, rel=1e-5)


@KINDS
def test_neither_label_nor_neighbour_is_looked_at(kind: str) -> None:
    model, tokens = made(kind), tokens_of(4)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 7
    other[:, -1] = 200
    assert torch.equal(model(tokens[:, :-1]), model(other[:, :-1]))
    brighter = tokens.clone()
    brighter[:, IMAGE.record_bytes - 1] = (brighter[:, IMAGE.record_bytes - 1] + 128) % 256
    assert not torch.equal(model(tokens[:, :-1]), model(brighter[:, :-1]))


def test_pixels_are_channel_by_channel_and_in_one_to_minus_one() -> None:
    tokens = tokens_of(2)
    tokens[0, 1], tokens[0, 2] = 0, 255
    x = scaled(tokens[:, :-1], IMAGE)
    assert x.shape == (2, 243) and x[0, 0] == -1 and x[0, 1] == 1
    model = ConvClassifier(SMALL["conv"])
    seen = []
    model.stem.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(tokens[:, :-1])
    assert torch.equal(seen[0][1, 2, 4], x[1, 2 * 81 + 4 * 9 : 2 * 81 + 5 * 9])


@KINDS
def test_images_of_a_microbatch_do_not_meet(kind: str) -> None:
    """No statistics over the batch: alone or together, an image gives the same logits."""
    model, tokens = made(kind), tokens_of(6)
    together = model(tokens[:, :-1])
    alone = torch.cat([model(row[None, :-1]) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@KINDS
def test_start_predicts_every_class_alike(kind: str) -> None:
    model = make_classifier(SMALL[kind])
    init_weights(model, InitialSettings(), 0, 3)
    assert torch.equal(model(tokens_of(3)[:, :-1]), torch.zeros(3, 7))


# ---- evaluation ----------------------------------------------------------------------------------


class Alone:
    """A model on one process, as an engine would score it."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch[:, :-1], given[:, 1:])
        return loss

    @torch.no_grad()
    def infer(self, inputs: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        found: torch.Tensor = self.model(inputs, targets)
        return found

    def set_training(self, training: bool) -> None:
        self.model.train(training)


def test_held_out_is_of_images() -> None:
    model = MlpClassifier(SMALL["mlp"])
    init_weights(model, InitialSettings(head="same"), 0, 3)
    batches = [tokens_of(4), tokens_of(3, seed=1)]
    found = evaluate(Alone(model), batches, (0, 1), lambda sums: sums[None], None)
    whole = torch.cat(batches)
    logits = model(whole[:, :-1])
    assert found.tokens == 7 and found.bits_per_byte is None
    assert found.accuracy == float((logits.argmax(1) == whole[:, 0]).double().mean())
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, whole[:, 0])), rel=1e-6)


# ---- data ----------------------------------------------------------------------------------------


def write(path: Path, count: int, image: ImageSettings = IMAGE, seed: int = 0) -> np.ndarray:
    """A file of random records, zero bytes and all."""
    records = tokens_of(count, image, seed)[:, :-1].numpy().astype(np.uint8)
    records[:, 5] = 0
    path.write_bytes(records.tobytes())
    return records


def rows_of(folder: Path, split: str, image: ImageSettings = IMAGE) -> np.ndarray:
    source = open_dataset(folder, split)
    ids = np.arange(source.rows(image.record_bytes))
    return source.gather(ids, image.record_bytes)[:, :-1]


@pytest.mark.parametrize("shard_bytes", [1 << 20, 1000])
def test_every_record_is_a_row_exactly_once(tmp_path: Path, shard_bytes: int) -> None:
    a, b = write(tmp_path / "a.bin", 20), write(tmp_path / "b.bin", 13, seed=1)
    spec = f"records:{tmp_path}/a.bin,{tmp_path}/b.bin"
    info = prepare(spec, tmp_path / "out", 0.2, 3, shard_bytes=shard_bytes, image=IMAGE)
    assert info.images == asdict(IMAGE) and info.tokenizer == "images"
    assert [s.bytes for s in info.sources] == [20 * 244, 13 * 244]
    train, held = rows_of(tmp_path / "out", "train"), rows_of(tmp_path / "out", "held_out")
    assert (len(train), len(held)) == (26, 7)
    every = sorted(map(bytes, np.concatenate([train, held])))
    assert every == sorted(map(bytes, np.concatenate([a, b])))
    order = [bytes(r) for r in np.concatenate([a, b])]
    assert [order.index(bytes(r)) for r in train] == sorted(order.index(bytes(r)) for r in train)
    assert verify_dataset(tmp_path / "out")["tokens"] == 33 * 244 + 2
    assert inspect_dataset(tmp_path / "out")["splits"]["train"]["rows"] == 26
    again = prepare(spec, tmp_path / "again", 0.2, 3, image=IMAGE)
    assert np.array_equal(rows_of(tmp_path / "again", "held_out"), held)
    assert len(again.splits["train"].shards) == 1


def test_the_loader_hands_over_whole_records(tmp_path: Path) -> None:
    records = write(tmp_path / "a.bin", 12)
    prepare(f"records:{tmp_path}/a.bin", tmp_path / "out", 0.0, 0, image=IMAGE)
    source = open_dataset(tmp_path / "out", "train")
    loader = TokenLoader(source, SampleOrder(0, 12, 3, 4), IMAGE.record_bytes)
    seen = torch.cat([loader.microbatch(0, index) for index in range(4)])
    assert seen.shape == (12, 245)
    got = sorted(bytes(r) for r in seen[:, :-1].numpy().astype(np.uint8))
    assert got == sorted(map(bytes, records))


def test_labels_that_are_no_class_are_named(tmp_path: Path) -> None:
    records = write(tmp_path / "a.bin", 10)
    records[6, 0] = 7
    (tmp_path / "a.bin").write_bytes(records.tobytes())
    with pytest.raises(DataError) as refused:
        prepare(f"records:{tmp_path}/a.bin", tmp_path / "out", 0.1, 0, image=IMAGE)
    assert refused.value.values["record"] == 6 and refused.value.values["label"] == 7
    assert "model.image.classes=8" in (refused.value.fix or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "whole records"), (bytes(243), "whole records"), (bytes(245), "whole records"),
     (None, "cannot be read")],
    ids=["empty", "short", "one byte more", "missing"],
)  # fmt: skip
def test_files_that_are_no_records(content: bytes | None, what: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=what):
        check_sources(f"records:{tmp_path}/a.bin", SMALL["conv"])


def test_what_cannot_be_split_or_read(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", 1)
    spec = f"records:{tmp_path}/a.bin"
    with pytest.raises(DataError, match="too few records"):
        prepare(spec, tmp_path / "out", 0.1, 0, image=IMAGE)
    for path in ("records:", "records: ,"):
        with pytest.raises(DataError, match="no file of records"):
            check_sources(path, SMALL["conv"])
    with pytest.raises(DataError, match="whole records"):
        check_sources(f"records:{tmp_path}", SMALL["conv"])
    with pytest.raises(DataError, match="reads images"):
        check_sources("builtin:stdlib", SMALL["conv"])
    with pytest.raises(DataError, match="synthetic"):
        prepare(spec, tmp_path / "out", 0.0, 0, 100, image=IMAGE)


def test_a_prepared_folder_of_other_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", 5)
    info = prepare(f"records:{tmp_path}/a.bin", tmp_path / "out", 0.0, 0, image=IMAGE)
    check_images(info, SMALL["mlp"])
    check_images(info, ModelSettings())
    with pytest.raises(DataError) as refused:
        check_sources(str(tmp_path / "out"), model_presets()["shapes-mlp"])
    assert "model.image.side=9" in (refused.value.fix or "")
    assert "data.sequence=244" in (refused.value.fix or "")
    (tmp_path / "text").write_text("words " * 100)
    text = prepare(str(tmp_path / "text"), tmp_path / "words", 0.0, 0)
    assert text.images is None and "images" not in text.description()
    with pytest.raises(DataError, match="reads images"):
        check_sources(str(tmp_path / "words"), SMALL["mlp"])


def test_prepare_is_a_command(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", 30)
    done = run_cordee(
        "data", "prepare", f"records:{tmp_path}/a.bin", str(tmp_path / "out"), "--json",
        "model.image.side=9", "model.image.channels=3", "model.image.classes=7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["rows"] == 27


# ---- drawn shapes --------------------------------------------------------------------------------


def test_shapes_are_the_same_everywhere_and_always() -> None:
    image = ImageSettings(side=16, channels=1)
    drawn = shape_records(0, 1100, image)
    assert drawn.shape == (1100, 257) and drawn.dtype == np.uint8
    assert set(drawn[:, 0].tolist()) == set(range(10))
    assert np.array_equal(drawn, shape_records(0, 1100, image))
    assert not np.array_equal(drawn, shape_records(1, 1100, image))
    known = "c95290326cf1dee44d7b241b3aa55496f69929a42132059a1f50dda1536e63ca"
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == known


@given(st.integers(8, 40), st.integers(1, 3), st.integers(2, 10))
@settings(deadline=None, max_examples=15)
def test_shapes_of_any_form(side: int, channels: int, classes: int) -> None:
    image = ImageSettings(side=side, channels=channels, classes=classes)
    drawn = shape_records(0, 40, image)
    assert drawn.shape == (40, image.record_bytes) and drawn[:, 0].max() < classes
    # Most of the edge is ground, and something else stands out of it.
    pixels = drawn[:, 1:].reshape(40, channels, side, side).astype(int)
    edge = np.ones((side, side), dtype=bool)
    edge[1:-1, 1:-1] = False
    ground = np.median(pixels[:, :, edge], axis=2)[:, :, None, None]
    stands_out = np.abs(pixels - ground) > 35
    assert (stands_out.mean((2, 3)) > 0.01).all()
    # The tip that reaches furthest, of the tee, is 1.273 half-sizes from the middle, and that is at
    # least a half-size, 27 % of the side or more, from each edge. So no tip reaches the innermost
    # point of a corner's pixel, 3/4 of a pixel from both edges, once that is 7.6 pixels.
    if side > 28:
        assert not stands_out[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].any()


def test_more_classes_than_shapes() -> None:
    for image in (ImageSettings(classes=11), ImageSettings(side=7)):
        with pytest.raises(DataError) as refused:
            shape_records(0, 5, image)
        assert "model.image.classes=10" in (refused.value.fix or "")
    assert len(FIGURES) == 10


def test_size_follows_from_the_knob(tmp_path: Path) -> None:
    info = prepare("builtin:shapes", tmp_path / "out", 0.25, 0, 257 * 90 + 5)
    assert {n: (s.tokens - 1) // 257 for n, s in info.splits.items()} == {
        "train": 90, "held_out": 30,
    }  # fmt: skip


# ---- the planner's counts ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_what_autograd_keeps_is_what_the_plan_says(kind: str, precision: str) -> None:
    run = load(None, [f"model.preset=shapes-{kind}", f"run.precision={precision}"]).run
    model = make_classifier(run.model)
    tokens = tokens_of(run.batch.microbatch, run.model.image)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        shapes = {tuple(tensor.shape), tuple(tensor.t().shape) if tensor.ndim == 2 else ()}
        if (
            storage.data_ptr() not in own
            and not shapes & weights
            and tensor.dtype.is_floating_point
        ):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    bf16 = precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.requires_grad
    assert activation_bytes(run, "cpu") == pytest.approx(sum(kept.values()), rel=0.1)


def test_operations_by_hand() -> None:
    run = load(None, ["model.preset=shapes-conv", "batch.microbatch=5"]).run
    work = microbatch_cost(run, 256, "cpu")
    inner = 2 * 9 * 32 * 32 * (256 + 64 + 16)
    assert work.flops == 5 * (4 * 9 * 32 * 256 + 6 * (inner + 320))
    assert work.weights == 9 * 32 + 3 * 2 * 9 * 32 * 32 + 320
    flat = microbatch_cost(load(None, ["model.preset=shapes-mlp"]).run, 256, "cpu")
    assert flat.flops == 16 * (4 * 256 * 256 + 6 * (2 * 256 * 256 + 2560))
    assert flat.logits == 160


# ---- whole runs ----------------------------------------------------------------------------------

EXACT = (
    "run.exact=true", "run.steps=12", "data.tokens=60000", "batch.microbatch=4",
    "evaluate.tokens=20000", "launch.threads=1", "run.precision=fp32",
)  # fmt: skip


@KINDS
def test_same_bits_on_any_ranks(kind: str, tmp_path: Path) -> None:
    layouts = (
        ("launch.processes=1",), ("launch.processes=2",), ("launch.processes=4",),
        ("launch.processes=2", "layout.shard=2"),
    )  # fmt: skip
    found = []
    for number, layout in enumerate(layouts):
        folder = tmp_path / str(number)
        words = ("train", f"model.preset=shapes-{kind}", *EXACT, f"run.dir={folder}", *layout)
        done = run_cordee(*words)
        assert done.returncode == 0, done.stderr[-3000:]
        last = read_events(folder)[-1]
        found.append((weights_digest(folder), last["held_out_loss"], last["held_out_accuracy"]))
    assert len(set(found)) == 1, found


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    words = ("train", "model.preset=shapes-mlp", *EXACT, "checkpoint.every=4")
    assert run_cordee(*words, f"run.dir={tmp_path}/a", "launch.processes=1").returncode == 0
    broken = (*words, f"run.dir={tmp_path}/b")
    drill = ("fault.kill=step.agree:7:1", "fault.recover=false")
    assert run_cordee(*broken, "launch.processes=2", *drill).returncode == 1
    assert run_cordee(*broken, "launch.processes=1").returncode == 0
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_it_learns_and_says_so(tmp_path: Path) -> None:
    """Three of the shapes, to be quick: 99 % after 120 steps."""
    folder = tmp_path / "run"
    done = run_cordee(
        "train", "model.preset=shapes-conv", "run.steps=100", "launch.processes=1",
        "launch.threads=1", "run.precision=fp32", "model.image.classes=3", "data.tokens=1500000",
        "evaluate.tokens=100000", "evaluate.every=60", f"run.dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = read_events(folder)[-1]
    assert float(str(last["held_out_accuracy"])) > 0.9
    assert last["held_out_bits_per_byte"] is None and last["sample"] is None
    assert read_rows(folder)[0]["bits_per_byte"] is None
    assert float(str(read_rows(folder)[0]["loss"])) == pytest.approx(math.log(3), rel=1e-4)
    assert read_rows(folder)[-1]["tokens"] == 100 * 64 * 257
    assert "of images right" in done.stderr and "images of 1 x 16 x 16" in done.stderr
    for nonsense in ("bpb", "bits per byte", "cordee sample"):
        assert nonsense not in done.stderr
    report = run_cordee("report", str(folder), "--json")
    assert report.returncode == 0, report.stderr
    told = json.loads(report.stdout)
    assert told["held_out_accuracy"] == last["held_out_accuracy"]
    assert "nats an image" in report.stdout and "nats a token" not in report.stdout
    assert run_cordee("sample", str(folder)).returncode == 2
