"""Claims about data/: what a set holds, how text becomes tokens, and what becomes of damage and mistakes."""
import base64
import codecs
import collections
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import types
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import no_file_beyond, refusal, status_of

from data import prepare, tokenizers
from data.prepare import load, prepare_files
from data.tokenizers import TextOut, get_tokenizer

TEXT = "Speak the speech, I pray you, as I pronounced it to you.\n" * 100
UNICODE = "naïve 東京 🙂🏽\r\n\tdef f(x):\n        return x  \u0000 <|bos|> <|endoftext|>"


@pytest.fixture
def root(tmp_path, use_data):
    """An empty folder for sets."""
    (tmp_path / "sets").mkdir()
    use_data(tmp_path / "sets")
    return tmp_path / "sets"


@pytest.fixture
def notes(tmp_path, root):
    """A text file, from which a set `notes` can be made."""
    (tmp_path / "notes.txt").write_text(TEXT)
    return tmp_path / "notes.txt"


@pytest.fixture
def small(notes, root):
    """The folder of a small set of 5,700 bytes."""
    return prepare_files([notes], "small", "bytes")


def write_files(folder, contents):
    """Write {name: text or bytes} into a folder; return the folder."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts_of(name):
    """{"train": texts, "val": texts} of a set in which each text starts with BOS."""
    (meta, tokens), texts = load(name), {}
    for split, array in tokens.items():
        starts = np.flatnonzero(array == meta["bos"])
        assert starts[0] == 0
        decode = get_tokenizer(meta["tokenizer"]).decode_bytes
        texts[split] = [decode(part[1:].tolist()).decode() for part in np.split(array, starts[1:])]
    return texts


# --- tokenizers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size", [("bpe2k", 2048), ("bytes", 257)])
def test_any_text_is_its_tokens_byte_for_byte_and_never_bos_which_is_the_last_id(name, size):
    encoding, lengths, rng = get_tokenizer(name), tokenizers.token_bytes(name), random.Random(0)
    noise = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in range(5000))
    for text in (UNICODE, noise, "", " " * 1000, TEXT):
        tokens = encoding.encode_ordinary(text)
        assert b"".join(map(encoding.decode_single_token_bytes, tokens)) == text.encode()
        assert size - 1 not in tokens and lengths[tokens].sum() == len(text.encode())
        assert name != "bytes" or tokens == [*text.encode()]
    assert size == encoding.n_vocab == tokenizers.bos_id(name) + 1 == len(lengths)
    assert lengths[-1] == 0 and lengths[:-1].all()


def test_the_shipped_tokenizer_holds_every_byte_and_only_merges_of_two_earlier_tokens():
    path = Path(tokenizers.__file__).with_name("bpe2k.tiktoken")
    lines = [line.split() for line in path.read_text().splitlines()]
    tokens = [base64.b64decode(token) for token, _ in lines]
    assert [int(rank) for _, rank in lines] == list(range(2047))
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    earlier = set(tokens[:256])
    for token in tokens[256:]:
        assert token not in earlier
        assert any(token[:i] in earlier and token[i:] in earlier for i in range(1, len(token)))
        earlier.add(token)


@pytest.fixture
def offline(monkeypatch):
    """No network to ask for the vocabulary of GPT-2, and no copy of it."""
    def unreachable(name):
        raise ConnectionError("no route to host")

    get_tokenizer.cache_clear()
    tokenizers.token_bytes.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)


@pytest.mark.parametrize("name, said", [("gpt2", "gpt2 needs the network once.*use bpe2k or bytes"),
                                        ("Qwen/Qwen3-0.6B", "`hf download Qwen/Qwen3-0.6B --local-dir Qw"),
                                        ("gpt3", "gpt3 is not one of bpe2k, bytes, gpt2, nor a folder")])
def test_a_tokenizer_that_cannot_be_had_is_answered_with_those_that_can(name, said, offline):
    with pytest.raises((OSError, ValueError), match=said):
        get_tokenizer(name)


@pytest.mark.parametrize("name", ["bytes", "bpe2k"])
def test_a_character_is_shown_as_soon_as_its_last_byte_has_come_but_never_in_parts(name):
    encoding, out, text, given = get_tokenizer(name), TextOut(get_tokenizer(name)), "", b""
    for token in encoding.encode_ordinary(UNICODE):
        text += out.add(token)
        given += encoding.decode_single_token_bytes(token)
        assert text == given.decode(errors="ignore")  # whole characters at the front, and no more
    assert text == UNICODE


@pytest.mark.parametrize("tokens, text", [
    (b"a\xe6\x9db", "a\ufffdb"), (b"a\xffb", "a\ufffdb"), (b"\x80\x80", "\ufffd\ufffd"),
    (b"\xe6\x9d\xb1\xe6", "東"), (b"\xed\xa0\x80.", "\ufffd" * 3 + "."), ([104, 257, 105, 50303], "hi")])
def test_bytes_that_never_become_a_character_show_as_a_sign_for_that(tokens, text):
    assert "".join(map(TextOut(get_tokenizer("bytes")).add, tokens)) == text


def test_the_labels_of_a_picture_show_bos_and_what_cannot_be_seen():
    shown = tokenizers.labels([256, *b"a \n\t\xc3", 256], get_tokenizer("bytes"), 256)
    assert shown == ["BOS", "a", "·", "↵", "→", "\ufffd", "BOS"]


# --- python: the standard library -------------------------------------------------------------------

@pytest.fixture(scope="module")
def python_set(tmp_path_factory):
    """(meta, tokens, texts, what was printed) of the set `python`, which load makes on the way."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(prepare, "DATA", tmp_path_factory.mktemp("sets") / "new")
        return *load("python"), texts_of("python"), said.getvalue()


