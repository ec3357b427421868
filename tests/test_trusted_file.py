"""The file of trusted weights: how it is made, pinned by its digest, read, and refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import assert_same, logits, serving
from trusting import FAMILIES, NORM, Made, digest_of, made, serving_checkpoint, without

from tsqp import model_info, trusted_file
from tsqp.errors import ConfigError, ModelError, ModelNotFoundError, UnplacedParameterError, UntrustedServerError
from tsqp.server import GPUServer
from tsqp.split import from_pretrained
from tsqp.trusted_file import METADATA_KEY, parse
from tsqp.trusted_making import write_trusted_weights
from tsqp.trusted_weights import load_trusted_weights

pytest_plugins = ["trusting_fixtures"]


# --- the file and its digest ------------------------------------------------------------------------------------------


def test_a_file_of_another_model_is_refused(gpt2: Made, server: GPUServer, llama: Made) -> None:
    with pytest.raises(UntrustedServerError, match=r"config\."):
        from_pretrained(None, server.endpoint, **gpt2.options)
    with pytest.raises(ModelError, match=r"checkpoint in .* is not that of the trusted weights") as caught:
        from_pretrained(llama.checkpoint, "ipc:///nobody/is/asked", **gpt2.options)
    assert not isinstance(caught.value, UntrustedServerError)


def test_a_path_with_another_generation_config_is_refused(llama: Made, tmp_path: Path) -> None:
    shutil.copytree(llama.checkpoint, tmp_path / "other")
    entries = json.loads((tmp_path / "other" / "generation_config.json").read_text())
    (tmp_path / "other" / "generation_config.json").write_text(json.dumps({**entries, "eos_token_id": 9}))
    with pytest.raises(ModelError, match=r"generation_config\.eos_token_id is 9, in the file 5"):
        from_pretrained(tmp_path / "other", "ipc:///nobody/is/asked", **llama.options)


@pytest.mark.parametrize("damage", ["changed", "truncated", "longer", "empty"])
def test_a_damaged_file_is_refused_without_telling_its_digest(damage: str, llama: Made, tmp_path: Path) -> None:
    content = bytearray(llama.file.read_bytes())
    if damage == "changed":
        content[-1] ^= 1
    content = {"truncated": content[:-1], "longer": content + b"\0", "empty": bytearray()}.get(damage, content)
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"not the file that trusted_digest names.*where 'tsqp trust' printed it"
    ) as caught:
        load_trusted_weights(file, llama.digest)
    assert digest_of(file)[7:] not in str(caught.value)


def test_another_digest_is_refused(llama: Made) -> None:
    other = "sha256:" + "0" * 64
    with pytest.raises(ModelError, match="not the file that trusted_digest names") as caught:
        load_trusted_weights(llama.file, other)
    assert llama.digest[7:] not in str(caught.value)


@pytest.mark.parametrize(
    "digest",
    ["", "0" * 64, "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "g" * 64, "md5:" + "0" * 32],
)
def test_a_malformed_digest_is_refused(digest: str, llama: Made) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        load_trusted_weights(llama.file, digest)


def test_a_digest_may_have_capitals_and_a_line_end(llama: Made) -> None:
    text = f"{llama.digest.upper()}\n"
    assert load_trusted_weights(llama.file, text).info.tied


def test_a_missing_digest_is_refused_without_telling_it(llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSQP_TRUSTED_DIGEST", raising=False)
    with pytest.raises(ConfigError, match=r"printed where the file was made.*would prove nothing") as caught:
        from_pretrained(None, "ipc:///nobody/is/asked", trusted_weights=llama.file)
    assert llama.digest[7:] not in str(caught.value)
    with pytest.raises(ConfigError, match="without trusted_weights"):
        from_pretrained(None, "ipc:///nobody/is/asked", trusted_digest=llama.digest)


def test_the_digest_may_come_from_the_environment(
    llama: Made, server: GPUServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_TRUSTED_DIGEST", llama.digest)
    with pytest.raises(ConfigError, match="TSQP_TRUSTED_DIGEST is set without trusted_weights"):
        from_pretrained(None, server.endpoint)
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        from_pretrained(None, server.endpoint, trusted_weights=llama.file, trusted_digest="")
    from_pretrained(None, server.endpoint, trusted_weights=llama.file).close()
    with pytest.raises(ModelError, match="not the file"):
        from_pretrained(None, server.endpoint, trusted_weights=llama.file, trusted_digest="sha256:" + "1" * 64)


def test_local_takes_no_trusted_weights(llama: Made) -> None:
    with pytest.raises(ConfigError, match="'local' asks no server"):
        from_pretrained(llama.checkpoint, placement="local", **llama.options)
    from_pretrained(llama.checkpoint, placement="local", trusted_weights=None, trusted_digest=None).close()


def test_no_file_no_fifo_no_directory(tmp_path: Path, llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_trusted_weights(tmp_path / "none", llama.digest)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ModelError, match=r"no regular file|can't be read"):
            load_trusted_weights(path, llama.digest)
    monkeypatch.setattr(trusted_file, "MAX_FILE_BYTES", 100)
    with pytest.raises(ModelError, match="more than the 100"):
        load_trusted_weights(llama.file, llama.digest)


def test_what_was_hashed_is_what_is_used(llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    shutil.copy(llama.file, file)
    sha256 = hashlib.sha256

    def swap_then_hash(content: bytes) -> Any:
        values = safetensors.torch.load(bytes(content))
        safetensors.torch.save_file({name: value * 0 for name, value in values.items()}, file)
        return sha256(content)

    monkeypatch.setattr(hashlib, "sha256", swap_then_hash)
    info = load_trusted_weights(file, llama.digest).info
    assert torch.equal(info.trusted[NORM], llama.stock.model.norm.weight)
    assert not safetensors.torch.load_file(file)[NORM].any(), "the file on the disk is another one by now"


def rewritten(source: Path, file: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Writes the file with its document changed; its own digest, as if somebody had been talked into it."""
    with safetensors.safe_open(source, framework="pt") as opened:
        document = json.loads(opened.metadata()[METADATA_KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    text = change(document)
    metadata = {METADATA_KEY: text if isinstance(text, str) else json.dumps(text)} if text is not None else {}
    safetensors.torch.save_file(tensors, file, metadata)
    return digest_of(file)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: {**d, "format": 2}, "format '2', this tsqp reads format 1"),
        (lambda d: {**d, "format": "x" * 999}, "format 'x{60}', this"),
        (lambda d: without(d, "format"), "no file of trusted weights"),
        (lambda d: [d], "no file of trusted weights"),
        (lambda d: "{", "no file of trusted weights"),
        (lambda d: "[" * 100_000, "no file of trusted weights"),
        (lambda d: None, "no file of trusted weights"),
        (lambda d: {**d, "modules": 3}, "says of its model can't be used"),
        (lambda d: {**d, "geometry": [1]}, "says of its model can't be used"),
        (lambda d: without(d, "config"), "says of its model can't be used"),
        (lambda d: {**d, "lm_head": "model.embed_tokens"}, "says of its model can't be used"),
    ],
)
def test_a_document_that_can_not_be_is_refused(change: Any, named: str, llama: Made, tmp_path: Path) -> None:
    digest = rewritten(llama.file, tmp_path / "file", change)
    with pytest.raises(ModelError, match=named):
        load_trusted_weights(tmp_path / "file", digest)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\2\0\0\0\0\0\0\0{}", b"\2\0\0\0\0\0\0\0{}junk", b"PK\3\4" * 99]
)
def test_what_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="no file of trusted weights"):
        load_trusted_weights(file, digest_of(file))


