"""
What things cost: one command for each table, which is printed and written to experiments/results/speed_*.md
(for a trial of your own, add --results=out/trial).

    python experiments/speed.py train     training, with and without the gate
    python experiments/speed.py to_loss   until nanoGPT's loss is reached
    python experiments/speed.py sample    new tokens a second

Times on a shared machine are noisy. So candidates take turns, ratios are formed within a round, and a ratio
that is now above 1, now below, is called noise. With --nanogpt=FOLDER, your clone of karpathy/nanoGPT, that
runs beside us; nothing of it is in here. `train` and `sample` take train.py's flags of the model, too. Behind
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 a CPU is as most laptops': with AVX2 and no more.
Reading order: alternate -> ratio_table -> training_table -> to_loss_table -> sampling_table -> main.
"""
import argparse
import dataclasses
import importlib.util
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from experiments.runner import RESULTS, ROOT, chip, positive
from experiments.variants import DECIDED, configs_of
from gated_gpt import GPT, GPTConfig
from plumbing.flags import parser_of, run_main
from plumbing.machine import autocast, choose_device, choose_precision, has_bfloat16, try_compile
from plumbing.report import variant

# ---- taking turns, and the table that comes of it --------------------------------------------------

WARM_UP = 3  # calls of each candidate before anything counts
SECONDS = 0.3  # a turn is as many calls as fill them, at least one


def alternate(candidates, rounds):
    """{name: milliseconds of a call, in each round} of {name: callable}, which take turns: A B A B.

    On a GPU a turn ends when the work is done.
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
            times[name].append(turn(call, max(1, math.ceil(1e3 * SECONDS / warm[name]))))
    return times


def ratio_table(unit, values):
    """Markdown of {name: [value in each round]}: medians and ranges, also of the ratios to the first name.

    Noise: the rounds do not agree on the side of 1, or there is only one of them.
    """
    def said(numbers):
        median, *ends = (f"{x:,.0f}" if 999.5 <= x < math.inf else f"{x:#.4g}"
                         for x in (statistics.median(numbers), min(numbers), max(numbers)))
        return median, "-".join(ends)

    base, *_ = values
    rows = [("", unit, "min-max", "ratio", "min-max", "")]
    for name, mine in values.items():
        ratios = [a / b for a, b in zip(mine, values[base])]
        word = ("base" if name == base else "noise" if len(ratios) < 2 or min(ratios) <= 1 <= max(ratios)
                else "faster" if (min(ratios) > 1) == (unit == "tokens/s") else "slower")
        rows.append((name, *said(mine), *said(ratios), word))
    widths, sides = [max(map(len, column)) for column in zip(*rows)], "<>>>><"
    rows.insert(1, ["-" * (w - 1) + "-:"[side == ">"] for w, side in zip(widths, sides)])
    lines = (" | ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths)) for row in rows)
    return "".join(f"| {line} |\n" for line in lines)


# ---- the tables: each function gets the flags and the values of the configs' fields, returns Markdown --


def nanogpt(folder, config):
    """nanoGPT's model, with the sizes of a GPTConfig, from model.py in a clone of it."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    try:
        spec.loader.exec_module(module)
        return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in sizes}, bias=False))
    except (OSError, SyntaxError, AttributeError, TypeError) as error:
        raise ValueError(f"nanogpt={folder} holds no model.py of nanoGPT ({error}): name the folder of a "
                         "clone of github.com/karpathy/nanoGPT") from None


def training_table(flags, values):
    """Tokens a second in training, with and without the gate, at equal parameters."""
    base, c = train.make_configs(values | {"gate": "none"})
    device, said, models, steps = choose_device(c.device), [], {}, {}
    precision = autocast(choose_precision(c.dtype, device), device)
    base, meta, windows, _ = train.open_data(base, c, device)

    def add(name, model, optimizers):
        numbers = count()
        fast = try_compile(model, windows.of_step(0, c)[0], precision, c.compile, said.append)
        if "failed" in said[-1]:
            raise ValueError(f"{name}: {said[-1]}; leave it out, or add --no-compile")

        def step():
            i = next(numbers)
            rate = train.learning_rate_at(i, c)
            train.train_step(fast, optimizers, windows.of_step(i, c), rate, c, precision)
        models[name], steps[name] = model, step

    if flags.nanogpt:  # first, and so the base
        model, betas = nanogpt(flags.nanogpt, base).to(device), (c.beta1, c.beta2)
        how = c.weight_decay, c.learning_rate, betas, device.type
        add("nanoGPT", model, [model.configure_optimizers(*how)])
    for optimizer in ("adamw", "muon"):
        for gate, config in configs_of(["none", "g1"], base).items():
            mine = dataclasses.replace(c, optimizer=optimizer)
            add(f"{gate} {optimizer}", *train.start(config, mine, meta, device)[:2])
    tokens = c.batch_size * base.block_size
    speeds = {name: [1e3 * tokens / t for t in mine] for name, mine in alternate(steps, flags.rounds).items()}
    sizes = (f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items())
    return f"""{ratio_table("tokens/s", speeds)}
Whole steps of train.py: batch, forward, backward, clipping, optimizer; no logging. Parameters:
{', '.join(sizes)}.
"""


