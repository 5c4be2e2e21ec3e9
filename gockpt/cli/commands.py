"""The commands. Keys of the JSON documents are stable; docs/cli.md lists them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import click

import gockpt
from gockpt.cli.output import byte_size, print_json, print_line, print_table, printable, progress, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.catalog import Metadata
    from gockpt.storage.read.checkpoint import StoredCheckpoint
    from gockpt.storage.read.compare import DiffReport
    from gockpt.storage.read.find import CheckpointEntry
    from gockpt.storage.read.verify import VerifyReport

__all__ = ["cli"]

_EXIT_CODES = """\b
Exit codes: 0 fine; 1 damage or differences were found; 2 the command can't be
carried out as written; 3 no such checkpoint; 4 the system refused (busy, no
permission, no network); 130 interrupted; 141 the reader of the output is gone."""

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_step = click.option("--step", type=click.IntRange(min=0), help="This step instead of the newest.")


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gockpt.__version__, prog_name="gockpt")
def cli() -> None:
    """Look at, check, compare, convert and remove checkpoints.

    PATH is where checkpoints are saved, or one checkpoint's own directory or archive, or a URL such as
    s3://bucket/run.
    """


@cli.command("ls", epilog=_EXIT_CODES)
@click.argument("path")
@click.option("--all", "superseded", is_flag=True, help="Also those that a newer one of their step replaced.")
@_json
def list_all(path: str, *, superseded: bool, as_json: bool) -> int:
    """List the checkpoints in PATH, oldest publication first."""
    from gockpt.catalog import checkpoints

    found = checkpoints(path, superseded=superseded)
    if as_json:
        print_json({"path": path, "checkpoints": [_entry(entry) for entry in found]})
    elif found:
        columns = ("step>", "seq>", "created", "size>", "exact", "finite", "numbers", "path")
        print_table(columns, [_row(entry) for entry in found])
    else:
        tell(f"no complete checkpoint in {printable(path)}")
    return 0 if found else 3


@cli.command(epilog=_EXIT_CODES)
@click.argument("path")
@_step
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@_json
def show(path: str, *, step: int | None, tensors: bool, as_json: bool) -> int:
    """Show what one checkpoint in PATH holds; the newest, or that of --step."""
    from gockpt.catalog import metadata_of, state_of
    from gockpt.storage.read.find import open_checkpoint

    with open_checkpoint(path, step) as stored:
        metadata = metadata_of(stored, state_of(stored))
        if as_json:
            document = _metadata(metadata, stored)
            if tensors:
                document["tensors"] = [
                    {
                        "name": name,
                        "shape": list(a.spec.shape),
                        "dtype": a.spec.dtype,
                        "nbytes": a.spec.nbytes,
                    }
                    for name, a in stored.arrays.items()
                ]
            print_json(document)
            return 0
        _show(metadata, stored)
        if tensors:
            print_line("")
            rows = [
                (name, "x".join(map(str, a.spec.shape)) or "scalar", a.spec.dtype, byte_size(a.spec.nbytes))
                for name, a in stored.arrays.items()
            ]
            print_table(("tensor", "shape", "dtype", "size>"), rows)
    return 0


@cli.command(epilog=_EXIT_CODES)
@click.argument("path")
@_step
@click.option("--all", "every", is_flag=True, help="All checkpoints in PATH.")
@_json
def verify(path: str, *, step: int | None, every: bool, as_json: bool) -> int:
    """Read every byte of a checkpoint in PATH and compare it with what was written."""
    from gockpt.catalog import checkpoints
    from gockpt.catalog import verify as verify_one

    if every and step is not None:
        msg = "--all and --step exclude each other"
        raise click.UsageError(msg)
    wanted: list[int | None] = [step]
    if every:
        # The newest last and without its step: it also tells of checkpoints whose manifest is damaged.
        wanted = [*[entry.step for entry in checkpoints(path)[:-1]], None]
    reports = []
    for one in wanted:
        with progress("the newest" if one is None else f"step {one}", shown=not as_json) as moved:
            report = verify_one(path, one, on_progress=moved)
        reports.append(report)
        if not as_json:
            _tell_verified(report)
    if as_json:
        print_json(
            {"path": path, "ok": all(r.ok for r in reports), "checkpoints": [_report(r) for r in reports]}
        )
    return 0 if all(report.ok for report in reports) else 1


@cli.command(epilog=_EXIT_CODES)
@click.argument("path_a", metavar="A")
@click.argument("path_b", metavar="B")
@click.option("--step-a", type=click.IntRange(min=0), help="This step of A instead of its newest.")
@click.option("--step-b", type=click.IntRange(min=0), help="This step of B instead of its newest.")
@click.option("--quick", is_flag=True, help="Take equal checksums for equal bytes, and read only the rest.")
@_json
def diff(
    path_a: str, path_b: str, *, step_a: int | None, step_b: int | None, quick: bool, as_json: bool
) -> int:
    """Compare the checkpoints A and B: names, shapes, every byte, metadata."""
    from gockpt.catalog import diff as diff_both

    with progress("comparing", shown=not as_json) as moved:
        report = diff_both(path_a, path_b, step_a, step_b, quick=quick, on_progress=moved)
    if as_json:
        print_json(_difference(report))
    else:
        _tell_difference(report)
    return 0 if report.equal else 1


@cli.command(epilog=_EXIT_CODES)
@click.argument("path")
@click.argument("target")
@_step
@_json
def pack(path: str, target: str, *, step: int | None, as_json: bool) -> int:
    """Write a checkpoint in PATH as TARGET, an archive: one ZIP file."""
    from gockpt.packing import pack as pack_one

    with progress("packing", shown=not as_json) as moved:
        _tell_written(path, pack_one(path, target, step, on_progress=moved), as_json=as_json)
    return 0


@cli.command(epilog=_EXIT_CODES)
@click.argument("path")
@click.argument("target")
@_step
@_json
def unpack(path: str, target: str, *, step: int | None, as_json: bool) -> int:
    """Write a checkpoint in PATH as TARGET, a directory."""
    from gockpt.packing import unpack as unpack_one

    with progress("unpacking", shown=not as_json) as moved:
        _tell_written(path, unpack_one(path, target, step, on_progress=moved), as_json=as_json)
    return 0


@cli.command(epilog=_EXIT_CODES)
@click.argument("path")
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest stay.")
@click.option("--every", type=click.IntRange(min=1), help="Also each step that is a multiple of this.")
@click.option("--best", type=click.IntRange(min=1), help="Also the best this many; needs --metric.")
@click.option("--metric", help="The number among the extras that the best are chosen by.")
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", help="Whether low or high is best.")
@click.option("--other-runs", is_flag=True, help="Count and remove other runs' checkpoints as well.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_json
def prune(
    path: str,
    *,
    keep: int,
    every: int | None,
    best: int | None,
    metric: str | None,
    mode: Literal["min", "max"],
    other_runs: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Remove old checkpoints from PATH, where no run may be saving."""
    from gockpt.catalog import prune as prune_path

    rules = gockpt.Keep(
        newest=keep, every=every, best=best or 0, metric=metric, mode=mode, other_runs=other_runs
    )
    done = prune_path(path, rules, dry_run=dry_run)
    if as_json:
        removed, kept = ([_entry(entry) for entry in entries] for entries in (done.removed, done.kept))
        print_json({"path": path, "dry_run": dry_run, "removed": removed, "kept": kept})
        return 0
    for entry in done.removed:
        print_line(f"{'would remove' if dry_run else 'removed'} step {entry.step}: {printable(entry.path)}")
    others = f", {done.other_runs} of them of other runs (see --other-runs)" if done.other_runs else ""
    tell(f"{len(done.kept)} kept{others}")
    return 0


