"""The PDF exporter: exporter.ipynb holds one of each kind of cell and output; what comes out is read back with pypdf."""

import base64
import copy
import math
import re
import shutil
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path

import nbformat
import pytest
import typst
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pypdf import PdfReader

from lab.pdf import ExportError, export, notebook_digest

BOOK = Path(__file__).with_name("exporter.ipynb")
TEXT, MARGIN = 17.4 / 2.54 * 72, 1.8 / 2.54 * 72  # points


def png(width, height):
    """A red PNG without a word on its resolution."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress((b"\0" + b"\xfa\0\0" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def furnish(folder):
    """The files beside a notebook: figures of which some have a vector form, and a decoy named like an attachment."""
    (folder / "figures").mkdir()
    for name in ("plain", "both"):
        (folder / "figures" / f"{name}.png").write_bytes(png(240, 80))
    (folder / "inside.png").write_bytes(png(99, 99))
    (folder / "v.typ").write_text("#set page(width: 8cm, height: 3cm)\nvector figure")
    for name in ("both", "vector"):
        typst.compile(folder / "v.typ", output=folder / "figures" / f"{name}.pdf", ignore_system_fonts=True)


def exported(folder, *cells, **arguments):
    """Pages' texts and the messages of the warnings of a notebook of the given cells."""
    nbformat.write(new_notebook(cells=list(cells)), folder / "book.ipynb")
    return read(folder / "book.ipynb", **arguments)


def read(path, **arguments):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        export(path, path.with_suffix(".pdf"), **arguments)
    texts = [unicodedata.normalize("NFKC", page.extract_text()) for page in PdfReader(path.with_suffix(".pdf")).pages]
    return texts, [str(warning.message) for warning in said if warning.category is UserWarning]


def shown(data, **metadata):
    """A code cell with one output."""
    return new_code_cell("x", outputs=[new_output("display_data", data=data, metadata=metadata)])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(path of the PDF, texts of its pages, warnings) of exporter.ipynb."""
    folder = tmp_path_factory.mktemp("report")
    furnish(folder)
    shutil.copy(BOOK, folder)
    return folder / "exporter.pdf", *read(folder / BOOK.name, keywords=("notebook=1f", "code=2e"))


def images(path):
    """The pixel images of a PDF as set: {(width, height) in pixels: (width, height) on the page in points}."""
    found = {}
    for page in PdfReader(path).pages:
        objects = page["/Resources"].get("/XObject", {})

        def see(operator, operands, matrix, _):
            image = objects[operands[0]] if operator == b"Do" else {}
            if image.get("/Subtype") == "/Image":
                found[image["/Width"], image["/Height"]] = math.hypot(*matrix[:2]), math.hypot(*matrix[2:4])
        page.extract_text(visitor_operand_before=see)
    return found


def test_metadata_and_pages(report):
    """Title from the first heading, the caller's keywords, A4 throughout, numbered pages, no date."""
    path, texts, _ = report
    pdf = PdfReader(path)
    assert pdf.metadata["/Title"] == "An exporter’s test, x² and code"
    assert pdf.metadata["/Keywords"] == "notebook=1f, code=2e" and "/CreationDate" not in pdf.metadata
    assert all([round(float(x)) for x in page.mediabox] == [0, 0, 595, 842] for page in pdf.pages)
    assert all(text.rstrip().endswith(f"{i} / {len(texts)}") for i, text in enumerate(texts, 1))


