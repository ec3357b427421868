"""The codec: tensors of every dtype, rank and layout through a slot and through frames, header fields, meta."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from through import WAYS
from wire_bytes import DTYPES, HEADER, Reader, raw, reader, same_bits, tensor_of

from tsqp._message import MAX_TENSORS, deadline_ns
from tsqp.errors import MessageError

pytest_plugins = ["message_fixtures"]


# --- dtypes, shapes, layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_rank(send, dtype, rank):
    for shape in ((2,) * rank, (1,) * rank, (3, *(1,) * rank)[:rank]):
        tensor = tensor_of(dtype, shape, rank)
        (received,) = send([tensor]).tensors
        assert same_bits(received, tensor)
        assert received.is_contiguous()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5), (0, 0), (1, 2, 3, 0, 5, 6, 7, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float8_e5m2], ids=str)
def test_empty_tensors_keep_their_shape(send, dtype, shape):
    tensor = torch.empty(shape, dtype=dtype)
    (received,) = send([tensor]).tensors
    assert same_bits(received, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(send, dtype):
    """All 2^16 patterns for the narrow dtypes: NaN payloads, subnormals, negative zero."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    if dtype is torch.bool:
        bits &= 1
    (received,) = send([bits.view(dtype)]).tensors
    assert same_bits(received, bits.view(dtype))


_TORCH_LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1),
    "permuted": lambda t: t.permute(2, 0, 3, 1),
    "stepped": lambda t: t[::2, :, 1::2],
    "last dimension stepped": lambda t: t[..., ::3],
    "sliced": lambda t: t[1:, 2:, :-1],
    "one column": lambda t: t[:, :, :, 2:3],
    "selected": lambda t: t[:, 1],
    "expanded": lambda t: t[:1].expand(7, -1, -1, -1),
    "expanded inside": lambda t: t[:, :, :1, :].expand(-1, -1, 6, -1),
    "expanded scalar": lambda t: t[0, 0, 0, 0].expand(3, 5),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "overlapping": lambda t: t.reshape(-1).as_strided((5, 6), (2, 3)),
    "windows": lambda t: t.reshape(-1).unfold(0, 8, 3),
    "offset": lambda t: t.reshape(-1)[5:17],
    "large rows": lambda t: t.reshape(-1).repeat(50)[: 4 * 5000].reshape(4, 5000)[:, :-1],
    "stage not filled evenly": lambda t: t.reshape(-1).repeat(50)[: 30 * 701].reshape(30, 701)[:, :700],
}


@pytest.mark.parametrize("layout", _TORCH_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_torch_layouts_are_made_contiguous(send, dtype, layout):
    tensor = _TORCH_LAYOUTS[layout](tensor_of(dtype, (4, 5, 6, 9), 1))
    (received,) = send([tensor]).tensors
    assert same_bits(received, tensor)


_NUMPY_LAYOUTS = {
    "reversed": lambda a: a[::-1],
    "all reversed": lambda a: a[::-1, ::-1, ::-1],
    "reversed with steps": lambda a: a[:, ::-2, 5:0:-3],
    "fortran": np.asfortranarray,
    "transposed": lambda a: a.T,
    "broadcast": lambda a: np.broadcast_to(a[0], (5, *a[0].shape)),
    "one item reversed": lambda a: a[:1, :1, ::-1],
    "new axis": lambda a: a[None, :, ::2, None],
    "read only": lambda a: np.frombuffer(a.tobytes(), a.dtype),
    "0-d": lambda a: a[1, 1, 1, None][0:1].reshape(()),
    "scalar": lambda a: a[1, 1, 1],
}


@pytest.mark.parametrize("layout", _NUMPY_LAYOUTS)
@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "f2", "i4", "f4", "f8", "i8", "u4"])
def test_numpy_layouts_are_made_contiguous(send, dtype, layout):
    array = _NUMPY_LAYOUTS[layout](np.arange(4 * 5 * 7).reshape(4, 5, 7).astype(dtype))
    (received,) = send([array]).tensors
    assert same_bits(received, torch.from_numpy(np.array(array, order="C")))


_DIM = st.integers(0, 4)


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype, rank and strides."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(_DIM, max_size=8).filter(lambda dims: np.prod(dims) <= 4096))
    tensor = tensor_of(dtype, shape, draw(st.integers(0, 1 << 16)))
    for _ in range(draw(st.integers(0, 3))):
        if tensor.ndim == 0:
            break
        dim = draw(st.integers(0, tensor.ndim - 1))
        change = draw(st.sampled_from(["transpose", "step", "narrow", "select", "expand"]))
        if change == "transpose":
            tensor = tensor.transpose(dim, draw(st.integers(0, tensor.ndim - 1)))
        elif change == "step":
            tensor = tensor[(*[slice(None)] * dim, slice(None, None, draw(st.integers(1, 3))))]
        elif change == "narrow":
            start = draw(st.integers(0, tensor.shape[dim]))
            tensor = tensor.narrow(dim, start, tensor.shape[dim] - start)
        elif change == "select" and tensor.shape[dim]:
            tensor = tensor.select(dim, draw(st.integers(0, tensor.shape[dim] - 1)))
        elif change == "expand" and tensor.ndim < 8:
            tensor = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], draw(_DIM), *tensor.shape[dim:])
    return tensor


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.lists(_tensors(), max_size=6), meta=st.binary(max_size=700), way=st.sampled_from(WAYS))
def test_any_tensors_come_back_bit_for_bit(through, tensors, meta, way):
    tensors = [tensor for tensor in tensors if tensor.numel() <= 1 << 14]
    message = getattr(through, way)(tensors, meta)
    assert len(message.tensors) == len(tensors)
    assert all(same_bits(one, other) for one, other in zip(message.tensors, tensors, strict=True))
    assert message.meta_bytes == meta


