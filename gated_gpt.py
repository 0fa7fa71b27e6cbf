"""
Gated attention in one file: a small GPT in plain PyTorch, to be read from top to bottom.

The idea ("Gated Attention for Large Language Models", arXiv 2505.06708): the weights of softmax attention
sum to one, so a head cannot say "nothing here". It puts them on the first token instead. This is the
attention sink. Now multiply what attention returns by a gate that looks at the current token,

    Y' = Y * sigmoid(X W)

and the head can close. The sink disappears, and in the paper the model also gets better.

Reading order: GPTConfig -> Gate -> Attention.forward, where all five places of a gate are on one screen ->
Block -> GPT -> measure, which reads the sink from outside, through hooks. This file imports nothing from the
rest of the project, so you can copy it alone.

Names, in the shapes below and in the paper:
    B, T   batch, time (tokens in a window)      C    channels, n_embd (the paper's d_model)
    nh     query heads, n_head (q)               nkv  key/value heads, n_kv_head (k)
    hs     channels of one head, head_dim (d_k)  V    vocab_size
    x      in Attention and Gate: the normalised input (B, T, C), the paper's X, from which q, k, v and the
           scores are made; in Block and GPT: the residual stream (B, T, C)
    y      what the gate acts on: the paper's Y
    S      number of keys: T, or more with a cache
    G1     gate on the SDPA output, per head, before o_proj: the paper's choice
    G2, G3, G4   gates on the values, keys, queries;  G5   gate on the output of o_proj
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

    Raises ValueError when a value makes no sense, or two contradict each other.
    """
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
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"  # for windows longer than the trained one
    rope_factor: float = 1.0  # how many times longer
    rope_trained: int | None = None  # the trained window; default: block_size / rope_factor
    attention: Literal["softmax", "softmax1", "sink", "softpick"] = "softmax"  # see OtherSDPA
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
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: set head_dim")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.mlp_hidden = self.mlp_hidden or max(16, 16 * round(self.n_embd * 8 / 3 / 16))
        headwise, at_qk = self.gate_kind == "headwise", self.gate in ("g3", "g4")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} (default: n_embd / n_head) is odd: RoPE needs pairs")
        if (self.rope_factor > 1) != (self.rope_scaling != "none") and self.rope_trained is None:
            raise ValueError(f"rope_scaling={self.rope_scaling}, rope_factor={self.rope_factor:g}: set both")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if headwise and at_qk and self.qk_norm and self.gate_op == "multiply":
            raise ValueError(f"gate_kind=headwise with gate={self.gate}: QK-norm divides a head by its "
                             "length, which cancels one score per head; use elementwise, or --no-qk_norm")
        if self.gate == "g5" and (headwise or self.gate_shared):
            raise ValueError("gate=g5 can be neither headwise nor shared: its output has no heads")
        if headwise and self.gate_shared:
            raise ValueError("gate_kind=headwise with gate_shared leaves one score per token: choose one")
        if self.n_expert and self.n_expert_active > self.n_expert:
            raise ValueError(f"n_expert_active={self.n_expert_active} is more than n_expert={self.n_expert}")


# ---- the gate, and the attention it sits in --------------------------------------------------------


