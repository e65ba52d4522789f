// The core of temporal attention: rotary embedding, position bias, softmax over the frames and the product with the
// values, for every pixel and head, from one tensor of queries, keys and values.
//
//     qkv (B, T, P, 3·H·D), channels [queries | keys | values], each with its heads in order  ->  (B, T, P, H·D)
//
// LOWER BOUND. Memory must provide qkv and receive the result: 4·B·T·P·H·D values. For T = 40, H = 8, D = 32 in 16
// bits, at the 4.2 TB/s that a device copy reaches on an H200 (measured; the times are computed):
//
//     pixels     1024            256             64              16
//     bytes      84 MB  20 us    21 MB  5.0 us   5.2 MB  1.2 us  1.3 MB  0.3 us
//
// The products are 2·2·T²·D operations per head and pixel, 3.4 GFLOP at 1024 pixels: 5 us at the 650 TFLOP/s of large
// products. Each lane runs about a thousand instructions, mostly for softmax and rotation.
//
// DESIGN. A warp computes all frames of one pixel and head, in registers: no shared memory, no barrier, no
// transposition in memory. All its rows of queries, keys and values are requested before the first is used.
//  - A lane reads 16 bytes of a row (8 where D = 16): lane 4 g + t reads channels t of row g of a tile of 8 rows, so
//    that the heads of a pixel, whose warps are consecutive, read contiguous memory. This is not the order of channels
//    in which a matrix product takes its operands. But a sum over channels may have any order, as long as queries and
//    keys use the same one, which they do. Pairs that rotate together are in one register.
//  - Products give the logits of 16 queries and all keys in the layout in which weights enter the product with the
//    values. Values need two rows per register instead of two channels: movmatrix transposes them between the lanes.
//    The order of the result's columns then matches the order in which the lanes read channels, so that a lane writes
//    the same positions that it reads.
//  - Rotary tables and bias are in memory in the order of the lanes (`tables.py` of this folder), so that each access
//    of a warp is 512 contiguous bytes. The bias of keys beyond T is -infinity; rows beyond T are zeros, and not
//    stored.
//  - If the number of tiles is odd, 8 queries remain; only their products are as large as those of 16.
//
// Rotation, logits, softmax and sums are float32. Rotated queries and keys, and weights before the division by their
// sum (the largest is 1), are rounded to the storage type, as the products require.
#include "cuda/lanes.cuh"

namespace lfdm {

constexpr int TEMPORAL_WARPS = 4;
constexpr int TEMPORAL_THREADS = TEMPORAL_WARPS * LANES;

// Blocks that a multiprocessor holds together: as many as its registers allow without spilling.
template <int WIDTH, int TILES>
constexpr int temporal_blocks = WIDTH * TILES <= 192 ? 4 : WIDTH * TILES <= 256 ? 3 : 2;

struct TemporalShape {
    int frames, pixels, heads;
};

// TILES tiles of 8 rows, two channels per register; WIDTH channels are WIDTH / 8 registers per lane.
template <class T, int WIDTH, int TILES>
struct Rows {
    static constexpr int REGISTERS = WIDTH / 8;
    static constexpr int MOVED = REGISTERS < 4 ? REGISTERS : 4;  // per access

    PerLane<uint32> tiles[TILES][REGISTERS];

    // The first channel of access `part` of a lane.
    LFDM_INLINE static int channel(int lane, int part) { return (4 * part + lane % 4) * 2 * MOVED; }

    // Reads `rows` rows; only the last tile, if it is PARTIAL, may have fewer than 8, and is filled with zeros.
    template <bool PARTIAL>
    LFDM_INLINE void read(const T* LFDM_RESTRICT from, int64 stride, int rows) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            each_lane([&](int lane) {
                const int row = 8 * tile + lane / 4;
#pragma unroll
                for (int part = 0; part < REGISTERS / MOVED; ++part) {
                    const T* LFDM_RESTRICT at = from + row * stride + channel(lane, part);
                    Pack<uint32, MOVED> moved = {};
                    if (!PARTIAL || tile < TILES - 1 || row < rows)
                        moved = read_once<MOVED>(reinterpret_cast<const uint32*>(at));
#pragma unroll
                    for (int i = 0; i < MOVED; ++i) tiles[tile][part * MOVED + i][lane] = moved.values[i];
                }
            });
        }
    }

    // Rotates pairs; `table` has two cosines and sines per tile, pair of registers and lane.
    LFDM_INLINE void rotate(const float* LFDM_RESTRICT table) {
        constexpr int PARTS = REGISTERS / 2;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            each_lane([&](int lane) {
#pragma unroll
                for (int r = 0; r < REGISTERS; ++r) {
                    const Pack<float, 4> turns = read_pack<4>(table + ((tile * PARTS + r / 2) * LANES + lane) * 4);
                    const float cosine = turns.values[r % 2 * 2], sine = turns.values[r % 2 * 2 + 1];
                    uint32& pair = tiles[tile][r][lane];
                    const Two x = unpack<T>(pair);
                    pair = pack<T>(multiply_add(x.first, cosine, -(x.second * sine)),
                                   multiply_add(x.second, cosine, x.first * sine));
                }
            });
        }
    }
};

