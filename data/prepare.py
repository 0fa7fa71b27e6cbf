"""
Data for gated GPT: text in, two files of tokens out.

    python data/prepare.py python              this Python's standard library
    python data/prepare.py backcopy            the task that grows a sink
    python data/prepare.py shakespeare         Tiny Shakespeare, 1 MB
    python data/prepare.py fineweb --shards=2  web text, 200 MB a shard
    python data/prepare.py notes.txt novels/   your own UTF-8 text

The first two need no download. Each writes data/<name>/train.bin and val.bin,
bare arrays of token ids, and meta.json, which says how to read them. Training
maps these files into memory and cuts windows from them at random places.
Sets live in data/, or in the folder that the variable GATED_GPT_DATA names.

Reading order: write_set, load -> text in, tokens out -> the sets -> your own files.
"""
import hashlib
import http.client
import json
import os
import platform
import re
import string
import sys
import sysconfig
import tempfile
import unicodedata
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a script, Python looks for modules in this folder: let it look in the project's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from data.tokenizers import BOS, bos_id, check_tokenizer, get_tokenizer, sha256_of, token_bytes  # noqa: E402
from plumbing.files import found_again, whole_file  # noqa: E402
from plumbing.flags import command, parser_of, run_main  # noqa: E402

DATA = Path(os.environ.get("GATED_GPT_DATA") or Path(__file__).resolve().parent).expanduser()
VAL_SHARE = 0.05  # of the text
MANY_FILES = 20  # from here on, val is made of whole files
MARKUP = ".jsonl .json .csv .tsv .html .htm .xml .svg .rtf .ipynb .tex".split()
STDIN = Path("-")


# ---- a set: writing and opening it -----------------------------------------------------------------


def write_set(name, tokenizer, source, chunks):
    """Write the folder DATA/name from {"train": arrays of token ids, "val": arrays of token ids}; return it.

    All goes to a temporary folder first, and meta.json is moved last: a folder without it is no set. So a
    kill, or two runs that prepare the same set at once, leave no half of one.
    """
    out, bos = DATA / name, bos_id(tokenizer)
    vocab_size = bos + 1 if tokenizer in BOS else get_tokenizer(tokenizer).n_vocab
    meta = {"tokenizer": tokenizer, "tokenizer_sha256": sha256_of(tokenizer), "bos": bos,
            "vocab_size": vocab_size, "dtype": np.min_scalar_type(vocab_size - 1).name, "source": source}
    try:
        DATA.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=DATA) as new:
            for split, arrays in chunks.items():
                meta[split] = write_bin(Path(new, f"{split}.bin"), arrays, tokenizer, meta["dtype"])
            text, old = json.dumps(meta, indent=1) + "\n", out / "meta.json"
            Path(new, "meta.json").write_text(text, encoding="utf-8")
            out.mkdir(exist_ok=True)
            if old.exists() and old.read_bytes() != text.encode():  # from here to the end there is no set
                old.unlink(missing_ok=True)
            for file in ("train.bin", "val.bin", "meta.json"):
                os.replace(Path(new, file), out / file)
    except OSError as error:
        if not error.strerror:  # a sentence of our own
            raise
        raise OSError(f"cannot write {out} ({error.strerror}): make room, or let the variable GATED_GPT_DATA "
                      "name another folder for sets") from error
    print(f"{out}:\n{meta['train']['tokens']:,} tokens for train and {meta['val']['tokens']:,} for val "
          f"({tokenizer}, {vocab_size:,} in the vocabulary)")
    return out


def write_bin(path, arrays, tokenizer, dtype):
    """Write arrays of token ids one after the other; return what meta.json says of the file."""
    sha256, n_tokens, n_bytes = hashlib.sha256(), 0, 0
    try:
        lengths = token_bytes(tokenizer)
    except OSError:  # GPT-2 tokens can be written offline, but nobody knows how many bytes they stand for
        n_bytes = None
    with open(path, "wb") as file:
        for tokens in arrays:
            data = tokens.astype(dtype).tobytes()
            file.write(data)
            sha256.update(data)
            n_tokens += len(tokens)
            if n_bytes is not None:
                n_bytes += int(lengths[tokens].sum())
    return {"tokens": n_tokens, "bytes": n_bytes, "sha256": sha256.hexdigest()}


