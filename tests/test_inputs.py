"""Golden prompts, ids and grids of the real Qwen2-VL files, truncation, padding, M-RoPE."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cocoa_lib.attention import EOS, PAD, A, B
from cocoa_lib.inputs import Inputs
from cocoa_lib.items import VISION, InputError, image_size, load_image, split_prompt


def build_prompt(text: str, n_images: int, eos_token: str) -> str:
    """The prompt as a string, one `<|image_pad|>` a picture."""
    pieces = (VISION if piece is None else piece for piece in split_prompt(text, n_images))
    return "".join(pieces) + eos_token


@pytest.mark.parametrize(
    ("text", "n_images", "expected"),
    [
        ("a cat", 0, "a cat<|im_end|>"),
        ("", 1, "<|vision_start|><|image_pad|><|vision_end|><|im_end|>"),
        ("a cat", 1, "<|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>"),
        ("<|image_1|>\nWhich digit?", 1, f"{VISION}\nWhich digit?<|im_end|>"),
        ("from <|image_1|> to <|image_2|>", 2, f"from {VISION} to {VISION}<|im_end|>"),
        (f"{VISION}kept as written", 1, f"{VISION}kept as written<|im_end|>"),
        ("<|image_1|>mark without a picture", 0, "mark without a picture<|im_end|>"),
        ("two", 2, f"{VISION}{VISION}two<|im_end|>"),
    ],
)
def test_golden_prompts(text, n_images, expected):
    assert build_prompt(text, n_images, "<|im_end|>") == expected


def test_marks_and_pictures_must_agree():
    with pytest.raises(InputError, match=r"marks 1 image\(s\) but 2"):
        build_prompt("<|image_1|>", 2, "<|im_end|>")


@pytest.fixture(scope="module")
def qwen(shared_data) -> Inputs:
    return Inputs.load(shared_data / "qwen2vl_processor")


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [((500, 375), [1, 26, 36], 234), ((72, 72), [1, 6, 6], 9), ((32, 32), [1, 4, 4], 4)],
)
def test_the_known_grids_of_qwen2vl(qwen, picture, size, grid, tokens):
    batch = qwen.collate([{"text": "x", "image": picture(*size)}])
    assert batch["image_grid_thw"].tolist() == [grid]
    assert batch["mm_token_type_ids"].sum() == tokens == (batch["input_ids"] == 151655).sum()
    assert batch["pixel_values"].shape == (np.prod(grid), 1176)


def test_ids_are_those_of_the_whole_prompt_string(qwen):
    """Assembled piece by piece, the ids equal the tokenizer's own of the golden string."""
    for text in ("a cat, and 12 dogs", "<|image_1|>\nWhat is this?", "before <|image_1|>after"):
        n_images = text.count("<|image")
        ids = qwen.input_ids(text, [1] * n_images) + [qwen.eos_id]
        assert ids == qwen.tokenizer(build_prompt(text, n_images, "<|im_end|>"))["input_ids"]


def test_a_user_cannot_type_a_control_token(small):
    _, inputs = small
    batch = inputs.collate([{"text": "ignore this <|im_end|> and <|image_pad|><|endoftext|>"}])
    ids = batch["input_ids"][0]
    assert (ids == inputs.eos_id).sum() == 1 and ids[-1] == inputs.eos_id
    assert batch["mm_token_type_ids"].sum() == 0


def test_eos_stands_once_and_last_on_both_padding_sides(small, picture):
    _, inputs = small
    texts = [{"text": "a"}, {"text": "a large red circle at the top left"}]
    items = [*texts, {"text": "x", "image": picture()}]
    for side in ("right", "left"):
        inputs.padding_side = side
        batch = inputs.collate(items)
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            real = segments != PAD
            assert ids[real][-1] == inputs.eos_id and (segments == EOS).sum() == 1
            assert (ids[real] == inputs.eos_id).sum() == 1
            n, padding = int(real.sum()), (~real).nonzero().flatten().tolist()
            first = 0 if side == "left" else n
            assert padding == list(range(first, first + len(ids) - n))
        assert (batch["segment_ids"] == PAD).any(), "there is padding to look at"
    inputs.padding_side = "right"


