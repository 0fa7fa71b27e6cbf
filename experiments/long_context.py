"""
Longer windows than trained: the paper's Table 5, small. Models that were trained on windows of 64 tokens get
up to 1,024, with RoPE as it was trained and with each rope_scaling of gated_gpt.py; nothing is trained again.

    python experiments/long_context.py --jobs=2          18 runs, 30 minutes
    python experiments/long_context.py --seeds=1 --steps=100    a trial

Reading order: TASKS -> look -> score_at -> on_bos -> rows_of -> draw_tasks -> draw_why -> main.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from data import prepare
from experiments import runner
from experiments.tables import good, markdown, mean
from experiments.variants import recipes_of
from gated_gpt import evaluating, measure
from plumbing.flags import run_main
from train import Windows

TASKS = {"text": "loss", "backcopy": "loss at triggers"}  # and what is counted
NAMES = "none", "g1", "g1-headwise"
SCALINGS = {"none": "as trained", "linear": "linear", "yarn": "yarn"}
TRAINED = 64  # tokens in a window, of both tasks
LONGER = 1, 2, 4, 8, 16  # times as many
TOKENS = 2**16  # for each number
BATCH = 2**13  # tokens at once


def look(job, model):
    """{"found": {"8 yarn": (score, share), ...} for each window and scaling; "on_bos": see on_bos}."""
    found = {}
    for key in {key: None for scaling in SCALINGS for key in keys(scaling)}:
        longer, scaling = key.split()
        score, idx = score_at(model, job.c.data, TRAINED * int(longer), scaling)
        found[key] = score, mean(layer["first_token_share"] for layer in measure(model, idx))
    _, idx = score_at(model, job.c.data, TRAINED * LONGER[-1])
    return {"found": found, "on_bos": on_bos(model, idx)}


def keys(scaling):
    """Keys of "found", one for each window. The trained one has no scaling."""
    return [f"{longer} {scaling if longer > 1 else 'none'}" for longer in LONGER]


@torch.no_grad()
def score_at(model, data, T, scaling="none"):
    """(mean loss in the last quarter of windows of T tokens, a batch of these windows (N, T)).

    There the window has got longest. On backcopy only triggers count, where attention is asked for.
    """
    meta, tokens = prepare.load(data)
    device, late, losses = model.embed.weight.device, slice(T * 3 // 4, None), []
    windows = Windows(tokens["val"], meta["bos"], T, device)
    batches = [windows.at(part) for part in np.array_split(windows.spaced(TOKENS // T), TOKENS // BATCH)]
    triggers = torch.tensor(list(prepare.TRIGGERS.encode()), device=device)
    model.set_window(T, scaling)
    with evaluating(model):
        for idx, targets in batches:
            loss = F.cross_entropy(model(idx)[0].mT, targets, reduction="none")[:, late]  # (B, T/4)
            losses.append(loss[torch.isin(idx[:, late], triggers)] if data == "backcopy" else loss.flatten())
    return torch.cat(losses).mean().item(), batches[0][0]


@torch.no_grad()
def on_bos(model, idx):
    """Scores of each position from 1 on, means over windows idx (B, T), in the head that looks at BOS most.

    {"bos": the score of BOS, "others": log of the sum of e^score over all other keys}. The first-token share
    is sigmoid(bos - others): where the two lines cross, BOS has half of the attention.
    """
    heads = []  # (share within the trained window, scores of BOS, of the others), one for each head

    def on_sdpa(sdpa, inputs, output):
        q, k = (h.transpose(1, 2) for h in inputs[:2])  # (B, nh, T, hs), (B, nkv, T, hs)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = q @ k.mT / math.sqrt(q.size(-1))
        scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        bos, others = scores[..., 1:, 0], scores[..., 1:, 1:].logsumexp(-1)  # (B, nh, T - 1) each
        shares = (bos - others).sigmoid()[..., : TRAINED - 1].mean((0, 2))
        heads.extend(zip(shares.tolist(), bos.mean(0).tolist(), others.mean(0).tolist()))

    with evaluating(model, [(block.attn.sdpa, on_sdpa) for block in model.blocks]):
        model(idx)
    return dict(zip(("bos", "others"), max(heads)[1:]))


def rows_of(task, results):
    """(rows of the csv, lines of the md, which have a column for each window)"""
    rows, lines = [], []
    for name, scaling in [(name, scaling) for name in NAMES for scaling in SCALINGS]:
        lines.append({"task": task, "counted": TASKS[task], "variant": name, "RoPE": SCALINGS[scaling]})
        for longer, key in zip(LONGER, keys(scaling)):
            scores, shares = zip(*(run["found"][key] for run in good(results, name).values()))
            rows.append({"task": task, "counts": TASKS[task], "variant": name, "rope_scaling": scaling,
                         "T": TRAINED * longer, "seeds": len(scores), "score": mean(scores),
                         "share": mean(shares), "score_by_seed": " ".join(f"{x:.4f}" for x in scores)})
            lines[-1][f"T={TRAINED * longer}"] = f"{mean(scores):.2f} ({mean(shares):.2f})"
    return rows, lines


def draw_tasks(found):
    """What is counted over the window's length: a line of panels for each task, a column for each scaling."""
    from experiments.figures import LINES, band, plt  # here: the processes that train do not need it
    figure, axes = plt.subplots(len(TASKS), len(SCALINGS), sharex=True, sharey="row", figsize=(8, 4.4))
    T = [TRAINED * longer for longer in LONGER]
    for line, (task, results) in zip(axes, found.items()):
        for axis, (scaling, title) in zip(line, SCALINGS.items()):
            for name in NAMES:
                runs = good(results, name).values()
                scores = [[run["found"][key][0] for run in runs] for key in keys(scaling)]
                band(axis, T, scores, **LINES[name], ms=3, label=name)
            axis.set(xscale="log", xticks=T, xticklabels=T, title=f"{task}, RoPE {title}")
            axis.minorticks_off()
        line[0].set_ylabel(f"{TASKS[task]}, nats")
    axes[0][0].legend(frameon=False)
    figure.supxlabel(f"tokens in a window; trained: {TRAINED}")
    return figure


