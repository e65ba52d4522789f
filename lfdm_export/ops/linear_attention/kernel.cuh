// The second half of spatial linear attention: queries, their softmax over the channels of a head, the product with the
// projection of their frame, bias and residual.
//
//     x, normed (N, P, C); query (C, H·D); projection (N, H·D, C); bias (C)
//     ->  x + softmax(normed · query) · projection + bias,  (N, P, C)
//
// LOWER BOUND. Memory must provide x and normed and receive the result: 3·N·P·C values. As separate operators, the
// queries, H·D wide, are written and read again twice: 4·N·P·H·D more. For 40 frames, H·D = 256, in 16 bits, at the
// 4.2 TB/s that a device copy reaches on an H200 (measured; the times are computed):
//
//     map of the UNet        x, normed, result       queries, as separate operators
//     32x32 x  64            16 MB   3.7 us          84 MB   20 us
//     16x16 x 128            7.9 MB  1.9 us          21 MB   5.0 us
//       8x8 x 256            3.9 MB  0.9 us          5.2 MB  1.2 us
//
// DESIGN. A warp computes 64 channels of 16 pixels of a frame, in registers: no shared memory, no barrier. For each
// head it forms the queries, then their weights, which enter the second product as they are. A map of more than 64
// channels has its queries formed once per 64: on such maps they are cheap, and more warps fill the GPU.
//  - As in temporal attention, a lane reads 16 bytes of a row, and sums run over channels in the order in which lanes
//    hold them. Tile n of a head holds channels 8 t + 2 n and 8 t + 2 n + 1 of 32 in lane 4 g + t.
//  - Both factors lie in memory as rows of the summed index, and products need pairs of it in a register: movmatrix
//    transposes them between the lanes.
//
// Queries, softmax and sums are float32. Weights are rounded to the storage type, as the product requires.
#include "cuda/lanes.cuh"

namespace lfdm {

constexpr int LINEAR_WARPS = 4;
constexpr int LINEAR_THREADS = LINEAR_WARPS * LANES;
constexpr int LINEAR_ROWS = 16;  // pixels per warp

// Channels that a warp computes.
template <int CHANNELS>
constexpr int linear_part = CHANNELS < 64 ? CHANNELS : 64;

// Blocks that a multiprocessor holds together: as many as its registers allow without spilling.
template <int CHANNELS>
constexpr int linear_blocks = CHANNELS <= 64 ? 3 : 2;

struct LinearShape {
    int pixels, heads;
};

// The row, of 8 rows of step `step`, that lane row `g` holds: rows 2 t and 2 t + 1 are neighbors in memory, and the
// steps of a lane too. `SPAN` rows have SPAN / 8 steps.
template <int SPAN>
LFDM_INLINE int linear_row(int step, int g) {
    constexpr int STEPS = SPAN < 32 ? SPAN / 8 : 4;
    return step / STEPS * 8 * STEPS + g / 2 * 2 * STEPS + step % STEPS * 2 + g % 2;
}

// Reads COUNT registers per lane from the 8 rows of a step, of SPAN rows, and transposes each between the lanes: lane
// 4 g + t then holds rows 2 t and 2 t + 1 of a column.
template <int SPAN, int COUNT, class T>
LFDM_INLINE void read_transposed(const T* LFDM_RESTRICT from, int step, int stride, PerLane<uint32> (&tiles)[COUNT]) {
    each_lane([&](int lane) {
        const int place = linear_row<SPAN>(step, lane / 4) * stride + lane % 4 * 2 * COUNT;
        const Pack<uint32, COUNT> moved = read_pack<COUNT>(reinterpret_cast<const uint32*>(from + place));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) tiles[i][lane] = moved.values[i];
    });
#pragma unroll
    for (int i = 0; i < COUNT; ++i) transpose(tiles[i]);
}

// Softmax over the channels of a head, tile n of which lane 4 g + t has for rows g and g + 8; weights as factors.
template <class T, int TILES>
LFDM_INLINE void linear_weights(PerLane<Quad> (&logits)[TILES], PerLane<uint32> (&weights)[TILES][2]) {
    constexpr float LOG2_E = 1.44269504088896340736f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        PerLane<float> top, sum;
        each_lane([&](int lane) {
            top[lane] = logits[0][lane].values[2 * half];
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const float* own = logits[n][lane].values + 2 * half;
                top[lane] = larger(top[lane], larger(own[0], own[1]));
            }
        });
        largest_of_four(top);
        each_lane([&](int lane) {
            sum[lane] = 0.0f;
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                float* own = logits[n][lane].values + 2 * half;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    own[i] = exp2_of((own[i] - top[lane]) * LOG2_E);
                    sum[lane] += own[i];
                }
            }
        });
        sum_of_four(sum);
        each_lane([&](int lane) {
            const float share = reciprocal(sum[lane]);
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const float* own = logits[n][lane].values + 2 * half;
                weights[n][half][lane] = pack<T>(own[0] * share, own[1] * share);
            }
        });
    }
}

