"""
Claims about released models: their folders are read as described, written back, and refused for a reason.

The folders are built here from the description of the layout, and the reference computes from their tensors
in plain loops, row by row of the fused q_proj: nothing of the project is asked what the layout is. Their
tokenizer is a small BPE with the pattern and the normal form of Qwen, made by the `tokenizers` package.
"""
import cmath
import json
import math
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, configs, fit, refusal, status_of

import sample
import train
from data import prepare
from data.tokenizers import bos_id, end_ids, get_tokenizer, token_bytes
from gated_gpt import GPT, GPTConfig, measure
from plumbing import machine
from plumbing.released import load_released, save_released
from plumbing.report import variant

safetensors = pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

CONFIG = dict(model_type="qwen3", hidden_size=20, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=6, intermediate_size=28, rope_theta=500, rms_norm_eps=1e-5,
              tie_word_embeddings=False, vocab_size=23, max_position_embeddings=64, use_qk_norm=True,
              headwise_attn_output_gate=False, elementwise_attn_output_gate=False, hidden_act="silu",
              attention_dropout=0.1, sliding_window=4096, use_sliding_window=False, rope_scaling=None,
              rope_parameters=None,
              max_window_layers=28, torch_dtype="bfloat16", bos_token_id=3)
GATES = {"none": {}, "headwise": dict(headwise_attn_output_gate=True),
         "elementwise": dict(elementwise_attn_output_gate=True)}
TOKENS = [3, 0, 22, 7, 7, 15, 1, 9, 11]


# --- a folder, and what its model says --------------------------------------------------------------


def gate_rows(config):
    """Rows of q_proj that are gates, for one head."""
    headwise, elementwise = (config[f"{kind}_attn_output_gate"] for kind in ("headwise", "elementwise"))
    return 1 if headwise else config["head_dim"] * elementwise


def drawn_tensors(config):
    """Random tensors with the names and shapes of the layout."""
    hidden, hs, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    nh, nkv = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer, attn = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        shapes |= {layer + "input_layernorm": (hidden,), layer + "post_attention_layernorm": (hidden,),
                   attn + "q_proj": (nh * (hs + gate_rows(config)), hidden),
                   attn + "k_proj": (nkv * hs, hidden), attn + "v_proj": (nkv * hs, hidden),
                   attn + "o_proj": (hidden, nh * hs),
                   layer + "mlp.gate_proj": (inner, hidden), layer + "mlp.up_proj": (inner, hidden),
                   layer + "mlp.down_proj": (hidden, inner)}
        shapes |= {attn + "q_norm": (hs,), attn + "k_norm": (hs,)} if config["use_qk_norm"] else {}
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            for name, shape in shapes.items()}


def write_folder(folder, tensors=None, shards=1, without=(), says=None, **changes):
    """A folder of CONFIG with changes; returns (config, tensors). config.json may lie: `without`, `says`."""
    config = CONFIG | changes
    tensors = drawn_tensors(config) if tensors is None else tensors
    said = {key: value for key, value in (config | (says or {})).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(said))
    for i in range(shards):
        name = "model" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}"
        save_file({n: tensors[n] for n in sorted(tensors)[i::shards]}, folder / f"{name}.safetensors")
    return config, tensors


def normed(v, weight, eps):
    return v if weight is None else v / math.sqrt(sum(x * x for x in v.tolist()) / len(v) + eps) * weight


def rotated(v, position, config):
    """Each pair of channels i and i + half as one complex number, turned by position * base^(-i / half).

    "linear": factor times slower. "yarn": so from the pair on that turns once in the original window, not at
    all up to the one that turns 32 times, and in between along a line; and v gets longer.
    """
    rope = config["rope_parameters"] or config["rope_scaling"] or {}
    base, factor = rope.get("rope_theta", config["rope_theta"]), rope.get("factor", 1)
    kind, half, turned, longer = rope.get("rope_type", rope.get("type")), len(v) // 2, [], 1
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    for i, (a, b) in enumerate(zip(v[:half], v[half:])):
        speed, slow = base ** (-i / half), kind == "linear"
        if kind == "yarn":
            pairs = [half * math.log(original / (turns * 2 * math.pi), base) for turns in (32, 1)]
            start, end = max(0, math.floor(pairs[0])), min(len(v) - 1, math.ceil(pairs[1]))
            slow, longer = min(1, max(0, (i - start) / (end - start))), 0.1 * math.log(factor) + 1
        turned.append(longer * complex(a, b) * cmath.exp(1j * position * speed * (1 - slow + slow / factor)))
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=v.dtype)


