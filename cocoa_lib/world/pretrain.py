"""Train the small causal backbone, vision first.

    python -m cocoa_lib.world.pretrain --out data/backbone --seed 1

Tower and merger learn to name drawings, then the language model joins. Six phases:

    crops     single drawings; a linear head on the merger's output names the concept on each cell
    scenes    the same on whole scenes, and in which place and size it stands
    names     the language model says what a single drawing is, in a crop and in a scene
    talk      captions and questions about scenes; the tower rests
    together  the same with the tower, at a low rate
    reading   the same, and the same questions about captions in place of pictures; the tower rests

State lies in `.NAME.work` beside the output folder. The same command goes on from there, bit for
bit; batches depend on seed, phase and step alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from ..backbone import hidden_states
from ..corruption import IGNORE
from ..inputs import Inputs
from ..kernels import flush_denormals
from ..store.checkpoint import META, load_inputs, read_meta, save_checkpoint
from ..store.files import write_whole
from .backbone import causal_batch, new_backbone
from .concepts import SALT
from .lessons import (
    BACKGROUND,
    SPOTS,
    Lesson,
    known_concepts,
    make_crops,
    make_readings,
    make_scenes,
    sample_texts,
)
from .muon import Muon
from .patches import EQUAL_PICTURES, cut_patches
from .pictures import ATTRIBUTION
from .schedule import PATCH, Phase, Schedule

logger = logging.getLogger(__name__)
COLUMNS = "phase step loss cell_loss cell_naming naming answers reading seconds".split()
STATE = "state.safetensors"
CARD = f"""# A small causal Qwen2-VL that talks about drawings

Trained by `python -m cocoa_lib.world.pretrain`; cocoa.json says how, log.csv how well. Apache-2.0.

{ATTRIBUTION}
"""
HELD_OUT = 256  # pictures a measurement
CLIP = 1.0  # gradient norm of the parameters that AdamW trains


@dataclass
class Pupil:
    """The model with its head, what trains it, and how far it is."""

    model: PreTrainedModel
    inputs: Inputs
    head: nn.Linear
    optimizers: list[torch.optim.Optimizer]
    phase: int = 0
    step: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)


# ---- one batch ----------------------------------------------------------------------------------


def make_lesson(phase: Phase, rng: np.random.Generator, split: str = "train", n: int = 0) -> Lesson:
    """A batch of a phase; of the split's own scenes where the phase shows scenes.

    "reading" has as many texts as pictures, so that a question has one answer whichever shows it.
    """
    names, n = known_concepts(), n or phase.batch_size
    if phase.name == "reading":
        seen = replace(phase, name=("names", "talk")[int(rng.integers(2))])
        lesson = make_lesson(seen, rng, split, n // 2)
        return replace(lesson, readings=make_readings(rng, n // 2, names, split))
    if phase.name == "names" and rng.random() < 0.5:
        return make_scenes(rng, n, names, split=split, count=1)
    if phase.name in ("crops", "names"):
        return make_crops(rng, n, names)
    return make_scenes(rng, n, names, split=split)


def collate(lesson: Lesson, inputs: Inputs) -> dict[str, Tensor]:
    """A lesson as a batch with `labels`; its pictures never pass through files."""
    values, grids = cut_patches(lesson.pictures, PATCH)
    parts = zip(values.split(len(values) // len(grids)), grids.split(1), strict=True)
    inputs.kept = {str(i): part for i, part in enumerate(parts)}
    rows = [{"image": str(i), "turns": turns} for i, turns in enumerate(lesson.turns)]
    return causal_batch(rows + [{"image": "", "turns": turns} for turns in lesson.readings], inputs)


def read_cells(pupil: Pupil, lesson: Lesson) -> Tensor:
    """Logits of the head on each cell: (N, cells, concepts + 1)."""
    values, grids = cut_patches(lesson.pictures, PATCH)
    merged = pupil.model.model.visual(values, grid_thw=grids).pooler_output
    return pupil.head(merged).view(len(grids), -1, pupil.head.out_features)


def read_words(pupil: Pupil, lesson: Lesson) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the whole model on a lesson.

    Returns cell logits (N, cells, K), logits of the T learnt tokens (T, V), these tokens (T,), and
    the row of each (T,).
    """
    batch, seen = collate(lesson, pupil.inputs), {}
    hook = pupil.model.model.visual.register_forward_hook(
        lambda *call: seen.update(out=call[-1].pooler_output)
    )
    hidden = hidden_states(pupil.model, batch)
    hook.remove()
    cells = pupil.head(seen["out"]).view(len(lesson.pictures), -1, pupil.head.out_features)
    learnt = batch["labels"][:, 1:] != IGNORE
    logits = pupil.model.lm_head(hidden[:, :-1][learnt])
    return cells, logits, batch["labels"][:, 1:][learnt], learnt.nonzero()[:, 0]


