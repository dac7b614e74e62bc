"""The user's object: any mix of text and picture -> one normalised vector.

`EosEmbedding` is a sentence-transformers input module (one forward pass, the state at EOS, L2-normalised); stage 3
trains it. `CocoaEmbedder` is what one takes away: load a folder, encode items of any number in bounded memory.

sentence-transformers 6 imports no module class from outside its own namespace unless told `trust_remote_code=True`, for
local folders too, and knows no way to register one. `sentence_transformer(folder)` hands it the module instead of its
name, so no flag is needed and no code of the folder is run; the model is the same.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util.file_io import load_dir_path
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .backbone import hidden_states, language_model, open_backbone, pool
from .inputs import Batch, Inputs
from .items import PLACEHOLDER, InputError, image_size, item_images
from .store.checkpoint import (
    META,
    CheckpointError,
    load_inputs,
    read_meta,
    read_note,
    save_checkpoint,
)

logger = logging.getLogger(__name__)
FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)  # all read as JSON
BLOCK = (
    1 << 10
)  # queries, and 8 times as many of the corpus, that `search` compares at a time: some 130 MiB
PASS = 256  # tokens of padding that are not worth a further pass of the model: a choice, not tuned


class EosEmbedding(InputModule):
    """Batch -> `sentence_embedding` (B, H): final state at EOS under the model's own attention, L2-normalised."""

    config_keys = ["pooling"]  # what `print` shows

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        pooling: str = "eos",
        meta: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.pooling, self.meta = model, inputs, pooling, meta or {}

    @property
    def modalities(self) -> list:
        return ["text", "image", ("image", "text")]

    @property
    def tokenizer(self):
        return self.inputs.tokenizer

    @property
    def max_seq_length(self) -> int:
        """`Inputs.max_length`, by the name that sentence-transformers reads and sets."""
        return self.inputs.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.inputs.max_length = value

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs) -> Batch:
        """Strings, pictures or {text, image} dicts -> batch. `prompt` is put before the text."""
        items = [as_item(item) for item in inputs]
        if prompt:
            items = [{**item, "text": prompt + (item.get("text") or "")} for item in items]
        return self.inputs.collate(items)

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        hidden = hidden_states(self.model, features)
        features["sentence_embedding"] = F.normalize(
            pool(hidden, features, self.pooling).float(), dim=-1
        )
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.config.text_config.hidden_size

    def save(self, output_path: str, *args, **kwargs) -> None:
        """A checkpoint, beside what `SentenceTransformer.save_pretrained` has already written to this folder."""
        out = Path(output_path)
        if (out / META).exists():
            raise CheckpointError(
                f"{out}: already a checkpoint, which is never written over; choose another folder"
            )
        causal = getattr(
            language_model(self.model).config, "is_causal", True
        )  # where no stage has recorded it
        meta = {
            "layout": "causal" if causal else "bidirectional",
            **self.meta,
            "pooling": self.pooling,
        }
        with TemporaryDirectory(dir=out.parent) as aside:
            whole = save_checkpoint(Path(aside) / out.name, self.model, self.inputs, meta)
            shutil.copytree(whole, out, dirs_exist_ok=True)

    @classmethod
    def load(
        cls, model_name_or_path: str, *, subfolder: str = "", token: bool | str | None = None,
        cache_folder: str | None = None, revision: str | None = None, local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None, processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None, **kwargs,
    ) -> EosEmbedding:  # fmt: skip
        """As sentence-transformers asks: a folder or a name on the hub; `model_kwargs`: `load_module`'s settings.

        Raises ValueError for other settings: a checkpoint's own processor and config are what it was trained with.
        """
        settings = model_kwargs or {}
        if unknown := [
            *settings.keys() - {"dtype", "attn_implementation"},
            *(processor_kwargs or ()),
            *(config_kwargs or ()),
        ]:
            raise ValueError(
                f"{', '.join(unknown)}: not a setting of this model; model_kwargs takes dtype, attn_implementation"
            )
        where = {
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        return load_module(
            load_dir_path(model_name_or_path, subfolder, **where) or model_name_or_path, **settings
        )


def load_module(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> EosEmbedding:
    """A checkpoint folder -> module, in the attention mode and with the processor it was trained with.

    Raises CheckpointError for a folder with a missing, damaged or altered file.
    """
    meta = read_meta(folder)
    if lost := [name for name in FILES if not (Path(folder) / name).is_file()]:
        raise CheckpointError(
            f"{folder}: no {', '.join(lost)}; the checkpoint is incomplete, copy or train it again"
        )
    for name in FILES:
        read_note(Path(folder) / name)
    model = open_backbone(
        folder,
        bidirectional=meta.get("layout") != "causal",
        attn_implementation=attn_implementation,
        dtype=dtype,
    )
    return EosEmbedding(
        model, load_inputs(folder, meta), pooling=meta.get("pooling", "eos"), meta=meta
    )


def sentence_transformer(
    folder: str | Path, *, device: str | None = None, **settings: Any
) -> SentenceTransformer:
    """A checkpoint folder as a sentence-transformers model, e.g. for its evaluators or mteb's; `settings`: `load_module`'s.

    Prompts and what else sentence-transformers keeps beside the modules come along. Raises ValueError where the folder holds
    modules after ours.
    """
    modules, kept = (
        Path(folder) / name for name in ("modules.json", "config_sentence_transformers.json")
    )
    if modules.is_file() and len(found := json.loads(modules.read_text(encoding="utf-8"))) > 1:
        names = ", ".join(str(module.get("type")) for module in found)
        raise ValueError(
            f"{folder}: several modules ({names}); open it by SentenceTransformer(..., trust_remote_code=True)"
        )
    saved = read_note(kept) if kept.is_file() else {}
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    return SentenceTransformer(
        modules=[load_module(folder, **settings)],
        device=device,
        **{name: saved[name] for name in names if name in saved},
    )


def mteb_model(folder: str | Path, **settings: Any) -> Any:
    """A checkpoint folder as `mteb.evaluate` takes it: mteb's own wrapper, told that the model sees pictures too.

    Named and versioned by the checkpoint, since mteb stores results under these. Needs the extra `mteb`.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(sentence_transformer(folder, **settings))
    facts = {
        "name": f"cocoa/{Path(folder).name}",
        "revision": read_meta(folder, check=False)["weights_sha256"],
    }
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(
        update={**facts, "modalities": ["text", "image"]}
    )
    return wrapper


def as_item(value: Any) -> dict[str, Any]:
    """A string is text, a dict is an item, anything else is taken for a picture."""
    if isinstance(value, dict):
        return value
    return {"text": value} if isinstance(value, str) else {"image": value}


class CocoaEmbedder:
    """Load a checkpoint folder and embed items.

    Example: `CocoaEmbedder.load("runs/laptop/seed0/stage3/cocoa").encode([{"text": "a cat", "image": None}])`
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
        """A checkpoint folder -> embedder on `device` (default: a GPU if there is one). dtype: of the weights.

        Raises CheckpointError for a folder with a missing, damaged or altered file.
        """
        module = load_module(folder, dtype=dtype, attn_implementation=attn_implementation)
        module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        meta, inputs = module.meta, module.inputs
        seen = [
            meta["weights_sha256"],
            inputs.eos_token,
            inputs.max_length,
            module.pooling,
            dtype,
            meta.get("layout"),
        ]
        files = sorted(meta.get("files_sha256", {}).items())  # config, tokenizer, processor
        seen += [digest[:16] for _, digest in files]
        return cls(
            module, "-".join(map(str, seen))
        )  # all that an embedding depends on, besides the item

    def encode(
        self,
        items: Iterable[Any] | Any,
        batch_size: int = 32,
        show_progress: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        workers: int = 0,
        on_bad_item: str = "stop",
    ) -> np.ndarray:
        """Items (a list, a generator, or one alone) -> (N, H) float32. An item is a dict {text, image}, a string, which is
        always text, or a picture: a PIL image or a `Path`.

        Vectors have length 1 and stand in the order given; one item alone gives (H,). Items are taken in windows of
        64 * batch_size and batched by tokens (`token_batches`): memory is that of `batch_size` of the longest items, and
        little is padded. `truncate_dim` keeps the first dimensions and normalises again. `workers`: processes that read,
        resize and tokenise ahead of the model; the vectors are the same.

        `precision`: sentence-transformers' int8 or uint8, (N, H), and binary or ubinary, (N, H / 8). For int8 and uint8
        `ranges`, (2, H), holds the least and the greatest value of each dimension, e.g. of a sample embedded before.

        `on_bad_item`: "stop" raises InputError naming the item that cannot be used (a damaged or too large picture, say),
        "skip" warns of each and leaves NaN in its row, which `search` never finds. Raises ValueError for settings that do
        not go together.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        if hasattr(items, "columns"):  # a DataFrame is iterated by its columns' names
            raise ValueError(
                f"items: a {type(items).__name__}; give its rows: table.to_dict('records'), or one column"
            )
        if (
            precision in ("int8", "uint8") and ranges is None
        ):  # ranges of its own for each window would not compare
            raise ValueError(
                f"{precision} needs ranges: np.stack([v.min(axis=0), v.max(axis=0)]) of float32 vectors v"
            )
        if on_bad_item not in ("stop", "skip"):
            raise ValueError(f"on_bad_item must be 'stop' or 'skip', found {on_bad_item!r}")
        if on_bad_item == "skip" and precision != "float32":
            raise ValueError(
                f"{precision} has no NaN to mark a skipped item with; encode to float32, then reduce"
            )
        single = isinstance(items, (str, dict)) or not isinstance(items, Iterable)
        stream = iter([items] if single else items)
        total = None if single or not hasattr(items, "__len__") else len(items)
        parts, done = [], 0
        with tqdm(total=total, desc="encode", unit="item", disable=not show_progress) as bar:
            for window in iter(lambda: list(itertools.islice(stream, 64 * batch_size)), []):
                batches = _Batches(
                    [as_item(item) for item in window], self.module.inputs, batch_size
                )
                vectors = self._encode_window(batches, done, workers, on_bad_item, bar)
                parts.append(smaller(vectors, truncate_dim, precision, ranges))
                done += len(window)
        empty = np.zeros((0, self.module.get_embedding_dimension()), np.float32)
        vectors = (
            np.concatenate(parts) if parts else smaller(empty, truncate_dim, precision, ranges)
        )
        return vectors[0] if single else vectors

    def _encode_window(
        self, batches: _Batches, start: int, workers: int, on_bad_item: str, bar: tqdm
    ) -> np.ndarray:
        vectors = np.full(
            (len(batches.items), self.module.get_embedding_dimension()), np.nan, dtype=np.float32
        )
        generator = (
            torch.Generator()
        )  # its own, or the loader would draw a number from the caller's
        workers, pin = (
            min(workers, len(batches)),
            self._device().type == "cuda",
        )  # then no copy to it is waited for
        loader = DataLoader(
            batches, batch_size=None, num_workers=workers, generator=generator, pin_memory=pin
        )
        found: list[tuple[np.ndarray, Tensor]] = []
        for chosen, batch, bad in loader:
            for i, fault in bad:
                if on_bad_item == "stop":
                    error = InputError(f"item {start + i}: {fault}")
                    error.item = start + i
                    raise error
                logger.warning("item %d is left out: %s", start + i, fault)
            if batch is not None:
                found.append((chosen, self._encode_batch(batch)))
            bar.update(len(chosen) + len(bad))
        for (
            chosen,
            part,
        ) in found:  # at the end: fetched one by one, a GPU would wait for the next to be read
            vectors[chosen] = part.cpu().numpy()
        return vectors

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def _encode_batch(self, batch: Batch) -> Tensor:
        device = self._device()
        features = {
            name: value.to(device, non_blocking=device.type == "cuda")
            for name, value in batch.items()
        }
        return self.module(features)["sentence_embedding"]


class _Batches(Dataset):
    """A window of items, cut into batches by tokens: (places, batch or None, [(place, what is wrong)]) each."""

    def __init__(self, items: list[dict[str, Any]], inputs: Inputs, batch_size: int) -> None:
        self.items, self.inputs = items, inputs
        self.chosen = list(token_batches(*item_lengths(items, inputs), batch_size))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, k: int) -> tuple[np.ndarray, Batch | None, list[tuple[int, str]]]:
        chosen, bad = self.chosen[k], []
        try:
            return chosen, self.inputs.collate([self.items[i] for i in chosen]), bad
        except (
            InputError
        ):  # a batch knows its own rows only: find each item by its place among the user's
            bad = [
                (i, fault) for i in sorted(chosen.tolist()) if (fault := self._fault(self.items[i]))
            ]
            if not bad:
                raise
        good = np.array([i for i in chosen if i not in dict(bad)], dtype=int)
        return good, self.inputs.collate([self.items[i] for i in good]) if len(good) else None, bad

    def _fault(self, item: dict[str, Any]) -> str:
        try:
            self.inputs.collate([item])
        except InputError as error:
            return str(error).removeprefix("item 0 of the batch: ")
        return ""


def item_lengths(items: Sequence[dict[str, Any]], inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each item and how many of them are picture cells, (N,) each. Of a picture only the header is read; one
    that cannot be used counts nothing here, and is named when its batch is made."""
    texts = [
        str(item.get("text") or "").encode(errors="replace").decode() for item in items
    ]  # bad ones fail later
    texts = [PLACEHOLDER.sub("", text) for text in texts]
    ids = inputs.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    cells = np.array(
        [
            sum(_cells(image, inputs.image_processor) for image in item_images(item))
            for item in items
        ]
    )
    marks = np.array(
        [2 * len(item_images(item)) + 1 for item in items]
    )  # round each picture, and EOS
    return np.minimum(np.array([len(row) for row in ids]) + cells + marks, inputs.max_length), cells


def _cells(image: Any, processor: Any) -> int:
    try:
        width, height = image.size if isinstance(image, Image.Image) else image_size(image)
        return processor.get_number_of_image_patches(height, width) // processor.merge_size**2
    except (InputError, ValueError):  # named when its batch is made
        return 0


def token_batches(lengths: np.ndarray, cells: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Indices of items, batch by batch, alike in length, longest first (what does not fit into memory fails at once).

    lengths, cells: (N,) tokens of each item, and how many of these are picture cells. A batch has at most as many
    tokens, padding counted, as `batch_size` of the longest items and as many cells as `batch_size` of the largest
    pictures: it needs no more memory than a plain batch may, and short texts come by the hundred. Items less than half as
    long as the longest of a batch wait for the next, unless they are so few that their padding costs less than a pass.
    """
    order = np.argsort(-lengths, kind="stable")
    tokens, picture_cells = batch_size * lengths.max(initial=1), batch_size * cells.max(initial=0)
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        chosen = order[start : start + tokens // max(1, longest)]
        chosen = chosen[np.cumsum(cells[chosen]) <= picture_cells]
        short = lengths[chosen] < longest / 2
        if (longest - lengths[chosen[short]]).sum() > PASS:
            chosen = chosen[~short]
        yield chosen
        start += len(chosen)


def smaller(
    vectors: np.ndarray, dim: int | None, precision: str, ranges: np.ndarray | None
) -> np.ndarray:
    """Vectors (N, H) float32 in a smaller form: the first `dim` of their dimensions, numbers in `precision` (as `encode`)."""
    if dim is not None:
        vectors = vectors[:, :dim]
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return quantize_embeddings(vectors, precision, ranges=ranges)


def search(
    queries: np.ndarray,
    corpus: np.ndarray,
    k: int = 10,
    *,
    index: Any = None,
    ranges: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` closest of a corpus by cosine, best first: scores and row numbers, both (Q, min(k, N)).

    queries (Q, H), or (H,) for one: float32, of length 1. corpus (N, H): the same, or what `encode` gave with another
    `precision` (int8 and uint8 with the same `ranges`); a memory-mapped array is read block by block.

    Exact, a matrix product, unless `index` is given: a faiss index of this corpus (`build_index`), built once and asked
    often. An approximate one may find fewer than `k`; the rest then are -1. Raises ValueError if shapes do not fit.
    """
    queries = np.atleast_2d(np.asarray(queries, dtype=np.float32))
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    k = min(k, len(corpus))
    if index is not None:
        if index.ntotal != len(corpus):
            raise ValueError(
                f"the index holds {index.ntotal} vectors, the corpus {len(corpus)}; build it anew"
            )
        return index.search(queries, k)
    scores, rows = (
        np.full((len(queries), k), -np.inf, dtype=np.float32),
        np.full((len(queries), k), -1),
    )
    for start in range(0, len(corpus), 8 * BLOCK):
        part = as_floats(corpus[start : start + 8 * BLOCK], queries.shape[1], ranges).T
        for first in range(0, len(queries), BLOCK):
            at = slice(first, first + BLOCK)
            both = np.concatenate(
                [scores[at], queries[at] @ part], axis=1
            )  # the best so far, and this block
            best = np.argpartition(-both, k - 1, axis=1)[:, :k]
            best = np.take_along_axis(
                best, np.argsort(-np.take_along_axis(both, best, 1), axis=1, kind="stable"), 1
            )
            known = np.take_along_axis(rows[at], np.minimum(best, k - 1), axis=1)
            scores[at], rows[at] = (
                np.take_along_axis(both, best, axis=1),
                np.where(best < k, known, start + best - k),
            )
    return scores, rows


def build_index(corpus: np.ndarray, kind: str = "HNSW32") -> Any:
    """A faiss index of float32 embeddings (N, H) for `search`; `kind`: a string of `faiss.index_factory`, "Flat" is exact.

    Raises ImportError saying what to install; it is the extra `search`.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an index needs faiss: pip install 'cocoa-notebooks[search]'") from error
    index = faiss.index_factory(corpus.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:  # inverted lists and codes are fitted to the corpus
        index.train(corpus)
    index.add(corpus)
    return index


def as_floats(codes: np.ndarray, dim: int, ranges: np.ndarray | None) -> np.ndarray:
    """Embeddings of any precision -> (N, dim) float32; those of one bit a dimension become signs, of length 1."""
    width, kind, coded = codes.shape[1], codes.dtype, codes.dtype in (np.int8, np.uint8)
    if width == dim and not coded:
        return np.asarray(codes, dtype=np.float32)
    if width == (dim + 7) // 8 and coded:
        bits = (
            codes.view(np.uint8) ^ 0x80 if kind == np.int8 else codes
        )  # `binary` is `ubinary` less 128
        return (np.unpackbits(bits, axis=1, count=dim).astype(np.float32) * 2 - 1) / np.float32(
            dim**0.5
        )
    if width == dim and coded and ranges is not None:
        low, high = np.asarray(ranges, dtype=np.float32)
        return low + (codes.astype(np.float32) - np.iinfo(kind).min + 0.5) * (
            (high - low) / 255
        )  # middle of each step
    raise ValueError(
        f"queries have {dim} dimensions, the corpus has shape (N, {width}) and type {kind}: expected (N, {dim}) float, "
        f"(N, {dim}) int8 or uint8 with ranges, or (N, {(dim + 7) // 8}) of bits"
    )
