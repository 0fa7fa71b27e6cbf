"""
What things cost: one command for each table, which is printed and written to experiments/results/speed_*.md
(for a trial of your own, add --results=out/trial).

    python experiments/speed.py train       steps, with and without the gate
    python experiments/speed.py to_loss     until nanoGPT's loss is reached
    python experiments/speed.py optimizers  the same for AdamW and Muon
    python experiments/speed.py sample      tokens a second, and the first one
    python experiments/speed.py gate        what every gate adds

Times on a shared machine are noisy. So candidates take turns, ratios are formed within a round, and a ratio
that is now above 1, now below, is called noise. With --nanogpt=FOLDER, a clone of github.com/karpathy/nanoGPT
that you made yourself, nanoGPT runs beside `train`, `to_loss` and `sample`; nothing of it is in here.
Reading order: alternate -> ratio_table -> the candidates -> the tables, from training_table on -> main.
"""
import contextlib
import dataclasses
import importlib.util
import io
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from experiments.compare_gates import DECIDED, VARIANTS, chosen, configs_of
from experiments.runner import RESULTS, ROOT
from gated_gpt import GPT, GPTConfig
from plumbing import checkpoint
from plumbing.flags import add_flags, parser_of, run_main
from plumbing.machine import autocast, choose_device, choose_precision, has_bfloat16, try_compile
from plumbing.report import variant

# ---- taking turns, and the table that comes of it --------------------------------------------------

WARM_UP = 3  # calls of each candidate before anything counts


def alternate(candidates, rounds, seconds):
    """{name: milliseconds of a call, in each round} of {name: callable}, which take turns: A B A B.

    A turn is as many calls as fill `seconds`, at least one. On a GPU it ends when the work is done.
    """
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None

    def turn(call, repeats):
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return 1e3 * (time.perf_counter() - began) / repeats

    warm = {name: [turn(call, 1) for _ in range(WARM_UP)][-1] for name, call in candidates.items()}
    times = {name: [] for name in candidates}
    for _ in tqdm(range(rounds), unit="round", leave=False, disable=None):
        for name, call in candidates.items():
            times[name].append(turn(call, max(1, math.ceil(1e3 * seconds / warm[name]))))
    return times


VERDICTS = {"ms": ("faster", "slower"), "s": ("faster", "slower"),
            "tokens/s": ("slower", "faster")}  # what a ratio below 1 is, and above


def verdict(ratios, unit):
    """In a word. Noise: the rounds do not agree on the side of 1, or there is only one of them."""
    if len(ratios) < 2 or min(ratios) <= 1 <= max(ratios):
        return "noise"
    return VERDICTS[unit][min(ratios) > 1]


def number(x):
    """In seven characters at most, from 0.01 on."""
    if 99_999.5 <= x < math.inf:
        return f"{x / 1e3:.1f}k" if x < 999_950 else f"{x / 1e6:#.4g}M"
    return f"{x:,.0f}" if x >= 999.5 else f"{x:#.4g}"


