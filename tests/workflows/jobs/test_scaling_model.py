import math

import pytest

from cvae.config.experiment import Experiment
from slurm.cluster_file import ClusterConfig, Placement
from tests.conftest import tiny_experiment
from workflows.jobs.scaling_model import expect, expected_fact, meta_model

_FAST = 1e30


def test_a_rank_alone_has_its_own_rate() -> None:
    expected = expect(Placement(1, 1), 64, 100.0, 1e9, 1.0, 1.0)
    assert expected == pytest.approx((100.0, 1.0))


def test_without_links_between_them_ranks_add_up() -> None:
    expected = expect(Placement(2, 4), 64, 100.0, 1e9, _FAST, _FAST)
    assert expected == pytest.approx((800.0, 1.0))
    # Ten images over four ranks: the one with three sets the pace.
    assert expect(Placement(1, 4), 10, 1.0, 1e9, _FAST, _FAST).images_per_second == pytest.approx(
        10 / 3
    )


def test_a_slow_link_alone_sets_the_pace() -> None:
    """Two ranks, each sends the gradient once: 1 GB over 1 GB/s."""
    expected = expect(Placement(2, 1), 64, _FAST, 1e9, _FAST, 1e9)
    assert expected.images_per_second == pytest.approx(64.0)
    # Inside a node the other link counts, and of four ranks 2 · 3/4 of the gradient.
    expected = expect(Placement(1, 4), 64, _FAST, 1e9, 1e9, 1.0)
    assert expected.images_per_second == pytest.approx(64.0 / 1.5)


def test_talk_hides_behind_the_backward_pass_but_for_the_last_bucket() -> None:
    gradient = 1000 * 2**20
    # A step of 3 s, 2 of them backward; 1 s of talk, of which the last 25 MB of 1,000 are not hidden.
    expected = expect(Placement(2, 1), 2, 1 / 3, gradient, _FAST, gradient)
    assert expected.images_per_second == pytest.approx(2 / 3.025)
    assert expected.efficiency == pytest.approx(3 / 3.025)


def test_the_plan_has_it_if_the_cluster_file_gives_the_speed_of_a_gpu() -> None:
    experiment = Experiment.model_validate(tiny_experiment())
    model = meta_model(experiment, (1, 8, 8), 3)
    run = (Placement(1, 1), model, experiment.training.global_batch_size, 1000)
    assert expected_fact(ClusterConfig(executor="slurm"), *run) is None
    quick = ClusterConfig(executor="slurm", tflops_per_gpu=1e-6)
    text = expected_fact(quick, *run)
    assert text is not None
    hidden, latent = experiment.model.mlp.hidden_dim, experiment.model.latent_dim
    forward = (64 + 3) * hidden + hidden * 2 * latent + (latent + 3) * hidden + hidden * 64
    # Two for a multiplication and an addition; the first layer has no gradient of its input.
    flops = 2 * (3 * forward - (64 + 3) * hidden)
    assert float(text.split()[0].replace(",", "")) == math.floor(1e6 / flops + 0.5)
