"""
How large may the learning rate be? The paper's Table 2, small: every rate without a gate, with G1, and with
the sandwich norm, on real text and with the recipe that grows a sink there.

    python experiments/learning_rates.py --jobs=2       45 runs, 45 minutes
    python experiments/learning_rates.py --seeds=1 --steps=100   a trial

Is the gate's lead larger where the sink is? The share is recorded beside the loss.
Reading order: recipes -> table_of -> draw -> main.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from experiments import runner
from experiments.tables import AT_THE_END, good, markdown, measured
from experiments.variants import recipes_of
from plumbing.flags import run_main

RATES = (0.002, 0.004, 0.008, 0.016, 0.032)  # peak learning rates; 0.008 is the preset's
NAMES = "none", "g1", "sandwich"


def recipes(steps=None):
    """{(variant, rate): (GPTConfig, TrainConfig)}, at equal parameters."""
    return {(name, rate): (config, dataclasses.replace(c, learning_rate=rate))
            for name, (config, c) in recipes_of("text", NAMES, steps).items() for rate in RATES}


def table_of(rows):
    """The rows of the md: a line for each variant, a column for each rate, the best loss in bold."""
    lines = []
    for name in NAMES:
        mine, line = [row for row in rows if row["variant"] == name], {"variant": name}
        best = min(mine, key=lambda row: row["val_loss"])
        for row in mine:
            bold = "**" * (row is best)
            line[f"{row['learning_rate']:g}"] = (
                f"{bold}{row['val_loss']:.3f}{bold} ({row['share']:.2f})" * (row["diverged"] < row["seeds"])
                + f" {row['diverged']} diverged" * (row["diverged"] > 0))
        lines.append(line)
    return lines


def draw(results):
    """Loss and share over the learning rate, a line for each variant."""
    from experiments.figures import LINES, band, plt  # here: the processes that train do not need it
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, key, label in zip(axes, ("val_loss", "share"), ("val loss, nats", "first-token share")):
        for name in NAMES:
            values = [[AT_THE_END[key](run["log"][-1]) for run in good(results, (name, rate)).values()]
                      for rate in RATES]
            band(axis, RATES, values, **LINES[name], ms=4, label=name)
        axis.set(xscale="log", xticks=RATES, xticklabels=RATES, xlabel="peak learning rate", ylabel=label)
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    axes[1].set_ylim(0, None)
    figure.suptitle("Mean and range of the seeds")
    return figure


NOTE = """
Validation loss in nats per token at the last step, and in brackets the first-token share; means over the
seeds that did not diverge. The best loss of each line in bold.
"""


def main(argv=None):
    flags, folder, head = runner.begin(__doc__, "learning_rates", argv)
    jobs = runner.plan(recipes(flags.steps), range(flags.seeds or 3))
    results = runner.run_all(jobs, flags.jobs)
    rows = [{"variant": name, "learning_rate": rate} | measured(results, (name, rate), config)
            for (name, rate), (config, _) in recipes(flags.steps).items()]
    c = jobs[0].c
    head["runs"] = f"text, {c.max_steps:,} steps, {flags.seeds or 3} seeds, {c.optimizer}, QK-norm off"
    lines = table_of(rows)
    text = markdown("learning_rates", head, NOTE, lines, {name: (name, "") for name in lines[0]})
    runner.finish(folder, "learning_rates", rows, text, loss=lambda: draw(results))


if __name__ == "__main__":
    run_main(main)
