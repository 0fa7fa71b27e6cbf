"""
Train a gated GPT:

    python train.py                            a text model, in minutes
    python train.py --preset=sink --gate=none  an attention sink, in a minute
    python train.py --preset=sink --gate=g1    the same, gated: no sink
    python train.py --help                     every flag
    torchrun --standalone --nproc_per_node=2 train.py    the same, on two GPUs

A flag is a field of GPTConfig (gated_gpt.py) or TrainConfig (here).
A preset is a table of their values, which flags of your own override;
in [brackets] stands the value where neither of the two says one.

Reading order: TrainConfig -> PRESETS -> Windows -> make_optimizers -> Run.loop and Run.step.
"""
import argparse
import csv
import dataclasses
import inspect
import math
import os
import re
import shlex
import signal
import textwrap
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import prepare
from data.prepare import run_main
from gated_gpt import (
    GPT,
    GPTConfig,
    check_fields,
    measure,
    save_checkpoint,
    uniform_share,
    write_whole,
)
from sample import checked_device, checkpoint_in, layer_table, load_run, newest_run, open_model, stream_text


@dataclass
class TrainConfig:
    """How to train. Raises ValueError, with the value and the rule, for what can't be."""
    # --- run ---
    data: str = "python"  # name of a folder in data/, made by data/prepare.py
    out: str | None = None  # folder of the run; default out/<data>-<gate variant>, numbered if taken
    resume: bool = False  # go on with the run in --out (default: the newest one) where its checkpoint stands
    overwrite: bool = False  # if --out holds a run already, replace it
    init_from: str | None = None  # a checkpoint, run or released model's folder to start from; default random
    seed: int = 0  # of weights, batches and dropout
    # --- optimisation ---
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 32  # windows per forward
    grad_accum: int = 1  # forwards per step, their gradients averaged; several processes share them out
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, with adamw for the rest
    learning_rate: float = 1e-3  # peak learning rate
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after warm-up
    warmup_steps: int = 100  # steps over which the learning rate climbs to its peak
    min_lr_ratio: float = 0.1  # floor of the cosine, as a fraction of the peak
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW: memory of the mean gradient
    beta2: float = 0.99  # AdamW: memory of the squared gradient
    grad_clip: float = 1.0  # a longer gradient, over all parameters, is cut to this; 0: off
    # --- evaluation ---
    eval_every: int = 100  # steps from one evaluation (and checkpoint) to the next
    eval_windows: int = 256  # fixed windows, evenly spaced over val.bin
    attn_share: bool = False  # measure first-token share, gate score, largest activation
    # --- machine ---
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; weights stay float32
    compile: bool | None = None  # torch.compile; default on CUDA only
    threads: int | None = None  # CPU threads; by default one for each core that is idle at the start

    def __post_init__(self):
        check_fields(self, seed=0, warmup_steps=0)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be below 1")
        if self.threads and self.threads > 1024:
            raise ValueError(f"threads={self.threads} is more than 1024: a thread per core is enough")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite: go on with the run, or replace it, but not both")


PRESETS = {
    # Real text on two cores, in about two minutes.
    "laptop": dict(data="python", n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16,
                   max_steps=700, optimizer="muon", learning_rate=3e-3, warmup_steps=50, eval_every=100,
                   attn_share=True),
    # The size of nanoGPT's baby GPT, for one GPU; --data=shakespeare is its text.
    "gpu": dict(data="python", n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
                batch_size=64, max_steps=2000, optimizer="muon", learning_rate=3e-3, eval_every=250,
                attn_share=True),
    # The smallest thing with a strong attention sink: see backcopy in data/prepare.py.
    "sink": dict(data="backcopy", n_layer=1, n_head=2, n_embd=64, block_size=64, batch_size=32,
                 max_steps=3000, learning_rate=3e-3, schedule="constant", beta2=0.98, weight_decay=0.0,
                 eval_every=500, attn_share=True),
    # GPT-2's small shape on web text: half a million tokens per step, 25 shards.
    "gpt2": dict(data="fineweb", vocab_size=50304, n_layer=12, n_head=12, n_embd=768, block_size=1024,
                 tie_embeddings=True, batch_size=32, grad_accum=16, max_steps=4750, learning_rate=1.8e-3,
                 beta2=0.95, warmup_steps=250, eval_every=250),
}


