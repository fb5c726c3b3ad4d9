"""Tables, claims and plots of the rows of consistent.py."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from consistent_measures import truth, untrained
from rows import described, markdown, rows_of, seeds_of, summarise

import diffsamp as ds

TEACHERS = ("teacher", "teacher_dpm")
ONE_STEP = ("scds", "any_step", "cdds")
METHODS = TEACHERS + ONE_STEP
FEW = (1, 2, 4, 8)
NUM_DRAWS = 100_000  # for which calls are counted
LEAST_SEEDS = 3
BAR = "log_z_standard_error"

GROUPS = (
    (
        "Evidence, by weighted draws",
        ("log Z error", "log_z_error", "{:+.3f}", abs),
        ("its standard error", "log_z_standard_error", "{:.3f}", float),
        ("ELBO", "elbo", "{:.3f}", lambda v: -v),
        ("its gap", "elbo_gap", "{:.3f}", float),
        ("untuned", "untuned_elbo_gap", "{:.3f}", float),
        ("EUBO gap", "eubo_gap", "{:.3f}", float),
        ("ESS", "ess", "{:.3f}", lambda v: -v),
        ("untuned", "untuned_ess", "{:.3f}", lambda v: -v),
        ("k-hat", "pareto_k", "{:.2f}", float),
        ("untuned", "untuned_pareto_k", "{:.2f}", float),
        ("draws", "num_weighted", "{:.0f}", lambda v: -v),
    ),
    (
        "Draws without weights",
        ("mode error", "flow_mode_tv", "{:.3f}", float),
        ("its floor", "flow_mode_tv_floor", "{:.3f}", float),
        ("sd error", "flow_sd_error", "{:.3f}", float),
        ("its floor", "flow_sd_error_floor", "{:.3f}", float),
        ("of the wells", "flow_well_sd_error", "{:.3f}", float),
        ("of the Gaussians", "flow_gaussian_sd_error", "{:.3f}", float),
        ("quantile error", "flow_quantile_error", "{:.3f}", float),
        ("its floor", "flow_quantile_error_floor", "{:.3f}", float),
        ("in bands", "flow_band_error", "{:.3f}", float),
        ("its floor", "flow_band_error_floor", "{:.3f}", float),
        ("mean error", "flow_mean_error", "{:.3f}", float),
        ("of the field", "flow_field_error", "{:.3f}", float),
        ("W2 / floor", "w2_ratio", "{:.3f}", lambda v: abs(v - 1)),
        ("its noise", "w2_ratio_se", "{:.3f}", float),
        ("Sinkhorn / floor", "sinkhorn_ratio", "{:.3f}", lambda v: abs(v - 1)),
        ("its noise", "sinkhorn_ratio_se", "{:.3f}", float),
    ),
    (
        "Cost at the fewest and the most steps, of a student its teacher's too",
        ("calls a draw", "calls_per_draw", "{:.0f}", float),
        ("training calls", "all_network_evaluations", "{:.2e}", float),
        ("training energies", "all_energy_evaluations", "{:.2e}", float),
        ("training s", "all_seconds", "{:.0f}", float),
        ("s / 100,000 draws", "seconds_per_100_000", "{:.2f}", float),
        ("teacher's over it", "wall_ratio", "{:.0f}", lambda v: -v),
        ("draws timed", "timed_draws", "{:.0f}", lambda v: -v),
    ),
)


def table(args):
    everything = rows_of(args.files)
    rows, lines = joined(everything), []
    for title, *columns in GROUPS:
        body = []
        for target, method, num_steps in labels_of(rows):
            own = of(rows, target, method, num_steps)
            wanted = args.num_steps
            if title.startswith("Cost"):
                wanted = ends_of(rows, target, method)
            cells = [summarise(own, *column[1:]) for column in columns]
            if num_steps in wanted and set(cells) != {"-"}:
                body.append([target, method, num_steps, seeds_of(own), *cells])
        heads = ["target", "method", "steps", "seeds", *(c[0] for c in columns)]
        lines += [f"{title}:", "", *markdown(heads, body), ""]
    heads = ["target", "at one call", "at most", *ONE_STEP]
    lines += ["Claims:", "", *markdown(heads, claims(everything)), ""]
    heads = ["method", *(f"{k} step{'s' * (k > 1)}" for k in FEW)]
    lines += ["Errors of log Z over their error bars, root mean square (mean):", ""]
    lines += [*markdown(heads, calibration(rows)), ""]
    note = (
        f"Mean (worst) over seeds, {described(everything[0])}. A student's kernels are "
        "trained for weights at 1, 2, 4 and 8 steps, and weighed there. What failed or "
        "is no number counts as infinite, and so does an error of log Z by weights "
        "whose k-hat is 0.7 or more, but on the line of any k-hat. "
    )
    lines += [note + honest(rows), "", *failures(everything), *others(rows)]
    lines += coordinates(rows)
    print("\n".join(lines))


def joined(rows):
    """Rows of `run`, each with what `time` measured of it last."""
    timed = {label_of(r): r for r in rows if "draw_seconds" in r}
    names = ("draw_seconds", "seconds_per_100_000", "wall_ratio", "timed_draws")
    out = []
    for row in rows:
        if "draw_seconds" in row or "failed" in row:
            continue
        beside = timed.get(label_of(row), {})
        out.append(row | {k: beside[k] for k in names if k in beside})
    return out


def label_of(row):
    return row["target"], row["method"], row["num_steps"], row["seed"]


def of(rows, target, method, num_steps):
    label = (target, method, num_steps)
    return [r for r in rows if (r["target"], r["method"], r["num_steps"]) == label]


def labels_of(rows):
    """Targets as they come, methods and step counts in order."""
    targets = list(dict.fromkeys(r["target"] for r in rows))
    found = {(r["target"], r["method"], r["num_steps"]) for r in rows}
    return sorted(found, key=lambda v: (targets.index(v[0]), METHODS.index(v[1]), v[2]))


def ends_of(rows, target, method):
    """The fewest and the most steps."""
    found = {k for one, other, k in labels_of(rows) if (one, other) == (target, method)}
    return min(found), max(found)


# -------------------------------------------------------------------------- claims


class Aim(NamedTuple):
    """A number that should not be above a limit, for each target, method and seed.

    ``number(one, method)`` finds it in ``one(method, num_steps)``, the row of a target
    and seed, which is empty where there is none; None stands for the most steps.
    """

    targets: str
    text: str
    limit: float | None
    number: Callable[[Callable[..., dict[str, Any]], str], float | None]


def value_of(row, name):
    """None where it was not measured, infinite where it was no number."""
    if name not in row:
        return None
    return math.inf if row[name] is None else row[name]


def size_of(name, steps=(1,), away_from=0.0):
    """The largest distance of a number from what it should be, over step counts."""

    def number(one, method):
        values = [value_of(one(method, k), name) for k in steps]
        known = [abs(v - away_from) for v in values if v is not None]
        return max(known) if len(known) == len(values) else None

    return number


def log_z_error(one, method):
    """The largest at few steps; infinite where the weights know no error bar."""
    sizes = size_of("log_z_error", FEW)(one, method)
    bars = size_of(BAR, FEW)(one, method)
    return sizes if bars is None or math.isfinite(bars) else math.inf


def elbo_gap(one, method):
    """The largest at few steps, of kernels as trained: widths cost a part of it."""
    for name in ("untuned_elbo_gap", "elbo_gap"):
        found = size_of(name, FEW)(one, method)
        if found is not None:
            return found
    return None


def largest_k_hat(one, method):
    values = [value_of(one(method, k), "pareto_k") for k in FEW]
    return None if None in values else max(values)


def beyond_many_steps(name):
    """One step over the teacher's many by the better solver, less one.

    Not over less than the floor: draws that are nearer to a set of exact ones than
    another such set are too narrow, and no better.
    """

    def number(one, method):
        first = value_of(one(method, 1), name)
        values = [value_of(one(teacher, None), name) for teacher in TEACHERS]
        known = [v for v in values if v is not None]
        if first is None or not known:
            return None
        many = max(min(known), 1.0)
        return first / many - 1 if math.isfinite(first) else math.inf

    return number


def break_even(one, method):
    """Draws from which on training and drawing together take fewer network calls."""
    names = ("all_network_evaluations", "calls_per_draw")
    own = [value_of(one(method, 1), name) for name in names]
    teacher = [value_of(one("teacher", None), name) for name in names]
    if None in own or None in teacher:
        return None
    return max((own[0] - teacher[0]) / (teacher[1] - own[1]), 0.0)


def share_of_calls(one, method):
    found = [
        value_of(r, "calls_per_draw") for r in (one(method, 1), one("teacher", None))
    ]
    return None if None in found else found[0] / found[1]


def share_of_time(one, method):
    ratio = value_of(one(method, 1), "wall_ratio")
    return None if ratio is None else 1 / ratio


ALL = "gmm9 mw54 funnel_hard mw52 drawn_image ionosphere lgcp_whitened"
OVER, LOG_Z = "over 128 steps, less 1", "log Z error, 1 to 8 steps"
WEIGHED = "gmm9 mw54 drawn_image funnel_hard mw52"
AIMS = (
    Aim("gmm9 mw54 mw52", "W2 / floor - 1", 0.10, size_of("w2_ratio", away_from=1)),
    Aim(
        "gmm9 mw54 mw52",
        "Sinkhorn / floor - 1",
        0.10,
        size_of("sinkhorn_ratio", away_from=1),
    ),
    Aim("gmm9 mw54 mw52", f"W2 {OVER}", 0.05, beyond_many_steps("w2_ratio")),
    Aim(
        "gmm9 mw54 mw52", f"Sinkhorn {OVER}", 0.05, beyond_many_steps("sinkhorn_ratio")
    ),
    Aim("drawn_image", f"W2 {OVER}", 0.15, beyond_many_steps("w2_ratio")),
    Aim("drawn_image", f"Sinkhorn {OVER}", 0.15, beyond_many_steps("sinkhorn_ratio")),
    Aim("gmm9", "mode error", 0.03, size_of("flow_mode_tv")),
    Aim("mw54 mw52", "mode error", 0.08, size_of("flow_mode_tv")),
    Aim("mw54", "modes missed", 0, size_of("flow_modes_missed")),
    Aim("gmm9", "sd error in a mode", 0.05, size_of("flow_sd_error")),
    Aim("mw54", "sd error in a well", 0.10, size_of("flow_well_sd_error")),
    Aim("mw52", "sd error, Gaussians", 0.05, size_of("flow_gaussian_sd_error")),
    Aim("funnel_hard", "quantile error", 0.15, size_of("flow_quantile_error")),
    Aim("funnel_hard", "quantile error in bands", 0.15, size_of("flow_band_error")),
    Aim("ionosphere", "mean error", 0.1, size_of("flow_mean_error")),
    Aim("ionosphere", "sd error", 0.1, size_of("flow_sd_error")),
    Aim("lgcp_whitened", "mean error of the field", 0.05, size_of("flow_field_error")),
    Aim("lgcp_whitened", "sd error", 0.15, size_of("flow_sd_error")),
    Aim("gmm9 mw54 drawn_image", LOG_Z, 0.05, log_z_error),
    Aim("funnel_hard mw52", LOG_Z, 0.2, log_z_error),
    Aim(WEIGHED, f"{LOG_Z}, any k-hat", None, size_of("log_z_error", FEW)),
    Aim(WEIGHED, "k-hat, 1 to 8 steps", 0.7, largest_k_hat),
    Aim("ionosphere", "ELBO gap as trained, 1 to 8 steps", 1.0, elbo_gap),
    Aim("lgcp_whitened", "ELBO gap as trained, 1 to 8 steps", None, elbo_gap),
    Aim("ionosphere", "ELBO gap with widths", None, size_of("elbo_gap", FEW)),
    Aim(ALL, "network calls over the teacher's", 0.01, share_of_calls),
    Aim(ALL, "wall time over the teacher's", 0.02, share_of_time),
    Aim(ALL, "draws to break even with the teacher", None, break_even),
)


def claims(rows):
    """A line for each target and aim: mean (worst) over seeds, and whether it holds."""
    body, failed = [], failed_labels(rows)
    table = {label_of(r): r for r in joined(rows)}
    for target in dict.fromkeys(r["target"] for r in rows):
        own = [label for label in map(label_of, rows) if label[0] == target]
        finest = max(num_steps or 0 for _, _, num_steps, _ in own)
        for aim in (aim for aim in AIMS if target in aim.targets.split()):
            cells = []
            for method in ONE_STEP:
                values = []
                for seed in sorted({seed for *_, seed in own}):
                    value = aim.number(rows_in(table, target, finest, seed), method)
                    if value is None and (target, method, seed) in failed:
                        value = math.inf
                    values += [] if value is None else [value]
                cells.append(verdict(values, aim.limit))
            limit = "-" if aim.limit is None else aim.limit
            body.append([target, aim.text, limit, *cells])
    return body


def rows_in(table, target, finest, seed):
    def one(method, num_steps):
        return table.get((target, method, num_steps or finest, seed), {})

    return one


def verdict(values, limit):
    if not values:
        return "-"
    mean, largest = float(np.mean(values)), max(values)
    said = f"{mean:.3f} ({largest:.3f})"
    if largest >= 1_000 and math.isfinite(largest):
        said = f"{mean:.1e} ({largest:.1e})"
    if len(values) < LEAST_SEEDS:
        said += f" of {len(values)} seeds"
    if limit is None:
        return said
    holds = "yes" if largest <= limit else "in the mean" if mean <= limit else "no"
    return f"{said} {holds}"


def honest(rows):
    """Whether any ELBO lies above log Z or any EUBO below it, beyond its error."""
    held, wrong, loose = {"elbo": 0, "eubo": 0}, [], []
    judged = [r for r in rows if "elbo_gap" in r]
    for row in judged:
        label = "{}, {}, {} steps, seed {}".format(*label_of(row))
        for bound in held:
            if f"{bound}_gap" not in row:
                continue
            gap, error = row[f"{bound}_gap"], row[f"{bound}_standard_error"]
            if gap is None or error is None:
                loose.append(label)
            elif gap < -3 * math.hypot(error, row["log_z_true_error"]):
                wrong.append(label)
            else:
                held[bound] += 1
    said = (
        f"Of {len(judged)} rows with weights ELBO <= log Z on {held['elbo']} and log Z "
        f"<= EUBO on {held['eubo']}, within three standard errors"
    )
    without = len(judged) - sum("eubo_gap" in r for r in judged)
    if without:
        said += f"; {without} have no EUBO"
    if loose:
        said += (
            f"; a bound or its error is not finite: {'; '.join(dict.fromkeys(loose))}"
        )
    errors = {r["target"]: r["nuts_mean_error"] for r in rows if "nuts_mean_error" in r}
    for target, error in errors.items():
        said += f"; EUBO of {target} from NUTS, whose means are off by {error:.2f} sd"
    if wrong:
        said += f". Bounds violated: {'; '.join(dict.fromkeys(wrong))}"
    return said + "."


def failed_labels(rows):
    """Target, method and seed of what failed and was not made good by a later row."""
    good = {label_of(r) for r in rows if "failed" not in r}
    trained = {(target, method, seed) for target, method, _, seed in good}
    out = {}
    for row in (r for r in rows if "failed" in r):
        target, method, num_steps, seed = label_of(row)
        whole = num_steps is None and (target, method, seed) in trained
        if not whole and label_of(row) not in good:
            out[target, method, seed] = row
    return out


def failures(rows):
    lines = [
        f"* {target}, {method}, seed {seed} failed: {row['failed']}"
        for (target, method, seed), row in failed_labels(rows).items()
    ]
    return [*lines, ""] if lines else []


def calibration(rows):
    """Errors of log Z in their error bars, by method and few steps: one, if those hold.

    Of rows with an error bar; the root mean square over targets and seeds, and the
    mean, which is below zero where something is out of reach.
    """
    body = []
    for method in ONE_STEP:
        line = [method]
        for k in FEW:
            own = [r for r in rows if (r["method"], r["num_steps"]) == (method, k)]
            found = [
                r["log_z_error"] / math.hypot(bar, r.get("log_z_true_error", 0.0))
                for r in own
                if None not in (r.get("log_z_error"), bar := r.get(BAR))
            ]
            size = f"{np.sqrt(np.mean(np.square(found))):.1f}" if found else "-"
            mean = f"{np.mean(found):+.1f}" if found else "-"
            line.append(f"{size} ({mean}) of {len(found)}")
        body.append(line)
    return body


def others(rows):
    """Learned time grids, where there are any."""
    return [
        f"* {row['target']}, {row['method']}, seed {row['seed']}: a learned grid of 8 "
        f"steps gained {row['tuned_gain']} (standard error {row['tuned_gain_error']}) "
        "in ELBO"
        for row in rows
        if "tuned_gain" in row
    ]


def coordinates(rows):
    """How far a posterior's coordinates get without any training, by the same measures.

    Of as many draws as its samplers have in one step.
    """
    lines = []
    for target in dict.fromkeys(r["target"] for r in rows):
        if truth(target).target.sample is not None:
            continue
        num = max(r.get("num_draws", 0) for r in rows if r["target"] == target)
        found = [untrained(target, seed, num) for seed in range(LEAST_SEEDS)]
        said = ", ".join(
            f"{text} {summarise(found, name, '{:.3f}', float)}"
            for text, name in (
                ("ELBO gap", "elbo_gap"),
                ("mean error", "flow_mean_error"),
                ("of the field", "flow_field_error"),
                ("sd error", "flow_sd_error"),
            )
        )
        lines.append(f"* {target}, the unit normal of its coordinates itself: {said}")
    return lines


# --------------------------------------------------------------------------- plots

QUALITY = {  # what a target is looked at for
    "funnel_hard": ("flow_quantile_error", "quantile error"),
    "ionosphere": ("flow_sd_error", "sd error"),
    "lgcp_whitened": ("flow_field_error", "error of the field"),
}
USUAL = ("w2_ratio", "W2 / floor")


def plot(args):
    """Quality against steps, calls against draws; of each target draws in one step.

    Draws are of the targets that have any on disk.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = joined(rows_of(args.files))
    targets = list(dict.fromkeys(r["target"] for r in rows))

    def panels(num_rows, num_columns, height):
        size = 3 * num_columns, height
        return plt.subplots(num_rows, num_columns, figsize=size, squeeze=False)

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(args.folder / f"consistent_{name}.png", dpi=120)
        plt.close(figure)

    for name, num_rows, height, draw in (
        ("steps", 3, 8, by_steps),
        ("cost", 2, 6, by_cost),
    ):
        figure, axes = panels(num_rows, len(targets), height)
        for column, target in zip(axes.T, targets, strict=True):
            column[0].set_title(target)
            draw(column, rows, target)
        save(figure, name)
    folder = args.draws or args.files[0].parent / "consistent"
    for target in targets:
        if any(folder.glob(f"{target}_*_1.npy")):
            found = clouds(pathlib.Path(folder), target)
            figure, axes = panels(1, len(found), 3)
            draw_clouds(axes[0], found, target)
            save(figure, f"draws_{target}")


