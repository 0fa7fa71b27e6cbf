"""Claims about the comparison: the paper's rows at fair sizes, numbers that follow rules, runs that go on."""
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import prepare
from experiments import compare_gates as lab
from gated_gpt import GPT, GPTConfig, load_checkpoint
from sample import checkpoint_in

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=16 --block_size=16 --batch_size=2 --eval_windows=4 "
        "--seeds=1 --steps=2").split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small backcopy set."""
    root = tmp_path_factory.mktemp("backcopy")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.prepare_backcopy(root=root, chars=20_000)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, small, use_data):
    """An empty folder to work in, where `backcopy` is the small set."""
    monkeypatch.chdir(tmp_path)
    use_data(small)
    return tmp_path


def compare(*flags):
    """What compare_gates.py prints with these flags at the tiny size."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        lab.main([*TINY, *flags])
    return out.getvalue()


def read_csv(path):
    with open(path, newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def job(here, **changes):
    """A run of the tiny comparison."""
    _, _, recipe = lab.parse_flags(TINY)
    base, c = train.make_configs(lab.TASKS["backcopy"] | recipe | dict(
        vocab_size=257, gate="none", max_steps=40, eval_every=10) | changes)
    return lab.plan("backcopy", {"none": base}, c, 1, "data")[0]


# ------------------------------------------------------------------------------------------------------------
# The variants


# What each row adds to one layer of the baseline, written out from the paper's definitions: hidden size C, nh
# query and nkv key/value heads of hs channels, experts of width E.
ADDS = {
    "none": lambda C, nh, nkv, hs, E: 0,
    "kv-heads": lambda C, nh, nkv, hs, E: 2 * C * nkv * hs,  # keys and values of as many heads again
    "q-heads": lambda C, nh, nkv, hs, E: 2 * C * (nh // 2) * hs,  # W_Q and W_O of half as many heads again
    "g1": lambda C, nh, nkv, hs, E: C * nh * hs,
    "g2": lambda C, nh, nkv, hs, E: C * nkv * hs,
    "g3": lambda C, nh, nkv, hs, E: C * nkv * hs,
    "g4": lambda C, nh, nkv, hs, E: C * nh * hs,
    "g5": lambda C, nh, nkv, hs, E: C * C,
    "g1-headwise": lambda C, nh, nkv, hs, E: C * nh,
    "g2-headwise": lambda C, nh, nkv, hs, E: C * nkv,
    "g1-shared": lambda C, nh, nkv, hs, E: C * nh * hs,  # no smaller: it is the scores that are averaged
    "g2-shared": lambda C, nh, nkv, hs, E: C * nkv * hs,
    "g1-add-silu": lambda C, nh, nkv, hs, E: C * nh * hs,
    "g1-silu": lambda C, nh, nkv, hs, E: C * nh * hs,
    "sdpa-norm": lambda C, nh, nkv, hs, E: hs,
    "sdpa-silu": lambda C, nh, nkv, hs, E: 0,
    "g1-add-identity": lambda C, nh, nkv, hs, E: C * nh * hs,
    "g1-no-input": lambda C, nh, nkv, hs, E: nh * hs,
    "g1-ns-sigmoid": lambda C, nh, nkv, hs, E: C * nh * hs,
    "sandwich": lambda C, nh, nkv, hs, E: 2 * C,
    "moe": lambda C, nh, nkv, hs, E: 8 * C + 6 * 3 * C * E,  # a router; 8 experts, 2 of them the old MLP
    "moe-experts": lambda C, nh, nkv, hs, E: 9 * C + 7 * 3 * C * E,
    "moe-g1": lambda C, nh, nkv, hs, E: 8 * C + 6 * 3 * C * E + C * nh * hs,
}
BASE = GPTConfig(vocab_size=2048, gate="none", n_layer=3, n_head=4, n_kv_head=2, n_embd=96, mlp_hidden=256,
                 tie_embeddings=True)


@pytest.mark.parametrize("name", lab.VARIANTS)
def test_each_variant_adds_the_parameters_that_the_paper_says(name):
    C, L, H = BASE.n_embd, BASE.n_layer, BASE.mlp_hidden
    nh, nkv, hs, E = BASE.n_head, BASE.n_kv_head, BASE.head_dim, H // 2
    dense = 2048 * C + C + L * (2 * C * (nh + nkv) * hs + 2 * hs + 3 * C * H + 2 * C)
    config = lab.configs_of([name], BASE, match_params=False)[name]
    assert GPT(config).num_params() == lab.count(config) == dense + L * ADDS[name](C, nh, nkv, hs, E)


@pytest.mark.parametrize("task", lab.TASKS)
def test_dense_variants_have_the_baselines_size_to_half_a_percent(task):
    base, _ = train.make_configs(lab.TASKS[task] | {"gate": "none", "vocab_size": 257})
    configs = lab.configs_of(lab.VARIANTS, base, say=lambda text: None)
    sizes = {name: GPT(config).num_params() for name, config in configs.items()}
    for name, size in sizes.items():
        if lab.VARIANTS[name].pair == "none":
            assert abs(size / sizes["none"] - 1) < 0.005, name
    assert configs["moe"].n_expert_active * configs["moe"].expert_hidden == base.mlp_hidden  # active: as many


def test_variants_cover_the_papers_tables_with_their_numbers():
    rows = [v.row for v in lab.VARIANTS.values()]
    assert {f"Table 1 #{n}" for n in range(1, 16)} <= set(rows)
    assert rows.count("Table 3") == 3 and rows.count("Table 4") == 2  # beyond those in Table 1
    for name, (score, m_act, share, ppl) in {
            "none": (math.nan, 1053, .467, 6.026), "g1": (.116, 94, .048, 5.761),
            "g1-headwise": (.172, 98, .073, 5.792), "g1-shared": (.271, 286, .301, 5.801),
            "g2": (.221, 125, .297, 5.820),
            "g1-no-input": (.335, 471, .364, 5.917), "g1-ns-sigmoid": (.653, 892, .451, 5.900)}.items():
        v = lab.VARIANTS[name]
        assert (v.m_act, v.share, v.ppl) == (m_act, share, ppl), name
        assert v.score == pytest.approx(score, nan_ok=True), name


def test_a_variant_that_makes_no_sense_is_left_out_and_said():
    said = []
    configs = lab.configs_of(["kv-heads", "g1"], dataclasses.replace(BASE, n_kv_head=4), say=said.append)
    assert list(configs) == ["none", "g1"]  # and the baseline comes along unasked
    assert len(said) == 1 and said[0].startswith("kv-heads is left out") and "n_kv_head=2" in said[0]


# ------------------------------------------------------------------------------------------------------------
# The whole comparison


def test_all_variants_train_and_are_tabled_and_drawn(here):
    screen = compare("--results=results")
    rows, text = read_csv(here / "results/backcopy.csv"), (here / "results/backcopy.md").read_text()
    assert list(rows) == list(lab.VARIANTS)
    for name, row in rows.items():
        assert f"\n| {name} | {int(row['parameters']):,} | {float(row['val_loss']):.4f} |" in text
        assert f"\n{name} " in screen
        assert 0 < float(row["share"]) < 1
        assert float(row["floor"]) == pytest.approx(train.uniform_share(16), rel=1e-4)
        assert row["gate_score"] == "nan" or "g" in name
    assert max(map(len, screen.splitlines())) <= 80
    assert "python experiments/compare_gates.py --n_layer=2" in text and torch.__version__ in text

    drawn = {path.name: path for path in (here / "results").glob("*.png")}
    figures = ("layers", "loss", "maps", "scores", "share", "sink")
    assert sorted(drawn) == [f"backcopy_{name}.png" for name in figures]
    for path in drawn.values():
        path.unlink()
    runs = sorted((here / "out").rglob("done.json"))
    times = [path.stat().st_mtime_ns for path in runs]
    with contextlib.redirect_stdout(io.StringIO()):
        lab.main(["--results=results", "--from_results"])
    assert all(path.stat().st_size > 5000 for path in drawn.values())
    assert [path.stat().st_mtime_ns for path in runs] == times
    assert sum(path.stat().st_size for path in (here / "results").iterdir()) < 1e6


def test_nothing_to_redraw_names_the_command_that_makes_it(here):
    with pytest.raises(ValueError, match="compare_gates.py --task=backcopy makes it"):
        lab.main(["--results=nowhere", "--from_results"])


def test_a_variant_is_one_row(here, monkeypatch):
    monkeypatch.setitem(lab.VARIANTS, "mine", lab.Variant(dict(gate="g2", gate_act="identity")))
    assert "\nmine " in compare("--variants=mine")
    row = read_csv(here / "out/compare-backcopy/backcopy.csv")["mine"]
    assert row["pair"] == "none" and row["paper_row"] == "" and math.isfinite(float(row["difference"]))


def test_finished_runs_are_kept_and_another_recipe_is_not_mixed_in(here):
    compare("--variants=none")
    first = {path: path.stat().st_mtime_ns for path in here.rglob("done.json")}
    assert "1 of 2 runs are done already" in compare("--variants=none,g1")
    assert all(path.stat().st_mtime_ns == before for path, before in first.items())
    assert "done already" not in compare("--variants=none,g1", "--learning_rate=0.01")
    assert len(list(here.rglob("done.json"))) == 4
    table = read_csv(here / "out/compare-backcopy/backcopy.csv")
    assert {row["seeds"] for row in table.values()} == {"1"}


def test_what_decides_a_run_decides_its_folder(here, monkeypatch):
    folder = job(here).folder
    assert folder == job(here, threads=3).folder
    for change in (dict(max_steps=50), dict(n_embd=32), dict(weight_decay=0.5)):
        assert job(here, **change).folder != folder, change
    file = here / "model.py"
    prints = []
    for text in ('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n',
                 "def f(x): return x + 1  # more\n", "def f(x): return x + 2\n"):
        file.write_text(text)
        prints.append(lab.code_of(file))
    assert prints[0] == prints[1] != prints[2]


def test_a_broken_off_run_goes_on_and_ends_as_if_it_had_not_been(here):
    whole, broken = job(here), job(here)._replace(folder=here / "broken")
    lab.one_run(whole)
    evaluations = []

    def interrupt(text):
        evaluations.append(text)
        if text.strip().startswith("20 "):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lab.one_run(broken, interrupt)
    assert broken.steps() in (20, 21) and not broken.done.exists()
    lab.one_run(broken)
    first, second = (json.loads(j.done.read_text()) for j in (whole, broken))
    assert [row["val_loss"] for row in first["log"]] == [row["val_loss"] for row in second["log"]]
    assert first["maps"] == second["maps"]
    model, state = load_checkpoint(checkpoint_in(broken.folder))  # its weights can be looked at afterwards
    assert state["step"] == 40 and not state["optimizers"] and model.config == broken.config


def test_a_run_that_diverges_is_said_and_stops_no_other(here):
    too_fast = "--learning_rate=1e30 --warmup_steps=0 --grad_clip=0 --steps=6".split()
    text = compare("--variants=none,g1", *too_fast)
    assert "none: 1 of 1 runs diverged" in text and "g1: 1 of 1 runs diverged" in text
    table = (here / "out/compare-backcopy/backcopy.md").read_text()
    assert re.search(r"\n\| g1 \| [\d,]+ \| - \| - \|  \| - \| - \| 1 \| - \|", table)


@pytest.mark.parametrize("flags, message", [
    (["--variants=g1,g9"], "'g9' is none of none, kv-heads"), (["--seeds=0"], "seeds=0 must be at least 1"),
    (["--task=nothing"], "there is no data set 'nothing'"), (["--n_head=3"], "not divisible")])
def test_mistakes_are_told_in_one_sentence(here, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        compare(*flags)


def test_a_trial_does_not_replace_the_recorded_results():
    flags, *_ = lab.parse_flags(["--task=python", "--jobs=2", "--seeds=3", "--threads=1"])
    assert flags["results"] == lab.RESULTS
    for flag in ("--variants=g1", "--steps=5", "--seeds=2", "--no-match_params", "--n_embd=32"):
        assert lab.parse_flags([flag])[0]["results"] == Path("out/compare-backcopy"), flag


def test_runs_side_by_side_are_stopped_by_ctrl_c_and_go_on(tmp_path):
    for name in ("gated_gpt.py", "train.py", "sample.py", "data/prepare.py", "data/released_tokenizer.py",
                 "data/bpe2k.tiktoken", "experiments/compare_gates.py", "experiments/figures.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.prepare_backcopy(root=tmp_path / "data", chars=20_000)
    command = [sys.executable, "experiments/compare_gates.py", *TINY, "--jobs=2", "--variants=g1",
               "--eval_every=50", "--steps=400"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start():
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, start_new_session=True)

    process = start()
    while process.poll() is None and not list(tmp_path.rglob("last.pt")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the children, too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "of 2 runs are done; the same command goes on" in err, err
    assert "Traceback" not in err
    # No child was left, for each holds an end of the pipes, and communicate waits until all are closed.
    process = start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "g1 " in out and len(list(tmp_path.rglob("done.json"))) == 2


# ------------------------------------------------------------------------------------------------------------
# The numbers


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
    assert lab.is_noise(-0.19, 0.1) and not lab.is_noise(-0.2, 0.1) and lab.is_noise(5.0, math.nan)


def test_a_diverged_seed_is_left_out_of_the_pairs():
    diverged = {"diverged": "the loss is nan", "log": []}
    row = row_of([*finished(1.0, 2.0), diverged], [*finished(1.5, 2.7), *finished(9.0)])
    assert row["difference"] == pytest.approx(0.6) and row["diverged"] == 0
    row = row_of(finished(1.0, 2.0), [diverged, *finished(2.5)])
    assert row["difference"] == pytest.approx(0.5) and row["diverged"] == 1 and row["val_loss"] == 2.5


def test_the_late_floor_is_what_uniform_attention_gives():
    T = 64
    weights = torch.ones(T, T).tril()
    share = (weights / weights.sum(1, keepdim=True))[:, 0]
    assert lab.late_floor(T) == pytest.approx(share[T // 4 :].mean().item(), rel=1e-5)
