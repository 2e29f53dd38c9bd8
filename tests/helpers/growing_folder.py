"""The output folder of a study, which fills while the study runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cvae.files.file_lock import file_lock
from cvae.files.output_folder import check_folder, in_use, mark


@contextmanager
def growing_folder(
    folder: Path, made_by: str, older: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Yields a folder under its own name at once, for results that are needed while work goes on.

    Everything in it when the context ends, with or without an error, counts as made by the command.
    Files of an earlier call stay until they are overwritten. Raises as whole_folder.
    """
    path = check_folder(folder, made_by, older)
    path.mkdir(parents=True, exist_ok=True)
    with file_lock(path, refusal=in_use(folder)):
        check_folder(folder, made_by, older)
        mark(path, made_by)
        try:
            yield path
        finally:
            mark(path, made_by)
