"""GradCache: peak memory by batch size at a fixed chunk, and time over a plain full batch, at the laptop shape.

python benchmarks/gradcache.py             # part of `make bench`
python benchmarks/gradcache.py --large     # memory of batch 1024 alone -> gradcache_large.json; nine minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from common import BACKBONE, WORDS, in_turn, peaks, record, save, small_model
from PIL import Image

from cocoa_lib.contrastive import CachedInfoNCE, info_nce
from cocoa_lib.embedder import EosEmbedding, load_module
from cocoa_lib.inputs import Batch
from cocoa_lib.packing import sort_longest_first

CHUNK = 32  # rows
SHAPE = "picture + question against 12 words, committed backbone"


def columns(module: EosEmbedding, batch: int) -> list[dict]:
    """Queries: a 64 x 64 picture and a question; positives: 12 words. Made before the measurement, as a loader makes them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (batch, 64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    queries = [{"text": "what is it", "image": Image.fromarray(pixels)} for pixels in noise]
    positives = [{"text": f"{i} " + " ".join(WORDS[:11])} for i in range(batch)]
    return [module.inputs.collate(queries), module.inputs.collate(positives)]


def setup(way: str, batch: int) -> Callable[[], float]:
    """One step, forward and backward. way: "chunks" of CHUNK rows; "full", the batch at once without our loss; "one chunk",
    as large as the batch; "cached", the same chunk through GradCache all the same, as sentence-transformers' losses do."""
    torch.manual_seed(0)
    module = load_module(BACKBONE).train()
    objective = CachedInfoNCE(module, mini_batch_size=CHUNK if way == "chunks" else batch)
    objective._keys = [None, None]

    def step(features: list[dict]) -> float:
        module.zero_grad()
        if way == "full":
            query, positive = [module(dict(column))["sentence_embedding"] for column in features]
            loss = info_nce(query, positive, torch.arange(len(query)), temperature=objective.temperature)
        else:
            embed = objective.forward_cached if way == "cached" else objective
            loss = embed([dict(column) for column in features])
        loss.backward()
        return float(loss.detach())

    step(columns(module, CHUNK + 1))  # what is allocated once: gradients, buffers
    features = columns(module, batch)
    run = lambda: step(features)  # noqa: E731
    run.module = module
    return run


def compare(ways: tuple[str, str], batch: int, name: str, words: str) -> dict:
    """The time of one way over the other's; equal loss and gradients first. Short steps are taken more often."""
    sides = {way: setup(way, batch) for way in ways}
    losses = [side() for side in sides.values()]
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    for a, b in zip(*(side.module.parameters() for side in sides.values()), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    seconds = in_turn(sides, 5 if batch > 64 else 11, warm=True)
    return record(f"GradCache, {name}", f"step time, {words}; {SHAPE}", seconds[ways[0]], seconds[ways[1]])


def mixed(batch: int = 16, chunk: int = 4) -> dict:
    """Time of a step in the order given over that of sorted chunks: every other query, at random, has a picture of 256 tokens."""
    torch.manual_seed(0)
    model, inputs = small_model(128, image_pixels=256**2, vision_dim=32, vision_layers=1)
    module = EosEmbedding(model, inputs).train()
    objective = CachedInfoNCE(module, mini_batch_size=chunk)
    picture, text = Image.new("RGB", (256, 256)), " ".join(WORDS)
    queries = [{"text": text, "image": picture if at % 2 else None} for at in torch.randperm(batch).tolist()]
    features = [inputs.collate(queries), inputs.collate([{"text": f"{i} {text}"} for i in range(batch)])]

    def step(columns: list[Batch]) -> tuple[float, torch.Tensor]:
        module.zero_grad()
        loss = objective([dict(column) for column in columns])
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    ordered = [rows | {"order": order} for rows, order in map(sort_longest_first, features)]
    sides = {"given": lambda: step(features), "sorted": lambda: step(ordered)}
    (one, a), (other, b) = sides["sorted"](), sides["given"]()
    assert abs(one - other) < 1e-4 and (a - b).norm() < 1e-3 * b.norm()
    seconds = in_turn(sides, warm=True)
    text = f"step time, chunks of {chunk} of {batch} rows as given / sorted by length; half of the queries have a picture of 256 "
    text += "tokens, all else some 20; hidden 128, 2 layers"
    return record("GradCache, sorted chunks, mixed", text, seconds["given"], seconds["sorted"])


def large() -> None:
    """What is in use at most, and what is resident with what glibc, left to itself, keeps of freed blocks."""
    records = []
    for name, words in {"memory": "", "resident memory": " with what glibc keeps of freed blocks"}.items():
        found = peaks(setup, [("chunks", 1024), ("chunks", 64)], in_use=name == "memory")
        text = f"peak of a step{words}, batch 1024 / batch 64; chunks of {CHUNK}; {SHAPE}"
        records.append(record(f"GradCache, {name}, batch 1024", text, found["chunks", 1024], found["chunks", 64]))
    save("gradcache_large", records, "memory of a step above model and inputs (n 5 processes)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of GradCache.")
    parser.add_argument("--large", action="store_true", help="memory of a batch of 1024, and nothing else")
    torch.set_num_threads(1)
    if parser.parse_args(argv).large:
        return large()
    chunks = f"GradCache in chunks of {CHUNK} / full batch of"
    once = "GradCache's two passes / one pass, batch 64 in one chunk"
    records = [
        compare(("chunks", "full"), 256, "time, batch 256", f"{chunks} 256"),
        compare(("chunks", "full"), 64, "time, batch 64", f"{chunks} 64"),
        compare(("cached", "one chunk"), 64, "time, one chunk", once),
        mixed(),
    ]
    memory = peaks(setup, [("chunks", 256), ("full", 256), ("chunks", 64)])
    chunked = memory["chunks", 256]
    text = f"peak of a step, batch 256 / batch 64; chunks of {CHUNK}; {SHAPE}"
    records.append(record("GradCache, memory, batch 256", text, chunked, memory["chunks", 64]))
    text = f"peak of a step, full batch / chunks of {CHUNK}; {SHAPE}"
    records.append(record("GradCache, memory saved, batch 256", text, memory["full", 256], chunked))
    save(
        "gradcache",
        records,
        "equal losses and gradients, then time (n 5 or 11) and memory of a step above model and inputs (n 5 processes)",
    )


if __name__ == "__main__":
    main()
