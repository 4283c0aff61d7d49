"""Nothing of the user's is removed, replaced or taken for the run's; paths, texts of any form.

In one process; runs are two steps long. Not here: what a dataset folder is (test_data_folder.py).
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.begin import LOCK_FILE, find_data, get_ready, lay_out_data, locked, settle
from cordee.checkpoint.save import _remove
from cordee.cli.arguments import parser, read
from cordee.cli.main import main
from cordee.config.load import dump, load, override, read_toml
from cordee.config.paths import free_name, home_of_each
from cordee.config.run import Run
from cordee.data.builtin import _matches
from cordee.data.manifest import changed_sources, is_dataset, read_info
from cordee.data.prepare import prepare
from cordee.data.shards import making
from cordee.data.snapshot import MARKER, read_marker, remove, state_of
from cordee.errors import ConfigError, DataError
from cordee.fault.witness import FileWitness, Slate
from cordee.metrics.sinks import write_whole
from cordee.model.folder import write_folder
from cordee.train import train as cordee_train
from cordee.trial import losses_at
from tests.conftest import SMALL, TINY

WORDS = (
    *(word for word in SMALL if not word.startswith("data.")), *TINY, "run.steps=2",
    "launch.processes=1", "evaluate.tokens=64", "evaluate.sample=0",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two texts in it."""
    monkeypatch.chdir(tmp_path)
    for name, letters in (("a.txt", "abcdefg \n"), ("b.txt", "hijklmn \n")):
        Path(name).write_text("".join(letters[i * i % 9] for i in range(6000)))
    return tmp_path


def run_of(*words: str) -> Run:
    return settle(load(None, (*WORDS, *words)).run)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder with its content, and every folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        link = os.readlink(path) if path.is_symlink() else ""
        found[name] = link or ("folder" if path.is_dir() else path.read_bytes())
    return found


def refused(*words: str) -> str:
    """What `cordee train` is refused with; the tree here is as it was."""
    before = tree(Path())
    with pytest.raises((ConfigError, DataError)) as raised:
        run = run_of(*words)
        get_ready(run)
        with locked(run):
            lay_out_data(run)
    assert raised.value.exit_code == 2 and raised.value.fix
    assert tree(Path()) == before
    return str(raised.value)


# --- the run's snapshot --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["text", "dataset", "copy", "file", "link", "added", "changed", "restored"]
)
def test_data_of_the_user_in_the_runs_folder_stays_and_is_not_used(
    content: str, here: Path
) -> None:
    place = Path("p/data")
    place.parent.mkdir()
    if content == "text":
        place.mkdir()
        shutil.copy("a.txt", place)
    elif content == "dataset":
        prepare("a.txt", place, 0.1, 0)
    elif content == "file":
        place.write_text("mine")
    else:
        lay_out_data(run_of("run.dir=r", "data.path=a.txt"))
        if content == "link":
            place.symlink_to("../r/data")
        elif content == "copy":
            shutil.copytree("r/data", place)
        else:
            Path("r").rename("gone")
            lay_out_data(run_of("run.dir=p", "data.path=a.txt"))
            if content == "restored":  # from a copy: no longer the folder that the run made
                place.rename("aside")
                shutil.copytree("aside", place)
                refused("run.dir=p", "data.path=b.txt")
                return
            name = "notes.txt" if content == "added" else "train-00000.safetensors"
            (place / name).write_text("mine")
    for data in ("b.txt", "p/data/a.txt"):
        if Path(data).exists():
            assert "data.path" in refused("run.dir=p", f"data.path={data}")


def test_data_that_is_no_dataset_does_not_disturb_a_prepared_one(here: Path) -> None:
    prepare("a.txt", Path("data/shards"), 0.1, 0)
    before = tree(here)
    assert lay_out_data(run_of("run.dir=.", "data.path=data/shards")).folder == Path("data/shards")
    # ... and the run's own place may be what is named.
    Path("p").mkdir()
    Path("data/shards").rename("p/data")
    assert lay_out_data(run_of("run.dir=p", "data.path=p/data")).folder == Path("p/data")
    assert len(tree(here)) == len(before) + 1


