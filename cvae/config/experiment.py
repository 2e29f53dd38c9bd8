"""The experiment: what is trained. Where it runs is the cluster file's business (slurm/cluster_file.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cvae.config import yaml_model
from cvae.config.yaml_model import FromList, Number, Strict
from cvae.errors import UserError

# Limits leave room for what nobody has built yet; beyond them sizes overflow, or memory is asked for in petabytes.
LONGEST_NAME = 200
Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]
Size = Annotated[int, Field(gt=0, le=2**20)]
Channels = Annotated[int, Field(gt=0, le=2**16)]
Pixels = Annotated[int, Field(gt=0, le=8192)]
Depth = Annotated[int, Field(gt=0, le=32)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _file_name(text: str) -> str:
    """With what is put before and behind a name, a file's name has to stay below 255 bytes."""
    if not text or "/" in text or text[0] in ".- " or not text.isprintable():
        raise ValueError("should be a plain name, without '/' and not begun by '.' or '-'")
    return _short(text)


def _encoder_name(text: str) -> str:
    if not text.strip("/") or text[0] in "- " or not text.isprintable():
        raise ValueError("should be the name of an encoder, as minilm, or of its folder")
    return _short(text)


def _short(text: str) -> str:
    if len(text.encode()) > LONGEST_NAME:
        raise ValueError(f"should be no longer than {LONGEST_NAME} bytes")
    return text


FileName = Annotated[str, AfterValidator(_file_name)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)]


class Data(Strict):
    name: FileName = Field(description="prepared data set: fashion_mnist, scenes, …")
    image_size: Pixels = Field(description="pixels; height and width of the prepared images")
    train: FileName = Field("train", description="split that is trained on")
    val: FileName = Field("val", description="split that is evaluated on")
    text_encoder: Annotated[str, AfterValidator(_encoder_name)] | None = Field(
        None, description="frozen encoder whose prepared embeddings are read: minilm, …"
    )
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the training split that is used; chosen by the images' ids and the seed"
        " alone, so that 5 % are among the 30 % of the same seed, on every machine and at every size",
    )


class Mlp(Strict):
    hidden_dim: Size = 400


class Conv(Strict):
    width: Channels = Field(
        64, description="channels of the first of four stages; each doubles them"
    )


class Resnet(Strict):
    width: Channels = Field(
        64, description="channels of the first of four stages; each doubles them"
    )
    blocks: Depth = Field(2, description="residual blocks in each stage")


class Ldm(Strict):
    """Stable Diffusion's autoencoder, in the words of diffusers; the defaults are its size (84 M)."""

    block_out_channels: Annotated[
        tuple[Channels, ...], FromList, Field(min_length=1, max_length=8)
    ] = (
        128,
        256,
        512,
        512,
    )
    layers_per_block: Depth = 2
    norm_num_groups: Channels = 32
    gradient_checkpointing: bool = Field(
        False, description="less memory for a third more time: activations are computed twice"
    )


class Model(Strict):
    backbone: Literal["mlp", "conv", "resnet", "ldm"]
    condition: Literal["none", "label", "text"] = Field(
        description="what the images are drawn from"
    )
    fusion: Literal["concat", "add", "film"] = Field(
        "concat",
        description="how the condition enters: beside the features, added to them, or as a scale and"
        " shift of every stage's feature maps (film)",
    )
    standardize_condition: bool = Field(
        False,
        description="shift and scale each dimension of the text's embedding by its mean and standard"
        " deviation over the training captions; pooled embeddings of similar captions differ little",
    )
    latent: Literal["vector", "spatial"] | None = Field(
        None, description="null: spatial for ldm, vector for the others"
    )
    latent_dim: Size = Field(description="length of z; for a spatial latent its channels")
    prior: Literal["standard", "text"] = Field(
        "standard", description="standard: N(0, I); text: a learned p(z|c) (Sohn et al. 2015)"
    )
    likelihood: Literal["bernoulli", "gaussian", "optimal_gaussian"] = Field(
        description="bernoulli: binary cross-entropy, summed; gaussian: squared error, summed;"
        " optimal_gaussian: its variance is the mean squared error (σ-VAE, Rybkin et al. 2021)"
    )
    beta: float = Field(1.0, ge=0, description="weight of the KL term (Higgins et al. 2017)")
    beta_warmup_steps: Count = Field(0, description="steps over which beta grows from 0")
    free_bits: float = Field(
        0.0,
        ge=0,
        description="nats of KL per latent dimension and image that cost nothing"
        " (Kingma et al. 2016, appendix C.8)",
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="published AutoencoderKL whose weights ldm starts from: a folder or a hub name",
    )
    mlp: Mlp = Mlp()
    conv: Conv = Conv()
    resnet: Resnet = Resnet()
    ldm: Ldm = Ldm()

    @property
    def is_spatial(self) -> bool:
        """Whether z is a map (latent_dim, h, w) and not a vector (latent_dim,)."""
        return self.latent == "spatial" or (self.latent is None and self.backbone == "ldm")

    @property
    def halvings(self) -> int:
        """How often the backbone halves height and width. Raises ValueError if the backbone has not stated it."""
        if self.backbone not in HALVINGS:
            raise ValueError(
                f"model.backbone = {self.backbone!r}: HALVINGS in cvae/config/experiment.py must state"
                " how often it halves an image"
            )
        return HALVINGS[self.backbone](self)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Model":
        if self.standardize_condition and self.condition != "text":
            raise ValueError(
                f"model.standardize_condition = true is for model.condition = 'text', not"
                f" {self.condition!r}"
            )
        if self.prior == "text" and self.condition != "text":
            raise ValueError(
                f"model.prior = 'text' needs model.condition = 'text', not {self.condition!r}"
            )
        if self.backbone == "mlp" and self.is_spatial:
            raise ValueError(
                "model.latent = 'spatial' needs feature maps, which model.backbone = 'mlp' has not;"
                " use 'vector', or the backbone conv, resnet or ldm"
            )
        if self.init_from is not None and (self.backbone != "ldm" or not self.is_spatial):
            raise ValueError(
                f"model.init_from = {self.init_from!r} is for model.backbone = 'ldm' with a spatial"
                f" latent, not {self.backbone!r} with model.latent = {self.latent!r}"
            )
        groups = self.ldm.norm_num_groups
        if any(channels % groups for channels in self.ldm.block_out_channels):
            raise ValueError(
                f"model.ldm.block_out_channels = {list(self.ldm.block_out_channels)}: each must be a"
                f" multiple of model.ldm.norm_num_groups = {groups}"
            )
        return self


