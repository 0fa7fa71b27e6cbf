"""What a run prints and draws: its lines, and tables and pictures of what gated_gpt.measure finds."""
import csv
import io
import math
import warnings

from gated_gpt import attention_maps, uniform_share
from plumbing.files import whole_file

TABLE_4 = {  # of the paper: gate score, largest activation (M-Act), first-token share (F-Attn)
    "none": (math.nan, 1053, 0.467), "g1": (0.116, 94, 0.048), "g1-headwise": (0.172, 98, 0.073),
    "g2": (0.221, 125, 0.297), "g1-shared": (0.271, 286, 0.301), "g1-no-input": (0.335, 471, 0.364),
    "g1-ns-sigmoid": (0.653, 892, 0.451)}
RELEASED = {  # the same of the released weights, as others measured them on web text in blocks of 512 tokens
    "none": (math.nan, math.nan, 0.43), "g1": (0.140, math.nan, 0.02), "g1-headwise": (0.257, math.nan, 0.05)}


def variant(config):
    """A short name for what a GPTConfig does to attention, such as none, g1, g1-headwise, g1-add-silu."""
    words = [config.gate]
    if config.gate != "none":
        if config.gate_kind == "headwise": words.append("headwise")
        if config.gate_shared: words.append("shared")
        if config.gate_op == "add": words.append("add")
        if config.gate_act != "sigmoid": words.append(config.gate_act.replace("_", "-"))
        if not config.gate_input: words.append("no-input")
    if config.attention != "softmax": words.append(config.attention)
    if config.sdpa_norm: words.append("sdpa-norm")
    if config.sdpa_silu: words.append("sdpa-silu")
    if config.norm == "sandwich": words.append("sandwich")
    if config.n_expert: words.append("moe")
    return "-".join(words)


# ---- a run's lines and its log.csv -----------------------------------------------------------------

COLUMNS = {  # name in a row: (heading, width, format). train_loss: mean over the steps since the row before
    "step": ("step", 6, ".0f"), "train_loss": ("train", 8, ".4f"), "val_loss": ("val", 8, ".4f"),
    "bits_per_byte": ("bits/byte", 10, ".4f"), "tokens_per_second": ("tokens/s", 10, ",.0f"),
    "first_token_share": ("share", 7, ".3f"), "uniform_share": ("(floor)", 8, ".3f"),
    "gate_score": ("gate", 7, ".3f"), "max_activation": ("max|x|", 8, ".1f")}


def columns_of(attn_share):
    """Names of the columns that a run shows."""
    return list(COLUMNS) if attn_share else list(COLUMNS)[:5]


def heading(columns):
    """The headings of these columns, each as wide as its numbers."""
    return "".join(f"{title:>{width}}" for title, width, _ in map(COLUMNS.get, columns))


def line(row, columns):
    """A row of the log, for the terminal."""
    return "".join(cell(row[name], *COLUMNS[name][1:]) for name in columns)


def cell(number, width, form):
    """A number in a format such as .3f, on the right of so many characters; nan is a dash."""
    return f"{number:{width}{form}}" if number == number else f"{'-':>{width}}"


def write_csv(path, rows, columns):
    """Write these columns of rows, which are dicts, as a csv file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval=math.nan, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def describe(say, model, c, meta, origin, ranks, train_set):
    """Say what a run will do."""
    windows, T = c.windows_per_step, model.config.block_size
    in_gates = sum(p.numel() for name, p in model.named_parameters() if ".gate." in name)
    say(f"model    gate {variant(model.config)}, {model.num_params():,} parameters, {in_gates:,} in gates")
    say(f"data     {c.data}, {meta['train']['tokens']:,} training tokens ({meta['tokenizer']})")
    some = train_set.windows[:: max(1, len(train_set.windows) // 1000)]  # (about 1000, T)
    if (within := (some == train_set.bos).sum(1).mean()) > 0.5:
        say(f"         short texts: a window has {within:.1f} more BOS; share counts the first only")
    say(f"steps    {c.max_steps:,} of {windows * T:,} tokens ({windows} windows of {T}), {c.optimizer}"
        + f", {ranks} processes" * (ranks > 1))
    say(f"run      {c.out}{', ' * bool(origin)}{origin}\n")


def ending(log, T):
    """How a run ended: its best loss, and what was measured in its last step."""
    best, layers = min(log, key=lambda row: row["val_loss"]), log[-1].get("layers")
    return (f"\nbest val loss {best['val_loss']:.4f} nats per token = {best['bits_per_byte']:.4f} bits per "
            f"byte, step {best['step']:,}; {log[-1]['seconds']:.0f} s"
            + (f"\n\n{layer_table(layers, T)}" if layers else ""))


# ---- what was measured -----------------------------------------------------------------------------


def layer_table(layers, T):
    """measure's dicts as a table, with the floor of the share for windows of T tokens."""
    rows = [f"first-token share per layer, T={T}; uniform attention would give {uniform_share(T):.3f}",
            f"{'layer':>5}{'share':>8}{'most, in head':>17}{'t >= T/4':>10}{'gate':>8}{'max|x|':>9}"]
    for i, layer in enumerate(layers):
        heads = layer["first_token_share_by_head"]
        most = heads.index(max(heads))
        rows.append(f"{i:>5}{layer['first_token_share']:>8.3f}{heads[most]:>11.3f} in {most:<2}"
                    f"{layer['late_first_token_share']:>10.3f}{cell(layer['gate_score'], 8, '.3f')}"
                    f"{layer['max_activation']:>9.1f}")
    return "\n".join(rows)