# ----------------------------------------------------------------------------------------------------
# The machine


def choose_device(name):
    """(device, reason)"""
    mine = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"  # under torchrun
    if name != "auto":
        return checked_device(mine if name == "cuda" else name), "as asked"
    if torch.cuda.is_available():
        return torch.device(mine), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "no CUDA here, but an Apple GPU"
    return torch.device("cpu"), "neither CUDA nor an Apple GPU here"


def choose_threads(threads):
    """CPU threads: as asked, else a thread for each core that is idle right now, as far as Linux tells.

    Two runs of two threads on two cores are many times slower than two of one: each waits for the other.
    """
    def clock():
        with open("/proc/stat") as file:
            ticks = [int(ticks) for ticks in file.readline().split()[1:]]
        return ticks[3], sum(ticks)  # idle, all

    if threads or "OMP_NUM_THREADS" in os.environ or not os.path.exists("/proc/stat"):
        return threads or torch.get_num_threads()
    idle, every = clock()
    time.sleep(0.1)
    idle, every = (after - before for after, before in zip(clock(), (idle, every)))
    return max(1, min(torch.get_num_threads(), round(os.cpu_count() * idle / max(1, every))))


def choose_dtype(name, device):
    """(dtype of the matrix products, reason)"""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda":
        return torch.float32, "the default without CUDA"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, "this GPU has no bfloat16, and float16 would need loss scaling"
    return torch.bfloat16, "autocast; weights stay float32"