def attention(x, w, config):
    """Attention of one layer, for positions, key/value heads and the heads of their groups, one by one."""
    hs, nkv, eps = config["head_dim"], config["num_key_value_heads"], config["rms_norm_eps"]
    per_group, n_scores = config["num_attention_heads"] // nkv, gate_rows(config)
    fused, out = w["q_proj"].view(nkv, -1, config["hidden_size"]), [[] for _ in x]
    for g in range(nkv):
        rows = slice(g * hs, (g + 1) * hs)
        keys = [rotated(normed(w["k_proj"][rows] @ h, w.get("k_norm"), eps), t, config)
                for t, h in enumerate(x)]
        for j in range(per_group):
            of_query = fused[g, j * hs : (j + 1) * hs]
            first = per_group * hs + j * n_scores
            for t, h in enumerate(x):
                q = rotated(normed(of_query @ h, w.get("q_norm"), eps), t, config)
                weights = [math.exp(float(q @ k) / math.sqrt(hs)) for k in keys[: t + 1]]
                y = sum(a / sum(weights) * (w["v_proj"][rows] @ past) for a, past in zip(weights, x))
                gate = 1 / (1 + torch.exp(-(fused[g, first : first + n_scores] @ h))) if n_scores else 1
                out[t].append(y * gate)
    return [w["o_proj"] @ torch.cat(heads) for heads in out]


