"""Compares the speed of preparing COCO with its parts: the decoder alone on all cores, one caption at a time."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cvae.data.store import Precision
from cvae.data.text_encoder import MINILM, TextEncoder, load_encoder
from cvae.errors import UserError
from cvae.files.paths import write_atomically
from cvae.preparation.image_decoding import ImageParts, decode
from cvae.preparation.parts import cores
from cvae.preparation.store_writer import file_entries, write_array
from tests.studies.benchmarks import PREPARATION
from tests.studies.benchmarks.results import Row, ratio
from tests.studies.benchmarks.rounds import Bench

_SIZE = 64
_LONGER = 3  # so that the start of the workers weighs little, as it does for all of COCO
_AT_ONCE, _COMPARED = 1024, 512
_MOST_IMAGES = 100_000  # 1.2 GB, twice
_IMAGES, _CAPTIONS = "images_per_second", "captions_per_second"
_UNITS = {_IMAGES: "images/s", _CAPTIONS: "captions/s"}


def rows(bench: Bench, rounds: int, bar: "tqdm[Any]") -> Iterator[list[Row]]:
    """Yields all rows so far after each round, and sets the bar's total."""
    values: dict[str, list[float]] = {}
    bar.reset(total=rounds * len(PARTS))
    for _ in range(rounds):
        for name in PARTS:
            for key, value in bench.preparation(name).items():
                values.setdefault(key, []).append(value)
            bar.update()
        measured = [Row(PREPARATION, key, list(each), _unit(key)) for key, each in values.items()]
        by_name = {row.measured: row for row in measured}
        ratio(
            measured,
            by_name[f"images/{_IMAGES}"],
            by_name[f"decoder alone/{_IMAGES}"],
            "images:decoder alone",
        )
        for precision in ("fp32", "bf16"):
            ratio(
                measured,
                by_name[f"captions {precision}/{_CAPTIONS}"],
                by_name[f"one caption at a time/{_CAPTIONS}"],
                f"captions {precision}:one at a time",
            )
        yield measured


def _unit(key: str) -> str:
    return _UNITS.get(key.rpartition("/")[2], "of its length")


def measure(name: str, coco: Path, seconds: float, result: Path) -> None:
    """Writes the results of one of PARTS to `result`."""
    torch.set_num_threads(cores())
    write_atomically(result, json.dumps(PARTS[name](coco, seconds)))


def _decoder_alone(coco: Path, seconds: float) -> dict[str, float]:
    files, n_workers = _images(coco), cores()
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn")) as pool:
        shares = [files[number::n_workers] for number in range(n_workers)]
        rates = list(pool.map(_decode_for, shares, [seconds] * n_workers))
    return {f"decoder alone/{_IMAGES}": sum(rates)}


def _decode_for(files: list[Path], seconds: float) -> float:
    """Returns the images per second of this process, without the time for its imports."""
    began = time.perf_counter()
    for done, file in enumerate(cycle(files), start=1):
        decode(file, _SIZE)
        if (took := time.perf_counter() - began) > seconds:
            return done / took
    raise ValueError("no images")


def _prepared_images(coco: Path, seconds: float) -> dict[str, float]:
    """Prepares images like prepare.py: start of the workers, parts, the whole array and its checksum included."""
    files = _images(coco)
    rate = _decode_for(files, 1.0) * cores()
    count = min(_MOST_IMAGES, round(_LONGER * seconds * rate))
    names = [file.name for file in islice(cycle(files), count)]
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        images = files[0].parent
        parts = ImageParts.begin(Path(folder, "parts"), images, names, _SIZE, False, {})
        parts.fill_rest("decode")
        shape = (len(parts.decoded_files()), 3, _SIZE, _SIZE)
        write_array(Path(folder, "split", "images.npy"), shape, "u1", parts.decoded_images())
        file_entries(Path(folder, "split"))
        return {f"images/{_IMAGES}": len(names) / (time.perf_counter() - began)}


def _one_caption_at_a_time(coco: Path, seconds: float) -> dict[str, float]:
    encoder = _bert_base("fp32")

    def encode(captions: list[str]) -> None:
        for caption in captions:
            encoder._encode_batch([caption])

    rate = _captions_per_second(encode, _captions(coco), 1, seconds)
    return {f"one caption at a time/{_CAPTIONS}": rate}


def _prepared_captions(precision: Precision) -> Callable[[Path, float], dict[str, float]]:
    def encode(coco: Path, seconds: float) -> dict[str, float]:
        encoder, captions = _bert_base(precision), _captions(coco)

        def some(part: list[str]) -> None:
            encoder.encode_unique(part, lambda n: None)

        rate = _captions_per_second(some, captions, _AT_ONCE, seconds)
        measured = {f"captions {precision}/{_CAPTIONS}": rate}
        if precision == "bf16":
            measured |= _drift(captions[:_COMPARED])
        return measured

    return encode


def _drift(captions: list[str]) -> dict[str, float]:
    """Returns how far bf16 moves the vectors of real weights, relative to their length."""
    exact, rounded = (load_encoder(MINILM, name).encode(captions) for name in ("fp32", "bf16"))
    moved = np.linalg.norm(rounded - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return {
        "bf16 moves a vector/mean": float(moved.mean()),
        "bf16 moves a vector/most": float(moved.max()),
    }


def _captions_per_second(
    encode: Callable[[list[str]], None], captions: list[str], at_once: int, seconds: float
) -> float:
    encode(captions[:at_once])  # warms up
    began, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - began < seconds:
        first = done % max(1, len(captions) - at_once)
        part = captions[first : first + at_once]
        encode(part)
        done += len(part)
    return done / (time.perf_counter() - began)


def _bert_base(precision: Precision) -> TextEncoder:
    """Returns BERT-base with random weights, which cost the same, and minilm's vocabulary, which is BERT's."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig()).eval().requires_grad_(False)
    loaded = load_encoder(MINILM, precision)
    return replace(loaded, dim=model.config.hidden_size, _model=model.to(loaded._model.device))


def _images(coco: Path) -> list[Path]:
    files = sorted(coco.glob("*2017/*.jpg"))
    if not files:
        raise UserError(
            f"{coco} has no images, as train2017/*.jpg; give an official MS COCO download"
        )
    return [file for file in files if file.parent == files[0].parent]


def _captions(coco: Path) -> list[str]:
    """Returns each caption once, shuffled."""
    file = min((coco / "annotations").glob("captions_*.json"))
    content = json.loads(file.read_text("utf-8"))
    unique = sorted({entry["caption"] for entry in content["annotations"]})
    return [unique[i] for i in np.random.default_rng(0).permutation(len(unique))]


PARTS: dict[str, Callable[[Path, float], dict[str, float]]] = {
    "decoder": _decoder_alone,
    "images": _prepared_images,
    "one-caption": _one_caption_at_a_time,
    "captions-fp32": _prepared_captions("fp32"),
    "captions-bf16": _prepared_captions("bf16"),
}
