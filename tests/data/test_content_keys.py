"""Keys of conversations: equal where the same is said and shown, whatever the form and the place."""

from pathlib import Path

import numpy as np

from data.size_table import NOT_MEASURED, column
from tests.data.measuring import CANDIDATES, measure_one, picture, reader_of, row


def test_content_keys_are_of_what_is_said_and_shown(tmp_path):
    """The same conversation under another id, in another file and folder has the same key; another has not."""
    keys = {}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "a.png")
        rows = [
            {**row("x", tmp_path / folder / "a.png"), "id": folder},
            row(f"only in {folder}", "a.png"),
            row(" x\n"),
            row("x"),
        ]
        table, _ = measure_one(reader_of(tmp_path / folder / "a.jsonl", rows), CANDIDATES)
        assert NOT_MEASURED not in column(table, "tokens")
        keys[folder] = column(table, "content").tolist()
    assert [a == b for a, b in zip(keys["one"], keys["two"])] == [True, False, True, True]
    assert np.unique(keys["one"]).size == 3  # spaces around a text are not said


def content_keys(path: Path, rows: list) -> list[int]:
    table, kept = measure_one(reader_of(path, rows))
    assert len(kept) == len(rows)
    return column(table, "content").tolist()


def test_equal_conversations_in_different_forms_have_equal_keys(tmp_path):
    """They must fall on the same side of a held-out split, and be counted as duplicates."""
    picture(tmp_path / "a.png")
    llava = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "Hello."}]
    forms = [
        {"messages": row("x", "a.png")["messages"], "images": ["a.png"], "id": 7},
        {"conversations": llava, "image": "a.png"},
        {"query": "<image>x", "response": "Hello.", "images": ["a.png"]},
        {"instruction": "<image>x", "input": "", "output": "Hello.", "images": ["a.png"]},
        {
            "messages": [
                {"role": "<|User|>", "content": "<image>x", "images": ["a.png"]},
                {"role": "<|Assistant|>", "content": "Hello."},
            ]
        },
    ]
    keys = [content_keys(tmp_path / "a.jsonl", [form])[0] for form in forms]
    assert len(set(keys)) == 1


def test_equal_boxes_in_different_units_have_equal_keys(tmp_path):
    picture(tmp_path / "a.png", (999, 333))

    def grounded(answer: str, **objects) -> dict:
        said = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": answer}]
        return {"messages": said, "images": ["a.png"], **({"objects": objects} if objects else {})}

    pixels = grounded("<ref-object><bbox>", ref=["a dog"], bbox=[[0, 111, 333, 333]], bbox_type="real")
    text = grounded("<|ref|>a dog<|/ref|><|det|>[[0, 333, 333, 999]]<|/det|>")
    other = grounded("<|ref|>a dog<|/ref|><|det|>[[0, 333, 334, 999]]<|/det|>")
    keys = content_keys(tmp_path / "a.jsonl", [pixels, text, other])
    assert keys[0] == keys[1] != keys[2]
