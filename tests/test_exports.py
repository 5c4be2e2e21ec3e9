"""The public face: what ``gockpt`` shows is what it promises, and every name says what it does."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import gockpt
import gockpt.errors

REPOSITORY = Path(__file__).resolve().parent.parent
FACE = {
    *("Checkpointer", "Keep", "Options", "SaveHandle", "close", "finish", "save_overlapped", "wait"),
    *(
        "Checkpoint",
        "Restored",
        "checkpoints",
        "diff",
        "latest",
        "load",
        "open",
        "pack",
        "prune",
        "steps",
        "unpack",
        "upload",
        "verify",
    ),
}
HOMES = {**dict.fromkeys(gockpt.errors.__all__, "gockpt.errors"), **gockpt._HOME}


def test_the_face_is_what_the_design_names():
    assert set(gockpt.__all__) == FACE | set(gockpt.errors.__all__)
    assert len(set(gockpt.__all__)) == len(gockpt.__all__)
    assert set(dir(gockpt)) == {*gockpt.__all__, "__version__"}


@pytest.mark.parametrize("name", gockpt.__all__)
def test_a_name_is_where_it_lives_and_is_documented(name):
    value = getattr(gockpt, name)
    assert value is getattr(importlib.import_module(HOMES[name]), name)
    assert value.__module__ == HOMES[name] or value.__module__.startswith(f"{HOMES[name]}.")
    assert (value.__doc__ or "").strip()
    assert not value.__doc__.startswith(f"{name}("), "a docstring, not the one dataclass makes up"


@pytest.mark.parametrize("name", [name for name in gockpt.__all__ if name[0].isupper()])
def test_a_class_documents_what_it_offers(name):
    for attribute, value in vars(getattr(gockpt, name)).items():
        inner = getattr(value, "__func__", value)
        if not attribute.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property)):
            assert (inner.__doc__ or "").strip(), f"{name}.{attribute}"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(inspect.getsource(gockpt))
    seen = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        for alias in node.names
    }
    assert seen == HOMES


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'save_overlaped'"):
        getattr(gockpt, "save_overlaped")  # noqa: B009 - the check is the attribute's absence


def test_no_module_hides_a_public_name():
    """Importing ``gockpt.x`` binds it as an attribute; a public ``x`` would be gone."""
    assert not {module.name for module in pkgutil.iter_modules(gockpt.__path__)} & set(gockpt.__all__)


def test_the_version_is_the_projects():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert gockpt.__version__ == project["version"]


def test_the_error_tree_is_the_documented_one():
    parents, depths = {}, {}
    for line in gockpt.errors.__doc__.splitlines():
        if found := re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?", line):
            depth = len(found[1]) // 4
            depths[depth] = found[2]
            parents[found[2]] = ([depths[depth - 1]] if depth else ["Exception"]) + [found[3]] * bool(
                found[3]
            )
    real = {
        name: [base.__name__ for base in getattr(gockpt.errors, name).__bases__]
        for name in gockpt.errors.__all__
    }
    assert parents == real
