"""MMEB-V1: the tasks, their rows, ranking, scores with intervals, the published numbers.

Rows come from TIGER-Lab/MMEB-eval and MMEB-train, or from a local folder in the same layout; it is one code path. A row
is a query and its own list of candidates, the right one first. Source: the public evaluators of VLM2Vec and MoCa, whose
argmax counts a tie as a hit; here a tie counts against the answer (`ties="public"` gives their rule).

An embedder is any object with `.encode(items, batch_size, show_progress) -> (N, H) float32, L2-normalised`, items being
`{"text": str, "image": path | None}`, and with `.fingerprint: str` where its embeddings are to be kept on disk.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from .files import files_hash, read_json, write_whole

if TYPE_CHECKING:  # a second to import: only where tables are read
    import datasets

META_TASKS = ("classification", "vqa", "retrieval", "grounding")
METRICS = ("p@1", "hit@5", "mrr", "ndcg@10")
# Columns of a data folder's files: evaluation, training pairs, corpus.
EVAL = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
TRAIN = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
CORPUS = ["image_path", "kind", "question", "answer"]
PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "published_mmeb.csv"


@dataclass(frozen=True)
class Task:
    name: str  # MMEB-eval's own subset name
    meta_task: str  # one of META_TASKS
    in_distribution: bool  # has a subset in MMEB-train
    n_candidates: int  # a query, the right one among them


def _tasks(meta_task: str, ind: str, ood: str) -> list[Task]:
    """Names, or name:candidates where it is not 1000."""
    named = [(name, True) for name in ind.split()] + [(name, False) for name in ood.split()]
    split = [(*name.partition(":")[::2], known) for name, known in named]
    return [Task(name, meta_task, known, int(size or 1000)) for name, size, known in split]


TASKS: tuple[Task, ...] = (
    *_tasks(
        "classification",
        "ImageNet-1K N24News:24 HatefulMemes:2 VOC2007:20 SUN397:397",
        "Place365:365 ImageNet-A ImageNet-R:200 ObjectNet:313 Country211:211",
    ),
    *_tasks("vqa", "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA VizWiz GQA TextVQA"),
    *_tasks(
        "retrieval",
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "OVEN FashionIQ EDIS Wiki-SS-NQ",
    ),
    *_tasks("grounding", "MSCOCO", "Visual7W-Pointing RefCOCO RefCOCO-Matching"),
)


def groups(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Each of MMEB's averages and the names of the tasks that it is over, without weights: `overall` is over all tasks, not
    over the four meta-tasks' means."""
    groups = {meta: [task.name for task in tasks if task.meta_task == meta] for meta in META_TASKS}
    groups["ind"] = [task.name for task in tasks if task.in_distribution]
    groups["ood"] = [task.name for task in tasks if not task.in_distribution]
    return {**groups, "overall": [task.name for task in tasks]}


# Rows


def load_eval(
    root: str,
    task: str,
    *,
    revision: str | None = None,
    n_candidates: int | None = None,
    duplicates: str = "error",
) -> datasets.Dataset:
    """Rows of one task: qry_text, qry_img_path (str), tgt_text, tgt_img_path (lists of equal length, right one first).

    `root` is a hub name or a folder that holds <Task>/test-*.parquet, itself or under eval/. Every row is checked:
    ValueError names file, row and column for a missing column, a wrong type, an item with neither text nor image, lists
    of different lengths, a number of candidates other than `n_candidates`, and a copy of the right candidate among the
    others (`duplicates="once"` lets it pass; `evaluate` then counts it once).
    """
    rows, where = _load(root, "eval", task, "test", revision)
    check_columns(rows, where, texts=EVAL[:2], lists=EVAL[2:])
    table = rows.with_format("arrow")[:]
    _check_filled(table, where, "qry_text", "qry_img_path")
    lengths, texts, images = _flat_candidates(table, where)
    wrong = (lengths == 0) | (lengths != (lengths if n_candidates is None else n_candidates))
    _check(wrong, where, "tgt_text", lambda row: f"{lengths[row]} candidates, expected {n_candidates or 'at least 1'}")
    row_of, first = np.repeat(np.arange(len(rows)), lengths), np.cumsum(lengths) - lengths

    def check_candidates(bad: np.ndarray, message: str) -> None:
        for at in np.flatnonzero(bad)[:1]:
            place = f"{where}, row {row_of[at]}, column tgt_text/tgt_img_path"
            raise ValueError(f"{place}: candidate {at - first[row_of[at]]} {message}")

    check_candidates(_blank(texts) & _blank(images), "has neither text nor image")
    codes, _ = _codes(texts, images)
    copies = codes == np.repeat(codes[first], lengths)
    copies[first] = False
    if duplicates == "error":
        check_candidates(copies, "is the same as the right one, candidate 0; mend the row or use duplicates='once'")
    return rows


