"""
The machine: device, threads, precision, torch.compile, several processes, and Ctrl-C.

A function that chooses something takes `say`, which is called with a line: what was chosen, and why.
"""
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist

CORES = torch.get_num_threads()  # torch's own choice, before a run changes it
HANGUP = getattr(signal, "SIGHUP", None)  # a closed terminal says it, often twice; not on Windows


def silent(text):
    """A `say` that says nothing."""


def choose_device(name, say=silent):
    """A torch.device. ValueError if there is no such device."""
    why = "as asked"
    if name == "auto" and torch.cuda.is_available():
        name, why = "cuda", torch.cuda.get_device_name()
    elif name == "auto" and torch.backends.mps.is_available():
        name, why = "mps", "no CUDA here, but an Apple GPU"
    elif name == "auto":
        name, why = "cpu", "neither CUDA nor an Apple GPU here"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun: the GPU of this process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda, mps")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"device={name} cannot be used here ({reason}): try --device=cpu") from None
    say(f"device   {name} ({why})")
    return torch.device(name)


def choose_threads(threads, say=silent):
    """Number of CPU threads: as asked, else one for each core that is idle now.

    Two runs with two threads each, on two cores, are many times slower than two runs with one thread each,
    since they take the cores from each other. Linux tells which cores are idle.
    """
    if threads or "OMP_NUM_THREADS" in os.environ:
        threads, why = threads or CORES, "as asked"
    elif (quota := cpu_quota()) and quota < CORES:
        threads, why = quota, "all that this container may use"
    elif not os.path.exists("/proc/stat"):
        threads, why = CORES, "torch's choice"
    else:
        idle = idle_cores()
        threads, why = max(1, min(CORES, round(idle))), f"{idle:.1f} cores are idle"
    say(f"threads  {threads} ({why})")
    return threads


def idle_cores(seconds=0.1):
    """How many cores did nothing, on average, during a short wait."""
    def clock():
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return ticks[3], sum(ticks)  # idle, all

    idle, total = clock()
    time.sleep(seconds)
    idle_after, total_after = clock()
    return os.cpu_count() * (idle_after - idle) / max(1, total_after - total)


def cpu_quota(path="/sys/fs/cgroup/cpu.max"):
    """How many cores a container may keep busy; None if there is no limit."""
    try:
        quota, period = Path(path).read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16. Where it does not, torch emulates that, many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(name, device, say=silent, stored=None):
    """dtype of the matrix products. `stored`: that of weights which are used, not trained."""
    able, dtype = has_bfloat16(device), torch.float32
    if name == "float32":
        why = "as asked"
    elif name == "bfloat16":
        dtype, why = torch.bfloat16, "as asked" if able else "as asked; slow, emulated on this hardware"
    elif stored == torch.float16:
        why = "float16, as stored, ends at 65,504, and a large activation may be more"
    elif stored == torch.bfloat16 and not able:
        why = "this hardware does not multiply bfloat16"
    elif stored:
        dtype, why = stored, "as stored"
    elif device.type == "cuda" and able:
        dtype, why = torch.bfloat16, "autocast; weights stay float32"
    else:
        why = f"the default on {device.type}"
    say(f"dtype    {str(dtype).removeprefix('torch.')} ({why})")
    return dtype


def autocast(dtype, device):
    """The context in which a forward makes its matrix products in this dtype. On CUDA it also allows TF32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def try_compile(model, batch, precision, wanted=True, say=silent):
    """The compiled model; where that fails, the model as it is. wanted: None means with CUDA only."""
    if not (batch[0].is_cuda if wanted is None else wanted):
        say(f"compile  off ({'on by default with CUDA only' if wanted is None else 'as asked'})")
        return model
    try:
        compiled = torch.compile(model)
        with precision:
            compiled(*batch)[1].backward()
            with torch.no_grad():  # evaluation is another graph
                compiled.eval()(*batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing C++ compiler, or Triton: training works without
        reason = " ".join(str(error).split())[:200]
        say(f"compile  off (torch.compile failed with {type(error).__name__}: {reason})")
        return model
    finally:
        model.train().zero_grad()
    say(f"compile  on ({'as asked' if wanted else 'the default with CUDA'})")
    return compiled


# ---- several processes, started by torchrun --------------------------------------------------------


def is_one_of_several():
    """Whether torchrun started this process. Some clusters set RANK for a process that is alone, too."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_first():
    """Whether this is the process that speaks and saves."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


@contextmanager
def processes(device):
    """(rank, number of processes): joins the processes that torchrun has started, if it has."""
    if not is_one_of_several():
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # not after an error, when it could wait forever


def mean_over_processes(value):
    """The mean of a one-number tensor over all processes, as a float."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


@contextmanager
def ctrl_c():
    """A list. Ctrl-C, a plain kill, or the end of the terminal adds to it, so that the loop can end after the
    step under way.

    A second Ctrl-C does not wait. Under torchrun, and outside the main thread, the list stays empty.
    """
    pressed, before = [], {}

    def press(number, frame):
        pressed.append(number)
        signal.signal(number, signal.SIG_IGN if number == HANGUP else before[number])
        with suppress(OSError):  # the terminal may be gone
            print("\nstopping after this step, and saving; Ctrl-C again stops now", file=sys.stderr)

    if not dist.is_initialized() and threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if HANGUP and (handler := signal.getsignal(HANGUP)) != signal.SIG_IGN:  # as nohup makes it
            before[HANGUP] = handler
        for number in before:
            signal.signal(number, press)
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
