"""The ldm backbone against diffusers' own AutoencoderKL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from cvae.config.experiment import Model
from cvae.errors import UserError
from cvae.models.cvae import Cvae, build_model
from cvae.models.published import load_published, published_folder

SIZES = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
generator = torch.Generator().manual_seed(0)


def settings(fusion: str = "concat", condition: str = "text", **ldm: Any) -> Model:
    return Model(
        backbone="ldm",
        condition=condition,  # type: ignore[arg-type]
        fusion=fusion,  # type: ignore[arg-type]
        latent_dim=4,
        likelihood="gaussian",
        ldm={**SIZES, **ldm},
    )


def build(model: Model, condition_dim: int) -> Cvae:
    return build_model(model, (3, 16, 16), condition_dim, seed=0).eval()


def publish(folder: Path, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        **{**SIZES, **changes},
    )
    autoencoder.save_pretrained(folder)
    return autoencoder.eval()


@pytest.mark.parametrize("has_quant_conv", [True, False])
@pytest.mark.parametrize("fusion", ["none", "concat", "add", "film"])
@torch.inference_mode()
def test_published_weights_give_the_published_output(
    tmp_path: Path, fusion: str, has_quant_conv: bool
) -> None:
    """Without text, and at first with it."""
    there = {"use_quant_conv": has_quant_conv, "use_post_quant_conv": has_quant_conv}
    published = publish(tmp_path / "vae", **there)
    model = settings(condition="none") if fusion == "none" else settings(fusion)
    condition = None if fusion == "none" else torch.randn(2, 5, generator=generator)
    cvae = build(model, 0 if condition is None else 5)
    load_published(cvae, model, str(tmp_path))  # a folder with vae/ in it, as Stable Diffusion's
    images = torch.rand(2, 3, 16, 16, generator=generator)
    latent = torch.randn(2, 4, 4, 4, generator=generator)
    expected = published.encode(2 * images - 1).latent_dist
    moments = cvae.encode(images, condition)
    torch.testing.assert_close(moments.mean, expected.mean)
    torch.testing.assert_close(moments.log_variance, expected.logvar)
    torch.testing.assert_close(cvae.decoder(latent, condition), published.decode(latent).sample)


def test_the_default_is_stable_diffusions_size() -> None:
    with torch.device("meta"):
        model = Model(backbone="ldm", condition="none", latent_dim=4, likelihood="gaussian")
        assert build_model(model, (3, 256, 256), 0, 0).n_parameters() == 83_653_863


def test_gradient_checkpointing_changes_no_gradient() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    condition, noise = torch.randn(2, 5), torch.randn(2, 4, 4, 4)
    gradients = []
    for checkpointing in (False, True):
        cvae = build(settings("film", gradient_checkpointing=checkpointing), 5).train()
        cvae(images, condition, noise).recon_loss.sum().backward()
        gradients.append([parameter.grad for parameter in cvae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers_per_block": 2}, "model.ldm.layers_per_block = 2 there and 1 here"),
        (
            {"block_out_channels": (8, 16, 32)},
            "model.ldm.block_out_channels = [8, 16, 32] there and [8, 16, 16] here",
        ),
        ({"latent_channels": 16}, "model.latent_dim = 16 there and 4 here"),
    ],
)
def test_other_sizes_are_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    sizes = {"latent_channels": 4, **SIZES, **changes}
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        **sizes,
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        published_folder(settings(), 3, str(tmp_path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_autoencoder_is_one_line(tmp_path: Path) -> None:
    publish(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("incomplete", "nan"):
        publish(tmp_path / name)
        file = tmp_path / name / weights.name
        tensors = load_file(file)
        first = next(iter(tensors))
        if name == "nan":
            tensors[first].view(-1)[0] = float("nan")
        else:
            del tensors[first]
        save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    model = settings()
    for name, expected in (
        ("cut", "no AutoencoderKL can be read"),
        ("incomplete", "is missing"),
        ("nan", "not finite"),
        ("empty", "no AutoencoderKL can be read"),
        ("odd", "no AutoencoderKL can be read"),
        ("absent", "no such folder"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            load_published(build(model, 5), model, str(tmp_path / name))
        assert "\n" not in str(caught.value)
