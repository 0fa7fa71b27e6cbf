"""
The numbers of exercises.md: does what each exercise says, edits included, and records what comes out.

    python experiments/exercises.py --jobs=2    all that state a range, 3 seeds
    python experiments/exercises.py --only=5,9  these two; the rest stays

An edit is a ```diff block whose first line names the file. What is run is in ```sh and ```python blocks. Each
run has its own copy of the project in out/exercises/, so nothing of yours is edited. A copy that is finished
is not run again while the exercise and the project's code stay as they are. Needs matplotlib.
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
        flags = [(word.partition("="), step) for step in steps if step[0] == "sh" for word in step[1]]
        needs = [made[value] for (flag, _, value), _ in flags if flag == "--init_from" and value in made]
        made |= {value: step for (flag, _, value), step in flags if flag == "--out"}
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


def do_all(exercise, seed, threads):
    """All steps of an exercise with one seed. Returns (the last row of each training command's log, what the
    code printed).
    """
    decides = runner.digest([exercise.edits, exercise.needs, exercise.steps, *map(runner.code_of, CODE)])
    folder = Path("out/exercises") / f"{exercise.number}-{seed}-{decides}"
    done = folder / "printed.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        copy_project(folder, exercise.edits)
        printed = []
        for step in exercise.needs + exercise.steps:
            ran = do(step, folder, [f"--seed={seed}", f"--threads={threads}"])
            if ran.returncode:
                raise ValueError(f"exercise {exercise.number}, seed {seed}: {step[1]} failed: {ran.stderr}")
            printed += [ran.stdout.strip()] * (step[0] == "python")
        shutil.rmtree(folder / "data")  # by far the largest part of it
        runner.write_json(done, printed)
    rows = []
    for command in exercise.trainings:
        out = next(word for word in command if word.startswith("--out=")).removeprefix("--out=")
        with open(folder / out / "log.csv", newline="", encoding="utf-8") as file:
            rows.append(list(csv.DictReader(file))[-1])
    return rows, "; ".join(json.loads(done.read_bytes())).replace("\n", "; ")


def record(exercises, results, seeds, head):
    """Write exercises.csv and exercises.md: a row for each training command.

    results: {(number, seed): what do_all returned}, of some exercises. The rows of the others stay, if
    exercises.md still has their commands.
    """
    path, rows, before = RESULTS / "exercises.csv", [], {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            before = {row["command"]: row for row in csv.DictReader(file)}
    for e in exercises:
        for i, command in enumerate(e.trainings):
            row = {"exercise": e.number, "title": e.title, "command": shlex.join(["python", *command]),
                   "edited": bool(e.edits)}
            if (e.number, 0) in results:
                mine = [results[e.number, seed] for seed in range(seeds)]
                for name, column in COLUMNS.items():
                    numbers = [float(trained[i][column]) for trained, _ in mine]
                    row[name] = " / ".join("-" if x != x else f"{x:.3f}" for x in numbers)
                row["floor"] = f"{float(mine[0][0][i]['uniform_share']):.3f}"
                row["printed"] = " / ".join(printed for _, printed in mine)
            elif row["command"] in before:
                row = before[row["command"]] | row
            else:
                raise ValueError(f"exercise {e.number} has a command that was not recorded: add it to --only")
            rows.append(row)
    write_csv(path, rows)
    columns = {key: (key, "") for key in rows[0]}
    text = markdown(f"exercises.md, seeds 0 to {seeds - 1}", head, "", rows, columns)
    (RESULTS / "exercises.md").write_text(text, encoding="utf-8")
    print(text)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(__doc__, "exercises.py", "[--flag=value ...]")
    parser.add_argument("--seeds", type=runner.positive, default=3, help="runs of each [%(default)s]")
    parser.add_argument("--jobs", type=runner.positive, default=1, help="runs at a time [%(default)s]")
    parser.add_argument("--only", metavar="N,N", help="numbers of the exercises to run [all]")
    flags = parser.parse_args(argv)
    exercises = [e for e in read((ROOT / "exercises.md").read_text(encoding="utf-8")) if e.recorded]
    numbers = {str(e.number): e for e in exercises}
    wanted = flags.only.split(",") if flags.only else list(numbers)
    if unknown := [number for number in wanted if number not in numbers]:
        raise ValueError(f"only={flags.only}: {unknown[0]} is none of {', '.join(numbers)} (with ranges)")
    threads = runner.threads_each(flags.jobs)
    todo = [(numbers[n], seed, threads) for seed in range(flags.seeds) for n in wanted]
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        done = list(tqdm(pool.map(do_all, *zip(*todo)), total=len(todo), unit="run"))
    results = {(e.number, seed): found for (e, seed, _), found in zip(todo, done)}
    head = runner.head("exercises.py", argv, TrainConfig(), flags.jobs)
    record(exercises, results, flags.seeds, head | ({"others": "as they were before"} if flags.only else {}))


if __name__ == "__main__":
    run_main(main)
