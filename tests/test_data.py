"""Claims about data/: what the sets hold, and what becomes of broken downloads, damage and mistakes."""
import base64
import collections
import hashlib
import http.server
import json
import pickle
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiktoken

from data import prepare as data
from data.prepare import bos_id, get_tokenizer, load, prepare, prepare_files

TEXT = "Speak the speech, I pray you, as I pronounced it to you.\n" * 100
UNICODE = "naïve 東京 🙂\r\n\tdef f(x):\n        return x  \u0000 <|bos|> <|endoftext|>"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path):
    """Forty small files in two folders, each with its own name as its text."""
    for i in range(40):
        path = tmp_path / "corpus" / ("a" if i % 2 else "b") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i}\n" * 30)
    return tmp_path / "corpus"


def texts_between(tokens, tokenizer):
    """The texts of a split that starts each of its texts with BOS."""
    starts = np.flatnonzero(tokens == bos_id(tokenizer))
    assert starts[0] == 0
    return [get_tokenizer(tokenizer).decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


# --- tokenizers ---


@pytest.mark.parametrize("name", ["bpe2k", "bytes"])
def test_any_text_comes_back_from_its_tokens_byte_for_byte(name):
    encoding = get_tokenizer(name)
    rng = random.Random(0)
    noise = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in range(5000))
    for text in (UNICODE, noise, "", " " * 1000, TEXT):
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_bos_is_the_last_id_and_no_text_can_write_it():
    for name, size in {"bpe2k": 2048, "bytes": 257}.items():
        assert get_tokenizer(name).n_vocab == size == bos_id(name) + 1
        assert get_tokenizer(name).encode("<|bos|>", allowed_special="all") == [bos_id(name)]
        assert bos_id(name) not in get_tokenizer(name).encode_ordinary(UNICODE)


def test_the_byte_tokens_are_the_bytes():
    assert get_tokenizer("bytes").encode_ordinary(UNICODE) == list(UNICODE.encode())


def test_the_shipped_tokenizer_holds_every_byte_and_only_merges_of_two_earlier_tokens():
    lines = [line.split() for line in (data.DATA / "bpe2k.tiktoken").read_text().splitlines()]
    tokens = [base64.b64decode(token) for token, _ in lines]
    assert [int(rank) for _, rank in lines] == list(range(2047))
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    for rank, token in enumerate(tokens[256:], 256):
        earlier = set(tokens[:rank])
        assert token not in earlier
        assert any(token[:i] in earlier and token[i:] in earlier for i in range(1, len(token)))


def test_the_shipped_tokenizer_needs_a_token_for_three_characters_of_code():
    code = "".join(list(data.stdlib_texts().values())[:50])
    assert len(code) / len(get_tokenizer("bpe2k").encode_ordinary(code)) > 2.8


def test_an_encoding_can_be_pickled():
    for name in ("bpe2k", "bytes"):
        copy = pickle.loads(pickle.dumps(get_tokenizer(name)))
        assert copy.encode_ordinary(UNICODE) == get_tokenizer(name).encode_ordinary(UNICODE)


def test_without_a_network_the_gpt2_tokenizer_says_that_it_needs_one(offline):
    with pytest.raises(OSError, match="needs the network once"):
        get_tokenizer("gpt2")


def test_an_unknown_tokenizer_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'gpt3' is not one of bpe2k, bytes, gpt2"):
        get_tokenizer("gpt3")


# --- python: the standard library ---


@pytest.fixture(scope="module")
def python_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare("python", root)
    return load("python", root)


def test_the_standard_library_makes_millions_of_tokens_without_its_tests(python_set):
    meta, tokens = python_set
    assert sum(meta[split]["bytes"] for split in ("train", "val")) > 5e6
    assert len(tokens["train"]) > 1.5e6
    names = [path.as_posix() for path in data.stdlib_texts()]
    assert not [name for name in names if "/test/" in name or "/tests/" in name or "-packages/" in name]
    assert any(name.endswith("/textwrap.py") for name in names)


def test_each_file_of_the_standard_library_is_whole_in_one_split_after_a_bos(python_set):
    meta, tokens = python_set
    found = [text for split in ("train", "val") for text in texts_between(tokens[split], "bpe2k")]
    assert collections.Counter(found) == collections.Counter(data.stdlib_texts().values())