def measure_cells(cells: Tensor, lesson: Lesson) -> Tensor:
    """Cross-entropy of the concept on each cell (N, cells, K), plus that of its spot."""
    cells, of = cells.flatten(0, 1), torch.from_numpy(lesson.cells).flatten()
    spots = torch.from_numpy(lesson.spots).flatten()
    loss = F.cross_entropy(cells[:, :-SPOTS], of, ignore_index=IGNORE)
    if (spots != IGNORE).any():
        loss = loss + F.cross_entropy(cells[:, -SPOTS:], spots, ignore_index=IGNORE)
    return loss


def train_step(pupil: Pupil, phase: Phase, lesson: Lesson) -> tuple[float, float]:
    """Train one step; returns the loss of the words (else of the cells), and of the cells."""
    words = torch.zeros(())
    pupil.model.model.visual.requires_grad_(phase.tower > 0)
    if phase.words:
        cells, logits, labels, _ = read_words(pupil, lesson)
        words = F.cross_entropy(logits, labels)
    else:
        cells = read_cells(pupil, lesson)
    cell_loss = measure_cells(cells, lesson)
    loss = phase.words * words + phase.head * cell_loss
    if not torch.isfinite(loss):
        raise RuntimeError(
            f"the loss is {loss.item()} at step {pupil.step} of {phase.name}; lower its rate"
        )
    loss.backward()
    for group in pupil.optimizers[1].param_groups:
        nn.utils.clip_grad_norm_(group["params"], CLIP)
    for optimizer in pupil.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return (words if phase.words else cell_loss).item(), cell_loss.item()


def set_rates(pupil: Pupil, schedule: Schedule, phase: Phase) -> None:
    """Warm-up, then constant, then linear to zero; of each phase anew."""
    left = (phase.steps - pupil.step) / (phase.steps * schedule.decay)
    rate = phase.learning_rate * min(1.0, (pupil.step + 1) / schedule.warmup, left)
    for optimizer, share in zip(pupil.optimizers, (1.0, 0.5), strict=True):
        for group, part in zip(optimizer.param_groups, (phase.tower, 1.0), strict=True):
            group["lr"] = rate * share * part


# ---- measuring ----------------------------------------------------------------------------------


@torch.inference_mode()
def measure(pupil: Pupil, phase: Phase) -> dict[str, float]:
    """Shares right on held-out scenes (development split), greedy.

    cell_naming: single drawings, by the head, unless the tower rests; naming: the same, by the
    language model, all tokens of the name right; answers: questions about scenes of one to four
    drawings; reading: the same questions about captions.
    """
    rng = np.random.default_rng([0, 2])
    single = make_scenes(rng, HELD_OUT, known_concepts(), split="dev", count=1)
    truths = torch.from_numpy(single.cells.max(1))
    found = {}
    if phase.tower:
        shares = read_cells(pupil, single)[..., :-SPOTS].softmax(-1)[..., BACKGROUND + 1 :]
        found["cell_naming"] = float((shares.sum(1).argmax(-1) + 1 == truths).float().mean())
    if phase.words:
        names = known_concepts()
        asked = [[("What is in the picture?", names[label - 1])] for label in truths.tolist()]
        found["naming"] = float(np.mean(answer_right(pupil, replace(single, turns=asked))))
        scenes = make_scenes(rng, 2 * HELD_OUT, names, split="dev")
        kept = [i for i, turns in enumerate(scenes.turns) if turns[0][0]][:HELD_OUT]
        asked = [scenes.turns[i][:1] for i in kept]
        parts = (part[kept] for part in (scenes.pictures, scenes.cells, scenes.spots))
        found["answers"] = float(np.mean(answer_right(pupil, Lesson(*parts, asked))))
    if phase.name == "reading":
        readings = [turns[:1] for turns in make_readings(rng, HELD_OUT, names, "dev")]
        right = answer_right(pupil, replace(single, readings=readings))
        found["reading"] = float(np.mean(right[-HELD_OUT:]))
    return found


