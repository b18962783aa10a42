"""report.html: one file that asks nothing of a network, whatever the data says, and shows what is learned."""

import json
import re

import pytest
from PIL import Image

from tests.places import ROOT
from tests.train.page.html_reader import Page, browser, open_in_browser, outside_links
from train.run import dryrun

SCRIPT = (ROOT / "train" / "page" / "page.js").read_text()
TITLE = "document.title='owned'"
HOSTILE = (
    f'<script>{TITLE}</script></script></bdi></div><img src=x onerror="{TITLE}"> \' " &lt; {{{{ 7*7 }}}} {{% x %}} '
    "\0\x07\x1b \u202egnorw\u202c </style><style>*{display:none}</style> <!-- <link href=http://example.org> ]]>"
)


@pytest.fixture(scope="module")
def look(arguments):
    """Makes the page of a dry run: (its HTML, the same read)."""

    def go(run_dir, *more):
        dryrun.main(arguments(run_dir, "data.special_tokens=neutralise", *more))
        html = (run_dir / "report.html").read_text("utf-8")
        return html, Page(html)

    return go


def talk(question: str, answer: object, *images: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images)}


def write(folder, rows: list, name: str = "rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, look):
    """Everything that comes from outside is hostile: messages, the names of file, field and picture, a bad row."""
    folder = tmp_path_factory.mktemp("hostile")
    evil = f"<script>{TITLE.replace('/', '')}<script> \" ' &amp; {'n' * 120}\u202e.jsonl"
    Image.new("RGB", (40, 40)).save(folder / "<img src=x onerror=1>.png")
    rows = [
        talk(HOSTILE, HOSTILE + "/" * 300),
        talk(f"<image>{HOSTILE}", HOSTILE, "<img src=x onerror=1>.png"),
        talk("bad", 7, "</script><script>1</script>.png"),
        {"messages": [{"role": HOSTILE, "content": "x"}]},
        *[talk("<image>", "no such picture", f"</script><script>{TITLE}</script>{i}.png") for i in range(60)],
    ]
    return look(folder / "run", f"data.path={write(folder, rows, evil)}", "data.max_tokens=1000")


def test_a_page_refers_to_nothing_outside_of_it(hostile, tmp_path, look, data_file):
    for _, page in (hostile, look(tmp_path / "run", f"data.path={data_file}")):
        assert page.count("html") == 1
        assert outside_links(page) == []


def test_the_search_for_links_finds_them():
    for html in ("<img src=//a/b>", "<a href=x>", "<link href=data:image/a>", "<p style='background:url(x)'>"):
        assert outside_links(Page(html))
    assert outside_links(Page("<style>@import 'a'</style>"))


def test_hostile_text_is_text(hostile):
    html, page = hostile
    assert [script for script in page.scripts if not script.startswith('{"')] == [SCRIPT]
    assert page.count("style") == 1
    assert page.count("img") == page.count("img", alt="picture 1") > 0
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert f"<script>{TITLE}</script></script></bdi></div><img src=x onerror=" in page.text
    assert "{{ 7*7 }} {% x %}" in page.text
    assert "␀␇␛ ⟨U+202E⟩gnorw⟨U+202C⟩ </style>" in page.text
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u202a-\u202e]", html)
    (rows,) = [json.loads(script) for script in page.scripts if script.startswith('{"')]
    assert len(rows["rows"]) == 62
    assert rows["files"][0].endswith("⟨U+202E⟩.jsonl")
    assert f"<script>{TITLE}</script>59.png" in rows["rows"][-1][3]


