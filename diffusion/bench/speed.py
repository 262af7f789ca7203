"""Textual Inversion against the public diffusers example script: same base, pictures, steps, batch size and machine.

The script (`examples/textual_inversion/textual_inversion.py` of the diffusers repository, Apache-2.0) is not part of
this package: `script` is the path of the user's own copy. Every run is a fresh process, from start to saved embedding;
rounds alternate; wall and CPU seconds are medians. Then the parts of a step are timed one by one, to say where the gain
is from.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.pictures import held_out_pictures, new_sprites, write_phone_photos, write_pictures
from graft.diffusion.data import DataConfig, load_pixels
from graft.diffusion.features import Clip
from graft.diffusion.measures import image_similarity
from graft.diffusion.precision import narrow
from graft.diffusion.previews import PreviewConfig, draw
from graft.diffusion.textual_inversion import TextualInversion
from graft.studio.adapter import Adapter, Card
from graft.studio.disk import write_atomic
from graft.studio.errors import InputError
from graft.studio.runs.folder import open_run

PRECISIONS = {"default": "auto", "float32": "no"}
"""Our sides: `train.mixed_precision` as it comes, and as the script's."""
LIMITS = {"phone photos": 3.0, "small pictures": 1.5}
"""How many times faster a run promises to be."""
TOKEN, START, RATE = "<sprout>", "picture", 5e-3


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    out: Path
    """Folder of everything written."""
    base: Path
    """Diffusers folder."""
    side: int
    """Resolution in pixels."""
    steps: int
    """Training steps."""
    batch_size: int
    """Rows per step."""
    threads: int
    """CPU threads of either side."""

    def time(self, command: list[str], cache: Path) -> dict[str, float]:
        """Runs a command to its end: wall and CPU seconds."""
        settings = {"OMP_NUM_THREADS": str(self.threads), "GRAFT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        environment = os.environ | settings
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        if done.returncode:
            raise InputError(" ".join(command[:2]), f"it failed:\n{done.stderr[-2000:]}", "Run it by hand")
        return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}

    def theirs(self, script: Path, pictures: Path, out: Path) -> list[str]:
        """Command line of the script; what is not named has its default."""
        options = {
            "pretrained_model_name_or_path": self.base, "train_data_dir": pictures, "output_dir": out,
            "placeholder_token": TOKEN, "initializer_token": START, "resolution": self.side,
            "train_batch_size": self.batch_size, "max_train_steps": self.steps, "learning_rate": RATE,
            "lr_warmup_steps": 0, "seed": 0,
        }  # fmt: skip
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, str(script), *flags, "--center_crop"]

    def ours(self, pictures: Path, out: Path, precision: str) -> list[str]:
        """Command line of the same training with graft."""
        settings = {
            "base": str(self.base), "method.name": "textual_inversion", "method.token": TOKEN, "method.vectors": 1,
            "method.initializer": START, "data.path": str(pictures), "data.resolution": self.side,
            "train.steps": self.steps, "train.batch_size": self.batch_size, "train.learning_rate": RATE,
            "train.threads": self.threads, "train.mixed_precision": precision, "train.device": "cpu",
        }  # fmt: skip
        program = "import json, sys, graft; graft.train(json.loads(sys.argv[1]), run_dir=sys.argv[2])"
        job: dict[str, Any] = {}
        for name, value in settings.items():
            section, _, key = name.rpartition(".")
            (job.setdefault(section, {}) if section else job)[key] = value
        return [sys.executable, "-c", program, json.dumps(job), str(out)]


