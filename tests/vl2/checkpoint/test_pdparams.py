"""Foreign .pdparams: what paddle.save wrote is found, and nothing else is admitted, let alone run."""

import collections
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from tests.places import ROOT
from vl2.checkpoint.pdparams import locate_arrays, read_pdparams
from vl2.errors import UserError


@pytest.fixture
def state() -> dict:
    """A state dict in four types, with a scalar, an empty tensor and one of more than a frame of a pickle (64 kB)."""
    paddle.seed(0)
    weight = paddle.randn([300, 200])
    return {
        "layers.0.weight": weight,
        "layers.0.weight_bf16": weight.astype("bfloat16"),
        "layers.0.weight_fp16": weight.astype("float16"),
        "steps": paddle.to_tensor([3, -4]),
        "scalar": paddle.to_tensor(2.5),
        "名字": paddle.zeros([0, 7]),
        **{f"many.{i}": paddle.full([2], float(i)) for i in range(1100)},  # more than one batch of entries
    }


def assert_equal(path: Path, state: dict) -> None:
    found = read_pdparams(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        expected = tensor.numpy()
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape, name
        assert np.array_equal(found[name], expected), name


@pytest.mark.parametrize("protocol", [3, 4])
def test_what_paddle_saved_is_read(state, tmp_path, protocol):
    path = tmp_path / "model_state.pdparams"
    paddle.save(state, str(path), protocol=protocol)
    assert_equal(path, state)
    found = read_pdparams(path)
    assert found["layers.0.weight_bf16"].dtype == np.uint16
    again = paddle.to_tensor(found["layers.0.weight_bf16"])
    assert again.dtype == paddle.bfloat16 and bool((again == state["layers.0.weight_bf16"]).all())


def test_state_dict_of_a_layer(tmp_path):
    layer = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.LayerNorm(4))
    paddle.save(layer.state_dict(), str(tmp_path / "x.pdparams"))
    assert_equal(tmp_path / "x.pdparams", layer.state_dict())


def test_tensors_beside_other_arrays(tmp_path):
    """With numpy arrays among them paddle.save keeps each tensor as a pair of its automatic name and its array."""
    saved = {"tensor": paddle.ones([3]), "array": np.arange(4, dtype=np.float32), "same": paddle.zeros([1])}
    paddle.save(saved, str(tmp_path / "x"))
    assert b"tuple" in (tmp_path / "x").read_bytes()
    found = read_pdparams(tmp_path / "x")
    assert {name: array.tolist() for name, array in found.items()} == {
        "tensor": [1, 1, 1],
        "array": [0, 1, 2, 3],
        "same": [0],
    }


def test_arrays_are_located_without_being_read(state, tmp_path, monkeypatch):
    paddle.save(state, str(tmp_path / "x"))
    monkeypatch.setattr(np, "fromfile", lambda *a, **k: pytest.fail("it was read"))
    located = locate_arrays(tmp_path / "x")
    tensor = located["layers.0.weight_bf16"]
    assert (tensor.dtype, tensor.shape, tensor.num_bytes) == ("bfloat16", (300, 200), 120_000)
    content = (tmp_path / "x").read_bytes()[tensor.offset :][: tensor.num_bytes]
    assert content == state["layers.0.weight_bf16"].numpy().tobytes()


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("call", [os.system, eval, exec, os.mkdir, getattr, collections.OrderedDict, np.load])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(call, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = {os.system: "touch proof", os.mkdir: "proof"}.get(call, "__import__('os').mkdir('proof')")
    content = {"weight": np.ones(3, np.float32), "evil": Evil(call, text)}
    Path("x").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match=r"x: \w+\.\w+ at byte \d+ is no part .* nothing of it was run"):
        read_pdparams("x")
    assert not Path("proof").exists()
    if call in (os.system, os.mkdir):  # it would have
        pickle.loads(Path("x").read_bytes())
        assert Path("proof").exists()


