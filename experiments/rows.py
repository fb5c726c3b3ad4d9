"""What the other scripts here share: results as JSON lines, and measures."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax
import numpy as np

import diffsamp as ds

PACKAGES = ("diffsamp", "jax", "jaxlib", "flax", "optax", "distrax", "blackjax")
PACKAGES += ("numpyro", "scipy")


def commands_of(doc):
    """A parser, and where its commands are added."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser, parser.add_subparsers(required=True)


def add_runner(commands, do, out, seeds=(0, 1, 2), name="run"):
    """A command that appends rows to a file; its parser."""
    runner = commands.add_parser(name)
    runner.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    runner.add_argument("--out", type=pathlib.Path, default=out)
    add_mesh_option(runner)
    runner.set_defaults(do=do)
    return runner


def add_reader(commands, do, out, name="table"):
    """A command that reads files of rows; its parser."""
    reader = commands.add_parser(name)
    reader.add_argument("files", type=pathlib.Path, nargs="*", default=[out])
    reader.set_defaults(do=do)
    return reader


def add_mesh_option(parser):
    """The option of every script that trains."""
    help = "spread batches over so many devices"
    parser.add_argument("--mesh", type=int, metavar="N", help=help)


def mesh_of(num_devices):
    """A mesh of so many devices, or None."""
    if num_devices is None:
        return None
    if num_devices < 1:
        raise SystemExit(f"--mesh must be at least 1, got {num_devices}")
    devices = jax.devices()
    if num_devices > len(devices):
        raise SystemExit(
            f"--mesh {num_devices} needs as many devices, got {len(devices)}; to make "
            "devices of the cores of a CPU, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
        )
    return jax.make_mesh((num_devices,), ("batch",), devices=devices[:num_devices])


def read(path):
    """Rows of a file, none where it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(files):
    """Rows of several files, by seed.

    Raises:
        SystemExit: when there are none.
    """
    rows = [row for path in files for row in read(path)]
    if not rows:
        raise SystemExit(f"no rows in {', '.join(map(str, files))}; run first")
    return sorted(rows, key=lambda row: row["seed"])


def append(path, row, packages=()):
    """Adds a row, with the environment it was made in.

    Compiled programs are let go: each holds memory maps, of which Linux grants a
    process 65,530, and some dozens of rows would use them up.
    """
    write(path, {**row, **environment(packages)})
    jax.clear_caches()


def write(path, row):
    """Adds a row as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(dumps(row) + "\n")


def dumps(row, indent=None):
    """JSON, which knows no infinity: an infinite error bar becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, str | bool | int | None):
            return value
        return float(value) if np.isfinite(value) else None

    return json.dumps(plain(row), indent=indent, allow_nan=False)


def environment(packages=()):
    """Versions, of further packages too, commit and device."""
    names = (*PACKAGES, *packages)
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": _commit(),
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }


@functools.cache
def _commit():
    """Of the code beside this file; None where there is no repository."""
    command = ["git", "-C", pathlib.Path(__file__).parent, "describe", "--always"]
    try:
        done = subprocess.run([*command, "--dirty"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def described(row):
    """The environment of a row in words."""
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items())
    return f"{row['device']}, Python {row['python']}, {versions}"


def markdown(heads, body):
    """Lines of a table."""
    lines = [heads, ["---"] * len(heads), *body]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def seeds_of(rows):
    """Their seeds, for a cell of a table."""
    return ", ".join(str(row["seed"]) for row in rows)


def summarise(rows, name, form, badness):
    """``mean (worst)`` of a number over rows, or a dash where no row has it.

    A null is what `dumps` makes of a number that is not finite: one is enough to spoil
    the mean, and nothing is worse.
    """
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    if None in values:
        return "inf (inf)"
    mean = form.format(float(np.mean(values)))
    return f"{mean} ({form.format(max(values, key=badness))})"


def well_errors(x, log_weight):
    """Error of the share of the right well, for each well of a many-well, [D / 2]."""
    share = float(ds.targets.manywell(2).modes.weights[1])
    weights = np.ones(len(x))
    if log_weight is not None:
        weights = np.exp(log_weight - np.max(log_weight))
    right = weights @ (np.asarray(x)[:, 0::2] > 0) / weights.sum()
    return np.abs(right - share)
