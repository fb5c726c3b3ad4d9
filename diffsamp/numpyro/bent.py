"""Coordinates without skewness and heavy tails, each by itself.

    x_i = h_i(y_i),  h(y) = shift + stretch sinh(tail asinh(y) + skew),  tail >= 1,

the inverse of the sinh-arcsinh transformation of Jones and Pewsey (2009, Biometrika
96(4)). A sampler's tails are Gaussian in y, and weights of finite variance need tails
that are not lighter than the posterior's: at tail = 2 they are exponential in x, like
those of the logarithm of a parameter whose density is a power near the edge of its
support. Tails lighter than Gaussian are left as they are, for they do no harm.

Fitted by maximum likelihood, and kept for a coordinate only where it helps points that
it was not fitted to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from diffsamp.numpyro.affine import checked_draws
from diffsamp.types import Array, ArrayLike

LEAST_GAIN = 0.02  # nats of a coordinate, on points left out
MOST_SKEW, MOST_TAIL = 2.0, 2.5
_STRAIGHT = np.array([0.0, 1.0, 0.0, 1.0])  # shift, stretch, skew, tail


class Bent(NamedTuple):
    """The map of the module's equation.

    Attributes:
        shift: [D].
        stretch: [D].
        skew: [D].
        tail: [D].
    """

    shift: Array
    stretch: Array
    skew: Array
    tail: Array

    def forward(self, y: Array) -> Array:
        """X of y, [D]."""
        return self.forward_and_log_det(y)[0]

    def inverse(self, x: Array) -> Array:
        """Y of x, [D]."""
        shift, stretch, skew, tail = (v.astype(x.dtype) for v in self)
        return jnp.sinh((jnp.arcsinh((x - shift) / stretch) - skew) / tail)

    def forward_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Both x of y, [D], and the log-determinant of dx/dy at y, []."""
        shift, stretch, skew, tail = (v.astype(y.dtype) for v in self)
        bent = tail * jnp.arcsinh(y) + skew
        log_cosh = jnp.logaddexp(bent, -bent) - np.log(2.0)
        log_slope = jnp.log(stretch * tail) + log_cosh - 0.5 * jnp.log1p(y**2)
        return shift + stretch * jnp.sinh(bent), jnp.sum(log_slope)


def bent_from(draws: ArrayLike) -> Bent:
    """The map fitted to given draws of about unit scale.

    Args:
        draws: points, [N, D], in the order in which they were made: what is fitted to
            one half of them is tried on the other, and copies of a point stand together
            in what tempered SMC returns.

    Raises:
        ValueError: when there are fewer than two, one is not finite, or a coordinate
            has no spread.

    Example:
        >>> import numpy as np
        >>> from diffsamp.numpyro import bent_from
        >>> draws = np.random.default_rng(0).laplace(size=(2_000, 1))
        >>> bool(bent_from(draws).tail[0] > 1.1)
        True
    """
    bends = [_bend(u) for u in checked_draws(draws).T]
    return Bent(*(jnp.asarray(field, float) for field in np.transpose(bends)))


def _bend(u):
    """Shift, stretch, skew and tail of numbers [N]."""
    half = len(u) // 2
    first = _bent(u[:half])
    gain = _nats(_STRAIGHT, u[half:])[0] - _nats(first, u[half:])[0]
    if not gain > LEAST_GAIN:
        return _STRAIGHT
    found = _bent(u)
    return found if _nats(found, u)[0] < _nats(_STRAIGHT, u)[0] else _STRAIGHT


def _bent(u):
    """The same by maximum likelihood."""
    return scipy.optimize.minimize(
        _nats,
        _STRAIGHT,
        args=(u,),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-5, 5), (1e-2, 5), (-MOST_SKEW, MOST_SKEW), (1, MOST_TAIL)],
    ).x


def _nats(numbers, u) -> tuple[float, np.ndarray]:
    """Minus log-likelihood of a number, but for a constant, and its gradient."""
    shift, stretch, skew, tail = numbers
    v = (u - shift) / stretch
    root, t = np.sqrt(1 + v**2), (np.arcsinh(v) - skew) / tail
    nats = 0.5 * np.sinh(t) ** 2 - np.log(np.cosh(t)) + np.log(root)
    by_t = np.sinh(t) * np.cosh(t) - np.tanh(t)
    by_v = by_t / (tail * root) + v / root**2
    gradient = np.array(
        [
            -np.mean(by_v) / stretch,
            (1 - np.mean(by_v * v)) / stretch,
            -np.mean(by_t) / tail,
            (1 - np.mean(by_t * t)) / tail,
        ]
    )
    return float(np.mean(nats)) + np.log(stretch * tail), gradient
