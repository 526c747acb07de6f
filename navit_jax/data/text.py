"""Trains the vocabulary of the package on the embedded training captions.

`python -m navit_jax.data.text` writes `navit_jax/data/clipart.model`; `--check` trains
it anew and compares; `--measure` prints what vocabularies of other sizes would give.
Seconds, on one core.
"""

import argparse
import io
from importlib import metadata

import numpy as np

from navit_jax import command_line
from navit_jax.data import sources
from navit_jax.data.tokenizer import DEFAULT, Tokenizer, clean
from navit_jax.data.vocabularies import SentencePiece, load_library
from navit_jax.errors import DataError

# Half of these pieces are seen 5 times or more in training; of 4,096 a sixth.
SIZE = 2048


def read_captions(split: str) -> list[str]:
    """The captions of all pictures of a split."""
    source = sources.clipart(split, "none")
    return [clean(c) for i in range(len(source)) for c in source[i].captions]


def train(captions: list[str], size: int) -> bytes:
    """A SentencePiece model of byte pair encoding: of equal captions, equal bytes.

    Upper case is lower case, as in the captions. What they have never shown is spelled
    in bytes, so nothing is unknown. Ids 0 and 1 are padding and end of text, as in T5.
    """
    file = io.BytesIO()
    load_library("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=file,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def measure(sizes: list[int], length: int) -> None:
    """Prints a table of tokens a caption, the mark of the end included."""
    captions = {split: read_captions(split) for split in sources.SPLITS}
    print("| vocabulary | captions | tokens: mean | 95 % | most | truncated | rare |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        vocabulary = SentencePiece(train(captions["train"], size), marks=True)
        whole = Tokenizer(vocabulary, length=1000)
        seen = np.zeros(size, int)
        for caption in captions["train"]:
            np.add.at(seen, whole.encode(caption), 1)
        # Marks, and bytes that only stand in for what is not there, are no pieces.
        rare = (seen[3 + 256 :] < 5).mean()
        for split, texts in captions.items():
            n = np.array([len(whole.encode(text)) for text in texts])
            print(
                f"| {size} | {split} | {n.mean():.2f} | {np.quantile(n, 0.95):.0f} | "
                f"{n.max()} | {(n > length).mean():.1%} | {rare:.0%} |"
            )


def main(argv: list[str] | None = None) -> None:
    """Trains, compares or measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="train and compare")
    parser.add_argument("--measure", action="store_true", help="compare sizes")
    options = parser.parse_args(argv)
    if options.measure:
        measure([1024, 2048, 4096], length=24)
        return
    model = train(read_captions("train"), SIZE)
    if not options.check:
        DEFAULT.write_bytes(model)
    elif model != DEFAULT.read_bytes():
        raise DataError(
            f"the vocabulary differs from {DEFAULT}; this is sentencepiece "
            f"{metadata.version('sentencepiece')}"
        )
    print(f"{'equal: ' * options.check}{DEFAULT}: {SIZE} pieces, {len(model)} bytes")


if __name__ == "__main__":
    with command_line.exit_codes():
        main()
