"""The documentation is true: its Python runs, its links lead somewhere, its commands exist.

Every page's ``python`` blocks run in order, in one fresh interpreter, in an empty directory. Two
comments steer that::

    <!-- not run: why this block can't run here -->
    <!-- first:
    code that the next block needs and the reader doesn't
    -->
"""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TOP = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((REPOSITORY / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"(?:^<!-- not run: *(?P<reason>.*?) *-->\n+)?"
    r"^(?P<indent> *)```(?:python|py|python3|pycon)\b[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- first:\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
VERB = re.compile(r"\bmake ([a-z][a-z-]*)")


def modules() -> list[str]:
    """Return the import name of every module of the package."""
    found = []
    for folder in ("gockpt", "kernels", "storage"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[:2] not in {("gockpt", "kernels"), ("gockpt", "storage")}:
                name = ".".join(parts if folder == "gockpt" else ("gockpt", *parts))
                found.append(name.removesuffix(".__init__"))
    return found


def script(text: str) -> str:
    """Return a page's code at the very lines where it stands in the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        if block["reason"]:
            continue
        group = "hidden" if block["code"] is None else "code"
        first = text.count("\n", 0, block.start(group))
        for offset, line in enumerate(block[group].splitlines()):
            lines[first + offset] = line.removeprefix(block["indent"] or "")
    return "\n".join(lines) + "\n"


def unexplained(text: str) -> list[str]:
    """Return the blocks that are left out without a reason worth reading."""
    return [
        b["code"] for b in BLOCK.finditer(text) if b["reason"] is not None and len(b["reason"].split()) < 3
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_python_in_a_page_runs(page, tmp_path):
    text = page.read_text()
    assert unexplained(text) == []
    code = script(text)
    if not code.strip():
        return
    program = tmp_path / f"{page.stem}.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", program], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files(page):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_exist(page):
    code = re.findall(r"```(?:sh|console|bash)\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)
    named = {verb for pair in code for verb in VERB.findall("\n".join(pair))}
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("module", modules())
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_code_keeps_its_lines():
    page = "a\n<!-- first:\nx = 1\n-->\n```python\ny = x\n```\n\n   ```py\n   z = y\n   ```\n```sh\nls\n```\n"
    assert script(page).splitlines()[:10] == ["", "", "x = 1", "", "", "y = x", "", "", "", "z = y"]
    assert "ls" not in script(page)


def test_a_block_is_left_out_with_a_reason_only():
    block = "```python\n1 / 0\n```\n"
    assert "1 / 0" in script(block)
    assert "1 / 0" not in script(f"<!-- not run: needs two machines -->\n{block}")
    assert unexplained(f"<!-- not run: needs two machines -->\n\n{block}") == []
    assert unexplained(f"<!-- not run: -->\n{block}") == ["1 / 0\n"]
    assert unexplained(f"<!-- not run: sorry -->\n{block}") == ["1 / 0\n"]
