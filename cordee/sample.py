"""Text from a model: one token at a time, from a seed.

Not here: which model, which prompt, which device (the caller's). Traded away: a cache of keys and
values. The whole window is computed again for every token, which keeps the model free of sampling
code and is quick enough for a few hundred tokens of a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cordee.errors import DataError


@torch.no_grad()
def generate(
    model: nn.Module, prompt: Tensor, tokens: int, context: int, temperature: float, seed: int
) -> Tensor:
    """`prompt` (int64 [T], T >= 1) followed by `tokens` sampled ones, int64 [T + tokens], CPU.

    Computed on the prompt's device. Each token sees the `context` tokens before it. temperature 0
    takes the most likely one. The result is a function of the arguments: numbers are drawn on the
    CPU from their own generator, so ranks that share a sharded model draw alike. The model's
    training mode is put back.
    """
    if prompt.ndim != 1 or prompt.numel() == 0 or context < 1:
        raise DataError(
            "sampling needs a prompt of at least one token and a context of at least one",
            values={"prompt": tuple(prompt.shape), "context": context},
            fix="start from the token 0, which ends a document",
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    text = torch.cat((prompt.cpu().long(), torch.zeros(tokens, dtype=torch.int64)))
    training = model.training
    model.eval()
    try:
        for end in range(prompt.numel(), text.numel()):
            window_BT = text[max(0, end - context) : end].unsqueeze(0).to(prompt.device)
            logits_V = model(window_BT)[0, -1].float().cpu()
            text[end] = _choose(logits_V, temperature, generator)
    finally:
        model.train(training)
    return text


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


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature <= 0:
        return logits_V.argmax()
    odds_V = torch.softmax(logits_V / temperature, -1)
    return torch.multinomial(odds_V, 1, generator=generator)[0]
