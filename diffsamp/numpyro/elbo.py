"""Objectives of `diffsamp.objectives` as losses of NumPyro's ``SVI``.

``SVI`` asks its loss for one number to differentiate, so that whatever works on the
sampler's own paths and keeps nothing between updates can stand there. Buffers, learned
log Z and target copies need `diffsamp.fit`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.elbo import ELBO

from diffsamp import behaviours, objectives, training
from diffsamp.numpyro.guide import AutoDiffusion
from diffsamp.types import Objective, Request


class PathELBO(ELBO):
    """An objective on the paths of an `AutoDiffusion` guide.

    The losses that ``SVI`` reports are those of the objective: for
    `objectives.log_variance` a variance, which is zero for a perfect sampler, and no
    bound.

    Args:
        objective: on-policy and without parameters or state of its own;
            `objectives.log_variance` by default.
        num_particles: paths per update.

    Raises:
        ValueError: for an objective that needs more, when ``SVI`` starts; for another
            guide.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optax
        >>> import diffsamp as ds
        >>> from numpyro.infer import SVI
        >>> from diffsamp.numpyro import AutoDiffusion, PathELBO
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
        >>> loss = PathELBO(ds.objectives.log_variance(), num_particles=8)
        >>> svi = SVI(model, AutoDiffusion(model, num_steps=4), optax.adam(1e-3), loss)
        >>> svi.run(jax.random.key(0), 3, progress_bar=False).losses.shape
        (3,)
    """

    def __init__(self, objective: Objective | None = None, num_particles: int = 64):
        super().__init__(num_particles)
        self.objective = objective or objectives.log_variance()

    def loss(
        self,
        rng_key: Any,
        param_map: dict[str, Any],
        model: Any,
        guide: Any,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """The objective's value for new paths.

        Args:
            rng_key: consumed.
            param_map: parameters of ``SVI``.
            model: not looked at; the guide knows it.
            guide: an `AutoDiffusion`.
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        del model
        if not isinstance(guide, AutoDiffusion):
            raise ValueError(
                f"guide must be an AutoDiffusion, got {type(guide).__name__}; "
                "NumPyro's own losses take any guide"
            )
        sampler, energy = guide.sampler, guide.energy(*args, **kwargs)
        params = guide.params_of(param_map)
        requires = self.objective.requires
        kinds = ("target_draws", "pilot", "anchor")
        wants = [name for name in kinds if getattr(requires, name)]
        own = state = None
        if not wants:
            own, state = self.objective.init(
                jax.random.key(0), sampler, params, energy, None
            )
            parts = {"parameters": own, "state": state}
            wants = [name for name, part in parts.items() if jax.tree.leaves(part)]
        if wants:
            raise ValueError(
                "objective must work on the sampler's own paths alone, and this one "
                f"has {' and '.join(wants)}; train it with diffsamp.fit or "
                "DiffusionSampler"
            )
        for_paths, for_loss = jax.random.split(rng_key)
        num = self.num_particles
        request = Request(jnp.zeros((num, 0)), jnp.zeros((num,), jnp.int32))
        zero, proposal = jnp.zeros((), jnp.int32), None
        if not requires.simulation_gradient:
            proposal = behaviours.on_policy().propose(
                (),
                for_paths,
                sampler,
                jax.lax.stop_gradient(params),
                energy,
                request,
                zero,
            )
        value, _ = training.batch_loss(
            {"sampler": params, "objective": own},
            self.objective,
            state,
            sampler,
            energy,
            proposal,
            request,
            keys=(for_paths, for_loss),
            count=zero,
        )
        return value
