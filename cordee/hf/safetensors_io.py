"""A transformers folder on disk: config.json and safetensors files, read by tensor and by part.

Needs neither transformers nor a network. Pickled weights (*.bin) run code when they are opened and
are refused; weights are written as fp32.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cordee.config.from_hf import CONFIG_FILE, read_config, read_json
from cordee.config.paths import make_temporary_path
from cordee.errors import ConfigError, DataError
from cordee.layout.slices import Box

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OTHER_WEIGHT_PATTERNS = (
    "*.safetensors", "*.h5", "*.msgpack", "*.gguf", "*.index.json", "*.incomplete", "*.part",
)  # fmt: skip
"""Other files that show that a folder has, or had, weights."""

COMPANION_PATTERNS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab*", "merges.txt", "chat_template*", "*.model",
)  # fmt: skip
"""Files that belong to a model besides its weights (a tokenizer, mostly)."""


@dataclass(frozen=True)
class HFFolder:
    """An opened folder. `files` maps each tensor to its file; empty without weights."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a tensor, read from its file's header."""
        return tuple(self._with_file(name, lambda file: file.get_slice(name).get_shape()))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A part of a tensor (all of it by default), fp32 on the CPU. DataError for a bad file."""
        if not box:
            tensor: Tensor = self._with_file(name, lambda file: file.get_tensor(name))
        else:
            slices = tuple(slice(start, stop) for start, stop in box)
            tensor = self._with_file(name, lambda file: file.get_slice(name)[slices])
        # Minus infinity is allowed: a buffer may be an attention mask.
        if tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any()):
            raise DataError(
                "a tensor of the folder is not finite",
                values={"file": str(self.path / self.files[name]), "tensor": name},
                fix="copy the file again from where it came",
            )
        return tensor.float()

    def _with_file(self, name: str, read: Callable[[Any], Any]) -> Any:
        if name not in self.files:
            raise DataError(
                "the folder has no such tensor", values={"folder": str(self.path), "tensor": name}
            )
        return _read_file(self.path / self.files[name], read, {"tensor": name})


def open_folder(path: str, key: str) -> HFFolder:
    """Reads config.json and finds the weights; ConfigError names `key`, which said `path`."""
    folder = Path(path)
    config = read_config(path, key)
    files: dict[str, str] = {}
    # lexists: an interrupted download may leave a link without a target.
    if os.path.lexists(folder / INDEX):
        index = read_json(folder / INDEX, {key: path})
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) and Path(f).name == f for f in weight_map.values()
        ):
            raise ConfigError(f"{INDEX} has no map from tensors to files", values={key: path})
        files = {str(name): file for name, file in weight_map.items()}
    elif os.path.lexists(folder / WEIGHTS):
        names = _read_file(folder / WEIGHTS, lambda file: list(file.keys()), {})
        files = dict.fromkeys(names, WEIGHTS)
    _refuse_other_weights(folder, set(files.values()), {key: path})
    missing_files = sorted({f for f in files.values() if not (folder / f).is_file()})
    if missing_files:
        raise ConfigError(
            "a file of weights that the index names is missing",
            values={key: path, "file": missing_files[0]},
            fix="copy all files of the folder",
        )
    return HFFolder(folder, config, files)


def _refuse_other_weights(folder: Path, own_files: Set[str], values: Mapping[str, str]) -> None:
    """ConfigError for weights in the folder that would be silently ignored: any, without
    `own_files`; else a second set under the names that transformers looks for."""
    stray_files = sorted(
        file.name
        for pattern in (*PICKLE_PATTERNS, *OTHER_WEIGHT_PATTERNS)
        for file in folder.glob(pattern)
        if file.name not in own_files
    )
    stray_safetensors = [name for name in stray_files if name.endswith(".safetensors")]
    if own_files:
        # Beside an index: the one file. Beside the one file: shards, whose index is lost.
        second_set = [
            name
            for name in stray_safetensors
            if name == WEIGHTS or (WEIGHTS in own_files and _is_shard(name))
        ]
        if second_set:
            raise ConfigError(
                "the folder holds two sets of weights",
                values={**values, "files": [min(own_files), second_set[0]]},
                fix="remove the set that is not meant",
            )
    elif stray_safetensors:
        raise ConfigError(
            f"the folder holds weights without {INDEX}, which says what is in which file",
            values={**values, "file": stray_safetensors[0], "files": len(stray_safetensors)},
            fix="copy all files of the folder, or remove these to start from drawn weights",
        )
    elif stray_files:
        raise ConfigError(
            "the folder holds weights as pickles, which run code when they are opened, or in a form"
            " that is not read",
            values={**values, "file": stray_files[0]},
            fix="save_pretrained(FOLDER) from transformers, which writes safetensors",
        )


def _is_shard(name: str) -> bool:
    """As in model-00001-of-00003.safetensors."""
    return re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) is not None


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    shard_bytes: int,
    companions: Sequence[Path] = (),
) -> int:
    """Writes config, weights (fp32, in files of at most `shard_bytes` and at least one tensor) and
    copies of the files `companions`; returns the bytes of the weights.

    One file's tensors are in memory at a time. The folder appears whole or not at all; ConfigError
    when it is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "the output exists already",
            values={"output": str(folder)},
            fix="--output with a folder that is new or empty",
        )
    folder = Path(os.path.realpath(folder))
    temp_folder = make_temporary_path(folder)
    try:
        temp_folder.mkdir(parents=True)
        size_bytes = _write_files(temp_folder, config, shapes, read, shard_bytes, companions)
        os.replace(temp_folder, folder)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the output cannot be written: {error}",
            values={"output": str(folder)},
            fix="--output with a folder that can be written, on a disk with room",
        ) from error
    finally:
        shutil.rmtree(temp_folder, ignore_errors=True)
    return size_bytes


def _write_files(
    temp_folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    shard_bytes: int,
    companions: Sequence[Path],
) -> int:
    shards = _split_into_files(
        {name: 4 * math.prod(shape) for name, shape in shapes.items()}, shard_bytes
    )
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).float().contiguous() for name in names}
        save_file(tensors, temp_folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size_bytes = sum(4 * math.prod(shape) for shape in shapes.values())
    if len(shards) > 1:
        _write_json(
            temp_folder / INDEX, {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        )
    _write_json(temp_folder / CONFIG_FILE, config)
    for companion in companions:
        shutil.copyfile(companion, temp_folder / companion.name)
    return size_bytes


def companion_files(folder: Path) -> list[Path]:
    return sorted(
        {file for pattern in COMPANION_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    )


def slice_box(tensor: Tensor, box: Box) -> Tensor:
    """The part of `tensor` in `box` (a view)."""
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def _split_into_files(sizes_bytes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, in files of at most `max_bytes` (a larger tensor has its own)."""
    shards: list[list[str]] = [[]]
    file_bytes = 0
    for name, size in sizes_bytes.items():
        if shards[-1] and file_bytes + size > max_bytes:
            shards.append([])
            file_bytes = 0
        shards[-1].append(name)
        file_bytes += size
    return shards


def _read_file(file: Path, read: Callable[[Any], Any], values: Mapping[str, str]) -> Any:
    try:
        with safe_open(file, framework="pt") as handle:
            return read(handle)
    except (OSError, SafetensorError) as error:
        raise DataError(
            "a file of weights cannot be read",
            values={"file": str(file), **values, "error": str(error)},
            fix="copy the file again from where it came",
        ) from error


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
