"""Claims about sample.py: whose text it prints and how, what it measures on it, and what it refuses."""
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, configs, quiet, refusal, status_of
from torch.nn.modules.module import register_module_forward_hook

import sample
import train
from data import prepare
from data.tokenizers import get_tokenizer
from gated_gpt import GPT, measure
from plumbing import checkpoint
from plumbing.report import layer_table, means_table

UNICODE = "naïve 東京 🙂🏽 ñ\n"

pytestmark = [pytest.mark.usefixtures("here"),
              pytest.mark.filterwarnings("ignore:Glyph:UserWarning", "ignore:__array__:DeprecationWarning")]


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
    """What sample.py prints behind its first line and a blank one."""
    status, out, err = status_of(sample.main, flags)
    assert status == 0, err
    first, blank, rest = out.split("\n", 2)
    assert first and not blank
    return rest


def greedy(run, tokens, n):
    """Continued by the likeliest token n times: one plain forward each, while all fits into the window."""
    model = checkpoint.load(run / "best.pt")[0].eval()
    for _ in range(n):
        tokens = [*tokens, model(torch.tensor([tokens]))[0][0, -1].argmax().item()]
    return tokens


# --- the text ---------------------------------------------------------------------------------------


def test_the_first_line_says_which_file_with_its_gate_step_data(run):
    first = status_of(sample.main, "--tokens=1")[1].splitlines()[0]
    assert first == "out/tiny-g1/best.pt: gate g1, step 30, data tiny"


class Terminal(io.StringIO):
    """Remembers what could be read on it at the last flush."""
    visible = ""

    def flush(self):
        self.visible = self.getvalue()


def test_text_is_on_the_terminal_as_soon_as_it_is_made(run, monkeypatch):
    terminal, lengths = Terminal(), []

    def see(module, inputs, output):
        if isinstance(module, GPT):
            lengths.append(len(terminal.visible))

    monkeypatch.setattr(sys, "stdout", terminal)
    handle = register_module_forward_hook(see)
    try:
        sample.main(["--tokens=10", "--prompt=Speak", "--temperature=0"])
    finally:
        handle.remove()
    assert bytes(greedy(run, [256, *b"Speak"], 10)[1:]).isascii()  # a character for each token
    start = terminal.getvalue().index("Speak")
    assert lengths == [start + 5 + i for i in range(10)]


