"""Write a file completely, or not at all."""
import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path):
    """A binary file to write to. It takes the place of `path` when it is complete and on disk.

    Raises OSError when it cannot be written, for example because the disk is full. What was at `path` is then
    untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
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
