"""The machine instructions and calls that kernels are written in, as Numba's intrinsics.

Contract: each is one instruction or one call, with no hidden allocation. ``fma`` rounds once; nothing
else in this package ever fuses a multiply with an add (``fastmath`` is off everywhere). Kernels import these
from :mod:`gockpt.kernels.numba_compile`, which does without them where Numba can't compile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, register_jitable

from gockpt.kernels.kernel_cache import Kept

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "JIT",
    "as_float32",
    "as_uint8",
    "call_vml",
    "compiled",
    "fma",
    "fma64",
    "load_uint64",
    "store_uint64",
]

JIT: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "boundscheck": False,
}
"""How every kernel is compiled: serial, without the GIL, IEEE arithmetic as written."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile ``function`` as a serial kernel, at its first call, or take it from the disk."""
    kernel = njit(**JIT)(function)
    # Numba's own cache refuses to decorate where nothing can be written, and raises for damaged files.
    kernel._cache = Kept(function)  # noqa: SLF001
    return kernel


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001 - numba's own protocol
    """``a * b + c`` of three float32, rounded once."""
    if not all(isinstance(t, types.Float) and t.bitwidth == 32 for t in (a, b, c)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def fma64(typingctx: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001 - numba's own protocol
    """``a * b + c`` of three float64, rounded once."""
    if not all(isinstance(t, types.Float) and t.bitwidth == 64 for t in (a, b, c)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), codegen


@intrinsic
def call_vml(typingctx: Any, function: Any, n: Any, source: Any, target: Any, mode: Any) -> Any:  # noqa: ARG001
    """Call a vector-math function ``(n, const float*, float*, int64 mode)`` by its address.

    All five arguments are int64 (a callee that takes an int32 ``n`` reads its lower half). An address is a
    run-time value, so compiled kernels can be kept on disk.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        address, count, src, dst, flags = args
        i64 = ir.IntType(64)
        pointer = ir.FloatType().as_pointer()
        prototype = ir.FunctionType(ir.VoidType(), [i64, pointer, pointer, i64])
        builder.call(
            builder.inttoptr(address, prototype.as_pointer()),
            [count, builder.inttoptr(src, pointer), builder.inttoptr(dst, pointer), flags],
        )
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, i64), codegen


@intrinsic
def load_uint64(typingctx: Any, address: Any, index: Any) -> Any:  # noqa: ARG001
    """Load the ``index``-th of the uint64 that begin at ``address``, which may be any."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        first = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(first, [args[1]]), align=1)

    return types.uint64(types.int64, types.int64), codegen


@intrinsic
def store_uint64(typingctx: Any, address: Any, index: Any, value: Any) -> Any:  # noqa: ARG001
    """Store the ``index``-th of the uint64 that begin at ``address``, which may be any."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        first = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store(args[2], builder.gep(first, [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), codegen


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return pointer


_float32_pointer = _pointer_to(types.float32)
_uint8_pointer = _pointer_to(types.uint8)


@register_jitable
def as_float32(address: int, n: int) -> Any:
    """Return the ``n`` float32 at ``address`` as an array. The caller vouches for the memory."""
    return carray(_float32_pointer(address), (n,))


@register_jitable
def as_uint8(address: int, n: int) -> Any:
    """Return the ``n`` bytes at ``address`` as an array. The caller vouches for the memory."""
    return carray(_uint8_pointer(address), (n,))
