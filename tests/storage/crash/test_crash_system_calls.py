"""The kernel kills a writer on entry to each system call of a save, in turn.

Not through the package's own seam: strace sees what really reaches the kernel. Of each call a first run
tells how often it is made, so that none is forgotten; and every kill is checked to have happened.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gockpt.storage.format import step_names
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

CALLS = (
    *("mkdirat", "openat", "pwrite64", "fallocate", "ftruncate", "fsync", "syncfs"),
    *("renameat", "renameat2", "unlinkat", "close"),
)
NEWEST_BEFORE = {"first": None, "next": 1, "again": 1, "prune": 2}


def traced(root, plan, when):
    """Run the plan under strace; returns each child's exit code by name, and its calls in order."""
    (root / "plan").write_text("".join(" ".join(map(str, line)) + "\n" for line in plan))
    script = Path(__file__).with_name("doomed.py")
    told = subprocess.run(
        [sys.executable, script, root, str(when), root / "plan", root / "log"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    codes, calls = {}, {}
    pids = {}
    for name, pid, code in (line.split() for line in told.splitlines()):
        codes[name], pids[pid], calls[name] = int(code), name, []
    for line in (root / "log").read_text().splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match and match[1] in pids:
            calls[pids[match[1]]].append((match[2], match[3]))
    return codes, calls


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("scenario", NEWEST_BEFORE)
def test_sigkill_on_entry_to_every_system_call(scenario, checker, small_sample, faults, scratch):
    (scratch / "whole").mkdir()
    codes, calls = traced(scratch / "whole", [("all", scenario, "fsync", 0)], 10_000)
    assert codes == {"all": 0}
    made = calls["all"]
    counts = Counter(call for call, _ in made)
    never = {"first": {"syncfs"}, "prune": {"mkdirat", "fallocate", "syncfs", "renameat2"}}
    assert set(CALLS) - set(counts) == never.get(scenario, set())
    assert counts["fsync"] >= {"first": 10, "prune": 1}.get(scenario, 4)
    publishing = max(
        (n for n, (call, rest) in enumerate(made) if call == "renameat2" and rest.endswith(" = 0")),
        default=len(made),
    )
    seen, plan, places = Counter(), [], {}
    for place, (call, _) in enumerate(made):
        seen[call] += 1
        plan.append((f"{place:03d}", scenario, call, seen[call]))
        places[f"{place:03d}"] = place
    # From Python 3.12 on the process that forks them makes calls of its own each time: it must not be killed.
    when = max(counts.values()) + 1 + 2 * len(plan)
    (scratch / "killed").mkdir()
    codes, calls = traced(scratch / "killed", plan, when)
    assert set(codes.values()) == {-signal.SIGKILL}
    for name, _, call, number in plan:
        # Each died where it should: all before was as in the whole run.
        wasted = when - number
        own = [one for one, _ in calls[name][wasted:]]
        assert own == [one for one, _ in made[: places[name] + 1]], name
        assert own[-1] == call

    empty_records = 0
    for name, place in places.items():
        path = scratch / "killed" / name
        expected = 9 if place > publishing else NEWEST_BEFORE[scenario]
        with Store(path, fs=faults.NoWait()) as store:
            found = checker.examine(checker.read(path))
            assert not any(one.problems for one in found), name
            assert (found[-1].marker if found else None) == expected, (name, made[place])
            entries = {entry.name: step_names.parse(entry.name) for entry in path.iterdir()}
            odd = [
                one for one, known in entries.items() if known is None or known.kind not in ("step", "old")
            ]
            odd.remove(step_names.LOCK_FILE)
            # A record that says nothing yet could be anyone's: it stays until it is old.
            empty_records += len(odd)
            assert all(one.startswith(".owner-") and not (path / one).stat().st_size for one in odd)
            small_sample.save(store, 6, marker=66)
        with find.open_checkpoint(path) as newest:
            assert newest.state() == {"marker": 66}
            assert newest.verify().ok
    assert empty_records <= 1
