"""
The numbers of exercises.md: does what each exercise says, edits included, and records what comes out.

    python experiments/exercises.py --jobs=2    all that state a range, 3 seeds

An edit is a ```diff block whose first line names the file. What is run is in ```sh and ```python blocks. It
runs in a copy of the project in out/exercises/: one for all exercises without an edit (they find each other's
runs), one for each edit. A step that is done is not done again, while the project's code stays as it is.
Needs matplotlib.
Reading order: Exercise -> read -> copy_project -> do -> do_all -> record -> main.
"""
import concurrent.futures
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
from experiments import runner
from experiments.runner import RESULTS, ROOT
from experiments.tables import markdown, write_csv
from plumbing.flags import parser_of, run_main
from train import TrainConfig

COLUMNS = {"share": "first_token_share", "gate_score": "gate_score", "max_activation": "max_activation",
           "val_loss": "val_loss"}  # of exercises.csv: that of a run's log
CODE = [path for place in ("*.py", "data/*.py", "plumbing/*.py") for path in sorted(ROOT.glob(place))]


class Exercise(NamedTuple):
    """One exercise, as exercises.md has it."""
    number: int
    title: str
    text: str
    edits: list  # (file, lines before, lines after)
    steps: list  # what to run, in order: ("sh" or "refused", arguments of `python`) or ("python", code)
    needs: list  # steps of earlier exercises, whose runs it goes on from

    @property
    def recorded(self):
        """Whether it says a range in which a training run should come out."""
        return re.search(r"\d\.\d+ to \d", self.text.partition("**What you should see.**")[2])

    @property
    def trainings(self):
        """The commands that train, each as a list of words."""
        return [what for kind, what in self.steps if kind == "sh" and what[0] == "train.py"]


def read(text):
    """The exercises in the text of exercises.md: a list of Exercise."""
    found, made = [], {}  # made: {folder of a run: the step that makes it}
    for section, number, title in re.findall(r"^(### (\d+)\. ([^\n]+)\n.*?)(?=^##|\Z)", text, re.M | re.S):
        edits, steps = [], []
        for language, block in re.findall(r"^```(diff|sh|python)\n(.+?)^```$", section, re.M | re.S):
            if language == "diff":
                file, *lines = block.splitlines()
                before, after = ("".join(line[1:] + "\n" for line in lines if line[0] in f" {sign}")
                                 for sign in "-+")
                edits.append((file.removeprefix("--- "), before, after))
            elif language == "python":
                steps.append(("python", block))
            else:
                steps += [("refused" if "# refused" in line else "sh", shlex.split(line, comments=True)[1:])
                          for line in block.splitlines()]
        used = "".join(what if kind == "python" else "\n".join(what) for kind, what in steps)
        needs = [step for out, step in made.items() if re.search(rf"\b{out[4:]}\b(?!-)", used)]
        made |= {word.removeprefix("--out="): step for step in steps if step[0] == "sh"
                 for word in step[1] if word.startswith("--out=out/")}
        found.append(Exercise(int(number), title, section, edits, steps, needs))
    return found


def copy_project(folder, edits=()):
    """An edited copy of the project in `folder`, without runs. ValueError if an edit fits no more."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("out", ".*", "__pycache__", "results"))
    for file, before, after in edits:
        source = (folder / file).read_text(encoding="utf-8")
        if source.count(before) != 1:
            raise ValueError(f"exercises.md edits {file}, but these lines are there {source.count(before)} "
                             f"times instead of once:\n{before}")
        (folder / file).write_text(source.replace(before, after), encoding="utf-8")


def do(step, folder, more=()):
    """Run one step in `folder`, train.py with `more` flags."""
    kind, what = step
    words = ["-c", what] if kind == "python" else [*what, *more] if what[0] == "train.py" else what
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, encoding="utf-8")


def do_all(exercises, seed, threads):
    """All steps of exercises that have the same edits, in one copy of the project, with one seed.

    Returns {(number, seed): (the last row of each training command's log, what the code printed)}.
    """
    decides = runner.digest([exercises[0].edits, *map(runner.code_of, CODE)])
    folder, results = Path("out/exercises") / f"{seed}-{decides}", {}
    file = folder / "printed.json"  # {digest of a step: what it printed}
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        copy_project(folder, exercises[0].edits)
        runner.write_json(file, {})
    printed = json.loads(file.read_bytes())
    for e in exercises:
        for step in e.needs + e.steps:
            name = runner.digest(step)
            if name not in printed:
                ran = do(step, folder, [f"--seed={seed}", f"--threads={threads}", "--overwrite"])
                if ran.returncode:
                    raise ValueError(f"exercise {e.number}, seed {seed}: {step[1]} failed: {ran.stderr}")
                printed[name] = ran.stdout.strip()
                runner.write_json(file, printed)
        rows = []
        for command in e.trainings:
            out = next(word for word in command if word.startswith("--out=")).removeprefix("--out=")
            with open(folder / out / "log.csv", newline="", encoding="utf-8") as log:
                rows.append(list(csv.DictReader(log))[-1])
        said = [printed[runner.digest(step)] for step in e.steps if step[0] == "python"]
        results[e.number, seed] = rows, "; ".join(said).replace("\n", "; ")
    return results


def record(exercises, results, seeds, head):
    """Write exercises.csv and exercises.md: a row for each training command, or for code that trains nothing.

    results: {(number, seed): what do_all found}.
    """
    rows = []
    for e in exercises:
        for i, command in enumerate(e.trainings or [["(no training)"]]):
            row = {"exercise": e.number, "title": e.title, "command": shlex.join(["python", *command]),
                   "edited": bool(e.edits), **dict.fromkeys([*COLUMNS, "floor"], "-")}
            mine = [results[e.number, seed] for seed in range(seeds)]
            if e.trainings:
                row["floor"] = f"{float(mine[0][0][i]['uniform_share']):.3f}"
                for name, column in COLUMNS.items():
                    numbers = [float(trained[i][column]) for trained, _ in mine]
                    row[name] = " / ".join("-" if x != x else f"{x:.3f}" for x in numbers)
            rows.append(row | {"printed": " / ".join(printed for _, printed in mine)})
    write_csv(RESULTS / "exercises.csv", rows)
    columns = {key: (key, "") for key in rows[0]}
    text = markdown(f"exercises.md, seeds 0 to {seeds - 1}", head, "", rows, columns)
    (RESULTS / "exercises.md").write_text(text, encoding="utf-8")
    print(text)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(__doc__, "exercises.py", "[--flag=value ...]")
    parser.add_argument("--seeds", type=runner.positive, default=3, help="runs of each [%(default)s]")
    parser.add_argument("--jobs", type=runner.positive, default=1, help="runs at a time [%(default)s]")
    flags = parser.parse_args(argv)
    exercises = [e for e in read((ROOT / "exercises.md").read_text(encoding="utf-8")) if e.recorded]
    copies, threads = {}, runner.threads_each(flags.jobs)
    for e in exercises:
        copies.setdefault(str(e.edits), []).append(e)
    todo = [(same, seed, threads) for seed in range(flags.seeds) for same in copies.values()]
    results = {}
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        for found in tqdm(pool.map(do_all, *zip(*todo)), total=len(todo), unit="copy"):
            results |= found
    record(exercises, results, flags.seeds, runner.head("exercises.py", argv, TrainConfig(), flags.jobs))


if __name__ == "__main__":
    run_main(main)
