"""One writer per path, what it finds there, and what it removes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from gockpt.errors import PathBusy, StorageError, UsageError
from gockpt.storage import directory_names, listing, owner
from gockpt.storage.store import Store

DEAD = replace(owner.myself(), boot="another boot")
FOREIGN = replace(owner.myself(), host="elsewhere")
ATTEMPT = "00ff" * 8


def names_in(path):
    return sorted(name for name in os.listdir(path) if name != directory_names.LOCK_FILE)


def steps_in(path):
    return [(entry.step, entry.seq) for entry in listing.list_checkpoints(path, superseded=True)]


# -- making the path ------------------------------------------------------------------------------


def test_parents_are_made_and_made_durable(tmp_path, faults):
    fs = faults.Recorder()
    with Store(tmp_path / "a" / "b" / "c", fs=fs):
        assert (tmp_path / "a" / "b" / "c").is_dir()
    made = [argument for name, argument in fs.calls if name == "mkdir"]
    opened = [argument for name, argument in fs.calls if name == "open"]
    assert made == [str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path / "a" / "b" / "c")]
    assert opened[:3] == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]
    assert fs.names.count("fsync") == 3


def test_a_path_that_exists_is_used_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with Store(tmp_path):
        pass
    assert names_in(tmp_path) == ["notes.txt"]


def test_a_relative_path_stays_where_it_was(tmp_path, sample, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("here") as store:
        os.chdir("/")
        sample.save(store, 1, marker=1)
    assert steps_in(tmp_path / "here") == [(1, 1)]


def test_the_path_may_be_a_link(tmp_path, sample):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Store(tmp_path / "link") as store:
        sample.save(store, 1, marker=1)
        with pytest.raises(PathBusy):
            Store(tmp_path / "real")
    assert steps_in(tmp_path / "real") == [(1, 1)]


@pytest.mark.parametrize("below", ["", "/inside", "/deep/inside"])
def test_a_path_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"file.*Not a directory.*is a file") as caught:
        Store(f"{tmp_path}/file{below}")
    assert isinstance(caught.value.__cause__, NotADirectoryError)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_path_that_may_not_be_written(tmp_path):
    """As an unprivileged user; root may write anywhere."""
    script = """if True:
        import os, sys
        from gockpt.errors import StorageError
        from gockpt.storage.store import Store
        os.chdir("/")
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            Store(sys.argv[1])
        except StorageError as error:
            print(error)
    """
    path = tmp_path / "locked"
    path.mkdir(mode=0o555)
    for parent in [tmp_path, *tmp_path.parents][:3]:
        os.chmod(parent, os.stat(parent).st_mode | 0o055)
    printed = subprocess.run(
        [sys.executable, "-c", script, path], check=True, capture_output=True, text=True
    ).stdout
    assert str(path) in printed
    assert "Permission denied [EACCES]; save to a path that this user may write to" in printed


def test_a_path_removed_while_it_is_used(tmp_path, sample):
    with Store(tmp_path / "path") as store:
        shutil.rmtree(tmp_path / "path")
        with pytest.raises(StorageError, match="removed or renamed meanwhile"):
            sample.save(store, 1, marker=1)


# -- one writer -----------------------------------------------------------------------------------


def test_a_second_store_in_the_same_process(tmp_path, sample):
    with Store(tmp_path) as store:
        with pytest.raises(PathBusy, match="this process already saves into"):
            Store(tmp_path)
        sample.save(store, 1, marker=1)  # and it did no harm
        assert other_process_is_refused(tmp_path)
    with Store(tmp_path):
        pass


TRY = """if True:
    import sys
    from gockpt.errors import PathBusy
    from gockpt.storage.store import Store
    try:
        Store(sys.argv[1]).close()
    except PathBusy as error:
        print(error)
"""


def other_process_is_refused(path):
    """Return what another process is told, ``""`` if it may write."""
    return subprocess.run(
        [sys.executable, "-c", TRY, path], check=True, capture_output=True, text=True
    ).stdout


def test_a_second_process(tmp_path):
    with Store(tmp_path):
        told = other_process_is_refused(tmp_path)
    assert f"{tmp_path} is being saved into by process {os.getpid()} on " in told
    assert "use another path, or wait" in told
    assert other_process_is_refused(tmp_path) == ""


def test_a_store_that_failed_to_open_holds_nothing(tmp_path, faults):
    for number in range(100):
        fs = faults.FailingAt(number, 5)
        try:
            Store(tmp_path, fs=fs).close()
        except StorageError:
            assert fs.hit
        if not fs.hit:
            break
        with Store(tmp_path):
            pass
    assert 5 < number < 99


def in_child(action):
    """Run an action in a forked child; returns whether it did all it should."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def test_forked_children_neither_hold_nor_break_the_lock(tmp_path, sample):
    with Store(tmp_path) as store:
        transaction = store.begin(1)

        def use():
            with pytest.raises(UsageError, match="forked"):
                store.begin(2)
            with pytest.raises(UsageError, match="forked"):
                store.prune(1)
            with pytest.raises(UsageError, match="forked"):
                sample.write(transaction, 1)
            transaction.abort()
            with pytest.raises(PathBusy, match="process"):
                Store(tmp_path)
            store.close()
            with pytest.raises(PathBusy, match="process"):
                Store(tmp_path)

        assert in_child(use)
        assert other_process_is_refused(tmp_path)
        sample.write(transaction, 1)
        sample.commit(transaction, 1)
    assert steps_in(tmp_path) == [(1, 1)]


