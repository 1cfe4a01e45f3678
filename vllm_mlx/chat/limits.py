"""What a request may ask for, checked before anything of it runs."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence

from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ContextLengthExceeded, InvalidRequest, OutputLimitExceeded
from vllm_mlx.core.sampling import SamplingParams


def check_text(text: str, tokenizer: Tokenizer, *, max_model_len: int, param: str) -> None:
    """Refuse a text that cannot be encoded, or that is far too long, without the work of encoding it."""
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest("The text has half of a surrogate pair, which is not a character.", param=param) from error
    if size_bytes <= max_model_len:
        return
    min_tokens = size_bytes // tokenizer.max_token_bytes
    if min_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"{_context(max_model_len)}, prompt and output together, but the prompt has at least {min_tokens}. "
            f"Shorten the {param}.",
            param=param,
            num_tokens=min_tokens,
            max_tokens=max_model_len - 1,
        )


def _context(max_model_len: int) -> str:
    """How such an error begins: by these words of OpenAI's, agents know that they must compact their conversation."""
    return f"This model's maximum context length is {max_model_len} tokens"


def check_token_ids(token_ids: Collection[int], *, vocab_size: int, param: str) -> None:
    """Refuse ids that the model has no embedding for. `param` may hold `{}` for the id at fault."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise InvalidRequest(
        f"Token id {wrong} is outside the model's vocabulary: ids are 0 to {vocab_size - 1}.",
        param=param.format(wrong),
    )


def check_sampling(sampling: SamplingParams, *, vocab_size: int, config: Config) -> None:
    """Refuse what does not depend on the prompt's length."""
    check_token_ids(sampling.logit_bias, vocab_size=vocab_size, param="logit_bias.{}")
    check_token_ids(sampling.allowed_token_ids or (), vocab_size=vocab_size, param="allowed_token_ids")
    check_token_ids(sampling.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    if sampling.max_tokens is not None and sampling.max_tokens > config.max_request_tokens:
        raise OutputLimitExceeded(
            f"max_tokens must be at most {config.max_request_tokens}, not {sampling.max_tokens}.",
            param="max_tokens",
            num_tokens=sampling.max_tokens,
            max_tokens=config.max_request_tokens,
        )


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The words in tokens, within a word and at the beginning of one, each once.

    Raises:
        InvalidRequest: the tokenizer makes nothing of a word.
    """
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        check_text(word, tokenizer, max_model_len=4 * len(word), param=f"bad_words.{index}")
        bare = word.lstrip()
        spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")]
        if not all(spelled):
            raise InvalidRequest(f"The tokenizer has no tokens for {word!r}.", param=f"bad_words.{index}")
        found.update(dict.fromkeys(spelled))
    return tuple(found)


def max_output_tokens(
    sampling: SamplingParams,
    *,
    num_prompt: int,
    max_model_len: int,
    default: int,
    param: str,
    may_be_shorter: bool = False,
) -> int:
    """How many tokens may be generated; `default` applies where the request names no number, as far as there is room.

    `may_be_shorter`: so does the number that the request names.

    Raises:
        ContextLengthExceeded: prompt and output do not fit together.
        InvalidRequest: the prompt is empty, or min_tokens cannot be reached.
    """
    if num_prompt == 0:
        raise InvalidRequest("The prompt is empty: it must have at least one token.", param=param)
    room = max_model_len - num_prompt
    if room < 1:
        raise ContextLengthExceeded(
            f"{_context(max_model_len)}, prompt and output together, but the prompt has {num_prompt} tokens. "
            f"Shorten the {param}.",
            param=param,
            num_tokens=num_prompt,
            max_tokens=max_model_len - 1,
        )
    if sampling.max_tokens is not None and sampling.max_tokens > room and not may_be_shorter:
        raise ContextLengthExceeded(
            f"{_context(max_model_len)}, but the prompt has {num_prompt} tokens and max_tokens asks for "
            f"{sampling.max_tokens} more. Shorten the {param} or set max_tokens to at most {room}.",
            param=param,
            num_tokens=num_prompt,
            max_tokens=max_model_len - 1,
        )
    limit = min(sampling.max_tokens or default, room)
    if sampling.min_tokens > limit:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}, but at most {limit} tokens are generated.", param="min_tokens"
        )
    return limit


def choice_seeds(seed: int | None, num_choices: int) -> list[int]:
    """One seed for each choice of a prompt: the first is the request's own, the others follow from it."""
    if seed is None:
        return [secrets.randbits(63) for _ in range(num_choices)]
    return [seed, *(_derive(seed, index) for index in range(1, num_choices))]


def _derive(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
