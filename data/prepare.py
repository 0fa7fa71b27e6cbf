"""
Data for gated GPT: text in, two files of tokens out.

    python data/prepare.py python              this Python's standard library
    python data/prepare.py backcopy            the task that grows a sink
    python data/prepare.py shakespeare         Tiny Shakespeare, 1 MB
    python data/prepare.py fineweb --shards=2  web text in GPT-2 tokens, 200 MB
                                               a shard, and one for val
    python data/prepare.py notes.txt novels/   your own UTF-8 text, held in
                                               memory while it is prepared

The first two need no download. Each writes data/<name>/train.bin and val.bin,
bare arrays of token ids, and meta.json, which says how to read them. Training
maps these files into memory and cuts windows from them at random places.

From top to bottom: tokenizers, writing and opening a set, reading text, the sets without and with a download,
your own files, and how every script of the project ends (run_main).
"""
import argparse
import base64
import hashlib
import http.client
import json
import os
import platform
import re
import signal
import string
import sys
import sysconfig
import tempfile
import time
import urllib.request
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

if not __package__:   # run as a script, which sees its own folder only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.released_tokenizer import StrictEncoding, folder_bos, folder_tokenizer  # noqa: E402

DATA = Path(__file__).resolve().parent
SPLITS = ("train", "val")
VAL_SHARE = 0.05   # of the files where there are many, else of each text
MANY_FILES = 20    # from here on val is made of whole files
MIN_TOKENS = 64    # a split with less holds no window worth training on
NAME = r"\w[\w.-]*"   # of a set, which is that of its folder

# --- tokenizers: three tiktoken encodings; the last id is the token before each text and each window --------

BOS = {"bpe2k": 2047, "bytes": 256, "gpt2": 50256}
BPE2K_SHA256 = "fb32d293c29ebcd491ce8d5b25f58aa57f13f36fe5211d75d3cd327fb572e25d"
# BPE never merges across these: words with the space before them, up to three digits, signs, white space.
SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def bos_id(tokenizer):
    """The id of the beginning-of-sequence token."""
    return BOS[tokenizer] if tokenizer in BOS else folder_bos(tokenizer, get_tokenizer(tokenizer))


def vocabulary(tokenizer):
    """What meta.json says of a tokenizer."""
    bos = bos_id(tokenizer)
    size = bos + 1 if tokenizer in BOS else get_tokenizer(tokenizer).n_vocab
    dtype = np.min_scalar_type(size - 1).name
    return {"tokenizer": tokenizer, "bos": bos, "vocab_size": size, "dtype": dtype}


@cache
def get_tokenizer(name):
    """
    The tiktoken.Encoding of that name: bpe2k (make_bpe2k.py made it), bytes (no merges at all), gpt2, or that
    of a released model, by its folder.
    """
    if name not in BOS:
        if not Path(name).is_dir():
            gone = FileNotFoundError if os.sep in name else ValueError
            raise gone(f"tokenizer {name!r} is not one of {', '.join(BOS)}, nor a folder that is there")
        return folder_tokenizer(name)
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise OSError("tokenizer 'gpt2' needs the network once, to download its vocabulary, and that "
                          f"failed ({type(error).__name__}): try again, or use bpe2k or bytes") from error
    if name == "bytes":
        return encoding_of(name, r"(?s:.)", {bytes([b]): b for b in range(256)})
    return encoding_of(name, SPLIT_PATTERN, bpe2k_ranks())


def encoding_of(name, pattern, ranks):
    """The tiktoken.Encoding of these tokens, {bytes: id}, with BOS behind them."""
    return StrictEncoding(name, pat_str=pattern, mergeable_ranks=ranks, explicit_n_vocab=BOS[name] + 1,
                          special_tokens={"<|bos|>": BOS[name]})


def bpe2k_ranks():
    """{bytes: id} of the tokenizer that ships with the project. ValueError if its file is no longer that."""
    path = DATA / "bpe2k.tiktoken"
    text = path.read_bytes().replace(b"\r\n", b"\n") if path.is_file() else b""   # Git on Windows: \r\n
    if (found := hashlib.sha256(text).hexdigest()) != BPE2K_SHA256:
        raise ValueError(f"{path} has sha256 {found[:8]}, not {BPE2K_SHA256[:8]}: texts would become other "
                         "tokens, so get the file that ships with the project again")
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, text.splitlines())}


