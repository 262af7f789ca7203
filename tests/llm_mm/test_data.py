"""Formats found by themselves, complaints with the row's number and a right row, shares that keep pictures apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.formats import EXAMPLES, detected
from graft.studio.errors import DataError, InputError


def saved(rows: Any, tmp_path: Path, name: str = "data.json") -> DataConfig:
    (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return DataConfig(path=str(tmp_path / name), validation=0, test=0)


@pytest.mark.parametrize("format", EXAMPLES)
def test_the_examples_of_all_formats_are_right(format: str, photos: Callable[[str], Path], tmp_path: Path):
    photos("cat.png")
    row = json.loads(EXAMPLES[format])
    assert detected(row) == format
    (found,) = read_rows(saved([row], tmp_path)).train
    assert found.answers == ("A cat.",) and found.pictures == (str((tmp_path / "cat.png").resolve()),)
    assert found.turns[0].parts == (0, "What is this?")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image": "dog.png", "question": "a", "answer": "b"}, "row 2: there is no dog.png"),
    "outside": ({"image": "../x.png", "question": "a", "answer": "b"}, r"row 2: \.\./x.png lies outside"),
    "network": (
        {"image": "https://x/y.png", "question": "a", "answer": "b"},
        "row 2: https://x/y.png is on the network",
    ),
    "written out": (
        {"image": "data:image/png;base64,AAAA", "question": "a", "answer": "b"},
        "row 2: data:image/png;base64,AAAA... is a picture itself; save it as a file",
    ),
    "no answer": ({"question": "a", "answer": " "}, "row 2: 'answer' is empty"),
    "who": ({"conversations": [{"from": "me", "value": "a"}]}, "row 2: 'me' is nobody who speaks"),
    "value": ({"conversations": [{"from": "human", "text": "a"}]}, "row 2: turn 1 has no 'value'"),
    "order": (
        {"conversations": [{"from": "human", "value": "a"}]},
        "row 2: the sides speak as user; they must take turns",
    ),
    "count": (
        {
            "image": "cat.png",
            "conversations": [{"from": "human", "value": "<image><image> a"}, {"from": "gpt", "value": "b"}],
        },
        "row 2: <image> stands 2 times in it, and it names 1 pictures",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "row 2: a part is .* neither text nor image",
    ),
    "split": ({"question": "a", "answer": "b", "split": "dev"}, "row 2: split 'dev' is none of"),
    "choices": ({"question": "a", "answer": "b", "choices": 5}, "row 2: its choices are 5, no list"),
    "answer of choices": (
        {"question": "a", "answer": "b", "choices": ["c", "d"]},
        "row 2: its answer 'b' is none of its choices c, d",
    ),
    "input": ({"instruction": "a", "input": 5, "output": "b"}, "row 2: 'input' is 5, not text"),
    "history": (
        {"instruction": "a", "output": "b", "history": [["x"]]},
        "row 2: 'history' is .*, no list of",
    ),
    "content": (
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "b"}]},
        "row 2: the user's words are 5, neither text nor parts",
    ),
    "role": (
        {"messages": [{"role": ["user"], "content": [{"type": "text", "text": "a"}]}]},
        r"row 2: \['user'\] is nobody who speaks",
    ),
    "name": ({"image": "a\0b", "question": "a", "answer": "b"}, "row 2: .* is no name of a file"),
    "long name": ({"image": "a" * 5000, "question": "a", "answer": "b"}, "row 2: .* is no name of a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_the_row_and_a_right_one(case: str, photos: Callable[[str], Path], tmp_path: Path):
    row, message = WRONG[case]
    photos("cat.png")
    format = detected(row)
    good = json.loads(EXAMPLES[format])
    with pytest.raises(DataError, match=message) as error:
        read_rows(saved([good, row], tmp_path))
    assert EXAMPLES[format] in str(error.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path):
    with pytest.raises(DataError, match="has the keys x, which no format has"):
        read_rows(saved([{"x": 1}], tmp_path))
    with pytest.raises(DataError, match="it is no JSON"):
        read_rows(saved("[", tmp_path))
    with pytest.raises(DataError, match=r"row 2: it is no JSON"):
        read_rows(saved('{"question": "a", "answer": "b"}\n{', tmp_path, "data.jsonl"))
    with pytest.raises(DataError, match=r"\.png is not read. Give a .json, .jsonl or .csv file"):
        read_rows(saved("", tmp_path, "cat.png"))
    with pytest.raises(DataError, match=r"row 2: it is no CSV \(field larger than field limit"):
        read_rows(saved("question,answer\na,b\na," + "b" * 200_000, tmp_path, "data.csv"))
    with pytest.raises(DataError, match="it holds no rows"):
        read_rows(saved("", tmp_path, "data.jsonl"))
    with pytest.raises(DataError, match="there is no such file"):
        read_rows(DataConfig(path=str(tmp_path / "none.json")))
    with pytest.raises(DataError, match=r"the folder has none of .*metadata.jsonl"):
        read_rows(DataConfig(path=str(tmp_path / "..")))
    with pytest.raises(DataError, match="exactly one"):
        DataConfig()
    with pytest.raises(InputError, match=r"data.background.*a colour's name or #rrggbb"):
        DataConfig(path="x", background="whitish")
    with pytest.raises(InputError, match="replay"):
        DataConfig(path="x", replay=0.5)


def test_a_folder_of_pictures_with_a_table(photos: Callable[[str], Path], tmp_path: Path):
    photos("cats/cat.png"), photos("cats/dog.png")
    (tmp_path / "cats" / "questions.csv").write_text(
        "Image,Question,Answer,Choices,Kind\ncat.png,What?,a cat,a cat|a dog,name\ncat.png|dog.png,Both?,yes,,both\n"
    )
    one, two = read_rows(DataConfig(path=str(tmp_path / "cats"), validation=0, test=0)).train
    assert one.choices == ("a cat", "a dog") and one.kind == "name"
    assert [Path(p).name for p in two.pictures] == ["cat.png", "dog.png"] and two.turns[0].parts == (0, 1, "Both?")


def test_rows_of_one_picture_stay_in_one_part(photos: Callable[[str], Path], tmp_path: Path):
    rows = [{"image": photos(f"{k % 10}.png").name, "question": f"q{k}", "answer": "a"} for k in range(30)]
    config = DataConfig(path=saved(rows, tmp_path).path, validation=0.2, test=0.2)
    found = read_rows(config)
    shown = [{row.pictures for row in found.part(part)} for part in ("train", "val", "test")]
    assert [len(each) for each in shown] == [6, 2, 2] and not shown[0] & shown[1] and not shown[0] & shown[2]
    assert read_rows(config).digest == found.digest
    rows = [{**row, "split": "test" if k > 20 else "train"} for k, row in enumerate(rows)]
    declared = read_rows(DataConfig(path=saved(rows, tmp_path).path, validation=0.2))
    assert len(declared.train) == 21 and len(declared.test) == 9 and not declared.val


def test_a_folder_that_moves_keeps_its_parts(questions: Path):
    folders = [questions.parent, *(questions.parent.with_name(f"{questions.parent.name}-{k}") for k in range(4))]
    numbers, digests = [], set()
    for folder in folders:
        if folder != questions.parent:
            shutil.copytree(questions.parent, folder)
        rows = read_rows(DataConfig(path=str(folder / questions.name), validation=0.3, test=0.3))
        numbers.append([[row.number for row in rows.part(part)] for part in ("train", "val", "test")])
        digests.add(rows.digest)
    assert all(each == numbers[0] for each in numbers) and all(numbers[0])
    assert len(digests) == 1


def test_other_words_names_or_pictures_are_other_data(
    questions: Path, photos: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def digest(path: str = questions.name, **more: Any) -> str:
        return read_rows(DataConfig(path=path, validation=0, test=0, **more)).digest

    whole = digest(str(questions))
    monkeypatch.chdir(tmp_path)
    assert digest() == whole == digest(images=".")  # as a path from here
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-pictures"))
    assert digest(images=str(tmp_path.with_name(f"{tmp_path.name}-pictures"))) == whole  # and apart from their table
    seen, text = {whole}, questions.read_text()
    for changed in (text.replace("is it red", "is it blue", 1), text.replace('"no"', '"yes"', 1)):
        questions.write_text(changed)
        seen.add(digest())
    questions.write_text(text.replace("3.png", "4.png"))
    seen.add(digest())
    questions.write_text(text)
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(tmp_path / "3.png")
    seen.add(digest())
    assert len(seen) == 5