def test_a_twentieth_of_the_files_is_held_out(python_set):
    meta, tokens = python_set
    files = {split: np.count_nonzero(tokens[split] == meta["bos"]) for split in ("train", "val")}
    assert files["val"] == round(0.05 * sum(files.values()))


def test_meta_counts_tokens_and_bytes_and_names_the_hash(python_set):
    meta, tokens = dict(python_set[0]), python_set[1]
    for split in ("train", "val"):
        texts = texts_between(tokens[split], "bpe2k")
        assert meta[split] == {"tokens": len(tokens[split]), "bytes": len("".join(texts).encode()),
                               "sha256": hashlib.sha256(tokens[split].tobytes()).hexdigest()}
    del meta["train"], meta["val"], meta["source"], meta["sha256"]
    assert meta == {"tokenizer": "bpe2k", "bos": 2047, "vocab_size": 2048, "dtype": "uint16"}


# --- backcopy ---


def test_after_a_trigger_comes_the_character_before_it_seven_times_out_of_eight():
    text = data.backcopy_text(100_000)
    chance = np.random.default_rng(0).dirichlet(np.full(62, 0.3), size=62)
    at = [i for i, c in enumerate(text[:-1]) if c in data.TRIGGERS and text[i - 1] not in data.TRIGGERS]
    copied = np.mean([text[i + 1] == text[i - 1] for i in at])
    by_chance = np.mean([chance[data.ALPHABET.index(text[i]), data.ALPHABET.index(text[i - 1])] for i in at])
    assert len(at) > 5000
    assert abs(copied - (7 / 8 + 1 / 8 * by_chance)) < 0.03


def test_elsewhere_backcopy_is_a_markov_chain_with_rows_drawn_from_a_dirichlet():
    text = data.backcopy_text(200_000)
    rows = np.random.default_rng(0).dirichlet(np.full(62, 0.3), size=62)
    for c in "abdefgh":
        after = collections.Counter(b for a, b in zip(text, text[1:]) if a == c)
        # Every character after a c is drawn from its row, since it is no trigger.
        freq = np.array([after[b] for b in data.ALPHABET]) / after.total()
        assert np.abs(freq - rows[data.ALPHABET.index(c)]).max() < 0.04


def test_backcopy_is_the_same_text_everywhere():
    digest = hashlib.sha256(data.backcopy_text(20_000).encode()).hexdigest()
    assert digest == "9cd4eba817b4ca289f3212bf930a3c937203cab592bd9e6aff1efddfacd42a39"
    assert data.backcopy_text(20_000, seed=1) != data.backcopy_text(20_000)


def test_backcopy_is_one_stream_of_bytes_cut_at_95_percent(root):
    prepare("backcopy", root, chars=20_000)
    meta, tokens = load("backcopy", root)
    assert (meta["tokenizer"], len(tokens["train"]), len(tokens["val"])) == ("bytes", 19_000, 1_000)
    whole = bytes([*tokens["train"], *tokens["val"]])
    assert whole.decode() == data.backcopy_text(20_000)


# --- downloads, from a server on this machine ---


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, and misbehaves as `manner` says."""
    files, manner, ranges = {}, "", []

    def do_GET(self):
        body = self.files.get(self.path.rsplit("/", 1)[-1])
        if body is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and self.manner != "ignores ranges" else 0
        if self.manner == "sends another range" and start:
            start //= 2
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        lie = {"promises too much": 100, "promises too little": -100}.get(self.manner, 0)
        if self.manner != "promises nothing":
            self.send_header("Content-Length", str(len(body) - start + lie))
        self.end_headers()
        cut = self.manner == "always breaks off" or (self.manner and len(self.ranges) == 1)
        self.wfile.write(body[start:start + len(body) // 3] if cut else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on localhost in the place of GitHub and Hugging Face."""
    class Fresh(Server):
        files, manner, ranges = {}, "", []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(data, "FINEWEB_URL", url)
        monkeypatch.setattr(data, "SHAKESPEARE_URL", f"{url}/input.txt")
        yield Fresh
        httpd.shutdown()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, since requests go to a port of this machine where nobody listens; and nothing is cached."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    data.get_tokenizer.cache_clear()
    data.token_bytes.cache_clear()


