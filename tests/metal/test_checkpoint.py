"""Checkpoints: every byte comes back from any split, and every damaged byte is found and named.

Kills, full disks and pruning are in `test_checkpoint_faults.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cordee.checkpoint.checkpointer import Checkpointer, CommitReport, SaveStatus
from cordee.checkpoint.format import (
    CHUNK_BYTES,
    JSON_LIMIT_BYTES,
    MANIFEST,
    chunk_checksum,
    encode_checked_json,
)
from cordee.checkpoint.load import find_newest, list_complete, open_checkpoint
from cordee.checkpoint.pieces import DTYPES, Piece
from cordee.errors import CheckpointError
from cordee.layout.slices import Box, full_box
from tests.conftest import boxes, partitions

torch.set_num_threads(1)


def no_fault(name: str, step: int) -> None:
    """No fault."""


def fail_on_reject(path: Path, reason: str) -> None:
    raise AssertionError(f"{path}: {reason}")


def make_piece(
    name: str, tensor: torch.Tensor, total_rows: int | None = None, start: int = 0
) -> Piece:
    """Some rows; the whole tensor unless `total_rows` says how many the tensor has in all."""
    shape = tuple(tensor.shape) if total_rows is None else (total_rows, *tensor.shape[1:])
    return Piece(name, tensor, shape, (start, *[0] * (len(shape) - 1)) if shape else ())


def slice_tensor(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(*dim) for dim in box)]


def make_box_piece(name: str, tensor: torch.Tensor, box: Box) -> Piece:
    """The piece of a whole tensor that a box is."""
    return Piece(
        name, slice_tensor(tensor, box), tuple(tensor.shape), tuple(start for start, _ in box)
    )


def split_rows(name: str, tensor: torch.Tensor, cuts: Sequence[int]) -> list[Piece]:
    """Rows cut at `cuts`, a piece for each writer (empty ones too)."""
    bounds = [0, *sorted(cuts), tensor.shape[0]]
    return [
        make_piece(name, tensor[a:b], tensor.shape[0], a) for a, b in itertools.pairwise(bounds)
    ]


def make_savers(folder: Path, world_size: int) -> list[Checkpointer]:
    return [Checkpointer(folder, rank, world_size, 2, no_fault) for rank in range(world_size)]


def save_all(
    savers: list[Checkpointer],
    step: int,
    pieces: Sequence[Sequence[Piece]],
    generation: int = 0,
    **meta: object,
) -> CommitReport | None:
    """What the caller of a real run does, in one process."""
    for saver, saver_pieces in zip(savers, pieces, strict=True):
        saver.begin(step, generation, saver_pieces, meta)
    report = None
    if all(saver.join(20) is SaveStatus.WRITTEN for saver in savers):
        report = savers[0].commit()
    return report


def finish_all(savers: list[Checkpointer]) -> None:
    for saver in reversed(savers):
        saver.finish()


def write_checkpoints(folder: Path, steps: Sequence[int]) -> None:
    savers = make_savers(folder, 2)
    for step in steps:
        halves = split_rows("w", torch.full((50, 10), float(step)), [20])
        assert save_all(
            savers, step, [[halves[0], make_piece("s", torch.tensor(step))], [halves[1]]]
        )
        finish_all(savers)


def has_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaN or not."""
    byte_views = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*byte_views)


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Any bits at all, which for floats includes NaN and infinities."""
    count = torch.Size(shape).numel() * dtype.itemsize
    random_bytes = torch.frombuffer(
        bytearray(random.Random(seed).randbytes(count + 1)), dtype=torch.uint8
    )
    byte_values = random_bytes[:count].clone()
    return (byte_values & 1 if dtype is torch.bool else byte_values).view(dtype).view(tuple(shape))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_boxes_come_back_as_any_box(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world_size = data.draw(st.integers(1, 4))
    pieces_by_rank: list[list[Piece]] = [[] for _ in range(world_size)]
    tensors = {}
    for number in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from(sorted(DTYPES)))
        shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4)))
        name, tensor = f"layers.{number}.w", random_tensor(DTYPES[dtype], shape, number)
        tensors[name] = tensor
        parts = data.draw(partitions(shape))
        for box in parts if tensor.numel() else parts[:1]:
            pieces_by_rank[data.draw(st.integers(0, world_size - 1))].append(
                make_box_piece(name, tensor, box)
            )
    folder = tmp_path_factory.mktemp("split") / "checkpoints"
    savers = make_savers(folder, world_size)
    assert save_all(savers, 7, pieces_by_rank, 2, loss=0.1, order=[1, 2]), savers[0].failure
    finish_all(savers)
    checkpoint = find_newest(folder, fail_on_reject)
    assert checkpoint is not None and (checkpoint.step, checkpoint.generation) == (7, 2)
    assert checkpoint.meta == {"loss": 0.1, "order": [1, 2]}
    assert checkpoint.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert has_same_bits(checkpoint.read(name), tensor)
        box = data.draw(boxes(tuple(tensor.shape)))
        assert has_same_bits(checkpoint.read(name, box), slice_tensor(tensor, box))


def test_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {f"t.{code}": random_tensor(dtype, (5, 3), 1) for code, dtype in DTYPES.items()}
    tensors["é strided"] = torch.arange(24.0).view(4, 6).t()[::2]
    tensors["scalar"] = torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True)
    pieces = [make_piece(name, tensor) for name, tensor in tensors.items()]
    halves = split_rows("half", torch.arange(10).view(10, 1), [4])
    savers = make_savers(tmp_path / "c", 3)
    report = save_all(savers, 1, [[*pieces, halves[0]], [halves[1]], []])
    assert report is not None and report.bytes > 0 and report.warning is None
    names = {f"rank-0000{rank}.safetensors" for rank in range(3)}
    assert {p.name for p in report.path.iterdir()} == {MANIFEST, *names}
    with safe_open(report.path / "rank-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {*tensors, "half#0,0"}
        for name, tensor in tensors.items():
            assert has_same_bits(file.get_tensor(name), tensor.detach()), name
    with safe_open(report.path / "rank-00001.safetensors", framework="pt") as file:
        assert file.get_tensor("half#4,0").flatten().tolist() == [4, 5, 6, 7, 8, 9]
    with safe_open(report.path / "rank-00002.safetensors", framework="pt") as file:
        assert list(file.keys()) == []


def test_training_may_change_tensors_once_begin_returns(tmp_path: Path) -> None:
    release_event = threading.Event()

    def wait(name: str, step: int) -> None:
        if name == "save.write":
            release_event.wait(10)

    saver = Checkpointer(tmp_path / "c", 0, 1, 1, wait)
    weights = torch.arange(3_000_000.0).view(3, -1)
    weights_before = weights.clone()
    saver.begin(1, 0, [make_piece("w", weights)], {})
    assert saver.status is SaveStatus.WRITING
    weights.mul_(-1)
    with pytest.raises(CheckpointError, match="in flight"):
        saver.begin(2, 0, [make_piece("w", weights)], {})
    release_event.set()
    assert saver.join(10) is SaveStatus.WRITTEN and saver.commit()
    saver.finish()
    staging_address = saver._staging_buffer.data_ptr()
    saver.begin(2, 0, [make_piece("w", weights)], {})
    assert saver.join(10) is SaveStatus.WRITTEN
    assert saver._staging_buffer.data_ptr() == staging_address
    checkpoint = find_newest(tmp_path / "c", fail_on_reject)
    assert (
        checkpoint is not None
        and checkpoint.step == 1
        and has_same_bits(checkpoint.read("w"), weights_before)
    )


def count_turns_during(action: Callable[[], object]) -> int:
    """How often this thread comes to run while another one does `action`."""
    start_event, turn_count = threading.Event(), 0
    thread = threading.Thread(target=lambda: (start_event.set(), action()))
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)  # nobody takes the interpreter from a thread that does not give it
    try:
        thread.start()
        start_event.wait()
        while thread.is_alive():
            turn_count += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(switch_interval)
        thread.join()
    return turn_count


def test_hashing_lets_training_run() -> None:
    data = memoryview(bytearray(256 << 20))
    # Several tries: on a busy machine a thread may not be scheduled while it could run.
    assert max(count_turns_during(lambda: chunk_checksum([data])) for _ in range(8)) > 20
    assert max(count_turns_during(lambda: sum(range(1_000_000))) for _ in range(3)) < 10


def count_read_bytes() -> int:
    """Bytes that this process has read so far, as the system counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


