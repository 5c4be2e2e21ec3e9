"""Who may import whom: read from the source, nothing is imported.

Imports go down the table of layers only, in a layer to the left only, and in a package to what stands before
in its list. Some neighbours in one layer must not know each other at all. An import under ``TYPE_CHECKING``
counts as any other.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Lowest first: packages, and modules that stand in no package. A new one takes its place here.
LAYERS = (
    ("errors", "once", "options", "deferred_signals", "garbage_collection"),
    ("core",),
    ("planning",),
    ("kernels", "storage"),
    ("tensor_memory", "state", "staging"),
    ("replay",),
    ("workers",),
    ("catalog", "packing", "uploads", "loading", "saving"),
    (
        *("reachable", "ranks", "validation", "existing", "opening", "saver", "registry"),
        *("preemption", "process_end", "release", "checkpointer", "api"),
    ),
    ("cli", "integrations"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Lowest first: the modules of each package. A new one takes its place here.
ORDER = {
    "core": """
        shortened boxes array_spec arena_layout descriptors timeline exactness nonfinite
        runs retention save_policy save_state step_number
    """,
    "planning": "rates planner save_interval",
    "kernels": """
        reference reference_cuda_rounding launch_tables kernel_cache numba_intrinsics numba_compile mkl_sqrt
        nonfinite_numba fingerprint_numba sgd_numba adam_numba adam_cuda_rounding_numba
        sgd_cuda_rounding_numba gradient16_format gradient16_launch gradient16_numba
        gradient_encoding pack_triton fingerprint_triton gradient16_triton replay
    """,
    "storage": """
        format.json_fields format.strict_json format.checksum format.codecs format.chunk_grid
        format.step_names format.array_paths format.zarr_dtypes format.zarr_metadata format.manifest_entries
        format.zip_archive format.archive_plan format.manifest_arrays format.manifest format.zarr_outline
        object_store.made_ahead object_store.client paths
        local.stopwatch local.failures local.syscalls local.filesystem local.files local.owner
        local.writer_lock local.verified local.catalog local.chunk_writer local.compression local.durability
        local.partial_files local.page_writer local.partial_archive local.partial_directory local.draft
        local.publish local.transaction local.store
        read.in_threads read.scratch read.location read.archive_files read.safe_open read.direct_io
        read.local_location read.object_location read.read_plan read.read_join read.decode read.read_execute
        read.verify read.checkpoint read.copying local.packing read.element_values read.compare read.find
        object_store.upload __init__
    """,
    "state": """
        tensors strides known_classes module_protocol naming rng_state lineage value_encoder value_decoder
        saved_document saved_forms saved_strides tensor_subclasses live_state parameters_outside
        optimizer_forms optimizers state_document collect collection
    """,
    "staging": """
        arena gradient_ring task_thread stager host_stager pack_launch device cuda pinned_memory copy_batches
        device_budget in_flight staging_buffers copy_pipeline device_queue device_stager
    """,
    "replay": """
        calibration pending_scalars device_scalars calibration_runs calibration_cuda rules
        rounding_error rounding_probes tiled
    """,
    "workers": """
        messages channel send_queue job_client nonfinite_counts piece_replay save_job thread_pool executor
        reports orphans worker_main process_handle process_job process_executor
    """,
    "loading": """
        lazy_tensor checkpoint newest_valid fit_subclass fit_model load_plan fit fit_wrapper messages
        stored_state_dict module fill optimizer optimizer_feeding load
    """,
    "saving": """
        boundary lock moments handle optimizer_hooks at_once write_items facts device_selection
        late_pieces copy_requests piece_updates update_order scalar_capture gradient_capture stager_capture
        capture memory window_plan closing last_tick report save_in_flight session inside_call around_updates
        without_tick engine
    """,
    "cli": "output commands run __init__ __main__",
}
PLACE = {
    **{name: place for names in LAYERS for place, name in enumerate(names)},
    **{
        f"{package}.{name}": place
        for package, text in ORDER.items()
        for place, name in enumerate(text.split())
    },
}
STRANGERS = {
    frozenset({"kernels", "storage"}),
    frozenset({"state", "staging"}),
    *(frozenset({name, "saving"}) for name in ("catalog", "loading", "packing", "uploads")),
}
PURE = {"core", "planning"}

# What a module may import from outside, beside the standard library; torch layers are free.
OUTSIDE = {
    **dict.fromkeys(LAYERS[0], frozenset()),
    **dict.fromkeys(PURE, frozenset({"numpy"})),
    "kernels": frozenset({"numpy", "numba", "llvmlite"}),
}
# Device kernels stand in files of their own, without numba; only what launches them imports them.
TRITON = "_triton"
OUTSIDE_TRITON = frozenset({"triton"})
LAUNCHERS = {"gockpt.staging.pack_launch"}
NEVER = {"storage": {"torch", "torchvision", "triton", "safetensors"}}
INPUT_AND_OUTPUT = {"io", "mmap", "os", "pathlib", "shutil", "socket", "subprocess", "tempfile"}
PICKLES = {"cloudpickle", "copyreg", "dill", "joblib", "marshal", "pickle", "shelve"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
FORBIDDEN_CALLS = {
    ("torch", "save"),
    ("torch", "load"),
    ("np", "load"),
    ("np", "save"),
    ("numpy", "load"),
    ("numpy", "save"),
    ("os", "_exit"),
    ("sys", "exit"),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's one name: the module it leads to, and where it stands."""

    target: str
    line: int


