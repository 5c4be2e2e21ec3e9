"""First lines of docstrings name their subject: read from the source, nothing is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

PACKAGES = (
    *("gockpt", "gockpt/cli", "gockpt/core", "gockpt/loading", "gockpt/planning", "gockpt/replay"),
    *("gockpt/saving", "gockpt/staging", "gockpt/state", "storage", "storage/format", "storage/local"),
)
# A first line that begins so is a clause without a subject: "What a save adds" is "Additions of a save".
HEADLESS = re.compile(r"(What|Where|Which|Who|Whose|Whatever|Those|That|How|When|Why)\b")


def headless(source: str) -> list[tuple[int, str]]:
    """Return line and first line of each docstring, of attributes too, that begins with such a clause."""
    nodes = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [(node.lineno, node.value) for node in nodes if isinstance(node, ast.Constant)]
    return [
        (line, text.splitlines()[0]) for line, text in texts if isinstance(text, str) and HEADLESS.match(text)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_docstring_names_its_subject_first(package):
    modules = sorted((REPOSITORY / package).glob("*.py"))
    assert modules
    found = {module.name: lines for module in modules if (lines := headless(module.read_text()))}
    assert not found


def test_clauses_without_a_subject_are_found():
    source = '"""What a save adds."""\nFEW = 3\n"""How many stay."""\nclass A:\n    """Whether it holds."""\n'
    assert headless(source) == [(1, "What a save adds."), (3, "How many stay.")]
