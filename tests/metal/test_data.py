"""From files to tensors: splits, rows, microbatches, and the corpora that every machine has.

Not here: the folder and its checksums (test_data_folder.py), the quality of the order
(tests/paper/test_order.py), speed (benchmarks/loader.py). Traded away: large files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cordee.data.corpora import MARKOV_SYMBOLS, markov_tokens, stdlib_files
from cordee.data.dataset import TokenDataset, open_dataset
from cordee.data.loader import TokenLoader, held_out_token_batches
from cordee.data.manifest import read_info
from cordee.data.order import SampleOrder, invert
from cordee.data.prepare import (
    check_sources,
    check_split_lengths,
    inspect_dataset,
    prepare,
    verify_dataset,
)
from cordee.errors import DataError

MARKOV_START = [9, 20, 7, 43, 61, 3, 3, 0, 27, 15, 43, 34]
MARKOV_BITS = 1.425144279
ROOT = Path(__file__).parents[2]
torch.set_num_threads(1)


def load_split_tokens(folder: Path, split: str) -> np.ndarray:
    """The tokens of a split by another reader than ours: the safetensors library."""
    shards = read_info(folder).splits[split].shards
    parts = [load_file(folder / shard.file)["tokens"] for shard in shards]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


# --- from a file ---------------------------------------------------------------------------------


def test_one_file_gives_its_tail(tmp_path: Path) -> None:
    text = bytes(range(1, 201)) * 5
    (tmp_path / "one.txt").write_bytes(text)
    prepare(str(tmp_path / "one.txt"), tmp_path / "data", held_out=0.1, seed=0)
    assert load_split_tokens(tmp_path / "data", "train").tobytes() == text[:900] + b"\0"
    assert load_split_tokens(tmp_path / "data", "held_out").tobytes() == text[900:] + b"\0"
    info = prepare(str(tmp_path / "one.txt"), tmp_path / "all", held_out=0.0, seed=0)
    assert info.splits["held_out"].shards == ()
    assert open_dataset(tmp_path / "all", "held_out").rows(8) == 0
    assert verify_dataset(tmp_path / "all")["tokens"] == 1001


def test_an_interrupted_prepare_leaves_no_half_dataset(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"0123456789abcdef" * 20_000)
    target = tmp_path / "data"
    script = (
        "import sys; from pathlib import Path; from cordee.data.prepare import prepare; "
        "prepare(sys.argv[1], Path(sys.argv[2]), held_out=0.1, seed=0, shard_bytes=64)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "text.txt"), str(target)], cwd=ROOT
    )
    deadline = time.monotonic() + 15
    while not list(tmp_path.glob(".data.*/train-0000[3-9]*.sums")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert len(list(tmp_path.glob(".data.*.partial"))) == 1
    info = prepare(str(tmp_path / "text.txt"), target, held_out=0.1, seed=0)
    assert verify_dataset(target)["fingerprint"] == info.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text.txt"]


def test_a_file_that_may_not_be_read_is_named() -> None:
    # Not in tmp_path: its parents are closed to the other user whom a test run by root becomes.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "open.txt").write_text("ours")
        secret = Path(folder, "secret.txt")
        secret.write_text("mine")
        secret.chmod(0)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(65534)
            for spec in (folder, str(secret)):
                with pytest.raises(DataError, match="cannot be read") as error_info:
                    check_sources(spec)
                assert error_info.value.values["data.path"] == str(secret)
        finally:
            if is_root:
                os.seteuid(0)


def test_too_short_for_a_row_names_the_longest_that_fits(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 1000)
    info = prepare(str(tmp_path / "one.txt"), tmp_path / "data", held_out=0.1, seed=0)
    check_split_lengths(info, 100)
    with pytest.raises(DataError, match="held_out split") as error_info:
        check_split_lengths(info, 101)
    assert error_info.value.fix == "data.sequence=100"
    assert error_info.value.values["tokens"] == 101
    with pytest.raises(DataError, match="train split"):
        check_split_lengths(info, 5000)
    (tmp_path / "tiny.txt").write_text("x")
    tiny_info = prepare(str(tmp_path / "tiny.txt"), tmp_path / "tiny", held_out=0.1, seed=0)
    with pytest.raises(DataError, match=r"data\.held_out=0"):
        check_split_lengths(tiny_info, 1)
    check_split_lengths(
        prepare(str(tmp_path / "tiny.txt"), tmp_path / "whole", held_out=0, seed=0), 1
    )


# --- rows and tensors ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    sequence=st.integers(1, 70),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
)
def test_rows_that_straddle_shards_equal_the_concatenated_truth(
    sizes: list[int], sequence: int, dtype: str
) -> None:
    expected_tokens = np.random.default_rng(0).integers(0, 200, sum(sizes)).astype(dtype)
    dataset = TokenDataset(np.split(expected_tokens, np.cumsum(sizes)[:-1]), dtype)
    rows = dataset.rows(sequence)
    assert dataset.tokens == expected_tokens.size and rows == max(
        0, (expected_tokens.size - 1) // sequence
    )
    ids = np.random.default_rng(1).permutation(rows)
    expected = [expected_tokens[i * sequence : i * sequence + sequence + 1] for i in ids]
    result = dataset.gather(ids, sequence)
    assert result.dtype == np.dtype(dtype) and result.shape == (rows, sequence + 1)
    assert np.array_equal(result, np.reshape(expected, result.shape))
    with pytest.raises((IndexError, ValueError)):
        dataset.gather(np.array([rows + 1]), sequence)


@pytest.fixture(scope="module")
def markov_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "data"
    prepare("builtin:markov", folder, held_out=0.1, seed=5, tokens=50_000)
    return folder


@pytest.mark.parametrize("prefetch", [0, 1])
def test_the_loader_equals_a_naive_reference(markov_folder: Path, prefetch: int) -> None:
    expected_tokens = load_split_tokens(markov_folder, "train").astype(np.int64)
    dataset = open_dataset(markov_folder, "train")
    order = SampleOrder(seed=2, rows=dataset.rows(64), microbatch_rows=4, microbatches=6)
    loader = TokenLoader(dataset, order, 64, prefetch=prefetch)

    def naive_microbatch(step: int, index: int) -> torch.Tensor:
        ids = order.microbatch_row_ids(step, index)
        return torch.from_numpy(
            np.stack([expected_tokens[i * 64 : i * 64 + 65] for i in ids.tolist()])
        )

    # Shares change, steps are repeated, jumped to, and one is asked for without being begun.
    shares = [range(0, 6)] * 4 + [range(2, 5)] * 3 + [range(5, 6), range(0, 1), range(3, 3)]
    for turn, share in enumerate(shares * 2):
        step = turn if turn % 5 else 700 - turn
        loader.begin(step, share)
        for index in range(6):
            batch = loader.microbatch(step, index)
            assert batch.dtype == torch.int64 and batch.shape == (4, 65)
            assert torch.equal(batch, naive_microbatch(step, index))
        assert torch.equal(loader.microbatch(step + 3, 1), naive_microbatch(step + 3, 1))
    with pytest.raises(DataError, match="no such microbatch"):
        loader.begin(0, range(4, 7))
    with pytest.raises(DataError, match="not contiguous"):
        loader.begin(0, range(0, 6, 2))
    loader.begin(9, range(6))
    loader.close()
    loader.begin(10, range(6))
    assert torch.equal(loader.microbatch(10, 5), naive_microbatch(10, 5))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("microbatches", [1, 4, 7])
def test_an_epoch_is_read_exactly_once(markov_folder: Path, ranks: int, microbatches: int) -> None:
    """Every token position of the epoch arrives once, whichever rank reads it."""
    sequence = 64
    dataset = open_dataset(markov_folder, "train")
    rows = dataset.rows(sequence)
    position_dataset = TokenDataset([np.arange(dataset.tokens, dtype=np.uint32)], "uint32")
    order = SampleOrder(seed=8, rows=rows, microbatch_rows=3, microbatches=microbatches)
    bounds = [microbatches * r // ranks for r in range(ranks + 1)]
    loaders = [TokenLoader(position_dataset, order, sequence) for _ in range(ranks)]
    row_ids: list[int] = []
    step = 0
    while len(row_ids) < rows:
        for rank, loader in enumerate(loaders):
            share = range(bounds[rank], bounds[rank + 1])
            loader.begin(step, share)
            for index in share:
                batch = loader.microbatch(step, index)
                assert torch.equal(batch, batch[:, :1] + torch.arange(sequence + 1))
                row_ids += (batch[:, 0] // sequence).tolist()
        step += 1
    assert sorted(row_ids[:rows]) == list(range(rows))
    assert row_ids == order.row_ids_between(0, len(row_ids)).tolist()


def test_a_loader_refuses_an_order_of_another_length(markov_folder: Path) -> None:
    dataset = open_dataset(markov_folder, "train")
    with pytest.raises(DataError, match="differ in their number of rows"):
        TokenLoader(dataset, SampleOrder(0, 7, 1, 1), 64)
    with pytest.raises(DataError, match="prefetch"):
        TokenLoader(dataset, SampleOrder(0, dataset.rows(64), 1, 1), 64, prefetch=2)


def test_a_failed_prefetch_is_seen_and_does_not_hang(
    markov_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard shrinks under the loader, so that row 0 is the only one left to read."""
    shard_arrays = [open_dataset(markov_folder, "train").read_tokens(0, 1000)]
    dataset = TokenDataset(shard_arrays, "uint8")
    rows = dataset.rows(64)
    loader = TokenLoader(dataset, SampleOrder(0, rows, 1, 1), 64, prefetch=1)
    shard_arrays[0] = shard_arrays[0][:70]
    valid_step = int(invert(np.array([0]), rows, seed=0)[0])
    thread_errors: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", thread_errors.append)
    loader.begin(valid_step, range(1))
    with pytest.raises(IndexError):
        loader.begin(valid_step + 1, range(1))
    loader.begin(valid_step, range(1))
    assert loader.microbatch(valid_step, 0).tolist() == [shard_arrays[0][:65].tolist()]
    deadline = time.monotonic() + 10
    while not thread_errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [args.exc_type for args in thread_errors] == [IndexError]


