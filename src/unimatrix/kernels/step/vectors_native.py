"""Parts of the compiled step that know vectors and matrices, and no model."""
# mypy: allow-untyped-defs

import math

import numpy as np

from unimatrix.ops.numba.compile import part
from unimatrix.ops.numba.lanes import (
    exponential,
    load,
    minus,
    over,
    plus,
    pointer,
    store,
    times,
    zeros,
)
from unimatrix.ops.numba.lanes import total as sum_lanes

OPTIONS = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
NUM_RULES = 3
_MIN_NORM = 1e-12
_LANES = (0,) * 8


@part(**OPTIONS)
def sigmoid(number):
    """Return 1 / (1 + exp(-number))."""
    return 1.0 / (1.0 + math.exp(-number))


@part(**OPTIONS)
def log_sigmoid(number):
    """Return ln(sigmoid(number))."""
    if number > 0:
        return -math.log1p(math.exp(-number))
    return number - math.log1p(math.exp(number))


@part(**OPTIONS)
def gelu(number):
    """Return number times the normal distribution's share below it."""
    return 0.5 * number * (1.0 + math.erf(number * math.sqrt(0.5)))


@part(**OPTIONS)
def add_log(left, right):
    """Return ln(exp(left) + exp(right))."""
    largest = max(left, right)
    if largest == -np.inf:
        return largest
    return largest + math.log1p(math.exp(min(left, right) - largest))


@part(**OPTIONS)
def get_row(weights, start, row, width):
    """Return row ``row`` of a table [rows, width]."""
    first = start + row * width
    return weights[first : first + width]


# Loops: an assignment to a slice compiles a sentence on shapes that do not fit, a second each.
@part(**OPTIONS)
def copy(source, target):
    """Write the first numbers of source [n or more] to target, which has n, or all of a shorter."""
    for i in range(min(source.shape[0], target.shape[0])):
        target[i] = source[i]


@part(**OPTIONS)
def add(source, target):
    """Add source [n] to target [n]."""
    for i in range(target.shape[0]):
        target[i] += source[i]


@part(**OPTIONS)
def fill(target, number):
    """Write a number everywhere in target [n]."""
    for i in range(target.shape[0]):
        target[i] = number


@part(**OPTIONS)
def project(weights, start, bias, x, y):
    """Write x [B, inputs] times a matrix [inputs, outputs], plus a bias, to y [B, outputs]."""
    num_inputs, num_outputs = x.shape[1], y.shape[1]
    for b in range(x.shape[0]):
        if bias >= 0:
            copy(weights[bias : bias + num_outputs], y[b])
        else:
            fill(y[b], 0.0)
    i = 0
    # Eight rows at a time: what is summed is loaded and stored once for all of them.
    while i + 8 <= num_inputs:
        m0 = get_row(weights, start, i, num_outputs)
        m1 = get_row(weights, start, i + 1, num_outputs)
        m2 = get_row(weights, start, i + 2, num_outputs)
        m3 = get_row(weights, start, i + 3, num_outputs)
        m4 = get_row(weights, start, i + 4, num_outputs)
        m5 = get_row(weights, start, i + 5, num_outputs)
        m6 = get_row(weights, start, i + 6, num_outputs)
        m7 = get_row(weights, start, i + 7, num_outputs)
        for b in range(x.shape[0]):
            x0, x1, x2, x3 = x[b, i], x[b, i + 1], x[b, i + 2], x[b, i + 3]
            x4, x5, x6, x7 = x[b, i + 4], x[b, i + 5], x[b, i + 6], x[b, i + 7]
            total = y[b]
            for o in range(num_outputs):
                total[o] += (
                    x0 * m0[o] + x1 * m1[o] + x2 * m2[o] + x3 * m3[o]
                    + x4 * m4[o] + x5 * m5[o] + x6 * m6[o] + x7 * m7[o]
                )  # fmt: skip
        i += 8
    while i < num_inputs:
        m0 = get_row(weights, start, i, num_outputs)
        for b in range(x.shape[0]):
            x0 = x[b, i]
            total = y[b]
            for o in range(num_outputs):
                total[o] += x0 * m0[o]
        i += 1