@cache
def token_bytes(tokenizer):
    """(vocab_size,) How many bytes of text each token stands for (BOS: none), for bits per byte."""
    lengths = np.zeros(vocabulary(tokenizer)["vocab_size"], int)
    for text, token in get_tokenizer(tokenizer)._mergeable_ranks.items():
        lengths[token] = len(text)
    return lengths


def same_tokenizer(a, b):
    """Whether two names mean the same tokens, as the folders of two released models may do."""
    def content(name):
        return type(get_tokenizer(name)), get_tokenizer(name).__getstate__()

    return a == b or content(a) == content(b)


# --- a set: writing and opening it --------------------------------------------------------------------------


def write_set(name, root, tokenizer, source, chunks):
    """
    Writes the folder root/name from {"train": arrays of token ids, "val": arrays of token ids}; returns it.

    All goes to a temporary folder first: a kill at any moment leaves the old set, the new one, or none.
    """
    out, meta = Path(root, name), {**vocabulary(tokenizer), "source": source}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as tmp:
            for split in SPLITS:
                meta[split] = write_bin(Path(tmp, f"{split}.bin"), tokenizer, chunks[split])
                if meta[split]["tokens"] < MIN_TOKENS:
                    raise ValueError(f"{source} leaves {meta[split]['tokens']} tokens for {split}, but a "
                                     f"window needs {MIN_TOKENS} or more: give more text")
            Path(tmp, "meta.json").write_text(json.dumps(signed(meta), indent=1) + "\n")
            publish(Path(tmp), out)
    except OSError as error:
        if not error.strerror:   # ours, and says all
            raise
        raise OSError(f"cannot write {out} ({error.strerror}): make room there, or choose another place with "
                      "--root") from error
    print(f"{out}: {meta['train']['tokens']:,} tokens for train and {meta['val']['tokens']:,} for val "
          f"({tokenizer}, {meta['vocab_size']:,} in the vocabulary)")
    return out


def write_bin(path, tokenizer, chunks):
    """Writes arrays of token ids one after the other; returns what meta.json says of the file."""
    vocab, sha256, n_tokens, n_bytes = vocabulary(tokenizer), hashlib.sha256(), 0, 0
    try:
        lengths = token_bytes(tokenizer)
    except OSError:   # GPT-2 tokens can be written offline; how many bytes they stand for is unknown then.
        lengths = n_bytes = None
    with open(path, "wb") as file:
        for tokens in chunks:
            if len(tokens) and tokens.max() >= vocab["vocab_size"]:
                raise ValueError(f"token {tokens.max()} is beyond the last of {tokenizer}, "
                                 f"{vocab['vocab_size'] - 1}")
            data = tokens.astype(vocab["dtype"]).tobytes()
            file.write(data)
            sha256.update(data)
            n_tokens += len(tokens)
            n_bytes = None if lengths is None else n_bytes + int(lengths[tokens].sum())
    return {"tokens": n_tokens, "bytes": n_bytes, "sha256": sha256.hexdigest()}


def signed(meta):
    """What meta.json says, with a checksum of all of it."""
    meta = {key: value for key, value in meta.items() if key != "sha256"}
    return {**meta, "sha256": hashlib.sha256(json.dumps(meta).encode()).hexdigest()}


def publish(new, out):
    """Moves the finished files to `out`, meta.json last, since a set without it counts as not there."""
    out.mkdir(exist_ok=True)
    meta = out / "meta.json"
    # So the old one goes first. Unless it says the same: then another process has just made this set and may
    # be reading it already (two runs of train.py that were started at once).
    if meta.exists() and meta.read_bytes() != (new / "meta.json").read_bytes():
        meta.unlink()
    for file in ("train.bin", "val.bin", "meta.json"):
        os.replace(new / file, out / file)


