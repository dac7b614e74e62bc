"""Faster attention where the machine has it: compiled layers, FlexAttention, all pictures in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

logger = logging.getLogger(__name__)


def picture_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *,
    cu_seq_lens_q: LongTensor, max_length_q: int, scaling: float | None = None, **others,
) -> tuple[Tensor, None]:  # fmt: skip
    """A vision tower's attention, all pictures of a batch (or windows) in one call, each seeing itself alone.

    q, k, v (1, heads, N, d), pictures one behind the other, from cu_seq_lens_q[i] to cu_seq_lens_q[i + 1], max_length_q the
    longest -> (1, N, heads, d). Transformers' own SDPA path takes a call for each picture and layer, and on a GPU starting them
    takes longer than they do. An attention function of transformers (ours); dropout is none, as in these towers. Float32,
    and a CPU, have no kernel for different lengths: there each is a call of its own, as in transformers.
    """
    n, length = len(cu_seq_lens_q) - 1, query.shape[2]
    if length == n * max_length_q:  # all of one length: a batch
        rows = (x[0].unflatten(1, (n, max_length_q)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*rows, scale=scaling).transpose(1, 2).flatten(0, 1)
    elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        ends = cu_seq_lens_q.to(torch.int32)
        out = varlen_attn(*rows, ends, ends, max_length_q, max_length_q, scale=scaling)
    else:
        parts = zip(
            *(x.split(cu_seq_lens_q.diff().tolist(), dim=2) for x in (query, key, value)),
            strict=True,
        )
        out = torch.cat(
            [F.scaled_dot_product_attention(*part, scale=scaling) for part in parts], dim=2
        )[0].transpose(0, 1)
    return out[None], None


# Shapes of a batch that are compiled; past torch's own limit of 8 the others would run unfused, with a mere warning.
COMPILED_SHAPES = 64
# "flash": from such a name transformers' vision towers take a function that is told where each picture ends.
PICTURES = "flash_pictures"


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """From now on the language model's layers run compiled, one program for all of them; the weights keep their names.

    In place, so that gradient checkpointing, GradCache and an adapter go on as before. So do the vision tower's on a GPU,
    where they attend to all pictures at once (float32 ones of different sizes are lists of numbers, which stop the
    compiler); elsewhere they are left as they are. Needs a C++ compiler on a CPU, Triton on a GPU; torch says what is
    missing. Under torch 2.13 (not 2.11 and 2.12) peft's DoRA stops the compiler in each layer, under gradient checkpointing
    before it begins: from there on a warning says so.
    """
    dora = any(
        getattr(module, "use_dora", None) and any(module.use_dora.values())
        for module in model.modules()
    )
    if dora and torch.__version__ >= "2.13":
        logger.warning(
            "torch_compile gains little or nothing with DoRA, whose code in peft stops the compiler; set dora: false"
        )
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    # An adapter's dropout, which GradCache draws twice, is drawn as it would be uncompiled.
    torch._inductor.config.fallback_random = True
    torch._dynamo.config.optimize_ddp = (
        False  # a layer is one program, not one for each of DDP's buckets
    )
    visual = model.model.visual
    blocks = visual.blocks if visual.config._attn_implementation == PICTURES else ()
    for layer in (*model.model.language_model.layers, *blocks):
        layer.compile(dynamic=True, backend=backend)  # lengths differ from batch to batch


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _flex_failure(trial: Callable[[], None]) -> str | None:
    """Why FlexAttention cannot train here, or None: `trial` is a small forward and backward pass with it."""
    try:
        trial()
    except Exception as error:  # whatever a compiler, a device or torch says: each means "not here"
        return _first_line(error)
    return None


def _pictures_failure(width: int, device: str = "cuda") -> str | None:
    """Why this GPU cannot attend to pictures of different sizes in one call, with heads of `width`, or None: a small forward and
    backward pass, in float32, which takes them singly, and in bf16."""
    drawn, ends, found = torch.Generator().manual_seed(0), torch.tensor([0, 100, 300]), []
    values = [torch.randn(1, 2, 300, width, generator=drawn) for _ in range(4)]
    try:
        for dtype in (torch.float32, torch.bfloat16):
            *qkv, pull = (x.to(device, dtype).requires_grad_() for x in values)
            with torch.enable_grad():
                out, _ = picture_attention(
                    nn.Identity(), *qkv, cu_seq_lens_q=ends.to(device), max_length_q=200
                )
            found.append([out.detach(), *torch.autograd.grad(out, qkv, pull.transpose(1, 2))])
    except Exception as error:  # as for Flex
        return _first_line(error)
    wrong = [float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    if not all(share < 0.02 for share in wrong):  # as NaN is not, either
        return f"its numbers are off by {100 * max(wrong):.0f} % or not finite"
    return None


AttentionInterface.register(PICTURES, picture_attention)
