"""
What makes an attention sink on real text? The laptop preset without a gate, one thing changed at a time.

    python experiments/sink_on_text.py --jobs=2     51 runs, 1.5 hours
    python experiments/sink_on_text.py --seeds=1 --steps=100    a trial

First optimizer x QK-norm x weight decay (none, 0.1, the preset's), three seeds. Then widths, each with four
learning rates, and the best of them with a window twice as long; one seed.
Reading order: causes, widths -> draw -> main.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from experiments import runner
from experiments.tables import MEASURED, NOTE, markdown, measured
from experiments.variants import values_of
from plumbing.flags import run_main
from train import PRESETS, make_configs

OPTIMIZERS, SWITCHES, DECAYS = ("adamw", "muon"), ("on", "off"), (0.0, 0.1, PRESETS["laptop"]["weight_decay"])
WIDTHS, RATES = (32, 64, 128), (0.002, 0.004, 0.008, 0.016)  # heads have 32 channels; the preset: 64 and .008


def causes(steps=None):
    """{(optimizer, QK-norm, weight decay): (GPTConfig, TrainConfig)}"""
    return {(optimizer, switch, decay): make_configs(values_of(
        "text", steps, optimizer=optimizer, qk_norm=switch == "on", weight_decay=decay))
        for optimizer, switch, decay in itertools.product(OPTIMIZERS, SWITCHES, DECAYS)}


def widths(pairs, T, steps=None):
    """{(width, learning rate, T): (GPTConfig, TrainConfig)} of these pairs of width and rate."""
    return {(width, rate, T): make_configs(values_of(
        "text", steps, n_embd=width, n_head=width // 32, learning_rate=rate, block_size=T))
        for width, rate in pairs}


def draw(results):
    """The share over the steps: a panel for each optimizer and QK-norm, a line for each weight decay."""
    from experiments.figures import BLUE, GREY, ORANGE, grow, plt
    figure, axes = plt.subplots(1, 4, sharey=True, figsize=(9, 2.6))
    for axis, (optimizer, switch) in zip(axes, itertools.product(OPTIMIZERS, SWITCHES)):
        for decay, color, line in zip(DECAYS, (GREY, BLUE, ORANGE), (":", "--", "-")):
            runs = [run for (name, _), run in results.items() if name == (optimizer, switch, decay)]
            grow(axis, runs, color=color, ls=line, label=f"weight decay {decay:g}")
        axis.set(title=f"{optimizer}, QK-norm {switch}", xlabel="steps")
    axes[0].set(ylabel="first-token share", ylim=(0, None))  # now that all is drawn: they share it
    axes[0].legend(frameon=False, loc="upper left")
    figure.suptitle("Mean and range of the seeds; thin line: uniform attention")
    return figure


CAUSES = {"optimizer": ("optimizer", ""), "qk_norm": ("QK-norm", ""), "weight_decay": ("weight decay", "g")}
SIZES = {"width": ("width", "d"), "learning_rate": ("rate", "g"), "T": ("T", "d")}
OTHERS = """
Gu and others (ICLR 2025, arXiv 2410.10781) trained 60M parameters with AdamW, and counted the heads whose
mean attention on the first token is above 0.3. They found more of them with a larger learning rate (32% at
8e-4, 3% at 1e-4), with weight decay (most, 41%, at 0.5), with more steps, and with enough different text. The
paper's models (1.7B and 15B parameters) have sinks with AdamW and QK-norm. All of these are far larger than
the models here, and train for far longer.
"""


def main(argv=None):
    flags, folder, head = runner.begin(__doc__, "sink_on_text", argv, seeds="3; for the widths 1")

    def run(recipes, seeds, columns):
        results = runner.run_all(runner.plan(recipes, range(seeds)), flags.jobs)
        return results, [dict(zip(columns, name)) | measured(results, name, config)
                         for name, (config, _) in recipes.items()]

    results, rows = run(causes(flags.steps), flags.seeds or 3, CAUSES)
    text = markdown("sink_on_text: causes", head, NOTE + OTHERS, rows, CAUSES | MEASURED)
    runner.finish(folder, "sink_on_text", rows, text, share=lambda: draw(results))

    pairs = list(itertools.product(WIDTHS, RATES))
    _, rows = run(widths(pairs, 64, flags.steps), flags.seeds or 1, SIZES)
    share = dict(zip(pairs, (row["share"] for row in rows)))
    best = [(width, max(RATES, key=lambda rate: share[width, rate])) for width in WIDTHS]
    rows += run(widths(best, 128, flags.steps), flags.seeds or 1, SIZES)[1]
    text = markdown("sink_on_text: width, rate and window", head, NOTE, rows, SIZES | MEASURED)
    runner.finish(folder, "sink_on_text_width", rows, text)


if __name__ == "__main__":
    run_main(main)
