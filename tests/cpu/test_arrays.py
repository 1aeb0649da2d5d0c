"""Arrays of every framework, seen without a copy, and what is refused with which remedy."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from launch import ROOT

from epcomm import Buffer, InvalidArgument, SingleGroup, UnsupportedConfig
from epcomm.arrays import (
    CPU,
    DTYPES,
    ArrayView,
    Device,
    DLPackRetyped,
    empty_aligned,
    packed_strides,
    view_dlpack,
    view_numpy,
)
from epcomm.frameworks import framework_of, framework_of_dtype

pytestmark = pytest.mark.timeout(120)

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
NAMES = [dtype.name for dtype in DTYPES]


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip("torch", reason="needs torch: pip install torch")


@pytest.fixture(scope="module")
def jax() -> ModuleType:
    return pytest.importorskip("jax", reason="needs JAX: pip install jax")


def numbers(dtype: np.dtype[Any], shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    """Return all different bit patterns of a dtype, or nearly so."""
    count = int(np.prod(shape))
    if dtype == np.bool_:
        return (np.arange(count) % 2 == 0).reshape(shape)
    raw = np.arange(1, count * dtype.itemsize + 1, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
    )


def view(array: Any, name: str = "x") -> ArrayView:
    return framework_of(array, name).view(array, name)


def empty(framework: Any, shape: tuple[int, ...], dtype: Any, device: Device = CPU) -> ArrayView:
    """Return a framework's new memory, for use on the current stream."""
    made: ArrayView = framework.empty(shape, np.dtype(dtype), device, None)
    return made


# --- views ----------------------------------------------------------------------------------------


def test_packed_strides() -> None:
    assert packed_strides((), np.dtype(np.int32)) == ()
    assert packed_strides((5,), np.dtype(np.int32)) == (4,)
    assert packed_strides((2, 3, 4), BF16) == (24, 8, 2)


def test_device() -> None:
    assert (str(CPU), str(Device("cuda", 3))) == ("cpu", "cuda:3")
    assert Device("cpu") == CPU


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_numpy_view(dtype: np.dtype[Any]) -> None:
    array = numbers(dtype)
    seen = view(array)
    assert (seen.ptr, seen.shape, seen.strides) == (array.ctypes.data, (3, 4), array.strides)
    assert (seen.dtype, seen.device, seen.is_readonly) == (dtype, CPU, False)
    assert seen.num_bytes == array.nbytes
    assert seen.is_contiguous
    assert seen.numpy() is array
    assert framework_of(array, "x").finish(seen) is array


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a[::2],
        lambda a: a[:, 1:3],
        lambda a: a.T,
        lambda a: a[::-1],
        lambda a: a[1:3],
        lambda a: a[:1, :],
        lambda a: a[:1, ::2],
        lambda a: a[:, :1],
        lambda a: a[:, :1].T,
        lambda a: a[:0, ::2],
        lambda a: a[1],
        lambda a: a[1:2, 2:3],
        lambda a: a[:, None, :],
        lambda a: np.asarray(a[1, 2]),
        lambda a: np.broadcast_to(a[:1], (5, 6)),
    ],
)
def test_strides(make: Any) -> None:
    array = make(np.arange(24, dtype=np.int32).reshape(4, 6))
    seen = view_numpy(array)
    assert seen.is_contiguous == bool(array.flags.c_contiguous)
    np.testing.assert_array_equal(seen.numpy(), array)


def test_read_only() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    assert view(array).is_readonly


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_memory_without_its_array(dtype: np.dtype[Any]) -> None:
    """A view that was turned, as of the scales of low latency, is the same memory."""
    array = numbers(dtype, (2, 3, 4))
    turned = ArrayView(
        ptr=array.ctypes.data,
        shape=(2, 4, 3),
        strides=(array.strides[0], array.strides[2], array.strides[1]),
        dtype=dtype,
        device=CPU,
        is_readonly=True,
        owner=array,
    )
    found = turned.numpy()
    assert same_bits(found, array.transpose(0, 2, 1))
    assert found.ctypes.data == array.ctypes.data
    assert not found.flags.writeable
    watch = weakref.ref(array)
    del array, turned
    gc.collect()
    assert watch() is not None
    del found
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 16), (3, 0), (5, 33)])
@pytest.mark.parametrize("dtype", [np.dtype(np.int64), BF16, E4M3, np.dtype(np.bool_)])
def test_aligned_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    for alignment in (16, 64, 4096):
        array = empty_aligned(shape, dtype, alignment)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.size == 0 or array.ctypes.data % alignment == 0