def load(name, root=DATA):
    """
    (meta, {"train": tokens, "val": tokens}) of a prepared set; the tokens are mapped from disk, not read.

    Raises FileNotFoundError if there is no such set and ValueError if it is damaged; both name the way out.
    """
    if not re.fullmatch(NAME, name):
        raise ValueError(f"data={name} can't name a folder in {root}: letters, digits and . _ - only")
    path = Path(root, name, "meta.json")
    again = f"python data/prepare.py {name if name in SETS else f'FILES --name={name}'}"
    if not path.is_file():
        there = ", ".join(sorted(meta.parent.name for meta in Path(root).glob("*/meta.json"))) or "none yet"
        raise FileNotFoundError(f"there is no data set {name!r} in {root} (there: {there}; known by name: "
                                f"{', '.join(SETS)}): make it with `{again}`")
    try:
        meta = json.loads(path.read_text())
        whole = meta == signed(meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole or meta != {**meta, **vocabulary(meta["tokenizer"])}:   # which may have its own to say
        raise ValueError(f"{path} is damaged or from another version: make it again with `{again}`")
    return meta, {split: open_bin(path.with_name(f"{split}.bin"), meta, split, again) for split in SPLITS}


def open_bin(path, meta, split, again):
    """The tokens of one split, mapped from disk, if they are the ones that meta.json speaks of."""
    count = meta[split]["tokens"]
    size, expected = path.stat().st_size if path.exists() else 0, count * np.dtype(meta["dtype"]).itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, but {count:,} tokens need {expected:,}: it was cut "
                         f"short or changed, make it again with `{again}`")
    tokens = np.memmap(path, meta["dtype"], mode="r")
    found = hashlib.sha256(tokens).hexdigest()   # one pass over the file, about a second for a GB
    if found != meta[split]["sha256"]:
        raise ValueError(f"{path} has sha256 {found[:8]}, but the tokens that meta.json speaks of have "
                         f"{meta[split]['sha256'][:8]}: it is damaged, make it again with `{again}`")
    return tokens


# --- reading, splitting and encoding text -------------------------------------------------------------------


def read_text(path):
    """The text of a UTF-8 file, line ends as they are."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (see byte {error.start:,}): convert it first") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


def read_folder(folder, suffix="", skip=()):
    """{path: text} of the UTF-8 files under `folder`, sorted; no hidden ones, no folders named in `skip`."""
    paths, texts = [], {}
    for here, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        paths += [Path(here, f) for f in files if f.endswith(suffix) and not f.startswith(".")]
    for path in sorted(path for path in paths if path.is_file()):
        try:
            texts[path] = read_text(path)
        except ValueError:
            print(f"{path} is left out: not UTF-8 text", file=sys.stderr)
    return {path: text for path, text in texts.items() if text}


def split_by_file(texts):
    """
    Holds out 5% of the files, the first in the order of their names' hashes. So wherever the files lie, and
    when one is added, val stays the same but for a file or two.
    """
    base = os.path.commonpath([path.parent for path in texts])
    # MD5, since of the usual hashes it gives `python` the val that is most like its train (4.9% of the text).
    rank = {path: hashlib.md5(path.relative_to(base).as_posix().encode(), usedforsecurity=False).digest()
            for path in texts}
    held_out = set(sorted(texts, key=rank.get)[:round(VAL_SHARE * len(texts))])
    return {"train": [text for path, text in texts.items() if path not in held_out],
            "val": [text for path, text in texts.items() if path in held_out]}


def split_each(texts, val_share=VAL_SHARE):
    """Holds out the end of each text."""
    cuts = [(text, int(len(text) * (1 - val_share))) for text in texts]
    return {"train": [text[:cut] for text, cut in cuts], "val": [text[cut:] for text, cut in cuts]}


def encode(splits, tokenizer, bos=True):
    """From {"train": texts, "val": texts} to an array of tokens for each text, after a BOS if `bos`."""
    def arrays(split):
        for text in tqdm(splits[split], desc=split, unit=" texts", leave=False, disable=None):
            # A text that says "<|bos|>" means these seven characters.
            try:
                tokens = get_tokenizer(tokenizer).encode_to_numpy(text, disallowed_special=())
            except ValueError as error:   # of the library of regular expressions
                raise ValueError(f"a text of {len(text):,} characters can't be split into tokens ({error}): "
                                 "has it millions of spaces in a row? --tokenizer=bytes takes all") from None
            yield np.append(np.uint32(bos_id(tokenizer)), tokens) if bos else tokens
    return {split: arrays(split) for split in SPLITS}


# --- sets that need no download -----------------------------------------------------------------------------


def stdlib_texts():
    """{path: text} of the running Python's standard library, without its tests: 11 MB of code and prose."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = read_folder(folder, ".py", skip={"test", "tests", "idle_test", "site-packages", "dist-packages"})
    # Not written by people: how this Python was built, and 750 kB of manual in one module.
    texts = {path: text for path, text in texts.items()
             if not path.name.startswith("_sysconfigdata") and path.parent.name != "pydoc_data"}
    if len(texts) < MANY_FILES:
        raise ValueError(f"{folder} does not hold the standard library's source: prepare FILES of your own")
    return texts


