"""Distributed gradient descent on F(theta) = mean(theta^2), parameters and work split over ranks.

    python examples/quadratic.py --ranks 2 --json

Its loss must follow F(theta_0) * (1 - 2 * eta / 1000) ** (2 t), on any number of ranks.
"""

import argparse
import json

import torch
import torch.distributed as dist

from cordee import launch
from cordee.dist.codecs import IdentityCodec
from cordee.dist.tree_all_reduce import TreeAllReduce
from cordee.layout.microbatches import fold, split_evenly

SIZE, RATE, BLOCKS = 1000, 0.01, 4


def descend(world, steps):
    """The six steps on one rank; returns the loss before each update."""
    # 1 initialise: the whole of theta from one seed, so that every number of ranks starts equal
    theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).view(BLOCKS, -1)
    # 2 distribute the work: BLOCKS blocks of coordinates, a contiguous range of them to each rank
    ranges = split_evenly(BLOCKS, world.size)
    # 3 distribute the model: a rank keeps its own blocks of theta, and the optimiser of those alone
    mine = {b: theta[b].clone().requires_grad_() for b in ranges[world.rank]}
    optimizer = torch.optim.SGD(mine.values(), lr=RATE)
    exchange = TreeAllReduce(dist.group.WORLD if world.size > 1 else None, ranges, IdentityCodec())
    losses = []
    for _ in range(steps):  # 6 iterate
        parts = {b: block.square().sum() / SIZE for b, block in mine.items()}
        optimizer.zero_grad()
        sum(parts.values()).backward()
        # 5 communicate: the sum over blocks in canonical order, the same bits on any ranks
        leaves = {(b, b + 1): part.detach()[None].clone() for b, part in parts.items()}
        partial = [(n, fold(n, leaves, torch.add)) for n in exchange.nodes_by_member[world.rank]]
        losses.append(float(exchange.all_reduce(partial)))
        optimizer.step()  # 4 update
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="one object with all losses")
    asked = parser.parse_args()
    losses = launch(descend, asked.steps, ranks=asked.ranks)[0]
    if asked.json:
        print(json.dumps({"ranks": asked.ranks, "steps": asked.steps, "losses": losses}))
    else:
        print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f} in {asked.steps} steps on {asked.ranks}")
