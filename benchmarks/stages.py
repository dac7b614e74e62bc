"""How long a step of each stage takes, in turn, and how many contrastive steps take as long as all three stages; what gradient
checkpointing costs and saves in stage 1. With `--compiled`: whether compiled layers (`torch_compile`) pay on a CPU.

The batches, recipes and number of steps are profile `long`'s, the model is the committed backbone. A step is forward,
backward and AdamW; making the batch is left out (`input_side.py`: a twentieth of it).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import BACKBONE, in_turn, peaks, record, save, truly_compiled
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch._inductor.utils import fresh_cache
from torch.utils.data import ConcatDataset

from cocoa_lib.backbone import open_backbone
from cocoa_lib.contrastive import CachedInfoNCE, pair_features
from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.data import corpus
from cocoa_lib.embedder import EosEmbedding
from cocoa_lib.inputs import Inputs
from cocoa_lib.kernels import compile_layers
from cocoa_lib.recipes import Stage3Recipe, make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.plan import Planned, index_plan
from cocoa_lib.run.profiles import load_profile
from cocoa_lib.world.build import build

PROFILE = "long"
FEW = 16  # rows, where only with and without checkpointing are compared


def stepper(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5)

    def step() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        return float(value.detach())

    return step


def reconstruction(
    stage: str, data: Path, inputs: Inputs, *, saving: bool = False, compiled: bool = False, **changes: float
) -> Callable[[], float]:
    """`saving`: with gradient checkpointing; `compiled`: by `compile_layers`."""
    recipe = make_recipe(stage, load_profile(PROFILE)[stage] | changes)
    parts = [corpus.captions(data)] + (list(corpus.text_pairs(data).values()) if stage == "stage2" else [])
    rows = Planned(ConcatDataset(parts), index_plan([len(part) for part in parts], recipe.batch_size, seed=0))
    collate = {"stage1": stage1_batch, "stage2": stage2_batch}[stage]
    batch = collate([rows[i] for i in range(recipe.batch_size)], inputs, recipe, 0)
    module = Reconstruction(
        open_backbone(BACKBONE, bidirectional=True), layout=recipe.layout, image_weight=recipe.image_weight
    )
    if saving:
        module.model.gradient_checkpointing_enable()
    if compiled:
        compile_layers(module.model)
    return stepper(module.train(), lambda: module(**batch)["loss"])


def setup(saving: bool, data: Path) -> Callable[[], float]:
    """A step of stage 1 on `FEW` rows, after one that allocates what the optimiser keeps."""
    torch.manual_seed(0)  # of the decoder for patches
    step = reconstruction("stage1", data, Inputs.load(BACKBONE, max_length=256), saving=saving, batch_size=FEW)
    step()
    return step


def checkpointing(data: Path) -> list[dict]:
    """What gradient checkpointing costs and saves: activations computed a second time, not kept."""
    sides = {"with": setup(True, data), "without": setup(False, data)}
    losses = {name: step() for name, step in sides.items()}  # the second ones: after equal gradients
    assert abs(losses["with"] - losses["without"]) < 1e-4, losses
    seconds, memory = in_turn(sides, warm=True), peaks(setup, [(saving, data) for saving in (True, False)])
    shape = f"a step of stage 1, batch of {FEW}, committed backbone"
    return [
        record("gradient checkpointing, time", f"time, with / without; {shape}", seconds["with"], seconds["without"]),
        record("gradient checkpointing, memory", f"peak memory, without / with; {shape}",
               memory[False, data], memory[True, data]),
    ]  # fmt: skip


def contrastive_loss(inputs: Inputs, recipe: Stage3Recipe) -> tuple[EosEmbedding, Callable[[dict], torch.Tensor]]:
    """The committed backbone, and its loss of a batch as the collator makes it."""
    module = EosEmbedding(open_backbone(BACKBONE, bidirectional=True), inputs).train()
    loss = CachedInfoNCE(module, temperature=recipe.temperature, mini_batch_size=recipe.mini_batch_size)

    def of(batch: dict) -> torch.Tensor:
        return loss(
            {name.removeprefix(side): value for name, value in batch.items() if name.startswith(side)}
            for side in ("anchor_", "positive_")
        )

    return module, of


def contrastive(data: Path, inputs: Inputs, compiled: bool = False) -> Callable[[], float]:
    recipe = make_recipe("stage3", load_profile(PROFILE)["stage3"])
    rows, sizes = corpus.pairs(data)
    plan = index_plan(sizes, recipe.batch_size, seed=0, block=recipe.same_task_block)
    features = partial(pair_features, inputs=inputs, mini_batch_size=recipe.mini_batch_size)
    batch = SentenceTransformerDataCollator(features)([rows[int(i)] for i in plan])
    module, loss = contrastive_loss(inputs, recipe)
    if compiled:
        compile_layers(module.model)
    return stepper(module, lambda: loss(batch))


@truly_compiled()
def compiled_layers(data: Path, inputs: Inputs) -> list[dict]:
    """A step of each stage, plain against compiled, once their losses are equal; and what the first compiled step takes, where
    nothing is compiled yet."""
    records = []
    for stage in ("stage1", "stage2", "stage3"):
        make = contrastive if stage == "stage3" else partial(reconstruction, stage)
        sides = {}
        for name in ("plain", "compiled"):
            torch.manual_seed(0)  # of the decoder for patches
            sides[name] = make(data, inputs, compiled=name == "compiled")
        losses = {name: [step() for _ in range(2)] for name, step in sides.items()}  # the second: after equal gradients
        assert np.allclose(*losses.values(), rtol=1e-4), losses
        seconds = in_turn(sides, warm=True)
        text = f"time of a step, plain / compiled layers; batches of profile {PROFILE}"
        records.append(record(f"compiled layers, {stage}", text, seconds["plain"], seconds["compiled"]))
    return [*records, first_compiled(data, inputs)]


def first_compiled(data: Path, inputs: Inputs, n: int = 5) -> dict:
    first, plain = [], []
    for _ in range(n):
        torch._dynamo.reset()
        sides = [contrastive(data, inputs, compiled) for compiled in (False, True)]
        sides[0]()
        with fresh_cache():
            for found, step in zip((plain, first), sides, strict=True):
                start = time.perf_counter()
                step()
                found.append(time.perf_counter() - start)
    text = "time of the first step with compiled layers, nothing compiled before / of the second plain step; stage 3"
    return record("compiled layers, first step", text, first, plain)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How long a step of each stage takes.")
    parser.add_argument("--compiled", action="store_true", help="plain against compiled layers, and nothing else")
    only_compiled = parser.parse_args(argv).compiled
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "world"
        build(data, seed=0, n_pairs=800, n_queries=2, n_corpus=500)
        inputs = Inputs.load(BACKBONE, max_length=256)
        if only_compiled:
            return save(
                "stages_compiled", compiled_layers(data, inputs), "equal losses, then time (n 5); a CPU's compiler"
            )
        sides = {stage: partial(reconstruction, stage)(data, inputs) for stage in ("stage1", "stage2")}
        picture = {
            "stage2 with the picture": reconstruction("stage2", data, inputs, image_weight=0.5)
        }  # arm image_from_eos
        seconds = in_turn(sides | picture | {"stage3": contrastive(data, inputs)})
        price = checkpointing(data)
    steps = {stage: load_profile(PROFILE)[stage]["steps"] for stage in ("stage1", "stage2", "stage3")}
    text = f"time of a step, batches of profile {PROFILE}"
    records = [
        record(f"step, {stage} / stage 3", text, seconds[stage], seconds["stage3"]) for stage in [*sides, *picture]
    ]
    whole = np.sum([steps[stage] * np.array(seconds[stage]) for stage in steps], axis=0)
    text = "time of " + ", ".join(f"{n} steps of {stage}" for stage, n in steps.items()) + " / of one step of stage 3"
    records.append(record("contrastive steps that take as long as CoCoA", text, whole, seconds["stage3"]))
    save(
        "stages",
        price + records,
        f"committed backbone, recipes of profile {PROFILE}; time (n 5) and memory (n 5 processes)",
    )


if __name__ == "__main__":
    main()
