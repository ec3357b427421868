"""What a message may not hold, told before it is sent; meta; frames that do not fit their header."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from wire_bytes import raw

from tsqp._message import FLAG_VIA_ZMQ, MAX_META_BYTES, MAX_TENSORS, Decoder, pack_meta, unpack_meta
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

pytest_plugins = ["message_fixtures"]


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
