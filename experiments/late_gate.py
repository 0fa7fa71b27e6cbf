"""
Can a gate that comes too late remove a sink? A model trains without a gate until its sink stands. Then it
gets one, and trains on: all weights, or the gate alone. And the reverse: a gated model loses its gate. As a
control, one trains on without a gate.

    python experiments/late_gate.py --jobs=2             36 runs, an hour
    python experiments/late_gate.py --seeds=1 --steps=100    a trial

By hand, with one seed: `python train.py --preset=sink --gate=none --out=out/first`, and then
`python train.py --preset=sink --init_from=out/first/last.pt --gate=g1 --train_only=gate --max_steps=6000`.
Reading order: LATER -> second_part -> draw -> main.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from experiments import long_context, runner
from experiments.tables import MEASURED, good, markdown, mean, measured
from experiments.variants import recipes_of
from plumbing.flags import run_main

LATER = {  # second part: (first part, the gate from now on, what is trained)
    "none, then G1": ("none", "g1", "all"),
    "none, then G1 alone": ("none", "g1", "gate"),
    "G1, then none": ("g1", "none", "all"),
    "none, then none": ("none", "none", "all"),  # the control: what the fresh start and the steps do alone
}
TASKS = "text", "backcopy"


def second_part(first):
    """Jobs of the second part, each from the last weights of one of these jobs, with twice the steps."""
    jobs = []
    for before in first:
        recipes = {name: (dataclasses.replace(before.config, gate=gate), dataclasses.replace(
            before.c, init_from=str(before.folder / "last.pt"), train_only=what,
            max_steps=2 * before.c.max_steps))
            for name, (kind, gate, what) in LATER.items() if kind == before.name}
        jobs += runner.plan(recipes, [before.seed], before.look)
    return jobs


def draw(found):
    """The share over the steps: a panel for each second part, the first part in front of it."""
    from experiments.figures import LINES, grow, plt  # here: the processes that train do not need it
    figure, axes = plt.subplots(len(TASKS), len(LATER), sharey="row", figsize=(7.8, 4.2))
    for line, (task, results) in zip(axes, found.items()):
        for axis, (name, (before, gate, _)) in zip(line, LATER.items()):
            runs = {kind: [run for (other, _), run in results.items() if other == kind]
                    for kind in (before, name)}
            change = runs[before][0]["log"][-1]["step"]
            for kind, start, what in ((before, 0, before), (name, change, gate)):
                grow(axis, runs[kind], start, color=LINES[what]["color"], ls=LINES[what]["ls"])
            axis.axvline(change, color="black", lw=0.8)
            axis.set_title(name if task == TASKS[0] else "")
        line[0].set(ylabel=f"first-token share\n{task}", ylim=(0, None))  # all is drawn: they share it
    figure.supxlabel("steps")
    figure.suptitle("Solid: no gate; dashed: G1; the change at the vertical line; mean and range of the "
                    "seeds.\nThin line: uniform attention")
    return figure


COLUMNS = {"task": ("task", ""), "run": ("run", ""), **MEASURED, "long_loss": ("loss at 8 T", ".2f"),
           "share_by_seed": ("shares", "")}
NOTE = """
All is read at the last step of each part. A second part starts from the weights of the first, with a fresh
optimizer and a fresh schedule, and has twice the steps; a new gate is drawn fresh (N(0, 0.02)), so its scores
start near one half. "alone": only the gate is trained, all other weights stay as they are. With one layer, as
on backcopy, attention itself cannot change then, nor the share. Loss at 8 T: in the last quarter of a window
eight times longer than the trained one, on backcopy at triggers.
"""


def main(argv=None):
    flags, folder, head = runner.begin(__doc__, "late_gate", argv)
    rows, found = [], {}
    for task in TASKS:
        recipes = recipes_of(task, ["none", "g1"], flags.steps)
        first = runner.plan(recipes, range(flags.seeds or 3), long_context.look)
        found[task] = runner.run_all(first, flags.jobs)
        later = second_part(first)
        found[task] |= runner.run_all(later, flags.jobs)
        for name, config in {job.name: job.config for job in first + later}.items():
            longer = mean(run["found"]["8 none"][0] for run in good(found[task], name).values())
            rows.append({"task": task, "run": name} | measured(found[task], name, config)
                        | {"long_loss": longer})
    text = markdown("late_gate", head, NOTE, rows, COLUMNS)
    runner.finish(folder, "late_gate", rows, text, share=lambda: draw(found))


if __name__ == "__main__":
    run_main(main)