// Logits of 8 · HALVES queries by all keys: in tile n, lane 4 g + t holds those of query g, and of g + 8, by keys
// 8 n + 2 t and 8 n + 2 t + 1. They become weights that are not yet divided by their sums.
template <class T, int WIDTH, int TILES, int HALVES>
struct Weights {
    PerLane<Quad> tiles[TILES];
    PerLane<float> sums[HALVES];

    LFDM_INLINE void multiply(const Rows<T, WIDTH, HALVES>& queries, const Rows<T, WIDTH, TILES>& keys) {
        const PerLane<uint32> none = {};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            tiles[tile] = {};
#pragma unroll
            for (int r = 0; r < WIDTH / 8; r += 2) {
                const auto& first = queries.tiles[0];
                const auto& second = queries.tiles[HALVES - 1];
                const PerLane<uint32> a[4] = {first[r], HALVES == 2 ? second[r] : none, first[r + 1],
                                              HALVES == 2 ? second[r + 1] : none};
                multiply_add_16<T>(tiles[tile], a, keys.tiles[tile][r], keys.tiles[tile][r + 1]);
            }
        }
    }

    // Powers of 2 of logits times `scale`, plus bias, minus the largest of the row.
    LFDM_INLINE void soften(float scale, const float* LFDM_RESTRICT bias) {
        PerLane<float> largest[HALVES];
        each_lane([&](int lane) {
#pragma unroll
            for (int half = 0; half < HALVES; ++half) largest[half][lane] = float_of(0xff800000u);  // -infinity
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const Pack<float, 4> added = read_pack<4>(bias + (tile * LANES + lane) * 4);
#pragma unroll
                for (int i = 0; i < 2 * HALVES; ++i) {
                    float& logit = tiles[tile][lane].values[i];
                    logit = multiply_add(logit, scale, added.values[i]);
                    largest[i / 2][lane] = larger(largest[i / 2][lane], logit);
                }
            }
        });
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            largest_of_four(largest[half]);
            each_lane([&](int lane) {
                float sum = 0.0f;
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        float& logit = tiles[tile][lane].values[i];
                        logit = exp2_of(logit - largest[half][lane]);
                        sum += logit;
                    }
                }
                sums[half][lane] = sum;
            });
            sum_of_four(sums[half]);
        }
    }

    // Weighted sums of values; values are transposed, so that register r of a tile gives the lane's register r.
    LFDM_INLINE void average(PerLane<Quad> (&found)[WIDTH / 8], const Rows<T, WIDTH, TILES>& values) const {
        PerLane<uint32> packed[TILES][2];
        each_lane([&](int lane) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const float* weights = tiles[tile][lane].values;
                packed[tile][0][lane] = pack<T>(weights[0], weights[1]);
                packed[tile][1][lane] = HALVES == 2 ? pack<T>(weights[2], weights[3]) : 0u;
            }
        });
#pragma unroll
        for (int r = 0; r < WIDTH / 8; ++r) {
            found[r] = {};
#pragma unroll
            for (int tile = 0; tile + 1 < TILES; tile += 2) {
                const PerLane<uint32> a[4] = {packed[tile][0], packed[tile][1], packed[tile + 1][0],
                                              packed[tile + 1][1]};
                multiply_add_16<T>(found[r], a, values.tiles[tile][r], values.tiles[tile + 1][r]);
            }
            if (TILES % 2) multiply_add_8<T>(found[r], packed[TILES - 1], values.tiles[TILES - 1][r]);
        }
    }
};

