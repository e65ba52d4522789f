// Warp and WarpBlend: resize the motion, sample one source for all its frames, blend with an activation.
//
// LOWER BOUND. For a blend over N frames, C channels and P pixels, device memory must provide `previous` and receive
// the result: 2·N·C·P values. Source and motion are read once for all frames and stay in the L2 cache. An element costs
// 4 fused multiply-adds and the blend, about 16 instructions with conversions, far less time than the bytes. In
// float16, at the 4.3 TB/s that a device copy reaches on an H200 (reads plus writes; times are computed, not measured):
//
//     decoder level      values per frame  40 frames            8 frames
//     128x128 x  64      1.05 M            168 MB   39 us       34 MB   7.8 us
//      64x64  x 128      0.52 M             84 MB   20 us       17 MB   3.9 us
//      32x32  x 256      0.26 M             42 MB   10 us        8 MB   2.0 us
//
// A source is at most 2 MB. float32 doubles all of these.
//
// DESIGN. A block computes a tile of pixels of one frame, for a slice of the channels. Phase 1: one thread per pixel
// resizes the motion and computes the sampling position, once for all channels of the slice: the first corner, four
// weights, which corners are inside, and both blend factors. Phase 2: all threads iterate over the tile.
//  - Channels last (N, H, W, C): a thread owns 16 bytes of channels of a pixel; each corner is one 16-byte read.
//    Neighboring threads read neighboring channels, so every access is coalesced whatever the flow. The tile is 8x8: it
//    reads (9·9)/(8·8) = 1.27 times its share of the source from L2 into L1, where a row of 64 pixels would read 2
//    times. Reads of the source are limited by L2's bandwidth, which is little higher than the memory's. A phase
//    (stride 2) shares no corner between neighbors: it reads the whole source for a quarter of the pixels. 16-bit types
//    are bound by instructions: 8 elements need about 115 for their arithmetic, conversions included. So the work per
//    block and per pixel is kept small: few threads per block, which all compute taps and then iterate over many items;
//    positions by pointer and stride in bytes; all corners read without conditions where all are inside.
//  - Planar (N, C, H, W): a thread owns 4 bytes of pixels, keeps their corners in registers and iterates over the
//    channels. Corners are read one value at a time (the flow decides where), so the kernel is bound by the number of
//    L1 reads, not by bytes: with 4 bytes per thread, the 32 threads of a warp read corners within one line of 128
//    bytes, 10 accesses for 2 elements in float16; with 16 bytes they would be spread over four lines, and take four
//    times as long.
// Channels or planes that are not a multiple of that use single values.
//
// Coordinates, weights and sums are float32 for every storage type. A coordinate that is NaN, infinite or far away has
// no corner inside: nothing is read and the sample is 0, as outside the picture. Corners outside are not read.
#include "cuda/shim.cuh"

namespace lfdm {

struct WarpShape {
    int frames;         // per source
    int channels;
    int height, width;  // of a source
    int motion_height, motion_width;
    int stride, phase_y, phase_x;  // rows and columns of the full-size map that the result has
};

// The sampling position of one pixel.
struct Taps {
    float weight[4];  // corners (0, 0), (0, 1), (1, 0), (1, 1)
    float visible, hidden;  // factors of the sample and of `previous`
    int corner;  // row · width + column of corner (0, 0); may be outside
    uint32 inside;  // bit c: corner c is inside
};

// The resized motion at (row, column) of the full-size map: half-pixel bilinear, like torch's interpolate.
struct Resized {
    int first_row, second_row, first_column, second_column;
    float top, bottom, left, right;  // weights
    bool identity;

    LFDM_INLINE Resized(const WarpShape& shape, int row, int column) {
        identity = shape.motion_height == shape.height && shape.motion_width == shape.width;
        axis(shape.motion_height, shape.height, row, first_row, second_row, top, bottom);
        axis(shape.motion_width, shape.width, column, first_column, second_column, left, right);
    }

