"""
What the experiments share: runs that are made once and kept.

    jobs = plan({"none": (config, c), "g1": (config, c)}, range(3), look)
    results = run_all(jobs, at_once=2)  # {("none", 0): {"log": [...], "diverged": None, ...}, ...}

A run belongs to no experiment. Its folder in out/runs/ is named after all that decides the training: flags,
seed, data, and the code of gated_gpt.py and train.py. So the same command goes on where it was stopped, two
experiments that need the same run train it once, and what other code has made is never shown. `look` finds
what an experiment wants to know of a finished model. It is kept beside the run, in a file that is named after
the code of look's module: other code looks anew, without training anew.
Reading order: code_of -> Job -> plan -> one_run -> run_all -> run_side_by_side -> flags.
"""
import argparse
import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout  # torch needs it, too
from tqdm import tqdm

import train
from data import prepare
from experiments.tables import write_csv
from gated_gpt import GPTConfig
from plumbing import checkpoint
from plumbing.files import whole_file
from plumbing.flags import parser_of, run_main
from plumbing.machine import choose_device, silent
from plumbing.report import variant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
MACHINE = {"out", "resume", "overwrite", "threads"}  # fields that do not change what a run learns


# ---- the plan: which runs, and where they are kept -------------------------------------------------


def digest(content):
    """Eight letters and digits for plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


@functools.cache
def code_of(path):
    """Digest of a Python file. Comments, docstrings, line breaks and the version of Python do not count."""
    def lists(node):  # a syntax tree; which fields may be empty differs from version to version
        if isinstance(node, list):
            return [lists(part) for part in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, False):
            node.body = node.body[1:]
        return [type(node).__name__, *([name, lists(part)] for name, part in ast.iter_fields(node)
                                       if part is not None and part != [])]

    return digest(lists(ast.parse(path.read_text(encoding="utf-8"))))


class Job(NamedTuple):
    """A training run, and what an experiment looks at in it."""
    name: Any  # what is compared, such as a variant: a text, or several values
    seed: int
    config: GPTConfig
    c: train.TrainConfig
    folder: Path
    look: Callable | None  # (job, trained model) -> {name: plain values}; a function at the top of a module
    found: Path  # the file for what it finds

    @property
    def steps(self):
        """Steps done so far, by the lines of the run's log."""
        log = self.folder / "log.csv"
        lines = log.read_bytes().count(b"\n") - 1 if log.exists() else 0
        return min(self.c.max_steps, lines * self.c.eval_every)


def plan(recipes, seeds, look=None):
    """A Job for each seed of each of {name: (GPTConfig, TrainConfig)}, seed by seed.

    seeds: those of each, or {name: its seeds}.
    """
    jobs, seeds = [], seeds if isinstance(seeds, dict) else dict.fromkeys(recipes, seeds)
    file = Path(inspect.getfile(look)) if look else None
    found = f"{file.stem}-{code_of(file)}.json" if look else "done.json"
    for seed in sorted(set().union(*seeds.values())):
        for name, (config, c) in recipes.items():
            if seed in seeds[name]:
                folder = folder_of(config, c := dataclasses.replace(c, seed=seed))
                jobs.append(Job(name, seed, config, c, folder, look, folder / found))
    return jobs


def folder_of(config, c):
    """The folder of the run that these two configs describe."""
    meta, _ = prepare.load(c.data)
    decides = [dataclasses.asdict(config),
               {name: value for name, value in dataclasses.asdict(c).items() if name not in MACHINE},
               *(meta[split]["sha256"] for split in ("train", "val")),
               *(code_of(ROOT / file) for file in ("gated_gpt.py", "train.py"))]
    return Path("out", "runs", f"{Path(c.data).name}-{variant(config)}-{c.seed}-{digest(decides)}")


# ---- running it ------------------------------------------------------------------------------------


