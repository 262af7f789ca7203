import os
from pathlib import Path

import pytest
import torch

from graft.studio.caches import Cache, content_key, default_root
from graft.studio.errors import DiskFullError


def value() -> dict[str, torch.Tensor]:
    return {"mean": torch.arange(6.0).view(2, 3), "std": torch.ones(2, dtype=torch.bfloat16)}


def test_an_entry_is_built_once(tmp_path: Path):
    key = content_key("picture", "vae")
    first, second = Cache(tmp_path), Cache(tmp_path)
    built = first.get("latents", key, value)
    found = second.get("latents", key, lambda: pytest.fail("built twice"))
    assert all(torch.equal(built[name], found[name]) for name in value())
    assert (str(first), str(second)) == ("latents 0 hits, 1 miss", "latents 1 hit, 0 misses")


def test_keys_differ_when_anything_differs():
    keys = {content_key(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", None), ("a", ["b"]), ("ä", "b")]}
    assert len(keys) == 5


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage):
    cache, key = Cache(tmp_path), content_key("x")
    cache.get("text", key, value)
    file = cache.path("text", key)
    file.write_bytes(damage(file.read_bytes()))
    again = cache.get("text", key, value)
    assert torch.equal(again["mean"], value()["mean"])
    assert "1 damaged and rebuilt" in str(cache)
    assert Cache(tmp_path).peek("text", key) is not None


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space") as error:
        Cache(tmp_path).get("text", content_key("x"), value)
    assert error.value.exit_code == 2
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "here"))
    assert default_root() == tmp_path / "here"
    monkeypatch.delenv("GRAFT_CACHE")
    assert default_root() == Path.home() / ".cache" / "graft"


def test_a_root_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    assert torch.equal(cache.get("text", content_key("x"), value)["mean"], value()["mean"])
    assert "nothing is cached" in caplog.text
