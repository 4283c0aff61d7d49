"""Nothing of the user's is removed, replaced or taken for the run's; paths, texts of any form.

In one process; runs are two steps long. Not here: what a dataset folder is (test_data_folder.py).
"""

from __future__ import annotations

import codecs
import glob
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cordee
from cordee.checkpoint.checkpointer import _remove_checkpoint
from cordee.cli.arguments import make_parser, parse_arguments
from cordee.cli.main import main
from cordee.config.load import dump, load, override, read_toml
from cordee.config.paths import expand_home_of_each, make_temporary_path
from cordee.config.run import Run
from cordee.data.corpora import _expand_glob
from cordee.data.manifest import is_dataset, list_changed_sources, read_info
from cordee.data.prepare import prepare
from cordee.data.snapshot import MARKER_FILE, classify_snapshot, read_marker, remove_snapshot
from cordee.data.writer import atomic_folder
from cordee.elastic.register import FolderRegister
from cordee.elastic.views import View
from cordee.errors import ConfigError, DataError
from cordee.hf.safetensors_io import write_folder
from cordee.launcher.prepare import (
    LOCK_FILE,
    acquire_run_lock,
    find_dataset_dir,
    prepare_dataset,
    prepare_run,
    resolve_config,
)
from cordee.report.metrics_writer import write_atomically
from cordee.training.lr_trial import measure_losses
from tests.conftest import SMALL, TINY

OVERRIDES = (
    *(word for word in SMALL if not word.startswith("data.")), *TINY, "run.steps=2",
    "launch.processes=1", "evaluate.tokens=64", "evaluate.sample=0",
)  # fmt: skip


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two texts in it."""
    monkeypatch.chdir(tmp_path)
    for name, letters in (("a.txt", "abcdefg \n"), ("b.txt", "hijklmn \n")):
        Path(name).write_text("".join(letters[i * i % 9] for i in range(6000)))
    return tmp_path


def make_run(*overrides: str) -> Run:
    return resolve_config(load(None, (*OVERRIDES, *overrides)).run)


def read_tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder with its content, and every folder."""
    entries: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        link = os.readlink(path) if path.is_symlink() else ""
        entries[name] = link or ("folder" if path.is_dir() else path.read_bytes())
    return entries


def get_refusal(*overrides: str) -> str:
    """What `cordee train` is refused with; the tree here is as it was."""
    tree_before = read_tree(Path())
    with pytest.raises((ConfigError, DataError)) as error_info:
        run = make_run(*overrides)
        prepare_run(run)
        with acquire_run_lock(run):
            prepare_dataset(run)
    assert error_info.value.exit_code == 2 and error_info.value.fix
    assert read_tree(Path()) == tree_before
    return str(error_info.value)


# --- the run's snapshot --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["text", "dataset", "copy", "file", "link", "added", "changed", "restored"]
)
def test_data_of_the_user_in_the_runs_folder_stays_and_is_not_used(
    content: str, work_folder: Path
) -> None:
    data_folder = Path("p/data")
    data_folder.parent.mkdir()
    if content == "text":
        data_folder.mkdir()
        shutil.copy("a.txt", data_folder)
    elif content == "dataset":
        prepare("a.txt", data_folder, 0.1, 0)
    elif content == "file":
        data_folder.write_text("mine")
    else:
        prepare_dataset(make_run("run.dir=r", "data.path=a.txt"))
        if content == "link":
            data_folder.symlink_to("../r/data")
        elif content == "copy":
            shutil.copytree("r/data", data_folder)
        else:
            Path("r").rename("gone")
            prepare_dataset(make_run("run.dir=p", "data.path=a.txt"))
            if content == "restored":  # from a copy: no longer the folder that the run made
                data_folder.rename("aside")
                shutil.copytree("aside", data_folder)
                get_refusal("run.dir=p", "data.path=b.txt")
                return
            name = "notes.txt" if content == "added" else "train-00000.safetensors"
            (data_folder / name).write_text("mine")
    for data in ("b.txt", "p/data/a.txt"):
        if Path(data).exists():
            assert "data.path" in get_refusal("run.dir=p", f"data.path={data}")


def test_data_that_is_no_dataset_does_not_disturb_a_prepared_one(work_folder: Path) -> None:
    prepare("a.txt", Path("data/shards"), 0.1, 0)
    tree_before = read_tree(work_folder)
    assert prepare_dataset(make_run("run.dir=.", "data.path=data/shards")).folder == Path(
        "data/shards"
    )
    # ... and the run's own place may be what is named.
    Path("p").mkdir()
    Path("data/shards").rename("p/data")
    assert prepare_dataset(make_run("run.dir=p", "data.path=p/data")).folder == Path("p/data")
    assert len(read_tree(work_folder)) == len(tree_before) + 1


