"""exp of float64 and float32 and log of float64 in a form that compilers turn into vector code.

exp(x) = 2^k exp(r), k the integer nearest to x / log 2, |r| <= log(2) / 2: a polynomial in r, and k added to the exponent's bits.
Relative errors below 3e-16 and 1.2e-7 for arguments of at least LOWEST and LOWEST_32; smaller ones count as these.

log(2^k (1 + r)) = k log 2 + log(1 + r), 2^-1/2 < 1 + r < 2^1/2: with s = r / (2 + r) it is 2 atanh(s), a series in s^2 (its coefficients
are those of fdlibm's e_log). Error below one and a half of the last digit.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # pyright: ignore[reportMissingImports]
from numba import types  # pyright: ignore[reportMissingImports]
from numba.extending import intrinsic  # pyright: ignore[reportMissingImports]

from .machine import in_order

LOWEST, HIGHEST = -708.0, 709.0
LOWEST_32, HIGHEST_32 = np.float32(-87.0), np.float32(88.0)
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
#: Added to a number below 2^51, it leaves the nearest integer in the lowest bits.
SHIFT = 6755399441055744.0
LOG2_E_32, LN2_HIGH_32, LN2_LOW_32 = np.float32(1.44269504), np.float32(0.693145752), np.float32(1.42860677e-6)
SHIFT_32 = np.float32(12582912.0)


@intrinsic
def _scaled(typing_context, number, shifted):
    """`number` times 2^k, for the k in the lowest bits of `shifted`."""
    place, word = (23, ir.IntType(32)) if number == types.float32 else (52, ir.IntType(64))

    def code(context, builder, signature, arguments):
        p, t = (builder.bitcast(z, word) for z in arguments)
        whole = builder.add(p, builder.shl(t, ir.Constant(word, place)))
        return builder.bitcast(whole, context.get_value_type(number))

    return number(number, shifted), code


@in_order
def exp64(x):
    x = LOWEST if x < LOWEST else x  # NaN passes
    x = HIGHEST if x > HIGHEST else x
    t = x * LOG2_E + SHIFT
    k = t - SHIFT
    r = x - k * LN2_HIGH
    r = r - k * LN2_LOW
    p = 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return _scaled(p, t)  # pyright: ignore[reportCallIssue]


@in_order
def exp32(x):
    x = LOWEST_32 if x < LOWEST_32 else x
    x = HIGHEST_32 if x > HIGHEST_32 else x
    t = x * LOG2_E_32 + SHIFT_32
    k = t - SHIFT_32
    r = x - k * LN2_HIGH_32
    r = r - k * LN2_LOW_32
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return _scaled(p, t)  # pyright: ignore[reportCallIssue]


@intrinsic
def _bits(typing_context, number):
    return types.int64(types.float64), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(64))


@intrinsic
def _number(typing_context, bits):
    return types.float64(types.int64), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.DoubleType())


@in_order
def log64(x):
    small = x < 2.2250738585072014e-308
    bits = _bits(x * 18014398509481984.0 if small else x)  # pyright: ignore[reportCallIssue]
    # The exponent of x / 2^(-1/2), whose fraction then lies on both sides of 1.
    shifted = bits - np.int64(0x3FE6A09E667F3BCD)
    k = (shifted >> np.int64(52)) << np.int64(52)
    r = _number(bits - k) - 1.0  # pyright: ignore[reportCallIssue]
    whole = _number((shifted >> np.int64(52)) + np.int64(0x4338000000000000))  # pyright: ignore[reportCallIssue]
    exponent = whole - SHIFT - (54.0 if small else 0.0)  # small was multiplied by 2^54
    s = r / (2.0 + r)
    z = s * s
    p = 1.479819860511658591e-01
    p = p * z + 1.531383769920937332e-01
    p = p * z + 1.818357216161805012e-01
    p = p * z + 2.222219843214978396e-01
    p = p * z + 2.857142874366239149e-01
    p = p * z + 3.999999999940941908e-01
    p = p * z + 6.666666666666735130e-01
    half = 0.5 * r * r
    found = exponent * LN2_HIGH - ((half - (s * (half + p * z) + exponent * LN2_LOW)) - r)
    found = x if x == np.inf else found
    found = -np.inf if x == 0.0 else found
    return found if x >= 0.0 else np.nan
