"""
Gated attention in one file: a small GPT in plain PyTorch, to be read from top to bottom.

The idea ("Gated Attention for Large Language Models", arXiv 2505.06708): a head of softmax attention can't
say "nothing here", since its weights sum to one. So it parks them on the first token, the attention sink.
Multiply what attention returns by a gate that looks at the current token,

    Y' = Y * sigmoid(X W)

and a head can close instead. The sink goes, and in the paper the model gets better, too.

Reading order: GPTConfig -> Gate -> Attention.forward, where all five places of a gate stand on one screen ->
Block -> GPT -> measure, which reads the sink from outside, through hooks -> checkpoints.

Names, in the shapes below and in the paper:
    B, T   batch, time (tokens in a window)      C    channels, n_embd (the paper's d_model)
    nh     query heads, n_head (q)               nkv  key/value heads, n_kv_head (k)
    hs     channels of one head, head_dim (d_k)  V    vocab_size
    x      in Attention and Gate: the pre-normed input (B, T, C), the paper's X, which makes q, k, v and the
           scores; in Block and GPT: the residual stream (B, T, C)
    y      what a gate acts on: the paper's Y
    S      keys that can be seen: T, or more from the cache
    G1     gate on the SDPA output, per head, before o_proj: the paper's choice
    G2, G3, G4   gates on the values, keys, queries;  G5   gate on the output of o_proj
"""
import dataclasses
import math
import os
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    """The shape of the model. A field is a flag of train.py, and its comment is the flag's help.

    Raises ValueError, with the values and the rule, when fields contradict each other.
    """
    # --- model ---
    vocab_size: int | None = None  # V: tokens the model knows; by default what the data has
    block_size: int = 256  # T: tokens in a window, the BOS token in front included
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # query heads per layer
    n_kv_head: int | None = None  # key/value heads (grouped-query attention); default n_head
    n_embd: int = 128  # C: width of the residual stream
    head_dim: int | None = None  # channels of a head, even; default n_embd / n_head
    mlp_hidden: int | None = None  # width inside the SwiGLU; default 8/3 n_embd, rounded to a multiple of 16
    rope_base: float = 10000.0  # base of the rotary embedding's wavelengths
    qk_norm: bool = True  # RMSNorm on each head's queries and keys, before RoPE
    norm: Literal["pre", "sandwich"] = "pre"  # sandwich: normalise each branch's output too (paper, Table 2)
    norm_eps: float = 1e-6  # added to the mean square inside RMSNorm
    tie_embeddings: bool = False  # the output head is the embedding matrix, transposed
    dropout: float = 0.0  # on the embedding and on each branch's output, while training
    # --- gate ---
    gate: Literal["none", "g1", "g2", "g3", "g4", "g5"] = "g1"  # where the gate sits; g1: on the SDPA output
    gate_kind: Literal["elementwise", "headwise"] = "elementwise"  # one score per channel, or one per head
    gate_share: bool = False  # average the scores over the heads and use the mean in each (head-shared)
    gate_act: Literal["sigmoid", "ns_sigmoid", "silu", "identity"] = "sigmoid"  # from x W to the score
    gate_op: Literal["multiply", "add"] = "multiply"  # how the score meets y
    gate_input: bool = True  # off: scores are learned constants that do not see x (input-independent)
    sdpa_norm: bool = False  # RMSNorm on each head's SDPA output (Table 3, there with gate none)
    sdpa_silu: bool = False  # SiLU on the SDPA output (Table 3, there with gate none)
    # --- mixture of experts ---
    n_expert: int = 0  # experts in place of each MLP; 0: dense
    n_expert_active: int = 2  # experts that each token goes through
    expert_hidden: int | None = None  # width inside an expert; default mlp_hidden / n_expert_active
    balance_loss: float = 0.01  # weight of the load-balancing loss
    router_z_loss: float = 0.001  # weight of the router z-loss

    def __post_init__(self):
        check_fields(self, n_expert=0)
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                                 "change one of them, or set head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.mlp_hidden is None:
            self.mlp_hidden = max(16, 16 * round(self.n_embd * 8 / 3 / 16))
        if self.expert_hidden is None:  # as many active parameters as the dense MLP; grouped_mm wants 8s
            self.expert_hidden = max(8, 8 * round(self.mlp_hidden / self.n_expert_active / 8))
        self._refuse_contradictions()

    def _refuse_contradictions(self):
        def refuse(wrong, message):
            if wrong:
                raise ValueError(message)

        headwise, at_qk = self.gate_kind == "headwise", self.gate in ("g3", "g4")
        refuse(self.block_size < 2, f"block_size={self.block_size} must be at least 2: BOS and one token")
        refuse(self.head_dim % 2, f"head_dim={self.head_dim} is odd, but RoPE rotates channels in pairs: "
                                  "choose an even head_dim (by default n_embd / n_head)")
        refuse(self.n_head % self.n_kv_head, f"n_head={self.n_head} is not a multiple of "
               f"n_kv_head={self.n_kv_head}: each key/value head serves equally many query heads")
        refuse(headwise and at_qk and self.qk_norm and self.gate_op == "multiply",
               f"gate_kind=headwise with gate={self.gate} and qk_norm on: QK-norm divides a head by its own "
               "length and so cancels one factor per head; use elementwise, or qk_norm off")
        refuse(self.gate == "g5" and (headwise or self.gate_share),
               f"gate=g5 with gate_kind={self.gate_kind}, gate_share={self.gate_share}: behind o_proj there "
               "are no heads any more; g5 is elementwise and not shared")
        refuse(headwise and self.gate_share, "gate_kind=headwise with gate_share=True: a score for each head "
               "can't be one for all heads; choose one of the two")
        refuse(self.n_layer > 10_000, f"n_layer={self.n_layer} is more than 10,000, which no memory holds")
        refuse(self.dropout >= 1, f"dropout={self.dropout} must be below 1")
        refuse(not (self.norm_eps > 0 and self.rope_base > 0),
               f"norm_eps={self.norm_eps} and rope_base={self.rope_base} must be above 0")
        refuse(self.n_expert and self.n_expert_active > self.n_expert,
               f"n_expert_active={self.n_expert_active} is more than n_expert={self.n_expert}: a token can't "
               "visit an expert twice")
        refuse(self.n_expert and (self.n_embd % 8 or self.expert_hidden % 8),
               f"n_embd={self.n_embd} and expert_hidden={self.expert_hidden} must be multiples of 8 with "
               "experts: grouped_mm wants its rows aligned")

    @property
    def variant(self):
        """A short name for the gate, such as none, g1, g1-headwise, g1-add-silu."""
        gated = self.gate != "none"
        parts = {self.gate: True,
                 self.gate_kind: gated and self.gate_kind != "elementwise",
                 "shared": gated and self.gate_share,
                 "add": gated and self.gate_op == "add",
                 self.gate_act: gated and self.gate_act != "sigmoid",
                 "no-input": gated and not self.gate_input,
                 "sdpa-norm": self.sdpa_norm,
                 "sdpa-silu": self.sdpa_silu}
        return "-".join(name for name, said in parts.items() if said).replace("_", "-")


