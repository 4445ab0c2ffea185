"""The hash from which SGLang draws seeded samples, for a CPU without SGLang's own kernels."""

import torch

_MASK = 0xFFFFFFFF


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """Hash each (seed, position) with each column, by SGLang's Triton kernel of this name.

    Args:
        seed: [n] uint64 or int64; positions: [n] int64; col_indices: [m] int64.

    Returns:
        [n, m] int64, 0 to 2**32 - 1 (sglang/kernels/ops/sampling/murmur_hash.py).
    """
    seed = seed.view(torch.int64)
    rows = torch.zeros_like(positions)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions & _MASK):
        rows = _mix(rows, word)
    hashed = _mix(rows[:, None], col_indices[None]) ^ 16  # bytes hashed
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & _MASK
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & _MASK
    return hashed ^ (hashed >> 16)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _rotate((word * 0xCC9E2D51) & _MASK, 15)
    state = _rotate(state ^ ((word * 0x1B873593) & _MASK), 13)
    return (state * 5 + 0xE6546B64) & _MASK


def _rotate(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _MASK
