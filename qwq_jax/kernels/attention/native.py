"""Decode attention on a CPU: `paged_decode.cc`, compiled here for this machine and called by XLA's foreign functions.

XLA copies pages before it multiplies them, and multiplies the few queries of a row on one core; the kernel streams them
through every core once. It needs a C++ compiler; an engine without one takes the reference.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.kernels.attention.pages import PagedLayer

_SOURCE = Path(__file__).with_name("paged_decode.cc")
_SYMBOL = "qwq_jax_paged_decode"
COMPILERS = ("c++", "g++", "clang++")
# For this machine alone, which is why the library's name says which it is.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
# XLA's registry is the process's, refuses a second entry of a name, and cannot be asked.
_LOADING, _LOADED = threading.Lock(), threading.Event()


def attend_decode(
    q: jax.Array, layer: PagedLayer, page_table: jax.Array, kv_length: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Rows of one query each, the last token of its row; `load` comes first.

    Args:
        q: `[B, N, H]` float32.
        layer: Cache of this layer, float32, H wide.
        page_table: `[B, W]` int32.
        kv_length: `[B]` int32, tokens of each row; 0 gives an output of 0.
        scale: Factor on the scores.

    Returns:
        Output `[B, N, H]` and log-sum-exp `[B, N]`, float32.
    """
    results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    call = jax.ffi.ffi_call(_SYMBOL, results)
    out, lse = call(q, layer.kv, page_table, kv_length, scale=np.float32(scale))
    return out, lse


def serves(dtype: jnp.dtype, layer: PagedLayer) -> bool:
    """Whether the kernel takes queries of this dtype and this cache: both are float32."""
    return dtype == jnp.float32 == layer.kv.dtype and layer.scales is None


def load(directory: Path) -> None:
    """Makes the kernel known to XLA, once a process; compiles it into `directory` unless it is there.

    Raises:
        ValueError: There is no compiler, or it failed.
        OSError: The directory cannot be written, or libraries in it cannot be loaded.
    """
    with _LOADING:
        if is_loaded():
            return
        library = compile_into(directory)
        try:
            handle = ctypes.CDLL(str(library))
        except OSError:  # of another system that shares the directory, or cut off
            library.unlink()
            handle = ctypes.CDLL(str(compile_into(directory)))
        jax.ffi.register_ffi_target(_SYMBOL, jax.ffi.pycapsule(getattr(handle, _SYMBOL)), platform="cpu")
        _LOADED.set()


def is_loaded() -> bool:
    """Whether XLA knows the kernel."""
    return _LOADED.is_set()


def compile_into(directory: Path) -> Path:
    """The kernel's library in `directory`, compiled unless this source, this jaxlib and this machine have one there.

    Raises:
        ValueError: There is no compiler, or it failed; its own first word on it is in the message.
    """
    about = "\n".join([_SOURCE.read_text(), version("jaxlib"), *_FLAGS, *_machine()])
    library = directory / f"paged_decode-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ValueError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the path")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        made = Path(place) / library.name
        command = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", str(made), str(_SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            words = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            raise ValueError(f"{compiler} does not compile {_SOURCE.name}: {words}")
        # Other processes may be at the same, and see all of it or nothing.
        os.replace(made, library)
    return library


def _machine() -> tuple[str, ...]:
    """What `-march=native` goes by: a directory may be shared by machines of different kinds."""
    cpus = Path("/proc/cpuinfo")
    if not cpus.exists():
        return platform.machine(), platform.processor(), platform.node()
    lines = cpus.read_text().splitlines()
    return platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