HALVINGS: dict[str, Callable[[Model], int]] = {
    "mlp": lambda model: 0,
    "conv": lambda model: 4,
    "resnet": lambda model: 4,
    "ldm": lambda model: len(model.ldm.block_out_channels) - 1,
}
"""How often each backbone halves height and width. It stands here since a plan is made without torch."""


class Optimizer(Strict):
    lr: float = Field(gt=0, description="peak learning rate of Adam")
    betas: Annotated[tuple[float, float], FromList] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, description="decoupled (AdamW); 0 is plain Adam")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="course of the learning rate after warm-up; the last two end at 0"
    )
    warmup_steps: Count = 0
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the whole gradient")

    @model_validator(mode="after")
    def _betas_below_one(self) -> "Optimizer":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: both must be at least 0 and below 1")
        return self


class DeepSpeed(Strict):
    zero_stage: Annotated[Literal[0, 1, 2, 3], Number] = Field(
        1,
        description="what the ranks share out instead of each holding it: 0 nothing, 1 Adam's state,"
        " 2 also the gradients, 3 also the weights (Rajbhandari et al. 2020)",
    )


class Training(Strict):
    epochs: float = Field(
        gt=0, le=1e6, description="passes over the training split; may be fractional"
    )
    max_steps: Positive | None = Field(None, description="stop here if the epochs last longer")
    global_batch_size: Size = Field(description="images per optimizer step, over all ranks")
    micro_batch_size: Size | None = Field(
        None, description="most images a rank takes at once; beyond it gradients accumulate"
    )
    engine: Literal["ddp", "deepspeed"] = Field(
        "ddp",
        description="what adds up the ranks' gradients; the curve and the checkpoints are the same",
    )
    deepspeed: DeepSpeed = DeepSpeed()
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto",
        description="of matrix products and convolutions; auto: bf16 on GPUs of capability 8.0 or more, fp16 on"
        " older ones, fp32 on CPUs. fp32 uses no TF32 anywhere, tf32 (A100 and later) uses it in both",
    )
    deterministic: bool = Field(
        False,
        description="only operations that give the same bits every time; on a GPU some are slower. A resumed"
        " run ends in bit-identical weights on CPUs anyway, on GPUs only with this",
    )
    compile: bool = Field(
        False,
        description="fuse the model's operations by torch.compile: some seconds before the first step,"
        " quicker steps; the last bits of a loss differ",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep an exponential moving average of the weights"
    )
    log_every: Positive = Field(10, description="steps between two points of the training curve")
    eval_every: Positive = Field(1, description="epochs between two evaluations, each with a save")


class Checkpoint(Strict):
    every_steps: Positive | None = Field(None, description="saves between evaluations")
    keep: Positive = Field(3, description="newest ones that stay; the best one stays besides")


class Experiment(Strict):
    name: Name = Field(description="MLflow's experiment")
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data
    model: Model
    optimizer: Optimizer
    training: Training
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Experiment":
        model, data, training = self.model, self.data, self.training
        if model.condition == "text" and data.text_encoder is None:
            raise ValueError("model.condition = 'text' needs data.text_encoder, as minilm")
        if model.condition != "text" and data.text_encoder is not None:
            raise ValueError(
                f"data.text_encoder = {data.text_encoder!r} is not used by"
                f" model.condition = {model.condition!r}; set it to null"
            )
        if data.image_size % 2**model.halvings:
            raise ValueError(
                f"model.backbone = {model.backbone!r} halves images {model.halvings} times:"
                f" data.image_size = {data.image_size} must be a multiple of {2**model.halvings}"
            )
        if training.compile and training.engine == "deepspeed":
            raise ValueError("training.compile = true needs training.engine = 'ddp'")
        micro = training.micro_batch_size
        if micro is not None and micro > training.global_batch_size:
            raise ValueError(
                f"training.micro_batch_size = {micro} exceeds"
                f" training.global_batch_size = {training.global_batch_size}"
            )
        return self

    def total_steps(self, n_train: int) -> int:
        """Optimizer steps of the whole run on a training split of `n_train` images."""
        batch = self.training.global_batch_size
        # Epochs may be fractional: round first, so that 0.1 × 30 images is 3 images and not 3.0000000000000004.
        images = round(self.training.epochs * n_train)
        steps = max(1, -(-images // batch))
        return min(steps, self.training.max_steps or steps)

    def check_ranks(self, world_size: int) -> None:
        """Raises UserError where some of world_size ranks would get no image of a batch."""
        batch_size = self.training.global_batch_size
        if batch_size < world_size:
            raise UserError(
                f"training.global_batch_size = {batch_size} leaves some of {world_size} ranks without"
                " an image; use fewer --gpus or a larger batch"
            )


def load_experiment(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Raises UserError with one line that names file, line, key and value."""
    return yaml_model.load(path, Experiment, overrides or [])
