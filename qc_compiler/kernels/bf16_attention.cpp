// Attention of float32 tensors by products of bfloat16: see bf16_attention.py.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int ROWS = 8;    // queries that one thread multiplies at once
constexpr int KEYS = 256;  // of a tile: the scores of its rows stay in the first cache
constexpr int WIDEST = 128;

// Elements 2d and 2d + 1 of a pair lie in the low and the high half of 32 bits, as VDPBF16PS wants them.
__m512i pairs(__m512 even, __m512 odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

__mmask16 first(long count) { return count >= 16 ? 0xffff : (__mmask16)((1u << std::max(count, 0l)) - 1); }

__m512bh load(const uint32_t* from) { return (__m512bh)_mm512_loadu_si512(from); }

__m512bh broadcast(uint32_t pair) { return (__m512bh)_mm512_set1_epi32((int)pair); }

// 2ˣ for x ≤ 0, relative error below 2⁻¹⁴; NaN stays NaN, −∞ gives 0.
__m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // of two operands one of which is NaN, the second
    const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.009618129f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.05550411f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24022651f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.6931472f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

struct View {  // (batch, heads, tokens, width), the last axis contiguous
    float* data;
    long batch, head, token;
    float* at(long b, long h, long n) const { return data + b * batch + h * head + n * token; }
};

// Elements d … d + 31 of a row as 16 pairs, those beyond its width 0.
__m512i row_pairs(const float* row, long d, long width, float scale) {
    const __m512 low = _mm512_maskz_loadu_ps(first(width - d), row + d);
    const __m512 high = _mm512_maskz_loadu_ps(first(width - d - 16), row + d + 16);
    const __m512 by = _mm512_set1_ps(scale);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, by), _mm512_mul_ps(low, by));
}

// Keys (num_keys, width) → pairs (width / 2, padded), what is padded 0.
void pack_keys(const float* from, long stride, long num_keys, long padded, long width, uint32_t* to) {
    alignas(64) uint32_t row[16];
    for (long d = 0; d < width; d += 32)
        for (long n = 0; n < padded; n++) {
            _mm512_store_si512(row, n < num_keys ? row_pairs(from + n * stride, d, width, 1) : _mm512_setzero_si512());
            for (long j = 0; j < std::min(16l, (width - d + 1) / 2); j++) to[(d / 2 + j) * padded + n] = row[j];
        }
}

// Values (num_keys, width) → pairs (padded / 2, lanes), what is padded 0.
void pack_values(const float* from, long stride, long num_keys, long padded, long width, long lanes, uint32_t* to) {
    for (long n = 0; n < padded; n += 2)
        for (long d = 0; d < lanes; d += 16) {
            const __mmask16 there = first(width - d);
            const float* at = from + n * stride + d;
            const __m512 even = _mm512_maskz_loadu_ps(n < num_keys ? there : 0, at);
            const __m512 odd = _mm512_maskz_loadu_ps(n + 1 < num_keys ? there : 0, at + stride);
            _mm512_storeu_si512(to + n / 2 * lanes + d, pairs(even, odd));
        }
}

// Σ_j p_j·v_j of one tile, added to what a tile before left in `out`; a register for each row and 16 · Z lanes.
template <int Z>
void add_values(const uint16_t (*p)[KEYS], const uint32_t* values, long lanes, int count, float (*out)[WIDEST]) {
    __m512 sums[ROWS][Z];
    for (int i = 0; i < ROWS; i++)
        for (int z = 0; z < Z; z++) sums[i][z] = _mm512_load_ps(out[i] + 16 * z);
    for (int j = 0; j < count / 2; j++) {
        __m512bh v[Z];
        for (int z = 0; z < Z; z++) v[z] = load(values + j * lanes + 16 * z);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const __m512bh weight = broadcast(((const uint32_t*)p[i])[j]);
            for (int z = 0; z < Z; z++) sums[i][z] = _mm512_dpbf16_ps(sums[i][z], v[z], weight);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int z = 0; z < Z; z++) _mm512_store_ps(out[i] + 16 * z, sums[i][z]);
}

