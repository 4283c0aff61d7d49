"""`cordee config`: what a key means, and what a command line or file resolves to."""

from __future__ import annotations

import json

from cordee.begin import settle
from cordee.cli.arguments import parser, read
from cordee.config.load import dump, explain, flatten
from cordee.errors import ConfigError


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "config",
        "explain KEY: one key or a whole section: what it does, type, default, who set it.\n"
        "show: the resolved run as TOML, ready to be a file.",
        "cordee config explain optim.lr\n  cordee config show model.preset=small > mine.toml",
        "explain KEY | show [CONFIG.toml] [key=value ...] [--json]",
    )
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv, rest=2)
    loaded = words.load()
    match words.rest:
        case ("explain", key):
            text = explain(key, loaded)
            print(json.dumps({"key": key, "text": text}) if words.flags.json else text)
        case ("show",):
            settled = settle(loaded.run)
            print(json.dumps(flatten(settled)) if words.flags.json else dump(settled), end="")
        case _:
            raise ConfigError(
                "config explains a key or shows a run",
                values={"words": list(words.rest)},
                fix="cordee config explain optim.lr, or cordee config show",
            )
    return 0