def shard(tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


SHARDS = {f"fineweb_{name}.bin": np.random.default_rng(i).integers(0, 50257, 20_000 + i)
          for i, name in enumerate(("val_000000", "train_000001", "train_000002"))}


@pytest.fixture
def fineweb(server, offline):
    server.files = {name: shard(tokens) for name, tokens in SHARDS.items()}
    return server


def assert_fineweb_is_right(root, shards=1):
    meta, tokens = load("fineweb", root)
    train = np.concatenate([SHARDS[f"fineweb_train_{i:06d}.bin"] for i in range(1, shards + 1)])
    assert np.array_equal(tokens["train"], train)
    assert np.array_equal(tokens["val"], SHARDS["fineweb_val_000000.bin"])
    assert (meta["tokenizer"], meta["bos"], meta["vocab_size"]) == ("gpt2", 50256, 50257)


def test_shards_are_joined_in_order_and_need_no_tokenizer(fineweb, root):
    prepare("fineweb", root, shards=2)
    assert_fineweb_is_right(root, shards=2)
    meta, _ = load("fineweb", root)
    assert meta["val"]["bytes"] is None   # GPT-2's vocabulary would say, but there is no network for it here


def test_shards_that_are_there_are_not_downloaded_again(fineweb, root):
    prepare("fineweb", root)
    prepare("fineweb", root, shards=2)
    assert len(fineweb.ranges) == 3
    assert_fineweb_is_right(root, shards=2)


@pytest.mark.parametrize("manner", ["breaks off once", "ignores ranges", "sends another range"])
def test_a_download_that_breaks_off_is_resumed(fineweb, root, manner):
    fineweb.manner = manner
    prepare("fineweb", root)
    broke_at = len(fineweb.files["fineweb_val_000000.bin"]) // 3
    assert fineweb.ranges[:2] == [None, f"bytes={broke_at}-"]
    assert_fineweb_is_right(root)


def test_a_download_that_was_given_up_is_resumed_by_the_same_command(fineweb, root, monkeypatch):
    fineweb.manner = "always breaks off"
    monkeypatch.setattr(data, "TRIES", 1)
    with pytest.raises(OSError, match="cannot download .*fineweb_val_000000.bin.*broke off.*try again later"):
        prepare("fineweb", root)
    assert not (root / "fineweb" / "meta.json").exists()
    fineweb.manner = ""
    prepare("fineweb", root)
    assert fineweb.ranges[1].startswith("bytes=")
    assert_fineweb_is_right(root)


def test_a_server_that_does_not_say_how_long_a_file_is_is_believed_if_the_file_is_right(fineweb, root):
    fineweb.manner, fineweb.ranges = "promises nothing", [None]
    prepare("fineweb", root)
    assert_fineweb_is_right(root)


@pytest.mark.parametrize("manner", ["promises too much", "promises too little"])
def test_a_server_that_lies_about_lengths_is_found_out(fineweb, root, manner):
    fineweb.manner, fineweb.ranges = manner, [None]
    with pytest.raises((OSError, ValueError), match="cannot download|not the 41,024 of its header"):
        prepare("fineweb", root)
    assert not (root / "fineweb" / "meta.json").exists()
    fineweb.manner = ""
    prepare("fineweb", root)
    assert_fineweb_is_right(root)


@pytest.mark.parametrize("body", [
    b"", b"<html>busy</html>", shard(range(99), magic=1), shard(range(99), version=2),
    shard(range(99), count=100), shard(range(99), count=-1), shard([]),
])
def test_what_is_not_a_shard_is_thrown_away(fineweb, root, body):
    right, fineweb.files["fineweb_val_000000.bin"] = fineweb.files["fineweb_val_000000.bin"], body
    with pytest.raises(ValueError, match="header.*it was thrown away"):
        prepare("fineweb", root)
    fineweb.files["fineweb_val_000000.bin"] = right
    prepare("fineweb", root)
    assert_fineweb_is_right(root)


def test_a_shard_with_a_token_that_gpt2_does_not_have_is_refused(fineweb, root):
    fineweb.files["fineweb_train_000001.bin"] = shard([50257] * 100)
    with pytest.raises(ValueError, match="token 50257 is beyond the last of gpt2, 50256"):
        prepare("fineweb", root)


def test_there_are_1_to_103_shards(root):
    for shards in (0, -1, 104):
        with pytest.raises(ValueError, match=f"--shards={shards} must be 1 to 103"):
            prepare("fineweb", root, shards=shards)


@pytest.fixture
def shakespeare(server, monkeypatch):
    server.files = {"input.txt": TEXT.encode()}
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    return server


def test_shakespeare_is_split_90_to_10_in_bytes(shakespeare, root):
    shakespeare.manner = "breaks off once"
    prepare("shakespeare", root)
    meta, tokens = load("shakespeare", root)
    cut = int(len(TEXT) * 0.9)
    assert bytes(tokens["train"].tolist()).decode() == TEXT[:cut]
    assert bytes(tokens["val"].tolist()).decode() == TEXT[cut:]


def test_a_shakespeare_that_is_there_is_used_without_a_network(shakespeare, offline, root):
    (root / "shakespeare").mkdir(parents=True)
    (root / "shakespeare" / "input.txt").write_text(TEXT)
    prepare("shakespeare", root)
    assert shakespeare.ranges == []


def test_another_text_is_no_shakespeare(shakespeare, root):
    shakespeare.files = {"input.txt": b"To bee or not to bee"}
    with pytest.raises(ValueError, match="has sha256 .*thrown away"):
        prepare("shakespeare", root)
    path = root / "shakespeare" / "input.txt"
    path.write_text("To bee or not to bee")
    with pytest.raises(ValueError, match="input.txt has sha256 .*delete it"):
        prepare("shakespeare", root)


def test_without_a_network_one_is_told_which_file_to_put_where(offline, root):
    with pytest.raises(OSError, match="cannot download https://raw.*input.txt.*put that file at .*input.txt"):
        prepare("shakespeare", root)


# --- your own files ---


def test_one_file_gives_its_last_twentieth_to_val(tmp_path, root):
    (tmp_path / "my notes.txt").write_text(TEXT)
    assert prepare_files([tmp_path / "my notes.txt"], root=root) == root / "my-notes"
    meta, tokens = load("my-notes", root)
    cut = int(len(TEXT) * 0.95)
    assert texts_between(tokens["train"], "bpe2k") == [TEXT[:cut]]
    assert texts_between(tokens["val"], "bpe2k") == [TEXT[cut:]]


def test_many_files_are_split_by_file_each_after_a_bos(folder, root):
    prepare_files([folder], tokenizer="bytes", root=root)
    _, tokens = load("corpus", root)
    train, val = (texts_between(tokens[split], "bytes") for split in ("train", "val"))
    assert sorted(train + val) == sorted(path.read_text() for path in folder.rglob("*.txt"))
    assert len(val) == 2


def test_the_split_depends_on_the_names_alone(folder, root):
    def held_out():
        prepare_files([folder], root=root)
        return set(texts_between(load("corpus", root)[1]["val"], "bpe2k"))
    before = held_out()
    (folder / "another.txt").write_text("another\n" * 30)
    assert len(before & held_out()) >= len(before) - 1


def test_in_a_folder_what_is_hidden_empty_or_no_text_is_left_out(folder, root, capsys):
    (folder / ".secret").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    prepare_files([folder], root=root)
    _, tokens = load("corpus", root)
    assert sum(np.count_nonzero(tokens[split] == 2047) for split in ("train", "val")) == 40
    assert "picture.png is left out: not UTF-8 text" in capsys.readouterr().err


def test_a_file_that_is_named_twice_is_read_once(folder, root):
    prepare_files([folder, folder / "a" / "1.txt"], root=root)
    _, tokens = load("corpus", root)
    assert sum(np.count_nonzero(tokens[split] == 2047) for split in ("train", "val")) == 40


def test_files_may_be_prepared_again_but_not_over_another_set(tmp_path, root):
    for where in ("one", "two"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "notes.txt").write_text(where + TEXT)
    prepare_files([tmp_path / "one" / "notes.txt"], root=root)
    (tmp_path / "one" / "notes.txt").write_text(TEXT * 2)
    prepare_files([tmp_path / "one" / "notes.txt"], tokenizer="bytes", root=root)
    assert load("notes", root)[0]["tokenizer"] == "bytes"
    with pytest.raises(ValueError, match="the name notes is taken .*--name"):
        prepare_files([tmp_path / "two" / "notes.txt"], root=root)
    assert load("notes", root)[0]["tokenizer"] == "bytes"


@pytest.mark.parametrize("damage", [lambda meta: meta.unlink(), lambda meta: meta.write_text("{"),
                                    lambda meta: meta.write_text(meta.read_text().replace("text", "tex_"))],
                         ids=["gone", "cut", "flipped"])
def test_a_set_of_ones_own_is_whole_again_after_the_same_command(tmp_path, root, damage):
    (tmp_path / "text.txt").write_text(TEXT)
    for _ in range(2):
        prepare_files([tmp_path / "text.txt"], "mine", "bytes", root)
        load("mine", root)
        damage(root / "mine" / "meta.json")


def test_a_name_is_a_plain_folder_and_not_that_of_a_known_set(tmp_path, root):
    (tmp_path / "notes.txt").write_text(TEXT)
    for name in ("a/b", "a\\b", "..", ".hidden", ""):
        with pytest.raises(ValueError, match="must be letters, digits"):
            prepare_files([tmp_path / "notes.txt"], name=name, root=root)
    for name in ("python", "fineweb"):
        with pytest.raises(ValueError, match=f"the name {name} is taken"):
            prepare_files([tmp_path / "notes.txt"], name=name, root=root)


def test_a_text_too_small_for_a_window_is_refused_by_its_name(tmp_path, root):
    (tmp_path / "haiku.txt").write_text("An old silent pond")
    with pytest.raises(ValueError, match="haiku.txt leaves .* tokens for train, but a window needs 64"):
        prepare_files([tmp_path / "haiku.txt"], root=root)
    assert list(root.iterdir()) == []


def test_a_file_that_is_not_utf8_is_refused_with_the_place(tmp_path, root):
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + "naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(see byte 5,702\)"):
        prepare_files([tmp_path / "latin.txt"], root=root)


