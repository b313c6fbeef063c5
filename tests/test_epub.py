"""The text of electronic books: in the order of reading, without what is no text, and without harm."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.corpus import epub
from llmcore.corpus.containers import Member, OpenFile
from tests.helpers import examples

CONTAINER = """<?xml version="1.0"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
  <rootfiles><rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>"""
XHTML = '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml">'


def page(body: str) -> str:
    return f"{XHTML}<head><title>A title</title><style>p {{}}</style></head>\n<body>\n{body}\n</body></html>"


def package(pages: dict[str, str], spine: str = "", end: str = "") -> str:
    """A package file. `pages` gives attributes of each page, by its link; the spine names all unless it is given."""
    items = "\n".join(
        f'<item id="i{number}" href="{link}" media-type="application/xhtml+xml" {attributes}/>'
        for number, (link, attributes) in enumerate(pages.items())
    )
    spine = spine or "".join(f'<itemref idref="i{number}"/>' for number in range(len(pages)))
    return (
        '<?xml version="1.0"?>\n<opf:package xmlns:opf="http://www.idpf.org/2007/opf" version="3.0"><opf:metadata>'
        f"<dc:title>书</dc:title></opf:metadata><manifest>{items}</manifest><spine>{spine}</spine>{end}</opf:package>"
    )


def book(folder: Path, opf: str, parts: Mapping[str, str | bytes]) -> Path:
    path = folder / "书.epub"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        for name, content in {"META-INF/container.xml": CONTAINER, "OEBPS/content.opf": opf, **parts}.items():
            archive.writestr(name, content)
    return path


def book_of(folder: Path, *pages: str | bytes) -> Path:
    """A book whose pages are given whole, in the order of reading."""
    parts = {f"OEBPS/{number}.xhtml": content for number, content in enumerate(pages)}
    return book(folder, package({f"{number}.xhtml": "" for number in range(len(pages))}), parts)


def text(path: Path) -> str:
    with OpenFile(path) as file:
        assert file.encoding == "utf-8"
        assert list(file.members()) == [Member()]
        return file.open(Member()).read().decode()


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"书\.epub") as error:
        text(path)
    return str(error.value)


# Whole books


def test_a_book_in_epub_3_is_read_in_the_order_of_its_spine(tmp_path: Path) -> None:
    nav = page(
        '<nav epub:type="toc"><ol><li><a href="text/c%201.xhtml">第一回</a></li></ol></nav>'
        '<nav epub:type="landmarks"><a epub:type="cover" href="cover.xhtml">封面</a>'
        '<a epub:type="copyright-page" href="text/rights.xhtml">版权</a>'
        '<a epub:type="toc" href="text/c%201.xhtml#inside">目录</a></nav>'
    )
    pages = {
        "text/c%201.xhtml": "",
        "text/../第二回.xhtml": "",
        "nav.xhtml": 'properties="scripted nav"',
        "cover.xhtml": "",
        "text/rights.xhtml": "",
        "note.xhtml": "",
        "p.svg": "",
    }
    opf = package(
        pages, "".join(f'<itemref idref="i{n}"/>' for n in (3, 2, 4, 1, 0)) + '<itemref idref="i5" linear="no"/>'
    )
    parts = {
        "OEBPS/nav.xhtml": nav,
        "OEBPS/cover.xhtml": page("<p>cover</p>"),
        "OEBPS/text/rights.xhtml": page("<p>rights</p>"),
        "OEBPS/note.xhtml": page("<p>note</p>"),
        "OEBPS/text/c 1.xhtml": page("<h1>第一回</h1><p>滚滚长江</p>"),
        "OEBPS/第二回.xhtml": page("<h1>第二回</h1>"),
    }
    assert text(book(tmp_path, opf, parts)) == "第二回\n第一回\n滚滚长江\n"


def test_a_book_in_epub_2_is_read_without_what_its_guide_names(tmp_path: Path) -> None:
    pages = {"cover.html": "", "toc.html": "", "rights.html": "", "a.html": "", "b.html": ""}
    guide = (
        '<guide><reference type="cover" href="cover.html"/><reference type="toc" href="toc.html"/>'
        '<reference type="copyright-page" href="rights.html"/><reference type="text" href="a.html"/>'
        '<reference type="toc" href="b.html#contents"/></guide>'
    )
    parts = {f"OEBPS/{name}": page(f"<p>{name}</p>") for name in pages}
    assert text(book(tmp_path, package(pages, end=guide), parts)) == "a.html\nb.html\n"


def test_pages_that_are_pictures_are_passed_over(tmp_path: Path) -> None:
    opf = package({"a.xhtml": "", "p.svg": ""}).replace(
        'p.svg" media-type="application/xhtml+xml', 'p.svg" media-type="image/svg+xml'
    )
    assert text(book(tmp_path, opf, {"OEBPS/a.xhtml": page("<p>a</p>")})) == "a\n"


# Markup


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<h1>一</h1>text <b>bold</b> <i>i</i><div>二<p>三</p>四</div>", "一\ntext bold i\n二\n三\n四\n"),
        ("<p>a<br/>b<br>c</p>", "a\nb\nc\n"),
        ("<p>\n  one\n  two\t three </p>", "one two three\n"),
        ("<p>滚滚长江\n    东逝水，\r\n浪花</p>", "滚滚长江东逝水，浪花\n"),
        ("<p>\u3000\u3000浪花</p><p>&nbsp;</p><p/><p> </p>", "\u3000\u3000浪花\n"),
        ("<p>a &lt;b&gt; &amp; &hellip; &#x4e09;&#22269; &unknown; AT&T</p>", "a <b> & … 三国 &unknown; AT&T\n"),
        ("<p><ruby>銀河<rp>(</rp><rt>ぎんが</rt><rp>)</rp></ruby>鉄道</p>", "銀河鉄道\n"),
        ("<p><ruby>銀<rt>ぎん</ruby>鉄道</p>", "銀鉄道\n"),
        ('<p>a<script>if (1 < 2) x = "<p>"</script><script src="x"/>b</p><style>p</style>', "ab\n"),
        ("<svg><title>Cover</title></svg><p>a<!-- <p>no</p> -->b</p>", "ab\n"),
        ('<p>a<span epub:type="pagebreak" title="7">7</span>b<hr epub:type="pagebreak"/>c</p>', "ab\nc\n"),
        ('<section epub:type="toc"><section>x</section>y</section><section epub:type="chapter">z</section>', "z\n"),
        ("<pre>a\n  b\n</pre><p>c\nd</p>", "a\n  b\nc d\n"),
        ("<p>a<![CDATA[ <b> & ]]>c</p>", "a <b> & c\n"),
        ("<p>1 < 2 and 3 > 2</p>", "1 < 2 and 3 > 2\n"),
        ('<p title="a > b">c', "c\n"),
        ("<table><tr><td>a</td><td>b</td></tr></table><ul><li>c<li>d</ul>", "a\nb\nc\nd\n"),
        ("<P>A</P>", "A\n"),
    ],
)
def test_markup_becomes_lines(tmp_path: Path, body: str, expected: str) -> None:
    assert text(book_of(tmp_path, page(body))) == expected


def test_a_head_without_an_end_does_not_hide_the_body(tmp_path: Path) -> None:
    assert text(book_of(tmp_path, "<html><head><title>x</title><body><p>a</p>")) == "a\n"


@pytest.mark.parametrize(
    ("start", "encoding"),
    [
        ("", "utf-8"),
        ("\ufeff", "utf-8"),
        ("\ufeff", "utf-16-le"),
        ("\ufeff", "utf-16-be"),
        ('<?xml version="1.0" encoding="UTF-16"?>', "utf-16-le"),
        ('<?xml version="1.0" encoding="UTF-16"?>', "utf-8"),
        ('<?xml version="1.0" encoding="gb2312"?>', "gb18030"),
        ("<?xml version='1.0' encoding='Big5'?>", "big5"),
        ('<html><head><meta http-equiv="Content-Type" content="text/html; charset=GBK"/></head>', "gbk"),
        ("<html><head><META charset=shift_jis></head>", "shift_jis"),
    ],
)
def test_the_encoding_is_the_one_that_a_page_declares(tmp_path: Path, start: str, encoding: str) -> None:
    assert text(book_of(tmp_path, f"{start}<p>中山</p>".encode(encoding))) == "中山\n"


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1, max_size=5))
@settings(max_examples=examples(40), deadline=None)
def test_any_paragraphs_come_back(tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]) -> None:
    escaped = (line.replace("&", "&amp;").replace("<", "&lt;") for line in paragraphs)
    path = book_of(tmp_path_factory.mktemp("book"), page("".join(f"<p>{line}</p>" for line in escaped)))
    assert text(path) == "\n".join(paragraphs) + "\n"


# What is refused


@pytest.mark.parametrize(
    "content",
    [
        "<p>a<!-- no end",
        '<p>a</p><p class="no end',
        "<p>a<script>no end",
        "<p>a</p><svg><p>no end",
        "<!-- " * 100_000,
        "<a b='" * 99_999,
        "<![CDATA[ ]" * 50_000,
        "</" * 200_000,
    ],
)
def test_a_page_that_breaks_off_is_refused(tmp_path: Path, content: str) -> None:
    assert "0.xhtml in " in refusal(book_of(tmp_path, content))


@pytest.mark.parametrize("entity", ['"&b;&b;"', 'SYSTEM "file:///etc/passwd"', '% b "x"'])
@pytest.mark.parametrize("place", ["OEBPS/0.xhtml", "OEBPS/content.opf", "META-INF/container.xml"])
def test_entities_of_its_own_are_refused(tmp_path: Path, entity: str, place: str) -> None:
    bomb = f'<?xml version="1.0"?><!DOCTYPE html [<!ENTITY b "b"><!ENTITY a {entity}>]><html><p>&a;</p></html>'
    path = book(tmp_path, package({"0.xhtml": ""}), {"OEBPS/0.xhtml": page("a"), place: bomb})
    assert f"{place} in " in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<p>\xff</p>", "is not utf-8: byte 3 is 0xff"),
        (b'<?xml version="1.0" encoding="punycode"?><p>a</p>', "'punycode', which is not read"),
        (b'<?xml version="1.0" encoding="zip"?><p>a</p>', "'zip', which is not read"),
        (b'<?xml version="1.0" encoding="nonsense"?><p>a</p>', "'nonsense', which is not read"),
        (b'<?xml version="1.0" encoding="gbk"?><p>\xb0', "is not gbk"),
    ],
)
def test_a_page_in_no_known_encoding_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(book_of(tmp_path, content))


def test_a_book_for_the_readers_of_a_shop_is_refused(tmp_path: Path) -> None:
    def encryption(*methods: str) -> str:
        data = "".join(
            f'<enc:EncryptedData><enc:EncryptionMethod Algorithm="{method}"/></enc:EncryptedData>' for method in methods
        )
        return f'<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#">{data}</encryption>'

    fonts = ["http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC"]
    for methods, is_read in (
        (fonts, True),
        ([], True),
        ([*fonts, "http://www.w3.org/2001/04/xmlenc#aes128-cbc"], False),
    ):
        parts = {"OEBPS/0.xhtml": page("<p>a</p>"), "META-INF/encryption.xml": encryption(*methods)}
        path = book(tmp_path, package({"0.xhtml": ""}), parts)
        if is_read:
            assert text(path) == "a\n"
        else:
            assert "DRM" in refusal(path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    def missing(opf: str, parts: Mapping[str, str]) -> str:
        return refusal(book(tmp_path, opf, parts)).partition(" is missing")[0].partition(" in ")[0]

    assert missing(package({"0.xhtml": ""}), {}) == "OEBPS/0.xhtml"
    assert missing(package({"../up.xhtml": ""}), {}) == "up.xhtml"
    assert missing("", {"META-INF/container.xml": '<rootfile full-path="a.opf"/>'}) == "a.opf"
    assert "names no package" in refusal(book(tmp_path, "", {"META-INF/container.xml": "<container/>"}))
    assert "a page 'i7'" in refusal(book(tmp_path, package({"0.xhtml": ""}, '<itemref idref="i7"/>'), {}))


def test_a_zip_that_is_no_book_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "书.epub", "w") as archive:
        archive.writestr("a.txt", "a")
    assert "META-INF/container.xml in " in refusal(tmp_path / "书.epub")


def test_a_book_without_text_is_refused(tmp_path: Path) -> None:
    assert "no text" in refusal(book_of(tmp_path, page('<img src="1.jpg"/>')))
    assert "no text" in refusal(book(tmp_path, package({}), {}))


def test_the_pages_of_a_book_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epub, "MARKUP_BYTES", 10_000)
    content = page(f"<p>{'a' * 4000}</p>")
    assert len(text(book_of(tmp_path, content, content))) == 8002
    assert "2.xhtml in " in refusal(book_of(tmp_path, content, content, content))
    opf = package({"0.xhtml": ""}, '<itemref idref="i0"/>' * 3)
    assert "more than" in refusal(book(tmp_path, opf, {"OEBPS/0.xhtml": content}))


def test_only_the_first_of_many_navigation_pages_is_read(tmp_path: Path) -> None:
    pages = {"nav.xhtml": 'properties="nav"', "0.xhtml": "", "missing.xhtml": 'properties="nav"'}
    opf = package(pages, '<itemref idref="i1"/>')
    parts = {"OEBPS/nav.xhtml": page("<p>nav</p>"), "OEBPS/0.xhtml": page("<p>a</p>")}
    assert text(book(tmp_path, opf, parts)) == "a\n"


def test_a_part_that_grows_without_bound_is_refused(tmp_path: Path) -> None:
    assert "content.opf in " in refusal(book(tmp_path, " " * 5_000_000, {}))
    assert "grows" in refusal(book_of(tmp_path, " " * 20_000_000))
