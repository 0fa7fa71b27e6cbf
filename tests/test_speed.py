"""Claims about speed.py: turns are fair, verdicts follow rules, and each table is made by its command."""
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import refusal, status_of

import train
from data import prepare
from experiments import speed

TINY = "--rounds=1 --n_layer=1 --n_embd=32 --n_head=2 --block_size=16".split()

# In place of a clone of nanoGPT: the same names and the same kinds of results, little else.
MODEL = """
import torch
from types import SimpleNamespace as GPTConfig

class GPT(torch.nn.Module):
    batches, lengths = [], []

    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        self.batches.append(idx.tolist())
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def generate(self, idx, max_new_tokens):
        self.lengths.append(tuple(idx.shape))
        return torch.cat((idx, idx[:, :max_new_tokens]), dim=1)
"""
TRAIN = """
for step, loss in ((0, 4.2), (250, 2.5), (500, 2.1)):
    print(f"step {step}: train loss {loss - 0.1:.4f}, val loss {loss:.4f}")
print("iter 501: loss 1.0000, time 1.00ms, mfu 1.00%")
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(speed, "WARM_UP", 1)
    monkeypatch.setattr(speed, "SECONDS", 0)


@pytest.fixture
def clone(tmp_path):
    """A folder that stands for the user's clone of nanoGPT, with its data prepared."""
    folder = tmp_path / "nanoGPT"
    (folder / "data/shakespeare_char").mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    (folder / "train.py").write_text(TRAIN)
    for name in ("train.bin", "meta.pkl"):
        (folder / "data/shakespeare_char" / name).touch()
    return folder


def run(*flags, kind=""):
    """What speed.py prints and writes with these flags."""
    status, printed, err = status_of(speed.main, [*flags, "--results=results"])
    assert status == 0, err
    file = Path("results", f"speed_{flags[0]}{kind}.md")
    written = file.read_text()
    assert printed == f"{written}\n{file}\n"
    assert written.startswith(f"# speed: {flags[0]}\n\n- command: `python experiments/speed.py {flags[0]} ")
    assert f"threads each: {torch.get_num_threads()}, torch {torch.__version__}" in written
    return written


def rows(text):
    """{name: [cells]} of each table in Markdown, as a list."""
    tables = re.findall(r"^\| +\|.+\n\|[ |:-]+\n((?:\|.+\n)+)", text, re.M)
    cells = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
             for table in tables)
    return [{name: rest for name, *rest in table} for table in cells]


# ---- turns and verdicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [1, 3])
def test_candidates_take_turns_after_a_warm_up_and_the_clock_waits_for_an_accelerator(warm, monkeypatch):
    monkeypatch.setattr(speed, "WARM_UP", warm)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: done.append("wait"))
    done = []
    times = speed.alternate({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, 3)
    a, b = ["wait", "a", "wait"], ["wait", "b", "wait"]
    assert done == warm * a + warm * b + 3 * (a + b)
    assert [len(mine) for mine in times.values()] == [3, 3]


def test_a_turn_is_as_many_calls_as_fill_its_time_and_a_time_is_that_of_one_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed, "SECONDS", 0.095)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[-1])
    times = speed.alternate({"nap": lambda: clock.append(clock[-1] + 0.01)}, 2)
    assert len(clock) == 1 + 1 + 2 * 10 and times == {"nap": pytest.approx([10.0, 10.0])}


@pytest.mark.parametrize("unit, ratios, word", [
    ("s", [1.1, 1.2], "slower"), ("s", [0.9, 0.8], "faster"), ("tokens/s", [1.1, 1.2], "faster"),
    ("tokens/s", [0.9, 0.8], "slower"), ("s", [1.5, 0.99, 1.6], "noise"), ("s", [2.0], "noise"),
    ("s", [math.inf, math.inf], "slower")])
def test_a_difference_is_noise_unless_all_rounds_agree_on_its_side(unit, ratios, word):
    table, = rows(speed.ratio_table(unit, {"a": [1.0] * len(ratios), "b": ratios}))
    assert table["a"][-1] == "base" and table["b"][-1] == word


def test_ratios_are_formed_within_a_round_and_numbers_are_short():
    # The machine slows down fivefold on the way, and b takes a tenth more all the time.
    values = {"a": [1.0, 2.0, 5.0], "b": [1.1, 2.2, 5.5], "c": [999.4, 999.6, 12345]}
    table, = rows(speed.ratio_table("s", values))
    assert table["b"] == ["2.200", "1.100-5.500", "1.100", "1.100-1.100", "slower"]
    assert table["c"][:2] == ["1,000", "999.4-12,345"]


# ---- the tables ------------------------------------------------------------------------------------


def test_training_is_timed_with_and_without_the_gate_and_nanogpt_beside_it(here, clone):
    text = run("train", *TINY, "--batch_size=2", "--data=tiny", f"--nanogpt={clone}")
    table, = rows(text)
    assert list(table) == ["nanoGPT", "none adamw", "g1 adamw", "none muon", "g1 muon"]
    assert table["nanoGPT"][-1] == "base" and f"nanoGPT {257 * 257:,}" in text
    _, c = train.make_configs(dict(data="tiny", batch_size=2))
    windows = train.Windows(prepare.load("tiny")[1]["train"], 256, 16, torch.device("cpu"))
    batches = sys.modules["nanogpt_model"].GPT.batches  # of a warm-up and a round: of the first two steps
    assert batches == [windows.of_step(i, c)[0][0].tolist() for i in (0, 1)] and batches[0] != batches[1]


