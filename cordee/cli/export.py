"""`cordee export`: the weights of a run as one safetensors file, whole and by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cordee.cli.arguments import parser, read, say
from cordee.cli.places import run_of
from cordee.config.load import flatten
from cordee.errors import ConfigError


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "export",
        "Writes the newest complete weights of a run as one safetensors file (default\n"
        "RUN/model.safetensors), with the model's settings in its metadata.",
        "cordee export runs/tiny --output tiny.safetensors",
        "RUN [--output FILE] [--json]",
    )
    made.add_argument("--output", default="", help="where to write")
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv, rest=1)
    folder, wanted = run_of("export", words.run)
    output = Path(words.flags.output or folder / "model.safetensors")
    if not output.parent.is_dir():
        raise ConfigError(
            "the output's folder does not exist",
            values={"output": str(output)},
            fix=f"mkdir -p {output.parent}",
        )
    from safetensors.torch import save_file

    from cordee.cli.weights import open_weights, weights

    found = open_weights("export", str(folder))
    settings = {k: str(v) for k, v in flatten(wanted).items() if k.startswith("model.")}
    beside = output.with_name(output.name + ".part")
    save_file(weights(found), beside, metadata={**settings, "step": str(found.step)})
    os.replace(beside, output)
    size = output.stat().st_size
    if words.flags.json:
        print(json.dumps({"file": str(output), "step": found.step, "bytes": size}))
    else:
        say(f"{output}: step {found.step}, {size / 1e6:.1f} MB")
    return 0
