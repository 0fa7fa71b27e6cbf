"""Claims about checkpoints: whole at any moment, never running code, and refused in one sentence."""
import dataclasses
import os
import pickle
import random
import signal
import time

import pytest
import torch

from gated_gpt import GPT, GPTConfig, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
quiet_fork = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child only saves


def tiny(**fields):
    return GPT(GPTConfig(**(dict(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16) | fields)))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint's path."""
    save_checkpoint(tmp_path / "model.pt", tiny(), {"step": 1})
    return tmp_path / "model.pt"


# ------------------------------------------------------------------------------------------------------------
# What comes back


@pytest.mark.parametrize("fields", [
    dict(), dict(gate="none"), dict(gate_kind="headwise"), dict(gate="g2", n_kv_head=1, gate_share=True),
    dict(gate="g5", gate_input=False), dict(gate_op="add", gate_act="silu", tie_embeddings=False),
    dict(norm="sandwich", head_dim=6, qk_norm=False, dropout=0.25, rope_base=500.0), dict(n_expert=4),
], ids=str)
def test_what_is_saved_is_what_is_loaded(tmp_path, fields):
    model, idx = tiny(**fields), torch.tensor([[0, 3, 1, 10]])
    model(idx, idx)[1].backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    state = {"step": 7, "best": 1.25, "name": "x", "none": None, "flags": {"betas": (0.9, 0.98)},
             "log": [{"loss": 2.0, "done": True}], "rng": torch.get_rng_state(),
             "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path / "model.pt", model, state)
    loaded, found = load_checkpoint(tmp_path / "model.pt")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.embed.weight) == model.config.tie_embeddings
    assert torch.equal(loaded.eval()(idx)[0], model.eval()(idx)[0])
    assert found.keys() == state.keys()
    assert torch.equal(found.pop("rng"), state.pop("rng"))
    ours, theirs = found.pop("optimizer"), state.pop("optimizer")
    assert ours["param_groups"] == theirs["param_groups"]
    for i, moments in theirs["state"].items():
        assert all(torch.equal(moment, ours["state"][i][name]) for name, moment in moments.items())
    assert found == state


def test_a_path_may_be_a_string_and_nothing_else_is_left_beside_the_file(tmp_path):
    save_checkpoint(str(tmp_path / "model.pt"), tiny(), {})
    assert load_checkpoint(str(tmp_path / "model.pt"))[1] == {}
    assert os.listdir(tmp_path) == ["model.pt"]


def test_saving_again_replaces_the_file(saved):
    model = tiny(n_layer=2)
    save_checkpoint(saved, model, {"step": 2})
    loaded, state = load_checkpoint(saved)
    assert state == {"step": 2} and loaded.config.n_layer == 2
    assert os.listdir(saved.parent) == ["model.pt"]


def test_a_stale_temporary_file_is_no_obstacle(saved):
    for name in ("model.pt.tmp", ".model.pt.tmp", "model.tmp"):
        (saved.parent / name).write_bytes(b"left by a killed process")
    save_checkpoint(saved, tiny(), {"step": 2})
    assert load_checkpoint(saved)[1] == {"step": 2}


# ------------------------------------------------------------------------------------------------------------
# Killed, or out of space


