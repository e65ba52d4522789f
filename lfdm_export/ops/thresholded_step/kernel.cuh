// ThresholdedStep: x0 estimate, exact 0.9 quantile of its magnitudes, clamp, sampler update.
//
// LOWER BOUND. A sample of the published model has n = 3·40·32·32 = 122,880 values. The update reads latent,
// prediction, noise and two halves of the history, and writes the latent and two halves: 8·4·n = 3.9 MB per sample in
// float32, 0.9 us at 4.3 TB/s; all of it was just written by the previous step, and is in the L2 cache. About 20
// operations per element are negligible. The quantile takes the time: no element can be clamped before all are read.
//
// DESIGN of the single kernel (passes.cuh has a faster design). A plugin has one kernel, no workspace, and no way to
// make blocks wait for one another. A sample's values fit neither in one multiprocessor's registers (256 KB) nor in its
// shared memory (228 KB at most). So each of the SPLITS blocks of a sample finds the quantile by itself, reads latent
// and prediction again in each pass, and then updates its own share. A multiprocessor reads about 64 bytes per clock
// from L2, about 110 GB/s: at this rate a pass over 2·4·n bytes should take 9 us, a share of 1/8 about 5 us (computed).
// The redundant work runs on multiprocessors that would be idle. Measured on an H200: 57 us, or 24 us if pass 1 is
// enough.
//
// The quantile is a radix select on the bits of |x0|, whose order as integers is the order of the values. The bound is
// at least 1, so values below 1 are only counted: pass 1 counts them, and 8 bins per octave for the others (1032 bins).
// If both order statistics are below 1, pass 1 is enough, as in most steps of a trained model. Otherwise passes 2 and 3
// narrow the bin by 11 and 9 bits down to a single value; pass 3 also finds the smallest value above. Everything is
// exact: order statistics are bits, and estimate, interpolation and update are the same float32 operations, in the same
// order and without contraction, as in `lfdm_export.sampling.loop`.
//
// NaN: its bits are above those of all numbers, as torch sorts it; a bound or an estimate of NaN gives NaN.
#pragma once

#include "cuda/shim.cuh"

namespace lfdm {

constexpr int STEP_THREADS = 1024;
constexpr int STEP_BINS = 2048;
constexpr int COEFFICIENTS = 11;
constexpr uint32 ONE_BITS = 0x3f800000u;
constexpr uint32 MAGNITUDE_BITS = 0x7fffffffu;
// Bits of an offset from ONE_BITS: 31, in passes of 11 (of which 1032 values occur), 11 and 9.
constexpr int FIRST_SHIFT = 20, SECOND_SHIFT = 9;

// Columns of `coefficients`, as in lfdm_export.sampling.tables.
enum Column {
    X0_FROM_LATENT,
    X0_FROM_PREDICTED_NOISE,
    NEXT_FROM_LATENT,
    NEXT_FROM_X0,
    NEXT_FROM_PREDICTED_NOISE,
    NEXT_FROM_CARRY,
    NEXT_FROM_PREVIOUS_X0,
    NEXT_FROM_NOISE,
    CARRY_FROM_CARRY,
    CARRY_FROM_X0,
    CARRY_FROM_PREVIOUS_X0,
};

struct StepShared {
    uint32 bins[STEP_BINS];
    uint32 sums[2][STEP_THREADS];
    uint32 most[STEP_THREADS];   // largest bits below ONE_BITS
    uint32 least[STEP_THREADS];  // smallest bits above the examined range
    uint32 found_bin, found_before;
};

// The data of one block: S stores latents, history and noise, P the prediction.
template <class S, class P>
struct StepSample {
    const S* LFDM_RESTRICT latent;
    const P* LFDM_RESTRICT predicted;
    const S* LFDM_RESTRICT carry;
    const S* LFDM_RESTRICT previous;
    const S* LFDM_RESTRICT noise;
    S* LFDM_RESTRICT next_latent;
    S* LFDM_RESTRICT next_carry;
    S* LFDM_RESTRICT next_x0;
    float c[COEFFICIENTS];
    int elements;

