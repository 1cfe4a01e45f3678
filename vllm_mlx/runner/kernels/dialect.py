"""What the kernels' texts share: one body for both backends, between a prelude and an opening of the backend's own.

MLX builds the parameter list: inputs and outputs by name, `X_shape` of every input X whose shape the body names, and on
Metal the thread attributes that the body names, which is why these stand in the openings and not in the preludes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

CUDA_PRELUDE = r"""
#define DEVICE
#define THREAD
#define SHARED __shared__
#define INLINE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#define BARRIER() __syncthreads()
#define SIMD_XOR(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define AS_FLOAT(word) __uint_as_float(word)
#define EXP2(x) exp2f(x)
#define TANH(x) tanhf(x)
#define COS(x) cosf(x)
#define SIN(x) sinf(x)
#define RSQRT(x) rsqrtf(x)
#define MAX(a, b) fmaxf(a, b)
#define MIN(a, b) fminf(a, b)
#define RINT(x) rintf(x)
#define LOWEST_BYTE_OF_2_TO_23(word, byte) __byte_perm(word, 0x4b000000u, 0x7440 | (byte))
#define TYPE_float32 float
#define TYPE_float16 __half
#define TYPE_bfloat16 __nv_bfloat16
INLINE float2 halves(unsigned int word) { return __half22float2(*reinterpret_cast<const __half2*>(&word)); }
"""

METAL_PRELUDE = r"""
#include <metal_stdlib>
using namespace metal;
#define DEVICE device
#define THREAD thread
#define SHARED threadgroup
#define INLINE inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define SIMD_XOR(value, mask) simd_shuffle_xor(value, ushort(mask))
#define AS_FLOAT(word) as_type<float>(word)
#define EXP2(x) exp2(x)
#define TANH(x) precise::tanh(x)
#define COS(x) precise::cos(x)
#define SIN(x) precise::sin(x)
#define RSQRT(x) precise::rsqrt(x)
#define MAX(a, b) fmax(a, b)
#define MIN(a, b) fmin(a, b)
#define RINT(x) rint(x)
#define LOWEST_BYTE_OF_2_TO_23(word, byte) (((word) >> 8 * (byte) & 0xffu) | 0x4b000000u)
#define TYPE_float32 float
#define TYPE_float16 half
#define TYPE_bfloat16 bfloat16_t
INLINE float2 halves(uint word) { return float2(as_type<half2>(word)); }
"""

CUDA_OPENING = r"""
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, thread_index = threadIdx.x;
  const int block_x = blockIdx.x, block_y = blockIdx.y;
"""

METAL_OPENING = r"""
  const int lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
  const int thread_index = thread_position_in_threadgroup.x;
  const int block_x = threadgroup_position_in_grid.x, block_y = threadgroup_position_in_grid.y;
"""

# Keys and values are loaded in chunks of words.
CHUNK = r"""
#if CHUNK_WORDS == 4
typedef uint4 Chunk;
#define WORDS(chunk) {chunk.x, chunk.y, chunk.z, chunk.w}
#elif CHUNK_WORDS == 2
typedef uint2 Chunk;
#define WORDS(chunk) {chunk.x, chunk.y}
#else
typedef unsigned int Chunk;
#define WORDS(chunk) {chunk}
#endif
"""

# Chunks are unpacked to floats: two elements per word of 16-bit types, in memory order.
UNPACK = (
    CHUNK
    + r"""
INLINE void unpack(Chunk chunk, THREAD float* elements) {
  const unsigned int words[CHUNK_WORDS] = WORDS(chunk);
  UNROLL for (int i = 0; i < CHUNK_WORDS; ++i) {
#if FORMAT == 0
    elements[i] = AS_FLOAT(words[i]);
#elif FORMAT == 1
    const float2 pair = halves(words[i]);
    elements[2 * i] = pair.x;
    elements[2 * i + 1] = pair.y;
#else
    elements[2 * i] = AS_FLOAT(words[i] << 16);
    elements[2 * i + 1] = AS_FLOAT(words[i] & 0xffff0000u);
#endif
  }
}
"""
)

# Quantised elements become floats without a conversion: an integer in the low bits of the number 2^23 adds itself to
# it. Of 4 bits, element i comes out 16^(i % 4) times too large, which saves shifts; FACTOR(i) takes it back, where that
# is cheap. Meta is what a group has besides its elements.
UNPACK_PACKED = (
    CHUNK
    + r"""
#if BITS == 8
typedef TYPE_float16 Meta;
#define META_SCALE(meta) float(meta)
#define FACTOR(i) 1.f
#else
typedef unsigned int Meta;
#define META_SCALE(meta) halves(meta).x
#define META_BIAS(meta) halves(meta).y
#define FACTOR(i) (1.f / float(1 << 4 * ((i) % 4)))
#endif
INLINE void unpack(Chunk chunk, THREAD float* elements) {
  const unsigned int words[CHUNK_WORDS] = WORDS(chunk);
  UNROLL for (int i = 0; i < CHUNK_WORDS; ++i) {
#if BITS == 8
    UNROLL for (int b = 0; b < 4; ++b) {
      elements[4 * i + b] = AS_FLOAT(LOWEST_BYTE_OF_2_TO_23(words[i], b)) - 8388736.f;
    }
#else
    UNROLL for (int h = 0; h < 2; ++h) {
      const unsigned int half_word = words[i] >> 16 * h;
      UNROLL for (int n = 0; n < 4; ++n) {
        elements[8 * i + 4 * h + n] = AS_FLOAT((half_word & (0xfu << 4 * n)) | 0x4b000000u) - 8388608.f;
      }
    }
#endif
  }
}
"""
)


def header(dtype: str, backend: str, constants: Mapping[str, int | str], functions: str = "") -> str:
    """Prelude, constants and functions of a kernel on elements of `dtype`; `backend` is 'metal' or 'cuda'."""
    prelude = {"cuda": CUDA_PRELUDE, "metal": METAL_PRELUDE}[backend]
    formats = {"float32": 0, "float16": 1, "bfloat16": 2}
    common = {
        "FORMAT": formats[dtype],
        "TYPE": f"TYPE_{dtype}",
        "LEAST": "-1e30f",  # of running maxima: finite, because fast arithmetic knows no infinities
        "HIDDEN": "-1e38f",  # of hidden scores: far below any maximum, so that their weight is zero
    }
    defines = [f"#define {name} {value}" for name, value in {**common, **constants}.items()]
    return "\n".join([prelude, *defines, functions])


def opening(backend: str) -> str:
    """First lines of a body: lane, warp, thread_index, block_x and block_y."""
    return {"cuda": CUDA_OPENING, "metal": METAL_OPENING}[backend]


def literal(value: float) -> str:
    """A float constant."""
    return f"{value:.9e}f"


def build(name: str, text: tuple[str, str], *, inputs: tuple[str, ...], outputs: tuple[str, ...], backend: str) -> Any:
    """A kernel from its header and body, to be called as MLX documents it. Compiled at its first evaluation."""
    head, body = text
    # MLX keeps compiled kernels by name, on CUDA also on disk: another text must have another name.
    digest = hashlib.sha256(f"{head}\0{body}\0{inputs}".encode()).hexdigest()[:16]
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return make(name=f"{name}_{digest}", input_names=list(inputs), output_names=list(outputs), header=head, source=body)
