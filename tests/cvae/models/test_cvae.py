"""The models against independent formulas, and against the table in the design."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Bernoulli, Normal, kl_divergence

from cvae.config.experiment import HALVINGS, Experiment
from cvae.models.cvae import Cvae, build_model, to_unit
from cvae.models.fusion import Add, Concat, Film, Fusion
from tests.conftest import PROJECT_ROOT, tiny_experiment

TINY_LDM = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def wake(module: torch.nn.Module) -> None:
    """Gives a value to what starts at zero, so that its effect shows."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


def model(condition_dim: int = 3, **changes: object) -> Cvae:
    plain = tiny_experiment()
    tiny = {"resnet": {"width": 8, "blocks": 1}, "ldm": TINY_LDM, "conv": {"width": 4}}
    block = {**plain["model"], **tiny, **changes}  # type: ignore[dict-item]
    if block.get("prior") == "text" or condition_dim:
        block["condition"] = "text"
        plain["data"]["text_encoder"] = "toy"  # type: ignore[index]
    if condition_dim == 0:
        block["condition"] = "none"
    experiment = Experiment.model_validate({**plain, "model": block})
    return build_model(experiment.model, (1, 16, 16), condition_dim, seed=0)


def test_sizes_are_those_of_the_published_models() -> None:
    plain = tiny_experiment()
    mlp = {**plain["model"], "latent_dim": 20, "mlp": {"hidden_dim": 400}}  # type: ignore[dict-item]
    fashion = Experiment.model_validate({**plain, "model": mlp}).model
    assert build_model(fashion, (1, 28, 28), 10, 0).n_parameters() == (
        (794 * 400 + 400) + (400 * 40 + 40) + (30 * 400 + 400) + (400 * 784 + 784)
    )
    conv = {**mlp, "backbone": "conv", "latent_dim": 128, "conv": {"width": 64}}
    coco = Experiment.model_validate({**plain, "model": conv}).model
    # 15.2 M, as measured of the published code.
    assert build_model(coco, (3, 64, 64), 768, 0).n_parameters() == 15_154_819


VECTOR = [(backbone, "vector") for backbone in HALVINGS]
SPATIAL = [(backbone, "spatial") for backbone in HALVINGS if backbone != "mlp"]


@pytest.mark.parametrize(("backbone", "latent"), VECTOR + SPATIAL)
@pytest.mark.parametrize("fusion", ["concat", "add", "film"])
def test_condition_reaches_encoder_and_decoder(backbone: str, latent: str, fusion: str) -> None:
    cvae = model(backbone=backbone, latent=latent, fusion=fusion)
    wake(cvae)
    images = torch.randint(0, 256, (2, 1, 16, 16), generator=generator, dtype=torch.uint8)
    one, other = torch.eye(3)[[0, 1]], torch.eye(3)[[1, 2]]
    drawn = normal(2, *cvae.latent_shape)
    assert len(cvae.latent_shape) == (3 if latent == "spatial" else 1)
    assert not torch.equal(cvae.decode(drawn, one), cvae.decode(drawn, other))
    target = to_unit(images)
    assert not torch.equal(cvae.encode(target, one).mean, cvae.encode(target, other).mean)
    assert cvae.decode(drawn, one).shape == images.shape
    assert cvae.encode(target, one).mean.shape == drawn.shape


@pytest.mark.parametrize(("backbone", "latent"), VECTOR + SPATIAL)
def test_every_parameter_gets_a_gradient(backbone: str, latent: str) -> None:
    for condition_dim, fusion in ((0, "concat"), (3, "concat"), (3, "add"), (3, "film")):
        text_prior = {"prior": "text"} if condition_dim else {}
        cvae = model(condition_dim, backbone=backbone, latent=latent, fusion=fusion, **text_prior)
        wake(cvae)
        images = torch.randint(0, 256, (2, 1, 16, 16), generator=generator, dtype=torch.uint8)
        condition = torch.eye(3)[:2] if condition_dim else None
        elbo = cvae(images, condition, normal(2, *cvae.latent_shape))
        (elbo.recon_loss + elbo.kl).sum().backward()
        silent = [
            name
            for name, parameter in cvae.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        ]
        assert silent == []


@pytest.mark.parametrize("backbone", HALVINGS)
def test_a_backbone_halves_as_often_as_the_schema_says(backbone: str) -> None:
    cvae = model(backbone=backbone)
    plain = tiny_experiment()
    block = {**plain["model"], "backbone": backbone, "ldm": TINY_LDM}
    halvings = Experiment.model_validate({**plain, "model": block}).model.halvings
    widths = []

    def look(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 4:
            widths.append(output.shape[-1])

    for module in cvae.encoder.modules():
        module.register_forward_hook(look)
    cvae.encode(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3))
    assert min(widths, default=16) == 16 >> halvings