def test_a_set_that_needs_no_download_is_made_once_on_the_way_and_a_token_is_3_characters(python_set):
    _, tokens, texts, said = python_set
    lines = said.splitlines()  # the set was opened twice
    assert lines[0].startswith("preparing ") and lines[0].endswith("python, once")
    assert len(lines) == 3 and "(bpe2k, 2,048 in the vocabulary)" in lines[2]
    assert len(tokens["train"]) > 1.5e6 and sum(map(len, texts["val"])) / len(tokens["val"]) > 2.8


def test_each_file_of_the_standard_library_is_whole_in_one_split_and_a_twentieth_is_held_out(python_set):
    def is_text(path):
        with contextlib.suppress(UnicodeDecodeError):
            return 0 < len(path.read_text(encoding="utf-8-sig")) and b"\0" not in path.read_bytes()

    folder, (train, val) = Path(sysconfig.get_paths()["stdlib"]), python_set[2].values()
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    files = [path for path in folder.rglob("*.py") if not unwanted & {*path.relative_to(folder).parts[:-1]}
             and not path.name.startswith("_sysconfigdata") and is_text(path)]
    assert len(files) > 500 and folder / "textwrap.py" in files and len(val) == round(len(files) / 20)
    expected = collections.Counter(path.read_bytes().decode("utf-8-sig") for path in files)
    assert collections.Counter(train + val) == expected
    meta, tokens, texts = {**python_set[0]}, *python_set[1:3]
    for split in ("train", "val"):
        assert meta.pop(split) == {
            "tokens": len(tokens[split]), "bytes": len("".join(texts[split]).encode()),
            "sha256": hashlib.sha256(tokens[split].tobytes()).hexdigest()}
    assert meta.pop("source").startswith("the standard library of Python 3.")
    assert meta == {"tokenizer": "bpe2k", "tokenizer_sha256": None, "bos": 2047, "vocab_size": 2048,
                    "dtype": "uint16"}


# --- backcopy ---------------------------------------------------------------------------------------

def test_after_a_trigger_comes_a_copy_seven_times_out_of_eight_and_elsewhere_the_next_of_a_markov_chain():
    rows = dict(zip(prepare.ALPHABET, np.random.default_rng(0).dirichlet(np.full(62, 0.3), size=62)))
    rows = {c: dict(zip(prepare.ALPHABET, row)) for c, row in rows.items()}  # chances of what comes after c
    text = prepare.backcopy_text(200_000)
    asked = [(a, c, b) for a, c, b in zip(text, text[1:], text[2:]) if c in "uvx" and a not in "uvx"]
    by_chance = np.mean([rows[c][a] for a, c, b in asked])
    assert len(asked) > 10_000
    assert abs(np.mean([a == b for a, c, b in asked]) - (7 + by_chance) / 8) < 0.01
    for c in "abdefgh":  # no triggers
        after = collections.Counter(b for a, b in zip(text, text[1:]) if a == c)
        assert all(abs(after[b] / after.total() - chance) < 0.04 for b, chance in rows[c].items())


