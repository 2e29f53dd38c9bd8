"""Arguments of every script, in a home where there is nothing."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from cvae.errors import UserError, one_line
from tests.fuzz import odd
from tests.fuzz.frame import Case, target

_OPTIONS = [
    *("--nodes", "--gpus", "--cluster", "--engine", "--name", "--out", "--seed", "-n", "--split"),
    *("--metrics", "--iwae-samples", "--inception", "--rank", "--experiment", "--sweep", "--runs"),
    *(
        "--gpus-per-trial",
        "--address",
        "--resume",
        "--cancel",
        "--coco",
        "--only",
        "--against",
        "--rounds",
    ),
    *(
        "--seconds",
        "--size",
        "--crop",
        "--root",
        "--text",
        "--count",
        "--source",
        "--text-precision",
    ),
    *(
        "--dry-run",
        "--help",
        "--nonsense",
        "--",
        "-",
        "-h",
        "--no",
        "--reconstruct",
        "--latent-map",
    ),
]
_WORDS = [
    *(
        "list",
        "show",
        "path",
        "logs",
        "cancel",
        "resume",
        "sync",
        "coco",
        "scenes",
        "fashion_mnist",
    ),
    *(
        "latest",
        "configs/demo.yaml",
        "configs/sweeps/demo.yaml",
        "local",
        "slurm",
        "v100",
        "val",
        "train",
    ),
    *(
        "/dev/null",
        "/dev/zero",
        "/etc/passwd",
        "/proc/self/mem",
        "/root",
        ".",
        "..",
        "/",
        "~",
        "demo",
    ),
    *(
        "seed=1",
        "model.latent_dim=4",
        "=",
        "a=",
        "=b",
        "name=../x",
        "data.name=/etc",
        "x.png",
        "preparation",
    ),
]


def _word(draw: random.Random) -> str:
    act = draw.random()
    if act < 0.5:
        return draw.choice(_WORDS)
    # An argument holds no NUL.
    return str(odd.value(draw)).replace("\0", "\udcff" if act < 0.6 else "")


def _scripts() -> dict[str, tuple[Callable[[list[str]], int], list[str]]]:
    """Every main, with what keeps it from doing anything."""
    from analysis import report
    from tests.studies import benchmark
    from workflows import evaluate, export, generate, launch, prepare, runs, sweep

    return {
        "launch": (launch.main, ["--dry-run"]),
        "sweep": (sweep.main, ["--dry-run"]),
        "runs": (runs.main, []),
        "evaluate": (evaluate.main, []),
        "generate": (generate.main, []),
        "export": (export.main, []),
        "report": (report.main, []),
        # These would begin to work on what is right.
        "benchmark": (lambda words: int(bool(benchmark.parser().parse_intermixed_args(words))), []),
        "prepare": (lambda words: int(bool(prepare._parser().parse_args(words))), []),
    }


@target("command_lines")
def command_lines(draw: random.Random, folder: Path) -> Case:
    scripts = _scripts()
    name = draw.choice(list(scripts))
    main, harmless = scripts[name]
    words = [
        draw.choice(_OPTIONS) if draw.random() < 0.4 else _word(draw)
        for _ in range(draw.choice([0, 1, 2, 3, 4, 6]))
    ]

    def read() -> None:
        home = {"CVAE_HOME": str(folder)}
        with mock.patch.dict(os.environ, home):
            try:
                main([*harmless, *words])
            except UserError as error:
                # As command_line.run prints it.
                raise UserError(one_line(error)) from None
        left = [file.name for file in folder.iterdir()]
        assert not left, f"{left} were written"

    return Case(f"{name} {[word[:300] for word in words]}", read)
