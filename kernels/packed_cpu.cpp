// Products with packed weights on CPUs, the C++ twin of kernels/spqr.py, grouped.py and bcq.py: every weight is decoded
// to the very fp32 value of the torch definition and used at once, so that only packed bytes cross the memory bus.
// Neighbouring rows lie beside each other in all packed tensors: a vector holds LANES rows of one column.
//
// kernels/native.py compiles this once per scheme, whose numbers are macros: SPQR (0: grouped), BITS, GROUP (0: a whole
// row), SCALE_BITS, ZERO_BITS (0: none stored), STAT_GROUP, BFLOAT (16-bit floats are bfloat16, not half). With BCQ
// codes are bit planes; then KIND says what is stored of a group (0: floats, 1: codes, 2: an even grid), and LOOKUP how
// few tokens are multiplied: 4 or 8 columns at a time by a table of the sums of plus or minus x, or 0, weight by weight.

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef BCQ
#define BCQ 0
#endif
#if BCQ && LOOKUP && (defined(__AVX2__) || defined(__AVX512F__)) && GROUP % LOOKUP == 0
#define TABLES 1
#else
#define TABLES 0
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int CHUNK = 32, OUTLIER_BLOCK = 256;
constexpr int TOKENS = 16, TILES = 64;  // taken together
constexpr int FEW = 4;                  // tokens up to which tables beat weights

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));

#define ALWAYS __attribute__((always_inline))  // a call would spill the vectors
#define INLINE inline ALWAYS

// As kernels/native.py declares it; a pointer that an operation does not use is null.
struct Weight {
    int64_t rows, columns, perm_wide;
    const uint32_t* codes;         // [C, BITS, O]
    const uint16_t* scale;         // grouped, bcq of KIND 2: [G, O]; bcq of KIND 0: [G, BITS, O]
    const uint8_t* scale_codes;    // spqr: [G, ceil(O / 8) * SCALE_BITS]; bcq: [G, BITS, O]
    const uint8_t* zero_codes;     // [G, ceil(O / 8) * ZERO_BITS]; bcq: [G, O]
    const uint16_t* stat;          // spqr: [G, ceil(O / STAT_GROUP), 4]; bcq: [2, O]
    const void* perm;              // [I], uint16, or int32 if perm_wide
    const uint8_t* outlier_count;  // [ceil(I / 256), O]
    const int32_t* outlier_start;  // [ceil(I / 256), ceil(O / LANES)]: the first of a block's and a tile's
    const uint8_t* outlier_column; // [N]
    const uint16_t* outlier_value; // [N]
    const uint16_t* offset;        // bcq: [G, O]
};

static INLINE int lanes_of(const Weight& w, int64_t tile) {
    return w.rows - tile * LANES < LANES ? w.rows - tile * LANES : LANES;
}

extern "C" int64_t acc_lanes() { return LANES; }

