"""A fake GPU: tensors that claim to be on `cuda:0` (or `mps:0`), computed on the CPU.

PyTorch raises an error if an operation mixes devices, if a tensor on a GPU is read as a NumPy
array, or if a generator belongs to another device. Without a GPU, no test sees such mistakes.
Inside `fake_gpu()`, each tensor's storage has a device, and every operation is checked before it
runs on the CPU. The numbers are real, so whole commands can run. It also records where the CPU
would wait for the GPU, and Apple's has no float64.

It does not see kernels, streams or memory, compiled code, or devices that C++ code compares.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
APPLE_GPU = torch.device("mps", 0)
DEVICE: Any = Tensor.device.__get__  # type: ignore[attr-defined]
IS_CUDA: Any = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
aten = torch.ops.aten
COPY = aten.copy_.default
# The value or the indices may be of the CPU.
MIXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten.fill_.Tensor}
MIXED |= {aten._index_put_impl_.default, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
# A GPU is waited for: the CPU needs the values, or the size of the result depends on them.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
WAITS |= {aten._unique2.default, aten.repeat_interleave.Tensor, aten.bincount.default}
WAITS |= {aten.equal.default, aten.is_nonzero.default}


# What PyTorch asks of a GPU that is there.
CUDA = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.set_device": lambda device: None,
    "torch.cuda.synchronize": lambda *device: None,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.get_device_name": lambda *device: "a GPU that is none",
    "torch.cuda.get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
    "torch.cuda.set_rng_state": lambda *state: None,
    "torch.cuda.current_stream": mock.MagicMock(),
    "torch.cuda.max_memory_allocated": lambda *device: 0,
    "torch.cuda.reset_peak_memory_stats": lambda *device: None,
    "torch.cuda.is_initialized": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.get_device_properties": lambda *device: mock.Mock(major=8, total_memory=80 * 10**9),
}
MPS = {
    "torch.backends.mps.is_available": lambda: True,
    "torch.mps.synchronize": lambda: None,
    "torch.mps.empty_cache": lambda: None,
    "torch.mps.get_rng_state": lambda: torch.zeros(16, dtype=torch.uint8),
    "torch.mps.set_rng_state": lambda state: None,
    "torch.mps.driver_allocated_memory": lambda: 0,
}


class Devices(TorchDispatchMode):
    """Knows which tensors are on the GPU. Raises RuntimeError where an operation mixes devices, and
    TypeError for a type that the GPU does not have.

    gpu: the device.
    waits: operations so far in which the CPU waits for the GPU.
    """

    def __init__(self, gpu: torch.device) -> None:
        super().__init__()
        self.gpu = gpu
        # References that do not keep what they refer to, but its address.
        self.on_gpu: dict[int, StorageWeakRef] = {}
        self.waits: list[str] = []

    def has(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            meta = tensor.is_meta
            return not meta and tensor.untyped_storage()._cdata in self.on_gpu

    def move(self, found: Any, to_gpu: bool) -> Any:
        """Say that the tensors are on the GPU, or that they are not."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors_of(found):
                if tensor.is_meta:
                    continue
                storage = tensor.untyped_storage()
                if to_gpu and self.gpu.type == "mps" and tensor.dtype == torch.float64:
                    raise TypeError("the MPS framework doesn't support float64")
                if to_gpu:
                    self.on_gpu[storage._cdata] = StorageWeakRef(storage)
                else:
                    self.on_gpu.pop(storage._cdata, None)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = tensors_of((args, kwargs))
            here = [tensor for tensor in given if self.has(tensor)]
            if not here:
                return func(*args, **kwargs)
            self._check(func, given, here, kwargs.get("generator"))
            if func in WAITS or (func in MIXED and _by_mask(args)):
                self.waits.append(str(func))
            if func is COPY:  # which leaves the tensor that it fills where it is
                return func(*args, **kwargs)
            return self.move(func(*args, **kwargs), True)

    def _check(self, func: Any, given: list[Tensor], here: list[Tensor], generator: Any) -> None:
        if generator is not None:
            raise RuntimeError(f"{func}: Expected a '{self.gpu}' generator, found 'cpu'")
        others = [tensor for tensor in given if not self.has(tensor)]
        if not others or func is COPY:
            return
        numbers = all(tensor.ndim == 0 for tensor in others)
        if numbers and torch.Tag.pointwise in func.tags:
            return
        if func in MIXED and self.has(given[0]):
            return
        shapes = [list(tensor.shape) for tensor in given]
        raise RuntimeError(f"{func}: tensors on {self.gpu} and on the CPU, of shapes {shapes}")