def ratio_table(unit, values, bases=None):
    """Markdown of {name: [value in each round]}; each is divided by bases[name], by default the first one."""
    bases = bases or dict.fromkeys(values, next(iter(values)))
    rows = [("", unit, "min-max", "ratio", "min-max", "")]
    for name, mine in values.items():
        ratios = [a / b for a, b in zip(mine, values[bases[name]])]
        cells = [text for column in (mine, ratios) for text in (
            number(statistics.median(column)), f"{number(min(column))}-{number(max(column))}")]
        rows.append((name, *cells, "base" if bases[name] == name else verdict(ratios, unit)))
    widths, sides = [max(map(len, column)) for column in zip(*rows)], "<>>>><"
    rows.insert(1, ["-" * (w - 1) + "-:"[side == ">"] for w, side in zip(widths, sides)])
    lines = (" | ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths)) for row in rows)
    return "".join(f"| {line} |\n" for line in lines)


def rates(times, tokens):
    """{name: [tokens a second]} from {name: [milliseconds of a call]} and {name: tokens of a call}."""
    return {name: [1e3 * tokens[name] / t for t in mine] for name, mine in times.items()}


# ---- the candidates: training steps of ours, and of nanoGPT beside them ----------------------------


class Run(NamedTuple):
    """What train.train makes before its first step. `fast` is the same model, perhaps compiled."""
    c: train.TrainConfig
    model: GPT
    fast: Callable
    optimizers: list
    windows: train.Windows
    device: torch.device
    precision: contextlib.AbstractContextManager


def open_run(values):
    """A Run of these values of the configs' fields. ValueError if it should be compiled and cannot be."""
    config, c = train.make_configs(values)
    device, precision = machine_of(c)
    config, meta, windows, _ = train.open_data(config, c, device)
    model, optimizers, _ = train.start(config, c, meta, device)
    fast, (_, why) = try_compile(model, windows.of_step(0, c)[0], precision, c.compile)
    if "failed" in why:
        raise ValueError(f"gate {variant(config)} cannot be compiled here ({why}): leave it out, or add "
                         "--no-compile")
    return Run(c, model, fast, optimizers, windows, device, precision)


def machine_of(c):
    """(device, context for the forward) as train.py chooses them."""
    device, _ = choose_device(c.device)
    dtype, _ = choose_precision(c.dtype, device)
    return device, autocast(dtype, device)


def step_of(run):
    """A callable that makes one training step of a run: batch, forward, backward, clipping, optimizer."""
    c, steps = run.c, count()

    def step():
        run.model.train()
        i = next(steps)
        rate = train.learning_rate_at(i, c)
        train.train_step(run.fast, run.optimizers, run.windows.of_step(i, c), rate, c, run.precision)
    return step


def nanogpt(folder, config):
    """nanoGPT's model, with the sizes of a GPTConfig, from model.py in a clone of it."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it counts its parameters aloud
            spec.loader.exec_module(module)
            return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in sizes}, bias=False))
    except (OSError, SyntaxError, AttributeError, TypeError) as error:
        raise ValueError(f"nanogpt={folder} holds no model.py of nanoGPT ({error}): name the folder of a "
                         "clone of github.com/karpathy/nanoGPT") from None


def nanogpt_step_of(model, run):
    """A callable that makes one step of nanoGPT as its train.py does, on the data and device of `run`."""
    c, T, model = run.c, run.model.config.block_size, model.to(run.device)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2),
                                               run.device.type)
    fast = torch.compile(model) if run.fast is not run.model else model
    file, on_gpu = prepare.load(c.data)[1]["train"], run.device.type == "cuda"

    def batch():  # the file mapped anew, each window a copy of its own, then stacked
        tokens = np.memmap(file.filename, file.dtype, mode="r")
        starts = torch.randint(len(tokens) - T, (c.batch_size,))
        pair = [torch.stack([torch.from_numpy(tokens[i + s : i + s + T].astype(np.int64)) for i in starts])
                for s in (0, 1)]  # (B, T) each
        return [(t.pin_memory() if on_gpu else t).to(run.device, non_blocking=on_gpu) for t in pair]

    ready = [batch()]

    def step():
        with run.precision:
            _, loss = fast(*ready.pop())
        ready.append(batch())  # the next one, while a GPU is still at work
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- the tables: each function gets the flags and the values of the configs' fields, returns Markdown --

# Dense bfloat16 peak in TFLOP/s, from NVIDIA's data sheets, by what the GPU's name contains; the first match.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "L40S": 362, "L4": 121, "A10G": 70, "RTX 4090": 165, "RTX 3090": 71}


def utilization(speeds, runs):
    """A sentence: which part of the GPU's peak each run uses. Nothing for a device without a known peak.

    FLOP of a token of a dense model, forward and backward (PaLM, arXiv 2204.02311, appendix B): six for each
    weight that multiplies (the embedding only looks up), and 12 L nh hs T for attention.
    """
    name, used = chip(next(iter(runs.values())).device), []
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    for name, run in runs.items() if peak else ():
        c = run.model.config
        looked_up = 0 if c.tie_embeddings else c.vocab_size * c.n_embd
        flops = (6 * (run.model.num_params() - looked_up)
                 + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size) * statistics.median(speeds[name])
        used.append(f"{name} {flops / peak / 1e12:.1%}")
    return f"\nMFU, of a peak of {peak} TFLOP/s in bfloat16: {', '.join(used)}.\n" if used else ""


def training_table(flags, values):
    """Tokens a second in training, with and without the gate, at equal parameters."""
    base, _ = train.make_configs(values | {"gate": "none"})
    runs = {f"{gate} {optimizer}": open_run(values | dataclasses.asdict(config) | {"optimizer": optimizer})
            for optimizer in ("adamw", "muon") for gate, config in configs_of(["none", "g1"], base).items()}
    steps, one = {name: step_of(run) for name, run in runs.items()}, runs["none adamw"]
    models = {"none": one.model, "g1": runs["g1 adamw"].model}
    if flags.nanogpt:  # first, and so the base
        models = {"nanoGPT": nanogpt(flags.nanogpt, one.model.config)} | models
        steps = {"nanoGPT": nanogpt_step_of(models["nanoGPT"], one)} | steps
    times = alternate(steps, flags.rounds, flags.seconds)
    speeds = rates(times, dict.fromkeys(times, one.c.batch_size * one.model.config.block_size))
    sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()):,}" for name, m in models.items())
    return f"""{ratio_table("tokens/s", speeds)}{utilization(speeds, runs)}
Training steps, whole: batch, forward, backward, clipping, optimizer; no logging. Parameters: {sizes}.
"""


SHORT = ("--data=shakespeare --preset=laptop --n_layer=4 --block_size=64 --batch_size=16 --warmup_steps=20 "
         "--learning_rate=7e-3 --min_lr_ratio=0 --no-attn_share")
RECIPES = {  # {row: flags of train.py} of to_loss; the first has the sizes of nanoGPT's command
    "same sizes": f"{SHORT} --max_steps=220 --eval_every=220",
    "smaller": f"{SHORT} --n_layer=3 --max_steps=220 --eval_every=220 --n_head=2 --n_kv_head=1 "
               "--mlp_hidden=256"}
LAPTOP = {  # of optimizers: a learning rate that suits each, and as many steps as it needs
    "adamw": "--preset=laptop --optimizer=adamw --learning_rate=5e-3 --eval_every=50 --no-attn_share",
    "muon": "--preset=laptop --max_steps=450 --eval_every=50 --no-attn_share"}
THEIRS = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
          "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
          "--lr_decay_iters=2000 --dropout=0.0")  # the command in nanoGPT's README for a CPU
LOSSES = {"nanoGPT": r"step \d+: .* val loss (\d+\.\d+)",  # where the printed lines have the validation loss
          "ours": r" *\d+ +\d+\.\d{4} +(\d+\.\d{4}) +\d+\.\d{4} "}


def watch(command, folder, pattern, target):
    """(seconds until a Python command prints a loss of at most the target, or inf; seconds in all; last loss)

    The losses are where `pattern` finds them. ValueError, with the last line it printed, when it fails.
    """
    began, reached, loss, line = time.perf_counter(), math.inf, math.nan, ""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([sys.executable, "-u", *command], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if match := re.match(pattern, line):
                loss = float(match[1])
                if loss <= target:
                    reached = min(reached, time.perf_counter() - began)
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} in {folder} ended with status {process.returncode}: "
                         f"{line.strip()}")
    return reached, time.perf_counter() - began, loss


@torch.no_grad()
def later_loss(model, meta, tokens):
    """Validation loss without each window's first token, which nanoGPT never has to guess from nothing."""
    windows = train.Windows(tokens["val"], meta["bos"], model.config.block_size, torch.device("cpu"))
    idx, targets = windows.at(windows.spaced(256))  # (256, T) each
    return F.cross_entropy(model.eval()(idx)[0][:, 1:].flatten(0, 1), targets[:, 1:].flatten()).item()


def race(runs, flags):
    """Markdown: who reaches flags.target when. runs: {name: (folder, command of a seed, losses' pattern)}"""
    found = {name: [] for name in runs}
    for seed in tqdm(range(flags.seeds), unit="seed", leave=False, disable=None):
        for name, (folder, command, pattern) in runs.items():
            found[name].append(watch(command(seed), folder, pattern, flags.target))
    until, whole, last = ({name: [run[i] for run in mine] for name, mine in found.items()}
                          for i in range(3))
    first = next(iter(runs))
    until[first] = [min(pair) for pair in zip(until[first], whole[first])]
    ends = "".join(f"- {name}: {' '.join(f'{loss:.4f}' for loss in mine)}\n" for name, mine in last.items())
    return f"""From the start of the command until it prints a validation loss of {flags.target} or less.
Inf: not reached; {first} then counts with its whole time.

{ratio_table("s", until)}
The whole command:

{ratio_table("s", whole)}
The last losses, round by round, for each seed from 0 on:

{ends}"""


def ours_for(recipes, out):
    """`runs` of race for {name: flags of train.py}; the runs end up in `out`/name-seed."""
    def command(name, seed):
        return [str(ROOT / "train.py"), "--device=cpu", *shlex.split(recipes[name]), f"--seed={seed}",
                f"--out={Path(out, f'{name}-{seed}')}"]

    return {name: (out, partial(command, name), LOSSES["ours"]) for name in recipes}


def said(recipes):
    return "".join(f"- {name}: `python train.py {recipe}`\n" for name, recipe in recipes.items())


def optimizers_table(flags, values):
    """Wall time until the laptop preset reaches a validation loss, with AdamW and with Muon."""
    recipes = {"ours": flags.recipe} if flags.recipe else LAPTOP
    with tempfile.TemporaryDirectory() as out:
        return race(ours_for(recipes, out), flags) + "\n" + said(recipes)


def to_loss_table(flags, values):
    """Wall time of nanoGPT and of ours until a validation loss on Tiny Shakespeare is reached."""
    shakespeare, theirs = prepare.load("shakespeare"), Path(flags.nanogpt).resolve()
    recipes = {"ours": flags.recipe} if flags.recipe else RECIPES
    for name in ("train.py", "data/shakespeare_char/train.bin", "data/shakespeare_char/meta.pkl"):
        if not (theirs / name).is_file():
            raise ValueError(f"nanogpt={flags.nanogpt} has no {name}: name a clone of nanoGPT in which "
                             "data/shakespeare_char/prepare.py has run (it takes Tiny Shakespeare from "
                             "input.txt beside it, or from the network)")
    with tempfile.TemporaryDirectory() as out:
        command = ["train.py", *shlex.split(flags.theirs), f"--out_dir={out}/theirs"]
        table = race({"nanoGPT": (theirs, lambda seed: command, LOSSES["nanoGPT"])} | ours_for(recipes, out),
                     flags)
        for name in recipes:
            files = (Path(out, f"{name}-{seed}", "best.pt") for seed in range(flags.seeds))
            later = " ".join(f"{later_loss(checkpoint.load(file)[0], *shakespeare):.4f}" for file in files)
            table += f"- {name}, from token 2 on: {later}\n"
    return f"""{table}
- nanoGPT: `python train.py {flags.theirs}`
{said(recipes)}
nanoGPT's seed is fixed: its runs differ in time only. Its loss is a mean over random windows, of tokens 2
to 65, each after 1 to 64 others. Ours is one over fixed windows of the same text, tokens 1 to T behind BOS.
Token 1 must be guessed from nothing, so ours is the harder count; "from token 2 on" leaves it out, for the
best checkpoint. In both a token is a byte.
"""


def sampling_table(flags, values):
    """New tokens a second with the key/value cache, and how soon the first one comes."""
    config, c = train.make_configs(values)
    device, _ = choose_device(c.device)
    model, n, k = GPT(config).to(device), flags.tokens, min(flags.positions, flags.tokens)
    rival = nanogpt(flags.nanogpt, config).to(device).eval() if flags.nanogpt else None
    speed, bases = {}, {}
    for batch in (1, 16):
        idx = torch.randint(config.vocab_size, (batch, n), device=device)  # (B, n)

        def ours(idx=idx):
            for _ in model.stream(idx[:, :1], n):
                pass

        def theirs(idx=idx):  # without a cache, a token costs a forward of all before it, whoever made them
            for i in range(k):
                rival.generate(idx[:, : 1 + int((i + 0.5) * n / k)], 1)

        names = (f"nanoGPT x {batch}", f"ours x {batch}")
        calls = dict(zip(names, (theirs, ours))) if rival else {names[1]: ours}
        tokens = {names[0]: batch * k, names[1]: batch * n}
        speed |= rates(alternate(calls, flags.rounds, flags.seconds), tokens)
        bases |= dict.fromkeys(calls, names[0] if rival else "ours x 1")
    note = f"\nnanoGPT has no cache; {k} of {n} tokens are timed, at evenly spaced lengths." if rival else ""
    return f"""{ratio_table("tokens/s", speed, bases)}
{n} new tokens after one, for 1 text and for 16 at once; temperature 1, gate {variant(config)}.{note}

Start-up: a process that does no more than import torch, and one of sample.py for one token of a tiny model.

{ratio_table("ms", start_up(flags))}"""


def start_up(flags):
    """{name: [milliseconds]} of sample.py with one token from a tiny model, and of importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder, "tiny.pt"), GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=1, n_embd=16))
        checkpoint.save(path, {"config": dataclasses.asdict(model.config), "model": model.state_dict(),
                               "tokenizer": "bytes", "step": 0, "train_config": {"data": "none"}})
        commands = {"import torch": ["-c", "import torch"],
                    "sample.py": [ROOT / "sample.py", f"--ckpt={path}", "--tokens=1"]}
        return alternate({name: partial(subprocess.run, [sys.executable, *command], check=True,
                                        stdout=subprocess.DEVNULL)
                          for name, command in commands.items()}, flags.rounds, 0)


DECODED = 100  # tokens in a call of the gate table


def gate_table(flags, values):
    """What every gate adds to a forward, to a training step and to decoding."""
    base, _ = train.make_configs(values | {"gate": "none"})
    runs = {name: open_run(values | dataclasses.asdict(config))
            for name, config in configs_of(chosen(flags.variants), base).items()}
    bases, one = {name: VARIANTS[name].pair for name in runs}, next(iter(runs.values()))
    batch = one.windows.at(one.windows.spaced(one.c.batch_size))  # (B, T) each
    n = min(DECODED, base.block_size - 1)

    @torch.no_grad()
    def forward(run):
        with run.precision:
            run.fast(*batch)

    def decode(run):
        for _ in run.model.stream(batch[0][:1, :1], n):  # from BOS
            pass

    parts = {"Forward, without gradients": lambda run: partial(forward, run), "Training step": step_of,
             f"Decoding {n} tokens, one by one": lambda run: partial(decode, run)}
    tables = []
    for title, call in parts.items():
        for run in runs.values():
            run.model.eval()  # a training step sets it back by itself
        times = alternate({name: call(run) for name, run in runs.items()}, flags.rounds, flags.seconds)
        tables.append(f"{title}:\n\n{ratio_table('ms', times, bases)}\n")
    return "".join(tables) + f"""Dense variants are divided by `none`, at its number of parameters to half a
percent, mixtures of experts by `moe`. Training is with {one.c.optimizer}; decoding is one text, in float32.
"""


# ---- the command line ------------------------------------------------------------------------------


class Table(NamedTuple):
    make: Callable
    flags: str  # those of FLAGS and of TrainConfig; the model's come with n_layer
    sizes: dict  # values of the configs' fields, unless flags say otherwise; `data` gives the vocabulary


TRAINING = "rounds seconds device dtype compile threads data batch_size"
TABLES = {
    "train": Table(training_table, f"{TRAINING} nanogpt", dict(
        data="backcopy", n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)),  # as THEIRS
    "to_loss": Table(to_loss_table, "nanogpt target seeds recipe theirs threads",
                     dict(device="cpu", target=1.8857)),
    "optimizers": Table(optimizers_table, "target seeds recipe threads", dict(device="cpu", target=3.5)),
    "sample": Table(sampling_table, "rounds seconds nanogpt tokens positions device threads", dict(
        vocab_size=257, n_layer=6, n_head=6, n_embd=384, block_size=1024)),
    "gate": Table(gate_table, f"{TRAINING} variants", dict(
        data="backcopy", n_layer=2, n_head=4, n_kv_head=2, n_embd=128, block_size=128, batch_size=8)),
}
GATE_ON_CUDA = train.PRESETS["gpt2"] | dict(data="backcopy", grad_accum=1)
FLAGS = {
    "rounds": dict(type=int, default=5, help="turns of each candidate [%(default)s]"),
    "seconds": dict(type=float, default=0.3, help="least length of a turn [%(default)s]"),
    "nanogpt": dict(metavar="FOLDER", default="", help="your clone of nanoGPT, to run beside us"),
    "tokens": dict(type=int, default=1000, help="new tokens of a text [%(default)s]"),
    "positions": dict(type=int, default=20, help="of nanoGPT's tokens, how many are timed [%(default)s]"),
    "variants": dict(help="some of compare_gates.py's, such as g1,g2 [all]"),
    "target": dict(type=float, help="validation loss to reach [%(default)s]"),
    "seeds": dict(type=int, default=3, help="runs of each side [%(default)s]"),
    "recipe": dict(metavar="FLAGS", help="flags of train.py, instead of ours"),
    "theirs": dict(metavar="FLAGS", default=THEIRS, help="nanoGPT's flags [as in its README]"),
}


def chip(device):
    """The name of the processor, as far as it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return (re.search(r"^model name\s*: (.+)$", told, re.MULTILINE) or [0, platform.machine()])[1]


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # read once, when torch is loaded


def parse_flags(argv):
    """(flags, the fields of the two configs that were given)"""
    parser = parser_of(__doc__, "speed.py", "TABLE [--flag=value ...]")
    tables = parser.add_subparsers(prog="speed.py", dest="table", required=True, metavar="TABLE")
    model, training = ({f.name for f in dataclasses.fields(cls)} for cls in (GPTConfig, train.TrainConfig))
    for name, (make, own, sizes) in TABLES.items():
        sub = tables.add_parser(name, help=make.__doc__, description=make.__doc__, allow_abbrev=False)
        sub.add_argument("--results", type=Path, default=RESULTS,
                         help="where speed_*.md goes [experiments/results]")
        sub.add_argument("--avx2", action="store_true", help="keep an x86 processor to AVX2, as old ones are")
        for flag in own.split():
            if flag in FLAGS:
                sub.add_argument(f"--{flag}", **FLAGS[flag])
        sub.set_defaults(**{flag: value for flag, value in sizes.items() if flag in FLAGS})
        shown = {*own.split(), *(model if "n_layer" in sizes else ())}
        if name in ("train", "gate"):  # which decide about the gate themselves
            shown -= DECIDED - {"data", "vocab_size"}
        add_flags(sub, GPTConfig, train.TrainConfig, skip=(model | training) - shown)
    flags = parser.parse_args(argv)
    for name, least in (("rounds", 1), ("seconds", 0), ("tokens", 1), ("positions", 1), ("seeds", 1)):
        if not least <= getattr(flags, name, least) < math.inf:
            raise ValueError(f"{name}={getattr(flags, name)} must be at least {least}, and finite")
    return flags, {name: value for name, value in vars(flags).items() if name in model | training}


def keep_to_avx2(argv):
    """Start this command again, in an environment in which torch and all child processes use AVX2 only."""
    if not AVX2.items() <= os.environ.items():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, __file__, *argv], os.environ | AVX2)
    if (used := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        raise ValueError(f"avx2=on, but torch uses {used} here: --avx2 needs an x86 processor with AVX2")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, given = parse_flags(argv)
    if flags.avx2:
        keep_to_avx2(argv)
    make, own, sizes = TABLES[flags.table]
    _, c = train.make_configs(sizes | given)
    device, _ = choose_device(c.device)
    compiled = "compile" in own.split() and (device.type == "cuda" if c.compile is None else c.compile)
    values = (GATE_ON_CUDA if flags.table == "gate" and device.type == "cuda" else sizes) | given
    if "data" in values:
        values = {"vocab_size": prepare.load(values["data"])[0]["vocab_size"]} | values
    if c.threads:
        torch.set_num_threads(c.threads)
    # Many models share one piece of code here, and each must keep a graph of its own.
    with (torch._dynamo.config.patch(recompile_limit=1000, automatic_dynamic_shapes=False) if compiled
          else contextlib.nullcontext()):
        body = make(flags, values)
    dtype = choose_precision(c.dtype, device)[0] if "dtype" in own.split() else torch.float32
    text = f"""# speed: {flags.table}

- command: `python experiments/speed.py {shlex.join(argv)}`
- machine: {device} ({chip(device)}), CPU threads: {torch.get_num_threads()}, torch {torch.__version__}
- CPU: {'kept to AVX2' if flags.avx2 else torch.backends.cpu.get_cpu_capability()}, \
{'multiplies' if has_bfloat16(torch.device('cpu')) else 'does not multiply'} bfloat16
- {dtype}{', compiled' * compiled}: {' '.join(f'{k}={v}' for k, v in values.items() if k not in FLAGS)}

{body}"""
    if hasattr(flags, "rounds"):
        text += f"""
Rounds: {flags.rounds}, after {WARM_UP} calls to warm up; medians. In a round all take turns, each for
{flags.seconds:g} s or one call. Ratio: to the base in the same round. Noise: ratios on both sides of 1, or
one only. (Two in 2^{flags.rounds} candidates that equal their base would land on one side by chance.)
"""
    flags.results.mkdir(parents=True, exist_ok=True)
    kind = f"_{device.type}" * (device.type != "cpu") + "_avx2" * flags.avx2 + "_compiled" * compiled
    path = flags.results / f"speed_{flags.table}{kind}.md"
    path.write_text(text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    run_main(main)
