"""Packaged posteriors: their answers recomputed by other means, modes, data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffsamp.posteriors import all_posteriors, by_name

# NumPyro broadcasts in its own code.
pytestmark = pytest.mark.relaxed("ranks", "dtypes")

IMPROPER = ("garch11", "kidscore_interaction", "low_dim_gauss_mix")
NAMES = [posterior.name for posterior in all_posteriors()]
MULTIMODAL = [p.name for p in all_posteriors() if p.modes is not None]
LABELLINGS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


@pytest.fixture(scope="module", params=NAMES)
def posterior(request):
    return by_name(request.param)


@functools.cache
def flat(name):
    """The target and the reference draws as flat points."""
    posterior = by_name(name)
    target = posterior.target()
    draws = {site: draws[:200] for site, draws in posterior.draws().items()}
    if posterior.modes is not None:
        draws = posterior.draws()
    if not set(target.site_names) <= set(draws):  # some are deterministic sites
        return target, target.initial[None]
    return target, jax.jit(jax.vmap(target.unconstrain))(draws)


def test_target_knows_the_answer(posterior):
    target, x = flat(posterior.name)
    assert target.name == posterior.name
    assert target.dim == posterior.dim == x.shape[1]
    assert target.log_z == posterior.log_evidence
    assert target.is_proper or posterior.name in IMPROPER
    assert jnp.isfinite(jax.jit(jax.vmap(target.energy))(x)).all()
    assert posterior.reference()["name"] == posterior.name
    sites = jax.jit(jax.vmap(target.constrain))(x)
    assert len(posterior.flatten(sites)) == len(posterior.reference()["parameters"])


@pytest.mark.parametrize("name", MULTIMODAL)
@pytest.mark.parametrize("kind", ["modes", "minor_modes"])
def test_mode_weights(name, kind):
    """The weights sum to one and are those of the reference draws."""
    modes = getattr(by_name(name), kind)
    assert modes.weights.sum() == pytest.approx(1.0, abs=1e-6)
    _, x = flat(name)
    index = jax.jit(jax.vmap(modes.assign))(x)
    counts = np.bincount(index, minlength=len(modes.weights))
    assert len(counts) == len(modes.weights)
    expected = np.array(modes.weights, float) * len(x)
    rare = expected < 3  # counted as one cell
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-3)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2(sum(~rare)).sf(chi_square) > 1e-3


def test_draws_match_the_reference_moments(posterior):
    scalars = posterior.flatten(posterior.draws())
    assert list(scalars) == posterior.parameter_names()
    for name, reference in posterior.reference()["parameters"].items():
        n = len(scalars[name])
        error = abs(scalars[name].mean() - reference["mean"]) / reference["sd"]
        assert error < 4.5 / n**0.5, name


def test_modes_of_galaxies_are_the_labellings():
    posterior = by_name("galaxies_mixture")
    for i, order in enumerate(LABELLINGS):
        mu = np.empty(3)
        mu[list(order)] = 10.0, 21.0, 33.0
        x = jnp.concatenate([jnp.asarray(mu), jnp.zeros(5)])
        assert posterior.modes.assign(x) == i
        assert posterior.minor_modes.assign(x) == 2 * i + 1
        assert posterior.minor_modes.assign(x.at[order[2]].set(25.0)) == 2 * i


def test_galaxies_evidence_by_importance_sampling(x64):
    """Defensive t mixture round the reference draws of one labelling, in 64 bits."""
    posterior = by_name("galaxies_mixture")
    target = posterior.target()
    rng = np.random.default_rng(0)
    draws = {k: v.astype(float) for k, v in posterior.draws().items()}
    order = np.argsort(draws["mu"], 1)
    draws = {k: np.take_along_axis(v, order, 1) for k, v in draws.items()}
    x = np.array(jax.vmap(target.unconstrain)(draws))

    # Two clusters for each minor mode, split at the median of the fastest mean.
    slow = x[:, 2] < 26.0
    parts = []
    for group in (x[slow], x[~slow]):
        above = group[:, 2] > np.median(group[:, 2])
        parts += [group[above], group[~above]]
    weights = [len(part) / len(x) for part in parts]
    proposals = [
        scipy.stats.multivariate_t(p.mean(0), 1.5 * np.cov(p.T), df=5) for p in parts
    ]
    n = 40_000
    which = rng.choice(len(parts), size=n, p=weights)
    points = np.concatenate(
        [
            proposal.rvs(size=int((which == i).sum()), random_state=rng)
            for i, proposal in enumerate(proposals)
        ]
    )
    log_proposal = scipy.special.logsumexp(
        [np.log(w) + p.logpdf(points) for w, p in zip(weights, proposals)], axis=0
    )
    energy = np.array(jax.jit(jax.vmap(target.energy))(jnp.asarray(points)))
    ordered = (points[:, 0] < points[:, 1]) & (points[:, 1] < points[:, 2])
    weight = ordered * np.exp(-energy - log_proposal - posterior.log_evidence)
    ratio, se = 6 * weight.mean(), 6 * weight.std() / n**0.5
    assert se < 0.02  # else the check below says nothing
    assert abs(ratio - 1.0) < 4 * np.hypot(se, posterior.log_evidence_se)

    is_slow = weight[points[:, 2] < 26.0].sum() / weight.sum()
    assert is_slow == pytest.approx(
        6 * float(posterior.minor_modes.weights[0]), abs=0.02
    )


def test_two_sinusoids_by_quadrature():
    """Amplitudes analytically, frequencies by Gauss-Legendre panels: Z and cells."""
    posterior = by_name("two_sinusoids")
    t, y, noise = posterior.data().values()
    edges = np.array(posterior.reference()["modes"]["edges"])
    node, node_weight = np.polynomial.legendre.leggauss(10)
    freq, weight, cell = [], [], []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        panels = np.linspace(low, high, int(np.ceil((high - low) / 0.005)) + 1)
        for a, b in itertools.pairwise(panels):
            freq.append(a + (b - a) * (node + 1) / 2)
            weight.append((b - a) / 2 * node_weight / 0.48)
            cell += [i] * len(node)
    freq, weight = np.concatenate(freq), np.concatenate(weight)

    # y | freq ~ N(0, noise^2 I + 1.5^2 B B'), by the matrix inversion lemma
    phase = 2 * np.pi * freq[:, None] * t
    basis = np.stack([np.cos(phase), np.sin(phase)], 1)
    own, project = basis @ basis.transpose(0, 2, 1), basis @ y
    ridge = (noise / 1.5) ** 2
    log_density = np.empty((len(freq), len(freq)))
    for i in range(len(freq)):
        cross = np.einsum("at,nbt->nab", basis[i], basis)
        gram = np.empty((len(freq), 4, 4))
        gram[:, :2, :2], gram[:, 2:, 2:] = own[i], own
        gram[:, :2, 2:], gram[:, 2:, :2] = cross, cross.transpose(0, 2, 1)
        gram += ridge * np.eye(4)
        v = np.concatenate([np.broadcast_to(project[i], project.shape), project], 1)
        fitted = (v * np.linalg.solve(gram, v[..., None])[..., 0]).sum(1)
        log_det = np.linalg.slogdet(gram)[1] - 4 * np.log(ridge)
        log_det += len(y) * np.log(2 * np.pi * noise**2)
        log_density[i] = -0.5 * ((y @ y - fitted) / noise**2 + log_det)
    top = log_density.max()
    mass = np.exp(log_density - top) * weight[:, None] * weight
    assert top + np.log(mass.sum()) == pytest.approx(posterior.log_evidence, abs=1e-5)
    member = np.eye(8)[cell]
    cells = member.T @ (mass / mass.sum()) @ member
    np.testing.assert_allclose(
        cells.ravel(), posterior.minor_modes.weights, atol=2e-6, rtol=1e-3
    )


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match=r"must be one of ark, .*galaxies_mixture"):
        by_name("galaxies")
    with pytest.raises(ValueError, match=r"samples\['w'\] must have shape \[n, 3\]"):
        by_name("galaxies_mixture").flatten({"w": np.zeros((5, 2))})