def test_many_tensors_in_one_message(send):
    tensors = [tensor_of(DTYPES[i % len(DTYPES)], (i % 5, i % 3), i) for i in range(MAX_TENSORS)]
    received = send(tensors).tensors
    assert len(received) == MAX_TENSORS
    assert all(same_bits(one, other) for one, other in zip(received, tensors, strict=True))
    assert send([]).tensors == []


def test_parameters_and_tensors_in_a_graph_are_sent_as_their_values(send):
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    one, other = send([parameter, (parameter * 2).t()]).tensors
    assert same_bits(one, parameter.detach())
    assert same_bits(other, (parameter.detach() * 2).t())
    assert not one.requires_grad


def test_a_lazily_negated_view_is_refused(send):
    """Its memory holds the values with the other sign."""
    negated = torch.conj(torch.tensor([1 + 2j, 3 + 4j])).imag
    assert negated.is_neg()
    with pytest.raises(MessageError, match="resolve_neg"):
        send([negated])
    assert send([negated.resolve_neg()]).tensors[0].tolist() == [-2.0, -4.0]


# --- memory ---------------------------------------------------------------------------------------------------


def test_received_tensors_are_private_and_aligned(through):
    tensor = torch.arange(1000.0)
    first = through.slot([tensor]).tensors[0]
    second = through.slot([tensor + 1]).tensors[0]
    first.fill_(-1)
    assert torch.equal(second, tensor + 1)
    assert {received.data_ptr() % 64 for received in (first, second)} == {0}


def test_a_received_tensor_outlives_everything(through):
    with reader() as end:
        end.put(raw((3,)).pack())
        message = end.read()
    tensor = message.tensors[0]
    del message, end
    assert tensor.tolist() == [0.0, 0.0, 0.0]


def test_a_view_kept_past_its_lease_and_ring_does_not_crash():
    end = Reader(1 << 16, 2)
    end.put(raw((3, 3)).pack())
    with end.codec.lease(end.ring, deadline_ns(0)) as message:
        view = message.tensors[0]
    end.ring.close()
    end.writer.close()
    del end, message
    assert view.sum() == 0


def test_a_lease_released_twice_gives_back_one_slot():
    with reader(count=2) as end:
        for _ in range(3):
            end.put(raw((1,)).pack())
            lease = end.codec.lease(end.ring, deadline_ns(0))
            lease.release()
            lease.release()
        assert end.codec.lease(end.ring, 0) is None


def test_a_dropped_lease_gives_its_slot_back():
    with reader(count=1) as end:
        for _ in range(3):
            end.put(raw((1,)).pack())
            end.codec.lease(end.ring, deadline_ns(0))


def test_frames_borrow_contiguous_memory_and_copy_the_rest(through):
    plain, strided = torch.arange(10, dtype=torch.uint8), torch.arange(20, dtype=torch.uint8)[::2]
    through.plan([plain, strided], b"")
    borrowed, copied = (memoryview(part) for part in through.out.as_they_travel([plain, strided]))
    plain[0] = strided[0] = 99
    assert borrowed[0] == 99
    assert copied[0] == 0
    assert bytes(copied)[1:] == bytes(range(2, 20, 2))


# --- header fields --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extreme", [0, 1])
def test_every_header_field_arrives(send, extreme):
    fields = {
        "tag": (1 << 32) - 1,
        "flags": (1 << 24) - 1,
        "request_id": (1 << 64) - 1,
        "status": -(1 << 31),
        "site": (1 << 32) - 2,
        "index": (1 << 64) - 2,
        "compute_ns": (1 << 64) - 3,
        "queue_ns": (1 << 64) - 4,
    }
    fields = {name: value if extreme else number + 1 for number, (name, value) in enumerate(fields.items())}
    message = send([torch.zeros(3)], **fields)
    assert {name: getattr(message, name) for name in fields} == fields
    assert message.nbytes == 128 + 96 + 32 + 64
    assert "torch.float32(3,)" in repr(message)


def test_carrier_names_how_it_came(through):
    assert through.slot([]).carrier == "ring"
    assert through.frames([]).carrier == "zmq"


def test_a_message_is_laid_out_as_documented(through):
    """Written against the layout by hand: what is on the wire can't change by accident."""
    through.plan([torch.zeros(2, 3), torch.zeros(0, 5)], b"\x80", tag=7, request_id=42)
    assert through.out.head_bytes(b"\x80") == raw((2, 3), (0, 5), meta=b"\x80").pack()[: 128 + 2 * 96 + 64]
    assert HEADER.size == 128
