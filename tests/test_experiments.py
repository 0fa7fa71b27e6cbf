"""Claims about the experiments: the paper's rows at fair sizes, runs that are kept and shared, numbers."""
import contextlib
import csv
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

import experiments.variants as variants
import train
from data import prepare
from experiments import compare_gates, late_gate, learning_rates, long_context, movie, runner, sink_on_text
from experiments.figures import grow, plt
from experiments.tables import deviation, late_floor, markdown
from experiments.variants import VARIANTS
from gated_gpt import GPT, GPTConfig, measure, uniform_share
from plumbing import checkpoint

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=16, batch_size=2, eval_windows=4,
            warmup_steps=1, device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with small sets of the tasks. `python` is Python's standard library in name only."""
    root = tmp_path_factory.mktemp("sets")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA", root)
        prepare.prepare_backcopy(chars=20_000)
        text = prepare.encode(prepare.split_each([(ROOT / "train.py").read_text() * 3]), "bpe2k")
        prepare.write_set("python", "bpe2k", "train.py, three times", text)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, small, use_data):
    """An empty folder to work in, with the small sets, where the recipes of the tasks are tiny."""
    monkeypatch.chdir(tmp_path)
    use_data(small)
    for task in ("text", "backcopy"):
        monkeypatch.setitem(variants.TASKS, task, variants.TASKS[task] | TINY)
    for module, name, value in (
            (train, "MEASURE_WINDOWS", 4), (long_context, "TRAINED", 16), (long_context, "LONGER", (1, 8)),
            (long_context, "TOKENS", 512), (long_context, "BATCH", 256),
            (learning_rates, "RATES", (0.002, 0.004)), (sink_on_text, "DECAYS", (0.0, 0.1, 0.2)),
            (sink_on_text, "WIDTHS", (32, 64)), (sink_on_text, "RATES", (0.002, 0.004))):
        monkeypatch.setattr(module, name, value)
    return tmp_path


def command(module, *flags):
    """What a script prints with these flags."""
    status, out, err = status_of(module.main, flags)
    assert status == 0, err
    return out


def rows_in(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def norms(job, model):
    """A look at a model."""
    return {"norms": [p.norm().item() for p in model.parameters()]}


def job(look=norms, gate="none", **changes):
    """A run of the tiny backcopy task."""
    values = variants.values_of("backcopy", 40, **{"eval_every": 10, "gate": gate} | changes)
    config, c = train.make_configs(values)
    return runner.plan({gate: (config, c)}, [0], look)[0]


def times(folder, name):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(name)}


# ---- the variants ----------------------------------------------------------------------------------


