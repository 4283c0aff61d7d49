"""Text from a model: one token at a time, from a seed.

Not here: which model, which prompt, which device (the caller's). Traded away: a cache of keys and
values. The whole window is computed again for every token, which keeps the model free of sampling
code and is quick enough for a few hundred tokens of a small model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.errors import DataError

LENGTH_MULTIPLE = 32
"""Windows are filled up to a multiple of this: causal models do not see what follows, and libraries
keep compiled code for every shape (0.8 GiB for 240 lengths in bf16 on a CPU)."""


@torch.no_grad()
def generate(
    logits: Callable[[Tensor], Tensor],
    prompt: Tensor,
    token_count: int,
    context: int,
    temperature: float,
    seed: int,
) -> Tensor:
    """`prompt` (int64 [T], T >= 1) followed by `token_count` sampled ones, int64 [T + tokens], CPU.

    `logits` maps int64 [1, T] on the CPU to [1, T, V]. Each token sees the `context` tokens before
    it. temperature 0 takes the most likely one. The result is a function of the arguments: numbers
    are drawn on the CPU from their own generator, so ranks that share a model draw alike.
    """
    if prompt.ndim != 1 or prompt.numel() == 0 or context < 1:
        raise DataError(
            "sampling needs a prompt of at least one token and a context of at least one",
            values={"prompt": tuple(prompt.shape), "context": context},
            fix="start from the token 0, which ends a document",
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    token_ids = torch.cat((prompt.cpu().long(), torch.zeros(token_count, dtype=torch.int64)))
    for end in range(prompt.numel(), token_ids.numel()):
        window_T = token_ids[max(0, end - context) : end]
        length = len(window_T)
        padded_T = F.pad(
            window_T, (0, min(context, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE) - length)
        )
        logits_V = logits(padded_T[None])[0, length - 1].float().cpu()
        token_ids[end] = _sample_token(logits_V, temperature, generator)
    return token_ids


def to_text(tokens: Tensor) -> str:
    """Bytes as UTF-8 text; what is not UTF-8 is shown as U+FFFD, a NUL as a blank line."""
    values = tokens.flatten().tolist()
    if any(value > 255 for value in values):
        raise DataError(
            "only bytes can be shown as text",
            values={"largest token": max(values)},
            fix="sample from a model of bytes (vocabulary 256)",
        )
    return bytes(values).replace(b"\0", b"\n\n").decode("utf-8", errors="replace")


def _sample_token(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature <= 0:
        return logits_V.argmax()
    probabilities_V = torch.softmax(logits_V / temperature, -1)
    return torch.multinomial(probabilities_V, 1, generator=generator)[0]