class Gate(nn.Module):
    """How a score is computed, and how it is applied to y. Where the gate sits is decided in Attention.

    y_shape is the trailing shape of y: (nh, hs) at G1 and G4, (nkv, hs) at G2 and G3, (C,) at G5. When
    training starts, x W is near 0 and a sigmoid score near 0.5: the gate is half open.
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
        if config.gate_input:
            self.gate_proj = nn.Linear(config.n_embd, n_scores, bias=False)  # the paper's W
        else:
            self.constant = nn.Parameter(torch.zeros(n_scores))

    def score(self, x):
        """(B, T, C) -> (B, T, *y_shape), where hs is 1 when headwise and nh is 1 when shared."""
        z = self.gate_proj(x) if hasattr(self, "gate_proj") else self.constant.expand(*x.shape[:2], -1)
        score = self.act(z.unflatten(-1, self.score_shape))  # z: (B, T, n_scores)
        # Sharing does not make W smaller: every head's scores are made, then averaged (Table 1, rows 12, 13).
        return score.mean(-2, keepdim=True) if self.shared else score

    def forward(self, y, x):
        return y * self.score(x) if self.op == "multiply" else y + self.score(x)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # torch's fast kernel wants x and weight in one dtype
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def rope_table(config):
    """(cos, cos) and (-sin, sin) of the angles of every position, (block_size, 1, hs) each.

    rope_scaling is for windows s = rope_factor times longer than the trained one: it slows the turning down.
    linear: all pairs of channels turn s times slower (arXiv 2306.15595). ntk: slow pairs do, fast ones less.
    yarn: pairs with less than one turn in the trained window turn s times slower, those with more than 32 as
    before, others in between, and q and k become longer (both arXiv 2309.00071; as in YaRN's own code).
    """
    hs, s, base = config.head_dim, config.rope_factor, float(config.rope_base)
    slow, length = 0.0, 1.0  # slow: 0 turns as before, 1 turns s times slower; length: of q and k
    if config.rope_scaling == "linear":
        slow = 1.0
    elif config.rope_scaling == "ntk":
        base *= s ** (hs / max(1, hs - 2))
    elif config.rope_scaling == "yarn":
        trained = config.rope_trained or config.block_size / s
        first, last = (hs / 2 * math.log(trained / (2 * math.pi * turns), base) for turns in (32, 1))
        first, last = max(0, math.floor(first)), min(hs - 1, math.ceil(last))
        slow = ((torch.arange(hs // 2) - first) / max(0.001, last - first)).clamp(0, 1)  # (hs/2,)
        length = 0.1 * math.log(s) + 1
    frequency = base ** (-torch.arange(0, hs, 2) / hs)  # (hs/2,): radians from one position to the next
    frequency = frequency * (1 - slow) + frequency / s * slow
    angle = torch.arange(config.block_size)[:, None, None] * frequency  # (block_size, 1, hs/2)
    cos, sin = length * angle.cos(), length * angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(h, cos, sin):
    """Turn channels i and i + hs/2 of h (B, T, heads, hs), a pair (a, b), by the angle of its position."""
    swapped = h.roll(h.size(-1) // 2, dims=-1)  # (a, b) -> (b, a)
    return (h * cos + swapped * sin).type_as(h)  # (a cos - b sin, b cos + a sin); the minus is in the table


class SDPA(nn.Module):
    """softmax(q k^T / sqrt(hs)) v, causal. It is a module, so that a hook can read its inputs."""

    def forward(self, q, k, v, mask=None):
        """q (B, T, nh, hs); k and v (B, S, nkv, hs), with S = T unless a mask (T, S) says who sees whom."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # the kernel wants heads first
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2)  # (B, nh, T, hs) -> (B, T, nh, hs)