def test_a_file_that_is_empty_or_missing_or_a_folder_without_text_is_refused(tmp_path, root):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "void").mkdir()
    for name, message in {"empty.txt": "is empty", "void": "is empty", "gone.txt": "is neither"}.items():
        with pytest.raises((ValueError, OSError), match=f"{name} {message}"):
            prepare_files([tmp_path / name], root=root)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path, root):
    path = tmp_path / "locked.txt"
    path.write_text(TEXT)
    path.chmod(0)
    try:
        path.read_text()
    except PermissionError:
        with pytest.raises(OSError, match="locked.txt cannot be read: Permission denied"):
            prepare_files([path], root=root)
    else:
        pytest.skip("this user may read everything")


# --- opening a set ---


@pytest.fixture
def small(root):
    prepare("backcopy", root, chars=20_000)
    return root / "backcopy"


def test_a_train_bin_that_was_cut_short_is_refused(small):
    (small / "train.bin").write_bytes((small / "train.bin").read_bytes()[:-3])
    with pytest.raises(ValueError, match="train.bin has 37,997 bytes, but 19,000 tokens need 38,000: it was"):
        load("backcopy", small.parent)


def test_a_missing_val_bin_is_refused(small):
    (small / "val.bin").unlink()
    with pytest.raises(ValueError, match="val.bin has 0 bytes"):
        load("backcopy", small.parent)


