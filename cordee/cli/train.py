"""`cordee train`: `cordee.train` with a configuration in words, and the result as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cordee.api import run_prepared
from cordee.cli.arguments import make_parser, parse_arguments
from cordee.dist.process_group import exit_with_parent, read_launch_info
from cordee.dist.streams import print_to_stderr
from cordee.launcher.prepare import prepare_run, prepared_worker_run
from cordee.report.reader import last_event

HOST_FLAGS = {
    "listen": ("HOST:PORT", "where other hosts may join this run (launch.listen)"),
    "join": ("HOST:PORT", "of any host of the run that this one joins (launch.join)"),
    "secret": ("FILE", "of mode 0600 that the hosts share (launch.secret)"),
    "register": ("WHERE", "the generation stands: folder, or etcd://HOST:PORT (launch.register)"),
}
"""Flags for several hosts: keys of the section launch under shorter names."""


def run(argv: list[str]) -> int:
    """See --help."""
    exit_with_parent()  # before what takes long: a worker may lose its supervisor while it imports
    launch_info = read_launch_info()
    if launch_info.is_supervised:
        from cordee.training.user_parts import Parts  # here torch comes in
        from cordee.training.worker import run_worker

        return run_worker(prepared_worker_run(launch_info), Parts()).exit_code
    arg_parser = make_parser(
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
    arg_parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    for flag, (metavar, help_text) in HOST_FLAGS.items():
        arg_parser.add_argument(f"--{flag}", metavar=metavar, help=help_text)
    arg_parser.add_argument("--no-probe", action="store_true", help="do not measure this machine")
    args = parse_arguments(arg_parser, argv)
    extra_overrides = [
        f"launch.{flag}={word}" for flag in HOST_FLAGS if (word := getattr(args.flags, flag))
    ]
    extra_overrides += ["launch.probe=false"] if args.flags.no_probe else []
    args = replace(args, overrides=(*args.overrides, *extra_overrides))
    prepared_run = prepare_run(args.load().run)
    folder = Path(prepared_run.run.run.dir)
    is_first = prepared_run.launch_info.rank == 0
    if prepared_run.status.end_event is not None:
        print_to_stderr(
            f"the run in {folder} is finished; for another one: cordee train run.dir=..."
        )
    elif is_first and not prepared_run.launch_info.has_launcher:
        print_to_stderr(f"data    {prepared_run.run.data.path}")
        if prepared_run.arithmetic_note:
            print_to_stderr(f"bits    of {prepared_run.arithmetic_note}")
    exit_code = run_prepared(prepared_run).exit_code
    if is_first and not prepared_run.launch_info.store_file:
        _print_result(folder, exit_code, args.flags.json)
    return exit_code


def _print_result(folder: Path, exit_code: int, as_json: bool) -> None:
    """The result on standard output, when it is asked for."""
    if not as_json:
        return
    print(json.dumps({"run": str(folder), "exit_code": exit_code, **last_event(folder)}))