@pytest.mark.parametrize(
    "change",
    ["data.path=b.txt", "run.seed=3", "data.held_out=0.3", "data.path=a.txt;b.txt",
     "data.path=shards"],
)  # fmt: skip
def test_a_snapshot_of_a_start_that_died_is_made_anew_when_other_data_is_asked(
    change: str, here: Path
) -> None:
    prepare("b.txt", Path("shards"), 0.1, 0)
    asked = ("run.dir=r", "data.path=a.txt")
    first = lay_out_data(run_of(*asked))
    assert lay_out_data(run_of(*asked)).fingerprint == first.fingerprint
    run = run_of(*asked, change)
    assert find_data(run) is None
    second = lay_out_data(run)
    assert second.fingerprint != first.fingerprint
    alone = prepare(
        run.data.path, Path("alone"), run.data.held_out, run.run.seed, weights=run.data.weights
    )
    assert second.fingerprint == alone.fingerprint
    assert find_data(run) == second.folder
    assert is_dataset(Path("r/data")) is (change != "data.path=shards")
    assert not [name for name in os.listdir("r") if name.startswith(".")]


@pytest.mark.parametrize("change", ["content", "file"])
def test_sources_that_changed_before_the_first_step_are_read_again(change: str, here: Path) -> None:
    Path("texts").mkdir()
    shutil.copy("a.txt", "texts")
    run = run_of("run.dir=r", "data.path=texts")
    first = lay_out_data(run)
    if change == "content":
        Path("texts/a.txt").write_text("another text " * 500)
    else:
        shutil.copy("b.txt", "texts")
    second = lay_out_data(run)
    assert second.fingerprint != first.fingerprint and not changed_sources(second)


def test_what_cannot_be_used_leaves_the_former_snapshot_and_nothing_else(here: Path) -> None:
    lay_out_data(run_of("run.dir=r", "data.path=a.txt"))
    refused("run.dir=r", "data.path=b.txt", "data.sequence=90000")
    refused("run.dir=new/deep/run", "data.path=b.txt", "data.sequence=90000")
    Path("empty").mkdir()
    refused("run.dir=empty", "data.path=b.txt", "data.sequence=90000")


def test_a_run_of_an_older_version_goes_on(here: Path) -> None:
    words = ("train", *WORDS, "run.dir=r", "data.path=a.txt", "checkpoint.every=1")
    assert main(words) == 0
    (Path("r/data") / MARKER).unlink()
    before = read_info(Path("r/data"))
    Path("a.txt").unlink()
    run = run_of("run.dir=r", "data.path=a.txt")
    assert find_data(run) == Path("r/data") and lay_out_data(run) == before


def test_a_run_toml_alone_does_not_make_data_the_runs(here: Path) -> None:
    prepare("a.txt", Path("p/data"), 0.1, 0)
    run = run_of("run.dir=p", "data.path=b.txt")
    Path("p/run.toml").write_text(dump(run))
    with pytest.raises(DataError):
        get_ready(run)


def test_a_removal_that_was_cut_short_is_finished(here: Path) -> None:
    run = run_of("run.dir=r", "data.path=a.txt;b.txt")
    lay_out_data(run)
    place = Path("r/data")
    assert state_of(place, run) == "same"
    (place / "dataset.json").unlink()
    for file in (place / "0").iterdir():
        file.unlink()
    assert state_of(place, run) == "own"
    remove(place)
    assert not place.exists()


@pytest.mark.parametrize("spoil", ["not JSON", "altered", "another version", "a folder"])
def test_a_marker_that_is_not_what_was_written_proves_nothing(spoil: str, here: Path) -> None:
    run = run_of("run.dir=r", "data.path=a.txt")
    lay_out_data(run)
    marker = Path("r/data") / MARKER
    text = marker.read_text()
    marker.unlink()
    if spoil == "a folder":
        marker.mkdir()
    else:
        altered = text.replace('"held_out": 0.1', '"held_out": 0.2')
        other = text.replace("snapshot-1", "snapshot-2")
        marker.write_text({"not JSON": "[" * 9, "altered": altered}.get(spoil, other))
    assert read_marker(Path("r/data")) is None
    refused("run.dir=r", "data.path=a.txt")


def test_a_learning_rate_is_searched_on_the_runs_own_data_under_its_lock(here: Path) -> None:
    run = run_of("run.dir=r", "data.path=a.txt")
    losses_at(run, [0.01], seed=7)
    assert find_data(run) == Path("r/data") and read_info(Path("r/data")).seed == 0
    os.utime("a.txt", (1, 1))  # so that it would be made anew
    with locked(run), pytest.raises(ConfigError, match="another process"):
        losses_at(run, [0.01], seed=7)