@torch.inference_mode()
def answer_right(pupil: Pupil, lesson: Lesson) -> list[bool]:
    """Whether greedy decoding gives the whole answer of each picture, then of each text.

    It does where each token is the likeliest one after the right ones before it, so one forward
    pass tells. A line break ends an answer as EOS does.
    """
    _, logits, labels, rows = read_words(pupil, lesson)
    guesses, (line_break,) = logits.argmax(-1), pupil.inputs.text_ids("\n")
    ended = (labels == pupil.inputs.eos_id) & (guesses == line_break)
    wrong = set(rows[(guesses != labels) & ~ended].tolist())
    return [row not in wrong for row in range(len(lesson.turns) + len(lesson.readings))]


# ---- state --------------------------------------------------------------------------------------


def make_start(folder: Path, schedule: Schedule, seed: int) -> Path:
    """Write a model with random weights, or find it there: a checkpoint folder of stage "init".

    The tokenizer is learnt from the world's texts and from Python's manual, so that other English
    is not spelt out. A run that goes on reads it from here: another one would mean other tokens.
    """
    if not (folder / META).is_file():
        texts = [*sample_texts(schedule.texts), *topics.values()]
        model, inputs = new_backbone(texts, seed=seed, **schedule.shape)
        save_checkpoint(folder, model, inputs, {"stage": "init", "run": {"seed": seed}})
    return folder


