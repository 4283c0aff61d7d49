"""What the verbs that read weights share: opening the checkpoint that a word means."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cordee.checkpoint.load import Checkpoint, find_newest, open_checkpoint
from cordee.cli.run_paths import checkpoint_folder
from cordee.dist.streams import print_to_stderr
from cordee.errors import CheckpointError

MODEL_PREFIX = "model/"


def open_weights(verb: str, word: str | None) -> Checkpoint:
    """The named checkpoint, or the newest one of a run that verifies."""
    folder = checkpoint_folder(verb, word)
    if folder.name.startswith("step-"):
        return open_checkpoint(folder)
    checkpoint = find_newest(folder, _say_rejected, _say_skipped) if folder.is_dir() else None
    if checkpoint is None:
        raise CheckpointError(
            "the run has no complete checkpoint yet",
            values={"run": word or ""},
            fix="cordee train run.dir=... until its first checkpoint (checkpoint.every steps)",
        )
    return checkpoint


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """A parameter, whole; CheckpointError when it is not finite: such a model computes nothing."""
    tensor = checkpoint.read(MODEL_PREFIX + name)
    # Minus infinity may be a mask that a caller's model keeps.
    if tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any()):
        raise CheckpointError(
            "the checkpoint holds a parameter that is not finite",
            values={"checkpoint": checkpoint.path.name, "parameter": name},
            fix="another run.dir, with a lower optim.lr (cordee lr finds one)",
        )
    return tensor


def read_parameters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All parameters of a checkpoint, whole, by name."""
    names = [n.removeprefix(MODEL_PREFIX) for n in checkpoint.names() if n.startswith(MODEL_PREFIX)]
    return {name: read_parameter(checkpoint, name) for name in sorted(names)}


def _say_skipped(path: Path, reason: str) -> None:
    print_to_stderr(f"checkpoint {path.name} is passed over: it {reason}")


def _say_rejected(path: Path, reason: str) -> None:
    print_to_stderr(f"checkpoint {path.name} is rejected: {reason}")
