"""Orthogonal matrices whose entries are all small, for any size: they spread an outlier over all channels."""

from __future__ import annotations

import math

import torch


def flat_orthogonal(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix (x) the cosine transform of the odd part of `size`; all entries <= sqrt(2 / size).

    Returns:
        float64, (size, size), orthogonal; its first row is constant. For a power of two it is the normalised
        Hadamard matrix.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    row, column = torch.arange(odd, dtype=torch.float64).unsqueeze(1), torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * column + 1) * row / (2 * odd)) * math.sqrt(2 / odd)
    matrix[0] = 1 / math.sqrt(odd)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


def random_signs(size: int, seed: int) -> torch.Tensor:
    """+1 and -1 in float64, (size,), a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1


def randomised(size: int, seed: int) -> torch.Tensor:
    """A flat orthogonal matrix with random signs, float64 (size, size): QuaRot's randomised Hadamard."""
    return flat_orthogonal(size) * random_signs(size, seed).unsqueeze(1)


def mean_preserving(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix that leaves the constant vector where it is, float64 (size, size).

    `Fᵀ D F` with F flat and D random signs but for a first 1. Taking the mean away commutes with it, so that a
    LayerNorm stays a LayerNorm, where another rotation would need the mean taken out of every weight before it.
    """
    signs = random_signs(size, seed)
    signs[0] = 1
    flat = flat_orthogonal(size)
    return flat.T @ (signs.unsqueeze(1) * flat)
