"""The user's object: any items in, normalised vectors out, in order; the README's ten lines."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from cocoa_lib import embedder as library
from cocoa_lib.backbone import set_bidirectional
from cocoa_lib.embedder import CocoaEmbedder, mteb_model, sentence_transformer
from cocoa_lib.evaluate.score import rank
from cocoa_lib.inputs import Inputs
from cocoa_lib.items import InputError
from cocoa_lib.run.stage import check_parent
from cocoa_lib.store.checkpoint import CheckpointError, add_scores, read_meta, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # remarks of sentence-transformers and mteb
README = Path(__file__).resolve().parent.parent / "README.md"
MODULES = '[{"idx": 0, "name": "0", "path": "", "type": "cocoa_lib.embedder.EosEmbedding"}]'


META = {"stage": "stage3", "layout": "bidirectional", "pooling": "eos"}


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    model, inputs = small
    out = tmp_path_factory.mktemp("checkpoint") / "cocoa"
    set_bidirectional(model, True)
    run = {"stage": "stage3", "seed": 7, "data": "d4ta", "parent_sha256": "f00d"}
    meta = META | {"parent": "stage2/base", "run": run | {"recipe": {"steps": 250}}}
    save_checkpoint(out, model, inputs, meta, {"modules.json": MODULES})
    set_bidirectional(model, False)
    return out


@pytest.fixture(scope="module")
def embedder(folder):
    return CocoaEmbedder.load(folder)


def items(picture, n=40):
    texts = [{"text": f"text {i} " * (i % 5 + 1)} for i in range(0, n, 2)]
    both = [
        {"text": "word " * (i % 7), "image": picture(16 * (1 + i % 3), 32, i)}
        for i in range(1, n, 2)
    ]
    return [item for pair in zip(texts, both, strict=True) for item in pair]


def test_vectors_are_normalised_and_in_the_order_given(embedder, picture):
    some = items(picture)
    vectors = embedder.encode(some, batch_size=8)
    assert vectors.shape == (40, 64) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for i in (0, 1, 17, 39):
        assert np.allclose(embedder.encode([some[i]])[0], vectors[i], atol=1e-5)


def test_one_item_a_generator_and_plain_values(embedder, picture):
    whole = embedder.encode([{"text": "a cat"}, {"text": "", "image": picture()}])
    alone = embedder.encode("a cat")
    assert alone.shape == (64,) and np.allclose(alone, whole[0], atol=1e-6)
    for items in (["a cat", picture()], (x for x in ["a cat", picture()])):
        assert np.allclose(embedder.encode(items), whole, atol=1e-6)


def test_smaller_vectors_are_sentence_transformers_own(embedder, picture):
    some = items(picture, 120)
    floats = embedder.encode(some)
    short = embedder.encode(some, truncate_dim=16)
    expected = floats[:, :16] / np.linalg.norm(floats[:, :16], axis=1, keepdims=True)
    assert np.allclose(short, expected, atol=1e-6)
    for precision, width in (("int8", 64), ("ubinary", 8)):
        codes = embedder.encode(some, precision=precision)
        expected = quantize_embeddings(floats, precision)
        assert codes.dtype == expected.dtype and codes.shape == expected.shape == (120, width)
        assert (codes == expected).mean() > 0.95  # a value on the border of two steps


def test_a_bad_item_is_named_by_its_place_and_its_file(embedder, picture, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    many = [{"text": "a " * i} for i in range(1, 101)]  # several batches, by length
    huge, empty = Image.new("1", (10_000, 10_000)), tmp_path / "empty.png"
    for at, bad, message in (
        (1, {"text": ""}, "neither text nor image"),
        (90, {"text": "", "image": "none.png"}, "none.png: no such image file"),
        (70, {"text": "x", "image": empty}, ".*empty.png: not a readable"),
        (99, "half a pair \ud800", "the text is not valid Unicode"),
        (3, {"text": 3}, "text must be a string, found int"),
        (9, huge, "the given image: 10000 x 10000 pixels is over"),
        (5, {"text": "<|image_1|><|image_2|>", "image": picture()}, "text marks 2 image"),
        (2, {"text": "b", "image": np.zeros((8, 8, 3))}, "image: expected a path or a PIL"),
        (6, {"text": "b", "image": [None]}, "image: expected a path or a PIL image"),
    ):
        with pytest.raises(InputError, match=f"item {at}: {message}") as error:
            embedder.encode([*many[:at], bad, *many[at + 1 :]], batch_size=32)
        assert error.value.item == at


def test_the_fingerprint_tells_apart_what_gives_other_vectors(small, embedder, tmp_path):
    """Stored embeddings are found by it; the weights are the same in all of these."""
    model, inputs = small
    processor = copy.deepcopy(inputs.image_processor)
    shrunk = Inputs(inputs.tokenizer, processor, max_length=inputs.max_length)
    shrunk.limit_images(4)
    other, seen = copy.copy(model), []
    other.config = copy.deepcopy(model.config)
    other.config.text_config.rms_norm_eps = 0.5
    both, causal = META, META | {"layout": "causal"}
    kinds = [(model, inputs, both), (model, inputs, causal), (model, shrunk, both)]
    for i, kind in enumerate([*kinds, (other, inputs, both)]):
        save_checkpoint(tmp_path / str(i), *kind)
        seen.append(CocoaEmbedder.load(tmp_path / str(i)).fingerprint)
    assert len(set(seen)) == 4
    assert CocoaEmbedder.load(tmp_path / "0").fingerprint == seen[0]


FILES = "cocoa config preprocessor_config tokenizer tokenizer_config"


def test_altered_or_missing_weights_are_noticed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert read_meta(copy, check=False)["stage"] == "stage3"
    for use in (read_meta, CocoaEmbedder.load, lambda copy: check_parent("stage1", copy, True)):
        with pytest.raises(CheckpointError, match="the weights do not match cocoa.json"):
            use(copy)
    file.unlink()
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        read_meta(copy)


@pytest.mark.parametrize("name", [f"{file}.json" for file in FILES.split()])
def test_a_missing_or_torn_file_of_a_checkpoint_is_named(folder, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = (copy / name).read_text()
    (copy / name).write_text(content[: len(content) // 2])
    message = "not valid JSON" if name == "cocoa.json" else "does not match cocoa.json"
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: {message}"):
        CocoaEmbedder.load(copy)
    (copy / name).write_text(content + " ")  # well-formed, but not what was saved
    if name != "cocoa.json":
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: does not match cocoa.json"):
            CocoaEmbedder.load(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(str(copy))}: no {re.escape(name)}"):
        CocoaEmbedder.load(copy)


def test_the_model_card_says_how_it_was_made_and_takes_scores(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    card = (copy / "README.md").read_text(encoding="utf-8")
    weights = read_meta(folder)["weights_sha256"]
    for fact in ("stage2/base", "f00d", "d4ta", "- seed: 7\n", "steps 250", weights):
        assert fact in card, fact
    assert "Not evaluated yet" in card and ": None\n" not in card
    for scores in ("| overall | 12.3 |", "| overall | 45.6 |"):
        add_scores(copy, scores)
    again = (copy / "README.md").read_text(encoding="utf-8")
    assert again.endswith("## Scores\n\n| overall | 45.6 |\n")
    assert "12.3" not in again and "Not evaluated" not in again
    assert again.split("## Scores")[0] == card.split("## Scores")[0]
    assert not list(copy.glob(".*")) and CocoaEmbedder.load(copy).encode("a cat").shape == (64,)


def test_the_folder_opens_as_a_sentence_transformers_model(folder, embedder, picture):
    flagged = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for model in (flagged, sentence_transformer(folder, device="cpu")):
        for item in ("a cat", {"text": "what is it", "image": picture()}, picture(32, 48)):
            assert np.allclose(model.encode([item])[0], embedder.encode([item])[0], atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):  # if not, shorten the README
        SentenceTransformer(str(folder), device="cpu")


def test_settings_of_sentence_transformers_are_heard(folder):
    how = {"trust_remote_code": True, "device": "cpu"}
    settings = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = SentenceTransformer(str(folder), model_kwargs=settings, **how)
    found = model[0].model
    assert found.dtype == torch.bfloat16 and found.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="max_length: not a setting"):
        SentenceTransformer(str(folder), processor_kwargs={"max_length": 16}, **how)


def test_what_sentence_transformers_saves_is_a_checkpoint_again(folder, embedder, tmp_path):
    model = sentence_transformer(folder, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    [module] = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert module["type"] == "cocoa_lib.embedder.EosEmbedding"
    again = CocoaEmbedder.load(tmp_path / "saved").encode("a cat")
    assert np.allclose(again, embedder.encode("a cat"), atol=1e-6)
    with pytest.raises(CheckpointError, match="never written over"):
        model.save_pretrained(str(tmp_path / "saved"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_what_sentence_transformers_keeps_beside_the_model_comes_along(folder, tmp_path):
    model = sentence_transformer(folder, device="cpu")
    model.prompts, model.default_prompt_name, model.truncate_dim = {"query": "find: "}, "query", 32
    assert model.max_seq_length == model[0].inputs.max_length == 256
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformer(tmp_path / "saved", device="cpu")
    vectors = again.encode(["a cat"])
    assert vectors.shape == (1, 32) and np.allclose(vectors, model.encode(["a cat"]))
    again.max_seq_length = 8
    assert again[0].preprocess(["a cat " * 9])["input_ids"].shape == (1, 8)
    modules = tmp_path / "saved" / "modules.json"
    modules.write_text(json.dumps([*json.loads(modules.read_text()), {"type": "a.Dense"}]))
    with pytest.raises(ValueError, match=r"several modules \(.*a.Dense\); open it by Sentence"):
        sentence_transformer(tmp_path / "saved")


def test_a_model_saved_without_a_record_keeps_its_attention(small, tmp_path):
    model, inputs = small  # causal
    made = SentenceTransformer(modules=[library.EosEmbedding(model, inputs)], device="cpu")
    made.save_pretrained(str(tmp_path / "saved"))
    again = CocoaEmbedder.load(tmp_path / "saved").encode("a cat")
    assert np.allclose(again, made.encode(["a cat"])[0], atol=1e-6)


def test_mteb_agrees_on_a_local_task(folder, embedder, picture):
    mteb = pytest.importorskip("mteb", reason="the extra `mteb` is not installed: pip install mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    n = 24
    queries = [{"id": f"q{i}", "text": f"a red circle and {i} dogs"} for i in range(n)]
    pictures = [{"id": f"d{i}", "image": picture(32, 32, i)} for i in range(n)]
    rows = {"queries": Dataset.from_list(queries), "corpus": Dataset.from_list(pictures)}
    rows |= {"relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(n)}, "top_ranked": None}
    metadata = {"name": "LocalPictures", "description": "texts and pictures", "category": "t2i"}
    metadata |= {"reference": "https://example.org", "type": "Any2AnyRetrieval"}
    metadata |= {"dataset": {"path": "local", "revision": "1"}, "modalities": ["text", "image"]}
    metadata |= {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "main_score": "ndcg_at_10"}

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(**metadata)

        def load_data(self, **_):
            self.dataset, self.data_loaded = {"default": {"test": rows}}, True

    model, how = mteb_model(folder, device="cpu"), {"batch_size": 8, "show_progress_bar": False}
    assert model.mteb_model_meta.revision == read_meta(folder)["weights_sha256"]
    result = mteb.evaluate(model, Local(), cache=None, encode_kwargs=how, show_progress_bar=False)
    found = result.task_results[0].scores["test"][0]
    texts, images = (
        [row[name] for row in side] for side, name in ((queries, "text"), (pictures, "image"))
    )
    lists = [np.r_[i, np.delete(np.arange(n), i)] for i in range(n)]
    ranks = rank(embedder.encode(texts), embedder.encode(images), lists)["rank"]
    assert found["hit_rate_at_5"] == pytest.approx(float(np.mean(ranks <= 5)), abs=1e-4)
    assert found["mrr_at_1000"] == pytest.approx(float(np.mean(1 / ranks)), abs=1e-4)


def test_the_readmes_lines_find_a_drawing_by_a_phrase(monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(README.parent)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    assert any(line.endswith(" red apple") for line in lines) and len(lines) == 5
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
