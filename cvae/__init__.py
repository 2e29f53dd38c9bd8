"""One experiment, from its configuration to its pictures. Knows no SLURM, no Ray and no command line."""

import os
import sys
from contextlib import suppress

_NEEDED = {"slurm", "workflows", "analysis", "yaml", "numpy", "torch", "pydantic", "tqdm"}


def _check_python_path() -> None:
    """Ends the process with one line if a file on PYTHONPATH hides a module that we import.

    It runs before the imports that would fail, each with its own riddle.
    """
    own = os.path.dirname(os.__file__)
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        names: list[str] = []
        with suppress(OSError):
            names = (
                sorted(os.listdir(folder)) if folder and not os.path.samefile(folder, own) else []
            )
        for name in names:
            module = name.removesuffix(".py")
            if module != name and (module in _NEEDED or module in sys.stdlib_module_names):
                sys.stderr.write(
                    f"error: {ascii(os.path.join(folder, name))[1:-1][-300:]} hides the module {module};"
                    " take its folder out of PYTHONPATH or rename the file\n"
                )
                raise SystemExit(2)


_check_python_path()
