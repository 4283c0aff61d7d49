"""Where text comes from: the files that a specification names, and two corpora every machine has.

`builtin:stdlib` is Python's own library, `builtin:markov` a chain whose entropy rate is known, so
that it says how far from perfect a model still is. Not here: splitting and writing (`prepare`).
Traded away: decoding. A text is any file without a NUL byte; what its bytes mean is not asked, but
for a byte order mark in front: UTF-8's is no part of the text, and UTF-16 and UTF-32 are refused.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import itertools
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cordee.config.load import encoding_of
from cordee.errors import DataError

STDLIB = "builtin:stdlib"
MARKOV = "builtin:markov"
SHAPES = "builtin:shapes"
BUILTINS = (STDLIB, MARKOV, SHAPES)
MARKOV_TOKENS = 4_000_000
MARKOV_SYMBOLS = 64

_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# Successors of a state and their chances in 256ths, three habits of unlike entropy.
_HABITS = ((200, 32, 16, 8), (160, 64, 24, 8), (120, 72, 40, 24))
_READ_BYTES = 16 << 20
_SKIPS = ("hidden", "binary", "empty", "special", "duplicate", "link", "utf-16", "utf-32")


@dataclass(frozen=True)
class Document:
    """A file that becomes a document. `name` is relative, so it moves with its folder; its first
    `mark` bytes are a byte order mark."""

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    mark: int = 0

    @property
    def text_bytes(self) -> int:
        """Bytes of the text, without the mark."""
        return self.bytes - self.mark


@dataclass(frozen=True)
class Corpus:
    """Documents in their order, and how many files were left out, by reason."""

    name: str
    documents: tuple[Document, ...]
    skipped: dict[str, int]


@dataclass(frozen=True)
class _Found:
    """A file that may become a document; refused when unfit if it was `named`, else skipped."""

    path: Path
    name: str
    named: bool


def stdlib_files() -> list[Path]:
    """The .py sources of this Python's standard library, sorted by path; tests and installed
    packages are left out. DataError when this Python comes without its sources."""
    root = sysconfig.get_path("stdlib")
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(
            "this Python comes without the sources of its library",
            values={"data.path": STDLIB, "folder": root},
            fix=f"data.path={MARKOV}, or a text file of yours",
        )
    return sorted(files)


def markov_tokens(
    seed: int, tokens: int, symbols: int = MARKOV_SYMBOLS
) -> tuple[NDArray[np.uint8], float]:
    """`tokens` symbols (uint8) of an order-1 Markov chain, and its entropy rate in bits a token.

    Each state has four draws of successors with skewed chances (in 256ths, so one byte of
    randomness is one exact step) and the rate is sum_i pi_i H(P_i) over the stationary
    distribution pi (Shannon 1948). It is one chain from end to end, not pieces stitched together.
    The same on every machine: raw Philox words are the only randomness, all choices are integer,
    and the rate is rounded to 1e-9. `symbols` is 2..256.
    """
    if not 2 <= symbols <= 256 or tokens < 1:
        raise DataError(
            "the Markov source needs 2..256 symbols and at least one token",
            values={"symbols": symbols, "tokens": tokens},
            fix=f"symbols={MARKOV_SYMBOLS}, tokens={MARKOV_TOKENS}",
        )
    # Two counters far apart: one stream for the chain's law, one for its course.
    counts = _transitions(raw_words(seed, 0, 4 * symbols), symbols)
    draws = raw_words(seed, 1, -(-tokens // 8)).view(np.uint8)[:tokens].tobytes()
    states = np.arange(symbols, dtype=np.uint8)
    table = [np.repeat(states, row).tobytes() for row in counts]
    # A loop that cannot be vectorised (each step needs the last), run at 60 ns a token.
    chain = itertools.accumulate(draws, lambda state, draw: table[state][draw], initial=0)
    next(chain)
    return np.frombuffer(bytes(chain), dtype=np.uint8), _entropy_bits(counts)


def raw_words(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """Raw 64-bit words, little-endian: what NumPy keeps equal over versions and machines."""
    source = np.random.Philox(key=seed % (1 << 64), counter=[0, 0, 0, stream])
    return source.random_raw(count).astype("<u8")


def _transitions(words: NDArray[np.uint64], symbols: int) -> NDArray[np.int64]:
    """Counts out of 256, (symbols, symbols), each row summing to 256.

    Each state's most likely successor is its next on one ring through all states, so every state
    is reached; its least likely is itself, so the chain has no period.
    """
    draws = words.reshape(4, symbols)
    ring = np.argsort(draws[0], kind="stable")
    counts = np.zeros((symbols, symbols), dtype=np.int64)
    for place, state in enumerate(ring.tolist()):
        habit = _HABITS[int(draws[1, state] % np.uint64(len(_HABITS)))]
        followers = (
            int(ring[(place + 1) % symbols]),
            int(draws[2, state] % np.uint64(symbols)),
            int(draws[3, state] % np.uint64(symbols)),
            state,
        )
        for follower, count in zip(followers, habit, strict=True):
            counts[state, follower] += count
    return counts


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    chances = counts / 256.0
    # pi P = pi and sum pi = 1: one equation of the first set follows from the others.
    system = chances.T - np.eye(len(counts))
    system[-1] = 1.0
    stationary = np.linalg.solve(system, np.eye(len(counts))[-1])
    logs = np.log2(chances, out=np.zeros_like(chances), where=chances > 0)
    return round(float(-(stationary[:, None] * chances * logs).sum()), 9)


def find_corpus(path_spec: str) -> Corpus:
    """The documents that `path_spec` names: `builtin:stdlib`, or files, folders (recursive) and
    globs with commas between. In folders and globs, hidden files, files with NUL bytes, empty ones,
    UTF-16 and what is no file are skipped and counted, in a folder also a link to another folder,
    which may lead anywhere; a file seen twice counts once.

    Order: as named, and by relative name within a folder or glob. DataError for a path that does
    not exist or cannot be read, a named file that is empty or holds NUL bytes, or nothing to read.
    """
    name, found, skipped = _find(path_spec)
    documents, seen = [], set()
    for file in found:
        result = _examine(file)
        if isinstance(result, str):
            skipped[result] += 1
        elif (real := os.path.realpath(file.path)) in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(real)
            documents.append(result)
    if not documents:
        raise _nothing(path_spec, skipped)
    return Corpus(name, tuple(documents), skipped)


def listed_files(path_spec: str) -> list[Path]:
    """The files that `find_corpus` would look into, and those it reads; none for what is drawn."""
    return [] if path_spec in (MARKOV, SHAPES) else [file.path for file in _find(path_spec)[1]]


def probe_corpus(path_spec: str) -> None:
    """Raise what `find_corpus` would raise, reading no more than it must to know."""
    _, found, skipped = _find(path_spec)
    fit = False
    for file in found:
        if fit and not file.named:
            _open(file.path).close()
            continue
        result = _examine(file)
        if isinstance(result, str):
            skipped[result] += 1
        else:
            fit = True
    if not fit:
        raise _nothing(path_spec, skipped)


def _find(path_spec: str) -> tuple[str, list[_Found], dict[str, int]]:
    skipped = dict.fromkeys(_SKIPS, 0)
    if path_spec == STDLIB:
        root = sysconfig.get_path("stdlib")
        files = [_Found(p, p.relative_to(root).as_posix(), False) for p in stdlib_files()]
        return "stdlib", files, skipped
    # A comma may be part of a name: what exists as it stands is one path.
    items = [item.strip() for item in path_spec.split(",") if item.strip()]
    items = [path_spec] if _mode(path_spec) else items
    if not items:
        raise DataError("no data is named", values={"data.path": path_spec}, fix=_use(STDLIB))
    found: list[_Found] = []
    for item in items:
        found += _find_item(item, skipped)
    name = Path(items[0]).absolute().stem
    return (name if len(items) == 1 else f"{name}+{len(items) - 1}"), found, skipped


def _find_item(item: str, skipped: dict[str, int]) -> list[_Found]:
    if item.startswith("builtin:"):
        alone = item in BUILTINS
        close = difflib.get_close_matches(item, BUILTINS, n=1, cutoff=0.0)
        raise DataError(
            "a builtin source stands alone" if alone else "no such builtin source",
            values={"data.path": item, "known": BUILTINS},
            fix=_use(close[0]),
        )
    mode = _mode(item)
    if stat.S_ISDIR(mode):
        return _find_folder(Path(item), skipped)
    if stat.S_ISREG(mode):
        return [_Found(Path(item), Path(item).name, True)]
    if mode:
        raise DataError(
            "the data path is neither a file nor a folder",
            values={"data.path": item},
            fix="a file, a folder or a glob",
        )
    if not glob.has_magic(item):
        raise _missing(item)
    # The part without wildcards is the root that names are relative to.
    root = Path(item)
    while glob.has_magic(str(root)):
        root = root.parent
    found = []
    for path in sorted(map(Path, _matches(item))):
        if path.is_file():
            found.append(_Found(path, path.relative_to(root).as_posix(), False))
    if not found:
        raise _missing(item, "no file matches this pattern")
    return found


def _matches(pattern: str) -> list[str]:
    """What a pattern matches, `**` being any folders, linked ones too, but not round in circles: of
    two links to a folder above them, the library's own would never come to an end."""
    words = pattern.split("/")
    if "**" not in words:
        return glob.glob(pattern)
    at = words.index("**")
    base, rest = "/".join(words[:at]), "/".join(words[at + 1 :]) or "*"
    tops = glob.glob(base or "/") if at else [""]
    paths = []
    for top in tops:
        for folder in _folders(top, ()):
            paths += _matches(os.path.join(glob.escape(folder), rest))
    return paths


