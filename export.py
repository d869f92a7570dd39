"""Typeset an executed notebook as a PDF, with pip-installed tools only.

Use: ``python export.py recall.ipynb report.pdf``

nbconvert reads the notebook, pandoc turns its Markdown into Typst, and Typst sets the pages.
Both programs come inside wheels (``pypandoc-binary``, ``typst``), and the page uses only the
fonts inside Typst, so that the PDF is the same on every machine and carries no date.

What the exporter looks for in the notebook:

* cell tags: ``abstract``, ``hide-input`` (code goes to an appendix), ``comment`` (the code only fills numbers into text:
  its output alone is set), ``remove-cell``;
* output metadata: ``{"figure": {"name", "number", "caption", "width"?}}``,
  ``{"table": {"name", "number", "caption"}}``, ``{"caption": true}`` (shown by Jupyter only, dropped
  here) and ``{"provenance": {...}}`` (becomes ``key=value`` keywords of the PDF);
* notebook metadata: ``{"authors": [{"name": ...}]}``.
"""

import argparse
import base64
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

import nbformat
import pypandoc
import typst
from nbconvert.exporters import MarkdownExporter
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, Preprocessor
from traitlets import default
from traitlets.config import Config

# Jupyter reads CommonMark (a list needs no blank line before it, for example), so pandoc must too.
MARKDOWN = (
    "commonmark+tex_math_dollars+pipe_tables+raw_attribute+footnotes+strikeout+attributes"
    "+implicit_figures+autolink_bare_uris+smart+gfm_auto_identifiers"
)

