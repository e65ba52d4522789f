// ThresholdedStep as four kernels, where several kernels are possible: blocks share each pass of the radix select.
//
// kernel.cuh has the arithmetic and the passes; this file defines how blocks share them. Every block counts the values
// of its own part of a sample, and adds its counts to those of the others in memory: integers, whose sum does not
// depend on the order. Each block of the next kernel finds the bin from the total counts for itself, and continues from
// there; the last kernel updates. The results are equal to those of the single kernel bit for bit.
//
// A pass reads about 24 KB per block, and a launch in a graph takes about 2 us: in total, 10 us should be enough,
// instead of the 57 us of the single kernel on an H200 (computed, not measured).
#include "thresholded_step/kernel.cuh"

namespace lfdm {

constexpr int STEP_PASSES = 3;

// Counts of one sample. All start at 0, so smallest values are stored as complements, of which the largest counts.
struct StepCounts {
    uint32 bins[STEP_PASSES][STEP_BINS];
    uint32 below;        // number of values below 1
    uint32 most;         // largest of them
    uint32 least;        // complement of the smallest other value
    uint32 least_above;  // complement of the smallest value above the bins of the last pass
};

struct Located {
    uint32 base;    // first value of the bin
    uint32 before;  // values below it
};

LFDM_INLINE int shift_of(int pass) { return pass == 0 ? FIRST_SHIFT : pass == 1 ? SECOND_SHIFT : 0; }

// The bin that holds the value of this rank, after that many passes; shared.bins are those of the last pass.
LFDM_INLINE Located locate(const Block<STEP_THREADS>& block, StepShared& shared, const StepCounts& counts, uint32 rank,
                           int passes) {
    Located found = {ONE_BITS, counts.below};
    for (int pass = 0; pass < passes; ++pass) {
        block.phase([&](int thread) {
            for (int bin = thread; bin < STEP_BINS; bin += STEP_THREADS) shared.bins[bin] = counts.bins[pass][bin];
        });
        find_bin(block, shared, rank - found.before);
        found.base += shared.found_bin << shift_of(pass);
        found.before += block.read(shared.found_before);
    }
    return found;
}

// Pass 0 counts all values, the others those in the bin that the previous pass selects.
template <int PASS, int COUNT, class S, class P>
LFDM_INLINE void count_share(const Block<STEP_THREADS>& block, StepShared& shared, StepCounts& counts,
                             const StepSample<S, P>& sample, uint32 rank) {
    uint32 base = ONE_BITS;
    if (PASS > 0) {
        if (rank < counts.below) return;  // the bound is 1, or is between the values that pass 0 found
        base = locate(block, shared, counts, rank, PASS).base;
    }
    block.phase([&](int thread) {
        for (int bin = thread; bin < STEP_BINS; bin += STEP_THREADS) shared.bins[bin] = 0;
    });
    block.phase([&](int thread) {
        uint32 below = 0, most = 0, least = ~0u;
        const int all = block.blocks_x * STEP_THREADS;
        each_magnitude<COUNT>(sample, block.x * STEP_THREADS + thread, all, [&](uint32 bits) {
            if (bits < base) {
                ++below;
                most = larger(most, bits);
                return;
            }
            const uint32 offset = bits - base;
            const bool above = PASS > 0 && offset >> shift_of(PASS - 1);
            if (!above) atomic_increment(shared.bins[offset >> shift_of(PASS)]);
            if (PASS == 0 || above) least = smaller(least, bits);
        });
        shared.sums[0][thread] = below;
        shared.most[thread] = most;
        shared.least[thread] = least;
    });
    if (PASS != 1) {
        reduce(block, [&](int to, int from) {
            shared.sums[0][to] += shared.sums[0][from];
            shared.most[to] = larger(shared.most[to], shared.most[from]);
            shared.least[to] = smaller(shared.least[to], shared.least[from]);
        });
    }
    block.phase([&](int thread) {
        for (int bin = thread; bin < STEP_BINS; bin += STEP_THREADS)
            if (shared.bins[bin]) atomic_add(counts.bins[PASS][bin], shared.bins[bin]);
        if (thread != 0 || PASS == 1) return;
        atomic_larger(PASS == 0 ? counts.least : counts.least_above, ~shared.least[0]);
        if (PASS == 0) {
            atomic_add(counts.below, shared.sums[0][0]);
            atomic_larger(counts.most, shared.most[0]);
        }
    });
}

// Grid: blocks that share a sample, samples. Counts: one per sample, 0 before the first pass.
template <int PASS, class S, class P>
LFDM_INLINE void count_step(const Block<STEP_THREADS>& block, StepShared& shared, const S* LFDM_RESTRICT latent,
                            const P* LFDM_RESTRICT predicted, const float* LFDM_RESTRICT coefficients, int elements,
                            int rank, StepCounts* counts) {
    const S* none = nullptr;
    S* nothing = nullptr;
    const auto sample = sample_of(block.y, latent, predicted, none, none, coefficients, elements, nothing, nothing);
    if (elements % 4 == 0) {
        count_share<PASS, 4>(block, shared, counts[block.y], sample, rank);
    } else {
        count_share<PASS, 1>(block, shared, counts[block.y], sample, rank);
    }
}

// max(quantile, 1), from the counts of all blocks.
LFDM_INLINE float counted_bound(const Block<STEP_THREADS>& block, StepShared& shared, const StepCounts& counts,
                                uint32 rank, uint32 elements, float weight) {
    const uint32 next_rank = smaller(rank + 1, elements - 1);
    if (next_rank < counts.below) return 1.0f;
    uint32 lower = counts.most, upper = ~counts.least;
    if (rank >= counts.below) {
        const Located found = locate(block, shared, counts, rank, STEP_PASSES);
        block.phase([&](int thread) { shared.least[thread] = ~counts.least_above; });
        lower = found.base;
        upper = next_rank == rank ? lower : upper_neighbor(block, shared, found.base, found.before, next_rank);
    }
    return bound_between(lower, upper, weight);
}

// Grid: blocks that share a sample, samples.
template <class S, class P>
LFDM_INLINE void update_step(const Block<STEP_THREADS>& block, StepShared& shared, const S* LFDM_RESTRICT latent,
                             const P* LFDM_RESTRICT predicted, const S* LFDM_RESTRICT history,
                             const S* LFDM_RESTRICT noise, const float* LFDM_RESTRICT coefficients,
                             const StepCounts* LFDM_RESTRICT counts, int elements, int rank, float weight,
                             S* LFDM_RESTRICT next_latent, S* LFDM_RESTRICT next_history) {
    const float bound = counted_bound(block, shared, counts[block.y], rank, elements, weight);
    const auto sample = sample_of(block.y, latent, predicted, history, noise, coefficients, elements, next_latent,
                                  next_history);
    if (elements % 4 == 0) {
        update_share<4>(block, sample, bound);
    } else {
        update_share<1>(block, sample, bound);
    }
}

}  // namespace lfdm