static INLINE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <bool bfloat>
static INLINE float widen(uint16_t half) {
    if (bfloat) return bits_to_float((uint32_t)half << 16);
    // 2^112 moves the exponent from half's bias to float's, and makes subnormal halves right as well
    return bits_to_float((uint32_t)(half & 0x8000) << 16 | (uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
}

static INLINE vf widen(vu half) {
    if (BFLOAT) return (vf)(half << 16);
    return (vf)((half & 0x8000) << 16 | (half & 0x7fff) << 13) * 0x1p112f;
}

static INLINE vh narrow(vf value) {  // to bfloat16, to nearest even
    vu bits = (vu)value;
    vu near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(value == value ? near : vu{} + 0x7fc0, vh);
}

template <class T>
static INLINE T load(const void* from, int lanes) {
    T value{};
    if (lanes == LANES) std::memcpy(&value, from, sizeof(T));
    else std::memcpy(&value, from, sizeof(T) / LANES * lanes);
    return value;
}

template <class T>
static INLINE void store(void* to, T value, int lanes) {
    if (lanes == LANES) std::memcpy(to, &value, sizeof(T));
    else std::memcpy(to, &value, sizeof(T) / LANES * lanes);
}

// The codes of eight rows, `bits` bytes of a bit stream. Byte by byte: a short copy would be read before it is written.
template <int bits>
static INLINE uint64_t eight(const uint8_t* from) {
    uint64_t value = 0;
    for (int i = 0; i < bits; i++) value |= (uint64_t)from[i] << 8 * i;
    return value;
}

alignas(64) static const int32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Codes of LANES rows, the first of which is a multiple of 8, from a bit stream.
template <int bits>
static INLINE vf stream(const uint8_t* from, int lanes) {
    vi lane = load<vi>(LANE, LANES);
    vu code{};
    for (int part = 0; part < LANES / 8 && 8 * part < lanes; part++) {
        uint64_t word = eight<bits>(from + part * bits);
        vu here = vu{} + (uint32_t)word;
        if (bits > 4) here = (lane & 4) != 0 ? vu{} + (uint32_t)(word >> 4 * bits) : here;  // 32 bits hold but four
        code = part == 0 ? here : lane >= 8 ? here : code;
    }
    code = code >> (vu)((lane & (bits > 4 ? 3 : 7)) * bits) & ((1u << bits) - 1);
    return __builtin_convertvector((vi)code, vf);
}

#if BCQ

static INLINE vf floats(const uint16_t* from, int lanes) {
    return widen(__builtin_convertvector(load<vh>(from, lanes), vu));
}

static INLINE vf bytes(const uint8_t* from, int lanes) {
    return __builtin_convertvector(__builtin_convertvector(load<vb>(from, lanes), vi), vf);
}

// What LANES rows have for a group of columns: the scale of each plane, the offset, and what both are multiplied by.
struct Group {
    vf scale[BITS], offset, step;
};

static INLINE Group group_of(const Weight& w, int64_t group, int64_t row, int lanes) {
    Group g;
    int64_t at = group * w.rows + row;
    g.step = vf{} + 1;
    for (int b = 0; b < BITS; b++) {
        int64_t plane = (group * BITS + b) * w.rows + row;
        if (KIND == 0) g.scale[b] = floats(w.scale + plane, lanes);
        if (KIND == 1) g.scale[b] = bytes(w.scale_codes + plane, lanes) * floats(w.stat + row, lanes);
        if (KIND == 2) g.scale[b] = vf{} + (b < BITS - 1 ? (float)(1 << (BITS - 1 - b)) / 2 : 0.5f);
    }
    if (KIND == 1) {
        g.offset = (bytes(w.zero_codes + at, lanes) - 128) * floats(w.stat + w.rows + row, lanes);
        asm("" : "+m"(g.offset));  // rounded here: no part of a fused multiply-add with the first plane
    } else {
        g.offset = floats(w.offset + at, lanes);
    }
    if (KIND == 2) g.step = floats(w.scale + at, lanes);
    return g;
}

// Scale and zero point of LANES rows in a group of columns.
#elif SPQR
static INLINE void statistics(const Weight& w, int64_t group, int64_t row, int lanes, vf& scale, vf& zero) {
    int64_t eights = group * ((w.rows + 7) / 8) + row / 8;
    scale = stream<SCALE_BITS>(w.scale_codes + eights * SCALE_BITS, lanes);
    zero = stream<ZERO_BITS>(w.zero_codes + eights * ZERO_BITS, lanes);
    const uint16_t* stat = w.stat + group * ((w.rows + STAT_GROUP - 1) / STAT_GROUP) * 4;
    if (STAT_GROUP % LANES == 0) {
        const uint16_t* s = stat + row / STAT_GROUP * 4;
        scale = widen<BFLOAT>(s[0]) * (scale - widen<BFLOAT>(s[1]));
        zero = widen<BFLOAT>(s[2]) * (zero - widen<BFLOAT>(s[3]));
        return;
    }
    for (int i = 0; i < lanes; i++) {
        const uint16_t* s = stat + (row + i) / STAT_GROUP * 4;
        scale[i] = widen<BFLOAT>(s[0]) * (scale[i] - widen<BFLOAT>(s[1]));
        zero[i] = widen<BFLOAT>(s[2]) * (zero[i] - widen<BFLOAT>(s[3]));
    }
}
#else
static INLINE void statistics(const Weight& w, int64_t group, int64_t row, int lanes, vf& scale, vf& zero) {
    scale = widen(__builtin_convertvector(load<vh>(w.scale + group * w.rows + row, lanes), vu));
    zero = vf{} + (float)(1 << (BITS - 1));
    if (ZERO_BITS) zero = stream<ZERO_BITS>(w.zero_codes + (group * ((w.rows + 7) / 8) + row / 8) * ZERO_BITS, lanes);
}
#endif

template <class F, int... N>
static INLINE void each(F f, std::integer_sequence<int, N...>) {
    (f(std::integral_constant<int, N>{}), ...);
}

// Whether a group begins at column j of a chunk.
static INLINE bool begins(int64_t chunk, int j) {
    constexpr int64_t size = GROUP ? GROUP : INT32_MAX;
    if (CHUNK % size == 0) return j % size == 0;  // known at compile time
    if (size % CHUNK == 0 && j != 0) return false;
    return (chunk * CHUNK + j) % size == 0;
}

#if BCQ

// Hands the 32 columns of a chunk, for LANES rows, to `use(column within the chunk, weights)`.
template <class Use>
static INLINE void decode(const Weight& w, int64_t chunk, int64_t row, int lanes, Use use) {
    int64_t group = GROUP ? chunk * CHUNK / GROUP : 0;
    Group g = group_of(w, group, row, lanes);
    vu clear[BITS];  // a bit is set where it was not: there the scale is taken away
    const uint32_t* from = w.codes + chunk * BITS * w.rows + row;
    for (int b = 0; b < BITS; b++) clear[b] = ~load<vu>(from + b * w.rows, lanes);
    each([&](auto p) ALWAYS {
        constexpr int J = decltype(p)::value;
        if (J > 0 && begins(chunk, J) && chunk * CHUNK + J < w.columns) g = group_of(w, ++group, row, lanes);
        vf weight = g.offset;
        for (int b = 0; b < BITS; b++) weight += (vf)((vu)g.scale[b] ^ (clear[b] << (31 - J) & 0x80000000u));
        use(J, KIND == 2 ? weight * g.step : weight);
    }, std::make_integer_sequence<int, CHUNK>{});
}

#else

// The low and the high half of pair P of a chunk, as kernels/packing.py lays them.
template <int P>
static INLINE void pair(const vu* words, vu& low, vu& high) {
    constexpr int whole = 16 / BITS, rest = 16 % BITS;
    if constexpr (P < whole * BITS) {
        low = words[P / whole] >> BITS * (P % whole) & ((1u << BITS) - 1);
        high = words[P / whole] >> (16 + BITS * (P % whole)) & ((1u << BITS) - 1);
    } else {
        constexpr int first = (P - whole * BITS) * BITS;
        low = high = vu{};
        for (int done = 0; done < BITS;) {
            int word = (first + done) / rest, offset = (first + done) % rest;
            int width = BITS - done < rest - offset ? BITS - done : rest - offset;
            low |= (words[word] >> (BITS * whole + offset) & ((1u << width) - 1)) << done;
            high |= (words[word] >> (16 + BITS * whole + offset) & ((1u << width) - 1)) << done;
            done += width;
        }
    }
}

// Hands the 32 columns of a chunk, for LANES rows, to `use(column within the chunk, weights)`.
template <class Use>
static INLINE void decode(const Weight& w, int64_t chunk, int64_t row, int lanes, Use use) {
    vf scale, zero;
    int64_t group = GROUP ? chunk * CHUNK / GROUP : 0;
    statistics(w, group, row, lanes, scale, zero);
    vu words[BITS];
    const uint32_t* from = w.codes + chunk * BITS * w.rows + row;
    for (int b = 0; b < BITS; b++) words[b] = load<vu>(from + b * w.rows, lanes);
    each([&](auto p) ALWAYS {
        constexpr int P = decltype(p)::value;
        vu half[2];
        pair<P>(words, half[0], half[1]);
        for (int h = 0; h < 2; h++) {
            int j = 2 * P + h;
            if (j > 0 && begins(chunk, j) && chunk * CHUNK + j < w.columns)
                statistics(w, ++group, row, lanes, scale, zero);
            use(j, (__builtin_convertvector((vi)half[h], vf) - zero) * scale);
        }
    }, std::make_integer_sequence<int, 16>{});
}

#endif

#if TABLES

constexpr int ENTRIES = 1 << LOOKUP, PER_CHUNK = CHUNK / LOOKUP;
constexpr int TOGETHER = GROUP && GROUP % CHUNK == 0 && GROUP <= 4 * CHUNK ? GROUP / CHUNK : 1;  // chunks of one group

// For every LOOKUP columns of x [padded] the sums of plus or minus x, by the bits of a plane, and x's own sum per chunk.
static void tabulate(const float* x, int64_t padded, float* tables, float* chunk_sums) {
    for (int64_t j = 0; j < padded; j += LOOKUP) {
        float* table = tables + j / LOOKUP * ENTRIES;
        table[0] = 0;
        for (int s = 0; s < LOOKUP; s++) table[0] -= x[j + s];
        for (int s = 0; s < LOOKUP; s++)
            for (int i = 0; i < 1 << s; i++) table[i + (1 << s)] = table[i] + 2 * x[j + s];
    }
    for (int64_t c = 0; c < padded / CHUNK; c++) {
        chunk_sums[c] = 0;
        for (int j = 0; j < CHUNK; j++) chunk_sums[c] += x[c * CHUNK + j];
    }
}

// What the lowest LOOKUP bits of each lane find in a table.
static INLINE vf look_up(const float* table, vu at) {
#if LOOKUP == 4 && defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(table));
#elif LOOKUP == 4
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)at);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)at);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(at << 28));
#elif defined(__AVX512F__)
    return (vf)_mm512_i32gather_ps((__m512i)(at & (ENTRIES - 1)), table, 4);
