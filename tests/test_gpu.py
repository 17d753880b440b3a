"""All methods and evaluations on a GPU: on a simulated one (simulated_gpu.py), or, where there is
one, on a real one. Each has tests of its own; the others are skipped."""

import functools
import json
from collections import Counter

import pytest
import torch
from conftest import METHODS, assert_same_state, metrics, train, weights
from simulated_gpu import AVAILABLE, GPUTensor, SimulatedGPU, calling_function, registered
from test_segment import Squares
from torch import Tensor
from torch.nn import functional as F

import common
import eval_linear
import mae_perceptual
import mixed_ae

REAL = torch.cuda.is_available()
simulated = pytest.mark.skipif(
    REAL or not AVAILABLE, reason="the simulation takes torch 2.10, Python 3.11 and no GPU"
)
real = pytest.mark.skipif(not REAL, reason="takes a GPU")

# Functions in which the host may wait for the GPU within a training step, and why.
MAY_WAIT = {
    "mae_perceptual.AdaptiveAugment.update": "in each 4th step p changes, which the CPU needs",
}
# Functions whose products of matrices are computed in fp32 in spite of autocast, and why.
FP32_PRODUCTS = {
    "mae_perceptual.gram_matrix": "the difference of two Gram matrices is small",
    "mae_perceptual.fp32_score": "scores near 1 would be rounded to steps of 1/128",
    "mae_perceptual.AdaptiveAugment.forward": "colours of images are changed before the network",
    "mixed_ae.homologous_contrastive_loss": "cosines are divided by a small temperature",
    "cmae.cosines": "cosines are divided by a small temperature",
    "supervised_mim.VQTokenizer.quantize": "two codes may be almost equally near",
}
# Functions in which some products are computed in fp32.
SOME_FP32_PRODUCTS = {
    "common.Attention.forward": "the path length needs attention that is not fused",
    "mae_perceptual.MSGDiscriminator.forward": "R1 differentiates it in every 16th step",
}
METHODS_HERE = [method for method in METHODS if method != "msg"]  # msg-ada has all of it


class WatchedGPU(SimulatedGPU):
    """Counts for each function of ours the waits within training steps, and notes in which types
    matrices are multiplied."""

    def __init__(self, **options):
        super().__init__(**options)
        self.in_step, self.waits_in_steps = False, Counter()
        self.products = set()  # (in a step, function, type)

    def wait(self) -> None:
        super().wait()
        if self.in_step:
            self.waits_in_steps[calling_function()] += 1

    def dispatch(self, func, args, kwargs):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "convolution"):
            function = calling_function()
            types = {x.dtype for x in args if isinstance(x, GPUTensor)} - {torch.float64}
            if function != "backward":
                self.products |= {(self.in_step, function, dtype) for dtype in types}
        return super().dispatch(func, args, kwargs)


@pytest.fixture(scope="module")
def device():
    with registered():
        yield


@pytest.fixture
def gpu(device, monkeypatch):
    """gpu(): a context in which the process has a simulated GPU."""
    steps = common.Run.steps

    def watched(run):  # between two steps, the host may wait
        for micro_batches in steps(run):
            set_in_step(True)
            yield micro_batches
            set_in_step(False)

    def set_in_step(value: bool) -> None:
        if SimulatedGPU.current is not None:
            SimulatedGPU.current.in_step = value

    monkeypatch.setattr(common.Run, "steps", watched)
    # p of msg-ada rises at once, so that images are augmented.
    ada = mae_perceptual.AdaptiveAugment.__init__
    monkeypatch.setattr(ada, "__defaults__", (-1.0, 2, 500))
    yield lambda **options: WatchedGPU(**options).plugged_in()
    SimulatedGPU.current = None


def run(method: str, out, data, *flags) -> None:
    """Two epochs of two steps, unless --steps says less."""
    tokenizer = ["--tokenizer-epochs", 1] if method == "supervised_mim" else []
    train(method, out, data, "--batch-size", 32, "--epochs", 2, "--recon-every", 2,
          "--knn-every", 0, *tokenizer, *flags)  # fmt: skip


# ------------------------------------------------------------------------------ the simulation