TEMPLATE = r"""
#let serif = ("New Computer Modern", "New Computer Modern Math", "Libertinus Serif", "DejaVu Sans Mono")
#let mono = ("DejaVu Sans Mono", "New Computer Modern Math")
#let grey = luma(110)
#let code-size = state("code-size", 6.5pt)
#let code-leading = state("code-leading", 0.42em)
#let small = state("small", false)  // whether a table is long enough to be set in small type

// Moves to the next page unless this one has so much room left; leaves no trace otherwise.
#let needs(height) = {
  block(height: height, above: 0pt, below: 0pt, breakable: false)
  v(-height)
}
// Figures and tables stand where they are written, but for those in `floats` (see `typeset`).
#let place-of(key) = if key in floats { auto } else { none }
#let in-order(key) = if key not in floats { place.flush() }  // what stands in the text does not overtake what floats
// Notes where the text has got to.
#let spot(kind, key) = context [#metadata((kind: kind, key: key, page: here().page(), y: here().position().y / 1pt)) <spot>]

#let report(title: "", running: "", authors: (), keywords: (), body) = {
  set document(title: title, author: authors, keywords: keywords, date: none)
  set page(
    paper: "a4", margin: (x: 1.5cm, top: 1.35cm, bottom: 1.2cm), footer-descent: 35%,
    header: context if counter(page).get().first() > 1 {
      set text(8.5pt, fill: grey, style: "italic")
      running
      v(-0.45em)
      line(length: 100%, stroke: 0.4pt + luma(190))
    },
    footer: context align(center, text(8.5pt, fill: grey, counter(page).display("1 / 1", both: true))),
  )
  set text(font: serif, size: 9pt, lang: "en")
  set par(justify: true, leading: 0.5em, spacing: 0.7em)
  set list(indent: 0.6em)
  set enum(indent: 0.6em)
  show link: set text(fill: rgb("#1f4e79"))

  set heading(numbering: none)
  show heading: set par(justify: false)
  show heading: set block(above: 1em, below: 0.55em)
  show heading.where(level: 1): set text(14pt)
  show heading.where(level: 2): set text(12.5pt)
  show heading.where(level: 2): it => { place.flush(); it }
  show heading.where(level: 3): it => { place.flush(); it }
  show heading.where(level: 3): set text(10.5pt)
  show heading.where(level: 4): set text(10pt)

  show raw: set text(font: mono)
  show raw.where(block: false): set text(0.92em)
  // 6.5 pt puts 126 characters on a line; the zero-width spaces let longer words wrap.
  show raw.where(block: true): it => context {
    set text(code-size.get())
    set par(justify: false, leading: code-leading.get())
    show regex("\S{60,}"): word => word.text.clusters().join(sym.zws)
    let output = it.lang == "output"
    let long = it.lines.len() > 10
    if not output { place.flush() }
    if long { needs(2cm) }
    block(
      width: 100%, inset: (x: 5pt, y: 5pt), radius: 2pt, above: if output { 0.5em } else { 1em },
      below: 1em, breakable: long,
      fill: if output { none } else { luma(246) },
      stroke: if output { (left: 1.5pt + luma(205)) } else { none }, it,
    )
  }

  set figure(numbering: none, supplement: none, gap: 0.7em)
  show figure: set block(above: 0.8em, below: 0.8em)
  show figure.caption: set text(8.5pt)
  // Centred when it takes one line, flush otherwise. A caption above a long table must not stay
  // behind when the table moves to the next page.
  show figure.caption: it => block(
    width: 100%, sticky: it.kind == table, align(center, block(align(left, it.body))),
  )
  show figure.where(kind: table): set figure.caption(position: top)
  show figure.where(kind: table): set block(breakable: true)
  set image(width: 100%)

  set table(stroke: (_, y) => if y == 0 { (bottom: 0.5pt) }, inset: (x: 0.55em, y: 0.28em))
  set table.hline(stroke: 0.5pt)
  show table.cell.where(y: 0): strong
  show table.cell: set par(justify: false)
  show table: it => {
    set text(hyphenate: false)
    show regex("[_/]"): mark => mark + sym.zws  // long identifiers may wrap here
    let columns = if type(it.columns) == int { it.columns } else { it.columns.len() }
    // The largest type in which the table needs no wrapped cells, within reason.
    layout(room => {
      let sizes = if small.get() { (7pt, 6.5pt) } else if columns > 7 { (8pt, 7.5pt, 7pt, 6.5pt) } else { (8.5pt, 8pt) }
      let fits = sizes.find(s => measure(text(s, it)).width <= room.width)
      set text(if fits == none { sizes.last() } else { fits })
      align(center, block(stroke: (top: 0.8pt, bottom: 0.8pt), it))
    })
  }
  body
}

#let title-block(authors, title, subtitle) = {
  set align(center)
  set par(justify: false)
  block(below: 1em, text(18pt, weight: "bold", title))
  block(below: 1em, text(11.5pt, subtitle))
  if authors.len() > 0 { block(authors.join(", ")) }
  v(1em)
}
#let abstract(body) = block(inset: (x: 1.2cm), below: 2em, {
  align(center, strong[Abstract])
  set text(9.5pt)
  body
})
#let picture(key, path, width, caption) = {
  in-order(key)
  figure(
    layout(room => {
      spot("float", key)
      let whole = image(path, width: width * room.width)
      if measure(whole).height > 20cm { image(path, width: auto, height: 20cm) } else { whole }
      spot("end", key)
    }),
    caption: caption, kind: image, placement: place-of(key),
  )
}
#let captioned-table(key, lines, caption, body) = {
  let set-table(placement) = figure(
    { show figure: inner => inner.body; spot("float", key); body; spot("end", key) },  // the body is a figure as well, by pandoc
    caption: caption, kind: table, placement: placement,
  )
  in-order(key)
  if lines <= 26 {
    show figure: set block(breakable: false)
    set-table(place-of(key))
  } else {
    needs(5cm)  // a long table may break, but not after its first rows
    small.update(lines > 30)
    set table(inset: (x: 0.4em, y: 0.22em)) if lines > 30
    set-table(none)
    small.update(false)
  }
}
#let folded(..cells) = block(above: 0.5em, below: 0.5em, sticky: true, text(7.5pt, fill: grey)[
  Code in the appendix: #cells.pos().map(((key, title)) => link(label(key), title)).join([; ]).
])
#let folded-heading(key, title) = [#heading(level: 3, title) #label(key)]
// A link to a heading, or plain text when there is no such heading.
#let goto(key, body) = context {
  let found = query(label(key))
  if found.len() > 0 { link(found.first().location(), body) } else { body }
}
#let sect = sym.inter  // the name that pandoc still writes for \cap
#let horizontalrule = block(
  above: 1.4em, below: 1.4em, width: 100%, align(center, line(length: 30%, stroke: 0.5pt + grey)),
)
"""


