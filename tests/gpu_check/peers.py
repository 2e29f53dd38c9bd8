"""The paper's published loop in our own words: JPEG and BERT-base inside the data set, four workers, fp32."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from cvae.distributed.ranks import connect
from cvae.models.cvae import build_model
from tests.gpu_check import clock
from tests.gpu_check.findings import Finding, measured, needs
from tests.gpu_check.setting import Setting, squares
from tests.studies.benchmarks.peers import _plain_loop

_BATCH, _WORKERS, _MANY = 128, 4, 10**6
_TOKENS = 14  # of a caption of COCO, on average


def published(setting: Setting) -> Iterator[Finding]:
    """Photographs and captions are stand-ins of COCO's sizes, BERT's weights are random: the cost is the same."""
    needs("transformers")
    pixels = (setting.pixels,) if setting.small else (setting.pixels, setting.large_pixels)
    with connect() as ranks:
        for size in pixels:
            data = _JpegsAndCaptions(size, setting.small)
            batch_size, workers = (8, 2) if setting.small else (_BATCH, _WORKERS)
            experiment = setting.experiment("conv", size)
            width = data.encoder.config.hidden_size
            model = build_model(experiment.model, (3, size, size), width, 0).to(ranks.device)
            sampler = RandomSampler(data, num_samples=_MANY)
            loader = DataLoader(data, batch_size, sampler=sampler, num_workers=workers)
            step = _plain_loop(model, iter(loader), 1e-4, ranks.device)
            # Workers finish their batches together, and take seconds for one.
            found = clock.rate(step, batch_size, ranks.device, 0.1, workers, windows=1)
            yield measured(
                f"{size}²: conv, batches of {batch_size}, {workers} workers",
                str(found),
                "beside the loop's own rate in the check speed; JPEGs of 640×480, 14 tokens a caption",
                images_per_second=found.median,
            )


class _JpegsAndCaptions(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, size: int, small: bool):
        from transformers import BertConfig, BertModel

        generator = np.random.default_rng(3)
        images = squares(generator, 32, 640)[1][:, :, :480]
        self.files = [_jpeg(image.transpose(1, 2, 0)) for image in images]
        self.size = size
        tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.encoder = BertModel(BertConfig(**(tiny if small else {}))).eval()
        self.tokens = torch.from_numpy(generator.integers(0, 30_000, (32, _TOKENS)))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(io.BytesIO(self.files[index])) as picture:
            resized = np.array(picture.convert("RGB").resize((self.size, self.size)))
        image = torch.from_numpy(resized).permute(2, 0, 1).contiguous().float().div(255)
        with torch.inference_mode():
            states = self.encoder(self.tokens[index : index + 1]).last_hidden_state
        return image, states.mean(1)[0].clone()


def _jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
