"""Claims about train.py: what a run depends on, how it stops and goes on, and what it says is wrong."""
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import sample
import train
from data import prepare
from gated_gpt import GPT, GPTConfig, load_checkpoint, uniform_share

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
TINY = dict(data="tiny", block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=4, max_steps=6,
            eval_every=3, eval_windows=5, warmup_steps=2, learning_rate=1e-2, device="cpu")
# Everything that has a state of its own: dropout, accumulation, a schedule, decay, a clip, measurements.
WHOLE = dict(out="run", max_steps=8, dropout=0.3, grad_accum=2, schedule="cosine", weight_decay=0.1,
             grad_clip=0.5, attn_share=True)
VARIANTS = [dict(gate="none"), dict(), dict(gate_kind="headwise"), dict(gate="g2", gate_share=True),
            dict(gate="g3"), dict(gate="g4", gate_input=False), dict(gate="g5", norm="sandwich"),
            dict(tie_embeddings=True), dict(tie_embeddings=False), dict(n_expert=4),
            dict(sdpa_norm=True, sdpa_silu=True),
            dict(qk_norm=False, n_kv_head=1, gate_op="add", gate_act="silu")]

pytestmark = pytest.mark.usefixtures("here")
both_optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def fit(**fields):
    """The log of a tiny run."""
    return train.train(*configs(**fields), quiet=True)


def configs(**fields):
    return train.make_configs(TINY | fields)


def flags(**fields):
    """A tiny run's flags for the command line."""
    return [f"--{name}={value}" for name, value in (TINY | fields).items()]


@contextmanager
def watching(see):
    """see(model, (idx, targets), (logits, loss)) after each forward of a GPT."""
    handle = register_module_forward_hook(
        lambda module, inputs, output: see(module, inputs, output) if isinstance(module, GPT) else None)
    try:
        yield
    finally:
        handle.remove()


def seen(**fields):
    """What the model of a tiny run is given: {"train", "val"}, a list of (idx, targets) each."""
    given = {"train": [], "val": []}
    with watching(lambda model, inputs, output: given["train" if model.training else "val"].append(inputs)):
        fit(**fields)
    return given


def at_forward(number, act, training=True):
    """Call act() within the forward of that number, of training or else of evaluation."""
    count = itertools.count(1)
    return watching(lambda model, inputs, output:
                    act() if model.training == training and next(count) == number else None)


def interrupt(forward, number=signal.SIGINT, training=True, **fields):
    """A tiny run that gets a signal within a forward, and stops."""
    send = partial(signal.raise_signal, number)
    with at_forward(forward, send, training), pytest.raises(KeyboardInterrupt):
        fit(**fields)


def checkpoint(path):
    """All that a checkpoint holds, but for times and for flags."""
    model, state = load_checkpoint(path)
    for row in state["log"]:
        del row["tokens_per_second"]
    return {"model": dict(model.state_dict())} | {
        name: value for name, value in state.items() if name not in ("seconds", "train_config")}


def assert_same(a, b, where="it"):
    """Bit for bit, however deep it lies; nan is nan."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for name in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or a != a and b != b, f"{where}: {a} and {b}"


def rows_of(path):
    """log.csv without the column that depends on the weather."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if name != "tokens_per_second"}
                for row in csv.DictReader(file)]


def weights(path="run/last.pt"):
    return load_checkpoint(path)[0].state_dict()


def status_of(argv, main=train.main):
    """The exit status of this command line."""
    try:
        sample.run_main(partial(main, argv))
    except SystemExit as end:
        return end.code or 0
    return 0


# ------------------------------------------------------------------------------------------------------------
# Resuming


STOPS = {  # the number of the forward that the signal comes in, of training (2 a step) or else of evaluation
    "between evaluations": [(9, True)],
    "at the first step": [(1, True)],
    "at an evaluation": [(6, True)],
    "within an evaluation": [(1, False)],
    "twice between evaluations": [(3, True), (6, True)],
    "at an evaluation and then before another": [(5, True), (4, True)],
}


@both_optimizers
@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_stopped_bit_for_bit(optimizer, stops):
    whole = WHOLE | dict(optimizer=optimizer)
    log = fit(**whole | dict(out="never"))
    for i, (forward, training) in enumerate(stops):
        interrupt(forward, training=training, **whole, resume=i > 0)
        torch.manual_seed(12345)  # another process would start with other random numbers
        torch.rand(7)
    resumed = fit(**whole, resume=True)
    assert [row["step"] for row in resumed] == [row["step"] for row in log] == [3, 6, 8]
    for name in ("last.pt", "best.pt"):
        assert_same(checkpoint(f"run/{name}"), checkpoint(f"never/{name}"), name)
    assert rows_of("run/log.csv") == rows_of("never/log.csv")


def test_a_resumed_run_draws_the_batches_that_were_still_to_come():
    whole = seen(**WHOLE | dict(out="never"))["train"]
    interrupt(9, **WHOLE)
    assert_same(seen(**WHOLE, resume=True)["train"], whole[10:])


def test_sigterm_saves_as_ctrl_c_does():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # its own default would end the tests
    try:
        interrupt(9, signal.SIGTERM, **WHOLE)
    finally:
        signal.signal(signal.SIGTERM, before)
    interrupt(9, signal.SIGINT, **WHOLE | dict(out="other"))
    assert_same(checkpoint("run/last.pt"), checkpoint("other/last.pt"))
    assert load_checkpoint("run/last.pt")[1]["step"] == 5


def test_a_run_killed_after_an_evaluation_is_resumed_from_there():
    fit(**WHOLE | dict(out="never"))
    with at_forward(9, partial(pytest.exit, "killed")), pytest.raises(pytest.exit.Exception):
        fit(**WHOLE)
    assert load_checkpoint("run/last.pt")[1]["step"] == 3
    fit(**WHOLE, resume=True)
    assert_same(checkpoint("run/last.pt"), checkpoint("never/last.pt"))


def test_a_signal_in_the_last_step_comes_too_late_to_stop_the_run():
    fit(**WHOLE | dict(out="never"))
    for forward, training in ((16, True), (6, False)):  # 2 forwards a step, and at each of 3 evaluations
        with at_forward(forward, partial(signal.raise_signal, signal.SIGINT), training):
            try:
                log = fit(**WHOLE | dict(attn_share=False, overwrite=True))
            except KeyboardInterrupt:
                pytest.fail("the run is done, but says that it was stopped")
        assert [row["step"] for row in log] == [3, 6, 8]
        assert_same(dict(weights("run/last.pt")), dict(weights("never/last.pt")))


