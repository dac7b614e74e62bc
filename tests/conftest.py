"""Shared fixtures: tiny random models of each family, a tiny benchmark, real data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures and processor files, outside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the real data folder ../shared/data is absent")
    return SHARED


@pytest.fixture(scope="session")
def small():
    """A small random Qwen2-VL and its processor: (model, inputs), causal."""
    from cocoa_lib.world.backbone import new_backbone

    texts = [
        "a large red circle at the top left, a small blue 7 at the bottom",
        "What color is the square?",
    ] * 4
    model, inputs = new_backbone(
        texts, vocab_size=400, image_pixels=4096, seed=0, hidden_size=64, layers=2, heads=2, vision_dim=32,
        vision_layers=1, patch_size=8,
    )  # fmt: skip
    return model.eval(), inputs


@pytest.fixture(scope="session")
def picture():
    """size -> a random RGB picture, the same for the same size."""

    def make(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng([seed, width, height])
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a tiny `world`, a random model `causal`, and the three stages from it (tiny_runs.py)."""
    from tiny_runs import make_home

    return make_home(tmp_path_factory.mktemp("home"))
