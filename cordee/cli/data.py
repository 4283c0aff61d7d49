"""`cordee data`: prepare shards, look at a dataset, check every byte, and what steps used of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cordee.cli.arguments import check_flags, parser, read
from cordee.cli.ledger import tell
from cordee.config.paths import home_of_each
from cordee.config.ranges import RANGES
from cordee.data.prepare import inspect, prepare, verify
from cordee.errors import ConfigError

FLAGS = {
    "held_out": RANGES["data.held_out"], "seed": RANGES["run.seed"], "tokens": RANGES["data.tokens"]
}  # fmt: skip


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "data",
        "prepare SOURCE FOLDER: text files, folders, globs or a builtin as checksummed shards;\n"
        "records:FILE,FILE are images, with model.image.side, .channels and .classes;\n"
        "sources with semicolons between are a mixture, drawn by --weights.\n"
        "inspect FOLDER: what is in it. verify FOLDER: every byte against its checksum.\n"
        "ledger RUN: proves from the run's records that each step took its samples exactly once\n"
        "(exit code 1 if not); --step N: which samples it took; --sample S: which steps took it.",
        'cordee data prepare "docs/**/*.md" shards --held-out 0.05\n'
        '  cordee data prepare "shards;src" mixed --weights 7,3\n'
        "  cordee data inspect shards\n"
        "  cordee train data.path=shards\n"
        "  cordee data ledger runs/tiny --sample 17",
        "prepare SOURCE FOLDER [key=value ...] | inspect FOLDER | verify FOLDER |"
        " ledger RUN [--step N | --sample S] [--json]",
    )
    made.add_argument("--held-out", type=float, default=0.1, help="fraction held out")
    made.add_argument("--seed", type=int, default=0, help="chooses what is held out")
    made.add_argument("--weights", default="", help='of a mixture "one;two": numbers, as in 7,3')
    made.add_argument("--tokens", type=int, default=0, help="size of a synthetic source")
    made.add_argument("--step", type=int, help="of a run, from 1")
    made.add_argument("--sample", type=int, help="a row's number in the training split")
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv, rest=3, settings=("model",))
    check_flags(made, words.flags, FLAGS)
    match words.rest:
        case ("prepare", source, folder):
            source = home_of_each(source)
            flags = words.flags
            tokens, image = flags.tokens or None, words.load().run.model.image
            where, weights = Path(folder), flags.weights
            info = prepare(
                source, where, flags.held_out, flags.seed, tokens, image=image, weights=weights
            )
            known: dict[str, Any] = inspect(info.folder)
        case ("inspect", folder):
            known = inspect(Path(folder))
        case ("verify", folder):
            known = verify(Path(folder))
        case ("ledger", word):
            return tell(word, words.flags)
        case _:
            raise ConfigError(
                "data prepares, inspects, verifies or keeps the ledger",
                values={"words": list(words.rest)},
                fix="cordee data prepare SOURCE FOLDER",
            )
    if words.flags.json:
        print(json.dumps(known))
    else:
        width = max(map(len, known))
        for key, value in known.items():
            print(f"{key:<{width}}  {value}")
    return 0