def means_of(rows, target, method, name):
    """``{num_steps: mean}`` of what is finite."""
    out = {}
    for row_target, row_method, num_steps in labels_of(rows):
        if (row_target, row_method) != (target, method):
            continue
        values = [r.get(name) for r in of(rows, target, method, num_steps)]
        values = [v for v in values if v is not None]
        if values:
            out[num_steps] = float(np.mean(values))
    return out


def names_of(rows, target):
    """Methods with the better solver of the teacher's flow named."""
    name, _ = QUALITY.get(target, USUAL)
    found = [means_of(rows, target, method, name) for method in TEACHERS]
    if not all(found):
        return {method: method for method in METHODS}
    best = min(TEACHERS, key=lambda m: found[TEACHERS.index(m)][max(found[0])])
    return {m: f"{m} (better solver)" if m == best else m for m in METHODS}


def colour_of(method):
    return f"C{METHODS.index(method)}"


def by_steps(axes, rows, target):
    labels = names_of(rows, target)
    shown = (("ess", "ESS"), ("elbo_gap", "ELBO gap"), QUALITY.get(target, USUAL))
    for axis, (name, text) in zip(axes, shown, strict=True):
        for method in METHODS:
            points = means_of(rows, target, method, name)
            if points:
                look = {"color": colour_of(method), "label": labels[method]}
                axis.plot(*zip(*points.items(), strict=True), "o-", **look)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="steps", ylabel=text)
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].set_ylim(bottom=-0.1)
    axes[2].set_yscale("log")
    axes[2].legend(fontsize="x-small")


