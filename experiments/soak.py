"""
One process that trains, saves, resumes and samples again and again: its memory
and its open files stay flat.

    python experiments/soak.py --minutes=120

After each run a line is printed, and all of them are written to soak.csv; for
a trial of your own, add --results=out/trial. Linux only.
"""
import argparse
import csv
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
import train
from data.prepare import run_main
from experiments.compare_gates import RESULTS
from gated_gpt import load_checkpoint
from sample import checkpoint_in

RECIPES = [  # a minute or two each on one core
    train.PRESETS["sink"] | {"gate": "none"}, train.PRESETS["sink"] | {"gate": "g1"},
    train.PRESETS["laptop"] | {"max_steps": 200, "dropout": 0.1}]


def one_run(recipe, folder):
    """Train half of the steps, go on with the other half, and continue a text."""
    steps = recipe["max_steps"]
    for values in ({"max_steps": steps // 2}, {"max_steps": steps, "resume": True}):
        train.train(*train.make_configs(recipe | {"out": folder, "device": "cpu", "threads": 1} | values),
                    quiet=True)
    model, _ = load_checkpoint(checkpoint_in(Path(folder), "best"))
    model.generate(torch.zeros(1, 1, dtype=torch.long), 200)


def state_of_process():
    """(resident memory in MB, open files, threads)"""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")))


def soak(minutes, recipes=RECIPES):
    """Yields {"run", "minutes", "rss_mb", "files", "threads"} after each run, until the minutes are over."""
    began = time.monotonic()
    for run, recipe in enumerate(itertools.cycle(recipes), 1):
        with tempfile.TemporaryDirectory() as folder:
            one_run(recipe, folder)
        rss, files, threads = state_of_process()
        now = (time.monotonic() - began) / 60
        yield {"run": run, "minutes": round(now, 2), "rss_mb": round(rss, 1), "files": files,
               "threads": threads}
        if now >= minutes:
            return


def main(argv=None):
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="how long [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="where soak.csv goes [experiments/results]")
    flags = parser.parse_args(argv)
    if not os.path.exists("/proc/self/statm"):
        raise ValueError("soak.py reads a process's memory from /proc, which only Linux has: run it there")
    if not 0 <= flags.minutes < float("inf"):
        raise ValueError(f"minutes={flags.minutes} must be at least 0, and finite")
    rows = []
    flags.results.mkdir(parents=True, exist_ok=True)
    for row in soak(flags.minutes):
        rows.append(row)
        print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
        with open(flags.results / "soak.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    run_main(main)
