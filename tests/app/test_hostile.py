"""Hostile input of every kind: refused clearly, the server goes on, nothing is written outside."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import graft
from graft.app import uploads
from graft.app.place import Place
from graft.studio.cli import main
from graft.studio.errors import GraftError, InputError
from graft.studio.job import Job
from graft.studio.runs import create_run

HOST = "127.0.0.1:7860"
PATHS = (
    "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "....//....//etc/passwd", "..\\..\\etc\\passwd",
    "C:\\Windows\\win.ini", "file:///etc/passwd", "~/.ssh/id_rsa", "/proc/self/environ", "a\0b", "．．／etc／passwd",
    "$(touch marker)", "; touch marker", "`touch marker`", "--help", "\u202etxt.exe", "x" * 5000, "\n/etc/passwd",
    "<script>alert(1)</script>", "{{7*7}}", "%s%n", "CON", ".", "..", "",
)  # fmt: skip


class NoModels:
    """In place of the process with the models."""

    def ask(self, what: str, **facts: Any) -> Any:
        raise InputError(what, "there are no models here", "None is needed")


@pytest.fixture
def place(tmp_path: Path, sprite: Path) -> Place:
    place = Place(tmp_path / "in" / "runs", tmp_path / "in" / "data", NoModels())  # type: ignore[arg-type]
    job = Job("pocket-sd", {"name": "lora"}, {"path": "photos"}, "diffusion")
    create_run(job, place.runs / "20260101-a").write_state(status="finished", step=300)
    uploads.add_files(place.data_set(place.new_set()), [sprite])
    return place


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.alone
def test_every_handler_of_every_page_with_every_path(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text that a browser may send is a hostile one, in turn; the handlers are called as any program could."""
    from urllib.parse import quote

    import httpx

    from graft.app.server import make_app

    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    app = make_app(place)
    before = everything(tmp_path / "in")

    async def attack() -> list[tuple[int, str]]:
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=f"http://{HOST}", timeout=60
        )
        calls = (await client.get("/config")).json()["dependencies"]
        assert len(calls) > 25
        answers = []
        for call in calls:
            for path in PATHS:
                hostile: Any = [path, [path], {"path": path, "meta": {"_type": "gradio.FileData"}}]
                for value in hostile if path in PATHS[:3] else hostile[:1]:
                    body = {"data": [value] * len(call["inputs"]), "fn_index": call["id"], "session_hash": "x"}
                    answer = await client.post("/gradio_api/run/predict", json=body)
                    answers.append((answer.status_code, answer.text))
        deep = "[" * 200_000 + "]" * 200_000
        for content in (deep, '{"data": ' + deep + "}", "{", "\0", '{"data": {"a": NaN}}', "9" * 100_000):
            answer = await client.post(
                "/gradio_api/run/predict", content=content, headers={"content-type": "application/json"}
            )
            answers.append((answer.status_code, answer.text))
            assert answer.status_code >= 400
        upload = await client.post(
            "/gradio_api/upload", files={"files": ("../../x.html", b"<script>alert(1)</script>", "text/html")}
        )
        (stored,) = upload.json()
        assert Path(stored).name == "x.html" and ".." not in stored
        shown = await client.get(f"/gradio_api/file={stored}")
        assert shown.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in shown.headers["content-security-policy"]
        for path in PATHS:
            got = await client.get(f"/gradio_api/file={quote(path, safe='/:~')}")
            answers.append((got.status_code, got.text))
            assert got.status_code >= 400 or "No runs" in got.text, path
        assert (await client.get("/")).status_code == 200, "the server goes on"
        return answers

    answers = asyncio.run(attack())
    assert len(answers) > 500
    assert not [text[:200] for _, text in answers if "root:x:0" in text or "Traceback" in text]
    assert {name: data for name, data in everything(tmp_path / "in").items() if name in before} == before
    own = {"runs", "data"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == own, "nothing beside the runs and the data"
    assert not list(tmp_path.rglob("*marker*"))


@pytest.mark.alone
def test_a_live_server_goes_on(studio: Any, tmp_path: Path) -> None:
    """Rebinding, too much JSON, and half a gigabyte of pixels as a layer of the desk's drawing."""
    import httpx

    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    with httpx.Client(base_url=studio.url, timeout=60) as client:
        assert client.get("/", headers={"host": f"evil.example:{studio.port}"}).status_code == 421
        assert client.post("/gradio_api/run/predict", content=b"[" * (5 << 20)).status_code == 413
        assert (
            client.post("/gradio_api/run/predict", json={}, headers={"origin": "http://evil.example"}).status_code
            == 403
        )
        config = client.get("/config").json()
        (canvas,) = (each["id"] for each in config["components"] if each["type"] == "imageeditor")
        (save,) = (each for each in config["dependencies"] if canvas in each["inputs"])
        with (tmp_path / "bomb.png").open("rb") as bomb:
            (stored,) = client.post("/gradio_api/upload", files={"files": ("layer.png", bomb)}).json()
        file = {"path": stored, "meta": {"_type": "gradio.FileData"}}
        drawing = {"background": file, "layers": [file], "composite": file}
        values = {each["id"]: each["props"].get("value") for each in config["components"]}
        data = [drawing if each == canvas else values[each] for each in save["inputs"]]
        answer = client.post(
            "/gradio_api/run/predict", json={"data": data, "fn_index": save["id"], "session_hash": "x"}
        )
        assert answer.status_code >= 400 and "169000000 pixels" in answer.text
        assert client.get("/").status_code == 200
    status = Path(f"/proc/{studio.process.pid}/status").read_text()
    highest = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert highest < 250 * 1024, "it was decoded"


def test_half_a_gigabyte_of_pixels_in_21_kilobytes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 25_000
    began = time.monotonic()
    (told,) = uploads.add_files(folder, [tmp_path / "bomb.png"])
    assert "13,000 x 13,000 pixels" in told
    assert time.monotonic() - began < 0.5, "it was decoded"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.SafeTensors", "adapter.bin", "adapter.pt", "a.png"])
def test_a_pickle_runs_nothing_whatever_its_name(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    file = tmp_path / name
    file.write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(GraftError):
        graft.load_adapter(file)
    assert "not a picture" in uploads.add_files(tmp_path / "set", [file])[0]
    assert not marker.exists()


@pytest.mark.parametrize("name", ["job.yaml", "job.toml"])
@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch marker']",
        "base: pocket-sd\nmethod: {name: lora}\ndata: {path: photos}\n",
        "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]\n",
    ],
)
def test_yaml_is_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    assert main(["train", name]) == 2
    assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


