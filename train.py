"""
Train a gated GPT:

    python train.py --gate=none                a text model that grows a sink
    python train.py                            the same, gated: no sink
    python train.py --resume --max_steps=6000  go on with the newest run
    torchrun --standalone --nproc_per_node=2 train.py    train on two GPUs

A flag is a field of GPTConfig (gated_gpt.py) or of TrainConfig (here).
A preset is a table of their values; without one, gpu with CUDA, else laptop.
Your flags override the preset, and the preset overrides the defaults, which
are shown in [brackets].

Reading order: TrainConfig -> PRESETS -> Windows -> make_optimizers -> train_step -> train.
"""
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P, which leaves it out
from data import prepare
from data.tokenizers import same_tokenizer
from gated_gpt import GPT, GPTConfig, check_fields, measure, uniform_share
from plumbing import checkpoint, machine
from plumbing.flags import add_flags, command, parser_of, refuse_idle, run_main
from plumbing.report import columns_of, describe, ending, heading, line, variant


@dataclass
class TrainConfig:
    """How to train. A field is a flag of train.py, and its comment is the flag's help."""
    # --- run ---
    data: str = "python"  # name of a data set, made by data/prepare.py
    out: str | None = None  # folder of the run; default: out/<data>-<gate>, with a number if that is taken
    resume: bool = False  # go on with the run in --out (default: the newest one)
    overwrite: bool = False  # if --out holds a run already, replace it
    init_from: str | None = None  # start from the weights of a run or released model; its gate may differ
    seed: int = 0  # seed of weights, batches and dropout
    # --- optimisation ---
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 32  # windows in a forward
    grad_accum: int = 1  # forwards in a step; their gradients are averaged
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, with adamw for the rest
    learning_rate: float = 1e-3  # peak learning rate
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # rate after warm-up; wsd: see learning_rate_at
    warmup_steps: int = 100  # steps in which the learning rate climbs to its peak; fewer in a short run
    min_lr_ratio: float = 0.1  # last learning rate of cosine and wsd, as a fraction of the peak
    weight_decay: float = 0.1  # on matrices only
    train_only: Literal["all", "gate"] = "all"  # gate: all other weights stay as they are
    beta1: float = 0.9  # AdamW (not Muon): memory of the mean gradient
    beta2: float = 0.99  # AdamW (not Muon): memory of the squared gradient
    grad_clip: float = 1.0  # the gradient's norm over all parameters is clipped to this; 0: off
    # --- evaluation ---
    eval_every: int = 100  # steps from one evaluation (and checkpoint) to the next
    eval_windows: int = 256  # fixed windows, evenly spaced over val.bin
    attn_share: bool = False  # measure share, gate score and activation at each evaluation
    # --- machine ---
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; weights stay float32
    compile: bool | None = None  # torch.compile; default: on with CUDA
    threads: int | None = None  # CPU threads; default: one for each core that is idle at the start

    def __post_init__(self):
        check_fields(self, seed=0, warmup_steps=0)
        if self.resume and (self.overwrite or not self.out):
            raise ValueError(f"resume with out={self.out}, overwrite={self.overwrite}: name it, and keep it")

    @property
    def windows_per_step(self):
        return self.batch_size * self.grad_accum


PRESETS = {
    # An attention sink on real text, on two cores, in two or three minutes: see experiments/sink_on_text.py.
    "laptop": dict(data="python", n_layer=3, n_head=2, n_embd=64, block_size=64, qk_norm=False,
                   batch_size=32, max_steps=2000, optimizer="muon", learning_rate=8e-3, schedule="wsd",
                   warmup_steps=20, min_lr_ratio=0.0, weight_decay=0.5, eval_every=400, attn_share=True),
    # The same recipe at the size of nanoGPT's baby GPT, for one GPU (not tried yet: wider models want lower
    # rates and more steps); --data=shakespeare is nanoGPT's text.
    "gpu": dict(data="python", n_layer=6, n_head=6, n_embd=384, block_size=256, qk_norm=False, dropout=0.2,
                batch_size=64, max_steps=5000, optimizer="muon", learning_rate=2e-3, schedule="wsd",
                min_lr_ratio=0.0, weight_decay=0.5, eval_every=250, attn_share=True),
    # The smallest thing with a strong attention sink: see backcopy in data/prepare.py.
    "sink": dict(data="backcopy", n_layer=1, n_head=2, n_embd=64, block_size=64, batch_size=32,
                 max_steps=3000, learning_rate=3e-3, schedule="constant", beta2=0.98, weight_decay=0.0,
                 eval_every=500, attn_share=True),
    # GPT-2's small shape on web text: half a million tokens per step, 25 shards.
    "gpt2": dict(data="fineweb", vocab_size=50304, n_layer=12, n_head=12, n_embd=768, block_size=1024,
                 tie_embeddings=True, batch_size=32, grad_accum=16, max_steps=4750, learning_rate=1.8e-3,
                 beta2=0.95, warmup_steps=250, eval_every=250),
}


