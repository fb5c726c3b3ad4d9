"""Equal-weight isotropic Gaussian mixtures: grids of 9 and 25, random 40."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import (
    cast,
    default_float,
    point,
    read_csv,
    root_mean_square,
)
from diffsamp.targets.moments import mode_weights
from diffsamp.types import Modes, Target

_GMM40_FILES = {
    ("fab", 2): "gmm40_means_fab_seed0",
    ("sde_sampler", 2): "gmm40_means_sde_sampler_seed42",
    ("vsm", 2): "gmm40_means_jax_key0_d2",
    ("vsm", 50): "gmm40_means_jax_key0_d50",
    ("vsm", 200): "gmm40_means_jax_key0_d200",
}


def _energy(means, sd, x):
    num_modes, dim = means.shape
    x = point(x, dim)
    means, sd = cast(x.dtype, means, sd)
    log_terms = -0.5 * jnp.sum(((x[None, :] - means) / sd) ** 2, axis=1)
    log_normaliser = dim * (jnp.log(sd) + 0.5 * math.log(2 * math.pi))
    return math.log(num_modes) + log_normaliser - jax.nn.logsumexp(log_terms)


def _sample(means, sd, key, n):
    means, sd = cast(default_float(), means, sd)
    key_mode, key_z = jax.random.split(key)
    mode = jax.random.randint(key_mode, (n,), 0, means.shape[0])
    return means[mode] + sd * jax.random.normal(key_z, (n, means.shape[1]), means.dtype)


def _nearest(means, x):
    x = point(x, means.shape[1])
    (means,) = cast(x.dtype, means)
    return jnp.argmin(jnp.sum((x[None, :] - means) ** 2, axis=1))


def _mixture(name, means, sd, weights):
    return Target(
        energy=Partial(_energy, means, np.asarray(sd)),
        dim=means.shape[1],
        name=name,
        log_z=0.0,
        sample=Partial(_sample, means, np.asarray(sd)),
        modes=Modes(jnp.asarray(weights), Partial(_nearest, means)),
        scale=root_mean_square(means, sd),
    )


def _grid(points):
    return np.stack(np.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 2)


def gmm9() -> Target:
    r"""Nine Gaussians on a 3 x 3 grid, 2-D.

    .. math:: \rho(x) = \tfrac19 \sum_m N(x; m, 0.3 I), \quad m \in \{-5, 0, 5\}^2

    log Z = 0 (normalised). From PIS (Zhang and Chen 2022), also in DIS and Sendera et
    al. 2024. Modes are cells of the nearest mean, weight 1/9 each. ``scale`` is the
    overall standard deviation, 4.12; the papers start from 1, which is narrow.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.gmm9().log_z
        0.0
    """
    means = _grid(np.array([-5.0, 0.0, 5.0]))
    return _mixture("gmm9", means, math.sqrt(0.3), np.full(9, 1 / 9))


def gmm25() -> Target:
    r"""Twenty-five Gaussians on a 5 x 5 grid, 2-D.

    .. math:: \rho(x) = \tfrac1{25} \sum_m N(x; m, 0.3 I), \quad
              m \in \{-10, -5, 0, 5, 10\}^2

    log Z = 0 (normalised). From Sendera et al. 2024. Modes are cells of the nearest
    mean, weight 1/25 each. ``scale`` is the overall standard deviation, 7.09.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.gmm25().modes.weights.shape
        (25,)
    """
    means = _grid(np.array([-10.0, -5.0, 0.0, 5.0, 10.0]))
    return _mixture("gmm25", means, math.sqrt(0.3), np.full(25, 1 / 25))


def gmm40(variant: str = "fab", dim: int = 2) -> Target:
    r"""Forty Gaussians at random means in the box [-40, 40]^D.

    .. math:: \rho(x) = \tfrac1{40} \sum_m N(x; m, s^2 I)

    log Z = 0 (normalised). Three mixtures share this name in the literature:

    * ``"fab"`` (Midgley et al. 2023, DEM): PyTorch seed 0, s = softplus(1) = 1.3133;
    * ``"sde_sampler"`` (Richter and Berner 2024): seed 42, the same s;
    * ``"vsm"`` (Blessing et al. 2024): JAX key 0, s = 1, D = 2, 50 or 200.

    Modes are cells of the nearest mean. In 2-D some overlap (the closest pair of
    "fab" is 1.18 apart), so weights are probabilities of cells, by quadrature, not
    1/40. ``scale`` is the overall root mean square, about 23.

    Raises:
        ValueError: when there is no such variant in this dimension.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.gmm40("vsm", dim=50).dim
        50
    """
    if (variant, dim) not in _GMM40_FILES:
        valid = ", ".join(f"{v!r} with dim={d}" for v, d in _GMM40_FILES)
        raise ValueError(
            f"variant and dim must be one of {valid}; got {variant!r} with dim={dim!r}"
        )
    file = _GMM40_FILES[variant, dim]
    suffix = "" if variant == "fab" else f"_{variant}"
    suffix += "" if dim == 2 else f"_{dim}"
    sd = 1.0 if variant == "vsm" else math.log1p(math.e)
    weights = mode_weights(file) if dim == 2 else np.full(40, 1 / 40)
    return _mixture("gmm40" + suffix, read_csv(f"{file}.csv"), sd, weights)
