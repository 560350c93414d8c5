"""onnxruntime's MatMulNBits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from peers.matmul import Kernel, MatmulWorker, copies_beyond, load_weight

# Its name for how it multiplies: 4 rounds the activations to int8, 1 keeps them in fp32.
_ACCURACY = {"onnxruntime int8": 4, "onnxruntime fp32": 1}


class _OnnxKernel(Kernel):
    """A graph with a node for every copy of the weight, and one with a single node."""

    def __init__(self, weight: tuple[np.ndarray, np.ndarray, np.ndarray], accuracy: int, cache_bytes: int) -> None:
        codes, scales, zeros = weight
        self._out, self._group = len(codes), codes.shape[1] // scales.shape[1]
        self._initializers = {
            "codes": _nibbles(codes).reshape(*scales.shape, -1),
            "scales": scales.astype(np.float32),
            "zeros": _nibbles(zeros),
        }
        self.bytes = sum(part.nbytes for part in self._initializers.values())
        self.copies = copies_beyond(cache_bytes, self.bytes)
        self._models = {count: self._model(codes.shape[1], accuracy, count) for count in {1, self.copies}}
        self._threads = 0

    def _model(self, in_features: int, accuracy: int, copies: int) -> bytes:
        attributes = {"K": in_features, "N": self._out, "bits": 4, "block_size": self._group}
        initializers, nodes, outputs = [], [], []
        for i in range(copies):
            inputs = [f"{name}{i}" for name in self._initializers]
            for name, part in zip(inputs, self._initializers.values(), strict=True):
                # Of equal weights onnxruntime would keep one, so each copy has its rows in another order.
                initializers.append(numpy_helper.from_array(np.roll(part, i, axis=0), name))
            nodes.append(
                helper.make_node(
                    "MatMulNBits", ["x", *inputs], [f"y{i}"], domain="com.microsoft", accuracy_level=accuracy,
                    **attributes,
                )
            )  # fmt: skip
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", self._out]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", in_features])
        graph = helper.make_graph(nodes, "matmul", [x], outputs, initializers)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()

    def prepare(self, x: np.ndarray, threads: int) -> None:
        self._x = x
        if threads != self._threads:
            self._sessions = {count: _session(model, threads) for count, model in self._models.items()}
            self._threads = threads

    def run(self, copies: int) -> np.ndarray:
        return self._sessions[copies].run(None, {"x": self._x})[-1]

    def output(self, copies: int) -> np.ndarray:
        return self.run(copies)


class OnnxMatmul(MatmulWorker):
    """Takes fp32 activations only."""

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def _kernels(self, folder: Path, cache_bytes: int) -> dict[str, Kernel]:
        weight = load_weight(folder, "asymmetric")
        return {name: _OnnxKernel(weight, accuracy, cache_bytes) for name, accuracy in _ACCURACY.items()}


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Two values to a byte, the first in its low half; a row of odd length is padded."""
    padded = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return padded[:, ::2] | padded[:, 1::2] << 4


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
