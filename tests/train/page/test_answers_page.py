"""The page of an evaluation: whatever the data says, worst first, bounded; filters that hide, in a real browser."""

import json
import re

import pytest
from PIL import Image

import train.page.answers as answers
import train.page.thumbnails as thumbnails
from data.answer_boxes import LabelledBox, read_boxes
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from tests.places import ROOT
from tests.train.page.html_reader import Page, browser, open_in_browser, outside_links
from tests.train.page.test_page import HOSTILE, TITLE
from train.page.answers import AnsweredQuestion, GivenAnswer, PageMetric, Table, make_answers_page
from vl2.prompt import Message

SCRIPT = (ROOT / "train" / "page" / "answers.js").read_text()
METRICS = [PageMetric(name="exact_match", right_from=1.0), PageMetric(name="box_iou", right_from=0.5)]


def given(text: str, exact: float, iou: float | None = None, *, cut: bool = False, boxes=()) -> GivenAnswer:
    return GivenAnswer(text=text, cut=cut, boxes=tuple(boxes), values={"exact_match": exact, "box_iou": iou})


def asked(expected: str, *given_answers: GivenAnswer, images=(), others=(), **more) -> AnsweredQuestion:
    fields = {
        "source": "a.jsonl",
        "file": "/data/a.jsonl",
        "row": 1,
        "messages": (Message("user", "Which?"),),
        "images": tuple(images),
        "expected": (expected, *others),
        "boxes": (),
        "answers": given_answers,
    }
    return AnsweredQuestion(**{**fields, **more})


def make(questions, models=("outputs/a",), metrics=METRICS) -> str:
    return make_answers_page(
        title="a",
        models=models,
        metrics=metrics,
        words={"data": "a.jsonl"},
        tables=[Table(head=["", "mean"], rows=[["exact_match", "0.5"]])],
        questions=questions,
        reader=ImageReader(),
    )


def cards(html: str) -> list[Page]:
    return [Page(part) for part in re.findall(r"<article.*?</article>", html, re.DOTALL)]


@pytest.fixture
def photo(tmp_path) -> ImageRef:
    Image.new("RGB", (800, 400), "red").save(tmp_path / "photo.png")
    return ImageRef(kind="file", name=str(tmp_path / "photo.png"))


def box(text: str) -> tuple[LabelledBox, ...]:
    return read_boxes(text, [(800, 400)]).boxes


HALF = "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>"
ALL = "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"


def hostile_page() -> str:
    turns = (
        Message("system", HOSTILE),
        Message("user", HOSTILE),
        Message("assistant", HOSTILE),
        Message("user", HOSTILE),
    )
    image = ImageRef(kind="file", name=f"/gone/{HOSTILE[:200]}")
    labelled = [LabelledBox(label=HOSTILE, box=each.box) for each in box(ALL)]
    question = asked(
        HOSTILE,
        given(HOSTILE + "x" * 100_000, 0, 0.1, boxes=labelled),
        source=HOSTILE,
        file=HOSTILE,
        messages=turns,
        images=[image],
        boxes=tuple(labelled),
    )
    return make([question, asked("a", given("b", 0), source=f"{HOSTILE}2")], models=[HOSTILE])


def test_hostile_text_is_text_and_nothing_is_fetched():
    html = hostile_page()
    page = Page(html)
    assert outside_links(page) == []
    assert page.scripts == [SCRIPT]
    assert page.count("style") == page.count("html") == 1
    assert page.count("img") == 0
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.text.count(f"<script>{TITLE}</script></script></bdi></div><img src=x onerror=") >= 6
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u202a-\u202e]", html)
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "more characters" in page.text
    assert len(html) < 60_000


def test_the_worst_is_first_and_what_differs_is_marked():
    html = make(
        [
            asked("right", given("right", 1), row=1),
            asked("a red cat", given("a blue cat", 0), row=2),
            asked("monday", given("mondey", 0, cut=True), row=3, others=("tuesday",)),
        ]
    )
    page = cards(html)
    assert [re.search(r"row (\d)", card.text)[1] for card in page] == ["2", "3", "1"]
    assert [mark_texts(card) for card in page] == [["red", "blue"], ["a", "e"], []]
    assert "or tuesday" in page[1].text
    assert "Right is worth 1, by box_iou 0.5 or more." in html
    assert ["cut" in card.text for card in page] == [False, True, False]
    assert ["✗" in card.text for card in page] == [False] * 3  # said by the style, beside the value
    assert [card.count("div", **{"class": "wrong"}) for card in page] == [1, 1, 0]


def mark_texts(page: Page) -> list[str]:
    return [text for (tag, _), text in zip(page.elements, page.own_texts, strict=True) if tag == "mark"]


def test_the_whole_conversation_is_there():
    turns = [
        Message("system", "short"),
        Message("user", "<image>\nA?"),
        Message("assistant", "b"),
        Message("user", "C <image>?"),
    ]
    images = [ImageRef(kind="file", name=f"/gone/{i}.png") for i in range(2)]
    (card,) = cards(make([asked("d", given("d", 1), messages=tuple(turns), images=images)]))
    assert "3 earlier messages" in card.text
    assert re.search(r"system\s*short\s*user\s*picture 1 A\?\s*assistant\s*b\s*question\s*C picture 2 \?", card.text)
    assert card.text.count("expected an image file, found none at") == 2
    many = tuple(Message("user", f"turn {i}<image>") for i in range(30))
    (card,) = cards(make([asked("d", given("d", 1), messages=many)]))
    assert "29 earlier messages" in card.text and "10 before these are not shown" in card.text
    assert "turn 9picture" not in card.text and re.search(r"turn 29\s*picture 30", card.text)


