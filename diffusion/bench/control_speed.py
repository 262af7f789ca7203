"""A step of ControlNet beside what the public example scripts do in one. See `script_loop` for how.

Ours has convolutions with the channels last, too. The share of what can be kept is that of the base:
`stable-diffusion-1` is a base of random weights with the shape of Stable Diffusion 1.5 (Rombach et al., 2022,
arXiv:2112.10752) at `width` times its channels, and so with its shares of work; `pocket-sd` has a smaller autoencoder
and needs more for the map.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.control import scenes
from graft.diffusion.bench.script_loop import RANDOM, OurLoop, ScriptLoop, alternated, on_bases
from graft.diffusion.conditions import canny
from graft.diffusion.jobs import ConceptTask, prepare
from graft.studio.job import Job

LIMIT = 1.4
"""How many times faster a step promises to be, on the first of the bases."""


class PlainControlNet(ScriptLoop):
    """The script of ControlNet, which opens maps as well.

    Args:
        task: ours.
        base: the same base, loaded anew.
        maps: folder of maps, under the names of the pictures.
        rate: learning rate.
    """

    def __init__(self, task: ConceptTask, base: DiffusionBase, maps: Path, rate: float):
        from diffusers import ControlNetModel

        pictures = task.subjects[0].dataset.pictures
        super().__init__(
            task, base, [[picture.caption or "" for picture in pictures]], [[picture.path for picture in pictures]]
        )
        self.maps = maps
        self.network = ControlNetModel.from_config(task.handle.details["controlnet"]).train()
        self.network.load_state_dict(task.bank.state_dict())
        parameters = list(self.network.parameters())
        self.train(parameters, parameters, rate)

    def denoise(self, noisy: Tensor, levels: Tensor, text: Tensor, paths: Sequence[Path]) -> Tensor:
        """The denoiser's prediction behind that of the ControlNet."""
        self.lap("denoiser")
        maps = self.opened([self.maps / path.name for path in paths])
        self.lap("files or caches")
        down, mid = self.network(noisy, levels, text, maps / 255, return_dict=False)
        self.lap("ControlNet")
        led = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.base.pipe.unet(noisy, levels, text, **led).sample  # type: ignore[no-any-return]


def controlnet(
    out: Path | None = None,
    bases: tuple[str, ...] = (RANDOM, "pocket-sd"),
    rounds: int = 5,
    width: float = 0.5,
    side: int = 256,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures and returns the table.

    Args:
        out: folder for pictures, bases and `controlnet.json`; None takes `runs/controlnet`.
        bases: `stable-diffusion-1`, of random weights, or any other base.
        rounds: timed steps of each loop, which alternate.
        width: channels of `stable-diffusion-1`, as a share of the true one's.
        side: pixels of its pictures.
        threads: CPU threads.
    """
    out = Path(out or "runs/controlnet").resolve()

    def measure(name: str, loaded: str, made: bool) -> dict[str, Any]:
        return {name: compared(out / name, loaded, 2 if made else 16, rounds)}

    return on_bases(out / "controlnet.json", bases, (width, side), threads, LIMIT, measure)


def compared(out: Path, base: str, batch_size: int, rounds: int, count: int = 8) -> dict[str, Any]:
    """Steps of both loops on one base, in turn; the first of each is not timed."""
    rate, loaded = 1e-4, load_base(base, "cpu")
    pictures = write_pairs(out, loaded.side(), count)
    train = {"batch_size": batch_size, "device": "cpu", "mixed_precision": "no"}
    start = time.process_time()
    task = prepare(Job.load({"base": base, "method": {"name": "controlnet"}, "data": {"path": str(pictures)},
                             "train": train}))  # fmt: skip
    once = time.process_time() - start
    theirs, ours = PlainControlNet(task, loaded, out / "maps", rate), OurLoop(task, rate, {"ControlNet": task.bank})
    return {"batch_size": batch_size, "prepared in": once} | alternated(task, theirs, ours, rounds)


def write_pairs(out: Path, side: int, count: int) -> Path:
    """Writes scenes of a side as a data folder, and their edges into `maps`."""
    for name in ("pictures", "maps"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for k, (pixels, text) in enumerate(scenes(count, seed=2)):
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(out / "pictures" / f"{k}.png")
        (out / "pictures" / f"{k}.txt").write_text(text, encoding="utf-8")
        Image.fromarray(canny(np.asarray(picture))).save(out / "maps" / f"{k}.png")
    return out / "pictures"