def _folders(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """A folder and all below it but hidden ones; `above` are the real paths of those it is in."""
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(folder or "."):
        return
    yield folder
    for name in sorted(os.listdir(folder or ".")) if os.access(folder or ".", os.R_OK) else ():
        if not name.startswith("."):
            yield from _folders(os.path.join(folder, name), (*above, real))


def _find_folder(root: Path, skipped: dict[str, int]) -> list[_Found]:
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        for listed in (subfolders, names):
            shown = [name for name in listed if not name.startswith(".")]
            skipped["hidden"] += len(listed) - len(shown)
            listed[:] = shown
        skipped["link"] += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        found += [Path(folder, name) for name in names]
    named = sorted((path.relative_to(root).as_posix(), path) for path in found)
    return [_Found(path, name, False) for name, path in named]


def _examine(file: _Found) -> Document | str:
    """The document, or the reason for which the file is skipped; DataError if it was named."""
    if not stat.S_ISREG(_mode(file.path)):
        return "special"
    total, reason, mark = 0, "", 0
    with _open(file.path) as opened:
        status = os.fstat(opened.fileno())
        while not reason and (piece := opened.read(_READ_BYTES)):
            if not total:
                mark = len(codecs.BOM_UTF8) if piece.startswith(codecs.BOM_UTF8) else 0
                reason = _wide(piece)
            total += len(piece)
            reason = reason or ("binary" if b"\0" in piece else "")
    reason = reason or ("" if total > mark else "empty")
    if not reason:
        return Document(file.path, file.name, total, status.st_mtime_ns, mark)
    if file.named:
        raise _unfit(file.path, reason)
    return reason


def _wide(start: bytes) -> str:
    """utf-16 or utf-32 when a file's start has such a mark and is text of that encoding, not other
    data that begins with the same two bytes; else empty."""
    encoding = encoding_of(start[:4])
    try:
        text = codecs.getincrementaldecoder(encoding or "ascii")("strict").decode(start[: 1 << 16])
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else encoding.lower()


def _unfit(path: Path, reason: str) -> DataError:
    """A named file that cannot be a document."""
    what, fix = "the file holds NUL bytes: not a text", _use(STDLIB) + ", or a text file"
    if reason == "empty":
        what = "the file is empty"
    elif reason.startswith("utf"):
        what = f"the file is {reason.upper()} text, as its byte order mark says; UTF-8 is read"
        fix = f"iconv -f {reason.upper()} -t UTF-8 {path} > NEW.txt, then data.path=NEW.txt"
    return DataError(what, values={"data.path": str(path)}, fix=fix)


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(error) from error


def _mode(path: str | Path) -> int:
    """The file's mode; 0 when there is no such file (or only a link to nothing)."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
    except OSError as error:
        raise _unreadable(error) from error


def _refuse(error: OSError) -> None:
    raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    return DataError(
        f"the data cannot be read: {error.strerror}",
        values={"data.path": str(error.filename)},
        fix="grant this user the right to read it, or name another path",
    )


def _nothing(path_spec: str, skipped: dict[str, int]) -> DataError:
    return DataError(
        "there is no text to read here",
        values={"data.path": path_spec, **{k: n for k, n in skipped.items() if n}},
        fix=_use(STDLIB) + ", or a file or folder with text in it",
    )


def _missing(item: str, what: str = "there is no such file or folder") -> DataError:
    """Names the nearest name that exists, in the deepest folder of the path that does."""
    root, rest = Path(item), list[str]()
    while not root.is_dir():
        rest.insert(0, root.name)
        root = root.parent
    names = sorted(os.listdir(root)) if os.access(root, os.R_OK) else []
    near = difflib.get_close_matches(rest[0], names, n=1) if rest else []
    near_builtin = difflib.get_close_matches(item, BUILTINS, n=1)
    if near:
        fix = _use(root.joinpath(near[0], *rest[1:]))
    else:
        fix = _use(near_builtin[0]) if near_builtin else _use(STDLIB)
    return DataError(what, values={"data.path": item, "folder": str(root.absolute())}, fix=fix)


def _use(path: object) -> str:
    return f"data.path={path}"
