/* The two loops of this package in which a CPU spends most of its time outside the network: the
 * classification loss with its gradient, and finding the best boxes among the network's outputs.
 *
 * Plain C, called through ctypes on the data pointers of tensors: no header of Python or torch is
 * needed, and one build serves all of their versions. __init__.py says what each function takes;
 * the pure torch code beside each of its callers is the definition.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define X86 1
#else
#define X86 0
#endif

#ifdef _MSC_VER
#define EXPORT __declspec(dllexport)
#define INLINE __forceinline
#define restrict __restrict
#define SIMD
#define SIMD_SUM(variable)
#define SIMD_OR(variable)
#else
#define EXPORT __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(variable) PRAGMA(omp simd reduction(+ : variable))
#define SIMD_OR(variable) PRAGMA(omp simd reduction(| : variable))
#endif

/* The checksum of the sources, from setup.py: a library of other sources is not used. */
#ifndef VERSION
#define VERSION 0
#endif

/* Elements summed in float32 before the sum goes into a float64: a longer float32 sum rounds more. */
#define SUM_BLOCK 256

enum { CROSS_ENTROPY, FOCAL_1, FOCAL_2, FOCAL, STAR };

typedef double (*Curve)(
    const float *, const float *, float *, int, float gamma, float beta, float inverse, float shift
);

typedef struct {
    Curve curves[5];
    void (*widen)(const uint16_t *, float *, int);
    void (*narrow)(const float *, uint16_t *, int);
    int (*any_over)(const float *, int, float);
    int (*any_over_bf16)(const uint16_t *, int, float);
    int (*overlaps)(
        const float *, const float *, const float *, const float *, const float *, int,
        const float *, float, float
    );
} Level;

static INLINE int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static INLINE float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define NAMED(name) name##_baseline
#define TARGET
#if defined(__ARM_FEATURE_FMA) || defined(__FMA__)
#define FUSED 1
#else
#define FUSED 0
#endif
#include "kernels.h"

#if X86 && defined(__GNUC__)
#define NAMED(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define FUSED 1
#include "kernels.h"

#define NAMED(name) name##_avx512
#ifdef __clang__
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"), min_vector_width(512)))
#else
#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#define FUSED 1
#include "kernels.h"

static const Level *const levels[] = {&level_baseline, &level_avx2, &level_avx512};
#else
static const Level *const levels[] = {&level_baseline};
#endif

EXPORT uint32_t retinanet_version(void) { return VERSION; }

