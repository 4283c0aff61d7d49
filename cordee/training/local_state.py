"""The tensors of this rank: its parts of the model and of the optimiser's state.

What survives a restart beside them is listed in `checkpoint/train_state.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.load import Checkpoint
from cordee.checkpoint.train_state import LocalTensor, collect_local_tensors, make_reader
from cordee.dist.mesh import Mesh
from cordee.hf.safetensors_io import slice_box
from cordee.layout.axes import MODEL_AXES
from cordee.layout.slices import LocalSlice
from cordee.layout.tensors import TensorSpec
from cordee.optim.optimizer import Optimizers
from cordee.parallel.engine import Engine
from cordee.parallel.parallelize import make_local_slice


class LocalState:
    """Parameters, buffers and optimiser state that this rank holds, by name."""

    def __init__(self, engine: Engine, optimizer: Optimizers, mesh: Mesh) -> None:
        self._engine, self._optimizer, self._mesh = engine, optimizer, mesh
        self._model = engine.local_model

    @property
    def model_tensors(self) -> dict[str, Tensor]:
        """This rank's parts of what the model is: parameters, and buffers that survive."""
        return {**self._engine.parameters, **self._engine.buffers}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The whole model's tensors: parameters, and buffers that survive."""
        return {**self._model.all_specs, **self._model.buffer_specs}

    @property
    def slices(self) -> dict[str, LocalSlice]:
        """What this rank holds of each of its tensors, and who else holds the same."""
        specs = self.specs
        return {name: make_local_slice(specs[name], self._mesh) for name in self.model_tensors}

    def tensors(self, include_replicas: bool = False) -> list[LocalTensor]:
        """The tensors that survive and that this rank answers for; or all that it has."""
        return collect_local_tensors(
            self.model_tensors, self._optimizer.state_tensors(), self.slices, include_replicas
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """This rank's parts of a checkpoint; optimiser state that is not there stays."""
        read_local = make_reader(checkpoint, self.slices)
        with torch.no_grad():
            for name, tensor in self.model_tensors.items():
                tensor.copy_(read_local(f"model/{name}"))
        names = set(checkpoint.names())
        self._optimizer.load_state(
            lambda key: read_local(f"optim/{key}") if f"optim/{key}" in names else None
        )

    def full_tensor(self, name: str) -> Tensor:
        """A whole tensor of the model (every rank of the island must ask): parts are added as bits
        into zeros, so that they arrive as they are."""
        spec, mesh, local_part = self.specs[name], self._mesh, self.model_tensors.get(name)
        has_whole = local_part is not None and tuple(local_part.shape) == spec.shape
        if local_part is not None and has_whole and self._model.stages.ranks == 1:
            return local_part
        local_slice = make_local_slice(spec, mesh)
        result = torch.zeros(spec.shape, dtype=torch.float32, device=self._engine.device)
        is_replica = any(mesh.coords[a] for a in local_slice.replicated_axes if a in MODEL_AXES)
        if local_part is not None and not is_replica:
            slice_box(result, local_slice.box).copy_(local_part)
        dist.all_reduce(result.view(torch.int32), group=mesh.group(*MODEL_AXES))
        return result
