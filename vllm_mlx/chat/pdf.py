"""Text of PDF files, for models that see no pages."""

from __future__ import annotations

import hashlib
import io

from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.kept import Kept

MAX_PAGES = 1000
MAX_KEPT_CHARS = 16 * 1024 * 1024
"""Of all texts together that `PdfTexts` keeps."""
_BREAKAGES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    OSError,
    AssertionError,
)
"""What broken files do to their reader, besides its own errors."""


def pdf_text(data: bytes, *, param: str) -> str:
    """The text of all pages, each behind a line with its number. It may take seconds: call it on a thread.

    Raises:
        InvalidRequest: the file cannot be read, is encrypted, has more than `MAX_PAGES` pages, or no text at all.
    """
    import pypdf
    from pypdf.errors import DependencyError, PyPdfError

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InvalidRequest(f"{param}: the PDF file is encrypted; send it without a password.", param=param)
        if len(reader.pages) > MAX_PAGES:
            message = f"{param}: the PDF file has {len(reader.pages)} pages; at most {MAX_PAGES} are read."
            raise InvalidRequest(message, param=param)
        pages = [page.extract_text().strip() for page in reader.pages]
    except (PyPdfError, DependencyError, NotImplementedError, *_BREAKAGES) as error:
        raise InvalidRequest(f"{param}: this is no PDF file that can be read.", param=param) from error
    if not any(pages):
        message = f"{param}: the PDF file has no text, and this model cannot see its pages; send their text."
        raise InvalidRequest(message, param=param)
    return "\n\n".join(f"Page {number}:\n{text}" for number, text in enumerate(pages, start=1))


class PdfTexts:
    """Texts of the files that were read last: clients send a conversation's files again with every turn.

    For any thread.
    """

    def __init__(self, *, max_chars: int = MAX_KEPT_CHARS) -> None:
        self._kept: Kept[bytes, str] = Kept(max_chars, weigh=lambda _, text: len(text))

    def text(self, data: bytes, *, param: str) -> str:
        """What `pdf_text` makes of the file, and what it raises."""
        key = hashlib.sha256(data).digest()
        text = self._kept.get(key)
        if text is None:
            text = pdf_text(data, param=param)
            self._kept.add(key, text)
        return text
