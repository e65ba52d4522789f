// GroupNormSilu: group norm over a clip, modulation, SiLU and an addition after it, for channels-last activations.
//
// LOWER BOUND. The statistics kernel reads the activation once; the second kernel reads it again and writes the result,
// and reads the identity of a residual block if one is added: 3 or 4 times the activation's bytes. The bound is at most
// that of a copy at 4.2 TB/s on an H200; all of it was just written and is in the L2 cache (computed, not measured):
//
//     map of the UNet        values     40 frames in float16     the bound, with the addition
//     32x32 x  64            2.62 M     5.2 MB                   3.7 us    5.0 us
//     16x16 x 128            1.31 M     2.6 MB                   1.9 us    2.5 us
//       8x8 x 256            0.66 M     1.3 MB                   0.9 us    1.2 us
//       4x4 x 512            0.33 M     0.7 MB                   0.5 us    0.6 us
//
// A launch in a graph takes about 2 us by itself, so small maps are bound by the two launches, not by bytes.
//
// DESIGN. No value can be normalized before its whole group is read, and blocks cannot wait for one another, so there
// are two kernels. The first computes mean and squared deviation (M2) of each group in each slab of rows; a row is a
// pixel of a frame, and the rows of a clip are consecutive. The second merges the slabs' results (Chan et al.,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979), forms one factor and one offset
// per channel and applies them. Each of its blocks merges for itself: some hundred pairs per group.
//  - A block handles a slice of the channels: as many whole groups as fill a line of 128 bytes. Every access is
//    coalesced, with 16 bytes per thread, and a map with few rows and many channels still fills the GPU.
//  - A thread keeps the same channels and iterates over rows. Its deviations are relative to its first value, so that
//    the mean, large or not, cancels before squares are summed.
//  - Sums have an order that depends on the sizes only, not on the batch: the same bits in every run, and for a clip
//    alone or in a batch.
// Groups whose channels are not a multiple of 16 bytes are read one value at a time.
//
// Arithmetic is float32 for every storage type.
#include "cuda/shim.cuh"

#if !defined(__CUDACC__)
#include <cmath>
using std::exp;
using std::sqrt;
#endif

namespace lfdm {

constexpr int NORM_THREADS = 512;

struct NormShape {
    int rows;             // per clip: frames · height · width
    int channels;
    int groups;
    int slice_groups;     // per block
    int slab_rows;        // per partial result
    int row_stride;       // of scale and shift, from one clip to the next
    int modulated, added; // apply scale and shift; add the residual
};

// Number of some values, their mean, and the sum of their squared deviations from it.
struct Moments {
    float count, mean, deviation;
};

struct NormShared {
    Moments moments[NORM_THREADS];
};

struct alignas(8) Partial {
    float mean, deviation;
};

LFDM_INLINE Moments merged(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    if (count == 0.0f) return a;
    const float share = quick_quotient(b.count, count), apart = b.mean - a.mean;
    return {count, multiply_add(apart, share, a.mean), a.deviation + b.deviation + apart * apart * (a.count * share)};
}

// Merges shared.moments[member · groups + group] over the members, into the first member of each group.
LFDM_INLINE void merge_members(const Block<NORM_THREADS>& block, NormShared& shared, int groups, int members) {
    while (members > 1) {
        const int half = (members + 1) / 2, pairs = (members - half) * groups, offset = half * groups;
        block.phase([&](int thread) {
            if (thread < pairs)
                shared.moments[thread] = merged(shared.moments[thread], shared.moments[thread + offset]);
        });
        members = half;
    }
}

// Assignment of a block's threads to its slice: `lanes` threads side by side over packs of COUNT channels, and as many
// rows at a time as the remaining threads allow.
template <int COUNT>
struct Lanes {
    int group_packs, packs, lanes, rows;