def test_backcopy_is_the_same_text_everywhere_one_stream_of_bytes_cut_at_95_percent(root):
    text = prepare.backcopy_text(20_000)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "9cd4eba817b4ca289f3212bf930a3c937203cab592bd9e6aff1efddfacd42a39"
    assert prepare.backcopy_text(20_000, seed=1) != text
    prepare.prepare_backcopy(chars=20_000)
    meta, tokens = load("backcopy")
    assert (meta["tokenizer"], len(tokens["train"]), len(tokens["val"])) == ("bytes", 19_000, 1_000)
    assert bytes([*tokens["train"], *tokens["val"]]).decode() == text


# --- downloads, without a network -------------------------------------------------------------------

SHARDS = {f"fineweb_{name}.bin": np.random.default_rng(i).integers(0, 50257, 20_000 + i)
          for i, name in enumerate(("val_000000", "train_000001", "train_000002"))}


def test_shards_of_fineweb_are_joined_in_order_without_their_headers(root, offline, monkeypatch):
    asked = []

    def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
        asked.append((repo_id, repo_type, filename))
        write_files(Path(local_dir), {filename: bytes(1024) + SHARDS[filename].astype("<u2").tobytes()})
        return str(Path(local_dir, filename))

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    assert "pip install huggingface_hub" in refusal(prepare.main, "fineweb --shards=2")
    hub = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert status_of(prepare.main, "fineweb --shards=2")[0] == 0
    meta, tokens = load("fineweb")
    val, first, second = SHARDS.values()
    assert np.array_equal(tokens["train"], [*first, *second]) and np.array_equal(tokens["val"], val)
    assert (meta["tokenizer"], meta["bos"], meta["vocab_size"]) == ("gpt2", 50256, 50257)
    assert meta["val"]["bytes"] is None  # GPT-2's vocabulary would say, but there is no network for it here
    assert {*asked} == {("kjj0/fineweb10B-gpt2", "dataset", name) for name in SHARDS}


@pytest.fixture
def shakespeare(tmp_path, root, monkeypatch):
    """The file that stands for Tiny Shakespeare on the network."""
    (tmp_path / "input.txt").write_text(TEXT)
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    return tmp_path / "input.txt"


def test_shakespeare_is_split_90_to_10_in_bytes(shakespeare):
    prepare.main(["shakespeare"])
    shakespeare.unlink()
    prepare.main(["shakespeare"])  # from the file that is there now
    tokens = load("shakespeare")[1].values()
    assert [bytes(part.tolist()).decode() for part in tokens] == [TEXT[:5130], TEXT[5130:]]


def test_without_shakespeare_one_is_told_what_to_do(shakespeare, root, monkeypatch):
    def break_off(url, timeout):
        raise http.client.IncompleteRead(b"Speak", 5695)

    shakespeare.write_text("To bee or not to bee")
    assert "is not Tiny Shakespeare, by its sha256: delete it" in refusal(prepare.main, ["shakespeare"])
    (root / "shakespeare" / "input.txt").unlink()
    shakespeare.unlink()
    to_do = f"try again, or put it at {root / 'shakespeare' / 'input.txt'}"
    for _ in ("no network", "a download that breaks off"):
        said = refusal(prepare.main, ["shakespeare"])
        assert f"cannot download {shakespeare.as_uri()}" in said and said.endswith(to_do)
        monkeypatch.setattr(prepare.urllib.request, "urlopen", break_off)


# --- what is text -----------------------------------------------------------------------------------

@pytest.mark.parametrize("content, reason", [
    (b"ab\0cd", "is not text: byte 2 is NUL"), ("speech".encode("utf-16-le"), "is not text: byte 1 is NUL"),
    ("ab naïve".encode("latin-1"), "is not UTF-8 text: see byte 5")])
