"""Claims about README.md and experiments/README.md: commands run, links work, numbers are recorded."""
import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MORE = (ROOT / "experiments/README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.+?)^```$", README, re.M | re.S)
FEWER_STEPS = {"train.py": ["--max_steps=4", "--eval_every=2", "--eval_windows=4"],
               "sample.py": ["--tokens=5"],
               "compare_gates.py": ["--steps=2", "--seeds=1", "--variants=none,g1"]}


def commands(block):
    """The python commands of a block as argument lists, without what installs or runs these tests."""
    for part in re.split(r"\n|&&", block):
        words = shlex.split(part, comments=True)
        if words[:1] in (["python"], [".venv/bin/python"]) and "pytest" not in words:
            yield [sys.executable, *words[1:]]


def shortened(words):
    """The same command with few steps: flags that a user gives last win."""
    return words + next((flags for script, flags in FEWER_STEPS.items() if words[1].endswith(script)), [])


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as a newcomer has it: no runs, no prepared data. Commands find what earlier ones made."""
    folder = tmp_path_factory.mktemp("clone") / "gated-gpt"
    prepared = [path.parent.name for path in ROOT.glob("data/*/meta.json")]
    left_out = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", *prepared)
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def test_a_newcomer_needs_one_line_to_train_and_one_to_test():
    train = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python train.py"
    test = train.replace(".txt &&", ".txt -r tests/requirements.txt &&")
    assert train in BLOCKS[0].splitlines()
    assert [test.replace("train.py", "-m pytest -n 2 --dist=loadfile")] == BLOCKS[-1].splitlines()


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:60] for block in BLOCKS])
def test_every_command_runs(block, clone):
    for words in commands(block):
        if {"shakespeare", "fineweb", "--data=shakespeare"} & set(words):  # downloads: see test_data.py
            continue
        if any("/1B_" in word for word in words):  # downloads, too: see test_released.py
            continue
        more = ["--max_steps=8"] if "--resume" in words else []
        ran = subprocess.run(shortened(words) + more, cwd=clone, capture_output=True, text=True, timeout=120)
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


def test_no_line_of_the_readme_is_a_placeholder():
    assert not re.search(r"^[A-Z]{6,}$", README, re.M)


def number(text, form):
    return "-" if text == "nan" else format(float(text), form)


# Each table of results: its second heading, where it was recorded, its cells between name and description.
TABLES = {
    "share, three seeds": ("backcopy", lambda row: [
        " / ".join(number(share, ".3f") for share in row["share_by_seed"].split()),
        number(row["gate_score"], ".3f"), number(row["max_activation"], ".1f"),
        number(row["paper_share"], ".3f")]),
    "difference in loss": ("python", lambda row: [
        number(row["difference"], "+.3f") + row["noise"], number(row["difference_sd"], ".3f"),
        number(row["paper_difference"], "+.3f")]),
    "late share": ("text-sink", lambda row: [
        number(row["late_share"], ".3f"), number(row["share"], ".3f"), number(row["max_activation"], ".0f"),
        number(row["gate_score"], ".3f"), number(row["val_loss"], ".3f")]),
}


@pytest.mark.parametrize("table", [
    "to_loss, avx2", "to_loss", "train, avx2", "train", "train, compiled", "sample, avx2"])
def test_the_tables_of_speed_are_those_that_were_recorded(table):
    recorded = (ROOT / f"experiments/results/speed_{table.replace(', ', '_')}.md").read_text()
    recorded = re.sub(r" +", " ", recorded)
    rows, = re.findall(rf"^\| {table} \|.*\n\|.*\n((?:\|.*\n)+)", MORE, re.M)
    for row in rows.splitlines():
        assert f"\n{row}" in recorded, row


@pytest.mark.parametrize("heading", TABLES)
def test_the_results_tables_say_what_was_recorded(heading):
    task, cells_of = TABLES[heading]
    with open(ROOT / f"experiments/results/{task}.csv", newline="") as file:
        recorded = {row["variant"]: row for row in csv.DictReader(file)}
    table, = re.findall(rf"^\| variant \| {heading} \|.*\n\|.*\n((?:\|.*\n)+)", README + MORE, re.M)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) >= 2
    for name, *cells in rows:
        assert cells[: len(cells_of(recorded[name.strip("`")]))] == cells_of(recorded[name.strip("`")]), name


def rows_under(first):
    """The rows, as lists of cells, of the table in README.md whose heading starts so; and its heading."""
    heading, table = re.search(rf"^(\| {re.escape(first)}.*)\n\|.*\n((?:\|.*\n)+)", README, re.M).groups()
    lines = [heading, *table.splitlines()]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return cells[1:], cells[0]


def recorded(name):
    with open(ROOT / f"experiments/results/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def each(text):
    """Numbers of a csv, one for each seed, as README writes them."""
    return " / ".join(number(value, ".3f") for value in text.split())


def test_the_learning_rates_are_those_that_were_recorded():
    losses = {(row["variant"], row["qk_norm"], float(row["learning_rate"])): number(row["val_loss"], ".2f")
              for row in recorded("learning_rates")}
    rows, (_, _, *rates) = rows_under("variant | QK-norm")
    for variant, switch, *cells in rows:
        assert cells == [losses[variant, switch, float(rate)] for rate in rates]


def test_the_long_windows_are_those_that_were_recorded():
    scores = {(row["task"], row["counts"], row["variant"], row["rope_scaling"], row["T"]):
              number(row["score"], ".2f") for row in recorded("long_context")}
    rows, (_, _, _, trained, *longer) = rows_under("task, what counts")
    for task, variant, scaling, first, *cells in rows:
        key, scaling = (*task.split(", "), variant), scaling.replace("as trained", "none")
        assert first == scores[*key, "none", trained.removeprefix("T=")]
        assert cells == [scores[*key, scaling, T.removeprefix("T=")] for T in longer]


def test_the_other_cures_are_those_that_were_recorded():
    found = {(row["task"], row["variant"]): row for row in recorded("cures")}
    for variant, shares, difference, deviation, _ in rows_under("attention")[0]:
        text = found["python", variant]
        assert shares == each(found["backcopy", variant]["share_by_seed"])
        assert variant == "none" or [difference, deviation] == [
            number(text["difference"], "+.3f") + text["noise"], number(text["difference_sd"], ".3f")]


def test_the_late_gates_are_those_that_were_recorded():
    found = {row["run"]: row for row in recorded("late_gate")}
    rows, _ = rows_under("run | share")
    assert [name for name, *_ in rows] == list(found)
    for name, *cells in rows:
        row = found[name]
        assert cells == [each(row["first_token_share_by_seed"]), number(row["gate_score"], ".3f"),
                         number(row["long_loss"], ".2f")]