TARGET = 1.8857  # val loss at which nanoGPT's command ends, the one in its README for a CPU
OURS = ("--data=shakespeare --block_size=64 --n_embd=128 --qk_norm --batch_size=16 --max_steps=220 "
        "--optimizer=muon --learning_rate=7e-3 --schedule=cosine --warmup_steps=20 --min_lr_ratio=0 "
        "--weight_decay=0.1 --eval_every=220 --no-attn_share")
RUNS = {
    "nanoGPT": "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
               "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
               "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0",
    "same sizes": f"{OURS} --n_layer=4 --n_head=4",
    "smaller": f"{OURS} --n_layer=3 --n_head=2 --n_kv_head=1 --mlp_hidden=256"}
# Where a printed line has the validation loss: theirs, ours.
LOSS = r"step \d+: .* val loss (\d+\.\d+)| *\d+ +\d+\.\d{4} +(\d+\.\d{4}) +\d+\.\d{4} "


def watch(command, folder):
    """(seconds until a Python command prints a loss of at most TARGET, or inf; seconds in all; last loss)"""
    began, reached, loss, line = time.perf_counter(), math.inf, math.nan, ""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([sys.executable, "-u", *command], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if match := re.match(LOSS, line):
                loss = float(match[1] or match[2])
                reached = min(reached, time.perf_counter() - began) if loss <= TARGET else reached
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} in {folder} ended with status {process.returncode}: "
                         f"{line.strip()}")
    return reached, time.perf_counter() - began, loss


def to_loss_table(flags, _):
    """Wall time of nanoGPT and of ours until a validation loss on Tiny Shakespeare is reached."""
    _, clone, found = prepare.load("shakespeare"), Path(flags.nanogpt).resolve(), {name: [] for name in RUNS}
    for name in ("train.py", "data/shakespeare_char/train.bin", "data/shakespeare_char/meta.pkl"):
        if not (clone / name).is_file():
            raise ValueError(f"nanogpt={flags.nanogpt} has no {name}: name a clone of nanoGPT in which "
                             "data/shakespeare_char/prepare.py has run (it takes Tiny Shakespeare from "
                             "input.txt beside it, or from the network)")
    with tempfile.TemporaryDirectory() as out:
        for seed in tqdm(range(flags.seeds), unit="seed", leave=False, disable=None):
            for name, recipe in RUNS.items():
                ours = "--device=cpu", f"--seed={seed}", f"--out={name}-{seed}"
                script, more, where = (("train.py", [f"--out_dir={out}/theirs"], clone) if name == "nanoGPT"
                                       else (str(ROOT / "train.py"), ours, out))
                found[name].append(watch([script, *shlex.split(recipe), *more], where))
    until = {name: [min(seconds, whole) if name == "nanoGPT" else seconds for seconds, whole, _ in runs]
             for name, runs in found.items()}
    ends = (f"- {name}: {' '.join(f'{loss:.4f}' for *_, loss in runs)}: `python train.py {RUNS[name]}`\n"
            for name, runs in found.items())
    return f"""From the start of the command until it prints a validation loss of {TARGET} or less.
Inf: not reached; nanoGPT then counts with its whole time.

{ratio_table("s", until)}
The last losses, for each seed from 0 on, and the commands:

{"".join(ends)}
nanoGPT's seed is fixed: its runs differ in time only. Its loss is a mean over random windows, of tokens 2
to 65, each after 1 to 64 others. Ours is one over fixed windows of the same text, tokens 1 to T behind BOS.
Token 1 must be guessed from nothing, so ours is the harder count. In both a token is a byte.
"""