class OtherSDPA(nn.Module):
    """Other cures than a gate: weights that may sum to less than one. s_j: how well a query matches a key.

    softmax1   e^s_j / (1 + sum e^s)             a key that is not there, with s = 0 (Miller 2023)
    sink       e^s_j / (e^b + sum e^s)           the same, with a learned b for each head (gpt-oss 2025)
    softpick   relu(e^s_j - 1) / sum |e^s - 1|   no weight where s < 0 (arXiv 2504.20966; 1e-6 is added below)
    All T x T of them are written out: simple, but slower than SDPA, and O(T^2) in memory.
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.attention
        if self.kind == "sink":
            self.b = nn.Parameter(torch.zeros(config.n_head))

    def forward(self, q, k, v, mask=None):  # shapes as in SDPA
        k, v = (h.repeat_interleave(q.size(2) // k.size(2), dim=2).transpose(1, 2) for h in (k, v))
        s = (q.transpose(1, 2) @ k.mT).float() / math.sqrt(q.size(-1))  # (B, nh, T, S)
        hidden = torch.ones_like(s[0, 0], dtype=torch.bool).triu(1) if mask is None else ~mask
        s = s.masked_fill(hidden, -math.inf)
        if self.kind == "softpick":
            top = s.amax(-1, keepdim=True).clamp(min=0)  # all is divided by e^top, so that nothing overflows
            power = ((s - top).exp() - (-top).exp()).masked_fill(hidden, 0)  # a hidden key is no |0 - 1|
            weights = power.relu() / (power.abs().sum(-1, keepdim=True) + 1e-6)
        else:
            b = self.b[:, None, None] if self.kind == "sink" else s.new_zeros(1)
            weights = (s - torch.logaddexp(s.logsumexp(-1, keepdim=True), b)).exp()  # e^s / (e^b + sum e^s)
        return (weights.type_as(v) @ v).transpose(1, 2)  # (B, T, nh, hs)


class Attention(nn.Module):
    """Causal self-attention on the normalised x, (B, T, C) -> (B, T, C). Its forward shows all five gates."""

    def __init__(self, config, layer):
        super().__init__()
        C, nh, nkv, hs = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.gate_at = layer, config.gate
        self.heads, self.kv_heads = (nh, hs), (nkv, hs)
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
        q = self.q_proj(x).unflatten(-1, self.heads)  # (B, T, nh, hs)
        k = self.k_proj(x).unflatten(-1, self.kv_heads)  # (B, T, nkv, hs)
        v = self.v_proj(x).unflatten(-1, self.kv_heads)  # (B, T, nkv, hs)
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

    `router_loss` is added to the training loss. It keeps the experts evenly busy (Switch Transformers, arXiv
    2101.03961, eq. 4, weight 0.01) and the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5, 0.001).
    Both are means over the tokens of one forward; the paper balances over all forwards of a step.
    """

    def __init__(self, config):
        super().__init__()
        self.n_active = config.n_expert_active
        hidden = max(8, config.mlp_hidden // self.n_active)  # active parameters match the dense MLP
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(config.n_embd, hidden) for _ in range(config.n_expert))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, C), where N = B T
        logits = self.router(tokens).float()  # (N, E), where E = n_expert
        p = logits.softmax(-1)  # (N, E)
        weight, chosen = p.topk(self.n_active)  # (N, k) each: a token's experts, and how much each counts
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            row, choice = (chosen == e).nonzero(as_tuple=True)  # the tokens that go to expert e
            y = y.index_add(0, row, (expert(tokens[row]) * weight[row, choice, None]).type_as(y))

        self.load = F.one_hot(chosen, p.size(-1)).float().mean((0, 1))  # (E,): each expert's part of the work
        balance = p.size(-1) * (self.load * p.mean(0)).sum()  # 1 when all experts are equally busy
        self.router_loss = 0.01 * balance + 0.001 * logits.logsumexp(-1).square().mean()
        return y.view_as(x)


class Block(nn.Module):
    """x + attention, then x + MLP, each on the normalised x. A sandwich also normalises what each adds."""

    def __init__(self, config, layer):
        super().__init__()
        norm = partial(RMSNorm, config.n_embd, config.norm_eps)
        post_norm = norm if config.norm == "sandwich" else nn.Identity
        self.attn_norm, self.attn, self.attn_post_norm = norm(), Attention(config, layer), post_norm()
        self.mlp_norm, self.mlp_post_norm = norm(), post_norm()
        self.mlp = MoE(config) if config.n_expert else MLP(config.n_embd, config.mlp_hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin, cache)))
        return x + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


class KVCache:
    """Keys and values of all layers, so that a new token costs one forward of one token.

    `positions` (T,): the places in the window of the tokens of the next forward. GPT.stream sets it.
    """

    def __init__(self, model, batch, length):
        c, zeros = model.config, model.embed.weight.new_zeros
        # One tensor per layer: with a single big one, torch.compile would copy all of it on each write.
        self.k = [zeros(batch, length, c.n_kv_head, c.head_dim) for _ in model.blocks]
        self.v = [zeros(batch, length, c.n_kv_head, c.head_dim) for _ in model.blocks]
        self.positions = None

    def extend(self, layer, k, v):
        """Store k and v (B, T, nkv, hs) of a layer; return all (B, S, nkv, hs) and the causal mask (T, S)."""
        self.k[layer].index_copy_(1, self.positions, k)
        self.v[layer].index_copy_(1, self.positions, v)
        # A CPU reads only the filled part. On a GPU, or compiled, shapes that do not change are faster.
        only_filled = k.is_cpu and not torch.compiler.is_compiling()
        S = int(self.positions[-1]) + 1 if only_filled else self.k[layer].size(1)
        mask = torch.arange(S, device=k.device) <= self.positions[:, None]
        return self.k[layer][:, :S], self.v[layer][:, :S], mask


