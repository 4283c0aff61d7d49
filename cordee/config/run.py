"""Every knob of a run: a tree of frozen dataclasses, a sentence and a range at each field.

Units are in the names; 0 means "no limit" or "off" where the sentence says so. What is "auto" and
depends on devices is resolved by the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cordee.config.model import InitialSettings, ModelSettings
from cordee.config.ranges import (
    DEGREE,
    MAX_COUNT,
    MAX_DIM,
    MAX_LAYERS,
    Auto,
    AutoFloat,
    Count,
    Degree,
    Fraction,
    Limit,
    Part,
    Range,
)
from cordee.config.update_rules import UPDATE_RULES, RuleName, UpdateRule

FAULT_POINTS = (
    "step.start", "step.forward", "step.backward", "step.reduce", "step.agree", "step.update",
    "step.commit", "evaluate", "finish", "group", "build", "fill", "fill.round", "fill.end",
    "copy.begin", "copy.send", "copy.sent", "copy.end", "save.stage", "save.write", "save.part",
    "save.manifest", "save.rename", "save.delete",
)  # fmt: skip
"""Where a drill can strike (training/fault_injection.py)."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """The one seed: initial parameters, order of samples and dropout are functions of it."""
    steps: Count = 0
    """Stop after this many optimiser steps; 0 means no limit by steps."""
    tokens: Annotated[int, Range(0, 1000 * MAX_COUNT)] = 0
    """Stop once this many training tokens were used; 0 means no limit by tokens."""
    epochs: Annotated[int, Range(0, 10**6)] = 0
    """Stop with the step that completes so many passes over the training samples (of a mixture: as
    many samples as its sources have together); 0 means no limit. What is over in that step is taken
    from the next pass, as steps are whole."""
    minutes: Annotated[float, Range(0, 1e8)] = 0.0
    """Stop after this many minutes of training; 0 means no limit by time (1.5 when no limit is
    given at all). The learning-rate schedule follows the limit that is nearest."""
    dir: str = ""
    """Folder of the run (default runs/<name>): metrics, events, checkpoints, report."""
    name: str = ""
    """Name of the run; the default is the model preset's name."""
    exact: bool = False
    """Same bits on any number of processes: canonical order of summation, one thread per rank."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Arithmetic of forward and backward; parameters, gradients and sums stay fp32. auto is the
    fastest that the device has instructions for, by the machine's profile; a run keeps what it
    began with. fp16 scales the loss; fp8 multiplies the blocks' matrices in fp8 (devices that have
    it) and the rest in bf16."""
    arithmetic: Literal["auto", "native", "avx2", "compatible"] = "auto"
    """Instructions a CPU computes with, and so its last bits. native: its own best. avx2: AVX2
    on all, on whose bits Intel's agree. compatible: code without a maker's own choices, for unlike
    x86 processors with AVX2, products 3 to 4 times as slow. auto: avx2 in exact fp32 runs where
    nothing is lost by it, else native. avx2 and compatible need run.precision=fp32."""
    loss_scale: Annotated[int, Range(0, 2**24)] = 0
    """fp16 only: 0 finds the scale (65,536 at first, halved by an overflow, doubled after 2,000
    good steps); a power of two stays as it is."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile of every block (slow first step, fast ones after, other last bits)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: the same command again goes on from the newest complete checkpoint; never: refuse."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    path: str = "builtin:stdlib"
    """builtin:stdlib, builtin:markov, a prepared folder, or files, folders and globs of text
    separated by commas. Semicolons between such sources make a mixture, drawn by data.weights. In
    a file also an array of sources, or [[data.sources]] tables of a path and a weight."""
    weights: str = ""
    """How often each source of a mixture is drawn, as numbers with commas ("7,3"); empty: by size.
    Refused without a mixture."""
    sequence: Annotated[int, Range(1, 2**30)] = 256
    """Tokens a training sequence has."""
    held_out: Fraction = 0.1
    """Fraction held out for evaluation: whole files when there are ten or more, else each tail."""
    placement: Literal["partition", "replicate"] = "partition"
    """partition: each island computes its microbatches; replicate: every island computes all of
    them and the islands compare digests instead of adding (a check on the hardware)."""
    tokens: Annotated[int, Range(0, 10**9)] = 0
    """Size of a synthetic source in tokens; 0 means its default. No effect on text."""
    prefetch: Annotated[int, Range(0, 1)] = 0
    """1: a background thread reads the next step ahead (cold files, GPUs); 0 reads in line."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    microbatch: Annotated[int, Range(1, MAX_DIM)] = 2
    """Sequences in a microbatch, the atom of work."""
    microbatches: Annotated[int, Range(1, 2**20)] = 4
    """M: microbatches in a step, whatever the number of devices."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    recompute: Literal["none", "selective", "full"] = "none"
    """What a block keeps for its backward: everything, its input and matrix products, or its input
    alone; the rest is computed again (the same bits, more time)."""
    recompute_every: Annotated[int, Range(1, MAX_LAYERS)] = 1
    """One of every so many blocks is recomputed; the others keep everything."""
    loss_chunk: Count = 0
    """Positions whose logits are held at once; 0: those of a whole microbatch."""
    offload: Literal["none", "parameters"] = "none"
    """parameters: parameters, gradients and optimiser state live in the host's memory, and the
    update is computed there (accelerators only)."""

    def recomputes(self, block: int) -> bool:
        """Whether block number `block` runs its forward again in the backward."""
        return self.recompute != "none" and block % self.recompute_every == 0


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    name: RuleName = "muon"
    """The update rule; muon uses adamw for embedding, head and vectors."""
    lr: Annotated[AutoFloat, Range(0, 1e6, excludes_minimum=True)] = "auto"
    """Peak learning rate; auto is the rule's own default (`cordee lr` finds one by experiment)."""
    adam_lr: Annotated[float, Range(0, 1e6)] = 0.02
    """Peak learning rate of the adamw part of muon."""
    weight_decay: Annotated[float, Range(0, 1e3)] = 0.0
    """Decoupled weight decay (adamw, muon, adafactor) or L2 penalty (sgd, momentum, adam); on
    matrices only."""
    momentum: Fraction = 0.95
    """Momentum of momentum and muon."""
    beta1: Fraction = 0.9
    """Decay of the first moment (adam family)."""
    beta2: Fraction = 0.95
    """Decay of the second moment (adam family)."""
    eps: Annotated[float, Range(0, 1, excludes_minimum=True)] = 1e-8
    """Added to the denominator (adam family)."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "wsd"
    """Learning rate over the run: wsd is warm-up, stable, then linear decay."""
    warmup: Part = 0.02
    """Part of the run, from its start, over which the rate rises linearly from 0."""
    decay: Part = 0.6
    """wsd: part of the run, at its end, over which the rate falls."""
    final: Part = 0.0
    """Learning rate at the end as a part of the peak."""

    @property
    def rule(self) -> UpdateRule:
        """The row of the table that `name` stands for."""
        return UPDATE_RULES[self.name]

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: as given, or the rule's default."""
        return self.rule.default_lr if self.lr == "auto" else float(self.lr)


