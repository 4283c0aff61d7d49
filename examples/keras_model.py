"""A Keras 3 model (torch backend) under cordee.train: which of four features is largest?

pip install "cordee[keras]"
python examples/keras_model.py run.steps=100
torchrun --nproc-per-node 2 examples/keras_model.py layout.shard=2 run.dir=runs/keras-2
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import cordee
from cordee.hf.keras import KerasModel


def samples(count, seed):
    """Eight features; the label is the largest of the first four."""
    features = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(features, features[:, :4].argmax(1))


def loss(model, features, labels):
    return F.cross_entropy(model(features), labels, reduction="sum")


keras.utils.set_random_seed(0)  # every rank brings the same model
model = KerasModel(keras.Sequential([
    keras.Input((8,)), keras.layers.Dense(32, activation="relu"),
    keras.layers.LayerNormalization(), keras.layers.Dense(4),
]))  # fmt: skip
words = ["run.dir=runs/keras", "run.steps=100", "optim.name=adamw", "optim.lr=0.01"]
config = cordee.Config.load(*words, "batch.microbatch=16", *sys.argv[1:])
data, held_out = samples(4000, 1), samples(500, 2)
report = cordee.train(config, model=model, loss=loss, data=data, held_out=held_out)
if report.finished:
    print(f"held-out loss {report.finished['held_out_loss']:.4f} (a guess has 1.3863)")
