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

from cordee.data.dataset import CHECKSUM_BLOCK_BYTES, open_dataset, write_checksums
from cordee.data.manifest import compute_fingerprint, list_changed_sources, read_info
from cordee.data.prepare import check_sources, prepare, verify_dataset
from cordee.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve documents of unlike length in nested folders, with things among them to skip."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "texts"
    for number in range(12):
        path = folder / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.integers(32, 127, 700 + 400 * number, dtype=np.uint8).tobytes())
    (folder / ".hidden").write_text("not this")
    (folder / ".git").mkdir()
    (folder / ".git" / "inside").write_text("nor this")
    (folder / "picture.bin").write_bytes(b"some\0bytes")
    (folder / "empty.txt").touch()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "twice.txt").symlink_to("part0/00.txt")
    return folder


def load_split_tokens(folder: Path, split: str) -> np.ndarray:
    """The tokens of a split by another reader than ours: the safetensors library."""
    shards = read_info(folder).splits[split].shards
    parts = [load_file(folder / shard.file)["tokens"] for shard in shards]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- preparing -----------------------------------------------------------------------------------


def test_a_folder_becomes_whole_documents(texts: Path, tmp_path: Path) -> None:
    info = prepare(str(texts), tmp_path / "data", held_out=0.2, seed=3, shard_bytes=5000)
    assert info == read_info(tmp_path / "data")
    skip_counts = {reason: count for reason, count in info.skipped.items() if count}
    assert skip_counts == {"hidden": 2, "binary": 1, "empty": 1, "special": 1, "duplicate": 1}
    originals = {path.read_bytes() for path in texts.glob("part*/*.txt")}
    pieces_by_split = {}
    for split in ("train", "held_out"):
        pieces = load_split_tokens(tmp_path / "data", split).tobytes().split(b"\0")
        assert pieces.pop() == b"", "the last document ends with its 0 byte"
        assert info.splits[split].tokens == sum(len(piece) + 1 for piece in pieces)
        assert sum(shard.documents for shard in info.splits[split].shards) == len(pieces)
        pieces_by_split[split] = set(pieces)
    assert pieces_by_split["train"] | pieces_by_split["held_out"] == originals
    assert not pieces_by_split["train"] & pieces_by_split["held_out"]
    total = sum(len(piece) for piece in originals)
    assert 0.2 <= sum(len(piece) for piece in pieces_by_split["held_out"]) / total <= 0.3
    assert len(info.splits["train"].shards) > 3
    assert verify_dataset(tmp_path / "data")["documents"] == 12


def test_the_split_depends_on_names_and_seed_only(texts: Path, tmp_path: Path) -> None:
    first_info = prepare(str(texts), tmp_path / "a", held_out=0.2, seed=3)
    new_folder = texts.rename(tmp_path / "elsewhere").rename(tmp_path / "texts")
    second_info = prepare(str(new_folder), tmp_path / "b", held_out=0.2, seed=3)
    other_info = prepare(str(new_folder), tmp_path / "c", held_out=0.2, seed=4)
    assert first_info.fingerprint == second_info.fingerprint != other_info.fingerprint
    assert first_info.splits["held_out"] != other_info.splits["held_out"]


def test_one_huge_document_is_not_held_out(texts: Path, tmp_path: Path) -> None:
    (texts / "huge.txt").write_text("x" * 100_000)
    for seed in range(20):
        info = prepare(str(texts), tmp_path / f"data{seed}", held_out=0.1, seed=seed)
        share = info.splits["held_out"].tokens / 140_000
        assert 0.02 < share < 0.2, seed


def test_lists_globs_and_a_comma_in_a_name(texts: Path, tmp_path: Path) -> None:
    comma_path = tmp_path / "a,b.txt"
    comma_path.write_text("comma")
    pattern = f"{texts}/**/0[0-3].txt"
    info = prepare(f"{texts}/part2/11.txt, {pattern}", tmp_path / "list", held_out=0, seed=0)
    names = [Path(source.path).name for source in info.sources]
    assert names == ["11.txt", "00.txt", "03.txt", "01.txt", "02.txt"]
    assert prepare(str(comma_path), tmp_path / "odd", held_out=0, seed=0).sources[0].bytes == 5


def test_a_dataset_is_returned_as_it_is(texts: Path, tmp_path: Path) -> None:
    info = prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    files_before = read_files(tmp_path / "data")
    check_sources(str(tmp_path / "data"))
    assert prepare(str(tmp_path / "data"), tmp_path / "new", held_out=0.5, seed=9) == info
    assert read_files(tmp_path / "data") == files_before and not (tmp_path / "new").exists()


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
    assert read_files(tmp_path / "0") == read_files(tmp_path / "1")


