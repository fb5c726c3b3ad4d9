"""Targets whose truth has a closed form or a short quadrature; data sets elsewhere."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from diffsamp import targets

NAMES = tuple(targets.all_targets())
by_name = functools.cache(targets.by_name)
SAMPLED = tuple(name for name in NAMES if by_name(name).sample is not None)
WITH_MODES = tuple(
    name
    for name in SAMPLED
    if by_name(name).modes is not None and by_name(name).dim < 99
)
# Other data or another dimension for the code of a target that is tested anyway.
VARIANTS = {
    "distorted_manywell_8",
    "german_credit_1",
    "gmm25",
    "gmm40_sde_sampler",
    "gmm40_vsm",
    "gmm40_vsm_50",
    "gmm40_vsm_200",
    "manywell_8",
    "mw54",
    "sonar",
    "student_t_mixture_200",
}


def variants_slow(names):
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow) if n in VARIANTS else n for n in names]


@jax.jit
def energies(energy, xs):
    return jax.lax.map(energy, xs, batch_size=20_000)


@jax.jit
def values_and_gradients(energy, xs):
    return jax.vmap(jax.value_and_grad(energy))(xs)


@jax.jit
def assignments(assign, xs):
    return jax.lax.map(assign, xs, batch_size=20_000)


# Every target


@pytest.mark.parametrize("name", NAMES)
def test_name_is_the_key_and_factories_are_repeatable(name):
    target = targets.all_targets()[name]()
    assert target.name == name
    assert target.scale > 0
    assert isinstance(target.energy, jax.tree_util.Partial)
    other = by_name(name)
    for mine, theirs in zip(
        jax.tree.leaves(target.energy), jax.tree.leaves(other.energy), strict=True
    ):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_energy_refuses_another_shape_or_dtype(name):
    target = by_name(name)
    wrong = target.dim + 1
    expected = (
        rf"x must be one point of shape \({target.dim},\), got shape \({wrong},\)"
    )
    with pytest.raises(ValueError, match=expected):
        target.energy(jnp.zeros(wrong))
    with pytest.raises(ValueError, match="floating-point"):
        target.energy(jnp.zeros(target.dim, int))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in VARIANTS])
def test_values_and_gradients(name, key):
    """Finite in float32, close to float64, one trace for two equal targets.

    In float64 the gradient is compared with a finite difference.
    """
    target = by_name(name)
    key_x, key_v = jax.random.split(key)
    dim, num = target.dim, 2 if target.dim == 1600 else 16
    scales = jnp.repeat(jnp.array([0.1, 1.0, 10.0, 100.0]), num)
    xs = scales[:, None] * jax.random.normal(key_x, (4 * num, dim))
    xs = jnp.concatenate([xs, jnp.zeros((1, dim)), jnp.full((1, dim), 1e-20)])
    traces = []

    @jax.jit
    def evaluate(energy, xs):
        traces.append(1)
        return jax.vmap(jax.value_and_grad(energy))(xs)

    values, gradients = evaluate(target.energy, xs)
    evaluate(targets.by_name(name).energy, xs)
    assert len(traces) == 1
    assert values.dtype == gradients.dtype == jnp.float32
    assert values.shape == xs.shape[:1]
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()

    xs = np.asarray(xs, np.float64)
    direction = np.asarray(jax.random.normal(key_v, (dim,)), np.float64)
    step = 1e-6 * direction / np.linalg.norm(direction)
    base = target.scale * direction[::-1]
    with jax.enable_x64(True):
        results = evaluate(
            target.energy, jnp.asarray([*xs, base, base + step, base - step])
        )
        single = jax.eval_shape(target.energy, jnp.zeros(dim, jnp.float32))
    exact, exact_gradients = (np.asarray(result) for result in results)
    assert single.dtype == jnp.float32
    assert exact.dtype == exact_gradients.dtype == np.float64
    # Rounding is relative to terms of the size of the gradient times x.
    size = 1 + np.abs(exact[:-3]) + np.sum(np.abs(xs * exact_gradients[:-3]), axis=1)
    np.testing.assert_array_less(np.abs(np.asarray(values) - exact[:-3]) / size, 3e-6)
    slope = exact_gradients[-3] @ step
    assert slope == pytest.approx((exact[-2] - exact[-1]) / 2, rel=1e-4, abs=1e-12)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"gmm9.*rings.*got 'gmm10'"):
        targets.by_name("gmm10")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: targets.gmm40("torch"), "'fab' with dim=2.*got 'torch'"),
        (lambda: targets.gmm40("fab", 50), "got 'fab' with dim=50"),
        (lambda: targets.manywell(7), "even number, got 7"),
        (lambda: targets.manywell(0), "even number, got 0"),
        (lambda: targets.funnel_easy(1), "dim must be at least 2, got 1"),
        (lambda: targets.funnel_hard(1), "dim must be at least 2, got 1"),
        (lambda: targets.rosenbrock(1), "dim must be at least 2, got 1"),
        (lambda: targets.rosenbrock(2, flatness=0.0), "flatness must lie in"),
        (lambda: targets.double_well(-1.0), "separation must be positive, got -1"),
        (lambda: targets.student_t_mixture(3), r"dim must be one of \(2, 50, 200\)"),
        (lambda: targets.spike_and_slab(2), "dim must be at least 5, got 2"),
        (lambda: targets.gaussian([[1.0]], 1.0), "mean must have shape"),
        (lambda: targets.gaussian([1.0, 2.0], np.eye(3)), r"got shape \(3, 3\)"),
        (lambda: targets.gaussian([1.0, 2.0], [[1.0, 2.0], [2.0, 1.0]]), "definite"),
        (lambda: targets.gaussian([1.0, 2.0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Normalising constants


def square(half_width, step):
    """Midpoints of the cells of a square, and the log-area of a cell."""
    axis = np.arange(-half_width + step / 2, half_width, step)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1), 2 * math.log(step)


def sheared():
    xs, log_area = square(7.0, 0.02)
    xs[:, 0] += 1.0
    xs[:, 1] = 0.1 * xs[:, 1] + xs[:, 0] ** 2
    return xs, log_area + math.log(0.1)


def stretched():
    """A sinh grid for the heavy tails of Student-t."""
    xs, log_area = square(15.0, 0.03)
    return np.sinh(xs), log_area + np.sum(np.log(np.cosh(xs)), axis=1)


GRIDS = {
    "drawn_image": functools.partial(square, 20.0, 1 / 32),
    "gaussian": functools.partial(square, 16.0, 0.05),
    "gmm9": functools.partial(square, 9.0, 0.02),
    "gmm25": functools.partial(square, 14.0, 0.03),
    "gmm40": functools.partial(square, 52.0, 0.1),
    "gmm40_sde_sampler": functools.partial(square, 52.0, 0.1),
    "gmm40_vsm": functools.partial(square, 50.0, 0.1),
    "rings": functools.partial(square, 6.0, 0.01),
    "rosenbrock": sheared,
    "student_t_mixture": stretched,
    "two_moons": functools.partial(square, 4.5, 0.01),
}


@pytest.mark.parametrize("name", variants_slow(GRIDS))
def test_planar_log_z_and_mode_weights_by_quadrature(name, x64):
    target = targets.by_name(name)
    xs, log_area = GRIDS[name]()
    xs = jnp.asarray(xs)
    log_mass = log_area - np.asarray(energies(target.energy, xs))
    assert math.log(np.exp(log_mass).sum()) == pytest.approx(target.log_z, abs=1e-6)
    if target.modes is not None:
        # Cells of the grid lie across the borders of modes, hence the wide tolerance.
        share = np.exp(log_mass - target.log_z)
        weights = np.bincount(assignments(target.modes.assign, xs), share)
        tolerance = 1e-3 if name == "student_t_mixture" else 1e-4
        np.testing.assert_allclose(weights, target.modes.weights, atol=tolerance)
        assert float(target.modes.weights.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("make", [targets.funnel_easy, targets.funnel_hard])
@pytest.mark.parametrize("dim", [3, 10])
def test_funnel_log_z_by_radial_quadrature(make, dim, x64):
    target = make(dim)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x1, radius = np.meshgrid(np.linspace(-30, 30, 601), 6 + 6 * nodes)
    x1, radius, width = x1.ravel(), radius.ravel(), np.repeat(6 * weights, 601)
    stretch = np.exp(x1 / 2)
    xs = np.zeros((x1.size, dim))
    xs[:, 0], xs[:, 1] = x1, radius * stretch
    log_sphere = (
        math.log(2) + (dim - 1) / 2 * math.log(math.pi) - math.lgamma((dim - 1) / 2)
    )
    log_volume = (dim - 2) * np.log(radius) + (dim - 1) * x1 / 2 + np.log(0.1 * width)
    log_mass = log_sphere + log_volume - energies(target.energy, jnp.asarray(xs))
    assert math.log(np.exp(log_mass).sum()) == pytest.approx(0, abs=1e-8)


def integral(log_f, centre=2.0):
    return scipy.integrate.quad(
        lambda x: math.exp(log_f(x)), -8, 8, points=[-centre, 0, centre], epsabs=1e-13
    )[0]


def test_well_log_z_by_adaptive_quadrature(key, x64):
    def well(delta):
        return math.log(integral(lambda x: -((x**2 - delta) ** 2)))

    many = integral(lambda x: -(x**4) + 6 * x**2 + x / 2)
    right = scipy.integrate.quad(lambda x: math.exp(-(x**4) + 6 * x**2 + x / 2), 0, 8)
    half_log = 0.5 * math.log(2 * math.pi)
    assert targets.double_well().log_z == pytest.approx(well(2), abs=1e-9)
    assert targets.double_well(3.0, 0.0).log_z == pytest.approx(well(3), abs=1e-9)
    assert targets.double_well(0.3).log_z == pytest.approx(well(0.3), abs=1e-9)
    assert targets.mw54().log_z == pytest.approx(5 * well(4), abs=1e-9)
    assert targets.mw52().log_z == pytest.approx(5 * well(2) + 45 * half_log, abs=1e-9)
    for dim in (2, 8, 32):
        expected = dim / 2 * (math.log(many) + half_log)
        assert targets.manywell(dim).log_z == pytest.approx(expected, abs=1e-9)
    weights = targets.manywell(2).modes.weights
    assert float(weights[1]) == pytest.approx(right[0] / many, abs=1e-9)

    x = np.asarray(jax.random.normal(key, (50,)))
    assert targets.mw52().energy(jnp.asarray(x)) == pytest.approx(
        sum((x[:5] ** 2 - 2) ** 2) + sum(x[5:] ** 2) / 2
    )
    assert targets.manywell(8).energy(jnp.asarray(x[:8])) == pytest.approx(
        sum(x[:8:2] ** 4 - 6 * x[:8:2] ** 2 - x[:8:2] / 2) + sum(x[1:8:2] ** 2) / 2
    )
    assert targets.mw54().energy(jnp.asarray(x[:5])) == pytest.approx(
        sum((x[:5] ** 2 - 4) ** 2)
    )
    assert targets.double_well(2.0, 1.5).energy(jnp.asarray(x[:1])) == pytest.approx(
        ((x[0] - 1.5) ** 2 - 2) ** 2
    )


def test_distorted_manywell_is_the_manywell_seen_through_a_map(x64, key):
    """Density of the mapped draws by a numerical Jacobian of the inverse map."""
    plain, distorted = targets.manywell(8), targets.distorted_manywell(8)
    z, x = (t.sample(key, 20) for t in (plain, distorted))  # the same randomness
    assert not np.allclose(z[:, 1::2], x[:, 1::2])
    np.testing.assert_array_equal(z[:, 0::2], x[:, 0::2])

    def forward(z):
        before = [0.0, *z[0:-2:2]]
        spread = 2.5 ** (2 * np.arange(4) / 3 - 1)
        return np.array(
            [
                z[i]
                if i % 2 == 0
                else spread[i // 2] * z[i] + (z[i - 1] ** 2 - 3 + before[i // 2]) / 2
                for i in range(8)
            ]
        )

    for one_z, one_x in zip(np.asarray(z), np.asarray(x), strict=True):
        np.testing.assert_allclose(forward(one_z), one_x, rtol=1e-12)
        step = 1e-6 * np.eye(8)
        jacobian = [(forward(one_z + s) - forward(one_z - s)) / 2e-6 for s in step]
        assert abs(np.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-6)
        energy = float(distorted.energy(jnp.asarray(one_x)))
        assert energy == pytest.approx(float(plain.energy(jnp.asarray(one_z))))


def test_rosenbrock_chain_log_z(x64):
    """Three coordinates by a 3-D grid, fifteen by the published configuration."""
    target = targets.rosenbrock(3, flatness=1.0)
    x1 = np.linspace(-2.6, 2.8, 541)
    v = np.linspace(-0.5, 0.5, 41)
    grid = np.stack(np.meshgrid(x1, v, v, indexing="ij"), -1).reshape(-1, 3)
    grid[:, 1] += grid[:, 0] ** 2
    grid[:, 2] += grid[:, 1] ** 2
    log_mass = -np.asarray(energies(target.energy, jnp.asarray(grid)))
    log_z = math.log(np.exp(log_mass).sum() * 0.01 * 0.025**2)
    assert target.log_z == pytest.approx(log_z, abs=1e-6)
    fifteen = by_name("rosenbrock_15")
    assert fifteen.log_z == pytest.approx(-8.680847560471653 + math.log(1e5), abs=1e-8)


def logsumexp_of(terms):
    return np.logaddexp.reduce(terms, axis=0) - math.log(len(terms))


@pytest.mark.parametrize(
    ("name", "log_density"),
    [
        (
            "gmm40_vsm_50",
            lambda means, x: logsumexp_of(
                scipy.stats.norm.logpdf(x, means[:, None], 1.0).sum(-1)
            ),
        ),
        (
            "gmm40_vsm_200",
            lambda means, x: logsumexp_of(
                scipy.stats.norm.logpdf(x, means[:, None], 1.0).sum(-1)
            ),
        ),
        (
            "student_t_mixture_50",
            lambda means, x: logsumexp_of(
                scipy.stats.t.logpdf(x, 2, means[:, None]).sum(-1)
            ),
        ),
        (
            "student_t_mixture_200",
            lambda means, x: logsumexp_of(
                scipy.stats.t.logpdf(x, 2, means[:, None]).sum(-1)
            ),
        ),
        (
            "spike_and_slab",
            lambda means, x: np.logaddexp(
                math.log(0.1) + scipy.stats.norm.logpdf(x, 0, 2).sum(-1),
                math.log(0.9) + scipy.stats.norm.logpdf(x, 1, 0.05).sum(-1),
            ),
        ),
        (
            "gaussian",
            lambda means, x: scipy.stats.multivariate_normal(
                [1, -2], [[2, 0.9], [0.9, 1]]
            ).logpdf(x),
        ),
    ],
)
def test_normalised_densities_equal_scipys(name, log_density, x64):
    target = by_name(name)
    means = np.asarray(target.energy.args[0])
    noise = np.random.default_rng(0).standard_normal((2, 5, target.dim))
    xs = np.concatenate(
        [target.scale * noise[0], np.resize(means, (5, target.dim)) + 0.1 * noise[1]]
    )
    expected = log_density(means, xs)
    np.testing.assert_allclose(-energies(target.energy, jnp.asarray(xs)), expected)
    assert target.log_z == 0


def test_gaussian_accepts_three_kinds_of_covariance(x64):
    x = jnp.array([0.3, -0.7])
    for covariance in (0.25, (0.25, 0.25), np.eye(2) / 4):
        target = targets.gaussian((1.0, 2.0), covariance, log_z=1.5)
        expected = scipy.stats.norm.logpdf(np.asarray(x), [1.0, 2.0], 0.5).sum()
        assert float(target.energy(x)) == pytest.approx(-expected - 1.5)
        assert target.log_z == 1.5
    assert target.scale == pytest.approx(math.sqrt(2.5 + 0.25))


# Exact samplers


@functools.cache
def exact_draws(name):
    target = by_name(name)
    num_draws = 4_000 if target.dim > 50 else 20_000
    with jax.enable_x64(False):
        return jax.jit(target.sample, static_argnums=1)(jax.random.key(7), num_draws)


@pytest.mark.parametrize("name", [name for name in SAMPLED if name not in VARIANTS])
def test_sampler_satisfies_integration_by_parts(name):
    """E[dE/dx_i] = 0 and E[x_i dE/dx_i] = 1, within 5 standard errors."""
    target = by_name(name)
    xs = exact_draws(name)
    assert xs.shape[1:] == (target.dim,)
    assert xs.dtype == jnp.float32
    assert len(np.unique(xs, axis=0)) > 0.99 * len(xs)
    _, gradients = values_and_gradients(target.energy, xs)
    for statistic, expected in ((gradients, 0.0), (xs * gradients, 1.0)):
        statistic = np.asarray(statistic, np.float64)
        error = statistic.std(axis=0) / math.sqrt(len(xs))
        assert np.all(np.abs(statistic.mean(axis=0) - expected) < 5 * error)


@pytest.mark.parametrize("name", variants_slow(WITH_MODES))
def test_mode_weights_are_frequencies_of_exact_draws(name):
    target = by_name(name)
    xs = exact_draws(name)
    modes = np.asarray(assignments(target.modes.assign, xs))
    weights = np.asarray(target.modes.weights)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    frequencies = np.bincount(modes, minlength=len(weights)) / len(xs)
    error = np.sqrt(weights * (1 - weights) / len(xs)) + 1 / len(xs)
    assert np.all(np.abs(frequencies - weights) < 4.5 * error)


def second_moment(xs):
    return np.sum(xs**2, axis=1)


def share_below_zero(means):
    return np.mean(scipy.stats.t.cdf(0, 2, means[:, 0]))


def mean_of_last(means):
    return np.mean(means[:, -1])


STATISTICS = [
    ("distorted_manywell", lambda xs: xs[:, 0], 1.1879609834),
    ("distorted_manywell", lambda xs: xs[:, 1], 0.5 * (2.9598060905 - 3)),
    (
        "distorted_manywell",
        lambda xs: xs[:, 31],
        0.5 * (2.9598060905 - 3 + 1.1879609834),
    ),
    (
        "distorted_manywell",  # the noise of the last pair has standard deviation 2.5
        lambda xs: (xs[:, 31] - 0.5 * (xs[:, 30] ** 2 - 3 + xs[:, 28])) ** 2,
        6.25,
    ),
    ("double_well", lambda xs: (xs[:, 0] - 1.5) ** 2, 1.8353417215),
    ("double_well", lambda xs: xs[:, 0], 1.5),
    ("funnel_easy", lambda xs: xs[:, 0] ** 2, 1.0),
    ("funnel_easy", lambda xs: xs[:, 3] ** 2, math.exp(0.5)),
    ("funnel_hard", lambda xs: xs[:, 0] ** 2, 9.0),
    ("funnel_hard", lambda xs: xs[:, 3] ** 2 * np.exp(-xs[:, 0]), 1.0),
    ("gaussian", lambda xs: (xs[:, 0] - 1) * (xs[:, 1] + 2), 0.9),
    ("gaussian", lambda xs: xs[:, 1], -2.0),
    ("gmm9", lambda xs: xs[:, 0] ** 2, 16.0 + 2 / 3 + 0.3),
    ("gmm25", lambda xs: xs[:, 1] ** 2, 50.3),
    ("manywell", lambda xs: xs[:, 0], 1.1879609834),
    ("manywell", lambda xs: xs[:, 30] ** 2, 2.9598060905),
    ("manywell", lambda xs: xs[:, 6] > 0, 0.8443070962),
    ("manywell", lambda xs: xs[:, 31] ** 2, 1.0),
    ("mw52", second_moment, 54.1767086075),
    ("mw54", second_moment, 19.6705232117),
    ("rings", second_moment, (1 + 27 + 125) / 9 + 3 / 200),
    ("rings", lambda xs: xs[:, 0] * xs[:, 1], 0.0),
    ("rosenbrock", lambda xs: (xs[:, 0] - 1) ** 2, 0.5),
    ("rosenbrock", lambda xs: (xs[:, 1] - xs[:, 0] ** 2) ** 2, 1 / 200),
    ("spike_and_slab", lambda xs: xs[:, 2], 0.9),
    ("student_t_mixture", lambda xs: xs[:, 0] < 0, share_below_zero),
    ("student_t_mixture_200", lambda xs: xs[:, 0] < 0, share_below_zero),
    ("gmm40_vsm_200", lambda xs: xs[:, -1], mean_of_last),
    ("two_moons", lambda xs: xs[:, 0] ** 2, 3.5882826541),
    ("two_moons", lambda xs: xs[:, 1] ** 2, 0.6933549995),
    ("two_moons", lambda xs: xs[:, 0], 0.0),
]


@pytest.mark.parametrize(("name", "statistic", "expected"), STATISTICS)
def test_sampler_has_the_known_moments(name, statistic, expected):
    target = by_name(name)
    if callable(expected):
        expected = expected(np.asarray(target.energy.args[0]))
    values = statistic(np.asarray(exact_draws(name), np.float64))
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - expected) < 5 * error


def test_drawn_image_samples_every_block_in_proportion(x64):
    """Counts on 16 x 16 blocks of the frame against the integrated density."""
    target = by_name("drawn_image")
    xs, log_area = square(4.0, 1 / 32)
    blocks = np.floor((xs + 4) * 2).astype(int) @ [16, 1]
    density = np.exp(log_area - target.log_z - energies(target.energy, jnp.asarray(xs)))
    probability = np.bincount(blocks, density, minlength=256)
    drawn = np.asarray(exact_draws("drawn_image"))
    n = len(drawn)
    drawn = drawn[np.all(np.abs(drawn) < 4, axis=1)]
    counts = np.bincount(np.floor((drawn + 4) * 2).astype(int) @ [16, 1], minlength=256)
    error = np.sqrt(probability * (1 - probability) / n)
    assert np.all(np.abs(counts / n - probability) < 5 * error + 1 / n)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampler_takes_raw_keys(name):
    sample = by_name(name).sample
    draws = jax.eval_shape(lambda key: sample(key, 5), jax.random.PRNGKey(3))
    assert draws.shape == (5, by_name(name).dim)
    if name == "gmm9":
        typed, raw = sample(jax.random.key(3), 5), sample(jax.random.PRNGKey(3), 5)
        np.testing.assert_array_equal(typed, raw)


def test_sampler_follows_x64(key, x64):
    for name in SAMPLED:
        draws = jax.eval_shape(functools.partial(by_name(name).sample, n=3), key)
        assert draws.dtype == jnp.float64


# Modes


def test_mode_indices_follow_their_description():
    grid = by_name("gmm9").modes.assign
    assert [
        int(grid(jnp.array(x))) for x in ([-5.0, -4.0], [-5.0, 1.0], [4.0, 6.0])
    ] == [
        0,
        1,
        8,
    ]
    signs = by_name("mw54").modes.assign
    assert int(signs(jnp.array([-2.0, 2.0, -2.0, -2.0, 2.0]))) == 0b10010
    tilted = by_name("manywell_8").modes
    x = jnp.array([1.7, 9.0, 1.7, -9.0, 1.7, 0.0, -1.7, 0.0])
    assert int(tilted.assign(x)) == 0b0111
    assert float(tilted.weights[0b0111]) == pytest.approx(0.8443071**3 * 0.1556929)
    assert by_name("manywell").modes is None
    assert int(by_name("rings").modes.assign(jnp.array([0.0, -4.9]))) == 2
    assert int(by_name("two_moons").modes.assign(jnp.array([0.1, 2.0]))) == 1
    assert int(by_name("double_well").modes.assign(jnp.array([1.4]))) == 0
    assert int(by_name("spike_and_slab").modes.assign(jnp.ones(10))) == 1


def test_overlapping_modes_do_not_have_equal_weights():
    for name in ("gmm40", "gmm40_sde_sampler", "student_t_mixture"):
        weights = np.asarray(by_name(name).modes.weights)
        assert np.ptp(weights) > 0.01 / len(weights)
