"""Encode the distinct items of a task once, and keep the vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

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
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], Any] | None = None,
) -> np.ndarray:
    """Encode items {text, image path or None} -> (N, H) float32, each distinct one once.

    Items are sorted by length and cut into shards of 4 batches, or of 1 for several processes, or
    some would get no pictures. A finished shard is a file below cache_dir, in a folder of the
    embedder's fingerprint: an interrupted run goes on from there, a second one encodes nothing.
    Of several processes, each encodes every n-th shard, calls `wait` (a barrier) and reads the
    others'.

    Raises ValueError for embeddings that are not of length 1, and RuntimeError for a missing share.
    An error of the embedder with `.item` leaves with the place among these items.
    """
    if num_processes > 1 and (cache_dir is None or wait is None):
        raise ValueError(
            "several processes share their work through cache_dir and meet at wait: give both"
        )
    keys = [hash_item(item) for item in items]
    shards = _cut_shards(dict(zip(keys, items, strict=True)), batch_size, num_processes)
    mine = shards[process_index::num_processes]
    with TemporaryDirectory() if cache_dir is None else nullcontext(cache_dir) as base:
        folder = Path(base) / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        stored, total = _find_stored(folder), sum(map(len, mine))
        with tqdm(
            total=total, desc=desc, unit="item", leave=False, disable=not show_progress
        ) as bar:
            for shard in mine:
                if todo := {key: item for key, item in shard.items() if key not in stored}:
                    stored |= _encode_shard(embedder, todo, folder, keys, batch_size)
                bar.update(len(shard))
        if num_processes > 1:
            wait()
            stored = _find_stored(folder)
        if lost := sum(key not in stored for key in set(keys)):
            raise RuntimeError(
                f"{lost} of {len(set(keys))} embeddings are not in {folder}; do all processes "
                "share it?"
            )
        return _gather(stored, keys)


def _cut_shards(
    by_key: Mapping[bytes, Mapping[str, Any]], batch_size: int, num_processes: int
) -> list[dict[bytes, Mapping[str, Any]]]:
    """Sort items by length and cut them; all processes cut alike, whatever is stored already."""
    order = sorted(
        by_key.items(),
        key=lambda pair: (pair[1]["image"] is not None, len(pair[1]["text"]), pair[0]),
    )
    size = batch_size * (4 if num_processes == 1 else 1)
    return [dict(order[start : start + size]) for start in range(0, len(order), size)]


def _encode_shard(
    embedder: Any,
    todo: Mapping[bytes, Mapping[str, Any]],
    folder: Path,
    keys: Sequence[bytes],
    batch_size: int,
) -> dict[bytes, tuple[Path, int]]:
    """Encode and store one shard: where each of its vectors lies."""
    chosen = list(todo.values())
    try:
        vectors = embedder.encode(chosen, batch_size=batch_size, show_progress=False)
    except ValueError as error:
        if (at := getattr(error, "item", None)) is not None:
            error.item = keys.index(list(todo)[at])
        raise
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(chosen):
        raise ValueError(f"the embedder gave shape {vectors.shape} for {len(chosen)} items")
    lengths = np.linalg.norm(vectors, axis=1)
    for i in np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))[:1]:  # "not below" so that nan is caught
        raise ValueError(
            f"the embedding of {dict(chosen[i])} has length {lengths[i]:.3g}, expected 1"
        )
    table = np.frombuffer(b"".join(todo), dtype=np.uint8).reshape(len(todo), -1)
    path = folder / f"{hashlib.sha256(table).hexdigest()[:24]}.safetensors"
    content = {"keys": table, "vectors": np.ascontiguousarray(vectors)}
    write_whole(path, lambda aside: save_file(content, aside))
    return {key: (path, row) for row, key in enumerate(todo)}


def hash_item(item: Mapping[str, Any]) -> bytes:
    """Hash the text and the image file's bytes with sha256.

    By content, not by path: an image folder copied or unpacked again keeps its embeddings, and a
    file replaced by another never gets the old one.
    """
    image = item["image"] and file_hash(Path(item["image"]))
    return hashlib.sha256(json.dumps([item["text"], image]).encode()).digest()


def _find_stored(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Find the shard file and the row of every key in the folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {
        key.tobytes(): (path, row) for path in files for row, key in enumerate(_read(path, "keys"))
    }


def _gather(stored: Mapping[bytes, tuple[Path, int]], keys: Sequence[bytes]) -> np.ndarray:
    """Gather (len(keys), H) float32; each shard is opened once, one at a time."""
    places = pd.DataFrame([stored[key] for key in keys], columns=["path", "row"])
    result = np.empty((len(keys), 0), dtype=np.float32)
    for path, part in places.groupby("path", sort=False):
        vectors = _read(path, "vectors")
        if not result.shape[1]:
            result = np.empty((len(keys), vectors.shape[1]), dtype=np.float32)
        result[part.index] = vectors[part["row"]]
    return result


def _read(path: Path, field: str) -> np.ndarray:
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(field)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it, and its items are encoded again"
        ) from error
