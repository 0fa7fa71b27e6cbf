"""
The figures of compare_gates.py, drawn from the files it wrote: TASK.csv, TASK_runs.csv and TASK_figures.json.

What must be told apart is told apart without colour, too: by a panel of its own, by filled and hollow marks,
by shades of grey with the number written in. The colours are Okabe and Ito's, for the colour-blind. All
figures of an experiment go through `save`, which gives them this style.
"""
import json
import math
from functools import partial
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    raise ValueError("the figures need matplotlib: pip install -r experiments/requirements.txt") from None

from experiments.runner import read_csv

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"
LINES = {  # how a variant's line looks, in every picture that shows several of them
    "none": dict(color=ORANGE, ls="-", marker="o"), "g1": dict(color=BLUE, ls="--", marker="s"),
    "g1-headwise": dict(color=GREEN, ls="-.", marker="^"), "sandwich": dict(color=GREY, ls=":", marker="D")}
STYLE = {"font.size": 8, "axes.titlesize": 8, "figure.labelsize": 8, "figure.titlesize": 8,
         "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
         "savefig.dpi": 150}


def save(folder, prefix, figures):
    """Draw {name: function that makes a figure, or None} to folder/prefix_name.png; returns the paths."""
    made = []
    with plt.rc_context(STYLE):
        for name, make in figures.items():
            if (figure := make()) is not None:
                made.append(Path(folder, f"{prefix}_{name}.png"))
                figure.savefig(made[-1])
                plt.close(figure)
    return made


def panels(count, **options):
    """A figure with `count` small panels, and their flat list."""
    columns = min(6, count)
    lines = math.ceil(count / columns)
    size = max(6.5, 1.7 * columns), 1.45 * lines + 0.6
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=size, **options)
    for place in range(count, lines * columns):
        axes.flat[place].set_axis_off()
        axes.flat[place - columns].tick_params(labelbottom=True)  # now the lowest of its column
    return figure, axes.flat[:count]


