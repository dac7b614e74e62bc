"""How well an embedder tells drawings of another designer that it was never trained on.

    python scripts/out_of_style.py data/checkpoints/contrastive FOLDER --out reports/out_of_style.csv

FOLDER holds emoji_pairs.jsonl (file, emoji) and png/72/. The concepts of the built-in benchmark are drawn in both
styles and ranked against all others, name to picture and picture to name. Rows: style, task, role (what training showed
of the concept), n, value (percent right at rank 1), low, high (95 % Wilson interval), floor (pixels and words, nothing
learnt), chance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats

from cocoa_lib.embedder import CocoaEmbedder
from cocoa_lib.evaluate.floor import pixel_bow_embed
from cocoa_lib.world.concepts import Concept, load_concepts
from cocoa_lib.world.pictures import draw, scale
from cocoa_lib.world.scenes import CANVAS, SIDES, center
from cocoa_lib.world.words import with_article

SIDE = SIDES["large"]


def read_drawings(folder: Path) -> dict[str, Image.Image]:
    """Emoji -> another designer's drawing, RGBA, trimmed to its ink."""
    drawings = {}
    for line in (folder / "emoji_pairs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        image = Image.open(folder / "png" / "72" / row["file"]).convert("RGBA")
        drawings[row["emoji"].replace("\ufe0f", "")] = image.crop(image.getchannel("A").getbbox())
    return drawings


def ask(
    concepts: Sequence[Concept], draw_one: Callable[[Concept], np.ndarray]
) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(task, queries, candidates); query i is right with candidate i."""
    drawings = [draw_one(concept) for concept in concepts]
    names = [{"text": concept.name} for concept in concepts]
    phrases = [{"text": f"Find the picture: {with_article(each.name)}"} for each in concepts]
    yield "name to picture", phrases, [{"image": center(one, CANVAS)} for one in drawings]
    question = "What is in the picture?"
    asked = [{"text": question, "image": center(one, CANVAS)} for one in drawings]
    yield "picture to name", asked, names


def score(right: np.ndarray) -> dict[str, float]:
    """Percent right with its 95 % Wilson interval."""
    low, high = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {"n": len(right), "value": 100 * right.mean(), "low": 100 * low, "high": 100 * high}


def compare_styles(embedder: CocoaEmbedder, folder: Path) -> pd.DataFrame:
    """Rank in both styles the concepts that the other designer has drawn, too."""
    others = read_drawings(folder)
    concepts = [c for c in load_concepts().values() if c.emoji.replace("\ufe0f", "") in others]
    styles = {
        "OpenMoji": lambda concept: draw(concept.emoji, SIDE),
        "another": lambda concept: scale(others[concept.emoji.replace("\ufe0f", "")], SIDE),
    }
    roles, rows = np.array([concept.role for concept in concepts]), []
    for style, draw_one in styles.items():
        for task, queries, candidates in ask(concepts, draw_one):
            right, floor = (
                (encode(queries) @ encode(candidates).T).argmax(1) == np.arange(len(concepts))
                for encode in (embedder.encode, pixel_bow_embed)
            )
            for role in dict.fromkeys(roles):
                found = score(right[roles == role]) | {"floor": 100 * floor[roles == role].mean()}
                rows.append({"style": style, "task": task, "role": role} | found)
    return pd.DataFrame(rows).assign(chance=100 / len(concepts)).round(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Score an embedder on another designer's drawings."
    )
    parser.add_argument("embedder", type=Path, help="checkpoint folder")
    parser.add_argument("folder", type=Path, help="folder with emoji_pairs.jsonl and png/72")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args(argv)
    table = compare_styles(CocoaEmbedder.load(args.embedder), args.folder)
    table.to_csv(args.out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
