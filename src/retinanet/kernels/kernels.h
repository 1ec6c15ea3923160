/* The inner loops, compiled once for each level of the processor: native.c includes this file with
 *   NAMED(f)   the name of f at this level,
 *   TARGET     the attribute that enables the level's instructions,
 *   FUSED      1 if the level has fused multiply-add.
 *
 * The loops are plain C for the compiler to vectorise, and correct for NaN: "a > b ? b : a" keeps a
 * NaN in a, and is one instruction.
 */

#if FUSED
#define FMA(a, b, c) __builtin_fmaf((a), (b), (c))
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* exp(-a) for a >= 0, to about 1 ulp; 0 from 87 on, where float32 soon underflows. The result for a
 * NaN is any number. */
TARGET static INLINE float NAMED(exp_minus)(float a) {
    /* n = -a / ln 2 rounded, by adding a number so large that no fraction fits: its bits end in n. */
    float shifted = FMA(a, -1.44269504f, 12582912.0f);
    float n = shifted - 12582912.0f;
    /* r = -a - n ln 2, with ln 2 in two parts, the first of few digits. */
    float r = FMA(n, -0.693359375f, -a);
    r = FMA(n, 2.12194440e-4f, r);
    /* exp(r) for |r| <= ln 2 / 2: the polynomial of least relative error, 3e-9. */
    float e = 1.38145989e-3f;
    e = FMA(e, r, 8.36871494e-3f);
    e = FMA(e, r, 4.16683904e-2f);
    e = FMA(e, r, 1.66665211e-1f);
    e = FMA(e, r, 4.99999934e-1f);
    e = FMA(e, r, 1.0f);
    e = FMA(e, r, 1.0f);
    /* times 2^n, by adding n to the exponent */
    e = float_of((int32_t)((uint32_t)bits_of(e) + ((uint32_t)bits_of(shifted) << 23)));
    return a > 87.0f ? 0.0f : e;
}

/* Value and slope of an element's loss, times a weight, as a function of u = -x_t.
 * Curves: CROSS_ENTROPY, FOCAL_1, FOCAL_2, FOCAL (any gamma), STAR. */
TARGET static INLINE float NAMED(element)(
    int curve, float u, float weight, float gamma, float beta, float *slope
) {
    float z = curve == STAR ? FMA(gamma, u, -beta) : u;
    /* t = exp(-|z|) is in [0, 1]: nothing overflows, and both sigmoids keep all their digits. */
    float t = NAMED(exp_minus)(fabsf(z));
    float one = 1.0f + t, two = 2.0f + t;
    float both = 1.0f / (one * two); /* one division for two quotients */
    float high = both * two;         /* sigmoid(|z|) */
    float low = t * high;            /* sigmoid(-|z|) */
    /* log(1 + t) = 2 artanh(s) with s = t / (2 + t) <= 1/3: an odd polynomial, error 5e-9. */
    float s = t * both * one;
    float squared = s * s;
    float tail = 1.40122290e-1f;
    tail = FMA(tail, squared, 1.39995710e-1f);
    tail = FMA(tail, squared, 2.00108500e-1f);
    tail = FMA(tail, squared, 3.33332070e-1f);
    s = s + s;
    float log1p = FMA(s * squared, tail, s);
    int wrong = !(z < 0.0f); /* true for NaN, which then enters the cost */
    float p = wrong ? high : low; /* sigmoid(z) = 1 - p_t */
    if (curve == STAR) {
        float beyond = u - beta / gamma;
        beyond = beyond < 0.0f ? 0.0f : beyond;
        *slope = (z != z ? z : p) * weight;
        return FMA(log1p, 1.0f / gamma, beyond) * weight;
    }
    float cost = (wrong ? z : 0.0f) + log1p; /* log(1 + e^z) */
    if (curve == CROSS_ENTROPY) {
        *slope = (z != z ? z : p) * weight;
        return cost * weight;
    }
    float rest = wrong ? low : high;
    float bounded = cost > 110.0f ? 110.0f : cost; /* avoids 0 times infinity */
    float factor;
    if (curve == FOCAL_1) {
        factor = p;
    } else if (curve == FOCAL_2) {
        factor = p * p;
        rest = rest + rest;
    } else {
        /* p^gamma from log p = min(z, 0) - log(1 + t) */
        factor = NAMED(exp_minus)(gamma * (log1p - (wrong ? 0.0f : z)));
        rest = gamma * rest;
    }
    factor = factor * weight;
    *slope = factor * FMA(rest, bounded, p);
    return cost * factor;
}