/* The highest level that this processor has: 0 baseline, 1 AVX2 with FMA, 2 AVX-512. */
EXPORT int retinanet_level(void) {
#if X86 && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Whether more than one thread can work. */
EXPORT int retinanet_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* --- the classification loss --------------------------------------------------------------- */

/* Elements worked on at a time, so that four arrays of them stay in the first cache. */
#define PIECE 1024

/* To memory past the caches: nobody reads it soon, and a line need not be read to be written. */
static void copy_past_caches(void *to, const void *from, size_t bytes) {
#if X86
    char *out = to;
    const char *in = from;
    size_t ahead = (size_t)(-(intptr_t)out & 15);
    if (ahead > bytes) ahead = bytes;
    memcpy(out, in, ahead);
    size_t at = ahead;
    for (; at + 16 <= bytes; at += 16)
        _mm_stream_si128((__m128i *)(out + at), _mm_loadu_si128((const __m128i *)(in + at)));
    memcpy(out + at, in + at, bytes - at);
#else
    memcpy(to, from, bytes);
#endif
}

typedef struct {
    const Level *level;
    const void *logits;
    const int64_t *labels;
    const float *weights;
    const float *positive;
    const float *negative;
    void *gradient;
    int64_t rows, classes;
    int narrow, per_class, past_caches, curve;
    float gamma, beta, inverse, shift;
} LossTask;

typedef struct {
    float weights[PIECE], slopes[PIECE], logits[PIECE];
    float own_logits[PIECE], own_weights[PIECE], own_slopes[PIECE];
    int own_places[PIECE];
    uint16_t narrow[PIECE];
    /* What `weights` holds: `rows` whole rows, all of weight `weight`; none if rows is 0. */
    float weight;
    int64_t rows;
} LossScratch;

/* The loss of rows [row, row + rows), classes [from, to); more than one row only with all classes. */
static double loss_of_piece(
    const LossTask *task, LossScratch *scratch, int64_t row, int64_t rows, int64_t from, int64_t to
) {
    const Level *level = task->level;
    int64_t columns = to - from, start = row * task->classes + from;
    int count = (int)(rows * columns);
    float *weights = scratch->weights;

    const float *logits = scratch->logits;
    if (task->narrow)
        level->widen((const uint16_t *)task->logits + start, scratch->logits, count);
    else
        logits = (const float *)task->logits + start;

    /* Nearly all rows are of one weight: what the last piece needed will do again. */
    const float *row_weights = task->weights + row;
    int same = 1;
    for (int64_t i = 1; i < rows; i++) same &= row_weights[i] == row_weights[0];
    if (!(same && columns == task->classes && rows <= scratch->rows &&
          row_weights[0] == scratch->weight)) {
        for (int64_t i = 0; i < rows; i++) {
            float weight = row_weights[i];
            float *of_row = weights + i * columns;
            if (task->per_class)
                for (int64_t k = 0; k < columns; k++) of_row[k] = weight * task->negative[from + k];
            else
                for (int64_t k = 0; k < columns; k++) of_row[k] = weight * task->negative[0];
        }
        scratch->rows = same && columns == task->classes ? rows : 0;
        scratch->weight = row_weights[0];
    }

    /* All elements are taken for negatives but the one class of each row that has a class. */
    int positives = 0;
    for (int64_t i = 0; i < rows; i++) {
        int64_t label = task->labels[row + i];
        if (label < from || label >= to) continue;
        int place = (int)(i * columns + label - from);
        scratch->own_places[positives] = place;
        scratch->own_logits[positives] = -logits[place];
        scratch->own_weights[positives] =
            row_weights[i] * task->positive[task->per_class ? label : 0];
        weights[place] = 0.0f;
        positives++;
    }
    Curve curve = level->curves[task->curve];
    double loss = curve(
        logits, weights, scratch->slopes, count, task->gamma, task->beta, task->inverse, task->shift
    );
    if (positives) {
        loss += curve(
            scratch->own_logits, scratch->own_weights, scratch->own_slopes, positives, task->gamma,
            task->beta, task->inverse, task->shift
        );
        for (int i = 0; i < positives; i++)
            scratch->slopes[scratch->own_places[i]] = -scratch->own_slopes[i];
        scratch->rows = 0;
    }

    if (task->gradient) {
        const void *slopes = scratch->slopes;
        size_t size = sizeof(float);
        if (task->narrow) {
            level->narrow(scratch->slopes, scratch->narrow, count);
            slopes = scratch->narrow;
            size = sizeof(uint16_t);
        }
        char *to_memory = (char *)task->gradient + (size_t)start * size;
        if (task->past_caches)
            copy_past_caches(to_memory, slopes, (size_t)count * size);
        else
            memcpy(to_memory, slopes, (size_t)count * size);
    }
    return loss;
}

/* How many partial sums a loss of this shape has. */
EXPORT int64_t retinanet_loss_pieces(int64_t rows, int64_t classes) {
    if (classes > PIECE) return rows * ((classes + PIECE - 1) / PIECE);
    int64_t step = PIECE / classes;
    return (rows + step - 1) / step;
}

/* Fills partial[retinanet_loss_pieces()]; they do not depend on the number of threads. */
EXPORT void retinanet_loss(
    int level, int threads, int narrow, const void *logits, const int64_t *labels,
    const float *weights, const float *positive, const float *negative, int per_class,
    int64_t rows, int64_t classes, int curve, float gamma, float beta, float shift, void *gradient,
    int past_caches, double *partial
) {
    LossTask task = {
        levels[level], logits, labels, weights, positive, negative, gradient, rows, classes,
        narrow, per_class, past_caches, curve, gamma, beta,
        curve == STAR ? 1.0f / gamma : 1.0f, shift
    };
    int64_t pieces = retinanet_loss_pieces(rows, classes);
    int64_t step = classes > PIECE ? 1 : PIECE / classes;
    int64_t a_row = classes > PIECE ? (classes + PIECE - 1) / PIECE : 1;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
        LossScratch scratch;
        scratch.rows = 0;
        int64_t piece;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (piece = 0; piece < pieces; piece++) {
            int64_t row = piece / a_row * step;
            int64_t many = rows - row < step ? rows - row : step;
            int64_t from = piece % a_row * PIECE;
            int64_t to = a_row == 1 || classes - from < PIECE ? classes : from + PIECE;
            partial[piece] = loss_of_piece(&task, &scratch, row, many, from, to);
        }
#if X86
        if (past_caches) _mm_sfence();
#endif
    }
}

