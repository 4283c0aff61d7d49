"""What the verbs that read weights share: opening the checkpoint that a word means."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cordee.checkpoint.load import Checkpoint, newest, open_checkpoint
from cordee.cli.arguments import say
from cordee.cli.places import checkpoint_folder
from cordee.errors import CheckpointError

PREFIX = "model/"


def open_weights(verb: str, word: str | None) -> Checkpoint:
    """The named checkpoint, or the newest one of a run that verifies."""
    folder = checkpoint_folder(verb, word)
    if folder.name.startswith("step-"):
        return open_checkpoint(folder)
    found = newest(folder, _tell, _pass_over) if folder.is_dir() else None
    if found is None:
        raise CheckpointError(
            "the run has no complete checkpoint yet",
            values={"run": word or ""},
            fix="cordee train run.dir=... until its first checkpoint (checkpoint.every steps)",
        )
    return found


def value(checkpoint: Checkpoint, name: str) -> Tensor:
    """A parameter, whole; CheckpointError when it is not finite: such a model computes nothing."""
    found = checkpoint.read(PREFIX + name)
    # Minus infinity may be a mask that a caller's model keeps.
    if found.is_floating_point() and bool((found.isnan() | found.isposinf()).any()):
        raise CheckpointError(
            "the checkpoint holds a parameter that is not finite",
            values={"checkpoint": checkpoint.path.name, "parameter": name},
            fix="another run.dir, with a lower optim.lr (cordee lr finds one)",
        )
    return found


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All parameters of a checkpoint, whole, by name."""
    names = [n.removeprefix(PREFIX) for n in checkpoint.names() if n.startswith(PREFIX)]
    return {name: value(checkpoint, name) for name in sorted(names)}


def _pass_over(path: Path, reason: str) -> None:
    say(f"checkpoint {path.name} is passed over: it {reason}")


def _tell(path: Path, reason: str) -> None:
    say(f"checkpoint {path.name} is rejected: {reason}")