def reference(tensors, config):
    """Logits (T, V) of TOKENS in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps, embedding = config["rms_norm_eps"], tensors["model.embed_tokens.weight"]
    x = [embedding[token] for token in TOKENS]
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
    dict(rope_theta=1000000.0, rms_norm_eps=1e-2), dict(rope_scaling={"type": "linear", "factor": 4}),
    dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    dict(rope_scaling={"rope_type": "default"}), dict(without=["rope_theta"], rope_parameters={
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 50.0, "beta_fast": 32.0, "attention_factor": None}),
    dict(without=["rope_theta"], rope_parameters={"rope_type": "default", "rope_theta": 70})], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_a_released_folder_gives_the_logits_of_a_forward_in_plain_loops(gate, changes, tmp_path):
    config, tensors = write_folder(tmp_path, **GATES[gate], **changes)
    model, expected = load_released(tmp_path), reference(tensors, config)
    assert expected.std() > 0.5 and furthest(logits(model), expected) < 1e-5
    assert variant(model.config) == {"none": "none", "headwise": "g1-headwise", "elementwise": "g1"}[gate]


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_queries_and_gates_split_in_two_halves_would_be_another_model(gate, tmp_path):
    """So the comparison above can fail: it tells the rows of one key/value head from those of another."""
    config, tensors = write_folder(tmp_path, **GATES[gate])
    rows = config["num_attention_heads"] * config["head_dim"]
    for name in [name for name in tensors if "q_proj" in name]:
        queries, gates = tensors[name][:rows].chunk(2), tensors[name][rows:].chunk(2)
        tensors[name] = torch.cat([half for group in zip(queries, gates) for half in group])
    assert furthest(logits(load_released(tmp_path)), reference(tensors, config)) > 0.01


@pytest.mark.parametrize("written", [
    dict(without=["use_qk_norm", *(f"{gate}_attn_output_gate" for gate in ("headwise", "elementwise"))]),
    dict(says=dict(head_dim=None)), dict(says=dict(num_key_value_heads=None))], ids=str)
def test_a_key_that_is_absent_or_null_means_the_usual_value(written, tmp_path):
    config, tensors = write_folder(tmp_path, num_key_value_heads=4, hidden_size=24, **written)
    assert furthest(logits(load_released(tmp_path)), reference(tensors, config)) < 1e-5


def test_another_window_means_the_same_positions(tmp_path):
    write_folder(tmp_path)
    short = load_released(tmp_path, block_size=len(TOKENS))
    assert short.config.block_size == len(TOKENS) == len(short.cos)
    assert torch.equal(logits(short), logits(load_released(tmp_path)))


def test_a_loaded_model_needs_its_files_no_longer(tmp_path):
    config, tensors = write_folder(tmp_path)
    model, path = load_released(tmp_path), tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert furthest(logits(model), reference(tensors, config)) < 1e-5


# --- what does not fit is refused by name -----------------------------------------------------------


def refused(folder):
    """The sentence with which a folder is refused; it names the folder."""
    with pytest.raises(ValueError) as refusal:
        load_released(folder)
    said = str(refusal.value)
    assert "\n" not in said and str(folder) in said and len(said) < 1500
    return said


@pytest.mark.parametrize("changes", [
    dict(use_sliding_window=True), dict(hidden_act="gelu"),
    dict(model_type="qwen2"), dict(quantization_config={"bits": 4}), dict(partial_rotary_factor=0.5),
    dict(headwise_attn_output_gate="yes"), dict(vocab_size=-23), dict(vocab_size=10**30),
    dict(num_attention_heads=3), dict(max_position_embeddings=0), dict(head_dim=5)], ids=str)
def test_a_config_that_asks_for_what_cannot_be_had_is_refused_by_key_with_its_value(changes, tmp_path):
    write_folder(tmp_path, says=changes)
    (key, value), said = *changes.items(), refused(tmp_path)
    ours = {"num_attention_heads": "n_head", "max_position_embeddings": "block_size"}.get(key, key)
    assert "config.json" in said and f"{ours}={value!r}" in said


@pytest.mark.parametrize("rope, said", [
    ({"rope_type": "llama3", "factor": 8.0}, "rope_type='llama3'"), ({"rope_type": "yarn"}, "no factor"),
    ({"type": "linear", "factor": "4"}, "factor='4'"),
    ({"rope_type": "linear", "factor": 0.5}, "rope_factor=0.5"),
    ({"rope_type": "yarn", "factor": 4, "attention_factor": 1.5}, "attention_factor=1.5"),
    ({"rope_type": "yarn", "factor": 4, "beta_slow": 2}, "beta_slow=2")], ids=str)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_scaling_of_rope_that_cannot_be_had_is_refused_by_key_with_its_value(key, rope, said, tmp_path):
    write_folder(tmp_path, says={key: rope})
    assert said in refused(tmp_path)


@pytest.mark.parametrize("changes", [
    dict(hidden_size="20"), dict(num_hidden_layers=2.0), dict(max_position_embeddings=None),
    dict(layer_types=5), dict(rope_scaling="yarn"), dict(rope_parameters=[1])], ids=str)
def test_a_config_with_a_value_of_another_kind_is_refused(changes, tmp_path):
    write_folder(tmp_path, says=changes)
    assert "config.json" in refused(tmp_path)


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    write_folder(tmp_path, without=["rope_theta", "head_dim"], hidden_act="relu",
                 headwise_attn_output_gate=True, elementwise_attn_output_gate=True,
                 layer_types=["full_attention", "sliding_attention"])
    for what in ("hidden_act='relu'", "headwise_attn_output_gate=True", "elementwise_attn_output_gate=True",
                 "layer_types=['full_attention', 'sliding_attention']", "no rope_theta", "no head_dim"):
        assert what in refused(tmp_path)


@pytest.mark.parametrize("name, said", [
    *((f"{name}.weight", "no") for name in ("model.norm", "model.layers.1.mlp.up_proj", "lm_head",
                                                 "model.embed_tokens", "model.layers.0.self_attn.q_proj")),
    ("model.layers.2.mlp.up_proj.weight", "no place for"), ("model.norm.bias", "no place for")])
def test_a_tensor_that_is_missing_or_has_no_place_is_named(name, said, tmp_path):
    tensors = drawn_tensors(CONFIG)
    if tensors.pop(name, None) is None:
        tensors[name] = torch.zeros(24)
    write_folder(tmp_path, tensors)
    assert f"{said} {name}" in refused(tmp_path)


@pytest.mark.parametrize("says, has", [("none", "headwise"), ("headwise", "elementwise"),
                                       ("elementwise", "none")])
def test_a_gate_other_than_that_of_the_config_shows_in_the_shapes(says, has, tmp_path):
    write_folder(tmp_path, drawn_tensors(CONFIG | GATES[has]), **GATES[says])
    assert re.search(r"size mismatch for blocks.0.attn.(q_proj|gate.gate_proj).weight", refused(tmp_path))


def test_a_fused_projection_whose_rows_cannot_be_split_is_refused(tmp_path):
    odd = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(27, 20)}
    write_folder(tmp_path, drawn_tensors(CONFIG) | odd, **GATES["headwise"])
    assert "the weights do not fit config.json" in refused(tmp_path)


def test_a_tied_head_may_be_stored_a_second_time(tmp_path):
    _, tensors = write_folder(tmp_path, tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].clone()
    config, _ = write_folder(tmp_path, tensors | {"lm_head.weight": head}, tie_word_embeddings=True)
    assert furthest(logits(load_released(tmp_path)), reference(tensors, config)) < 1e-5


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b"{", lambda b: b"[1, 2]", lambda b: b[:200], lambda b: b[:-1],
    lambda b: b + b"0", lambda b: b"\xff" * 8 + b[8:]])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name(name, damage, released):
    path = Path(released, name)
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} " in refusal(sample.main, ["--ckpt=released"])


@pytest.mark.parametrize("name, said", [("tokenizer.json", "released/tokenizer.json is no tokenizer"),
                                        ("model.safetensors", "released holds no weights"),
                                        ("config.json", "released/best.pt")])  # it could be a run's folder
def test_a_folder_that_is_not_whole_is_refused(name, said, released):
    Path(released, name).unlink()
    assert said in refusal(sample.main, ["--ckpt=released"])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(name, released):
    Path(released, name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    assert f"{name} " in (said := refusal(sample.main, ["--ckpt=released"])) and "run `git lfs pull`" in said


def test_weights_whose_names_lack_the_prefix_model_are_read(tmp_path):
    config, tensors = write_folder(tmp_path)
    write_folder(tmp_path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert furthest(logits(load_released(tmp_path)), reference(tensors, config)) < 1e-5


def test_biases_are_refused_with_the_key_that_asks_for_them(tmp_path):
    biases = {f"model.layers.0.self_attn.{name}_proj.bias": torch.zeros(24) for name in "qk"}
    write_folder(tmp_path, drawn_tensors(CONFIG) | biases, says=dict(attention_bias=True))
    with pytest.raises(ValueError, match="has weights for attention_bias=True, which"):
        load_released(tmp_path)


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_without_a_package_one_is_told_what_to_install(package, released, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    assert f"pip install {package}" in refusal(sample.main, ["--ckpt=released"])


# --- the way back -----------------------------------------------------------------------------------


def made(**fields):
    """A small model whose numbers are all different from where they start."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**(dict(vocab_size=23, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=20,
                                  head_dim=6) | fields)))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


