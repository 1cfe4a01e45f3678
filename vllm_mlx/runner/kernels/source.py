"""The text of the decode kernels.

Split-KV attention ("flash decoding", Dao et al. 2023) over pages. The host cuts every row's tokens into items; a
block computes one item for the query vectors of one KV head and leaves an output that is not normalised, with its
running maximum and sum; a second kernel joins the items of a row. Scores are kept in units of log2, so that
exponentials are powers of two.
"""

from __future__ import annotations

from vllm_mlx.runner.kernels.dialect import UNPACK, UNPACK_PACKED, header, literal, opening
from vllm_mlx.runner.kernels.variant import DecodeGeometry, DecodeVariant

LOG2_E = 1.4426950408889634
COMBINE_WARPS = 8
COMBINE_BATCH = 2
"""Items that a warp has under way at once."""

DECODE_INPUTS = ("queries", "keys", "values", "table", "slots", "items", "after")
SCALE_INPUTS = ("key_scales", "value_scales")
"""Inputs besides these where pools are quantised."""
DECODE_OUTPUTS = ("partial", "stats")
COMBINE_INPUTS = ("partial", "stats", "starts")
COMBINE_OUTPUTS = ("out",)

# items [n, 4]: row (-1 where unused), first token, token after the last, position of the row's first query.
# `after` only orders the launch behind the writes into the pools, of which MLX knows nothing.
DECODE_BODY = r"""
  const int row = items[4 * block_x];
  if (row < 0) return;
  const int begin = items[4 * block_x + 1], end = items[4 * block_x + 2], position = items[4 * block_x + 3];
  const int kv_head = block_y / QUERY_BLOCKS, first_vector = block_y % QUERY_BLOCKS * VECTORS;
  const int slot = lane / LANES, part = lane % LANES;
  const int table_row = slots[row] * table_shape[1];
  const size_t head_start = size_t(kv_head) * (keys_shape[0] / KV_HEADS);
  const int lowest = WINDOW > 0 ? max(begin, position + 1 - WINDOW) : begin;

  float query[VECTORS][KEY_DIMS], acc[VECTORS][VALUE_DIMS], top[VECTORS], sum[VECTORS];
#if BITS == 4
  // What the groups' biases add: to a score by the sum of the queries, to the output of all elements alike.
  float query_sums[VECTORS][KEY_CHUNKS], added[VECTORS][VALUE_CHUNKS];
#endif
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    const int vector = min(first_vector + v, KV_VECTORS - 1);
    const size_t at = (size_t(row) * KV_HEADS + kv_head) * KV_VECTORS + vector;
#if BITS
    UNROLL for (int i = 0; i < KEY_DIMS; ++i) {
      const int element = (i / PER_CHUNK * LANES + part) * PER_CHUNK + i % PER_CHUNK;
      query[v][i] = float(queries[at * KEY_DIM + element]) * QUERY_SCALE;
    }
#else
    UNROLL for (int c = 0; c < KEY_CHUNKS; ++c) {
      const Chunk chunk = *(const DEVICE Chunk*)(queries + at * KEY_DIM + (c * LANES + part) * PER_CHUNK);
      unpack(chunk, query[v] + c * PER_CHUNK);
    }
    UNROLL for (int i = 0; i < KEY_DIMS; ++i) query[v][i] *= QUERY_SCALE;
#endif
#if BITS == 4
    UNROLL for (int c = 0; c < KEY_CHUNKS; ++c) query_sums[v][c] = 0.f;
    UNROLL for (int i = 0; i < KEY_DIMS; ++i) {
      query_sums[v][i / PER_CHUNK] += query[v][i];
      query[v][i] *= FACTOR(i);
    }
    UNROLL for (int c = 0; c < VALUE_CHUNKS; ++c) added[v][c] = 0.f;
#endif
    UNROLL for (int i = 0; i < VALUE_DIMS; ++i) acc[v][i] = 0.f;
    top[v] = LEAST;
    sum[v] = 0.f;
  }

  for (int base = begin + warp * STRIDE; base < end; base += WARPS * STRIDE) {
    // A stride of tokens lies in one page. Tokens outside the item are read as its nearest own token and weigh nothing.
    const size_t page_start = head_start + size_t(table[table_row + base / PAGE]) * PAGE;
    Chunk key_chunks[UNROLLED][KEY_CHUNKS], value_chunks[UNROLLED][VALUE_CHUNKS];
#if BITS
    Meta key_meta[UNROLLED][KEY_CHUNKS], value_meta[UNROLLED][VALUE_CHUNKS];
#endif
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      const int token = max(lowest, min(end - 1, base + u * SLOTS + slot));
      const size_t at = page_start + token % PAGE;
      UNROLL for (int c = 0; c < KEY_CHUNKS; ++c) {
        key_chunks[u][c] = *(const DEVICE Chunk*)(keys + at * KEY_STEP + (c * LANES + part) * CHUNK_STEP);
#if BITS
        const int group = (c * LANES + part) * PER_CHUNK / GROUP;
        key_meta[u][c] = ((const DEVICE Meta*)key_scales)[at * (KEY_DIM / GROUP) + group];
#endif
      }
      UNROLL for (int c = 0; c < VALUE_CHUNKS; ++c) {
        value_chunks[u][c] = *(const DEVICE Chunk*)(values + at * VALUE_STEP + (c * LANES + part) * CHUNK_STEP);
#if BITS
        const int group = (c * LANES + part) * PER_CHUNK / GROUP;
        value_meta[u][c] = ((const DEVICE Meta*)value_scales)[at * (VALUE_DIM / GROUP) + group];
#endif
      }
    }
    float weight[VECTORS][UNROLLED];
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      float key[KEY_DIMS];
      UNROLL for (int c = 0; c < KEY_CHUNKS; ++c) unpack(key_chunks[u][c], key + c * PER_CHUNK);
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        float score = 0.f;
#if BITS
        UNROLL for (int c = 0; c < KEY_CHUNKS; ++c) {
          float part_score = 0.f;
          UNROLL for (int i = 0; i < PER_CHUNK; ++i) part_score += query[v][c * PER_CHUNK + i] * key[c * PER_CHUNK + i];
          score += META_SCALE(key_meta[u][c]) * part_score;
#if BITS == 4
          score += META_BIAS(key_meta[u][c]) * query_sums[v][c];
#endif
        }
#else
        UNROLL for (int i = 0; i < KEY_DIMS; ++i) score += query[v][i] * key[i];
#endif
        weight[v][u] = score;
      }
    }
    UNROLL for (int v = 0; v < VECTORS; ++v) {
      const int last = NUM_QUERIES > 1 ? position + (first_vector + v) % NUM_QUERIES : end;
      float best = top[v];
      UNROLL for (int u = 0; u < UNROLLED; ++u) {
        UNROLL for (int o = LANES / 2; o > 0; o /= 2) weight[v][u] += SIMD_XOR(weight[v][u], o);
#ifdef SOFTCAP
        weight[v][u] = SOFTCAP * TANH(weight[v][u]);
#endif
        const int token = base + u * SLOTS + slot;
        bool seen = token < end && token >= lowest;
        if (NUM_QUERIES > 1) seen = seen && token <= last && (WINDOW == 0 || token > last - WINDOW);
        weight[v][u] = seen ? weight[v][u] : HIDDEN;
        best = MAX(best, weight[v][u]);
      }
      const float keep = EXP2(top[v] - best);
      top[v] = best;
      sum[v] *= keep;
      UNROLL for (int u = 0; u < UNROLLED; ++u) {
        weight[v][u] = EXP2(weight[v][u] - best);
        sum[v] += weight[v][u];
      }
      UNROLL for (int i = 0; i < VALUE_DIMS; ++i) acc[v][i] *= keep;
#if BITS == 4
      UNROLL for (int c = 0; c < VALUE_CHUNKS; ++c) added[v][c] *= keep;
#endif
    }
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      float value[VALUE_DIMS];
      UNROLL for (int c = 0; c < VALUE_CHUNKS; ++c) unpack(value_chunks[u][c], value + c * PER_CHUNK);
      UNROLL for (int v = 0; v < VECTORS; ++v) {
#if BITS
        UNROLL for (int c = 0; c < VALUE_CHUNKS; ++c) {
          const float share = weight[v][u] * META_SCALE(value_meta[u][c]);
          UNROLL for (int i = 0; i < PER_CHUNK; ++i) acc[v][c * PER_CHUNK + i] += share * value[c * PER_CHUNK + i];
#if BITS == 4
          added[v][c] += weight[v][u] * META_BIAS(value_meta[u][c]);
#endif
        }
#else
        UNROLL for (int i = 0; i < VALUE_DIMS; ++i) acc[v][i] += weight[v][u] * value[i];
#endif
      }
    }
  }
#if BITS == 4
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    UNROLL for (int i = 0; i < VALUE_DIMS; ++i) acc[v][i] = acc[v][i] * FACTOR(i) + added[v][i / PER_CHUNK];
  }
#endif

  // Join the slots of the warp, then the warps of the block.
  SHARED float warp_top[WARPS][VECTORS], warp_sum[WARPS][VECTORS], warp_acc[WARPS][VALUE_DIM];
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    float best = top[v];
    UNROLL for (int o = LANES; o < 32; o *= 2) best = MAX(best, SIMD_XOR(best, o));
    const float keep = EXP2(top[v] - best);
    sum[v] *= keep;
    UNROLL for (int i = 0; i < VALUE_DIMS; ++i) acc[v][i] *= keep;
    UNROLL for (int o = LANES; o < 32; o *= 2) {
      sum[v] += SIMD_XOR(sum[v], o);
      UNROLL for (int i = 0; i < VALUE_DIMS; ++i) acc[v][i] += SIMD_XOR(acc[v][i], o);
    }
    if (lane == 0) {
      warp_top[warp][v] = best;
      warp_sum[warp][v] = sum[v];
    }
  }
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    if (slot == 0) {
      UNROLL for (int i = 0; i < VALUE_DIMS; ++i) {
        warp_acc[warp][(i / PER_CHUNK * LANES + part) * PER_CHUNK + i % PER_CHUNK] = acc[v][i];
      }
    }
    BARRIER();
    if (first_vector + v < KV_VECTORS) {
      float best = LEAST, total = 0.f, keep[WARPS];
      UNROLL for (int w = 0; w < WARPS; ++w) best = MAX(best, warp_top[w][v]);
      UNROLL for (int w = 0; w < WARPS; ++w) {
        keep[w] = EXP2(warp_top[w][v] - best);
        total += keep[w] * warp_sum[w][v];
      }
      const size_t at = (size_t(block_x) * KV_HEADS + kv_head) * KV_VECTORS + first_vector + v;
      for (int i = thread_index; i < VALUE_DIM; i += 32 * WARPS) {
        float joined = 0.f;
        UNROLL for (int w = 0; w < WARPS; ++w) joined += keep[w] * warp_acc[w][i];
        partial[at * VALUE_DIM + i] = joined;
      }
      if (thread_index == 0) {
        stats[2 * at] = best;
        stats[2 * at + 1] = total;
      }
    }
    BARRIER();
  }
"""

