"""
Gated attention in one file: a small GPT in plain PyTorch, to be read from top to bottom.

The idea ("Gated Attention for Large Language Models", arXiv 2505.06708): the weights of softmax attention
sum to one, so a head cannot say "nothing here". It puts them on the first token instead. This is the
attention sink. Now multiply what attention returns by a gate that looks at the current token,

    Y' = Y * sigmoid(X W)

and the head can close. The sink disappears, and in the paper the model also gets better.

Reading order: GPTConfig -> Gate -> Attention.forward, where all five places of a gate are on one screen ->
measure, which reads the sink from outside -> RoPE and other cures -> Block -> GPT. This file needs no other
file of the project, so you can copy it alone.

Names, in the shapes below and in the paper:
    B, T   batch, time (tokens in a window)      C    channels, n_embd (the paper's d_model)
    nh     query heads, n_head (q)               nkv  key/value heads, n_kv_head (k)
    hs     channels of one head, head_dim (d_k)  V    vocab_size
    x      in Attention and Gate: the normalised input (B, T, C), the paper's X, from which q, k, v and the
           scores are made; in Block and GPT: the residual stream (B, T, C)
    y      what the gate acts on: the paper's Y    S    number of keys: T, or more with a cache
    G1..G5 the five places of a gate: see Attention.forward
"""
import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    """The shape of the model. A field is a flag of train.py, and its comment is the flag's help.
    ValueError when a value makes no sense, or two contradict each other."""
    # --- model ---
    vocab_size: int | None = None  # V: number of different tokens; default: what the data has
    block_size: int = 256  # T: tokens in a window, including the BOS token in front
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # query heads per layer
    n_kv_head: int | None = None  # key/value heads (grouped-query attention); default: n_head
    n_embd: int = 128  # C: width of the residual stream
    head_dim: int | None = None  # channels of a head, an even number; default: n_embd / n_head
    mlp_hidden: int | None = None  # width inside the SwiGLU; default: 8/3 n_embd, rounded to a multiple of 16
    rope_base: float = 10000.0  # base of the rotary embedding's wavelengths
    rope_scaling: Literal["none", "linear", "yarn"] = "none"  # for windows longer than the trained one
    rope_factor: float = 1.0  # how many times longer
    rope_trained: int | None = None  # the trained window; default: block_size / rope_factor
    attention: Literal["softmax", "softmax1", "learned", "softpick"] = "softmax"  # see OtherSDPA
    qk_norm: bool = True  # RMSNorm on each head's queries and keys, before RoPE
    norm: Literal["pre", "sandwich"] = "pre"  # sandwich: also normalise each branch's output (paper, Table 2)
    norm_eps: float = 1e-6  # added to the mean square inside RMSNorm
    tie_embeddings: bool = False  # the output head uses the embedding matrix
    dropout: float = 0.0  # on the embedding and on each branch's output, during training
    # --- gate ---
    gate: Literal["none", "g1", "g2", "g3", "g4", "g5"] = "g1"  # where the gate sits; g1: on the SDPA output
    gate_kind: Literal["elementwise", "headwise"] = "elementwise"  # one score per channel, or one per head
    gate_shared: bool = False  # each head uses the mean of all heads' scores (the paper's head-shared)
    gate_act: Literal["sigmoid", "ns_sigmoid", "silu", "identity"] = "sigmoid"  # from x W to the score
    gate_op: Literal["multiply", "add"] = "multiply"  # how the score is applied to y
    gate_input: bool = True  # off: scores are learned constants that do not see x (input-independent)
    sdpa_norm: bool = False  # RMSNorm on each head's SDPA output (Table 3, there without a gate)
    sdpa_silu: bool = False  # SiLU on the SDPA output (Table 3, there without a gate)
    # --- mixture of experts ---
    n_expert: int = 0  # experts in place of each MLP; 0: a dense model
    n_expert_active: int = 2  # experts that each token goes through

    def __post_init__(self):
        check_fields(self, n_expert=0, block_size=2, rope_base=1, rope_factor=1)
        uneven = self.head_dim is None and self.n_embd % self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.mlp_hidden = self.mlp_hidden or max(16, 16 * round(self.n_embd * 8 / 3 / 16))
        headwise, normed = self.gate_kind == "headwise", self.qk_norm and self.gate in ("g3", "g4")
        scaled, longer = self.rope_scaling != "none", self.rope_factor > 1
        for wrong, why in (
            (uneven, f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: set head_dim"),
            (self.head_dim % 2, f"head_dim={self.head_dim}, n_embd / n_head, is odd, but RoPE needs pairs"),
            (self.n_head % self.n_kv_head,
             f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}"),
            (scaled != longer or self.rope_trained and not scaled, f"rope_scaling={self.rope_scaling}, "
             f"rope_factor={self.rope_factor:g}, rope_trained={self.rope_trained}: set the first two"),
            (headwise and normed and self.gate_op == "multiply", f"gate_kind=headwise with gate={self.gate}: "
             "QK-norm cancels one score per head; use elementwise, or --no-qk_norm"),
            ((self.gate == "g5") + headwise + self.gate_shared > 1, "gate=g5 (whose output has no heads), "
             "gate_kind=headwise and gate_shared exclude each other: choose one of them"),
            (0 < self.n_expert < self.n_expert_active,
             f"n_expert_active={self.n_expert_active} is more than n_expert={self.n_expert}")):
            if wrong:
                raise ValueError(why)
        if scaled:
            self.rope_trained = self.rope_trained or round(self.block_size / self.rope_factor)


# ---- the gate, and the attention it sits in --------------------------------------------------------


class Gate(nn.Module):
    """How a score is computed, and how it is applied to y. Where the gate sits is decided in Attention.

    y_shape: (nh, hs) at G1 and G4, (nkv, hs) at G2 and G3, (C,) at G5. x W is near 0 at first: a sigmoid is
    half open. Paper: eq. 5. Authors' code: Qwen3Attention.forward, where W is more rows of q_proj.
    """
    ACTIVATIONS = {
        "sigmoid": torch.sigmoid,  # 0..1: can close
        "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),  # "non-sparse", 0.5..1: cannot close (Table 4)
        "silu": F.silu,
        "identity": lambda z: z,
    }

    def __init__(self, config, y_shape):
        super().__init__()
        self.score_shape = (y_shape[0], 1) if config.gate_kind == "headwise" else y_shape
        n_scores = math.prod(self.score_shape)  # scores of one token
        self.shared, self.op, self.act = config.gate_shared, config.gate_op, self.ACTIVATIONS[config.gate_act]
        self.gate_proj = nn.Linear(config.n_embd, n_scores, bias=False) if config.gate_input else None  # W
        self.constant = None if config.gate_input else nn.Parameter(torch.zeros(n_scores))  # instead of x W

    def score(self, x):
        """(B, T, C) -> (B, T, *y_shape), where hs is 1 when headwise and nh is 1 when shared."""
        z = self.gate_proj(x) if self.gate_proj else self.constant.expand(*x.shape[:2], -1)
        score = self.act(z.unflatten(-1, self.score_shape))  # z: (B, T, n_scores)
        # Sharing does not make W smaller: every head's scores are made, then averaged (Table 1, rows 12, 13).
        return score.mean(-2, keepdim=True) if self.shared else score

    def forward(self, y, x):
        return y * self.score(x) if self.op == "multiply" else y + self.score(x)


class Attention(nn.Module):
    """Causal self-attention on the normalised x, (B, T, C) -> (B, T, C). Its forward shows all five gates.

    Paper: eq. 1 to 4, and Figure 1 for the five places. Authors' code: Qwen3Attention, with G1 only.
    """

    def __init__(self, config, layer):
        super().__init__()
        C, nh, nkv, hs = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.gate_at = layer, config.gate
        self.q_shape, self.kv_shape = (nh, hs), (nkv, hs)
        self.q_proj = nn.Linear(C, nh * hs, bias=False)
        self.k_proj = nn.Linear(C, nkv * hs, bias=False)
        self.v_proj = nn.Linear(C, nkv * hs, bias=False)
        self.o_proj = nn.Linear(nh * hs, C, bias=False)
        self.q_norm = RMSNorm(hs, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hs, config.norm_eps) if config.qk_norm else nn.Identity()
        self.sdpa = SDPA() if config.attention == "softmax" else OtherSDPA(config)
        self.sdpa_norm = RMSNorm(hs, config.norm_eps) if config.sdpa_norm else nn.Identity()
        self.sdpa_silu = nn.SiLU() if config.sdpa_silu else nn.Identity()
        y_shape = {"g1": (nh, hs), "g2": (nkv, hs), "g3": (nkv, hs), "g4": (nh, hs), "g5": (C,)}
        if config.gate in y_shape:
            self.gate = Gate(config, y_shape[config.gate])

    def forward(self, x, cos, sin, cache=None):
        q = self.q_proj(x).unflatten(-1, self.q_shape)  # (B, T, nh, hs)
        k = self.k_proj(x).unflatten(-1, self.kv_shape)  # (B, T, nkv, hs)
        v = self.v_proj(x).unflatten(-1, self.kv_shape)  # (B, T, nkv, hs)
        if self.gate_at == "g4": q = self.gate(q, x)  # G4: the queries
        if self.gate_at == "g3": k = self.gate(k, x)  # G3: the keys
        if self.gate_at == "g2": v = self.gate(v, x)  # G2: the values
        q, k = rope(self.q_norm(q), cos, sin), rope(self.k_norm(k), cos, sin)
        k, v, mask = cache.extend(self.layer, k, v) if cache else (k, v, None)
        y = self.sdpa(q, k, v, mask)  # (B, T, nh, hs)
        y = self.sdpa_silu(self.sdpa_norm(y))  # two alternatives to a gate (Table 3), off by default
        if self.gate_at == "g1": y = self.gate(y, x)  # G1: the SDPA output, the paper's choice
        y = self.o_proj(y.flatten(2))  # (B, T, C)
        if self.gate_at == "g5": y = self.gate(y, x)  # G5: the output of o_proj
        return y


class SDPA(nn.Module):
    """softmax(q k^T / sqrt(hs)) v, causal. It is a module, so that a hook can read its inputs."""

    def forward(self, q, k, v, mask=None):  # q (B, T, nh, hs), k and v (B, S, nkv, hs), mask (T, S): who sees
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # the kernel wants heads first
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2)  # (B, nh, T, hs) -> (B, T, nh, hs)