def test_a_finished_run_is_resumed_with_more_steps_only():
    log = fit(out="run")
    with pytest.raises(ValueError, match="run/last.pt.* step 6 .*max_steps"):
        fit(out="run", resume=True)
    longer = fit(out="run", resume=True, max_steps=9)
    assert [row["step"] for row in longer] == [3, 6, 9]
    assert_same(longer[:2], log)


def test_without_out_the_newest_run_is_resumed(here):
    for number in (1, 2):
        interrupt(2, gate="none")
        os.utime(f"out/tiny-none{'-2' * (number == 2)}/last.pt", (number, number))
    os.utime("out/tiny-none/last.pt", (3, 3))
    fit(gate="none", resume=True)
    steps = [load_checkpoint(f"out/{name}/last.pt")[1]["step"] for name in ("tiny-none", "tiny-none-2")]
    assert steps == [6, 2]


def test_the_command_line_resumes_with_the_flags_of_the_run(capsys):
    interrupt(5, **WHOLE, optimizer="muon", seed=3)
    fit(**WHOLE | dict(out="never"), optimizer="muon", seed=3)
    assert status_of(["--resume", "--out=run"]) == 0
    assert_same(checkpoint("run/last.pt"), checkpoint("never/last.pt"))
    assert "resumed at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(gate="none"), dict(n_layer=2, dropout=0.5), dict(block_size=4),
                                    dict(qk_norm=False), dict(vocab_size=300)], ids=str)
def test_resuming_with_another_model_is_refused_and_names_the_flags(change, capsys):
    interrupt(4, out="run")
    with pytest.raises(ValueError) as error:
        fit(out="run", resume=True, **change)
    for name, value in change.items():
        assert f"{name}={value}" in str(error.value)
    words = [f"--no-{name}" if value is False else f"--{name}={value}" for name, value in change.items()]
    assert status_of(["--resume", "--out=run", *words]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in change), said


def test_resuming_where_there_is_no_run_is_refused(here):
    with pytest.raises(ValueError, match="no run .*train.py"):
        fit(resume=True)
    with pytest.raises(ValueError, match="nowhere"):
        fit(resume=True, out="nowhere")
    assert os.listdir(here) == []


def test_resuming_with_other_data_is_refused(here, use_data, data_root):
    shutil.copytree(data_root / "tiny", here / "data" / "tiny")
    use_data(here / "data")
    interrupt(4, out="run")
    shutil.rmtree(here / "data" / "tiny")
    (here / "other.txt").write_text("Quite another text, of about the same length.\n" * 200)
    prepare.prepare_files([here / "other.txt"], "tiny", "bytes", here / "data")
    with pytest.raises(ValueError, match="other data.*tiny"):
        fit(out="run", resume=True)


def test_resume_with_a_preset_is_refused():
    interrupt(4, out="run")
    with pytest.raises(ValueError, match="preset=sink.*resume"):
        configs_of("--resume", "--out=run", "--preset=sink")


def test_resume_with_overwrite_is_refused():
    with pytest.raises(ValueError, match="resume and overwrite"):
        train.TrainConfig(resume=True, overwrite=True)


# ------------------------------------------------------------------------------------------------------------
# What a run depends on, and what not


def test_flipping_the_gate_changes_neither_the_batches_nor_the_validation_windows():
    for other in VARIANTS[1:]:
        assert_same(seen(**VARIANTS[0], max_steps=3), seen(**other, max_steps=3), str(other))


def test_flipping_the_gate_leaves_the_random_numbers_of_dropout_as_they_were():
    def seeds(**variant):
        found = []
        with watching(lambda model, *_: found.append(torch.initial_seed()) if model.training else None):
            fit(dropout=0.5, max_steps=3, grad_accum=2, **variant)
        return found

    base = seeds(**VARIANTS[0])
    assert len(base) == 6 and len(set(base)) == 3  # one for each step
    for other in VARIANTS[1:7]:
        assert seeds(**other) == base, str(other)


def test_a_gate_that_adds_nothing_changes_no_loss_and_no_weight():
    nothing = dict(gate_op="add", gate_act="identity", gate_input=False)  # it adds a constant, 0 at first
    frozen = dict(learning_rate=0.0, dropout=0.2, weight_decay=0.0)
    without = fit(**frozen, gate="none", out="without")
    for gate in ("g1", "g2", "g5"):
        gated = fit(**frozen, gate=gate, out=gate, **nothing)
        for a, b in zip(without, gated, strict=True):
            assert (a["train_loss"], a["val_loss"]) == (b["train_loss"], b["val_loss"])
        for name, p in weights("without/last.pt").items():
            assert torch.equal(weights(f"{gate}/last.pt")[name], p), name


def test_the_same_seed_gives_the_same_run_and_another_seed_other_batches_and_weights():
    a, b, c = (fit(out=f"run{i}", seed=seed, dropout=0.1) for i, seed in enumerate((0, 0, 1)))
    assert_same(checkpoint("run0/last.pt"), checkpoint("run1/last.pt"))
    assert all(x["train_loss"] != y["train_loss"] for x, y in zip(a, c))
    first, other = seen(seed=0), seen(seed=1)
    assert not any(torch.equal(x[1], y[1]) for x, y in zip(first["train"], other["train"]))
    assert_same(first["val"], other["val"])


def test_a_batch_depends_on_the_seed_and_the_step_only():
    base = seen()["train"]
    for change in (dict(eval_every=1), dict(attn_share=True), dict(optimizer="muon"), dict(n_layer=2),
                   dict(dropout=0.5), dict(max_steps=20), dict(learning_rate=0.1), dict(eval_windows=20)):
        assert_same(seen(**change)["train"][:len(base)], base, str(change))
    assert len({tuple(targets.flatten().tolist()) for _, targets in base}) == len(base)


