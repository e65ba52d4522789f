// Standard normal noise from seed, step and element: the stream of lfdm_export.sampling.noise, on the GPU.
//
// Philox4x64-10 with key (seed, 0); block j, with counter (j + 1, 0, step + 1, 0), gives four words; two words give two
// normal values by Box and Muller in float64, rounded to float32. The words are equal to NumPy's bit for bit. Logarithm
// and cosine are the GPU's, within 1 ulp of float64, so about one value in 10^8 differs from the host's, by 1 ulp.
//
// A sample of the published model needs 30,720 Philox blocks of 40 wide products, and twice as many logarithms, roots
// and sine-cosine pairs in float64: about 12 M operations, microseconds even where float64 runs at 1/64 of float32's
// rate. It saves the host's generation and copy, 0.5 MB per step.
#include "cuda/shim.cuh"

#if !defined(__CUDACC__)
#include <cmath>
using std::cos;
using std::log;
using std::sin;
using std::sqrt;
#endif

namespace lfdm {

constexpr int NOISE_THREADS = 256;

struct Words {
    uint64 word[4];
};

LFDM_INLINE Words philox(uint64 key, Words counter) {
    uint64 low_key = key, high_key = 0;
    Words state = counter;
    for (int round = 0; round < 10; ++round) {
        const uint64 a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const uint64 high_0 = multiply_high(a, state.word[0]), low_0 = a * state.word[0];
        const uint64 high_2 = multiply_high(b, state.word[2]), low_2 = b * state.word[2];
        state = {{high_2 ^ state.word[1] ^ low_key, low_2, high_0 ^ state.word[3] ^ high_key, low_0}};
        low_key += 0x9E3779B97F4A7C15ull;
        high_key += 0xBB67AE8584CAA73Bull;
    }
    return state;
}

// In (0, 1).
LFDM_INLINE double uniform(uint64 word) { return (double(word >> 12) + 0.5) * 0x1p-52; }

// Grid: Philox blocks, samples. A step is -1 for the start of a chain.
LFDM_INLINE void draw_noise(const Block<NOISE_THREADS>& block, const uint64* LFDM_RESTRICT seeds,
                            const int64* LFDM_RESTRICT steps, int elements, float* LFDM_RESTRICT noise) {
    block.phase([&](int thread) {
        const int64 index = int64(block.x) * NOISE_THREADS + thread;
        const int64 first = 4 * index;
        if (first >= elements) return;
        const Words words = philox(seeds[block.y], {{uint64(index) + 1, 0, uint64(steps[block.y] + 1), 0}});
        for (int pair = 0; pair < 2; ++pair) {
            const double radius = sqrt(-2.0 * log(uniform(words.word[2 * pair])));
            const double angle = 6.283185307179586 * uniform(words.word[2 * pair + 1]);
            const double values[2] = {radius * cos(angle), radius * sin(angle)};
            for (int i = 0; i < 2; ++i) {
                const int64 element = first + 2 * pair + i;
                if (element < elements) noise[int64(block.y) * elements + element] = float(values[i]);
            }
        }
    });
}

}  // namespace lfdm

#define LFDM_NOISE_KERNEL(name)                                                                                      \
    LFDM_KERNEL(name, lfdm::NOISE_THREADS)                                                                           \
    (const lfdm::uint64* LFDM_RESTRICT seeds, const lfdm::int64* LFDM_RESTRICT steps, int elements,                  \
     float* LFDM_RESTRICT noise) {                                                                                   \
        lfdm::draw_noise({}, seeds, steps, elements, noise);                                                         \
    }