def prepare_python(root=DATA):
    """Real text that is on every machine: the standard library in 2,048 BPE tokens, split by file."""
    chunks = encode(split_by_file(stdlib_texts()), "bpe2k")
    source = f"the standard library of Python {platform.python_version()}"
    return write_set("python", root, "bpe2k", source, chunks)


ALPHABET = string.ascii_letters + string.digits   # 62 characters
TRIGGERS = "uvx"   # 7% of the text


def backcopy_text(chars, seed=0):
    """
    A Markov chain over 62 characters whose rows are drawn once from a Dirichlet(0.3), except that after a
    trigger the next character is, seven times out of eight, a copy of the one *before* it ("kvk"; not
    where that is a trigger, too).

    So a head has work at triggers and none elsewhere. Why not every time? Then nothing else need be known
    of a trigger, its embedding shrinks, and attention's output counts at triggers but not beside the long
    embeddings of all others; and a head whose output doesn't count needs no sink. The seed fixes the text on
    every machine: a last bit rounded otherwise would have to meet one of 62 x 2^16 levels to matter.
    """
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(ALPHABET.encode(), np.uint8)
    cdfs = rng.dirichlet(np.full(62, 0.3), size=62).cumsum(axis=1)   # (62, 62), one row for each character
    # Each row's inverse CDF, tabulated at 2^16 levels: a draw is one look-up, so a plain loop is fast enough.
    levels = (np.arange(2**16) + 0.5) / 2**16
    successor = {int(a): letters[np.searchsorted(cdf, levels)].tobytes() for a, cdf in zip(letters, cdfs)}
    copies = rng.integers(8, size=chars - 1, dtype=np.uint8)   # 0: no copy
    draws = rng.integers(2**16, size=chars - 1, dtype=np.uint16)
    text, triggers = bytearray(b"a"), set(TRIGGERS.encode())
    before = last = text[0]
    for level, copy in zip(memoryview(draws), memoryview(copies)):
        copied = copy and last in triggers and before not in triggers
        before, last = last, before if copied else successor[last][level]
        text.append(last)
    return text.decode()


def prepare_backcopy(root=DATA, chars=10_000_000, seed=0):
    """A task that needs attention at some tokens and none at all the others, which is when a sink forms."""
    chunks = encode(split_each([backcopy_text(chars, seed)]), "bytes", bos=False)
    source = f"{chars:,} characters, seed {seed}; after {TRIGGERS} a copy, seven times out of eight"
    return write_set("backcopy", root, "bytes", source, chunks)


# --- sets that are downloaded -------------------------------------------------------------------------------

TRIES = 5   # each goes on where the one before broke off


