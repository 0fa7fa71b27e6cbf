"""
The paper's comparison, small: every gate and every control of its tables, trained alike, in one table.

    python experiments/compare_gates.py --task=backcopy --jobs=2         who keeps the sink? 3 seeds each
    python experiments/compare_gates.py --task=python --variants=g1,g2 --seeds=5 --n_layer=6
    python experiments/compare_gates.py --task=backcopy --from_results   draw the figures again, no training

A new variant is one new row of VARIANTS. Runs are kept in out/compare-TASK/ under a fingerprint of all that
decides their outcome (flags, seed, data, and the code of gated_gpt.py but for its comments). So a comparison
that was broken off goes on where it stopped, and two recipes are never mixed.
Reading order: VARIANTS -> TASKS -> plan -> one_run -> run_all -> summary -> COLUMNS -> main.
"""
import argparse
import ast
import csv
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from data.prepare import run_main
from gated_gpt import GPT, GPTConfig, attention_maps, evaluating, uniform_share
from sample import TABLE_4, bytes_of


class Variant(NamedTuple):
    """What a variant changes in the recipe, what it is compared with, and what the paper measured for it."""
    change: dict | Callable  # fields of GPTConfig, or a function from the recipe's GPTConfig to them
    row: str = ""  # where the paper has it,
    ppl: float = math.nan  # its perplexity there,
    score: float = math.nan  # gate score,
    m_act: float = math.nan  # largest activation,
    share: float = math.nan  # and first-token share
    pair: str = "none"  # the variant it is compared with; "none" also means: at equal parameter counts
    pair_ppl: float = 6.026  # that one's perplexity in the paper


def more_kv_heads(config):  # the paper: 4 -> 8
    if config.n_kv_head == config.n_head:
        raise ValueError(f"each of the {config.n_head} query heads has key/value heads of its own already; "
                         f"--n_kv_head={max(1, config.n_head // 2)} makes room")
    return {"n_kv_head": 2 * config.n_kv_head}


def more_query_heads(config):  # the paper: 32 -> 48; a multiple of the key/value heads, at least 1.5 as many
    return {"n_head": config.n_kv_head * math.ceil(1.5 * config.n_head / config.n_kv_head)}


MOE = dict(gate="none", n_expert=8, n_expert_active=2)  # as many active parameters as the dense model
VARIANTS = {
    "none": Variant(dict(gate="none"), "Table 1 #1", 6.026, *TABLE_4["none"]),
    # The parameters spent elsewhere
    "kv-heads": Variant(more_kv_heads, "Table 1 #2", 5.979),
    "q-heads": Variant(more_query_heads, "Table 1 #3", 5.953),
    # The five places
    "g1": Variant(dict(gate="g1"), "Table 1 #5", 5.761, *TABLE_4["g1"]),
    "g2": Variant(dict(gate="g2"), "Table 1 #6", 5.820, *TABLE_4["g2"]),
    "g3": Variant(dict(gate="g3"), "Table 1 #7", 6.016),
    "g4": Variant(dict(gate="g4"), "Table 1 #8", 5.981),
    "g5": Variant(dict(gate="g5"), "Table 1 #9", 6.017),
    # One score per head, or the same scores in all heads
    "g1-headwise": Variant(dict(gate="g1", gate_kind="headwise"), "Table 1 #10", 5.792,
                           *TABLE_4["g1-headwise"]),
    "g2-headwise": Variant(dict(gate="g2", gate_kind="headwise"), "Table 1 #11", 5.808),
    "g1-shared": Variant(dict(gate="g1", gate_share=True), "Table 1 #12", 5.801, *TABLE_4["g1-shared"]),
    "g2-shared": Variant(dict(gate="g2", gate_share=True), "Table 1 #13", 5.867),
    # Other operations and activations
    "g1-add-silu": Variant(dict(gate="g1", gate_op="add", gate_act="silu"), "Table 1 #14", 5.821),
    "g1-silu": Variant(dict(gate="g1", gate_act="silu"), "Table 1 #15", 5.822),
    # Where the non-linearity comes from
    "sdpa-norm": Variant(dict(gate="none", sdpa_norm=True), "Table 3", 5.847),
    "sdpa-silu": Variant(dict(gate="none", sdpa_silu=True), "Table 3", 5.975),
    "g1-add-identity": Variant(dict(gate="g1", gate_op="add", gate_act="identity"), "Table 3", 5.882),
    # What a gate needs to remove the sink: to see the query, and to be able to close
    "g1-no-input": Variant(dict(gate="g1", gate_input=False), "Table 4", 5.917, *TABLE_4["g1-no-input"]),
    "g1-ns-sigmoid": Variant(dict(gate="g1", gate_act="ns_sigmoid"), "Table 4", 5.900,
                             *TABLE_4["g1-ns-sigmoid"]),
    # The other way to steady training; in the paper at twice the learning rate, too much for the baseline
    "sandwich": Variant(dict(gate="none", norm="sandwich"), "Table 2", 7.407, pair_ppl=9.195),
    # Experts, compared among themselves, at the sizes that come out
    "moe": Variant(MOE, "Table 1 #1", 6.026, *TABLE_4["none"], pair="moe"),
    "moe-experts": Variant(MOE | dict(n_expert=9), "Table 1 #4", 5.964, pair="moe"),
    "moe-g1": Variant(MOE | dict(gate="g1"), "Table 1 #5", 5.761, *TABLE_4["g1"], pair="moe"),
}