# ---- data, optimizer, learning rate ----------------------------------------------------------------


class Windows:
    """Windows of T tokens, cut anywhere from a token file; BOS is put in front of each."""

    def __init__(self, tokens, bos, T, device):
        if len(tokens) < T:
            raise ValueError(f"the data has {len(tokens)} tokens in one of its splits, fewer than "
                             f"block_size={T}: prepare more text, or choose a smaller --block_size")
        self.windows = np.lib.stride_tricks.sliding_window_view(tokens, T)  # (N - T + 1, T), a view: no copy
        self.bos, self.device = bos, device

    def at(self, offsets):
        """(idx, targets), (B, T) each: targets are T tokens in a row, idx is BOS and the first T - 1."""
        targets = torch.from_numpy(self.windows[offsets].astype(np.int64))
        idx = torch.cat((torch.full((len(offsets), 1), self.bos), targets[:, :-1]), dim=1)
        if self.device.type == "cuda":  # from pinned memory, the copy overlaps with the step before
            return [t.pin_memory().to(self.device, non_blocking=True) for t in (idx, targets)]
        return idx.to(self.device), targets.to(self.device)

    def of_step(self, step, c, rank=0, ranks=1):
        """Batches [(idx, targets)] of a step: random windows, divided among the processes.

        They depend on seed and step only. So a resumed run goes on exactly where it stopped, and a step is
        the same for any number of processes.
        """
        offsets = np.random.default_rng([c.seed, step]).integers(len(self.windows), size=c.windows_per_step)
        mine = np.split(offsets, ranks)[rank]
        return [self.at(part) for part in np.array_split(mine, math.ceil(len(mine) / c.batch_size))]

    def spaced(self, count):
        """`count` offsets, evenly spaced."""
        return np.linspace(0, len(self.windows) - 1, count).astype(np.int64)


class Muon(torch.optim.Optimizer):
    """Momentum, with each update made orthogonal (Jordan 2024). For weight matrices only.

    An update's root mean square is about that of AdamW's (arXiv 2502.16982), so both share a learning rate.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}  # matrices of one shape go through the iteration together
            for p in group["params"]:
                if p.grad is None:  # not used in this step
                    continue
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])  # Nesterov: look one step ahead
                pair = (p, update) if p.size(0) <= p.size(1) else (p.mT, update.mT)  # make it wide
                stacks.setdefault(pair[0].shape, []).append(pair)
                p.mul_(1 - group["lr"] * group["weight_decay"])
            for (_, longer), pairs in stacks.items():
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.sub_(update, alpha=0.2 * math.sqrt(longer) * group["lr"])


def orthogonal(x):
    """Matrices x (N, rows, columns), rows <= columns: singular vectors stay, singular values become about 1.

    a x + b (x x^T) x + c (x x^T)^2 x replaces each singular value s by a s + b s^3 + c s^5 (Newton-Schulz).
    Five times that, and every s from 0.002 to 1 is at 0.7 to 1.2: rare directions are learned as fast as
    frequent ones.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.to(torch.bfloat16 if machine.has_bfloat16(x.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no s is above 1
    for _ in range(5):
        xxt = x @ x.mT
        polynomial = torch.baddbmm(xxt, xxt, xxt, beta=b, alpha=c)  # b x x^T + c (x x^T)^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.float()


def make_optimizers(model, c):
    """A list of optimizers that share one learning rate. Each parameter that is trained is in one group.

    Matrices decay; vectors (norms, constant gates) do not. Muon takes the matrices inside the blocks, while
    the embedding and the head stay with AdamW. With train_only=gate, all but the gates are frozen.
    """
    muon, decay, rest = [], [], []
    for name, p in model.named_parameters():
        p.requires_grad_(c.train_only == "all" or ".gate." in name)
        if not p.requires_grad:
            continue
        elif p.dim() < 2:
            rest.append(p)
        elif c.optimizer == "muon" and name.startswith("blocks."):
            muon.append(p)
        else:
            decay.append(p)
    groups = [{"params": decay, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)]
    if muon:
        optimizers.append(Muon(muon, c.learning_rate, c.weight_decay))
    return optimizers


def learning_rate_at(step, c):
    """Learning rate of step 0, 1, ...: a linear climb, then constant, half a cosine down, or wsd: warmup,
    stable, decay (MiniCPM, arXiv 2404.06395), here a straight line down over the last 20% of the steps.
    """
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    if c.schedule == "constant":
        return c.learning_rate
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))  # from 1 to 0
    if c.schedule == "wsd":
        height = min(1.0, (c.max_steps - step) / (0.2 * c.max_steps))
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * height)