    LFDM_INLINE explicit Lanes(const NormShape& shape) {
        group_packs = shape.channels / shape.groups / COUNT;
        packs = group_packs * shape.slice_groups;
        lanes = packs < NORM_THREADS ? packs : NORM_THREADS;  // a slice of more packs is a single group
        rows = NORM_THREADS / lanes;
    }
    // Threads per group.
    LFDM_INLINE int members(const NormShape& shape) const { return rows * (lanes / shape.slice_groups); }
};

// -- the statistics

template <int COUNT, class T>
LFDM_INLINE void norm_statistics_of(const Block<NORM_THREADS>& block, NormShared& shared, const NormShape& shape,
                                    const T* LFDM_RESTRICT x, Partial* LFDM_RESTRICT partials) {
    const Lanes<COUNT> lanes(shape);
    const int first = block.x * shape.slab_rows;
    const int end = shape.rows < first + shape.slab_rows ? shape.rows : first + shape.slab_rows;
    x += int64(block.z) * shape.rows * shape.channels + block.y * lanes.packs * COUNT;
    block.phase([&](int thread) {
        const int lane = thread % lanes.lanes, row = thread / lanes.lanes;
        if (row >= lanes.rows) return;
        Moments own = {0.0f, 0.0f, 0.0f};
        if (first + row < end) {
            const float origin = load(x[int64(first + row) * shape.channels + lane * COUNT]);
            float sum = 0.0f, squares = 0.0f;
            for (int pack = lane; pack < lanes.packs; pack += lanes.lanes) {
                constexpr int IN_FLIGHT = 4;  // independent reads
                for (int at = first + row; at < end; at += IN_FLIGHT * lanes.rows) {
                    Pack<T, COUNT> values[IN_FLIGHT];
#pragma unroll
                    for (int j = 0; j < IN_FLIGHT; ++j) {
                        const int place = at + j * lanes.rows;
                        if (place < end) values[j] = read_pack<COUNT>(x + int64(place) * shape.channels + pack * COUNT);
                    }
#pragma unroll
                    for (int j = 0; j < IN_FLIGHT; ++j) {
                        if (at + j * lanes.rows >= end) break;
#pragma unroll
                        for (int i = 0; i < COUNT; ++i) {
                            const float apart = load(values[j].values[i]) - origin;
                            sum += apart;
                            squares = multiply_add(apart, apart, squares);
                        }
                    }
                }
            }
            const int rows = (end - first - row + lanes.rows - 1) / lanes.rows;
            const int packs = (lanes.packs - lane + lanes.lanes - 1) / lanes.lanes;
            own.count = float(rows) * float(packs * COUNT);
            const float mean = sum / own.count;
            const float deviation = multiply_add(-mean, sum, squares);
            own.mean = origin + mean;
            own.deviation = deviation < 0.0f ? 0.0f : deviation;  // NaN stays NaN
        }
        const int group_lanes = lanes.lanes / shape.slice_groups;
        const int member = row * group_lanes + lane % group_lanes;
        shared.moments[member * shape.slice_groups + lane / group_lanes] = own;
    });
    merge_members(block, shared, shape.slice_groups, lanes.members(shape));
    block.phase([&](int thread) {
        if (thread >= shape.slice_groups) return;
        const int64 slab = int64(block.z) * block.blocks_x + block.x;
        const Moments& all = shared.moments[thread];
        partials[slab * shape.groups + block.y * shape.slice_groups + thread] = {all.mean, all.deviation};
    });
}

// Grid: slabs of rows, slices of channels, clips. Partials: (clips, slabs, groups).
template <class T>
LFDM_INLINE void norm_statistics(const Block<NORM_THREADS>& block, NormShared& shared, const NormShape& shape,
                                 const T* LFDM_RESTRICT x, float* LFDM_RESTRICT partials) {
    constexpr int PACK = 16 / sizeof(T);
    Partial* LFDM_RESTRICT pairs = reinterpret_cast<Partial*>(partials);
    if (shape.channels / shape.groups % PACK == 0) {
        norm_statistics_of<PACK>(block, shared, shape, x, pairs);
    } else {
        norm_statistics_of<1>(block, shared, shape, x, pairs);
    }
}

// -- normalization

// COUNT neighboring values of a parameter, in accesses of at most 16 bytes.
template <int COUNT, class P>
LFDM_INLINE void read_values(const P* LFDM_RESTRICT at, float (&values)[COUNT]) {
    constexpr int EACH = COUNT < int(16 / sizeof(P)) ? COUNT : int(16 / sizeof(P));
#pragma unroll
    for (int begin = 0; begin < COUNT; begin += EACH) {
        const auto part = read_pack<EACH>(at + begin);
#pragma unroll
        for (int i = 0; i < EACH; ++i) values[begin + i] = load(part.values[i]);
    }
}

// For 16-bit results, the GPU's approximations, accurate to about 2^-21, cost an eighth of the exact functions.
template <class T>
LFDM_INLINE float silu(float value) {
#if defined(__CUDACC__)
    if (sizeof(T) == 2) return quick_quotient(value, 1.0f + __expf(-value));
#endif
    return value / (1.0f + exp(-value));
}

template <int COUNT, class T, class P>
LFDM_INLINE void norm_apply_to(const Block<NORM_THREADS>& block, NormShared& shared, const NormShape& shape,
                               int apply_rows, float epsilon, const T* LFDM_RESTRICT x,
                               const Partial* LFDM_RESTRICT partials, const P* LFDM_RESTRICT gamma,
                               const P* LFDM_RESTRICT beta, const P* LFDM_RESTRICT scale, const P* LFDM_RESTRICT shift,
                               const T* LFDM_RESTRICT residual, T* LFDM_RESTRICT result) {
    const Lanes<COUNT> lanes(shape);
    const int groups = shape.slice_groups, members = NORM_THREADS / groups;
    const int slabs = (shape.rows + shape.slab_rows - 1) / shape.slab_rows;
    partials += int64(block.z) * slabs * shape.groups + block.y * groups;
    block.phase([&](int thread) {
        if (thread >= members * groups) return;
        const float channels = float(shape.channels / shape.groups);
        Moments own = {0.0f, 0.0f, 0.0f};
        for (int slab = thread / groups; slab < slabs; slab += members) {
            const Partial part = partials[int64(slab) * shape.groups + thread % groups];
            const int rest = shape.rows - slab * shape.slab_rows;
            const float rows = float(rest < shape.slab_rows ? rest : shape.slab_rows);
            own = merged(own, {rows * channels, part.mean, part.deviation});
        }
        shared.moments[thread] = own;
    });
    merge_members(block, shared, groups, members < slabs ? members : slabs);

    const int first = block.x * apply_rows;
    const int end = shape.rows < first + apply_rows ? shape.rows : first + apply_rows;
    const int64 begin = int64(block.z) * shape.rows * shape.channels;
    block.phase([&](int thread) {
        const int lane = thread % lanes.lanes, row = thread / lanes.lanes;
        if (row >= lanes.rows) return;
        for (int pack = lane; pack < lanes.packs; pack += lanes.lanes) {
            const int channel = (block.y * lanes.packs + pack) * COUNT;
            const Moments all = shared.moments[pack / lanes.group_packs];
            const float rstd = 1.0f / sqrt(all.deviation / all.count + epsilon);
            float factor[COUNT], offset[COUNT];
            read_values(gamma + channel, factor);
            read_values(beta + channel, offset);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) factor[i] = factor[i] * rstd;
            if (shape.modulated) {
                float gain[COUNT], moved[COUNT];
                const int64 of_clip = int64(block.z) * shape.row_stride + channel;
                read_values(scale + of_clip, gain);
                read_values(shift + of_clip, moved);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) {
                    gain[i] = gain[i] + 1.0f;
                    factor[i] = factor[i] * gain[i];
                    offset[i] = multiply_add(offset[i], gain[i], moved[i]);
                }
            }
            constexpr int IN_FLIGHT = 2;
            for (int at = first + row; at < end; at += IN_FLIGHT * lanes.rows) {
                Pack<T, COUNT> values[IN_FLIGHT], identity[IN_FLIGHT] = {};
#pragma unroll
                for (int j = 0; j < IN_FLIGHT; ++j) {
                    const int64 place = begin + int64(at + j * lanes.rows) * shape.channels + channel;
                    if (at + j * lanes.rows >= end) break;
                    values[j] = read_pack<COUNT>(x + place);
                    if (shape.added) identity[j] = read_pack<COUNT>(residual + place);
                }
#pragma unroll
                for (int j = 0; j < IN_FLIGHT; ++j) {
                    const int64 place = begin + int64(at + j * lanes.rows) * shape.channels + channel;
                    if (at + j * lanes.rows >= end) break;
                    Pack<T, COUNT> after;
#pragma unroll
                    for (int i = 0; i < COUNT; ++i) {
                        // The mean is subtracted separately from the offset, so that a large mean adds no rounding.
                        const float apart = load(values[j].values[i]) - all.mean;
                        const float active = silu<T>(multiply_add(apart, factor[i], offset[i]));
                        after.values[i] = store<T>(active + load(identity[j].values[i]));
                    }
                    write_pack<COUNT>(result + place, after);
                }
            }
        }
    });
}