    LFDM_INLINE float estimate(float x, float e) const {
        return c[X0_FROM_LATENT] * x + c[X0_FROM_PREDICTED_NOISE] * e;
    }
};

// Calls function(bits of |estimate|) for every `threads`-th pack of the sample, starting at `thread`.
template <int COUNT, class S, class P, class Function>
LFDM_INLINE void each_magnitude(const StepSample<S, P>& sample, int thread, int threads, Function function) {
#pragma unroll 2
    for (int at = thread * COUNT; at < sample.elements; at += threads * COUNT) {
        const auto x = read_pack<COUNT>(sample.latent + at);
        const auto e = read_pack<COUNT>(sample.predicted + at);
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            function(bits_of(sample.estimate(load(x.values[i]), load(e.values[i]))) & MAGNITUDE_BITS);
    }
}

template <class Function>
LFDM_INLINE void reduce(const Block<STEP_THREADS>& block, Function function) {
    for (int half = STEP_THREADS / 2; half > 0; half /= 2) {
        block.phase([&](int thread) {
            if (thread < half) function(thread, thread + half);
        });
    }
}

// Finds the bin that holds the value of this rank among the counted values, and the number of values in bins before it.
LFDM_INLINE void find_bin(const Block<STEP_THREADS>& block, StepShared& shared, uint32 rank) {
    constexpr int EACH = STEP_BINS / STEP_THREADS;
    block.phase([&](int thread) {
        uint32 sum = 0;
        for (int i = 0; i < EACH; ++i) sum += shared.bins[thread * EACH + i];
        shared.sums[0][thread] = sum;
    });
    int now = 0;  // running sums of doubling reach; one buffer is read while the other is written
    for (int reach = 1; reach < STEP_THREADS; reach *= 2, now ^= 1) {
        block.phase([&](int thread) {
            const uint32 before = thread >= reach ? shared.sums[now][thread - reach] : 0u;
            shared.sums[now ^ 1][thread] = shared.sums[now][thread] + before;
        });
    }
    block.phase([&](int thread) {
        uint32 before = thread ? shared.sums[now][thread - 1] : 0u;
        if (rank < before || rank >= shared.sums[now][thread]) return;
        for (int i = 0; i < EACH; ++i) {
            const uint32 count = shared.bins[thread * EACH + i];
            if (rank < before + count) {
                shared.found_bin = thread * EACH + i;
                shared.found_before = before;
                return;
            }
            before += count;
        }
    });
}

// Counts the values in [base, base + 2^width) by their bits from `shift` on, and records the smallest value above.
template <int COUNT, class S, class P>
LFDM_INLINE void count_bins(const Block<STEP_THREADS>& block, StepShared& shared, const StepSample<S, P>& sample,
                            uint32 base, int width, int shift) {
    block.phase([&](int thread) {
        for (int bin = thread; bin < STEP_BINS; bin += STEP_THREADS) shared.bins[bin] = 0;
    });
    block.phase([&](int thread) {
        uint32 least = ~0u;
        each_magnitude<COUNT>(sample, thread, STEP_THREADS, [&](uint32 bits) {
            if (bits < base) return;
            const uint32 offset = bits - base;
            if (offset >> width) {
                least = smaller(least, bits);
            } else {
                atomic_increment(shared.bins[offset >> shift]);
            }
        });
        shared.least[thread] = least;
    });
}

// The order statistic after the one just found, where each bin is a single value: the same value, the next one in the
// bins, or the smallest value above them, in shared.least.
LFDM_INLINE uint32 upper_neighbor(const Block<STEP_THREADS>& block, StepShared& shared, uint32 base, uint32 before,
                                   uint32 next_rank) {
    block.phase([&](int thread) {
        const uint32 first = shared.found_bin;
        for (uint32 bin = thread; bin < STEP_BINS; bin += STEP_THREADS) {
            const bool repeated = bin == first && before + shared.bins[bin] > next_rank;
            if (repeated || (bin > first && shared.bins[bin] > 0))
                shared.least[thread] = smaller(shared.least[thread], base + (bin - first));
        }
    });
    reduce(block, [&](int to, int from) { shared.least[to] = smaller(shared.least[to], shared.least[from]); });
    return block.read(shared.least[0]);
}

// max(quantile, 1), from the bits of the order statistics around the quantile.
LFDM_INLINE float bound_between(uint32 lower, uint32 upper, float weight) {
    const float a = float_of(lower), b = float_of(upper);
    const float quantile = weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
    return quantile < 1.0f ? 1.0f : quantile;
}

// max(quantile, 1), with the quantile between the order statistic `rank` and its upper neighbor.
template <int COUNT, class S, class P>
LFDM_INLINE float find_bound(const Block<STEP_THREADS>& block, StepShared& shared, const StepSample<S, P>& sample,
                             uint32 rank, float weight) {
    const uint32 next_rank = smaller(rank + 1, uint32(sample.elements) - 1);
    block.phase([&](int thread) {
        for (int bin = thread; bin < STEP_BINS; bin += STEP_THREADS) shared.bins[bin] = 0;
    });
    block.phase([&](int thread) {
        uint32 below = 0, most = 0, least = ~0u;
        each_magnitude<COUNT>(sample, thread, STEP_THREADS, [&](uint32 bits) {
            if (bits < ONE_BITS) {
                ++below;
                most = larger(most, bits);
            } else {
                least = smaller(least, bits);
                atomic_increment(shared.bins[(bits - ONE_BITS) >> FIRST_SHIFT]);
            }
        });
        shared.sums[0][thread] = below;
        shared.most[thread] = most;
        shared.least[thread] = least;
    });
    reduce(block, [&](int to, int from) {
        shared.sums[0][to] += shared.sums[0][from];
        shared.most[to] = larger(shared.most[to], shared.most[from]);
        shared.least[to] = smaller(shared.least[to], shared.least[from]);
    });
    const uint32 below = block.read(shared.sums[0][0]);
    if (next_rank < below) return 1.0f;
    uint32 lower = shared.most[0], upper = block.read(shared.least[0]);
    if (rank >= below) {
        uint32 base = ONE_BITS, before = below;
        for (int shift = FIRST_SHIFT;;) {
            find_bin(block, shared, rank - before);
            base += shared.found_bin << shift;
            before += block.read(shared.found_before);
            if (shift == 0) break;
            const int width = shift;
            shift = shift == FIRST_SHIFT ? SECOND_SHIFT : 0;
            count_bins<COUNT>(block, shared, sample, base, width, shift);
        }
        lower = base;
        upper = next_rank == rank ? lower : upper_neighbor(block, shared, base, before, next_rank);
    }
    return bound_between(lower, upper, weight);
}

template <int COUNT, class S, class P>
LFDM_INLINE void update(const StepSample<S, P>& sample, float bound, int at) {
    const float* c = sample.c;
    const auto x = read_pack<COUNT>(sample.latent + at);
    const auto e = read_pack<COUNT>(sample.predicted + at);
    const auto carry = read_pack<COUNT>(sample.carry + at);
    const auto previous = read_pack<COUNT>(sample.previous + at);
    const auto noise = read_pack<COUNT>(sample.noise + at);
    Pack<S, COUNT> next_latent, next_carry, next_x0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const float latent = load(x.values[i]), predicted = load(e.values[i]);
        const float kept = load(carry.values[i]), before = load(previous.values[i]);
        float x0 = sample.estimate(latent, predicted);
        if (x0 > bound) x0 = bound;
        if (x0 < -bound) x0 = -bound;
        x0 = x0 / bound;
        float sum = c[NEXT_FROM_LATENT] * latent + c[NEXT_FROM_X0] * x0;
        sum = sum + c[NEXT_FROM_PREDICTED_NOISE] * predicted;
        sum = sum + c[NEXT_FROM_CARRY] * kept;
        sum = sum + c[NEXT_FROM_PREVIOUS_X0] * before;
        sum = sum + c[NEXT_FROM_NOISE] * load(noise.values[i]);
        next_latent.values[i] = store<S>(sum);
        sum = c[CARRY_FROM_CARRY] * kept + c[CARRY_FROM_X0] * x0;
        next_carry.values[i] = store<S>(sum + c[CARRY_FROM_PREVIOUS_X0] * before);
        next_x0.values[i] = store<S>(x0);
    }
    write_pack<COUNT>(sample.next_latent + at, next_latent);
    write_pack<COUNT>(sample.next_carry + at, next_carry);
    write_pack<COUNT>(sample.next_x0 + at, next_x0);
}

