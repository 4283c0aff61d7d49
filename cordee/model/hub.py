"""Unmodified causal language models of Hugging Face transformers, trained like the house's own.

The library is imported here alone, late: it costs seconds and is an extra. Its models are built on
the meta device; numbers come from the folder's files or, without files, from the model's own rules,
each unit drawn by a generator of (seed, unit). Not here: how a plan's cuts talk (`parallel/seams`),
the house's transformer in transformers' clothes (`equivalent.py`). Traded away: code that a folder
brings, pickles, and models whose files name tensors otherwise than their modules do.

Shape suffixes as in transformer.py.
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
from cordee.layout.boxes import Box
from cordee.layout.tensors import TensorSpec, group_of
from cordee.model.folder import Folder, cut, open_folder
from cordee.model.initial import seeded, tensor_seed
from cordee.model.loss import chunked_loss, summed_cross_entropy
from cordee.model.recompute import run_block
from cordee.model.span import Seam, same

Values = Callable[[str, Box], Tensor]
"""(name, box) -> that part of a parameter's value at the start, fp32 on the CPU."""

WEIGHT_DIMS: Mapping[str, int | None] = {
    "colwise": 0, "colwise_gather_output": 0, "colwise_rep": 0,
    "rowwise": 1, "rowwise_split_input": 1, "rowwise_rep": 1,
    "embedding_rowwise": 0, "embedding_colwise": 1,
    "replicate": None, "replicated_with_grad_allreduce": None,
}  # fmt: skip
"""Entries of transformers' tensor-parallel plans that are understood -> dim of the weight they cut
(they name the transposed matrix: colwise cuts outputs). Biases are cut with outputs only."""

LOGIT_KNOBS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which a model changes its head's product."""