def load(name):
    """(meta, {"train": tokens, "val": tokens}) of a set; the tokens are mapped from disk, not read.

    A set that needs no download is made on the way. Raises FileNotFoundError if there is no such set, and
    ValueError if its files are not whole; both name the command that makes it.
    """
    folder = DATA / name
    words = [name] if name in SETS else ["FILES", f"--name={name}", "--overwrite"]
    make = command("data/prepare.py", *words)
    if name in OFFLINE and not (folder / "meta.json").exists():
        print(f"preparing {folder}, once")
        SETS[name]()
    if not (folder / "meta.json").exists():
        there = ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json"))) or "none"
        raise FileNotFoundError(f"there is no data set {name} in {DATA} (sets there: {there}): make it with "
                                f"`{make}`")
    tokens = {}
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        meta["tokenizer"] = found_again(meta["tokenizer"], folder)
        check_tokenizer(meta["tokenizer"], meta.get("tokenizer_sha256"))
        for split in ("train", "val"):
            tokens[split] = np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r")
            if len(tokens[split]) != meta[split]["tokens"]:
                raise ValueError(f"{split}.bin has {len(tokens[split]):,} tokens, not "
                                 f"{meta[split]['tokens']:,}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the data set {folder} is not whole ({error}): make it again with `{make}`"
                         ) from None
    return meta, tokens


# ---- text in, tokens out ---------------------------------------------------------------------------


def text_of(content):
    """The text in these bytes: UTF-8 without NUL, line ends as they are, a byte order mark dropped.

    This is the one rule for what is text. ValueError if it is something else.
    """
    if b"\0" in content:
        raise ValueError(f"not text: byte {content.index(0):,} is NUL")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: see byte {error.start:,}") from None


