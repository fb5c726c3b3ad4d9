"""The tutorial's code runs as printed, on a smaller budget.

Too long for the fast tests; `.ci/run` has it as a step of its own.
"""

import importlib.util
import pathlib
import re
import warnings

import numpy as np
import pytest

pytest.importorskip("arviz", reason="the tutorial plots with ArviZ")

# NumPyro, ArviZ and BlackJAX do as they like.
pytestmark = [
    pytest.mark.relaxed("dtypes", "ranks"),
    pytest.mark.filterwarnings("ignore"),
]

ROOT = pathlib.Path(__file__).parents[2]


def tutorial():
    path = ROOT / "experiments" / "tutorial.py"
    spec = importlib.util.spec_from_file_location("tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shortened(code):
    code = code.replace("num_steps=16, max_seconds=30", "num_steps=4, max_seconds=3")
    return re.sub(r"(num_(?:warmup|samples)=)\d+", r"\g<1>100", code)


@pytest.mark.slow
def test_its_code_runs_and_its_answer_is_near():
    module = tutorial()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text, namespace = module.run(module.PAGE.read_text(), shortened)
    assert len(module.PARTS.findall(text)) == len(
        module.PARTS.findall(module.PAGE.read_text())
    )
    assert abs(namespace["evidence"].estimate - namespace["exact_log_z"]) < 0.3
    assert abs(namespace["north"] - namespace["exact_north"]) < 0.1
    assert set(np.sign(namespace["chains"][..., 1].ravel())) == {-1.0, 1.0}