def test_a_worker_that_outlives_its_killed_trainer_does_not_hold_the_lock(tmp_path):
    trainer = """if True:
        import os, signal, sys
        from gockpt.storage.store import Store
        store = Store(sys.argv[1])
        store.begin(1)
        if os.fork() == 0:
            sys.stdin.read()  # a data-loader worker: lives until the test lets it go
            os._exit(0)
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", trainer, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        assert process.wait() == -signal.SIGKILL
        with Store(tmp_path):
            assert names_in(tmp_path) == []
    finally:
        process.stdin.close()
        process.stdout.close()


def test_a_lock_lost_to_somebody_elses_close_is_taken_again_or_the_save_given_up(tmp_path, sample):
    with Store(tmp_path) as store:
        # What a backup tool inside the process would do.
        (tmp_path / directory_names.LOCK_FILE).read_bytes()
        assert other_process_is_refused(tmp_path) == ""
        sample.save(store, 1, marker=1)
        assert other_process_is_refused(tmp_path)

        (tmp_path / directory_names.LOCK_FILE).read_bytes()
        thief = subprocess.Popen(
            [
                sys.executable,
                "-c",
                TRY.replace(".close()", "; print(1, flush=True); sys.stdin.read()"),
                tmp_path,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert thief.stdout.readline() == b"1\n"
            with pytest.raises(StorageError, match="another process took over"):
                sample.save(store, 2, marker=2)
        finally:
            thief.stdin.close()
            thief.wait()
            thief.stdout.close()
    assert steps_in(tmp_path) == [(1, 1)]


def test_a_closed_store(tmp_path, sample):
    store = Store(tmp_path)
    transaction = store.begin(1)
    sample.write(transaction, 1)
    store.close()
    store.close()
    assert names_in(tmp_path) == []
    for use in (lambda: store.begin(1), lambda: store.prune(1)):
        with pytest.raises(UsageError, match="was closed"):
            use()


# -- steps, sequence, lineage ---------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, 2**63, 1.0, True, "1", None])
def test_steps_that_are_none(tmp_path, step):
    with Store(tmp_path) as store, pytest.raises(UsageError, match="step must be an integer"):
        store.begin(step)


@pytest.mark.parametrize("step", [0, 1, 9_999_999_999, 10_000_000_000, 2**63 - 1])
def test_every_other_step(tmp_path, sample, step):
    with Store(tmp_path) as store:
        sample.save(store, step, marker=1)
    assert steps_in(tmp_path) == [(step, 1)]
    with Store(tmp_path) as store:
        assert sample.save(store, 5, marker=2).seq == 2


def test_each_publication_gets_the_next_number_whatever_its_step(tmp_path, sample, checker):
    with Store(tmp_path) as store:
        first, second = sample.save(store, 1000, marker=1), sample.save(store, 1500, marker=2)
    with Store(tmp_path, parent=first.seq) as store:
        third = sample.save(store, 1100, marker=3)
        fourth = sample.save(store, 1200, marker=4)
    assert [one.seq for one in (first, second, third, fourth)] == [1, 2, 3, 4]

    def says(one):
        with open(os.path.join(one.path, "gockpt.json")) as file:
            return json.loads(file.readline())

    assert [says(one)["parent"] for one in (first, second, third, fourth)] == [None, 1, 1, 3]
    assert says(first)["run"] == says(second)["run"] != says(third)["run"] == says(fourth)["run"]
    with listing.open_checkpoint(tmp_path) as newest:
        assert newest.step == 1200


def test_damaged_checkpoints_do_not_stop_the_next_one(tmp_path, sample):
    with Store(tmp_path) as store:
        one = sample.save(store, 1, marker=1)
        sample.save(store, 2, marker=2)
    with open(os.path.join(one.path, "gockpt.json"), "r+b") as file:
        file.write(b"x")
    with Store(tmp_path) as store:
        assert sample.save(store, 3, marker=3).seq == 3
        assert store.prune(1) == [2]
    # What is damaged is neither counted nor touched.
    assert names_in(tmp_path) == ["step-0000000001", "step-0000000003"]


# -- the same step again --------------------------------------------------------------------------


def refuse(*names, dir_fd):
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("flags", ["all", "no exchange", "none"])
@pytest.mark.parametrize("reopened", [False, True])
def test_the_same_step_again(tmp_path, sample, checker, faults, flags, reopened):
    fs = faults.Unsynced()
    if flags != "all":
        fs.exchange = refuse
    if flags == "none":
        fs.rename_new = refuse
    store = Store(tmp_path, fs=fs)
    one = sample.save(store, 7, marker=1)
    if reopened:
        store.close()
        store = Store(tmp_path, fs=fs)
    two = sample.save(store, 7, marker=2)
    assert one.path == two.path
    assert names_in(tmp_path) == ["step-0000000007", f"step-0000000007.old-{one.attempt}"]
    three = sample.save(store, 7, marker=3)
    seen = checker.examine(checker.read(tmp_path))
    assert [(one.name[15:20], one.seq, one.marker, one.problems) for one in seen] == [
        (".old-", 1, 1, ()),
        (".old-", 2, 2, ()),
        ("", 3, 3, ()),
    ]
    with listing.open_checkpoint(tmp_path, 7) as checkpoint:
        assert checkpoint.manifest.attempt == three.attempt
    assert store.prune(1) == [7, 7]
    assert names_in(tmp_path) == ["step-0000000007"]
    store.close()


@pytest.mark.parametrize("what", ["file", "empty", "foreign", "damaged", "dangling link", "link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, sample, checker, what, when):
    path = tmp_path / "path"
    target = path / "step-0000000001"

    def put():
        if what == "file":
            target.write_text("mine")
        elif what == "dangling link":
            target.symlink_to("nowhere")
        elif what == "link":
            (tmp_path / "elsewhere").mkdir()
            target.symlink_to(tmp_path / "elsewhere")
        else:
            target.mkdir()
            if what == "foreign":
                (target / "model.pt").write_text("mine")
            if what == "damaged":
                (target / "gockpt.json").write_text("{}")

    with Store(path) as store:
        if when == "before":
            put()
            before = checker.read(path)
            with pytest.raises(
                StorageError, match=r"step-0000000001 exists and is no complete .* move it away"
            ):
                store.begin(1)
        else:
            transaction = store.begin(1)
            sample.write(transaction, 1)
            put()
            with pytest.raises(StorageError, match=r"step-0000000001 exists and is no complete"):
                sample.commit(transaction, 1)
            before = checker.read(path)
            transaction.abort()
            before = {
                name: data for name, data in before.items() if ".partial" not in name and ".owner" not in name
            }
    assert checker.read(path) == before
    assert "step-0000000001" in before


def test_a_partial_that_was_swapped_for_another_is_not_published(tmp_path, sample):
    with Store(tmp_path) as store:
        transaction = store.begin(1)
        sample.write(transaction, 1)
        (name,) = [name for name in names_in(tmp_path) if "partial" in name]
        os.rename(tmp_path / name, tmp_path / "away")
        (tmp_path / name).mkdir()
        with pytest.raises(StorageError, match="was taken away"):
            sample.commit(transaction, 1)
        transaction.abort()
        assert (tmp_path / name).is_dir()  # it isn't ours
        assert steps_in(tmp_path) == []


# -- pruning --------------------------------------------------------------------------------------


def test_the_newest_publications_stay(tmp_path, sample):
    with Store(tmp_path) as store:
        for step in (10, 30, 20, 5):
            sample.save(store, step, marker=step)
        assert store.prune(4) == []
        assert store.prune(2) == [10, 30]
        assert steps_in(tmp_path) == [(20, 3), (5, 4)]
        assert store.prune(1) == [20]
        assert store.prune(1) == []
        assert names_in(tmp_path) == ["step-0000000005"]


@pytest.mark.parametrize("keep", [0, -1, 1.5, None, True and "1"])
def test_the_newest_is_never_pruned(tmp_path, sample, keep):
    with Store(tmp_path) as store:
        sample.save(store, 1, marker=1)
        with pytest.raises(UsageError, match="keep must be at least 1"):
            store.prune(keep)
        assert steps_in(tmp_path) == [(1, 1)]


STRANGE = [
    "notes",
    "step-12",
    "step-0000000012.bak",
    "step-0000000012.partial",
    "step-00000000012",
    "step-0000000012.partial-XYZ",
    "step_12",
    ".trash",
    ".owner-x",
    "checkpoint-0000000012",
]


def test_what_is_not_ours_is_never_touched(tmp_path, sample, checker):
    for name in STRANGE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with Store(tmp_path) as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
        shutil.copytree(tmp_path / "step-0000000002", tmp_path / "step-0000000009")
        shutil.copytree(tmp_path / "step-0000000001", tmp_path / "mine")
        store.prune(1)
    with Store(tmp_path) as store:
        sample.save(store, 3, marker=3)
        store.prune(1)
    # The copy under another step's name isn't what it says it is, so it stays too.
    kept = ["mine", "step-0000000003", "step-0000000009"]
    assert names_in(tmp_path) == sorted(STRANGE + kept)
    for name in STRANGE:
        assert (tmp_path / name / "file").read_text() == name


def test_pruning_removes_what_it_found_and_not_what_came_instead(tmp_path, sample):
    with Store(tmp_path) as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
        shutil.rmtree(tmp_path / "step-0000000001")
        (tmp_path / "step-0000000001").mkdir()
        (tmp_path / "step-0000000001" / "mine").write_text("mine")
        assert store.prune(1) == []
        assert (tmp_path / "step-0000000001" / "mine").read_text() == "mine"


def test_links_inside_what_is_pruned_are_not_followed(tmp_path, sample):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with Store(tmp_path / "path") as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
        os.symlink(tmp_path / "precious", tmp_path / "path" / "step-0000000001" / "model" / "link")
        assert store.prune(1) == [1]
    assert names_in(tmp_path / "path") == ["step-0000000002"]
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_reader_survives_pruning(tmp_path, sample):
    with Store(tmp_path) as store:
        sample.save(store, 1, marker=1)
        with open(tmp_path / "step-0000000001" / "model" / "big" / "c.0", "rb") as file:
            sample.save(store, 2, marker=2)
            store.prune(1)
            assert file.read(280000) == sample.content(sample.layouts[0], 1).tobytes()


# -- sweeping -------------------------------------------------------------------------------------


def leave_partial(path, who, *, attempt=ATTEMPT, quiet=0.0):
    """Leave a partial as a writer would that has been silent for a while."""
    partial = path / directory_names.of_partial(3, attempt)
    (partial / "model" / "w").mkdir(parents=True)
    (partial / "model" / "w" / "c.0").write_bytes(b"data")
    if who is not None:
        record = path / directory_names.of_owner(attempt)
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
    trash = tmp_path / directory_names.of_trash(ATTEMPT)
    (trash / "model").mkdir(parents=True)
    (trash / "model" / "file").write_text("")
    with Store(tmp_path):
        assert names_in(tmp_path) == []


def test_records_of_the_dead_go_and_others_stay(tmp_path):
    (tmp_path / directory_names.of_owner("aa" * 8)).write_bytes(owner.encode(DEAD))
    (tmp_path / directory_names.of_owner("bb" * 8)).write_bytes(owner.encode(FOREIGN))
    with Store(tmp_path):
        assert names_in(tmp_path) == [directory_names.of_owner("bb" * 8)]


def test_a_link_named_like_a_partial_goes_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    link = tmp_path / "path" / directory_names.of_partial(3, ATTEMPT)
    (tmp_path / "path").mkdir()
    link.symlink_to(tmp_path / "precious")
    (tmp_path / "path" / directory_names.of_owner(ATTEMPT)).write_bytes(owner.encode(DEAD))
    with Store(tmp_path / "path"):
        assert names_in(tmp_path / "path") == []
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_predecessor_left_under_its_successors_name_is_kept(tmp_path, sample, checker):
    """What a death between the exchange and the renaming leaves."""
    with Store(tmp_path) as store:
        one = sample.save(store, 3, marker=1)
        two = sample.save(store, 3, marker=2)
    old = tmp_path / directory_names.of_old(3, one.attempt)
    os.rename(old, tmp_path / directory_names.of_partial(3, two.attempt))
    (tmp_path / directory_names.of_owner(two.attempt)).write_bytes(owner.encode(DEAD))
    with Store(tmp_path):
        assert names_in(tmp_path) == ["step-0000000003", old.name]
    assert [(one.marker, one.problems) for one in checker.examine(checker.read(tmp_path))] == [
        (1, ()),
        (2, ()),
    ]


def test_a_record_is_touched_now_and_then(tmp_path, sample, faults, monkeypatch):
    monkeypatch.setattr("gockpt.storage.transaction._HEARTBEAT_SECONDS", 0.0)
    fs = faults.Recorder()
    with Store(tmp_path, fs=fs) as store, store.begin(1) as transaction:
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


def test_a_forked_child_is_somebody_else():
    parent = owner.myself()
    assert in_child(
        lambda: os._exit(0 if owner.myself() != parent and owner.myself().pid == os.getpid() else 1)
    )


def test_where_the_system_says_nothing_only_silence_counts():
    nobody = owner.Owner("", "", "", 1, "")
    assert not owner.is_abandoned(nobody, observer=nobody, quiet_seconds=599)
    assert owner.is_abandoned(nobody, observer=nobody, quiet_seconds=600)
