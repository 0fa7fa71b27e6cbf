"""Claims about several processes, which torchrun starts: two do what one does, and no one is left behind."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, fit, flags

from plumbing import checkpoint
from train import PRESETS

HANGS = 600  # seconds after which a test gives up waiting
SETTINGS = dict(n_layer=2, max_steps=10, eval_every=5, optimizer="adamw", grad_clip=0.5, attn_share=True)
# What every process runs: train.py, and after each forward of training a line of the test's own.
SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from gated_gpt import GPT
from plumbing.flags import run_main
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.modules.module import register_module_forward_hook

rank, seeds, exchanges = int(os.environ["RANK"]), [], []

def exchange(state, bucket):
    exchanges.append(bucket.is_last())
    return allreduce_hook(None, bucket)

class Counting(train.DistributedDataParallel):
    def __init__(self, model):
        super().__init__(model)
        self.register_comm_hook(None, exchange)

def after_forward(module, inputs, output):
    if isinstance(module, GPT) and module.training:
        seeds.append(torch.initial_seed())
        EXTRA

train.DistributedDataParallel = Counting
register_module_forward_hook(after_forward)
run_main(train.main)
print(f"rank {{rank}}: {{sum(exchanges)}} exchanges, seeds {{seeds}}", flush=True)
"""


@pytest.fixture
def torchrun(here):
    """torchrun(extra, **fields): (exit status, output, errors) of train.py in two processes."""
    def run(extra="pass", **fields):
        (here / "script.py").write_text(SCRIPT.replace("EXTRA", extra))
        words = [word.replace("=True", "") for word in flags(**SETTINGS | fields)]
        ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=2", here / "script.py", *words], timeout=HANGS, text=True,
                               capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return ended.returncode, ended.stdout, ended.stderr

    return run


def test_two_processes_do_what_one_does_with_the_whole_batch(torchrun):
    status, out, err = torchrun(batch_size=2, grad_accum=4, out="two")  # two forwards a step in each process
    assert status == 0, err
    fit(**PRESETS["laptop"] | TINY | SETTINGS | dict(batch_size=8, out="one"))
    (a, two), (b, one) = (checkpoint.load(f"{run}/last.pt") for run in ("two", "one"))
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert (p - q).abs().max() < 1e-5, name
    for x, y in zip(two["log"], one["log"], strict=True):
        for name in ("step", "train_loss", "val_loss", "first_token_share", "gate_score"):
            assert x[name] == pytest.approx(y[name], abs=1e-5), name
    said = {rank: (int(n), seeds.split(", ")) for rank, n, seeds in
            re.findall(r"rank (\d): (\d+) exchanges, seeds \[(.*)\]", out)}
    assert said.keys() == {"0", "1"}
    for exchanges, seeds in said.values():
        assert exchanges == 10, "one exchange of gradients a step, not one for each forward"
        assert len(seeds) == 20 and len(set(seeds)) == 10
    assert not set(said["0"][1]) & set(said["1"][1]), "dropout must differ between processes"
    assert out.count("best val loss") == out.count("preset   ") == 1  # one of them speaks


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_when_a_process_dies_all_end(torchrun):
    dies = "rank == 1 and len(seeds) == 16 and os.kill(os.getpid(), signal.SIGKILL)"
    status, out, err = torchrun(dies, batch_size=2, grad_accum=4, out="run")
    assert status != 0 and "best val loss" not in out
    assert checkpoint.load("run/last.pt")[1]["step"] == 5
    assert "rank 0" not in out and "rank 1" not in out
