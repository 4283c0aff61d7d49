"""One row per update rule: its default rate, and what planner and layout count of it. The update
itself is a class in `optim/update_rules.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """A value of optim.name. State and traffic are in bytes per parameter."""

    name: str
    default_lr: float
    """Peak learning rate for the byte models of 1-3 M parameters (docs/tuning.md)."""
    state_bytes: int
    """Optimiser state; of a factored rule, per row and per column of a matrix."""
    update_bytes: int
    """Memory traffic of an update with fused kernels, at the nominal bandwidth of a CPU."""
    unfused_update_bytes: int = 0
    """The same without fused kernels, as run.exact needs it; 0: as with them."""
    unfused_copies: int = 0
    """Copies of all parameters that kernels make while they are not fused."""
    is_factored: bool = False
    """Whether the state of a matrix is one number per row and one per column."""
    held_update_bytes: int = 0
    """Bytes per element of matrices that are held from `prepare` until the step."""
    rule_of_others: str = ""
    """The rule that updates embeddings and vectors, where this one is for matrices alone."""
    whole_matrix_reason: str = ""
    """Why no axis may cut a matrix, after "cuts matrices, and"; empty: any may."""

    def for_group(self, group: str) -> UpdateRule:
        """The rule that updates parameters of `group` (matrices, embeddings or vectors)."""
        uses_other_rule = self.rule_of_others and group != "matrices"
        return UPDATE_RULES[self.rule_of_others] if uses_other_rule else self

    def traffic_bytes(self, is_fused: bool) -> int:
        """Memory traffic of an update."""
        return self.update_bytes if is_fused else self.unfused_update_bytes or self.update_bytes


_ROWS = (
    UpdateRule(name="sgd", default_lr=0.5, state_bytes=0, update_bytes=6),
    UpdateRule(name="momentum", default_lr=0.05, state_bytes=4, update_bytes=15),
    UpdateRule(name="adam", default_lr=0.002, state_bytes=8, update_bytes=14,
               unfused_update_bytes=76, unfused_copies=1),
    UpdateRule(name="adamw", default_lr=0.002, state_bytes=8, update_bytes=14,
               unfused_update_bytes=76, unfused_copies=1),
    # Held until the step: each update in fp32, and in bf16 the share that this rank sends.
    UpdateRule(name="muon", default_lr=0.015, state_bytes=4, update_bytes=30,
               held_update_bytes=6, rule_of_others="adamw"),
    UpdateRule(name="adafactor", default_lr=0.01, state_bytes=4, update_bytes=80, is_factored=True,
               whole_matrix_reason="adafactor keeps statistics of whole rows and columns"),
)  # fmt: skip

UPDATE_RULES: Mapping[str, UpdateRule] = {row.name: row for row in _ROWS}

if TYPE_CHECKING:
    RuleName = str  # a type checker wants literals spelled out; the loader checks the name
else:
    RuleName = Literal[tuple(UPDATE_RULES)]
