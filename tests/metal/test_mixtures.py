"""Mixtures as a dataset folder: what is written, what rows hold, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cordee.data.dataset import TokenDataset, open_dataset
from cordee.data.loader import TokenLoader, held_out_token_batches
from cordee.data.manifest import list_changed_sources, read_info
from cordee.data.prepare import (
    check_sources,
    check_split_lengths,
    inspect_dataset,
    prepare,
    verify_dataset,
)
from cordee.errors import DataError

SEQUENCE = 16


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of a's and b's, a folder of c's and d's, and a folder of shards of e's."""
    (tmp_path / "one.txt").write_text("ab" * 2000)
    (tmp_path / "two").mkdir()
    for number in range(3):
        (tmp_path / "two" / f"{number}.txt").write_text("cd" * 500)
    (tmp_path / "three.txt").write_text("e" * 3000)
    prepare(str(tmp_path / "three.txt"), tmp_path / "shards", 0.2, 0, shard_bytes=700)
    return tmp_path


def mixture_spec(texts: Path) -> str:
    return "; ".join(str(texts / name) for name in ("one.txt", "two", "shards"))


def make_mixture(texts: Path, name: str = "mixed", weights: str = "5,3,2") -> Path:
    """The mixture, in shards of 999 tokens, so that rows straddle them."""
    prepare(mixture_spec(texts), texts / name, 0.1, 0, shard_bytes=999, weights=weights)
    return texts / name


def reference_rows(dataset: TokenDataset, sizes: list[int]) -> list[list[int]]:
    """Every row, cut from each source's own tokens."""
    rows, start = [], 0
    for size in sizes:
        tokens = dataset.read_tokens(start, start + size).tolist()
        starts = range(0, size - SEQUENCE, SEQUENCE)
        rows += [tokens[offset : offset + SEQUENCE + 1] for offset in starts]
        start += size
    return rows


def test_rows_are_those_of_each_source_and_none_straddles_two(texts: Path) -> None:
    folder = make_mixture(texts)
    info = read_info(folder)
    sizes = [sum(shard.tokens for shard in shards) for shards in info.shards_by_source("train")]
    assert len(info.parts) == 3 and len(info.splits["train"].shards) > 6
    dataset = open_dataset(folder, "train")
    rows = dataset.gather(np.arange(dataset.rows(SEQUENCE)), SEQUENCE).tolist()
    assert rows == reference_rows(dataset, sizes)
    assert info.rows("train", SEQUENCE) == len(rows)
    kinds = [{chr(token) for token in row if token} for row in rows]
    assert all(kind <= set("ab") or kind <= set("cd") or kind <= set("e") for kind in kinds)


def test_a_name_with_a_semicolon_that_exists_is_one_path(texts: Path) -> None:
    (texts / "a;b.txt").write_text("plain" * 100)
    check_sources(f"{texts}/a;b.txt")
    assert not prepare(f"{texts}/a;b.txt", texts / "plain", 0.1, 0).parts


def test_a_loader_draws_by_weight(texts: Path) -> None:
    dataset = open_dataset(make_mixture(texts), "train")
    loader = TokenLoader(dataset, dataset.sample_order(3, SEQUENCE, 4, 8), SEQUENCE)
    letter_counts = {"ab": 0, "cd": 0, "e": 0}
    for step in range(128):  # one whole block of the order
        loader.begin(step, range(8))
        for index in range(8):
            for row in loader.microbatch(step, index):
                letters = {chr(token) for token in row.tolist() if token}
                letter_counts[next(kind for kind in letter_counts if letters <= set(kind))] += 1
    assert letter_counts == pytest.approx({"ab": 2048, "cd": 1228.8, "e": 819.2}, abs=1)


def test_evaluation_takes_turns_by_weight(texts: Path) -> None:
    dataset = open_dataset(make_mixture(texts), "held_out")
    batch = next(held_out_token_batches(dataset, SEQUENCE, rows=10))
    letters = ["".join(sorted({chr(token) for token in row.tolist() if token})) for row in batch]
    assert [letters.count(kind) for kind in ("ab", "cd", "e")] == [5, 3, 2]
    all_rows = np.concatenate(
        [b.numpy() for b in held_out_token_batches(dataset, SEQUENCE, rows=10)]
    )
    mixture = dataset.mixture_order(0, SEQUENCE)
    assert mixture is not None and len(all_rows) == mixture.max_draws_without_repeat < dataset.rows(
        SEQUENCE
    )