# --- DLPack ---------------------------------------------------------------------------------------


class Foreign:
    """An array of an unknown framework: nothing but DLPack.

    Args:
        array: What it holds.
        versioned: Whether it makes capsules of DLPack 1.0.
        knows_version: Whether its ``__dlpack__`` takes max_version at all.
    """

    def __init__(self, array: Any, versioned: bool = True, knows_version: bool = True) -> None:
        self.array = array
        self._versioned = versioned
        self._knows_version = knows_version

    def __dlpack__(self, **options: Any) -> Any:
        if not self._knows_version and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        if not self._versioned:
            options["max_version"] = (0, 8)
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def capsule_name(capsule: Any) -> bytes:
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    return get_name(capsule)


PRODUCERS = {
    "versioned": {"versioned": True},
    "unversioned": {"versioned": False},
    "before-1.0": {"versioned": False, "knows_version": False},
}
NUMPYS_OWN = [dtype for dtype in DTYPES if dtype.kind in "biuf" and dtype.isbuiltin == 1]


def test_producers_make_the_capsules_that_they_should() -> None:
    array = np.zeros(3)
    if capsule_name(Foreign(array).__dlpack__(max_version=(1, 0))) != b"dltensor_versioned":
        pytest.skip("this NumPy knows no versioned capsules")
    plain = Foreign(array, versioned=False).__dlpack__(max_version=(1, 0))
    assert capsule_name(plain) == b"dltensor"
    with pytest.raises(TypeError):
        Foreign(array, knows_version=False).__dlpack__(max_version=(1, 0))


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("dtype", NUMPYS_OWN, ids=[dtype.name for dtype in NUMPYS_OWN])
def test_dlpack_view(producer: str, dtype: np.dtype[Any]) -> None:
    array = numbers(dtype)
    foreign = Foreign(array, **PRODUCERS[producer])
    seen = view(foreign)
    assert framework_of(foreign, "x").name == "dlpack"
    assert (seen.ptr, seen.shape, seen.strides) == (array.ctypes.data, (3, 4), array.strides)
    assert (seen.dtype, seen.device, seen.is_readonly) == (dtype, CPU, False)
    assert same_bits(seen.numpy(), array)
    assert seen.numpy().ctypes.data == array.ctypes.data


def test_dlpack_strides_and_offset() -> None:
    array = np.arange(48, dtype=np.int16).reshape(6, 8)[1::2, ::-2]
    seen = view(Foreign(array))
    assert seen.strides == array.strides
    assert not seen.is_contiguous
    np.testing.assert_array_equal(seen.numpy(), array)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 0)])
def test_dlpack_odd_shapes(shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)
    seen = view(Foreign(array))
    assert seen.shape == shape
    np.testing.assert_array_equal(seen.numpy(), array)


def test_dlpack_read_only() -> None:
    array = np.ones((2, 2), np.float32)
    array.flags.writeable = False
    try:
        Foreign(array).__dlpack__(max_version=(1, 0))
    except (TypeError, BufferError):
        pytest.skip("this NumPy exports no read-only arrays")
    seen = view(Foreign(array))
    assert seen.is_readonly
    assert not seen.numpy().flags.writeable
    with pytest.raises(InvalidArgument, match="cannot be exported through DLPack"):
        view(Foreign(array, versioned=False))


@pytest.mark.parametrize("producer", PRODUCERS)
def test_dlpack_keeps_the_memory_and_lets_it_go(producer: str) -> None:
    class Watched(np.ndarray):
        """An array that can be watched being collected."""

    array = np.arange(12, dtype=np.float32).view(Watched)
    watch = weakref.ref(array)
    foreign = Foreign(array, **PRODUCERS[producer])
    seen = view(foreign)
    foreign.array = None  # nothing but the capsule holds the memory now
    del array
    gc.collect()
    found = seen.numpy()
    np.testing.assert_array_equal(found, np.arange(12))
    del seen, foreign
    gc.collect()
    np.testing.assert_array_equal(found, np.arange(12))
    del found
    gc.collect()
    assert watch() is None


def test_dlpack_does_not_leak_capsules() -> None:
    array = np.zeros(4)
    foreign = Foreign(array)
    before = sys.getrefcount(array)
    for _ in range(100):
        view(foreign).numpy()
    gc.collect()
    assert sys.getrefcount(array) == before


