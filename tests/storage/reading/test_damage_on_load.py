"""What a full load notices, byte by byte; and that what it doesn't notice can't change a value.

``verify`` notices everything: see ``test_verify.py``.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from gockpt.errors import ChunkCorrupt, ManifestCorrupt, NotACheckpoint
from gockpt.storage.read.find import open_checkpoint

ARRAYS = {
    ("model", "w"): ((5, 3), "float32"),
    ("model", "b"): ((3,), "bfloat16"),
    ("optimizer", "w", "step"): ((), "float32"),
    ("none",): ((0, 2), "int64"),
    ("twin",): ((5, 3), "float32"),
}
ROWS = 2


@pytest.fixture
def written(write, tmp_path):
    return write(tmp_path, ARRAYS, chunk_rows=ROWS, state={"lr": 0.1}, attributes={"step": 7})


def load(path):
    """Read all that a full load reads; returns the values by name."""
    with open_checkpoint(path) as checkpoint:
        values = {"state": checkpoint.state()}
        for name, array in checkpoint.arrays.items():
            values[name] = np.empty(array.spec.nbytes, np.uint8)
            checkpoint.read_into(name, None, values[name])
    return {name: value if name == "state" else value.tobytes() for name, value in values.items()}


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def array_of(written, file):
    return next((name for name in written.values if file.startswith(name + "/")), None)


def real_bytes(written, file):
    """Return how many bytes of a chunk file are rows."""
    data = written.values[array_of(written, file)]
    if not data.ndim > 1:
        return data.nbytes
    number = int(file.rsplit("/", 1)[1].split(".")[1])
    return data[number * ROWS : (number + 1) * ROWS].nbytes


def test_every_flipped_byte_is_noticed_or_does_not_count(written):
    right = load(written.path)
    noticed = unread = 0
    for file in files_of(written.path):
        with (written.path / file).open("r+b", buffering=0) as raw:
            data = raw.read()
            is_document, is_chunk = file.endswith("zarr.json"), os.path.basename(file).startswith("c")
            for at in range(0, len(data), 40 if is_document else 1):
                os.pwrite(raw.fileno(), bytes([data[at] ^ 1 << at % 8]), at)
                if is_document or (is_chunk and at >= real_bytes(written, file)):
                    assert load(written.path) == right, (file, at)
                    unread += 1
                elif is_chunk:
                    with pytest.raises(ChunkCorrupt) as caught:
                        load(written.path)
                    assert str(caught.value).startswith(f"{array_of(written, file)}: {file}: ")
                    noticed += 1
                else:
                    with pytest.raises(ManifestCorrupt, match=file.replace(".", r"\.")):
                        load(written.path)
                    noticed += 1
                os.pwrite(raw.fileno(), data[at : at + 1], at)
    assert load(written.path) == right
    assert noticed > 1000
    assert unread > 50


@pytest.mark.parametrize("how", ["missing", "empty", "shorter", "longer"])
def test_every_file_that_is_not_whole(how, written):
    right = load(written.path)
    for file in files_of(written.path):
        path = written.path / file
        data = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "shorter": data[:-1], "longer": data + b"\0"}[how])
        if file.endswith("zarr.json"):
            assert load(written.path) == right
        elif file == "gockpt.json":
            with pytest.raises(NotACheckpoint if how == "missing" else ManifestCorrupt):
                load(written.path)
        elif array_of(written, file):
            with pytest.raises(ChunkCorrupt, match=f"^{array_of(written, file)}: {file}"):
                load(written.path)
        else:
            with pytest.raises(ManifestCorrupt, match=file):
                load(written.path)
        path.write_bytes(data)
    assert load(written.path) == right


@pytest.mark.parametrize(
    ("one", "other", "first"),
    [
        ("model/w/c.0.0", "model/w/c.1.0", "model/w"),
        ("model/w/c.0.0", "twin/c.0.0", "model/w"),
        ("model/w/c.1.0", "twin/c.2.0", "model/w"),
        ("model/b/c.0", "model/b/c.1", "model/b"),
    ],
)
def test_swapped_files(written, one, other, first):
    shutil.move(written.path / one, written.path / "aside")
    shutil.move(written.path / other, written.path / one)
    shutil.move(written.path / "aside", written.path / other)
    with pytest.raises(ChunkCorrupt, match=f"^{first}: "):
        load(written.path)


def test_files_of_another_checkpoint(written, write, tmp_path):
    """Each is whole, and belongs to the same arrays; but it isn't the one that was written."""
    right = load(written.path)
    arrays = dict(reversed(ARRAYS.items()))  # other bits under the same names
    other = write(tmp_path / "other", arrays, chunk_rows=ROWS, state={"lr": 0.2}, attributes={"step": 8})
    assert sorted(files_of(other.path)) == sorted(files_of(written.path))
    for file in files_of(written.path):
        data = (written.path / file).read_bytes()
        if (other.path / file).read_bytes() == data:
            continue
        shutil.copy(other.path / file, written.path / file)
        if file.endswith("zarr.json"):
            assert load(written.path) == right
        else:
            with pytest.raises((ChunkCorrupt, ManifestCorrupt)):
                load(written.path)
        (written.path / file).write_bytes(data)


def test_files_that_do_not_belong_there_change_nothing(written):
    right = load(written.path)
    (written.path / "model/w/c.9.0").write_bytes(b"x")
    (written.path / "model/more").mkdir()
    (written.path / "link").symlink_to("/etc")
    assert load(written.path) == right
