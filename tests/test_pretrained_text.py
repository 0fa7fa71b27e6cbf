"""
Claims about the text of released models: their tokenizers, and what sample.py and train.py do with a folder.

The folders hold a small BPE that the `tokenizers` package has trained, in the files that it writes, with the
pre-tokenizer and the normalizer of Qwen; that package's own encodings are the reference.
"""
import json
import math
import pickle
import random
import re
import shlex
import shutil
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from data import prepare
from data.released_tokenizer import checksum
from gated_gpt import GPT, GPTConfig, load_checkpoint, measure, uniform_share

pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SAMPLES = [
    "", " ", "a", "Sparse gating mechanism mitigates attention sink.", "I'M sure they'll say it's HERS",
    "def f(x):\n    return {x: [1, 22, 333] for _ in range(10_000)}  # ok\n\n\n\tpass", "🙂🏽👩‍👩‍👧 🇫🇷!",
    "東京で働く。 中文字符，很多", "naïve Å Å fi ﬁ ½ ² Ⅷ ٣", "e\u0301\u0327 a\u030a \u1100\u1161\u11a8 한글",
    "각     lots   of \t\t spaces  \r\n  \r\n end   ", "\u00a0\u2003\u3000\u2028x\u0085y\u200b\ufeff",
    "\x00\x01\x7f", "<|endoftext|", "ſ's 'S 'ſ ß İ", "-->!!!...\n\n((\n", "العربية हिन्दी ไทย",
    "\U0010ffff\U000e0001", "x" * 700]


def trained(pattern=QWEN, normalizer=normalizers.NFC, size=700):
    """A small tokenizer like Qwen's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer and normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "sample.py")] + SAMPLES[:-1]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])  # after the others, as in Qwen
    return tokenizer


@pytest.fixture(scope="module")
def theirs():
    return trained()


@pytest.fixture
def folder(theirs, tmp_path):
    """A folder with this tokenizer.json."""
    (tmp_path / "released").mkdir()
    theirs.save(str(tmp_path / "released" / "tokenizer.json"))
    return tmp_path / "released"


@pytest.fixture(autouse=True)
def forget():
    """A folder's tokenizer is read once in a process; tests change the files."""
    prepare.get_tokenizer.cache_clear()
    prepare.token_bytes.cache_clear()


def encoding_of(folder):
    prepare.get_tokenizer.cache_clear()
    return prepare.get_tokenizer(str(folder))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------------------------------
# The tokens are those of the package that made the files


@pytest.mark.parametrize("text", SAMPLES, ids=ascii)
def test_a_folders_tokenizer_says_what_the_tokenizers_package_says(text, theirs, folder):
    encoding = encoding_of(folder)
    assert encoding.encode_ordinary(text) == ids(theirs, text)
    assert encoding.encode_to_numpy(text, disallowed_special=()).tolist() == ids(theirs, text)
    assert encoding.encode(text) == ids(theirs, text)
    assert encoding.decode(encoding.encode_ordinary(text)) == unicodedata.normalize("NFC", text)


def test_so_it_does_on_random_mixtures_of_signs_and_on_every_character(theirs, folder):
    encoding, rng = encoding_of(folder), random.Random(0)
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for _ in range(1500):
        parts = [rng.choice(SAMPLES[:-1]), *rng.choices(characters, k=5), *rng.choices("\n\r\t 's'Te1.", k=8)]
        rng.shuffle(parts)
        text = "".join(parts)
        assert encoding.encode_ordinary(text) == ids(theirs, text), ascii(text)
    for i in range(0, len(characters), 500):
        text = " ".join(characters[i : i + 500])
        assert encoding.encode_ordinary(text) == ids(theirs, text), hex(i)


def test_special_tokens_are_kept_and_text_that_looks_like_one_is_text(theirs, folder):
    encoding, text = encoding_of(folder), "a<|im_start|>b <|endoftext|>"
    assert encoding.encode(text, allowed_special="all") == ids(theirs, text)
    assert encoding.special_tokens_set == {"<|endoftext|>", "<|im_start|>"}
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == theirs.get_vocab_size()
    assert not set(encoding.encode_ordinary(text)) & set(map(theirs.token_to_id, encoding.special_tokens_set))


