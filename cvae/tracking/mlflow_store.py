"""MLflow's store: the SQLite file, the experiments in it, and what it shows of a run besides metrics."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from cvae.errors import UserError
from cvae.files import paths
from cvae.files.file_lock import file_lock
from cvae.metrics import reported_as
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line

NOTE = "mlflow.note.content"
"""The tag of the description with which MLflow's page of a run opens."""
_FACTS = (
    *("job_id", "world_size", "device", "precision", "engine", "uncommitted_changes"),
    *("data_name", "data_digest"),
)

_log = logging.getLogger(__name__)


def create_store(uri: str) -> None:
    """Creates the SQLite file of a URI unless it exists: whole, and by one process at a time.

    MLflow alone lets two processes create the tables of one file at once, and both fail; a process
    that is killed meanwhile leaves a file that never works again.
    """
    if not uri.startswith("sqlite:///"):
        return
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(Path(f"{file}.lock"), math.inf):
        if file.exists():
            return
        _log.info("making the store %s", file)
        temporary = Path(f"{file}.new")
        temporary.unlink(missing_ok=True)
        # The artifacts of the experiment `Default` go next to the database, not into the current folder.
        artifacts = (file.resolve().parent / "mlruns").as_uri()
        SqlAlchemyStore(f"sqlite:///{temporary}", artifacts).engine.dispose()
        temporary.rename(file)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Returns the id of the MLflow experiment of a name, which is created or restored if necessary."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None
        if not uri.startswith(("http:", "https:")):
            # Without a server this process stores artifacts, by default in the current folder.
            database = uri.removeprefix("sqlite:///")
            folder = Path(database).resolve().parent if database != uri else paths.home()
            location = (folder / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
        try:
            # This kind makes the UI show runs and charts first instead of traces of prompts.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, location, kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        _log.warning("experiment %s was deleted in MLflow: restored", name)
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def start_tags(run_dir: Path, line: Line, present: Mapping[str, str]) -> dict[str, str]:
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