@part(**OPTIONS)
def scale_to_unit_square(numbers, eps):
    """Divide [n] by the root of its mean square, in place."""
    total = 0.0
    for number in numbers:
        total += number * number
    scale = numbers.dtype.type(1.0 / math.sqrt(total / numbers.shape[0] + eps))
    for i in range(numbers.shape[0]):
        numbers[i] *= scale


@part(**OPTIONS)
def normalize(x, weights, start, bias, centered, eps, h):
    """Write the norm of x [B, D] to h [B, D]; centered is layer norm, else RMS norm."""
    width = x.shape[1]
    kind = h.dtype.type
    scale = weights[start : start + width]
    for b in range(x.shape[0]):
        mean, total = 0.0, 0.0
        if centered:
            for number in x[b]:
                mean += number
            mean /= width
        for number in x[b]:
            total += (number - mean) * (number - mean)
        factor, middle = kind(1.0 / math.sqrt(total / width + eps)), kind(mean)
        for i in range(width):
            h[b, i] = (x[b, i] - middle) * factor * scale[i]
        if bias >= 0:
            for i in range(width):
                h[b, i] += weights[bias + i]


@part(**OPTIONS)
def add_gated(gate, context, mixed):
    """Add sigmoid(gate) * context to mixed, [D] each."""
    whole = mixed.shape[0] - mixed.shape[0] % len(_LANES)
    logits, source, target = pointer(gate, 0), pointer(context, 0), pointer(mixed, 0)
    for i in range(0, whole, len(_LANES)):
        power = exponential(minus(zeros(logits, _LANES), load(logits, i, _LANES)))
        gated = over(load(source, i, _LANES), plus(power, 1.0))
        store(target, i, plus(load(target, i, _LANES), gated))
    for i in range(whole, mixed.shape[0]):
        mixed[i] += context[i] * mixed.dtype.type(sigmoid(gate[i]))


@part(**OPTIONS)
def multiply_silu(gate, up, inner):
    """Write gate * sigmoid(gate) * up to inner, [F] each."""
    whole = inner.shape[0] - inner.shape[0] % len(_LANES)
    logits, source, target = pointer(gate, 0), pointer(up, 0), pointer(inner, 0)
    for i in range(0, whole, len(_LANES)):
        logit = load(logits, i, _LANES)
        power = exponential(minus(zeros(logits, _LANES), logit))
        store(target, i, over(times(logit, load(source, i, _LANES)), plus(power, 1.0)))
    for i in range(whole, inner.shape[0]):
        inner[i] = gate[i] * sigmoid(gate[i]) * up[i]


@part(**OPTIONS)
def log_sum(numbers):
    """Return ln of the sum of exp(number) over numbers [n]."""
    whole = numbers.shape[0] - numbers.shape[0] % len(_LANES)
    source, shift, rest = pointer(numbers, 0), numbers[0], 0.0
    for number in numbers:
        shift = max(shift, number)
    sums = zeros(source, _LANES)
    for i in range(0, whole, len(_LANES)):
        sums = plus(sums, exponential(minus(load(source, i, _LANES), shift)))
    for i in range(whole, numbers.shape[0]):
        rest += math.exp(numbers[i] - shift)
    return np.float64(shift) + math.log(np.float64(sum_lanes(sums)) + rest)


@part(**OPTIONS)
def bound(numbers, size, normalized):
    """Make unit vectors of every ``size`` numbers, or take the tanh of each, in place."""
    if not normalized:
        for i in range(numbers.shape[0]):
            numbers[i] = math.tanh(numbers[i])
        return
    for first in range(0, numbers.shape[0], size):
        vector = numbers[first : first + size]
        total = 0.0
        for number in vector:
            total += number * number
        scale = numbers.dtype.type(1.0 / max(math.sqrt(total), _MIN_NORM))
        for i in range(size):
            vector[i] *= scale


@part(**OPTIONS)
def softmax_rules(rules):
    """Turn the scores of each head's rules into weights, in place."""
    for first in range(0, rules.shape[0], NUM_RULES):
        scores = rules[first : first + NUM_RULES]
        largest = max(scores[0], max(scores[1], scores[2]))
        total = 0.0
        for i in range(NUM_RULES):
            scores[i] = math.exp(scores[i] - largest)
            total += scores[i]
        for i in range(NUM_RULES):
            scores[i] /= total
