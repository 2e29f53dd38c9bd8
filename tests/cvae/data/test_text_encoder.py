import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cvae.data import encoder_files, text_encoder
from cvae.data.text_encoder import load_encoder
from cvae.errors import UserError

CAPTIONS = [
    "a red circle",
    "Two dogs play in the snow near a very old, half-ruined stone house.",
    "A man.",
    "a red circle",
    "ünïcödé 🦒 狗 ñandú",
    "a big blue star at the top left and a small green heart on the right",
]


@pytest.fixture(scope="module")
def minilm() -> text_encoder.TextEncoder:
    return load_encoder("minilm")


def one_by_one(folder: Path, captions: list[str]) -> np.ndarray:
    """What transformers alone gives: no batch, no padding, a plain mean over all tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    vectors = []
    for caption in captions:
        tokens = torch.tensor([tokenizer.encode(caption, padding=False, truncation=False)])
        with torch.inference_mode():
            vectors.append(model(input_ids=tokens).last_hidden_state[0].mean(0).numpy())
    return np.stack(vectors)


def test_masked_mean_is_what_transformers_gives_one_by_one(
    minilm: text_encoder.TextEncoder,
) -> None:
    together = minilm.encode(CAPTIONS)
    assert together.dtype == np.float32
    assert together.shape == (6, minilm.dim) == (6, 384)
    alone = one_by_one(encoder_files._minilm_folder(), CAPTIONS)
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_random_batches_give_what_each_caption_alone_gives(
    small_bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    words = ["red", "green", "blue", "a", "dog", "7", ",", "ünïcödé", "🦒", "on", "snow"]
    captions = [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(200)]
    alone = one_by_one(Path(small_bert), captions)
    encoder = load_encoder(small_bert)
    for _ in range(10):
        monkeypatch.setitem(text_encoder._BATCH, "cpu", rng.randint(1, 40))
        rows = rng.sample(range(200), rng.randint(1, 200))
        vectors = encoder.encode([captions[row] for row in rows])
        np.testing.assert_allclose(vectors, alone[rows], atol=2e-6)


def test_batch_composition_plays_no_part(small_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    encoder = load_encoder(small_bert)
    captions = ["red " * rng.randint(1, 12) + rng.choice("abcdefgh") for _ in range(300)]
    whole = encoder.encode(captions)
    order = rng.sample(range(300), 300)
    np.testing.assert_array_equal(encoder.encode([captions[i] for i in order]), whole[order])
    monkeypatch.setitem(text_encoder._BATCH, "cpu", 7)
    np.testing.assert_allclose(encoder.encode(captions[50:250]), whole[50:250], atol=1e-5)


def test_bits_do_not_depend_on_the_number_of_threads(small_bert: str) -> None:
    encoder = load_encoder(small_bert)
    captions = [f"red {n} blue" for n in range(500)]
    threads = torch.get_num_threads()
    vectors = []
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            vectors.append(encoder.encode(captions))
            assert torch.get_num_threads() == count  # what follows is as parallel as before
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_equal_captions_are_encoded_once(small_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(small_bert)
    seen: list[str] = []
    original = text_encoder.TextEncoder._encode_batch

    def spy(self: text_encoder.TextEncoder, captions: list[str]) -> np.ndarray:
        seen.extend(captions)
        return original(self, captions)

    monkeypatch.setattr(text_encoder.TextEncoder, "_encode_batch", spy)
    vectors = encoder.encode(["red", "blue", "red", "red"])
    assert sorted(seen) == ["blue", "red"]
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert encoder.encode([]).shape == (0, 24)


def test_long_captions_are_cut_at_the_limit(minilm: text_encoder.TextEncoder) -> None:
    words = [f"word{n}" for n in range(500)]
    long, cut = " ".join(words), " ".join(words[:200])
    assert (minilm.token_counts([long, cut, "dog"]) > minilm.max_tokens).tolist() == [1, 1, 0]
    vectors = minilm.encode([long, cut])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)  # equal up to the limit


def test_identity_says_what_decides_the_vectors(
    minilm: text_encoder.TextEncoder, small_bert: str
) -> None:
    files = minilm.files
    assert {"config.json", "tokenizer.json", "vocab.txt"} <= set(files)
    assert minilm.identity == {
        "name": "minilm",
        "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "files": files,
        "pooling": "masked mean",
        "precision": "fp32",
        "max_tokens": 256,
    }
    assert minilm.revision is None
    assert load_encoder(small_bert).max_tokens == 32


def test_another_vocabulary_is_another_encoder(small_bert: str, tmp_path: Path) -> None:
    entry = load_encoder(small_bert).entry()
    twin = Path(shutil.copytree(small_bert, tmp_path / "twin"))
    assert load_encoder(str(twin)).difference(entry) is None
    vocabulary = (twin / "vocab.txt").read_text()
    (twin / "vocab.txt").write_text(vocabulary.replace("red\ngreen", "green\nred"))
    assert load_encoder(str(twin)).difference(entry) == "vocab.txt differs"
    assert load_encoder(str(twin)).difference(entry.model_copy(update={"files": {}})) is None


def test_the_hubs_revision_is_known_where_the_hubs_client_has_left_it(
    small_bert: str, tmp_path: Path
) -> None:
    cached = tmp_path / "hub" / "models--a--b" / "snapshots" / "86b5e093"
    shutil.copytree(small_bert, cached)
    assert load_encoder(str(cached)).revision == "86b5e093"
    note = tmp_path / "local" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    shutil.copytree(small_bert, tmp_path / "local")
    assert load_encoder(str(tmp_path / "local")).revision is None
    note.parent.mkdir(parents=True)
    note.write_text("c0ffee12\n0a1b\n1700000000.0\n")
    assert load_encoder(str(tmp_path / "local")).revision == "c0ffee12"


@pytest.mark.parametrize(
    ("family", "positions", "limit"),
    [
        ("Roberta", 34, 32),  # as RoBERTa's 514 positions for 512 tokens
        ("MPNet", 34, 32),
        ("DistilBert", 32, 32),
        ("Albert", 32, 32),
        ("Electra", 32, 32),
        ("XLNet", 0, 512),  # knows no limit
    ],
)
def test_the_whole_family_is_encoded_up_to_its_limit(
    small_bert: str, tmp_path: Path, family: str, positions: int, limit: int
) -> None:
    import transformers

    sizes = {
        "vocab_size": 90,
        "hidden_size": 24,
        "embedding_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": positions,
    }
    if family == "DistilBert":
        sizes = {"vocab_size": 90, "dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
        sizes["max_position_embeddings"] = positions
    if family == "XLNet":
        sizes = {"vocab_size": 90, "d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 24}
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=1)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path)
    shutil.copy(Path(small_bert) / "vocab.txt", tmp_path)
    # [PAD] is number 1 here, as in RoBERTa's vocabularies.
    words = (tmp_path / "vocab.txt").read_text().split("\n")
    (tmp_path / "vocab.txt").write_text("\n".join([words[1], words[0], *words[2:]]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    if family == "DistilBert":  # it takes no token types
        names = '"model_input_names": ["input_ids", "attention_mask"]'
        settings = f'{{"tokenizer_class": "BertTokenizer", {names}}}'
        (tmp_path / "tokenizer_config.json").write_text(settings)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.max_tokens, encoder.dim) == (limit, 24)
    captions = ["red " * 600, "red " * (limit - 2), "green dog"]
    vectors = encoder.encode(captions)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    np.testing.assert_allclose(vectors[2:], one_by_one(tmp_path, captions[2:]), atol=1e-5)


def test_what_is_no_whole_encoder_is_refused(small_bert: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2Model

    bare = Path(shutil.copytree(small_bert, tmp_path / "bare"))
    weights = load_file(bare / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"], weights["pooler.dense.bias"]
    save_file(weights, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its model, as encoder.layer.1.output"):
        load_encoder(str(bare))

    decoder = tmp_path / "gpt2"
    shutil.copytree(small_bert, decoder)
    GPT2Model(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1)).save_pretrained(decoder)
    with pytest.raises(UserError, match="is not an encoder of BERT's family"):
        load_encoder(str(decoder))
    both = tmp_path / "clip"
    shutil.copytree(small_bert, both)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 1
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes)).save_pretrained(both)
    with pytest.raises(UserError, match="is not an encoder of BERT's family"):
        load_encoder(str(both))
    (decoder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_encoder(str(decoder))
    assert "\n" not in str(caught.value)


def test_a_damaged_minilm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(encoder_files._minilm_folder(), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    monkeypatch.setattr(encoder_files, "_minilm_folder", lambda: folder)
    with pytest.raises(UserError, match=r"'minilm' is damaged.*pip install --force-reinstall"):
        load_encoder("minilm")


def test_an_encoder_that_cannot_be_had_says_how_to_place_it(
    small_bert: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load_encoder("/no/such/folder")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_encoder(str(tmp_path))
    cut = tmp_path / "cut"
    shutil.copytree(small_bert, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(cut))


def test_bf16_moves_a_vector_by_little_and_is_another_encoder(small_bert: str) -> None:
    exact, rounded = load_encoder(small_bert), load_encoder(small_bert, "bf16")
    captions = ["a dog", "two red buses on a street", "a very old clock tower with a round top"]
    in_fp32, in_bf16 = exact.encode(captions), rounded.encode(captions)
    moved = np.linalg.norm(in_bf16 - in_fp32, axis=1) / np.linalg.norm(in_fp32, axis=1)
    assert in_bf16.dtype == np.float32
    assert (moved > 0).all()
    assert (moved < 0.02).all()
    assert rounded.difference(exact.entry()) == "bf16 instead of fp32"
    assert rounded.difference(rounded.entry()) is None