@pytest.mark.parametrize(
    "change",
    ["data.path=b.txt", "run.seed=3", "data.held_out=0.3", "data.path=a.txt;b.txt",
     "data.path=shards"],
)  # fmt: skip
def test_a_snapshot_of_a_start_that_died_is_made_anew_when_other_data_is_asked(
    change: str, work_folder: Path
) -> None:
    prepare("b.txt", Path("shards"), 0.1, 0)
    overrides = ("run.dir=r", "data.path=a.txt")
    first_info = prepare_dataset(make_run(*overrides))
    assert prepare_dataset(make_run(*overrides)).fingerprint == first_info.fingerprint
    run = make_run(*overrides, change)
    assert find_dataset_dir(run) is None
    second_info = prepare_dataset(run)
    assert second_info.fingerprint != first_info.fingerprint
    separate_info = prepare(
        run.data.path, Path("alone"), run.data.held_out, run.run.seed, weights=run.data.weights
    )
    assert second_info.fingerprint == separate_info.fingerprint
    assert find_dataset_dir(run) == second_info.folder
    assert is_dataset(Path("r/data")) is (change != "data.path=shards")
    assert not [name for name in os.listdir("r") if name.startswith(".")]


@pytest.mark.parametrize("change", ["content", "file"])
def test_sources_that_changed_before_the_first_step_are_read_again(
    change: str, work_folder: Path
) -> None:
    Path("texts").mkdir()
    shutil.copy("a.txt", "texts")
    run = make_run("run.dir=r", "data.path=texts")
    first_info = prepare_dataset(run)
    if change == "content":
        Path("texts/a.txt").write_text("another text " * 500)
    else:
        shutil.copy("b.txt", "texts")
    second_info = prepare_dataset(run)
    assert second_info.fingerprint != first_info.fingerprint and not list_changed_sources(
        second_info
    )


def test_what_cannot_be_used_leaves_the_former_snapshot_and_nothing_else(work_folder: Path) -> None:
    prepare_dataset(make_run("run.dir=r", "data.path=a.txt"))
    get_refusal("run.dir=r", "data.path=b.txt", "data.sequence=90000")
    get_refusal("run.dir=new/deep/run", "data.path=b.txt", "data.sequence=90000")
    Path("empty").mkdir()
    get_refusal("run.dir=empty", "data.path=b.txt", "data.sequence=90000")


def test_a_run_of_an_older_version_goes_on(work_folder: Path) -> None:
    arguments = ("train", *OVERRIDES, "run.dir=r", "data.path=a.txt", "checkpoint.every=1")
    assert main(arguments) == 0
    (Path("r/data") / MARKER_FILE).unlink()
    info_before = read_info(Path("r/data"))
    Path("a.txt").unlink()
    run = make_run("run.dir=r", "data.path=a.txt")
    assert find_dataset_dir(run) == Path("r/data") and prepare_dataset(run) == info_before


def test_a_run_toml_alone_does_not_make_data_the_runs(work_folder: Path) -> None:
    prepare("a.txt", Path("p/data"), 0.1, 0)
    run = make_run("run.dir=p", "data.path=b.txt")
    Path("p/run.toml").write_text(dump(run))
    with pytest.raises(DataError):
        prepare_run(run)


def test_a_removal_that_was_cut_short_is_finished(work_folder: Path) -> None:
    run = make_run("run.dir=r", "data.path=a.txt;b.txt")
    prepare_dataset(run)
    data_folder = Path("r/data")
    assert classify_snapshot(data_folder, run) == "same"
    (data_folder / "dataset.json").unlink()
    for file in (data_folder / "0").iterdir():
        file.unlink()
    assert classify_snapshot(data_folder, run) == "own"
    remove_snapshot(data_folder)
    assert not data_folder.exists()


@pytest.mark.parametrize("damage", ["not JSON", "altered", "another version", "a folder"])
def test_a_marker_that_is_not_what_was_written_proves_nothing(
    damage: str, work_folder: Path
) -> None:
    run = make_run("run.dir=r", "data.path=a.txt")
    prepare_dataset(run)
    marker = Path("r/data") / MARKER_FILE
    text = marker.read_text()
    marker.unlink()
    if damage == "a folder":
        marker.mkdir()
    else:
        altered_text = text.replace('"held_out": 0.1', '"held_out": 0.2')
        other_text = text.replace("snapshot-1", "snapshot-2")
        marker.write_text({"not JSON": "[" * 9, "altered": altered_text}.get(damage, other_text))
    assert read_marker(Path("r/data")) is None
    get_refusal("run.dir=r", "data.path=a.txt")


