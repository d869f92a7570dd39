"""Vectors of float32 in SIMD registers as a Numba type, sizes as types, and what is done with them.

A kernel takes sizes such as `W` (channels side by side, one vector) and `U` (states, or rows, of a tile) as its first arguments: `width(16)` in
Python, a type `Width(16)` in Numba, which compiles the kernel once for each and keeps it on disk. `W * U` is the size of a tile of both.

=====================================  ==================================================================================
`load(W, x, t, c)`                     x[t, c : c + W] of a C-contiguous float32 matrix
`store(W, x, t, c, v)`                 x[t, c : c + W] = v
`fill(W, a)`                           a in every lane
`size_of(W)`                           the number, known to the compiler
`tile(U, v)`                           v of W channels, once for each of U states
`spread(W, U, x, t, n)`                x[t, n : n + U], each over W channels
`fold(W, v)`                           the sum over the states of a tile, W channels
`sums(W, x, t, c)`                     the sum of each of the W vectors of W floats that lie from x[t, c] on
`rows(W, U, x, t, k)`                  x[t : t + U, k], each over W channels
`load_rows`, `store_rows(W, U, ...)`   x[t : t + U, c : c + W] as one tile
`store_groups(W, U, x, t, c, v)`       v of W channels, U at a time into the rows from t on, column c
`lane_exp2`, `lane_sigmoid`, ...       functions of every lane; `lane_sum` and `lane_top` reduce to one number
=====================================  ==================================================================================

A NaN or an infinity in the data comes out as one: no operation may assume there are none.
"""

import functools
import math
import operator

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import NativeValue, intrinsic, models, overload, register_model, unbox

from .cache import keep

FLAGS = ("reassoc", "contract", "arcp", "nsz")  # no "nnan", no "ninf"
FAST = dict(fastmath=set(FLAGS), error_model="numpy", nogil=True)
FLOAT, INT = ir.FloatType(), ir.IntType(32)
ZERO, ONE, LOG2E = np.float32(0), np.float32(1), np.float32(1 / math.log(2))


def kernel(function):
    """Compile for use in other kernels, always as part of them.

    A call would be to whichever copy the process has loaded first, and two copies, optimised in different company, may differ in the last bit:
    what a run computes would depend on which kernels were on disk before it.
    """
    return keep(njit(forceinline=True, **FAST)(function))


def entry(function):
    """Compile with Numba for calls from Python, without the GIL, and keep what is compiled on disk."""
    return keep(njit(**FAST)(function))


class Width(types.Type):
    """A number of lanes, states or rows that the compiler knows; there is nothing of it at run time."""

    def __init__(self, size):
        self.size = size
        super().__init__(name=f"Width({size})")


class WidthValue:
    """The argument that stands for a `Width`."""

    def __init__(self, size):
        self.size, self._numba_type_ = size, Width(size)

    def __repr__(self):
        return f"width({self.size})"


@functools.cache
def width(size: int) -> WidthValue:
    """The argument for a kernel's `W` or `U`. Raises ValueError unless size is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size={size}: a power of two is needed")
    return WidthValue(size)


register_model(Width)(models.OpaqueModel)


@unbox(Width)
def unbox_width(kind, value, context):
    """From Python to compiled code: nothing to carry, the size is in the type."""
    return NativeValue(context.context.get_dummy_value())


class Lanes(types.Type):
    """`size` float32 values held in SIMD registers (LLVM's <size x float>)."""

    def __init__(self, size):
        self.size = size
        super().__init__(name=f"Lanes({size})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """How Numba stores `Lanes`: as LLVM's vector."""
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.VectorType(FLOAT, fe_type.size))


@intrinsic
def size_of(typingctx, W):
    """The number of a `Width`, known to the compiler."""
    return types.intp(W), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), W.size)


@intrinsic
def times(typingctx, W, U):
    """W * U for two `Width`s, a `Width` too."""
    return Width(W.size * U.size)(W, U), lambda context, builder, signature, args: context.get_dummy_value()


@overload(operator.mul)
def width_product(W, U):
    """Teach Numba `W * U`."""
    if isinstance(W, Width) and isinstance(U, Width):
        return lambda W, U: times(W, U)


