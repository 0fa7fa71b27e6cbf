"""Claims about the comparison: the paper's rows at fair sizes, numbers that follow rules, runs that go on."""
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refusal, status_of
from PIL import Image

import train
from data import prepare
from experiments import compare_gates as lab
from experiments import cures, figures, late_gate, learning_rates, long_context, movie, runner
from gated_gpt import GPT, GPTConfig, measure, uniform_share
from plumbing import checkpoint

TINY = ("--n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=16 --block_size=16 --batch_size=2 --eval_windows=4 "
        "--seeds=1 --steps=2").split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with small sets of the tasks. `python` is Python's standard library in name only."""
    root = tmp_path_factory.mktemp("sets")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA", root)
        prepare.prepare_backcopy(chars=20_000)
        prepare.prepare_recall(chars=20_000)
        text = prepare.encode(prepare.split_each([(ROOT / "train.py").read_text() * 3]), "bpe2k")
        prepare.write_set("python", "bpe2k", "train.py, three times", text)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, small, use_data):
    """An empty folder to work in, where `backcopy` is the small set."""
    monkeypatch.chdir(tmp_path)
    use_data(small)
    return tmp_path


def compare(*flags):
    """What compare_gates.py prints with these flags at the tiny size."""
    status, out, err = status_of(lab.main, [*TINY, *flags])
    assert status == 0, err
    return out


def table(path):
    return {row["variant"]: row for row in runner.read_csv(path)}


def job(**changes):
    """A run of the tiny comparison."""
    _, _, recipe = lab.parse_flags(TINY)
    base, c = train.make_configs(lab.TASKS["backcopy"] | recipe | dict(
        vocab_size=257, gate="none", max_steps=40, eval_every=10) | changes)
    return runner.plan("compare-backcopy", {"none": (base, c)}, [0], lab.closer_look)[0]


# ---- the variants ----------------------------------------------------------------------------------


