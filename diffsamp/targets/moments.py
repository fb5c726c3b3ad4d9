"""Packaged truths that no formula gives: posterior moments and mode weights."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import numpy as np


@functools.lru_cache
def _read_json(filename: str) -> dict[str, Any]:
    path = importlib.resources.files("diffsamp.targets") / "data" / filename
    return json.loads(path.read_text(encoding="utf-8"))


def mode_weights(name: str) -> np.ndarray:
    """Probabilities of the modes of a mixture whose components overlap, [M]."""
    return np.asarray(_read_json("mode_weights.json")[name])


def reference_moments(name: str) -> dict[str, Any]:
    """Returns the true moments of a posterior.

    Computed by long NUTS or HMC runs, and by quadrature for Brownian motion and the
    five parameters of seeds; the origin of each is in the data folder's README.

    Args:
        name: "breast_cancer", "brownian", "german_credit", "german_credit_flat",
            "german_credit_sd1", "ionosphere", "lgcp" (unwhitened), "seeds" or "sonar".

    Returns:
        ``mean`` [D], ``sd`` [D], ``log_z`` and its standard error ``log_z_se``.

    Raises:
        ValueError: when there are no moments of that name.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.reference_moments("seeds")["mean"].shape
        (26,)
    """
    table = _read_json("reference_moments.json")
    if name not in table:
        raise ValueError(f"name must be one of {', '.join(table)}; got {name!r}")
    entry = table[name]
    return {
        "mean": np.asarray(entry["mean"]),
        "sd": np.asarray(entry["sd"]),
        "log_z": entry["log_z"],
        "log_z_se": entry["log_z_se"],
    }
