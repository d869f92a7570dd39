"""Typeset an executed notebook as a PDF with pip-installed tools only: pandoc reads the Markdown, Typst sets the pages.

Only fonts inside the Typst wheel are used and no date is written: the same notebook gives the same PDF on every machine.
What cannot be set is never dropped: it raises `ExportError`, or leaves a framed note in its place and a warning.

The notebook says what to do by
* cell tags: `abstract`; `hide-input` or `appendix` (the code goes to the appendix); `remove-input` (the code is not printed);
* output metadata: `{"figure": {"name", "number", "caption"}}`, set from figures/NAME.pdf where that exists,
  `{"table": {"name", "number", "caption"}}`, and `{"caption": true}`: the same caption for Jupyter, left out here.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import unicodedata
import warnings
from pathlib import Path

import nbformat
import typst

from lab.markdown import IMAGES, ExportError, Reader, document, pandoc, quote, strange

TEXTS = ("text/markdown", "text/latex", "application/json", "text/html", "text/plain")
APPENDIX = """#set page(columns: 2, margin: (x: 1.2cm, top: 1.3cm, bottom: 1.4cm))
#set columns(gutter: 0.4cm)
#show raw.where(block: true): listing.with(5.6pt, gap: 0.3em, inset: (x: 1pt, y: 2pt))
#show heading.where(level: 3): set text(6.5pt)
#show heading.where(level: 3): set block(above: 0.7em, below: 0em)
#heading(level: 2)[Appendix: plotting code]"""


def _outputs(cell):
    """A cell's outputs with neighbouring pieces of one stream joined, as they are shown."""
    joined = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1] = nbformat.from_dict({**joined[-1], "text": joined[-1].text + output.text})
        else:
            joined.append(output)
    return joined


