"""Claims about train.py: what a run depends on, how it stops and goes on, and what it says is wrong."""
import contextlib
import csv
import dataclasses
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, all_files, configs, fit, flags, quiet, refusal, status_of, watching
from test_model import VARIANTS, every_variant
from torch.nn.utils import parameters_to_vector

import train
from data import prepare
from data.tokenizers import get_tokenizer
from gated_gpt import GPT, measure, uniform_share
from plumbing import checkpoint
from plumbing.flags import command

pytestmark = pytest.mark.usefixtures("here")

# Everything that has a state of its own: dropout, accumulation, a schedule, decay, a clip, measurements.
WHOLE = dict(out="run", max_steps=8, dropout=0.3, grad_accum=2, weight_decay=0.1, grad_clip=0.5,
             attn_share=True)
TIMES = "tokens_per_second", "seconds"  # in a row of the log; they differ from run to run


def seen(**fields):
    """What the model of a tiny run is given: {"train", "val"}, a list of (idx, targets) each."""
    given = {"train": [], "val": []}
    with watching(lambda model, inputs, output: given["train" if model.training else "val"].append(inputs)):
        fit(**fields)
    return given


press_ctrl_c = partial(signal.raise_signal, signal.SIGINT)


def at_forward(number, act, training=True):
    """Call act() in the forward of that number, of training or else of evaluation."""
    count = itertools.count(1)
    return watching(lambda model, inputs, output:
                    act() if model.training == training and next(count) == number else None)


def interrupt(forward, training=True, **fields):
    """A tiny run that gets a Ctrl-C in a forward, and stops; what it says."""
    with at_forward(forward, press_ctrl_c, training), pytest.raises(KeyboardInterrupt) as stopped:
        fit(**fields)
    return str(stopped.value)


def content_of(path="run/last.pt"):
    return checkpoint.load(path)[1]


def weights(path="run/last.pt"):
    return content_of(path)["model"]


def rows_of(log):
    """{step: its row of a log, without times}"""
    return {row["step"]: {name: value for name, value in row.items() if name not in TIMES} for row in log}


# Bit for bit, however deep it lies; nan is nan.
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def assert_same_end(a, b):
    """Two runs are at the same step with the same weights and the same states of their optimizers."""
    a, b = content_of(f"{a}/last.pt"), content_of(f"{b}/last.pt")
    assert all(a[name] == b[name] for name in ("step", "config", "data", "tokenizer"))
    assert_same(a["model"], b["model"])
    assert_same(a["optimizers"], b["optimizers"])


# ---- stopping and going on -------------------------------------------------------------------------

STOPS = {  # forwards that Ctrl-C comes in, of training (2 a step) or else of evaluation; the rows at the end
    "in the first step": ([(1, True)], [1, 3, 6, 8]),
    "between two evaluations": ([(9, True)], [3, 5, 6, 8]),
    "in the step before an evaluation": ([(6, True)], [3, 6, 8]),
    "in an evaluation": ([(1, False)], [3, 6, 8]),
    "twice between two evaluations": ([(7, True), (2, True)], [3, 4, 5, 6, 8]),
}


def assert_never_stopped(steps, **fields):
    """The run in run/ was stopped and resumed. It has rows at these steps, and is as if it never stopped."""
    never = rows_of(fit(**fields | dict(out="never")))
    assert_same_end("run", "never")
    log = content_of()["log"]
    rows = rows_of(log)
    assert list(rows) == steps and list(never) == [3, 6, 8]
    for step, row in never.items():  # train_loss is a mean over the steps since the row before
        assert_same(rows[step] | {"train_loss": 0}, row | {"train_loss": 0})
    seconds = [row["seconds"] for row in log]
    assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize("stops, steps", STOPS.values(), ids=STOPS)
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_stopped(stops, steps):
    whole = WHOLE | dict(optimizer="muon")  # with AdamW for the rest
    for i, (forward, training) in enumerate(stops):
        said = interrupt(forward, training, **whole, resume=i > 0)
        assert said.endswith(f"saved; to go on: {command('train.py', '--resume', '--out=run')}")
        torch.manual_seed(12345)  # another process would start with other random numbers
        torch.rand(7)
    fit(**whole, resume=True)
    assert_never_stopped(steps, **whole)


