"""The command line on a small diffusion base: the way from pictures to files for others, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from graft.studio.adapter import Adapter
from graft.studio.cli import main
from graft.studio.config import write_toml

Answer = Callable[..., tuple[int, Any]]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs a command with `--json`; returns the exit code and the document."""

    def run(*argv: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*argv, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def job(folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    train = {"steps": 2, "batch_size": 2, "device": "cpu", "threads": 1}
    method = {"name": "lora", "rank": 2, "targets": "all-linear"}
    (tmp_path / "job.toml").write_text(
        write_toml({"base": str(folder), "method": method, "data": {"path": "photos"}, "train": train})
    )
    return "job.toml"


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def empty(photos: Path) -> None:
    shutil.rmtree(photos)
    photos.mkdir()


def truncated(photos: Path) -> None:
    from PIL import Image

    Image.open(photos / "0.png").convert("RGB").resize((200, 200)).save(photos / "bad.jpg")
    data = (photos / "bad.jpg").read_bytes()
    (photos / "bad.jpg").write_bytes(data[: len(data) // 2])


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "photos"),
    "empty folder": (empty, "photos"),
    "text named .png": (lambda photos: (photos / "bad.png").write_text("hello"), "bad.png"),
    "truncated jpeg": (truncated, "bad.jpg"),
    "huge header": (lambda photos: (photos / "bad.png").write_bytes(png_header(60_000, 60_000)), "bad.png"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_pictures_are_told_before_anything_is_written(
    kind: str, answer: Answer, job: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = BAD_DATA[kind]
    spoil(photos)
    code, document = answer("train", job)
    assert code == 2
    assert document["error"]["type"] == "DataError"
    assert named in document["error"]["message"]
    assert document["error"]["remedy"]
    assert not (tmp_path / "runs").exists()


def test_a_download_that_was_cut_short(answer: Answer, job: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "half")
    file = next((tmp_path / "half" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    code, document = answer("train", job, "--set", f"base={tmp_path / 'half'}")
    assert (code, document["error"]["type"]) == (2, "InputError")
    assert "cannot be loaded" in document["error"]["message"]
    assert "fetch it again" in document["error"]["remedy"]
    assert not (tmp_path / "runs").exists()


def test_a_negative_rank_is_told_before_the_base_is_loaded(answer: Answer, job: str) -> None:
    code, document = answer("train", job, "--set", "method.rank=-3", "--set", "base=nowhere")
    assert (code, document["error"]["given"]) == (2, "rank -3")


def test_from_pictures_to_files_for_others(answer: Answer, job: str, folder: Path, tmp_path: Path) -> None:
    code, done = answer("train", job, "--run-dir", "mine")
    assert (code, done["status"]) == (0, "finished")
    assert json.loads((tmp_path / "mine" / "env.json").read_text())["base_hash"]
    assert answer("preview", "mine", "--attention", "xformers")[0] == 2
    code, drawn = answer("preview", "mine", "--seed", "1", "--set", "steps=1", "--out", "pictures")
    assert code == 0
    assert all(Path(path).is_file() for path in drawn["files"])
    code, files = answer("adapters", "convert", "mine", "out", "--to", "diffusers")
    assert code == 0
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(files["files"][0])
    assert pipe.get_active_adapters()
    code, checked = answer("adapters", "verify", "mine")
    assert (code, checked["attaches"], checked["detaches"]) == (0, True, True)


def test_a_merged_base_draws_what_the_attached_adapter_draws(answer: Answer, job: str, tmp_path: Path) -> None:
    answer("train", job, "--run-dir", "mine", "--set", "train.learning_rate=0.1")
    assert answer("adapters", "merge", "mine", "merged")[0] == 0
    from graft import load_adapter, load_base

    def noise(base: Any) -> torch.Tensor:
        x, text = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4), torch.linspace(0, 1, 24 * 16).reshape(1, 24, 16)
        with torch.no_grad():
            return base.denoiser(x, torch.tensor([500]), encoder_hidden_states=text).sample

    base, adapter = (
        load_base(json.loads((tmp_path / "mine" / "env.json").read_text())["base"], "cpu"),
        load_adapter("mine/result"),
    )
    plain = noise(base)
    with adapter.attached(base):
        attached = noise(base)
    merged = noise(load_base("merged", "cpu"))
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, plain, rtol=1e-2, atol=1e-3)


def test_another_base_is_refused_with_both_hashes(answer: Answer, job: str, folder: Path, tmp_path: Path) -> None:
    answer("train", job, "--run-dir", "mine", "--set", "train.learning_rate=0.1")
    answer("adapters", "merge", "mine", "merged")
    for command in (["adapters", "verify", "mine"], ["preview", "mine", "--out", "pictures"]):
        code, document = answer(*command, "--base", "merged")
        error = document["error"]
        assert (code, error["type"]) == (2, "BaseMismatchError")
        hashes = [word for word in error["message"].replace(".", " ").replace(":", " ").split() if len(word) == 64]
        assert len(set(hashes)) == 2
    assert not (tmp_path / "pictures").exists()


def drawn(folder: Path, name: str) -> bytes:
    return Image.open(folder / name).tobytes()


def test_a_preview_is_drawn_from_the_saved_file(answer: Answer, job: str, tmp_path: Path) -> None:
    answer("train", job, "--run-dir", "mine", "--set", "train.learning_rate=0.1")
    options = ["--seed", "1", "--prompt", "a {token}", "--set", "steps=1", "--strengths", "0", "1", "--out"]
    assert answer("preview", "mine", *options, "before")[0] == 0
    adapter = Adapter.load(tmp_path / "mine" / "result")
    Adapter({name: 3 * tensor for name, tensor in adapter.tensors.items()}, adapter.card).save(
        tmp_path / "mine" / "result"
    )
    assert answer("preview", "mine", *options, "after")[0] == 0
    before, after = (
        {kind: drawn(tmp_path / out, f"{kind}-0-seed1.png") for kind in ("without", "with x 0", "with x 1")}
        for out in ("before", "after")
    )
    assert before["without"] == after["without"] == before["with x 0"] == after["with x 0"]
    assert len({before["without"], before["with x 1"], after["with x 1"]}) == 3


@pytest.mark.slow
def test_stacked_adapters_draw_what_diffusers_draws(answer: Answer, job: str, folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        options = ["--set", f"train.seed={seed}", "--set", f"method.trigger={name}{name}"]
        answer("train", job, "--run-dir", name, "--set", "train.learning_rate=0.3", *options)
        answer("adapters", "convert", name, f"out-{name}", "--to", "diffusers")
    options = ["--seed", "1", "--prompt", "{token} on {token2}", "--set", "steps=2", "--out", "pictures"]
    code, told = answer("preview", "a", "b", "--weights", "0.7", "0.5", *options)
    assert (code, told["prompts"]) == (0, ["aa on bb"])
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    for name in ("a", "b"):
        pipe.load_lora_weights(f"out-{name}", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, 0.5])
    stock = pipe(["aa on bb"], negative_prompt=[""], height=8, width=8, num_inference_steps=2, guidance_scale=3.0,
                 generator=[torch.Generator().manual_seed(1)]).images[0]  # fmt: skip
    mine = np.asarray(Image.open(tmp_path / "pictures" / "with-0-seed1.png")).astype(int)
    assert np.abs(mine - np.asarray(stock)).max() <= 2
    without = np.asarray(Image.open(tmp_path / "pictures" / "without-0-seed1.png"))
    assert np.abs(mine - without).max() > 10
    assert answer("preview", "a", "b", "--weights", "0.7", *options)[0] == 2


@pytest.mark.slow
def test_a_run_is_evaluated_on_what_it_held_out(answer: Answer, job: str, photos: Path) -> None:
    settings = ["--set", "data.validation=0.4", "--set", "eval.seeds=1", "--set", "eval.steps=1"]
    assert answer("train", job, "--run-dir", "mine", "--set", "train.validate_every=1", *settings)[0] == 0
    code, figures = answer("eval", "mine", "--set", 'colours=["red"]')
    assert code == 0 and set(figures["adapter"]) == {"background_alignment", "validation_loss"}
    assert answer("eval", "mine", "--set", 'colours=["red"]')[1] == figures
    of_all = answer("eval", "mine", "--set", 'colours=["red"]', "--data", str(photos))[1]
    assert of_all["adapter"]["validation_loss"] != figures["adapter"]["validation_loss"]
