"""Claims about README.md and experiments/README.md: commands run, links work, numbers are recorded."""
import csv
import dataclasses
import itertools
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.variants import TASKS, VARIANTS
from gated_gpt import uniform_share
from train import PRESETS, TrainConfig, make_configs, parse_flags

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MORE = (ROOT / "experiments/README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.+?)^```$", README, re.M | re.S)
CHOSEN = {"eval_every", "vocab_size", "gate"}  # by the experiment, not by the recipe
FEWER = {"train.py": ["--max_steps=4", "--eval_every=2"], "sample.py": ["--tokens=5"]}


def commands(block):
    """The python commands of a block as argument lists, without what installs or runs these tests."""
    for part in re.split(r"\n|&&", block.replace("\\\n", "")):
        words = shlex.split(part, comments=True)
        if words[:1] == [".venv/bin/python"] and words[1] != "-m":
            yield [sys.executable, *words[1:]]


def shortened(words):
    """The same command with few steps: flags that a user gives last win."""
    more = next((flags for script, flags in FEWER.items() if words[1].endswith(script)), [])
    return words + more + (["--max_steps=8"] if "--resume" in words else [])


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as a newcomer has it: no runs, no prepared data. Commands find what earlier ones made."""
    folder = tmp_path_factory.mktemp("clone") / "gated-gpt"
    prepared = [path.parent.name for path in ROOT.glob("data/*/meta.json")]
    left_out = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", *prepared)
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def test_a_newcomer_needs_one_line_to_a_sink_one_to_flip_the_gate_and_one_to_test():
    first, flip, *_, test = "".join(BLOCKS).replace("\\\n", "").splitlines()
    assert first.endswith("-m pip install -r requirements.txt && .venv/bin/python train.py --gate=none")
    assert flip == ".venv/bin/python train.py --gate=g1"
    assert test.endswith("-r tests/requirements.txt && .venv/bin/python -m pytest -n 2 --dist=loadfile")
    assert all(len(line) <= 100 for block in BLOCKS for line in block.splitlines())  # of the page


def test_the_rows_that_one_should_see_have_the_steps_and_the_floor_of_the_preset():
    preset = PRESETS["laptop"]
    shown = [(row.split()[1], row.split()[6]) for row in re.findall(r"^--gate=\w+ +\d.+$", README, re.M)]
    assert shown == [(str(preset["max_steps"]), f"{uniform_share(preset['block_size']):.3f}")] * 2


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:60] for block in BLOCKS])
def test_every_command_runs(block, clone):
    for words in commands(block):
        if {"shakespeare", "fineweb", "--data=shakespeare"} & set(words):  # downloads: see test_data.py
            continue
        if "smollm2" in str(words) or "real_model" in str(words):  # downloads, too: see test_real_model.py
            continue
        ran = subprocess.run(shortened(words), cwd=clone, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("text, folder", [(README, ROOT), (MORE, ROOT / "experiments")], ids=["top", "more"])
def test_every_link_leads_somewhere(text, folder):
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text)
    assert links
    for file, place in links:
        assert (folder / file).exists(), file
        if place:
            there = text if not file else (folder / file).read_text()
            titles = [re.sub(r"[^\w -]", "", title.lower()) for title in re.findall("^#+ (.+)$", there, re.M)]
            assert place in [title.replace(" ", "-") for title in titles], place


def number(text, form):
    return "-" if text == "nan" else format(float(text), form)


def test_the_tables_of_speed_are_those_that_were_recorded():
    tables = re.findall(r"^\| ((?:to_loss|train|sample)\b[\w, ]*) \|.*\n\| ---.*\n((?:\|.*\n)+)", MORE, re.M)
    assert {"to_loss", "train", "sample"} <= {name.split(",")[0] for name, _ in tables}
    for name, rows in tables:
        found = (ROOT / f"experiments/results/speed_{name.replace(', ', '_')}.md").read_text()
        found = re.sub(r" +", " ", found)
        assert all(f"\n{row}" in found for row in rows.splitlines()), name


def rows_under(first, text=README):
    """The rows, as lists of cells, of the table in text whose heading starts so; and its heading."""
    heading, table = re.search(rf"^(\| {re.escape(first)}.*)\n\|.*\n((?:\|.*\n)+)", text, re.M).groups()
    lines = [heading, *table.splitlines()]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return cells[1:], cells[0]


def recorded(name):
    with open(ROOT / f"experiments/results/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def rows_by_variant(name):
    return {row["variant"]: row for row in recorded(name)}


def span(numbers, form):
    """From the least to the largest of a csv's numbers, one for each seed."""
    least, *_, largest = (f"{number:{form}}" for number in sorted(map(float, numbers.split())))
    return least if least == largest else f"{least} to {largest}"


