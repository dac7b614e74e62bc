"""The rows of `make bench`: each function proves two ways equal, then times them in turn.

A row is what a user decides by. `bench.py` runs the rows, `page.py` puts them into docs/speed.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import step
import torch
import torch.nn.functional as F
from common import BACKBONE, WORDS, Record, in_turn, peaks, record, small_model
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import Qwen2VLModel

from cocoa_lib.attention import A
from cocoa_lib.backbone import open_backbone
from cocoa_lib.contrastive import CachedInfoNCE
from cocoa_lib.corruption import IGNORE, stage1_batch
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding, load_module
from cocoa_lib.evaluate.score import rank
from cocoa_lib.inputs import Batch, Inputs
from cocoa_lib.packing import sort_longest_first
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction

VOCABULARY = 151_936  # Qwen2's


def pictures(n: int, side: int = 64) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (n, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


def full_logits(hidden: torch.Tensor, lm_head: torch.nn.Module, labels: torch.Tensor):
    """What a causal language model's own loss does: logits everywhere, chosen by the labels."""
    logits = lm_head(hidden[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def head_step(full: bool, batch: int = 4, length: int = 128) -> Callable[[], float]:
    """Forward and backward of stage 1, a small model with Qwen2's vocabulary, 20 % masked."""
    model, _ = small_model(128)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(std=0.02)
    module = Reconstruction(model, layout="bidirectional")
    if full:
        module.objective = full_logits
    ids = torch.randint(10, VOCABULARY, (batch, length))
    masked = torch.rand(ids.shape) < 0.2
    masked[:, 0] = False
    data = {
        "input_ids": ids,
        "segment_ids": torch.full_like(ids, A),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids),
        "labels": torch.where(masked, ids, IGNORE),
    }

    def take(rows: int = batch) -> float:
        module.zero_grad()
        loss = module(**{name: value[:rows] for name, value in data.items()})["loss"]
        loss.backward()
        return float(loss.detach())

    take(1)  # allocates the gradients
    return take


def head_time() -> Record:
    sides = {name: head_step(name == "full") for name in ("full", "masked")}
    assert abs(sides["full"]() - sides["masked"]()) < 1e-4
    seconds = in_turn(sides, warm=True)
    text = "Head on masked places against logits everywhere, stage 1, Qwen2's vocabulary: time"
    return record("head, time", text, seconds["full"], seconds["masked"])


def head_memory() -> Record:
    text = "The same head: peak memory of a step"
    return record("head, memory", text, peaks(head_step, True), peaks(head_step, False))


def step_time(stage: str, runs: str) -> Record:
    """The library's step against the way it was taken before; `step.py` says what each part is worth."""
    (line,) = step.compare(step.few_rows(runs), stage, ["before", "now"], steps=10)
    assert line["gap"] < 1e-4, line
    text = f"A step of {stage[:5]} {stage[5]}, profile laptop, as it was against as it is, equal losses"
    return line | {"name": f"step, {stage}", "text": text}


def plain_loop(
    model: Qwen2VLModel, inputs: Inputs, items: list[dict], size: int = 32
) -> np.ndarray:
    """transformers alone: tokenizer, image processor and model, batches in the order given."""
    found = []
    for at in range(0, len(items), size):
        part = items[at : at + size]
        images = [item["image"] for item in part if item["image"]]
        made = inputs.image_processor(images, return_tensors="pt")
        cells = iter((made["image_grid_thw"].prod(-1) // 4).tolist())
        texts = [
            (
                "<|vision_start|>" + "<|image_pad|>" * next(cells) + "<|vision_end|>"
                if item["image"]
                else ""
            )
            + f"{item['text']}<|im_end|>"
            for item in part
        ]
        batch = inputs.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        kinds = (batch["input_ids"] == inputs.image_pad_id).int()
        with torch.inference_mode():
            out = model(**batch, **made, mm_token_type_ids=kinds).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        found.append(F.normalize(out[torch.arange(len(part)), last], dim=-1))
    return torch.cat(found).numpy()


def encode_time(n: int = 256) -> Record:
    """`encode` batches by length; the shipped backbone, items of which half have a picture."""
    embedder, images = CocoaEmbedder.load(BACKBONE), pictures(n)
    model = Qwen2VLModel.from_pretrained(BACKBONE).eval()
    items = [
        {"text": f"{i} " + " ".join(WORDS[: i % 15]), "image": images[i] if i * 7 % 2 else None}
        for i in range(n)
    ]
    sides = {
        "plain": lambda: plain_loop(model, embedder.module.inputs, items),
        "ours": lambda: embedder.encode(items),
    }
    assert np.allclose(sides["plain"](), sides["ours"](), atol=1e-4)
    seconds = in_turn(sides, warm=True)
    text = "`encode` against a loop over batches of plain transformers, equal vectors: time"
    return record("encode", text, seconds["plain"], seconds["ours"])


def pair_columns(module: EosEmbedding, n: int = 64) -> list[Batch]:
    """A picture and a question against twelve words: `n` pairs, no two alike."""
    queries = [{"text": "what is it", "image": image} for image in pictures(n)]
    positives = [{"text": f"{i} " + " ".join(WORDS[:11])} for i in range(n)]
    return [module.inputs.collate(queries), module.inputs.collate(positives)]


def contrastive_time(n: int = 64, chunk: int = 64) -> Record:
    """Profile laptop's shape: the batch is one chunk. Theirs embeds it twice, ours once."""
    model = SentenceTransformer(modules=[load_module(BACKBONE)], device="cpu").train()
    ours = CachedInfoNCE(model, temperature=0.05, mini_batch_size=chunk)
    theirs = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=chunk)
    columns = pair_columns(model[0], n)

    def take(loss: torch.nn.Module, packing: bool) -> float:
        model.zero_grad()
        model[0].packing = packing
        value = loss([dict(column) for column in columns], torch.zeros(n))
        value.backward()
        return float(value.detach())

    sides = {"theirs": lambda: take(theirs, False), "ours": lambda: take(ours, True)}
    assert abs(sides["theirs"]() - sides["ours"]()) < 1e-4
    seconds = in_turn(sides, warm=True)
    text = (
        "Stage 3's loss against sentence-transformers' `CachedMultipleNegativesRankingLoss`, "
        f"a batch of {n} in chunks of {chunk}, equal losses: time"
    )
    return record("stage 3 loss", text, seconds["theirs"], seconds["ours"])


def sorted_chunks(batch: int = 16, chunk: int = 4) -> Record:
    """Every other query has a picture of 256 tokens, all else some 20."""
    model, inputs = small_model(128, image_pixels=256**2, vision_dim=32, vision_layers=1)
    module = EosEmbedding(model, inputs).train()
    loss = CachedInfoNCE(module, mini_batch_size=chunk)
    image, text = Image.new("RGB", (256, 256)), " ".join(WORDS)
    queries = [{"text": text, "image": image if i % 2 else None} for i in range(batch)]
    positives = [{"text": f"{i} {text}"} for i in range(batch)]
    given = [inputs.collate(queries), inputs.collate(positives)]
    ordered = [rows | {"order": order} for rows, order in map(sort_longest_first, given)]

    def take(columns: list[Batch]) -> float:
        module.zero_grad()
        value = loss([dict(column) for column in columns])
        value.backward()
        return float(value.detach())

    sides = {"given": lambda: take(given), "sorted": lambda: take(ordered)}
    assert abs(sides["given"]() - sides["sorted"]()) < 1e-4
    seconds = in_turn(sides, warm=True)
    text = f"GradCache's chunks of {chunk}, rows as given against sorted by length, half pictures: time"
    return record("sorted chunks", text, seconds["given"], seconds["sorted"])


def cached_step(chunk: int, batch: int = 256) -> Callable[[], float]:
    torch.manual_seed(0)
    module = load_module(BACKBONE).train()
    loss = CachedInfoNCE(module, mini_batch_size=chunk)

    def take(columns: list[Batch]) -> float:
        module.zero_grad()
        value = loss([dict(column) for column in columns])
        value.backward()
        return float(value.detach())

    take(pair_columns(module, 33))  # what is allocated once
    columns = pair_columns(module, batch)
    return lambda: take(columns)


def cache_memory() -> Record:
    text = "GradCache in chunks of 32 against the whole batch of 256: peak memory of a step"
    return record("GradCache, memory", text, peaks(cached_step, 256), peaks(cached_step, 32))


def saving_step(saving: bool) -> Callable[[], float]:
    """A step of stage 1 on 16 rows with or without gradient checkpointing."""
    torch.manual_seed(0)
    model = open_backbone(BACKBONE, bidirectional=True)
    if saving:
        model.gradient_checkpointing_enable()
    recipe = make_recipe("stage1", {"preset": "figure"})
    module = Reconstruction(model, layout="bidirectional", image_weight=0.5).train()
    words = " ".join(WORDS)
    rows = [
        {"text": "", "target": words, "image": image, "draw": i}
        for i, image in enumerate(pictures(16))
    ]
    batch = stage1_batch(rows, Inputs.load(BACKBONE, max_length=256), recipe, 0)

    def take() -> float:
        module.zero_grad()
        loss = module(**batch)["loss"]
        loss.backward()
        return float(loss.detach())

    take()
    return take


def checkpointing_memory() -> Record:
    sides = {"without": saving_step(False), "with": saving_step(True)}
    assert abs(sides["without"]() - sides["with"]()) < 1e-4
    seconds = in_turn(sides, warm=True)
    price = record("", "", seconds["with"], seconds["without"])["ratio"]
    text = f"Gradient checkpointing, stage 1: peak memory without against with ({price:.2f} times as long)"
    return record("checkpointing", text, peaks(saving_step, False), peaks(saving_step, True))


def rank_one_by_one(
    queries: np.ndarray, candidates: dict[str, np.ndarray], lists: list[list[str]]
) -> list[int]:
    """VLM2Vec's published evaluation: a query at a time, its candidates looked up by name and stacked."""
    ranks = []
    for query, names in zip(queries, lists, strict=True):
        scores = np.stack([candidates[name] for name in names]) @ query
        ranks.append(1 + int((scores[1:] >= scores[0]).sum()))
    return ranks


def ranking_time(n: int = 1000, width: int = 1536) -> Record:
    """A task of MMEB's size at Qwen2-VL-2B's width: 1000 queries, 1000 candidates each."""
    rng = np.random.default_rng(0)
    candidates = rng.standard_normal((n, width), dtype=np.float32)
    queries = candidates + 20 * rng.standard_normal((n, width), dtype=np.float32)
    queries, candidates = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, candidates)
    )
    index = [np.concatenate([[i], np.delete(np.arange(n), i)]) for i in range(n)]
    named = {str(i): row for i, row in enumerate(candidates)}
    lists = [[str(i) for i in row] for row in index]
    sides = {
        "theirs": lambda: rank_one_by_one(queries, named, lists),
        "ours": lambda: rank(queries, candidates, index),
    }
    assert (sides["ours"]()["rank"].to_numpy() == sides["theirs"]()).all()
    seconds = in_turn(sides, warm=True)
    text = "Ranking 1000 queries x 1000 candidates x 1536 against VLM2Vec's loop, equal ranks: time"
    return record("ranking", text, seconds["theirs"], seconds["ours"])


