/* The classification loss with its gradient, and non-maximum suppression, on a CPU.
 *
 * Plain C, called through ctypes on the data pointers of tensors: it needs no headers of Python or
 * torch, and a build works with all of their versions. native.py documents the arguments; the torch
 * code next to each caller is the definition.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define LEVELS 1
#else
#define LEVELS 0
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

typedef double (*Curve)(const float *, const float *, float *, int, float gamma, float beta);

typedef struct {
    Curve curves[5];
    void (*widen)(const uint16_t *, float *, int);
    void (*narrow)(const float *, uint16_t *, int);
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

#if LEVELS
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

/* The highest level of this processor: 0 baseline, 1 AVX2 with FMA, 2 AVX-512. */
EXPORT int retinanet_level(void) {
#if LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* True if built with OpenMP. */
EXPORT int retinanet_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* --- the classification loss --------------------------------------------------------------- */

/* Elements per piece, whose arrays stay in the first cache. */
#define PIECE 1024

typedef struct {
    const Level *level;
    const void *logits;
    const int64_t *labels;
    const float *weights;
    const float *positive;
    const float *negative;
    void *gradient;
    int64_t classes;
    int narrow, per_class;
    Curve curve;
    float gamma, beta;
} LossTask;

/* The loss of the elements [start, end) of the logits (rows, classes). */
static double loss_of_piece(const LossTask *task, int64_t start, int64_t end) {
    float wide[PIECE], weights[PIECE], slopes[PIECE];
    float own_logits[PIECE], own_weights[PIECE], own_slopes[PIECE];
    int own[PIECE], positives = 0, count = (int)(end - start);
    uint16_t rounded[PIECE];
    size_t size = task->narrow ? sizeof(uint16_t) : sizeof(float);
    const char *from_memory = (const char *)task->logits + (size_t)start * size;
    const float *logits = (const float *)from_memory;
    if (task->narrow) {
        task->level->widen((const uint16_t *)from_memory, wide, count);
        logits = wide;
    }
    /* All elements are computed as negatives, with weight 0 for the class of a row that has one,
     * which is computed as a positive after that. */
    for (int64_t row = start / task->classes; row * task->classes < end; row++) {
        int64_t first = row * task->classes - start, label = task->labels[row];
        int64_t from = first < 0 ? 0 : first, to = first + task->classes;
        float weight = task->weights[row];
        if (to > count) to = count;
        if (task->per_class)
            for (int64_t i = from; i < to; i++) weights[i] = weight * task->negative[i - first];
        else
            for (int64_t i = from; i < to; i++) weights[i] = weight * task->negative[0];
        if (label < 0 || first + label < from || first + label >= to) continue;
        int index = (int)(first + label);
        own[positives] = index;
        own_logits[positives] = -logits[index];
        own_weights[positives++] = weight * task->positive[task->per_class ? label : 0];
        weights[index] = 0.0f;
    }
    double loss = task->curve(logits, weights, slopes, count, task->gamma, task->beta);
    loss += task->curve(own_logits, own_weights, own_slopes, positives, task->gamma, task->beta);
    for (int i = 0; i < positives; i++) slopes[own[i]] = -own_slopes[i];
    if (task->gradient) {
        char *to_memory = (char *)task->gradient + (size_t)start * size;
        if (task->narrow) task->level->narrow(slopes, rounded, count);
        memcpy(to_memory, task->narrow ? (void *)rounded : (void *)slopes, (size_t)count * size);
    }
    return loss;
}

/* Fills partial[ceil(rows * classes / PIECE)], which does not depend on the number of threads. */
EXPORT void retinanet_loss(
    int level, int threads, int narrow, const void *logits, const int64_t *labels,
    const float *weights, const float *positive, const float *negative, int per_class,
    int64_t rows, int64_t classes, int curve, float gamma, float beta, void *gradient,
    double *partial
) {
    LossTask task = {
        levels[level], logits, labels, weights, positive, negative, gradient, classes, narrow,
        per_class, levels[level]->curves[curve], gamma, beta
    };
    int64_t total = rows * classes, pieces = (total + PIECE - 1) / PIECE, piece;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (piece = 0; piece < pieces; piece++) {
        int64_t start = piece * PIECE, end = total - start < PIECE ? total : start + PIECE;
        partial[piece] = loss_of_piece(&task, start, end);
    }
}

/* --- non-maximum suppression --------------------------------------------------------------- */

/* Indices of at most `max_count` survivors of an image's boxes, best first; -1: no memory. */
static int64_t suppress_image(
    const Level *level, const float *boxes, const int64_t *labels, int64_t first, int64_t last,
    int64_t classes, float threshold, int64_t max_count, int64_t *kept
) {
    int64_t count = last - first, survivors = 0;
    if (!count) return 0;
    /* The survivors of a class are contiguous in `corners`, from its start to its end. */
    float *corners = malloc(5 * (size_t)count * sizeof *corners);
    int64_t *starts = calloc(2 * (size_t)classes + 1, sizeof *starts), *ends = starts + classes + 1;
    if (!corners || !starts) {
        free(corners);
        free(starts);
        return -1;
    }
    for (int64_t i = first; i < last; i++) starts[labels[i] + 1]++;
    for (int64_t k = 0; k < classes; k++) starts[k + 1] += starts[k];
    memcpy(ends, starts, (size_t)classes * sizeof *ends);
    float *x1 = corners, *y1 = x1 + count, *x2 = y1 + count, *y2 = x2 + count, *areas = y2 + count;
    for (int64_t i = first; i < last && survivors < max_count; i++) {
        int64_t class = labels[i];
        const float *box = boxes + 4 * i;
        float area = (box[2] - box[0]) * (box[3] - box[1]);
        int suppressed = 0;
        for (int64_t j = starts[class]; j < ends[class] && !suppressed; j += 64) {
            int some = (int)(ends[class] - j < 64 ? ends[class] - j : 64);
            suppressed = level->overlaps(
                x1 + j, y1 + j, x2 + j, y2 + j, areas + j, some, box, area, threshold
            );
        }
        if (suppressed) continue;
        int64_t at = ends[class]++;
        x1[at] = box[0], y1[at] = box[1], x2[at] = box[2], y2[at] = box[3];
        areas[at] = area;
        kept[survivors++] = i;
    }
    free(corners);
    free(starts);
    return survivors;
}

/* Boxes of image i, best first, are offsets[i] to offsets[i + 1]; the indices of its survivors are
 * written from kept[offsets[i]] on, and their number to counts[i]: -1 if there was no memory. */
EXPORT void retinanet_suppress(
    int level, int threads, const float *boxes, const int64_t *labels, const int64_t *offsets,
    int64_t images, int64_t classes, double threshold, int64_t max_count, int64_t *kept,
    int64_t *counts
) {
    /* An IoU is over the threshold if it is over the greatest float32 that is not. */
    float bound = (float)threshold;
    if ((double)bound > threshold) bound = nextafterf(bound, -1.0f);
    (void)threads;
    int64_t i;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
#endif
    for (i = 0; i < images; i++)
        counts[i] = suppress_image(
            levels[level], boxes, labels, offsets[i], offsets[i + 1], classes, bound, max_count,
            kept + offsets[i]
        );
}
