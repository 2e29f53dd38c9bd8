"""The prepared data of one experiment: its splits and the condition of its model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvae.config.experiment import Experiment
from cvae.data.draws import choose_fraction
from cvae.data.store import Split, Store, open_store, text_file
from cvae.data.verified_checksums import VerifiedFiles
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_json
from cvae.models.backbone import ImageShape
from cvae.progress import progress_bar

# How many fp64 numbers are in memory at once.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ExperimentData:
    store: Store
    train: Split
    train_rows: NDArray[np.int64]
    """Rows of the training split that are trained on: all, or data.fraction of them."""
    val: Split
    image_shape: ImageShape
    condition_dim: int
    """Length of the condition vector; 0 for the plain VAE."""
    digest: str
    """sha256 over the checksums of the files that this experiment reads."""

    def condition(
        self, split: Split, indices: NDArray[np.int64], choice: NDArray[np.float64]
    ) -> NDArray[np.float32] | None:
        """Returns float32 (B, condition_dim), or None for the plain VAE, even if the store has conditions."""
        return split.condition(indices, choice) if self.condition_dim else None

    def text_statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns mean and standard deviation, (condition_dim,) each, over the captions trained on.

        The deviation of a constant dimension is 1 instead of 0. Raises ValueError without captions.
        """
        if self.train.text is None:
            raise ValueError("these data have no text embeddings")
        rows = np.arange(len(self.train.text))
        if self.train.caption_offsets is not None and len(self.train_rows) < len(self.train):
            offsets = self.train.caption_offsets
            spans = zip(offsets[self.train_rows], offsets[self.train_rows + 1], strict=True)
            rows = np.concatenate([np.arange(first, end) for first, end in spans])
        return _mean_and_std(self.train.text, rows)


def _mean_and_std(
    vectors: NDArray[np.float32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    # In fp64: fp32 sums over many rows drift by more than a small deviation.
    dim = vectors.shape[1]
    mean, squares, seen = np.zeros(dim), np.zeros(dim), 0
    size = max(1, _CHUNK // dim)
    for start in range(0, len(rows), size):
        chunk = vectors[rows[start : start + size]].astype(np.float64)
        count, chunk_mean = len(chunk), chunk.mean(0)
        # Combines two sets' sums of squared deviations (Chan, Golub and LeVeque 1983).
        delta = chunk_mean - mean
        squares += ((chunk - chunk_mean) ** 2).sum(0) + delta**2 * (seen * count / (seen + count))
        mean += delta * (count / (seen + count))
        seen += count
    std = np.sqrt(squares / seen).astype(np.float32)
    return mean.astype(np.float32), np.where(std > 0, std, np.float32(1))


def open_data(experiment: Experiment) -> ExperimentData:
    """Opens the data of an experiment.

    Files that were not verified on this $CVAE_HOME, or that have changed since, are compared with their
    checksums. Raises UserError if the data are not prepared, damaged, or unsuitable for the experiment.
    """
    data, condition = experiment.data, experiment.model.condition
    store = open_store(data.name, data.image_size)
    train, val = (store.split(name, data.text_encoder) for name in (data.train, data.val))
    for name, values, content, other in (
        ("label", train.labels, "labels", "text"),
        ("text", train.text, "captions", "label"),
    ):
        if condition == name and values is None:
            raise UserError(
                f"model.condition = '{name}', but {data.name} has no {content};"
                f" it can be '{other}' or 'none'"
            )
    # Not the manifest's digest, which another encoder's vectors in the same store would change.
    checksums = {
        f"{split}/{name}": entry.sha256
        for split in (data.train, data.val)
        for name, entry in store.manifest.splits[split].files.items()
        if not name.startswith("text/")
        or (data.text_encoder and name == text_file(data.text_encoder))
    }
    _verify(store, [(store.path / name, sha256) for name, sha256 in checksums.items()])
    channels, height, width = train.images.shape[1:]
    return ExperimentData(
        store=store,
        train=train,
        train_rows=choose_fraction(experiment.seed, train.ids, data.fraction),
        val=val,
        image_shape=(channels, height, width),
        condition_dim=train.condition_dim if condition != "none" else 0,
        digest=sha256_of_json(checksums),
    )


def _verify(store: Store, files: list[tuple[Path, str]]) -> None:
    """Raises UserError if a file differs from what was prepared; reads only unverified files."""
    verified = VerifiedFiles(store.path)
    if not verified.unverified(files):
        return
    with verified.locked():
        files = verified.unverified(files)
        total = sum(file.stat().st_size for file, _ in files)
        with progress_bar(total, "B", f"{store.path.name}: check once", delay=2) as bar:
            store.check_contents(files, bar.update)
