"""Whatever is changed in a checkpoint's files, verify finds it and names the file and the tensor."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from gockpt.storage.format.checksum import crc32c
from gockpt.storage.read.find import open_checkpoint

ARRAYS = {
    ("model", "w"): ((5, 3), "float32"),
    ("model", "b"): ((3,), "bfloat16"),
    ("optimizer", "w", "step"): ((), "float32"),
    ("none",): ((0, 2), "int64"),
}


@pytest.fixture
def written(write, tmp_path):
    """Five chunk files, one of them with padding; every kind of document."""
    return write(tmp_path, ARRAYS, chunk_rows=2, state={"lr": 0.1}, attributes={"step": 7})


@pytest.fixture
def core(write, tmp_path):
    """One whose root has consolidated metadata."""
    arrays = {name: (shape, "float32") for name, (shape, _) in ARRAYS.items()}
    return write(tmp_path, arrays, chunk_rows=2, attributes={"step": 7})


def verify(path, threads=1):
    with open_checkpoint(path, threads=threads) as checkpoint:
        return checkpoint.verify()


def problems(path, threads=1):
    return [(problem.path, problem.array) for problem in verify(path, threads).problems]


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("threads", [1, 3])
def test_an_intact_checkpoint_has_no_problems(write, every_dtype, tmp_path, threads):
    written = write(tmp_path, every_dtype, chunk_rows=2)
    report = verify(written.path, threads)
    assert report.ok
    assert report.problems == ()
    assert (report.step, report.seq, report.path) == (7, 1, str(written.path))
    assert report.files == len(files_of(written.path))
    chunks = [file for file in files_of(written.path) if file.rsplit("/", 1)[-1].startswith("c")]
    assert report.nbytes == sum((written.path / file).stat().st_size for file in chunks)


@pytest.mark.parametrize("kind", ["written", "core"])
def test_a_bit_flipped_in_any_byte_of_any_file_is_found(request, kind):
    written = request.getfixturevalue(kind)
    rng = random.Random(7)
    with open_checkpoint(written.path, threads=1) as checkpoint:
        for file in files_of(written.path):
            with (written.path / file).open("r+b", buffering=0) as raw:
                data = raw.read()
                step = max(1, len(data) // 60)
                for at in range(rng.randrange(step), len(data), step):
                    os.pwrite(raw.fileno(), bytes([data[at] ^ 1 << rng.randrange(8)]), at)
                    found = [problem.path for problem in checkpoint.verify().problems]
                    assert found == [file], (file, at)
                    os.pwrite(raw.fileno(), data[at : at + 1], at)
        assert checkpoint.verify().ok


def test_every_file_that_is_missing_is_found_with_its_array(written):
    with open_checkpoint(written.path) as checkpoint:
        for file in files_of(written.path):
            moved = (written.path / file).rename(written.path.parent / "moved")
            (problem,) = checkpoint.verify().problems
            assert (problem.path, problem.what) == (file, "missing")
            array = next((name for name in written.values if file.startswith(name + "/")), None)
            assert problem.array == array
            assert str(problem) == f"{file} ({array}): missing" if array else f"{file}: missing"
            moved.rename(written.path / file)
        assert checkpoint.verify().ok


def test_every_file_that_is_longer_or_shorter_is_found(written):
    with open_checkpoint(written.path) as checkpoint:
        for file in files_of(written.path):
            data = (written.path / file).read_bytes()
            for other in (data + b"\0", data[:-1], b""):
                (written.path / file).write_bytes(other)
                assert {problem.path for problem in checkpoint.verify().problems} == {file}
            (written.path / file).write_bytes(data)
        assert checkpoint.verify().ok


OF_OTHERS = (
    ".DS_Store",
    "._gockpt.json",
    ".nfs000000000001",
    ".ipynb_checkpoints/state-checkpoint.json",
    "Thumbs.db",
    "desktop.ini",
    "state.json~",
    ".state.json.swp",
    "#state.json#",
    "gockpt.json.tmp",
    "model/.DS_Store",
    "model/w/.DS_Store",
    "model/w/c.9.0",
    "none/c.0.0",
    "extra/zarr.json",
    "a\nb",
)


def test_files_of_other_programs_are_named_and_no_damage(written):
    for path in OF_OTHERS:
        (written.path / path).parent.mkdir(exist_ok=True)
        (written.path / path).write_bytes(b"mine")
    (written.path / "link").symlink_to("/etc/passwd")
    report = verify(written.path)
    assert report.ok
    assert report.problems == ()
    tops = {
        path.replace(".ipynb_checkpoints/state-checkpoint.json", ".ipynb_checkpoints") for path in OF_OTHERS
    }
    assert set(report.foreign) == {path.replace("extra/zarr.json", "extra") for path in tops} | {"link"}
    assert report.more_foreign == 0


@pytest.mark.parametrize("file", ["state.json", "model/w/c.0.0", "model/w/zarr.json", "gockpt.json"])
@pytest.mark.parametrize(
    "instead", [os.mkdir, lambda path: os.symlink("/etc/passwd", path), lambda path: open(path, "x").close()]
)
def test_what_stands_in_place_of_a_file_of_ours_is_damage(file, instead, written):
    with open_checkpoint(written.path) as checkpoint:
        (written.path / file).unlink()
        instead(written.path / file)
        report = checkpoint.verify()
    assert file in {problem.path for problem in report.problems}
    assert report.foreign == ()


def test_countless_files_of_others_are_counted(written, monkeypatch):
    monkeypatch.setattr("gockpt.storage.read.verify.MAX_PROBLEMS", 5)
    for number in range(12):
        (written.path / f"stray-{number:02}").touch()
    report = verify(written.path)
    assert (report.foreign[0], len(report.foreign), report.more_foreign) == ("stray-00", 5, 7)


def test_swapped_files_are_found(written):
    one, two, aside = (written.path / "model/w" / name for name in ("c.0.0", "c.1.0", "aside"))
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert problems(written.path) == [("model/w/c.0.0", "model/w"), ("model/w/c.1.0", "model/w")]


def test_a_chunk_with_the_right_bytes_and_the_wrong_native_checksum_is_found(written):
    path = written.path / "model/w/c.2.0"  # one real row of two
    data = path.read_bytes()
    padded = data[:12] + b"\1" + data[13:24]
    path.write_bytes(padded + crc32c(padded).to_bytes(4, "little"))
    (problem,) = verify(written.path).problems
    assert problem.what == "the padding from byte 12 on is not all zero"
    path.write_bytes(data[:24] + bytes(4))
    (problem,) = verify(written.path).problems
    assert problem.what.startswith("its own checksum is 00000000 instead of ")
    assert problem.array == "model/w"


def test_chunks_longer_than_a_piece_are_compared_to_their_end(write, tmp_path):
    written = write(tmp_path, {("a",): ((19, 1 << 20), "uint8"), ("b",): ((3,), "int8")}, chunk_rows=10)
    assert verify(written.path).ok
    for name, at in (("c.0.0", (9 << 20) + 5), ("c.1.0", (8 << 20) + 5), ("c.1.0", (9 << 20) + 5)):
        with (written.path / "a" / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        (problem,) = verify(written.path).problems
        padding = name == "c.1.0" and at > 9 << 20
        where = "the padding from byte 9437184" if padding else f"the bytes from {at >> 20 << 20} on"
        assert (problem.path, problem.what[: len(where)]) == (f"a/{name}", where)
        with (written.path / "a" / name).open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte]))


def test_a_lost_directory_and_links_are_found(written, tmp_path):
    shutil.move(written.path / "model/w", tmp_path / "w")
    (written.path / "model/w").symlink_to(tmp_path / "w")
    (written.path / "model/b/c.0").unlink()
    os.mkfifo(written.path / "model/b/c.0")
    found = verify(written.path).problems
    assert {problem.path for problem in found} == {
        "model/w",
        "model/w/zarr.json",
        *(f"model/w/c.{n}.0" for n in range(3)),
        "model/b/c.0",
    }


def test_other_hard_links_are_only_mentioned(written, tmp_path, caplog):
    os.link(written.path / "model/w/c.0.0", tmp_path / "other")
    assert verify(written.path).ok
    assert "1 files of" in caplog.text


def edit(written, reseal, path, change):
    document = json.loads((written.path / path).read_bytes())
    change(document)
    (written.path / path).write_text(json.dumps(document))
    reseal(written)
    return {problem.path: problem.what for problem in verify(written.path).problems}


CHANGES = {
    "shape": lambda d: d.update(shape=[6, 3]),
    "data_type": lambda d: d.update(data_type="int32"),
    "chunk_grid": lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[1, 3]),
    "chunk_key_encoding": lambda d: d["chunk_key_encoding"]["configuration"].update(separator="/"),
    "fill_value": lambda d: d.update(fill_value=1.0),
    "codecs": lambda d: d.update(
        codecs=[{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]
    ),
    "node_type": lambda d: d.update(node_type="group"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_zarr_document_that_says_something_else_is_found_though_sealed(core, reseal, key):
    found = edit(core, reseal, "model/w/zarr.json", CHANGES[key])
    assert found == {"model/w/zarr.json": f"its {key} is not the one that follows from the manifest"}


@pytest.mark.parametrize("key", CHANGES)
def test_consolidated_metadata_must_say_the_same(core, reseal, key):
    def change(document):
        CHANGES[key](document["consolidated_metadata"]["metadata"]["model/w"])

    found = edit(core, reseal, "zarr.json", change)
    assert found == {
        "zarr.json": f"its consolidated metadata has another {key} for model/w than the manifest"
    }


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d["consolidated_metadata"]["metadata"].pop("none"), "another document for none"),
        (
            lambda d: d["consolidated_metadata"]["metadata"].update(more={}),
            "has 'more', the manifest has not",
        ),
        (lambda d: d.update(consolidated_metadata=[]), "consolidated metadata is no object"),
        (lambda d: d["attributes"].update(step=8), "attributes are not those in the manifest"),
        (lambda d: d.update(node_type="array"), "not the document of a Zarr group"),
    ],
)
def test_the_root_must_say_what_the_manifest_says(core, reseal, change, what):
    found = edit(core, reseal, "zarr.json", change)
    assert list(found) == ["zarr.json"]
    assert what in found["zarr.json"]


def test_a_document_that_is_no_json_is_found_though_sealed(core, reseal):
    (core.path / "none/zarr.json").write_text('{"shape": [0, 2], "shape": [0, 2]}')
    (core.path / "optimizer/zarr.json").write_text("[" * 100)
    reseal(core)
    found = {problem.path: problem.what for problem in verify(core.path).problems}
    assert "given twice" in found["none/zarr.json"]
    assert "nests" in found["optimizer/zarr.json"]


def test_a_manifest_replaced_meanwhile_is_found(written, write, tmp_path):
    other = write(tmp_path / "other", ARRAYS, chunk_rows=2, seq=2)
    with open_checkpoint(written.path) as checkpoint:
        (written.path / "gockpt.json").write_bytes((other.path / "gockpt.json").read_bytes())
        found = {problem.path: problem.what for problem in checkpoint.verify().problems}
    assert found == {"gockpt.json": "not the manifest it was opened with"}


def test_of_countless_problems_a_thousand_are_named_and_the_rest_counted(write, tmp_path, monkeypatch):
    """Chunks that are missing, found by several threads."""
    path = write(tmp_path, {("model", "w"): ((300, 2), "float32")}, chunk_rows=1).path
    shutil.rmtree(path / "model" / "w")
    whole = verify(path, 3)
    assert (whole.ok, len(whole.problems), whole.more) == (False, 302, 0)  # its directory and its document
    monkeypatch.setattr("gockpt.storage.read.verify.MAX_PROBLEMS", 100)
    report = verify(path, 3)
    assert (report.ok, len(report.problems), report.more) == (False, 100, 202)
    assert set(report.problems) < set(whole.problems)
    assert report.problems == tuple(sorted(report.problems, key=lambda problem: problem.path))
