"""`python -m cordee` is the `cordee` command."""

from cordee.cli.main import program

program()