def test_a_new_optimizer_needs_a_branch_in_make_optimizers_and_nothing_else(monkeypatch):
    def make_optimizers(model, c):
        return [torch.optim.RMSprop(model.parameters(), lr=c.learning_rate, momentum=0.9, centered=True)]

    monkeypatch.setattr(train, "make_optimizers", make_optimizers)
    interrupt(9, **WHOLE)
    fit(**WHOLE, resume=True)
    assert_never_stopped([3, 5, 6, 8], **WHOLE)
    assert "grad_avg" in content_of()["optimizers"][0]["state"][0]


def test_a_stop_in_the_last_step_comes_too_late():
    for forward, training, log in ((16, True, []), (9, False, [])):  # 2 forwards a step, 3 an evaluation
        with at_forward(forward, press_ctrl_c, training), contextlib.suppress(KeyboardInterrupt):
            log = fit(**WHOLE, overwrite=True)
        assert [row["step"] for row in log] == [3, 6, 8]


def test_the_command_line_resumes_the_newest_run_with_its_flags():
    fields = WHOLE | dict(optimizer="muon", seed=3, gate="g2", beta2=0.9)
    interrupt(5, **fields | dict(out="out/other"))
    interrupt(5, **fields | dict(out="out/run"))
    for number, name in enumerate(("run/best", "other/best", "other/last", "run/last")):
        os.utime(f"out/{name}.pt", (number, number))
    assert status_of(train.main, "--resume")[0] == 0
    os.rename("out/run", "run")
    assert_never_stopped([3, 6, 8], **fields)
    assert content_of("out/other/last.pt")["step"] == 3


def test_resuming_with_a_flag_that_would_make_another_run_is_refused():
    fit(out="run")
    for words in ("--gate=none", "--learning_rate=0.1", "--seed=1", "--data=words", "--overwrite",
                  "--preset=sink", "--no-qk_norm", "--init_from=run", "--eval_windows=9"):
        said = refusal(train.main, f"--resume --out=run --max_steps=9 {words}")
        assert words.split("=")[0].replace("--no-", "--") in said and "max_steps" not in said
        assert "start a new run with --init_from" in said
    assert "run/last.pt is at step 6 already" in refusal(train.main, "--resume --out=run --eval_every=2")
    assert content_of()["step"] == 6


def test_resuming_another_model_or_with_other_data_or_without_an_optimizer_is_refused():
    fit(out="run")
    whole = content_of()
    for fields, changed in (dict(n_layer=2), {}), ({}, {"optimizers": []}), ({}, {"data": 64 * "0"}):
        checkpoint.save("run/last.pt", whole | changed)  # no optimizer: as finished experiments are kept
        with pytest.raises(ValueError, match="^run/last.pt was trained with another model, or on other data"):
            fit(**fields, out="run", resume=True, max_steps=9)
    for fields in (dict(), dict(out="run", overwrite=True)):
        with pytest.raises(ValueError, match="^resume with out=.*: name it, and keep it$"):
            train.TrainConfig(resume=True, **fields)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
def test_a_plain_kill_saves_and_names_a_command_that_goes_on(shell):
    words = [sys.executable, ROOT / "train.py", *flags(max_steps=10**5, eval_every=20, out="my run")]
    with subprocess.Popen(words, stdout=-1, stderr=-1, encoding="utf-8", env=shell) as process:
        any(re.match(r" +\d+0 ", text) for text in process.stdout)  # reads until the first row of the log
        process.terminate()
        _, err = process.communicate(timeout=120)
    step = content_of("my run/last.pt")["step"]
    assert process.returncode == 130 and "Traceback" not in err, err
    assert f"stopped at step {step} and saved" in err and step >= 20
    goes_on = shlex.split(re.search(r"python \S*train\.py (.*)", err)[1])
    status, out, _ = status_of(train.main, [*goes_on, f"--max_steps={step + 2}"])
    assert status == 0 and "my run, resumed" in out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_that_is_killed_at_random_moments_and_resumed_is_the_undisturbed_run():
    fields = WHOLE | dict(optimizer="muon", schedule="constant", eval_every=5, max_steps=60)
    dice, last, kills = random.Random(0), Path("run/last.pt"), 0
    fit(**fields | dict(out="never"))
    while not last.exists() or content_of()["step"] < 60:
        child = multiprocessing.get_context("fork").Process(
            target=lambda: fit(**fields | dict(resume=last.exists(), overwrite=not last.exists())))
        child.start()
        child.join(dice.uniform(0, 0.1 * (kills + 1)))  # in a step, in an evaluation, while it saves
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
    assert kills > 2
    assert_same_end("run", "never")
    assert_same(*(rows_of(content_of(f"{run}/last.pt")["log"]) for run in ("run", "never")))