LONG_SHAPE, NARROW_SHAPE, DEEP_SHAPE = (64, 1 << 18), (4096, 256), (8, 32, 1 << 13)


@pytest.mark.parametrize(
    ("shape", "parts", "box", "max_ratio"),
    [
        (
            NARROW_SHAPE,
            [(a, a + 1024) for a in (0, 1024, 2048, 3072)],
            ((100, 3700), (0, 256)),
            1.0,
        ),
        (
            LONG_SHAPE,
            [(0, 64)],
            ((0, 64), (1 << 17, 3 << 16)),
            1.0,
        ),  # a quarter of each row of 1 MiB
        (LONG_SHAPE, [(0, 20), (20, 64)], ((10, 50), (7, 8)), 1.0),  # a column, far apart
        (NARROW_SHAPE, [(0, 4096)], ((5, 6), (3, 100)), 1.0),
        (NARROW_SHAPE, [(0, 4096)], ((0, 4096), (0, 64)), 4.0),  # gaps of 768 bytes are read
        (DEEP_SHAPE, [(0, 8)], ((0, 8), (4, 8), (0, 1 << 13)), 1.0),  # gaps of 896 kB are not
        (DEEP_SHAPE, [(0, 8)], ((2, 8), (4, 8), (0, 1 << 12)), 2.0),
    ],
)
def test_a_box_reads_only_its_bytes(
    tmp_path: Path, shape: tuple[int, ...], parts: list[tuple[int, int]], box: Box, max_ratio: float
) -> None:
    tensor = random_tensor(torch.float32, shape, 3)
    savers = make_savers(tmp_path / "c", len(parts))
    pieces_by_rank = [[make_box_piece("w", tensor, (rows, *full_box(shape[1:])))] for rows in parts]
    report = save_all(savers, 1, pieces_by_rank)
    assert report is not None
    checkpoint = open_checkpoint(report.path, verify=False)
    bytes_before = count_read_bytes()
    result = checkpoint.read("w", box)
    assert count_read_bytes() - bytes_before < 1.01 * max_ratio * result.nbytes + 4096
    assert has_same_bits(result, slice_tensor(tensor, box))


