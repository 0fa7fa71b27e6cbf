"""Claims about what a run survives. Short, and with --long at their full length; -rP shows the counts."""
import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample
import train
from data import prepare
from experiments.soak import soak
from gated_gpt import GPT, GPTConfig, load_checkpoint

TINY = dict(data="tiny", block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=4, eval_windows=4,
            warmup_steps=2, learning_rate=1e-2, dropout=0.1, attn_share=True, out="run", device="cpu",
            threads=1)


def fit(**fields):
    return train.train(*train.make_configs(TINY | fields), quiet=True)


def forked(work):
    """A child process, a copy of this one, that does work()."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_killed_at_random_moments_ends_as_the_run_that_never_was(here, optimizer, long):
    recipe, dice = dict(eval_every=5, optimizer=optimizer, schedule="constant"), random.Random(0)

    def begun():
        return Path("run/last.pt").exists()

    fit(max_steps=1, out="warm")  # torch imports some of itself late: not in every child
    clock = time.monotonic()
    forked(lambda: fit(**recipe, max_steps=10, out="timed")).join()
    usual = time.monotonic() - clock
    kills = 50 if long else 5
    for _ in range(kills):  # in its first steps, between two, in an evaluation, while it saves
        child = forked(lambda: fit(**recipe, max_steps=10**6, resume=begun()))
        child.join(dice.uniform(0.02, 2 * usual))
        assert child.is_alive()
        child.kill()
        child.join()
    reached = load_checkpoint("run/last.pt")[1]["step"] if begun() else 0
    print(f"killed {kills} times, then at step {reached}")
    assert reached
    end = reached + 7
    fit(**recipe, max_steps=end, resume=begun())
    fit(**recipe, max_steps=end, out="never")
    (a, mine), (b, other) = (load_checkpoint(f"{run}/last.pt") for run in ("run", "never"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    columns = "step", "train_loss", "val_loss", "first_token_share"
    log, undisturbed = ([[row[k] for k in columns] for row in run["log"]] for run in (mine, other))
    assert log == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_within_a_step_and_nothing_is_lost(here, number, long):
    dice = random.Random(int(number))
    for _ in range(50 if long else 3):
        def work():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                fit(max_steps=10**6, eval_every=10**6, overwrite=Path("run").exists())
            except KeyboardInterrupt:
                os._exit(130)

        child = forked(work)
        time.sleep(0.4 + dice.random() / 2)
        before = time.monotonic()
        os.kill(child.pid, number)
        child.join(30)
        assert child.exitcode == 130 and time.monotonic() - before < 2
        model, state = load_checkpoint("run/last.pt")
        assert state["step"] == len(state["losses"]) > 0


def refused_in_a_child(work, argv, before=lambda: None):
    """The one sentence with which a main() ends in a process of its own, where before() has been called."""
    read_end, write_end = os.pipe()

    def child():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write_end, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        sys.argv = argv
        before()
        sample.run_main(work)

    process = forked(child)
    os.close(write_end)
    with open(read_end) as file:
        said = file.read()
    process.join(60)
    assert process.exitcode == 2 and said.count("\n") == 1, said
    return said


def no_file_beyond(size):
    """Whoever calls this can write no larger file, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write that does not fit is an OSError


def all_files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_full_disk_ends_a_run_with_a_sentence_and_what_was_there_is_whole(here, long):
    """However little room there is: what does not fit ends it, be it log.csv or a checkpoint."""
    fit(max_steps=4, eval_every=2)
    before, dice = all_files("run"), random.Random(0)
    largest = max(map(len, before.values()))
    sizes = [0, 1, largest - 1] + [dice.randrange(largest) for _ in range(47 if long else 3)]
    for size in sizes:
        said = refused_in_a_child(train.main, ["train.py", "--resume", "--out=run", "--max_steps=8"],
                                  lambda size=size: no_file_beyond(size))
        assert "cannot save run/" in said and "is untouched" in said
        assert all_files("run") == before
    print(f"{len(sizes)} full disks: each was said to be one, and all files are as they were")
    fit(max_steps=8, eval_every=2, resume=True)


