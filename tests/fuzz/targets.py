"""All targets: importing a module of them registers them."""

from tests.fuzz import command_lines, files, stores
from tests.fuzz.frame import TARGETS

ALL = [*TARGETS]
__all__ = ["ALL", "command_lines", "files", "stores"]
