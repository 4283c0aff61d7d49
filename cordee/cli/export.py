"""`cordee export`: the weights of a run, as one safetensors file or as a transformers folder."""

from __future__ import annotations

import json
from pathlib import Path

from cordee.cli.arguments import check_flags, make_parser, parse_arguments
from cordee.config.load import flatten
from cordee.config.paths import expand_home
from cordee.config.ranges import Range
from cordee.config.run import Run
from cordee.dist.streams import print_to_stderr
from cordee.errors import ConfigError
from cordee.launcher.run_paths import atomic_write, load_run, refuse_overwrite, refuse_user_model


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "export",
        "Writes the newest complete weights of a run. safetensors: one file (default\n"
        "RUN/model.safetensors) with the model's settings in its metadata. hf: a folder (default\n"
        "RUN/hf) that transformers' from_pretrained reads; a run of model.hub, or a transformer\n"
        "whose knobs Llama or Qwen3 have (docs/models.md).",
        "cordee export runs/tiny --to hf --output tiny-hf",
        "RUN [--to safetensors|hf] [--output PATH] [--json]",
    )
    arg_parser.add_argument(
        "--to", default="safetensors", choices=("safetensors", "hf"), help="what"
    )
    arg_parser.add_argument("--output", "--out", default="", help="where to write")
    arg_parser.add_argument(
        "--shard-mb", type=float, default=2000.0, help="hf: largest file, in MB (default 2000)"
    )
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv, max_positionals=1, sections=())
    folder, run_config = load_run("export", args.run_word)
    is_hf = args.flags.to == "hf"
    output = Path(
        expand_home(args.flags.output) or folder / ("hf" if is_hf else "model.safetensors")
    )
    if not output.parent.is_dir():
        raise ConfigError(
            "the output's folder does not exist",
            values={"output": str(output)},
            fix=f"mkdir -p {output.parent}",
        )
    check_flags(arg_parser, args.flags, {"shard_mb": Range(0, 1e9, excludes_minimum=True)})
    if is_hf:
        refuse_user_model("export --to hf", folder)
        step, size_bytes = _write_hf_folder(
            folder, run_config, output, int(args.flags.shard_mb * 1e6)
        )
    else:
        step, size_bytes = _write_safetensors(folder, run_config, output)
    if args.flags.json:
        print(json.dumps({"file": str(output), "step": step, "bytes": size_bytes}))
    else:
        print_to_stderr(f"{output}: step {step}, {size_bytes / 1e6:.1f} MB")
    return 0


def _write_safetensors(folder: Path, run_config: Run, output: Path) -> tuple[int, int]:
    """One safetensors file, whole; (step, bytes)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from cordee.training.weights import open_weights, read_parameters

    refuse_overwrite(output, "--output", _is_export)
    checkpoint = open_weights("export", str(folder))
    settings = {k: str(v) for k, v in flatten(run_config).items() if k.startswith("model.")}
    with atomic_write(output, "--output") as temporary_path:
        try:
            save_file(
                read_parameters(checkpoint),
                temporary_path,
                metadata={**settings, "step": str(checkpoint.step)},
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return checkpoint.step, output.stat().st_size


def _is_export(output: Path) -> bool:
    """Whether a file is one of these: its metadata names a step and the model's settings."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(output, framework="pt") as reader:
            metadata = reader.metadata() or {}
    except SafetensorError:
        return False
    return "step" in metadata and "model.preset" in metadata


def _write_hf_folder(
    folder: Path, run_config: Run, output: Path, shard_bytes: int
) -> tuple[int, int]:
    """A transformers folder, tensor by tensor; (step, bytes of the weights)."""
    from cordee.hf.convert import make_hf_adapter
    from cordee.hf.safetensors_io import companion_files, open_folder, write_folder
    from cordee.training.weights import MODEL_PREFIX, open_weights, read_parameter

    checkpoint = open_weights("export", str(folder))
    if run_config.model.hub:
        source = open_folder(run_config.model.hub, "model.hub")
        names = [
            n.removeprefix(MODEL_PREFIX) for n in checkpoint.names() if n.startswith(MODEL_PREFIX)
        ]
        # The run's numbers are fp32 whatever the folder's were.
        config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
        size_bytes = write_folder(
            output,
            {**config, "dtype": "float32"},
            {name: checkpoint.shape(MODEL_PREFIX + name) for name in names},
            lambda name: read_parameter(checkpoint, name),
            shard_bytes,
            companion_files(source.path),
        )
        return checkpoint.step, size_bytes
    adapter = make_hf_adapter(run_config.model, checkpoint.shape(MODEL_PREFIX + "embed.weight")[0])
    own_names = dict(adapter.name_pairs())
    size_bytes = write_folder(
        output,
        adapter.hf_config(run_config.data.sequence),
        {
            name: adapter.tensor_shape(
                own_names[name], lambda n: checkpoint.shape(MODEL_PREFIX + n)
            )
            for name in own_names
        },
        lambda name: adapter.to_hf(own_names[name], lambda n: read_parameter(checkpoint, n)),
        shard_bytes,
    )
    return checkpoint.step, size_bytes
