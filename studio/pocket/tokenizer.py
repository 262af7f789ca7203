"""The tokenizer of the embedded models: byte-level BPE in CLIP's format, learnt from the world's own captions.

`python -m graft.studio.pocket.tokenizer` learns it again. Only known names are in the text it learns from; any other
word is spelt from byte pieces, so every prompt has an encoding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import COLOURS, OPENINGS, TEXTURES, UNSEEN_OPENING, caption, sample_scene

if TYPE_CHECKING:
    from tokenizers import models
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "weights" / "tokenizer"
LENGTH = 32
"""Tokens in a padded prompt, start and end included."""
TOKENS = 2048
"""Size of the vocabulary."""
QUESTION_WORDS = (
    "what", "is", "colour", "which", "tell", "pattern", "has", "plain", "how", "many", "things", "are", "there",
    "count", "number", "does", "show", "find", "this", "name", "thing", "size", "where", "side", "seen", "from", "two",
    "three", "yes", "middle",
)  # fmt: skip
"""Words of questions and answers that no caption has. Their order gives ids: trained weights depend on it."""


def load_tokenizer() -> CLIPTokenizer:
    """Return the committed tokenizer."""
    from transformers import CLIPTokenizer

    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    lines = (FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def load_llava_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `pocket-llava`: the same vocabulary, then question words and marks.

    It cuts text at white space and around "?", "!" and ",", so that what it decodes is what was encoded, but for upper
    case and the amount of white space; CLIP's tokenizer does not give a hyphenated name back as it was.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    clip = load_tokenizer()
    vocab = clip.get_vocab()
    lines = (FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    for word in QUESTION_WORDS:
        pieces = [piece.value for piece in _bpe(vocab, merges).tokenize(word)]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocab.setdefault(pieces[0], len(vocab))
    tokenizer = Tokenizer(_bpe(vocab, merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\s?!,]+|[?!,]"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # the end of a word is a space, and Ġ is the byte alphabet's space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("</w>", "Ġ"), decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]
    )
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in ("<pad>", "<image>", "<assistant>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "assistant_token": "<assistant>"},
        padding_side="left",  # for generation
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> models.BPE:
    from tokenizers import models

    return models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")


def build(captions: int = 60_000, seed: int = 3) -> None:
    """Learn the merges and write `vocab.json` and `merges.txt`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    word = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own pattern
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = _byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(_text(captions, seed), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt]
    pairs = pairs[: TOKENS - 2 - 2 * len(alphabet)]
    # CLIP's order: bytes, bytes that end a word, merges, the two marks
    tokens = [*alphabet, *(b + "</w>" for b in alphabet), *("".join(pair) for pair in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(tokens)}
    (FOLDER / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in pairs)
    # no line break at the end: open_clip would read an empty merge and count one token too many
    (FOLDER / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


def _text(captions: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    atlas = Atlas.load()
    text = [caption(sample_scene(rng, atlas.known), rng) for _ in range(captions)]
    names = [atlas.names[i] for i in atlas.known]
    words = [*COLOURS, *TEXTURES, *(o.format("", bare="") for o in (*OPENINGS, UNSEEN_OPENING))]
    return text + (names + words) * 60


def _byte_alphabet() -> list[str]:
    """Return the 256 printable stand-ins of bytes in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + k) for k in range(len(rest))]


if __name__ == "__main__":
    build()
