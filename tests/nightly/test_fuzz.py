"""Whatever stands in a file or an item, the outcome is a value or an error of this project that says where.

hypothesis makes rows, pictures, texts, profiles, tables and checkpoints' notes; never may a library's own error come out.
"""

from __future__ import annotations

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cocoa_lib.data import corpus
from cocoa_lib.data.pairs import build_pairs, read_table
from cocoa_lib.data.tables import CORPUS, EVAL, TRAIN, fingerprint, load_eval
from cocoa_lib.items import InputError, load_image
from cocoa_lib.recipes import RecipeError
from cocoa_lib.run.profiles import load_profile, read_arms
from cocoa_lib.store.checkpoint import CheckpointError, read_meta


def bounded(n):
    """`n` examples, the same in every run. Fixtures of a function are folders that each writes anew."""
    quiet = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=n, derandomize=True, deadline=None, suppress_health_check=quiet)


ANY_TEXT = st.text(st.characters(), max_size=12)  # lone surrogates too: JSON can hold them
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """`datasets` keeps a copy of each file it reads: not in the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


UTF8 = st.text(max_size=6)
KINDS = {
    "string": (pa.string(), UTF8 | st.none()),
    "large_string": (pa.large_string(), UTF8),
    "list": (pa.list_(pa.string()), st.lists(UTF8 | st.none(), max_size=3) | st.none()),
    "int": (pa.int64(), st.integers(-9, 9) | st.none()),
    "binary": (pa.binary(), st.binary(max_size=4)),
    "struct": (pa.struct([("path", pa.string())]), st.fixed_dictionaries({"path": UTF8})),
    "null": (pa.null(), st.none()),
}


@st.composite
def tables(draw, columns):
    """A table with most of these columns, mostly of the right kind, and 0 to 4 rows."""
    rows, arrays = draw(st.integers(0, 4)), {}
    for name in columns:
        right = "list" if name.startswith("tgt_") else "string"
        kind = draw(st.sampled_from([right] * 12 + [*KINDS, None]))
        if kind is not None:
            type_, values = KINDS[kind]
            arrays[name] = pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), type_)
    return pa.table(arrays) if arrays else pa.table({"other": pa.array([1] * rows)})


DAMAGE = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4)
ROWS = {
    "eval/T/test-0": (EVAL, lambda root: load_eval(root, "T")[:]),
    "train/T/original-0": (TRAIN[:5], lambda root: corpus.pairs(root)),
    "corpus/train": (CORPUS, lambda root: corpus.captions(root)[:]),
}


@pytest.mark.parametrize("name", ROWS)
@bounded(30)
@given(data=st.data())
def test_rows(tmp_path, name, data):
    columns, read = ROWS[name]
    path = tmp_path / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data.draw(tables(columns)), path)
    content = bytearray(path.read_bytes())
    for at, value in data.draw(DAMAGE):
        content[at % len(content)] = value
    path.write_bytes(content)
    try:
        read(tmp_path)
    except ValueError as error:
        assert str(path.parent) in str(error) or "not a plain path below" in str(error)


@bounded(60)
@given(manifest=VALUE | st.fixed_dictionaries({"content_hash": VALUE, "settings": VALUE}))
def test_a_data_folders_manifest(tmp_path, manifest):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    try:
        assert fingerprint(tmp_path)
    except ValueError as error:
        assert str(path) in str(error)
    with pytest.raises(ValueError, match="holds other data|expected a JSON object"):
        build_pairs(tmp_path / "table.jsonl", tmp_path)


def encoded(kind):
    image = Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    frames = {"save_all": True, "append_images": [image.rotate(9)]}
    file = io.BytesIO()
    image.save(file, kind, **(frames if kind == "GIF" else {"exif": exif}))
    return file.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")}
PLACE = st.integers(0, 200) | st.integers(0, 3000)


@bounded(400)
@given(
    kind=st.sampled_from(sorted(PICTURES)),
    changes=st.lists(st.tuples(PLACE, st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 3000) | st.none(),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged metadata
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_files(tmp_path, kind, changes, cut):
    content = bytearray(PICTURES[kind])
    for at, value in changes:
        content[at % len(content)] = value
    path = tmp_path / "picture"
    path.write_bytes(content[:cut])
    try:
        image = load_image(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    assert image.mode == "RGB" and image.width * image.height <= 64_000_000


@bounded(120)
@given(item=st.dictionaries(st.sampled_from(["text", "image"]), ANY_TEXT | VALUE))
def test_items(small, item):
    inputs = small[1]
    try:
        batch = inputs.collate([{"text": "a"}, item])
    except InputError as error:
        assert str(error)
        return
    assert ((batch["segment_ids"] == 2).sum(1) == 1).all() or (
        batch["input_ids"] == inputs.eos_id
    ).sum() == 2


ODD = ["stage1: [1]", "stage1: {1: 2}", "stage3: x", "seeds: ]", "? [a]: b", "a: &x [*x]", "- 1"]
ODD += ["\tx", "!!python/object:os.system x", "stage1: {steps: 2004-13-45}", "[" * 5000]
ODD += ["image,text\n**x,a", "image,text\n..,a,b", 'image,text\n"a', "image,text\n\0,a"]
RECORDS = st.lists(st.dictionaries(st.sampled_from(["image", "text"]), VALUE) | VALUE, max_size=4)
CONTENT = st.one_of(
    st.binary(max_size=40),
    ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(ODD).map(str.encode),
    RECORDS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
)
READERS = {
    "odd.yaml": (lambda path: load_profile("odd", path.parent), RecipeError),
    "arms.yaml": (read_arms, RecipeError),
    "table.jsonl": (read_table, InputError),
    "table.csv": (read_table, InputError),
    "cocoa.json": (lambda path: read_meta(path.parent, check=False), CheckpointError),
}


@pytest.mark.parametrize("name", READERS)
@bounded(150)
@given(content=CONTENT)
def test_texts(tmp_path, name, content):
    (read, expected), path = READERS[name], tmp_path / name
    path.write_bytes(content)
    try:
        assert isinstance(read(path), dict | list)
    except expected as error:
        assert len(str(error)) < 6000
    if name.startswith("table"):
        with pytest.raises(InputError) as error:  # never ten good rows
            build_pairs(path, tmp_path / "data")
        assert str(path) in str(error.value) and not (tmp_path / "data").exists()