/* --- sorting ------------------------------------------------------------------------------- */

/* Keys sort by falling value, then by rising place; no two are equal. */
static uint64_t key_of(float value, uint32_t place) {
    uint32_t bits = (uint32_t)bits_of(value + 0.0f); /* -0 becomes 0, its equal */
    uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)(~rising) << 32 | place;
}

static float value_of(uint64_t key) {
    uint32_t rising = ~(uint32_t)(key >> 32);
    return float_of((int32_t)(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising));
}

/* Sorts keys; `spare` has as many places. */
static void sort_keys(uint64_t *keys, uint64_t *spare, int64_t count) {
    const int64_t run = 16;
    for (int64_t start = 0; start < count; start += run) {
        int64_t end = start + run < count ? start + run : count;
        for (int64_t i = start + 1; i < end; i++) {
            uint64_t key = keys[i];
            int64_t j = i;
            for (; j > start && keys[j - 1] > key; j--) keys[j] = keys[j - 1];
            keys[j] = key;
        }
    }
    uint64_t *from = keys, *to = spare;
    for (int64_t width = run; width < count; width *= 2) {
        for (int64_t start = 0; start < count; start += 2 * width) {
            int64_t middle = start + width < count ? start + width : count;
            int64_t end = start + 2 * width < count ? start + 2 * width : count;
            int64_t left = start, right = middle;
            for (int64_t i = start; i < end; i++) {
                int take_left = left < middle && (right >= end || from[left] < from[right]);
                to[i] = from[take_left ? left : right];
                left += take_left;
                right += !take_left;
            }
        }
        uint64_t *swapped = from;
        from = to;
        to = swapped;
    }
    if (from != keys) memcpy(keys, from, (size_t)count * sizeof *keys);
}

/* Brings the `most` smallest keys to the front, the greatest of them last. */
static void select_keys(uint64_t *keys, int64_t count, int64_t most) {
    int64_t low = 0, high = count - 1, wanted = most - 1;
    uint64_t state = 0x9e3779b97f4a7c15u;
    while (low < high) {
        /* A random pivot: no order of the keys is a bad one. */
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        uint64_t pivot = keys[low + (int64_t)(state % (uint64_t)(high - low + 1))];
        int64_t i = low, j = high;
        while (i <= j) {
            while (keys[i] < pivot) i++;
            while (keys[j] > pivot) j--;
            if (i <= j) {
                uint64_t swapped = keys[i];
                keys[i++] = keys[j];
                keys[j--] = swapped;
            }
        }
        if (wanted <= j)
            high = j;
        else if (wanted >= i)
            low = i;
        else
            return;
    }
}

