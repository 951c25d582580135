"""What makes a host wait for an accelerator is counted on a CPU, and what does not is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evengaze.testing.reads import DeviceReads

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: (x > 0).nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean write": lambda x: x.__setitem__(x > 0, 1.0),
    "equal": lambda x: torch.equal(x, x + 1),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x.long().abs()),
    "repeats": lambda x: x.repeat_interleave(x.long().abs()),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "eigh": lambda x: torch.linalg.eigh(x[:, None] * x),
}
GOES_ON: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x + 1).softmax(0) @ x,
    "top": lambda x: x.topk(2).indices.sort().values,
    "gather": lambda x: x.gather(0, x.argsort()),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "slices": lambda x: x[1:].reshape(-1, 1)[None],
    "same device": lambda x: x.to(x.device),
    "arange": lambda x: x[torch.arange(2, device=x.device)],
    "lengths": lambda x: len(x) + x.shape[0],
    "times": lambda x: x.repeat_interleave(2),
    "async upload": lambda x: x + torch.ones(5).to(x.device, non_blocking=True),
    "of the host": lambda x: torch.arange(5).nonzero().tolist(),
}


def device() -> Tensor:
    return torch.tensor([-1.0, 2.0, 0.0, 3.0, -4.0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted_once(name: str, context: Callable[[], Any]) -> None:
    x = device()
    with context(), DeviceReads(x) as counted:
        WAITS[name](x)
    assert counted.total == 1 and len(counted.places) == 1 and __file__ in counted.places[0]
    with DeviceReads() as counted:  # the same on the host costs nothing
        WAITS[name](device())
    assert counted.total == 0


@pytest.mark.parametrize("name", GOES_ON)
def test_what_does_not_wait_is_not_counted(name: str) -> None:
    x = device()
    with DeviceReads(x) as counted:
        GOES_ON[name](x)
    assert counted.total == 0 and not counted.uploads


def test_what_is_computed_from_the_model_lives_there_too() -> None:
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    with DeviceReads(model) as counted, torch.no_grad():
        y = model(x)
        float(y.sum())
        read = y.cpu()
        float(read.sum())  # it is on the host now
    assert counted.reads == {"item": 1, "cpu": 1}


def test_blocking_uploads_are_counted_apart() -> None:
    x = device()
    with DeviceReads(x) as counted:
        torch.ones(5).to(x.device)
        y = torch.tensor([1.0, 2.0], device=x.device)
        bool(y.any())
    assert counted.uploads == {"to": 1, "tensor": 1} and counted.reads == {"item": 1}