def test_held_out_batches_come_in_file_order(markov_folder: Path) -> None:
    dataset = open_dataset(markov_folder, "held_out")
    expected_tokens = load_split_tokens(markov_folder, "held_out").astype(np.int64)
    batches = list(held_out_token_batches(dataset, 64, rows=8))
    assert (
        sum(len(batch) for batch in batches) == dataset.rows(64) == (expected_tokens.size - 1) // 64
    )
    for number, row in enumerate(torch.cat(batches)):
        assert np.array_equal(row.numpy(), expected_tokens[number * 64 : number * 64 + 65])
    assert [len(batch) for batch in held_out_token_batches(dataset, 64, rows=8, count=2)] == [8, 8]
    assert batches[0].dtype == torch.int64


# --- builtin corpora -----------------------------------------------------------------------------


def test_markov_entropy_is_what_it_says() -> None:
    for seed in (0, 1):
        tokens, bits = markov_tokens(seed, 1_000_000)
        pair_codes = tokens[:-1].astype(np.int64) * MARKOV_SYMBOLS + tokens[1:]
        pairs = np.bincount(pair_codes, minlength=MARKOV_SYMBOLS**2).reshape(MARKOV_SYMBOLS, -1)
        joint = pairs / pairs.sum()
        conditional = pairs / pairs.sum(axis=1, keepdims=True)
        logs = np.log2(conditional, out=np.zeros_like(conditional), where=pairs > 0)
        assert -(joint * logs).sum() == pytest.approx(bits, rel=0.01)
        # Skewed and sparse, yet every symbol is in use and one symbol alone tells little.
        frequencies = np.bincount(tokens, minlength=MARKOV_SYMBOLS) / tokens.size
        assert frequencies.min() > 0 and -(frequencies * np.log2(frequencies)).sum() > 5
        assert (pairs > 0).sum(axis=1).max() <= 4


