"""Other people's training loops around the same model, written anew."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from cvae.config.experiment import Experiment
from cvae.data.store import Split
from cvae.distributed import precision
from cvae.models.cvae import build_model, to_unit
from tests.studies.benchmarks.contestants import Contest, Subject, resident

_PUBLISHED_BATCH, _PUBLISHED_WORKERS = 128, 4
_MANY = 10**6


class Peer(NamedTuple):
    what: str
    fits: Callable[[Experiment], bool]
    build: Callable[[Subject], Contest]
    needs_coco: bool = False


def published(subject: Subject) -> Contest:
    """Returns the paper's loop for COCO: JPEG decoding and BERT-base per image in the data set, four workers."""
    experiment, device = subject.experiment, subject.device
    data = _JpegsAndCaptions(subject)
    shape = (3, experiment.data.image_size, experiment.data.image_size)
    model = build_model(experiment.model, shape, data.encoder.config.hidden_size, experiment.seed)
    sampler = RandomSampler(data, num_samples=_MANY)
    loader = DataLoader(data, _PUBLISHED_BATCH, sampler=sampler, num_workers=_PUBLISHED_WORKERS)
    step = _plain_loop(model.to(device), iter(loader), experiment.optimizer.lr, device)
    # Workers finish their batches together.
    return Contest(step, _PUBLISHED_BATCH, multiple=_PUBLISHED_WORKERS)


def tutorial(subject: Subject) -> Contest:
    """Returns the loop of FashionMNIST tutorials: single images in a DataLoader, fp32, Adam, loss.item()."""
    experiment, device, data = subject.experiment, subject.device, subject.data
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    items = _Items(data.train, data.condition_dim)
    batch_size = experiment.training.global_batch_size
    loader = DataLoader(items, batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return Contest(
        _plain_loop(model.to(device), batches, experiment.optimizer.lr, device), batch_size
    )


def diffusers_fp32(subject: Subject) -> Contest:
    """Returns a plain loop of diffusers' AutoencoderKL with the same widths on a resident batch."""
    return _diffusers(subject, "fp32")


def diffusers_same(subject: Subject) -> Contest:
    """Returns the same loop under autocast to the experiment's precision."""
    return _diffusers(subject, subject.precision)


def _diffusers(subject: Subject, name: str) -> Contest:
    from diffusers import AutoencoderKL

    experiment, device = subject.experiment, subject.device
    options, channels = experiment.model.ldm, subject.data.image_shape[0]
    stages = len(options.block_out_channels)
    model: Any = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=options.block_out_channels,
        layers_per_block=options.layers_per_block,
        norm_num_groups=options.norm_num_groups,
        latent_channels=4,
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.optimizer.lr)
    images = [2 * to_unit(batch.images) - 1 for batch in resident(subject, (1,))]
    batch_size = experiment.training.global_batch_size

    def step() -> None:
        optimizer.zero_grad()
        for batch in images:
            with precision.autocast(name, device):
                posterior = model.encode(batch).latent_dist
                output = model.decode(posterior.sample()).sample
            loss = (output.float() - batch).square().sum() + posterior.kl().sum()
            (loss / batch_size).backward()
        optimizer.step()

    return Contest(step, batch_size)


def _plain_loop(
    model: Any, batches: Iterator[Any], lr: float, device: torch.device
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def step() -> None:
        images, condition = (part.to(device) for part in next(batches))
        noise = torch.randn(len(images), *model.latent_shape, device=device)
        elbo = model((images * 255).to(torch.uint8), condition, noise)
        loss = (elbo.recon_loss + elbo.kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


class _Items(Dataset[tuple[Tensor, Tensor]]):
    """Makes a PIL image and then a tensor in [0, 1] per item, like torchvision's FashionMNIST with ToTensor."""

    def __init__(self, split: Split, n_classes: int):
        assert split.labels is not None
        self.images = np.array(split.images)
        self.labels = np.array(split.labels)
        self.n_classes = n_classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = Image.fromarray(self.images[index, 0])
        label = torch.tensor(int(self.labels[index]))
        return _to_tensor(picture), nn.functional.one_hot(label, self.n_classes).float()


class _JpegsAndCaptions(Dataset[tuple[Tensor, Tensor]]):
    """Decodes the file and encodes its caption at each access, like the paper's data set."""

    def __init__(self, subject: Subject):
        from transformers import AutoTokenizer, BertConfig, BertModel

        from cvae.data.encoder_files import encoder_folder

        assert subject.coco is not None
        train = f"{subject.experiment.data.train}2017"
        annotations = subject.coco / "annotations" / f"captions_{train}.json"
        content = json.loads(annotations.read_text("utf-8"))
        captions = {entry["image_id"]: entry["caption"] for entry in content["annotations"]}
        self.items = [
            (subject.coco / train / entry["file_name"], captions[entry["id"]])
            for entry in content["images"]
            if entry["id"] in captions
        ]
        self.size = subject.experiment.data.image_size
        # BERT-base costs the same whatever its weights are; minilm has its vocabulary.
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_folder("minilm"))
        self.encoder = BertModel(BertConfig()).eval()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file, caption = self.items[index]
        with Image.open(file) as picture:
            image = _to_tensor(picture.convert("RGB").resize((self.size, self.size)))
        tokens = self.tokenizer(caption, return_tensors="pt", truncation=True, max_length=64)
        with torch.inference_mode():
            vector = self.encoder(**tokens).pooler_output[0]
        return image, vector.clone()


def _to_tensor(picture: Image.Image) -> Tensor:
    array = np.array(picture, copy=True)
    maps = torch.from_numpy(array).view(picture.height, picture.width, -1).permute(2, 0, 1)
    return maps.contiguous().float().div(255)


PEERS = {
    "published": Peer(
        "the paper's loop: JPEG and BERT-base in the data set, 4 workers, fp32",
        lambda experiment: experiment.data.name == "coco" and experiment.model.condition == "text",
        published,
        needs_coco=True,
    ),
    "tutorial": Peer(
        "per-item data set and DataLoader, fp32",
        lambda experiment: experiment.model.condition == "label",
        tutorial,
    ),
    "diffusers": Peer(
        "diffusers' AutoencoderKL, resident batch, fp32",
        lambda experiment: experiment.model.backbone == "ldm",
        diffusers_fp32,
    ),
    "diffusers-same": Peer(
        "the same in the experiment's precision",
        lambda experiment: experiment.model.backbone == "ldm",
        diffusers_same,
    ),
}
