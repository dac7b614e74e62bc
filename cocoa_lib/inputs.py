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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
            raise InputError(
                f"the tokenizer lacks {', '.join(lost)}; take a Qwen2-VL tokenizer, or another eos_token"
            )
        self.vision_start_id, self.image_pad_id, self.vision_end_id, self.eos_id = (
            vocabulary[token] for token in wanted
        )
        pad = self.tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else pad
        self.keep_images(0)

    @classmethod
    def load(cls, folder: str | Path, **settings) -> Inputs:
        """From a Hugging Face folder or hub name (Qwen2-VL files as they are)."""
        return cls(
            AutoTokenizer.from_pretrained(folder),
            Qwen2VLImageProcessorPil.from_pretrained(folder),
            **settings,
        )

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def limit_images(self, n_tokens: int) -> None:
        """Shrink pictures that would take more than `n_tokens` of the language model; a checkpoint keeps this."""
        processor = self.image_processor
        area = n_tokens * (processor.patch_size * processor.merge_size) ** 2
        if processor.size["longest_edge"] > area:
            processor.size = replace(
                processor.size,
                longest_edge=area,
                shortest_edge=min(processor.size["shortest_edge"], area),
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
            raise InputError(
                f"the text is not valid Unicode ({error.reason}, place {error.start})"
            ) from None
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    def process_images(self, images: Sequence) -> tuple[Tensor, Tensor]:
        """Pictures -> pixel_values (patches, D) float32 and image_grid_thw (n, 3)."""
        keys = [str(image) if isinstance(image, (str, Path)) else id(image) for image in images]
        made = {key: self.kept[key] for key in keys if key in self.kept}
        if new := {key: image for key, image in zip(keys, images, strict=True) if key not in made}:
            made |= zip(new, self._process(list(new.values())), strict=True)
        for (
            key
        ) in new:  # the room is filled once: in a cycle, dropping the oldest would find nothing
            if isinstance(key, str) and (size := made[key][0].nbytes) <= self.room:
                self.kept[key] = tuple(
                    part.clone() for part in made[key]
                )  # a view would hold its whole batch
                self.room -= size
        pixel_values, image_grid_thw = zip(*(made[key] for key in keys), strict=True)
        return torch.cat(pixel_values), torch.cat(image_grid_thw)

    def _process(self, images: list) -> list[tuple[Tensor, Tensor]]:
        """(pixel_values, image_grid_thw) of each picture, all in one call: a call for each takes half as long again."""
        out = self.image_processor([load_image(image) for image in images], return_tensors="pt")
        grid = out["image_grid_thw"]
        return list(
            zip(out["pixel_values"].split(grid.prod(-1).tolist()), grid.split(1), strict=True)
        )

    def input_ids(self, text: str, n_tokens: Sequence[int]) -> list[int]:
        """Ids of one input without EOS; `n_tokens`: language-model tokens of each picture."""
        ids: list[int] = []
        counts = iter(n_tokens)
        for piece in split_prompt(text, len(n_tokens)):
            if piece is None:
                ids += (
                    [self.vision_start_id]
                    + [self.image_pad_id] * next(counts)
                    + [self.vision_end_id]
                )
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
            targets = [
                {"text": target} if isinstance(target, str) else target for target in targets
            ]
        copies = (
            [[] for _ in items] if targets is None else [item_images(target) for target in targets]
        )
        flat = [image for row, copy in zip(images, copies, strict=True) for image in (*row, *copy)]
        batch: Batch = {}
        n_tokens: list[int] = []
        if flat:
            batch["pixel_values"], batch["image_grid_thw"] = self.process_images(flat)
            n_tokens = (
                batch["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
            ).tolist()
        rows, at = [], 0
        for i, item in enumerate(items):
            middle, end = at + len(images[i]), at + len(images[i]) + len(copies[i])
            try:
                if "images" in item:
                    raise InputError(
                        "'images' is not read; 'image' takes a picture, or a list of them"
                    )
                ids_a = self.input_ids(item.get("text") or "", n_tokens[at:middle])
                ids_b = (
                    None
                    if targets is None
                    else self.input_ids(targets[i].get("text") or "", n_tokens[middle:end])
                )
                rows.append(self._row(ids_a, ids_b, eos))
            except InputError as error:
                raise InputError(f"item {i} of the batch: {error}") from None
            at = end
        batch |= self._pad(rows)
        batch["num_images_per_sample"] = torch.tensor(
            [len(a) + len(b) for a, b in zip(images, copies, strict=True)]
        )
        return batch

    def _row(
        self, ids_a: list[int], ids_b: list[int] | None, eos: bool
    ) -> tuple[list[int], list[int]]:
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
            span = (
                slice(length - len(ids), length)
                if self.padding_side == "left"
                else slice(0, len(ids))
            )
            input_ids[i, span] = torch.tensor(ids)
            segment_ids[i, span] = torch.tensor(segments)
        attention_mask = (
            segment_ids != PAD
        ).long()  # from segments, not ids: EOS may be the padding token
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": ((input_ids == self.image_pad_id) & (segment_ids != PAD)).long(),
            "segment_ids": segment_ids,
        }