def check_fields(config, **least):
    """Raise ValueError for a field of another type or choice, or a number too large or below its least.

    The least is what `least` says for the field, else 1 for whole numbers and 0 for floats.
    """
    for f in dataclasses.fields(config):
        value, kinds = getattr(config, f.name), get_args(f.type) or (f.type,)  # or a Literal's choices
        if get_origin(f.type) is Literal:
            if value not in kinds:
                raise ValueError(f"{f.name}={value!r} is not one of {', '.join(kinds)}")
        elif type(value) not in kinds and not (f.type is float and type(value) is int):
            raise ValueError(f"{f.name}={value!r} must be of type {getattr(f.type, '__name__', f.type)}")
        elif type(value) in (int, float):
            lowest, limit = (0, 1e38) if f.type is float else (1, 2**31)
            lowest = least.get(f.name, lowest)
            if not lowest <= value < limit:
                raise ValueError(f"{f.name}={value} must be at least {lowest} and below {limit:g}")


# ----------------------------------------------------------------------------------------------------
# The gate, and the attention it sits in


class Gate(nn.Module):
    """How a score is computed, and how it meets y. Where it sits is Attention's business.

    y_shape is the trailing shape of y: (nh, hs) at G1 and G4, (nkv, hs) at G2 and G3, (C,) at G5. When
    training starts, x W is near 0 and a sigmoid score near 0.5: every gate is half open.
    """
    ACTIVATIONS = {
        "sigmoid": torch.sigmoid,  # 0..1: may close
        "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),  # "non-sparse", 0.5..1: can't close (Table 4)
        "silu": F.silu,
        "identity": lambda z: z,
    }

    def __init__(self, config, y_shape):
        super().__init__()
        self.score_shape = (y_shape[0], 1) if config.gate_kind == "headwise" else y_shape
        scores = math.prod(self.score_shape)  # of a token
        self.share, self.op, self.act = config.gate_share, config.gate_op, self.ACTIVATIONS[config.gate_act]
        if config.gate_input:
            self.gate_proj = nn.Linear(config.n_embd, scores, bias=False)  # the paper's W
        else:
            self.constant = nn.Parameter(torch.zeros(scores))

    def score(self, x):
        """(B, T, C) -> (B, T, *y_shape), where hs is 1 when headwise and nh is 1 when head-shared."""
        z = self.gate_proj(x) if hasattr(self, "gate_proj") else self.constant.expand(*x.shape[:2], -1)
        score = self.act(z.unflatten(-1, self.score_shape))  # z: (B, T, nh * hs)
        # Head-shared is no smaller projection: all scores are made, then averaged (Table 1, rows 12 and 13).
        return score.mean(-2, keepdim=True) if self.share else score

    def forward(self, y, x):
        return y * self.score(x) if self.op == "multiply" else y + self.score(x)


