"""What is learned: masked text prediction, patch reconstruction, and the contrastive loss.

Stage 1 and stage 2 are the same module, `Reconstruction`: a forward pass under a layout, text predicted at masked
positions, pixels predicted at hidden cells. They differ in the layout, in which segment is masked, and in weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, get_rank, get_world_size
from torch import LongTensor, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .backbone import hidden_states, language_model, layout_mask, needed_elsewhere, position_ids
from .checkpoint import DECODER
from .corruption import IGNORE, hide_cells
from .inputs import Batch
from .packing import longest_first, pack, take_rows


def _cross_entropy_at(states: Tensor, lm_head: nn.Module, labels: LongTensor) -> Tensor:
    """states (B, L, H), labels (B, L) already aligned -> mean cross-entropy, float32, head on labelled places only."""
    chosen = labels != IGNORE
    if not chosen.any():
        raise ValueError("nothing is masked in this batch: there is no position to compute a text loss at")
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
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
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
        self.fill = nn.Parameter(torch.zeros(patch_numbers)) if learned_fill else None  # what stands in hidden cells

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
        raise FileNotFoundError(f"{path}: no image decoder; stage 1 leaves one when image_weight is above 0")
    names = load_file(path).keys()
    decoder = PatchDecoder(
        model, len({name.split(".")[1] for name in names if name.startswith("layers.")}), "fill" in names
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
        self.text_weight, self.image_weight, self.normalise_patches = text_weight, image_weight, normalise_patches
        self.decoder = PatchDecoder(model, decoder_layers, learned_fill) if image_weight > 0 else None

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
        zero = hidden.sum() * 0.0  # a loss with a gradient also where a batch has no text or no image
        text = self.text_loss(hidden, self.model.lm_head, labels) if (labels != IGNORE).any() else zero
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
        target = patch_targets(batch["pixel_values"], self.decoder.merge_size, self.normalise_patches)
        return patch_loss(predicted, target, batch["hidden_cells"])


def info_nce(
    queries: Tensor, candidates: Tensor, positive: LongTensor, *, temperature: float, exclude: Tensor | None = None
) -> Tensor:
    """InfoNCE in float32: -log softmax of the positive among all candidates, mean over queries. Scalar.

    queries (Q, H), candidates (N, H), both normalised here; positive (Q,) = column of each query's own candidate;
    exclude (Q, N) bool = candidates that are no negatives (copies of the positive). Source: temperature 0.02 (script).
    """
    scores = F.normalize(queries.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T / temperature
    if exclude is not None:
        own = F.one_hot(positive, len(candidates)).bool()
        scores = scores.masked_fill(exclude & ~own, -torch.inf)
    return F.cross_entropy(scores, positive)


def gathered(tensor: Tensor, with_grad: bool = False) -> Tensor:
    """(n, ...) of every process, concatenated in rank order; the tensor itself where there is one process."""
    return all_gather(tensor, with_grad=with_grad) if get_world_size() > 1 else tensor


def share_of_mean(counts: Tensor) -> Tensor:
    """counts (n,): places this process averages over -> (n,) factors that make the average over processes of the
    weighted means the mean over all places; ones where there is one process."""
    total = gathered(counts[None].float()).mean(0)
    return torch.where(total > 0, counts / total.clamp(min=1e-9), 1.0)


class CachedInfoNCE(CachedLossMixin, nn.Module):
    """InfoNCE with sentence-transformers' GradCache, gathered over devices, copies of the positive left out.

    On one process a batch of at most `mini_batch_size` rows is embedded once, with its graph, and nothing is cached. Loss and
    gradients are the same; with two columns to the bit (three are added up in another order). On several processes DDP
    takes only one forward pass a step where columns use other parameters (texts, no vision tower), so GradCache stays.

    Several chunks are cut from each column's rows sorted by length, so that a text of 20 tokens is not computed at the width
    of a picture of 600; the embeddings are put back into the batch's order before anything else sees them. Chunks stay equal
    in rows, not in tokens: processes that share their weights must do the same number of forward passes.

    GradCache embeds each chunk twice. The first, which is the longest, is embedded once: its graph is kept until its own backward
    pass, which comes before any other chunk has a graph, so that there is still one at a time. (Ours; a batch of two chunks is
    embedded one and a half times instead of twice.)

    Columns: query, positive and, optionally, explicit negatives. Each column's features may carry `key` (B,), one
    integer per distinct item: a candidate with the key of a query's positive, or a positive of the same query in
    another row, is no negative. (The library's own loss leaves duplicates to its batch sampler, which starves on
    tasks with a handful of labels.)
    """

    def __init__(self, model: nn.Module, *, temperature: float = 0.02, mini_batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.temperature, self.mini_batch_size = model, temperature, mini_batch_size
        self._order: list[LongTensor] | None = None  # rows of each column as they are embedded; None: as they are given

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        sentence_features = list(sentence_features)
        self._keys = [features.get("key") for features in sentence_features]
        self._order = None
        if len(sentence_features[0]["input_ids"]) > self.mini_batch_size:
            self._order = [longest_first(column) for column in sentence_features]
            sentence_features = [
                column | {"order": order} for column, order in zip(sentence_features, self._order, strict=True)
            ]
        elif get_world_size() == 1:
            return self.calculate_loss(
                [[self.model(dict(column))["sentence_embedding"]] for column in sentence_features]
            )
        return self.forward_cached([sentence_features[0] | {"first": []}, *sentence_features[1:]], labels)

    def embed_minibatch(self, sentence_feature: dict[str, Tensor], begin: int, end: int, with_grad: bool, **settings):
        """The library's, of rows `begin` to `end` of the order. Picked here: a sorted column would hold all pixels twice.

        `first` of the column holds the embeddings of its first chunk, with their graph, from the first pass to the second."""
        column = dict(sentence_feature)
        order, first = column.pop("order", None), column.pop("first", None)
        if with_grad and begin == 0 and first:
            return first.pop(), None
        keep = first is not None and begin == 0 and not with_grad
        if order is not None:
            column = take_rows(column, order[begin:end])
            begin, end = 0, end - begin
        # DDP adds up over processes once, after the last chunk
        with self.model.no_sync() if keep and isinstance(self.model, DistributedDataParallel) else nullcontext():
            rows, random_state = super().embed_minibatch(column, begin, end, with_grad=with_grad or keep, **settings)
        if keep:
            first.append(rows)
        return rows, random_state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        embedded = [torch.cat(chunks) for chunks in reps]
        if self._order is not None:
            embedded = [rows[order.argsort()] for rows, order in zip(embedded, self._order, strict=True)]
        columns = [gathered(rows, with_grad=True) for rows in embedded]
        local, total = sum(len(chunk) for chunk in reps[0]), len(columns[0])
        mine = torch.arange(local, device=columns[0].device) + get_rank() * local
        exclude = self._duplicates(mine, total)
        loss = info_nce(columns[0][mine], torch.cat(columns[1:]), mine, temperature=self.temperature, exclude=exclude)
        self.embeddings = columns[0].detach()
        self.chance = _chance(len(columns[0]) * (len(columns) - 1), mine, exclude)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _duplicates(self, mine: LongTensor, total: int) -> Tensor | None:
        """(local queries, all candidates) bool: the candidates that equal the query's positive, or answer its twin."""
        if any(key is None for key in self._keys):
            return None
        query, *candidates = [gathered(key) for key in self._keys]
        same = candidates[0][mine][:, None] == torch.cat(candidates)[None, :]
        same[:, :total] |= query[mine][:, None] == query[None, :]
        return same


def _chance(n_candidates: int, mine: LongTensor, exclude: Tensor | None) -> float:
    """The loss when all embeddings are the same: mean log of the number of candidates, copies of the positive aside."""
    if exclude is None:
        return math.log(n_candidates)
    own = exclude[torch.arange(len(mine), device=mine.device), mine]
    return float((n_candidates - exclude.sum(1) + own).float().log().mean())
