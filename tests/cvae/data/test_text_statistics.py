"""The mean and deviation that text embeddings are standardised with."""

import tracemalloc
from types import SimpleNamespace

import numpy as np

from cvae.data.experiment_data import ExperimentData


def statistics(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train = SimpleNamespace(text=text, caption_offsets=None)
    return ExperimentData.text_statistics(SimpleNamespace(train=train))  # type: ignore[arg-type]


def test_many_rows_of_a_nearly_constant_dimension() -> None:
    text = np.full((300_000, 3), 7.3, np.float32)
    text[:, 1] += np.random.default_rng(0).normal(0, 1e-4, len(text)).astype(np.float32)
    text[::2, 2] = -1
    tracemalloc.start()
    mean, std = statistics(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    exact = text.astype(np.float64)
    np.testing.assert_array_equal(mean, exact.mean(0).astype(np.float32))
    np.testing.assert_allclose(std[1:], exact.std(0)[1:], rtol=1e-5)
    assert std[0] == 1  # it never varies
    assert peak < 64 << 20
