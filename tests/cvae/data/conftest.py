"""A small COCO download and a small BERT: real ones in all but size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT with random weights, hidden size 24, at most 32 tokens."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("small-bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters] + list(COLOURS)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def write_coco(root: Path, counts: dict[str, int]) -> Path:
    """counts: images of each folder. One to three captions an image; ids are not in file order."""
    number = 0
    for folder, count in counts.items():
        rng = np.random.default_rng(count)
        (root / folder).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in rng.permutation(np.arange(1, count + 1) * 7).tolist():
            colour = list(COLOURS)[image_id % 3]
            name = f"{image_id:012}.jpg"
            noise = rng.integers(-20, 20, (30, 40, 3))
            pixels = np.clip(COLOURS[colour] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / name)
            images.append({"id": image_id, "file_name": name, "height": 30, "width": 40})
            for _ in range(rng.integers(1, 4)):
                number += 1
                caption = f"A {colour} picture, {rng.choice(['nice', 'plain', 'ugly'])} {number}.\n"
                annotations.append({"id": number, "image_id": image_id, "caption": caption})
        write_annotations(root, folder, images=images, annotations=annotations)
    return root


def write_annotations(root: Path, folder: str, **content: Any) -> Path:
    path = root / "annotations" / f"captions_{folder}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"info": {"description": "a test"}, "licenses": [], **content}))
    return path


def read_annotations_file(root: Path, folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (root / "annotations" / f"captions_{folder}.json").read_text()
    )
    return content


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
