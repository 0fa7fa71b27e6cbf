"""Claims about exercises.md: what it says to run runs, its edits fit, and its numbers are recorded."""
import codeop
import csv
import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from experiments import exercises as lab

TEXT = (ROOT / "exercises.md").read_text()
EXERCISES = lab.read(TEXT)
OFFLINE = [e for e in EXERCISES if "fetch(" not in e.text]  # what one downloads: see test_real_model.py
SHORT = {"train.py": ["--max_steps=2", "--eval_every=2", "--eval_windows=4", "--threads=1", "--device=cpu"],
         "sample.py": ["--tokens=5"], "compare_gates.py": ["--steps=2", "--eval_windows=4", "--device=cpu"]}


def do(step, folder):
    """As lab.do, but in a fork of this process. It has loaded torch already, which takes most of the time."""
    if step[1][0] == "-m":
        return lab.do(step, folder)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            sys.stdout, sys.stderr, status = out, err, 1
            try:
                start(*step, folder)
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


def shown(*exercises):
    return "".join(re.findall(r"^```text\n(.+?)^```$", "".join(e.text for e in exercises), re.M | re.S))


@each(EXERCISES)
def test_no_exercise_lacks_a_part(exercise):
    for part in ("**Question.**", "**Predict first.**", "**Run.**", "**What you should see.**", "**Check.**",
                 "<summary>Answer</summary>"):
        assert exercise.text.count(part) == 1, part


@each(OFFLINE)
def test_every_exercise_can_be_done_and_prints_what_is_shown(exercise, project):
    folder, printed = project(exercise.edits), []
    for step in exercise.needs + exercise.steps:
        ran = do(step, folder)
        assert ran.returncode == (2 if step[0] == "refused" else 0), ran.stderr
        printed += [ran.stdout] * (step[0] == "python")
    assert "".join(printed).startswith(shown(exercise))  # what no training decides is shown to the letter


def bands(seen):
    """[(part of the run's command or "", what, lowest, highest)] in a text: in sentences and in tables."""
    names = "share|gate score|val loss|at triggers|elsewhere|value of BOS|of a letter"
    sentence = rf"({names}) (?:of )?(\d\.\d+) to (\d\.\d+)"
    found = [("", *band) for band in re.findall(sentence, " ".join(seen.split()))]
    for table in re.findall(r"(?:^\|.*\n)+", seen, re.M):
        (kind, *names), _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")]
                                    for line in table.splitlines()]
        for name, *cells in rows:
            for i, (what, cell) in enumerate(zip(names, cells, strict=True)):
                low, _, high = cell.partition(" to ")
                of = ("", name + r" +[\d.]+" * i) if kind == "printed" else (name, what)
                found.append((*of, low, high or low))
    return found


@each([e for e in EXERCISES if e.recorded])
def test_every_band_is_what_was_recorded(exercise):
    commands = ["python " + shlex.join(command) for command in exercise.trainings]
    with open(lab.RESULTS / "exercises.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["exercise"]) == exercise.number]
    assert [row["command"] for row in rows if exercise.trainings] == commands
    seen = exercise.text.partition("**What you should see.**")[2].partition("**Check.**")[0]
    found = bands(seen)
    assert len(found) >= 1 and len(found) >= len(re.findall(r"\d\.\d+ to \d", seen))
    for part, what, low, high in found:
        row = [row for row in rows if part in row["command"]][-1]  # without a part, it speaks of the last run
        column = row.get(what.replace(" ", "_"))
        values = column.split(" / ") if column else re.findall(rf"{what} +([\d.]+)", row["printed"])
        assert len(values) == 3, what
        assert [low, high] == [min(values, key=float), max(values, key=float)], what


def test_as_a_notebook_its_cells_are_its_blocks_and_those_that_train_nothing_print_what_is_shown(
        tmp_path, monkeypatch):
    notebook = jupytext.reads(TEXT, fmt="md")
    blocks = re.findall(r"^```(python|sh)\n(.+?)\n```$", TEXT, re.M | re.S)
    assert {language for language, _ in blocks} == {"python", "sh"}
    assert notebook.metadata.kernelspec.language == "python"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == [
        "%%sh\n" * (language == "sh") + block for language, block in blocks]
    assert jupytext.writes(notebook, fmt="md") == TEXT  # JupyterLab saves a notebook every two minutes

    untrained = [e for e in OFFLINE if not e.trainings + e.needs]
    steps = [step for e in untrained for step in e.steps]
    cells = [cell.source for cell in code if ("python", cell.source + "\n") in steps]
    assert len(untrained) >= 3 and len(cells) == len(steps)
    printed = execute(cells, ROOT, tmp_path, monkeypatch)
    assert {output.name for output in printed} == {"stdout"}
    assert "".join(output.text for output in printed) == shown(*untrained)


def test_with_the_first_cell_shell_cells_need_no_sh_and_no_path_show_pictures_and_edits_count(
        tmp_path, monkeypatch):
    first = re.search(r"^```python\n(.+?)^```$", TEXT, re.M | re.S)[1]
    draw = "import sys; open(sys.argv[1].partition('=')[2], 'wb').write(%r)" % bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148"
        "afa4710000000049454e44ae426082")  # a picture of one pixel
    (tmp_path / "draw.py").write_text(draw)
    (tmp_path / "edited.py").write_text("value = 1")
    monkeypatch.setenv("PATH", str(tmp_path))  # where neither sh nor python is
    cells = [first, "%%sh\npython -c 'import sys; print(sys.executable)'  # a comment",
             "from edited import value", "with open('edited.py', 'w') as file: file.write('value = 22')",
             "print(__import__('edited').value)", "%%sh\npython draw.py --attn_map=map.png"]
    python, edited, picture = execute(cells, tmp_path, tmp_path, monkeypatch)
    assert (python.text, edited.text) == (f"{sys.executable}\n", "22\n") and "image/png" in picture.data


