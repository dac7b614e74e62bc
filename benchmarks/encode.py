"""`CocoaEmbedder.encode` against plain batches through transformers and against sentence-transformers, same checkpoint.

Items are the built-in benchmark's: captions, pictures, pictures with questions, mixed. Also the share of computed tokens that
are padding, by how batches are made, on a mixture like MMEB's: texts of 20 tokens, pictures of 600.

python benchmarks/encode.py                  # part of `make bench`
python benchmarks/encode.py --items 10000    # the first and the last comparison, on so many items; some 40 minutes
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import BACKBONE, WORDS, in_turn, record, save, small_model
from PIL import Image
from sentence_transformers import SentenceTransformer

from cocoa_lib.backbone import hidden_states, pool
from cocoa_lib.data import corpus
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding, token_batches
from cocoa_lib.world.build import build

BATCH = 32


def items(folder: Path, n: int = 300) -> list[dict]:
    """About a third each of texts, pictures, and pictures with a question, in an order drawn from a seed."""
    build(folder, seed=0, n_pairs=8, n_queries=4, n_corpus=n // 3)
    captions, questions = corpus.captions(folder), corpus.questions(folder)[: n - 2 * (n // 3)]
    mixed = [{"text": row["target"], "image": None} for row in captions]
    mixed += [{"text": "", "image": row["image"]} for row in captions]
    mixed += [{"text": row["text"], "image": row["image"]} for row in questions]
    return [mixed[i] for i in np.random.default_rng(0).permutation(len(mixed))]


@torch.inference_mode()
def plain(embedder: CocoaEmbedder, rows: list[dict], size: int) -> np.ndarray:
    """Fixed-size batches in the order given, each padded to its longest item."""
    module, parts = embedder.module, []
    for start in range(0, len(rows), size):
        batch = module.inputs.collate(rows[start : start + size])
        parts.append(torch.nn.functional.normalize(pool(hidden_states(module.model, batch), batch), dim=-1).numpy())
    return np.concatenate(parts)


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Percent of computed tokens that are padding."""
    computed = sum(len(chosen) * lengths[chosen].max() for chosen in batches)
    return 100 * (1 - lengths.sum() / computed)


def padding() -> list[dict]:
    """Counted, not timed: the same number whenever it is run."""
    rng = np.random.default_rng(0)
    is_picture = rng.random(4096) < 0.5
    cells = np.where(is_picture, np.clip(rng.normal(600, 150, 4096), 64, 1200).astype(int), 0)
    lengths = cells + np.clip(rng.poisson(20, 4096), 1, None) + 1
    given = np.array_split(np.arange(4096), 4096 // BATCH)
    shares = {
        "given": padding_share(lengths, given),
        "tokens": padding_share(lengths, list(token_batches(lengths, cells, BATCH))),
    }
    text = "padding, % of computed tokens: {given:.1f} in given order, {tokens:.1f} in batches by tokens; 4096 items, MMEB-like"
    return [
        record("encode, padding", text.format(**shares), [shares["given"]], [max(shares["tokens"], 1e-9)], **shares)
    ]


def mmeb_like(n: int, n_pictures: int, width: int = 512, vision: int = 448) -> tuple[CocoaEmbedder, list[dict]]:
    """Pictures of 300 tokens among texts of 20 words, in random order, and a random model with a wide vision tower."""
    model, inputs = small_model(hidden_size=width, layers=2, vision_dim=vision, vision_layers=1, image_pixels=320 * 240)
    rng = np.random.default_rng(0)
    rows: list[dict] = [{"text": " ".join(rng.choice(WORDS, 20)), "image": None} for _ in range(n - n_pictures)]
    noise = rng.integers(0, 255, (n_pictures, 240, 320, 3), dtype=np.uint8)
    rows += [{"text": "", "image": Image.fromarray(pixels)} for pixels in noise]
    return CocoaEmbedder(EosEmbedding(model, inputs)), [rows[i] for i in rng.permutation(n)]


def compare(label: str, embedder: CocoaEmbedder, rows: list[dict], batch: int = BATCH) -> list[dict]:
    library = SentenceTransformer(modules=[embedder.module], device="cpu")
    sides = {
        "ours": lambda: embedder.encode(rows, batch_size=batch),
        "plain": lambda: plain(embedder, rows, batch),
        "library": lambda: library.encode(rows, batch_size=batch, show_progress_bar=False),
    }
    vectors = {name: side() for name, side in sides.items()}
    for name in ("plain", "library"):
        assert np.abs(vectors[name] - vectors["ours"]).max() < 1e-5, name
    seconds = in_turn(sides, warm=True)
    rate = f"{len(rows)} items; encode: {len(rows) / np.median(seconds['ours']):.0f} items/s while measured"
    return [
        record(f"encode, plain batches, {label}", f"time, plain / encode; {rate}", seconds["plain"], seconds["ours"]),
        record(f"encode, sentence-transformers, {label}", f"time, sentence-transformers / encode; {rate}",
               seconds["library"], seconds["ours"]),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of `encode`.")
    parser.add_argument(
        "--items", type=int, help="compare on so many items: the built-in benchmark's, and a tenth pictures among texts"
    )
    n = parser.parse_args(argv).items
    torch.set_num_threads(1)
    if n:
        with tempfile.TemporaryDirectory() as folder:
            records = compare(f"{n} items", CocoaEmbedder.load(BACKBONE), items(Path(folder) / "world", n))
        records += compare(f"{n} items, a tenth pictures", *mmeb_like(n, n // 10, width=128, vision=96))
        save("encode_many", records, "equal embeddings (1e-5), then time (n 5)")
        return
    with tempfile.TemporaryDirectory() as folder:
        records = compare("built-in benchmark", CocoaEmbedder.load(BACKBONE), items(Path(folder) / "world"))
    records += compare("half pictures of 300 tokens, half texts of 20", *mmeb_like(12, 6), batch=6)
    records += compare("a tenth pictures of 300 tokens, else texts of 20", *mmeb_like(32, 3), batch=16)
    save("encode", records + padding(), "equal embeddings (1e-5), then time (n 5); padding is counted")


if __name__ == "__main__":
    main()