# Shuffles, operators and functions of every lane

def shuffle(builder, x, y, lanes):
    """The given lanes of x and y side by side, as one vector."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(lanes)), list(lanes)))


def undefined(size):
    """An LLVM vector of `size` lanes that hold anything."""
    return ir.Constant(ir.VectorType(FLOAT, size), ir.Undefined)


def splat(builder, value, kind, size):
    """The LLVM vector of an operand: itself, or a float32 scalar copied into every lane."""
    if isinstance(kind, Lanes):
        return value
    first = builder.insert_element(undefined(size), value, ir.Constant(INT, 0))
    return shuffle(builder, first, undefined(size), [0] * size)


@intrinsic
def lane_add(typingctx, x, y):
    """x + y where signed zeros count. Elsewhere LLVM folds the bound of `lane_max(a, ZERO) + y` into a masked addition, two instructions for one."""
    return x(x, y), lambda context, builder, signature, args: builder.fadd(*args, flags=("reassoc", "contract", "arcp"))


def lane_operator(op, instruction):
    """Teach Numba `Lanes op Lanes` and `Lanes op scalar` as one LLVM instruction."""
    @intrinsic
    def apply(typingctx, a, b):
        result = a if isinstance(a, Lanes) else b

        def codegen(context, builder, signature, args):
            x, y = (splat(builder, value, kind, result.size) for value, kind in zip(args, (a, b)))
            return getattr(builder, instruction)(x, y, flags=FLAGS)
        return result(a, b), codegen

    @overload(op)
    def typed(a, b):
        if any(isinstance(k, Lanes) for k in (a, b)) and all(isinstance(k, Lanes) or k is types.float32 for k in (a, b)):
            return lambda a, b: apply(a, b)


for op, instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    lane_operator(op, instruction)


def call_llvm(builder, name, result, args):
    """A call of LLVM's function `name` with arguments of one type each, under FLAGS."""
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args, fastmath=FLAGS)


def larger(builder, x, y):
    """The larger of x and y, x where x is NaN: in this order one instruction of x86, where one that minds a NaN in either takes five."""
    return builder.select(builder.fcmp_ordered(">", y, x, flags=FLAGS), y, x)


@intrinsic
def lane_abs(typingctx, x):
    """|x| in every lane."""
    return x(x), lambda context, builder, signature, args: call_llvm(builder, f"llvm.fabs.v{x.size}f32", args[0].type, args)


@intrinsic
def lane_max(typingctx, x, y):
    """The larger one in every lane, x where x is NaN; one of the two may be a number."""
    result = x if isinstance(x, Lanes) else y

    def codegen(context, builder, signature, args):
        return larger(builder, *(splat(builder, value, kind, result.size) for value, kind in zip(args, (x, y))))
    return result(x, y), codegen


# 2**x = 1 + x q(x) on [-1/2, 1/2]: q of degree 4 through expm1(x log 2) / x at the Chebyshev nodes, highest power first, and the 1.
EXP2 = (0.0013390866806730628, 0.009666373953223228, 0.055503569543361664, 0.2402234822511673, 0.6931471824645996, 1.0)


@intrinsic
def lane_exp2(typingctx, x):
    """2**x in every lane, x at most 125: range reduction to [-1/2, 1/2], a polynomial, the exponent added as bits.

    Exact at 0, so that a recurrence over thousands of tiny steps keeps its precision. Below -125 it stays at 2**-125; there is
    no bound above, which would be an instruction in every 2**x of a scan and which no decay needs. NaN stays NaN: the exponent
    that is added to it is 0 on x86 (of the integer 0x80000000, shifted out) as on Arm.
    """
    def codegen(context, builder, signature, args):
        floats, ints = (ir.VectorType(t, x.size) for t in (FLOAT, INT))
        constant = lambda value: ir.Constant(floats, [value] * x.size)
        bounded = larger(builder, args[0], constant(-125.0))
        whole = call_llvm(builder, f"llvm.rint.v{x.size}f32", floats, [bounded])
        part = builder.fsub(bounded, whole, flags=FLAGS)
        p = constant(EXP2[0])
        for c in EXP2[1:]:
            p = builder.fadd(builder.fmul(p, part, flags=FLAGS), constant(c), flags=FLAGS)
        exponent = builder.shl(builder.fptosi(whole, ints), ir.Constant(ints, [23] * x.size))
        return builder.bitcast(builder.add(builder.bitcast(p, ints), exponent), floats)
    return x(x), codegen