@both_optimizers
def test_evaluating_and_measuring_do_not_change_the_training(optimizer):
    settings = dict(eval_every=1), dict(eval_every=1000), dict(eval_every=2, attn_share=True, eval_windows=64)
    for i, setting in enumerate(settings):
        fit(**WHOLE | dict(attn_share=False, optimizer=optimizer, out=f"run{i}") | setting)
    state = [load_checkpoint(f"run{i}/last.pt")[1] for i in range(3)]
    for i in (1, 2):
        assert_same(dict(weights("run0/last.pt")), dict(weights(f"run{i}/last.pt")))
        for name in ("optimizers", "step"):
            assert_same(state[0][name], state[i][name], name)


def test_the_validation_loss_does_not_depend_on_how_often_it_is_taken():
    often = {row["step"]: row["val_loss"] for row in fit(dropout=0.3, eval_every=1)}
    seldom = {row["step"]: row["val_loss"] for row in fit(dropout=0.3, eval_every=4)}
    assert set(seldom) == {4, 6} and seldom == {step: often[step] for step in seldom}


def test_the_validation_loss_does_not_depend_on_the_batch_size():
    losses = [fit(learning_rate=0.0, batch_size=size)[0]["val_loss"] for size in (1, 2, 5, 64)]
    assert max(losses) - min(losses) < 1e-6


def test_the_validation_loss_is_the_mean_over_evenly_spaced_windows_without_dropout():
    row = fit(out="run", dropout=0.5, eval_windows=7)[-1]
    model, losses = load_checkpoint("run/last.pt")[0].eval(), []
    tokens = prepare.load("tiny")[1]["val"].tolist()
    for i in range(7):
        start = int(i * (len(tokens) - 8) / 6)
        window = tokens[start:start + 8]
        logits = model(torch.tensor([[256, *window[:-1]]]))[0][0].detach()
        losses += [-logits[t].log_softmax(-1)[target].item() for t, target in enumerate(window)]
    assert row["val_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_the_training_loss_is_the_mean_over_the_steps_since_the_last_evaluation():
    losses = []
    with watching(lambda model, inputs, output: losses.append(output[1].item()) if model.training else None):
        log = fit(grad_accum=2, max_steps=7)
    assert [row["step"] for row in log] == [3, 6, 7]
    for row, part in zip(log, (losses[:6], losses[6:12], losses[12:])):
        assert row["train_loss"] == pytest.approx(sum(part) / len(part), abs=1e-6)


@both_optimizers
def test_two_half_batches_accumulated_are_one_batch(optimizer):
    settings = [dict(batch_size=8 // n, grad_accum=n) for n in (1, 2, 4)]
    logs = [fit(**setting, optimizer=optimizer, eval_every=1, learning_rate=1e-3, out=f"run{i}")
            for i, setting in enumerate(settings)]
    for log in logs[1:]:
        for a, b in zip(logs[0], log, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)
    (whole,), halves = seen(**settings[0], max_steps=1)["train"], seen(**settings[1], max_steps=1)["train"]
    assert torch.equal(whole[1], torch.cat([targets for _, targets in halves]))


# ------------------------------------------------------------------------------------------------------------
# Learning rate and optimizers


@pytest.mark.parametrize("step, schedule, warmup, rate", [
    (0, "cosine", 10, 0.1), (4, "cosine", 10, 0.5), (9, "cosine", 10, 1.0),  # a climb that ends at the peak,
    (10, "cosine", 10, 1.0), (60, "cosine", 10, 0.6), (110, "cosine", 10, 0.2),  # half a cosine, its floor,
    (35, "cosine", 10, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2), (500, "cosine", 10, 0.2),  # and flat from there
    (0, "cosine", 0, 1.0), (55, "cosine", 0, 0.6),
    (0, "constant", 10, 0.1), (9, "constant", 10, 1.0), (60, "constant", 10, 1.0), (500, "constant", 10, 1.0),
    (0, "constant", 0, 1.0)])
def test_the_learning_rate_climbs_to_its_peak_and_falls_to_its_floor_or_stays(step, schedule, warmup, rate):
    c = train.TrainConfig(learning_rate=3.0, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.2,
                          max_steps=100 + warmup if warmup else 110)
    assert train.learning_rate_at(step, c) == pytest.approx(3 * rate)


@pytest.mark.parametrize("warmup, steps", [(0, 1), (5, 5), (50, 5), (7, 40)])
def test_the_learning_rate_never_rises_after_the_warm_up_and_stays_between_floor_and_peak(warmup, steps):
    c = train.TrainConfig(learning_rate=2.0, warmup_steps=warmup, max_steps=steps, min_lr_ratio=0.1)
    rates = [train.learning_rate_at(step, c) for step in range(steps + 10)]
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 2 for rate in rates) and all(rate >= 0.2 for rate in rates[warmup:])


@both_optimizers
def test_every_group_of_parameters_has_the_learning_rate_of_the_step(optimizer):
    fit(out="run", optimizer=optimizer, max_steps=5)
    c = train.TrainConfig(**{name: TINY[name] for name in ("warmup_steps", "learning_rate")}, max_steps=5)
    saved = load_checkpoint("run/last.pt")[1]["optimizers"]
    groups = [group for optimizer in saved for group in optimizer["param_groups"]]
    assert len(groups) == (2 if optimizer == "adamw" else 3)
    assert all(group["lr"] == train.learning_rate_at(4, c) < c.learning_rate for group in groups)


@both_optimizers
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_parameter_is_in_one_group_and_only_matrices_decay(optimizer, variant):
    model = GPT(train.make_configs(TINY | dict(n_layer=2, vocab_size=11) | variant)[0])
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer=optimizer, weight_decay=0.3))
    groups = [(o, group) for o in optimizers for group in o.param_groups]
    grouped = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    for _, group in groups:
        assert all(group["weight_decay"] == (0.3 if p.dim() >= 2 else 0) for p in group["params"])
    in_muon = {id(p) for o, group in groups if isinstance(o, torch.optim.Muon) for p in group["params"]}
    matrices = {id(p) for block in model.blocks for p in block.parameters() if p.dim() == 2}
    assert in_muon == (matrices if optimizer == "muon" else set())


@both_optimizers
def test_weight_decay_shrinks_matrices_and_leaves_vectors_alone(optimizer):
    for decay in (0.0, 0.5):
        fit(out=f"decay{decay}", weight_decay=decay, max_steps=1, optimizer=optimizer, warmup_steps=0)
    without, decayed = weights("decay0.0/last.pt"), weights("decay0.5/last.pt")
    start = GPT(load_checkpoint("decay0.5/last.pt")[0].config)
    start.init_weights(0)
    for name, p in start.state_dict().items():
        expected = without[name] - (0.5 * TINY["learning_rate"] * p if p.dim() >= 2 else 0)
        torch.testing.assert_close(decayed[name], expected, atol=1e-7, rtol=1e-5)