SAVED = [dict(), dict(gate="none"), dict(gate_kind="headwise"), dict(tie_embeddings=True, qk_norm=False),
         dict(n_kv_head=1, gate_kind="headwise", rope_base=1e6, norm_eps=1e-5), dict(n_kv_head=4),
         dict(rope_scaling="linear", rope_factor=4.0, rope_trained=16),
         dict(rope_scaling="yarn", rope_factor=2.5, rope_trained=64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_a_round_trip_is_exact_bit_for_bit(fields, dtype, tmp_path):
    model = made(**fields)
    for p in model.parameters():
        p.data = p.data.to(dtype)  # the angles stay float32
    save_released(model, tmp_path / "new" / "folder")
    loaded = load_released(tmp_path / "new" / "folder")
    ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, loaded))
    assert loaded.config == model.config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert (loaded.lm_head.weight is loaded.embed.weight) == model.config.tie_embeddings


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile imports much
def test_a_compiled_model_is_written_as_what_it_is(tmp_path):
    model = made()
    save_released(torch.compile(model), tmp_path)
    assert all(map(torch.equal, load_released(tmp_path).parameters(), model.parameters()))


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_what_is_saved_means_the_same_model_in_their_layout(fields, tmp_path):
    model = made(**fields)
    save_released(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in drawn_tensors(config).items()}
    assert furthest(logits(model), reference(tensors, CONFIG | config)) < 2e-5


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_what_is_saved_can_come_back_with_the_keys_of_transformers_5(fields, tmp_path):
    model = made(**fields)
    save_released(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config))
    assert load_released(tmp_path).config == model.config
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["attention_bias"] is False
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # the authors' library asks for it


