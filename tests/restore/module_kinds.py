"""Modules that have something of their own to say when they are loaded, each as real libraries have them.

A kind is a function that returns the module to save, a function that makes one to load into, and a function
that returns what the loaded one has derived. ``KINDS`` is the table of all.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    default_observer,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

KINDS = {}


def kind(function):
    """Enter a kind into the table."""
    KINDS[function.__name__] = function
    return function


def nothing(_):
    """Derive nothing."""


class Inverse(nn.Module):
    """Refreshes what it derives from its weight after each load."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.calls = 0
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.refresh()

    def refresh(self):
        self.calls += 1
        self.inverse = torch.linalg.inv(self.w.detach())


@kind
def post_hook():
    return Inverse(), Inverse, lambda m: (m.inverse, m.calls)


@kind
def post_hooks_below():
    def make():
        return nn.Sequential(
            nn.Linear(4, 4), nn.ModuleDict({"a": Inverse(), "b": nn.Linear(1, 1)}), Inverse()
        )

    return make(), make, lambda m: (m[1]["a"].inverse, m[2].inverse, m[1]["a"].calls, m[2].calls)


@kind
def post_hook_that_forgives():
    """As libraries do for frozen parts that were never saved."""

    def make():
        model = nn.ModuleDict({"head": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})

        def forgive(_, keys):
            keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith("frozen.")]

        model.register_load_state_dict_post_hook(forgive)
        return model

    return nn.ModuleDict({"head": nn.Linear(2, 2)}), make, nothing


@kind
def post_hook_that_refuses():
    def make():
        model = nn.Linear(2, 2)
        model.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.append("licence"))
        return model

    return nn.Linear(2, 2), make, nothing


def renaming(old, new, module, *, private, with_module=True):
    """Let a module take keys under an old name."""
    calls = Counter()

    def hook(*arguments):
        state, prefix, metadata, strict, missing, unexpected, errors = arguments[-7:]
        assert strict is True
        assert (type(missing), type(unexpected), type(errors), type(metadata)) == (list, list, list, dict)
        calls["all"] += 1
        for key in list(state):
            if key.startswith(prefix + old):
                state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)

    if private:
        module._register_load_state_dict_pre_hook(hook, with_module=with_module)
    else:
        module.register_load_state_dict_pre_hook(hook)
    module.calls = calls
    return module


@kind
def pre_hook_that_renames_all():
    saved = nn.ModuleDict({"old": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))})

    def make():
        made = nn.ModuleDict({"new": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))})
        return renaming("old.", "new.", made, private=False)

    return saved, make, lambda m: m.calls


@kind
def private_pre_hook_below():
    saved = nn.ModuleDict({"a": nn.ModuleDict({"w1": nn.Linear(2, 2)}), "b": nn.Linear(2, 3)})

    def make():
        below = nn.ModuleDict({"w2": nn.Linear(2, 2)})
        return nn.ModuleDict({"a": renaming("w1", "w2", below, private=True), "b": nn.Linear(2, 3)})

    return saved, make, lambda m: m["a"].calls


@kind
def private_pre_hook_without_module():
    def make():
        return renaming("weight", "weight", nn.Linear(2, 2), private=True, with_module=False)

    return make(), make, lambda m: m.calls


@kind
def pre_hook_that_converts():
    """Splits a fused weight, and drops what is not needed any more."""
    saved = nn.Module()
    saved.qkv, saved.gone = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(1))

    def split(module, state, prefix, *_):
        state[prefix + "q"], state[prefix + "k"], state[prefix + "v"] = state.pop(prefix + "qkv").chunk(3)
        state.pop(prefix + "gone", None)

    def make():
        made = nn.Module()
        for name in "qkv":
            made.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
        made.register_load_state_dict_pre_hook(split)
        return made

    return saved, make, nothing


@kind
def pre_hook_that_resizes():
    """As gpytorch's modules do that take any shape."""

    def resize(module, state, prefix, *_):
        for name, param in module.named_parameters(recurse=False):
            if prefix + name in state and state[prefix + name].shape != param.shape:
                param.data = torch.zeros_like(state[prefix + name])

    def make(size=1):
        made = nn.Module()
        made.lengthscale = nn.Parameter(torch.rand(size))
        made.register_load_state_dict_pre_hook(resize)
        return made

    return make(5), make, nothing