// Grid: blocks of `apply_rows` rows, slices of channels, clips. P stores gamma, beta, scale and shift.
template <class T, class P>
LFDM_INLINE void norm_apply(const Block<NORM_THREADS>& block, NormShared& shared, const NormShape& shape,
                            int apply_rows, float epsilon, const T* LFDM_RESTRICT x,
                            const float* LFDM_RESTRICT partials, const P* LFDM_RESTRICT gamma,
                            const P* LFDM_RESTRICT beta, const P* LFDM_RESTRICT scale, const P* LFDM_RESTRICT shift,
                            const T* LFDM_RESTRICT residual, T* LFDM_RESTRICT result) {
    constexpr int PACK = 16 / sizeof(T);
    const Partial* LFDM_RESTRICT pairs = reinterpret_cast<const Partial*>(partials);
    if (shape.channels / shape.groups % PACK == 0) {
        norm_apply_to<PACK>(block, shared, shape, apply_rows, epsilon, x, pairs, gamma, beta, scale, shift, residual,
                            result);
    } else {
        norm_apply_to<1>(block, shared, shape, apply_rows, epsilon, x, pairs, gamma, beta, scale, shift, residual,
                         result);
    }
}

}  // namespace lfdm

// Kernels, by name and by the types of the activation and of the parameters.
#define LFDM_NORM_STATISTICS_KERNEL(name, T)                                                                         \
    LFDM_KERNEL_OF(name, lfdm::NORM_THREADS, 2)                                                                      \
    (const lfdm::T* LFDM_RESTRICT x, int rows, int channels, int groups, int slice_groups, int slab_rows,            \
     float* LFDM_RESTRICT partials) {                                                                                \
        LFDM_SHARED lfdm::NormShared shared;                                                                         \
        lfdm::spoil(shared);                                                                                         \
        const lfdm::NormShape shape = {rows, channels, groups, slice_groups, slab_rows, 0, 0, 0};                    \
        lfdm::norm_statistics<lfdm::T>({}, shared, shape, x, partials);                                              \
    }