def test_values_of_odd_dtypes_are_refused(llama: Made, tmp_path: Path) -> None:
    metadata = {METADATA_KEY: json.dumps({"format": 1})}
    safetensors.torch.save_file({"x": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "file", metadata)
    with pytest.raises(ModelError, match="no file of trusted weights"):
        load_trusted_weights(tmp_path / "file", digest_of(tmp_path / "file"))


# --- parsing, beside the safetensors package --------------------------------------------------------------------------


def agree(content: bytes) -> bool:
    """Whether the content is accepted; where it is, the package finds the same in it."""
    try:
        tensors = parse(bytearray(content))[1]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    expected = safetensors.torch.load(content)
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        assert value.reshape(-1).view(torch.uint8).equal(expected[name].reshape(-1).view(torch.uint8))
    return True


def example() -> bytes:
    values = {
        "table": torch.randn(600, 500),
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
        "ids": torch.arange(7),
    }
    return safetensors.torch.save(values, {METADATA_KEY: "text"})


def test_it_finds_what_the_package_finds() -> None:
    assert agree(example())
    assert agree(safetensors.torch.save({}))


def test_a_large_tensor_is_not_copied() -> None:
    content = bytearray(example())
    tensors = parse(content)[1]
    before = {name: value.clone() for name, value in tensors.items()}
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    assert [name for name, value in tensors.items() if not value.equal(before[name])] == ["table"]


def test_nothing_is_accepted_that_the_package_refuses() -> None:
    """Every accepted mutation of a header has to mean the same to both."""
    content, draw = example(), random.Random(5)
    end = 8 + int.from_bytes(content[:8], "little")
    accepted = 0
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            changed[draw.randrange(end)] = draw.choice((draw.randrange(256), *b'0123456789[]{},:" '))
        accepted += agree(bytes(changed))
    assert 0 < accepted < 500


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2] + [1] * 8, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 126]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [False, 8]},
        {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        ["F32", [2], [0, 8]],
        None,
    ],
)
def test_an_entry_that_can_not_be_is_refused(entry: Any) -> None:
    header = json.dumps({"x": entry}).encode()
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse(content)


