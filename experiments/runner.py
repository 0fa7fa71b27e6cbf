"""
What the experiments share: runs that are made once and kept, figures in numbers, and small tables.

    jobs = plan("compare-python", {"none": (config, c), "g1": (config, c)}, range(3), look=closer_look)
    results = run_all(jobs, at_once=2)  # {("none", 0): {"log": [...], ...}, ("g1", 0): ...}

Each run has a folder in out/. Its name has a fingerprint of all that decides the outcome: flags, seed, data,
and the code of gated_gpt.py without its comments. So the same command goes on where it was stopped, and two
recipes are never mixed. `look` turns a finished model into the extra results that an experiment needs.
Reading order: Job -> plan -> one_run -> run_all -> run_side_by_side -> the numbers -> the tables.
"""
import ast
import csv
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from data import prepare
from gated_gpt import GPT, GPTConfig
from plumbing import checkpoint
from plumbing.files import whole_file
from plumbing.flags import parser_of, run_main
from plumbing.machine import choose_device

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
MACHINE = {"out", "resume", "overwrite", "threads"}  # fields that do not change what a run learns


# ---- the plan: which runs, and where they are kept -------------------------------------------------


class Job(NamedTuple):
    """One training run of an experiment."""
    name: str  # what is compared, such as a variant
    seed: int
    config: GPTConfig
    c: train.TrainConfig
    look: Callable | None  # (job, trained model) -> dict of extra results; a function at the top of a module
    folder: Path

    @property
    def done(self):
        """The file with the results. It is there when the run is done."""
        return self.folder / "done.json"

    def steps(self):
        """Steps done so far: what the last line of the run's log says."""
        log = self.folder / "log.csv"
        last = log.read_text().strip().rpartition("\n")[2].partition(",")[0] if log.exists() else ""
        return self.c.max_steps if self.done.exists() else int(last) if last.isdigit() else 0


def code_of(path):
    """Fingerprint of a Python file. Comments, docstrings and line breaks do not change it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def plan(experiment, recipes, seeds, look=None):
    """A Job for each of these seeds and each of {name: (GPTConfig, TrainConfig)}, seed by seed."""
    jobs, code = [], code_of(ROOT / "gated_gpt.py")
    for seed in seeds:
        for name, (config, c) in recipes.items():
            c = dataclasses.replace(c, seed=seed)
            data = prepare.load(c.data)[0]["train"]["sha256"]
            decides = {k: v for k, v in dataclasses.asdict(c).items() if k not in MACHINE}
            recipe = json.dumps([dataclasses.asdict(config), decides, data, code], sort_keys=True)
            fingerprint = hashlib.sha256(recipe.encode()).hexdigest()[:8]
            folder = Path("out", experiment, f"{name}-{seed}-{fingerprint}")
            jobs.append(Job(name, seed, config, c, look, folder))
    return jobs


# ---- running it ------------------------------------------------------------------------------------


def one_run(job, say=lambda text: None):
    """Train one run to its end, and write {"log": ..., and what job.look finds} to its done.json.

    It goes on from the run's checkpoint if there is one. `say` is called at every evaluation. A run whose
    loss is not finite is done, too: its results have "diverged", and the log up to there.
    """
    last = job.folder / "last.pt"
    try:
        model, log = trained(job, say)
        result = (job.look(job, model) if job.look else {}) | {"log": log}
    except FloatingPointError as error:
        log = checkpoint.load(last)[1]["log"] if last.exists() else []
        result = {"diverged": str(error), "log": log}
    with whole_file(job.done) as file:
        file.write(json.dumps(result).encode())
    for path in job.folder.glob("*.pt"):  # two thirds of a checkpoint are the optimizer's: no longer needed
        checkpoint.save(path, checkpoint.load(path)[1] | {"optimizers": []})


def trained(job, say):
    """(model, log) of a run at its last step."""
    last = job.folder / "last.pt"
    if last.exists():
        model, saved = checkpoint.load(last)
        if saved["step"] == job.c.max_steps:  # killed after the last step, before done.json was written
            return model.to(choose_device(job.c.device)), saved["log"]
    resume = last.exists()  # overwrite: a best.pt without a last.pt is from a run killed in its first save
    c = dataclasses.replace(job.c, out=str(job.folder), resume=resume, overwrite=not resume)
    return train.train(job.config, c, say)


def run_all(jobs, at_once):
    """Run what is not done yet, here or in `at_once` processes. Returns {(name, seed): what one_run wrote}.

    KeyboardInterrupt comes when all is saved.
    """
    todo = [job for job in jobs if not job.done.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done already, in {jobs[0].folder.parent}")
    total, so_far = sum(job.c.max_steps for job in jobs), sum(job.steps() for job in jobs)
    with tqdm(total=total, initial=so_far, unit="step", disable=None) as bar:
        def tick(text=""):
            bar.update(max(0, sum(job.steps() for job in jobs) - bar.n))
            for job in [job for job in todo if job.done.exists()]:
                todo.remove(job)
                tqdm.write(f"{job.name:<16} seed {job.seed}  {ending(json.loads(job.done.read_text()))}")

        try:
            if at_once > 1 and todo:
                run_side_by_side(todo, at_once, tick)
            for job in list(todo):
                one_run(job, tick)
                tick()
        except KeyboardInterrupt:
            done = sum(job.done.exists() for job in jobs)
            raise KeyboardInterrupt(f"{done} of {len(jobs)} runs are done; the same command goes on"
                                    ) from None
    return {(job.name, job.seed): json.loads(job.done.read_text()) for job in jobs}


def ending(result):
    """How a run ended, in a few words."""
    if "diverged" in result:
        return result["diverged"]
    last = result["log"][-1]
    share = f"  share {last['first_token_share']:.3f}" if "first_token_share" in last else ""
    return f"val loss {last['val_loss']:.4f}{share}"


def threads_each(at_once):
    """CPU threads of each run, when so many run at once."""
    return max(1, torch.get_num_threads() // at_once)


def work_off(queue):
    """A child process: run after run, until None comes. A mistake of the user is told in one sentence."""
    def work():
        try:
            for job in iter(queue.get, None):
                one_run(job)
        except KeyboardInterrupt:  # told to stop, and saved: the parent says what there is to say
            sys.exit(130)
        finally:  # the parent ends its children with SIGTERM, which may come when this one is leaving already
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_main(work)


def run_side_by_side(todo, at_once, tick):
    """Share the runs out among `at_once` processes. However this ends, no process is left behind."""
    context = multiprocessing.get_context("spawn")
    queue, running = context.Queue(), []
    # The children read it when they load torch.
    os.environ["OMP_NUM_THREADS"] = str(todo[0].c.threads or threads_each(at_once))
    # Ctrl-C goes to all processes of a terminal. Only a run that trains has something to save, and listens by
    # itself (plumbing.machine.ctrl_c). A child that still loads must not print a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(at_once):
            running.append(context.Process(target=work_off, args=(queue,)))
            running[-1].start()
        signal.signal(signal.SIGINT, handler)
        for job in [*todo, *[None] * at_once]:
            queue.put(job)
        while running:
            connection.wait([process.sentinel for process in running], timeout=1)
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                if process.exitcode == 130:  # Ctrl-C, while this process was still starting others
                    raise KeyboardInterrupt
                if process.exitcode:
                    raise ValueError(f"a run ended with status {process.exitcode}, see above; finished runs "
                                     "stay")
            tick()
    finally:
        signal.signal(signal.SIGINT, handler)
        queue.cancel_join_thread()  # nobody may be left to read what is in it
        for process in running:
            process.terminate()
        for process in running:
            process.join()


# ---- numbers ---------------------------------------------------------------------------------------


def count(config):
    """Parameters of a model of this config. The model is built without its numbers."""
    with torch.device("meta"):
        return GPT(config).num_params()


def matched(config, parameters):
    """`config` with the width inside the MLPs that brings it closest to this number of parameters."""
    spare, per_unit = count(config) - parameters, 3 * config.n_embd * config.n_layer  # a SwiGLU is 3 matrices
    return dataclasses.replace(config, mlp_hidden=config.mlp_hidden - round(spare / per_unit))


def mean(values):
    """nan if there are no values."""
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def deviation(values):
    """Standard deviation of a sample; nan for fewer than two values, or where one is nan."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan


