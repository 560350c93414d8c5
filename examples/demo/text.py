"""English text that every Python carries: what the demo's model is trained on, calibrated with and measured on.

The text is the documentation behind `help("topic")` (the module `pydoc_data.topics`) and the docstrings and comments of
the standard library, all under the PSF licence. Modules are parsed, never imported. The text follows the running
Python, so perplexities are comparable under one Python version, not across versions.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sysconfig
import textwrap
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

# One topic in five is held out. The name decides, so a topic is on the same side under every Python version.
_HELD_OUT_SHARE = 5

# Packages that were installed later are not Python's text; the encodings are tables that repeat one docstring.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data"}

# Curly quotes, dashes, the no-break space and the ellipsis become the ASCII that docstrings use.
_TYPOGRAPHIC = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\xa0", "''\"\"-- ") | {0x2026: "..."}

_ROLE = re.compile(r":[a-z:]+:`[~!]?([^`]*)`")
_EMPHASIS = re.compile(r"\*{1,2}([\w.]+)\*{1,2}")
_WORD = re.compile(r"[A-Za-z][a-z']*[,;:.]?$")
_FIRST_OF_PROSE = re.compile(r"[A-Z\"'(]")
_BULLET = re.compile(r"^[*-] ")


@functools.cache
def training_text(characters: int | None = None) -> str:
    """The training documents as one text, with a blank line between paragraphs and between documents.

    characters: where to stop. All of it, 2.5 million characters, takes half a minute; the first 200,000 a moment.
    """
    documents: list[str] = []
    size = 0
    for document in training_documents():
        documents.append(document)
        size += len(document) + 2
        if characters is not None and size >= characters:
            break
    return "\n\n".join(documents)[:characters]


def held_out_text() -> str:
    """The topics that no training document quotes, laid out like the training text."""
    return "\n\n".join("\n\n".join(_paragraphs(text)) for _, text in sorted(_topics(held_out=True)))


def training_documents() -> Iterator[str]:
    """Yields topics, then docstrings and comments, file by file: take as many as you need.

    Topics quote each other and modules repeat each other, so a paragraph is given once, and never if it is held out.
    """
    seen = {paragraph for _, text in _topics(held_out=True) for paragraph in _paragraphs(text)}
    for document in _all_training_documents():
        fresh = [paragraph for paragraph in dict.fromkeys(_paragraphs(document)) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            yield "\n\n".join(fresh)


def _topics(held_out: bool) -> list[tuple[str, str]]:
    """Names and texts of the topics on one side of the split."""
    return [(name, text) for name, text in topics.items() if _is_held_out(name) == held_out]


def _is_held_out(topic: str) -> bool:
    return zlib.crc32(topic.encode()) % _HELD_OUT_SHARE == 0


def _all_training_documents() -> Iterator[str]:
    for _, text in sorted(_topics(held_out=False)):
        yield text
    for path in _library_sources():
        source = path.read_bytes()
        try:
            yield from _docstrings(source)
            yield from _comments(source)
        except SyntaxError:  # The library ships a few files that are broken on purpose.
            continue


def _library_sources() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    return [library / file for file in sorted(files) if not _SKIPPED_FOLDERS.intersection(file.parts)]


def _docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _comments(source: bytes) -> Iterator[str]:
    """Yields runs of comment lines, blank lines between them included; a comment behind code is not one."""
    run: list[str] = []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            run.append(token.string.lstrip("#").removeprefix(" "))
        elif token.type == tokenize.NL:
            run += [] if token.line.strip() else [""]
        elif run:
            yield "\n".join(run)
            run = []


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of prose in a document, each as one line; code, tables, grammars and headings are dropped."""
    blocks = re.split(r"\n[ \t]*\n", text.translate(_TYPOGRAPHIC))
    return [paragraph for block in blocks for paragraph in map(_unwrap, _split_list(block)) if _is_prose(paragraph)]


def _split_list(block: str) -> list[str]:
    """Cuts a block before each of its bullets."""
    return re.split(r"\n(?=[ \t]*[*-] )", textwrap.dedent(block))


def _unwrap(block: str) -> str:
    """Joins the lines of a block and takes the markup off."""
    line = _BULLET.sub("", " ".join(block.split()))
    return _EMPHASIS.sub(r"\1", _ROLE.sub(r"\1", line)).replace("`", "")


def _is_prose(paragraph: str) -> bool:
    """Whether a line is a sentence or more: it starts and ends like one, and most of it is words."""
    words = paragraph.split()
    if len(words) < 4 or not _FIRST_OF_PROSE.match(paragraph) or paragraph.rstrip("\"')")[-1:] not in tuple(".:!?"):
        return False
    if ">>>" in paragraph or "::=" in paragraph or not paragraph.isascii():
        return False
    return sum(_WORD.match(word) is not None for word in words) >= 0.7 * len(words)
