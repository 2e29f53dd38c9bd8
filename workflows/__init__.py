"""The commands. Hints are what a library function's error can suggest without knowing the command line."""

from cvae.errors import HINTS

HINTS |= {
    "no_run": "`runs.py list` shows the runs there are",
    "run_taken": "choose another --name, or continue that run with"
    " `python workflows/runs.py resume {name}`",
    "measure_fid": "name its file with --inception FILE",
}
for _dataset, _options in {
    "fashion_mnist": "",
    "scenes": "",
    "coco": " --root DIR --size {image_size}",
}.items():
    _command = f"python workflows/prepare.py {_dataset}{_options}"
    HINTS |= {
        f"prepare_{_dataset}": f"prepare it with: {_command}",
        f"repair_{_dataset}": f"prepare it again: {_command}",
        f"encode_{_dataset}": f"prepare it with: {_command} --text {{text_encoder}}",
    }
