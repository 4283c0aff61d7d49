"""`cordee export`: the weights of a run, as one safetensors file or as a transformers folder."""

from __future__ import annotations

import json
from pathlib import Path

from cordee.cli.arguments import check_flags, parser, read, say
from cordee.cli.places import refuse_brought, refuse_other, replacing, run_of
from cordee.config.load import flatten
from cordee.config.paths import home
from cordee.config.ranges import Range
from cordee.config.run import Run
from cordee.errors import ConfigError


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "export",
        "Writes the newest complete weights of a run. safetensors: one file (default\n"
        "RUN/model.safetensors) with the model's settings in its metadata. hf: a folder (default\n"
        "RUN/hf) that transformers' from_pretrained reads; a run of model.hub, or a transformer\n"
        "whose knobs Llama or Qwen3 have (docs/models.md).",
        "cordee export runs/tiny --to hf --output tiny-hf",
        "RUN [--to safetensors|hf] [--output PATH] [--json]",
    )
    made.add_argument("--to", default="safetensors", choices=("safetensors", "hf"), help="what")
    made.add_argument("--output", "--out", default="", help="where to write")
    made.add_argument(
        "--shard-mb", type=float, default=2000.0, help="hf: largest file, in MB (default 2000)"
    )
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv, rest=1, settings=())
    folder, wanted = run_of("export", words.run)
    hf = words.flags.to == "hf"
    output = Path(home(words.flags.output) or folder / ("hf" if hf else "model.safetensors"))
    if not output.parent.is_dir():
        raise ConfigError(
            "the output's folder does not exist",
            values={"output": str(output)},
            fix=f"mkdir -p {output.parent}",
        )
    check_flags(made, words.flags, {"shard_mb": Range(0, 1e9, above=True)})
    if hf:
        refuse_brought("export --to hf", folder)
        step, size = _folder(folder, wanted, output, int(words.flags.shard_mb * 1e6))
    else:
        step, size = _file(folder, wanted, output)
    if words.flags.json:
        print(json.dumps({"file": str(output), "step": step, "bytes": size}))
    else:
        say(f"{output}: step {step}, {size / 1e6:.1f} MB")
    return 0


def _file(folder: Path, wanted: Run, output: Path) -> tuple[int, int]:
    """One safetensors file, whole; (step, bytes)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from cordee.cli.weights import open_weights, weights

    refuse_other(output, "--output", _is_export)
    found = open_weights("export", str(folder))
    settings = {k: str(v) for k, v in flatten(wanted).items() if k.startswith("model.")}
    with replacing(output, "--output") as beside:
        try:
            save_file(weights(found), beside, metadata={**settings, "step": str(found.step)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return found.step, output.stat().st_size


def _is_export(output: Path) -> bool:
    """Whether a file is one of these: its metadata names a step and the model's settings."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(output, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError:
        return False
    return "step" in metadata and "model.preset" in metadata


def _folder(folder: Path, wanted: Run, output: Path, shard_bytes: int) -> tuple[int, int]:
    """A transformers folder, tensor by tensor; (step, bytes of the weights)."""
    from cordee.cli.weights import PREFIX, open_weights, value
    from cordee.model.equivalent import equivalent
    from cordee.model.folder import files_beside, open_folder, write_folder

    found = open_weights("export", str(folder))
    if wanted.model.hub:
        source = open_folder(wanted.model.hub, "model.hub")
        names = [n.removeprefix(PREFIX) for n in found.names() if n.startswith(PREFIX)]
        # The run's numbers are fp32 whatever the folder's were.
        config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
        size = write_folder(
            output, {**config, "dtype": "float32"},
            {name: found.shape(PREFIX + name) for name in names},
            lambda name: value(found, name), shard_bytes, files_beside(source.path),
        )  # fmt: skip
        return found.step, size
    same = equivalent(wanted.model, found.shape(PREFIX + "embed.weight")[0])
    ours = dict(same.names())
    size = write_folder(
        output, same.config(wanted.data.sequence),
        {name: same.shape(ours[name], lambda n: found.shape(PREFIX + n)) for name in ours},
        lambda name: same.give(ours[name], lambda n: value(found, n)), shard_bytes,
    )  # fmt: skip
    return found.step, size
