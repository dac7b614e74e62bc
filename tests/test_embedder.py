"""The user's object: any items in, normalised vectors out, in order; the README's ten lines run as written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cocoa_lib.backbone import set_bidirectional
from cocoa_lib.checkpoint import CheckpointError, save_checkpoint
from cocoa_lib.embedder import CocoaEmbedder, search
from cocoa_lib.inputs import InputError

README = Path(__file__).resolve().parent.parent / "README.md"
MODULES = '[{"idx": 0, "name": "0", "path": "", "type": "cocoa_lib.embedder.EosEmbedding"}]'


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    model, inputs = small
    out = tmp_path_factory.mktemp("checkpoint") / "cocoa"
    set_bidirectional(model, True)
    meta = {"stage": "stage3", "layout": "bidirectional", "pooling": "eos"}
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


def test_truncated_dimension_is_normalised_again(embedder):
    short = embedder.encode(["a cat", "a dog"], truncate_dim=16)
    assert short.shape == (2, 16) and np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)


def test_a_bad_item_is_named(embedder):
    with pytest.raises(InputError, match="neither text nor image"):
        embedder.encode([{"text": "a"}, {"text": ""}])
    with pytest.raises(InputError, match="none.png: no such image file"):
        embedder.encode([{"text": "", "image": "none.png"}])


def test_search_finds_by_cosine_and_ties_in_order():
    corpus = np.eye(4, dtype=np.float32)[[0, 1, 2, 0]]
    scores, index = search(np.eye(4, dtype=np.float32)[:2], corpus, k=3)
    assert set(index[0, :2]) == {0, 3} and index[1, 0] == 1 and np.allclose(scores[:, 0], 1)
    assert search(corpus, corpus, k=99)[1].shape == (4, 4)


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


@pytest.mark.filterwarnings("ignore")
def test_the_folder_opens_as_a_sentence_transformers_model(folder, embedder, picture):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for item in ("a cat", {"text": "what is it", "image": picture()}, picture(32, 48)):
        assert np.allclose(model.encode([item])[0], embedder.encode([item])[0], atol=1e-5)


def test_the_readmes_lines_run(folder, picture, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
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
