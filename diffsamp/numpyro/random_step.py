"""NUTS with steps of random size: for targets that are narrow somewhere.

One step size suits one width. In the neck of a funnel, narrower than where the step was
adapted, every trajectory diverges, chains do not get in, and since none does R-hat has
nothing to object to. A transition whose step is drawn anew, between a share of the
adapted one and all of it, is a mixture of NUTS transitions whose choice does not depend
on the state, so that it is exact; the small ones of them go on where the others cannot.
(Neal 2011, section 5.4.2.2, randomises the step for another reason.)
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import NUTS
from numpyro.util import is_prng_key

from diffsamp.energies import as_key


class RandomStepNUTS(NUTS):
    """NUTS whose step size is log-uniform below the adapted one, after warm-up.

    Args:
        *args: of NumPyro's ``NUTS``.
        smallest: smallest step, as a share of the adapted one, in (0, 1].
        max_tree_depth: as of ``NUTS``; its 10 would be long trajectories of all chains
            whenever one draws a small step.
        **kwargs: of ``NUTS``.

    Raises:
        ValueError: when smallest is not in (0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.infer import MCMC
        >>> from diffsamp.numpyro import RandomStepNUTS
        >>> kernel = RandomStepNUTS(potential_fn=lambda x: 0.5 * jnp.sum(x**2))
        >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=50, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
        >>> mcmc.get_samples().shape
        (50, 2)
    """

    def __init__(
        self,
        *args: Any,
        smallest: float = 0.01,
        max_tree_depth: Any = 8,
        **kwargs: Any,
    ):
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest must lie in (0, 1], got {smallest}")
        super().__init__(*args, max_tree_depth=max_tree_depth, **kwargs)
        self._smallest = smallest
        self._last_of_warmup = 0

    def init(self, rng_key, num_warmup, *args, **kwargs):
        """As of ``NUTS``."""
        self._last_of_warmup = num_warmup
        return super().init(rng_key, num_warmup, *args, **kwargs)

    def sample(self, state, model_args, model_kwargs):
        """As of ``NUTS``, with a step of random size."""
        adapted = state.adapt_state.step_size
        keys, one = state.rng_key, is_prng_key(state.rng_key)
        draw = self._share if one else jax.vmap(self._share)
        share = jnp.where(state.i < self._last_of_warmup, 1.0, draw(keys))
        step = (adapted * share).astype(adapted.dtype)
        new = super().sample(_with_step(state, step), model_args, model_kwargs)
        found = new.adapt_state.step_size
        return _with_step(
            new, jnp.where(state.i < self._last_of_warmup, found, adapted)
        )

    def _share(self, key):
        key = jax.random.fold_in(as_key(key), 1)
        return jnp.exp(math.log(self._smallest) * jax.random.uniform(key))


def _with_step(state, step):
    return state._replace(adapt_state=state.adapt_state._replace(step_size=step))
