"""An imitation of a site: SLURM's commands as scripts on PATH, whose output a test sets."""

from pathlib import Path

import pytest

COMMANDS = ("scontrol", "squeue", "sacct", "sinfo", "scancel", "sbatch")
BUSY = "slurm_update error: Socket timed out on send/recv operation"
DISABLED = "Requested operation is presently disabled for job 12"
GONE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ACCOUNTING = "sacct: error: slurm_persist_conn_open: Unable to connect to slurmdbd"


class Site:
    """`commands` are all commands that were run, in order."""

    def __init__(self, folder: Path):
        self.folder, self._asked = folder, folder / "asked"
        folder.mkdir()
        self._asked.touch()
        for name in COMMANDS:
            self.says(name)

    def says(self, command: str, *cases: str) -> None:
        """Sets a command's behaviour. cases: of a shell's `case` on the arguments, like '*requeue*) exit 1;;'."""
        body = "\n".join([*cases, "*) exit 0;;"])
        script = self.folder / command
        script.write_text(
            f'#!/bin/sh\necho {command} "$@" >>{self._asked}\ncase "$*" in\n{body}\nesac\n'
        )
        script.chmod(0o755)

    def fails(self, command: str, words: str, times: int = 10**6, only: str = "*") -> None:
        """Lets the command print `words` and fail, `times` times; after that it succeeds silently."""
        count = f"$(grep -c '^{command} {only.strip('*')}' {self._asked})"
        self.says(
            command, f'{only}) [ {count} -gt {times} ] || {{ echo "{words}" >&2; exit 1; }};;'
        )

    def lacks(self, command: str) -> None:
        (self.folder / command).unlink()

    @property
    def commands(self) -> list[str]:
        return self._asked.read_text().splitlines()

    def times(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.commands)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path / "site")
    # The programs that a shell needs, without a SLURM that may be installed here.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "bash", "cat", "grep", "sleep", "kill", "env"):
        for folder in ("/bin", "/usr/bin"):
            if (Path(folder) / name).exists() and not (tools / name).exists():
                (tools / name).symlink_to(Path(folder) / name)
    monkeypatch.setenv("PATH", f"{site.folder}:{tools}")
    return site