def test_columns_of_many_writers_are_put_together(tmp_path: Path) -> None:
    tensor = random_tensor(torch.int16, (7, 3000, 5000), 4)  # more than is read at once
    parts = [((0, 7), (a, a + 1500), (b, b + 2500)) for a in (0, 1500) for b in (0, 2500)]
    savers = make_savers(tmp_path / "c", 4)
    report = save_all(savers, 1, [[make_box_piece("w", tensor, box)] for box in parts])
    assert report is not None
    checkpoint = open_checkpoint(report.path, verify=False)
    assert has_same_bits(checkpoint.read("w"), tensor)
    box = ((1, 6), (1400, 1600), (2499, 2600))
    assert has_same_bits(checkpoint.read("w", box), slice_tensor(tensor, box))


@pytest.mark.parametrize("box", [((0, 4),), ((0, 3), (2, 1)), ((0, 3), (-1, 1)), ((0, 4), (0, 1))])
def test_a_box_that_is_not_there_is_refused(tmp_path: Path, box: Box) -> None:
    savers = make_savers(tmp_path / "c", 1)
    report = save_all(savers, 1, [[make_piece("w", torch.ones(3, 2))]])
    assert report is not None
    checkpoint = open_checkpoint(report.path)
    with pytest.raises(CheckpointError, match="does not have this box"):
        checkpoint.read("w", box)
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        checkpoint.read("v", box)


def test_two_hundred_damages_are_found_and_named(tmp_path: Path) -> None:
    folder, rng = tmp_path / "c", random.Random(20)
    write_checkpoints(folder, [10, 20])
    path = list_complete(folder)[0]
    for _ in range(200):
        file = rng.choice(sorted(path.iterdir()))
        original_bytes = file.read_bytes()
        damaged_bytes, offset = bytearray(original_bytes), rng.randrange(len(original_bytes))
        if rng.random() < 0.15:
            damaged_bytes = damaged_bytes[:offset] if rng.random() < 0.7 else damaged_bytes + b"\n"
        else:
            damaged_bytes[offset] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged_bytes)
        rejects: dict[Path, str] = {}
        checkpoint = find_newest(folder, rejects.__setitem__)
        assert checkpoint is not None and checkpoint.step == 10
        assert list(rejects) == [path] and file.name in rejects[path], rejects
        file.write_bytes(original_bytes)
    assert open_checkpoint(path).step == 20


