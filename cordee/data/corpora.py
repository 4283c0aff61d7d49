"""Where text comes from: the files that a specification names, and two corpora every machine has.

`builtin:stdlib` is Python's own library, `builtin:markov` a chain whose entropy rate is known. A
text is any file without a NUL byte; UTF-16 and UTF-32 are refused by their byte order marks.
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
BUILTINS = (STDLIB, MARKOV)
MARKOV_TOKENS = 4_000_000
MARKOV_SYMBOLS = 64

_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# Successors of a state and their chances in 256ths, three habits of unlike entropy.
_SUCCESSOR_COUNTS = ((200, 32, 16, 8), (160, 64, 24, 8), (120, 72, 40, 24))
_READ_BYTES = 16 << 20
_SKIP_REASONS = ("hidden", "binary", "empty", "special", "duplicate", "link", "utf-16", "utf-32")


@dataclass(frozen=True)
class Document:
    """A file that becomes a document. `name` is relative, so it moves with its folder; its first
    `bom_bytes` bytes are a byte order mark."""

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    bom_bytes: int = 0

    @property
    def text_bytes(self) -> int:
        """Bytes of the text, without the mark."""
        return self.bytes - self.bom_bytes


@dataclass(frozen=True)
class Corpus:
    """Documents in their order, and how many files were left out, by reason."""

    name: str
    documents: tuple[Document, ...]
    skip_counts: dict[str, int]


@dataclass(frozen=True)
class _CandidateFile:
    """A file that may become a document; refused when unfit if it was `is_explicit`, else
    skipped."""

    path: Path
    name: str
    is_explicit: bool


def stdlib_files() -> list[Path]:
    """The .py sources of this Python's standard library, sorted by path; tests and installed
    packages are left out. DataError when this Python comes without its sources."""
    root = sysconfig.get_path("stdlib")
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_FOLDERS]
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
    counts = _transition_counts(philox_words(seed, 0, 4 * symbols), symbols)
    draws = philox_words(seed, 1, -(-tokens // 8)).view(np.uint8)[:tokens].tobytes()
    states = np.arange(symbols, dtype=np.uint8)
    table = [np.repeat(states, row).tobytes() for row in counts]
    # A loop that cannot be vectorised (each step needs the last), run at 60 ns a token.
    chain = itertools.accumulate(draws, lambda state, draw: table[state][draw], initial=0)
    next(chain)
    return np.frombuffer(bytes(chain), dtype=np.uint8), _entropy_bits(counts)


def philox_words(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """Raw 64-bit words, little-endian: what NumPy keeps equal over versions and machines."""
    generator = np.random.Philox(key=seed % (1 << 64), counter=[0, 0, 0, stream])
    return generator.random_raw(count).astype("<u8")


def _transition_counts(words: NDArray[np.uint64], symbols: int) -> NDArray[np.int64]:
    """Counts out of 256, (symbols, symbols), each row summing to 256.

    Each state's most likely successor is its next on one ring through all states, so every state
    is reached; its least likely is itself, so the chain has no period.
    """
    draws = words.reshape(4, symbols)
    ring = np.argsort(draws[0], kind="stable")
    counts = np.zeros((symbols, symbols), dtype=np.int64)
    for position, state in enumerate(ring.tolist()):
        habit = int(draws[1, state] % np.uint64(len(_SUCCESSOR_COUNTS)))
        successors = (
            int(ring[(position + 1) % symbols]),
            int(draws[2, state] % np.uint64(symbols)),
            int(draws[3, state] % np.uint64(symbols)),
            state,
        )
        for successor, count in zip(successors, _SUCCESSOR_COUNTS[habit], strict=True):
            counts[state, successor] += count
    return counts


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    probabilities = counts / 256.0
    # pi P = pi and sum pi = 1: one equation of the first set follows from the others.
    system = probabilities.T - np.eye(len(counts))
    system[-1] = 1.0
    stationary = np.linalg.solve(system, np.eye(len(counts))[-1])
    logs = np.log2(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return round(float(-(stationary[:, None] * probabilities * logs).sum()), 9)


def find_corpus(path_spec: str) -> Corpus:
    """The documents that `path_spec` names: `builtin:stdlib`, or files, folders (recursive) and
    globs with commas between. In folders and globs, hidden files, files with NUL bytes, empty ones,
    UTF-16 and what is no file are skipped and counted, in a folder also a link to another folder,
    which may lead anywhere; a file seen twice counts once.

    Order: as named, and by relative name within a folder or glob. DataError for a path that does
    not exist or cannot be read, a named file that is empty or holds NUL bytes, or nothing to read.
    """
    name, files, skip_counts = _list_candidates(path_spec)
    documents, real_paths = [], set()
    for file in files:
        result = _read_document(file)
        if isinstance(result, str):
            skip_counts[result] += 1
        elif (real_path := os.path.realpath(file.path)) in real_paths:
            skip_counts["duplicate"] += 1
        else:
            real_paths.add(real_path)
            documents.append(result)
    if not documents:
        raise _empty_corpus_error(path_spec, skip_counts)
    return Corpus(name, tuple(documents), skip_counts)


def check_corpus(path_spec: str) -> None:
    """Raise what `find_corpus` would raise, reading no more than it must to know."""
    _, files, skip_counts = _list_candidates(path_spec)
    has_document = False
    for file in files:
        if has_document and not file.is_explicit:
            _open_file(file.path).close()
        elif isinstance(result := _read_document(file), str):
            skip_counts[result] += 1
        else:
            has_document = True
    if not has_document:
        raise _empty_corpus_error(path_spec, skip_counts)


def list_files(path_spec: str) -> list[Path]:
    """The files that `find_corpus` would look into, and those it reads; none for what is drawn."""
    return [] if path_spec == MARKOV else [file.path for file in _list_candidates(path_spec)[1]]


def _list_candidates(path_spec: str) -> tuple[str, list[_CandidateFile], dict[str, int]]:
    """Name of the corpus, its files, and counts of what was skipped so far."""
    skip_counts = dict.fromkeys(_SKIP_REASONS, 0)
    if path_spec == STDLIB:
        root = sysconfig.get_path("stdlib")
        files = [_CandidateFile(p, p.relative_to(root).as_posix(), False) for p in stdlib_files()]
        return "stdlib", files, skip_counts
    # A comma may be part of a name: what exists as it stands is one path.
    items = [item.strip() for item in path_spec.split(",") if item.strip()]
    items = [path_spec] if _file_mode(path_spec) else items
    if not items:
        raise _path_error("no data is named", path_spec, _fix_text(STDLIB))
    files = [file for item in items for file in _list_item(item, skip_counts)]
    name = Path(items[0]).absolute().stem
    return (name if len(items) == 1 else f"{name}+{len(items) - 1}"), files, skip_counts


def _list_item(item: str, skip_counts: dict[str, int]) -> list[_CandidateFile]:
    if item.startswith("builtin:"):
        problem = "a builtin source stands alone" if item in BUILTINS else "no such builtin source"
        nearest = difflib.get_close_matches(item, BUILTINS, n=1, cutoff=0.0)[0]
        raise _path_error(problem, item, _fix_text(nearest), known=BUILTINS)
    mode = _file_mode(item)
    if stat.S_ISDIR(mode):
        return _list_folder(Path(item), skip_counts)
    if stat.S_ISREG(mode):
        return [_CandidateFile(Path(item), Path(item).name, True)]
    if mode:
        problem = "the data path is neither a file nor a folder"
        raise _path_error(problem, item, "a file, a folder or a glob")
    if not glob.has_magic(item):
        raise _missing_error(item, "there is no such file or folder")
    # The part without wildcards is the root that names are relative to.
    root = Path(item)
    while glob.has_magic(str(root)):
        root = root.parent
    paths = [path for path in sorted(map(Path, _expand_glob(item))) if path.is_file()]
    if not paths:
        raise _missing_error(item, "no file matches this pattern")
    return [_CandidateFile(path, path.relative_to(root).as_posix(), False) for path in paths]


def _expand_glob(pattern: str) -> list[str]:
    """What a pattern matches, `**` being any folders, linked ones too, but not round in circles: of
    two links to a folder above them, the library's own would never come to an end."""
    segments = pattern.split("/")
    if "**" not in segments:
        return glob.glob(pattern)
    index = segments.index("**")
    base, rest_pattern = "/".join(segments[:index]), "/".join(segments[index + 1 :]) or "*"
    base_folders = glob.glob(base or "/") if index else [""]
    paths = []
    for base_folder in base_folders:
        for folder in _walk_folders(base_folder, ()):
            paths += _expand_glob(os.path.join(glob.escape(folder), rest_pattern))
    return paths


