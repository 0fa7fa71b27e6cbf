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
Reading order: alternate -> race -> training_table -> to_loss_table -> sampling_table -> main.
"""
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
from experiments.runner import RESULTS, ROOT, head, positive
from experiments.tables import table
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
    """Markdown of {name: [value in each round]}: medians and ranges, also of the ratios to the first name."""
    def said(numbers):
        median, *ends = (f"{x:,.0f}" if 999.5 <= x < math.inf else f"{x:#.4g}"
                         for x in (statistics.median(numbers), min(numbers), max(numbers)))
        return median, "-".join(ends)

    base, rows = next(iter(values)), []
    for name, mine in values.items():
        ratios = [a / b for a, b in zip(mine, values[base])]
        word = ("base" if name == base else "noise" if len(ratios) < 2 or min(ratios) <= 1 <= max(ratios)
                else "faster" if (min(ratios) > 1) == (unit == "tokens/s") else "slower")
        rows.append((name, *said(mine), *said(ratios), word))
    headings = "", unit, "min-max", "ratio", "min-max", ""
    return table(rows, {i: (heading, "s" if heading else "") for i, heading in enumerate(headings)})


TURNS = f"""
Medians of the rounds, after {WARM_UP} calls to warm up. In a round all take turns, of {SECONDS} s or a call.
Ratio: to the first in the same round. Noise: ratios on both sides of 1, or one only.
"""


def race(calls, rounds):
    """The table of {name: (tokens of a call, callable)}."""
    times = alternate({name: call for name, (_, call) in calls.items()}, rounds)
    return ratio_table("tokens/s", {name: [1e3 * tokens / t for t in times[name]]
                                    for name, (tokens, _) in calls.items()})


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
    device, said, sizes, steps = choose_device(c.device), [], [], {}
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
        sizes.append(f"{name} {sum(p.numel() for p in model.parameters()):,}")
        steps[name] = c.batch_size * base.block_size, step

    if flags.nanogpt:  # first, and so the base
        model, betas = nanogpt(flags.nanogpt, base).to(device), (c.beta1, c.beta2)
        how = c.weight_decay, c.learning_rate, betas, device.type
        add("nanoGPT", model, [model.configure_optimizers(*how)])
    for optimizer in ("adamw", "muon"):
        for gate, config in configs_of(["none", "g1"], base).items():
            mine = dataclasses.replace(c, optimizer=optimizer)
            add(f"{gate} {optimizer}", *train.start(config, mine, meta, device)[:2])
    return f"""{race(steps, flags.rounds)}
Whole steps of train.py: batch, forward, backward, clipping, optimizer; no logging. Parameters:
{', '.join(sizes)}.
""" + TURNS


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
    prepare.load("shakespeare")  # is it there?
    clone, found = Path(flags.nanogpt or "").resolve(), {name: [] for name in RUNS}
    if not (clone / "data/shakespeare_char/meta.pkl").is_file():
        raise ValueError(f"nanogpt={flags.nanogpt} is no clone of nanoGPT in which its "
                         "data/shakespeare_char/prepare.py has run: run it there first")
    with tempfile.TemporaryDirectory() as out:
        for seed in tqdm(range(flags.rounds), unit="seed", leave=False, disable=None):
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


TOKENS = 1000  # new ones, of each text


def sampling_table(flags, values):
    """New tokens a second, with the key/value cache."""
    config, c = train.make_configs(values)
    device, tables, n, k, note = choose_device(c.device), [], TOKENS, 5, ""
    model = GPT(config).to(device)
    if flags.nanogpt:
        rival = nanogpt(flags.nanogpt, config).to(device).eval()
        note = f"\nnanoGPT has no cache; {k} of {n} tokens are timed, at evenly spaced lengths."
    for batch in 1, 16:
        idx, calls = torch.randint(config.vocab_size, (batch, n), device=device), {}  # (B, n)
        if flags.nanogpt:  # without a cache, a token costs a forward of all before it, whoever made them
            calls[f"nanoGPT x {batch}"] = batch * k, lambda idx=idx: [
                rival.generate(idx[:, : 1 + int((i + 0.5) * n / k)], 1) for i in range(k)]
        calls[f"ours x {batch}"] = batch * n, lambda idx=idx: list(model.stream(idx[:, :1], n))
        tables.append(race(calls, flags.rounds))
    return "\n".join(tables) + f"""
{n} new tokens after one, for 1 text and for 16 at once; temperature 1, gate {variant(config)}.{note}
""" + TURNS


MODEL = {f.name for f in dataclasses.fields(GPTConfig)} | {"device", "threads"}
TABLES = {  # name: (function, rounds, sizes unless flags say otherwise, the flags of train.py that it takes)
    "train": (training_table, 5, dict(data="backcopy", n_layer=4, n_head=4, n_embd=128, block_size=64,
                                      batch_size=12),  # as nanoGPT's command
              MODEL - DECIDED | {"vocab_size", "data", "batch_size", "dtype", "compile"}),
    "to_loss": (to_loss_table, 3, {}, {"threads"}),
    "sample": (sampling_table, 5, dict(vocab_size=257, n_layer=6, n_head=6, n_embd=384, block_size=1024),
               MODEL)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(__doc__, "speed.py", "TABLE [--flag=value ...]")
    parser.add_argument("table", choices=TABLES, help="what is measured")
    parser.add_argument("--rounds", type=positive, help="turns of each candidate [5; of to_loss 3]")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="your clone of nanoGPT")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder [experiments/results]")
    flags, rest = parser.parse_known_args(argv)
    given = train.parse_flags(rest)
    make, rounds, sizes, takes = TABLES[flags.table]
    if idle := given.keys() - takes:
        raise ValueError(f"--{min(idle)} does nothing for speed.py {flags.table}: leave it out")
    flags.rounds = flags.rounds or rounds
    values, trains = sizes | given, flags.table == "train"
    c = train.make_configs(values)[1]
    device, cpu = choose_device(c.device), torch.backends.cpu.get_cpu_capability()
    torch.set_num_threads(c.threads or torch.get_num_threads())
    body = make(flags, values)
    compiled = trains and (device.type == "cuda" if c.compile is None else c.compile)
    dtype = choose_precision(c.dtype, device) if trains else torch.float32
    able = "multiplies" if has_bfloat16(torch.device("cpu")) else "does not multiply"
    made = head("speed.py", argv, c, 1) | {
        "CPU": f"{cpu}, {able} bfloat16", "rounds": flags.rounds, f"{dtype}{', compiled' * compiled}":
        " ".join(f"{name}={value}" for name, value in values.items()) or "see the commands"}
    made = "\n".join(f"- {what}: {said}" for what, said in made.items())
    text = f"# speed: {flags.table}\n\n{made}\n\n{body}"
    kind = f"_{device.type}" * (device.type != "cpu") + "_avx2" * (cpu == "AVX2") + "_compiled" * compiled
    path = Path(flags.results, f"speed_{flags.table}{kind}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{text}\n{path}")


if __name__ == "__main__":
    run_main(main)
