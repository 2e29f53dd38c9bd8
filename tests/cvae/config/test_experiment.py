"""Experiment files: values and overrides are read, and every mistake is reported in one line."""

from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cvae.config import yaml_model
from cvae.config.experiment import HALVINGS, Experiment, Model, load_experiment
from cvae.errors import UserError
from cvae.models.fusion import FUSIONS
from cvae.models.likelihood import LIKELIHOODS
from cvae.models.prior import PRIORS
from tests.conftest import PROJECT_ROOT, tiny_experiment

FILES = sorted((PROJECT_ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_experiment(), sort_keys=False))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_experiments_survive_a_dump(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    (tmp_path / "again.yaml").write_text(yaml_model.dump(experiment, "again"))
    assert load_experiment(tmp_path / "again.yaml") == experiment


def test_fashion_mnist_has_the_published_settings() -> None:
    experiment = load_experiment(PROJECT_ROOT / "configs/fashion_mnist.yaml")
    assert (experiment.model.latent_dim, experiment.model.mlp.hidden_dim) == (20, 400)
    assert (experiment.optimizer.lr, experiment.optimizer.betas) == (1e-3, (0.9, 0.999))
    assert (experiment.training.global_batch_size, experiment.training.epochs) == (128, 50)
    assert experiment.model.beta == 1


def test_overrides_win_and_are_read_as_yaml(file: Path) -> None:
    overrides = ["optimizer.lr=3e-4", "model.latent_dim=64", "training.ema_decay=0.5"]
    experiment = load_experiment(file, overrides)
    assert experiment.optimizer.lr == 3e-4
    assert experiment.model.latent_dim == 64
    assert experiment.training.ema_decay == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.latnet_dim=3", "unknown key; did you mean model.latent_dim?"),
        ("latent_dim=3", "latent_dim = 3: unknown key; did you mean model.latent_dim?"),
        ("modle.latent_dim=3", "did you mean model"),
        ("model.latent_dim=many", "model.latent_dim = 'many': should be a valid integer"),
        ("model.latent_dim=true", "model.latent_dim = True: should be a valid integer"),
        ("model.latent_dim=-1", "model.latent_dim = -1: should be greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr = nan: should be a finite number"),
        ("model.backbone=covn", "did you mean conv?"),
        ("model=3", "model = 3"),
        ("model.latent_dim.deep=3", "model.latent_dim is a value, not a block"),
        ("optimizer.betas=[0.9, 1.0]", "both must be at least 0 and below 1"),
        ("training.micro_batch_size=11", "exceeds training.global_batch_size = 10"),
        ("model.condition=text", "needs data.text_encoder"),
        ("data.text_encoder=toy", "is not used by model.condition = 'label'"),
        ("data.fraction=1.5", "data.fraction = 1.5: should be less than or equal to 1"),
        ("data.fraction=0", "data.fraction = 0: should be greater than 0"),
        ("model.prior=text", "model.prior = 'text' needs model.condition = 'text', not 'label'"),
        ("model.latent=spatial", "needs feature maps, which model.backbone = 'mlp' has not"),
        ("model.init_from=vae", "is for model.backbone = 'ldm' with a spatial latent, not 'mlp'"),
        ("model.ldm.block_out_channels=[32, 48]", "multiple of model.ldm.norm_num_groups = 32"),
        ("model.latent_dim=9223372036854775807", "should be less than or equal to 1048576"),
        ("data.image_size=100000", "should be less than or equal to 8192"),
        ("training.epochs=1e300", "should be less than or equal to 1000000"),
        ("training.deepspeed.zero_stage=true", "zero_stage = True: should be a whole number"),
        ("training.deepspeed.zero_stage=1.0", "zero_stage = 1.0: should be a whole number"),
        ("training.deepspeed.zero_stage=4", "zero_stage = 4: should be 0, 1, 2 or 3"),
        ("optimizer.betas=[true, '0.9']", "optimizer.betas.0 = True: should be a valid number"),
        (
            "model.ldm.block_out_channels=[true]",
            "block_out_channels.0 = True: should be a valid int",
        ),
        ("data.name=/etc", "data.name = '/etc': should be a plain name"),
        ("data.name=..", "should be a plain name"),
        ("data.val=-x", "should be a plain name"),
        ("data.train=''", "should be a plain name"),
        (f"data.name={'é' * 150}", "should be no longer than 200 bytes"),
        (f"data.text_encoder={'x' * 300}", "should be no longer than 200 bytes"),
        (f"name={'x' * 300}", "should have at most 200 characters"),
        ("name=../x", "name = '../x': should be letters, digits"),
        ("name=x\x1b[31m", "the character U+001B is not allowed"),
        (f"{'a.' * 1000}b=1", "an override is key=value"),
        (f"{'k' * 1000}=1", "unknown key"),
        ("model={a: 1, a: 2}", "a: given twice"),
        ("novalue", "an override is key=value"),
        ("model.latent_dim=[", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_reported_in_one_line(file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_experiment(file, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= len(str(file)) + 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0\nseed: 1\n", ":2: seed: given twice"),
        ("name: x\n  y: 3\n", ":2: not valid YAML"),
        ("- a\n", "must hold `key: value` lines; it holds list"),
        ("", "must hold `key: value` lines; it holds nothing"),
        ("name: !!python/object:os.system x\n", ":1: tags are not read"),
        ("name: x\n", "data: missing (and 3 more)"),
    ],
)
def test_a_wrong_file_is_reported_in_one_line_with_its_place(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_reported_with_its_line(file: Path) -> None:
    lines = file.read_text().replace("backbone: mlp", "backbnoe: mlp").splitlines()
    file.write_text("\n".join(lines))
    number = next(n for n, line in enumerate(lines, 1) if "backbnoe" in line)
    with pytest.raises(UserError, match=rf"tiny\.yaml:{number}: model\.backbnoe = 'mlp': unknown"):
        load_experiment(file)


def test_a_missing_file_is_reported_with_the_existing_ones(file: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; there are tiny\.yaml"):
        load_experiment(file.with_name("tyni.yaml"))


def test_every_name_of_the_schema_is_built() -> None:
    """The schema and the tables of backbones, fusions, likelihoods and priors have the same names."""
    for field, table in (
        ("backbone", HALVINGS),
        ("fusion", FUSIONS),
        ("likelihood", LIKELIHOODS),
        ("prior", PRIORS),
    ):
        for name in table:
            plain = tiny_experiment(captioned=True)
            Experiment.model_validate({**plain, "model": {**plain["model"], field: name}})  # type: ignore[dict-item]
        assert set(get_args(Model.model_fields[field].annotation)) == set(table)


def test_every_backbone_is_a_module_of_its_name() -> None:
    assert all(find_spec(f"cvae.models.{name}") for name in HALVINGS)


def test_total_steps_count_images_and_not_floats() -> None:
    experiment = Experiment.model_validate(tiny_experiment(epochs=0.3))
    assert experiment.total_steps(100) == 3
    assert experiment.total_steps(101) == 3
    assert experiment.total_steps(105) == 4
    capped = Experiment.model_validate(tiny_experiment(max_steps=2))
    assert capped.total_steps(100) == 2