# ---- training --------------------------------------------------------------------------------------


def train_step(model, optimizers, batches, learning_rate, c, precision):
    """One optimizer step on batches [(idx, targets)]. Returns their mean loss, a tensor on the device."""
    total, windows = 0.0, sum(len(idx) for idx, _ in batches)
    for i, (idx, targets) in enumerate(batches, 1):
        if isinstance(model, DistributedDataParallel):  # exchange gradients once, in the last backward
            model.require_backward_grad_sync = i == len(batches)
        with precision:
            loss = model(idx, targets)[1] / (windows / len(idx))  # windows / len(idx): batches of this size
        loss.backward()
        total += loss.detach()
    if c.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
    return total


def train(config, c, say=tqdm.write):
    """Train as the two configs say. Returns (model, log); the log has a dict for each evaluation.

    ValueError for settings that do not fit together, FloatingPointError when a loss is not finite, and
    KeyboardInterrupt after Ctrl-C, when all is saved. Of torchrun's processes, each takes its part of a step.
    """
    # The machine
    show_bar, say = say is tqdm.write, say if machine.is_first() else machine.silent
    device = machine.choose_device(c.device, say)
    c = dataclasses.replace(c, threads=machine.choose_threads(c.threads, say))  # the last digits depend on it
    torch.set_num_threads(c.threads)
    precision = machine.autocast(machine.choose_precision(c.dtype, device, say), device)

    with machine.processes(device) as (rank, ranks):
        # Data and model
        config, meta, train_set, val_set = open_data(config, c, device, ranks)
        if c.resume:
            model, optimizers, state = resume(config, c, meta, device)
        else:
            model, optimizers, state = start(config, c, meta, device)
            if rank == 0:
                out = checkpoint.new_folder(c.out, f"{Path(c.data).name}-{variant(config)}", c.overwrite)
                c = dataclasses.replace(c, out=str(out))
        # One model under three names: `model` is measured and saved, `fast` evaluates, `parallel` trains.
        fast = machine.try_compile(model, train_set.of_step(0, c, rank, ranks)[0], precision, c.compile, say)
        parallel = DistributedDataParallel(fast) if ranks > 1 else fast
        describe(say, model, c, meta, state["origin"], ranks, train_set)
        columns = columns_of(c.attn_share)
        say(heading(columns))

        # The loop. Losses stay on the device: to read one, the CPU would have to wait for it.
        losses, began = [], time.perf_counter()
        bar = tqdm(total=c.max_steps, initial=state["step"], unit="step", leave=False,
                   disable=None if show_bar else True)  # None: a bar if this is a terminal
        with bar, machine.ctrl_c() as stop:  # stop: a list, empty until somebody presses Ctrl-C
            while state["step"] < c.max_steps:
                model.train()
                torch.manual_seed(hash((c.seed, state["step"], rank)))  # for dropout; the hash never varies
                batches = train_set.of_step(state["step"], c, rank, ranks)
                rate = learning_rate_at(state["step"], c)
                losses.append(train_step(parallel, optimizers, batches, rate, c, precision))
                state["step"] += 1
                bar.update()
                if state["step"] % c.eval_every and state["step"] < c.max_steps and not stop:
                    continue

                # A row of the log, and a checkpoint
                train_loss = machine.mean_over_processes(torch.stack(losses).mean())
                seconds = time.perf_counter() - began
                tokens = len(losses) * c.windows_per_step * config.block_size
                row = {"step": state["step"], "train_loss": train_loss,
                       "tokens_per_second": tokens / seconds, "seconds": state["seconds"] + seconds}
                row |= evaluate(model, fast, val_set, meta["val"], c, precision)
                if not math.isfinite(train_loss + row["val_loss"]):
                    raise FloatingPointError(f"the loss at step {state['step']} is not finite: try a smaller "
                                             "--learning_rate; what was saved before stays")
                state["seconds"] = row["seconds"]
                state["log"].append(row)
                if rank == 0:
                    checkpoint.save_run(model, optimizers, state, c, meta)
                say(line(row, columns))
                losses, began = [], time.perf_counter()
                if stop:
                    break
    if state["step"] < c.max_steps:
        raise KeyboardInterrupt(f"stopped at step {state['step']} and saved; to go on: "
                                + command("train.py", "--resume", f"--out={c.out}"))
    say(ending(state["log"], config.block_size))
    say(f"\ntexts of its best step: {command('sample.py', f'--ckpt={c.out}')}")
    return model, state["log"]