def imports(module: str, tree: ast.Module, *, package: bool, known: set[str]) -> list[Import]:
    """Return what a module imports, with ``from gockpt import x`` led to the module ``gockpt.x``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + package]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if base == "gockpt" and alias.name == "__version__":
                    continue  # a constant of the parent package, which is loaded anyway
                found.append(Import(inner if inner in known else base, node.lineno))
    return found


def area(module: str) -> str:
    """Return the name that stands in the table of layers: ``gockpt.storage.x`` is ``storage``."""
    return module.split(".")[1]


def inside(module: str, packages: frozenset[str]) -> str:
    """Return a module's name below its area: ``format.manifest`` of ``gockpt.storage.format.manifest``."""
    return f"{module}.__init__".split(".", 2)[2] if module in packages else module.split(".", 2)[2]


def direction(module: str, target: str, packages: frozenset[str]) -> str | None:
    """Say what is wrong with one package module importing another; ``None`` when it may."""
    here, there = area(module), area(target)
    if target.endswith(TRITON) and module not in LAUNCHERS:
        return f"{here} does not launch device kernels"
    for name in (here, there):
        if name not in RANK:
            return f"gockpt.{name} has no place in LAYERS"
    if here == there:
        return order(here, inside(module, packages), inside(target, packages))
    if RANK[there] != RANK[here]:
        return f"{there} stands above {here}" if RANK[there] > RANK[here] else None
    if frozenset({here, there}) in STRANGERS:
        return f"{here} and {there} must not know each other"
    return f"{there} comes after {here}" if PLACE[there] > PLACE[here] else None


def order(package: str, here: str, there: str) -> str | None:
    """Say what is wrong with one module of a package importing another; ``None`` when it may."""
    for name in (here, there):
        if f"{package}.{name}" not in PLACE:
            return f"{package}.{name} has no place in ORDER"
    after = PLACE[f"{package}.{there}"] > PLACE[f"{package}.{here}"]
    return f"{there} comes after {here} in {package}" if after else None


def outside(module: str, root: str) -> str | None:
    """Say what is wrong with a module importing something that is not gockpt; ``None`` when it may."""
    here = area(module)
    if root in PICKLES:
        return f"{root} runs what it reads; checkpoints hold no code"
    if root in NEVER.get(here, ()):
        return f"{here} must not import {root}"
    if root in sys.stdlib_module_names:
        return f"{here} is pure, {root} does I/O" if here in PURE and root in INPUT_AND_OUTPUT else None
    if root == "triton" and not module.endswith(TRITON):
        return f"{module.removeprefix('gockpt.')} holds no device kernels"
    if module.endswith(TRITON):
        return None if root in OUTSIDE_TRITON else f"device kernels must not import {root}"
    if here in OUTSIDE and root not in OUTSIDE[here]:
        return f"{here} must not import {root}"
    return None


def expressions(module: str, tree: ast.Module) -> list[tuple[int, str]]:
    """Return what a module does that only an import rule can't catch: (line, what is wrong)."""
    here, found = area(module), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = (node.value.id, node.attr)
            if name in FORBIDDEN_CALLS and here != "cli":
                found.append((node.lineno, f"{'.'.join(name)} has no place in the library"))
            if name[0] == "os" and name[1] in ENVIRONMENT and here != "cli":
                found.append((node.lineno, "the environment is read by the command line only"))
        if isinstance(node, ast.ImportFrom) and node.module == "os" and here != "cli":
            found += [
                (node.lineno, "the environment is read by the command line only")
                for alias in node.names
                if alias.name in ENVIRONMENT
            ]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"__import__", "import_module", "eval", "exec"}:
                found.append((node.lineno, f"{node.func.id} hides what a module needs"))
            if node.func.id == "open" and here in PURE:
                found.append((node.lineno, f"{here} is pure and opens a file"))
        if isinstance(node, ast.FunctionDef) and node.name == "__del__":
            found.append((node.lineno, "`with`, not `__del__`"))
        if here == "kernels":
            if isinstance(node, ast.Name) and node.id == "prange":
                found.append((node.lineno, "a forked child hangs after numba's thread pool was used"))
            changes_bits = isinstance(node, ast.keyword) and node.arg in {"fastmath", "parallel"}
            if changes_bits and ast.unparse(node.value) != "False":
                found.append((node.value.lineno, f"{node.arg} changes bits"))
    return found


