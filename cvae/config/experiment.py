"""The schema of an experiment file: what is trained. Where it runs is in a cluster file."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cvae.config import yaml_model
from cvae.config.yaml_model import FromList, Number, Strict
from cvae.errors import UserError

# Upper limits are far above any real value; beyond them sizes overflow or memory is requested in petabytes.
LONGEST_NAME = 200
Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]
Size = Annotated[int, Field(gt=0, le=2**20)]
Channels = Annotated[int, Field(gt=0, le=2**16)]
Pixels = Annotated[int, Field(gt=0, le=8192)]
Depth = Annotated[int, Field(gt=0, le=32)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _file_name(text: str) -> str:
    if not text or "/" in text or text[0] in ".- " or not text.isprintable():
        raise ValueError("should be a plain name, without '/' and not begun by '.' or '-'")
    return _short(text)


def _encoder_name(text: str) -> str:
    if not text.strip("/") or text[0] in "- " or not text.isprintable():
        raise ValueError("should be the name of an encoder, as minilm, or of its folder")
    return _short(text)


def _short(text: str) -> str:
    # File names are limited to 255 bytes, including what is put before and after such a name.
    if len(text.encode()) > LONGEST_NAME:
        raise ValueError(f"should be no longer than {LONGEST_NAME} bytes")
    return text


FileName = Annotated[str, AfterValidator(_file_name)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)]


class Data(Strict):
    """The prepared images and captions, which `prepare.py` writes below data/."""

    name: FileName
    """Name of the prepared data set: fashion_mnist, scenes, coco, …"""
    image_size: Pixels
    """Height and width of the prepared images in pixels."""
    train: FileName = "train"
    """Split to train on."""
    val: FileName = "val"
    """Split to evaluate on."""
    text_encoder: Annotated[str, AfterValidator(_encoder_name)] | None = None
    """Frozen text encoder whose prepared embeddings condition the model: minilm, …; required
    if model.condition is text, otherwise null."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of the training split to use. Which images these are depends only on their ids
    and the seed; for the same seed, 5 % are a subset of 30 %."""


class Mlp(Strict):
    hidden_dim: Size = 400
    """Units of the hidden layer of encoder and decoder."""


class Conv(Strict):
    width: Channels = 64
    """Channels of the first of four stages; each stage doubles the number."""


class Resnet(Strict):
    width: Channels = 64
    """Channels of the first of four stages; each stage doubles the number."""
    blocks: Depth = 2
    """Residual blocks in each stage."""


class Ldm(Strict):
    """Stable Diffusion's autoencoder with the key names of diffusers; the defaults are its size (84 M)."""

    block_out_channels: Annotated[
        tuple[Channels, ...], FromList, Field(min_length=1, max_length=8)
    ] = (128, 256, 512, 512)
    """Channels of each stage; between two stages the image is halved."""
    layers_per_block: Depth = 2
    """Residual blocks in each stage."""
    norm_num_groups: Channels = 32
    """Groups of the group normalisation; must divide every block_out_channels."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory,
    about a third more time."""


