"""Import time, the share of a step that waits for its batch, pictures read beside the model, and padding in all stages."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import BACKBONE, in_turn, record, save
from PIL import Image
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from stages import contrastive_loss
from torch.utils.data import DataLoader, Dataset

from cocoa_lib.backbone import open_backbone
from cocoa_lib.contrastive import pair_features
from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.data import corpus
from cocoa_lib.inputs import Inputs
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.plan import Planned, index_plan
from cocoa_lib.run.profiles import load_profile
from cocoa_lib.run.stage import KEPT_IMAGES
from cocoa_lib.world.build import build

BATCHES: dict[str, Callable] = {"stage1": stage1_batch, "stage2": stage2_batch}
STEPS = 7  # of which the first two do not count


def importing() -> dict:
    """A fresh interpreter each."""
    sides = {"package": "import cocoa_lib", "nothing": "pass"}
    run = partial(subprocess.run, check=True)
    seconds = in_turn({name: partial(run, [sys.executable, "-c", code]) for name, code in sides.items()})
    return record(
        "import cocoa_lib", "time, import cocoa_lib / an empty interpreter", seconds["package"], seconds["nothing"]
    )


def padding(stage: str, shape: str, lengths: np.ndarray, batch_size: int) -> dict:
    """Computed tokens over real ones: what packing could gain at most in the text decoder (`packing.py` times it)."""
    used = lengths[: len(lengths) // batch_size * batch_size].reshape(-1, batch_size)
    ratios = used.max(axis=1) * batch_size / used.sum(axis=1)
    share = 100 * (1 - used.sum() / (used.max(axis=1) * batch_size).sum())
    text = f"computed tokens / real ones in a batch of {batch_size}, {shape}; {share:.1f} % are padding; counted, not timed"
    return record(f"padding, {stage}, {shape}", text, ratios, np.ones_like(ratios))


def waiting(
    stage: str, workers: int, loss: Callable[[dict], torch.Tensor], data: Dataset, collate: Callable, batch_size: int
) -> dict:
    """Share of a training step that the model waits for its batch, as the trainers load it: of `data`, in order."""
    loader = DataLoader(data, batch_size, collate_fn=collate, num_workers=workers)
    waited, whole, batches = [], [], iter(loader)
    for _ in range(STEPS):
        start = time.perf_counter()
        tensors = next(batches)
        made = time.perf_counter()
        loss(tensors).backward()
        waited.append(made - start)
        whole.append(time.perf_counter() - start)
    text = f"time waiting / whole step of {batch_size}, laptop's model"
    return record(f"waiting for the batch, {stage}, {workers} workers", text, waited[2:], whole[2:])


def stages(data: Path) -> list[dict]:
    """Share of a step that waits for its batch (without workers: makes it), laptop profile, committed backbone."""
    records, profile, inputs = [], load_profile("laptop"), Inputs.load(BACKBONE, max_length=256)
    rows = [*corpus.captions(data), *(row for part in corpus.text_pairs(data).values() for row in part)]
    order = np.random.default_rng(0).permutation(len(rows))
    for stage, make in BATCHES.items():
        recipe = make_recipe(stage, profile[stage])
        module = Reconstruction(open_backbone(BACKBONE, bidirectional=True), layout=recipe.layout,
                                image_weight=recipe.image_weight).train()  # fmt: skip
        mine = [i for i in order if stage == "stage2" or not rows[i]["text"]]
        batches = [[{**rows[i], "draw": k} for k, i in enumerate(mine[at : at + recipe.batch_size])]
                   for at in range(0, 6 * recipe.batch_size, recipe.batch_size)]  # fmt: skip
        for workers in (0, 2):
            collate = partial(make, inputs=inputs, recipe=recipe, seed=0)
            taken = Planned([rows[i] for i in mine], np.arange(STEPS * recipe.batch_size) % len(mine))
            loss = lambda batch, module=module: module(**batch)["loss"]  # noqa: E731
            records.append(waiting(stage, workers, loss, taken, collate, recipe.batch_size))
        lengths = np.concatenate([make(b, inputs, recipe, 0)["attention_mask"].sum(1).numpy() for b in batches])
        records.append(padding(stage, "laptop", lengths, recipe.batch_size))
    return records


def contrastive(data: Path) -> list[dict]:
    """The same share in stage 3, with two workers."""
    inputs, recipe = Inputs.load(BACKBONE, max_length=256), make_recipe("stage3", load_profile("laptop")["stage3"])
    rows, sizes = corpus.pairs(data)
    plan = index_plan(sizes, STEPS * recipe.batch_size, seed=0, block=recipe.same_task_block)
    collate = SentenceTransformerDataCollator(partial(pair_features, inputs=inputs, mini_batch_size=recipe.mini_batch_size))
    _, loss = contrastive_loss(inputs, recipe)
    return [waiting("stage3", 2, loss, rows.select(plan), collate, recipe.batch_size)]


def photographs(folder: Path, n: int = 16, size: tuple[int, int] = (2000, 1500), kind: str = "jpg") -> list[dict]:
    """Files smooth as photographs are; of 3 megapixels, unless told otherwise."""
    rng = np.random.default_rng(0)
    for i in range(n):
        smooth = Image.fromarray(rng.integers(0, 255, (15, 20, 3), dtype=np.uint8)).resize(size)
        smooth.save(folder / f"{i}.{kind}", quality=90)
    return [{"text": "", "image": folder / f"{i}.{kind}"} for i in range(n)]


def keeping(folder: Path) -> list[dict]:
    """A training step whose pictures, as large as `pairs` stores a user's, are read anew or kept from an earlier step."""
    recipe = make_recipe("stage1", load_profile("laptop")["stage1"])
    model = open_backbone(BACKBONE, bidirectional=True)
    module = Reconstruction(model, layout=recipe.layout, image_weight=recipe.image_weight).train()
    items = photographs(folder, recipe.batch_size, (512, 384), "png")
    rows = [
        {"text": "", "target": "a large red circle", "image": str(item["image"]), "draw": i}
        for i, item in enumerate(items)
    ]
    read, kept = (Inputs.load(BACKBONE, max_length=256) for _ in range(2))
    kept.keep_images(KEPT_IMAGES)
    batches = [stage1_batch(rows, inputs, recipe, 0) for inputs in (read, kept, kept)]
    assert all(torch.equal(batches[0][name], batch[name]) for batch in batches for name in batch)
    sides = {
        name: lambda inputs=inputs: module(**stage1_batch(rows, inputs, recipe, 0))["loss"].backward()
        for name, inputs in {"read": read, "kept": kept}.items()
    }
    seconds = in_turn(sides)
    text = f"time, read / kept; a step of {len(rows)}, laptop's model, PNG files of 512 x 384"
    return [record("step, pictures kept, photographs", text, seconds["read"], seconds["kept"])]


