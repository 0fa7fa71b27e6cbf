"""
A real language model: its sink, what happens without it, and a gate in its place.

    python experiments/real_model.py                SmolLM2, 135M parameters
    python experiments/real_model.py --distill=40   and the gate, trained
    python experiments/real_model.py --model=FOLDER

Five minutes on two cores, and ten more to train the gate. SmolLM2-135M-Instruct comes inside a Python
package: 93 MB, weights of 4 bits, no account. Its full weights are on the hub: `hf download
HuggingFaceTB/SmolLM2-135M-Instruct --local-dir out/full`, then --model=out/full. So are other Llamas, Qwen3,
and the paper's three models, of which this code has not seen the weights.

How the sink is taken away, and why a gate can take its place, is in sink_gate.py: read that first.
Reading order: windows -> layers_of -> all_losses -> main -> the tables -> the pictures.
"""
import importlib.util
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from data import prepare
from data.tokenizers import front_ids, get_tokenizer, labels
from experiments import runner, smollm2
from experiments.sink_gate import TRUE, Fit, bar, distill, early, far_from, look, losses, masked
from experiments.tables import markdown, mean, write_csv
from gated_gpt import attention_maps, evaluating, uniform_share
from plumbing.flags import parser_of, run_main
from plumbing.machine import choose_device, choose_threads
from plumbing.released import load_released
from plumbing.report import show_map
from sample import measure_blocks
from train import TrainConfig

T = 512  # tokens in a window
LATE = 128  # losses are those of the tokens from here on; also the width of the sliding window
TEST, FITS, EACH = 3, 5, 5  # of each kind of text: windows for tests, disjoint fits, windows in a fit
NEEDS = "gguf", "matplotlib", "safetensors", "tokenizers"
SINK, HIDDEN = "with its sink", "first token hidden"
STREAM, SLIDE = f"last {LATE} tokens and the first", f"last {LATE} tokens"  # as in arXiv 2309.17453
GATES = [f"a gate, fit {i + 1}" for i in range(FITS)]
SENTENCE = "The cat sat on the mat because it was tired, and the dog lay down beside it."


def windows(folder):
    """{kind: (TEST + FITS * EACH, T)} tokens of three kinds of text that are on every machine."""
    from pydoc_data.topics import topics  # what help("for") prints
    notes = [runner.ROOT / name for name in ("README.md", "experiments/README.md", "exercises.md")]
    texts = {"code": prepare.stdlib_split()["val"], "manual": topics.values(),
             "notes": [path.read_text(encoding="utf-8") for path in notes]}
    front, made = torch.tensor(front_ids(folder), dtype=torch.long), {}  # a BOS, if the tokenizer puts one
    rows, size = TEST + FITS * EACH, T - len(front)
    for kind, parts in texts.items():
        tokens = torch.tensor(get_tokenizer(folder).encode_ordinary("".join(parts))[:rows * size])
        if len(tokens) < rows * size:
            raise ValueError(f"the {kind} have {len(tokens):,} tokens, but {rows} windows of {T} are needed")
        made[kind] = torch.cat((front.expand(rows, -1), tokens.view(rows, size)), dim=1)
    return made


# ---- the questions ---------------------------------------------------------------------------------


def layers_of(model, tests, held_out):
    """a, b: how large the sink is, and what lies in it. A row for each layer: the share in each kind of text,
    the largest activation, its token and channel in one window, and the lengths of values.
    """
    rows, places = [{"layer": i} for i in range(len(model.blocks))], []
    for kind, idx in tests.items():
        for row, found in zip(rows, measure_blocks(model, bar(idx, f"share, {kind}"))):
            row |= {kind: found["first_token_share"], f"late_{kind}": found["late_first_token_share"],
                    f"head_{kind}": max(found["first_token_share_by_head"]),
                    f"activation_{kind}": found["max_activation"]}

    def on_block(block, inputs, x):
        places.append(divmod(x[0].abs().argmax().item(), x.size(-1)))

    with evaluating(model, [(block, on_block) for block in model.blocks]), torch.no_grad():
        model(idx[:1])
    for row, (token, channel), (*_, length) in zip(rows, places, held_out):
        row |= {"activation": max(row[f"activation_{kind}"] for kind in tests), "token": token,
                "channel": channel, "first token's": length[:, 0].mean().item(),
                "others'": length[:, 1:].mean().item()}
    return rows


def all_losses(model, texts, tests, held_out):
    """c, d: without the sink, and with a gate in its place. ({what: {kind: losses}}, for each fit the R2 of
    every layer's score on the test windows).
    """
    found, explained = {}, []

    def run(what, edit):
        found[what] = {kind: losses(model, idx, f"{what}, {kind}", edit) for kind, idx in tests.items()}

    run(SINK, None)
    run(STREAM, masked(first=True, window=LATE))
    run(SLIDE, masked(first=False, window=LATE))
    run(HIDDEN, masked(first=False))
    parts = {"true score and v0": TRUE}
    for i, what in enumerate(GATES):
        rows = slice(TEST + i * EACH, TEST + (i + 1) * EACH)  # no window is in two fits
        seen = look(model, torch.cat([idx[rows] for idx in texts.values()]), f"{what}: looking")
        fit = Fit(model, seen)
        explained.append(fit.explained(held_out))
        run(what, fit.edit())
        if i == 0:
            parts |= {"score of fit 1 alone": fit.edit(v0=False), "v0 of fit 1 alone": fit.edit(score=False),
                      "constant score and v0": Fit(model, seen, sees=False).edit()}
    for what, edit in parts.items():
        run(what, edit)
    return found, explained