# --- other files in the run's folder -------------------------------------------------------------


@pytest.mark.parametrize("name", [LOCK_FILE, "plan.json", "events.jsonl", "layers.jsonl"])
def test_files_of_the_user_called_as_a_runs_are(name: str, here: Path) -> None:
    Path("p").mkdir()
    (Path("p") / name).write_text("mine, not yours\n")
    assert name in refused("run.dir=p", "data.path=a.txt")
    assert "p-2" in refused("run.dir=p", "data.path=a.txt")


def test_a_search_does_not_replace_a_file_of_the_user(here: Path) -> None:
    for name in ("lr.json", "lr.png"):
        Path(name).write_text("{}")
        assert main(["lr", *WORDS, "run.dir=.", "data.path=a.txt"]) == 2
        assert Path(name).read_text() == "{}"
        Path(name).unlink()


def test_temporary_names_are_nobody_elses(here: Path) -> None:
    for name in ("x.part", f".x.{os.getpid()}.part", "members.json.new", ".d.part"):
        Path(name).write_text("mine")
    before = tree(here)
    write_whole(Path("x"), b"whole")
    assert FileWitness(Path("members.json")).promise(1, "me", ["me"]) is not None
    assert Slate.from_json(json.loads(Path("members.json").read_text())).number == 1
    with making(Path("d")) as place:
        (place / "file").touch()
    after = tree(here)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"x", "members.json", "members.json.lock", "d", "d/file"}
    long = Path("é" * 127)
    assert len(os.fsencode(free_name(long).name)) <= 255
    write_whole(long, b"whole")


def test_files_of_the_user_in_a_checkpoint_stay(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001.g1"
    for names, stays in ((("notes.txt", "rank-00000.bak"), True), ((), False)):
        folder.mkdir(exist_ok=True)
        for name in ("manifest.json", "rank-00000.safetensors", "rank-00001.json.tmp", *names):
            (folder / name).touch()
        assert _remove(folder)
        assert folder.exists() is stays
        assert sorted(os.listdir(folder) if stays else ()) == sorted(names)
        shutil.rmtree(folder, ignore_errors=True)


# --- verbs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder is called as sweeps call theirs, on data with such a name."""
    folder = tmp_path_factory.mktemp("sweep")
    data = folder / "x=1,y.txt"
    data.write_text("some text of some length\n" * 300)
    model = ("model.mlp=gated", "model.logit_cap=0", "model.window=0")
    words = (f"run.dir={folder}/runs/optim.lr=0.01", f"data.path={data}", *model)
    assert main(["train", *WORDS, *words, "evaluate.sample=8"]) == 0
    return folder


@pytest.mark.parametrize("verb", ["report", "fingerprint", "sample", "export", "data ledger"])
@pytest.mark.parametrize("word", ["runs/optim.lr=0.01", "optim.lr=0.01", "~/runs/optim.lr=0.01"])
def test_verbs_take_any_name(
    verb: str, word: str, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep)
    monkeypatch.setenv("HOME", str(sweep))
    flags = ["--tokens", "2", "--prompt", "a=b"] if verb == "sample" else []
    assert main([*verb.split(), word, *flags]) == 0


@pytest.mark.parametrize(
    "words", [("report",), ("export",), ("export", "--to", "hf"), ("plan", "small")]
)
def test_an_output_replaces_only_what_the_same_verb_wrote(
    words: tuple[str, ...], sweep: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    verb, *more = [words[0], str(sweep / "runs/optim.lr=0.01"), *words[1:]]
    if verb == "plan":
        more = ["small", "launch.processes=1", "batch.microbatches=4"]
    flag = "--save" if verb == "plan" else "--output"
    Path("mine.part").mkdir()
    shutil.copy("a.txt", "mine.part/kept.txt")
    Path("folder").mkdir()
    shutil.copy("a.txt", "folder")
    Path("link").symlink_to("a.txt")
    before = tree(here)
    for target in ("a.txt", "folder", "link", "~/b.txt"):
        assert main([verb, *more, flag, target]) == 2
        assert tree(here) == before
    assert main([verb, *more, flag, "mine"]) == 0
    assert {k: v for k, v in tree(here).items() if not k.startswith("mine/")} == {
        **before, "mine": tree(here)["mine"],
    }  # fmt: skip
    again = main([verb, *more, flag, "mine"])
    assert again == (2 if "hf" in more else 0)


def test_an_export_that_fails_leaves_what_was_there(here: Path) -> None:
    Path("x.part").mkdir()
    shutil.copy("a.txt", "x.part")
    before = tree(here)

    def failing(name: str) -> Any:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left"):
        write_folder(Path("x"), {}, {"w": (2,)}, failing, 10)
    assert tree(here) == before


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("optim.lr=0.1", "override"), ("data.path=a=b/c.toml", "override"), ("lr=0.1", "override"),
        ("optim.lrr=1", "override"), ("runs/lr=0.1/run.toml", "file"), ("mine.toml", "file"),
        ("./optim.lr=0.1.toml", "file"), ("lr=0.1.toml", "file"), ("data.path=x.toml", "override"),
        ("no=file.toml", "override"),
    ],
)  # fmt: skip
def test_words_of_train(word: str, kind: str, here: Path) -> None:
    Path("lr=0.1.toml").touch()
    words = read(parser("train", "", ""), [word])
    assert (words.file, words.overrides) == ((word, ()) if kind == "file" else (None, (word,)))


