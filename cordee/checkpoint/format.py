"""What is on disk: names of folders and files, pieces of tensors, checksums, the signed manifest.

A folder `step-00000020.g3` holds safetensors files and `manifest.json`; it is complete exactly when
the manifest is there. No torch here: the process that starts ranks looks into folders too.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import xxhash

from cordee.errors import CheckpointError
from cordee.layout.slices import Box, first_coverage_error, full_box

FORMAT = "cordee-checkpoint-2"
MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20
JSON_LIMIT_BYTES = 64 << 20  # room for about half a million pieces
HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses longer ones
ELEMENTS_LIMIT = 1 << 59  # of a tensor, empty dims counted as one; its bytes fit in 63 bits
CUT_DIMS_LIMIT = 4  # along which one piece may be cut (layouts cut 3); checking costs 2**dims
MAX_GENERATION = 10**15
"""No run was started so often: a larger number in a folder's name is not counted on from."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
     "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
)  # fmt: skip
"""The dtypes that are stored, by their safetensors codes, and the bytes of one element."""

_FOLDER_NAME = re.compile(r"step-([0-9]{8,18})\.g([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class StepFolder:
    """What has a checkpoint's name in a run's folder. `problem` says why it is no complete
    checkpoint; it is empty for a folder with a manifest, verified or not."""

    step: int
    generation: int
    path: Path
    is_folder: bool
    problem: str = ""

    @property
    def is_complete(self) -> bool:
        return not self.problem


def folder_name(step: int, generation: int) -> str:
    """`step-00000020.g3`; a generation never writes where another one wrote."""
    return f"step-{step:08d}.g{generation}"


def scan_step_folders(folder: Path) -> list[StepFolder]:
    """Newest (step, generation) first; links are listed and not followed. OSError."""
    step_folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match, path = _FOLDER_NAME.fullmatch(entry.name), folder / entry.name
            if not match:
                continue
            problem, is_folder = "", entry.is_dir(follow_symlinks=False)
            if entry.is_symlink():
                problem = "is a link, and links are not followed"
            elif not is_folder:
                problem = "is not a folder"
            elif not os.path.lexists(path / MANIFEST):
                problem = f"has no {MANIFEST}: its save did not end, or the file is gone"
            step, generation = int(match[1]), int(match[2])
            step_folders.append(
                StepFolder(step=step, generation=generation, path=path, is_folder=is_folder,
                           problem=problem)
            )  # fmt: skip
    return sorted(step_folders, key=lambda f: (f.step, f.generation), reverse=True)


def list_generations(folder: Path) -> list[int]:
    """Generations in the names of checkpoints, complete or not; [] where there is no folder."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    numbers = [int(match[2]) for match in map(_FOLDER_NAME.fullmatch, names) if match]
    return [number for number in numbers if number <= MAX_GENERATION]


@dataclass(frozen=True, kw_only=True)
class PieceEntry:
    """A box of a tensor: `dtype` is a safetensors code, `shape` the whole tensor's, `size` the
    piece's, which begins at `start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def box(self) -> Box:
        return tuple(
            (begin, begin + size) for begin, size in zip(self.start, self.size, strict=True)
        )

    @property
    def is_empty(self) -> bool:
        """No element, although its tensor has some."""
        return not math.prod(self.size) and bool(math.prod(self.shape))

    @property
    def size_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.size)

    @property
    def key(self) -> str:
        """The name inside the file: `name`, or `name#0,128` if it is not the whole tensor."""
        if self.size == self.shape:
            return self.name
        return f"{self.name}#{','.join(str(index) for index in self.start)}"

    @property
    def sort_key(self) -> tuple[int, str, tuple[int, ...]]:
        # Wide dtypes first, so that all data of a file is aligned without holes.
        return (-ITEM_BYTES[self.dtype], self.name, self.start)

    def __post_init__(self) -> None:
        """ValueError for entries that no writer of ours makes."""
        if not self.name.isprintable() or "#" in self.name or self.name in ("", "__metadata__"):
            raise ValueError(f"{self.name[:80]!r} cannot be a tensor's name")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name}: a dtype that is not one of {', '.join(ITEM_BYTES)}")
        elements = math.prod(max(dim, 1) for dim in self.shape[:64])
        if len(self.shape) > 64 or min(self.shape, default=0) < 0 or elements > ELEMENTS_LIMIT:
            raise ValueError(f"{self.name[:80]}: an impossible shape")
        if not len(self.start) == len(self.size) == len(self.shape):
            raise ValueError(f"{self.name}: start, size and shape differ in dims")
        if min(self.start + self.size, default=0) < 0 or any(
            stop > size for (_, stop), size in zip(self.box, self.shape, strict=True)
        ):
            raise ValueError(f"{self.name}: a piece outside the tensor's {list(self.shape)}")
        cut_dims = sum(
            span != dim for span, dim in zip(self.box, full_box(self.shape), strict=True)
        )
        if cut_dims > CUT_DIMS_LIMIT:
            raise ValueError(
                f"{self.name}: cut along {cut_dims} dims; the limit is {CUT_DIMS_LIMIT}"
            )


