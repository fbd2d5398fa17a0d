/* Rotary embedding (RoFormer, https://arxiv.org/abs/2104.09864), rotate-half form. */

/* angle = k pi/2 + r, |r| <= pi/4; Taylor series of sin r and cos r, below 1e-16 in absolute error */
static void sine_cosine(double angle, double *sine, double *cosine) {
    double k = (angle * 0.63661977236758134308 + 6755399441055744.0) - 6755399441055744.0;
    double r = fma(-k, 6.123233995736766036e-17, fma(-k, 1.57079632679489655800, angle));
    double z = r * r;
    double s = r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880
        + z * (-1.0 / 39916800 + z * (1.0 / 6227020800.0 + z * (-1.0 / 1307674368000.0))))))));
    double c = 1 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800
        + z * (1.0 / 479001600 + z * (-1.0 / 87178291200.0 + z * (1.0 / 20922789888000.0))))))));
    int quarter = fabs(k) < 0x1p62 ? (int)((long long)k & 3) : 0;  /* no integer beyond, least of all a NaN */
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

static void rope_angles(float *cosine, float *sine, const float *frequency, size_t n, size_t position,
                        float scale) {
    for (size_t i = 0; i < n; i++) {
        double s, c;
        sine_cosine((double)((float)position * frequency[i]), &s, &c);
        cosine[i] = (float)c * scale;
        sine[i] = (float)s * scale;
    }
}

static void rope(float *x, const float *cosine, const float *sine, size_t head_dim, float scale) {
    size_t half = head_dim / 2;
    for (size_t i = 0; i < half; i++) {
        float x0 = x[i], x1 = x[half + i];
        x[i] = fmaf(x0, cosine[i], -(x1 * sine[i])) * scale;
        x[half + i] = fmaf(x1, cosine[i], x0 * sine[i]) * scale;
    }
}

