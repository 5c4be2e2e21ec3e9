"""Tensors as arrays of a checkpoint: which can be stored, and their specs."""

from __future__ import annotations

from typing import TypeGuard

import torch

from gockpt.core.array_spec import DTYPES, MAX_NDIM, ArraySpec

__all__ = [
    "DTYPE_OF",
    "NAME_OF",
    "is_subclass",
    "may_alias_itself",
    "refusal",
    "spec_of",
    "to_host",
]

DTYPE_OF: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
"""The torch dtype of each stored dtype's name."""

NAME_OF: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPE_OF.items()}
"""The stored name of each torch dtype that can be stored."""

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_ORDINARY_DISPATCH = torch.Tensor.__torch_dispatch__

# By the module of a class, or of one that it inherits from.
_WAYS_OUT = {
    "torch.distributed": "tensors that are spread over several processes are not saved: pass its local part",
    "torch._subclasses": "it stands for a tensor and has no data: make the model outside of that mode",
    "torch.masked": "pass .get_data() and .get_mask() as tensors of their own",
}


def is_subclass(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether a tensor is saved as the inner tensors that its class's ``__tensor_flatten__`` names."""
    if type(value) in _PLAIN_TYPES or not isinstance(value, torch.Tensor):
        return False
    kind = type(value)
    return (
        kind.__torch_dispatch__ is not _ORDINARY_DISPATCH
        and hasattr(kind, "__tensor_flatten__")
        and hasattr(kind, "__tensor_unflatten__")
        and not value.is_nested
        and _special_way_out(kind) is None
    )


def refusal(tensor: torch.Tensor) -> str | None:
    """Return why a tensor can't be stored exactly as an array, and the way out; ``None`` if it can.

    A subclass is accepted if its bytes are its whole value. One with a ``__torch_dispatch__`` of its own
    (DTensor, quantised and other wrapper tensors) is refused.
    """
    if type(tensor) not in _PLAIN_TYPES and (why := _subclass_refusal(tensor)):
        return why
    if tensor.is_nested:
        return (
            "it is a nested (ragged) tensor; keep its values and lengths, or its parts (.unbind()), instead"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - torch has no public name for it
        return "it belongs to a transform of torch.func (vmap, grad) that is under way; save outside of it"
    if torch._is_functional_tensor(tensor):  # noqa: SLF001 - see above
        return "it belongs to a functionalisation that is under way; save outside of it"
    # Quantised tensors have dtypes of their own, so this is all it takes for nearly every tensor.
    if (
        tensor.layout is torch.strided
        and tensor.dtype in NAME_OF
        and not tensor.is_meta
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor._is_zerotensor()  # noqa: SLF001 - see above
        and tensor.dim() <= MAX_NDIM
    ):
        return None
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; convert it with .to_dense()"
    if tensor.is_quantized:
        return "it is quantised; keep .int_repr() and its scale and zero point instead"
    if tensor.is_meta:
        return "it is on the meta device and has no data; materialise it first (.to_empty and a load)"
    if tensor.dtype not in NAME_OF:
        return f"its dtype {tensor.dtype} can't be stored; convert it to one of {', '.join(DTYPES)}"
    if tensor.dim() > MAX_NDIM:
        return f"it has {tensor.dim()} dimensions; at most {MAX_NDIM} are stored"
    if tensor._is_zerotensor():  # noqa: SLF001 - see above
        return "it has no memory but stands for zeros; make it an ordinary one (.clone())"
    return "it is a lazily conjugated or negated view; call .resolve_conj().resolve_neg()"


def _subclass_refusal(tensor: torch.Tensor) -> str | None:
    kind = type(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        return "it is not initialised yet; run one forward before the first save"
    if kind.__torch_dispatch__ is _ORDINARY_DISPATCH or tensor.is_nested:
        return None
    name = f"{kind.__module__}.{kind.__qualname__}"
    if way_out := _special_way_out(kind):
        return f"it is a {name}; {way_out}"
    if is_subclass(tensor):
        return (
            f"it is a {name}, which is saved as a parameter, buffer or optimizer state, but not here: pass "
            "its inner tensors, or what .dequantize() gives"
        )
    return (
        f"it is a {name}, whose value is more than one array, and its class has no __tensor_flatten__ and "
        "__tensor_unflatten__ to take it apart: pass ordinary tensors"
    )


def _special_way_out(kind: type) -> str | None:
    for base in kind.__mro__:
        for module, way_out in _WAYS_OUT.items():
            if base.__module__ == module or base.__module__.startswith(f"{module}."):
                return way_out
    return None


def spec_of(name: tuple[str, ...], tensor: torch.Tensor) -> ArraySpec:
    """Return the spec of the array that stores a tensor for which :func:`refusal` is ``None``."""
    return ArraySpec(name, tuple(tensor.shape), NAME_OF[tensor.dtype])


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's values as a contiguous CPU tensor with memory of its own."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def may_alias_itself(tensor: torch.Tensor) -> bool:
    """Return whether two indices may refer to one element in memory (as after ``expand``).

    Never ``False`` for a tensor that overlaps; ``True`` for some unusual ``as_strided`` views that don't.
    """
    if tensor.is_contiguous():
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size == 1:
            continue
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False
