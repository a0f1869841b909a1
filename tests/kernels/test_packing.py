"""Packing is dense, exact, and lays out pairs of columns as its table says."""

import numpy as np
import pytest
import torch
from acc.kernels.packing import pack, pack_stream, unpack, unpack_stream

SHAPES = [(1, 1), (7, 33), (16, 64), (5, 95), (3, 128)]


def codes_of(rows, columns, bits, seed=0):
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_inverts_pack_and_no_bit_is_wasted(bits, shape):
    codes = codes_of(*shape, bits)
    words = pack(codes, bits)
    assert words.shape == (-(-shape[1] // 32), bits, shape[0])
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, shape[1]).long(), codes)
    highest = torch.full_like(codes, (1 << bits) - 1)
    assert torch.equal(unpack(pack(highest, bits), bits, shape[1]).long(), highest)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_read_word_by_word(bits):
    """An independent reader of the documented layout, one bit at a time."""
    codes = codes_of(3, 64, bits, seed=1)
    words = pack(codes, bits).numpy().view(np.uint32)
    whole, rest = 16 // bits, 16 % bits
    for row in range(3):
        for column in range(64):
            chunk, pair, half = column // 32, column % 32 // 2, column % 2
            value = 0
            for k in range(bits):
                if pair < bits * whole:
                    word, place = pair // whole, bits * (pair % whole) + k
                else:
                    word, place = divmod((pair - bits * whole) * bits + k, rest)
                    place += bits * whole
                value |= (int(words[chunk, word, row]) >> (place + 16 * half) & 1) << k
            assert value == codes[row, column]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_two_codes_with_one_shift_and_mask(bits):
    codes = codes_of(4, 32, bits, seed=2)
    words = pack(codes, bits)
    mask = ((1 << bits) - 1) * 0x10001
    first = words[0, 0] >> bits & mask  # the second pair: columns 2 and 3
    assert torch.equal(first & 0xFFFF, codes[:, 2].int())
    assert torch.equal(first >> 16, codes[:, 3].int())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows", [1, 8, 13, 16])
def test_stream_is_little_endian_and_dense(bits, rows):
    codes = codes_of(3, rows, bits, seed=3)
    stream = pack_stream(codes, bits)
    padded = np.pad(codes.numpy(), ((0, 0), (0, -rows % 8)))
    each_bit = (padded[:, :, None] >> np.arange(bits) & 1).reshape(3, -1).astype(np.uint8)
    assert np.array_equal(stream.numpy(), np.packbits(each_bit, axis=1, bitorder="little"))
    assert torch.equal(unpack_stream(stream, bits, rows).long(), codes)
