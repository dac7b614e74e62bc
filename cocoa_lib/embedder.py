"""What one takes away: any mix of text and picture -> one vector of length 1.

`EosEmbedding` is a sentence-transformers input module (one forward pass, the state at EOS); stage 3
trains it. `CocoaEmbedder` opens a checkpoint folder and encodes items; to search, hand its vectors
to `sentence_transformers.util.semantic_search` or, for large corpora, to `semantic_search_faiss`.

sentence-transformers imports no module class from outside its own namespace unless told
`trust_remote_code=True`, for local folders too. `sentence_transformer(folder)` hands it the module
instead of its name: no flag is needed, and the model is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util.file_io import load_dir_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import hidden_states, language_model, open_backbone, pool
from .inputs import Batch, Inputs
from .items import InputError
from .packing import pack
from .positions import position_ids
from .store.checkpoint import META, CheckpointError, load_inputs, read_meta, save_checkpoint


class EosEmbedding(InputModule):
    """Batch -> `sentence_embedding` (B, H): the final state at EOS, of length 1."""

    config_keys = ["pooling"]  # what `print` shows

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        pooling: str = "eos",
        meta: dict[str, Any] | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.pooling, self.meta = model, inputs, pooling, meta or {}
        self.packing = packing  # several items in a row; the vectors are the same

    @property
    def modalities(self) -> list[str | tuple[str, ...]]:
        return ["text", "image", ("image", "text")]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.inputs.tokenizer

    @property
    def max_seq_length(self) -> int:
        """`Inputs.max_length`, by the name that sentence-transformers reads and sets."""
        return self.inputs.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.inputs.max_length = value

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> Batch:
        """Strings, pictures or {text, image} dicts -> batch. `prompt` is put before the text."""
        items = [as_item(item) for item in inputs]
        if prompt:
            items = [{**item, "text": prompt + (item.get("text") or "")} for item in items]
        return self.inputs.collate(items)

    def forward(self, features: Batch, **_: Any) -> Batch:
        batch = pack(features, position_ids(self.model, features)) if self.packing else features
        hidden = hidden_states(self.model, batch)  # (B, L, H), of packed rows (R, L, H)
        state = pool(hidden, batch, self.pooling)  # (B, H)
        features["sentence_embedding"] = F.normalize(state.float(), dim=-1)
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.config.text_config.hidden_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint beside what `SentenceTransformer.save_pretrained` has put into this
        folder.

        Raises CheckpointError where the folder holds a checkpoint already.
        """
        out = Path(output_path)
        if (out / META).exists():
            raise CheckpointError(
                f"{out}: already a checkpoint, which is never written over; choose another folder"
            )
        causal = getattr(language_model(self.model).config, "is_causal", True)
        layout = "causal" if causal else "bidirectional"  # where no stage has recorded it
        meta = {"layout": layout, **self.meta, "pooling": self.pooling}
        with TemporaryDirectory(dir=out.parent) as aside:
            whole = save_checkpoint(Path(aside) / out.name, self.model, self.inputs, meta)
            shutil.copytree(whole, out, dirs_exist_ok=True)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **where: Any,
    ) -> EosEmbedding:
        """Open a folder or hub name for sentence-transformers; `model_kwargs`: `load_module`'s
        settings.

        Raises ValueError for other settings: a checkpoint keeps the processor and config of its
        training.
        """
        if unread := [*(processor_kwargs or ()), *(config_kwargs or ())]:
            raise ValueError(
                f"{', '.join(unread)}: not a setting of this model; model_kwargs takes dtype and "
                "attn_implementation"
            )
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: where[name] for name in names if name in where}
        folder = load_dir_path(model_name_or_path, **where)
        return load_module(folder or model_name_or_path, **(model_kwargs or {}))


def as_item(value: Any) -> dict[str, Any]:
    """A string is text, a dict is an item, anything else is taken for a picture."""
    if isinstance(value, dict):
        return value
    return {"text": value} if isinstance(value, str) else {"image": value}