def by_cost(axes, rows, target):
    """Network calls, those of training among them."""
    cost, quality = axes
    name, text = QUALITY.get(target, USUAL)
    num_draws = np.geomspace(1e2, 1e7, 50)
    for method in METHODS:
        training = means_of(rows, target, method, "all_network_evaluations")
        each = means_of(rows, target, method, "calls_per_draw")
        found = means_of(rows, target, method, name)
        if not training:
            continue
        k = max(training) if method in TEACHERS else min(training)
        calls = training[k] + each[k] * num_draws
        look = {"color": colour_of(method), "label": f"{method}, {k} steps"}
        if method != "teacher_dpm":  # costs the same
            cost.plot(num_draws, calls, **look)
        points = [(training[k] + each[k] * NUM_DRAWS, v) for k, v in found.items()]
        if points:
            quality.plot(*zip(*points, strict=True), "o-", color=colour_of(method))
    cost.set(xscale="log", yscale="log", xlabel="draws", ylabel="network calls")
    cost.legend(fontsize="x-small")
    label = f"network calls of training\nand of {NUM_DRAWS:,} draws"
    quality.set(xscale="log", yscale="log", xlabel=label, ylabel=text)


def finest_on_disk(folder, target, method):
    """The most steps of which there are draws; 0 where there are none."""
    names = [p.stem for p in folder.glob(f"{target}_{method}_[0-9]*_[0-9]*.npy")]
    return max((int(name.rsplit("_", 1)[1]) for name in names), default=0)


