/* The matrix rate of this device, measured now: the ceiling beside which steps are reported. */
#ifndef MOE_CORE_TRAIN_MATRIX_RATE_H
#define MOE_CORE_TRAIN_MATRIX_RATE_H

#include "kernels/power.h"

/* The middle one of n values (the upper of two); sorts them, fastest first. n >= 1. */
double moe_median(double *values, int n);

/* TFLOP/s of an n x n x n product of random `dtype` values: the median of five, after one to warm
 * up. Local. */
moe_status moe_matrix_rate(moe_device *dev, int64_t n, moe_dtype dtype, double *tflops);

/* The same product repeated without a pause for a second, and what it draws; TFLOP/s on average.
 * Local. */
moe_status moe_matrix_power(moe_device *dev, int64_t n, moe_dtype dtype, moe_power *meter,
                            double *tflops, moe_power_use *use);

#endif
