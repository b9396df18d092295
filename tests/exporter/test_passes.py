"""From the template to the graph of one ratio: what holds before and after each pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx.checker
import pytest
from onnx import numpy_helper

from exporter import ops, passes
from exporter.backbone import Backbone
from tests.exporter.conftest import random_plugins
from tests.models import LAYERS

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors(backbone: Callable[..., Backbone]) -> Tensors:
    """Plugins of ratio 5, under the names they have in a graph."""
    stored = random_plugins(backbone(), 5).state_dict()
    return {f"variator.plugins.{name}": tensor.numpy() for name, tensor in stored.items()}


def stored(model: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}


def custom(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == ops.DOMAIN]


def test_template_holds_one_pair_of_operators_a_layer(template: onnx.ModelProto) -> None:
    assert Counter(node.op_type for node in custom(template)) == {"MaskedTokenMerge": LAYERS, "TokenSplit": LAYERS}


def test_plugin_initializers_are_the_plugins(template: onnx.ModelProto, tensors: Tensors) -> None:
    assert passes.plugin_initializers(template) == set(tensors)


def test_bind_ratio(template: onnx.ModelProto, tensors: Tensors) -> None:
    before = template.SerializeToString(deterministic=True)
    model = passes.bind_ratio(template, 5, tensors)
    assert template.SerializeToString(deterministic=True) == before, "the template was changed"
    onnx.checker.check_model(model, full_check=True)
    for node in custom(model):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"ratio": 5, "plugin_namespace": b"compexport", "plugin_version": b"1"}
    assert sorted(function.name for function in model.functions) == ["MaskedTokenMerge", "TokenSplit"]
    for tensor in model.graph.initializer:
        if tensor.name in tensors:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), tensors[tensor.name])
    assert set(tensors) <= set(stored(model))


def test_without_merging(template: onnx.ModelProto, tensors: Tensors) -> None:
    before = template.SerializeToString(deterministic=True)
    model = passes.without_merging(template)
    assert template.SerializeToString(deterministic=True) == before, "the template was changed"
    onnx.checker.check_model(model, full_check=True)
    assert custom(model) == [] and not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not set(tensors) & set(stored(model))
    produced = {name for node in model.graph.node for name in node.output}
    known = produced | set(stored(model)) | {value.name for value in model.graph.input} | {""}
    assert {name for node in model.graph.node for name in node.input} <= known
    # The mask has served the operators as well, but attention still needs it.
    assert [value.name for value in model.graph.input] == [value.name for value in template.graph.input]


def test_every_ratio_has_the_same_backbone(template: onnx.ModelProto, tensors: Tensors) -> None:
    """Same names, same bytes: that is what lets a family share one weights file."""
    backbone = stored(passes.without_merging(template))
    bound = stored(passes.bind_ratio(template, 5, tensors))
    assert len(backbone) > 10
    assert {name: data for name, data in bound.items() if name not in tensors} == backbone


def test_no_initializer_without_a_reader(template: onnx.ModelProto, tensors: Tensors) -> None:
    for model in (passes.without_merging(template), passes.bind_ratio(template, 5, tensors)):
        read = {name for node in model.graph.node for name in node.input}
        assert set(stored(model)) <= read


def test_bind_ratio_requires_every_tensor(template: onnx.ModelProto, tensors: Tensors) -> None:
    some = dict(list(tensors.items())[:-1])
    with pytest.raises(Exception, match="w_out"):
        passes.bind_ratio(template, 5, some)