def test_data_is_prepared_from_and_to_any_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    for source in ("k=v.txt", "x.toml", "optim.lr=1", "a,b;c.txt", "line\nend.txt", "~"):
        shutil.copy("a.txt", source)
        target = f"out={source}"
        assert main(["data", "prepare", f"./{source}", target]) == 0
        assert main(["data", "verify", f"~/{target}"]) == 0
    assert main(["data", "prepare", "~/a.txt,~/b.txt", "~/two"]) == 0
    assert len(read_info(Path("two")).sources) == 2
    images = ["model.image.side=8", "model.image.channels=1"]
    assert main(["data", "prepare", "builtin:shapes", "shapes", "--tokens", "50", *images]) == 0
    assert main(["data", "prepare", "a.txt", "no", "data.held_out=0.5"]) == 2


# --- what a run.toml holds -----------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_a_run_toml(text: str) -> None:
    run = override(Run(), {"run.name": text, "data.path": text})
    plain = tomllib.loads(dump(run))
    assert (plain["run"]["name"], plain["data"]["path"]) == (text, text)


def test_a_run_toml_is_read_as_it_was_written(here: Path) -> None:
    for text in ("a\nb", " a ", "\t\r\x7f\x00", '"\\u0041"', "x='y'#"):
        Path("run.toml").write_text(dump(override(Run(), {"run.name": text})))
        assert load("run.toml").run.run.name == text
        assert load(None, [f"run.name={text}"]).run.run.name == text


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9.txt"), "a\0b"])
@pytest.mark.parametrize("key", ["run.dir", "data.path", "run.name", "launch.secret"])
def test_what_a_run_toml_cannot_hold_is_refused(key: str, text: str, here: Path) -> None:
    assert key in refused("data.path=a.txt", "run.dir=r", f"{key}={text}")


def test_a_folder_whose_name_is_too_long_is_refused(here: Path) -> None:
    assert "too long" in refused("data.path=a.txt", f"run.dir={'x' * 300}")


def test_files_without_a_name_in_utf8_are_read(here: Path) -> None:
    Path("texts").mkdir()
    shutil.copy("a.txt", b"texts/caf\xe9.txt")
    info = lay_out_data(run_of("run.dir=r", "data.path=texts"))
    assert not changed_sources(info) and find_data(run_of("run.dir=r", "data.path=texts"))


