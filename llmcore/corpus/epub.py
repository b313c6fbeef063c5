"""The text of a book in EPUB, the packed web pages of electronic books.

See the W3C's EPUB 3.3 and the older EPUB 2.0.1 (Open Packaging Format). All parts are read by the standard library's
parser for HTML: it accepts what real books contain, and expands no entities and loads nothing, so no XML bomb goes off.
"""

from __future__ import annotations

import codecs
import contextlib
import posixpath
import re
from html.parser import HTMLParser
from urllib.parse import unquote

from llmcore.corpus.archives import Archive
from llmcore.files import one_line

MARKUP_BYTES = 1 << 25  # of all pages of a book: eleven million Chinese characters
PACKAGE_BYTES = 1 << 22  # of a list of parts: tens of thousands of them

CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
FONT_ENCRYPTIONS = {"http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#rc"}  # hide fonts, not text

# pages and parts of pages that are no text, as `epub:type`, `properties` and `guide` call them
NOT_TEXT = {"cover", "toc", "landmarks", "page-list", "loi", "lot", "copyright-page", "copyright", "pagebreak"}
HIDDEN = {"head", "script", "style", "rt", "rp", "rtc", "svg", "audio", "video", "iframe", "object"}
EMPTY = {"br", "hr", "img"}
# fmt: off
BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "div", "dl",
    "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "html", "legend", "li", "main", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot",
    "th", "thead", "tr", "ul",
}
# fmt: on

SPACES = re.compile("[ \t\r\f\n]+")
WIDE = "[\u2e80-\u9fff\uff00-\uffef]"
BREAK_IN_CHINESE = re.compile(f"(?<={WIDE})[ \t\r\f]*\n[ \t\r\f\n]*(?={WIDE})")  # no space belongs there
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
DECLARED_ENCODING = re.compile(rb"""(?i)(?:<\?xml[^>]*?encoding|<meta[^>]*?charset)\s*=\s*["']?([\w.:-]+)""")
ENCODINGS = r"utf-8|utf-16-[lb]e|ascii|gb.*|big5.*|shift_jis.*|cp\d+|euc_.*|iso8859-\d+|koi8-[ru]"  # others may be slow
END = "end-of-markup"  # a tag of ours, which is not seen if something before it has no end


def epub_text(archive: Archive) -> str:
    """The text of a book, in the order of reading, a paragraph a line.

    The cover, contents and pages about copyright are left out where the book says which they are. So are pages outside
    of the order of reading (`linear="no"`), pictures, scripts, and the reading aids beside characters (ruby).

    Raises:
        ValueError: if the book is encrypted, damaged, too large, or without text. The message says what to do.
    """
    _refuse_encrypted(archive)
    roots = [attributes for tag, attributes in _tags(archive, CONTAINER) if tag == "rootfile"]
    if not roots:
        raise ValueError(f"{archive.name} is broken: its {CONTAINER} names no package. Get the book anew")
    package = roots[0].get("full-path", "")
    tags = _tags(archive, package)
    items = {attributes.get("id", ""): attributes for tag, attributes in tags if tag == "item"}
    not_text = _pages_without_text(archive, package, tags)

    lines: list[str] = []
    left = MARKUP_BYTES
    for reference in (attributes for tag, attributes in tags if tag == "itemref"):
        name = reference.get("idref", "")
        if name not in items:
            raise ValueError(f"{archive.name} names a page {one_line(name)!r}, but does not list it: get it anew")
        page = _resolved(package, items[name].get("href", ""))
        is_picture = items[name].get("media-type", "").startswith("image/")
        if is_picture or page in not_text or reference.get("linear") == "no":
            continue
        content = archive.read(page, left)
        left -= len(content)
        reader = _TextReader()
        reader.read(content, f"{one_line(page)} in {archive.name}")
        lines += reader.lines

    if not lines:
        raise ValueError(f"{archive.name} holds no text (its pages may be pictures): remove it")
    return "\n".join(lines) + "\n"


# The package: which pages there are


def _refuse_encrypted(archive: Archive) -> None:
    """Raise ValueError if more than fonts is encrypted."""
    if ENCRYPTION not in archive.members:
        return
    tags = _tags(archive, ENCRYPTION)
    methods = {attributes.get("algorithm", "").lower() for tag, attributes in tags if tag == "encryptionmethod"}
    if any(tag == "encrypteddata" for tag, _ in tags) and not (methods and methods <= FONT_ENCRYPTIONS):
        raise ValueError(f"{archive.name} is encrypted for the readers of a shop: remove it, or get it without DRM")


def _pages_without_text(archive: Archive, package: str, tags: list[tuple[str, dict[str, str]]]) -> set[str]:
    """The pages that are wholly cover, contents or about copyright, as the book's guide and landmarks say."""
    guide = [attributes for tag, attributes in tags if tag == "reference"]  # EPUB 2
    pages = {
        _resolved(package, link["href"])
        for link in guide
        if link.get("type", "").lower() in NOT_TEXT and _is_page(link)
    }

    navigation = [attributes for tag, attributes in tags if "nav" in attributes.get("properties", "").split()]  # EPUB 3
    if navigation:  # a book has one
        page = _resolved(package, navigation[0].get("href", ""))
        landmarks = [attributes for tag, attributes in _tags(archive, page) if tag == "a"]
        pages |= {page, *(_resolved(page, link["href"]) for link in landmarks if _is_not_text(link) and _is_page(link))}
    return pages


