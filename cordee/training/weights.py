"""A run's weights: the checkpoint that a word means, its parameters, a module that holds them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from cordee.checkpoint.load import Checkpoint, find_newest, open_checkpoint
from cordee.data.manifest import read_info
from cordee.dist.streams import print_to_stderr
from cordee.errors import CheckpointError, ConfigError
from cordee.hf.model import empty_model, read_hub
from cordee.launcher.prepare import dataset_dir_of
from cordee.launcher.run_paths import checkpoint_folder, load_run, refuse_user_model
from cordee.model.transformer import Transformer

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


def load_trained_model(
    word: str, model: nn.Module | None = None, verb: str = "sample"
) -> tuple[nn.Module, int]:
    """The module of a run, or of one of its checkpoints, in eval mode on the CPU, and the step of
    its weights. `model`: the caller's own, to be filled. ConfigError: the weights are not those of
    that model."""
    checkpoint = open_weights(verb, word)
    if model is None:
        folder, run = load_run(verb, str(checkpoint.path.parent.parent))
        refuse_user_model(verb, folder)
        hub = read_hub(run.model.hub) if run.model.hub else None
        vocabulary = read_info(dataset_dir_of(run, folder)).vocabulary
        model = Transformer(run.model, vocabulary) if hub is None else empty_model(hub, "cpu")
    loaded = model.load_state_dict(read_parameters(checkpoint), strict=False)
    # A parameter of two names is stored under the first.
    stored_tensors = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
                      if name not in loaded.missing_keys}  # fmt: skip
    tensors = model.state_dict(keep_vars=True)
    missing_names = [n for n in loaded.missing_keys if id(tensors[n]) not in stored_tensors]
    if mismatched_names := [*loaded.unexpected_keys, *missing_names]:
        raise ConfigError(
            "the run's weights are not those of the model that its run.toml describes",
            values={"RUN": word, "tensor": mismatched_names[0], "differ": len(mismatched_names)},
            fix="cordee export, and a few lines with the model that made them",
        )
    return model.eval(), checkpoint.step


def _say_skipped(path: Path, reason: str) -> None:
    print_to_stderr(f"checkpoint {path.name} is passed over: it {reason}")


def _say_rejected(path: Path, reason: str) -> None:
    print_to_stderr(f"checkpoint {path.name} is rejected: {reason}")
