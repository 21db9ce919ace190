"""The page: self-contained, escaped, valid, the same bytes every time."""

import re
from html.parser import HTMLParser

import pytest
import torch

from aligntok.errors import UserError
from aligntok.report import pictures, plots
from aligntok.report.page import Page, Row

PNG = pictures.strip(torch.zeros(2, 3, 8, 8))
EVIL = "<script>alert(\"1\")</script> & <b>'bold'</b>"
VOID = {"meta", "link", "img", "br", "use"}


class Outline(HTMLParser):
    """Collects tags with their attributes, checks nesting."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def full_page(text: str = "Words") -> Page:
    page = Page(text, text)
    page.headline([(text, text, text)])
    for columns in (1, 2, 3):
        page.section(text, f"{text}\n\n{text}", columns=columns)
        page.text(text)
        page.picture(PNG, text)
        page.rows([Row(text, PNG, 2), Row(text, PNG, 2, pixelated=True)], text)
        page.cells([Row(text, PNG, 2), Row("", PNG, 2)], text)
        page.plot(plots.Plot(text, plots.time_bars({"stage1": 3.0}).svg, text), text)
        page.table([text, "PSNR"], [[text, 1.5], [text, text]], text, {"PSNR": "max"})
        page.facts({text: text})
        page.notes({text: text})
        page.commands([(text, text)])
        page.details(text, text)
    return page


def test_every_block_lands_in_valid_html_with_a_viewport_and_both_colour_schemes():
    outline = Outline(full_page().html())
    assert outline.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.all("meta")
    assert "prefers-color-scheme: dark" in full_page().html() and "@media print" in full_page().html()
    assert len(outline.all("section")) == 3 and len(outline.all("h1")) == 1


def test_nothing_is_loaded_from_outside_and_nothing_can_run():
    html = full_page().html()
    outline = Outline(html)
    assert not outline.all("script") and not re.search(r"\son\w+=", html)
    for _, attrs in outline.tags:
        for name in ("src", "href", "xlink:href"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)|@import", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    policies = [a["content"] for a in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in policies[0]


def test_every_text_is_escaped():
    harmless, evil = Outline(full_page().html()), Outline(full_page(EVIL).html())
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in harmless.tags]
    assert EVIL in "".join(evil.words)
    assert evil.all("img")[0]["alt"] == EVIL


def test_backticks_set_code_and_blank_lines_paragraphs():
    page = Page("t")
    page.section("s", "one `a<b` two\n\nthree")
    html = page.html()
    assert "<p>one <code>a&lt;b</code> two</p><p>three</p>" in html


def test_sections_have_links_that_lead_to_them():
    page = Page("t")
    for title in ("Same", "Same", "Überblick", "???"):
        page.section(title)
    outline = Outline(page.html())
    targets = [attrs["href"][1:] for attrs in outline.all("a")]
    assert targets == [attrs["id"] for attrs in outline.all("section")]
    assert len(set(targets)) == 4


def test_pictures_have_size_alternative_text_and_hard_edges_where_asked():
    page = Page("t")
    page.rows([Row("Original", PNG, 2), Row("Latents", PNG, 2, pixelated=True)])
    first, second = Outline(page.html()).all("img")
    assert first["alt"] == "Original: 2 pictures" and (first["width"], first["height"]) == ("20", "8")
    assert "class" not in first and second["class"] == "pixelated"
    assert "image-rendering: pixelated" in page.html()
    with pytest.raises(UserError, match="expected PNG bytes"):
        page.picture(b"GIF89a..")


def cells(page: Page) -> list[str]:
    return re.findall(r"<td[^>]*>.*?</td>", page.html())


def test_table_marks_the_best_of_each_column_and_leaves_references_out():
    page = Page("t")
    page.table(
        ["", "probe", "PSNR [dB]", "KD"],
        [
            ["encoder", (0.571, 0.012), None, None],
            ["one", (0.477, 0.015), 16.912, 0.0213],
            ["two", (0.545, 0.014), 18.4, 0.0131],
        ],
        highlight_best={"probe": "max", "PSNR [dB]": "max", "KD": "min"},
        reference_rows=1,
    )
    assert cells(page) == [
        '<td>0.571 <span class="deviation">± 0.012</span></td>',
        '<td class="absent">–</td>',
        '<td class="absent">–</td>',
        '<td>0.477 <span class="deviation">± 0.015</span></td>',
        "<td>16.91</td>",
        "<td>0.0213</td>",
        '<td class="best">0.545 <span class="deviation">± 0.014</span></td>',
        '<td class="best">18.40</td>',
        '<td class="best">0.0131</td>',
    ]
    assert "higher is better" in page.html() and "lower is better" in page.html()


def test_table_with_one_row_nan_integers_and_zeros():
    page = Page("t")
    page.table(["", "a", "b", "c"], [["x", 1234567, float("nan"), 0.0]], highlight_best={"a": "max"})
    assert cells(page) == ["<td>1,234,567</td>", "<td>nan</td>", "<td>0.000</td>"]


def test_table_refuses_rows_that_do_not_fit():
    with pytest.raises(UserError, match=r"row \['x', 1, 2\] does not fit under the headers \['', 'a'\]"):
        Page("t").table(["", "a"], [["x", 1, 2]])


def test_plot_refuses_what_is_not_svg():
    with pytest.raises(UserError, match="expected SVG"):
        Page("t").plot(plots.Plot("p", PNG, ""))


def test_facts_read_like_facts():
    page = Page("t")
    page.facts({"a": True, "b": 12345, "c": 0.123456, "d": [1, "x"], "e": None})
    assert re.findall(r"<dd>(.*?)</dd>", page.html()) == ["yes", "12,345", "0.1235", "1, x", "None"]


def test_same_calls_give_the_same_bytes_on_disk(tmp_path):
    first, second = (full_page(EVIL).write(tmp_path / name / "report.html") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["report.html"]


def test_failed_write_keeps_the_older_page(tmp_path, monkeypatch):
    path = full_page("old").write(tmp_path / "report.html")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        full_page("new").write(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