# ---- what a run depends on, and what not -----------------------------------------------------------

def test_flipping_the_gate_leaves_the_random_numbers_of_dropout_as_they_were():
    nothing = dict(gate_op="add", gate_act="identity", gate_input=False)  # it adds a constant, 0 at first
    frozen = dict(learning_rate=0.0, dropout=0.2, grad_accum=2)
    without = fit(**frozen, gate="none", out="none")
    for gate in ("g1", "g2", "g5"):
        gated = fit(**frozen, gate=gate, out=gate, **nothing)
        assert_same(*([(row["train_loss"], row["val_loss"]) for row in log] for log in (without, gated)))


def test_the_windows_of_a_step_depend_on_the_seed_and_the_step_only_and_not_on_the_gate():
    base, other = seen(gate="none"), seen(seed=1)
    drawn = [tuple(targets.flatten().tolist()) for _, targets in base["train"] + other["train"]]
    assert len(set(drawn)) == len(drawn) == 12
    assert_same(base["val"], other["val"])
    for change in (*[*VARIANTS.values()][1::4], dict(optimizer="muon"), dict(n_layer=2), dict(dropout=0.5)):
        assert_same(seen(**change), base)
    for change in (dict(eval_every=1), dict(max_steps=9), dict(eval_windows=20), dict(attn_share=True)):
        assert_same(seen(**change)["train"][:6], base["train"])


def test_evaluating_and_measuring_do_not_change_the_training():
    settings = dict(eval_every=1), dict(eval_every=1000), dict(eval_every=2, attn_share=True, eval_windows=64)
    for i, setting in enumerate(settings):
        fit(**WHOLE | dict(attn_share=False, optimizer="muon", out=f"run{i}") | setting)
    assert_same_end("run0", "run1")
    assert_same_end("run0", "run2")


# ---- windows, learning rate and optimizers ---------------------------------------------------------

def windows(n, T):
    return train.Windows(np.arange(n, dtype=np.uint16), 999, T, torch.device("cpu"))


def test_a_window_starts_with_bos_and_its_targets_are_the_next_tokens_from_the_first_to_the_last():
    idx, targets = windows(20, 5).at(np.array([0, 3, 15]))
    assert idx.tolist() == [[999, 0, 1, 2, 3], [999, 3, 4, 5, 6], [999, 15, 16, 17, 18]]
    assert targets.tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [15, 16, 17, 18, 19]]
    assert idx.dtype == targets.dtype == torch.int64
    ((_, targets),) = windows(20, 5).of_step(0, train.TrainConfig(batch_size=2000))
    assert set(targets[:, 0].tolist()) == set(range(16)) and targets.max() == 19
    assert windows(20, 5).spaced(4).tolist() == [0, 5, 10, 15]
    assert windows(5, 5).spaced(3).tolist() == [0, 0, 0]


def gradient(config, c, batches):
    """The gradient that train_step takes its step with, all parameters in one vector."""
    torch.manual_seed(0)
    model = GPT(config)
    before = parameters_to_vector(model.parameters()).detach()
    train.train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], batches, 0.5, c,
                     contextlib.nullcontext())
    return (before - parameters_to_vector(model.parameters()).detach()) / 0.5


@pytest.mark.parametrize("batch_size, grad_accum, ranks, n_expert", [
    (4, 1, 1, 0), (4, 3, 1, 0), (4, 1, 2, 0), (4, 2, 2, 0), (3, 4, 4, 0), (2, 3, 2, 0), (4, 3, 1, 4)])
def test_a_step_is_one_gradient_of_all_its_windows_however_they_are_divided_but_not_for_experts(
        batch_size, grad_accum, ranks, n_expert):
    """The balance of experts is taken over one forward. The paper takes it over the whole step."""
    config, c = configs(batch_size=batch_size, grad_accum=grad_accum, grad_clip=0.0, n_expert=n_expert,
                        vocab_size=257)
    all_windows = train.open_data(config, c, torch.device("cpu"))[2]
    shares = [all_windows.of_step(3, c, rank, ranks) for rank in range(ranks)]
    assert all(len(idx) <= batch_size for batches in shares for idx, _ in batches)
    step = sum(gradient(config, c, batches) for batches in shares) / ranks
    torch.manual_seed(0)
    model = GPT(config)
    model(*(torch.cat(parts) for parts in zip(*all_windows.of_step(3, c))))[1].backward()
    expected = parameters_to_vector(p.grad for p in model.parameters())
    assert torch.allclose(step, expected, atol=1e-6, rtol=1e-4) == (not n_expert)