#else
    return (vf)_mm256_i32gather_ps(table, (__m256i)(at & (ENTRIES - 1)), 4);
#endif
}

// As `product`, with tables [T, padded / LOOKUP, ENTRIES] and sums of chunks [T, padded / CHUNK] instead of x.
static void product_by_tables(
    const Weight& w, const float* tables, const float* chunk_sums, int64_t padded, int T, int64_t first, int64_t last,
    vf* sums
) {
    int64_t chunks = padded / CHUNK;
    for (int64_t i = 0; i < (last - first) * T; i++) sums[i] = vf{};
    for (int64_t begin = 0; begin < chunks; begin += TOGETHER)
        for (int64_t tile = first; tile < last; tile++)
            for (int t = 0; t < T; t++) {
                int lanes = lanes_of(w, tile);
                int64_t row = tile * LANES, group = GROUP ? begin * CHUNK / GROUP : 0;
                vf part[BITS] = {}, sum = sums[(tile - first) * T + t];
                float whole = 0;
                auto finish = [&]() ALWAYS {  // a group
                    Group g = group_of(w, group, row, lanes);
                    vf own = g.offset * whole;
                    for (int b = 0; b < BITS; b++) own += g.scale[b] * part[b], part[b] = vf{};
                    sum += KIND == 2 ? own * g.step : own;
                    whole = 0, group++;
                };
                for (int64_t chunk = begin; chunk < begin + TOGETHER && chunk < chunks; chunk++) {
                    vu words[BITS];
                    const uint32_t* from = w.codes + chunk * BITS * w.rows + row;
                    for (int b = 0; b < BITS; b++) words[b] = load<vu>(from + b * w.rows, lanes);
                    const float* table = tables + (t * chunks + chunk) * PER_CHUNK * ENTRIES;
                    constexpr bool within = GROUP && GROUP % CHUNK != 0;  // groups may begin within a chunk
                    if (!within) whole += chunk_sums[t * chunks + chunk];
                    each([&](auto p) ALWAYS {
                        constexpr int N = decltype(p)::value;
                        if (within && N > 0 && begins(chunk, N * LOOKUP) && chunk * CHUNK + N * LOOKUP < w.columns) finish();
                        for (int b = 0; b < BITS; b++) part[b] += look_up(table + N * ENTRIES, words[b] >> (N * LOOKUP));
                        if (within) whole += table[N * ENTRIES + ENTRIES - 1];
                    }, std::make_integer_sequence<int, PER_CHUNK>{});
                }
                finish();
                sums[(tile - first) * T + t] = sum;
            }
}

