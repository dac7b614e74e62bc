"""Model folders in the form Qwen-VL is published in, with reduced widths, and a data folder like MMEB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from cocoa_lib.data.tables import EVAL, TRAIN, write_tables
from cocoa_lib.world.backbone import train_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WORDS = "apple pear melon leek onion milk juice yoghurt kiwi plum lime mango".split()
TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id":
          "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
SPACE = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
VISION = {
    "qwen2_vl": {**SPACE, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    "qwen2_5_vl": {**SPACE, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                   "window_size": 112, "fullatt_block_indexes": [1], "patch_size": 14},
    "qwen3_vl": {**SPACE, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                 "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "patch_size": 16},
}  # fmt: skip


def write_processor(folder: Path, shared: Path, patch_size: int) -> dict[str, int]:
    """Write slow tokenizer files and preprocessor_config.json; returns token -> id."""
    real = shared / "qwen2vl_processor"
    if real.is_dir():
        for name in "vocab.json merges.txt tokenizer_config.json preprocessor_config.json".split():
            shutil.copyfile(real / name, folder / name)
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        ids = {entry["content"]: int(i) for i, entry in added.items()}
    else:
        tokenizer = train_tokenizer([f"a photo of {word}" for word in WORDS] * 4, 400)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        model["vocab"]["<|vision_pad|>"] = model["vocab"].pop(
            "<|mask|>"
        )  # Qwen's has no mask token
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        ids = {token: i for token, i in model["vocab"].items() if token.startswith("<|")}
        decoder = {str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False,
                            "normalized": False, "single_word": False} for token, i in ids.items()}  # fmt: skip
        settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token":
                    "<|endoftext|>", "added_tokens_decoder": decoder}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = folder / "preprocessor_config.json"
    kind = {"image_processor_type": "Qwen2VLImageProcessor"}
    values = json.loads(path.read_text()) if path.is_file() else kind
    values |= {"patch_size": patch_size, "min_pixels": 784, "max_pixels": 12544, "merge_size": 2}
    path.write_text(json.dumps(values))
    return ids


def write_model(folder: Path, family: str, shared: Path) -> Path:
    """Write a random model: published keys, two bf16 shards with an index, tied head, no cocoa.json."""
    folder.mkdir(parents=True)
    vision = VISION[family]
    ids = write_processor(folder, shared, vision["patch_size"])
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 4096, "vocab_size": max(*ids.values(), len(words)) + 200,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    rope = {"mrope_section": [4, 6, 6], "type": "mrope"}
    tokens = {name: ids[token] for name, token in TOKENS.items()}
    config = {"model_type": family, "vision_config": vision, "tie_word_embeddings": True, **tokens}
    if family == "qwen3_vl":
        scaling = {"mrope_section": [4, 6, 6], "mrope_interleaved": True, "rope_type": "default"}
        own = {"model_type": "qwen3_vl_text", "head_dim": 32, "rope_theta": 1e6}
        config |= {"text_config": text | own | {"rope_scaling": scaling}}
    else:
        config |= {**text, "rope_scaling": rope, "rope_theta": 1e6}
    config |= {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    weights = {}
    for key, value in model.state_dict().items():
        if family != "qwen3_vl":  # the older two are published with shorter names
            key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if not key.startswith("lm_head"):
            weights[key] = value.to(torch.bfloat16).clone()
    names = sorted(weights)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_pictures(images: Path, n: int) -> list[tuple[str, str]]:
    """Write pictures of three shapes: (file, class)."""
    images.mkdir(parents=True)
    for i in range(n):
        shape = (300, 200 + 20 * (i % 3), 3)
        pixels = np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.jpg")
    return [(f"{i}.jpg", WORDS[i % len(WORDS)]) for i in range(n)]


def write_data(folder: Path, *, many: bool = False) -> Path:
    """Write rows in MMEB's columns: two training subsets, two tasks; `many` adds one of 1,000 candidates."""
    pictures = write_pictures(folder / "images", 24)
    classes = sorted({name for _, name in pictures})
    ask, show = "Represent the given image for classification", "Find me a photo: a photo of"
    train = {
        "VOC2007": [(f"<|image_1|>\n{ask}", file, name, "", "", "") for file, name in pictures],
        "MSCOCO_t2i": [
            (f"{show} {name}", "", "<|image_1|>", file, "", "") for file, name in pictures
        ],
    }
    tables = {
        f"train/{name}/original-00000-of-00001": pd.DataFrame(rows, columns=TRAIN)
        for name, rows in train.items()
    }
    eval_rows = {"VOC2007": (20, classes), "Country211": (211, classes)}
    eval_rows |= {"MSCOCO_i2t": (1000, classes)} if many else {}
    for task, (n, names) in eval_rows.items():
        rows, more = [], [f"{task} item {i}" for i in range(n)]
        for file, name in pictures[:8]:
            others = [each for each in names if each != name] + more
            rows.append((f"<|image_1|>\n{ask}", file, [name, *others[: n - 1]], [""] * n))
        tables[f"eval/{task}/test-00000-of-00001"] = pd.DataFrame(rows, columns=EVAL)
    write_tables(folder, tables)
    return folder
