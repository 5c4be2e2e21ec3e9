"""What is worked out once for all saves of the same arrays is what each would work out for itself."""

from __future__ import annotations

import json

import pytest

from gockpt.core.arena_layout import ArrayLayout
from gockpt.errors import ManifestCorrupt, UnsupportedState, UsageError
from gockpt.storage.format import manifest, strict_json
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

W = (("model", "w"), (5, 3), "float32", 5)
SETS = {
    "two": [W, (("model", "v"), (4,), "float64", 4)],
    "another shape": [(("model", "w"), (5, 4), "float32", 5), (("model", "v"), (4,), "float64", 4)],
    "another grid": [(("model", "w"), (5, 3), "float32", 2), (("model", "v"), (4,), "float64", 4)],
    "another dtype": [(("model", "w"), (5, 3), "int64", 5), (("model", "v"), (4,), "float64", 4)],
    "another order": [(("model", "v"), (4,), "float64", 4), W],
    "not core": [W, (("model", "v"), (4,), "bfloat16", 4)],
    "one more": [W, (("model", "v"), (4,), "float64", 4), (("optimizer", "w", "step"), (), "float32", 1)],
    "none": [],
}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "path") as store:
        yield store


def tree_of(checker, published):
    """Return all files, the manifest as far as it isn't about when and by whom it was published."""
    tree = checker.read(published.path)
    assert checker.problems(tree) == []
    document = json.loads(tree.pop("gockpt.json").split(b"\n")[0])
    for key in ("seq", "attempt", "run", "parent", "created"):
        del document[key]
    return tree, document


@pytest.mark.parametrize("second", SETS)
@pytest.mark.parametrize("first", ["two", "one more", "none"])
def test_a_save_after_another_is_the_same_as_one_alone(first, second, tmp_path, sampling, checker):
    samples = {name: sampling.make(arrays) for name, arrays in SETS.items()}
    with Store(tmp_path / "alone") as store:
        alone = tree_of(checker, samples[second].save(store, 3, marker=5))
    with Store(tmp_path / "after") as store:
        samples[first].save(store, 1, marker=4)
        samples[second].save(store, 2, marker=5)
        after = tree_of(checker, samples[second].save(store, 3, marker=5))
    assert after == alone


class Changing(Compression):
    """Encodes everything in every second save."""

    def __init__(self):
        super().__init__("zstd", threads=1, smallest=1)
        self.on = False

    def codec_for(self, layout):
        return super().codec_for(layout) if self.on else None


def test_what_is_encoded_may_change(tmp_path, sampling, checker):
    sample = sampling.make([(("model", "w"), (5000, 3), "float32", 2000), (("model", "x"), *W[1:])])
    trees = {}
    with Store(tmp_path / "path", compression=(compression := Changing())) as store:
        for step in range(6):
            compression.on = step % 2 == 1
            published = sample.save(store, step, marker=step)
            with find.open_checkpoint(published.path) as checkpoint:
                codecs = {entry.codec for entry in checkpoint.manifest.arrays}
            assert codecs == ({"zstd"} if compression.on else {None})
            trees[step] = checker.read(published.path)
    for name in ("model/w/zarr.json", "model/x/zarr.json", "zarr.json"):
        assert trees[1][name] == trees[3][name] == trees[5][name]
        assert trees[0][name] == trees[2][name] == trees[4][name] != trees[1][name]
        assert (b"zstd" in trees[1][name], b"zstd" in trees[2][name]) == (True, False)


def test_a_later_save_is_tried_without_its_arrays(store, sampling, monkeypatch):
    """Trying them again would take longer than writing them."""
    sample = sampling.make([(("model", f"w{i}"), (2,), "float32", 2) for i in range(50)])
    parsed = []
    parse = manifest.parse
    monkeypatch.setattr(
        manifest, "parse", lambda data, **kw: (parsed.append(len(data)), parse(data, **kw))[1]
    )
    for step in range(3):
        sample.save(store, step, marker=1)
    assert len(parsed) == 3
    assert parsed[0] > 5000
    assert parsed[1] == parsed[2] < 1000


def begin(store, sample, step, attributes):
    return store.begin(step, sample.layouts, state={"marker": 1}, attributes=attributes, exact=True)


def test_attributes_are_tried_in_every_save(store, sample, monkeypatch, checker):
    sample.save(store, 1, marker=1)
    parse = manifest.parse

    def choosy(data, *, where):
        if b"odd" in data:
            raise ManifestCorrupt(f"{where}: odd")
        return parse(data, where=where)

    monkeypatch.setattr(manifest, "parse", choosy)
    with (
        begin(store, sample, 2, {"odd": 1}) as transaction,
        pytest.raises(UsageError, match="can't be published: the manifest: odd"),
    ):
        transaction.write_documents()
    deep: list = []
    for _ in range(40):
        deep = [deep]
    with (
        begin(store, sample, 3, {"deep": deep}) as transaction,
        pytest.raises(UnsupportedState, match="levels of nesting"),
    ):
        transaction.write_documents()
    assert checker.problems(checker.read(sample.save(store, 4, marker=1).path)) == []


def test_arrays_may_come_one_by_one(store, sampling, checker):
    """The type says a sequence; what is no longer one after a look at it must not be saved as nothing."""
    for step, name in enumerate(["two", "one more"]):
        sample = sampling.make(SETS[name])
        with store.begin(step, iter(sample.layouts), state={"marker": 1}, attributes={}, exact=True) as begun:
            sample.write(begun, 1)
            published = begun.commit()
        tree = checker.read(published.path)
        assert checker.problems(tree) == []
        assert len(json.loads(tree["gockpt.json"].split(b"\n")[0])["arrays"]) == len(sample.layouts)


def test_a_manifest_that_is_too_large_is_refused_before_it_is_synced(store, sampling, monkeypatch):
    sample = sampling.make([(("model", f"w{i}"), (2,), "bfloat16", 2) for i in range(50)])
    sample.save(store, 1, marker=1)
    monkeypatch.setattr(strict_json, "MAX_BYTES", 10_000)
    with (
        begin(store, sample, 2, {"much": "x" * 4000}) as transaction,
        pytest.raises(UnsupportedState, match=r"gockpt\.json would take 1[0-9]{4} bytes"),
    ):
        transaction.write_documents()


def test_chunks_are_known_by_the_layouts_of_their_own_save(store, sampling, monkeypatch):
    """Equal ones are accepted too, but comparing thousands of slots for each of them takes its time."""
    for step in range(2):
        sample = sampling.make([(("model", "w"), (40,), "float32", 1)])
        with sample.begin(store, step) as transaction:
            with monkeypatch.context() as patched:
                patched.setattr(ArrayLayout, "__eq__", lambda *_: pytest.fail("compared"))
                sample.write(transaction, 1)
            transaction.commit()