def test_a_gradient_is_clipped_to_its_longest_and_zero_means_no_clipping():
    for clip in (0.0, 1e9, 1e-9):  # AdamW's eps of 1e-8 is all that makes the gradient's length matter
        fit(out=f"clip{clip}", grad_clip=clip, weight_decay=0.0)
    assert_same(dict(weights("clip0.0/last.pt")), dict(weights("clip1000000000.0/last.pt")))
    start = GPT(load_checkpoint("clip0.0/last.pt")[0].config)
    start.init_weights(0)
    clipped, free = (sum((p - start.state_dict()[name]).abs().sum() for name, p in weights(path).items())
                     for path in ("clip1e-09/last.pt", "clip0.0/last.pt"))
    assert 0 < clipped < 0.2 * free


# ------------------------------------------------------------------------------------------------------------
# Windows


def windows(n, T):
    return train.Windows(np.arange(n, dtype=np.uint16), 999, T, torch.device("cpu"))


def test_a_window_starts_with_bos_and_its_targets_are_the_next_tokens():
    idx, targets = windows(20, 5).at(np.array([0, 3, 15]))
    assert idx.tolist() == [[999, 0, 1, 2, 3], [999, 3, 4, 5, 6], [999, 15, 16, 17, 18]]
    assert targets.tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [15, 16, 17, 18, 19]]


def test_windows_reach_from_the_first_token_to_the_last_and_no_further():
    offsets = windows(20, 5).random(0, 0, 2000)
    assert sorted(set(offsets.tolist())) == list(range(16))
    assert windows(20, 5).spaced(4).tolist() == [0, 5, 10, 15]
    assert windows(20, 5).at(windows(20, 5).spaced(2))[1][-1].tolist() == [15, 16, 17, 18, 19]
    assert windows(5, 5).random(0, 0, 3).tolist() == windows(5, 5).spaced(3).tolist() == [0, 0, 0]


def test_the_windows_of_a_step_can_be_had_again_on_their_own():
    w = windows(1000, 5)
    drawn = {(seed, step): tuple(w.random(seed, step, 8)) for seed in (0, 1, 2) for step in range(5)}
    assert len(set(drawn.values())) == 15
    assert all(tuple(windows(1000, 5).random(*key, 8)) == offsets for key, offsets in drawn.items())


def test_a_window_longer_than_the_data_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="4 tokens.*block_size=5"):
        windows(4, 5)
    tokens = prepare.load("tiny")[0]["val"]["tokens"]
    with pytest.raises(ValueError, match=rf"val.bin.* {tokens} tokens.*block_size={tokens + 1}"):
        fit(block_size=tokens + 1)


# ------------------------------------------------------------------------------------------------------------
# Data


def test_data_that_is_missing_names_the_command_that_makes_it(here):
    with pytest.raises(FileNotFoundError, match="python data/prepare.py shakespeare"):
        fit(data="shakespeare")  # it needs a download, so it is not fetched unasked
    with pytest.raises(FileNotFoundError, match="nothing.*python data/prepare.py"):
        fit(data="nothing")
    assert os.listdir(here) == []


@pytest.mark.parametrize("name, options", [("backcopy", dict(chars=3000)), ("python", {})])
def test_data_that_needs_no_download_is_prepared_on_the_way(name, options, here, use_data, monkeypatch):
    (here / "data").mkdir()
    shutil.copy(prepare.DATA / "bpe2k.tiktoken", here / "data")
    use_data(here / "data")
    small = {here / f"{i}.py": f"text = {i}\n" * 20 for i in range(40)}  # the standard library has 11 MB
    monkeypatch.setattr(prepare, "stdlib_texts", lambda: small)
    monkeypatch.setitem(prepare.SETS, name, partial(prepare.SETS[name], **options))
    assert len(fit(data=name)) == 2
    made = (here / "data" / name / "meta.json").stat().st_mtime_ns
    assert os.listdir("out") == [f"{name}-g1"]
    fit(data=name)
    assert (here / "data" / name / "meta.json").stat().st_mtime_ns == made  # once is enough


def test_the_vocabulary_is_the_datas_unless_said_and_one_too_small_is_refused():
    fit(out="run")
    assert load_checkpoint("run/last.pt")[0].config.vocab_size == 257
    fit(out="larger", vocab_size=300)
    assert load_checkpoint("larger/last.pt")[0].embed.weight.shape == (300, 16)
    with pytest.raises(ValueError, match="vocab_size=256 .*257.*tiny"):
        fit(vocab_size=256)


def test_bits_per_byte_are_nats_over_ln_2_times_tokens_per_byte():
    for name in ("words", "tiny"):
        meta, splits = prepare.load(name)
        tokens, encoding = splits["val"].tolist(), prepare.get_tokenizer(meta["tokenizer"])
        size = len(encoding.decode_bytes([token for token in tokens if token != meta["bos"]]))
        row = fit(data=name)[-1]
        assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2) * len(tokens) / size)
        assert (len(tokens) < 0.8 * size) == (name == "words")


def test_where_the_number_of_bytes_is_unknown_bits_per_byte_are_nan(here, use_data, data_root):
    shutil.copytree(data_root / "tiny", here / "data" / "tiny")
    meta = json.loads((here / "data/tiny/meta.json").read_text())
    meta["val"]["bytes"] = None  # as when GPT-2's tokens are prepared without a network
    (here / "data/tiny/meta.json").write_text(json.dumps(prepare.signed(meta)))
    use_data(here / "data")
    assert all(math.isnan(row["bits_per_byte"]) and row["val_loss"] > 0 for row in fit())


# ------------------------------------------------------------------------------------------------------------
# The log, the folder, the checkpoints


def test_the_log_has_the_columns_that_were_promised_and_its_rows_are_the_log_that_is_returned():
    log = fit(out="run", attn_share=True, n_layer=2)
    with open("run/log.csv", newline="") as file:
        columns, *rows = csv.reader(file)
    assert columns == ["step", "train_loss", "val_loss", "bits_per_byte", "tokens_per_second",
                       "first_token_share", "uniform_share", "gate_score", "max_activation"]
    assert [row[0] for row in rows] == ["3", "6"]
    for texts, row in zip(rows, log, strict=True):
        assert_same([float(text) for text in texts], [float(row[name]) for name in columns])