def execute(cells, folder, home, monkeypatch):
    """What the code of cells prints and shows, in a kernel of this environment that works in `folder`."""
    monkeypatch.delenv("JUPYTER_PATH", raising=False)  # no kernel but this environment's
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in conftest, three times as fast
    for name in ("JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(home / name))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.outputs]


def test_python_blocks_can_be_typed_or_pasted_into_python():
    for block in re.findall(r"^```python\n(.+?)^```$", TEXT, re.M | re.S):
        typed = []
        for line in [*block.splitlines(), ""]:  # Enter once more at the end
            typed.append(line)
            if codeop.compile_command("\n".join(typed)):  # complete; a line that cannot follow is an error
                typed.clear()
        assert not typed, block


def test_exercises_are_numbered_and_an_edit_that_fits_no_more_is_refused_in_one_sentence(tmp_path):
    assert [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1)) and len(EXERCISES) >= 10
    with pytest.raises(ValueError, match="0 times instead of once"):
        lab.copy_project(tmp_path / "copy", [("train.py", "no such line\n", "another\n")])


def test_what_is_recorded_is_the_last_row_of_each_run_and_what_code_prints_and_nothing_is_done_twice(
        tmp_path, monkeypatch):
    blocks = "```sh\npython train.py --out=out/sink-a\n```", "```python\nprint('out/sink-a'[4:])\n```"
    (tmp_path / "exercises.md").write_text("".join(
        f"### {n}. A\n**What you should see.** 0.1 to 0.2\n{block}\n" for n, block in enumerate(blocks, 1)))
    steps, do_it = [], lab.do

    def do(step, folder, more=()):
        steps.append(step)
        if step[0] == "python":
            return do_it(step, folder)
        (folder / "out/sink-a").mkdir(parents=True)
        (folder / "out/sink-a/log.csv").write_text(
            "first_token_share,gate_score,max_activation,val_loss,uniform_share\n1,1,1,1,1\n"
            f"0.5,nan,1,{more[0].removeprefix('--seed=')},0.07\n")
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.chdir(tmp_path)
    for name, value in dict(ROOT=tmp_path, RESULTS=tmp_path / "results", do=do,
                            copy_project=lambda folder, edits: folder.mkdir(parents=True)).items():
        monkeypatch.setattr(lab, name, value)
    for _ in range(2):
        lab.main(["--seeds=2"])
    assert len(steps) == 4  # two for each seed
    with open("results/exercises.csv", newline="") as file:
        trained, code = csv.DictReader(file)
    assert [trained[name] for name in ("share", "gate_score", "val_loss")] == [
        "0.500 / 0.500", "- / -", "0.000 / 1.000"]
    assert (code["share"], code["printed"]) == ("-", "sink-a / sink-a")
