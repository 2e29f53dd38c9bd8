"""One rank of a run: `python -m tests.gpu_check.train_run RUN_FOLDER`."""

import sys
from pathlib import Path

from tests.gpu_check import stand_in

if __name__ == "__main__":
    stand_in.install_if_needed()
    from cvae.errors import UserError
    from cvae.training.train import train

    try:
        print(train(Path(sys.argv[1]), mirrored=False))
    except UserError as error:
        sys.exit(f"error: {error}")