def textual_inversion(
    out: Path | None = None,
    script: str = "",
    base: str = "pocket-sd",
    steps: int = 300,
    batch_size: int = 4,
    rounds: int = 3,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures and returns the table.

    Args:
        out: folder for pictures, runs and `textual-inversion.json`; None takes `runs/textual-inversion`.
        script: path of the user's copy of the diffusers example.
        base: a base that knows the embedded world, or a diffusers folder.
        steps: of each training.
        batch_size: of each training.
        rounds: timed runs of each side.
        threads: CPU threads of each side.

    Raises:
        InputError: no such script, or it failed.
    """
    if not Path(script).is_file():
        remedy = "Give the path of your copy of examples/textual_inversion/textual_inversion.py from diffusers"
        raise InputError(f"script = {script!r}", "there is no such file", remedy)
    out = Path(out or "runs/textual-inversion").resolve()
    loaded, sprite = load_base(base, "cpu"), new_sprites(1)[0]
    folder = _exported(loaded, out)
    work = Work(out, folder, loaded.resolution, steps, batch_size, threads)
    kinds = {
        "small pictures": write_pictures(out / "small", sprite, captions=False),
        "phone photos": write_phone_photos(out / "phone", sprite),
    }
    result: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "threads": threads, "kinds": {}}
    for name, pictures in kinds.items():
        result["kinds"][name] = _compared(work, Path(script), name, pictures, rounds)
    judged = {
        side: _similarity(loaded, out / f"{side}-small pictures-0", sprite, side != "script")
        for side in ("script", *PRECISIONS)
    }
    result["default"] = open_run(out / "default-small pictures-0").job.train.mixed_precision
    result |= {"similarity": judged, "parts": parts(loaded, kinds, work)}
    write_atomic(out / "textual-inversion.json", (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": table(result)}


def _exported(base: DiffusionBase, out: Path) -> Path:
    folder = out / "base"
    if not folder.exists():
        base.pipe.save_pretrained(folder)
    return folder


def _compared(work: Work, script: Path, name: str, pictures: Path, rounds: int) -> dict[str, Any]:
    """Alternating runs of the script and ours in the default type and in float32, each with an empty cache."""
    seconds: dict[str, list[dict[str, float]]] = {"script": [], **{side: [] for side in PRECISIONS}}
    for i in range(rounds):
        for side in seconds:
            where, cache = work.out / f"{side}-{name}-{i}", work.out / f"cache-{side}-{name}-{i}"
            ours = side in PRECISIONS
            command = work.ours(pictures, where, PRECISIONS[side]) if ours else work.theirs(script, pictures, where)
            seconds[side].append(work.time(command, cache))
    medians = {side: {k: median(t[k] for t in times) for k in ("wall", "cpu")} for side, times in seconds.items()}
    ratios = {side: {k: medians["script"][k] / medians[side][k] for k in ("wall", "cpu")} for side in PRECISIONS}
    return {"seconds": medians, "ratios": ratios, "limit": LIMITS[name]}


def _similarity(base: DiffusionBase, folder: Path, sprite: int, native: bool) -> float:
    """CLIP similarity of what a trained embedding draws to held-out pictures."""
    if native:
        adapter = Adapter.load(folder / "result")
    else:
        rows = load_file(folder / "learned_embeds.safetensors")[TOKEN]
        adapter = Adapter({"embedding": rows}, Card("textual_inversion", {"token": TOKEN, "vectors": 1}, "diffusion"))
    clip = Clip("pocket-clip")
    with adapter.attached(base):
        drawn: list[Image.Image] = sum(draw(base, [f"a photo of {TOKEN}"], range(16), PreviewConfig()), [])
    return image_similarity(clip.images(drawn), clip.images(held_out_pictures(sprite)))


def parts(base: DiffusionBase, kinds: dict[str, Path], work: Work) -> dict[str, dict[str, float]]:
    """CPU milliseconds per step of every part that differs, theirs and ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    b, side = work.batch_size, work.side
    found: dict[str, dict[str, float]] = {}
    for name, folder in kinds.items():
        file = next(iter(sorted(p for p in folder.iterdir() if p.suffix != ".txt")))
        full = _milliseconds(partial(_decode_whole, file, side))
        once = _milliseconds(partial(load_pixels, file.read_bytes(), side, DataConfig(path="")))
        found[f"decode {name}"] = {"script": full * b, "ours": once * 5 / work.steps}
    pixels = torch.zeros(b, 3, side, side, dtype=torch.uint8)
    encode = _milliseconds(lambda: base.posterior(pixels))
    found["VAE encode"] = {"script": encode, "ours": encode / b * 5 / work.steps}
    found["embedding table"] = _table_milliseconds(base)
    found["text encoder"] = _text_milliseconds(base, b)
    wide = _milliseconds(lambda: _denoise_step(base, b))
    narrow(base, "bf16")
    found["denoiser"] = {
        "script": wide,
        "ours": wide,
        "ours in bfloat16": _milliseconds(lambda: _denoise_step(base, b)),
    }
    torch.set_num_threads(before)
    return found


def _decode_whole(file: Path, side: int) -> Image.Image:
    return Image.open(file).convert("RGB").resize((side, side))


def _milliseconds(run: Callable[[], Any], rounds: int = 7) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return median(times) * 1000


def _text_milliseconds(base: DiffusionBase, b: int) -> dict[str, float]:
    """Forward and backward of the text encoder: one prompt per row, against one per step."""
    handle = TextualInversion(token=TOKEN, vectors=1).attach(base)
    ids = base.tokenize([f"a photo of {TOKEN}"])
    script, ours = (_milliseconds(partial(_text_step, base, ids.expand(n, -1))) for n in (b, 1))
    handle.detach()
    return {"script": script, "ours": ours}


def _text_step(base: DiffusionBase, ids: torch.Tensor) -> None:
    base.encode(ids).sum().backward()


def _denoise_step(base: DiffusionBase, b: int) -> None:
    config, dtype = base.denoiser.config, base.dtype
    noisy = torch.randn(b, config.in_channels, config.sample_size, config.sample_size, dtype=dtype)
    text = torch.randn(b, base.tokenizer.model_max_length, config.cross_attention_dim, dtype=dtype, requires_grad=True)
    base.denoiser(noisy, torch.arange(b), encoder_hidden_states=text).sample.float().sum().backward()


def _table_milliseconds(base: DiffusionBase) -> dict[str, float]:
    """AdamW and restoring of the whole table, against AdamW of one row."""
    weight = base.pipe.text_encoder.get_input_embeddings().weight.detach().clone()

    def step(rows: int, restore: bool) -> float:
        table = nn.Parameter(weight[:rows].clone())
        optimizer, kept = torch.optim.AdamW([table]), table.detach().clone()
        table.grad = torch.randn_like(table)
        mask = torch.arange(rows) < rows - 1

        def run() -> None:
            optimizer.step()
            if restore:
                with torch.no_grad():
                    table[mask] = kept[mask]

        return _milliseconds(run)

    return {"script": step(len(weight), True), "ours": step(1, False)}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    work = f"{result['steps']} steps, batch {result['batch_size']}, {result['threads']} thread(s)"
    lines = [f"{work}; the default is train.mixed_precision = {result['default']!r} here", ""]
    for name, kind in result["kinds"].items():
        for side, seconds in kind["seconds"].items():
            ratio = kind["ratios"].get(side)
            faster = f"  {ratio['wall']:.2f} x wall, {ratio['cpu']:.2f} x CPU" if ratio else ""
            lines.append(f"{name:16} {side:10} {seconds['wall']:8.1f} s wall {seconds['cpu']:8.1f} s CPU{faster}")
        lines.append(f"{name:16} promised {kind['limit']:.1f} x")
    lines += ["", *(f"similarity {side:10} {value:.3f}" for side, value in result["similarity"].items()), ""]
    for name, figures in result["parts"].items():
        lines.append(f"{name:24}" + "  ".join(f"{side} {ms:8.2f} ms" for side, ms in figures.items()) + "  per step")
    return "\n".join(lines)
