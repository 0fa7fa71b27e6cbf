"""
The paper's comparison, small: every gate and every control of its tables, trained alike, in one table.

    python experiments/compare_gates.py --task=backcopy --jobs=2  3 seeds each
    python experiments/compare_gates.py --task=python --variants=g1 --n_layer=6
    python experiments/compare_gates.py --task=backcopy --from_results  redraw

A new variant is one new row of VARIANTS. Runs are kept in out/compare-TASK/, so that the same command goes on
where it was stopped: see experiments/runner.py.
Reading order: VARIANTS -> TASKS -> configs_of -> closer_look -> summary -> COLUMNS -> main.
"""
import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from data.tokenizers import bytes_of, get_tokenizer
from experiments import runner
from experiments.runner import cell, count, deviation, mean
from gated_gpt import Gate, GPTConfig, attention_maps, evaluating, uniform_share
from plumbing.flags import add_flags, run_main
from plumbing.report import TABLE_4


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
    "g1-shared": Variant(dict(gate="g1", gate_shared=True), "Table 1 #12", 5.801, *TABLE_4["g1-shared"]),
    "g2-shared": Variant(dict(gate="g2", gate_shared=True), "Table 1 #13", 5.867),
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
    # Other cures: they change the softmax, where a gate filters its result
    "softmax1": Variant(dict(gate="none", attention="softmax1")),
    "learned": Variant(dict(gate="none", attention="learned")),
    "softpick": Variant(dict(gate="none", attention="softpick")),
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
    # Real text: 78 runs, three seeds of all 26 variants, in about an hour on one core.
    "python": dict(data="python", n_layer=4, n_head=4, n_kv_head=2, n_embd=64, block_size=64, batch_size=16,
                   max_steps=500, learning_rate=4e-3, warmup_steps=50, eval_windows=128),
    # The same text, and the recipe that grows a sink on it.
    "text": train.PRESETS["laptop"],
    # nanoGPT's Tiny Shakespeare for a CPU.
    "shakespeare": dict(data="shakespeare", n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12,
                        max_steps=2000),
}
# What the comparison decides, so that there are no flags for it.
DECIDED = {"gate", "gate_kind", "gate_shared", "gate_act", "gate_op", "gate_input", "attention", "sdpa_norm",
           "sdpa_silu", "norm", "n_expert", "n_expert_active", "vocab_size", "data", "out", "resume",
           "overwrite", "seed", "optimizer", "attn_share", "max_steps", "train_only", "init_from"}


# ---- the runs --------------------------------------------------------------------------------------


def configs_of(names, base, match_params=True, say=print):
    """{name: GPTConfig} of the variants that can be had of this base, in the order of VARIANTS.

    Baselines join what is asked for. A variant that makes no sense here is left out, and `say` says why.
    """
    names, found, size = set(names) | {VARIANTS[name].pair for name in names}, {}, count(base)
    for name, (change, *_, pair, _) in VARIANTS.items():
        try:
            if name in names:
                config = dataclasses.replace(base, **(change(base) if callable(change) else change))
                found[name] = runner.matched(config, size) if match_params and pair == "none" else config
        except ValueError as why:
            say(f"{name} is left out: {why}")
    return found


BINS = 40  # of the gate-score histograms
LOOK = 32  # tokens in the attention maps


