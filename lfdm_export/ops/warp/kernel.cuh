// Warp and WarpBlend: resize the motion, sample one source for all its frames, blend with an activation.
//
// THE FLOOR. Of a blend over N frames, C channels and P pixels, device memory must give `previous` and take the
// result: 2·N·C·P values; source and motion are read once for all frames and stay in the L2 cache. An element costs
// 4 fused multiply-adds and the blend, some 16 instructions with conversions, far below what the bytes cost. In
// float16, at the 4.3 TB/s that a device copy reaches on an H200 (reads plus writes; times are computed, not measured):
//
//     decoder level      values a frame    40 frames            8 frames
//     128x128 x  64      1.05 M            168 MB   39 us       34 MB   7.8 us
//      64x64  x 128      0.52 M             84 MB   20 us       17 MB   3.9 us
//      32x32  x 256      0.26 M             42 MB   10 us        8 MB   2.0 us
//
// A source is at most 2 MB. float32 doubles all of these.
//
// THE DESIGN. A block makes a tile of pixels of one frame, for a slice of the channels. Phase 1: one thread a pixel
// resizes the motion and computes where to sample, once for all channels of the slice: the first corner, four
// weights, which corners lie inside, and both blend factors. Phase 2: all threads walk over the tile.
//  - Channels last (N, H, W, C): a thread owns 16 bytes of channels of a pixel; each corner is one 16-byte read.
//    Neighbouring threads read neighbouring channels, so every access is coalesced whatever the flow. The tile is
//    8x8: of the source it pulls (9·9)/(8·8) = 1.27 times its share from L2 into L1, where a row of 64 pixels
//    would pull 2 times; L2's bandwidth, little above the memory's, is what the reads of the source cost. A phase
//    (stride 2) shares no corner between neighbours: it reads the whole source for a quarter of the pixels.
//  - Planar (N, C, H, W): a thread owns 4 bytes of pixels, keeps their corners in registers and walks over the
//    channels. Corners are read one value at a time (the flow decides where), so reads of L1, not bytes, bound it:
//    with 4 bytes a thread the 32 threads of a warp read corners within one line of 128 bytes, 10 accesses for 2
//    elements in float16; with 16 bytes they would be spread over four lines, and take four times as long.
// Channels or planes that are no multiple of that fall back to single values.
//
// Coordinates, weights and sums are float32 for every storage type. A coordinate that is NaN, infinite or far away
// has no corner inside: nothing is read and the sample is 0, as outside the picture. Corners outside are not read.
#include "cuda/shim.cuh"

namespace lfdm {

constexpr int WARP_THREADS = 256;

struct WarpShape {
    int frames;         // of each source
    int channels;
    int height, width;  // of a source
    int motion_height, motion_width;
    int stride, phase_y, phase_x;  // rows and columns of the source's size that the result has
};

// Where one pixel samples.
struct Taps {
    float weight[4];  // corners (0, 0), (0, 1), (1, 0), (1, 1)
    float visible, hidden;  // factors of the sample and of `previous`
    int corner;  // row · width + column of corner (0, 0); may lie outside
    uint32 inside;  // bit c: corner c lies inside
};

// The resized motion at (row, column) of the source's size: half-pixel bilinear, as torch's interpolate does it.
struct Resized {
    int first_row, second_row, first_column, second_column;
    float top, bottom, left, right;  // weights
    bool identity;

    LFDM_INLINE Resized(const WarpShape& shape, int row, int column) {
        identity = shape.motion_height == shape.height && shape.motion_width == shape.width;
        axis(shape.motion_height, shape.height, row, first_row, second_row, top, bottom);
        axis(shape.motion_width, shape.width, column, first_column, second_column, left, right);
    }

