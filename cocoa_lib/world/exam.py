"""What a causal backbone answers about held-out scenes, beside the commonest answer, by kind.

python -m cocoa_lib.world.exam data/backbone --out exam.csv
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ..backbone import open_backbone
from ..store.checkpoint import load_inputs, read_meta
from ..store.files import write_whole
from .backbone import answer as decode
from .lessons import known_concepts
from .questions import answer, list_questions
from .scenes import render, sample_scene

# The first pattern that a question matches names its kind.
KINDS = {
    "name of a single drawing": r"What is in the picture\?",
    "kind of a single drawing": r"What kind of thing is in the picture\?",
    "kind of one of several": r"What kind of thing .*",
    "what is left, right, above, below": r"What is (left of|right of|above|below) .*",
    "what is where": r"What is .*",
    "where is what": r"Where .*",
    "small or large": r"(Is|Are) the .*",
    "how many": r"How many .*",
}


def find_kind(question: str) -> str:
    """The kind of a question."""
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, question))


def set_questions(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n questions of each kind on scenes of the development split: {kind, image, text, truth}."""
    rng, left, asked = np.random.default_rng([seed, 4]), dict.fromkeys(KINDS, n), []
    while any(left.values()):
        scene = sample_scene(rng, "dev", known_concepts())
        texts = [text for text in list_questions(scene) if left[find_kind(text)]]
        for text in [texts[i] for i in rng.permutation(len(texts))[:2]]:
            if left[find_kind(text)]:
                left[find_kind(text)] -= 1
                image, truth = Image.fromarray(render(scene)), min(answer(text, scene))
                asked.append(
                    {"kind": find_kind(text), "image": image, "text": text, "truth": truth}
                )
    return asked


def examine(folder: Path, n: int = 200) -> pd.DataFrame:
    """Rows of kind, n, right (percent), constant (percent right with the commonest answer)."""
    asked = pd.DataFrame(set_questions(n))
    model, inputs = (
        open_backbone(folder, bidirectional=False),
        load_inputs(folder, read_meta(folder)),
    )
    asked["given"] = decode(model, inputs, asked[["image", "text"]].to_dict("records"))
    rows = []
    for kind, part in asked.groupby("kind", sort=False):
        right = 100 * (part["given"] == part["truth"]).mean()
        constant = 100 * part["truth"].value_counts(normalize=True).max()
        rows.append({"kind": kind, "n": len(part), "right": right, "constant": constant})
    return pd.DataFrame(rows).round(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a causal backbone about held-out scenes.")
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    args = parser.parse_args(argv)
    table = examine(args.folder, args.questions)
    write_whole(args.out, lambda aside: table.to_csv(aside, index=False))
    print(table.to_string(index=False))  # noqa: T201


if __name__ == "__main__":
    main()
