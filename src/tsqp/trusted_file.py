"""Reading the file of trusted weights: once, into private memory; hashed there; only then parsed, from the same memory.

The file is safetensors, with one JSON document in its metadata. It is parsed here and not by the safetensors package,
whose parser of bytes copies every tensor: in an enclave an embedding table is not to be there twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from typing import Any

import torch

from .errors import ConfigError, ModelError, ModelNotFoundError
from .protocol import MAX_RANK

#: What this tsqp writes and reads. A newer format is refused.
FORMAT = 1
#: The entry of the file's safetensors metadata that holds the document.
METADATA_KEY = "tsqp_trusted_weights"
#: Cap on the file: room for the embedding table of any model there is.
MAX_FILE_BYTES = 16 << 30
_MAX_HEADER_BYTES = 64 << 20
#: A tensor below this is copied out, to be well aligned and not to keep the file in memory; larger ones are views.
_COPIED_BYTES = 1 << 20
_MAX_SHOWN_CHARS = 60
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: safetensors' names of the dtypes a runner can compute with or index by.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_pinned(path: str | os.PathLike[str], digest: str | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The document and the tensors of the file whose SHA-256 is ``digest``, ``"sha256:HEX"``.

    Raises :class:`~tsqp.errors.ConfigError` for a digest that is missing or malformed,
    :class:`~tsqp.errors.ModelNotFoundError` where there is no file, and :class:`~tsqp.errors.ModelError` for a file
    that is another one than the digest names, or that this tsqp can't read.
    """
    wanted = _digest(digest)
    content = _content(path)
    # The computed digest is not told: whoever changed the file would like it to be pasted.
    if "sha256:" + hashlib.sha256(content).hexdigest() != wanted:
        raise ModelError(
            f"{path} is not the file that trusted_digest names: it was changed, cut short or is another one; fetch "
            "it again, and take the digest from where 'tsqp trust' printed it, not from this copy"
        )
    try:
        metadata, tensors = parse(content)
        document = json.loads(metadata[METADATA_KEY])
        version = document["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is no file of trusted weights; give the one that 'tsqp trust' wrote") from error
    if version != FORMAT:
        raise ModelError(
            f"{path} is written in format {str(version)[:_MAX_SHOWN_CHARS]!r}, this tsqp reads format {FORMAT}; make "
            "it anew with the 'tsqp trust' of this version"
        )
    return document, tensors


def _digest(text: str | None) -> str:
    if text is None:
        raise ConfigError(
            "trusted_weights needs trusted_digest, as in sha256:HEX: the line that 'tsqp trust' printed where the file "
            "was made; one computed from the file here would prove nothing"
        )
    digest = text.strip().lower() if isinstance(text, str) else ""
    if not _DIGEST.fullmatch(digest):
        raise ConfigError(
            f"trusted_digest {str(text)[:_MAX_SHOWN_CHARS]!r} is not sha256: and 64 hexadecimal digits; give the line "
            "that 'tsqp trust' printed"
        )
    return digest


def _content(path: str | os.PathLike[str]) -> bytearray:
    """The file's bytes, read once; what happens to the file afterwards changes nothing."""
    try:
        # Not blocking: a fifo in the file's place is to be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise ModelError(f"{path} is no regular file; give the file that 'tsqp trust' wrote")
            if about.st_size > MAX_FILE_BYTES:
                raise ModelError(
                    f"{path} has {about.st_size} bytes, more than the {MAX_FILE_BYTES} a file of trusted weights may "
                    "have; give the file that 'tsqp trust' wrote"
                )
            content, count = bytearray(about.st_size), 0
            with memoryview(content) as view:
                while read := file.readinto(view[count:]):
                    count += read
            del content[count:]  # it became shorter meanwhile, and will not have the digest
            return content
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist; give the file that 'tsqp trust' wrote") from None
    except OSError as error:
        raise ModelError(f"the trusted weights in {path} can't be read: {error.strerror}") from error
    except MemoryError:
        raise ModelError(f"the trusted weights in {path} do not fit into memory") from None


def parse(content: bytearray) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file's content; tensors of 1 MiB and more are views of it.

    The tensors have to cover the content, in some order, without holes. Raises :class:`ValueError`,
    :class:`KeyError`, :class:`TypeError` or :class:`AttributeError` for anything else. The format is described at
    https://huggingface.co/docs/safetensors.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= min(len(content), _MAX_HEADER_BYTES):
        raise ValueError("the header's length is impossible")
    header = json.loads(bytes(content[8:start]))
    metadata = header.pop("__metadata__", {})
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        dtype, shape, (begin, stop) = _DTYPES[entry["dtype"]], entry["shape"], _offsets(entry)
        if type(shape) is not list or len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("a shape is impossible")
        count = math.prod(shape)
        if start + begin != end or stop - begin != count * dtype.itemsize:
            raise ValueError("tensors overlap, leave a hole, or are not as long as their shapes")
        end = start + stop
        if end > len(content):
            raise ValueError("a tensor lies outside the file")
        tensors[name] = _tensor(content, dtype, shape, start + begin, count)
    if end != len(content):
        raise ValueError("there is more in the file than its tensors")
    return metadata, tensors


def _offsets(entry: Any) -> tuple[int, int]:
    begin, stop = entry["data_offsets"]
    if type(begin) is not int or type(stop) is not int or not 0 <= begin <= stop:
        raise ValueError("a tensor has impossible offsets")
    return begin, stop


def _tensor(content: bytearray, dtype: torch.dtype, shape: list[int], offset: int, count: int) -> torch.Tensor:
    if not count:
        return torch.empty(shape, dtype=dtype)
    nbytes = count * dtype.itemsize
    if offset % dtype.itemsize or nbytes < _COPIED_BYTES:
        copy = bytearray(memoryview(content)[offset : offset + nbytes])
        return torch.frombuffer(copy, dtype=dtype).reshape(shape)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).reshape(shape)
