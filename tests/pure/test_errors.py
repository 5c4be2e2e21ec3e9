"""The error tree: what its docstring draws is what there is, and each error says what to do."""

from __future__ import annotations

import re

import pytest

from gockpt import errors

DRAWN = re.compile(r"^([ │├└─]*)(\w+)(?: \((\w+)\))?", re.MULTILINE)


def drawn_tree():
    """Return (name, parent, extra base) of each line of the drawing."""
    drawing = errors.__doc__.split("::", 1)[1]
    path: list[tuple[int, str]] = []
    for line in filter(str.strip, drawing.splitlines()):
        match = DRAWN.match(line)
        assert match is not None, line
        depth = len(match[1])
        path = [(d, n) for d, n in path if d < depth]
        yield match[2], path[-1][1] if path else None, match[3]
        path.append((depth, match[2]))


TREE = list(drawn_tree())


def test_the_drawing_has_every_error_and_no_other():
    assert sorted(name for name, _, _ in TREE) == sorted(errors.__all__)


@pytest.mark.parametrize(("name", "parent", "extra"), TREE)
def test_an_error_stands_where_it_is_drawn(name, parent, extra):
    kind = getattr(errors, name)
    bases = {base.__name__ for base in kind.__bases__}
    assert bases == {parent or "Exception", *([extra] if extra else [])}
    assert kind.__doc__


def test_a_missing_tensor_shows_its_message_and_not_its_repr():
    error = errors.TensorNotFound("no tensor 'model/a'; did you mean 'model/b'?")
    assert str(error) == "no tensor 'model/a'; did you mean 'model/b'?"
    assert isinstance(error, KeyError)


def test_a_state_mismatch_lists_what_differs():
    error = errors.StateMismatch(
        "differs", missing=("a",), unexpected=("b",), mismatched=("c: (1,) vs. (2,)",)
    )
    assert (error.missing, error.unexpected, error.mismatched) == (("a",), ("b",), ("c: (1,) vs. (2,)",))
    bare = errors.StateMismatch("differs")
    assert (bare.missing, bare.unexpected, bare.mismatched) == ((), (), ())
