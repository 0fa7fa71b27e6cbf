"""
The moving pictures: attention while a model trains, without a gate and with G1, and the share as it grows.

    python experiments/movie.py                   experiments/results/sink.gif
    python experiments/movie.py --preset=laptop   text_sink.gif, on real text

Of several layers, the one with the strongest sink is shown.
Reading order: text_of -> maps_of -> frames_of -> draw -> main.
"""
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data import prepare
from data.tokenizers import get_tokenizer, labels
from experiments import runner
from gated_gpt import attention_maps, uniform_share
from plumbing import checkpoint
from plumbing.flags import parser_of, run_main
from plumbing.report import show_map

EVERY = 100  # steps from frame to frame
LOOK = 28  # tokens in a map
HOLD = 12  # frames for which the last one stays
GATES = {"none": "no gate", "g1": "G1 gate"}
NAMES = {"sink": "sink", "laptop": "text_sink"}  # preset: its picture


def text_of(data, block_size):
    """(BOS and a text from the validation data (1, t), its names): t is LOOK, or block_size if that is less.

    Of backcopy, one with many triggers.
    """
    meta, tokens = prepare.load(data)
    windows = train.Windows(tokens["val"], meta["bos"], min(LOOK, block_size), torch.device("cpu"))
    many, _ = windows.at(windows.spaced(500))
    whole = (many[:, 1:] != meta["bos"]).all(1)
    many = many[whole] if whole.any() else many  # (N, t), of one text each, unless all texts are short
    chosen = len(many) // 2
    if data == "backcopy":
        triggers = torch.isin(many, torch.tensor(list(prepare.TRIGGERS.encode())))  # (N, t)
        alone = triggers[:, 1:] & ~triggers[:, :-1]
        chosen = (2 * alone.sum(1) - triggers.sum(1)).argmax()
    return many[chosen, None], labels(many[chosen].tolist(), get_tokenizer(meta["tokenizer"]), meta["bos"])


def maps_of(model, text):
    """Where each token of a text (1, t) looks: (t, t) of each layer, means over its heads."""
    return [layer[0].mean(-1).numpy() for layer in attention_maps(model, text)]


def frames_of(config, c, folder):
    """[(maps_of a text, the layers' shares on validation data)] of each evaluation."""
    text, last, frames = text_of(c.data, config.block_size)[0], folder / "last.pt", []
    shutil.rmtree(folder, ignore_errors=True)

    def look(line):  # train.train says a line after each checkpoint, and a few before the first
        if last.exists():
            model, saved = checkpoint.load(last)
            if len(frames) < len(saved["log"]):
                shares = [layer["first_token_share"] for layer in saved["log"][-1]["layers"]]
                frames.append((maps_of(model, text), shares))

    train.train(config, c, look)
    return frames


def draw(frames, c, T, path):
    """Write {gate: what frames_of returned} as a GIF, 720 pixels wide; the last frame stays longer."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    from experiments.figures import LINES, plt
    names, at_the_end = text_of(c.data, T)[1], frames["none"][-1][1]
    layer = at_the_end.index(max(at_the_end))
    steps = [EVERY * (i + 1) for i in range(len(frames["none"]))]
    figure, axes = plt.subplot_mosaic([list(GATES), ["share"] * 2], figsize=(7.2, 5.6),
                                      height_ratios=(3.4, 1.3))
    images, lines = {}, {}
    for gate in GATES:
        images[gate] = show_map(axes[gate], frames[gate][0][0][layer], names)
        axes[gate].set(xlabel="the token looked at", ylabel="the token that looks")
        lines[gate], = axes["share"].plot([], [], color=LINES[gate]["color"], lw=2)  # as the map's title
    axes["share"].axhline(uniform_share(T), color="black", ls=":", lw=1)
    axes["share"].set(xlim=(0, steps[-1]), ylim=(0, 1), ylabel=f"share in layer {layer}",
                      xlabel="training steps (dotted: uniform attention)")

    def show(i):
        for gate, title in GATES.items():
            images[gate].set_data(frames[gate][i][0][layer])
            grown = [shares[layer] for _, shares in frames[gate][: i + 1]]
            lines[gate].set_data(steps[: i + 1], grown)
            axes[gate].set_title(f"{title}: {grown[-1]:.2f} on the first token", fontsize=10,
                                 color=LINES[gate]["color"])

    order = [*range(len(steps)), *[len(steps) - 1] * HOLD]
    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, show, order).save(path, PillowWriter(fps=5), dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = parser_of(__doc__, "movie.py", "[--flag=value ...]")
    parser.add_argument("--preset", choices=NAMES, default="sink", help="what is trained [%(default)s]")
    parser.add_argument("--results", type=Path, default=runner.RESULTS, help="folder [experiments/results]")
    flags = parser.parse_args(argv)
    from experiments import figures  # here: without matplotlib it stops before the training, not after it
    path, frames = flags.results / f"{NAMES[flags.preset]}.gif", {}
    for gate in GATES:
        folder = Path("out/movie", f"{flags.preset}-{gate}")
        config, c = train.make_configs(train.PRESETS[flags.preset] | dict(
            gate=gate, eval_every=EVERY, out=str(folder), threads=1))
        frames[gate] = frames_of(config, c, folder)
    with figures.plt.rc_context(figures.STYLE):
        draw(frames, c, config.block_size, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
