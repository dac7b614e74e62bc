"""Rare things of a run: options few set, full disks, compiled layers, two processes."""

from __future__ import annotations

import errno
import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from tiny_runs import (
    LORA,
    STAGES,
    assert_same_run,
    go,
    pair_columns,
    stop_at,
    tiny,
    together,
    weights,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import modeling_utils

from cocoa_lib import corruption
from cocoa_lib.backbone import open_backbone
from cocoa_lib.contrastive import CachedInfoNCE
from cocoa_lib.corruption import stage1_batch
from cocoa_lib.data import corpus
from cocoa_lib.embedder import EosEmbedding
from cocoa_lib.items import InputError
from cocoa_lib.kernels import join_processes
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction, load_decoder
from cocoa_lib.run import stage as stage_module
from cocoa_lib.run import trainers
from cocoa_lib.run.resume import TrainingError
from cocoa_lib.run.trainers import training_arguments
from cocoa_lib.store.checkpoint import CheckpointError, load_inputs, read_meta

# In peft.
DEPRECATED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(DEPRECATED)


def test_several_gpus_and_one_process_are_one_gpu(tmp_path):
    """transformers would wrap the model in DataParallel, which cuts pictures apart, and take a batch for each GPU."""

    class OnTwo(transformers.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    recipe = tiny("stage1")
    args = training_arguments(OnTwo, recipe, tmp_path, 0)
    assert args.train_batch_size == recipe.batch_size


def test_a_learned_fill_stays_with_the_decoder(home, tmp_path):
    out = go(home, "stage1", tmp_path / "out", tiny("stage1", patch_fill="learned"))
    model = open_backbone(out, bidirectional=True)
    assert load_decoder(out, model).fill.abs().sum() > 0
    assert load_decoder(home / "stage1", model).fill is None


def test_stage2_with_the_picture_restored_too_is_a_run(home, tmp_path):
    out = go(home, "stage2", tmp_path / "out", tiny("stage2", image_weight=0.5))
    assert (pd.read_csv(out / "log.csv")["image_loss"] > 0).all()
    assert (out / "image_decoder.safetensors").is_file()


@pytest.mark.parametrize("token, added", [("<|gap|>", True), ("a", False)])
def test_the_mask_token_stays_with_the_checkpoint(home, tmp_path, token, added, monkeypatch):
    seen, write = [], corruption.mask_text

    def look(*args, **how):
        seen.append(how["mask_token_id"])
        return write(*args, **how)

    monkeypatch.setattr("cocoa_lib.corruption.mask_text", look)
    before = load_inputs(home / "causal", read_meta(home / "causal"))
    go(home, "stage1", tmp_path / "stage1", tiny("stage1", mask_token=token))
    inputs = load_inputs(tmp_path / "stage1", read_meta(tmp_path / "stage1"))
    number = inputs.tokenizer.convert_tokens_to_ids(token)
    assert set(seen) == {number} == {inputs.tokenizer.mask_token_id}
    assert len(inputs.tokenizer) == len(before.tokenizer) + added
    assert inputs.text_ids("a red circle") == before.text_ids("a red circle")
    folders = (tmp_path / "stage1", home / "causal")
    one, other = (
        len(open_backbone(each, bidirectional=True).get_input_embeddings().weight)
        for each in folders
    )
    assert one == max(len(inputs.tokenizer), other)
    seen.clear()
    go(home, "stage2", tmp_path / "stage2", parent=tmp_path / "stage1")
    assert set(seen) == {inputs.tokenizer.mask_token_id}, "stage 2 goes on with it"


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_a_mask_token_with_a_part_of_its_own_is_refused(home, tmp_path, token):
    with pytest.raises(InputError, match="has a part of its own in every input"):
        go(home, "stage1", tmp_path / "out", tiny("stage1", mask_token=token))


def test_precision_is_the_recipes_and_not_the_launchers(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_same_run(home / "stage1", go(home, "stage1", tmp_path / "out"))


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_workers_change_nothing(home, stage, tmp_path):
    recipe = tiny(stage, workers=2)
    args = training_arguments(transformers.TrainingArguments, recipe, tmp_path, 0)
    assert args.dataloader_num_workers == 2
    assert_same_run(home / stage, go(home, stage, tmp_path / "out", recipe))


def assert_alike(one, other, most, **how):
    """Losses as `np.allclose` takes it, with the same dropout in both passes; weights to `most`."""
    a, b = (pd.read_csv(run / "log.csv").filter(like="loss") for run in (one, other))
    assert len(a.columns) and np.allclose(a, b, equal_nan=True, **how)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < most


@pytest.mark.parametrize("stage", STAGES[1:])
def test_gradient_checkpointing_trains_the_same(home, tmp_path, stage, monkeypatch):
    """With an adapter, whose dropout the second forward pass has to repeat, and in stage 3 within GradCache's."""
    calls, checkpoint = [], modeling_utils.checkpoint
    count = lambda *args, **how: calls.append(1) or checkpoint(*args, **how)  # noqa: E731
    monkeypatch.setattr(modeling_utils, "checkpoint", count)
    plain = go(home, stage, tmp_path / "plain", tiny(stage, steps=3, **LORA))
    assert not calls
    recipe = tiny(stage, steps=3, gradient_checkpointing=True, **LORA)
    saving = go(home, stage, tmp_path / "saving", recipe)
    assert calls
    assert_alike(plain, saving, 1e-6, rtol=1e-5)
    a, b = (pd.read_csv(run / "log.csv")["grad_norm"] for run in (plain, saving))
    assert np.allclose(a, b, rtol=1e-5, equal_nan=True)


def test_a_working_folder_of_another_configuration_is_refused(home, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        go(home, "stage2", tmp_path / "out")
    said = r"\.out\.work: holds a run of another configuration \(seed 0, not 5\)"
    with pytest.raises(CheckpointError, match=said):
        go(home, "stage2", tmp_path / "out", seed=5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize(
    ("stage", "values"),
    [("stage1", {"steps": 2}), ("stage2", LORA | {"steps": 2}), ("stage3", {"steps": 2})],
)
def test_compiled_layers_train_the_same(home, tmp_path, stage, values):
    plain = go(home, stage, tmp_path / "plain", tiny(stage, **values))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dynamo, drawn = torch._dynamo.config, torch._inductor.config.fallback_random
    here = dynamo.patch(recompile_limit=dynamo.recompile_limit, optimize_ddp=dynamo.optimize_ddp)
    with here, torch._inductor.config.patch(fallback_random=drawn):
        compiled = go(home, stage, tmp_path / "compiled", tiny(stage, torch_compile=True, **values))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_alike(plain, compiled, 5e-6, rtol=0, atol=1e-6)


def test_ctrl_c_in_the_last_step_finishes(home, tmp_path, monkeypatch):
    stop_at(monkeypatch, 6, signal.SIGINT)
    assert_same_run(go(home, "stage2", tmp_path / "out"), home / "stage2")


FULL = {
    "_save_optimizer_and_scheduler": RuntimeError("[enforce fail at inline_container.cc:672] ."),
    "save_model": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "_finish": SafetensorError("IoError: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_is_said_whoever_writes_and_the_same_command_goes_on(
    home, where, tmp_path, monkeypatch
):
    """As torch's own writer fails, in a checkpoint, and as safetensors does, in the finished folder."""
    modules = {"_finish": stage_module, "save_model": trainers}

    def full(*args, **kwargs):
        raise FULL[where]

    monkeypatch.setattr(modules.get(where, transformers.Trainer), where, full)
    said = "the disk is full, a checkpoint could not .*same command goes on"
    with pytest.raises(TrainingError, match=said):
        go(home, "stage1", tmp_path / "out")
    monkeypatch.undo()
    assert_same_run(go(home, "stage1", tmp_path / "out"), home / "stage1")


def pairs(home):
    rows, _ = corpus.pairs(home / "world")
    return [rows[i] for i in (0, 20, 40, 63, 8, 30, 50, 16)]


def captions(home):
    """The second half has longer texts and no image: two processes mask different numbers of words and cells."""
    rows = [row | {"draw": i} for i, row in enumerate(corpus.captions(home / "world")[:8])]
    plain = [row | {"image": None, "target": ", ".join([row["target"]] * 2)} for row in rows[4:]]
    return rows[:4] + plain


def contrastive_gradients(home, mine, wrap):
    folder = home / "stage3"
    inputs = load_inputs(folder, read_meta(folder))
    module = EosEmbedding(open_backbone(folder, bidirectional=True), inputs)
    model = SentenceTransformer(modules=[module], device="cpu")
    columns = pair_columns(pairs(home)[mine], inputs, 3)
    wrapped = wrap(model.train())
    loss = CachedInfoNCE(wrapped, temperature=0.1, mini_batch_size=3)(columns)
    loss.backward()
    named = model.named_parameters()
    return float(loss.detach()), {name: p.grad for name, p in named if p.grad is not None}


def reconstruction_gradients(home, mine, wrap):
    folder = home / "causal"
    inputs = load_inputs(folder, read_meta(folder))
    torch.manual_seed(0)
    recipe = make_recipe("stage1", {"preset": "figure"})
    model = open_backbone(folder, bidirectional=True)
    module = Reconstruction(model, layout="bidirectional", image_weight=0.5)
    batch = stage1_batch(captions(home)[mine], inputs, recipe, seed=0)
    wrapped = wrap(module.train())
    out = wrapped(**batch)
    out["loss"].backward()
    losses = {name: float(value.detach()) for name, value in out.items()}
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def one_of_two(rank, home, out):
    """Gradients through DDP with what was sent, stages 1 and 3, stage 3 interrupted, into `out`."""
    assert join_processes().num_processes == 2
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    def wrap(module):
        wrapped = DistributedDataParallel(module, find_unused_parameters=True)
        wrapped.register_comm_hook(None, count)
        return wrapped

    mine, results = slice(4 * rank, 4 * rank + 4), {}
    kinds = {"stage3": contrastive_gradients, "stage1": reconstruction_gradients}
    for name, gradients in kinds.items():
        sent.clear()
        results[name] = (*gradients(home, mine, wrap), list(sent))
    torch.save(results, out / f"gradients-{rank}.pt")
    go(home, "stage3", out / "stage3")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:  # the signal reaches one process only: both must stop at the same step
            stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
            go(home, "stage3", out / "resumed")
    files = {path.name for path in (out / ".resumed.work" / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= files
    go(home, "stage3", out / "resumed")


@pytest.fixture(scope="module")
def two(home, tmp_path_factory):
    """What two gloo processes on this machine left: gradients-0.pt, gradients-1.pt, stage3, resumed."""
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("transformers before 5.20 cannot resume on two CPU processes")
    out = tmp_path_factory.mktemp("two")
    assert together(one_of_two, home, out) == [0, 0]
    return out


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_two_processes_give_the_gradient_of_the_whole_batch(home, two, stage):
    """Relative 1e-5 in float32; the losses of the two average to that of the whole batch, also where one has no image."""
    ranks = [torch.load(two / f"gradients-{rank}.pt", weights_only=True)[stage] for rank in (0, 1)]
    if stage == "stage3":
        loss, whole = contrastive_gradients(home, slice(None), lambda module: module)
        assert np.isclose(np.mean([rank[0] for rank in ranks]), loss, rtol=1e-5)
    else:
        losses, whole = reconstruction_gradients(home, slice(None), lambda module: module)
        for name, value in losses.items():
            assert np.isclose(np.mean([rank[0][name] for rank in ranks]), value, rtol=1e-5), name
        assert ranks[0][0]["text_loss"] != ranks[1][0]["text_loss"]
        assert ranks[1][0]["image_loss"] == 0
    for _, gradients, _ in ranks:
        assert gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_one_synchronisation_a_step(two):
    """Six chunks of GradCache and two columns, but every number crosses once."""
    for rank in (0, 1):
        results = torch.load(two / f"gradients-{rank}.pt", weights_only=True)
        for _, gradients, sent in results.values():
            assert sum(sent) == sum(gradient.numel() for gradient in gradients.values())


def test_two_processes_stop_together_and_go_on(two):
    assert_same_run(two / "resumed", two / "stage3")


def test_a_model_from_elsewhere_takes_the_recipes_length(home, tmp_path):
    folder = shutil.copytree(home / "causal", tmp_path / "raw")
    (folder / "cocoa.json").unlink()
    recipe = tiny("stage1", steps=1, max_length=8192)
    out = go(home, "stage1", tmp_path / "out", recipe, parent=folder)
    assert read_meta(out)["max_length"] == 8192
