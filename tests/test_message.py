"""The codec: tensors of every dtype, rank and layout through a slot and through frames, header fields, meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_bytes import DTYPES, HEADER, Reader, raw, reader, same_bits, tensor_of

from tsqp._message import (
    FLAG_VIA_ZMQ,
    MAX_META_BYTES,
    MAX_TENSORS,
    Decoder,
    Encoder,
    Message,
    deadline_ns,
    pack_meta,
    unpack_meta,
)
from tsqp._ring import Ring, Segment
from tsqp.errors import (
    DTypeError,
    MessageError,
    MessageTooLargeError,
    MetaError,
    RankError,
    SizeMismatchError,
    TooManyTensorsError,
    TruncatedMessageError,
)

FIELDS = {"tag": 0, "flags": 0, "request_id": 0, "status": 0, "site": 0, "index": 0, "compute_ns": 0, "queue_ns": 0}


class Through:
    """Sends messages through one carrier and returns what arrives."""

    def __init__(self) -> None:
        self.segment = Segment.create(1 << 18, 3, 1)
        self.out, self.inn = Encoder(), Decoder()
        self.writer = Ring(self.segment, 0, True)
        self.reader = Ring(self.segment, 0, False)

    def plan(self, tensors: list[Any], meta: bytes, **fields: int) -> int:
        return self.out.plan(tensors, meta, *{**FIELDS, **fields}.values())

    def slot(self, tensors: list[Any], meta: bytes = b"", **fields: int) -> Message:
        self.plan(tensors, meta, **fields)
        self.out.write(self.writer, meta, deadline_ns(0))
        return self.inn.read(self.reader, deadline_ns(0))

    def lease(self, tensors: list[Any], meta: bytes = b"", **fields: int) -> Message:
        self.plan(tensors, meta, **fields)
        self.out.write(self.writer, meta, deadline_ns(0))
        with self.inn.lease(self.reader, deadline_ns(0)) as message:
            message.tensors[:] = [tensor.clone() for tensor in message.tensors]
            return message

    def frames(self, tensors: list[Any], meta: bytes = b"", **fields: int) -> Message:
        self.plan(tensors, meta, **fields)
        frames = [bytearray(memoryview(part)) for part in self.out.as_they_travel(tensors)]
        return self.inn.decode_frames(self.out.head_bytes(meta), frames)


@pytest.fixture(scope="module")
def through():
    made = Through()
    yield made
    vars(made).clear()  # the last test's arguments outlive the fixture; its segment must not


WAYS = ["slot", "lease", "frames"]


@pytest.fixture(params=WAYS)
def send(request: pytest.FixtureRequest, through: Through) -> Callable[..., Message]:
    return getattr(through, request.param)


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


# --- what is refused before it is sent ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.complex64), DTypeError, "complex64 can't be sent; convert"),
        (np.zeros(2, dtype=complex), DTypeError, "complex128 can't be sent"),
        (np.zeros(2, dtype=">f4"), DTypeError, "can't be sent; convert it with astype"),
        (np.zeros(2, dtype="u8"), DTypeError, "uint64 can't be sent"),
        (np.array(["a"]), DTypeError, "can't be sent"),
        (np.array([object()]), DTypeError, "can't be sent"),
        (np.zeros(2, dtype=[("x", "f4")]), DTypeError, "can't be sent"),
        (torch.zeros((1,) * 9), RankError, "9 dimensions can't be sent; at most 8"),
        (np.zeros((1,) * 9, "f4"), RankError, "9 dimensions can't be sent; at most 8"),
        (torch.zeros(2, 2).to_sparse(), MessageError, "to_dense"),
        (torch.zeros(2, device="meta"), MessageError, "on meta can't be sent; move it to the CPU"),
        ([1, 2], MessageError, "a list can't be sent; give torch tensors or NumPy arrays"),
        (b"bytes", MessageError, "a bytes can't be sent"),
        (None, MessageError, "a NoneType can't be sent"),
        (memoryview(b"x"), MessageError, "a memoryview can't be sent"),
    ],
)
def test_what_cannot_be_sent_is_named(send, tensor, error, text):
    with pytest.raises(error, match=text):
        send([torch.zeros(1), tensor])
    assert send([torch.ones(1)]).tensors[0].item() == 1


def test_more_tensors_than_a_message_has_room_for(send):
    with pytest.raises(TooManyTensorsError, match="at most 64 tensors; send several messages"):
        send([torch.zeros(1)] * (MAX_TENSORS + 1))


def test_flags_of_the_transport_are_not_the_users(send):
    for flags in (FLAG_VIA_ZMQ, 1 << 31):
        with pytest.raises(MessageError, match="low 24"):
            send([], flags=flags)


def test_a_message_larger_than_the_slot_is_refused_and_the_ring_goes_on(through):
    with pytest.raises(MessageTooLargeError, match="a message of 262464 bytes does not fit a slot of 262144 bytes"):
        through.slot([torch.zeros(1 << 18, dtype=torch.uint8), torch.zeros(0)])
    fits = torch.zeros((1 << 18) - 256, dtype=torch.uint8)
    assert through.slot([fits]).nbytes == 1 << 18


def test_tensors_of_absurd_size_are_refused_before_any_copy(through):
    with pytest.raises(MessageError):
        through.plan([torch.zeros(1).expand(1 << 50)], b"")


# --- meta -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "meta",
    [
        {"layer": 3, "name": "q_proj", "scale": 0.5, "on": True, "none": None, "raw": b"\0\xff"},
        {"nested": {"list": [1, [2, {"three": 3}]], "empty": {}}, "big": 2**63, "small": -(2**63)},
        {"ä": "ö🙂"},
    ],
)
def test_meta_arrives_as_it_was(send, meta):
    message = send([], pack_meta(meta))
    assert message.meta == meta
    assert message.meta_bytes == msgpack.packb(meta)
    assert message.meta is message.meta  # unpacked once


def test_no_meta_is_an_empty_mapping(send):
    for nothing in (None, {}, b""):
        message = send([], pack_meta(nothing))
        assert message.meta == {}
        assert message.meta_bytes == b""


@pytest.mark.parametrize("nbytes", [1, 383, 384, 385, 5000, MAX_META_BYTES - 6])
def test_meta_of_any_size_up_to_the_limit(send, nbytes):
    """Around what the first look at a slot holds, too."""
    packed = pack_meta({"x": "y" * nbytes})
    assert send([torch.ones(3)], packed).meta == {"x": "y" * nbytes}
    assert pack_meta(packed) is packed


def test_oversized_or_unpackable_meta_is_refused():
    with pytest.raises(MetaError, match="meta is limited to 65536 bytes; send large data as a tensor"):
        pack_meta({"x": b"y" * MAX_META_BYTES})
    with pytest.raises(MetaError, match="limited"):
        pack_meta(bytes(MAX_META_BYTES + 1))
    for bad in ({"x": object()}, {"x": 2**64}, {"x": torch.zeros(1)}):
        with pytest.raises(MetaError, match="meta can't be packed"):
            pack_meta(bad)
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(MetaError, match="meta can't be packed"):
        pack_meta(loop)


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x81",
        b"\x81\xa1x",
        b"\x81\xa5x\x01",
        b"\x81\x01\x02",  # keys are text
        b"\x80\x80",
        b"\x01",
        b"\x90",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x00\x01\x00\x00",
        b"\x81\xa1x\xdd\x00\x00\xff\xff",
        b"\x81\xa1x\xc6\xff\xff\xff\xff",
        b"\x81\xa1x\xd4\x05\x00",  # an extension type
        b"\x81\xa1x\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x81\xa1\xff\x01",  # no UTF-8
        b"\x91" * 60_000,
        b"\xdd\x00\x00\xff\xff" * 13_000,
    ],
)
def test_received_meta_that_is_no_mapping_is_an_error_of_its_own(send, data):
    message = send([torch.ones(2)], data)
    assert message.tensors[0].tolist() == [1, 1]  # the message itself is whole
    with pytest.raises(MetaError):
        _ = message.meta
    with pytest.raises(MetaError):
        unpack_meta(data)


# --- frames that do not fit their header ----------------------------------------------------------------------


def test_frames_are_checked_against_the_header(through):
    message = raw((2, 2), (3,))
    head = message.pack()[: message.head_bytes()]
    frames = [bytearray(16), bytearray(12)]
    codec = Decoder()
    assert [list(t.shape) for t in codec.decode_frames(head, frames).tensors] == [[2, 2], [3]]
    for wrong in (frames[:1], [], [*frames, b""]):
        with pytest.raises(TruncatedMessageError):
            codec.decode_frames(head, wrong)
    for sizes in ((15, 12), (16, 13), (0, 12), (12, 16)):
        with pytest.raises(SizeMismatchError):
            codec.decode_frames(head, [bytearray(size) for size in sizes])
    for cut in (0, 1, 127, 128, len(head) - 1):
        with pytest.raises(TruncatedMessageError):
            codec.decode_frames(head[:cut], frames)
    with pytest.raises(TruncatedMessageError):
        codec.decode_frames(head + bytes(64), frames)