def added(C, nh, nkv, hs, E):
    """What each row adds to one layer of the baseline, by the paper's definitions: hidden size C, nh query
    and nkv key/value heads of hs channels, experts of width E."""
    parameters = {
        "none sdpa-silu softmax1 softpick": 0, "sink": nh,
        "kv-heads": 2 * C * nkv * hs,  # keys and values of as many heads again
        "q-heads": 2 * C * (nh // 2) * hs,  # W_Q and W_O of half as many heads again
        # Shared is no smaller: it is the scores that are averaged.
        "g1 g4 g1-shared g1-add-silu g1-silu g1-add-identity g1-ns-sigmoid": C * nh * hs,
        "g2 g3 g2-shared": C * nkv * hs, "g5": C * C, "g1-headwise": C * nh, "g2-headwise": C * nkv,
        "g1-no-input": nh * hs, "sdpa-norm": hs, "sandwich": 2 * C,
        "moe": 8 * C + 6 * 3 * C * E,  # a router; 8 experts, 2 of them the old MLP
        "moe-experts": 9 * C + 7 * 3 * C * E, "moe-g1": 8 * C + 6 * 3 * C * E + C * nh * hs}
    return {name: count for names, count in parameters.items() for name in names.split()}


BASE = GPTConfig(vocab_size=2048, gate="none", n_layer=3, n_head=4, n_kv_head=2, n_embd=96, mlp_hidden=256,
                 tie_embeddings=True)


@pytest.mark.parametrize("name", lab.VARIANTS)
def test_each_variant_adds_the_parameters_that_the_paper_says(name):
    C, L, H = BASE.n_embd, BASE.n_layer, BASE.mlp_hidden
    nh, nkv, hs, E = BASE.n_head, BASE.n_kv_head, BASE.head_dim, H // 2
    dense = 2048 * C + C + L * (2 * C * (nh + nkv) * hs + 2 * hs + 3 * C * H + 2 * C)
    config = lab.configs_of([name], BASE, match_params=False)[name]
    assert GPT(config).num_params() == runner.count(config) == dense + L * added(C, nh, nkv, hs, E)[name]


@pytest.mark.parametrize("task", lab.TASKS)
def test_dense_variants_have_the_baselines_size_to_half_a_percent(task):
    base, _ = train.make_configs(lab.TASKS[task] | {"gate": "none", "vocab_size": 257})
    configs = lab.configs_of(lab.VARIANTS, base, say=lambda text: None)
    sizes = {name: GPT(config).num_params() for name, config in configs.items()}
    for name, size in sizes.items():
        if lab.VARIANTS[name].pair == "none":
            assert abs(size / sizes["none"] - 1) < 0.005, name
    expert = GPT(configs["moe"]).blocks[0].mlp.experts[0]
    assert 2 * expert.up_proj.out_features == base.mlp_hidden  # active: as many as in the dense MLP


def test_variants_cover_the_papers_tables_with_their_numbers():
    rows = [v.row for v in lab.VARIANTS.values()]
    assert {f"Table 1 #{n}" for n in range(1, 16)} <= set(rows)
    assert rows.count("Table 3") == 3 and rows.count("Table 4") == 2  # beyond those in Table 1
    for name, numbers in {
            "none": (math.nan, 1053, .467, 6.026), "g1": (.116, 94, .048, 5.761),
            "g1-headwise": (.172, 98, .073, 5.792), "g1-shared": (.271, 286, .301, 5.801),
            "g2": (.221, 125, .297, 5.820),
            "g1-no-input": (.335, 471, .364, 5.917), "g1-ns-sigmoid": (.653, 892, .451, 5.900)}.items():
        v = lab.VARIANTS[name]
        assert (v.score, v.m_act, v.share, v.ppl) == pytest.approx(numbers, nan_ok=True), name


def test_a_variant_that_makes_no_sense_is_left_out_and_said():
    said = []
    configs = lab.configs_of(["kv-heads", "g1"], dataclasses.replace(BASE, n_kv_head=4), say=said.append)
    assert list(configs) == ["none", "g1"]  # and the baseline comes along unasked
    assert len(said) == 1 and said[0].startswith("kv-heads is left out") and "n_kv_head=2" in said[0]


# ---- the whole comparison --------------------------------------------------------------------------


def test_all_variants_train_and_are_tabled_and_drawn(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder, task: [])  # once is enough, below
        screen = compare("--results=results")
    rows, text = table(here / "results/backcopy.csv"), (here / "results/backcopy.md").read_text()
    assert list(rows) == list(lab.VARIANTS)
    for name, row in rows.items():
        assert f"\n| {name} | {int(row['parameters']):,} | {row['val_loss']:.4f} |" in text
        assert f"\n{name} " in screen
        assert 0 < row["share"] < 1 and row["floor"] == pytest.approx(uniform_share(16), rel=1e-4)
        assert math.isnan(row["gate_score"]) == (lab.configs_of([name], BASE)[name].gate == "none")
    assert max(map(len, screen.splitlines())) <= 80
    assert "python experiments/compare_gates.py --n_layer=2" in text and torch.__version__ in text

    runs = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("done.json")}
    assert status_of(lab.main, ["--results=results", "--from_results"])[0] == 0
    drawn = {path.name: path.stat().st_size for path in (here / "results").glob("*.png")}
    names = ("layers", "loss", "maps", "scores", "share", "sink")
    assert sorted(drawn) == [f"backcopy_{name}.png" for name in names]
    assert min(drawn.values()) > 5000
    assert {path: path.stat().st_mtime_ns for path in (here / "out").rglob("done.json")} == runs
    assert sum(path.stat().st_size for path in (here / "results").iterdir()) < 1e6


def test_a_variant_is_one_row(here, monkeypatch):
    monkeypatch.setitem(lab.VARIANTS, "mine", lab.Variant(dict(gate="g2", gate_act="identity")))
    screen = compare("--variants=mine")
    assert "\nmine " in screen and "\nout/compare-backcopy/backcopy_share.png\n" in screen
    assert (here / "out/compare-backcopy/backcopy_share.png").exists()
    row = table(here / "out/compare-backcopy/backcopy.csv")["mine"]
    assert row["pair"] == "none" and row["paper_row"] == "" and math.isfinite(row["difference"])


def test_finished_runs_are_kept_and_another_recipe_is_not_mixed_in(here):
    compare("--variants=none")
    first = {path: path.stat().st_mtime_ns for path in here.rglob("done.json")}
    assert "1 of 2 runs are done already" in compare("--variants=none,g1")
    assert all(path.stat().st_mtime_ns == before for path, before in first.items())
    assert "done already" not in compare("--variants=none,g1", "--learning_rate=0.01")
    assert len(list(here.rglob("done.json"))) == 4
    assert {row["seeds"] for row in table(here / "out/compare-backcopy/backcopy.csv").values()} == {1}


