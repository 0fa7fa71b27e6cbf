"""
Text from a trained model:

    python sample.py                            the newest run, from its BOS on
    python sample.py --prompt="a" --attn_share  and how much attention BOS gets
    python sample.py --attn_share --text=FILE   the same on a text, in blocks

--ckpt also takes the folder of a released model, with its config.json.

Also the home of what both command lines share: finding and opening runs, the table per layer.
"""
import argparse
import codecs
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data import prepare
from data.prepare import run_main
from gated_gpt import GPT, attention_maps, load_checkpoint, measure, uniform_share

SHORT = 512  # tokens; below this a first-token share says more about the length than about the model
BLOCKS = 64  # of --text, at most
TABLE_4 = {  # of the paper: gate score, M-Act (largest activation), F-Attn (first-token share)
    "none": (math.nan, 1053, 0.467), "g1": (0.116, 94, 0.048), "g1-headwise": (0.172, 98, 0.073),
    "g2": (0.221, 125, 0.297), "g1-shared": (0.271, 286, 0.301), "g1-no-input": (0.335, 471, 0.364),
    "g1-ns-sigmoid": (0.653, 892, 0.451)}
RELEASED = {  # the same of the released weights, as others read them on web text in blocks of 512 tokens
    "none": (math.nan, math.nan, 0.43), "g1": (0.140, math.nan, 0.02), "g1-headwise": (0.257, math.nan, 0.05)}


def newest_run(root="out"):
    """Folder of the run in `root` whose checkpoint was written last. ValueError if there is none."""
    files = [*Path(root).glob("*/last.pt"), *Path(root).glob("*/best.pt")]
    if not files:
        raise ValueError(f"no run with a checkpoint in {root}/: python train.py makes one")
    return max(files, key=lambda file: file.stat().st_mtime).parent


def checkpoint_in(run, prefer="last"):
    """The checkpoint in a run's folder: last.pt or best.pt, the preferred one if both are there."""
    files = [Path(run, name) for name in ("last.pt", "best.pt") if Path(run, name).exists()]
    if not files:
        raise ValueError(f"{run} holds no checkpoint (last.pt or best.pt): name another run, or train one")
    return next((file for file in files if file.stem == prefer), files[0])


STATE = {"step": int, "tokenizer": str, "train_config": dict}  # of what train.py saves, what is needed here


def load_run(path, needed=STATE):
    """load_checkpoint of what train.py has saved. ValueError if its state lacks what is `needed`."""
    model, state = load_checkpoint(path)
    state = state if isinstance(state, dict) else {}
    if wrong := [name for name, kind in needed.items() if type(state.get(name)) is not kind]:
        raise ValueError(f"{path} has no {wrong[0]} as train.py saves it: name one of its checkpoints")
    return model, state


def open_model(path, dtype=None):
    """(model, its tokenizer's name, its BOS or None, what it is) of a checkpoint, a run or a released model.

    On the CPU, the weights in `dtype`, by default as they are stored. A released model has no BOS.
    """
    path = Path(path)
    if any(path.glob("config.json")) or any(path.glob("*.safetensors")):
        model = GPT.from_pretrained(path, dtype=dtype)
        title = f"{path}: gate {model.config.variant}, in the released layout, without a BOS"
        return model, str(path.resolve()), None, title
    path = checkpoint_in(path, prefer="best") if path.is_dir() else path
    model, state = load_run(path)
    for p in model.parameters():
        p.data = p.data.to(dtype or p.dtype)
    title = (f"{path}: gate {model.config.variant}, step {state['step']}, data "
             f"{state['train_config'].get('data')}")
    return model, state["tokenizer"], prepare.bos_id(state["tokenizer"]), title


def checked_device(name):
    """The torch.device of that name. ValueError if it is not there."""
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it is none of cpu, cuda, mps, xpu")
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} can't be used here ({str(error).splitlines()[0]}): try "
                         "--device=cpu") from None


def tokens_of(text, tokenizer, bos):
    """BOS, if not None, and the tokens of `text`: (1, t). What looks like a special token is plain text."""
    return torch.tensor([[bos, *tokenizer.encode_ordinary(text)][bos is None :]])


def text_blocks(text, tokenizer, bos, T):
    """At most BLOCKS blocks of T tokens, evenly spaced over the text, each after a BOS if there is one.

    (N, T), or (1, t) with t < T of a short text. ValueError if it has fewer than two tokens.
    """
    tokens, first = np.array(tokenizer.encode_ordinary(text)), [] if bos is None else [bos]
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, too few for attention: take a longer one")
    size = min(T - len(first), len(tokens))
    count = len(tokens) // size
    chosen = np.linspace(0, count - 1, min(count, BLOCKS)).astype(int)
    return torch.tensor([[*first, *tokens[i * size : (i + 1) * size].tolist()] for i in chosen])


