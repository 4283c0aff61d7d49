"""`cordee config`: what a key means, and what a command line or file resolves to."""

from __future__ import annotations

import json

from cordee.cli.arguments import make_parser, parse_arguments
from cordee.config.load import dump, explain_key, flatten
from cordee.errors import ConfigError
from cordee.launcher.prepare import resolve_config


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "config",
        "explain KEY: one key or a whole section: what it does, type, default, who set it.\n"
        "show: the resolved run as TOML, ready to be a file.",
        "cordee config explain optim.lr\n  cordee config show model.preset=small > mine.toml",
        "explain KEY | show [CONFIG.toml] [key=value ...] [--json]",
    )
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv, max_positionals=2)
    load_result = args.load()
    match args.positionals:
        case ("explain", key):
            text = explain_key(key, load_result)
            print(json.dumps({"key": key, "text": text}) if args.flags.json else text)
        case ("show",):
            resolved_run = resolve_config(load_result.run)
            print(
                json.dumps(flatten(resolved_run)) if args.flags.json else dump(resolved_run), end=""
            )
        case _:
            raise ConfigError(
                "config explains a key or shows a run",
                values={"words": list(args.positionals)},
                fix="cordee config explain optim.lr, or cordee config show",
            )
    return 0