@pytest.mark.parametrize("special", ["tokenizer_config.json", "added_tokens.json"])
def test_vocab_json_and_merges_txt_mean_the_same_with_the_pattern_and_normal_form_of_qwen(
        special, theirs, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    theirs.model.save(str(other))
    added = {name: theirs.token_to_id(name) for name in ("<|endoftext|>", "<|im_start|>")}
    decoder = {str(number): {"content": name, "special": True} for name, number in added.items()}
    content = {"added_tokens_decoder": decoder} if special == "tokenizer_config.json" else added
    (other / special).write_text(json.dumps(content))
    assert sorted(path.name for path in other.iterdir()) == sorted([special, "vocab.json", "merges.txt"])
    assert prepare.same_tokenizer(str(folder), str(other))
    for text in SAMPLES:
        assert encoding_of(other).encode_ordinary(text) == ids(theirs, text)


@pytest.mark.parametrize("pattern", [r"\p{L}+", r"\s*", r"[a-z]*|\d", r" ?\S+| +"])
def test_what_the_pattern_leaves_out_is_not_lost(pattern, tmp_path):
    tokenizer = trained(pattern, size=400)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoding = encoding_of(tmp_path)
    for text in SAMPLES:
        assert encoding.decode(encoding.encode_ordinary(text)) == unicodedata.normalize("NFC", text)
        if pattern in (r"\p{L}+", r" ?\S+| +"):  # no match is empty
            assert encoding.encode_ordinary(text) == ids(tokenizer, text)


def test_without_a_normalizer_text_stays_as_it_is(tmp_path):
    tokenizer = trained(normalizer=None, size=400)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoding, text = encoding_of(tmp_path), "e\u0301 \u1100\u1161"
    assert encoding.decode(encoding.encode_ordinary(text)) == text != unicodedata.normalize("NFC", text)
    assert all(encoding.encode_ordinary(text) == ids(tokenizer, text) for text in SAMPLES)


@pytest.mark.parametrize("method", ["encode", "encode_ordinary", "encode_to_numpy"])
def test_a_lone_surrogate_is_refused_with_its_place(method, folder):
    with pytest.raises(ValueError, match=r"character 2 of the text, '\\udc80'") as refused:
        getattr(encoding_of(folder), method)("ab\udc80c")
    assert type(refused.value) is ValueError


def test_two_names_mean_the_same_tokens_only_if_text_is_brought_to_the_same_form(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "twin")
    shutil.copytree(folder, tmp_path / "raw")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"normalizer": None}
    (tmp_path / "raw" / "tokenizer.json").write_text(json.dumps(content))
    same = [prepare.same_tokenizer(str(folder), name) for name in
            (str(folder), str(tmp_path / "twin"), str(tmp_path / "raw"), "bytes")]
    assert same == [True, True, False, False] and prepare.same_tokenizer("bytes", "bytes")


def test_a_folders_tokenizer_can_be_pickled(folder):
    copy = pickle.loads(pickle.dumps(encoding_of(folder)))
    assert all(copy.encode_ordinary(text) == encoding_of(folder).encode_ordinary(text) for text in SAMPLES)


# ------------------------------------------------------------------------------------------------------------
# What tiktoken could not do the same way is refused