def test_nothing_is_replaced(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    files_before = read_files(tmp_path / "data")
    with pytest.raises(DataError, match=r"use it: data\.path="):
        prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    with pytest.raises(DataError, match="would replace"):
        prepare(str(texts), texts, held_out=0.1, seed=3)
    assert read_files(tmp_path / "data") == files_before


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
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "cannot be written" in result.stdout and "too large" in result.stdout.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message", "fix"),
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
    texts: Path, tmp_path: Path, spec: str, message: str, fix: str
) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "nul").write_bytes(b"\0")
    os.mkfifo(tmp_path / "pipe")
    for attempt in (
        check_sources,
        lambda path: prepare(path, tmp_path / "data", held_out=0.1, seed=0),
    ):
        with pytest.raises(DataError) as error_info:
            attempt(spec.format(tmp_path))
        assert message in error_info.value.message and error_info.value.exit_code == 2
        assert fix.format(tmp_path) in (error_info.value.fix or "")
        assert error_info.value.values["data.path"]
    assert not list(tmp_path.glob("*data*"))


@pytest.mark.parametrize(
    ("invalid_values", "message"),
    [({"held_out": 1.0}, "held-out"), ({"held_out": -0.1}, "held-out"), ({"tokens": 9}, "markov")],
)
def test_impossible_wishes_are_refused(
    texts: Path, tmp_path: Path, invalid_values: dict, message: str
) -> None:
    arguments = {"held_out": 0.1, "seed": 0, **invalid_values}
    with pytest.raises(DataError, match=message):
        prepare(str(texts), tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


# --- integrity -----------------------------------------------------------------------------------


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_200_of_200_flipped_bits_are_found_and_named(tmp_path: Path) -> None:
    size = 2 * CHECKSUM_BLOCK_BYTES + 12_345
    text = np.random.default_rng(0).integers(32, 127, size, dtype=np.uint8).tobytes()
    (tmp_path / "text.txt").write_bytes(text)
    folder = tmp_path / "data"
    # The second shard is the small one, so that most trials are quick.
    prepare(str(tmp_path / "text.txt"), folder, held_out=0, seed=0, shard_bytes=size - 9000)
    shards = sorted(folder.glob("train-*.safetensors"))
    assert len(shards) == 2
    rng = np.random.default_rng(1)
    for trial in range(200):
        shard = shards[0] if trial < 20 else shards[1]
        byte, bit = int(rng.integers(shard.stat().st_size)), int(rng.integers(8))
        flip(shard, byte, bit)
        with pytest.raises(DataError, match="damaged") as error_info:
            open_dataset(folder, "train")
        flip(shard, byte, bit)
        assert error_info.value.values["file"] == str(shard)
        assert error_info.value.values["block"] == byte // CHECKSUM_BLOCK_BYTES
    verify_dataset(folder)


def test_flips_and_cuts_elsewhere_are_found(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(str(texts), folder, held_out=0.2, seed=3, shard_bytes=9000)
    checksum_path = folder / "train-00001.safetensors.sums"
    for byte in range(checksum_path.stat().st_size):
        flip(checksum_path, byte, byte % 6)
        with pytest.raises(DataError) as error_info:
            open_dataset(folder, "train")
        assert Path(str(error_info.value.values["file"])).name.startswith("train-00001")
        flip(checksum_path, byte, byte % 6)
    manifest = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(manifest.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(DataError, match="fingerprint"):
        read_info(folder)
    (folder / "dataset.json").write_text(manifest[:-100])
    with pytest.raises(DataError, match="damaged or of another format"):
        read_info(folder)
    (folder / "dataset.json").write_text(manifest)
    shard = folder / "train-00000.safetensors"
    shard_content = shard.read_bytes()
    for length in (0, 5, 100, len(shard_content) - 1):
        shard.write_bytes(shard_content[:length])
        for is_verified in (True, False):
            with pytest.raises(DataError) as error_info:
                open_dataset(folder, "train", verify=is_verified)
            assert error_info.value.values["file"] == str(shard)
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
    manifest["splits"]["train"]["shards"][0]["xxh3_128"] = write_checksums(shard)
    manifest["fingerprint"] = compute_fingerprint(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    open_dataset(folder, "train")
    with pytest.raises(DataError, match="does not end with the token"):
        verify_dataset(folder)


def test_changed_sources_are_named(texts: Path, tmp_path: Path) -> None:
    info = prepare(str(texts), tmp_path / "data", held_out=0.1, seed=3)
    assert list_changed_sources(info) == []
    touched_path, vanished_path = texts / "part0" / "03.txt", texts / "part2" / "05.txt"
    os.utime(touched_path, ns=(1, 1))
    vanished_path.unlink()
    assert sorted(list_changed_sources(info)) == [str(touched_path), str(vanished_path)]


def test_small_shards_on_disk_read_like_one(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts), tmp_path / "many", held_out=0.2, seed=3, shard_bytes=333)
    prepare(str(texts), tmp_path / "one", held_out=0.2, seed=3)
    for split in ("train", "held_out"):
        small_shards, single_shard = (
            open_dataset(tmp_path / "many", split),
            open_dataset(tmp_path / "one", split),
        )
        ids = np.random.default_rng(0).permutation(single_shard.rows(100))
        assert np.array_equal(small_shards.gather(ids, 100), single_shard.gather(ids, 100))
        assert np.array_equal(
            small_shards.read_tokens(0, small_shards.tokens),
            load_split_tokens(tmp_path / "one", split),
        )
    assert verify_dataset(tmp_path / "many")["documents"] == 12
