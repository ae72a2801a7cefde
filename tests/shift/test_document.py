"""A report shows the characters of what it is given, and takes none of them for its own markup."""

import html.parser
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shift.report.document import (
    Code,
    Heading,
    Items,
    Key,
    Paragraph,
    Picture,
    Share,
    Table,
    markdown,
    web_page,
)
from shift_kernels import ShiftInputError

NASTY = [
    "a | b",
    "a \\| b",
    "<script>alert(1)</script>",
    "<!-- not to be seen",
    "](javascript:alert(1))",
    "[click](https://example.org)",
    "![x](y)",
    "[x]: https://example.org",
    "[ ] to do",
    "# no heading",
    "no heading #",
    "*a* __b__ _c_ ~~d~~ $e$",
    "`code` ``",
    "line\n# heading\n\n- item\r\u2028| cell |",
    "- item",
    "12. item",
    "> quotation",
    "---",
    "===",
    "    code",
    "&lt;b&gt;",
    "back\\slash\\",
    '" onload="alert(1)',
    "{body}{title}",
    "\x1b[31m\x00\u202e",
    "\ud800",
    "",
]
MARKUP = r"\`*<&|~$#"
texts = st.one_of(
    st.sampled_from(NASTY), st.text(st.sampled_from("\\`*_{}[]()<>#+-.!|~$&:= \n\tab1é"), max_size=20)
)
examples = [example(text) for text in NASTY]


def with_examples(test):
    for add in examples:
        test = add(test)
    return test


def shown(text):
    """The characters that a reader is to see of a text."""
    text = re.sub("[\t-\r\x1c-\x1e\x85\u2028\u2029]+", " ", text)
    return re.sub("[\x00\x1b\u202e\ud800]", "\ufffd", text)


def document(text):
    return [
        Heading(text),
        Paragraph(text),
        Paragraph(text, "lead"),
        Items([text, (text, " and ", text)], "note"),
        Table(["Name", text], [[text, Key(text, "#123456")], [Share(0.5, text), (text, "x")]]),
    ]


@with_examples
@given(texts)
def test_in_markdown_every_mark_of_a_text_stands_behind_a_backslash(text):
    written = markdown("t", [Paragraph(("x", text, "x"))], None).splitlines()
    assert len(written) == 3  # whatever line breaks the text holds
    line = written[2]
    pairs = re.findall(r"\\(.)|(.)", line)
    assert "".join(a or b for a, b in pairs) == f"x{shown(text)}x"
    bare = "".join(b or "x" for _, b in pairs)
    assert not set(bare) & set(MARKUP)
    assert not re.search(r"\]\(|\]\[|\]:|!\[", bare)
    assert not re.search(r"(?<![^\W_])_|_(?![^\W_])", bare)


@with_examples
@given(texts)
def test_no_text_changes_the_blocks_of_the_markdown(text):
    def bones(text):
        lines = markdown(text, document(text), None).splitlines()
        opens = [re.match(r"(#+|[-+*]|\d+[.)])(?= |$)|---|>|\||", line)[0] for line in lines]
        cells = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines]
        return opens, cells

    assert bones(text if text.strip() else "x") == bones("plain")


@with_examples
@given(texts)
def test_no_text_adds_a_tag_or_an_attribute_to_the_web_page(text):
    class Tags(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.words = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, attributes))

        def handle_data(self, data):
            self.words.append(data)

    def read(text):
        tags = Tags()
        tags.feed(web_page(text, document(text)))
        return tags

    nasty, plain = read(text), read("plain")
    assert nasty.tags == plain.tags
    assert "".join(nasty.words).count(shown(text)) >= 11


@pytest.mark.parametrize("text", ["a`b", "``", "`", " a ", "a|b", "\n", "<b>"])
def test_code_may_hold_backticks_and_strokes(text):
    line = markdown("t", [Paragraph(("x ", Code(text)))], None).splitlines()[2]
    if text.strip():
        fence = re.fullmatch(r"x (`+)( ?)(.*?)\2\1", line)
        assert fence[3] == shown(text) if fence[2] else text
        assert fence[1] not in fence[3]
    table = markdown("t", [Table(["x"], [[(Code(text),)]])], None).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", table)) == 2


@pytest.mark.parametrize("colour", ["red", "#12345", "#123456;x", "#12345g", '"><b>', "#123456\n"])
def test_a_colour_that_is_none_is_refused(colour):
    with pytest.raises(ShiftInputError, match="'colour'"):
        Key("x", colour)


@pytest.mark.parametrize("block", [Paragraph, lambda text, kind: Items([text], kind)])
def test_a_kind_that_is_none_is_refused(block):
    with pytest.raises(ShiftInputError, match="'kind'"):
        block("x", 'note" onload="')


def test_a_picture_is_found_whatever_its_path_and_caption(tmp_path):
    path = tmp_path / "a (b) [c].png"
    path.write_bytes(b"png")
    picture = Picture(path, '"[x](y)" <b>')
    text = markdown("t", [picture], tmp_path)
    assert "](a%20%28b%29%20%5Bc%5D.png)" in text
    assert 'alt="&quot;[x](y)&quot; &lt;b&gt;"' in web_page("t", [picture])
