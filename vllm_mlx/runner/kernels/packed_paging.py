"""The texts of the kernels that quantise tokens into pools, and give them back in the model's type."""

from __future__ import annotations

from vllm_mlx.runner.kernels.dialect import UNPACK, UNPACK_PACKED, header, literal, opening
from vllm_mlx.runner.kernels.packing import LARGEST_HALF, Packing
from vllm_mlx.runner.kernels.pools import PoolFormat

PER_THREAD = 8
"""Elements that a thread reads."""
MAX_LANES = 8
"""Threads that quantise a group together, at most."""

# LANES neighbouring threads have a group. All of them take part in the shuffles, also those past the last token.
WRITE_BODY = r"""
  const int tokens = keys_shape[2], index = block_x * THREADS + thread_index;
  const int part = index % LANES, token_group = index / LANES % (KEY_GROUPS + VALUE_GROUPS);
  const int place = index / LANES / (KEY_GROUPS + VALUE_GROUPS);
  const bool is_used = place / tokens / KV_HEADS < keys_shape[0];
  const int token = is_used ? place % tokens : 0, head = is_used ? place / tokens % KV_HEADS : 0;
  const int row = is_used ? place / tokens / KV_HEADS : 0;
  const bool is_key = token_group < KEY_GROUPS;
  const int group = is_key ? token_group : token_group - KEY_GROUPS;
  const size_t from = ((size_t(row) * KV_HEADS + head) * tokens + token) * (is_key ? KEY_GROUPS : VALUE_GROUPS) + group;

  float elements[ELEMENTS];
  UNROLL for (int c = 0; c < ELEMENTS / PER_CHUNK; ++c) {
    const size_t chunk = (from * LANES + part) * (ELEMENTS / PER_CHUNK) + c;
    if (is_key) {
      unpack(((const DEVICE Chunk*)keys)[chunk], elements + c * PER_CHUNK);
    } else {
      unpack(((const DEVICE Chunk*)values)[chunk], elements + c * PER_CHUNK);
    }
  }
  float low = elements[0], high = elements[0];
  UNROLL for (int i = 1; i < ELEMENTS; ++i) {
    low = MIN(low, elements[i]);
    high = MAX(high, elements[i]);
  }
  UNROLL for (int o = LANES / 2; o > 0; o /= 2) {
    low = MIN(low, SIMD_XOR(low, o));
    high = MAX(high, SIMD_XOR(high, o));
  }
#if BITS == 8
  const float least = -127.f, most = 127.f, bias = 0.f;
  const TYPE_float16 scale = TYPE_float16(MIN(MAX(-low, high) / 127.f, LARGEST_HALF));
#else
  const float least = 0.f, most = 15.f;
  const TYPE_float16 stored_bias = TYPE_float16(MAX(-LARGEST_HALF, MIN(low, LARGEST_HALF)));
  const float bias = float(stored_bias);
  const TYPE_float16 scale = TYPE_float16(MIN((high - low) / 15.f, LARGEST_HALF));
#endif
  // What is stored counts: a scale so small that it is zero in half precision gives zeros.
  const float inverse = float(scale) > 0.f ? 1.f / float(scale) : 0.f;
  unsigned int words[ELEMENTS * BITS / 32];
  UNROLL for (int w = 0; w < ELEMENTS * BITS / 32; ++w) words[w] = 0;
  UNROLL for (int i = 0; i < ELEMENTS; ++i) {
    const float step = MAX(least, MIN(RINT((elements[i] - bias) * inverse), most));
    const int number = int(step) + (BITS == 8 ? 128 : 0);
    words[i * BITS / 32] |= (unsigned int)(number) << (i * BITS % 32);
  }
  if (is_used) {
    const size_t slot = slots[row * tokens + token];
    const size_t to = size_t(head) * (key_pool_shape[0] / KV_HEADS) + slot;
    const size_t at = to * (is_key ? KEY_GROUPS : VALUE_GROUPS) + group;
    UNROLL for (int w = 0; w < ELEMENTS * BITS / 32; ++w) {
      const size_t word = (at * LANES + part) * (ELEMENTS * BITS / 32) + w;
      if (is_key) {
        ((DEVICE unsigned int*)key_pool)[word] = words[w];
      } else {
        ((DEVICE unsigned int*)value_pool)[word] = words[w];
      }
    }
    if (part == 0) {
      DEVICE TYPE_float16* scales = is_key ? (DEVICE TYPE_float16*)key_scales : (DEVICE TYPE_float16*)value_scales;
      scales[at * SCALES] = scale;
#if BITS == 4
      scales[at * SCALES + 1] = stored_bias;
#endif
    }
  }
  if (index == 0) done[0] = after[0];
"""

