"""How the embedded models were trained: one file each, as jobs of a domain of their own.

    graft pocket train autoencoder        # then clip, then unet: each needs the one before; llava needs clip
    graft pocket train unet --steps 20000 --set train.device=cuda --set train.workers=14
    graft pocket train unet --set method.go_on=true        # better weights from the committed ones
    graft pocket train unet --steps 1500 --set method.go_on=true --set method.variant_share=0.5   # last: new words
    graft pocket train unet --set method.go_on=true --set method.pairs=0.5 --set method.plain=0.3   # two things
    graft pocket train autoencoder --set method.decoder_only=true
    graft pocket train clip --set method.freeze_text=true --set method.bank=900

They are ordinary runs: with checkpoints, resumable, with a log and a curve. `graft pocket train` puts the weights into
the package when the run has finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.job import Job


@dataclass(frozen=True)
class DataConfig:
    """Nothing to choose: the data are scenes of known sprites, drawn while training."""


def prepare(job: Job, run_folder: Path | None = None) -> Any:
    """Return the task of one network.

    Raises:
        InputError: wrong settings.
    """
    from graft.studio import registry
    from graft.studio.config import from_dict, require

    attention = job.train.attention
    require("train.attention", attention, attention == "auto", '"auto": these trainings choose by themselves')
    section = {key: value for key, value in job.method.items() if key != "name"}
    return from_dict(registry.method_class("pocket", str(job.method["name"])), section, "method").task(job.train)


def network_adapter(network: Any, name: str, metrics: dict[str, Any]) -> Adapter:
    """Return a whole network as the result of a run."""
    from graft.studio.adapter import Adapter, Card

    tensors = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    return Adapter(tensors, Card(method=name, config={}, domain="pocket", metrics=metrics))


def load_base(name: str, **_: Any) -> Any:
    """Refuse: these trainings start from nothing.

    Raises:
        InputError: always.
    """
    raise InputError(name, "pretraining has no base", "Use the diffusion domain to run pocket-sd")
