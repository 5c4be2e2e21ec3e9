"""Two real processes in a process group: rank 0 saves what is equal on both; all else is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import torch

import gockpt

START = """
import json, logging, os, sys, warnings
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
warnings.simplefilter("ignore")
import gockpt

torch.set_num_threads(1)
rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
warned = []
class Handler(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("gockpt").addHandler(Handler(logging.WARNING))
torch.manual_seed(0)
model = nn.Linear(6, 6)
said = {}
"""

END = """
said["warned"] = [text for text in warned if "DistributedDataParallel" in text]
print(json.dumps(said))
distributed.barrier()
distributed.destroy_process_group()
"""


def together(tmp_path, body, ranks=2):
    """Run a program on each rank; return what each has said."""
    program = START + textwrap.dedent(body) + END
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(ranks), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, told
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


def test_rank_0_saves_what_is_wrapped(tmp_path):
    said = together(
        tmp_path,
        """
        ddp = DistributedDataParallel(model)
        opt = torch.optim.AdamW(ddp.parameters(), lr=0.1)
        def train():
            opt.zero_grad(); ddp(torch.ones(2, 6) * (rank + 1)).sum().backward(); opt.step()
        said["handles"] = []
        for step in range(1, 7):
            train()
            handle = gockpt.save_overlapped(ddp, opt, "ckpts", step=step, every=3, extra={"rank": rank},
                                            options=gockpt.Options(window=2, when_busy="wait"))
            said["handles"].append(handle is None)
        gockpt.wait()
        gockpt.finish()
        gockpt.finish("ckpts")
        with gockpt.Checkpointer(ddp, opt, "other", every=1) as saver:
            said["object"] = saver.after_step(1) is None
        gockpt.close()
        distributed.barrier()
        fresh = DistributedDataParallel(nn.Linear(6, 6))
        other = torch.optim.AdamW(fresh.parameters())
        restored = gockpt.load("ckpts", fresh, other)
        said["step"], said["extra"] = restored.step, restored.extra
        said["equal"] = all(torch.equal(a, b) for a, b in zip(fresh.parameters(), ddp.parameters()))
        distributed.barrier()  # the other rank's load must not find step 7
        train_on = gockpt.save_overlapped(fresh, other, "ckpts", step=7)
        said["on"] = train_on is None
        gockpt.finish(fresh)
        """,
    )
    assert said[0]["handles"] == [False] * 6 or said[0]["handles"] == [True] * 1 + [False] * 5
    assert said[1]["handles"] == [True] * 6
    assert [one["object"] for one in said] == [one["on"] for one in said] == [False, True]
    assert all((one["step"], one["extra"], one["equal"]) == (6, {"rank": 0}, True) for one in said)
    assert [len(one["warned"]) for one in said] == [1, 1]
    assert "return None" in said[1]["warned"][0]
    assert gockpt.steps("ckpts") == [3, 6, 7]
    assert gockpt.steps("other") == [1]
    assert gockpt.verify("ckpts").ok
    bare = torch.nn.Linear(6, 6)
    assert gockpt.load("ckpts", bare).step == 7


def test_what_may_differ_between_ranks_is_refused_by_name(tmp_path):
    said = together(
        tmp_path,
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.distributed.tensor import distribute_tensor, Shard

        ddp = DistributedDataParallel(model)
        mesh = init_device_mesh("cpu", (2,))
        sharded = nn.Sequential(nn.Linear(4, 4)); fully_shard(sharded, mesh=mesh)
        tensor_parallel = nn.Linear(4, 4)
        tensor_parallel.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        groups = [distributed.new_group([n]) for n in range(2)]
        alone = DistributedDataParallel(nn.Linear(4, 4), process_group=groups[rank])
        ignoring = nn.Linear(4, 4)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["bias"])
        ignoring = DistributedDataParallel(ignoring)
        zero = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.1)
        class Mine(nn.Linear): pass
        cases = {
            "bare": (Mine(4, 4), None),
            "inside": (ddp.module, None),
            "mapping": (dict(model.named_parameters()), None),
            "one of two": ([ddp, Mine(4, 4)], None),
            "FSDP": (sharded, None),
            "DTensor": (tensor_parallel, None),
            "subgroup": (alone, None),
            "ignored": (ignoring, None),
            "zero": (ddp, zero),
        }
        for name, (what, opt) in cases.items():
            for how in (lambda: gockpt.save_overlapped(what, opt, "ckpts", step=1),
                        lambda: gockpt.Checkpointer(what, opt, "ckpts")):
                try:
                    how()
                except gockpt.UsageError as error:
                    said[name] = str(error)
        said["made"] = os.path.exists("ckpts")
        """,
    )
    for one in said:
        assert not one.pop("made")
        assert one.pop("warned") == []
        words = {
            "bare": "Mine is not wrapped in DistributedDataParallel",
            "inside": "Linear is not wrapped",
            "mapping": "a mapping of tensors",
            "one of two": "Mine is not wrapped",
            "FSDP": "is sharded by FSDP",
            "DTensor": "weight is a DTensor",
            "subgroup": "on some of them only",
            "ignored": "told to ignore 'bias'",
            "zero": "ZeroRedundancyOptimizer",
        }
        assert set(one) == set(words)
        for name, text in words.items():
            assert text in one[name], name
            assert "the process group has 2 ranks" in one[name]
            assert "Wrap the model in DistributedDataParallel" in one[name]


def test_a_group_of_one_rank_is_like_none(tmp_path):
    (said,) = together(
        tmp_path,
        """
        said["saved"] = gockpt.save_overlapped(model, None, "ckpts", step=1).result().step
        """,
        ranks=1,
    )
    assert said == {"saved": 1, "warned": []}
    assert gockpt.steps("ckpts") == [1]
