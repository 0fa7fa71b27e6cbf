"""
Claims about released models: their folders are read as described, written back, and refused for a reason.

The folders are built here from the description of the layout, and the reference computes from their tensors
in plain loops, row by row of the fused q_proj: nothing of gated_gpt.py is asked what the layout is.
"""
import cmath
import hashlib
import json
import math
import os
import re
import signal
import sys

import pytest
import torch

from gated_gpt import GPT, GPTConfig, load_checkpoint, save_checkpoint

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
CONFIG = dict(model_type="qwen3", hidden_size=20, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=6, intermediate_size=28, rope_theta=500, rms_norm_eps=1e-5,
              tie_word_embeddings=False, vocab_size=23, max_position_embeddings=64, use_qk_norm=True,
              headwise_attn_output_gate=False, elementwise_attn_output_gate=False, hidden_act="silu",
              attention_dropout=0.1, sliding_window=4096, use_sliding_window=False, rope_scaling=None,
              max_window_layers=28, torch_dtype="bfloat16", bos_token_id=3)
GATES = {"none": {}, "headwise": dict(headwise_attn_output_gate=True),
         "elementwise": dict(elementwise_attn_output_gate=True)}
TOKENS = [3, 0, 22, 7, 7, 15, 1, 9, 11]


# ------------------------------------------------------------------------------------------------------------
# A folder, and what its model says


def gate_rows(config):
    """Rows of q_proj that are gates, for one head."""
    if config["headwise_attn_output_gate"]:
        return 1
    return config["head_dim"] if config["elementwise_attn_output_gate"] else 0


def drawn_tensors(config, seed=0):
    """Random tensors with the names and shapes of the layout."""
    generator = torch.Generator().manual_seed(seed)
    hidden, hs, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    nh, nkv = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (hidden,),
                   layer + "post_attention_layernorm.weight": (hidden,),
                   layer + "self_attn.q_proj.weight": (nh * (hs + gate_rows(config)), hidden),
                   layer + "self_attn.k_proj.weight": (nkv * hs, hidden),
                   layer + "self_attn.v_proj.weight": (nkv * hs, hidden),
                   layer + "self_attn.o_proj.weight": (hidden, nh * hs),
                   layer + "mlp.gate_proj.weight": (inner, hidden),
                   layer + "mlp.up_proj.weight": (inner, hidden),
                   layer + "mlp.down_proj.weight": (hidden, inner)}
        if config["use_qk_norm"]:
            shapes |= {layer + "self_attn.q_norm.weight": (hs,), layer + "self_attn.k_norm.weight": (hs,)}
    return {name: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            for name, shape in shapes.items()}


def write_folder(folder, tensors=None, shards=1, dtype=torch.float32, **changes):
    """A folder of a model with CONFIG and these changes; returns its config and its tensors."""
    config = CONFIG | changes
    tensors = drawn_tensors(config) if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
    else:
        where = {name: names[i % shards] for i, name in enumerate(stored)}
        for shard in names:
            save_file({name: stored[name] for name in stored if where[name] == shard}, folder / shard)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config, tensors


def normed(v, weight, eps):
    return v / math.sqrt(sum(x * x for x in v.tolist()) / len(v) + eps) * weight


def rotated(v, position, base):
    """Each pair of channels i and i + half as one complex number, turned by position * base^(-i / half)."""
    half = len(v) // 2
    out = v.clone()
    for i in range(half):
        turned = complex(v[i], v[i + half]) * cmath.exp(1j * position * base ** (-i / half))
        out[i], out[i + half] = turned.real, turned.imag
    return out