    // The values of PLANES planes around the position: read all at once, so that the reads are independent.
    template <int PLANES>
    LFDM_INLINE void at(const float* LFDM_RESTRICT motion, int plane, int width, float (&values)[PLANES]) const {
        float around[PLANES][4] = {};
#pragma unroll
        for (int i = 0; i < PLANES; ++i) around[i][0] = motion[i * plane + first_row * width + first_column];
        if (!identity) {
#pragma unroll
            for (int i = 0; i < PLANES; ++i) {
                const float* LFDM_RESTRICT of = motion + i * plane;
                around[i][1] = of[first_row * width + second_column];
                around[i][2] = of[second_row * width + first_column];
                around[i][3] = of[second_row * width + second_column];
            }
        }
#pragma unroll
        for (int i = 0; i < PLANES; ++i) {
            const float(&a)[4] = around[i];
            // not 1·a + 0·b, which is NaN beside an infinity
            values[i] = identity ? a[0] : top * (left * a[0] + right * a[1]) + bottom * (left * a[2] + right * a[3]);
        }
    }

  private:
    LFDM_INLINE static void axis(int small, int large, int at, int& first, int& second, float& near, float& far) {
        const float scale = float(small) / float(large);
        float position = scale * (float(at) + 0.5f) - 0.5f;
        if (position < 0.0f) position = 0.0f;
        first = int(position);
        if (first > small - 1) first = small - 1;
        second = first + (first < small - 1 ? 1 : 0);
        far = position - float(first);
        near = 1.0f - far;
    }
};

LFDM_INLINE int floor_of(float value) {
    const int truncated = int(value);
    return truncated - (float(truncated) > value ? 1 : 0);
}

template <bool BLEND>
LFDM_INLINE Taps make_taps(const WarpShape& shape, const float* LFDM_RESTRICT motion, int row, int column) {
    const Resized resized(shape, row * shape.stride + shape.phase_y, column * shape.stride + shape.phase_x);
    const int plane = shape.motion_height * shape.motion_width;
    const float height = float(shape.height), width = float(shape.width);
    float at[BLEND ? 3 : 2];
    resized.at(motion, plane, shape.motion_width, at);
    const float x = ((at[0] + 1.0f) * width - 1.0f) * 0.5f;
    const float y = ((at[1] + 1.0f) * height - 1.0f) * 0.5f;
    Taps taps = {};
    if (BLEND) {
        taps.visible = at[BLEND ? 2 : 0];
        taps.hidden = 1.0f - taps.visible;
    }
    // False for NaN, so that the code below converts only small numbers to integers.
    if (x >= -1.0f && x < width && y >= -1.0f && y < height) {
        const int left = floor_of(x), top = floor_of(y);
        const float right_part = x - float(left), lower_part = y - float(top);
        const float left_part = float(left + 1) - x, upper_part = float(top + 1) - y;
        taps.weight[0] = upper_part * left_part;
        taps.weight[1] = upper_part * right_part;
        taps.weight[2] = lower_part * left_part;
        taps.weight[3] = lower_part * right_part;
        taps.corner = top * shape.width + left;
        const uint32 columns = (left >= 0 ? 1u : 0u) | (left + 1 < shape.width ? 2u : 0u);
        taps.inside = (top >= 0 ? columns : 0u) | (top + 1 < shape.height ? columns << 2 : 0u);
    }
    return taps;
}

template <bool BLEND>
LFDM_INLINE float mix(const Taps& taps, float sampled, float previous) {
    return BLEND ? sampled * taps.visible + previous * taps.hidden : sampled;
}

// -- channels last

constexpr int TILE_SIDE = 8;
constexpr int TILE_PIXELS = TILE_SIDE * TILE_SIDE;

constexpr int SLICE_PACKS = 8;  // channels per block, in packs of 16 bytes: one line

template <class T>
constexpr int warp_channels_last_pixels = TILE_PIXELS;

// A pointer moved by that many strides in bytes: one instruction, where an index and a size would take three.
template <class T>
LFDM_INLINE const T* moved(const T* base, int strides, int bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + int64(strides) * bytes);
}