#endif

// `use(lane, column, value)` for every outlier of a tile in a block of columns.
template <class Use>
static INLINE void outliers(const Weight& w, int64_t block, int64_t tile, int lanes, Use use) {
    int64_t at = w.outlier_start[block * ((w.rows + LANES - 1) / LANES) + tile];
    int64_t width = w.columns - block * OUTLIER_BLOCK;
    const uint8_t* counts = w.outlier_count + block * w.rows + tile * LANES;
    for (int i = 0; i < lanes; i++) {
        int64_t count = counts[i];
        if (count == 255) count = width < OUTLIER_BLOCK ? width : OUTLIER_BLOCK;
        for (int64_t end = at + count; at < end; at++)
            use(i, w.outlier_column[at], widen<BFLOAT>(w.outlier_value[at]));
    }
}

// x [T, padded] in fp32 and packed order, T 1 or a multiple of 4 up to TOKENS -> sums [last - first, T, LANES] of tiles
// of rows. Columns are the outer loop: then memory is read in long runs, which processors fetch ahead (2.5 times as fast as row by row).
static void product(const Weight& w, const float* x, int64_t padded, int T, int64_t first, int64_t last, vf* sums) {
    for (int64_t i = 0; i < (last - first) * T; i++) sums[i] = vf{};
    for (int64_t chunk = 0; chunk < padded / CHUNK; chunk++) {
        const float* here = x + chunk * CHUNK;
        for (int64_t tile = first; tile < last; tile++) {
            vf* sum = sums + (tile - first) * T;
            if (T == 1) {
                vf part[2] = {};
                decode(w, chunk, tile * LANES, lanes_of(w, tile),
                    [&](int j, vf weight) ALWAYS { part[j % 2] += weight * here[j]; });
                sum[0] += part[0] + part[1];
                continue;
            }
            vf column[CHUNK];
            decode(w, chunk, tile * LANES, lanes_of(w, tile), [&](int j, vf weight) ALWAYS { column[j] = weight; });
            for (int t = 0; t < T; t += 4) {
                const float* at = here + t * padded;
                vf a{}, b{}, c{}, d{};
                for (int j = 0; j < CHUNK; j++) {
                    a += column[j] * at[j];
                    b += column[j] * at[j + padded];
                    c += column[j] * at[j + 2 * padded];
                    d += column[j] * at[j + 3 * padded];
                }
                sum[t] += a, sum[t + 1] += b, sum[t + 2] += c, sum[t + 3] += d;
            }
        }
    }
    if (w.outlier_count == nullptr) return;
    for (int64_t block = 0; block * OUTLIER_BLOCK < w.columns; block++)
        for (int64_t tile = first; tile < last; tile++)
            outliers(w, block, tile, lanes_of(w, tile), [&](int lane, int column, float value) ALWAYS {
                const float* at = x + block * OUTLIER_BLOCK + column;
                float* sum = (float*)(sums + (tile - first) * T) + lane;
                for (int t = 0; t < T; t++) sum[t * LANES] += value * at[t * padded];
            });
}