class FileLayout(NamedTuple):
    """The start of a file (length word and header), where each piece begins, the file's size."""

    header: bytes
    offsets_bytes: list[int]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One safetensors file: its size, the xxh3-128 of each 8 MiB, its pieces in file order.

    The fields are the keys of the JSON.
    """

    file: str
    bytes: int
    chunks: tuple[str, ...]
    pieces: tuple[PieceEntry, ...]

    @functools.cached_property
    def file_layout(self) -> FileLayout:
        return make_file_layout(self.pieces)


@dataclass(frozen=True)
class PieceLocation:
    """A piece, and where its bytes begin in its file."""

    entry: PieceEntry
    file: str
    offset_bytes: int


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def part_file_name(rank: int) -> str:
    """The file in which a rank lists what it wrote, until the manifest has it."""
    return f"rank-{rank:05d}.json"


def chunk_checksum(blocks: Iterable[memoryview]) -> str:
    """xxh3-128 of one chunk, 32 hex digits; hashing releases the interpreter lock."""
    hasher = xxhash.xxh3_128()
    for block in blocks:
        hasher.update(block)
    return hasher.hexdigest()


def make_file_layout(pieces: Sequence[PieceEntry]) -> FileLayout:
    """The file that holds these pieces, which are in file order; offsets count from its start.

    A file must have exactly this header, so that no header from outside is ever parsed. ValueError
    if the pieces are not in order, if a key comes twice, or if the header is longer than the
    safetensors library reads.
    """
    if any(a.sort_key >= b.sort_key for a, b in itertools.pairwise(pieces)):
        raise ValueError("pieces out of order, or one of them twice")
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += piece.size_bytes
        offsets = [starts[-1], end]
        table[piece.key] = {"dtype": piece.dtype, "shape": piece.size, "data_offsets": offsets}
    if len(table) != len(pieces) + 1:
        raise ValueError("two pieces with one key")
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES:
        raise ValueError(f"a header of {len(text)} bytes; the limit is {HEADER_LIMIT_BYTES}")
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, [len(header) + start for start in starts], len(header) + end)


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII. ValueError for NaN, TypeError
    for what is not JSON, RecursionError for what is nested too deeply."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def encode_checked_json(body: Mapping[str, Any]) -> bytes:
    sha256 = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({"format": FORMAT, "sha256": sha256, "body": body})


def decode_checked_json(raw: bytes) -> object:
    """The body; ValueError unless `raw` is, byte for byte, what `encode_checked_json` makes."""
    try:
        document = json.loads(raw.decode("ascii"))
        format_name, sha256, body = parse_fields(
            document, {"format": str, "sha256": str, "body": dict}
        )
        if format_name != FORMAT:
            raise ValueError(
                f"has the format {format_name[:40]!r}, and this version reads {FORMAT!r};"
                " the version that wrote it still reads it"
            )
        if hashlib.sha256(canonical_json(body)).hexdigest() != sha256:
            raise ValueError("the SHA-256 does not match its content")
        # Finds flipped bits that mean the same to a JSON reader (1e5 and 1E5).
        if canonical_json(document) != raw:
            raise ValueError("not in canonical form")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return body


def parse_fields(value: object, field_types: Mapping[str, type]) -> list[Any]:
    """The values of a JSON object; ValueError unless its keys and types are exactly these."""
    if type(value) is not dict or value.keys() != field_types.keys():
        raise ValueError(f"expected an object with exactly {', '.join(field_types)}")
    for key, field_type in field_types.items():
        if type(value[key]) is not field_type:
            raise ValueError(f"{key} is not of type {field_type.__name__}")
    return [value[key] for key in field_types]


def parse_file_entry(value: object) -> FileEntry:
    """A file entry out of JSON, consistent in itself. ValueError says what is wrong."""
    field_types = {"file": str, "bytes": int, "chunks": list, "pieces": list}
    name, size_bytes, chunks, pieces = parse_fields(value, field_types)
    if not re.fullmatch(r"rank-[0-9]{5,9}\.safetensors", name):
        raise ValueError(f"{name[:80]!r} is not a plain file name of a writer")
    field_types = {"name": str, "dtype": str, "shape": list, "start": list, "size": list}
    entries = []
    for piece in pieces:
        tensor_name, dtype, *numbers = parse_fields(piece, field_types)
        if any(type(number) is not int for number in itertools.chain(*numbers)):
            raise ValueError(f"{name}: a shape, start or size that is not whole numbers")
        shape, start, size = map(tuple, numbers)
        entries.append(
            PieceEntry(name=tensor_name, dtype=dtype, shape=shape, start=start, size=size)
        )
    if not all(type(chunk) is str and len(chunk) == 32 for chunk in chunks):
        raise ValueError(f"{name}: a checksum that is not 32 hex digits")
    file_entry = FileEntry(file=name, bytes=size_bytes, chunks=tuple(chunks), pieces=tuple(entries))
    if file_entry.file_layout.size_bytes != size_bytes or len(chunks) != -(
        -size_bytes // CHUNK_BYTES
    ):
        raise ValueError(f"{name}: size, chunks and pieces contradict each other")
    return file_entry


def locate_pieces(files: Iterable[FileEntry]) -> dict[str, list[PieceLocation]]:
    """Where the pieces of each tensor are. ValueError unless each element is held once."""
    locations_by_name: dict[str, list[PieceLocation]] = {}
    file_names: set[str] = set()
    for file_entry in files:
        if file_entry.file in file_names:
            raise ValueError(f"{file_entry.file} is listed twice")
        file_names.add(file_entry.file)
        for entry, offset_bytes in zip(
            file_entry.pieces, file_entry.file_layout.offsets_bytes, strict=True
        ):
            locations_by_name.setdefault(entry.name, []).append(
                PieceLocation(entry, file_entry.file, offset_bytes)
            )
    for name, locations in locations_by_name.items():
        first = locations[0].entry
        if any((p.entry.dtype, p.entry.shape) != (first.dtype, first.shape) for p in locations):
            raise ValueError(f"{name}: its pieces differ in dtype or global shape")
        fault = first_coverage_error((p.entry.box for p in locations), first.shape)
        if fault:
            index, count_text = list(fault[0]), f"held {fault[1]} times" if fault[1] else "missing"
            raise ValueError(
                f"{name}: the element at {index} of {list(first.shape)} is {count_text}"
            )
    return locations_by_name


def open_regular_file(path: Path) -> io.FileIO:
    """Opens a regular file to read, without following a link or waiting on a pipe. OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = io.FileIO(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "not a regular file", str(path))
    return file


def read_checked_json(path: Path) -> Any:
    """The body of a file of `encode_checked_json`; CheckpointError names the file and its fault."""
    try:
        with io.BufferedReader(open_regular_file(path)) as file:
            raw = file.read(JSON_LIMIT_BYTES + 1)
        if len(raw) > JSON_LIMIT_BYTES:
            raise ValueError(f"longer than {JSON_LIMIT_BYTES} bytes")
        return decode_checked_json(raw)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error.strerror or error}", values={"file": str(path)}
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {error}", values={"file": str(path)}) from error
