"""Unmodified causal language models of Hugging Face transformers.

They are built on the meta device; values come from the folder's files or, without files, from the
model's own initialisation, each unit drawn by a generator of (seed, unit). Code that a folder
brings and pickles are not supported. transformers is an extra and takes seconds to import, so it is
imported late, and only here.

Shape suffixes as in model/transformer.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cordee.config.run import MemorySettings
from cordee.errors import ConfigError
from cordee.hf.safetensors_io import HFFolder, open_folder, slice_box
from cordee.layout.slices import Box
from cordee.layout.tensors import TensorSpec, parameter_group
from cordee.model.init_weights import seeded_rng, tensor_seed
from cordee.model.layers import ActivationHook, identity, run_block
from cordee.model.loss import chunked_loss, summed_cross_entropy

InitialValues = Callable[[str, Box], Tensor]
"""(name, box) -> that part of a parameter's initial value, fp32 on the CPU."""

WEIGHT_DIMS: Mapping[str, int | None] = {
    "colwise": 0, "colwise_gather_output": 0, "colwise_rep": 0,
    "rowwise": 1, "rowwise_split_input": 1, "rowwise_rep": 1,
    "embedding_rowwise": 0, "embedding_colwise": 1,
    "replicate": None, "replicated_with_grad_allreduce": None,
}  # fmt: skip
"""Supported entries of transformers' tensor-parallel plans -> the dim of the weight that they cut
(they name the transposed matrix: colwise cuts outputs). Biases are cut with outputs only."""

LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings with which a model changes its head's product."""