@contextmanager
def alone_in(folder):
    """Whether no other process works in this folder, and none will. The lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield True
    except Timeout:
        yield False


def one_run(job, say=silent):
    """Train a run to its end, from its checkpoint if there is one, and look at it. What is there stays.

    Nothing if another process is at it. `say` is called at every evaluation. A run whose loss is not finite
    has ended, too: done.json says so, and its log is that before.
    """
    last, done = job.folder / "last.pt", job.folder / "done.json"
    with alone_in(job.folder) as alone:
        if alone and not done.exists():
            diverged = None
            try:
                if not last.exists() or checkpoint.load(last)[1]["step"] < job.c.max_steps:
                    resume = last.exists()  # a best.pt alone is from a run that was killed in its first save
                    c = dataclasses.replace(job.c, out=str(job.folder), resume=resume, overwrite=not resume)
                    train.train(job.config, c, say)
            except FloatingPointError as error:
                diverged = str(error)
            if last.exists():  # two thirds of it are the optimizer's: no longer needed
                checkpoint.save(last, checkpoint.load(last)[1] | {"optimizers": []})
                (job.folder / "best.pt").unlink(missing_ok=True)
            write_json(done, {"diverged": diverged})
        if alone and not job.found.exists():
            found = {}
            if json.loads(done.read_bytes())["diverged"] is None:
                found = job.look(job, checkpoint.load(last)[0].to(choose_device(job.c.device)))
            write_json(job.found, found)


def write_json(path, content):
    """Plain values, all of them finite."""
    with whole_file(path) as file:
        file.write(json.dumps(content, allow_nan=False).encode())


def result_of(job):
    """{"log": [...], "diverged": None or why, and what look has found} of a job that is done."""
    last = job.folder / "last.pt"
    done, found = (json.loads(file.read_bytes()) for file in (job.folder / "done.json", job.found))
    return done | found | {"log": checkpoint.load(last)[1]["log"] if last.exists() else []}


def run_all(jobs, at_once):
    """Do what is not done yet, here or in `at_once` processes. Returns {(name, seed): result_of(job)}.

    KeyboardInterrupt comes when all is saved.
    """
    todo = [job for job in jobs if not job.found.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done already, in out/runs")
    total = sum(job.c.max_steps for job in jobs)
    with tqdm(total=total, initial=sum(job.steps for job in jobs), unit="step", disable=None) as bar:
        def tick(text=""):
            bar.update(max(0, sum(job.steps for job in jobs) - bar.n))
            for job in [job for job in todo if job.found.exists()]:
                todo.remove(job)
                result, ended = result_of(job), "val loss {val_loss:.4f}  share {first_token_share:.3f}"
                ended = result["diverged"] or ended.format(**result["log"][-1])
                tqdm.write(f"{str(job.name):<16} seed {job.seed}  {ended}")

        try:
            if at_once > 1 and todo:
                run_side_by_side(todo, at_once, tick)
            while todo:
                for job in list(todo):
                    one_run(job, tick)
                    tick()
                time.sleep(1 if todo else 0)  # another command is at the rest
        except KeyboardInterrupt:
            done = sum(job.found.exists() for job in jobs)
            raise KeyboardInterrupt(f"{done} of {len(jobs)} runs are done; the same command goes on"
                                    ) from None
    return {(job.name, job.seed): result_of(job) for job in jobs}


def threads_each(at_once):
    """CPU threads of each run, when so many run at once."""
    return max(1, torch.get_num_threads() // at_once)


def work_off(jobs):
    """In a child process: each job that no other process is at. A user's mistake is told in one sentence."""
    def work():
        try:
            for job in jobs:
                one_run(job)
        except KeyboardInterrupt:  # told to stop, and saved: the parent says what there is to say
            sys.exit(130)
        finally:  # the parent ends its children with SIGTERM, which may come when this one is leaving already
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_main(work)


def run_side_by_side(todo, at_once, tick):
    """Work off the jobs in `at_once` processes. However this ends, no process is left behind."""
    # The children read it when they load torch.
    os.environ["OMP_NUM_THREADS"] = str(todo[0].c.threads or threads_each(at_once))
    # Ctrl-C goes to all processes of a terminal. Only a run that trains has something to save, and listens by
    # itself (plumbing.machine.ctrl_c). A child that still loads must not print a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which children inherit
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work_off, args=(list(todo),)) for _ in range(at_once)]
    try:
        for process in running:
            process.start()
        signal.signal(signal.SIGINT, handler)
        while any(process.is_alive() for process in running):
            connection.wait([process.sentinel for process in running if process.is_alive()], timeout=1)
            if wrong := [process.exitcode for process in running if process.exitcode]:  # None: it still runs
                raise KeyboardInterrupt if 130 in wrong else ValueError(
                    f"a run ended with status {wrong[0]}, see above; finished runs stay")
            tick()
    finally:
        signal.signal(signal.SIGINT, handler)
        for process in running:
            process.terminate()
        for process in running:
            process.join()


# ---- flags -----------------------------------------------------------------------------------------


def positive(text):
    """The type of a flag that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def parser_for(doc, name, seeds="3"):
    """A parser with the flags that all experiments have, for the script name.py."""
    parser = parser_of(doc, f"{name}.py", "[--flag=value ...]")
    parser.add_argument("--seeds", type=positive, help=f"runs of each kind [{seeds}]")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time, sharing the threads [1]")
    parser.add_argument("--steps", type=positive, help="optimizer steps of a run [the recipe's]")
    parser.add_argument("--results", type=Path, help="folder for table and pictures [experiments/results for "
                        f"three seeds or more and the recipe as it is, else out/{name}]")
    return parser


def results_of(flags, name, trial=False):
    """The folder for the results of a command. A trial must not replace the recorded ones."""
    trial = trial or flags.steps or (flags.seeds or 3) < 3
    return flags.results or (Path("out", name) if trial else RESULTS)


def begin(doc, name, argv, seeds="3"):
    """(flags, folder for the results, what made them) of the script name.py, which has no other flags."""
    argv = sys.argv[1:] if argv is None else argv
    flags = parser_for(doc, name, seeds).parse_args(argv)
    from experiments import figures  # noqa: F401  without matplotlib it stops here, before the training
    return flags, results_of(flags, name), head(f"{name}.py", argv, train.TrainConfig(), flags.jobs)


def finish(folder, name, rows, text, show=None, **pictures):
    """Write name.csv and name.md, print the text (or `show`), and draw the pictures: see figures.save."""
    from experiments import figures  # here, because the processes that train do not need it
    write_csv(folder / f"{name}.csv", rows)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(show or text, *figures.save(folder, name, pictures), sep="\n")


def head(script, argv, c, at_once):
    """What made a table: {"command": ..., "machine": ...}."""
    device = choose_device(c.device)
    return {"command": f"`python experiments/{script} {shlex.join(argv)}`",
            "machine": f"{device} ({chip(device)}), runs at a time: {at_once}, threads each: "
                       f"{c.threads or threads_each(at_once)}, torch {torch.__version__}"}


def chip(device):
    """The name of the processor, as far as it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.path.exists("/proc/cpuinfo") else ""
    return (re.search(r"^model name\s*: (.+)$", told, re.MULTILINE) or [0, platform.machine()])[1]
