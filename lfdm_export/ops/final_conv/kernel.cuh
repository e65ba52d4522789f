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
//  - A block goes down a strip of a tile of 128 pixels' width, row by row. A warp has 32 pixels. It reads each once,
//    multiplies it with all 7 rows of the kernel, and adds to the sums of 7 rows of the result, which are in registers:
//    168 per thread. When a row is complete, its sums move to shared memory, and each thread adds 21 of them for its
//    pixel. Two buffers alternate, so that a row has one barrier.
//  - The kernel lies in shared memory in the order in which lanes read it, 16 bytes at once; each read serves four
//    products. A part of the next row is read as soon as the last product of this row's part is issued.
//  - A lane reads 16 bytes of a pixel, and sums run over channels in the order in which lanes hold them. Rows g and
//    g + 8 of a product are neighboring pixels of the map: the same place in two phases.
//  - A strip reads 6 rows more than it writes. `final_launch` chooses its height, so that few blocks wait for others.
//    Tiles of wider maps overlap by 6 pixels.
// For 40 frames of 128x128 there are 6 strips of 22 rows: 107 MB to read, at least in part from the L2 cache.
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

// A lane reads PACK registers of a pixel at once; a pixel has PARTS · 4 · PACK.
template <int CHANNELS>
constexpr int final_pack = CHANNELS < 32 ? 2 : 4;
template <int CHANNELS>
constexpr int final_parts = CHANNELS / (8 * final_pack<CHANNELS>);

template <int CHANNELS>
struct FinalShared {
    // By row of the kernel, part, tile and lane.
    Pack<uint32, final_pack<CHANNELS>> kernel[FINAL_SIZE * final_parts<CHANNELS> * FINAL_TILES * LANES];
    float sums[2][FINAL_COLUMNS][FINAL_STRIDE];
};

// What a warp keeps from row to row. Pixels are in two groups of 16; rows g and g + 8 of a product are neighbors.
template <int CHANNELS>
struct FinalWarp {
    PerLane<Quad> sums[FINAL_SIZE][FINAL_TILES][2];  // of the rows of the result, the next complete one first
    PerLane<uint32> pixels[final_parts<CHANNELS>][2][2][final_pack<CHANNELS>];  // by part, group, phase
};

// A row of the map: a row of two of its phases.
template <class T>
struct FinalRow {
    const T* LFDM_RESTRICT phases[2];
    int width;  // of a phase; 0 for a row outside of the map
};

LFDM_INLINE float sigmoid(float value) {
    constexpr float LOG2_E = 1.44269504088896340736f;
    return reciprocal(1.0f + exp2_of(-value * LOG2_E));
}

// Brings the kernel into the order in which lanes read it.
template <int CHANNELS, class T>
LFDM_INLINE void place_kernel(const Block<FINAL_THREADS>& block, FinalShared<CHANNELS>& shared,
                              const T* LFDM_RESTRICT kernel) {
    constexpr int PACK = final_pack<CHANNELS>, PARTS = final_parts<CHANNELS>;
    block.phase([&](int thread) {
        for (int i = thread; i < FINAL_SIZE * PARTS * FINAL_TILES * LANES; i += FINAL_THREADS) {
            const int lane = i % LANES, tile = i / LANES % FINAL_TILES, part = i / (LANES * FINAL_TILES) % PARTS;
            const int column = i / (LANES * FINAL_TILES * PARTS) * 8 * FINAL_TILES + 8 * tile + lane / 4;
            const int channel = 2 * PACK * (4 * part + lane % 4);
            shared.kernel[i] = read_pack<PACK>(reinterpret_cast<const uint32*>(kernel + column * CHANNELS + channel));
        }
    });
}

// Reads a part of the warp's pixels, the first of which is the phases' pixel `first`.
template <int CHANNELS, class T>
LFDM_INLINE void read_pixels(FinalWarp<CHANNELS>& own, int part, const FinalRow<T>& row, int first) {
    constexpr int PACK = final_pack<CHANNELS>;
    each_lane([&](int lane) {
        const int place = (first + lane / 4) * CHANNELS + lane % 4 * 2 * PACK;
#pragma unroll
        for (int phase = 0; phase < 2; ++phase) {
            const T* LFDM_RESTRICT from = row.phases[phase] + place;
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                Pack<uint32, PACK> moved = {};
                if (first + lane / 4 + 8 * group < row.width)
                    moved = read_once<PACK>(
                        reinterpret_cast<const uint32*>(from + 8 * group * CHANNELS + part * 8 * PACK));
#pragma unroll
                for (int i = 0; i < PACK; ++i) own.pixels[part][group][phase][i][lane] = moved.values[i];
            }
        }
    });
}