/* --- the best scores ----------------------------------------------------------------------- */

#define SEGMENT (1 << 18) /* elements that one thread takes at a time */
#define BLOCK 1024
#define SMALL_BLOCK 64

typedef struct {
    uint64_t *keys;
    int64_t count, room;
} Keys;

static int make_room(Keys *keys, int64_t room) {
    if (room <= keys->room) return 1;
    uint64_t *larger = realloc(keys->keys, (size_t)room * sizeof *larger);
    if (!larger) return 0;
    keys->keys = larger;
    keys->room = room;
    return 1;
}

typedef struct {
    int64_t images, levels, classes;
    Keys *best; /* (images, levels) */
} Found;

/* The `most` greatest elements of [start, end) of one image over `least`; 0: no memory. */
static int search_segment(
    const Level *level, int narrow, const void *values, int64_t start, int64_t end, float least,
    int64_t most, Keys *found
) {
    const float *wide = values;
    const uint16_t *half = values;
    int64_t enough = most > INT64_MAX / 4 ? most : 2 * most + SMALL_BLOCK;
    for (int64_t block = start; block < end; block += BLOCK) {
        int64_t block_end = block + BLOCK < end ? block + BLOCK : end;
        int size = (int)(block_end - block);
        if (!(narrow ? level->any_over_bf16(half + block, size, least)
                     : level->any_over(wide + block, size, least)))
            continue;
        for (int64_t small = block; small < block_end; small += SMALL_BLOCK) {
            int count = (int)(small + SMALL_BLOCK < block_end ? SMALL_BLOCK : block_end - small);
            if (!(narrow ? level->any_over_bf16(half + small, count, least)
                         : level->any_over(wide + small, count, least)))
                continue;
            if (found->room - found->count < SMALL_BLOCK) {
                if (found->count + SMALL_BLOCK > enough) {
                    /* What is not among the best so far cannot win, nor can what comes later and
                     * is only as great as the last of them. */
                    select_keys(found->keys, found->count, most);
                    found->count = most;
                    least = value_of(found->keys[most - 1]);
                } else {
                    int64_t room = found->room ? 2 * found->room : 4 * SMALL_BLOCK;
                    if (!make_room(found, room < enough ? room : enough)) return 0;
                }
            }
            uint64_t *keys = found->keys + found->count;
            int added = 0;
            for (int i = 0; i < count; i++) {
                float value = narrow ? float_of((int32_t)((uint32_t)half[small + i] << 16))
                                     : wide[small + i];
                keys[added] = key_of(value, (uint32_t)(small + i));
                added += value > least;
            }
            found->count += added;
        }
    }
    return 1;
}

EXPORT void retinanet_drop(Found *found) {
    if (!found) return;
    for (int64_t i = 0; found->best && i < found->images * found->levels; i++)
        free(found->best[i].keys);
    free(found->best);
    free(found);
}

/* Of logits[l] (images, rows[l], classes) the `most` greatest of each image and level that are over
 * `least`, sorted by falling value, then rising place. Fills counts (images): how many were found.
 * NULL: no memory. */
