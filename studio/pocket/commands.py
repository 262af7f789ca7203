"""What `graft pocket` does: list, export, train, report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.config import suggest
from graft.studio.errors import InputError
from graft.studio.pocket import models

if TYPE_CHECKING:
    from graft.studio.runs import Run

RECIPES: dict[str, dict[str, Any]] = {
    "autoencoder": {"steps": 4000, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 200},
    "clip": {"steps": 3000, "batch_size": 128, "learning_rate": 1e-3, "warmup_steps": 150, "weight_decay": 0.05},
    "vit": {"steps": 8000, "batch_size": 128, "learning_rate": 1e-3, "warmup_steps": 200, "weight_decay": 0.05},
    "unet": {"steps": 6000, "batch_size": 64, "learning_rate": 1.5e-3, "warmup_steps": 200, "weight_decay": 0.01},
    "llava": {"steps": 12000, "batch_size": 32, "learning_rate": 1.5e-3, "warmup_steps": 200, "weight_decay": 0.05},
}
"""The training section of each network."""
ON_GPU: dict[str, dict[str, dict[str, Any]]] = {
    "autoencoder": {"train": {"steps": 5000, "batch_size": 256, "workers": 8}},
    "clip": {"train": {"steps": 3500, "batch_size": 256, "workers": 8}},
    "vit": {"train": {"steps": 5000, "batch_size": 256, "workers": 8}},
    "unet": {
        "train": {"steps": 8500, "batch_size": 512, "learning_rate": 2e-3, "warmup_steps": 500, "workers": 8},
        "method": {"scenes": 40_000, "plain": 0.65, "ema_decay": 0.9995, "compile": True},
    },
    "llava": {"train": {"steps": 4500, "batch_size": 256, "learning_rate": 2e-3, "workers": 8}},
}
"""What is different on a GPU: more pictures in a step, drawn ahead by so many processes, which are what limits it."""


def list_models() -> list[dict[str, Any]]:
    """Return name, networks, size of the committed files in MB, and hash of each embedded model."""
    rows = []
    for name, (networks, _) in models.MODELS.items():
        files = [models.WEIGHTS / f"{network}.safetensors" for network in networks]
        present = all(path.exists() for path in files)
        row = {"name": name, "networks": list(networks), "present": present}
        if present:
            size = sum(path.stat().st_size for path in files) / 1e6
            row |= {"megabytes": round(size, 1), "hash": models.weights_hash(name)}
        rows.append(row)
    return rows


def export(name: str, folder: str | Path) -> Path:
    """Write an embedded model as a standard folder of its library."""
    return models.export(name, Path(folder))


def train(
    network: str, run_dir: str | Path | None = None, steps: int | None = None, overrides: Sequence[str] = ()
) -> Run:
    """Train one network, or go on with its run, and put the weights into the package when it has finished.

    Args:
        network: one of `RECIPES`.
        run_dir: the run's folder; one that exists is resumed.
        steps: instead of the recipe's.
        overrides: of the job, as `graft train --set`.

    Raises:
        InputError: no such network.
    """
    from graft.studio import registry
    from graft.studio.job import Job
    from graft.studio.training import resume
    from graft.studio.training import train as train_job

    if network not in RECIPES:
        raise InputError(f"network {network!r}", "there is no such network", suggest(network, RECIPES))
    if run_dir is not None and (Path(run_dir) / "job.toml").exists():
        run = resume(run_dir)
    else:
        job = Job.load(recipe(network, "cpu", steps), overrides)
        device = job.train.device or registry.default_device()
        run = train_job(Job.load(recipe(network, device, steps), overrides), run_dir)
    if run.status == "finished":
        install(run)
    return run


def recipe(network: str, device: str, steps: int | None = None) -> dict[str, Any]:
    """Return the job of one network on a device, as a mapping; `steps` instead of the usual number."""
    other = ON_GPU.get(network, {}) if device.startswith("cuda") else {}
    section = {"schedule": "cosine", "log_every": 50}
    section |= RECIPES[network] | other.get("train", {}) | ({"steps": steps} if steps else {})
    method = {"name": network, **other.get("method", {})}
    return {"base": "", "domain": "pocket", "method": method, "data": {}, "train": section}


def install(run: Run) -> Path:
    """Put a finished run's network into the package."""
    adapter = run.adapter()
    method = run.job.method
    went_on = any(method.get(key) for key in ("go_on", "freeze_text", "decoder_only"))
    return install_network(adapter.card.method, adapter.tensors, adapter.card.metrics, went_on)


def install_network(network: str, tensors: dict[str, Any], metrics: dict[str, Any], went_on: bool = False) -> Path:
    """Write a network's tensors and the facts of its trainings into the package.

    Args:
        network: one of `RECIPES`.
        tensors: its weights.
        metrics: what the run tells: steps, seconds, loss.
        went_on: it started from the committed weights, so their trainings count, too.
    """
    training = {"hardware": _processor(), "date": datetime.now(UTC).date().isoformat(), **metrics}
    facts: dict[str, Any] = {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "trainings": [*(models.facts(network)["trainings"] if went_on else []), training],
    }
    if network == "autoencoder":
        facts["scaling_factor"] = _scaling_factor(tensors)
    return models.write_weights(network, tensors, facts)


def _scaling_factor(tensors: dict[str, Any]) -> float:
    """Return one over the standard deviation of latents of random scenes."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    from graft.studio.pocket.atlas import Atlas
    from graft.studio.pocket.pretrain.autoencoder import CONFIG
    from graft.studio.pocket.pretrain.draw import pictures
    from graft.studio.pocket.scenes import sample_scene

    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(tensors)
    rng = np.random.default_rng(0)
    scenes = pictures([sample_scene(rng, Atlas.load().known) for _ in range(512)])
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in scenes.split(64)])
    return round(float(1 / latents.std()), 4)


def _processor() -> str:
    """Return the accelerator's name, or the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return f"{len(names)} x {names[0].split(':')[1].strip()}" if names else platform.processor() or platform.machine()


def report(out: str | Path = "docs", seeds: int = 4) -> dict[str, Any]:
    """Measure the models and write `pocket_models.md` and its pictures.

    Raises:
        InputError: less than one seed.
    """
    from graft.studio.pocket.report import report

    if seeds < 1:
        raise InputError(f"--seeds {seeds}", "at least one seed is needed", "Give 1 or more")
    return json.loads(json.dumps(report(out, seeds)))
