"""Embeddings on disk: each item once, an interrupted evaluation goes on, processes share the work."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mmeb_files import SMALL, Embedder, make_rows, oracle_vector, random_vector, write_task

from cocoa_lib.evaluate import encode, evaluate
from cocoa_lib.evaluate.encode import encode_distinct, hash_item


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmeb")
    for task in SMALL[:4]:
        write_task(root, task.name, make_rows(task))
    return root


def run(embedder, root, tasks=SMALL[:3], **options):
    return evaluate(embedder, root, tasks=tasks, batch_size=4, show_progress=False, **options)


def test_each_distinct_item_is_encoded_once_in_order_of_length():
    texts = ["long " * 5, "b", "b", "a", "long " * 5]
    items, embedder = [{"text": text, "image": None} for text in texts], Embedder(random_vector)
    vectors = encode_distinct(embedder, items, show_progress=False)
    assert len(embedder.seen) == 3 and embedder.seen[-1][0] == texts[0]
    np.testing.assert_array_equal(vectors, Embedder(random_vector).encode(items, 1, False))


def test_an_interrupted_evaluation_goes_on_and_a_second_one_encodes_nothing(root, tmp_path):
    plain = run(Embedder(random_vector), root)
    cut = Embedder(random_vector, limit=7)
    with pytest.raises(KeyboardInterrupt):
        run(cut, root, cache_dir=tmp_path)
    resumed = Embedder(random_vector)
    pd.testing.assert_frame_equal(run(resumed, root, cache_dir=tmp_path), plain)
    assert len(cut.seen) == 7 * 16 and not set(cut.seen) & set(resumed.seen)
    again = Embedder(random_vector)
    pd.testing.assert_frame_equal(run(again, root, cache_dir=tmp_path), plain)
    assert again.calls == 0
    other = Embedder(oracle_vector, fingerprint="another model")
    assert (run(other, root, cache_dir=tmp_path)["rank"] == 1).all() and other.calls > 0
    with pytest.raises(ValueError, match="fingerprint"):
        run(Embedder(random_vector, fingerprint=""), root, cache_dir=tmp_path)


def test_processes_share_the_work_and_the_pictures_and_give_the_same_table(tmp_path, monkeypatch):
    """Pictures come last in the order, and take the time: 60 of them among 120 texts."""
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    items = [{"text": f"{i}", "image": None} for i in range(120)]
    items += [{"text": "", "image": tmp_path / f"{i}.png"} for i in range(60)]
    meet, local, found = threading.Barrier(4, timeout=30), threading.local(), {}
    embedders = [Embedder(random_vector) for _ in range(4)]

    def process(i):
        how = {"cache_dir": tmp_path / "store", "show_progress": False, "batch_size": 8}
        local.state = SimpleNamespace(process_index=i, num_processes=4, wait_for_everyone=meet.wait)
        found[i] = encode_distinct(embedders[i], items, **how)

    plain = encode_distinct(Embedder(random_vector), items, show_progress=False)
    monkeypatch.setattr(encode, "join_processes", lambda: local.state)
    threads = [threading.Thread(target=process, args=(i,)) for i in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert len(found) == 4 and all(np.array_equal(each, plain) for each in found.values())
    seen = [item for embedder in embedders for item in embedder.seen]
    assert len(seen) == len(set(seen)) == 180, "each item once"
    counts = [sum(name is not None for _, name in embedder.seen) for embedder in embedders]
    assert max(counts) - min(counts) <= 8, counts


def test_a_share_that_is_missing_is_reported(tmp_path, monkeypatch):
    items = [{"text": f"{i}", "image": None} for i in range(100)]
    state = SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr(encode, "join_processes", lambda: state)
    how = {"batch_size": 4, "cache_dir": tmp_path, "show_progress": False}
    with pytest.raises(RuntimeError, match="12 of 25 shards of embeddings are not in"):
        encode_distinct(Embedder(random_vector), items, **how)


def test_keys_follow_content(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(b"1")
    b.write_bytes(b"1")
    key = hash_item({"text": "t", "image": a})
    assert key == hash_item({"text": "t", "image": b}) != hash_item({"text": "u", "image": a})
    a.write_bytes(b"22")
    assert key != hash_item({"text": "t", "image": a}) != hash_item({"text": "t", "image": None})


@pytest.mark.parametrize("shape, value", [((1, 4), np.nan), ((1, 4), 1), ((2, 4), 0.5), ((1,), 1)])
def test_embeddings_that_cannot_be_compared_are_refused_and_not_kept(shape, value, tmp_path):
    embedder = SimpleNamespace(encode=lambda items, **_: np.full(shape, value))
    items = [{"text": "x", "image": None}]
    with pytest.raises(ValueError, match="expected a vector of length 1 an item"):
        encode_distinct(embedder, items, cache_dir=tmp_path, show_progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))
