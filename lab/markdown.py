"""Markdown as Jupyter shows it, as pandoc's tree with the images read, HTML turned into what it means and links that lead somewhere."""

import base64
import hashlib
import html
import json
import re
import tempfile
import warnings
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import pypandoc

# Jupyter reads CommonMark (a list needs no blank line before it, for example), so pandoc must too.
MARKDOWN = "commonmark+tex_math_dollars+pipe_tables+footnotes+strikeout+task_lists+autolink_bare_uris+smart+gfm_auto_identifiers"
IMAGES = {"image/svg+xml": ".svg", "application/pdf": ".pdf", "image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/webp": ".webp"}
# Tags whose meaning pandoc keeps, or that only say how their text looks.
KNOWN = set("a p div span sub sup b strong i em s del u br hr img wbr center font small big mark ins code kbd samp var tt pre q blockquote "
            "cite abbr ul ol li dl dt dd h1 h2 h3 h4 h5 h6 table thead tbody tfoot tr td th caption colgroup col details summary figure "
            "figcaption section style".split())
BAR = "\ue002"  # a bar within math, which would end a cell of a table
BOUNDARY = "boundary-of-parts"  # between the Markdown texts of one call of pandoc
MATH = "equation|align|gather|multline|eqnarray|alignat|flalign"


class ExportError(Exception):
    """The notebook cannot be turned into a PDF, for the reason in the message."""


def quote(text):
    """A string as a Typst literal."""
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def math(tex):
    """TeX with what pandoc does not set well replaced: equation numbers, norms, and the gap between the columns of `cases`."""
    tex = re.sub(r"\\tag\*?{([^{}]*)}", r"\\qquad\\text{(\1)}", tex)
    tex = re.sub(r"(?<!left)(?<!right)\\\|(.+?)(?<!left)(?<!right)\\\|", r"\\lVert \1\\rVert ", tex)
    return re.sub(r"\\begin{cases}.*?\\end{cases}", lambda cases: cases[0].replace("&", r"&\quad "), tex, flags=re.DOTALL)


def anchor(name):
    """A heading's anchor without pandoc's prefix for the text it stands in; Jupyter's keep capitals and punctuation, pandoc's do not."""
    return re.sub(r"^.*\dmd__|[^\w-]", "", unquote(name).lower())


def strange(page):
    """The first tag in HTML whose meaning pandoc would not keep, or None."""
    return next((tag for tag in re.findall(r"<!--.*?-->|</?([a-zA-Z][\w-]*)", page, re.DOTALL) if tag and tag.lower() not in KNOWN), None)


def pandoc(source, to, reader, *options):
    """What pandoc makes of a text, or of files; raises ExportError where it warns, as of math that it cannot read."""
    try:
        convert = pypandoc.convert_file if isinstance(source, list) else pypandoc.convert_text
        return convert(source, to, format=reader, extra_args=["--fail-if-warnings", "--wrap=preserve", "--columns=100000", *options])
    except RuntimeError as error:
        raise ExportError(f"pandoc: {' '.join(str(error).split())}") from error


def raw(code, kind="RawBlock"):
    """A node of pandoc's tree that holds Typst code."""
    return {"t": kind, "c": ["typst", code]}


def document(blocks):
    """Blocks of pandoc's tree as the document that pandoc reads."""
    return json.dumps({"pandoc-api-version": [1, 23, 1], "meta": {}, "blocks": blocks}, ensure_ascii=False)


def _markdown(text):
    """Markdown in which pandoc sees the math that Jupyter sees; code is left alone."""
    def replace(match):
        math = match["display"] or match["bare"] or match["bracket"]
        if math:  # on one line, as pandoc would see a list in a line such as "- x"
            return f"$${' '.join(math.split())}$$"
        if match["inline"]:  # Jupyter allows blanks beside the dollars, and bars in tables
            return f"${match['inline'].strip().replace('|', BAR)}$"
        return match[0]

    return re.sub(
        r"^ *(?P<fence>```+|~~~+).*?^ *(?P=fence)|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|\\\$|\$\$(?P<display>.+?)\$\$"
        rf"|(?P<bare>\\begin{{(?P<name>(?:{MATH})\*?)}}.+?\\end{{(?P=name)}})|\\\\\[(?P<bracket>.+?)\\\\\]"
        r"|\$(?P<inline>(?=\S)(?:[^$\n]|\n(?!\s*\n))+(?<=[^\s\\])| [^$\n]+ )\$(?!\d)", replace, text, flags=re.DOTALL | re.MULTILINE)


