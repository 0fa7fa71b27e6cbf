"""
The released models, in and out: GPT.from_pretrained, GPT.save_pretrained.

A folder of theirs holds config.json and model.safetensors, or shards of it with model.safetensors.index.json,
with the names of Hugging Face's Qwen3. Two things differ from ours: what tensors are called, and that q_proj
makes queries and gates at once. Tokenizers of such folders: released_tokenizer.py.

Reading order: the tables of names -> join_queries -> load_released -> save_released.
"""
import dataclasses
import json
from functools import partial
from pathlib import Path

import torch

from data.released_tokenizer import SUMS, check_unchanged, checksum
from gated_gpt import GPT, GPTConfig, is_finite, write_whole

RELEASED_CONFIG = {  # our field: their key in config.json
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "mlp_hidden": "intermediate_size", "rope_base": "rope_theta",
    "qk_norm": "use_qk_norm", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
RELEASED_FIXED = {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False,  # or not there
                  "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_parameters": None,
                  "quantization_config": None}
GATE_FLAGS = "headwise_attn_output_gate", "elementwise_attn_output_gate"
RELEASED_GATES = {"none": (False, False), "g1": (False, True), "g1-headwise": (True, False)}
RELEASED_PARTS = {  # a part of our parameters' names: theirs, where it is another
    "embed": "model.embed_tokens", "blocks": "model.layers", "attn_norm": "input_layernorm",
    "attn": "self_attn", "mlp_norm": "post_attention_layernorm", "norm": "model.norm"}


def released_name(name):
    """blocks.0.attn_norm.weight -> model.layers.0.input_layernorm.weight"""
    return ".".join(RELEASED_PARTS.get(part, part) for part in name.split("."))


def join_queries(queries, gate, nkv):
    """The fused q_proj: for each of the nkv key/value heads the rows of its queries, then of their gates."""
    return torch.cat([w.unflatten(0, (nkv, -1)) for w in (queries, gate)], dim=1).flatten(0, 1)


def split_queries(fused, nkv, rows):
    """The way back: (`rows` rows of queries, the rows of their gates)."""
    groups = fused.unflatten(0, (nkv, -1))  # (nkv, rows that belong to one key/value head, C)
    return groups[:, : rows // nkv].flatten(0, 1), groups[:, rows // nkv :].flatten(0, 1)


def released_tensors(model):
    """{their name: tensor} of a model; a tied head is there once, as the embedding."""
    own, nkv = dict(model.named_parameters()), model.config.n_kv_head
    gate = {name.replace("gate.gate_proj", "q_proj"): p for name, p in own.items() if ".attn.gate." in name}
    return {released_name(name): join_queries(p, gate[name], nkv) if name in gate else p
            for name, p in own.items() if ".attn.gate." not in name}


def safetensors_package():
    try:
        import safetensors.torch  # asked for only here
        return safetensors
    except ImportError:
        raise ValueError("the files of released models need safetensors: pip install safetensors") from None


def released_config(folder):
    """The GPTConfig of a released folder. ValueError names what config.json lacks or asks for in vain."""
    path, types = Path(folder, "config.json"), {f.name: f.type for f in dataclasses.fields(GPTConfig)}
    check_unchanged(path)
    try:
        asked = {"use_qk_norm": True, **dict.fromkeys(GATE_FLAGS, False), **json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({getattr(error, 'strerror', None) or error}): name the "
                         "folder of a released model, or get that file again") from None
    gate = [name for name, flags in RELEASED_GATES.items() if flags == tuple(map(asked.get, GATE_FLAGS))]
    wrong = [key for key, only in RELEASED_FIXED.items() if asked.get(key) not in (only, None)]
    wrong += [key for name, key in RELEASED_CONFIG.items()
              if not isinstance(asked.get(key, ""), float | int if types[name] is float else types[name])
              or type(asked[key]) is bool is not types[name]  # to Python, true is a whole number
              or abs(asked[key] or 0) > (1e300 if types[name] is float else 2**21)]  # what fits nowhere
    kinds = asked.get("layer_types") or []
    wrong += ["layer_types"] * (not isinstance(kinds, list) or kinds.count("full_attention") < len(kinds))
    wrong += () if gate else GATE_FLAGS
    try:
        if wrong:
            raise ValueError(", ".join(f"{k}={asked[k]!r}" if k in asked else f"no {k}" for k in wrong))
        fields = {name: asked[key] for name, key in RELEASED_CONFIG.items()}
        gate, _, kind = gate[0].partition("-")
        return GPTConfig(**fields, gate=gate, gate_kind=kind or "elementwise")
    except ValueError as error:
        raise ValueError(f"{path} describes a model that gated_gpt.py can't make: {error}") from None


def weight_files(folder):
    """Paths of a folder's weights: one file, or the shards that its index names."""
    path, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    if path.exists():
        return [path]
    if not index.exists():
        raise ValueError(f"{folder} holds no weights, neither {path.name} nor {index.name}: get them, too")
    check_unchanged(index)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [Path(folder, Path(name).name) for name in names]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} can't be read ({error}): get it again") from None


def released_files(folder):
    """{their name: tensor} of a folder's weights; mapped from disk, not read."""
    load_file, tensors = safetensors_package().torch.load_file, {}
    for path in weight_files(folder):
        check_unchanged(path)
        try:
            shard = load_file(path)
        except Exception as error:  # safetensors raises what the bytes lead it to
            raise ValueError(f"{path} can't be read ({error}): get it again") from None
        if twice := shard.keys() & tensors.keys():
            raise ValueError(f"{path} holds {min(twice)}, and so does another shard: get both again")
        tensors |= shard
    return tensors


def load_released(folder, block_size=None, dtype=None):
    """The model in a released folder, on the CPU. ValueError says which tensors do not fit its config.json.

    block_size: another window than max_position_embeddings. dtype: torch.float32 or torch.bfloat16; by
    default bfloat16 if that is what the files hold.
    """
    config, tensors = released_config(folder), released_files(folder)
    config = dataclasses.replace(config, block_size=block_size or config.block_size)
    if config.n_layer > len(tensors):
        raise ValueError(f"{folder}: num_hidden_layers={config.n_layer}, but only {len(tensors)} tensors")
    with torch.device("meta"):
        model = GPT(config)
    expected, wrong = released_tensors(model), []
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_embeddings and {head, embedding} <= tensors.keys():  # some write a tied head, too
        if not torch.equal(tensors.pop(head), tensors[embedding]):
            wrong.append(f"tie_word_embeddings=True, but {head} is not {embedding}")
    wrong += [f"no {name}" for name in expected if name not in tensors]
    wrong += [f"no place for {name}" for name in tensors if name not in expected]
    wrong += [f"{name} {list(tensors[name].shape)}, not {list(p.shape)}" for name, p in expected.items()
              if tensors.get(name, p).shape != p.shape]
    wrong += [f"{name} in {t.dtype}" for name, t in tensors.items() if not t.is_floating_point()]
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit config.json: " + ", ".join(wrong[:8])
                         + f" and {len(wrong) - 8} more" * (len(wrong) > 8))
    bf16 = all(t.dtype == torch.bfloat16 for t in tensors.values())
    dtype = dtype or (torch.bfloat16 if bf16 else torch.float32)
    weights = {}
    for name, _ in model.named_parameters():
        if ".attn.gate." not in name:  # a gate comes with its queries
            weights[name] = tensors.pop(released_name(name)).to(dtype, copy=True)
        if name.endswith("q_proj.weight") and config.gate != "none":
            weights[name], weights[name.replace("q_proj", "gate.gate_proj")] = split_queries(
                weights[name], config.n_kv_head, config.n_head * config.head_dim)
    model = GPT.with_weights(config, weights)
    if not is_finite(model):
        raise ValueError(f"{folder} holds weights that are not finite: get it again")
    return model


