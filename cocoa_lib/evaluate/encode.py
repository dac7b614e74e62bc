"""Encode the distinct items of a task once, and keep the vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from ..kernels import join_processes
from ..store.files import file_hash, write_whole


def encode_distinct(
    embedder: Any,
    items: Sequence[Mapping[str, Any]],
    *,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
    batch_size: int = 64,
    show_progress: bool = True,
    desc: str = "encode",
) -> np.ndarray:
    """Encode items {text, image path or None} -> (N, H) float32, each distinct one once.

    Items are sorted by length and cut into shards of 4 batches, or of 1 for several processes, or
    some would get no pictures. A finished shard is a file below cache_dir, named by the embedder's
    fingerprint and its items: an interrupted run goes on from there, a second one encodes nothing.
    Of several processes, each encodes every n-th shard, waits, and reads the others'.

    Raises ValueError for embeddings that are not of length 1, and RuntimeError for a missing share.
    An error of the embedder with `.item` leaves with the place among these items.
    """
    keys = [hash_item(item) for item in items]
    distinct = dict(zip(keys, items, strict=True))
    order = sorted(
        distinct, key=lambda key: (bool(distinct[key]["image"]), len(distinct[key]["text"]), key)
    )
    state = join_processes()
    size = batch_size * (4 if state.num_processes == 1 else 1)
    shards = [order[start : start + size] for start in range(0, len(order), size)]
    with TemporaryDirectory() if cache_dir is None else nullcontext(cache_dir) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        names = [hashlib.sha256(fingerprint.encode() + b"".join(shard)) for shard in shards]
        paths = [Path(folder) / f"{name.hexdigest()[:32]}.safetensors" for name in names]
        mine = list(zip(paths, shards, strict=True))[state.process_index :: state.num_processes]
        for path, shard in tqdm(mine, desc=desc, leave=False, disable=not show_progress):
            if not path.is_file():
                vectors = _encode_shard(embedder, shard, distinct, keys, batch_size)
                write_whole(
                    path, lambda aside, vectors=vectors: save_file({"vectors": vectors}, aside)
                )
        state.wait_for_everyone()
        if lost := sum(not path.is_file() for path in paths):
            raise RuntimeError(
                f"{lost} of {len(paths)} shards of embeddings are not in {folder}; do all "
                "processes share it?"
            )
        vectors = np.concatenate([load_file(path)["vectors"] for path in paths])
    places = {key: place for place, key in enumerate(order)}
    return vectors[[places[key] for key in keys]]


def _encode_shard(
    embedder: Any,
    shard: Sequence[bytes],
    distinct: Mapping[bytes, Mapping[str, Any]],
    keys: Sequence[bytes],
    batch_size: int,
) -> np.ndarray:
    try:
        vectors = embedder.encode(
            [distinct[key] for key in shard], batch_size=batch_size, show_progress=False
        )
    except ValueError as error:
        if (at := getattr(error, "item", None)) is not None:
            error.item = keys.index(shard[at])
        raise
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=-1)
    if lengths.shape != (len(shard),) or not np.allclose(lengths, 1, atol=1e-2):
        raise ValueError(
            f"the embedder gave {vectors.shape} values for {len(shard)} items, of lengths "
            f"{lengths.min():.3g} to {lengths.max():.3g}; expected a vector of length 1 an item"
        )
    return vectors


def hash_item(item: Mapping[str, Any]) -> bytes:
    """Hash the text and the image file's bytes with sha256.

    By content, not by path: an image folder copied or unpacked again keeps its embeddings, and a
    file replaced by another never gets the old one.
    """
    image = item["image"] and file_hash(Path(item["image"]))
    return hashlib.sha256(json.dumps([item["text"], image]).encode()).digest()
