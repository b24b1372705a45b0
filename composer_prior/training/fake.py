"""Training steps on fake tensors, which have shapes and types and no numbers: a model of any size fits anywhere.

Whatever touches weights or pixels is fake. Token ids, labels and masks are real, and so are the integers made of them
alone: the number of labelled tokens, which decides how large the head's tensors are, is that of the batch.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from composer.core import Precision
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy, sync_optimizer_and_model_params
from composer.utils import dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models import head
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.reference import ReferenceLM
from composer_prior.models.sharding import build_parallelism, prepare_sharded
from composer_prior.training.monitors import flop_counter
from composer_prior.training.optimizer import build_optimizer

_ATEN = torch.ops.aten
_DEVICE = torch.ops.prim.device.default  # half of all calls
_INDEXED = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)

# Functions of models that autocast computes in float32 on a GPU, but not on a CPU.
_FLOAT32_ON_GPU = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss", "softplus"),
    *("pow", "__pow__", "rsqrt", "reciprocal", "exp", "log", "sum", "cumsum", "prod", "norm"),
}

# Names of the trackers' kinds of memory, by the parts of a plan.
PARTS = {
    "weights": ("Sharded Param", "Parameter", "Buffer"),
    "gradients": ("Sharded Grad", "Gradient"),
    "optimizer": ("OptState", "Optstate"),
    "gathered": ("Unsharded Param", "All Gather", "Unsharded Grad", "Reduce Scatter"),
    "activations": ("Activation", "Inputs", "Other"),
    "temporary": ("Temp",),
}


class HalfFake(FakeTensorMode):
    """Torch's mode of fake tensors, in which integers that come of real ones alone are real."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with numbers where no argument is fake, and for integers made of none, such as ``arange``."""
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if given and all(type(one) is Tensor and not one.is_meta for one in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default:  # as of an optimizer's count of steps
            return 0 if given[0].dtype == torch.bool else 1
        if func.overloadpacket in _INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not given and isinstance(out, Tensor) and not out.dtype.is_floating_point and not out.is_meta:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return out


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return the places of a mask, whose number has to be known, all those of a fake one; other indices as they are."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    with unset_fake_temporarily():
        return [*(torch.ones(index.shape) if isinstance(index, FakeTensor) else index).nonzero(as_tuple=True)]


def make_fake(model: nn.Module) -> None:
    """Give a model of the meta device fake tensors; what is tied stays so. Call it in :class:`HalfFake`."""
    made: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            found = torch.empty(tensor.shape, dtype=torch.float32).to(tensor.dtype)  # integers would be real
            given = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(found, requires_grad=tensor.requires_grad) if given else found
        return made[tensor]

    for module in model.modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in (*own, *((k, v) for k, v in vars(module).items() if isinstance(v, Tensor))):
            setattr(module, name, fake(tensor))


def fake_numbers(value: Any) -> Any:
    """Replace numbers such as pixels, in a batch or a sample, by fake tensors. Call it in :class:`HalfFake`."""
    if isinstance(value, Mapping):
        return {key: fake_numbers(one) for key, one in value.items()}
    return torch.empty(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else value


class _PeakAlone:
    """Of torch's trackers of memory: keep the peak of the step, and none of each module, which takes longer."""

    def __torch_dispatch__(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[misc]

    def _update_peak_stats(self: Any, _: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


class _ShardedTracker(_PeakAlone, FSDPMemTracker):
    """For FSDP2."""


class _Tracker(_PeakAlone, MemTracker):
    """For models that are whole on each rank; frozen weights get no hooks, which torch would refuse."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        hooks: Any = OrderedDict()
        for weight in module.parameters():
            if not weight.requires_grad:
                self._param_to_grad_hook_handles[weight] = (RemovableHandle(hooks), RemovableHandle(hooks))
        return super()._track_module_params_and_buffers(module, install_grad_hooks)


@contextmanager
def as_on_gpu(asked: bool) -> Iterator[None]:
    """Let the head cut the vocabulary as it does on a GPU, and attention do without the fused path of inference.

    Autocast on a GPU does without that path, which has no fake form: torch would compute it with real tensors.
    """
    tables, fused = (head.BLOCK_ELEMENTS, head.BLOCK_MULTIPLE, head.KEPT_ELEMENTS), torch.backends.mha
    before, fast = [table["cpu"] for table in tables], fused.get_fastpath_enabled()
    try:
        fused.set_fastpath_enabled(fast and not asked)
        for table in tables if asked else ():
            table["cpu"] = table["cuda"]
        yield
    finally:
        fused.set_fastpath_enabled(fast)
        for table, value in zip(tables, before, strict=True):
            table["cpu"] = value


class AutocastOfGPU(TorchFunctionMode):
    """Cast arguments to float32 where autocast does so on a GPU and not on the CPU, where fake tensors are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FLOAT32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def shapes_untracked() -> Iterator[None]:
    """Hide from trackers the fake tensors of whole weights with which DTensor computes shapes (torch 2.11)."""
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    known = propagator._propagate_tensor_meta_non_cached

    def apart(schema: Any) -> Any:
        with _disable_current_modes():
            return known(schema)

    propagator._propagate_tensor_meta_non_cached = apart
    try:
        yield
    finally:
        del propagator._propagate_tensor_meta_non_cached


class FakeRun:
    """A run's model, optimizer and sharding on fake tensors, as the first rank of the process group has them.

    Args:
        model: of the meta device; it is changed.
        optimizer: the recipe's.
        parallelism: the recipe's ``parallelism_config``.
        precision: of the run.
        gpu: compute as on a GPU; False: as on a CPU, for comparison with measurements there.
    """

    def __init__(
        self,
        model: ComposerLVLM,
        optimizer: Mapping[str, Any],
        parallelism: Mapping[str, Any] | None,
        precision: Precision,
        gpu: bool = True,
    ):
        self.mode, self.model, self.precision, self.gpu = HalfFake(), model, precision, gpu
        sharding = build_parallelism(parallelism, planned=True)
        if gpu:
            model._needs_mask = True  # as models on a GPU are given it, see last_hidden_states
        with self.mode:
            make_fake(model)
            self.weights = sum(4 * weight.numel() for weight in model.parameters())
            self.optimizer = build_optimizer(optimizer, model)
        self.buckets = 0  # of DDP, which holds gradients twice
        if sharding is not None:
            config: Any = sharding.fsdp2
            copies = config.data_parallel_replicate_degree
            shape, names = [dist.get_world_size() // (copies or 1)], ["dp_shard"]
            if copies is not None:
                shape, names = [copies, *shape], ["dp_replicate", *names]
            config.device_mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=tuple(names))
            with self.mode:
                if config.activation_checkpointing or config.activation_cpu_offload:
                    check = generate_composer_model_check_fn(model)
                    apply_ac(model, config.activation_checkpointing, config.activation_cpu_offload, check)
                with sync_optimizer_and_model_params(self.optimizer, model):
                    prepare_fully_shard(model, config, precision, generate_composer_model_policy(model))
                prepare_sharded(model)
        elif dist.get_world_size() > 1:
            self.buckets = sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad)
        self.root: Any = model.model if isinstance(model.model, FSDPModule) else model
        if isinstance(self.root, FSDPModule):  # its own forward, which the tracker hears
            vars(self.root)["forward"] = lambda function, *args, **kwargs: function(*args, **kwargs)
            vars(self.root)["_call"] = self.root.__call__
        for group in self.optimizer.param_groups:
            if gpu and "foreach" in group and not group.get("fused"):
                group["foreach"] = True  # torch's choice there
        with self.mode:  # the moments, as after a first step
            self._fill_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state on all ranks together."""
        tensors = [one for of_weight in self.optimizer.state.values() for one in of_weight.values()]
        return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))

    def _fill_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)

    def _backward(self, batch: Mapping[str, Tensor]) -> None:
        low = self.precision in (Precision.AMP_BF16, Precision.AMP_FP16)
        with AutocastOfGPU() if low and self.gpu else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = self.model.loss(self.model(batch), batch)
            torch.autograd.backward(loss)  # Tensor.backward would recompute checkpoints outside of the mode

    def peak(self, batch: Mapping[str, Tensor], again: bool = False) -> dict[str, int]:
        """Return the bytes of each part at the peak of a step on a microbatch.

        Args:
            batch: the microbatch, made in the mode.
            again: there are gradients of an earlier microbatch. Default: ``False``.
        """
        with self.mode, as_on_gpu(self.gpu):
            if again:
                self._fill_gradients()
            tracker: MemTracker
            if isinstance(self.root, FSDPModule):
                tracker = _ShardedTracker(cast(nn.Module, self.root), self.optimizer)
                tracker.track_inputs((dict(batch),))
            else:
                tracker = _Tracker()
                tracker.track_external(self.model, self.optimizer, *batch.values())
            with tracker, shapes_untracked():
                self._backward(batch)
                self.optimizer.step()
            self.optimizer.zero_grad()
        found: dict[str, int] = {}
        for kinds in tracker.get_tracker_snapshot("peak").values():
            for kind, size in kinds.items():
                name = getattr(kind, "value", kind)
                found[name] = found.get(name, 0) + size
        parts = {part: sum(found.get(name, 0) for name in names) for part, names in PARTS.items()}
        parts["gathered"] += self.buckets
        return parts

    def flops(self, batch: Mapping[str, Tensor]) -> int:
        """Return the floating-point operations of a step, forward and backward, as ``compute/flops`` counts them."""
        counter = flop_counter()
        with self.mode, as_on_gpu(self.gpu), counter:
            self._backward(batch)
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def reference_costs(reference: ReferenceLM, run: FakeRun, tokens: int) -> tuple[int, int]:
    """Return the bytes of a reference's weights, and its operations for a caption of ``tokens`` tokens."""
    counter = flop_counter()
    ids = torch.arange(1 + tokens)[None]
    with run.mode, as_on_gpu(run.gpu), counter:
        make_fake(reference.model)
        reference.logprobs(ids, torch.ones_like(ids), ids.where(ids > 0, IGNORE_INDEX))
    return sum(one.numel() * one.element_size() for one in reference.model.parameters()), counter.get_total_flops()