def download(url, path, problem):
    """
    Fetches `url` to `path`, unless it is there; problem(path) says what is wrong with a file, "" if nothing.

    What has come so far is in `path`.part: the same command, started again, goes on from there.
    """
    if path.exists():
        if wrong := problem(path):
            raise ValueError(f"{path} {wrong}: delete it and run this command again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, reason = path.with_name(path.name + ".part"), "the connection broke off"
    for _ in range(TRIES):
        try:
            if fetch(url, part):
                break
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if getattr(error, "code", None) == 416:   # Nothing comes after what we have, yet it is not whole.
                part.unlink()
    else:
        raise OSError(f"cannot download {url} ({reason}): try again later, or put that file at {path}")
    if wrong := problem(part):
        part.unlink()
        raise ValueError(f"what {url} sent {wrong}: it was thrown away, try again or put that file at {path}")
    os.replace(part, path)


def fetch(url, part):
    """One request for what `part` still lacks; True if all that the server promised has come."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if reply.status != 206:
            have = 0   # The server sends everything, whether we asked for a range or not.
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()   # It sends another range: start again.
            return False
        total = None if reply.length is None else have + reply.length
        bar = tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as file:
            while chunk := reply.read(1 << 18):
                bar.update(file.write(chunk))
            return total is None or file.tell() == total


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare_shakespeare(root=DATA):
    """Tiny Shakespeare in bytes, with nanoGPT's split: the last tenth is for validation."""
    def problem(path):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        return "" if found == SHAKESPEARE_SHA256 else f"has sha256 {found[:8]}, not {SHAKESPEARE_SHA256[:8]}"

    path = Path(root, "shakespeare", "input.txt")
    download(SHAKESPEARE_URL, path, problem)
    chunks = encode(split_each([read_text(path)], val_share=0.1), "bytes", bos=False)
    return write_set("shakespeare", root, "bytes", SHAKESPEARE_URL, chunks)


FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
SHARDS, SHARD_MAGIC = 103, 20240520
SHARD_HEADER = 1024   # bytes: 256 int32, the magic number, version 1, the number of tokens, zeros


def shard_problem(path):
    """What is wrong with a shard, "" if nothing."""
    header, size = np.fromfile(path, "<i4", count=256), path.stat().st_size
    if len(header) < 256 or tuple(header[:2]) != (SHARD_MAGIC, 1) or header[2] < 1:
        return "is no shard of GPT-2 tokens, by its header"
    expected = SHARD_HEADER + 2 * int(header[2])
    return "" if size == expected else f"has {size:,} bytes, not the {expected:,} of its header"


def shard_tokens(paths):
    """The tokens of several shards, 4 million at a time."""
    for path in tqdm(paths, desc="joining", unit=" shards", leave=False, disable=None):
        shard = np.memmap(path, "<u2", mode="r", offset=SHARD_HEADER)
        yield from (shard[start:start + (1 << 22)] for start in range(0, len(shard), 1 << 22))


def prepare_fineweb(root=DATA, shards=1):
    """FineWeb, 100 million tokens a shard. The shards are kept, for the day you want more of them."""
    if not 1 <= shards <= SHARDS:
        raise ValueError(f"--shards={shards} must be 1 to {SHARDS}, which is all there are")
    files = {"train": [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)],
             "val": ["fineweb_val_000000.bin"]}
    folder = Path(root, "fineweb")
    for file in files["val"] + files["train"]:
        download(f"{FINEWEB_URL}/{file}", folder / file, shard_problem)
    chunks = {split: shard_tokens([folder / file for file in files[split]]) for split in SPLITS}
    return write_set("fineweb", root, "gpt2", f"{shards} of {SHARDS} shards of {FINEWEB_URL}", chunks)


SETS = {"python": prepare_python, "backcopy": prepare_backcopy, "shakespeare": prepare_shakespeare,
        "fineweb": prepare_fineweb}
OFFLINE = ("python", "backcopy")   # need no download, so train.py prepares them unasked


def prepare(name, root=DATA, **options):
    """Makes the set of that name under `root` and returns its folder."""
    if name not in SETS:
        raise ValueError(f"{name!r} is not a set known by name: {', '.join(SETS)}")
    return SETS[name](root=root, **options)


# --- your own text, the command line, and how a script ends -------------------------------------------------