def try_compile(model, batch, precision):
    """(model to train with, reason): compiled if a forward and a backward go through, else as it was."""
    try:
        compiled = torch.compile(model)
        with precision:
            compiled(*batch)[1].backward()
            with torch.no_grad():  # evaluation is another graph
                compiled.eval()(*batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever goes wrong in a compiler: training works without
        reason = " ".join(str(error).split())[:200]
        return model, f"off: torch.compile failed with {type(error).__name__}: {reason}"
    finally:
        model.train().zero_grad()
    return compiled, "on"


# Dense bfloat16 peak in TFLOP/s, from NVIDIA's data sheets, by what the GPU's name contains; the first match.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "L40S": 362, "L4": 121, "A10G": 70, "RTX 4090": 165, "RTX 3090": 71}


def peak_flops(device):
    """What the device could do at best, in FLOP/s; None if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(config, parameters):
    """Of one training step of a dense model, forward and backward (PaLM, arXiv 2204.02311, appendix B).

    Six for each weight that multiplies (the embedding only looks up) and 12 L nh hs T for attention.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    return 6 * (parameters - looked_up) + attention


# ----------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each trains on its part of the windows of every step


@contextmanager
def processes(device):
    """Join the processes that torchrun has started, if it has."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(checked_device(str(device)))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


def rank_and_ranks():
    """(number of this process, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agreed(value):
    """Process 0's value, in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def shares(batch_size, grad_accum, ranks):
    """(windows of a process per step, forwards it makes for them): the step's windows are the same for any
    number of processes. ValueError if they can't be shared out evenly."""
    windows, forwards = batch_size * grad_accum, math.ceil(grad_accum / ranks)
    if windows % (ranks * forwards):
        raise ValueError(f"batch_size={batch_size} times grad_accum={grad_accum} is {windows} windows a "
                         f"step, which {ranks} processes with {forwards} forwards each can't share evenly: "
                         f"choose multiples of {ranks}")
    return windows // ranks, forwards


# ----------------------------------------------------------------------------------------------------
# Data, optimizer, schedule


class Windows:
    """Windows of T tokens at any offset of a memory-mapped token file, with BOS put in front of each."""

    def __init__(self, tokens, bos, T, device):
        if len(tokens) < T:
            raise ValueError(f"{getattr(tokens, 'filename', 'the data')} has {len(tokens)} tokens, fewer "
                             f"than block_size={T}: prepare more text, or take a smaller --block_size")
        self.windows = np.lib.stride_tricks.sliding_window_view(tokens, T)  # (N - T + 1, T), a view: no copy
        self.bos, self.device = bos, device

    def at(self, offsets):
        """(idx, targets), (B, T) each: idx is BOS and the first T - 1 tokens, targets are all T."""
        targets = torch.from_numpy(self.windows[offsets].astype(np.int64))  # one gather
        idx = torch.cat((torch.full((len(offsets), 1), self.bos), targets[:, :-1]), dim=1)
        if self.device.type == "cuda":  # from pinned memory, the copy overlaps with the step before
            return [t.pin_memory().to(self.device, non_blocking=True) for t in (idx, targets)]
        return idx.to(self.device), targets.to(self.device)

    def random(self, seed, step, count):
        """`count` random offsets that depend on seed and step only: any step can be had again on its own."""
        return np.random.default_rng([seed, step]).integers(len(self.windows), size=count)

    def spaced(self, count):
        """`count` offsets, evenly spaced."""
        return np.linspace(0, len(self.windows) - 1, count).astype(np.int64)


def make_optimizers(model, c):
    """A list of optimizers which share one learning rate. Each parameter is in exactly one group.

    Matrices decay, vectors (norms, constants) don't. Muon (Jordan 2024) takes the matrices inside the blocks,
    its steps scaled to the size of AdamW's; embedding, head and stacked expert matrices stay with AdamW.
    """
    muon, decay, rest = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            rest.append(p)
        elif c.optimizer == "muon" and p.dim() == 2 and name.startswith("blocks."):
            muon.append(p)
        else:
            decay.append(p)
    groups = [{"params": decay, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)
    if not muon:
        return [adamw]
    return [adamw, torch.optim.Muon(muon, lr=c.learning_rate, weight_decay=c.weight_decay,
                                    adjust_lr_fn="match_rms_adamw")]


def learning_rate_at(step, c):
    """Learning rate of step 0, 1, ..: a linear climb, then a half cosine down to the floor, or constant."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    if c.schedule == "constant":
        return c.learning_rate
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    ratio = c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return c.learning_rate * ratio


# ----------------------------------------------------------------------------------------------------
# Evaluation and the log

# train_loss is the mean over the steps since the row before, so early on it lies above val_loss.
COLUMNS = ("step", "train_loss", "val_loss", "bits_per_byte", "tokens_per_second",
           "first_token_share", "uniform_share", "gate_score", "max_activation")
EXPERT_COLUMNS = (*COLUMNS, "max_expert_load")  # with experts, how evenly they are visited
MEASURE_WINDOWS = 64  # of the validation windows, for the three measurements


def cells(config, c, known_peak):
    """(name, heading, width, format) of what an evaluation prints: 80 columns at most."""
    shown = [("step", "step", 6, "d"), ("train_loss", "train", 8, ".4f"), ("val_loss", "val", 8, ".4f"),
             ("bits_per_byte", "bits/byte", 10, ".4f"), ("tokens_per_second", "tokens/s", 10, ",.0f")]
    if c.attn_share:
        shown += [("first_token_share", "share", 7, ".3f"), ("uniform_share", "(floor)", 8, ".3f"),
                  ("gate_score", "gate", 7, ".3f"), ("max_activation", "max|x|", 8, ".1f")]
        shown += [("max_expert_load", "load", 6, ".2f")] * bool(config.n_expert)
    return shown + [("mfu", "MFU", 6, ".1%")] * known_peak


def heading(shown):
    return "".join(f"{title:>{width}}" for _, title, width, _ in shown)


def line(row, shown):
    return "".join(f"{row[name]:{width}{form}}".replace("nan", "  -") for name, _, width, form in shown)


# ----------------------------------------------------------------------------------------------------
# Runs: their folders, and how one is stopped and resumed


def run_folder(config, c):
    """Where a new run goes: --out if it is free, else out/<data>-<variant>, -2, -3, ..."""
    if c.out is None:
        name = f"out/{c.data}-{config.variant}"
        numbered = map(Path, chain([name], (f"{name}-{i}" for i in count(2))))
        return next(path for path in numbered if not path.exists())
    if not c.out or (Path(c.out).exists() and not Path(c.out).is_dir()):
        raise ValueError(f"out={c.out!r} is not a folder: name one, or leave --out out")
    if files_of_run(c.out) and not c.overwrite:
        raise ValueError(f"{c.out} holds a run already: --resume goes on with it, --overwrite replaces it, "
                         "another --out leaves it alone")
    return Path(c.out)


def files_of_run(folder):
    """What a run leaves in its folder, as far as it is there."""
    paths = [Path(folder, name) for name in ("last.pt", "best.pt", "log.csv")]
    return [path for path in paths if path.exists()]


NOT_IN_WEIGHTS = ("block_size", "dropout", "balance_loss", "router_z_loss")  # what --init_from leaves free


def initial_model(config, c, meta):
    """A model of this config with the weights of c.init_from, in float32.

    Raises ValueError if these have another shape, or if the data is not in that model's tokens.
    """
    model, tokenizer, _, _ = open_model(c.init_from, torch.float32)
    differs = [f"{name}={value} (there {getattr(model.config, name)})"
               for name, value in dataclasses.asdict(config).items()
               if value != getattr(model.config, name) and name not in NOT_IN_WEIGHTS]
    if differs:
        raise ValueError(f"{c.init_from} has another shape than asked for: {', '.join(differs)}; leave these "
                         "flags out")
    try:
        same = prepare.same_tokenizer(tokenizer, meta["tokenizer"])
    except FileNotFoundError:  # save_pretrained writes no tokenizer: then the data is taken at its word
        same = True
    if not same:
        raise ValueError(f"{c.init_from} reads the tokens of {tokenizer}, and {c.data} has those of "
                         f"{meta['tokenizer']}: python data/prepare.py FILES --tokenizer={tokenizer} does")
    return GPT.with_weights(config, model.state_dict())


@contextmanager
def stop_signals():
    """A list that fills when SIGINT or SIGTERM comes, so that the loop can end after the step under way."""
    came, before = [], {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    except ValueError:  # not in the main thread: whoever runs there looks after signals
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------
# Training


def open_data(name, say=print):
    """(meta, {"train", "val"}) of a prepared set; one that needs no download is prepared on the way."""
    if name in prepare.OFFLINE and not (prepare.DATA / name / "meta.json").exists():
        say(f"preparing data/{name}, once")
        prepare.prepare(name)
    return prepare.load(name)


def train(config, c, quiet=False):
    """Train as the two configs say; returns the log, one dict for each evaluation.

    A row holds log.csv's columns and, with c.attn_share, measure's dicts as "layers". Raises ValueError for
    what can't be, FloatingPointError when the loss is no longer finite, and KeyboardInterrupt after a SIGINT
    or SIGTERM, once all is saved.
    """
    return Run(config, c, say=(lambda text: None) if quiet else tqdm.write).loop(hide_bar=quiet or None)


class Run:
    """A run: its model, data, optimizers, and `state`, which is what a checkpoint holds beside the model."""

    STATE = {"step": int, "best": float, "seconds": float, "log": list, "losses": list, "train_config": dict,
             "tokenizer": str, "data": str, "optimizers": list}  # what resuming needs

    def __init__(self, config, c, say):
        self.rank, self.ranks = rank_and_ranks()
        self.say = say if self.rank == 0 else lambda text: None
        self.own_windows, self.forwards = shares(c.batch_size, c.grad_accum, self.ranks)
        c = self.c = dataclasses.replace(c, threads=choose_threads(c.threads))  # a resumed run takes as many
        torch.set_num_threads(c.threads)
        self.device, why_device = choose_device(c.device)
        dtype, why_dtype = choose_dtype(c.dtype, self.device)
        self.precision = torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32

        config = self.open_windows(config)
        if c.resume:
            self.resume(config)
        else:
            self.start(config)
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            for old in files_of_run(self.out) if c.overwrite else ():  # all else is ready
                old.unlink()
        self.tokens = 0  # since self.began, which loop and evaluate set: what tokens/s is about
        self.clock = time.perf_counter() - self.state["seconds"]  # its start, had it never been stopped

        peak = None if config.n_expert else peak_flops(self.device)
        flops = flops_per_token(config, self.model.num_params())
        self.full_speed = self.ranks * peak / flops if peak else math.nan  # tokens/s
        self.shown = cells(config, c, known_peak=bool(peak))
        self.describe(device=f"{self.device}, {c.threads} of {os.cpu_count()} CPU threads ({why_device})",
                      dtype=f"{str(dtype).removeprefix('torch.')} ({why_dtype})", compile=self.make_fast())

    def open_windows(self, config):
        """The windows of both splits, and the config with the vocabulary of the data."""
        c, first = self.c, os.environ.get("LOCAL_RANK", "0") == "0"  # of its machine: prepares data for all
        if not first:
            dist.barrier()
        self.meta, tokens = open_data(c.data, self.say)
        if first and self.ranks > 1:
            dist.barrier()
        self.train_windows, self.val_windows = (
            Windows(tokens[split], self.meta["bos"], config.block_size, self.device)
            for split in ("train", "val"))
        config = dataclasses.replace(config, vocab_size=config.vocab_size or self.meta["vocab_size"])
        if config.vocab_size < self.meta["vocab_size"]:
            raise ValueError(f"vocab_size={config.vocab_size} is below the {self.meta['vocab_size']} tokens "
                             f"of {c.data}: " + (f"prepare data in the tokens of {c.init_from}" if c.init_from
                                                 else "prepare the data of the run again" if c.resume
                                                 else "leave it out, and the data says it"))
        return config

    def make_fast(self):
        """The model as a step calls it: compiled, and with gradients that travel. Says why (not) compiled."""
        c, why = self.c, "off (as asked)" if self.c.compile is False else "off (on by default with CUDA only)"
        self.fast = self.model
        if c.compile or (c.compile is None and self.device.type == "cuda"):
            batch = self.train_windows.at(self.train_windows.spaced(self.own_windows // self.forwards))
            self.fast, why = try_compile(self.model, batch, self.precision)
        if self.ranks > 1:
            self.fast = DistributedDataParallel(self.fast)
        return why

    def start(self, config):
        """A new run: fresh weights from the seed, or those of --init_from."""
        self.out = agreed(run_folder(config, self.c) if self.rank == 0 else None)
        torch.manual_seed(self.c.seed)
        self.place(initial_model(config, self.c, self.meta) if self.c.init_from else GPT(config))
        self.state = {"step": 0, "best": math.inf, "seconds": 0.0, "log": [], "losses": []}

    def place(self, model):
        """The model onto the device, and its optimizers."""
        self.model = model.to(self.device)
        self.optimizers = make_optimizers(self.model, self.c)

    def resume(self, config):
        """Everything as the checkpoint has it; the number of processes may be another."""
        self.out = Path(self.c.out) if self.c.out else newest_run()
        path = checkpoint_in(self.out)
        model, self.state = load_run(path, self.STATE)
        if self.state["step"] >= self.c.max_steps:
            raise ValueError(f"{path} is at step {self.state['step']} of max_steps={self.c.max_steps}: "
                             "a larger --max_steps goes on")
        if model.config != config:
            differs = [f"{f.name}={getattr(config, f.name)} (there {getattr(model.config, f.name)})"
                       for f in dataclasses.fields(config)
                       if getattr(config, f.name) != getattr(model.config, f.name)]
            raise ValueError(f"{path} has another model than asked for: {', '.join(differs)}; leave these "
                             "flags out, or start a new run")
        if self.state["data"] != self.meta["train"]["sha256"]:
            raise ValueError(f"{path} was trained on other data than data/{self.c.data} holds now: prepare "
                             "the same data again, or start a new run")
        old = self.state["train_config"]
        for name in ("optimizer", "weight_decay", "beta1", "beta2"):
            if getattr(self.c, name) != old.get(name):
                raise ValueError(f"{name}={getattr(self.c, name)} (there {old.get(name)}): a resumed run "
                                 f"keeps the optimizer of {path}; leave --{name} out, or start a new run")
        self.place(model)
        for optimizer, saved in zip(self.optimizers, self.state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)

    def describe(self, **machine):
        c, model, T = self.c, self.model, self.model.config.block_size
        in_gates = sum(p.numel() for name, p in model.named_parameters() if ".attn.gate." in name)
        windows = c.batch_size * c.grad_accum
        machine["device"] += f", {self.ranks} processes" * (self.ranks > 1)
        for what, text in (machine | {
            "model": f"gate {model.config.variant}, {model.num_params():,} parameters, {in_gates:,} in gates",
            "data": f"{c.data}, {self.meta['train']['tokens']:,} training tokens ({self.meta['tokenizer']})",
            "steps": f"{c.max_steps:,} of {windows * T:,} tokens ({windows} windows of {T}), {c.optimizer}",
            "run": f"{self.out}" + (f", resumed at step {self.state['step']}" if c.resume else
                                    f", from the weights of {c.init_from}" * bool(c.init_from)),
        }).items():
            self.say(f"{what:<8} {text}")

    def loop(self, hide_bar=None):
        c, state = self.c, self.state
        self.say("\n" + heading(self.shown))
        self.began = time.perf_counter()
        pending = []  # losses still on the device: reading one means waiting for the GPU
        with (stop_signals() as stop,
              tqdm(total=c.max_steps, initial=state["step"], unit="step", leave=False,
                   disable=True if self.rank else hide_bar) as bar):
            while state["step"] < c.max_steps:
                pending.append(self.step())
                state["step"] += 1
                bar.update()
                evaluating = state["step"] % c.eval_every == 0 or state["step"] == c.max_steps
                if evaluating or (stop and self.ranks == 1) or len(pending) == 20:
                    first = state["step"] + 1 - len(pending)
                    *losses, stopping = self.over_ranks([*pending, torch.tensor(float(len(stop)))])
                    for step, loss in enumerate(losses, first):
                        self.check_finite("training", loss, step)
                        state["losses"].append(loss)
                    pending.clear()
                    bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                    if evaluating:
                        self.evaluate()
                    if stopping and state["step"] < c.max_steps:
                        if not evaluating:
                            self.save("last")
                        raise KeyboardInterrupt
        return state["log"]

    def over_ranks(self, numbers):
        """Tensors of one number each, as a list of floats: their means over all processes."""
        numbers = torch.stack([number.to(self.device) for number in numbers])
        if self.ranks > 1:
            dist.all_reduce(numbers)
        return (numbers / self.ranks).tolist()

    def step(self):
        """One optimizer step; returns the training loss of this process's windows, a tensor on the device."""
        c, step = self.c, self.state["step"]
        self.model.train()
        rate, total = learning_rate_at(step, c), 0.0
        torch.manual_seed(hash((c.seed, step, self.rank)))  # dropout, like data, depends on the step alone
        offsets = self.train_windows.random(c.seed, step, c.batch_size * c.grad_accum)
        mine = np.split(offsets, self.ranks)[self.rank]
        for i, part in enumerate(np.split(mine, self.forwards), 1):
            if isinstance(self.fast, DistributedDataParallel):  # gradients travel once, with the last forward
                self.fast.require_backward_grad_sync = i == self.forwards
            with self.precision:
                loss = self.fast(*self.train_windows.at(part))[1] / self.forwards
            loss.backward()
            total += loss.detach()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += offsets.size * self.model.config.block_size
        return total

    def check_finite(self, what, loss, step):
        """Stop the run if a loss is not finite; the checkpoints of before stay."""
        if math.isfinite(loss):
            return
        rate, kept = learning_rate_at(step - 1, self.c), "no checkpoint was made yet"
        if any(path.suffix == ".pt" for path in files_of_run(self.out)):
            kept = f"{checkpoint_in(self.out)} is from before"
        raise FloatingPointError(
            f"the {what} loss is {loss} at step {step}, learning rate {rate:.2g}: try a smaller "
            f"--learning_rate, more --warmup_steps or --grad_clip={self.c.grad_clip / 2 or 1:g}; {kept}")

    def evaluate(self):
        """Validation loss and measurements: a line, a row of the log, a checkpoint."""
        c, state = self.c, self.state
        seconds = time.perf_counter() - self.began
        val = self.val_loss()
        self.check_finite("validation", val, state["step"])
        bytes_per_token = (self.meta["val"]["bytes"] or math.nan) / self.meta["val"]["tokens"]
        row = dict.fromkeys(EXPERT_COLUMNS, math.nan) | {
            "step": state["step"], "train_loss": sum(state["losses"]) / len(state["losses"]), "val_loss": val,
            "bits_per_byte": val / math.log(2) / bytes_per_token, "tokens_per_second": self.tokens / seconds}
        if c.attn_share:
            idx, _ = self.val_windows.at(self.val_windows.spaced(MEASURE_WINDOWS))  # (64, T)
            row["layers"] = layers = measure(self.model, idx)
            row["uniform_share"] = uniform_share(idx.size(1))
            for name in ("first_token_share", "gate_score", "max_activation", "max_expert_load"):
                row[name] = sum(layer[name] for layer in layers) / len(layers)  # the paper's mean over layers
        state["log"].append(row)
        state["losses"] = []
        self.save_evaluated(val)  # first: the terminal may be gone
        self.say(line(row | {"mfu": row["tokens_per_second"] / self.full_speed}, self.shown))
        self.began, self.tokens = time.perf_counter(), 0

    @torch.no_grad()
    def val_loss(self):
        """Mean cross entropy in nats per token over c.eval_windows fixed windows."""
        self.model.eval()  # the same in every process
        total, offsets = 0.0, self.val_windows.spaced(self.c.eval_windows)
        for part in np.array_split(offsets, math.ceil(len(offsets) / self.c.batch_size)):
            with self.precision:
                total += self.fast(*self.val_windows.at(part))[1].item() * len(part)
        return total / len(offsets)

    def save_evaluated(self, val):
        """The two checkpoints, and log.csv."""
        state = self.state
        better = val < state["best"]
        state["best"] = min(val, state["best"])
        if better:
            self.save("best")  # first: a run that is killed in between resumes at last.pt, and makes it again
        self.save("last")
        if self.rank == 0:
            write_whole({self.out / "log.csv": self.write_log})

    def write_log(self, path):
        with open(path, "w", newline="") as file:
            columns = EXPERT_COLUMNS if self.model.config.n_expert else COLUMNS
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.state["log"])

    def save(self, name):
        self.state["seconds"] = time.perf_counter() - self.clock
        state = self.state | {
            "train_config": dataclasses.asdict(self.c), "tokenizer": self.meta["tokenizer"],
            "data": self.meta["train"]["sha256"],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            save_checkpoint(self.out / f"{name}.pt", self.model, state)


# ----------------------------------------------------------------------------------------------------
# The command line


def fields_of(cls):
    """[(group, field, help)]: the group is the `# --- title ---` above a field, the help its comment."""
    group, found, fields = cls.__name__, [], {f.name: f for f in dataclasses.fields(cls)}
    for text in inspect.getsource(cls).splitlines():
        if title := re.match(r"    # --- (.+) ---$", text):
            group = title[1]
        elif (match := re.match(r"    (\w+): .+?  # (.+)$", text)) and match[1] in fields:
            found.append((group, fields.pop(match[1]), match[2]))
    assert not fields, f"no comment, so no help for {', '.join(fields)}"
    return found


def add_flags(parser, *configs, skip=()):
    """A flag for every field of these dataclasses, in groups. Flags that are not given leave no trace."""
    groups = {}
    for title, f, comment in (row for cls in configs for row in fields_of(cls) if row[1].name not in skip):
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))  # int | None: int
        if get_origin(f.type) is Literal:
            options = {"choices": get_args(f.type)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        default = {True: "on", False: "off"}[f.default] if type(f.default) is bool else f.default
        options["help"] = comment + (f" [{default}]" if default is not None else "")
        groups[title].add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)


def parse_flags(argv=None):
    """The flags that were really given, as {name: value}."""
    presets = "\n".join(
        textwrap.fill(" ".join(f"{k}={v}" for k, v in values.items()), 78,
                      initial_indent=f"  {name:<8}", subsequent_indent=" " * 10)
        for name, values in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="train.py", usage="train.py [--preset=NAME] [--flag=value ...]  (--help lists the flags)",
        description=__doc__.partition("\nReading order")[0], epilog="presets:\n" + presets,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30))
    parser.add_argument("--preset", choices=list(PRESETS), default=argparse.SUPPRESS,
                        help="a table of values, see below [laptop; gpu where there is CUDA]")
    add_flags(parser, TrainConfig, GPTConfig)
    return vars(parser.parse_args(argv))


