"""Masks in words, as depths, and as an explorer that needs no kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from torch import BoolTensor, LongTensor

from ..attention import EOS, LAYOUTS, PAD, SEGMENT_NAMES, A, B, block_mask, dense_mask
from ..backbone import hidden_states, language_model
from ..inputs import Batch, Inputs
from .figures import COLOURS, LIGHT
from .panel import page


def reachability(mask: BoolTensor, layers: int) -> BoolTensor:
    """Compute what can have flowed where: [q, k] = the state at q may depend on token k.

    mask (..., L, L). A token's own state is carried along, so reach starts as the identity and grows by
    one step of the mask a layer. layers >= 0.
    """
    eye = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device).expand(mask.shape)
    step = (mask | eye).float()
    reach = eye.float()
    for _ in range(layers):
        reach = (step @ reach > 0).float()
    return reach.bool()


def segments(n_a: int, n_b: int, *, pad_left: int = 0, pad_right: int = 0) -> LongTensor:
    """Make segment ids (1, L): `n_a` tokens of A, one EOS, `n_b` tokens of B, padding around them."""
    return torch.tensor([[PAD] * pad_left + [A] * n_a + [EOS] + [B] * n_b + [PAD] * pad_right])


def name_tokens(segment_ids: LongTensor) -> list[str]:
    """Name the tokens of a row (L,): A1, A2, EOS, B1, ...; padding is PAD."""
    names, count = [], Counter()
    for segment in segment_ids.tolist():
        count[segment] += 1
        names.append(SEGMENT_NAMES[segment] + (str(count[segment]) if segment in (A, B) else ""))
    return names


def count_layers(mask: BoolTensor, layers: int) -> np.ndarray:
    """Count after how many layers a query can know a key: (L, L) int, 1 looks at it, 0 never.

    What a token knows of itself without looking does not count.
    """
    depth, others = mask.int().numpy(), ~np.eye(len(mask), dtype=bool)
    for n in range(2, layers + 1):
        depth[reachability(mask, n).numpy() & (depth == 0) & others] = n
    return depth


def panel_after(layout: str, segment_ids: LongTensor, layers: int) -> np.ndarray:
    """Make a panel of `draw_masks`: (L, L) of 0 never, 1 looks at, 2 knows within `layers` layers."""
    depth = count_layers(dense_mask(layout, segment_ids[None])[0, 0], layers)
    return np.minimum(depth, 2)


def name_batch(batch: Batch, inputs: Inputs) -> list[str]:
    """Name the tokens of a batch of one: words, EOS, "picture" for each token of a picture."""
    known = {inputs.eos_id: "EOS", inputs.image_pad_id: "picture"}
    ids = batch["input_ids"][0].tolist()
    return [known.get(i) or inputs.tokenizer.decode([i]).strip(" <|>\n") or "space" for i in ids]


def count_pairs(segment_ids: LongTensor) -> pd.DataFrame:
    """Count the pairs of tokens that each layout allows in a row (1, L): between A and B, and in all."""
    ids, table = segment_ids[0], {}
    for layout in LAYOUTS:
        mask = dense_mask(layout, segment_ids)[0, 0]
        table[layout] = {
            "B looks at A": int(mask[ids == B][:, ids == A].sum()),
            "A looks at B": int(mask[ids == A][:, ids == B].sum()),
            "EOS looks at B": int(mask[ids == EOS][:, ids == B].sum()),
            "share of all pairs": f"{mask.float().mean():.0%}",
        }
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
    text = language_model(model)
    layers = text.layers
    text.layers = layers[:depth]
    try:
        before = hidden_states(model, batch, layout)[0]
        moves = []
        for place in places:
            ids = batch["input_ids"].clone()
            ids[0, place] = token
            after = hidden_states(model, {**batch, "input_ids": ids}, layout)[0]
            moves.append((after - before).abs().amax(-1).numpy())
    finally:
        text.layers = layers
    return np.stack(moves)


def tabulate_moves(
    moves: np.ndarray, segment_ids: LongTensor, places: Sequence[int]
) -> pd.DataFrame:
    """Tabulate the largest move of another token: a row a changed block, a column a block that moves."""
    ids, moves = segment_ids[0].numpy(), moves.copy()
    moves[range(len(places)), places] = 0
    changed = [f"{SEGMENT_NAMES[block]} changes" for block in ids[places]]
    table = pd.DataFrame(moves, index=changed, columns=[SEGMENT_NAMES[block] for block in ids])
    table = table.groupby(level=0).max().T.groupby(level=0).max().T
    blocks = [SEGMENT_NAMES[block] for block in (A, EOS, B)]
    return table.reindex([f"{block} changes" for block in blocks], fill_value=0.0)[blocks]


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
    layout, n, layers = "eos_bridged", 4, 2
    options = "".join(
        f"<option{' selected' * (each == layout)}>{each}</option>" for each in LAYOUTS
    )
    menus = f'<label>layout <select data-name="layout">{options}</select></label> '
    sliders = (("n_a", "tokens of A", n, 10), ("n_b", "tokens of B", n, 10))
    for name, label, value, high in (*sliders, ("layers", "layers", layers, 6)):
        menus += (
            f'<label>{label} <input type="range" data-name="{name}" value="{value}" min="1" max="{high}">'
            f"<output>{value}</output></label> "
        )
    ids = segments(n, n)[0]
    after = count_layers(dense_mask(layout, ids[None])[0, 0], layers)[n + 1, 0]
    first = f"<p>B1 does not look at A1, but knows it through EOS after {after} layers.</p>"
    data = {"rules": tabulate_layouts(), "colours": [LIGHT, COLOURS[0], COLOURS[1]]}
    data |= {"segments": {"A": A, "EOS": EOS, "B": B}}
    return HTML(page("mask", menus, first, data))
