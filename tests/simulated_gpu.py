"""A simulated GPU, with which code for CUDA is tested on a machine that has none.

    with simulated_gpu.registered():                  # once, for all tests of a module
        with SimulatedGPU().plugged_in() as gpu:      # the process has a GPU now
            x = torch.ones(3, device="cuda")          # x.device is cuda:0, its data lie on the CPU
            x.sum().item()
        gpu.waits                                     # for which functions of ours the host waited

A tensor on it is a `GPUTensor`, which wraps an ordinary tensor. Every operation on such tensors, or
that makes one, goes through `SimulatedGPU.dispatch`. It does what CUDA would do:

    mixtures of devices      raises RuntimeError for those that CUDA forbids
    waits                    counts operations for which the host waits, such as .item()
    random numbers           come from a generator of its own; `shared_numbers` takes the CPU's
    autocast                 follows CUDA's lists of operations, not the CPU's, which are shorter
    attention                has a second derivative with SDPBackend.MATH alone

It does not simulate CUDA's kernels and their rounding, memory, pinned or not, streams, NCCL or
torch.compile. Unlike on CUDA, model.to("cuda") makes new parameters: optimisers come afterwards.

PyTorch lets a program add a device of its own, which dispatches as "PrivateUse1". Ours is
registered there as "sim", because PyTorch decides by this name which functions it calls; Python
code that reads tensor.device sees cuda:0.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten, CUDA, CPU = torch.ops.aten, torch.device("cuda", 0), torch.device("cpu")
OURS = {str(path): path.stem for path in Path(__file__).resolve().parent.parent.glob("*.py")}
register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
# Without a name for each method (co_qualname), waits could not be told apart.
AVAILABLE = register is not None and sys.version_info >= (3, 11)

# ------------------------------------------------------------------------------ tensors

# Like pointwise operations, these take a tensor without dimensions from the CPU.
TAKES_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# The host waits for these, because it needs a value, or because values decide a result's shape.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
         "unique_consecutive", "equal", "repeat_interleave", "_linalg_eigh"}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


class GPUTensor(Tensor):
    """A tensor on the GPU. `inner` is the ordinary tensor that holds its data."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="sim:0",
        )  # fmt: skip
        self.inner = inner
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return SimulatedGPU.current.dispatch(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        """torch.save stores an ordinary tensor, which torch.load(map_location="cpu") gives."""
        return self.detach().cpu().__reduce_ex__(protocol)

    # PyTorch would copy a list to the GPU below the level at which we see operations.
    def __getitem__(self, index):
        return super().__getitem__(lists_as_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(lists_as_tensors(index), value)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def __repr__(self):
        return f"GPUTensor({self.inner})"


def lists_as_tensors(index):
    if isinstance(index, tuple):
        return tuple(lists_as_tensors(x) for x in index)
    return torch.tensor(index) if isinstance(index, list) else index


def apply(function, x):
    """`function` of a tensor, or of all tensors in nested lists and tuples."""
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(apply(function, y) for y in x) if type(x) in (list, tuple) else x


def product(func, args: list, kwargs: dict):
    """func(*args, **kwargs), a product of matrices or a convolution. In half precision it is
    computed in fp32 and then rounded, as on CUDA; a CPU without bf16 would be far slower."""
    dtypes = set()
    apply(lambda x: dtypes.add(x.dtype), args)
    half = dtypes & {torch.bfloat16, torch.float16}
    if not half:
        return func(*args, **kwargs)
    out = func(*[apply(Tensor.float, x) for x in args], **kwargs)
    return apply(lambda x: x.to(*half), out)


def is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type in ("cuda", "sim")


# ------------------------------------------------------------------------------ the device


class SimulatedGPU(TorchDispatchMode):
    """With `shared_numbers`, random numbers come from the CPU's generator, so that a run on the GPU
    equals one on the CPU. `place` is where the data of its tensors lie; on "meta", operations
    compute shapes and no values. A subclass may extend `dispatch`, which is called for every
    operation that has to do with the GPU."""

    current = None  # the GPU that is plugged in; backward passes, in their own threads, need it

    def __init__(self, shared_numbers: bool = False, place: str = "cpu"):
        super().__init__()
        self.shared_numbers, self.place = shared_numbers, torch.device(place)
        self.generator = torch.Generator().manual_seed(0)
        self.waits = Counter()  # function of ours -> how often the host waited in it

    def seed(self, seed: int) -> None:
        """As on CUDA, the same seed gives other numbers than on the CPU."""
        self.generator.manual_seed(seed ^ 1)

    def wait(self) -> None:
        self.waits[calling_function()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if GPUTensor not in types and not is_gpu(kwargs.get("device")):
            return func(*args, **kwargs)  # nothing of it is on the GPU
        return self.dispatch(func, args, kwargs)

    def dispatch(self, func, args: tuple, kwargs: dict):
        """Computes func(*args, **kwargs), of which an argument or the result is on the GPU."""
        wrappers = {}  # id(x.inner) -> x, for each argument x on the GPU
        others = []  # the arguments on the CPU

        def unwrap(x):
            if isinstance(x, GPUTensor):
                wrappers[id(x.inner)] = x
                return x.inner
            others.append(x)
            return x.to(self.place) if x.dim() and self.place != CPU else x

        plain = [apply(unwrap, x) for x in args]
        options = {name: apply(unwrap, x) for name, x in kwargs.items()}
        target = kwargs.get("device")  # of the result; None is where the arguments are
        on_gpu, name = is_gpu(target) if target else True, func.overloadpacket.__name__
        if name == "_to_copy" or (name == "copy_" and others):
            on_gpu = on_gpu if name == "_to_copy" else isinstance(args[0], GPUTensor)
            self.check_copy(others, on_gpu, quiet=kwargs.get("non_blocking") or args[2:] == (True,))
        else:
            self.check_devices(func, name, args, others)
        if kwargs.get("generator") is not None:  # there are no generators but the CPU's here
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in WAITS:
            self.wait()
        if target:
            options["device"] = self.place if on_gpu else CPU
        with self.own_numbers(func):
            if name in PRODUCTS:
                out = product(func, plain, options)
            else:
                out = func(*plain, **options)

        def wrap(x):
            old = wrappers.get(id(x))  # not None if the operation works in place
            if old is not None and old.shape != x.shape:
                raise NotImplementedError(f"{func} changes the shape of a simulated tensor")
            return GPUTensor(x) if old is None else old

        return apply(wrap, out) if on_gpu else out

    def check_copy(self, others: list, to_gpu: bool, quiet: bool) -> None:
        """Nobody waits for a copy from GPU to GPU. For one from the CPU, the host waits unless it
        is non_blocking; for one to the CPU always, because whoever reads the result has to."""
        if not to_gpu or (others and not quiet):
            self.wait()

    def check_devices(self, func, name: str, args: tuple, others: list) -> None:
        """RuntimeError if CUDA forbids `others`, which are the arguments on the CPU."""
        if name in INDEXING and isinstance(args[0], GPUTensor):
            for index in args[1]:  # an index may be on the CPU, and is copied then
                on_cpu = any(index is x for x in others)
                # The size of x[mask] depends on values; that of x[mask] = 0 does not.
                mask = index is not None and index.dtype in (torch.bool, torch.uint8)
                if on_cpu or (mask and (name == "index" or args[2].dim() > 0)):
                    self.wait()
            others = [x for x in others if not any(x is index for index in args[1])]
        if torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS or name in INDEXING:
            written = args[0] if func._schema.is_mutable else None
            others = [x for x in others if x.dim() or x is written]
        if others and not (name.startswith("_foreach_") and all(x.dim() == 0 for x in others)):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least "
                               f"two devices, cuda:0 and cpu ({func})")  # fmt: skip

    @contextlib.contextmanager
    def own_numbers(self, func):
        """Meanwhile, the default generator has the state of the GPU's generator."""
        if self.shared_numbers or torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        state = torch.get_rng_state()
        torch.default_generator.set_state(self.generator.get_state())
        yield
        self.generator.set_state(torch.get_rng_state())
        torch.default_generator.set_state(state)

    @contextlib.contextmanager
    def plugged_in(self):
        """Meanwhile, the process has this GPU. To be used within `registered`."""

        def in_two_steps(original):  # which cannot make a GPUTensor
            def tensor(data, *args, device=None, **kwargs):
                x = original(data, *args, **kwargs)
                return x if device is None else x.to(device)

            return tensor

        types = torch.utils._foreach_utils._foreach_supported_types
        answers = dict(
            is_available=True, device_count=1, current_device=0, set_device=None, synchronize=None,
            get_device_name="simulated GPU", is_bf16_supported=True, _lazy_init=None,
        )  # fmt: skip
        pinning = torch.utils.data._utils.pin_memory
        SimulatedGPU.current = self
        with contextlib.ExitStack() as stack:
            for name, answer in answers.items():
                replace(stack, torch.cuda, name, lambda *_, answer=answer, **__: answer)
            replace(stack, torch.cuda, "manual_seed_all", self.seed)
            replace(stack, torch, "autocast", Autocast)
            replace(stack, torch, "tensor", in_two_steps(torch.tensor))
            replace(stack, torch, "as_tensor", in_two_steps(torch.as_tensor))
            replace(stack, pinning, "pin_memory", lambda data, *_: data)
            replace(stack, torch.utils._foreach_utils, "_foreach_supported_types",
                    [*types, GPUTensor])  # fmt: skip
            stack.enter_context(self)
            yield self


def replace(stack: contextlib.ExitStack, target, name: str, value) -> None:
    stack.enter_context(mock.patch.object(target, name, value))


def calling_function() -> str:
    """Which function of ours is running, as file.Class.function."""
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename not in OURS:
        frame = frame.f_back
    if frame is None:  # in a thread of a backward pass
        return "backward"
    function = frame.f_code.co_qualname.partition(".<locals>")[0]  # that encloses a closure
    return f"{OURS[frame.f_code.co_filename]}.{function}"


# ------------------------------------------------------------------------------ autocast

# CUDA's lists, as in PyTorch's "Autocast Op Reference", of operations that occur in networks.
HALF = """linear matmul mm bmm addmm addbmm baddbmm addmv mv conv1d conv2d conv3d convolution prelu
    scaled_dot_product_attention"""
FP32 = """layer_norm group_norm softmax.int log_softmax.int nll_loss mse_loss l1_loss smooth_l1_loss
    huber_loss binary_cross_entropy_with_logits kl_div exp expm1 log log10 log2 log1p reciprocal
    rsqrt pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus logsumexp cosine_similarity cdist
    norm.Scalar norm.ScalarOpt_dim upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa prod prod.dim_int cumprod cumsum sum
    sum.dim_IntList"""
WIDEST = "addcdiv addcmul atan2 cross dot grid_sampler index_put scatter_add"
KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


class Autocast(torch.amp.autocast_mode.autocast):
    """torch.autocast("cuda", ...) for the simulated GPU. Like the original, it casts a weight once
    and keeps the result until the outermost context ends."""

    depth, casts = 0, {}

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("sim" if device_type == "cuda" else device_type, *args, **kwargs)

    def __enter__(self):
        Autocast.depth += 1
        return super().__enter__()

    def __exit__(self, *args):
        Autocast.depth -= 1
        if Autocast.depth == 0:
            Autocast.casts.clear()
        return super().__exit__(*args)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    known = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not (known and isinstance(x, GPUTensor)) or x.dtype == dtype:
        return x
    if not (x.dtype == torch.float32 and x.requires_grad and x.is_leaf):
        return x.to(dtype)
    if id(x) not in Autocast.casts:
        Autocast.casts[id(x)] = x, x.to(dtype)  # x stays alive, and its id is no other tensor's
    return Autocast.casts[id(x)][1]


def under_autocast(name: str, choose):
    """The operation under autocast: choose(floating point types of its arguments) is the type that
    they are cast to."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def kernel(*args, **kwargs):
        dtypes = set()
        apply(lambda x: dtypes.add(x.dtype) if x.is_floating_point() else None, [*args])
        dtype = choose(dtypes)
        with torch._C._ExcludeDispatchKeyGuard(KEY):
            args = [apply(lambda x: cast(x, dtype), x) for x in args]
            kwargs = {name: apply(lambda x: cast(x, dtype), x) for name, x in kwargs.items()}
            return operation(*args, **kwargs)

    return kernel


def widest(dtypes: set[torch.dtype]) -> torch.dtype:
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **_):
    """scaled_dot_product_attention. As on CUDA, the fused kernel is taken unless SDPBackend.MATH
    is demanded; it has no second derivative."""
    if torch.backends.cuda.flash_sdp_enabled():
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    math = aten._scaled_dot_product_attention_math
    return math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


class Backend:
    """What PyTorch expects of torch.sim. Seeds are set by torch.cuda.manual_seed_all."""

    is_initialized = is_available = lambda self: True
    _is_in_bad_fork = current_device = lambda self: 0
    device_count = lambda self: 1  # noqa: E731
    manual_seed_all = lambda self, seed: None  # noqa: E731
    get_amp_supported_dtype = lambda self: [torch.bfloat16, torch.float16]  # noqa: E731


def add_device() -> None:
    """Makes the device known to PyTorch until the process ends, which changes nothing for tensors
    on the CPU. Call this before the first backward pass, which makes a queue for each device."""
    if not hasattr(torch, "sim"):
        register("sim", backend_module=Backend())
        torch._C._ensureCUDADeviceGuardSet()  # so that code may ask about the device cuda:0


@contextlib.contextmanager
def registered():
    """Meanwhile, the device follows CUDA's rules for autocast and attention."""
    add_device()
    # Operations of CUDA's lists are cast before they run; all others run as they are.
    unlisted, listed = Library("_", "IMPL"), Library("aten", "IMPL")
    unlisted.fallback(fallthrough_kernel, "AutocastPrivateUse1")
    lists = (HALF, lambda _: torch.get_autocast_dtype("sim")), (FP32, lambda _: torch.float32)
    for names, choose in (*lists, (WIDEST, widest)):
        for name in names.split():
            listed.impl(name, under_autocast(name, choose), "AutocastPrivateUse1")
    listed.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    try:
        yield
    finally:
        listed._destroy()
        unlisted._destroy()
