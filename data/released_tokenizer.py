"""
The tokenizers of released models: byte-level BPE in Hugging Face's files becomes a tiktoken.Encoding.

A folder holds tokenizer.json, or vocab.json and merges.txt. They list merges in their order, and tiktoken
merges by rank, so that both mean the same tokens is checked. From top to bottom: the encoding of a folder,
checksums, reading the two kinds of files, from merges to ranks, the token that a text starts with.
"""
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

# What Qwen2 splits text by. A folder with vocab.json and merges.txt does not say it, and so gets this one.
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = "tokenizer_config.json", "added_tokens.json"  # where such a folder keeps them


class StrictEncoding(tiktoken.Encoding):
    """An encoding that refuses text with no UTF-8 form, where tiktoken would put U+FFFD without a word."""
    form = None   # of Unicode, to which text is brought first

    def prepared(self, text):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start:,} of the text, {text[error.start]!a}, is half of a "
                             "surrogate pair and has no UTF-8 form: leave it out") from None
        return unicodedata.normalize(self.form, text) if self.form else text

    def encode(self, text, **options):
        return super().encode(self.prepared(text), **options)

    def encode_ordinary(self, text):
        return super().encode_ordinary(self.prepared(text))

    def encode_to_numpy(self, text, **options):
        return super().encode_to_numpy(self.prepared(text), **options)


class NFCEncoding(StrictEncoding):
    form = "NFC"


def folder_tokenizer(folder):
    """
    The encoding that tokenizer.json in `folder` describes, or vocab.json and merges.txt.

    ValueError if tiktoken, which merges by rank, would not make the tokens that these files mean.
    """
    files = [Path(folder, "tokenizer.json")]
    if not files[0].exists():
        files = [Path(folder, name) for name in ("merges.txt", *SPECIAL_TOKENS, "vocab.json")]
    for path in files:  # messages name the last
        check_unchanged(path)
    try:
        read = read_tokenizer_json if len(files) == 1 else read_vocab_and_merges
        vocab, merges, special, pattern, nfc = read(path)
        ranks = checked_ranks(vocab, merges, special)
        # What the pattern does not match, tiktoken would drop; and no match may be empty (\G: its start).
        pattern = rf"(?:{pattern})(?!\G)|(?:(?!(?:{pattern})(?!\G))[\s\S])+"
        kind = NFCEncoding if nfc else StrictEncoding
        return kind("released", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no tokenizer ({Path(error.filename).name} is missing): put "
                                "tokenizer.json there, or vocab.json and merges.txt") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path} can't be used: {reason}") from None
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged, or no tokenizer of byte-level BPE: download it again") from None


SUMS = "SHA256SUMS"  # as sha256sum writes it, and `sha256sum --check` reads it


