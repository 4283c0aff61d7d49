"""Mixtures as a dataset folder: what is written, what rows hold, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cordee.data.loader import Loader, held_out
from cordee.data.manifest import changed_sources, read_info
from cordee.data.prepare import check_length, inspect, prepare, resolve, verify
from cordee.data.source import TokenSource, open_dataset
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


def spec(texts: Path) -> str:
    return "; ".join(str(texts / name) for name in ("one.txt", "two", "shards"))


def mix(texts: Path, name: str = "mixed", weights: str = "5,3,2") -> Path:
    """The mixture, in shards of 999 tokens, so that rows straddle them."""
    prepare(spec(texts), texts / name, 0.1, 0, shard_bytes=999, weights=weights)
    return texts / name


def slow_rows(source: TokenSource, sizes: list[int]) -> list[list[int]]:
    """Every row, cut from each source's own tokens."""
    found, start = [], 0
    for size in sizes:
        tokens = source.slice(start, start + size).tolist()
        begins = range(0, size - SEQUENCE, SEQUENCE)
        found += [tokens[at : at + SEQUENCE + 1] for at in begins]
        start += size
    return found


def test_rows_are_those_of_each_source_and_none_straddles_two(texts: Path) -> None:
    folder = mix(texts)
    info = read_info(folder)
    sizes = [sum(shard.tokens for shard in shards) for shards in info.shards_of("train")]
    assert len(info.parts) == 3 and len(info.splits["train"].shards) > 6
    source = open_dataset(folder, "train")
    rows = source.gather(np.arange(source.rows(SEQUENCE)), SEQUENCE).tolist()
    assert rows == slow_rows(source, sizes)
    assert info.rows("train", SEQUENCE) == len(rows)
    kinds = [{chr(token) for token in row if token} for row in rows]
    assert all(kind <= set("ab") or kind <= set("cd") or kind <= set("e") for kind in kinds)


def test_a_name_with_a_semicolon_that_exists_is_one_path(texts: Path) -> None:
    (texts / "a;b.txt").write_text("plain" * 100)
    resolve(f"{texts}/a;b.txt")
    assert not prepare(f"{texts}/a;b.txt", texts / "plain", 0.1, 0).parts


def test_a_loader_draws_by_weight(texts: Path) -> None:
    source = open_dataset(mix(texts), "train")
    loader = Loader(source, source.order(3, SEQUENCE, 4, 8), SEQUENCE)
    seen = {"ab": 0, "cd": 0, "e": 0}
    for step in range(128):  # one whole block of the order
        loader.begin(step, range(8))
        for index in range(8):
            for row in loader.microbatch(step, index):
                letters = {chr(token) for token in row.tolist() if token}
                seen[next(kind for kind in seen if letters <= set(kind))] += 1
    assert seen == pytest.approx({"ab": 2048, "cd": 1228.8, "e": 819.2}, abs=1)


def test_evaluation_takes_turns_by_weight(texts: Path) -> None:
    source = open_dataset(mix(texts), "held_out")
    batch = next(held_out(source, SEQUENCE, rows=10))
    letters = ["".join(sorted({chr(token) for token in row.tolist() if token})) for row in batch]
    assert [letters.count(kind) for kind in ("ab", "cd", "e")] == [5, 3, 2]
    every = np.concatenate([b.numpy() for b in held_out(source, SEQUENCE, rows=10)])
    mixture = source.mixture(0, SEQUENCE)
    assert mixture is not None and len(every) == mixture.once < source.rows(SEQUENCE)


def test_what_is_inspected_verified_and_watched(texts: Path) -> None:
    folder = mix(texts)
    known = inspect(folder, SEQUENCE)
    assert [part["share"] for part in known["parts"]] == [0.5, 0.3, 0.2]
    assert sum(part["rows"] for part in known["parts"]) == known["splits"]["train"]["rows"]
    assert verify(folder)["tokens"] == sum(split["tokens"] for split in known["splits"].values())
    assert changed_sources(read_info(folder)) == []
    shard = next((texts / "shards").glob("train-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        verify(folder)
    with pytest.raises(DataError, match="damaged"):
        open_dataset(folder, "train")


def test_weights_are_part_of_what_a_mixture_is(texts: Path) -> None:
    made = [read_info(mix(texts, f"m{n}", w)) for n, w in enumerate(["5,3,2", "0.5,0.3,0.2", ""])]
    assert [part.weight for part in made[0].parts] == [5, 3, 2]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    sizes = [sum(s.tokens for s in shards) for shards in made[2].shards_of("train")]
    by_size = [part.weight / 10_000 for part in made[2].parts]
    assert by_size == pytest.approx([size / sum(sizes) for size in sizes], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "weights", "told"),
    [
        ("{0}/one.txt", "1", "weights are for a mixture"),
        ("{0}/one.txt;", "", "two sources or more"),
        ("{0}/one.txt;{0}/two", "1,2,3", "one for each source"),
        ("{0}/one.txt;{0}/two", "1,x", "one for each source"),
        ("{0}/one.txt;{0}/two", "1,0", "more than 0"),
        ("{0}/one.txt;{0}/two", "1,1000000000", "too fine"),
        ("{0}/one.txt;{0}/nothing", "", "nothing"),
        ("{0}/one.txt;builtin:markov", "", "is of texts"),
        ("{0}/one.txt;records:{0}/one.txt", "", "is of texts"),
    ],
)
def test_what_is_refused_leaves_nothing(texts: Path, words: str, weights: str, told: str) -> None:
    asked: Any = words.format(texts)
    for call in (
        lambda: resolve(asked, weights=weights),
        lambda: prepare(asked, texts / "mixed", 0.1, 0, weights=weights),
    ):
        with pytest.raises(DataError, match=told):
            call()
    assert not [path for path in texts.iterdir() if "mixed" in path.name]


def test_sources_of_unlike_tokens_and_nested_mixtures_are_refused(texts: Path) -> None:
    prepare("builtin:markov", texts / "chain", 0.1, 0, tokens=5000)
    unlike, nested = f"{texts}/one.txt;{texts}/chain", f"{texts}/one.txt;{mix(texts)}"
    for spec, told in ((unlike, "differ in their tokenizer"), (nested, "plain dataset")):
        with pytest.raises(DataError, match=told):
            resolve(spec)
        with pytest.raises(DataError, match=told):
            prepare(spec, texts / "x", 0.1, 0)
    assert not (texts / "x").exists()


def test_each_source_must_hold_a_row(texts: Path) -> None:
    info = read_info(mix(texts))
    sizes = [sum(s.tokens for s in shards) for shards in info.shards_of("held_out")]
    assert [a for a, b in pairwise(sizes) if a < b] or min(sizes) < max(sizes)
    check_length(info, min(sizes) - 1)
    with pytest.raises(DataError, match="shorter than one row") as told:
        check_length(info, min(sizes))
    assert f"data.sequence={min(sizes) - 1}" in str(told.value)