def _tell_written(path: str, entry: CheckpointEntry, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": path, "written": _entry(entry)})
    else:
        print_line(f"{printable(entry.path)}: step {entry.step}, {byte_size(entry.nbytes)}")


def _entry(entry: CheckpointEntry) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "metrics": dict(entry.metrics)}


def _row(entry: CheckpointEntry) -> tuple[object, ...]:
    numbers = ", ".join(f"{name}={value:g}" for name, value in entry.metrics.items())
    exact = "yes" if entry.exact else "no"
    finite = {None: "?", True: "yes", False: "no"}[entry.finite]
    path = f"{entry.path} (superseded)" if entry.superseded else entry.path
    return entry.step, entry.seq, entry.created, byte_size(entry.nbytes), exact, finite, numbers, path


def _metadata(metadata: Metadata, stored: StoredCheckpoint) -> dict[str, Any]:
    nbytes = sum(array.spec.nbytes for array in stored.arrays.values())
    document = {field.name: getattr(metadata, field.name) for field in dataclasses.fields(metadata)}
    deviation = metadata.deviation and dataclasses.asdict(metadata.deviation)
    nonfinite = metadata.nonfinite and dataclasses.asdict(metadata.nonfinite)
    own = {"deviation": deviation, "nonfinite": nonfinite}
    return {**document, **own, "tensor_count": len(stored.arrays), "nbytes": nbytes}


def _exactness(metadata: Metadata) -> str:
    if metadata.exact:
        return "yes"
    return f"no: {metadata.deviation or ', '.join(metadata.inexact) or 'not said why'}"


