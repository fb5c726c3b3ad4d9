"""Markdown table of several quickstart results, for the docs.

for s in 0 1 2; do python experiments/quickstart.py --seed $s --out outputs/q$s; done
python experiments/quickstart_table.py outputs/q*/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np


def worst_mode_error(row, name):
    return float(np.max(np.abs(np.subtract(row[name], row["mode_weights_true"]))))


def number(value, form):
    return "inf" if value is None else format(value, form)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=pathlib.Path, nargs="+")
    rows = [json.loads(path.read_text()) for path in parser.parse_args().files]
    head = (
        "seed",
        "log Z error",
        "standard error",
        "ELBO gap",
        "EUBO gap",
        "ESS",
        "k-hat",
        "worst mode weight error",
        "energies and gradients",
        "seconds in all",
        "NUTS max R-hat",
        "NUTS worst mode weight error",
        "NUTS seconds",
        "verdict",
    )
    print("| " + " | ".join(head) + " |")
    print("| --- " * len(head) + "|")
    for row in sorted(rows, key=lambda r: r["seed"]):
        cells = (
            row["seed"],
            f"{row['log_z'] - row['log_z_true']:+.3f}",
            number(row["log_z_standard_error"], ".3f"),
            f"{row['log_z_true'] - row['elbo']:.2f}",
            "inf" if row["eubo"] is None else f"{row['eubo'] - row['log_z_true']:.2f}",
            f"{row['ess']:.3f}",
            number(row["pareto_k"], ".2f"),
            f"{worst_mode_error(row, 'mode_weights'):.3f}",
            f"{row['num_evaluations']:.2e}",
            f"{row['seconds']:.0f}",
            f"{row['nuts_max_rhat']:.2f}",
            f"{worst_mode_error(row, 'mode_weights_nuts'):.3f}",
            f"{row['nuts_seconds']:.0f}",
            row["verdict"],
        )
        print("| " + " | ".join(map(str, cells)) + " |")
    first = rows[0]
    print(
        f"\n{first['target']}, {first['num_steps']} steps, {first['objective']}, "
        f"{first['training_seconds']:.0f} s of training, {first['num_draws']:,} draws, "
        f"{first['device']}, jax {first['versions']['jax']}."
    )


if __name__ == "__main__":
    main()
