"""The user's object: any mix of text and picture -> one normalised vector.

`EosEmbedding` is a sentence-transformers input module (one forward pass, the state at EOS, L2-normalised); stage 3
trains it. `CocoaEmbedder` is what one takes away: load a folder, encode items of any number in bounded memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .backbone import hidden_states, open_backbone, pool
from .checkpoint import load_inputs, read_meta, save_checkpoint
from .inputs import PLACEHOLDER, Batch, Inputs, item_images, load_image


class EosEmbedding(InputModule):
    """Batch -> `sentence_embedding` (B, H): final state at EOS under the model's own attention, L2-normalised."""

    config_file_name = "cocoa.json"

    def __init__(
        self, model: PreTrainedModel, inputs: Inputs, pooling: str = "eos", meta: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.pooling, self.meta = model, inputs, pooling, meta or {}

    @property
    def modalities(self) -> list:
        return ["text", "image", ("image", "text")]

    @property
    def tokenizer(self):
        return self.inputs.tokenizer

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs) -> Batch:
        """Strings, pictures or {text, image} dicts -> batch. `prompt` is put before the text."""
        items = [as_item(item) for item in inputs]
        if prompt:
            items = [{**item, "text": prompt + (item.get("text") or "")} for item in items]
        return self.inputs.collate(items)

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        hidden = hidden_states(self.model, features)
        features["sentence_embedding"] = F.normalize(pool(hidden, features, self.pooling).float(), dim=-1)
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.config.text_config.hidden_size

    def get_config_dict(self) -> dict[str, Any]:
        return {"pooling": self.pooling}

    def save(self, output_path: str, *args, **kwargs) -> None:
        save_checkpoint(Path(output_path), self.model, self.inputs, {**self.meta, "pooling": self.pooling})

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs) -> EosEmbedding:
        return load_module(model_name_or_path)


def load_module(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> EosEmbedding:
    """A checkpoint folder -> module, in the attention mode and with the processor it was trained with."""
    meta = read_meta(folder)
    model = open_backbone(
        folder, bidirectional=meta.get("layout") != "causal", attn_implementation=attn_implementation, dtype=dtype
    )
    return EosEmbedding(model, load_inputs(folder, meta), pooling=meta.get("pooling", "eos"), meta=meta)


def as_item(value: Any) -> dict[str, Any]:
    """A string is text, a dict is an item, anything else is taken for a picture."""
    if isinstance(value, dict):
        return value
    return {"text": value} if isinstance(value, str) else {"image": value}


class CocoaEmbedder:
    """Load a checkpoint folder and embed items.

    Example: `CocoaEmbedder.load("runs/laptop/cocoa").encode([{"text": "a cat", "image": None}])`
    """

    def __init__(self, module: EosEmbedding, fingerprint: str = "") -> None:
        self.module, self.fingerprint = module.eval(), fingerprint

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
    ) -> CocoaEmbedder:
        module = load_module(folder, dtype=dtype, attn_implementation=attn_implementation)
        module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        seen = [
            module.meta["weights_sha256"],
            module.inputs.eos_token,
            module.inputs.max_length,
            module.pooling,
            str(dtype),
        ]
        return cls(module, "-".join(map(str, seen)))  # all that an embedding depends on, besides the item

    def encode(
        self,
        items: Iterable[Any] | Any,
        batch_size: int = 32,
        show_progress: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Items ({text, image} dicts, strings or pictures; a list, a generator, or one alone) -> (N, H) float32.

        Vectors have length 1 and stand in the order given; one item alone gives (H,). Items are taken in windows of
        64 * batch_size and batched by tokens (`token_batches`): memory is that of `batch_size` of the longest items, and
        little is padded. `truncate_dim` keeps the first dimensions and normalises again. Raises InputError naming the item.
        """
        single = isinstance(items, (str, dict)) or not isinstance(items, Iterable)
        stream = iter([items] if single else items)
        total = None if single or not hasattr(items, "__len__") else len(items)
        parts = []
        with tqdm(total=total, desc="encode", unit="item", disable=not show_progress) as bar:
            for window in _windows(stream, 64 * batch_size):
                parts.append(self._encode_window([as_item(item) for item in window], batch_size, bar))
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.module.get_embedding_dimension()), np.float32)
        if truncate_dim is not None:
            vectors = vectors[:, :truncate_dim]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors[0] if single else vectors

    def _encode_window(self, items: list[dict[str, Any]], batch_size: int, bar) -> np.ndarray:
        vectors = np.empty((len(items), self.module.get_embedding_dimension()), dtype=np.float32)
        for chosen in token_batches(*self._lengths(items), batch_size):
            vectors[chosen] = self._encode_batch([items[i] for i in chosen])
            bar.update(len(chosen))
        return vectors

    @torch.inference_mode()
    def _encode_batch(self, items: list[dict[str, Any]]) -> np.ndarray:
        device = next(self.module.parameters()).device
        batch = {name: value.to(device) for name, value in self.module.inputs.collate(items).items()}
        return self.module(batch)["sentence_embedding"].cpu().numpy()

    def _lengths(self, items: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each item and how many of them are picture cells, (N,) each. Of a picture only the header is read;
        one that cannot be used counts nothing here, and is named when its batch is made."""
        inputs = self.module.inputs
        texts = [PLACEHOLDER.sub("", item.get("text") or "") for item in items]
        ids = inputs.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        cells = np.array([sum(map(self._cells, item_images(item))) for item in items])
        marks = np.array([2 * len(item_images(item)) + 1 for item in items])  # round each picture, and EOS
        return np.minimum(np.array([len(row) for row in ids]) + cells + marks, inputs.max_length), cells

    def _cells(self, image: Any) -> int:
        processor = self.module.inputs.image_processor
        try:
            with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
                width, height = opened.size
            return processor.get_number_of_image_patches(height, width) // processor.merge_size**2
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 0


def token_batches(lengths: np.ndarray, cells: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Indices of items, batch by batch, alike in length, longest first (what does not fit into memory fails at once).

    lengths, cells: (N,) tokens of each item, and how many of these are picture cells. A batch has at most as many
    tokens, padding counted, as `batch_size` of the longest items and as many cells as `batch_size` of the largest
    pictures: it needs no more memory than a plain batch may, and short texts come by the hundred.
    """
    order = np.argsort(-lengths, kind="stable")
    tokens, picture_cells = batch_size * lengths.max(initial=1), batch_size * cells.max(initial=0)
    start = 0
    while start < len(order):
        chosen = order[start : start + tokens // max(1, lengths[order[start]])]
        chosen = chosen[np.cumsum(cells[chosen]) <= picture_cells]
        yield chosen
        start += len(chosen)


def _windows(stream: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while window := list(itertools.islice(stream, size)):
        yield window


def search(queries: np.ndarray, corpus: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by cosine: queries (Q, H), corpus (N, H), both normalised -> scores and indices (Q, min(k, N))."""
    k = min(k, len(corpus))
    scores = queries @ corpus.T
    top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    index = np.take_along_axis(top, order, axis=1)
    return np.take_along_axis(scores, index, axis=1), index


__all__ = ["CocoaEmbedder", "EosEmbedding", "load_image", "load_module", "search"]
