"""Cordée as a library, cell by cell: a configuration, its plan, a loop of steps, a trained model.

python examples/notebook.py run.dir=runs/notebook-2      (or run the cells in a notebook)
"""

# %% A configuration: from a file ("run.toml"), from key=value, from keywords
import sys

import torch

import cordee

config = cordee.Config.load(
    "run.dir=runs/notebook",
    *sys.argv[1:],
    run={"steps": 60},
    model={"layers": 2, "width": 64, "heads": 4},
    data={"path": "builtin:stdlib", "sequence": 64},
    batch={"microbatch": 4, "microbatches": 4},
    optim={"name": "adamw", "lr": 0.003},
    evaluate={"tokens": 16_384, "sample": 100},
)
print(f"{config.run.steps} steps at {config.optim.lr}, into {config.run.dir}")

# %% What a step costs on this machine
plan = cordee.plan(config)
print(f"{plan.layout.describe()}: {plan.why}")

# %% A loop of your own; it goes on where the run in run.dir stands
with cordee.Trainer(config) as trainer:
    while not trainer.done:
        result = trainer.train_step()
        if result.step % 20 == 0:
            print(f"step {result.step}: loss {result.loss:.4f}, {result.decision.value}")
            trainer.save_checkpoint()
    score = trainer.evaluate()
    trainer.finish()  # the digest of the weights, and the run's last event

# %% What the run wrote: columns, as pandas.DataFrame takes them
metrics = cordee.read_metrics(config.run.dir)
print(f"{len(metrics['step'])} steps, last loss {metrics['loss'][-1]:.4f}")

# %% The trained model, in one line: a torch.nn.Module
model = cordee.load_model(config.run.dir)
with torch.no_grad():
    logits = model(torch.tensor([list(b"cordee")]))
print(f"held-out bits per byte {score.bits_per_byte:.4f}, logits {list(logits.shape)}")