VALID = (
    'base = "pocket-sd"\nname = "x"\n[method]\nname = "lora"\nrank = 8\ntargets = "attention"\n[data]\npath = '
    '"photos"\n'
    "resolution = 64\nvalidation = 0.2\n[train]\nsteps = 5\nlearning_rate = 1e-3\ntrack = []\n[sample]\nevery = 5\n"
    'seeds = [0, 1]\nprompts = ["a {token}"]\n[eval]\nclip = ""\n',
    'base = "pocket-vit"\ndomain = "vision"\n[method]\nname = "vpt"\n[data]\ndataset = "pocket-new"\nshots = 4\n'
    '[train]\nschedule = "cosine"\nbatch_size = 8\noptimiser = "adamw"\n',
)
KEYS = ("rank", "x", "path", "__class__", "a.b", '""')
VALUES = (
    "1e999", "nan", "-inf", "9" * 400, "-1", "0", '"\\u0000"', '"' + "a" * 9000 + '"', "[]", "{}", "[[[[[[1]]]]]]",
    "true", "1979-05-27T07:32:00Z", '"../../etc/passwd"', '"/etc/passwd"', '"$(touch marker)"',
    "0x7fffffffffffffffffff", "''", '{a = {b = {c = 1}}}', '["x", 1, {}]', "07:32:00", '"\\ud800"', "1.5", '"nan"',
    "[" * 3000,
)  # fmt: skip


def mutant(chance: random.Random) -> bytes:
    """A job file that something happened to."""
    text = chance.choice(VALID)
    for _ in range(chance.randint(1, 3)):
        lines = text.splitlines() or [""]
        where = chance.randrange(len(lines))
        key = lines[where].partition("=")[0]
        what = chance.randrange(7)
        if what == 0:
            lines[where] = f"{key}= {chance.choice(VALUES)}"
        elif what == 1:
            lines.insert(where, f"{chance.choice(KEYS)} = {chance.choice(VALUES)}")
        elif what == 2:
            del lines[where]
        elif what == 3:
            lines.insert(where, chance.choice(("[method]", "[train.x]", "[[data]]", "[", "=", "[eval.clip]", "# \0")))
        elif what == 4:
            lines.append(lines[where])
        text = "\n".join(lines)
        if what == 5:
            text = text[: chance.randrange(len(text) + 1)]
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if data and chance.random() < 0.3:
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


@pytest.mark.alone
def test_ten_thousand_broken_job_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a job, or an error of ours that tells the place."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    chance, file = random.Random(20260101), tmp_path / "job.toml"
    refused, sound = 0, 0
    for number in range(10_000):
        data = mutant(chance)
        file.write_bytes(data)
        try:
            job = Job.load(file)
        except InputError as error:
            assert error.given and error.reason and error.remedy
            refused += 1
        except Exception as error:
            raise AssertionError(f"number {number}: {type(error).__name__} {error}: {data[:600]!r}") from error
        else:
            assert job.train.steps >= 1
            sound += 1
    assert refused > 5000 and sound > 500, (refused, sound)
    assert list((tmp_path / "in").iterdir()) == []
