import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from graft.diffusion.base import DiffusionBase
from graft.diffusion.bench import many, textual_inversion
from graft.diffusion.bench.concepts import Eyes, _Bench
from graft.diffusion.bench.ip_adapter import classifier, followed, write_training
from graft.diffusion.bench.personalization import summary, table
from graft.diffusion.bench.pictures import (
    held_out_pictures,
    nearest_match,
    new_sprites,
    training_pictures,
    write_phone_photos,
    write_pictures,
)
from graft.diffusion.bench.speed import Work, parts
from graft.diffusion.features import Clip, Eye
from graft.studio.errors import InputError
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import render, side_by_side


def test_sprites_are_new_and_pictures_are_not_shared():
    sprites = new_sprites(10)
    assert len(set(sprites)) == 10 and set(sprites) <= set(Atlas.load().new)
    assert sprites == new_sprites(12)[:10]
    train, held = training_pictures(sprites[0]), held_out_pictures(sprites[0])
    assert len(train) == 5 and not {p.tobytes() for p in train} & {p.tobytes() for p in held}


@pytest.mark.slow
def test_folders_hold_what_they_say(tmp_path: Path):
    sprite = new_sprites(1)[0]
    write_pictures(tmp_path / "small", sprite)
    assert (tmp_path / "small" / "1.txt").read_text() == "a photo of {token} on an orange background\n"
    write_phone_photos(tmp_path / "phone", sprite, count=1)
    [photo] = (tmp_path / "phone").iterdir()
    assert Image.open(photo).size == (4000, 3000)


def test_pictures_to_follow_are_known_and_on_another_background_than_asked(tmp_path: Path):
    told = followed(8)
    assert set(told.sprites) <= set(Atlas.load().known) and classifier()(told.pictures).tolist() == told.sprites
    folder = write_training(tmp_path / "train", 3)
    first = (folder / "00001.png").read_bytes()
    assert (write_training(tmp_path / "more", 5) / "00001.png").read_bytes() == first
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(captions) == 3 and all("background" in t or t == "a picture" for t in captions)
    trained = {picture.tobytes() for picture in map(Image.open, sorted(folder.glob("*.png")))}
    assert not trained & {picture.tobytes() for picture in told.pictures}


def test_match_finds_the_sprite_by_its_pixels():
    right, wrong = new_sprites(2)
    picture = training_pictures(right)[0]
    assert nearest_match(picture, right) > 30
    assert nearest_match(picture, wrong) < 20
    shifted = Image.fromarray(np.roll(np.asarray(picture), 1, axis=1))
    assert nearest_match(shifted, right) > 30


def rows(similarity: dict[str, float], background: dict[str, float]) -> list[dict]:
    return [
        {"method": m, "similarity": similarity[m] + d, "recognised": 0.5, "match": 20.0, "background": background[m]}
        for m in similarity
        for d in (-0.01, 0.01)
    ]


def test_promises_are_checked_against_the_base():
    similarity = {"base": 0.4, "nearest known": 0.5, "textual_inversion": 0.56, "lora": 0.6}
    background = {"base": 0.8, "nearest known": 0.8, "textual_inversion": 0.76, "lora": 0.6}
    result = summary(rows(similarity, background))
    verdicts = {name: check["ok"] for name, check in result["checks"].items()}
    assert verdicts == {
        "textual_inversion: rise of similarity": True,
        "textual_inversion: drop of background": True,
        "lora: rise of similarity": False,
        "lora: drop of background": False,
    }
    assert result["checks"]["lora: drop of background"]["value"] == pytest.approx(0.25)
    text = table(result | {"real": {"right sprite": result["means"]["base"]}})
    assert text.count("MISSED") == 2 and "right sprite" in text


def test_the_script_must_be_the_users_own(tmp_path: Path):
    with pytest.raises(InputError, match="there is no such file"):
        textual_inversion(tmp_path, script=str(tmp_path / "none.py"))


def test_parts_of_a_step_are_timed(base: DiffusionBase, folder: Path, photos: Path, tmp_path: Path):
    found = parts(base, {"small pictures": photos}, Work(tmp_path, folder, 8, 10, 2, 1))
    assert set(found) == {"decode small pictures", "VAE encode", "embedding table", "text encoder", "denoiser"}
    assert all(ms > 0 for figures in found.values() for ms in figures.values())


def test_a_command_that_fails_says_why(folder: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('out of luck')")
    work = Work(tmp_path, folder, 8, 10, 2, 1)
    with pytest.raises(InputError, match="out of luck"):
        work.time(work.theirs(script, tmp_path, tmp_path), tmp_path / "cache")


@pytest.mark.slow
def test_many_jobs_together_end_where_they_end_alone(folder: Path, tmp_path: Path):
    result = many(tmp_path, jobs=2, steps=2, base=str(folder))
    for row in result["rows"]:
        assert row["loss"] < 1e-5 and row["predictions"] < 1e-4 and row["wall"] > 0
    assert "textual_inversion" in result["table"] and (tmp_path / "many.json").exists()


@pytest.mark.slow
def test_two_sprites_are_found_where_they_are_and_only_there():
    eyes, (first, second, third) = Eyes(Clip("pocket-clip"), Eye("pocket-vit")), new_sprites(3)
    scenes = [Image.fromarray(render(side_by_side(first, second, colour))) for colour in ("red", "teal", "white")]
    assert eyes.find(scenes, (first, second)) == eyes.find(scenes, (second, first)) == {"both": 1, "one": 1}
    assert eyes.find(scenes, (first, third)) == {"both": 0, "one": 1}


@pytest.mark.slow
def test_trainings_of_the_concept_bench_share_a_batch_and_its_seconds(base: DiffusionBase, tmp_path: Path):
    judge = SimpleNamespace(base=base, near_names=lambda sprite, count: ["red hat"])
    bench = _Bench(judge, None, tmp_path, 2, 2)  # type: ignore[arg-type]
    sprite = Atlas.load().new[0]
    bench.learn("lora", [(sprite, 0), (sprite, 1)])
    runs = [bench.trained("lora", sprite, seed) for seed in (0, 1)]
    assert [run.job.train.seed for run in runs] == [0, 1] and len(runs[0].group) == 2
    assert runs[0].adapter().card.trigger == "sks red hat"
    whole = runs[0].metrics()[-1]["seconds"]
    assert bench.cost(runs[0])["seconds"] == pytest.approx(whole / 2, abs=1e-3)
    bench.learn("lora", [(sprite, 0), (sprite, 1)])
    assert len(list((tmp_path / "runs").iterdir())) == 2