def measure_blocks(model, blocks):
    """measure's dicts for blocks (N, T): its means, and its maximum, over them all; one block at a time."""
    def over_blocks(name, values):
        return np.max(values) if name == "max_activation" else np.mean(values, axis=0)

    layers = zip(*(measure(model, block[None]) for block in blocks))  # for each layer, a dict from each block
    return [{name: over_blocks(name, [row[name] for row in rows]) for name in rows[0]} for rows in layers]


def stream_text(tokens, tokenizer):
    """Text of token numbers as they come: whole UTF-8 characters only; broken ones show as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(bytes_of(token, tokenizer))
    yield decoder.decode(b"", final=True)


def bytes_of(token, tokenizer):
    """Bytes of one token; none for a number beyond the tokenizer's (a vocabulary rounded up has a few)."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


def layer_table(layers, T):
    """measure's dicts as a table, with the floor of the share for windows of T tokens."""
    rows = [f"first-token share per layer, T={T}; uniform attention would give {uniform_share(T):.3f}",
            f"{'layer':>5}{'share':>8}{'most, in head':>16}{'t >= T/4':>10}{'gate':>8}{'under .1':>10}"
            f"{'max|x|':>9}"]
    for i, layer in enumerate(layers):
        heads = layer["first_token_share_by_head"]
        most = max(range(len(heads)), key=heads.__getitem__)
        rows.append(f"{i:>5}{layer['first_token_share']:>8.3f}{heads[most]:>11.3f} in {most:<2}"
                    f"{layer['late_first_token_share']:>10.3f}{layer['gate_score']:>8.3f}"
                    f"{layer['gate_closed']:>10.3f}{layer['max_activation']:>9.1f}".replace("nan", "  -"))
    return "\n".join(rows)


def means_table(layers, variant, N, T):
    """Means over layers of what measure says, beside what others found for the same gate."""
    here = [sum(layer[name] for layer in layers) / len(layers)
            for name in ("gate_score", "max_activation", "first_token_share")]
    rows = [f"{'means over layers':<48}{'F-Attn':>8}{'gate':>8}{'M-Act':>9}"]
    for name, numbers in {f"here, {N} x {T} tokens": here, "paper, Table 4: 15A2B MoE": TABLE_4.get(variant),
                          "released weights, by others: 512 of web text": RELEASED.get(variant)}.items():
        if numbers:
            score, activation, share = numbers
            rows.append(f"{name:<48}{share:>8.3f}{score:>8.3f}{activation:>9.1f}".replace("nan", "  -"))
    return "\n".join(rows)