// 8 · HALVES queries, from their logits to the result. `rows` of them are written; all of them unless PARTIAL.
template <bool PARTIAL, class T, int WIDTH, int TILES, int HALVES>
LFDM_INLINE void attend(const Rows<T, WIDTH, HALVES>& queries, const Rows<T, WIDTH, TILES>& keys,
                        const Rows<T, WIDTH, TILES>& values, const float* LFDM_RESTRICT bias, T* LFDM_RESTRICT to,
                        int64 stride, int rows) {
    using Own = Rows<T, WIDTH, HALVES>;
    // Scale of the logits, and the logarithm to base 2 of the bias.
    constexpr float SCALE = 1.4426950408889634f / (WIDTH == 16 ? 4.0f : WIDTH == 32 ? 5.656854249492381f : 8.0f);
    Weights<T, WIDTH, TILES, HALVES> weights;
    PerLane<Quad> found[Own::REGISTERS];
    weights.multiply(queries, keys);
    weights.soften(SCALE, bias);
    weights.average(found, values);
    each_lane([&](int lane) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const int row = 8 * half + lane / 4;
            const float share = reciprocal(weights.sums[half][lane]);
#pragma unroll
            for (int part = 0; part < Own::REGISTERS / Own::MOVED; ++part) {
                Pack<uint32, Own::MOVED> moved;
#pragma unroll
                for (int i = 0; i < Own::MOVED; ++i) {
                    const float* sums = found[part * Own::MOVED + i][lane].values + 2 * half;
                    moved.values[i] = pack<T>(sums[0] * share, sums[1] * share);
                }
                T* LFDM_RESTRICT at = to + row * stride + Own::channel(lane, part);
                if (!PARTIAL || half < HALVES - 1 || row < rows)
                    write_pack<Own::MOVED>(reinterpret_cast<uint32*>(at), moved);
            }
        }
    });
}

// Grid: groups of warps over pixels and heads, samples. `tables.py` makes `turns` and `bias`.
template <class T, int WIDTH, int TILES>
LFDM_INLINE void temporal_core(const Block<TEMPORAL_THREADS>& block, const TemporalShape& shape,
                               const T* LFDM_RESTRICT qkv, const float* LFDM_RESTRICT turns,
                               const float* LFDM_RESTRICT bias, T* LFDM_RESTRICT result) {
    constexpr int PAIRS = TILES / 2, TURNS = WIDTH / 16 * LANES * 4, BIAS = TILES * LANES * 4;  // per tile, per 16 rows
    constexpr bool EVEN = TILES % 2 == 0;
    each_warp(block, [&](int warp) {
        const int item = block.x * TEMPORAL_WARPS + warp;
        if (item >= shape.pixels * shape.heads) return;
        const int pixel = item / shape.heads, head = item % shape.heads, width = shape.heads * WIDTH;
        const int64 first = int64(block.y) * shape.frames * shape.pixels + pixel;
        const int64 stride = int64(shape.pixels) * width;
        const T* LFDM_RESTRICT from = qkv + first * 3 * width + head * WIDTH;
        T* LFDM_RESTRICT to = result + first * width + head * WIDTH;
        const float* LFDM_RESTRICT own_bias = bias + int64(head) * (PAIRS + TILES % 2) * BIAS;

        Rows<T, WIDTH, TILES> keys, values;
        Rows<T, WIDTH, 2> next;
        Rows<T, WIDTH, 1> last;
        keys.template read<true>(from + width, 3 * stride, shape.frames);
        if (PAIRS > 0) next.template read<EVEN && PAIRS == 1>(from, 3 * stride, shape.frames);
        values.template read<true>(from + 2 * width, 3 * stride, shape.frames);
        if (!EVEN)
            last.template read<true>(from + (TILES - 1) * 8 * 3 * stride, 3 * stride, shape.frames - (TILES - 1) * 8);
        keys.rotate(turns);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int r = 0; r < WIDTH / 8; ++r) transpose(values.tiles[tile][r]);
        }
        // Not unrolled: otherwise the compiler would use three times as many registers.
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; ++pair) {
            Rows<T, WIDTH, 2> queries = next;
            const int64 row = 16 * (pair + 1);
            if (pair + 1 < PAIRS)
                next.template read<EVEN>(from + row * 3 * stride, 3 * stride, shape.frames - int(row));
            queries.rotate(turns + 2 * pair * TURNS);
            attend<EVEN>(queries, keys, values, own_bias + pair * BIAS, to + 16 * pair * stride, stride,
                         shape.frames - 16 * pair);
        }
        if (!EVEN) {
            last.rotate(turns + (TILES - 1) * TURNS);
            attend<true>(last, keys, values, own_bias + PAIRS * BIAS, to + (TILES - 1) * 8 * stride, stride,
                         shape.frames - (TILES - 1) * 8);
        }
    });
}

}  // namespace lfdm

// A kernel by name, storage type, channels per head and tiles of 8 frames. Its parameters are those that a TensorRT
// plugin passes: inputs, int32 scalars, outputs.
#define LFDM_TEMPORAL_CORE_KERNEL(name, T, width, tiles)                                                             \
    LFDM_LANES_KERNEL(name, lfdm::TEMPORAL_THREADS, (lfdm::temporal_blocks<width, tiles>))                           \
    (const lfdm::T* LFDM_RESTRICT qkv, const float* LFDM_RESTRICT turns, const float* LFDM_RESTRICT bias, int frames, \
     int pixels, int heads, lfdm::T* LFDM_RESTRICT result) {                                                         \
        lfdm::temporal_core<lfdm::T, width, tiles>({}, {frames, pixels, heads}, qkv, turns, bias, result);           \
    }