TASKS = {
    # The sink in a minute: data/prepare.py, backcopy.
    "backcopy": train.PRESETS["sink"],
    # Real text: all 69 runs in 45 minutes on one core.
    "python": dict(data="python", n_layer=4, n_head=4, n_kv_head=2, n_embd=64, block_size=64, batch_size=16,
                   max_steps=500, learning_rate=4e-3, warmup_steps=50, eval_windows=128),
    # The same text, and what lets a sink form on it: a high constant learning rate, and many steps.
    "text-sink": dict(data="python", n_layer=3, n_head=2, n_embd=64, block_size=64, batch_size=16,
                      max_steps=13_000, learning_rate=8e-3, schedule="constant", weight_decay=0.0,
                      eval_windows=128),
    # nanoGPT's Tiny Shakespeare for a CPU.
    "shakespeare": dict(data="shakespeare", n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12,
                        max_steps=2000),
}
RESULTS = Path(__file__).resolve().parent / "results"
# What the comparison decides, so that there are no flags for it.
DECIDED = {"gate", "gate_kind", "gate_share", "gate_act", "gate_op", "gate_input", "sdpa_norm", "sdpa_silu",
           "norm", "n_expert", "n_expert_active", "expert_hidden", "vocab_size", "data", "out", "resume",
           "overwrite", "seed", "optimizer", "attn_share", "max_steps"}
MACHINE = {"out", "resume", "overwrite", "threads"}  # doesn't change what a run learns


# ------------------------------------------------------------------------------------------------------------
# The plan: which runs, of which size, and where they are kept


class Job(NamedTuple):
    """One run of one variant."""
    name: str
    seed: int
    config: GPTConfig
    c: train.TrainConfig
    folder: Path

    @property
    def done(self):
        """The file that one_run writes when the run is done."""
        return self.folder / "done.json"

    def steps(self):
        """Steps done so far, by the last line of the run's log."""
        log = self.folder / "log.csv"
        last = log.read_text().strip().rpartition("\n")[2].partition(",")[0] if log.exists() else ""
        return self.c.max_steps if self.done.exists() else int(last) if last.isdigit() else 0


def count(config):
    """Parameters of a model of this config, which is built without its numbers."""
    with torch.device("meta"):
        return GPT(config).num_params()


def matched(config, parameters):
    """`config` with the width inside the MLPs at which it comes closest to that number of parameters."""
    spare, per_unit = count(config) - parameters, 3 * config.n_embd * config.n_layer  # a SwiGLU is 3 matrices
    return dataclasses.replace(config, mlp_hidden=config.mlp_hidden - round(spare / per_unit))