class Model(Strict):
    """The conditional VAE: its networks, its latent, and the terms of its loss."""

    backbone: Literal["mlp", "conv", "resnet", "ldm"]
    """Networks of encoder and decoder; the block of the same name holds their sizes."""
    condition: Literal["none", "label", "text"]
    """What the model is conditioned on: nothing, the image's class, or its caption."""
    fusion: Literal["concat", "add", "film"] = "concat"
    """How the condition enters the backbone: concatenated with the features at the bottleneck,
    added to them, or as a scale and shift of every stage's feature maps (film; Perez et al.
    2018)."""
    standardize_condition: bool = False
    """Standardise each dimension of the text embedding by its mean and standard deviation over
    the training captions; useful as pooled embeddings of similar captions differ little."""
    latent: Literal["vector", "spatial"] | None = None
    """Shape of z: a vector or a feature map; null: spatial for ldm, else vector."""
    latent_dim: Size
    """Length of a vector z, or channels of a spatial z."""
    prior: Literal["standard", "text"] = "standard"
    """Prior of z. standard: N(0, I); text: a diagonal Gaussian p(z|c) whose mean and variance
    are learned functions of the caption (Sohn et al. 2015)."""
    likelihood: Literal["bernoulli", "gaussian", "optimal_gaussian"]
    """Reconstruction loss, summed over pixels. bernoulli: binary cross-entropy; gaussian:
    squared error; optimal_gaussian: Gaussian whose variance is the mean squared error (σ-VAE,
    Rybkin et al. 2021)."""
    beta: float = Field(1.0, ge=0)
    """Weight of the KL term (Higgins et al. 2017)."""
    beta_warmup_steps: Count = 0
    """Optimizer steps over which the weight of the KL term grows from 0 to beta."""
    free_bits: float = Field(0.0, ge=0)
    """KL in nats per latent dimension and image below which it is not penalised (Kingma et al.
    2016, appendix C.8)."""
    init_from: str | None = Field(None, min_length=1, max_length=1000)
    """Published AutoencoderKL whose weights initialise ldm: a folder or the name of a model on
    the Hugging Face hub."""
    mlp: Mlp = Mlp()
    conv: Conv = Conv()
    resnet: Resnet = Resnet()
    ldm: Ldm = Ldm()

    @property
    def is_spatial(self) -> bool:
        """True if z is a map (latent_dim, h, w), False if it is a vector (latent_dim,)."""
        return self.latent == "spatial" or (self.latent is None and self.backbone == "ldm")

    @property
    def halvings(self) -> int:
        """How many times the backbone halves height and width. Raises ValueError if HALVINGS lacks it."""
        if self.backbone not in HALVINGS:
            raise ValueError(
                f"model.backbone = {self.backbone!r}: HALVINGS in cvae/config/experiment.py must state"
                " how often it halves an image"
            )
        return HALVINGS[self.backbone](self)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Model":
        for setting, is_set in (
            ("model.standardize_condition = true", self.standardize_condition),
            ("model.prior = 'text'", self.prior == "text"),
        ):
            if is_set and self.condition != "text":
                raise ValueError(
                    f"{setting} needs model.condition = 'text', not {self.condition!r}"
                )
        if self.backbone == "mlp" and self.is_spatial:
            raise ValueError(
                "model.latent = 'spatial' needs feature maps, which model.backbone = 'mlp' has not;"
                " use 'vector' or another backbone"
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
"""How many times each backbone halves height and width; here because a plan is made without torch."""


class Optimizer(Strict):
    """Adam, and the course of its learning rate."""

    lr: float = Field(gt=0)
    """Peak learning rate of Adam."""
    betas: Annotated[tuple[float, float], FromList] = (0.9, 0.999)
    """Adam's decay rates of the gradient's first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW); 0 is plain Adam."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear decay to 0."""
    warmup_steps: Count = 0
    """Optimizer steps over which the learning rate grows linearly from 0 to lr."""
    clip_norm: float | None = Field(None, gt=0)
    """Norm to which the whole gradient is clipped; null: no clipping."""

    @model_validator(mode="after")
    def _betas_below_one(self) -> "Optimizer":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: both must be at least 0 and below 1")
        return self


class DeepSpeed(Strict):
    zero_stage: Annotated[Literal[0, 1, 2, 3], Number] = 1
    """What is partitioned over the ranks instead of replicated: 0 nothing, 1 Adam's state, 2
    also the gradients, 3 also the weights (Rajbhandari et al. 2020)."""


class Training(Strict):
    """How long and how the model is trained; none of these keys depends on the number of ranks."""

    epochs: float = Field(gt=0, le=1e6)
    """Passes over the training split; may be fractional."""
    max_steps: Positive | None = None
    """Optimizer steps after which training ends if the epochs are longer."""
    global_batch_size: Size
    """Images per optimizer step, over all ranks."""
    micro_batch_size: Size | None = None
    """Maximum number of images that a rank processes at once; gradients of a larger share are
    accumulated. null: no limit."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """Library that sums the gradients over the ranks; the loss curve and the format of
    checkpoints are the same."""
    deepspeed: DeepSpeed = DeepSpeed()
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision of matrix products and convolutions. auto: bf16 on GPUs of compute capability
    8.0 or higher, fp16 on older ones, fp32 on CPUs; fp32 never uses TF32; tf32 uses it in both
    (A100 and later)."""
    deterministic: bool = False
    """Use only deterministic operations, some of which are slower on GPUs. A resumed run ends
    in bit-identical weights always on CPUs, and with this key on GPUs."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps after some seconds of compilation;
    losses differ in their last bits."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which is evaluated and
    exported in their place; null: no average."""
    log_every: Positive = 10
    """Optimizer steps between two points of the training curve."""
    eval_every: Positive = 1
    """Epochs between two evaluations; a checkpoint is saved after each."""


class Checkpoint(Strict):
    every_steps: Positive | None = None
    """Optimizer steps between two checkpoints in addition to the evaluations'."""
    keep: Positive = 3
    """Newest checkpoints to keep, in addition to the best one."""


class Experiment(Strict):
    """All that determines a run's results, which do not depend on the machines it runs on."""

    name: Name
    """Name of the experiment in MLflow, and beginning of runs' names."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, batches, noise, dropout, and of data.fraction's choice."""
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
        """Returns the optimizer steps of the whole training on `n_train` images."""
        batch = self.training.global_batch_size
        # Rounded first, so that 0.1 epochs of 30 images are 3 images and not 3.0000000000000004.
        images = round(self.training.epochs * n_train)
        steps = max(1, -(-images // batch))
        return min(steps, self.training.max_steps or steps)

    def check_ranks(self, world_size: int) -> None:
        """Raises UserError if some of `world_size` ranks would get no image of a batch."""
        batch_size = self.training.global_batch_size
        if batch_size < world_size:
            raise UserError(
                f"training.global_batch_size = {batch_size} leaves some of {world_size} ranks without"
                " an image; use fewer ranks or a larger batch"
            )


def load_experiment(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Reads an experiment file. Raises UserError as yaml_model.load does."""
    return yaml_model.load(path, Experiment, overrides or [])
