"""The numerical canary of `.ci/canary.py`, as a test."""

import importlib.util
import pathlib

import pytest

_PATH = pathlib.Path(__file__).parents[1] / ".ci" / "canary.py"


def _canary():
    spec = importlib.util.spec_from_file_location("diffsamp_canary", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("check", ["check_scan_gradient", "check_log_z"])
def test_jax_agrees_with_numpy(check):
    for name, error, bound in getattr(_canary(), check)():
        assert error <= bound, name


def test_canary_notices_a_wrong_gradient(monkeypatch, capsys):
    canary = _canary()
    right = canary._loss_jax
    monkeypatch.setattr(canary, "_loss_jax", lambda p, x, n: right(p, 1.001 * x, n))
    assert canary.main() == 1
    assert "BAD scan loss" in capsys.readouterr().out
