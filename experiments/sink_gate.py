"""
A sink is a gate: attention without its first token, and a gate in the place of the sink, from outside.

In a head, let a be the weight on the first token and v0 its value, and y what the head returns when the first
token is hidden. The weights of the others sum to 1 - a, so

    attention = a v0 + (1 - a) y = s y + (1 - s) v0,  with s = 1 - a

So a sink is a headwise gate of score s, and beside it, as far as v0 is the same in all texts, a constant. The
model is not edited: hooks change what its attention returns, for the time of a `with` block:

    with evaluating(model, instead(model, masked(first=False))):
        logits, _ = model(idx)

real_model.py does it to a language model.
Reading order: instead -> visible -> gated, TRUE -> look -> Fit -> distill.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from gated_gpt import Gate, evaluating


def instead(model, edit):
    """Hooks for `evaluating`: what edit(layer, x, attend, q, k, v) returns takes the place of what attention
    returns, (B, T, nh, hs). None leaves it. x (B, T, C) is what a gate sees; attend: the layer's own sdpa.
    """
    hooks, xs = [], {}
    for i, block in enumerate(model.blocks):
        def keep(norm, inputs, x, i=i):
            xs[i] = x

        def change(sdpa, inputs, y, i=i):
            return edit(i, xs[i], sdpa.forward, *inputs[:3])

        hooks += [(block.attn_norm, keep), (block.attn.sdpa, change)]
    return hooks


def early(T):
    """Queries before this one may see the first token, in all that follows: there is little else to see."""
    return max(1, T // 16)


def visible(T, first, window=None):
    """(T, T), who sees whom: a query its last `window` tokens; the first token all queries, or early ones.

    If no query saw the first token, the second would be the first that is there, and become the sink.
    """
    t, s = torch.arange(T)[:, None], torch.arange(T)
    return (s <= t) & ((s > t - (window or T)) & (s > 0) | (s == 0) & (first | (t < early(T))))


def masked(first, window=None):
    """An edit: only this is visible."""
    return lambda i, x, attend, q, k, v: attend(q, k, v, visible(q.size(1), first, window).to(q.device))


def first_weight(attend, q, k, v):
    """a of every query and head, (B, T, nh, 1), by the trick of gated_gpt.measure."""
    first = torch.zeros_like(v)
    first[:, 0] = 1
    return attend(q, k, first)[..., :1]


def for_heads(v, q):
    """Values (..., nkv, hs), each for all the heads of q that share it: (..., nh, hs)."""
    return v.repeat_interleave(q.size(-2) // v.size(-2), dim=-2)


def gated(score, constant):
    """An edit: the first token is hidden from later queries, and what they get, y, becomes s y + constant.

    s = score(i, x, attend, q, k, v) is (B, T, nh, 1); constant(i, s, q, v) is (B, T, nh, hs).
    """
    def edit(i, x, attend, q, k, v):
        seen = i, x, attend, q, k, v
        y, s, start = masked(first=False)(*seen), score(*seen), early(x.size(1))
        return torch.cat((y[:, :start], (s * y + constant(i, s, q, v))[:, start:]), dim=1)
    return edit


# The line of algebra, with each text's own a and v0. It must change nothing.
TRUE = gated(lambda i, x, *qkv: 1 - first_weight(*qkv), lambda i, s, q, v: (1 - s) * for_heads(v[:, :1], q))


def bar(rows, what):
    """Rows, one by one, with a progress bar that disappears at the end."""
    return tqdm(rows, what, unit=" windows", leave=False, disable=None)


@torch.no_grad()
def losses(model, idx, what, edit=None):
    """The loss of each token but the first of windows idx (N, T), in nats: (N, T - 1)."""
    with evaluating(model, instead(model, edit) if edit else ()):
        return torch.stack([F.cross_entropy(model(row[None])[0][0, :-1], row[1:], reduction="none").cpu()
                            for row in bar(idx, what)])


# ---- the fit: sigmoid(x W) for s, and the mean first value for v0 -----------------------------------


@torch.no_grad()
def look(model, idx, what):
    """What a gate has to know, from windows idx (N, T). For each layer: x (n, C) and s (n, nh) of the n
    tokens that are not early, v0 (N, nh, hs), and the lengths of all values (N, T).
    """
    seen, start = [([], [], [], []) for _ in model.blocks], early(idx.size(1))

    def edit(i, x, attend, q, k, v):
        s = 1 - first_weight(attend, q, k, v)[0, start:, :, 0]
        for kept, new in zip(seen[i], (x[0, start:], s, for_heads(v[:, 0], q), v.norm(dim=-1).mean(-1))):
            kept.append(new)

    with evaluating(model, instead(model, edit)):
        for row in bar(idx, what):
            model(row[None])
    return [[torch.cat(kept) for kept in layer] for layer in seen]


class Fit(nn.Module):
    """For each layer a headwise Gate for s, and v0 (L, nh, hs). Without `sees`, scores that do not see x."""

    def __init__(self, model, seen, sees=True):
        super().__init__()
        config = replace(model.config, gate="g1", gate_kind="headwise", gate_input=sees)
        self.gates = nn.ModuleList(Gate(config, (config.n_head, 1)) for _ in seen)
        self.v0 = nn.Parameter(torch.stack([v0.mean(0) for _, _, v0, _ in seen]))
        self.mean = torch.stack([s.mean(0)[:, None] for _, s, _, _ in seen])  # (L, nh, 1)
        for gate, level, (x, s, _, _) in zip(self.gates, self.mean, seen):
            if sees:
                gate.gate_proj.weight.data = regression(x, s)
            else:
                gate.constant.data = level[:, 0].logit(1e-6)

    def edit(self, score=True, v0=True):
        """The gate in the sink's place; or its score alone; or v0 alone, as much of it as on average."""
        return gated(lambda i, x, *qkv: self.gates[i].score(x) if score else 1,
                     lambda i, s, q, v: (1 - s if score else 1 - self.mean[i]) * self.v0[i] if v0 else 0)

    @torch.no_grad()
    def explained(self, seen):
        """R2 in each layer: 1 - squared errors of the score / squared distances to each head's mean."""
        scores = [gate.score(x[None])[0, :, :, 0] for gate, (x, *_) in zip(self.gates, seen)]
        return [1 - ((made - s).square().sum() / (s - s.mean(0)).square().sum()).item()
                for made, (_, s, _, _) in zip(scores, seen)]