def load_train(root: str, subset: str, *, n: int | None = None, negatives: bool = False) -> datasets.Dataset:
    """The first `n` rows of a training subset: qry, qry_image_path, pos_text, pos_image_path (, neg_text, neg_image_path).

    `root` is a hub name or a folder that holds <Subset>/original-*.parquet, itself or under train/; with `negatives` every row
    must have one. Raises ValueError naming file, row and column.
    """
    rows, where = _load(root, "train", subset, "original", None)
    rows = rows.select(range(min(len(rows), n))) if n is not None else rows
    sides = [("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path")]
    sides = sides[: 2 + negatives]
    check_columns(rows, where, texts=[name for side in sides for name in side])
    for start, table in blocks(rows):
        for text, image in sides:
            _check_filled(table, where, text, image, start)
    return rows


def blocks(rows: datasets.Dataset, size: int = 1 << 12) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, table) of `size` rows at a time: a check of a large file needs no more memory than these."""
    for start in range(0, len(rows), size):
        yield start, rows.with_format("arrow")[start : start + size]


def _load(root: str, part: str, name: str, split: str, revision: str | None) -> tuple[datasets.Dataset, str]:
    """(rows, how messages call the file). The hub and a folder differ only in what the pattern starts with."""
    if Path(root).is_dir():
        folder = Path(root) / part if (Path(root) / part).is_dir() else Path(root)
        files = sorted((folder / name).glob(f"{split}-*.parquet"))
        where = str(files[0]) if len(files) == 1 else f"{folder / name}/{split}-*.parquet"
        if not files:
            here = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise FileNotFoundError(f"{where}: no such file; folders in {folder}: {here or 'none'}")
    elif len(Path(root).parts) == 2 and not Path(root).is_absolute():
        files = where = f"hf://datasets/{root}@{revision or 'main'}/{name}/{split}-*.parquet"
    else:
        raise FileNotFoundError(f"{root}: no such folder, and not a hub name such as TIGER-Lab/MMEB-eval")
    return read_parquet(files, split, where), where


def read_parquet(files: str | Sequence[Path], split: str, where: str) -> datasets.Dataset:
    """Parquet files, local or a pattern of the hub, as a memory-mapped table: `datasets` keeps it in its cache.

    Raises ValueError naming `where` if they are damaged or hold no rows.
    """
    import datasets

    pattern, cache = files, None
    if not isinstance(files, str):
        # `datasets` takes paths for patterns, and its search does not follow a linked folder. It knows a file again by path
        # and time; a cache for each content cannot give the rows of a file that was put in another's place.
        pattern = [glob.escape(str(path.parent.resolve() / path.name)) for path in files]
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / "cocoa" / files_hash(files)[:16])
    try:
        with quiet():
            # Not load_dataset: a README beside the files must have no say, and it asks the hub even for local files.
            rows = datasets.Dataset.from_parquet({split: pattern}, split=split, cache_dir=cache)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and isinstance(pattern, str):  # the hub cannot be reached, or has no such file
            raise
        raise ValueError(f"{where}: empty, or not readable as parquet ({error.__cause__ or error})") from error
    if not len(rows):
        raise ValueError(f"{where}: no rows")
    for name, kind in rows.features.items():
        if getattr(kind, "dtype", None) == "null":  # a column without any value has no type of its own
            rows = rows.cast_column(name, datasets.Value("string"))
        elif getattr(getattr(kind, "feature", None), "dtype", None) == "null":  # lists of nothing but nothing
            rows = rows.cast_column(name, datasets.List(datasets.Value("string")))
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`: one a file, for milliseconds."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check(bad: np.ndarray, where: str, columns: str, message: Callable[[int], str], start: int = 0) -> None:
    for row in np.flatnonzero(bad)[:1]:
        raise ValueError(f"{where}, row {start + row}, column {columns}: {message(row)}")


def check_columns(rows: datasets.Dataset, where: str, texts: Sequence[str], lists: Sequence[str] = ()) -> None:
    """Raises ValueError where a column is missing or does not hold strings, or lists of strings."""
    if missing := [name for name in (*texts, *lists) if name not in rows.column_names]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; found {', '.join(rows.column_names)}")
    for name in (*texts, *lists):
        kind = rows.features[name]
        value = getattr(kind, "feature", None) if name in lists else kind
        if getattr(value, "dtype", None) not in ("string", "large_string"):
            wanted = "lists of strings" if name in lists else "strings"
            raise ValueError(f"{where}: column {name} must hold {wanted}, found {kind}")


def _check_filled(table: pa.Table, where: str, text: str, image: str, start: int = 0) -> None:
    bad = _blank(_strings(table, text)) & _blank(_strings(table, image))
    _check(bad, where, f"{text}/{image}", lambda row: "neither text nor image", start)


def _blank(values: pa.Array) -> np.ndarray:
    return pc.equal(pc.utf8_trim_whitespace(values), "").to_numpy(zero_copy_only=False)


def _strings(table: pa.Table, name: str) -> pa.Array:
    return pc.fill_null(table[name].combine_chunks(), "")


def _flat_candidates(table: pa.Table, where: str) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """Candidates a row (Q,), and the texts and image paths of all rows one after the other."""
    columns = [table[name].combine_chunks() for name in ("tgt_text", "tgt_img_path")]
    lengths, others = (pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in columns)
    differ = lengths != others
    _check(differ, where, "tgt_text/tgt_img_path", lambda row: f"lists of {lengths[row]} and {others[row]} entries")
    return lengths, *(pc.fill_null(pc.list_flatten(column), "") for column in columns)


def _codes(texts: pa.Array, images: pa.Array) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A number for each distinct (text, image path), and these. The path alone would join WebQA's captions."""
    text, image = pc.dictionary_encode(texts), pc.dictionary_encode(images)
    width = max(1, len(image.dictionary))
    codes, distinct = pd.factorize(text.indices.to_numpy().astype(np.int64) * width + image.indices.to_numpy())
    texts, images = text.dictionary.to_pylist(), image.dictionary.to_pylist()
    return codes, [(texts[pair // width], images[pair % width]) for pair in distinct]


def below(image_root: Path, rel: str) -> Path:
    """Where a row's image path leads; whether a file is there shows when it is read.

    Raises ValueError for a path that is absolute, has `..` or leaves the folder through a link.
    """
    plain = PureWindowsPath(rel)  # knows both separators and drive letters
    if plain.anchor or ".." in plain.parts or "\0" in rel:
        raise ValueError(f"image path {rel!r} is not a plain path below the image folder {image_root}")
    path = Path(image_root) / rel
    real = os.path.realpath(path) if path.is_symlink() else _real_folder(path.parent)
    if not Path(real).is_relative_to(_real_folder(Path(image_root))):
        raise ValueError(f"image path {rel!r} is a link that leaves the image folder {image_root}")
    return path


@lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def resolve_image(image_root: Path, rel: str) -> Path:
    """The file that a row's image path names. Raises what `below` raises, and FileNotFoundError where there is none."""
    path = below(image_root, rel)
    if not path.is_file():
        raise FileNotFoundError(f"image {rel!r} not found in {image_root}")
    return path


# Embeddings


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
        raise ValueError("several processes share their work through cache_dir and meet at wait: give both")
    keys = [item_key(item) for item in items]
    by_key = dict(zip(keys, items, strict=True))
    order = sorted(by_key, key=lambda key: (by_key[key]["image"] is not None, len(by_key[key]["text"]), key))
    # Cut before looking at what is stored, so that all processes cut alike whenever each of them looks.
    size = batch_size * (4 if num_processes == 1 else 1)
    shards = [order[start : start + size] for start in range(0, len(order), size)]
    ahead = {"workers": workers} if workers else {}  # other embedders need not know of it
    mine = shards[process_index::num_processes]
    with TemporaryDirectory() if cache_dir is None else nullcontext(cache_dir) as base:
        folder = Path(base) / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        stored = _stored(folder)
        with tqdm(total=sum(map(len, mine)), desc=desc, unit="item", leave=False, disable=not show_progress) as bar:
            for shard in mine:
                if todo := [key for key in shard if key not in stored]:
                    chosen = [by_key[key] for key in todo]
                    try:
                        vectors = embedder.encode(chosen, batch_size=batch_size, show_progress=False, **ahead)
                    except ValueError as error:
                        if (at := getattr(error, "item", None)) is not None:
                            error.item = keys.index(todo[at])
                        raise
                    stored |= _store(folder, todo, _check_vectors(np.asarray(vectors, dtype=np.float32), chosen))
                bar.update(len(shard))
        if num_processes > 1:
            wait()
            stored = _stored(folder)
        if lost := sum(key not in stored for key in order):
            raise RuntimeError(f"{lost} of {len(order)} embeddings are not in {folder}; do all processes share it?")
        return _gather(stored, keys)


def item_key(item: Mapping[str, Any]) -> bytes:
    """sha256 of the text and of the image file's bytes.

    By content, not by path, size and time: an image folder copied or unpacked again keeps its embeddings, and a file
    replaced by another never gets the old one. Reading a file costs little beside encoding it.
    """
    image = None if item["image"] is None else hashlib.sha256(Path(item["image"]).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([item["text"], image]).encode()).digest()


def _check_vectors(vectors: np.ndarray, items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    if vectors.ndim != 2 or len(vectors) != len(items):
        raise ValueError(f"the embedder gave an array of shape {vectors.shape} for {len(items)} items")
    lengths = np.linalg.norm(vectors, axis=1)
    for i in np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))[:1]:  # "not below" so that nan is caught
        raise ValueError(f"the embedding of {dict(items[i])} has length {lengths[i]:.3g}, expected 1")
    return vectors


def _store(folder: Path, keys: Sequence[bytes], vectors: np.ndarray) -> dict[bytes, tuple[Path, int]]:
    table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
    path = folder / f"{hashlib.sha256(table).hexdigest()[:24]}.safetensors"
    write_whole(path, lambda aside: save_file({"keys": table, "vectors": np.ascontiguousarray(vectors)}, aside))
    return {key: (path, row) for row, key in enumerate(keys)}


def _stored(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Key -> shard file and row in it, of everything in the folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {key.tobytes(): (path, row) for path in files for row, key in enumerate(_read(path, "keys"))}


def _gather(stored: Mapping[bytes, tuple[Path, int]], keys: Sequence[bytes]) -> np.ndarray:
    """(len(keys), H); each shard is opened once, one at a time."""
    places = pd.DataFrame([stored[key] for key in keys], columns=["path", "row"])
    result: np.ndarray | None = None
    for path, part in places.groupby("path", sort=False):
        vectors = _read(path, "vectors")
        result = np.empty((len(keys), vectors.shape[1]), dtype=np.float32) if result is None else result
        result[part.index] = vectors[part["row"]]
    return np.empty((0, 0), dtype=np.float32) if result is None else result


def _read(path: Path, field: str) -> np.ndarray:
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(field)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and its items are encoded again") from error


# Ranking and scores


def rank(
    queries: np.ndarray,
    candidates: np.ndarray,
    candidate_index: Sequence[np.ndarray],
    *,
    ties: str = "against",
    block: int = 1 << 24,
) -> pd.DataFrame:
    """Rank of the right candidate of each query by cosine (1 is best): columns rank, ties, n_candidates, Q rows.

    queries (Q, H), candidates (N, H): float32, length 1. candidate_index: Q arrays of rows of `candidates`, the right
    one first. `ties="against"` puts candidates that score the same as the right one before it, "public" behind it, as
    argmax does on a list with the right one first; the column `ties` counts them either way. `block` bounds the working
    memory, in floats. Raises ValueError for values that are not finite.

    Scores are float32 matrix products and a tie is exact equality. A product may differ in its last bit with the place
    of a column, so equal candidate vectors are first made one column, and columns stand in an order given by their
    content: equal embeddings always tie, and the order of a candidate list changes nothing.
    """
    if ties not in ("against", "public"):
        raise ValueError(f"ties must be 'against' or 'public', found {ties!r}")
    for name, vectors in (("query", queries), ("candidate", candidates)):
        for row in np.flatnonzero(~np.isfinite(vectors.sum(axis=1)))[:1]:
            raise ValueError(f"the embedding of {name} {row} has values that are not finite")
    lengths = np.array([len(index) for index in candidate_index])
    if len(lengths) != len(queries) or (lengths == 0).any():
        raise ValueError(f"{len(queries)} queries need as many lists of at least one candidate, found {len(lengths)}")
    queries, candidates = np.asarray(queries, dtype=np.float32), np.asarray(candidates, dtype=np.float32)
    first, column = _distinct_rows(candidates)
    longest = int(lengths.max(initial=1))
    # Few distinct candidates: one product with all of them. Many: gather the lists of a few queries at a time, which
    # is bound by memory traffic and breaks even at some 50 times as many distinct candidates as a list has.
    shared = candidates[first] if len(first) <= 32 * longest else None
    step = max(1, block // (len(first) if shared is not None else longest * queries.shape[1]))
    counts = np.zeros((len(queries), 2), dtype=int)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        valid = np.arange(longest) < lengths[rows, None]
        index = np.zeros(valid.shape, dtype=np.int64)
        index[valid] = column[np.concatenate(candidate_index[rows])]
        if (table := shared) is None:
            used, index = np.unique(index, return_inverse=True)
            table = candidates[first[used]]
        scores = np.take_along_axis(queries[rows] @ table.T, index.reshape(valid.shape), axis=1)
        right = scores[:, :1].copy()
        valid[:, 0] = False
        counts[rows, 0] = ((scores > right) & valid).sum(axis=1)
        counts[rows, 1] = ((scores == right) & valid).sum(axis=1)
    before, tied = counts.T
    return pd.DataFrame({"rank": 1 + before + tied * (ties == "against"), "ties": tied, "n_candidates": lengths})


def _distinct_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row stands first (M,), in the order of their hashes, and which of these each row is (N,)."""
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in vectors)
    return np.unique(np.frombuffer(digests, dtype="V16"), return_index=True, return_inverse=True)[1:]


def score_ranks(ranks: np.ndarray, n_boot: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Ranks (Q,) -> rows of metric, value, n, low, high: P@1, hit@5, MRR and NDCG@10 in percent.

    low, high: 95 % interval of the bootstrap over queries (of no width where all queries score alike). Raises
    ValueError without queries.
    """
    # A resample of the queries is a multinomial draw of how often each distinct rank occurs: same law, less memory.
    distinct, counts = np.unique(np.asarray(ranks), return_counts=True)
    if not (n := int(counts.sum())):
        raise ValueError("no queries to score")
    top10 = np.where(distinct <= 10, 1 / np.log2(1 + distinct), 0)  # one right candidate, so the ideal DCG is 1
    values = 100 * np.stack([distinct == 1, distinct <= 5, 1 / distinct, top10])
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=n_boot)
    low, high = np.percentile(values @ draws.T / n, [2.5, 97.5], axis=1)
    columns = zip(METRICS, values @ counts / n, low, high, strict=True)
    return [{"metric": m, "value": float(v), "n": n, "low": float(lo), "high": float(hi)} for m, v, lo, hi in columns]


def evaluate(
    embedder: Any,
    root: str,
    image_root: str | Path | None = None,
    *,
    tasks: Sequence[Task] = TASKS,
    n_queries: int | None = None,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    ties: str = "against",
    seed: int = 0,
    show_progress: bool = True,
    revision: str | None = None,
    duplicates: str = "error",
    **processes: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score an embedder: (results, per_query).

    results: task, meta_task, in_distribution, metric, value, n, low, high (percent), ties (queries whose answer ties
    with another candidate), n_candidates (the largest of a row), evaluator. per_query: task, query (row number), rank,
    n_candidates. Only MMEB's own 36 must have exactly as many candidates as their `Task` says.

    `image_root` is root/images unless given. `n_queries` draws that many rows a task by `seed`, which also seeds the
    intervals. `processes` goes to `encode_distinct`. Raises what load_eval, resolve_image and encode_distinct raise.
    """
    if image_root is None and not Path(root).is_dir():
        raise ValueError(
            f"{root}: no such folder; of a data set on the hub, give image_root: where its images lie here"
        )
    if n_queries is not None and n_queries < 1:
        raise ValueError(f"n_queries must be at least 1, found {n_queries}")
    image_root = Path(root) / "images" if image_root is None else Path(image_root)
    fingerprint = getattr(embedder, "fingerprint", "")
    if cache_dir is not None and not fingerprint:
        raise ValueError("this embedder has no `fingerprint`, so stored embeddings of two models would mix; set one")
    evaluator = f"cocoa_lib mmeb, ties {'against the answer' if ties == 'against' else 'as in the public argmax'}"
    encoding = {"cache_dir": cache_dir, "fingerprint": fingerprint, "batch_size": batch_size, **processes}
    loaded = []  # memory-mapped; all are checked before anything is encoded
    for task in tasks:
        expected = task.n_candidates if task in TASKS else None  # other folders may be small builds of theirs
        loaded.append(load_eval(root, task.name, revision=revision, n_candidates=expected, duplicates=duplicates))
    results, per_query = [], []
    for task, rows in zip(tqdm(tasks, desc="MMEB", unit="task", disable=not show_progress), loaded, strict=True):
        chosen = np.arange(len(rows))
        if n_queries is not None and n_queries < len(rows):
            chosen = np.sort(np.random.default_rng(seed).choice(len(rows), n_queries, replace=False))
        items, index, place = task_items(rows.select(chosen), f"{root}, {task.name}", chosen, image_root)
        try:
            vectors = encode_distinct(embedder, items, show_progress=show_progress, desc=task.name, **encoding)
        except ValueError as error:  # a damaged picture, found when it is opened
            if (at := getattr(error, "item", None)) is None:
                raise
            raise type(error)(f"{place(at)}: {re.sub(r'^item [0-9]+: ', '', str(error))}") from None
        found = rank(vectors[: len(chosen)], vectors[len(chosen) :], index, ties=ties)
        facts = {"task": task.name, "meta_task": task.meta_task, "in_distribution": task.in_distribution}
        tail = {"ties": int((found["ties"] > 0).sum()), "n_candidates": int(found["n_candidates"].max())}
        results += [
            {**facts, **score, **tail, "evaluator": evaluator}
            for score in score_ranks(found["rank"].to_numpy(), seed=seed)
        ]
        per_query.append(found.assign(task=task.name, query=chosen)[["task", "query", "rank", "n_candidates"]])
    return pd.DataFrame(results), pd.concat(per_query, ignore_index=True)


def row_items(row: Mapping[str, Any], image_root: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of `load_eval` as items to encode: (query, candidates). Raises what `resolve_image` raises."""
    texts, names = [row["qry_text"], *row["tgt_text"]], [row["qry_img_path"], *row["tgt_img_path"]]
    paths = [str(resolve_image(Path(image_root), name)) if name else None for name in names]
    query, *candidates = [{"text": text, "image": path} for text, path in zip(texts, paths, strict=True)]
    return query, candidates


def task_items(
    rows: datasets.Dataset, where: str, numbers: np.ndarray, image_root: Path
) -> tuple[list[dict[str, Any]], list[np.ndarray], Callable[[int], str]]:
    """Queries, then the distinct candidates, as items; each row's candidates by number, a repeated one once; and the
    place of an item in the files, in words."""
    table = rows.with_format("arrow")[:]
    queries = list(zip(*(_strings(table, name).to_pylist() for name in ("qry_text", "qry_img_path")), strict=True))
    lengths, texts, images = _flat_candidates(table, where)
    codes, candidates = _codes(texts, images)
    ends, items = np.cumsum(lengths), []

    def place(i: int) -> str:
        at = np.flatnonzero(codes == i - len(queries))[:1]  # first place of a candidate; none for a query
        row = np.searchsorted(ends, at[0], side="right") if at.size else i
        return f"{where}, row {numbers[row]}, column {'tgt_img_path' if at.size else 'qry_img_path'}"

    for i, (text, rel) in enumerate([*queries, *candidates]):
        try:
            items.append({"text": text, "image": resolve_image(image_root, rel) if rel else None})
        except (ValueError, OSError) as error:
            raise type(error)(f"{place(i)}: {error}") from None
    return items, [pd.unique(part) for part in np.split(codes, ends[:-1])], place


# Results


def average_intervals(
    per_query: pd.DataFrame, tasks: Sequence[Task] = TASKS, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """P@1 of each of MMEB's averages with its interval: average, value, low, high (percent), n_tasks, n (queries).

    low, high: 95 % interval of the bootstrap over the queries within each task; the tasks are fixed and weigh the same,
    however many queries they have. An average over no task is nan. Raises ValueError for an unknown task.
    """
    hits = {str(name): part["rank"].to_numpy() == 1 for name, part in per_query.groupby("task")}
    if unknown := sorted(set(hits) - {task.name for task in tasks}):
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; known: {', '.join(task.name for task in tasks)}")
    rng, present = np.random.default_rng(seed), [task for task in tasks if task.name in hits]
    # A resample of n queries of which a share p are hits has Binomial(n, p) hits.
    boots = {
        task.name: rng.binomial(len(hits[task.name]), hits[task.name].mean(), n_boot) / len(hits[task.name])
        for task in present
    }
    rows = []
    for name, group in groups(present).items():
        value, low, high = (float("nan"),) * 3
        if group:
            value = 100 * float(np.mean([hits[task].mean() for task in group]))
            low, high = np.percentile(100 * np.mean([boots[task] for task in group], axis=0), [2.5, 97.5])
        n = sum(len(hits[task]) for task in group)
        rows.append({"average": name, "value": value, "low": low, "high": high, "n_tasks": len(group), "n": n})
    return pd.DataFrame(rows)


def write_results(results: pd.DataFrame, per_query: pd.DataFrame, out_dir: str | Path, provenance: dict) -> None:
    """provenance.json (with the evaluator's name), per_query.parquet, averages.csv (`average_intervals`), and last
    results.csv: where it is, all are."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.csv").unlink(missing_ok=True)  # of an earlier evaluation: or it would stand beside the new ranks
    facts = json.dumps({"evaluator": results["evaluator"].iloc[0], **provenance}, indent=2, default=str)
    write_whole(out / "provenance.json", lambda aside: aside.write_text(facts, encoding="utf-8"))
    write_whole(out / "per_query.parquet", lambda aside: per_query.to_parquet(aside, index=False))
    columns = ["task", "meta_task", "in_distribution", "n_candidates"]
    tasks = [Task(*row) for row in results.drop_duplicates("task")[columns].itertuples(index=False)]
    table = average_intervals(per_query, tasks)
    write_whole(out / "averages.csv", lambda aside: table.to_csv(aside, index=False))
    write_whole(out / "results.csv", lambda aside: results.to_csv(aside, index=False))


def published() -> pd.DataFrame:
    """Published P@1: model, size, the four meta-tasks, ind, ood, overall, evaluator, source; recomputed, consistent.

    `recomputed` is the overall mean that follows from a row's own four means, `consistent` whether it is within 0.15 of
    the printed one (rounding explains 0.1).
    """
    table = pd.read_csv(PUBLISHED)
    counts = [sum(task.meta_task == meta for task in TASKS) for meta in META_TASKS]
    table["recomputed"] = table[list(META_TASKS)].to_numpy() @ counts / len(TASKS)
    table["consistent"] = (table["overall"] - table["recomputed"]).abs() <= 0.15
    return table


def compared() -> pd.DataFrame:
    """Rows of `published` for a picture: the 3 B models that CoCoA is compared with, one each, with a `label`."""
    table = published().assign(label=lambda t: t["model"] + " " + t["size"])
    table = table[table["model"].str.contains("CoCoA|MoCa|contrastive only") & (table["size"] == "3B")].drop_duplicates(
        "label"
    )
    return table.sort_values("model", key=lambda model: model.str.startswith("MoCa"), kind="stable")


# Command line


def read_manifest(root: str | Path) -> dict[str, Any]:
    """A data folder's manifest.json. Raises ValueError naming the file if it is not a JSON object."""
    return read_json(Path(root) / "manifest.json", ValueError, "the data folder is damaged, make it again")


def finished(root: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a data folder that holds what is `wanted`; None where nothing is. Raises ValueError for all else."""
    if (root / "manifest.json").is_file():
        found = read_manifest(root)
        held, asked = _flat({key: found.get(key) for key in wanted}), _flat(wanted)
        names = [name for name in asked | held if asked.get(name) != held.get(name)]
        if names:
            differs = "; ".join(f"{name} {held.get(name)}, not {asked.get(name)}" for name in names)
            raise ValueError(f"{root}: holds other data ({differs:.500}); delete the folder or choose another one")
        return found
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root}: holds files but no manifest, an unfinished build; delete it and run again")
    return None


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a manifest with its `settings` among them, so that one that differs is named alone."""
    settings = facts.get("settings")
    return {**facts, "settings": None, **settings} if isinstance(settings, dict) else dict(facts)


def write_tables(root: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """name -> root/name.parquet."""
    for name, table in tables.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)


def choose_tasks(names: Sequence[str], root: str) -> tuple[Task, ...]:
    """Task names -> tasks. "all": every task that `root` has by its manifest, else MMEB's 36.

    Raises ValueError for an unknown name.
    """
    path, known = Path(root) / "manifest.json", TASKS
    manifest = read_manifest(root) if path.is_file() else {}
    if "tasks" in manifest:
        try:
            known = tuple(Task(*fields) for fields in manifest["tasks"])
            if not [META_TASKS.index(task.meta_task) for task in known]:
                raise ValueError("none listed")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: tasks: expected lists of name, meta-task, in-distribution, candidates ({error})"
            ) from error
    by_name = {task.name: task for task in known}
    if unknown := sorted(set(names) - {"all", *by_name}):
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; known: {', '.join(by_name)}")
    return known if "all" in names else tuple(by_name[name] for name in dict.fromkeys(names))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cocoa_lib.mmeb", description="Evaluate a checkpoint on MMEB-V1.")
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--root", required=True, help="folder in MMEB's layout, or TIGER-Lab/MMEB-eval")
    parser.add_argument("--image-root", help="folder of the images (default: ROOT/images)")
    parser.add_argument("--tasks", nargs="+", default=["all"], help="names, or 'all'")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and stored embeddings")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: a GPU's fast kernels"
    )
    parser.add_argument(
        "--workers", type=int, default=0,
        help="processes that read pictures ahead of the model. Default 0: they hand batches over in "
        "shared memory, of which a container may have too little, and are started anew for each window of items",
    )  # fmt: skip
    parser.add_argument("--n-queries", type=int, help="queries a task, drawn by the seed (default: all)")
    parser.add_argument("--ties", choices=("against", "public"), default="against")
    parser.add_argument("--duplicates", choices=("error", "once"), default="error")
    parser.add_argument("--revision", help="commit of the hub data set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch
    from accelerate import PartialState

    from .checkpoint import META, add_scores, provenance
    from .corpus import fingerprint
    from .embedder import CocoaEmbedder

    # Of the hub: a branch moves, a commit does not: resolve once, use and record that.
    if not Path(args.root).is_dir() and len(Path(args.root).parts) == 2:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            args.revision = HfApi().dataset_info(args.root, revision=args.revision).sha
        except (HfHubHTTPError, OSError) as error:
            parser.error(
                f"--root {args.root}: no such folder here, and not found on the hub ({str(error).splitlines()[0]})"
            )
    state = PartialState(cpu=not torch.cuda.is_available())  # first: it gives each process its own GPU
    tasks = choose_tasks(args.tasks, args.root)
    data = fingerprint(Path(args.root)) if Path(args.root).is_dir() else args.revision
    embedder = CocoaEmbedder.load(args.model, dtype=getattr(torch, args.dtype))
    results, per_query = evaluate(
        embedder, args.root, args.image_root, tasks=tasks, n_queries=args.n_queries, batch_size=args.batch_size,
        cache_dir=args.out / "embeddings", ties=args.ties, seed=args.seed, show_progress=state.is_main_process,
        revision=args.revision, duplicates=args.duplicates, process_index=state.process_index,
        num_processes=state.num_processes, wait=state.wait_for_everyone, workers=args.workers,
    )  # fmt: skip
    if state.is_main_process:
        facts = {**vars(args), "data": data, "fingerprint": embedder.fingerprint, **provenance()}
        write_results(results, per_query, args.out, facts)
        missing = [task.name for task in choose_tasks(["all"], args.root) if task.name not in set(results["task"])]
        table = average_intervals(per_query, tasks).dropna()
        for row in table.itertuples():
            print(f"{row.average:15s} {row.value:5.1f} [{row.low:.1f}, {row.high:.1f}]")  # noqa: T201
        if missing:
            print(f"MISSING: {', '.join(missing)}")  # noqa: T201
        if (Path(args.model) / META).is_file() and os.access(args.model, os.W_OK):
            add_scores(args.model, _card_scores(table, results, args.root, missing))


def _card_scores(table: pd.DataFrame, results: pd.DataFrame, root: str, missing: Sequence[str]) -> str:
    """The averages as Markdown, for the model card."""
    lines = [
        f"Precision@1 in percent on `{'/'.join(Path(root).parts[-2:])}`, {results['task'].nunique()} tasks, "
        f"{table['n'].max()} queries, 95 % bootstrap intervals over queries; evaluator: {results['evaluator'].iloc[0]}.",
        *([f"**Missing tasks: {', '.join(missing)}.**"] if missing else []),
        "\n| average | tasks | p@1 | interval |\n|---|---|---|---|",
    ]
    rows = [f"| {r.average} | {r.n_tasks} | {r.value:.1f} | {r.low:.1f} to {r.high:.1f} |" for r in table.itertuples()]
    return "\n".join(lines + rows)


if __name__ == "__main__":
    main()