def added(C, nh, nkv, hs, E):
    """What each row adds to one layer of the baseline, by the paper's definitions: hidden size C, nh query
    and nkv key/value heads of hs channels, experts of width E."""
    parameters = {
        "none sdpa-silu softmax1 softpick": 0, "learned": nh,
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


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_adds_the_parameters_that_the_paper_says(name, monkeypatch):
    monkeypatch.setattr(variants, "matched", lambda config, size: config)
    C, L, H = BASE.n_embd, BASE.n_layer, BASE.mlp_hidden
    nh, nkv, hs, E = BASE.n_head, BASE.n_kv_head, BASE.head_dim, H // 2
    dense = 2048 * C + C + L * (2 * C * (nh + nkv) * hs + 2 * hs + 3 * C * H + 2 * C)
    config = variants.configs_of([name], BASE)[name]
    assert GPT(config).num_params() == variants.count(config) == dense + L * added(C, nh, nkv, hs, E)[name]


@pytest.mark.parametrize("task", variants.TASKS)
def test_dense_variants_have_the_baselines_size_to_half_a_percent_and_what_makes_no_sense_is_left_out(task):
    base, _ = train.make_configs(variants.TASKS[task] | {"gate": "none", "vocab_size": 257})
    said = []
    configs = variants.configs_of(VARIANTS, base, said.append)
    for name, config in configs.items():
        if VARIANTS[name].pair == "none":
            assert abs(variants.count(config) / variants.count(base) - 1) < 0.005, name
    expert = GPT(configs["moe"]).blocks[0].mlp.experts[0]
    assert 2 * expert.up_proj.out_features == base.mlp_hidden  # active: as many as in the dense MLP
    assert ("kv-heads" in configs) == (base.n_kv_head < base.n_head) == (not said)
    assert not said or said[0].startswith("kv-heads is left out") and "makes room" in said[0]
    assert list(variants.configs_of(["g1", "moe-g1"], base)) == ["none", "g1", "moe", "moe-g1"]


def test_variants_cover_the_papers_tables_with_their_numbers():
    rows = [v.row for v in VARIANTS.values()]
    assert {f"Table 1 #{n}" for n in range(1, 16)} <= set(rows)
    assert rows.count("Table 3") == 3 and rows.count("Table 4") == 2  # beyond those in Table 1
    for name, numbers in {
            "none": (math.nan, 1053, .467, 6.026), "g1": (.116, 94, .048, 5.761),
            "g1-headwise": (.172, 98, .073, 5.792), "g1-shared": (.271, 286, .301, 5.801),
            "g2": (.221, 125, .297, 5.820),
            "g1-no-input": (.335, 471, .364, 5.917), "g1-ns-sigmoid": (.653, 892, .451, 5.900)}.items():
        v = VARIANTS[name]
        assert (v.score, v.m_act, v.share, v.ppl) == pytest.approx(numbers, nan_ok=True), name
    example, = re.findall(r"\n    (\"g2\": .+)\n", variants.__doc__)  # the row that is explained is there
    assert Path(variants.__file__).read_text().count(example) == 2


# ---- the comparison --------------------------------------------------------------------------------


def test_all_variants_train_and_are_tabled_and_drawn_a_new_one_too(here, monkeypatch):
    monkeypatch.setitem(VARIANTS, "mine", variants.Variant(dict(gate="g2", gate_act="identity")))
    screen = command(compare_gates, "--seeds=1", "--steps=2", "--results=results")
    rows, text = rows_in(here / "results/text.csv"), (here / "results/text.md").read_text()
    assert [row["variant"] for row in rows] == list(VARIANTS)
    for name, row in zip(VARIANTS, rows):
        assert f"\n| {name} | {int(row['parameters']):,} | 1 | 0 | {float(row['val_loss']):.4f} |" in text
        assert f"\n| {name} | {float(row['val_loss']):.4f} |" in screen
        assert 0 < float(row["share"]) < 1 and float(row["floor"]) == float(f"{uniform_share(16):.5g}")
        late = max(map(float, row["late_share_by_layer"].split()))
        assert float(row["late_share"]) == pytest.approx(late, abs=1e-4)
        assert (row["gate_score"] == "nan") == (variants.configs_of([name], BASE)[name].gate == "none")
    assert row["pair"] == "none" and row["paper_row"] == "" and math.isfinite(float(row["difference"]))
    assert "python experiments/compare_gates.py --seeds=1" in text and torch.__version__ in text
    drawn = {path.name: path.stat().st_size for path in (here / "results").glob("*.png")}
    assert sorted(drawn) == [f"text_{name}.png" for name in ("loss", "maps", "share")]
    assert min(drawn.values()) > 5000 and sum(drawn.values()) < 1e6

    done = times(here, "done.json")  # another command with other variants leaves no older picture
    out = command(compare_gates, "--seeds=1", "--steps=2", "--results=results", "--variants=sandwich")
    assert "2 of 2 runs are done already" in out and times(here, "done.json") == done
    assert {path.name for path in (here / "results").glob("*.png")} == {"text_loss.png", "text_share.png"}


def test_text_has_five_seeds_of_none_and_g1(here):
    command(compare_gates, "--variants=g1,g2", "--steps=2")
    seeds = {row["variant"]: row["seeds"] for row in rows_in(here / "out/compare-text/text.csv")}
    assert seeds == {"none": "5", "g1": "5", "g2": "3"}


@pytest.mark.parametrize("flags, message", [
    ("--variants=g1,g9", "variants=g1,g9: 'g9' is none of none, kv-heads"),
    ("--seeds=0", "--seeds: 0 must be a whole number, at least 1"), ("--n_head=3", "is not a multiple of"),
    ("--task=nothing", "there is no data set nothing")])
def test_mistakes_are_told_in_one_sentence(here, flags, message):
    assert message in refusal(compare_gates.main, flags)


def test_a_trial_does_not_replace_the_recorded_results():
    flags, *_ = compare_gates.parse_flags(["--task=python", "--jobs=2", "--seeds=3", "--threads=1"])
    assert flags.results == runner.RESULTS
    for flag in ("--variants=g1", "--steps=5", "--seeds=2", "--n_embd=32"):
        assert compare_gates.parse_flags([flag])[0].results == Path("out/compare-text"), flag


def finished(*losses, share=0.5):
    """What runs with these final losses might have left."""
    layer = dict(first_token_share=share, late_first_token_share=share / 2)
    return [{"diverged": None, "log": [dict(
        val_loss=loss, first_token_share=share, gate_score=math.nan, max_activation=1.0,
        tokens_per_second=100.0, layers=[layer])]} for loss in losses]


DIVERGED = [{"diverged": "the loss is nan", "log": []}]


@pytest.mark.parametrize("none, g1, difference, error, noise", [
    (finished(1.0, 2.0, 3.0), finished(0.9, 1.9, 2.8), -0.4 / 3, 0.033333, ""),  # noisy, but paired
    (finished(1.0, 1.0, 1.0), finished(0.8, 1.2, 0.9), -0.1 / 3, 0.120185, "~"),  # below 2 errors
    (finished(1.0), finished(0.5), -0.5, math.nan, "~"),  # one seed: the noise is not known
    (finished(1.0, 2.0) + DIVERGED, finished(1.5, 2.7, 9.0), 0.6, 0.1, ""),  # without the seed that diverged
    (finished(1.0, 2.0), DIVERGED + finished(2.5), 0.5, math.nan, "~")])
def test_differences_are_paired_by_seed_and_small_ones_are_called_noise(none, g1, difference, error, noise):
    results = {(name, i): run for name, runs in (("none", none), ("g1", g1)) for i, run in enumerate(runs)}
    row = compare_gates.summary("g1", BASE, results)
    found = row["difference"], row["difference_se"]
    assert found == pytest.approx((difference, error), rel=1e-4, nan_ok=True) and row["noise"] == noise
    losses = [run["log"][-1]["val_loss"] for run in g1 if run["log"]]
    assert row["val_loss"] == pytest.approx(sum(losses) / len(losses))
    assert row["seeds"] == len(g1) and row["diverged"] == len(g1) - len(losses)


def test_what_is_not_known_is_not_known_and_the_late_floor_is_that_of_uniform_attention():
    assert deviation([1.0, 2.0, 3.0]) == 1
    assert all(math.isnan(deviation(values)) for values in ([], [1.0], [math.nan, 1.0, 2.0]))
    head, columns = {"command": "/home/fer-nan-do"}, {"a": ("nano", ".3f")}
    text = markdown("t", head, "", [{"a": math.nan}], columns)
    assert "fer-nan-do" in text and text.endswith("| nano |\n| ---: |\n| - |\n")
    weights = torch.ones(64, 64).tril()
    share = (weights / weights.sum(1, keepdim=True))[:, 0]
    assert late_floor(64) == pytest.approx(share[16:].mean().item(), rel=1e-5)


# ---- runs that are made once, and kept -------------------------------------------------------------


def test_what_decides_a_run_decides_its_folder(here, monkeypatch):
    folder = job().folder
    assert folder == job(threads=3).folder == job(look=long_context.look).folder == job(look=None).folder
    for change in (dict(eval_windows=5), dict(n_embd=32), dict(weight_decay=0.5)):
        assert job(**change).folder != folder, change
    monkeypatch.setattr(runner, "code_of", lambda path: "other code")
    assert job().folder != folder


def test_comments_form_and_the_version_of_python_do_not_change_the_digest_of_code_but_code_does(tmp_path):
    digests = []
    for i, text in enumerate((
            '"""D."""\ndef f(x, *, y=None):\n    """D."""\n    return f"{x!r:>3} {{" + "a"\n',
            "def f(x, *, y=None): return (  # more\n    f'{x!r:>3} {{' + 'a')\n",
            'def f(x, *, y=None): return f"{x!r:>3} {{" + "b"\n')):
        (tmp_path / f"{i}.py").write_text(text)
        digests.append(runner.code_of(tmp_path / f"{i}.py"))
    assert digests[0] == digests[1] == "bcbaa18c" != digests[2]  # so it is with Python 3.10 to 3.13


def test_a_changed_look_looks_anew_and_trains_nothing(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    runner.one_run(job(look=None))
    trained = times(here, "last.pt")
    for i in (1, 2, 2):
        (here / f"looks{i}.py").write_text(f"def look(job, model):\n    return {{'found': {i}}}\n")
        looking = job(look=importlib.import_module(f"looks{i}").look)
        runner.one_run(looking)
        assert runner.result_of(looking)["found"] == i
    assert times(here, "last.pt") == trained and len(list(here.rglob("looks*-*.json"))) == 2


def test_a_run_that_another_process_trains_is_left_to_it(here):
    with runner.alone_in(job().folder) as alone:
        runner.one_run(job())
        assert alone and not times(here, "last.pt")


def test_a_broken_off_or_killed_run_goes_on_and_ends_as_if_it_had_not_been(here):
    def interrupt(text):
        if text.strip().startswith("20 "):
            os.kill(os.getpid(), signal.SIGINT)

    runner.one_run(whole := job())
    broken = whole._replace(folder=here / "broken", found=here / "broken/found.json")
    with pytest.raises(KeyboardInterrupt):
        runner.one_run(broken, interrupt)
    assert broken.steps in (20, 30) and not broken.found.exists()
    results = here / "broken/done.json", broken.found
    first = {row["step"]: row["val_loss"] for row in runner.result_of(whole)["log"]}
    # Stopped; killed between the last checkpoint and the results; in the first save, between its files.
    for missing in ((), results, (*results, here / "broken/last.pt", here / "broken/log.csv")):
        for file in missing:
            file.unlink()
        runner.one_run(broken)
        again = runner.result_of(broken)
        assert first.items() <= {row["step"]: row["val_loss"] for row in again["log"]}.items(), missing
        assert again["norms"] == runner.result_of(whole)["norms"]
    model, content = checkpoint.load(broken.folder / "last.pt")  # its weights can be looked at afterwards
    assert content["step"] == 40 and not content["optimizers"] and model.config == broken.config


def test_a_run_that_diverges_keeps_its_log_is_said_and_stops_no_other(here, monkeypatch):
    monkeypatch.setattr(train, "learning_rate_at", lambda step, c: 1e-3 if step < 2 else 1e30)
    text = command(compare_gates, "--seeds=1", "--variants=g1", "--grad_clip=0", "--steps=24")
    assert text.count("the loss at step 4 is not finite") == 2
    written = (here / "out/compare-text/text.md").read_text()
    assert re.search(r"\n\| g1 \| [\d,]+ \| 1 \| 1 \| - \| - \| - \|", written)
    assert [len(checkpoint.load(path)[1]["log"]) for path in here.rglob("last.pt")] == [1, 1]
    for path in here.rglob("*.json"):  # JSON, with no bare NaN
        json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)


def test_runs_side_by_side_are_stopped_by_ctrl_c_and_go_on(here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = TINY | dict(eval_every=20, jobs=2, seeds=1, steps=400, variants="g1")
    flags = [f"--{name}={value}" for name, value in flags.items()]
    process = subprocess.Popen([sys.executable, ROOT / "experiments/compare_gates.py", *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not list(here.rglob("last.pt")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the children, too
    # No child is left, for each holds an end of the pipes, and communicate waits until all are closed.
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "of 2 runs are done; the same command goes on" in err, err
    assert "Traceback" not in err
    stopped = [checkpoint.load(file)[1]["step"] for file in here.rglob("last.pt")]
    assert stopped and all(0 < step < 400 for step in stopped)
    assert "\n| g1 | " in command(compare_gates, *flags)
    assert len(list(here.rglob("done.json"))) == 2 == len(list(here.glob("out/runs/*/")))


# ---- the other experiments -------------------------------------------------------------------------


@pytest.mark.parametrize("script, rows, pictures", [
    (learning_rates, 3 * 2, 1), (late_gate, 2 * 6, 1), (long_context, 2 * 3 * 3 * 2, 2),
    (sink_on_text, 12, 1)], ids=lambda x: getattr(x, "__name__", None))
def test_an_experiment_trains_tables_and_draws(script, rows, pictures, here, monkeypatch):
    monkeypatch.delitem(variants.TASKS["text"], "n_kv_head")  # in place of widths with one head
    out = command(script, "--seeds=1", "--steps=2", "--results=results")
    name = script.__name__.rpartition(".")[2]
    found = rows_in(here / f"results/{name}.csv")
    assert len(found) == rows and (here / f"results/{name}.md").read_text() in out
    assert all(math.isfinite(float(row.get("val_loss", row.get("score")))) for row in found)
    drawn = [Path(word) for word in out.split() if word.endswith(".png")]
    assert len(drawn) == pictures and all(path.stat().st_size > 5000 for path in drawn)
    if script is sink_on_text:  # of each width, the better rate again with a window of 128
        sizes = rows_in(here / "results/sink_on_text_width.csv")
        assert [(row["width"], row["T"]) for row in sizes[4:]] == [("32", "128"), ("64", "128")]
        assert float(sizes[0]["floor"]) == pytest.approx(0.074123) and float(sizes[4]["floor"]) < 0.05


def test_experiments_share_their_runs(small, use_data):
    use_data(small)
    none, g1 = (variants.recipes_of("text", ["none", "g1"])[name] for name in ("none", "g1"))
    assert none == train.make_configs(variants.values_of("text")) == sink_on_text.causes()["muon", "off", 0.5]
    assert none == sink_on_text.widths([(64, 0.008)], 64)[64, 0.008, 64]
    assert [none, g1] == [learning_rates.recipes()[name, 0.008] for name in ("none", "g1")]


def test_the_score_of_bos_and_the_weight_of_the_rest_give_the_share():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=1, n_embd=16, gate="none"))
    idx = torch.randint(257, (1, 32))
    bos, others = (torch.tensor(scores) for scores in long_context.on_bos(model, idx).values())
    share = (1 + torch.sigmoid(bos - others).sum()) / 32  # query 0 has no choice
    assert share.item() == pytest.approx(measure(model, idx)[0]["first_token_share"], abs=1e-4)


def test_the_score_counts_the_last_quarter_of_a_window_and_on_backcopy_triggers_only(here):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=1, n_embd=16))
    windows = train.Windows(prepare.load("backcopy")[1]["val"], 256, 32, torch.device("cpu"))
    idx, targets = windows.at(windows.spaced(16))  # as many as are 512 tokens
    p = model(idx)[0].log_softmax(-1)
    at = [(b, t) for b in range(16) for t in range(24, 32) if chr(idx[b, t]) in "uvx"]
    mean = sum(-p[b, t, targets[b, t]].item() for b, t in at) / len(at)
    assert long_context.score_at(model, "backcopy", 32)[0] == pytest.approx(mean, rel=1e-4)


def test_a_second_part_starts_where_the_first_ended_with_another_gate(here):
    first = runner.plan(variants.recipes_of("backcopy", ["none", "g1"], 2), [0])
    for one in first + (later := late_gate.second_part(first)):
        runner.one_run(one)
    first, later = ({one.name: checkpoint.load(one.folder / "last.pt") for one in jobs}
                    for jobs in (first, later))
    assert later["none, then G1"][0].config.gate == "g1" and later["G1, then none"][0].config.gate == "none"
    alone, before = later["none, then G1 alone"][0].state_dict(), first["none"][0].state_dict()
    assert all(torch.equal(alone[name], p) for name, p in before.items())
    assert later["none, then G1"][1]["step"] == 4


@pytest.mark.parametrize("runs, steps", [
    ([[10, 20, 30], [10, 17, 20, 30]], [10, 20, 30]), ([[10, 17, 20], []], [10, 17, 20]), ([[], []], None)])
def test_a_line_over_steps_has_no_point_where_one_run_was_stopped(runs, steps):
    axis = plt.figure().add_subplot()
    grow(axis, [{"log": [dict(step=step, first_token_share=0.1, uniform_share=0.07) for step in run]}
                for run in runs], start=5, color="red")
    lines = axis.get_lines()[1:]  # the first is the floor
    assert [list(line.get_xdata()) for line in lines] == ([[5 + step for step in steps]] if steps else [])


@pytest.mark.parametrize("preset, name", movie.NAMES.items())
def test_the_moving_picture_has_a_frame_for_each_evaluation_of_both_runs(preset, name, here, monkeypatch):
    for what, value in (("EVERY", 2), ("LOOK", 12), ("HOLD", 1)):
        monkeypatch.setattr(movie, what, value)
    monkeypatch.setitem(train.PRESETS, preset, train.PRESETS[preset] | TINY | dict(max_steps=6))
    assert command(movie, f"--preset={preset}", "--results=results").startswith(f"results/{name}.gif: 0.0")
    data = train.PRESETS[preset]["data"]
    text, names = movie.text_of(data, 16)
    assert (text == prepare.load(data)[0]["bos"]).sum() == names.count("BOS") == 1  # of one text
    with Image.open(here / f"results/{name}.gif") as picture:
        assert picture.size == (720, 560) and picture.n_frames >= 3


@pytest.mark.parametrize("script", [
    "train", "sample", "data.prepare",
    *(f"experiments.{path.stem}" for path in sorted((ROOT / "experiments").glob("*.py"))
      if "def main(" in path.read_text())])
def test_the_help_of_every_script_fits_80_columns(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = status_of(importlib.import_module(script).main, ["--help"])
    assert status == 0 and len(out.splitlines()) > 10
    assert all(len(line) <= 80 for line in out.splitlines())


def test_every_recorded_file_is_linked_from_a_text():
    names = "README.md", "exercises.md", "experiments/README.md"
    texts = "".join((ROOT / name).read_text() for name in names)
    linked = set(re.findall(r"results/([\w.-]+)\)", texts))
    tables = tuple(name.removesuffix(".md") for name in linked if name.endswith(".md"))
    for path in (ROOT / "experiments/results").iterdir():  # a csv lies beside its table
        assert path.name in linked or path.suffix == ".csv" and path.name.startswith(tables), path.name
