"""
The numbers of the experiments, and how they are written: means over seeds, csv files, tables in Markdown.

A row is a dict, and the csv has all of it. A table in Markdown has some of its columns, {key of a row:
(heading, format)}. nan is a number that is not known, in Markdown a dash.
"""
import math
import statistics

from experiments.variants import count
from gated_gpt import uniform_share
from plumbing import report


def mean(values):
    """nan if there are no values."""
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def deviation(values):
    """Standard deviation of a sample; nan for fewer than two values, or where one is nan."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan


def late_floor(T):
    """What late_first_token_share is under uniform attention: mean of 1 / (t + 1) over queries t >= T/4."""
    return mean(1 / (t + 1) for t in range(T // 4, T))


AT_THE_END = {  # what is read in the last row of a run's log
    "val_loss": lambda row: row["val_loss"], "share": lambda row: row["first_token_share"],
    "late_share": lambda row: max(late_shares(row)), "gate_score": lambda row: row["gate_score"],
    "max_activation": lambda row: row["max_activation"]}
MEASURED = {
    "parameters": ("parameters", ","), "seeds": ("seeds", "d"), "diverged": ("diverged", "d"),
    "val_loss": ("val loss", ".4f"), "val_loss_sd": ("± sd", ".4f"), "share": ("share", ".3f"),
    "share_sd": ("± sd", ".3f"), "floor": ("(floor)", ".3f"), "late_share": ("late share", ".3f"),
    "late_floor": ("(floor)", ".3f"), "gate_score": ("gate score", ".3f"),
    "max_activation": ("max activation", ".1f")}
NOTE = """
Val loss: nats per token at the last step, mean and standard deviation (sd) over the seeds that did not
diverge. Share: attention probability on the first token, mean over queries, heads and layers. Late share:
over queries t >= T/4 only, in the layer where it is largest. Floor: what uniform attention has.
"""


def late_shares(row):
    """The late share of each layer in a row of a log."""
    return [layer["late_first_token_share"] for layer in row["layers"]]


def good(results, name):
    """{seed: run} of the runs of that name that did not diverge."""
    return {seed: run for (other, seed), run in results.items() if other == name and not run["diverged"]}


def measured(results, name, config):
    """What the runs of that name have at their last step: means over the seeds, and each one's number."""
    last, T = [run["log"][-1] for run in good(results, name).values()], config.block_size
    seeds = sum(other == name for other, _ in results)
    row = {"parameters": count(config), "seeds": seeds, "diverged": seeds - len(last),
           "floor": uniform_share(T), "late_floor": late_floor(T), "late_share_by_layer": " ".join(
               f"{mean(layer):.4f}" for layer in zip(*map(late_shares, last)))}
    for key, read in AT_THE_END.items():
        values = [read(one) for one in last]
        row |= {key: mean(values), f"{key}_sd": deviation(values),
                f"{key}_by_seed": " ".join(f"{value:.5f}" for value in values)}
    return row


def write_csv(path, rows):
    """Rows as a csv file, with five digits, in a folder that is made."""
    rows = [{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
            for row in rows]
    report.write_csv(path, rows, rows[0] if rows else ())


def table(rows, columns):
    """A table in Markdown, of columns {key of a row: (heading, format)}. nan is a dash."""
    def cell(value, form):
        return "-" if value != value else format(value, form)

    lines = [[heading for heading, _ in columns.values()],
             ["---:" if form else "---" for _, form in columns.values()],
             *([cell(row[key], form) for key, (_, form) in columns.items()] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def markdown(title, head, note, rows, columns):
    """A text in Markdown: what made the table, a note on what it means, and the table."""
    made = (f"- {what}: {said}" for what, said in head.items())
    return "\n".join([f"# {title}\n", *made, note, table(rows, columns)])
