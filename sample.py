"""
Text from a trained model:

    python sample.py                            the newest run, from BOS on
    python sample.py --prompt="a" --attn_share  and how much attention BOS gets
    python sample.py --attn_share --text=FILE   the same on a text, in blocks
    python sample.py --prompt="my own text" --tokens=0 --attn_map=map.png

From BOS on, a text may begin within a word: windows are cut anywhere.
Reading order: parse_flags -> main -> write -> text_blocks -> measure_blocks.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P, which leaves it out
from data import tokenizers
from data.prepare import read_text
from gated_gpt import measure
from plumbing.checkpoint import newest_run, open_model
from plumbing.flags import parser_of, run_main, utf8
from plumbing.machine import choose_device, choose_precision
from plumbing.report import draw_maps, layer_table, means_table, variant, write_shares

SHORT = 512  # tokens; below this a first-token share says more about the length than about the model
BLOCKS = 64  # of --text, at most


def parse_flags(argv=None):
    parser = parser_of(__doc__, "sample.py", "[--flag=value ...]")
    parser.add_argument("--ckpt", help="a run, a checkpoint, or a released model's folder [the newest run]")
    parser.add_argument("--prompt", type=utf8, default="", help="text to continue; -: standard input [none]")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to add [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token [%(default)s]")
    parser.add_argument("--top_k", type=int, help="choose among the k likeliest tokens only [all]")
    parser.add_argument("--no-stop", dest="stop", action="store_false", help="go on where a text ends")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices [%(default)s]")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where it is, if it was moved")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, mps [%(default)s]")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the weights; auto: as stored, if the hardware can multiply it [%(default)s]")
    parser.add_argument("--block_size", type=int, help="tokens in a window, for longer ones than trained")
    parser.add_argument("--rope_scaling", choices=("linear", "yarn"), help="for these [RoPE as trained]")
    parser.add_argument("--attn_share", action="store_true", help="measure first-token share on this text")
    parser.add_argument("--text", metavar="FILE", help="with --attn_share: measure it on this text instead")
    parser.add_argument("--csv", metavar="FILE", help="with --attn_share: a row for each layer and head")
    parser.add_argument("--attn_map", metavar="FILE.png", help="draw the attention on this text")
    parser.add_argument("--layer", type=int, help="with --attn_map: its heads [layers of largest share]")
    parser.add_argument("--head", type=int, help="with --attn_map: this head [means over heads]")
    flags = parser.parse_args(argv)
    for name, least in (("tokens", 0), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        if (value := getattr(flags, name)) is not None and not least <= value < 2**31:
            raise ValueError(f"{name}={value} must be at least {least}, and below 2^31")
    if flags.text and flags.prompt:
        raise ValueError("--text is measured in place of a --prompt: give one of them")
    for name, of in {"text": "attn_share", "csv": "attn_share", "layer": "attn_map", "head": "attn_map",
                     "rope_scaling": "block_size"}.items():
        if getattr(flags, name) is not None and not getattr(flags, of):
            raise ValueError(f"--{name} has no effect without --{of}: give both")
    return flags


def main(argv=None):
    flags = parse_flags(argv)
    device = choose_device(flags.device)
    found = open_model(flags.ckpt or newest_run())
    model, name, released = found.model, flags.tokenizer or found.tokenizer, found.data is None
    tokenizers.check_tokenizer(name, found.sha256)
    print(found.title)
    if flags.block_size is not None:
        model.set_window(flags.block_size, flags.rope_scaling or "none")
    tokenizer, bos, T = tokenizers.get_tokenizer(name), tokenizers.bos_id(name), model.config.block_size
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"the tokenizer {name} has {tokenizer.n_vocab} tokens, but the model only "
                         f"{model.config.vocab_size}: they do not belong together, so get both again")
    dtype = choose_precision(flags.dtype, device, print, stored=model.embed.weight.dtype)
    for p in model.parameters():  # not model.to(dtype), which would also round the angles of RoPE
        p.data = p.data.to(dtype)
    model.to(device)
    print()
    front = tokenizers.front_ids(name) if released else [bos]  # other people's models often have none
    if flags.text:
        T = T if flags.block_size or not released else min(SHORT, T)  # others measured on 512 tokens
        window = text_blocks(read_text(flags.text), tokenizer, front[0] if front else None, T).to(device)
    else:
        prompt = read_text("-") if flags.prompt == "-" else flags.prompt
        tokens = tokenizer.encode_ordinary(prompt)  # "<|bos|>" in a prompt is seven characters
        if not front and not tokens:
            print(f"no prompt: from {tokenizers.bytes_of(bos, tokenizer).decode()} on", file=sys.stderr)
        tokens = [*(front if tokens else [bos]), *tokens]
        ends = tokenizers.end_ids(name) if flags.stop else set()
        window = write(model, torch.tensor([tokens], device=device), prompt, tokenizer, ends, flags)
    if flags.attn_share:
        layers = measure_blocks(model, window)
        print("\n" + layer_table(layers, window.size(1)))
        if flags.text:
            print(f"\n{means_table(layers, variant(model.config), *window.shape)}")
        if flags.csv:
            print("\n" + write_shares(flags.csv, layers, window.size(1)))
        if window.size(1) < min(SHORT, model.config.block_size):
            print(f"\nOnly {window.size(1)} tokens: a text this short has a large share even\n"
                  "without a sink. Compare with the floor, and with other models on the same text.")
    if flags.attn_map:
        shown = window[:1, :64]  # (1, t)
        names = tokenizers.labels(shown[0].tolist(), tokenizer, bos)
        draw_maps(model, shown, names, flags.attn_map, flags.layer, flags.head)
        print(f"\n{flags.attn_map}: attention on the first {shown.size(1)} tokens")


def write(model, idx, prompt, tokenizer, ends, flags):
    """Print the prompt, and what follows on idx (1, t); return the text's last window, (1, T) or less."""
    generator, T = torch.Generator(idx.device).manual_seed(flags.seed), model.config.block_size
    text, start = tokenizers.TextOut(tokenizer), idx.size(1)
    print(prompt, end="", flush=True)
    for new in model.stream(idx, flags.tokens, flags.temperature, flags.top_k, generator):  # new: (1,)
        if new.item() in ends:
            if idx.size(1) == start:
                print("the first new token ends the text: --no-stop goes on", file=sys.stderr)
            break
        print(text.add(new.item()), end="", flush=True)  # shown as it is made
        idx = torch.cat((idx, new[None]), dim=1)
    print(text.rest())
    return idx if idx.size(1) <= T else torch.cat((idx[:, :1], idx[:, 1 - T:]), dim=1)  # BOS stays in front


def text_blocks(text, tokenizer, bos, T):
    """At most BLOCKS blocks of T tokens (N, T), evenly spaced over a text, each after a BOS if there is one.
    (1, t) with t < T of a short text. ValueError if it has fewer than two tokens."""
    tokens, first = np.array(tokenizer.encode_ordinary(text)), [] if bos is None else [bos]
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, too few for attention: take a longer one")
    size = min(T - len(first), len(tokens))
    blocks = tokens[: len(tokens) // size * size].reshape(-1, size)
    chosen = np.linspace(0, len(blocks) - 1, min(len(blocks), BLOCKS)).astype(int)
    return torch.tensor([first + block for block in blocks[chosen].tolist()])


def measure_blocks(model, blocks):
    """measure's dicts for blocks (N, T), one block at a time: means over blocks, largest activation."""
    layers = []
    for rows in zip(*(measure(model, block[None]) for block in blocks)):  # one layer, in all blocks
        layers.append({name: np.mean([row[name] for row in rows], axis=0).tolist() for name in rows[0]})
        layers[-1]["max_activation"] = max(row["max_activation"] for row in rows)
    return layers


if __name__ == "__main__":
    run_main(main)