def test_what_is_inspected_verified_and_watched(texts: Path) -> None:
    folder = make_mixture(texts)
    description = inspect_dataset(folder, SEQUENCE)
    assert [part["share"] for part in description["parts"]] == [0.5, 0.3, 0.2]
    assert (
        sum(part["rows"] for part in description["parts"]) == description["splits"]["train"]["rows"]
    )
    assert verify_dataset(folder)["tokens"] == sum(
        split["tokens"] for split in description["splits"].values()
    )
    assert list_changed_sources(read_info(folder)) == []
    shard = next((texts / "shards").glob("train-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        verify_dataset(folder)
    with pytest.raises(DataError, match="damaged"):
        open_dataset(folder, "train")


def test_weights_are_part_of_what_a_mixture_is(texts: Path) -> None:
    infos = [
        read_info(make_mixture(texts, f"m{n}", w))
        for n, w in enumerate(["5,3,2", "0.5,0.3,0.2", ""])
    ]
    assert [part.weight for part in infos[0].parts] == [5, 3, 2]
    assert infos[0].fingerprint == infos[1].fingerprint != infos[2].fingerprint
    sizes = [sum(s.tokens for s in shards) for shards in infos[2].shards_by_source("train")]
    size_weights = [part.weight / 10_000 for part in infos[2].parts]
    assert size_weights == pytest.approx([size / sum(sizes) for size in sizes], abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("{0}/one.txt", "1", "weights are for a mixture"),
        ("{0}/one.txt;", "", "two sources or more"),
        ("{0}/one.txt;{0}/two", "1,2,3", "one for each source"),
        ("{0}/one.txt;{0}/two", "1,x", "one for each source"),
        ("{0}/one.txt;{0}/two", "1,0", "more than 0"),
        ("{0}/one.txt;{0}/two", "1,1000000000", "too fine"),
        ("{0}/one.txt;{0}/nothing", "", "nothing"),
        ("{0}/one.txt;builtin:markov", "", "is of texts"),
    ],
)
def test_what_is_refused_leaves_nothing(texts: Path, spec: str, weights: str, message: str) -> None:
    source_spec: Any = spec.format(texts)
    for call in (
        lambda: check_sources(source_spec, weights=weights),
        lambda: prepare(source_spec, texts / "mixed", 0.1, 0, weights=weights),
    ):
        with pytest.raises(DataError, match=message):
            call()
    assert not [path for path in texts.iterdir() if "mixed" in path.name]


def test_sources_of_unlike_tokens_and_nested_mixtures_are_refused(texts: Path) -> None:
    prepare("builtin:markov", texts / "chain", 0.1, 0, tokens=5000)
    unlike_spec, nested_spec = (
        f"{texts}/one.txt;{texts}/chain",
        f"{texts}/one.txt;{make_mixture(texts)}",
    )
    for spec, message in (
        (unlike_spec, "differ in their tokenizer"),
        (nested_spec, "plain dataset"),
    ):
        with pytest.raises(DataError, match=message):
            check_sources(spec)
        with pytest.raises(DataError, match=message):
            prepare(spec, texts / "x", 0.1, 0)
    assert not (texts / "x").exists()


def test_each_source_must_hold_a_row(texts: Path) -> None:
    info = read_info(make_mixture(texts))
    sizes = [sum(s.tokens for s in shards) for shards in info.shards_by_source("held_out")]
    assert [a for a, b in pairwise(sizes) if a < b] or min(sizes) < max(sizes)
    check_split_lengths(info, min(sizes) - 1)
    with pytest.raises(DataError, match="shorter than one row") as error_info:
        check_split_lengths(info, min(sizes))
    assert f"data.sequence={min(sizes) - 1}" in str(error_info.value)