# ---- measuring, from outside -----------------------------------------------------------------------


@contextmanager
def evaluating(model, hooks=()):
    """The model in evaluation mode, watched by hooks [(module, function)]. Both are undone at the end."""
    was_training = model.training
    handles = [module.register_forward_hook(function) for module, function in hooks]
    try:
        yield model.eval()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def uniform_share(T):
    """First-token share of uniform attention, the floor: the mean of 1/t over t = 1..T."""
    return sum(1 / t for t in range(1, T + 1)) / T


@torch.no_grad()
def measure(model, idx):
    """The paper's measurements (Table 4: share, score, activation) on tokens idx (B, T): a dict per layer.

    first_token_share          attention probability on token 0: mean over heads and queries, query 0 (with
                               its share of 1) included; uniform_share(T) if attention is uniform
    first_token_share_by_head  the same, one number per query head
    late_first_token_share     the same over queries t >= T/4 only
    gate_score                 mean score over tokens, heads and channels; nan without a gate
    max_activation             largest |x| after the block, over tokens and channels

    Takes the model before torch.compile. Memory is O(T): no T x T matrix is made.
    """
    def on_sdpa(row, sdpa, inputs, output):
        q, k, v = inputs[:3]
        first = torch.zeros_like(v)  # (B, T, nkv, hs)
        first[:, 0] = 1  # values that say "I am token 0": what comes out *is* the probability on token 0
        share = sdpa.forward(q, k, first)[..., 0].float()  # (B, T, nh); .forward, so that no hook runs again
        row["first_token_share"] = share.mean().item()
        row["first_token_share_by_head"] = share.mean((0, 1)).tolist()
        row["late_first_token_share"] = share[:, math.ceil(idx.size(1) / 4):].mean().item()

    def on_gate(row, gate, inputs, output):
        row["gate_score"] = gate.score(inputs[1]).float().mean().item()

    def on_block(row, block, inputs, output):
        row["max_activation"] = output.abs().max().item()

    rows, hooks = [], []
    for block in model.blocks:
        rows.append(row := {"gate_score": math.nan})
        hooks += [(block.attn.sdpa, partial(on_sdpa, row)), (block, partial(on_block, row))]
        hooks += [(gate, partial(on_gate, row)) for gate in block.modules() if isinstance(gate, Gate)]
    with evaluating(model, hooks):
        model(idx)
    return rows


