"""Which formulas this device's optimizers follow, and how far the others are from them.

    python bench/probe_cuda_replay.py            # every optimizer and implementation, the nearest candidates
    python bench/probe_cuda_replay.py --all      # every candidate
    python bench/probe_cuda_replay.py --cpu      # the same of torch's optimizers on this host's CPU

For each candidate: how many elements of each array (the parameter, then the states) differ from the device's
over all probes, by how many units in the last place at most, and how many NaN have other bits. Where nothing
equals the device, the first array that differs says which part of a formula is wrong: moments do not depend
on how parameters move.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import TYPE_CHECKING, Any

import torch

from gockpt.replay.calibration import Case
from gockpt.replay.calibration_cuda import calibrate, candidates, diagnose
from gockpt.replay.calibration_runs import lab_for, step_on

if TYPE_CHECKING:
    from collections.abc import Hashable

    from gockpt.replay.calibration_runs import Lab, Seen

OPTIMIZERS = ((torch.optim.Adam, ("adam", "amsgrad")), (torch.optim.SGD, ("sgd", "momentum")))
IMPLEMENTATIONS: dict[str, dict[str, bool | None]] = {
    "for-loop": {"foreach": False, "fused": None},
    "foreach": {"foreach": True, "fused": None},
    "fused": {"foreach": None, "fused": True},
}


class CpuLab:
    """This host's CPU, as if it were a device: to try the probe itself where there is none."""

    device = torch.device("cpu")

    @property
    def key(self) -> Hashable:
        """What it is."""
        return (f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability())

    def refusal(self) -> str | None:
        """Nothing is in the way."""
        return None

    def update(self, *args: Any) -> Seen:
        """Step."""
        return step_on(self.device, *args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every candidate, not just the nearest four")
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    options = parser.parse_args()
    lab: Lab | None = CpuLab()
    if not options.cpu:
        here = torch.cuda.is_available()
        lab = lab_for(torch.device("cuda", torch.cuda.current_device())) if here else None
    if lab is None:
        print("there is no CUDA device; --cpu tries the probe itself")
        return 0
    print(lab.key)
    for (kind, kernels), (name, flags) in itertools.product(OPTIMIZERS, IMPLEMENTATIONS.items()):
        for kernel in kernels:
            case = Case(kind, kernel, **flags)
            every = candidates(case)
            try:
                print(f"\n{kernel}, {name}: {_short(calibrate(case, lab, every))}")
                found = sorted(diagnose(case, lab, every), key=lambda difference: sum(difference.elements))
            except Exception as error:  # noqa: BLE001 - the others are still worth knowing
                print(f"  {type(error).__name__}: {error}")
                continue
            for difference in found if options.all else found[:4]:
                candidate = difference.candidate
                print(
                    f"  {candidate.kernel}{candidate.form} {candidate.late or ''}: "
                    f"differ {difference.elements}, ulps {difference.ulps}, NaN bits {difference.nans}"
                )
    return 0


def _short(found: Any) -> str:
    if isinstance(found, str):
        return found
    candidate = found.candidate
    return f"equal to {candidate.kernel}{candidate.form} {candidate.late or ''}"


if __name__ == "__main__":
    sys.exit(main())
