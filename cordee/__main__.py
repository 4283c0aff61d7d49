"""`python -m cordee`, or this file by its path, is the `run_cordee` command.

Neither imports what lies in the current folder: a user's cordee.py or random.py there is not ours.
"""

import sys

if not __package__:
    # By its path, as workers are started: the package is the one in which this file lies.
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    package_dir = Path(__file__).resolve().parent
    spec = spec_from_file_location(
        "cordee", package_dir / "__init__.py", submodule_search_locations=[str(package_dir)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{package_dir} is no package")
    package = module_from_spec(spec)
    sys.modules["cordee"] = package
    spec.loader.exec_module(package)
if not sys.flags.safe_path:
    # -m puts the current folder here, a path this file's own; the package itself is imported.
    del sys.path[0]

if sys.argv[1:2] == ["--module"]:
    # A program of the package's own, such as the probe, in a process that imports like this one.
    from runpy import run_module

    module_name = sys.argv[2]
    del sys.argv[1:3]
    run_module(module_name, run_name="__main__", alter_sys=True)
else:
    from cordee.cli.main import program

    program()
