"""Claims about plumbing/: whole files, checkpoints, flags, how scripts end, the machine, and reports."""
import dataclasses
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, no_file_beyond, refusal, status_of
from test_model import VARIANTS, lively, tiny, tokens

import sample
import train
from data import prepare
from gated_gpt import GPTConfig, measure, uniform_share
from plumbing import checkpoint, files, flags, machine, report

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    ".*fork:DeprecationWarning", "Detected pickle protocol:UserWarning", "__array__:DeprecationWarning",
    ".*CUDA is not available:UserWarning")]

# ---- whole files -------------------------------------------------------------------------------------

NEW = b"new" * 10_000


@pytest.fixture
def old(tmp_path):
    """The path of a file that says `old`, alone in a folder."""
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


def alone(path):
    """What the file says, which has to be alone in its folder."""
    return os.listdir(path.parent) == [path.name] and path.read_bytes()


def write_new(path):
    with files.whole_file(path) as file:
        file.write(NEW[:20_000])
        file.flush()
        file.write(NEW[20_000:])


def test_a_process_that_is_killed_at_any_line_leaves_the_old_file_or_the_new_one(old):
    def trace(frame, event, value):  # dies before the n-th line of whole_file and write_new
        if frame.f_code.co_filename in (files.__file__, __file__):
            if event == "line" and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

    found = []
    for n in range(100):
        old.write_bytes(b"old")
        if not (child := os.fork()):
            left, status = iter(range(n)), 1
            try:
                sys.settrace(trace)
                write_new(old)
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        found.append(old.read_bytes())
        if status != signal.SIGKILL:
            break
    assert status == 0 and {*found} == {b"old", NEW} and found.count(b"old") > 8
    assert all(re.fullmatch(r"file(\.\d+\.tmp)?", name) for name in os.listdir(old.parent))


def test_of_two_processes_that_write_one_file_at_once_each_writes_a_whole_one(old):
    with files.whole_file(old) as file:
        file.write(b"half")
        if not os.fork():
            write_new(old)
            os._exit(0)
        assert os.wait()[1] == 0 and old.read_bytes() == NEW
        file.write(b" and half")
    assert alone(old) == b"half and half"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, RuntimeError])
def test_an_error_while_writing_leaves_the_old_file_alone(old, error):
    with pytest.raises(error), files.whole_file(old) as file:
        file.write(b"half of the ne")
        raise error
    assert alone(old) == b"old"


@pytest.mark.parametrize("size", [0, 1, 1000, 200_000])
def test_a_full_disk_is_said_and_leaves_the_old_file_alone(old, size):
    said = re.escape(f"cannot write {old} (File too large): what was there is untouched")
    for write in (partial(torch.save, torch.zeros(90_000)), lambda file: file.write(NEW * 9)):
        with pytest.raises(OSError, match=said), no_file_beyond(size), files.whole_file(old) as file:
            write(file)
        assert alone(old) == b"old"


def test_folders_are_made_where_they_are_missing_but_not_where_a_file_is(old):
    write_new(str(old.parent / "a" / "b" / "file"))
    assert alone(old.parent / "a" / "b" / "file") == NEW
    for path in (old.parent / "a", old / "b"):
        with pytest.raises(OSError, match=re.escape(f"cannot write {path} (")):
            write_new(path)
    assert sorted(os.listdir(old.parent)) == ["a", "file"] and old.read_bytes() == b"old"


# ---- checkpoints -------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint."""
    model = lively(tiny(n_layer=1))
    checkpoint.save(tmp_path / "model.pt", dict(config=vars(model.config), model=model.state_dict(), step=1))
    return tmp_path / "model.pt"


