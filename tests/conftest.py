"""What the tests of train.py and sample.py share: small data sets, and an empty folder to work in."""
import contextlib
import io
import shutil
from functools import partial

import pytest
import torch

from data import prepare

torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way

TEXT = "Speak the speech, I pray you: naïve, 東京, 🙂.\n" * 100


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A folder with two small sets of the same text: `tiny` in bytes, `words` in the shipped BPE."""
    root = tmp_path_factory.mktemp("data")
    shutil.copy(prepare.DATA / "bpe2k.tiktoken", root)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.prepare_files([root / "text.txt"], "tiny", "bytes", root)
        prepare.prepare_files([root / "text.txt"], "words", "bpe2k", root)
    return root


@pytest.fixture
def use_data(monkeypatch):
    """use_data(root): from here on, data sets are looked for and made in that folder."""
    load, prepare_one = prepare.load, prepare.prepare

    def use(root):
        monkeypatch.setattr(prepare, "DATA", root)
        monkeypatch.setattr(prepare, "load", partial(load, root=root))
        monkeypatch.setattr(prepare, "prepare", partial(prepare_one, root=root))

    return use


@pytest.fixture
def here(tmp_path, monkeypatch, data_root, use_data):
    """An empty folder to work in, with the small sets at hand."""
    monkeypatch.chdir(tmp_path)
    use_data(data_root)
    return tmp_path


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="abuse tests at their full length, half an hour")


@pytest.fixture
def long(request):
    """Whether the tests of test_abuse.py run at their full length."""
    return request.config.getoption("--long")
