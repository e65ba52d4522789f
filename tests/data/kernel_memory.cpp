// Runs every kernel on buffers of exactly the size that it may touch, with coordinates of every kind: for a sanitizer.
// Given the name of a buffer, that one is a few values short, which must be noticed.
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace {

std::string shortened;

template <class T>
std::unique_ptr<T[]> buffer(const char* name, size_t count) {
    // A block of its own on the heap, so that its ends are watched.
    auto values = std::make_unique<T[]>(shortened == name ? count - 4 : count);
    std::memset(values.get(), 0, sizeof(T) * (shortened == name ? count - 4 : count));
    return values;
}

uint32_t state = 1;

float random_float() {  // in [0, 1)
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / 16777216.0f;
}

float coordinate(int size) {
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const float wild[] = {nan, infinity, -infinity, 3.4e38f, -3.4e38f, 1e9f, -1e9f, 2147483648.0f, -2147483648.0f,
                          -1.0f, 1.0f, -1.0f + 1.0f / size, 1.0f - 1.0f / size, -1.0f - 1.0f / size,
                          1.0f + 1.0f / size};
    const int kind = int(random_float() * 32);
    if (kind < 15) return wild[kind];
    if (kind < 18) return std::nextafter(1.0f + 1.0f / size, kind == 15 ? -9.0f : 9.0f);
    if (kind < 20) return std::nextafter(-1.0f - 1.0f / size, kind == 18 ? -9.0f : 9.0f);
    return 3.0f * random_float() - 1.5f;
}

void launch_at(int x, int y, int blocks_x) { lfdm::launch() = {x, y, 0, blocks_x, 0}; }

struct Case {
    int batch, frames, channels, motion_height, motion_width, height, width, stride;
};

template <class T, class Blend, class Warp>
void check_warp(Blend blend, Warp warp, bool planar, const Case& c) {
    const int rows = c.height / c.stride, columns = c.width / c.stride, all = c.batch * c.frames;
    auto source = buffer<T>("source", size_t(c.batch) * c.channels * c.height * c.width);
    auto motion = buffer<float>("motion", size_t(all) * 3 * c.motion_height * c.motion_width);
    auto previous = buffer<T>("previous", size_t(all) * c.channels * rows * columns);
    auto result = buffer<T>("result", size_t(all) * c.channels * rows * columns);
    const size_t plane = size_t(c.motion_height) * c.motion_width, planes = shortened == "motion" ? 0 : size_t(all);
    for (size_t i = 0; i < planes * 3 * plane; ++i) {
        const size_t which = i / plane % 3;
        motion[i] = which == 2 ? random_float() : coordinate(which == 0 ? c.width : c.height);
    }
    const int pack = 16 / int(sizeof(T)), pixels = lfdm::STRIP_PACKS * 4 / int(sizeof(T));
    const int across = (rows + 7) / 8 * ((columns + 7) / 8);
    const int tiles = planar ? (rows * columns + pixels - 1) / pixels : across;
    const int slice = planar ? lfdm::SLICE_CHANNELS : lfdm::SLICE_PACKS * pack;
    for (int phase = 0; phase < c.stride * c.stride; ++phase)
        for (int z = 0; z * slice < c.channels; ++z)
            for (int y = 0; y < all; ++y)
                for (int x = 0; x < tiles; ++x) {
                    lfdm::launch() = {x, y, z, tiles, 0};
                    blend(source.get(), motion.get(), previous.get(), c.frames, c.channels, c.height, c.width,
                          c.motion_height, c.motion_width, c.stride, phase / 2, phase % 2, result.get());
                    if (c.stride == 1)
                        warp(source.get(), motion.get(), c.frames, c.channels, c.height, c.width, c.motion_height,
                             c.motion_width, 1, 0, 0, result.get());
                }
}

template <class S, class P, class Step, class Count, class Update>
void check_step(Step step, const Count (&passes)[3], Update update, int elements) {
    const int batch = 2, splits = 3;
    auto latent = buffer<S>("latent", size_t(batch) * elements);
    auto predicted = buffer<P>("predicted", size_t(batch) * elements);
    auto history = buffer<S>("history", size_t(batch) * 2 * elements);
    auto noise = buffer<S>("noise", size_t(batch) * elements);
    auto coefficients = buffer<float>("coefficients", size_t(batch) * 11);
    auto next = buffer<S>("next", size_t(batch) * elements);
    auto next_history = buffer<S>("next_history", size_t(batch) * 2 * elements);
    for (int i = 0; i < batch * 11; ++i) coefficients[i] = 1.0f + i;
    if (shortened != "latent")
        for (int i = 0; i < batch * elements; ++i) latent[i] = lfdm::store<S>(i % 7 ? 9.0f * random_float() : coordinate(9));
    const int rank = int(0.9f * (elements - 1));
    for (int y = 0; y < batch; ++y)
        for (int x = 0; x < splits; ++x) {
            launch_at(x, y, splits);
            step(latent.get(), predicted.get(), history.get(), noise.get(), coefficients.get(), elements, rank,
                 int(lfdm::bits_of(0.25f)), next.get(), next_history.get());
        }
    auto counts = buffer<lfdm::uint32>("counts", size_t(batch) * sizeof(lfdm::StepCounts) / 4);
    for (const Count& pass : passes)
        for (int y = 0; y < batch; ++y)
            for (int x = 0; x < splits; ++x) {
                launch_at(x, y, splits);
                pass(latent.get(), predicted.get(), coefficients.get(), elements, rank, counts.get());
            }
    for (int y = 0; y < batch; ++y)
        for (int x = 0; x < splits; ++x) {
            launch_at(x, y, splits);
            update(latent.get(), predicted.get(), history.get(), noise.get(), coefficients.get(), counts.get(), elements,
                   rank, int(lfdm::bits_of(0.25f)), next.get(), next_history.get());
        }
}

void check_noise(int elements) {
    auto seeds = buffer<lfdm::uint64>("seeds", 2);
    auto steps = buffer<lfdm::int64>("steps", 2);
    auto noise = buffer<float>("noise", size_t(2) * elements);
    steps[0] = -1;
    for (int y = 0; y < 2; ++y)
        for (int x = 0; x * 1024 < elements; ++x) {
            launch_at(x, y, (elements + 1023) / 1024);
            lfdm_noise(seeds.get(), steps.get(), elements, noise.get());
        }
}

void check_pictures(int pixels) {
    const int batch = 2, blocks = (pixels + lfdm::PICTURE_THREADS - 1) / lfdm::PICTURE_THREADS;
    auto images = buffer<float>("images", size_t(batch) * 3 * pixels);
    auto pictures = buffer<lfdm::uint8>("pictures", size_t(batch) * pixels * 3);
    auto flag = buffer<lfdm::uint32>("flag", 1);
    for (int y = 0; y < batch; ++y)
        for (int x = 0; x < blocks; ++x) {
            launch_at(x, y, blocks);
            lfdm_pictures(images.get(), pixels, pictures.get(), flag.get());
        }
    auto values = buffer<float>("values", pixels);
    for (int x = 0; x < blocks; ++x) {
        launch_at(x, 0, blocks);
        lfdm_not_finite(values.get(), pixels, flag.get());
    }
}

template <class T, class Core>
void check_core(Core core, int width, int tiles, int frames, int pixels, int heads) {
    const int batch = 2, blocks = (pixels * heads + lfdm::TEMPORAL_WARPS - 1) / lfdm::TEMPORAL_WARPS;
    auto qkv = buffer<T>("qkv", size_t(batch) * frames * pixels * 3 * heads * width);
    auto turns = buffer<float>("turns", size_t(tiles) * 8 * width);
    auto bias = buffer<float>("bias", size_t(heads) * (tiles + 1) / 2 * 16 * tiles * 8);
    auto result = buffer<T>("attended", size_t(batch) * frames * pixels * heads * width);
    for (int y = 0; y < batch; ++y)
        for (int x = 0; x < blocks; ++x) {
            lfdm::launch() = {x, y, 0, blocks, 0};
            core(qkv.get(), turns.get(), bias.get(), frames, pixels, heads, result.get());
        }
}

struct NormCase {
    int clips, rows, channels, groups, slice_groups, slab_rows, apply_rows;
};

template <class T, class P, class Statistics, class Apply>
void check_norm(Statistics statistics, Apply apply, const NormCase& c) {
    const int slabs = (c.rows + c.slab_rows - 1) / c.slab_rows, shares = (c.rows + c.apply_rows - 1) / c.apply_rows;
    const size_t count = size_t(c.clips) * c.rows * c.channels, row = size_t(c.clips) * c.channels;
    auto x = buffer<T>("x", count);
    auto partials = buffer<float>("partials", size_t(c.clips) * slabs * c.groups * 2);
    auto gamma = buffer<P>("gamma", c.channels), beta = buffer<P>("beta", c.channels);
    auto scale = buffer<P>("scale", row), shift = buffer<P>("shift", row);
    auto residual = buffer<T>("residual", count), normed = buffer<T>("normed", count);
    for (int z = 0; z < c.clips; ++z)
        for (int y = 0; y < c.groups / c.slice_groups; ++y) {
            for (int slab = 0; slab < slabs; ++slab) {
                lfdm::launch() = {slab, y, z, slabs, 0};
                statistics(x.get(), c.rows, c.channels, c.groups, c.slice_groups, c.slab_rows, partials.get());
            }
        }
    for (int z = 0; z < c.clips; ++z)
        for (int y = 0; y < c.groups / c.slice_groups; ++y)
            for (int share = 0; share < shares; ++share) {
                lfdm::launch() = {share, y, z, shares, 0};
                apply(x.get(), partials.get(), gamma.get(), beta.get(), scale.get(), shift.get(), residual.get(), c.rows,
                      c.channels, c.groups, c.slice_groups, c.slab_rows, c.channels, 1, 1, c.apply_rows, normed.get());
            }
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1) shortened = arguments[1];
    const Case cases[] = {
        {1, 1, 3, 8, 8, 8, 8, 1},   {2, 2, 8, 4, 4, 16, 16, 1}, {2, 2, 8, 4, 4, 16, 16, 2}, {1, 2, 9, 4, 6, 13, 17, 1},
        {1, 1, 1, 1, 1, 1, 1, 1},   {1, 1, 40, 3, 5, 6, 10, 2}, {1, 1, 136, 2, 2, 4, 4, 1},  {1, 3, 2, 5, 1, 10, 2, 1},
    };
    for (const Case& c : cases) {
        using namespace lfdm;
        check_warp<float>(lfdm_warp_blend_planar_f32, lfdm_warp_planar_f32, true, c);
        check_warp<float16>(lfdm_warp_blend_planar_f16, lfdm_warp_planar_f16, true, c);
        check_warp<bfloat16>(lfdm_warp_blend_planar_bf16, lfdm_warp_planar_bf16, true, c);
        check_warp<float>(lfdm_warp_blend_channels_last_f32, lfdm_warp_channels_last_f32, false, c);
        check_warp<float16>(lfdm_warp_blend_channels_last_f16, lfdm_warp_channels_last_f16, false, c);
        check_warp<bfloat16>(lfdm_warp_blend_channels_last_bf16, lfdm_warp_channels_last_bf16, false, c);
    }
    const NormCase norms[] = {
        {2, 100, 64, 8, 8, 64, 33}, {1, 7, 512, 8, 1, 64, 64}, {2, 5, 12, 4, 4, 2, 3}, {1, 3, 2080, 1, 1, 1, 1},
        {1, 1, 4, 4, 4, 128, 128},
    };
    for (const NormCase& c : norms) {
        using namespace lfdm;
        check_norm<float, float>(lfdm_norm_statistics_f32, lfdm_norm_silu_f32, c);
        check_norm<float16, float16>(lfdm_norm_statistics_f16, lfdm_norm_silu_f16, c);
        check_norm<bfloat16, bfloat16>(lfdm_norm_statistics_bf16, lfdm_norm_silu_bf16, c);
        check_norm<float16, float>(lfdm_norm_statistics_f16, lfdm_norm_silu_f16_f32, c);
        check_norm<bfloat16, float>(lfdm_norm_statistics_bf16, lfdm_norm_silu_bf16_f32, c);
    }
    for (int elements : {1024, 1025, 5000, 3, 2, 1}) {
        using namespace lfdm;
        // One kernel, then one for each pass, and the update.
        check_step<float, float>(lfdm_thresholded_step_f32,
            {lfdm_step_count_0_f32, lfdm_step_count_1_f32, lfdm_step_count_2_f32},
            lfdm_step_update_f32, elements);
        check_step<float, float16>(lfdm_thresholded_step_f32_f16,
            {lfdm_step_count_0_f32_f16, lfdm_step_count_1_f32_f16, lfdm_step_count_2_f32_f16},
            lfdm_step_update_f32_f16, elements);
        check_step<float, bfloat16>(lfdm_thresholded_step_f32_bf16,
            {lfdm_step_count_0_f32_bf16, lfdm_step_count_1_f32_bf16, lfdm_step_count_2_f32_bf16},
            lfdm_step_update_f32_bf16, elements);
        check_step<float16, float16>(lfdm_thresholded_step_f16,
            {lfdm_step_count_0_f16, lfdm_step_count_1_f16, lfdm_step_count_2_f16},
            lfdm_step_update_f16, elements);
        check_step<bfloat16, bfloat16>(lfdm_thresholded_step_bf16,
            {lfdm_step_count_0_bf16, lfdm_step_count_1_bf16, lfdm_step_count_2_bf16},
            lfdm_step_update_bf16, elements);
        check_noise(elements);
        check_pictures(elements);
    }
    {
        using namespace lfdm;
        for (int frames : {1, 7, 8}) check_core<float16>(lfdm_temporal_core_16x1_f16, 16, 1, frames, 3, 3);
        for (int frames : {9, 16}) check_core<float16>(lfdm_temporal_core_32x2_f16, 32, 2, frames, 3, 3);
        for (int frames : {33, 39, 40}) check_core<bfloat16>(lfdm_temporal_core_32x5_bf16, 32, 5, frames, 2, 3);
        check_core<float16>(lfdm_temporal_core_64x5_f16, 64, 5, 37, 2, 1);
    }
    std::puts("all runs done");
}
