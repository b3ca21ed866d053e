"""Bad input of every op: one message from kernels and from fakes, and nothing changed."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import blaq_kernels  # noqa: F401
from blaq_kernels import reference as ref

NAN, INF = float("nan"), float("inf")


def step_arguments():
    shapes = [(3, 10), (4,)]
    floats = {name: [torch.rand(s) for s in shapes] for name in
              ("params", "grads", "trial_grads", "latents", "exp_avgs", "exp_avg_sqs")}
    return {**floats, "scales": [torch.ones(3, 1), torch.ones(1, 1)], "lr": torch.tensor(0.1),
            "step": torch.tensor(1.0), "backtrack": torch.tensor(0.6), "beta1": 0.9, "beta2": 0.99,
            "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0, "levels": [0.5, 1.0], "group_size": -1,
            "max_iter": 5, "method": "alternating"}


def trial_arguments():
    arguments = step_arguments()
    del arguments["trial_grads"], arguments["backtrack"]
    return arguments


def packed():
    return {"qweight": torch.randint(0, 256, (2, 4, 3), dtype=torch.uint8),
            "scale": torch.rand(4, 1), "levels": [0.5, 1.0], "group_size": -1}


def binary():
    return {"qweight": torch.randint(0, 256, (1, 4, 3), dtype=torch.uint8), "scale": torch.rand(4, 1)}


VALID = {
    "scaled_update": lambda: {k: torch.rand(3, 4) for k in ("latent", "grad", "curvature")},
    "blend": lambda: {"current": torch.rand(3, 4), "trial": torch.rand(3, 4), "backtrack": 0.6},
    "solve": lambda: {"latent": torch.randn(3, 10), "curvature": torch.rand(3, 10),
                      "init_scale": torch.ones(3, 1), "levels": [0.5, 1.0], "group_size": -1,
                      "max_iter": 5, "method": "exact"},
    "fused_trial": trial_arguments,
    "fused_step": step_arguments,
    "fake_quantize": lambda: {"latent": torch.randn(3, 10), "scale": torch.ones(3, 1),
                              "levels": [0.5, 1.0], "group_size": -1},
    "pack": lambda: {"codes": torch.randint(0, 4, (3, 10), dtype=torch.uint8), "bits": 2},
    "unpack": lambda: {**packed(), "in_features": 24, "dtype": torch.float32},
    "packed_linear": lambda: {"input": torch.rand(2, 24), **packed(), "bias": torch.rand(4)},
    "packed_conv2d": lambda: {"input": torch.rand(1, 6, 5, 5), **packed(), "bias": torch.rand(4),
                              "kernel_size": [2, 2], "stride": [1, 1], "padding": [0, 0],
                              "dilation": [1, 1], "groups": 1},
    "conv_repack": lambda: {"qweight": packed()["qweight"], "in_features": 24, "taps": 4, "groups": 2},
    "unrepack": lambda: {"repacked": torch.zeros(128, dtype=torch.uint8), "bits": 2, "n": 4,
                         "in_features": 24},
    "binary_repack": lambda: {"qweight": binary()["qweight"], "in_features": 24, "taps": 4, "groups": 2},
    "binary_linear": lambda: {"input": torch.rand(2, 24), **binary(), "bias": torch.rand(4),
                              "group_size": -1},
    "binary_conv2d": lambda: {"input": torch.rand(1, 6, 5, 5), **binary(), "bias": torch.rand(4),
                              "group_size": -1, "kernel_size": [2, 2], "stride": [1, 1],
                              "padding": [0, 0], "dilation": [1, 1], "groups": 1},
}
LEVELS = "levels must have 1 to {} ascending magnitudes in [0, 1], the largest 1.0, got "
SOLVER = [
    ({"levels": []}, LEVELS.format(8) + "[]"),
    ({"levels": [1.0, 0.5]}, LEVELS.format(8) + "[1"),
    ({"levels": [0.5]}, LEVELS.format(8) + "[0.5]"),
    ({"levels": [-0.5, 1.0]}, LEVELS.format(8) + "[-0.5, 1"),
    ({"levels": [NAN, 1.0]}, LEVELS.format(8) + "[nan, 1"),
    ({"levels": [i / 9 for i in range(1, 10)]}, LEVELS.format(8)),
    ({"group_size": -2}, "group_size must be 0, -1 or positive, got -2"),
    ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
    ({"method": "fast"}, "method must be 'alternating' or 'exact', got 'fast'"),
]


def item(name, index, value):
    """A change of one tensor of a list argument."""
    return {name: lambda old: [*old[:index], value, *old[index + 1:]]}


STEP = [
    *SOLVER,
    ({"lr": torch.tensor([0.1])}, "lr must be a 0-dim tensor, got [1]"),
    ({"lr": torch.tensor(1)}, "lr must be float32 or float64, got int64"),
    ({"step": torch.tensor([1.0])}, "step must be a 0-dim tensor, got [1]"),
    ({"beta1": 1.0}, "beta1 must be in [0, 1), got 1"),
    ({"beta2": -0.1}, "beta2 must be in [0, 1), got -0.1"),
    ({"eps": -1.0}, "eps must be at least 0, got -1"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1"),
    ({"clip": -1.0}, "clip must be at least 0 (0 is off), got -1"),
    ({"grads": lambda old: old[:1]}, "grads must have as many tensors as params (2), got 1"),
    ({"latents": []}, "latents must have as many tensors as params (2), got 0"),
    ({"latents": [torch.rand(47)]}, "latents[0] must have shape [48] for all params, got [47]"),
    ({"exp_avgs": [torch.rand(48).half()]}, "exp_avgs[0] must be float32, got float16"),
    ({"exp_avg_sqs": [torch.rand(96)[::2]]}, "exp_avg_sqs[0] must be contiguous, got strides [2]"),
    ({"scales": [torch.ones(2, 1)]}, "scales[0] must have shape [32] for all params, got [2, 1]"),
    ({"params": lambda old: [x.double() for x in old]},
     "params[0] must be float32 or bfloat16 or float16, got float64"),
    (item("params", 1, torch.rand(8)[::2]), "params[1] must be contiguous, got strides [2]"),
    (item("grads", 1, torch.rand(5)), "grads[1] must have the shape of params[1] [4], got [5]"),
    (item("grads", 0, torch.rand(3, 10).bfloat16()), "grads[0] must be float32, got bfloat16"),
    (item("latents", 0, torch.rand(3, 10).half()), "latents[0] must be float32, got float16"),
    (item("exp_avgs", 0, torch.rand(10, 3).t()), "exp_avgs[0] must be contiguous, got strides [1, 3]"),
    (item("exp_avg_sqs", 1, torch.rand(4, 1)),
     "exp_avg_sqs[1] must have the shape of params[1] [4], got [4, 1]"),
    (item("scales", 0, torch.ones(1)), "scales[0] must have shape [3, 1], got [1]"),
    (item("scales", 1, torch.ones(1, 1).double()), "scales[1] must be float32, got float64"),
    ({"grad_scale": torch.ones(2)}, "grad_scale must have one element, got 2"),
    ({"found_inf": torch.ones(1, dtype=torch.int32)}, "found_inf must be float32, got int32"),
]
QWEIGHT = [
    *SOLVER[:7],
    ({"qweight": torch.zeros(2, 4, 3)}, "qweight must be uint8, got float32"),
    ({"qweight": torch.zeros(4, 3, dtype=torch.uint8)},
     "qweight must have 3 dimensions [bits, N, ceil(K/8)], got [4, 3]"),
    ({"qweight": torch.zeros(3, 4, 3, dtype=torch.uint8)},
     "qweight must have 2 planes for 2 levels, got 3"),
    ({"qweight": torch.zeros(2, 4, 4, dtype=torch.uint8)},
     "qweight must have 3 bytes a row for K = 24, got 4"),
    ({"qweight": torch.zeros(2, 3, 4, dtype=torch.uint8).transpose(1, 2)},
     "qweight must be contiguous, got strides [12, 1, 4]"),
    ({"scale": torch.ones(4)}, "scale must have shape [4, 1], got [4]"),
    ({"scale": torch.ones(4, 1).half()}, "scale must be float32"),
]
BINARY = [
    ({"qweight": torch.zeros(1, 4, 3)}, "qweight must be uint8, got float32"),
    ({"qweight": torch.zeros(2, 4, 3, dtype=torch.uint8)},
     "qweight must have 1 planes for 1 levels, got 2"),
    ({"qweight": torch.zeros(1, 4, 4, dtype=torch.uint8)},
     "qweight must have 3 bytes a row for K = 24, got 4"),
    ({"scale": torch.ones(4)}, "scale must have shape [4, 1], got [4]"),
    ({"scale": torch.ones(4, 1).double()}, "scale must be float32"),
    ({"bias": torch.rand(5)}, "bias must have shape [4], got [5]"),
    ({"bias": torch.rand(4).half()}, "bias must be float32, got float16"),
    ({"repacked": torch.zeros(1, 1, 1, 1, 8)}, "repacked must be int64, got float32"),
]
GEOMETRY = [
    ({"input": torch.rand(6, 5, 5)},
     "input must have 4 dimensions [batch, channels, height, width], got [6, 5, 5]"),
    ({"kernel_size": [0, 2]}, "kernel_size must be two integers of at least 1, got [0, 2]"),
    ({"stride": [1, 0]}, "stride must be two integers of at least 1, got [1, 0]"),
    ({"padding": [-1, 0]}, "padding must be two integers of at least 0, got [-1, 0]"),
    ({"dilation": [0, 1]}, "dilation must be two integers of at least 1, got [0, 1]"),
    ({"groups": 0}, "groups must be at least 1, got 0"),
    ({"input": torch.rand(1, 0, 5, 5)}, "input must have at least 1 channel, got 0"),
    ({"groups": 4}, "input must have channels divisible by groups = 4, got 6"),
    ({"input": torch.rand(1, 8, 5, 5)}, "qweight must have 4 bytes a row for K = 32, got 3"),
    ({"input": torch.rand(1, 6, 1, 5)}, "input must be at least as large as the kernel, got [1, 5]"),
]
BAD = {
    "scaled_update": [
        ({"latent": torch.ones(3, 4, dtype=torch.int32)}, "latent must be float32 or bfloat16 or "
         "float16 or float64, got int32"),
        ({"grad": torch.rand(4, 3)}, "grad must have the shape of latent [3, 4], got [4, 3]"),
        ({"grad": torch.rand(3, 4).double()}, "grad must be float32, got float64"),
        ({"curvature": torch.rand(4, 3).t()}, "curvature must be contiguous, got strides [1, 3]"),
    ],
    "blend": [
        ({"trial": torch.rand(12)}, "trial must have the shape of current [3, 4], got [12]"),
        ({"current": torch.rand(3, 8)[:, ::2]}, "current must be contiguous, got strides [8, 2]"),
        ({"backtrack": 0.0}, "backtrack must be in (0, 1], got 0"),
        ({"backtrack": 1.5}, "backtrack must be in (0, 1], got 1.5"),
        ({"backtrack": NAN}, "backtrack must be in (0, 1], got nan"),
    ],
    "solve": [
        *SOLVER,
        ({"latent": torch.rand(3, 10).double()}, "latent must be float32, got float64"),
        ({"latent": torch.rand(10, 3).t()}, "latent must be contiguous, got strides [1, 3]"),
        ({"curvature": torch.rand(3, 9)}, "curvature must have the shape of latent [3, 10], got [3, 9]"),
        ({"init_scale": torch.ones(1)}, "init_scale must have shape [3, 1], got [1]"),
        ({"group_size": 4}, "init_scale must have shape [3, 3], got [3, 1]"),
    ],
    "fused_trial": STEP,
    "fused_step": [
        *STEP,
        (item("trial_grads", 0, torch.rand(10, 3)),
         "trial_grads[0] must have the shape of params[0] [3, 10], got [10, 3]"),
        ({"backtrack": torch.tensor([0.6])}, "backtrack must be a 0-dim tensor, got [1]"),
        ({"flips": torch.zeros(2)}, "flips must be int64, got float32"),
        ({"flips": torch.zeros(3, dtype=torch.int64)}, "flips must have shape [2], got [3]"),
    ],
    "fake_quantize": [
        ({"levels": [i / 129 for i in range(1, 130)]}, LEVELS.format(128)),
        ({"group_size": -3}, "group_size must be 0, -1 or positive, got -3"),
        ({"latent": torch.ones(3, 10, dtype=torch.int64)}, "latent must be float32 or bfloat16 or "
         "float16 or float64, got int64"),
        ({"latent": torch.rand(10, 3).t()}, "latent must be contiguous, got strides [1, 3]"),
        ({"scale": torch.ones(3)}, "scale must have shape [3, 1], got [3]"),
        ({"latent": torch.rand(3, 10).double()}, "scale must be float64, got float32"),
    ],
    "pack": [
        ({"codes": torch.zeros(3, 10)}, "codes must be uint8, got float32"),
        ({"codes": torch.tensor(1, dtype=torch.uint8)}, "codes must have at least 1 dimension, got 0"),
        ({"codes": torch.zeros(3, 10, dtype=torch.uint8)[:, ::2]},
         "codes must be contiguous, got strides [10, 2]"),
        ({"bits": 0}, "bits must be 1, 2, 3 or 4, got 0"),
        ({"bits": 5}, "bits must be 1, 2, 3 or 4, got 5"),
    ],
    "unpack": [
        *QWEIGHT,
        ({"in_features": -1}, "in_features must be at least 0, got -1"),
        ({"in_features": 25}, "qweight must have 4 bytes a row for K = 25, got 3"),
        ({"dtype": torch.int8}, "dtype must be float32 or bfloat16 or float16 or float64, got int8"),
    ],
    "packed_linear": [
        *QWEIGHT,
        ({"input": torch.tensor(1.0)}, "input must have at least 1 dimension, got 0"),
        ({"input": torch.ones(2, 24, dtype=torch.int32)}, "input must be float32 or bfloat16 or "
         "float16 or float64, got int32"),
        ({"input": torch.rand(2, 25)}, "qweight must have 4 bytes a row for K = 25, got 3"),
        ({"input": torch.rand(2, 24).double()}, "scale must be float64, got float32"),
        ({"bias": torch.rand(5)}, "bias must have shape [4], got [5]"),
        ({"bias": torch.rand(4).half()}, "bias must be float32, got float16"),
        ({"bias": torch.rand(8)[::2]}, "bias must be contiguous, got strides [2]"),
        ({"qweight": torch.zeros(2, 4, 0, dtype=torch.uint8)},
         "qweight must have 3 bytes a row for K = 24, got 0"),
    ],
    "packed_conv2d": [
        *QWEIGHT,
        *GEOMETRY,
        ({"bias": torch.rand(5)}, "bias must have shape [4], got [5]"),
        ({"repacked": torch.zeros(256, dtype=torch.uint8)},
         "repacked must have shape [1, 1, 4, 2, 64], got [256]"),
        ({"repacked": torch.zeros(1, 1, 4, 2, 64)}, "repacked must be uint8, got float32"),
        ({"accuracy": "best"}, "accuracy must be 'exact', 'high' or 'fast', got 'best'"),
    ],
    "conv_repack": [
        ({"qweight": torch.zeros(1, 4, 3)}, "qweight must be uint8, got float32"),
        ({"qweight": torch.zeros(5, 4, 3, dtype=torch.uint8)},
         "qweight must have shape [bits, N, 3], got [5, 4, 3]"),
        ({"qweight": torch.zeros(4, 3, dtype=torch.uint8)},
         "qweight must have shape [bits, N, 3], got [4, 3]"),
        ({"in_features": 28}, "qweight must have shape [bits, N, 4], got [2, 4, 3]"),
        ({"in_features": -1}, "in_features must be at least 0, got -1"),
        ({"taps": 5}, "taps must divide in_features = 24, got 5"),
        ({"groups": 3}, "groups must divide the rows of qweight = 4, got 3"),
    ],
    "unrepack": [
        ({"repacked": torch.zeros(128)}, "repacked must be uint8, got float32"),
        ({"repacked": torch.zeros(256, dtype=torch.uint8)[::2]},
         "repacked must be contiguous, got strides [2]"),
        ({"repacked": torch.zeros(2, 64, dtype=torch.uint8)},
         "repacked must have 1 dimension or 5, got [2, 64]"),
        ({"repacked": torch.zeros(64, dtype=torch.uint8)}, "repacked must have shape [128], got [64]"),
        ({"repacked": torch.zeros(3, 1, 4, 2, 64, dtype=torch.uint8)},
         "repacked must have groups that divide n and taps that divide in_features, got [3, 1, 4, 2, 64]"),
        ({"repacked": torch.zeros(2, 1, 4, 1, 64, dtype=torch.uint8)},
         "repacked must have shape [2, 1, 4, 2, 64], got [2, 1, 4, 1, 64]"),
        ({"bits": 5}, "bits must be 1, 2, 3 or 4, got 5"),
        ({"n": -1}, "n must be at least 0, got -1"),
        ({"in_features": -1}, "in_features must be at least 0, got -1"),
    ],
    "binary_repack": [
        ({"qweight": torch.zeros(1, 4, 3)}, "qweight must be uint8, got float32"),
        ({"qweight": torch.zeros(2, 4, 3, dtype=torch.uint8)},
         "qweight must have shape [1, N, 3], got [2, 4, 3]"),
        ({"in_features": 28}, "qweight must have shape [1, N, 4], got [1, 4, 3]"),
        ({"in_features": -1}, "in_features must be at least 0, got -1"),
        ({"taps": 5}, "taps must divide in_features = 24, got 5"),
        ({"taps": 0}, "taps must divide in_features = 24, got 0"),
        ({"groups": 3}, "groups must divide the rows of qweight = 4, got 3"),
    ],
    "binary_linear": [
        *BINARY,
        ({"group_size": -2}, "group_size must be 0, -1 or a multiple of 64, got -2"),
        ({"group_size": 32}, "group_size must be 0, -1 or a multiple of 64, got 32"),
        ({"input": torch.tensor(1.0)}, "input must have at least 1 dimension, got 0"),
        ({"input": torch.ones(2, 24, dtype=torch.int32)}, "input must be float32 or bfloat16 or "
         "float16 or float64, got int32"),
        ({"input": torch.rand(2, 25)}, "qweight must have 4 bytes a row for K = 25, got 3"),
        ({"repacked": torch.zeros(1, 2, 1, 1, 8, dtype=torch.int64)},
         "repacked must have shape [1, 1, 1, 1, 8], got [1, 2, 1, 1, 8]"),
    ],
    "binary_conv2d": [
        *BINARY,
        *GEOMETRY,
        ({"group_size": -2}, "group_size must be 0 or -1, got -2"),
        ({"group_size": 64}, "group_size must be 0 or -1, got 64"),
        ({"repacked": torch.zeros(1, 1, 1, 1, 8, dtype=torch.int64)},
         "repacked must have shape [1, 1, 4, 1, 8], got [1, 1, 1, 1, 8]"),
    ],
}
CASES = [pytest.param(op, change, message, id=f"{op}-{'-'.join(change)}-{i}")
         for op, rows in BAD.items() for i, (change, message) in enumerate(rows)]
# What only memory can show: kernels see it, fakes cannot.
REAL_ONLY = [
    ("pack", {"codes": torch.full((3, 10), 4, dtype=torch.uint8)}, "codes must be below 2^bits = 4, got 4"),
    ("solve", {"latent": torch.full((3, 10), NAN)}, "latent must be finite, got"),
    ("solve", {"curvature": torch.full((3, 10), INF)}, "curvature must be finite, got"),
    ("solve", {"curvature": torch.full((3, 10), 2.0**121)},
     "curvature must stay below 2^120 / max(1, |latent|), got 2.6584"),
    ("fused_step", {"backtrack": torch.tensor(0.0)}, "backtrack must be in (0, 1], got 0"),
    ("fused_step", {"trial_grads": []}, "trial_grads must be given where backtrack < 1, got none"),
]


def changed(op, change):
    arguments = VALID[op]()
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return arguments


def tensors_of(arguments):
    for name, value in arguments.items():
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, torch.Tensor):
                yield name, x


def raises_and_keeps(op, arguments, message):
    before = [(name, x, x.clone()) for name, x in tensors_of(arguments)]
    with pytest.raises(ValueError, match=re.escape(f"blaq.{op}: {message}")):
        getattr(torch.ops.blaq, op).default(**arguments)
    for name, x, old in before:
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("op", VALID)
def test_the_cases_start_from_a_valid_call(op):
    getattr(torch.ops.blaq, op).default(**VALID[op]())


@pytest.mark.parametrize("op,change,message", CASES)
def test_bad_argument(op, change, message):
    raises_and_keeps(op, changed(op, change), message)


@pytest.mark.parametrize("op,change,message", CASES)
def test_fakes_say_the_same(op, change, message):
    mode = FakeTensorMode()
    arguments = {}
    for name, value in changed(op, change).items():
        if isinstance(value, list):
            value = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in value]
        arguments[name] = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
    with mode, pytest.raises(ValueError, match=re.escape(f"blaq.{op}: {message}")):
        getattr(torch.ops.blaq, op).default(**arguments)


@pytest.mark.parametrize("op,change,message", REAL_ONLY)
def test_bad_value(op, change, message):
    raises_and_keeps(op, changed(op, change), message)


@pytest.mark.parametrize("op", ["fused_trial", "fused_step"])
@pytest.mark.parametrize("first,second", [("params", "grads"), ("params", "latents"),
                                          ("params", "params"), ("params", "scales")])
def test_written_tensors_may_not_overlap(op, first, second):
    arguments = VALID[op]()
    if second == "scales":
        arguments["scales"][0] = arguments["params"][0].view(-1)[:3].view(3, 1)
    elif second == first:
        storage = torch.rand(32)
        arguments["params"] = [storage[:30].view(3, 10), storage[28:32]]
    else:
        arguments[second][0] = arguments[first][0]
    with pytest.raises(ValueError, match="must not overlap another tensor of the call"):
        getattr(torch.ops.blaq, op).default(**arguments)


@pytest.mark.parametrize("op", ["fused_step"])
def test_read_only_tensors_may_be_the_same(op):
    arguments = VALID[op]()
    arguments["trial_grads"] = arguments["grads"]
    getattr(torch.ops.blaq, op).default(**arguments)


def test_other_devices_are_named():
    meta = torch.rand(3, 4, device="meta")
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        torch.ops.blaq.scaled_update(torch.rand(3, 4), meta, torch.rand(3, 4))
    mode = FakeTensorMode()
    with mode, pytest.raises(ValueError, match="trial must be on current's device cpu, got meta"):
        torch.ops.blaq.blend(torch.rand(3), torch.rand(3, device="meta"), 0.5)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("group_size", [0, -1, 4])
@pytest.mark.parametrize("method", ["alternating", "exact"])
def test_empty_weights_have_a_defined_result(shape, group_size, method):
    w = torch.empty(shape)
    codes, scale = torch.ops.blaq.solve(w, w, None, [0.5, 1.0], group_size, 5, method)
    assert codes.shape == shape and scale.shape == ref.scale_shape(shape, group_size)
    assert (scale == ref.SCALE_TINY).all()