def _run(metadata: Metadata) -> str:
    before = ", ".join(f"{run} ({seq})" for run, seq in metadata.ancestors or ())
    return f"{metadata.run}, after {before}" if before else metadata.run


def _show(metadata: Metadata, stored: StoredCheckpoint) -> None:
    nbytes = sum(array.spec.nbytes for array in stored.arrays.values())
    writer = ", ".join(f"{name} {version}" for name, version in metadata.writer.items())
    parent = "" if metadata.parent is None else f", after {metadata.parent}"
    rows: list[tuple[str, object]] = [
        ("path", metadata.path),
        ("step", metadata.step),
        ("optimizer steps", metadata.optimizer_steps),
        ("exact", _exactness(metadata)),
        ("NaN and Inf", "not counted" if metadata.nonfinite is None else metadata.nonfinite),
        ("tensors", f"{len(stored.arrays)}, {byte_size(nbytes)}"),
        ("optimizers", ", ".join(metadata.optimizers)),
        ("extras", ", ".join(metadata.extras)),
        ("publication", f"{metadata.seq}{parent}"),
        ("created", metadata.created),
        ("run", _run(metadata)),
        ("writer", f"{writer}; attempt {metadata.attempt}"),
    ]
    for name, value in rows:
        print_line(f"{name:16}{printable(value)}".rstrip())


def _report(report: VerifyReport) -> dict[str, Any]:
    return {
        "path": report.path,
        "step": report.step,
        "seq": report.seq,
        "ok": report.ok,
        "files": report.files,
        "nbytes": report.nbytes,
        "problems": [dataclasses.asdict(problem) for problem in report.problems],
        "more": report.more,
        "truncated": report.more > 0,
        "foreign": list(report.foreign),
        "more_foreign": report.more_foreign,
    }


def _tell_verified(report: VerifyReport) -> None:
    size = f"{report.files} files, {byte_size(report.nbytes)}"
    state = "ok" if report.ok else f"{len(report.problems) + report.more} problems"
    print_line(f"{printable(report.path)}: {state} ({size})")
    for problem in report.problems:
        print_line(f"  {printable(problem)}")
    if report.more:
        print_line(f"  and {report.more} more")
    for path in report.foreign:
        print_line(f"  {printable(path)}: of another program, and no part of the checkpoint")
    if report.more_foreign:
        print_line(f"  and {report.more_foreign} more of other programs")


def _difference(report: DiffReport) -> dict[str, Any]:
    sides: Callable[[tuple[Any, Any]], dict[str, Any]] = lambda pair: {"a": pair[0], "b": pair[1]}  # noqa: E731
    return {
        "equal": report.equal,
        "same_tensors": report.same_tensors,
        "quick": report.quick,
        "path": sides(report.paths),
        "step": sides(report.steps),
        "only_in_a": list(report.only_in_a),
        "only_in_b": list(report.only_in_b),
        "changed": [
            {
                "name": one.name,
                "shape": sides(one.shapes),
                "dtype": sides(one.dtypes),
                "elements": one.elements,
                "max_abs_difference": one.max_abs_difference,
                "not_finite": one.not_finite,
            }
            for one in report.changed
        ],
        "same": report.same,
        "metadata": [{"where": one.where, **sides(one.values)} for one in report.metadata],
        "nbytes": report.nbytes,
    }


def _tell_difference(report: DiffReport) -> None:
    for side, names in (("A", report.only_in_a), ("B", report.only_in_b)):
        for name in names:
            print_line(f"only in {side}: {printable(name)}")
    if report.changed:
        rows = []
        for one in report.changed:
            (shape_a, shape_b), (dtype_a, dtype_b) = one.shapes, one.dtypes
            kind_a, kind_b = f"{dtype_a}{list(shape_a)}", f"{dtype_b}{list(shape_b)}"
            kinds = kind_a if kind_a == kind_b else f"{kind_a} / {kind_b}"
            most = "" if one.max_abs_difference is None else f"{one.max_abs_difference:.6g}"
            rows.append(
                (one.name, kinds, "" if one.elements is None else one.elements, most, one.not_finite or "")
            )
        columns = ("tensor", "dtype and shape", "elements>", "largest difference>", "not finite>")
        print_table(columns, rows)
    for two in report.metadata:
        a, b = (printable(value) for value in two.values)
        print_line(f"{printable(two.where)}: {a} / {b}")
    state = "equal" if report.equal else "same tensors" if report.same_tensors else "different"
    tell(
        f"{state}: {report.same} tensors are the same, {len(report.changed)} differ "
        f"(step {report.steps[0]} and step {report.steps[1]})"
    )
