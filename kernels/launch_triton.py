"""`x Wᵀ` for packed weights, one or several that share an input, or the experts of a stack, in two launches.

1. The dense part. For a single row of `x` every thread unpacks whole chunks in its registers and multiplies at once
   (`vector_kernel`); for more rows a tile of the weight is dequantised to the type of `x` and multiplied on the tensor
   cores (`tile_kernel`). Where there are too few programs to fill the GPU the input columns are split among several.
2. What is left (`finish_kernel`): the partial sums in the order of the columns, the outliers, the type of `x`. Nothing
   is left, and one launch does, when there was one split and there are no outliers.

`vector_kernel` reads a permuted input in place; before the others `gather_kernel` permutes it once, because a tile that
gathers would read each of its numbers from a cache line of its own.

All sums are in fp32 and in an order that only shapes and the GPU decide: equal calls give equal bits. Nothing waits for
the GPU, so all launches may be captured in a CUDA graph, after one call outside of it.
"""

# A launch takes plain numbers for constexpr arguments, which Triton's own types do not know:
# pyright: reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from triton import knobs

from .packing import CHUNK
from .product_triton import finish_kernel, gather_kernel, tile_kernel, vector_kernel
from .spqr import OUTLIER_BLOCK, outliers_per_row

OUTLIER_ROWS = 32  # rows after which the place of the outliers is noted, see `outlier_starts`
TOKENS_AT_ONCE = 4096  # bounds the memory of the partial sums
MAX_SPLITS = 16
SINGLE_GROUP = 1 << 30  # the group size of a weight whose rows are one group each
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Operands(NamedTuple):
    """The tensors of `M` matrices, a tuple of `M` per kind; an empty one for a kind that the format does not have."""

    codes: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]
    zero: tuple[Tensor, ...] = ()
    stat: tuple[Tensor, ...] = ()
    perm: tuple[Tensor, ...] = ()
    outlier_count: tuple[Tensor, ...] = ()
    outlier_column: tuple[Tensor, ...] = ()
    outlier_value: tuple[Tensor, ...] = ()

    def single(self, matrix: int) -> Operands:
        return Operands(*(kind[matrix : matrix + 1] for kind in self))

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(words.shape[-1] for words in self.codes)

    @property
    def outliers(self) -> bool:
        return any(len(value) for value in self.outlier_value)


