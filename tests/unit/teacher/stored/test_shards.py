"""Rows are stored to the encoding's own precision, and found by their content, whole or not at all."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from let_plugin.config.errors import ConfigError
from let_plugin.teacher.stored import shards
from let_plugin.teacher.stored.shards import KEY_BYTES, MISSING, RowReader, ShardWriter, decode, encode

L, C = 6, 3


def random_states(seed, exponent=0):
    """With a token whose state is zeros."""
    states_BLE = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    states_BLE[0, 2] = 0
    return states_BLE


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_take_what_is_said_and_zeros_stay_zeros(encoding, dtype):
    states_BLE = random_states(0, 10).to(dtype)
    columns = encode(states_BLE, encoding)
    assert sum(c.element_size() * c.shape[-1] for c in columns.values()) == shards.bytes_per_token(encoding, 24)
    decoded_BLE = decode(columns, dtype)
    assert decoded_BLE.dtype == dtype and decoded_BLE.shape == states_BLE.shape
    assert torch.equal(decoded_BLE.ne(0).any(-1), states_BLE.ne(0).any(-1))
    if encoding == "bfloat16":
        assert torch.equal(decoded_BLE.bfloat16(), states_BLE.bfloat16())


@given(seed=st.integers(0, 2**32), exponent=st.integers(-148, 120))
def test_int8_is_off_by_at_most_half_of_a_scale_of_each_tokens_own(seed, exponent):
    states_BLE = random_states(seed, exponent)
    columns = encode(states_BLE, "int8")
    torch.testing.assert_close(columns["scales"], states_BLE.abs().amax(-1, keepdim=True) / 127)
    error_BLE = (decode(columns, torch.float32) - states_BLE).abs()
    # Below the smallest normal number the scale itself is rounded.
    assert (error_BLE <= 0.501 * columns["scales"] + 127 * 2.0**-149).all()


def batch(*numbers):
    tokens_BL = torch.tensor(numbers)[:, None] + torch.arange(L)
    return {"input": tokens_BL, "positions": torch.arange(L).expand(len(numbers), L)}


def states(number):
    return {"0.values": torch.full((L, C), float(number)).bfloat16(), "0.scales": torch.full((L, 1), number + 0.5)}


def write(folder, numbers, *, stream=0, finish=True):
    writer = ShardWriter(folder, stream, rows_per_shard=2)
    keys = shards.row_keys(batch(*numbers))
    for i in writer.new_rows(keys):
        writer.add(keys[i], states(numbers[i]))
    if finish:
        writer.finish()
    return writer


def test_keys_are_those_of_tokens_and_positions():
    rows = batch(1, 2, 1)
    first, second, third = shards.row_keys(rows)
    assert first == third != second and len(first) == KEY_BYTES
    without = shards.row_keys({"input": rows["input"]})
    packed = shards.row_keys({**rows, "positions": torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, L)})
    assert len({first, without[0], packed[0]}) == 3
    # A view has the key of what it shows, whatever lies between in memory.
    wide = torch.stack([rows["input"], rows["input"] + 1], dim=-1)
    assert shards.row_keys({**rows, "input": wide[..., 0]}) == [first, second, third]


def test_rows_come_back_in_any_order_from_all_streams(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [6, 7], stream=1)
    assert len(shards.shard_paths(tmp_path)) == 4 and len(shards.shard_paths(tmp_path, 0)) == 3
    reader = RowReader(tmp_path, ["0.values", "0.scales"])
    for read in (reader, pickle.loads(pickle.dumps(reader))):  # as it goes to a worker that is not forked
        for numbers in ([7, 1, 5, 5, 2], [3]):
            columns = read(batch(*numbers))
            assert sorted(columns) == ["0.scales", "0.values"]
            for name, values in columns.items():
                assert torch.equal(values, torch.stack([states(n)[name] for n in numbers]))


def test_what_is_written_is_plain_safetensors_with_each_row_once(tmp_path):
    writer = write(tmp_path, [1, 2, 1, 1, 3])
    assert writer.new_rows(shards.row_keys(batch(3, 4))) == [1]
    first, second = map(load_file, shards.shard_paths(tmp_path))
    assert torch.equal(first["0.values"], torch.stack([states(n)["0.values"] for n in (1, 2)]))
    assert first["keys"].shape == (2, KEY_BYTES) and second["keys"].shape == (1, KEY_BYTES)


def test_rows_that_are_not_there_are_named_and_nothing_is_returned_for_them(tmp_path):
    write(tmp_path, [1, 2, 3])
    for folder, numbers, missing in ((tmp_path, [3, 9, 1, 8], [0, 1, 0, 1]), (tmp_path / "none", [1], [1])):
        read = RowReader(folder, ["0.values"])(batch(*numbers))
        assert list(read) == [MISSING] and read[MISSING].tolist() == missing


def test_what_an_interrupted_writer_has_left_is_what_a_whole_one_writes(tmp_path):
    def contents():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write(tmp_path, range(1, 8))
    whole = contents()
    assert len(whole) == 4
    shards.shard_paths(tmp_path)[1].unlink()  # one in the middle
    write(tmp_path, range(1, 8))
    assert contents() == whole
    for path in tmp_path.iterdir():
        path.unlink()
    write(tmp_path, range(1, 6), finish=False)  # 5 is lost
    assert len(contents()) == 2
    write(tmp_path, range(1, 8))
    assert contents() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:8] + b"{" * 20 + content[28:],
        lambda content: content.replace(b'"keys"', b'"kexs"'),
    ],
)
def test_damage_is_one_clear_error(tmp_path, damage):
    write(tmp_path, [1, 2])
    with pytest.raises(ConfigError, match=r"safetensors has no 1\.values"):
        RowReader(tmp_path, ["0.values", "1.values"])
    (path,) = shards.shard_paths(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    for use in (lambda: RowReader(tmp_path, ["0.values"]), lambda: ShardWriter(tmp_path, 0, 2)):
        with pytest.raises(ConfigError, match=r"let.teacher.features = .*rows-00000-000000.safetensors is damaged \("):
            use()