# Wide pages of seven columns, so that the plumbing takes few of them and its lines stay whole.
APPENDIX = """#set page(paper: "a1", flipped: true, columns: 7, margin: (x: 1cm, top: 0.8cm, bottom: 1cm), header: none)
#set columns(gutter: 0.4cm)
#code-leading.update(0.3em)
#show heading.where(level: 3): set text(9pt)
#show heading.where(level: 3): set block(above: 0.8em, below: 0.5em)
#code-size.update(6.1pt)"""


PAGE_END, GAP = 841.9 - 38, 100  # points from the top of an A4 page to the end of its text; the largest blank area allowed


class ExportError(Exception):
    """The notebook cannot be turned into a PDF, for the reason in the message."""


def notebook_digest(notebook) -> str:
    """Return the SHA-256 of what a notebook says: cell types, tags, sources and outputs.

    Execution counts, cell ids, timings and widget state are left out: they change from run to
    run, or when the file is merely opened and saved.
    """
    cells = []
    for cell in notebook.cells:
        outputs = []
        for output in cell.get("outputs", []):
            output = {key: value for key, value in output.items() if key != "execution_count"}
            if "data" in output:
                output["data"] = {k: v for k, v in output["data"].items() if "widget" not in k}
            outputs.append(output)
        cells.append([cell.cell_type, sorted(cell.metadata.get("tags", [])), cell.source, outputs])
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def _quote(text: str) -> str:
    """Write a string as a Typst literal."""
    return json.dumps(str(text), ensure_ascii=False)


def _array(items) -> str:
    """Write strings as a Typst array."""
    return "(" + "".join(f"{_quote(item)}, " for item in items) + ")"


def _raw(code: str) -> str:
    """Typst code as a block that pandoc hands on untouched."""
    return f"\n\n```{{=typst}}\n{code}\n```\n\n"


def _marked(text: str) -> str:
    """Markdown whose last line of prose notes where it ends, for `typeset`."""
    last = text.rstrip().rpartition("\n")[2]
    if not last or last[0] in "#!|`":  # a heading, an image, a table, code
        return text
    return text.rstrip() + '`#box(spot("text", ""))`{=typst}\n\n'


