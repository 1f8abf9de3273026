"""A narrower residual stream: the subspace of the teacher's stream in which the student lives.

A stock student's stream z may be any linear map of the teacher's, z = S h, as long as every map
that writes into it and every map that reads it is narrowed alike. Picking dims is one such S. The
principal directions of the normalised stream (what the norms hand on, seen at every read) lose
less: of SmolLM2-135M's last stream, cut from 576 to 432 dims, 1.4% of the energy instead of 6.5%.

Among all bases of the principal subspace the one nearest to the picked dims is taken (orthogonal
Procrustes). Two reasons: dims whose norm weight is unlike all others' stay single dims, which a
stock final norm needs; and optimizers that scale each weight by itself, as Adam does, work in
the basis that the teacher grew up in.

Sources: Ashkboos et al., "SliceGPT", 2024 (arXiv:2401.15024), for principal directions, there
with another basis for each layer and code of its own; Schönemann, "A generalized solution of the
orthogonal Procrustes problem", 1966.

Legend: B windows, T positions, E teacher hidden, D student hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.layer import normed
from compress.reconstruct import add_gram


def add_stream_gram(gram_EE: Tensor, stream_BTE: Tensor, eps: float, dtype: torch.dtype) -> None:
    """Add the second moments of the stream divided by its size, over all positions.

    First positions, the attention sinks, are in it as any other: their directions must stay.
    ``dtype`` as of ``add_product``.
    """
    add_gram(gram_EE, normed(stream_BTE, eps).flatten(0, 1), dtype)


def principal_basis(gram_EE: Tensor, dims_D: Tensor) -> Tensor:
    """Orthonormal rows that span the D leading eigenvectors of ``gram_EE``, [D, E], float32.

    Turned so that row j lies as near as all rows together can to the unit vector of dim
    ``dims_D[j]``.
    """
    vectors_EE = torch.linalg.eigh(gram_EE.double()).eigenvectors
    leading_DE = vectors_EE[:, -len(dims_D) :].T
    left, _, right = torch.linalg.svd(leading_DE[:, dims_D.to(gram_EE.device)])
    basis_DE: Tensor = (left @ right).T @ leading_DE
    return basis_DE.float()
