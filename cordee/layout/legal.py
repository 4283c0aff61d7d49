"""Why a layout cannot run a model: every rule, its values, and the nearest layout that keeps it.

Paper, before anything starts. Not here: whether it fits or is quick (`plan/`), and what no layout
could obey (`config/check.py`). Traded away: a fix that repairs everything at once; each repairs its
own rule, and following them one after another ends in a legal layout (a test holds that).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from cordee.config.model import ModelSettings
from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import INSIDE, Layout
from cordee.layout.census import ORIGIN, Census, model_census
from cordee.layout.stages import stage_count

CUT = ("pipeline", "context", "expert", "tensor")
"""Axes inside an island other than shard."""

FP8 = 16
"""What dims of fp8 products are multiples of (the library's kernels)."""
_HOUSE = (
    "model.heads", "model.kv_heads", "the MLP's hidden width (model.ffn)", "the vocabulary",
)  # fmt: skip
_HUB = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Broken:
    """A rule that a layout breaks. `why` follows "layout.AXIS=DEGREE" and is the same for every
    degree that breaks it, so that a table can name many degrees at once."""

    axis: str
    why: str
    reason: str
    repair: Callable[[], str]

    @property
    def fix(self) -> str:
        """The nearest value that keeps the rule, searched for when it is asked for."""
        return self.repair()


def problems(run: Run, layout: Layout, vocabulary: int = 256) -> list[tuple[str, str]]:
    """Why `run` cannot run on `layout`: (reason, nearest fix) pairs; empty when it can."""
    found = broken(run, layout, model_census(run.model, vocabulary))
    return [(rule.reason, rule.fix) for rule in found]


def broken(run: Run, layout: Layout, counted: Census) -> list[Broken]:
    """Every rule that `layout` breaks; those of the model come before those of the batch."""
    found = [*broken_alone(run, layout, counted), *_zero(run, layout), *_rows(run, layout)]
    return [*found, *_microbatches(run, layout), *_rounds(run, layout)]


def broken_alone(run: Run, layout: Layout, counted: Census) -> list[Broken]:
    """Those rules that a degree breaks whatever the other degrees are."""
    return [*_barred(run, layout), *_cut(run, layout, counted), *_pipeline(run, layout)]


def canonical(run: Run, layout: Layout) -> bool:
    """Whether gradients are added in canonical order, whole, over all that compute microbatches."""
    if any(getattr(layout, axis) > 1 for axis in CUT):
        return False
    replicated = run.data.placement == "replicate"
    if run.run.exact or (run.sync.protocol == "exchange" and not replicated):
        return True
    return run.sync.codec != "identity" and layout.workers > 1 and not replicated


def gathers_cast(run: Run, zero: int) -> bool:
    """Whether FSDP2 gathers parameters in the type of products (its mixed precision): with zero 2
    and 3, below fp32. Sums that are canonical keep zero 1, so exact runs gather fp32."""
    return zero > 1 and run.run.precision != "fp32"


def worker_microbatches(run: Run, layout: Layout) -> int:
    """Microbatches of the busiest worker; with replicated data every island has all of them."""
    if run.data.placement == "replicate":
        return run.batch.microbatches
    return -(-run.batch.microbatches // layout.workers)


def _barred(run: Run, layout: Layout) -> Iterator[Broken]:
    """What the run asks for and some axes cannot give at all."""
    cut = [axis for axis in INSIDE if getattr(layout, axis) > 1]
    for axis in cut:
        one = f"layout.{axis}=1"
        if run.data.placement == "replicate":
            why = "cuts islands, and replicated work is compared between whole islands of one rank"
            yield _rule(layout, axis, why, one)
        if run.run.exact and axis in CUT:
            why = "adds in an order of its own, so run.exact takes islands and shards only"
            yield _rule(layout, axis, why, one)
        if run.optim.name == "adafactor" and axis in ("shard", "tensor", "expert"):
            why = "cuts matrices, and adafactor keeps statistics of whole rows and columns"
            yield _rule(layout, axis, why, "optim.name=adamw")
        if run.model.hub and axis in CUT and (axis != "tensor" or run.layout.tensor == "auto"):
            why = "cuts the house's models; of transformers' shard does, and tensor where given"
            yield _rule(layout, axis, why, one)
        if run.model.kind != "transformer" and axis in CUT:
            why = "cuts transformers; classifiers are replicated or sharded"
            yield _rule(layout, axis, why, f"{one}, or layout.shard={getattr(layout, axis)}")
        yield from _split_units(run, layout, axis)


def _split_units(run: Run, layout: Layout, axis: str) -> Iterator[Broken]:
    """What must be seen whole to be clipped or dropped, and `axis` cuts."""
    moe = run.model.moe
    if run.clip.kind == "agc" and (axis == "tensor" or (axis == "shard" and moe.experts)):
        what = "rows of matrices" if axis == "tensor" else "experts"
        why = f"cuts {what}, which are the units that clip.kind=agc compares"
        yield _rule(layout, axis, why, f"clip.kind=norm, or layout.{axis}=1")
    if moe.experts and moe.capacity and axis in ("tensor", "context"):
        why = f"splits tokens, and would decide which of them model.moe.capacity={moe.capacity:g}"
        yield _rule(layout, axis, f"{why} drops", "model.moe.capacity=0")


def _cut(run: Run, layout: Layout, counted: Census) -> Iterator[Broken]:
    """Degrees that do not divide what they cut."""
    rules: Mapping[str, Callable[[int], str]] = {
        "tensor": lambda degree: _tensor(run, replace(layout, tensor=degree), counted),
        "context": lambda degree: _context(run, degree),
        "expert": lambda degree: _expert(run.model, degree),
        "shard": lambda degree: _shard(run, replace(layout, shard=degree), counted),
    }
    for axis, rule in rules.items():
        degree = getattr(layout, axis)
        if degree > 1 and (why := rule(degree)):
            fix = partial(_nearest, axis, degree, rule)
            yield Broken(axis, why, f"layout.{axis}={degree} {why}", fix)


def _tensor(run: Run, layout: Layout, counted: Census) -> str:
    model, degree = run.model, layout.tensor
    names = _HUB if model.hub else _HOUSE
    heads = (model.heads, model.kv_heads or model.heads)
    sizes = dict(zip(names, heads, strict=False))
    if not model.is_moe(0):
        sizes[names[2]] = model.hidden_width
    if model.is_moe(model.layers - 1) and model.moe.shared:
        shared = model.moe.shared * model.expert_width
        sizes["the shared experts' width (model.moe.shared x width)"] = shared
    sizes[names[3]] = counted.vocabulary
    for name, size in sizes.items():
        if size % degree:
            told = f"{name}, {size}" if " " in name else f"{name}={size}"
            return f"does not divide {told}"
    if run.run.precision == "fp8":
        widths = {"queries": model.query_width, "keys": model.kv_width, **_hidden(model)}
        for name, size in widths.items():
            if size // degree % FP8:
                return f"leaves {size // degree} of {size} {name}, and fp8 wants multiples of {FP8}"
    if model.hub:  # its stream is whole on every rank
        return ""
    chunks = 2 * layout.context if layout.context > 1 else 1
    if run.data.sequence % chunks == 0 and run.data.sequence % (chunks * degree):
        there = f" in {chunks} chunks" if chunks > 1 else ""
        return f"does not divide data.sequence={run.data.sequence}{there}"
    return ""


def _hidden(model: ModelSettings) -> dict[str, int]:
    """Hidden features that tensor ranks share, by what has them."""
    found = {} if model.is_moe(0) else {"hidden features": model.hidden_width}
    if model.is_moe(model.layers - 1) and model.moe.shared:
        found["hidden features of shared experts"] = model.moe.shared * model.expert_width
    return found


def _context(run: Run, degree: int) -> str:
    tokens = run.batch.microbatch * run.data.sequence // degree
    if run.data.sequence % (2 * degree) == 0:
        if run.run.precision == "fp8" and tokens % FP8:
            return f"leaves {tokens} tokens of a microbatch, and fp8 wants multiples of {FP8}"
        return ""
    return f"does not cut data.sequence={run.data.sequence} into 2 x context equal chunks"


def _expert(model: ModelSettings, degree: int) -> str:
    if not model.is_moe(model.layers - 1):
        return "cuts experts, and the model has no experts"
    experts = model.moe.experts
    return f"does not divide model.moe.experts={experts}" if experts % degree else ""


def _shard(run: Run, layout: Layout, counted: Census) -> str:
    """FSDP2 cuts dim 0 in chunks that may be uneven, but not empty here, and other dims evenly."""
    smallest, name = math.inf, ""
    alone = replace(layout, shard=1)
    for held in counted.held(alone, ORIGIN):
        spec = held.spec
        if spec.shard is None:
            continue
        rows = held.shape[spec.shard]
        if spec.shard and rows % layout.shard:
            what = "model.width" if spec.shape[spec.shard] == run.model.width else "an expert's"
            told = f"{what}={rows}" if what == "model.width" else f"{what} width, {rows}"
            return f"does not divide {told}, along which experts are sharded"
        if rows < smallest:
            smallest, name = rows, re.sub(r"^blocks\.\d+\.", "", spec.name)
    if layout.shard > smallest:
        # Ranks without a row of some tensor are legal for FSDP2, and waste.
        return f"exceeds the {smallest} rows of {name}: some ranks would hold no row"
    return ""


def _zero(run: Run, layout: Layout) -> Iterator[Broken]:
    """What `layout.zero` asks of layouts that cannot give it."""
    if run.layout.zero not in (2, 3):
        return
    asked = f"layout.zero={run.layout.zero}"
    if layout.pipeline > 1:
        why = f"keeps parameters and gradients whole over a schedule, which {asked} forbids"
        yield _rule(layout, "pipeline", why, "layout.zero=1")
    elif canonical(run, layout) and layout.shard > 1:
        why = f"keeps whole gradients where their order is canonical, which {asked} forbids"
        yield _rule(layout, "shard", why, "layout.zero=1")
    elif layout.size > 1 and layout.shard == 1 and run.memory.offload == "none":
        why = f"leaves nothing to {asked}"
        yield _rule(layout, "shard", why, "layout.zero=1, or layout.shard=2")


def _rows(run: Run, layout: Layout) -> Iterator[Broken]:
    """Norms whose order is canonical are summed by rows of dim 0, which experts' shards are not."""
    if run.model.moe.experts and layout.shard > 1 and canonical(run, layout):
        told = "run.exact" if run.run.exact else f"sync.codec={run.sync.codec}"
        if run.sync.protocol == "exchange" and not run.run.exact:
            told = "sync.protocol=exchange"
        why = f"cuts inside experts, whose norms {told} cannot add in canonical order"
        yield _rule(layout, "shard", why, "layout.shard=1")


def _pipeline(run: Run, layout: Layout) -> Iterator[Broken]:
    """Stages, and what their schedules cannot do."""
    if layout.pipeline == 1:
        return
    layers, settings = run.model.layers, run.layout
    if stage_count(settings, layout.pipeline) > layers:
        each = stage_count(settings, layout.pipeline) // layout.pipeline
        told = f", with {each} a rank ({settings.schedule})" if each > 1 else ""
        why = f"has more stages than model.layers={layers}{told}"
        yield _rule(layout, "pipeline", why, f"layout.pipeline={max(1, layers // each)}")
    if run.model.tied:
        why = "puts embedding and head on different ranks, and model.tied makes them one matrix"
        yield _rule(layout, "pipeline", why, "layout.pipeline=1, or model.tied=false")
    if settings.schedule == "zero_bubble":
        for key, value in (
            ("memory.recompute", run.memory.recompute),
            ("run.compile", run.run.compile),
        ):
            if value != "none":
                why = f"splits backwards under zero_bubble, which {key}={value} cannot"
                yield _rule(layout, "pipeline", why, f"{key}=none, or layout.schedule=1f1b")


def _rounds(run: Run, layout: Layout) -> Iterator[Broken]:
    """Microbatches of a worker that its pipeline's schedule cannot take."""
    total, ranks = run.batch.microbatches, layout.pipeline
    if ranks == 1 or total % layout.workers:
        return
    each = total // layout.workers
    near = rounded(run.layout, ranks, each)
    if near != each:
        one = run.layout.schedule == "1f1b"
        wants = "a microbatch of a worker for each rank" if one else "full rounds of microbatches"
        why = f"is given too few for {run.layout.schedule}, which wants {wants}"
        reason = f"layout.pipeline={ranks} is given {each} microbatches a worker, and"
        reason += f" {run.layout.schedule} wants {wants}"
        fix = f"batch.microbatches={near * layout.workers}, or layout.schedule=gpipe"
        yield Broken("pipeline", why, reason, fix.__str__)


def rounded(settings: LayoutSettings, ranks: int, microbatches: int) -> int:
    """The nearest number of microbatches, not below, that a pipeline of `ranks` can take.

    torch's 1F1B wants one for every stage; its interleaved schedule runs in max(1, m // ranks)
    rounds of equally many; GPipe and ZBV take any.
    """
    match settings.schedule:
        case "1f1b":
            return max(microbatches, ranks)
        case "interleaved":
            while microbatches % max(1, microbatches // ranks):
                microbatches += 1
    return microbatches


def _microbatches(run: Run, layout: Layout) -> Iterator[Broken]:
    """M microbatches that do not do for the workers."""
    if run.data.placement == "replicate":
        return
    total, workers = run.batch.microbatches, layout.workers
    if total < workers:
        reason = f"{total} microbatches cannot give work to {workers} workers ({layout.describe()})"
        fix = f"batch.microbatches={workers}, or at most {total} workers"
        yield Broken("workers", f"are more than batch.microbatches={total}", reason, fix.__str__)
    elif total % workers and any(getattr(layout, axis) > 1 for axis in INSIDE):
        near = -(-total // workers) * workers
        reason = (
            f"{total} microbatches do not divide over {workers} workers ({layout.describe()}), and"
            " the ranks of an island must compute equally many"
        )
        why = f"do not divide batch.microbatches={total}, as axes inside an island need"
        fix = f"batch.microbatches={near}"
        yield Broken("workers", why, reason, fix.__str__)


def _rule(layout: Layout, axis: str, why: str, fix: str) -> Broken:
    return Broken(axis, why, f"layout.{axis}={getattr(layout, axis)} {why}", fix.__str__)


def _nearest(axis: str, degree: int, rule: Callable[[int], str]) -> str:
    """The degree nearest to `degree` that keeps the rule, the lower of two; 1 always does."""
    for distance in range(1, degree - 1):
        for near in (degree - distance, degree + distance):
            if not rule(near):
                return f"layout.{axis}={near}"
    return f"layout.{axis}=1"