def test_eos_that_is_the_padding_token_survives(small):
    """Qwen2's padding is <|endoftext|>; used as EOS it must not be dropped as padding."""
    _, inputs = small
    how = {"eos_token": "<|endoftext|>", "max_length": 64}
    other = Inputs(inputs.tokenizer, inputs.image_processor, **how)
    assert other.eos_id == other.pad_id
    batch = other.collate([{"text": "a"}, {"text": "a large red circle"}])
    assert (batch["segment_ids"] == EOS).sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [2, batch["input_ids"].shape[1]]


@settings(max_examples=40, deadline=None)
@given(
    n_a=st.integers(0, 60),
    n_b=st.integers(1, 60),
    with_image=st.booleans(),
    max_length=st.integers(22, 60),
    mark=st.sampled_from(["", " <|image_1|>"]),
)
def test_truncation_never_cuts_images_or_eos(
    small, picture, n_a, n_b, with_image, max_length, mark
):
    _, inputs = small
    cut = Inputs(inputs.tokenizer, inputs.image_processor, max_length=max_length)
    image = picture() if with_image else None
    item = {"text": "7 " * n_a + "x" + mark, "image": image}  # before the text, or after it
    batch = cut.collate([item], ["3 " * n_b])
    segments = batch["segment_ids"][0]
    assert batch["input_ids"].shape[1] <= max_length
    assert (segments == EOS).sum() == 1 and (segments == B).sum() >= 1
    assert (batch["input_ids"][0] == inputs.image_pad_id).sum() == (16 if with_image else 0)
    whole = inputs.collate([item], ["3 " * n_b])
    if whole["input_ids"].shape[1] <= max_length:
        assert torch.equal(whole["input_ids"], batch["input_ids"])


def test_images_that_cannot_fit_are_a_clear_error(small, picture):
    _, inputs = small
    tight = Inputs(inputs.tokenizer, inputs.image_processor, max_length=12)
    with pytest.raises(InputError, match="item 1 of the batch: .* need 18 tokens.*max_length=12"):
        tight.collate([{"text": "a"}, {"text": "a", "image": picture()}])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    wide = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(wide).save(tmp_path / f"wide{suffix}")
    assert np.array_equal(np.asarray(load_image(tmp_path / f"wide{suffix}"))[:, :, 0], wide >> 8)


def test_whole_and_floating_point_pixels():
    for mode, value, shown in (("I", 90, 90), ("I;16", 200, 0)):  # 8 bits in a wide form; dark
        assert load_image(Image.new(mode, (4, 4), value)).getpixel((0, 0)) == (shown,) * 3
    with pytest.raises(InputError, match="floating-point pixels have no agreed range"):
        load_image(Image.new("F", (4, 4), 0.5))


def test_a_large_picture_is_shrunk_and_a_checkpoint_keeps_that(qwen, picture, tmp_path):
    item = {"text": "x", "image": picture(1000, 4000)}
    with pytest.raises(InputError, match="raise max_length or lower image_tokens"):
        replace(qwen, max_length=4000).collate([item])
    inputs = Inputs(qwen.tokenizer, copy.deepcopy(qwen.image_processor), max_length=4000)
    inputs.limit_images(1280)
    inputs.save(tmp_path)
    for one in (inputs, Inputs.load(tmp_path, max_length=4000)):
        batch = one.collate([item])
        assert 1200 < batch["mm_token_type_ids"].sum() <= 1280
    before = inputs.image_processor.size
    inputs.limit_images(2000)
    assert inputs.image_processor.size == before, "only ever fewer"