def test_the_same_seed_gives_the_same_text_but_another_seed_another(run):
    texts = [printed("--tokens=60", f"--seed={seed}") for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_a_window_may_be_longer_than_the_trained_one(scaling, run):
    flags = "--block_size=48 --tokens=40 --temperature=0 --no-stop --attn_share"
    out = printed(f"--rope_scaling={scaling}", *flags.split())
    model = checkpoint.load(run / "best.pt")[0]
    model.set_window(48, scaling)
    text = get_tokenizer("bytes").decode_bytes(model.generate(torch.tensor([[256]]), 40, 0)[0, 1:].tolist())
    assert out.startswith(text.decode("utf-8", "replace")) and "T=41" in out


@pytest.mark.parametrize("flags", ["--temperature=0", "--temperature=0 --seed=5 --top_k=3",
                                   "--temperature=9 --top_k=1"])
def test_the_likeliest_tokens_are_those_of_plain_forwards_without_a_cache(flags, run):
    text = bytes(greedy(run, [256, *b"the "], 11)[1:]).decode(errors="replace") + "\n"
    assert printed("--tokens=11", "--prompt=the ", *flags.split()) == text


def test_a_higher_temperature_gives_more_different_texts(run):
    texts = [{printed("--tokens=4", "--prompt=Speak th", f"--temperature={t}", f"--seed={seed}")
              for seed in range(8)} for t in (0.01, 5)]
    assert len(texts[0]) == 1 and len(texts[1]) == 8


def test_as_many_samples_are_printed_as_were_asked_for_each_after_the_prompt(run):
    said = printed("--samples=3", "--tokens=40", "--prompt=Speak", "--temperature=1")
    texts = re.split(r"^--- (\d) ---\n", said, flags=re.M)
    assert texts[0] == "" and texts[1::2] == ["1", "2", "3"]
    assert all(text.startswith("Speak") for text in texts[2::2]) and len({*texts[2::2]}) == 3


def test_several_samples_take_the_same_likeliest_tokens_as_one(run):
    flags = "--tokens=30", "--prompt=Speak", "--temperature=0"
    said = printed("--samples=2", *flags)
    assert said == "".join(f"--- {i} ---\n{printed(*flags)}" for i in (1, 2))


@pytest.mark.parametrize("samples", [1, 3])
def test_no_tokens_leave_the_prompt_alone(samples, run):
    said = printed("--tokens=0", "--prompt=Speak", f"--samples={samples}")
    assert re.sub(r"--- \d ---\n", "", said) == "Speak\n" * samples


def test_the_prompt_may_come_from_standard_input(run, monkeypatch):
    expected = printed("--tokens=9", f"--prompt={UNICODE}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(UNICODE.encode()), encoding="ascii"))
    assert printed("--tokens=9", "--prompt=-") == expected


def test_a_prompt_that_says_bos_is_plain_text(run):
    text = bytes(greedy(run, [256, *b"<|bos|>"], 8)[1:]).decode(errors="replace") + "\n"
    assert printed("--tokens=8", "--prompt=<|bos|>", "--temperature=0") == text


@pytest.fixture
def emit(monkeypatch):
    """emit(rows): the model makes these tokens, a row for each text; returns a list of the steps it took."""
    def scripted(*rows):
        steps = []
        monkeypatch.setattr(GPT, "stream", lambda model, idx, n, *rest: (
            steps.append(new) or new for new in torch.tensor([list(row) for row in rows]).T[:n]))
        return steps

    return scripted


def test_a_text_ends_at_bos_which_is_not_printed_unless_no_stop_is_given(run, emit):
    steps = emit([*b"ab", 256, *b"cd"])
    assert printed("--prompt=x") == "xab\n" and len(steps) == 3
    assert printed("--prompt=x", "--no-stop") == "xab<|bos|>cd\n"


def test_of_several_texts_each_ends_at_its_own_bos(run, emit):
    steps = emit([*b"ab", 256, *b"cde"], [*b"efgh", 256, *b"i"])
    said = printed("--prompt=x", "--samples=2", "--attn_share")
    assert said.startswith("--- 1 ---\nxab\n--- 2 ---\nxefgh\n") and len(steps) == 5
    layers = measure(checkpoint.load(run / "best.pt")[0], torch.tensor([[256, *b"xab"]]))
    assert layer_table(layers, 4) in said


@pytest.mark.parametrize("samples, text", [(1, "xa\ufffd\n"), (2, "--- 1 ---\nxa\ufffd\n--- 2 ---\nxab\n")])
def test_a_character_without_its_last_bytes_shows_as_a_sign_for_that(samples, text, run, emit):
    emit(*[b"a\xc3", b"ab"][:samples])
    assert printed("--prompt=x", f"--samples={samples}") == text


def test_a_prompt_with_bytes_that_are_not_utf8_is_refused(run):
    prompt = os.fsdecode(b"caf\xe9")  # as Python gives it to a script
    assert f"--prompt: invalid utf8 value: {prompt!r}" in refusal(sample.main, ["--prompt=" + prompt])


# --- where the attention goes -----------------------------------------------------------------------


def rows_of(said):
    return [row.split() for row in said.splitlines() if re.match(r" +\d ", row)]


@pytest.mark.parametrize("n", [7, 40])
def test_attn_share_is_that_of_the_text_or_of_bos_with_the_end_of_a_longer_one(n, run):
    said = printed("--attn_share", "--prompt=Sp", f"--tokens={n}", "--temperature=0")
    window = [256, *said[: 2 + n].encode()[-15:]]
    layers = measure(checkpoint.load(run / "best.pt")[0], torch.tensor([window]))
    assert layer_table(layers, len(window)) in said
    assert (f"\nOnly {len(window)} tokens: a text this short has a large share even" in said) == (n == 7)


def test_measuring_does_not_change_the_text(run):
    assert printed("--tokens=30", "--attn_share").startswith(printed("--tokens=30"))


def test_a_model_without_a_gate_has_dashes_instead_of_nan():
    train.train(*configs(gate="none", max_steps=1), say=quiet)
    said = printed("--attn_share", "--tokens=5")
    assert [row[6:8] for row in rows_of(said)] == [["-", "-"]] and "nan" not in said


def test_a_text_is_measured_in_blocks_of_the_window_each_after_a_bos(run):
    text = "Speak the speech, I pray you. " * 4
    Path("text.txt").write_text(text)
    said = printed("--attn_share", "--text=text.txt")
    blocks = torch.tensor([[256, *text.encode()[i : i + 15]] for i in range(0, 120, 15)])
    layers = measure(checkpoint.load(run / "best.pt")[0], blocks)  # all at once
    for row, layer in zip(rows_of(said), layers, strict=True):
        assert abs(float(row[1]) - layer["first_token_share"]) < 0.0011
        assert row[8] == f"{layer['max_activation']:.1f}"
    assert f"here, {len(blocks)} x 16 tokens" in said and "Only" not in said


def test_a_long_text_is_measured_in_64_blocks_that_span_it():
    encoding = get_tokenizer("bytes")
    text = "".join(chr(32 + i // 100) for i in range(9000))
    blocks = sample.text_blocks(text, encoding, None, 10)
    assert blocks.shape == (64, 10) and blocks[0].tolist() == list(text[:10].encode())
    assert blocks[-1].tolist() == list(text[-10:].encode()) and len(set(blocks[:, 0].tolist())) > 50
    with_bos = sample.text_blocks(text, encoding, 256, 10)
    assert with_bos.shape == (64, 10) and set(with_bos[:, 0].tolist()) == {256}


@pytest.mark.parametrize("length", [1, 15, 16, 513])
def test_a_window_that_is_full_has_no_warning(length, run, monkeypatch):
    monkeypatch.setattr(sample, "text_blocks", lambda *args: torch.zeros(1, length, dtype=torch.long))
    monkeypatch.setattr(sample, "measure_blocks", lambda model, blocks: measure(model, blocks[:, :16]))
    Path("text.txt").write_text("Speak")
    assert ("Only" in printed("--attn_share", "--text=text.txt")) == (length < 16)


def test_figures_of_others_are_shown_for_the_same_gate_only():
    layers = [dict(gate_score=float("nan"), max_activation=2.0, first_token_share=0.5)] * 2
    for gate, lines in {"none": 4, "g1": 4, "g2": 3, "g5": 2}.items():
        assert len(means_table(layers, gate, 1, 512).splitlines()) == lines
    assert means_table(layers, "none", 1, 512).splitlines()[1].split()[-3:] == ["0.500", "-", "2.0"]


@pytest.mark.parametrize("flags", [["--tokens=0"], ["--prompt=Speak 東🙂 $x$ $\\frac$", "--tokens=6"],
                                   ["--prompt=" + "x" * 99], ["--attn_share", "--text=text.txt"]])
def test_attn_map_draws_a_png(flags, run):
    pytest.importorskip("matplotlib")
    Path("text.txt").write_text("Speak the speech")
    assert "map.png: attention on the first" in printed("--attn_map=map.png", *flags)
    assert Path("map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_attn_map_without_matplotlib_says_what_to_install(run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    assert "pip install matplotlib" in refusal(sample.main, "--attn_map=map.png --tokens=3")


@pytest.mark.parametrize("name", ["nowhere/map.png", "map.txt"])
def test_attn_map_where_none_can_be_drawn_is_refused(name, run):
    pytest.importorskip("matplotlib")
    assert {"map.txt": "txt"}.get(name, name) in refusal(sample.main, f"--attn_map={name} --tokens=3")


# --- which checkpoint -------------------------------------------------------------------------------


def test_the_newest_run_is_the_default_with_its_best_checkpoint_first(run):
    for name in ("older", "newest", "old"):
        shutil.copytree(run, Path("out", name))
    for file in Path("out").glob("*/*.pt"):
        os.utime(file, (5, 5))
    os.utime("out/newest/last.pt", (10, 10))
    assert status_of(sample.main, "--tokens=1")[1].startswith("out/newest/best.pt: ")


@pytest.mark.parametrize("name, read", [
    ("out/tiny-g1", "best.pt"), ("out/tiny-g1/", "best.pt"), ("out/tiny-g1/last.pt", "last.pt"),
    ("out/tiny-g1/best.pt", "best.pt")])
def test_ckpt_is_a_folder_or_a_file(name, read, run):
    assert status_of(sample.main, f"--ckpt={name} --tokens=1")[1].startswith(f"{run / read}: ")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/last.pt", "empty", "notes.txt"])
def test_a_checkpoint_that_is_missing_or_something_else_is_refused_by_name(name, run, here):
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("not a model")
    assert name in refusal(sample.main, f"--ckpt={name}")


def test_without_any_run_the_command_that_makes_one_is_named():
    assert "there is no run with a checkpoint in out/: python train.py makes one" in refusal(sample.main, "")


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--tokens=-1", "--samples=0", "--samples=-2", "--temperature=-0.1",
                                  "--temperature=nan", "--temperature=inf", "--top_k=0", "--seed=-1"])
def test_a_number_that_cannot_be_is_refused_with_its_name_beside_its_value(flag, run):
    assert re.search(rf": {flag[2:]} must be at least [01], ", refusal(sample.main, [flag]))


@pytest.mark.parametrize("flags, said", [
    ("--text=text.txt", "--text is what --attn_share measures"),
    ("--text=text.txt --attn_share --prompt=x", "no --prompt"), ("--attn_share --text=nowhere", "nowhere"),
    ("--attn_share --text=out", "out cannot be used"), ("--attn_share --text=latin.txt", "latin.txt is not"),
    ("--attn_share --text=one.txt", "the text has 1 tokens, too few"), ("--device=banana", "banana"),
    ("--compile --attn_share", "--compile hides"), ("--compile --attn_map=map.png", "--compile hides")])
def test_flags_that_do_not_fit_are_refused(flags, said, run):
    for name, content in {"text.txt": b"Speak", "latin.txt": b"\xe9", "one.txt": b"a"}.items():
        Path(name).write_bytes(content)
    assert said in refusal(sample.main, flags)


def test_text_goes_through_a_pipe_of_any_encoding(run):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt=-", "--tokens=30", "--seed=1"],
                          input=UNICODE.encode(), capture_output=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    assert "gate g1" in done.stdout.decode("ascii") and "na?ve ?? ?" in done.stdout.decode("ascii")