def test_gradients_are_clipped_to_the_longest_allowed_and_0_means_never():
    config, c = configs(vocab_size=257)
    batches = train.open_data(config, c, torch.device("cpu"))[2].of_step(0, c)
    free, never, clipped = (gradient(config, dataclasses.replace(c, grad_clip=longest), batches).norm().item()
                            for longest in (0.0, 1e9, 0.01))
    assert free == never > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


def test_windows_that_processes_cannot_share_evenly_are_refused():
    config, c = configs(batch_size=3, grad_accum=3)
    with pytest.raises(ValueError, match="batch_size=3 times grad_accum=3 is 9 windows .* 2 processes"):
        train.open_data(config, c, torch.device("cpu"), ranks=2)


@pytest.mark.parametrize("schedule, warmup, rates", [  # {step: its rate, as a fraction of the peak}
    ("cosine", 10, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 60: 0.6,
                    110: 0.2, 500: 0.2}),  # a climb that ends at the peak, half a cosine, flat from there
    ("cosine", 0, {0: 1.0, 55: 0.6}),
    ("constant", 10, {0: 0.1, 9: 1.0, 60: 1.0, 500: 1.0}), ("constant", 0, {0: 1.0}),
    ("wsd", 10, {0: 0.1, 9: 1.0, 10: 1.0, 88: 1.0, 89: 0.2 + 0.8 * 21 / 22, 99: 0.6, 110: 0.2})])
def test_the_learning_rate_climbs_to_its_peak_and_then_falls_or_stays_or_falls_late(schedule, warmup, rates):
    c = train.TrainConfig(learning_rate=3.0, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.2,
                          max_steps=110)
    assert {step: train.learning_rate_at(step, c) / 3 for step in rates} == pytest.approx(rates)


def test_every_group_of_parameters_has_the_learning_rate_of_the_step():
    fit(out="run", optimizer="muon", max_steps=5)
    groups = [group for saved in content_of()["optimizers"] for group in saved["param_groups"]]
    last = 0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 3)) / 2  # the third of three steps after the warm-up
    assert [group["lr"] for group in groups] == pytest.approx([last * TINY["learning_rate"]] * 3)


@every_variant
def test_each_parameter_is_in_one_group_and_only_matrices_decay(variant):
    for optimizer in ("adamw", "muon"):
        model = GPT(configs(n_layer=2, vocab_size=11, **variant)[0])
        optimizers = train.make_optimizers(model, train.TrainConfig(optimizer=optimizer, weight_decay=0.3))
        groups = [(o, group) for o in optimizers for group in o.param_groups]
        grouped = [id(p) for _, group in groups for p in group["params"]]
        assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
        for _, group in groups:
            assert all(group["weight_decay"] == (0.3 if p.dim() >= 2 else 0) for p in group["params"])
        in_muon = {id(p) for o, group in groups if isinstance(o, train.Muon) for p in group["params"]}
        matrices = {id(p) for block in model.blocks for p in block.parameters() if p.dim() == 2}
        assert in_muon == (matrices if optimizer == "muon" else set())


def test_muon_takes_the_steps_that_torchs_muon_takes():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 6), (4, 12), (12, 4), (4, 12), (1, 5), (3, 3))]
    gradients, ended = [torch.randn_like(p) for p in start[:-1]], []  # the last gets none, and stays
    settings = dict(lr=0.02, weight_decay=0.3)
    for make in (train.Muon, partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")):
        ended.append([p.clone().requires_grad_() for p in start])
        optimizer = make(ended[-1], **settings)
        for step in range(5):
            for p, gradient in zip(ended[-1], gradients):
                p.grad = gradient * (step - 1.5) + 0.3 * gradient.flip(1)
            optimizer.step()
    for mine, torchs, p in zip(*ended, start):  # torch's works in bfloat16
        assert (mine - torchs).norm() <= 0.03 * (mine - p).norm()


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40)])
def test_an_orthogonal_update_keeps_the_singular_vectors_and_makes_all_singular_values_about_one(
        shape, bfloat16, monkeypatch):
    monkeypatch.setattr(train.machine, "has_bfloat16", lambda device: bfloat16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)  # s from about 0.1 to 10
    made = u.mT @ train.orthogonal(x.float()).double() @ vh.mT  # (N, rows, rows), diagonal
    values = made.diagonal(dim1=1, dim2=2)
    off = made - torch.diag_embed(values)
    assert 0.65 < values.min() and values.max() < 1.25
    assert off.abs().max() < (0.05 if bfloat16 else 1e-4)