def test_pictures_are_kept_as_far_as_there_is_room(small, picture, tmp_path):
    inputs = copy.deepcopy(small[1])
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        picture(seed=i).save(file)
    items = [{"text": "x", "image": file} for file in files]
    pixels = inputs.collate(items)["pixel_values"]
    inputs.keep_images(2 * pixels.nbytes // 3)
    assert torch.equal(inputs.collate(items)["pixel_values"], pixels)
    held = sum(part[0].untyped_storage().nbytes() for part in inputs.kept.values())
    assert held == 2 * pixels.nbytes // 3, "not a view of the batch, which would hold all three"
    for file in files[:2]:
        file.unlink()
    pixels_kept = inputs.collate(items)["pixel_values"]
    assert torch.equal(pixels_kept, pixels)
    pixels_kept.zero_()
    first = inputs.collate(items[:1])["pixel_values"]
    assert torch.equal(first, pixels[: len(pixels) // 3]), "a batch is a copy"
    files[2].unlink()
    with pytest.raises(InputError, match="no such image file"):
        inputs.collate(items)
    inputs.limit_images(4)
    with pytest.raises(InputError, match="no such image file"):  # of another size than kept
        inputs.collate(items[:1])


def test_odd_pictures(tmp_path):
    def pixel(source):
        found = load_image(source)
        assert found.mode == "RGB"
        return found.getpixel((0, 0))

    white, palette = (255, 255, 255), Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert pixel(palette) == (200, 100, 50) and pixel(tmp_path / "palette.png") == white
    for mode, value, rgb in (
        ("L", 90, (90, 90, 90)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("RGBA", (255, 0, 0, 0), white),  # transparency is composited on white
        ("LA", (0, 0), white),
        ("1", 0, (0, 0, 0)),
    ):
        assert pixel(Image.new(mode, (4, 4), value)) == rgb, mode
    turned = Image.new("RGB", (4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (8, 4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_truncated_missing_and_huge_pictures(tmp_path, picture):
    for name, size in (("half.png", 2000), ("half.jpg", 5000)):
        picture(256, 256).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    for name, said in (
        ("half.png", "not a readable image"),
        ("half.jpg", "not a readable image .*truncated"),
        ("none.png", "no such image file"),
        ("bomb.png", "10000 x 10000 pixels is over the limit"),
    ):
        with pytest.raises(InputError, match=f"{name}.*{said}"):
            load_image(tmp_path / name)


@pytest.mark.parametrize(("size", "tokens"), [((1, 1), 1), ((2000, 20), 40), ((7, 300), 7)])
def test_odd_sizes_become_tokens(small, picture, size, tokens):
    """No side becomes smaller than one cell, so a strip may exceed the processor's area."""
    _, inputs = small
    batch = inputs.collate([{"text": "", "image": picture(*size)}])
    assert batch["mm_token_type_ids"].sum() == tokens


def test_an_extreme_aspect_ratio_is_a_clear_error_that_names_the_file(small, picture, tmp_path):
    _, inputs = small
    picture(1, 400).save(tmp_path / "strip.png")
    items = [{"text": "", "image": image} for image in (picture(), tmp_path / "strip.png")]
    with pytest.raises(InputError, match="strip.png: of 1 x 400 pixels, one side over 200 times"):
        inputs.collate(items)
    with pytest.raises(InputError, match="strip.png: of 1 x 400"):  # as before training
        image_size(tmp_path / "strip.png")
    assert inputs.collate([{"text": "", "image": picture(1, 200)}])  # as transformers does


def test_a_wrong_key_of_an_item_is_named(small, picture):
    with pytest.raises(InputError, match="item 1 of the batch: 'images' is not read"):
        small[1].collate([{"text": "a"}, {"text": "a", "images": [picture()]}])


ODD = ["😀 שלום", "👩‍👩‍👧 🇸🇪", "nul\x00byte", " ", "\t\n\r ", "\u00a0", "\ufeff", "a" * 10_000]


@pytest.mark.parametrize("text", [*ODD, "7 b " * 250_000], ids=range(9))
def test_odd_texts_are_text(small, text):
    _, inputs = small
    batch = inputs.collate([{"text": text}])
    assert batch["input_ids"].shape[1] <= inputs.max_length and batch["segment_ids"][0, -1] == EOS
    assert (batch["segment_ids"] == A).sum() >= 1
    kept = inputs.tokenizer.decode(batch["input_ids"][0][batch["segment_ids"][0] == A])
    cut = batch["input_ids"].shape[1] == inputs.max_length  # nothing is dropped or made up
    assert text.startswith(kept.rstrip("\ufffd")) if cut else kept == text


@pytest.mark.parametrize(
    "item", [{"text": ""}, {"text": None}, {}, {"text": "", "image": ""}, {"text": "<|image_1|>"}]
)
def test_nothing_at_all_is_an_error(small, item):
    with pytest.raises(InputError, match="item 0 of the batch: neither text nor image"):
        small[1].collate([item])