def _by_mask(args: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_of(args[1]))


class Calls(TorchFunctionMode):
    """Lets Python see the devices, and sends calls that name the GPU to the CPU."""

    def __init__(self, devices: Devices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        devices, first = self.devices, args[0] if args else None
        if isinstance(first, Tensor):
            here = devices.has(first)
            if here and func == DEVICE:
                return devices.gpu
            if func == IS_CUDA:
                return here and devices.gpu.type == "cuda"
            if func in (Tensor.numpy, Tensor.__array__) and here:
                raise TypeError(f"can't convert {devices.gpu} device type tensor to numpy")
            if func is Tensor.pin_memory:
                return first
            if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
                return self._to(func, here, args, kwargs)
            if func in (Tensor.__deepcopy__, Tensor.new_tensor) and here:
                return devices.move(func(*args, **kwargs), True)
        if named := kwargs.get("device"):
            to_gpu = torch.device(named).type == devices.gpu.type
            if to_gpu:
                kwargs["device"] = torch.device("cpu")
            if kwargs.get("generator") is not None and to_gpu:
                raise RuntimeError(f"{func}: Expected a '{devices.gpu}' generator")
            return devices.move(func(*args, **kwargs), to_gpu)
        return func(*args, **kwargs)

    def _to(self, func: Any, here: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """`Tensor.to`, `cpu` and `cuda`."""
        wanted, rest, gpu = None, [], self.devices.gpu
        for value in args[1:]:
            if isinstance(value, (torch.device, str)):
                wanted = torch.device(value)
            elif isinstance(value, Tensor):
                wanted, rest = (gpu if self.devices.has(value) else value.device), [value.dtype]
            else:
                rest.append(value)
        wanted = torch.device(kwargs.pop("device", None) or wanted or (gpu if here else "cpu"))
        if func is not Tensor.to:
            wanted, rest = (gpu if func is Tensor.cuda else torch.device("cpu")), []
        if wanted.type == "meta":
            return args[0].to("meta")
        to_gpu = wanted.type == gpu.type
        if to_gpu != here:
            kwargs["copy"] = True
            if not kwargs.get("non_blocking"):
                self.devices.waits.append(f"a copy to {wanted}")
        rest = [value for value in rest if value is not None]
        if rest and isinstance(rest[0], bool):
            kwargs["non_blocking"] = rest.pop(0)
        found = args[0].to(*rest, **kwargs) if rest or kwargs else args[0]
        return self.devices.move(found, to_gpu) if to_gpu != here else found


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@contextlib.contextmanager
def fake_gpu(gpu: torch.device = GPU) -> Iterator[Devices]:
    """A machine with one GPU, inside the context."""
    devices, autocast = Devices(gpu), torch.autocast.__init__
    grouped = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype

    def autocast_here(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == gpu.type else device_type, *args, **kwargs)

    def grouped_here(tensors: Any, *args: Any) -> Any:
        device = gpu if devices.has(tensors[0][0]) else torch.device("cpu")
        return {(device, kind): v for (_, kind), v in grouped(tensors, *args).items()}

    replaced = {
        "torch.autocast.__init__": autocast_here,
        "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": grouped_here,
    } | (CUDA if gpu.type == "cuda" else MPS)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "'pin_memory' argument")
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(devices)
        stack.enter_context(Calls(devices))
        yield devices