class Old(nn.Module):
    """Saves a number that is no tensor of its own."""

    _version = 1

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.temperature = 0.5
        self.versions = []

    def _save_to_state_dict(self, out, prefix, keep_vars):
        super()._save_to_state_dict(out, prefix, keep_vars)
        out[prefix + "temperature"] = torch.tensor(self.temperature)

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.versions.append(metadata.get("version"))
        value = float(state.pop(prefix + "temperature"))
        self.temperature = math.log(value) if (metadata.get("version") or 1) < self._version else value
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class New(Old):
    """Keeps the logarithm instead."""

    _version = 2


@kind
def version_that_converts():
    return Old(), New, lambda m: (m.temperature, m.versions)


@kind
def version_that_converts_below():
    saved, made = (lambda of: nn.ModuleDict({"x": nn.Sequential(nn.Linear(1, 1), of())})), New
    return saved(Old), lambda: saved(made), lambda m: (m["x"][1].temperature, m["x"][1].versions)


@kind
def version_that_stays():
    return New(), New, lambda m: (m.temperature, m.versions)


@kind
def metadata_of_hooks():
    """A hook notes something beside the version, as old spectral norm does."""

    def make(mode=None):
        made = nn.Linear(2, 2)
        made.mode = mode

        def note(module, state, prefix, local):
            local["mode"] = {"name": module.mode, "sizes": (1, 2)}

        made._register_state_dict_hook(note)
        made.register_load_state_dict_pre_hook(
            lambda module, state, prefix, local, *_: setattr(module, "mode", local.get("mode"))
        )
        return made

    return make("fast"), make, lambda m: m.mode


class Half(nn.Module):
    """Saves what nothing takes back."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.scale = torch.rand(1)

    def _save_to_state_dict(self, out, prefix, keep_vars):
        super()._save_to_state_dict(out, prefix, keep_vars)
        out[prefix + "scale"] = self.scale


@kind
def leftover_key():
    return Half(), Half, nothing


@kind
def leftover_key_below():
    def make():
        return nn.Sequential(nn.Linear(2, 2), Half())

    return make(), make, nothing


@kind
def leftover_of_a_hook():
    def make():
        made = nn.Sequential(nn.Linear(2, 2))
        made._register_state_dict_hook(lambda m, state, prefix, _: state.update({prefix + "note": "hello"}))
        return made

    return make(), make, nothing


class FourBit(nn.Linear):
    """Saves parts of a quantised weight below the weight's own name, as bitsandbytes' Linear4bit does."""

    def _save_to_state_dict(self, out, prefix, keep_vars):
        super()._save_to_state_dict(out, prefix, keep_vars)
        out[prefix + "weight.absmax"] = self.weight.abs().max(1).values.detach()
        out[prefix + "weight.quant_state.nf4"] = torch.arange(8, dtype=torch.uint8)


@kind
def parts_below_a_weight():
    def make():
        return nn.Sequential(FourBit(4, 4), nn.Linear(4, 1))

    return make(), make, nothing


class Extra(nn.Module):
    """Has extra state, and looks at its own weight when it takes it back."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.scale = float(self.w.detach().sum())
        self.child = nn.Linear(1, 1)

    def get_extra_state(self):
        return {"scale": self.scale, "amax": self.w.detach() * 2}

    def set_extra_state(self, state):
        self.scale = (state["scale"], state["amax"], self.w.detach().clone())


@kind
def extra_state():
    def make():
        return nn.Sequential(Extra(), Extra())

    return make(), make, lambda m: (m[0].scale, m[1].scale)


@kind
def extra_state_that_nothing_takes():
    return nn.Sequential(Extra()), lambda: nn.Sequential(nn.ModuleDict({"child": nn.Linear(1, 1)})), nothing


@kind
def extra_state_that_was_not_saved():
    saved = nn.ModuleDict({"0": nn.ParameterDict({"w": torch.randn(3)})})
    saved["0"].child = nn.Linear(1, 1)
    return saved, lambda: nn.ModuleDict({"0": Extra()}), nothing