@pytest.mark.parametrize("size", [0, 1, 100, 3000, 9881])
def test_a_full_disk_while_data_is_prepared_leaves_the_old_set(here, size):
    (here / "text.txt").write_text("to be or not to be\n" * 500)
    argv = ["prepare.py", "text.txt", "--root=sets", "--tokenizer=bytes"]
    prepare.main(argv[1:])
    before = all_files("sets")
    said = refused_in_a_child(prepare.main, argv, lambda: no_file_beyond(size))
    assert "cannot write sets/text (File too large): make room there" in said and all_files("sets") == before


@contextlib.contextmanager
def small_disk(folder):
    """A file system of its own, 1 MB of it, where this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_while_training_ends_it_and_the_last_checkpoint_that_fitted_goes_on(here):
    """Every write to this one is real, so is the refusal: 1 MB, on which something else takes ever more."""
    with small_disk(here / "disk"):
        recipe = dict(out="disk/run", eval_every=2)
        fit(**recipe, max_steps=2)
        room = os.statvfs("disk").f_bavail * os.statvfs("disk").f_bsize
        Path("disk/other").write_bytes(bytes(room - 10_000))
        before = all_files("disk/run")
        argv = ["train.py", "--resume", "--out=disk/run", "--max_steps=4"]
        said = refused_in_a_child(train.main, argv)
        assert "cannot save disk/run/" in said and "is untouched" in said and all_files("disk/run") == before
        Path("disk/other").unlink()
        fit(**recipe, max_steps=4, resume=True)
        fit(eval_every=2, max_steps=4, out="never")
        assert all(map(torch.equal, *(load_checkpoint(f"{run}/last.pt")[0].parameters()
                                      for run in ("disk/run", "never"))))


def test_a_folder_that_is_read_only_is_refused_with_a_sentence_and_stays_as_it_was(here):
    with small_disk(here / "disk"):
        fit(out="disk/run", eval_every=2, max_steps=2)
        subprocess.run(["mount", "-o", "remount,ro", here / "disk"], check=True)
        before = all_files("disk")
        model = load_checkpoint("disk/run/last.pt")[0]
        resume, text = ["train.py", "--resume", "--out=disk/run", "--max_steps=4"], here / "text.txt"
        text.write_text("to be or not to be\n" * 500)
        for work, argv in [(train.main, resume), (train.main, ["train.py", "--data=tiny", "--out=disk/new"]),
                           (prepare.main, ["prepare.py", str(text), "--root=disk/data"]),
                           (sample.main, ["sample.py", "--ckpt=disk/run", "--attn_map=disk/map.png"]),
                           (lambda: model.save_pretrained("disk/released"), ["notebook"])]:
            said = refused_in_a_child(work, argv)
            assert "Read-only file system" in said and "disk" in said
        assert all_files("disk") == before


# ------------------------------------------------------------------------------------------------------------
# Damaged files


class Code:
    """Its pickle, when it is loaded without care, makes a file named `ran`."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN = [b"#!/bin/sh\nmkdir ran\n", b"PK\x03\x04", b"[1, 2]", b"\x80\x04N.", pickle.dumps(Code()),
           saved(Code()),
           saved({"model": Code()}), saved({"iter_num": 3}), saved(torch.zeros(3))]


