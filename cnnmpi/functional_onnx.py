"""The operations of ``cnnmpi.functional`` that a forward pass needs, written down as nodes of an ONNX graph.

A ``Graph`` stands in the place of the module F that layers compute with. Its operations take and return ``Value``s,
which hold no numbers: a model that is called with one, in evaluation, leaves its whole forward pass in the graph, be it
a chain of layers or a wiring of its own. The only room that imports onnx.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnnmpi.common.arguments import check_split, joined_shape
from cnnmpi.common.arrays import Array
from cnnmpi.sizes import Size, conv_size, conv_transpose_size, pair, pool_size, upsampling

OPSET = 17  # old enough for runtimes of 2022; what came later (Gelu, GroupNormalization) is put together of what it has
IR_VERSION = 8  # of the file, which goes with that


class Value:
    """An array that a graph will compute: its name there, and its shape for one image."""

    __array_ufunc__ = None  # NumPy's arrays leave arithmetic with it to the methods below

    def __init__(self, graph: "Graph", name: str, shape: tuple[int, ...]) -> None:
        self.graph, self.name, self.shape = graph, name, shape
        self.ndim, self.dtype = len(shape), np.dtype(np.float32)

    def __add__(self, other: Any) -> "Value":
        return self.graph.arithmetic("Add", self, other)

    def __sub__(self, other: Any) -> "Value":
        return self.graph.arithmetic("Sub", self, other)

    def __mul__(self, other: Any) -> "Value":
        return self.graph.arithmetic("Mul", self, other)

    def __truediv__(self, other: Any) -> "Value":
        return self.graph.arithmetic("Div", self, other)

    def __rsub__(self, other: Any) -> "Value":
        return self.graph.arithmetic("Sub", other, self)

    def __rtruediv__(self, other: Any) -> "Value":
        return self.graph.arithmetic("Div", other, self)

    def __neg__(self) -> "Value":
        return self.graph.arithmetic("Sub", np.float32(0), self)

    __radd__, __rmul__ = __add__, __mul__

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"its forward uses .{name} of an array, which ONNX is not told of: use cnnmpi's layers for it")

    def __getitem__(self, key: Any) -> Any:
        raise ValueError("its forward indexes an array, which ONNX is not told of: use cnnmpi's layers for it")


class Graph:
    """An ONNX graph in the making, and the operations that add to it.

    ``names`` are those of the arrays that a model holds: {id(array): dotted name}. All names that are made here begin
    with a slash, as no array's name in a checkpoint does.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        self.names = dict(names or {})
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self._kept: list[Any] = []  # arrays whose id is a name here

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"its forward calls {name}, which ONNX is not told of")

    # -- what goes in and comes out ----------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int], kind: str) -> Value:
        """Return the input ``name`` (N, *shape), of any N: of the ``kind`` "uint8", which becomes float32, or that."""
        element = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}[kind]
        self.inputs.append(helper.make_tensor_value_info(name, element, ["N", *shape]))
        value = Value(self, name, (1, *shape))
        return value if kind == "float32" else self.node("Cast", [value], value.shape, to=TensorProto.FLOAT)

    def model(self, output: Value, name: str, properties: Mapping[str, Any]) -> bytes:
        """Return the bytes of the model file whose output ``name`` is this value; ``properties`` go along as JSON."""
        self.nodes.append(helper.make_node("Identity", [output.name], [name], name=name))
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *output.shape[1:]])
        graph = helper.make_graph(self.nodes, "cnnmpi", self.inputs, [result], list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="cnnmpi", ir_version=IR_VERSION)
        helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
        onnx.checker.check_model(model, full_check=True)
        blob: bytes = model.SerializeToString()
        return blob

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: Sequence[Any], shape: tuple[int, ...], **attributes: Any) -> Value:
        """Add a node; return its output, of this shape for one image. Inputs that are no values become constants."""
        name = f"/{op.lower()}_{len(self.nodes)}"
        taken = [each.name if isinstance(each, Value) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(op, taken, [name], name=name, **attributes))
        return Value(self, name, shape)

    def constant(self, array: Any) -> str:
        """Return the name of an initializer with the numbers of ``array``: of the model's own arrays, their name."""
        name = self.names.get(id(array), f"/constant_{len(self.initializers)}")
        if name not in self.initializers:
            numbers = np.ascontiguousarray(array)
            if numbers.dtype == np.float64 or id(array) in self.names:  # others are float32, or sizes
                numbers = numbers.astype(np.float32)
            self._kept.append(array)
            self.names[id(array)] = name
            self.initializers[name] = numpy_helper.from_array(numbers.reshape(np.shape(array)), name)
        return name

    def arithmetic(self, op: str, x: Any, y: Any) -> Value:
        """Add x op y; one of them may be an array or a number, which is then float32."""
        x, y = (each if isinstance(each, Value) or id(each) in self.names else np.float32(each) for each in (x, y))
        return self.node(op, [x, y], tuple(np.broadcast_shapes(np.shape(x), np.shape(y))))

    # -- what layers ask of arrays -------------------------------------------------------------------------------------

    def fits(self, x: Any, array: Any) -> bool:
        """Return True: types are the graph's."""
        return True

    def seal(self, y: Any, cache: Any) -> None:
        """Seal nothing."""

    def as_array(self, a: Array, like: Any = None) -> Array:
        """Return ``a``, which becomes a constant where it is used."""
        return a

    def for_loss(self, logits: Value) -> Value:
        """Return ``logits``."""
        return logits

    # -- operations, as those of cnnmpi.functional ---------------------------------------------------------------------

    def conv2d(
        self,
        x: Value,
        W: Array,
        b: Array | None = None,
        *,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        filters: Any = None,
    ) -> tuple[Value, Any]:
        """Cross-correlate ``x`` with ``W`` (O, C / groups, kH, kW), add ``b`` (O,)."""
        size = conv_size(x.shape, W.shape, stride, padding, dilation, groups)
        windows = _windows(W.shape[2:], stride, padding) | {"dilations": pair(dilation), "group": groups}
        return self.node("Conv", _given(x, W, b), (x.shape[0], W.shape[0], *size), **windows), ()

    def conv_transpose2d(
        self,
        x: Value,
        W: Array,
        b: Array | None = None,
        *,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
    ) -> tuple[Value, Any]:
        """Spread ``x`` by ``W`` (C, O / groups, kH, kW), add ``b`` (O,)."""
        size = conv_transpose_size(x.shape, W.shape, stride, padding, output_padding, dilation, groups)
        windows = _windows(W.shape[2:], stride, padding) | {"dilations": pair(dilation), "group": groups}
        shape = (x.shape[0], W.shape[1] * groups, *size)
        return self.node("ConvTranspose", _given(x, W, b), shape, output_padding=pair(output_padding), **windows), ()

    def linear(self, x: Value, W: Array, b: Array | None = None) -> tuple[Value, Any]:
        """Return x W' + b."""
        return self.node("Gemm", _given(x, W, b), (x.shape[0], W.shape[0]), transB=1), ()

    def batch_norm(
        self,
        x: Value,
        gamma: Array,
        beta: Array,
        *,
        running_mean: Array,
        running_var: Array,
        training: bool,
        momentum: float = 0.1,
        eps: float = 1e-5,
        relu: bool = False,
    ) -> tuple[Value, Any]:
        """Normalise by the running statistics. Raises ValueError in training."""
        if training:
            raise ValueError("a graph is of a model in evaluation: call eval() first")
        y = self.node("BatchNormalization", [x, gamma, beta, running_mean, running_var], x.shape, epsilon=eps)
        return self.relu(y) if relu else (y, ())

    def group_norm(
        self, x: Value, gamma: Array, beta: Array, *, num_groups: int, eps: float = 1e-5
    ) -> tuple[Value, Any]:
        """Normalise each image's groups of channels: as instances of one channel each."""
        size = math.prod(x.shape[1:]) // num_groups
        parts = self.node("Reshape", [x, np.array([0, num_groups, size])], (x.shape[0], num_groups, size))
        one, zero = np.ones(num_groups, np.float32), np.zeros(num_groups, np.float32)
        parts = self.node("InstanceNormalization", [parts, one, zero], parts.shape, epsilon=eps)
        y = self.node("Reshape", [parts, np.array([0, *x.shape[1:]])], x.shape)
        over = (x.shape[1], *(1 for _ in x.shape[2:]))
        wide = [self.node("Reshape", [array, np.array(over)], over) for array in (gamma, beta)]
        return y * wide[0] + wide[1], ()

    def relu(self, x: Value) -> tuple[Value, Any]:
        """Return max(x, 0)."""
        return self.node("Relu", [x], x.shape), ()

    def leaky_relu(self, x: Value, *, negative_slope: float = 0.01) -> tuple[Value, Any]:
        """Return x where it is positive, else ``negative_slope`` x."""
        return self.node("LeakyRelu", [x], x.shape, alpha=negative_slope), ()

    def sigmoid(self, x: Value) -> tuple[Value, Any]:
        """Return 1 / (1 + exp(-x))."""
        return self.node("Sigmoid", [x], x.shape), ()

    def tanh(self, x: Value) -> tuple[Value, Any]:
        """Return the hyperbolic tangent."""
        return self.node("Tanh", [x], x.shape), ()

    def silu(self, x: Value) -> tuple[Value, Any]:
        """Return x sigmoid(x)."""
        return x * self.sigmoid(x)[0], ()

    def gelu(self, x: Value, *, approximate: str = "none") -> tuple[Value, Any]:
        """Return x Phi(x), or its approximation by tanh."""
        if approximate == "none":
            inner = self.node("Erf", [x * (1 / math.sqrt(2))], x.shape)
        else:
            inner = self.tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi))[0]
        return x * 0.5 * (inner + 1), ()

    def softmax(self, x: Value) -> Value:
        """Return exp(x) / sum exp(x) along the last axis."""
        return self.node("Softmax", [x], x.shape, axis=-1)

    def flatten(self, x: Value) -> tuple[Value, Any]:
        """Return (N, ...) as (N, features)."""
        return self.node("Flatten", [x], (x.shape[0], math.prod(x.shape[1:])), axis=1), ()

    def max_pool2d(self, x: Value, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Value, Any]:
        """Return the maximum of each window."""
        return self._pool("MaxPool", x, k, stride, padding)

    def avg_pool2d(self, x: Value, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Value, Any]:
        """Return the mean of each window, padding counted as zeros."""
        return self._pool("AveragePool", x, k, stride, padding, count_include_pad=1)

    def _pool(self, op: str, x: Value, k: Size, stride: Size | None, padding: Size, **more: int) -> tuple[Value, Any]:
        stride = k if stride is None else stride
        shape = (*x.shape[:2], *pool_size(x.shape[2:], k, stride, padding))
        return self.node(op, [x], shape, **_windows(pair(k), stride, padding), **more), ()

    def global_avg_pool2d(self, x: Value) -> tuple[Value, Any]:
        """Return the mean over all positions: (N, C, H, W) -> (N, C)."""
        return self.flatten(self.node("GlobalAveragePool", [x], (*x.shape[:2], 1, 1)))

    def upsample_nearest2d(self, x: Value, scale: Size) -> tuple[Value, Any]:
        """Return ``x`` with each pixel repeated."""
        sH, sW = upsampling(scale)
        sizes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        shape = (*x.shape[:2], x.shape[2] * sH, x.shape[3] * sW)
        scales = np.array([1, 1, sH, sW], np.float32)
        name = f"/resize_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Resize", [x.name, "", self.constant(scales)], [name], name=name, **sizes))
        return Value(self, name, shape), ()

    def add(self, x: Value, y: Value) -> Value:
        """Return x + y. Raises ValueError unless the shapes are equal."""
        if x.shape != y.shape:
            raise ValueError(f"add: expected two arrays of one shape, got {x.shape} and {y.shape}")
        return self.node("Add", [x, y], x.shape)

    def concat(self, arrays: Sequence[Value]) -> Value:
        """Return arrays side by side along the channels."""
        return self.node("Concat", arrays, joined_shape("concat", [a.shape for a in arrays]), axis=1)

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Cut ``x`` along the channels."""
        check_split("split", x.shape[1], sizes)
        names = [f"/split_{len(self.nodes)}_{index}" for index in range(len(sizes))]
        inputs = [x.name, self.constant(np.array(sizes, np.int64))]
        self.nodes.append(helper.make_node("Split", inputs, names, name=names[0], axis=1))
        return [Value(self, name, (x.shape[0], size, *x.shape[2:])) for name, size in zip(names, sizes, strict=True)]


def _given(*inputs: Any) -> list[Any]:
    return [each for each in inputs if each is not None]


def _windows(k: Sequence[int], stride: Size, padding: Size) -> dict[str, Any]:
    top, left = pair(padding)
    return {"kernel_shape": list(k), "strides": pair(stride), "pads": [top, left, top, left]}