def test_dlpack_of_what_epcomm_does_not_carry() -> None:
    with pytest.raises(InvalidArgument) as caught:
        view(Foreign(np.zeros(3, complex)), "x")
    assert "x has DLPack type code 5 with 128 bits and 1 lanes" in str(caught.value)
    assert "epcomm takes bool, integers, f16, bf16, f32, f64 and fp8" in str(caught.value)


def test_dlpack_that_does_not_export_itself() -> None:
    class Broken:
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("this array is borrowed")

    with pytest.raises(InvalidArgument, match="x cannot be exported through DLPack: this array"):
        view(Broken(), "x")


class Elsewhere:
    """An array that says it is on another device; its capsule is one of NumPy's, changed."""

    def __init__(self, array: np.ndarray, device_type: int) -> None:
        self._capsule = Foreign(array, versioned=False).__dlpack__(max_version=(0, 8))
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = get(self._capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        ctypes.c_int32.from_address(address).value = device_type

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule


def test_dlpack_on_an_unknown_device() -> None:
    opencl = Elsewhere(np.zeros(3, np.float32), 4)
    with pytest.raises(InvalidArgument, match="x is on DLPack device type 4; epcomm takes CPU"):
        view(opencl, "x")


@pytest.mark.parametrize("device_type", [1, 3])
def test_dlpack_on_the_host(device_type: int) -> None:
    assert view(Elsewhere(np.zeros(3, np.float32), device_type)).device == CPU


def test_arrays_on_a_gpu_are_refused_by_the_host_engine() -> None:
    buffer = Buffer(SingleGroup())
    idx, weights = np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32)
    x = Elsewhere(np.zeros((3, 8), np.float32), 2)
    with pytest.raises(InvalidArgument) as caught:
        buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=1)
    assert "x is on cuda:0, but this Buffer works on cpu" in str(caught.value)
    assert "engine='cuda', device=0" in str(caught.value)
    assert "engine='host', device=0" in str(caught.value)


def test_dlpack_is_asked_of_every_object() -> None:
    """Other than a framework's arrays, objects of one type need not be alike."""

    class Maybe:
        pass

    exporting = Maybe()
    exporting.__dlpack__ = Foreign(np.arange(3)).__dlpack__  # type: ignore[attr-defined]
    assert framework_of(exporting, "x").name == "dlpack"
    with pytest.raises(InvalidArgument, match="x is a Maybe"):
        framework_of(Maybe(), "x")


def test_dlpack_class_is_no_array() -> None:
    with pytest.raises(InvalidArgument):
        view(Foreign, "x")


@pytest.mark.parametrize("wrong", [None, 3, 2.5, "x", b"x", [1, 2], {}, object(), memoryview(b"")])
def test_what_is_no_array(wrong: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        framework_of(wrong, "rows")
    kind = "None" if wrong is None else f"a {type(wrong).__name__}"
    assert str(caught.value).startswith(f"rows is {kind}; it must be a NumPy")
    assert "__dlpack__" in str(caught.value)


# --- NumPy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [">i8", ">f4", ">u2"])
def test_byte_order(dtype: str) -> None:
    array = np.ones((2, 8), dtype)
    with pytest.raises(InvalidArgument) as caught:
        view(array, "x")
    assert f"x has byte order {dtype}" in str(caught.value)
    assert "x.astype(x.dtype.newbyteorder('='))" in str(caught.value)
    native = array.astype(array.dtype.newbyteorder("="))
    np.testing.assert_array_equal(view(native).numpy(), array)


def test_numpy_output() -> None:
    framework = framework_of(np.zeros(1), "x")
    made = empty(framework, (3, 5), BF16)
    assert (made.shape, made.dtype, made.is_readonly) == ((3, 5), BF16, False)
    assert made.ptr % 64 == 0
    assert framework.finish(made).ctypes.data == made.ptr
    with pytest.raises(InvalidArgument, match=r"no memory on cuda:1; pass CuPy arrays there"):
        empty(framework, (3,), BF16, Device("cuda", 1))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(np.float32, np.float32), ("int8", np.int8), (BF16, BF16), (np.dtype("u2"), np.uint16)],
)
def test_framework_of_numpy_dtype(dtype: Any, wanted: Any) -> None:
    framework, found = framework_of_dtype(dtype, CPU)
    assert (framework.name, found) == ("numpy", np.dtype(wanted))