// `count` ≤ ROWS queries of one head; the rest repeats the last of them.
void attend(const float* query, long stride, float* result, long result_stride, int count, float scale, long width,
            const uint32_t* keys, const uint32_t* values, long num_keys, long padded, long lanes) {
    alignas(64) uint32_t q[ROWS][WIDEST / 2];
    alignas(64) float scores[ROWS][KEYS];
    alignas(64) uint16_t p[ROWS][KEYS];
    alignas(64) float out[ROWS][WIDEST];
    float top[ROWS], total[ROWS];
    for (int i = 0; i < ROWS; i++) {
        const float* row = query + std::min(i, count - 1) * stride;
        for (long d = 0; d < width; d += 32) _mm512_store_si512(q[i] + d / 2, row_pairs(row, d, width, scale));
        for (long d = 0; d < lanes; d += 16) _mm512_store_ps(out[i] + d, _mm512_setzero_ps());
        top[i] = -INFINITY;
        total[i] = 0;
    }
    const __m512bh ones = broadcast(0x3f803f80);
    for (long start = 0; start < padded; start += KEYS) {
        const int size = (int)std::min<long>(KEYS, padded - start);
        for (int c = 0; c < size; c += 32) {
            __m512 sums[ROWS][2];
            for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
            for (long d = 0; d < (width + 1) / 2; d++) {
                const __m512bh near = load(keys + d * padded + start + c), far = load(keys + d * padded + start + c + 16);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], near, broadcast(q[i][d]));
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], far, broadcast(q[i][d]));
                }
            }
            for (int i = 0; i < ROWS; i++)
                for (int z = 0; z < 2; z++) _mm512_store_ps(scores[i] + c + 16 * z, sums[i][z]);
        }
        for (int i = 0; i < ROWS; i++) {
            std::fill(scores[i] + std::min<long>(size, num_keys - start), scores[i] + size, -INFINITY);
            __m512 most = _mm512_load_ps(scores[i]);
            for (int c = 16; c < size; c += 16) most = _mm512_max_ps(most, _mm512_load_ps(scores[i] + c));
            const float highest = std::max(top[i], _mm512_reduce_max_ps(most));
            const __m512 at = _mm512_set1_ps(highest);
            __m512 sum = _mm512_setzero_ps();
            for (int c = 0; c < size; c += 32) {
                const __m512 near = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores[i] + c), at));
                const __m512 far = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores[i] + c + 16), at));
                const __m512bh both = _mm512_cvtne2ps_pbh(far, near);
                sum = _mm512_dpbf16_ps(sum, both, ones);  // of what the values are multiplied with
                _mm512_store_si512(p[i] + c, (__m512i)both);
            }
            if (highest != top[i]) {
                const float kept = start ? exp2f(top[i] - highest) : 0;
                for (long d = 0; d < lanes; d++) out[i][d] *= kept;
                total[i] *= kept;
                top[i] = highest;
            }
            total[i] += _mm512_reduce_add_ps(sum);
        }
        const uint32_t* at = values + start / 2 * lanes;
        for (long d = 0; d < lanes; d += 32)
            if (lanes - d > 16) {
                add_values<2>(p, at + d, lanes, size, (float (*)[WIDEST])(out[0] + d));
            } else {
                add_values<1>(p, at + d, lanes, size, (float (*)[WIDEST])(out[0] + d));
            }
    }
    for (int i = 0; i < count; i++)
        for (long d = 0; d < width; d++) result[i * result_stride + d] = out[i][d] / total[i];
}

}  // namespace

// sizes: batch, heads, queries, keys, width; strides: batch, head and token of query, key, value and result.
// packed: room for (batch · heads) · padded · (⌈width / 2⌉ + lanes / 2) pairs.
extern "C" void attention(float* query, float* key, float* value, float* result, uint32_t* packed, const long* sizes,
                          const long* strides, float scale, int num_threads) {
    const long batch = sizes[0], heads = sizes[1], queries = sizes[2], num_keys = sizes[3], width = sizes[4];
    const View q{query, strides[0], strides[1], strides[2]}, k{key, strides[3], strides[4], strides[5]};
    const View v{value, strides[6], strides[7], strides[8]}, o{result, strides[9], strides[10], strides[11]};
    const long padded = (num_keys + 31) / 32 * 32, lanes = (width + 15) / 16 * 16;
    const long num_pairs = (width + 1) / 2 * padded, room = num_pairs + padded / 2 * lanes;
    const long tiles = (queries + ROWS - 1) / ROWS;
    const float in_twos = scale * 1.4426950408889634f;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for
        for (long n = 0; n < batch * heads; n++) {
            uint32_t* to = packed + n * room;
            pack_keys(k.at(n / heads, n % heads, 0), k.token, num_keys, padded, width, to);
            pack_values(v.at(n / heads, n % heads, 0), v.token, num_keys, padded, width, lanes, to + num_pairs);
        }
#pragma omp for
        for (long n = 0; n < batch * heads * tiles; n++) {
            const long b = n / tiles / heads, h = n / tiles % heads, i = n % tiles * ROWS;
            const uint32_t* from = packed + n / tiles * room;
            attend(q.at(b, h, i), q.token, o.at(b, h, i), o.token, (int)std::min<long>(ROWS, queries - i), in_twos,
                   width, from, from + num_pairs, num_keys, padded, lanes);
        }
    }
}