@pytest.mark.parametrize("name", ["g1-no-input", "g1-learned-gqa", "g1-sandwich-tied", "g2-gqa-experts"])
def test_what_is_saved_is_what_is_loaded(tmp_path, name):
    model, idx = lively(tiny(**VARIANTS[name])), tokens(1, 6)
    model(idx, idx)[1].backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    weights = {f"_orig_mod.{name}": p for name, p in model.state_dict().items()}  # as if compiled
    content = dict(config=vars(model.config), model=weights, log=[{"a": math.inf, "b": (1, True)}], none=None,
                   moments=list(optimizer.state_dict()["state"].values()))
    checkpoint.save(tmp_path / "model.pt", content)
    loaded, found = checkpoint.load(tmp_path / "model.pt")
    assert loaded.config == model.config and (found["log"], found["none"]) == (content["log"], None)
    assert torch.equal(loaded.eval()(idx)[0], model(idx)[0])
    torch.testing.assert_close(found["moments"], content["moments"], rtol=0, atol=0)


def refused(path):
    """The sentence with which checkpoint.load refuses a file. It names it, and has none of torch's advice."""
    with pytest.raises(ValueError) as error:
        checkpoint.load(path)
    said = str(error.value)
    assert str(path) in said and len(said) < len(str(path)) + 300 and said.isprintable(), repr(said)
    assert "weights_only" not in said and "can still be loaded" not in said
    return said


def changed(path, change):
    torch.save(torch.load(path) | change, path)


@pytest.mark.parametrize("spoil, values", [
    (Path.write_bytes, [b"", b"\n", b"hello", b"{}", b"(1)", b"import torch\n", b"PK\x03\x04", b"\x80\x02."]),
    (lambda path, part: os.truncate(path, int(path.stat().st_size * part)), [2e-4, 0.01, 0.5, 0.99]),
    (lambda path, other: torch.save(other, path), [{"w": torch.zeros(3)}, [1], None, torch.nn.Linear(2, 2)]),
    (changed, [dict(format="gated_gpt 99"), dict(format=None), dict(config=None), dict(config={"n_heads": 4}),
               dict(config={"vocab_size": 11, "n_embd": 16}), dict(model=None), dict(model={"a": 1})])])
def test_what_is_no_checkpoint_of_this_version_is_refused(saved, spoil, values):
    whole = saved.read_bytes()
    for value in values:
        saved.write_bytes(whole)
        spoil(saved, value)
        assert "is damaged, or no checkpoint of this version" in refused(saved)


def test_what_is_no_file_is_refused_with_the_command_that_makes_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to read this would take for ever
    makes = f"`{flags.command('train.py')}` makes one from scratch"
    assert all(makes in refused(tmp_path / name) for name in ("", "missing.pt", "pipe"))
    assert makes in refused("out/python-g1") and makes in refused("tests/missing.pt")


def test_a_model_that_is_named_as_on_the_hub_is_answered_with_how_to_get_it():
    assert "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B`" in refused("Qwen/Qwen3-0.6B")


def test_a_checkpoint_of_another_project_is_told_by_its_format(saved):
    torch.save(dict(model={}, model_args={}, iter_num=1, best_val_loss=1.5), saved)  # as nanoGPT's
    assert "its format is unknown, this version reads gated_gpt" in refused(saved)


def test_a_flipped_bit_is_found_or_does_no_harm(saved):
    whole, (model, _), dice, found = saved.read_bytes(), checkpoint.load(saved), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        saved.write_bytes(damaged)
        try:  # the bit may be in a date, for example
            other, content = checkpoint.load(saved)
            assert other.config == model.config and content["step"] == 1
            assert all(map(torch.equal, model.parameters(), other.parameters()))
        except ValueError:
            found += bool(refused(saved))
    assert found > 50


class Trap:
    """Unpickling this makes a folder. A harmful file would do worse."""
    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize("write, read", [
    (lambda path: path.write_bytes(pickle.dumps(Trap())), lambda path: pickle.loads(path.read_bytes())),
    (lambda path: changed(path, {"step": Trap()}), partial(torch.load, weights_only=False))])
