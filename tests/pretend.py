"""A CUDA device that is not there: tensors on a CPU that say they are on cuda:0 or cuda:1, and refuse what CUDA refuses.

`pretend.device()` is a context in which torch has such devices, and one of Apple's, mps:0, which has no float64. Inside of it

    operations on tensors of two devices raise, as CUDA's do
    a kernel of Triton that is launched while another device is current than its tensors' raises
    a copy to the host that does not wait brings nonsense until an event, recorded behind it on the same stream, has been waited for
    everything that a GPU would do is counted: `Seen.launches`, `reads` that the host waits for, `copies` to the device, and `names`

To torch's own C++ these tensors are on the CPU, so autograd needs no device; what Python asks of them, `device` and `is_cuda`, is answered
here. What it cannot show: what a kernel lacks on a GPU, its memory, its time, and transforms of torch.func, which hide the tensors.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

#: The host waits for the numbers of the device.
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}
#: No kernel runs.
NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "set_",
}
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
        self.compiled = set()  # (kernel, what Triton would compile it for)
        self.graph = None  # what is captured at the moment

    def launch(self, name, kernels=1):
        if not self.quiet:
            self.launches += kernels
            self.names[name] += kernels

    def read(self, name):
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {name}")
        if not self.quiet:
            self.reads += 1
            self.names["read by " + name] += 1

    def copy(self, name):
        if not self.quiet:
            self.copies += 1
            self.names["to the device by " + name] += 1


seen = Seen()


class Pretended(torch.Tensor):
    """A tensor on a device of the pretence; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner, where):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout
        )

    def __init__(self, inner, where):
        assert not isinstance(inner, Pretended)
        if where.type == "mps" and inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        self.inner, self.where = inner.detach(), where

    device = property(lambda self: self.where)
    is_cuda = property(lambda self: self.where.type == "cuda")
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None):
        return f"Pretended({self.inner!r}, {self.where})"

    def tolist(self):
        seen.read("tolist")
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def get_device(self):
        return self.where.index


def unwrap(z):
    return z.inner if isinstance(z, Pretended) else z


def devices_of(values):
    return {z.where for z in values if isinstance(z, Pretended)}


def mixed(func, found):
    return RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {found}! (when {func} was called)")


