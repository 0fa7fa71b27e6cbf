"""
Claims about other people's models: their folders are read as described, written back, and refused for a
reason.

The folders are written here from the description of the layout, row by row: nothing of the project is asked
what the layout is. One tokenizer is a small BPE in bytes with the normal form of Qwen, another is like
Llama 2's; both are made by the `tokenizers` package.
"""
import json
import re
import shutil
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
from data.tokenizers import TextOut, bos_id, end_ids, front_ids, get_tokenizer, token_bytes
from gated_gpt import GPT, GPTConfig, measure
from plumbing import machine
from plumbing.released import load_released, save_released

safetensors = pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")
from safetensors.torch import save_file  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

GATES = {"none": dict(gate="none"), "headwise": dict(gate_kind="headwise"), "elementwise": {}}
QWEN_ONLY = ["use_qk_norm", "headwise_attn_output_gate", "elementwise_attn_output_gate"]
LINEAR = dict(rope_scaling="linear", rope_factor=4.0, rope_trained=64)
YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_trained=16)
NAMES = {r"^embed\.": "model.embed_tokens.", r"^norm\.": "model.norm.", r"^blocks\.": "model.layers.",
         r"\.attn\.": ".self_attn.", r"\.attn_norm\.": ".input_layernorm.",
         r"\.mlp_norm\.": ".post_attention_layernorm."}  # of ours: of the layout, where they differ


# --- a folder of the layout -------------------------------------------------------------------------


def made(**fields):
    """A small model whose numbers are all different from where they start."""
    torch.manual_seed(5)
    small = dict(vocab_size=23, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=20, head_dim=6,
                 mlp_hidden=28, rope_base=500.0, norm_eps=1e-5)
    model = GPT(GPTConfig(**(small | fields)))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def their_config(model):
    """What the config.json of a model says."""
    c = model.config
    llama = c.gate == "none" and not c.qk_norm
    says = dict(
        model_type="llama" if llama else "qwen3", attention_bias=False, hidden_act="silu",
        architectures=["LlamaForCausalLM" if llama else "Qwen3ForCausalLM"], vocab_size=c.vocab_size,
        max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, hidden_size=c.n_embd, head_dim=c.head_dim,
        intermediate_size=c.mlp_hidden, rope_theta=c.rope_base, use_qk_norm=c.qk_norm,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
        headwise_attn_output_gate=c.gate == "g1" and c.gate_kind == "headwise",
        elementwise_attn_output_gate=c.gate == "g1" and c.gate_kind == "elementwise",
        torch_dtype=str(model.embed.weight.dtype).removeprefix("torch."))
    if c.rope_scaling != "none":
        says["rope_scaling"] = {"rope_type": c.rope_scaling, "factor": c.rope_factor,
                                "original_max_position_embeddings": c.rope_trained}
    return says


def their_tensors(model):
    """The tensors of a model under the layout's names. In q_proj, each group of key/value heads has the rows
    of its queries, then those of its gates."""
    own, tensors = dict(model.named_parameters()), {}
    for name, p in own.items():
        if "q_proj" in name and model.config.gate == "g1":
            rows = []
            for group in range(model.config.n_kv_head):
                for matrix in (p, own[name.replace("q_proj", "gate.gate_proj")]):
                    n = len(matrix) // model.config.n_kv_head
                    rows += matrix[group * n : (group + 1) * n]
            p = torch.stack(rows)
        if ".gate." not in name:
            for ours, theirs in NAMES.items():
                name = re.sub(ours, theirs, name)
            tensors[name] = p.detach()
    return tensors


def write_folder(folder, model, tensors=None, shards=1, without=(), **says):
    """The folder of a model. Its config.json says more, lacks what is in `without`, and may lie."""
    others = dict(attention_dropout=0.1, sliding_window=4096, use_sliding_window=False, rope_scaling=None,
                  rope_parameters=None, max_window_layers=28, bos_token_id=3)
    says = {key: value for key, value in (others | their_config(model) | says).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(says))
    tensors = their_tensors(model) if tensors is None else tensors
    names = ["model"] if shards == 1 else [f"model-{i + 1:05}-of-{shards:05}" for i in range(shards)]
    for i, name in enumerate(names):
        save_file({n: tensors[n] for n in sorted(tensors)[i::shards]}, folder / f"{name}.safetensors")


