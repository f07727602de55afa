"""Tasks as small ONNX models, lowered as exporters lower them, and run by ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from compiler.errors import PassError
from compiler.ir.ops.attention import attention_mask
from compiler.latency.onnx_tokens import TOKENS
from compiler.latency.task import Task

OPSET = 23
IR_VERSION = 11
WANTED = ("onnx", "onnxruntime")
DIRECT = {
    "matmul": "MatMul", "embedding": "Gather", "softmax": "Softmax", "neg": "Neg", "abs": "Abs", "exp": "Exp",
    "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu",
    "gelu": "Gelu", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "minimum": "Min",
    "maximum": "Max", "where": "Where",
}  # fmt: skip
"""Operations that ONNX has under another name, with operands in the same order."""


def needs_onnx() -> None:
    """Raises PassError when ONNX Runtime is not installed."""
    for name in WANTED:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise PassError(
            f"`runtime: onnxruntime` needs the package {name}, which is not installed",
            option="runtime",
            remedy="pip install 'compress-model[onnx]', or bring a table with `latency: table.json`",
        ) from reason


class Builder:
    """A model in the making: ``op`` appends a node and returns the name of its result."""

    def __init__(self) -> None:
        self._onnx = _module("onnx")
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._constants: list[Any] = []
        self.feeds: dict[str, Any] = {}

    def op(self, name: str, *inputs: str, **attrs: Any) -> str:
        """The first result of ``name`` of ONNX; an absent operand is ''."""
        result = f"v{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(name, list(inputs), [result], **attrs))
        return result

    def topk(self, x: str, count: int, **attrs: Any) -> tuple[str, str]:
        """The ``count`` largest of x along its last axis, and their places."""
        found = self.op("TopK", x, self.constant(torch.tensor([count])), **attrs)
        self._nodes[-1].output.append(f"{found}places")
        return found, f"{found}places"

    def constant(self, tensor: torch.Tensor) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(tensor.numpy(), name))
        return name

    def feed(self, tensor: torch.Tensor) -> str:
        """An input, which is given ``tensor``."""
        name, helper = f"x{len(self._inputs)}", self._onnx.helper
        array = tensor.numpy()
        self._inputs.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
        self.feeds[name] = array
        return name

    def model(self, result: str) -> bytes:
        helper = self._onnx.helper
        output = helper.make_tensor_value_info(result, self._onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "task", self._inputs, [output], self._constants)
        versions = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=versions, ir_version=IR_VERSION).SerializeToString()


def idle(threads: int) -> Callable[[], object]:
    """Runs a model that does nothing: what calling the runtime takes."""
    build = Builder()
    return _session(build, build.op("Identity", build.feed(torch.zeros(1))), threads)


def runner(task: Task, threads: int) -> Callable[[], object]:
    """Runs ``task``. Raises PassError when there is no ONNX form of it here."""
    from compiler.latency.measure import sample

    build = Builder()
    names = [
        "" if type is None else (build.constant if constant else build.feed)(sample(type))
        for type, constant in zip(task.operands, task.constant, strict=True)
    ]
    return _session(build, lowered(build, task, names), threads)


def _session(build: Builder, result: str, threads: int) -> Callable[[], object]:
    runtime = _module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(build.model(result), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in build.feeds.items():
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output(result)
    return lambda: session.run_with_iobinding(binding)


def lowered(build: Builder, task: Task, names: list[str]) -> str:
    """The result of ``task`` on operands called ``names``. Raises PassError when there is no ONNX form of it here."""
    if task.op.name in LOWERED:
        return LOWERED[task.op.name](build, task, names)
    if task.op.name not in DIRECT:
        raise PassError(
            f"`{task.op.name}` has no ONNX form to be measured in",
            option="runtime",
            remedy="write `runtime: torch`, or bring a table with `latency: table.json`",
        )
    if task.attrs.get("scalar") is not None:
        names = [*names, build.constant(torch.tensor(task.attrs["scalar"], dtype=torch.float32))]
    return build.op(DIRECT[task.op.name], *names, **_attrs(task))


def _attrs(task: Task) -> dict[str, Any]:
    attrs = task.op.all_attrs(task.attrs)
    match task.op.name:
        case "gelu":
            return {"approximate": "tanh" if attrs["approximate"] == "tanh" else "none"}
        case "softmax":
            return {"axis": attrs["axis"]}
        case _:
            return {}


def _linear(build: Builder, task: Task, names: list[str]) -> str:
    product = build.op("MatMul", names[0], build.op("Transpose", names[1], perm=[1, 0]))
    return build.op("Add", product, names[2]) if len(names) > 2 and names[2] else product


def _conv(build: Builder, task: Task, names: list[str]) -> str:
    attrs = task.op.all_attrs(task.attrs)
    pads = [*attrs["padding"], *attrs["padding"]]
    return build.op(
        "Conv", *names, strides=attrs["stride"], dilations=attrs["dilation"], pads=pads, group=attrs["groups"]
    )


def _norm(build: Builder, task: Task, names: list[str]) -> str:
    attrs = task.op.all_attrs(task.attrs)
    scale = names[1] if len(names) > 1 else ""
    if not scale:
        assert task.operands[0] is not None  # it is not optional
        scale = build.constant(torch.ones(task.operands[0].static_shape[-1]))
    if attrs.get("offset"):
        scale = build.op("Add", scale, build.constant(torch.tensor(attrs["offset"])))
    name = "RMSNormalization" if task.op.name == "rms_norm" else "LayerNormalization"
    return build.op(name, names[0], scale, *names[2:], epsilon=attrs["eps"])


def _reduced(build: Builder, task: Task, names: list[str]) -> str:
    attrs = task.op.all_attrs(task.attrs)
    axes = build.constant(torch.tensor(attrs["axes"]))
    name = {"sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax"}[task.op.name]
    return build.op(name, names[0], axes, keepdims=int(attrs["keep"]))


def _cumsum(build: Builder, task: Task, names: list[str]) -> str:
    return build.op("CumSum", names[0], build.constant(torch.tensor(task.op.all_attrs(task.attrs)["axis"])))


def _rsqrt(build: Builder, task: Task, names: list[str]) -> str:
    return build.op("Reciprocal", build.op("Sqrt", names[0]))


def _silu(build: Builder, task: Task, names: list[str]) -> str:
    return build.op("Mul", names[0], build.op("Sigmoid", names[0]))


def _transpose(build: Builder, task: Task, names: list[str]) -> str:
    return build.op("Transpose", names[0], perm=task.attrs["perm"])


def _split_heads(build: Builder, task: Task, names: list[str]) -> str:
    shape = build.constant(torch.tensor([0, 0, task.attrs["heads"], -1]))
    return build.op("Transpose", build.op("Reshape", names[0], shape), perm=[0, 2, 1, 3])


def _rope(build: Builder, task: Task, names: list[str]) -> str:
    """As exported: x cos + turned(x) sin, the halves of x swapped and one of them negated."""
    x, cos, sin = names
    table, whole = task.operands[1], task.operands[0]
    assert table is not None and whole is not None  # neither is optional
    pairs = table.static_shape[-1]
    ends = [build.constant(torch.tensor([at])) for at in (0, pairs, 2 * pairs, whole.static_shape[-1])]
    first, second = (build.op("Slice", x, ends[i], ends[i + 1], build.constant(torch.tensor([3]))) for i in (0, 1))
    ahead = build.constant(torch.tensor([1]))
    wide = [build.op("Unsqueeze", build.op("Concat", part, part, axis=2), ahead) for part in (cos, sin)]
    turned = build.op("Concat", build.op("Neg", second), first, axis=3)
    if 2 * pairs < whole.static_shape[-1]:
        rest = build.op("Slice", x, ends[2], ends[3], build.constant(torch.tensor([3])))
        x = build.op("Concat", first, second, axis=3)
        return build.op("Concat", build.op("Add", build.op("Mul", x, wide[0]), build.op("Mul", turned, wide[1])), rest,
                        axis=3)  # fmt: skip
    return build.op("Add", build.op("Mul", x, wide[0]), build.op("Mul", turned, wide[1]))


def _attention(build: Builder, task: Task, names: list[str]) -> str:
    """As exported: keys and values repeated for their queries, two products and a softmax between them."""
    attrs = task.op.all_attrs(task.attrs)
    queries, keys = task.operands[0], task.operands[1]
    assert queries is not None and keys is not None  # neither is optional
    (heads, length), (groups, depth) = queries.static_shape[1:3], keys.static_shape[1:3]
    key, value = (_repeated(build, name, heads // groups) for name in names[1:3])
    scores = build.op("MatMul", names[0], build.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = build.op("Mul", scores, build.constant(torch.tensor(attrs["scale"])))
    if attrs["softcap"]:
        cap = build.constant(torch.tensor(attrs["softcap"]))
        scores = build.op("Mul", build.op("Tanh", build.op("Div", scores, cap)), cap)
    bias = names[4] if len(names) > 4 else ""
    looked = attention_mask(length, depth, attrs["causal"], attrs["window"], torch.device("cpu"))
    if looked is not None or (len(names) > 3 and names[3]):
        allowed = torch.ones(length, depth, dtype=torch.bool) if looked is None else looked
        mask = build.constant(torch.zeros(length, depth).masked_fill(~allowed, float("-inf")))
        scores = build.op("Add", scores, mask)
    scores = build.op("Add", scores, bias) if bias else scores
    weighted = build.op("MatMul", build.op("Softmax", scores, axis=3), value)
    return build.op("Transpose", weighted, perm=[0, 2, 1, 3])


def _repeated(build: Builder, name: str, times: int) -> str:
    if times == 1:
        return name
    spread = build.op("Unsqueeze", name, build.constant(torch.tensor([2])))
    spread = build.op("Expand", spread, build.constant(torch.tensor([1, 1, times, 1, 1])))
    flat = build.op("Shape", name)
    shape = build.op("Mul", flat, build.constant(torch.tensor([1, times, 1, 1])))
    return build.op("Reshape", spread, shape)


Lower = Callable[[Builder, Task, list[str]], str]
LOWERED: Mapping[str, Lower] = {
    "linear": _linear,
    "conv": _conv,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "sum": _reduced,
    "mean": _reduced,
    "max": _reduced,
    "cumsum": _cumsum,
    "rsqrt": _rsqrt,
    "silu": _silu,
    "transpose": _transpose,
    "split_heads": _split_heads,
    "rope": _rope,
    "attention": _attention,
    **TOKENS,
}
