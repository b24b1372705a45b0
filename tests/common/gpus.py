"""A pretended GPU: the CPU computes its tensors, and an operation with a tensor that was not moved there fails."""

from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
from composer.devices import DeviceCPU, DeviceGPU
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN, functorch = torch.ops.aten, torch._C._functorch
GPU = torch.device("cuda", 0)
MOVES = (ATEN.copy_, ATEN._foreach_copy_, ATEN._to_copy, ATEN.set_)  # these take operands on two devices
ON_HOST = (Tensor.numpy, Tensor.__array__)


class PretendedGPU(DeviceCPU):
    """Composer's device, which is a context too: tensors within say where they are, and are refused on two devices.

    As with CUDA, a number on the host, a tensor without dimensions, goes with every operand. Unlike CUDA, it refuses
    indices on the host, whose copy would make that wait.
    """

    _device = GPU

    def __init__(self):
        self.storages = {}  # of tensors on the GPU: a weak reference keeps the number from being used again
        self.place = False  # of a tensor made of no other: True for the GPU
        self.moves = False  # the call names a device

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(patch("composer.devices.DeviceCPU", lambda: self))
        self.stack.enter_context(patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_metadata))
        self.stack.enter_context(_Calls(self))
        self.stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *error):
        self.stack.close()

    def holds(self, tensor):
        while functorch.is_batchedtensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        return tensor.untyped_storage()._cdata in self.storages

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage._cdata, StorageWeakRef(storage))

    @contextmanager
    def making(self, place, moves=False):
        before = self.place, self.moves
        self.place, self.moves = place, moves
        try:
            yield
        finally:
            self.place, self.moves = before


def _metadata(tensor):
    """Return what activation checkpointing compares, of one that it keeps and one that it computes anew."""
    with torch._C.DisableTorchFunction():
        return checkpoint._default_meta_extractor(tensor)


def _tensors(*values):
    return [one for one in tree_leaves(values) if type(one) in (Tensor, torch.nn.Parameter) and not one.is_meta]


class _Calls(TorchFunctionMode):
    """What Python asks: where a tensor is, and where one shall be."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        tensors = _tensors(args, kwargs)
        there = any(map(gpu.holds, tensors))
        if func in (Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__) and there:
            return {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True}.get(func, False)
        if func in ON_HOST and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.backward:
            with gpu.making(True), self:  # also for what Python computes in it
                return torch.autograd.backward(args[0], *args[1:], grad_tensors=kwargs.pop("gradient", None), **kwargs)
        target = self._target(func, args, kwargs)
        if target is None:
            if any(isinstance(one, torch.Generator) for one in (*args, *kwargs.values())) and there:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            with gpu.making(there):
                out = func(*args, **kwargs)
            if there and func in (Tensor.__deepcopy__, Tensor.new_tensor):  # these copy without an operation
                gpu.hold(out)
            return out
        if func in (Tensor.cuda, Tensor.cpu):
            func, args, kwargs = Tensor.to, (args[0],), {"device": "cpu"}
        elif func is Tensor.to and "device" not in kwargs:
            args = (args[0], args[1].dtype if isinstance(args[1], Tensor) else "cpu", *args[2:])
        else:
            kwargs["device"] = "cpu"
        with gpu.making(target, moves=True):
            out = func(*args, **kwargs)
            return out if gpu.holds(out) == target else out.clone()

    def _target(self, func, args, kwargs):
        """Return True for the GPU where a call names it, False where it names the host, else None."""
        device = kwargs.get("device")
        if func in (Tensor.cuda, Tensor.cpu):
            return func is Tensor.cuda
        if func is Tensor.to and device is None and len(args) > 1:
            if isinstance(args[1], Tensor):
                return self.gpu.holds(args[1])
            device = None if isinstance(args[1], torch.dtype) else args[1]
        if func is torch._C._nn._parse_to or device is None or torch.device(device).type == "meta":
            return None
        return torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    """Check the devices of each operation, in the backward pass too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu = self.gpu
        with torch._C.DisableTorchFunction():
            given = _tensors(args, kwargs)
            changed = args[0] if func._schema.is_mutable else None
            places = {gpu.holds(one) for one in given if one.dim() or one is changed or gpu.holds(one)}
            free = gpu.moves or func.overloadpacket in MOVES or func.namespace == "c10d"
            if len(places) == 2 and not free:
                said = ", ".join(f"{[*one.shape]} on {'cuda:0' if gpu.holds(one) else 'cpu'}" for one in given)
                raise RuntimeError(f"Expected all tensors to be on the same device in {func}: {said}")
            out = func(*args, **(kwargs or {}))
            there = gpu.place if gpu.moves or not given else True in places
            known = {one.untyped_storage()._cdata for one in given}
            for one in _tensors(out):
                if there and one.untyped_storage()._cdata not in known:
                    gpu.hold(one)
            return out


@contextmanager
def real_gpu():
    """Let Composer take the GPU and compute on it in float32; a process has one group of ranks, for either device."""

    def end_group():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    end_group()
    try:
        with patch("composer.devices.DeviceGPU", partial(DeviceGPU, allow_tf32=False)):
            yield
    finally:
        end_group()