def test_a_learning_rate_is_searched_on_the_runs_own_data_under_its_lock(work_folder: Path) -> None:
    run = make_run("run.dir=r", "data.path=a.txt")
    measure_losses(run, [0.01], seed=7)
    assert find_dataset_dir(run) == Path("r/data") and read_info(Path("r/data")).seed == 0
    os.utime("a.txt", (1, 1))  # so that it would be made anew
    with acquire_run_lock(run), pytest.raises(ConfigError, match="another process"):
        measure_losses(run, [0.01], seed=7)


# --- other files in the run's folder -------------------------------------------------------------


@pytest.mark.parametrize("name", [LOCK_FILE, "plan.json", "events.jsonl", "layers.jsonl"])
def test_files_of_the_user_called_as_a_runs_are(name: str, work_folder: Path) -> None:
    Path("p").mkdir()
    (Path("p") / name).write_text("mine, not yours\n")
    assert name in get_refusal("run.dir=p", "data.path=a.txt")
    assert "p-2" in get_refusal("run.dir=p", "data.path=a.txt")


def test_a_search_does_not_replace_a_file_of_the_user(work_folder: Path) -> None:
    for name in ("lr.json", "lr.svg"):
        Path(name).write_text("{}")
        assert main(["lr", *OVERRIDES, "run.dir=.", "data.path=a.txt"]) == 2
        assert Path(name).read_text() == "{}"
        Path(name).unlink()


def test_temporary_names_are_nobody_elses(work_folder: Path) -> None:
    for name in ("x.part", f".x.{os.getpid()}.part", "members.json.new", ".d.part"):
        Path(name).write_text("mine")
    tree_before = read_tree(work_folder)
    write_atomically(Path("x"), b"whole")
    register, view = FolderRegister(Path("members.json"), "run"), View(1, "me", ("me",))
    assert register.swap(None, view) == register.read() == view
    with atomic_folder(Path("d")) as folder:
        (folder / "file").touch()
    tree_after = read_tree(work_folder)
    assert {name: tree_after[name] for name in tree_before} == tree_before
    assert set(tree_after) - set(tree_before) == {
        "x",
        "members.json",
        "members.json.lock",
        "d",
        "d/file",
    }
    long_path = Path("é" * 127)
    assert len(os.fsencode(make_temporary_path(long_path).name)) <= 255
    write_atomically(long_path, b"whole")


def test_files_of_the_user_in_a_checkpoint_stay(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001.g1"
    for names, is_kept in ((("notes.txt", "rank-00000.bak"), True), ((), False)):
        folder.mkdir(exist_ok=True)
        for name in ("manifest.json", "rank-00000.safetensors", "rank-00001.json.tmp", *names):
            (folder / name).touch()
        assert _remove_checkpoint(folder)
        assert folder.exists() is is_kept
        assert sorted(os.listdir(folder) if is_kept else ()) == sorted(names)
        shutil.rmtree(folder, ignore_errors=True)


# --- verbs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder is called as sweeps call theirs, on data with such a name."""
    folder = tmp_path_factory.mktemp("sweep")
    data = folder / "x=1,y.txt"
    data.write_text("some text of some length\n" * 300)
    model_overrides = ("model.mlp=gated", "model.logit_cap=0", "model.window=0")
    overrides = (f"run.dir={folder}/runs/optim.lr=0.01", f"data.path={data}", *model_overrides)
    assert main(["train", *OVERRIDES, *overrides, "evaluate.sample=8"]) == 0
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
    "command", [("report",), ("export",), ("export", "--to", "hf"), ("plan", "small")]
)
def test_an_output_replaces_only_what_the_same_verb_wrote(
    command: tuple[str, ...], sweep: Path, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(work_folder))
    verb, *arguments = [command[0], str(sweep / "runs/optim.lr=0.01"), *command[1:]]
    if verb == "plan":
        arguments = ["small", "launch.processes=1", "batch.microbatches=4"]
    flag = "--save" if verb == "plan" else "--output"
    Path("mine.part").mkdir()
    shutil.copy("a.txt", "mine.part/kept.txt")
    Path("folder").mkdir()
    shutil.copy("a.txt", "folder")
    Path("link").symlink_to("a.txt")
    tree_before = read_tree(work_folder)
    for target in ("a.txt", "folder", "link", "~/b.txt"):
        assert main([verb, *arguments, flag, target]) == 2
        assert read_tree(work_folder) == tree_before
    assert main([verb, *arguments, flag, "mine"]) == 0
    assert {k: v for k, v in read_tree(work_folder).items() if not k.startswith("mine/")} == {
        **tree_before, "mine": read_tree(work_folder)["mine"],
    }  # fmt: skip
    exit_code = main([verb, *arguments, flag, "mine"])
    assert exit_code == (2 if "hf" in arguments else 0)