def attention(x, w, config):
    """Attention of one layer, for positions, key/value heads and the heads of their groups, one by one."""
    hs, nkv, theta = config["head_dim"], config["num_key_value_heads"], config["rope_theta"]
    per_group = config["num_attention_heads"] // nkv
    scores_per_head = gate_rows(config)
    fused = w["q_proj"].view(nkv, -1, config["hidden_size"])
    out = [[] for _ in x]
    for g in range(nkv):
        rows = slice(g * hs, (g + 1) * hs)
        keys, values = [w["k_proj"][rows] @ h for h in x], [w["v_proj"][rows] @ h for h in x]
        if config["use_qk_norm"]:
            keys = [normed(k, w["k_norm"], config["rms_norm_eps"]) for k in keys]
        keys = [rotated(k, t, theta) for t, k in enumerate(keys)]
        for j in range(per_group):
            of_query = fused[g, j * hs : (j + 1) * hs]
            first = per_group * hs + j * scores_per_head
            of_gate = fused[g, first : first + scores_per_head]
            for t, h in enumerate(x):
                q = of_query @ h
                if config["use_qk_norm"]:
                    q = normed(q, w["q_norm"], config["rms_norm_eps"])
                q = rotated(q, t, theta)
                weights = [math.exp(float(q @ k) / math.sqrt(hs)) for k in keys[: t + 1]]
                y = sum(a / sum(weights) * v for a, v in zip(weights, values))
                if scores_per_head:
                    y = y / (1 + torch.exp(-(of_gate @ h)))
                out[t].append(y)
    return [w["o_proj"] @ torch.cat(heads) for heads in out]


