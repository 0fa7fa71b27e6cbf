"""Claims about sample.py: whose text it prints and how, what it measures on it, and what it refuses."""
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, configs, quiet, refusal, status_of, watching

import sample
import train
from data import prepare
from data.tokenizers import get_tokenizer
from gated_gpt import GPT, measure, uniform_share
from plumbing import checkpoint
from plumbing.report import layer_table

UNICODE = "naïve 東京 🙂🏽 ñ\n"

pytestmark = [pytest.mark.usefixtures("here"),
              pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_root):
    """The folder of a small run of a model in bytes: two layers, 16 tokens in a window."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA", data_root)
        fields = dict(block_size=16, n_layer=2, max_steps=30, eval_every=30, out=str(folder))
        train.train(*configs(**fields), say=quiet)
    return folder


@pytest.fixture
def run(trained, here):
    """A copy of this run, out/tiny-g1 below the working folder."""
    shutil.copytree(trained, here / "out" / "tiny-g1")
    return Path("out/tiny-g1")


def printed(*flags):
    """What sample.py prints behind its title, its precision and a blank line."""
    status, out, err = status_of(sample.main, flags)
    assert status == 0, err
    title, precision, blank, rest = out.split("\n", 3)
    assert title and precision == "dtype    float32 (as stored)" and not blank
    return rest


def title(*flags):
    """The first line that sample.py prints."""
    return status_of(sample.main, ["--tokens=1", *flags])[1].splitlines()[0]


def greedy(run, tokens, n):
    """Continued by the likeliest token n times: one plain forward each, while all fits into the window."""
    model = checkpoint.load(run / "best.pt")[0].eval()
    for _ in range(n):
        tokens = [*tokens, model(torch.tensor([tokens]))[0][0, -1].argmax().item()]
    return tokens


# --- the text ---------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    """Remembers what could be read on it at the last flush."""
    visible = ""

    def flush(self):
        self.visible = self.getvalue()


def test_text_is_on_the_terminal_as_soon_as_it_is_made(run, monkeypatch):
    terminal, lengths = Terminal(), []
    monkeypatch.setattr(sys, "stdout", terminal)
    with watching(lambda model, inputs, output: lengths.append(len(terminal.visible))):
        sample.main(["--tokens=10", "--prompt=Speak", "--temperature=0"])
    assert bytes(greedy(run, [256, *b"Speak"], 10)[1:]).isascii()  # a character for each token
    start = terminal.getvalue().index("Speak")
    assert lengths == [start + 5 + i for i in range(10)]


def test_the_same_seed_gives_the_same_text_but_another_seed_or_a_higher_temperature_another(run):
    texts = [printed("--tokens=60", f"--seed={seed}") for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    texts = [{printed("--tokens=4", "--prompt=Speak th", f"--temperature={t}", f"--seed={seed}")
              for seed in range(8)} for t in (0.01, 5)]
    assert len(texts[0]) == 1 and len(texts[1]) == 8


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_a_window_may_be_longer_than_the_trained_one(scaling, run):
    words = [f"--rope_scaling={scaling}"] if scaling != "none" else []
    out = printed(*words, "--block_size=48", "--tokens=40", "--temperature=0", "--no-stop", "--attn_share")
    model = checkpoint.load(run / "best.pt")[0]
    model.set_window(48, scaling)
    text = get_tokenizer("bytes").decode_bytes(model.generate(torch.tensor([[256]]), 40, 0)[0, 1:].tolist())
    assert out.startswith(text.decode("utf-8", "replace")) and "T=41" in out


@pytest.mark.parametrize("flags", ["--temperature=0", "--temperature=0 --seed=5 --top_k=3",
                                   "--temperature=9 --top_k=1"])
def test_the_likeliest_tokens_are_those_of_plain_forwards_without_a_cache(flags, run):
    for prompt in ("the ", "<|bos|>"):  # which is plain text
        text = bytes(greedy(run, [256, *prompt.encode()], 8)[1:]).decode(errors="replace") + "\n"
        assert printed("--tokens=8", f"--prompt={prompt}", *flags.split()) == text


def test_the_prompt_may_come_from_standard_input_and_no_tokens_leave_it_alone(run, monkeypatch):
    for words, end in (["--tokens=9"], ""), (["--tokens=0"], "\n"):
        expected = printed(*words, f"--prompt={UNICODE}")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(UNICODE.encode()), encoding="ascii"))
        assert printed(*words, "--prompt=-") == expected and expected.startswith(UNICODE + end)


def test_a_text_ends_at_bos_which_is_not_printed_unless_no_stop_is_given(run, monkeypatch):
    def emit(tokens):  # the model makes these tokens; a list of the steps it took
        steps = []
        monkeypatch.setattr(GPT, "stream", lambda model, idx, n, *rest: (
            steps.append(new) or torch.tensor([new]) for new in tokens[:n]))
        return steps

    steps = emit([*b"ab", 256, *b"cd"])
    said = printed("--prompt=x", "--attn_share")
    layers = measure(checkpoint.load(run / "best.pt")[0], torch.tensor([[256, *b"xab"]]))
    assert said.startswith("xab\n") and layer_table(layers, 4) in said and len(steps) == 3
    assert printed("--prompt=x", "--no-stop") == "xab<|bos|>cd\n"
    emit(b"a\xc3")
    assert printed("--prompt=x") == "xa\ufffd\n"  # a character without its last bytes
    emit([256])
    status, out, err = status_of(sample.main, "--prompt=x")
    assert (status, out.splitlines()[-1]) == (0, "x")
    assert err == "the first new token ends the text: --no-stop goes on\n"


# --- where the attention goes -----------------------------------------------------------------------

def rows_of(said):
    return [row.split() for row in said.splitlines() if re.match(r" +\d ", row)]


@pytest.mark.parametrize("n", [7, 40])
def test_attn_share_is_that_of_the_text_or_of_bos_with_the_end_of_a_longer_one(n, run, monkeypatch):
    words = "--prompt=Sp", f"--tokens={n}", "--temperature=0"
    said = printed("--attn_share", *words)
    window = [256, *said[: 2 + n].encode()[-15:]]
    layers = measure(checkpoint.load(run / "best.pt")[0], torch.tensor([window]))
    assert said.startswith(printed(*words)) and layer_table(layers, len(window)) in said
    warning = f"\nOnly {len(window)} tokens: a text this short has a large share even"
    assert (warning in said) == (n == 7)
    monkeypatch.setattr(sample, "SHORT", 10)  # tokens that are enough
    assert warning not in printed("--attn_share", *words)


def test_a_text_is_measured_in_blocks_of_the_window_each_after_a_bos(run):
    text = "Speak the speech, I pray you. " * 4
    Path("text.txt").write_text(text)
    said = printed("--attn_share", "--text=text.txt")
    blocks = torch.tensor([[256, *text.encode()[i : i + 15]] for i in range(0, 120, 15)])
    layers = measure(checkpoint.load(run / "best.pt")[0], blocks)  # all at once
    for row, layer in zip(rows_of(said), layers, strict=True):
        assert abs(float(row[1]) - layer["first_token_share"]) < 0.0011
        assert row[7] == f"{layer['max_activation']:.1f}"
    assert f"here, {len(blocks)} x 16 tokens" in said and "Only" not in said


def test_csv_has_a_row_for_each_layer_and_head_with_what_measure_finds(run):
    Path("text.txt").write_text("Speak the speech, I pray you. " * 4)
    printed("--attn_share", "--text=text.txt", "--csv=shares.csv")
    with open("shares.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    model = checkpoint.load(run / "best.pt")[0]
    text = Path("text.txt").read_bytes()
    layers = measure(model, torch.tensor([[256, *text[i : i + 15]] for i in range(0, 120, 15)]))
    assert len(rows) == model.config.n_layer * model.config.n_head
    for row in rows:
        layer = layers[int(row["layer"])]
        expected = layer | {"uniform_share": uniform_share(16),
                            "share_of_head": layer["first_token_share_by_head"][int(row["head"])]}
        for name in row.keys() - {"layer", "head"}:
            assert float(row[name]) == pytest.approx(expected[name], abs=1e-5), name


def test_a_long_text_is_measured_in_64_blocks_that_span_it():
    encoding = get_tokenizer("bytes")
    text = "".join(chr(32 + i // 100) for i in range(9000))
    blocks = sample.text_blocks(text, encoding, None, 10)
    assert blocks.shape == (64, 10) and blocks[0].tolist() == list(text[:10].encode())
    assert blocks[-1].tolist() == list(text[-10:].encode()) and len(set(blocks[:, 0].tolist())) > 50
    with_bos = sample.text_blocks(text, encoding, 256, 10)
    assert with_bos.shape == (64, 10) and set(with_bos[:, 0].tolist()) == {256}


@pytest.mark.parametrize("flags", [["--tokens=0"], ["--prompt=Speak 東🙂 $x$ $\\frac$" + "x" * 99],
                                   ["--attn_share", "--text=text.txt"]])
def test_attn_map_draws_a_png(flags, run):
    pytest.importorskip("matplotlib")
    Path("text.txt").write_text("Speak the speech")
    assert "map.png: attention on the first" in printed("--attn_map=map.png", "--layer=1", *flags)
    assert Path("map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_attn_map_that_cannot_be_drawn_is_refused(run, monkeypatch):
    pytest.importorskip("matplotlib")
    for words, said in {"nowhere/map.png": "nowhere/map.png", "map.txt": "txt", "map.png --layer=2":
                        "this model has layers 0 to 1", "map.png --head=2": "heads 0 to 1"}.items():
        assert said in refusal(sample.main, f"--tokens=3 --attn_map={words}")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    assert "pip install matplotlib" in refusal(sample.main, "--attn_map=map.png --tokens=3")


# --- which checkpoint -------------------------------------------------------------------------------

def test_ckpt_is_a_folder_or_a_file_and_by_default_the_newest_run_with_its_best_checkpoint(run):
    for name in ("older", "newest", "old"):
        shutil.copytree(run, Path("out", name))
    for file in Path("out").glob("*/*.pt"):
        os.utime(file, (5, 5))
    os.utime("out/newest/last.pt", (10, 10))
    assert title() == "out/newest/best.pt: gate g1, step 30, data tiny"
    for name, read in {"": "best.pt", "/": "best.pt", "/last.pt": "last.pt", "/best.pt": "best.pt"}.items():
        assert title(f"--ckpt=out/old{name}").startswith(f"out/old/{read}: ")
    shutil.rmtree("out")
    said = "there is no run with a checkpoint in out/: `python .*train.py` makes one"
    assert re.search(said, refusal(sample.main, ""))


# --- mistakes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    *((f"--{number}", rf": {number} must be at least [01], ") for number in (
        "tokens=-1", "temperature=-0.1", "temperature=nan", "temperature=inf", "top_k=0", "seed=-1")),
    *((f"--ckpt={name}", name) for name in ("nowhere", "nowhere/last.pt", "empty", "one.txt")),
    ("--prompt=" + os.fsdecode(b"caf\xe9"), r"--prompt: invalid utf8 value: 'caf\\udce9'"),
    ("--layer=0", "--layer has no effect without --attn_map: give both"), ("--head=0", "--head has no"),
    ("--block_size=0", "block_size=0 must be at least 2"),
    ("--rope_scaling=yarn", "--rope_scaling has no effect without --block_size"),
    ("--text=text.txt", "--text has no effect without --attn_share"), ("--csv=x", "--csv has no effect"),
    ("--text=text.txt --attn_share --prompt=x", "in place of a --prompt: give one"),
    ("--attn_share --text=nowhere", "nowhere"), ("--attn_share --text=out", "out cannot be used"),
    ("--attn_share --text=latin.txt", "latin.txt is not"),
    ("--attn_share --text=one.txt", "the text has 1 tokens, too few"), ("--device=banana", "banana"),
    ("--compile", "arguments: --compile"), ("--samples=3", "did you mean --seed=1, and --seed=2 for the")])
def test_what_does_not_fit_is_refused_by_its_name(flags, said, run):
    Path("empty").mkdir()
    for name, content in {"text.txt": b"Speak", "latin.txt": b"\xe9", "one.txt": b"a"}.items():
        Path(name).write_bytes(content)
    assert re.search(said, refusal(sample.main, flags))


def test_text_goes_through_a_pipe_of_any_encoding(run, shell):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt=-", "--tokens=30", "--seed=1"],
                          input=UNICODE.encode(), capture_output=True, timeout=600,
                          env=shell | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    assert "gate g1" in done.stdout.decode("ascii") and "na?ve ?? ?" in done.stdout.decode("ascii")
