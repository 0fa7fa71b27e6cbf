"""Claims about exercises.md: what it says to run runs, its edits fit, and its numbers are recorded."""
import csv
import os
import re
import runpy
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from experiments import exercises as lab

EXERCISES = lab.read((ROOT / "exercises.md").read_text())
SHORT = {"train.py": ["--max_steps=2", "--eval_every=2", "--eval_windows=4", "--threads=1", "--device=cpu"],
         "sample.py": ["--tokens=5"], "compare_gates.py": ["--steps=2", "--eval_windows=4", "--device=cpu"]}


def do(step, folder):
    """As lab.do, but in a fork of this process. It has loaded torch already, which takes most of the time."""
    kind, what = step
    if what[0] == "-m":
        return lab.do(step, folder)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            sys.stdout, sys.stderr, status = out, err, 1
            try:
                start(kind, what, folder)
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            out.flush(), err.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())


def start(kind, what, folder):
    """Do in this process what `python` would do in `folder`, with the modules there and not with ours."""
    ours = {path.stem for path in ROOT.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    os.chdir(folder)
    script = folder / what[0]
    sys.path[:] = [str(folder if kind == "python" else script.parent),
                   *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    if kind == "python":
        exec(what, {"__name__": "__main__"})
    else:
        sys.argv = [*what, *SHORT.get(script.name, ())]
        runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """project(edits): an edited copy of the project, with the synthetic data at hand."""
    prepared = tmp_path_factory.mktemp("unedited") / "gated-gpt"
    lab.copy_project(prepared)
    assert do(("sh", ["data/prepare.py", "backcopy"]), prepared).returncode == 0

    def copy(edits):
        folder = tmp_path_factory.mktemp("exercise") / "gated-gpt"
        lab.copy_project(folder, edits)
        shutil.copytree(prepared / "data" / "backcopy", folder / "data" / "backcopy", dirs_exist_ok=True)
        return folder

    return copy


def each(exercises):
    return pytest.mark.parametrize("exercise", exercises, ids=lambda e: f"{e.number} {e.title}")


@each(EXERCISES)
def test_every_exercise_can_be_done(exercise, project):
    folder, printed = project(exercise.edits), []
    for step in exercise.steps:
        ran = do(step, folder)
        assert ran.returncode == (2 if step[0] == "refused" else 0), ran.stderr
        printed += [ran.stdout] * (step[0] == "python")
    shown = re.findall(r"^```text\n(.+?)^```$", exercise.text, re.M | re.S)
    assert "".join(printed).startswith("".join(shown))  # what follows from no training is shown to the letter


@each([e for e in EXERCISES if e.recorded])
def test_every_band_is_what_was_recorded(exercise):
    with open(lab.RESULTS / "exercises.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["title"] == exercise.title)
    seen = exercise.text.partition("**What you should see.**")[2].partition("**Check.**")[0]
    seen = " ".join(seen.split())
    bands = re.findall(r"(share|gate score|value of BOS|of a letter) (?:of )?(\d\.\d+) to (\d\.\d+)", seen)
    assert len(bands) >= 1 and len(bands) == len(re.findall(r"\d\.\d+ to \d", seen))
    for name, low, high in bands:
        column = row.get(name.replace(" ", "_"))
        values = column.split(" / ") if column else re.findall(rf"{name} ([\d.]+)", row["printed"])
        assert len(values) == 3
        assert [low, high] == [min(values, key=float), max(values, key=float)]


def test_an_edit_that_fits_no_more_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 times instead of once"):
        lab.copy_project(tmp_path / "copy", [("train.py", "no such line\n", "another\n")])


def test_no_exercise_lacks_a_question_a_prediction_a_check_or_an_answer():
    assert [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1)) and len(EXERCISES) >= 10
    parts = ["**Question.**", "**Predict first.**", "**Run.**", "**What you should see.**", "**Check.**",
             "<summary>Answer</summary>"]
    for exercise in EXERCISES:
        for part in parts:
            assert exercise.text.count(part) == 1, (exercise.number, part)