def open_pupil(start: Path, seed: int, *, frozen: bool = False) -> Pupil:
    """Open what `make_start` wrote, with a head of random weights and its optimizers.

    frozen: the language model stays as it is, for all phases.
    """
    model = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32).train()
    model.model.visual.config._attn_implementation = EQUAL_PICTURES
    model.model.language_model.requires_grad_(not frozen)
    torch.manual_seed(seed)
    head = nn.Linear(model.config.text_config.hidden_size, len(known_concepts()) + 1 + SPOTS)
    matrices, others = split_weights(model, head)
    adam = torch.optim.AdamW(others, lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    inputs = load_inputs(start, read_meta(start))
    return Pupil(model, inputs, head, [Muon(matrices, lr=0), adam])


def split_weights(model: PreTrainedModel, head: nn.Linear) -> tuple[list[dict], list[dict]]:
    """(matrices inside the blocks, all else), each in two groups: the tower, the language model.

    What is frozen is in none.
    """
    named = [*model.named_parameters(), *head.named_parameters(prefix="head")]
    matrices, others = ([{"params": []}, {"params": []}] for _ in range(2))
    for name, weight in named:
        if not weight.requires_grad:
            continue
        inside = weight.ndim == 2 and "embed_tokens" not in name and not name.startswith("head")
        groups = matrices if inside else others
        groups["visual" not in name]["params"].append(weight)
    return matrices, others


def list_trained(pupil: Pupil) -> dict[str, Tensor]:
    """The weights that the optimizers hold, by name: those that a state has to keep."""
    groups = [group for optimizer in pupil.optimizers for group in optimizer.param_groups]
    held = {id(weight) for group in groups for weight in group["params"]}
    return {
        f"{part}/{name}": weight
        for part in ("model", "head")
        for name, weight in getattr(pupil, part).named_parameters()
        if id(weight) in held
    }


def save_state(pupil: Pupil, path: Path) -> None:
    """All tensors in one safetensors file, the counters and the log in its header."""
    tensors = list_trained(pupil)
    for k, optimizer in enumerate(pupil.optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{k}/{i}/{name}": value for name, value in state.items()}
    counters = {name: getattr(pupil, name) for name in ("phase", "step", "seconds", "rows")}
    held = {name: value.detach().clone() for name, value in tensors.items()}
    write_whole(path, lambda aside: save_file(held, aside, {"counters": json.dumps(counters)}))


def load_state(pupil: Pupil, path: Path) -> None:
    """Go on from what `save_state` wrote."""
    tensors = load_file(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, value in json.loads(header["__metadata__"]["counters"]).items():
        setattr(pupil, name, value)
    with torch.no_grad():
        for name, weight in list_trained(pupil).items():
            weight.copy_(tensors[name])
    for k, optimizer in enumerate(pupil.optimizers):
        held = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer{k}/"):
                _, i, name = key.split("/")
                held["state"].setdefault(int(i), {})[name] = value
        optimizer.load_state_dict(held)


def write_log(pupil: Pupil, path: Path) -> None:
    """The measurements so far as CSV."""

    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(pupil.rows)

    write_whole(path, write)


# ---- training -----------------------------------------------------------------------------------


def go_on(pupil: Pupil, schedule: Schedule, seed: int) -> Iterator[tuple[Phase, float, float]]:
    """Every step that is left: (its phase, its losses), after it is done."""
    for phase in schedule.phases[pupil.phase :]:
        if phase.fresh and pupil.step == 0:
            for optimizer in pupil.optimizers:
                optimizer.state.clear()
        while pupil.step < phase.steps:
            begun = time.perf_counter()
            set_rates(pupil, schedule, phase)
            lesson = make_lesson(phase, np.random.default_rng([seed, 3, pupil.phase, pupil.step]))
            losses = train_step(pupil, phase, lesson)
            pupil.step += 1
            pupil.seconds += time.perf_counter() - begun
            yield phase, *losses
        pupil.phase, pupil.step = pupil.phase + 1, 0


def train_backbone(
    out: Path,
    schedule: Schedule,
    *,
    seed: int,
    start: Callable[[Path, Schedule, int], Path] = make_start,
    card: str = CARD,
) -> Path:
    """Train, or go on, until the last phase is done; returns the checkpoint folder.

    start: writes the model to begin with, as `make_start` does; card: the folder's README.md.
    """
    out, work = Path(out), Path(out).parent / f".{Path(out).name}.work"
    if (out / META).is_file():
        return out
    work.mkdir(parents=True, exist_ok=True)
    begin = start(work / "init", schedule, seed)
    pupil = open_pupil(begin, seed, frozen=schedule.frozen)
    if (work / STATE).is_file():
        load_state(pupil, work / STATE)
    with flush_denormals():
        _train_phases(pupil, schedule, seed, work)
    return save_pupil(pupil, schedule, out, work / "log.csv", seed, card)


def _train_phases(pupil: Pupil, schedule: Schedule, seed: int, work: Path) -> None:
    """Train all that is left; measure, log and save the state on the way."""
    for phase, loss, cell_loss in go_on(pupil, schedule, seed):
        last = pupil.step == phase.steps
        if last or pupil.step % schedule.measure_every == 0:
            seen = {"cell_loss": cell_loss} if phase.head else {}
            found = {"loss": loss, **seen, **measure(pupil, phase), "seconds": pupil.seconds}
            row = {name: f"{value:.4g}" for name, value in found.items()}
            pupil.rows.append({"phase": phase.name, "step": pupil.step, **row})
            write_log(pupil, work / "log.csv")
            logger.info("%s", pupil.rows[-1])
        if last or pupil.step % schedule.save_every == 0:
            save_state(pupil, work / STATE)


def save_pupil(
    pupil: Pupil, schedule: Schedule, out: Path, log: Path, seed: int, card: str
) -> Path:
    """The folder that every later stage opens: model, processor, cocoa.json, log.csv."""
    pupil.model.model.visual.config._attn_implementation = "sdpa"
    pupil.inputs.keep_images(0)
    run = {
        "seed": seed,
        "recipe": json.loads(json.dumps(asdict(schedule))),
        "data": f"drawings, salt {SALT.strip()}",
    }
    meta = {"stage": "causal", "layout": "causal", "run": run}
    extra = {"log.csv": log.read_text(encoding="utf-8"), "README.md": card}
    return save_checkpoint(out, pupil.model.eval(), pupil.inputs, meta, extra)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the small backbone on drawings.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_backbone(args.out, Schedule(), seed=args.seed)


if __name__ == "__main__":
    main()