def make_configs(values):
    """(GPTConfig, TrainConfig) from one table of field values."""
    return tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
                 for cls in (GPTConfig, TrainConfig))


def configs_from(flags):
    """(GPTConfig, TrainConfig, why) from flags over a preset, or over a checkpoint's when resuming."""
    if flags.get("resume"):
        for name in ("preset", "init_from"):
            if name in flags:
                raise ValueError(f"{name}={flags[name]} and resume: a run has its own values; leave one out")
        out = Path(flags["out"]) if "out" in flags else newest_run()
        model, state = load_run(checkpoint_in(out))
        why, values = f"preset   as in {out}", dataclasses.asdict(model.config) | state["train_config"]
        values |= {"out": str(out), "overwrite": False}
    else:
        device, _ = choose_device(flags.get("device", "auto"))
        name = flags.get("preset", "gpu" if device.type == "cuda" else "laptop")
        why = f"preset   {name} " + ("(as asked)" if "preset" in flags else f"(on {device.type})")
        values = dict(PRESETS[name])
        if "init_from" in flags:
            there, window = open_model(flags["init_from"])[0].config, values["block_size"]
            shape = {k: v for k, v in dataclasses.asdict(there).items() if k not in NOT_IN_WEIGHTS}
            values |= shape | {"block_size": min(window, there.block_size)}
    values |= {name: value for name, value in flags.items() if name != "preset"}
    return *make_configs(values), why