def _is_not_text(attributes: dict[str, str]) -> bool:
    return not NOT_TEXT.isdisjoint(attributes.get("epub:type", "").lower().split())


def _is_page(attributes: dict[str, str]) -> bool:
    """Whether a link means a page, and not a place in one, which may hold more."""
    return "#" not in attributes.get("href", "#")


def _resolved(page: str, link: str) -> str:
    """The path in the archive that a link in a page means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(link.partition("#")[0])))


def _tags(archive: Archive, name: str) -> list[tuple[str, dict[str, str]]]:
    """All start tags of a part, without prefixes, and their attributes, in lower case."""
    reader = _TagReader()
    reader.read(archive.read(name, PACKAGE_BYTES), f"{one_line(name)} in {archive.name}")
    return reader.tags


# Markup


class _Reader(HTMLParser):
    """The standard library's parser, but what is broken is refused.

    It is never closed: it would try to make sense of a tag or comment without an end, in time that grows with the
    square of the size.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.has_ended = False

    def read(self, content: bytes, what: str) -> None:
        """Parse a whole part.

        Raises:
            ValueError: naming `what`, if it is in no known encoding, breaks off, or declares entities.
        """
        markup = _decoded(content, what)
        if "<!ENTITY" in markup:
            raise ValueError(f"{what} declares entities of its own, which may grow without bound: remove the book")
        with contextlib.suppress(AssertionError):  # some versions raise it for odd markup
            self.feed(f"{markup}<{END}>")
        if not self.has_ended:
            raise ValueError(f"{what} is broken: a tag, comment or script in it has no end. Get the book anew")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == END:
            self.has_ended = True
        else:
            self.start(tag, {name: value or "" for name, value in attrs})

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Called at each start tag."""


class _TagReader(_Reader):
    """Collects start tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.tags.append((tag.rpartition(":")[2], attributes))


class _TextReader(_Reader):
    """Collects the text of a page, a paragraph a line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._line: list[str] = []
        self._hidden, self._depth = "", 0  # the tag whose content is left out, and how many of it are open
        self._is_preformatted = False

    def read(self, content: bytes, what: str) -> None:
        super().read(content, what)
        if self._hidden:
            raise ValueError(f"{what} is broken: <{one_line(self._hidden)}> has no end. Get the book anew")
        self._end_line()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "body":  # a head may lack its end
            self._hidden = ""
        if self._hidden:
            self._depth += tag == self._hidden
            return
        if tag in BLOCKS:
            self._end_line()
        if tag in HIDDEN or (_is_not_text(attributes) and tag not in EMPTY):
            self._hidden, self._depth = tag, 1
        self._is_preformatted |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._depth -= tag == self._hidden
            if not self._depth or tag == "ruby":  # an rt may lack its end
                self._hidden = ""
        if tag in BLOCKS:
            self._end_line()
        self._is_preformatted &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._line.append(data)

    def unknown_decl(self, data: str) -> None:
        if data.startswith("CDATA["):
            self.handle_data(data.removeprefix("CDATA["))

    def _end_line(self) -> None:
        text, self._line = "".join(self._line), []
        if self._is_preformatted:
            lines = [line.rstrip("\r") for line in text.split("\n")]
        else:
            lines = [SPACES.sub(" ", BREAK_IN_CHINESE.sub("", text)).strip(" ")]
        self.lines += [line for line in lines if line.strip()]


def _decoded(content: bytes, what: str) -> str:
    """The characters of a page: in the encoding of its byte order mark, of its declaration, or in UTF-8.

    Raises:
        ValueError: naming `what`, if it is none of the usual encodings, or the bytes do not fit it.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if content.startswith(mark)), b"")
    declared = DECLARED_ENCODING.search(content[:1024])
    if mark:
        encoding = BYTE_ORDER_MARKS[mark]
    elif content[:2] in (b"<\0", b"\0<"):
        encoding = "utf-16-le" if content[:1] == b"<" else "utf-16-be"
    elif declared and not declared[1].lower().startswith(b"utf-16"):  # that would not be seen in UTF-16
        encoding = declared[1].decode("ascii")
    else:
        encoding = "utf-8"

    try:
        known = codecs.lookup(encoding).name
        if not re.fullmatch(ENCODINGS, known):
            raise LookupError
        return content.removeprefix(mark).decode({"gb2312": "gb18030", "gbk": "gb18030"}.get(known, known))
    except LookupError:
        raise ValueError(f"{what} is in the encoding {encoding!r}, which is not read: convert the book") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not {encoding}: byte {error.start} is 0x{content[error.start]:02x}. Get the book anew"
        ) from None