def mmeb_lengths(n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stage -> tokens of text and of what stands before it, (n,) each: captions of 20 tokens after pictures of 600 +- 150
    cells; in stage 2 a third of the rows have a question of 20 tokens in the picture's place."""
    rng = np.random.default_rng(0)
    text = 3 + np.clip(rng.poisson(20, n), 1, None)
    cells = np.clip(rng.normal(600, 150, n), 64, 1200).astype(int)
    return {"stage1": (text, cells), "stage2": (text, np.where(rng.random(n) < 1 / 3, 20, cells))}


def mmeb_like() -> list[dict]:
    return [padding(stage, "MMEB-like", text + before, 16) for stage, (text, before) in mmeb_lengths(1024).items()]


def gradcache_chunks(n: int = 8192, batch: int = 128, chunk: int = 8) -> dict:
    """Chunks of a column in the order given and as `CachedInfoNCE` sorts it; half of the items are text alone. `batch`: of one of
    8 devices in the profile `paper`."""
    text, cells = mmeb_lengths(n)["stage1"]
    lengths = (text + np.where(np.random.default_rng(1).random(n) < 0.5, cells, 0)).reshape(-1, batch)
    given, ordered = (
        chunk * rows.reshape(len(rows), -1, chunk).max(axis=2).sum(axis=1) for rows in (lengths, np.sort(lengths))
    )
    before, after = (100 * (1 - lengths.sum() / computed.sum()) for computed in (given, ordered))
    text = f"computed tokens, order given / sorted; chunks of {chunk} of a batch of {batch}, half pictures and text, half text; "
    text += f"padding {before:.1f} % -> {after:.1f} %; counted, not timed"
    return record("padding, GradCache chunks, MMEB-like", text, given, ordered)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "world"
        build(data, seed=0, n_pairs=160, n_queries=2, n_corpus=500)
        records = [importing()] + stages(data) + contrastive(data) + keeping(Path(folder))
    save("input_side", [*records, *mmeb_like(), gradcache_chunks()], "time and shares: n 5; padding is counted")


if __name__ == "__main__":
    main()