def prepare_files(paths, name=None, tokenizer="bpe2k", root=DATA):
    """A set from text files and folders. Val is 5% of the files, or with few files the end of each."""
    texts = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} is neither a file or folder nor one of {', '.join(SETS)}")
        found = read_folder(path.resolve()) if path.is_dir() else {path.resolve(): read_text(path)}
        if not any(found.values()):
            raise ValueError(f"{path} is empty: there is no text to prepare")
        texts.update(found)
    if tokenizer not in BOS and Path(tokenizer).is_dir():
        tokenizer = str(Path(tokenizer).resolve())
    source = ", ".join(str(Path(path).resolve()) for path in paths)
    name = re.sub(r"[^\w.-]+", "-", Path(paths[0]).resolve().stem) if name is None else name
    check_name(name, source, root)
    splits = split_by_file(texts) if len(texts) >= MANY_FILES else split_each(texts.values())
    return write_set(name, root, tokenizer, source, encode(splits, tokenizer))


def check_name(name, source, root):
    """The same files may be prepared again, but never in the place of anything else."""
    if not re.fullmatch(NAME, name):
        raise ValueError(f"--name={name} must be letters, digits and . _ - only, since it names a folder")
    folder = Path(root, name)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        same, whole = meta["source"] == source, meta == signed(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        same = whole = False
    of_a_set = {path.name for path in folder.glob("*")} <= {"train.bin", "val.bin", "meta.json"}   # or none
    if name in SETS or not (same or (of_a_set and not whole)):
        raise ValueError(f"the name {name} is taken by something else in {root}: choose another with --name")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="prepare.py", allow_abbrev=False,
                                     description=__doc__.partition("\nFrom top")[0],
                                     usage="prepare.py NAME|FILES ... [--flag=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="NAME|FILES", help="a set's name, or files and folders")
    parser.add_argument("--name", help="FILES: what to call the set (default: after the first file)")
    parser.add_argument("--tokenizer", help=f"FILES: {', '.join(BOS)}, or the folder of a released model "
                                            "(default: bpe2k)")
    parser.add_argument("--shards", type=int, help="fineweb: how many shards for training (default: 1)")
    parser.add_argument("--root", type=Path, help="where to put it (default: data/, where train.py looks)")
    options = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    what = options.pop("what")
    by_name = set(what) <= set(SETS)   # A set wins over a file of the same name.
    own = ["root"] + (["name", "tokenizer"] if not by_name else ["shards"] if what == ["fineweb"] else [])
    if wrong := [option for option in options if option not in own]:
        raise ValueError(f"--{wrong[0]} does not go with {' '.join(what)}: it takes --{', --'.join(own)}")
    if not by_name:
        prepare_files(what, **options)
    for name in what if by_name else ():
        prepare(name, **options)


def run_main(main):
    """A script's main(), but what a user can mend ends in one sentence and status 2, without a traceback."""
    name = os.path.basename(sys.argv[0])
    first = os.environ.get("RANK", "0") == "0"   # of torchrun's processes

    def end(status, text):
        if not first:   # torchrun ends all processes when one does: let the first say it, and speak only
            time.sleep(2)   # where it has nothing to say
        print(text, file=sys.stderr)
        sys.exit(status)

    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):   # a pipe or a terminal that can't show a character shows a ?
        sys.stdout.reconfigure(errors="replace")
    if "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # a plain kill ends like Ctrl-C
    try:
        main()
    except BrokenPipeError:   # whoever read our output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        known = where and why
        end(2, f"{name}: " + (f"{where} can't be used ({why}): name another place" if known else str(error)))
    except (MemoryError, RuntimeError) as error:
        full = "out of memory|allocate memory|(multiplication|calculation) overflow"   # in torch's words
        if not isinstance(error, MemoryError) and not re.search(full, str(error)):
            raise
        end(2, f"{name}: the memory is full: try a smaller --batch_size (with more --grad_accum), "
               "--block_size, --n_embd, or less text")
    except KeyboardInterrupt as interrupt:
        end(130, f"\n{name}: {str(interrupt) or 'interrupted'}") if first else sys.exit(130)


if __name__ == "__main__":
    run_main(main)