// Kernels, by name and by the types of state (latents, history, noise) and prediction. Counts: one StepCounts per
// sample.
#define LFDM_STEP_COUNT_KERNEL(name, S, P, pass)                                                                     \
    LFDM_KERNEL(name, lfdm::STEP_THREADS)                                                                            \
    (const lfdm::S* LFDM_RESTRICT latent, const lfdm::P* LFDM_RESTRICT predicted,                                    \
     const float* LFDM_RESTRICT coefficients, int elements, int rank, lfdm::uint32* counts) {                        \
        LFDM_SHARED lfdm::StepShared shared;                                                                         \
        lfdm::spoil(shared);                                                                                         \
        lfdm::count_step<pass, lfdm::S, lfdm::P>({}, shared, latent, predicted, coefficients, elements, rank,        \
                                                 reinterpret_cast<lfdm::StepCounts*>(counts));                       \
    }

#define LFDM_STEP_UPDATE_KERNEL(name, S, P)                                                                          \
    LFDM_KERNEL(name, lfdm::STEP_THREADS)                                                                            \
    (const lfdm::S* LFDM_RESTRICT latent, const lfdm::P* LFDM_RESTRICT predicted,                                    \
     const lfdm::S* LFDM_RESTRICT history, const lfdm::S* LFDM_RESTRICT noise,                                       \
     const float* LFDM_RESTRICT coefficients, const lfdm::uint32* LFDM_RESTRICT counts, int elements, int rank,      \
     int weight_bits, lfdm::S* LFDM_RESTRICT next_latent, lfdm::S* LFDM_RESTRICT next_history) {                     \
        LFDM_SHARED lfdm::StepShared shared;                                                                         \
        lfdm::spoil(shared);                                                                                         \
        lfdm::update_step<lfdm::S, lfdm::P>({}, shared, latent, predicted, history, noise, coefficients,             \
                                            reinterpret_cast<const lfdm::StepCounts*>(counts), elements, rank,       \
                                            lfdm::float_of(lfdm::uint32(weight_bits)), next_latent, next_history);   \
    }
