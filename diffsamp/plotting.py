"""Pictures of a result. Needs matplotlib: ``pip install diffsamp[plots]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from diffsamp.drawing import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overview(
    draws: Draws,
    curve: Mapping[str, np.ndarray] | None = None,
    *,
    log_z: float | None = None,
    coordinates: tuple[int, int] = (0, 1),
    points: Mapping[str, np.ndarray] | None = None,
    bars: Mapping[str, np.ndarray] | None = None,
    labels: tuple[str, str] | None = None,
) -> Figure:
    """Draws by weight, the law of the weights, training, and mode weights, in a figure.

    Args:
        draws: result of `draw`.
        curve: ``fit.metrics``, for the training curve.
        log_z: true log Z, drawn as a line.
        coordinates: the two coordinates shown.
        points: other points to show beside the draws, name to [n, 2], in the shown
            coordinates.
        bars: mode weights by method, name to [M].
        labels: names of the two coordinates.

    Returns:
        A Matplotlib figure, to be saved by ``figure.savefig(path)``.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> import matplotlib, jax, diffsamp as ds
        >>> matplotlib.use("Agg")
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> draws = ds.draw(jax.random.key(1), sampler, params, target.energy, 100)
        >>> figure = ds.plotting.overview(draws, log_z=target.log_z)
        >>> [axis.get_title() for axis in figure.axes]
        ['draws', 'log weights', 'training']
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install diffsamp[plots]"
        ) from error
    points = dict(points or {})
    figure, axes = plt.subplots(
        1, 3 + bool(bars), figsize=(4.2 * (3 + bool(bars)), 3.8), layout="constrained"
    )
    i, j = coordinates if draws.x.shape[1] > 1 else (0, 0)
    _scatter(axes[0], draws, draws.x[:, i], draws.x[:, j], points)
    axes[0].set(xlabel=(labels or (f"x[{i}]", f"x[{j}]"))[0])
    axes[0].set(ylabel=(labels or (f"x[{i}]", f"x[{j}]"))[1])
    _weights(axes[1], draws, log_z)
    _training(axes[2], curve, log_z)
    if bars:
        _bars(axes[3], bars)
    figure.suptitle(draws.diagnostics.verdict[:110], fontsize=9)
    return figure


def _scatter(axis: Axes, draws: Draws, x, y, points: Mapping[str, np.ndarray]) -> None:
    size = np.full(len(x), 4.0)
    if draws.log_weight is not None:
        finite = np.where(np.isfinite(draws.log_weight), draws.log_weight, -np.inf)
        if finite.max() > -np.inf:
            weight = np.exp(finite - finite.max())
            size = np.clip(4.0 * weight / weight.mean(), 0.2, 60.0)
    for name, other in points.items():
        axis.scatter(other[:, 0], other[:, 1], s=3, color="0.6", label=name)
    axis.scatter(x, y, s=size, alpha=0.4, label="draws (area = weight)")
    axis.set_title("draws")
    axis.legend(fontsize=7, loc="best")


def _weights(axis: Axes, draws: Draws, log_z: float | None) -> None:
    if draws.log_weight is not None:
        finite = draws.log_weight[np.isfinite(draws.log_weight)]
        if finite.size:
            low, high = np.quantile(finite, [0.002, 1.0])
            axis.hist(finite, bins=60, range=(low, high + 1e-6), density=True)
    if np.isfinite(draws.log_evidence.estimate):
        axis.axvline(draws.log_evidence.estimate, color="C1", label="log Z estimate")
    if log_z is not None:
        axis.axvline(log_z, color="k", linestyle=":", label="log Z true")
    axis.set(title="log weights", xlabel="log weight")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _training(axis: Axes, curve: Any, log_z: float | None) -> None:
    axis.set(title="training", xlabel="update", ylabel="ELBO")
    if curve is None or not len(curve.get("elbo", ())):
        return
    elbo = curve["elbo"]
    window = max(1, len(elbo) // 200)
    count = len(elbo) // window
    pieces = elbo[: count * window].reshape(count, window)
    known = np.isfinite(pieces).any(axis=1)  # not where no row was on-policy
    if not known.any():
        axis.text(0.5, 0.5, "no on-policy paths", ha="center", transform=axis.transAxes)
        return
    mean = np.nanmean(np.where(np.isfinite(pieces), pieces, np.nan)[known], axis=1)
    axis.plot((window * np.arange(1, count + 1))[known], mean)
    if log_z is not None:
        axis.axhline(log_z, color="k", linestyle=":", label="log Z true")
        axis.legend(fontsize=7)
    low = np.nanquantile(mean, 0.1)
    top = max(np.nanmax(mean), log_z if log_z is not None else -np.inf)
    axis.set_ylim(low - 0.1 * abs(top - low), top + 0.1 * abs(top - low) + 1e-3)


def _bars(axis: Axes, bars: Mapping[str, np.ndarray]) -> None:
    width = 0.8 / len(bars)
    for k, (name, values) in enumerate(bars.items()):
        axis.bar(np.arange(len(values)) + k * width, values, width, label=name)
    axis.set(title="mode weights", xlabel="mode")
    axis.legend(fontsize=7)