def save_released(model, folder):
    """Write config.json and model.safetensors, as load_released and the authors' code read them; SHA256SUMS.

    Raises ValueError for a model that the layout has no words for, OSError when it can't be written.
    """
    c, package = model.config, safetensors_package()
    if c.variant not in RELEASED_GATES or c.norm != "pre" or c.n_expert:
        raise ValueError(f"gate variant {c.variant}, norm={c.norm}, n_expert={c.n_expert}: the layout has "
                         f"{', '.join(RELEASED_GATES)}, norm=pre and no experts only; use save_checkpoint")
    says = {key: only for key, only in RELEASED_FIXED.items() if only is not None}
    says |= {key: getattr(c, name) for name, key in RELEASED_CONFIG.items()}
    says |= dict(zip(GATE_FLAGS, RELEASED_GATES[c.variant]), architectures=["Qwen3ForCausalLM"],
                 qkv_bias=False, attention_bias=False, torch_dtype=str(model.embed.weight.dtype)[6:])
    tensors = {name: p.detach().cpu().contiguous() for name, p in released_tensors(model).items()}

    def write_config(temporary):
        Path(temporary).write_text(json.dumps(says, indent=2) + "\n", encoding="utf-8")

    def write_sums(temporary):  # after the others; a kill between two moves is found out by it
        Path(temporary).write_text("".join(f"{checksum(f'{path}.tmp')}  {path.name}\n" for path in files))

    Path(folder).mkdir(parents=True, exist_ok=True)
    files = {Path(folder, "model.safetensors"): partial(package.torch.save_file, tensors,
                                                        metadata={"format": "pt"}),
             Path(folder, "config.json"): write_config}
    write_whole(files | {Path(folder, SUMS): write_sums})
