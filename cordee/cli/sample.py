"""`cordee sample`: a trained model writes."""

from __future__ import annotations

import json
from argparse import Namespace

from cordee.begin import data_place
from cordee.cli.arguments import check_flags, parser, read
from cordee.cli.places import refuse_brought, run_of
from cordee.config.ranges import Range
from cordee.config.run import Run
from cordee.data.manifest import read_info
from cordee.errors import ConfigError

RANGES = {
    "tokens": Range(1, 10**6), "temperature": Range(0, 1e6), "seed": Range(0, 2**63 - 1),
}  # fmt: skip


def run(argv: list[str]) -> int:
    """See --help."""
    made = parser(
        "sample",
        "Prints text that the run's newest weights write after a prompt.",
        'cordee sample runs/tiny --prompt "class Node:" --tokens 400 --temperature 0.7',
        "RUN [--prompt TEXT] [--tokens N] [--temperature T] [--seed N] [--json]",
    )
    made.add_argument("--prompt", default="def ", help="text to go on from")
    made.add_argument("--tokens", type=int, default=300, help="how many tokens to write")
    made.add_argument("--temperature", type=float, default=0.8, help="0 is always the likeliest")
    made.add_argument("--seed", type=int, default=0, help="another seed, another text")
    made.add_argument("--json", action="store_true", help="one JSON object")
    words = read(made, argv, rest=1, settings=())
    check_flags(made, words.flags, RANGES)
    if not words.flags.prompt:
        raise ConfigError(
            "a sample needs a prompt to go on from", values={"--prompt": ""}, fix='--prompt "def "'
        )
    folder, wanted = run_of("sample", words.run)
    refuse_brought("sample", folder)
    info = read_info(data_place(wanted, folder))
    if info.tokenizer != "bytes":
        raise ConfigError(
            "the run's tokens are no text",
            values={"data.path": wanted.data.path, "tokenizer": info.tokenizer},
            fix="a run on text, such as data.path=builtin:stdlib",
        )
    text, step = _write(str(folder), wanted, info.vocabulary, words.flags)
    if words.flags.json:
        print(json.dumps({"prompt": words.flags.prompt, "text": text, "step": step}))
    else:
        print(text)
    return 0


def _write(word: str, wanted: Run, vocabulary: int, flags: Namespace) -> tuple[str, int]:
    """Builds the model, loads it and lets it write: (text, step of the weights)."""
    import torch

    from cordee.cli.weights import open_weights, weights
    from cordee.model.hub import empty_model, read_hub
    from cordee.model.transformer import Transformer
    from cordee.sample import generate, to_text

    found = open_weights("sample", word)
    hub = read_hub(wanted.model.hub) if wanted.model.hub else None
    model = Transformer(wanted.model, vocabulary) if hub is None else empty_model(hub, "cpu")
    # A tied parameter is stored once.
    kept = model.load_state_dict(weights(found), strict=False)
    odd = [*kept.unexpected_keys, *(set(kept.missing_keys) - set(hub.ties if hub else ()))]
    if odd:
        raise ConfigError(
            "the run's weights are not those of the model that its run.toml describes",
            values={"RUN": word, "tensor": odd[0], "differ": len(odd)},
            fix="cordee export, and a few lines with the model that made them",
        )
    model.eval()
    prompt = torch.tensor(list(flags.prompt.encode(errors="surrogateescape")), dtype=torch.int64)
    made = generate(
        model, prompt, flags.tokens, wanted.data.sequence, flags.temperature, flags.seed
    )
    return to_text(made), found.step
