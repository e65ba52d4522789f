// Definitions with which one kernel body is built twice: by nvcc or NVRTC for a GPU, by a C++17 compiler for the host.
//
// A kernel is written as a function of a Block. Threads work together in phases: block.phase(f) runs f(thread) for
// every thread of the block and ends with a barrier. On a GPU each thread runs f once. On the host one thread runs f
// for all of them in turn, in a configurable order, so that a result that depends on the order reveals a race.
// Phases pass data through a struct in shared memory. All threads run the code between phases alike; it reads shared
// memory through block.read, which keeps the next phase from writing before all have read.
//
// The GPU build includes no other header, so that NVRTC needs only this text. Both builds round every operation alike
// (no contraction, no flush to zero; fused multiply-adds are written out as multiply_add). Results on the host are
// therefore equal to the GPU's bit for bit, except for the libraries' exponential, logarithm, sine and cosine, and for
// quick_quotient.
#pragma once

#if defined(__CUDACC__)
#define LFDM_INLINE __device__ __forceinline__
#define LFDM_SHARED __shared__
#define LFDM_RESTRICT __restrict__
#else
#include <cmath>
#include <cstring>
#define LFDM_INLINE inline
#define LFDM_SHARED
#define LFDM_RESTRICT
#endif

namespace lfdm {

using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

// -- bits and arithmetic

#if defined(__CUDACC__)
LFDM_INLINE uint32 bits_of(float value) { return __float_as_uint(value); }
LFDM_INLINE float float_of(uint32 bits) { return __uint_as_float(bits); }
LFDM_INLINE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LFDM_INLINE uint64 multiply_high(uint64 a, uint64 b) { return __umul64hi(a, b); }
LFDM_INLINE float quick_quotient(float a, float b) { return __fdividef(a, b); }  // 2 ulp; 0 if |b| > 2^126
LFDM_INLINE void atomic_increment(uint32& counter) { atomicAdd(&counter, 1u); }
LFDM_INLINE void atomic_add(uint32& counter, uint32 value) { atomicAdd(&counter, value); }
LFDM_INLINE void atomic_larger(uint32& largest, uint32 value) { atomicMax(&largest, value); }
#else
LFDM_INLINE uint32 bits_of(float value) {
    uint32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
LFDM_INLINE float float_of(uint32 bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
LFDM_INLINE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
LFDM_INLINE uint64 multiply_high(uint64 a, uint64 b) {
    const uint64 mask = 0xffffffffu;
    const uint64 low = (a & mask) * (b & mask), left = (a >> 32) * (b & mask), right = (a & mask) * (b >> 32);
    const uint64 middle = (low >> 32) + (left & mask) + (right & mask);
    return (a >> 32) * (b >> 32) + (left >> 32) + (right >> 32) + (middle >> 32);
}
LFDM_INLINE float quick_quotient(float a, float b) { return a / b; }
LFDM_INLINE void atomic_increment(uint32& counter) { ++counter; }
LFDM_INLINE void atomic_add(uint32& counter, uint32 value) { counter += value; }
LFDM_INLINE void atomic_larger(uint32& largest, uint32 value) { largest = largest > value ? largest : value; }
#endif

LFDM_INLINE uint32 smaller(uint32 a, uint32 b) { return a < b ? a : b; }
LFDM_INLINE uint32 larger(uint32 a, uint32 b) { return a > b ? a : b; }

// -- storage types; arithmetic is float32

using float32 = float;
struct float16 {
    uint16 bits;
};
struct bfloat16 {
    uint16 bits;
};

LFDM_INLINE float load(float value) { return value; }

LFDM_INLINE float load(bfloat16 value) { return float_of(uint32(value.bits) << 16); }

LFDM_INLINE float load(float16 value) {
#if defined(__CUDACC__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32 sign = uint32(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Exact for subnormal numbers too: a product changes the exponent's bias.
    return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
#endif
}

template <class T>
LFDM_INLINE T store(float value);

template <>
LFDM_INLINE float store<float>(float value) {
    return value;
}

// Round to nearest, ties to even.
template <>
LFDM_INLINE bfloat16 store<bfloat16>(float value) {
    const uint32 bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16(bits >> 16 | 0x40u)};
    return {uint16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
LFDM_INLINE float16 store<float16>(float value) {
#if defined(__CUDACC__)
    float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32 bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const uint16 sign = uint16(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return {uint16(sign | 0x7e00u)};
    if (magnitude >= 0x47800000u) return {uint16(sign | 0x7c00u)};  // 65536 and more
    if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 leaves multiples of 2^-24, rounded by the addition
        return {uint16(sign | uint16(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
    }
    const uint32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return {uint16(sign | uint16((rounded - 0x38000000u) >> 13))};
#endif
}

// COUNT neighboring values of at most 16 bytes, moved in one access: they are aligned to their size.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};

#if defined(__CUDACC__)
template <int BYTES>
struct Word;
template <>
struct Word<2> {
    using type = uint16;
};
template <>
struct Word<4> {
    using type = uint32;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};
// A struct of eight 16-bit values would be moved in halves: the compiler's vectors have at most four elements.
template <class T, int COUNT>
union Moved {
    Pack<T, COUNT> pack;
    typename Word<sizeof(T) * COUNT>::type word;
};
#endif

template <int COUNT, class T>
LFDM_INLINE Pack<T, COUNT> read_pack(const T* LFDM_RESTRICT at) {
#if defined(__CUDACC__)
    Moved<T, COUNT> moved;
    moved.word = __ldg(reinterpret_cast<const decltype(moved.word)*>(at));
    return moved.pack;
#else
    Pack<T, COUNT> pack;
    std::memcpy(pack.values, at, sizeof pack);
    return pack;
#endif
}

template <int COUNT, class T>
LFDM_INLINE void write_pack(T* LFDM_RESTRICT at, const Pack<T, COUNT>& pack) {
#if defined(__CUDACC__)
    Moved<T, COUNT> moved;
    moved.pack = pack;
    *reinterpret_cast<decltype(moved.word)*>(at) = moved.word;
#else
    std::memcpy(at, pack.values, sizeof pack);
#endif
}

// -- blocks

#if defined(__CUDACC__)

template <int THREADS>
struct Block {
    static constexpr int threads = THREADS;
    int x = blockIdx.x, y = blockIdx.y, z = blockIdx.z;
    int blocks_x = gridDim.x;

    template <class Function>
    LFDM_INLINE void phase(Function function) const {
        function(int(threadIdx.x));
        __syncthreads();
    }

    // For work of warps, which ends without one.
    LFDM_INLINE void barrier() const { __syncthreads(); }

    template <class T>
    LFDM_INLINE T read(const T& shared) const {
        const T value = shared;
        __syncthreads();
        return value;
    }
};

// Shared memory still contains the data of the previous block.
template <class T>
LFDM_INLINE void spoil(T&) {}

#define LFDM_KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
// For a multiprocessor that holds at least that many blocks: this determines the registers per thread.
#define LFDM_KERNEL_OF(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name

#else

// The block that a call of a kernel runs, and the order of its threads. 0: first thread first; 1: last thread first; 2:
// in strides, so that consecutive threads are far apart.
struct Launch {
    int x = 0, y = 0, z = 0, blocks_x = 1, order = 0;
};

inline Launch& launch() {
    static Launch current;
    return current;
}

template <int THREADS>
struct Block {
    static_assert((THREADS & (THREADS - 1)) == 0, "threads of a block: a power of two");
    static constexpr int threads = THREADS;
    int x = launch().x, y = launch().y, z = launch().z;
    int blocks_x = launch().blocks_x;

    template <class Function>
    void phase(Function function) const {
        for (int i = 0; i < THREADS; ++i) {
            // An odd stride visits every thread once.
            const int orders[] = {i, THREADS - 1 - i, int(uint32(i) * 0x9e37u % THREADS)};
            function(orders[launch().order]);
        }
    }

    void barrier() const {}

    template <class T>
    T read(const T& shared) const {
        return shared;
    }
};

template <class T>
void spoil(T& shared) {
    std::memset(static_cast<void*>(&shared), 0xa5, sizeof shared);
}

// Runs the one block that `launch` selects.
#define LFDM_KERNEL(name, threads) extern "C" void name
#define LFDM_KERNEL_OF(name, threads, blocks) extern "C" void name

#endif

}  // namespace lfdm