@pytest.mark.parametrize("words", [
    "One of each kind of cell and output", "Abstract\nThe abstract says why.", "at 95 % and with a delay τ of 5", "K = 16 inside blanks",
    "nested, H2O and xy, Ctrl", "1. deeper bold word", "two struck", "norm |x| and ‖y‖ a | b", "a|b is code", "1_000_000",
    "A footnote1, a link to pandoc", "1The footnote’s text, β.", "2The other text.", "one to Section 2, a dead one to nowhere",
    "https://typst.app bare", "It costs $5 or $6, not math", "A line\nbreak, a comment here", "inline $code$ <b>", "quotes “so”", "A quotation.",
    "☒ done", "☐ not done", "a = α+b", "c = softmax(d) (7)", "otherwise", "z ⊙y ∩t", "e = mc2", "2000’s", "Greek κόσμε, Cyrillic мир, 1 ∈ O",
    'fenced = "$$ a | b $$"  # <b> \\begin{align} *stars*', "A summary", "hidden words", "cell one cell two",
    "The vector of figures is preferred, y.", "attached SVG", 'return "a \\"quoted\\" \\\\ backslash #and *stars*", x', "red words and green",
    "100%|####|", "first half of a line", "endofword", "tabbed # *not* _markdown_ `tick` ``` fence", "a warning on stderr",
    "ZeroDivisionError\na *star* # hash _under_ $dollar$ <b>", "line of the trace", "words in SVG", "row 3.25", "words beside a canvas",
    "IntSlider(value=7)", "tdt", "q = r", '"key": [\n  "é",\n  1.5,\n  null', "<__main__.Thing at 0x7f>", "Shown Markdown with γ",
    "A caption of nothing else.", "Figure 1. The finding of the figure comes first, τ = 1.", "Figure 2. No vector file of this one.",
    "Table 1. The table’s finding.", "hybrid 8 99.9 (98–100)", "very_long_identifier_of_a_model/with/parts 64 ≥ 90", "Table 2. Longer than a page.",
    "89 7921", "output of hidden code", "A raw cell, *verbatim* #here", "The last words.",
    "Appendix: plotting code\nFigure 1\n# A figure\nplot_figure()\nFigure 2\nplot_other()\nTable 1\n# A table", "def helper():\n    return 'moved'",
])
def test_what_is_set(report, words):
    """Every kind of content comes out, read as what it is."""
    close = lambda text: re.sub(r"\s+", "", text)  # where lines and words part is the page's business
    assert close(words) in close("\n".join(report[1]))


@pytest.mark.parametrize("source", [
    "<IPython", "\x1b", "10%|", "\\begin{align}\na", "\\tag", "\\tau", "\\vert", "<sub>", "<img", "unseen", "[^a]", "attachment:in", "**", "~~",
    "secret_code", "\ue000", "\ue002", "\u200b", "color: red", "inside.png",
])
def test_what_is_not(report, source):
    """No source of Markdown, TeX, HTML or of a terminal is left, nor code that is hidden."""
    assert source not in "\n".join(report[1])


def test_captions_appear_once_and_with_what_they_belong_to(report):
    """Jupyter's own captions are left out; a caption and its figure or table are on one page."""
    together = "\n".join(report[1])
    for caption, with_it in (("Figure 1.", "vector figure"), ("Figure 2.", "No vector"), ("Table 1.", "very_long"), ("Table 2.", "i square")):
        assert together.count(caption) == 1
        assert with_it in next(text for text in report[1] if caption in text)
    assert together.count("vector figure") == 2  # figures/both.pdf and figures/vector.pdf, in place of pixels
    assert sum("i square" in text for text in report[1]) >= 2  # a table longer than a page repeats its head


def test_what_cannot_be_set_is_named_in_place_and_in_a_warning(report):
    """HTML that is a program, widgets, unknown types, remote images, characters without a glyph."""
    _, texts, said = report
    page = "".join("".join(texts).split())
    for what in ("HTML <pad>", "HTML with <iframe>", "HTML with <script>", "the image https://example.org/remote.png",
                 "application/vnd.jupyter.widget-view+json", "application/vnd.plotly.v1+json", "application/javascript"):
        assert f"Notset:{what}".replace(" ", "") in page.replace("anoutputoftype", "") and any(what in message for message in said), what
    for character in "😀中文":
        assert f"U+{ord(character):04X}" in page and any(character in message and unicodedata.name(character) in message for message in said)
    assert len(said) == 10


def test_images_have_their_natural_size(report):
    """96 pixels to the inch, finer where file or notebook say so; at most as wide as the text and 20 cm high; attachments are the cell's own."""
    found = images(report[0])
    expected = {(20, 20): (15, 15), (30, 3000): (5.67, 566.9), (3000, 40): (TEXT, TEXT / 75), (144, 72): (72, 36), (200, 30): (75, 11.25),
                (40, 30): (30, 22.5), (24, 24): (18, 18), (320, 100): (240, 75)}
    for pixels, points in expected.items():
        assert found[pixels] == pytest.approx(points, rel=0.01), pixels
    assert set(found) == {*expected, (240, 80)}  # not the decoy beside the notebook, nor pixels where a vector file is


