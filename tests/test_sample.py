"""Claims about sample.py: whose text it prints and how, what it measures on it, and what it refuses."""
import io
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import sample
import train
from data import prepare
from gated_gpt import GPT, load_checkpoint, measure, uniform_share

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
TINY = dict(data="tiny", block_size=16, n_layer=2, n_head=2, n_embd=16, batch_size=4, max_steps=30,
            eval_every=30, eval_windows=4, warmup_steps=2, learning_rate=1e-2, device="cpu")
UNICODE = "naïve 東京 🙂🏽 ñ\u0000\n"

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_root):
    """A folder with a tiny run of a model in bytes, out/tiny-g1."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load", partial(prepare.load, root=data_root))
        train.train(*train.make_configs(TINY | dict(out=str(folder / "out" / "tiny-g1"))), quiet=True)
    return folder


@pytest.fixture
def run(trained, here):
    """A copy of the tiny run, out/tiny-g1 below the working folder."""
    shutil.copytree(trained / "out", here / "out")
    return Path("out/tiny-g1")


@pytest.fixture
def printed(capsys):
    """printed(*flags): what sample.py prints behind its first line and a blank one."""
    def text(*flags):
        capsys.readouterr()
        sample.main(flags)
        first, blank, rest = capsys.readouterr().out.split("\n", 2)
        assert first and not blank
        return rest
    return text


def status_of(*flags):
    """The exit status of sample.py with these flags."""
    try:
        sample.run_main(partial(sample.main, flags))
    except SystemExit as end:
        return end.code or 0
    return 0


def refusal(capsys, *flags):
    """The one sentence with which sample.py refuses these flags."""
    assert status_of(*flags) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.split(": ", 1)[1].strip(), said
    return said


def greedy(model, tokens, n):
    """Continued by the likeliest token n times: one plain forward each, while all fits into the window."""
    for _ in range(n):
        tokens = [*tokens, model.eval()(torch.tensor([tokens]))[0][0, -1].argmax().item()]
    return tokens


# ------------------------------------------------------------------------------------------------------------
# Whole characters


@pytest.mark.parametrize("name", ["bytes", "bpe2k"])
def test_a_character_is_printed_as_soon_as_its_last_byte_has_come_and_never_in_parts(name):
    encoding = prepare.get_tokenizer(name)
    tokens, text = encoding.encode_ordinary(UNICODE), ""
    given = []
    pieces = sample.stream_text((given.append(token) or token for token in tokens), encoding)
    for piece in pieces:
        text += piece
        so_far = encoding.decode_bytes(given)
        assert text == so_far.decode(errors="ignore")  # whole characters at the front, and no more
    assert text == UNICODE and given == tokens


@pytest.mark.parametrize("content, text", [
    (b"a\xe6\x9db", "a\ufffdb"), (b"a\xffb", "a\ufffdb"), (b"\x80\x80", "\ufffd\ufffd"), (b"\xc3", "\ufffd"),
    (b"ok\xf0\x9f\x99", "ok\ufffd"), (b"\xe6\x9d\xb1\xe6", "東\ufffd"), (b"\xed\xa0\x80", "\ufffd" * 3),
    (b"", "")], ids=str)
def test_bytes_that_never_become_a_character_show_as_one_that_says_so(content, text):
    assert "".join(sample.stream_text(content, prepare.get_tokenizer("bytes"))) == text


def test_numbers_beyond_the_tokenizer_are_silent():
    encoding = prepare.get_tokenizer("bytes")
    assert "".join(sample.stream_text([104, 257, 105, 300, 50303], encoding)) == "hi"


class Terminal(io.StringIO):
    """Remembers what could be read on it at the last flush."""
    visible = ""

    def flush(self):
        self.visible = self.getvalue()


def test_text_is_on_the_terminal_as_soon_as_it_is_made(run, monkeypatch):
    terminal, lengths = Terminal(), []

    def see(module, inputs, output):
        if isinstance(module, GPT):
            lengths.append(len(terminal.visible.encode()))

    monkeypatch.setattr(sys, "stdout", terminal)
    handle = register_module_forward_hook(see)
    try:
        sample.main(["--tokens=20", "--prompt=Speak", "--temperature=0"])
    finally:
        handle.remove()
    model = load_checkpoint(run / "best.pt")[0]
    text = bytes(greedy(model, [256, *b"Speak"], 10)[1:])
    assert text.isascii() and len(lengths) == 20  # one byte a token, so one byte more at each forward
    start = terminal.getvalue().index("Speak")
    assert lengths == [start + 5 + i for i in range(20)]


# ------------------------------------------------------------------------------------------------------------
# The text


def test_the_first_line_says_which_gate_step_and_data(run, capsys):
    sample.main(["--tokens=1"])
    first = capsys.readouterr().out.splitlines()[0]
    for what in (str(run / "best.pt"), "gate g1", "step 30", "data tiny"):
        assert what in first


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run, printed):
    texts = [printed("--tokens=60", f"--seed={seed}") for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len({printed("--tokens=60", "--samples=2", f"--seed={seed}") for seed in (0, 0, 1)}) == 2


def test_temperature_0_takes_the_likeliest_token_whatever_the_seed(run, printed):
    model = load_checkpoint(run / "best.pt")[0]
    text = bytes(greedy(model, [256, *b"the "], 11)[1:]).decode(errors="replace") + "\n"
    for flag in ("--seed=0", "--seed=5", "--top_k=3"):
        assert printed("--tokens=11", "--prompt=the ", "--temperature=0", flag) == text
    assert printed("--tokens=11", "--prompt=the ", "--top_k=1", "--temperature=9") == text


def test_a_higher_temperature_gives_more_different_texts(run, printed):
    texts = [{printed("--tokens=4", "--prompt=Speak th", f"--temperature={t}", f"--seed={seed}")
              for seed in range(8)} for t in (0.01, 5)]
    assert len(texts[0]) == 1 and len(texts[1]) == 8


def test_as_many_samples_are_printed_as_were_asked_for_each_after_the_prompt(run, printed):
    said = printed("--samples=3", "--tokens=40", "--prompt=Speak", "--temperature=1")
    texts = re.split(r"^--- (\d) ---\n", said, flags=re.M)
    assert texts[0] == "" and texts[1::2] == ["1", "2", "3"]
    assert all(text.startswith("Speak") for text in texts[2::2]) and len(set(texts[2::2])) == 3


@pytest.mark.parametrize("samples", [1, 3])
def test_no_tokens_leave_the_prompt_alone(samples, run, printed):
    said = printed("--tokens=0", "--prompt=Speak", f"--samples={samples}")
    assert said.count("Speak") == samples
    assert set(said.split()) <= {"Speak", "---", "1", "2", "3"}


def test_the_number_of_tokens_is_the_number_of_bytes_of_a_model_in_bytes(run, printed):
    said = printed("--tokens=37", "--temperature=0", "--prompt=Spe")
    assert said.isascii() and len(said) == len("Spe") + 37 + len("\n")


def test_the_prompt_may_come_from_standard_input(run, printed, monkeypatch):
    expected = printed("--tokens=9", "--prompt=Speak\nthe ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Speak\nthe "))
    assert printed("--tokens=9", "--prompt=-") == expected


@pytest.mark.parametrize("prompt", ["", UNICODE, "x" * 14, "x" * 15, "x" * 16, "naïve 🙂 " * 20, "<|bos|>"],
                         ids=lambda prompt: f"{len(prompt)} {prompt[:8]!a}")
def test_any_prompt_comes_first_as_it_is_and_is_followed_by_text(prompt, run, printed):
    said = printed("--tokens=40", f"--prompt={prompt}", "--temperature=0")
    assert said.startswith(prompt) and len(said) > len(prompt) + 5


def test_a_text_that_says_bos_is_plain_text():
    encoding = prepare.get_tokenizer("bytes")
    assert sample.tokens_of("<|bos|>é", encoding, 256).tolist() == [[256, *"<|bos|>é".encode()]]
    assert sample.tokens_of("", encoding, 256).tolist() == [[256]]


# ------------------------------------------------------------------------------------------------------------
# Where the attention goes


def test_attn_share_prints_a_row_for_each_layer_beside_the_floor_of_the_texts_length_and_warns(run, printed):
    said = printed("--attn_share", "--prompt=Sp", "--tokens=7", "--temperature=0")
    model = load_checkpoint(run / "best.pt")[0]
    layers = measure(model, torch.tensor([greedy(model, [256, *b"Sp"], 7)]))
    assert f"T=10; uniform attention would give {uniform_share(10):.3f}" in said
    rows = [row.split() for row in said.splitlines() if re.match(r" +\d ", row)]
    assert [row[0] for row in rows] == ["0", "1"]
    for row, layer in zip(rows, layers):
        heads = layer["first_token_share_by_head"]
        assert row[1] == f"{layer['first_token_share']:.3f}"
        assert row[2:5] == [f"{max(heads):.3f}", "in", str(heads.index(max(heads)))]
        assert row[5:] == [f"{layer['late_first_token_share']:.3f}", f"{layer['gate_score']:.3f}",
                           f"{layer['gate_closed']:.3f}", f"{layer['max_activation']:.1f}"]
    assert "10 tokens" in said.splitlines()[-2] and "short" in said.splitlines()[-2]


def test_attn_share_of_a_text_longer_than_the_window_is_that_of_bos_and_its_end(run, printed):
    said = printed("--attn_share", "--prompt=Sp", "--tokens=40", "--temperature=0")
    text = said.encode()[:42]
    layers = measure(load_checkpoint(run / "best.pt")[0], torch.tensor([[256, *text[-15:]]]))
    assert f"T=16; uniform attention would give {uniform_share(16):.3f}" in said
    for i, layer in enumerate(layers):
        assert re.search(rf"^ +{i} +{layer['first_token_share']:.3f} ", said, re.M)


def test_measuring_does_not_change_the_text(run, printed):
    text = printed("--tokens=30")
    assert printed("--tokens=30", "--attn_share").startswith(text)


def test_a_model_without_a_gate_has_dashes_and_no_nan(printed):
    train.train(*train.make_configs(TINY | dict(gate="none", max_steps=1)), quiet=True)
    said = printed("--attn_share", "--tokens=5")
    rows = [row.split() for row in said.splitlines() if re.match(r" +\d ", row)]
    assert len(rows) == 2 and all(row[6:8] == ["-", "-"] for row in rows) and "nan" not in said


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning", "ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("prompt, tokens", [("", 0), ("Speak 東🙂 $x$ $\\frac$", 6), ("x" * 99, 40)],
                         ids=["empty", "signs", "long"])
def test_attn_map_draws_a_png(prompt, tokens, run, printed):
    pytest.importorskip("matplotlib")
    said = printed("--attn_map=map.png", f"--prompt={prompt}", f"--tokens={tokens}")
    assert Path("map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and "map.png" in said


def test_attn_map_without_matplotlib_says_what_to_install(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    said = refusal(capsys, "--attn_map=map.png", "--tokens=3")
    assert "matplotlib" in said and "pip install" in said


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning", "ignore:__array__:DeprecationWarning")
def test_attn_map_in_a_folder_that_is_not_there_is_refused(run, capsys):
    pytest.importorskip("matplotlib")
    assert "nowhere" in refusal(capsys, "--attn_map=nowhere/map.png", "--tokens=3")


# ------------------------------------------------------------------------------------------------------------
# Which checkpoint


def test_attn_map_is_a_file_of_a_kind_that_can_be_drawn(run, capsys, here):
    for name in ("map", "map.txt", str(here)):
        assert f"attn_map={name} must end in .png" in refusal(capsys, f"--attn_map={name}")


def test_a_prompt_with_half_a_character_is_refused_before_anything_is_made_of_it(run, capsys):
    assert "no UTF-8 form" in refusal(capsys, "--prompt=a\udcff")


def test_a_standard_input_that_is_closed_is_no_prompt(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input, which is closed" in refusal(capsys, "--prompt=-")


@pytest.mark.parametrize("temperature", ["1e-20", "1e-45", "1e-320"])
def test_a_temperature_next_to_0_is_as_good_as_0(temperature, run, printed):
    assert printed(f"--temperature={temperature}", "--tokens=9") == printed("--temperature=0", "--tokens=9")


def test_the_newest_run_is_the_default_and_its_best_checkpoint_the_first_choice(run, capsys):
    for number, name in enumerate(("older", "newest", "old")):
        shutil.copytree(run, Path("out", name))
        for file in Path("out", name).glob("*.pt"):
            os.utime(file, (number, 10 if name == "newest" else number))
    for file in run.glob("*.pt"):
        os.utime(file, (5, 5))
    sample.main(["--tokens=1"])
    assert capsys.readouterr().out.startswith(str(Path("out/newest/best.pt")))
    Path("out/newest/best.pt").unlink()
    sample.main(["--tokens=1"])
    assert capsys.readouterr().out.startswith(str(Path("out/newest/last.pt")))


@pytest.mark.parametrize("name, read", [
    ("out/tiny-g1", "best.pt"), ("out/tiny-g1/", "best.pt"), ("out/tiny-g1/last.pt", "last.pt"),
    ("out/tiny-g1/best.pt", "best.pt")])
def test_ckpt_is_a_folder_or_a_file(name, read, run, capsys):
    sample.main([f"--ckpt={name}", "--tokens=1"])
    assert capsys.readouterr().out.startswith(str(run / read))


def test_a_checkpoint_that_is_missing_or_something_else_is_refused_by_name(run, capsys, here):
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("not a model")
    for name in ("nowhere", "nowhere/last.pt", "empty", "notes.txt", "."):
        assert name in refusal(capsys, f"--ckpt={name}")


def test_without_any_run_the_command_that_makes_one_is_named(capsys):
    assert "train.py" in refusal(capsys)


# ------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("flag", ["--tokens=-1", "--samples=0", "--samples=-2", "--temperature=-0.1",
                                  "--temperature=nan", "--temperature=inf", "--top_k=0", "--seed=-1"])
def test_a_number_that_cannot_be_is_refused_with_its_name_and_value(flag, run, capsys):
    name, value = flag[2:].split("=")
    assert re.search(rf"\b{name}={value}\b", refusal(capsys, flag))


@pytest.mark.parametrize("flag", ["--tokens=many", "--temperature=hot", "--token=3", "--verbose", "more",
                                  "--top_k="])
def test_a_flag_that_is_unknown_or_shortened_or_no_number_is_refused(flag, run, capsys):
    assert status_of(flag) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused_by_name_and_not_blamed_on_the_checkpoint(device, run, capsys):
    said = refusal(capsys, f"--device={device}")
    assert device in said and "cut short" not in said


def test_every_flag_has_a_line_of_help(capsys):
    assert status_of("--help") == 0
    said = capsys.readouterr().out
    for name in ("ckpt", "prompt", "tokens", "samples", "temperature", "top_k", "seed", "device",
                 "attn_share", "attn_map"):
        assert re.search(rf"^  --{name}\b( \S+)?\s+\S", said, re.M), name


def test_what_a_user_can_mend_ends_with_2_and_an_interruption_with_130_and_a_bug_with_its_traceback(capsys):
    def fails(error):
        def main():
            raise error
        return main

    for error, status in ((ValueError("a"), 2), (FileNotFoundError("a"), 2), (FloatingPointError("a"), 2),
                          (KeyboardInterrupt("a"), 130), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as end:
            sample.run_main(fails(error))
        assert end.value.code == status
        assert re.fullmatch(r"\n?\S+: (a|interrupted)\n", capsys.readouterr().err)
    for bug in (ZeroDivisionError(), RuntimeError("a")):
        with pytest.raises(type(bug)):
            sample.run_main(fails(bug))


@pytest.mark.parametrize("size", [(10**15,), (2**62, 2**62)], ids=str)
def test_a_model_beyond_all_memory_ends_with_a_sentence(size, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample.run_main(lambda: torch.empty(size))
    assert "the memory is full: try a smaller --batch_size" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# A real process


def test_text_goes_through_a_pipe_whole_whatever_the_pipes_encoding(run):
    words = [sys.executable, ROOT / "sample.py", "--prompt=-", "--tokens=30", "--temperature=3"]
    for encoding in ("utf-8", "ascii"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
        done = subprocess.run(words, input="Speak".encode(), capture_output=True, env=environment, timeout=60)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
        first, _, text = done.stdout.decode(encoding).replace("\r\n", "\n").split("\n", 2)
        assert "gate g1" in first and text.startswith("Speak") and len(text) > 20