def forbidden() -> dict:
    """Operations that CUDA refuses, by name. `x` is on the GPU, `y` on the CPU."""
    x, y = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    index = torch.zeros(2, dtype=torch.int64)
    return {
        "sum of both": lambda: x + y,
        "in place": lambda: x.add_(y),
        "into a tensor of the CPU": lambda: torch.tensor(1.0).add_(x.sum()),
        "product": lambda: x @ y,
        "cat": lambda: torch.cat([x, y]),
        "stack": lambda: torch.stack([x, y]),
        "where": lambda: torch.where(x > 0, x, y),
        "weight of a linear layer": lambda: F.linear(x, y),
        "bias of a linear layer": lambda: F.linear(x, x, y[0]),
        "convolution": lambda: F.conv2d(x[None, None], y[None, None]),
        "embedding": lambda: F.embedding(index, x),
        "running statistics": lambda: F.batch_norm(x, y[0], y[1], training=True),
        "layer norm": lambda: F.layer_norm(x, (2,), y[0]),
        "classes of a loss": lambda: F.cross_entropy(x, index),
        "gather": lambda: x.gather(1, index[None]),
        "scatter": lambda: x.scatter(1, index[None].to("cuda"), y),
        "index of the GPU, tensor of the CPU": lambda: y[index.to("cuda")],
        "values for a mask": lambda: x.masked_fill(y > 0, 0),
        "interpolation": lambda: torch.lerp(x, y, 0.5),
        "exponential moving average": lambda: torch._foreach_lerp_([x], [y], 0.5),
        "numpy": lambda: x.numpy(),
        "generator of the CPU": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    }


def waiting() -> dict:
    """Operations for which the host waits once, by name."""
    x, y = torch.ones(4, device="cuda"), torch.ones(4)
    return {
        "item": lambda: x.sum().item(),
        "float": lambda: float(x.sum()),
        "bool": lambda: bool(x.sum() > 1),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "copy to the CPU": lambda: y.copy_(x),
        "copy to the CPU, non_blocking": lambda: x.to("cpu", non_blocking=True),
        "copy from the CPU": lambda: y.to("cuda"),
        "copy from the CPU, in place": lambda: x.copy_(y),
        "tensor of a list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "index by a mask": lambda: x[x > 0],
        "index by a tensor of the CPU": lambda: x[y.long()],
        "index by a list": lambda: x[[1, 0]],
        "assignment to a list": lambda: x.__setitem__([1, 0], 2.0),
        "assignment of a tensor to a mask": lambda: x.index_put_([x > 0], x + 1),
        "nonzero": lambda: x.nonzero(),
        "masked_select": lambda: x.masked_select(x > 0),
        "unique": lambda: x.unique(),
        "repeat_interleave": lambda: x.repeat_interleave(x.long()),
        "bincount": lambda: x.long().bincount(),
        "equal": lambda: torch.equal(x, x + 1),
    }


def allowed() -> dict:
    """Operations for which nobody waits, and which CUDA does, by name."""
    x, y, number = torch.ones(4, device="cuda"), torch.ones(4), torch.tensor(2.0)
    return {
        "number of the CPU": lambda: x * number,
        "where with a number": lambda: torch.where(x > 0, x, number),
        "copy from the CPU, non_blocking": lambda: y.to("cuda", non_blocking=True),
        "the same in place": lambda: x.copy_(y, non_blocking=True),
        "assignment of a number to a mask": lambda: x.__setitem__(x > 0, 1.0),
        "copy on the GPU": lambda: x.to(torch.float64),
        "random numbers": lambda: torch.rand_like(x),
        "one_hot": lambda: F.one_hot(x.long(), 5),
        "topk": lambda: x.topk(2).indices,
    }


@simulated
def test_the_simulation_refuses_what_cuda_refuses(gpu):
    accepted = []
    with gpu():
        for name, operation in forbidden().items():
            try:
                operation()
                accepted.append(name)
            except (RuntimeError, TypeError):
                pass
    assert accepted == []


@simulated
def test_the_simulation_counts_waits(gpu):
    with gpu() as device:
        device.in_step = True
        for operations, expected in ((waiting(), 1), (allowed(), 0)):
            for name, operation in operations.items():
                device.waits.clear()
                operation()
                assert (name, device.waits.total()) == (name, expected)
        assert set(device.waits_in_steps) == {"backward"}  # no function of a script


@simulated
def test_random_numbers_of_the_simulation(gpu):
    def numbers() -> tuple:
        torch.manual_seed(0)
        x = torch.rand(3, device="cuda")
        return x.tolist(), torch.rand(3).tolist(), torch.randn_like(x).tolist()

    with gpu():
        own, plain, more = numbers()
        assert numbers() == (own, plain, more)
    torch.manual_seed(0)
    assert plain == torch.rand(3).tolist() != own
    with gpu(shared_numbers=True):
        own, after, _ = numbers()
    assert own == plain != after