def test_with_experts_the_log_also_says_how_evenly_they_are_visited():
    log = fit(out="run", attn_share=True, n_expert=2)
    with open("run/log.csv", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["max_expert_load"]) == log[-1]["max_expert_load"]


def test_a_row_holds_the_mean_over_layers_beside_the_floor_and_nan_for_what_was_not_measured():
    row = fit(attn_share=True, n_layer=2)[-1]
    assert len(row["layers"]) == 2 and row["uniform_share"] == pytest.approx(uniform_share(8))
    for name in ("first_token_share", "gate_score", "max_activation"):
        assert row[name] == pytest.approx(sum(layer[name] for layer in row["layers"]) / 2)
    assert math.isnan(row["max_expert_load"])
    assert math.isnan(fit(attn_share=True, gate="none")[-1]["gate_score"])
    assert fit(attn_share=True, n_expert=2)[-1]["max_expert_load"] >= 1
    row = fit()[-1]
    assert "layers" not in row
    assert all(math.isnan(row[name]) for name in ("first_token_share", "uniform_share", "gate_score"))


@pytest.mark.parametrize("fields", [dict(), dict(attn_share=True), dict(attn_share=True, n_expert=2),
                                    dict(attn_share=True, gate="none")], ids=str)
def test_an_evaluation_is_one_line_under_its_headings_and_80_columns_are_enough(fields, capsys):
    train.train(*train.make_configs(TINY | fields))
    said = capsys.readouterr().out
    table = said[re.search(r"^ +step +train ", said, re.M).start():].splitlines()
    assert len(table) == 3 and len({len(text) for text in table}) == 1 and len(table[0]) <= 80
    assert len({len(text.split()) for text in table}) == 1
    assert [text.split()[0] for text in table[1:]] == ["3", "6"]
    assert "nan" not in said and ("share" in table[0]) == ("attn_share" in fields)


def test_what_was_chosen_is_said_first_and_why(capsys):
    train.train(*train.make_configs(TINY | dict(device="auto" if not torch.cuda.is_available() else "cpu")))
    said = capsys.readouterr().out
    for what in ("device", "dtype", "compile", "model", "data", "steps", "run"):
        assert re.search(rf"^{what} +\S+", said, re.M), what
    gate = 16 * 16
    assert re.search(rf"gate g1, [\d,]+ parameters, {gate:,} in gates", said)
    assert "tiny" in said and "out/tiny-g1" in said and "float32" in said


def test_a_quiet_run_prints_nothing(capsys):
    fit(attn_share=True)
    assert capsys.readouterr() == ("", "")


def test_a_run_goes_to_a_folder_of_its_data_and_gate_numbered_if_taken(here):
    for fields in (dict(), dict(), dict(gate="none"), dict(gate_kind="headwise"), dict()):
        fit(max_steps=1, **fields)
    assert sorted(os.listdir("out")) == ["tiny-g1", "tiny-g1-2", "tiny-g1-3", "tiny-g1-headwise", "tiny-none"]
    for run in os.listdir("out"):
        assert sorted(os.listdir(f"out/{run}")) == ["best.pt", "last.pt", "log.csv"]


def test_a_folder_that_holds_a_run_needs_resume_or_overwrite():
    fit(out="run")
    before = Path("run/last.pt").read_bytes()
    with pytest.raises(ValueError, match="run holds a run already.*--resume.*--overwrite"):
        fit(out="run")
    assert Path("run/last.pt").read_bytes() == before
    log = fit(out="run", overwrite=True, gate="none", max_steps=2)
    model, state = load_checkpoint("run/last.pt")
    assert model.config.gate == "none" and state["step"] == 2 and len(rows_of("run/log.csv")) == len(log) == 1


def test_an_empty_folder_and_one_with_other_files_may_be_used(here):
    (here / "run").mkdir()
    (here / "run" / "notes.txt").write_text("mine")
    fit(out="run")
    assert (here / "run" / "notes.txt").read_text() == "mine"


def test_overwriting_leaves_nothing_of_the_run_before_even_when_stopped_before_the_first_evaluation():
    fit(out="run", gate="g2")
    interrupt(1, out="run", gate="none", overwrite=True)
    files = [name for name in os.listdir("run") if name.endswith(".pt")]
    assert files and all(load_checkpoint(f"run/{name}")[0].config.gate == "none" for name in files)
    assert not Path("run/log.csv").exists() or rows_of("run/log.csv") == []


def test_overwriting_refused_for_another_reason_leaves_the_run_before_as_it_was():
    fit(out="run")
    before = {name: Path("run", name).read_bytes() for name in os.listdir("run")}
    for wrong in (dict(data="nothing"), dict(vocab_size=3), dict(block_size=10**6), dict(device="banana")):
        with pytest.raises((ValueError, OSError)):
            fit(out="run", overwrite=True, **wrong)
    assert {name: Path("run", name).read_bytes() for name in os.listdir("run")} == before


BUMPY = dict(eval_every=1, learning_rate=1.0, schedule="constant", warmup_steps=0)


def test_best_is_the_checkpoint_with_the_lowest_validation_loss_and_last_the_latest():
    for seed in range(20):  # so bumpy a run depends on how a processor rounds: find one that turns up
        log = fit(out=f"run{seed}", seed=seed, max_steps=10, **BUMPY)
        best = min(log, key=lambda row: row["val_loss"])
        if 1 < best["step"] < 10:
            break
    assert 1 < best["step"] < 10, "the test needs a run whose best step is neither its first nor its last"
    assert load_checkpoint(f"run{seed}/best.pt")[1]["step"] == best["step"]
    assert load_checkpoint(f"run{seed}/last.pt")[1]["step"] == 10


def test_what_is_not_of_a_run_is_not_overwritten():
    fit(out="run")
    Path("run/mine.pt").write_text("precious")
    fit(out="run", overwrite=True)
    assert Path("run/mine.pt").read_text() == "precious"
    with pytest.raises(ValueError, match="out='' is not a folder"):
        fit(out="", overwrite=True)


