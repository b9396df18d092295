"""Exit heads after steps: what they read, and that a checkpoint's tensors fit exactly or are refused."""

from __future__ import annotations

import pytest
import torch

from compexport.errors import InputError
from exporter.methods.ode_exits import ExitHead, ExitHeads

HIDDEN, CLASSES, N = 8, 3, 4


def test_names_are_those_of_a_checkpoint() -> None:
    names = {name: list(tensor.shape) for name, tensor in ExitHeads(2, HIDDEN, CLASSES).state_dict().items()}
    assert names == {
        "exits.1.pooler.dense.weight": [HIDDEN, 2 * HIDDEN],
        "exits.1.pooler.dense.bias": [HIDDEN],
        "exits.1.classifier.weight": [CLASSES, HIDDEN],
        "exits.1.classifier.bias": [CLASSES],
    }


def test_it_reads_the_first_token_and_the_mean_of_the_real_ones() -> None:
    head = ExitHead(HIDDEN, CLASSES).eval()
    h, mask = torch.randn(1, 5, HIDDEN), torch.tensor([[1, 1, 1, 0, 0]])
    read = torch.cat((h[0, 0], h[0, :3].mean(0)))
    expected = head.classifier(torch.tanh(head.pooler["dense"](read)))
    torch.testing.assert_close(head(h, mask)[0], expected)
    padded = torch.cat((h[:, :3], torch.full((1, 2, HIDDEN), 7.0)), dim=1)
    torch.testing.assert_close(head(padded, mask), head(h, mask))


def test_a_checkpoint_gives_back_what_was_stored() -> None:
    heads = ExitHeads(N, HIDDEN, CLASSES)
    found = ExitHeads.from_tensors(heads.state_dict(), N, HIDDEN, CLASSES, "f")
    h, mask = torch.randn(2, 3, HIDDEN), torch.ones(2, 3)
    assert torch.equal(found.after(3)(h, mask), heads.after(3)(h, mask))


def test_tensors_that_do_not_fit() -> None:
    stored = ExitHeads(N, HIDDEN, CLASSES).state_dict()
    with pytest.raises(InputError, match=r"f: heads after steps: got 1, 2, 3, expected each of 1 to 4"):
        ExitHeads.from_tensors(stored, N + 1, HIDDEN, CLASSES, "f")
    with pytest.raises(InputError, match=r"f: exits.1.classifier.bias: got \(3,\), expected \(2,\)"):
        ExitHeads.from_tensors(stored, N, HIDDEN, CLASSES - 1, "f")