@dataclass(frozen=True)
class HubSource:
    """A model as its folder describes it; `meta_model` is the whole one on the meta device."""

    folder: HFFolder
    meta_model: Any

    @cached_property
    def settings(self) -> Any:
        return self.meta_model.config.get_text_config()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; tokens of the data must be below it."""
        return int(self.settings.vocab_size)

    @cached_property
    def layer_names(self) -> Sequence[str]:
        """The decoder layers' modules, in order: the units of sharding."""
        class_names = set(self.meta_model._no_split_modules or ())
        for name, module in self.meta_model.named_modules():
            children = list(module.children()) if isinstance(module, nn.ModuleList) else []
            if children and all(type(child).__name__ in class_names for child in children):
                return tuple(f"{name}.{index}" for index in range(len(children)))
        return ()

    @cached_property
    def tp_plan(self) -> Mapping[str, str]:
        """The model's own tensor-parallel plan: module pattern (* is a number) -> entry."""
        return dict(self.meta_model.tp_plan or {})

    @cached_property
    def tied_parameters(self) -> Mapping[str, str]:
        """Second names of tied parameters -> their first names."""
        first_names: dict[int, str] = {}
        aliases = {}
        for name, parameter in self.meta_model.named_parameters(remove_duplicate=False):
            if first_names.setdefault(id(parameter), name) != name:
                aliases[name] = first_names[id(parameter)]
        return aliases

    @property
    def has_dropout(self) -> bool:
        return any(
            v > 0 for k, v in self.dropout_settings.items() if not k.startswith("classifier")
        )

    @property
    def dropout_settings(self) -> Mapping[str, float]:
        """The rates of all kinds of dropout, by setting."""
        items = self.settings.to_dict().items()
        return {k: v for k, v in items if "drop" in k and isinstance(v, int | float)}

    @property
    def needs_init(self) -> bool:
        return not self.folder.files

    def tp_entry(self, module: str) -> str | None:
        """The plan's entry for a module; None when the plan does not name it."""
        return self.tp_plan.get(pattern_of(module))

    def specs(self) -> list[TensorSpec]:
        """Every parameter, tied ones once, in the order of the model's own parameters."""
        specs, layer = [], -1
        for name, parameter in self.meta_model.named_parameters():
            layer_indices = [
                i for i, unit in enumerate(self.layer_names) if name.startswith(unit + ".")
            ]
            if layer_indices or layer >= 0:
                layer = layer_indices[0] if layer_indices else len(self.layer_names)
            group = parameter_group(name, parameter.ndim)
            specs.append(self._spec(name, tuple(parameter.shape), group, layer))
        return specs

    def initial_values(self, seed: int) -> InitialValues:
        """Initial values: the folder's files, else drawn from `seed`. Read them in the order of the
        parameters: one drawn unit is cached at a time."""
        return (
            _UnitInitialiser(self.meta_model, self.layer_names, seed)
            if self.needs_init
            else self.folder.read
        )

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer's value: from the files, else as the model's own initialisation makes it.
        ConfigError when it leaves one as it was before."""
        init_rule = self.meta_model._init_weights
        for path, module in self.meta_model.named_modules():
            names = [name for name, _ in module.named_buffers(recurse=False)]
            if not names:
                continue
            # Filled with 0 and with 1 before: what differs was not initialised.
            with seeded_rng(0, torch.device("cpu")):
                copies = [
                    _initialised_copy(module, init_rule, fill, recurse=False) for fill in (0, 1)
                ]
            for name in names:
                full_name = f"{path}.{name}".lstrip(".")
                if full_name in self.folder.files:
                    yield full_name, self.folder.read(full_name)
                    continue
                values = [dict(m.named_buffers(recurse=False))[name] for m in copies]
                if not torch.equal(values[0], values[1]):
                    raise ConfigError(
                        "the model's own rules do not make one of its buffers",
                        values={"model": type(self.meta_model).__name__, "buffer": full_name},
                        fix="another model: this one cannot be built without its whole memory",
                    )
                yield full_name, values[0]

    def _spec(self, name: str, shape: tuple[int, ...], group: str, layer: int) -> TensorSpec:
        module, _, leaf = name.rpartition(".")
        entry = self.tp_entry(module) or ""
        dim = WEIGHT_DIMS.get(entry)
        if leaf == "bias" and dim == 1:
            dim = None
        # Norms of heads see this rank's heads alone, so their gradients are parts of a sum.
        is_partial = dim is not None or entry == "replicated_with_grad_allreduce"
        return TensorSpec(
            name, shape, group, layer, tensor=dim, full_grad_axes=() if is_partial else ("tensor",)
        )


class HubModel(nn.Module):
    """A transformers model with `Transformer`'s interface; parameters have transformers' names.

    On the meta device until the caller writes values. Call `tie_weights` whenever parameters were
    replaced (shrinking, to_empty), and `reset_buffers` after to_empty.
    """

    def __init__(self, source: HubSource) -> None:
        super().__init__()
        model = copy.deepcopy(source.meta_model)
        if root_tensors := [
            n for n, _ in (*model.named_parameters(), *model.named_buffers()) if "." not in n
        ]:
            raise ConfigError(
                "the model keeps tensors outside of its modules",
                values={"model": type(model).__name__, "tensor": root_tensors[0]},
                fix="another model",
            )
        for name, child in model.named_children():
            self.add_module(name, child)
        self.source = source
        self.memory = MemorySettings()
        self.autocast: torch.dtype | None = None
        self.head_input_hook: ActivationHook = identity
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] = summed_cross_entropy
        # In a tuple, so that its modules are registered once, under transformers' own names.
        self._model = (model,)
        for index, layer in enumerate(self.parts()):
            layer.forward = partial(self._run_layer, index, layer.forward)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, key: int | Tensor = 0
    ) -> Tensor:
        """int64 [B, T] to logits fp32 [B, T, V]; with targets (-100 does not count) to their summed
        loss (nats). `key` seeds dropout."""
        with ExitStack() as contexts:
            if self.autocast is not None:
                contexts.enter_context(torch.autocast(tokens_BT.device.type, self.autocast))
            contexts.enter_context(self._dropout_rng(int(key), tokens_BT.device))
            return self._forward(tokens_BT, targets_BT)

    def parts(self) -> Iterator[nn.Module]:
        for name in self.source.layer_names:
            yield self.get_submodule(name)

    def tie_weights(self) -> None:
        """Makes tied parameters one object again after one of them was replaced."""
        for name, first_name in self.source.tied_parameters.items():
            module, _, leaf = name.rpartition(".")
            self.get_submodule(module)._parameters[leaf] = self.get_parameter(first_name)

    def reset_buffers(self) -> None:
        """Sets every buffer: `to_empty` leaves rotary frequencies uninitialised."""
        for name, value in self.source.buffers():
            module, _, leaf = name.rpartition(".")
            owner = self.get_submodule(module)
            buffer = owner._buffers[leaf]
            assert buffer is not None
            owner._buffers[leaf] = value.to(buffer.device, buffer.dtype)

    def _forward(self, tokens_BT: Tensor, targets_BT: Tensor | None) -> Tensor:
        model = self._model[0]
        model.training = self.training
        if targets_BT is not None and self.memory.loss_chunk:
            x_BTD = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            x_ND = self.head_input_hook(x_BTD).flatten(0, 1)
            head_VD = self._output_head().weight
            chunk, targets_N = self.memory.loss_chunk, targets_BT.flatten()
            return chunked_loss(x_ND, head_VD, targets_N, 0.0, chunk, self.cross_entropy)
        logits_BTV: Tensor = model(input_ids=tokens_BT, use_cache=False).logits.float()
        if targets_BT is None:
            return logits_BTV
        return summed_cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def _output_head(self) -> nn.Linear:
        """The output head; ConfigError when logits are not just its product."""
        head = self._model[0].get_output_embeddings()
        logit_settings = {k: getattr(self.source.settings, k, None) for k in LOGIT_SETTINGS}
        active_settings = {k: v for k, v in logit_settings.items() if v not in (None, 1, 1.0)}
        if type(head) is not nn.Linear or head.bias is not None or active_settings:
            raise ConfigError(
                "the loss by chunks needs a head that is a plain matrix",
                values={"head": type(head).__name__, **active_settings},
                fix="memory.loss_chunk=0",
            )
        return head

    def _run_layer(self, index: int, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run_block(self.memory, index, layer, *args, **kwargs)

    def _dropout_rng(self, key: int, device: torch.device) -> AbstractContextManager[Any]:
        drops_out = self.training and self.source.has_dropout
        return seeded_rng(key, device) if drops_out else nullcontext()


def pattern_of(name: str) -> str:
    """A name with numbers between dots as `*`, as transformers' plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def read_hub(path: str) -> HubSource:
    """The model in folder `path` (model.hub); nothing is downloaded and no code of it is run.

    ConfigError: no such folder, no causal language model, tensors that the files lack.
    """
    folder = open_folder(path, "model.hub")
    library = _import_transformers()
    try:
        config = library.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            meta_model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except _load_errors() as error:
        raise ConfigError(
            "transformers cannot make a causal language model of the folder",
            values={"model.hub": path, "transformers": library.__version__, "error": str(error)},
            fix="a folder whose config.json has a model_type that this version knows",
        ) from error
    source = HubSource(folder, meta_model)
    if bad_rates := {k: v for k, v in source.dropout_settings.items() if not 0 <= v <= 1}:
        raise ConfigError(
            "a part that is dropped lies in [0, 1]",
            values={"model.hub": path, **bad_rates},
            fix="config.json as the model's makers wrote it",
        )
    if not source.needs_init:
        shapes = {name: tuple(p.shape) for name, p in meta_model.named_parameters()}
        mismatches = [n for n, s in shapes.items() if n not in folder.files or folder.shape(n) != s]
        if mismatches:
            raise ConfigError(
                "the folder's weights are not those of its config.json",
                values={"model.hub": path, "tensor": mismatches[0], "wanted": shapes[mismatches[0]],
                        "differ": len(mismatches)},
                fix="save_pretrained of that very model; without weights they are drawn",
            )  # fmt: skip
        patterns = {pattern_of(name) for name in shapes}
        extra_names = [n for n in folder.files if n not in shapes and pattern_of(n) in patterns]
        if extra_names:
            raise ConfigError(
                "the folder's weights are of a larger model than its config.json tells",
                values={"model.hub": path, "tensor": extra_names[0], "more": len(extra_names)},
                fix="config.json and weights of one save_pretrained",
            )
    return source