# --- making the file --------------------------------------------------------------------------------------------------


def test_the_file_is_reproducible_small_and_holds_no_linear_weights(llama: Made, tmp_path: Path) -> None:
    assert write_trusted_weights(llama.checkpoint, tmp_path / "again") == llama.digest == digest_of(llama.file)
    tensors = load_trusted_weights(llama.file, llama.digest).info.trusted
    assert sorted(tensors) == sorted(name for name in llama.stock.state_dict() if "norm" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_says_what_the_server_says(family: str, tmp_path: Path) -> None:
    own = made(family, tmp_path)
    ours = load_trusted_weights(own.file, own.digest).info
    with serving(own.stock) as server:
        served = server._served.info
    assert ours.modules == served.modules
    assert ours.geometry == served.geometry
    assert (ours.embedding, ours.lm_head, ours.tied) == (served.embedding, served.lm_head, served.tied)
    assert (ours.config, ours.generation_config, ours.dtype) == (served.config, served.generation_config, served.dtype)
    assert ours.trusted.keys() == served.trusted.keys()
    if family == "mixtral":  # which experts a token goes to can't be told without values
        assert [module.name for module in ours.fused.mlp] == [module.name for module in served.fused.mlp]
    elif not served.fused.why:
        assert replace(ours.fused, attention_implementation="sdpa", widths=frozenset()) == replace(
            served.fused, attention_implementation="sdpa", widths=frozenset()
        )


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.embed_tokens.weight"]),
        ("gpt2", ["transformer.wpe.weight", "transformer.wte.weight"]),
    ],
)
def test_embedding_tables_are_in_it_if_asked_for(family: str, names: list[str], tmp_path: Path) -> None:
    own = made(family, tmp_path, embedding=True)
    tensors, state = load_trusted_weights(own.file, own.digest).info.trusted, own.stock.state_dict()
    assert (
        sorted(
            set(tensors) - {name for name in state if "embed" not in name and ".wte" not in name and ".wpe" not in name}
        )
        == names
    )
    assert all(torch.equal(tensors[name], state[name]) for name in names)
    with serving(own.stock) as server:
        model = from_pretrained(endpoint=server.endpoint, placement="fused", **own.options)
        assert_same(logits(model), logits(own.stock))
        model.close()


