"""`graft data caption` with small random models of the true classes, and with pocket-llava."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from graft.diffusion.captioner import Captioner, write_captions
from graft.diffusion.data import DataConfig, load_dataset
from graft.studio.caches import Cache
from graft.studio.cli import main
from graft.studio.errors import DataError, InputError

WORDS = ["a", "red", "cat", "on", "the", "mat", "photo", "of", "dog", "toy"]


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP as a folder of transformers."""
    path = tmp_path_factory.mktemp("blip")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "[DEC]", "[ENC]"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
    text = {
        "vocab_size": len(vocab), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "projection_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        "bos_token_id": vocab.index("[DEC]"), "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(2)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(path)
    size = {"height": 16, "width": 16}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(path)
    return path


def test_a_caption_is_what_the_model_generates(blip: Path, photos: Path):
    picture = Image.open(photos / "0.png").convert("RGB")
    caption = Captioner(str(blip), "cpu", max_tokens=6)(picture)
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = BlipProcessor.from_pretrained(blip)
    ids = model.generate(**processor(images=picture, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert caption == " ".join(processor.decode(ids[0], skip_special_tokens=True).split()) != ""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["data", "caption", *argv, "--device", "cpu", "--max-tokens", "4", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_captions_are_written_beside_pictures_and_never_over_others(
    blip: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "1.txt").write_text("mine")
    (photos / "2.caption").write_text("mine too")
    (photos / "3.txt").write_text("\n")
    code, document = run(capsys, str(photos), "--model", str(blip), "--prefix", "sks dog, ")
    assert code == 0 and (document["written"], document["kept"]) == (3, 2)
    assert (photos / "1.txt").read_text() == "mine" and not (photos / "2.txt").exists()
    texts = [(photos / f"{i}.txt").read_text("utf-8") for i in (0, 3, 4)]
    assert all(text.startswith("sks dog, ") and text.endswith("\n") for text in texts)
    assert [row["caption"] for row in document["pictures"]][1:3] == ["mine", "mine too"]
    assert sorted(p.name for p in photos.iterdir() if p.suffix not in (".png", ".txt", ".caption")) == []
    captions = [picture.caption for picture in load_dataset(DataConfig(path=str(photos)), 16, Cache()).pictures]
    assert captions == [row["caption"] for row in document["pictures"]]
    assert run(capsys, str(photos), "--model", "not/asked-for")[1]["written"] == 0
    code, document = run(capsys, str(photos), "--model", str(blip), "--overwrite")
    assert document["written"] == 5 and (photos / "1.txt").read_text() != "mine"


def test_what_is_no_captioner_is_refused(photos: Path, tmp_path: Path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(InputError, match="clip_text_model is no model that captions pictures"):
        write_captions(photos, str(tmp_path / "clip"), {}, device="cpu")
    with pytest.raises(InputError, match="no captioner can be loaded from it"):
        write_captions(photos, str(tmp_path), {}, device="cpu")
    assert not list(photos.glob("*.txt"))


def test_a_picture_that_cannot_be_read_is_named(blip: Path, photos: Path):
    (photos / "1.png").write_text("dear reader")
    with pytest.raises(DataError, match=r"1\.png: not a picture.*captions so far are written"):
        write_captions(photos, str(blip), {"max_tokens": 4}, device="cpu")
    assert [path.name for path in photos.glob("*.txt")] == ["0.txt"]


@pytest.mark.slow
def test_a_model_of_conversations_is_asked(tmp_path: Path):
    captioner = Captioner("pocket-llava", "cpu", "what is this ?", 16)
    picture = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    from graft.studio.pocket.qa import answer

    expected = answer(captioner.model, captioner.processor, [np.asarray(picture)], ["what is this ?"])
    assert captioner(picture) == expected[0]
