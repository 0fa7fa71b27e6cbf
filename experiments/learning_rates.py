"""
How large may the learning rate be? The paper's Table 2, small: every rate without a gate, with one, and with
the sandwich norm, on real text; and without QK-norm, which is another way to steady training.

    python experiments/learning_rates.py --jobs=2       126 runs, 40 min
    python experiments/learning_rates.py --seeds=1 --steps=200   a trial

Reading order: RATES -> recipes_of -> final_loss -> spikes -> rows_of -> draw -> main.
"""
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from experiments import runner
from experiments.compare_gates import TASKS, configs_of
from experiments.runner import count, mean
from plumbing.flags import run_main
from plumbing.machine import autocast, choose_precision

RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)  # peak learning rates
NAMES = {"on": ("none", "g1", "g1-headwise", "sandwich"), "off": ("none", "g1")}  # with QK-norm, and without
BLOCK = 10  # steps between two lines of the log: their mean training loss is one point of the curve
WINDOWS = 256  # of the validation loss at the end


def recipes_of(steps=None):
    """{(QK-norm, variant, rate): (GPTConfig, TrainConfig)}, at equal parameters."""
    recipes, values = {}, TASKS["python"] | {"gate": "none", "eval_every": BLOCK, "eval_windows": 16}
    values |= {"vocab_size": prepare.load("python")[0]["vocab_size"], "max_steps": steps or 500}
    for switch, names in NAMES.items():
        base, c = train.make_configs(values | {"qk_norm": switch == "on"})
        for name, config in configs_of(names, base).items():
            for rate in RATES:
                recipes[switch, name, rate] = config, dataclasses.replace(c, learning_rate=rate)
    return recipes


def final_loss(job, model):
    """The validation loss at the end, on more windows than train.py looks at between."""
    device = model.embed.weight.device
    *_, meta, _, val_set = train.open_data(job.config, job.c, device)
    c = dataclasses.replace(job.c, eval_windows=WINDOWS)
    precision = autocast(choose_precision(c.dtype, device), device)
    return {"val_loss": train.evaluate(model, model, val_set, meta["val"], c, precision)["val_loss"]}


def spikes(log):
    """How often the training loss, a mean over BLOCK steps, is more than 0.1 above its running mean.

    The running mean is that of the five points before. Points in a row that are above count once.
    """
    losses = [row["train_loss"] for row in log]
    above = [loss > mean(losses[i - 5 : i]) + 0.1 for i, loss in enumerate(losses) if i >= 5]
    return sum(now and not before for before, now in zip([False, *above], above))


def rows_of(recipes, results):
    """A row of the csv for each recipe: its loss over the seeds that did not diverge."""
    rows = []
    for name, (config, _) in recipes.items():
        runs = [run for (other, _), run in results.items() if other == name]
        losses = [run["val_loss"] for run in runs if "diverged" not in run]
        switch, variant, rate = name
        rows.append({
            "qk_norm": switch, "variant": variant, "learning_rate": rate, "parameters": count(config),
            "seeds": len(runs), "diverged": len(runs) - len(losses), "val_loss": mean(losses),
            "lowest": min(losses, default=math.nan), "highest": max(losses, default=math.nan),
            "spikes": sum(spikes(run["log"]) for run in runs)})
    return rows


def table_of(rows):
    """The rows of the md: a line for each variant, a column for each rate, the best loss in bold."""
    lines = []
    for switch, names in NAMES.items():
        for name in names:
            mine = {row["learning_rate"]: row for row in rows
                    if (row["qk_norm"], row["variant"]) == (switch, name)}
            best = min(mine, key=lambda rate: mine[rate]["val_loss"])
            lines.append({"variant": name, "qk_norm": switch} | {
                f"{rate:g}": ("**{}**" if rate == best else "{}").format(
                    f"{row['val_loss']:.3f}" if row["diverged"] < row["seeds"] else "diverged")
                + f" ({row['diverged']} of {row['seeds']} diverged)" * (0 < row["diverged"] < row["seeds"])
                + f", {row['spikes']} spike{'s' * (row['spikes'] > 1)}" * bool(row["spikes"])
                for rate, row in mine.items()})
    return lines


def draw(rows):
    """Validation loss over the learning rate, a panel with QK-norm and one without."""
    from experiments.figures import LINES, plt  # here, because the processes that train do not need it
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 3.4))
    for axis, (switch, names) in zip(axes, NAMES.items()):
        for name in names:
            mine = [row for row in rows if (row["qk_norm"], row["variant"]) == (switch, name)]
            rates, losses = ([row[key] for row in mine] for key in ("learning_rate", "val_loss"))
            axis.plot(rates, losses, **LINES[name], ms=4, label=name, clip_on=False)
            axis.fill_between(rates, [row["lowest"] for row in mine], [row["highest"] for row in mine],
                              color=LINES[name]["color"], alpha=0.15, lw=0)
            best = min(mine, key=lambda row: row["val_loss"])
            axis.plot(best["learning_rate"], best["val_loss"], marker=LINES[name]["marker"], ms=9, mfc="none",
                      color=LINES[name]["color"])
        top = axis.get_ylim()[1]
        for i, name in enumerate(names):  # shown, not hidden: above the curves, a cross for each variant
            bad = [row["learning_rate"] for row in rows if row["diverged"]
                   and (row["qk_norm"], row["variant"]) == (switch, name)]
            axis.plot(bad, [top + 0.08 * i] * len(bad), "x", color=LINES[name]["color"])
        axis.set(xscale="log", xticks=RATES, xticklabels=[f"{rate:g}" for rate in RATES],
                 xlabel="peak learning rate", title=f"QK-norm {switch}")
        axis.minorticks_off()
    axes[0].set_ylabel("val loss, nats per token")
    axes[0].legend(frameon=False)
    figure.suptitle("Mean and range of the seeds; large hollow mark: the best rate; cross: a seed diverged")
    return figure


NOTE = f"""
Validation loss in nats per token at the last step, mean over the seeds that did not diverge; the best rate
of each line in bold. A spike: the training loss, a mean over {BLOCK} steps, is more than 0.1 above the mean
of the five points before it; the sum over the seeds. With 1,024 tokens a step most of them are hard batches,
which come at the same steps in all lines: what is unstable shows in the loss itself. The csv has the lowest
and the highest seed.
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, folder = runner.begin(__doc__, "learning_rates", argv)
    from experiments import figures

    recipes = recipes_of(flags.steps)
    named = {"-".join(map(str, name)): recipe for name, recipe in recipes.items()}
    jobs = runner.plan("learning_rates", named, range(flags.seeds), final_loss)
    results, names = runner.run_all(jobs, flags.jobs), dict(zip(named, recipes))
    rows = rows_of(recipes, {(names[name], seed): run for (name, seed), run in results.items()})
    config, c = next(iter(recipes.values()))
    head = runner.head("learning_rates.py", argv, c, flags.jobs, runs=f"{c.max_steps} steps, {flags.seeds} "
                       f"seeds, {count(config):,} parameters, AdamW, {c.warmup_steps} steps of warm-up")
    lines = table_of(rows)
    text = runner.markdown("learning_rates", head, NOTE, lines, {name: (name, "") for name in lines[0]})
    runner.finish(folder, "learning_rates", rows, text)
    print(*figures.save(folder, "learning_rates", {"loss": lambda: draw(rows)}))


if __name__ == "__main__":
    run_main(main)
