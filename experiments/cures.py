"""
Who else removes the sink? Three ways to change the softmax, beside the gate, which filters its result.

    python experiments/cures.py --jobs=2             3 seeds, 15 minutes
    python experiments/cures.py --seeds=1 --steps=200    a trial

softmax1, sink and softpick are the formulas in OtherSDPA (gated_gpt.py), and rows of VARIANTS in
compare_gates.py, where they can be compared with all else. Reading order: CURES -> recipes_of -> rows_of ->
draw -> main.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from experiments import runner
from experiments.compare_gates import COLUMNS, TASKS, configs_of, summary
from plumbing.flags import run_main

CURES = {  # variant: what it does
    "none": "nothing", "g1": "filters the result: Y * sigmoid(X W)", "softmax1": "one more score, 0",
    "sink": "one more score, learned per head", "softpick": "no weight for scores below 0"}


def recipes_of(task, steps=None):
    """{variant: (GPTConfig, TrainConfig)} of a task of compare_gates.py, at equal parameters."""
    values = TASKS[task] | {"gate": "none", "attn_share": True}
    values |= {"vocab_size": prepare.load(task)[0]["vocab_size"], "max_steps": steps or values["max_steps"]}
    base, c = train.make_configs(values | {"eval_every": max(1, values["max_steps"] // 5)})
    return {name: (config, c) for name, config in configs_of(CURES, base).items()}


def learned_sinks(job, model):
    """The learned scores that stand for no key, one for each head of each layer."""
    sinks = [block.attn.sdpa.b.tolist() for block in model.blocks] if job.config.attention == "sink" else []
    return {"sinks": sinks}


def rows_of(task, recipes, results):
    """A row of the csv for each variant, as in compare_gates.py, and the largest learned score."""
    rows = []
    for name, (config, _) in recipes.items():
        row = summary(name, config, results)
        sinks = [b for (other, _), run in results.items() if other == name
                 for layer in run.get("sinks", ()) for b in layer]
        row |= {"task": task, "does": CURES[name], "largest_sink": max(sinks, default=math.nan)}
        rows.append(row)
    return rows


def draw(rows):
    """First-token share and difference in loss, every seed a mark, a column of panels for each task."""
    from experiments.figures import BLUE, plt  # here, because the processes that train do not need it
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(2, len(tasks), sharex=True, squeeze=False, figsize=(3.6 * len(tasks), 4.2))
    for (upper, lower), task in zip(axes.T, tasks):
        mine = [row for row in rows if row["task"] == task]
        for x, row in enumerate(mine):
            shares, losses, base = ([float(value) for value in text.split()] for text in (
                row["share_by_seed"], row["val_loss_by_seed"], mine[0]["val_loss_by_seed"]))
            upper.plot([x] * len(shares), shares, "o", mfc="none", color=BLUE, clip_on=False)
            lower.plot([x] * len(losses), [a - b for a, b in zip(losses, base)], "o", mfc="none", color=BLUE)
        upper.axhline(mine[0]["floor"], color="black", ls=":", lw=1)
        lower.axhline(0, color="black", lw=0.8)
        upper.set(title=task, ylim=(0, 1 if max(row["share"] for row in mine) > 0.3 else None))
        lower.set_xticks(range(len(mine)), [row["variant"] for row in mine])
    axes[0][0].set_ylabel("first-token share")
    axes[1][0].set_ylabel("val loss, difference to none")
    figure.suptitle("A mark for each seed; dotted: uniform attention")
    return figure


NOTE = """
Share: attention probability on the first token, mean over queries, heads and layers. The weights of softmax1,
sink and softpick need not sum to one: what is missing to one is on no token. Val loss: nats per token at the
last step; difference: to `none` with the same seed; `~`: seed noise (below twice its standard error). Time:
seconds per step relative to `none`; these three write out the T x T scores, so it says nothing of what a
kernel of their own would take. Learned: the largest score that `sink` has learned, over heads and seeds.
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, folder = runner.begin(__doc__, "cures", argv)
    from experiments import figures

    rows, head = [], runner.head("cures.py", argv, train.TrainConfig(), flags.jobs)
    for task in ("backcopy", "python"):
        recipes = recipes_of(task, flags.steps)
        jobs = runner.plan(f"cures-{task}", recipes, range(flags.seeds), learned_sinks)
        rows += rows_of(task, recipes, runner.run_all(jobs, flags.jobs))
        config, c = recipes["none"]
        head[task] = (f"{c.max_steps:,} steps, {flags.seeds} seeds, {runner.count(config):,} parameters; "
                      f"uniform attention has a share of {rows[-1]['floor']:.3f}")
    shown = ("variant", "val_loss", "val_loss_sd", "difference", "difference_sd", "noise", "diverged",
             "share", "share_sd", "max_activation", "step_time")
    columns = {"task": ("task", ""), **{name: COLUMNS[name] for name in shown},
               "largest_sink": ("learned", ".2f"), "does": ("what it does", "")}
    text = runner.markdown("cures", head, NOTE, rows, columns)
    runner.finish(folder, "cures", rows, text)
    print(*figures.save(folder, "cures", {"share": lambda: draw(rows)}))


if __name__ == "__main__":
    run_main(main)
