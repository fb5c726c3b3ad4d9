"""Files: trained samplers and training checkpoints.

One file holds a magic line, the SHA-256 of all that follows, a JSON header of stated
length and a msgpack payload made by `flax.serialization`. Files are written beside
their place and renamed into it, so that a killed process leaves the old file or the new
one. Nothing is unpickled: a file is data, and classes come from a fixed table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import serialization

from diffsamp import networks, priors, processes, schedules
from diffsamp.sampler import Bounds, Sampler
from diffsamp.types import Params, PyTree

MAGIC = b"diffsamp-file\n"
FORMAT_VERSION = 1

CLASSES = {
    cls.__name__: cls
    for cls in (
        Sampler,
        Bounds,
        processes.PinnedBrownian,
        processes.VariancePreserving,
        processes.EulerVariancePreserving,
        processes.Renoising,
        processes.Brownian,
        schedules.GeometricNoise,
        schedules.CosineNoise,
        schedules.LinearNoise,
        schedules.CosinePowerNoise,
        schedules.PowerGrid,
        schedules.FixedGrid,
        networks.LinenControl,
        networks.LinenBackbone,
        networks.ReducedPrecision,
        networks.Tied,
        networks.FourierMLP,
        networks.FreeModule,
        networks.ScoreGuidedModule,
        networks.AnnealedScoreModule,
        networks.ReferenceGuidedModule,
        networks.ConsistencyModule,
        networks.ContractiveModule,
        networks.CoordinatewiseModule,
        networks.DataPredictionModule,
        networks.MixtureGuidedModule,
        priors.MixturePrior,
    )
}


class CheckpointError(ValueError):
    """A file that is truncated, foreign, or made for another configuration."""


def save(path: str | os.PathLike, sampler: Sampler, params: Params) -> None:
    """Writes a trained sampler to one file.

    A sampler with a control of the user's own is stored without its configuration, and
    `load` must then be given the sampler.

    Args:
        path: file to write. A sampler that is already there is replaced; any other
            file, a training checkpoint included, is left as it is.
        sampler: the sampler.
        params: its parameters, ``fit.params``.

    Raises:
        CheckpointError: when another kind of file is there.

    Example:
        >>> import tempfile, jax, diffsamp as ds
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4)
        >>> params = sampler.init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ds.save(folder + "/s.diffsamp", sampler, params)
        ...     again, _ = ds.load(folder + "/s.diffsamp")
        >>> again == sampler
        True
    """
    if Path(path).exists():
        kind = _kind(path)
        if kind != "sampler":
            raise CheckpointError(
                f"{path} exists and is {kind}; it was left untouched. Choose another "
                "path, or remove the file"
            )
    header = {"kind": "sampler", "sampler": _encode(sampler)}
    write(path, header, params)


def load(
    path: str | os.PathLike, *, sampler: Sampler | None = None
) -> tuple[Sampler, Params]:
    """Reads a sampler written by `save`.

    Args:
        path: the file.
        sampler: needed where the sampler has a control of the user's own.

    Returns:
        The sampler and its parameters.

    Raises:
        CheckpointError: when the file is not one of ours, is damaged, or does not fit.
    """
    header, payload = read(path)
    if header.get("kind") != "sampler":
        raise CheckpointError(
            f"{path} holds {header.get('kind')!r}, not a sampler; pass a training "
            "checkpoint to fit(..., checkpoint=path)"
        )
    if sampler is None and header["sampler"] is None:
        raise CheckpointError(
            f"{path} holds parameters of a sampler with a control of your own; "
            "build that sampler and call load(path, sampler=sampler)"
        )
    loaded = _decode(header["sampler"]) if sampler is None else sampler
    template = jax.eval_shape(loaded.init, jax.random.key(0))
    return loaded, restore(template, payload, path)


def write(path: str | os.PathLike, header: dict, tree: PyTree) -> None:
    """Writes header and tree to one file, atomically."""
    payload = serialization.msgpack_serialize(
        jax.tree.map(np.asarray, serialization.to_state_dict(without_keys(tree)))
    )
    text = json.dumps({**header, "format": FORMAT_VERSION}).encode()
    content = len(text).to_bytes(8, "little") + text + payload
    path = Path(path)
    partial = path.with_name(path.name + ".diffsamp-partial")
    try:
        with open(partial, "wb") as file:
            file.write(MAGIC + hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike) -> tuple[dict, Any]:
    """Reads and verifies a file; returns its header and raw payload tree.

    Raises:
        CheckpointError: when the file is foreign, truncated or altered.
    """
    data = Path(path).read_bytes()
    if not data.startswith(MAGIC):
        raise CheckpointError(
            f"{path} is not a diffsamp file; it was left untouched. Choose another path"
        )
    start = len(MAGIC) + 32
    digest, content = data[len(MAGIC) : start], data[start:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(
            f"{path} is truncated or damaged; it was left untouched. Move it away to "
            "start afresh"
        )
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if header["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {header['format']}, this version reads {FORMAT_VERSION}"
        )
    return header, serialization.msgpack_restore(content[8 + size :])


def _kind(path: str | os.PathLike) -> str:
    """What a file holds, "sampler" if it is a sound file of `save`."""
    try:
        kind = str(read(path)[0].get("kind"))
    except CheckpointError:
        return "damaged, or no file of this library"
    return kind if kind == "sampler" else f"a {kind} checkpoint"


def restore(template: PyTree, payload: Any, path: str | os.PathLike) -> PyTree:
    """Fills a template (arrays or shapes) with a payload tree, checking every shape.

    Raises:
        CheckpointError: when structure, shapes or dtypes differ.
    """
    plain = without_keys(template)
    # Flax by itself accepts, and drops, what is too many.
    want, have = _names(serialization.to_state_dict(plain)), _names(payload)
    if odd := sorted(want ^ have):
        raise CheckpointError(
            f"{path} was written for another configuration: only one of file and "
            f"request has {', '.join(odd[:3])}{', ...' if odd[3:] else ''}"
        )
    try:
        filled = serialization.from_state_dict(plain, payload)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} was written for another configuration: {error}"
        ) from error

    def check(want, have):
        have = np.asarray(have)
        if want.shape != have.shape or want.dtype != have.dtype:
            raise CheckpointError(
                f"{path} was written for another configuration: an array has "
                f"{have.dtype}{list(have.shape)}, wanted {want.dtype}{list(want.shape)}"
            )
        return jnp.asarray(have)

    filled = jax.tree.map(check, plain, filled)
    return jax.tree.map(_with_key, template, filled)


def without_keys(tree: PyTree) -> PyTree:
    """Replaces typed random keys by their data, which can be written."""
    return jax.tree.map(lambda x: _key_data(x) if _is_key(x) else x, tree)


def _names(tree: Any) -> set[str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _with_key(template: Any, leaf: Any) -> Any:
    if not _is_key(template):
        return leaf
    found = []  # `key_impl` takes no ShapeDtypeStruct, but a tracer
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), template)
    return jax.random.wrap_key_data(leaf, impl=found[0])


def _encode(value: Any) -> Any:
    """A configuration as JSON; None where a part is not one of ours."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, jax.lax.DotAlgorithmPreset):
        return {"algorithm": value.name}
    name = type(value).__name__
    if CLASSES.get(name) is not type(value):
        return None
    fields = {
        field.name: _encode(getattr(value, field.name)) for field in _fields(value)
    }
    known = all(
        fields[field.name] is not None or getattr(value, field.name) is None
        for field in _fields(value)
    )
    return {"class": name, "fields": fields} if known else None


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    try:
        if "algorithm" in value:
            return jax.lax.DotAlgorithmPreset[value["algorithm"]]
        cls = CLASSES[value["class"]]
        return cls(**{k: _decode(v) for k, v in value["fields"].items()})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the file names an unknown part: {error}") from error


def _fields(value: Any) -> list[dataclasses.Field]:
    internal = {"parent", "name"} if isinstance(value, nn.Module) else set()
    return [f for f in dataclasses.fields(value) if f.name not in internal]
