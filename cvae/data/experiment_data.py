"""The prepared data of one experiment: its splits, and what its model is conditioned on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvae.config.experiment import Experiment
from cvae.data.draws import choose_fraction
from cvae.data.store import Split, Store, open_store, text_file
from cvae.data.verified_checksums import Verified
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_json
from cvae.models.backbone import ImageShape
from cvae.progress import progress_bar

# Numbers that are in memory at once as fp64.
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
    """sha256 over the checksums of just the files that this experiment reads."""

    def condition(
        self, split: Split, indices: NDArray[np.int64], choice: NDArray[np.float64]
    ) -> NDArray[np.float32] | None:
        """(B, condition_dim), or None for the plain VAE, whatever the store holds."""
        return split.condition(indices, choice) if self.condition_dim else None

    def text_statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of each dimension over the captions trained on, (condition_dim,)
        each.

        A dimension that never varies gets 1 instead of 0. Raises ValueError where there are no captions.
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
    """In fp64 and a few MB at a time: fp32 sums over many rows drift by more than a small deviation."""
    dim = vectors.shape[1]
    mean, squares, seen = np.zeros(dim), np.zeros(dim), 0
    size = max(1, _CHUNK // dim)
    for start in range(0, len(rows), size):
        chunk = vectors[rows[start : start + size]].astype(np.float64)
        count, own = len(chunk), chunk.mean(0)
        # Two sets' sums of squared deviations, put together (Chan, Golub and LeVeque 1983).
        apart = own - mean
        squares += ((chunk - own) ** 2).sum(0) + apart**2 * (seen * count / (seen + count))
        mean += apart * (count / (seen + count))
        seen += count
    std = np.sqrt(squares / seen).astype(np.float32)
    return mean.astype(np.float32), np.where(std > 0, std, np.float32(1))


def open_data(experiment: Experiment) -> ExperimentData:
    """Opens the data of an experiment.

    The first time on this $CVAE_HOME, and after a file has changed, all that the experiment reads is compared
    with the checksums of its preparation. Raises UserError if the data are not prepared, not as this experiment
    needs them, or not as they were prepared.
    """
    data, wanted = experiment.data, experiment.model.condition
    store = open_store(data.name, data.image_size)
    train, val = (store.split(name, data.text_encoder) for name in (data.train, data.val))
    if wanted == "label" and train.labels is None:
        raise UserError(
            f"model.condition = 'label', but {data.name} has no labels; it can be 'text' or 'none'"
        )
    if wanted == "text" and train.text is None:
        raise UserError(
            f"model.condition = 'text', but {data.name} has no captions; it can be 'label' or 'none'"
        )
    _check_once(store, experiment)
    channels, height, width = train.images.shape[1:]
    return ExperimentData(
        store=store,
        train=train,
        train_rows=choose_fraction(experiment.seed, train.ids, data.fraction),
        val=val,
        image_shape=(channels, height, width),
        condition_dim=train.condition_dim if wanted != "none" else 0,
        digest=_digest(store, experiment),
    )


def _check_once(store: Store, experiment: Experiment) -> None:
    """Raises UserError if a file that the experiment reads is not what was prepared; reads what is not known."""
    read = {store.path / name for name in _files_read(store, experiment)}
    files = [(file, sha256) for file, sha256 in store.checksums() if file in read]
    known = Verified(store.path)
    if not known.unknown(files):
        return
    with known.alone():
        unknown = known.unknown(files)
        total = sum(file.stat().st_size for file, _ in unknown)
        with progress_bar(total, "B", f"{store.path.name}: check once", delay=2) as bar:
            store.check_contents(unknown, bar.update)


def _files_read(store: Store, experiment: Experiment) -> dict[str, str]:
    """The files that the experiment reads, as "train/images.npy", each with its sha256."""
    data = experiment.data
    read = text_file(data.text_encoder) if data.text_encoder else None
    return {
        f"{split}/{name}": entry.sha256
        for split in (data.train, data.val)
        for name, entry in store.manifest.splits[split].files.items()
        if not name.startswith("text/") or name == read
    }


def _digest(store: Store, experiment: Experiment) -> str:
    # Not the manifest's own digest: another encoder prepared later in the same store changes nothing here.
    return sha256_of_json(_files_read(store, experiment))
