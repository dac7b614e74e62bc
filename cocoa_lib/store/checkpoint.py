"""A checkpoint: a standard Hugging Face folder plus `cocoa.json`, whole or not there at all.

`cocoa.json` names stage, layout, EOS token, pooling, recipe, seed, parent (path and hash) and the
hashes of the weights and of the other files that are read back. A folder is written aside and
renamed, so a half-written one is never taken for a whole one; files are compared with their hashes
when a folder is opened.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from ..inputs import Inputs
from ..reconstruction import DECODER
from .files import file_hash, files_hash, read_json, sync, write_json, write_whole

META = "cocoa.json"
CARD = "README.md"
REQUIRED = ("eos_token", "max_length", "weights_sha256")  # read back by every stage
PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "numpy")


class CheckpointError(RuntimeError):
    """A checkpoint folder that is missing, incomplete, altered or of the wrong stage."""


def weights_hash(folder: Path) -> str:
    """Hash a folder's safetensors files, in name order, by sha256.

    Raises CheckpointError if there are none.
    """
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise CheckpointError(f"{folder}: no .safetensors file; missing or incomplete")
    return files_hash(files)


def read_note(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint. Raises CheckpointError if it is damaged."""
    return read_json(path, CheckpointError, "the checkpoint is damaged, train it again")


def provenance() -> dict[str, Any]:
    """Say where a result comes from: commit, versions, python, machine.

    With the kind of CPU: the same seed gives other numbers on another, where sums are made in
    another order.
    """
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    commit = _run_git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes")
    known = _run_git("ls-files", Path(__file__).name)  # or this package lies in another repository
    return {
        "commit": commit if known else "unknown",
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {cpu}{gpu}",
    }


def _run_git(*arguments: str) -> str:
    """Run git in this folder; "" where there is no git or no repository."""
    command, here = ["git", *arguments], Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return ""
    return done.stdout.strip()


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    inputs: Inputs,
    meta: dict[str, Any],
    extra: dict[str, str] | None = None,
    decoder: nn.Module | None = None,
) -> Path:
    """Write model, tokenizer, image processor, `cocoa.json` and extra texts aside; rename to `folder`.

    `decoder`: stage 1's image decoder, kept so that reconstructions can be looked at; no later
    stage needs it. Raises CheckpointError if `folder` already holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: holds files, and nothing is overwritten; choose another")
    aside = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    inputs.save(aside)
    if decoder is not None:
        save_model(decoder, str(aside / DECODER))
    for name, text in (extra or {}).items():
        (aside / name).write_text(text, encoding="utf-8")
    meta = {
        **meta,
        "eos_token": inputs.eos_token,
        "max_length": inputs.max_length,
        "weights_sha256": weights_hash(aside),
        "files_sha256": {path.name: file_hash(path) for path in sorted(aside.glob("*.json"))},
        **provenance(),
    }
    write_json(aside / META, meta)
    if meta.get("stage") == "stage3":
        (aside / CARD).write_text(model_card(meta), encoding="utf-8")
    for path in (*aside.iterdir(), aside):
        sync(path)
    os.replace(aside, folder)
    sync(folder.parent)
    return folder


def model_card(meta: dict[str, Any], scores: str = "") -> str:
    """Write an embedder's README.md from its `cocoa.json`: how to open it, how it was made, scores."""
    facts = {**meta, **meta.get("run", {}), "run": None, "files_sha256": None}
    for name, value in facts.items():
        if isinstance(value, dict):
            facts[name] = ", ".join(f"{key} {each}" for key, each in value.items())
    made = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
---
# CoCoA embedder

One vector of length 1 for any mix of picture and text. With the package `cocoa-notebooks` installed:

```python
from cocoa_lib.embedder import CocoaEmbedder, sentence_transformer

vectors = CocoaEmbedder.load(FOLDER).encode([{{"text": "a cat", "image": None}}, {{"text": "", "image": "cat.png"}}])
model = sentence_transformer(FOLDER)  # the same as SentenceTransformer(FOLDER, trust_remote_code=True)
```

## How it was made

{made}

## Scores

{scores or "Not evaluated yet; `python -m cocoa_lib.evaluate FOLDER --root DATA --out RESULTS` does, and writes them here."}
"""


def add_scores(folder: str | Path, scores: str) -> None:
    """Write a checkpoint's model card anew, with these scores (Markdown) in place of its own."""
    folder = Path(folder)
    card = model_card(read_meta(folder, check=False), scores)
    write_whole(folder / CARD, lambda aside: aside.write_text(card, encoding="utf-8"))


def read_meta(folder: str | Path, *, check: bool = True) -> dict[str, Any]:
    """Read a checkpoint's `cocoa.json`; with `check`, compare all files with their hashes.

    Raises CheckpointError saying what is missing or altered.
    """
    folder = Path(folder)
    path = folder / META
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {META}; not a checkpoint of this project, or one that was not finished"
        )
    meta = read_note(path)
    if lost := [name for name in REQUIRED if name not in meta]:
        raise CheckpointError(f"{path}: no {', '.join(lost)}; altered or damaged, train it again")
    if not check:
        return meta
    if weights_hash(folder) != meta["weights_sha256"]:
        raise CheckpointError(
            f"{folder}: the weights do not match {META}; the file was altered or damaged, train it "
            "again"
        )
    for name, digest in meta.get("files_sha256", {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {name}; incomplete, copy or train it again")
        if file_hash(path) != digest:
            raise CheckpointError(f"{path}: does not match {META}; copy or train it again")
    return meta


def load_inputs(folder: str | Path, meta: dict[str, Any], **settings: Any) -> Inputs:
    """Load the processor as it was in training: EOS token and max_length come from `cocoa.json`."""
    trained = {name: meta[name] for name in ("eos_token", "max_length")}
    return Inputs.load(folder, **(trained | settings))