# starts [rows + 1]: a row's items are starts[row] .. starts[row + 1] - 1. A row without items gets zeros.
COMBINE_BODY = r"""
  const int row = block_x / VECTORS, vector = block_x % VECTORS;
  const int first = starts[row], count = starts[row + 1] - first;
  const size_t origin = size_t(first) * VECTORS + vector;
  float acc[DIMS], top = LEAST, sum = 0.f;
  UNROLL for (int i = 0; i < DIMS; ++i) acc[i] = 0.f;
  for (int base = warp; base < count; base += WARPS * BATCH) {
    // All loads of a batch are under way before the first is used. Past the end the last item is read and weighs 0.
    float tops[BATCH], sums[BATCH], parts[BATCH][DIMS];
    UNROLL for (int b = 0; b < BATCH; ++b) {
      const size_t at = origin + size_t(min(base + b * WARPS, count - 1)) * VECTORS;
      tops[b] = stats[2 * at];
      sums[b] = stats[2 * at + 1];
      UNROLL for (int i = 0; i < DIMS; ++i) parts[b][i] = partial[at * VALUE_DIM + min(i * 32 + lane, VALUE_DIM - 1)];
    }
    float best = top;
    UNROLL for (int b = 0; b < BATCH; ++b) {
      if (base + b * WARPS >= count) tops[b] = HIDDEN;
      best = MAX(best, tops[b]);
    }
    const float keep = EXP2(top - best);
    top = best;
    sum *= keep;
    UNROLL for (int i = 0; i < DIMS; ++i) acc[i] *= keep;
    UNROLL for (int b = 0; b < BATCH; ++b) {
      const float weight = EXP2(tops[b] - best);
      sum += weight * sums[b];
      UNROLL for (int i = 0; i < DIMS; ++i) acc[i] += weight * parts[b][i];
    }
  }
  SHARED float warp_top[WARPS], warp_sum[WARPS], warp_acc[WARPS][VALUE_DIM];
  if (lane == 0) {
    warp_top[warp] = top;
    warp_sum[warp] = sum;
  }
  UNROLL for (int i = 0; i < DIMS; ++i) {
    if (i * 32 + lane < VALUE_DIM) warp_acc[warp][i * 32 + lane] = acc[i];
  }
  BARRIER();
  float best = LEAST, total = 0.f, keep[WARPS];
  UNROLL for (int w = 0; w < WARPS; ++w) best = MAX(best, warp_top[w]);
#if HAS_SINKS
  const float sink = float(sinks[vector / NUM_QUERIES]) * LOG2_E;
  best = MAX(best, sink);
  total = EXP2(sink - best);
#endif
  UNROLL for (int w = 0; w < WARPS; ++w) {
    keep[w] = EXP2(warp_top[w] - best);
    total += keep[w] * warp_sum[w];
  }
  const float factor = total > 0.f ? 1.f / total : 0.f;
  for (int i = thread_index; i < VALUE_DIM; i += 32 * WARPS) {
    float joined = 0.f;
    UNROLL for (int w = 0; w < WARPS; ++w) joined += keep[w] * warp_acc[w][i];
    out[size_t(block_x) * VALUE_DIM + i] = TYPE(joined * factor);
  }
"""