def empty_model(source: HubSource, device: str) -> HubModel:
    """The whole model on `device`; its buffers have values, its parameters none."""
    model = HubModel(source).to_empty(device=device)
    model.tie_weights()
    model.reset_buffers()
    return model


class _UnitInitialiser:
    """Values by the model's own initialisation, a unit (a decoder layer, the embedding, ...) at a
    time, on the CPU, from a generator of (seed, unit), so that any layout gets the same."""

    def __init__(self, meta_model: Any, layers: Sequence[str], seed: int) -> None:
        self.meta_model = meta_model
        self.seed = seed
        self.unit_names = list(_unit_names("", meta_model, layers))
        self._cache: tuple[str, dict[str, Tensor]] = ("", {})

    def __call__(self, name: str, box: Box) -> Tensor:
        unit = next(u for u in self.unit_names if name.startswith(u + "."))
        if self._cache[0] != unit:
            with seeded_rng(tensor_seed(self.seed, unit), torch.device("cpu")):
                module = self.meta_model.get_submodule(unit)
                unit_module = _initialised_copy(
                    module, self.meta_model._init_weights, float("nan"), recurse=True
                )
            self._cache = (
                unit,
                {f"{unit}.{n}": p.detach() for n, p in unit_module.named_parameters()},
            )
        tensor = self._cache[1][name]
        if tensor.isnan().any():
            raise ConfigError(
                "the model's own rules do not start one of its parameters",
                values={"model": type(self.meta_model).__name__, "parameter": name},
                fix="a folder with weights",
            )
        return slice_box(tensor, box)


