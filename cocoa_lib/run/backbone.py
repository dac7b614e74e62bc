"""The small causal backbone: next-token prediction on the corpus of the built-in world."""

from __future__ import annotations

import shutil
from pathlib import Path
from pydoc_data.topics import topics

from ..data import corpus
from ..data.tables import fingerprint
from ..recipes import CausalRecipe
from ..store.checkpoint import META, read_meta, save_checkpoint
from ..world.backbone import new_backbone
from .stage import run_stage


def train_backbone(
    data: Path, out: Path, shape: dict[str, int], recipe: CausalRecipe, *, seed: int
) -> Path:
    """Train a backbone of this shape on the corpus of `data`; return `out`.

    The tokenizer is learnt from the corpus and from English prose (Python's own reference
    manual, part of every installation), so that a user's texts are not spelt letter by letter. A
    finished `out` is returned as it is. Raises what `run_stage` raises.
    """
    init = out.parent / f"{out.name}-init"
    asked = {
        "shape": shape,
        "seed": seed,
        "data": fingerprint(data),
    }  # its tokenizer is learnt from them
    found = read_meta(init, check=False) if (init / META).is_file() else asked
    if {name: found.get(name) for name in asked} != asked:
        shutil.rmtree(
            init
        )  # of an earlier call; a run that began from it is refused, by its parent's hash
    if not (init / META).is_file():
        rows = [*corpus.captions(data), *corpus.questions(data)]
        texts = [row[name] for name in ("text", "target") for row in rows[::7]]
        model, inputs = new_backbone([*texts, *topics.values()], seed=seed, **shape)
        save_checkpoint(init, model, inputs, {"stage": "init", **asked})
    return run_stage("causal", recipe, parent=init, data=data, out=out, seed=seed)