def _walk_folders(folder: str, ancestors: tuple[str, ...]) -> Iterator[str]:
    """A folder and all below it but hidden ones; `ancestors` are the real paths of those it is
    in."""
    real_path = os.path.realpath(folder)
    if real_path in ancestors or not os.path.isdir(folder or "."):
        return
    yield folder
    for name in sorted(os.listdir(folder or ".")) if os.access(folder or ".", os.R_OK) else ():
        if not name.startswith("."):
            yield from _walk_folders(os.path.join(folder, name), (*ancestors, real_path))


def _list_folder(root: Path, skip_counts: dict[str, int]) -> list[_CandidateFile]:
    files = []
    for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable):
        for entry_names in (subfolders, names):
            visible_names = [name for name in entry_names if not name.startswith(".")]
            skip_counts["hidden"] += len(entry_names) - len(visible_names)
            entry_names[:] = visible_names
        skip_counts["link"] += sum(os.path.islink(os.path.join(folder, n)) for n in subfolders)
        paths = [Path(folder, name) for name in names]
        files += [_CandidateFile(p, p.relative_to(root).as_posix(), False) for p in paths]
    return sorted(files, key=lambda file: (file.name, file.path))


def _read_document(file: _CandidateFile) -> Document | str:
    """The document, or the reason for which the file is skipped; DataError if it was named."""
    if not stat.S_ISREG(_file_mode(file.path)):
        return "special"
    size_bytes, reason, bom_bytes = 0, "", 0
    with _open_file(file.path) as stream:
        mtime_ns = os.fstat(stream.fileno()).st_mtime_ns
        while not reason and (block := stream.read(_READ_BYTES)):
            if not size_bytes:
                bom_bytes = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
                reason = _wide_encoding(block)
            size_bytes += len(block)
            reason = reason or ("binary" if b"\0" in block else "")
    reason = reason or ("" if size_bytes > bom_bytes else "empty")
    if not reason:
        return Document(file.path, file.name, size_bytes, mtime_ns, bom_bytes)
    if not file.is_explicit:
        return reason
    problem, fix = "the file holds NUL bytes: not a text", _fix_text(STDLIB) + ", or a text file"
    if reason == "empty":
        problem = "the file is empty"
    elif reason.startswith("utf"):
        encoding = reason.upper()
        problem = f"the file is {encoding} text, as its byte order mark says; UTF-8 is read"
        fix = f"iconv -f {encoding} -t UTF-8 {file.path} > NEW.txt, then data.path=NEW.txt"
    raise _path_error(problem, file.path, fix)


