"""What dead writers left is removed; what living ones write, and what nobody knows, is not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from gockpt.storage.format import step_names
from gockpt.storage.local import owner
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

DEAD = replace(owner.myself(), boot="another boot")
FOREIGN = replace(owner.myself(), host="elsewhere")
ATTEMPT = "00ff" * 8


def names_in(path):
    return sorted(name for name in os.listdir(path) if name != step_names.LOCK_FILE)


def steps_in(path):
    return [(entry.step, entry.seq) for entry in find.list_checkpoints(path, superseded=True)]


def leave_partial(path, who, *, attempt=ATTEMPT, quiet=0.0):
    """Leave a partial as a writer would that has been silent for a while."""
    partial = path / step_names.of_partial(3, attempt)
    (partial / "model" / "w").mkdir(parents=True)
    (partial / "model" / "w" / "c.0").write_bytes(b"data")
    if who is not None:
        record = path / step_names.of_owner(attempt)
        record.write_bytes(who if isinstance(who, bytes) else owner.encode(who))
    for name in (record,) if who is not None else (partial,):
        now = os.stat(name).st_mtime
        os.utime(name, (now - quiet, now - quiet))
    return partial


@pytest.mark.parametrize(
    ("who", "quiet", "goes"),
    [
        (DEAD, 0, True),
        (owner.myself(), 0, True),  # this process, which has no other store here: an earlier try
        (replace(owner.myself(), pid=2**22 + 1), 0, True),  # no such process
        (replace(owner.myself(), started="1"), 0, True),  # the pid is somebody else's now
        (FOREIGN, 0, False),
        (FOREIGN, 590, False),
        (FOREIGN, 610, True),
        (replace(owner.myself(), pid_namespace="pid:[1]", pid=1), 0, False),
        (replace(owner.myself(), pid_namespace="pid:[1]", pid=1), 610, True),
        (None, 0, False),
        (None, 610, True),
        (b"", 0, False),
        (b"not json", 610, True),
        (b'{"host": 5}', 0, False),
    ],
)
def test_only_what_nobody_writes_any_more_is_swept(tmp_path, who, quiet, goes):
    partial = leave_partial(tmp_path, who, quiet=quiet)
    with Store(tmp_path):
        assert partial.exists() != goes
        assert bool(names_in(tmp_path)) != goes
        if not goes:
            assert (partial / "model" / "w" / "c.0").read_bytes() == b"data"


def test_a_living_process_keeps_its_partial(tmp_path):
    """Its lock is gone, as on a file system that has none between hosts; its record still speaks."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        who = replace(owner.myself(), pid=other.pid, started=owner.started(other.pid))
        partial = leave_partial(tmp_path, who, quiet=5000)
        with Store(tmp_path):
            assert partial.exists()
        other.kill()
        # Not yet reaped: a zombie has a start time, but writes no more.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with Store(tmp_path):
            assert not partial.exists()
    finally:
        other.stdin.close()
        other.wait()


def test_what_was_being_deleted_is_deleted(tmp_path):
    trash = tmp_path / step_names.of_trash(ATTEMPT)
    (trash / "model").mkdir(parents=True)
    (trash / "model" / "file").write_text("")
    with Store(tmp_path):
        assert names_in(tmp_path) == []


def test_records_of_the_dead_go_and_others_stay(tmp_path):
    (tmp_path / step_names.of_owner("aa" * 8)).write_bytes(owner.encode(DEAD))
    (tmp_path / step_names.of_owner("bb" * 8)).write_bytes(owner.encode(FOREIGN))
    with Store(tmp_path):
        assert names_in(tmp_path) == [step_names.of_owner("bb" * 8)]


def test_a_link_named_like_a_partial_goes_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    link = tmp_path / "path" / step_names.of_partial(3, ATTEMPT)
    (tmp_path / "path").mkdir()
    link.symlink_to(tmp_path / "precious")
    (tmp_path / "path" / step_names.of_owner(ATTEMPT)).write_bytes(owner.encode(DEAD))
    with Store(tmp_path / "path"):
        assert names_in(tmp_path / "path") == []
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_predecessor_left_under_its_successors_name_is_kept(tmp_path, sample, checker):
    """What a death between the exchange and the renaming leaves."""
    with Store(tmp_path) as store:
        one = sample.save(store, 3, marker=1)
        two = sample.save(store, 3, marker=2)
    old = tmp_path / step_names.of_old(3, one.attempt)
    os.rename(old, tmp_path / step_names.of_partial(3, two.attempt))
    (tmp_path / step_names.of_owner(two.attempt)).write_bytes(owner.encode(DEAD))
    with Store(tmp_path):
        assert names_in(tmp_path) == ["step-0000000003", old.name]
    assert [(one.marker, one.problems) for one in checker.examine(checker.read(tmp_path))] == [
        (1, ()),
        (2, ()),
    ]


def test_a_record_is_touched_now_and_then(tmp_path, sample, faults, monkeypatch):
    monkeypatch.setattr("gockpt.storage.local.transaction._HEARTBEAT_SECONDS", 0.0)
    fs = faults.Recorder()
    with Store(tmp_path, fs=fs) as store, sample.begin(store, 1) as transaction:
        before = fs.names.count("touch")
        sample.write(transaction, 1)
        assert fs.names.count("touch") > before


# -- owners ---------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was():
    assert owner.parse(owner.encode(owner.myself())) == owner.myself()
    assert owner.myself().pid == os.getpid()
    assert owner.myself().boot
    assert owner.myself().pid_namespace
    assert owner.myself().started == owner.started(os.getpid()) != ""


def test_where_the_system_says_nothing_only_silence_counts():
    nobody = owner.Owner("", "", "", 1, "")
    assert not owner.is_abandoned(nobody, observer=nobody, quiet_seconds=599)
    assert owner.is_abandoned(nobody, observer=nobody, quiet_seconds=600)
