"""Prints the code block of README.md that follows the comment ``<!-- NAME -->``.

Usage: ``python .ci/readme.py test-command``. Standard library only.
"""

import pathlib
import re
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def block(name: str, text: str | None = None) -> str:
    """The fenced block right below ``<!-- name -->``; exactly one must exist."""
    text = README.read_text(encoding="utf-8") if text is None else text
    pattern = rf"<!-- {re.escape(name)} -->\s*\n```\w+\n(.*?)\n```"
    found = re.findall(pattern, text, flags=re.DOTALL)
    if len(found) != 1:
        raise SystemExit(f"README.md has {len(found)} blocks marked <!-- {name} -->")
    return found[0]


if __name__ == "__main__":
    print(block(sys.argv[1]))