def test_a_row_is_about_the_steps_since_the_row_before():
    losses, before = [], 0
    with watching(lambda model, inputs, output: losses.append(output[1].item()) if model.training else None):
        log = fit(grad_accum=2, max_steps=7)
    assert [row["step"] for row in log] == [3, 6, 7]
    for row, part in zip(log, (losses[:6], losses[6:12], losses[12:])):  # 2 forwards a step
        assert row["train_loss"] == pytest.approx(sum(part) / len(part), abs=1e-6)
        tokens = len(part) * TINY["batch_size"] * TINY["block_size"]
        assert row["tokens_per_second"] * (row["seconds"] - before) == pytest.approx(tokens)
        before = row["seconds"]


@pytest.mark.parametrize("name", ["words", "tiny"])
def test_the_validation_loss_is_the_mean_over_evenly_spaced_windows_without_dropout_also_per_byte(name):
    row = fit(data=name, out="run", dropout=0.5, eval_windows=7)[-1]
    model, losses = checkpoint.load("run/last.pt")[0].eval(), []
    meta, splits = prepare.load(name)
    tokens, bos = splits["val"].tolist(), meta["bos"]
    for i in range(7):
        begin = int(i * (len(tokens) - 8) / 6)
        window = tokens[begin:begin + 8]
        logits = model(torch.tensor([[bos, *window[:-1]]]))[0][0].detach()
        losses += [-logits[t].log_softmax(-1)[target].item() for t, target in enumerate(window)]
    assert row["val_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    size = len(get_tokenizer(meta["tokenizer"]).decode_bytes([token for token in tokens if token != bos]))
    assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2) * len(tokens) / size)
    # GPT-2's tokens can be prepared without a network, and then nobody knows how many bytes they stand for.
    config, c = configs(vocab_size=1000)
    model, unknown = GPT(config), {"bytes": None, "tokens": 5}
    row = train.evaluate(model, model, windows(50, 8), unknown, c, contextlib.nullcontext())
    assert row["val_loss"] > 0 and math.isnan(row["bits_per_byte"])


EXPLODE = dict(learning_rate=1e9, grad_clip=0.0, warmup_steps=60, max_steps=61, schedule="constant")


def test_a_loss_that_explodes_ends_in_one_sentence_and_leaves_the_checkpoints_before_it():
    said = refusal(train.main, flags(out="run", **EXPLODE, eval_every=20))
    assert "the loss at step 20 is not finite: try a smaller --learning_rate" in said
    assert os.listdir("run") == []
    fit(out="run")
    before = all_files("run")
    with pytest.raises(FloatingPointError):
        fit(out="run", resume=True, **EXPLODE)
    assert all_files("run") == before


# ---- what a run leaves -----------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [dict(attn_share=True, n_layer=2), dict(attn_share=True, gate="none"),
                                    dict()], ids=str)
def test_a_row_holds_means_over_layers_and_the_log_file_holds_the_rows(fields):
    log = fit(out="run", **fields)
    with open("run/log.csv", newline="") as file:
        columns, *rows = csv.reader(file)
    assert columns == ["step", "train_loss", "val_loss", "bits_per_byte", "tokens_per_second",
                       "first_token_share", "uniform_share", "gate_score", "max_activation"]
    assert [row[0] for row in rows] == ["3", "6"]
    for texts, row in zip(rows, log, strict=True):
        assert_same([float(text) for text in texts], [float(row.get(name, math.nan)) for name in columns])
        assert ("layers" in row) == ("attn_share" in fields)
        for name in ("first_token_share", "gate_score", "max_activation") if "layers" in row else ():
            means = np.mean([layer[name] for layer in row["layers"]])
            assert row[name] == pytest.approx(means, nan_ok=True)
            assert row["uniform_share"] == uniform_share(8)
    if "layers" in log[-1]:  # which are about 64 windows, evenly spaced
        val_set = train.open_data(*configs(**fields), torch.device("cpu"))[3]
        layers = measure(checkpoint.load("run/last.pt")[0], val_set.at(val_set.spaced(64))[0])
        torch.testing.assert_close(log[-1]["layers"], layers, equal_nan=True, rtol=1e-6, atol=0)


def test_best_is_the_checkpoint_with_the_lowest_validation_loss():
    fit(out="run", eval_every=2)
    log = fit(out="run", eval_every=2, resume=True, max_steps=12, learning_rate=5.0)  # far too large
    assert min(log, key=lambda row: row["val_loss"])["step"] == 6
    assert content_of("run/best.pt")["step"] == 6 and content_of("run/last.pt")["step"] == 12
    assert_same(content_of("run/best.pt")["log"], log[:3])