def read_text(path):
    """The text of a file, or of standard input if the path is "-". ValueError if it is not text."""
    try:
        path = Path(path).expanduser()
        return text_of(sys.stdin.buffer.read() if path == STDIN else path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def read_texts(paths, suffix="", skip=()):
    """{path: text} of files, and of all files in folders, sorted by path. Says what it leaves out.

    In folders, hidden files and folders, and folders named in `skip`, do not count.
    """
    files, texts, left_out = [], {}, []
    for path in paths:
        if not path.is_dir():
            files.append(path)  # of which os.walk makes nothing
        for here, folders, names in os.walk(path):
            folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
            left_out += [f"{Path(here, name)} (a link)" for name in folders if Path(here, name).is_symlink()]
            files += [Path(here, name) for name in names
                      if name.endswith(suffix) and not name.startswith(".")]
    for path in sorted(path for path in set(files) if path == STDIN or path.is_file()):  # no other pipes
        try:
            texts[path] = read_text(path)
        except (ValueError, OSError):
            left_out.append(str(path))
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        said = f"left out (no UTF-8 text, unreadable, or a link): {', '.join(left_out[:3])}{more}"
        print(said, file=sys.stderr)
    return {path: text for path, text in texts.items() if text}


def by_hash(texts):
    """Paths of {path: text} in the order of a hash of their names, the same wherever the files are."""
    base = os.path.commonpath([path.parent for path in texts if path != STDIN])
    def name(path):  # NFC: a Mac writes an umlaut as two characters
        path = path if path == STDIN else path.relative_to(base)
        return unicodedata.normalize("NFC", path.as_posix()).encode()

    return sorted(texts, key=lambda path: hashlib.md5(name(path),
                                                      usedforsecurity=False).digest())


def split_files(texts):
    """Hold out whole files for val: about 5% of the text. {"train": texts, "val": texts}, or None if no
    choice of files comes near that.
    """
    size, wanted, val = 0, VAL_SHARE * sum(map(len, texts.values())), set()
    for path in by_hash(texts):
        if size + len(texts[path]) <= 1.1 * wanted:
            size += len(texts[path])
            val.add(path)
    return None if size < 0.8 * wanted else divided(texts, val)


def divided(texts, val):
    """{"train": texts, "val": texts} of {path: text}, given the paths for val."""
    return {"train": [text for path, text in texts.items() if path not in val],
            "val": [text for path, text in texts.items() if path in val]}


def split_each(texts, val_share=VAL_SHARE):
    """Hold out the end of each text."""
    cuts = [(text, int(len(text) * (1 - val_share))) for text in texts]
    return {"train": [text[:cut] for text, cut in cuts], "val": [text[cut:] for text, cut in cuts]}


def encode(splits, tokenizer, bos=True):
    """From {"train": texts, "val": texts} to an array of tokens for each text, after a BOS if `bos`."""
    first = [bos_id(tokenizer)] if bos else []
    return {split: (np.array(first + get_tokenizer(tokenizer).encode_ordinary(text), dtype=np.uint32)
                    for text in tqdm(texts, desc=split, unit=" texts", leave=False, disable=None))
            for split, texts in splits.items()}


# ---- sets that need no download --------------------------------------------------------------------


def stdlib_split():
    """{"train": texts, "val": texts} of the standard library without its tests: 11 MB of code and prose."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = read_texts([folder], ".py", skip={"test", "tests", "idle_test", "site-packages", "dist-packages"})
    texts = {path: text for path, text in texts.items()  # not written by people: a build's settings, a manual
             if not path.name.startswith("_sysconfigdata") and path.parent.name != "pydoc_data"}
    if len(texts) < MANY_FILES:
        raise ValueError(f"{folder} does not hold the standard library's source: prepare FILES of your own")
    return divided(texts, set(by_hash(texts)[: round(VAL_SHARE * len(texts))]))  # 5% of the files


def prepare_python():
    """Real text that every Python has with it: its standard library, in 2,048 BPE tokens."""
    source = f"the standard library of Python {platform.python_version()}"
    return write_set("python", "bpe2k", source, encode(stdlib_split(), "bpe2k"))


ALPHABET = string.ascii_letters + string.digits  # 62 characters
TRIGGERS = "uvx"  # 6% of the text


def backcopy_text(chars, seed=0):
    """A Markov chain over 62 characters in which a trigger asks for a copy of the one before it ("kvk").

    After the bigram-backcopy task of Guo et al. 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835).
    Each character's successors are drawn once from a Dirichlet(0.3). After a trigger comes the copy, seven
    times out of eight (but no copy of a trigger). So a head has work at triggers and none elsewhere.

    Why not every time? Then a trigger's own embedding would be useless, and would shrink. What attention adds
    would matter at triggers, where embeddings are short, but hardly elsewhere, where they are long. A head
    whose output does not matter elsewhere needs no sink there.
    """
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(ALPHABET.encode(), np.uint8)
    cdfs = rng.dirichlet(np.full(62, 0.3), size=62).cumsum(axis=1)  # (62, 62), one row for each character
    # Each row's inverse CDF as a table of 2^16 entries: a draw is one look-up, and a plain loop is enough.
    levels = (np.arange(2**16) + 0.5) / 2**16
    successor = {int(a): letters[np.searchsorted(cdf, levels)].tobytes() for a, cdf in zip(letters, cdfs)}
    copies = rng.integers(8, size=chars - 1, dtype=np.uint8)  # 0: no copy
    draws = rng.integers(2**16, size=chars - 1, dtype=np.uint16)
    text, triggers = bytearray(b"a"), set(TRIGGERS.encode())
    before = last = text[0]
    for level, copy in zip(memoryview(draws), memoryview(copies)):
        copied = copy and last in triggers and before not in triggers
        before, last = last, before if copied else successor[last][level]
        text.append(last)
    return text.decode()


def prepare_backcopy(chars=10_000_000, seed=0):
    """A task that needs attention at some tokens and not at the others: then a sink forms."""
    chunks = encode(split_each([backcopy_text(chars, seed)]), "bytes", bos=False)
    source = f"{chars:,} characters, seed {seed}; after {TRIGGERS} a copy, seven times out of eight"
    return write_set("backcopy", "bytes", source, chunks)


# ---- sets that are downloaded ----------------------------------------------------------------------

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare_shakespeare():
    """Tiny Shakespeare in bytes, with nanoGPT's split: the last tenth is for validation."""
    path = DATA / "shakespeare" / "input.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as reply, whole_file(path) as file:
                file.write(reply.read())
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"cannot download {SHAKESPEARE_URL} ({error}): try again, or put it at {path}"
                          ) from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"{path} is not Tiny Shakespeare, by its sha256: delete it and try again")
    chunks = encode(split_each([read_text(path)], val_share=0.1), "bytes", bos=False)
    return write_set("shakespeare", "bytes", SHAKESPEARE_URL, chunks)


FINEWEB = "kjj0/fineweb10B-gpt2"
SHARDS = 103  # for training, 100 million tokens each
SHARD_HEADER = 1024  # bytes in front of a shard's tokens


