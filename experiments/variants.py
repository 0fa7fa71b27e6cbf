"""
Every row of the paper's tables as data, other people's cures beside them, and the recipes that compare them.

How to read a row, here row 6 of the paper's Table 1:

    "g2": Variant(dict(gate="g2"), "Table 1 #6", 5.820, *TABLE_4["g2"]),

g2 is the baseline with `--gate=g2`. The paper's perplexity is 5.820; its gate score, largest activation and
first-token share are in Table 4, which is in plumbing/report.py; nan is what the paper does not say. g2 is
compared with its pair, `none`, at equal numbers of parameters. A variant of your own is one more row, with
the fields of GPTConfig that it changes: `python experiments/compare_gates.py --variants=none,mine`.
Reading order: Variant -> VARIANTS -> TASKS -> values_of -> recipes_of -> configs_of.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from data import prepare
from gated_gpt import GPT
from plumbing.report import TABLE_4
from train import PRESETS, make_configs


class Variant(NamedTuple):
    """What a variant changes in the recipe, what the paper measured for it, and what it is compared with."""
    change: dict | Callable  # fields of GPTConfig, or a function from the recipe's GPTConfig to them
    row: str = ""  # where the paper has it,
    ppl: float = math.nan  # its perplexity there,
    score: float = math.nan  # gate score,
    m_act: float = math.nan  # largest activation,
    share: float = math.nan  # and first-token share
    pair: str = "none"  # the variant it is compared with; "none" also means: at equal parameter counts
    pair_ppl: float = 6.026  # that one's perplexity in the paper


def more_kv_heads(config):  # the paper: 4 -> 8
    if config.n_kv_head == config.n_head:
        raise ValueError(f"each of the {config.n_head} query heads has key/value heads of its own already; "
                         f"--n_kv_head={max(1, config.n_head // 2)} makes room")
    return {"n_kv_head": 2 * config.n_kv_head}


def more_query_heads(config):  # the paper: 32 -> 48; a multiple of the key/value heads, at least 1.5 as many
    return {"n_head": config.n_kv_head * math.ceil(1.5 * config.n_head / config.n_kv_head)}


MOE = dict(gate="none", n_expert=8, n_expert_active=2)  # as many active parameters as the dense model
VARIANTS = {
    "none": Variant(dict(gate="none"), "Table 1 #1", 6.026, *TABLE_4["none"]),
    # The parameters spent elsewhere
    "kv-heads": Variant(more_kv_heads, "Table 1 #2", 5.979),
    "q-heads": Variant(more_query_heads, "Table 1 #3", 5.953),
    # The five places
    "g1": Variant(dict(gate="g1"), "Table 1 #5", 5.761, *TABLE_4["g1"]),
    "g2": Variant(dict(gate="g2"), "Table 1 #6", 5.820, *TABLE_4["g2"]),
    "g3": Variant(dict(gate="g3"), "Table 1 #7", 6.016),
    "g4": Variant(dict(gate="g4"), "Table 1 #8", 5.981),
    "g5": Variant(dict(gate="g5"), "Table 1 #9", 6.017),
    # One score per head, or the same scores in all heads
    "g1-headwise": Variant(dict(gate="g1", gate_kind="headwise"), "Table 1 #10", 5.792,
                           *TABLE_4["g1-headwise"]),
    "g2-headwise": Variant(dict(gate="g2", gate_kind="headwise"), "Table 1 #11", 5.808),
    "g1-shared": Variant(dict(gate="g1", gate_shared=True), "Table 1 #12", 5.801, *TABLE_4["g1-shared"]),
    "g2-shared": Variant(dict(gate="g2", gate_shared=True), "Table 1 #13", 5.867),
    # Other operations and activations
    "g1-add-silu": Variant(dict(gate="g1", gate_op="add", gate_act="silu"), "Table 1 #14", 5.821),
    "g1-silu": Variant(dict(gate="g1", gate_act="silu"), "Table 1 #15", 5.822),
    # Where the non-linearity comes from
    "sdpa-norm": Variant(dict(gate="none", sdpa_norm=True), "Table 3", 5.847),
    "sdpa-silu": Variant(dict(gate="none", sdpa_silu=True), "Table 3", 5.975),
    "g1-add-identity": Variant(dict(gate="g1", gate_op="add", gate_act="identity"), "Table 3", 5.882),
    # What a gate needs to remove the sink: to see the query, and to be able to close
    "g1-no-input": Variant(dict(gate="g1", gate_input=False), "Table 4", 5.917, *TABLE_4["g1-no-input"]),
    "g1-ns-sigmoid": Variant(dict(gate="g1", gate_act="ns_sigmoid"), "Table 4", 5.900,
                             *TABLE_4["g1-ns-sigmoid"]),
    # Other people's cures: they change the softmax, where a gate filters its result
    "softmax1": Variant(dict(gate="none", attention="softmax1")),
    "learned": Variant(dict(gate="none", attention="learned")),
    "softpick": Variant(dict(gate="none", attention="softpick")),
    # The other way to steady training; in the paper at twice the learning rate, too much for the baseline
    "sandwich": Variant(dict(gate="none", norm="sandwich"), "Table 2", 7.407, pair_ppl=9.195),
    # Experts, compared among themselves, at the sizes that come out
    "moe": Variant(MOE, "Table 1 #1", 6.026, *TABLE_4["none"], pair="moe"),
    "moe-experts": Variant(MOE | dict(n_expert=9), "Table 1 #4", 5.964, pair="moe"),
    "moe-g1": Variant(MOE | dict(gate="g1"), "Table 1 #5", 5.761, *TABLE_4["g1"], pair="moe"),
}

TASKS = {  # the recipes: values of the fields of GPTConfig and TrainConfig
    # The sink in a minute: data/prepare.py, backcopy.
    "backcopy": PRESETS["sink"],
    # Real text, and the recipe that grows a sink on it: experiments/sink_on_text.py.
    "text": PRESETS["laptop"],
    # The same text with AdamW and QK-norm, as in the paper: no sink at this size.
    "python": dict(data="python", n_layer=4, n_head=4, n_kv_head=2, n_embd=64, block_size=64, batch_size=16,
                   max_steps=500, learning_rate=4e-3, warmup_steps=50, eval_windows=128),
}
# What a comparison decides, so that there are no flags for it.
DECIDED = {"gate", "gate_kind", "gate_shared", "gate_act", "gate_op", "gate_input", "attention", "sdpa_norm",
           "sdpa_silu", "norm", "n_expert", "n_expert_active", "vocab_size", "data", "out", "resume",
           "overwrite", "seed", "attn_share", "max_steps", "train_only", "init_from"}


def values_of(task, steps=None, **changes):
    """The baseline of a task, or of a prepared data set of that name: values of both configs' fields.

    Every experiment takes its recipes from here, so two that need the same run share it.
    """
    values = (TASKS.get(task) or TASKS["python"] | {"data": task}) | {"gate": "none", "attn_share": True}
    values["max_steps"] = steps or values["max_steps"]
    values["eval_every"] = math.ceil(values["max_steps"] / 12)  # enough for a curve
    values["vocab_size"] = prepare.load(values["data"])[0]["vocab_size"]
    return values | changes


def recipes_of(task, names, steps=None, **changes):
    """{variant: (GPTConfig, TrainConfig)} of a task, at equal parameters."""
    base, c = make_configs(values_of(task, steps, **changes))
    return {name: (config, c) for name, config in configs_of(names, base).items()}


def configs_of(names, base, say=print):
    """{name: GPTConfig} of the variants that can be had of this base, in the order of VARIANTS.

    Baselines join what is asked for. A variant that makes no sense here is left out, and `say` says why.
    """
    names, found, size = set(names) | {VARIANTS[name].pair for name in names}, {}, count(base)
    for name, (change, *_, pair, _) in VARIANTS.items():
        try:
            if name in names:
                config = dataclasses.replace(base, **(change(base) if callable(change) else change))
                found[name] = matched(config, size) if pair == "none" else config
        except ValueError as why:
            say(f"{name} is left out: {why}")
    return found


def count(config):
    """Parameters of a model of this config. The model is built without its numbers."""
    with torch.device("meta"):
        return GPT(config).num_params()


def matched(config, parameters):
    """`config` with the width inside the MLPs that brings it closest to this number of parameters."""
    spare, per_unit = count(config) - parameters, 3 * config.n_embd * config.n_layer  # a SwiGLU is 3 matrices
    return dataclasses.replace(config, mlp_hidden=config.mlp_hidden - round(spare / per_unit))