def load_module(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> EosEmbedding:
    """Open a checkpoint folder in the attention mode and with the processor of its training.

    Raises CheckpointError for a folder with a missing, damaged or altered file.
    """
    meta = read_meta(folder)
    model = open_backbone(
        folder,
        bidirectional=meta.get("layout") != "causal",
        attn_implementation=attn_implementation,
        dtype=dtype,
    )
    return EosEmbedding(model, load_inputs(folder, meta), meta.get("pooling", "eos"), meta)


def sentence_transformer(
    folder: str | Path, *, device: str | None = None, **settings: Any
) -> SentenceTransformer:
    """Open a checkpoint folder as a sentence-transformers model; `settings`: `load_module`'s.

    Prompts and what else sentence-transformers keeps beside the modules come along. Raises
    ValueError where the folder holds modules after ours.
    """
    listed, kept = Path(folder) / "modules.json", Path(folder) / "config_sentence_transformers.json"
    if listed.is_file() and len(found := json.loads(listed.read_text(encoding="utf-8"))) > 1:
        names = ", ".join(str(module.get("type")) for module in found)
        raise ValueError(
            f"{folder}: several modules ({names}); open it by SentenceTransformer(..., "
            "trust_remote_code=True)"
        )
    saved = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    saved = {name: saved[name] for name in names if name in saved}
    return SentenceTransformer(modules=[load_module(folder, **settings)], device=device, **saved)


def mteb_model(folder: str | Path, **settings: Any) -> Any:
    """A checkpoint folder as `mteb.evaluate` takes it. Needs the extra `mteb`.

    mteb's own wrapper, told that the model sees pictures too; named and versioned by the
    checkpoint, since mteb stores results under these.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(sentence_transformer(folder, **settings))
    facts = {
        "name": f"cocoa/{Path(folder).name}",
        "revision": read_meta(folder, check=False)["weights_sha256"],
        "modalities": ["text", "image"],
    }
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=facts)
    return wrapper


class CocoaEmbedder:
    """Load a checkpoint folder and embed items; `model` is sentence-transformers' own object.

    `fingerprint` names all that an embedding depends on, besides the item.
    """

    def __init__(self, module: EosEmbedding, fingerprint: str = "") -> None:
        self.module, self.fingerprint = module, fingerprint
        device = str(next(module.parameters()).device)
        self.model = SentenceTransformer(modules=[module], device=device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
    ) -> CocoaEmbedder:
        """Open a checkpoint folder on `device` (default: a GPU if there is one). dtype: of the
        weights.

        Raises CheckpointError for a folder with a missing, damaged or altered file.
        """
        module = load_module(folder, dtype=dtype, attn_implementation=attn_implementation)
        module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        meta, inputs = module.meta, module.inputs
        settings = (inputs.eos_token, inputs.max_length, module.pooling, dtype, meta.get("layout"))
        files = sorted(meta.get("files_sha256", {}).items())  # config, tokenizer, processor
        parts = (meta["weights_sha256"], *settings, *(digest[:16] for _, digest in files))
        return cls(module, "-".join(map(str, parts)))

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint that `load` and sentence-transformers open again."""
        self.model.save_pretrained(str(folder))

    def encode(
        self,
        items: Iterable[Any] | Any,
        batch_size: int = 32,
        show_progress: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
    ) -> np.ndarray:
        """Items, or one alone -> (N, H) float32 in the order given, or (H,); vectors of length 1.

        An item is a dict {text, image}, a string (always text) or a picture (a PIL image or a
        `Path`). sentence-transformers' `encode` batches them by length. `truncate_dim` keeps the
        first dimensions and normalises again; `precision`: its int8, uint8, binary or ubinary.
        Raises InputError naming the item that cannot be used, with its place as `error.item`.
        """
        single = isinstance(items, (str, dict)) or not isinstance(items, Iterable)
        given = [as_item(item) for item in ([items] if single else items)]
        try:
            vectors = self.model.encode(
                [{"text": "", "image": None} | item for item in given],  # one kind for all
                batch_size=batch_size,
                show_progress_bar=show_progress,
                truncate_dim=truncate_dim,
                normalize_embeddings=truncate_dim is not None,
                precision=precision,
            )
        except InputError:
            self._name_bad_item(given)
            raise
        return vectors[0] if single else vectors

    def _name_bad_item(self, items: list[dict[str, Any]]) -> None:
        """Raise InputError for the first item that fails alone: a batch knows its own rows only."""
        for i, item in enumerate(items):
            try:
                self.module.preprocess([item])
            except InputError as error:
                reason = str(error).removeprefix("item 0 of the batch: ")
                named = InputError(f"item {i}: {reason}")
                named.item = i
                raise named from None
