"""Which decode kernel a layer needs, and how its work is laid out over lanes, warps and blocks."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from vllm_mlx.runner.kernels.packing import Packing, packing_of

LANES_PER_WARP = 32
"""Of a warp (CUDA) or SIMD group (Metal)."""
MAX_LANES_PER_TOKEN = 16
MAX_DIMS_PER_LANE = 24
MAX_VECTORS = 8
VECTOR_REGISTERS = 128
"""For the query vectors that share a read of keys and values, and for their outputs."""
REGISTER_BUDGET = 16
"""32-bit registers for the keys (and as many for the values) that a lane has under way."""
COMFORTABLE_REGISTERS = 64
"""Of `VECTOR_REGISTERS`: with no more, two blocks of quantised keys and values fit a multiprocessor."""
PACKED_REGISTER_BUDGET = 12
"""The same as `REGISTER_BUDGET` for quantised tokens and their scales, whose unpacking needs registers too."""
MAX_PACKED_DIMS_PER_LANE = 40
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class DecodeVariant(msgspec.Struct, frozen=True):
    """Everything that a decode kernel is compiled for.

    Raises:
        ValueError: no layout exists for these sizes (`check` tells).
    """

    key_dim: int
    value_dim: int
    heads: int
    """Query heads."""
    kv_heads: int
    dtype: str
    """'float32', 'float16' or 'bfloat16': of queries, keys, values and output."""
    page_size: int
    scale: float
    """Factor of the scores."""
    num_queries: int = 1
    """Positions per row: 1, or up to 8 where drafts are verified."""
    window: int | None = None
    """Tokens that a position looks back, itself included; None is no limit."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    has_sinks: bool = False
    """A logit per query head takes part in the softmax (gpt-oss)."""
    bits: int | None = None
    """Of an element of keys and values where they are quantised: 8 or 4."""

    @property
    def packing(self) -> Packing | None:
        """How keys and values are quantised, if they are."""
        return None if self.bits is None else packing_of(self.bits, key_dim=self.key_dim, value_dim=self.value_dim)

    @property
    def per_word(self) -> int:
        """Elements of keys and values in a 32-bit word; 1 where they are wider."""
        return 32 // self.bits if self.bits else 4 // ELEMENT_BYTES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


class DecodeGeometry(msgspec.Struct, frozen=True):
    """How a variant is laid out.

    `lanes` lanes share a token: each holds `dims` elements of it, in chunks of `chunk_words` 32-bit words. A warp has
    `slots` tokens side by side and `unroll` of them in flight per slot.
    """

    lanes: int
    chunk_words: int
    unroll: int
    vectors: int
    """Query vectors per block."""
    query_blocks: int
    """Blocks per KV head, each with `vectors` of its query vectors."""
    warps: int = 8

    @property
    def slots(self) -> int:
        """Tokens side by side in a warp."""
        return LANES_PER_WARP // self.lanes

    @property
    def stride(self) -> int:
        """Tokens that a warp takes at once; divides every page size."""
        return self.slots * self.unroll

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.warps * LANES_PER_WARP


def geometry(variant: DecodeVariant) -> DecodeGeometry:
    """The layout for a variant.

    Raises:
        ValueError: heads do not divide, the type is unknown, or a size is no multiple of two.
    """
    if variant.dtype not in ELEMENT_BYTES:
        raise ValueError(f"no decode kernel for {variant.dtype}")
    if variant.kv_heads < 1 or variant.heads % variant.kv_heads:
        raise ValueError(f"{variant.heads} query heads do not divide among {variant.kv_heads} KV heads")
    num_vectors = variant.group * variant.num_queries
    lanes, chunk_words = _split_token(variant) if variant.bits is None else _split_packed_token(variant)
    query_blocks = _query_blocks(variant, lanes)
    vectors = -(-num_vectors // query_blocks)
    return DecodeGeometry(lanes, chunk_words, _unroll(variant, lanes, chunk_words), vectors, query_blocks)


def _query_blocks(variant: DecodeVariant, lanes: int) -> int:
    most = max(1, min(MAX_VECTORS, VECTOR_REGISTERS // ((variant.key_dim + variant.value_dim) // lanes)))
    return -(-variant.group * variant.num_queries // most)


def _unroll(variant: DecodeVariant, lanes: int, chunk_words: int) -> int:
    """Tokens in flight per slot: as many as the registers for keys or values allow."""
    words = max(variant.key_dim, variant.value_dim) // lanes // variant.per_word
    registers, budget = words, REGISTER_BUDGET
    if variant.bits is not None:
        registers, budget = words + words // chunk_words, PACKED_REGISTER_BUDGET  # each chunk has its scale
    slots, unroll = LANES_PER_WARP // lanes, 1
    while unroll * 2 * registers <= budget and slots * unroll * 2 <= 16 and variant.page_size % 16 == 0:
        unroll *= 2
    return unroll


def _split_token(variant: DecodeVariant) -> tuple[int, int]:
    """Lanes per token and words per chunk: the widest loads that leave each lane few elements."""
    for chunk_words in (4, 2, 1):
        per_chunk = chunk_words * 4 // ELEMENT_BYTES[variant.dtype]
        if variant.key_dim % per_chunk or variant.value_dim % per_chunk:
            continue
        lanes = MAX_LANES_PER_TOKEN
        while variant.key_dim // per_chunk % lanes or variant.value_dim // per_chunk % lanes:
            lanes //= 2
        if max(variant.key_dim, variant.value_dim) // lanes <= MAX_DIMS_PER_LANE:
            return lanes, chunk_words
    raise ValueError(f"no decode kernel for heads of {variant.key_dim} and {variant.value_dim} elements")


def _split_packed_token(variant: DecodeVariant) -> tuple[int, int]:
    """The same for quantised tokens, where a chunk has one scale: few blocks, then few registers, then few lanes."""
    splits = list(_packed_splits(variant))
    if not splits:
        raise ValueError(
            f"no decode kernel for heads of {variant.key_dim} and {variant.value_dim} elements of {variant.bits} bits"
        )

    def cost(split: tuple[int, int]) -> tuple[int, bool, int, int]:
        lanes, chunk_words = split
        blocks = _query_blocks(variant, lanes)
        registers = -(-variant.group * variant.num_queries // blocks) * (variant.key_dim + variant.value_dim) // lanes
        return blocks, registers > COMFORTABLE_REGISTERS, lanes, -chunk_words

    return min(splits, key=cost)


def _packed_splits(variant: DecodeVariant) -> Iterator[tuple[int, int]]:
    """Lanes per token and words per chunk that fit."""
    packing, dims = variant.packing, (variant.key_dim, variant.value_dim)
    assert packing is not None
    for chunk_words in (4, 2, 1):
        per_chunk = chunk_words * variant.per_word
        for lanes in (1, 2, 4, 8, MAX_LANES_PER_TOKEN):
            is_whole = packing.group % per_chunk == 0 and not any(dim % (per_chunk * lanes) for dim in dims)
            is_in_page = variant.page_size % (LANES_PER_WARP // lanes) == 0
            if is_whole and is_in_page and max(dims) // lanes <= MAX_PACKED_DIMS_PER_LANE:
                yield lanes, chunk_words
