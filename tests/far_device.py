"""A second device, made of the CPU's memory, on which no tensor mixes with those of the CPU.

Code that forgets to move a tensor fails on a GPU only, and the machines that run these tests have
none. Here a tensor says that it lies on ``far``, every operation on it is computed by the CPU on
the tensor behind it, and where tensors of both devices meet it raises, as CUDA does: but for
copies, a far tensor's indices, and numbers of the CPU (no dimensions) in pointwise operations. It
also counts where the host would wait for the device: a number, a truth or a length that it learns,
a copy to the CPU.

What it does not show: kernels that a GPU lacks or fuses, their rounding, memory, streams, speed,
waits inside of a kernel. It is made with PyTorch's experimental means for backends written in
Python, which must come before the process's first backward pass. So from the import on PyTorch
names it as the accelerator, though one that isn't there while it is closed; beside a real one it is
not made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

FAR = "far"
_aten = torch.ops.aten
_COPIES = {
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten._copy_from.default,
}
_READS_INDICES = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_ANSWERS_THE_HOST = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten._linalg_check_errors.default,
}
_NARROWED = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")
"""Products, which autocast computes in the narrow dtype."""


class FarTensor(Tensor):
    """A tensor that says it lies on ``far``; ``near`` is what it is made of."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        assert not isinstance(near, FarTensor)
        made = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=f"{FAR}:0",
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"far {self.near!r}"

    def _set_data(self, value: FarTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.near = value.near

    data = property(lambda self: Tensor.data.__get__(self), _set_data)  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        """Only who asks which tensors share their memory reads it."""
        return self.near.untyped_storage()

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor on {FAR} is no array; copy it to the CPU first")

    numpy = __array__


class FarDevice(TorchDispatchMode):
    """While open, tensors can be made on ``far``. ``waits`` counts by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(operation, args, kwargs or {})


_open: list[FarDevice] = []


@contextmanager
def far_device() -> Iterator[FarDevice]:
    """The device, as long as the block is open."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with FarDevice() as device:
        _open.append(device)
        # A weight that two modules share stays one when it moves, as it does to a GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield device
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
            _open.pop()


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == FAR


def _compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of either device, on what its tensors are made of."""
    if operation not in _COPIES and torch._C._dispatch_has_kernel_for_dispatch_key(
        operation.name(), "CompositeImplicitAutograd"
    ):
        with FarDevice():  # what it is made of comes here too
            answer = operation.decompose(*args, **kwargs)
        if answer is not NotImplemented:
            return answer
    leaves = tree_leaves((args, kwargs))
    if operation is _aten.is_pinned.default:
        return False
    if operation is _aten._has_compatible_shallow_copy_type.default:
        return len({isinstance(leaf, FarTensor) for leaf in leaves}) == 1
    anywhere_far = any(isinstance(leaf, FarTensor) for leaf in leaves)
    target = kwargs.get("device")
    if anywhere_far or _is_far(target):
        _check_that_none_mixes(operation, args, leaves)
    if anywhere_far and _host_waits(operation, args, target):
        for device in _open:
            device.waits[operation.overloadpacket.__name__] += 1
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    stays_far = anywhere_far
    if operation is _aten.copy_.default:
        stays_far = isinstance(args[0], FarTensor)
    elif target is not None:
        stays_far = _is_far(target)
        near_kwargs["device"] = torch.device("cpu") if stays_far else target
    answer = operation(*near_args, **near_kwargs)
    if any(_writes(argument) for argument in operation._schema.arguments):
        return _what_was_written_to(operation, args, kwargs, answer)
    return tree_map(_far, answer) if stays_far else answer


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, FarTensor) else leaf


def _far(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    with torch.inference_mode(leaf.is_inference()):  # a weight that is detached there is none
        return FarTensor(leaf)


def _check_that_none_mixes(operation: Any, args: Any, leaves: list[Any]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{operation} on {FAR} with a generator of the CPU")
    if operation in _COPIES:
        return
    if operation in _READS_INDICES and isinstance(args[0], FarTensor):
        leaves = tree_leaves((args[0], args[2:]))  # its indices may lie on either device
    numbers_may = operation in _READS_INDICES or torch.Tag.pointwise in operation.tags
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FarTensor):
            continue
        if leaf.dim() or not numbers_may:
            shapes = [tuple(each.shape) for each in leaves if isinstance(each, Tensor)]
            raise RuntimeError(f"{operation} of tensors on {FAR} and on {leaf.device}: {shapes}")


def _host_waits(operation: Any, args: Any, target: Any) -> bool:
    if operation in _READS_INDICES:
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in args[1])
    if operation is _aten._to_copy.default:
        return target is not None and not _is_far(target)
    if operation is _aten.copy_.default:
        return not isinstance(args[0], FarTensor)
    # The length of what it gives depends on what the numbers are.
    return operation in _ANSWERS_THE_HOST or torch.Tag.dynamic_output_shape in operation.tags


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _what_was_written_to(operation: Any, args: Any, kwargs: dict[str, Any], answer: Any) -> Any:
    """An operation in place, or with ``out=``, answers with the very tensors that it was given."""
    written = {}
    for place, argument in enumerate(operation._schema.arguments):
        if _writes(argument):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            written[tuple(argument.alias_info.after_set)] = given
            if isinstance(given, FarTensor) and given.shape != given.near.shape:
                with no_dispatch():  # squeeze_ and the like: the wrapper's own shape as well
                    operation(*args, **kwargs)
    returns = operation._schema.returns
    answers = answer if len(returns) > 1 else (answer,)
    same = tuple(
        written.get(tuple(one.alias_info.after_set), each) if one.alias_info else each
        for one, each in zip(returns, answers, strict=False)
    )
    return same if len(returns) > 1 else same[0] if returns else answer


# --- What PyTorch's dispatcher is told of the device, once a process.


class _Backend(_DummyBackendModule):  # type: ignore[misc]
    def is_available(self) -> bool:
        """An accelerator while it is open, and none to the tests that run before and behind."""
        return bool(_open)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _in_bfloat16(product: Any) -> Callable[..., Any]:
    def narrow(leaf: Any) -> Any:
        is_wide = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(torch.bfloat16) if is_wide else leaf

    def call(*args: Any, **kwargs: Any) -> Any:
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return product(*tree_map(narrow, args), **tree_map(narrow, kwargs))

    return call


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> FarTensor:
    return FarTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> FarTensor:
    return FarTensor(torch.empty(size, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _near(target).copy_(_near(source))
    return target


def _tell_pytorch() -> tuple[torch.library.Library, ...]:
    _setup_privateuseone_for_python_backend(FAR, backend_module=_Backend())
    operators, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    # What PyTorch asks for below any mode: torch.tensor(list, device=far), tensor[list].
    operators.impl("empty.memory_format", _empty, "PrivateUse1")
    operators.impl("empty_strided", _empty_strided, "PrivateUse1")
    operators.impl("_copy_from", _copy_from, "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _NARROWED:
        product = getattr(_aten, name).default
        operators.impl(name, _in_bfloat16(product), "AutocastPrivateUse1")
    return operators, fallback  # which are forgotten with their objects


HAS_ACCELERATOR = torch.accelerator.is_available()
_told = () if HAS_ACCELERATOR else _tell_pytorch()