// Grid: groups of warps over the pixels, parts of the channels, frames.
template <class T, int CHANNELS, int WIDTH>
LFDM_INLINE void linear_attention(const Block<LINEAR_THREADS>& block, const LinearShape& shape,
                                  const T* LFDM_RESTRICT x, const T* LFDM_RESTRICT normed,
                                  const T* LFDM_RESTRICT query, const T* LFDM_RESTRICT projection,
                                  const T* LFDM_RESTRICT bias, T* LFDM_RESTRICT result) {
    constexpr int STEPS = CHANNELS / 8, TILES = WIDTH / 8, PART = linear_part<CHANNELS>, RUN = TILES < 4 ? TILES : 4;
    each_warp(block, [&](int warp) {
        const int row0 = (block.x * LINEAR_WARPS + warp) * LINEAR_ROWS, width = shape.heads * WIDTH;
        if (row0 >= shape.pixels) return;
        const int64 first = (int64(block.z) * shape.pixels + row0) * CHANNELS;
        PerLane<uint32> own[STEPS][2];
        each_lane([&](int lane) {
#pragma unroll
            for (int part = 0; part < CHANNELS / 32; ++part) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = lane / 4 + 8 * half;
                    Pack<uint32, 4> moved = {};
                    if (row0 + row < shape.pixels)
                        moved = read_pack<4>(reinterpret_cast<const uint32*>(normed + first + row * CHANNELS +
                                                                             32 * part + lane % 4 * 8));
#pragma unroll
                    for (int i = 0; i < 4; ++i) own[4 * part + i][half][lane] = moved.values[i];
                }
            }
        });
        PerLane<Quad> sums[PART / 8] = {};
        const T* LFDM_RESTRICT of_frame = projection + int64(block.z) * width * CHANNELS + block.y * PART;
#pragma unroll 1
        for (int head = 0; head < shape.heads; ++head) {
            PerLane<Quad> logits[TILES] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step += 2) {
#pragma unroll
                for (int begin = 0; begin < TILES; begin += RUN) {
                    PerLane<uint32> b[2][RUN];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        read_transposed<CHANNELS>(query + head * WIDTH + 8 * begin, step + i, width, b[i]);
                    const PerLane<uint32> a[4] = {own[step][0], own[step][1], own[step + 1][0], own[step + 1][1]};
#pragma unroll
                    for (int n = 0; n < RUN; ++n) multiply_add_16<T>(logits[begin + n], a, b[0][n], b[1][n]);
                }
            }
            PerLane<uint32> weights[TILES][2];
            linear_weights<T>(logits, weights);
            const T* LFDM_RESTRICT of_head = of_frame + int64(head) * WIDTH * CHANNELS;
#pragma unroll
            for (int n = 0; n < TILES; n += 2) {
                const PerLane<uint32> a[4] = {weights[n][0], weights[n][1], weights[n + 1][0], weights[n + 1][1]};
#pragma unroll
                for (int begin = 0; begin < PART / 8; begin += 4) {
                    PerLane<uint32> b[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        read_transposed<WIDTH>(of_head + 8 * begin, n + i, CHANNELS, b[i]);
#pragma unroll
                    for (int m = 0; m < 4; ++m) multiply_add_16<T>(sums[begin + m], a, b[0][m], b[1][m]);
                }
            }
        }
        each_lane([&](int lane) {
#pragma unroll
            for (int part = 0; part < PART / 32; ++part) {
                const int channel = block.y * PART + 32 * part + lane % 4 * 8;
                const Pack<uint32, 4> offset = read_pack<4>(reinterpret_cast<const uint32*>(bias + channel));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = lane / 4 + 8 * half;
                    if (row0 + row >= shape.pixels) continue;
                    const int64 place = first + row * CHANNELS + channel;
                    Pack<uint32, 4> moved = read_pack<4>(reinterpret_cast<const uint32*>(x + place));
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const float* found = sums[4 * part + m][lane].values + 2 * half;
                        const Two before = unpack<T>(moved.values[m]), added = unpack<T>(offset.values[m]);
                        moved.values[m] = pack<T>(before.first + (found[0] + added.first),
                                                  before.second + (found[1] + added.second));
                    }
                    write_pack<4>(reinterpret_cast<uint32*>(result + place), moved);
                }
            }
        });
    });
}

}  // namespace lfdm

// A kernel by name, storage type, channels of the map and channels per head.
#define LFDM_LINEAR_ATTENTION_KERNEL(name, T, channels, width)                                                       \
    LFDM_LANES_KERNEL(name, lfdm::LINEAR_THREADS, lfdm::linear_blocks<channels>)                                     \
    (const lfdm::T* LFDM_RESTRICT x, const lfdm::T* LFDM_RESTRICT normed, const lfdm::T* LFDM_RESTRICT query,        \
     const lfdm::T* LFDM_RESTRICT projection, const lfdm::T* LFDM_RESTRICT bias, int pixels, int heads,              \
     lfdm::T* LFDM_RESTRICT result) {                                                                                \
        lfdm::linear_attention<lfdm::T, channels, width>({}, {pixels, heads}, x, normed, query, projection, bias,    \
                                                         result);                                                    \
    }