def main(argv=None):
    flags = parse_flags(argv)
    config, c, why = configs_from(flags)
    with processes(choose_device(c.device)[0]):
        if rank_and_ranks()[0] == 0:
            print(why)
        run = Run(config, c, tqdm.write)
        try:
            log = run.loop()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped at step {run.state['step']} and saved; to go on: "
                                    f"python train.py --resume --out={shlex.quote(str(run.out))}") from None
        except RuntimeError as error:
            if run.ranks == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise OSError(f"a process of the group is gone ({str(error).splitlines()[0]}): all end here, at "
                          f"step {run.state['step']}; --resume --out={shlex.quote(str(run.out))} goes on "
                          "from the last checkpoint") from None
    if run.rank == 0:
        conclude(run, log)


def conclude(run, log):
    """What a run ends with on the screen: its best loss, the table per layer, a sample."""
    config, c = run.model.config, run.c
    best = min(log, key=lambda row: row["val_loss"])
    print(f"\nbest val loss {best['val_loss']:.4f} nats per token = {best['bits_per_byte']:.4f} bits per "
          f"byte, step {best['step']:,}; {run.state['seconds']:.0f} s")
    if c.attn_share:
        print("\n" + layer_table(log[-1]["layers"], config.block_size))
    path = checkpoint_in(run.out, prefer="best")
    print(f"\nto go on: python sample.py --ckpt={shlex.quote(str(path))}")
    try:
        tokenizer = prepare.get_tokenizer(run.meta["tokenizer"])
    except OSError as error:
        return print(f"no sample here: {error}")
    model, generator = load_run(path)[0], torch.Generator().manual_seed(c.seed)
    tokens = model.stream(torch.tensor([[run.meta["bos"]]]), 120, temperature=0.8, generator=generator)
    print(f"\na sample from {path}:\n" + "".join(stream_text((t.item() for t in tokens), tokenizer)))


if __name__ == "__main__":
    run_main(main)