def damage(path, dice):
    """Do to a file what disks, editors and people do; returns what it was."""
    content = path.read_bytes()
    kind = dice.choice(["cut", "flip", "zero", "empty", "folder", "gone", "swap", "grow"])
    if kind in ("folder", "gone", "swap"):
        path.unlink()
    if kind == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "flip":
        changed = bytearray(content)
        for _ in range(dice.choice([1, 1, 1, 5, 100])):
            changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
    elif kind == "zero":  # what a file system leaves of a page that was never written
        start = dice.randrange(len(content))
        path.write_bytes(content[:start] + bytes(min(4096, len(content) - start)) + content[start + 4096 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "swap":
        path.write_bytes(dice.choice(FOREIGN))
    elif kind == "grow":
        path.write_bytes(content + dice.randbytes(dice.choice([1, 1000])))
    return kind


def whole_again(path, content):
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)


def refused_or_unharmed(path, read, unharmed, damages):
    """Damage a file that often: each time read() is refused with one sentence, or gives what is unharmed."""
    content, dice, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(damages):
        kind = damage(path, dice)
        try:
            assert unharmed(read()), kind
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error) and "Traceback" not in str(error)
            refused += 1
        whole_again(path, content)
    print(f"{damages} damages to {path.name}: {refused} refused, {damages - refused} read and unharmed")
    assert refused > damages / 2 and not Path("ran").exists()


def test_a_damaged_checkpoint_is_refused_or_unharmed(here, long):
    fit(max_steps=2, eval_every=2)
    path = Path("run/last.pt")
    model, state = load_checkpoint(path)

    def unharmed(loaded):
        other, more = loaded
        return (all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
                and other.config == model.config and more["losses"] == state["losses"]
                and str(more["optimizers"]) == str(state["optimizers"]))

    refused_or_unharmed(path, lambda: load_checkpoint(path), unharmed, 500 if long else 60)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_damaged_data_is_refused_or_unharmed(here, data_root, tmp_path, name, long):
    shutil.copytree(data_root, tmp_path / "copy")
    before = prepare.load("tiny", root=tmp_path / "copy")

    def unharmed(loaded):
        meta, tokens = loaded
        return meta == before[0] and all((tokens[split] == before[1][split]).all() for split in tokens)

    refused_or_unharmed(tmp_path / "copy/tiny" / name, lambda: prepare.load("tiny", root=tmp_path / "copy"),
                        unharmed, 250 if long else 40)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_in_the_released_layout_is_refused_or_unharmed(here, name, long):
    pytest.importorskip("safetensors")
    model = GPT(GPTConfig(vocab_size=40, n_layer=1, n_head=2, n_embd=16, block_size=8))
    model.save_pretrained("folder")

    def unharmed(other):
        return other.config == model.config and all(
            torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))

    refused_or_unharmed(Path("folder", name), lambda: GPT.from_pretrained("folder"), unharmed,
                        250 if long else 40)


def test_a_damaged_tokenizer_of_ours_is_refused_or_unharmed(here, use_data, long):
    shutil.copy(prepare.DATA / "bpe2k.tiktoken", here)
    use_data(here)

    def read():
        prepare.get_tokenizer.cache_clear()
        return prepare.get_tokenizer("bpe2k").__getstate__()

    whole = read()
    refused_or_unharmed(here / "bpe2k.tiktoken", read, lambda found: found == whole, 250 if long else 40)
    prepare.get_tokenizer.cache_clear()


def test_a_damaged_tokenizer_that_was_downloaded_is_refused_or_unharmed(here, long):
    """Beside it lies what `huggingface-cli download --local-dir` notes of it."""
    trained, file = pytest.importorskip("test_pretrained_text").trained, Path("folder/tokenizer.json")
    note = Path("folder/.cache/huggingface/download/tokenizer.json.metadata")
    note.parent.mkdir(parents=True)
    trained().save(str(file))
    note.write_text(f"commit\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n0.0\n")

    def read():
        prepare.get_tokenizer.cache_clear()
        return prepare.get_tokenizer("./folder").encode("def naïve(x):\n    return 'スパム' + x  # 🙂")

    tokens = read()
    refused_or_unharmed(file, read, lambda found: found == tokens, 250 if long else 40)


