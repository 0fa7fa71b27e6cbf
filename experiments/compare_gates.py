"""
The paper's comparison, small: every gate and every control of its tables, trained alike, in one table.

    python experiments/compare_gates.py --task=text --jobs=2  all variants
    python experiments/compare_gates.py --task=text --variants=g1 --n_layer=6

The variants and the tasks are data, in experiments/variants.py. A task has three seeds, and `text` five of
none and g1. The same command goes on where it was stopped: see experiments/runner.py.
Reading order: summary -> COLUMNS -> main.
"""
import dataclasses
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from experiments import movie, runner
from experiments.tables import MEASURED, NOTE, deviation, good, markdown, mean, measured
from experiments.variants import DECIDED, TASKS, VARIANTS, configs_of, values_of
from gated_gpt import GPTConfig
from plumbing import checkpoint
from plumbing.flags import add_flags, run_main


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
    jobs = runner.plan({name: (config, c) for name, config in configs.items()}, seeds)
    results = runner.run_all(jobs, flags.jobs)
    folders = {job.name: job.folder for job in jobs if job.seed == 0}

    def draw_maps():
        text, names = movie.text_of(c.data, base.block_size)
        return figures.draw_maps(results, names, lambda name: movie.maps_of(
            checkpoint.load(folders[name] / "last.pt")[0], text))

    rows = {name: summary(name, config, results) for name, config in configs.items()}
    head = runner.head("compare_gates.py", argv, c, flags.jobs) | {
        "recipe": " ".join(f"{k}={v}" for k, v in sorted(values.items()) if k not in runner.MACHINE)}
    title, short = f"compare_gates: {task}", {key: COLUMNS[key] for key in SCREEN}
    runner.finish(folder, task, rows.values(), markdown(title, head, NOTE + MORE, rows.values(), COLUMNS),
                  show=markdown(title, head, "", rows.values(), short) + f"\nall columns: {folder / task}.md",
                  share=lambda: figures.draw_share(rows, results), loss=lambda: figures.draw_loss(rows),
                  maps=draw_maps)


if __name__ == "__main__":
    run_main(main)