def test_only_our_script_may_run(hostile):
    """The page's own policy, should an escape ever fail."""
    (policy,) = [attrs["content"] for _, attrs in hostile[1].elements if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")


@pytest.fixture(scope="module")
def simple(tmp_path_factory, look):
    """Two conversations, one about a picture of 768 × 384 with a box."""
    folder = tmp_path_factory.mktemp("simple")
    Image.new("RGB", (768, 384), "red").save(folder / "wide.png")
    answer = "<|ref|>the left half<|/ref|><|det|>[[0, 0, 499, 999]]<|/det|> é"
    rows = [talk("red?", "blue"), talk("<image>where?", answer, "wide.png")]
    return look(folder / "run", f"data.path={write(folder, rows)}", "data.max_tokens=1000", "max_steps=1")[1]


def test_learned_and_special_tokens_are_marked(simple):
    marked = []
    for (tag, attrs), text in zip(simple.elements, simple.own_texts, strict=True):
        if tag == "i" and attrs.get("class", "").startswith("t") and "learned" not in text:
            marked.append((text, *attrs["class"].split()[1:]))
    answer = "".join(text for text, *kinds in marked if "l" in kinds)
    assert "blue<｜end▁of▁sentence｜>" in answer
    assert "<|ref|>the left half<|/ref|><|det|>[[0, 0, 499, 999]]<|/det|> é<｜end▁of▁sentence｜>" in answer
    assert ("<|User|>", "x") in marked
    assert ("<|ref|>", "l", "x") in marked
    assert not [text for text, *kinds in marked if "red?" in text and "l" in kinds]


def test_pictures_stand_on_their_tiles_with_their_boxes(simple):
    (canvas,) = [attrs for _, attrs in simple.elements if attrs.get("class") == "canvas"]
    assert canvas["style"] == "aspect-ratio:2/1;--c:2;--r:1"
    assert "617 tokens" in simple.text and "768×384 px" in simple.text
    (box,) = [attrs["style"] for _, attrs in simple.elements if attrs.get("class") == "drawn"]
    assert box == "left:0.00%;top:0.00%;width:49.95%;height:100.00%"


def test_boxes_in_numbers_stand_on_their_own_picture(tmp_path, look):
    """Two pictures, and the box of the first named last: the text does not say which one is meant, the row does."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50), "red").save(tmp_path / name)
    row = talk("<image><image>where?", "<ref-object><bbox> and <ref-object><bbox>", "a.png", "b.png")
    row["objects"] = {
        "ref": ["of b", "of a"],
        "bbox": [[0, 0, 50, 50], [50, 25, 100, 50]],
        "image_id": [1, 0],
    }
    html, page = look(tmp_path / "run", f"data.path={write(tmp_path, [row])}", "data.max_tokens=4096", "max_steps=1")
    assert page.count("span", **{"class": "drawn"}) == 2
    first, second = html.split('alt="picture 1"')[1].split('alt="picture 2"')[:2]
    assert "<bdi>of a</bdi>" in first and "<bdi>of b</bdi>" not in first
    assert "<bdi>of b</bdi>" in second
    assert "left:50.05%" in first and "left:0.00%" in second


def test_a_page_without_bad_rows_says_so(simple):
    assert "None: every row can be used." in simple.text
    assert simple.count("input") == 0
    assert "Training would start." in simple.text


def test_a_page_without_data_still_shows_why(tmp_path, look):
    _, page = look(tmp_path / "run", f"data.path={write(tmp_path, [talk('red', 3)])}")
    assert "Training would refuse this" in page.text
    assert "messages[1].content" in page.text
    assert page.count("article") == 0


def test_a_page_stays_small(tmp_path, look, monkeypatch):
    """However long the conversations: a browser that draws a million tokens draws nothing else."""
    monkeypatch.setattr("train.page.packs.MOST_TOKENS", 100)
    monkeypatch.setattr("train.page.packs.MOST_PICTURES", 1)
    for name in "ab":
        Image.new("RGB", (50, 50)).save(tmp_path / f"{name}.png")
    rows = [talk("<image><image>" + "red " * 200, "blue", "a.png", "b.png")] * 3
    _, page = look(tmp_path / "run", f"data.path={write(tmp_path, rows)}", "data.max_tokens=4096", "max_steps=1")
    assert sum(tag == "i" and attrs.get("class", "").startswith("t") for tag, attrs in page.elements) == 100 + 3
    assert page.count("img") == 1
    assert "not drawn: the page shows a few pictures" in page.text
    assert page.text.count("more tokens that the page does not draw") == 1
    assert "and 2 more conversations that the page does not draw" in page.text


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_a_browser_shows_hostile_text_as_text(hostile, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(hostile[0], "utf-8")
    shown = Page(open_in_browser(file, tmp_path / "profile"))
    assert "sft_tiny, dry run – what it learns from" in shown.text
    assert [script for script in shown.scripts if not script.startswith('{"')] == [SCRIPT]
    assert shown.count("li") == 1 + 50  # the verdict's reason; then a page of bad rows, which the script has written
    assert "Show 12 more of 12" in shown.text
    assert "62 rows" in shown.text
    assert f"<script>{TITLE}</script>9.png" in shown.text


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_a_page_fits_a_phone_and_finds_a_row(hostile, tmp_path):
    """On a phone, with a name and a message that have nowhere to break."""
    asks = """<script>
        const input = document.getElementById("filter");
        input.value = "ROW 64 59.png";
        input.dispatchEvent(new Event("input"));
        const rows = document.querySelectorAll("#rows li").length;
        const found = `${document.getElementById("found").textContent}, ${rows} shown`;
        document.title = `${document.documentElement.scrollWidth} of ${innerWidth}, ${found}`;
    </script>"""
    html = re.sub("<meta http-equiv=[^>]*>", "", hostile[0]).replace("</body>", f"{asks}</body>")
    file = tmp_path / "report.html"
    file.write_text(html, "utf-8")
    dom = open_in_browser(file, tmp_path / "profile", "--window-size=390,844")
    found = re.search(r"<title>(\d+) of (\d+), (.*)</title>", dom)
    assert found
    assert int(found[1]) <= int(found[2])
    assert int(found[2]) < 640  # the layout of a phone
    assert found[3] == "1 row, 1 shown"
