"""Several samples in a row against one a row: a step of stages 1 and 2, on a mixture like MMEB's and on laptop's data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import BACKBONE, in_turn, record, save, small_model
from input_side import BATCHES, mmeb_lengths

from cocoa_lib.attention import EOS, PAD, A, B
from cocoa_lib.backbone import open_backbone, position_ids
from cocoa_lib.corruption import IGNORE
from cocoa_lib.data import corpus
from cocoa_lib.inputs import Batch, Inputs
from cocoa_lib.packing import pack
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.profiles import load_profile
from cocoa_lib.world.build import build

STAGES = {"stage1": ("bidirectional", 0.2), "stage2": ("eos_bridged", 0.7)}


def mmeb_like(stage: str, n: int = 16) -> Batch:
    """`n` rows of `mmeb_lengths`. The cells are words here: what is measured is the language model, the vision tower has no
    padding to save."""
    layout, rate = STAGES[stage]
    text, before = mmeb_lengths(n)[stage]
    segment_ids = torch.full((n, int((before + text).max()) + 1), PAD)
    for row, a, b in zip(segment_ids, before, text, strict=True):
        if layout == "eos_bridged":
            row[:a], row[a], row[a + 1 : a + 1 + b] = A, EOS, B
        else:
            row[: a + b] = A
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 300, segment_ids.shape, generator=random)
    hidden = (torch.rand(ids.shape, generator=random) < rate) & (segment_ids == segment_ids.amax())
    hidden[:, 0] = False
    return {"input_ids": ids, "segment_ids": segment_ids, "attention_mask": (segment_ids != PAD).long(),
            "mm_token_type_ids": torch.zeros_like(ids), "labels": torch.where(hidden, ids, IGNORE)}  # fmt: skip


def laptop(stage: str, data: Path, inputs: Inputs) -> Batch:
    recipe = make_recipe(stage, load_profile("laptop")[stage])
    rows = [*corpus.captions(data), *(row for part in corpus.text_pairs(data).values() for row in part)]
    order = np.random.default_rng(0).permutation(len(rows))
    mine = [i for i in order if stage == "stage2" or not rows[i]["text"]][: recipe.batch_size]
    return BATCHES[stage]([{**rows[i], "draw": k} for k, i in enumerate(mine)], inputs, recipe, 0)


def share(batch: Batch) -> float:
    """Percent of the computed tokens that are padding."""
    return 100 * (1 - float(batch["attention_mask"].float().mean()))


def compare(name: str, shape: str, module: Reconstruction, batch: Batch) -> dict:
    def step(packing: bool) -> Callable[[], float]:
        def run() -> float:
            module.packing = packing
            module.zero_grad()
            loss = module(**batch)["loss"]
            loss.backward()
            return float(loss.detach())

        return run

    sides = {"padded": step(False), "packed": step(True)}
    losses = {side: run() for side, run in sides.items()}
    assert abs(losses["padded"] - losses["packed"]) < 1e-4 * losses["padded"], losses
    seconds, packed = in_turn(sides, warm=True), pack(batch, position_ids(module.model, batch))
    shares = {"padding_padded": share(batch), "padding_packed": share(packed)}
    rows = f"{len(batch['input_ids'])} rows in {len(packed['input_ids'])}"
    text = f"step time, padded / packed; {shape}; {rows}, padding {{padding_padded:.0f}} % -> {{padding_packed:.0f}} %"
    return record(f"packing, {name}", text.format(**shares), seconds["padded"], seconds["packed"], **shares)


def main() -> None:
    torch.set_num_threads(1)
    records = []
    for stage, (layout, _) in STAGES.items():
        module = Reconstruction(small_model(layers=1)[0], layout=layout).train()
        shape = "20 words, 600 cells, hidden 256, 1 layer"
        records.append(compare(f"{stage}, MMEB-like", shape, module, mmeb_like(stage)))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "world"
        build(data, seed=0, n_pairs=160, n_queries=2, n_corpus=500)
        inputs = Inputs.load(BACKBONE, max_length=256)
        recipe = make_recipe("stage2", load_profile("laptop")["stage2"])
        module = Reconstruction(open_backbone(BACKBONE, bidirectional=True), layout=recipe.layout).train()
        shape = "committed backbone, pictures and all"
        records.append(compare("stage2, laptop", shape, module, laptop("stage2", data, inputs)))
    save("packing", records, "equal losses (1e-4), then time (n 5); padding is counted")


if __name__ == "__main__":
    main()