def test_a_run_goes_to_a_folder_named_after_its_data_and_gate(data_root):
    for data in ("tiny", "tiny", str(data_root / "tiny")):  # the last: wherever the data lies
        fit(max_steps=1, data=data)
    assert sorted(os.listdir("out")) == ["tiny-g1", "tiny-g1-2", "tiny-g1-3"]
    assert sorted(os.listdir("out/tiny-g1-3")) == ["best.pt", "last.pt", "log.csv"]


def test_overwriting_that_is_refused_for_another_reason_leaves_the_run_before():
    fit(out="run")
    before = all_files("run")
    for wrong in (dict(data="nothing"), dict(vocab_size=3), dict(block_size=10**6), dict(device="banana")):
        refusal(train.main, [*flags(out="run", **wrong), "--overwrite"])
    assert all_files("run") == before


# ---- starting from other weights -------------------------------------------------------------------

def test_init_from_starts_with_the_weights_the_shape_and_the_data_of_a_checkpoint():
    fit(out="old", n_layer=2, gate="g2", gate_shared=True, tie_embeddings=True, block_size=6, eval_every=2)
    os.replace("old/last.pt", "old/other.pt")
    for path, from_file in (("old/other.pt", "old/other.pt"), ("old", "old/best.pt")):
        status, out, err = status_of(train.main, f"--init_from={path} --out=new --overwrite --device=cpu "
                                                 "--learning_rate=0 --max_steps=1 --eval_windows=5")
        assert status == 0 and f" {path}\n" in out and "data     tiny" in out, err
        assert_same(weights("new/last.pt"), weights(from_file))
        assert content_of("new/last.pt")["step"] == 1
        assert checkpoint.load("new/last.pt")[0].config.block_size == train.PRESETS["laptop"]["block_size"]


@pytest.mark.parametrize("old, words, said", [
    *(("tiny", f"--init_from={word}", rf"no checkpoint {word}: `python \S*train.py` makes one from scratch, "
       "--resume goes on with one") for word in ("resume", "scratch", "gpt2")),  # words of nanoGPT's
    ("words", "--data=tiny", "of bpe2k, but tiny has those of bytes: prepare the data with --tok"),
    ("tiny", "--data=words", "2048 of words, in tokens of bpe2k: prepare the data with another --tokenizer"),
    *(("tiny", f"--data=tiny {flag}", "another shape than your flags ask for") for flag in (
        "--n_layer=2", "--n_embd=32", "--norm=sandwich", "--vocab_size=300"))])
def test_init_from_what_does_not_fit_is_refused(old, words, said):
    fit(out="old", data=old)
    assert re.search(said, refusal(train.main, f"--init_from=old --out=new --device=cpu {words}"))
    assert not Path("new").exists()


@pytest.mark.parametrize("old, new, said", [
    (dict(gate="none"), dict(gate="g1"), "new: gate"),
    (dict(gate="g1"), dict(gate="none"), "left out: its gate"),
    (dict(gate="g1"), dict(gate="g5"), "new: gate, left out: its gate"),
    (dict(gate="g1"), dict(gate="g1", gate_kind="headwise"), "new: gate, left out: its gate"),
    (dict(gate="none"), dict(gate="none", attention="learned"), "new: sdpa"),
    *((dict(gate="none"), dict(gate="g1", train_only="gate", optimizer=optimizer), "new: gate")
      for optimizer in ("adamw", "muon"))], ids=str)
def test_init_from_with_another_gate_takes_all_other_weights_which_stay_if_only_the_gate_is_trained(
        old, new, said):
    fit(out="old", **old)
    told, trained = [], "train_only" in new
    config, c = configs(init_from="old", learning_rate=1e-2 if trained else 0.0, eval_every=2, **new)
    model, _ = train.train(config, dataclasses.replace(c, out="new"), told.append)
    assert f"with the weights of old, {said}\n" in "\n".join(told)
    torch.manual_seed(0)
    fresh, there = GPT(model.config).state_dict(), weights("old/best.pt")
    for name, p in model.state_dict().items():
        is_new = ".gate." in name or ".sdpa." in name
        assert torch.equal(p, fresh[name] if is_new else there[name]) != (is_new and trained), name
    train.train(config, dataclasses.replace(c, out="half", max_steps=2), quiet)
    train.train(config, dataclasses.replace(c, out="half", resume=True), quiet)
    assert_same(weights("half/last.pt"), weights("new/last.pt"))