    LFDM_INLINE float at(const float* LFDM_RESTRICT plane, int width) const {
        const float a = plane[first_row * width + first_column];
        if (identity) return a;  // not 1·a + 0·b, which is NaN beside an infinity
        const float b = plane[first_row * width + second_column];
        const float c = plane[second_row * width + first_column];
        const float d = plane[second_row * width + second_column];
        return top * (left * a + right * b) + bottom * (left * c + right * d);
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
    const float x = ((resized.at(motion, shape.motion_width) + 1.0f) * width - 1.0f) * 0.5f;
    const float y = ((resized.at(motion + plane, shape.motion_width) + 1.0f) * height - 1.0f) * 0.5f;
    Taps taps = {};
    if (BLEND) {
        taps.visible = resized.at(motion + 2 * plane, shape.motion_width);
        taps.hidden = 1.0f - taps.visible;
    }
    // False for NaN, so that what follows converts only small numbers to integers.
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

template <class T>
constexpr int warp_channels_last_pixels = TILE_PIXELS;

// One frame's tile (block.x) for channels [begin, end), in packs of COUNT.
template <class T, bool BLEND, int COUNT>
LFDM_INLINE void warp_items(const Taps* taps, const WarpShape& shape, const T* LFDM_RESTRICT source,
                            const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result, int thread, int first_row,
                            int first_column, int rows, int columns, int begin, int end) {
    const int packs = (end - begin) / COUNT;
    // item -> (pixel, pack), followed by additions instead of divisions.
    int pixel = thread / packs, pack = thread % packs;
    const int pixel_step = WARP_THREADS / packs, pack_step = WARP_THREADS % packs;
    while (pixel < TILE_PIXELS) {
        const int row = first_row + pixel / TILE_SIDE, column = first_column + pixel % TILE_SIDE;
        if (row < rows && column < columns) {
            const int channel = begin + pack * COUNT;
            const Taps tap = taps[pixel];
            const int64 at = (int64(row) * columns + column) * shape.channels + channel;
            // All reads before the first use; a corner outside counts as 0, which adds nothing.
            Pack<T, COUNT> before = {}, corners[4] = {};
            if (BLEND) before = read_pack<COUNT>(previous + at);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                const int from = tap.corner + (corner >> 1) * shape.width + (corner & 1);
                if (tap.inside >> corner & 1u)
                    corners[corner] = read_pack<COUNT>(source + int64(from) * shape.channels + channel);
            }
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
            write_pack<COUNT>(result + at, after);
        }
        pixel += pixel_step;
        pack += pack_step;
        if (pack >= packs) {
            pack -= packs;
            ++pixel;
        }
    }
}

constexpr int SLICE_PACKS = 16;  // channels of a block, in packs of 16 bytes

// Grid: tiles, frames, slices of channels.
template <class T, bool BLEND>
LFDM_INLINE void warp_channels_last(const Block<WARP_THREADS>& block, Taps* taps, const WarpShape& shape,
                                    const T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion,
                                    const T* LFDM_RESTRICT previous, T* LFDM_RESTRICT result) {
    constexpr int PACK = 16 / sizeof(T);
    const int rows = shape.height / shape.stride, columns = shape.width / shape.stride;
    const int tiles_across = (columns + TILE_SIDE - 1) / TILE_SIDE;
    const int first_row = block.x / tiles_across * TILE_SIDE, first_column = block.x % tiles_across * TILE_SIDE;
    const int frame = block.y;
    const int begin = block.z * SLICE_PACKS * PACK;
    const int rest = shape.channels - begin;
    const int end = begin + (rest < SLICE_PACKS * PACK ? rest : SLICE_PACKS * PACK);
    motion += int64(frame) * 3 * shape.motion_height * shape.motion_width;
    source += int64(frame / shape.frames) * shape.height * shape.width * shape.channels;
    const int64 offset = int64(frame) * rows * columns * shape.channels;
    if (BLEND) previous += offset;
    result += offset;
    block.phase([&](int thread) {
        const int row = first_row + thread / TILE_SIDE, column = first_column + thread % TILE_SIDE;
        if (thread < TILE_PIXELS && row < rows && column < columns)
            taps[thread] = make_taps<BLEND>(shape, motion, row, column);
    });
    block.phase([&](int thread) {
        if (shape.channels % PACK == 0) {
            warp_items<T, BLEND, PACK>(taps, shape, source, previous, result, thread, first_row, first_column, rows,
                                       columns, begin, end);
        } else {
            warp_items<T, BLEND, 1>(taps, shape, source, previous, result, thread, first_row, first_column, rows,
                                    columns, begin, end);
        }
    });
}

// -- planar

constexpr int STRIP_PACKS = 128;    // of a block, each 4 bytes of pixels
constexpr int SLICE_CHANNELS = 32;  // of a block

// COUNT pixels, neighbours in memory, for every `step`-th channel from `channel` on.
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

// Grid: strips of pixels (rows follow one another), frames, slices of channels.
template <class T, bool BLEND>
LFDM_INLINE void warp_planar(const Block<WARP_THREADS>& block, Taps* taps, const WarpShape& shape,
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
        for (int i = thread; i < PIXELS && first + i < plane; i += WARP_THREADS)
            taps[i] = make_taps<BLEND>(shape, motion, (first + i) / columns, (first + i) % columns);
    });
    block.phase([&](int thread) {
        if (plane % PACK == 0) {
            const int pixel = thread % STRIP_PACKS * PACK;
            if (first + pixel < plane)
                warp_pixels<T, BLEND, PACK>(taps + pixel, shape, source, previous, result, first + pixel, plane,
                                            begin + thread / STRIP_PACKS, end, WARP_THREADS / STRIP_PACKS);
        } else {
            for (int i = thread; i < PIXELS && first + i < plane; i += WARP_THREADS)
                warp_pixels<T, BLEND, 1>(taps + i, shape, source, previous, result, first + i, plane, begin, end, 1);
        }
    });
}

}  // namespace lfdm