@torch.no_grad()
def attention_maps(model, idx):
    """Attention probabilities on tokens idx (B, T), for short texts: a list with one (B, T, T, nh) per layer.

    Indices are [batch, query, key, head]. The trick is measure's: with one-hot values, token s says "I am s".
    """
    maps = []

    def on_sdpa(sdpa, inputs, output):
        q, k, v = inputs[:3]
        one_hot = torch.eye(k.size(1)).to(v)[None, :, None]  # (1, T, 1, T)
        maps.append(sdpa.forward(q, k, one_hot.expand(*k.shape[:3], -1)).transpose(2, 3))

    with evaluating(model, [(block.attn.sdpa, on_sdpa) for block in model.blocks]):
        model(idx)
    return maps


# ---- RoPE, and other cures than a gate -------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # torch's fast kernel wants x and weight in one dtype
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def rope_table(config):
    """(cos, cos) and (-sin, sin) of the angles of every position, (block_size, 1, hs) each.

    rope_scaling is for windows s = rope_factor times longer than trained. linear: all pairs of channels turn
    s times slower (arXiv 2306.15595). yarn: slow pairs do, and q and k become longer (arXiv 2309.00071).
    """
    hs, s, base, trained = config.head_dim, config.rope_factor, config.rope_base, config.rope_trained
    frequency = base ** (-torch.arange(0, hs, 2) / hs)  # (hs/2,): radians from one position to the next
    if config.rope_scaling == "linear":
        frequency = frequency / s
    length = 1.0  # of q and of k
    if config.rope_scaling == "yarn":
        # A straight line over the pairs, from the last that turns 32 times in the trained window (its speed
        # stays) to the first that turns once (s times slower). The numbers are those of YaRN's own code.
        last, first = (hs / 2 * math.log(trained / (2 * math.pi * turns), base) for turns in (32, 1))
        last, first = max(0, math.floor(last)), min(hs - 1, math.ceil(first))
        slow = ((torch.arange(hs // 2) - last) / max(0.001, first - last)).clamp(0, 1)  # (hs/2,)
        frequency = frequency * (1 - slow) + frequency / s * slow
        length = 0.1 * math.log(s) + 1
    angle = torch.arange(config.block_size)[:, None, None] * frequency  # (block_size, 1, hs/2)
    cos, sin = length * angle.cos(), length * angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(h, cos, sin):
    """Turn channels i and i + hs/2 of h (B, T, heads, hs), a pair (a, b), by the angle of its position."""
    swapped = h.roll(h.size(-1) // 2, dims=-1)  # (a, b) -> (b, a)
    return (h * cos + swapped * sin).type_as(h)  # (a cos - b sin, b cos + a sin); the minus is in the table


class OtherSDPA(nn.Module):
    """Other cures than a gate: weights that may sum to less than one. s_j: how well a query matches key j.

    softmax1   exp(s_j) / (1 + sum_i exp(s_i))       as if there were one more key, with s = 0 (Miller 2023)
    learned    exp(s_j) / (exp(b) + sum_i exp(s_i))  with s = b, learned for each head (gpt-oss 2025)
    softpick   relu(exp(s_j) - 1) / (1e-6 + sum_i |exp(s_i) - 1|)   nothing where s < 0 (arXiv 2504.20966)
    All T x T of them are written out: simple, but slower than SDPA, and O(T^2) in memory. They are in neither
    the paper nor the authors' code: experiments/variants.py sets them beside the gate.
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.attention
        if self.kind == "learned":
            self.b = nn.Parameter(torch.zeros(config.n_head))

    def forward(self, q, k, v, mask=None):  # shapes as in SDPA
        group = q.size(2) // k.size(2)  # query heads of a key/value head
        k = k.repeat_interleave(group, dim=2).transpose(1, 2)  # (B, nh, S, hs)
        v = v.repeat_interleave(group, dim=2).transpose(1, 2)  # (B, nh, S, hs)
        s = (q.transpose(1, 2) @ k.mT).float() / math.sqrt(q.size(-1))  # (B, nh, T, S)
        unseen = torch.ones_like(s[0, 0], dtype=torch.bool).triu(1) if mask is None else ~mask  # (T, S)
        s = s.masked_fill(unseen, -math.inf)
        if self.kind == "softpick":
            top = s.amax(-1, keepdim=True).clamp(min=0)  # all is divided by exp(top): nothing overflows
            power = ((s - top).exp() - (-top).exp()).masked_fill(unseen, 0)  # exp(-inf) - 1 would count, too
            weights = power.relu() / (power.abs().sum(-1, keepdim=True) + 1e-6)
        else:
            b = self.b[:, None, None] if self.kind == "learned" else s.new_zeros(1)
            weights = (s - torch.logaddexp(s.logsumexp(-1, keepdim=True), b)).exp()
        return (weights.type_as(v) @ v).transpose(1, 2)  # (B, T, nh, hs)


# ---- the rest of the model -------------------------------------------------------------------------


class MLP(nn.Module):
    """SwiGLU feed-forward, (..., C) -> (..., C). Its gate_proj belongs to SwiGLU and is none of G1..G5."""

    def __init__(self, C, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Mixture of experts: each token goes through the n_expert_active MLPs that the router prefers.

    router_loss keeps them evenly busy (Switch Transformers, arXiv 2101.03961, eq. 4) and the router's logits
    small (ST-MoE, arXiv 2202.08906, eq. 5), in one forward; the paper balances over all forwards of a step.
    """

    def __init__(self, config):
        super().__init__()
        self.n_active = config.n_expert_active
        hidden = max(8, config.mlp_hidden // self.n_active)  # active parameters match the dense MLP
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(config.n_embd, hidden) for _ in range(config.n_expert))

    def forward(self, x):
        rows = x.flatten(0, 1)  # (N, C), a row for each of the N = B T tokens
        logits = self.router(rows).float()  # (N, E), where E = n_expert
        p = logits.softmax(-1)  # (N, E)
        weight, chosen = p.topk(self.n_active)  # (N, k) each: a token's experts, and how much each counts
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            n, choice = (chosen == e).nonzero(as_tuple=True)  # the tokens that go to expert e
            y = y.index_add(0, n, (expert(rows[n]) * weight[n, choice, None]).type_as(y))

        visits = F.one_hot(chosen, p.size(-1)).float().mean((0, 1))  # (E,): each expert's part of them
        balance = p.size(-1) * (visits * p.mean(0)).sum()  # 1 when all experts are equally busy
        self.router_loss = 0.01 * balance + 0.001 * logits.logsumexp(-1).square().mean()
        return y.view_as(x)


class Block(nn.Module):
    """x + attention, then x + MLP, each on the normalised x. A sandwich also normalises what each adds."""

    def __init__(self, config, layer):
        super().__init__()
        C, eps, sandwich = config.n_embd, config.norm_eps, config.norm == "sandwich"
        self.attn_norm, self.attn = RMSNorm(C, eps), Attention(config, layer)
        self.mlp_norm = RMSNorm(C, eps)
        self.mlp = MoE(config) if config.n_expert else MLP(C, config.mlp_hidden)
        self.attn_post_norm = RMSNorm(C, eps) if sandwich else nn.Identity()
        self.mlp_post_norm = RMSNorm(C, eps) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin, cache)))
        return x + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


class KVCache:
    """Keys and values of the first `length` tokens in all layers: a new token costs one token's forward."""

    def __init__(self, model, batch, window):
        c = model.config
        shape = c.n_layer, batch, window, c.n_kv_head, c.head_dim
        self.k, self.v = model.embed.weight.new_zeros(shape), model.embed.weight.new_zeros(shape)
        self.length = 0

    def extend(self, layer, k, v):
        """Store k and v (B, T, nkv, hs) of a layer; return all (B, S, nkv, hs) and the causal mask (T, S)."""
        T, S = k.size(1), self.length + k.size(1)
        self.k[layer, :, self.length : S], self.v[layer, :, self.length : S] = k, v
        mask = torch.ones(T, S, dtype=torch.bool, device=k.device).tril(self.length)
        return self.k[layer, :, :S], self.v[layer, :, :S], mask


class GPT(nn.Module):
    """Embedding, blocks, a last norm, the output head. Weights depend only on the last torch.manual_seed."""

    def __init__(self, config):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: say how many tokens there are (train.py asks the data)")
        self.config = self.trained = config  # set_window changes the first
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(torch.initial_seed())

    @torch.no_grad()
    def init_weights(self, seed):
        """N(0, 0.02) for every matrix, times 1/sqrt(2 n_layer) for those that write to the residual stream.

        Each matrix has its own random generator, seeded with `seed` and its name. So flipping the gate
        changes no number in the matrices that both models have. Vectors keep their 1 (norms) or 0.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            to_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if to_residual else 0.02
            p.copy_(torch.randn(p.shape, generator=generator) * std)

    def num_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def set_window(self, block_size, rope_scaling="none"):
        """Change the window of a trained model. rope_scaling is for a longer one; none: RoPE as trained."""
        self.config = replace(self.trained, block_size=block_size)
        trained = self.trained.rope_trained or self.trained.block_size
        if rope_scaling != "none" and block_size > trained:
            self.config = replace(self.config, rope_scaling=rope_scaling, rope_factor=block_size / trained,
                                  rope_trained=trained)
        self.cos, self.sin = (table.to(self.cos.device) for table in rope_table(self.config))

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of the token after each in idx (B, T), and the loss if there are targets (B, T):
        the mean cross entropy in nats, in training plus the router losses. idx goes on where the cache ends.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        start = cache.length if cache else 0
        cos, sin = self.cos[start : start + T], self.sin[start : start + T]  # (T, 1, hs) each
        x = self.dropout(self.embed(idx))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache:
            cache.length += T
        logits = self.lm_head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if self.training and self.config.n_expert:
            loss = loss + sum(block.mlp.router_loss for block in self.blocks)
        return logits, loss

    @torch.no_grad()
    def stream(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, t), which starts with BOS: yields the next token of each row, (B,), n times.
        A full window is replaced by its first token and its last half. So BOS stays in front, always."""
        T, half = self.config.block_size, self.config.block_size // 2
        cache = KVCache(self, idx.size(0), min(T, idx.size(1) + n))
        window = new = idx  # new: the part of the window that the cache does not hold yet
        with evaluating(self):
            for _ in range(n):
                if window.size(1) > T:
                    window = new = torch.cat((window[:, :1], window[:, -half:]), dim=1)
                    cache.length = 0
                logits = self(new, cache=cache)[0][:, -1]  # (B, V)
                new = sample(logits, temperature, top_k, generator)  # (B, 1)
                window = torch.cat((window, new), dim=1)
                yield new[:, 0]

    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Tokens idx (B, t) continued by n sampled ones, all at once: (B, t + n). See stream."""
        return torch.stack([*idx.unbind(1), *self.stream(idx, n, temperature, top_k, generator)], dim=1)


def sample(logits, temperature, top_k, generator):
    """Draw a token for each row of logits (B, V): (B, 1). Temperature 0: the likeliest. top_k: one of k."""
    if temperature < 1e-30:  # 0, or so small that a division overflows
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        best, token = logits.topk(min(top_k, logits.size(-1)))  # (B, k) each
        logits = torch.full_like(logits, -math.inf).scatter(1, token, best)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)  # (B, 1)


def check_fields(config, **least):
    """Raise ValueError for an unknown choice, or a number below its least (1 if not given; 0 for floats)."""
    for f in fields(config):
        value, lowest = getattr(config, f.name), least.get(f.name, 0 if f.type is float else 1)
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise ValueError(f"{f.name}={value!r} is not one of {', '.join(get_args(f.type))}")
        if type(value) in (int, float) and not lowest <= value < 2**31:
            raise ValueError(f"{f.name}={value} must be at least {lowest}, and below 2^31")
