"""Text to token ids and back, on the `tokenizers` library alone: the server process never loads transformers for it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from vllm_mlx.chat import model_files
from vllm_mlx.chat.model_files import TextFacts
from vllm_mlx.chat.pieces import piece_decoder
from vllm_mlx.chat.segments import SegmentEncoder, Segments
from vllm_mlx.core.errors import ModelError

_OTHER_VOCABULARIES = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """A model's vocabulary, special tokens, chat template and recommended sampling. Safe to use from threads."""

    def __init__(self, backend: tokenizers.Tokenizer, facts: TextFacts) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._facts = facts
        self._add_tokens()
        self._set_post_processor()
        self._segments = SegmentEncoder(backend)
        decoder = piece_decoder(backend)
        self._piece_to_bytes = decoder.to_bytes
        self.strip_start = decoder.strip_start
        """Spaces that are taken off the beginning of a whole text."""
        self._bytes: dict[int, bytes] = {}
        self.special_ids = self._find_special_ids()
        """Tokens that are not part of the text."""
        self.eos_token_ids = self._find_eos_ids()
        """Tokens that end a turn: the tokenizer's own and those of the model's configuration files."""

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Read the tokenizer of a model folder.

        `trust_remote_code` matters only where there is no tokenizer.json and transformers has to convert.

        Raises:
            ModelError: there is none, or a file is malformed; the message names the file.
        """
        # one text at a time gains nothing from the library's thread pool, which also warns when the process forks
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        facts = model_files.read(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return cls(_convert(folder, trust_remote_code=trust_remote_code), facts)
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}.") from error
        return cls(backend, facts)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text. `add_special_tokens` adds what the model wants around raw text, often a first BOS.

        The GIL is released while it runs, so a long text can be encoded on a thread.
        """
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def segments(self, text: str) -> Segments:
        """A text as `encode` gives it without adding tokens, and where parts of it end; what it shares with texts
        before it is not encoded again.
        """
        return Segments(text, self._segments)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD."""
        shown = [i for i in token_ids if not (skip_special_tokens and i in self.special_ids)]
        text = b"".join(map(self.token_bytes, shown)).decode("utf-8", errors="replace")
        return text[len(text[: self.strip_start]) - len(text[: self.strip_start].lstrip(" ")) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to a text; they may be a part of a character. Empty for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._backend.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if piece is None else self._piece_to_bytes(piece)
        return found

    def token_text(self, token_id: int) -> str:
        """The text of one token on its own, U+FFFD where its bytes are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def serialised(self) -> str:
        """The whole tokenizer in the format of tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def token_id(self, piece: str) -> int | None:
        """The id of an entry of the vocabulary."""
        found: int | None = self._backend.token_to_id(piece)
        return found

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model's logits may be wider."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token: a text has at least as many tokens as this goes into it."""
        return max((len(self.token_bytes(token_id)) for token_id in range(self.vocab_size)), default=0) or 1

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role to text, such as 'eos_token' to '</s>'."""
        return self._facts.special_tokens

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a sequence."""
        return self._facts.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a sequence."""
        return self._facts.special_tokens.get("eos_token")

    @property
    def chat_template(self) -> str | None:
        """Source of the Jinja template; None for a base model."""
        return self._facts.chat_template

    @property
    def model_type(self) -> str:
        """The model's type according to its configuration; empty if it has none."""
        return self._facts.model_type

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Fields of `SamplingParams` that the model recommends."""
        return self._facts.generation_defaults

    @property
    def max_length(self) -> int | None:
        """Longest sequence according to the model's files, if they say."""
        return self._facts.max_length

    def _add_tokens(self) -> None:
        """Tokens that only tokenizer_config.json knows get the ids it gives them."""
        for added in self._facts.added_tokens:
            if self._backend.token_to_id(added.content) is not None:
                continue
            self._backend.add_tokens([tokenizers.AddedToken(added.content, special=added.special, normalized=False)])
            found = self._backend.token_to_id(added.content)
            if found != added.id:
                raise ModelError(
                    f"tokenizer_config.json gives {added.content!r} the id {added.id}, but after the tokens of "
                    f"tokenizer.json it would get {found}: make the two files agree."
                )

    def _set_post_processor(self) -> None:
        """An explicit `add_bos_token` or `add_eos_token` replaces the tokenizer's own rule, as in transformers 5."""
        if self._facts.add_bos is None and self._facts.add_eos is None:
            return
        bos = self.bos_token if self._facts.add_bos else None
        eos = self.eos_token if self._facts.add_eos else None
        ids = [(token, self._backend.token_to_id(token)) for token in (bos, eos) if token is not None]
        if any(token_id is None for _, token_id in ids):
            raise ModelError(f"The vocabulary lacks one of the special tokens {[token for token, _ in ids]}.")
        around = [bos, "$A", eos]
        self._backend.post_processor = processors.TemplateProcessing(
            single=[part for part in around if part is not None], special_tokens=ids
        )

    def _find_special_ids(self) -> frozenset[int]:
        flagged = [i for i, added in self._backend.get_added_tokens_decoder().items() if added.special]
        named = [self._backend.token_to_id(token) for token in self._facts.special_tokens.values()]
        return frozenset([*flagged, *(i for i in named if i is not None)])

    def _find_eos_ids(self) -> frozenset[int]:
        own = self._backend.token_to_id(self.eos_token) if self.eos_token is not None else None
        return self._facts.eos_token_ids | ({own} if own is not None else set())


def _convert(folder: Path, *, trust_remote_code: bool) -> tokenizers.Tokenizer:
    """Have transformers make a fast tokenizer of SentencePiece, tiktoken or other files."""
    if not any((folder / name).is_file() for name in (*_OTHER_VOCABULARIES, "tokenizer_config.json")):
        raise ModelError(f"{folder} has no tokenizer: tokenizer.json is missing.")
    try:
        # resolved at run time: loading transformers takes seconds and only models without tokenizer.json need it
        auto = importlib.import_module("transformers").AutoTokenizer
        found = auto.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        backend = found.backend_tokenizer.to_str()
        return tokenizers.Tokenizer.from_buffer(backend.encode())
    except (OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{folder} has no tokenizer.json, and transformers cannot make one of its other files: {reason[0]}"
        ) from error