ODD = [None, True, 0, -1, 2, 1.5, 1e400, 10**6, 10**30, "", "x", "\ud800", [], [1], {}, {"a": 1}]


def made_odd(node, dice):
    """Another value, or none, somewhere in what a JSON file says."""
    key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
    if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.5:
        made_odd(node[key], dice)
    elif dice.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(dice.choice(ODD))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_json_file_may_say_anything_and_is_refused_or_read(here, name, long):
    """By somebody's hand, that is, where no checksum is there to tell."""
    trained, dice, refused = pytest.importorskip("test_pretrained_text").trained, random.Random(0), 0
    GPT(GPTConfig(vocab_size=800, n_layer=1, n_head=2, n_embd=16, block_size=8)).save_pretrained("folder")
    Path("folder/SHA256SUMS").unlink()
    trained().save("folder/tokenizer.json")
    path, tries = Path("folder", name), 1000 if long else 100
    whole = json.loads(path.read_text())
    for _ in range(tries):
        content = copy.deepcopy(whole)
        for _ in range(dice.choice([1, 1, 3])):
            made_odd(content, dice)
        path.write_text(json.dumps(content))
        prepare.get_tokenizer.cache_clear()
        try:
            GPT.from_pretrained("folder")
            prepare.get_tokenizer("./folder").encode("naïve 東京")
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    print(f"{tries} odd values in {name}: {refused} refused, {tries - refused} read")
    assert refused


# ------------------------------------------------------------------------------------------------------------
# Prompts of every kind


PROMPTS = ["", "\0", "\x1b[2J\x07\r\b", "👩‍👩‍👧‍👦🏳️‍🌈", "ẛ̣ é", "\u202eRTL", "東京" * 300, "\n" * 5000,
           "x" * 1_000_000]


@pytest.mark.parametrize("data", ["tiny", "words"])
def test_any_prompt_is_continued_and_sampling_ends(here, data, capsys):
    fit(data=data, max_steps=2)
    for prompt in PROMPTS:  # most are longer than block_size
        capsys.readouterr()
        sample.main(["--ckpt=run", f"--prompt={prompt}", "--tokens=30", "--samples=2"])
        out = capsys.readouterr().out
        assert out.count(f"--- 1 ---\n{prompt}") == out.count(f"--- 2 ---\n{prompt}") == 1


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_no_half_character_is_ever_printed(tokens):
    """Whatever bytes a model makes: the pieces together are what decoding them all at once gives."""
    pieces = list(sample.stream_text(tokens, prepare.get_tokenizer("bytes")))
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")
    assert all(piece.encode().decode() == piece for piece in pieces)


# ------------------------------------------------------------------------------------------------------------
# Again and again


def test_memory_and_open_files_do_not_grow_from_run_to_run(here):
    """Two hours of it are in experiments/results/soak.csv."""
    recipe = TINY | {"max_steps": 4, "eval_every": 2}
    rows = list(itertools.islice(soak(math.inf, [recipe]), 12))
    assert {row["files"] for row in rows} == {rows[0]["files"]}
    assert {row["threads"] for row in rows} == {rows[0]["threads"]}
    assert rows[-1]["rss_mb"] < rows[3]["rss_mb"] + 20


# ------------------------------------------------------------------------------------------------------------
# Flags that nobody would give, and some that one would

WORDS = st.sampled_from(["", "none", "x", "g1", "..", "-1", "1e3", "nan", "0x10", "ünï", "a b", "\x00"])
WHOLE = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8, 16, 33]) | st.integers(-10, 64)
REAL = st.sampled_from([-1.0, 0.0, 1e-9, 0.02, 0.5, 0.999, 1.0, 10.0, 1e30, math.inf, math.nan])


