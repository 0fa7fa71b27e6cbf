"""Claims about several processes: two do what one does, one of them speaks, and none is left behind."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from gated_gpt import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(data="tiny", block_size=8, n_layer=2, n_head=2, n_embd=16, max_steps=10, eval_every=5,
            eval_windows=6, warmup_steps=2, learning_rate=1e-2, schedule="constant", weight_decay=0.1,
            grad_clip=0.5, optimizer="adamw", attn_share=True, device="cpu")
# What every process runs: train.py on the small data. EXTRA is a line of a test's own.
SCRIPT = """
import os, signal, sys
from functools import partial
sys.path.insert(0, {project!r})
import train
from data import prepare
from data.prepare import run_main
prepare.load = partial(prepare.load, root=__import__("pathlib").Path({data!r}))
rank, step = int(os.environ["RANK"]), train.Run.step
EXTRA
run_main(train.main)
"""


@pytest.fixture
def torchrun(here, data_root):
    """torchrun(extra, **flags) starts train.py in two processes; returns a Popen in a group of its own."""
    def start(extra="", **flags):
        script = here / "train.py"
        text = SCRIPT.format(project=str(ROOT), data=str(data_root))
        script.write_text(text.replace("EXTRA", extra))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [script] + [f"--{name}" if value is True else f"--{name}={value}"
                    for name, value in (TINY | flags).items()]
        return subprocess.Popen(command, cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    return start


def alone(**fields):
    """The same with one process, in this one."""
    train.train(*train.make_configs(TINY | fields), quiet=True)


def ended(process):
    """What it printed, stdout and stderr, when it has ended."""
    try:
        return process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def assert_close(a, b):
    a, b = (load_checkpoint(path) for path in (a, b))
    assert a[1]["step"] == b[1]["step"]
    for (name, p), q in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        assert (p - q).abs().max() < 1e-5, name
    for x, y in zip(a[1]["log"], b[1]["log"], strict=True):
        assert abs(x["train_loss"] - y["train_loss"]) < 1e-5 and abs(x["val_loss"] - y["val_loss"]) < 1e-5


COUNTING = """
calls = []
class Counting(train.DistributedDataParallel):
    def __init__(self, model):
        super().__init__(model)
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        def hook(state, bucket):
            calls.append(bucket.is_last())
            return allreduce_hook(None, bucket)
        self.register_comm_hook(None, hook)
train.DistributedDataParallel = Counting
import atexit
atexit.register(lambda: print(f"process {rank}: {sum(calls)} exchanges"))
"""


def test_two_processes_do_what_one_does_with_the_whole_batch_and_exchange_gradients_once_a_step(torchrun):
    out, _ = ended(torchrun(COUNTING, batch_size=2, grad_accum=4, out="two"))  # two forwards in each process
    alone(batch_size=8, out="one")
    assert_close("two/last.pt", "one/last.pt")
    assert sorted(re.findall(r"process \d: \d+ exchanges", out)) == ["process 0: 10 exchanges",
                                                                     "process 1: 10 exchanges"]
    assert out.count("best val loss") == 1  # one of them speaks
    assert len(Path("two/log.csv").read_text().splitlines()) == 3


def test_when_a_process_dies_all_end_and_one_says_so(torchrun):
    dies = ("train.Run.step = lambda run: os.kill(os.getpid(), signal.SIGKILL) "
            "if rank == 1 and run.state['step'] == 7 else step(run)")
    began = time.monotonic()
    process = torchrun(dies, batch_size=2, grad_accum=2, out="run")
    _, err = ended(process)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert err.count("a process of the group is gone") == 1 and "--resume --out=run" in err
    assert load_checkpoint("run/last.pt")[1]["step"] == 5
    with pytest.raises(ProcessLookupError):  # nobody is left of its group
        os.killpg(process.pid, 0)


def test_sigterm_ends_all_processes_and_what_they_did_is_saved(torchrun):
    tells = ("train.Run.step = lambda run: (os.kill(os.getppid(), signal.SIGTERM) "
             "if rank == 1 and run.state['step'] == 7 else None, step(run))[1]")
    _, err = ended(torchrun(tells, batch_size=2, grad_accum=2, out="run", max_steps=10**5, eval_every=10**5))
    assert err.count("stopped at step") == 1
    step = int(re.search(r"stopped at step (\d+)", err)[1])
    assert 7 <= step and load_checkpoint("run/last.pt")[1]["step"] == step


def test_windows_that_cannot_be_shared_evenly_are_refused_once(torchrun):
    process = torchrun(batch_size=3, out="run")
    _, err = ended(process)
    assert process.returncode != 0
    assert err.count("batch_size=3 times grad_accum=1 is 3 windows a step") == 1
    assert not Path("run").exists()


def test_every_process_has_its_own_windows_and_together_they_are_the_steps():
    for batch_size, grad_accum in ((4, 1), (4, 2), (6, 4), (12, 1), (5, 8)):
        for ranks in (1, 2, 4):
            windows = batch_size * grad_accum
            try:
                share, forwards = train.shares(batch_size, grad_accum, ranks)
            except ValueError:
                assert windows % (ranks * -(-grad_accum // ranks))
                continue
            assert share * ranks == windows and share % forwards == 0 and share // forwards <= batch_size


def test_dropout_differs_between_processes_and_steps():
    assert len({hash((0, step, rank)) for step in range(1000) for rank in range(64)}) == 64_000
    torch.manual_seed(hash((2**31, 10**6, 63)))  # no seed is too large
