"""The dataset folder: whole documents, the same everywhere, refused when wrong, checked to the bit.

Not here: rows and tensors (test_data.py). Traded away: large files; shards are made small instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cordee.data.manifest import changed_sources, fingerprint_of, read_info
from cordee.data.prepare import prepare, resolve, verify
from cordee.data.source import SUM_BLOCK_BYTES, open_dataset, write_sums
from cordee.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve documents of unlike length in nested folders, with things among them to skip."""
    random = np.random.default_rng(0)
    folder = tmp_path / "texts"
    for number in range(12):
        path = folder / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.integers(32, 127, 700 + 400 * number, dtype=np.uint8).tobytes())
    (folder / ".hidden").write_text("not this")
    (folder / ".git").mkdir()
    (folder / ".git" / "inside").write_text("nor this")
    (folder / "picture.bin").write_bytes(b"some\0bytes")
    (folder / "empty.txt").touch()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "twice.txt").symlink_to("part0/00.txt")
    return folder


def stream(folder: Path, split: str) -> np.ndarray:
    """The tokens of a split by another reader than ours: the safetensors library."""
    shards = read_info(folder).splits[split].shards
    parts = [load_file(folder / shard.file)["tokens"] for shard in shards]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- preparing -----------------------------------------------------------------------------------


def test_a_folder_becomes_whole_documents(texts: Path, tmp_path: Path) -> None:
    info = prepare(str(texts), tmp_path / "data", held_out=0.2, seed=3, shard_bytes=5000)
    assert info == read_info(tmp_path / "data")
    left_out = {reason: count for reason, count in info.skipped.items() if count}
    assert left_out == {"hidden": 2, "binary": 1, "empty": 1, "special": 1, "duplicate": 1}
    originals = {path.read_bytes() for path in texts.glob("part*/*.txt")}
    found = {}
    for split in ("train", "held_out"):
        pieces = stream(tmp_path / "data", split).tobytes().split(b"\0")
        assert pieces.pop() == b"", "the last document ends with its 0 byte"
        assert info.splits[split].tokens == sum(len(piece) + 1 for piece in pieces)
        assert sum(shard.documents for shard in info.splits[split].shards) == len(pieces)
        found[split] = set(pieces)
    assert found["train"] | found["held_out"] == originals
    assert not found["train"] & found["held_out"]
    total = sum(len(piece) for piece in originals)
    assert 0.2 <= sum(len(piece) for piece in found["held_out"]) / total <= 0.3
    assert len(info.splits["train"].shards) > 3
    assert verify(tmp_path / "data")["documents"] == 12


def test_the_split_depends_on_names_and_seed_only(texts: Path, tmp_path: Path) -> None:
    first = prepare(str(texts), tmp_path / "a", held_out=0.2, seed=3)
    moved = texts.rename(tmp_path / "elsewhere").rename(tmp_path / "texts")
    again = prepare(str(moved), tmp_path / "b", held_out=0.2, seed=3)
    other = prepare(str(moved), tmp_path / "c", held_out=0.2, seed=4)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.splits["held_out"] != other.splits["held_out"]


def test_one_huge_document_is_not_held_out(texts: Path, tmp_path: Path) -> None:
    (texts / "huge.txt").write_text("x" * 100_000)
    for seed in range(20):
        info = prepare(str(texts), tmp_path / f"data{seed}", held_out=0.1, seed=seed)
        share = info.splits["held_out"].tokens / 140_000
        assert 0.02 < share < 0.2, seed