def test_boxes_of_both_stand_on_the_picture(photo):
    html = make([asked(ALL, given(HALF, 0, 0.5, boxes=box(HALF)), images=[photo], boxes=box(ALL))])
    drawn = [attrs for _, attrs in Page(html).elements if attrs.get("class", "").startswith("drawn")]
    assert [(each["class"], each["style"]) for each in drawn] == [
        ("drawn expected", "left:0.00%;top:0.00%;width:100.00%;height:100.00%"),
        ("drawn model0", "left:0.00%;top:0.00%;width:100.00%;height:50.05%"),
    ]
    assert "expected box" in html and "box of the answer" in html
    assert "expected box" not in make([asked("a", given("a", 1))])


def test_each_picture_is_in_the_file_once(photo):
    html = make([asked("a", given("b", 0), images=[photo, photo]) for _ in range(3)])
    assert html.count("data:image/jpeg;base64,") == 1
    assert html.count('<use href="#p0"/>') == 6
    assert 'viewBox="0 0 800 400"' in html


def test_a_page_stays_small_and_says_what_is_left_out(tmp_path, monkeypatch):
    """5,000 questions with a picture each, as a browser still takes them: the best are left out, then pictures."""
    monkeypatch.setattr(answers, "MOST_QUESTIONS", 3)
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 1)
    refs = []
    for i in range(5):
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        refs.append(ImageRef(kind="file", name=str(tmp_path / f"{i}.png")))
    html = make([asked("a", given("b", i / 5), row=i, images=[refs[i]]) for i in (4, 3, 0, 1, 2)])
    assert [re.search(r"row (\d)", card.text)[1] for card in cards(html)] == ["0", "1", "2"]
    assert "2 more answers, better than these" in html
    assert html.count("<use ") == 1
    assert "2 pictures of better answers are not drawn" in html
    monkeypatch.setattr(answers, "MOST_CHARACTERS", 1500)
    assert len(cards(make([asked("a", given("b" * 600, 0))] * 3))) == 1


def two_models() -> str:
    """Rows: both right, A alone, B alone, neither, and a box that A finds better."""
    return make(
        [
            asked("x", given("x", 1), given("x", 1), row=1),
            asked("x", given("x", 1), given("y", 0), row=2),
            asked("x", given("y", 0), given("x", 1), row=3, source="b.jsonl"),
            asked("x", given("y", 0, cut=True), given("z", 0), row=4),
            asked(ALL, given(HALF, 0, 0.9), given("no", 0, 0.1), row=5),
        ],
        models=("outputs/a", "outputs/b"),
    )


def test_two_models_stand_beside_each_other():
    page = cards(two_models())
    assert [card.count("div", **{"class": f"said given model{i}"}) for card in page for i in (0, 1)] == [1] * 10
    assert [re.search(r"row (\d)", card.text)[1] for card in page] == ["5", "4", "2", "3", "1"]


ASKED = {
    "show=all": "54231",
    "show=wrong": "5423",
    "show=a": "2",
    "show=b": "3",
    "show=both": "54",
    "show=differ": "5423",
    "show=cut": "4",
    "show=wrong&metric=box_iou": "5",
    "metric=box_iou": "54231",
    "source=1": "3",
    "find=row+2": "2",
    "show=nonsense&source=77": "54231",
}


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_filters_hide_what_they_do_not_ask_for(tmp_path):
    """Asked by the address that the page is opened at, by addresses afterwards, and by hand."""
    asks = f"""<script>
        const shown = () => [...document.querySelectorAll("article")].filter((card) => card.offsetParent !== null)
            .map((card) => card.textContent.match(/row (\\d)/)[1]).join("");
        const seen = {{opened: shown()}};
        for (const hash of {json.dumps(list(ASKED))}) {{
            location.hash = hash;
            dispatchEvent(new HashChangeEvent("hashchange"));
            seen[hash] = `${{shown()}}, ${{document.getElementById("found").textContent}}`;
        }}
        const select = document.getElementById("show");
        select.value = "a";
        select.dispatchEvent(new Event("input"));
        seen.hand = `${{shown()}} ${{location.hash}}`;
        document.body.dataset.seen = JSON.stringify(seen);
    </script>"""
    html = re.sub("<meta http-equiv=[^>]*>", "", two_models()).replace("</body>", f"{asks}</body>")
    file = tmp_path / "report.html"
    file.write_text(html, "utf-8")
    (body,) = [
        attrs
        for tag, attrs in Page(open_in_browser(file, tmp_path / "profile", fragment="show=cut")).elements
        if tag == "body"
    ]
    seen = json.loads(body["data-seen"])
    assert seen.pop("opened") == "4"
    assert seen.pop("hand") == "2 #show=a"
    assert seen == {asks: f"{rows}, {len(rows)} of 5" for asks, rows in ASKED.items()}


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_a_browser_shows_hostile_text_as_text_and_the_page_fits_a_phone(tmp_path):
    """With names and answers that have nowhere to break, whose script would change the title if it ran."""
    asks = """<script>
        document.body.dataset.found = `${document.title} ${document.documentElement.scrollWidth} of ${innerWidth}`;
    </script>"""
    html = re.sub("<meta http-equiv=[^>]*>", "", hostile_page()).replace("</body>", f"{asks}</body>")
    file = tmp_path / "report.html"
    file.write_text(html, "utf-8")
    dom = open_in_browser(file, tmp_path / "profile", "--window-size=390,844")
    found = re.search(r'data-found="a – what it answers (\d+) of (\d+)"', dom)
    assert found, json.dumps(dom[-2000:])
    assert int(found[1]) <= int(found[2]) < 640
    assert f"&lt;script&gt;{TITLE}&lt;/script&gt;" in dom
