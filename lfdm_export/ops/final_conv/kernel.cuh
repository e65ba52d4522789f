// The decoder's last convolution, 7x7 from C channels to 3, and its sigmoid, from the phases of a map to pictures.
//
//     four phases (N, h, w, C); kernel (7, 24, C): by row, by column and output; bias (3)
//     ->  sigmoid(convolution of the map 2h x 2w + bias),  (N, 3, 2h, 2w) float32
//
// LOWER BOUND. Memory must provide the phases and receive the pictures: N·P·(2·C + 12) bytes for P pixels in 16 bits. For
// 40 frames of 128x128 and 64 channels: 84 MB + 7.9 MB, 22 us at the 4.2 TB/s that a device copy reaches on an H200
// (measured; the times are computed). The products are 12.3 GFLOP, 19 us at the 650 TFLOP/s of a large product there.
// PyTorch's operators move 323 MB, 77 us: phases to pairs 84 + 84, pairs into a convolution down the columns 84, its
// 48 maps 31 + 31, the pictures 8; their products, zeros included, are 20.1 GFLOP.
//
// DESIGN. A kernel with 3 outputs leaves matrix units idle: they compute 8 columns at once. So the 21 pairs of kernel
// column and output are the columns of the product, and the sums over rows of the kernel and channels are its sums.
// Only the sums over the 7 kernel columns remain, of values of neighboring pixels; they pass through shared memory.
//  - A block goes down a strip of a tile of 128 pixels' width, row by row. A warp has 32 pixels. It multiplies them
//    with all 7 rows of the kernel, and adds to the sums of 7 rows of the result, which are in registers: 168 per
//    thread. When a row is complete, its sums move to shared memory, and each thread adds 21 of them for its pixel.
//  - The kernel lies in shared memory in the order in which lanes read it; each read serves two products. Pixels are
//    copied there without passing through registers; a row's copies start when the last of the row before are read.
//    Rows g and g + 8 of a product are neighboring pixels of the map: the same place in two phases.
//  - The next row's sums take the place of the complete row's by their names alone: products are added to a register
//    and stored in another.
//  - A strip reads 6 rows more than it writes. `final_launch` chooses its height, so that few blocks wait for others.
//    Tiles of wider maps overlap by 6 pixels.
// For 40 frames of 128x128 there are 6 strips of 22 rows: 104 MB to read, at least in part from the L2 cache.
//
// Sums run over rows of the kernel, then channels, then its columns, whatever the strip: the same bits for any launch.
#include "cuda/lanes.cuh"