def raw(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n" + NDARRAY + b"\x85R"  # to be filled


def filled(shape: bytes) -> bytes:
    """Fills an array of float32 with this shape and no bytes."""
    return b"(K\x01" + shape + DTYPE + b"\x8c\x02f4\x85R" + b"\x89" + b"C\x00" + b"tb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw(b"}", b"\x8c\x01a", NDARRAY, b"s"), "expected arrays by name, found a Name at 'a'"),
        (raw(b"cnumpy.core.multiarray\n_reconstruct\n", DTYPE, b"\x85R"), "a call of .*_reconstruct.* is no part"),
        (raw(NDARRAY, b"\x8c\x02f4\x85R"), "a call of .*ndarray.* is no part"),
        (raw(NDARRAY, b"}", b"b"), "a state at byte"),
        (raw(b"\x8c\x01aQ"), "instruction b'Q' at byte"),  # a persistent id
        (raw(b"ios\nsystem\n"), "instruction b'i' at byte"),  # the old way to call
        (raw(b"}", b"\x8c\x01a", b"K\x01", b"s"), "expected arrays by name, found a int at 'a'"),
        (raw(b"K\x05"), "expected a dictionary of arrays, found a int"),
        (raw(b"s"), "damaged at byte"),
        (raw(b"}", b"(\x8c\x01au"), "damaged at byte"),  # a name without a value
        (raw(b"}", b"K\x01K\x02s"), "damaged at byte .*a name that is no text"),
        (raw(ARRAY, b"K\x01\x85b"), "damaged at byte"),
        (raw(ARRAY, filled(b"K\x03")), r"damaged at byte .*a shape of 3"),
        (raw(ARRAY, filled(b"\x88\x85")), r"damaged at byte .*a shape of \(True,\)"),
        (raw(ARRAY, filled(b"(" + b"K\x01" * 33 + b"t")), r"damaged at byte .*a shape of \(1, 1, 1, 1, 1, 1, \.\.\.\)"),
        (raw(ARRAY, filled(b"\x8a\x09" + bytes(8) + b"\x01\x85")), r"a shape of \(18446744073709551616,\)"),
        (raw(b"}", b"\x8c\x03a\nb", b"K\x01", b"s"), r"found a int at 'a\\nb'$"),
        (raw(b")" + b"\x85" * 10_000, b")R"), r"a call of \(+\.\.\.\),.* at byte 10005 is no part"),
        (raw(b"h\x09"), "damaged at byte"),
        (b"\x80\x02}.", "expected a pickle of protocol 3 or 4"),
        (b"PK\x03\x04", "expected a pickle of protocol 3 or 4"),
        (b"\x80", "1 bytes, the file is truncated"),
    ],
)
def test_instructions_that_do_not_belong_there(content, message, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pdparams(tmp_path / "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}, []], object), "an array of objects at byte"),
        (np.ones(3, np.complex64), "a has numpy's type c8; expected one of f4, f2, u2, f8, i8"),
        (np.ones(3, ">f4"), "numbers in the byte order '>'"),
        (np.ones([3, 2], np.float32).T, r"the array of \[2, 3\] .* lies column by column .*ascontiguousarray"),
        ({"inner": np.ones(3)}, "expected arrays by name, found a dict at 'a'"),
        ("text", "expected arrays by name, found a str at 'a'"),
    ],
)
def test_values_that_are_no_plain_arrays(value, message, tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps({"a": value}, protocol=4))
    with pytest.raises(ValueError, match=message):
        read_pdparams(tmp_path / "x")


def test_truncated_file(state, tmp_path):
    paddle.save(state, str(tmp_path / "x"))
    whole = (tmp_path / "x").read_bytes()
    for length in (10, 500, 200_000, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged"):
            read_pdparams(tmp_path / "x")


def test_shape_that_its_bytes_do_not_fill(tmp_path):
    content = pickle.dumps({"a": np.zeros([77, 3], np.float32)}, protocol=4).replace(b"KMK\x03", b"KNK\x03")
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"a has 924 bytes, which do not fill \[78, 3\] of float32"):
        read_pdparams(tmp_path / "x")


@pytest.mark.slow
def test_names_nested_a_million_deep_do_not_end_the_process(tmp_path):
    """Python hashes a tuple's tuples without counting how deep it is: a file of 1 MB ended infer by a segmentation
    fault. In a process of its own, because that would end the tests too."""
    (tmp_path / "x").write_bytes(raw(b"}", b")" + b"\x85" * 1_000_000, b"K\x01s"))
    program = "import sys; from vl2.checkpoint.pdparams import locate_arrays; locate_arrays(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path / "x")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "damaged at byte 1000007 (a name that is no text)" in done.stderr


def test_more_instructions_than_a_model_takes(tmp_path, monkeypatch):
    """A gigabyte of one-byte instructions filled the memory for an hour before it was refused."""
    monkeypatch.setattr("vl2.checkpoint.pdparams._MAX_STEPS", 1000)
    (tmp_path / "x").write_bytes(raw(b"N" * 2000))
    with pytest.raises(UserError, match="over 1000 instructions, more than any model's weights take"):
        read_pdparams(tmp_path / "x")


@pytest.mark.parametrize("protocol", [3, 4])
def test_damaged_pickles_give_arrays_or_a_users_error(protocol, tmp_path):
    """Odd numbers of entries and states of four parts ended in tracebacks."""
    saved = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": ("generated_0", np.zeros(3, np.uint16))}
    whole, draw, path = pickle.dumps(saved, protocol=protocol), random.Random(11), tmp_path / "x"
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4, 8))):
            # Instructions that the reader knows bring it further than other bytes do.
            content[draw.randrange(2, len(whole))] = draw.choice((draw.randrange(256), *b"}])NK(\x85tsuaRbcXC\x94hq.e"))
        path.write_bytes(content)
        try:
            assert all(isinstance(array, np.ndarray) for array in read_pdparams(path).values())
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert 200 < refused < 400
