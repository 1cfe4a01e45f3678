"""Which decode kernel a layer needs, and how its work is laid out over lanes, warps and blocks."""

from __future__ import annotations

import msgspec

LANES_PER_WARP = 32
"""Of a warp (CUDA) or SIMD group (Metal)."""
MAX_LANES_PER_TOKEN = 16
MAX_DIMS_PER_LANE = 24
MAX_VECTORS = 8
VECTOR_REGISTERS = 128
"""For the query vectors that share a read of keys and values, and for their outputs."""
REGISTER_BUDGET = 16
"""32-bit registers for the keys (and as many for the values) that a lane has under way."""
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
    lanes, chunk_words = _split_token(variant)
    num_vectors = variant.group * variant.num_queries
    most = max(1, min(MAX_VECTORS, VECTOR_REGISTERS // ((variant.key_dim + variant.value_dim) // lanes)))
    query_blocks = -(-num_vectors // most)
    vectors = -(-num_vectors // query_blocks)
    slots = LANES_PER_WARP // lanes
    registers = max(variant.key_dim, variant.value_dim) // lanes * ELEMENT_BYTES[variant.dtype] // 4
    unroll = 1
    while unroll * 2 * registers <= REGISTER_BUDGET and slots * unroll * 2 <= 16 and variant.page_size % 16 == 0:
        unroll *= 2
    return DecodeGeometry(lanes, chunk_words, unroll, vectors, query_blocks)


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
