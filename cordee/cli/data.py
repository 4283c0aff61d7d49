"""`cordee data`: prepare shards, look at a dataset, check every byte, and what steps used of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cordee.cli.arguments import check_flags, make_parser, parse_arguments
from cordee.cli.ledger import print_ledger
from cordee.config.load import RANGES
from cordee.config.paths import expand_home_of_each
from cordee.data.prepare import inspect_dataset, prepare, verify_dataset
from cordee.errors import ConfigError

FLAG_RANGES = {
    "held_out": RANGES["data.held_out"], "seed": RANGES["run.seed"], "tokens": RANGES["data.tokens"]
}  # fmt: skip


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "data",
        "prepare SOURCE FOLDER: text files, folders, globs or a builtin as checksummed shards;\n"
        "sources with semicolons between are a mixture, drawn by --weights.\n"
        "inspect FOLDER: what is in it. verify FOLDER: every byte against its checksum.\n"
        "ledger RUN: proves from the run's records that each step took its samples exactly once\n"
        "(exit code 1 if not); --step N: which samples it took; --sample S: which steps took it.",
        'cordee data prepare "docs/**/*.md" shards --held-out 0.05\n'
        '  cordee data prepare "shards;src" mixed --weights 7,3\n'
        "  cordee data inspect shards\n"
        "  cordee train data.path=shards\n"
        "  cordee data ledger runs/tiny --sample 17",
        "prepare SOURCE FOLDER | inspect FOLDER | verify FOLDER |"
        " ledger RUN [--step N | --sample S] [--json]",
    )
    arg_parser.add_argument("--held-out", type=float, default=0.1, help="fraction held out")
    arg_parser.add_argument("--seed", type=int, default=0, help="chooses what is held out")
    arg_parser.add_argument(
        "--weights", default="", help='of a mixture "one;two": numbers, as in 7,3'
    )
    arg_parser.add_argument("--tokens", type=int, default=0, help="size of a synthetic source")
    arg_parser.add_argument("--step", type=int, help="of a run, from 1")
    arg_parser.add_argument("--sample", type=int, help="a row's number in the training split")
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv, max_positionals=3, sections=())
    check_flags(arg_parser, args.flags, FLAG_RANGES)
    match args.positionals:
        case ("prepare", source, folder):
            source = expand_home_of_each(source)
            flags = args.flags
            info = prepare(
                source, Path(folder), flags.held_out, flags.seed, flags.tokens or None,
                weights=flags.weights,
            )  # fmt: skip
            fields: dict[str, Any] = inspect_dataset(info.folder)
        case ("inspect", folder):
            fields = inspect_dataset(Path(folder))
        case ("verify", folder):
            fields = verify_dataset(Path(folder))
        case ("ledger", run_word):
            return print_ledger(run_word, args.flags)
        case _:
            raise ConfigError(
                "data prepares, inspects, verifies or keeps the ledger",
                values={"words": list(args.positionals)},
                fix="cordee data prepare SOURCE FOLDER",
            )
    if args.flags.json:
        print(json.dumps(fields))
    else:
        width = max(map(len, fields))
        for key, value in fields.items():
            print(f"{key:<{width}}  {value}")
    return 0
