"""One round trip for modules that are fed the same tensor, and never a stale result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsqp import remote
from tsqp.errors import RemoteError
from tsqp.placement import PLACEMENTS
from tsqp.remote import SiblingGroup
from tsqp.split import _siblings


class Recorder:
    """Answers a group of two with 2x and 3x, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return [2 * x, 3 * x]


@pytest.fixture(params=[False, True], ids=["no_grad", "inference"])
def inference(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch.inference_mode() if request.param else torch.no_grad():
        yield request.param


@pytest.mark.usefixtures("inference")
class TestSiblingGroup:
    def test_one_request_serves_all_members_in_any_order(self) -> None:
        send = Recorder()
        group = SiblingGroup(("a", "b"), send)
        x = torch.ones(3)
        assert torch.equal(group.take("b", x), 3 * x)
        assert torch.equal(group.take("a", x), 2 * x)
        assert send.calls == 1

    def test_an_input_changed_in_place_is_asked_anew(self) -> None:
        send = Recorder()
        group = SiblingGroup(("a", "b"), send)
        x = torch.ones(3)
        group.take("a", x)
        x.add_(1)
        assert torch.equal(group.take("b", x), torch.full((3,), 6.0))
        assert send.calls == 2

    def test_another_tensor_with_the_same_values_is_asked_anew(self) -> None:
        send = Recorder()
        group = SiblingGroup(("a", "b"), send)
        group.take("a", torch.ones(3))
        group.take("b", torch.ones(3))
        assert send.calls == 2

    def test_a_member_called_twice_is_asked_anew(self) -> None:
        send = Recorder()
        group = SiblingGroup(("a", "b"), send)
        x = torch.ones(3)
        assert torch.equal(group.take("a", x), group.take("a", x))
        assert send.calls == 2

    def test_nothing_is_held_once_all_are_taken(self) -> None:
        group = SiblingGroup(("a", "b"), Recorder())
        x = torch.ones(3)
        group.take("a", x)
        group.take("b", x)
        assert group._origin is None
        assert not group._results


def test_a_member_without_siblings_keeps_nothing_of_its_input(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input may be the largest tensor there is, and a copy of it would serve nobody."""

    def no_copy(_: Tensor) -> None:
        pytest.fail("the input was kept")

    monkeypatch.setattr(remote, "Fingerprint", no_copy)
    asked: list[Tensor] = []
    group, x = SiblingGroup(("a",), lambda x: [asked.append(x) or 2 * x]), torch.ones(3)
    for count in (1, 2):
        assert torch.equal(group.take("a", x), 2 * x)
        assert len(asked) == count


def test_a_failed_request_leaves_no_results() -> None:
    answers: list[Any] = [RemoteError("no"), [torch.zeros(1), torch.ones(1)]]

    def send(_: Tensor) -> list[Tensor]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    group, x = SiblingGroup(("a", "b"), send), torch.ones(1)
    with pytest.raises(RemoteError):
        group.take("a", x)
    assert torch.equal(group.take("b", x), torch.ones(1))


def test_siblings_take_inputs_of_one_width() -> None:
    widths = {"q_proj": 8, "k_proj": 8, "v_proj": 6, "o_proj": 8}
    modules: dict[str, nn.Module] = {f"a.{name}": nn.Linear(width, 4) for name, width in widths.items()}
    targets, ops = dict.fromkeys(modules, "linear"), PLACEMENTS["ops"]
    assert _siblings("a.k_proj", targets, modules, ops) == ("a.q_proj", "a.k_proj")
    assert _siblings("a.v_proj", targets, modules, ops) == ("a.v_proj",)
    assert _siblings("a.o_proj", targets, modules, ops) == ("a.o_proj",)