def test_a_backbone_must_state_how_often_it_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(HALVINGS, "mlp")
    with pytest.raises(
        ValidationError, match=r"'mlp': HALVINGS in cvae/config/experiment\.py must state"
    ):
        Experiment.model_validate(tiny_experiment())


def test_film_says_nothing_at_first_and_scales_and_shifts_then() -> None:
    film, plain = Film((8,), (5, 6), 3), Fusion((8,), (5, 6), 0)
    maps, condition = normal(2, 6, 4, 4), normal(2, 3)
    assert torch.equal(film.modulate(1, maps, condition), plain.modulate(1, maps, None))
    wake(film)
    gamma, beta = film.gamma_beta[1](condition).split(6, dim=1)
    for image, channel in ((0, 2), (1, 5)):
        expected = maps[image, channel] * (1 + gamma[image, channel]) + beta[image, channel]
        torch.testing.assert_close(film.modulate(1, maps, condition)[image, channel], expected)
    features = normal(2, 8)
    assert film.join(features, condition) is features


def test_concat_beside_a_map_and_add_to_a_map() -> None:
    maps, condition = normal(2, 4, 3, 3), normal(2, 5)
    joined = Concat((4, 3, 3), (), 5).join(maps, condition)
    assert torch.equal(joined[:, :4], maps)
    assert torch.equal(joined[1, 4:, 0, 2], condition[1])
    assert torch.equal(joined[1, 4:, 2, 1], condition[1])
    add = Add((4, 3, 3), (), 5)
    torch.testing.assert_close(
        (add.join(maps, condition) - maps).flatten(1), add.project(condition), rtol=1e-4, atol=1e-5
    )


def test_free_bits_raise_each_dimension_by_itself() -> None:
    plain, free = model(), model(free_bits=0.1)
    images = torch.randint(0, 256, (6, 1, 16, 16), generator=generator, dtype=torch.uint8)
    condition, noise = torch.eye(3)[[0, 1, 2, 0, 1, 2]], normal(6, 4)
    elbo, raised = plain(images, condition, noise), free(images, condition, noise)
    assert torch.equal(elbo.kl, raised.kl)
    assert torch.equal(elbo.kl_penalty, elbo.kl)
    mean, log_variance = plain.encode(to_unit(images), condition)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    per_dim = kl_divergence(posterior, Normal(torch.zeros(4), torch.ones(4)))
    assert (per_dim < 0.1).any()
    torch.testing.assert_close(raised.kl_penalty, per_dim.clamp(min=0.1).sum(1))


def test_elbo_bounds_the_likelihood_of_a_linear_gaussian_model() -> None:
    """One draw of z is an unbiased estimate: its mean over many draws is the exact expectation."""
    cvae = model(condition_dim=0)
    image = torch.randint(0, 256, (1, 1, 16, 16), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        moments = cvae.encode(to_unit(image), None)
        draws = cvae(image.expand(4000, -1, -1, -1), None, normal(4000, 4))
        latent = Normal(moments.mean, (0.5 * moments.log_variance).exp()).sample((4000,))
        output = cvae.decoder(latent.squeeze(1), None)
        target = to_unit(image).expand_as(output)
        independent = -Bernoulli(logits=output, validate_args=False).log_prob(target)
    spread = draws.recon_loss.std() * math.sqrt(2 / 4000)
    assert abs(draws.recon_loss.mean() - independent.flatten(1).sum(1).mean()) < 5 * spread
    assert torch.allclose(draws.kl, draws.kl[0])


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first, second = model(), model()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert torch.equal(before, torch.random.get_rng_state())


def test_standardized_conditions_are_those_of_a_model_that_was_given_them_so() -> None:
    plain, standardized = model(), model()
    mean, std = normal(3), 1 + normal(3).square()
    standardized.set_condition_statistics(mean, std)
    images = torch.randint(0, 256, (2, 1, 16, 16), generator=generator, dtype=torch.uint8)
    noise, condition = normal(2, 4), normal(2, 3)
    given = (condition - mean) / std
    for one, other in zip(
        plain(images, given, noise), standardized(images, condition, noise), strict=True
    ):
        torch.testing.assert_close(one, other)
    target = to_unit(images)
    torch.testing.assert_close(
        plain.encode(target, given).mean, standardized.encode(target, condition).mean
    )
    torch.testing.assert_close(plain.decode(noise, given), standardized.decode(noise, condition))
    loaded = model()
    loaded.load_state_dict(standardized.state_dict())
    assert torch.equal(loaded.decode(noise, condition), standardized.decode(noise, condition))


def test_shipped_experiments_can_be_built() -> None:
    from cvae.config.experiment import load_experiment

    for path in (PROJECT_ROOT / "configs").glob("*.yaml"):
        experiment = load_experiment(path)
        size = experiment.data.image_size
        with torch.device("meta"):
            build_model(experiment.model, (3, size, size), 10, 0)