def decode_text(variant: DecodeVariant, layout: DecodeGeometry, backend: str) -> tuple[str, str]:
    """Header and body of the kernel that computes items; `backend` is 'metal' or 'cuda'."""
    per_chunk = variant.per_word * layout.chunk_words
    per_step = 1 if variant.packing is None else variant.per_word  # elements per item of the pool's array
    query_scale = variant.scale * LOG2_E if variant.softcap is None else variant.scale / variant.softcap
    constants: dict[str, int | str] = {
        "BITS": variant.bits or 0,
        "GROUP": variant.packing.group if variant.packing else 0,
        "CHUNK_WORDS": layout.chunk_words,
        "PER_CHUNK": per_chunk,
        "CHUNK_STEP": per_chunk // per_step,
        "KEY_STEP": variant.key_dim // per_step,
        "VALUE_STEP": variant.value_dim // per_step,
        "LANES": layout.lanes,
        "SLOTS": layout.slots,
        "UNROLLED": layout.unroll,
        "STRIDE": layout.stride,
        "WARPS": layout.warps,
        "VECTORS": layout.vectors,
        "QUERY_BLOCKS": layout.query_blocks,
        "KV_VECTORS": variant.group * variant.num_queries,
        "KV_HEADS": variant.kv_heads,
        "NUM_QUERIES": variant.num_queries,
        "PAGE": variant.page_size,
        "WINDOW": variant.window or 0,
        "KEY_DIM": variant.key_dim,
        "VALUE_DIM": variant.value_dim,
        "KEY_DIMS": variant.key_dim // layout.lanes,
        "VALUE_DIMS": variant.value_dim // layout.lanes,
        "KEY_CHUNKS": variant.key_dim // layout.lanes // per_chunk,
        "VALUE_CHUNKS": variant.value_dim // layout.lanes // per_chunk,
        "QUERY_SCALE": literal(query_scale),
        **({} if variant.softcap is None else {"SOFTCAP": literal(variant.softcap * LOG2_E)}),
    }
    functions = UNPACK if variant.packing is None else UNPACK_PACKED
    return header(variant.dtype, backend, constants, functions), opening(backend) + DECODE_BODY


def combine_text(variant: DecodeVariant, backend: str) -> tuple[str, str]:
    """Header and body of the kernel that joins the items of each row."""
    constants: dict[str, int | str] = {
        "VECTORS": variant.heads * variant.num_queries,
        "NUM_QUERIES": variant.num_queries,
        "VALUE_DIM": variant.value_dim,
        "DIMS": -(-variant.value_dim // 32),
        "WARPS": COMBINE_WARPS,
        "BATCH": COMBINE_BATCH,
        "HAS_SINKS": int(variant.has_sinks),
        "LOG2_E": literal(LOG2_E),
    }
    return header(variant.dtype, backend, constants), opening(backend) + COMBINE_BODY