def test_code_in_a_file_does_not_run(saved, monkeypatch, write, read):
    monkeypatch.chdir(saved.parent)
    write(saved)
    refused(saved)
    assert not os.path.exists("trap")
    read(saved)
    assert os.path.exists("trap")  # the trap works


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = pool.map(lambda _: checkpoint.new_folder(None, "run", False), range(24))
    assert sorted(map(str, folders)) == sorted(["out/run", *(f"out/run-{i}" for i in range(2, 25))])


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_folder_with_a_run_needs_overwrite_which_removes_only_the_files_of_the_run(tmp_path, name):
    for file in (name, "notes.txt", "last.pt.mine"):
        (tmp_path / file).write_text("x")
    with pytest.raises(ValueError, match=f"{tmp_path} holds a run: --resume .* --overwrite"):
        checkpoint.new_folder(str(tmp_path), "run", False)
    assert len(os.listdir(tmp_path)) == 3
    for overwrite in (True, False):  # after the first, what is left is no run
        assert checkpoint.new_folder(str(tmp_path), "run", overwrite) == tmp_path
        assert sorted(os.listdir(tmp_path)) == ["last.pt.mine", "notes.txt"]


# ---- flags -------------------------------------------------------------------------------------------

FIELDS = {f.name: f.default for cls in (train.TrainConfig, GPTConfig) for f in dataclasses.fields(cls)}


def test_every_field_is_a_flag_with_a_group_a_line_of_help_and_its_default():
    shown, text = {}, status_of(train.parse_flags, "--help")[1].split("\n\npresets:")[0]
    for group in re.split(r"\n\n(?=[a-z ]+:\n  -)", text)[2:]:
        title, *entries = re.split(r":?\n(?=  -)", group)
        assert title in "run optimisation evaluation machine model gate mixture of experts"
        for entry in entries:
            form, text = re.split(r"\s{2,}", entry.strip(), maxsplit=1)  # "--name N", and what it says of it
            assert re.match("[A-Za-z0-9]", text)
            shown[re.match(r"--(\w+)", form)[1]] = text.split()[-1]
    assert shown.keys() == FIELDS.keys()
    for name, default in FIELDS.items():
        text = {"True": "on", "False": "off"}.get(str(default), str(default))
        assert default is None or shown[name] == f"[{text}]", name


@pytest.mark.parametrize("words, said", [  # shortened, unknown, a wrong value, or a habit from nanoGPT
    ("--n_lay=2", "did you mean --n_layer?"), ("--learn=1", "--learn"), ("--gate=g9", "invalid choice: 'g9'"),
    ("--n_layer=two", "--n_layer: invalid int value: 'two'"), ("--n_layer=1.5", "invalid int value: '1.5'"),
    ("--dropout=x", "invalid float value: 'x'"), ("--qk_norm=1", "say --qk_norm/--no-qk_norm, without the"),
    ("--compile=False", "error: say --compile/--no-compile, without the value 'False'"),
    ("--block-size=64", "did you mean --block_size?"), ("--lr=1", "did you mean --learning_rate?"),
    ("--max_iters=9", "did you mean --max_steps?"), ("--num_samples=3", "did you mean --seed=1, and --seed="),
    ("--out_dir=x", "did you mean --out?"), ("--dtype=float16", "choose from"),
    ("config/train_shakespeare_char.py", "--help shows flags and presets"),
    ("--wandb_log=True", "--wandb_log=True: --help shows flags and presets")])
def test_a_flag_that_there_is_not_is_answered_with_how_it_is_said_here(words, said):
    status, _, err = status_of(train.parse_flags, words)
    assert status == 2 and said in err.splitlines()[-1] and len(err.splitlines()) == 2


def test_a_tilde_is_the_home_folder_in_every_flag_that_is_a_name_or_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = flags.Parser()
    for name, kind in (("ckpt", None), ("results", Path), ("prompt", flags.utf8)):
        parser.add_argument(f"--{name}", type=kind)
    found = parser.parse_args(["--ckpt=~", "--results=~/r", "--prompt=~/x"])
    assert (found.ckpt, found.results, found.prompt) == ("/home/me", Path("/home/me/r"), "~/x")
    assert train.parse_flags(["--init_from=~/a b"]) == {"init_from": "/home/me/a b"}