def dispatch(func, args, kwargs):
    """One operation on a tensor of the pretence."""
    name, flat = func._schema.name.split("::")[1], tree_leaves((args, kwargs))
    if func.namespace != "aten":  # an operator of our own: what it does, on the device
        return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    if name == "copy_" and not isinstance(args[0], Pretended):
        return to_host(args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    places = devices_of(flat)
    if len(places) > 1:
        raise mixed(func, " and ".join(map(str, places)))
    (where,) = places
    strangers = [z for z in flat if isinstance(z, torch.Tensor) and not isinstance(z, Pretended) and z.ndim]
    if name == "copy_" and strangers:
        seen.copy("copy_")
    elif strangers:
        raise mixed(func, f"{where} and cpu")
    elif name in READS or (name.startswith("index") and any(isinstance(z, Pretended) and z.dtype == torch.bool for z in flat[1:])):
        seen.read(name)
    elif name not in NOTHING and not is_view(func):
        # Where a number stands in for a tensor, torch fills one with it first.
        seen.launch(
            name, INSIDE.get(name, 1) + (name == "where") * sum(isinstance(z, torch.Tensor) and not isinstance(z, Pretended) for z in flat)
        )
    kwargs = {key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()}
    kwargs.pop("pin_memory", None)
    given = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    captured = seen.graph is not None and name not in NOTHING
    out = seen.graph.record(func, *given) if captured else func(*given[0], **given[1])
    out = tree_map(lambda z: Pretended(z, where) if isinstance(z, torch.Tensor) else z, out)
    if any(z.alias_info is not None for z in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def is_view(func):
    returns, given = func._schema.returns, func._schema.arguments
    written = [z for z in (*returns, *given) if z.alias_info is not None and z.alias_info.is_write]
    return not written and any(z.alias_info is not None for z in returns)


# ------------------------------------------------------------------------------------------------ graphs


class CUDAGraph:
    """What was captured, to be run again on the same memory. As on CUDA a capture runs nothing: what it wrote is as before, results are
    nonsense until the first replay."""

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert place.streams, "CUDA captures no default stream"
        self.tape, self.held, seen.graph = [], {}, self

    def record(self, function, args, kwargs):
        for z in tree_leaves((args, kwargs)):
            self._hold(z)
        out = function(*args, **kwargs)
        self.tape.append((function, args, kwargs, out))
        return out

    def _hold(self, z):
        if isinstance(z, torch.Tensor) and z.untyped_storage().data_ptr() not in self.held:
            whole = torch.empty(0, dtype=torch.uint8).set_(z.untyped_storage())
            self.held[z.untyped_storage().data_ptr()] = whole, whole.clone()

    def capture_end(self):
        seen.graph = None
        for *_, out in self.tape:
            for z in tree_leaves(out):
                if isinstance(z, torch.Tensor) and z.untyped_storage().data_ptr() not in self.held:
                    z.fill_(7)
        for whole, before in self.held.values():
            whole.copy_(before)

    def replay(self):
        seen.launch("graph")
        for function, args, kwargs, out in self.tape:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return 0, 1


# ------------------------------------------------------------------------------------------------ streams, and copies that are under way


class Place(threading.local):
    """The current device of a thread, and its current streams."""

    def __init__(self):
        self.device, self.streams = 0, {}

    def stream(self, index=None):
        index = self.device if index is None else index
        return self.streams.get(index, Stream.default(index))


class Stream:
    defaults: ClassVar[dict[int, Stream]] = {}
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
        arrive(self.behind)
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
    numbers, stream = source.inner.clone(), place.stream(source.where.index)
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


def there(device):
    """A device of the pretence, with its index; None for the CPU."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda":
        return torch.device("cuda", index_of(device))
    return torch.device("mps", 0) if device.type == "mps" else None


# ------------------------------------------------------------------------------------------------ what torch's own functions become


class Moved(torch.autograd.Function):
    """A copy on another device; None is the host."""

    @staticmethod
    def forward(ctx, z, where):
        ctx.source = z.where if isinstance(z, Pretended) else None
        if where is None:
            seen.read("to")
            return unwrap(z).clone()
        seen.launch("to") if isinstance(z, Pretended) else seen.copy("to")
        return Pretended(unwrap(z).clone(), where)

    @staticmethod
    def backward(ctx, grad):
        return Moved.apply(grad, ctx.source), None


def moved(z, device):
    where = there(device)
    return z if where == (z.where if isinstance(z, Pretended) else None) else Moved.apply(z, where)


def to(original):
    def call(self, *args, **kwargs):
        device, rest = kwargs.pop("device", None), list(args)
        like = kwargs.pop("other", None)
        if rest and isinstance(rest[0], torch.Tensor):
            like = rest.pop(0)
        elif rest and (isinstance(rest[0], (str, int, torch.device)) or rest[0] is None):
            device = rest.pop(0)
        dtype = kwargs.pop("dtype", None)
        if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
            dtype = rest.pop(0) or dtype
        rest = [] if device is not None or like is not None else rest  # whether to wait, or to copy at all events
        if like is not None:
            device, dtype = like.device, like.dtype
        z = self
        if dtype is not None and there(self.device) is None:  # on the way to a device that may not have the type it has now
            z = original(z, dtype)
        z = z if device is None else moved(z, device)
        z = z if dtype is None else original(z, dtype)
        return original(z, *rest, **kwargs) if kwargs.keys() - {"non_blocking"} else z

    return call


def factory(original, name):
    def call(*args, device=None, pin_memory=False, requires_grad=False, **kwargs):
        like = next((z for z in args[:1] if isinstance(z, Pretended)), None)
        if device is None and like is None:
            out = original(*args, **kwargs)
        elif device is None and name not in ("tensor", "as_tensor"):
            out = original(*args, **kwargs)  # as the tensor that it is like
        elif device is not None and there(device) is None:
            out = original(*tree_map(unwrap, args), device=device, **kwargs)
        else:
            where = like.where if device is None else there(device)
            if name == "as_tensor" and like is not None and where == like.where:
                return like if kwargs.get("dtype") is None else like.to(kwargs["dtype"])
            made = original(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
            if name in ("tensor", "as_tensor"):
                seen.copy(name)
            elif "empty" not in name:
                seen.launch(name)
            out = Pretended(made.clone() if name == "as_tensor" else made, where)
        return out.requires_grad_() if requires_grad else out

    return call


class Generator(torch.Generator):
    """On the CPU, whatever is asked."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def launcher(run):
    """Triton's launch in its interpreter, on the device that is current."""

    def call(self, *args, **options):
        given = [*args, *options.values()]
        tensors = [z for z in given if isinstance(z, torch.Tensor)]
        if places := devices_of(tensors):
            if any(not isinstance(z, Pretended) for z in tensors):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            if places != {torch.device("cuda", place.device)}:
                raise RuntimeError(f"{self.fn.__name__} is launched on cuda:{place.device}, its tensors are on {places}")
        seen.launch(self.fn.__name__)
        seen.compiled.add((self.fn.__name__, variant(self, args, options)))
        args, options = tree_map(unwrap, args), tree_map(unwrap, options)
        before, seen.quiet = seen.quiet, True
        try:
            if seen.graph is not None:
                return seen.graph.record(functools.partial(run, self), args, options)
            return run(self, *args, **options)
        finally:
            seen.quiet = before

    return call


def variant(kernel, args, options):
    """What a compiled kernel is kept under: types, addresses and integers that are multiples of 16, integers that are 1, and constants."""
    assert options.get("enable_fp_fusion") is True, "floating-point fusion is left to Triton, whose default changes with its version"
    plain = kernel.kwargs.get("do_not_specialize") or ()

    def key(name, z):
        if isinstance(z, torch.Tensor):
            return str(z.dtype), z.data_ptr() % 16 == 0
        if type(z) is not int or name in plain:
            return type(z).__name__
        return "1" if z == 1 else z % 16 == 0

    constants = {name: z for name, z in options.items() if name not in ("grid", "warmup")}
    return tuple(map(key, kernel.arg_names, args)), tuple(sorted(constants.items()))


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
        "is_current_stream_capturing": lambda: seen.graph is not None,
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
        "CUDAGraph": CUDAGraph,
        "Stream": Stream,
    }
    cuda |= dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"), lambda *_, **__: None)
    cuda |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_, **__: 0)
    tensor = {name: factory(getattr(torch.Tensor, name), name) for name in METHODS}
    tensor |= {"to": to(torch.Tensor.to), "cpu": lambda z: moved(z, "cpu"), "cuda": lambda z, device=None: moved(z, index_of(device))}
    tensor |= {"pin_memory": lambda z: z, "is_pinned": lambda z: False, "type_as": lambda z, other: z.to(other)}
    made = {name: factory(getattr(torch, name), name) for name in FACTORIES} | {"Generator": Generator}
    changed = [(torch.cuda, cuda), (torch.Tensor, tensor), (torch, made)]
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
        # A module that is moved gets new parameters: the old ones cannot become tensors of another class.
        restore.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        seen.__init__()
        yield seen