// The weights of one tile of rows, in packed order, to out [I, O]
static void transpose(const Weight& w, int64_t tile, void* out, bool narrowed) {
    int lanes = lanes_of(w, tile);
    vf column[OUTLIER_BLOCK];
    for (int64_t block = 0, start = 0; start < w.columns; block++, start += OUTLIER_BLOCK) {
        int64_t width = w.columns - start < OUTLIER_BLOCK ? w.columns - start : OUTLIER_BLOCK;
        for (int64_t at = 0; at < width; at += CHUNK)
            decode(w, (start + at) / CHUNK, tile * LANES, lanes,
                [&](int j, vf weight) ALWAYS { column[at + j] = weight; });
        if (w.outlier_count != nullptr)
            outliers(w, block, tile, lanes,
                [&](int lane, int j, float value) ALWAYS { ((float*)(column + j))[lane] += value; });
        for (int64_t j = 0; j < width; j++) {
            int64_t to = (start + j) * w.rows + tile * LANES;
            if (narrowed) store((uint16_t*)out + to, narrow(column[j]), lanes);
            else store((float*)out + to, column[j], lanes);
        }
    }
}

// x [T, I] -> y [T, O], both bfloat16 if `narrowed`, else fp32; T <= TOKENS
extern "C" void acc_product(const Weight* weight, const void* x, void* y, int64_t T, int64_t narrowed, int64_t threads) {
    const Weight& w = *weight;
    int64_t padded = (w.columns + CHUNK - 1) / CHUNK * CHUNK, tiles = (w.rows + LANES - 1) / LANES;
    int64_t fours = T == 1 ? 1 : (T + 3) / 4 * 4;
    static thread_local std::vector<float> scratch;
    scratch.assign(fours * padded, 0.0f);
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = 0; j < w.columns; j++) {
            int64_t from = j;
            if (w.perm != nullptr) from = w.perm_wide ? ((const int32_t*)w.perm)[j] : ((const uint16_t*)w.perm)[j];
            from += t * w.columns;
            scratch[t * padded + j] = narrowed ? widen<true>(((const uint16_t*)x)[from]) : ((const float*)x)[from];
        }
    const float* ready = scratch.data();
