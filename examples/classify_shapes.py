"""Classifiers of drawn shapes under cordee.train: an MLP, a small CNN or a small ViT.

python examples/classify_shapes.py                         # the CNN
python examples/classify_shapes.py --model vit run.steps=300 run.dir=runs/shapes-vit
torchrun --nproc-per-node 2 examples/classify_shapes.py run.exact=true run.dir=runs/shapes-2

Ten shapes at random places, sizes, angles and colours, with noise, the same on every machine: raw
words of Philox are the only randomness and all arithmetic is of whole numbers. Letters in shapes: N
images, S side, D width, T tokens.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import cordee

SIDE = 16  # pixels
TURNS, UNIT = 64, 64  # angles to a full turn; units in which places are counted, to a pixel
COSINES = np.rint(1024 * np.cos(2 * np.pi * np.arange(TURNS) / TURNS)).astype(np.int64)
SINES = np.roll(COSINES, TURNS // 4)


# ---- the data ------------------------------------------------------------------------------------


def between(value, low, high):
    return (value >= low) & (value <= high)


def largest(u, v):
    return np.maximum(np.abs(u), np.abs(v))


# What is inside each shape: u and v are in thousandths of its half-size, along its own axes.
SHAPES = {
    "disc": lambda u, v: u * u + v * v <= 1000**2,
    "ring": lambda u, v: between(u * u + v * v, 550**2, 1000**2),
    "square": lambda u, v: largest(u, v) <= 800,
    "frame": lambda u, v: between(largest(u, v), 450, 850),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 260) & (largest(u, v) <= 1000),
    "bar": lambda u, v: (np.abs(v) <= 280) & (np.abs(u) <= 1000),
    "two bars": lambda u, v: between(np.abs(v), 300, 750) & (np.abs(u) <= 900),
    "triangle": lambda u, v: (v >= -500) & (1000 * np.abs(u) <= 577 * (1000 - v)),
    "corner": lambda u, v: (largest(u, v) <= 850) & (np.minimum(u, v) <= -350),
    "tee": lambda u, v: (
        (between(v, 350, 900) & (np.abs(u) <= 900)) | ((np.abs(u) <= 270) & between(v, -1000, 900))
    ),
}


def draw_shapes(count, seed):
    """`count` images, uint8 [N, S, S], and their labels, int64 [N]."""

    def draw(stream, limit, *shape):
        """Whole numbers below `limit`; streams of one seed are far apart in the counter."""
        words = np.random.Philox(key=seed, counter=[0, 0, 0, stream]).random_raw(np.prod(shape))
        return (words % np.uint64(limit)).astype(np.int64).reshape(shape)

    labels = draw(0, len(SHAPES), count)
    covered = coverage(labels, *draw(1, 1 << 20, 4, count))
    ground = 30 + draw(2, 196, count, 1, 1)
    contrast = np.where(ground < 128, 1, -1) * (70 + draw(3, 58, count, 1, 1))
    noise = draw(4, 32, count, SIDE, SIDE) - 16
    pixels = ground + contrast * covered // 4 + noise
    return pixels.clip(0, 255).astype(np.uint8), labels


def coverage(labels, size, right, down, turn):
    """How many of each pixel's four points (0 to 4) lie inside the shape, int64 [N, S, S]; `size`,
    `right`, `down` and `turn` are random numbers [N]. All of the shape is inside the image."""
    half = SIDE * UNIT // 2
    radius = SIDE * UNIT * (27 + size % 16) // 100
    room = half - radius
    x0, y0 = (half + (2 * room * where >> 20) - room for where in (right, down))
    # Two points a pixel and side, a quarter of a pixel from its edges.
    points = np.arange(2 * SIDE) * (UNIT // 2) + UNIT // 4
    inside = np.empty((len(labels), 2 * SIDE, 2 * SIDE), dtype=np.int64)
    for label, is_inside in enumerate(SHAPES.values()):
        n = np.flatnonzero(labels == label)
        x, y = points[None, None, :] - x0[n, None, None], points[None, :, None] - y0[n, None, None]
        c, s = (table[turn[n] % TURNS][:, None, None] for table in (COSINES, SINES))
        scale = 1024 * radius[n, None, None]
        inside[n] = is_inside((x * c + y * s) * 1000 // scale, (y * c - x * s) * 1000 // scale)
    return inside.reshape(-1, SIDE, 2, SIDE, 2).sum((2, 4))


def make_dataset(count, seed):
    """Images as float32 [N, 1, S, S] in [-1, 1], and labels."""
    images, labels = map(torch.from_numpy, draw_shapes(count, seed))
    return TensorDataset(images[:, None] / 127.5 - 1, labels)


# ---- the models ----------------------------------------------------------------------------------

# Norms are of one image, never of a batch: how a step is cut over ranks must not change the result.


def make_mlp(width=256):
    def layer(inputs):
        return [nn.Linear(inputs, width, bias=False), nn.LayerNorm(width), nn.ReLU()]

    layers = [nn.Flatten(), *layer(SIDE * SIDE), *layer(width), nn.Linear(width, len(SHAPES))]
    return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(norm(x))))) (He et al. 2016), at half the side if `stride` is 2."""

    def __init__(self, width, stride):
        super().__init__()
        self.norm, self.stride = nn.GroupNorm(1, width), stride
        self.first = nn.Conv2d(width, width, 3, stride, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        skip = x[:, :, :: self.stride, :: self.stride]
        return skip + self.second(F.relu(self.first(F.relu(self.norm(x)))))


def make_cnn(width=32):
    blocks = [ResidualBlock(width, stride) for stride in (1, 2, 2)]
    head = [nn.GroupNorm(1, width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), *blocks, *head, nn.Linear(width, len(SHAPES))
    )


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels as tokens, and the mean over them (Dosovitskiy et al. 2021)."""

    def __init__(self, width=64, layers=3, heads=4, patch=4):
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(SHAPES))

    def forward(self, x):
        x_NTD = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x_NTD = block(x_NTD)
        return self.head(self.norm(x_NTD).mean(1))


MODELS = {"mlp": make_mlp, "cnn": make_cnn, "vit": VisionTransformer}


# ---- the run -------------------------------------------------------------------------------------


def loss(model, images, labels):
    """Summed over the batch: cordee divides by the samples of the whole step, on all ranks."""
    return F.cross_entropy(model(images), labels, reduction="sum")


def measure_accuracy(model, run_dir, held_out):
    """The part of images whose label is the likeliest, by the weights that the run saved."""
    weights = Path(run_dir) / "model.safetensors"
    export = [sys.executable, "-m", "cordee", "export", str(run_dir), "--output", str(weights)]
    subprocess.run(export, check=True)
    model.load_state_dict(load_file(weights))
    images, labels = held_out.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main():
    parser = argparse.ArgumentParser(description="a classifier of drawn shapes")
    parser.add_argument("--model", choices=MODELS, default="cnn")
    flags, overrides = parser.parse_known_args()
    words = [f"run.dir=runs/shapes-{flags.model}", "run.steps=200", "batch.microbatch=16"]
    words += ["run.precision=fp32", "launch.threads=1"]
    run = cordee.load(None, [*words, *overrides]).run
    torch.manual_seed(0)  # every rank brings the same module
    model, held_out = MODELS[flags.model](), make_dataset(1000, seed=2)
    report = cordee.train(
        run, model=model, loss=loss, data=make_dataset(20_000, seed=1), held_out=held_out
    )
    if report.finished and os.environ.get("RANK", "0") == "0":
        accuracy = measure_accuracy(MODELS[flags.model](), run.run.dir, held_out)
        print(f"accuracy {accuracy:.1%} of {len(held_out)} held-out images (a guess has 10 %)")


if __name__ == "__main__":
    main()
