"""Claims about the model: what each gate computes, that flipping it changes nothing else, experts, text.

The reference below is written from the paper's definitions, and not like the model: plain loops in float64,
one token, one head and one query at a time. test_measure.py borrows it.
"""
import itertools
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import watching

import gated_gpt
from gated_gpt import GPT, GPTConfig, KVCache, rope_table, sample


def choices(name):
    """What a field of GPTConfig may be. A new choice is tested without a change here, or fails here."""
    return get_args(GPTConfig.__dataclass_fields__[name].type)


GATES = choices("gate")[1:]  # without "none"
MOE = dict(n_expert=4, n_expert_active=2)
VARIANTS = {
    **{gate: dict(gate=gate) for gate in ("none", *GATES)},
    "g1-headwise": dict(gate="g1", gate_kind="headwise"),
    "g2-headwise": dict(gate="g2", gate_kind="headwise"),
    "g3-headwise": dict(gate="g3", gate_kind="headwise", qk_norm=False),
    "g4-headwise": dict(gate="g4", gate_kind="headwise", qk_norm=False),
    "g1-shared": dict(gate="g1", gate_shared=True), "g2-shared": dict(gate="g2", gate_shared=True),
    "g1-add-silu": dict(gate="g1", gate_op="add", gate_act="silu"),
    "g1-silu": dict(gate="g1", gate_act="silu"),
    "g1-add-identity": dict(gate="g1", gate_op="add", gate_act="identity"),
    "g1-ns-sigmoid": dict(gate="g1", gate_act="ns_sigmoid"), "g1-no-input": dict(gate="g1", gate_input=False),
    "g5-no-input": dict(gate="g5", gate_input=False),
    "sdpa-norm": dict(gate="none", sdpa_norm=True), "sdpa-silu": dict(gate="none", sdpa_silu=True),
    "softmax1": dict(gate="none", attention="softmax1"), "softpick": dict(gate="none", attention="softpick"),
    "g1-learned-gqa": dict(attention="learned", n_kv_head=2),
    "sandwich": dict(gate="none", norm="sandwich"),
    "g1-sandwich-tied": dict(norm="sandwich", tie_embeddings=True),
    "g1-gqa": dict(n_kv_head=2, head_dim=6), "g2-mqa": dict(gate="g2", n_kv_head=1),
    "g1-experts": MOE, "g2-gqa-experts": dict(gate="g2", n_kv_head=2, **MOE),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**fields):
    """A config with four heads of four channels, two layers and eleven tokens, but for the fields named."""
    small = dict(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=16, mlp_hidden=16)
    return GPTConfig(**(small | fields))


def seeded(config, seed=0):
    torch.manual_seed(seed)
    return GPT(config)


def lively(config, seed=0):
    """A model in evaluation mode whose numbers are far from their start, so that nothing is near 0 or 1."""
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.3 * noise if p.dim() > 1 else 0.7 + 0.3 * noise)
    return model.eval()


def tokens(*shape, seed=0):
    """Random tokens of tiny's vocabulary, with a BOS (token 0) in front of each row."""
    idx = torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(seed))
    idx[..., 0] = 0
    return idx


# ---- the reference ---------------------------------------------------------------------------------

@dataclass
class Trace:
    """What the reference computed for one row of tokens: logits (T, V), and what measure looks at."""
    logits: np.ndarray = None
    probabilities: list = field(default_factory=list)  # [layer][head][query] -> array of query + 1 numbers
    scores: list = field(default_factory=list)  # [layer] -> all gate scores
    activations: list = field(default_factory=list)  # [layer] -> (T, C), the block's output


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