def test_a_folder_that_is_removed_while_a_run_goes_on_is_made_again():
    with at_forward(2, lambda: shutil.rmtree("run")):
        fit(out="run", max_steps=4, eval_every=2)
    assert load_checkpoint("run/last.pt")[1]["step"] == 4


def test_what_an_evaluation_found_is_saved_before_it_is_said():
    def say(text):
        if re.match(r" +2 ", text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        train.Run(*configs(out="run", max_steps=4, eval_every=2), say=say).loop(hide_bar=True)
    assert load_checkpoint("run/last.pt")[1]["step"] == 2


@pytest.mark.parametrize("change", [("step", None), ("step", "3"), ("train_config", []), ("tokenizer", 7),
                                    ("log", "abc"), ("optimizers", None), ("data", None)], ids=str)
def test_a_state_that_train_py_did_not_save_is_refused(change):
    fit(out="run", max_steps=2)
    model, state = load_checkpoint("run/last.pt")
    train.save_checkpoint("run/last.pt", model, state | dict([change]))
    Path("run/best.pt").unlink()
    refused = [partial(fit, out="run", max_steps=4, resume=True)]
    refused += [partial(sample.open_model, "run")] * (change[0] in sample.STATE)
    for reading in refused:
        with pytest.raises(ValueError, match=f"run/last.pt has no {change[0]} as train.py saves it"):
            reading()


@pytest.mark.parametrize("name, value", [("n_layer", 2.0), ("n_layer", True), ("tie_embeddings", "no"),
                                         ("rope_base", "10"), ("data", None), ("max_steps", "4")])
def test_a_notebook_is_told_of_a_value_of_another_type(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be of type"):
        train.make_configs({"vocab_size": 8, name: value})


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded():
    fit(out="run")
    model, state = load_checkpoint("run/last.pt")
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="run/last.pt is not written"):
        train.save_checkpoint("run/last.pt", model, state)
    content = torch.load("run/last.pt", weights_only=True)
    content["model"]["norm.weight"][3] = math.inf
    torch.save(content, "run/last.pt")
    with pytest.raises(ValueError, match="run/last.pt holds weights that are not finite"):
        load_checkpoint("run/last.pt")


def test_signals_are_handled_as_before_when_the_run_is_over():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    interrupt(2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_works_in_a_thread_too():
    logs = []
    thread = threading.Thread(target=lambda: logs.append(fit()))
    thread.start()
    thread.join()
    assert [row["step"] for row in logs[0]] == [3, 6]


# ------------------------------------------------------------------------------------------------------------
# A loss that explodes


def finite(path):
    return all(p.isfinite().all() for p in load_checkpoint(path)[0].parameters())


EXPLODE = dict(learning_rate=1e6, grad_clip=0.0, warmup_steps=0, schedule="constant")


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_loss_that_explodes_stops_the_run_with_step_learning_rate_and_what_to_try(grad_clip):
    losses = []
    with watching(lambda model, inputs, output: losses.append(output[1].item()) if model.training else None):
        with pytest.raises(FloatingPointError) as error:
            fit(out="run", max_steps=50, eval_every=100, **EXPLODE | dict(grad_clip=grad_clip))
    step = next(i for i, loss in enumerate(losses, 1) if not math.isfinite(loss))
    said = str(error.value)
    assert re.search(rf"step {step}\b", said) and re.search(r"1e\+?06", said), said
    assert re.search("nan|inf", said) and "--learning_rate" in said and "--warmup_steps" in said, said
    assert "no checkpoint" in said and os.listdir("run") == []


@pytest.mark.parametrize("eval_every", [1, 2, 3])
def test_when_the_loss_explodes_the_last_good_checkpoint_is_kept_and_named(eval_every):
    fit(out="run", max_steps=6, eval_every=6)
    with pytest.raises(FloatingPointError) as error:
        fit(out="run", max_steps=60, eval_every=eval_every, resume=True, **EXPLODE)
    files = [f"run/{name}" for name in os.listdir("run") if name.endswith(".pt")]
    assert files and all(finite(name) for name in files)
    (named,) = re.findall(r"run/\w+\.pt", str(error.value))
    claimed = re.findall(r"step (\d+)", str(error.value).split(named)[1])
    assert claimed in ([], [str(load_checkpoint(named)[1]["step"])])


def test_a_checkpoint_from_before_the_first_evaluation_is_kept_and_named_too():
    interrupt(2, out="run")
    with pytest.raises(FloatingPointError, match="run/last.pt"):
        fit(out="run", max_steps=60, eval_every=60, resume=True, **EXPLODE)
    assert finite("run/last.pt")


# ------------------------------------------------------------------------------------------------------------
# Number formats and compiling


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_in_bfloat16_the_products_are_rounded_and_the_weights_stay_float32():
    logits = []
    with watching(lambda model, inputs, output: logits.append(output[0].dtype)):
        log = fit(out="run", dtype="bfloat16", attn_share=True)
    assert torch.bfloat16 in logits and all(p.dtype == torch.float32 for p in weights().values())
    assert 0 < abs(log[-1]["val_loss"] - fit()[-1]["val_loss"]) < 0.05


def test_a_gpu_that_knows_float16_only_trains_in_float32_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    dtype, why = train.choose_dtype("auto", torch.device("cuda"))
    assert dtype == torch.float32 and "no bfloat16" in why and "float16" in why


@pytest.mark.parametrize("name, value", [("threads", 100_000), ("seed", 2**63), ("learning_rate", 1e308),
                                         ("vocab_size", 10**40)])
def test_numbers_that_no_machine_can_count_to_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* (below|more than)"):
        train.make_configs({"vocab_size": 8, name: value})


class Broken(Exception):
    """What the broken compilers of these tests raise."""


def broken_backend(message):
    def compile_graph(graph, inputs):
        raise Broken(message)
    return compile_graph


def breaks_at_once(message):
    def compile_nothing(model, **options):
        raise Broken(message)
    return compile_nothing


@pytest.mark.parametrize("message", ["no compiler\nand a long story of it", ""], ids=["story", "silent"])
@pytest.mark.parametrize("how", ["backend", "at once"])
def test_where_compiling_fails_one_line_says_so_and_the_run_is_the_uncompiled_one(how, message, monkeypatch,
                                                                                  capsys):
    torch._dynamo.reset()  # after many models in one process it would not even try
    fit(**WHOLE | dict(out="plain"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", breaks_at_once(message) if how == "at once" else
                      partial(torch.compile, backend=broken_backend(message)))
        train.train(*train.make_configs(TINY | WHOLE | dict(compile=True)))
    torch._dynamo.reset()
    assert_same(checkpoint("run/last.pt"), checkpoint("plain/last.pt"))
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("compile")]
    assert len(said) == 1 and "fail" in said[0]


def test_a_compiled_run_has_nearly_the_losses_of_an_uncompiled_one(monkeypatch, capsys):
    # Traced and differentiated as for any backend, but run by PyTorch: C++ would take a minute to compile.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fields = WHOLE | dict(batch_size=5, max_steps=3, eval_every=1, eval_windows=12)
    plain = fit(**fields | dict(out="plain"))
    train.train(*train.make_configs(TINY | fields | dict(compile=True)))
    torch._dynamo.reset()
    assert re.search(r"^compile +on$", capsys.readouterr().out, re.M)
    for a, b in zip(plain, load_checkpoint("run/last.pt")[1]["log"], strict=True):
        for name in ("train_loss", "val_loss", "first_token_share", "gate_score"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


# ------------------------------------------------------------------------------------------------------------
# Flags and presets


FIELDS = [f for cls in (train.TrainConfig, GPTConfig) for f in dataclasses.fields(cls)]


def configs_of(*argv):
    config, c, why = train.configs_from(train.parse_flags(argv))
    return dataclasses.asdict(config) | dataclasses.asdict(c), why


def test_every_field_is_a_flag_with_a_group_a_line_of_help_and_a_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_flags(["--help"])
    assert end.value.code == 0
    head, *groups = re.split(r"\n\n(?=[\w ]+:\n  -)", capsys.readouterr().out)
    entries = {}
    for group in groups:
        title, text = group.split(":\n", 1)
        for entry in re.split(r"\n(?=  -)", text):
            entries[re.search(r"--(\w+)", entry)[1]] = (title, " ".join(entry.split()))
    assert set(entries) == {f.name for f in FIELDS} | {"help", "preset"}
    for f in FIELDS:
        title, entry = entries[f.name]
        assert title in ("run", "optimisation", "evaluation", "machine", "model", "gate",
                         "mixture of experts")
        default = {True: "on", False: "off"}[f.default] if isinstance(f.default, bool) else f.default
        assert f"[{default}]" in entry if default is not None else re.search("default|unsaid", entry), entry
        assert re.search(r"[a-z]", re.sub(r"--[\w-]+( [A-Z]+\b| \{.*?\})?,?|\[.*?\]", "", entry)), entry


def test_every_preset_is_a_table_of_known_fields_that_makes_sense():
    assert set(train.PRESETS) == {"laptop", "gpu", "sink", "gpt2"}
    for name, table in train.PRESETS.items():
        assert set(table) <= {f.name for f in FIELDS}, name
        values, why = configs_of(f"--preset={name}")
        assert {field: values[field] for field in table} == table
        assert why.split()[:2] == ["preset", name]
        assert table.get("attn_share", False) == (name != "gpt2")


def test_flags_override_the_preset_and_the_preset_the_defaults():
    values, _ = configs_of("--preset=sink", "--max_steps=7", "--gate=none", "--no-attn_share")
    assert (values["max_steps"], values["gate"], values["attn_share"]) == (7, "none", False)
    assert values["data"] == "backcopy" and values["grad_clip"] == train.TrainConfig().grad_clip
    values, _ = configs_of("--preset=laptop", f"--seed={train.TrainConfig().seed}", "--n_layer=4")
    assert values["n_layer"] == 4
    defaults = [f"--{f.name}={f.default}" for f in FIELDS if f.name in train.PRESETS["gpt2"] and f.default
                and not isinstance(f.default, bool)]
    values, _ = configs_of("--preset=gpt2", *defaults)  # a flag overrides even with the default's own value
    assert len(defaults) > 5
    assert all(values[f.name] == f.default for f in FIELDS if f"--{f.name}={f.default}" in defaults)


@pytest.mark.parametrize("cuda, preset", [(False, "laptop"), (True, "gpu")])
def test_the_preset_is_gpu_with_cuda_and_laptop_without_and_says_why(cuda, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    values, why = configs_of()
    assert {name: values[name] for name in train.PRESETS[preset]} == train.PRESETS[preset]
    assert why.split()[:2] == ["preset", preset] and ("cuda" if cuda else "cpu") in why


def test_a_cpu_that_is_asked_for_gets_the_laptop_preset_on_a_machine_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values, _ = configs_of("--device=cpu")
    assert {name: values[name] for name in train.PRESETS["laptop"]} == train.PRESETS["laptop"]


@pytest.mark.parametrize("flag", [dict(weight_decay=0.3), dict(beta1=0.8), dict(optimizer="muon")])
def test_a_resumed_run_does_not_take_another_optimizer_without_a_word(flag):
    fit(out="run")
    with pytest.raises(ValueError, match=next(iter(flag))):
        fit(out="run", max_steps=9, resume=True, **flag)


def test_the_sink_preset_is_the_recipe_that_was_measured():
    values, _ = configs_of("--preset=sink")
    recipe = dict(data="backcopy", n_layer=1, n_head=2, n_embd=64, block_size=64, batch_size=32,
                  max_steps=3000, optimizer="adamw", learning_rate=3e-3, beta1=0.9, beta2=0.98,
                  weight_decay=0.0, grad_clip=1.0, warmup_steps=100, schedule="constant", qk_norm=True,
                  dropout=0.0)
    assert {name: values[name] for name in recipe} == recipe


@pytest.mark.parametrize("argv, value", [(["--compile"], True), (["--no-compile"], False), ([], None)])
def test_compile_is_on_off_or_left_to_the_device(argv, value):
    assert configs_of(*argv)[0]["compile"] is value


@pytest.mark.parametrize("argv, named", [
    (["--gate=g9"], ["--gate", "g9", "none", "g1", "g2", "g3", "g4", "g5"]), (["--data"], ["--data"]),
    (["--max_step=3"], ["--max_step=3"]), (["--stop"], ["--stop"]), (["more"], ["more"]),
    (["--preset=moon"], ["moon", "laptop", "gpu", "sink", "gpt2"]),
    (["--optimizer=sgd"], ["adamw", "muon"]),
    (["--n_layer=two"], ["--n_layer", "two"]), (["--learning_rate=fast"], ["fast"]),
    (["--resume=yes"], ["--resume"]),
], ids=str)
def test_a_flag_that_is_unknown_or_shortened_or_has_a_wrong_value_is_refused(argv, named, capsys):
    assert status_of(argv) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in named), said


@pytest.mark.parametrize("name, value", [
    ("max_steps", 0), ("batch_size", 0), ("grad_accum", -1), ("eval_every", 0), ("eval_windows", 0),
    ("threads", 0), ("warmup_steps", -1), ("seed", -1), ("learning_rate", -1.0), ("learning_rate", math.nan),
    ("weight_decay", -0.1), ("beta1", 1.0), ("beta2", 1.5), ("grad_clip", math.inf), ("min_lr_ratio", -1.0),
    ("n_layer", 0), ("n_embd", -16), ("dropout", 1.0), ("block_size", 1), ("head_dim", 7), ("n_head", 3)])
def test_a_number_that_cannot_be_is_refused_with_its_name_and_value(name, value, capsys, here):
    assert status_of(flags(**{name: value})) == 2
    said = capsys.readouterr().err
    assert f"{name}={value}" in said and "Traceback" not in said and len(said.splitlines()) == 1, said
    assert os.listdir(here) == []


@pytest.mark.parametrize("name, value", [("schedule", "linear"), ("optimizer", "sgd"),
                                         ("dtype", "float16")])
def test_a_notebook_gets_the_message_about_choices_too(name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}' is not one of "):
        train.TrainConfig(**{name: value})


def test_a_device_that_is_not_there_is_refused_by_name(here):
    for device in ("banana", "cuda:99"):
        with pytest.raises(ValueError, match=f"device={device}"):
            fit(device=device)


# ------------------------------------------------------------------------------------------------------------
# The command line, from its start to its end


def test_a_run_ends_with_its_best_loss_a_table_a_sample_and_the_command_to_go_on(capsys):
    assert status_of([*flags(n_layer=2), "--attn_share"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("preset   ")
    log = load_checkpoint("out/tiny-g1/last.pt")[1]["log"]
    best = min(log, key=lambda row: row["val_loss"])
    end = said[said.index("best val loss"):]
    for what in (f"{best['val_loss']:.4f}", f"{best['bits_per_byte']:.4f}", f"step {best['step']}"):
        assert what in end
    assert re.search(r"^ +0 .*\n +1 ", end, re.M) and f"{uniform_share(8):.3f}" in end  # the table per layer
    assert "a sample from out/tiny-g1/best.pt" in end
    (command,) = re.findall(r"python (sample\.py .*)", end)
    assert status_of([*shlex.split(command)[1:], "--tokens=3"], sample.main) == 0
    assert "tiny" in capsys.readouterr().out.splitlines()[0]


def test_the_printed_commands_work_for_a_folder_with_a_space_in_its_name(capsys):
    status_of(flags(out="my run"))
    (command,) = re.findall(r"python (sample\.py .*)", capsys.readouterr().out)
    assert status_of([*shlex.split(command)[1:], "--tokens=3"], sample.main) == 0
    with at_forward(2, partial(signal.raise_signal, signal.SIGINT)):
        assert status_of(flags(out="my other run")) == 130
    (command,) = re.findall(r"python (train\.py .*)", capsys.readouterr().err)
    assert status_of(shlex.split(command)[1:]) == 0


def test_a_loss_that_explodes_ends_the_command_with_a_sentence_and_status_2(capsys):
    assert status_of(flags(**EXPLODE, max_steps=50)) == 2
    said = capsys.readouterr().err
    assert "--learning_rate" in said and "Traceback" not in said


# ------------------------------------------------------------------------------------------------------------
# Real processes, in a copy of the project


@pytest.fixture
def project(here, data_root):
    """A copy of the project, with the small set in its data/."""
    for name in ("train.py", "sample.py", "gated_gpt.py", "data/prepare.py", "data/released_tokenizer.py",
                 "data/bpe2k.tiktoken"):
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, here / name)
    shutil.copytree(data_root / "tiny", here / "data" / "tiny")
    return here


def start(words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            encoding="utf-8", env=environment)


def stop_when(process, pattern, number):
    """Send a signal once a line of the output matches; the output, the errors and the exit status."""
    said = ""
    for text in process.stdout:
        said += text
        if re.search(pattern, text):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    return said + out, err, process.returncode


LONG = flags(max_steps=10**6, eval_every=20)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
def test_ctrl_c_saves_and_ends_with_a_command_that_resumes_and_so_does_sigterm(project):
    out, err, status = stop_when(start(["train.py", *LONG]), r"^ +20 ", signal.SIGINT)
    assert status == 130 and "Traceback" not in err, err
    step = load_checkpoint("out/tiny-g1/last.pt")[1]["step"]
    assert f"stopped at step {step} and saved" in err
    (command,) = re.findall(r"python (train\.py .*)", err)
    out, err, status = stop_when(start(shlex.split(command)), r"^ +\d+ ", signal.SIGTERM)
    assert status == 130 and "Traceback" not in err and f"resumed at step {step}" in out, err
    later = load_checkpoint("out/tiny-g1/last.pt")[1]["step"]
    assert later > step and f"stopped at step {later} and saved" in err


def test_a_mistake_ends_the_process_with_one_sentence_and_status_2(project):
    process = start(["train.py", "--data=nothing"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith("train.py: ") and len(err.splitlines()) == 1
    assert "python data/prepare.py" in err


@pytest.mark.parametrize("idle, threads", [(0, 1), (30, 3), (100, 8)], ids=["busy", "a third", "quiet"])
def test_a_run_takes_the_cores_that_are_idle(monkeypatch, idle, threads):
    """On 10 cores, of which torch would take 8; /proc/stat counts ticks of work, of nothing, and so on."""
    stat = iter([f"cpu {5 + work} 0 5 {1000 + rest} 0 0\ncpu0 1 1 1 1\n"
                 for work, rest in ((0, 0), (100 - idle, idle))])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(train, "open", lambda path: io.StringIO(next(stat)), raising=False)
    assert train.choose_threads(None) == threads
    assert train.choose_threads(5) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert train.choose_threads(None) == 8