template <class T>
LFDM_INLINE T* moved(T* base, int strides, int bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(base) + int64(strides) * bytes);
}

// COUNT channels of the four corners; a corner outside counts as 0, which adds nothing.
template <int COUNT, class T>
LFDM_INLINE void read_corners(const Taps& tap, int width, int pixel_bytes, const T* LFDM_RESTRICT source,
                              Pack<T, COUNT> (&corners)[4]) {
    const T* LFDM_RESTRICT upper = moved(source, tap.corner, pixel_bytes);
    const T* LFDM_RESTRICT lower = moved(source, tap.corner + width, pixel_bytes);
    if (tap.inside == 15u) {
        corners[0] = read_pack<COUNT>(upper);
        corners[1] = read_pack<COUNT>(moved(upper, 1, pixel_bytes));
        corners[2] = read_pack<COUNT>(lower);
        corners[3] = read_pack<COUNT>(moved(lower, 1, pixel_bytes));
    } else {
        for (int i = 0; i < 4; ++i) corners[i] = {};
        if (tap.inside & 1u) corners[0] = read_pack<COUNT>(upper);
        if (tap.inside & 2u) corners[1] = read_pack<COUNT>(moved(upper, 1, pixel_bytes));
        if (tap.inside & 4u) corners[2] = read_pack<COUNT>(lower);
        if (tap.inside & 8u) corners[3] = read_pack<COUNT>(moved(lower, 1, pixel_bytes));
    }
}

// COUNT channels of one pixel of a frame: pointers point to the first of them, `at` is the pixel's index.
template <class T, bool BLEND, int COUNT>
LFDM_INLINE void warp_item(const Taps& shared_tap, const WarpShape& shape, const T* LFDM_RESTRICT source,
                           const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result, int at) {
    const Taps tap = shared_tap;
    const int pixel_bytes = shape.channels * int(sizeof(T));
    // All reads before the first use.
    Pack<T, COUNT> before = {}, corners[4];
    if (BLEND) before = read_pack<COUNT>(moved(previous, at, pixel_bytes));
    read_corners<COUNT>(tap, shape.width, pixel_bytes, source, corners);
    float sum[COUNT] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            sum[i] = multiply_add(tap.weight[corner], load(corners[corner].values[i]), sum[i]);
    }
    Pack<T, COUNT> after;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        after.values[i] = store<T>(mix<BLEND>(tap, sum[i], load(before.values[i])));
    write_pack<COUNT>(moved(result, at, pixel_bytes), after);
}

// A tile of a frame, a whole slice of packs of COUNT channels: each thread keeps the same channels.
template <class T, bool BLEND, int COUNT, int THREADS>
LFDM_INLINE void warp_slice(const Taps* taps, const WarpShape& shape, const T* LFDM_RESTRICT source,
                            const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result, int thread, int first_row,
                            int first_column, int rows, int columns) {
    static_assert(THREADS % SLICE_PACKS == 0 && TILE_PIXELS * SLICE_PACKS % THREADS == 0, "whole rounds of threads");
    const int channel = thread % SLICE_PACKS * COUNT;
#pragma unroll 1
    for (int round = 0; round < TILE_PIXELS * SLICE_PACKS / THREADS; ++round) {
        const int pixel = thread / SLICE_PACKS + round * (THREADS / SLICE_PACKS);
        const int row = first_row + pixel / TILE_SIDE, column = first_column + pixel % TILE_SIDE;
        if (row < rows && column < columns)
            warp_item<T, BLEND, COUNT>(taps[pixel], shape, source + channel, BLEND ? previous + channel : nullptr,
                                       result + channel, row * columns + column);
    }
}

