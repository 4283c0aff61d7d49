"""The house's caps and floors, kept by a machine: they are the reason the house keeps its shape."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cordee"
FILES = sorted(PACKAGE.rglob("*.py"))

FILE_LINES, FUNCTION_LINES, PARAMETERS, COLUMNS, PACKAGE_LINES = 600, 60, 8, 100, 33_500

FLOORS = {
    "errors": 0, "system": 1, "devices": 1, "config": 2,
    "layout": 3, "model": 3, "plan": 4, "dist": 4, "data": 4,
    "optim": 5, "parallel": 5, "sync": 5, "checkpoint": 5, "fault": 5, "metrics": 5,
    "evaluate": 5, "sample": 5, "parts": 6,
    "build": 6, "rendezvous": 6, "begin": 6, "testing": 6, "desk": 6, "resume": 6, "balance": 6,
    "trial": 6, "rehearse": 6, "probe": 5, "machine": 6, "train": 7,
    "cli": 8,
}  # fmt: skip
FACES = {"__init__", "__main__"}
PAPER = (
    "config", "layout", "plan", "data/order.py", "data/mixture.py", "data/permutation.py",
    "errors.py", "system.py", "devices.py",
)  # fmt: skip
LATE_IMPORTS = {
    "dist/start.py", "__init__.py", "model/hub.py", "model/keras.py", "parallel/shard.py",
    "build.py",
}  # fmt: skip
"""Files outside cli/ that may import inside a function; each says why in its header."""
ENVIRONMENT = {"dist/start.py", "testing.py"}
BROAD = ("fault/", "testing.py")
KNOBS = ("config/run.py", "config/model.py")
BANNED_NAMES = {"utils", "common", "helpers", "manager", "handler", "base", "misc"}


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


def test_there_is_a_house() -> None:
    assert len(FILES) > 40


@dataclass
class Offenders:
    """What breaks a rule, over all files."""

    lines: list[str] = field(default_factory=list)

    def unless(self, kept: object, path: Path, says: str) -> None:
        """Notes that `path` breaks the rule unless it is kept."""
        if not kept:
            self.lines.append(f"{name_of(path)}: {says}")


@pytest.fixture
def offenders() -> Iterator[Offenders]:
    """Fails at the end of a test that has found any."""
    found = Offenders()
    yield found
    assert not found.lines, "\n" + "\n".join(found.lines)


def test_caps(offenders: Offenders) -> None:
    for path in FILES:
        _check_caps(path, offenders)


def _check_caps(path: Path, offenders: Offenders) -> None:
    lines = path.read_text().splitlines()
    offenders.unless(len(lines) <= FILE_LINES, path, f"{len(lines)} lines")
    long = [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS]
    offenders.unless(not long, path, f"lines over {COLUMNS} columns: {long}")
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        offenders.unless(length <= FUNCTION_LINES, path, f"{function.name}: {length} lines")
        given = function.args
        count = len([a for a in [*given.posonlyargs, *given.args] if a.arg not in ("self", "cls")])
        count += len(given.kwonlyargs)
        offenders.unless(count <= PARAMETERS, path, f"{function.name}: {count} parameters")


def test_package_size() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= PACKAGE_LINES


def test_floors(offenders: Offenders) -> None:
    for path in FILES:
        room = room_of(path)
        if room in FACES:
            continue
        for module in imports(tree_of(path)):
            if not module.startswith("cordee."):
                continue
            other = module.split(".")[1]
            assert other in FLOORS, f"{module} has no floor"
            if other != room:
                below = FLOORS[other] < FLOORS[room] or _same_floor_below(room, other)
                says = f"floor {FLOORS[room]} imports {module} of floor {FLOORS[other]}"
                offenders.unless(below, path, says)


def _same_floor_below(room: str, other: str) -> bool:
    """Inside floors 3, 4 and 6 a room may use one that stands before it in this list."""
    order = ["layout", "model", "dist", "data", "plan",
             "parts", "build", "rendezvous", "machine", "begin", "desk", "balance", "resume",
             "trial", "rehearse", "testing"]  # fmt: skip
    return (
        FLOORS[room] == FLOORS[other]
        and room in order
        and other in order
        and order.index(other) < order.index(room)
    )


def test_no_circles() -> None:
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    edges = {
        name: {m for m in imports(tree_of(path)) if m in known and m != name}
        for name, path in known.items()
        if name not in ("cordee.__init__", "cordee.__main__")
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_paper_knows_no_torch(offenders: Offenders) -> None:
    for path in FILES:
        name, modules = name_of(path), list(imports(tree_of(path)))
        if name.startswith(PAPER):
            torch = [m for m in modules if m.split(".")[0] == "torch"]
            offenders.unless(not torch, path, f"imports {torch}")
        if name.startswith("model/"):
            groups = [m for m in modules if m.startswith("torch.distributed")]
            offenders.unless(not groups, path, f"imports {groups}")


def test_manners(offenders: Offenders) -> None:
    for path in FILES:
        _check_manners(path, offenders)


def _check_manners(path: Path, offenders: Offenders) -> None:
    name, text, tree = name_of(path), path.read_text(), tree_of(path)
    offenders.unless(ast.get_docstring(tree), path, "a file says what it is")
    offenders.unless(path.stem not in BANNED_NAMES, path, "a name that says nothing")
    marks = re.findall(r"\b(?:TODO|FIXME|XXX|HACK|NotImplementedError)\b", text)
    offenders.unless(not marks, path, f"unfinished: {marks}")
    offenders.unless("pickle" not in set(imports(tree)), path, "pickle")
    offenders.unless("torch.load" not in text, path, "torch.load")
    if name not in ENVIRONMENT:
        reads = re.search(r"os\.environ|os\.getenv", text)
        offenders.unless(not reads, path, "environment is read in dist/start")
    for node in ast.walk(tree):
        offenders.unless(not isinstance(node, ast.Global), path, "global")
        if isinstance(node, ast.ExceptHandler) and not name.startswith(BROAD):
            caught = ast.unparse(node.type) if node.type else ""
            narrow = caught not in ("", "Exception", "BaseException")
            offenders.unless(narrow, path, f"line {node.lineno}: broad")
    if not name.startswith("cli/") and name not in LATE_IMPORTS:
        for function in functions(path):
            late = list(imports(function))
            offenders.unless(not late, path, f"{function.name}: imports {late} inside")


def test_public_names_are_documented_and_typed(offenders: Offenders) -> None:
    for path in FILES:
        _check_public_names(path, offenders)


def _check_public_names(path: Path, offenders: Offenders) -> None:
    tree = tree_of(path)
    public = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    bodies = [tree.body, *[node.body for node in public]]
    for body in bodies:
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                documented = ast.get_docstring(node)
                offenders.unless(documented, path, f"{node.name} has no docstring")
                offenders.unless(node.returns, path, f"{node.name} has no return type")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            documented = ast.get_docstring(node) or name_of(path) in KNOBS
            offenders.unless(documented, path, f"{node.name} has no docstring")


def test_every_knob_is_documented_and_read() -> None:
    sys.path.insert(0, str(ROOT))
    from cordee.config.load import field_doc, known_keys

    text = "\n".join(p.read_text() for p in FILES if name_of(p) not in KNOBS)
    for key in known_keys():
        assert field_doc(key), f"{key} has no sentence"
        leaf = key.split(".")[-1]
        assert re.search(rf"\.{leaf}\b|\"{leaf}\"", text), f"{key} is read nowhere: act or refuse"


@pytest.mark.parametrize("verb", ["--help", "plan", "config"])
def test_paper_verbs_start_without_torch(verb: str, tmp_path: Path) -> None:
    words = {"--help": ["--help"], "plan": ["plan"], "config": ["config", "explain", "optim"]}[verb]
    code = (
        "import sys; from cordee.cli.main import main; code = main(sys.argv[1:]);"
        " assert code == 0, code; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_help_is_short() -> None:
    from cordee.cli.main import HELP, VERBS

    shown = HELP.format(verbs="\n".join(VERBS))
    assert len(shown.splitlines()) <= 25