def rope_table(config):
    """What rope multiplies with, (block_size, 1, hs) each: (cos, cos) and (-sin, sin) of the angles."""
    frequency = float(config.rope_base) ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)  # (hs/2,)
    angle = torch.arange(config.block_size)[:, None, None] * frequency  # (block_size, 1, hs/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(h, cos, sin):
    """Rotate channels i and i + hs/2 of h (B, T, heads, hs), as one pair, by the angle of their position.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin); roll by half a head swaps the two.
    """
    return (h * cos + h.roll(h.size(-1) // 2, dims=-1) * sin).type_as(h)  # cos and sin are float32


class SDPA(nn.Module):
    """softmax(q k^T / sqrt(hs)) v, causal. A module of its own so that a hook can read what goes in."""

    def forward(self, q, k, v, mask=None):
        """q (B, T, nh, hs); k and v (B, S, nkv, hs), S = T unless a mask (T, S) says who sees whom."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # the kernel wants heads first
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2)  # (B, nh, T, hs) -> (B, T, nh, hs)


class Attention(nn.Module):
    """Causal self-attention on the pre-normed x, (B, T, C) -> (B, T, C). Its forward shows all five gates."""

    def __init__(self, config, layer):
        super().__init__()
        C, nh, nkv, hs = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.gate_at = layer, config.gate
        self.heads, self.kv_heads = (nh, hs), (nkv, hs)
        self.q_proj = nn.Linear(C, nh * hs, bias=False)
        self.k_proj = nn.Linear(C, nkv * hs, bias=False)
        self.v_proj = nn.Linear(C, nkv * hs, bias=False)
        self.o_proj = nn.Linear(nh * hs, C, bias=False)
        self.q_norm = nn.RMSNorm(hs, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(hs, config.norm_eps) if config.qk_norm else nn.Identity()
        self.sdpa = SDPA()
        self.sdpa_norm = nn.RMSNorm(hs, config.norm_eps) if config.sdpa_norm else nn.Identity()
        self.sdpa_silu = nn.SiLU() if config.sdpa_silu else nn.Identity()
        if config.gate != "none":
            y_shape = {"g1": (nh, hs), "g2": (nkv, hs), "g3": (nkv, hs), "g4": (nh, hs), "g5": (C,)}
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
        y = self.sdpa_silu(self.sdpa_norm(y))  # Table 3's two non-gates; the identity unless asked for
        if self.gate_at == "g1": y = self.gate(y, x)  # G1: the SDPA output, the paper's choice
        y = self.o_proj(y.flatten(2))  # (B, T, C)
        if self.gate_at == "g5": y = self.gate(y, x)  # G5: the output of o_proj
        return y


# ----------------------------------------------------------------------------------------------------
# The rest of the model


class MLP(nn.Module):
    """SwiGLU feed-forward, (B, T, C) -> (B, T, C). Its gate_proj is SwiGLU's own, none of G1..G5."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.mlp_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.mlp_hidden, bias=False)
        self.down_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Mixture of experts: softmax top-k routing over SwiGLU experts; no token is dropped. Needs torch 2.10.

    Visits are sorted by expert: the rows of each are contiguous, and one grouped product serves all experts.
    `router_loss` is what the last forward adds to the training loss, weights included: the load-balancing
    loss of Switch Transformers (arXiv 2101.03961, eq. 4) and the z-loss of ST-MoE (arXiv 2202.08906, eq. 5).
    """

    def __init__(self, config):
        super().__init__()
        if not hasattr(F, "grouped_mm"):
            raise ValueError(f"n_expert={config.n_expert} needs torch 2.10 or later, and this is "
                             f"{torch.__version__}: upgrade, or take n_expert=0")
        E, C, H = config.n_expert, config.n_embd, config.expert_hidden
        self.n_active = config.n_expert_active
        self.balance_weight, self.z_weight = config.balance_loss, config.router_z_loss
        self.router = nn.Linear(C, E, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(E, C, H))
        self.up_proj = nn.Parameter(torch.empty(E, C, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, C))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, C), N = B T
        logits = self.router(tokens).float()  # (N, E)
        weight, expert = logits.softmax(-1).topk(self.n_active)  # (N, k) each
        weight = weight / weight.sum(-1, keepdim=True)
        order = expert.flatten().argsort(stable=True)  # (N k,): the visits, expert by expert
        load = F.one_hot(expert.flatten(), logits.size(-1)).sum(0)  # (E,): visits to each expert
        source = order // self.n_active  # (N k,): the token that makes the visit
        ends = load.cumsum(0).to(torch.int32)  # (E,): where each expert's visits end
        device = x.device.type  # autocast does not know grouped_mm, so its cast is made here
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

        def per_expert(rows, w):
            return F.grouped_mm(rows.to(dtype), w.to(dtype), offs=ends)

        rows = tokens[source]  # (N k, C)
        hidden = F.silu(per_expert(rows, self.gate_proj)) * per_expert(rows, self.up_proj)  # (N k, H)
        out = per_expert(hidden, self.down_proj) * weight.flatten()[order, None]  # (N k, C)

        balance = logits.size(-1) * (load / load.sum() * logits.softmax(-1).mean(0)).sum()  # 1 when even
        z = logits.logsumexp(-1).square().mean()  # keeps the router's logits small
        self.router_loss = self.balance_weight * balance + self.z_weight * z
        return torch.zeros_like(tokens).index_add(0, source, out.type_as(tokens)).view_as(x)


class Block(nn.Module):
    """x + attention, then x + MLP, each on the normalised x. A sandwich also normalises what each adds."""

    def __init__(self, config, layer):
        super().__init__()

        def norm():
            return nn.RMSNorm(config.n_embd, config.norm_eps)

        sandwich = config.norm == "sandwich"
        self.attn_norm, self.attn = norm(), Attention(config, layer)
        self.mlp_norm, self.mlp = norm(), MoE(config) if config.n_expert else MLP(config)
        self.attn_post_norm = norm() if sandwich else nn.Identity()
        self.mlp_post_norm = norm() if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin, cache)))
        return x + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


class KVCache:
    """Keys and values of all layers, allocated once for `length` tokens and filled as the text grows.

    `positions` (T,) says where in the window the tokens of the coming forward stand; GPT.stream moves it.
    """

    def __init__(self, model, batch, length=None):
        c = model.config
        # A tensor for each layer: of one for all, a compiled model would copy the whole to change a part.
        size = (batch, length or c.block_size, c.n_kv_head, c.head_dim)  # (B, length, nkv, hs)
        self.k, self.v = ([model.embed.weight.new_zeros(size) for _ in model.blocks] for _ in "kv")
        self.positions = None

    def extend(self, layer, k, v):
        """Store k and v (B, T, nkv, hs) of a layer; return all (B, S, nkv, hs) and the causal mask (T, S)."""
        self.k[layer].index_copy_(1, self.positions, k)
        self.v[layer].index_copy_(1, self.positions, v)
        # A CPU reads the filled part only; a GPU and a compiled model read it all, so that no shape changes.
        only_filled = k.is_cpu and not torch.compiler.is_compiling()
        S = int(self.positions[-1]) + 1 if only_filled else self.k[layer].size(1)
        mask = torch.arange(S, device=k.device) <= self.positions[:, None]
        return self.k[layer][:, :S], self.v[layer][:, :S], mask


class GPT(nn.Module):
    """Embedding, blocks, a last norm, and the output head. Raises ValueError without a vocab_size.

    The weights depend on the last torch.manual_seed alone: two models made after one seed are equal.
    """

    def __init__(self, config):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: say how many tokens there are (train.py asks the data)")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(torch.initial_seed())

    @torch.no_grad()
    def init_weights(self, seed):
        """N(0, 0.02) for every matrix; projections back into the residual stream also by 1/sqrt(2 n_layer).

        Each matrix has a random generator of its own, seeded with `seed` and its name: flipping the gate
        changes no number in the matrices that both models have. Vectors stay: norms 1, a constant gate's 0.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            to_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if to_residual else 0.02
            p.copy_(torch.randn(p.shape, generator=generator) * std)

    @classmethod
    def with_weights(cls, config, weights):
        """A model whose parameters are these tensors, {name: tensor}: nothing is drawn, nothing copied."""
        with torch.device("meta"):  # names and shapes, no numbers
            model = cls(config)
        if config.tie_embeddings:
            weights = weights | {"lm_head.weight": weights["embed.weight"]}
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.embed.weight
        model.cos, model.sin = rope_table(config)
        return model

    def num_params(self):
        """Number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of the token after each in idx (B, T), and the loss if there are targets (B, T).

        The loss is the mean cross entropy in nats; while training, experts add their router losses to it.
        With a KVCache, idx are the tokens at cache.positions. ValueError if idx does not fit into block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}: give fewer, "
                             "or make a model with a larger one")
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
        """Continue idx (B, t), whose first token is BOS: yields n times the next token of each row, (B,).

        Each new token costs one forward of one token. A window that is full starts again with BOS and its
        last half: BOS stays in front, and the logits are always those of a plain forward over the window.
        A released model has no BOS, so there this is the first token of the prompt.
        """
        if idx.size(1) < 1 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"{idx.size(1)} tokens, temperature={temperature}, top_k={top_k}: it takes BOS "
                             "in front, a temperature of at least 0, and a top_k of at least 1, or None")
        room, half = self.config.block_size, self.config.block_size // 2
        cache = KVCache(self, idx.size(0), min(room, idx.size(1) + n))
        new = window = idx  # new: what the cache has not seen yet
        with evaluating(self):
            for _ in range(n):
                if window.size(1) > room:
                    new = window = torch.cat((window[:, :1], window[:, -half:]), dim=1)
                seen, t = window.size(1) - new.size(1), window.size(1)
                cache.positions = torch.arange(seen, t, device=idx.device)
                logits = self(new, cache=cache)[0][:, -1]  # (B, V)
                new = sample(logits, temperature, top_k, generator)  # (B, 1)
                window = torch.cat((window, new), dim=1)
                yield new[:, 0]

    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Tokens idx (B, t) continued by n sampled ones, all at once: (B, t + n). See stream."""
        new = list(self.stream(idx, n, temperature, top_k, generator))
        return torch.cat((idx, torch.stack(new, dim=1)), dim=1) if new else idx

    @staticmethod
    def from_pretrained(folder, block_size=None, dtype=None):
        """The model in a folder of the released ones' layout: see load_released in data/released.py."""
        from data.released import load_released
        return load_released(folder, block_size, dtype)

    def save_pretrained(self, folder):
        """Write the model to a folder, in the layout of the released ones: see save_released in there."""
        from data.released import save_released
        save_released(self, folder)


def sample(logits, temperature, top_k, generator):
    """Draw a token for each row of logits (B, V): (B, 1). Temperature 0: the likeliest; top_k: one of k."""
    if temperature < 1e-30:  # 0, or so near that a division overflows
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)  # (B, 1)


# ----------------------------------------------------------------------------------------------------
# Measuring, from outside: hooks on SDPA, Gate, MoE and Block, which leave nothing behind


@contextmanager
def evaluating(model, hooks=()):
    """The model in evaluation mode, with hooks [(module, function)]; both are undone whatever happens."""
    was_training = model.training
    handles = [module.register_forward_hook(function) for module, function in hooks]
    try:
        yield model.eval()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def uniform_share(T):
    """First-token share of uniform attention, the floor: the mean of 1/t over t = 1..T, which is H_T / T."""
    return sum(1 / t for t in range(1, T + 1)) / T


@torch.no_grad()
def measure(model, idx):
    """The paper's measurements (Table 4: share, score, activation) on tokens idx (B, T): a dict per layer.

    first_token_share          attention probability on token 0: mean over queries (query 0 included) and
                               heads. Under uniform attention it is uniform_share(T).
    first_token_share_by_head  the same, one number per query head
    late_first_token_share     the same over queries t >= T/4, which query 0 (always 1) does not lift
    gate_score                 mean score over tokens, heads and channels; nan without a gate
    gate_closed                fraction of scores below 0.1 (a sigmoid's: closed); nan without a gate
    max_activation             largest |x| after the block, over tokens and channels
    max_expert_load            visits to the busiest expert over the mean; nan without experts

    Takes the model as it is before torch.compile. Memory is O(T): no T x T matrix is made.
    """
    rows = [dict(gate_score=math.nan, gate_closed=math.nan, max_expert_load=math.nan) for _ in model.blocks]

    def on_sdpa(row, sdpa, inputs, output):
        q, k, v = inputs[:3]
        first = torch.zeros_like(v)  # (B, T, nkv, hs)
        first[:, 0] = 1  # values that say "I am token 0": what comes out *is* the probability on token 0
        share = sdpa.forward(q, k, first)[..., 0].float()  # (B, T, nh); .forward, lest this hook runs again
        row["first_token_share"] = share.mean().item()
        row["first_token_share_by_head"] = share.mean((0, 1)).tolist()
        row["late_first_token_share"] = share[:, -(-idx.size(1) // 4) :].mean().item()

    def on_gate(row, gate, inputs, output):
        score = gate.score(inputs[1]).float()
        row["gate_score"], row["gate_closed"] = score.mean().item(), (score < 0.1).float().mean().item()

    def on_router(row, router, inputs, output):
        expert = output.topk(model.config.n_expert_active).indices.flatten()
        load = expert.bincount(minlength=model.config.n_expert).float()
        row["max_expert_load"] = (load.max() / load.mean()).item()

    def on_block(row, block, inputs, output):
        row["max_activation"] = output.abs().max().item()

    watched = {SDPA: on_sdpa, Gate: on_gate, Block: on_block}
    hooks = [(module, partial(hook, row)) for block, row in zip(model.blocks, rows)
             for module in block.modules() for kind, hook in watched.items() if isinstance(module, kind)]
    hooks += [(block.mlp.router, partial(on_router, row)) for block, row in zip(model.blocks, rows)
              if model.config.n_expert]
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
        one_hot = torch.eye(k.size(1), dtype=v.dtype, device=v.device)[None, :, None]  # (1, T, 1, T)
        maps.append(sdpa.forward(q, k, one_hot.expand(*k.shape[:3], -1)).transpose(2, 3))

    with evaluating(model, [(block.attn.sdpa, on_sdpa) for block in model.blocks]):
        model(idx)
    return maps


# ----------------------------------------------------------------------------------------------------
# Checkpoints: one file, whole or not there

FORMAT = "gated_gpt 1"


def is_plain(tensor):
    """Whether it is an ordinary tensor of floats: not sparse, not without numbers."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def is_finite(model):
    return all(p.isfinite().all() for p in model.parameters())


def save_checkpoint(path, model, state):
    """Write the model, its config and `state` (plain values and tensors) to one file.

    A kill at any moment leaves the old or the new file whole. Raises OSError when it can't be written and
    FloatingPointError when weights are not finite; an older file at `path` is then as it was.
    """
    if not is_finite(model):
        raise FloatingPointError(f"weights are no longer finite, so {path} is not written; an older "
                                 "checkpoint there is untouched")
    content = {"format": FORMAT, "config": dataclasses.asdict(model.config), "model": model.state_dict(),
               "state": state}

    def write(temporary):
        with open(temporary, "wb") as file:  # torch's own file doesn't say that a disk is full
            torch.save(content, file)

    write_whole({path: write})


def write_whole(writers):
    """For each {path: writer} call writer(temporary path); when all are on disk, move them to their paths.

    Raises OSError when one can't be written; what was there is then as it was.
    """
    try:
        for path, write in writers.items():
            write(f"{path}.tmp")
            with open(f"{path}.tmp", "rb+") as file:
                os.fsync(file.fileno())
        for path in writers:
            os.replace(f"{path}.tmp", path)
    except Exception as error:  # a full disk: to torch and safetensors an error of their own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot save {path}: {getattr(cause, 'strerror', None) or cause}; an older file there "
                      "is untouched") from error
    finally:
        for path in writers:
            if os.path.exists(f"{path}.tmp"):
                os.remove(f"{path}.tmp")


def load_checkpoint(path, device="cpu"):
    """(model on `device`, state on the CPU) from a file of save_checkpoint, whose code is never run.

    Raises ValueError with one sentence if the file is damaged (it is a zip archive, whose members have
    checksums), something else, from another version, or holds weights that are not finite.
    """
    if not os.path.exists(path):
        raise ValueError(f"no checkpoint at {path}: python train.py makes one")
    if not os.path.isfile(path):  # nor a pipe, which could make us wait forever
        raise ValueError(f"{path} is not a file: name one of save_checkpoint")
    try:
        with open(path, "rb") as file:
            if zipfile.ZipFile(file).testzip():
                raise ValueError("a checksum does not fit")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}): name a file of save_checkpoint") from None
    except Exception:  # torch raises whatever the bytes lead it to: OSError, KeyError, IndexError, ...
        raise ValueError(f"{path} is not a whole checkpoint of gated_gpt.py: it is damaged, cut short, or "
                         "something else; name another one, or train again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has format {found!r}, and this version reads {FORMAT!r}: train again, or "
                         "use the version that wrote it")
    try:
        weights, state = content["model"], content["state"]
        if other := [name for name, w in weights.items() if not is_plain(w)]:
            raise ValueError(f"no plain tensor of floats: {', '.join(other)}")
        weights = {name: w.to(torch.float32).contiguous() for name, w in weights.items()}
        model = GPT.with_weights(GPTConfig(**content["config"]), weights)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit this version's model ({reason}): train again, or use the "
                         "version that wrote it") from None
    if not is_finite(model):
        raise ValueError(f"{path} holds weights that are not finite, which train.py never saves: name "
                         "another one, or train again")
    return model.to(device), state
