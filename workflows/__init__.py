"""The commands. Hints are what a library function's error can suggest without knowing the command line."""

from cvae.errors import HINTS

HINTS |= {
    "no_run": "`runs.py list` shows the runs there are",
    "run_taken": "choose another --name, or continue that run with"
    " `python workflows/runs.py resume {name}`",
}