def assert_same(loaded, model):
    """Bit for bit; the angles of RoPE, too."""
    ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, loaded))
    assert loaded.config == model.config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert (loaded.lm_head.weight is loaded.embed.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("fields", [
    dict(), dict(qk_norm=False), dict(tie_embeddings=True), dict(n_kv_head=1), dict(n_kv_head=4),
    dict(n_head=6, head_dim=2, n_layer=1), dict(rope_base=1e6, norm_eps=1e-2), LINEAR, YARN], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_a_folder_is_the_model_that_it_describes_and_is_written_as_it_is_read(gate, fields, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        model = made(**GATES[gate], **fields)
        for p in model.parameters():
            p.data = p.data.to(dtype)  # the angles stay float32
        write_folder(tmp_path, model)
        assert_same(load_released(tmp_path), model)
        save_released(model, folder := tmp_path / "new" / "folder", bos_token_id=5)
        assert_same(load_released(folder), model)
        config, tensors = json.loads((folder / "config.json").read_text()), their_tensors(model)
        assert (their_config(model) | {"bos_token_id": 5}).items() <= config.items()
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}  # the authors' library asks for it
            assert set(file.keys()) == tensors.keys()
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


LLAMA = dict(gate="none", qk_norm=False, n_embd=24)
LACKS = dict(without=[*QWEN_ONLY, "head_dim"])
NO_THETA = dict(without=[*LACKS["without"], "rope_theta", "rope_scaling"])


@pytest.mark.parametrize("fields, says", [
    (dict(gate="none"), dict(without=QWEN_ONLY)), (dict(n_embd=24), dict(head_dim=None)),
    (dict(n_kv_head=4), dict(num_key_value_heads=None)), (dict(), dict(shards=3)),
    (dict(), dict(rope_scaling={"rope_type": "default"})),
    (LINEAR, dict(rope_scaling={"type": "linear", "factor": 4})),
    (LLAMA, LACKS), (LLAMA | dict(tie_embeddings=True), LACKS), (LLAMA | YARN, LACKS),
    (LLAMA, LACKS | dict(model_type="mistral", sliding_window=None)),
    (LLAMA | dict(rope_base=10000.0, norm_eps=1e-6, n_kv_head=4),  # what a config.json need not say
     dict(without=[*NO_THETA["without"], "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"])),
    (LLAMA | dict(rope_base=70.0),  # from here on, as transformers 5 writes it
     NO_THETA | dict(rope_parameters={"rope_type": "default", "rope_theta": 70.0})),
    (dict(rope_base=70.0), dict(without=["rope_theta"], rope_parameters={"rope_theta": 70})),
    (YARN | dict(rope_base=50.0, rope_trained=64), dict(
        without=["rope_theta"], rope_scaling=None, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "beta_fast": 32.0,
            "attention_factor": None}))], ids=str)
def test_so_is_one_that_says_it_in_another_way_or_leaves_out_the_usual_value(fields, says, tmp_path):
    write_folder(tmp_path, made(**fields), **says)
    assert_same(load_released(tmp_path), made(**fields))


@pytest.mark.parametrize("fields", [dict(), YARN], ids=str)
def test_another_window_means_the_same_positions_and_the_same_scaling(fields, tmp_path):
    write_folder(tmp_path, made(**fields))
    assert_same(load_released(tmp_path, block_size=9), made(block_size=9, **fields))


def test_a_loaded_model_needs_its_files_no_longer(tmp_path):
    write_folder(tmp_path, made())
    loaded, path = load_released(tmp_path), tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(loaded, made())


@pytest.mark.parametrize("fields", [dict(), dict(tie_embeddings=True)], ids=str)
def test_names_may_lack_the_prefix_model_and_a_tied_head_may_be_stored_a_second_time(fields, tmp_path):
    model = made(**fields)
    tensors = {name.removeprefix("model."): tensor for name, tensor in their_tensors(model).items()}
    write_folder(tmp_path, model, tensors | {"lm_head.weight": model.lm_head.weight.detach().clone()})
    assert_same(load_released(tmp_path), model)


def test_the_index_says_which_files_belong_together_and_without_one_model_safetensors_stands_alone(tmp_path):
    write_folder(tmp_path, made(), shards=2)
    for name in ("adapter", "model"):  # of somebody else
        save_file({"model.norm.weight": torch.zeros(20)}, tmp_path / f"{name}.safetensors")
    names = sorted(their_tensors(made()))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {
        name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}}))
    assert_same(load_released(tmp_path), made())
    with pytest.raises(ValueError, match="names the files of another model: choose a new folder"):
        save_released(made(), tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors cannot be read" in refused(tmp_path)
    index.write_text("[]")
    assert "model.safetensors.index.json cannot be read" in refused(tmp_path)
    index.unlink()
    write_folder(tmp_path, made())
    assert_same(load_released(tmp_path), made())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile imports much
def test_a_compiled_model_is_written_as_what_it_is(tmp_path):
    save_released(torch.compile(made()), tmp_path)
    assert_same(load_released(tmp_path), made())


# --- what does not fit is refused by name -----------------------------------------------------------


def refused(folder):
    """The sentence with which a folder is refused; it names the folder."""
    with pytest.raises(ValueError) as refusal:
        load_released(folder)
    said = str(refusal.value)
    assert "\n" not in said and str(folder) in said and len(said) < 1500
    return said


@pytest.mark.parametrize("said, says", [
    ("use_sliding_window=True", dict(use_sliding_window=True)),
    ("hidden_act='gelu'", dict(hidden_act="gelu")),
    ("model_type='qwen2'", dict(model_type="qwen2")),
    ("partial_rotary_factor=0.5", dict(partial_rotary_factor=0.5)),
    ("quantization_config={'bits': 4}", dict(quantization_config={"bits": 4})),
    ("headwise_attn_output_gate='yes'", dict(headwise_attn_output_gate="yes")),
    ("vocab_size=-23", dict(vocab_size=-23)), (f"vocab_size={10**30}", dict(vocab_size=10**30)),
    ("n_head=3", dict(num_attention_heads=3)), ("block_size=0", dict(max_position_embeddings=0)),
    ("head_dim=5", dict(head_dim=5)), ("hidden_size='20'", dict(hidden_size="20")),
    ("num_hidden_layers=2.0", dict(num_hidden_layers=2.0)), ("layer_types=5", dict(layer_types=5)),
    ("max_position_embeddings=None", dict(max_position_embeddings=None)),
    ("config.json cannot be read", dict(rope_scaling="yarn")),
    ("config.json cannot be read", dict(rope_parameters=[1])),
    ("config.json cannot be read", dict(model_type=["llama"])),
    ("sliding_window=512", dict(model_type="mistral", sliding_window=512)),
    ("sliding_window=4096", dict(model_type="mistral", without=["sliding_window"])),
    *((said, {key: rope}) for key in ("rope_scaling", "rope_parameters") for said, rope in (
        ("rope_type='llama3'", {"rope_type": "llama3", "factor": 8.0}), ("no factor", {"rope_type": "yarn"}),
        ("factor='4'", {"type": "linear", "factor": "4"}),
        ("rope_factor=0.5", {"rope_type": "linear", "factor": 0.5}),
        ("attention_factor=1.5", {"rope_type": "yarn", "factor": 4, "attention_factor": 1.5}),
        ("beta_slow=2", {"rope_type": "yarn", "factor": 4, "beta_slow": 2})))], ids=str)
def test_a_config_that_asks_for_what_cannot_be_had_is_refused_by_key_with_its_value(said, says, tmp_path):
    write_folder(tmp_path, made(), **says)
    assert "config.json" in (sentence := refused(tmp_path)) and said in sentence


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    write_folder(tmp_path, made(), without=["rope_theta", "head_dim"], hidden_act="relu",
                 headwise_attn_output_gate=True, elementwise_attn_output_gate=True,
                 layer_types=["full_attention", "sliding_attention"])
    for what in ("hidden_act='relu'", "headwise_attn_output_gate=True", "elementwise_attn_output_gate=True",
                 "layer_types=['full_attention', 'sliding_attention']", "no rope_theta", "no head_dim"):
        assert what in refused(tmp_path)


@pytest.mark.parametrize("said, name", [
    *(("no {}", f"{name}.weight") for name in ("model.norm", "model.layers.1.mlp.up_proj", "lm_head",
                                               "model.embed_tokens", "model.layers.0.self_attn.q_proj")),
    ("no place for {}", "model.layers.2.mlp.up_proj.weight"), ("no place for {}", "model.norm.bias"),
    ("has biases ({}), which", "model.layers.0.self_attn.q_proj.bias"),
    ("has biases ({}), which", "model.layers.1.mlp.up_proj.bias")])
def test_a_tensor_that_is_missing_or_has_no_place_is_named(said, name, tmp_path):
    tensors = their_tensors(made())
    if tensors.pop(name, None) is None:
        tensors[name] = torch.zeros(24)
    write_folder(tmp_path, made(), tensors)
    assert said.format(name) in refused(tmp_path)


@pytest.mark.parametrize("gate, rows", [("none", 28), ("headwise", 48), ("elementwise", 24),
                                        ("headwise", 27)])  # the last cannot be split
def test_another_gate_than_that_of_the_config_shows_in_the_rows_of_q_proj(gate, rows, tmp_path):
    model = made(**GATES[gate])
    tensors = {name: torch.zeros(rows, 20) if "q_proj" in name else tensor
               for name, tensor in their_tensors(model).items()}
    write_folder(tmp_path, model, tensors)
    said = refused(tmp_path)
    assert "the weights do not fit config.json" in said
    assert rows == 27 or re.search(r"size mismatch for blocks.0.attn.(q_proj|gate.gate_proj).weight", said)


@pytest.mark.parametrize("fields, named", [
    (dict(gate="g2"), "g2"), (dict(gate_shared=True), "g1-shared"), (dict(gate_op="add"), "g1-add"),
    (dict(gate_act="ns_sigmoid"), "g1-ns-sigmoid"), (dict(gate_input=False), "g1-no-input"),
    (dict(gate="none", sdpa_norm=True), "none-sdpa-norm"), (dict(sdpa_silu=True), "g1-sdpa-silu"),
    (dict(norm="sandwich"), "g1-sandwich"), (dict(n_expert=4), "g1-moe")], ids=str)
def test_a_model_that_the_layout_has_no_words_for_is_refused_by_name(fields, named, tmp_path):
    with pytest.raises(ValueError, match=rf"the released layout has no {named}, only"):
        save_released(made(**fields), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b"{", lambda b: b"[1, 2]", lambda b: b[:200], lambda b: b[:-1],
    lambda b: b + b"0", lambda b: b"\xff" * 8 + b[8:], lambda b: POINTER])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name_and_told_from_a_pointer_of_git_lfs(name, damage, released):
    path = Path(released, name)
    path.write_bytes(damaged := damage(path.read_bytes()))
    assert f"{path} " in (said := refusal(sample.main, ["--ckpt=released"]))
    assert ("run `git lfs pull`" in said) == (damaged == POINTER)


