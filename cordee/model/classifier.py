"""Classifiers of images: hidden layers (mlp) or residual convolutions (conv), and their loss.

They read the rows of bytes that language models read: the first token is the label, the next are
pixels, and what follows (the next record's label) is not looked at. So data, engine and checkpoints
know nothing of images. Not here: shapes (`layout/classifier.py`), initial values (`initial.py`).
Traded away: batch norm; its statistics would depend on how a batch is cut over microbatches.

Shape suffixes: B images, T tokens, P pixels of all channels, C channels, H and W sides, D width,
K classes.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ImageSettings, ModelSettings


class Hidden(nn.Module):
    """relu(norm(linear(x))); the norm (Ba et al. 2016) has the bias."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, D]."""
        out_BD: Tensor = F.relu(self.norm(self.linear(x)))
        return out_BD


class Convolved(nn.Module):
    """x + second(relu(first(relu(norm(x))))) (He et al. 2016); `halve`: every second row and column
    of x, and a first convolution of stride 2. The norm is over all of an image (Wu & He 2018)."""

    def __init__(self, width: int, halve: bool) -> None:
        super().__init__()
        self.stride = 2 if halve else 1
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, self.stride, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """[B, D, H, W] to the same, or to halves of H and W, rounded up."""
        new_BDHW = self.second(F.relu(self.first(F.relu(self.norm(x_BDHW)))))
        kept_BDHW = x_BDHW[:, :, :: self.stride, :: self.stride]
        added: Tensor = kept_BDHW + new_BDHW
        return added


class MlpClassifier(nn.Module):
    """`layers` hidden layers and a linear head."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, self.image = settings.width, settings.image
        inputs = [self.image.pixel_bytes, *[width] * (settings.layers - 1)]
        self.blocks = nn.ModuleList(Hidden(n, width) for n in inputs)
        self.head = nn.Linear(width, self.image.classes)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """int64 [B, 1 + P] to logits fp32 [B, K]; with targets to the summed loss (nats)."""
        x = scaled(tokens_BT, self.image)
        for block in self.blocks:
            x = block(x)
        return _answer(self.head(x), tokens_BT, targets_BT)


class ConvClassifier(nn.Module):
    """A 3 x 3 stem, `layers` residual blocks, the mean over the image, and a linear head."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, self.image = settings.width, settings.image
        self.stem = nn.Conv2d(self.image.channels, width, 3, padding=1, bias=False)
        steps = itertools.pairwise(settings.block_sides)
        self.blocks = nn.ModuleList(Convolved(width, after < before) for before, after in steps)
        self.norm = nn.GroupNorm(1, width)
        self.head = nn.Linear(width, self.image.classes)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """int64 [B, 1 + P] to logits fp32 [B, K]; with targets to the summed loss (nats)."""
        image = self.image
        x_BCHW = scaled(tokens_BT, image).view(-1, image.channels, image.side, image.side)
        x_BDHW = self.stem(x_BCHW)
        for block in self.blocks:
            x_BDHW = block(x_BDHW)
        x_BD = F.relu(self.norm(x_BDHW)).mean((2, 3))
        return _answer(self.head(x_BD), tokens_BT, targets_BT)


def make_classifier(settings: ModelSettings) -> nn.Module:
    """The classifier of `settings.kind` (mlp or conv); call `init_weights` after construction."""
    return ConvClassifier(settings) if settings.kind == "conv" else MlpClassifier(settings)


def scaled(tokens_BT: Tensor, image: ImageSettings) -> Tensor:
    """The pixels of int64 [B, 1 + P] as fp32 [B, P] in [-1, 1]."""
    return tokens_BT[:, 1 : image.record_bytes].float() / 127.5 - 1.0


def _answer(logits_BK: Tensor, tokens_BT: Tensor, targets_BT: Tensor | None) -> Tensor:
    """Targets only say that a loss is wanted: the label is the first token."""
    logits_BK = logits_BK.float()
    if targets_BT is None:
        return logits_BK
    return F.cross_entropy(logits_BK, tokens_BT[:, 0], reduction="sum")
