"""All targets: importing a module of them registers them."""

from tests.fuzz import coco, command_lines, exports, files, run_folders, stores
from tests.fuzz.frame import TARGETS

ALL = [*TARGETS]
__all__ = ["ALL", "coco", "command_lines", "exports", "files", "run_folders", "stores"]