@pytest.mark.parametrize("main, words", [
    (sample.main, "--ckpt="), (train.main, "--out="), (train.main, "--data="), (prepare.main, "''"),
    (prepare.main, "a.txt --tokenizer=")])
def test_an_empty_name_as_of_a_variable_that_is_not_set_is_refused(main, words):
    assert "the value is empty: leave the flag out, or set the shell variable" in refusal(main, words)


# ---- how a script ends -------------------------------------------------------------------------------

def raises(error):
    def main(argv=None):
        raise error
    return main


FULL = "the memory is full: try a smaller batch, window or model, or less text"


@pytest.mark.parametrize("main, status, said", [
    (raises(ValueError("a=1 is wrong")), 2, "a=1 is wrong"), (raises(FloatingPointError("a")), 2, "a"),
    (raises(OSError("a")), 2, "a"), (raises(MemoryError()), 2, FULL),
    (lambda argv: open("no/x"), 2, "no/x cannot be used (No such file or directory)"),
    (lambda argv: torch.empty(10**15), 2, FULL), (lambda argv: torch.empty(2**62, 2**62), 2, FULL),
    (raises(torch.OutOfMemoryError("CUDA out of memory. Tried ...")), 2, FULL),
    (raises(KeyboardInterrupt()), 130, "interrupted"), (raises(KeyboardInterrupt("saved")), 130, "saved"),
    (lambda argv: os.kill(os.getpid(), signal.SIGTERM), 130, "interrupted")])
def test_what_a_user_can_mend_ends_with_one_sentence(main, status, said):
    found, _, err = status_of(main, "")
    assert (found, err.split(": ", 1)[1]) == (status, f"{said}\n")


@pytest.mark.parametrize("bug", [RuntimeError("a"), ZeroDivisionError("a"), KeyError("a")], ids=repr)
def test_a_bug_ends_with_its_traceback(bug):
    with pytest.raises(type(bug)):
        flags.run_main(raises(bug))


def test_a_reader_that_goes_away_ends_a_script_silently():
    script = "import plumbing.flags as f; f.run_main(lambda: [print(i, flush=True) for i in range(10**5)])"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline().strip() == b"0"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(600) == 141


def test_what_is_printed_to_a_file_is_there_line_by_line():
    script = "import os, plumbing.flags as f; f.run_main(lambda: [print('row'), os._exit(0)])"  # no flush
    words, plain = [sys.executable, "-c", script], os.environ | {"PYTHONUNBUFFERED": ""}
    assert subprocess.run(words, cwd=ROOT, capture_output=True, env=plain).stdout == b"row\n"


@pytest.mark.parametrize("script, names", [
    ("data/prepare.py", ["tokenizer"]), ("experiments/compare_gates.py", ["seeds"])])
def test_the_flags_are_there_without_docstrings_and_beside_other_peoples_packages(script, names, shell):
    process = subprocess.run([sys.executable, "-OO", ROOT / script, "--help"], capture_output=True, text=True,
                             timeout=600, env=shell)
    assert {*names} <= {*re.findall(r"--(\w+)", process.stdout)} and process.stderr == ""


def test_a_printed_command_runs_from_where_one_stands_in_this_systems_shell(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT / "data")
    assert flags.command("train.py", "--out=my run") == "python ../train.py '--out=my run'"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "name", "nt")
    assert flags.command("train.py", "--out=my run") == 'python train.py "--out=my run"'


