"""The head on masked positions only, against logits at every position: stages 1 and 2, a small model, Qwen2's vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import in_turn, peaks, record, save, small_model

from cocoa_lib.attention import EOS, A, B
from cocoa_lib.corruption import IGNORE
from cocoa_lib.reconstruction import Reconstruction

VOCABULARY = 151_936
STAGES = {"stage 1, 20 % masked": ("bidirectional", 0.2), "stage 2, 70 % masked": ("eos_bridged", 0.7)}


def full_logits(hidden, lm_head, labels):
    """What a causal language model's own loss does: logits everywhere, the positions chosen by the labels."""
    logits = lm_head(hidden[:, :-1]).float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORE)


def setup(stage: str, full: bool, batch: int = 4, length: int = 128) -> Callable[[], float]:
    """The step (forward and backward) of one side, after one small step that allocates gradients."""
    layout, rate = STAGES[stage]
    model, _ = small_model(128)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(std=0.02)  # tied to the input embedding
    module = Reconstruction(model, layout=layout)
    if full:
        module.objective = full_logits
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (batch, length), generator=generator)
    segments = torch.full_like(ids, A)
    if layout == "eos_bridged":
        segments[:, length // 2], segments[:, length // 2 + 1 :] = EOS, B
    hidden = (torch.rand(ids.shape, generator=generator) < rate) & (segments == segments[:, -1:])
    hidden[:, 0] = False
    data = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.zeros_like(ids), "labels": torch.where(hidden, ids, IGNORE)}  # fmt: skip

    def step(rows: int = batch) -> float:
        loss = module(**{name: value[:rows] for name, value in data.items()})["loss"]
        loss.backward()
        return float(loss.detach())

    step(1)
    return step


def main() -> None:
    records = []
    for stage in STAGES:
        sides = {"full": setup(stage, True), "masked": setup(stage, False)}
        losses = {name: side() for name, side in sides.items()}
        assert abs(losses["full"] - losses["masked"]) < 1e-4, losses
        seconds = in_turn(sides, warm=True)
        shape = f"4 x 128 tokens, hidden 128, 2 layers, vocabulary {VOCABULARY}"
        records.append(record(f"logits, time, {stage}", f"step time, full / masked positions; {shape}",
                              seconds["full"], seconds["masked"]))  # fmt: skip
    stage = next(iter(STAGES))  # memory is the same in both: full logits do not depend on what is masked
    bytes_ = peaks(setup, [(stage, True), (stage, False)])
    records.append(record(f"logits, memory, {stage}", f"peak memory of a step, full / masked positions; {shape}",
                          bytes_[stage, True], bytes_[stage, False]))  # fmt: skip
    save("logits", records, "equal losses (1e-4), then time (n 5) and memory (n 5 processes)")


if __name__ == "__main__":
    main()