// The same for any number of packs.
template <class T, bool BLEND, int COUNT, int THREADS>
LFDM_INLINE void warp_rest(const Taps* taps, const WarpShape& shape, const T* LFDM_RESTRICT source,
                           const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result, int thread, int first_row,
                           int first_column, int rows, int columns, int packs) {
#pragma unroll 1
    for (int item = thread; item < TILE_PIXELS * packs; item += THREADS) {
        const int pixel = item / packs, channel = item % packs * COUNT;
        const int row = first_row + pixel / TILE_SIDE, column = first_column + pixel % TILE_SIDE;
        if (row < rows && column < columns)
            warp_item<T, BLEND, COUNT>(taps[pixel], shape, source + channel, BLEND ? previous + channel : nullptr,
                                       result + channel, row * columns + column);
    }
}

// Grid: tiles, frames, slices of channels.
template <class T, bool BLEND, int THREADS>
LFDM_INLINE void warp_channels_last(const Block<THREADS>& block, Taps* taps, const WarpShape& shape,
                                    const T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion,
                                    const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result) {
    constexpr int PACK = 16 / sizeof(T), SLICE = SLICE_PACKS * PACK;
    const int rows = shape.height / shape.stride, columns = shape.width / shape.stride;
    const int tiles_across = (columns + TILE_SIDE - 1) / TILE_SIDE;
    const int first_row = block.x / tiles_across * TILE_SIDE, first_column = block.x % tiles_across * TILE_SIDE;
    const int frame = block.y;
    const int begin = block.z * SLICE;
    const int rest = shape.channels - begin;
    motion += int64(frame) * 3 * shape.motion_height * shape.motion_width;
    block.phase([&](int thread) {
        for (int pixel = thread; pixel < TILE_PIXELS; pixel += THREADS) {
            const int row = first_row + pixel / TILE_SIDE, column = first_column + pixel % TILE_SIDE;
            if (row < rows && column < columns) taps[pixel] = make_taps<BLEND>(shape, motion, row, column);
        }
    });
    source += int64(frame / shape.frames) * shape.height * shape.width * shape.channels + begin;
    const int64 offset = int64(frame) * rows * columns * shape.channels + begin;
    if (BLEND) previous += offset;
    result += offset;
    block.phase([&](int thread) {
        if (shape.channels % PACK == 0 && rest >= SLICE) {
            warp_slice<T, BLEND, PACK, THREADS>(taps, shape, source, previous, result, thread, first_row, first_column,
                                                rows, columns);
        } else if (shape.channels % PACK == 0) {
            warp_rest<T, BLEND, PACK, THREADS>(taps, shape, source, previous, result, thread, first_row, first_column,
                                               rows, columns, rest / PACK);
        } else {
            warp_rest<T, BLEND, 1, THREADS>(taps, shape, source, previous, result, thread, first_row, first_column,
                                            rows, columns, rest < SLICE ? rest : SLICE);
        }
    });
}

// -- planar

constexpr int STRIP_PACKS = 128;    // per block, each 4 bytes of pixels
constexpr int SLICE_CHANNELS = 32;  // per block

// COUNT pixels, contiguous in memory, for every `step`-th channel, starting at `channel`.
template <class T, bool BLEND, int COUNT>
LFDM_INLINE void warp_pixels(const Taps* shared_taps, const WarpShape& shape, const T* LFDM_RESTRICT source,
                             const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result, int64 at, int64 plane,
                             int channel, int end, int step) {
    Taps taps[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) taps[i] = shared_taps[i];
    const int64 source_plane = int64(shape.height) * shape.width;
#pragma unroll 2
    for (; channel < end; channel += step) {
        const T* LFDM_RESTRICT from = source + channel * source_plane;
        Pack<T, COUNT> before = {}, after;
        T corners[COUNT][4] = {};
        if (BLEND) before = read_pack<COUNT>(previous + channel * plane + at);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
                if (taps[i].inside >> corner & 1u)
                    corners[i][corner] = from[taps[i].corner + (corner >> 1) * shape.width + (corner & 1)];
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
                sum = multiply_add(taps[i].weight[corner], load(corners[i][corner]), sum);
            after.values[i] = store<T>(mix<BLEND>(taps[i], sum, load(before.values[i])));
        }
        write_pack<COUNT>(result + channel * plane + at, after);
    }
}