def open_data(config, c, device, ranks=1):
    """(config with a vocabulary, meta of the data, training windows, validation windows)"""
    if c.windows_per_step % ranks:
        raise ValueError(f"batch_size={c.batch_size} times grad_accum={c.grad_accum} is "
                         f"{c.windows_per_step} windows a step, which {ranks} processes cannot share evenly")
    meta, tokens = prepare.load(c.data)
    if (config.vocab_size or math.inf) < meta["vocab_size"]:
        raise ValueError(f"vocab_size={config.vocab_size} is less than the {meta['vocab_size']} of {c.data}, "
                         f"in tokens of {meta['tokenizer']}: prepare the data with another --tokenizer")
    config = dataclasses.replace(config, vocab_size=config.vocab_size or meta["vocab_size"])
    return config, meta, *(Windows(tokens[split], meta["bos"], config.block_size, device)
                           for split in ("train", "val"))


def start(config, c, meta, device):
    """(model, optimizers, state) of a new run: weights from the seed, or those of --init_from."""
    torch.manual_seed(c.seed)
    model = GPT(config)
    origin = ""
    if c.init_from:
        other = checkpoint.open_model(c.init_from)
        if not same_tokenizer(other.tokenizer, meta["tokenizer"]):
            raise ValueError(f"{c.init_from} reads tokens of {other.tokenizer}, but {c.data} has those of "
                             f"{meta['tokenizer']}: prepare the data with --tokenizer={other.tokenizer}")
        origin = f"with the weights of {c.init_from}{checkpoint.take_weights(model, other.model)}"
    if c.train_only == "gate" and (config.gate == "none" or not c.init_from):
        raise ValueError(f"train_only=gate with gate={config.gate}, init_from={c.init_from}: choose a gate, "
                         "and a trained model for the weights that stay as they are")
    model.to(device)
    return model, make_optimizers(model, c), {"step": 0, "seconds": 0.0, "log": [], "origin": origin}


def resume(config, c, meta, device):
    """(model, optimizers, state) of the last checkpoint. All else (batches, rate) follows from the step."""
    path = Path(c.out, "last.pt")
    model, saved = checkpoint.load(path)
    if model.config != config or saved["data"] != meta["train"]["sha256"] or not saved["optimizers"]:
        raise ValueError(f"{path} was trained with another model, or on other data than {c.data} is now, or "
                         "lacks an optimizer: prepare the same data again, or start anew with --init_from")
    if saved["step"] >= c.max_steps:
        raise ValueError(f"{path} is at step {saved['step']} already: a larger --max_steps goes on")
    model.to(device)
    optimizers = make_optimizers(model, c)
    for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    return model, optimizers, {"origin": "resumed", **{k: saved[k] for k in ("step", "seconds", "log")}}


