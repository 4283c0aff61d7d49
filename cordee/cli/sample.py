"""`cordee sample`: a trained model writes."""

from __future__ import annotations

import json
from argparse import Namespace

from cordee.cli.arguments import check_flags, make_parser, parse_arguments
from cordee.config.ranges import Range
from cordee.config.run import Run
from cordee.data.manifest import read_info
from cordee.errors import ConfigError
from cordee.launcher.prepare import dataset_dir_of
from cordee.launcher.run_paths import load_run, refuse_user_model

FLAG_RANGES = {
    "tokens": Range(1, 10**6), "temperature": Range(0, 1e6), "seed": Range(0, 2**63 - 1),
}  # fmt: skip


def run(argv: list[str]) -> int:
    """See --help."""
    arg_parser = make_parser(
        "sample",
        "Prints text that the run's newest weights write after a prompt.",
        'cordee sample runs/tiny --prompt "class Node:" --tokens 400 --temperature 0.7',
        "RUN [--prompt TEXT] [--tokens N] [--temperature T] [--seed N] [--json]",
    )
    arg_parser.add_argument("--prompt", default="def ", help="text to go on from")
    arg_parser.add_argument("--tokens", type=int, default=300, help="how many tokens to write")
    arg_parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 is always the likeliest"
    )
    arg_parser.add_argument("--seed", type=int, default=0, help="another seed, another text")
    arg_parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parse_arguments(arg_parser, argv, max_positionals=1, sections=())
    check_flags(arg_parser, args.flags, FLAG_RANGES)
    if not args.flags.prompt:
        raise ConfigError(
            "a sample needs a prompt to go on from", values={"--prompt": ""}, fix='--prompt "def "'
        )
    folder, run_config = load_run("sample", args.run_word)
    refuse_user_model("sample", folder)
    info = read_info(dataset_dir_of(run_config, folder))
    if info.tokenizer != "bytes":
        raise ConfigError(
            "the run's tokens are no text",
            values={"data.path": run_config.data.path, "tokenizer": info.tokenizer},
            fix="a run on text, such as data.path=builtin:stdlib",
        )
    text, step = _generate_text(str(folder), run_config, args.flags)
    if args.flags.json:
        print(json.dumps({"prompt": args.flags.prompt, "text": text, "step": step}))
    else:
        print(text)
    return 0


def _generate_text(run_word: str, run_config: Run, flags: Namespace) -> tuple[str, int]:
    """Loads the model and lets it write: (text, step of the weights)."""
    import torch

    from cordee.training.evaluate import generate, to_text
    from cordee.training.weights import load_trained_model

    model, step = load_trained_model(run_word)
    prompt = torch.tensor(list(flags.prompt.encode(errors="surrogateescape")), dtype=torch.int64)
    token_ids = generate(
        model, prompt, flags.tokens, run_config.data.sequence, flags.temperature, flags.seed
    )
    return to_text(token_ids), step
