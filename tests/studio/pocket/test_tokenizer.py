"""The embedded tokenizer in both libraries that read its files."""

import gzip

import numpy as np

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import caption, sample_scene
from graft.studio.pocket.tokenizer import FOLDER, LENGTH, TOKENS, load_tokenizer


def _captions(count: int) -> list[str]:
    rng = np.random.default_rng(9)
    known = Atlas.load().known
    return [caption(sample_scene(rng, known), rng) for _ in range(count)]


def test_captions_fit_and_come_back():
    tokenizer = load_tokenizer()
    assert len(tokenizer) == TOKENS
    texts = _captions(500)
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) <= LENGTH
    plain = [tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in ids]
    assert plain == [text.replace(" ", "") for text in texts]


def test_any_text_has_an_encoding():
    tokenizer = load_tokenizer()
    ids = tokenizer("Zürich 東京 <sprout>").input_ids
    unknown = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert unknown not in ids[:-1]


def test_open_clip_reads_the_same_ids(tmp_path):
    from open_clip.tokenizer import SimpleTokenizer

    packed = tmp_path / "merges.txt.gz"
    packed.write_bytes(gzip.compress((FOLDER / "merges.txt").read_bytes()))
    other = SimpleTokenizer(str(packed), context_length=LENGTH)
    assert other.vocab_size == TOKENS
    texts = _captions(100)
    ours = load_tokenizer()(texts).input_ids
    for row, text in zip(ours, texts, strict=True):
        assert other(text)[0][: len(row)].tolist() == row


def test_saved_folder_loads_with_transformers(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = _captions(50)
    assert again(texts).input_ids == tokenizer(texts).input_ids
    assert again.model_max_length == LENGTH
