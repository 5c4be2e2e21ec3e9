"""Every task is done once, or an error is raised: the first, after which no other task is begun."""

from __future__ import annotations

import _thread
import queue
import signal
import sys
import threading
import time

import pytest

from gockpt.storage.read.in_threads import in_threads


def run(work, tasks, threads, **more):
    in_threads(work, tasks, threads=threads, name="test-in-threads", memory=object, **more)


def left():
    return [thread for thread in threading.enumerate() if thread.name.startswith("test-in-threads")]


@pytest.mark.parametrize("threads", [0, 1, 3, 200])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_every_task_is_done_once(threads, count):
    done = []
    run(lambda task, _: done.append(task), iter(range(count)), threads)
    assert sorted(done) == list(range(count))
    assert not left()


def test_each_thread_has_memory_of_its_own_and_one_is_the_callers():
    made, used, callers = [], set(), set()
    both = threading.Barrier(2)

    def memory():
        made.append(object())
        both.wait(60)
        return threading.get_native_id()

    in_threads(
        lambda _, own: used.add(own == threading.get_native_id()),
        range(50),
        threads=2,
        name="test-in-threads",
        memory=memory,
    )
    assert (len(made), used) == (2, {True})
    run(lambda _, __: callers.add(threading.current_thread()), range(5), 1)
    assert callers == {threading.current_thread()}


@pytest.mark.parametrize("threads", [1, 2])
def test_after_an_error_no_task_is_begun(threads):
    begun = []
    failed = threading.Event()

    def work(task, _):
        begun.append(task)
        if task == 1:
            failed.set()
            raise ValueError(task)
        assert threads == 1 or failed.wait(60)

    with pytest.raises(ValueError, match="1"):
        run(work, [0, 1, *range(2, 1000)], threads)
    assert len(begun) < 10
    assert not left()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_list_and_of_the_memory_is_raised(threads):
    def tasks():
        yield 1
        raise KeyError("list")

    with pytest.raises(KeyError, match="list"):
        run(lambda *_: None, tasks(), threads)

    def memory():
        raise MemoryError("none")

    with pytest.raises(MemoryError, match="none"):
        in_threads(lambda *_: None, [1], threads=threads, name="test-in-threads", memory=memory)


@pytest.fixture
def told(monkeypatch):
    """An event that is set when the caller waits for its threads after Ctrl-C."""
    interrupted, waits = threading.Event(), threading.Event()
    join = threading.Thread.join

    def interrupt(*_):
        interrupted.set()
        raise KeyboardInterrupt

    def look(thread, timeout=None):
        if interrupted.is_set():
            waits.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", look)
    before = signal.signal(signal.SIGINT, interrupt)
    yield waits
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("patient", [True, False])
def test_an_interrupt_begins_no_other_task(told, patient):
    begun, finished = [], []

    def work(task, _):
        begun.append(task)
        if len(begun) == 2:  # both threads have one
            _thread.interrupt_main(signal.SIGINT)
        assert told.wait(60)
        finished.append(task)

    with pytest.raises(KeyboardInterrupt):
        run(work, range(100), 2, patient=patient)
    assert len(finished) == (2 if patient else 0)
    for thread in left():
        thread.join()
    assert sorted(finished) == sorted(begun) == [0, 1]


def test_a_signal_that_interrupts_no_wait_is_seen_all_the_same():
    """As one does that comes right before the caller begins to wait."""
    returned, ended, caller = threading.Event(), queue.SimpleQueue(), threading.get_ident()

    def work(task, _):
        while sys._current_frames()[caller].f_code.co_name not in ("join", "_wait_for_tstate_lock"):
            time.sleep(0)
        _thread.interrupt_main(signal.SIGINT)
        ended.put(returned.wait(60))

    with pytest.raises(KeyboardInterrupt):
        run(work, [1], 2, patient=False)
    returned.set()
    assert ended.get(timeout=60)
