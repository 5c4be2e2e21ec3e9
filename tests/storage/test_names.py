from __future__ import annotations

import string
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.errors import UnsupportedState, UsageError
from gockpt.storage.format import array_paths

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
# Close neighbours: case, dots, reserved words, escapes that look like escapes.
tricky = st.text(st.sampled_from("dDcC.~_40h/"), max_size=5) | st.sampled_from(
    [
        "zarr.json",
        "Zarr.JSON",
        "~44",
        "con",
        "CON",
        "aux.weight",
        "c.0",
        "C",
        "state.json",
        "ß",
        "SS",
        "\u017f",
        "ẞ",
    ]
)
components = tricky | text
ALLOWED = set(string.ascii_letters + string.digits + "._=@+,-~")


@pytest.mark.parametrize(
    ("component", "path"),
    [
        ("layers.3.mlp.weight", "layers.3.mlp.weight"),
        ("a-b_c=d@e+f,g", "a-b_c=d@e+f,g"),
        ("D", "D"),
        ("", "~"),
        (".", "~2e"),
        ("..", "~2e~2e"),
        ("...", "~2e.~2e"),
        ("a.", "a~2e"),
        (".a", ".a"),
        ("__x", "~5f_x"),
        ("_x", "_x"),
        ("a/b", "a~2fb"),
        ("a\\b", "a~5cb"),
        ("a b%", "a~20b~25"),
        ("~44", "~7e44"),
        ("zarr.json", "~7aarr.json"),
        ("ZARR.json", "~5aARR.json"),
        ("gockpt.json", "~67ockpt.json"),
        ("state.json", "~73tate.json"),
        ("c", "~63"),
        ("c.0.1", "~63.0.1"),
        ("c.x", "c.x"),
        ("con", "~63on"),
        ("Aux.weight", "~41ux.weight"),
        ("auxiliary", "auxiliary"),
        ("ä", "~c3~a4"),
        ("\0\n\x1b", "~00~0a~1b"),
    ],
)
def test_escapes(component, path):
    assert array_paths.escape(component) == path


def test_cuts_what_is_too_long_for_a_file_name():
    one, other = array_paths.escape("x" * 300), array_paths.escape("x" * 299 + "y")
    assert one != other
    assert one.startswith("x" * 120 + "~h")
    assert len(one) == 120 + 2 + 32
    assert array_paths.escape("x" * 200) == "x" * 200


@given(components)
def test_every_file_name_is_harmless(component):
    for capitals in (False, True):
        name = array_paths.escape(component, capitals=capitals)
        assert set(name) <= ALLOWED
        assert 0 < len(name) <= 200
        assert name not in (".", "..", "zarr.json", "c")
        assert not name.startswith("__")
        assert not name.endswith(".")
        assert not (capitals and set(name) & set(string.ascii_uppercase))


@given(st.lists(components, unique=True, max_size=12), st.randoms())
@example(["D", "d", "~44", "~7e44"], None)
@example(["A" * 250, "a" * 250], None)
@example(["CON", "con", "Con"], None)
def test_siblings_never_share_a_path_even_where_case_is_ignored(siblings, random):
    group = [("model", one) for one in siblings]
    paths = array_paths.escape_all(group)
    assert len({path.lower() for path in paths.values()}) == len(siblings)
    if random is not None:
        random.shuffle(group)
    assert array_paths.escape_all(group) == paths


@given(st.lists(st.lists(tricky, min_size=1, max_size=3).map(tuple), unique=True, max_size=10))
def test_nested_names_never_share_a_path(group):
    paths = list(array_paths.escape_all(group).values())
    for one, other in combinations(paths, 2):
        assert one.lower() != other.lower()
        shared = 0
        for a, b in zip(one.split("/"), other.split("/"), strict=False):
            if a.lower() != b.lower():
                break
            assert a == b  # directories on the way differ by more than case, or not at all
            shared += 1
        assert shared <= min(one.count("/"), other.count("/")) + 1


def test_capitals_are_escaped_only_where_case_matters():
    paths = array_paths.escape_all([("model", "D"), ("model", "d"), ("model", "E"), ("optimizer", "D")])
    assert list(paths.values()) == ["model/~44", "model/d", "model/E", "optimizer/D"]


def test_groups_that_differ_in_case_only():
    paths = array_paths.escape_all([("optimizer", "W", "m"), ("optimizer", "w", "m")])
    assert list(paths.values()) == ["optimizer/~57/m", "optimizer/w/m"]


def test_an_unpaired_surrogate_has_no_path():
    with pytest.raises(UnsupportedState, match="surrogate"):
        array_paths.escape_all([("model", "\ud800")])


@pytest.mark.parametrize("name", [("a",) * 33, ("x" * 150,) * 20])
def test_what_is_nested_too_deep_is_refused(name):
    with pytest.raises(UnsupportedState, match="too deep or too long"):
        array_paths.escape_all([name])


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ([("a", "b"), ("a", "b")], "both called 'a/b'"),
        ([("a/b",), ("a", "b")], "both called 'a/b'"),
        ([("a",), ("a", "b")], "at the same time holds"),
        ([("a", "b", "c"), ("a", "b")], "at the same time holds"),
        ([()], "at least one component"),
    ],
)
def test_names_that_cannot_stand_together(group, match):
    with pytest.raises(UsageError, match=match):
        array_paths.check_names(group)


def test_names_that_can():
    array_paths.check_names([("a", "b"), ("a", "c"), ("b",), ("a", "B")])