def _initialised_copy(
    module: nn.Module, rule: Callable[[nn.Module], Any], fill_value: float, recurse: bool
) -> Any:
    """A copy of `module` on the CPU, filled with `fill_value` and then initialised by `rule`
    (children first, each by the rule of the model that it belongs to)."""

    def init_recursively(submodule: nn.Module, rule: Callable[[nn.Module], Any]) -> None:
        for child in submodule.children() if recurse else ():
            init_recursively(child, getattr(child, "_init_weights", rule))
        rule(submodule)

    with torch.no_grad():
        new_module = copy.deepcopy(module).to_empty(device="cpu", recurse=recurse)
        for tensor in (*new_module.parameters(recurse), *new_module.buffers(recurse)):
            # NaN has no integer: those are filled with 0.
            tensor.fill_(fill_value if tensor.is_floating_point() else fill_value == 1.0)
        init_recursively(new_module, rule)
    return new_module


def _unit_names(path: str, module: nn.Module, layers: Sequence[str]) -> Iterator[str]:
    """Names of the layers and of the largest modules that contain none of them."""
    for name, child in module.named_children():
        full_name = f"{path}.{name}".lstrip(".")
        if full_name not in layers and any(layer.startswith(full_name + ".") for layer in layers):
            yield from _unit_names(full_name, child, layers)
        else:
            yield full_name


def _load_errors() -> tuple[type[Exception], ...]:
    """What the library raises for settings that no model can have."""
    errors = import_module("huggingface_hub.errors")
    strict: type[Exception] = getattr(errors, "StrictDataclassError", ValueError)
    return (strict, ArithmeticError, AttributeError, ImportError, LookupError, OSError,
            RuntimeError, TypeError, ValueError)  # fmt: skip


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "model.hub needs the package transformers",
            values={"error": str(error)},
            fix='pip install "cordee[hf]"',
        ) from error
    library: ModuleType = transformers
    return library
