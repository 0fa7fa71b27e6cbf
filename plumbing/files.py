"""Files: written completely or not at all; moved, or not really there."""
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path):
    """A binary file to write to. It takes the place of `path` when it is complete and on disk.

    Raises OSError when it cannot be written, for example because the disk is full. What was at `path` is then
    untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of two processes, each has its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns an OSError into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"cannot write {path} ({cause.strerror}): what was there is untouched") from error
    finally:
        with suppress(OSError):  # it is gone already, or the disk is read-only
            temporary.unlink()


def found_again(tokenizer, near):
    """A tokenizer's folder: where it was, else `near` or a folder in it. Names such as bytes stay."""
    if not {"/", "\\"} & {*tokenizer} or Path(tokenizer).is_dir():
        return tokenizer
    copies = [*near.glob("tokenizer.json"), *near.glob("*/tokenizer.json")]
    return str(copies[0].parent.resolve()) if copies else tokenizer


def from_hub(name):
    """How to get the folder of a model that is named as on the hub; "" for other names."""
    owner, _, model = str(name).partition("/")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) or owner == "out" or Path(owner).exists():
        return ""
    return (f"`pip install huggingface_hub` and `hf download {name} --local-dir {model}` get it from the "
            f"hub, as the folder {model}")


def why(path, error):
    """Why a downloaded file cannot be read, and what to do."""
    if Path(path).is_file() and open(path, "rb").read(40).startswith(b"version https://git-lfs"):
        return "it is only a pointer of git-lfs: run `git lfs pull` there"
    return f"{str(error)[:100]}: get it again"
