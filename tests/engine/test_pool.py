"""The worker threads: niced, boosted by an un-niced one, gone when their source ends."""

from __future__ import annotations

import os
import queue
import threading

from gockpt.workers.thread_pool import WRITERS, Pool


class Source:
    """Hands out tasks from a queue until it gets ``None``."""

    def __init__(self):
        self.tasks = queue.Queue()
        self.writes = queue.Queue()

    def take(self):
        return self.tasks.get(timeout=30)

    def take_write(self):
        return self.writes.get(timeout=30)

    def end(self, workers):
        for _ in range(workers):
            self.tasks.put(None)
        for _ in range(WRITERS):
            self.writes.put(None)


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_threads_work_until_their_source_ends():
    pool, source, done = Pool(3, 5), Source(), queue.Queue()
    pool.serve(source)
    for number in range(20):
        source.tasks.put(lambda n=number: done.put(n))
    assert sorted(done.get(timeout=30) for _ in range(20)) == list(range(20))
    source.end(3)
    pool.join()
    assert not any(t.name.startswith("gockpt-worker") for t in threading.enumerate())


def test_workers_are_nice_and_the_boost_is_not():
    before = niceness()
    pool, source, seen = Pool(1, 7), Source(), queue.Queue()
    pool.serve(source)
    source.tasks.put(lambda: seen.put(niceness()))
    assert seen.get(timeout=30) == max(before, 7)
    source.writes.put(lambda: seen.put(niceness()))
    assert seen.get(timeout=30) == max(before, 7)
    source.end(1)
    pool.join()
    pool.boost(source)
    source.tasks.put(lambda: seen.put(niceness()))
    assert seen.get(timeout=30) == before
    source.tasks.put(None)
    pool.join()
    assert niceness() == before


def test_join_from_a_worker_does_not_wait_for_itself():
    pool, source = Pool(1, 0), Source()
    pool.serve(source)
    joined = threading.Event()

    def leave():
        pool.join()
        joined.set()

    source.tasks.put(leave)
    source.end(1)
    assert joined.wait(30)


def test_ended_threads_are_forgotten_when_the_next_save_starts():
    pool, source = Pool(2, 0), Source()
    for _ in range(3):
        pool.serve(source)
        source.end(2)
        for thread in list(pool._running):
            thread.join(30)
    assert len(pool._running) <= 2 + WRITERS
    pool.join()
