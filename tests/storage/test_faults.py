"""The disk refuses one call, any one: the save is over, everything before it is as it was."""

from __future__ import annotations

import errno
import fnmatch
import os
import subprocess
import sys

import pytest

from gockpt.errors import StorageError
from gockpt.storage.local.durability import Unsynced
from gockpt.storage.local.failures import as_storage_error
from gockpt.storage.local.filesystem import CALLS, Filesystem
from gockpt.storage.local.store import Store
from gockpt.storage.read import find


def tree_of(checker, path):
    """Return everything but the lock file."""
    return {name: data for name, data in checker.read(path).items() if name != ".gockpt.lock"}


@pytest.mark.parametrize("code", [errno.ENOSPC])
@pytest.mark.parametrize("scenario", ["first", "next", "again"])
def test_any_one_call_fails(scenario, code, small_sample, checker, faults, scratch):
    step = 1 if scenario == "again" else 2
    published = failed_late = 0
    for number in range(1000):
        path = scratch / f"path-{number}"
        if scenario != "first":
            with Store(path, fs=faults.NoWait()) as store:
                small_sample.save(store, 1, marker=1)
        else:
            os.mkdir(path)
        before = tree_of(checker, path)
        fs = faults.FailingAt(10**9, code)
        with Store(path, fs=fs) as store:
            fs.at = fs.count + number
            try:
                small_sample.save(store, step, marker=9)
                outcome = None
            except StorageError as error:
                outcome = error
            hit, fs.at = fs.hit, 10**9
            seen = checker.examine(checker.read(path))
            assert not any(one.problems for one in seen), (number, hit)
            if outcome is None:
                # No call failed, or one after it was durable: tidying up.
                assert seen[-1].marker == 9
                published += 1
            elif seen and seen[-1].marker == 9:
                # Published, but not known to be durable: only that last sync.
                assert hit == "fsync"
                failed_late += 1
            else:
                assert tree_of(checker, path) == before, (number, hit)
            if outcome is not None:
                assert str(path) in str(outcome)
                assert os.strerror(code) in str(outcome)
                assert outcome.__cause__.errno == code
            # The store goes on: the next save works.
            small_sample.save(store, 5, marker=5)
        with Store(path, fs=faults.NoWait()) as store, find.open_checkpoint(path) as newest:
            assert newest.state() == {"marker": 5}
            assert [name for name in os.listdir(path) if ".partial" in name or ".trash" in name] == []
        if hit is None:
            break
    assert 50 < number < 999
    assert 1 <= published <= 15
    assert failed_late == 1


def each_file(faults):
    """Return faults of a file system whose ``syncfs`` can't be believed."""

    class EachFile(faults.FailingAt):
        def syncfs_reports_errors(self, fd):
            return False

    return EachFile


def test_a_sync_is_never_tried_again(small_sample, faults, scratch):
    """The second one would say "done" while the disk holds something else."""
    for number in range(4, 12):
        fs = each_file(faults)(10**9, errno.EIO, only="fsync")
        with Store(scratch / str(number), fs=fs) as store:
            transaction = small_sample.begin(store, 1)
            small_sample.write(transaction, 1)
            fs.count, fs.at = 0, number
            for _ in range(3):
                with pytest.raises(StorageError):
                    transaction.commit()
                assert fs.count == number + 1
            transaction.abort()


@pytest.mark.parametrize("at", [0, 3])
def test_a_failing_file_is_named(small_sample, faults, scratch, at):
    fs = each_file(faults)(10**9, errno.EIO, only="fsync")
    with Store(scratch, fs=fs) as store, small_sample.begin(store, 1) as transaction:
        small_sample.write(transaction, 1)
        fs.count, fs.at = 0, at
        with pytest.raises(
            StorageError, match=r"can't write .*/step-0000000001\.partial-[0-9a-f]+/\S+: .*EIO"
        ):
            transaction.commit()