def regression(x, s):
    """W (nh, C) with sigmoid(x W) near s: logistic regression, soft targets, all heads of a layer at once."""
    scale, w = x.square().mean().sqrt(), x.new_zeros(s.size(1), x.size(1)).requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x / scale @ w.T, s) + 1e-4 * w.square().sum() / len(w)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (w / scale).detach()


# ---- the gate, trained -----------------------------------------------------------------------------


def log_p(model, row, fit=None):
    """Log-probabilities of the tokens after each of a window (T,), as the model is or with a fit: (T, V)."""
    with evaluating(model, instead(model, fit.edit()) if fit else ()):
        return model(row[None])[0][0].log_softmax(-1)


def kl(told, made):
    """How far the second distribution is from the first, at every token: (T,)."""
    return (told.exp() * (told - made)).sum(-1)


@torch.no_grad()
def far_from(model, fits, idx, start, what):
    """[loss, KL to the model as it is] with each fit: means over tokens from `start` on of windows (N, T)."""
    found = torch.zeros(len(fits), 2)
    for row in bar(idx, what):
        told = log_p(model, row)
        for i, fit in enumerate(fits):
            made = log_p(model, row, fit)
            found[i, 0] += F.nll_loss(made[start - 1:-1], row[start:]).item() / len(idx)
            found[i, 1] += kl(told, made)[start - 1:].mean().item() / len(idx)
    return found.tolist()


def distill(model, fits, idx, steps, lr=1e-3, batch=2):
    """Train W and v0 of fits alone, on windows idx (N, T), to give the distribution of the model as it is."""
    model.requires_grad_(False)
    optimizer = torch.optim.Adam([p for fit in fits for p in fit.parameters()], lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), "training", unit=" steps", leave=False, disable=None):
        for i in torch.randint(len(idx), (batch,), generator=generator):
            with torch.no_grad():
                told = log_p(model, idx[i])
            for fit in fits:
                (kl(told, log_p(model, idx[i], fit))[early(idx.size(1)):].mean() / batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
