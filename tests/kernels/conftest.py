"""The Triton kernels as the interpreter runs them: the same sources, loaded a second time."""

from __future__ import annotations

import importlib
import sys

import pytest

TRITON = ("pack_triton", "gradient16_triton", "fingerprint_triton")


@pytest.fixture(scope="session")
def copies():
    """The kernel modules, loaded while Triton is told to interpret: it decides when it decorates."""
    import triton

    names = [f"gockpt.kernels.{name}" for name in TRITON]
    before = {name: sys.modules.pop(name, None) for name in names}
    loaded = {}
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            for name in names:
                loaded[name.rpartition(".")[2]] = importlib.import_module(name)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return loaded


@pytest.fixture
def interpreted(copies, monkeypatch):
    """Put the interpreted kernels in the place of the compiled ones, for one test."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # Triton's own functions were decorated when it was imported.
    for name in ("sum", "max"):
        function = getattr(tl, name)
        if isinstance(function, JITFunction):
            monkeypatch.setattr(tl, name, InterpretedFunction(function.fn))
    for name, module in copies.items():
        monkeypatch.setitem(sys.modules, f"gockpt.kernels.{name}", module)
    return copies


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Return where a kernel runs: interpreted on the host, or with `-m gpu` compiled on a device."""
    import torch

    if request.param == "cpu":
        request.getfixturevalue("interpreted")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