namespace lfdm {

constexpr int FINAL_WARPS = 4;
constexpr int FINAL_THREADS = FINAL_WARPS * LANES;
constexpr int FINAL_SIZE = 7, FINAL_REACH = FINAL_SIZE / 2, FINAL_OUTPUTS = 3;
constexpr int FINAL_PIXELS = 32;                         // of a row, per warp
constexpr int FINAL_TILE = FINAL_WARPS * FINAL_PIXELS;   // per block
constexpr int FINAL_COLUMNS = FINAL_SIZE * FINAL_OUTPUTS;
constexpr int FINAL_TILES = (FINAL_COLUMNS + 7) / 8;     // of 8 columns
constexpr int FINAL_STRIDE = FINAL_TILE + 4;             // no two lanes of a store use the same bank

struct FinalShape {
    int height, width;  // of the map
    int rows;           // per strip
};

template <int CHANNELS>
struct alignas(16) FinalShared {
    // By row of the kernel, step of 16 channels, tile and lane: the lane's registers.
    Pack<uint32, 2> kernel[FINAL_SIZE * (CHANNELS / 16) * FINAL_TILES * LANES];
    // By warp, group, phase and pixel: packs of 8 channels, as `final_place` says.
    uint32 pixels[FINAL_WARPS][FINAL_PIXELS * CHANNELS / 2];
    float sums[FINAL_COLUMNS][FINAL_STRIDE];
};

// Sums of a warp's pixels, in two groups of 16, for a row of the result.
struct FinalSums {
    PerLane<Quad> tiles[FINAL_TILES][2];
};

// What a warp keeps from row to row: sums of the rows of the result that are not complete.
struct FinalWarp {
    FinalSums rows[FINAL_SIZE - 1];
};

// A row of the map: a row of two of its phases.
template <class T>
struct FinalRow {
    const T* LFDM_RESTRICT phases[2];
    int width;  // of a phase; 0 for a row outside of the map
};

// Where a pack of pixel 0 … 7 lies among 8 pixels: those that lanes read together use different banks.
template <int CHANNELS>
LFDM_INLINE int final_place(int pixel, int pack) {
    constexpr int PACKS = CHANNELS / 8;
    return (pixel * PACKS + (pack ^ pixel * PACKS / 8)) * 4;
}

LFDM_INLINE float sigmoid(float value) {
    constexpr float LOG2_E = 1.44269504088896340736f;
    return reciprocal(1.0f + exp2_of(-value * LOG2_E));
}

// Brings the kernel into the order in which lanes read it.
template <int CHANNELS, class T>
LFDM_INLINE void place_kernel(const Block<FINAL_THREADS>& block, FinalShared<CHANNELS>& shared,
                              const T* LFDM_RESTRICT kernel) {
    constexpr int STEPS = CHANNELS / 16;
    const uint32* LFDM_RESTRICT pairs = reinterpret_cast<const uint32*>(kernel);
    block.phase([&](int thread) {
        for (int i = thread; i < FINAL_SIZE * STEPS * FINAL_TILES * LANES; i += FINAL_THREADS) {
            const int lane = i % LANES, tile = i / LANES % FINAL_TILES, step = i / (LANES * FINAL_TILES) % STEPS;
            const int column = i / (LANES * FINAL_TILES * STEPS) * 8 * FINAL_TILES + 8 * tile + lane / 4;
            const int pair = (column * CHANNELS + step * 16) / 2 + lane % 4;
            shared.kernel[i] = {{pairs[pair], pairs[pair + 4]}};
        }
    });
}

// Starts to copy the warp's pixels of a row, the first of which is the phases' pixel `first`.
template <int CHANNELS, class T>
LFDM_INLINE void copy_pixels(uint32* pixels, const FinalRow<T>& row, int first) {
    constexpr int PACKS = CHANNELS / 8;
    constexpr int ROWS = LANES / PACKS < 8 ? LANES / PACKS : 8;  // pixels of 8 that a lane's turn copies
    each_lane([&](int lane) {
        const int pack = lane % PACKS;
#pragma unroll
        for (int i = 0; i < 8 / ROWS; ++i) {
            const int pixel = i * ROWS + lane / PACKS % ROWS;
            const int place = final_place<CHANNELS>(pixel, pack), column = first + pixel;
            const int offset = column * CHANNELS + pack * 8;
#pragma unroll
            for (int eight = 0; eight < 4; ++eight) {
                if (ROWS * PACKS < LANES && lane / (ROWS * PACKS) != eight % 2) continue;
                copy_later(pixels + eight * 4 * CHANNELS + place,
                           reinterpret_cast<const uint32*>(row.phases[eight % 2] + offset + eight / 2 * 8 * CHANNELS),
                           column + eight / 2 * 8 < row.width);
            }
        }
    });
}

// Reads the registers of a product's step for both groups of the warp's pixels.
template <int CHANNELS>
LFDM_INLINE void read_pixels(const uint32* pixels, int step, PerLane<uint32> (&a)[2][4]) {
    each_lane([&](int lane) {
#pragma unroll
        for (int pack = 0; pack < 2; ++pack) {
            const int place = final_place<CHANNELS>(lane / 4, 2 * step + pack) + lane % 4;
#pragma unroll
            for (int eight = 0; eight < 4; ++eight)
                a[eight / 2][pack * 2 + eight % 2][lane] = pixels[eight * 4 * CHANNELS + place];
        }
    });
}

// Adds the products of a step of the pixels with that of a row of the kernel.
template <class T>
LFDM_INLINE void add_products(FinalSums& sums, const PerLane<uint32> (&a)[2][4], const Pack<uint32, 2>* kernel) {
    PerLane<uint32> b[FINAL_TILES][2];
    each_lane([&](int lane) {
#pragma unroll
        for (int tile = 0; tile < FINAL_TILES; ++tile) {
            const Pack<uint32, 2> moved = kernel[tile * LANES + lane];
            b[tile][0][lane] = moved.values[0];
            b[tile][1][lane] = moved.values[1];
        }
    });
#pragma unroll
    for (int tile = 0; tile < FINAL_TILES; ++tile) {
#pragma unroll
        for (int group = 0; group < 2; ++group)
            multiply_add_16<T>(sums.tiles[tile][group], a[group], b[tile][0], b[tile][1]);
    }
}

// Moves the sums of the warp's pixels, from its first on, to shared memory.
LFDM_INLINE void store_sums(const FinalSums& sums, float (*columns)[FINAL_STRIDE], int first) {
    each_lane([&](int lane) {
#pragma unroll
        for (int tile = 0; tile < FINAL_TILES; ++tile) {
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const float* own = sums.tiles[tile][group][lane].values;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int column = 8 * tile + lane % 4 * 2 + i;
                    if (column < FINAL_COLUMNS)
                        *reinterpret_cast<Pack<float, 2>*>(&columns[column][first + 16 * group + lane / 4 * 2]) = {
                            {own[i], own[2 + i]}};
                }
            }
        }
    });
}