def _wide_encoding(first_bytes: bytes) -> str:
    """utf-16 or utf-32 when a file's start has such a mark and is text of that encoding, not other
    data that begins with the same two bytes; else empty."""
    encoding = encoding_of(first_bytes[:4])
    decoder = codecs.getincrementaldecoder(encoding or "ascii")("strict")
    try:
        text = decoder.decode(first_bytes[: 1 << 16])
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else encoding.lower()


def _open_file(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable_error(error) from error


def _file_mode(path: str | Path) -> int:
    """The file's mode; 0 when there is no such file (or only a link to nothing)."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
    except OSError as error:
        raise _unreadable_error(error) from error


# ---- refusals ------------------------------------------------------------------------------------


def _path_error(problem: str, path: object, fix: str, **values: object) -> DataError:
    return DataError(problem, values={"data.path": str(path), **values}, fix=fix)


def _unreadable_error(error: OSError) -> DataError:
    fix = "grant this user the right to read it, or name another path"
    return _path_error(f"the data cannot be read: {error.strerror}", error.filename, fix)


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable_error(error) from error


def _empty_corpus_error(path_spec: str, skip_counts: dict[str, int]) -> DataError:
    fix = _fix_text(STDLIB) + ", or a file or folder with text in it"
    skipped = {reason: count for reason, count in skip_counts.items() if count}
    return _path_error("there is no text to read here", path_spec, fix, **skipped)


def _missing_error(item: str, problem: str) -> DataError:
    """Names the nearest name that exists, in the deepest folder of the path that does."""
    root, missing_parts = Path(item), list[str]()
    while not root.is_dir():
        missing_parts.insert(0, root.name)
        root = root.parent
    names = sorted(os.listdir(root)) if os.access(root, os.R_OK) else []
    close_names = difflib.get_close_matches(missing_parts[0], names, n=1) if missing_parts else []
    nearest: object = (*difflib.get_close_matches(item, BUILTINS, n=1), STDLIB)[0]
    if close_names:
        nearest = root.joinpath(close_names[0], *missing_parts[1:])
    return _path_error(problem, item, _fix_text(nearest), folder=str(root.absolute()))


def _fix_text(path: object) -> str:
    return f"data.path={path}"