class GPT(nn.Module):
    """Embedding, blocks, a last norm, the output head. Weights depend only on the last torch.manual_seed."""

    def __init__(self, config):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: say how many tokens there are (train.py asks the data)")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        for name, table in zip(("cos", "sin"), rope_table(config)):
            self.register_buffer(name, table, persistent=False)
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
        trained = self.config.rope_trained or round(self.config.block_size / self.config.rope_factor)
        factor = 1.0 if rope_scaling == "none" else max(1.0, block_size / trained)
        self.config = replace(self.config, block_size=block_size, rope_scaling=rope_scaling,
                              rope_factor=factor, rope_trained=trained)
        self.cos, self.sin = (table.to(self.cos.device) for table in rope_table(self.config))

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of the token after each in idx (B, T), and the loss if there are targets (B, T).

        The loss is the mean cross entropy in nats; during training, experts add their router losses.
        With a KVCache, idx are the tokens at cache.positions.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        at = cache.positions if cache else slice(T)
        cos, sin = self.cos[at], self.sin[at]  # (T, 1, hs) each
        x = self.dropout(self.embed(idx))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
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

        A full window is replaced by its first token and its last half. So BOS stays in front, and the logits
        are those of a plain forward over the window.
        """
        T, half = self.config.block_size, self.config.block_size // 2
        cache = KVCache(self, idx.size(0), min(T, idx.size(1) + n))
        window = unseen = idx  # unseen: the part of the window that the cache does not hold yet
        with evaluating(self):
            for _ in range(n):
                if window.size(1) > T:
                    window = unseen = torch.cat((window[:, :1], window[:, -half:]), dim=1)
                t = window.size(1)
                cache.positions = torch.arange(t - unseen.size(1), t, device=idx.device)
                logits = self(unseen, cache=cache)[0][:, -1]  # (B, V)
                unseen = sample(logits, temperature, top_k, generator)  # (B, 1)
                window = torch.cat((window, unseen), dim=1)
                yield unseen[:, 0]

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


# ---- measuring, from outside: hooks that are removed again -----------------------------------------


@contextmanager
def evaluating(model, hooks=()):
    """The model in evaluation mode, with hooks [(module, function)]. Both are undone at the end."""
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

    first_token_share          attention probability on token 0: mean over queries (query 0 included) and
                               heads; uniform_share(T) if uniform. OtherSDPA: what lacks to 1 is on no token.
    first_token_share_by_head  the same, one number per query head
    late_first_token_share     the same over queries t >= T/4 only. This leaves out query 0, whose share is 1.
    gate_score                 mean score over tokens, heads and channels; nan without a gate
    gate_closed                fraction of scores below 0.1; nan without a gate
    max_activation             largest |x| after the block, over tokens and channels
    max_expert_load            tokens of the busiest expert, divided by the mean; nan without experts

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
        score = gate.score(inputs[1]).float()
        row["gate_score"] = score.mean().item()
        row["gate_closed"] = (score < 0.1).float().mean().item()

    def on_block(row, block, inputs, output):
        row["max_activation"] = output.abs().max().item()
        if model.config.n_expert:
            row["max_expert_load"] = (block.mlp.load.max() / block.mlp.load.mean()).item()

    rows, hooks = [], []
    for block in model.blocks:
        rows.append(row := dict(gate_score=math.nan, gate_closed=math.nan, max_expert_load=math.nan))
        hooks += [(block.attn.sdpa, partial(on_sdpa, row)), (block, partial(on_block, row))]
        hooks += [(gate, partial(on_gate, row)) for gate in block.modules() if isinstance(gate, Gate)]
    with evaluating(model, hooks):
        model(idx)
    return rows


def check_fields(config, **least):
    """Raise ValueError for an unknown choice, or a number below its least (1 if not given; 0 for floats)."""
    for f in fields(config):
        value, lowest = getattr(config, f.name), least.get(f.name, 0 if f.type is float else 1)
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise ValueError(f"{f.name}={value!r} is not one of {', '.join(get_args(f.type))}")
        if type(value) in (int, float) and not lowest <= value < 2**31:
            raise ValueError(f"{f.name}={value} must be at least {lowest}, and below 2^31")
