"""Whatever stands in a file or an item, the outcome is a value or an error of this project that says where.

hypothesis makes rows, pictures, texts, profiles, tables and checkpoints' notes; never may a library's own error come out.
"""

from __future__ import annotations

import io
import json
import shutil

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
from cocoa_lib.data.tables import fingerprint, load_eval
from cocoa_lib.evaluate.tasks import list_known
from cocoa_lib.items import InputError, load_image
from cocoa_lib.recipes import RECIPES, Recipe, RecipeError, make_recipe
from cocoa_lib.run.profiles import load_profile, read_arms
from cocoa_lib.store.checkpoint import CheckpointError, load_inputs, read_meta, save_checkpoint


def bounded(n):
    """`n` examples, the same in every run. Function-scoped fixtures are folders that every example writes anew."""
    return settings(
        max_examples=n, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


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


# --- rows --------------------------------------------------------------------------------------------------------------

UTF8 = st.text(max_size=6)
KINDS = {
    "string": (pa.string(), UTF8 | st.none()),
    "large_string": (pa.large_string(), UTF8),
    "list": (pa.list_(pa.string()), st.lists(UTF8 | st.none(), max_size=3) | st.none()),
    "int": (pa.int64(), st.integers(-9, 9) | st.none()),
    "binary": (pa.binary(), st.binary(max_size=4)),
    "ints": (pa.list_(pa.int64()), st.lists(st.integers(0, 9), max_size=2)),
    "struct": (pa.struct([("path", pa.string())]), st.fixed_dictionaries({"path": UTF8})),
    "null": (pa.null(), st.none()),
}


@st.composite
def tables(draw, columns):
    """A table with most of these columns, mostly of the right kind, and 0 to 4 rows."""
    rows, arrays = draw(st.integers(0, 4)), {}
    for name, right in columns.items():
        kind = draw(st.sampled_from([right] * 12 + [*KINDS, None]))
        if kind is not None:
            type_, values = KINDS[kind]
            arrays[name] = pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), type_)
    return pa.table(arrays) if arrays else pa.table({"other": pa.array([1] * rows)})


EVAL = {"qry_text": "string", "qry_img_path": "string", "tgt_text": "list", "tgt_img_path": "list"}
TRAIN = {
    "qry": "string",
    "qry_image_path": "string",
    "pos_text": "string",
    "pos_image_path": "string",
    "neg_text": "string",
}
CORPUS = {"image_path": "string", "kind": "string", "question": "string", "answer": "string"}


def parquet(root, name, table, damage=None):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    if damage is not None:
        content = bytearray(path.read_bytes())
        for at, value in damage:
            content[at % len(content)] = value
        path.write_bytes(content[: max(1, len(content) - damage[0][0] % 3)])
    return path


DAMAGE = st.none() | st.none() | st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4)


@bounded(40)
@given(table=tables(EVAL), damage=DAMAGE)
def test_evaluation_rows(tmp_path, table, damage):
    path = parquet(tmp_path, "eval/T/test-0.parquet", table, damage)
    try:
        rows = load_eval(str(tmp_path), "T")
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error)
        return
    for row in rows:
        assert (row["qry_text"] or row["qry_img_path"]) and len(row["tgt_text"]) == len(row["tgt_img_path"]) > 0


@bounded(30)
@given(table=tables(TRAIN), damage=DAMAGE)
def test_training_rows(tmp_path, table, damage):
    path = parquet(tmp_path, "train/T/original-0.parquet", table, damage)
    try:
        rows, sizes = corpus.pairs(tmp_path)
    except ValueError as error:
        assert str(path) in str(error) or "not a plain path below" in str(error)
        return
    assert len(rows) == sum(sizes) == table.num_rows


@bounded(30)
@given(table=tables(CORPUS), damage=DAMAGE)
def test_corpus_rows(tmp_path, table, damage):
    path = parquet(tmp_path, "corpus/train.parquet", table, damage)
    try:
        rows = corpus.captions(tmp_path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(row["target"], str) and isinstance(row["text"], str) for row in rows)


