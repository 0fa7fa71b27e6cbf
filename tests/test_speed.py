"""Claims about speed.py: turns are fair, verdicts follow rules, and each table is made by its command."""
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal, status_of
from torch.utils.flop_counter import FlopCounterMode

import train
from data import prepare
from experiments import speed
from experiments.compare_gates import VARIANTS
from gated_gpt import GPT, GPTConfig

ONCE = "--rounds=1 --seconds=0 --n_layer=1 --n_embd=32 --block_size=16".split()
TINY = [*ONCE, "--n_head=2", "--batch_size=2", "--data=tiny"]

# In place of a clone of nanoGPT: the same names and the same kinds of results, little else.
MODEL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    batches, lengths = [], []

    def __init__(self, config):
        super().__init__()
        print("counting parameters")
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        self.batches.append((idx, targets))
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def generate(self, idx, max_new_tokens):
        self.lengths.append(tuple(idx.shape))
        return torch.cat((idx, idx[:, :max_new_tokens]), dim=1)
"""
TRAIN = """
import sys
for step, loss in ((0, 4.2), (250, 2.5), (500, 2.1)):
    print(f"step {step}: train loss {loss - 0.1:.4f}, val loss {loss:.4f}")
print("iter 501: loss 1.0000, time 1.00ms, mfu 1.00%")
"""


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setattr(speed, "WARM_UP", 1)


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


def run(*flags):
    """What speed.py prints and writes with these flags."""
    status, printed, err = status_of(speed.main, [*flags, "--results=results"])
    assert status == 0, err
    file = Path("results", f"speed_{flags[0]}{'_compiled' * ('--compile' in flags)}.md")
    written = file.read_text()
    assert printed == f"{written}\n{file}\n"
    assert max(len(line) for line in printed.splitlines() if line.startswith("|")) <= 85
    assert written.startswith(f"# speed: {flags[0]}\n\n- command: `python experiments/speed.py {flags[0]} ")
    assert f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}" in written
    return written


def rows(text):
    """{name: [cells]} of each table in Markdown, as a list."""
    tables = re.findall(r"^\| +\|.+\n\|[ |:-]+\n((?:\|.+\n)+)", text, re.M)
    cells = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
             for table in tables)
    return [{name: rest for name, *rest in table} for table in cells]


# ---- turns and verdicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [1, 3])
def test_candidates_take_turns_after_a_warm_up_that_does_not_count(warm, monkeypatch):
    monkeypatch.setattr(speed, "WARM_UP", warm)
    called = []
    times = speed.alternate({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, 0)
    assert called == ["a"] * warm + ["b"] * warm + ["a", "b"] * 3
    assert [len(mine) for mine in times.values()] == [3, 3]


def test_a_turn_is_as_many_calls_as_fill_its_time_and_a_time_is_that_of_one_call():
    called = []
    times = speed.alternate({"nap": lambda: (called.append(0), time.sleep(0.01))}, 2, 0.1)
    assert 4 <= (len(called) - speed.WARM_UP) / 2 <= 10  # a loaded machine oversleeps
    assert all(10 <= t < 100 for t in times["nap"])


def test_the_clock_waits_for_an_accelerator_before_and_after_a_turn(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: done.append("wait"))
    speed.alternate({"a": lambda: done.append("call")}, 2, 0)
    assert done == ["wait", "call", "wait"] * 3  # one to warm up, and two rounds


def test_a_planted_sleep_is_slower_and_equal_candidates_are_noise():
    """Two by two, since a machine that has slept for long wakes up later: whoever comes next pays for it."""
    for nap, word in ((0.002, "noise"), (0.05, "slower")):
        naps = {"base": lambda: time.sleep(0.002), "other": lambda nap=nap: time.sleep(nap)}
        table, = rows(speed.ratio_table("ms", speed.alternate(naps, 25, 0)))
        assert table["base"][-1] == "base" and table["other"][-1] == word
    assert 2 < float(table["other"][2]) <= 25


@pytest.mark.parametrize("x, text", [
    (0.01234, "0.01234"), (0.5, "0.5000"), (1, "1.000"), (999.4, "999.4"), (999.6, "1,000"),
    (99_999, "99,999"), (99_999.9, "100.0k"), (999_900, "999.9k"), (999_960, "1.000M"), (1.5e9, "1500.M"),
    (math.inf, "inf")])
def test_numbers_are_short(x, text):
    assert speed.number(x) == text and len(text) <= 7


@pytest.mark.parametrize("unit, ratios, word", [
    ("ms", [1.1, 1.2], "slower"), ("ms", [0.9, 0.8], "faster"), ("tokens/s", [1.1, 1.2], "faster"),
    ("tokens/s", [0.9, 0.8], "slower"), ("ms", [1.5, 0.99, 1.6], "noise"),
    ("ms", [2.0], "noise"), ("s", [math.inf, math.inf], "slower")])
def test_a_difference_is_noise_unless_all_rounds_agree_on_its_side(unit, ratios, word):
    assert speed.verdict(ratios, unit) == word


def test_ratios_are_formed_within_a_round():
    # The machine slows down fivefold on the way, and b takes a tenth more all the time.
    values = {"a": [1.0, 2.0, 5.0], "b": [1.1, 2.2, 5.5], "c": [0.55, 1.1, 2.75]}
    table, = rows(speed.ratio_table("ms", values, {"a": "a", "b": "a", "c": "b"}))
    assert table["b"] == ["2.200", "1.100-5.500", "1.100", "1.100-1.100", "slower"]
    assert table["c"] == ["1.100", "0.5500-2.750", "0.5000", "0.5000-0.5000", "faster"]


# ---- the tables ------------------------------------------------------------------------------------


def test_training_is_timed_with_and_without_the_gate_and_nanogpt_beside_it(here, clone):
    text = run("train", *TINY, f"--nanogpt={clone}")
    table, = rows(text)
    assert list(table) == ["nanoGPT", "none adamw", "g1 adamw", "none muon", "g1 muon"]
    assert table["nanoGPT"][-1] == "base" and f"nanoGPT {257 * 257:,}" in text and "MFU" not in text
    model = sys.modules["nanogpt_model"].GPT
    tokens = prepare.load("tiny")[1]["train"].tolist()
    windows = {tuple(tokens[i : i + 17]) for i in range(len(tokens) - 16)}
    assert len(model.batches) == speed.WARM_UP + 1
    for idx, targets in model.batches:  # two windows each, the targets one token on
        assert all((x[0], *y) in windows and x[1:] == y[:-1] for x, y in zip(idx.tolist(), targets.tolist()))
        assert idx.shape == targets.shape == (2, 16)


def test_each_training_step_has_a_batch_of_its_own(here):
    run = speed.open_run(dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, data="tiny"))
    before, step, seen = run.model.embed.weight.clone(), speed.step_of(run), []
    run.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    step()
    step()
    for i in range(2):
        (idx, _), = run.windows.of_step(i, run.c)
        assert torch.equal(seen[i], idx)
    assert not torch.equal(*seen) and not torch.equal(before, run.model.embed.weight)


def test_mfu_is_the_part_of_a_known_gpus_peak_that_training_uses(here, monkeypatch):
    one = speed.open_run(dict(n_layer=2, n_embd=64, block_size=32, batch_size=2, data="tiny"))
    with FlopCounterMode(display=False) as counter:  # of products with weights
        speed.step_of(one)()
    counted = counter.get_total_flops() / (2 * 32) + 12 * 2 * 64 * 32  # of a token; attention: 12 L nh hs T
    monkeypatch.setattr(speed, "chip", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(speed, "PEAK_TFLOPS", {"L40": 5, "L4": 1})
    told = speed.utilization({"g1": [1e5, 1e6, 9e9]}, {"g1": one})
    assert "of a peak of 5 TFLOP/s" in told
    assert float(re.search(r"g1 ([\d.]+)%", told)[1]) == pytest.approx(100 * 1e6 * counted / 5e12, rel=0.02)
    assert "\nMFU, of a peak of 5 TFLOP/s in bfloat16: none adamw 0.0%, g1 adamw " in run("train", *TINY)


def test_avx2_starts_the_command_again_and_says_so_in_the_file(here, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *command: started.append(command) or sys.exit(0))
    argv = ["train", *TINY, "--avx2", "--results=results"]
    assert status_of(speed.main, argv)[0] == 0
    (program, command, environment), = started
    assert program == command[0] == sys.executable and command[2:] == argv
    for name, value in {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}.items():
        assert environment[name] == value
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # as if started so
    assert status_of(speed.main, argv)[0] == 0 and len(started) == 1
    written = Path("results/speed_train_avx2.md").read_text()
    assert "\n- CPU: kept to AVX2, does not multiply bfloat16\n" in written
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "torch uses DEFAULT here: --avx2 needs" in refusal(speed.main, argv)


def test_every_variant_has_a_forward_a_step_and_a_decoding_time(here):
    text = run("gate", *TINY, "--n_head=4", "--n_kv_head=2")
    for title, table in zip(("Forward", "Training step", "Decoding 15 tokens"), rows(text), strict=True):
        assert f"\n{title}" in text and list(table) == list(VARIANTS)
        assert {name for name, cells in table.items() if cells[-1] == "base"} == {"none", "moe"}


def test_more_models_than_dynamo_keeps_by_default_are_all_compiled(here, monkeypatch):
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=backend))
    assert ", compiled: " in run("gate", *TINY, "--variants=none,g1,g2,g3,g5", "--compile")
    assert len(graphs) == 2 * 5 > torch._dynamo.config.recompile_limit  # training and evaluation, none twice


def test_a_model_that_cannot_be_compiled_is_not_passed_off_as_compiled(here, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: 1 / 0)
    message = refusal(speed.main, ["train", *TINY, "--compile"])
    assert re.search("gate none cannot be compiled here.*ZeroDivisionError.*--no-compile", message)


def test_sampling_is_timed_for_one_text_and_for_many_and_so_is_the_start(tmp_path, clone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run("sample", *ONCE, "--n_head=2", "--tokens=12", "--positions=3", f"--nanogpt={clone}")
    table, start = rows(text)
    assert list(table) == ["nanoGPT x 1", "ours x 1", "nanoGPT x 16", "ours x 16"]
    assert [cells[-1] == "base" for cells in table.values()] == [True, False, True, False]
    assert list(start) == ["import torch", "sample.py"]
    assert float(start["sample.py"][0].replace(",", "")) > 100  # ms: it did import torch
    # In warm-up and in one round, contexts in the middles of the three thirds of 1 to 12 tokens.
    lengths = [(batch, t) for batch in (1, 16) for _ in "wr" for t in (3, 7, 11)]
    assert sys.modules["nanogpt_model"].GPT.lengths == lengths


# ---- time to a loss --------------------------------------------------------------------------------


def script(folder, *lines):
    """A Python file that prints these lines, and takes a moment after each."""
    file = Path(folder, "script.py")
    file.write_text("import sys, time\n" + "".join(f"print({line!r}); time.sleep(0.2)\n" for line in lines))
    return file


def test_the_clock_is_read_when_the_loss_is_printed(tmp_path):
    file = script(tmp_path, "step 0: train loss 4.0, val loss 4.1", "iter 1: loss 1.0",
                  "step 5: train loss 1.9, val loss 2.0", "step 9: train loss 1.9, val loss 2.2")
    reached, took, last = speed.watch([str(file)], tmp_path, speed.LOSSES["nanoGPT"], 2.0)
    assert 0.4 <= reached <= took - 0.4 and last == 2.2  # after two naps, and before two more
    reached, took, last = speed.watch([str(file)], tmp_path, speed.LOSSES["nanoGPT"], 1.9)
    assert reached == math.inf and took >= 0.8 and last == 2.2


def test_a_command_that_fails_ends_the_table_with_its_last_words(tmp_path):
    file = script(tmp_path, "step 0: train loss 4.0, val loss 4.1")
    file.write_text(file.read_text() + "sys.exit('no such luck')")
    with pytest.raises(ValueError, match="script.py.*ended with status 1: no such luck"):
        speed.watch([str(file)], tmp_path, speed.LOSSES["nanoGPT"], 2.0)


def test_the_loss_counted_nanogpts_way_leaves_out_each_windows_first_token():
    torch.manual_seed(0)
    model, val = GPT(GPTConfig(vocab_size=20, n_layer=1, n_head=2, n_embd=16, block_size=6)), np.arange(19)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # so that tokens differ in how likely they are
        losses = []
        for start in np.linspace(0, 13, 256).astype(int):
            window = [19, *val[start : start + 6].tolist()]
            for t in range(1, 6):
                logits = model(torch.tensor([window[: t + 1]]))[0][0, -1]
                losses.append(-logits.log_softmax(-1)[window[t + 1]].item())
    assert speed.later_loss(model, {"bos": 19}, {"val": val}) == pytest.approx(np.mean(losses), rel=1e-4)


def test_two_trainings_race_to_a_loss(tmp_path, clone, data_root, use_data, monkeypatch):
    shutil.copytree(data_root / "tiny", tmp_path / "shakespeare")
    monkeypatch.chdir(tmp_path)
    use_data(tmp_path)
    recipe = ("--data=shakespeare --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 "
              "--eval_windows=8 --learning_rate=3e-2 --warmup_steps=0 --max_steps=30 --eval_every=10 "
              "--no-attn_share")
    text = run("to_loss", f"--nanogpt={clone}", f"--recipe={recipe}", "--target=4.5", "--seeds=1")
    until, whole = rows(text)
    assert until["nanoGPT"][-1] == whole["nanoGPT"][-1] == "base"
    assert 0 < float(until["nanoGPT"][0]) <= float(whole["nanoGPT"][0])
    assert 0 < float(until["ours"][0]) < float(whole["ours"][0])  # there before its sample is printed
    assert "\n- nanoGPT: 2.1000\n" in text
    ours, its_way = (float(re.search(rf"\n- {name}: ([\d.]+)\n", text)[1])
                     for name in ("ours", "ours, from token 2 on"))
    assert 0 < its_way < ours < 4.5
    assert recipe in text and speed.THEIRS in text


@pytest.mark.parametrize("flags, message", [
    ("train --rounds=0", "rounds=0 must be at least 1"),
    ("sample --seconds=nan", "seconds=nan must be at least 0"),
    ("gate --data=tiny --variants=g1,g9", "variants=g1,g9: 'g9' is none of none, kv-heads"),
    ("train --data=tiny --nanogpt=nowhere", "nanogpt=nowhere holds no model.py of nanoGPT"),
    ("train --data=nothing", "there is no data set nothing"),
    ("to_loss", "there is no data set shakespeare"),
    ("to_loss --nanogpt=nowhere", "nanogpt=nowhere has no train.py: name a clone of nanoGPT in which")])
def test_mistakes_are_told_in_one_sentence(here, flags, message, monkeypatch):
    if "--nanogpt" in flags:
        monkeypatch.setattr(prepare, "load", lambda name, load=prepare.load: load("tiny"))
    assert message in refusal(speed.main, flags)


def test_the_sizes_beside_nanogpt_are_those_of_its_command_for_a_cpu():
    config, c = train.make_configs(speed.TABLES["train"].sizes)
    said = dict(flag.removeprefix("--").split("=") for flag in speed.THEIRS.split()[1:])
    for name in ("block_size", "batch_size", "n_layer", "n_head", "n_embd", "dropout"):
        assert float(said[name]) == getattr(config, name, None) or float(said[name]) == getattr(c, name, None)