def test_compiled_tables_and_those_of_a_cpu_with_avx2_have_their_own_files(here, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    text = run("train", *TINY, "--batch_size=2", "--data=tiny", "--compile", kind="_avx2_compiled")
    assert "\n- CPU: AVX2, does not multiply bfloat16\n" in text and "\n- torch.float32, compiled: " in text
    monkeypatch.setattr(torch, "compile", lambda model: 1 / 0)
    message = refusal(speed.main, ["train", *TINY, "--data=tiny", "--compile"])
    assert re.search("none adamw: compile  off .*ZeroDivisionError.*--no-compile", message)


def test_sampling_is_timed_for_one_text_and_for_many(here, clone, monkeypatch):
    monkeypatch.setattr(speed, "TOKENS", 12)
    first, second = rows(run("sample", *TINY, f"--nanogpt={clone}"))
    assert list(first) == ["nanoGPT x 1", "ours x 1"] and list(second) == ["nanoGPT x 16", "ours x 16"]
    assert first["nanoGPT x 1"][-1] == second["nanoGPT x 16"][-1] == "base"
    # In warm-up and in one round, contexts in the middles of the five fifths of 1 to 12 tokens.
    lengths = [(batch, t) for batch in (1, 16) for _ in "wr" for t in (2, 4, 7, 9, 11)]
    assert sys.modules["nanogpt_model"].GPT.lengths == lengths


# ---- time to a loss --------------------------------------------------------------------------------


def test_the_clock_is_read_when_the_loss_is_printed(tmp_path, monkeypatch):
    lines = ("step 0: train loss 4.0, val loss 4.1", "iter 1: loss 1.0",
             "step 5: train loss 1.9, val loss 2.0",
             "    20   3.0000   2.2000    1.5000 ")  # the last one is ours
    file = tmp_path / "script.py"
    file.write_text("import sys, time\n" + "".join(f"print({line!r}); time.sleep(0.2)\n" for line in lines))
    for target in (2.0, 1.9):
        monkeypatch.setattr(speed, "TARGET", target)
        reached, took, last = speed.watch([str(file)], tmp_path)
        assert last == 2.2 and took >= 0.8  # reached: after two naps, and before two more
        assert 0.4 <= reached <= took - 0.4 if target == 2.0 else reached == math.inf
    file.write_text(file.read_text() + "sys.exit('no such luck')")
    with pytest.raises(ValueError, match="script.py.*ended with status 1: no such luck"):
        speed.watch([str(file)], tmp_path)


def test_two_trainings_race_to_a_loss(tmp_path, clone, data_root, use_data, monkeypatch):
    shutil.copytree(data_root / "tiny", tmp_path / "shakespeare")
    monkeypatch.chdir(tmp_path)
    use_data(tmp_path)
    recipe = ("--data=shakespeare --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 "
              "--eval_windows=8 --learning_rate=3e-2 --warmup_steps=0 --max_steps=30 --eval_every=10 "
              "--schedule=cosine --no-attn_share")
    monkeypatch.setattr(speed, "RUNS", {"nanoGPT": speed.RUNS["nanoGPT"], "ours": recipe})
    monkeypatch.setattr(speed, "TARGET", 4.5)
    text = run("to_loss", f"--nanogpt={clone}", "--rounds=1")
    until, = rows(text)
    assert until["nanoGPT"][-1] == "base" and 0 < float(until["nanoGPT"][0]) and 0 < float(until["ours"][0])
    assert "\n- nanoGPT: 2.1000: `python train.py config/" in text
    assert 0 < float(re.search(rf"\n- ours: ([\d.]+): `python train.py {recipe}`", text)[1]) < 4.5


def test_our_recipes_lean_on_no_preset_and_the_sizes_are_those_of_nanogpts_command_for_a_cpu():
    for recipe in list(speed.RUNS.values())[1:]:
        assert train.PRESETS["laptop"].keys() <= train.parse_flags(recipe.split()).keys()
    config, c = train.make_configs(speed.TABLES["train"][2])
    said = dict(flag.removeprefix("--").split("=") for flag in speed.RUNS["nanoGPT"].split()[1:])
    for name in ("block_size", "batch_size", "n_layer", "n_head", "n_embd", "dropout"):
        assert float(said[name]) == getattr(config, name, None) or float(said[name]) == getattr(c, name, None)


@pytest.mark.parametrize("flags, message", [
    ("train --rounds=0", "--rounds: 0 must be a whole number, at least 1"),
    ("train --gate=g1", "--gate does nothing for speed.py train: leave it out"),
    ("to_loss --n_layer=3", "--n_layer does nothing for speed.py to_loss"),
    ("sample --learning_rate=1", "--learning_rate does nothing for speed.py sample"),
    ("train --lr=1", "did you mean --learning_rate?"),
    ("train --data=tiny --nanogpt=nowhere", "nanogpt=nowhere holds no model.py of nanoGPT"),
    ("train --data=nothing", "there is no data set nothing"),
    ("to_loss", "there is no data set shakespeare"),
    ("to_loss --nanogpt=nowhere", "nanogpt=nowhere is no clone of nanoGPT in which its data/shakes")])
def test_mistakes_are_told_in_one_sentence(here, flags, message, monkeypatch):
    if "--nanogpt" in flags:
        monkeypatch.setattr(prepare, "load", lambda name, load=prepare.load: load("tiny"))
    assert message in refusal(speed.main, flags)
