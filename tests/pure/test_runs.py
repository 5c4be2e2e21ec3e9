"""Who may go on in a place with checkpoints, and as which run."""

from __future__ import annotations

import pytest

from gockpt.core.runs import MOST_ANCESTORS, Claim, Run, adopted, ancestors_of, beginning, claim

A = Run("aa")
B = Run("bb", (("aa", 3),))


def asked(newest, *, run=None, loaded=None, here=False, process=(), anyway=False):
    known = {one.id: one for one in process}
    return claim(newest, new_id="nn", run=run, loaded=loaded, here=here, process=known, anyway=anyway)


@pytest.mark.parametrize(
    ("newest", "how", "expected"),
    [
        # Nothing speaks for it.
        (("aa", 1), {}, None),
        (("aa", 1), {"loaded": (Run("cc"), 9)}, None),
        (("aa", 1), {"run": Run("cc")}, None),
        (("aa", 1), {"process": [B]}, None),
        # The same run, however far it has come meanwhile.
        (("aa", 1), {"loaded": (A, 1)}, Claim(A)),
        (("aa", 9), {"loaded": (A, 1)}, Claim(A)),
        (("aa", 9), {"run": A}, Claim(A)),
        # An ancestor, as far as the state descends from it.
        (("aa", 3), {"loaded": (B, 7)}, Claim(B)),
        (("aa", 3), {"run": B}, Claim(B)),
        (("aa", 4), {"loaded": (B, 7)}, None),
        # Not what descends from it: another one went on from the same checkpoint.
        (("bb", 1), {"loaded": (A, 3)}, None),
        (("bb", 1), {"run": A}, None),
        # A load from this very place, whatever is newest there.
        (("cc", 9), {"loaded": (A, 1), "here": True}, Claim(A)),
        (("cc", 9), {"loaded": (A, 1), "run": B, "here": True}, Claim(B)),
        # The process that saved there.
        (("bb", 9), {"process": [A, B]}, Claim(B)),
        (("bb", 9), {"loaded": (A, 3), "process": [B]}, Claim(B)),
        # Told to: as a run of its own.
        (("aa", 1), {"anyway": True}, Claim(Run("nn"), foreign=True)),
        (("cc", 1), {"loaded": (A, 3), "anyway": True}, Claim(Run("nn", (("aa", 3),)), foreign=True)),
        (("cc", 1), {"run": B, "anyway": True}, Claim(B, foreign=True)),
        (("aa", 1), {"loaded": (A, 1), "anyway": True}, Claim(A)),
    ],
)
def test_who_may_go_on(newest, how, expected):
    assert asked(newest, **how) == expected


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, Run("nn")),
        ({"run": B}, B),
        ({"loaded": (A, 3), "home": True}, A),
        ({"loaded": (A, 3)}, Run("nn", (("aa", 3),))),
        ({"loaded": (B, 7)}, Run("nn", (("bb", 7), ("aa", 3)))),
        ({"loaded": (A, 3), "run": B}, B),
    ],
)
def test_as_which_run_an_empty_place_is_begun(how, expected):
    assert beginning(**{"new_id": "nn", "run": None, "loaded": None, "home": False, **how}) == expected


def test_ancestors_do_not_grow_without_end():
    run = Run("r0")
    for number in range(1, 200):
        run = run.forked(f"r{number}", number)
    assert len(run.ancestors) == MOST_ANCESTORS
    assert run.owns("r198", 199)
    assert not run.owns("r1", 1)


def test_what_an_older_gockpt_wrote_is_adopted():
    assert adopted(A, []) == A
    run = adopted(B, [("cc", 1), ("dd", 9), ("cc", 4), ("aa", 2), ("bb", 8)])
    assert run == Run("bb", (("aa", 3), ("dd", 9), ("cc", 4)))
    assert adopted(B, [("aa", 5)]).owns("aa", 5)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"gockpt": {"ancestors": []}}, ()),
        ({"gockpt": {"ancestors": [["aa", 3], ["bb", 1]]}}, (("aa", 3), ("bb", 1))),
        (
            {"gockpt": {"ancestors": [["aa"], ["bb", True], [3, 3], "x", ["cc", 1, 1], ["dd", 2]]}},
            (("dd", 2),),
        ),
        *(
            (odd, None)
            for odd in (None, [], {}, {"gockpt": []}, {"gockpt": {}}, {"gockpt": {"ancestors": "aa"}})
        ),
    ],
    ids=repr,
)
def test_attributes_are_anybodys(attributes, expected):
    assert ancestors_of(attributes) == expected
