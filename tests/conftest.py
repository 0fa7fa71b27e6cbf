"""What the tests share: two small data sets, an empty folder to work in, a tiny run, and a refusal."""
import contextlib
import io
import os
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import train
from data import prepare
from gated_gpt import GPT
from plumbing.flags import run_main
from plumbing.machine import silent as quiet

torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Speak the speech, I pray you: naïve, 東京, 🙂.\n" * 100
TINY = dict(data="tiny", block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=4, max_steps=6,
            eval_every=3, eval_windows=5, warmup_steps=2, learning_rate=1e-2, device="cpu", threads=1)


def configs(**fields):
    """(GPTConfig, TrainConfig) of a tiny run."""
    return train.make_configs(TINY | fields)


def fit(**fields):
    """The log of a tiny run."""
    return train.train(*configs(**fields), say=quiet)[1]


def flags(**fields):
    """A tiny run's flags for the command line."""
    return [f"--{name}={value}" for name, value in (TINY | fields).items()]


def status_of(main, argv):
    """(exit status, what was printed, what was printed to stderr) of a script's main with these flags."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = shlex.split(argv) if isinstance(argv, str) else list(map(str, argv))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(partial(main, argv))
        except SystemExit as end:
            status = end.code or 0
    return status, out.getvalue(), err.getvalue()


def refusal(main, argv):
    """The one sentence with which a script refuses these flags, with status 2 and without a traceback."""
    status, _, err = status_of(main, argv)
    sentence = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err, (status, err)
    return sentence


@contextlib.contextmanager
def no_file_beyond(size):
    """Nobody can write a larger file, as on a disk that is nearly full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def watching(see):
    """see(model, inputs, output) after each forward of a GPT."""
    def hook(module, inputs, output):
        if isinstance(module, GPT):
            see(module, inputs, output)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def all_files(folder):
    """{path: bytes} of what is in a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A folder with two small sets of the same text: `tiny` in bytes, `words` in the shipped BPE."""
    root = tmp_path_factory.mktemp("data")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA", root)
        prepare.prepare_files([root / "text.txt"], "tiny", "bytes")
        prepare.prepare_files([root / "text.txt"], "words", "bpe2k")
    return root


@pytest.fixture
def use_data(monkeypatch):
    """use_data(root): from here on, data sets live in that folder, for this process and its children."""
    def use(root):
        monkeypatch.setattr(prepare, "DATA", Path(root))
        monkeypatch.setenv("GATED_GPT_DATA", str(root))

    return use


@pytest.fixture
def shell(tmp_path):
    """The variables of a shell in which a script's folder is not on the path (python -P), but other people's
    packages with our names are.
    """
    for name in ("data", "plumbing", "experiments"):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "__init__.py").touch()
    own = {"PYTHONPATH": str(tmp_path / "others"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | own


@pytest.fixture
def here(tmp_path, monkeypatch, data_root, use_data):
    """An empty folder to work in, with the small sets at hand."""
    monkeypatch.chdir(tmp_path)
    use_data(data_root)
    return tmp_path