template <class T>
constexpr int warp_planar_pixels = STRIP_PACKS * (4 / int(sizeof(T)));

// Grid: strips of pixels (rows are consecutive), frames, slices of channels.
template <class T, bool BLEND, int THREADS>
LFDM_INLINE void warp_planar(const Block<THREADS>& block, Taps* taps, const WarpShape& shape,
                             const T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion,
                             const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result) {
    constexpr int PACK = 4 / sizeof(T), PIXELS = warp_planar_pixels<T>;
    const int rows = shape.height / shape.stride, columns = shape.width / shape.stride;
    const int plane = rows * columns, first = block.x * PIXELS, frame = block.y;
    const int begin = block.z * SLICE_CHANNELS;
    const int end = shape.channels < begin + SLICE_CHANNELS ? shape.channels : begin + SLICE_CHANNELS;
    motion += int64(frame) * 3 * shape.motion_height * shape.motion_width;
    source += int64(frame / shape.frames) * shape.channels * shape.height * shape.width;
    const int64 offset = int64(frame) * shape.channels * plane;
    if (BLEND) previous += offset;
    result += offset;
    block.phase([&](int thread) {
        for (int i = thread; i < PIXELS && first + i < plane; i += THREADS)
            taps[i] = make_taps<BLEND>(shape, motion, (first + i) / columns, (first + i) % columns);
    });
    block.phase([&](int thread) {
        if (plane % PACK == 0) {
            const int pixel = thread % STRIP_PACKS * PACK;
            if (first + pixel < plane)
                warp_pixels<T, BLEND, PACK>(taps + pixel, shape, source, previous, result, first + pixel, plane,
                                            begin + thread / STRIP_PACKS, end, THREADS / STRIP_PACKS);
        } else {
            for (int i = thread; i < PIXELS && first + i < plane; i += THREADS)
                warp_pixels<T, BLEND, 1>(taps + i, shape, source, previous, result, first + i, plane, begin, end, 1);
        }
    });
}

}  // namespace lfdm

// Kernels, by name, storage type and layout (warp_planar or warp_channels_last). Their parameters are those that a
// TensorRT plugin passes: inputs, int32 scalars, outputs.
#define LFDM_WARP_SCALARS \
    int frames, int channels, int height, int width, int motion_height, int motion_width, int stride, int phase_y, \
        int phase_x

#define LFDM_WARP_BODY(T, BLEND, layout, threads)                                                                    \
    const lfdm::WarpShape shape = {frames,       channels, height,  width,  motion_height,                           \
                                   motion_width, stride,   phase_y, phase_x};                                        \
    LFDM_SHARED lfdm::Taps taps[lfdm::layout##_pixels<lfdm::T>];                                                     \
    lfdm::spoil(taps);                                                                                               \
    lfdm::layout<lfdm::T, BLEND, threads>({}, taps, shape, source, motion, previous, result)

#define LFDM_WARP_BLEND_KERNEL(name, T, layout, threads)                                                             \
    LFDM_KERNEL_OF(name, threads, 1024 / threads)                                                                    \
    (const lfdm::T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion, const lfdm::T* LFDM_RESTRICT previous,  \
     LFDM_WARP_SCALARS, lfdm::T* LFDM_RESTRICT result) {                                                             \
        LFDM_WARP_BODY(T, true, layout, threads);                                                                    \
    }

#define LFDM_WARP_KERNEL(name, T, layout, threads)                                                                   \
    LFDM_KERNEL_OF(name, threads, 1024 / threads)                                                                    \
    (const lfdm::T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion, LFDM_WARP_SCALARS,                      \
     lfdm::T* LFDM_RESTRICT result) {                                                                                \
        const lfdm::T* previous = nullptr;                                                                           \
        LFDM_WARP_BODY(T, false, layout, threads);                                                                   \
    }
