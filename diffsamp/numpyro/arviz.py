"""What ArviZ reads, on both of its lines.

ArviZ 0.x takes anything that looks like NumPyro's ``MCMC``; 1.x takes a subclass of its
public ``NumPyroInferenceAdapter``. Neither knows weights, so it gets the resampled
draws; their ``log_weight`` is among the sample statistics.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsamp.numpyro.inference import DiffusionSampler


def to_arviz(inference: DiffusionSampler, **options: Any) -> Any:
    """Draws of a `DiffusionSampler` as ArviZ's container of groups.

    The draws stand as one chain: they are independent, so there is no R-hat to compute
    between chains, and an effective sample size that ArviZ prints knows nothing of the
    weights. Judge by ``inference.diagnostics``.

    Args:
        inference: one that has drawn.
        **options: of ``from_numpyro``: ``dims``, ``coords``, ``log_likelihood``,
            ``posterior_predictive``, ...

    Returns:
        ``InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x), with the groups
        posterior, sample_stats, observed_data and what the options ask for.

    Raises:
        ImportError: without ArviZ.
        RuntimeError: before `DiffusionSampler.run`.
    """
    inference.get_samples()  # says what to do where nothing is drawn yet
    with contextlib.suppress(ImportError):
        base = importlib.import_module("arviz_base")
        if hasattr(base, "NumPyroInferenceAdapter"):
            return base.from_numpyro(_adapter(base, inference), **options)
    try:
        arviz = importlib.import_module("arviz")
    except ImportError as error:
        raise ImportError(
            "to_arviz needs ArviZ: pip install 'diffsamp[arviz]'"
        ) from error
    return arviz.from_numpyro(inference, **options)


def _adapter(base, inference: DiffusionSampler):
    class Adapter(base.NumPyroInferenceAdapter):
        sample_dims = ("chain", "draw")

        def get_samples(self, seed=None, **kwargs):
            return inference.get_samples(group_by_chain=True)

        def get_sample_stats(self, **kwargs):
            return inference.get_extra_fields(group_by_chain=True)

    return Adapter(
        inference,
        inference.model,
        inference._args,
        inference._kwargs,
        (1, inference.num_samples),
    )