# --- home folders, marks, links ------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_in_every_key(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    keys = ("run.dir", "launch.secret", "model.hub", "initial.weights", "data.path")
    Path("file.toml").write_text(
        "\n".join(f'{key} = "~/x"' for key in keys).replace("hub", '"hub"')
    )
    for loaded in (load(None, [f"{key}=~/x" for key in keys]), load("file.toml")):
        run = loaded.run
        found = (
            run.run.dir, run.launch.secret, run.model.hub, run.initial.weights, run.data.path
        )  # fmt: skip
        assert found == (str(here / "home/x"),) * 5
    assert settle(override(Run(), {"run.dir": "~/y"})).run.dir == str(here / "home/y")
    home = str(here / "home")
    assert home_of_each("~/a, ~/b;~/c") == f"{home}/a, {home}/b;{home}/c"
    assert home_of_each("records:~/a,~/b") == f"records:{home}/a,{home}/b"
    assert home_of_each("x~,a/~/b,~nobody-has-this-name/c") == "x~,a/~/b,~nobody-has-this-name/c"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(codecs.BOM_UTF8, "utf-8"), (b"", "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
     (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le")],
)  # fmt: skip
def test_marks_of_encodings(mark: bytes, encoding: str, here: Path) -> None:
    wide = encoding != "utf-8"
    Path("file.toml").write_bytes(mark + "[run]\r\nsteps = 5\r\n".encode(encoding))
    Path("texts").mkdir()
    text = "日本語の文。" * 300
    Path("texts/t.txt").write_bytes(mark + text.encode(encoding))
    shutil.copy("a.txt", "texts")
    info = prepare("texts", Path("both"), 0.0, 0)
    assert sum(n for reason, n in info.skipped.items() if reason.startswith("utf")) == wide
    if wide:
        with pytest.raises(ConfigError, match=encoding[:6].upper()):
            read_toml(Path("file.toml"))
        with pytest.raises(DataError, match="byte order mark"):
            prepare("texts/t.txt", Path("one"), 0.0, 0)
        return
    assert read_toml(Path("file.toml")) == {"run": {"steps": 5}}
    # The mark is no part of the text, but the file has the size that it has.
    plain = prepare("texts/t.txt", Path("one"), 0.25, 0)
    assert sum(split.tokens for split in plain.splits.values()) == len(text.encode()) + 2
    assert not changed_sources(plain)


def test_bytes_that_begin_like_a_mark_are_data(here: Path) -> None:
    Path("odd.txt").write_bytes(codecs.BOM_UTF16_LE + b"\xd8" * 801)
    assert prepare("odd.txt", Path("odd"), 0.0, 0).splits["train"].tokens == 804


def test_a_link_to_a_folder_is_counted_or_followed_where_it_is_named(here: Path) -> None:
    for name, text in (("real", "a.txt"), ("top", "b.txt")):
        Path(name).mkdir()
        shutil.copy(text, name)
    Path("top/more").symlink_to("../real")
    Path("top/round").symlink_to(".")
    Path("top/c.txt").symlink_to("../a.txt")
    folder = prepare("top", Path("one"), 0.1, 0)
    assert len(folder.sources) == 2 and folder.skipped["link"] == 2
    assert len(prepare("top/more", Path("two"), 0.1, 0).sources) == 1


def test_patterns_are_the_librarys_without_its_circles(here: Path) -> None:
    for folder in ("t/one/two", "t/.hidden", "t/[x]", "real/deep"):
        Path(folder).mkdir(parents=True)
        for name in ("a.txt", ".b.txt", "c.md"):
            (Path(folder) / name).write_text(folder + name)
    Path("t/link").symlink_to("../real")
    folder = f"{here}/t"
    patterns = ("**", "**/*", "**/*.txt", "**/one/**", "one/**/a.*", "**/[x]/*", "*/a.txt", "**/**")
    for pattern in [*patterns, *(f"t/{p}" for p in patterns), *(f"{folder}/{p}" for p in patterns)]:
        theirs = {p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
        assert {p for p in _matches(pattern) if os.path.isfile(p)} == theirs, pattern
    for name in ("round", "again", "one/up"):
        (Path("t") / name).symlink_to(here / "t")
    assert len(prepare("t/**/*.txt", Path("set"), 0.1, 0).sources) == 3


def test_a_run_in_linked_folders(here: Path) -> None:
    for name in ("disk", "big", "r"):
        Path(name).mkdir()
    Path("run").symlink_to("disk")
    Path("disk/data").symlink_to("../big")  # empty: to be filled
    first = lay_out_data(run_of("run.dir=run", "data.path=a.txt"))
    assert is_dataset(Path("big"))
    second = lay_out_data(run_of("run.dir=run", "data.path=b.txt"))
    assert second.fingerprint != first.fingerprint and is_dataset(Path("big"))
    assert Path("disk/data").is_symlink() and Path("run").is_symlink()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_began_before_the_lock_was_taken_is_seen(
    processes: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("run.dir=r", "data.path=a.txt", f"launch.processes={processes}")
    other = override(run, {"optim.lr": 0.5})

    def takes(*_: object) -> None:
        Path("r").mkdir()
        Path("r/run.toml").write_text(dump(other))

    # The last thing before the lock, in either way.
    monkeypatch.setattr("cordee.begin.resolve", takes)
    with pytest.raises(ConfigError, match="another run"):
        cordee_train(run)
    assert sorted(os.listdir("r")) == ["lock", "run.toml"]
