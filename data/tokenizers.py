"""From text to tokens and back: three tiktoken encodings, and the tokenizers of released models."""
import base64
import codecs
import hashlib
import json
import re
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

import numpy as np
import tiktoken

from plumbing.files import from_hub, why

BOS = {"bpe2k": 2047, "bytes": 256, "gpt2": 50256}  # the last id: the token before each text and each window
# BPE never merges across these: words with the space before them, up to three digits, signs, white space.
SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@cache
def get_tokenizer(name):
    """The tokenizer of that name: bpe2k (made by make_bpe2k.py), bytes, gpt2, or a released model's folder.

    Raises ValueError if there is none of that name, and OSError if gpt2 cannot be downloaded.
    """
    if name == "bytes":
        return encoding_of(name, r"(?s:.)", {bytes([b]): b for b in range(256)})
    if name == "bpe2k":
        lines = Path(__file__).with_name("bpe2k.tiktoken").read_text(encoding="utf-8").splitlines()
        return encoding_of(name, SPLIT_PATTERN, {base64.b64decode(token): int(rank)
                                                 for token, rank in map(str.split, lines)})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError("tokenizer gpt2 needs the network once, to download its vocabulary: try again, or "
                          "use bpe2k or bytes") from error
    if Path(name).is_dir():
        return FolderTokenizer(name)
    raise ValueError(f"tokenizer {name} is not one of {', '.join(BOS)}, nor a folder that is there: " + (
        from_hub(name) or "copy it beside the run or set that needs it, or name it with --tokenizer"))


def same_tokenizer(name, other):
    """Whether two names mean the same tokens. A folder may have been copied or moved."""
    if name == other or BOS.keys() & {name, other}:
        return name == other
    return get_tokenizer(name).tokenizer.to_str() == get_tokenizer(other).tokenizer.to_str()


def sha256_of(name):
    """The sha256 of the tokenizer.json of a folder; None for the tokenizers that are known by name."""
    return None if name in BOS else hashlib.sha256(Path(name, "tokenizer.json").read_bytes()).hexdigest()


def check_tokenizer(name, sha256):
    """ValueError if the tokenizer in a folder is not the one of before: the same ids would be other texts."""
    if sha256 and name not in BOS and Path(name).is_dir() and sha256_of(name) != sha256:
        raise ValueError(f"{name} holds another tokenizer than it did: put the old tokenizer.json back, or "
                         "prepare the data and train anew")


def encoding_of(name, pattern, ranks):
    """The tiktoken.Encoding of these tokens, {bytes: id}, with BOS as the last one."""
    special = {"<|bos|>": BOS[name]}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def byte_letters():
    """{letter: byte} of byte-level BPE, which writes unprintable bytes as letters from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


PROBE = " Ab\t 1000 don't\n\n  naïve ﬁn 東京 🙂 </s>\r\n"  # a text that a tokenizer must give back


class FolderTokenizer:
    """A released model's tokenizer.json, read by the `tokenizers` package, with the methods of tiktoken.

    Tokens are bytes written as letters (byte-level: GPT-2, Qwen, Llama 3), or letters, ▁ for a space, and
    bytes such as <0x0A> (Llama 2, Mistral). `front`: the ids that it puts in front of a text, often none.
    """
    said = False  # that letters are changed

    def __init__(self, folder):
        try:
            from tokenizers import Tokenizer  # asked for only here
        except ImportError:
            raise ValueError(f"the tokenizer in {folder} needs a package: pip install tokenizers") from None
        self.path = path = Path(folder, "tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            added = self.tokenizer.get_added_tokens_decoder()
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{path} is no tokenizer that can be read: {why(path, error)}") from None
        self.tokenizer.no_truncation()  # somebody may have saved it while it cut texts, or filled them up
        self.tokenizer.no_padding()
        if getattr(self.tokenizer.model, "dropout", None):  # it cut words at random
            self.tokenizer.model.dropout = None
        self.tokenizer.encode_special_tokens = True  # a text that says <|endoftext|> means these letters
        self.special = {t.content: i for i, t in added.items() if t.special}
        letters = byte_letters() if "ByteLevel" in str(self.tokenizer.decoder) else {}

        def meaning(text):
            if letters:
                return b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in text)
            byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
            return bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()

        self.bytes = {i: meaning(text) for text, i in self.tokenizer.get_vocab().items()}
        self.bytes |= {i: t.content.encode() for i, t in added.items()}  # these are written as they are
        self.n_vocab = max(self.bytes) + 1
        read = b"".join(map(self.bytes.get, self.ids(PROBE))).decode(errors="replace")
        if read not in (PROBE, f" {PROBE}"):  # Llama 2's puts a space in front
            raise ValueError(f"{path} makes {read!r} of {PROBE!r}, so that samples and bits per byte would "
                             "be wrong: take a model that keeps a text as it is")
        whole = self.ids("a", add_special_tokens=True)
        self.front = whole[:whole.index(self.ids("a")[0])]

    def ids(self, text, add_special_tokens=False):
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_ordinary(self, text):
        ids = self.ids(text)
        if not self.said and sum(len(self.bytes[i]) for i in ids) - len(text.encode()) not in (0, 1):
            print(f"{self.path} changes letters (Qwen's makes one of e and its accent): bits per byte count "
                  "those that it makes of the text", file=sys.stderr)
            self.said = True
        return ids

    def decode_single_token_bytes(self, token):
        return self.bytes.get(token, b"")


def asked(folder, file):
    """What a JSON file in a released model's folder says; nothing if it is not there."""
    path = Path(folder, file)
    try:
        return {**json.loads(path.read_bytes())} if path.exists() else {}  # TypeError if it is no object
    except (ValueError, TypeError):
        raise ValueError(f"{path} is not a {file}: get it again") from None


