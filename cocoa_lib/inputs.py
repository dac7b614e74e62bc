"""From {text, image} items to one batch: prompts, images, truncation, padding.

An item is a dict `{"text": str, "image": None | path | PIL.Image | list of these}`. A batch is a
plain dict of tensors:

    input_ids, attention_mask, mm_token_type_ids, segment_ids   (B, L)
    pixel_values (patches, C * temporal_patch * patch * patch), image_grid_thw (images, 3)
    num_images_per_sample (B,)

`pixel_values` and `image_grid_thw` are there only with images. The prompt is that of CoCoA's stages
1 and 2 and of MoCa, `<|vision_start|><|image_pad|>...<|vision_end|>text`. EOS stands exactly once:
last of an input, in stage 2 between A and B (stage 1 has none). Ids are assembled piece by piece,
so what a user types never becomes a control token. Images always go through the PIL processor, with
or without torchvision: training and evaluation see the same pixels everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .attention import EOS, PAD, A, B
from .items import (
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    InputError,
    item_images,
    load_image,
    split_prompt,
)

Batch = dict[str, Tensor]


@dataclass
class Inputs:
    """Tokenizer, image processor and the settings that decide what the model sees.

    eos_token: the sources use both `<|endoftext|>` (151643, also Qwen2's padding) and `<|im_end|>`
        (151645). Default `<|im_end|>`: it ends a turn in the generative checkpoint and is never
        padding (ours).
    max_length: tokens of a sequence, images included; longer text is cut, images and EOS never.
    padding_side: "right" or "left"; the embeddings are the same. Not stored with a checkpoint.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    eos_token: str = "<|im_end|>"
    max_length: int = 4096
    padding_side: str = "right"

    def __post_init__(self) -> None:
        wanted = [VISION_START, IMAGE_PAD, VISION_END, self.eos_token]
        known = self.tokenizer.get_vocab()  # Qwen2's unknown token is <|endoftext|>, maybe EOS
        if lost := [token for token in wanted if token not in known]:
            raise InputError(
                f"the tokenizer lacks {', '.join(lost)}; take Qwen2-VL's, or another eos_token"
            )
        self.vision_start_id, self.image_pad_id, self.vision_end_id, self.eos_id = (
            known[token] for token in wanted
        )
        pad = self.tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else pad
        self.keep_images(0)

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> Inputs:
        """Open a Hugging Face folder or hub name (Qwen2-VL files as they are)."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder), **settings)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer and image processor in the standard form."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def limit_images(self, n_tokens: int) -> None:
        """Shrink pictures of more than `n_tokens` tokens; a checkpoint keeps this."""
        processor = self.image_processor
        area = n_tokens * (processor.patch_size * processor.merge_size) ** 2
        if processor.size["longest_edge"] > area:
            least = min(processor.size["shortest_edge"], area)
            processor.size = replace(processor.size, longest_edge=area, shortest_edge=least)
            self.kept.clear()

    def keep_images(self, n_bytes: int) -> None:
        """Keep processed picture files in memory, up to `n_bytes`: each is then read only once."""
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.room = n_bytes

    def process_images(self, images: Sequence[Any]) -> tuple[Tensor, LongTensor]:
        """Pictures -> pixel_values (patches, D) float32 and image_grid_thw (n, 3)."""
        keys = [str(image) if isinstance(image, (str, Path)) else id(image) for image in images]
        made = {key: self.kept[key] for key in keys if key in self.kept}
        if new := {key: image for key, image in zip(keys, images, strict=True) if key not in made}:
            loaded = [load_image(image) for image in new.values()]
            out = self.image_processor(loaded, return_tensors="pt")  # all at once: 1.5 x as fast
            grid = out["image_grid_thw"]
            pixels = out["pixel_values"].split(grid.prod(-1).tolist())
            made |= zip(new, zip(pixels, grid.split(1), strict=True), strict=True)
        for key in new:  # filled once: in a cycle, dropping the oldest would find nothing
            if isinstance(key, str) and (size := made[key][0].nbytes) <= self.room:
                # A clone, since a view would hold its whole batch.
                self.kept[key] = (made[key][0].clone(), made[key][1].clone())
                self.room -= size
        pixel_values, image_grid_thw = zip(*(made[key] for key in keys), strict=True)
        return torch.cat(pixel_values), torch.cat(image_grid_thw)

    def text_ids(self, text: str) -> list[int]:
        """Plain text -> ids; control tokens typed by a user stay text."""
        if not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return ids["input_ids"]

    def input_ids(self, text: str, n_tokens: Sequence[int]) -> list[int]:
        """Ids of one input without EOS; `n_tokens`: language-model tokens of each picture."""
        ids: list[int] = []
        counts = iter(n_tokens)
        for piece in split_prompt(text, len(n_tokens)):
            if piece is None:
                image = [self.image_pad_id] * next(counts)
                ids += [self.vision_start_id, *image, self.vision_end_id]
            else:
                ids += self.text_ids(piece)
        return ids

    def text_places(self, ids: list[int]) -> list[int]:
        """Where an input's ids are not a picture's."""
        vision = (self.vision_start_id, self.image_pad_id, self.vision_end_id)
        return [i for i, token in enumerate(ids) if token not in vision]

    def cut_text(self, ids: list[int], n_drop: int) -> list[int]:
        """Drop the last `n_drop` text tokens; image tokens stay. Raises InputError if too few."""
        text_at = self.text_places(ids)
        if n_drop > len(text_at):
            raise InputError(
                f"the images alone need {len(ids) - len(text_at)} tokens, more than "
                f"max_length={self.max_length} leaves; raise max_length or lower image_tokens in "
                "the recipe (longest_edge of the image processor)"
            )
        dropped = set(text_at[len(text_at) - n_drop :])
        return [token for i, token in enumerate(ids) if i not in dropped]

    def collate(
        self,
        items: Sequence[dict[str, Any]],
        targets: Sequence[dict[str, Any] | str] | None = None,
        *,
        eos: bool = True,
    ) -> Batch:
        """Items -> a padded batch. With `targets`, each row is A, EOS, B (stage 2).

        A target is the text or item to reconstruct. `eos=False` leaves EOS out (stage 1). Pictures
        stand in the order of the tokens: a row's A, then its B.
        Raises InputError naming the row, or the picture's file.
        """
        sides: list[Sequence[dict[str, Any]]] = [items]
        if targets is not None:
            sides.append([{"text": each} if isinstance(each, str) else each for each in targets])
        rows = list(zip(*sides, strict=True))  # (A,) or (A, B) a row
        images = [[image for item in row for image in item_images(item)] for row in rows]
        batch: Batch = {}
        counts: Iterator[int] = iter(())
        if flat := [image for row in images for image in row]:
            batch["pixel_values"], grid = self.process_images(flat)
            batch["image_grid_thw"] = grid
            counts = iter((grid.prod(-1) // self.image_processor.merge_size**2).tolist())
        made = []
        for i, row in enumerate(rows):
            try:
                ids = [self._item_ids(item, counts) for item in row]
                made.append(self._join(*ids, eos=eos))
            except InputError as error:
                raise InputError(f"item {i} of the batch: {error}") from None
        counted = torch.tensor([len(row) for row in images])
        return batch | self._pad(made) | {"num_images_per_sample": counted}

    def _item_ids(self, item: dict[str, Any], counts: Iterator[int]) -> list[int]:
        if "images" in item:
            raise InputError("'images' is not read; 'image' takes a picture, or a list of them")
        n_tokens = [next(counts) for _ in item_images(item)]
        ids = self.input_ids(item.get("text") or "", n_tokens)
        if not ids:
            raise InputError("neither text nor image; give at least one")
        return ids

    def _join(
        self, ids_a: list[int], ids_b: list[int] | None = None, *, eos: bool
    ) -> tuple[list[int], list[int]]:
        """Join A, EOS, B into (ids, segments), text cut to max_length, the longer side first."""
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
            start = length - len(ids) if self.padding_side == "left" else 0
            input_ids[i, start : start + len(ids)] = torch.tensor(ids)
            segment_ids[i, start : start + len(ids)] = torch.tensor(segments)
        real = segment_ids != PAD  # from segments, not ids: EOS may be the padding token
        return {
            "input_ids": input_ids,
            "attention_mask": real.long(),
            "mm_token_type_ids": ((input_ids == self.image_pad_id) & real).long(),
            "segment_ids": segment_ids,
        }
