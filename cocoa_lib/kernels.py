"""What the machine offers: its processes, compiled layers, FlexAttention, pictures at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import LongTensor, Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

logger = logging.getLogger(__name__)
# Shapes of a batch that are compiled; past torch's own limit of 8 the others would run unfused.
COMPILED_SHAPES = 64
# "flash": from such a name transformers' vision towers tell the function where each picture ends.
PICTURES = "flash_pictures"


def join_processes() -> PartialState:
    """Join the processes of `torchrun` or `accelerate launch`: alone where there are none.

    On a machine without an accelerator accelerate must be told so, or each process would take
    itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def picture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    cu_seq_lens_q: LongTensor,
    max_length_q: int,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend to all pictures of a batch (or windows) in one call, each seeing itself alone.

    query, key, value (1, heads, N, d), pictures one behind the other, from cu_seq_lens_q[i] to
    cu_seq_lens_q[i + 1], max_length_q the longest -> (1, N, heads, d). An attention function of
    transformers (ours), without dropout, as these towers have none. Transformers' SDPA path takes a
    call for each picture and layer; on a GPU, starting them takes longer than they do. Float32 and
    a CPU have no kernel for different lengths: there each picture is a call of its own.
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
        sizes = cu_seq_lens_q.diff().tolist()
        parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
        each = [F.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
        out = torch.cat(each, dim=2)[0].transpose(0, 1)
    return out[None], None


AttentionInterface.register(PICTURES, picture_attention)


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the language model's layers in place, one program for all; weights keep their names.

    Gradient checkpointing, GradCache and adapters go on as before. The vision tower's layers are
    compiled too where it attends to all pictures at once (`use_picture_kernel`). Needs a C++
    compiler on a CPU, Triton on a GPU. From torch 2.13 on peft's DoRA stops the compiler, which is
    warned of.
    """
    adapters = (getattr(module, "use_dora", None) for module in model.modules())
    dora = any(used and any(used.values()) for used in adapters)
    if dora and torch.__version__ >= "2.13":
        logger.warning(
            "torch_compile gains little or nothing with DoRA, whose code in peft stops the "
            "compiler; set dora: false"
        )
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    # An adapter's dropout, which GradCache draws twice, is drawn as it would be uncompiled.
    torch._inductor.config.fallback_random = True
    # A layer is one program, not one for each of DDP's buckets.
    torch._dynamo.config.optimize_ddp = False
    visual = model.model.visual
    blocks = visual.blocks if visual.config._attn_implementation == PICTURES else ()
    for layer in (*model.model.language_model.layers, *blocks):
        layer.compile(dynamic=True, backend=backend)  # lengths differ from batch to batch


def use_flex(text: nn.Module, trial: Callable[[], None]) -> None:
    """Set FlexAttention on a language model, or SDPA with a warning where `trial` fails.

    `trial` is a small forward and backward pass. There is no backward pass on a CPU, and nothing at
    all without a compiler.
    """
    text.config._attn_implementation = "flex_attention"
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    try:
        trial()
    except Exception as error:  # whatever a compiler, a device or torch says: "not here"
        text.config._attn_implementation = "sdpa"
        logger.warning(
            "flex_attention is not available here (%s); using sdpa, which gives the same",
            _first_line(error),
        )


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Take numbers below 1e-38 for zero on the CPU, which needs up to a hundred times as long for
    them; half of a training step went into such rests of softmax.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class PatchProduct(nn.Conv3d):
    """A vision tower's patch embedding: a patch is the kernel's size, so it is a matrix product.

    Same weights, same values; torch's 3-D convolution takes several times as long.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, C, T, P, P) -> (patches, H, 1, 1, 1)."""
        rows = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return rows[:, :, None, None, None]


def multiply_patches(visual: nn.Module) -> None:
    """Let a vision tower embed its patches by `PatchProduct`; its weights stay where they are."""
    visual.patch_embed.proj.__class__ = PatchProduct


class FusedNorm(nn.Module):
    """An RMS norm in one operation of torch's; transformers' own takes five, with the same values."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H), in the weight's dtype."""
        hidden = hidden.to(self.weight.dtype)
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)


def fuse_norms(text: nn.Module) -> None:
    """Let a language model normalise by `FusedNorm`; its weights stay where they are."""
    kind = type(text.norm)
    for module in text.modules():
        if type(module) is kind:
            module.__class__ = FusedNorm


def use_picture_kernel(visual: nn.Module) -> None:
    """Let a vision tower attend to all pictures at once; on a GPU, warn where it cannot."""
    if not torch.cuda.is_available():
        visual.config._attn_implementation = PICTURES
        return
    tower = visual.config  # Qwen2-VL's `hidden_size` is the text's, so its `embed_dim` comes first
    width = getattr(tower, "embed_dim", tower.hidden_size) // tower.num_heads
    if (fault := find_picture_fault(width)) is None:
        tower._attn_implementation = PICTURES
    else:
        logger.warning(
            "pictures are attended to one by one, which takes longer and gives the same: %s", fault
        )


def find_picture_fault(width: int, device: str = "cuda") -> str | None:
    """Why `device` cannot attend to pictures of different sizes at once, with heads of `width`, or
    None.

    Compares a small forward and backward pass in bf16 with float32, which takes them singly.
    """
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
    if not all(share < 0.02 for share in wrong):  # NaN is not, either
        return f"its numbers are off by {100 * max(wrong):.0f} % or not finite"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