EXPORT Found *retinanet_find(
    int level, int threads, int narrow, int64_t level_count, const void *const *logits,
    const int64_t *rows, int64_t images, int64_t classes, float least, int64_t most,
    int64_t *counts
) {
    int64_t lists = images * level_count, segments = 0;
    for (int64_t l = 0; l < level_count; l++)
        segments += images * ((rows[l] * classes + SEGMENT - 1) / SEGMENT);
    Found *found = calloc(1, sizeof *found);
    Keys *parts = calloc((size_t)segments + 1, sizeof *parts);
    int64_t *starts = malloc((size_t)(lists + 1) * sizeof *starts);
    if (found) {
        found->images = images;
        found->levels = level_count;
        found->classes = classes;
        found->best = calloc((size_t)lists + 1, sizeof *found->best);
    }
    int failed = !found || !found->best || !parts || !starts;
    if (!failed) {
        starts[0] = 0;
        for (int64_t list = 0; list < lists; list++) {
            int64_t elements = rows[list % level_count] * classes;
            starts[list + 1] = starts[list] + (elements + SEGMENT - 1) / SEGMENT;
        }
        (void)threads;
        int64_t segment, list;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(| : failed)
#endif
        for (segment = 0; segment < segments; segment++) {
            int64_t own = 0;
            while (starts[own + 1] <= segment) own++;
            int64_t l = own % level_count, elements = rows[l] * classes;
            int64_t start = (segment - starts[own]) * SEGMENT;
            int64_t end = start + SEGMENT < elements ? start + SEGMENT : elements;
            size_t image = (size_t)(own / level_count * elements);
            const char *values = (const char *)logits[l] + image * (narrow ? 2 : 4);
            failed |= !search_segment(
                levels[level], narrow, values, start, end, least, most, parts + segment
            );
        }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(| : failed)
#endif
        for (list = 0; list < lists; list++) {
            Keys *best = found->best + list;
            int64_t total = 0;
            for (int64_t i = starts[list]; i < starts[list + 1]; i++) total += parts[i].count;
            if (!total) continue;
            uint64_t *spare = NULL;
            if (!failed && make_room(best, total)) {
                for (int64_t i = starts[list]; i < starts[list + 1]; i++) {
                    if (!parts[i].count) continue;
                    memcpy(
                        best->keys + best->count, parts[i].keys,
                        (size_t)parts[i].count * sizeof *best->keys
                    );
                    best->count += parts[i].count;
                }
                if (total > most) {
                    select_keys(best->keys, total, most);
                    best->count = most;
                }
                spare = malloc((size_t)best->count * sizeof *spare);
                if (spare) sort_keys(best->keys, spare, best->count);
            }
            failed |= !spare;
            free(spare);
        }
    }
    for (int64_t i = 0; parts && i < segments; i++) free(parts[i].keys);
    free(parts);
    free(starts);
    if (failed) {
        retinanet_drop(found);
        return NULL;
    }
    for (int64_t image = 0; image < images; image++) {
        counts[image] = 0;
        for (int64_t l = 0; l < level_count; l++)
            counts[image] += found->best[image * level_count + l].count;
    }
    return found;
}

/* Writes what was found, image by image, level by level, each list best first: for each its label,
 * its logit, and copies of its row of deltas[l] (images, rows[l], 4) and of anchors[l] (rows[l], 4). */
EXPORT void retinanet_take(
    const Found *found, int narrow, const void *const *deltas, const float *const *anchors,
    const int64_t *rows, int64_t *labels, float *logits, float *own_deltas, float *own_anchors
) {
    int64_t at = 0;
    for (int64_t list = 0; list < found->images * found->levels; list++) {
        int64_t l = list % found->levels, image = list / found->levels;
        for (int64_t i = 0; i < found->best[list].count; i++, at++) {
            uint64_t key = found->best[list].keys[i];
            int64_t place = (int64_t)(key & 0xffffffffu), row = place / found->classes;
            labels[at] = place % found->classes;
            logits[at] = value_of(key);
            int64_t four = (image * rows[l] + row) * 4;
            for (int c = 0; c < 4; c++) {
                own_deltas[4 * at + c] =
                    narrow ? float_of((int32_t)((uint32_t)((const uint16_t *)deltas[l])[four + c] << 16))
                           : ((const float *)deltas[l])[four + c];
                own_anchors[4 * at + c] = anchors[l][row * 4 + c];
            }
        }
    }
}

/* --- non-maximum suppression --------------------------------------------------------------- */