def fill(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def in_child(function):
    """The id of a forked child that runs function() and then ends, 0 if it raised nothing."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    finally:
        os._exit(status)


def save_for_ever(path, model, step):
    while True:
        step += 1
        save_checkpoint(path, fill(model, float(step)), {"step": step})


@forks
@quiet_fork
def test_killed_at_any_moment_the_file_is_the_old_or_the_new_one_whole(tmp_path):
    path, model, step = tmp_path / "model.pt", fill(tiny(n_embd=64), 0.0), 0
    start = time.perf_counter()
    save_checkpoint(path, model, {"step": 0})
    one_save = time.perf_counter() - start
    moments, interrupted = random.Random(0), 0
    for _ in range(50):
        child = in_child(lambda: save_for_ever(path, model, step))
        time.sleep(moments.uniform(0, max(0.02, 4 * one_save)))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL  # it was still saving
        interrupted += len(os.listdir(tmp_path)) > 1
        loaded, state = load_checkpoint(path)
        assert state["step"] >= step
        step = state["step"]
        assert all((p == step).all() for p in loaded.parameters())
    assert step > 0 and interrupted > 0  # some saves were completed, and some cut off in the middle


def assert_old_file_whole(path):
    assert load_checkpoint(path)[1] == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


@forks
@quiet_fork
@pytest.mark.parametrize("limit", [0, 1, 1000, 20_000, 100_000])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file_whole_and_no_debris(saved, limit):
    resource = pytest.importorskip("resource")

    def save_with_little_space():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_checkpoint(saved, tiny(n_embd=256), {"step": 2})
        except OSError as error:
            os._exit(0 if str(saved) in str(error) else 3)
        os._exit(2)

    assert os.waitpid(in_child(save_with_little_space), 0)[1] == 0
    assert_old_file_whole(saved)


def test_a_missing_folder_is_an_oserror_that_names_the_file(tmp_path):
    with pytest.raises(OSError, match="nowhere.model.pt"):
        save_checkpoint(tmp_path / "nowhere" / "model.pt", tiny(), {})
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_an_oserror_and_leaves_no_debris(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(OSError, match="model.pt"):
        save_checkpoint(tmp_path / "model.pt", tiny(), {})
    assert os.listdir(tmp_path) == ["model.pt"] and os.listdir(tmp_path / "model.pt") == []


def test_a_state_that_cannot_be_written_leaves_the_old_file_whole_and_no_debris(saved):
    with pytest.raises(Exception):
        save_checkpoint(saved, tiny(), {"step": lambda: 2})
    assert_old_file_whole(saved)


# ------------------------------------------------------------------------------------------------------------
# Files that are something else


def refusal(path):
    """The one sentence with which load_checkpoint refuses a file."""
    with pytest.raises((ValueError, OSError)) as error:
        load_checkpoint(path)
    said = str(error.value)
    assert str(path) in said, said
    assert "\n" not in said, said
    assert "weights_only" not in said, said  # torch's advice to run the file's code is not for our readers
    return said


@pytest.mark.parametrize("part", [0.0, 0.0002, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_a_file_that_is_cut_short_is_refused(saved, part):
    content = saved.read_bytes()
    saved.write_bytes(content[:int(len(content) * part)])
    assert "cut short" in refusal(saved)


TEXTS = ["To be, or not to be", "hello", "a poem", "the end", "quite so", "{}", "[1, 2]", "(1)", "1,2\n3,4",
         "\n", "import torch\n", "# notes\n", "<html></html>", "PK\x03\x04 starts a zip", "\x80\x02}q\x00."]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_refused(tmp_path, text):
    (tmp_path / "notes.txt").write_text(text, encoding="latin-1")
    refusal(tmp_path / "notes.txt")


def test_a_text_is_refused_whatever_it_starts_with(tmp_path):
    for first in range(256):
        (tmp_path / "notes.txt").write_bytes(bytes([first]) + b"nd so on and so forth, 100 times")
        refusal(tmp_path / "notes.txt")


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    refusal(tmp_path)
    assert "train.py" in refusal(tmp_path / "missing.pt")


@pytest.mark.parametrize("odd", [lambda w: w.to(torch.int8), lambda w: w.to_sparse(), lambda w: w.to("meta"),
                                 lambda w: w.to(torch.complex64)], ids=["int8", "sparse", "meta", "complex"])
def test_weights_that_are_no_plain_floats_are_refused(saved, odd):
    content = torch.load(saved, weights_only=True)
    content["model"]["embed.weight"] = odd(content["model"]["embed.weight"])
    torch.save(content, saved)
    assert "no plain tensor of floats: embed.weight" in refusal(saved)


@forks
def test_a_pipe_is_refused_where_one_would_wait_forever(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    assert "is not a file" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [{"weights": torch.zeros(3)}, {"model": {}, "config": {}}, [1, 2],
                                     torch.zeros(3), "text", None, {}], ids=str)
def test_the_file_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    refusal(tmp_path / "other.pt")


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "other.pt")
    refusal(tmp_path / "other.pt")


class MakesFolder:
    """Unpickling this makes a folder, as a harmful file would do worse."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))],
                         ids=["torch.save", "pickle"])
@pytest.mark.parametrize("place", ["alone", "state"])
def test_code_in_a_file_does_not_run(saved, write, place):
    trap = MakesFolder(saved.parent / "trap")
    content = torch.load(saved, weights_only=True) | {"state": trap} if place == "state" else trap
    write(content, saved)
    refusal(saved)
    assert not (saved.parent / "trap").exists()
    torch.load(saved, weights_only=False) if write is torch.save else pickle.loads(saved.read_bytes())
    assert (saved.parent / "trap").exists()  # the trap was a real one


def edit(path, **changes):
    """Write the checkpoint again with some of its entries replaced, or removed where the change is None."""
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def test_an_edit_that_changes_nothing_is_accepted(saved):
    edit(saved)
    assert load_checkpoint(saved)[1] == {"step": 1}


@pytest.mark.parametrize("version", ["gated_gpt 0", "gated_gpt 99", "", 1, None])
def test_another_format_version_is_refused_with_its_name(saved, version):
    edit(saved, format=version)
    assert repr(version) in refusal(saved)


@pytest.mark.parametrize("change, said", [
    (dict(n_heads=4), "n_heads"), (dict(gate="g9"), "g9"), (dict(n_layer=0), "n_layer=0"),
    (dict(vocab_size=None), ""), (dict(n_embd=32), ""), (dict(n_layer=2), ""), (dict(gate="none"), ""),
    (dict(n_layer="two"), "")], ids=str)
def test_a_config_that_is_unknown_or_does_not_fit_is_refused(saved, change, said):
    edit(saved, config=torch.load(saved, weights_only=True)["config"] | change)
    assert said in refusal(saved)


@pytest.mark.parametrize("entry", ["config", "model", "state"])
def test_a_file_with_an_entry_missing_is_refused(saved, entry):
    edit(saved, **{entry: None})
    refusal(saved)


@pytest.mark.parametrize("entry", ["config", "model"])
@pytest.mark.parametrize("value", [[1], "text", 3, {"a": 1}, {1: 2}], ids=str)
def test_a_file_with_an_entry_of_another_kind_is_refused(saved, entry, value):
    edit(saved, **{entry: value})
    refusal(saved)


@pytest.mark.parametrize("name", ["norm.weight", "blocks.0.attn.gate.gate_proj.weight", "embed.weight"])
def test_a_missing_an_additional_and_a_misshapen_matrix_are_refused(saved, name):
    whole = torch.load(saved, weights_only=True)["model"]
    for broken in ({k: v for k, v in whole.items() if k != name}, whole | {"more": torch.zeros(1)},
                   whole | {name: torch.zeros(2, 2)}):
        edit(saved, model=broken)
        refusal(saved)


def test_the_config_is_stored_as_a_plain_dict(saved):
    content = torch.load(saved, weights_only=True)
    assert content["config"] == dataclasses.asdict(load_checkpoint(saved)[0].config)