def lane_reduction(name, start):
    """A kernel's reduction of all lanes to one float32, by LLVM's `name` from `start` on (None: it takes no start)."""
    @intrinsic
    def reduction(typingctx, x):
        def codegen(context, builder, signature, args):
            first = [] if start is None else [ir.Constant(FLOAT, start)]
            return call_llvm(builder, f"llvm.vector.reduce.{name}.v{x.size}f32", FLOAT, [*first, args[0]])
        return types.float32(x), codegen
    return reduction


lane_sum, lane_top = lane_reduction("fadd", -0.0), lane_reduction("fmax", None)  # lane_top passes over a NaN


@kernel
def lane_sigmoid(x):
    """1 / (1 + e^-x) in every lane; below -86 it stays at the value there."""
    return ONE / (lane_exp2(lane_max(x, np.float32(-86)) * -LOG2E) + ONE)


@kernel
def lane_softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e) with e = e^-|x| and log1p(e) = 2 artanh(s), s = e / (2 + e) <= 1/3."""
    e = lane_exp2(lane_abs(x) * -LOG2E)
    s = e / (e + np.float32(2))
    q = s * s
    p = q * np.float32(1 / 15) + np.float32(1 / 13)
    p = p * q + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    p = p * q + ONE
    return lane_add(lane_max(x, ZERO), s * p * np.float32(2))


# Memory

def pointer(context, builder, kind, array, indices, index_types, size):
    """Where `size` float32 of a C-contiguous array begin."""
    if not (isinstance(kind, types.Array) and kind.layout == "C" and kind.ndim == 2 and kind.dtype is types.float32):
        raise TypeError(f"{kind}: a C-contiguous float32 matrix is needed")
    array = context.make_array(kind)(context, builder, array)
    where = [context.cast(builder, i, t, types.intp) for i, t in zip(indices, index_types)]
    p = cgutils.get_item_pointer(context, builder, kind, array, where)
    return builder.bitcast(p, ir.VectorType(FLOAT, size).as_pointer())


def row_pointer(context, builder, signature, args, row, size):
    """The same for array[t + row, c :] of a call (W, U, array, t, c, ...)."""
    t = builder.add(context.cast(builder, args[3], signature.args[3], types.intp), ir.Constant(ir.IntType(64), row))
    return pointer(context, builder, signature.args[2], args[2], (t, args[4]), (types.intp, signature.args[4]), size)


def joined(builder, parts):
    """Vectors of one size, a power of two of them, side by side."""
    while len(parts) > 1:
        parts = [shuffle(builder, a, b, range(2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


@intrinsic
def load(typingctx, W, array, t, c):
    """array[t, c : c + W] of a C-contiguous float32 matrix."""
    def codegen(context, builder, signature, args):
        return builder.load(pointer(context, builder, array, args[1], args[2:], (t, c), W.size), align=4)
    return Lanes(W.size)(W, array, t, c), codegen


@intrinsic
def store(typingctx, W, array, t, c, x):
    """array[t, c : c + W] = x."""
    if not (isinstance(x, Lanes) and x.size == W.size):
        raise TypeError(f"store of {x}: {W} lanes are needed")

    def codegen(context, builder, signature, args):
        builder.store(args[4], pointer(context, builder, array, args[1], args[2:4], (t, c), W.size), align=4)
        return context.get_dummy_value()
    return types.void(W, array, t, c, x), codegen


@intrinsic
def fill(typingctx, W, x):
    """The scalar x in each of W lanes."""
    return Lanes(W.size)(W, x), lambda context, builder, signature, args: splat(builder, args[1], x, W.size)


@intrinsic
def tile(typingctx, U, x):
    """x of W channels, once for each of U states: U W lanes."""
    def codegen(context, builder, signature, args):
        return shuffle(builder, args[1], undefined(x.size), list(range(x.size)) * U.size)
    return Lanes(U.size * x.size)(U, x), codegen


@intrinsic
def spread(typingctx, W, U, array, t, n):
    """array[t, n : n + U], each over W channels: U W lanes."""
    def codegen(context, builder, signature, args):
        row = builder.load(pointer(context, builder, array, args[2], args[3:], (t, n), U.size), align=4)
        return shuffle(builder, row, undefined(U.size), [n for n in range(U.size) for _ in range(W.size)])
    return Lanes(U.size * W.size)(W, U, array, t, n), codegen


@intrinsic
def fold(typingctx, W, x):
    """The sum over the states of a tile x of U W lanes: W lanes."""
    def codegen(context, builder, signature, args):
        parts = [shuffle(builder, args[1], undefined(x.size), range(k, k + W.size)) for k in range(0, x.size, W.size)]
        return functools.reduce(lambda a, b: builder.fadd(a, b, flags=FLAGS), parts)
    return Lanes(W.size)(W, x), codegen


def pairings(W):
    """Lanes of a pair of vectors that `sums` adds, step by step.

    In general neighbours, so that the order stays; for 16 lanes the same within and then among quarters, which are single instructions
    without an index register.
    """
    if W != 16:
        return [(range(0, 2 * W, 2), range(1, 2 * W, 2))] * (W.bit_length() - 1)
    quarters = lambda *lanes: [lane + 4 * q for q in range(4) for lane in lanes]
    return [(quarters(0, 16, 1, 17), quarters(2, 18, 3, 19)), (quarters(0, 1, 16, 17), quarters(2, 3, 18, 19)),
            ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]),
            ([i + 8 * k for k in range(4) for i in range(4)], [i + 8 * k + 4 for k in range(4) for i in range(4)])]


@intrinsic
def sums(typingctx, W, array, t, c):
    """By W - 1 additions of shuffled pairs where W single sums take W log W."""
    def codegen(context, builder, signature, args):
        base = pointer(context, builder, array, args[1], args[2:], (t, c), W.size)
        vectors = [builder.load(builder.gep(base, [ir.Constant(INT, k)]), align=4) for k in range(W.size)]
        for low, high in pairings(W.size):
            pairs = zip(vectors[::2], vectors[1::2])
            vectors = [builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high), flags=FLAGS) for x, y in pairs]
        return vectors[0]
    return Lanes(W.size)(W, array, t, c), codegen


@intrinsic
def rows(typingctx, W, U, array, t, k):
    """array[t : t + U, k], each over W channels: U W lanes."""
    def codegen(context, builder, signature, args):
        first = lambda u: builder.load(builder.bitcast(row_pointer(context, builder, signature, args, u, 1), FLOAT.as_pointer()), align=4)
        return joined(builder, [splat(builder, first(u), types.float32, W.size) for u in range(U.size)])
    return Lanes(U.size * W.size)(W, U, array, t, k), codegen


@intrinsic
def load_rows(typingctx, W, U, array, t, c):
    """array[t : t + U, c : c + W] as one tile of U W lanes."""
    def codegen(context, builder, signature, args):
        return joined(builder, [builder.load(row_pointer(context, builder, signature, args, u, W.size), align=4) for u in range(U.size)])
    return Lanes(U.size * W.size)(W, U, array, t, c), codegen


@intrinsic
def store_rows(typingctx, W, U, array, t, c, x):
    """array[t : t + U, c : c + W] = x, a tile of U W lanes."""
    def codegen(context, builder, signature, args):
        for u in range(U.size):
            part = shuffle(builder, args[5], undefined(x.size), range(u * W.size, u * W.size + W.size))
            builder.store(part, row_pointer(context, builder, signature, args, u, W.size), align=4)
        return context.get_dummy_value()
    return types.void(W, U, array, t, c, x), codegen


@intrinsic
def store_groups(typingctx, W, U, array, t, c, x):
    """x of W lanes, U at a time into the rows from t on, from column c."""
    def codegen(context, builder, signature, args):
        for u in range(W.size // U.size):
            part = shuffle(builder, args[5], undefined(W.size), range(u * U.size, u * U.size + U.size))
            builder.store(part, row_pointer(context, builder, signature, args, u, U.size), align=4)
        return context.get_dummy_value()
    return types.void(W, U, array, t, c, x), codegen