/* Of one image: places of at most `most` survivors, best first, into kept. -1: no memory. */
static int64_t suppress_image(
    const Level *level, const float *boxes, const float *scores, const int64_t *labels,
    int64_t count, int64_t classes, float threshold, int64_t most, int64_t first, int64_t *kept
) {
    if (!count) return 0;
    uint64_t *keys = malloc(2 * (size_t)count * sizeof *keys);
    float *corners = malloc(5 * (size_t)count * sizeof *corners);
    int64_t *starts = calloc(2 * (size_t)classes + 2, sizeof *starts);
    int64_t survivors = -1;
    if (keys && corners && starts) {
        uint64_t *spare = keys + count;
        for (int64_t i = 0; i < count; i++) keys[i] = key_of(scores[i], (uint32_t)i);
        sort_keys(keys, spare, count);
        /* Equal scores go by class, then by place. */
        for (int64_t i = 0; labels && i < count;) {
            int64_t end = i + 1;
            while (end < count && keys[end] >> 32 == keys[i] >> 32) end++;
            if (end - i > 1) {
                for (int64_t j = i; j < end; j++)
                    keys[j] = (uint64_t)labels[keys[j] & 0xffffffffu] << 32 | (keys[j] & 0xffffffffu);
                sort_keys(keys + i, spare, end - i);
            }
            i = end;
        }
        /* The survivors of a class lie together, from starts[class] on; ends[class] is theirs. */
        int64_t *ends = starts + classes + 1;
        for (int64_t i = 0; i < count; i++) starts[(labels ? labels[i] : 0) + 1]++;
        for (int64_t k = 0; k < classes; k++) starts[k + 1] += starts[k];
        memcpy(ends, starts, (size_t)classes * sizeof *ends);
        float *x1 = corners, *y1 = x1 + count, *x2 = y1 + count, *y2 = x2 + count, *areas = y2 + count;
        survivors = 0;
        /* Best first, so that the work ends with the last box that is wanted. */
        for (int64_t i = 0; i < count && survivors < most; i++) {
            int64_t place = (int64_t)(keys[i] & 0xffffffffu), class = labels ? labels[place] : 0;
            const float *box = boxes + 4 * place;
            float area = (box[2] - box[0]) * (box[3] - box[1]);
            int gone = 0;
            for (int64_t j = starts[class]; j < ends[class] && !gone; j += 64) {
                int many = (int)(ends[class] - j < 64 ? ends[class] - j : 64);
                gone = level->overlaps(
                    x1 + j, y1 + j, x2 + j, y2 + j, areas + j, many, box, area, threshold
                );
            }
            if (gone) continue;
            int64_t at = ends[class]++;
            x1[at] = box[0];
            y1[at] = box[1];
            x2[at] = box[2];
            y2[at] = box[3];
            areas[at] = area;
            kept[survivors++] = first + place;
        }
    }
    free(keys);
    free(corners);
    free(starts);
    return survivors;
}

/* Boxes of image i are offsets[i] to offsets[i + 1]; its survivors are written from
 * kept[offsets[i]] on, and their number to counts[i]. 0: no memory. */
EXPORT int retinanet_suppress(
    int level, int threads, const float *boxes, const float *scores, const int64_t *labels,
    const int64_t *offsets, int64_t images, int64_t classes, double threshold, int64_t most,
    int64_t *kept, int64_t *counts
) {
    /* An IoU is over the threshold if it is over the greatest float32 that is not. */
    float bound = (float)threshold;
    if ((double)bound > threshold) bound = nextafterf(bound, -1.0f);
    int failed = 0;
    (void)threads;
    int64_t i;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(| : failed)
#endif
    for (i = 0; i < images; i++) {
        int64_t first = offsets[i];
        counts[i] = suppress_image(
            levels[level], boxes + 4 * first, scores + first, labels ? labels + first : NULL,
            offsets[i + 1] - first, labels ? classes : 1, bound, most, first, kept + first
        );
        failed |= counts[i] < 0;
    }
    return !failed;
}
