"""One experiment, from its configuration to its pictures, without SLURM, Ray or a command line."""

import os
import sys

_IMPORTED = {"slurm", "workflows", "analysis", "yaml", "numpy", "torch", "pydantic", "tqdm"}


def _check_python_path() -> None:
    """Ends the process with one line if a file on PYTHONPATH hides a module that we import.

    It runs first because each of the following imports would fail with a different, obscure error.
    """
    standard_library = os.path.dirname(os.__file__)
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        try:
            names = [] if os.path.samefile(folder, standard_library) else sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            module, extension = os.path.splitext(name)
            if extension == ".py" and (module in _IMPORTED or module in sys.stdlib_module_names):
                sys.stderr.write(
                    f"error: {ascii(os.path.join(folder, name))[1:-1][-300:]} hides the module {module};"
                    " take its folder out of PYTHONPATH or rename the file\n"
                )
                raise SystemExit(2)


_check_python_path()