def test_image_widths_in_html(tmp_path):
    """`width` in pixels and in per cent, in an attribute or a style; never wider than the text."""
    furnish(tmp_path)
    for tag, width in (('width="120"', 90), ('width="50%"', TEXT / 2), ('style="border: 0; width: 60px"', 45), ('width="5000"', TEXT), ("", 180)):
        exported(tmp_path, new_markdown_cell(f'<img src="figures/plain.png" {tag}>'))
        assert images(tmp_path / "book.pdf")[240, 80][0] == pytest.approx(width, rel=0.01), tag


@pytest.mark.parametrize("cell, reason", [
    (new_markdown_cell("![a](attachment:none.png)"), "no attachment none.png"),
    (new_markdown_cell("![a](none.png)"), "image not found: none.png"),
    (new_markdown_cell(r"$\frobnicate{x}$"), r"\\frobnicate"),
    (shown({"image/png": base64.b64encode(b"no image").decode()}), "failed to decode image"),
    (new_code_cell("x", outputs=[new_output("error", ename="Boom", evalue="*it* broke", traceback=[])]), r"cell 1 raised Boom: \*it\* broke"),
])
def test_what_stops_an_export(tmp_path, cell, reason):
    """The message says what is wrong, and the PDF in place stays as it was."""
    (tmp_path / "book.pdf").write_bytes(b"before")
    with pytest.raises(ExportError, match=reason):
        exported(tmp_path, cell)
    assert (tmp_path / "book.pdf").read_bytes() == b"before" and {p.name for p in tmp_path.iterdir()} == {"book.pdf", "book.ipynb"}


def test_what_is_no_notebook(tmp_path):
    (tmp_path / "a.ipynb").write_text("words")
    for name in ("a.ipynb", "none.ipynb"):
        with pytest.raises(ExportError, match=f"not a notebook: .*{name}"):
            export(tmp_path / name, tmp_path / "a.pdf")


def test_titles(tmp_path):
    """Without a heading the file's name; a text in the next cell is no subtitle; nothing at all is a page."""
    for cells, title, text in (([], "book", ""), ([new_code_cell("1")], "book", "1"),
                               ([new_markdown_cell("# A\n# B"), new_markdown_cell("C")], "A", "A\nB\nC"),
                               ([new_markdown_cell("words"), new_markdown_cell("## Two *x*")], "Two x", "words\nTwo x")):
        texts, said = exported(tmp_path, *cells)
        assert PdfReader(tmp_path / "book.pdf").metadata["/Title"] == title and texts[0].split() == [*text.split(), "1", "/", "1"] and not said


def test_typst_in_text_stays_text(tmp_path):
    """What Typst would obey is printed, in Markdown, code, outputs, titles, keywords and names."""
    words = '#panic("x") $y$ @ref \\u{41} // no comment /* none */ = head'
    text = '# Title #x "q" \\\\ [b]\n\n```{=typst}\n#panic(1)\n```\n\n#let x = 1, `#raw`, @ref, // so, 3 * 4'
    code = new_code_cell(words, outputs=[new_output("stream", name="stdout", text=words)])
    texts, _ = exported(tmp_path, new_markdown_cell(text), code, keywords=('a "b"\\', "c]"))
    text = " ".join("".join(texts).split())
    assert text.count(words) == 2 and "#panic(1)" in text and "#let x = 1, #raw, @ref, // so, 3 * 4" in text
    assert dict(PdfReader(tmp_path / "book.pdf").metadata)["/Title"] == "Title #x “q” \\ [b]"
    assert PdfReader(tmp_path / "book.pdf").metadata["/Keywords"] == 'a "b"\\, c]'