@pytest.mark.parametrize("told", [True, False])
def test_a_file_is_named_when_syncfs_fails(told, small_sample, faults, scratch):
    """Which it was only the files know; if none does, it was a stranger's or one that is closed."""

    class Lossy(faults.Recorder):
        def syncfs_reports_errors(self, fd):
            return True

        def syncfs(self, fd):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def fsync(self, fd):
            if told and os.readlink(f"/proc/self/fd/{fd}").endswith("/zarr.json"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().fsync(fd)

    with Store(scratch, fs=Lossy()) as store:
        transaction = small_sample.begin(store, 1)
        small_sample.write(transaction, 1)
        name = r"/\S+/zarr\.json" if told else ""
        with pytest.raises(StorageError, match=rf"can't write \S+\.partial-[0-9a-f]+{name}: .*EIO"):
            transaction.commit()
        transaction.abort()
    assert os.listdir(scratch) == [".gockpt.lock"]


def test_a_full_disk_in_the_middle_of_a_chunk(sample, faults, scratch):
    """Short writes first, then the error: as a disk fills up."""

    class Filling(faults.Interposer):
        left = 150_000

        def pwrite(self, fd, data, offset):
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            size = min(self.left, len(data))
            self.left -= size
            return os.pwrite(fd, data[:size], offset)

    with Store(scratch, fs=Filling()) as store:
        with pytest.raises(StorageError, match=r"big/c\.0: No space left on device \[ENOSPC\]; free space"):
            sample.save(store, 1, marker=1)
        assert os.listdir(scratch) == [".gockpt.lock"]
        store._place.fs.left = 10**9
        sample.save(store, 1, marker=1)
    with find.open_checkpoint(scratch) as checkpoint:
        assert checkpoint.verify().ok


LIMITED = """if True:
    import mmap, resource, signal, sys
    from gockpt.errors import StorageError
    from gockpt.core.arena_layout import lay_out
    from gockpt.core.array_spec import ArraySpec
    from gockpt.storage.local.store import Store

    (array,) = lay_out([ArraySpec(("w",), (100_000,), "float32")]).arrays
    slot = memoryview(mmap.mmap(-1, array.slots[0].capacity))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    with (
        Store(sys.argv[1]) as store,
        store.begin(1, [array], state={}, attributes={}, exact=True) as transaction,
    ):
        try:
            transaction.write_chunk(array, array.slots[0], slot)
        except StorageError as error:
            print(error)
"""


def test_a_limit_that_the_kernel_itself_imposes(sample, scratch):
    """A file-size limit stands for a full disk: a short write first, then the error."""
    told = subprocess.run(
        [sys.executable, "-c", LIMITED, scratch], check=True, capture_output=True, text=True
    ).stdout
    assert "w/c.0: File too large [EFBIG]" in told
    assert os.listdir(scratch) == [".gockpt.lock"]
    with Store(scratch) as store:
        sample.save(store, 1, marker=1)


@pytest.mark.parametrize("size", [1, 3, 4096, 5000])
def test_short_writes_change_nothing(size, small_sample, checker, faults, scratch):
    class Short(faults.Interposer):
        def pwrite(self, fd, data, offset):
            return os.pwrite(fd, memoryview(data)[:size], offset)

    with Store(scratch, fs=Short()) as store:
        published = small_sample.save(store, 1, marker=1)
    assert checker.problems(checker.read(published.path)) == []


def test_short_direct_writes_are_finished_through_the_cache(sample, checker, faults, scratch):
    class Short(faults.Interposer):
        def pwrite(self, fd, data, offset):
            if offset % 512:
                raise OSError(errno.EINVAL, "as O_DIRECT does for an odd offset")
            return os.pwrite(fd, memoryview(data)[:100_001], offset)

    with Store(scratch, fs=Short()) as store, pytest.raises(StorageError):
        sample.save(store, 1, marker=1)

    class ShortOnce(Short):
        def pwrite(self, fd, data, offset):
            direct = os.O_DIRECT & fcntl_flags(fd)
            return super().pwrite(fd, data, offset) if direct else os.pwrite(fd, data, offset)

    with Store(scratch, fs=ShortOnce()) as store:
        published = sample.save(store, 1, marker=1)
    assert checker.problems(checker.read(published.path)) == []


def fcntl_flags(fd):
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


def test_an_error_while_aborting_is_left_to_the_next_sweep(small_sample, faults, scratch):
    class Stubborn(faults.Interposer):
        armed = False

        def around(self, name, call, arguments, dir_fd):
            if self.armed and name in ("unlink", "rmdir", "rename"):
                raise OSError(errno.EIO, "no")
            return call()

    fs = Stubborn()
    with Store(scratch, fs=fs) as store:
        transaction = small_sample.begin(store, 1)
        small_sample.write(transaction, 1)
        fs.armed = True
        transaction.abort()
        assert any(".partial-" in name for name in os.listdir(scratch))
        assert any(".owner-" in name for name in os.listdir(scratch))
    with Store(scratch):
        assert os.listdir(scratch) == [".gockpt.lock"]


@pytest.mark.parametrize("call", ["rename", "fsync", "unlink", "rmdir", "listdir"])
def test_pruning_that_fails_keeps_what_must_be_kept(call, small_sample, checker, faults, scratch):
    fs = faults.FailingAt(10**9, errno.EIO, only=call)
    with Store(scratch, fs=fs) as store:
        for step in (1, 2, 3):
            small_sample.save(store, step, marker=step)
        # The first unlink tells files from directories; it is the one of the trash that isn't there. The
        # first listing is for what an earlier pruning left, which is no reason to fail.
        fs.count, fs.at = 0, 1 if call in ("unlink", "listdir") else 0
        with pytest.raises(StorageError, match="can't delete"):
            store.prune(1)
        assert checker.examine(checker.read(scratch))[-1].marker == 3
        assert not any(one.problems for one in checker.examine(checker.read(scratch)))
    with Store(scratch) as store:
        store.prune(1)
        assert sorted(os.listdir(scratch)) == [".gockpt.lock", "step-0000000003"]


# -- files that wait for their sync ---------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_only_so_many_files_stay_open(whole, tmp_path, faults):
    class Few(faults.Recorder):
        def syncfs_reports_errors(self, fd):
            return whole

    fs = Few()
    directory = os.open(tmp_path, os.O_RDONLY)
    waiting = Unsynced(fs, directory, str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(400):
        fd = fs.open(str(number), os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        waiting.add(str(number), fd)
    assert len(os.listdir("/proc/self/fd")) - before <= 256
    # Where no syncfs would tell of a lost write, a file that can't stay open is synced at once.
    assert fs.names.count("fsync") == (0 if whole else 400 - 256)
    waiting.sync()
    assert fs.names.count("fsync") == (0 if whole else 400)
    assert fs.names.count("syncfs") == whole
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(directory)


def test_syncfs_goes_first_and_through_the_early_descriptor(small_sample, faults, scratch):
    class Whole(faults.Recorder):
        def syncfs_reports_errors(self, fd):
            return True

    fs = Whole()
    with Store(scratch, fs=fs) as store, small_sample.begin(store, 1) as transaction:
        small_sample.write(transaction, 1)
        start = len(fs.calls)
        transaction.commit()
        calls = fs.calls[start:]
        syncs = [call for call in calls if call[0] in ("syncfs", "fsync")]
        assert syncs[0] == ("syncfs", transaction._fd)


# -- the seam -------------------------------------------------------------------------------------


def test_every_method_of_the_seam_can_be_made_to_fail():
    methods = {name for name, value in vars(Filesystem).items() if callable(value) and name[0] != "_"}
    assert methods == set(CALLS)


@pytest.mark.parametrize(
    "module",
    [
        *("catalog", "chunk_writer", "durability", "files", "partial_directory", "publish", "store"),
        *("transaction", "writer_lock"),
    ],
)
def test_nothing_goes_past_the_seam(module):
    """Only constants, and functions that don't touch the disk, are taken from ``os``."""
    import ast
    import importlib.util

    spec = importlib.util.find_spec(f"gockpt.storage.local.{module}")
    with open(spec.origin) as file:
        tree = ast.parse(file.read())
    harmless = {"path", "fspath", "getpid", "PathLike", "stat_result", "strerror"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert {name for name in used if not name.startswith("O_")} <= harmless
    paths = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os.path"
    }
    assert paths <= {"join", "abspath", "dirname"}
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
    ]


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT, errno.ENOTSUP, None]
)
def test_a_message_says_where_what_and_what_now(code):
    error = OSError(code, os.strerror(code)) if code else OSError("no number")
    message = str(as_storage_error(error, "write", "/a/b"))
    assert message.startswith("can't write /a/b: ")
    assert "; " in message
    if code:
        assert f"{os.strerror(code)} [{errno.errorcode[code]}]" in message


