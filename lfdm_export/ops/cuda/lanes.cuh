// Warps: 32 lanes that compute together, with registers only. A kernel that uses warps is built twice, as `shim.cuh`
// describes for blocks.
//
// A PerLane<T> holds one value per lane: on a GPU one T in each lane's registers, on the host all 32 of them. A
// PerWarp<T, WARPS> likewise holds what each warp of a block keeps between calls of each_warp.
// each_lane(f) runs f(lane) for each lane; f accesses only its own lane's values. Operations across lanes (matrix
// products, transposition, maxima and sums over four lanes) are functions between these calls, written once for the GPU
// as instructions, and once for the host, from the layouts that the PTX ISA defines for those instructions.
//
// A matrix product rounds alike in both builds except for the order of its sums; exp2 and reciprocals are approximate
// on a GPU.
//
// Needs compute capability 8.0. Source: PTX ISA 8.0, sections on mma.sync, movmatrix, shfl.sync, ld.global.nc, cp.async.
#pragma once
#include "cuda/shim.cuh"

namespace lfdm {

constexpr int LANES = 32;

#if defined(__CUDACC__)

template <class T>
struct PerLane {
    T value;
    LFDM_INLINE T& operator[](int) { return value; }
    LFDM_INLINE const T& operator[](int) const { return value; }
};

template <class Function>
LFDM_INLINE void each_lane(Function function) {
    function(int(threadIdx.x) % LANES);
}

template <class T, int WARPS>
struct PerWarp {
    T value;
    LFDM_INLINE T& operator[](int) { return value; }
};

// Runs f(warp) for every warp of a block; no barrier follows.
template <int THREADS, class Function>
LFDM_INLINE void each_warp(const Block<THREADS>&, Function function) {
    function(int(threadIdx.x) / LANES);
}

// Number of blocks that must fit on a multiprocessor together: it limits the registers per thread.
#define LFDM_LANES_KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name

#else

template <class T>
struct PerLane {
    T values[LANES] = {};
    T& operator[](int lane) { return values[lane]; }
    const T& operator[](int lane) const { return values[lane]; }
};

template <class T, int WARPS>
struct PerWarp {
    T values[WARPS] = {};
    T& operator[](int warp) { return values[warp]; }
};

template <class Function>
void each_lane(Function function) {
    for (int lane = 0; lane < LANES; ++lane) function(lane);
}

template <int THREADS, class Function>
void each_warp(const Block<THREADS>& block, Function function) {
    block.phase([&](int thread) {
        if (thread % LANES == 0) function(thread / LANES);
    });
}

#define LFDM_LANES_KERNEL(name, threads, blocks) extern "C" void name

#endif

// -- two 16-bit values per register

struct Two {
    float first, second;
};

template <class T>
LFDM_INLINE Two unpack(uint32 bits) {
    return {load(T{uint16(bits & 0xffffu)}), load(T{uint16(bits >> 16)})};
}

template <class T>
LFDM_INLINE uint32 pack(float first, float second);

#if defined(__CUDACC__)
template <>
LFDM_INLINE uint32 pack<float16>(float first, float second) {
    uint32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}
template <>
LFDM_INLINE uint32 pack<bfloat16>(float first, float second) {
    uint32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}
#else
template <class T>
uint32 pack(float first, float second) {
    return uint32(store<T>(first).bits) | uint32(store<T>(second).bits) << 16;
}
#endif

// -- memory

// COUNT registers that no other warp reads: this leaves the L1 cache to data that is read again.
template <int COUNT>
LFDM_INLINE Pack<uint32, COUNT> read_once(const uint32* LFDM_RESTRICT at) {
    static_assert(COUNT == 2 || COUNT == 4, "8 or 16 bytes");
#if defined(__CUDACC__)
    Pack<uint32, COUNT> moved;
    if constexpr (COUNT == 4) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(moved.values[0]), "=r"(moved.values[1]), "=r"(moved.values[2]), "=r"(moved.values[3])
                     : "l"(at));
    } else {
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                     : "=r"(moved.values[0]), "=r"(moved.values[1])
                     : "l"(at));
    }
    return moved;
#else
    return read_pack<COUNT>(at);
#endif
}

// Copies 16 bytes to shared memory, or zeros if not `inside`, and does not wait for them.
LFDM_INLINE void copy_later(uint32* to, const uint32* LFDM_RESTRICT from, bool inside) {
#if defined(__CUDACC__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(uint32(__cvta_generic_to_shared(to))), "l"(from), "r"(inside ? 16u : 0u)
                 : "memory");
#else
    const Pack<uint32, 4> moved = inside ? read_pack<4>(from) : Pack<uint32, 4>{};
    write_pack(to, moved);
#endif
}

// Waits until all copies by the warp's lanes have come.
LFDM_INLINE void await_copies() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_all;" : : : "memory");
    __syncwarp();
#endif
}

// Waits for the warp's lanes: what they read before may be overwritten by any of them afterwards.
LFDM_INLINE void meet_lanes() {
#if defined(__CUDACC__)
    __syncwarp();
#endif
}

// -- arithmetic

LFDM_INLINE float larger(float a, float b) {
#if defined(__CUDACC__)
    return fmaxf(a, b);
#else
    return std::fmax(a, b);
#endif
}

LFDM_INLINE float exp2_of(float value) {
#if defined(__CUDACC__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return std::exp2(value);
#endif
}