@dataclass(frozen=True, kw_only=True)
class ParameterLimit:
    value: Limit = 0.0
    """After each update, clamp every element to [-value, value]; 0 turns it off."""
    norm: Limit = 0.0
    """After each update, scale each tensor down to this Euclidean norm; 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    kind: Literal["norm", "value", "agc", "normalise", "none"] = "norm"
    """Gradients: scale to a global norm, clamp elements, adaptive per unit (AGC, Brock et al.
    2021), always scale to norm 1, or leave."""
    limit: Annotated[float, Range(0, 1e9, excludes_minimum=True)] = 1.0
    """Largest norm (norm), element (value), or ratio of gradient to parameter norm (agc: 0.01)."""
    matrices: ParameterLimit = field(default_factory=ParameterLimit)
    """Limits on weight matrices."""
    embeddings: ParameterLimit = field(default_factory=ParameterLimit)
    """Limits on the embedding and the head."""
    vectors: ParameterLimit = field(default_factory=ParameterLimit)
    """Limits on vectors (gains of norms, biases)."""


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    islands: Degree = "auto"
    """Copies of the model; auto is processes / product of the other axes."""
    shard: Degree = "auto"
    """Ranks of an island over which parameters and optimiser are sharded (FSDP2)."""
    tensor: Degree = "auto"
    """Ranks that split each matrix."""
    pipeline: Degree = "auto"
    """Stages of layers."""
    context: Degree = "auto"
    """Ranks that split a sequence."""
    expert: Degree = "auto"
    """Ranks that split the experts."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of a pipeline's work: all forwards then all backwards, one of each in turn, several
    stages a rank in turn, or backwards split so that weights fill the gaps (Qi et al. 2023)."""
    chunks: Annotated[int, DEGREE] = 2
    """Stages a rank has under interleaved; zero_bubble always has two, the others one."""
    attention: Literal["gather", "ring"] = "gather"
    """How a split sequence attends: gather all keys and values, or pass them round (Liu 2023)."""
    zero: Literal["auto", 1, 2, 3] = "auto"
    """What shard ranks keep whole between uses: 1 parameters and gradients, 2 parameters, 3 nothing
    (ZeRO, Rajbhandari et al. 2020). auto: the first that fits. Below fp32, 2 and 3 gather in the
    type of products: half the bytes, and no copy of the whole island in that type."""
    balance: bool = True
    """Islands that take longer for a microbatch compute fewer of them, as measured while the run
    goes. The sums stay the same bits wherever their order is canonical (run.exact, the exchange);
    else their last bits change with the shares. Pipelines keep equal shares."""


@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    protocol: Literal["auto", "exchange", "allreduce"] = "auto"
    """How islands agree on gradients: the exchange in canonical order, or the library's fused
    all-reduce (faster, bits depend on the number of islands; refused by run.exact)."""
    codec: Literal["identity", "bf16"] = "identity"
    """How gradients are written on the wire; bf16 halves the bytes and rounds."""
    every: Annotated[int, Range(1, MAX_COUNT)] = 1
    """Islands agree every so many steps; only 1 in this version."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    processes: Degree = "auto"
    """Ranks started on this machine; auto is what the plan ranks first."""
    threads: Annotated[Auto, Range(1, 4096)] = "auto"
    """CPU threads of a rank; auto shares the cores, 1 under run.exact."""
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    """Where ranks of this host compute, by torch's name (cuda is ROCm's too); auto is an
    accelerator that torch here is built for, if there is one. Hosts of one run may differ in it
    unless run.exact."""
    timeout_s: Annotated[float, Range(1, 1e7)] = 300.0
    """A collective that waits longer than this has failed."""
    fork_server: bool = True
    """Workers are forks of one process that has imported torch, so that a new one computes at once;
    false: each imports for itself, as with accelerators and on macOS, where forks are not safe."""
    probe: bool = True
    """Measure this machine the first time that a plan needs it (`cordee probe` measures anew);
    false (--no-probe): without a kept profile, take the processor's flags."""
    listen: str = ""
    """HOST:PORT where other hosts may join this run (--listen); empty: nobody may."""
    join: str = ""
    """HOST:PORT of any host of a run that this host joins with its ranks (--join)."""
    secret: str = ""
    """File (mode 0600) with the secret that hosts share (--secret); empty: `secret` in run.dir."""
    register: str = "folder"
    """Where several hosts keep the newest generation, by compare-and-swap: folder is a file in
    run.dir; etcd://HOST:PORT[,HOST:PORT] is an etcd cluster (3.4 or newer, plain HTTP)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every: Count = 200
    """Steps between checkpoints; 0 means only at the end."""
    keep: Annotated[int, Range(1, 10**6)] = 2
    """Newest complete checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    in_a_row: Annotated[int, Range(1, 10**6)] = 5
    """Steps dropped in a row for a non-finite loss or gradient after which the run stops."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    every: Count = 0
    """Steps between evaluations on held-out data; 0 means only at the end."""
    tokens: Annotated[Auto, Range(0, MAX_COUNT)] = "auto"
    """Held-out tokens an evaluation uses at most; 0 means none. auto: 262144, or fewer where they
    would take more than a twentieth of a run that is limited by time."""
    sample: Annotated[Auto, Range(0, 10**6)] = "auto"
    """Tokens of text sampled at the end; 0 means none. auto: 240, or fewer likewise."""
    layers_every: Count = 10
    """Steps between records of the gradient norm per layer; 0 means never."""


@dataclass(frozen=True, kw_only=True)
class FaultSettings:
    recover: bool = True
    """Go on with the ranks that are left, and replace the others; false: the first death ends the
    run (only runs that start their own ranks can recover)."""
    spares: Annotated[int, Range(0, 64)] = 1
    """Warm spare processes of a host: imported and idle, they take a dead rank's place at once."""
    copy_every: Count = 20
    """Steps between copies of what only one rank holds (islands that are cut) into the memory of a
    neighbour, on another host if there is one; 0 makes none. Each takes host memory for the rank's
    state and for its neighbour's, twice while it is made."""
    silence_s: Annotated[float, Range(1, 1e7)] = 5.0
    """A rank or host that is not heard for so long is taken for dead (a shorter limit follows from
    the heartbeats that were seen)."""
    host_silence_s: Annotated[float, Range(0, 86400)] = 0.0
    """A host that is not heard for so long is gone at the earliest: ten round trips between hosts,
    and longer than a busy machine forgets a process for. Longer gaps between its heartbeats raise
    it, up to fault.silence_s. 0: 3 s, or fault.silence_s where that is less."""
    tries: Annotated[int, Range(1, 10**6)] = 3
    """Failures in a row, with no step committed between them, after which the run stops."""
    kill: str = ""
    """Drill: `point:step:rank` at which that rank kills itself (points: step.start, step.forward,
    step.backward, step.reduce, step.agree, step.update, step.commit, evaluate, finish, group, fill,
    fill.round, fill.end, copy.begin, copy.send, copy.sent, copy.end, save.stage, save.write,
    save.part, save.manifest, save.rename, save.delete). Several, with commas: the first is armed in
    the first generation, the next in the second. With `!` before the point it hangs there."""
    crash: str = ""
    """Drill: `point:step:rank` at which that rank raises, in every generation."""
    poison: str = ""
    """Drill: `step:rank`, or `step-step:rank`: makes a gradient of that rank not a number."""

    @property
    def kill_specs(self) -> list[str]:
        """The entries of `kill`, one for each generation in turn."""
        return [entry.strip() for entry in self.kill.split(",")]


@dataclass(frozen=True, kw_only=True)
class Run:
    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    initial: InitialSettings = field(default_factory=InitialSettings)
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    sync: SyncSettings = field(default_factory=SyncSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    fault: FaultSettings = field(default_factory=FaultSettings)

    @property
    def requires_same_bits(self) -> bool:
        """Whether results are promised, or compared, to the last bit."""
        return self.run.exact or self.data.placement == "replicate"


CHANGEABLE_ON_RESUME = (
    "run.dir", "run.name", "run.resume", "data.prefetch", "layout.", "sync.protocol", "launch.",
    "checkpoint.", "evaluate.", "fault.", "memory.recompute",
)  # fmt: skip
"""Keys (or sections) that may differ when a run resumes: they change its speed, not its descent."""
