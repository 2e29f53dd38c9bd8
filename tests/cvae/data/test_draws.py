"""Draws are functions of (seed, step, sample) and of nothing else."""

from itertools import pairwise

import numpy as np
import pytest

from cvae.data.draws import EVAL_BLOCK, BatchOrder, choose_fraction, eval_blocks


@pytest.mark.parametrize(("n_images", "batch_size"), [(50, 10), (50, 7), (5, 12), (1, 3)])
def test_every_image_once_per_epoch(n_images: int, batch_size: int) -> None:
    order = BatchOrder(3, np.arange(n_images), batch_size, (2,))
    epochs = 4
    steps = -(-epochs * n_images // batch_size)
    stream = np.concatenate([order.batch(step).indices for step in range(steps)])
    whole = stream[: epochs * n_images].reshape(epochs, n_images)
    assert (np.sort(whole, axis=1) == np.arange(n_images)).all()
    if n_images > 10:
        assert (whole[0] != whole[1]).any()


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    walked = BatchOrder(1, np.arange(40), 8, (3,))
    for step in range(30):
        batch = walked.batch(step)
    fresh = BatchOrder(1, np.arange(40), 8, (3,)).batch(29)
    for one, other in zip(batch, fresh, strict=True):
        np.testing.assert_array_equal(one, other)


def test_seeds_and_steps_differ_and_noise_is_standard_normal() -> None:
    order = BatchOrder(1, np.arange(1000), 500, (20,))
    assert not (order.batch(0).noise == order.batch(1).noise).any()
    assert not (
        order.batch(0).noise == BatchOrder(2, np.arange(1000), 500, (20,)).batch(0).noise
    ).any()
    noise = np.concatenate([order.batch(step).noise for step in range(20)])
    # 200,000 draws: the mean's standard error is 0.0022.
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.05
    choice = np.concatenate([order.batch(step).caption_choice for step in range(20)])
    assert 0 <= choice.min() < choice.max() < 1
    assert abs(choice.mean() - 0.5) < 0.02


def test_evaluation_sees_each_image_once_with_the_same_noise_whatever_the_length() -> None:
    short = list(eval_blocks(0, EVAL_BLOCK + 3, (2,)))
    longer = list(eval_blocks(0, 3 * EVAL_BLOCK, (2,)))
    assert [len(block.indices) for block in short] == [EVAL_BLOCK, 3]
    assert np.concatenate([b.indices for b in short]).tolist() == list(range(EVAL_BLOCK + 3))
    np.testing.assert_array_equal(short[0].noise, longer[0].noise)
    np.testing.assert_array_equal(short[1].noise, longer[1].noise[:3])


def test_a_smaller_fraction_is_among_a_larger_one() -> None:
    ids = np.random.default_rng(0).choice(10**6, 2000, replace=False)
    for seed in (0, 1):
        chosen = [set(choose_fraction(seed, ids, f)) for f in (0.0001, 0.05, 0.3, 0.999, 1)]
        assert [len(rows) for rows in chosen] == [1, 100, 600, 1998, 2000]
        assert all(few < many for few, many in pairwise(chosen))
    twenty = choose_fraction(0, ids, 0.2)
    assert (np.diff(twenty) > 0).all()
    assert 0.1 < len(set(twenty) & set(choose_fraction(1, ids, 0.2))) / 400 < 0.3


def test_the_fraction_goes_by_the_ids_and_not_by_the_rows() -> None:
    """A store of another size, in which one damaged image was skipped, has other rows."""
    ids = np.arange(100, 1100)
    without = np.delete(ids, 500)
    common = set(ids[choose_fraction(3, ids, 0.3)]) & set(without[choose_fraction(3, without, 0.3)])
    assert len(common) >= 299


def test_batches_are_made_of_the_chosen_rows_alone() -> None:
    rows = np.array([3, 8, 9, 20])
    order = BatchOrder(0, rows, 4, (1,))
    assert all(sorted(order.batch(step).indices) == rows.tolist() for step in range(5))
