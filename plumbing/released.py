"""
Other people's models, in and out: load_released, save_released.

A folder of theirs holds config.json, tokenizer.json and model.safetensors, or several *.safetensors with an
index. Two families are read: Llama, with Mistral where it has no sliding window; and Qwen3, with the paper's
gates or without. Two things differ from ours: the names of the tensors, and that a gated q_proj makes queries
and gates at once. What stands in front of a text is said by the folder's tokenizer. The layout has no place
for our BOS, so a model of ours, once exported, shows no sink on it: measure its checkpoint.
"""
import dataclasses
import json
from pathlib import Path
from typing import get_args

import torch

from gated_gpt import GPT, GPTConfig, rope_table
from plumbing.files import whole_file, why
from plumbing.report import variant

KEYS = {  # our field: their key in config.json
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "mlp_hidden": "intermediate_size", "rope_base": "rope_theta",
    "qk_norm": "use_qk_norm", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
ROPE_KEYS = {"rope_factor": "factor", "rope_trained": "original_max_position_embeddings"}  # with rope_scaling
ROPES = {"default": "none", "linear": "linear", "yarn": "yarn"}  # their rope_type: our rope_scaling
FIXED = {"hidden_act": "silu", "use_sliding_window": False,
         "partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True,
         "attention_factor": None, "mscale": None, "quantization_config": None}  # must be so, or absent
LLAMA = {"use_qk_norm": False, "head_dim": None, "num_key_value_heads": None, "rope_theta": 10000.0,
         "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
FAMILIES = {  # model_type: what a config.json means that leaves out these keys
    "qwen3": {"use_qk_norm": True}, "llama": LLAMA, "mistral": LLAMA | {"sliding_window": 4096}}
TYPES = {f.name: f.type for f in dataclasses.fields(GPTConfig)}
GATES = {"none": (False, False), "g1": (False, True), "g1-headwise": (True, False)}
GATE_KEYS = "headwise_attn_output_gate", "elementwise_attn_output_gate"
PARTS = {  # a part of our parameters' names: theirs, where it differs
    "embed": "model.embed_tokens", "blocks": "model.layers", "attn_norm": "input_layernorm",
    "attn": "self_attn", "mlp_norm": "post_attention_layernorm", "norm": "model.norm"}


def their_name(name):
    """blocks.0.attn_norm.weight -> model.layers.0.input_layernorm.weight"""
    return ".".join(PARTS.get(part, part) for part in name.split("."))


def join_queries(queries, gates, nkv):
    """The fused q_proj: for each of the nkv key/value heads the rows of its queries, then of their gates."""
    return torch.cat([w.unflatten(0, (nkv, -1)) for w in (queries, gates)], dim=1).flatten(0, 1)


def split_queries(fused, nkv, rows):
    """The way back: (`rows` rows of queries, the rows of their gates)."""
    groups = fused.unflatten(0, (nkv, -1))  # (nkv, rows that belong to one key/value head, C)
    return groups[:, : rows // nkv].flatten(0, 1), groups[:, rows // nkv :].flatten(0, 1)


def safetensors():
    try:
        import safetensors.torch  # asked for only here
        return safetensors.torch
    except ImportError:
        raise ValueError("the files of released models need a package: pip install safetensors") from None


def config_of(folder):
    """The GPTConfig of a folder. ValueError names what config.json lacks, or asks for and cannot have."""
    path = Path(folder, "config.json")
    try:
        said = json.loads(path.read_bytes())
        asked = dict.fromkeys(GATE_KEYS, False) | FAMILIES.get(said.get("model_type") or "qwen3", {}) | said
        for key in ("rope_scaling", "rope_parameters"):  # the second, with all of RoPE, is of transformers 5
            asked |= asked.get(key) or {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {why(path, error)}") from None
    wrong = [f"{key}={asked[key]!r}" for key, only in FIXED.items() if asked.get(key) not in (only, None)]
    if (family := asked.get("model_type")) not in (*FAMILIES, None):
        wrong.append(f"model_type={family!r}")
    if family == "mistral" and asked["sliding_window"]:
        wrong.append(f"sliding_window={asked['sliding_window']!r}")
    rope_type, keys = asked.get("rope_type") or asked.get("type", "default"), KEYS
    if rope_type != "default":
        keys = KEYS | ROPE_KEYS
        asked.setdefault("original_max_position_embeddings", asked.get("max_position_embeddings"))
    if rope_type not in ROPES:
        wrong.append(f"rope_type={rope_type!r}")
    for name, key in keys.items():
        kinds = get_args(TYPES[name]) or (TYPES[name],)  # int | None: int, None
        kinds = (*kinds, int) if float in kinds else kinds  # 1 may stand for 1.0, but true may not
        if key not in asked or type(asked[key]) not in kinds:
            wrong.append(f"{key}={asked[key]!r}" if key in asked else f"no {key}")
    layers = asked.get("layer_types") or []
    if type(layers) is not list or layers.count("full_attention") < len(layers):
        wrong.append(f"layer_types={layers}")
    gate = [name for name, flags in GATES.items() if flags == tuple(asked[key] for key in GATE_KEYS)]
    if not gate:
        wrong += [f"{key}={asked[key]!r}" for key in GATE_KEYS]
    try:
        if wrong:
            raise ValueError(", ".join(wrong))
        gate, _, kind = gate[0].partition("-")
        return GPTConfig(**{name: asked[key] for name, key in keys.items()}, gate=gate,
                         gate_kind=kind or "elementwise", rope_scaling=ROPES[rope_type])
    except ValueError as error:
        raise ValueError(f"{path} describes a model that gated_gpt.py cannot make: {error}") from None


def tensors_of(folder):
    """{their name: tensor}, mapped from disk: of the index's files, else model.safetensors, else all."""
    folder, path = Path(folder), Path(folder, "model.safetensors.index.json")
    paths, tensors, load = [*folder.glob("model.safetensors")], {}, safetensors().load_file
    try:
        if path.exists():
            paths = {folder / name for name in json.loads(path.read_bytes())["weight_map"].values()}
        for path in sorted(paths or folder.glob("*.safetensors")):
            tensors |= load(path)
    except Exception as error:  # safetensors raises what the bytes lead it to
        raise ValueError(f"{path} cannot be read: {why(path, error)}") from None
    if not tensors:
        raise ValueError(f"{folder} holds no weights (*.safetensors): get them, too")
    return tensors


def load_released(folder, block_size=None):
    """The model in a folder, on the CPU, in the precision of its files.

    block_size: a window other than max_position_embeddings. ValueError if config and weights do not fit.
    """
    config, tensors = config_of(folder), tensors_of(folder)
    tensors = {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor
               for name, tensor in tensors.items()}  # some files leave out "model."
    if biases := sorted(name for name in tensors if name.endswith("_proj.bias")):
        raise ValueError(f"{folder} has biases ({biases[0]}), which gated_gpt.py cannot make")
    config = dataclasses.replace(config, block_size=block_size or config.block_size)
    with torch.device("meta"):  # names and shapes, but no numbers: drawing those would take seconds
        model = GPT(config)
    weights, rows = {}, config.n_head * config.head_dim
    try:
        for name in [name for name, _ in model.named_parameters() if ".attn.gate." not in name]:
            weights[name] = tensors.pop(their_name(name)).clone()  # the files may be replaced afterwards
            if name.endswith("q_proj.weight") and config.gate != "none":  # it holds the gate, too
                weights[name], weights[name.replace("q_proj", "gate.gate_proj")] = split_queries(
                    weights[name], config.n_kv_head, rows)
        if config.tie_embeddings:
            tensors.pop("lm_head.weight", None)  # some write a tied head, too
            weights["lm_head.weight"] = weights["embed.weight"]
        if tensors:
            raise RuntimeError(f"there is no place for {', '.join(sorted(tensors)[:4])}")
        model.load_state_dict(weights, assign=True)
    except (KeyError, RuntimeError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:500]
        raise ValueError(f"{folder}: the weights do not fit config.json ({reason})") from None
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    model.cos, model.sin = rope_table(config)
    return model


def save_released(model, folder, **more):
    """Write config.json and model.safetensors, as load_released and the authors' code read them.

    Without gate and QK-norm it is a Llama. `more`: keys of config.json, such as bos_token_id. ValueError for
    a model that the layout cannot describe, OSError when it cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # if compiled
    c, gate, own = model.config, variant(model.config), dict(model.named_parameters())
    if gate not in GATES:
        raise ValueError(f"the released layout has no {gate}, only {', '.join(GATES)}: keep the checkpoint")
    if (index := Path(folder, "model.safetensors.index.json")).exists():
        raise ValueError(f"{index} names the files of another model: choose a new folder")
    tensors = {}
    for name, p in own.items():
        if ".attn.gate." not in name:
            scores = own.get(name.replace("q_proj", "gate.gate_proj")) if "q_proj" in name else None
            p = p if scores is None else join_queries(p, scores, c.n_kv_head)
            tensors[their_name(name)] = p.detach().cpu().contiguous()
    says = {key: only for key, only in FIXED.items() if only is not None}
    says |= {key: getattr(c, name) for name, key in KEYS.items()}
    if c.rope_scaling != "none":
        says["rope_scaling"] = {"rope_type": c.rope_scaling, "factor": c.rope_factor,
                                "original_max_position_embeddings": c.rope_trained}
    family = "llama" if gate == "none" and not c.qk_norm else "qwen3"
    says |= dict(zip(GATE_KEYS, GATES[gate]), model_type=family, qkv_bias=False, attention_bias=False,
                 architectures=[f"{family.capitalize()}ForCausalLM"],
                 torch_dtype=str(model.embed.weight.dtype).removeprefix("torch."), **more)
    with whole_file(Path(folder, "model.safetensors")) as file:
        file.write(safetensors().save(tensors, metadata={"format": "pt"}))
    with whole_file(Path(folder, "config.json")) as file:
        file.write(json.dumps(says, indent=2).encode())