# out [rows, heads, pages x PAGE, HEAD_DIM]; a thread gives PER_THREAD elements, CHUNK_WORDS words.
READ_BODY = r"""
  const int num_pages = table_shape[1], index = block_x * THREADS + thread_index;
  const int part = index % (HEAD_DIM / PER_THREAD), place = index / (HEAD_DIM / PER_THREAD);
  const int token = place % (num_pages * PAGE), head = place / (num_pages * PAGE) % KV_HEADS;
  const int row = place / (num_pages * PAGE) / KV_HEADS;
  if (row < table_shape[0]) {
    const size_t slot = size_t(table[row * num_pages + token / PAGE]) * PAGE + token % PAGE;
    const size_t from = size_t(head) * (pool_shape[0] / KV_HEADS) + slot;
    const Meta meta = ((const DEVICE Meta*)scales)[from * (HEAD_DIM / GROUP) + part * PER_THREAD / GROUP];
    float elements[PER_THREAD];
    unpack(((const DEVICE Chunk*)pool)[from * (HEAD_DIM / PER_THREAD) + part], elements);
    UNROLL for (int i = 0; i < PER_THREAD; ++i) {
      float element = elements[i] * FACTOR(i) * META_SCALE(meta);
#if BITS == 4
      element += META_BIAS(meta);
#endif
      out[size_t(index) * PER_THREAD + i] = TYPE(element);
    }
  }
"""


def lanes_of(packing: Packing) -> int:
    """Threads that quantise a group together."""
    lanes = MAX_LANES
    while packing.group // PER_THREAD % lanes:
        lanes //= 2
    return lanes


def write_text(pools: PoolFormat, packing: Packing, backend: str, *, threads: int) -> tuple[str, str]:
    """Header and body of the kernel that quantises; the words of its chunks are of the model's type."""
    per_word = 1 if pools.dtype == "float32" else 2
    constants: dict[str, int | str] = {
        "BITS": packing.bits,
        "CHUNK_WORDS": 4,
        "PER_CHUNK": 4 * per_word,
        "LANES": lanes_of(packing),
        "ELEMENTS": packing.group // lanes_of(packing),
        "KEY_GROUPS": pools.key_dim // packing.group,
        "VALUE_GROUPS": pools.value_dim // packing.group,
        "SCALES": packing.scales_per_group,
        "KV_HEADS": pools.kv_heads,
        "THREADS": threads,
        "LARGEST_HALF": literal(LARGEST_HALF),
    }
    return header(pools.dtype, backend, constants, UNPACK), opening(backend) + WRITE_BODY


def read_text(pools: PoolFormat, packing: Packing, backend: str, *, dim: int, threads: int) -> tuple[str, str]:
    """Header and body of the kernel that reads pages with `dim` elements per token."""
    constants = {
        "BITS": packing.bits,
        "GROUP": packing.group,
        "CHUNK_WORDS": PER_THREAD * packing.bits // 32,
        "PER_THREAD": PER_THREAD,
        "HEAD_DIM": dim,
        "KV_HEADS": pools.kv_heads,
        "PAGE": pools.page_size,
        "THREADS": threads,
    }
    return header(pools.dtype, backend, constants, UNPACK_PACKED), opening(backend) + READ_BODY