def reference(tensors, config, tokens=TOKENS):
    """Logits (T, V) in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps, embedding = config["rms_norm_eps"], tensors["model.embed_tokens.weight"]
    x = [embedding[token] for token in tokens]
    for i in range(config["num_hidden_layers"]):
        layer = {name.split(".")[-2]: tensor for name, tensor in tensors.items() if f"layers.{i}." in name}
        normed_x = [normed(v, layer["input_layernorm"], eps) for v in x]
        x = [a + b for a, b in zip(x, attention(normed_x, layer, config))]
        for t, v in enumerate(x):
            h = normed(v, layer["post_attention_layernorm"], eps)
            gate = layer["gate_proj"] @ h
            x[t] = v + layer["down_proj"] @ (gate / (1 + torch.exp(-gate)) * (layer["up_proj"] @ h))
    head = embedding if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    return torch.stack([head @ normed(v, tensors["model.norm.weight"], eps) for v in x])


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens]))[0][0]


def furthest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("changes", [
    dict(), dict(use_qk_norm=False), dict(tie_word_embeddings=True), dict(num_key_value_heads=1),
    dict(num_key_value_heads=4), dict(num_attention_heads=6, head_dim=2, num_hidden_layers=1), dict(shards=3),
    dict(rope_theta=1000000.0, rms_norm_eps=1e-2)], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_a_released_folder_gives_the_logits_of_a_forward_in_plain_loops(gate, changes, tmp_path):
    config, tensors = write_folder(tmp_path, **GATES[gate], **changes)
    model = GPT.from_pretrained(tmp_path)
    expected = reference(tensors, config)
    assert expected.std() > 0.5 and furthest(logits(model), expected) < 1e-5
    assert model.config.variant == {"none": "none", "headwise": "g1-headwise", "elementwise": "g1"}[gate]
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    assert model.num_params() == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_queries_and_gates_split_in_two_halves_would_be_another_model(gate, tmp_path):
    """So the comparison above can fail: it tells the rows of one key/value head from those of another."""
    config, tensors = write_folder(tmp_path, **GATES[gate])
    rows = config["num_attention_heads"] * config["head_dim"]
    for name in [name for name in tensors if "q_proj" in name]:
        queries, gates = tensors[name][:rows].chunk(2), tensors[name][rows:].chunk(2)
        tensors[name] = torch.cat([half for group in zip(queries, gates) for half in group])
    assert furthest(logits(GPT.from_pretrained(tmp_path)), reference(tensors, config)) > 0.01


def test_the_keys_that_stock_qwen3_lacks_mean_norms_and_no_gate(tmp_path):
    config, tensors = write_folder(tmp_path)
    for key in ("use_qk_norm", "headwise_attn_output_gate", "elementwise_attn_output_gate"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert furthest(logits(GPT.from_pretrained(tmp_path)), reference(tensors, CONFIG)) < 1e-5


def test_generation_with_a_cache_is_that_of_plain_forwards(tmp_path):
    write_folder(tmp_path, **GATES["headwise"])
    model, tokens = GPT.from_pretrained(tmp_path), TOKENS[:2]
    made = model.generate(torch.tensor([tokens]), 12, temperature=0)[0].tolist()
    for _ in range(12):
        tokens = [*tokens, logits(model, tokens)[-1].argmax().item()]
    assert made == tokens


def test_the_window_may_be_another_one_and_positions_mean_the_same(tmp_path):
    write_folder(tmp_path)
    model, short = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path, block_size=len(TOKENS))
    assert (model.config.block_size, short.config.block_size) == (64, len(TOKENS))
    assert short.cos.size(0) == len(TOKENS) and torch.equal(logits(short), logits(model))
    with pytest.raises(ValueError, match="block_size=9"):
        logits(short, [*TOKENS, 1])


# ------------------------------------------------------------------------------------------------------------
# Precision, memory


@pytest.mark.parametrize("stored, asked, loaded", [
    (torch.bfloat16, None, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, None, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float16, None, torch.float32)], ids=str)
def test_weights_keep_their_precision_unless_another_is_asked_for(stored, asked, loaded, tmp_path):
    config, tensors = write_folder(tmp_path, dtype=stored, **GATES["elementwise"])
    model = GPT.from_pretrained(tmp_path, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {loaded}
    expected = tensors["model.norm.weight"].to(stored).to(loaded)
    assert torch.equal(model.norm.weight, expected)
    rounded = {name: tensor.to(stored).to(loaded) for name, tensor in tensors.items()}
    assert furthest(logits(model), reference(rounded, config)) < (0.3 if loaded == torch.bfloat16 else 1e-5)


def test_the_angles_stay_float32_in_a_bfloat16_model(tmp_path):
    write_folder(tmp_path, dtype=torch.bfloat16)
    assert GPT.from_pretrained(tmp_path).cos.dtype == torch.float32


def test_loading_draws_no_random_numbers_and_needs_the_files_no_longer(tmp_path):
    config, tensors = write_folder(tmp_path)
    before = torch.get_rng_state()
    model = GPT.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\0" * size)
    assert furthest(logits(model), reference(tensors, config)) < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_a_loaded_model_trains_and_is_saved_as_a_checkpoint_of_ours(gate, tmp_path):
    write_folder(tmp_path, tie_word_embeddings=True, **GATES[gate])
    model, idx = GPT.from_pretrained(tmp_path), torch.tensor([TOKENS])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model.train()(idx[:, :-1], idx[:, 1:])[1])
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] and model.lm_head.weight is model.embed.weight
    save_checkpoint(tmp_path / "model.pt", model, {})
    assert torch.equal(logits(load_checkpoint(tmp_path / "model.pt")[0]), logits(model))


# ------------------------------------------------------------------------------------------------------------
# What does not fit is refused by name


def refusal(folder, **options):
    with pytest.raises(ValueError) as refused:
        GPT.from_pretrained(folder, **options)
    said = str(refused.value)
    assert "\n" not in said and str(folder) in said and len(said) < 1500
    return said


@pytest.mark.parametrize("changes", [
    dict(use_sliding_window=True), dict(rope_scaling={"rope_type": "yarn"}), dict(hidden_act="gelu"),
    dict(model_type="qwen2"), dict(quantization_config={"bits": 4}), dict(rope_parameters={"rope_theta": 1}),
    dict(headwise_attn_output_gate="yes"), dict(tie_word_embeddings="false"), dict(hidden_size="20"),
    dict(num_hidden_layers=2.0), dict(hidden_size=True), dict(rope_theta=True), dict(rope_theta=None),
    dict(partial_rotary_factor=0.5), dict(layer_types=["full_attention", "sliding_attention"]),
    dict(layer_types=5), dict(vocab_size=-23), dict(rms_norm_eps=0)], ids=str)
def test_a_config_that_asks_for_what_the_model_cannot_do_is_refused_by_name_and_value(changes, tmp_path):
    write_folder(tmp_path, drawn_tensors(CONFIG), **changes)
    (key, value), said = *changes.items(), refusal(tmp_path)
    ours = {"vocab_size": "vocab_size", "rms_norm_eps": "norm_eps"}.get(key, key)
    assert "config.json" in said and f"{ours}={value!r}" in said


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    write_folder(tmp_path, use_sliding_window=True, hidden_act="relu")
    said = refusal(tmp_path)
    assert "use_sliding_window=True" in said and "hidden_act='relu'" in said


def test_both_gates_at_once_contradict_each_other(tmp_path):
    write_folder(tmp_path, headwise_attn_output_gate=True, elementwise_attn_output_gate=True)
    said = refusal(tmp_path)
    assert "headwise_attn_output_gate=True" in said and "elementwise_attn_output_gate=True" in said


@pytest.mark.parametrize("changes", [
    dict(vocab_size=10**30), dict(max_position_embeddings=10**13), dict(num_hidden_layers=10**9),
    dict(num_hidden_layers=10**6), dict(hidden_size=10**400), dict(rope_theta=10**400),
    dict(rms_norm_eps=float("inf")), dict(rope_theta=float("nan"))], ids=lambda changes: next(iter(changes)))
def test_a_config_with_absurd_numbers_is_refused_before_anything_is_made(changes, tmp_path):
    write_folder(tmp_path, drawn_tensors(CONFIG), **changes)
    (key, value), said = *changes.items(), refusal(tmp_path)
    ours = {"rms_norm_eps": "norm_eps", "num_hidden_layers": "n_layer"}.get(key, key)
    assert f"{key}={value!r}" in said or f"{ours}={value!r}" in said or f"rope_base={value!r}" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_refused_where_one_would_wait_forever(name, tmp_path):
    write_folder(tmp_path, drawn_tensors(CONFIG))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert f"{name} is not a file" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_a_size_that_is_null_is_the_usual_one(key, tmp_path):
    usual = dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=24, head_dim=6)
    config, tensors = write_folder(tmp_path, drawn_tensors(CONFIG | usual), **usual)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: None}))
    assert furthest(logits(GPT.from_pretrained(tmp_path)), reference(tensors, config)) < 1e-5


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = drawn_tensors(CONFIG)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    write_folder(tmp_path, tensors)
    assert "not finite" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_saved_folder_whose_file_has_changed_is_refused_by_its_checksum(name, tmp_path):
    tiny().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert f"{tmp_path / name} " in (said := refusal(tmp_path)) and "SHA256SUMS" in said


def test_a_download_is_held_against_the_checksum_that_came_with_it(tmp_path):
    """`huggingface-cli download --local-dir` notes the commit, the checksum and the time of each file."""
    folder = tmp_path / "1B_baseline"
    folder.mkdir()
    write_folder(folder)
    file, note = folder / "model.safetensors", tmp_path / ".cache/huggingface/download/1B_baseline"
    note.mkdir(parents=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (note / "model.safetensors.metadata").write_text(f"{'a' * 40}\n{digest}\n1732500000.0\n")
    config = (folder / "config.json").read_bytes()  # a small file is noted with the name that Git gives it
    digest = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    (note / "config.json.metadata").write_text(f"{'a' * 40}\n{digest}\n1732500000.0\n")
    GPT.from_pretrained(folder)
    (folder / "config.json").write_bytes(config + b" ")
    assert "config.json" in (said := refusal(folder)) and "checksum" in said
    (folder / "config.json").write_bytes(config)
    with open(file, "rb+") as weights:
        weights.seek(-7, os.SEEK_END)
        weights.write(b"!")
    assert "model.safetensors" in (said := refusal(folder)) and "checksum" in said


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "rope_theta", "tie_word_embeddings"])
def test_a_key_that_is_missing_is_named(key, tmp_path):
    config, _ = write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    assert f"no {key}" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\0\1\2", '"text"', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(content, tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path)


def test_a_folder_without_config_or_weights_is_refused_with_the_file_it_lacks(tmp_path):
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight",
                                  "model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"])
def test_a_tensor_that_is_missing_is_named(name, tmp_path):
    tensors = drawn_tensors(CONFIG)
    del tensors[name]
    write_folder(tmp_path, tensors)
    assert f"no {name}" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias",
                                  "model.layers.0.self_attn.o_proj.bias", "something"])
def test_a_tensor_that_has_no_place_is_named(name, tmp_path):
    """Biases that are really there among them."""
    write_folder(tmp_path, drawn_tensors(CONFIG) | {name: torch.zeros(24)}, qkv_bias=True)
    assert f"no place for {name}" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["qkv_bias", "attention_bias"])
def test_biases_that_are_announced_but_not_there_are_no_obstacle(key, tmp_path):
    config, tensors = write_folder(tmp_path, **{key: True})
    assert furthest(logits(GPT.from_pretrained(tmp_path)), reference(tensors, config)) < 1e-5


@pytest.mark.parametrize("says, has", [("none", "headwise"), ("headwise", "elementwise"),
                                       ("elementwise", "none")])
def test_a_gate_that_is_not_the_one_of_the_config_shows_in_the_shape_of_q_proj(says, has, tmp_path):
    write_folder(tmp_path, drawn_tensors(CONFIG | GATES[has]), **GATES[says])
    assert re.search(r"layers.0.self_attn.q_proj.weight \[\d+, 20\], not \[\d+, 20\]", refusal(tmp_path))


def test_qk_norm_weights_and_use_qk_norm_must_agree(tmp_path):
    write_folder(tmp_path, drawn_tensors(CONFIG), use_qk_norm=False)
    assert "no place for model.layers.0.self_attn.q_norm.weight" in refusal(tmp_path)
    write_folder(tmp_path, drawn_tensors(CONFIG | dict(use_qk_norm=False)))
    assert "no model.layers.0.self_attn.k_norm.weight" in refusal(tmp_path)


def test_hundreds_of_names_are_shortened(tmp_path):
    write_folder(tmp_path, {f"other.{i}": torch.zeros(1) for i in range(500)})
    assert re.search(r" and 5\d\d more$", refusal(tmp_path))


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    config, tensors = write_folder(tmp_path, tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].clone()
    write_folder(tmp_path, tensors | {"lm_head.weight": head}, tie_word_embeddings=True)
    model = GPT.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embed.weight
    assert furthest(logits(model), reference(tensors, config)) < 1e-5
    head[3, 3] += 1
    write_folder(tmp_path, tensors | {"lm_head.weight": head}, tie_word_embeddings=True)
    assert "tie_word_embeddings=True" in refusal(tmp_path) and "lm_head.weight" in refusal(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    write_folder(tmp_path, drawn_tensors(CONFIG) | {name: torch.ones(28, 20, dtype=torch.int8)})
    assert f"{name} in torch.int8" in refusal(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:5], lambda b: b[:200], lambda b: b[:-1], lambda b: b + b"0",
    lambda b: b"\xff" * 8 + b[8:], lambda b: b[::-1]])
def test_a_damaged_file_of_weights_is_refused_by_name(damage, tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors can't be read" in refusal(tmp_path)


def test_a_shard_that_is_missing_and_an_index_that_is_none_are_refused(tmp_path):
    write_folder(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").rename(tmp_path / "elsewhere")
    assert "model-00002-of-00003.safetensors" in refusal(tmp_path)
    for content in ("{}", "no", *('{"weight_map": %s}' % it for it in ("3", '{"a": 1}', '{"a": "b"}'))):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused_since_one_of_them_would_go_unused(tmp_path):
    _, tensors = write_folder(tmp_path, shards=2)
    save_file(tensors, tmp_path / "model-00002-of-00002.safetensors")
    assert "and so does another shard" in refusal(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    _, tensors = write_folder(tmp_path / "other")
    write_folder(tmp_path / "folder", shards=2)
    where = dict.fromkeys(tensors, "../other/model.safetensors")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert "can't be read" in refusal(tmp_path / "folder")


def test_without_safetensors_one_is_told_what_to_install(tmp_path, monkeypatch):
    write_folder(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as where it is not installed
    for act in (lambda: GPT.from_pretrained(tmp_path), lambda: tiny().save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="pip install safetensors"):
            act()


# ------------------------------------------------------------------------------------------------------------
# The way back


def tiny(**fields):
    torch.manual_seed(5)
    model = GPT(GPTConfig(**(dict(vocab_size=23, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=20,
                                  head_dim=6) | fields)))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)  # norms that are not all 1
    return model


SAVED = [dict(), dict(gate="none"), dict(gate_kind="headwise"), dict(tie_embeddings=True, qk_norm=False),
         dict(n_kv_head=1, gate_kind="headwise", rope_base=1e6, norm_eps=1e-5), dict(n_kv_head=4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_a_round_trip_is_exact_bit_for_bit(fields, dtype, tmp_path):
    model = tiny(**fields).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = GPT.from_pretrained(str(tmp_path / "new" / "folder"))
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == dtype for name in ours)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        "SHA256SUMS", "config.json", "model.safetensors"}


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_what_is_saved_is_the_layout_and_means_the_same_model(fields, tmp_path):
    model = tiny(**fields)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    expected = drawn_tensors(config)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
    assert furthest(logits(model), reference(tensors, config)) < 2e-5
    assert config["qkv_bias"] is False and config["attention_bias"] is False
    assert config["architectures"] == ["Qwen3ForCausalLM"] and None not in config.values()
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # the authors' library asks for it


@pytest.mark.parametrize("gate", GATES)
def test_a_released_folder_read_and_written_holds_the_same_tensors(gate, tmp_path):
    config, tensors = write_folder(tmp_path / "a", shards=2, **GATES[gate])
    GPT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[n], tensors[n]) for n in tensors)


def test_dropout_is_no_part_of_the_model_that_is_written(tmp_path):
    tiny(dropout=0.2).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == tiny().config


@pytest.mark.parametrize("fields, named", [
    (dict(gate="g2"), "g2"), (dict(gate="g5"), "g5"), (dict(gate_share=True), "g1-shared"),
    (dict(gate_op="add", gate_act="silu"), "g1-add-silu"), (dict(gate_act="ns_sigmoid"), "g1-ns-sigmoid"),
    (dict(gate_input=False), "g1-no-input"), (dict(gate="none", sdpa_norm=True), "sdpa-norm"),
    (dict(gate="none", sdpa_silu=True), "sdpa-silu"), (dict(norm="sandwich"), "norm=sandwich"),
    (dict(n_expert=4, n_embd=16, head_dim=4), "n_expert=4")], ids=str)
def test_a_model_that_the_layout_has_no_words_for_is_refused_by_name(fields, named, tmp_path):
    with pytest.raises(ValueError, match=rf"\b{named}\b.*save_checkpoint"):
        tiny(**fields).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_saving_again_replaces_the_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    other = tiny(n_layer=1, gate="none")
    other.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == other.config
    GPT.from_pretrained(tmp_path).save_pretrained(tmp_path)  # over the very files it was read from
    assert torch.equal(logits(GPT.from_pretrained(tmp_path)), logits(other))


def test_a_save_that_stops_between_its_files_is_found_out_by_their_checksums(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    replace, moved = os.replace, []

    def replace_once(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        tiny(rope_base=7.0, n_layer=1).save_pretrained(tmp_path)
    assert "model.safetensors" in (said := refusal(tmp_path)) and "checksum" in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_model_whole(limit, tmp_path):
    resource = pytest.importorskip("resource")
    tiny().save_pretrained(tmp_path)
    if not (child := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            tiny(n_embd=64).save_pretrained(tmp_path)
        except OSError as error:
            os._exit(0 if "model.safetensors" in str(error) else 3)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(logits(GPT.from_pretrained(tmp_path)), logits(tiny()))
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "config.json", "model.safetensors"]
