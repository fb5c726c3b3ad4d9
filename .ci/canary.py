"""Numerical canary: does this JAX compute what NumPy computes?

Some JAX releases have miscompiled loops on CPU (0.10.2 is reported to). This script
runs before everything else, without `diffsamp`, on the two shapes of computation the
library lives on:

* a jitted, vmapped ``lax.scan`` of network steps with its gradient, against a NumPy
  float64 loop whose gradient is derived by hand;
* log Z of a conjugate Gaussian model, estimated from the weights of a jitted random
  walk (against the closed form), and by quadrature inside a scan.

Run it with ``python .ci/canary.py``; it exits with 1 and says which figure is off.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

BATCH, DIM, WIDTH, STEPS = 7, 3, 16, 40
STEP_SIZE = 1.0 / STEPS


def _problem():
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(DIM, WIDTH)) / np.sqrt(DIM),
        "b1": 0.1 * rng.normal(size=WIDTH),
        "w2": rng.normal(size=(WIDTH, DIM)) / np.sqrt(WIDTH),
    }
    x0 = rng.normal(size=(BATCH, DIM))
    noise = rng.normal(size=(BATCH, STEPS, DIM))
    return params, x0, noise


def _loss_jax(params, x0, noise):
    """Mean over the batch of |x_K|^2 / 2 + sum_k h |f(x_k)|^2 / 2."""

    def one(x0, noise):
        def step(carry, eps):
            x, cost = carry
            drift = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]
            x = x + STEP_SIZE * drift + STEP_SIZE**0.5 * eps
            return (x, cost + 0.5 * STEP_SIZE * jnp.sum(drift**2)), None

        (x, cost), _ = jax.lax.scan(step, (x0, jnp.zeros((), x0.dtype)), noise)
        return 0.5 * jnp.sum(x**2) + cost

    return jnp.mean(jax.vmap(one)(x0, noise))


def _loss_and_gradient_numpy(params, x0, noise):
    """The same by a float64 loop and a hand-derived reverse pass."""
    w1, b1, w2 = params["w1"], params["b1"], params["w2"]
    x, cost, tape = x0, np.zeros(len(x0)), []
    for k in range(STEPS):
        hidden = np.tanh(x @ w1 + b1)
        drift = hidden @ w2
        tape.append((x, hidden, drift))
        cost = cost + 0.5 * STEP_SIZE * np.sum(drift**2, axis=1)
        x = x + STEP_SIZE * drift + STEP_SIZE**0.5 * noise[:, k]
    loss = np.mean(0.5 * np.sum(x**2, axis=1) + cost)

    grad = {name: np.zeros_like(value) for name, value in params.items()}
    adjoint = x / len(x0)
    for x_k, hidden, drift in reversed(tape):
        d_drift = STEP_SIZE * (adjoint + drift / len(x0))
        d_pre = (d_drift @ w2.T) * (1.0 - hidden**2)
        grad["w2"] += hidden.T @ d_drift
        grad["w1"] += x_k.T @ d_pre
        grad["b1"] += d_pre.sum(axis=0)
        adjoint = adjoint + d_pre @ w1.T
    return loss, grad, adjoint


def check_scan_gradient():
    """Yields (name, relative error, bound) of the loss and each gradient."""
    params, x0, noise = _problem()
    loss, grad, grad_x0 = _loss_and_gradient_numpy(params, x0, noise)
    as_jax = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x0, noise))
    value_and_grad = jax.jit(jax.value_and_grad(_loss_jax, argnums=(0, 1)))
    with jax.default_matmul_precision("highest"):  # no TF32 on a GPU
        value, (grad_params, grad_start) = value_and_grad(*as_jax)
    pairs = {"loss": (value, loss), "d/dx0": (grad_start, grad_x0)}
    pairs |= {f"d/d{name}": (grad_params[name], grad[name]) for name in grad}
    for name, (ours, reference) in pairs.items():
        error = np.max(np.abs(np.asarray(ours, np.float64) - reference))
        yield f"scan {name}", error / np.max(np.abs(reference)), 1e-5


def check_log_z():
    """Yields (name, error, bound) of log Z for y ~ N(x, s^2), x ~ N(0, 1), y = 1.5."""
    y, s, steps, paths = 1.5, 0.7, 50, 20_000
    exact = -0.5 * y**2 / (1.0 + s**2) - 0.5 * np.log(2.0 * np.pi * (1.0 + s**2))

    def log_likelihood(x):
        return -0.5 * ((y - x) / s) ** 2 - jnp.log(s * jnp.sqrt(2.0 * jnp.pi))

    @jax.jit
    def by_paths(key):
        def step(x, key):
            return x + jax.random.normal(key, (paths,)) / steps**0.5, None

        x, _ = jax.lax.scan(step, jnp.zeros(paths), jax.random.split(key, steps))
        log_weight = log_likelihood(x)
        weight = jnp.exp(log_weight - jnp.max(log_weight))
        log_z = jax.nn.logsumexp(log_weight) - jnp.log(float(paths))
        return log_z, jnp.std(weight) / jnp.mean(weight) / paths**0.5

    @jax.jit
    def by_quadrature():
        grid = jnp.linspace(-10.0, 10.0, 4001)

        def step(total, x):
            log_density = log_likelihood(x) - 0.5 * x**2 - 0.5 * jnp.log(2.0 * jnp.pi)
            return jnp.logaddexp(total, log_density), None

        total, _ = jax.lax.scan(step, -jnp.inf, grid)
        return total + jnp.log(grid[1] - grid[0])

    log_z, standard_error = by_paths(jax.random.key(0))
    yield "log Z by paths", abs(float(log_z) - exact), 5.0 * float(standard_error)
    yield "log Z by quadrature", abs(float(by_quadrature()) - exact), 1e-3


def main() -> int:
    bad = 0
    for check in (check_scan_gradient, check_log_z):
        for name, error, bound in check():
            ok = bool(error <= bound)  # NaN is not
            bad += not ok
            print(f"{'ok ' if ok else 'BAD'} {name}: {error:.2e} (bound {bound:.1e})")
    backend = jax.default_backend()
    verdict = "agrees with NumPy" if not bad else "MISCOMPUTES: use another release"
    print(f"canary: JAX {jax.__version__} on {backend} {verdict}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
