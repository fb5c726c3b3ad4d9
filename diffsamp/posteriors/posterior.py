"""The record that every packaged posterior is."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffsamp.numpyro import ModelTarget, target_from_model
from diffsamp.types import Modes

_DATA = pathlib.Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """A NumPyro model with real data and an independently computed answer.

    Attributes:
        name: identifier, as in :func:`diffsamp.posteriors.by_name`.
        model: NumPyro model, a function of the keyword arguments in ``data()``.
        data: the observed data, ``() -> dict``, fresh NumPy arrays.
        shapes: shape of each site that the reference draws cover; some are
            deterministic.
        dim: number of unconstrained dimensions D.
        log_evidence: log of the integral of the model's density; None where priors are
            improper.
        log_evidence_se: its standard error.
        modes: separated modes, on the flat unconstrained point [D], or None.
        minor_modes: a finer partition of the same space, or None.
        x64: whether the model needs 64-bit floats.
        note: what makes the geometry interesting.

    Example:
        >>> from diffsamp.posteriors import galaxies_mixture
        >>> posterior = galaxies_mixture()
        >>> posterior.dim, round(posterior.log_evidence, 3)
        (8, -225.115)
        >>> posterior.parameter_names()[:3]
        ['w[1]', 'w[2]', 'w[3]']
    """

    name: str
    model: Callable
    data: Callable[[], dict[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    dim: int
    log_evidence: float | None
    log_evidence_se: float | None
    modes: Modes | None = None
    minor_modes: Modes | None = None
    x64: bool = False
    note: str = ""

    def target(self, key: jax.Array | None = None) -> ModelTarget:
        """The posterior as a target that knows its log Z and modes.

        Args:
            key: consumed to find a valid initial point; does not change the density.

        Returns:
            A :class:`~diffsamp.numpyro.ModelTarget`.
        """
        made = target_from_model(
            self.model, model_kwargs=self.data(), key=key, name=self.name
        )
        return dataclasses.replace(made, log_z=self.log_evidence, modes=self.modes)

    def parameter_names(self) -> list[str]:
        """Scalar names as in the reference: ``sigma``, ``theta[1]`` (1-based)."""
        return [
            site + _suffix(index)
            for site, shape in self.shapes.items()
            for index in np.ndindex(*shape)
        ]

    def flatten(self, samples: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Splits draws of sites into named scalars.

        Args:
            samples: constrained draws, site to ``[n, *shape]``; others are dropped.

        Returns:
            Scalar name to [n].

        Raises:
            ValueError: when a site is missing or has another shape.
        """
        flat = {}
        for site, shape in self.shapes.items():
            got = np.shape(samples[site]) if site in samples else None
            if got is None or got[1:] != shape:
                wanted = ", ".join(map(str, ("n", *shape)))
                raise ValueError(
                    f"samples[{site!r}] must have shape [{wanted}], got {got}; pass "
                    "the dict of constrained sites, draws first"
                )
            values = np.asarray(samples[site])
            for index in np.ndindex(*shape):
                flat[site + _suffix(index)] = values[(slice(None), *index)]
        return flat

    def reference(self) -> dict[str, Any]:
        """The reference answer: ``parameters`` (mean, sd, ...), ``method``, ..."""
        return load_json(f"{self.name}_reference.json")

    def draws(self) -> dict[str, np.ndarray]:
        """Thinned reference draws of the model's sites, each ``[n, *shape]``.

        ``flatten`` names their scalars; ``jax.vmap(target.unconstrain)`` makes flat
        points of them, where they cover all latent sites.
        """
        with np.load(_DATA / f"{self.name}_draws.npz") as stored:
            columns = dict(
                zip(stored["names"].tolist(), stored["draws"].T, strict=True)
            )
        sites = {}
        for site, shape in self.shapes.items():
            stacked = [columns[site + _suffix(index)] for index in np.ndindex(*shape)]
            sites[site] = np.stack(stacked, 1).reshape(-1, *shape)
        return sites


def evidence_of(name: str) -> dict[str, Any]:
    """``log_evidence`` and its standard error, of the reference of that name."""
    found = load_json(f"{name}_reference.json").get("log_evidence", {})
    return {
        "log_evidence": found.get("value"),
        "log_evidence_se": found.get("se"),
    }


def load_json(name: str) -> dict[str, Any]:
    """A fresh copy of a packaged JSON file."""
    return json.loads(_read(name))


@functools.cache
def _read(name: str) -> str:
    return (_DATA / name).read_text()


def _suffix(index: tuple[int, ...]) -> str:
    return "[" + ",".join(str(i + 1) for i in index) + "]" if index else ""
