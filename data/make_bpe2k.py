"""
Makes bpe2k.tiktoken, the small tokenizer that ships with gated GPT. You need this only to make another one.

    pip install tokenizers && python data/make_bpe2k.py

Byte-level BPE with 2,047 tokens (256 bytes and 1,791 merges; BOS makes it 2,048), trained by `tokenizers` on
the train split of the `python` set: the standard library of the Python that runs this, 3.11.7 for the file
that ships. It is written in tiktoken's format, lines of "base64(token) rank", where a token's rank is both
its id and the turn in which it was learnt. Then both libraries encode all of the text, and must agree.
"""
import base64
import sys
from pathlib import Path

if not __package__:  # run as a script, Python looks for modules in this folder: let it look in the project's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from data.prepare import stdlib_split  # noqa: E402
from data.tokenizers import BOS, SPLIT_PATTERN, byte_letters, encoding_of  # noqa: E402


def train(texts):
    """A byte-level BPE of the `tokenizers` package that never merges across SPLIT_PATTERN."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    trainer = trainers.BpeTrainer(vocab_size=BOS["bpe2k"], initial_alphabet=spell.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_by_id(tokenizer):
    """The tokens as bytes, by their id in `tokenizers`."""
    byte = byte_letters()
    vocab = tokenizer.get_vocab()
    return [bytes(byte[c] for c in token) for token in sorted(vocab, key=vocab.get)]


def main():
    texts = stdlib_split()
    tokenizer = train(texts["train"])
    learnt = bytes_by_id(tokenizer)
    # Ranks: first the single bytes by value, then the merged tokens in the order in which they were learnt.
    ranked = [bytes([b]) for b in range(256)] + [token for token in learnt if len(token) > 1]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranked)]
    Path(__file__).with_name("bpe2k.tiktoken").write_text("".join(lines), newline="\n")

    made = encoding_of("bpe2k", SPLIT_PATTERN, {token: rank for rank, token in enumerate(ranked)})
    everything = texts["train"] + texts["val"]
    encoded = [made.encode_ordinary(text) for text in everything]
    differ = sum([ranked[t] for t in ours] != [learnt[t] for t in tokenizer.encode(text).ids]
                 for text, ours in zip(everything, encoded))
    print(f"{sum(map(len, everything)) / sum(map(len, encoded)):.2f} characters per token; "
          f"{differ} of {len(everything)} files are encoded differently by the two libraries")
    return differ > 0


if __name__ == "__main__":
    sys.exit(main())
