"""Claims about README.md: its commands run, and its picture and links are there."""
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
BLOCKS = re.findall(r"^```sh\n(.+?)^```$", README, re.M | re.S)
FEWER_STEPS = {"train.py": ["--max_steps=4", "--eval_every=2", "--eval_windows=4"],
               "sample.py": ["--tokens=5"], "compare_gates.py": ["--steps=2", "--seeds=1"]}


def commands(block):
    """The python commands of a block as argument lists, without what installs or runs these tests."""
    for part in re.split(r"\n|&&", block):
        words = shlex.split(part, comments=True)
        if words[:1] == [".venv/bin/python"] and "pytest" not in words:
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
    lines = [line for block in BLOCKS for line in block.splitlines()]
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    assert f"{install} && .venv/bin/python train.py" in lines
    assert f"{install} -r tests/requirements.txt && .venv/bin/python -m pytest" in lines


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:60] for block in BLOCKS])
def test_every_command_runs(block, clone):
    for words in commands(block):
        if {"shakespeare", "fineweb", "--data=shakespeare"} & set(words):  # downloads: see test_data.py
            continue
        if any("/1B_" in word for word in words):  # downloads, too: see test_pretrained_text.py
            continue
        more = ["--max_steps=8"] if "--resume" in words else []
        ran = subprocess.run(shortened(words) + more, cwd=clone, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_line_of_the_readme_is_a_placeholder():
    assert not re.search(r"^[A-Z]{6,}$", README, re.M)


def test_the_results_table_says_what_was_recorded():
    with open(ROOT / "experiments/results/backcopy.csv", newline="") as file:
        recorded = {row["variant"]: row for row in csv.DictReader(file)}
    rows = re.findall(r"^\| `([\w-]+)` \|(.+)\|$", README, re.M)
    assert len(rows) >= 6
    for name, cells in rows:
        shares, gate, activation, paper, _ = [cell.strip() for cell in cells.split("|")]
        row = recorded[name]
        assert shares.split(" / ") == [f"{float(share):.3f}" for share in row["share_by_seed"].split()]
        assert gate == (f"{float(row['gate_score']):.3f}" if row["gate_score"] != "nan" else "-")
        assert activation == f"{float(row['max_activation']):.1f}"
        assert paper == (f"{float(row['paper_share']):.3f}" if row["paper_share"] != "nan" else "-")