@pytest.mark.parametrize("name, said", [("tokenizer.json", "released/tokenizer.json is no tokenizer"),
                                        ("model.safetensors", "released holds no weights"),
                                        ("config.json", "released/best.pt")])  # it could be a run's folder
def test_a_folder_that_is_not_whole_is_refused(name, said, released):
    Path(released, name).unlink()
    assert said in refusal(sample.main, ["--ckpt=released"])


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_without_a_package_one_is_told_what_to_install(package, released, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    assert f"pip install {package}" in refusal(sample.main, ["--ckpt=released"])


# --- the tokenizer ----------------------------------------------------------------------------------


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
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(ROOT / "gated_gpt.py").read_text(encoding="utf-8"), *SAMPLES], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])  # 700, 701, at the end as in Qwen
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False)])  # Qwen has such, too
    return tokenizer


@pytest.fixture(scope="session")
def llama2():
    """A small tokenizer like Llama 2's: a space in front, spaces as ▁, bytes as <0x0A>, a BOS before all."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=names)
    tokenizer.train_from_iterator([(ROOT / "gated_gpt.py").read_text(encoding="utf-8"), "éà" * 9], trainer)
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = said["added_tokens"][:3]  # bytes are plain tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(said))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def saved(here):
    """saved(tokenizer): its folder is `released`, with a small model."""
    def save(tokenizer, **fields):
        get_tokenizer.cache_clear()
        token_bytes.cache_clear()
        save_released(made(**(dict(vocab_size=708, block_size=600) | fields)), "released")
        tokenizer.save("released/tokenizer.json")
        return "released"

    return save


@pytest.fixture
def released(theirs, saved):
    """The name of a folder with this tokenizer and a small model, whose window is more than 512 tokens."""
    return saved(theirs, gate_kind="headwise")


def ids(theirs, text):
    return theirs.encode(text, add_special_tokens=False).ids


def text_of(tokens, errors="strict"):
    """The text of these tokens, from the bytes of each alone."""
    return b"".join(map(get_tokenizer("released").decode_single_token_bytes, tokens)).decode(errors=errors)


def test_a_folders_tokens_are_those_of_the_package_and_stand_for_the_bytes_of_the_text(theirs, released):
    tokenizer = get_tokenizer(released)
    of_all_planes = "".join(chr(i) for i in range(0, 0x110000, 97) if not 0xD800 <= i < 0xE000)
    for text in [*SAMPLES, of_all_planes]:
        assert tokenizer.encode_ordinary(text) == ids(theirs, text), ascii(text)
        assert text_of(ids(theirs, text)) == unicodedata.normalize("NFC", text)
    assert tokenizer.n_vocab == theirs.get_vocab_size() == 703
    assert tokenizer.decode_single_token_bytes(705) == b""  # a model's vocabulary may be rounded up


@pytest.mark.parametrize("text", ["naïve 東京 <|endoftext|>", "a<|im_start|>b", "<think>"])
def test_special_tokens_in_a_text_are_plain_text_and_all_tokens_are_as_long_as_their_bytes(text, released):
    tokens = get_tokenizer(released).encode_ordinary(text)
    assert text_of(tokens) == text and {700, 701}.isdisjoint(tokens)
    assert token_bytes(released)[tokens].sum() == len(text.encode())


def test_tokens_of_llama_2_stand_for_a_space_and_the_bytes_of_the_text_behind_its_bos(llama2, saved, theirs):
    assert front_ids(saved(theirs)) == [] and front_ids("bpe2k") == [2047]
    assert front_ids(saved(llama2)) == [1] == [bos_id("released")]
    tokenizer = get_tokenizer("released")
    for text in SAMPLES[1:]:
        tokens = tokenizer.encode_ordinary(text)
        assert tokens == ids(llama2, text) and text_of(tokens) == f" {text}"
        assert token_bytes("released")[tokens].sum() == 1 + len(text.encode())
        assert TextOut(tokenizer).rest(tokens) == f" {text}"


def test_settings_saved_in_a_tokenizer_do_not_cut_or_fill_a_text(theirs, saved):
    used = tokenizers.Tokenizer.from_str(theirs.to_str())
    used.enable_truncation(5)
    used.enable_padding(length=50)
    text = "def f(x): return x\n" * 20
    assert get_tokenizer(saved(used)).encode_ordinary(text) == ids(theirs, text)


def test_a_tokenizer_that_was_saved_while_it_cut_words_at_random_cuts_them_as_usual(theirs, saved):
    used = tokenizers.Tokenizer.from_str(theirs.to_str())
    used.model.dropout = 0.5
    text = "def f(x): return x\n" * 20
    assert get_tokenizer(saved(used)).encode_ordinary(text) == ids(theirs, text) != ids(used, text)


@pytest.mark.parametrize("normalizer", [
    normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(),
    normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    normalizers.Replace("\t", " ")], ids=str)
def test_a_tokenizer_that_does_not_keep_a_text_is_refused_with_what_becomes_of_it(normalizer, theirs, saved):
    other = tokenizers.Tokenizer.from_str(theirs.to_str())
    other.normalizer = normalizer
    assert "released/tokenizer.json makes " in refusal(sample.main, [f"--ckpt={saved(other)}"])


def test_so_is_one_that_lacks_letters(llama2, saved):
    said = json.loads(llama2.to_str())
    said["model"]["byte_fallback"] = False
    saved(tokenizers.Tokenizer.from_str(json.dumps(said)))
    assert "Ab<unk> 1000" in refusal(sample.main, ["--ckpt=released"])


def test_it_is_said_once_that_a_tokenizer_writes_letters_in_another_form(released, capsys):
    for text in ("naïve", "e\u0301" * 50, "e\u0301" * 50):
        get_tokenizer(released).encode_ordinary(text)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tokenizer.json changes letters (" in said


@pytest.mark.parametrize("config, generation, start, ends", [  # what the folder names as BOS and EOS
    ({"bos_token_id": 701, "eos_token_id": 700}, None, 701, {700, 701}),
    ({"bos_token_id": None, "eos_token_id": 701}, None, 701, {701}),
    ({"eos_token_id": [701, 700]}, None, 700, {700, 701}), ({"bos_token_id": 7}, None, 700, {700}),
    ({}, None, 700, {700}), (None, None, 700, {700}), ({"eos_token_id": 7}, None, 700, {700}),
    ({"eos_token_id": 700}, [701, 700], 700, {700, 701}), ({"eos_token_id": 700}, 701, 700, {700, 701}),
    ({"eos_token_id": 700}, 9999, 700, {700})], ids=str)
def test_a_text_starts_with_bos_or_eos_if_special_else_with_endoftext_and_ends_at_all_of_them(
        config, generation, start, ends, released):
    Path(released, "config.json").unlink()
    if config is not None:
        Path(released, "config.json").write_text(json.dumps(config))
    if generation:
        Path(released, "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert bos_id(released) == start and end_ids(released) == ends


def test_a_set_in_the_tokens_of_a_folder_gives_back_its_text(released, tmp_path, use_data):
    text = "naïve e\u0301 東京 <|endoftext|> " * 100
    Path("text.txt").write_text(text, encoding="utf-8")
    use_data(tmp_path / "sets")
    assert status_of(prepare.main, f"text.txt --tokenizer={released}")[0] == 0
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
        tokens = [*tokens, model(torch.tensor([tokens]))[0][0, -1].argmax().item()]
    new = text_of(tokens[len(start) + (not start):], errors="replace")
    said = says(f"--prompt={prompt}", "--tokens=12", "--temperature=0")
    assert said.rstrip("\n\ufffd") == (prompt + new).rstrip("\n\ufffd") and len(said) > len(prompt) + 9


def test_the_file_of_the_weights_means_the_folder_that_it_is_in(released):
    first, second = (status_of(sample.main, ["--tokens=2", f"--ckpt={name}"])[1]
                     for name in (released, f"{released}/model.safetensors"))
    assert first == second and "a released model" in first


def test_without_a_prompt_the_token_that_it_starts_from_is_named(released):
    assert "no prompt: from <|endoftext|> on\n" == status_of(
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