SCORE = {
    "sigmoid": sigmoid,
    "ns_sigmoid": lambda z: 0.5 + 0.5 * sigmoid(z),
    "silu": lambda z: z * sigmoid(z),
    "identity": lambda z: z,
}
WEIGHTS = {  # of the keys that a query sees, from its scores s and its head's learned score b. Softpick's
    # small number is added after all has been divided by the largest power, if that is above 1.
    "softmax": lambda s, b: np.exp(s) / np.exp(s).sum(),
    "softmax1": lambda s, b: np.exp(s) / (1 + np.exp(s).sum()),
    "learned": lambda s, b: np.exp(s) / (np.exp(b) + np.exp(s).sum()),
    "softpick": lambda s, b: np.maximum(np.exp(s) - 1, 0) / (
        np.abs(np.exp(s) - 1).sum() + 1e-6 * np.exp(max(0, s.max()))),
}


def rms(x, eps, weight=1.0):
    return x / math.sqrt(np.mean(x * x) + eps) * weight


def turn(x, position, c):
    """RoPE on one head of one token: channels i and i + hs/2 are one complex number, turned by an angle."""
    half, hs, s, base, out = len(x) // 2, len(x), c.rope_factor, c.rope_base, np.zeros(len(x))
    for i in range(half):
        speed, length = base ** (-2 * i / hs), 1.0  # radians from one position to the next
        if c.rope_scaling == "linear":
            speed /= s
        elif c.rope_scaling == "yarn":
            # As in YaRN's code: a straight line over the pairs, from the last that turns 32 times in the
            # trained window (its speed stays) to the first that turns once (it gets s times slower).
            one, other = (hs * math.log(c.rope_trained / (turns * 2 * math.pi)) / (2 * math.log(base))
                          for turns in (32, 1))
            one, other = max(math.floor(one), 0), min(math.ceil(other), hs - 1)
            slow = min(max((i - one) / max(other - one, 0.001), 0), 1)
            speed, length = speed * (1 - slow) + speed / s * slow, 0.1 * math.log(s) + 1
        z = complex(x[i], x[i + half]) * np.exp(1j * position * speed) * length
        out[i], out[i + half] = z.real, z.imag
    return out


def apply_gate(c, w, heads, x, trace):
    """Gate a list of heads (each an array of one token's channels) by the scores that x gives."""
    size = 1 if c.gate_kind == "headwise" else len(heads[0])
    z = w["gate.gate_proj.weight"] @ x if c.gate_input else w["gate.constant"]
    scores = [SCORE[c.gate_act](part) for part in z.reshape(-1, size)]  # one array for each head
    if c.gate_shared:
        scores = [sum(scores) / len(heads)] * len(heads)
    trace.scores[-1].extend(np.concatenate(scores))
    return [y * s if c.gate_op == "multiply" else y + s for y, s in zip(heads, scores, strict=True)]


def queries_keys_values(c, w, x, position, trace):
    """One token: its queries, keys and values, each a list with one array per head."""
    parts = {"g4": np.split(w["q_proj.weight"] @ x, c.n_head),
             "g3": np.split(w["k_proj.weight"] @ x, c.n_kv_head),
             "g2": np.split(w["v_proj.weight"] @ x, c.n_kv_head)}
    if c.gate in parts:
        parts[c.gate] = apply_gate(c, w, parts[c.gate], x, trace)
    if c.qk_norm:
        parts["g4"] = [rms(q, c.norm_eps, w["q_norm.weight"]) for q in parts["g4"]]
        parts["g3"] = [rms(k, c.norm_eps, w["k_norm.weight"]) for k in parts["g3"]]
    q, k = ([turn(head, position, c) for head in parts[g]] for g in ("g4", "g3"))
    return q, k, parts["g2"]