def test_text_is_utf8_with_its_line_ends_and_what_is_not_is_refused_alike_in_a_file_and_standard_input(
        content, reason, tmp_path, monkeypatch):
    write_files(tmp_path, {"text.txt": content})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    text = "naïve\r\n東京\r🙂\n\ufeff"  # line ends stay, but not a byte order mark in front
    assert prepare.text_of(text.encode()) == prepare.text_of(codecs.BOM_UTF8 + text.encode()) == text
    for path in (tmp_path / "text.txt", "-"):
        with pytest.raises(ValueError, match=f"^{path} {reason}$"):
            prepare.read_text(path)


def test_in_a_folder_what_is_hidden_or_empty_is_left_out_and_what_is_no_text_is_said_in_one_line(
        tmp_path, root, capsys):
    folder = write_files(tmp_path / "corpus", {
        "a.txt": TEXT, "b/c.py": "x" + TEXT, ".secret": TEXT, ".git/config": TEXT, "b/empty.txt": ""})
    prepare_files([folder])
    assert len(texts_of("corpus")["train"]) == 2 and capsys.readouterr().err == ""
    write_files(folder, {"b.png": b"\x89PNG\xff", "c.bin": b"a\0b", "d.txt": b"\xff", "f.txt": b"\xfe"})
    (folder / "e.txt").symlink_to("gone")
    (folder / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    prepare_files([folder], overwrite=True)
    said = capsys.readouterr().err
    shown = [part.removeprefix(f"{folder}/") for part in said.strip().split(": ")[1].split(", ")]
    assert shown == ["elsewhere (a link)", "b.png", "c.bin and 2 more"] and said.count("\n") == 1
    assert len(texts_of("corpus")["train"]) == 2


@pytest.mark.parametrize("name", ["chat.jsonl", "page.HTML", "lab.ipynb", "table.tsv"])
def test_a_file_is_a_set_of_its_name_with_a_warning_if_it_is_markup(name, tmp_path, root, capsys):
    prepare_files([write_files(tmp_path, {name: TEXT}) / name])
    assert capsys.readouterr().err == f"{name} is learned as it is, with all its markup\n"
    prepare_files([write_files(tmp_path, {"my notes!.old.txt": TEXT}) / "my notes!.old.txt"])
    assert texts_of("my-notes-.old") == {"train": [TEXT[:5415]], "val": [TEXT[5415:]]}  # its last twentieth
    assert not capsys.readouterr().err


def test_each_text_counts_once_even_if_it_is_there_under_several_names(tmp_path, root, capsys):
    folder = write_files(tmp_path / "corpus", {"a.txt": TEXT, "a (copy).txt": TEXT, "b.txt": TEXT.upper()})
    (folder / "link.txt").symlink_to(folder / "a.txt")
    prepare_files([folder])
    texts = texts_of("corpus")
    assert sorted(map("".join, zip(texts["train"], texts["val"]))) == [TEXT.upper(), TEXT]
    assert capsys.readouterr().err == "left out, since each text counts once: 2 of 4 texts\n"


# --- your own sets ----------------------------------------------------------------------------------

def test_of_many_files_whole_ones_are_held_out_which_depends_on_their_names_below_the_folder(tmp_path, root):
    files = {f"{i % 2}/{i}.txt": f"file {i:02}\n" * 30 for i in range(40)}
    folder = write_files(tmp_path / "corpus", files)
    prepare_files([folder])
    texts = texts_of("corpus")
    assert sorted(texts["train"] + texts["val"]) == sorted(files.values()) and len(texts["val"]) == 2
    other = folder.rename(tmp_path / "other")
    paths = [*(other / "1").iterdir(), other, other / "0"]  # a file that is named twice is read once
    random.Random(0).shuffle(paths)
    prepare_files(paths, "again")
    assert texts_of("again") == texts
    composed, apart = ([unicodedata.normalize(form, f"{c}.txt") for c in "äöüéèêàôîçñå"]  # on Linux; on a Mac
                       for form in ("NFC", "NFD"))
    order, other = (prepare.by_hash({Path("/", name): "" for name in names}) for names in (composed, apart))
    assert [apart[composed.index(path.name)] for path in order] == [path.name for path in other]


def test_of_24_files_of_uneven_sizes_val_is_near_5_percent_of_the_text():
    for seed in range(20):
        rng = random.Random(seed)
        texts = {Path(f"/corpus/{i}.txt"): "x" * int(3 ** rng.uniform(2, 10)) for i in range(24)}
        splits = prepare.split_files(texts) or prepare.split_each(texts.values())
        train, val = (sum(map(len, splits[split])) for split in ("train", "val"))
        assert train + val == sum(map(len, texts.values())) and 0.04 <= val / (train + val) < 0.056


def test_where_one_file_is_most_of_the_text_the_end_of_each_file_is_held_out(tmp_path, root):
    write_files(tmp_path / "corpus", {f"{i}.txt": f"{i:02} " * 9 for i in range(24)} | {"big.txt": TEXT * 3})
    prepare_files([tmp_path / "corpus"], tokenizer="bytes")
    texts = texts_of("corpus")
    assert len(texts["val"]) == len(texts["train"]) == 25
    assert [text for text in texts["val"] if len(text) > 9] == [(TEXT * 3)[-855:]]


@pytest.mark.parametrize("flags, said", [
    ("notes.txt --name=small", "small is there already: --overwrite replaces it"),
    ("haiku.txt", "haiku.txt and so on have 1,900 characters of text: give at least 2,000"),
    ("pyhton", "pyhton is not there; sets known by name are python, backcopy, shakespeare, fineweb"),
    *((f"notes.txt --name={name}", f"--name={name} must be letters, digits and . _ - only")
      for name in ("a/b", "..", ".hidden", "-x", "python", "Python", "fineweb")),  # a Mac sees one name there
    ("notes.txt --shards=3", "--shards=3 is for fineweb only"),
    *((f"fineweb --shards={n}", f"shards={n} must be 1 to 103") for n in (0, -1, 104))])
def test_what_cannot_be_made_is_refused_without_a_trace(flags, said, notes, small, root, monkeypatch):
    monkeypatch.chdir(notes.parent)
    Path("haiku.txt").write_text("An old silent pond\n" * 100)
    Path("fineweb").write_text(TEXT)  # a set wins over a file of its name
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert said in refusal(prepare.main, flags)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_command_writes_to_the_folder_of_the_variable_without_waiting_for_torch(notes, root):
    done = subprocess.run([sys.executable, "-X", "importtime", prepare.__file__, notes, "--tokenizer=bytes"],
                          capture_output=True, text=True, timeout=600, cwd=notes.parent)
    assert done.returncode == 0 and "tiktoken" in done.stderr and "torch" not in done.stderr
    assert done.stdout.endswith(f"{root / 'notes'}:\n5,416 tokens for train and 286 for val "
                                "(bytes, 257 in the vocabulary)\n")


def test_a_missing_set_is_answered_with_what_is_there_and_the_command(small):
    for name, said in {"smal": "no data set smal .*sets there: small.*FILES --name=smal ",
                       "fineweb": "make it with `python \\S*data/prepare.py fineweb`"}.items():
        with pytest.raises(FileNotFoundError, match=said):
            load(name)


@pytest.mark.parametrize("name, damage", [
    *((name, cut) for name in ("train.bin", "val.bin") for cut in (0, -1, -2)), ("train.bin", None),
    *(("meta.json", text) for text in (b"", b"{", b"[]", b"null", b'{"dtype": "u1"}', b'{"dtype": "?!"}'))])
def test_a_damaged_set_is_refused_with_the_command_that_makes_it(name, damage, small):
    path = small / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:damage] if isinstance(damage, int) else damage)
    command = r"`python \S*data/prepare.py FILES --name=small --overwrite`"
    with pytest.raises(ValueError, match=f"{small} is not whole .*make it again with {command}"):
        load("small")