def test_html_and_svg_that_cannot_be_set(tmp_path):
    """An SVG image with HTML inside, and a character without a glyph in another one, are told."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="200" height="60">{}</svg>'
    texts, said = exported(tmp_path, shown({"image/svg+xml": svg.format("<foreignObject><p>a</p></foreignObject>")}),
                           shown({"image/svg+xml": svg.format('<text y="30">語</text>')}), shown({"text/html": "<b>bold</b> <i>words</i>"}))
    assert "Not set: the HTML inside an SVG image" in texts[0] and "U+8A9E" in texts[0] and "bold words" in texts[0] and len(said) == 2


def test_wide_content_stays_on_the_page(tmp_path):
    """A formula wider than the text is scaled, a word longer than a line and a table of many columns wrap."""
    row = lambda cells: f"| {' | '.join(cells)} |\n"
    table = row(f"c{i}" for i in range(30)) + row(["--"] * 30) + row(f"{i}.2345" for i in range(30))
    sum_ = "$$" + " + ".join(f"x_{{{i}}}" for i in range(70)) + "$$"
    exported(tmp_path, new_markdown_cell(f"{table}\n\n{sum_}"), new_code_cell("y" * 400), new_markdown_cell("z" * 300))
    page, at = PdfReader(tmp_path / "book.pdf").pages[0], []
    page.extract_text(visitor_text=lambda text, cm, tm, font, size: at.append(cm[4] + cm[0] * tm[4]) if text.strip() else None)
    lines = page.extract_text(extraction_mode="layout").splitlines()
    assert MARGIN - 2 <= min(at) and max(at) <= MARGIN + TEXT + 2
    assert sum("yy" in line for line in lines) == 4 and sum("zz" in line for line in lines) >= 3


def test_a_caption_stays_with_a_table_longer_than_a_page(tmp_path):
    """Wherever on a page such a table begins, its head stands below its caption."""
    cells = []
    for number in range(1, 31):
        table = "| i | head |\n|--|--|\n" + "| a | b |\n" * (58 + number)
        cells.append(shown({"text/markdown": table}, table={"name": "t", "number": number, "caption": "Long."}))
        cells[-1].metadata.tags = ["remove-input"]
    texts, _ = exported(tmp_path, *cells)
    assert "".join(texts).count("Long.\ni head") == 30


def test_the_same_notebook_gives_the_same_bytes(report, tmp_path):
    furnish(tmp_path)
    shutil.copy(BOOK, tmp_path)
    read(tmp_path / BOOK.name, keywords=("notebook=1f", "code=2e"))
    assert (tmp_path / "exporter.pdf").read_bytes() == report[0].read_bytes()


def test_digest_is_of_what_is_shown():
    """It changes with sources, tags, attachments, outputs and their captions; not with counts, ids, pieces of a stream or a widget's id."""
    book = nbformat.read(BOOK, as_version=4)
    digest = notebook_digest(book)

    def changed(change):
        other = copy.deepcopy(book)
        change(other)
        return notebook_digest(other) != digest
    cell = lambda other, source: next(c for c in other.cells if c.source == source)
    picture = lambda other: next(c for c in other.cells if "An attachment" in c.source)
    assert changed(lambda other: other.cells[0].update(source="# Another"))
    assert changed(lambda other: cell(other, "secret_code()").metadata.update(tags=[]))
    assert changed(lambda other: picture(other).attachments.pop("inside.png"))
    assert changed(lambda other: cell(other, "secret_code()").outputs[0].update(text="other"))
    assert changed(lambda other: cell(other, "plot_other()").outputs[0].metadata["figure"].update(caption="Other."))
    assert changed(lambda other: other.cells.reverse())

    def split(other):
        outputs = cell(other, "print(progress)").outputs
        outputs[:2] = [new_output("stream", name="stdout", text=outputs[0].text + outputs[1].text)]
    assert not changed(split)
    assert not changed(lambda other: cell(other, "secret_code()").update(execution_count=77, id="other"))
    assert not changed(lambda other: cell(other, "widget").outputs[0].data["application/vnd.jupyter.widget-view+json"].update(model_id="other"))


def test_it_needs_no_fonts_of_the_system(report):
    """All fonts are those inside the Typst wheel, embedded."""
    fonts = set()
    for page in PdfReader(report[0]).pages:
        fonts |= {font["/BaseFont"].partition("+")[2] for font in page["/Resources"].get("/Font", {}).values()}
    assert fonts and all(re.match(r"NewCM|DejaVuSansMono|LibertinusSerif", name) for name in fonts), fonts