def checksum(path, kind="sha256", prefix=b""):
    """Of `prefix` and a file, in hexadecimal; read piece by piece."""
    digest = hashlib.new(kind, prefix, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_unchanged(path):
    """Raise ValueError if a file of a model's folder is not what it was when it was saved or downloaded.

    What it was stands in SHA256SUMS, which save_pretrained writes, or in what `huggingface-cli download
    --local-dir` keeps: in its second line the SHA-256 of a large file, Git's SHA-1 of a small one.
    Without either nothing is known, as the formats have no checksums of their own.
    """
    path, cache = Path(path).absolute(), ".cache/huggingface/download"
    if not path.exists():
        return  # whoever reads it will say so
    if not path.is_file():  # nor a pipe, which could make us wait forever
        raise ValueError(f"{path} is not a file: get it again")
    notes = {path.with_name(SUMS): rf"^([0-9a-f]{{64}}) [ *]{re.escape(path.name)}$"} | {
        root / cache / path.relative_to(root).with_name(f"{path.name}.metadata"):
            r"\A.*\n([0-9a-f]{64}|[0-9a-f]{40})$" for root in path.parents}
    for note, pattern in notes.items():
        if note.is_file() and (known := re.search(pattern, note.read_text(errors="replace"), re.MULTILINE)):
            git = len(known[1]) == 40
            found = checksum(path, *(("sha1", f"blob {path.stat().st_size}\0".encode()) if git else ()))
            if found != known[1]:
                raise ValueError(f"{path} has changed since it was saved or downloaded: its checksum is not "
                                 f"that of {note}; get it again or, if you changed it, delete that note")
            return


def read_tokenizer_json(path):
    """(vocab, merges, special tokens, pattern, NFC or not) of a tokenizer.json that asks for no more."""
    file = json.loads(path.read_bytes())
    model, steps = file["model"], file["pre_tokenizer"].get("pretokenizers", [file["pre_tokenizer"]])
    types, normalizer = [step["type"] for step in steps], (file.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or types != ["Split", "ByteLevel"] or normalizer not in ("NFC", None):
        raise ValueError(f"it is {model['type']} after {' and '.join(types)}, with normalizer {normalizer}; "
                         "it must be BPE after Split and ByteLevel, with normalizer NFC or none")
    split, byte_level = steps
    asks = {"byte_fallback": model.get("byte_fallback"), "dropout": model.get("dropout"),
            "prefix": model.get("continuing_subword_prefix"), "suffix": model.get("end_of_word_suffix"),
            "invert": split["invert"], "add_prefix_space": byte_level["add_prefix_space"],
            "use_regex": byte_level["use_regex"],
            "behavior": split["behavior"] != "Isolated" and split["behavior"],
            "pattern": "Regex" not in split["pattern"] and split["pattern"]}
    if wrong := [f"{what}={value!r}" for what, value in asks.items() if value]:
        raise ValueError(f"it asks for {', '.join(wrong)}, which tiktoken does not have")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    return model["vocab"], merges, special, split["pattern"]["Regex"], normalizer == "NFC"


def read_vocab_and_merges(path):
    """The same of vocab.json and the merges.txt beside it; special tokens are in one of two other files."""
    vocab, special = json.loads(path.read_bytes()), {}
    lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split() for line in lines[lines[0].startswith("#version"):] if line.strip()]
    config, more = map(path.with_name, SPECIAL_TOKENS)
    if config.exists():
        added = json.loads(config.read_bytes()).get("added_tokens_decoder", {})
        special = {token["content"]: int(number) for number, token in added.items()}
    if more.exists():
        special |= json.loads(more.read_bytes())
    return vocab, merges, special, QWEN_PATTERN, True


def byte_letters():
    """{letter: byte} of byte-level BPE, which writes what is not printable with letters from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def checked_ranks(vocab, merges, special):
    """
    {bytes: id}, in which a lower id is merged first. ValueError unless that is the same as doing `merges` in
    their order: then ids rise from merge to merge, and each token falls apart into the two that it is merged
    from when only lower ids may be merged.
    """
    letters = byte_letters()
    ranks = {bytes(map(letters.__getitem__, token)): i for token, i in vocab.items() if token not in special}
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 1 << 24 for i in ids):
        raise ValueError("two tokens have one id, or an id is no whole number from 0 on")
    pairs = [[bytes(map(letters.__getitem__, half)) for half in merge] for merge in merges]
    merged = [ranks[left + right] for left, right in pairs]
    alone = {bytes([byte]) for byte in range(256)}
    if merged != sorted(set(merged)) or ranks.keys() != alone | {left + right for left, right in pairs}:
        raise ValueError("its ids are not 256 bytes and one token for each merge, in the order of the merges")
    for pair, rank in zip(pairs, merged):
        if parts_below(rank, b"".join(pair), ranks) != pair:
            raise ValueError(f"token {rank} is not what merging by rank would make of {b''.join(pair)!r}")
    return ranks


def parts_below(rank, text, ranks):
    """What is left of `text` when tokens of lower rank have been merged, the lowest first."""
    parts = [text[i:i + 1] for i in range(len(text))]
    while True:
        candidates = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
        lowest = min(candidates, default=rank)
        if lowest >= rank:
            return parts
        i = candidates.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def folder_bos(folder, encoding):
    """The token that a text starts with: bos_token_id or eos_token_id of config.json, else <|endoftext|>."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_bytes()) if path.exists() else {}
        named = [config.get("bos_token_id"), config.get("eos_token_id")]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}): download it again") from None
    for token in (*named, encoding._special_tokens.get("<|endoftext|>")):
        if type(token) is int and encoding.is_special_token(token):
            return token
    raise ValueError(f"{folder} has no token to start a text with: config.json names no bos_token_id or "
                     "eos_token_id that is special, and <|endoftext|> is not there")