def draw_why(found):
    """The score of BOS and the weight of all other keys over the distance: means over bins, of each seed."""
    from experiments.figures import BLUE, ORANGE, band, plt
    figure, axes = plt.subplots(len(TASKS), len(NAMES), sharex=True, sharey="row", figsize=(8, 4.4))
    edges = np.unique(np.geomspace(1, TRAINED * LONGER[-1], 40).astype(int))
    lines = {"bos": dict(color=ORANGE, ls="-", label="score of BOS"),
             "others": dict(color=BLUE, ls="--", label="log of the sum over all other keys")}
    for row, (task, results) in zip(axes, found.items()):
        for axis, name in zip(row, NAMES):
            for key, line in lines.items():
                scores = [run["on_bos"][key] for run in good(results, name).values()]
                means = [[mean(one[a - 1 : b - 1]) for one in scores] for a, b in zip(edges, edges[1:])]
                band(axis, (edges[1:] + edges[:-1] - 1) / 2, means, **line)
            axis.axvline(TRAINED, color="black", ls=":", lw=0.8)
            axis.set(title=f"{task}: {name}", xscale="log")
        row[0].set_ylabel("score")
    axes[0][0].legend(frameon=False)
    figure.supxlabel("distance from BOS, tokens (dotted: the trained window)")
    figure.suptitle("The head that looks at BOS most: more than half where the solid line is above")
    return figure


NOTE = """
Each cell: what is counted, in the last quarter of the window, and in brackets the first-token share over all
of it; means over the seeds. Loss: nats per token.
"""


def main(argv=None):
    flags, folder, head = runner.begin(__doc__, "long_context", argv)
    rows, lines, found = [], [], {}
    for task in TASKS:
        jobs = runner.plan(recipes_of(task, NAMES, flags.steps), range(flags.seeds or 3), look)
        found[task] = runner.run_all(jobs, flags.jobs)
        more = rows_of(task, found[task])
        rows, lines = rows + more[0], lines + more[1]
    text = markdown("long_context", head, NOTE, lines, {name: (name, "") for name in lines[0]})
    runner.finish(folder, "long_context", rows, text, tasks=lambda: draw_tasks(found),
                  why=lambda: draw_why(found))


if __name__ == "__main__":
    run_main(main)