def clouds(folder, target):
    """Points by title: exact ones, the teacher's finest, and everyone's in one step.

    Only of what there are draws of.
    """
    whole = max(finest_on_disk(folder, target, "teacher"), 1)
    shown = [("teacher", whole), *((method, 1) for method in METHODS)]
    found, exact = {}, ds.targets.by_name(target).sample
    beside = folder / f"{target}_nuts.npy"
    if exact is not None:
        found["truth"] = np.asarray(exact(jax.random.key(0), 2_000))
    elif beside.exists():
        found["truth"] = np.load(beside)[:2_000]
    for name, num_steps in shown:
        files = sorted(folder.glob(f"{target}_{name}_[0-9]*_{num_steps}.npy"))
        if files:
            title = f"{name}, {num_steps} step{'s' * (num_steps > 1)}"
            found[title] = np.load(files[0])
    return found


def draw_clouds(axes, found, target):
    """Two coordinates of the points, or the field that the first of them stands for."""
    true = found.get("truth")
    for axis, (title, x) in zip(axes, found.items(), strict=True):
        axis.set_title(title)
        if target.startswith("lgcp"):
            field = np.asarray(truth(target).target.constrain(x[0]))
            axis.imshow(field.reshape(math.isqrt(len(field)), -1))
            continue
        axis.plot(*x[:, :2].T, ".", markersize=1)
        if true is not None:
            low, high = np.quantile(true[:, :2], [0.002, 0.998], axis=0)
            margin = 0.15 * (high - low)
            low, high = low - margin, high + margin
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
