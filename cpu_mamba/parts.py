"""How the kernel of the training step is compiled: from parts, each a function of its own, that no other kernel in the process shares."""

from llvmlite.binding import Linkage
from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from .cache import keep
from .lanes import FAST


class PartLibrary(JITCodeLibrary):
    """LLVM code to be linked into other code, which alone is optimised and made machine code."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


class WholeLibrary(JITCodeLibrary):
    """Machine code that keeps its functions to itself.

    Numba lets kernels share the copies that each of them has of a function, by name: what a kernel computes could then depend, in the last bit, on
    which others the process has loaded before, whose copies were optimised in other company. Private, not internal: of internal functions too
    the just-in-time linker knows the names.
    """

    def _optimize_final_module(self):
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.private
        super()._optimize_final_module()


class PartCompiler(Compiler):
    """Compiles a `part`: no wrappers, no machine code."""
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, PartLibrary(targetctx.codegen(), "part"), args, return_type, flags, locals)

    def compile_extra(self, func):
        result, key = super().compile_extra(func), [].copy  # Numba knows a function by a builtin; nobody calls this one
        self.state.targetctx.insert_user_function(key, result.fndesc, [result.library])
        return result._replace(entry_point=key)


class WholeCompiler(Compiler):
    """Compiles a kernel into a `WholeLibrary`."""
    def __init__(self, typingctx, targetctx, library, *rest):
        library = WholeLibrary(targetctx.codegen(), "whole")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, *rest)


PART = dict(pipeline_class=PartCompiler, **FAST)


def part(function):
    """A kernel for use in others that makes no array and gives none back, and so counts nobody who refers to those it is given.

    With named tuples of dozens of arrays, counting would cost as much as the small products themselves.
    """
    return njit(**PART, _nrt=False)(function)


def maker(function):
    """A kernel for use in others that may make arrays, also where it is called by a `part`."""
    return njit(**PART, _nrt=True)(function)


def whole(function):
    """A kernel for calls from Python, without the GIL, made of parts and kept on disk."""
    return keep(njit(pipeline_class=WholeCompiler, **FAST, _nrt=True)(function))
