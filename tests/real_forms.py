"""Small folders in the exact form of a published Qwen2-VL and of MMEB."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from cocoa_lib.data.tables import EVAL, TRAIN

CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs"


def write_model(folder: Path, processor: Path, shape: str = "qwen2_vl_2b") -> Path:
    """Write a narrow Qwen2-VL as published: two bf16 shards with an index, slow tokenizer files, no cocoa.json."""
    config = AutoConfig.from_pretrained(CONFIGS / shape)
    text, vision = config.text_config, config.vision_config
    text.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2})  # fmt: skip
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    vision.update({"depth": 2, "num_heads": 2, "embed_dim": 32, "hidden_size": 64})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="12MB")
    for path in processor.glob("*.*"):
        if path.name not in ("config.json", "SOURCE.md"):
            shutil.copy(path, folder)
    return folder


def write_mmeb(folder: Path, n: int = 24) -> Path:
    """Write a folder as MMEB unpacks: train/, eval/, images/ and nothing else; pictures of one colour each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names, words = [f"{i}.jpg" for i in range(n)], ["red", "green", "blue"]
    for i, name in enumerate(names):
        colour = tuple(255 * (np.arange(3) == i % 3) * rng.uniform(0.5, 1))
        Image.new("RGB", (84 + 28 * (i % 3), 112), tuple(map(int, colour))).save(
            folder / "images" / name
        )
    mark = "<|image_1|>\n"
    pairs = {
        "VOC2007": [
            (f"{mark}What is shown?", name, f"a {words[i % 3]} thing", "", "", "")
            for i, name in enumerate(names)
        ],
        "MSCOCO_t2i": [
            (f"Find a {words[i % 3]} thing.", "", mark, name, "", "")
            for i, name in enumerate(names)
        ],
    }
    for name, rows in pairs.items():
        path = folder / "train" / name / "original-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pd.DataFrame(rows, columns=TRAIN).to_parquet(path)
    rows = [(f"{mark}Hateful?", name, ["No", "Yes"], ["", ""]) for name in names[:6]]
    path = folder / "eval" / "HatefulMemes" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows, columns=EVAL).to_parquet(path)
    return folder
