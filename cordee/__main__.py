"""`python -m cordee` is the `cordee` command."""

from cordee.cli.main import main

raise SystemExit(main())