// Adds the products of a part of the pixels with a row of the kernel to the sums of a row of the result.
template <class T, int CHANNELS>
LFDM_INLINE void add_products(PerLane<Quad> (&sums)[FINAL_TILES][2], const FinalWarp<CHANNELS>& own,
                              const FinalShared<CHANNELS>& shared, int kernel_row, int part) {
    constexpr int PACK = final_pack<CHANNELS>, PARTS = final_parts<CHANNELS>;
    PerLane<uint32> b[FINAL_TILES][PACK];
    each_lane([&](int lane) {
#pragma unroll
        for (int tile = 0; tile < FINAL_TILES; ++tile) {
            const int place = ((kernel_row * PARTS + part) * FINAL_TILES + tile) * LANES + lane;
            const Pack<uint32, PACK> moved = shared.kernel[place];
#pragma unroll
            for (int i = 0; i < PACK; ++i) b[tile][i][lane] = moved.values[i];
        }
    });
#pragma unroll
    for (int step = 0; step < PACK; step += 2) {
#pragma unroll
        for (int tile = 0; tile < FINAL_TILES; ++tile) {
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const auto& of = own.pixels[part][group];
                const PerLane<uint32> a[4] = {of[0][step], of[1][step], of[0][step + 1], of[1][step + 1]};
                multiply_add_16<T>(sums[tile][group], a, b[tile][step], b[tile][step + 1]);
            }
        }
    }
}

// Moves the sums of the warp's pixels, from its first on, to shared memory.
LFDM_INLINE void store_sums(const PerLane<Quad> (&sums)[FINAL_TILES][2], float (*columns)[FINAL_STRIDE], int first) {
    each_lane([&](int lane) {
#pragma unroll
        for (int tile = 0; tile < FINAL_TILES; ++tile) {
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const float* own = sums[tile][group][lane].values;
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
    constexpr int PARTS = final_parts<CHANNELS>;
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
    PerWarp<FinalWarp<CHANNELS>, FINAL_WARPS> of_warps = {};
    each_warp(block, [&](int warp) {
        const FinalRow<T> row = row_at(row0);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            read_pixels<CHANNELS>(of_warps[warp], part, row, first / 2 + warp * (FINAL_PIXELS / 2));
    });
#pragma unroll 1
    for (int row = row0; row < end + FINAL_REACH; ++row) {
        const bool complete = row >= begin + FINAL_REACH;
        float(*columns)[FINAL_STRIDE] = shared.sums[row % 2];
        each_warp(block, [&](int warp) {
            if (warp * FINAL_PIXELS >= inside) return;
            FinalWarp<CHANNELS>& own = of_warps[warp];
#pragma unroll
            for (int i = 0; i < FINAL_SIZE; ++i) {
#pragma unroll
                for (int tile = 0; tile < FINAL_TILES; ++tile) {
#pragma unroll
                    for (int group = 0; group < 2; ++group)
                        own.sums[i][tile][group] =
                            i + 1 < FINAL_SIZE ? own.sums[i + 1 < FINAL_SIZE ? i + 1 : 0][tile][group] : PerLane<Quad>{};
                }
            }
            const FinalRow<T> next = row_at(row + 1);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                for (int i = 0; i < FINAL_SIZE; ++i)
                    add_products<T, CHANNELS>(own.sums[i], own, shared, FINAL_SIZE - 1 - i, part);
                read_pixels<CHANNELS>(own, part, next, first / 2 + warp * (FINAL_PIXELS / 2));
            }
            if (complete) store_sums(own.sums[0], columns, warp * FINAL_PIXELS);
        });
        block.barrier();
        if (!complete) continue;
        each_warp(block, [&](int warp) {
            each_lane([&](int lane) {
                const int pixel = warp * FINAL_PIXELS + lane;
                if (pixel < written_from || pixel >= written_to) return;
                float outputs[FINAL_OUTPUTS];
#pragma unroll
                for (int i = 0; i < FINAL_OUTPUTS; ++i) outputs[i] = load(bias[i]);
                add_columns(columns, pixel, inside, outputs);
#pragma unroll
                for (int i = 0; i < FINAL_OUTPUTS; ++i)
                    result[((int64(block.z) * FINAL_OUTPUTS + i) * shape.height + row - FINAL_REACH) * shape.width +
                           first + pixel] = sigmoid(outputs[i]);
            });
        });
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
