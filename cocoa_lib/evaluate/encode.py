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

from ..store.files import write_whole


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
    workers: int = 0,
) -> np.ndarray:
    """Items {text, image path or None} -> (N, H) float32; each distinct one is encoded once, short ones first.

    Items are sorted by length and cut into shards of 4 batches, with several processes of 1, or some would get no pictures.
    A finished shard is a file below cache_dir, in a folder of the embedder's fingerprint: an interrupted run goes on from
    there, a second one encodes nothing. Of several processes with one `cache_dir`, each encodes every n-th shard, calls
    `wait` (a barrier) and reads the others'. `workers` goes to the embedder's own `encode`, where it is not 0.
    Raises ValueError for embeddings that are not finite or not of length 1, RuntimeError if a share is missing; an error of
    the embedder that has `.item` (as `items.InputError`) leaves with the place among these items.
    """
    if num_processes > 1 and (cache_dir is None or wait is None):
        raise ValueError(
            "several processes share their work through cache_dir and meet at wait: give both"
        )
    keys = [item_key(item) for item in items]
    by_key = dict(zip(keys, items, strict=True))
    order = sorted(
        by_key, key=lambda key: (by_key[key]["image"] is not None, len(by_key[key]["text"]), key)
    )
    # Cut before looking at what is stored, so that all processes cut alike whenever each of them looks.
    size = batch_size * (4 if num_processes == 1 else 1)
    shards = [order[start : start + size] for start in range(0, len(order), size)]
    ahead = {"workers": workers} if workers else {}  # other embedders need not know of it
    mine = shards[process_index::num_processes]
    with TemporaryDirectory() if cache_dir is None else nullcontext(cache_dir) as base:
        folder = Path(base) / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        stored = _stored(folder)
        with tqdm(
            total=sum(map(len, mine)),
            desc=desc,
            unit="item",
            leave=False,
            disable=not show_progress,
        ) as bar:
            for shard in mine:
                if todo := [key for key in shard if key not in stored]:
                    chosen = [by_key[key] for key in todo]
                    try:
                        vectors = embedder.encode(
                            chosen, batch_size=batch_size, show_progress=False, **ahead
                        )
                    except ValueError as error:
                        if (at := getattr(error, "item", None)) is not None:
                            error.item = keys.index(todo[at])
                        raise
                    stored |= _store(
                        folder, todo, _check_vectors(np.asarray(vectors, dtype=np.float32), chosen)
                    )
                bar.update(len(shard))
        if num_processes > 1:
            wait()
            stored = _stored(folder)
        if lost := sum(key not in stored for key in order):
            raise RuntimeError(
                f"{lost} of {len(order)} embeddings are not in {folder}; do all processes share it?"
            )
        return _gather(stored, keys)


def item_key(item: Mapping[str, Any]) -> bytes:
    """sha256 of the text and of the image file's bytes.

    By content, not by path, size and time: an image folder copied or unpacked again keeps its embeddings, and a file
    replaced by another never gets the old one. Reading a file costs little beside encoding it.
    """
    image = (
        None
        if item["image"] is None
        else hashlib.sha256(Path(item["image"]).read_bytes()).hexdigest()
    )
    return hashlib.sha256(json.dumps([item["text"], image]).encode()).digest()


def _check_vectors(vectors: np.ndarray, items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    if vectors.ndim != 2 or len(vectors) != len(items):
        raise ValueError(
            f"the embedder gave an array of shape {vectors.shape} for {len(items)} items"
        )
    lengths = np.linalg.norm(vectors, axis=1)
    for i in np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))[:1]:  # "not below" so that nan is caught
        raise ValueError(
            f"the embedding of {dict(items[i])} has length {lengths[i]:.3g}, expected 1"
        )
    return vectors


def _store(
    folder: Path, keys: Sequence[bytes], vectors: np.ndarray
) -> dict[bytes, tuple[Path, int]]:
    table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
    path = folder / f"{hashlib.sha256(table).hexdigest()[:24]}.safetensors"
    write_whole(
        path,
        lambda aside: save_file({"keys": table, "vectors": np.ascontiguousarray(vectors)}, aside),
    )
    return {key: (path, row) for row, key in enumerate(keys)}


def _stored(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Key -> shard file and row in it, of everything in the folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {
        key.tobytes(): (path, row) for path in files for row, key in enumerate(_read(path, "keys"))
    }


def _gather(stored: Mapping[bytes, tuple[Path, int]], keys: Sequence[bytes]) -> np.ndarray:
    """(len(keys), H); each shard is opened once, one at a time."""
    places = pd.DataFrame([stored[key] for key in keys], columns=["path", "row"])
    result: np.ndarray | None = None
    for path, part in places.groupby("path", sort=False):
        vectors = _read(path, "vectors")
        result = (
            np.empty((len(keys), vectors.shape[1]), dtype=np.float32) if result is None else result
        )
        result[part.index] = vectors[part["row"]]
    return np.empty((0, 0), dtype=np.float32) if result is None else result


def _read(path: Path, field: str) -> np.ndarray:
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(field)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it, and its items are encoded again"
        ) from error
