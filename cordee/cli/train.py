"""`cordee train`: what `cordee.train(run)` does, in the same steps, and the result as JSON.

The process that only launches ranks never imports torch, so the first loss comes sooner.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cordee.begin import get_ready, launch_ranks
from cordee.cli.arguments import parser, read, say
from cordee.dist.start import follow_parent
from cordee.metrics.sinks import last_event

HOSTS = {
    "listen": ("HOST:PORT", "where other hosts may join this run (launch.listen)"),
    "join": ("HOST:PORT", "of any host of the run that this one joins (launch.join)"),
    "secret": ("FILE", "of mode 0600 that the hosts share (launch.secret)"),
}
"""Flags for several hosts: keys of the section launch under shorter names."""


def run(argv: list[str]) -> int:
    """See --help."""
    follow_parent()  # before what takes long: a worker may lose its supervisor while it imports
    made = parser(
        "train",
        "Trains; the same command again goes on where the run stands.\n"
        "Without arguments: a byte model on the text of this Python's standard library.",
        "cordee train model.preset=small optim.lr=0.01 run.steps=2000 run.dir=runs/mine\n"
        "  cordee train run.toml --listen 10.0.0.1:7000      on the first host, and\n"
        "  cordee train run.toml --join 10.0.0.1:7000        on others, at any time (one run.dir)\n"
        "  cordee train run.exact=true run.steps=60 launch.processes=4 batch.microbatches=12\n"
        "  torchrun --nproc-per-node 2 -m cordee train run.steps=100\n\n"
        "keys: cordee config explain run | model | data | batch | optim | clip | layout | ...",
        "[CONFIG.toml] [key=value | --key value ...] [--json]",
    )
    made.add_argument("--json", action="store_true", help="one JSON object at the end")
    for flag, (shown, says) in HOSTS.items():
        made.add_argument(f"--{flag}", metavar=shown, help=says)
    made.add_argument("--no-probe", action="store_true", help="do not measure this machine")
    words = read(made, argv)
    given = [f"launch.{flag}={word}" for flag in HOSTS if (word := getattr(words.flags, flag))]
    given += ["launch.probe=false"] if words.flags.no_probe else []
    words = replace(words, overrides=(*words.overrides, *given))
    ready = get_ready(words.load().run)
    folder = Path(ready.run.run.dir)
    first = ready.told.rank == 0
    if ready.standing.finished is None:
        if first and not ready.told.by_launcher:
            say(f"data    {ready.run.data.path}")
            if ready.arithmetic:
                say(f"bits    of {ready.arithmetic}")
        if ready.launches:
            code = launch_ranks(ready.run, ready.plan)
        else:
            from cordee.parts import Parts  # here torch comes in
            from cordee.train import descend

            code = descend(ready, Parts()).exit_code
    else:
        say(f"the run in {folder} is finished; for another one: cordee train run.dir=...")
        code = 0
    if first and not ready.told.store:
        _tell(folder, code, words.flags.json)
    return code


def _tell(folder: Path, code: int, as_json: bool) -> None:
    """The result on standard output, when it is asked for."""
    if not as_json:
        return
    print(json.dumps({"run": str(folder), "exit_code": code, **last_event(folder)}))
