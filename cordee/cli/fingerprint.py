"""`cordee fingerprint`: one digest of all weights, the same for every layout of the same bits."""

from __future__ import annotations

import json

from cordee.checkpoint.fingerprint import weights_sha256
from cordee.cli.arguments import parser, read


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "fingerprint",
        "Prints the SHA-256 of the full, unsharded weights in name order.",
        "cordee fingerprint runs/tiny\n  cordee fingerprint runs/tiny/checkpoints/step-00000200.g1",
        "RUN | CHECKPOINT [--json]",
    )
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv, rest=1, settings=())
    from cordee.cli.weights import PREFIX, open_weights

    found = open_weights("fingerprint", words.run)
    names = [n.removeprefix(PREFIX) for n in found.names() if n.startswith(PREFIX)]
    digest = weights_sha256(names, lambda name: found.read(PREFIX + name))
    if words.flags.json:
        known = {"weights_sha256": digest, "step": found.step, "checkpoint": str(found.path)}
        print(json.dumps(known))
    else:
        print(digest)
    return 0
