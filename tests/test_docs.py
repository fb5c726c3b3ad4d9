"""README's commands and example run as printed; the API pages cover every name."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import math
import pathlib
import re
import types

import pytest

import diffsamp

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "diffsamp"


def _block(name: str) -> str:
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.block(name)


def _shortened(code: str) -> str:
    """The example with few updates: that it runs, not how well."""
    short, count = re.subn(r"num_updates=[\d_]+", "num_updates=20", code)
    assert count == 1
    return short


def test_readme_example_runs():
    code = _block("example")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 22
    printed = io.StringIO()
    namespace = {"__name__": "__example__"}
    with contextlib.redirect_stdout(printed):
        exec(compile(_shortened(code), "README.md", "exec"), namespace)
    log_evidence = namespace["draws"].log_evidence
    assert math.isfinite(float(log_evidence.estimate))
    assert float(log_evidence.lower) <= float(log_evidence.estimate)
    assert namespace["draws"].diagnostics.verdict in printed.getvalue()


@pytest.mark.slow
def test_readme_example_is_right():
    """With the printed budget: log Z = log(pi / 2), and 0.8 of the mass on the left."""
    namespace = {"__name__": "__example__"}
    exec(compile(_block("example"), "README.md", "exec"), namespace)
    assert abs(float(namespace["draws"].log_evidence.estimate) - 0.4516) < 0.05
    weights, x = namespace["weights"], namespace["draws"].x
    assert abs(float(weights[x[:, 0] < 0].sum()) - 0.8) < 0.05


@pytest.mark.slow  # test_face.py has the same with more to check
def test_face_of_the_design_page_runs(tmp_path):
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    code = re.search(r"## The face\n\n```python\n(.*?)\n```", text, re.DOTALL).group(1)
    for name, few in [("num_updates", 3), ("batch_size", 16), ("num_steps", 10)]:
        code, count = re.subn(rf"{name}=[\d_]+", f"{name}={few}", code)
        assert count == 1
    few = "fit.params, target, num_draws=100, sinkhorn=False)"
    assert code.count("fit.params, target)") == 1
    code = code.replace("fit.params, target)", few)
    namespace = {"path": tmp_path / "sampler"}
    exec(compile(code, "design.md", "exec"), namespace)
    assert namespace["trajectory"].xs.shape == (11, 2)
    assert namespace["draws"].x.shape == (2_000, 2)


def test_snippets_parse_and_name_only_what_exists():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    names = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for code in re.findall(r"```python\n(.*?)\n```", text, re.DOTALL):
            ast.parse(code)
        names |= set(re.findall(r"\bds\.([A-Za-z_][\w.]*\w)", text))
    for name in sorted(names):
        value = diffsamp
        for part in name.split("."):
            assert hasattr(value, part), f"ds.{name}"
            value = getattr(value, part)


def test_readme_has_exactly_two_set_up_commands():
    commands = re.findall(r"```(?:bash|sh|console)\n(.*?)\n```", README, re.DOTALL)
    assert commands == [_block("quickstart-command"), _block("test-command")]
    for command in commands:
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert commands[0].endswith("experiments/quickstart.py")
    assert (ROOT / "experiments" / "quickstart.py").exists()


def test_links_of_the_documentation_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if not link.startswith(("http:", "https:")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def _public_modules() -> list[str]:
    """Modules and packages of diffsamp without an underscore in their name."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def _declares_all(name: str) -> bool:
    path = ROOT / pathlib.Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return any(
        isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(node)
        for node in ast.parse(path.read_text()).body
    )


def _pages() -> tuple[set[str], set[str]]:
    """(modules documented whole, single objects documented) in docs/api."""
    text = "\n".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    modules = set(re.findall(r"^\.\. automodule:: (\S+)\n   :members:$", text, re.M))
    objects = re.findall(r"^\.\. auto(?:class|function|data):: (\S+)", text, re.M)
    return modules, set(objects)


@pytest.mark.parametrize("name", [n for n in _public_modules() if _declares_all(n)])
def test_every_public_name_is_documented(name):
    modules, objects = _pages()
    module = importlib.import_module(name)
    undocumented, without_docstring = [], []
    for public in module.__all__:
        value = getattr(module, public)
        if isinstance(value, types.ModuleType) or public.startswith("__"):
            continue
        home = getattr(value, "__module__", name)
        if not modules & {name, home} and not objects & {
            f"{name}.{public}",
            f"{home}.{public}",
        }:
            undocumented.append(public)
        if (inspect.isclass(value) or callable(value)) and not inspect.getdoc(value):
            without_docstring.append(public)
    assert not undocumented, f"not in docs/api: {undocumented}"
    assert not without_docstring, f"without a docstring: {without_docstring}"


@pytest.mark.parametrize("name", ["diffsamp.numpyro", "diffsamp.posteriors"])
def test_names_that_a_package_collects_are_documented(name):
    modules, objects = _pages()
    text = (PACKAGE / name.split(".")[1] / "__init__.py").read_text()
    collected = re.findall(r"^from (\S+) import (?:\(\n\s+)?\w+ as (\w+)", text, re.M)
    assert len(collected) > 5
    for home, public in collected:
        found = {home, f"{home}.{public}"} & modules or f"{name}.{public}" in objects
        assert found, f"{name}.{public} is not in docs/api"


def test_top_level_names_are_sorted_and_exist():
    names = list(diffsamp.__all__)
    assert names == sorted(names)
    assert all(hasattr(diffsamp, name) for name in names)


def test_version_is_in_the_changelog_or_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{diffsamp.__version__}]" in text or "[Unreleased]" in text
