"""A table of weighted draws, shaped like NumPyro's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffsamp import metrics
from diffsamp.diagnostics import effective_sample_size
from diffsamp.drawing import Draws
from diffsamp.types import Array


def summary(
    samples: Mapping[str, Array] | Array,
    log_weight: Array | np.ndarray | None = None,
    *,
    prob: float = 0.9,
) -> str:
    """Mean, sd, median and a central interval of every scalar, with weights.

    Args:
        samples: named arrays [N, ...], or points [N, D].
        log_weight: log-weights, [N]; None for equal ones.
        prob: probability of the interval, in (0, 1).

    Returns:
        A table. Its ``ess`` column is Kish's, the same for all rows: draws are
        independent, so there is no R-hat.

    Raises:
        ValueError: when prob is not in (0, 1) or shapes disagree.

    Example:
        >>> import numpy as np, diffsamp as ds
        >>> table = ds.summary({"mu": np.array([1.0, 2.0, 3.0])})
        >>> table.splitlines()[1].split()[:2]
        ['mu', '2.00']
    """
    if not 0 < prob < 1:
        raise ValueError(f"prob must lie in (0, 1), got {prob}")
    named = samples if isinstance(samples, Mapping) else {"x": samples}
    tail = (1 - prob) / 2
    levels = np.array([0.5, tail, 1 - tail])
    names = ("mean", "std", "median", f"{tail:.1%}", f"{1 - tail:.1%}", "ess")
    rows = []
    for name, values in named.items():
        array = np.asarray(values)
        flat = array.reshape(len(array), -1)
        mean, sd = metrics.moments(flat, log_weight)
        quantiles = metrics.quantiles(flat, levels, log_weight)
        weights = np.zeros(len(array)) if log_weight is None else log_weight
        ess = float(effective_sample_size(weights))
        for j, index in enumerate(np.ndindex(*array.shape[1:])):
            label = name + (f"[{','.join(map(str, index))}]" if index else "")
            rows.append((label, mean[j], sd[j], *quantiles[:, j], ess))
    width = max(len(row[0]) for row in rows) + 2
    lines = [" " * width + "".join(f"{name:>10}" for name in names)]
    lines += [
        f"{row[0]:<{width}}" + "".join(f"{value:>10.2f}" for value in row[1:])
        for row in rows
    ]
    return "\n".join(lines)


def verdict_lines(draws: Draws, log_z: float | None = None) -> str:
    """Evidence, its bounds, ESS, k-hat and verdict in a few lines.

    Draws that have lost a part of the target are announced in capitals.

    Args:
        draws: result of `draw`.
        log_z: true value to print beside the estimate, where known.
    """
    found, report = draws.log_evidence, draws.diagnostics
    evidence = f"{found.estimate:.3f} +- {found.standard_error:.3f}"
    if log_z is not None:
        evidence += f"   (true value {log_z:.3f})"
    upper = "-" if found.upper is None else f"{found.upper:.3f}"
    alarm = []
    if report.collapsed:
        alarm = ["COLLAPSED        the sampler has lost a part of the target"]
    missing = "no probe"
    if report.missing_mass is not None:
        missing = f"{report.missing_mass:.1%} (noise {report.coverage_tolerance:.1%})"
    return "\n".join(
        [
            *alarm,
            f"log Z            {evidence}",
            f"bounds           ELBO {found.lower:.3f}, EUBO {upper}",
            f"ESS              {report.ess:.0f} of {len(draws.x)} draws",
            f"Pareto k-hat     {report.pareto_k:.2f}",
            f"missing mass     {missing}",
            f"verdict          {report.verdict}",
        ]
    )
