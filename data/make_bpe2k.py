"""
Makes bpe2k.tiktoken, the small tokenizer that ships with gated GPT. You need this only to make another one.

    pip install tokenizers && python data/make_bpe2k.py

Byte-level BPE with 2,047 tokens (the 256 bytes and 1,791 merges; BOS makes it 2,048), trained by the `tokenizers`
package on the train split of the `python` set: the standard library of the Python that runs this, 3.11 for the file
that ships. Then it is written in tiktoken's format, a line of "base64(token) rank" each, where a token's rank is
both its id and the turn at which its merge was learnt, and both libraries are asked to encode the whole text.
"""
import base64
import json
import sys

from prepare import BOS, DATA, SPLIT_PATTERN, get_tokenizer, split_by_file, stdlib_texts
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers


def train(texts):
    """A `tokenizers` byte-level BPE that never merges across SPLIT_PATTERN."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)   # a printable character for each byte
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    trainer = trainers.BpeTrainer(vocab_size=BOS["bpe2k"], initial_alphabet=spell.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_of_character():
    """ByteLevel's alphabet: a printable Latin-1 byte is itself, the others are the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def ranked_tokens(tokenizer):
    """The tokens as bytes: first the single ones by value, then the merged ones in the order they were learnt."""
    to_byte = byte_of_character()
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    merged = sorted((spelling for spelling in vocab if len(spelling) > 1), key=vocab.get)
    return [bytes([b]) for b in range(256)] + [bytes(to_byte[c] for c in spelling) for spelling in merged]


def main():
    texts = split_by_file(stdlib_texts())
    tokenizer = train(texts["train"])
    tokens = ranked_tokens(tokenizer)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (DATA / "bpe2k.tiktoken").write_text("".join(lines))

    ids = {id: tokens.index(bytes(byte_of_character()[c] for c in s)) for s, id in tokenizer.get_vocab().items()}
    everything = texts["train"] + texts["val"]
    differ = total = 0
    for text in everything:
        ours, theirs = get_tokenizer("bpe2k").encode_ordinary(text), [ids[id] for id in tokenizer.encode(text).ids]
        total, differ = total + len(ours), differ + (ours != theirs)
    print(f"{sum(map(len, everything)) / total:.2f} characters per token; "
          f"{differ} of {len(everything)} files are encoded otherwise by tiktoken than by tokenizers")
    return differ > 0


if __name__ == "__main__":
    sys.exit(main())