@pytest.mark.parametrize("task", ["text", "backcopy", "python"])
def test_the_recipes_are_those_that_were_recorded(task):
    table = (ROOT / f"experiments/results/{task}.md").read_text()
    recipe = dict(word.split("=") for word in re.search(r"^- recipe: (.+)$", table, re.M)[1].split())
    now = {name: str(value) for part in make_configs({"attn_share": True} | TASKS[task])
           for name, value in dataclasses.asdict(part).items()}
    assert len(recipe) > 10 and recipe == recipe | {name: now[name] for name in recipe.keys() - CHOSEN}
    assert (TrainConfig().grad_clip, TrainConfig().beta1, TrainConfig().grad_accum) == (1.0, 0.9, 1)


def test_the_first_screen_has_the_shares_of_the_recipes_five_seeds():
    table = {name: " ".join(cells) for name, *cells in rows_under("| seed 0", MORE)[0]}
    none, gated = (span(table[name], ".3f") for name in ("share, no gate", "share, G1"))
    assert none == span(rows_by_variant("text")["none"]["share_by_seed"], ".3f")
    assert f"the share is {none} without a gate, and {gated} with it" in " ".join(README.split())


def test_the_long_windows_are_those_that_were_recorded():
    scores = {(row["task"], row["variant"], row["rope_scaling"], row["T"]): number(row["score"], ".2f")
              for row in recorded("long_context")}
    text, gates = " ".join(README.split()), {"none": "without", "g1": "with"}
    for task, (name, gate) in itertools.product(("text", "backcopy"), gates.items()):
        short, long = (scores[task, name, "none", T] for T in ("64", "512"))
        assert f"from {short} to {long} {gate} " in text, (task, name)
    yarn = [scores["text", name, "yarn", "512"] for name in ("none", "g1")]
    assert "{} without, {} with G1".format(*yarn) in text


def test_the_shares_and_losses_beside_flags_are_those_that_were_recorded_with_them():
    text, backcopy = rows_by_variant("text"), rows_by_variant("backcopy")
    for flags, _, *cells in rows_under("flags | what it is")[0]:
        name, = (name for name, variant in VARIANTS.items() if variant.change == parse_flags(flags.split()))
        row = text[name]
        loss = (f"{number(row['difference'], '+.3f')}{row['noise']} ± {number(row['difference_sd'], '.3f')}"
                if name != "none" else "-")
        assert cells == [span(row["share_by_seed"], ".3f"), span(backcopy[name]["share_by_seed"], ".3f"),
                         number(row["paper_share"], ".3f"), loss, number(row["paper_difference"], "+.3f")]


def test_the_sinks_of_late_and_lost_gates_are_those_that_were_recorded():
    found = {(row["task"], row["run"]): row["share_by_seed"] for row in recorded("late_gate")}
    paragraph = " ".join(re.search(r"\*\*A gate that comes too late.+?\n\n", README, re.S)[0].split())
    said = itertools.product(("text", "backcopy"), ("none, then G1", "G1, then none"))
    for run in [("text", "none, then none"), *said]:
        assert span(found[run], ".2f") in paragraph, run


def test_the_gates_lead_at_the_lowest_and_the_highest_rate_is_that_which_was_recorded_and_noise_between():
    rows = {(row["variant"], row["learning_rate"]): row["val_loss_by_seed"].split()
            for row in recorded("learning_rates")}
    first, *between, last = (rate for variant, rate in rows if variant == "g1")
    for rate in (first, *between, last):
        leads = [float(none) - float(g1) for none, g1 in zip(rows["none", rate], rows["g1", rate])]
        lead, sd = statistics.mean(leads), statistics.stdev(leads)
        assert (abs(lead) < 2 * sd / math.sqrt(len(leads))) == (rate in between), rate
        assert rate in between or f"{lead:.3f} ± {sd:.3f}" in README, rate