def test_a_token_that_is_not_the_one_written_is_refused(small):
    with open(small / "val.bin", "r+b") as file:
        file.seek(500)
        file.write(np.uint16(257).tobytes())
    with pytest.raises(ValueError, match="val.bin has sha256 .* is damaged, make it again with"):
        load("backcopy", small.parent)


@pytest.mark.parametrize("change", [{"dtype": "uint8"}, {"bos": 0}, {"vocab_size": 999}, {"val": None},
                                    {"tokenizer": "gpt3"}, {"train": {}}, {"source": "another"}])
def test_a_meta_json_that_contradicts_itself_is_refused(small, change):
    meta = json.loads((small / "meta.json").read_text())
    (small / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(ValueError, match="meta.json is damaged .*`python data/prepare.py backcopy`"):
        load("backcopy", small.parent)


@pytest.mark.parametrize("change", [{"bos": 0}, {"vocab_size": 999}, {"dtype": "uint8"}])
def test_a_set_of_a_version_with_another_vocabulary_is_refused(small, change):
    meta = json.loads((small / "meta.json").read_text())
    (small / "meta.json").write_text(json.dumps(data.signed({**meta, **change})))
    with pytest.raises(ValueError, match="meta.json is damaged or from another version"):
        load("backcopy", small.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"tokenizer": "bytes"}', "\u0000"])
def test_a_meta_json_that_is_none_is_refused(small, text):
    (small / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json is damaged"):
        load("backcopy", small.parent)


def test_a_damaged_set_is_whole_again_after_the_command_that_the_message_names(small):
    (small / "train.bin").write_bytes(b"")
    prepare("backcopy", small.parent, chars=20_000)
    load("backcopy", small.parent)


@pytest.mark.parametrize("name", ["../data/backcopy", "", ".", "a/b", "-x"])
def test_a_name_that_leads_out_of_the_folder_of_sets_is_refused(small, name):
    with pytest.raises(ValueError, match=re.escape(f"data={name} can't name a folder")):
        load(name, small.parent)


@pytest.mark.parametrize("character", ["\ud800", "\udcff"])
def test_text_with_half_a_character_is_refused_with_its_place(character):
    for name in ("bytes", "bpe2k"):
        with pytest.raises(ValueError, match="character 2 of the text.* has no UTF-8 form"):
            get_tokenizer(name).encode_ordinary(f"ab{character}")


def test_a_missing_set_is_answered_with_what_is_there_and_the_command(small):
    with pytest.raises(FileNotFoundError, match="no data set 'backcpoy'.*there: backcopy;.*python, back"):
        load("backcpoy", small.parent)
    with pytest.raises(FileNotFoundError, match="make it with `python data/prepare.py fineweb`"):
        load("fineweb", small.parent)


def test_a_kill_while_a_set_is_replaced_leaves_the_old_set_the_new_one_or_none(small, monkeypatch):
    old = (small / "train.bin").read_bytes()
    replace, calls = data.os.replace, []
    for survive in range(3):
        def replace_or_die(src, dst, survive=survive):
            if len(calls) == survive:
                raise KeyboardInterrupt
            calls.append(replace(src, dst))
        with monkeypatch.context() as patch:
            patch.setattr(data.os, "replace", replace_or_die)
            with pytest.raises(KeyboardInterrupt):
                prepare("backcopy", small.parent, chars=20_000, seed=1)
        with pytest.raises(FileNotFoundError):
            load("backcopy", small.parent)
        calls.clear()
        prepare("backcopy", small.parent, chars=20_000)
        assert (small / "train.bin").read_bytes() == old
    assert [path.name for path in small.parent.iterdir()] == ["backcopy"]


def test_making_the_same_set_again_never_takes_it_from_its_readers(small, monkeypatch):
    replace, before = data.os.replace, load("backcopy", small.parent)[0]

    def replace_and_read(src, dst):
        assert load("backcopy", small.parent)[0] == before
        replace(src, dst)
    monkeypatch.setattr(data.os, "replace", replace_and_read)
    prepare("backcopy", small.parent, chars=20_000)


def test_the_tokens_are_mapped_from_disk_and_cannot_be_changed(small):
    _, tokens = load("backcopy", small.parent)
    assert isinstance(tokens["train"], np.memmap)
    with pytest.raises(ValueError):
        tokens["train"][0] = 1


# --- the command line ---


def cli(*args):
    return subprocess.run([sys.executable, data.__file__, *map(str, args)], capture_output=True, text=True)


def test_the_command_makes_a_set_and_says_where(tmp_path, root):
    (tmp_path / "notes.txt").write_text(TEXT)
    done = cli(tmp_path / "notes.txt", "--tokenizer=bytes", "--name=mine", "--root", root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{root / 'mine'}: 5,416 tokens for train and 286 for val (bytes, 257")


def test_a_mistake_is_one_sentence_with_status_2_and_no_traceback(tmp_path, root):
    done = cli(tmp_path / "gone.txt", "--root", root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("prepare.py: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("args, message", [
    (["python", "--shards=2"], "--shards does not go with python"),
    (["fineweb", "--tokenizer=bytes"], "--tokenizer does not go with fineweb: it takes --root, --shards"),
    (["fineweb", "--shards=0"], "--shards=0 must be 1 to 103"),
    (["notes.txt", "--shards=2"], "--shards does not go with notes.txt: it takes --root, --name, --token"),
    (["pyhton"], "pyhton is neither a file or folder nor one of python, backcopy, shakespeare, fineweb"),
])
def test_options_that_do_not_fit_are_refused(args, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        data.main(args)


def test_a_set_wins_over_a_file_of_the_same_name(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text(TEXT)
    data.main(["python", "--root", str(root)])
    assert load("python", root)[0]["source"].startswith("the standard library")


def test_what_train_py_prepares_unasked_needs_no_network(offline, root):
    prepare("backcopy", root, chars=20_000)
    assert set(data.OFFLINE) < set(data.SETS)


def test_the_module_starts_without_torch():
    code = "import sys; sys.path.insert(0, 'data'); import prepare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=data.DATA.parent)
    assert done.stdout == "False\n"