@pytest.mark.parametrize("dtype", ["rows", 7, object()])
def test_framework_of_no_dtype(dtype: Any) -> None:
    with pytest.raises(InvalidArgument, match="pass a NumPy or a torch dtype"):
        framework_of_dtype(dtype, CPU)


# --- torch ----------------------------------------------------------------------------------------


def torch_of(torch: ModuleType, dtype: np.dtype[Any]) -> Any:
    from epcomm.frameworks.torch import _TORCH_OF_NUMPY

    return _TORCH_OF_NUMPY[dtype]


def torch_numbers(torch: ModuleType, dtype: np.dtype[Any], shape: tuple[int, ...] = (3, 4)) -> Any:
    raw = torch.from_numpy(numbers(dtype, shape).view(np.uint8).copy())
    return raw.view(torch_of(torch, dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_torch_view(torch: ModuleType, dtype: np.dtype[Any]) -> None:
    tensor = torch_numbers(torch, dtype)
    seen = view(tensor)
    assert framework_of(tensor, "x").name == "torch"
    assert (seen.ptr, seen.shape, seen.dtype) == (tensor.data_ptr(), (3, 4), dtype)
    assert (seen.device, seen.is_readonly, seen.is_contiguous) == (CPU, False, True)
    assert same_bits(seen.numpy(), numbers(dtype))
    assert seen.numpy().ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_torch_output(torch: ModuleType, dtype: np.dtype[Any]) -> None:
    """What is written to the view is in the tensor: no copy; also for memory of a slab."""
    framework = framework_of(torch.zeros(1), "x")
    made = empty(framework, (3, 4), dtype)
    made.numpy()[...] = numbers(dtype)
    tensor = framework.finish(made)
    assert tensor.dtype == torch_of(torch, dtype)
    assert tensor.data_ptr() == made.ptr
    assert same_bits(view(tensor).numpy(), numbers(dtype))
    memory = numbers(dtype).copy()
    tensor = framework.finish(view_numpy(memory))
    assert tensor.dtype == torch_of(torch, dtype)
    assert tensor.data_ptr() == memory.ctypes.data
    assert same_bits(view(tensor).numpy(), memory)


def test_torch_every_dtype_has_a_partner(torch: ModuleType) -> None:
    assert len({torch_of(torch, dtype) for dtype in DTYPES}) == len(DTYPES)
    for dtype in DTYPES:
        framework, found = framework_of_dtype(torch_of(torch, dtype), CPU)
        assert (framework.name, found) == ("torch", dtype)
    with pytest.raises(InvalidArgument, match=r"dtype has dtype torch.complex64, which epcomm"):
        framework_of_dtype(torch.complex64, CPU)


def test_torch_strides(torch: ModuleType) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    for part in (tensor.T, tensor[::2], tensor[:, 1:3], tensor[1], tensor.expand(2, 4, 6)):
        seen = view(part)
        assert seen.is_contiguous == part.is_contiguous()
        np.testing.assert_array_equal(seen.numpy(), part.numpy())
        assert seen.ptr == part.data_ptr()


def test_torch_turned_output(torch: ModuleType) -> None:
    framework = framework_of(torch.zeros(1), "x")
    made = empty(framework, (2, 3, 4), np.dtype(np.float32))
    made.numpy()[...] = np.arange(24).reshape(2, 3, 4)
    turned = ArrayView(
        made.ptr,
        (2, 4, 3),
        (made.strides[0], made.strides[2], made.strides[1]),
        made.dtype,
        CPU,
        False,
        made.owner,
    )
    tensor = framework.finish(turned)
    assert (tuple(tensor.shape), tensor.stride()) == ((2, 4, 3), (12, 1, 4))
    assert tensor.data_ptr() == made.ptr
    np.testing.assert_array_equal(tensor.numpy(), made.numpy().transpose(0, 2, 1))


@pytest.mark.parametrize(("first", "num_rows"), [(0, 3), (0, 0), (1, 2)])
def test_torch_rows_of_an_output(torch: ModuleType, first: int, num_rows: int) -> None:
    """They are a tensor of their own, which torch lets callers write in place anywhere."""
    framework = framework_of(torch.zeros(1), "x")
    made = empty(framework, (4, 3), np.dtype(np.float32))
    made.numpy()[...] = np.arange(12).reshape(4, 3)
    rows = made._replace(ptr=made.ptr + first * made.strides[0], shape=(num_rows, 3))
    tensor = framework.finish(rows)
    np.testing.assert_array_equal(tensor.numpy(), made.numpy()[first : first + num_rows])
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    del made, rows
    tensor += 1


def test_torch_empty_shapes(torch: ModuleType) -> None:
    framework = framework_of(torch.zeros(1), "x")
    for shape in ((0, 4), (3, 0), (0,)):
        made = empty(framework, shape, BF16)
        assert tuple(framework.finish(made).shape) == shape
        assert view(torch.zeros(shape)).numpy().shape == shape


def test_torch_requires_grad(torch: ModuleType) -> None:
    tensor = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(InvalidArgument) as caught:
        view(tensor, "x")
    assert "x requires grad" in str(caught.value)
    assert "torch.no_grad()" in str(caught.value)
    assert "autograd.Function" in str(caught.value)
    assert "x.detach()" in str(caught.value)
    assert view(tensor.detach()).ptr == tensor.data_ptr()
    with torch.no_grad():
        assert view(tensor).ptr == tensor.data_ptr()
    with pytest.raises(InvalidArgument, match="requires grad"):
        view(tensor * 2, "x")


def test_torch_grad_is_refused_by_the_buffer(torch: ModuleType) -> None:
    buffer = Buffer(SingleGroup())
    x = torch.ones(3, 8, requires_grad=True)
    idx, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(InvalidArgument, match=r"pass x.detach\(\)"):
        buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=1)
    with pytest.raises(InvalidArgument, match=r"pass topk_weights.detach\(\)"):
        buffer.dispatch(
            x.detach(),
            topk_idx=idx,
            topk_weights=weights.requires_grad_(),
            num_experts=1,
        )
    with torch.no_grad():
        recv, *_ = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=1)
    assert torch.equal(recv, x.detach())
    assert not recv.requires_grad