def violations(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Return every broken rule in a set of modules, as ``module:line: what is wrong``."""
    known = {"gockpt", *sources}
    found = []
    for module, source in sources.items():
        tree = ast.parse(source)
        wrong = expressions(module, tree)
        for item in imports(module, tree, package=module in packages, known=known):
            root = item.target.split(".")[0]
            if item.target == "gockpt":
                reason = None if area(module) in LAYERS[-1] else "import from the defining module"
            elif root == "gockpt":
                reason = direction(module, item.target, packages)
            else:
                reason = outside(module, root)
            if reason:
                wrong.append((item.line, reason))
        found += [f"{module}:{line}: {reason}" for line, reason in sorted(set(wrong))]
    return found


def cycle(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Return a chain of modules that import each other; empty when there is none."""
    edges = {
        module: {
            item.target
            for item in imports(module, ast.parse(source), package=module in packages, known=set(sources))
            if item.target in sources and item.target != module
        }
        for module, source in sources.items()
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges[module]):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


def files() -> dict[str, Path]:
    """Return every module of the package but the facade, by import name."""
    found = {}
    for folder, prefix in (("gockpt", ()), ("kernels", ("gockpt",)), ("storage", ("gockpt",))):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if folder == "gockpt" and path.relative_to(REPOSITORY).parts[1] in {"kernels", "storage"}:
                continue
            parts = (*prefix, *path.relative_to(REPOSITORY).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    del found["gockpt"]
    return found


MODULES = files()
PACKAGES = frozenset(name for name, path in MODULES.items() if path.name == "__init__.py")
SOURCES = {name: path.read_text() for name, path in MODULES.items()}


def test_the_package_keeps_every_rule():
    found = violations(SOURCES, PACKAGES)
    assert not found, "\n".join(found)


def test_no_module_imports_itself_in_a_circle():
    assert cycle(SOURCES, PACKAGES) == []


def test_every_module_has_its_place():
    """Names of modules that are gone would hide that a new one of that name stands anywhere."""
    tops = {name for name in MODULES if name.count(".") == 1}
    assert {f"gockpt.{name}" for name in RANK} - {"gockpt.integrations"} == tops
    listed = [f"gockpt.{name}" for name in PLACE if "." in name]
    places = {name.removesuffix(".__init__") for name in listed}
    inner = {name for name in MODULES if name.count(".") > 1}
    assert places | PACKAGES == inner | PACKAGES
    assert len(listed) == sum(len(text.split()) for text in ORDER.values())


def test_the_layers_are_documented():
    table = (REPOSITORY / "CONTRIBUTING.md").read_text().split("| Package or module |")[1]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    layers = [name for names in LAYERS for name in names if name != "integrations"]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == layers


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("gockpt.core.boxes", "from gockpt.storage import store", "storage stands above core"),
        ("gockpt.storage.a", "from gockpt.kernels import replay", "must not know each other"),
        ("gockpt.loading.load", "def f():\n    from gockpt import saving", "must not know each other"),
        ("gockpt.saving.a", "from ..checkpointer import wait", "checkpointer stands above saving"),
        ("gockpt.saving", "from .. import checkpointer", "checkpointer stands above saving"),
        ("gockpt.state.collect", "from gockpt import load", "defining module"),
        ("gockpt.novelty", "from gockpt import errors", "no place in LAYERS"),
        (
            "gockpt.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gockpt.state.collect",
            "above",
        ),
        ("gockpt.uploads", "def f():\n    import gockpt.loading.load", "loading comes after uploads"),
        ("gockpt.registry", "from gockpt.checkpointer import wait", "checkpointer comes after registry"),
        ("gockpt.saving.memory", "from gockpt.saving.engine import Engine", "engine comes after memory"),
        ("gockpt.saving.memory", "from gockpt.saving import engine", "engine comes after memory in saving"),
        ("gockpt.saving.novelty", "import gockpt.saving.engine", "saving.novelty has no place in ORDER"),
        ("gockpt.saving.memory", "import gockpt.saving.novelty", "saving.novelty has no place in ORDER"),
        (
            "gockpt.storage.format.manifest",
            "if TYPE_CHECKING:\n    from gockpt.storage.read.find import find",
            "read.find comes after format.manifest in storage",
        ),
        ("gockpt.errors", "import numpy as np", "errors must not import numpy"),
        ("gockpt.core.arena_layout", "import torch", "core must not import torch"),
        ("gockpt.planning.planner", "import os.path", "pure"),
        ("gockpt.planning.planner", "open('x')", "pure"),
        ("gockpt.kernels.a", "import torch", "kernels must not import torch"),
        ("gockpt.kernels.a", "import triton", "holds no device kernels"),
        ("gockpt.staging.pack_launch", "def f():\n    import triton", "holds no device kernels"),
        ("gockpt.kernels.a_triton", "import numba", "device kernels must not import numba"),
        ("gockpt.kernels.a_triton", "import torch", "kernels must not import torch"),
        ("gockpt.state.collect", "from gockpt.kernels.pack_triton import pack", "does not launch"),
        ("gockpt.kernels.a", "from gockpt.kernels import pack_triton", "does not launch"),
        ("gockpt.kernels.a", "from numba import prange\nfor i in prange(3): ...", "hangs"),
        ("gockpt.kernels.a", "njit(fastmath=True)", "fastmath changes bits"),
        ("gockpt.storage.a", "def f():\n    import torch.distributed", "storage must not import torch"),
        ("gockpt.state.value_encoder", "from pickle import dumps", "checkpoints hold no code"),
        ("gockpt.state.value_encoder", "torch.load('x')", "torch.load"),
        ("gockpt.state.collect", "os.environ['A']", "environment"),
        ("gockpt.state.collect", "from os import getenv", "environment"),
        ("gockpt.saving.a", "sys.exit(1)", "sys.exit"),
        ("gockpt.saving.a", "import_module('gockpt.cli')", "hides"),
        ("gockpt.saving.a", "class A:\n    def __del__(self): ...", "with"),
    ],
)
def test_a_broken_rule_is_found(module, source, reason):
    others = (
        *("saving", "saving.engine", "checkpointer", "kernels", "kernels.replay", "kernels.pack_triton"),
        *("storage.store", "state", "cli", "errors"),
    )
    known = {f"gockpt.{name}": "" for name in others}
    found = violations({**known, module: source}, frozenset({"gockpt.saving"}))
    assert len(found) == 1, found
    assert reason in found[0]