def sampling_table(flags, values):
    """New tokens a second, with the key/value cache."""
    config, c = train.make_configs(values)
    device, tables, n, note = choose_device(c.device), [], flags.tokens, ""
    model, k = GPT(config).to(device), min(5, n)
    if flags.nanogpt:
        rival = nanogpt(flags.nanogpt, config).to(device).eval()
        note = f"\nnanoGPT has no cache; {k} of {n} tokens are timed, at evenly spaced lengths."
    for batch in 1, 16:
        idx, calls = torch.randint(config.vocab_size, (batch, n), device=device), {}  # (B, n)
        if flags.nanogpt:  # without a cache, a token costs a forward of all before it, whoever made them
            calls["nanoGPT"] = k, lambda idx=idx: [
                rival.generate(idx[:, : 1 + int((i + 0.5) * n / k)], 1) for i in range(k)]
        calls["ours"] = n, lambda idx=idx: list(model.stream(idx[:, :1], n))
        times = alternate({name: call for name, (_, call) in calls.items()}, flags.rounds)
        speeds = {f"{name} x {batch}": [1e3 * batch * calls[name][0] / t for t in mine]
                  for name, mine in times.items()}
        tables.append(ratio_table("tokens/s", speeds))
    return "\n".join(tables) + f"""
{n} new tokens after one, for 1 text and for 16 at once; temperature 1, gate {variant(config)}.{note}
"""


MODEL = {f.name for f in dataclasses.fields(GPTConfig)} | {"preset", "device", "threads"}
TABLES = {  # name: (function, sizes unless flags say otherwise, its flags)
    "train": (training_table, dict(data="backcopy", n_layer=4, n_head=4, n_embd=128, block_size=64,
                                   batch_size=12),  # as nanoGPT's command
              MODEL - DECIDED | {"vocab_size", "data", "batch_size", "dtype", "compile", "rounds"}),
    "to_loss": (to_loss_table, {}, {"threads", "seeds"}),
    "sample": (sampling_table, dict(vocab_size=257, n_layer=6, n_head=6, n_embd=384, block_size=1024),
               MODEL | {"rounds", "tokens"})}
COUNTS = {"rounds": (5, "turns of each candidate"), "tokens": (1000, "new tokens of a text"),
          "seeds": (3, "runs of each side")}


def parse_flags(argv):
    """(our own flags, fields of the two configs that were given)"""
    parser = parser_of(__doc__, "speed.py", "TABLE [--flag=value ...]")
    parser.add_argument("table", choices=TABLES, help="what is measured")
    for name, (default, what) in COUNTS.items():
        parser.add_argument(f"--{name}", type=positive, help=f"{what} [{default}]", default=argparse.SUPPRESS)
    parser.add_argument("--nanogpt", metavar="FOLDER", default="", help="your clone of nanoGPT")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder [experiments/results]")
    flags, rest = parser.parse_known_args(argv)
    given = train.parse_flags(rest)
    if idle := (vars(flags).keys() & COUNTS.keys() | given.keys()) - TABLES[flags.table][2]:
        raise ValueError(f"--{min(idle)} does nothing for speed.py {flags.table}: leave it out")
    flags = argparse.Namespace(**{name: default for name, (default, _) in COUNTS.items()} | vars(flags))
    return flags, train.PRESETS.get(given.pop("preset", None), {}) | given


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, given = parse_flags(argv)
    make, sizes, _ = TABLES[flags.table]
    values, trains = sizes | given, flags.table == "train"
    c = train.make_configs(values)[1]
    device, cpu = choose_device(c.device), torch.backends.cpu.get_cpu_capability()
    torch.set_num_threads(c.threads or torch.get_num_threads())
    body = make(flags, values)
    compiled = trains and (device.type == "cuda" if c.compile is None else c.compile)
    dtype = choose_precision(c.dtype, device) if trains else torch.float32
    text = f"""# speed: {flags.table}

- command: `python experiments/speed.py {shlex.join(argv)}`
- machine: {device} ({chip(device)}), CPU threads: {torch.get_num_threads()}, torch {torch.__version__}
- CPU: {cpu}, {'multiplies' if has_bfloat16(torch.device('cpu')) else 'does not multiply'} bfloat16
- {dtype}{', compiled' * compiled}: {' '.join(f'{k}={v}' for k, v in values.items()) or 'see the commands'}

{body}""" + f"""
Rounds: {flags.rounds}, after {WARM_UP} calls to warm up; medians. In a round all take turns, each for
{SECONDS} s or one call. Ratio: to the first in the same round. Noise: ratios on both sides of 1, or one only.
""" * (flags.table != "to_loss")
    kind = f"_{device.type}" * (device.type != "cpu") + "_avx2" * (cpu == "AVX2") + "_compiled" * compiled
    path = Path(flags.results, f"speed_{flags.table}{kind}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{text}\n{path}")


if __name__ == "__main__":
    run_main(main)
