"""Names and offsets of tokens that are no whole characters."""

from __future__ import annotations

from vllm_mlx.api.wire.completion_encoder import CompletionEncoder
from vllm_mlx.api.wire.usage import AnswerHead
from vllm_mlx.core.events import TextDelta, TokenInfo, TopLogprob


def test_partial_characters_are_named_by_their_bytes() -> None:
    euro = "€".encode()
    tokens = tuple(
        TokenInfo("\N{REPLACEMENT CHARACTER}", part, -1.0, (TopLogprob("\N{REPLACEMENT CHARACTER}", part, -1.0),))
        for part in (euro[:1], euro[1:])
    )
    after = TokenInfo("!", b"!", -1.0)
    encoder = CompletionEncoder(AnswerHead("id", "m", 0, "fp"), has_logprobs=True, include_usage=False)
    (chunk,) = encoder.chunks(TextDelta(0, "€!", (*tokens, after)))
    logprobs = chunk.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["bytes:\\xe2", "bytes:\\x82\\xac", "!"]
    assert list(logprobs.top_logprobs[0]) == ["bytes:\\xe2"]
    assert logprobs.text_offset == [0, 1, 1]
