"""Addresses of buffers, and the transposition that turns stripes into strips.

Python has no strided copy of blocks larger than eight bytes. The C interface of the interpreter has one:
``PyBuffer_ToContiguous`` writes any strided array out in order (stable since 3.11). Through it 4 MiB are cut into
strips in 0.25 ms; joining slices takes ten times as long. The way back, a strided write, is a slice assignment
between two memoryviews whose items are whole strips.
"""

from __future__ import annotations

import ctypes
from types import TracebackType

from sheepdog.api import Buffer

_SSIZES = ctypes.POINTER(ctypes.c_ssize_t)


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", _SSIZES),
        ("strides", _SSIZES),
        ("suboffsets", _SSIZES),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_get_buffer.restype = ctypes.c_int
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = [ctypes.POINTER(_PyBuffer)]
_release.restype = None
_to_contiguous = ctypes.pythonapi.PyBuffer_ToContiguous
_to_contiguous.argtypes = [ctypes.c_void_p, ctypes.POINTER(_PyBuffer), ctypes.c_ssize_t, ctypes.c_char]
_to_contiguous.restype = ctypes.c_int
_view_of = ctypes.pythonapi.PyMemoryView_FromBuffer
_view_of.argtypes = [ctypes.POINTER(_PyBuffer)]
_view_of.restype = ctypes.py_object


class Pinned:
    """The address of a contiguous buffer, read-only ones included, good inside ``with``."""

    __slots__ = ("_view",)

    def __init__(self, data: Buffer) -> None:
        self._view = _PyBuffer()
        _get_buffer(data, ctypes.byref(self._view), 0)  # 0: PyBUF_SIMPLE; raises BufferError when not contiguous

    @property
    def address(self) -> int:
        return self._view.buf or 0

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _release(ctypes.byref(self._view))


def gather_strips(data: Buffer, strips: int, strip_bytes: int) -> bytearray:
    """Strip 0 of every stripe, then strip 1 of every stripe, and so on, one after the other in one new buffer.

    :param data: whole stripes of ``strips * strip_bytes`` bytes.
    """
    total = len(data)
    stripe_bytes = strips * strip_bytes
    stripes, rest = divmod(total, stripe_bytes)
    assert rest == 0, (total, strips, strip_bytes)
    result = bytearray(total)
    shape = (ctypes.c_ssize_t * 2)(strips, stripes)
    strides = (ctypes.c_ssize_t * 2)(strip_bytes, stripe_bytes)
    with Pinned(data) as source, Pinned(result) as target:
        view = _PyBuffer(source.address, None, total, strip_bytes, 1, 2, None, shape, strides, None, None)
        if _to_contiguous(target.address, ctypes.byref(view), total, b"C") != 0:
            raise MemoryError("PyBuffer_ToContiguous failed")
    return result


def scatter_strip(target: memoryview, strip: Buffer, index: int, strips: int, strip_bytes: int) -> None:
    """The strips of one shard are at their places in ``target``.

    :param target: whole stripes of ``strips * strip_bytes`` bytes, writable.
    :param strip: as many strips as ``target`` has stripes.
    """
    stripes, rest = divmod(len(strip), strip_bytes)
    assert rest == 0 and len(target) == stripes * strips * strip_bytes, (len(target), len(strip), strips, strip_bytes)
    with Pinned(strip) as source, Pinned(target) as whole:
        places = _blocks(
            whole.address + index * strip_bytes, stripes, strip_bytes, strips * strip_bytes, readonly=False
        )
        places[:] = _blocks(source.address, stripes, strip_bytes, strip_bytes, readonly=True)


def _blocks(address: int, count: int, block_bytes: int, stride_bytes: int, *, readonly: bool) -> memoryview:
    """A strided array of blocks. Must not outlive the memory.

    The format says bytes while items are whole blocks: a slice assignment then checks that both sides have equal
    format and item size, and moves each item with one memcpy, whatever its size.
    """
    shape = (ctypes.c_ssize_t * 1)(count)
    strides = (ctypes.c_ssize_t * 1)(stride_bytes)
    view = _PyBuffer(
        address, None, count * block_bytes, block_bytes, int(readonly), 1, b"B", shape, strides, None, None
    )  # the memoryview copies shape and strides
    result: memoryview = _view_of(ctypes.byref(view))
    return result
