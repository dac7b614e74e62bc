"""From {text, image} items to one batch: prompts, images, truncation, padding.

An item is a dict `{"text": str, "image": None | path | PIL.Image | list of these}`. A batch is a plain dict of tensors:

    input_ids, attention_mask, mm_token_type_ids, segment_ids   (B, L)
    pixel_values (patches, C * temporal_patch * patch * patch), image_grid_thw (images, 3)   only with images
    num_images_per_sample (B,)

The prompt is the one of CoCoA's stages 1 and 2 and of MoCa, `<|vision_start|><|image_pad|>...<|vision_end|>text`, and
EOS stands exactly once where it is asked for: last of an input, in stage 2 between A and B (stage 1 has none). Ids are
assembled piece by piece, so that what a user types can never turn into a control token. Images always go through the
PIL processor, with or without torchvision: training and evaluation then see the same pixels everywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .attention import EOS, PAD, A, B

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VISION = VISION_START + IMAGE_PAD + VISION_END
PLACEHOLDER = re.compile(r"<\|image_\d+\|>|" + re.escape(VISION))
# What is decoded: no format that runs another program (EPS) or holds other files. Phones' MPO opens through JPEG's reader.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64_000_000  # decoded size limit of one picture: a 10,000 x 10,000 bomb is refused before it is decoded
MAX_RATIO = 200  # one side of a picture over the other: more, transformers refuses to resize

Batch = dict[str, Tensor]


class InputError(ValueError):
    """An item that cannot be used: says which file or row, what is wrong and what to do.

    `item`: its place among the items given to `encode`, where that is known.
    """

    item: int | None = None


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Any picture -> RGB: upright by EXIF, first frame of an animation, transparency composited on white.

    Raises InputError naming the file when it is missing, unreadable, larger than MAX_PIXELS or narrower than MAX_RATIO.
    """
    if not isinstance(source, (Image.Image, str, Path, io.IOBase)):
        raise InputError(f"image: expected a path or a PIL image, found {type(source).__name__}")
    name = "the given image" if isinstance(source, Image.Image) else str(source)
    with _opened(source, name) as image:
        return _rgb(image, name)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels of a picture file as stored, not yet turned by EXIF; only the header is read.

    Raises InputError as `load_image` does, as far as a header tells: a file missing, of no known format, too large or narrow.
    """
    with _opened(path, str(path)) as image:
        _check_header(image, str(path))
        return image.size


@contextmanager
def _opened(source: str | Path | io.IOBase | Image.Image, name: str) -> Iterator[Image.Image]:
    """A picture whose header is read; whatever PIL says of it, or of its pixels then, becomes an InputError."""
    try:
        given = isinstance(source, Image.Image)  # its pixels may not be read yet
        with nullcontext(source) if given else Image.open(source, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"{name}: no such image file; check the path and the image folder") from None
    except InputError:
        raise
    except Exception as error:  # damaged files make decoders raise struct.error, IndexError, EOFError, zlib.error, ...
        raise InputError(f"{name}: not a readable image ({error}); replace or leave out this file") from error


def _check_header(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name}: {image.width} x {image.height} pixels is over the limit of {MAX_PIXELS:,}; shrink it"
        )
    if max(image.size) > MAX_RATIO * min(image.size):
        raise InputError(
            f"{name}: of {image.width} x {image.height} pixels, one side over {MAX_RATIO} times the other; cut it"
        )
    if image.mode == "F":
        raise InputError(f"{name}: floating-point pixels have no agreed range; store the picture with 8 or 16 bits")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    _check_header(image, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which `convert` would clip all above 255 to white
        grey = np.asarray(image)
        # Mode I: 16 bits as older readers of PNG give them, and 8 bits in a wide form.
        deep = image.mode != "I" or grey.max() > 255
        image = Image.fromarray((grey >> 8 if deep else grey).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def item_images(item: dict[str, Any]) -> list:
    """The pictures of an item as a list: none, one or several."""
    image = item.get("image")
    if image is None or (isinstance(image, str) and not image):
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def split_prompt(text: str, n_images: int) -> list[str | None]:
    """Text and number of pictures -> pieces in order, None standing for a picture.

    MMEB's `<|image_1|>` and a written-out vision triple mark where a picture goes; without a mark, pictures come
    first (ours: CoCoA's stage-1 form). A mark without a picture is dropped, as MoCa does. Raises InputError when marks
    and pictures are both present but differ in number.
    """
    if not isinstance(text, str):
        raise InputError(f"text must be a string, found {type(text).__name__}")
    parts = PLACEHOLDER.split(text)
    n_marks = len(parts) - 1
    if n_images == 0:
        return ["".join(parts)]
    if n_marks == 0:
        return [None] * n_images + [text]
    if n_marks != n_images:
        raise InputError(f"text marks {n_marks} image(s) but {n_images} are given: {text[:80]!r}")
    return [piece for part in parts for piece in (None, part)][1:]


@dataclass
class Inputs:
    """Tokenizer + image processor + the settings that decide what the model sees; a checkpoint stores all but padding_side.

    eos_token: the sources use both `<|endoftext|>` (151643, which is also Qwen2's padding) and `<|im_end|>` (151645).
        Default `<|im_end|>`: it ends a turn in the generative checkpoint and is never padding (ours).
    max_length: tokens of a sequence, images included; longer text is cut, image tokens and EOS never.
    padding_side: "right" or "left"; the embeddings are the same.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    eos_token: str = "<|im_end|>"
    max_length: int = 4096
    padding_side: str = "right"

    def __post_init__(self) -> None:
        wanted = [VISION_START, IMAGE_PAD, VISION_END, self.eos_token]
        vocabulary = (
            self.tokenizer.get_vocab()
        )  # not by the unknown token's id: Qwen2's is <|endoftext|>, which may be EOS
        if lost := [token for token in wanted if token not in vocabulary]:
            raise InputError(f"the tokenizer lacks {', '.join(lost)}; take a Qwen2-VL tokenizer, or another eos_token")
        self.vision_start_id, self.image_pad_id, self.vision_end_id, self.eos_id = (
            vocabulary[token] for token in wanted
        )
        pad = self.tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else pad
        self.keep_images(0)

    @classmethod
    def load(cls, folder: str | Path, **settings) -> Inputs:
        """From a Hugging Face folder or hub name (Qwen2-VL files as they are)."""
        return cls(AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder), **settings)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def limit_images(self, n_tokens: int) -> None:
        """Shrink pictures that would take more than `n_tokens` of the language model; a checkpoint keeps this."""
        processor = self.image_processor
        area = n_tokens * (processor.patch_size * processor.merge_size) ** 2
        if processor.size["longest_edge"] > area:
            processor.size = replace(
                processor.size, longest_edge=area, shortest_edge=min(processor.size["shortest_edge"], area)
            )
            self.kept.clear()

    def keep_images(self, n_bytes: int) -> None:
        """Keep the processed pictures of files in memory, as many as `n_bytes` hold: each is then read once, not every epoch."""
        self.kept: dict[str, tuple[Tensor, ...]] = {}
        self.room = n_bytes

    def text_ids(self, text: str) -> list[int]:
        """Plain text -> ids; control tokens typed by a user stay text."""
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can hold
            raise InputError(f"the text is not valid Unicode ({error.reason}, place {error.start})") from None
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def process_images(self, images: Sequence) -> tuple[Tensor, Tensor]:
        """Pictures -> pixel_values (patches, D) float32 and image_grid_thw (n, 3)."""
        keys = [str(image) if isinstance(image, (str, Path)) else id(image) for image in images]
        made = {key: self.kept[key] for key in keys if key in self.kept}
        if new := {key: image for key, image in zip(keys, images, strict=True) if key not in made}:
            made |= zip(new, self._process(list(new.values())), strict=True)
        for key in new:  # the room is filled once: in a cycle, dropping the oldest would find nothing
            if isinstance(key, str) and (size := made[key][0].nbytes) <= self.room:
                self.kept[key] = tuple(part.clone() for part in made[key])  # a view would hold its whole batch
                self.room -= size
        pixel_values, image_grid_thw = zip(*(made[key] for key in keys), strict=True)
        return torch.cat(pixel_values), torch.cat(image_grid_thw)

    def _process(self, images: list) -> list[tuple[Tensor, Tensor]]:
        """(pixel_values, image_grid_thw) of each picture, all in one call: a call for each takes half as long again."""
        out = self.image_processor([load_image(image) for image in images], return_tensors="pt")
        grid = out["image_grid_thw"]
        return list(zip(out["pixel_values"].split(grid.prod(-1).tolist()), grid.split(1), strict=True))

    def input_ids(self, text: str, n_tokens: Sequence[int]) -> list[int]:
        """Ids of one input without EOS; `n_tokens`: language-model tokens of each picture."""
        ids: list[int] = []
        counts = iter(n_tokens)
        for piece in split_prompt(text, len(n_tokens)):
            if piece is None:
                ids += [self.vision_start_id] + [self.image_pad_id] * next(counts) + [self.vision_end_id]
            else:
                ids += self.text_ids(piece)
        return ids

    def text_places(self, ids: list[int]) -> list[int]:
        """Where an input's ids are not a picture's."""
        vision = (self.vision_start_id, self.image_pad_id, self.vision_end_id)
        return [i for i, token in enumerate(ids) if token not in vision]

    def cut_text(self, ids: list[int], n_drop: int) -> list[int]:
        """Drop the last `n_drop` text tokens of an input; image tokens stay. Raises InputError if there are too few."""
        text_at = self.text_places(ids)
        if n_drop > len(text_at):
            raise InputError(
                f"the images alone need {len(ids) - len(text_at)} tokens, more than max_length={self.max_length} leaves; "
                "raise max_length or lower image_tokens in the recipe (longest_edge of the image processor)"
            )
        dropped = set(text_at[len(text_at) - n_drop :])
        return [token for i, token in enumerate(ids) if i not in dropped]

    def collate(
        self,
        items: Sequence[dict[str, Any]],
        targets: Sequence[str | dict[str, Any]] | None = None,
        *,
        eos: bool = True,
    ) -> Batch:
        """Items -> a padded batch. With `targets`, each row is A, EOS, B with B the text or item to reconstruct (stage 2).

        `eos=False` leaves EOS out (stage 1, where the prompt ends with the caption). Pictures stand in the order of the
        tokens: a row's A, then its B. Raises InputError naming the row, or the picture's file.
        """
        images = [item_images(item) for item in items]
        if targets is not None:
            targets = [{"text": target} if isinstance(target, str) else target for target in targets]
        copies = [[] for _ in items] if targets is None else [item_images(target) for target in targets]
        flat = [image for row, copy in zip(images, copies, strict=True) for image in (*row, *copy)]
        batch: Batch = {}
        n_tokens: list[int] = []
        if flat:
            batch["pixel_values"], batch["image_grid_thw"] = self.process_images(flat)
            n_tokens = (batch["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        rows, at = [], 0
        for i, item in enumerate(items):
            middle, end = at + len(images[i]), at + len(images[i]) + len(copies[i])
            try:
                if "images" in item:
                    raise InputError("'images' is not read; 'image' takes a picture, or a list of them")
                ids_a = self.input_ids(item.get("text") or "", n_tokens[at:middle])
                ids_b = None if targets is None else self.input_ids(targets[i].get("text") or "", n_tokens[middle:end])
                rows.append(self._row(ids_a, ids_b, eos))
            except InputError as error:
                raise InputError(f"item {i} of the batch: {error}") from None
            at = end
        batch |= self._pad(rows)
        batch["num_images_per_sample"] = torch.tensor([len(a) + len(b) for a, b in zip(images, copies, strict=True)])
        return batch

    def _row(self, ids_a: list[int], ids_b: list[int] | None, eos: bool) -> tuple[list[int], list[int]]:
        """One row -> (ids, segments), text cut to max_length: the longer of A's text and B's gives way first."""
        if not ids_a:
            raise InputError("neither text nor image; give at least one")
        if ids_b is not None and not ids_b:
            raise InputError("the text to reconstruct is empty")
        middle = [self.eos_id] if eos or ids_b is not None else []
        ids_b = ids_b or []
        over = len(ids_a) + len(middle) + len(ids_b) - self.max_length
        if over > 0:
            text_a, text_b = len(self.text_places(ids_a)), len(self.text_places(ids_b))
            room = text_a + text_b - over  # text tokens that fit, A and B together
            keep_b = min(text_b, max(room // 2, room - text_a, 1))
            ids_a = self.cut_text(ids_a, over - (text_b - keep_b))
            ids_b = self.cut_text(ids_b, text_b - keep_b)
        return ids_a + middle + ids_b, [A] * len(ids_a) + [EOS] * len(middle) + [B] * len(ids_b)

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self.pad_id)
        segment_ids = torch.full((len(rows), length), PAD)
        for i, (ids, segments) in enumerate(rows):
            span = slice(length - len(ids), length) if self.padding_side == "left" else slice(0, len(ids))
            input_ids[i, span] = torch.tensor(ids)
            segment_ids[i, span] = torch.tensor(segments)
        attention_mask = (segment_ids != PAD).long()  # from segments, not ids: EOS may be the padding token
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": ((input_ids == self.image_pad_id) & (segment_ids != PAD)).long(),
            "segment_ids": segment_ids,
        }