def distilled(model, texts, tests, steps):
    """e: the first fit, and a control whose scores do not see x, before and after training them."""
    first = torch.cat([idx[TEST:TEST + EACH] for idx in texts.values()])
    pool = torch.cat([idx[TEST:] for idx in texts.values()])
    seen, rows = look(model, first, "fit 1: looking"), []
    fits = [Fit(model, seen), Fit(model, seen, sees=False)]
    for step in (0, steps):
        if step:
            distill(model, fits, pool, steps)
        for kind, idx in tests.items():
            for name, (loss, far) in zip(("sees x", "does not"), far_from(model, fits, idx, LATE, kind)):
                rows.append({"score": name, "steps": step, "text": kind, "loss": loss, "kl": far})
    return sorted(rows, key=lambda row: row["score"], reverse=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(__doc__, "real_model.py", "[--flag=value ...]")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Llama or Qwen3 model [SmolLM2]")
    parser.add_argument("--distill", type=runner.positive, metavar="STEPS", help="train the gate, too")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, mps [%(default)s]")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="for tables and pictures "
                        "[experiments/results for SmolLM2, else out/real_model]")
    flags = parser.parse_args(argv)
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ValueError(f"a real model needs a few more packages: pip install {' '.join(missing)}")
    folder = flags.model or smollm2.fetch(Path("out", "smollm2"))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: --model takes the folder of a Llama or Qwen3 model")
    results = flags.results or (Path("out", "real_model") if flags.model else runner.RESULTS)
    device = choose_device(flags.device, print)
    torch.set_num_threads(threads := choose_threads(None, print))
    model = load_released(folder, T).float().to(device)
    texts = {kind: idx.to(device) for kind, idx in windows(str(folder)).items()}
    tests = {kind: idx[:TEST] for kind, idx in texts.items()}
    head = runner.head("real_model.py", argv, TrainConfig(device=flags.device, threads=threads), 1) | {
        "model": f"{folder.name}, {model.num_params():,} parameters, in float32",
        "texts": f"of Python {platform.python_version()} and this repository; measured on {TEST} windows of "
                 f"{T} tokens of each kind, on which nothing was fitted"}

    held_out = look(model, torch.cat([*tests.values()]), "test windows: looking")
    layers = layers_of(model, tests, held_out)
    found, explained = all_losses(model, texts, tests, held_out)
    for row, *r2 in zip(layers, *explained):
        row["R2"] = mean(r2)
    for what, key, of in (("share, mean of layers", "", mean), ("late share, mean of layers", "late_", mean),
                          ("largest share of a head", "head_", max)):
        head[what] = ", ".join(f"{kind} {of(row[key + kind] for row in layers):.3f}" for kind in tests)
    rows = loss_rows(found)
    write_csv(results / "real_model_layers.csv", layers)
    text = (markdown("A real language model", head, LAYER_NOTE, layers, LAYERS) + "\n"
            + markdown("Without its sink", {}, LOSS_NOTE, rows, LOSSES))
    runner.finish(results, "real_model", rows, text, layers=lambda: draw_layers(layers, list(tests)),
                  sink=lambda: draw_sink(model, get_tokenizer(str(folder)), found, rows))
    if flags.distill:
        rows = distilled(model, texts, tests, flags.distill)
        text = markdown("The gate, trained", head, DISTILL_NOTE, rows, DISTILL)
        runner.finish(results, "real_model_distill", rows, text)


# ---- the tables ------------------------------------------------------------------------------------

KINDS = {kind: (kind, ".3f") for kind in ("code", "manual", "notes")}
LAYERS = {"layer": ("layer", "d"), **KINDS, "activation": ("max abs x", ",.0f"), "token": ("token", "d"),
          "channel": ("channel", "d"), "first token's": ("v0", ".1f"), "others'": ("v", ".1f"),
          "R2": ("R2", ".2f")}
LAYER_NOTE = f"""
First-token share (uniform attention: {uniform_share(T):.3f}; late: queries t >= T/4) in three kinds of text:
the source of Python's standard library, what help() prints, and this repository's README and exercises.
Largest activation, its token and channel; length of the first token's value, and of others; R2 of the score
that is fitted below.
"""
LOSSES = {"what": ("loss", ""), **KINDS}
LOSS_NOTE = f"""
Loss in nats, of tokens from {LATE} on. The first token is hidden from all queries from {early(T)} on. A gate:
sigmoid(x W) for the score, fitted in each layer to {3 * EACH} other windows, and the mean first value v0
(sink_gate.py says why); five disjoint fits. With the true score and v0 the loss of the first row must come
back. Undone: what part of the damage of hiding the first token the fits undo.
"""
DISTILL = {"score": ("score", ""), "steps": ("steps", "d"), "text": ("text", ""), "loss": ("loss", ".3f"),
           "kl": ("KL", ".3f")}