# ---- presets and flags -----------------------------------------------------------------------------

def table_of(words):
    """All the values that a command line leads to, and what it says about its preset."""
    tables = []

    def main(argv):
        tables.extend(map(dataclasses.asdict, train.configs_from(train.parse_flags(argv))))

    status, out, err = status_of(main, words)
    assert status == 0, err
    return tables[0] | tables[1], out


@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_preset_is_a_table_that_makes_sense(preset):
    values, out = table_of(f"--preset={preset}")
    assert out.split()[:2] == ["preset", preset]
    assert {name: values[name] for name in train.PRESETS[preset]} == train.PRESETS[preset]
    assert values["data"] in prepare.SETS
    assert values["warmup_steps"] <= values["eval_every"] <= values["max_steps"] / 4
    assert values["max_steps"] % values["eval_every"] == 0  # the last row is as many steps as the others


def test_the_gpt2_preset_has_the_size_and_the_tokens_of_gpt_2_small_and_gpu_the_size_of_nanogpts_baby_gpt():
    gpu, c = train.make_configs(table_of("--preset=gpu")[0])
    assert (gpu.n_layer, gpu.n_head, gpu.n_embd, gpu.block_size, gpu.dropout) == (6, 6, 384, 256, 0.2)
    assert (c.batch_size, c.max_steps) == (64, 5000)
    config, c = train.make_configs(table_of("--preset=gpt2 --gate=none")[0])
    assert 50257 <= config.vocab_size < 50257 + 128 and config.vocab_size % 128 == 0
    with torch.device("meta"):
        assert 115e6 < GPT(config).num_params() < 130e6
    assert c.windows_per_step * config.block_size == 2**19
    assert c.max_steps * 2**19 <= 25 * 100_000_000  # the shards that are prepared for it


def test_flags_override_the_preset_which_overrides_the_defaults():
    values, out = table_of("--device=cpu")
    assert out == "preset   laptop (on cpu)\n" and values["optimizer"] == "muon"
    values, _ = table_of("--preset=sink --max_steps=7 --gate=none --no-attn_share")
    assert (values["max_steps"], values["gate"], values["attn_share"]) == (7, "none", False)
    assert values["data"] == "backcopy" and values["grad_clip"] == train.TrainConfig().grad_clip
    defaults = dict(max_steps=1000, learning_rate=1e-3, n_layer=4, data="python", beta2=0.99)
    assert all(train.PRESETS["gpt2"][name] != value for name, value in defaults.items())
    values, _ = table_of(["--preset=gpt2", *(f"--{name}={value}" for name, value in defaults.items())])
    assert {name: values[name] for name in defaults} == defaults  # a flag with the default's own value, too


@pytest.mark.parametrize("words, said", [
    *((f"--{number}", f"{number} must be at least ") for number in (
        "max_steps=0", "grad_accum=-1", "warmup_steps=-1", "seed=-1", f"seed={2**31}", "n_layer=0",
        "learning_rate=-1.0", "learning_rate=nan", "grad_clip=inf")),
    *((words, f"{words.split()[-1].split('=')[0]} does nothing with {other}: leave it out, or change --")
      for words, other in (
        ("--gate=none --gate_kind=headwise", "gate=none"), ("--n_expert_active=1", "n_expert=0"),
        ("--schedule=constant --min_lr_ratio=0.2", "schedule=constant"), ("--overwrite", "out=None"))),
    ("--vocab_size=256", "vocab_size=256 is less than the 257"),
    ("--block_size=262", "the data has 261 tokens in one of its splits, fewer than block_size=262"),
    ("--max_steps=20 --warmup_steps=20", "warmup_steps=20 must be below max_steps=20"),
    ("--train_only=gate", "train_only=gate with gate=g1, init_from=None: choose a gate, and a trained m")])
def test_what_cannot_be_trained_is_refused_without_a_trace(words, said, here):
    assert said in refusal(train.main, [*flags(), *words.split()])
    assert os.listdir(here) == []


def test_the_vocabulary_is_the_datas_unless_a_larger_one_is_asked_for():
    for size, fields in ((257, dict()), (300, dict(vocab_size=300))):
        fit(out="run", overwrite=True, **fields)
        assert weights()["embed.weight"].shape == (size, 16)