def test_an_export_that_fails_leaves_what_was_there(work_folder: Path) -> None:
    Path("x.part").mkdir()
    shutil.copy("a.txt", "x.part")
    tree_before = read_tree(work_folder)

    def raise_disk_full(name: str) -> Any:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left"):
        write_folder(Path("x"), {}, {"w": (2,)}, raise_disk_full, 10)
    assert read_tree(work_folder) == tree_before


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
def test_words_of_train(word: str, kind: str, work_folder: Path) -> None:
    Path("lr=0.1.toml").touch()
    arguments = parse_arguments(make_parser("train", "", ""), [word])
    assert (arguments.file, arguments.overrides) == (
        (word, ()) if kind == "file" else (None, (word,))
    )


def test_data_is_prepared_from_and_to_any_name(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(work_folder))
    for source in ("k=v.txt", "x.toml", "optim.lr=1", "a,b;c.txt", "line\nend.txt", "~"):
        shutil.copy("a.txt", source)
        target = f"out={source}"
        assert main(["data", "prepare", f"./{source}", target]) == 0
        assert main(["data", "verify", f"~/{target}"]) == 0
    assert main(["data", "prepare", "~/a.txt,~/b.txt", "~/two"]) == 0
    assert len(read_info(Path("two")).sources) == 2
    assert main(["data", "prepare", "a.txt", "no", "model.layers=2"]) == 2
    assert main(["data", "prepare", "a.txt", "no", "data.held_out=0.5"]) == 2


# --- what a run.toml holds -----------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_a_run_toml(text: str) -> None:
    run = override(Run(), {"run.name": text, "data.path": text})
    plain = tomllib.loads(dump(run))
    assert (plain["run"]["name"], plain["data"]["path"]) == (text, text)


def test_a_run_toml_is_read_as_it_was_written(work_folder: Path) -> None:
    for text in ("a\nb", " a ", "\t\r\x7f\x00", '"\\u0041"', "x='y'#"):
        Path("run.toml").write_text(dump(override(Run(), {"run.name": text})))
        assert load("run.toml").run.run.name == text
        assert load(None, [f"run.name={text}"]).run.run.name == text


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9.txt"), "a\0b"])
@pytest.mark.parametrize("key", ["run.dir", "data.path", "run.name", "launch.secret"])
def test_what_a_run_toml_cannot_hold_is_refused(key: str, text: str, work_folder: Path) -> None:
    assert key in get_refusal("data.path=a.txt", "run.dir=r", f"{key}={text}")


def test_a_folder_whose_name_is_too_long_is_refused(work_folder: Path) -> None:
    assert "too long" in get_refusal("data.path=a.txt", f"run.dir={'x' * 300}")


def test_files_without_a_name_in_utf8_are_read(work_folder: Path) -> None:
    Path("texts").mkdir()
    shutil.copy("a.txt", b"texts/caf\xe9.txt")
    info = prepare_dataset(make_run("run.dir=r", "data.path=texts"))
    assert not list_changed_sources(info) and find_dataset_dir(
        make_run("run.dir=r", "data.path=texts")
    )


# --- home folders, marks, links ------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_in_every_key(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(work_folder / "home"))
    keys = ("run.dir", "launch.secret", "model.hub", "initial.weights", "data.path")
    Path("file.toml").write_text(
        "\n".join(f'{key} = "~/x"' for key in keys).replace("hub", '"hub"')
    )
    for config in (load(None, [f"{key}=~/x" for key in keys]), load("file.toml")):
        run = config.run
        paths = (
            run.run.dir, run.launch.secret, run.model.hub, run.initial.weights, run.data.path
        )  # fmt: skip
        assert paths == (str(work_folder / "home/x"),) * 5
    assert resolve_config(override(Run(), {"run.dir": "~/y"})).run.dir == str(
        work_folder / "home/y"
    )
    home = str(work_folder / "home")
    assert expand_home_of_each("~/a, ~/b;~/c") == f"{home}/a, {home}/b;{home}/c"
    assert (
        expand_home_of_each("x~,a/~/b,~nobody-has-this-name/c")
        == "x~,a/~/b,~nobody-has-this-name/c"
    )


