"""Philox4x32-10: counter-based random bits (Salmon et al. 2011, "Parallel Random Numbers: As Easy
as 1, 2, 3")

The same (key, counter) gives the same 128 bits everywhere, so a random number is named by its
purpose, not by the time at which it is drawn:

    sampling   key = mix("sample", seed)                counter = (position, sample, row lo, row hi)
    dropout    key = mix("dropout", seed, layer, input) counter = (column / 8, position, row, step)

A uniform is (word + 1/2) / 2^32, never 0 or 1. A dropout lane is 16 bits, so p is a multiple of
2^-16 and one call serves eight columns. Words are held in int64 tensors, for torch's operations on
uint32 are few.
"""

# B = rows of logits, T = tokens

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.integers import cdiv
from kernels.launch.triton_launch import jit, tl

MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def mix(*parts: int | str) -> int:
    """A 64-bit number that depends on every part; distinct uses get unrelated streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def signed64(key: int) -> int:
    """The same 64 bits as a signed number: the form in which tensors and kernels take a key."""
    return key - 2**64 if key >= 2**63 else key


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (int64 tensors) for every element of the broadcast counter."""
    c0, c1, c2, c3 = counter
    k0 = key & MASK32
    k1 = key >> 32
    for _ in range(_ROUNDS):
        # the int64 product wraps, yet bits 32..63 are right once the sign extension is masked off
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        high0 = (product0 >> 32) & MASK32
        high1 = (product1 >> 32) & MASK32
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = product1 & MASK32
        c3 = product0 & MASK32
        k0 = (k0 + _WEYL[0]) & MASK32
        k1 = (k1 + _WEYL[1]) & MASK32
    return c0, c1, c2, c3


def uniform(positions: Tensor, samples: Tensor, row_keys: Tensor, seed: int) -> Tensor:
    """One fp64 uniform in (0, 1) per row: positions, samples, row_keys (B,) int64 (64-bit keys)."""
    row_low = row_keys & MASK32
    row_high = (row_keys >> 32) & MASK32
    counter = (positions, samples, row_low, row_high)
    word, _, _, _ = philox4x32(counter, mix("sample", seed))  # (B,)
    return (word.to(torch.float64) + 0.5) / 2**32


@jit
def uniform_triton(key, position, sample, row_key):
    """`uniform` inside a kernel: int64 in, fp64 out. `key` is signed64(mix("sample", seed))."""
    c0 = position.to(tl.uint32)
    c1 = sample.to(tl.uint32)
    c2 = row_key.to(tl.uint32)
    c3 = (row_key >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(key, c0, c1, c2, c3)
    return (word.to(tl.float64) + 0.5) / 4294967296.0


@dataclass(frozen=True)
class Dropout:
    """Which elements of an adapter's input are dropped, as a function and not as a stored mask."""

    p: float  # probability of dropping, rounded to a multiple of 2^-16
    key: int  # mix("dropout", seed, layer, input)
    positions: Tensor  # (T,) int64
    row_keys: Tensor  # (T,) int64, 32 bits
    step: Tensor  # () int64, the optimizer step

    @property
    def threshold(self) -> int:
        """A 16-bit lane below it is dropped: p of the 65536 values."""
        threshold = round(self.p * 65536)
        assert 0 <= threshold < 65536, f"dropout {self.p} is not in [0, 1)"
        return threshold

    def mask(self, columns: int, dtype: torch.dtype) -> Tensor:
        """(T, columns): 0 where dropped, 1 / (1 - p) elsewhere."""
        threshold = self.threshold
        blocks = torch.arange(cdiv(columns, 8), device=self.positions.device)  # of 8 columns
        positions = self.positions[:, None]  # (T, 1)
        row_keys = self.row_keys[:, None]  # (T, 1)
        counter = (blocks[None, :], positions, row_keys, self.step)
        words = philox4x32(counter, self.key)  # four of (T, blocks)
        halves = []  # eight of (T, blocks), 16 bits each
        for word in words:
            halves.append(word & 0xFFFF)
            halves.append(word >> 16)
        lanes = torch.stack(halves, dim=-1).flatten(1)  # (T, 8 blocks)
        kept = lanes[:, :columns] >= threshold
        scale = 65536 / (65536 - threshold)  # 1 / (1 - p)
        return kept.to(dtype) * scale


def dropout_arguments(dropout: Dropout | None) -> tuple:
    """The arguments of a kernel that draws the mask again, in the order of `dropout_tile`.

    positions, row keys, step, key, threshold.
    """
    if dropout is None:
        return None, None, None, 0, 0
    key = signed64(dropout.key)
    return dropout.positions, dropout.row_keys, dropout.step, key, dropout.threshold


@jit
def dropout_tile(
    position,  # (BM,) int64
    row_key,  # (BM,) int64
    step,  # () int64
    key,  # signed64(Dropout.key)
    first_column,
    threshold,  # Dropout.threshold
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Dropout.mask for a tile whose first column is a multiple of 8: (BM, BK) fp32."""
    block = first_column // 8 + tl.arange(0, BK // 8)

    # the counter of every block of 8 columns, (BM, BK / 8)
    zero = tl.zeros((BM, BK // 8), tl.uint32)
    c0 = zero + block[None, :].to(tl.uint32)
    c1 = zero + position[:, None].to(tl.uint32)
    c2 = zero + row_key[:, None].to(tl.uint32)
    c3 = zero + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)

    # Lane 2 i + half of a block is that half of word i: the last joins vary fastest.
    low02 = tl.join(w0 & 0xFFFF, w2 & 0xFFFF)  # (BM, BK / 8, 2)
    low13 = tl.join(w1 & 0xFFFF, w3 & 0xFFFF)
    low = tl.join(low02, low13)  # (BM, BK / 8, 2, 2)
    high02 = tl.join(w0 >> 16, w2 >> 16)
    high13 = tl.join(w1 >> 16, w3 >> 16)
    high = tl.join(high02, high13)
    lanes = tl.reshape(tl.join(low, high), (BM, BK))
    return tl.where(lanes >= threshold, 65536.0 / (65536 - threshold), 0.0)
