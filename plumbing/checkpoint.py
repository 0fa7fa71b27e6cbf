"""Checkpoints: writing, reading and finding them. Code that somebody has put into one is never run."""
import dataclasses
import pickle
import re
import zipfile
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from gated_gpt import GPT, GPTConfig
from plumbing.files import found_again, from_hub, whole_file
from plumbing.flags import command
from plumbing.report import COLUMNS, variant, write_csv

FORMAT = "gated_gpt 2"
FILES = "last.pt", "best.pt", "log.csv"  # what a run leaves in its folder


def save(path, content):
    """Write a dict of tensors and plain values to one file. Raises OSError when it cannot be written."""
    weights = {name.removeprefix("_orig_mod."): w for name, w in content["model"].items()}  # if compiled
    with whole_file(path) as file:
        torch.save({"format": FORMAT} | content | {"model": weights}, file)


def save_run(model, optimizers, state, c, meta):
    """Write last.pt and log.csv to c.out; and best.pt, if the validation loss is the lowest so far."""
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict(),
               "optimizers": [optimizer.state_dict() for optimizer in optimizers],
               "train_config": dataclasses.asdict(c), "tokenizer": meta["tokenizer"],
               "tokenizer_sha256": meta.get("tokenizer_sha256"), "data": meta["train"]["sha256"], **state}
    if state["log"][-1]["val_loss"] == min(row["val_loss"] for row in state["log"]):
        save(Path(c.out, "best.pt"), content)
    save(Path(c.out, "last.pt"), content)
    write_csv(Path(c.out, "log.csv"), state["log"], COLUMNS)


def load(path):
    """(model, content) of a checkpoint, on the CPU.

    Raises ValueError if it is missing, damaged (the checksums of its zip archive tell) or something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}: " + (from_hub(path) or (
            f"`{command('train.py')}` makes one from scratch, --resume goes on with one")))
    try:
        with open(path, "rb") as file:
            if zipfile.ZipFile(file).testzip():
                raise ValueError("a checksum is wrong")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        if (found := content.get("format")) != FORMAT:
            raise ValueError(f"its format is {found or 'unknown'}, this version reads {FORMAT}")
        model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(content["model"])
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError:  # torch would advise to run what is in the file
        raise ValueError(f"{path} is damaged, or no checkpoint of this version (it holds more than "
                         "tensors and plain values)") from None
    except Exception as error:  # torch raises whatever the bytes lead it to
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or no checkpoint of this version ({reason})") from None
    return model, content


def new_folder(out, name, overwrite):
    """Make the folder of a new run: `out`, or the first of out/name, out/name-2, ... that is free."""
    if out is None:
        for i in count(1):
            folder = Path(f"out/{name}" + (f"-{i}" if i > 1 else ""))
            try:
                folder.mkdir(parents=True)  # of several runs that start at once, only one can make it
                return folder
            except FileExistsError:
                pass
    folder = Path(out)
    for file in [folder / file for file in FILES if (folder / file).exists()]:
        if not overwrite:
            raise ValueError(f"{folder} holds a run: --resume goes on with it, --overwrite replaces it")
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def newest_run(root="out"):
    """Folder of the run in `root` whose checkpoint was written last. ValueError if there is none."""
    files = [*Path(root).glob("*/last.pt"), *Path(root).glob("*/best.pt")]
    if not files:
        raise ValueError(f"there is no run with a checkpoint in {root}/: `{command('train.py')}` makes one")
    return max(files, key=lambda file: file.stat().st_mtime).parent


class Opened(NamedTuple):
    """A model that was found, on the CPU."""
    model: GPT
    tokenizer: str  # its name, or its folder
    sha256: str | None  # of that folder's tokenizer.json, when the run was trained
    data: str | None  # the set that it was trained on; None: a released model
    title: str


def open_model(path):
    """The model in a checkpoint, or in the folder of a run or of a released model, as an Opened."""
    path = Path(path)
    path = path.parent if path.suffix == ".safetensors" else path
    if (path / "config.json").exists():
        from plumbing.released import load_released  # here, because only released models need safetensors
        model = load_released(path)
        title = f"{path}: gate {variant(model.config)}, a released model"
        return Opened(model, str(path.resolve()), None, None, title)
    path = path / "best.pt" if path.is_dir() else path
    model, saved = load(path)
    data, tokenizer = saved["train_config"]["data"], found_again(saved["tokenizer"], path.parent)
    title = f"{path}: gate {variant(model.config)}, step {saved['step']}, data {data}"
    return Opened(model, tokenizer, saved.get("tokenizer_sha256"), data, title)


def take_weights(model, other):
    """Copy the weights of another model, whose gate may differ. Returns how it differs, in words."""
    own, there = model.state_dict(), other.state_dict()
    moved = other.config.gate != model.config.gate  # then its gate is of no use, though it may have the shape
    taken = {name: p for name, p in there.items() if name in own and own[name].shape == p.shape
             and not (moved and ".gate." in name)}
    new, gone = ({re.sub(r"blocks.*\.(gate|sdpa\w*)\..*", r"\1", name) for name in names - taken.keys()}
                 for names in (own.keys(), there.keys()))
    if differ := sorted((new | gone) - {"gate", "sdpa", "sdpa_norm"}):
        raise ValueError(f"init_from has weights of another shape than your flags ask for ({differ[0]}): "
                         "leave out the flags of the model, except the gate's")
    model.load_state_dict(taken, strict=False)
    return "".join([f", new: {part}" for part in sorted(new)]
                   + [f", left out: its {part}" for part in sorted(gone)])