def loop_attention(c, w, xs, trace):
    qkv = [queries_keys_values(c, w, x, t, trace) for t, x in enumerate(xs)]
    group, out = c.n_head // c.n_kv_head, []
    probabilities = [[] for _ in range(c.n_head)]
    for t, x in enumerate(xs):
        heads = []
        for h in range(c.n_head):
            q = qkv[t][0][h]
            scores = np.array([q @ qkv[s][1][h // group] / math.sqrt(c.head_dim) for s in range(t + 1)])
            b = w["sdpa.b"][h] if c.attention == "learned" else None
            probabilities[h].append(WEIGHTS[c.attention](scores, b))
            y = sum(p * qkv[s][2][h // group] for s, p in enumerate(probabilities[h][t]))
            y = rms(y, c.norm_eps, w["sdpa_norm.weight"]) if c.sdpa_norm else y
            heads.append(SCORE["silu"](y) if c.sdpa_silu else y)
        heads = apply_gate(c, w, heads, x, trace) if c.gate == "g1" else heads
        y = w["o_proj.weight"] @ np.concatenate(heads)
        out.append(apply_gate(c, w, [y], x, trace)[0] if c.gate == "g5" else y)
    trace.probabilities.append(probabilities)
    return out


def loop_experts(c, w, xs):
    """(outputs, router loss, visits) of a mixture of experts, token by token, in torch for its gradients."""
    outputs, shares, z = [], [], []
    visits = [0] * c.n_expert
    for x in xs:
        logits = w["router.weight"] @ x
        p = logits.exp() / logits.exp().sum()
        chosen = sorted(range(c.n_expert), key=lambda e: -p[e].item())[:c.n_expert_active]
        y = 0
        for e in chosen:
            visits[e] += 1
            gate, up, down = (w[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            a = gate @ x
            y = y + p[e] / sum(p[i] for i in chosen) * (down @ (a * a.sigmoid() * (up @ x)))
        outputs.append(y)
        shares.append(p)
        z.append(logits.exp().sum().log() ** 2)
    mean_share = [sum(p[e] for p in shares) / len(xs) for e in range(c.n_expert)]
    balance = c.n_expert * sum(n / sum(visits) * p for n, p in zip(visits, mean_share))
    return outputs, 0.01 * balance + 0.001 * sum(z) / len(xs), visits


def loop_mlp(c, w, xs, trace):
    if c.n_expert:
        as_torch = {name: torch.tensor(value) for name, value in w.items()}
        outputs, _, _ = loop_experts(c, as_torch, [torch.tensor(x) for x in xs])
        return [y.numpy() for y in outputs]
    gate, up, down = (w[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    return [down @ (SCORE["silu"](gate @ x) * (up @ x)) for x in xs]


def loop_forward(model, row):
    """The whole model on one row of tokens, as a Trace."""
    c, trace = model.config, Trace()
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    xs = [weights["embed.weight"][token] for token in row.tolist()]
    for layer in range(c.n_layer):
        trace.scores.append([])
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        for branch, function in (("attn", loop_attention), ("mlp", loop_mlp)):
            own = {name.removeprefix(f"{branch}."): value for name, value in w.items()}
            added = function(c, own, [rms(x, c.norm_eps, w[f"{branch}_norm.weight"]) for x in xs], trace)
            if c.norm == "sandwich":
                added = [rms(y, c.norm_eps, w[f"{branch}_post_norm.weight"]) for y in added]
            xs = [x + y for x, y in zip(xs, added)]
        trace.activations.append(np.stack(xs))
    head = weights["embed.weight" if c.tie_embeddings else "lm_head.weight"]
    trace.logits = np.stack([head @ rms(x, c.norm_eps, weights["norm.weight"]) for x in xs])
    return trace


# ---- what each variant computes --------------------------------------------------------------------

CHOICES = {name: choices(name) or (True, False)
           for name in ("gate_kind", "gate_shared", "gate_act", "gate_op", "gate_input")}
FORMS = [dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values())]
LONGER = dict(head_dim=12, rope_base=20.0, rope_factor=4.0, rope_trained=64)
SHAPES = {
    "plain": dict(), "mqa-wide-heads": dict(n_kv_head=1, head_dim=6),
    "no-qk-norm": dict(qk_norm=False), "sdpa-norm": dict(sdpa_norm=True, n_kv_head=2),
    "sdpa-silu": dict(sdpa_silu=True), "sandwich": dict(norm="sandwich", n_kv_head=2),
    "tied-other-constants": dict(tie_embeddings=True, rope_base=50.0, norm_eps=0.1, sdpa_norm=True),
    "experts": MOE,
    **{name: dict(attention=name, n_kv_head=2) for name in choices("attention")[1:]},
    **{scaling: dict(rope_scaling=scaling, **LONGER) for scaling in choices("rope_scaling")[1:]},
}


def makes_sense(gate, form, qk_norm):
    """Behind o_proj there are no heads, and QK-norm cancels one factor per head (but no summand)."""
    headwise, share = form["gate_kind"] == "headwise", form["gate_shared"]
    if headwise and share or gate == "g5" and (headwise or share):
        return False
    return not (headwise and gate in ("g3", "g4") and qk_norm and form["gate_op"] == "multiply")


@torch.no_grad()
def assert_same_logits(model, other, idx, tolerance=1e-5):
    assert (model(idx)[0] - other(idx)[0]).abs().max() < tolerance


def assert_agrees_with_loops(model):
    idx = tokens(1, 5)
    expected = loop_forward(model, idx[0]).logits
    with torch.no_grad():
        found = model(idx)[0][0].double().numpy()
    error = np.abs(found - expected).max() / max(1, np.abs(expected).max())
    assert error < 1e-5, model.config


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no-qk-norm"])
@pytest.mark.parametrize("gate", GATES)
def test_every_form_of_a_gate_agrees_with_plain_loops_or_makes_no_sense_and_is_refused(gate, qk_norm):
    for form in FORMS:
        fields = dict(gate=gate, qk_norm=qk_norm, n_kv_head=2, head_dim=6, n_layer=1, **form)
        if makes_sense(gate, form, qk_norm):
            assert_agrees_with_loops(lively(tiny(**fields)))
        else:
            with pytest.raises(ValueError, match="exclude each other|QK-norm cancels"):
                tiny(**fields)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_agrees_with_plain_loops_with_each_gate_and_without(shape):
    for gate in ("none", *GATES):
        assert_agrees_with_loops(lively(tiny(gate=gate, **shape)))


@pytest.mark.parametrize("hs, base, trained", [  # in 4, no pair turns once; in 1950 all do, often
    (128, 1e6, 32768), (64, 1e4, 2048), (12, 20.0, 1950), (12, 20.0, 4)])
@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_the_angles_of_models_of_any_size_are_those_of_the_loops(scaling, hs, base, trained):
    longer = dict(rope_scaling=scaling, rope_factor=4.0, rope_trained=trained) if scaling != "none" else {}
    config = tiny(n_head=1, head_dim=hs, rope_base=base, block_size=2001, **longer)
    cos, sin = rope_table(config)
    for position in (0, 1, 60, 2000):
        expected = turn(np.repeat([1.0, 0.0], hs // 2), position, config)  # all cosines, then all sines
        found = torch.cat((cos[position, 0, :hs // 2], sin[position, 0, hs // 2:])).numpy()
        assert np.abs(found - expected).max() < 1e-6 * (position + 1)  # of a float32 of this size


def test_the_defaults_are_a_small_model_with_the_usual_constants_and_a_gate_at_g1():
    c = GPTConfig()
    assert (c.block_size, c.n_layer, c.n_head, c.n_embd, c.gate, c.qk_norm) == (256, 4, 4, 128, "g1", True)
    assert (c.rope_base, c.norm_eps, c.dropout, c.n_expert, c.n_expert_active) == (10_000, 1e-6, 0, 0, 2)
    for n_embd, width in ((2, 16), (16, 48), (64, 176), (128, 336), (384, 1024)):  # 8/3, in multiples of 16
        assert tiny(n_embd=n_embd, n_head=1, mlp_hidden=None).mlp_hidden == width


@pytest.mark.parametrize("attention", choices("attention")[1:])
def test_other_attentions_stay_finite_at_scores_of_any_size(attention):
    for size in (1e-4, 1.0, 1e3):
        model, idx = lively(tiny(attention=attention, qk_norm=False)), tokens(2, 8)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.q_proj.weight, std=size)
        model(idx, idx)[1].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters()), size


@pytest.mark.parametrize("fields", [
    dict(block_size=8), dict(block_size=16, rope_scaling="yarn", rope_factor=2.0, rope_trained=8)], ids=str)
def test_another_window_is_that_of_a_config_that_asks_for_it_and_the_own_rope_is_not_lost(fields):
    model = lively(tiny(**fields))
    for size, scaling, asked in (
            (32, "yarn", dict(rope_scaling="yarn", rope_factor=4.0, rope_trained=8)),
            (32, "linear", dict(rope_scaling="linear", rope_factor=4.0, rope_trained=8)),
            (8, "yarn", {}), (32, "none", {}), (fields["block_size"], "none", {})):  # {}: RoPE as trained
        model.set_window(size, scaling)
        other = lively(tiny(**fields | dict(block_size=size) | asked))
        assert model.config == other.config
        assert_same_logits(model, other, tokens(1, size), 1e-9)
    assert tiny(block_size=30, rope_scaling="linear", rope_factor=4.0).rope_trained == 8  # 30 / 4


# ---- the start of training -------------------------------------------------------------------------

@pytest.mark.parametrize("change, changed", [
    *((fields, ("lm_head",) if "tie_embeddings" in fields else ()) for fields in VARIANTS.values()),
    (dict(n_layer=1), ("o_proj", "down_proj")), (dict(qk_norm=False), ()), (dict(n_kv_head=1), ()),
    (dict(mlp_hidden=32), ()), (dict(rope_base=50.0, norm_eps=0.1, dropout=0.5), ())], ids=str)
def test_flipping_the_gate_or_another_flag_leaves_matrices_of_the_same_name_and_shape_alone(change, changed):
    one, other = seeded(tiny(gate="none")).state_dict(), seeded(tiny(**change)).state_dict()
    assert len(one.keys() & other.keys()) > 10
    for name in one.keys() & other.keys():
        if one[name].shape == other[name].shape:
            assert torch.equal(one[name], other[name]) != any(part in name for part in changed), name


@pytest.mark.parametrize("fields", [dict(n_layer=1), dict(n_layer=3), MOE,
                                    dict(gate_input=False, attention="learned")], ids=str)
def test_matrices_start_at_002_and_smaller_into_the_residual_stream_and_no_two_alike(fields):
    config, seen = tiny(vocab_size=64, n_embd=64, mlp_hidden=64, **fields), set()
    for name, p in seeded(config).named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith(("gate.constant", "sdpa.b")) else 1)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * config.n_layer) if "o_proj" in name or "down_proj" in name else 0.02
        assert abs(p.mean()) < 5 * std / math.sqrt(p.numel()), name
        assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
        first = round(p.flatten()[0].item() / std, 4)
        assert first not in seen, name
        seen.add(first)


@pytest.mark.parametrize("active, width", [(1, 24), (2, 12), (3, 8), (4, 8)])
def test_active_experts_are_together_as_wide_as_the_mlp_but_each_at_least_8_and_a_tied_head_counts_once(
        active, width):  # test_experiments.py counts the parameters of all variants
    tied, untied = (GPT(tiny(mlp_hidden=24, n_expert=4, n_expert_active=active, tie_embeddings=t))
                    for t in (True, False))
    assert [expert.up_proj.out_features for expert in tied.blocks[0].mlp.experts] == [width] * 4
    assert untied.num_params() == tied.num_params() + 11 * 16


# ---- gradients and losses -----------------------------------------------------------------------

@every_variant
def test_the_gradient_reaches_every_number_of_every_parameter(variant):
    model = lively(tiny(**variant)).train()
    idx = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(s)) for s in range(6)])
    model(idx[:, :8], idx[:, 1:9])[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad != 0).float().mean() > 0.99, name


@pytest.mark.parametrize("name", ["g1", "g1-experts"])
def test_the_loss_is_the_mean_cross_entropy_in_nats_and_in_training_the_router_losses_too(name):
    model, idx, targets = lively(tiny(**VARIANTS[name])), tokens(2, 8), tokens(2, 8, seed=1)
    rows = [loop_forward(model, row).logits for row in idx]
    nats = [np.log(np.exp(rows[b][t]).sum()) - rows[b][t][targets[b, t]] for b in range(2) for t in range(8)]
    loss = model(idx, targets)[1].item()
    assert loss == pytest.approx(np.mean(nats), abs=1e-5) and model(idx)[1] is None
    router = sum(block.mlp.router_loss.item() for block in model.blocks) if "experts" in name else 0.0
    assert router == 0.0 or router > 0.02  # 0.01 is the least that one layer can have
    assert model.train()(idx, targets)[1].item() == pytest.approx(loss + router, abs=1e-5)


def test_dropout_acts_in_training_only():
    model, idx = lively(tiny(dropout=0.5)), tokens(2, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert_same_logits(model, lively(tiny()), idx, 1e-6)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_in_bfloat16_the_logits_are_nearly_the_same():
    model, idx = lively(tiny(**VARIANTS["g2-gqa-experts"])), tokens(2, 8)
    with torch.no_grad():
        exact = model(idx)[0]
        with torch.autocast("cpu", torch.bfloat16):
            products = model(idx)[0]
        for p in model.parameters():  # as sample.py does; the angles of RoPE stay float32
            p.data = p.data.bfloat16()
        weights = model(idx)[0]
    for rounded in (products, weights):
        assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("n_expert, active, wanted", [  # wanted: this expert is, by all tokens
    (1, 1, None), (4, 2, None), (4, 3, None), (8, 8, None), (4, 1, 2), (4, 2, 2)])
def test_experts_agree_with_a_loop_over_tokens_in_outputs_losses_and_gradients(n_expert, active, wanted):
    config = tiny(n_expert=n_expert, n_expert_active=active)
    module, generator = lively(config).blocks[0].mlp, torch.Generator().manual_seed(0)
    x, direction = torch.rand(2, 7, 16, generator=generator), torch.randn(2, 7, 16, generator=generator)
    if wanted:  # none of its tokens is dropped, and the gradients of experts without tokens are 0, not None
        module.router.weight.data[wanted] = 5
    ours = dict(module.named_parameters()) | {"x": x.requires_grad_()}
    theirs = {name: p.detach().double().requires_grad_() for name, p in ours.items()}
    outputs, expected_loss, visits = loop_experts(config, theirs, list(theirs["x"].flatten(0, 1)))
    y, expected = module(x), torch.stack(outputs).view(2, 7, 16)
    assert torch.allclose(y.double(), expected, atol=1e-5) and (y.abs().amax(-1) > 1e-4).all()
    assert module.router_loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    assert wanted is None or visits[wanted] == 14 and (active > 1 or visits.count(0) == 3)
    ((y * direction).sum() + 100 * module.router_loss).backward()  # 100 times: else it would hardly count
    ((expected * direction).sum() + 100 * expected_loss).backward()
    for name, p in ours.items():
        reached = theirs[name].grad if theirs[name].grad is not None else torch.zeros_like(theirs[name])
        assert torch.allclose(p.grad.double(), reached, atol=1e-4, rtol=1e-4), name


# ---- generation ------------------------------------------------------------------------------------

@every_variant
def test_cached_logits_equal_uncached_ones(variant):
    model, idx = lively(tiny(**variant)), tokens(2, 8)
    with torch.no_grad():
        expected = model(idx)[0]
        for chunks in ([1] * 8, [3, 2, 3], [7, 1]):
            cache = KVCache(model, 2, 8)
            found = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1)
            assert (found - expected).abs().max() < 1e-5, chunks


def windows(prompt, text, block_size):
    """What the model should see before each new token: all, or BOS and the last half if that is too long."""
    window = prompt
    for token in text[len(prompt):]:
        if len(window) > block_size:
            window = window[:1] + window[-(block_size // 2):]
        yield window
        window = window + [token]


@pytest.mark.parametrize("prompt_length", [1, 3, 8, 9, 21])
@pytest.mark.parametrize("block_size", [2, 3, 5, 8])
def test_each_new_token_of_a_row_is_that_of_a_plain_forward_over_its_window(block_size, prompt_length):
    model = lively(tiny(block_size=block_size, **VARIANTS["g2-gqa-experts"]))
    prompt, forwards = tokens(2, prompt_length), []  # of each: how many tokens, and logits of the last one
    with watching(lambda model, inputs, output: forwards.append((inputs[0].size(1), output[0][:, -1]))):
        text = model.generate(prompt, 20, temperature=0)
    assert text.shape == (2, prompt_length + 20) and torch.equal(text[:, :prompt_length], prompt)
    for row in range(2):
        before = None
        steps = windows(prompt[row].tolist(), text[row].tolist(), block_size)
        for i, (window, (width, logits)) in enumerate(zip(steps, forwards, strict=True)):
            with torch.no_grad():
                expected = model(torch.tensor([window]))[0][0, -1]
            assert (logits[row] - expected).abs().max() < 1e-5 and not logits.requires_grad
            assert text[row, prompt_length + i] == expected.argmax()
            assert width == (1 if window[:-1] == before else len(window))  # the cache has the rest
            before = window


@pytest.mark.parametrize("options", [dict(temperature=0, top_k=3), dict(top_k=1), dict(temperature=1e-4),
                                     dict(temperature=5.0, top_k=1), dict(temperature=1e-40)], ids=str)
def test_a_temperature_near_zero_or_a_top_k_of_one_is_greedy(options):
    model, idx = lively(tiny()), tokens(2, 4)
    assert torch.equal(model.generate(idx, 4, **options), model.generate(idx, 4, temperature=0))


def test_without_options_tokens_are_drawn_from_all_at_temperature_1():
    model, idx = lively(tiny()), tokens(1, 4).expand(50, -1)
    dice = [torch.Generator().manual_seed(0) for _ in range(3)]
    asked = model.generate(idx, 4, 1.0, None, dice[0])
    streamed = torch.stack([*model.stream(idx, 4, generator=dice[1])], dim=1)
    assert torch.equal(model.generate(idx, 4, generator=dice[2]), asked) and len(asked.unique()) > 5
    assert torch.equal(streamed, asked[:, 4:])


def test_top_k_is_k_tokens_also_where_logits_are_equal():
    for k, dtype in itertools.product(range(1, 6), (torch.float32, torch.bfloat16)):
        rows = torch.tensor([[2.0, 2, 2, 1, 0]], dtype=dtype).expand(1000, -1)
        assert len(sample(rows, 1.0, k, torch.Generator().manual_seed(0)).unique()) == k


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 4), (1.0, 99)])
def test_sampling_follows_the_softmax_with_temperature_over_the_top_k(temperature, top_k):
    logits = [0.3, -1.0, 2.0, 1.0, 0.0, -3.0]
    kept = sorted(logits)[-(top_k or 6):]
    weights = [math.exp(z / temperature) if z in kept else 0 for z in logits]
    rows = torch.tensor(logits).expand(20_000, 6)
    drawn = sample(rows, temperature, top_k, torch.Generator().manual_seed(0)).flatten().bincount(minlength=6)
    for count, weight in zip(drawn.tolist(), weights):
        assert count / 20_000 == pytest.approx(weight / sum(weights), abs=0.015)
        assert count == 0 or weight > 0


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was_even_when_it_fails_or_is_broken_off(training):
    model = lively(tiny(dropout=0.5)).train(training)
    greedy = [model.generate(tokens(1, 4), 10, temperature=0) for _ in range(2)]
    assert torch.equal(*greedy)  # no dropout meanwhile
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[0, 11]]), 3)
    assert all(module.training == training for module in model.modules())
    stream = model.stream(tokens(1, 4), 10)
    next(stream)
    stream.close()
    assert all(module.training == training for module in model.modules())


# ---- mistakes ----------------------------------------------------------------------------------------

NUMBERS = "vocab_size n_layer n_head n_kv_head n_embd head_dim mlp_hidden n_expert_active".split()
WRONG = [  # (fields, parts of the sentence)
    (dict(gate="g9"), ["gate='g9'", "g1", "g5"]), (dict(gate=None), ["gate=None"]),
    (dict(gate_kind="channel"), ["gate_kind='channel'", "elementwise", "headwise"]),
    (dict(gate_act="relu"), ["'relu'", "ns_sigmoid"]), (dict(gate_op="divide"), ["'divide'", "add"]),
    *[({name: 0}, [f"{name}=0", "at least 1"]) for name in NUMBERS], (dict(norm="post"), ["norm='post'"]),
    *[({name: 2**31}, [f"{name}={2**31}", "below 2^31"]) for name in NUMBERS],
    (dict(n_expert=-1), ["n_expert=-1", "at least 0"]), (dict(block_size=1), ["block_size=1", "at least 2"]),
    (dict(n_embd=18), ["n_embd=18", "n_head=4", "head_dim"]), (dict(head_dim=5), ["head_dim=5", "odd"]),
    (dict(n_embd=12), ["head_dim=3", "odd"]), (dict(n_kv_head=3), ["n_head=4", "n_kv_head=3"]),
    (dict(n_kv_head=8), ["n_head=4", "n_kv_head=8"]), (dict(dropout=-0.1), ["dropout=-0.1"]),
    *[(dict(gate=gate, gate_kind="headwise"), ["headwise", f"gate={gate}"]) for gate in ("g3", "g4", "g5")],
    (dict(gate="g5", gate_shared=True), ["gate=g5", "shared"]), (dict(dropout=math.nan), ["dropout=nan"]),
    (dict(gate_kind="headwise", gate_shared=True), ["gate_kind=headwise", "gate_shared"]),
    (dict(norm_eps=-1e-6), ["norm_eps=-1e-06"]), (dict(rope_base=0.5), ["rope_base=0.5", "at least 1"]),
    (dict(rope_scaling="yarn", rope_factor=0.5), ["rope_factor=0.5", "at least 1"]),
    (dict(n_expert=2, n_expert_active=3), ["n_expert=2", "n_expert_active=3"]),
    (dict(rope_factor=1.5), ["rope_scaling=none, rope_factor=1.5, rope_trained=None: set the first two"]),
    (dict(rope_scaling="yarn"), ["rope_scaling=yarn, rope_factor=1,"]), (dict(rope_trained=9), ["trained=9"]),
    (dict(rope_scaling="yarn", rope_trained=9), ["rope_factor=1, rope_trained=9: set the first two"]),
]


@pytest.mark.parametrize("fields, said", WRONG, ids=str)
def test_a_config_that_makes_no_sense_is_refused_with_its_values(fields, said):
    with pytest.raises(ValueError) as error:
        tiny(**fields)
    assert all(part in str(error.value) for part in said), error.value
    assert "\n" not in str(error.value)


def test_a_model_needs_its_vocabulary_and_a_text_that_fits_into_its_window():
    with pytest.raises(ValueError, match="vocab_size=None"):
        GPT(GPTConfig())
    with pytest.raises(ValueError, match="9.*block_size=8"):
        lively(tiny())(tokens(1, 9))


def test_the_file_of_the_model_imports_nothing_from_the_rest_of_the_project():
    source = Path(gated_gpt.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M))
    assert "torch" in imported and imported - {"torch"} <= sys.stdlib_module_names
