"""Runs the code of docs/guide/tutorial.md and puts what it prints into the page.

    python experiments/tutorial.py

About three minutes on two cores. The figure goes to docs/images/tutorial.png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import re

import matplotlib

matplotlib.use("Agg")

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "tutorial.md"
PARTS = re.compile(
    r"```python\n(?P<code>.*?)\n```|<!-- printed -->\n(?P<old>.*?)<!-- end -->", re.S
)


def run(text, change=lambda code: code):
    """The page with new outputs, and the namespace its code leaves."""
    namespace, printed = {"__name__": "__tutorial__"}, io.StringIO()

    def replace(part):
        nonlocal printed
        if part["code"] is not None:
            with contextlib.redirect_stdout(printed):
                exec(compile(change(part["code"]), PAGE.name, "exec"), namespace)
            return part[0]
        lines = [line.rstrip() for line in printed.getvalue().strip("\n").splitlines()]
        printed = io.StringIO()
        return "\n".join(["<!-- printed -->", "```text", *lines, "```", "<!-- end -->"])

    return PARTS.sub(replace, text), namespace


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text, namespace = run(PAGE.read_text())
    PAGE.write_text(text)
    figure = namespace["axes"].ravel()[0].figure
    figure.savefig(ROOT / "docs" / "images" / "tutorial.png", dpi=80)


if __name__ == "__main__":
    main()
