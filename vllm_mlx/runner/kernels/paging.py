"""Kernels that write tokens into pools in place, and read pages out of them.

MLX copies an array before it changes it while any earlier operation may still read it, and while one step is computed
the next is already being launched: a pool would be copied again and again. So the write kernel changes its input in
place, behind MLX's back, and returns a token instead. Whatever touches the pool afterwards takes the last token as
an input, `after`, which puts it behind the write on the device.
"""

from __future__ import annotations

import mlx.core as mx

from vllm_mlx.runner.kernels import packed_paging
from vllm_mlx.runner.kernels.dialect import UNPACK, build, header, opening
from vllm_mlx.runner.kernels.pools import PoolFormat

THREADS = 256

WRITE_INPUTS = ("key_pool", "value_pool", "keys", "values", "slots", "after")
READ_INPUTS = ("pool", "table", "after")

# keys, values [batch, heads, tokens, dim]; slots [batch x tokens]: where in a head's part of the pool a token goes.
WRITE_BODY = r"""
  const int tokens = keys_shape[2], index = block_x * THREADS + thread_index;
  const int chunk = index % (KEY_CHUNKS + VALUE_CHUNKS), token = index / (KEY_CHUNKS + VALUE_CHUNKS) % tokens;
  const int head = index / (KEY_CHUNKS + VALUE_CHUNKS) / tokens % KV_HEADS;
  const int row = index / (KEY_CHUNKS + VALUE_CHUNKS) / tokens / KV_HEADS;
  if (row < keys_shape[0]) {
    const size_t from = (size_t(row) * KV_HEADS + head) * tokens + token;
    const size_t to = size_t(head) * (key_pool_shape[0] / KV_HEADS) + slots[row * tokens + token];
    if (chunk < KEY_CHUNKS) {
      ((DEVICE Chunk*)key_pool)[to * KEY_CHUNKS + chunk] = ((const DEVICE Chunk*)keys)[from * KEY_CHUNKS + chunk];
    } else {
      const int c = chunk - KEY_CHUNKS;
      ((DEVICE Chunk*)value_pool)[to * VALUE_CHUNKS + c] = ((const DEVICE Chunk*)values)[from * VALUE_CHUNKS + c];
    }
  }
  if (index == 0) done[0] = after[0];
"""

# out [rows, heads, pages x PAGE, dim]
READ_BODY = r"""
  const int num_pages = table_shape[1], index = block_x * THREADS + thread_index;
  const int chunk = index % CHUNKS, token = index / CHUNKS % (num_pages * PAGE);
  const int head = index / CHUNKS / (num_pages * PAGE) % KV_HEADS, row = index / CHUNKS / (num_pages * PAGE) / KV_HEADS;
  if (row < table_shape[0]) {
    const size_t slot = size_t(table[row * num_pages + token / PAGE]) * PAGE + token % PAGE;
    const size_t from = size_t(head) * (pool_shape[0] / KV_HEADS) + slot;
    ((DEVICE Chunk*)out)[index] = ((const DEVICE Chunk*)pool)[from * CHUNKS + chunk];
  }
"""


def write_text(pools: PoolFormat, backend: str) -> tuple[str, str]:
    """Header and body of the write kernel."""
    if pools.packing is not None:
        return packed_paging.write_text(pools, pools.packing, backend, threads=THREADS)
    constants = {
        "CHUNK_WORDS": pools.chunk_words,
        "KEY_CHUNKS": pools.chunks(pools.key_dim),
        "VALUE_CHUNKS": pools.chunks(pools.value_dim),
        "KV_HEADS": pools.kv_heads,
        "THREADS": THREADS,
    }
    return header(pools.dtype, backend, constants, UNPACK), opening(backend) + WRITE_BODY


def read_text(pools: PoolFormat, dim: int, backend: str) -> tuple[str, str]:
    """Header and body of the kernel that reads pages with `dim` elements per token."""
    if pools.packing is not None:
        return packed_paging.read_text(pools, pools.packing, backend, dim=dim, threads=THREADS)
    constants = {
        "CHUNK_WORDS": pools.chunk_words,
        "CHUNKS": pools.chunks(dim),
        "KV_HEADS": pools.kv_heads,
        "PAGE": pools.page_size,
        "THREADS": THREADS,
    }
    return header(pools.dtype, backend, constants, UNPACK), opening(backend) + READ_BODY


class PageKernels:
    """The write and read kernels for pools of one format.

    Raises:
        ValueError: there is no layout for the format, or no GPU.
    """

    def __init__(self, pools: PoolFormat, backend: str) -> None:
        self.pools = pools
        self._packing = pools.packing
        is_packed = self._packing is not None
        write_inputs = (*WRITE_INPUTS, *(("key_scales", "value_scales") if is_packed else ()))
        read_inputs = (*READ_INPUTS, *(("scales",) if is_packed else ()))
        text = write_text(pools, backend)
        self._write = build("write_tokens", text, inputs=write_inputs, outputs=("done",), backend=backend)
        self._read = {
            dim: build(
                "read_pages", read_text(pools, dim, backend), inputs=read_inputs, outputs=("out",), backend=backend
            )
            for dim in {pools.key_dim, pools.value_dim}
        }

    def write(
        self,
        key_pool: mx.array,
        value_pool: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        slots: mx.array,
        after: mx.array,
        scales: tuple[mx.array, mx.array] | None = None,
    ) -> mx.array:
        """Write keys and values [rows, heads, tokens, dim] to `slots` int32 [rows x tokens]; returns the new token.

        `scales` are those of quantised pools, and change with them.
        """
        num_threads = keys.shape[0] * keys.shape[2] * self.pools.kv_heads * self._threads_per_token
        (done,) = self._write(
            inputs=[key_pool, value_pool, keys, values, slots, after, *(scales or ())],
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
            grid=(-(-num_threads // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )
        result: mx.array = done
        return result

    def read(self, pool: mx.array, table: mx.array, *, after: mx.array, scales: mx.array | None = None) -> mx.array:
        """The pages `table` int32 [rows, pages] of a pool: [rows, heads, pages x page_size, dim].

        A quantised pool is read with its `scales`, and comes back in the format's type.
        """
        pools, packing, dim, dtype = self.pools, self._packing, pool.shape[-1], pool.dtype
        if packing is not None:
            dim, dtype = dim * 32 // packing.bits, getattr(mx, pools.dtype)
        per_token = pools.chunks(dim) if packing is None else dim // packed_paging.PER_THREAD
        rows, num_pages = table.shape
        num_threads = rows * pools.kv_heads * num_pages * pools.page_size * per_token
        (out,) = self._read[dim](
            inputs=[pool, table, after, *(() if scales is None else (scales,))],
            output_shapes=[(rows, pools.kv_heads, num_pages * pools.page_size, dim)],
            output_dtypes=[dtype],
            grid=(-(-num_threads // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )
        result: mx.array = out
        return result

    @property
    def _threads_per_token(self) -> int:
        pools, packing = self.pools, self._packing
        if packing is None:
            return pools.chunks(pools.key_dim) + pools.chunks(pools.value_dim)
        return (pools.key_dim + pools.value_dim) // packing.group * packed_paging.lanes_of(packing)
