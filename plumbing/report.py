"""What a run prints and draws: its lines, and tables and pictures of what gated_gpt.measure finds."""
import csv
import io
import math

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

COLUMNS = {  # name in a row: (heading, format). train_loss is the mean over the steps since the row before
    "step": ("step", "6.0f"), "train_loss": ("train", "8.4f"), "val_loss": ("val", "8.4f"),
    "bits_per_byte": ("bits/byte", "10.4f"), "tokens_per_second": ("tokens/s", "10,.0f"),
    "first_token_share": ("share", "7.3f"), "uniform_share": ("(floor)", "8.3f"),
    "gate_score": ("gate", "7.3f"), "max_activation": ("max|x|", "8.1f")}


def columns_of(attn_share):
    """Names of the columns that a run shows."""
    return list(COLUMNS) if attn_share else list(COLUMNS)[:5]


def heading(columns):
    """The headings of these columns, each as wide as its numbers."""
    cells = ((title, form.split(".")[0].strip(",")) for title, form in (COLUMNS[name] for name in columns))
    return "".join(f"{title:>{width}}" for title, width in cells)


def line(row, columns):
    """A row of the log, for the terminal."""
    return "".join(cell(row[name], COLUMNS[name][1]) for name in columns)


def cell(number, form):
    """A number in a format such as 8.3f; nan is a dash of the same width."""
    return f"{number:{form}}" if number == number else f"{'-':>{form.split('.')[0].strip(',')}}"


def write_log(path, log):
    """Write the rows of a log as a csv file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval=math.nan, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
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
                    f"{layer['late_first_token_share']:>10.3f}{cell(layer['gate_score'], '8.3f')}"
                    f"{layer['max_activation']:>9.1f}")
    return "\n".join(rows)


def means_table(layers, name, N, T):
    """Means over layers of what measure found, beside what others found for the gate of that name."""
    here = [sum(layer[key] for layer in layers) / len(layers)
            for key in ("gate_score", "max_activation", "first_token_share")]
    rows = [f"{'means over layers':<48}{'F-Attn':>8}{'gate':>8}{'M-Act':>9}"]
    for title, numbers in {f"here, {N} x {T} tokens": here, "paper, Table 4: 15A2B MoE": TABLE_4.get(name),
                           "released weights, by others: 512 of web text": RELEASED.get(name)}.items():
        if numbers:
            score, activation, share = numbers
            rows.append(f"{title:<48}{share:>8.3f}{cell(score, '8.3f')}{cell(activation, '9.1f')}")
    return "\n".join(rows)


def draw_maps(model, idx, names, path):
    """Draw the attention of each layer on idx (1, T), mean over heads: queries down, keys across.

    The picture is written to `path`; its ending says which kind it is. `names` are the T tokens as text.
    """
    try:
        from matplotlib.figure import Figure  # asked for only here; not pyplot, which would switch backends
    except ImportError:
        raise ValueError("--attn_map needs matplotlib: pip install matplotlib") from None

    maps = [layer[0].float().mean(-1).cpu() for layer in attention_maps(model, idx)]  # (T, T) each
    columns = min(2, len(maps))
    lines, side = math.ceil(len(maps) / columns), max(3.0, 0.16 * len(names))
    figure = Figure(figsize=(columns * side + 0.6, lines * (side + 0.4)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(maps):]:
        axis.set_axis_off()
    for i, (axis, probabilities) in enumerate(zip(axes.flat, maps)):
        image = axis.imshow(probabilities, cmap="Greys", vmin=0, vmax=1)
        axis.set_title(f"layer {i}: {probabilities[:, 0].mean():.2f} on the first token")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(names)), names, fontsize=6)
    axes[0][0].set(xlabel="key", ylabel="query")
    figure.colorbar(image, ax=axes, label="attention probability", shrink=0.6)
    figure.savefig(path, dpi=120)
