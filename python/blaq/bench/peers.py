"""Other libraries' products with low-bit weights, where they are installed: onnxruntime, OpenVINO.

    pip install onnxruntime onnx openvino

Each has its own codes (4 bits in blocks of 128 inputs, uniform), so its error is that of multiplying
by its own weight: it says how exactly it computes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PEERS", "Peer"]

BLOCK = 128
Peer = tuple[Callable[[], Tensor], Tensor]
"""A product, and the weight ``[N, K]`` that it multiplies by."""


def _nibbles(n: int, k: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Random 4-bit codes ``[n, k]`` around 8, a scale for each block, and their weight."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8).numpy()
    scale = (torch.rand(n, k // BLOCK) + 0.5).half().float().numpy() / 8
    weight = (codes.astype(np.float32) - 8) * np.repeat(scale, BLOCK, axis=1)
    return codes, scale, torch.from_numpy(weight)


def onnxruntime_4bit(x: Tensor, bias: Tensor) -> Peer:
    """``MatMulNBits``, accuracy level 4: inputs in 8 bits."""
    import onnx
    import onnxruntime

    (m, k), n = x.shape, len(bias)
    codes, scale, weight = _nibbles(n, k)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(n, k // BLOCK, BLOCK // 2)
    make, floats = onnx.helper, onnx.TensorProto.FLOAT
    node = make.make_node("MatMulNBits", ["x", "codes", "scale", "", "", "bias"], ["y"],
                          domain="com.microsoft", K=k, N=n, bits=4, block_size=BLOCK,
                          accuracy_level=4)
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in (
        ("codes", packed), ("scale", scale.reshape(-1)), ("bias", bias.numpy()))]
    graph = make.make_graph([node], "linear", [make.make_tensor_value_info("x", floats, [m, k])],
                            [make.make_tensor_value_info("y", floats, [m, n])], constants)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 21),
                                                  make.make_opsetid("com.microsoft", 1)],
                            ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # when a run is over
    session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0]), weight


def openvino_4bit(x: Tensor, bias: Tensor) -> Peer:
    """u4 weights, inputs quantized in groups of 128 on the way."""
    import openvino
    from openvino import opset13 as op

    (m, k), n = x.shape, len(bias)
    codes, scale, weight = _nibbles(n, k)
    blocks = [n, k // BLOCK, BLOCK]
    tensor = openvino.Tensor(codes[:, ::2] | codes[:, 1::2] << 4, blocks, openvino.Type.u4)
    middle = op.convert(op.constant(np.full((n, k // BLOCK, 1), 8, np.uint8)), "f16")
    shifted = op.subtract(op.convert(op.constant(tensor), "f16"), middle)
    scaled = op.multiply(shifted, op.constant(scale[..., None].astype(np.float16)))
    wide = op.convert(op.reshape(scaled, [n, k], False), "f32")
    parameter = op.parameter([m, k], np.float32)
    product = op.add(op.matmul(parameter, wide, False, True), op.constant(bias.numpy()[None]))
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(),
                              "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
                              "DYNAMIC_QUANTIZATION_GROUP_SIZE": BLOCK}
    model = openvino.Model([product], [parameter])
    request = openvino.compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call, weight


_MODULES = {"onnxruntime MatMulNBits, 4 bits": (("onnx", "onnxruntime"), onnxruntime_4bit),
            "OpenVINO, 4 bits": (("openvino",), openvino_4bit)}

PEERS: dict[str, Callable[[Tensor, Tensor], Peer]] = {
    name: build for name, (modules, build) in _MODULES.items()
    if all(importlib.util.find_spec(module) for module in modules)}
"""Those that are installed; each is for float32 inputs and K a multiple of 128."""