@torch.library.custom_op("acc::packed_product", mutates_args=())
def packed_product(
    x: Tensor,
    ends: Tensor | None,
    codes: list[Tensor],
    scale: list[Tensor],
    zero: list[Tensor],
    stat: list[Tensor],
    perm: list[Tensor],
    outlier_count: list[Tensor],
    outlier_column: list[Tensor],
    outlier_value: list[Tensor],
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    stat_group_size: int,
) -> Tensor:
    """`x [T, I]` through `M` weights: their products `[T, O_m]`, one after the other in a flat tensor.

    The lists are as `Operands` says, tensors as in `kernels/spqr.py` and `kernels/grouped.py`; `zero_bits` is 0 for a
    symmetric grid, `stat_group_size` 0 for scales that are no codes.

    With `ends` int32 `[E]` there is one matrix, a stack of `E`: the rows of `x` before `ends[0]` are for expert 0,
    those before `ends[1]` for expert 1 and so on; rows past the last one are for none and come out as zeros.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the Triton kernels take float16, bfloat16 and float32")
    kinds = (codes, scale, zero, stat, perm, outlier_count, outlier_column, outlier_value)
    weights = Operands(*(tuple(kind) for kind in kinds))
    numbers = _numbers(weights, ends, bits, group_size)
    numbers |= {"SCALE_BITS": scale_bits, "ZERO_BITS": zero_bits, "STAT_ROWS": stat_group_size}
    tokens, rows = x.shape[0], weights.rows
    out = x.new_empty(tokens * sum(rows))
    with torch.cuda.device_of(x):
        if tokens <= TOKENS_AT_ONCE or ends is not None:
            if out.numel():
                _launch(x.contiguous(), out, ends, weights, numbers)
            return out
        for matrix, product in enumerate(out.split([tokens * count for count in rows])):
            for part, written in zip(x.split(TOKENS_AT_ONCE), product.split(TOKENS_AT_ONCE * rows[matrix])):
                _launch(part.contiguous(), written, ends, weights.single(matrix), numbers)
    return out


@packed_product.register_fake
def _(x, ends, codes, *_):
    return x.new_empty(x.shape[0] * sum(words.shape[-1] for words in codes))


def separate(flat: Tensor, x: Tensor, codes: list[Tensor]) -> list[Tensor]:
    """The flat products of `packed_product` as one tensor `[..., O]` per matrix."""
    rows = [words.shape[-1] for words in codes]
    tokens = x.numel() // x.shape[-1]
    products = flat.split([tokens * count for count in rows])
    return [y.view(*x.shape[:-1], count) for y, count in zip(products, rows, strict=True)]


def _numbers(weights: Operands, ends: Tensor | None, bits: int, group_size: int) -> dict[str, int]:
    """The sizes that all matrices share, as the dense kernels take them."""
    experts = 1 if ends is None else ends.shape[0]
    groups = weights.scale[0].shape[0] // experts
    span = CHUNK if groups == 1 else gcd(group_size, CHUNK)
    if span < 8:
        raise ValueError(f"groups of {group_size} columns are no whole octets of columns; set ACC_KERNELS=reference")
    group_size = SINGLE_GROUP if groups == 1 else group_size
    return {"groups": groups, "BITS": bits, "GROUP_SIZE": group_size, "SPAN": span}


def _launch(x: Tensor, out: Tensor, ends: Tensor | None, weights: Operands, numbers: dict[str, int]) -> None:
    """Writes the flat products `out` of contiguous `x [T, I]`, neither of them empty."""
    tokens, columns = x.shape
    experts = 0 if ends is None else ends.shape[0]
    # an expert that is hit has a row or two as long as there are few: a tile would be mostly empty
    vector = tokens == 1 or tokens <= experts // 2
    shared: dict[str, Any] = {
        "ends": ends, "tokens": tokens, "columns": columns, "M": len(weights.codes), "E": experts,
        "BLOCK_E": triton.next_power_of_2(experts + 1),
    }  # fmt: skip
    perm, x_stride = weights.perm or None, 0
    if perm is not None and not vector:
        x, perm, x_stride = _gather(x, perm, shared), None, tokens * columns
    shared["rows"] = weights.rows
    tile = _tile(x, weights, tokens, experts, vector)
    token_tiles = tokens if vector else -(-tokens // tile["BLOCK_T"])
    if experts and not vector:
        token_tiles = min(token_tiles + experts, tokens)
    row_tiles = sum(-(-count // tile["BLOCK_O"]) for count in weights.rows)
    steps, splits = split_columns(-(-columns // (CHUNK * tile["BLOCK_C"])), row_tiles * token_tiles, x.device)
    done = splits == 1 and not weights.outliers
    parts = out if done else x.new_empty(splits * out.numel(), dtype=torch.float32)
    dense = {
        "x": x, "out": parts, "steps": steps, "codes": weights.codes, "scale": weights.scale,
        "zero": weights.zero or weights.scale, "stat": weights.stat or weights.scale, **shared, **numbers, **tile,
        "enable_fp_fusion": True,
    }  # fmt: skip
    if vector:
        vector_kernel[row_tiles, tokens, splits](perm=perm, **dense)
    else:
        tile_kernel[token_tiles, row_tiles, splits](x_stride=x_stride, **dense)
    if not done:
        _finish(x, parts, out, perm, x_stride, splits, weights, shared)


def _gather(x: Tensor, perm: tuple[Tensor, ...], shared: dict[str, Any]) -> Tensor:
    """`x [T, I]` -> `[M, T, I]`, in the packed order of each matrix, or of the expert of each row."""
    (tokens, columns), block = x.shape, 1024
    out = x.new_empty(len(perm), tokens, columns)
    grid = (tokens, -(-columns // block), len(perm))
    gather_kernel[grid](x=x, out=out, perm=perm, BLOCK_I=block, **shared)
    return out


def _finish(
    x: Tensor,
    parts: Tensor,
    out: Tensor,
    perm: tuple[Tensor, ...] | None,
    x_stride: int,
    splits: int,
    weights: Operands,
    shared: dict[str, Any],
) -> None:
    tokens, columns = shared["tokens"], shared["columns"]
    sparse = dict.fromkeys(("count", "start", "column", "value"))
    if weights.outliers:
        sparse = {
            "count": weights.outlier_count,
            "start": tuple(outlier_starts(count, columns) for count in weights.outlier_count),
            "column": weights.outlier_column,
            "value": weights.outlier_value,
        }
    one = tokens == 1 or shared["E"] > 0  # neighbouring rows may be of different experts
    block_t, most_blocks = (1, 8) if one else (4, 2)
    row_tiles = sum(-(-count // OUTLIER_ROWS) for count in weights.rows)
    finish_kernel[-(-tokens // block_t), row_tiles](
        x=x, parts=parts, out=out, perm=perm, x_stride=x_stride, SPLITS=splits, OUTLIER_BLOCK=OUTLIER_BLOCK,
        BLOCK_T=block_t, BLOCK_O=OUTLIER_ROWS, BLOCK_N=4,
        BLOCK_B=min(most_blocks, triton.next_power_of_2(-(-columns // OUTLIER_BLOCK))), **sparse, **shared,
    )  # fmt: skip


def _tile(x: Tensor, weights: Operands, tokens: int, experts: int, vector: bool) -> dict[str, Any]:
    """How much of the problem a program of the dense part takes."""
    if vector:
        return {"BLOCK_O": 64, "BLOCK_C": 8, "num_warps": 4}
    stored = {tensor.dtype for tensor in weights.stat or weights.scale}
    dtype, precision = x.dtype, "ieee"
    if x.dtype == torch.float16 and torch.bfloat16 in stored:  # its weights may be too large, or too small, for float16
        dtype, precision = torch.float32, "tf32"  # in which x is exact
    per_expert = -(-tokens // max(experts, 1))
    block_t = min(max(triton.next_power_of_2(per_expert), 16), 128)
    if dtype == torch.float32:  # whose dot products take more registers
        tile = {"BLOCK_T": min(block_t, 32), "BLOCK_O": 64, "BLOCK_C": 1, "num_warps": 4}
    elif block_t == 128:
        tile = {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_C": 2, "num_warps": 8}
    else:
        tile = {"BLOCK_T": block_t, "BLOCK_O": 64, "BLOCK_C": 4 if block_t <= 32 else 2, "num_warps": 4}
    if knobs.runtime.interpret:
        dtype = torch.float32  # the interpreter takes the bits of bfloat16 for integers in a dot product
    return tile | {"DTYPE": DTYPES[dtype], "PRECISION": precision}


def split_columns(steps: int, programs: int, device: torch.device, most: int = MAX_SPLITS) -> tuple[int, int]:
    """The columns' steps per program, and among how many programs, at `most`, they are split."""
    wanted = min(-(-4 * _processors(device) // programs), most, steps)
    per_program = -(-steps // wanted)
    return per_program, -(-steps // per_program)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# What is remembered of a weight

_STARTS: dict[tuple, tuple[StorageWeakRef, Tensor]] = {}


def outlier_starts(outlier_count: Tensor, columns: int) -> Tensor:
    """Where the outliers of rows 0, 32, 64, … of each block of columns start: int64 `[E · blocks, ceil(O / 32)]`.

    The kernel counts on from there. Computed at a weight's first product and kept as long as its counts' memory lives:
    8 bytes per 8192 weights, 0.008 bits per weight.
    """
    storage = StorageWeakRef(outlier_count.untyped_storage())
    version = 0 if outlier_count.is_inference() else outlier_count._version
    key = (storage.cdata, outlier_count.storage_offset(), tuple(outlier_count.shape), version)
    if key not in _STARTS:
        starts = _outlier_starts(outlier_count, columns)
        if starts.is_cuda and torch.cuda.is_current_stream_capturing():
            return starts  # it has no value before the graph is replayed, and the graph fills it anew each time
        for old in [old for old, (alive, _) in _STARTS.items() if alive.expired()]:
            del _STARTS[old]
        _STARTS[key] = (storage, starts)
    return _STARTS[key][1]


def _outlier_starts(outlier_count: Tensor, columns: int) -> Tensor:
    blocks, rows = -(-columns // OUTLIER_BLOCK), outlier_count.shape[1]
    count = torch.cat([outliers_per_row(part, columns) for part in outlier_count.split(blocks)])
    count = torch.nn.functional.pad(count, (0, -rows % OUTLIER_ROWS)).view(len(count), -1, OUTLIER_ROWS).sum(-1)
    return (count.flatten().cumsum(0) - count.flatten()).view(count.shape)


def refuses(device: str, **problem: Any) -> str | None:
    """Why the Triton kernels cannot run a packed product on tensors of a device type; None when they can."""
    if device == "cpu" and not knobs.runtime.interpret:
        return "tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels are not made for {device}"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if not 2 <= problem.get("bits", 2) <= 8:
        return f"codes have {problem['bits']} bits, expected 2 to 8"
    return None