def test_a_set_whose_tokenizer_was_trained_anew_is_refused(tmp_path, small):
    (tmp_path / "tokenizer.json").write_text("{}")
    meta = json.loads((small / "meta.json").read_text())
    meta |= {"tokenizer": str(tmp_path), "tokenizer_sha256": tokenizers.sha256_of(tmp_path)}
    (small / "meta.json").write_text(json.dumps(meta))
    assert load("small")[0]["tokenizer"] == str(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=f"{tmp_path} holds another tokenizer than it did"):
        load("small")


def test_the_tokens_are_mapped_from_disk_but_cannot_be_changed(small):
    _, tokens = load("small")
    assert isinstance(tokens["train"], np.memmap)
    with pytest.raises(ValueError):
        tokens["train"][0] = 1


# --- a kill, a full disk, two runs at once ----------------------------------------------------------

def make(text, notes):
    """Make the set `small`, or replace it."""
    notes.write_text(text)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_files([notes], "small", "bytes", overwrite=True)


def small_set():
    """The text of the set `small`, or "none"."""
    try:
        return "".join(itertools.chain(*texts_of("small").values()))
    except FileNotFoundError:
        return "none"


NEW = TEXT.upper()  # as long as the old text: no length tells them apart


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step, left", [(0, TEXT), (1, "none"), (2, "none"), (3, "none")])
def test_a_kill_while_a_set_is_replaced_leaves_the_old_set_or_none(step, left, notes, small):
    def die_before_a_step():
        def watched(act, *args, **options):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            act(*args, **options)

        steps, unlink = itertools.count(), Path.unlink
        os.replace = partial(watched, os.replace)
        Path.unlink = lambda *args, **options: watched(unlink, *args, **options)
        make(NEW, notes)

    child = multiprocessing.get_context("fork").Process(target=die_before_a_step)
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL and small_set() == left
    make(NEW, notes)
    assert small_set() == NEW


