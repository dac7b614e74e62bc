"""Masks in words, as depths, and as an explorer that needs no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from scipy.sparse.csgraph import shortest_path
from torch import BoolTensor, LongTensor, Tensor

from ..attention import EOS, LAYOUTS, PAD, SEGMENT_NAMES, A, B, block_mask, dense_mask
from ..backbone import hidden_states, language_model
from ..inputs import Batch, Inputs
from .figures import COLOURS, LIGHT
from .panel import page


def reachability(mask: BoolTensor, layers: int) -> BoolTensor:
    """Compute what can have flowed where: [q, k] = the state at q may depend on token k.

    mask (L, L). A token's own state is carried along, so reach starts as the identity and grows by
    one step of the mask a layer. layers >= 0.
    """
    return torch.from_numpy(shortest_path(mask.numpy(), unweighted=True) <= layers)


def segments(n_a: int, n_b: int, *, pad_left: int = 0, pad_right: int = 0) -> LongTensor:
    """Make segment ids (1, L): `n_a` tokens of A, one EOS, `n_b` tokens of B, padding around them."""
    return torch.tensor([[PAD] * pad_left + [A] * n_a + [EOS] + [B] * n_b + [PAD] * pad_right])


def name_tokens(segment_ids: LongTensor) -> list[str]:
    """Name the tokens of a row (L,) without padding: A1, A2, EOS, B1, ..."""
    n_a, n_b = (int((segment_ids == block).sum()) for block in (A, B))
    return [*(f"A{i + 1}" for i in range(n_a)), "EOS", *(f"B{i + 1}" for i in range(n_b))]


def count_layers(mask: BoolTensor, layers: int) -> np.ndarray:
    """Count after how many layers a query can know a key: (L, L) int, 1 looks at it, 0 never.

    What a token knows of itself without looking does not count.
    """
    steps = shortest_path(mask.numpy(), unweighted=True)
    return np.where(mask, 1, np.where(steps <= layers, steps, 0)).astype(int)


def panel_after(layout: str, segment_ids: LongTensor, layers: int) -> np.ndarray:
    """Make a panel of `draw_masks`: (L, L) of 0 never, 1 looks at, 2 knows within `layers` layers."""
    depth = count_layers(dense_mask(layout, segment_ids[None])[0, 0], layers)
    return np.minimum(depth, 2)


def name_batch(batch: Batch, inputs: Inputs) -> list[str]:
    """Name for `draw_masks`, of a long batch of one, EOS and the picture alone, this at its middle."""
    pictures = (batch["input_ids"][0] == inputs.image_pad_id).nonzero()
    names = {int(pictures.median()): f"picture x {len(pictures)}"}
    names[int((batch["segment_ids"][0] == EOS).nonzero())] = "EOS"
    return [names.get(i, "") for i in range(batch["input_ids"].shape[1])]


def count_pairs(segment_ids: LongTensor) -> pd.DataFrame:
    """Count the pairs of tokens that each layout allows in a row (1, L): between A and B, and in all."""
    ids, table = segment_ids[0], {}
    pairs = {"B looks at A": (B, A), "A looks at B": (A, B), "EOS looks at B": (EOS, B)}
    for layout in LAYOUTS:
        mask = dense_mask(layout, segment_ids)[0, 0]
        counts = {name: int(mask[ids == q][:, ids == k].sum()) for name, (q, k) in pairs.items()}
        table[layout] = {**counts, "share of all pairs": f"{mask.float().mean():.0%}"}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("layout")


def choose_places(batch: Batch, inputs: Inputs) -> list[int]:
    """Choose tokens to change in a batch of one: up to 4 words of A and of B, and EOS."""
    ids, segment = batch["input_ids"][0], batch["segment_ids"][0]
    vision = torch.tensor([inputs.vision_start_id, inputs.image_pad_id, inputs.vision_end_id])
    words = ~torch.isin(ids, vision)
    parts = [((segment == block) & words).nonzero().flatten().tolist() for block in (A, EOS, B)]
    return [place for part in parts for place in part[-4:]]


@torch.no_grad()
def measure_moves(
    model, batch: Batch, layout: str, depth: int, places: Sequence[int], token: int
) -> np.ndarray:
    """Change one token and measure how far each state moves after `depth` layers: (places, L).

    batch: of one; token: the id that the token at each of `places` becomes, one place at a time.
    """

    def run(ids: LongTensor) -> Tensor:
        return hidden_states(model, {**batch, "input_ids": ids}, layout)[0]

    text, ids = language_model(model), batch["input_ids"]
    layers = text.layers
    text.layers = layers[:depth]
    try:
        before = run(ids)
        moves = [run(ids.index_fill(1, torch.tensor(at), token)) - before for at in places]
    finally:
        text.layers = layers
    return torch.stack(moves).abs().amax(-1).numpy()


def tabulate_moves(
    moves: np.ndarray, segment_ids: LongTensor, places: Sequence[int]
) -> pd.DataFrame:
    """Tabulate the largest move of another token: a row a changed block, a column a block that moves."""
    names, moves = np.array(SEGMENT_NAMES)[segment_ids[0]], moves.copy()
    moves[range(len(places)), places] = 0
    table = pd.DataFrame(moves, index=names[places], columns=names)
    table = table.groupby(level=0).max().T.groupby(level=0).max().T
    table = table.reindex(["A", "EOS", "B"], fill_value=0.0)[["A", "EOS", "B"]]
    return table.rename(index=lambda name: f"{name} changes")


def count_blocks(lengths: Sequence[int], parts: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Count the share of 128 x 128 blocks that FlexAttention computes, in percent.

    parts: ratios A : B. Columns label, x (length), value, as `draw_curves` takes them.
    """
    rows = []
    for (a, b), length, layout in product(parts, lengths, ("causal", "eos_bridged")):
        n_b = round((length - 1) * b / (a + b))
        skipped = float(block_mask(layout, segments(length - 1 - n_b, n_b)).sparsity())
        rows.append((f"{layout}, A : B = {a} : {b}", length, 100 - skipped))
    return pd.DataFrame(rows, columns=["label", "x", "value"])