def test_lists_globs_and_a_comma_in_a_name(texts: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a,b.txt"
    odd.write_text("comma")
    glob = f"{texts}/**/0[0-3].txt"
    info = prepare(f"{texts}/part2/11.txt, {glob}", tmp_path / "list", held_out=0, seed=0)
    names = [Path(source.path).name for source in info.sources]
    assert names == ["11.txt", "00.txt", "03.txt", "01.txt", "02.txt"]
    assert prepare(str(odd), tmp_path / "odd", held_out=0, seed=0).sources[0].bytes == 5


def test_a_dataset_is_returned_as_it_is(texts: Path, tmp_path: Path) -> None:
    made = prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    before = content(tmp_path / "data")
    resolve(str(tmp_path / "data"))
    assert prepare(str(tmp_path / "data"), tmp_path / "new", held_out=0.5, seed=9) == made
    assert content(tmp_path / "data") == before and not (tmp_path / "new").exists()


def test_the_same_bytes_whatever_the_hash_seed(texts: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cordee.data.prepare import prepare; "
        "prepare(sys.argv[1], Path(sys.argv[2]), held_out=0.2, seed=3, shard_bytes=4000)"
    )
    for seed in ("0", "1"):
        subprocess.run(
            [sys.executable, "-c", script, str(texts), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            check=True,
        )
    assert content(tmp_path / "0") == content(tmp_path / "1")


def test_nothing_is_replaced(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    before = content(tmp_path / "data")
    with pytest.raises(DataError, match=r"use it: data\.path="):
        prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    with pytest.raises(DataError, match="would replace"):
        prepare(str(texts), texts, held_out=0.1, seed=3)
    assert content(tmp_path / "data") == before


def test_a_full_disk_is_told_and_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk; the error is the house's, exit code 2."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from cordee.data.prepare import prepare; from cordee.errors import DataError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: prepare(sys.argv[1], Path(sys.argv[2]), held_out=0.2, seed=3)\n"
        "except DataError as error: print(error); sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", script, str(texts), str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stdout and "too large" in done.stdout.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "what", "fix"),
    [
        ("builtin:stdlb", "no such builtin", "data.path=builtin:stdlib"),
        ("bultin:markov", "no such file", "data.path=builtin:markov"),
        ("{0}/textz/part0", "no such file", "data.path={0}/texts/part0"),
        ("{0}/texts/part0/00.tx", "no such file", "data.path={0}/texts/part0/00.txt"),
        ("{0}/texts/*.md", "no file matches", "data.path=builtin:stdlib"),
        ("{0}/texts/empty.txt", "the file is empty", "data.path=builtin:stdlib"),
        ("{0}/texts/picture.bin", "NUL bytes", "a text file"),
        ("{0}/void", "no text to read", "a file or folder with text"),
        ("{0}/pipe", "neither a file nor a folder", "a file"),
        ("builtin:stdlib,{0}/texts", "stands alone", "data.path=builtin:stdlib"),
        (" , ", "no data is named", "data.path=builtin:stdlib"),
    ],
)
def test_what_cannot_be_read_is_refused(
    texts: Path, tmp_path: Path, spec: str, what: str, fix: str
) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "nul").write_bytes(b"\0")
    os.mkfifo(tmp_path / "pipe")
    for attempt in (
        resolve,
        lambda path: prepare(path, tmp_path / "data", held_out=0.1, seed=0),
    ):
        with pytest.raises(DataError) as caught:
            attempt(spec.format(tmp_path))
        assert what in caught.value.what and caught.value.exit_code == 2
        assert fix.format(tmp_path) in (caught.value.fix or "")
        assert caught.value.values["data.path"]
    assert not list(tmp_path.glob("*data*"))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"held_out": 1.0}, "held-out"), ({"held_out": -0.1}, "held-out"), ({"tokens": 9}, "markov")],
)
def test_impossible_wishes_are_refused(texts: Path, tmp_path: Path, wrong: dict, what: str) -> None:
    wishes = {"held_out": 0.1, "seed": 0, **wrong}
    with pytest.raises(DataError, match=what):
        prepare(str(texts), tmp_path / "data", **wishes)
    assert not (tmp_path / "data").exists()