def test_markov_is_the_same_everywhere() -> None:
    tokens, bits = markov_tokens(1234, 100_000)
    assert tokens[:12].tolist() == MARKOV_START
    assert bits == MARKOV_BITS
    long_tokens, _ = markov_tokens(1234, 200_000)
    assert np.array_equal(long_tokens[:100_000], tokens)
    assert not np.array_equal(markov_tokens(1235, 100_000)[0], tokens)
    assert np.array_equal(np.unique(markov_tokens(0, 5000, symbols=2)[0]), [0, 1])
    with pytest.raises(DataError):
        markov_tokens(0, 10, symbols=257)


def test_markov_as_a_dataset(markov_folder: Path) -> None:
    info = read_info(markov_folder)
    assert info.tokenizer == "markov" and info.vocabulary == MARKOV_SYMBOLS
    assert info.splits["train"].tokens == 50_000 and info.splits["held_out"].tokens == 5556
    assert info.entropy_bits == markov_tokens(5, 10)[1]
    assert verify_dataset(markov_folder)["tokens"] == 55_556
    description = inspect_dataset(markov_folder, sequence=64)
    assert json.loads(json.dumps(description)) == description
    assert len(description["first_document"]) == 32


def test_stdlib_is_text_without_tests() -> None:
    files = stdlib_files()
    assert files == sorted(files) and len(files) > 300
    assert all(path.suffix == ".py" for path in files)
    root = sysconfig.get_path("stdlib")
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert not {"test", "tests", "idle_test", "site-packages"} & parts
    assert any(path.name == "argparse.py" for path in files)


def test_stdlib_as_a_dataset(tmp_path: Path) -> None:
    check_sources("builtin:stdlib")
    info = prepare("builtin:stdlib", tmp_path / "data", held_out=0.1, seed=0)
    assert (info.name, info.vocabulary, info.dtype) == ("stdlib", 256, "uint8")
    assert info.end_of_document == 0 and info.bytes_per_token == 1.0
    held_out_tokens, train_tokens = info.splits["held_out"].tokens, info.splits["train"].tokens
    assert 0.09 < held_out_tokens / (held_out_tokens + train_tokens) < 0.16
    description = inspect_dataset(tmp_path / "data")
    first_path = next(
        path for path in (Path(source.path) for source in info.sources) if path.exists()
    )
    assert description["sources"] == len(info.sources) and description["changed_sources"] == []
    assert description["first_document"] and first_path.suffix == ".py"
    assert abs(description["mixing"]["distinct"] / description["mixing"]["chance"] - 1) < 0.02