def changed(folder, change):
    """What the refusal of a folder says when change(content of its tokenizer.json) has been made."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as refused:
        encoding_of(folder)
    said = str(refused.value)
    assert str(path) in said and "\n" not in said
    return said


@pytest.mark.parametrize("where, value, named", [
    ("normalizer", {"type": "NFKC"}, "NFKC"), ("normalizer", {"type": "Lowercase"}, "Lowercase"),
    ("model.type", "Unigram", "Unigram"), ("model.byte_fallback", True, "byte_fallback=True"),
    ("model.dropout", 0.1, "dropout=0.1"), ("model.continuing_subword_prefix", "##", "prefix='##'"),
    ("model.end_of_word_suffix", "</w>", "suffix='</w>'"),
    ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
    ("pre_tokenizer.pretokenizers.0.invert", True, "invert=True"),
    ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "behavior='Removed'"),
    ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "pattern={'String': ' '}"),
    ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "add_prefix_space=True"),
    ("pre_tokenizer.pretokenizers.1.use_regex", True, "use_regex=True"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", "(", "can't be used"),
    ("model.vocab", {}, "damaged"), ("added_tokens", 3, "damaged"), ("model", None, "damaged"),
    ("added_tokens.0.id", 5, "one id"), ("added_tokens.0.id", -1, "whole number"),
    ("added_tokens.0.id", 1 << 40, "whole number"), ("model.merges", [], "order of the merges")])
def test_what_a_tokenizer_asks_for_beyond_that_is_refused_by_name(where, value, named, folder):
    def change(content):
        *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
        for part in path:
            content = content[part]
        content[last] = value

    assert named in changed(folder, change)


def test_ids_in_another_order_than_the_merges_are_refused(folder):
    """tiktoken merges the lowest id first, Hugging Face the first merge in its list."""
    def exchange_two_ids(content):
        vocab = content["model"]["vocab"]
        a, b = [token for token, i in vocab.items() if i in (300, 500)]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    assert "order of the merges" in changed(folder, exchange_two_ids)


def test_a_token_that_ranks_would_merge_from_other_parts_is_refused(folder):
    """Of "xyz", with y z before x y: merges make x, yz of it and stop; ranks would go on to xyz."""
    def learn(content):
        model, left, right = content["model"], "Ā", "ā"  # bytes 0 and 1, which no merge has
        assert not any(left in "".join(merge) or right in "".join(merge) for merge in model["merges"])
        free = max(model["vocab"].values()) + 100
        for i, pair in enumerate([(left, right), (right, left), (right + left, right)]):
            model["merges"].append(list(pair))
            model["vocab"]["".join(pair)] = free + i

    said = changed(folder, learn)
    assert "not what merging by rank would make" in said and repr(b"\x01\x00\x01") in said


def test_a_byte_without_a_token_and_a_token_without_a_merge_are_refused(folder):
    assert "256 bytes" in changed(folder, lambda content: content["model"]["vocab"].pop("Ā"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 1}', b"[" * 100_000])
def test_a_damaged_tokenizer_file_is_refused(content, folder):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        encoding_of(folder)


def test_a_folder_without_a_tokenizer_and_one_that_is_gone_are_refused(tmp_path):
    with pytest.raises(OSError, match="holds no tokenizer .*vocab.json is missing"):
        encoding_of(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(OSError, match="merges.txt is missing"):
        encoding_of(tmp_path)
    with pytest.raises(OSError, match="nor a folder that is there"):
        encoding_of(tmp_path / "gone")


@pytest.mark.parametrize("config, start", [
    ({"bos_token_id": 1, "eos_token_id": 0}, "second"), ({"bos_token_id": None, "eos_token_id": 1}, "second"),
    ({"eos_token_id": [1, 0]}, "<|endoftext|>"), ({}, "<|endoftext|>"), (None, "<|endoftext|>"),
    ({"bos_token_id": 7}, "<|endoftext|>"), ({"bos_token_id": "1"}, "<|endoftext|>")], ids=str)
def test_a_text_starts_with_bos_or_eos_if_special_else_with_endoftext(config, start, theirs, folder):
    first = theirs.token_to_id("<|endoftext|>")
    if config is not None:  # 0 and 1 stand for the two special tokens, 7 for no special one
        config = {key: first + value if value in (0, 1) and type(value) is int else value
                  for key, value in config.items()}
        (folder / "config.json").write_text(json.dumps(config))
    assert prepare.bos_id(str(folder)) == theirs.token_to_id("<|im_start|>" if start == "second" else start)


# ------------------------------------------------------------------------------------------------------------
# Data in the tokens of a folder


def test_a_set_can_be_made_in_the_tokens_of_a_folder(theirs, folder, tmp_path):
    text = "naïve e\u0301 東京 " * 200
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare.prepare_files([tmp_path / "text.txt"], "set", str(folder), tmp_path)
    meta, tokens = prepare.load("set", tmp_path)
    assert meta["tokenizer"] == str(folder) and meta["bos"] == theirs.token_to_id("<|endoftext|>")
    assert meta["vocab_size"] == theirs.get_vocab_size() and tokens["train"][0] == meta["bos"]
    both = [encoding_of(folder).decode(tokens[split][1:].tolist()) for split in ("train", "val")]
    assert "".join(both) == unicodedata.normalize("NFC", text)
    assert [meta[split]["bytes"] for split in ("train", "val")] == [len(part.encode()) for part in both]


def test_a_set_whose_tokenizer_has_changed_says_so(folder, tmp_path):
    (folder / "SHA256SUMS").write_text(f"{checksum(folder / 'tokenizer.json')}  tokenizer.json\n")
    (tmp_path / "text.txt").write_text("naïve " * 2000, encoding="utf-8")
    prepare.prepare_files([tmp_path / "text.txt"], "set", str(folder), tmp_path)
    with open(folder / "tokenizer.json", "a") as file:
        file.write(" ")
    prepare.get_tokenizer.cache_clear()
    prepare.token_bytes.cache_clear()
    with pytest.raises(ValueError, match="tokenizer.json has changed since it was saved"):
        prepare.load("set", tmp_path)


def test_a_set_whose_tokenizer_is_gone_says_so(folder, tmp_path):
    (tmp_path / "text.txt").write_text("naïve " * 2000, encoding="utf-8")
    prepare.prepare_files([tmp_path / "text.txt"], "set", str(folder), tmp_path)
    folder.rename(tmp_path / "elsewhere")
    prepare.get_tokenizer.cache_clear()
    with pytest.raises(OSError, match="nor a folder that is there"):
        prepare.load("set", tmp_path)


# ------------------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture
def released(theirs, folder, here):
    """Working folder with `released`: a tiny model with this tokenizer, its block_size above 512."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=theirs.get_vocab_size() + 5, block_size=600, n_layer=2, n_head=4,
                          n_kv_head=2, n_embd=16, head_dim=6, gate_kind="headwise"))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return "released"