#if TABLES
    static thread_local std::vector<float> tables, chunk_sums;
    bool tabulated = T <= FEW;
    if (tabulated) {
        fours = T;
        tables.resize(T * (padded / LOOKUP) * ENTRIES), chunk_sums.resize(T * (padded / CHUNK));
        for (int64_t t = 0; t < T; t++)
            tabulate(ready + t * padded, padded, tables.data() + t * (padded / LOOKUP) * ENTRIES, chunk_sums.data() + t * (padded / CHUNK));
    }
    const float *ready_tables = tables.data(), *ready_sums = chunk_sums.data();
#endif
    int64_t share = (tiles + threads - 1) / threads;
    if (share > TILES) share = TILES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < tiles; first += share) {
        int64_t last = first + share < tiles ? first + share : tiles;
        vf sums[TILES * TOKENS];
#if TABLES
        if (tabulated) product_by_tables(w, ready_tables, ready_sums, padded, fours, first, last, sums);
        else
#endif
        product(w, ready, padded, fours, first, last, sums);
        for (int64_t tile = first; tile < last; tile++)
            for (int64_t t = 0; t < T; t++) {
                vf sum = sums[(tile - first) * fours + t];
                int64_t to = t * w.rows + tile * LANES;
                if (narrowed) store((uint16_t*)y + to, narrow(sum), lanes_of(w, tile));
                else store((float*)y + to, sum, lanes_of(w, tile));
            }
    }
}

// out [I, O], bfloat16 if `narrowed`, else fp32: the weight's transpose, columns in packed order
extern "C" void acc_weight(const Weight* weight, void* out, int64_t narrowed, int64_t threads) {
    const Weight& w = *weight;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < (w.rows + LANES - 1) / LANES; tile++) transpose(w, tile, out, narrowed);
}
