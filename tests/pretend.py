"""A CUDA device that is not there: tensors on a CPU that say they are on cuda:0 or cuda:1, and refuse what CUDA refuses.

`pretend.device()` is a context in which torch has such devices. Inside of it

    operations on tensors of two devices raise, as CUDA's do
    a kernel of Triton that is launched while another device is current than its tensors' raises
    a copy to the host that does not wait brings nonsense until an event, recorded behind it on the same stream, has been waited for
    everything that a GPU would do is counted: `Seen.launches`, `reads` that the host waits for, `copies` to the device, and `names`

To torch's own C++ these tensors are on the CPU, so autograd needs no device; what Python asks of them, `device` and `is_cuda`, is answered
here. What it cannot show: what a kernel lacks on a GPU, its memory, its time, and transforms of torch.func, which hide the tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from types import SimpleNamespace

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

#: The host waits for the numbers of the device.
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}
#: No kernel runs.
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view", "set_"}
NOTHING |= {"scalar_tensor", "promote_types", "resize_", "is_same_size"}
#: Kernels inside of one operation, where they are more.
INSIDE = {"logsumexp": 8, "sort": 4, "median": 4, "cumsum": 2}
#: What makes tensors from nothing, or like others.
FACTORIES = (
    *("empty", "zeros", "ones", "full", "arange", "eye", "rand", "randn", "randint", "randperm", "linspace", "tensor", "as_tensor"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided"),
)
METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


class Seen:
    """What a GPU would have done since the start."""

    def __init__(self):
        self.launches, self.reads, self.copies, self.names, self.quiet = 0, 0, 0, Counter(), False

    def launch(self, name, kernels=1):
        if not self.quiet:
            self.launches += kernels
            self.names[name] += kernels

    def read(self, name):
        if not self.quiet:
            self.reads += 1
            self.names["read by " + name] += 1

    def copy(self, name):
        if not self.quiet:
            self.copies += 1
            self.names["to the device by " + name] += 1


seen = Seen()


class Cuda(torch.Tensor):
    """A tensor on a device of the pretence; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner, index):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout
        )

    def __init__(self, inner, index):
        assert not isinstance(inner, Cuda)
        self.inner, self.index_of_device = inner.detach(), index

    device = property(lambda self: torch.device("cuda", self.index_of_device))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None):
        return f"Cuda({self.inner!r}, {self.index_of_device})"

    def tolist(self):
        seen.read("tolist")
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def get_device(self):
        return self.index_of_device


def unwrap(z):
    return z.inner if isinstance(z, Cuda) else z


def devices_of(values):
    return {z.index_of_device for z in values if isinstance(z, Cuda)}


def mixed(func, found):
    return RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {found}! (when {func} was called)")


