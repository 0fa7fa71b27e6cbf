"""
Longer windows than trained: the paper's Table 5, small. Models that were trained on windows of 64 tokens get
up to 1,024, with RoPE as it was trained and with each rope_scaling of gated_gpt.py; nothing is trained again.

    python experiments/long_context.py --jobs=2          3 seeds, 25 min
    python experiments/long_context.py --seeds=1 --steps=100    a trial

`backcopy` asks for a copy at triggers, `recall` for a digit that stood far back (both in data/prepare.py),
and `python` is text.
Reading order: TASKS -> look -> score_at -> asked -> on_bos -> rows_of -> draw_tasks -> draw_why -> main.
"""
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from experiments import compare_gates, runner
from experiments.runner import mean
from gated_gpt import evaluating, measure
from plumbing.flags import run_main

SMALL = compare_gates.TASKS["python"]
TASKS = {  # the recipe, and what is counted
    "backcopy": (train.PRESETS["sink"], "loss at triggers"),
    "python": (SMALL | dict(max_steps=1000), "loss"),
    "recall": (SMALL | dict(data="recall", n_layer=2, batch_size=32, max_steps=1500, optimizer="muon",
                            learning_rate=1e-2, schedule="constant"), "right answers"),
}
NAMES = ("none", "g1", "g1-headwise")
SCALINGS = ("none", "linear", "ntk", "yarn")
LONGER = (1, 2, 4, 8, 16)  # times the trained window
TOKENS = 2**16  # for each number
BATCH = 2**13  # tokens at once


def recipes_of(task, steps=None):
    """{variant: (GPTConfig, TrainConfig)} at equal parameters."""
    values = TASKS[task][0] | {"gate": "none", "attn_share": True}
    values |= {"vocab_size": prepare.load(task)[0]["vocab_size"], "max_steps": steps or values["max_steps"]}
    base, c = train.make_configs(values | {"eval_every": math.ceil(values["max_steps"] / 4)})
    return {name: (config, c) for name, config in compare_gates.configs_of(NAMES, base).items()}


# ---- a trained model, with longer windows ----------------------------------------------------------


def look(job, model):
    """{"found": rows of numbers, one for each window and scaling; "on_bos": see on_bos}."""
    trained, found = job.config.block_size, []
    for longer in LONGER:
        T = longer * trained
        for scaling in SCALINGS if longer > 1 else ("none",):
            score, idx = score_at(model, job.c.data, T, scaling)
            layers = measure(model, idx)
            found.append({"longer": longer, "T": T, "rope_scaling": scaling, "score": score,
                          "share": mean(layer["first_token_share"] for layer in layers)})
    model.set_window(T)
    return {"found": found, "on_bos": on_bos(model, idx)}