class Metric(nn.Module):
    """Keeps its states as plain attributes, as torchmetrics does."""

    def __init__(self):
        super().__init__()
        self._defaults = {"total": torch.tensor(0.0), "seen": []}
        self.total, self.seen = torch.tensor(0.0), []

    def state_dict(self, destination=None, prefix="", keep_vars=False):
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in self._defaults:
            value = getattr(self, key)
            destination[prefix + key] = [one.clone() for one in value] if key == "seen" else value.clone()
        return destination

    def _load_from_state_dict(self, state, prefix, *rest):
        for key in self._defaults:
            if prefix + key in state:
                setattr(self, key, state.pop(prefix + key))
        super()._load_from_state_dict(state, prefix, *rest)


@kind
def metric():
    def make():
        return nn.ModuleDict({"net": nn.Linear(2, 2), "metric": Metric()})

    model = make()
    model["metric"].total, model["metric"].seen = torch.tensor(3.5), [torch.arange(2), torch.ones(1)]
    return model, make, lambda m: (m["metric"].total, m["metric"].seen)


@kind
def metric_alone():
    model = Metric()
    model.total = torch.tensor(2.0)
    return model, Metric, lambda m: (m.total, m.seen)


def trained(model, *sizes):
    for _ in range(3):
        model(torch.randn(*sizes))
    return model


@kind
def lazy_modules():
    def make():
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))

    return trained(make(), 5, 3), make, lambda m: (type(m[0].weight), type(m[1].running_mean))


@kind
def lazy_modules_that_ran():
    def make():
        return trained(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), 5, 3)

    return make(), make, lambda m: (type(m[0].weight), type(m[0]))


@kind
def lazy_modules_of_another_size():
    def make(size=2):
        return trained(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)), 5, size)

    return make(3), make, nothing


@kind
def norms():
    def make():
        return nn.Sequential(
            nn.BatchNorm1d(3),
            nn.InstanceNorm1d(3, track_running_stats=True),
            nn.SyncBatchNorm(3),
            nn.LayerNorm(3),
        )

    model = make()
    trained(model[:2], 4, 3, 3)
    return model, make, nothing


@kind
def norm_of_version_1():
    class OldNorm(nn.BatchNorm1d):
        _version = 1

    def forget(module, state, prefix, _):
        del state[prefix + "num_batches_tracked"]

    saved = trained(nn.Sequential(OldNorm(3)), 4, 3)
    saved[0]._register_state_dict_hook(forget)
    return saved, lambda: nn.Sequential(nn.BatchNorm1d(3)), nothing


@kind
def norm_without_its_counter():
    def make(**options):
        return nn.Sequential(nn.BatchNorm1d(3, **options))

    return make(track_running_stats=False), make, nothing


@kind
def spectral_norm():
    def make():
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3))

    return trained(make(), 2, 3), make, lambda m: m.eval()(torch.ones(1, 3))


@kind
def spectral_norm_by_parametrization():
    def make():
        return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3))

    return trained(make(), 2, 3), make, lambda m: m.eval()(torch.ones(1, 3))


@kind
def weight_norm_by_parametrization():
    def make():
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))

    return make(), make, lambda m: m(torch.ones(1, 3))


@kind
def weight_norm_saved_by_its_older_form():
    saved = nn.Sequential(nn.Linear(3, 2))
    weight = saved[0].weight.detach()
    del saved[0]._parameters["weight"]
    saved[0].register_parameter("weight_g", nn.Parameter(weight.norm(dim=1, keepdim=True)))
    saved[0].register_parameter("weight_v", nn.Parameter(weight.clone()))
    return (
        saved,
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))),
        lambda m: m(torch.ones(1, 3)),
    )


@kind
def orthogonal():
    def make():
        return nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)))

    return make(), make, lambda m: m(torch.ones(1, 3))


@kind
def observers():
    def make():
        return nn.Sequential(
            MinMaxObserver(),
            PerChannelMinMaxObserver(),
            MovingAveragePerChannelMinMaxObserver(),
            default_observer(),
        )

    saved = make()
    for part in saved:
        part(torch.randn(4, 3))
    return saved, make, lambda m: [part.calculate_qparams() for part in m if part.min_val.numel()]


@kind
def histogram_observer():
    saved = trained(HistogramObserver(bins=8), 4, 3)
    return saved, lambda: HistogramObserver(bins=8), lambda m: m.calculate_qparams()