def notebook_digest(book):
    """SHA-256 of what a notebook shows: cell types, tags, sources, attachments, outputs; not counts, ids, times or widgets' state."""
    cells = []
    for cell in book.cells:
        outputs = [{k: v for k, v in out.items() if k != "execution_count"} for out in _outputs(cell)]
        for out in outputs:
            out["data"] = {k: None if "widget" in k else v for k, v in out.get("data", {}).items()}
        cells.append([cell.cell_type, sorted(cell.metadata.get("tags", [])), cell.source, cell.get("attachments", {}), outputs])
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def _plain(text):
    """Text as a terminal shows it: no colours, after a carriage return only what was written last, no control characters."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b.", "", text).replace("\r\n", "\n")
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text).strip("\n").rstrip()


def _typst(code):
    """Typst code as a list of one part."""
    return [("typst", code, {})]


def _call(function, *bodies):
    """Parts that call a Typst function whose last arguments are lists of parts."""
    return [part for i, body in enumerate(bodies) for part in _typst("][" if i else f"{function}[") + body] + _typst("]")


class _Report(Reader):
    """Turns cells into parts, `(kind, text, attachments)` with kind "typst", "markdown" or "html"; `appendix` gathers those of moved code."""

    def __init__(self, folder, language):
        super().__init__(folder)
        self.language, self.appendix = language, []

    def cell(self, cell, number):
        """The parts of one cell: its text, or its code where it stands in place and its outputs."""
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "raw":
            return _typst(f"#printed({quote(cell.source)})")
        if cell.cell_type == "markdown":
            attachments = cell.get("attachments", {})
            if "abstract" in tags:
                return _call("#abstract", [("markdown", re.sub(r"\A\s*#+ *abstract *\n", "", cell.source, flags=re.IGNORECASE), attachments)])
            return [("markdown", cell.source, attachments)]
        parts, outputs = [], _outputs(cell)
        marks = [(kind, v) for out in outputs for kind, v in out.get("metadata", {}).items() if kind in ("figure", "table")]
        if cell.source.strip() and "remove-input" not in tags:
            code = f"#raw({quote(cell.source)}, block: true, lang: {quote(self.language)}, tab-size: 4)"
            if tags & {"hide-input", "appendix"}:  # found there by what it makes
                made = ", ".join(f"{kind.capitalize()} {v['number']}" for kind, v in marks)
                self.appendix += (_typst(f"#heading(level: 3, {quote(made)})") if made else []) + _typst(code)
            else:
                parts += _typst(code)
        for output in outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                raise ExportError(f"cell {number} raised {output.ename}: {output.evalue}")
            shown = output.get("data", {}).get("text/markdown", "")
            if not (output.get("metadata", {}).get("caption") and any(v["caption"] in shown for _, v in marks)):
                parts += self.output(output)
        return parts

    def output(self, output):
        """The parts of one output."""
        if output.output_type == "stream":
            text = _plain(output.text)
            return _typst(f"#printed({quote(text)}{', color: orange' if output.name == 'stderr' else ''})") if text else []
        if output.output_type == "error":
            words = (output.ename, _plain(output.evalue), _plain("\n".join(output.traceback)))
            return _typst(f"#failed({', '.join(map(quote, words))})")
        for kind in ("figure", "table"):
            if mark := output.metadata.get(kind):
                vector = self.folder / "figures" / f"{mark['name']}.pdf"
                if kind == "figure" and vector.is_file():
                    body = _typst(self.picture(vector.read_bytes(), ".pdf"))
                else:
                    body = self.bundle(output.data, output.metadata)
                caption = [("markdown", f"**{kind.capitalize()} {mark['number']}.** {mark['caption']}", {})]
                return _call(f"#numbered({'true' if kind == 'table' else 'false'})", caption, body)
        return self.bundle(output.data, output.metadata)

    def bundle(self, data, metadata):
        """The parts of a bundle: its best form, and a note for every form that is not known."""
        unknown = [name for name in data if name not in IMAGES and name not in TEXTS]
        parts = [part for name in unknown for part in _typst(self.missing(f"an output of type {name}"))]
        for kind, suffix in IMAGES.items():
            if kind in data:
                image = data[kind].encode() if suffix == ".svg" else base64.b64decode(data[kind])
                width = (metadata.get(kind) or {}).get("width")
                return parts + _typst(f"#shown[{self.picture(image, suffix, f'{0.75 * width}pt' if width else 'auto')}][]")
        for kind in ("text/markdown", "text/latex"):
            if kind in data:
                return parts + [("markdown", data[kind], {})]
        if "application/json" in data:
            text = json.dumps(data["application/json"], indent=1, ensure_ascii=False)
            return parts + _typst(f'#printed({quote(text)}, lang: "json")')
        text, page = _plain(data.get("text/plain", "")), data.get("text/html", "")
        told = text and not re.fullmatch(r"<[\w.]+( [^<>]*)?>", text)  # more than the name of an object
        if page and (not strange(page) or not told):
            return parts + [("html", page, {})]
        return parts + (_typst(f"#printed({quote(text)})") if text and (told or not unknown) else [])


def _compile(blocks, head, folder):
    """The PDF's bytes. Characters that no font has are printed as their code; a warning names each."""
    absent = {}
    while True:
        tree = document(blocks).translate(absent)
        body = pandoc(tree, "typst-smart", "json")
        body = re.sub(r'(\w") (\\[(\[])', r"\1\2", body)  # no gap between \operatorname and (
        body = re.sub(r"\b(dot|times|plus|minus)\.circle\b", r"\1.o", body)  # pandoc writes Typst's former names
        (folder / "report.typ").write_text(head + body, encoding="utf-8", errors="replace")
        try:  # this standard refuses characters that no font has; what else it refuses does not matter here
            typst.compile(folder / "report.typ", root=folder, ignore_system_fonts=True, pdf_standards="a-2b")
            found = ""
        except typst.TypstError as error:
            found = "".join(re.findall(r'the text `"(.+?)"` could not be displayed', error.diagnostic))
        found = re.sub(r"\\u{(\w+)}", lambda code: chr(int(code[1], 16)), found)
        new = {ord(c): f"\u27e6U+{ord(c):04X}\u27e7" for c in found if ord(c) > 127 and ord(c) not in absent}
        if not new:
            break
        for code, shown in new.items():
            warnings.warn(f"no font has {chr(code)} {unicodedata.name(chr(code), '')}: {shown} in the PDF", stacklevel=2)
        absent |= new
        for file in folder.glob("*.svg"):
            file.write_text(file.read_text(encoding="utf-8").translate(absent), encoding="utf-8")
    try:
        pdf, said = typst.compile_with_warnings(folder / "report.typ", root=folder, ignore_system_fonts=True)
    except typst.TypstError as error:
        raise ExportError(f"typst: {error.diagnostic}") from error
    for message in {warning.message for warning in said}:
        warnings.warn(f"typst: {message}", stacklevel=2)
    return pdf


def export(notebook_path, pdf_path, keywords=()):
    """Typeset the notebook at `notebook_path` as `pdf_path`, replaced only on success, with `keywords` among the PDF's metadata.

    Raises ExportError where a cell raised (but for those with the tag `raises-exception`), an image is not there or math cannot be read.
    """
    notebook_path, pdf_path = Path(notebook_path), Path(pdf_path)
    try:
        book = nbformat.read(notebook_path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ExportError(f"not a notebook: {notebook_path} ({error})") from error
    report = _Report(notebook_path.parent, book.metadata.get("language_info", {}).get("name", "python"))
    parts = [part for number, cell in enumerate(book.cells, 1) for part in report.cell(cell, number)]
    if report.appendix:
        parts += _typst(APPENDIX) + report.appendix
    blocks = report.tree(parts)
    title = report.title or notebook_path.stem
    head = f'#import "pdf.typ": *\n#show: report.with({quote(title)}, ({"".join(quote(word) + ", " for word in keywords)}))\n'
    with tempfile.TemporaryDirectory() as folder:
        for name, data in {"pdf.typ": Path(__file__).with_name("pdf.typ").read_bytes(), **report.files}.items():
            Path(folder, name).write_bytes(data)
        pdf = _compile(blocks, head, Path(folder))
    partial = pdf_path.with_name(f".{pdf_path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(pdf)
        os.replace(partial, pdf_path)
    finally:
        partial.unlink(missing_ok=True)
