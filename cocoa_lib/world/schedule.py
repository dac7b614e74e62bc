"""Sizes of the small backbone, and the phases of its training."""

from __future__ import annotations

from dataclasses import dataclass

from .scenes import CANVAS

PATCH = 10  # pixels


@dataclass(frozen=True)
class Phase:
    """`head`: weight of the cells' loss; `words`: of the language model's.

    learning_rate: of Muon, AdamW's is half of it; tower: share of both for the tower, 0 leaves it
    as it is, which also spares its backward pass; fresh: the optimizers begin anew, so that the
    phase does the same to a model that was saved and opened again.
    """

    name: str
    steps: int
    batch_size: int
    head: float
    words: float
    learning_rate: float = 0.004
    tower: float = 1.0
    fresh: bool = False


@dataclass(frozen=True)
class Schedule:
    """Sizes of the model and the phases of its training."""

    hidden_size: int = 160
    layers: int = 4
    heads: int = 4
    vision_dim: int = 128
    vision_layers: int = 4
    vocab_size: int = 2560
    max_length: int = 256
    texts: int = 20_000  # scenes that the tokenizer is learnt from
    frozen: bool = False  # whether the language model stays as it is
    warmup: int = 50
    decay: float = 0.4  # share of a phase over which its rate falls to zero
    measure_every: int = 100
    save_every: int = 50
    phases: tuple[Phase, ...] = (
        Phase("crops", 700, 128, head=1, words=0),
        Phase("scenes", 700, 64, head=1, words=0),
        Phase("names", 400, 96, head=0.3, words=1, tower=0.1),
        Phase("talk", 1000, 64, head=0, words=1, tower=0),
        Phase("together", 200, 64, head=0.3, words=1, learning_rate=0.001, tower=0.1),
        Phase("reading", 400, 96, head=0, words=1, learning_rate=0.002, tower=0, fresh=True),
    )

    @property
    def shape(self) -> dict[str, int]:
        names = (
            "hidden_size",
            "layers",
            "heads",
            "vision_dim",
            "vision_layers",
            "vocab_size",
            "max_length",
        )
        return {name: getattr(self, name) for name in names} | {
            "patch_size": PATCH,
            "image_pixels": CANVAS**2,
        }