@pytest.mark.parametrize(
    ("bytes_free", "inodes_free", "inodes", "says"),
    [
        (0, 500, 1000, "; free space there, * (0 bytes are free there; a quota *"),
        (51200, 500, 1000, "; free space there, * (51,200 bytes are free there; a quota *"),
        (
            51200,
            0,
            1000,
            "; no inodes are left there: * 1,000 files * 51,200 bytes are free. Delete files, *",
        ),
        (0, 0, 1000, "; free space there, * (0 bytes are free there; *"),
        (51200, 0, 0, "; free space there, * (51,200 bytes are free there; *"),  # btrfs counts no inodes
    ],
)
def test_no_inodes_is_not_no_space(monkeypatch, bytes_free, inodes_free, inodes, says):
    asked = []

    def statvfs(path):
        asked.append(path)
        if path != "/":
            raise FileNotFoundError(path)
        free = bytes_free // 512
        return os.statvfs_result((4096, 512, 10**6, free, free, inodes, inodes_free, inodes_free, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = str(as_storage_error(error, "write", "/a/b"))
    assert fnmatch.fnmatch(message, f"*[[]ENOSPC]{says}"), message
    assert asked == ["/a/b", "/a", "/"]


def test_a_disk_that_does_not_say_what_is_free(monkeypatch):
    def statvfs(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "statvfs", statvfs)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = str(as_storage_error(error, "write", "/a/b"))
    assert message.endswith("; free space there, keep fewer checkpoints, or save to another disk")


def test_a_quota_is_not_no_space():
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    message = str(as_storage_error(error, "write", "/a/b"))
    assert "quota of this user, group or directory" in message
    assert "free space" not in message


def test_the_real_calls(tmp_path):
    """Each does what it says, on the file system that the tests run on."""
    fs = Filesystem()
    directory = fs.open(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    fd = fs.open("file", os.O_RDWR | os.O_CREAT, dir_fd=directory)
    assert not os.get_inheritable(fd)
    fs.fallocate(fd, 5000)
    assert fs.fstat(fd).st_size == 5000
    assert fs.pwrite(fd, b"abc", 1) == 3
    fs.ftruncate(fd, 5)
    assert fs.pread(fd, 10, 0) == b"\0abc\0"
    fs.fsync(fd)
    fs.syncfs(directory)
    assert isinstance(fs.syncfs_reports_errors(directory), bool)
    os.utime(fd, (1, 1))
    fs.touch(fd)
    assert fs.fstat(fd).st_mtime > 1e9
    fs.mkdir("a", dir_fd=directory)
    fs.mkdir("b", dir_fd=directory)
    with pytest.raises(FileExistsError):
        fs.rename_new("a", "b", dir_fd=directory)
    a, b = (fs.stat(name, dir_fd=directory).st_ino for name in "ab")
    fs.exchange("a", "b", dir_fd=directory)
    assert [fs.stat(name, dir_fd=directory).st_ino for name in "ab"] == [b, a]
    fs.rename_new("a", "c", dir_fd=directory)
    fs.rename("c", "d", dir_fd=directory)
    assert sorted(fs.listdir(directory)) == ["b", "d", "file"]
    fs.rmdir("d", dir_fd=directory)
    fs.unlink("file", dir_fd=directory)
    assert fs.listdir(directory) == ["b"]
    with pytest.raises(FileNotFoundError):
        fs.exchange("b", "x", dir_fd=directory)
    fs.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        fs.syncfs(fd)
    fs.close(directory)


def test_a_lock_on_a_file_system_without_locks(tmp_path, faults):
    with pytest.raises(StorageError, match=r"can't lock .*\[ENOLCK\]; the file system has no locks"):
        Store(tmp_path, fs=faults.FailingAt(0, errno.ENOLCK, only="lock"))