def test_torch_wrong_device_and_layout(torch: ModuleType) -> None:
    for tensor, shown in (
        (torch.zeros(2, 4, device="meta"), "torch.strided tensor on meta"),
        (torch.eye(4).to_sparse(), "torch.sparse_coo tensor on cpu"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            view(tensor, "x")
        assert f"x is a {shown}; epcomm takes strided tensors on cpu and cuda" in str(caught.value)


def test_torch_without_memory(torch: ModuleType) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def refuse(tensor: Any) -> Any:
        with pytest.raises(InvalidArgument, match="x has no memory: this call stands inside vmap"):
            view(tensor, "x")
        return tensor

    with FakeTensorMode():
        refuse(torch.zeros(2, 4))
    torch.vmap(refuse)(torch.zeros(2, 4))
    nested = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    with pytest.raises(InvalidArgument, match="x is a nested tensor on cpu"):
        view(nested, "x")
    assert view(torch.zeros(0, 4)).shape == (0, 4)


def test_torch_lazy_views_and_complex(torch: ModuleType) -> None:
    negated = torch._neg_view(torch.ones(3))
    with pytest.raises(InvalidArgument, match=r"x is a lazy view; pass x.resolve_neg\(\)"):
        view(negated, "x")
    np.testing.assert_array_equal(view(negated.resolve_neg()).numpy(), [-1, -1, -1])
    with pytest.raises(InvalidArgument, match=r"complex64, which epcomm does not carry"):
        view(torch.zeros(3, dtype=torch.complex64), "x")


# --- JAX ------------------------------------------------------------------------------------------

JAX_DTYPES = [dtype for dtype in DTYPES if dtype.itemsize < 8]


@pytest.mark.parametrize("dtype", JAX_DTYPES, ids=[dtype.name for dtype in JAX_DTYPES])
def test_jax_view(jax: ModuleType, dtype: np.dtype[Any]) -> None:
    array = jax.numpy.asarray(numbers(dtype))
    seen = view(array)
    assert framework_of(array, "x").name == "jax"
    assert (seen.shape, seen.dtype, seen.device) == ((3, 4), dtype, CPU)
    assert seen.is_readonly
    assert seen.is_contiguous
    assert seen.ptr == array.unsafe_buffer_pointer()
    assert same_bits(seen.numpy(), numbers(dtype))


@pytest.mark.parametrize("dtype", JAX_DTYPES, ids=[dtype.name for dtype in JAX_DTYPES])
def test_jax_output(jax: ModuleType, dtype: np.dtype[Any]) -> None:
    framework = framework_of(jax.numpy.zeros(1), "x")
    made = empty(framework, (3, 4), dtype)
    made.numpy()[...] = numbers(dtype)
    array = framework.finish(made)
    assert isinstance(array, jax.Array)
    assert array.dtype == dtype
    assert array.unsafe_buffer_pointer() == made.ptr, "copied"
    assert same_bits(np.asarray(array), numbers(dtype))
    address = made.ptr
    del made
    gc.collect()
    assert same_bits(np.asarray(array), numbers(dtype))
    assert array.unsafe_buffer_pointer() == address


def test_jax_64_bit_values_keep_their_bits(jax: ModuleType) -> None:
    framework = framework_of(jax.numpy.zeros(1), "x")
    for dtype in (np.int64, np.uint64, np.float64):
        made = empty(framework, (2, 3), np.dtype(dtype))
        made.numpy()[...] = numbers(np.dtype(dtype), (2, 3))
        found = framework.finish(made)
        assert same_bits(np.asarray(found), numbers(np.dtype(dtype), (2, 3)))


def test_jax_with_x64(jax: ModuleType) -> None:
    with jax.enable_x64(True):
        framework = framework_of(jax.numpy.zeros(1), "x")
        made = empty(framework, (2, 3), np.dtype(np.int64))
        made.numpy()[...] = 1 << 40
        found = framework.finish(made)
        assert isinstance(found, jax.Array)
        assert (np.asarray(found) == 1 << 40).all()
        array = jax.numpy.full((3,), 1 << 40)
        assert (view(array).dtype, view(array).numpy()[0]) == (np.int64, 1 << 40)


def test_jax_turned_output(jax: ModuleType) -> None:
    framework = framework_of(jax.numpy.zeros(1), "x")
    made = empty(framework, (2, 3, 4), np.dtype(np.float32))
    made.numpy()[...] = np.arange(24).reshape(2, 3, 4)
    strides = (made.strides[0], made.strides[2], made.strides[1])
    turned = ArrayView(made.ptr, (2, 4, 3), strides, made.dtype, CPU, False, made.owner)
    np.testing.assert_array_equal(
        np.asarray(framework.finish(turned)), made.numpy().transpose(0, 2, 1)
    )


@pytest.mark.parametrize("wrap", ["jit", "vmap", "grad"])
def test_jax_tracer(jax: ModuleType, wrap: str) -> None:
    def inside(array: Any) -> Any:
        with pytest.raises(InvalidArgument) as caught:
            view(array, "x")
        assert "x is a tracer: this call stands inside jit, grad or vmap" in str(caught.value)
        assert "Call epcomm outside, on concrete arrays" in str(caught.value)
        return array.sum()

    getattr(jax, wrap)(inside)(jax.numpy.ones((2, 4)))


def test_jax_closed_over_tracer_is_refused_by_the_buffer(jax: ModuleType) -> None:
    buffer = Buffer(SingleGroup())
    idx = np.zeros((2, 1), np.int64)

    @jax.jit
    def step(x: Any) -> Any:
        return buffer.dispatch(
            x, topk_idx=idx, topk_weights=np.ones((2, 1), np.float32), num_experts=1
        )[0]

    with pytest.raises(InvalidArgument, match="x is a tracer"):
        step(jax.numpy.ones((2, 8)))


def test_jax_deleted(jax: ModuleType) -> None:
    array = jax.numpy.ones((2, 4)) + 1
    array.delete()
    with pytest.raises(InvalidArgument, match="x was donated or deleted; pass a live array"):
        view(array, "x")


def test_jax_donated(jax: ModuleType) -> None:
    array = jax.numpy.ones((2, 4)) + 1
    jax.jit(lambda a: a * 2, donate_argnums=0)(array)
    if not array.is_deleted():
        pytest.skip("this JAX does not donate on the CPU")
    with pytest.raises(InvalidArgument, match="donated or deleted"):
        view(array, "x")


def test_jax_spread_over_devices(jax: ModuleType) -> None:
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    program = """
import jax, numpy as np, pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from epcomm import InvalidArgument
from epcomm.frameworks import framework_of
mesh = Mesh(np.array(jax.devices()), ("rank",))
array = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, PartitionSpec("rank")))
with pytest.raises(InvalidArgument) as caught:
    framework_of(array, "x").view(array, "x")
assert "x is spread over 2 devices; pass the shard of this rank" in str(caught.value)
assert "x.addressable_shards[i].data" in str(caught.value)
shard = array.addressable_shards[1].data
assert framework_of(shard, "x").view(shard, "x").ptr == shard.unsafe_buffer_pointer()
print("checked")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "checked\n", done.stderr


def test_jax_pending_result_is_waited_for(jax: ModuleType) -> None:
    rows = jax.numpy.ones((1500, 1500)) / 1500
    found = view(rows @ rows @ rows).numpy()
    np.testing.assert_allclose(found, 1 / 1500, rtol=1e-4)


@pytest.mark.parametrize("dtype", [d for d in JAX_DTYPES if d.itemsize == 1], ids=str)
def test_jax_adopts_bytes_of_another_dtype(jax: ModuleType, dtype: np.dtype[Any]) -> None:
    """As rows of fp8 on a GPU do, whose memory is CuPy's, which knows no fp8."""
    memory = np.zeros((3, 64), np.uint8)
    array = jax.dlpack.from_dlpack(DLPackRetyped(memory, dtype))
    assert array.dtype == dtype
    if memory.ctypes.data % 64 == 0:  # JAX copies what is not aligned
        assert array.unsafe_buffer_pointer() == memory.ctypes.data
    np.testing.assert_array_equal(np.asarray(array), memory.view(dtype))


def test_jax_outputs_are_never_copies(jax: ModuleType) -> None:
    """What a hook fills later must be the memory that the array shows."""
    made = framework_of(jax.numpy.ones(1), "x").empty((3, 5), np.dtype(np.float32), CPU, None)
    turned = made._replace(shape=(5, 3), strides=(4, 20))
    finish = framework_of(jax.numpy.ones(1), "x").finish
    arrays = finish(made), finish(turned)
    made.numpy()[...] = np.arange(15).reshape(3, 5)
    for array, want in zip(arrays, (made.numpy(), made.numpy().T), strict=True):
        np.testing.assert_array_equal(np.asarray(array), want)
    odd = np.zeros(64, np.uint8)[1:17]  # JAX copies what is not aligned
    with pytest.raises(UnsupportedConfig, match=r"copied an output of uint8\[16\] in place"):
        finish(view_numpy(odd))


def test_jax_is_never_written_by_name(jax: ModuleType) -> None:
    """What callers pass to be written must be NumPy's; hooks fill what epcomm made."""
    buffer = Buffer(SingleGroup())
    x = jax.numpy.ones((2, 128), jax.numpy.bfloat16)
    idx = jax.numpy.zeros((2, 1), jax.numpy.int32)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, 4, 1, use_fp8=False)
    assert isinstance(recv, jax.Array)
    assert count.tolist() == [2]
    to_fill = buffer.get_next_low_latency_combine_buffer(handle)
    assert type(to_fill) is np.ndarray
    with pytest.raises(InvalidArgument, match=r"is read-only.*JAX arrays never are"):
        buffer.low_latency_dispatch(
            x, idx, 4, 1, cumulative_local_expert_recv_stats=jax.numpy.zeros(1, "int32")
        )
    weights = jax.numpy.ones((2, 1))
    with pytest.raises(InvalidArgument, match="out is read-only"):
        buffer.low_latency_combine(recv, idx, weights, handle, out=x)


# --- through a Buffer -----------------------------------------------------------------------------


@pytest.fixture
def buffer() -> Any:
    made = Buffer(SingleGroup())
    yield made
    made.destroy()


def round_trip(buffer: Buffer, x: Any) -> tuple[Any, Any]:
    """Dispatch to this one rank and combine where the dtype can be summed."""
    num_tokens = len(x)
    idx, weights = np.zeros((num_tokens, 1), np.int64), np.ones((num_tokens, 1), np.float32)
    recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=1)
    return recv, handle


