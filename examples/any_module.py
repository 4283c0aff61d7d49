"""Any nn.Module under cordee.train: a small conv net that finds the bright corner of an image.

python examples/any_module.py run.steps=80
torchrun --nproc-per-node 2 examples/any_module.py layout.shard=2 run.dir=runs/corners-2
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import cordee


def corners(count, seed):
    """Images of noise with one bright corner, and which corner it is."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=draw)
    images = torch.randn(count, 1, 12, 12, generator=draw)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, label // 2 * 6 :, label % 2 * 6 :][:6, :6] += 0.5
    return TensorDataset(images, labels)


def loss(model, images, labels):
    """Summed over the batch: cordee divides by the samples of the whole step, on all ranks."""
    return F.cross_entropy(model(images), labels, reduction="sum")


torch.manual_seed(0)  # every rank brings the same module
net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 4))
words = ["run.dir=runs/corners", "run.steps=80", "optim.name=adamw", "optim.lr=0.01"]
config = cordee.Config.load(*words, "batch.microbatch=8", *sys.argv[1:])
report = cordee.train(config, model=net, loss=loss, data=corners(2000, 1), held_out=corners(200, 2))
if report.finished:
    print(f"held-out loss {report.finished['held_out_loss']:.4f} (a guess has 1.3863)")
