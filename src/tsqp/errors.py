"""Every exception tsqp raises on purpose.

All derive from :class:`TsqpError`; where the standard library has a class with the same meaning
(``TimeoutError``, ``FileNotFoundError``, ``ValueError``, ...) the tsqp class derives from it too, so that
callers may catch either. A message is one sentence each for what was wrong, what was expected and what to do.
"""

from __future__ import annotations


class TsqpError(Exception):
    """Base of all tsqp exceptions."""


class ConfigError(TsqpError, ValueError):
    """An option, argument or environment variable has a value that can't work."""


class KeyFileError(ConfigError):
    """A file or directory of CURVE keys is missing, damaged, in the way, or open to others."""


# --- waiting and peers -------------------------------------------------------------------------------------


class WaitTimeoutError(TsqpError, TimeoutError):
    """The deadline of a wait passed; the peer is still there and nothing was lost.

    ``queued``: True where a send timed out and ZeroMQ has its message, which arrives even so: do not send it again, and
    do not change its tensors. Else nothing of it arrives, and it may be sent again.
    """

    queued = False


class ClosedError(TsqpError, ConnectionError):
    """This end was closed, or the peer closed its end in an orderly way."""


class PeerDiedError(TsqpError, ConnectionError):
    """The peer went away without closing; the message names the end and how its death was seen."""


# --- shared-memory segments and rings ----------------------------------------------------------------------


class _SystemError(TsqpError, OSError):
    """An OSError whose text is its sentence alone; ``errno`` is there for programs."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class SegmentError(_SystemError):
    """A shared-memory segment can't be created, opened or mapped."""


class SegmentNotFoundError(SegmentError, FileNotFoundError):
    """No segment has this name."""


class SegmentExistsError(SegmentError, FileExistsError):
    """A segment with the requested fixed name exists already."""


class SegmentPermissionError(SegmentError, PermissionError):
    """The segment or the shared-memory directory belongs to somebody else."""


class SharedMemoryFullError(SegmentError):
    """The shared-memory file system has too little space for the segment."""


class SegmentFormatError(SegmentError):
    """The segment's first bytes are not those of a tsqp segment (wrong magic)."""


class SegmentVersionError(SegmentError):
    """The segment was laid out by an incompatible version of tsqp."""


class SegmentGeometryError(SegmentError):
    """The segment's geometry or session differs from what the handle says."""


class SegmentTruncatedError(SegmentError):
    """The segment's file is shorter than its geometry needs."""


class RingCorruptedError(TsqpError):
    """A flag word or length in shared memory has a value the protocol forbids."""


class RingUsageError(TsqpError, RuntimeError):
    """The ring is used against its contract (wrong role, two open write slots, use after fork)."""


# --- messages ----------------------------------------------------------------------------------------------


class MessageError(TsqpError, ValueError):
    """A message can't be encoded, or received bytes are not a valid message."""


class MessageTooLargeError(MessageError):
    """The message does not fit a slot, or is over the cap on one message."""


class MagicError(MessageError):
    """The header's magic is wrong: these bytes are no tsqp message."""


class VersionError(MessageError):
    """The header's version is not the one spoken here."""


class TruncatedMessageError(MessageError):
    """The message is shorter than its header says, or than a header."""


class DTypeError(MessageError, TypeError):
    """A dtype has no code on the wire, or a received dtype code is unknown."""


class RankError(MessageError):
    """A tensor has more than eight dimensions."""


class ShapeError(MessageError):
    """A shape has a negative dimension, or its product overflows."""


class SizeMismatchError(MessageError):
    """A tensor's nbytes is not the product of its shape and item size."""


class OffsetError(MessageError):
    """A tensor's payload is misaligned, overlaps another part or lies outside the message."""


class EncodingError(MessageError):
    """A tensor can't travel in the encoding asked for, or a received encoding is unknown."""


class TooManyTensorsError(MessageError):
    """A message carries more tensors than the protocol allows."""


class MetaError(MessageError):
    """The meta mapping is over its size limit or is no valid msgpack."""


# --- connections and calls ---------------------------------------------------------------------------------


class EndpointError(TsqpError, ValueError):
    """The endpoint is malformed, its path is too long, or it can't work here."""


class InsecureEndpointError(EndpointError):
    """The endpoint reaches beyond this host and this end has no keys."""


class EndpointBusyError(_SystemError):
    """Another live process already listens on the endpoint."""


class DescriptorsExhaustedError(_SystemError):
    """This process has too few file descriptors left for what it was asked to do."""


class ConnectError(TsqpError, ConnectionError):
    """No server answered at the endpoint, or it refused the connection."""


class AuthenticationError(ConnectError):
    """The other end is not one to talk to: keys do not fit, only one end has some, or another user runs it."""


class ProtocolError(TsqpError):
    """The peer broke the message protocol (wrong order, wrong request id, wrong reply)."""


class RemoteError(TsqpError):
    """The server answered a request with an error; ``code`` is the server's status code."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


# --- devices -----------------------------------------------------------------------------------------------


class DeviceError(TsqpError, RuntimeError):
    """The CUDA driver is missing, can't do what is asked, or refused it; the message names the call."""


# --- models ------------------------------------------------------------------------------------------------


class ModelError(TsqpError):
    """A checkpoint can't be loaded or its architecture can't be split."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """The path holds no transformers checkpoint."""


class UntrustedServerError(ModelError):
    """The server says something else of its model than the trusted weights do; the message names what."""


class UnplacedParameterError(ModelError):
    """The placement leaves parameters that neither side holds; the message names them."""
