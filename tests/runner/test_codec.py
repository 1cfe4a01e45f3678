"""Pages and checkpoints survive as bytes: written elsewhere, or into another runner, they give the same tokens."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from driven import prompts
from plain_kernels import PlainKernels
from stepped import Hand, payloads_of

from vllm_mlx.core.step import Runner, Step
from vllm_mlx.runner import device
from vllm_mlx.runner.checkpoints import Checkpoint
from vllm_mlx.runner.codec import DTYPES, PagePart, decode_checkpoint, encode_checkpoint, join_pages, split_pages

Open = Callable[..., Runner]
SHARED, SUFFIX, OTHER = prompts(64, 26, 90, seed=6)
WHOLE = (*SHARED, *SUFFIX)
STAND_IN = pytest.param(
    PlainKernels(), id="kernels", marks=pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own")
)
PLACES = pytest.mark.parametrize("kernels", [pytest.param(None, id="own"), STAND_IN])


def exported_prefix(hand: Hand) -> tuple[bytes, ...]:
    """Bytes of the pages, and of the checkpoint, that `SHARED` filled in slot 0."""
    has_state = bool(hand.runner.info.checkpoint_bytes)
    new = hand.new(0, WHOLE)
    taken = ((0, 3),) if has_state else ()
    hand.run(Step(0, new=(new,), prefills=(hand.prefill(0, 0, 64),), checkpoints=taken))
    # Read before the same step drops and overwrites them.
    hand.pages[1], hand.tokens[1] = hand.pages[0], list(OTHER)
    other = hand.new(1, OTHER)
    hand.pages[1] = hand.pages[0]
    wanted = hand.everywhere(hand.pages[0][:2])
    step = Step(0, released=(0,), exports=wanted, new=(other,), prefills=(hand.prefill(1, 0),))
    gone = Step(0, checkpoint_exports=(3,), dropped=(3,)) if has_state else Step(0)
    result = hand.run(step)
    exported = (*payloads_of(result), *payloads_of(hand.run(gone)))
    hand.run(Step(0, released=(1,)))
    assert all(len(payload) == hand.runner.info.cache.page_bytes for payload in payloads_of(result))
    return exported


def import_and_go_on(hand: Hand, payloads: tuple[bytes, ...], num_tokens: int) -> list[int]:
    """Tokens of a sequence that starts from the payloads, in the step that takes them in."""
    num_pages = len(hand.everywhere((1, 2))) if hand.runner.info.num_pages else 0
    new = hand.new(2, WHOLE, num_cached=64, checkpoint=9 if payloads[num_pages:] else None)
    imports = tuple(zip(hand.everywhere(hand.pages[2][:2]), payloads[:num_pages], strict=False))
    states = tuple((9, payload) for payload in payloads[num_pages:])
    step = Step(0, imports=imports, checkpoint_imports=states, new=(new,), prefills=(hand.prefill(2, 64),))
    result = hand.run(step)
    assert result.checkpoint_bytes == ((hand.runner.memory().checkpoints,) if states else ())
    hand.generate(2, num_tokens - 1)
    return hand.tokens[2][-num_tokens:]


def check_that_bytes_stand_for_a_prefix(open_one: Callable[[], Runner]) -> None:
    hand = Hand(open_one())
    expected = hand.cold(5, WHOLE, 8)
    payloads = exported_prefix(hand)
    assert import_and_go_on(hand, payloads, 8) == expected
    elsewhere = Hand(open_one())
    elsewhere.cold(5, OTHER, 2)
    assert import_and_go_on(elsewhere, payloads, 8) == expected
    assert exported_prefix(Hand(open_one())) == payloads


@PLACES
@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_pages_go_out_and_come_back(dtype: str, kernels: Any, open_runner: Open) -> None:
    check_that_bytes_stand_for_a_prefix(lambda: open_runner("llama", kernels=kernels, kv_cache_dtype=dtype))


@PLACES
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "qwen3_next"])
def test_pages_of_several_kinds_go_out_and_come_back(name: str, kernels: Any, open_runner: Open) -> None:
    check_that_bytes_stand_for_a_prefix(lambda: open_runner(name, kernels=kernels))


@pytest.mark.parametrize("name", ["mamba2", "deepseek_v3", "llama4", "gemma3n"])
def test_checkpoints_go_out_and_come_back(name: str, open_runner: Open) -> None:
    check_that_bytes_stand_for_a_prefix(lambda: open_runner(name))


@PLACES
@pytest.mark.parametrize("dtype", ["auto", "int4"])
def test_imported_pages_hold_the_same_bits(dtype: str, kernels: Any, open_runner: Open) -> None:
    hand = Hand(open_runner("llama", kernels=kernels, kv_cache_dtype=dtype, dtype="bfloat16"))
    payloads = exported_prefix(hand)
    assert len(set(payloads)) == 2
    imports = tuple(zip((40, 7), payloads, strict=True))
    hand.run(Step(0, imports=imports, copies=((40, 50), (50, 40), (7, 51))))
    assert payloads_of(hand.run(Step(0, exports=(50, 51, 7)))) == (payloads[0], payloads[1], payloads[1])
    assert payloads_of(hand.run(Step(0, exports=(40,)))) != payloads[:1], "its source was read before it was written"


@PLACES
def test_copies_read_all_sources_first(kernels: Any, open_runner: Open) -> None:
    hand = Hand(open_runner("llama", kernels=kernels))
    one, two = exported_prefix(hand)
    hand.run(Step(0, imports=((10, one), (11, two)), copies=((10, 11), (11, 10), (11, 63))))
    assert payloads_of(hand.run(Step(0, exports=(10, 11, 63)))) == (two, one, two)


@PLACES
def test_a_page_of_the_wrong_size_is_refused(kernels: Any, open_runner: Open) -> None:
    hand = Hand(open_runner("llama", kernels=kernels))
    payload, _ = exported_prefix(hand)
    for wrong in (payload[:-1], payload + b"0", b""):
        with pytest.raises(ValueError, match=f"takes {len(payload)} bytes, not {len(wrong)}"):
            hand.run(Step(0, imports=((5, wrong),)))
    assert hand.cold(5, WHOLE, 2) == Hand(open_runner("llama")).cold(5, WHOLE, 2)


def test_a_checkpoint_of_another_model_is_refused(open_runner: Open) -> None:
    (payload,) = exported_prefix(Hand(open_runner("mamba2")))
    for name in ("deepseek_v3", "llama4", "qwen3_next", "rwkv7"):
        hand = Hand(open_runner(name))
        with pytest.raises(ValueError, match=r"does not fit|layers"):
            hand.run(Step(0, checkpoint_imports=((1, payload),)))


def example() -> Checkpoint:
    arrays = [mx.random.normal((2, 4)).astype(mx.float32).view(mx.uint8).view(dtype) for dtype in DTYPES.values()]
    return Checkpoint((arrays, [None, [7, 1.5, "keys", True]], [mx.zeros((1, 0, 4), mx.bfloat16), mx.array(3)]))


def encoded(checkpoint: Checkpoint) -> bytes:
    return bytes(encode_checkpoint(checkpoint).take())


def test_every_type_and_shape_keeps_its_bits() -> None:
    before = example()
    after = decode_checkpoint(encoded(before))
    assert after.layers[1] == before.layers[1]
    for one, other in zip(after.arrays(), before.arrays(), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert bytes(memoryview(one)) == bytes(memoryview(other))


def test_what_is_staged_stays_when_its_checkpoint_is_dropped_and_can_be_taken_on_any_thread() -> None:
    checkpoint = example()
    expected, staged = encoded(checkpoint), encode_checkpoint(checkpoint)
    del checkpoint
    mx.eval([mx.zeros((1 << 10,)) + i for i in range(100)])  # would take its memory
    taken: list[bytes] = []
    thread = threading.Thread(target=lambda: taken.append(bytes(staged.take())))
    thread.start()
    thread.join()
    assert taken == [expected]


def test_what_leaves_is_not_copied_until_it_is_taken() -> None:
    checkpoint = example()
    mx.eval(checkpoint.arrays())
    _, *parts = encode_checkpoint(checkpoint).parts
    for array, part in zip(checkpoint.arrays(), parts, strict=True):
        assert np.shares_memory(np.frombuffer(array, np.uint8), part) or not array.nbytes


def test_a_checkpoint_cut_anywhere_is_refused() -> None:
    payload = encoded(example())
    for length in range(len(payload)):
        with pytest.raises(ValueError, match=r"cut off|cannot be read|too many"):
            decode_checkpoint(payload[:length])
    with pytest.raises(ValueError, match="1 bytes too many"):
        decode_checkpoint(payload + b"0")


def test_a_garbled_checkpoint_is_refused_or_is_another_one() -> None:
    payload, draw = encoded(example()), random.Random(1)
    num_refused = 0
    for _ in range(600):
        garbled = bytearray(payload)
        for _ in range(draw.choice((1, 1, 3))):
            garbled[draw.randrange(min(len(garbled), 400))] = draw.randrange(256)
        try:
            decode_checkpoint(bytes(garbled))
        except ValueError:
            num_refused += 1
    assert num_refused > 200


def test_an_endless_nest_is_refused() -> None:
    nest = b"\x92\xa4list\x91" * 100_000
    with pytest.raises(ValueError, match="cannot be read"):
        decode_checkpoint((len(nest) + 1).to_bytes(8, "little") + b"\x91" + nest)


def test_parts_of_pages_come_apart_as_they_were_joined() -> None:
    layout = [PagePart(2, 64, mx.bfloat16), PagePart(1, 32, mx.uint32), PagePart(3, 2, mx.float16)]
    parts = [mx.random.normal((part.heads, 4, part.elements)).astype(part.dtype) for part in layout]
    words = join_pages(parts)
    assert words.shape == (4, sum(part.num_words for part in layout))
    for before, after in zip(parts, split_pages(words, layout), strict=True):
        assert before.dtype == after.dtype
        assert mx.array_equal(before, after)
