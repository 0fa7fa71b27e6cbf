"""Claims about the measurements: each is what its docstring says, and taking it leaves nothing behind."""
import math

import numpy as np
import pytest
import torch
from test_model import VARIANTS, lively, loop_forward, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from gated_gpt import attention_maps, measure, uniform_share

CASES = [*((name, 8) for name in VARIANTS), *(("g2-gqa-experts", T) for T in (1, 2, 5, 7, 10, 15, 16)),
         ("softpick", 1)]


@pytest.mark.parametrize("name, T", CASES)
def test_what_is_measured_and_drawn_is_what_the_loops_have_computed(name, T):
    model, idx = lively(tiny(block_size=16, **VARIANTS[name])), tokens(2, T)
    traces = [loop_forward(model, row) for row in idx]
    for layer, (row, maps) in enumerate(zip(measure(model, idx), attention_maps(model, idx), strict=True)):
        expected = np.zeros((2, T, T, 4))  # [row of tokens, query, key, head]
        for b, h, t in np.ndindex(2, 4, T):
            expected[b, t, :t + 1, h] = traces[b].probabilities[layer][h][t]
        assert maps.shape == expected.shape and np.abs(maps.numpy() - expected).max() < 1e-6
        share = expected[:, :, 0]  # [row of tokens, query, head]
        late = [share[:, t].mean() for t in range(T) if t >= T / 4] or [math.nan]
        assert row["first_token_share"] == pytest.approx(share.mean(), abs=1e-6)
        assert row["first_token_share_by_head"] == pytest.approx(share.mean((0, 1)), abs=1e-6)
        assert row["late_first_token_share"] == pytest.approx(np.mean(late), abs=1e-6, nan_ok=True)
        largest = max(np.abs(trace.activations[layer]).max() for trace in traces)
        assert row["max_activation"] == pytest.approx(largest, rel=1e-5)
        scores = [trace.scores[layer] for trace in traces]  # none at all without a gate
        score = np.mean(scores) if scores[0] else math.nan
        assert row["gate_score"] == pytest.approx(score, abs=1e-5, nan_ok=True)


FLOORS = [(1, 1.0), (64, 0.0741), (128, 0.0424), (256, 0.0239), (512, 0.0133), (1024, 0.0073)]  # H_T / T


@pytest.mark.parametrize("T, floor", FLOORS)
def test_the_floor_of_the_share_is_that_of_looking_at_everything_alike(T, floor):
    assert uniform_share(T) == pytest.approx(floor, abs=5e-5)
    model = lively(tiny(block_size=max(2, T), n_layer=1))
    torch.nn.init.zeros_(model.blocks[0].attn.q_proj.weight)
    assert measure(model, tokens(1, T))[0]["first_token_share"] == pytest.approx(uniform_share(T), abs=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("fields", [dict(n_head=1), dict(n_kv_head=2), dict(gate="g3", n_kv_head=1)], ids=str)
def test_measuring_makes_no_matrix_of_time_by_time(fields):
    model = lively(tiny(block_size=2048, n_layer=1, **fields))
    with LargestTensor() as largest:
        measure(model, tokens(1, 2048))
    assert largest.elements <= 2048 * 2 * 16
    with LargestTensor() as largest:
        attention_maps(model, tokens(1, 128))
    assert largest.elements >= 128 * 128  # a matrix would have been noticed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("look", [measure, attention_maps])
def test_measuring_leaves_nothing_behind_even_when_it_fails(look, training):
    model, idx = lively(tiny(dropout=0.5, **VARIANTS["g2-gqa-experts"])).train(training), tokens(2, 8)
    before = [value.clone() for value in model.state_dict().values()]
    dice = torch.get_rng_state()
    assert repr(look(model, idx)) == repr(look(model, idx))  # no dropout
    for wrong, error in ((tokens(1, 9), ValueError), (torch.tensor([[0, 11]]), IndexError)):
        with pytest.raises(error):
            look(model, wrong)
    assert torch.equal(torch.get_rng_state(), dice)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training == training for module in model.modules())
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(p.grad is None for p in model.parameters())
