"""Triton kernels by Triton's own interpreter, launched on the stream.

The interpreter copies arguments to the host and back when a kernel is called. Here it gets
tensors that share the device's memory, and it runs when the stream gets there, so that graphs
record it. Triton 3.8's interpreter gives wrong numbers for `tl.dot` in bfloat16; the attention
kernels that use it have stand-ins of their own (`triton_attention`), and another one is refused.
"""

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

from device import DEVICE
from triton.runtime import interpreter

from .table import launches

_patched: set[Any] = set()  # functions whose `tl` is the interpreter's


def install() -> None:
    """Let kernels run on the stream; TRITON_INTERPRET=1 must have been set before the import."""
    import triton.language as tl

    interpreter.GridExecutor.__call__ = _launch
    # Waits between kernels of one stream, which run one after the other anyway.
    tl.extra.cuda.gdc_wait = lambda *_, **__: None
    tl.extra.cuda.gdc_launch_dependents = lambda *_, **__: None


def _alias(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return interpreter._tuple_create(arg, map(_alias, arg))
    return DEVICE.alias(arg) if hasattr(arg, "data_ptr") else arg


def _launch(self, *args: Any, **kwargs: Any) -> None:
    name = f"triton::{self.fn.__name__}"
    written, products = _facts(self.fn)
    if products:
        raise NotImplementedError(
            f"{name} multiplies matrices, which Triton's interpreter gets wrong in bfloat16; give "
            "it a stand-in in tests/cuda_path/stand_ins"
        )
    known = inspect.signature(self.fn).parameters
    kwargs = {key: value for key, value in kwargs.items() if key in known}
    given = inspect.getcallargs(self.fn, *args, **kwargs)
    reads = [x for key, x in given.items() if hasattr(x, "data_ptr") and key not in written]
    writes = [x for key, x in given.items() if hasattr(x, "data_ptr") and key in written]
    host = {key: _alias(value) for key, value in given.items()}
    for hook in self.pre_run_hooks:
        hook(*host.values())
    converted = {
        key: value if key in self.constexprs else interpreter._implicit_cvt(value)
        for key, value in host.items()
    }
    grid = self.grid(converted) if callable(self.grid) else self.grid
    grid = (*grid, 1, 1)[:3]
    launches[name] += 1

    def run() -> None:
        _run(self.fn, converted, grid, host)

    DEVICE.enqueue(name, run, reads=reads, writes=writes)


def _run(fn: Any, args: dict[str, Any], grid: tuple[int, ...], _alive: dict[str, Any]) -> None:
    if fn not in _patched:
        # The interpreter does so at every launch and takes it back; nothing else uses `tl` here,
        # and it costs more than most kernels.
        interpreter._patch_lang(fn)
        _patched.add(fn)
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(*grid)
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                builder.set_grid_idx(x, y, z)
                fn(**args)


@cache
def _facts(fn: Any) -> tuple[frozenset[str], bool]:
    """Parameters that a kernel's source stores through, and whether it multiplies matrices."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    points: dict[str, set[str]] = {name: {name} for name in inspect.signature(fn).parameters}

    def parameters(node: ast.AST) -> set[str]:
        names = (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        return set().union(*(points.get(name, set()) for name in names))

    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (t for t in targets if isinstance(t, ast.Name)):
                points.setdefault(target.id, set()).update(parameters(node.value))
    written: set[str] = set()
    products = False
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "tl.store" or called.startswith("tl.atomic"):
            written |= parameters(node.args[0])
        elif called == "tl.dot":
            products = True
        elif not called.startswith(("tl.", "range")):
            # A helper may store through the pointers that it is given.
            written |= set().union(set(), *(parameters(arg) for arg in node.args))
    return frozenset(written), products
