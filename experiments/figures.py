"""
How the experiments draw: their style, lines that several pictures have, and the pictures of compare_gates.py.

What must be told apart is told apart without colour, too: by a panel of its own, by filled and hollow marks,
by dashes. The colours are Okabe and Ito's, for the colour-blind.
"""
import math
import statistics
import warnings
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    raise ValueError("the figures need matplotlib: pip install -r experiments/requirements.txt") from None

from experiments.tables import good, late_shares
from gated_gpt import uniform_share
from plumbing.report import show_map

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"
LINES = {  # how a variant's line looks, in every picture that shows several of them
    "none": dict(color=ORANGE, ls="-", marker="o"), "g1": dict(color=BLUE, ls="--", marker="s"),
    "g1-headwise": dict(color=GREEN, ls="-.", marker="^"), "sandwich": dict(color=GREY, ls=":", marker="D")}
STYLE = {"font.size": 8, "axes.titlesize": 8, "figure.labelsize": 8, "figure.titlesize": 8,
         "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
         "savefig.dpi": 150}


def save(folder, prefix, figures):
    """Draw {name: function that makes a figure, or None} to folder/prefix_name.png; returns the paths.

    An older picture of that name goes, also where nothing is drawn now.
    """
    made = []
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that the font lacks is a box
        for name, make in figures.items():
            path = Path(folder, f"{prefix}_{name}.png")
            path.unlink(missing_ok=True)
            if (figure := make()) is not None:
                figure.savefig(path)
                plt.close(figure)
                made.append(path)
    return made


def band(axis, x, values, **line):
    """A line through the means of `values`, for each x those of the seeds, and a band for their range."""
    x, means, low, high = zip(*((at, statistics.fmean(found), min(found), max(found))
                                for at, found in zip(x, values) if found))
    axis.plot(x, means, **line)
    axis.fill_between(x, low, high, color=line["color"], alpha=0.2, lw=0)


def grow(axis, runs, start=0, **line):
    """The first-token share of these runs over the steps, from step `start` on; a thin line: the floor."""
    shares = {}
    for row in [row for run in runs for row in run["log"]]:
        shares.setdefault(start + row["step"], []).append(row["first_token_share"])
        floor = row["uniform_share"]
    if shares:
        axis.axhline(floor, color="black", lw=0.5)
        least = min(2, max(map(len, shares.values())))  # a run that was stopped has a row of its own there
        band(axis, *zip(*sorted(item for item in shares.items() if len(item[1]) >= least)), **line)


def draw_share(rows, results):
    """First-token share as it grows, a panel for each variant. rows: {variant: row of the csv}"""
    steps = max((row["step"] for run in results.values() for row in run["log"]), default=None)
    if steps is None:  # all diverged before the first evaluation
        return None
    columns = min(6, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharex=True, sharey=True,
                                figsize=(max(6.5, 1.7 * columns), 1.45 * lines + 0.6))
    for place in range(len(rows), lines * columns):
        axes.flat[place].set_axis_off()
        axes.flat[place - columns].tick_params(labelbottom=True)  # now the lowest of its column
    for axis, (name, row) in zip(axes.flat, rows.items()):
        for wanted, line in ((row["pair"], dict(color=GREY, lw=0.8)), (name, dict(color=BLUE, lw=1.6))):
            grow(axis, [run for (other, _), run in results.items() if other == wanted], **line)
        axis.plot(steps, row["paper_share"], "D", color=ORANGE, ms=4, clip_on=False, zorder=3)  # or nan
        axis.set_title(f"{name}: {row['share']:.3f}", fontweight="bold" if name == row["pair"] else None)
    axes[0][0].set_ylim(0, None)
    figure.supxlabel("steps")
    figure.supylabel("first-token share")
    figure.suptitle("Attention on the first token. Line, band: mean and range of the seeds; grey: baseline;\n"
                    "thin line: uniform attention; diamond: the paper's model, where it reports one")
    return figure


def draw_loss(rows):
    """Differences in loss to the baseline beside the paper's: log of the perplexity, so nats in both."""
    rows = [row for name, row in rows.items() if name != row["pair"]]
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 0.21 * len(rows) + 1.2))
    here = [(row["difference"], 2 * row["difference_se"], row["noise"]) for row in rows]
    paper = [(-math.log1p(-row["paper_difference"] / row["paper_ppl"]), math.nan, "") for row in rows]
    for axis, found, marker, color in zip(axes, (here, paper), "oD", (BLUE, ORANGE)):
        # A few are far outside: an arrow with the number says so. The zeros of both panels are in the middle.
        sizes = [abs(value) for value, *_ in found if value == value] or [1.0]
        limit = 1.5 * max(size for size in sizes if size <= 4 * statistics.median(sizes)) or 1.0
        for y, (value, error, noise) in enumerate(found):
            if abs(value) > limit:
                end = math.copysign(limit, value)
                axis.annotate(f"{value:+.2g}", (end, y), (0.72 * end, y), va="center", ha="center",
                              arrowprops={"arrowstyle": "->", "color": color})
            else:
                axis.errorbar(value, y, xerr=error, fmt=marker, color=color, ms=5, capsize=2,
                              mfc="white" if noise else color)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(xlim=(-limit, limit), xlabel="difference in loss, nats per token")
        axis.grid(axis="y", color="0.9", lw=0.6)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=4)
    names = [row["variant"] + ", against moe" * (row["pair"] == "moe") for row in rows]
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5),
                title="here: mean ± 2 standard errors; hollow: seed noise")
    axes[1].set_title("the paper: the log of its perplexities' ratio")
    return figure


def draw_maps(results, names, maps_of):
    """Attention on one text without and with the gate, in the layer of the baseline's strongest sink.

    names: its T tokens; maps_of(variant): a map T x T for each layer, of the run with seed 0.
    """
    if not all(0 in good(results, name) for name in ("none", "g1")):
        return None
    late = late_shares(results["none", 0]["log"][-1])
    layer = late.index(max(late))
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.9))
    for axis, (name, title) in zip(axes, {"none": "no gate", "g1": "G1 gate"}.items()):
        weights = maps_of(name)[layer]
        image = show_map(axis, weights, names)
        axis.set(xlabel="the token looked at", ylabel="the token that looks")
        axis.set_title(f"{title}: {weights[:, 0].mean():.2f} on BOS "
                       f"(uniform attention: {uniform_share(len(names)):.2f})")
    figure.colorbar(image, ax=axes, label=f"attention in layer {layer}, mean over heads", shrink=0.8,
                    ticks=(0, 0.01, 0.1, 0.3, 0.6, 1))
    return figure