def flag_of(f):
    """Values of a dataclass field, right ones and wrong ones, as flags."""
    kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))
    if get_origin(f.type) is Literal:
        values = st.sampled_from(get_args(f.type))
    elif kind is bool:
        return st.sampled_from([f"--{f.name}", f"--no-{f.name}", f"--{f.name}=1"])
    else:
        values = {int: WHOLE, float: REAL, str: WORDS}[kind]
    return (values | WORDS).map(lambda value: f"--{f.name}={value}")


CAPPED = {"data", "out", "max_steps", "eval_windows", "resume", "device", "threads", "init_from", "compile"}
FIELDS = [f for c in (GPTConfig, train.TrainConfig) for f in dataclasses.fields(c) if f.name not in CAPPED]
TRAINING = st.lists(st.sampled_from(FIELDS).flatmap(flag_of), max_size=6)
SAMPLING = st.lists(st.one_of(
    st.tuples(st.sampled_from(["tokens", "samples", "top_k", "seed"]), WHOLE | WORDS),
    st.tuples(st.just("temperature"), REAL | WORDS),
    st.tuples(st.just("prompt"), st.text(max_size=40) | WORDS),
    st.tuples(st.sampled_from(["device", "dtype", "ckpt", "text"]), WORDS),
).map("--{0[0]}={0[1]}".format) | st.sampled_from(["--attn_share", "--x", "--attn_share=1"]), max_size=5)
PREPARING = st.lists(
    st.sampled_from(["text.txt"] * 5 + ["missing.txt", ".", "empty.txt", "binary.bin", "nosuch"])
    | st.sampled_from(["--name=mine", "--name=x", "--tokenizer=bytes", "--tokenizer=bpe2k"])
    | st.tuples(st.sampled_from(["name", "tokenizer", "shards"]), WORDS).map("--{0[0]}={0[1]}".format),
    max_size=5)


def outcome(main, argv):
    """0 or 2, how a command line ended; a traceback would be an exception here."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            status = main(argv) or 0
        except SystemExit as end:  # of argparse
            status = end.code
        except (ValueError, OSError, FloatingPointError) as error:  # what run_main makes a sentence of
            status = 2
            print(error, file=said)
    assert status in (0, 2), (status, said.getvalue())
    if status:
        lines = [line for line in said.getvalue().strip().splitlines() if " is left out: " not in line]
        assert lines and "Traceback" not in said.getvalue() and len(lines) <= 3, said.getvalue()
    return status


def tried(strategy, how_many, command):
    """Give `command` that many argument lists, always the same ones."""
    statuses = []

    @settings(max_examples=how_many, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(argv):
        statuses.append(command(argv))

    one()
    print(f"{len(statuses)} flag sets: {statuses.count(0)} ran, {statuses.count(2)} refused with a sentence")
    assert 0 in statuses and 2 in statuses


def test_any_flags_of_train_run_or_are_refused_with_a_sentence(here, long):
    small = ["--preset=sink", "--data=tiny", "--device=cpu", "--threads=1", "--n_embd=16", "--block_size=8",
             "--batch_size=2", "--eval_every=2"]
    capped = ["--max_steps=2", "--eval_windows=2", "--out=run", "--overwrite"]
    tried(TRAINING, 1000 if long else 60, lambda argv: outcome(train.main, small + argv + capped))


def test_any_flags_of_sample_run_or_are_refused_with_a_sentence(here, long):
    fit(max_steps=2, eval_every=2)
    (here / "text.txt").write_text("to be or not to be")
    small = ["--ckpt=run", "--tokens=3"]
    tried(SAMPLING, 500 if long else 60, lambda argv: outcome(sample.main, small + argv))


def test_any_flags_of_prepare_run_or_are_refused_with_a_sentence(here, long):
    (here / "text.txt").write_text("to be or not to be\n" * 500)
    (here / "empty.txt").write_text("")
    (here / "binary.bin").write_bytes(bytes(range(256)) * 10)
    root = [f"--root={here / 'data'}"]
    tried(PREPARING, 500 if long else 60, lambda argv: outcome(prepare.main, argv + root))