ROW = (3, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_numpy_round_trip(buffer: Buffer, dtype: np.dtype[Any]) -> None:
    x = numbers(dtype, ROW)
    x.flags.writeable = False
    recv, _ = round_trip(buffer, x)
    assert type(recv) is np.ndarray
    assert recv.flags.writeable
    assert same_bits(recv, x)
    assert not np.shares_memory(recv, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_torch_round_trip(buffer: Buffer, torch: ModuleType, dtype: np.dtype[Any]) -> None:
    x = torch_numbers(torch, dtype, ROW)
    recv, _ = round_trip(buffer, x)
    assert isinstance(recv, torch.Tensor)
    assert recv.dtype == x.dtype
    assert same_bits(view(recv).numpy(), numbers(dtype, ROW))


@pytest.mark.parametrize("dtype", JAX_DTYPES, ids=[dtype.name for dtype in JAX_DTYPES])
def test_jax_round_trip(buffer: Buffer, jax: ModuleType, dtype: np.dtype[Any]) -> None:
    x = jax.numpy.asarray(numbers(dtype, ROW))
    recv, _ = round_trip(buffer, x)
    assert isinstance(recv, jax.Array)
    assert same_bits(np.asarray(recv), numbers(dtype, ROW))


@pytest.mark.parametrize("producer", PRODUCERS)
def test_dlpack_round_trip(buffer: Buffer, producer: str) -> None:
    class Rows(Foreign):
        def __len__(self) -> int:
            return len(self.array)

    x = numbers(np.dtype(np.float32), ROW)
    recv, handle = round_trip(buffer, Rows(x, **PRODUCERS[producer]))
    assert type(recv) is np.ndarray
    assert same_bits(recv, x)
    combined, _, _ = buffer.combine(Foreign(recv, **PRODUCERS[producer]), handle)
    np.testing.assert_array_equal(combined, x)


def test_frameworks_may_be_mixed(buffer: Buffer, torch: ModuleType) -> None:
    """What comes out is of the framework of x."""
    x = torch.ones(4, 8)
    idx, weights = np.zeros((4, 1), np.int32), torch.ones(4, 1)
    recv, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, num_experts=1
    )
    assert all(isinstance(a, torch.Tensor) for a in (recv, recv_idx, recv_weights))
    combined, _, _ = buffer.combine(recv.numpy(), handle, bias=torch.ones(4, 8))
    assert type(combined) is np.ndarray
    assert (combined == 2).all()
    pair = torch.ones(4, 16, dtype=torch.uint8), np.ones((4, 2), np.float32)
    (data, scales), *_ = buffer.dispatch(pair, topk_idx=idx, topk_weights=weights, num_experts=1)
    assert isinstance(data, torch.Tensor)
    assert isinstance(scales, torch.Tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_local_buffer_tensor_is_the_slab(dtype: Any) -> None:
    buffer = Buffer(SingleGroup(), num_nvl_bytes=4096)
    whole = buffer.get_local_buffer_tensor(np.uint8)
    part = buffer.get_local_buffer_tensor(dtype, (2, 3), offset=64)
    assert part.ctypes.data == whole.ctypes.data + 64
    assert (part.shape, part.dtype) == ((2, 3), dtype)
    part[...] = 1
    assert whole[64 : 64 + part.nbytes].any()
    everything = buffer.get_local_buffer_tensor(dtype)
    assert (everything.size, everything.dtype) == (4096 // dtype.itemsize, dtype)
    assert everything.ctypes.data == whole.ctypes.data


def test_local_buffer_tensor_in_torch(torch: ModuleType) -> None:
    buffer = Buffer(SingleGroup(), num_nvl_bytes=4096)
    tensor = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size((4, 8)), offset=32)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (4, 8))
    assert tensor.data_ptr() == buffer.get_local_buffer_tensor(np.uint8).ctypes.data + 32
    buffer.destroy()
    del buffer
    gc.collect()
    tensor.fill_(3)
    assert (tensor == 3).all()


def test_view_dlpack_of_torch(torch: ModuleType) -> None:
    """Every dtype that torch exports is read as what it is."""
    for dtype in DTYPES:
        tensor = torch_numbers(torch, dtype)
        try:
            tensor.__dlpack__(max_version=(1, 1))
        except (BufferError, RuntimeError, TypeError):
            continue
        seen = view_dlpack(tensor, "x")
        assert seen.dtype == dtype
        assert seen.ptr == tensor.data_ptr()
        assert same_bits(seen.numpy(), numbers(dtype))


def test_view_dlpack_of_jax(jax: ModuleType) -> None:
    for dtype in JAX_DTYPES:
        array = jax.numpy.asarray(numbers(dtype))
        try:
            array.__dlpack__(max_version=(1, 1))
        except (BufferError, RuntimeError, TypeError, ValueError):
            continue
        seen = view_dlpack(array, "x")
        assert seen.dtype == dtype
        assert same_bits(seen.numpy(), numbers(dtype))