def prepare_fineweb(shards=1):
    """FineWeb in GPT-2 tokens. The shards stay, for the day when you want more of them."""
    if not 1 <= shards <= SHARDS:
        raise ValueError(f"shards={shards} must be 1 to {SHARDS}, which is all there are")
    try:
        from huggingface_hub import hf_hub_download  # asked for only here; goes on with a broken download
    except ImportError:
        raise ValueError("fineweb needs a package: pip install huggingface_hub") from None

    def tokens_of(files):  # about 4 million at a time
        for file in files:
            path = hf_hub_download(FINEWEB, file, repo_type="dataset", local_dir=DATA / "fineweb")
            shard = np.memmap(path, "<u2", mode="r", offset=SHARD_HEADER)
            yield from np.array_split(shard, max(1, len(shard) >> 22))

    chunks = {"train": tokens_of(f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)),
              "val": tokens_of(["fineweb_val_000000.bin"])}
    return write_set("fineweb", "gpt2", f"{shards} of {SHARDS} shards of {FINEWEB}", chunks)


SETS = {"python": prepare_python, "backcopy": prepare_backcopy, "shakespeare": prepare_shakespeare,
        "fineweb": prepare_fineweb}
OFFLINE = "python", "backcopy"  # need no download, so `load` makes them


# ---- your own files, and the command line ----------------------------------------------------------


def prepare_files(paths, name=None, tokenizer="bpe2k", overwrite=False):
    """A set from text files and folders. Val is whole files where there are many, else the end of each."""
    if named := [path for path in paths if path in SETS and not Path(path).exists()]:
        raise ValueError(f"{named[0]} is a set of its own: prepare it without other files")
    paths = [path if path == STDIN else path.expanduser().resolve() for path in map(Path, paths)]
    for path in paths:
        if path != STDIN and not path.exists():
            raise FileNotFoundError(f"{path} is not there; sets known by name are {', '.join(SETS)}")
    name = name or re.sub(r"[^\w.-]+", "-", paths[0].stem).strip("-._") or "text"
    if name.lower() in SETS or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"--name={name} must be letters, digits and . _ - only, and not {', '.join(SETS)}")
    if (DATA / name).exists() and not overwrite:
        raise ValueError(f"{DATA / name} is there already: --overwrite replaces it, or choose another --name")
    found = read_texts(paths)
    once = {text: path for path, text in reversed(found.items())}  # else a text may be in train and in val
    texts = {path: text for path, text in found.items() if once[text] == path}
    if copies := len(found) - len(texts):
        print(f"left out, since each text counts once: {copies:,} of {len(found):,} texts", file=sys.stderr)
    if (size := sum(map(len, texts.values()))) < 2000:
        raise ValueError(f"{paths[0].name} and so on have {size:,} characters of text: give at least 2,000")
    if marked := [path.name for path in texts if path.suffix.lower() in MARKUP]:
        print(f"{marked[0]} is learned as it is, with all its markup", file=sys.stderr)
    if tokenizer not in BOS and Path(tokenizer).expanduser().is_dir():
        tokenizer = str(Path(tokenizer).expanduser().resolve())
    splits = (split_files(texts) if len(texts) >= MANY_FILES else None) or split_each(texts.values())
    for split, found in splits.items():
        print(f"{split:<6}{len(found):>7,} texts {sum(map(len, found)):>13,} characters")
    return write_set(name, tokenizer, ", ".join(map(str, paths)), encode(splits, tokenizer))


def main(argv=None):
    parser = parser_of(__doc__, "prepare.py", "NAME|FILES ... [--flag=value ...]")
    parser.add_argument("what", nargs="+", metavar="NAME|FILES",
                        help="a set's name, or files and folders; -: standard input")
    parser.add_argument("--name", help="FILES: what to call the set [after the first file]")
    parser.add_argument("--tokenizer", help=f"FILES: {', '.join(BOS)}, or a released model's folder [bpe2k]")
    parser.add_argument("--overwrite", action="store_true", help="FILES: replace the set of that name")
    parser.add_argument("--shards", type=int, help=f"fineweb: how many, of {SHARDS} [1]")
    flags = parser.parse_args(argv)
    if flags.shards is not None and "fineweb" not in flags.what:
        raise ValueError(f"--shards={flags.shards} is for fineweb only: leave it out")
    if not set(flags.what) <= set(SETS):  # a set wins over a file of that name
        return prepare_files(flags.what, flags.name, flags.tokenizer or "bpe2k", flags.overwrite)
    if flags.name or flags.tokenizer:
        raise ValueError(f"{flags.what[0]} has its own name and tokenizer: leave out --name and --tokenizer")
    for name in flags.what:
        SETS[name](**({"shards": flags.shards} if name == "fineweb" and flags.shards is not None else {}))


if __name__ == "__main__":
    run_main(main)
