"""
Makes bpe2k.tiktoken, the small tokenizer that ships with gated GPT. You need this only to make another one.

    pip install tokenizers && python data/make_bpe2k.py

Byte-level BPE with 2,047 tokens (256 bytes and 1,791 merges; BOS makes it 2,048), trained by `tokenizers` on
the train split of the `python` set: the standard library of the Python that runs this, 3.11.7 for the file
that ships. In tiktoken's format: lines of "base64(token) rank", first the single bytes by value, then the
merged tokens in the order in which they were learnt.
"""
import base64
import sys
from pathlib import Path

if not __package__:  # run as a script, Python looks for modules in this folder: let it look in the project's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from data.prepare import stdlib_split  # noqa: E402
from data.tokenizers import BOS, SPLIT_PATTERN, byte_letters  # noqa: E402


def main():
    tokenizer, byte = Tokenizer(models.BPE()), byte_letters()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    trainer = trainers.BpeTrainer(vocab_size=BOS["bpe2k"], initial_alphabet=spell.alphabet())
    tokenizer.train_from_iterator(stdlib_split()["train"], trainer)
    vocab = tokenizer.get_vocab()
    learnt = [bytes(byte[letter] for letter in token) for token in sorted(vocab, key=vocab.get)]
    ranked = [bytes([b]) for b in range(256)] + [token for token in learnt if len(token) > 1]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranked)]
    Path(__file__).with_name("bpe2k.tiktoken").write_text("".join(lines), newline="\n")


if __name__ == "__main__":
    main()
