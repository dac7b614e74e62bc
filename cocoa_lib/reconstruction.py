"""Stages 1 and 2: hide words and picture cells, restore them from one forward pass.

Both stages are the module `Reconstruction`. They differ in the attention layout, in the segment
that is masked, and in the weights of the two losses. To add a text loss, write it and put it into
TEXT_LOSSES: recipes then know it as an `objective`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model
from torch import BoolTensor, LongTensor, Tensor, nn
from transformers import PreTrainedModel

from .backbone import hidden_states, language_model, layout_mask
from .contrastive import gather_rows
from .corruption import IGNORE, hide_cells
from .inputs import Batch
from .packing import pack
from .positions import position_ids


def mntp_loss(hidden: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """Masked next-token prediction: the token masked at i is predicted from the state at i - 1.

    hidden (B, L, H), labels (B, L) with -100 where not masked -> scalar, float32. With every text
    token labelled and causal attention this is plain next-token prediction. Source: overview
    figure, stage 1. Raises ValueError if nothing is masked.
    """
    return _cross_entropy_at(hidden[:, :-1], lm_head, labels[:, 1:])


def mlm_loss(hidden: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """Masked language modelling: the token masked at i is predicted from the state at i (MoCa).

    hidden (B, L, H), labels (B, L) with -100 where not masked -> scalar, float32.
    Raises ValueError if nothing is masked.
    """
    return _cross_entropy_at(hidden, lm_head, labels)


DECODER = "image_decoder.safetensors"  # its file in a checkpoint folder
TEXT_LOSSES = {"mntp": mntp_loss, "mlm": mlm_loss}


def _cross_entropy_at(states: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """Mean cross-entropy of aligned states and labels; the head sees labelled places only."""
    chosen = labels != IGNORE  # (B, L)
    if not chosen.any():
        raise ValueError("nothing is masked in this batch: there is nothing to predict")
    return F.cross_entropy(lm_head(states[chosen]).float(), labels[chosen])


def patch_targets(pixel_values: Tensor, merge_size: int, norm_pix_loss: bool) -> Tensor:
    """(patches, D) -> (cells, merge_size**2 * D), float32: the processor's normalised pixels
    (MoCa).

    With `norm_pix_loss` (He et al.'s, an option) each patch has mean 0 and variance 1.
    """
    target = pixel_values.float()
    if norm_pix_loss:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return target.reshape(-1, merge_size**2 * pixel_values.shape[-1])


def patch_loss(predicted: Tensor, target: Tensor, hidden: BoolTensor) -> Tensor:
    """Mean squared error of hidden cells. predicted, target: (cells, N); hidden: (cells,)."""
    if not hidden.any():
        return predicted.sum() * 0.0
    return F.mse_loss(predicted[hidden].float(), target[hidden])


class PatchDecoder(nn.Module):
    """One layer of the backbone's own kind over the whole sequence, then a linear map to pixels.

    Source: MoCa (a copy of the backbone's middle layer, projection N(0, 0.02)). `layers=0` leaves
    the linear map only. `fill` (D,) is what stands in hidden patches, where that is learned.
    """

    def __init__(self, model: PreTrainedModel, layers: int = 1, learned_fill: bool = False) -> None:
        super().__init__()
        text, vision = language_model(model), model.config.vision_config
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        patch_numbers = channels * vision.temporal_patch_size * vision.patch_size**2
        self.merge_size = vision.spatial_merge_size
        middle = text.layers[len(text.layers) // 2]
        self.layers = nn.ModuleList(copy.deepcopy(middle) for _ in range(layers))
        self.project = nn.Linear(text.config.hidden_size, self.merge_size**2 * patch_numbers)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        self.fill = nn.Parameter(torch.zeros(patch_numbers)) if learned_fill else None

    def forward(self, hidden: Tensor, model: PreTrainedModel, batch: Batch, layout: str) -> Tensor:
        """hidden (B, L, H) -> pixels of every vision token in order (cells, merge_size**2 * D)."""
        text = language_model(model)
        # Flash-attention takes the 2-D mask, and no layout but the model's own.
        flash = text.config._attn_implementation.startswith("flash")
        mask = batch["attention_mask"] if flash else layout_mask(model, batch, layout)
        rotary = text.rotary_emb(hidden, position_ids(model, batch))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return self.project(hidden[batch["mm_token_type_ids"] == 1])


def load_decoder(folder: str | Path, model: PreTrainedModel) -> PatchDecoder:
    """Open the image decoder that stage 1 left in its folder. Raises FileNotFoundError."""
    path = Path(folder) / DECODER
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no image decoder; stage 1 leaves one when image_weight is above 0"
        )
    names = load_file(path).keys()
    n_layers = len({name.split(".")[1] for name in names if name.startswith("layers.")})
    decoder = PatchDecoder(model, n_layers, "fill" in names)
    load_model(decoder, str(path))
    return decoder.eval()


class Reconstruction(nn.Module):
    """Restore hidden text (and cells) from one forward pass under a layout.

    The batch is that of `corruption`: masked `input_ids`, `labels` (B, L) and, where cells are
    hidden, `hidden_cells` (cells,) and `patch_fill` (D,). `packing` puts several samples into a
    row, with the same loss. forward returns `loss`, `text_loss` and `image_loss`: scalars, float32,
    means over masked positions and hidden cells.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layout: str,
        objective: str = "mntp",
        image_weight: float = 0.0,
        text_weight: float = 1.0,
        decoder_layers: int = 1,
        norm_pix_loss: bool = False,
        learned_fill: bool = False,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.layout, self.packing = model, layout, packing
        self.objective, self.norm_pix_loss = TEXT_LOSSES[objective], norm_pix_loss
        self.text_weight, self.image_weight = text_weight, image_weight
        self.decoder = None
        if image_weight > 0:
            self.decoder = PatchDecoder(model, decoder_layers, learned_fill)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        batch["position_ids"] = position_ids(self.model, batch)  # (3, B, L)
        if self.packing:
            batch = pack(batch, batch["position_ids"])  # fewer rows
        visible = self.hide(batch)  # pixel_values (patches, D), cells replaced
        hidden = hidden_states(self.model, visible, self.layout)  # (B, L, H)
        text = self.text_loss(hidden, batch)  # ()
        image = self.image_loss(hidden, batch)  # ()
        return self.combine(text, image, batch)

    def hide(self, batch: Batch) -> Batch:
        """Replace the patches of hidden cells; words are masked in the batch already."""
        if self.decoder is None or "hidden_cells" not in batch:
            return batch
        fill = batch["patch_fill"] if self.decoder.fill is None else self.decoder.fill
        pixels, cells = batch["pixel_values"], batch["hidden_cells"]
        return batch | {"pixel_values": hide_cells(pixels, cells, fill, self.decoder.merge_size)}

    def text_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy at masked words; 0, with a gradient, where a batch has none."""
        if not (batch["labels"] != IGNORE).any():
            return hidden.sum() * 0.0
        return self.objective(hidden, self.model.lm_head, batch["labels"])

    def image_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Squared error of hidden cells; 0, with a gradient, where a batch has none."""
        if self.decoder is None or "hidden_cells" not in batch:
            return hidden.sum() * 0.0
        predicted = self.decoder(hidden, self.model, batch, self.layout)  # (cells, N)
        pixels = batch["pixel_values"]
        target = patch_targets(pixels, self.decoder.merge_size, self.norm_pix_loss)  # (cells, N)
        return patch_loss(predicted, target, batch["hidden_cells"])

    def combine(self, text: Tensor, image: Tensor, batch: Batch) -> dict[str, Tensor]:
        """text_weight * text + image_weight * image, exact over several processes in training."""
        if self.training:
            words = (batch["labels"] != IGNORE).sum()
            hidden = self.decoder is not None and "hidden_cells" in batch
            cells = batch["hidden_cells"].sum() if hidden else torch.zeros_like(words)
            text_share, image_share = share_of_mean(torch.stack([words, cells]))
            text, image = text * text_share, image * image_share
        loss = self.text_weight * text + self.image_weight * image
        return {"loss": loss, "text_loss": text.detach(), "image_loss": image.detach()}


def share_of_mean(counts: Tensor) -> Tensor:
    """Factors that make the mean over processes of weighted means the mean over all places.

    counts (n,): places this process averages over -> (n,); ones where there is one process. So
    losses and gradients of DDP are those of one process with the whole batch.
    """
    mean = gather_rows(counts[None].float()).mean(0)
    return torch.where(mean > 0, counts / mean.clamp(min=1e-9), 1.0)
