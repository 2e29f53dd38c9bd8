"""The tags of a run in MLflow, among them the description that its page opens with."""

import json
from collections.abc import Mapping
from pathlib import Path

from cvae.errors import UserError
from cvae.metrics import reported_as
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line

NOTE = "mlflow.note.content"
_FACTS = (
    *("job_id", "world_size", "device", "precision", "engine", "uncommitted_changes"),
    *("data_name", "data_digest"),
)


def of_start(run_dir: Path, line: Line, present: Mapping[str, str]) -> dict[str, str]:
    """Returns the tags for a start line of the journal. present: the run's tags in MLflow."""
    tags = {name: str(line[name]) for name in _FACTS if line.get(name) is not None}
    tags["hosts"] = ", ".join(sorted(set(line.get("hosts") or [])))
    if line.get("commit"):
        tags["mlflow.source.git.commit"] = line["commit"]
    packages = line.get("packages") or {}
    tags["packages"] = json.dumps({name: version for name, version in packages.items() if version})
    run = RunDirectory(run_dir)
    try:
        command = run.submissions()[0]["command"]
    except (UserError, LookupError):
        command = f"workflows/launch.py runs/{run.name}/{run.experiment_file.name}"
    tags["command"] = f"python {command}"
    if NOTE not in present:  # people edit it
        sweep = present.get("sweep")
        launched = f"A trial of {sweep}; repeated alone with" if sweep else "Launched with"
        draw = f"python workflows/generate.py {run.name}"
        commands = {launched: tags["command"], "Look at it, and draw with it": draw}
        metrics = [
            f"- `val/{metric.name}`: {metric.description()}" for metric in reported_as("val")
        ]
        tags[NOTE] = "\n".join([description(commands), "\nMetrics:\n", *metrics])
    return tags


def description(commands: Mapping[str, str]) -> str:
    """Returns Markdown that shows each command below its purpose.

    A command is one indented line: unlike a fence or backticks, nothing in the command can end that.
    """
    parts = (f"{purpose}:\n\n    {' '.join(text.split())}" for purpose, text in commands.items())
    return "\n\n".join(parts)
