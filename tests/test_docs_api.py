"""docs/api.md names every public name, with its true signature; the guide's table has every option."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import gockpt
from gockpt import errors
from gockpt.catalog import Metadata
from gockpt.saving.handle import Saved

DOCS = Path(__file__).resolve().parent.parent / "docs"
API = (DOCS / "api.md").read_text()
GUIDE = (DOCS / "guide.md").read_text()
FUNCTIONS = [name for name in gockpt.__all__ if name[0].islower()]


def signature(name):
    """Return how a name is called, without types."""
    bare = inspect.signature(getattr(gockpt, name))
    bare = bare.replace(
        parameters=[p.replace(annotation=p.empty) for p in bare.parameters.values()],
        return_annotation=bare.empty,
    )
    return f"gockpt.{name}{bare}"


def section(heading):
    """Return what stands below a heading of the API page."""
    return re.split(r"^#+ ", API, flags=re.MULTILINE)[
        1 + [line[1] for line in re.findall(r"^(#+) (.*)$", API, re.MULTILINE)].index(heading)
    ]


def offered(name):
    """Return the attributes and methods of a class that its docstring or methods make public."""
    listed = re.findall(r"^        (\w+):", getattr(gockpt, name).__doc__, re.MULTILINE)
    return {*listed, *(key for key in vars(getattr(gockpt, name)) if not key.startswith("_"))}


@pytest.mark.parametrize("name", gockpt.__all__)
def test_a_public_name_is_there(name):
    assert re.search(rf"\b{name}\b", API)


@pytest.mark.parametrize("name", [*FUNCTIONS, "Checkpointer", "Options"])
def test_a_signature_is_true(name):
    assert signature(name) in API.splitlines()


@pytest.mark.parametrize("name", ["SaveHandle", "Checkpoint", "Restored"])
def test_a_class_is_described_whole(name):
    described = set(re.findall(r"`(\w+)", section(name)))
    unsaid = {"leave_out", "retarget", "move", "take", "reject", "failing"}  # the engine's side of a handle
    assert offered(name) - described - unsaid == set()


@pytest.mark.parametrize(("kind", "heading"), [(Saved, "SaveHandle"), (Metadata, "Checkpoint")])
def test_a_value_is_described_whole(kind, heading):
    described = set(re.findall(r"`(\w+)", section(heading)))
    assert {field.name for field in dataclasses.fields(kind)} <= described


def test_methods_take_what_the_page_says():
    for owner in (gockpt.Checkpointer, gockpt.SaveHandle):
        for name, given in re.findall(r"^\| `(\w+)\(([^`]*)\)` ", section(owner.__name__), re.MULTILINE):
            bare = inspect.signature(getattr(owner, name)).parameters
            expected = [str(p.replace(annotation=p.empty)) for p in bare.values()][1:]
            assert given == ", ".join(expected), name


def test_the_error_table_is_the_tree():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*)\|", section("Errors"), re.MULTILINE)
    assert {name for name, _ in rows} == set(errors.__all__)
    for name, parents in rows[1:]:
        bases = {base.__name__ for base in getattr(gockpt, name).__bases__} - {"GockptError"}
        assert set(re.findall(r"`(\w+)`", parents)) - {"GockptError"} == bases


def test_the_options_table_is_the_options():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", GUIDE, re.MULTILINE)
    assert rows == [(field.name, repr(field.default)) for field in dataclasses.fields(gockpt.Options)]
    documented = re.findall(r"^        (\w+):", gockpt.Options.__doc__, re.MULTILINE)
    assert [name for name, _ in rows] == documented
