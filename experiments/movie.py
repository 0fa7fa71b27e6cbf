"""
The moving picture of the README: the attention of the sink preset's model while it trains, without a gate and
with G1, and how the first-token share grows.

    python experiments/movie.py  two runs, then experiments/results/sink.gif

A run is stopped for each frame and goes on from its checkpoint, which changes no bit of it.
Reading order: frames_of -> draw -> main.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from data.tokenizers import bytes_of, get_tokenizer
from experiments import runner
from gated_gpt import GPT, attention_maps, measure, uniform_share
from plumbing.flags import run_main

STEPS = [0, *range(100, 3001, 100)]  # of the frames
LOOK = 28  # tokens in a map
HOLD = 12  # frames for which the last one stays
GATES = {"none": "no gate", "g1": "G1 gate"}


def text_of():
    """(1, LOOK): BOS and a text with triggers, from the validation data."""
    meta, tokens = prepare.load("backcopy")
    windows = train.Windows(tokens["val"], meta["bos"], LOOK, torch.device("cpu"))
    many, _ = windows.at(windows.spaced(500))
    triggers = torch.isin(many, torch.tensor(list(prepare.TRIGGERS.encode())))  # (500, LOOK)
    alone = triggers[:, 1:] & ~triggers[:, :-1]
    return many[(2 * alone.sum(1) - triggers.sum(1)).argmax(), None]


def frames_of(gate, seed, folder):
    """[(map, share)] for each of STEPS: T x T probabilities of the text, and the share on validation data."""
    text, frames = text_of(), []
    for step in STEPS:
        config, c = train.make_configs(train.PRESETS["sink"] | dict(
            gate=gate, seed=seed, max_steps=max(1, step), eval_every=10**6, out=str(folder / gate), threads=1,
            resume=step > STEPS[1], overwrite=step == STEPS[1]))
        if step == 0:
            config, *_, val_set = train.open_data(config, c, torch.device("cpu"))
            torch.manual_seed(seed)
            model = GPT(config)
            idx, _ = val_set.at(val_set.spaced(train.MEASURE_WINDOWS))
            share = measure(model, idx)[0]["first_token_share"]
        else:
            model, log = train.train(config, c, say=lambda text: None)
            share = log[-1]["first_token_share"]
        frames.append((attention_maps(model, text)[0][0].mean(-1).numpy(), share))
    return frames


def draw(frames, path):
    """Write the frames {gate: [(map, share)]} as a GIF, 720 pixels wide; the last one stays for a while."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    from experiments.figures import BLUE, ORANGE, plt
    colors, tokens = dict(none=ORANGE, g1=BLUE), get_tokenizer("bytes")
    names = ["BOS", *(bytes_of(token, tokens).decode() for token in text_of()[0, 1:].tolist())]
    figure, axes = plt.subplot_mosaic([list(GATES), ["share"] * 2], figsize=(7.2, 5.6),
                                      height_ratios=(3.4, 1.3))
    images, lines, titles = {}, {}, {}
    for gate, title in GATES.items():
        images[gate] = axes[gate].imshow(frames[gate][0][0], cmap="Greys", vmin=0, vmax=1)
        axes[gate].set_xticks(range(len(names)), names, fontsize=6, rotation=90)
        axes[gate].set_yticks(range(len(names)), names, fontsize=6)
        axes[gate].tick_params(length=0)
        axes[gate].set_xlabel("the token looked at")
        titles[gate] = axes[gate].set_title(title, fontsize=10, color=colors[gate])
        lines[gate], = axes["share"].plot([], [], color=colors[gate], lw=2, label=title)
    axes["none"].set_ylabel("the token that looks")
    axes["share"].axhline(uniform_share(train.PRESETS["sink"]["block_size"]), color="black", ls=":", lw=1)
    axes["share"].set(xlim=(0, STEPS[-1]), ylim=(0, 1), ylabel="first-token share",
                      xlabel="training steps (dotted: uniform attention)")
    axes["share"].legend(frameon=False, loc="center right")

    def show(i):
        for gate, title in GATES.items():
            images[gate].set_data(frames[gate][i][0])
            shares = [share for _, share in frames[gate][: i + 1]]
            lines[gate].set_data(STEPS[: i + 1], shares)
            titles[gate].set_text(f"{title}: {shares[-1]:.2f} on the first token")

    order = [*range(len(STEPS)), *[len(STEPS) - 1] * HOLD]
    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, show, order).save(path, PillowWriter(fps=5), dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = runner.parser_of(__doc__, "movie.py", "[--flag=value ...]")
    parser.add_argument("--seed", type=int, default=0, help="of both runs [%(default)s]")
    parser.add_argument("--results", type=Path, default=runner.RESULTS, help="folder [experiments/results]")
    flags = parser.parse_args(argv)
    from experiments import figures  # here: without matplotlib it stops before the training, not after it
    path = flags.results / "sink.gif"
    frames = {gate: frames_of(gate, flags.seed, Path("out/movie")) for gate in GATES}
    with figures.plt.rc_context(figures.STYLE):
        draw(frames, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