def says(capsys, *flags):
    capsys.readouterr()
    sample.main(flags)
    return capsys.readouterr().out


def refused(capsys, main, *flags):
    """The one sentence with which a command line refuses these flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        sample.run_main(partial(main, flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1, said
    return said


def greedy(model, tokens, n):
    for _ in range(n):
        tokens = [*tokens, model.eval()(torch.tensor([tokens]))[0][0, -1].argmax().item()]
    return tokens


def shown(theirs, tokens):
    return "".join(sample.stream_text(tokens, prepare.get_tokenizer("released")))


def test_a_prompt_goes_through_the_folders_tokenizer_and_nothing_is_put_in_front(theirs, released, capsys):
    said = says(capsys, "--ckpt=released", "--prompt=Sparse 東京", "--tokens=12", "--temperature=0")
    start = ids(theirs, "Sparse 東京")
    made = greedy(GPT.from_pretrained("released"), start, 12)[len(start):]
    assert said == ("released: gate g1-headwise, in the released layout, without a BOS\n\n"
                    f"Sparse 東京{shown(theirs, made)}\n")


def test_without_a_prompt_it_starts_from_the_token_that_is_named(theirs, released, capsys):
    said = says(capsys, "--ckpt=released", "--tokens=6", "--temperature=0")
    first, _, text = said.split("\n", 2)
    start = theirs.token_to_id("<|endoftext|>")
    assert "without a prompt" in first and "<|endoftext|>" in first
    assert text == shown(theirs, greedy(GPT.from_pretrained("released"), [start], 6)[1:]) + "\n"


def test_dtype_casts_the_weights_of_a_released_model_and_of_a_run(released, capsys, monkeypatch):
    train.train(*train.make_configs(TINY | dict(out="run")), quiet=True)
    seen, forward = [], GPT.forward

    def watched(self, *args, **options):
        seen.append({p.dtype for p in self.parameters()})
        return forward(self, *args, **options)

    monkeypatch.setattr(GPT, "forward", watched)
    for flag, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        for ckpt in ("released", "run"):
            says(capsys, f"--ckpt={ckpt}", "--prompt=S", "--tokens=3", f"--dtype={flag}", "--attn_share")
            assert all(dtypes == {dtype} for dtypes in seen) and len(seen) == 4
            seen.clear()
    GPT.from_pretrained("released", dtype=torch.bfloat16).save_pretrained("released")
    says(capsys, "--ckpt=released", "--prompt=S", "--tokens=3")
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)


def rows_of(table):
    return [row.split() for row in table.splitlines() if re.match(r" +\d+ ", row)]


def test_text_is_measured_in_blocks_of_512_tokens_beside_what_others_found(theirs, released, capsys):
    text = (ROOT / "train.py").read_text(encoding="utf-8")[:12_000]
    Path("text.txt").write_text(text, encoding="utf-8")
    said = says(capsys, "--ckpt=released", "--attn_share", "--text=text.txt")
    tokens = ids(theirs, text)
    blocks = [tokens[i : i + 512] for i in range(0, len(tokens) - 511, 512)]
    assert len(blocks) > 5
    model = GPT.from_pretrained("released")
    layers = [measure(model, torch.tensor(blocks))[i] for i in range(2)]  # all at once
    assert f"T=512; uniform attention would give {uniform_share(512):.3f}" in said
    for row, layer in zip(rows_of(said), layers, strict=True):
        for cell, name in ((1, "first_token_share"), (6, "gate_score"), (8, "max_activation")):
            assert math.isclose(float(row[cell]), layer[name], abs_tol=0.06 if cell == 8 else 0.0011), name
    means = [np.mean([layer[name] for layer in layers])
             for name in ("first_token_share", "gate_score", "max_activation")]
    here, paper, others = said.strip().splitlines()[-3:]
    assert here.startswith(f"here, {len(blocks)} x 512 tokens") and "512 of web text" in others
    assert np.allclose([float(number) for number in here.split()[-3:]], means, atol=0.06)
    assert paper.split()[-3:] == ["0.073", "0.172", "98.0"] and others.split()[-3:] == ["0.050", "0.257", "-"]
    assert "Only" not in said


def test_a_text_below_512_tokens_is_measured_whole_and_warned_of(theirs, released, capsys):
    Path("text.txt").write_text("Sparse gating", encoding="utf-8")
    said = says(capsys, "--ckpt=released", "--attn_share", "--text=text.txt")
    n = len(ids(theirs, "Sparse gating"))
    assert f"T={n};" in said and f"here, 1 x {n} tokens" in said and f"Only {n} tokens" in said


def test_a_long_text_is_measured_in_64_blocks_that_span_it():
    encoding = prepare.get_tokenizer("bytes")
    text = "".join(chr(32 + i // 100) for i in range(9000))
    blocks = sample.text_blocks(text, encoding, None, 10)
    assert blocks.shape == (64, 10) and blocks[0].tolist() == list(text[:10].encode())
    assert blocks[-1].tolist() == list(text[-10:].encode()) and len(set(blocks[:, 0].tolist())) > 50
    assert sample.text_blocks(text, encoding, 256, 10)[3, 0] == 256
    with pytest.raises(ValueError, match="1 tokens, too few"):
        sample.text_blocks("a", encoding, None, 10)


def test_a_run_is_measured_in_blocks_of_its_window_with_bos_in_front(here, capsys):
    train.train(*train.make_configs(TINY | dict(out="run")), quiet=True)
    text = "Speak the speech, I pray you. " * 4
    Path("text.txt").write_text(text)
    said = says(capsys, "--ckpt=run", "--attn_share", "--text=text.txt")
    blocks = torch.tensor([[256, *text.encode()[i : i + 15]] for i in range(0, 120, 15)])
    layers = measure(load_checkpoint("run/best.pt")[0], blocks)
    assert f"here, {len(blocks)} x 16 tokens" in said and "Only 16 tokens" in said
    for row, layer in zip(rows_of(said), layers, strict=True):
        assert math.isclose(float(row[1]), layer["first_token_share"], abs_tol=0.0011)
    assert "0.048" in said and "0.020" in said  # G1 elementwise in the paper, and as others read it


def test_figures_of_others_are_shown_for_the_same_gate_only():
    layers = [dict(gate_score=math.nan, max_activation=2.0, first_token_share=0.5)] * 2
    for gate, lines in {"none": 4, "g1": 4, "g2": 3, "g5": 2}.items():
        assert len(sample.means_table(layers, gate, 1, 512).splitlines()) == lines
    assert sample.means_table(layers, "none", 1, 512).splitlines()[1].split()[-3:] == ["0.500", "-", "2.0"]


@pytest.mark.parametrize("flags", [["--text=text.txt"], ["--text=text.txt", "--attn_share", "--prompt=x"],
                                   ["--text=nowhere.txt", "--attn_share"], ["--text=.", "--attn_share"]])
def test_text_needs_attn_share_and_a_file_and_goes_with_no_prompt(flags, released, capsys):
    Path("text.txt").write_text("Speak the speech")
    assert flags[0].split("=")[1] in refused(capsys, sample.main, "--ckpt=released", *flags)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_attn_map_draws_the_text(released, capsys):
    pytest.importorskip("matplotlib")
    Path("text.txt").write_text("Speak the speech, I pray you")
    says(capsys, "--ckpt=released", "--attn_share", "--text=text.txt", "--attn_map=map.png")
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(released, capsys):
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        shutil.move(f"released/{name}", "kept")
        lacks = {"tokenizer.json": "vocab.json"}.get(name, name)
        assert lacks in refused(capsys, sample.main, "--ckpt=released", "--prompt=x")
        shutil.move("kept", f"released/{name}")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_both_numbers(theirs, released, capsys):
    GPT(GPTConfig(vocab_size=300, n_layer=1)).save_pretrained("released")
    said = refused(capsys, sample.main, "--ckpt=released", "--prompt=x")
    assert "300" in said and str(theirs.get_vocab_size()) in said


def test_a_prompt_with_a_lone_surrogate_is_refused(released, capsys):
    assert "surrogate" in refused(capsys, sample.main, "--ckpt=released", "--prompt=a\udcff")


# ------------------------------------------------------------------------------------------------------------
# train.py


TINY = dict(data="tiny", block_size=16, n_layer=2, n_head=2, n_embd=16, batch_size=4, max_steps=4,
            eval_every=4, eval_windows=4, warmup_steps=2, device="cpu")
QUICK = ["--device=cpu", "--batch_size=4", "--max_steps=4", "--eval_every=2", "--eval_windows=4"]


@pytest.fixture
def own_data(released, data_root, folder):
    """A set `own` in the tokens of the folder, made from the text of the others."""
    if not (data_root / "own").exists():
        prepare.prepare_files([data_root / "text.txt"], "own", str(folder), data_root)
    yield "own"
    shutil.rmtree(data_root / "own")


def first_loss(*flags):
    """The validation loss before any training of a run with these flags, and its model."""
    config, c, _ = train.configs_from(train.parse_flags([*QUICK, *flags]))
    run = train.Run(config, c, lambda text: None)
    return run.val_loss(), run.model


def test_training_starts_from_the_weights_of_a_released_model(own_data, capsys):
    loss, model = first_loss("--init_from=released", "--data=own")
    there = GPT.from_pretrained("released")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), there.parameters(), strict=True))
    assert model.config.block_size == 128 and model.config.variant == "g1-headwise"  # the preset's window
    train.main([*QUICK, "--init_from=released", "--data=own", "--learning_rate=1e-3", "--out=run"])
    said = capsys.readouterr().out
    assert "from the weights of released" in said and str(Path("released").resolve()) in said
    trained, state = load_checkpoint("run/best.pt")
    assert state["train_config"]["init_from"] == "released" and state["best"] < loss
    assert says(capsys, "--ckpt=run", "--prompt=Speak", "--tokens=3")


def test_a_shorter_window_and_dropout_are_free_and_bfloat16_weights_are_trained_in_float32(own_data):
    GPT.from_pretrained("released", dtype=torch.bfloat16).save_pretrained("released")
    _, model = first_loss("--init_from=released", "--data=own", "--block_size=32", "--dropout=0.1")
    assert (model.config.block_size, model.config.dropout, model.dropout.p) == (32, 0.1, 0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.cos.size(0) == 32


@pytest.mark.parametrize("flag", ["--n_layer=3", "--gate=g2", "--gate_kind=elementwise", "--n_embd=32",
                                  "--tie_embeddings", "--rope_base=5", "--vocab_size=5000"])
def test_flags_that_contradict_the_shape_of_the_weights_are_refused(flag, own_data, capsys):
    name, _, value = flag[2:].partition("=")
    said = refused(capsys, train.main, *QUICK, "--init_from=released", "--data=own", flag)
    assert f"{name}={value or True}" in said and "released" in said
    assert not Path("out").exists()


def test_data_in_other_tokens_is_refused_with_the_command_that_makes_it(own_data, capsys):
    said = refused(capsys, train.main, *QUICK, "--init_from=released", "--data=tiny")
    assert f"data/prepare.py FILES --tokenizer={Path('released').resolve()}" in said
    GPT(GPTConfig(vocab_size=300, n_layer=1)).save_pretrained("small")
    assert "small" in refused(capsys, train.main, *QUICK, "--init_from=small", "--data=own")


def test_a_folder_with_the_same_tokenizer_and_one_without_any_will_do(own_data):
    shutil.copytree("released", "twin")
    losses = [first_loss(f"--init_from={name}", "--data=own")[0] for name in ("twin", "released")]
    assert losses[0] == losses[1]
    Path("twin/tokenizer.json").unlink()
    first_loss("--init_from=twin", "--data=own")


def test_training_starts_from_a_run_of_ours_too(here, capsys):
    train.train(*train.make_configs(TINY | dict(out="first", gate="g2")), quiet=True)
    there = load_checkpoint("first/best.pt")[0]
    for name in ("first", "first/best.pt"):
        _, model = first_loss(f"--init_from={name}", "--data=tiny", "--block_size=8")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), there.parameters(), strict=True))
        assert model.config.gate == "g2" and model.config.block_size == 8
    assert "words" in refused(capsys, train.main, *QUICK, "--init_from=first", "--data=words")
    assert "nowhere" in refused(capsys, train.main, *QUICK, "--init_from=nowhere", "--data=tiny")


def test_a_run_that_started_from_weights_is_resumed_without_them(own_data, capsys):
    train.main([*QUICK, "--init_from=released", "--data=own", "--out=run"])
    Path("released/model.safetensors").unlink()
    train.main(["--resume", "--out=run", "--max_steps=6"])
    assert load_checkpoint("run/last.pt")[1]["step"] == 6
    assert "init_from" in refused(capsys, train.main, "--resume", "--out=run", "--init_from=released")


# ------------------------------------------------------------------------------------------------------------
# The README


def test_the_commands_of_the_readme_work_on_a_small_folder_of_the_same_layout(released, capsys, monkeypatch):
    """The folders that they name are gigabytes to download, so a small one stands in for each of them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.+?)^```$", readme, re.M | re.S)
             for line in block.splitlines() if "1B_" in line and "download" not in line]
    assert len(lines) >= 3
    Path("text.txt").write_text((ROOT / "train.py").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    for line in lines:
        python, script, *flags = shlex.split(line)
        flags = [re.sub(r"=\S*1B_\w+$", "=released", flag) for flag in flags]
        flags = [re.sub(r"^--text=.*", "--text=text.txt", flag) for flag in flags]
        assert (python, script) == (".venv/bin/python", "sample.py")
        said = says(capsys, *flags, *["--tokens=2"][: "--attn_share" not in flags])
        assert "in the released layout" in said