@simulated
def test_autocast_of_the_simulation(gpu):
    with gpu():
        x = torch.randn(2, 4, device="cuda")
        weight = torch.randn(4, 4, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            y = F.linear(x, weight)
            assert y.dtype == (y @ y.T).dtype == torch.bfloat16
            assert y.exp().dtype == F.layer_norm(y, (4,)).dtype == y.sum().dtype == torch.float32
            with torch.autocast("cuda", enabled=False):
                assert F.linear(x, weight).dtype == torch.float32
        y.float().sum().backward()
        assert F.linear(x, weight).dtype == weight.grad.dtype == torch.float32
        # Fused attention has no second derivative.
        q = torch.randn(1, 1, 4, 8, device="cuda", requires_grad=True)
        out = F.scaled_dot_product_attention(q, q, q)
        (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            gradient.sum().backward()


# ------------------------------------------------------------------------------ methods


@simulated
@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_run_equals_the_cpu(method, gpu, shapes_folder, tmp_path):
    """A run that is stopped and resumed, in fp32 and with the random numbers of the CPU."""
    # Both regularisers of msg-ada are due in step 0, the path length again in step 4.
    more, stops = (["--epochs", 3], (3, 5)) if method == "msg-ada" else ([], (1, 3))

    def run_in_parts(out, *flags) -> None:
        for stop in stops:
            run(method, out, shapes_folder, "--knn-every", 2, "--steps", stop, *more, *flags)

    run_in_parts(tmp_path / "cpu")
    with gpu(shared_numbers=True) as device:
        run_in_parts(tmp_path / "gpu", "--device", "cuda", "--precision", "fp32")
    assert set(device.waits_in_steps) <= MAY_WAIT.keys()
    saved = [torch.load(tmp_path / x / "checkpoint.pt") for x in ("cpu", "gpu")]
    for content in saved:
        for name in ("config", "identity", "history"):
            del content[name]
    torch.testing.assert_close(*saved, rtol=1e-4, atol=1e-4)
    one, other = (metrics(tmp_path / x) for x in ("cpu", "gpu"))
    for a, b in zip(one, other, strict=True):
        for name in a.keys() - {"images_per_s", "data_wait"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    assert files(tmp_path / "cpu") == files(tmp_path / "gpu")


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@simulated
@pytest.mark.parametrize("method", METHODS_HERE)
def test_bf16_resumes_exactly(method, gpu, shapes_folder, tmp_path):
    """With the random numbers of the GPU, bit for bit."""
    with gpu() as device:
        run(method, tmp_path / "whole", shapes_folder, "--steps", 2, "--device", "auto")
        torch.manual_seed(1)
        if method == "supervised_mim":  # the first of the two steps of its tokenizer
            run(method, tmp_path / "parts", shapes_folder, "--train-tokenizer", "--steps", 1,
                "--device", "auto")  # fmt: skip
        for stop in (1, 2):
            run(method, tmp_path / "parts", shapes_folder, "--steps", stop, "--device", "auto")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    if method == "supervised_mim":
        assert_same_state(tmp_path / "whole" / "tokenizer", tmp_path / "parts" / "tokenizer")
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["precision"] == "auto"
    assert torch.load(tmp_path / "parts" / "checkpoint.pt")["identity"]["precision"] == "bf16"
    check_steps(device)


@simulated
@pytest.mark.parametrize("method", METHODS_HERE)
def test_fp16(method, gpu, shapes_folder, tmp_path):
    with gpu() as device:
        run(method, tmp_path, shapes_folder, "--steps", 2, "--device", "cuda", "--precision",
            "fp16")  # fmt: skip
    (line,) = metrics(tmp_path)
    assert line["skipped"] < 1
    check_steps(device)


def check_steps(device: WatchedGPU) -> None:
    """In the training steps, the host waited and fp32 was used where that is meant, and there
    alone."""
    assert set(device.waits_in_steps) <= MAY_WAIT.keys()
    products = [product[1:] for product in device.products if product[0]]
    fp32 = {function for function, dtype in products if dtype == torch.float32}
    half = {function for function, dtype in products if dtype != torch.float32}
    assert fp32 <= FP32_PRODUCTS.keys() | SOME_FP32_PRODUCTS.keys()
    assert half and not half & FP32_PRODUCTS.keys()


# ------------------------------------------------------------------------------ evaluations


def evaluate(mode: str, folder, out, *flags) -> dict:
    """The entry of eval.json."""
    arguments = [folder, "--out", out, "--workers", 0, *MODES[mode], *flags]
    data = (Squares(32), Squares(16)) if mode == "segment" else None  # these have masks
    eval_linear.main(common.parse(eval_linear.Config, {}, [str(x) for x in arguments]), data)
    (entry,) = json.loads((out / "eval.json").read_text()).values()
    return entry


MODES = {
    "cached": ["--weight-decay", 0.1],
    "protocol": ["--no-cache-features", "--epochs", 1, "--batch-size", 32],
    "knn": ["--mode", "knn"],
    "finetune": ["--mode", "finetune", "--epochs", 1, "--batch-size", 16],
    "segment": ["--mode", "segment", "--epochs", 1, "--batch-size", 16],
}


@simulated
@pytest.mark.parametrize("mode", MODES)
def test_evaluation(mode, gpu, whole_run, tmp_path):
    """In fp32, the scores are those of the CPU. In bf16, the host waits for nothing in a step."""
    folder = whole_run("mae")
    expected = evaluate(mode, folder, tmp_path / "cpu", "--device", "cpu")
    flags = ["--device", "cuda", "--precision", "fp32"]
    with gpu(shared_numbers=True):
        found = evaluate(mode, folder, tmp_path / "fp32", *flags)
    for name in expected.keys() - {"settings", "encoder"}:
        assert found[name] == expected[name]
    with gpu() as device:
        evaluate(mode, folder, tmp_path / "bf16")
    assert device.waits.total() > 0 and device.waits_in_steps.total() == 0
    fp32 = {function for _, function, dtype in device.products if dtype == torch.float32}
    assert fp32 <= {"common.knn_scores"}


# ------------------------------------------------------------------------------ on a real GPU


@real
@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_a_gpu_equals_the_cpu(method, shapes_folder, tmp_path, monkeypatch, request):
    """The gradients of one step in fp32, with the same masks and noise and without TF32. The
    learning rate of the first step is 0, so that weights say nothing."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    for module, name in ((common, "random_masking"), (mixed_ae, "random_mixing")):
        monkeypatch.setattr(module, name, drawn_on_the_cpu(getattr(module, name)))
    noise = lambda x: torch.randn(x.shape, dtype=x.dtype).to(x.device)  # noqa: E731
    monkeypatch.setattr(torch, "randn_like", noise)
    flags = ["--steps", 1, "--precision", "fp32"]
    if method == "supervised_mim":
        flags += ["--tokenizer", request.getfixturevalue("tokenizer")]
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for device in ("cpu", "cuda"):
            run(method, tmp_path / device, shapes_folder, *flags, "--device", device)
    one, other = (weights(tmp_path / device, "optimizer")["state"] for device in ("cpu", "cuda"))
    assert one.keys() == other.keys()
    for number, state in one.items():
        error = (other[number]["exp_avg"] - state["exp_avg"]).norm()
        assert error <= 1e-3 * state["exp_avg"].norm() + 1e-7, number


def drawn_on_the_cpu(function):
    """The function, its random numbers being the CPU's, and its results on the device."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if kwargs:  # a generator, which is the CPU's
            return function(*args, **kwargs)
        *sizes, device = args
        out = function(*sizes)
        return out.to(device) if isinstance(out, Tensor) else tuple(x.to(device) for x in out)

    return wrapped


@real
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_on_a_gpu_do_not_wait(method, precision, shapes_folder, tmp_path, monkeypatch):
    """Within steps, torch raises an error at an operation for which the host waits."""
    steps = common.Run.steps

    def watched(run):
        for micro_batches in steps(run):
            torch.cuda.set_sync_debug_mode("error")
            yield micro_batches
            torch.cuda.set_sync_debug_mode("default")

    update = mae_perceptual.AdaptiveAugment.update

    def may_wait(*args) -> None:  # it is in MAY_WAIT
        torch.cuda.set_sync_debug_mode("default")
        update(*args)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(common.Run, "steps", watched)
    monkeypatch.setattr(mae_perceptual.AdaptiveAugment, "update", may_wait)
    try:
        run(method, tmp_path, shapes_folder, "--device", "cuda", "--precision", precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics(tmp_path)[-1]["step"] == 4


@real
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_gpu_resumes(method, shapes_folder, tmp_path):
    """Sums on a GPU have no fixed order, so that the runs are equal but for rounding."""
    flags = ["--device", "cuda", "--precision", "fp32"]
    run(method, tmp_path / "whole", shapes_folder, "--steps", 2, *flags)
    for stop in (1, 2):
        run(method, tmp_path / "parts", shapes_folder, "--steps", stop, *flags)
    one, other = (metrics(tmp_path / name)[-1] for name in ("whole", "parts"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@real
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_on_a_gpu(mode, whole_run, tmp_path):
    entry = evaluate(mode, whole_run("mae"), tmp_path)
    assert 0 <= entry["miou" if mode == "segment" else "top1"] <= 100
