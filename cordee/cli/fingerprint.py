"""`cordee fingerprint`: one digest of all weights, the same for every layout of the same bits."""

from __future__ import annotations

import json

from cordee.checkpoint.pieces import weights_sha256
from cordee.cli.arguments import make_parser, parse_arguments


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "fingerprint",
        "Prints the SHA-256 of the full, unsharded weights in name order.",
        "cordee fingerprint runs/tiny\n  cordee fingerprint runs/tiny/checkpoints/step-00000200.g1",
        "RUN | CHECKPOINT [--json]",
    )
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv, max_positionals=1, sections=())
    from cordee.training.weights import MODEL_PREFIX, open_weights

    checkpoint = open_weights("fingerprint", args.run_word)
    names = [n.removeprefix(MODEL_PREFIX) for n in checkpoint.names() if n.startswith(MODEL_PREFIX)]
    digest = weights_sha256(names, lambda name: checkpoint.read(MODEL_PREFIX + name))
    if args.flags.json:
        fields = {
            "weights_sha256": digest,
            "step": checkpoint.step,
            "checkpoint": str(checkpoint.path),
        }
        print(json.dumps(fields))
    else:
        print(digest)
    return 0
