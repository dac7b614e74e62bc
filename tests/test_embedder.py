"""The user's object: any items in, normalised vectors out, in order; the README's ten lines run as written."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cocoa_lib import embedder as library
from cocoa_lib.backbone import set_bidirectional
from cocoa_lib.data.tables import Task
from cocoa_lib.embedder import CocoaEmbedder, build_index, mteb_model, search, sentence_transformer
from cocoa_lib.evaluate.score import evaluate, rank, score_ranks
from cocoa_lib.inputs import Inputs
from cocoa_lib.items import InputError
from cocoa_lib.store.checkpoint import CheckpointError, add_scores, read_meta, save_checkpoint

README = Path(__file__).resolve().parent.parent / "README.md"
MODULES = '[{"idx": 0, "name": "0", "path": "", "type": "cocoa_lib.embedder.EosEmbedding"}]'


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    model, inputs = small
    out = tmp_path_factory.mktemp("checkpoint") / "cocoa"
    set_bidirectional(model, True)
    run = {"stage": "stage3", "seed": 7, "data": "d4ta", "parent_sha256": "f00d", "recipe": {"steps": 250}}
    meta = {"stage": "stage3", "layout": "bidirectional", "pooling": "eos", "parent": "stage2/base", "run": run}
    save_checkpoint(out, model, inputs, meta, {"modules.json": MODULES})
    set_bidirectional(model, False)
    return out


@pytest.fixture(scope="module")
def embedder(folder):
    return CocoaEmbedder.load(folder)


def items(picture, n=40):
    odd = [{"text": "word " * (i % 7), "image": picture(16 + 16 * (i % 3), 32, i)} for i in range(n)]
    even = [{"text": f"text {i} " * (i % 5 + 1)} for i in range(n)]
    return [odd[i] if i % 2 else even[i] for i in range(n)]


def test_vectors_are_normalised_and_in_the_order_given(embedder, picture):
    some = items(picture)
    vectors = embedder.encode(some, batch_size=8)
    assert vectors.shape == (40, 64) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for i in (0, 1, 17, 39):
        assert np.allclose(embedder.encode([some[i]])[0], vectors[i], atol=1e-5)


def test_one_item_a_generator_nothing_and_plain_values(embedder, picture):
    whole = embedder.encode([{"text": "a cat"}, {"text": "", "image": picture()}])
    assert np.allclose(embedder.encode("a cat"), whole[0], atol=1e-6) and embedder.encode("a cat").shape == (64,)
    assert np.allclose(embedder.encode(["a cat", picture()]), whole, atol=1e-6)
    assert np.allclose(embedder.encode(x for x in ["a cat", picture()]), whole, atol=1e-6)
    assert embedder.encode([]).shape == (0, 64)


def test_many_windows_equal_one(embedder, picture):
    some = items(picture, 200)
    assert np.allclose(embedder.encode(iter(some), batch_size=1), embedder.encode(some, batch_size=64), atol=1e-5)


def test_the_fingerprint_tells_apart_what_gives_other_vectors(small, embedder, tmp_path):
    """Stored embeddings are found by it; the weights are the same in all of these."""
    model, inputs = small
    shrunk = Inputs(inputs.tokenizer, copy.deepcopy(inputs.image_processor), max_length=inputs.max_length)
    shrunk.limit_images(4)
    seen = []
    for name, layout, used in (
        ("one", "bidirectional", inputs),
        ("two", "causal", inputs),
        ("three", "bidirectional", shrunk),
    ):
        save_checkpoint(tmp_path / name, model, used, {"stage": "stage3", "layout": layout, "pooling": "eos"})
        seen.append(CocoaEmbedder.load(tmp_path / name).fingerprint)
    config = copy.deepcopy(model.config)
    model.config.text_config.rms_norm_eps = 0.5
    save_checkpoint(tmp_path / "four", model, inputs, {"stage": "stage3", "layout": "bidirectional", "pooling": "eos"})
    model.config = config
    seen.append(CocoaEmbedder.load(tmp_path / "four").fingerprint)
    assert len(set(seen)) == 4
    assert CocoaEmbedder.load(tmp_path / "one").fingerprint == seen[0]


def test_a_table_is_not_taken_for_the_names_of_its_columns(embedder):
    with pytest.raises(ValueError, match="DataFrame; give its rows"):
        embedder.encode(pd.DataFrame({"text": ["a", "b"], "image": None}))


def test_truncated_dimension_is_normalised_again(embedder):
    short = embedder.encode(["a cat", "a dog"], truncate_dim=16)
    assert short.shape == (2, 16) and np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_quantised_embeddings_are_sentence_transformers_own_and_are_searched(embedder, picture, precision):
    from sentence_transformers.util.quantization import quantize_embeddings

    some = items(picture, 60)
    floats = embedder.encode(some)
    ranges = np.stack([floats.min(axis=0), floats.max(axis=0)])
    codes = embedder.encode(some, batch_size=1, precision=precision, ranges=ranges)  # one window or many: one scale
    expected = quantize_embeddings(floats, precision, ranges=ranges)
    assert codes.dtype == expected.dtype and codes.shape == expected.shape == (60, 64 if "int8" in precision else 8)
    assert (codes == expected).mean() > 0.95  # a value on the border of two steps may fall on either side
    assert np.array_equal(embedder.encode(some[1], precision=precision, ranges=ranges), codes[1])
    assert embedder.encode([], precision=precision, ranges=ranges).shape == (0, codes.shape[1])
    scores, rows = search(floats, expected, k=1, ranges=ranges)
    if "int8" in precision:
        assert np.allclose(scores[:, 0], 1, atol=0.02), "what is read back is close to what was put in"
        own = np.einsum("ij,ij->i", floats[rows[:, 0]], floats)
        assert (own > 0.998).all(), "only near-copies change places"
    else:  # the sign vector closest to one's own: mean of |x| over sqrt(H)
        signs = np.where(floats > 0, 1, -1) / 8
        assert np.allclose(scores[:, 0], (floats @ signs.T).max(axis=1), atol=1e-6)


def test_scales_must_be_given(embedder):
    with pytest.raises(ValueError, match="int8 needs ranges"):
        embedder.encode(["a cat"], precision="int8")
    with pytest.raises(ValueError, match="'int3' is not supported"):
        embedder.encode(["a cat"], precision="int3")


def test_a_bad_item_is_named_by_its_place_and_its_file(embedder, picture, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    many = [{"text": "a " * i} for i in range(1, 201)]  # three windows of batches by length
    for at, bad, message in (
        (1, {"text": ""}, "item 1: neither text nor image"),
        (150, {"text": "", "image": "none.png"}, "item 150: none.png: no such image file"),
        (70, {"text": "x", "image": tmp_path / "empty.png"}, "item 70: .*empty.png: not a readable image"),
        (199, "half a pair \ud800", "item 199: the text is not valid Unicode"),
        (3, {"text": 3}, "item 3: text must be a string, found int"),
        (9, Image.new("1", (10_000, 10_000)), "item 9: the given image: 10000 x 10000 pixels is over the limit"),
        (5, {"text": "<|image_1|><|image_2|>", "image": picture()}, r"item 5: text marks 2 image\(s\) but 1"),
    ):
        with pytest.raises(InputError, match=message):
            embedder.encode([*many[:at], bad, *many[at + 1 :]], batch_size=1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_items_are_skipped_with_a_word_and_stop_no_other(embedder, picture, tmp_path, caplog):
    torn, huge = tmp_path / "torn.png", tmp_path / "huge.png"
    torn.write_bytes(b"\x89PNG\r\n")
    Image.new("1", (10_000, 10_000)).save(huge)
    some = items(picture, 20)
    whole = embedder.encode(some, batch_size=8)
    some[3], some[11], some[12] = {"text": "a", "image": torn}, {"text": "", "image": str(huge)}, {"text": ""}
    vectors = embedder.encode(some, batch_size=8, on_bad_item="skip")
    bad = np.isin(np.arange(20), [3, 11, 12])
    assert np.isnan(vectors[bad]).all() and np.allclose(vectors[~bad], whole[~bad], atol=1e-5)
    said = sorted(record.getMessage().split(": ")[:2] for record in caplog.records)
    assert [line[0] for line in said] == [f"item {i} is left out" for i in (11, 12, 3)] and said[2][1] == str(torn)
    scores, rows = search(vectors[0], vectors, k=20)
    assert set(rows[0]) == {-1, *np.flatnonzero(~bad)} and scores[0, 0] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="no NaN to mark"):
        embedder.encode(some, on_bad_item="skip", precision="binary")
    with pytest.raises(ValueError, match="'stop' or 'skip'"):
        embedder.encode(some, on_bad_item="ignore")


def test_workers_change_no_vector_and_no_random_state(embedder, picture, tmp_path, monkeypatch):
    some, used = items(picture, 20), []
    loader = library.DataLoader
    monkeypatch.setattr(library, "DataLoader", lambda *a, **k: used.append(k["num_workers"]) or loader(*a, **k))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert np.array_equal(embedder.encode(some, batch_size=4, workers=2), embedder.encode(some, batch_size=4))
    assert torch.equal(torch.get_rng_state(), before) and used == [2, 0]
    some[7] = {"text": "", "image": tmp_path / "missing.png"}
    with pytest.raises(InputError, match=r"item 7: .*missing.png: no such image file") as error:
        embedder.encode(some, batch_size=4, workers=2)
    assert error.value.item == 7


def test_only_for_a_gpu_is_memory_pinned(embedder, picture, monkeypatch):
    some, used = items(picture, 8), []
    whole, loader = embedder.encode(some, batch_size=4), library.DataLoader
    monkeypatch.setattr(library, "DataLoader", lambda *a, pin_memory, **k: used.append(pin_memory) or loader(*a, **k))
    embedder.encode(some, batch_size=4)
    encode, device = CocoaEmbedder._encode_batch, CocoaEmbedder._device  # as on a GPU, but for the model's own pass
    monkeypatch.setattr(CocoaEmbedder, "_device", lambda self: torch.device("cuda"))

    def on_the_cpu(self, batch):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CocoaEmbedder, "_device", device)
            return encode(self, batch)

    monkeypatch.setattr(CocoaEmbedder, "_encode_batch", on_the_cpu)
    assert np.array_equal(embedder.encode(some, batch_size=4), whole) and used == [False, True]


def test_a_megabyte_of_text_is_cut_and_embedded(embedder):
    small, large = "a cat and a dog, " * 1000, "a cat and a dog, " * 62_000
    assert len(large) > 1_000_000
    assert np.allclose(embedder.encode(large), embedder.encode(small), atol=1e-6), "both are cut to the same beginning"
    assert not np.allclose(embedder.encode(large), embedder.encode("a cat"), atol=1e-3)


def test_a_hundred_thousand_items_are_held_a_window_at_a_time():
    alive, peak = 0, 0

    class Item(dict):
        def __init__(self, **fields):
            nonlocal alive, peak
            super().__init__(**fields)
            alive += 1
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    class Module(torch.nn.Linear):  # number n becomes the angle n / 100,000
        inputs = SimpleNamespace(
            max_length=64,
            tokenizer=lambda texts, **_: {"input_ids": [[0] * (int(text) % 9) for text in texts]},
            collate=lambda items: {"x": torch.tensor([float(item["text"]) for item in items])},
        )

        def forward(self, batch):
            angle = batch["x"] / 100_000
            return {"sentence_embedding": torch.stack([angle.cos(), angle.sin()], dim=1)}

        def get_embedding_dimension(self):
            return 2

    embedder = CocoaEmbedder(Module(1, 1))
    vectors = embedder.encode((Item(text=str(n)) for n in range(100_000)), batch_size=8)
    assert vectors.shape == (100_000, 2)
    assert np.allclose(np.arctan2(vectors[:, 1], vectors[:, 0]) * 100_000, np.arange(100_000), atol=0.1), "order kept"
    assert peak <= 2 * 64 * 8, "one window is encoded while the next is read, and no more is held"


def test_search_finds_by_cosine_and_ties_in_order():
    corpus = np.eye(4, dtype=np.float32)[[0, 1, 2, 0]]
    scores, index = search(np.eye(4, dtype=np.float32)[:2], corpus, k=3)
    assert set(index[0, :2]) == {0, 3} and index[1, 0] == 1 and np.allclose(scores[:, 0], 1)
    assert search(corpus, corpus, k=99)[1].shape == (4, 4)
    assert search(corpus[0], corpus, k=1)[1].shape == (1, 1), "one query"
    assert search(corpus, corpus[:0])[1].shape == (4, 0), "nothing to find"


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_search_in_blocks_is_sorting_everything(block, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", block)
    rng = np.random.default_rng(0)
    queries, corpus = rng.normal(size=(7, 16)).astype(np.float32), rng.normal(size=(53, 16)).astype(np.float32)
    every = queries @ corpus.T
    scores, rows = search(queries, corpus, k=12)
    assert np.array_equal(rows, np.argsort(-every, axis=1)[:, :12])
    assert np.allclose(scores, -np.sort(-every, axis=1)[:, :12], atol=1e-5)


def test_search_reads_a_file_larger_than_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", 64)
    rng = np.random.default_rng(0)
    corpus = np.lib.format.open_memmap(tmp_path / "corpus.npy", mode="w+", dtype=np.float32, shape=(5000, 8))
    corpus[:] = rng.normal(size=corpus.shape)
    seen = []
    floats = library.as_floats
    monkeypatch.setattr(library, "as_floats", lambda part, *rest: seen.append(len(part)) or floats(part, *rest))
    assert search(np.array(corpus[4321]) * 9, np.load(tmp_path / "corpus.npy", mmap_mode="r"), k=3)[1].shape == (1, 3)
    assert max(seen) == 8 * 64 and sum(seen) == 5000


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(embedder, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, found {batch_size}"):
        embedder.encode(["a", "b"], batch_size=batch_size)


def test_search_refuses_what_does_not_fit():
    vectors = np.eye(16, dtype=np.float32)
    for corpus in (vectors[:, :8], np.zeros((3, 16), dtype=np.int8), np.zeros((3, 4), dtype=np.uint8)):
        with pytest.raises(ValueError, match=r"queries have 16 dimensions, the corpus has shape"):
            search(vectors, corpus)
    with pytest.raises(ValueError, match="k must be at least 1"):
        search(vectors, vectors, k=0)


def test_an_index_finds_what_the_matrix_product_finds():
    pytest.importorskip("faiss", reason="the extra `search` is not installed: pip install faiss-cpu")
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(2000, 32)).astype(np.float32)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    queries = corpus[:50] + 0.01
    scores, rows = search(queries, corpus, k=5)
    found, exact = search(queries, corpus, k=5, index=build_index(corpus, "Flat"))
    assert np.array_equal(rows, exact) and np.allclose(scores, found, atol=1e-5)
    index = build_index(corpus)
    shared = [len(set(a) & set(b)) for a, b in zip(rows, search(queries, corpus, k=5, index=index)[1], strict=True)]
    assert np.mean(shared) > 4.5, "approximate, but nearly all are found"
    assert search(queries, corpus, k=5, index=build_index(corpus, "IVF8,SQ8"))[1].shape == (50, 5), "trained ones too"
    with pytest.raises(ValueError, match="the index holds 2000 vectors, the corpus 10"):
        search(queries, corpus[:10], index=index)


def test_without_faiss_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'cocoa-notebooks\[search\]'"):
        build_index(np.eye(2, dtype=np.float32))


def test_an_altered_or_incomplete_checkpoint_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="weights do not match cocoa.json"):
        CocoaEmbedder.load(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        CocoaEmbedder.load(copy)
    (copy / "cocoa.json").unlink()
    with pytest.raises(CheckpointError, match="no cocoa.json"):
        CocoaEmbedder.load(copy)


@pytest.mark.parametrize(
    "name", ["cocoa.json", "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
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


@pytest.mark.parametrize("column", ["qry_img_path", "tgt_img_path"])
def test_a_damaged_picture_of_a_benchmark_names_its_row(embedder, picture, tmp_path, column):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nthen nothing")
    picture(16, 16, 0).save(tmp_path / "images" / "whole.png")
    rows = [
        {
            "qry_text": f"query {i}",
            "qry_img_path": "whole.png",
            "tgt_text": ["a", "b"],
            "tgt_img_path": ["", "whole.png"],
        }
        for i in range(9)
    ]
    rows[6][column] = "torn.png" if column == "qry_img_path" else ["", "torn.png"]
    (tmp_path / "WebQA").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "WebQA" / "test-00000-of-00001.parquet")
    task = Task("WebQA", "retrieval", True, 2)
    with pytest.raises(InputError, match=rf"WebQA, row 6, column {column}: .*torn\.png"):
        evaluate(embedder, str(tmp_path), tasks=(task,), show_progress=False)


def test_a_checkpoint_without_hashes_of_its_files_is_still_read(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    meta = json.loads((copy / "cocoa.json").read_text())
    assert set(meta.pop("files_sha256")) == {path.name for path in folder.glob("*.json")} - {"cocoa.json"}
    (copy / "cocoa.json").write_text(json.dumps(meta))
    CocoaEmbedder.load(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json: not valid JSON"):
        CocoaEmbedder.load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        CocoaEmbedder.load(copy)


def test_the_model_card_says_how_it_was_made_and_takes_scores(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    card = (copy / "README.md").read_text(encoding="utf-8")
    for fact in ("stage2/base", "f00d", "d4ta", "- seed: 7\n", "steps 250", read_meta(folder)["weights_sha256"]):
        assert fact in card, fact
    assert "Not evaluated yet" in card and ": None\n" not in card
    for scores in ("| overall | 12.3 |", "| overall | 45.6 |"):
        add_scores(copy, scores)
    again = (copy / "README.md").read_text(encoding="utf-8")
    assert again.endswith("## Scores\n\n| overall | 45.6 |\n") and "12.3" not in again and "Not evaluated" not in again
    assert again.split("## Scores")[0] == card.split("## Scores")[0]
    assert not list(copy.glob(".*")) and CocoaEmbedder.load(copy).encode("a cat").shape == (64,)


# With sentence-transformers and mteb


@pytest.mark.filterwarnings("ignore")
def test_the_folder_opens_as_a_sentence_transformers_model(folder, embedder, picture):
    from sentence_transformers import SentenceTransformer

    flagged = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for model in (flagged, sentence_transformer(folder, device="cpu")):
        for item in ("a cat", {"text": "what is it", "image": picture()}, picture(32, 48)):
            assert np.allclose(model.encode([item])[0], embedder.encode([item])[0], atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):  # once this opens, the README can be shorter
        SentenceTransformer(str(folder), device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_what_sentence_transformers_saves_is_a_checkpoint_again(folder, embedder, tmp_path):
    model = sentence_transformer(folder, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "modules.json").read_text())[0]["type"] == "cocoa_lib.embedder.EosEmbedding"
    assert np.allclose(CocoaEmbedder.load(tmp_path / "saved").encode("a cat"), embedder.encode("a cat"), atol=1e-6)
    with pytest.raises(CheckpointError, match="never written over"):
        model.save_pretrained(str(tmp_path / "saved"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.filterwarnings("ignore")
def test_what_sentence_transformers_keeps_beside_the_model_comes_along(folder, tmp_path):
    model = sentence_transformer(folder, device="cpu")
    model.prompts, model.default_prompt_name, model.truncate_dim = {"query": "find: "}, "query", 32
    assert model.max_seq_length == model[0].inputs.max_length == 256
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformer(tmp_path / "saved", device="cpu")
    assert again.encode(["a cat"]).shape == (1, 32) and np.allclose(again.encode(["a cat"]), model.encode(["a cat"]))
    again.max_seq_length = 8
    assert again[0].preprocess(["a cat " * 9])["input_ids"].shape == (1, 8)
    found = json.loads((tmp_path / "saved" / "modules.json").read_text())
    (tmp_path / "saved" / "modules.json").write_text(json.dumps([*found, {"idx": 1, "type": "a.Dense"}]))
    with pytest.raises(ValueError, match=r"several modules \(.*a.Dense\); open it by SentenceTransformer"):
        sentence_transformer(tmp_path / "saved")


@pytest.mark.filterwarnings("ignore")
def test_a_model_saved_without_a_record_keeps_its_attention(small, tmp_path):
    from sentence_transformers import SentenceTransformer

    model, inputs = small  # causal
    made = SentenceTransformer(modules=[library.EosEmbedding(model, inputs)], device="cpu")
    made.save_pretrained(str(tmp_path / "saved"))
    assert np.allclose(CocoaEmbedder.load(tmp_path / "saved").encode("a cat"), made.encode(["a cat"])[0], atol=1e-6)


def retrieval_set(embedder, picture, n=24):
    """Texts, pictures that answer them, and our ranks of the right picture among all."""
    queries, pictures = [f"a red circle and {i} dogs" for i in range(n)], [picture(32, 32, i) for i in range(n)]
    lists = [np.r_[i, np.delete(np.arange(n), i)] for i in range(n)]
    ranks = rank(embedder.encode(queries), embedder.encode(pictures), lists)
    assert ranks["rank"].nunique() > 5, "a ranking to compare"
    return queries, pictures, {row["metric"]: row["value"] / 100 for row in score_ranks(ranks["rank"])}


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_retrieval_evaluator_agrees(folder, embedder, picture):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    queries, pictures, ours = retrieval_set(embedder, picture)
    evaluator = InformationRetrievalEvaluator(
        {f"q{i}": text for i, text in enumerate(queries)},
        {f"d{i}": image for i, image in enumerate(pictures)},
        {f"q{i}": {f"d{i}"} for i in range(len(queries))},
        mrr_at_k=[len(pictures)], ndcg_at_k=[10], accuracy_at_k=[1, 5], map_at_k=[1], precision_recall_at_k=[1],
        batch_size=8, write_csv=False,
    )  # fmt: skip
    found = evaluator(sentence_transformer(folder, device="cpu"))
    theirs = {"p@1": "accuracy@1", "hit@5": "accuracy@5", "mrr": f"mrr@{len(pictures)}", "ndcg@10": "ndcg@10"}
    assert ours == pytest.approx({name: found[f"cosine_{key}"] for name, key in theirs.items()}, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_mteb_agrees_on_a_local_task(folder, embedder, picture):
    mteb = pytest.importorskip("mteb", reason="the extra `mteb` is not installed: pip install mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    queries, pictures, ours = retrieval_set(embedder, picture)
    rows = {
        "queries": Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(queries)]),
        "corpus": Dataset.from_list([{"id": f"d{i}", "image": image} for i, image in enumerate(pictures)]),
        "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(len(queries))},
        "top_ranked": None,
    }

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalPictures", description="texts and pictures", reference="https://example.org", type="Any2AnyRetrieval",
            dataset={"path": "local", "revision": "1"}, category="t2i", modalities=["text", "image"],
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
        )  # fmt: skip

        def load_data(self, **_):
            self.dataset, self.data_loaded = {"default": {"test": rows}}, True

    model = mteb_model(folder, device="cpu")
    assert model.mteb_model_meta.revision == read_meta(folder)["weights_sha256"]
    result = mteb.evaluate(
        model, Local(), cache=None, encode_kwargs={"batch_size": 8, "show_progress_bar": False}, show_progress_bar=False
    )
    found = result.task_results[0].scores["test"][0]
    theirs = {"p@1": "hit_rate_at_1", "hit@5": "hit_rate_at_5", "mrr": "mrr_at_1000", "ndcg@10": "ndcg_at_10"}
    assert ours == pytest.approx({name: found[key] for name, key in theirs.items()}, abs=1e-4)  # mteb rounds


def test_the_readmes_lines_run(folder, picture, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/laptop/seed0/stage3/cocoa")
    Path("my/pictures").mkdir(parents=True)
    for i in range(6):
        picture(seed=i).save(f"my/pictures/{i}.png")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5 and all(line.endswith(".png") for line in lines)
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
