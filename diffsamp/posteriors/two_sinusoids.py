"""Two periodic signals in eighteen gappy, noisy measurements.

The observation times nearly repeat every week, so each frequency has aliases, and
either signal may be called the first (an exact symmetry).

Source: simulated for this project, after the search for periodic signals in unevenly
sampled astronomical series; Bretthorst, "Bayesian spectrum analysis and parameter
estimation", 1988, for the analytic integration over amplitudes behind the reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from diffsamp.numpyro import ModelTarget
from diffsamp.posteriors.posterior import Posterior, load_json
from diffsamp.types import Array, Modes

_LOW, _HIGH = 0.02, 0.5
# Cells (intervals of the two frequencies) of less weight are no modes of their own.
_MODE_WEIGHT = 0.005


def model(t: Array, y: Array, noise: float):
    """The NumPyro model.

    Args:
        t: times in days, [18].
        y: measurements, [18].
        noise: their standard deviation.
    """
    freq = numpyro.sample("freq", dist.Uniform(_LOW, _HIGH).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
    b = numpyro.sample("b", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
    phase = 2.0 * jnp.pi * t[:, None] * jnp.expand_dims(freq, 0)
    signal = jnp.cos(phase) @ a + jnp.sin(phase) @ b
    numpyro.sample("obs", dist.Normal(signal, noise), obs=y)


def data() -> dict[str, np.ndarray | float]:
    """Times [18] in days, measurements [18] and the noise's standard deviation."""
    stored = load_json("two_sinusoids.json")
    return {
        "t": np.array(stored["t"]),
        "y": np.array(stored["y"]),
        "noise": float(stored["noise"]),
    }


def two_sinusoids() -> Posterior:
    """Two sinusoids with aliased frequencies: 18 modes in exact pairs, D = 6.

    The frequency axis is cut into 8 intervals at its aliases. ``minor_modes`` are the
    8 x 8 cells, index ``8 * interval(freq[0]) + interval(freq[1])``. ``modes`` are the
    18 cells above 0.5 % in the same order, and last, as index 18, all other cells
    together (3 %). Weights are from quadrature; adjacent aliases of one frequency
    (0.077 and 0.084) overlap, so not all cells are separated by empty space.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.

    Example:
        >>> from diffsamp.posteriors import two_sinusoids
        >>> two_sinusoids().modes.weights.shape
        (19,)
    """
    reference = load_json("two_sinusoids_reference.json")
    mass = np.array(reference["modes"]["joint_mass"])
    mass = mass / mass.sum()
    cell = jax.tree_util.Partial(_cell, np.array(reference["modes"]["edges"][1:-1]))
    is_mode = mass.ravel() > _MODE_WEIGHT
    weights = np.append(mass.ravel()[is_mode], mass.ravel()[~is_mode].sum())
    index = np.where(is_mode, np.cumsum(is_mode) - 1, is_mode.sum())
    return Posterior(
        name="two_sinusoids",
        model=model,
        data=data,
        shapes={"freq": (2,), "a": (2,), "b": (2,)},
        dim=6,
        log_evidence=reference["log_evidence"]["value"],
        log_evidence_se=reference["log_evidence"]["se"],
        modes=Modes(
            jnp.asarray(weights, float),
            jax.tree_util.Partial(_mode, jnp.asarray(index, jnp.int32), cell),
        ),
        minor_modes=Modes(jnp.asarray(mass.ravel(), float), cell),
        note="two labels times several aliases of each frequency",
    )


def target() -> ModelTarget:
    """``two_sinusoids().target()``: the posterior with log Z and modes filled in."""
    return two_sinusoids().target()


def _cell(edges: Array, x: Array) -> Array:
    # flat order is by site name: a, b, freq
    freq = _LOW + (_HIGH - _LOW) * jax.nn.sigmoid(x[4:6])
    interval = jnp.searchsorted(jnp.asarray(edges, x.dtype), freq, side="right")
    return 8 * interval[0] + interval[1]


def _mode(index: Array, cell, x: Array) -> Array:
    return index[cell(x)]
