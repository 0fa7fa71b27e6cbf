"""
How large may the learning rate be? The paper's Table 2, small: every rate without a gate, with G1, and with
the sandwich norm, on real text and with the recipe that grows a sink there.

    python experiments/learning_rates.py --jobs=2       45 runs, 75 minutes
    python experiments/learning_rates.py --seeds=1 --steps=100   a trial

Is the gate's lead larger where the sink is? The share is recorded beside the loss.
Reading order: recipes -> draw -> main.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from experiments import runner
from experiments.tables import AT_THE_END, MEASURED, NOTE, good, markdown, measured
from experiments.variants import recipes_of
from plumbing.flags import run_main

RATES = (0.002, 0.004, 0.008, 0.016, 0.032)  # peak learning rates; 0.008 is the preset's
NAMES = "none", "g1", "sandwich"


def recipes(steps=None):
    """{(variant, rate): (GPTConfig, TrainConfig)}, at equal parameters."""
    return {(name, rate): (config, dataclasses.replace(c, learning_rate=rate))
            for name, (config, c) in recipes_of("text", NAMES, steps).items() for rate in RATES}


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


def main(argv=None):
    flags, folder, head = runner.begin(__doc__, "learning_rates", argv)
    jobs = runner.plan(recipes(flags.steps), range(flags.seeds or 3))
    results = runner.run_all(jobs, flags.jobs)
    rows = [{"variant": name, "learning_rate": rate} | measured(results, (name, rate), config)
            for (name, rate), (config, _) in recipes(flags.steps).items()]
    columns = {"variant": ("variant", ""), "learning_rate": ("rate", "g"), **MEASURED}
    text = markdown("learning_rates: text", head, NOTE, rows, columns)
    runner.finish(folder, "learning_rates", rows, text, loss=lambda: draw(results))


if __name__ == "__main__":
    run_main(main)