@pytest.mark.parametrize(
    ("bom", "encoding"),
    [(codecs.BOM_UTF8, "utf-8"), (b"", "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
     (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le")],
)  # fmt: skip
def test_marks_of_encodings(bom: bytes, encoding: str, work_folder: Path) -> None:
    is_wide = encoding != "utf-8"
    Path("file.toml").write_bytes(bom + "[run]\r\nsteps = 5\r\n".encode(encoding))
    Path("texts").mkdir()
    text = "日本語の文。" * 300
    Path("texts/t.txt").write_bytes(bom + text.encode(encoding))
    shutil.copy("a.txt", "texts")
    info = prepare("texts", Path("both"), 0.0, 0)
    assert sum(n for reason, n in info.skipped.items() if reason.startswith("utf")) == is_wide
    if is_wide:
        with pytest.raises(ConfigError, match=encoding[:6].upper()):
            read_toml(Path("file.toml"))
        with pytest.raises(DataError, match="byte order mark"):
            prepare("texts/t.txt", Path("one"), 0.0, 0)
        return
    assert read_toml(Path("file.toml")) == {"run": {"steps": 5}}
    # The mark is no part of the text, but the file has the size that it has.
    text_info = prepare("texts/t.txt", Path("one"), 0.25, 0)
    assert sum(split.tokens for split in text_info.splits.values()) == len(text.encode()) + 2
    assert not list_changed_sources(text_info)


def test_bytes_that_begin_like_a_mark_are_data(work_folder: Path) -> None:
    Path("odd.txt").write_bytes(codecs.BOM_UTF16_LE + b"\xd8" * 801)
    assert prepare("odd.txt", Path("odd"), 0.0, 0).splits["train"].tokens == 804


def test_a_link_to_a_folder_is_counted_or_followed_where_it_is_named(work_folder: Path) -> None:
    for name, text in (("real", "a.txt"), ("top", "b.txt")):
        Path(name).mkdir()
        shutil.copy(text, name)
    Path("top/more").symlink_to("../real")
    Path("top/round").symlink_to(".")
    Path("top/c.txt").symlink_to("../a.txt")
    info = prepare("top", Path("one"), 0.1, 0)
    assert len(info.sources) == 2 and info.skipped["link"] == 2
    assert len(prepare("top/more", Path("two"), 0.1, 0).sources) == 1


def test_patterns_are_the_librarys_without_its_circles(work_folder: Path) -> None:
    for folder in ("t/one/two", "t/.hidden", "t/[x]", "real/deep"):
        Path(folder).mkdir(parents=True)
        for name in ("a.txt", ".b.txt", "c.md"):
            (Path(folder) / name).write_text(folder + name)
    Path("t/link").symlink_to("../real")
    folder = f"{work_folder}/t"
    patterns = ("**", "**/*", "**/*.txt", "**/one/**", "one/**/a.*", "**/[x]/*", "*/a.txt", "**/**")
    for pattern in [*patterns, *(f"t/{p}" for p in patterns), *(f"{folder}/{p}" for p in patterns)]:
        library_matches = {p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
        assert {p for p in _expand_glob(pattern) if os.path.isfile(p)} == library_matches, pattern
    for name in ("round", "again", "one/up"):
        (Path("t") / name).symlink_to(work_folder / "t")
    assert len(prepare("t/**/*.txt", Path("set"), 0.1, 0).sources) == 3


def test_a_run_in_linked_folders(work_folder: Path) -> None:
    for name in ("disk", "big", "r"):
        Path(name).mkdir()
    Path("run").symlink_to("disk")
    Path("disk/data").symlink_to("../big")  # empty: to be filled
    first_info = prepare_dataset(make_run("run.dir=run", "data.path=a.txt"))
    assert is_dataset(Path("big"))
    second_info = prepare_dataset(make_run("run.dir=run", "data.path=b.txt"))
    assert second_info.fingerprint != first_info.fingerprint and is_dataset(Path("big"))
    assert Path("disk/data").is_symlink() and Path("run").is_symlink()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_began_before_the_lock_was_taken_is_seen(
    processes: int, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run.dir=r", "data.path=a.txt", f"launch.processes={processes}")
    other_run = override(run, {"optim.lr": 0.5})

    def write_other_run(*_: object) -> None:
        Path("r").mkdir()
        Path("r/run.toml").write_text(dump(other_run))

    # The last thing before the lock, in either way.
    monkeypatch.setattr("cordee.launcher.prepare.check_sources", write_other_run)
    with pytest.raises(ConfigError, match="another run"):
        cordee.train(run)
    assert sorted(os.listdir("r")) == ["lock", "run.toml"]