@torch.no_grad()
def score_at(model, task, T, scaling="none"):
    """(mean of what counts, a batch of the windows (N, T)) of a model on a task, with windows of T tokens."""
    meta, tokens = prepare.load(task)
    windows = train.Windows(tokens["val"], meta["bos"], T, model.embed.weight.device)
    batches = [windows.at(part) for part in np.array_split(windows.spaced(TOKENS // T), TOKENS // BATCH)]
    model.set_window(T, scaling)
    with evaluating(model):
        counted = torch.cat([asked(task, model(idx)[0], idx, targets) for idx, targets in batches])
    return counted.mean().item(), batches[0][0]


def asked(task, logits, idx, targets):
    """What counts (N,) of logits (B, T, V), in the last quarter of each window, where it has got longest."""
    late = torch.arange(idx.size(1), device=idx.device) >= idx.size(1) * 3 // 4  # (T,)
    if task == "recall":  # is the likeliest token the digit that this letter had last?
        same = (idx[:, :, None] == idx[:, None, :]).tril(-1)  # (B, T, T): query, key
        before = (same * torch.arange(idx.size(1), device=idx.device)).amax(-1)  # (B, T): 0 if there is none
        digit = targets.gather(1, before)  # what followed there
        count = late & (before > 0) & (idx > ord("9"))
        return (logits.argmax(-1) == digit)[count].float()
    if task == "backcopy":
        triggers = torch.tensor(list(prepare.TRIGGERS.encode()), device=idx.device)
        late = late & torch.isin(idx, triggers)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return loss[late.expand_as(loss)]


@torch.no_grad()
def on_bos(model, idx):
    """Scores of each position, mean over windows, in the first layer's head that looks at BOS most.

    {"bos": the score of BOS, "others": log of the sum of e^score over all other keys}. The first-token share
    is sigmoid(bos - others): where the two lines cross, BOS has half of the attention.
    """
    found = {}

    def on_sdpa(sdpa, inputs, output):
        q, k = (h.transpose(1, 2) for h in inputs[:2])  # (B, nh, T, hs), (B, nkv, T, hs)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = q @ k.mT / math.sqrt(q.size(-1))
        scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        bos, others = scores[..., 0], scores[..., 1:].logsumexp(-1)  # (B, nh, T) each
        head = (bos - others).sigmoid()[..., 1:64].mean((0, 2)).argmax()
        found.update(bos=bos[:, head].mean(0).tolist(), others=others[:, head].mean(0).tolist())

    with evaluating(model, [(model.blocks[0].attn.sdpa, on_sdpa)]):
        model(idx)
    return {name: [round(value, 3) for value in values] for name, values in found.items()}


# ---- tables and pictures ---------------------------------------------------------------------------


def rows_of(task, results):
    """A row of the csv for each variant, window and scaling."""
    rows = []
    for name in NAMES:
        runs = [run["found"] for (other, _), run in results.items() if other == name and "found" in run]
        for same in zip(*runs):
            scores = [row["score"] for row in same]
            rows.append({"task": task, "counts": TASKS[task][1], "variant": name,
                         "rope_scaling": same[0]["rope_scaling"], "T": same[0]["T"], "seeds": len(same),
                         "score": mean(scores), "lowest": min(scores), "highest": max(scores),
                         "share": mean(row["share"] for row in same)})
    return rows


def table_of(rows):
    """The rows of the md: a line for each task, variant and scaling, a column for each window."""
    lines, trained = {}, {}
    for row in rows:
        key = row["task"], row["counts"], row["variant"]
        cell = f"{row['score']:.2f} ({row['share']:.2f})"
        if row["T"] == min(other["T"] for other in rows):
            trained[key] = cell
        else:
            lines.setdefault((*key, row["rope_scaling"]), {})[f"T={row['T']}"] = cell
    return [{"task": task, "counted": counts, "variant": name, "RoPE": scaling.replace("none", "as trained"),
             "T=64": trained[task, counts, name], **cells}
            for (task, counts, name, scaling), cells in lines.items()]


def draw_tasks(rows):
    """What is counted over the window's length: a line of panels for each task, a column for each scaling."""
    from experiments.figures import LINES, plt  # here, because the processes that train do not need it
    figure, axes = plt.subplots(len(TASKS), len(SCALINGS), sharex=True, sharey="row", figsize=(8, 5.6))
    for line, task in zip(axes, TASKS):
        for axis, scaling in zip(line, SCALINGS):
            for name in NAMES:
                mine = [row for row in rows if (row["task"], row["variant"]) == (task, name)
                        and (row["rope_scaling"] == scaling or row["T"] == rows[0]["T"])]
                T = [row["T"] for row in mine]
                axis.plot(T, [row["score"] for row in mine], **LINES[name], ms=3, label=name)
                axis.fill_between(T, [row["lowest"] for row in mine], [row["highest"] for row in mine],
                                  color=LINES[name]["color"], alpha=0.15, lw=0)
            axis.set(xscale="log", xticks=T, xticklabels=T)
            axis.minorticks_off()
        line[0].set_ylabel(f"{task}:\n{TASKS[task][1]}")
    for axis, scaling in zip(axes[0], SCALINGS):
        axis.set_title("RoPE as trained" if scaling == "none" else scaling)
    axes[0][0].legend(frameon=False)
    figure.supxlabel("tokens in a window; trained: 64")
    return figure


def draw_why(results):
    """The score of BOS and the weight of all other keys, over the distance, on backcopy, seed 0."""
    from experiments.figures import BLUE, ORANGE, plt
    figure, axes = plt.subplots(1, len(NAMES), sharey=True, figsize=(8, 2.8))
    for axis, name in zip(axes, NAMES):
        found = results[name, 0]["on_bos"]
        axis.plot(found["bos"], color=ORANGE, label="score of BOS")
        axis.plot(found["others"], "--", color=BLUE, label="log of the sum over all other keys")
        axis.axvline(64, color="black", ls=":", lw=0.8)
        axis.set(title=name, xlabel="distance from BOS, tokens", xscale="log", xlim=(1, len(found["bos"])))
    axes[0].set_ylabel("score")
    axes[0].legend(frameon=False)
    figure.suptitle("Dotted: the trained window. Above the dashed line, BOS has most of the attention")
    return figure


NOTE = """
Each cell: what is counted, in the last quarter of the window, and in brackets the first-token share over all
of it; means over the seeds. Loss: nats per token. Right answers: of the letters that stood in the window
before, the part for which the likeliest token is the digit that followed then.
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    flags, folder = runner.begin(__doc__, "long_context", argv)
    from experiments import figures

    rows, head, found = [], runner.head("long_context.py", argv, train.TrainConfig(), flags.jobs), {}
    for task in TASKS:
        recipes = recipes_of(task, flags.steps)
        found[task] = runner.run_all(runner.plan(f"long_context-{task}", recipes, range(flags.seeds), look),
                                     flags.jobs)
        rows += rows_of(task, found[task])
        config, c = recipes["none"]
        head[task] = (f"{config.n_layer} layers, {config.n_embd} wide, windows of {config.block_size}, "
                      f"{c.max_steps:,} steps, {flags.seeds} seeds, {runner.count(config):,} parameters")
    lines = table_of(rows)
    text = runner.markdown("long_context", head, NOTE, lines, {name: (name, "") for name in lines[0]})
    runner.finish(folder, "long_context", rows, text)
    print(*figures.save(folder, "long_context", {"tasks": partial(draw_tasks, rows),
                                                 "why": partial(draw_why, found["backcopy"])}))


if __name__ == "__main__":
    run_main(main)