def test_damage_in_a_big_file_names_bytes_and_tensor(tmp_path: Path) -> None:
    savers = make_savers(tmp_path / "c", 1)
    pieces = [make_piece(name, torch.ones(5, 1 << 20)) for name in ("a", "b", "c")]
    report = save_all(savers, 1, [pieces])
    assert report is not None
    with open(report.path / "rank-00000.safetensors", "r+b") as file:
        file.seek(5 * CHUNK_BYTES + 5)
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"rank-00000.*bytes 41943040 to 50331648.*\(b, c\)"):
        open_checkpoint(report.path)
    checkpoint = open_checkpoint(report.path, verify=False)
    (report.path / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.read("a")
    (report.path / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.*No such file"):
        open_checkpoint(report.path)


def test_a_header_that_contradicts_the_manifest_is_refused(tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "c", [1])
    path = list_complete(tmp_path / "c")[0]
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))  # checksums made anew:
    chunks = [chunk_checksum([memoryview(file.read_bytes())])]
    manifest = path / MANIFEST
    manifest.write_bytes(change_first_file(chunks=chunks)(manifest.read_bytes()))
    with pytest.raises(CheckpointError, match=r"rank-00000.*header"):
        open_checkpoint(path, verify=False)


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A manifest changed by someone who can also compute its SHA-256."""

    def apply(raw: bytes) -> bytes:
        body = json.loads(raw)["body"]
        change(body)
        return encode_checked_json(body)

    return apply


def change_first_piece(**values: object) -> Callable[[bytes], bytes]:
    return change_manifest(lambda body: body["files"][0]["pieces"][0].update(values))


def change_first_file(**values: object) -> Callable[[bytes], bytes]:
    return change_manifest(lambda body: body["files"][0].update(values))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: b"", "Expecting value"),
        (lambda raw: b"\x80\x04K\x01.", "ascii"),
        (lambda raw: b"[" * 1_000_000, "nested too deeply"),
        (lambda raw: b" " * (JSON_LIMIT_BYTES + 1), "longer than"),
        (lambda raw: raw.replace(b'"step":1', b'"step":2'), "SHA-256"),
        (lambda raw: raw + b"\n", "canonical"),
        (lambda raw: raw.replace(b'"sha256":"', b'"sha256":"0'), "SHA-256"),
        (lambda raw: raw.replace(b"point-2", b"point-1"), "cordee-checkpoint-1.*reads"),
        (lambda raw: raw.replace(b'"step":1', b'"step":NaN'), "not of type|JSON"),
        (change_manifest(lambda body: body.update(extra=1)), "exactly"),
        (change_manifest(lambda body: body.update(step=True)), "type int"),
        (change_manifest(lambda body: body.update(step=3)), "not of this folder"),
        (change_manifest(lambda body: body["files"].clear()), "no files"),
        (change_manifest(lambda body: body["files"].append(body["files"][0])), "listed twice"),
        (change_manifest(lambda body: body["files"].pop()), "missing"),
        (change_first_file(file="../rank-00000.safetensors"), "plain file name"),
        (change_first_file(file="/etc/passwd"), "plain file name"),
        (change_first_file(file="rank-00009.safetensors"), "No such file"),
        (change_first_file(bytes=10), "contradict"),
        (change_first_file(chunks=[]), "contradict"),
        (change_first_file(chunks=["0" * 32]), "not what was written"),
        (change_first_file(chunks=[0]), "hex digits"),
        (change_first_piece(shape=[1 << 70, 10]), "impossible shape"),
        (change_first_piece(shape=[-50, -10]), "impossible shape"),
        (change_first_piece(shape=[1] * 100), "impossible shape"),
        (change_first_piece(shape=[50, 1 << 40]), "differ"),
        (change_first_piece(size=[20, 9]), "contradict"),
        (change_first_piece(shape=[50.0, 10]), "whole numbers"),
        (change_first_piece(shape=[49, 10]), "differ"),
        (change_first_piece(dtype="F16"), "order|contradict"),
        (change_first_piece(dtype="I32"), "differ"),
        (change_first_piece(dtype="OBJECT"), "dtype"),
        (change_first_piece(name="v"), "missing|header"),
        (change_first_piece(name="a\nb"), "cannot be a tensor's name"),
        (change_first_piece(start=[1, 0]), "missing"),
        (change_first_piece(start=[-1, 0]), "outside"),
        (change_first_piece(start=[0]), "differ in dims"),
        (change_first_piece(start=["0", 0]), "whole numbers"),
        (change_first_piece(start=[True, 0]), "whole numbers"),
        (change_first_piece(size=[51, 10]), "outside"),
        (change_first_piece(size=[-1, 10]), "outside"),
        (change_first_piece(size=[20, 1 << 70]), "outside"),
        (change_first_piece(shape=[2] * 59, start=[0] * 59, size=[1] * 59), "cut along 59 dims"),
    ],
)
def test_a_malicious_manifest_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    savers = make_savers(tmp_path, 2)
    halves = split_rows("w", torch.ones(50, 10), [20])
    report = save_all(savers, 1, [[halves[0]], [halves[1]]])
    assert report is not None
    manifest = report.path / MANIFEST
    manifest.write_bytes(change(manifest.read_bytes()))
    with pytest.raises(CheckpointError, match=f"(?i)(manifest.json|rank-0000).*({reason})"):
        open_checkpoint(report.path)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors"])
def test_links_and_pipes_are_not_followed(tmp_path: Path, name: str) -> None:
    write_checkpoints(tmp_path / "c", [1])
    file = list_complete(tmp_path / "c")[0] / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(file.parent)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=f"{name}.*regular file"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize(
    ("pieces", "meta", "reason"),
    [
        ([make_piece("w", torch.ones(2)), make_piece("w", torch.ones(2))], {}, "twice"),
        ([make_piece("w", torch.ones(2)), make_piece("w", torch.ones(2).half())], {}, "one key"),
        ([make_piece("w", torch.ones(2, dtype=torch.complex64))], {}, "complex64"),
        ([make_piece("w", torch.ones(2, device="meta"))], {}, "meta"),
        ([make_piece("w", torch.ones(2), 5, 4)], {}, "outside"),
        ([make_piece("w#1", torch.ones(2))], {}, "name"),
        ([Piece(name="w", tensor=torch.ones(2), global_shape=(2, 2), start=(0, 0))], {}, "dims"),
        ([], {1: "a"}, "not text"),
        ([], {"loss": float("nan")}, "JSON"),
        ([], {"tensor": torch.ones(1)}, "JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(
    tmp_path: Path, pieces: list[Piece], meta: dict[str, Any], reason: str
) -> None:
    saver = Checkpointer(tmp_path / "c", 0, 1, 1, no_fault)
    with pytest.raises(CheckpointError, match=reason):
        saver.begin(1, 0, pieces, meta)
    assert saver.status is SaveStatus.IDLE and not (tmp_path / "c").exists()


SQUARE = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("pieces_by_rank", "reason"),
    [
        ([split_rows("w", torch.ones(4), [2])[:1], []], "[2] of [4] is missing"),
        ([split_rows("w", torch.ones(4), [])] * 2, "[0] of [4] is held 2 times"),
        (
            [
                [make_box_piece("w", SQUARE, ((0, 2), (0, 3)))],
                [make_box_piece("w", SQUARE, ((2, 4), (0, 4)))],
            ],
            "[0, 3]",
        ),
        (
            [
                [make_box_piece("w", SQUARE, ((0, 3), (0, 4)))],
                [make_box_piece("w", SQUARE, ((2, 4), (1, 4)))],
            ],
            "[2, 1]",
        ),
        (
            [
                split_rows("w", torch.ones(4), [2])[:1],
                split_rows("w", torch.ones(4).half(), [2])[1:],
            ],
            "differ",
        ),
    ],
)
def test_pieces_that_do_not_tile_are_not_committed(
    tmp_path: Path, pieces_by_rank: list[list[Piece]], reason: str
) -> None:
    savers = make_savers(tmp_path / "c", 2)
    assert save_all(savers, 1, pieces_by_rank) is None and reason in str(savers[0].failure)
    finish_all(savers)
    assert not list_complete(tmp_path / "c")