@pytest.mark.parametrize("limit", [0, 100, 5_000])
def test_a_full_disk_is_one_sentence_that_leaves_the_old_set_which_can_be_replaced_later(
        limit, notes, small, root):
    with no_file_beyond(limit):
        said = refusal(prepare.main, [notes, "--name=small", "--tokenizer=bytes", "--overwrite"])
    assert f"cannot write {small} (File too large): make room" in said
    assert small_set() == TEXT and [path.name for path in root.iterdir()] == ["small"]
    prepare.main([str(notes), "--name=small", "--overwrite"])
    assert load("small")[0]["tokenizer"] == "bpe2k" and small_set() == TEXT


def test_between_any_two_steps_of_a_run_another_may_make_the_same_set_for_its_readers(notes, monkeypatch):
    replace, fsync = os.replace, os.fsync
    for at in itertools.count():
        steps, inside = itertools.count(), []

        def watched(act, *args, at=at, steps=steps, inside=inside):
            step = None if inside else next(steps)
            if step == at:
                inside.append("the other run")
                make(TEXT, notes)
                inside.clear()
            act(*args)
            assert step is None or step < at or small_set() == TEXT  # once there, it never goes away

        monkeypatch.setattr(os, "replace", partial(watched, replace))
        monkeypatch.setattr(os, "fsync", partial(watched, fsync))
        make(TEXT, notes)
        assert small_set() == TEXT
        if next(steps) <= at:  # the run had no such step
            return
        shutil.rmtree(prepare.DATA / "small")


def test_a_set_may_come_from_standard_input(root, monkeypatch):
    monkeypatch.setattr(prepare.sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert status_of(prepare.main, "- --name=piped --tokenizer=bytes")[0] == 0
    assert "".join(texts_of("piped")["train"] + texts_of("piped")["val"]) == TEXT


def test_standard_input_may_stand_beside_a_folder_of_many_files(tmp_path, root, monkeypatch):
    texts = [f"{i:02} " * 100 for i in range(40)]
    write_files(tmp_path / "corpus", {f"{text[:2]}.txt": text for text in texts})
    monkeypatch.setattr(prepare.sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped " * 50)))
    assert status_of(prepare.main, ["-", tmp_path / "corpus", "--name=both", "--tokenizer=bytes"])[0] == 0
    found = texts_of("both")
    assert sorted(found["train"] + found["val"]) == sorted([*texts, "piped " * 50]) and len(found["val"]) == 2
