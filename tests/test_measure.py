"""Claims about the measurements: each is what its docstring says, and taking it leaves nothing behind."""
import math

import numpy as np
import pytest
import torch
from test_model import VARIANTS, every_variant, lively, loop_forward, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from gated_gpt import attention_maps, measure, uniform_share


def first_token_shares(traces, layer):
    """Probability on token 0, from the explicit softmax of the loops: an array [row, head, query]."""
    return np.array([[[p[0] for p in head] for head in trace.probabilities[layer]] for trace in traces])


def traced(config, T=8):
    """A model, two rows of tokens, and the loops' trace of each."""
    model, idx = lively(config), tokens(2, T)
    return model, idx, [loop_forward(model, row) for row in idx]


@pytest.mark.parametrize("T", [1, 7, 8])
@every_variant
def test_the_measured_share_is_that_of_the_explicit_softmax(variant, T):
    model, idx, traces = traced(tiny(**variant), T)
    for layer, row in enumerate(measure(model, idx)):
        shares = first_token_shares(traces, layer)
        assert row["first_token_share"] == pytest.approx(shares.mean(), abs=1e-6)
        assert row["first_token_share_by_head"] == pytest.approx(shares.mean((0, 2)), abs=1e-6)


@pytest.mark.parametrize("T", [2, 5, 7, 8, 10, 15, 16])
@pytest.mark.parametrize("name", ["none", "g1", "g2-gqa-experts"])
def test_the_late_share_leaves_out_every_query_of_the_first_quarter(name, T):
    model, idx, traces = traced(tiny(block_size=16, **VARIANTS[name]), T)
    for layer, row in enumerate(measure(model, idx)):
        shares = first_token_shares(traces, layer)
        late = [shares[:, :, t].mean() for t in range(T) if t >= T / 4]
        assert row["late_first_token_share"] == pytest.approx(np.mean(late), abs=1e-6)


@every_variant
def test_gate_scores_and_activations_are_those_of_the_loops(variant):
    model, idx, traces = traced(tiny(**variant))
    for layer, row in enumerate(measure(model, idx)):
        scores = np.array([trace.scores[layer] for trace in traces])
        largest = max(np.abs(trace.activations[layer]).max() for trace in traces)
        assert row["max_activation"] == pytest.approx(largest, rel=1e-5)
        if model.config.gate == "none":
            assert math.isnan(row["gate_score"])
        else:
            assert row["gate_score"] == pytest.approx(scores.mean(), abs=1e-5)


@every_variant
def test_attention_maps_are_the_softmax_matrices(variant):
    model, idx, traces = traced(tiny(**variant))
    for layer, found in zip(range(2), attention_maps(model, idx), strict=True):
        expected = np.zeros((2, 8, 8, 4))
        for b, h, t in np.ndindex(2, 4, 8):
            expected[b, t, :t + 1, h] = traces[b].probabilities[layer][h][t]
        assert found.shape == expected.shape and np.abs(found.numpy() - expected).max() < 1e-6


FLOORS = [(64, 0.0741), (128, 0.0424), (256, 0.0239), (512, 0.0133), (1024, 0.0073)]  # H_T / T


@pytest.mark.parametrize("T, floor", FLOORS)
def test_the_floor_of_the_share_is_that_of_looking_at_everything_alike(T, floor):
    assert uniform_share(T) == pytest.approx(floor, abs=5e-5)
    model = lively(tiny(block_size=T, n_layer=1))
    torch.nn.init.zeros_(model.blocks[0].attn.q_proj.weight)
    row = measure(model, tokens(1, T))[0]
    assert row["first_token_share"] == pytest.approx(uniform_share(T), abs=1e-6)
    late = math.fsum(1 / t for t in range(T // 4 + 1, T + 1)) / (T - T // 4)
    assert row["late_first_token_share"] == pytest.approx(late, abs=1e-6)


def test_a_single_token_gives_all_its_attention_to_itself():
    assert uniform_share(1) == 1
    assert measure(lively(tiny()), tokens(1, 1))[0]["first_token_share"] == 1


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest_tensor(function, T, **fields):
    model, idx = lively(tiny(block_size=T, n_layer=1, **fields)), tokens(1, T)
    with LargestTensor() as largest:
        function(model, idx)
    return largest.elements


@pytest.mark.parametrize("fields", [dict(n_head=1), dict(n_kv_head=2), dict(gate="g3", n_kv_head=1)], ids=str)
def test_measuring_makes_no_matrix_of_time_by_time(fields):
    assert largest_tensor(measure, 2048, **fields) <= 2048 * 2 * 16
    assert largest_tensor(attention_maps, 128, **fields) >= 128 * 128  # a matrix would have been noticed


def nothing_left_behind(model, training):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return not hooks and all(module.training == training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("look", [measure, attention_maps])
@pytest.mark.parametrize("name", ["g1", "g2-gqa-experts"])
def test_measuring_leaves_nothing_behind_even_when_it_fails(name, look, training):
    model = lively(tiny(dropout=0.5, **VARIANTS[name])).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    look(model, tokens(2, 8))
    assert nothing_left_behind(model, training)
    with pytest.raises(ValueError, match="9.*block_size=8"):
        look(model, tokens(1, 9))
    assert nothing_left_behind(model, training)
    with pytest.raises(IndexError):
        look(model, torch.tensor([[0, 11]]))
    assert nothing_left_behind(model, training)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_measuring_draws_no_random_numbers_and_repeats_itself():
    model, idx = lively(tiny(dropout=0.5)).train(), tokens(2, 8)
    state = torch.get_rng_state()
    first, second = (repr(measure(model, idx)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_does_not_change_what_the_model_computes():
    model, idx = lively(tiny()), tokens(2, 8)
    before = model(idx)[0]
    measure(model, idx)
    assert torch.equal(model(idx)[0], before)


@pytest.mark.parametrize("heads", range(4))
def test_a_head_that_sees_only_the_first_token_is_found_by_its_number(heads):
    """Head `heads` gets keys that all match BOS; the others look at everything alike."""
    model = lively(tiny(n_layer=1, qk_norm=False, rope_base=2e9, gate="none"))
    attn, idx = model.blocks[0].attn, tokens(1, 8)
    bos = model.blocks[0].attn_norm(model.embed.weight[0])
    others = model.blocks[0].attn_norm(model.embed.weight[1:])
    with torch.no_grad():
        direction = torch.linalg.lstsq(torch.cat((bos[None], others)), torch.eye(11)[:, 0]).solution
        ones = torch.linalg.lstsq(torch.cat((bos[None], others)), torch.ones(11)).solution
        attn.q_proj.weight.zero_()[4 * heads + 1] = 100 * ones  # channel 1 hardly turns at this rope_base
        attn.k_proj.weight.zero_()[4 * heads + 1] = direction
    shares = measure(model, idx)[0]["first_token_share_by_head"]
    for h, share in enumerate(shares):
        assert share == pytest.approx(1.0 if h == heads else uniform_share(8), abs=1e-3)