def test_a_table_stored_under_its_twins_name_is_found(llama: Made, tmp_path: Path) -> None:
    shutil.copytree(llama.checkpoint, tmp_path / "other")
    tensors = safetensors.torch.load_file(llama.checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.torch.save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    digest = write_trusted_weights(tmp_path / "other", tmp_path / "file", embedding=True)
    info = load_trusted_weights(tmp_path / "file", digest).info
    assert info.tied
    assert torch.equal(info.trusted["model.embed_tokens.weight"], tensors["lm_head.weight"])


def test_tables_with_other_values_are_not_tied(llama: Made, tmp_path: Path) -> None:
    shutil.copytree(llama.checkpoint, tmp_path / "other")
    tensors = safetensors.torch.load_file(llama.checkpoint / "model.safetensors")
    for change, tied in ((0.0, True), (1.0, False)):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        safetensors.torch.save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
        digest = write_trusted_weights(tmp_path / "other", tmp_path / "file")
        assert load_trusted_weights(tmp_path / "file", digest).info.tied is tied
        with serving_checkpoint(tmp_path / "other") as server:
            from_pretrained(None, server.endpoint, trusted_weights=tmp_path / "file", trusted_digest=digest).close()


def test_weights_of_linear_layers_are_not_even_read(llama: Made, tmp_path: Path) -> None:
    llama.stock.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if "norm" in name}
    assert needed < set(index.values())
    for file in set(index.values()) - needed:
        (tmp_path / file).unlink()
    assert write_trusted_weights(tmp_path, tmp_path / "file") == llama.digest


def test_the_dtype_is_that_of_loading(tmp_path: Path) -> None:
    own = made("qwen2", tmp_path, dtype=torch.bfloat16)
    assert load_trusted_weights(own.file, own.digest).info.dtype == "bfloat16"
    config = json.loads((own.checkpoint / "config.json").read_text())
    (own.checkpoint / "config.json").write_text(json.dumps(without(config, "dtype")))
    digest = write_trusted_weights(own.checkpoint, own.file)
    assert load_trusted_weights(own.file, digest).info.dtype == "bfloat16", "that of the weights"
    with serving_checkpoint(own.checkpoint) as server:
        from_pretrained(None, server.endpoint, trusted_weights=own.file, trusted_digest=digest).close()


def test_a_checkpoint_of_older_names_gives_the_same_file(gpt2: Made, tmp_path: Path) -> None:
    shutil.copytree(gpt2.checkpoint, tmp_path / "older")
    tensors = safetensors.torch.load_file(gpt2.checkpoint / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "older" / "model.safetensors", {"format": "pt"})
    assert write_trusted_weights(tmp_path / "older", tmp_path / "file") == gpt2.digest


def test_checkpoints_that_can_not_be_used_are_refused(llama: Made, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_bytes(b"an older one")
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        write_trusted_weights(tmp_path / "none", out)
    shutil.copytree(llama.checkpoint, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({**tensors, NORM: torch.ones(4)}, weights)
    with pytest.raises(ModelError, match=r"model\.norm\.weight of shape \[4\]"):
        write_trusted_weights(tmp_path / "other", out)
    safetensors.torch.save_file(without(tensors, NORM), weights)
    with pytest.raises(ModelError, match=r"lacks weights for model\.norm\.weight"):
        write_trusted_weights(tmp_path / "other", out)
    weights.write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="can't be read"):
        write_trusted_weights(tmp_path / "other", out)
    weights.unlink()
    with pytest.raises(ModelNotFoundError, match=r"neither model\.safetensors"):
        write_trusted_weights(tmp_path / "other", out)
    with pytest.raises(ModelError, match="can't be written"):
        write_trusted_weights(llama.checkpoint, tmp_path / "no" / "directory")
    assert out.read_bytes() == b"an older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_what_is_too_much_for_a_runner_is_refused(llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_info, "MAX_TRUSTED_BYTES", 100)
    with pytest.raises(UnplacedParameterError, match="more than the 100"):
        write_trusted_weights(llama.checkpoint, tmp_path / "file")