// Kernels, by name, storage type and layout (warp_planar or warp_channels_last). Parameters are what a TensorRT plugin
// passes: inputs, int32 scalars, outputs.
#define LFDM_WARP_SCALARS \
    int frames, int channels, int height, int width, int motion_height, int motion_width, int stride, int phase_y, \
        int phase_x

#define LFDM_WARP_BODY(T, BLEND, layout, pixels)                                                                    \
    const lfdm::WarpShape shape = {frames,       channels, height,  width,  motion_height,                           \
                                   motion_width, stride,   phase_y, phase_x};                                        \
    LFDM_SHARED lfdm::Taps taps[pixels];                                                                             \
    lfdm::spoil(taps);                                                                                               \
    lfdm::layout<lfdm::T, BLEND>({}, taps, shape, source, motion, previous, result)

#define LFDM_WARP_BLEND_KERNEL(name, T, layout)                                                                      \
    LFDM_KERNEL(name, lfdm::WARP_THREADS)                                                                            \
    (const lfdm::T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion, const lfdm::T* LFDM_RESTRICT previous,   \
     LFDM_WARP_SCALARS, lfdm::T* LFDM_RESTRICT result) {                                                             \
        LFDM_WARP_BODY(T, true, layout, lfdm::layout##_pixels<lfdm::T>);                                           \
    }

#define LFDM_WARP_KERNEL(name, T, layout)                                                                            \
    LFDM_KERNEL(name, lfdm::WARP_THREADS)                                                                            \
    (const lfdm::T* LFDM_RESTRICT source, const float* LFDM_RESTRICT motion, LFDM_WARP_SCALARS,                      \
     lfdm::T* LFDM_RESTRICT result) {                                                                                \
        const lfdm::T* previous = nullptr;                                                                           \
        LFDM_WARP_BODY(T, false, layout, lfdm::layout##_pixels<lfdm::T>);                                          \
    }
