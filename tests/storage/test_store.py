"""One directory, one writer, whoever asks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from gockpt.errors import PathBusy, StorageError, UsageError
from gockpt.storage.format import step_names
from gockpt.storage.local.store import Store
from gockpt.storage.read import find


def names_in(path):
    return sorted(name for name in os.listdir(path) if name != step_names.LOCK_FILE)


def steps_in(path):
    return [(entry.step, entry.seq) for entry in find.list_checkpoints(path, superseded=True)]


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


def test_two_may_make_the_same_parents(tmp_path, faults):
    class Slower(faults.Interposer):
        def around(self, name, call, arguments, dir_fd):
            result = call()
            if name == "mkdir" and arguments[0].endswith("parent"):
                raise FileExistsError(17, "File exists")
            return result

    with Store(tmp_path / "parent" / "path", fs=Slower()) as store:
        assert os.path.isdir(store.path)


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
        from gockpt.storage.local.store import Store
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
        with pytest.raises(StorageError, match="removed or moved away"):
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
    from gockpt.storage.local.store import Store
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


FORK = """if True:
    import os, sys
    from gockpt.errors import PathBusy, UsageError
    from gockpt.core.array_spec import ArraySpec
    from gockpt.core.arena_layout import lay_out
    from gockpt.storage.local import owner
    from gockpt.storage.local.store import Store

    (array,) = lay_out([ArraySpec(("w",), (5,), "float32")]).arrays
    path = sys.argv[1]
    store = Store(path)
    transaction = store.begin(1, [array], state={}, attributes={}, exact=True)
    parent = owner.myself()

    def refused(kind, action):
        try:
            action()
        except kind as error:
            print(error)
        else:
            sys.exit("was not refused")

    slot = array.slots[0]
    write = lambda: transaction.write_chunk(array, slot, memoryview(bytearray(slot.capacity)))
    child = os.fork()
    if child == 0:
        refused(UsageError, lambda: store.begin(2, [], state={}, attributes={}, exact=True))
        refused(UsageError, lambda: store.prune(1))
        refused(UsageError, write)
        transaction.abort()
        refused(PathBusy, lambda: Store(path))
        store.close()
        refused(PathBusy, lambda: Store(path))
        assert owner.myself() != parent and owner.myself().pid == os.getpid()
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    # The child's end took nothing away: another process is still refused, and the save goes on.
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", sys.argv[2], path]) == 0
    write()
    transaction.commit()
"""


def test_forked_children_neither_hold_nor_break_the_lock(tmp_path):
    told = subprocess.run(
        [sys.executable, "-c", FORK, tmp_path, TRY], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert ["forked process" in line for line in told] == [True, True, True, False, False, False]
    assert all("is being saved into by process" in line for line in told[3:])
    assert steps_in(tmp_path) == [(1, 1)]


def test_a_worker_that_outlives_its_killed_trainer_does_not_hold_the_lock(tmp_path):
    trainer = """if True:
        import os, signal, sys
        from gockpt.storage.local.store import Store
        store = Store(sys.argv[1])
        store.begin(1, [], state={}, attributes={}, exact=True)
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
        (tmp_path / step_names.LOCK_FILE).read_bytes()
        assert other_process_is_refused(tmp_path) == ""
        sample.save(store, 1, marker=1)
        assert other_process_is_refused(tmp_path)

        (tmp_path / step_names.LOCK_FILE).read_bytes()
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
    transaction = sample.begin(store, 1)
    sample.write(transaction, 1)
    store.close()
    store.close()
    assert names_in(tmp_path) == []
    for use in (lambda: sample.begin(store, 1), lambda: store.prune(1)):
        with pytest.raises(UsageError, match="was closed"):
            use()
