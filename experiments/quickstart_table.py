"""Markdown table of several quickstart results, for the docs.

for s in 0 1 2; do python experiments/quickstart.py --seed $s --out outputs/q$s; done
python experiments/quickstart_table.py outputs/q*/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib

import numpy as np
from rows import described, markdown, summarise

COLUMNS = (  # title, name, form, what the worst is the largest of
    ("log Z error", "log_z_error", "{:+.3f}", abs),
    ("standard error", "log_z_standard_error", "{:.3f}", float),
    ("ELBO gap", "elbo_gap", "{:.2f}", float),
    ("EUBO gap", "eubo_gap", "{:.2f}", float),
    ("ESS", "ess", "{:.3f}", lambda v: -v),
    ("k-hat", "pareto_k", "{:.2f}", float),
    ("worst mode weight error", "mode_weights_error", "{:.3f}", float),
    ("energies", "energy_evaluations", "{:.2e}", float),
    ("gradients", "gradient_evaluations", "{:.2e}", float),
    ("network calls", "network_evaluations", "{:.2e}", float),
    ("seconds in all", "seconds", "{:.0f}", float),
    ("NUTS max R-hat", "nuts_max_rhat", "{:.2f}", float),
    ("NUTS worst mode weight error", "mode_weights_nuts_error", "{:.3f}", float),
    ("NUTS gradients after warm-up", "nuts_gradients_after_warmup", "{:.2e}", float),
    ("NUTS seconds", "nuts_seconds", "{:.0f}", float),
)


def read(path):
    """A result with its errors; what is infinite stands as null in the file."""
    row = json.loads(path.read_text())
    for name in ("log_z_standard_error", "eubo", "pareto_k", "nuts_max_rhat"):
        row[name] = math.inf if row[name] is None else row[name]
    truth, shares = row["log_z_true"], row["mode_weights_true"]
    if truth is not None:
        row["log_z_error"] = row["log_z"] - truth
        row["elbo_gap"], row["eubo_gap"] = truth - row["elbo"], row["eubo"] - truth
    if shares is not None:
        for name in ("mode_weights", "mode_weights_nuts"):
            error = np.max(np.abs(np.subtract(row[name], shares)))
            row[f"{name}_error"] = float(error)
    return row


def cell(row, name, form):
    return "-" if row.get(name) is None else form.format(row[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=pathlib.Path, nargs="+")
    rows = sorted(map(read, parser.parse_args().files), key=lambda row: row["seed"])
    body = [[row["seed"], *(cell(row, *c[1:3]) for c in COLUMNS)] for row in rows]
    body.append(["mean (worst)", *(summarise(rows, *c[1:]) for c in COLUMNS)])
    print("\n".join(markdown(["seed", *(column[0] for column in COLUMNS)], body)))
    print()
    for row in rows:
        print(f"* seed {row['seed']}: {row['verdict']}")
    first = rows[0]
    trained = [row["training_seconds"] for row in rows]
    trained = dict.fromkeys(f"{extreme(trained):.0f}" for extreme in (min, max))
    print(
        f"\n{first['target']}, {first['num_steps']} steps, {first['objective']}, "
        f"{' to '.join(trained)} s of training, "
        f"{first['num_draws']:,} draws, "
        f"{described(first)}."
    )


if __name__ == "__main__":
    main()
