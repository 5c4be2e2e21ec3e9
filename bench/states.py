"""The states that storage benches write and read: names, shapes, and values that no codec or cache can guess.

A: the 148 parameters of GPT-2 124M with Adam's two moments, float32: 444 arrays, 1.5 GB, most of them small.
B: 40 tensors of 16.8 to 419 MB, 3 GB. C: 15,000 tensors of 64 bytes. D: 20,000 tensors of 50 KB, 1 GB.
Tiny: a toy, for showing that something runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MANY", "STATES", "filled"]

Shapes = dict[tuple[str, ...], tuple[int, ...]]


def _gpt2(*, vocabulary: int, context: int, width: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "wte.weight", (vocabulary, width)
    yield "wpe.weight", (context, width)
    for layer in range(layers):
        for name, shape in (
            ("ln_1.weight", (width,)),
            ("ln_1.bias", (width,)),
            ("attn.c_attn.weight", (width, 3 * width)),
            ("attn.c_attn.bias", (3 * width,)),
            ("attn.c_proj.weight", (width, width)),
            ("attn.c_proj.bias", (width,)),
            ("ln_2.weight", (width,)),
            ("ln_2.bias", (width,)),
            ("mlp.c_fc.weight", (width, 4 * width)),
            ("mlp.c_fc.bias", (4 * width,)),
            ("mlp.c_proj.weight", (4 * width, width)),
            ("mlp.c_proj.bias", (width,)),
        ):
            yield f"h.{layer}.{name}", shape
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def _with_moments(parameters: Iterator[tuple[str, tuple[int, ...]]]) -> Shapes:
    shapes: Shapes = {}
    for name, shape in parameters:
        shapes["model", name] = shape
        shapes["optimizer", name, "exp_avg"] = shape
        shapes["optimizer", name, "exp_avg_sq"] = shape
    return shapes


def _state_a() -> Shapes:
    return _with_moments(_gpt2(vocabulary=50257, context=1024, width=768, layers=12))


def _state_b() -> Shapes:
    rows = [2048] * 24 + [8192] * 10 + [32768] * 4 + [51200] * 2
    return {("model", f"layers.{at}.weight"): (n, 2048) for at, n in enumerate(rows)}


def _state_c() -> Shapes:
    return {("model", f"layers.{at}.bias"): (16,) for at in range(15_000)}


def _state_d() -> Shapes:
    return {("model", f"layers.{at}.weight"): (100, 125) for at in range(20_000)}


def _tiny() -> Shapes:
    return _with_moments(_gpt2(vocabulary=500, context=64, width=64, layers=2))


STATES = {"A": _state_a, "B": _state_b, "C": _state_c, "D": _state_d, "tiny": _tiny}
MANY = ("C", "D")
"""The states of very many tensors."""


def filled(shapes: Shapes) -> dict[tuple[str, ...], torch.Tensor]:
    """Return float32 tensors of these shapes with normally distributed values, as parameters have."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
