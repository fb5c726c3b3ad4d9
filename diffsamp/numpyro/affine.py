"""Affine coordinates: ``x = loc + L y``, with L lower triangular.

Unlike the reference's ``loc`` and ``scale`` they also take correlations away.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from diffsamp.energies import as_energy, check_energy
from diffsamp.types import Array, ArrayLike, Energy, as_count


class Affine(NamedTuple):
    """The map ``x = loc + matrix @ y``.

    Attributes:
        loc: [D].
        matrix: lower triangular with a positive diagonal, [D, D].
    """

    loc: Array
    matrix: Array

    def forward(self, y: Array) -> Array:
        """X of y, [D]."""
        loc, matrix = self.loc.astype(y.dtype), self.matrix.astype(y.dtype)
        return loc + jnp.matmul(matrix, y, precision="highest")

    def inverse(self, x: Array) -> Array:
        """Y of x, [D]."""
        loc, matrix = self.loc.astype(x.dtype), self.matrix.astype(x.dtype)
        return solve_triangular(matrix, x - loc, lower=True)

    def forward_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Both x of y, [D], and the log-determinant of dx/dy, everywhere the same."""
        log_det = jnp.sum(jnp.log(jnp.diagonal(self.matrix)))
        return self.forward(y), log_det.astype(y.dtype)


def affine_from(draws: ArrayLike) -> Affine:
    """Mean and Cholesky factor of the covariance of given draws.

    The covariance is shrunk towards its diagonal by the share D^2 / (N^2 + D^2), so
    that few draws give a factor as well, and many keep their correlations.

    Args:
        draws: points, [N, D].

    Raises:
        ValueError: when there are fewer than two, one is not finite, or a coordinate
            has no spread.

    Example:
        >>> import numpy as np
        >>> from diffsamp.numpyro import affine_from
        >>> affine = affine_from(np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 1.0]]))
        >>> affine.loc.tolist()
        [2.0, 1.6666666269302368]
    """
    points = checked_draws(draws)
    num, dim = points.shape
    covariance = np.cov(points, rowvar=False).reshape(dim, dim)
    share = dim**2 / (num**2 + dim**2)
    diagonal = np.diag(np.diagonal(covariance))
    matrix = np.linalg.cholesky((1 - share) * covariance + share * diagonal)
    return Affine(jnp.asarray(points.mean(axis=0), float), jnp.asarray(matrix, float))


def affine_from_curvature(
    draws: ArrayLike, energy: Energy, *, num_points: int = 16
) -> Affine:
    """Mean of given draws and what the energy's curvature at some says of their spread.

    For more dimensions than `affine_from` has draws for: the covariance is the inverse
    of the mean Hessian of the energy, exact where the density is normal. Elsewhere it
    is a lower bound of the covariance, by Cramér and Rao, if the draws are of the
    density: then y is as wide as a unit normal in every direction, or wider.

    Args:
        draws: points, [N, D]; their mean is ``loc``.
        energy: maps [D] to [].
        num_points: draws at which there is a Hessian, [D, D], spread over all of them.
            Where every coordinate has a curvature of its own, the worst of many
            coordinates asks for more.

    Raises:
        ValueError: as `affine_from`; when num_points is not from 1 to N, or the mean
            Hessian is not positive definite.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from diffsamp.numpyro import affine_from_curvature
        >>> draws = np.array([[0.0, 1.0], [2.0, 3.0]])
        >>> affine_from_curvature(draws, lambda x: 2 * x @ x, num_points=2).matrix
        Array([[0.5, 0. ],
               [0. , 0.5]], dtype=float32)
    """
    points, num_points = checked_draws(draws), as_count("num_points", num_points)
    if num_points > len(points):
        raise ValueError(
            f"num_points must be at most the {len(points)} draws, got {num_points}"
        )
    energy = as_energy(energy)
    check_energy(energy, points.shape[1], jnp.asarray(points, float).dtype)
    some = points[np.linspace(0, len(points) - 1, num_points).astype(int)]
    hessian = np.asarray(_mean_hessian(energy, jnp.asarray(some, float)), np.float64)
    least = -np.inf
    if np.all(np.isfinite(hessian)):
        least = np.linalg.eigvalsh(hessian)[0]
    if not least > 0:
        raise ValueError(
            f"the mean Hessian at {num_points} draws has a smallest eigenvalue of "
            f"{least:.3g}, so no normal distribution fits; take more of them, or "
            "affine_from(draws)"
        )
    matrix = np.linalg.cholesky(np.linalg.inv(hessian))
    return Affine(jnp.asarray(points.mean(axis=0), float), jnp.asarray(matrix, float))


@jax.jit
def _mean_hessian(energy: Energy, points: Array) -> Array:
    return jnp.mean(jax.lax.map(jax.hessian(energy), points), axis=0)


def checked_draws(draws: ArrayLike) -> np.ndarray:
    """The draws in 64 bits, if a map can be fitted to them.

    Args:
        draws: points, [N, D].

    Raises:
        ValueError: when there are fewer than two, one is not finite, or a coordinate
            has no spread.
    """
    points = np.asarray(draws, np.float64)
    if points.ndim != 2 or len(points) < 2 or not np.all(np.isfinite(points)):
        raise ValueError(
            "draws must be at least two finite points [N, D], got shape "
            f"{list(points.shape)}"
        )
    variances = np.var(points, axis=0)
    if not np.all(variances > 0):
        flat = np.flatnonzero(variances <= 0).tolist()
        raise ValueError(f"draws have no spread in coordinates {flat}")
    return points
