"""Stages 1 and 2: hide words and picture cells, restore them from one forward pass.

The two stages are the same module, `Reconstruction`. They differ in the attention layout, in which segment is masked, and in
the weights of the two losses.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from .backbone import hidden_states, language_model, layout_mask, needed_elsewhere, position_ids
from .contrastive import gathered
from .corruption import IGNORE, hide_cells
from .inputs import Batch
from .packing import pack
from .store.checkpoint import DECODER


def _cross_entropy_at(states: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """states (B, L, H), labels (B, L) already aligned -> mean cross-entropy, float32, head on labelled places only."""
    chosen = labels != IGNORE
    if not chosen.any():
        raise ValueError(
            "nothing is masked in this batch: there is no position to compute a text loss at"
        )
    return F.cross_entropy(lm_head(states[chosen]).float(), labels[chosen])


def mntp_loss(hidden: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """Masked next-token prediction: the token masked at i is predicted from the state at i - 1. Scalar, float32.

    hidden (B, L, H), labels (B, L) with -100 where not masked. With every text token labelled and causal attention this
    is plain next-token prediction. Source: overview figure, stage 1. Raises ValueError if nothing is masked.
    """
    return _cross_entropy_at(hidden[:, :-1], lm_head, labels[:, 1:])


def mlm_loss(hidden: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """Masked language modelling, no shift: the token masked at i is predicted from the state at i (MoCa). Scalar, float32.

    hidden (B, L, H), labels (B, L) with -100 where not masked. Raises ValueError if nothing is masked.
    """
    return _cross_entropy_at(hidden, lm_head, labels)


TEXT_LOSSES = {"mntp": mntp_loss, "mlm": mlm_loss}


def patch_targets(pixel_values: Tensor, merge_size: int, normalise: bool) -> Tensor:
    """(patches, D) -> (cells, merge_size**2 * D), float32: the processor's normalised pixels (MoCa), or with
    `normalise` each patch at mean 0 and variance 1 (He et al.'s norm_pix_loss, an option)."""
    target = pixel_values.float()
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    return target.reshape(-1, merge_size**2 * pixel_values.shape[-1])


def patch_loss(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over hidden cells only. predicted, target: (cells, N); hidden: (cells,) bool. Scalar."""
    if not hidden.any():
        return predicted.sum() * 0.0
    return F.mse_loss(predicted[hidden].float(), target[hidden])


class PatchDecoder(nn.Module):
    """One layer of the backbone's own kind over the whole sequence, under the stage's layout, then a linear map to pixels.

    Source: MoCa (layer copied from the middle of the backbone, projection N(0, 0.02)). `layers=0` leaves the linear map
    only. Output: (vision tokens, merge_size**2 * patch numbers).
    """

    def __init__(self, model: PreTrainedModel, layers: int = 1, learned_fill: bool = False) -> None:
        super().__init__()
        text, vision = language_model(model), model.config.vision_config
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        self.merge_size = vision.spatial_merge_size
        patch_numbers = channels * vision.temporal_patch_size * vision.patch_size**2
        middle = len(text.layers) // 2
        self.layers = nn.ModuleList(copy.deepcopy(text.layers[middle]) for _ in range(layers))
        self.project = nn.Linear(text.config.hidden_size, self.merge_size**2 * patch_numbers)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        self.fill = (
            nn.Parameter(torch.zeros(patch_numbers)) if learned_fill else None
        )  # what stands in hidden cells

    def forward(self, hidden: Tensor, model: PreTrainedModel, batch: Batch, layout: str) -> Tensor:
        """hidden (B, L, H) -> predicted pixels of every vision token, in batch order."""
        text = language_model(model)
        # Flash kernels take the 2-D mask, and no layout but the model's own.
        flash = text.config._attn_implementation.startswith("flash")
        mask = batch["attention_mask"] if flash else layout_mask(model, batch, layout)
        rotary = text.rotary_emb(hidden, position_ids(model, batch))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return self.project(hidden[batch["mm_token_type_ids"] == 1])


def load_decoder(folder: str | Path, model: PreTrainedModel) -> PatchDecoder:
    """The image decoder that stage 1 left in its checkpoint folder. Raises FileNotFoundError where it left none."""
    path = Path(folder) / DECODER
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no image decoder; stage 1 leaves one when image_weight is above 0"
        )
    names = load_file(path).keys()
    decoder = PatchDecoder(
        model,
        len({name.split(".")[1] for name in names if name.startswith("layers.")}),
        "fill" in names,
    )
    load_model(decoder, str(path))
    return decoder.eval()


class Reconstruction(nn.Module):
    """Stages 1 and 2: reconstruct hidden text (and cells) from one forward pass under a layout.

    The batch is the collator's: masked `input_ids`, `labels` (B, L), and, when cells are hidden, `hidden_cells`
    (cells,) and `patch_fill` (D,). forward returns `loss`, `text_loss`, `image_loss` (scalars, float32): means over the masked
    positions and hidden cells of the batch. In training with several processes the batch is that of all of them: each
    process's mean is weighted by its share of the places, so that the average over processes, of losses and of
    gradients, is what one process with the whole batch would compute. `packing` puts several samples into a row, with the
    same loss.
    """

    def __init__(self, model: PreTrainedModel, *, layout: str, objective: str = "mntp", image_weight: float = 0.0,
                 text_weight: float = 1.0, decoder_layers: int = 1, normalise_patches: bool = False, learned_fill: bool = False,
                 packing: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.model, self.layout, self.packing = model, layout, packing
        self.text_loss = TEXT_LOSSES[objective]
        self.text_weight, self.image_weight, self.normalise_patches = (
            text_weight,
            image_weight,
            normalise_patches,
        )
        self.decoder = (
            PatchDecoder(model, decoder_layers, learned_fill) if image_weight > 0 else None
        )

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        positions = position_ids(self.model, batch)  # once, for the model and the decoder
        batch = pack(batch, positions) if self.packing else batch | {"position_ids": positions}
        labels = batch["labels"]
        visible = dict(batch)
        hide = self.decoder is not None and "hidden_cells" in batch
        if hide:
            fill = batch["patch_fill"] if self.decoder.fill is None else self.decoder.fill
            visible["pixel_values"] = hide_cells(
                batch["pixel_values"], batch["hidden_cells"], fill, self.decoder.merge_size
            )
        hidden = hidden_states(self.model, visible, self.layout)
        zero = (
            hidden.sum() * 0.0
        )  # a loss with a gradient also where a batch has no text or no image
        text = (
            self.text_loss(hidden, self.model.lm_head, labels) if (labels != IGNORE).any() else zero
        )
        # Asked before any process runs the decoder, or the questions would cross.
        elsewhere = self.decoder is not None and needed_elsewhere(hide, self.model)
        image = self.image_loss(hidden, batch) if hide else zero
        if elsewhere:
            image = 0.0 * self.decoder(hidden, self.model, batch, self.layout).sum()
            image = image if self.decoder.fill is None else image + 0.0 * self.decoder.fill.sum()
        if self.training:
            cells = batch["hidden_cells"].sum() if hide else labels.new_zeros(())
            text_share, image_share = share_of_mean(torch.stack([(labels != IGNORE).sum(), cells]))
            text, image = text * text_share, image * image_share
        loss = self.text_weight * text + self.image_weight * image
        return {"loss": loss, "text_loss": text.detach(), "image_loss": image.detach()}

    def image_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        predicted = self.decoder(hidden, self.model, batch, self.layout)
        target = patch_targets(
            batch["pixel_values"], self.decoder.merge_size, self.normalise_patches
        )
        return patch_loss(predicted, target, batch["hidden_cells"])


def share_of_mean(counts: Tensor) -> Tensor:
    """counts (n,): places this process averages over -> (n,) factors that make the average over processes of the
    weighted means the mean over all places; ones where there is one process."""
    total = gathered(counts[None].float()).mean(0)
    return torch.where(total > 0, counts / total.clamp(min=1e-9), 1.0)
