"""Claims about what the three scripts survive: odd flags, odd prompts, full and read-only disks, long use."""
import os
import random
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from conftest import all_files, fit, flags, no_file_beyond, refusal, status_of

import sample
import train
from data import prepare
from gated_gpt import GPTConfig
from plumbing import checkpoint
from plumbing.flags import fields_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # matplotlib
TEXT = "to be or not to be\n" * 500

# ---- disks -------------------------------------------------------------------------------------------

def test_a_disk_that_fills_up_while_training_ends_the_run_with_a_sentence_and_its_files_whole(here):
    fit(eval_every=2, out="run", max_steps=4)
    before, dice = all_files("run"), random.Random(0)
    largest = max(map(len, before.values()))
    for size in (0, 1, largest - 1, *(dice.randrange(largest) for _ in range(3))):
        with no_file_beyond(size):
            said = refusal(train.main, "--resume --out=run --max_steps=8")
        assert "cannot write run/" in said and "what was there is untouched" in said
        assert all_files("run") == before


def test_a_place_where_nothing_can_be_written_is_named(here, use_data):
    fit(out="run", max_steps=2)
    Path("text.txt").write_text(TEXT)
    Path("disk").write_text("a file, where a folder is needed")
    told = [refusal(train.main, flags(out="disk/new")), refusal(prepare.main, "text.txt --name=disk/set"),
            refusal(sample.main, "--ckpt=run --tokens=3 --attn_map=disk/map.png")]
    use_data(here / "disk")
    told.append(refusal(prepare.main, "text.txt"))
    assert all("disk" in said for said in told), told
    assert "cannot write" in told[3] and "Not a directory" in told[0] + told[2], told


PROMPTS = ["", "\0", "\x1b[2J\x07\r\b", "👩‍👩‍👧‍👦🏳️‍🌈", "ẛ̣ é", "\u202eRTL", "東京" * 300, "\n" * 5000,
           "<|bos|>", "x" * 300_000]


@pytest.mark.parametrize("data", ["tiny", "words"])
def test_any_prompt_is_continued(here, data):
    fit(data=data, max_steps=2, out="run")
    for prompt in PROMPTS:  # most are longer than block_size
        _, out, _ = status_of(sample.main, ["--ckpt=run", f"--prompt={prompt}", "--tokens=9", "--no-stop"])
        text = out.split("\n\n", 1)[1]
        assert text.startswith(prompt) and len(text) > len(prompt) + 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_neither_memory_nor_open_files_grow_from_run_to_run(here):
    rows = []
    for _ in range(12):
        fit(out="run", max_steps=2, overwrite=True, attn_share=True)
        fit(out="run", max_steps=4, resume=True)
        model, *_ = checkpoint.open_model("run")
        model.generate(torch.zeros(1, 1, dtype=torch.long), 50)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        rows.append((megabytes, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    assert rows[-1][0] < rows[3][0] + 20 and rows[-1][1:] == rows[3][1:]


# ---- flags that nobody would give, and some that one would -------------------------------------------

WORDS = ["", "none", "x", "g1", "..", "-1", "1e3", "nan", "0x10", "ünï", "a b"]
WHOLE = [-10, -1, 0, 1, 2, 3, 4, 5, 8, 16, 33, 10**30]
REAL = [-1.0, 0.0, 1e-40, 1e-9, 0.02, 0.5, 0.999, 1.0, 10.0, 1e30, "inf", "nan"]
VALUES = {int: WHOLE, float: REAL, str: WORDS}
CAPPED = {"data", "out", "max_steps", "eval_windows", "resume", "overwrite", "device", "threads", "compile"}
FIELDS = [f for c in (GPTConfig, train.TrainConfig) for _, f, _ in fields_of(c) if f.name not in CAPPED]


def flag_of_field(dice):
    """A random flag of train.py, with a value that is right or wrong."""
    f = dice.choice(FIELDS)
    kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))
    if kind is bool:
        return dice.choice([f"--{f.name}", f"--no-{f.name}", f"--{f.name}=1"])
    values = get_args(f.type) if get_origin(f.type) is Literal else VALUES[kind]
    return f"--{f.name}={dice.choice(values if dice.random() < 0.8 else WORDS)}"


def tried(main, always, draw, tries, most, last=()):
    """Give main() so many random lists of flags. Each runs, or is refused with one sentence and status 2."""
    dice, statuses = random.Random(0), []
    for _ in range(tries):
        argv = [*always, *(draw(dice) for _ in range(dice.randrange(most + 1))), *last]
        status, _, err = status_of(main, argv)
        statuses.append(status)
        assert status in (0, 2) and "Traceback" not in err, (argv, err)
        assert status == 0 or 1 <= len(err.strip().splitlines()) <= 3, (argv, err)  # argparse adds its usage
    assert min(statuses.count(0), statuses.count(2)) > tries / 20


def test_any_flags_of_train_run_or_are_refused_with_a_sentence(here):
    tried(train.main, flags(), flag_of_field, 40, 4, ["--max_steps=3", "--out=run", "--overwrite"])


def test_any_flags_of_sample_run_or_are_refused_with_a_sentence(here):
    fit(max_steps=2, out="run")
    Path("text.txt").write_text(TEXT)
    choices = {"tokens": [-1, 0, 1, 9, 40, "x"], "top_k": WHOLE, "seed": WHOLE, "temperature": REAL,
               "prompt": WORDS, "device": WORDS, "dtype": ["bfloat16", *WORDS], "ckpt": WORDS,
               "text": ["text.txt", *WORDS], "attn_map": ["map.png", "map.x", ".", "x/y.png"]}
    pool = [f"--{name}={value}" for name, values in choices.items() for value in values]
    pool += ["--attn_share", "--x"] * 9
    tried(sample.main, ["--ckpt=run", "--tokens=3"], lambda dice: dice.choice(pool), 100, 3)


def test_any_flags_of_prepare_run_or_are_refused_with_a_sentence(here, use_data):
    use_data(here / "sets")
    for name, content in [("text.txt", TEXT.encode()), ("empty.txt", b""), ("binary.bin", bytes(range(256)))]:
        Path(name).write_bytes(content)
    pool = ["text.txt"] * 8 + ["--overwrite"] * 4 + ["missing.txt", "empty.txt", "binary.bin", ".", "--x"]
    pool += ["--name=mine", "--tokenizer=bytes", "--tokenizer=.", "--shards=0", "--shards=x"]
    pool += [f"--{name}={word}" for name in ("name", "tokenizer") for word in WORDS[::3]]
    tried(prepare.main, [], lambda dice: dice.choice(pool), 100, 4)
