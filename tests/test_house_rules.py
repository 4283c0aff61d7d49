"""The house's caps and floors, kept by a machine: they are the reason the house keeps its shape."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cordee"
FILES = sorted(PACKAGE.rglob("*.py"))

FILE_LINES, FUNCTION_LINES, PARAMETERS, COLUMNS = 600, 60, 8, 100
ROOM_LINES = {
    "errors": 80, "api": 140, "hardware": 540, "config": 1_670, "layout": 1_385, "model": 1_570,
    "dist": 1_870, "data": 2_725, "planner": 3_900, "hf": 990, "optim": 1_545, "parallel": 2_170,
    "checkpoint": 2_265, "elastic": 4_800, "report": 1_710, "launcher": 1_605, "training": 2_765,
    "cli": 1_590, "__init__": 60, "__main__": 60,
}  # fmt: skip
"""Lines of code, docstrings and comments that each room may have (docs/decisions.md)."""

ROOMS = (
    "errors", "hardware", "config", "layout", "model", "dist", "data", "planner", "hf", "optim",
    "parallel", "checkpoint", "elastic", "report", "launcher", "training", "api", "cli",
)  # fmt: skip
"""A file imports only its own room and rooms that stand before it."""
ENTRY_FILES = {"__init__", "__main__"}
TORCH_FREE = (
    "config", "layout", "planner", "data/order.py", "data/mixture.py", "data/permutation.py",
    "errors.py", "hardware",
)  # fmt: skip
LATE_IMPORTS = {
    "dist/process_group.py", "__init__.py", "hf/model.py", "hf/keras.py", "parallel/fsdp.py",
    "training/build.py", "elastic/transport.py", "api.py",
}  # fmt: skip
"""Files outside cli/ that may import inside a function; each says why in its header."""
ENVIRONMENT_READERS = {"dist/process_group.py", "launcher/run_ranks.py"}
BROAD_EXCEPTS = (
    "elastic/",
    "launcher/run_ranks.py",
    "training/step_guard.py",
    "training/fault_injection.py",
    "training/stop_request.py",
)
SETTINGS_FILES = ("config/run.py", "config/model.py")
DOCUMENTED_LINES = 15
"""Public functions from this length on have a docstring; shorter ones where they need one."""
BANNED_NAMES = {"utils", "common", "helpers", "manager", "handler", "base", "misc"}


PARTICIPLES = {
    "asked", "begun", "built", "drawn", "found", "given", "gone", "held", "kept", "known", "made",
    "mine", "said", "seen", "sent", "taken", "told", "wanted",
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module


def test_package_has_files() -> None:
    assert len(FILES) > 40


@dataclass
class Offenders:
    """What breaks a rule, over all files."""

    lines: list[str] = field(default_factory=list)

    def unless(self, is_kept: object, path: Path, message: str) -> None:
        """Notes that `path` breaks the rule unless it is kept."""
        if not is_kept:
            self.lines.append(f"{name_of(path)}: {message}")


@pytest.fixture
def offenders() -> Iterator[Offenders]:
    """Fails at the end of a test that has found any."""
    collector = Offenders()
    yield collector
    assert not collector.lines, "\n" + "\n".join(collector.lines)


def test_caps(offenders: Offenders) -> None:
    for path in FILES:
        _check_caps(path, offenders)


def _check_caps(path: Path, offenders: Offenders) -> None:
    lines = path.read_text().splitlines()
    offenders.unless(len(lines) <= FILE_LINES, path, f"{len(lines)} lines")
    long_lines = [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS]
    offenders.unless(not long_lines, path, f"lines over {COLUMNS} columns: {long_lines}")
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        offenders.unless(length <= FUNCTION_LINES, path, f"{function.name}: {length} lines")
        arguments = function.args
        count = len(
            [a for a in [*arguments.posonlyargs, *arguments.args] if a.arg not in ("self", "cls")]
        )
        count += len(arguments.kwonlyargs)
        offenders.unless(count <= PARAMETERS, path, f"{function.name}: {count} parameters")


def test_room_sizes() -> None:
    room_lines = Counter[str]()
    for path in FILES:
        room_lines[room_of(path)] += len(path.read_text().splitlines())
    too_large = {room: lines for room, lines in room_lines.items() if lines > ROOM_LINES[room]}
    assert not too_large, f"{too_large}, the caps are {ROOM_LINES}"


def test_rooms_import_only_rooms_below(offenders: Offenders) -> None:
    for path in FILES:
        room = room_of(path)
        if room in ENTRY_FILES:
            continue
        assert room in ROOMS, f"{name_of(path)}: {room} is none of the rooms"
        for module in imports(tree_of(path)):
            other = module.removeprefix("cordee.").split(".")[0]
            if module.startswith("cordee.") and other != room:
                is_below = ROOMS.index(other) < ROOMS.index(room)
                offenders.unless(is_below, path, f"{room} imports {module}, which is not below it")


def test_no_circles() -> None:
    module_paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    edges = {
        name: {m for m in imports(tree_of(path)) if m in module_paths and m != name}
        for name, path in module_paths.items()
        if name not in ("cordee.__init__", "cordee.__main__")
    }
    visited: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in visited:
            for other in edges.get(name, ()):
                visit(other, (*trail, name))
            visited.add(name)

    for name in edges:
        visit(name, ())


def test_torch_free_files(offenders: Offenders) -> None:
    for path in FILES:
        name, modules = name_of(path), list(imports(tree_of(path)))
        if name.startswith(TORCH_FREE):
            torch_imports = [m for m in modules if m.split(".")[0] == "torch"]
            offenders.unless(not torch_imports, path, f"imports {torch_imports}")
        if name.startswith("model/"):
            group_imports = [m for m in modules if m.startswith("torch.distributed")]
            offenders.unless(not group_imports, path, f"imports {group_imports}")


def test_manners(offenders: Offenders) -> None:
    for path in FILES:
        _check_manners(path, offenders)


def _check_manners(path: Path, offenders: Offenders) -> None:
    name, text, tree = name_of(path), path.read_text(), tree_of(path)
    offenders.unless(ast.get_docstring(tree), path, "a file says what it is")
    offenders.unless(path.stem not in BANNED_NAMES, path, "a name that says nothing")
    formula = re.search(r"Not here:|Traded away:|PAPER:", ast.get_docstring(tree) or "")
    offenders.unless(not formula, path, "a header says what a file is for, in plain sentences")
    unfinished_marks = re.findall(r"\b(?:TODO|FIXME|XXX|HACK|NotImplementedError)\b", text)
    offenders.unless(not unfinished_marks, path, f"unfinished: {unfinished_marks}")
    offenders.unless("pickle" not in set(imports(tree)), path, "pickle")
    offenders.unless("torch.load" not in text, path, "torch.load")
    if name not in ENVIRONMENT_READERS:
        environment_read = re.search(r"os\.environ|os\.getenv", text)
        offenders.unless(not environment_read, path, "environment is read in dist/start")
    for node in ast.walk(tree):
        offenders.unless(not isinstance(node, ast.Global), path, "global")
        if isinstance(node, ast.ExceptHandler) and not name.startswith(BROAD_EXCEPTS):
            exception_types = ast.unparse(node.type) if node.type else ""
            is_narrow = exception_types not in ("", "Exception", "BaseException")
            offenders.unless(is_narrow, path, f"line {node.lineno}: broad")
    if not name.startswith("cli/") and name not in LATE_IMPORTS:
        for function in functions(path):
            late_imports = list(imports(function))
            offenders.unless(
                not late_imports, path, f"{function.name}: imports {late_imports} inside"
            )


def test_a_class_name_has_one_meaning(offenders: Offenders) -> None:
    first_path: dict[str, Path] = {}
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                other_path = first_path.setdefault(node.name, path)
                offenders.unless(other_path == path, path, f"{node.name}: also {other_path}")


def test_no_participle_names_a_thing(offenders: Offenders) -> None:
    for path in FILES:
        names = {n.arg for n in ast.walk(tree_of(path)) if isinstance(n, ast.arg)}
        names |= {
            n.id
            for n in ast.walk(tree_of(path))
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        offenders.unless(not names & PARTICIPLES, path, f"{names & PARTICIPLES}")


def test_public_names_are_documented_and_typed(offenders: Offenders) -> None:
    for path in FILES:
        _check_public_names(path, offenders)


def _check_public_names(path: Path, offenders: Offenders) -> None:
    tree = tree_of(path)
    public_classes = [
        n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")
    ]
    bodies = [tree.body, *[node.body for node in public_classes]]
    for body in bodies:
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                is_short = node.end_lineno - node.lineno < DOCUMENTED_LINES
                is_documented = is_short or ast.get_docstring(node)
                offenders.unless(is_documented, path, f"{node.name} has no docstring")
                offenders.unless(node.returns, path, f"{node.name} has no return type")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node) or name_of(path) in SETTINGS_FILES
            offenders.unless(docstring, path, f"{node.name} has no docstring")


def test_every_knob_is_documented_and_read() -> None:
    sys.path.insert(0, str(ROOT))
    from cordee.config.load import config_keys, field_doc

    text = "\n".join(p.read_text() for p in FILES if name_of(p) not in SETTINGS_FILES)
    for key in config_keys():
        assert field_doc(key), f"{key} has no sentence"
        leaf = key.split(".")[-1]
        assert re.search(rf"\.{leaf}\b|\"{leaf}\"", text), f"{key} is read nowhere: act or refuse"


@pytest.mark.parametrize("verb", ["--help", "plan", "config"])
def test_verbs_without_torch(verb: str, tmp_path: Path) -> None:
    words = {"--help": ["--help"], "plan": ["plan"], "config": ["config", "explain", "optim"]}[verb]
    code = (
        "import sys; from cordee.cli.main import main; code = main(sys.argv[1:]);"
        " assert code == 0, code; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_help_is_short() -> None:
    from cordee.cli.main import HELP, VERBS

    help_text = HELP.format(verbs="\n".join(VERBS))
    assert len(help_text.splitlines()) <= 25
