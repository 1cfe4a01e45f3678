"""Text of PDF files, good and bad."""

from __future__ import annotations

import contextlib
import io

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from vllm_mlx.chat import pdf as module
from vllm_mlx.chat.pdf import PdfTexts, pdf_text
from vllm_mlx.core.errors import InvalidRequest


def pdf(*pages: str, password: str | None = None) -> bytes:
    """A file with a line of text on each page; an empty one has none."""
    writer = pypdf.PdfWriter()
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")})
    font[NameObject("/BaseFont")] = NameObject("/Helvetica")
    for text in pages:
        page = writer.add_blank_page(200, 200)
        if text:
            fonts = DictionaryObject({NameObject("/F1"): font})
            page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
            content = DecodedStreamObject()
            content.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
            page[NameObject("/Contents")] = writer._add_object(content)
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_text_of_each_page_is_read() -> None:
    assert (
        pdf_text(pdf("one river", "", "two lakes"), param="p")
        == "Page 1:\none river\n\nPage 2:\n\n\nPage 3:\ntwo lakes"
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no PDF file"),
        (b"hello", "no PDF file"),
        (pdf("one river")[:200], "no PDF file"),
        (pdf(""), "no text"),
        (pdf("secret", password="x"), "encrypted"),
    ],
)
def test_file_without_readable_text_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        pdf_text(data, param="messages.0.content.0.source")
    assert caught.value.param == "messages.0.content.0.source"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 600), st.binary(min_size=1, max_size=12))
@pytest.mark.filterwarnings("ignore")
def test_damaged_file_is_read_or_refused(position: int, damage: bytes) -> None:
    good = pdf("one river")
    with contextlib.suppress(InvalidRequest):
        pdf_text(good[:position] + damage + good[position + len(damage) :], param="p")


def test_same_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def counted(data: bytes, *, param: str) -> str:
        asked.append(data)
        return pdf_text(data, param=param)

    monkeypatch.setattr(module, "pdf_text", counted)
    texts, river, lake = PdfTexts(max_chars=40), pdf("one river"), pdf("two lakes")
    assert texts.text(river, param="p") == texts.text(river, param="q") == "Page 1:\none river"
    assert "two lakes" in texts.text(lake, param="p")
    assert asked == [river, lake]
    texts.text(pdf("three seas"), param="p")
    texts.text(river, param="p")
    assert asked[-1] == river


def test_file_that_cannot_be_read_is_refused_each_time() -> None:
    texts = PdfTexts()
    for param in ("p", "q"):
        with pytest.raises(InvalidRequest, match="no PDF file") as caught:
            texts.text(b"hello", param=param)
        assert caught.value.param == param
