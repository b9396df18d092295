"""What is kept of a training, beside what the tests of the command see."""

from __future__ import annotations

import pytest

from calib.ode.course import Quality
from calib.ode.fit import chosen_form
from calib.ode.settings import OdeSettings
from exporter.methods.ode import Form


@pytest.mark.parametrize(
    ("block", "sublayer", "kept"),
    [((0.5, 0.5), (0.5, 0.5), "sublayer"), ((0.9, 0.2), (0.5, 0.5), "block"), ((0.9, 0.0), (0.5, 0.5), "sublayer")],
)
def test_the_better_form_over_all_ratios_is_kept(
    block: tuple[float, float], sublayer: tuple[float, float], kept: Form
) -> None:
    values: dict[Form, tuple[float, float]] = {"block": block, "sublayer": sublayer}
    stepped = {form: {2.0: {"accuracy": a}, 3.0: {"accuracy": b}} for form, (a, b) in values.items()}
    found = Quality({"accuracy": 1.0}, stepped, {})
    assert chosen_form(found, OdeSettings(), "accuracy") == kept
    assert chosen_form(found, OdeSettings(form="block"), "accuracy") == "block"