LFDM_INLINE float reciprocal(float value) {
#if defined(__CUDACC__)
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return 1.0f / value;
#endif
}

// -- operations across lanes

// Lane 4 g + t holds the elements (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1) of a 16x8 product.
struct Quad {
    float values[4];
};

#if defined(__CUDACC__)

// All lanes must take part: `volatile` keeps the compiler from moving these into a branch that only some lanes take.

LFDM_INLINE float from_lane_across(float value, int distance) {
    return __shfl_xor_sync(0xffffffffu, value, distance);
}

template <class Combine>
LFDM_INLINE void over_four_lanes(PerLane<float>& values, Combine combine) {
    values.value = combine(values.value, from_lane_across(values.value, 1));
    values.value = combine(values.value, from_lane_across(values.value, 2));
}

LFDM_INLINE void transpose(PerLane<uint32>& rows) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(rows.value) : "r"(rows.value));
}

template <class T>
struct Product;

#define LFDM_PRODUCT(T, name)                                                                                        \
    template <>                                                                                                      \
    struct Product<T> {                                                                                              \
        LFDM_INLINE static void add(Quad& c, uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {     \
            asm volatile(                                                                                            \
                "mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                                       \
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                    \
                : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])                         \
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                             \
        }                                                                                                            \
        LFDM_INLINE static void add(Quad& c, uint32 a0, uint32 a1, uint32 b0) {                                      \
            asm volatile(                                                                                            \
                "mma.sync.aligned.m16n8k8.row.col.f32." name "." name ".f32 "                                        \
                "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                                \
                : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])                         \
                : "r"(a0), "r"(a1), "r"(b0));                                                                        \
        }                                                                                                            \
    };
LFDM_PRODUCT(float16, "f16")
LFDM_PRODUCT(bfloat16, "bf16")
#undef LFDM_PRODUCT

template <class T>
LFDM_INLINE void multiply_add_16(PerLane<Quad>& c, const PerLane<uint32> (&a)[4], const PerLane<uint32>& b0,
                                 const PerLane<uint32>& b1) {
    Product<T>::add(c.value, a[0].value, a[1].value, a[2].value, a[3].value, b0.value, b1.value);
}

template <class T>
LFDM_INLINE void multiply_add_8(PerLane<Quad>& c, const PerLane<uint32> (&a)[2], const PerLane<uint32>& b) {
    Product<T>::add(c.value, a[0].value, a[1].value, b.value);
}

#else

// combine over the lanes 4 g … 4 g + 3; each of the four receives the result.
template <class Combine>
void over_four_lanes(PerLane<float>& values, Combine combine) {
    for (int distance = 1; distance < 4; distance *= 2) {
        const PerLane<float> before = values;
        for (int lane = 0; lane < LANES; ++lane) values[lane] = combine(before[lane], before[lane ^ distance]);
    }
}

inline uint16 half_of(uint32 bits, int which) { return uint16(bits >> 16 * which); }

// Transposes an 8x8 matrix of 16-bit values, of which lane 4 i + j holds the elements (i, 2 j) and (i, 2 j + 1).
inline void transpose(PerLane<uint32>& rows) {
    const PerLane<uint32> before = rows;
    const auto element = [&](int row, int column) {
        return uint32(half_of(before[4 * row + column / 2], column % 2));
    };
    for (int lane = 0; lane < LANES; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        rows[lane] = element(column, row) | element(column + 1, row) << 16;
    }
}

// c (16x8) += a (16 x 8 STEPS) · b (8 STEPS x 8). For each step of 8 columns, lane 4 g + t holds two registers of a
// (row g and row g + 8, columns 2 t and 2 t + 1) and one register of b (rows 2 t and 2 t + 1 of column g).
template <class T, int STEPS>
void multiply_add_steps(PerLane<Quad>& c, const PerLane<uint32> (&a)[2 * STEPS],
                        const PerLane<uint32>* const (&b)[STEPS]) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float& sum = c[row % 8 * 4 + column / 2].values[row / 8 * 2 + column % 2];
            double exact = sum;
            for (int k = 0; k < 8 * STEPS; ++k) {
                const uint32 left = a[k / 8 * 2 + row / 8][row % 8 * 4 + k % 8 / 2];
                const uint32 right = (*b[k / 8])[column * 4 + k % 8 / 2];
                exact += double(load(T{half_of(left, k % 2)})) * load(T{half_of(right, k % 2)});
            }
            sum = float(exact);
        }
}

template <class T>
void multiply_add_16(PerLane<Quad>& c, const PerLane<uint32> (&a)[4], const PerLane<uint32>& b0,
                     const PerLane<uint32>& b1) {
    multiply_add_steps<T, 2>(c, a, {&b0, &b1});
}

template <class T>
void multiply_add_8(PerLane<Quad>& c, const PerLane<uint32> (&a)[2], const PerLane<uint32>& b) {
    multiply_add_steps<T, 1>(c, a, {&b});
}

#endif

// The largest value, and the sum, over the lanes 4 g … 4 g + 3.
LFDM_INLINE void largest_of_four(PerLane<float>& values) {
    over_four_lanes(values, [](float a, float b) { return larger(a, b); });
}
LFDM_INLINE void sum_of_four(PerLane<float>& values) {
    over_four_lanes(values, [](float a, float b) { return a + b; });
}

}  // namespace lfdm