def is_noise(difference, error):
    """Whether a mean difference is below twice its standard error, or the error is not known (one seed)."""
    return not abs(difference) >= 2 * error


# ---- files and flags -------------------------------------------------------------------------------


def write_csv(path, rows):
    """Rows as a csv file, with five digits, in a folder that is made. There may be no rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["variant"])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path):
    """Rows as dicts, with numbers where the text is one."""
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def cell(row, key, columns):
    """The text of a cell: a number in its format, - for nan. columns: {key of a row: (heading, format)}."""
    return "-" if row[key] != row[key] else format(row[key], columns[key][1])


def markdown(title, head, note, rows, columns):
    """A file in Markdown: what made the table, a note on what it means, and the table."""
    def line(cells):
        return f"| {' | '.join(cells)} |"
    lines = [f"# {title}\n", *(f"- {what}: {said}" for what, said in head.items()), note]
    lines += [line(heading for heading, _ in columns.values())]
    lines += [line("---:" if form else "---" for _, form in columns.values())]
    return "\n".join([*lines, *(line(cell(row, key, columns) for key in columns) for row in rows), ""])


def head(script, argv, c, at_once, **more):
    """What made a table: {"command": ..., "machine": ...} and more."""
    device = choose_device(c.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    threads = c.threads or threads_each(at_once)
    return {"command": f"`python experiments/{script} {shlex.join(argv)}`",
            "machine": f"{chip} ({platform.machine()}), runs at a time: "
                       f"{at_once}, threads each: {threads}, torch {torch.__version__}", **more}


def run_parser(doc, script):
    """A parser with the flags that all experiments have."""
    parser = parser_of(doc, script, "[--flag=value ...]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on shared threads [%(default)s]")
    return parser


def add_trial_flags(parser, name):
    """Flags for an experiment that can be tried with less. A trial must not replace the recorded results."""
    parser.add_argument("--steps", type=int, help="optimizer steps of a run [the recipe's]")
    parser.add_argument("--results", type=Path, help="folder for table and pictures [experiments/results for "
                        f"three seeds or more and the recipe as it is, else out/{name}]")


def begin(doc, name, argv):
    """(flags, folder for the results) of the script name.py, which has no flags of its own."""
    parser = run_parser(doc, f"{name}.py")
    add_trial_flags(parser, name)
    flags = parser.parse_args(argv)
    return flags, results_of(flags, name)


def finish(folder, name, rows, text):
    """Write rows to name.csv and a text to name.md, and print it."""
    write_csv(folder / f"{name}.csv", rows)
    (folder / f"{name}.md").write_text(text)
    print(text)


def results_of(flags, name, trial=False):
    """The folder for the results of a command."""
    at_least_one(flags, "seeds", "jobs", "steps")
    return flags.results or (Path("out", name) if trial or flags.steps or flags.seeds < 3 else RESULTS)


def at_least_one(flags, *names):
    """ValueError for a flag below 1; None is allowed."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