def bos_id(name):
    """The id that a text starts with: what a folder's tokenizer puts in front, or its config.json names."""
    if name in BOS:
        return BOS[name]
    tokenizer, config = get_tokenizer(name), asked(name, "config.json")
    for token in (*tokenizer.front, config.get("bos_token_id"), config.get("eos_token_id"),
                  tokenizer.special.get("<|endoftext|>")):
        if token in tokenizer.special.values():
            return token
    raise ValueError(f"{Path(name, 'config.json')} names no bos_token_id or eos_token_id that the tokenizer "
                     "has: add one")


def front_ids(name):
    """The ids in front of each text: our BOS, or what a folder's own tokenizer puts there, if anything."""
    return [BOS[name]] if name in BOS else get_tokenizer(name).front


def end_ids(name):
    """The ids that end a text: BOS, since it starts the next one, and the EOS that a released model names."""
    if name in BOS:
        return {BOS[name]}
    ids = [bos_id(name)]
    for file in ("config.json", "generation_config.json"):
        eos = asked(name, file).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    return {token for token in get_tokenizer(name).special.values() if token in ids}


@cache
def token_bytes(name):
    """(vocab_size,): how many bytes of text each token stands for, BOS for none. For bits per byte."""
    tokenizer = get_tokenizer(name)
    special = set(tokenizer.special.values()) if name not in BOS else {BOS[name]}
    return np.array([0 if token in special else len(bytes_of(token, tokenizer))
                     for token in range(tokenizer.n_vocab)])


def bytes_of(token, tokenizer):
    """The bytes of one token; none for a number without a token (a model's vocabulary may be rounded up)."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


def labels(tokens, tokenizer, bos=None):
    """The tokens' texts for a picture: spaces and line ends are visible, and `bos` is called BOS."""
    signs = str.maketrans({" ": "·", "\n": "↵", "\t": "→"})
    return ["BOS" if token == bos else TextOut(tokenizer).rest([token]).translate(signs) for token in tokens]


class TextOut:
    """From tokens to text, one by one: `add` returns the whole UTF-8 characters that have become known."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        return self.decoder.decode(bytes_of(token, self.tokenizer))

    def rest(self, tokens=(), ends=()):
        """The text of the last tokens, before one of `ends`; a sign for a character that lacks bytes."""
        text = "".join(map(self.add, takewhile(lambda token: token not in ends, map(int, tokens))))
        return text + self.decoder.decode(b"", final=True)