# ---- the machine -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cuda", "cuda:99", "meta", "nonsense", "", "cpu:x", "xpu", "vulkan"])
def test_a_missing_device_is_refused_in_one_short_sentence(name, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "77")  # as in a process of torchrun, whose GPU has this number
    with pytest.raises(ValueError) as error:
        machine.choose_device(name)
    said = str(error.value)
    assert said.startswith(f"device={'cuda:77' if name == 'cuda' else name} cannot be used here (")
    assert said.endswith("try --device=cpu") and len(said) < 180 and said.isprintable()


@pytest.mark.parametrize("asked, environment, cpu_max, idle, threads", [  # idle: of 100 ticks of 8 cores
    (3, "8", "200000 100000", 99, 3), (16, None, "200000 100000", 99, 16), (None, "8", "200000 100000", 9, 8),
    (None, None, "250000 100000\n", 9, 2), (None, None, "50000 100000", 99, 1), (None, None, "", 75, 6),
    (None, None, "900000 100000", 99, 8), (None, None, "max 100000\n", 43, 3), (None, None, "x", 0, 1)])
def test_threads_are_as_asked_or_the_quota_or_the_idle_cores(monkeypatch, asked, environment, cpu_max, idle,
                                                             threads):
    looks = iter(["cpu  100 0 50 800 50 0\ncpu0 1 1", f"cpu  {200 - idle} 0 50 {800 + idle} 50 0\ncpu0 1 1"])
    content = {"/sys/fs/cgroup/cpu.max": lambda: cpu_max, "/proc/stat": lambda: next(looks)}
    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(read_text=content[path]))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "CORES", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    said = []
    assert machine.choose_threads(asked, said.append) == threads
    assert said[0].startswith(f"threads  {threads} (" + "as asked" * bool(asked or environment))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16  # the last one ends at 65,504


@pytest.mark.parametrize("name, device, able, stored, chosen", [  # able: to multiply bfloat16
    ("auto", "cpu", True, None, F32), ("auto", "cuda", True, None, BF16), ("auto", "cuda", False, None, F32),
    ("auto", "cpu", True, BF16, BF16), ("auto", "cpu", False, BF16, F32), ("auto", "cuda", True, F32, F32),
    ("float32", "cuda", True, BF16, F32), ("bfloat16", "cpu", True, F32, BF16),
    ("bfloat16", "cpu", False, None, BF16), ("auto", "cpu", True, F16, F32),
    ("auto", "cuda", True, F16, F32)])
def test_the_precision_is_as_asked_or_fits_the_hardware(monkeypatch, name, device, able, stored, chosen):
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: able)
    said = []
    assert machine.choose_precision(name, torch.device(device), said.append, stored) == chosen
    assert said[0].startswith(f"dtype    {str(chosen).split('.')[1]} (")
    assert ("slow" in said[0]) == (name == "bfloat16" and not able)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_is_noted_and_the_second_acts_as_before(number, capsys):
    calls = []
    before = signal.signal(number, lambda number, frame: calls.append(number))
    mine = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), machine.ctrl_c() as pressed:
        os.kill(os.getpid(), number)
        assert (pressed, calls) == ([number], []) and "Ctrl-C again stops now" in capsys.readouterr().err
        os.kill(os.getpid(), number)
        assert (pressed, calls) == ([number], [number])
        raise ZeroDivisionError
    restored = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(number, before)
    assert restored == mine


@pytest.mark.skipif(not machine.HANGUP, reason="this system's terminals do not say that they end")
def test_the_end_of_the_terminal_is_noted_also_if_it_comes_twice_but_not_under_nohup(monkeypatch):
    monkeypatch.setattr(machine.sys, "stderr", SimpleNamespace(write=lambda text: os.close(99_999)))  # gone
    before = signal.getsignal(signal.SIGHUP)  # of these tests, which may run under nohup, too
    for found, expected in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):  # nohup: it is ignored
        signal.signal(signal.SIGHUP, found)
        with machine.ctrl_c() as pressed:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        assert pressed == expected and signal.signal(signal.SIGHUP, before) == found