@pytest.mark.parametrize("fields, named", [
    (dict(gate="g2"), "g2"), (dict(gate_shared=True), "g1-shared"), (dict(gate_op="add"), "g1-add"),
    (dict(gate_act="ns_sigmoid"), "g1-ns-sigmoid"), (dict(gate_input=False), "g1-no-input"),
    (dict(gate="none", sdpa_norm=True), "none-sdpa-norm"), (dict(sdpa_silu=True), "g1-sdpa-silu"),
    (dict(norm="sandwich"), "g1-sandwich"), (dict(n_expert=4), "g1-moe")], ids=str)
def test_a_model_that_the_layout_has_no_words_for_is_refused_by_name(fields, named, tmp_path):
    with pytest.raises(ValueError, match=rf"the released layout has no {named}, only"):
        save_released(made(**fields), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# --- the tokenizer ----------------------------------------------------------------------------------


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SAMPLES = [
    "", " ", "a", "I'M sure they'll say it's HERS", "def f(x):\n    return {x: [1, 22, 333]}  # ok\n\n\tpass",
    "🙂🏽👩‍👩‍👧 🇫🇷!", "東京で働く。 中文字符，很多", "naïve Å Å fi ﬁ ½ ² Ⅷ ٣", "العربية हिन्दी ไทย",
    "e\u0301\u0327 \u1100\u1161\u11a8 한글", "각     lots   of \t\t spaces  \r\n  \r\n end   ", "x" * 700,
    "\x00\x01\x7f", "<|endoftext|", "ſ's 'S 'ſ ß İ", "\u00a0\u2003\u2028x\u0085y\u200b\ufeff\U0010ffff"]


@pytest.fixture(scope="session")
def theirs():
    """A small tokenizer like Qwen's, as the package made it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(ROOT / "gated_gpt.py").read_text(encoding="utf-8"), *SAMPLES], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])  # 700, 701, at the end as in Qwen
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False)])  # Qwen has such, too
    first = ("<|endoftext|>", 700)  # the package would put it in front of each text
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    return tokenizer


@pytest.fixture
def released(theirs, here):
    """The name of a folder with this tokenizer and a small model, whose window is more than 512 tokens."""
    get_tokenizer.cache_clear()
    token_bytes.cache_clear()
    save_released(made(vocab_size=708, block_size=600, gate_kind="headwise"), "released")
    theirs.save("released/tokenizer.json")
    return "released"


def ids(theirs, text):
    return theirs.encode(text, add_special_tokens=False).ids


def text_of(tokens, errors="strict"):
    """The text of these tokens, from the bytes of each alone."""
    return b"".join(map(get_tokenizer("released").decode_single_token_bytes, tokens)).decode(errors=errors)


def test_a_folders_tokens_are_those_of_the_package_that_made_it(theirs, released):
    tokenizer, rng = get_tokenizer(released), random.Random(0)
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    mixtures = ["".join(rng.sample([rng.choice(SAMPLES), *rng.choices(characters, k=5),
                                    *rng.choices("\n\r\t 's'Te1.", k=8)], k=14)) for _ in range(300)]
    for text in [*SAMPLES, *mixtures]:
        assert tokenizer.encode_ordinary(text) == ids(theirs, text), ascii(text)
        assert text_of(ids(theirs, text)) == unicodedata.normalize("NFC", text)
    assert tokenizer.n_vocab == theirs.get_vocab_size() == 703
    assert tokenizer.decode_single_token_bytes(705) == b""  # a model's vocabulary may be rounded up


def test_a_text_that_says_a_special_token_is_plain_text(released):
    text = "a<|im_start|>b <|endoftext|>"
    tokens = get_tokenizer(released).encode_ordinary(text)
    assert text_of(tokens) == text and {700, 701}.isdisjoint(tokens)


@pytest.mark.parametrize("text", ["naïve 東京 <|endoftext|>", "<think>"])
def test_the_lengths_of_a_texts_tokens_are_the_bytes_of_the_text(text, released):
    assert token_bytes(released)[get_tokenizer(released).encode_ordinary(text)].sum() == len(text.encode())


@pytest.mark.parametrize("config, start", [
    ({"bos_token_id": 701, "eos_token_id": 700}, 701), ({"bos_token_id": None, "eos_token_id": 701}, 701),
    ({"eos_token_id": [701, 700]}, 700), ({"bos_token_id": 7}, 700), ({}, 700), (None, 700)], ids=str)
def test_a_text_starts_with_bos_or_eos_if_special_else_with_endoftext(config, start, released):
    path = Path(released, "config.json")
    path.unlink() if config is None else path.write_text(json.dumps(config))
    assert bos_id(released) == start


@pytest.mark.parametrize("config, generation, ends", [
    (701, None, {701}), ([701, 700], None, {700, 701}), (None, None, {700}), (7, None, {700}),
    (700, [701, 700], {700, 701}), (700, 701, {700, 701}), (700, 9999, {700})])
def test_a_text_ends_at_the_special_tokens_that_the_folder_names_as_eos(config, generation, ends, released):
    Path(released, "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation:
        Path(released, "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_ids(released) == ends


def test_the_command_makes_a_set_in_the_tokens_of_a_folder(released, tmp_path, use_data):
    text = "naïve e\u0301 東京 <|endoftext|> " * 100
    Path("text.txt").write_text(text, encoding="utf-8")
    use_data(tmp_path / "sets")
    done = subprocess.run([sys.executable, prepare.__file__, "text.txt", "--tokenizer=released"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    meta, tokens = prepare.load("text")
    parts = [text_of(tokens[split][1:].tolist()) for split in ("train", "val")]
    assert "".join(parts) == unicodedata.normalize("NFC", text)
    assert (meta["tokenizer"], meta["vocab_size"]) == (str(Path(released).resolve()), 703)
    assert tokens["train"][0] == tokens["val"][0] == meta["bos"] == 700


# --- sample.py and train.py -------------------------------------------------------------------------


def says(*flags):
    """What sample.py prints for the folder, behind its title."""
    status, out, err = status_of(sample.main, ["--ckpt=released", *flags])
    assert status == 0, err
    title, text = out.split("\n\n", 1)
    assert title.startswith("released: gate g1-headwise, a released model")
    return text


@pytest.mark.parametrize("prompt", ["Sparse 東京", ""])
def test_a_prompt_is_continued_without_a_bos_in_front_unless_it_is_empty(prompt, theirs, released):
    start, model = ids(theirs, prompt), load_released(released)
    tokens = start or [700]
    for _ in range(12):
        tokens = [*tokens, logits(model, tokens)[-1].argmax().item()]
    new = text_of(tokens[len(start) + (not start):], errors="replace")
    said = says(f"--prompt={prompt}", "--tokens=12", "--temperature=0")
    assert said.rstrip("\n\ufffd") == (prompt + new).rstrip("\n\ufffd") and len(said) > len(prompt) + 9


def test_without_a_prompt_the_token_that_it_starts_from_is_named(released):
    assert "no prompt: the text starts from <|endoftext|>\n" == status_of(
        sample.main, "--ckpt=released --tokens=2")[2]
    assert status_of(sample.main, "--ckpt=released --prompt=a --tokens=2")[2] == ""


@pytest.fixture
def own(released, data_root, tmp_path, use_data):
    """A run of ours in `run`, on a set `own` in the tokens of the folder."""
    use_data(tmp_path / "sets")
    prepare.prepare_files([data_root / "text.txt"], "own", released)
    fit(data="own", max_steps=2, out="run")
    return Path("run")


def test_a_run_in_the_tokens_of_a_folder_has_a_bos_in_front(own, monkeypatch):
    windows = []
    monkeypatch.setattr(sample, "measure_blocks", lambda model, _: windows.append(_) or measure(model, _))
    assert status_of(sample.main, "--ckpt=run --prompt=a --tokens=2 --attn_share")[0] == 0
    assert windows[0][0, 0] == bos_id("released") and windows[0].size(1) == 4


def test_a_tokenizer_that_was_moved_is_found_beside_the_run_or_where_a_flag_says(own, released):
    flags = "--ckpt=run --prompt=a --tokens=3"
    before = status_of(sample.main, flags)
    assert before[0] == 0
    Path(released).rename("moved")
    get_tokenizer.cache_clear()
    assert "nor a folder that is there: copy it beside the run" in refusal(sample.main, flags)
    assert status_of(sample.main, f"{flags} --tokenizer=moved") == before
    shutil.copytree("moved", "run/tokenizer")
    assert status_of(sample.main, flags) == before


def test_a_run_whose_tokenizer_was_moved_ends_without_a_sample_until_it_is_copied_to_the_set(own, released):
    Path(released).rename("moved")
    get_tokenizer.cache_clear()
    model, (_, c) = load_released("moved"), configs(data="own")
    assert train.sampled(model, c).startswith("none: tokenizer ")
    shutil.copy("moved/tokenizer.json", prepare.DATA / "own")
    assert not train.sampled(model, c).startswith("none: ")


def test_the_same_tokenizer_in_another_place_is_the_same(own, released, data_root):
    shutil.copytree(released, "copy")
    prepare.prepare_files([data_root / "text.txt"], "twin", "copy")
    config, c = configs(data="twin", init_from="run")
    config, meta, *_ = train.open_data(config, c, torch.device("cpu"))
    assert meta["tokenizer"].endswith("copy") and train.start(config, c, meta, torch.device("cpu"))
    path = Path("copy/tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))
    get_tokenizer.cache_clear()
    with pytest.raises(ValueError, match="run reads tokens of .*released, but twin has those of .*copy"):
        train.start(config, c, meta, torch.device("cpu"))


@pytest.mark.parametrize("stored, asked, able, used", [
    ("float32", "bfloat16", False, "bfloat16"), ("bfloat16", "float32", True, "float32"),
    ("bfloat16", "auto", True, "bfloat16"), ("bfloat16", "auto", False, "float32")])
def test_dtype_casts_the_weights_but_not_the_angles(stored, asked, able, used, released, monkeypatch):
    save_released(load_released(released).to(getattr(torch, stored)), released)
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: able)
    seen = []
    monkeypatch.setattr(sample, "measure_blocks", lambda model, _: seen.append(model) or measure(model, _))
    says("--prompt=S", "--tokens=3", "--attn_share", f"--dtype={asked}")
    assert {p.dtype for p in seen[0].parameters()} == {getattr(torch, used)}
    assert seen[0].cos.dtype == torch.float32


def test_text_is_measured_in_blocks_of_512_tokens_beside_what_others_found(theirs, released):
    Path("text.txt").write_text((ROOT / "train.py").read_text(encoding="utf-8")[:9_000], encoding="utf-8")
    tokens = ids(theirs, Path("text.txt").read_text(encoding="utf-8"))
    blocks = torch.tensor([tokens[i : i + 512] for i in range(0, len(tokens) - 511, 512)])
    layers = measure(load_released(released), blocks)  # all at once
    means = [np.mean([layer[name] for layer in layers])
             for name in ("first_token_share", "gate_score", "max_activation")]
    ours, paper, others = says("--attn_share", "--text=text.txt").strip().splitlines()[-3:]
    assert ours.startswith(f"here, {len(blocks)} x 512 tokens") and len(blocks) > 4
    assert np.allclose([float(number) for number in ours.split()[-3:]], means, atol=0.06, rtol=0.002)
    assert paper.split()[-3:] == ["0.073", "0.172", "98.0"] and others.split()[-3:] == ["0.050", "0.257", "-"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_both_numbers(released):
    save_released(made(vocab_size=300), released)
    assert "has 703 tokens, but the model only 300" in refusal(sample.main, ["--ckpt=released"])


def test_training_starts_from_released_weights_in_float32(released, data_root, tmp_path, use_data):
    use_data(tmp_path / "sets")
    prepare.prepare_files([data_root / "text.txt"], "own", released)
    save_released(load_released(released).bfloat16(), released)
    config, c = train.configs_from(dict(init_from=released, data="own", device="cpu", block_size=64))
    config, meta, _, _ = train.open_data(config, c, torch.device("cpu"))
    model, there = train.start(config, c, meta, torch.device("cpu"))[0], load_released(released)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config.block_size == 64
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), there.parameters(), strict=True))
