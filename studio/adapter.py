"""Adapters: the trained result as tensors and a card, saved without pickle and refused by the wrong base.

``adapter.safetensors`` holds the tensors and, in its header, the card, so that one rename replaces both;
``adapter.json`` is the card again, for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graft
from graft.studio.config import from_dict
from graft.studio.disk import write_atomic
from graft.studio.errors import BaseMismatchError, FormatError, InputError
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.provenance import modelspec

FORMAT_VERSION = 1
_TENSORS, _CARD = "adapter.safetensors", "adapter.json"


def _versions() -> dict[str, str]:
    return {"graft": graft.__version__, "torch": torch.__version__}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Card:
    """What an adapter is, what it was made from, and how well it did."""

    method: str
    """Name of the method in the registry."""
    config: dict[str, Any]
    """The method's config."""
    domain: str = ""
    """Domain of the base; empty for an adapter read from another library's file."""
    base: str = ""
    """Name of the base."""
    base_hash: str = ""
    """`base_hash` of the base's modules; empty when unknown, then only names and shapes are checked."""
    sites: list[dict[str, Any]] = field(default_factory=list)
    """The plan, as `Plan.to_list` gives it."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured."""
    data_digest: str = ""
    """Digest of the training data."""
    trigger: str | None = None
    """Word or token that calls the concept, if any."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the domain needs to use it, such as the names of its classes."""
    versions: dict[str, str] = field(default_factory=_versions)
    """Versions of the libraries that made it."""
    created: str = field(default_factory=_now)
    """UTC time, ISO 8601."""
    format_version: int = FORMAT_VERSION
    """Version of this file format."""

    def to_json(self) -> str:
        """Returns the card as JSON text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Card:
        """Returns the card that `to_json` wrote.

        Raises:
            FormatError: not JSON, not a card, or of a later format.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FormatError(where, f"the card is not JSON ({error})", "export the adapter again") from error
        found = data.get("format_version", 0) if isinstance(data, dict) else 0
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise FormatError(where, f"format {found}, this version reads {FORMAT_VERSION}", "update graft")
        try:
            return from_dict(cls, data, "card")
        except InputError as error:
            reason = f"this is not the card of an adapter ({error.given}: {error.reason})"
            raise FormatError(where, reason, "export the adapter again") from error


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Example:
        >>> adapter = graft.load_adapter("runs/sprout/result")
        >>> with adapter.attached(base):
        ...     picture = base.pipe("a photo of <sprout>").images[0]
    """

    tensors: dict[str, Tensor]
    """Tensors by name, ``<site>.<tensor>``."""
    card: Card
    """What they are."""

    def save(self, folder: str | Path) -> Path:
        """Writes ``adapter.safetensors`` and ``adapter.json`` and returns the folder."""
        folder = Path(folder)
        header = {"format": "pt", "graft": self.card.to_json(), **modelspec(self.card)}
        write_tensors(folder / _TENSORS, self.tensors, header)
        write_atomic(folder / _CARD, self.card.to_json().encode())
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Reads a folder that `save` wrote, or its ``adapter.safetensors`` alone.

        Raises:
            FormatError: damaged, not an adapter, or the two files do not belong together.
        """
        path = Path(path)
        file = path / _TENSORS if path.is_dir() else path
        tensors, metadata = read_tensors(file)
        if "graft" not in metadata:
            raise FormatError(str(file), "its header holds no card", "use load_adapter for files of other libraries")
        card = Card.from_json(metadata["graft"], str(file))
        beside = file.with_name(_CARD)
        if beside.is_file() and Card.from_json(beside.read_text(encoding="utf-8"), str(beside)) != card:
            raise FormatError(
                str(beside), f"not the card of {file.name} beside it", "delete it: the header holds the card"
            )
        return cls(tensors, card)

    @contextmanager
    def attached(self, base: Any) -> Iterator[Any]:
        """Attaches to a base (or, for adapters of plain models, to the model) and detaches at the end, bit for bit.

        Raises:
            BaseMismatchError: the adapter was trained on another base, or what the base checks itself is not the same.
            SiteError: the base lacks its sites or, for an adapter that names no base, bypasses them.
        """
        if self.card.base_hash:
            found = base_hash({"": base}) if isinstance(base, nn.Module) else base.hash
            if found != self.card.base_hash:
                given = f"adapter for {self.card.base or 'a base'} with hash {self.card.base_hash}"
                name = getattr(base, "name", type(base).__name__)
                raise BaseMismatchError(given, f"{name} has hash {found}", "load the base it was trained on")
        if hasattr(base, "check_card"):
            base.check_card(self.card)
        handle = _method(self.card).attach_to(base, self.tensors, self.card)
        try:
            yield handle
        finally:
            handle.detach()

    def export(self, folder: str | Path, format: str = "native") -> list[Path]:
        """Writes the adapter for another library and returns the files.

        Raises:
            InputError: a format that does not exist or cannot express this adapter.
        """
        if format == "native":
            folder = self.save(folder)
            return [folder / _TENSORS, folder / _CARD]
        paths: list[Path] = _method(self.card).export(self, Path(folder), format)
        return paths


def load_adapter(path: str | Path, head_dim: int | None = None) -> Adapter:
    """Reads an adapter: a native folder or file, or one of peft, diffusers, kohya, loralib or torchtune.

    Args:
        path: folder or file.
        head_dim: width of an attention head of its base, which torchtune's files do not tell.

    Raises:
        FormatError: nothing of these, or damaged.
    """
    from graft.studio.formats import reading

    path = Path(path)
    file = path / _TENSORS if path.is_dir() else path
    native = path.is_dir() and file.is_file() or path.is_file() and "graft" in read_tensors(path)[1]
    return Adapter.load(file) if native else reading.read(path, head_dim)


def base_hash(modules: Mapping[str, nn.Module]) -> str:
    """Returns the sha256 over names, types, shapes and bytes of all parameters and saved buffers."""
    digest = hashlib.sha256()
    for component in sorted(modules):
        for key, whole in sorted(modules[component].state_dict().items()):
            for name, tensor in _plain(key, whole):
                digest.update(f"{component}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, whole if it is shared out over processes, or those that a quantised one consists of."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _method(card: Card) -> Any:
    """The class that attaches and exports adapters of a card's method."""
    from graft.studio import registry

    return registry.method_class(card.domain, card.method) if card.domain else registry.site_method(card.method)