/* Sum of weights[i] * loss(u[i]); slopes[i] = weights[i] * loss'(u[i]). */
TARGET static INLINE float NAMED(block)(
    int curve, const float *restrict u, const float *restrict weights, float *restrict slopes,
    int count, float gamma, float beta
) {
    float sum = 0.0f;
    SIMD_SUM(sum)
    for (int i = 0; i < count; i++) {
        float slope;
        sum += NAMED(element)(curve, u[i], weights[i], gamma, beta, &slope);
        slopes[i] = slope;
    }
    return sum;
}

/* The same for any count: in float32 within a block, in float64 over the blocks. */
#define CURVE(name, curve)                                                                         \
    TARGET static double NAMED(name)(                                                              \
        const float *restrict u, const float *restrict weights, float *restrict slopes,            \
        int count, float gamma, float beta                                                         \
    ) {                                                                                            \
        double sum = 0.0;                                                                          \
        int i = 0;                                                                                 \
        for (; i + SUM_BLOCK <= count; i += SUM_BLOCK)                                             \
            sum += NAMED(block)(                                                                   \
                curve, u + i, weights + i, slopes + i, SUM_BLOCK, gamma, beta                      \
            );                                                                                     \
        return sum +                                                                               \
               NAMED(block)(curve, u + i, weights + i, slopes + i, count - i, gamma, beta);        \
    }

CURVE(cross_entropy, CROSS_ENTROPY)
CURVE(focal_1, FOCAL_1)
CURVE(focal_2, FOCAL_2)
CURVE(focal, FOCAL)
CURVE(star, STAR)
#undef CURVE

TARGET static void NAMED(widen)(const uint16_t *restrict from, float *restrict to, int count) {
    SIMD
    for (int i = 0; i < count; i++) {
        to[i] = float_of((int32_t)((uint32_t)from[i] << 16));
    }
}

/* To bfloat16, to the nearest, ties to even; NaN stays NaN. */
TARGET static void NAMED(narrow)(const float *restrict from, uint16_t *restrict to, int count) {
    SIMD
    for (int i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)bits_of(from[i]);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[i] = (uint16_t)(from[i] != from[i] ? 0x7fc0u : rounded);
    }
}

/* True if the IoU of the box and one of `count` others is over the threshold. The operations and
 * their order are those of torchvision's nms, so that no bit differs. */
TARGET static int NAMED(overlaps)(
    const float *restrict x1, const float *restrict y1, const float *restrict x2,
    const float *restrict y2, const float *restrict areas, int count, const float *restrict box,
    float area, float threshold
) {
    float left = box[0], top = box[1], right = box[2], bottom = box[3];
    int any = 0;
    SIMD_OR(any)
    for (int i = 0; i < count; i++) {
        float inner_left = x1[i] < left ? left : x1[i];
        float inner_top = y1[i] < top ? top : y1[i];
        float inner_right = right < x2[i] ? right : x2[i];
        float inner_bottom = bottom < y2[i] ? bottom : y2[i];
        float width = inner_right - inner_left, height = inner_bottom - inner_top;
        width = 0.0f < width ? width : 0.0f;
        height = 0.0f < height ? height : 0.0f;
        float inner = width * height;
        any |= inner / (areas[i] + area - inner) > threshold;
    }
    return any;
}

static const Level NAMED(level) = {
    {NAMED(cross_entropy), NAMED(focal_1), NAMED(focal_2), NAMED(focal), NAMED(star)},
    NAMED(widen),
    NAMED(narrow),
    NAMED(overlaps),
};

#undef FMA
#undef FUSED
#undef TARGET
#undef NAMED