@dataclass(frozen=True)
class Hub:
    """A model as its folder describes it: `plain` is whole, unmodified and on the meta device."""

    folder: Folder
    plain: Any

    @cached_property
    def settings(self) -> Any:
        """transformers' configuration of the text model."""
        return self.plain.config.get_text_config()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; tokens of the data must be below it."""
        return int(self.settings.vocab_size)

    @cached_property
    def layers(self) -> Sequence[str]:
        """Names of the decoder layers' modules, in order: the units of sharding."""
        kinds = set(self.plain._no_split_modules or ())
        for name, module in self.plain.named_modules():
            inside = list(module.children()) if isinstance(module, nn.ModuleList) else []
            if inside and all(type(child).__name__ in kinds for child in inside):
                return tuple(f"{name}.{place}" for place in range(len(inside)))
        return ()

    @cached_property
    def plan(self) -> Mapping[str, str]:
        """The model's own tensor-parallel plan: module pattern (* is a number) -> entry."""
        return dict(self.plain.tp_plan or {})

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """Names of parameters that are another one under a second name -> the first name."""
        first: dict[int, str] = {}
        found = {}
        for name, parameter in self.plain.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                found[name] = first[id(parameter)]
        return found

    @property
    def dropout(self) -> bool:
        """Whether the model drops anything while it trains."""
        return any(v > 0 for k, v in self.drops.items() if not k.startswith("classifier"))

    @property
    def drops(self) -> Mapping[str, float]:
        """The settings that say how much is dropped, and where."""
        found = self.settings.to_dict().items()
        return {k: v for k, v in found if "drop" in k and isinstance(v, int | float)}

    @property
    def drawn(self) -> bool:
        """Whether the folder has no weights, so that values are drawn."""
        return not self.folder.files

    def entry(self, module: str) -> str | None:
        """The plan's entry for a module; None when the plan does not name it."""
        return self.plan.get(pattern_of(module))

    def specs(self) -> list[TensorSpec]:
        """Every parameter, tied ones once, in the order of the model's own parameters."""
        found, layer = [], -1
        for name, parameter in self.plain.named_parameters():
            inside = [i for i, unit in enumerate(self.layers) if name.startswith(unit + ".")]
            if inside or layer >= 0:
                layer = inside[0] if inside else len(self.layers)
            group = group_of(name, parameter.ndim)
            found.append(self._spec(name, tuple(parameter.shape), group, layer))
        return found

    def values(self, seed: int) -> Values:
        """Where parameters start: the folder's files, else drawn from `seed`. Ask in order of the
        parameters: a drawn unit is held until the next one is asked for."""
        return _Drawn(self.plain, self.layers, seed) if self.drawn else self.folder.read

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer with its right value: from the files, else as the model's own rules make
        it. ConfigError when they leave one as it was found."""
        rule = self.plain._init_weights
        for path, module in self.plain.named_modules():
            names = [name for name, _ in module.named_buffers(recurse=False)]
            if not names:
                continue
            with seeded(0, torch.device("cpu")):
                made = [_started(module, rule, fill, recurse=False) for fill in (0, 1)]
            for name in names:
                full = f"{path}.{name}".lstrip(".")
                if full in self.folder.files:
                    yield full, self.folder.read(full)
                    continue
                values = [dict(m.named_buffers(recurse=False))[name] for m in made]
                if not torch.equal(values[0], values[1]):
                    raise ConfigError(
                        "the model's own rules do not make one of its buffers",
                        values={"model": type(self.plain).__name__, "buffer": full},
                        fix="another model: this one cannot be built without its whole memory",
                    )
                yield full, values[0]

    def _spec(self, name: str, shape: tuple[int, ...], group: str, layer: int) -> TensorSpec:
        module, _, leaf = name.rpartition(".")
        entry = self.entry(module) or ""
        dim = WEIGHT_DIMS.get(entry)
        if leaf == "bias" and dim == 1:
            dim = None
        # Norms of heads see this rank's heads alone: their gradients are parts of a sum.
        parts = dim is not None or entry == "replicated_with_grad_allreduce"
        return TensorSpec(
            name, shape, group, layer, tensor=dim, complete=() if parts else ("tensor",)
        )


class HubModel(nn.Module):
    """A transformers model with the house's interface; parameters have transformers' names.

    On the meta device until the caller writes numbers. Call `retie` whenever parameters were
    replaced (narrowing, to_empty), and `remake_buffers` after to_empty. `memory`, `autocast` and
    the seams are those of `Transformer`.
    """

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        model = copy.deepcopy(hub.plain)
        if own := [
            n for n, _ in (*model.named_parameters(), *model.named_buffers()) if "." not in n
        ]:
            raise ConfigError(
                "the model keeps tensors outside of its modules",
                values={"model": type(model).__name__, "tensor": own[0]},
                fix="another model",
            )
        for name, child in model.named_children():
            self.add_module(name, child)
        self.source = hub
        self.memory = MemorySettings()
        self.autocast: torch.dtype | None = None
        self.enter: Seam = same
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] = summed_cross_entropy
        # In a tuple, so that its modules are registered once, under transformers' own names.
        self._whole = (model,)
        for place, layer in enumerate(self.parts()):
            layer.forward = partial(self._recomputed, place, layer.forward)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, key: int | Tensor = 0
    ) -> Tensor:
        """int64 [B, T] to logits fp32 [B, T, V]; with targets (-100 does not count) to their summed
        loss (nats). `key` decides what dropout drops."""
        with ExitStack() as around:
            if self.autocast is not None:
                around.enter_context(torch.autocast(tokens_BT.device.type, self.autocast))
            around.enter_context(self._dropped(int(key), tokens_BT.device))
            return self._forward(tokens_BT, targets_BT)

    def parts(self) -> Iterator[nn.Module]:
        """The decoder layers, in order: units of sharding, recomputing and compiling."""
        for name in self.source.layers:
            yield self.get_submodule(name)

    def retie(self) -> None:
        """Makes tied parameters one object again; replacing a parameter parts it from its twin."""
        for name, first in self.source.ties.items():
            module, _, leaf = name.rpartition(".")
            self.get_submodule(module)._parameters[leaf] = self.get_parameter(first)

    def remake_buffers(self) -> None:
        """Gives every buffer its value: `to_empty` leaves garbage in rotary frequencies."""
        for name, value in self.source.buffers():
            module, _, leaf = name.rpartition(".")
            owner = self.get_submodule(module)
            held = owner._buffers[leaf]
            assert held is not None
            owner._buffers[leaf] = value.to(held.device, held.dtype)

    def _forward(self, tokens_BT: Tensor, targets_BT: Tensor | None) -> Tensor:
        model = self._whole[0]
        model.training = self.training
        if targets_BT is not None and self.memory.loss_chunk:
            x_BTD = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            x_ND = self.enter(x_BTD).flatten(0, 1)
            head_VD = self._head().weight
            chunk, targets_N = self.memory.loss_chunk, targets_BT.flatten()
            return chunked_loss(x_ND, head_VD, targets_N, 0.0, chunk, self.cross_entropy)
        logits_BTV: Tensor = model(input_ids=tokens_BT, use_cache=False).logits.float()
        if targets_BT is None:
            return logits_BTV
        return summed_cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def _head(self) -> nn.Linear:
        """The output head; ConfigError when logits are more than its product."""
        head = self._whole[0].get_output_embeddings()
        knobs = {k: getattr(self.source.settings, k, None) for k in LOGIT_KNOBS}
        changed = {k: v for k, v in knobs.items() if v not in (None, 1, 1.0)}
        if type(head) is not nn.Linear or head.bias is not None or changed:
            raise ConfigError(
                "the loss by chunks needs a head that is a plain matrix",
                values={"head": type(head).__name__, **changed},
                fix="memory.loss_chunk=0",
            )
        return head

    def _recomputed(self, place: int, layer: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return run_block(self.memory, place, layer, *args, **named)

    def _dropped(self, key: int, device: torch.device) -> AbstractContextManager[Any]:
        drops = self.training and self.source.dropout
        return seeded(key, device) if drops else nullcontext()


def pattern_of(name: str) -> str:
    """A name with numbers between dots as `*`, as transformers' plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def read_hub(path: str) -> Hub:
    """The model in folder `path` (model.hub); nothing is downloaded and no code of it is run.

    ConfigError: no such folder, no causal language model, tensors that the files lack.
    """
    folder = open_folder(path, "model.hub")
    library = _transformers()
    try:
        config = library.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            plain = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except _refusals() as error:
        raise ConfigError(
            "transformers cannot make a causal language model of the folder",
            values={"model.hub": path, "transformers": library.__version__, "error": str(error)},
            fix="a folder whose config.json has a model_type that this version knows",
        ) from error
    hub = Hub(folder, plain)
    if odd_drops := {k: v for k, v in hub.drops.items() if not 0 <= v <= 1}:
        raise ConfigError(
            "a part that is dropped lies in [0, 1]",
            values={"model.hub": path, **odd_drops},
            fix="config.json as the model's makers wrote it",
        )
    if not hub.drawn:
        wanted = {name: tuple(p.shape) for name, p in plain.named_parameters()}
        odd = [n for n, s in wanted.items() if n not in folder.files or folder.shape(n) != s]
        if odd:
            raise ConfigError(
                "the folder's weights are not those of its config.json",
                values={"model.hub": path, "tensor": odd[0], "wanted": wanted[odd[0]],
                        "differ": len(odd)},
                fix="save_pretrained of that very model; without weights they are drawn",
            )  # fmt: skip
        patterns = {pattern_of(name) for name in wanted}
        more = [n for n in folder.files if n not in wanted and pattern_of(n) in patterns]
        if more:
            raise ConfigError(
                "the folder's weights are of a larger model than its config.json tells",
                values={"model.hub": path, "tensor": more[0], "more": len(more)},
                fix="config.json and weights of one save_pretrained",
            )
    return hub