def configs_of(names, base, match_params=True, say=print):
    """{name: GPTConfig} of the variants that can be had of this base, in the order of VARIANTS.

    Baselines join what is asked for. A variant that makes no sense here is left out, and `say` says why.
    """
    names, found = set(names) | {VARIANTS[name].pair for name in names}, {}
    for name, (change, *_, pair, _) in VARIANTS.items():
        try:
            if name in names:
                config = dataclasses.replace(base, **(change(base) if callable(change) else change))
                found[name] = matched(config, count(base)) if match_params and pair == "none" else config
        except ValueError as why:
            say(f"{name} is left out: {why}")
    return found


def code_of(path):
    """Fingerprint of a Python file that comments, docstrings and line breaks don't change."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def plan(task, configs, c, seeds, data):
    """A Job for each seed and variant, seed by seed."""
    jobs, code = [], code_of(Path(train.__file__).with_name("gated_gpt.py"))
    for seed in range(seeds):
        for name, config in configs.items():
            run = dataclasses.replace(c, seed=seed)
            decides = {k: v for k, v in dataclasses.asdict(run).items() if k not in MACHINE}
            recipe = json.dumps([dataclasses.asdict(config), decides, data, code], sort_keys=True)
            fingerprint = hashlib.sha256(recipe.encode()).hexdigest()[:8]
            jobs.append(Job(name, seed, config, run, Path(f"out/compare-{task}/{name}-{seed}-{fingerprint}")))
    return jobs


# ------------------------------------------------------------------------------------------------------------
# Running it


def one_run(job, say=lambda text: None):
    """Train one run to its end, and write all that the table and the figures need to its done.json.

    Goes on from the run's checkpoint if there is one. `say` is called at every evaluation.
    """
    last = job.folder / "last.pt"
    c = dataclasses.replace(job.c, out=str(job.folder), resume=last.exists())
    run, result = train.Run(job.config, c, say), {}
    try:
        run.loop(hide_bar=True)
        result |= closer_look(run)
    except FloatingPointError as error:
        result["diverged"] = str(error)
    temporary = job.folder / "done.json.tmp"
    temporary.write_text(json.dumps(result | {"log": run.state["log"]}))
    os.replace(temporary, job.done)  # so a done.json that is there is whole
    if "diverged" not in result:  # two thirds of a checkpoint are the optimizer's, and of no more use
        run.optimizers = []
        run.save("last")


BINS = 40  # of the gate-score histograms
LOOK = 32  # tokens in the attention maps


def closer_look(run):
    """What train.py does not measure, on validation data: a histogram of gate scores, and attention maps."""
    model, limits = run.model, (0.0, 1.0) if "sigmoid" in run.model.config.gate_act else (-2.0, 2.0)
    histogram = torch.zeros(BINS)

    def on_gate(gate, inputs, output):  # what lies beyond the limits counts in the outermost bins
        histogram.add_(torch.histc(gate.score(inputs[1]).float().cpu().clamp(*limits), BINS, *limits))

    idx, _ = run.val_windows.at(run.val_windows.spaced(train.MEASURE_WINDOWS))
    gates = [(block.attn.gate, on_gate) for block in model.blocks if model.config.gate != "none"]
    with torch.no_grad(), evaluating(model, gates):
        model(idx)
    text = idx[len(idx) // 2 + 1, None, :LOOK]  # (1, LOOK); on backcopy one with triggers
    maps = [layer[0].float().mean(-1).tolist() for layer in attention_maps(model, text)]  # T x T each
    return {"limits": limits, "histogram": (histogram / histogram.sum()).tolist() if gates else None,
            "text": text[0].tolist(), "maps": [[[round(p, 3) for p in row] for row in m] for m in maps]}


def run_all(jobs, at_once):
    """Run what isn't done yet, here or in `at_once` processes. KeyboardInterrupt comes once all is saved."""
    todo = [job for job in jobs if not job.done.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done already, in {jobs[0].folder.parent}")
    total, so_far = sum(job.c.max_steps for job in jobs), sum(job.steps() for job in jobs)
    with tqdm(total=total, initial=so_far, unit="step", disable=None) as bar:
        def tick(text=""):
            bar.update(max(0, sum(job.steps() for job in jobs) - bar.n))
            for job in [job for job in todo if job.done.exists()]:
                todo.remove(job)
                result = json.loads(job.done.read_text())
                said = "val loss {val_loss:.4f}  share {first_token_share:.3f}"
                said = result.get("diverged") or said.format(**result["log"][-1])
                tqdm.write(f"{job.name:<16} seed {job.seed}  {said}")

        if at_once > 1 and todo:
            run_side_by_side(todo, at_once, tick)
        for job in list(todo):
            one_run(job, tick)
            tick()


def work_off(queue):
    """A child process: run after run, until None comes. What a user can mend is said in one sentence."""
    def work():
        try:
            for job in iter(queue.get, None):
                one_run(job)
        except KeyboardInterrupt:  # told to stop, and saved: the parent says what there is to say
            sys.exit(130)
    run_main(work)


def run_side_by_side(todo, at_once, tick):
    """Share the runs out among `at_once` processes. However this ends, no process is left behind."""
    context = multiprocessing.get_context("spawn")
    queue, running = context.Queue(), []
    os.environ["OMP_NUM_THREADS"] = str(todo[0].c.threads)  # the children read it when they load torch
    # Ctrl-C goes to all processes of a terminal. Only a training run has something to save, and listens by
    # itself (train.stop_signals); a child that is just loading must not print a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(at_once):
            running.append(context.Process(target=work_off, args=(queue,)))
            running[-1].start()
        signal.signal(signal.SIGINT, handler)
        for job in [*todo, *[None] * at_once]:
            queue.put(job)
        while running:
            connection.wait([process.sentinel for process in running], timeout=1)
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                if process.exitcode == 130:  # Ctrl-C, which came while this process was still starting others
                    raise KeyboardInterrupt
                if process.exitcode:
                    raise ValueError(f"a run ended with status {process.exitcode}, see above; finished runs "
                                     "stay")
            tick()
    finally:
        signal.signal(signal.SIGINT, handler)
        queue.cancel_join_thread()  # nobody may be left to read what is in it
        for process in running:
            process.terminate()
        for process in running:
            process.join()


# ------------------------------------------------------------------------------------------------------------
# The numbers


def mean(values):
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def deviation(values):
    """Standard deviation of a sample; nan for fewer than two values."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else math.nan


def is_noise(difference, error):
    """Whether a mean difference is below twice its standard error, or that is not known (one seed)."""
    return not abs(difference) >= 2 * error


def late_floor(T):
    """What late_first_token_share is under uniform attention: mean of 1 / (t + 1) over queries t >= T/4."""
    return mean(1 / (t + 1) for t in range(T // 4, T))


def late_share(row):
    """The late share of the layer with the strongest sink."""
    return max(layer["late_first_token_share"] for layer in row["layers"])


def summary(name, config, results):
    """A row of the csv, from results {(variant, seed): what one_run wrote}. All is read at the last step."""
    variant = VARIANTS[name]
    mine = {seed: run for (other, seed), run in results.items() if other == name}
    last = {seed: run["log"][-1] for seed, run in mine.items() if "diverged" not in run}
    pair = {seed: run for (other, seed), run in results.items()
            if other == variant.pair != name and "diverged" not in run}
    both = [seed for seed in last if seed in pair]
    difference = [last[seed]["val_loss"] - pair[seed]["log"][-1]["val_loss"] for seed in both]
    error = deviation(difference) / math.sqrt(len(difference) or 1)

    def speed(run):
        return statistics.median(row["tokens_per_second"] for row in run["log"])

    def each(column):
        return [row[column] for row in last.values()]

    def by_seed(column):
        return " ".join(f"{last[seed][column]:.5f}" if seed in last else "nan" for seed in mine)

    return {
        "variant": name, "pair": variant.pair, "parameters": count(config), "mlp_hidden": config.mlp_hidden,
        "seeds": len(mine), "diverged": len(mine) - len(last),
        "val_loss": mean(each("val_loss")), "val_loss_sd": deviation(each("val_loss")),
        "difference": mean(difference), "difference_sd": deviation(difference), "difference_se": error,
        "noise": "~" if difference and is_noise(mean(difference), error) else "",
        "share": mean(each("first_token_share")), "share_sd": deviation(each("first_token_share")),
        "floor": uniform_share(config.block_size),
        "late_share": mean(map(late_share, last.values())), "late_floor": late_floor(config.block_size),
        "gate_score": mean(each("gate_score")), "max_activation": mean(each("max_activation")),
        "max_expert_load": mean(each("max_expert_load")),
        "step_time": 1.0 if name == variant.pair else mean(speed(pair[s]) / speed(mine[s]) for s in both),
        "val_loss_by_seed": by_seed("val_loss"), "share_by_seed": by_seed("first_token_share"),
        "paper_row": variant.row, "paper_ppl": variant.ppl,
        "paper_difference": variant.ppl - variant.pair_ppl if name != variant.pair else math.nan,
        "paper_share": variant.share, "paper_gate_score": variant.score,
        "paper_max_activation": variant.m_act,
    }


def curves(results):
    """Rows for TASK_runs.csv: every evaluation of every run."""
    columns = ("step", "train_loss", "val_loss", "first_token_share", "gate_score", "max_activation",
               "tokens_per_second")
    return [{"variant": name, "seed": seed, **{k: row[k] for k in columns}, "late_share": late_share(row)}
            for (name, seed), run in results.items() for row in run["log"]]


def pictures(results, tokenizer):
    """What the figures need beside the csv files: shares per layer, histograms, maps of the first seed."""
    runs = {}
    for (name, _), run in results.items():
        if "diverged" not in run:
            runs.setdefault(name, []).append(run)

    def over_seeds(name, get):
        return [round(mean(values), 6) for values in zip(*map(get, runs[name]))]

    def per_layer(name, column):
        return over_seeds(name, lambda run: [layer[column] for layer in run["log"][-1]["layers"]])

    layers = {name: {"all": per_layer(name, "first_token_share"),
                     "late": per_layer(name, "late_first_token_share")} for name in runs}
    scores = {name: {"limits": found[0]["limits"], "fraction": over_seeds(name, lambda run: run["histogram"])}
              for name, found in runs.items() if found[0]["histogram"]}
    maps = None
    if "none" in runs and "g1" in runs:  # both at the layer where the baseline's sink is strongest
        layer, text = layers["none"]["late"].index(max(layers["none"]["late"])), runs["none"][0]["text"]
        try:
            tokens = [bytes_of(t, prepare.get_tokenizer(tokenizer)).decode("utf-8", "replace") for t in text]
        except OSError:  # GPT-2's tokenizer, offline
            tokens = [str(t) for t in text]
        maps = {"layer": layer, "tokens": ["BOS", *tokens[1:]],
                **{name: runs[name][0]["maps"][layer] for name in ("none", "g1")}}
    return {"layers": layers, "scores": scores, "maps": maps}


# ------------------------------------------------------------------------------------------------------------
# The table, on the screen and in files

COLUMNS = {  # of the md: (heading, format), by their name in the csv
    "variant": ("variant", ""), "parameters": ("parameters", ","), "val_loss": ("val loss", ".4f"),
    "val_loss_sd": ("± sd", ".4f"), "noise": ("", ""), "difference": ("difference", "+.4f"),
    "difference_sd": ("± sd", ".4f"), "diverged": ("diverged", "d"), "share": ("share", ".3f"),
    "share_sd": ("± sd", ".3f"), "late_share": ("late share", ".3f"), "gate_score": ("gate score", ".3f"),
    "max_activation": ("max activation", ".1f"), "step_time": ("time", ".2f"),
    "max_expert_load": ("load", ".2f"), "paper_row": ("paper", ""), "paper_ppl": ("PPL", ".3f"),
    "paper_difference": ("difference", "+.3f"), "paper_share": ("share", ".3f"),
    "paper_gate_score": ("gate score", ".3f"), "paper_max_activation": ("max activation", ".0f"),
}
SCREEN = {  # of the terminal, 80 characters wide: (heading, width)
    "variant": ("variant", -15), "parameters": ("params", 10), "val_loss": ("loss", 7), "noise": ("", 2),
    "difference": ("diff", 7), "difference_sd": ("± sd", 7), "share": ("share", 6),
    "gate_score": ("gate", 7), "max_activation": ("max|x|", 7), "step_time": ("time", 5),
    "paper_share": ("paper", 6),
}
NOTE = """
Val loss: nats per token at the last step, mean and standard deviation (sd) over the seeds. Difference:
to the baseline with the same seed (same values in every shared matrix, same batches); experts are
compared with `moe`, all else with `none` (see the parameters). `~` marks seed noise: a mean
difference below twice its standard error, sd / sqrt(seeds). With three seeds that is a lenient rule,
which a variant that changes nothing would pass about one time in six. Share: attention probability on
the first token, mean over queries, heads and layers. Late share: over queries t >= T/4 only, in the
layer where it is largest. Time: seconds per step relative to the baseline, rough where runs share a
machine. Load: visits to the busiest expert over the mean. The columns from `paper` on are the paper's,
of its MoE model with 15 billion parameters (Table 2: dense, 1.7 billion): compare the order, not the
size.
"""


def text(row, key):
    """A cell: a number in its format, - for nan."""
    return "-" if row[key] != row[key] else format(row[key], COLUMNS[key][1])


def screen_table(rows):
    """The most important columns, for a terminal."""
    def line(cells):
        return "".join(f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
                       for cell, (_, width) in zip(cells, SCREEN.values()))
    lines = [line(heading for heading, _ in SCREEN.values())]
    lines += [line(text(row, key) for key in SCREEN) for row in rows]
    lines += [f"{row['variant']}: {row['diverged']} of {row['seeds']} runs diverged and are left out"
              for row in rows if row["diverged"]]
    return "\n".join(lines)


def markdown(task, rows, head):
    """All columns, below what made them."""
    def line(cells):
        return f"| {' | '.join(cells)} |"
    lines = [f"# compare_gates: {task}\n", *(f"- {what}: {said}" for what, said in head.items()), NOTE]
    lines += [line(heading for heading, _ in COLUMNS.values())]
    lines += [line("---:" if form else "---" for _, form in COLUMNS.values())]
    return "\n".join([*lines, *(line(text(row, key) for key in COLUMNS) for row in rows), ""])


def write_csv(path, rows):
    """Rows as a csv file, with five digits; rows may be none."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ["variant"])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


# ------------------------------------------------------------------------------------------------------------
# The command line


def parse_flags(argv=None):
    """(all flags, names of the variants asked for, the flags that override the task's recipe)"""
    parser = argparse.ArgumentParser(prog="compare_gates.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="backcopy", help=f"{', '.join(TASKS)}, or the NAME of a prepared "
                        "data set, trained like python; the groups of flags below override its recipe "
                        "[%(default)s]")
    parser.add_argument("--variants", help=f"some of {','.join(VARIANTS)} [all]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant [%(default)s]")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run [the task's]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on shared threads [%(default)s]")
    parser.add_argument("--match_params", action=argparse.BooleanOptionalAction, default=True,
                        help="shrink the MLPs of dense variants to the baseline's total [on]")
    parser.add_argument("--results", type=Path, help="folder for table and figures [experiments/results for "
                        "all variants, three seeds or more and the task's own recipe, else out/compare-TASK]")
    parser.add_argument("--from_results", action="store_true", help="only redraw the figures in --results")
    train.add_flags(parser, GPTConfig, train.TrainConfig, skip=DECIDED)
    flags = vars(parser.parse_args(argv))
    for name in ("seeds", "jobs", "steps"):
        if flags[name] is not None and flags[name] < 1:
            raise ValueError(f"{name}={flags[name]} must be at least 1")
    names = flags["variants"].split(",") if flags["variants"] else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"variants={flags['variants']}: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    fields = {f.name for cls in (GPTConfig, train.TrainConfig) for f in dataclasses.fields(cls)}
    recipe = {name: value for name, value in flags.items() if name in fields}
    # A quick trial must not replace the recorded results, which the README speaks of.
    trial = (flags["variants"] or flags["steps"] or flags["seeds"] < 3 or not flags["match_params"]
             or set(recipe) - MACHINE)
    flags["results"] = flags["results"] or (Path(f"out/compare-{flags['task']}") if trial else RESULTS)
    return flags, names, recipe


def main(argv=None):
    flags, names, recipe = parse_flags(argv)
    try:
        from experiments import figures  # here, since the processes that train don't need matplotlib
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install -r experiments/requirements.txt") from None
    task, folder, at_once = flags["task"], flags["results"], flags["jobs"]
    if flags["from_results"]:
        return print("\n".join(map(str, figures.draw(folder, task))))

    values = TASKS.get(task) or TASKS["python"] | {"data": task}
    values = values | recipe | {"gate": "none", "optimizer": "adamw", "attn_share": True}
    values["max_steps"] = flags["steps"] or values["max_steps"]
    values["eval_every"] = recipe.get("eval_every", math.ceil(values["max_steps"] / 12))  # enough for a curve
    if at_once > 1:
        values["threads"] = recipe.get("threads", max(1, torch.get_num_threads() // at_once))
    meta, _ = train.open_data(values["data"])
    base, c = train.make_configs(values | {"vocab_size": meta["vocab_size"]})
    device, why = train.choose_device(c.device)
    configs = configs_of(names, base, flags["match_params"])
    jobs = plan(task, configs, c, flags["seeds"], meta["train"]["sha256"])
    try:
        run_all(jobs, at_once)
    except KeyboardInterrupt:
        done = sum(job.done.exists() for job in jobs)
        raise KeyboardInterrupt(f"{done} of {len(jobs)} runs are done; the same command goes on") from None

    results = {(job.name, job.seed): json.loads(job.done.read_text()) for job in jobs}
    rows = [summary(name, config, results) for name, config in configs.items()]
    floor = uniform_share(base.block_size)
    recipe = {k: v for k, v in sorted(values.items()) if k not in MACHINE | {"gate", "attn_share"}}
    argv, threads = sys.argv[1:] if argv is None else argv, c.threads or torch.get_num_threads()
    head = {"command": f"`python experiments/compare_gates.py {shlex.join(argv)}`",
            "machine": f"{why if device.type == 'cuda' else device} ({platform.machine()}), runs at a time: "
                       f"{at_once}, threads each: {threads}, torch {torch.__version__}",
            "recipe": " ".join(f"{k}={v}" for k, v in recipe.items()),
            "runs": f"{c.max_steps:,} steps, {flags['seeds']} seeds; baseline: {count(base):,} parameters",
            "floor": f"share {floor:.3f} and late share {late_floor(base.block_size):.3f}, which is what "
                     f"uniform attention has at T={base.block_size}"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.md").write_text(markdown(task, rows, head))
    write_csv(folder / f"{task}.csv", rows)
    write_csv(folder / f"{task}_runs.csv", curves(results))
    (folder / f"{task}_figures.json").write_text(json.dumps(pictures(results, meta["tokenizer"])))
    print(f"\n{screen_table(rows)}\n\nfloor of the share, uniform attention: {floor:.3f}; ~: seed noise\n"
          f"all columns, and what they mean: {folder / task}.md")
    print("\n".join(map(str, figures.draw(folder, task))))


if __name__ == "__main__":
    run_main(main)
