// 8-bit pictures from the float32 images of `decode`, and a check that values are finite, where they lie.
//
// A clip of the published size is 7.9 MB per output in float32, and 2 MB in 8 bits: with these kernels only the latter
// leaves the GPU.
#include "cuda/shim.cuh"

namespace lfdm {

constexpr int PICTURE_THREADS = 256;

using uint8 = unsigned char;

LFDM_INLINE bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// Grid: pixels of all frames of a sample, samples. Images (samples, 3, pixels) -> pictures (samples, pixels, 3):
// clamped to [0, 1], times 255, truncated. The flag becomes 1 if a value is infinite or NaN, else it stays.
LFDM_INLINE void make_pictures(const Block<PICTURE_THREADS>& block, const float* LFDM_RESTRICT images, int pixels,
                               uint8* LFDM_RESTRICT pictures, uint32* LFDM_RESTRICT flag) {
    block.phase([&](int thread) {
        const int64 pixel = int64(block.x) * PICTURE_THREADS + thread;
        if (pixel >= pixels) return;
        for (int channel = 0; channel < 3; ++channel) {
            const float value = images[(int64(block.y) * 3 + channel) * pixels + pixel];
            if (!is_finite(value)) atomic_larger(*flag, 1u);
            const float level = value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
            pictures[(int64(block.y) * pixels + pixel) * 3 + channel] = uint8(level * 255.0f);
        }
    });
}

// Grid: values. The flag is as above.
LFDM_INLINE void find_not_finite(const Block<PICTURE_THREADS>& block, const float* LFDM_RESTRICT values, int count,
                                 uint32* LFDM_RESTRICT flag) {
    block.phase([&](int thread) {
        const int64 index = int64(block.x) * PICTURE_THREADS + thread;
        if (index < count && !is_finite(values[index])) atomic_larger(*flag, 1u);
    });
}

}  // namespace lfdm

#define LFDM_PICTURES_KERNEL(name)                                                                                   \
    LFDM_KERNEL(name, lfdm::PICTURE_THREADS)                                                                         \
    (const float* LFDM_RESTRICT images, int pixels, lfdm::uint8* LFDM_RESTRICT pictures,                             \
     lfdm::uint32* LFDM_RESTRICT flag) {                                                                             \
        lfdm::make_pictures({}, images, pixels, pictures, flag);                                                     \
    }

#define LFDM_NOT_FINITE_KERNEL(name)                                                                                 \
    LFDM_KERNEL(name, lfdm::PICTURE_THREADS)                                                                         \
    (const float* LFDM_RESTRICT values, int count, lfdm::uint32* LFDM_RESTRICT flag) {                               \
        lfdm::find_not_finite({}, values, count, flag);                                                              \
    }