DISTILL_NOTE = """
The first fit, W and v0 alone, trained to give the distribution that the model has with its sink: loss, and KL
to it, on the test windows. A score that sees x, and as a control one that does not.
"""


def late(loss):
    """The mean loss of the tokens from LATE on."""
    return loss[:, LATE - 1:].mean().item()


def loss_rows(found):
    """A row of the table for each way to run the model, and what part of the damage the gates undo."""
    rows = [{"what": what} | {kind: late(loss) for kind, loss in of.items()} for what, of in found.items()]
    at = {row["what"]: row for row in rows}
    undone = {kind: [(at[HIDDEN][kind] - at[gate][kind]) / (at[HIDDEN][kind] - at[SINK][kind])
                     for gate in GATES] for kind in found[SINK]}
    return rows + [{"what": f"undone, {name}"} | {kind: of(parts) for kind, parts in undone.items()}
                   for name, of in (("mean", mean), ("lowest", min), ("highest", max))]


# ---- the pictures ----------------------------------------------------------------------------------


def draw_layers(layers, kinds):
    """Share, largest activation, lengths of values, and how well the score is fitted, over the layers."""
    from experiments.figures import BLUE, GREEN, ORANGE, plt
    panels = {f"first-token share (uniform: {uniform_share(T):.3f})": (kinds, dict(ylim=(0, 1))),
              "largest activation": ([f"activation_{kind}" for kind in kinds], dict(yscale="log")),
              "length of a value": (["first token's", "others'"], dict(xlabel="layer")),
              "fitted score: R² on test windows": (["R2"], dict(xlabel="layer", ylim=(0, 1)))}
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 4.6), sharex=True)
    for axis, (title, (keys, options)) in zip(axes.flat, panels.items()):
        for key, color, line in zip(keys, (ORANGE, BLUE, GREEN), ("-", "--", "-.")):
            axis.plot([row[key] for row in layers], line, color=color, label=key.removeprefix("activation_"))
        axis.set(title=title, **options)
        axis.legend(frameon=False)
    return figure


def two_heads(maps):
    """(layer, head) of a head that works: what it looks at that is neither the first token, nor itself, nor
    the one before varies most. And of a head that rests: its share is the largest. maps: (L, t, t, nh).
    """
    far = maps * torch.ones(maps.shape[1:3]).tril(-2)[..., None]
    far[:, :, 0] = 0
    scores = far.amax(2).std(1), maps[:, :, 0].mean(1)  # (L, nh) each
    return [divmod(score.argmax().item(), maps.size(-1)) for score in scores]


def draw_sink(model, tokenizer, found, rows):
    """A head that works and one that rests; the loss without the sink, and with a gate in its place."""
    from experiments.figures import BLUE, GREY, ORANGE, plt
    figure, ((work, rest), (curve, bars)) = plt.subplots(2, 2, figsize=(8, 7.6), height_ratios=(1.5, 1))
    ids = tokenizer.encode_ordinary(SENTENCE)
    with torch.no_grad():
        maps = torch.cat(attention_maps(model, torch.tensor([ids], device=model.cos.device))).cpu()
    for axis, what, (layer, head) in zip((work, rest), ("works", "rests"), two_heads(maps)):
        show_map(axis, maps[layer, :, :, head], labels(ids, tokenizer))
        axis.set_title(f"a head that {what} (layer {layer}, head {head}):\n"
                       f"{maps[layer, :, 0, head].mean():.2f} of its attention on the first token")
    ways = (SINK, GREY, ":"), (HIDDEN, ORANGE, "-"), (GATES[0], BLUE, "--")
    starts = range(0, T - 1, 32)
    for what, color, line in ((SLIDE, ORANGE, ":"), (STREAM, GREY, ":"), *ways[1:]):
        more = torch.cat([loss - found[SINK][kind] for kind, loss in found[what].items()]).mean(0)  # (T - 1,)
        curve.plot([i + 16 for i in starts], [more[i:i + 32].mean() for i in starts], line, color=color,
                   label=what)
    curve.set(title="by how much the loss is higher, by position", xlabel="token")
    curve.legend(frameon=False)
    at = {row["what"]: list(row.values())[1:] for row in rows}
    for place, (what, color, _) in enumerate(ways):
        drawn = bars.bar([i + 0.27 * place for i in range(len(at[what]))], at[what], 0.25, color=color,
                         label=what)
        bars.bar_label(drawn, [f"{loss:.2f}" for loss in at[what]])
    bars.set(title=f"loss from token {LATE} on", ylim=(0, 1.4 * max(at[HIDDEN])))
    bars.set_xticks([i + 0.27 for i in range(len(at[SINK]))], list(found[SINK]))
    bars.legend(frameon=False, loc="upper left", ncols=2)
    return figure


if __name__ == "__main__":
    run_main(main)