def test_what_is_allowed_passes():
    sources = {
        "gockpt.errors": "import math",
        "gockpt.core.boxes": "from gockpt import errors\nimport numpy",
        "gockpt.kernels.a_triton": "import triton.language as tl",
        "gockpt.staging.pack_launch": "def f():\n    from gockpt.kernels.a_triton import a",
        "gockpt.kernels.a": "import numba\n@njit(fastmath=False, nogil=True)\ndef f(): ...",
        "gockpt.storage.a": "import os, zarr\nfrom gockpt import __version__\nopen('x')",
        "gockpt.saving.engine": "import torch\nfrom gockpt.saving import session",
        "gockpt.saving.session": "",
        "gockpt.cli": "import os, gockpt, sys\nos.environ['A']\nsys.exit(0)",
    }
    assert violations(sources) == []


def test_a_circle_is_found():
    sources = {
        "gockpt.state.collect": "from gockpt.state.value_encoder import a",
        "gockpt.state.value_encoder": "def f():\n    from gockpt.replay import rules",
        "gockpt.replay.rules": "import gockpt.state.collect",
    }
    assert cycle(sources) == [
        "gockpt.replay.rules",
        "gockpt.state.collect",
        "gockpt.state.value_encoder",
        "gockpt.replay.rules",
    ]
    for_types = "if TYPE_CHECKING:\n    import gockpt.state.collect"
    assert cycle({**sources, "gockpt.replay.rules": for_types}) == cycle(sources)
    assert cycle({**sources, "gockpt.replay.rules": ""}) == []


def test_every_package_is_built():
    """A package that pyproject.toml doesn't list works in a checkout and is missing in the wheel."""
    tables = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(tables["packages"]) == sorted({"gockpt", *PACKAGES})
    for name, folder in tables["package-dir"].items():
        path = MODULES[name].parent if name in MODULES else REPOSITORY / "gockpt"
        assert REPOSITORY / folder == path


def test_the_links_lead_to_the_sources():
    """Type checkers and editors find kernels/ and storage/ through them; no other copy exists."""
    for name in ("kernels", "storage"):
        link = REPOSITORY / "gockpt" / name
        assert link.is_symlink()
        assert link.resolve() == REPOSITORY / name