def dispatch(func, args, kwargs):
    """One operation on a tensor of the pretence."""
    name, flat = func._schema.name.split("::")[1], tree_leaves((args, kwargs))
    if func.namespace != "aten":  # an operator of our own: what it does, on the device
        return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    if name == "copy_" and not isinstance(args[0], Cuda):
        return to_host(args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    indices = devices_of(flat)
    if len(indices) > 1:
        raise mixed(func, " and ".join(f"cuda:{index}" for index in sorted(indices)))
    (index,) = indices
    strangers = [z for z in flat if isinstance(z, torch.Tensor) and not isinstance(z, Cuda) and z.ndim]
    if name == "copy_" and strangers:
        seen.copy("copy_")
    elif strangers:
        raise mixed(func, f"cuda:{index} and cpu")
    elif name in READS or (name.startswith("index") and any(isinstance(z, Cuda) and z.dtype == torch.bool for z in flat[1:])):
        seen.read(name)
    elif name not in NOTHING and not is_view(func):
        seen.launch(name, INSIDE.get(name, 1))
    kwargs = {key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()}
    kwargs.pop("pin_memory", None)
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    out = tree_map(lambda z: Cuda(z, index) if isinstance(z, torch.Tensor) else z, out)
    if any(z.alias_info is not None for z in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def is_view(func):
    returns, given = func._schema.returns, func._schema.arguments
    written = [z for z in (*returns, *given) if z.alias_info is not None and z.alias_info.is_write]
    return not written and any(z.alias_info is not None for z in returns)


# ------------------------------------------------------------------------------------------------ streams, and copies that are under way


class Place(threading.local):
    """The current device of a thread, and its current streams."""

    def __init__(self):
        self.device, self.streams = 0, {}

    def stream(self, index=None):
        index = self.device if index is None else index
        return self.streams.get(index, Stream.default(index))


class Stream:
    defaults: dict[int, Stream] = {}
    cuda_stream = 0

    def __init__(self, device=None, priority=0):
        self.device = torch.device("cuda", index_of(device))
        self.under_way = []  # copies to the host: what to call when they arrive

    @classmethod
    def default(cls, index):
        return cls.defaults.setdefault(index, cls(torch.device("cuda", index)))

    @property
    def device_index(self):
        return self.device.index

    def synchronize(self):
        seen.read("Stream.synchronize")
        arrive(self.under_way)

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.behind = []

    def record(self, stream=None):
        self.behind = list((stream or place.stream()).under_way)

    def synchronize(self):
        arrive(self.behind)

    def query(self):
        return True

    def wait(self, stream=None):
        pass

    def elapsed_time(self, other):
        return 1.0


place = Place()


def arrive(copies):
    for copy in copies:
        copy()


def to_host(host, source, non_blocking):
    """host.copy_(source)."""
    if not non_blocking:
        seen.read("copy_")
        return host.copy_(source.inner)
    numbers, stream = source.inner.clone(), place.stream(source.index_of_device)
    host.fill_(1)  # until the copy has arrived: whatever was there, all flags set
    stream.under_way.append(lambda: host.copy_(numbers))
    return host


class Current:
    """torch.cuda.device, and with a stream torch.cuda.stream."""

    def __init__(self, device, stream=None):
        self.index, self.stream = index_of(device) if device is not None else None, stream

    def __enter__(self):
        self.before = place.device, dict(place.streams)
        if self.index is not None and self.index >= 0:
            place.device = self.index
        if self.stream is not None:
            place.streams[self.index] = self.stream

    def __exit__(self, *_):
        place.device, place.streams = self.before


def index_of(device):
    if device is None:
        return place.device
    if isinstance(device, int):
        return device
    device = torch.device(device)
    return place.device if device.index is None else device.index


def is_cuda(device):
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


# ------------------------------------------------------------------------------------------------ what torch's own functions become


class Moved(torch.autograd.Function):
    """A copy on another device; index None is the host."""

    @staticmethod
    def forward(ctx, z, index):
        ctx.source = z.index_of_device if isinstance(z, Cuda) else None
        if index is None:
            seen.read("to")
            return unwrap(z).clone()
        seen.launch("to") if isinstance(z, Cuda) else seen.copy("to")
        return Cuda(unwrap(z).clone(), index)

    @staticmethod
    def backward(ctx, grad):
        return Moved.apply(grad, ctx.source), None


def moved(z, device):
    if device is None:
        return z
    index = index_of(device) if is_cuda(device) else None
    own = z.index_of_device if isinstance(z, Cuda) else None
    return z if index == own else Moved.apply(z, index)


def to(original):
    def call(self, *args, **kwargs):
        device, rest = kwargs.pop("device", None), list(args)
        if rest and isinstance(rest[0], torch.Tensor):
            device, rest[0] = rest[0].device, rest[0].dtype
        elif rest and (isinstance(rest[0], (str, int, torch.device)) or rest[0] is None):
            device = rest.pop(0)
        if isinstance(kwargs.get("other"), torch.Tensor):
            other = kwargs.pop("other")
            device, rest = other.device, [other.dtype, *rest]
        z = moved(self, device)
        return original(z, *rest, **kwargs) if rest or kwargs else z

    return call


def factory(original, name):
    def call(*args, device=None, pin_memory=False, requires_grad=False, **kwargs):
        like = next((z for z in args[:1] if isinstance(z, Cuda)), None)
        if device is None and like is not None and name in ("tensor", "as_tensor"):
            device = like.device
        if device is None or (like is not None and is_cuda(device) and index_of(device) == like.index_of_device):
            out = original(*args, **kwargs) if name != "as_tensor" or like is None else like
        elif not is_cuda(device):
            out = original(*tree_map(unwrap, args), device=device, **kwargs)
        else:
            kwargs.pop("generator", None) if not isinstance(kwargs.get("generator"), torch.Generator) else None
            made = original(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
            if name in ("tensor", "as_tensor"):
                seen.copy(name)
            elif "empty" not in name:
                seen.launch(name)
            out = Cuda(made.clone() if name == "as_tensor" else made, index_of(device))
        return out.requires_grad_() if requires_grad else out

    return call


def launcher(run):
    """Triton's launch in its interpreter, on the device that is current."""

    def call(self, *args, **options):
        given = [*args, *options.values()]
        tensors = [z for z in given if isinstance(z, torch.Tensor)]
        if indices := devices_of(tensors):
            if any(not isinstance(z, Cuda) for z in tensors):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            if indices != {place.device}:
                raise RuntimeError(f"{self.fn.__name__} is launched on cuda:{place.device}, its tensors are on {indices}")
        seen.launch(self.fn.__name__)
        args, options = tree_map(unwrap, args), tree_map(unwrap, options)
        before, seen.quiet = seen.quiet, True
        try:
            return run(self, *args, **options)
        finally:
            seen.quiet = before

    return call


#: An H100, as far as anybody asks.
PROPERTIES = dict(
    name="NVIDIA H100 (pretended)", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, warp_size=32, gcnArchName="",
)  # fmt: skip


@contextlib.contextmanager
def device(count=2, **properties):
    """torch with `count` CUDA devices of these properties."""
    known = SimpleNamespace(**(PROPERTIES | properties))
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: count,
        "current_device": lambda: place.device,
        "set_device": lambda device: setattr(place, "device", index_of(device)),
        "get_device_properties": lambda device=None: known,
        "get_device_capability": lambda device=None: (known.major, known.minor),
        "get_device_name": lambda device=None: known.name,
        "mem_get_info": lambda device=None: (known.total_memory, known.total_memory),
        "synchronize": lambda device=None: Stream.default(index_of(device)).synchronize(),
        "current_stream": lambda device=None: place.stream(index_of(device)),
        "default_stream": lambda device=None: Stream.default(index_of(device)),
        "stream": lambda stream: Current(None if stream is None else stream.device, stream),
        "device": Current,
        "Event": Event,
        "Stream": Stream,
    }
    cuda |= dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"), lambda *_, **__: None)
    cuda |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_, **__: 0)
    tensor = {name: factory(getattr(torch.Tensor, name), name) for name in METHODS}
    tensor |= {"to": to(torch.Tensor.to), "cpu": lambda z: moved(z, "cpu"), "cuda": lambda z, device=None: moved(z, index_of(device))}
    tensor |= {"pin_memory": lambda z: z, "is_pinned": lambda z: False}
    changed = [(torch.cuda, cuda), (torch.Tensor, tensor), (torch, {name: factory(getattr(torch, name), name) for name in FACTORIES})]
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import InterpretedFunction

        changed.append((InterpretedFunction, {"run": launcher(InterpretedFunction.run)}))
    with contextlib.ExitStack() as restore:
        for owner, values in changed:
            for name, value in values.items():
                if name in vars(owner):
                    restore.callback(setattr, owner, name, vars(owner)[name])
                else:  # inherited, from torch._C.TensorBase
                    restore.callback(delattr, owner, name)
                setattr(owner, name, value)
        restore.callback(setattr, place, "device", 0)
        yield seen