#define LFDM_NORM_APPLY_KERNEL(name, T, P, epsilon)                                                                  \
    LFDM_KERNEL_OF(name, lfdm::NORM_THREADS, 2)                                                                      \
    (const lfdm::T* LFDM_RESTRICT x, const float* LFDM_RESTRICT partials, const lfdm::P* LFDM_RESTRICT gamma,        \
     const lfdm::P* LFDM_RESTRICT beta, const lfdm::P* LFDM_RESTRICT scale, const lfdm::P* LFDM_RESTRICT shift,      \
     const lfdm::T* LFDM_RESTRICT residual, int rows, int channels, int groups, int slice_groups, int slab_rows,     \
     int row_stride, int modulated, int added, int apply_rows, lfdm::T* LFDM_RESTRICT result) {                      \
        LFDM_SHARED lfdm::NormShared shared;                                                                         \
        lfdm::spoil(shared);                                                                                         \
        const lfdm::NormShape shape = {rows,      channels,   groups,    slice_groups,                               \
                                       slab_rows, row_stride, modulated, added};                                     \
        lfdm::norm_apply<lfdm::T, lfdm::P>({}, shared, shape, apply_rows, epsilon, x, partials, gamma, beta, scale,  \
                                           shift, residual, result);                                                 \
    }
