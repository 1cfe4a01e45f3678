"""The header reader agrees with the format's own package, and survives any damage with one error."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from vllm_mlx.core.errors import ModelError
from vllm_mlx.models.gguf_file import read_header, tensor_rows

MakeGguf = Callable[..., Path]


def test_metadata_and_tensors_agree_with_the_reference_reader(make_gguf: MakeGguf) -> None:
    extra = {"x.bool": True, "x.text": "ä\n", "x.floats": [0.5, 2.0], "x.flags": [True, False], "x.texts": ["", "é"]}
    path = make_gguf(types="Q4_0", extra=extra)
    ours, reference = read_header(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        info = ours.tensors[tensor.name]
        assert info.type_name == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.size_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert tensor_rows(ours, info).tobytes() == tensor.data.tobytes()


def test_all_number_types_are_read(tmp_path: Path) -> None:
    path = tmp_path / "numbers.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float64("f64", 1e-300)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    numbers = read_header(path).metadata
    assert [numbers[name] for name in ("u8", "i8", "u16", "i16")] == [200, -100, 60000, -30000]
    assert [numbers[name] for name in ("i32", "u64", "i64", "f64")] == [-2_000_000_000, 2**63, -(2**62), 1e-300]


def test_every_truncation_is_one_clear_error(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    whole = path.read_bytes()
    header = read_header(path).header_bytes
    for size in [*range(0, header, 97), header, header + 1, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"tiny\.gguf") as raised:
            read_header(path)
        assert "\n" not in raised.value.message


def test_damaged_headers_never_hang_or_crash(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    header = read_header(path).header_bytes
    whole = path.read_bytes()[:header]
    rng = random.Random(3)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.sample(range(header), 3):
            damaged[at] = rng.choice((0, 0xFF, rng.randrange(256)))
        with path.open("r+b") as file:
            file.write(damaged)
        try:
            read_header(path)
        except ModelError:
            num_refused += 1
    assert num_refused > 30


@pytest.mark.parametrize("count", [2**63, 2**40])
def test_impossible_count_is_refused_at_once(tmp_path: Path, count: int) -> None:
    text = struct.pack("<Q", 1) + b"k"
    body = struct.pack("<IQQ", 3, 0, 1) + text + struct.pack("<IIQ", 9, 8, count)
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + body)
    with pytest.raises(ModelError, match="ends too early"):
        read_header(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for data, part in (
        (b"", "not a whole GGUF"),
        (b"PK\3\4" + bytes(64), "does not begin"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=part):
            read_header(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_header(tmp_path / "gone.gguf")


def test_type_that_cannot_be_loaded_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    blocks = np.zeros((2, 110), np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q3_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight is of type Q3_K.*Q8_0"):
        read_header(path)
