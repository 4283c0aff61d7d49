"""Why a layout cannot run a model: every rule, its values, and the nearest layout that keeps it.

Each fix repairs its own rule; following one after another ends in a legal layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from cordee.config.model import ModelSettings
from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import MODEL_AXES, Layout
from cordee.layout.counts import ORIGIN, TensorCounts, count_model_tensors
from cordee.layout.stages import stage_count
from cordee.layout.tensors import CUT_AXES

NON_SHARD_AXES = tuple(axis for axis in MODEL_AXES if axis != "shard")

FP8_MULTIPLE = 16
"""What dims of fp8 products are multiples of (the library's kernels)."""
_SIZE_NAMES = (
    "model.heads", "model.kv_heads", "the MLP's hidden width (model.ffn)", "the vocabulary",
)  # fmt: skip
_HF_SIZE_NAMES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Violation:
    """A rule that a layout breaks. `clause` follows "layout.AXIS=DEGREE" and is the same for every
    degree that breaks it, so that a table can name many degrees at once."""

    axis: str
    clause: str
    reason: str
    find_fix: Callable[[], str]

    @property
    def fix(self) -> str:
        """The nearest value that keeps the rule, searched for when it is asked for."""
        return self.find_fix()


def violation_texts(run: Run, layout: Layout, vocabulary: int = 256) -> list[tuple[str, str]]:
    """Why `run` cannot run on `layout`: (reason, nearest fix) pairs; empty when it can."""
    rules = violations(run, layout, count_model_tensors(run.model, vocabulary))
    return [(rule.reason, rule.fix) for rule in rules]


def violations(run: Run, layout: Layout, tensor_counts: TensorCounts) -> list[Violation]:
    """Every rule that `layout` breaks; those of the model come before those of the batch."""
    return [
        *degree_violations(run, layout, tensor_counts),
        *_zero_violations(run, layout),
        *_expert_norm_violations(run, layout),
        *_microbatch_violations(run, layout),
        *_schedule_violations(run, layout),
    ]


def degree_violations(run: Run, layout: Layout, tensor_counts: TensorCounts) -> list[Violation]:
    """The rules that a degree breaks whatever the other degrees are."""
    return [
        *_unsupported_axes(run, layout),
        *_divisor_violations(run, layout, tensor_counts),
        *_pipeline_violations(run, layout),
    ]


def uses_canonical_order(run: Run, layout: Layout) -> bool:
    """Whether whole gradients are added in canonical order over all workers."""
    if any(getattr(layout, axis) > 1 for axis in NON_SHARD_AXES):
        return False
    is_replicated = run.data.placement == "replicate"
    if run.run.exact or (run.sync.protocol == "exchange" and not is_replicated):
        return True
    return run.sync.codec != "identity" and layout.dp_size > 1 and not is_replicated


def gathers_param_dtype(run: Run, zero: int) -> bool:
    """Whether FSDP2 gathers parameters in the type of products (its mixed precision): with zero 2
    and 3, below fp32. Sums that are canonical keep zero 1, so exact runs gather fp32."""
    return zero > 1 and run.run.precision != "fp32"


def rank_microbatches(run: Run, layout: Layout) -> int:
    """Microbatches of the worker with most; with replicated data every island has all of them."""
    if run.data.placement == "replicate":
        return run.batch.microbatches
    return -(-run.batch.microbatches // layout.dp_size)


def _unsupported_axes(run: Run, layout: Layout) -> Iterator[Violation]:
    """What the run asks for and some axes cannot give at all."""
    axes = [axis for axis in MODEL_AXES if getattr(layout, axis) > 1]
    for axis in axes:
        fix = f"layout.{axis}=1"
        if run.data.placement == "replicate":
            clause = (
                "cuts islands, and replicated work is compared between whole islands of one rank"
            )
            yield _violation(layout, axis, clause, fix)
        if run.run.exact and axis in NON_SHARD_AXES:
            clause = "adds in an order of its own, so run.exact takes islands and shards only"
            yield _violation(layout, axis, clause, fix)
        if axis in CUT_AXES and (reason := run.optim.rule.whole_matrix_reason):
            yield _violation(layout, axis, f"cuts matrices, and {reason}", "optim.name=adamw")
        if (
            run.model.hub
            and axis in NON_SHARD_AXES
            and (axis != "tensor" or run.layout.tensor == "auto")
        ):
            clause = "cuts the house's models; of transformers' shard does, and tensor where given"
            yield _violation(layout, axis, clause, fix)
        yield from _split_unit_violations(run, layout, axis)


def _split_unit_violations(run: Run, layout: Layout, axis: str) -> Iterator[Violation]:
    """Units of clipping, or of an expert's capacity, that `axis` cuts."""
    moe = run.model.moe
    if run.clip.kind == "agc" and (axis == "tensor" or (axis == "shard" and moe.experts)):
        units = "rows of matrices" if axis == "tensor" else "experts"
        clause = f"cuts {units}, which are the units that clip.kind=agc compares"
        yield _violation(layout, axis, clause, f"clip.kind=norm, or layout.{axis}=1")
    if moe.experts and moe.capacity and axis in ("tensor", "context"):
        setting = f"model.moe.capacity={moe.capacity:g}"
        clause = f"splits tokens, and would decide which of them {setting} drops"
        yield _violation(layout, axis, clause, "model.moe.capacity=0")


def _divisor_violations(
    run: Run, layout: Layout, tensor_counts: TensorCounts
) -> Iterator[Violation]:
    """Degrees that do not divide what they cut."""
    rules: Mapping[str, Callable[[int], str]] = {
        "tensor": lambda degree: _tensor_clause(run, replace(layout, tensor=degree), tensor_counts),
        "context": lambda degree: _context_clause(run, degree),
        "expert": lambda degree: _expert_clause(run.model, degree),
        "shard": lambda degree: _shard_clause(run, replace(layout, shard=degree), tensor_counts),
    }
    for axis, rule in rules.items():
        degree = getattr(layout, axis)
        if degree > 1 and (clause := rule(degree)):
            fix = partial(_nearest_fix, axis, degree, rule)
            yield Violation(axis, clause, f"layout.{axis}={degree} {clause}", fix)


def _tensor_clause(run: Run, layout: Layout, tensor_counts: TensorCounts) -> str:
    model, degree = run.model, layout.tensor
    names = _HF_SIZE_NAMES if model.hub else _SIZE_NAMES
    heads = (model.heads, model.kv_heads or model.heads)
    sizes = dict(zip(names, heads, strict=False))
    if not model.is_moe(0):
        sizes[names[2]] = model.hidden_width
    if model.is_moe(model.layers - 1) and model.moe.shared:
        shared_width = model.moe.shared * model.expert_width
        sizes["the shared experts' width (model.moe.shared x width)"] = shared_width
    sizes[names[3]] = tensor_counts.vocabulary
    for name, size in sizes.items():
        if size % degree:
            size_text = f"{name}, {size}" if " " in name else f"{name}={size}"
            return f"does not divide {size_text}"
    if run.run.precision == "fp8":
        widths = {"queries": model.query_width, "keys": model.kv_width, **_hidden_sizes(model)}
        for name, size in widths.items():
            if (part := size // degree) % FP8_MULTIPLE:
                return f"leaves {part} of {size} {name}, and fp8 wants multiples of {FP8_MULTIPLE}"
    if model.hub:  # its stream is whole on every rank
        return ""
    chunks = 2 * layout.context if layout.context > 1 else 1
    if run.data.sequence % chunks == 0 and run.data.sequence % (chunks * degree):
        chunks_text = f" in {chunks} chunks" if chunks > 1 else ""
        return f"does not divide data.sequence={run.data.sequence}{chunks_text}"
    return ""


def _hidden_sizes(model: ModelSettings) -> dict[str, int]:
    """Hidden features that tensor ranks share, by what has them."""
    sizes = {} if model.is_moe(0) else {"hidden features": model.hidden_width}
    if model.is_moe(model.layers - 1) and model.moe.shared:
        sizes["hidden features of shared experts"] = model.moe.shared * model.expert_width
    return sizes


def _context_clause(run: Run, degree: int) -> str:
    tokens = run.batch.microbatch * run.data.sequence // degree
    if run.data.sequence % (2 * degree) == 0:
        if run.run.precision == "fp8" and tokens % FP8_MULTIPLE:
            return (
                f"leaves {tokens} tokens of a microbatch, and fp8 wants multiples of {FP8_MULTIPLE}"
            )
        return ""
    return f"does not cut data.sequence={run.data.sequence} into 2 x context equal chunks"


def _expert_clause(model: ModelSettings, degree: int) -> str:
    if not model.is_moe(model.layers - 1):
        return "cuts experts, and the model has no experts"
    experts = model.moe.experts
    return f"does not divide model.moe.experts={experts}" if experts % degree else ""


def _shard_clause(run: Run, layout: Layout, tensor_counts: TensorCounts) -> str:
    """FSDP2 cuts dim 0 in chunks that may be uneven, but not empty here, and other dims evenly."""
    min_rows, name = math.inf, ""
    unsharded_layout = replace(layout, shard=1)
    for tensors in tensor_counts.rank_tensors(unsharded_layout, ORIGIN):
        spec = tensors.spec
        if spec.shard is None:
            continue
        rows = tensors.shape[spec.shard]
        if spec.shard and rows % layout.shard:
            is_width = spec.shape[spec.shard] == run.model.width
            width_text = f"model.width={rows}" if is_width else f"an expert's width, {rows}"
            return f"does not divide {width_text}, along which experts are sharded"
        if rows < min_rows:
            min_rows, name = rows, re.sub(r"^blocks\.\d+\.", "", spec.name)
    if layout.shard > min_rows:
        # FSDP2 would take ranks without a row of some tensor, but they are waste.
        return f"exceeds the {min_rows} rows of {name}: some ranks would hold no row"
    return ""


def _zero_violations(run: Run, layout: Layout) -> Iterator[Violation]:
    """Layouts on which layout.zero=2 or 3 cannot act."""
    if run.layout.zero not in (2, 3):
        return
    setting = f"layout.zero={run.layout.zero}"
    if layout.pipeline > 1:
        clause = f"keeps parameters and gradients whole over a schedule, which {setting} forbids"
        yield _violation(layout, "pipeline", clause, "layout.zero=1")
    elif uses_canonical_order(run, layout) and layout.shard > 1:
        clause = f"keeps whole gradients where their order is canonical, which {setting} forbids"
        yield _violation(layout, "shard", clause, "layout.zero=1")
    elif layout.size > 1 and layout.shard == 1 and run.memory.offload == "none":
        clause = f"leaves nothing to {setting}"
        yield _violation(layout, "shard", clause, "layout.zero=1, or layout.shard=2")


def _expert_norm_violations(run: Run, layout: Layout) -> Iterator[Violation]:
    """Norms in canonical order are summed by rows of dim 0; shards of experts are cut along dim
    1."""
    if run.model.moe.experts and layout.shard > 1 and uses_canonical_order(run, layout):
        setting = "run.exact" if run.run.exact else f"sync.codec={run.sync.codec}"
        if run.sync.protocol == "exchange" and not run.run.exact:
            setting = "sync.protocol=exchange"
        clause = f"cuts inside experts, whose norms {setting} cannot add in canonical order"
        yield _violation(layout, "shard", clause, "layout.shard=1")


def _pipeline_violations(run: Run, layout: Layout) -> Iterator[Violation]:
    """Stages, and what their schedules cannot do."""
    if layout.pipeline == 1:
        return
    layers, settings = run.model.layers, run.layout
    if stage_count(settings, layout.pipeline) > layers:
        stages_per_rank = stage_count(settings, layout.pipeline) // layout.pipeline
        clause = f"has more stages than model.layers={layers}"
        if stages_per_rank > 1:
            clause += f", with {stages_per_rank} a rank ({settings.schedule})"
        fix = f"layout.pipeline={max(1, layers // stages_per_rank)}"
        yield _violation(layout, "pipeline", clause, fix)
    if run.model.tied:
        clause = "puts embedding and head on different ranks, and model.tied makes them one matrix"
        yield _violation(layout, "pipeline", clause, "layout.pipeline=1, or model.tied=false")
    if settings.schedule == "zero_bubble":
        values = {"memory.recompute": run.memory.recompute, "run.compile": run.run.compile}
        for key, value in values.items():
            if value != "none":
                clause = f"splits backwards under zero_bubble, which {key}={value} cannot"
                yield _violation(layout, "pipeline", clause, f"{key}=none, or layout.schedule=1f1b")


def _schedule_violations(run: Run, layout: Layout) -> Iterator[Violation]:
    """Microbatches of a worker that its pipeline's schedule cannot take."""
    total, ranks = run.batch.microbatches, layout.pipeline
    if ranks == 1 or total % layout.dp_size:
        return
    microbatches = total // layout.dp_size
    nearest_count = round_microbatches(run.layout, ranks, microbatches)
    if nearest_count != microbatches:
        requirement = "full rounds of microbatches"
        if run.layout.schedule == "1f1b":
            requirement = "a microbatch of a worker for each rank"
        clause = f"is given too few for {run.layout.schedule}, which wants {requirement}"
        reason = f"layout.pipeline={ranks} is given {microbatches} microbatches a worker, and"
        reason += f" {run.layout.schedule} wants {requirement}"
        fix = f"batch.microbatches={nearest_count * layout.dp_size}, or layout.schedule=gpipe"
        yield Violation("pipeline", clause, reason, fix.__str__)


def round_microbatches(settings: LayoutSettings, ranks: int, microbatches: int) -> int:
    """The nearest number of microbatches, not below, that a pipeline of `ranks` can take.

    torch's 1F1B needs one for every stage; its interleaved schedule runs in max(1, m // ranks)
    rounds of equally many; GPipe and ZBV take any.
    """
    match settings.schedule:
        case "1f1b":
            return max(microbatches, ranks)
        case "interleaved":
            while microbatches % max(1, microbatches // ranks):
                microbatches += 1
    return microbatches


def _microbatch_violations(run: Run, layout: Layout) -> Iterator[Violation]:
    """M microbatches that are too few, or do not divide over the workers."""
    if run.data.placement == "replicate":
        return
    total, dp_size = run.batch.microbatches, layout.dp_size
    if total < dp_size:
        reason = f"{total} microbatches cannot give work to {dp_size} workers ({layout.describe()})"
        fix = f"batch.microbatches={dp_size}, or at most {total} workers"
        yield Violation("workers", f"are more than batch.microbatches={total}", reason, fix.__str__)
    elif total % dp_size and any(getattr(layout, axis) > 1 for axis in MODEL_AXES):
        nearest_count = -(-total // dp_size) * dp_size
        reason = (
            f"{total} microbatches do not divide over {dp_size} workers ({layout.describe()}), and"
            " the ranks of an island must compute equally many"
        )
        clause = f"do not divide batch.microbatches={total}, as axes inside an island need"
        fix = f"batch.microbatches={nearest_count}"
        yield Violation("workers", clause, reason, fix.__str__)


def _violation(layout: Layout, axis: str, clause: str, fix: str) -> Violation:
    return Violation(axis, clause, f"layout.{axis}={getattr(layout, axis)} {clause}", fix.__str__)


def _nearest_fix(axis: str, degree: int, rule: Callable[[int], str]) -> str:
    """The degree nearest to `degree` that keeps the rule, the lower of two; 1 always does."""
    for distance in range(1, degree - 1):
        for candidate in (degree - distance, degree + distance):
            if not rule(candidate):
                return f"layout.{axis}={candidate}"
    return f"layout.{axis}=1"