def test_what_decides_a_run_decides_its_folder(here):
    folder = job().folder
    assert folder == job(threads=3).folder
    for change in (dict(max_steps=50), dict(n_embd=32), dict(weight_decay=0.5)):
        assert job(**change).folder != folder, change
    file, prints = here / "model.py", []
    for text in ('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n',
                 "def f(x): return x + 1  # more\n", "def f(x): return x + 2\n"):
        file.write_text(text)
        prints.append(runner.code_of(file))
    assert prints[0] == prints[1] != prints[2]


def test_a_broken_off_run_goes_on_and_ends_as_if_it_had_not_been(here):
    whole, broken = job(), job()._replace(folder=here / "broken")
    runner.one_run(whole)

    def interrupt(text):
        if text.strip().startswith("20 "):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        runner.one_run(broken, interrupt)
    assert broken.steps() in (20, 21) and not broken.done.exists()
    runner.one_run(broken)
    first, second = (json.loads(j.done.read_text()) for j in (whole, broken))
    losses = {row["step"]: row["val_loss"] for row in first["log"]}
    assert losses.items() <= {row["step"]: row["val_loss"] for row in second["log"]}.items()
    assert first["maps"] == second["maps"]
    model, content = checkpoint.load(broken.folder / "last.pt")  # its weights can be looked at afterwards
    assert content["step"] == 40 and not content["optimizers"] and model.config == broken.config


def test_a_run_that_was_killed_between_two_of_its_files_goes_on(here):
    """Between its last checkpoint and its results, or, in its first save, between best.pt and last.pt."""
    done = job()
    runner.one_run(done)
    result = json.loads(done.done.read_text())
    for missing in (["done.json"], ["done.json", "last.pt", "log.csv"]):
        for name in missing:
            (done.folder / name).unlink()
        runner.one_run(done)
        again = json.loads(done.done.read_text())
        assert again["maps"] == result["maps"] and len(again["log"]) == len(result["log"]) == 4, missing


def test_a_run_that_diverges_is_said_and_stops_no_other(here):
    too_fast = "--learning_rate=1e9 --warmup_steps=0 --grad_clip=0 --steps=6".split()
    text = compare("--variants=none,g1", *too_fast)
    assert "none: 1 of 1 runs diverged" in text and "g1: 1 of 1 runs diverged" in text
    written = (here / "out/compare-backcopy/backcopy.md").read_text()
    assert re.search(r"\n\| g1 \| [\d,]+ \| - \| - \|  \| - \| - \| 1 \| - \|", written)


def test_a_run_that_diverges_late_keeps_its_log(here, monkeypatch):
    monkeypatch.setattr(train, "learning_rate_at", lambda step, c: 1e-3 if step < 25 else 1e30)
    runner.one_run(late := job(grad_clip=0.0))
    result = json.loads(late.done.read_text())
    assert "not finite" in result["diverged"] and [row["step"] for row in result["log"]] == [10, 20]


@pytest.mark.parametrize("flags, message", [
    ("--variants=g1,g9", "variants=g1,g9: 'g9' is none of none, kv-heads"),
    ("--seeds=0", "seeds=0 must be at least 1"), ("--task=nothing", "there is no data set nothing"),
    ("--n_head=3", "is not a multiple of"),
    ("--results=nowhere --from_results", "compare_gates.py --task=backcopy makes it")])
def test_mistakes_are_told_in_one_sentence(here, flags, message):
    assert message in refusal(lab.main, [*TINY, *flags.split()])


def test_a_trial_does_not_replace_the_recorded_results():
    flags, *_ = lab.parse_flags(["--task=python", "--jobs=2", "--seeds=3", "--threads=1"])
    assert flags.results == runner.RESULTS
    for flag in ("--variants=g1", "--steps=5", "--seeds=2", "--no-match_params", "--n_embd=32"):
        assert lab.parse_flags([flag])[0].results == Path("out/compare-backcopy"), flag


