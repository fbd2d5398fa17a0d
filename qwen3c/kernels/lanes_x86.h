/* The lower half of the tree of f32_sum_lanes and its like (scalar.c): 8 lanes, 4, 2, 1. */
#include <immintrin.h>

static inline float sum_of_8(__m256 a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

static inline float max_of_8(__m256 a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

static inline float max_magnitude_of_8(__m256i a) {
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi32(b, _mm_unpackhi_epi64(b, b));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(b, _mm_srli_epi64(b, 32))));
}
