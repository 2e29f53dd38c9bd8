"""What MLflow is told of a run besides its metrics: tags, and the description that its page opens with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvae.errors import UserError
from cvae.metrics import reported_as
from cvae.run.directory import RunDirectory

NOTE = "mlflow.note.content"
_FACTS = (
    *("job_id", "world_size", "device", "precision", "engine", "uncommitted_changes"),
    *("data_name", "data_digest"),
)


def of_start(run_dir: Path, record: dict[str, Any], there: Mapping[str, str]) -> dict[str, str]:
    """Tags for a start line of the journal. there: those that the run has in MLflow."""
    tags = {name: str(record[name]) for name in _FACTS if record.get(name) is not None}
    tags["hosts"] = ", ".join(sorted(set(record.get("hosts", []))))
    if record.get("commit"):
        tags["mlflow.source.git.commit"] = record["commit"]
    packages = {name: found for name, found in record.get("packages", {}).items() if found}
    tags["packages"] = json.dumps(packages)
    sweep = there.get("sweep")
    tags["command"] = _command(RunDirectory(run_dir))
    if NOTE not in there:  # people write there, too
        tags[NOTE] = description(
            {
                f"A trial of {sweep}; repeated alone with" if sweep else "Launched with": tags[
                    "command"
                ],
                "Look at it, and draw with it": f"python workflows/generate.py {run_dir.name}",
            }
        )
        tags[NOTE] += "\n\nMetrics:\n\n" + "\n".join(
            f"- `val/{metric.name}`: {metric.description()}" for metric in reported_as("val")
        )
    return tags


def description(commands: Mapping[str, str]) -> str:
    """Markdown: each command under what it does.

    A command stands indented, on one line: unlike a fence or backticks, nothing in it can end that.
    """
    told = (f"{what}:\n\n    {' '.join(command.split())}" for what, command in commands.items())
    return "\n\n".join(told)


def _command(run: RunDirectory) -> str:
    try:
        command = run.submissions()[0]["command"]
    except (UserError, LookupError):
        command = f"workflows/launch.py runs/{run.name}/{run.experiment_file.name}"
    return f"python {command}"