def test_runs_side_by_side_are_stopped_by_ctrl_c_and_go_on(here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--jobs=2", "--variants=g1", "--eval_every=50", "--steps=1000"]
    command = [sys.executable, ROOT / "experiments/compare_gates.py", *TINY, *flags]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    while process.poll() is None and not list(here.rglob("last.pt")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the children, too
    # No child is left, for each holds an end of the pipes, and communicate waits until all are closed.
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "of 2 runs are done; the same command goes on" in err, err
    assert "Traceback" not in err
    stopped = [checkpoint.load(file)[1]["step"] for file in here.rglob("last.pt")]
    assert stopped and all(0 < step < 1000 for step in stopped)
    assert "g1 " in compare(*flags)
    assert len(list(here.rglob("done.json"))) == 2 == len(list(here.glob("out/*/*/")))


# ---- the numbers -----------------------------------------------------------------------------------


def finished(*losses, share=0.5):
    """What one_run might have written, for runs with these final losses."""
    layer = dict(first_token_share=share, late_first_token_share=share / 2)
    return [{"log": [dict(val_loss=loss, first_token_share=share, gate_score=math.nan, max_activation=1.0,
                          max_expert_load=math.nan, tokens_per_second=100.0, layers=[layer])]}
            for loss in losses]


def row_of(none, g1):
    runs = {"none": none, "g1": g1}
    results = {(name, seed): run for name in runs for seed, run in enumerate(runs[name])}
    return lab.summary("g1", BASE, results)


def test_differences_are_paired_by_seed():
    row = row_of(finished(1.0, 2.0, 3.0), finished(0.9, 1.9, 2.8))  # noisy losses, steady differences
    assert row["difference"] == pytest.approx(-0.4 / 3)
    assert row["difference_sd"] == pytest.approx(0.057735, rel=1e-4)
    assert row["difference_se"] == pytest.approx(0.057735 / math.sqrt(3), rel=1e-4)
    assert row["val_loss_sd"] == pytest.approx(0.950438, rel=1e-4) and row["noise"] == ""


def test_a_difference_below_twice_its_standard_error_is_marked():
    assert row_of(finished(1.0, 1.0, 1.0), finished(0.8, 1.2, 0.9))["noise"] == "~"
    assert row_of(finished(1.0), finished(0.5))["noise"] == "~"  # one seed: the noise is not known
    assert runner.is_noise(-0.19, 0.1) and not runner.is_noise(-0.2, 0.1) and runner.is_noise(5.0, math.nan)


def test_a_diverged_seed_is_left_out_of_the_pairs():
    diverged = {"diverged": "the loss is nan", "log": []}
    row = row_of([*finished(1.0, 2.0), diverged], [*finished(1.5, 2.7), *finished(9.0)])
    assert row["difference"] == pytest.approx(0.6) and row["diverged"] == 0
    row = row_of(finished(1.0, 2.0), [diverged, *finished(2.5)])
    assert row["difference"] == pytest.approx(0.5) and row["diverged"] == 1 and row["val_loss"] == 2.5


def test_a_deviation_of_what_is_not_known_is_not_known():
    assert runner.deviation([1.0, 2.0, 3.0]) == 1
    assert all(math.isnan(runner.deviation(values)) for values in ([], [1.0], [math.nan, 1.0, 2.0]))


def test_the_late_floor_is_what_uniform_attention_gives():
    T = 64
    weights = torch.ones(T, T).tril()
    share = (weights / weights.sum(1, keepdim=True))[:, 0]
    assert lab.late_floor(T) == pytest.approx(share[T // 4 :].mean().item(), rel=1e-5)


# ---- the other experiments -------------------------------------------------------------------------


@pytest.mark.parametrize("script, rows", [
    (learning_rates, 6 * 7), (late_gate, 5), (cures, 2 * 5)], ids=lambda x: getattr(x, "__name__", None))
def test_an_experiment_trains_tables_and_draws(script, rows, here, monkeypatch):
    monkeypatch.setattr(learning_rates, "RATES", learning_rates.RATES[:2])
    rows = rows // 7 * 2 if script is learning_rates else rows
    status, out, err = status_of(script.main, ["--seeds=1", "--steps=2", "--results=results"])
    assert status == 0, err
    name = script.__name__.rpartition(".")[2]
    found = runner.read_csv(here / f"results/{name}.csv")
    assert len(found) == rows and (here / f"results/{name}.md").read_text() in out
    assert all(math.isfinite(row["val_loss"]) for row in found)
    pictures = [Path(word) for word in out.split() if word.endswith(".png")]
    assert pictures and all(path.stat().st_size > 5000 for path in pictures)


def test_long_windows_are_tried_with_each_task_variant_and_scaling(here, monkeypatch):
    for name, value in (("LONGER", (1, 2)), ("TOKENS", 256), ("BATCH", 128)):
        monkeypatch.setattr(long_context, name, value)
    status, out, err = status_of(long_context.main, ["--seeds=1", "--steps=2", "--results=results"])
    assert status == 0, err
    rows = runner.read_csv(here / "results/long_context.csv")
    assert len(rows) == 3 * 3 * (1 + 4) and {row["T"] for row in rows} == {64, 128}
    assert len(list((here / "results").glob("long_context_*.png"))) == 2
    assert all(0 < row["share"] < 1 for row in rows)


def test_a_spike_is_a_rise_of_a_tenth_above_the_five_points_before_and_a_plateau_counts_once():
    def of(*losses):
        return learning_rates.spikes([{"train_loss": loss} for loss in losses])

    assert of(3, 3, 3, 3, 3, 3.09) == 0 and of(3, 3, 3, 3, 3, 3.11) == 1
    assert of(3, 3, 3, 3, 3, 4, 4, 3, 3, 3, 3, 3, 3, 4) == 2
    assert of(9, 8, 7, 6, 5, 4, 3) == 0 and of(3, 3, 9) == 0


def test_recall_asks_only_for_letters_that_stood_in_the_window_and_counts_what_followed_them():
    text = "a1b2a1c3a1b7"
    idx = torch.tensor([[256, *text.encode()]])  # BOS first
    targets = torch.tensor([[*text.encode(), ord("x")]])
    logits = torch.zeros(1, 13, 257)
    for position, answer in ((9, "1"), (11, "3")):  # after the last a: right; after b: wrong, it had 2
        logits[0, position, ord(answer)] = 1
    assert long_context.asked("recall", logits, idx, targets).tolist() == [1.0, 0.0]


def test_the_score_of_bos_and_the_weight_of_the_rest_give_the_share():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=1, n_embd=16, gate="none"))
    idx = torch.randint(257, (1, 32))
    found = long_context.on_bos(model, idx)
    share = torch.sigmoid(torch.tensor(found["bos"]) - torch.tensor(found["others"])).mean().item()
    assert share == pytest.approx(measure(model, idx)[0]["first_token_share"], abs=1e-3)


def test_a_second_part_starts_where_the_first_ended_with_another_gate(here):
    status, out, err = status_of(late_gate.main, ["--seeds=1", "--steps=4", "--results=results"])
    assert status == 0, err
    first, later = ({job.name: checkpoint.load(job.folder / "last.pt") for job in jobs}
                    for jobs in late_gate.plan_of(0, steps=4))
    assert later["none, then G1"][0].config.gate == "g1" and later["G1, then none"][0].config.gate == "none"
    alone, before = later["none, then G1 alone"][0].state_dict(), first["none"][0].state_dict()
    assert all(torch.equal(alone[name], p) for name, p in before.items())
    assert later["none, then G1"][1]["step"] == 8


def test_the_moving_picture_has_a_frame_for_each_step_of_both_runs(here, monkeypatch):
    for name, value in (("STEPS", [0, 2, 4]), ("LOOK", 12), ("HOLD", 1)):
        monkeypatch.setattr(movie, name, value)
    status, out, err = status_of(movie.main, ["--results=results"])
    assert status == 0 and out.startswith("results/sink.gif: 0.0"), err
    with Image.open(here / "results/sink.gif") as picture:
        assert picture.size == (720, 560) and picture.n_frames >= 3
    for gate in ("none", "g1"):  # and the stops between frames changed nothing
        config, c = train.make_configs(train.PRESETS["sink"] | dict(
            gate=gate, max_steps=4, eval_every=10**6, out=f"straight-{gate}", threads=1))
        straight = train.train(config, c, lambda text: None)[0].state_dict()
        stopped = checkpoint.load(Path("out/movie", gate, "last.pt"))[0].state_dict()
        assert all(torch.equal(p, stopped[name]) for name, p in straight.items())


@pytest.mark.parametrize("script", [
    "train", "sample", "data.prepare",
    *(f"experiments.{path.stem}" for path in sorted((ROOT / "experiments").glob("*.py"))
      if "def main(" in path.read_text())])
def test_the_help_of_every_script_fits_80_columns(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = status_of(importlib.import_module(script).main, ["--help"])
    assert status == 0 and len(out.splitlines()) > 10
    assert all(len(line) <= 80 for line in out.splitlines())