def closer_look(job, model):
    """What train.py does not measure, on validation data: a histogram of gate scores, and attention maps."""
    limits = (0.0, 1.0) if "sigmoid" in job.config.gate_act else (-2.0, 2.0)
    histogram = torch.zeros(BINS)

    def on_gate(gate, inputs, output):  # what lies beyond the limits counts in the outermost bins
        histogram.add_(torch.histc(gate.score(inputs[1]).float().cpu().clamp(*limits), BINS, *limits))

    *_, val_set = train.open_data(job.config, job.c, model.embed.weight.device)
    idx, _ = val_set.at(val_set.spaced(train.MEASURE_WINDOWS))  # (64, T)
    gates = [(module, on_gate) for module in model.modules() if isinstance(module, Gate)]
    with torch.no_grad(), evaluating(model, gates):
        model(idx)
    text = idx[len(idx) // 2 + 1, None, :LOOK]  # (1, LOOK); on backcopy one with triggers
    maps = [layer[0].float().mean(-1).tolist() for layer in attention_maps(model, text)]  # T x T each
    return {"limits": limits, "histogram": (histogram / histogram.sum()).tolist() if gates else None,
            "text": text[0].tolist(), "maps": [[[round(p, 3) for p in row] for row in m] for m in maps]}


# ---- the numbers -----------------------------------------------------------------------------------


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
        "noise": "~" if difference and runner.is_noise(mean(difference), error) else "",
        "share": mean(each("first_token_share")), "share_sd": deviation(each("first_token_share")),
        "floor": uniform_share(config.block_size),
        "late_share": mean(map(late_share, last.values())), "late_floor": late_floor(config.block_size),
        "gate_score": mean(each("gate_score")), "max_activation": mean(each("max_activation")),
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
            tokens = [bytes_of(t, get_tokenizer(tokenizer)).decode("utf-8", "replace") for t in text]
        except OSError:  # GPT-2's tokenizer, offline
            tokens = [str(t) for t in text]
        maps = {"layer": layer, "tokens": ["BOS", *tokens[1:]],
                **{name: runs[name][0]["maps"][layer] for name in ("none", "g1")}}
    return {"layers": layers, "scores": scores, "maps": maps}


# ---- the table, on the screen and in files ---------------------------------------------------------

COLUMNS = {  # of the md: (heading, format), by their name in the csv
    "variant": ("variant", ""), "parameters": ("parameters", ","), "val_loss": ("val loss", ".4f"),
    "val_loss_sd": ("± sd", ".4f"), "noise": ("", ""), "difference": ("difference", "+.4f"),
    "difference_sd": ("± sd", ".4f"), "diverged": ("diverged", "d"), "share": ("share", ".3f"),
    "share_sd": ("± sd", ".3f"), "late_share": ("late share", ".3f"), "gate_score": ("gate score", ".3f"),
    "max_activation": ("max activation", ".1f"), "step_time": ("time", ".2f"),
    "paper_row": ("paper", ""), "paper_ppl": ("PPL", ".3f"),
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
Val loss: nats per token at the last step, mean and standard deviation (sd) over the seeds. Difference: to
the baseline with the same seed (same values in every shared matrix, same batches); experts are compared
with `moe`, all else with `none` (see the parameters). `~` marks seed noise: a mean difference below twice
its standard error, sd / sqrt(seeds). With three seeds that is a lenient rule, which a variant that changes
nothing would pass about one time in six. Share: attention probability on the first token, mean over
queries, heads and layers. Late share: over queries t >= T/4 only, in the layer where it is largest. Time:
seconds per step relative to the baseline, rough where runs share a machine. Load: visits to the busiest
expert over the mean. The columns from `paper` on are the paper's, of its MoE model with 15 billion
parameters (Table 2: dense, 1.7 billion): compare the order, not the size.
"""


def screen_table(rows):
    """The most important columns, for a terminal."""
    def line(cells):
        return "".join(f"{text:<{-width}}" if width < 0 else f"{text:>{width}}"
                       for text, (_, width) in zip(cells, SCREEN.values()))
    lines = [line(heading for heading, _ in SCREEN.values())]
    lines += [line(cell(row, key, COLUMNS) for key in SCREEN) for row in rows]
    lines += [f"{row['variant']}: {row['diverged']} of {row['seeds']} runs diverged and are left out"
              for row in rows if row["diverged"]]
    return "\n".join(lines)


# ---- the command line ------------------------------------------------------------------------------


def parse_flags(argv=None):
    """(all flags, names of the variants asked for, the flags that override the task's recipe)"""
    parser = runner.run_parser(__doc__, "compare_gates.py")
    parser.add_argument("--task", default="backcopy", help=f"{', '.join(TASKS)}, or the NAME of a prepared "
                        "data set, trained like python; the groups of flags below override its recipe "
                        "[%(default)s]")
    parser.add_argument("--variants", help=f"some of {','.join(VARIANTS)} [all]")
    parser.add_argument("--match_params", action=argparse.BooleanOptionalAction, default=True,
                        help="shrink the MLPs of dense variants to the baseline's total [on]")
    runner.add_trial_flags(parser, "compare-TASK")
    parser.add_argument("--from_results", action="store_true", help="only redraw the figures in --results")
    add_flags(parser, GPTConfig, train.TrainConfig, skip=DECIDED)
    flags = parser.parse_args(argv)
    names = chosen(flags.variants)
    fields = {f.name for cls in (GPTConfig, train.TrainConfig) for f in dataclasses.fields(cls)}
    recipe = {name: value for name, value in vars(flags).items() if name in fields}
    # A quick trial must not replace the recorded results, which the README speaks of.
    trial = flags.variants or not flags.match_params or set(recipe) - runner.MACHINE
    flags.results = runner.results_of(flags, f"compare-{flags.task}", trial)
    return flags, names, recipe


def chosen(variants):
    """Names of the variants in a flag such as "g1,g2"; all of them if it is not given."""
    names = variants.split(",") if variants else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"variants={variants}: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return names


def values_of(flags, recipe):
    """The values of the two configs' fields: the task's, below the flags'. And the meta of the data."""
    values = (TASKS.get(flags.task) or TASKS["python"] | {"data": flags.task}) | recipe
    values |= {"gate": "none", "attn_share": True}
    values["max_steps"] = flags.steps or values["max_steps"]
    values["eval_every"] = recipe.get("eval_every", math.ceil(values["max_steps"] / 12))  # enough for a curve
    meta, _ = prepare.load(values["data"])
    return values, meta


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, names, recipe = parse_flags(argv)
    from experiments import figures  # here, because the processes that train do not need it
    task, folder = flags.task, flags.results
    if flags.from_results:
        return print("\n".join(map(str, figures.draw(folder, task))))

    values, meta = values_of(flags, recipe)
    base, c = train.make_configs(values | {"vocab_size": meta["vocab_size"]})
    configs = configs_of(names, base, flags.match_params)
    recipes = {name: (config, c) for name, config in configs.items()}
    jobs = runner.plan(f"compare-{task}", recipes, range(flags.seeds), closer_look)
    results = runner.run_all(jobs, flags.jobs)

    rows = [summary(name, config, results) for name, config in configs.items()]
    T, floor = base.block_size, uniform_share(base.block_size)
    recipe = {k: v for k, v in sorted(values.items()) if k not in runner.MACHINE | {"gate", "attn_share"}}
    head = runner.head(
        "compare_gates.py", argv, c, flags.jobs, recipe=" ".join(f"{k}={v}" for k, v in recipe.items()),
        runs=f"{c.max_steps:,} steps, {flags.seeds} seeds; baseline: {count(base):,} parameters",
        floor=f"share {floor:.3f} and late share {late_floor(T):.3f}, which is what uniform attention has at "
              f"T={T}")
    runner.write_csv(folder / f"{task}.csv", rows)
    (folder / f"{task}.md").write_text(runner.markdown(f"compare_gates: {task}", head, NOTE, rows, COLUMNS))
    runner.write_csv(folder / f"{task}_runs.csv", curves(results))
    (folder / f"{task}_figures.json").write_text(json.dumps(pictures(results, meta["tokenizer"])))
    print(f"\n{screen_table(rows)}\n\nfloor of the share, uniform attention: {floor:.3f}; ~: seed noise\n"
          f"all columns, and what they mean: {folder / task}.md")
    print("\n".join(map(str, figures.draw(folder, task))))


if __name__ == "__main__":
    run_main(main)