def test_the_warm_up_of_a_preset_takes_at_most_half_of_a_run_but_yours_may_take_all_but_one_step():
    for preset, steps, warmup in [("laptop", 30, 15), ("laptop", 1, 0), ("sink", 100, 50), ("sink", 200, 100),
                                  ("gpt2", 5000, 250)]:
        assert table_of(f"--preset={preset} --max_steps={steps}")[0]["warmup_steps"] == warmup
    assert table_of(flags(max_steps=20, warmup_steps=19))[0]["warmup_steps"] == 19
    fit(out="run", max_steps=3, warmup_steps=1)
    assert table_of("--resume --out=run --max_steps=100")[0]["warmup_steps"] == 1  # as it was


# ---- what a run prints -----------------------------------------------------------------------------

def test_a_run_says_what_it_chose_its_rows_its_best_loss_and_a_table_in_80_columns():
    status, out, _ = status_of(train.main, [*flags(n_layer=2), "--attn_share"])
    start, table, best, layers, then = out.split("\n\n")
    assert status == 0 and all(len(text) <= 80 for text in out.splitlines()[:-1])
    said = dict(text.split(maxsplit=1) for text in start.splitlines())
    assert list(said) == ["preset", "device", "threads", "dtype", "compile", "model", "data", "steps", "run"]
    assert said["preset"].startswith("laptop (") and said.items() >= dict(
        device="cpu (as asked)", threads="1 (as asked)", dtype="float32 (the default on cpu)",
        compile="off (on by default with CUDA only)", steps="6 of 32 tokens (4 windows of 8), muon",
        run="out/tiny-g1").items()
    assert [text.split()[0] for text in table.splitlines()] == ["step", "3", "6"]
    log = content_of("out/tiny-g1/last.pt")["log"]
    row = min(log, key=lambda row: row["val_loss"])
    for what in (f"{row['val_loss']:.4f}", f"{row['bits_per_byte']:.4f}", f"step {row['step']}"):
        assert what in best
    assert re.search(r"^ +0 .*\n +1 ", layers, re.M) and f"{uniform_share(8):.3f}" in layers
    assert then == f"texts of its best step: {command('sample.py', '--ckpt=out/tiny-g1')}\n"


def test_a_set_of_texts_shorter_than_a_window_is_said_to_have_more_bos_in_it(here, use_data):
    use_data(here / "sets")
    for i in range(80):
        (here / f"{i}.txt").write_text(f"{i:02} " * 11)
    prepare.prepare_files([*here.glob("*.txt")], "short", "bytes")
    for T, many in ((8, False), (128, True)):
        said = []
        train.train(*configs(data="short", block_size=T, max_steps=1), said.append)
        assert ("short texts: a window has 3.8 more BOS" in "".join(said)) == many


def test_in_bfloat16_the_products_are_rounded_and_the_weights_are_not():
    formats = set()
    with watching(lambda model, inputs, output: formats.add((model.training, output[0].dtype))):
        log = fit(out="run", dtype="bfloat16", attn_share=True)
    assert {(True, torch.bfloat16), (False, torch.bfloat16)} <= formats
    assert all(p.dtype == torch.float32 for p in weights().values())
    assert 0 < abs(log[-1]["val_loss"] - fit()[-1]["val_loss"]) < 0.05


def test_where_compiling_fails_a_line_says_so_and_the_run_is_the_uncompiled_one(monkeypatch):
    def broken_backend(graph, inputs):
        raise NotImplementedError("no compiler\nand a story" * 99)

    said = []
    torch._dynamo.reset()  # after many models in one process it would not even try
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken_backend))
    train.train(*configs(**WHOLE, compile=True), said.append)
    torch._dynamo.reset()
    fit(**WHOLE | dict(out="plain"))
    assert_same_end("run", "plain")
    off, = (text for text in said if text.startswith("compile  off (torch.compile failed with "))
    assert " no compiler and a story" in off and off.isprintable() and len(off) < 300


def test_a_compiled_run_has_nearly_the_losses_of_an_uncompiled_one(monkeypatch):
    # Traced and differentiated as for any backend, but run by PyTorch: C++ would take a minute to compile.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fields, said = WHOLE | dict(batch_size=5, max_steps=3, eval_every=1, eval_windows=12), []
    _, compiled = train.train(*configs(**fields, compile=True), said.append)
    torch._dynamo.reset()
    assert re.search(r"^compile +on\b", "\n".join(said), re.M)
    for a, b in zip(compiled, fit(**fields | dict(out="plain")), strict=True):
        for name in ("train_loss", "val_loss", "first_token_share", "gate_score"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), name