# --- integrity -----------------------------------------------------------------------------------


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_200_of_200_flipped_bits_are_found_and_named(tmp_path: Path) -> None:
    size = 2 * SUM_BLOCK_BYTES + 12_345
    text = np.random.default_rng(0).integers(32, 127, size, dtype=np.uint8).tobytes()
    (tmp_path / "text.txt").write_bytes(text)
    folder = tmp_path / "data"
    # The second shard is the small one, so that most trials are quick.
    prepare(str(tmp_path / "text.txt"), folder, held_out=0, seed=0, shard_bytes=size - 9000)
    shards = sorted(folder.glob("train-*.safetensors"))
    assert len(shards) == 2
    random = np.random.default_rng(1)
    for trial in range(200):
        shard = shards[0] if trial < 20 else shards[1]
        byte, bit = int(random.integers(shard.stat().st_size)), int(random.integers(8))
        flip(shard, byte, bit)
        with pytest.raises(DataError, match="damaged") as caught:
            open_dataset(folder, "train")
        flip(shard, byte, bit)
        assert caught.value.values["file"] == str(shard)
        assert caught.value.values["block"] == byte // SUM_BLOCK_BYTES
    verify(folder)


def test_flips_and_cuts_elsewhere_are_found(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(str(texts), folder, held_out=0.2, seed=3, shard_bytes=9000)
    sums = folder / "train-00001.safetensors.sums"
    for byte in range(sums.stat().st_size):
        flip(sums, byte, byte % 6)
        with pytest.raises(DataError) as caught:
            open_dataset(folder, "train")
        assert Path(str(caught.value.values["file"])).name.startswith("train-00001")
        flip(sums, byte, byte % 6)
    manifest = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(manifest.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(DataError, match="fingerprint"):
        read_info(folder)
    (folder / "dataset.json").write_text(manifest[:-100])
    with pytest.raises(DataError, match="damaged or of another format"):
        read_info(folder)
    (folder / "dataset.json").write_text(manifest)
    shard = folder / "train-00000.safetensors"
    whole = shard.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        for checked in (True, False):
            with pytest.raises(DataError) as caught:
                open_dataset(folder, "train", verify=checked)
            assert caught.value.values["file"] == str(shard)
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(folder, "train")


def test_verify_finds_a_shard_that_was_written_wrong(texts: Path, tmp_path: Path) -> None:
    """Checksums that fit, content that breaks the rules: a document without its 0 byte."""
    folder = tmp_path / "data"
    info = prepare(str(texts), folder, held_out=0, seed=3)
    shard = folder / info.splits["train"].shards[0].file
    tensors = load_file(shard)
    tensors["tokens"][int(tensors["doc_ends"][0]) - 1] = 65
    save_file(tensors, shard)
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][0]["xxh3_128"] = write_sums(shard)
    manifest["fingerprint"] = fingerprint_of(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    open_dataset(folder, "train")
    with pytest.raises(DataError, match="does not end with the token"):
        verify(folder)


def test_changed_sources_are_named(texts: Path, tmp_path: Path) -> None:
    info = prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    assert changed_sources(info) == []
    touched, vanished = texts / "part0" / "03.txt", texts / "part2" / "05.txt"
    os.utime(touched, ns=(1, 1))
    vanished.unlink()
    assert sorted(changed_sources(info)) == [str(touched), str(vanished)]


def test_small_shards_on_disk_read_like_one(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts), tmp_path / "many", held_out=0.2, seed=3, shard_bytes=333)
    prepare(str(texts), tmp_path / "one", held_out=0.2, seed=3)
    for split in ("train", "held_out"):
        many, one = open_dataset(tmp_path / "many", split), open_dataset(tmp_path / "one", split)
        ids = np.random.default_rng(0).permutation(one.rows(100))
        assert np.array_equal(many.gather(ids, 100), one.gather(ids, 100))
        assert np.array_equal(many.slice(0, many.tokens), stream(tmp_path / "one", split))
    assert verify(tmp_path / "many")["documents"] == 12