// The outputs of a pixel of the tile, of which `width` are inside of the map.
LFDM_INLINE void add_columns(const float (*columns)[FINAL_STRIDE], int pixel, int width,
                             float (&outputs)[FINAL_OUTPUTS]) {
#pragma unroll
    for (int column = 0; column < FINAL_SIZE; ++column) {
        const int at = pixel + column - FINAL_REACH;
        if (at < 0 || at >= width) continue;
#pragma unroll
        for (int output = 0; output < FINAL_OUTPUTS; ++output)
            outputs[output] += columns[column * FINAL_OUTPUTS + output][at];
    }
}

// Grid: strips of rows, tiles of columns, frames.
template <class T, int CHANNELS>
LFDM_INLINE void final_conv(const Block<FINAL_THREADS>& block, FinalShared<CHANNELS>& shared, const FinalShape& shape,
                            const T* LFDM_RESTRICT phase00, const T* LFDM_RESTRICT phase01,
                            const T* LFDM_RESTRICT phase10, const T* LFDM_RESTRICT phase11,
                            const T* LFDM_RESTRICT kernel, const T* LFDM_RESTRICT bias, float* LFDM_RESTRICT result) {
    constexpr int STEPS = CHANNELS / 16;
    const int begin = block.x * shape.rows;
    const int end = begin + shape.rows < shape.height ? begin + shape.rows : shape.height;
    const int first = block.y * (FINAL_TILE - 2 * FINAL_REACH);
    const bool last = first + FINAL_TILE >= shape.width;
    const int inside = last ? shape.width - first : FINAL_TILE;
    const int written_from = block.y == 0 ? 0 : FINAL_REACH, written_to = last ? inside : FINAL_TILE - FINAL_REACH;
    const auto row_at = [&](int row) -> FinalRow<T> {
        const int64 place = (int64(block.z) * (shape.height / 2) + row / 2) * (shape.width / 2) * CHANNELS;
        const int width = row < shape.height && row < end + FINAL_REACH ? shape.width / 2 : 0;
        return {{(row % 2 ? phase10 : phase00) + place, (row % 2 ? phase11 : phase01) + place}, width};
    };
    const int row0 = begin < FINAL_REACH ? 0 : begin - FINAL_REACH;  // rows above the map add nothing
    place_kernel<CHANNELS>(block, shared, kernel);
    PerWarp<FinalWarp, FINAL_WARPS> of_warps = {};
    each_warp(block, [&](int warp) {
        copy_pixels<CHANNELS>(shared.pixels[warp], row_at(row0), first / 2 + warp * (FINAL_PIXELS / 2));
    });
#pragma unroll 1
    for (int row = row0; row < end + FINAL_REACH; ++row) {
        const bool complete = row >= begin + FINAL_REACH;
        each_warp(block, [&](int warp) {
            if (warp * FINAL_PIXELS >= inside) return;
            FinalWarp& own = of_warps[warp];
            FinalSums sums[FINAL_SIZE];
#pragma unroll
            for (int i = 0; i < FINAL_SIZE; ++i) sums[i] = i + 1 < FINAL_SIZE ? own.rows[i] : FinalSums{};
            await_copies();
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                PerLane<uint32> a[2][4];
                read_pixels<CHANNELS>(shared.pixels[warp], step, a);
                if (step + 1 == STEPS) {
                    meet_lanes();
                    copy_pixels<CHANNELS>(shared.pixels[warp], row_at(row + 1),
                                          first / 2 + warp * (FINAL_PIXELS / 2));
                }
#pragma unroll
                for (int i = 0; i < FINAL_SIZE; ++i)
                    add_products<T>(sums[i], a,
                                    shared.kernel + ((FINAL_SIZE - 1 - i) * STEPS + step) * FINAL_TILES * LANES);
            }
            if (complete) store_sums(sums[0], shared.sums, warp * FINAL_PIXELS);
#pragma unroll
            for (int i = 0; i + 1 < FINAL_SIZE; ++i) own.rows[i] = sums[i + 1];
        });
        if (!complete) continue;
        block.barrier();
        each_warp(block, [&](int warp) {
            each_lane([&](int lane) {
                const int pixel = warp * FINAL_PIXELS + lane;
                if (pixel < written_from || pixel >= written_to) return;
                float outputs[FINAL_OUTPUTS];
#pragma unroll
                for (int i = 0; i < FINAL_OUTPUTS; ++i) outputs[i] = load(bias[i]);
                add_columns(shared.sums, pixel, inside, outputs);
#pragma unroll
                for (int i = 0; i < FINAL_OUTPUTS; ++i)
                    result[((int64(block.z) * FINAL_OUTPUTS + i) * shape.height + row - FINAL_REACH) * shape.width +
                           first + pixel] = sigmoid(outputs[i]);
            });
        });
        block.barrier();
    }
}

}  // namespace lfdm

// A kernel by name, storage type and channels of the map.
#define LFDM_FINAL_CONV_KERNEL(name, T, channels)                                                                    \
    LFDM_LANES_KERNEL(name, lfdm::FINAL_THREADS, 2)                                                                  \
    (const lfdm::T* LFDM_RESTRICT phase00, const lfdm::T* LFDM_RESTRICT phase01,                                     \
     const lfdm::T* LFDM_RESTRICT phase10, const lfdm::T* LFDM_RESTRICT phase11,                                     \
     const lfdm::T* LFDM_RESTRICT kernel, const lfdm::T* LFDM_RESTRICT bias, int height, int width, int rows,        \
     float* LFDM_RESTRICT result) {                                                                                  \
        LFDM_SHARED lfdm::FinalShared<channels> shared;                                                              \
        lfdm::spoil(shared);                                                                                         \
        lfdm::final_conv<lfdm::T, channels>({}, shared, {height, width, rows}, phase00, phase01, phase10, phase11,   \
                                            kernel, bias, result);                                                   \
    }