// Updates the block's share of the sample.
template <int COUNT, class S, class P>
LFDM_INLINE void update_share(const Block<STEP_THREADS>& block, const StepSample<S, P>& sample, float bound) {
    const int packs = sample.elements / COUNT, share = (packs + block.blocks_x - 1) / block.blocks_x;
    const int begin = block.x * share, end = begin + share < packs ? begin + share : packs;
    block.phase([&](int thread) {
#pragma unroll 1
        for (int pack = begin + thread; pack < end; pack += STEP_THREADS) update<COUNT>(sample, bound, pack * COUNT);
    });
}

template <int COUNT, class S, class P>
LFDM_INLINE void step_in_packs(const Block<STEP_THREADS>& block, StepShared& shared, const StepSample<S, P>& sample,
                               uint32 rank, float weight) {
    update_share<COUNT>(block, sample, find_bound<COUNT>(block, shared, sample, rank, weight));
}

template <class S, class P>
LFDM_INLINE StepSample<S, P> sample_of(int index, const S* latent, const P* predicted, const S* history,
                                       const S* noise, const float* coefficients, int elements, S* next_latent,
                                       S* next_history) {
    const int64 at = int64(index) * elements;
    StepSample<S, P> sample = {latent + at,      predicted + at,       history + 2 * at,
                               history + 2 * at + elements, noise + at, next_latent + at,
                               next_history + 2 * at,       next_history + 2 * at + elements, {}, elements};
    for (int i = 0; i < COEFFICIENTS; ++i) sample.c[i] = coefficients[index * COEFFICIENTS + i];
    return sample;
}

