"""data.path as an array and [[data.sources]]: the same run as the short strings, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cordee.config.load import dump, load
from cordee.config.run import Run
from cordee.errors import ConfigError

SHORT = load(None, ["data.path=wiki/*.txt;a,b", "data.weights=5,3"]).run
BY_SIZE = load(None, ["data.path=wiki/*.txt;a,b"]).run
TABLES = """
[[data.sources]]
path = "wiki/*.txt"
weight = 5
[[data.sources]]
path = "a,b"
weight = 3
"""


def load_text(folder: Path, text: str, *overrides: str) -> Run:
    (folder / "mine.toml").write_text(text)
    return load(str(folder / "mine.toml"), overrides).run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TABLES, SHORT),
        ('[data]\npath = [{path="wiki/*.txt", weight=5}, {path="a,b", weight=3}]', SHORT),
        ('[data]\npath = ["wiki/*.txt", "a,b"]\nweights = "5,3"', SHORT),
        ('[data]\npath = ["wiki/*.txt", "a,b"]\nweights = [5, 3]', SHORT),
        ('[data]\npath = ["wiki/*.txt", " a,b "]', BY_SIZE),
        ('[data]\npath = ["wiki/*.txt", {path = "a,b"}]', BY_SIZE),
        ('[[data.sources]]\npath = "wiki/*.txt"\n[[data.sources]]\npath = "a,b"', BY_SIZE),
        ('data.path = "wiki/*.txt;a,b"\ndata.weights = "5,3"', SHORT),
    ],
)
def test_every_form_is_the_same_run_and_comes_back_from_run_toml(
    tmp_path: Path, text: str, expected: Run
) -> None:
    run = load_text(tmp_path, text)
    assert run == expected
    assert load_text(tmp_path, dump(run)) == run


def test_weights_are_written_as_they_were(tmp_path: Path) -> None:
    text = TABLES.replace("= 5", "= 0.7").replace("= 3", "= 1e-3")
    assert load_text(tmp_path, text).data.weights == "0.7,0.001"


def test_one_source_is_a_path_without_weights(tmp_path: Path) -> None:
    for text in (
        '[data]\npath = ["a"]', '[[data.sources]]\npath = "a"\nweight = 2',
    ):  # fmt: skip
        data = load_text(tmp_path, text).data
        assert (data.path, data.weights) == ("a", "")


def test_home_folders_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    run = load_text(tmp_path, '[data]\npath = ["~/a", "b", "~/c"]')
    assert run.data.path == "/home/me/a;b;/home/me/c"


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    data = load_text(tmp_path, TABLES, "data.path=c;d").data
    assert (data.path, data.weights) == ("c;d", "")
    data = load_text(tmp_path, TABLES, "data.path=c;d", "data.weights=1,2").data
    assert (data.path, data.weights) == ("c;d", "1,2")
    data = load_text(tmp_path, TABLES, "data.weights=1,2", "data.path=c;d").data
    assert (data.path, data.weights) == ("c;d", "1,2")
    data = load_text(tmp_path, TABLES, "data.weights=1,2").data
    assert (data.path, data.weights) == ("wiki/*.txt;a,b", "1,2")
    # Weights that stand by themselves stay, as any other key of the file.
    data = load_text(tmp_path, '[data]\npath = ["a", "b"]\nweights = "5,3"', "data.path=c;d").data
    assert (data.path, data.weights) == ("c;d", "5,3")


@pytest.mark.parametrize(
    ("text", "message", "value", "fix"),
    [
        (TABLES.replace("= 3", "= 0"), "above 0", "weight=0", "weight = 1"),
        (TABLES.replace("= 3", "= -2.5"), "above 0", "weight=-2.5", "weight = 1"),
        (TABLES.replace("= 3", "= inf"), "above 0", "weight=inf", "weight = 1"),
        (TABLES.replace("= 3", "= nan"), "above 0", "weight=nan", "weight = 1"),
        (TABLES.replace("= 3", "= true"), "above 0", "weight=True", "weight = 1"),
        (TABLES.replace("= 3", '= "3"'), "above 0", "weight='3'", "weight = 1"),
        (TABLES.replace("weight = 3", ""), "others have none", "a,b", "for every source"),
        (TABLES.replace('path = "a,b"', ""), "no path", "'weight': 3", "path ="),
        (TABLES.replace('"a,b"', '" "'), "no path", "' '", "path ="),
        (TABLES.replace('"a,b"', "7"), "no path", "7", "path ="),
        (TABLES.replace("weight = 3", "wieght = 3"), "no such key", "wieght", "mean weight?"),
        (TABLES.replace("path = \"a,b\"", 'file = "a,b"'), "no such key", "file", "did you mean"),
        (TABLES.replace('"a,b"', '"a;b"'), "no semicolon", "a;b", "['a', 'b']"),
        ('[data]\nweights = "5,3"\n' + TABLES, "twice", "5,3", "leave data.weights out"),
        ('[data]\npath = "c"\n' + TABLES, "both name the data", "data.path='c'", "leave data.path"),
        ('[data]\npath = []', "names no source", "[]", "[[data.sources]]"),
        ('[data]\nsources = []', "names no source", "[]", "[[data.sources]]"),
        ('[data]\npath = ["a", 5]', "a text, or a table", "5", "[[data.sources]]"),
        ('[data]\npath = ["a", ["b"]]', "a text, or a table", "['b']", "[[data.sources]]"),
        ('[data.sources]\npath = "a"', "tables, one for each", "'path': 'a'", "[[data.sources]]"),
        ('[data]\nsources = "a;b"', "tables, one for each", "a;b", "[[data.sources]]"),
        ('[data]\npath = ["a", "b"]\nweights = [1, 0]', "above 0", "weight=0", "weight = 1"),
        ('[data]\npath = 5', "wrong type", "5", "data.path="),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_with_values_and_fix(
    tmp_path: Path, text: str, message: str, value: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as error_info:
        load_text(tmp_path, text)
    assert message in error_info.value.message
    assert value in str(error_info.value) and fix in (error_info.value.fix or "")


def test_tables_are_for_files() -> None:
    with pytest.raises(ConfigError) as error_info:
        load(None, ["data.sources=a"])
    assert "data.path='one;two'" in (error_info.value.fix or "")


def test_keys_of_the_image_classifiers_that_left(tmp_path: Path) -> None:
    """What run.toml of older runs holds says nothing; other values name where they went."""
    old_text = '[model]\nkind = "transformer"\n[model.image]\nside = 16\nchannels = 1\nclasses = 10'
    assert load_text(tmp_path, old_text) == load(None).run
    for key in ("model.kind=conv", "model.image.side=32", "model.image.classes=3"):
        with pytest.raises(ConfigError) as error_info:
            load(None, [key])
        assert "examples/classify_shapes.py" in (error_info.value.fix or "")