def reading_ahead(runs: str, steps: int = 6) -> Record:
    """Wall time of steps of stage 1 without and with two processes that read and tokenise ahead."""

    def take(workers: int) -> float:
        way = step.WAYS["now"]
        trainer = step.open_trainer(step.few_rows(runs), "stage1", steps, way)
        trainer.args.dataloader_num_workers = workers
        batches = iter(trainer.get_train_dataloader())
        next(batches)
        start = time.perf_counter()
        for _ in range(steps - 1):
            trainer.model(**next(batches))["loss"].backward()
        return time.perf_counter() - start

    rounds = [(take(0), take(2)) for _ in range(5)]
    text = "Stage 1 with `workers: 2` (pictures read and texts tokenised ahead): time by the clock"
    return record("reading ahead", text, *zip(*rounds, strict=True))


def rows(runs: str) -> dict[str, Callable[[], Record]]:
    """Name -> what measures it, the longest first."""
    steps = {f"step, {name}": partial(step_time, name, runs) for name in step.STAGES}
    return steps | {
        "reading ahead": partial(reading_ahead, runs),
        "GradCache, memory": cache_memory,
        "head, memory": head_memory,
        "head, time": head_time,
        "stage 3 loss": contrastive_time,
        "checkpointing": checkpointing_memory,
        "sorted chunks": sorted_chunks,
        "ranking": ranking_time,
        "encode": encode_time,
    }