def empty_model(hub: Hub, device: str) -> HubModel:
    """The uncut model on `device`: buffers have their values, parameters wait for theirs."""
    model = HubModel(hub).to_empty(device=device)
    model.retie()
    model.remake_buffers()
    return model


class _Drawn:
    """Values by the model's own rules: a unit (a decoder layer, the embedding, ...) at a time, on
    the CPU, from a generator of (seed, unit), so that any layout gets the same numbers."""

    def __init__(self, plain: Any, layers: Sequence[str], seed: int) -> None:
        self.plain = plain
        self.seed = seed
        self.units = list(_units("", plain, layers))
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def __call__(self, name: str, box: Box) -> Tensor:
        unit = next(u for u in self.units if name.startswith(u + "."))
        if self._held[0] != unit:
            with seeded(tensor_seed(self.seed, unit), torch.device("cpu")):
                module = self.plain.get_submodule(unit)
                made = _started(module, self.plain._init_weights, float("nan"), recurse=True)
            self._held = unit, {f"{unit}.{n}": p.detach() for n, p in made.named_parameters()}
        whole = self._held[1][name]
        if whole.isnan().any():
            raise ConfigError(
                "the model's own rules do not start one of its parameters",
                values={"model": type(self.plain).__name__, "parameter": name},
                fix="a folder with weights",
            )
        return cut(whole, box)


def _started(
    module: nn.Module, rule: Callable[[nn.Module], Any], fill: float, recurse: bool
) -> Any:
    """A copy of `module` on the CPU, filled and then started by the model's `rule`s (children
    first, each by the rule of the model it belongs to)."""

    def start(part: nn.Module, rule: Callable[[nn.Module], Any]) -> None:
        for child in part.children() if recurse else ():
            start(child, getattr(child, "_init_weights", rule))
        rule(part)

    with torch.no_grad():
        made = copy.deepcopy(module).to_empty(device="cpu", recurse=recurse)
        for tensor in (*made.parameters(recurse), *made.buffers(recurse)):
            tensor.fill_(fill if tensor.is_floating_point() else bool(fill == fill and fill))
        start(made, rule)
    return made


def _units(path: str, module: nn.Module, layers: Sequence[str]) -> Iterator[str]:
    """Names of the layers and of the largest modules beside them."""
    for name, child in module.named_children():
        full = f"{path}.{name}".lstrip(".")
        if full not in layers and any(layer.startswith(full + ".") for layer in layers):
            yield from _units(full, child, layers)
        else:
            yield full


def _refusals() -> tuple[type[Exception], ...]:
    """What the library raises for settings that no model can have: whatever its sums run into."""
    errors = import_module("huggingface_hub.errors")
    strict: type[Exception] = getattr(errors, "StrictDataclassError", ValueError)
    return (strict, ArithmeticError, AttributeError, ImportError, LookupError, OSError,
            RuntimeError, TypeError, ValueError)  # fmt: skip


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "model.hub needs the package transformers",
            values={"error": str(error)},
            fix='pip install "cordee[hf]"',
        ) from error
    found: ModuleType = transformers
    return found