def _title(texts):
    """The words of the first heading, "" where there is none; at level 1 it is set as the title, with a paragraph below it as subtitle."""
    for blocks in texts:
        for i, block in enumerate(blocks):
            if block["t"] == "Header":
                level, _, words = block["c"]
                below = [below for below in blocks[i + 1:i + 2] if below["t"] == "Para"]
                if level == 1:
                    code = [raw("]["), *below, raw("]")] if below else [raw("][]")]
                    blocks[i:i + 1 + len(below)] = [raw("#title-block["), {"t": "Plain", "c": words}, *code]
                return " ".join(pandoc(document([{"t": "Plain", "c": words}]), "plain", "json").split())
    return ""


class Reader:
    """Reads the parts of a notebook in a folder; `files` are the images that its tree names, by name."""

    def __init__(self, folder):
        self.folder, self.files, self.held = Path(folder), {}, []

    def missing(self, what):
        """Typst code that stands for what cannot be set, and a warning."""
        warnings.warn(f"not set in the PDF: {what}", stacklevel=2)
        return f"#missing({quote(what)})"

    def picture(self, data, suffix, width="auto"):
        """Typst code for an image's bytes; pixels are set at 96 to the inch, or finer where the file says so."""
        if suffix == ".svg" and b"foreignObject" in data:
            return self.missing("the HTML inside an SVG image")
        name = hashlib.sha256(data).hexdigest()[:16] + suffix
        self.files[name] = data
        said = re.search(rb"pHYs(.{4}).{4}\x01", data[:4096], re.DOTALL) if suffix == ".png" else None
        density = int.from_bytes(said[1], "big") * 0.0254 if said else 72  # 72 is what Typst takes where nothing is said
        return f"#picture({quote(name)}, {1 if suffix in ('.svg', '.pdf') else min(1, density / 96):g}, width: {width})"

    def image(self, node, attachments):
        """Typst code for an image of pandoc's tree: an attachment of its own cell, a data URL, or a file, vector before pixels."""
        url, keys = unquote(node["c"][2][0]), dict(node["c"][0][2])
        said = re.match(r"(?:.*?\bwidth: *)?([\d.]+)(%|px|$)", keys.get("width") or keys.get("style") or "")
        width = (f"{said[1]}%" if said[2] == "%" else f"{0.75 * float(said[1])}pt") if said else "auto"
        if url.startswith("attachment:"):
            bundle = attachments.get(url[11:]) or attachments.get(node["c"][2][0][11:]) or {}
            kind = next((kind for kind in bundle if kind in IMAGES), None)
            if not kind:
                raise ExportError(f"no attachment {url[11:]} in its cell")
            data = bundle[kind] if isinstance(bundle[kind], str) else "".join(bundle[kind])
            return self.picture(data.encode() if data.lstrip().startswith("<") else base64.b64decode(data), IMAGES[kind], width)
        if found := re.match(r"data:([\w/+.-]+)[^,]*?(;base64)?,(.*)", node["c"][2][0], re.DOTALL):
            if found[1] not in IMAGES:
                return self.missing(f"an image of type {found[1]}")
            return self.picture(base64.b64decode(unquote(found[3])) if found[2] else unquote_to_bytes(found[3]), IMAGES[found[1]], width)
        if re.match(r"\w+:|//", url):
            return self.missing(f"the image {url}, which is not a file here")
        file = self.folder / url
        if file.parent.name == "figures" and file.with_suffix(".pdf").is_file():
            file = file.with_suffix(".pdf")
        if not file.is_file():
            raise ExportError(f"image not found: {url}")
        suffix = file.suffix.lower().replace(".jpeg", ".jpg")
        return self.picture(file.read_bytes(), suffix, width) if suffix in IMAGES.values() else self.missing(f"the image {url}")

    def tree(self, parts):
        """The blocks of pandoc's tree for parts, in order; `title` is that of the report.

        One call of pandoc reads all Markdown, each text by itself, as Jupyter does.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, f"{i}.md") for i, (kind, _, _) in enumerate(parts) if kind == "markdown"]
            for file in files:
                file.write_text(f"```{BOUNDARY}\n{file.stem}\n```\n\n{_markdown(parts[int(file.stem)][1])}\n", encoding="utf-8")
            read = pandoc([str(file) for file in files], "json", MARKDOWN, "--file-scope") if files else document([])
        texts = {}
        for block in json.loads(read.replace(BAR, "|"))["blocks"]:
            if block["t"] == "CodeBlock" and block["c"][0][1] == [BOUNDARY]:
                here = texts[int(block["c"][1])] = []
            else:
                here.append(block)
        self.names = {anchor(block["c"][1][0]): None for found in texts.values() for block in found if block["t"] == "Header"}
        self.title, blocks = _title(list(texts.values())), []
        for i, (kind, text, attachments) in enumerate(parts):
            found = [raw(text)] if kind == "typst" else texts[i] if kind == "markdown" else [{"t": "RawBlock", "c": ["html", text]}]
            blocks += self.walk(found, attachments)
        return blocks

    def walk(self, node, attachments):
        """A piece of pandoc's tree with images read, HTML turned into what it means, and links that lead somewhere."""
        if isinstance(node, list):
            new = []
            for item in self.tags(node):
                item = self.walk(item, attachments)
                new += item["splice"] if isinstance(item, dict) and "splice" in item else [item]
            return new
        if not isinstance(node, dict) or "c" not in node:
            return node
        kind, inner = node["t"], node["c"]
        text = inner if kind == "Str" else inner[1] if kind == "Code" else ""
        if "\ue000" in text:
            pieces = re.split("\ue000(\\d+)\ue001", text)
            return {"splice": self.walk([self.held[int(s)] if i % 2 else {"t": "Str", "c": s} for i, s in enumerate(pieces) if s], attachments)}
        if kind == "Image":
            return raw(f"#box({self.image(node, attachments)[1:]})", "RawInline")
        if kind == "Para" and [item["t"] for item in inner] == ["Image"]:
            code, words = f"#shown[{self.image(inner[0], attachments)}][", inner[0]["c"][1]
            if not words or words[-1].get("c") == Path(inner[0]["c"][2][0].partition(":")[2]).name:  # Jupyter's name for what is pasted
                return raw(code + "]")
            return {"splice": [raw(code), *self.walk([{"t": "Plain", "c": words}], attachments), raw("]")]}
        if kind == "RawBlock" and inner[0] == "html":
            if tag := strange(inner[1]):
                return raw(self.missing(f"HTML with <{tag}>: {inner[1].strip()[:200]}"))
            blocks = json.loads(pandoc(inner[1], "json", "html"))["blocks"]
            return {"splice": self.walk([block | {"t": block["t"].replace("Plain", "Para")} for block in blocks], attachments)}
        if kind == "Math":
            return {"t": kind, "c": [inner[0], math(inner[1])]}
        inner = self.walk(inner, attachments)
        if kind == "Link" and inner[2][0].startswith("#"):
            name = anchor(inner[2][0][1:])
            return {"t": kind, "c": [inner[0], inner[1], ["#" + name, ""]]} if name in self.names else {"splice": inner[1]}
        if kind == "Header":
            name = anchor(inner[1][0])
            inner[1][0], self.names[name] = "" if self.names.get(name) else name, True  # a link leads to the first of its name
        return {"t": kind, "c": inner}

    def tags(self, nodes):
        """A list of inline nodes, with pandoc's reading of the HTML tags among them; what is more than words is held until they are read."""
        if not any(isinstance(node, dict) and node["t"] == "RawInline" and node["c"][0] == "html" for node in nodes):
            return nodes
        page = ""
        for node in nodes:
            tag = node["c"][1] if node["t"] == "RawInline" else ""
            if node["t"] in ("Str", "Space", "SoftBreak"):
                page += html.escape(node.get("c", " "))
            elif tag and not strange(tag):
                page += tag
            else:
                page += f"\ue000{len(self.held)}\ue001"
                self.held.append(raw(self.missing(f"HTML {tag}"), "RawInline") if tag else node)
        return [inline for block in json.loads(pandoc(page, "json", "html"))["blocks"] for inline in block["c"]]