def tabulate_layouts() -> dict[str, dict[str, bool]]:
    """Tabulate every layout: "query segment, key segment, order" -> may look.

    A layout depends on the two segments and on the order of the two positions alone (-1: the key stands
    before, 0: the same token, 1: behind), so this table is all that a page needs.
    """
    kinds = list(product((A, EOS, B), (A, EOS, B), (-1, 0, 1)))
    query, key, order = torch.tensor(kinds).T
    names = ["".join(map(str, kind)) for kind in kinds]
    return {
        layout: dict(zip(names, rule(query, key, torch.ones(27), 1 + order).tolist(), strict=True))
        for layout, rule in LAYOUTS.items()
    }


def explore_masks() -> HTML:
    """Make the mask explorer: layout, sizes, depth; the grids, the cost, and any cell in words.

    It runs in the page, in Jupyter and without a kernel: the mask comes from `tabulate_layouts`.
    """
    options = "".join(
        f"<option{' selected' * (layout == 'eos_bridged')}>{layout}</option>" for layout in LAYOUTS
    )
    menus = f'<label>layout <select data-name="layout">{options}</select></label> '
    sliders = {
        "n_a": ("tokens of A", 4, 10),
        "n_b": ("tokens of B", 4, 10),
        "layers": ("layers", 2, 6),
    }
    for name, (label, value, high) in sliders.items():
        menus += (
            f'<label>{label} <input type="range" data-name="{name}" value="{value}" min="1" max="{high}">'
            f"<output>{value}</output></label> "
        )
    data = {"rules": tabulate_layouts(), "colours": [LIGHT, COLOURS[0], COLOURS[1]]}
    data |= {"segments": {"A": A, "EOS": EOS, "B": B}}
    return HTML(page("mask", menus, "<p>A script draws the grids here.</p>", data))
