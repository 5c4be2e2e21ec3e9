"""What the device kernels are compiled to: wide accesses, no spills. No device is needed to compile.

Registers are bounded so that a kernel beside the training step leaves room for it; the bounds are a little
above what the compiler takes today.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gockpt.kernels.fingerprint_triton import fingerprint
from gockpt.kernels.gradient16_triton import narrow_each, quantise, quantise_each, reset
from gockpt.kernels.launch_tables import WORDS
from gockpt.kernels.pack_triton import pack

NVIDIA = ("80", "90", "100")
TARGETS = (*NVIDIA, "gfx942")
NARROW = (8, 4, 2, 1)
TYPES = {
    "addresses": "*i64",
    "places": "*i64",
    "blocks": "*i32",
    "buffer": "*u8",
    "sums": "*i64",
    "payload": "*u16",
    "codes": "*u8",
    "slots": "*i32",
    "side": "*u32",
    "counter": "*i32",
    "count": "i32",
    "capacity": "i32",
}


@dataclass(frozen=True)
class Code:
    """What was counted in one kernel's code."""

    loads: int  # of 128 bits
    stores: int
    registers: int
    spilled: int  # bytes of memory per thread, of whatever kind
    inexact: int  # instructions that fuse or flush


@dataclass(frozen=True)
class Case:
    """One way a kernel is specialised for memory at multiples of 16 bytes, and what it must compile to.

    ``bytes_in`` and ``bytes_out`` are what a whole block reads and writes; a quantised one may be raw, too.
    """

    kernel: object
    constants: dict
    bytes_in: int
    bytes_out: int
    registers: int


WIDE = {
    "pack": Case(pack, {"WIDTH": 16, "UNPACK": False, "WORDS": WORDS}, 4 * WORDS, 4 * WORDS, 96),
    "unpack": Case(pack, {"WIDTH": 16, "UNPACK": True, "WORDS": WORDS}, 4 * WORDS, 4 * WORDS, 96),
    "quantise float32": Case(quantise, {"SIZE": 4, "WIDTH": 16}, 4096, 2048 + 4096, 64),
    "quantise bfloat16": Case(quantise, {"SIZE": 2, "WIDTH": 16}, 2048, 2048 + 4096, 64),
    "quantise each": Case(quantise_each, {"WIDTH": 16}, 4096, 2048 + 4096, 64),
    "narrow each": Case(narrow_each, {"WIDTH": 16}, 4096, 2048, 64),
    "fingerprint": Case(fingerprint, {"WIDTH": 16, "WORDS": WORDS}, 8 * WORDS, 0, 96),
}


def compiled(kernel, constants, target):
    """Compile a kernel for one target, its tables and buffers at multiples of 16 bytes."""
    names = kernel.arg_names
    signature = {name: TYPES.get(name, "constexpr") for name in names}
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    nvidia = target in NVIDIA
    where = GPUTarget("cuda", int(target), 32) if nvidia else GPUTarget("hip", target, 64)
    result = triton.compile(source, target=where, options={"enable_fp_fusion": False})
    return on_nvidia(result) if nvidia else on_amd(result.asm["amdgcn"])


def on_nvidia(result):
    text = result.asm["ptx"]
    file = triton.knobs.cache.dir + "/code.cubin"
    with open(file, "wb") as out:
        out.write(result.asm["cubin"])
    tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file]
    used = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", used)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Code(
        loads=len(re.findall(r"\bld\.global\.(?:v4\.b32|v2\.b64)", text)),
        stores=len(re.findall(r"\bst\.global\.v4\.b32", text)),
        registers=registers,
        spilled=stack + local + len(re.findall(r"\.local\b", text)),
        inexact=len(re.findall(r"\.ftz\b|\bfma\b", text)),
    )


def on_amd(text):
    fields = {name: int(value) for name, value in re.findall(r"^[\s-]*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return Code(
        loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text)),
        stores=len(re.findall(r"\b(?:global|buffer)_store_dwordx4", text)),
        registers=fields["vgpr_count"] + fields["agpr_count"],
        spilled=sum(fields[f"{kind}_spill_count"] for kind in ("vgpr", "sgpr"))
        + fields["private_segment_fixed_size"],
        # v_fma_mix* here is the exact product with a power of two, plus -0, rounded to float16 once.
        inexact=len(re.findall(r"\bv_(?:pk_)?(?:fma|mad|mac)(?!_mix)\w*_f(?:32|16)", text)),
    )


def everything():
    """Compile each kernel for each target, in every way that a test asks about."""
    found = {}
    for target in TARGETS:
        for name, case in WIDE.items():
            found[f"{name} {target}"] = compiled(case.kernel, case.constants, target)
        for width in NARROW:
            constants = {**WIDE["pack"].constants, "WIDTH": width}
            found[f"pack {width} {target}"] = compiled(pack, constants, target)
            constants = {**WIDE["fingerprint"].constants, "WIDTH": width}
            found[f"fingerprint {width} {target}"] = compiled(fingerprint, constants, target)
        found[f"quantise unaligned {target}"] = compiled(quantise, {"SIZE": 4, "WIDTH": 4}, target)
        for kernel in (quantise_each, narrow_each):
            found[f"{kernel.fn.__name__} unaligned {target}"] = compiled(kernel, {"WIDTH": 4}, target)
        found[f"reset {target}"] = compiled(reset, {}, target)
    return found


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Everything, compiled in a process of its own: after Triton has interpreted, it can't compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Code(**counts) for name, counts in json.loads(done.stdout).items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WIDE)
def test_whole_blocks_move_128_bits_at_a_time(code, name, target):
    case, found = WIDE[name], code[f"{name} {target}"]
    threads = 4 * (32 if target in NVIDIA else 64)
    # Where a thread has less than 16 bytes of a block, it can't move more than it has.
    assert found.loads >= case.bytes_in // (16 * threads)
    assert found.stores >= case.bytes_out // (16 * threads)
    assert found.registers <= case.registers


def test_nothing_is_spilled_and_no_bits_are_changed(code):
    for name, found in code.items():
        assert found.spilled == 0, name
        assert found.inexact == 0, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", NARROW)
def test_less_aligned_memory_is_moved_in_narrower_pieces(code, width, target):
    narrow, wide = code[f"pack {width} {target}"], code[f"pack {target}"]
    assert narrow.loads < wide.loads
    assert narrow.stores == 0 < wide.stores
    assert code[f"fingerprint {width} {target}"].loads < code[f"fingerprint {target}"].loads


@pytest.mark.parametrize("target", NVIDIA)
def test_wide_accesses_come_from_what_is_promised(code, target):
    for name in ("quantise", "quantise_each", "narrow_each"):
        assert code[f"{name} unaligned {target}"].loads == 0


def test_a_spill_would_be_seen():
    text = ".vgpr_count: 4\n.agpr_count: 0\n.vgpr_spill_count: 3\n.sgpr_spill_count: 0\n"
    assert on_amd(text + ".private_segment_fixed_size: 16\n").spilled == 19


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: asdict(found) for name, found in everything().items()}))
