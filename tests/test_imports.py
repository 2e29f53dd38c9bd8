"""Imports point one way, as the map in CONTRIBUTING.md says."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import PROJECT_ROOT

TOP = ("cvae", "analysis", "slurm", "workflows")
ALLOWED = {
    "cvae": {"cvae"},
    "analysis": {"analysis", "cvae"},
    "slurm": {"slurm", "cvae"},
    "workflows": {"workflows", "slurm", "cvae"},
}


def _name(file: Path) -> str:
    parts = file.relative_to(PROJECT_ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {_name(file): file for top in TOP for file in (PROJECT_ROOT / top).rglob("*.py")}


def _imports(file: Path, everywhere: bool) -> Iterator[str]:
    """The project's modules that a file imports; everywhere: also inside of functions."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_packages_import_one_way() -> None:
    for name, file in MODULES.items():
        top = name.partition(".")[0]
        others = {module.partition(".")[0] for module in _imports(file, everywhere=True)}
        assert others & {*TOP, "tests"} <= ALLOWED[top], f"{name} imports {others}"


def test_folders_of_cvae_import_only_those_above_them_in_the_map() -> None:
    text = (PROJECT_ROOT / "CONTRIBUTING.md").read_text()
    block = text.partition("    cvae/")[2].partition("    slurm/")[0]
    order = re.findall(r"^      (\w+)/", block, re.MULTILINE)
    for name, file in MODULES.items():
        folder = name.split(".")[1] if name.count(".") > 1 else ""
        if not name.startswith("cvae.") or not folder:
            continue
        for module in _imports(file, everywhere=True):
            parts = module.split(".")
            if parts[0] == "cvae" and len(parts) > 2:
                assert order.index(parts[1]) <= order.index(folder), f"{name} imports {module}"


def test_no_circle_of_files() -> None:
    graph = {
        name: {module for module in _imports(file, everywhere=False) if module in MODULES}
        for name, file in MODULES.items()
    }
    # Raises CycleError with the circle's modules.
    TopologicalSorter(graph).prepare()