def test_a_process_that_torchrun_did_not_start_is_alone_whatever_a_cluster_calls_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with machine.processes(torch.device("cpu")) as found:
        assert found == (0, 1) and machine.is_first()


# ---- reports -----------------------------------------------------------------------------------------

NAMES = {name: name for name in VARIANTS if "qa" not in name} | {
    "softmax1": "none-softmax1", "softpick": "none-softpick", "sdpa-norm": "none-sdpa-norm",
    "sdpa-silu": "none-sdpa-silu", "sandwich": "none-sandwich", "g1-sandwich-tied": "g1-sandwich",
    "g1-experts": "g1-moe", "g1-gqa": "g1", "g2-gqa-experts": "g2-moe"}


def test_a_variant_has_a_name():
    assert {name: report.variant(tiny(**VARIANTS[name])) for name in NAMES} == NAMES


def test_a_line_is_as_wide_as_its_heading_and_80_columns_are_enough():
    columns = report.columns_of(True)
    numbers = 999_999, 12.34567, math.nan, 9.87654, 9_876_543.2, 0.98765, 0.01234, math.nan, 98765.43
    head, line = report.heading(columns), report.line(dict(zip(columns, numbers)), columns)
    assert len(head) == len(line) <= 80 and len(head.split()) == len(columns)
    assert line.split() == "999999 12.3457 - 9.8765 9,876,543 0.988 0.012 - 98765.4".split()


def test_the_table_of_layers_shows_what_was_measured():
    layers = measure(lively(tiny(gate="none")), tokens(2, 8))
    title, head, *rows = report.layer_table(layers, 8).splitlines()
    assert f"T=8; uniform attention would give {uniform_share(8):.3f}" in title
    for i, (row, layer) in enumerate(zip(rows, layers, strict=True)):
        most = int(np.argmax(layer["first_token_share_by_head"]))
        expected = (f"{i} {layer['first_token_share']:.3f} {layer['first_token_share_by_head'][most]:.3f} in "
                    f"{most} {layer['late_first_token_share']:.3f} - {layer['max_activation']:.1f}")
        assert row.split() == expected.split() and len(row) == len(head) <= 80


def test_a_picture_shows_the_layers_with_the_largest_shares_or_the_heads_that_were_asked_for():
    maps = [torch.full((4, 4, 2), share) + torch.tensor([0.0, 0.1]) for share in (3, 0, 2, 9, 8, 1, 7, 6)]
    for asked, shown in [((), [(0,), (2,), (3,), (4,), (6,), (7,)]), ((1,), [(1, 0), (1, 1)]),
                         ((1, 1), [(1, 1)]), ((None, 1), [(0, 1), (2, 1), (3, 1), (4, 1), (6, 1), (7, 1)])]:
        for (title, found), (layer, *head) in zip(report.panels_of(maps, *asked), shown, strict=True):
            assert title == f"layer {layer}" + "".join(f", head {h}" for h in head)
            assert torch.equal(found, maps[layer][..., head[0]] if head else maps[layer].mean(-1))
    for wrong, said in (dict(layer=8), "layer=8.* layers 0 to 7"), (dict(head=-1), "head=-1.* heads 0 to 1"):
        with pytest.raises(ValueError, match=said):
            report.panels_of(maps, **wrong)


def test_drawing_writes_a_png_and_leaves_pyplot_as_it_was(tmp_path):
    matplotlib, pyplot = pytest.importorskip("matplotlib"), pytest.importorskip("matplotlib.pyplot")
    before = matplotlib.get_backend(), pyplot.get_fignums(), dict(matplotlib.rcParams)
    names = ["BOS", "$x", "東", "\\n", "🙂", "_", "a", "^"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none for a letter that the font lacks
        warnings.filterwarnings("ignore", "__array__")
        report.draw_maps(lively(tiny(n_layer=3)), tokens(1, 8), names, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (matplotlib.get_backend(), pyplot.get_fignums(), dict(matplotlib.rcParams)) == before
