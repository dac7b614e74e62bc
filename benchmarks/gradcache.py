"""GradCache: peak memory by batch size at a fixed chunk, and time over a plain full batch, at the laptop shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import BACKBONE, WORDS, in_turn, peaks, record, save
from PIL import Image

from cocoa_lib.embedder import EosEmbedding, load_module
from cocoa_lib.objectives import CachedInfoNCE, info_nce

CHUNK = 64  # the laptop profile's mini_batch_size
SIZES = (64, 256, 1024)


def columns(module: EosEmbedding, batch: int) -> list[dict]:
    """Queries: a 64 x 64 picture and a question; positives: 12 words. Made before the measurement, as a loader makes them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (batch, 64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    queries = [{"text": "what is it", "image": Image.fromarray(pixels)} for pixels in noise]
    positives = [{"text": f"{i} " + " ".join(WORDS[:11])} for i in range(batch)]
    return [module.inputs.collate(queries), module.inputs.collate(positives)]


def setup(cached: bool, batch: int) -> Callable[[], float]:
    """One step, forward and backward: in chunks of CHUNK, or the full batch at once."""
    torch.manual_seed(0)
    module = load_module(BACKBONE).train()
    loss_in_chunks = CachedInfoNCE(module, mini_batch_size=CHUNK)

    def step(features: list[dict]) -> float:
        module.zero_grad()
        if cached:
            loss = loss_in_chunks([dict(column) for column in features])
        else:
            query, positive = [module(dict(column))["sentence_embedding"] for column in features]
            loss = info_nce(query, positive, torch.arange(len(query)), temperature=loss_in_chunks.temperature)
        loss.backward()
        return float(loss.detach())

    step(columns(module, 2 * CHUNK))  # what is allocated once: gradients, buffers
    features = columns(module, batch)
    run = lambda: step(features)  # noqa: E731
    run.module = module
    return run


def first_pass(batch: int) -> Callable[[], None]:
    """What GradCache cannot do without: all embeddings once, without gradients."""
    module = load_module(BACKBONE).train()
    features = columns(module, batch)

    @torch.no_grad()
    def run() -> None:
        for column in features:
            module(dict(column))

    return run


def main() -> None:
    sides = {"cached": setup(True, 64), "full": setup(False, 64)}
    forward = first_pass(64)
    losses = {name: side() for name, side in sides.items()}
    assert abs(losses["cached"] - losses["full"]) < 1e-4, losses
    for a, b in zip(*(side.module.parameters() for side in sides.values()), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    shape = f"chunks of {CHUNK}, picture + question against 12 words, committed backbone"
    forward()
    seconds = in_turn(sides | {"forward": forward}, warm=True)
    least = [first + step for first, step in zip(seconds["forward"], seconds["full"], strict=True)]
    records = [record("GradCache, time, batch 64", f"step time, GradCache / full batch; {shape}",
                      seconds["cached"], seconds["full"]),
               record("GradCache, time, least possible", "full batch and one more forward pass without gradients / full batch",
                      least, seconds["full"])]  # fmt: skip
    memory = peaks(setup, [*((True, size) for size in SIZES), (False, 256)])
    for size in SIZES[1:]:
        records.append(record(f"GradCache, memory, batch {size}", f"peak of a step, batch {size} / batch 64; {shape}",
                              memory[True, size], memory[True, 64]))  # fmt: skip
    kept = peaks(setup, [(True, 64), (True, 1024)], in_use=False)
    records.append(record("GradCache, resident memory, batch 1024", "the same with what glibc keeps of freed blocks",
                          kept[True, 1024], kept[True, 64]))  # fmt: skip
    records.append(record("GradCache, memory saved, batch 256", f"peak of a step, full batch / GradCache; {shape}",
                          memory[False, 256], memory[True, 256]))  # fmt: skip
    save(
        "gradcache",
        records,
        "equal losses and gradients, then time (n 5) and memory of a step above model and inputs (n 3)",
    )


if __name__ == "__main__":
    main()