@kind
def fake_quantize():
    def make():
        per_channel = MovingAveragePerChannelMinMaxObserver.with_args(
            ch_axis=0, qscheme=torch.per_channel_affine
        )
        made = FakeQuantize(observer=per_channel, quant_min=0, quant_max=255)
        return nn.ModuleDict({"net": nn.Linear(3, 4), "fq": made})

    saved = make()
    trained(saved["fq"], 4, 3)
    return saved, make, lambda m: m["fq"](torch.ones(4, 3))


@kind
def qat_model():
    def make():
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        return torch.ao.quantization.prepare_qat(model)

    return trained(make(), 5, 3), make, lambda m: m.eval()(torch.ones(2, 3))


class Trimmed(nn.Module):
    """Gives and takes the state of a part of it, without torch's keyword arguments."""

    def __init__(self):
        super().__init__()
        self.net, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(requires_grad=False)
        self.frozen.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.ones(4)})
        self.loads = 0

    def state_dict(self):
        return self.net.state_dict()

    def load_state_dict(self, state):
        self.loads += 1
        return self.net.load_state_dict(state)


@kind
def whole_state_dict_overridden():
    return Trimmed(), Trimmed, lambda m: m.loads


class Nested(nn.Module):
    """Gives a state dict of its own form."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.epoch = 0

    def state_dict(self, *args, **kwargs):
        return {"net": dict(self.net.state_dict(*args, **kwargs)), "epoch": self.epoch, "format": (1, "x")}

    def load_state_dict(self, state, strict=True):
        self.net.load_state_dict(state["net"], strict=strict)
        self.epoch = state["epoch"], state["format"], strict


@kind
def whole_state_dict_of_another_form():
    saved = Nested()
    saved.epoch = 7
    return saved, Nested, lambda m: m.epoch


@kind
def whole_load_overridden():
    class Loud(nn.Sequential):
        loads = 0

        def load_state_dict(self, state, *args, **kwargs):
            assert state._metadata["0"] == {"version": 1}
            self.loads += 1
            return super().load_state_dict({key: state[key] for key in sorted(state)}, *args, **kwargs)

    def make():
        return Loud(nn.Linear(2, 2), nn.BatchNorm1d(2))

    return make(), make, lambda m: m.loads


@kind
def whole_load_overridden_that_refuses():
    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = nn.Linear(width, 2)

        def load_state_dict(self, state, strict=True):
            return super().load_state_dict(state, strict)

    return Wide(3), lambda: Wide(4), nothing


class Growing(nn.Module):
    """Makes the buffers that the state dict has, in its order."""

    def __init__(self, *names):
        super().__init__()
        self.net = nn.Linear(1, 1)
        for name in names:
            self.register_buffer(name, torch.randn(2))

    def _load_from_state_dict(self, state, prefix, *rest):
        for key in state:
            name = key.removeprefix(prefix)
            if "." not in name and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(state[key]))
        super()._load_from_state_dict(state, prefix, *rest)


@kind
def buffers_that_appear():
    return (
        nn.Sequential(Growing("z", "a", "m")),
        lambda: nn.Sequential(Growing()),
        lambda m: list(m.state_dict()),
    )


@kind
def refusing_in_its_own_words():
    class Picky(nn.Linear):
        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
            errors.append("this weight is from another planet")

    return nn.Sequential(nn.Linear(2, 2)), lambda: nn.Sequential(Picky(2, 2)), nothing


@kind
def scalar_saved_with_one_dimension():
    saved, made = nn.Module(), nn.Module()
    saved.register_buffer("scale", torch.rand(1))
    made.register_buffer("scale", torch.rand(()))
    return saved, lambda: made, nothing


@kind
def shared_module_with_hooks():
    def make():
        part = renaming("weight", "weight", nn.Linear(2, 2), private=False)
        return nn.ModuleDict({"a": part, "b": part})

    return make(), make, lambda m: m["a"].calls


@kind
def wrapped_in_checkpointing():
    def make():
        return nn.Sequential(checkpoint_wrapper(New()))

    return make(), make, nothing


@kind
def another_shape_beside_hooks():
    def make(width=2):
        return nn.Sequential(Inverse(), nn.Linear(width, 2))

    return make(3), make, nothing


@kind
def missing_and_unexpected_names():
    return nn.ModuleDict({"a": nn.Linear(1, 1)}), lambda: nn.ModuleDict({"b": nn.Linear(1, 1)}), nothing