@bounded(60)
@given(manifest=VALUE | st.fixed_dictionaries({"tasks": VALUE, "content_hash": VALUE, "settings": VALUE}))
def test_a_data_folders_manifest(tmp_path, manifest):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    for read in (fingerprint, list_known):
        try:
            read(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
    with pytest.raises(ValueError, match="holds other data|expected a JSON object"):
        build_pairs(tmp_path / "table.jsonl", tmp_path, progress=False)


# --- pictures and texts ------------------------------------------------------------------------------------------------


def encoded(kind):
    image = Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    file = io.BytesIO()
    image.save(
        file, kind, **({"exif": exif} if kind != "GIF" else {"save_all": True, "append_images": [image.rotate(9)]})
    )
    return file.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")}


@bounded(400)
@given(
    kind=st.sampled_from(sorted(PICTURES)),
    changes=st.lists(
        st.tuples(st.integers(0, 200) | st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6
    ),
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
@given(
    item=st.dictionaries(st.sampled_from(["text", "image"]), ANY_TEXT | VALUE)
    | st.fixed_dictionaries({"text": ANY_TEXT})
)
def test_items(small, item):
    inputs = small[1]
    try:
        batch = inputs.collate([{"text": "a"}, item])
    except InputError as error:
        assert str(error)
        return
    assert ((batch["segment_ids"] == 2).sum(1) == 1).all() or (batch["input_ids"] == inputs.eos_id).sum() == 2


# --- profiles, arms, recipes --------------------------------------------------------------------------------------------

YAML = st.sampled_from(["stage1: [1]", "stage1: {1: 2}", "stage3: x", "seeds: ]", "? [a]: b", "a: &x [*x]", "\tx", "- 1",
                        "!!python/object:os.system x", "stage1: {steps: 2004-13-45}",
                        "stage1: {steps: 2004-13-40}", "[" * 3000]).map(str.encode)  # fmt: skip


@bounded(120)
@given(content=st.binary(max_size=30) | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | YAML)
def test_profiles(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_profile("odd", tmp_path), dict)
    except RecipeError as error:
        assert len(str(error)) < 5000


@bounded(200)
@given(
    stage=st.sampled_from([*RECIPES, "stage9"]),
    values=VALUE
    | st.dictionaries(st.sampled_from(["steps", "batch_size", "learning_rate", "layout", "preset"]), VALUE),
)
def test_recipes(stage, values):
    try:
        recipe = make_recipe(stage, values)
    except RecipeError as error:
        assert str(error)
        return
    assert isinstance(recipe, Recipe) and recipe.learning_rate >= 0 and recipe.steps >= 1


def test_a_value_that_unfolds_without_end_is_named_in_short(tmp_path):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i + 1} [" + ", ".join([f"*a{i}"] * 8) + "]" for i in range(12)]
    (tmp_path / "odd.yaml").write_text("\n".join(lines) + "\nstage1: {steps: *a12}")
    with pytest.raises(RecipeError) as error:
        make_recipe("stage1", {"steps": __import__("yaml").safe_load((tmp_path / "odd.yaml").read_text())["b11"]})
    assert len(str(error.value)) < 500


@bounded(80)
@given(content=st.binary(max_size=60) | st.dictionaries(ANY_TEXT, VALUE, max_size=4).map(lambda arms: json.dumps(arms).encode()))
def test_arms(tmp_path, content):
    path = tmp_path / "arms.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_arms(path), dict)
    except RecipeError as error:
        assert str(path) in str(error)


# --- a user's table ----------------------------------------------------------------------------------------------------


@bounded(150)
@given(
    suffix=st.sampled_from([".jsonl", ".csv"]),
    content=st.binary(max_size=40)
    | st.lists(st.dictionaries(st.sampled_from(["image", "text", "label"]), VALUE) | VALUE, max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
    | st.sampled_from(
        [b"image,text\n**x,a", b"image,text\n..,a,b", b'image,text\n"a', b"[" * 5000, b"image,text\n\0,a"]
    ),
)
def test_tables_of_a_user(tmp_path, suffix, content):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(row, dict) for row in read_table(path))
    except InputError as error:
        assert str(path) in str(error)
    with pytest.raises(InputError) as error:  # never ten good rows
        build_pairs(path, tmp_path / "data", progress=False)
    assert str(path) in str(error.value) and not (tmp_path / "data").exists()


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    return save_checkpoint(folder, *small, {"stage": "init", "layout": "causal"})


FIELDS = ["stage", "eos_token", "max_length", "weights_sha256", "layout", "pooling", "run", "files_sha256"]


@bounded(100)
@given(change=st.dictionaries(st.sampled_from(FIELDS), VALUE, min_size=1) | st.binary(max_size=20) | VALUE)
def test_the_note_of_a_checkpoint(checkpoint, tmp_path, change):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).hardlink_to(file)
    (folder / "cocoa.json").unlink()
    if isinstance(change, dict):
        change = json.loads((checkpoint / "cocoa.json").read_text(encoding="utf-8")) | change
    (folder / "cocoa.json").write_bytes(change if isinstance(change, bytes) else json.dumps(change).encode())
    try:
        meta = read_meta(folder)
        assert load_inputs(folder, meta).eos_token == meta["eos_token"]
    except (CheckpointError, InputError) as error:
        assert str(error)