// Grid: blocks that share a sample's update, samples.
template <class S, class P>
LFDM_INLINE void thresholded_step(const Block<STEP_THREADS>& block, StepShared& shared, const S* LFDM_RESTRICT latent,
                                  const P* LFDM_RESTRICT predicted, const S* LFDM_RESTRICT history,
                                  const S* LFDM_RESTRICT noise, const float* LFDM_RESTRICT coefficients, int elements,
                                  int rank, float weight, S* LFDM_RESTRICT next_latent, S* LFDM_RESTRICT next_history) {
    const auto sample = sample_of(block.y, latent, predicted, history, noise, coefficients, elements, next_latent,
                                  next_history);
    if (elements % 4 == 0) {
        step_in_packs<4>(block, shared, sample, rank, weight);
    } else {
        step_in_packs<1>(block, shared, sample, rank, weight);
    }
}

}  // namespace lfdm

// A kernel, by name and by the types of state (latents, history, noise) and prediction. Its parameters are those that a
// TensorRT plugin passes: inputs, int32 scalars (the weight as its bits), outputs.
#define LFDM_STEP_KERNEL(name, S, P)                                                                                 \
    LFDM_KERNEL(name, lfdm::STEP_THREADS)                                                                            \
    (const lfdm::S* LFDM_RESTRICT latent, const lfdm::P* LFDM_RESTRICT predicted,                                    \
     const lfdm::S* LFDM_RESTRICT history, const lfdm::S* LFDM_RESTRICT noise,                                       \
     const float* LFDM_RESTRICT coefficients, int elements, int rank, int weight_bits,                               \
     lfdm::S* LFDM_RESTRICT next_latent, lfdm::S* LFDM_RESTRICT next_history) {                                      \
        LFDM_SHARED lfdm::StepShared shared;                                                                         \
        lfdm::spoil(shared);                                                                                         \
        lfdm::thresholded_step<lfdm::S, lfdm::P>({}, shared, latent, predicted, history, noise, coefficients,        \
                                                 elements, rank, lfdm::float_of(lfdm::uint32(weight_bits)),          \
                                                 next_latent, next_history);                                         \
    }
