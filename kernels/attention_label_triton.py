"""The Triton twin of kernels/attention_label.py: the labels of new keys in one launch."""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_label import LABEL_BITS, check_labels
from .launch_triton import DTYPES
from .launch_triton import refuses as _refuses

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: added to a small float it leaves no bits for a fraction


@triton.jit
def load_channels(p_key, p_channel, o_token, m_token, o_channel, m_channel, token_stride):
    """The keys' channels `[BT, BC]`, where `p_channel` lists them."""
    channel = tl.load(p_channel + o_channel, mask=m_channel, other=0)
    return tl.load(p_key + o_token * token_stride + channel, mask=m_token & m_channel, other=0.0)


@triton.jit
def code_of(b_key, p_scale, o_channel, m_channel, BITS: tl.constexpr):
    """The code of each number, int32 `[BT, BC]`."""
    LARGEST: tl.constexpr = 2 ** (BITS - 1) - 1
    b_scale = tl.load(p_scale + o_channel, mask=m_channel, other=1.0).to(tl.float32)
    b_scale = tl.where(b_scale == 0.0, float("inf"), b_scale)
    b_ratio = tl.div_rn(b_key.to(tl.float32), tl.broadcast_to(b_scale, b_key.shape))
    b_ratio = tl.where(b_ratio == b_ratio, b_ratio, 0.0)  # inf / inf and what was no number
    b_ratio = tl.minimum(tl.maximum(b_ratio, -LARGEST), LARGEST)
    return (b_ratio + ROUND - ROUND).to(tl.int32) + (LARGEST + 1)


@triton.jit(do_not_specialize=["tokens"])
def label_kernel(
    key, channels, scale, label, tokens, batch_stride, head_stride, token_stride,
    KV_HEADS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The labels of `BLOCK_T` tokens of one KV head."""
    i_row = tl.program_id(1).to(tl.int64)
    i_head = i_row % KV_HEADS
    o_token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    m_token = o_token < tokens
    PER_TOKEN: tl.constexpr = C // 2 if BITS == 4 else C
    o_channel = tl.arange(0, BLOCK_C)[None, :]
    m_channel = o_channel < PER_TOKEN
    p_key = key + i_row // KV_HEADS * batch_stride + i_head * head_stride
    p_channel, p_scale = channels + i_head * C, scale + i_head * C
    b_label = load_channels(p_key, p_channel, o_token, m_token, o_channel, m_channel, token_stride)
    if BITS < 16:
        b_label = code_of(b_label, p_scale, o_channel, m_channel, BITS)
    if BITS == 4:
        p_channel, p_scale = p_channel + PER_TOKEN, p_scale + PER_TOKEN
        b_high = load_channels(p_key, p_channel, o_token, m_token, o_channel, m_channel, token_stride)
        b_label |= code_of(b_high, p_scale, o_channel, m_channel, BITS) << 4
    p_label = label + (i_row * tokens + o_token) * PER_TOKEN + o_channel
    tl.store(p_label, b_label.to(label.dtype.element_ty), mask=m_token & m_channel)


@torch.library.custom_op("acc::attention_label", mutates_args=())
def label_op(key: Tensor, channels: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Operands as in kernels/attention_label.py."""
    if key.dtype not in DTYPES:
        raise ValueError(f"key is {key.dtype}; the Triton kernels take float16, bfloat16 and float32")
    check_labels(channels, bits)
    key = key if key.stride(-1) == 1 else key.contiguous()
    label = _empty(key, channels, bits)
    batch, heads, tokens, width = label.shape
    if label.numel():
        with torch.cuda.device_of(key):
            label_kernel[-(-tokens // 32), batch * heads](
                key=key, channels=channels.contiguous(), scale=scale.contiguous(), label=label, tokens=tokens,
                batch_stride=key.stride(0), head_stride=key.stride(1), token_stride=key.stride(2), KV_HEADS=heads,
                C=channels.shape[1], BITS=bits, BLOCK_T=32, BLOCK_C=triton.next_power_of_2(width),
            )  # fmt: skip
    return label


@label_op.register_fake
def _(key, channels, scale, bits):
    return _empty(key, channels, bits)


def _empty(key: Tensor, channels: Tensor, bits: int) -> Tensor:
    count = channels.shape[1]
    if bits == 16:
        return key.new_empty(*key.shape[:3], count)
    return key.new_empty(*key.shape[:3], count * bits // 8, dtype=torch.uint8)


def attention_label(key: Tensor, channels: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """As the reference, the same bits."""
    return label_op(key, channels, scale, bits)


def refuses(device: str, **problem: Any) -> str | None:
    """Why this kernel cannot run on tensors of a device type; None when it can."""
    if problem.get("bits", 4) not in LABEL_BITS:
        return f"labels have {problem['bits']} bits, expected 4, 8 or 16"
    return _refuses(device)