def write_shares(path, layers, T):
    """Write measure's dicts as a csv file: a row for each head, with its share and what its layer has.

    Returns a sentence that says so.
    """
    rows = [{"layer": i, "head": head, "share_of_head": share, "uniform_share": uniform_share(T), **layer}
            for i, layer in enumerate(layers)
            for head, share in enumerate(layer["first_token_share_by_head"])]
    write_csv(path, rows, [name for name in rows[0] if name != "first_token_share_by_head"])
    return f"{path}: {len(rows)} rows, one for each layer and head"


def means_table(layers, name, N, T):
    """Means over layers of what measure found, beside what others found for the gate of that name."""
    here = [sum(layer[key] for layer in layers) / len(layers)
            for key in ("gate_score", "max_activation", "first_token_share")]
    rows = [f"{'means over layers':<48}{'share':>8}{'gate':>8}{'max|x|':>9}"]
    for title, numbers in {f"here, {N} x {T} tokens": here, "paper, Table 4: 15A2B MoE": TABLE_4.get(name),
                           "released weights, by others: 512 of web text": RELEASED.get(name)}.items():
        if numbers:
            score, activation, share = numbers
            rows.append(f"{title:<48}{share:>8.3f}{cell(score, 8, '.3f')}{cell(activation, 9, '.1f')}")
    return "\n".join(rows)


PANELS = 6  # of a picture of maps, unless more are asked for


def panels_of(maps, layer=None, head=None):
    """[(title, map (T, T))] of the maps (T, T, nh) of all layers: means over heads of the layers with the
    largest first-token shares; or the heads of one layer; or one head.
    """
    for name, value, count in (("layer", layer, len(maps)), ("head", head, maps[0].size(-1))):
        if value is not None and not 0 <= value < count:
            raise ValueError(f"{name}={value}: this model has {name}s 0 to {count - 1}")
    if layer is not None:
        heads = range(maps[0].size(-1)) if head is None else [head]
        return [(f"layer {layer}, head {h}", maps[layer][..., h]) for h in heads]
    means = [layer.mean(-1) if head is None else layer[..., head] for layer in maps]
    largest = sorted(range(len(means)), key=lambda i: -means[i][:, 0].mean())[:PANELS]
    return [(f"layer {i}" + f", head {head}" * (head is not None), means[i]) for i in sorted(largest)]


def show_map(axis, weights, names):
    """Draw attention weights T x T, between tokens of these names; those below 0.1 are seen, too."""
    from matplotlib.colors import PowerNorm  # matplotlib is asked for only in these two functions
    image = axis.imshow(weights, cmap="Greys", norm=PowerNorm(0.5, 0, 1))
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=6, parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(True)
    return image


def draw_maps(model, idx, names, path, layer=None, head=None):
    """Draw the attention on idx (1, T), as panels_of chooses: each row is a token, and shows where it looks.

    The picture is written to `path`; its ending says which kind it is. `names` are the T tokens as text.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would switch backends
    except ImportError:
        raise ValueError("--attn_map needs matplotlib: pip install matplotlib") from None

    panels = panels_of([layer[0].float().cpu() for layer in attention_maps(model, idx)], layer, head)
    columns, T = min(3, len(panels)), len(names)
    lines, side = math.ceil(len(panels) / columns), max(3.0, 0.13 * T)
    figure = Figure(figsize=(columns * side + 0.8, lines * (side + 0.7)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, (title, weights) in zip(axes.flat, panels):
        image = show_map(axis, weights, names)
        axis.set_title(f"{title}: {weights[:, 0].mean():.2f} on {names[0]}", fontsize=9, parse_math=False)
    axes[0][0].set(xlabel="the token looked at", ylabel="the token that looks")
    figure.suptitle(f"Attention; evenly spread, {uniform_share(T):.2f} would be on {names[0]}", fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=(0, 0.01, 0.1, 0.5, 1), shrink=0.4, aspect=15)
    bar.ax.tick_params(labelsize=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that the font lacks is a box
        figure.savefig(path, dpi=120)