def draw(folder, task):
    """Draw the figures of a task in `folder`; returns their paths. ValueError if there was no comparison."""
    try:
        rows, curves = (read_csv(Path(folder, f"{task}{end}.csv")) for end in ("", "_runs"))
        content = json.loads(Path(folder, f"{task}_figures.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is not there: python experiments/compare_gates.py --task={task} "
                         "makes it") from None
    rows = {row["variant"]: row for row in rows}
    return save(folder, task, {
        "sink": partial(draw_sink, rows, curves), "share": partial(draw_share, rows, curves),
        "loss": partial(draw_loss, rows), "scores": partial(draw_scores, rows, content["scores"]),
        "maps": partial(draw_maps, content["maps"]), "layers": partial(draw_layers, rows, content["layers"])})


def over_seeds(curves, variant):
    """(steps, means, lowest, highest) of the share over the seeds of a variant."""
    at = {}
    for row in curves:
        if row["variant"] == variant:
            at.setdefault(row["step"], []).append(row["first_token_share"])
    values = at.values()
    return list(at), [sum(v) / len(v) for v in values], list(map(min, values)), list(map(max, values))


def draw_sink(rows, curves):
    """The README's picture: the share as it grows, without a gate and with G1."""
    if not {"none", "g1"} <= {row["variant"] for row in curves}:
        return None
    figure, axis = plt.subplots(figsize=(6, 2.8))
    labels = [(rows["none"]["floor"], "uniform", "black")]
    for name, label, color, line in (("none", "no gate", ORANGE, "-"), ("g1", "G1 gate", BLUE, "--")):
        steps, mean, low, high = over_seeds(curves, name)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        axis.plot(steps, mean, line, color=color, lw=2)
        labels.append((mean[-1], label, color))
    axis.axhline(rows["none"]["floor"], color="black", ls=":", lw=1)
    place = -1.0  # of the label below: the next one keeps clear of it
    for value, label, color in sorted(labels):
        place = max(value, place + 0.07)
        axis.annotate(f"{label}: {value:.2f}", (steps[-1], place), (6, 0), textcoords="offset points",
                      va="center", color=color, annotation_clip=False)
    axis.set(xlabel="training steps", ylabel="attention on the first token", ylim=(0, 1), xlim=(0, steps[-1]))
    return figure


def draw_share(rows, curves):
    """First-token share as it grows, a panel for each variant."""
    shown = [name for name in rows if any(row["variant"] == name for row in curves)]
    if not shown:  # all diverged before the first evaluation
        return None
    figure, axes = panels(len(shown), sharex=True, sharey=True)
    for axis, name in zip(axes, shown):
        row, (steps, mean, low, high) = rows[name], over_seeds(curves, name)
        if name != row["pair"] in shown:
            axis.plot(*over_seeds(curves, row["pair"])[:2], color=GREY, lw=0.8)
        axis.axhline(row["floor"], color="black", ls=":", lw=0.8)
        axis.fill_between(steps, low, high, color=BLUE, alpha=0.25, lw=0)
        axis.plot(steps, mean, color=BLUE, lw=1.6)
        axis.plot(max(steps), row["paper_share"], "D", color=ORANGE, ms=4, clip_on=False, zorder=3)  # or nan
        axis.set_title(f"{name}: {mean[-1]:.3f}", fontweight="bold" if name == row["pair"] else None)
        axis.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("steps")
    figure.supylabel("first-token share")
    figure.suptitle("Attention on the first token. Line: mean over seeds; band: all seeds; grey: baseline; "
                    "dotted: uniform attention;\ndiamond: the paper's model, where it reports one")
    return figure


def draw_loss(rows):
    """Differences in loss to the baseline beside the paper's in perplexity."""
    rows = {name: row for name, row in rows.items() if name != row["pair"]}
    if not rows:
        return None
    names = [name if row["pair"] == "none" else f"{name} (to {row['pair']})" for name, row in rows.items()]
    figure, (here, paper) = plt.subplots(1, 2, sharey=True, figsize=(8, 0.21 * len(rows) + 1.2))
    for y, row in enumerate(rows.values()):
        error = 0 if math.isnan(row["difference_se"]) else 2 * row["difference_se"]
        here.errorbar(row["difference"], y, xerr=error, fmt="o", color=BLUE, capsize=2, ms=5,
                      mfc="white" if row["noise"] else BLUE)
        if row["paper_difference"] < -1:  # the sandwich norm, whose baseline nearly fails: far outside
            paper.annotate(f"{row['paper_difference']:+.2f}", (0, y), (0.12, y), ("axes fraction", "data"),
                           va="center", arrowprops={"arrowstyle": "->", "color": ORANGE})
        else:
            paper.plot(row["paper_difference"], y, "D", color=ORANGE, ms=5)
    here.set(xlabel="difference in val loss (nats per token)", yticks=range(len(names)), yticklabels=names,
             title="here: mean ± 2 standard errors; hollow: seed noise", ylim=(len(names) - 0.5, -0.5))
    paper.set(xlabel="difference in perplexity", title="the paper")
    for axis in (here, paper):
        axis.axvline(0, color="black", lw=0.8)
        axis.grid(axis="y", color="0.9", lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=6)
    return figure


def draw_scores(rows, scores):
    """Histograms of the gate scores, a panel for each variant that has a gate."""
    if not scores:
        return None
    figure, axes = panels(len(scores), sharey=True)
    for axis, (name, score) in zip(axes, scores.items()):
        (low, high), bins = score["limits"], len(score["fraction"])
        width, row = (high - low) / bins, rows[name]
        axis.bar([low + (i + 0.5) * width for i in range(bins)], score["fraction"], width, color=BLUE)
        axis.axvline(row["gate_score"], color="black", lw=0.8)
        axis.plot(row["paper_gate_score"], 0.9, "D", color=ORANGE, ms=4, transform=axis.get_xaxis_transform())
        axis.set(xlim=(low - 2 * width, high + 2 * width), title=f"{name}: {row['gate_score']:.3f}")
    figure.supxlabel("gate score")
    figure.supylabel("fraction of scores")
    figure.suptitle("Gate scores on validation data. Black line and number: mean; diamond: the paper's mean")
    return figure


def draw_maps(maps):
    """Attention on the same text without and with the gate."""
    if maps is None:
        return None
    tokens = [repr(token)[1:-1].replace(" ", "·") for token in maps["tokens"]]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.9))
    for axis, name, title in zip(axes, ("none", "g1"), ("no gate", "G1 gate")):
        image = axis.imshow(maps[name], cmap="Greys", vmin=0, vmax=1)
        axis.set_title(f"{title}: {sum(row[0] for row in maps[name]) / len(tokens):.2f} on the first token")
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6)
        axis.set_yticks(range(len(tokens)), tokens, fontsize=6)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(True)
        axis.set_xlabel("key: the token looked at")
    axes[0].set_ylabel("query: the token that looks")
    figure.colorbar(image, ax=axes, label=f"attention in layer {maps['layer']}, mean over heads", shrink=0.8)
    return figure


def draw_layers(rows, layers):
    """The share of each layer, over all queries and over late ones, the numbers written in."""
    if not layers:
        return None
    first, depth = next(iter(rows.values())), len(next(iter(layers.values()))["all"])
    size = max(6, 2.6 + 0.9 * depth), max(2.6, 0.21 * len(layers) + 1.2)
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=size)
    for axis, which, floor, title in ((axes[0], "all", "floor", "all queries"),
                                      (axes[1], "late", "late_floor", "queries t $\\geq$ T/4")):
        values = [layers[name][which] for name in layers]
        image = axis.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=6.5,
                          color="white" if value > 0.5 else "black")
        axis.set(title=f"{title}\n(uniform attention: {first[floor]:.3f})", xlabel="layer",
                 xticks=range(depth), yticks=range(len(layers)), yticklabels=list(layers))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="first-token share, mean over seeds")
    return figure
