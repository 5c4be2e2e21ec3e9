"""Doubles for the two neighbours of the engine's parts: the store below and the listener above."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest


class Transaction:
    """A store's transaction in memory, which may fail at a chosen write or at the commit."""

    def __init__(self, contents, *, fail_at_write=None, fail_at_documents=None, fail_at_commit=None):
        self.contents = contents
        self.documents = 0
        self.restated = None
        self.attempt = "0123abcd"
        self.writes = []
        self.committed = False
        self.aborted = 0
        self._fail_at_write = fail_at_write or {}
        self._fail_at_documents = fail_at_documents
        self._fail_at_commit = fail_at_commit
        self._lock = threading.Lock()

    def write_chunks(self, chunks):
        for layout, slot, buffer in chunks:
            with self._lock:
                number = len(self.writes)
                self.writes.append((layout.spec.name, slot.chunk, bytes(buffer[: slot.nbytes]), len(buffer)))
            if number in self._fail_at_write:
                raise self._fail_at_write[number]

    def restate(self, **contents):
        assert not self.documents
        self.restated = contents

    def write_documents(self):
        self.documents += 1
        if self._fail_at_documents is not None:
            raise self._fail_at_documents

    def commit(self):
        if self._fail_at_commit is not None:
            raise self._fail_at_commit
        self.committed = True
        return "published"

    def abort(self):
        self.aborted += 1


class Outcome:
    """Records what a job reports, and lets a test wait for it."""

    def __init__(self):
        self.reports = []
        self._told = threading.Event()

    def published(self, job, result):
        self._tell("published", result)

    def mismatched(self, job, pieces):
        self._tell("mismatched", pieces)

    def failed(self, job, error):
        self._tell("failed", error)

    def _tell(self, what, about):
        self.reports.append((what, about))
        self._told.set()

    def wait(self):
        assert self._told.wait(30), "the job never reported"
        (report,) = self.reports
        return report


@pytest.fixture(scope="session")
def doubles():
    """Return the classes above."""
    return SimpleNamespace(Transaction=Transaction, Outcome=Outcome)