# ---- evaluation ------------------------------------------------------------------------------------

MEASURE_WINDOWS = 64  # windows from val.bin, for the measurements


@torch.no_grad()
def evaluate(model, fast, val_set, val_meta, c, precision):
    """Validation loss in nats per token and in bits per byte; the measurements, as means over layers."""
    model.eval()
    total, offsets = 0.0, val_set.spaced(c.eval_windows)
    for part in np.array_split(offsets, math.ceil(len(offsets) / c.batch_size)):
        with precision:
            total += fast(*val_set.at(part))[1].item() * len(part)
    val_loss = total / len(offsets)
    bytes_per_token = (val_meta["bytes"] or math.nan) / val_meta["tokens"]
    row = {"val_loss": val_loss, "bits_per_byte": val_loss / math.log(2) / bytes_per_token}
    if c.attn_share:
        idx, _ = val_set.at(val_set.spaced(MEASURE_WINDOWS))  # (64, T)
        layers = measure(model, idx)
        row |= {"uniform_share": uniform_share(idx.size(1)), "layers": layers}
        for name in ("first_token_share", "gate_score", "max_activation"):
            row[name] = sum(layer[name] for layer in layers) / len(layers)  # the paper's mean over layers
    return row


# ---- the command line ------------------------------------------------------------------------------

# What may change when a run is resumed. All else stays as it was.
MAY_CHANGE = {"resume", "out", "max_steps", "eval_every", "attn_share", "device", "dtype", "compile",
              "threads"}


def parse_flags(argv=None):
    """The flags that were given, as {name: value}."""
    parser = parser_of(__doc__, "train.py", "[--preset=NAME] [--flag=value ...]", PRESETS)
    add_flags(parser, TrainConfig, GPTConfig)
    return vars(parser.parse_args(argv))


def make_configs(values):
    """(GPTConfig, TrainConfig) from one table of field values."""
    return tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
                 for cls in (GPTConfig, TrainConfig))


def configs_from(flags):
    """(GPTConfig, TrainConfig) from flags over a preset, or over the values of the run that is resumed."""
    if flags.get("resume"):
        if fixed := flags.keys() - MAY_CHANGE:
            raise ValueError("--resume goes on with a run as it was: leave out "
                             f"--{', --'.join(sorted(fixed))}, or start a new run with --init_from")
        out = flags.get("out") or str(checkpoint.newest_run())
        model, saved = checkpoint.load(Path(out, "last.pt"))
        return make_configs(dataclasses.asdict(model.config) | saved["train_config"] | {"overwrite": False}
                            | flags | {"out": out})
    device = machine.choose_device(flags.get("device", "auto"))
    preset = flags.get("preset", "gpu" if device.type == "cuda" else "laptop")
    if machine.is_first():
        print(f"preset   {preset} ({'as asked' if 'preset' in flags else f'on {device.type}'})")
    values = PRESETS[preset]
    if "init_from" in flags:  # the weights decide the shape, all but these two, and the data
        other = checkpoint.open_model(flags["init_from"])
        if not (other.data or "data" in flags):
            raise ValueError(f"{flags['init_from']} is a released model: name the --data to train on")
        free = {name: values[name] for name in ("block_size", "dropout") if name in values}
        values = values | dataclasses.asdict(other.model.config) | free | {"data": other.data}
    config, c = make_configs(values | flags)
    refuse_idle(flags, config, c)
    if flags.get("warmup_steps", 0) >= c.max_steps:
        raise ValueError(f"warmup_steps={c.warmup_steps} must be below max_steps={c.max_steps}: try a tenth")
    c.warmup_steps = flags.get("warmup_steps", min(c.warmup_steps, c.max_steps // 2))  # a preset may not fit
    return config, c


def main(argv=None):
    config, c = configs_from(parse_flags(argv))
    train(config, c)


if __name__ == "__main__":
    run_main(main)
