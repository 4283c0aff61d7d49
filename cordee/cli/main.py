"""The `run_cordee` command: verbs, help and exit codes. A verb imports only its own file.

Exit codes: 0 done, 1 failed, 2 the command or its input is wrong (nothing was started or written).
A run that was asked to leave by a signal ends with 128 + its number, as a shell says it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from cordee import __version__
from cordee.dist.streams import print_to_stderr, tolerate_broken_pipes
from cordee.errors import ConfigError, CordeeError
from cordee.hardware.system import check_system

VERBS = {
    "train": "train, or go on with a run: cordee train [CONFIG.toml] [key=value ...]",
    "plan": "legal layouts of these devices, ranked by memory and time, with reasons",
    "lr": "find a learning rate by experiment: a band, a table, a picture",
    "report": "one HTML page of a run: loss, gradients, speed, events",
    "sample": "let a trained model write",
    "data": "prepare, inspect or verify a dataset",
    "export": "weights of a run as safetensors, or as a folder for transformers",
    "fingerprint": "SHA-256 of the weights of a run or checkpoint",
    "config": "explain a key, or show the resolved run",
    "probe": "measure this machine: what plans and the choice of precision rest on",
    "doctor": "check this machine: environment, exchange, restart",
}

HELP = """cordee: trains models on whatever devices there are; the same descent on all of them

usage: cordee VERB [CONFIG.toml] [key=value ...] [--json]

{verbs}

first run   cordee train                      (2 CPU cores, no download, under 2 minutes)
any key     cordee config explain optim.lr    (or a whole section: optim)
a verb      cordee train --help
exit codes  0 done · 1 failed · 2 wrong command or input, nothing started"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(HELP.format(verbs="\n".join(f"  {v:<{width}}  {t}" for v, t in VERBS.items())))
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"cordee {__version__}")
        return 0
    try:
        return _run_verb(words[0], words[1:])
    except CordeeError as error:
        print_to_stderr(f"error: {error.sentence()}")
        return error.exit_code
    except OSError as error:
        # A disk or a file that nobody expected to fail: its name and its reason are what helps.
        print_to_stderr(f"error: {error.strerror or error}: {error.filename or ''}")
        return 1
    except MemoryError as error:
        print_to_stderr(f"error: there is not enough memory: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def program() -> NoReturn:
    """The process: runs the verb and leaves with its exit code."""
    tolerate_broken_pipes()
    with suppress(ConfigError):  # a system that will not do, of which `main` tells
        check_system()
        importlib.import_module("cordee.dist.process_group").set_passive_wait()
    code = main()
    try:
        sys.stdout.flush()
    except OSError as error:
        print_to_stderr(f"error: the output cannot be written: {error.strerror}")
        code = code or 1
    if "torch.distributed" in sys.modules:
        # All is written and joined by now. The interpreter's own way out would unwind the worker
        # threads of gloo and FSDP2, which now and then aborts a rank whose work is done.
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _run_verb(name: str, arguments: list[str]) -> int:
    if name not in VERBS:
        close_matches = difflib.get_close_matches(name, VERBS, n=1)
        raise ConfigError(
            "there is no such verb",
            values={"verb": name},
            fix=f"cordee {close_matches[0]}" if close_matches else "cordee --help",
        )
    check_system()  # before the verb's own imports, which need such a system
    module = importlib.import_module(f"cordee.cli.{name}")
    code: int = module.run(arguments)
    return code
