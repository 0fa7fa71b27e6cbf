"""
The paper's comparison, small: every gate and every control of its tables, trained alike, in one table.

    python experiments/compare_gates.py --task=text --jobs=2  all variants
    python experiments/compare_gates.py --task=text --variants=g1 --n_layer=6

The variants and the tasks are data, in experiments/variants.py. A task has three seeds, and `text` five of
none and g1. The same command goes on where it was stopped: see experiments/runner.py.
Reading order: closer_look -> summary -> COLUMNS -> main.
"""
import dataclasses
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data.tokenizers import get_tokenizer, labels
from experiments import runner
from experiments.tables import MEASURED, NOTE, deviation, good, markdown, mean, measured
from experiments.variants import DECIDED, TASKS, VARIANTS, configs_of, values_of
from gated_gpt import Gate, GPTConfig, attention_maps, evaluating
from plumbing.flags import add_flags, run_main

BINS = 40  # of the gate-score histograms
LOOK = 32  # tokens in the attention maps


def closer_look(job, model):
    """What train.py does not measure, on validation data: a histogram of gate scores, and attention maps."""
    limits = (0.0, 1.0) if "sigmoid" in job.config.gate_act else (-2.0, 2.0)
    histogram = torch.zeros(BINS)

    def on_gate(gate, inputs, output):  # what lies beyond the limits counts in the outermost bins
        histogram.add_(torch.histc(gate.score(inputs[1]).float().cpu().clamp(*limits), BINS, *limits))

    _, meta, _, val_set = train.open_data(job.config, job.c, model.embed.weight.device)
    idx, _ = val_set.at(val_set.spaced(train.MEASURE_WINDOWS))  # (64, T)
    gates = [(module, on_gate) for module in model.modules() if isinstance(module, Gate)]
    with torch.no_grad(), evaluating(model, gates):
        model(idx)
    text = idx[len(idx) // 2 + 1, None, :LOOK]  # (1, LOOK); on backcopy one with triggers
    maps = [layer[0].float().mean(-1).tolist() for layer in attention_maps(model, text)]  # T x T each
    return {"limits": limits, "histogram": (histogram / histogram.sum()).tolist() if gates else None,
            "maps": [[[round(p, 3) for p in row] for row in m] for m in maps],
            "names": labels(text[0].tolist(), get_tokenizer(meta["tokenizer"]), meta["bos"])}


def summary(name, config, results):
    """A row of the csv: what is measured, the difference to the baseline, and the paper's numbers."""
    variant, mine = VARIANTS[name], good(results, name)
    pair = good(results, variant.pair) if name != variant.pair else {}
    both = [seed for seed in mine if seed in pair]
    difference = [mine[seed]["log"][-1]["val_loss"] - pair[seed]["log"][-1]["val_loss"] for seed in both]
    error = deviation(difference) / math.sqrt(len(difference) or 1)  # nan: one seed, so all may be noise

    def speed(run):
        return statistics.median(row["tokens_per_second"] for row in run["log"])

    return {"variant": name, "pair": variant.pair} | measured(results, name, config) | {
        "difference": mean(difference), "difference_sd": deviation(difference), "difference_se": error,
        "noise": "~" if difference and not abs(mean(difference)) >= 2 * error else "",
        "step_time": 1.0 if name == variant.pair else mean(speed(pair[s]) / speed(mine[s]) for s in both),
        "paper_row": variant.row, "paper_ppl": variant.ppl, "paper_share": variant.share,
        "paper_difference": variant.ppl - variant.pair_ppl if name != variant.pair else math.nan,
        "paper_gate_score": variant.score, "paper_max_activation": variant.m_act}


COLUMNS = {  # of the md: (heading, format), by their name in the csv
    "variant": ("variant", ""), **MEASURED, "noise": ("", ""), "difference": ("difference", "+.4f"),
    "difference_sd": ("± sd", ".4f"), "step_time": ("time", ".2f"),
    "paper_row": ("paper", ""), "paper_ppl": ("PPL", ".3f"), "paper_difference": ("difference", "+.3f"),
    "paper_share": ("paper's share", ".3f"), "paper_gate_score": ("gate score", ".3f"),
    "paper_max_activation": ("max activation", ".0f")}
SCREEN = "variant", "val_loss", "noise", "difference", "share", "late_share", "gate_score", "paper_share"
MORE = """Difference: to the baseline with the same seed (same values in every shared matrix, same batches);
experts are compared with `moe`, all else with `none`, at equal parameters. `~` marks seed noise: a mean
difference below twice its standard error, sd / sqrt(seeds). With three seeds that is a lenient rule, which a
variant that changes nothing would pass about one time in six. The weights of softmax1, learned and softpick
need not sum to one: what is missing is on no token. Time: seconds per step relative to the baseline, rough
where runs share a machine. The columns from `paper` on are the paper's, of its MoE model with 15 billion
parameters (Table 2: dense, 1.7 billion): compare the order, not the size.
"""


def parse_flags(argv=None):
    """(all flags, names of the variants asked for, the flags that override the task's recipe)"""
    parser = runner.parser_for(__doc__, "compare_gates", seeds="3; 5 of none and g1 on text")
    parser.add_argument("--task", default="text", help=f"{', '.join(TASKS)}, or the NAME of a prepared "
                        "data set, trained like python; the groups of flags below override its recipe "
                        "[%(default)s]")
    parser.add_argument("--variants", help=f"some of {','.join(VARIANTS)} [all]")
    add_flags(parser, GPTConfig, train.TrainConfig, skip=DECIDED)
    flags = parser.parse_args(argv)
    names = flags.variants.split(",") if flags.variants else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"variants={flags.variants}: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    fields = {f.name for cls in (GPTConfig, train.TrainConfig) for f in dataclasses.fields(cls)}
    recipe = {name: value for name, value in vars(flags).items() if name in fields}
    flags.results = runner.results_of(flags, f"compare-{flags.task}",
                                      trial=flags.variants or set(recipe) - runner.MACHINE)
    return flags, names, recipe


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, names, recipe = parse_flags(argv)
    from experiments import figures  # here, because the processes that train do not need it
    task, folder = flags.task, flags.results
    values = values_of(task, flags.steps, **recipe)
    base, c = train.make_configs(values)
    configs = configs_of(names, base)
    more = {"none", "g1"} if task == "text" and not flags.seeds else {}
    seeds = {name: range(5 if name in more else flags.seeds or 3) for name in configs}
    jobs = runner.plan({name: (config, c) for name, config in configs.items()}, seeds, closer_look)
    results = runner.run_all(jobs, flags.jobs)
    rows = {name: summary(name, config, results) for name, config in configs.items()}
    head = runner.head("compare_gates.py", argv, c, flags.jobs) | {
        "recipe": " ".join(f"{k}={v}" for k, v in sorted(values.items()) if k not in runner.MACHINE)}
    title, short = f"compare_gates: {task}", {key: COLUMNS[key] for key in SCREEN}
    runner.finish(folder, task, rows.values(), markdown(title, head, NOTE + MORE, rows.values(), COLUMNS),
           show=markdown(title, head, "", rows.values(), short) + f"\nall columns: {folder / task}.md",
           share=lambda: figures.draw_share(rows, results), loss=lambda: figures.draw_loss(rows),
           scores=lambda: figures.draw_scores(rows, results), maps=lambda: figures.draw_maps(results))


if __name__ == "__main__":
    run_main(main)