def draw_maps(model, idx, tokenizer, path):
    """A picture of each layer's attention on idx (1, T), mean over heads: queries down, keys across."""
    try:
        import matplotlib  # asked for only here
    except ImportError:
        raise ValueError("--attn_map needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [repr(bytes_of(token, tokenizer).decode("utf-8", "replace"))[1:-1] for token in idx[0].tolist()]
    maps = [layer[0].mean(-1).cpu() for layer in attention_maps(model, idx)]  # (T, T) each
    columns = min(2, len(maps))
    side = max(3.0, 0.16 * len(names))
    figure, axes = plt.subplots(math.ceil(len(maps) / columns), columns, squeeze=False, layout="constrained",
                                figsize=(columns * side + 0.6, math.ceil(len(maps) / columns) * (side + 0.4)))
    for i, axis in enumerate(axes.flat):
        if i >= len(maps):
            axis.set_axis_off()
            continue
        image = axis.imshow(maps[i], cmap="Greys", vmin=0, vmax=1)
        axis.set_title(f"layer {i}: {maps[i][:, 0].mean():.2f} on the first token")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(names)), names, fontsize=6)
    axes[0][0].set(xlabel="key", ylabel="query")
    figure.colorbar(image, ax=axes, label="attention probability", shrink=0.6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(prog="sample.py", usage="sample.py [--flag=value ...]",
                                     allow_abbrev=False,
                                     description=__doc__.partition("\nAlso")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="a checkpoint, or the folder of a run or a released model [the newest "
                                       "run in out/]")
    parser.add_argument("--prompt", default="", help="text to go on from; -: from standard input [none]")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to add [%(default)s]")
    parser.add_argument("--samples", type=int, default=1, help="texts, made side by side [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token [%(default)s]")
    parser.add_argument("--top_k", type=int, help="choose among the k likeliest tokens only [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps [%(default)s]")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the weights; auto: as they are stored [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="compile the model, which takes a while at "
                        "first: for long texts on a GPU")
    parser.add_argument("--attn_share", action="store_true",
                        help="measure first-token share on this text, the first of several")
    parser.add_argument("--text", metavar="FILE", help="with --attn_share: measure it on this text instead")
    parser.add_argument("--attn_map", metavar="FILE.png", help="draw the attention on this text")
    flags = parser.parse_args(argv)
    for name, least in (("tokens", 0), ("samples", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        value = getattr(flags, name)
        if value is not None and not least <= value < 2**31:
            raise ValueError(f"{name}={value} must be at least {least} and below {2**31:g}")
    if flags.text and (flags.prompt or not flags.attn_share):
        raise ValueError(f"text={flags.text} is for --attn_share to measure, not for a prompt to go on: "
                         "add --attn_share, leave out --prompt")
    if flags.attn_map and Path(flags.attn_map).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"attn_map={flags.attn_map} must end in .png, .pdf or .svg")
    if flags.prompt == "-" and sys.stdin is None:
        raise ValueError("prompt=- reads from standard input, which is closed: give the text itself")
    if flags.compile and (flags.attn_share or flags.attn_map):
        raise ValueError("compile=True with attn_share or attn_map: a compiled model can't be looked into; "
                         "leave --compile out")
    return flags


def show(prompt, made, samples, tokenizer):
    """Print texts from GPT.stream, a single one as it is made; returns their token numbers."""
    if samples == 1:
        text = []

        def noted():
            for token in made:
                text.append(token.item())
                yield text[-1]

        print(prompt, end="", flush=True)
        for piece in stream_text(noted(), tokenizer):
            print(piece, end="", flush=True)
        print()
        return [text]
    texts = list(zip(*(tokens.tolist() for tokens in made))) or [()] * samples
    for i, text in enumerate(texts, 1):
        print(f"--- {i} ---\n{prompt}{''.join(stream_text(text, tokenizer))}")
    return texts


def main(argv=None):
    flags = parse_flags(argv)
    device = checked_device(flags.device)
    dtype = None if flags.dtype == "auto" else getattr(torch, flags.dtype)
    model, name, bos, title = open_model(flags.ckpt or newest_run(), dtype)
    tokenizer = prepare.get_tokenizer(name)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"the tokenizer {name} has {tokenizer.n_vocab} tokens, its model "
                         f"{model.config.vocab_size}: they do not belong together, so get both again")
    model.to(device)
    if flags.text:
        print(title)
        T = min(SHORT, model.config.block_size) if bos is None else model.config.block_size
        window = text_blocks(prepare.read_text(Path(flags.text)), tokenizer, bos, T).to(device)
    else:
        prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
        if bos is None and not prompt:
            bos = prepare.bos_id(name)
            title += f"; without a prompt, it starts from {bytes_of(bos, tokenizer).decode()}"
        print(title + "\n")
        window = written(model, tokens_of(prompt, tokenizer, bos).to(device), prompt, tokenizer, flags)
    if flags.attn_share:
        layers = measure_blocks(model, window)
        print("\n" + layer_table(layers, window.size(1)))
        if flags.text:
            print(f"\n{means_table(layers, model.config.variant, *window.shape)}")
        if window.size(1) < SHORT:
            print(f"\nOnly {window.size(1)} tokens at a time: a text this short has a large share even\n"
                  "without a sink. Compare with the floor, and with other models on the same text.")
    if flags.attn_map:
        draw_maps(model, window[:1, :64], tokenizer, flags.attn_map)
        print(f"\n{flags.attn_map}: attention on the first {min(64, window.size(1))} tokens")


def written(model, idx, prompt, tokenizer, flags):
    """Print what the model makes of idx (1, t); returns the last window of the first text, (1, T)."""
    if flags.compile:
        model.compile(dynamic=False)  # once for the prompt, once for one token: the cache keeps its shape
    generator = torch.Generator(flags.device).manual_seed(flags.seed)
    made = model.stream(idx.expand(flags.samples, -1), flags.tokens, flags.temperature, flags.top_k,
                        generator)
    texts = show(prompt, made, flags.samples, tokenizer)
    whole = torch.cat((idx, idx.new_tensor(texts[:1])), dim=1)  # (1, t): BOS, prompt, first text
    room = model.config.block_size
    return whole if whole.size(1) <= room else torch.cat((whole[:, :1], whole[:, 1 - room :]), dim=1)


if __name__ == "__main__":
    run_main(main)
