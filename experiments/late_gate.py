"""
Can a gate that comes too late remove a sink? A model trains without a gate until its sink stands. Then it
gets one, and trains on: all weights, or the gate alone. And the reverse: a gated model loses its gate.

    python experiments/late_gate.py --jobs=2             3 seeds, 15 minutes
    python experiments/late_gate.py --seeds=1 --steps=100    a trial

By hand, with one seed: `python train.py --preset=sink --gate=none --out=out/first`, and then
`python train.py --preset=sink --init_from=out/first/last.pt --gate=g1 --train_only=gate --max_steps=6000`.
Reading order: LATER -> plan_of -> rows_of -> long_loss -> draw -> main.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from experiments import long_context, runner
from experiments.runner import deviation, mean
from gated_gpt import uniform_share
from plumbing import checkpoint
from plumbing.flags import run_main

LATER = {  # second part: (first part, fields that change)
    "none, then G1": ("none", dict(gate="g1")),
    "none, then G1 alone": ("none", dict(gate="g1", train_only="gate")),
    "G1, then none": ("g1", dict(gate="none")),
}


def plan_of(seed, steps=None):
    """(jobs of the first part, jobs of the second) of one seed; the second goes on from the first."""
    values = train.PRESETS["sink"] | {"vocab_size": prepare.load("backcopy")[0]["vocab_size"]}
    values["max_steps"] = steps or values["max_steps"]
    values["eval_every"] = max(1, values["max_steps"] // 6)
    first = runner.plan("late_gate", {gate: train.make_configs(values | {"gate": gate})
                                      for gate in ("none", "g1")}, [seed])
    folders, later = {job.name: job.folder for job in first}, {}
    for name, (before, change) in LATER.items():
        config, c = train.make_configs(values | change | {"init_from": str(folders[before] / "last.pt")})
        later[name] = config, dataclasses.replace(c, max_steps=2 * c.max_steps)
    return first, runner.plan("late_gate", later, [seed])


def rows_of(jobs, results):
    """A row of the csv for each kind of run: what its log and `long_loss` say at the end, over the seeds."""
    rows = []
    for name in dict.fromkeys(job.name for job in jobs):
        last = [results[name, job.seed]["log"][-1] | {"long_loss": long_loss(job)}
                for job in jobs if job.name == name]
        row = {"run": name, "steps": last[0]["step"], "seeds": len(last)}
        for key in ("first_token_share", "gate_score", "val_loss", "long_loss", "max_activation"):
            row |= {key: mean(r[key] for r in last), f"{key}_sd": deviation(r[key] for r in last),
                    f"{key}_by_seed": " ".join(f"{r[key]:.4f}" for r in last)}
        rows.append(row)
    return rows


def long_loss(job):
    """Loss at triggers in the last quarter of a window eight times longer than the trained one."""
    model, _ = checkpoint.load(job.folder / "last.pt")
    return long_context.score_at(model, job.c.data, 8 * job.config.block_size)[0]


def draw(results, seeds, floor):
    """The share over the steps, a panel for each second part, the first part in front of it."""
    from experiments.figures import BLUE, ORANGE, plt  # here, because the processes that train do not need it
    figure, axes = plt.subplots(1, len(LATER), sharey=True, figsize=(2.6 * len(LATER), 2.6))
    for axis, (name, (before, change)) in zip(axes, LATER.items()):
        for seed in range(seeds):
            first, second = results[before, seed]["log"], results[name, seed]["log"]
            change_at = first[-1]["step"]
            for log, start, gate in ((first, 0, before), (second, change_at, change["gate"])):
                steps = [start + row["step"] for row in log]
                shares = [row["first_token_share"] for row in log]
                if start:
                    steps, shares = [change_at, *steps], [first[-1]["first_token_share"], *shares]
                axis.plot(steps, shares, "--" if gate == "g1" else "-", lw=1,
                          color=BLUE if gate == "g1" else ORANGE)
        axis.axvline(change_at, color="black", lw=0.8)
        axis.axhline(floor, color="black", ls=":", lw=0.8)
        axis.set(title=name, ylim=(0, 1), xlabel="steps")
    axes[0].set_ylabel("first-token share")
    figure.suptitle("Solid: no gate; dashed: G1; the change at the vertical line; a line for each seed; "
                    "dotted: uniform attention")
    return figure


COLUMNS = {"run": ("run", ""), "steps": ("steps", ",d"), "first_token_share": ("share", ".3f"),
           "first_token_share_sd": ("± sd", ".3f"), "first_token_share_by_seed": ("by seed", ""),
           "gate_score": ("gate score", ".3f"), "gate_score_by_seed": ("by seed", ""),
           "val_loss": ("val loss", ".4f"), "long_loss": ("loss at T=512", ".2f"),
           "long_loss_by_seed": ("by seed", ""), "max_activation": ("max activation", ".1f")}
NOTE = """
All is read at the last step of each part. A second part starts from the weights of the first, with a fresh
optimizer; a new gate is drawn fresh (N(0, 0.02)), so its scores start near one half. "alone": only the gate
is trained, all other weights stay as they are. With one layer, attention itself cannot change then, nor the
share. Loss at T=512: at triggers in the last quarter of a window eight times longer than the trained one.
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, folder = runner.begin(__doc__, "late_gate", argv)
    from experiments import figures

    jobs, results = [], {}
    for part in zip(*(plan_of(seed, flags.steps) for seed in range(flags.seeds))):  # all first parts first
        mine = [job for of_seed in part for job in of_seed]
        results |= runner.run_all(mine, flags.jobs)
        jobs += mine
    rows, floor = rows_of(jobs, results), uniform_share(jobs[0].config.block_size)
    head = runner.head("late_gate.py", argv, jobs[0].c, flags.jobs, seeds=flags.seeds, recipe="sink preset; "
                       f"share of uniform attention {floor:.3f}")
    text = runner.markdown("late_gate", head, NOTE, rows, COLUMNS).replace("nan", "-")
    runner.finish(folder, "late_gate", rows, text)
    print(*figures.save(folder, "late_gate", {"share": lambda: draw(results, flags.seeds, floor)}))


if __name__ == "__main__":
    run_main(main)
