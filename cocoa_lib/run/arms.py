"""The arms of the ablation."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes import RecipeError, make_recipe, unknown_name
from .profiles import NOTEBOOKS

KINDS = ("arm", "budget", "sweep")
SHAPE = tuple(
    "hidden_size layers heads vision_dim vision_layers patch_size vocab_size image_pixels seed".split()
)


@dataclass(frozen=True)
class Arm:
    """One row of the ablation: which stages run and what differs from the profile's recipe. None: stage left out.

    kind: "arm" is compared with contrastive learning alone; "budget" has contrastive learning of its own, to be compared with
    contrastive learning alone on the same; "sweep" changes one value of the full method. backbone: what differs from
    the profile's backbone; the graph then trains that one, instead of taking the committed one.
    """

    name: str
    stage1: dict[str, Any] | None
    stage2: dict[str, Any] | None
    stage3: dict[str, Any]
    hypothesis: str
    kind: str = "arm"
    backbone: dict[str, Any] = field(default_factory=dict)

    def key(self, stage: str) -> str:
        """A name shared by arms whose run up to this stage is the same, so that it is trained once."""
        parts = [self.stage1, self.stage2, self.stage3][
            : ("stage1", "stage2", "stage3").index(stage) + 1
        ]
        if stage == "stage3":
            return self.name
        if self.backbone:
            parts = [self.backbone, *parts]
        elif all(part in (None, {}) for part in parts):
            return (
                "base"
                if all(part == {} for part in parts)
                else "skip" + "".join(str(int(part is not None)) for part in parts)
            )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def read_arms(path: Path = NOTEBOOKS / "arms.csv") -> dict[str, Arm]:
    """The table of arms by name; each changed value is checked. Raises RecipeError naming the row and column."""
    arms = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(
            f"{path}: not a table in UTF-8 ({error}); save it as UTF-8 .csv"
        ) from error
    if lost := [
        name for name in ("arm", "stage1", "stage2", "stage3", "hypothesis") if name not in columns
    ]:
        raise RecipeError(
            f"{path}: no column {', '.join(lost)}; found {', '.join(map(str, columns)) or 'none'}"
        )
    for number, row in enumerate(rows, start=2):
        column, stages = "arm", {}
        try:
            if not re.fullmatch(
                r"[A-Za-z0-9_]+", row["arm"] or ""
            ):  # it names folders, and stands in commands
                raise RecipeError(f"a name of letters, digits and _, found {row['arm']!r:.40}")
            if row["arm"] in arms:
                raise RecipeError(f"{row['arm']} stands there twice")
            for column in ("stage1", "stage2", "stage3"):
                stages[column] = None if row[column] == "-" else json.loads(row[column] or "{}")
                make_recipe(column, stages[column])
            column = "backbone"
            backbone = json.loads(row.get("backbone") or "{}")
            if not isinstance(backbone, dict):
                raise RecipeError(f"expected an object, found {backbone!r:.40}")
            if unknown := [name for name in backbone if name not in SHAPE]:
                raise unknown_name(unknown[0], list(SHAPE), "backbone")
            if not all(type(value) is int and value > 0 for value in backbone.values()):
                raise RecipeError(f"expected whole numbers above 0, found {backbone}")
            column = "kind"
            kind = row.get("kind") or "arm"
            if kind not in KINDS:
                raise RecipeError(f"expected {', '.join(KINDS)}, found {kind!r:.40}")
        except (ValueError, KeyError, RecursionError) as error:
            raise RecipeError(f"{path}, line {number}, column {column}: {error}") from error
        arms[row["arm"]] = Arm(
            row["arm"], **stages, hypothesis=row["hypothesis"] or "", kind=kind, backbone=backbone
        )
    return arms