def _fenced(text: str, language: str) -> str:
    """A fenced code block, with a fence longer than any inside the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n\n"


def _call(function: str, *blocks: str) -> str:
    """A call of a Typst function whose last arguments are pieces of Markdown."""
    return _raw(f"#{function}[") + _raw("][").join(blocks) + _raw("]")


class ReportPreprocessor(Preprocessor):
    """Turn every cell into Markdown that carries its own layout, as raw Typst around the text.

    Image files are gathered in ``resources["outputs"]``, under the names used in the Markdown.
    """

    def preprocess(self, nb, resources):
        self.folder = Path(resources["metadata"].get("path") or ".")
        self.files = resources["outputs"] = {}
        self.language = nb.metadata.get("language_info", {}).get("name", "python")
        self.appendix, self.pointers, self.texts = [], [], 0
        resources["title"] = resources["metadata"].get("name", "Report")
        resources["authors"] = [author["name"] for author in nb.metadata.get("authors", [])]
        for index, cell in enumerate(nb.cells):
            if cell.cell_type == "code":
                cell.source = self.code_cell(cell)
            elif cell.cell_type == "markdown":
                text = self.prepare(cell.source)
                if "abstract" in cell.metadata.get("tags", []):
                    text = re.sub(r"\A\s*#+ *abstract *\n", "", text, flags=re.IGNORECASE)
                    text = _call("abstract", text)
                elif index == 0 and (match := re.match(r"# (.+)\s*((?:[^#\n].*(?:\n.+)*)?)", text)):
                    # `title` is for the PDF's metadata, where emphasis and math mean nothing.
                    resources["title"] = re.sub(r"[*`$]", "", match[1]).strip()
                    title = f"title-block({_array(resources['authors'])})"
                    text = _call(title, match[1], match[2]) + text[match.end():]
                cell.source = _marked(text)
            if self.pointers and cell.source.strip():  # cells that only define share one line
                cell.source = _raw(f"#folded({', '.join(self.pointers)},)") + cell.source
                self.pointers = []
        nb.cells = [cell for cell in nb.cells if cell.cell_type != "raw"]
        if self.appendix:
            nb.cells.append(nbformat.v4.new_markdown_cell(
                _raw(APPENDIX) + "## Appendix: code of the folded cells\n\n" + "".join(self.appendix)))
        for cell in nb.cells:
            cell.cell_type = "markdown"
        return nb, resources

    def prepare(self, text: str) -> str:
        """Adapt an author's Markdown to pandoc, leaving its code alone."""
        def replace(match):
            if match["math"]:  # on one line: pandoc would see lists in lines such as "- x"
                math = " ".join(match["math"].split())
                # Typst, unlike TeX, leaves no gap between the columns of `cases`.
                math = re.sub(r"\\begin{cases}.*?\\end{cases}",
                              lambda cases: cases[0].replace("&", r"&\quad "), math)
                return f"$${math}$$"
            if match["image"]:
                return f"{match['image']}({self.image_file(match['path'])})"
            if match["note"]:  # a label serves in its own cell only
                return f"[^{self.texts}-"
            return "`\\ `{=typst}" if match["break"] else match[0]

        self.texts += 1
        return re.sub(
            r"^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<ticks>`+)[^`].*?(?<!`)(?P=ticks)(?!`)"
            r"|\$\$(?P<math>.+?)\$\$|(?P<break><br */?>)|(?P<note>\[\^)"
            r"|(?P<image>!\[(?:[^\]\\]|\\.)*\])\((?P<path>[^)\s]+)[^)]*\)",
            replace, text, flags=re.DOTALL | re.MULTILINE)

    def image_file(self, path: str, fallback: bytes | None = None) -> str:
        """Take in the best form of an image, vector before pixels, and return its new name."""
        file = self.folder / path
        candidates = [file.with_suffix(".pdf"), file.with_suffix(".svg"), file] if path else []
        found = next((file for file in candidates if file.is_file()), None)
        if found is None and fallback is None:
            raise ExportError(f"image not found: {path}")
        data, suffix = (found.read_bytes(), found.suffix) if found else (fallback, ".png")
        name = f"image-{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        self.files[name] = data
        return name

    def code_cell(self, cell) -> str:
        """Markdown for a code cell: its source, or a pointer to the appendix, and its outputs."""
        code = _fenced(cell.source, self.language) if cell.source.strip() else ""
        if "comment" in cell.metadata.get("tags", []):
            code = ""
        if code and "hide-input" in cell.metadata.get("tags", []):
            comment = re.search(r"^#[\s#%=-]*(\w.*?)[\s.:=#-]*$", cell.source, re.MULTILINE)
            number = len(self.appendix) + 1
            arguments = f"({_quote(f'folded-{number}')}, "
            arguments += f"{_quote(comment[1] if comment else f'Folded cell {number}')})"
            self.appendix.append(_raw(f"#folded-heading{arguments}") + re.sub(r"\n{3,}", "\n\n", code))
            self.pointers.append(arguments)
            code = ""
        # Progress bars and warnings go first, so that the prints around them come together.
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, 0)
        return code + "".join(map(self.output, cell.outputs))

    def output(self, output) -> str:
        """Markdown for one output of a code cell."""
        if output.output_type == "error":
            return f"\n\n**{output.ename}:** {self.prepare(output.evalue)}\n\n"
        meta, data = output.get("metadata", {}), output.get("data", {})
        if meta.get("caption") or "application/vnd.jupyter.widget-view+json" in data:
            return ""
        if "image/png" in data:
            png = base64.b64decode(data["image/png"])
            if figure := meta.get("figure"):
                path = self.image_file(f"figures/{figure['name']}.pdf", png)
                caption = f"**Figure {figure['number']}.** {self.prepare(figure['caption'])}"
                width = 100 * float(figure.get("width", 1))
                return _call(f"picture({_quote(figure['name'])}, {_quote(path)}, {width:g}%)", caption)
            return f"\n\n![]({self.image_file('', png)})\n\n"
        if "text/markdown" in data:
            text = f"\n\n{self.prepare(data['text/markdown']).strip()}\n\n"
            if table := meta.get("table"):
                caption = f"**Table {table['number']}.** {self.prepare(table['caption'])}"
                head, rows = text.strip().splitlines()[:2], text.strip().splitlines()[2:]
                lines = sum(1 + len(row) // 110 for row in rows)
                if lines > 45:  # two halves side by side
                    half = (len(rows) + 1) // 2
                    sides = ("\n".join(head + part) for part in (rows[:half], rows[half:]))
                    text = _raw("#grid(columns: (1fr, 1fr), gutter: 0.4cm, [") + _raw("], [").join(sides) + _raw("])")
                return _call(f"captioned-table({_quote(table['name'])}, {lines})", caption, text)
            return _marked(text)
        if "text/latex" in data:
            return f"\n\n{self.prepare(data['text/latex'])}\n\n"
        lines = strip_ansi(output.get("text", "") or data.get("text/plain", "")).splitlines()
        text = "\n".join(line for line in lines if not re.search(r"\d%\|.*\|", line))  # no tqdm
        return _fenced(text, "output") if text.strip() else ""


def typeset(body: str, folder: Path) -> bytes:
    """Set the pages. Figures and tables stand in the text, unless that leaves more than GAP of a page blank.

    One that does not fit on its page goes to the next and leaves a gap; from the first page on, those whose gap is too
    large are made to float instead, with those that follow at once, so that the next text fills the page.
    """
    source, floats = folder / "report.typ", []
    while True:  # ends: every round adds to floats
        source.write_text(f"#let floats = {_array(floats)}\n" + TEMPLATE + body, encoding="utf-8")
        spots = [item["value"] for item in json.loads(typst.query(source, "<spot>", root=folder, ignore_system_fonts=True))]
        gaps = [i for i, (before, here) in enumerate(zip(spots, spots[1:]), 1)
                if here["kind"] == "float" and here["key"] not in floats and here["page"] == before["page"] + 1 and PAGE_END - before["y"] > GAP]
        if not gaps:
            break
        following = itertools.takewhile(lambda spot: spot["kind"] != "text", spots[gaps[0]:])
        floats += [spot["key"] for spot in following if spot["kind"] == "float"]
    return typst.compile(source, root=folder, ignore_system_fonts=True)


class ReportExporter(MarkdownExporter):
    """Export a notebook as a typeset report, by way of Markdown and Typst."""

    export_from_notebook = "PDF via Typst"

    @default("file_extension")
    def _file_extension_default(self):
        return ".pdf"

    @default("template_extension")
    def _template_extension_default(self):
        return ".md.j2"

    @property
    def default_config(self):
        config = super().default_config.copy()
        config.merge(Config({
            "ReportExporter": {"preprocessors": [ReportPreprocessor]},
            "TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": {"remove-cell"}},
            # Left on, these would rename the images and mark cells before they are read here.
            "ExtractOutputPreprocessor": {"enabled": False},
            "HighlightMagicsPreprocessor": {"enabled": False},
        }))
        return config

    def from_notebook_node(self, nb, resources=None, **kw):
        """Return the PDF's bytes and the resources."""
        keywords = []
        for number, cell in enumerate(nb.cells, start=1):
            for output in cell.get("outputs", []):
                if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                    raise ExportError(f"cell {number} raised {output.ename}: {output.evalue}")
                provenance = output.get("metadata", {}).get("provenance", {})
                keywords += [f"{key}={value}" for key, value in provenance.items()]
        keywords.append(f"notebook={notebook_digest(nb)}")
        markdown, resources = super().from_notebook_node(nb, resources, **kw)
        try:
            # Wide lines, because pandoc squeezes pipe tables wider than the line; and no
            # warnings, because formulas that pandoc does not understand would be set as TeX.
            body = pypandoc.convert_text(markdown, "typst", format=MARKDOWN, extra_args=[
                "--columns=100000", "--wrap=preserve", "--fail-if-warnings"])
        except RuntimeError as error:
            raise ExportError(f"pandoc: {error}") from error
        # Jupyter's anchors keep capitals and punctuation; pandoc's labels do not.
        body = re.sub(r"#link\(<([^>]+)>\)", lambda match: "#goto({})".format(
            _quote(re.sub(r"[^\w-]", "", match[1].lower()))), body)
        body = re.sub(r'(\w") (\\[(\[])', r"\1\2", body)  # no gap between \operatorname and (
        # After a digit Typst would set an apostrophe as a prime; code is left as it is.
        parts = body.split("```")
        parts[::2] = [re.sub(r"(?<=\d)'(?=s\b)", "\N{RIGHT SINGLE QUOTATION MARK}", part) for part in parts[::2]]
        body = "```".join(parts)
        # These symbols have new names in Typst: \odot is `dot.o`, formerly `dot.circle`.
        body = re.sub(r"\b(dot|times|minus|dash)\.circle\b", r"\1.o", body)
        title = resources["title"]
        running = textwrap.shorten(title.split(": ")[0], 90, placeholder=" …")
        head = f"#show: report.with(title: {_quote(title)}, running: {_quote(running)}, " \
            f"authors: {_array(resources['authors'])}, keywords: {_array(keywords)})\n"
        with tempfile.TemporaryDirectory() as folder:
            for name, data in resources.pop("outputs").items():
                Path(folder, name).write_bytes(data)
            try:
                return typeset(head + body, Path(folder)), resources
            except typst.TypstError as error:
                raise ExportError(f"typst: {error.diagnostic}") from error


def export(notebook_path, pdf_path) -> None:
    """Typeset the notebook at ``notebook_path`` as ``pdf_path``, which is replaced only on success."""
    notebook_path, pdf_path = Path(notebook_path), Path(pdf_path)
    if not notebook_path.is_file():
        raise ExportError(f"no such notebook: {notebook_path}")
    try:
        notebook = nbformat.read(notebook_path, as_version=4)
    except (ValueError, nbformat.ValidationError) as error:
        raise ExportError(f"not a notebook: {notebook_path} ({error})") from error
    resources = {"metadata": {"name": notebook_path.stem, "path": str(notebook_path.parent)}}
    pdf, _ = ReportExporter().from_notebook_node(notebook, resources)
    partial = pdf_path.with_name(f".{pdf_path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(pdf)
        os.replace(partial, pdf_path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Typeset an executed notebook as a PDF.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("pdf", type=Path)
    arguments = parser.parse_args()
    try:
        export(arguments.notebook, arguments.pdf)
    except (ExportError, OSError) as error:
        sys.exit(f"export: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
