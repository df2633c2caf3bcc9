"""The compiled codec: NumPy's results on NumPy, torch and TVM tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi

from rotquant_tvm.errors import UsageError
from rotquant_tvm.formats import EncodedKV

from .reference import check_encoding, codec_of

CODECS = [("f16", 64), ("bf16", 96), ("q8_0", 80), ("iso3", 64), ("rotor2:mse", 80), ("turbo4", 128)]
CODECS += [("rq3", 128)]
KINDS = ("numpy", "torch", "tvm")


@pytest.fixture(scope="module")
def compiled(kernels):
    """``codec_of(...)`` compiled for the target, once each."""
    known = {}

    def get(text="rq3", head_dim=128):
        if (text, head_dim) not in known:
            known[text, head_dim] = codec_of(text, head_dim).compile(kernels.target)
        return known[text, head_dim]

    return get


def make(kind, x, kernels):
    """A NumPy array as a tensor of a kind, on the target's device."""
    if kind == "numpy":
        return x
    return torch.tensor(x, device=str(kernels.device)) if kind == "torch" else kernels.tensor(x)


def numpy(x):
    """Any kind's values."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy() if isinstance(x, torch.Tensor) else x.numpy()


def check_kind(kind, x):
    assert isinstance(x, {"numpy": np.ndarray, "torch": torch.Tensor, "tvm": tvm.runtime.Tensor}[kind])


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kernels, compiled, rng, kind, text, head_dim):
    codec, fast = codec_of(text, head_dim), compiled(text, head_dim)
    x = rng.standard_normal((3, 1, 7, head_dim)).astype(np.float32)
    encoded = fast.encode(make(kind, x, kernels))
    check_kind(kind, encoded.codes)
    check_kind(kind, encoded.gain)
    found = EncodedKV(numpy(encoded.codes), numpy(encoded.gain))
    assert found.gain.shape == (3, 1, 7, codec.gains_per_vector)
    check_encoding(codec, x, found)
    decoded = fast.decode(encoded)
    check_kind(kind, decoded)
    assert numpy(decoded).dtype == np.float32
    np.testing.assert_allclose(numpy(decoded), codec.decode(found), atol=2e-6)


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
def test_distortion_is_numpys(compiled, rng, text, head_dim):
    codec, fast = codec_of(text, head_dim), compiled(text, head_dim)
    x = rng.standard_normal((2000, head_dim)).astype(np.float32)
    expected = ((x - codec.decode(codec.encode(x))) ** 2).sum()
    assert ((x - fast.decode(fast.encode(x))) ** 2).sum() == pytest.approx(expected, rel=1e-3)
    assert ((x - fast.roundtrip(x)) ** 2).sum() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rotations_keep_kind_shape_and_dtype(kernels, compiled, rng, kind, dtype):
    codec, fast = codec_of("rq3", 128), compiled()
    x = rng.standard_normal((2, 3, 128)).astype(dtype)
    y = fast.rotate(make(kind, x, kernels))
    back = fast.unrotate(y)
    check_kind(kind, back)
    assert numpy(y).dtype == dtype and numpy(y).shape == x.shape
    atol = 5e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(numpy(y), codec.rotate(x), atol=atol)
    np.testing.assert_allclose(numpy(back), x, atol=atol)
    assert numpy(fast.roundtrip(make(kind, x, kernels))).dtype == dtype


@pytest.mark.parametrize("shape", [(128,), (0, 128), (2, 0, 128), (1, 2, 1, 2, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape(kernels, compiled, rng, kind, shape):
    fast = compiled()
    x = rng.standard_normal(shape).astype(np.float32)
    encoded = fast.encode(make(kind, x, kernels))
    assert tuple(encoded.codes.shape) == shape and tuple(encoded.gain.shape) == (*shape[:-1], 1)
    assert tuple(fast.decode(encoded).shape) == shape
    for operation in (fast.rotate, fast.unrotate, fast.roundtrip):
        assert tuple(operation(make(kind, x, kernels)).shape) == shape


def test_a_contiguous_tensor_is_read_in_place(compiled, rng):
    """What a kernel gets is the caller's memory, also where it does not begin at a multiple of 64 bytes."""
    from rotquant_tvm.ops.tensor_kinds import kind_of

    for x in (rng.standard_normal(1025).astype(np.float32)[1:], torch.randn(1025)[1:]):
        kind, x = kind_of(x, tvm.cpu())
        assert np.shares_memory(numpy(kind.argument(x, (8, 128))), numpy(x))


def test_non_contiguous_and_read_only_tensors(kernels, compiled, rng):
    fast = compiled()
    x = rng.standard_normal((128, 6)).astype(np.float32)
    expected = numpy(fast.encode(np.ascontiguousarray(x.T)).codes)
    np.testing.assert_array_equal(fast.encode(x.T).codes, expected)
    np.testing.assert_array_equal(numpy(fast.encode(make("torch", x, kernels).T).codes), expected)
    offset = np.concatenate([[0], x.T.ravel()]).astype(np.float32)[1:].reshape(6, 128)
    np.testing.assert_array_equal(fast.encode(offset).codes, expected)
    frozen = np.ascontiguousarray(x.T)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(fast.encode(frozen).codes, expected)


def test_a_strided_tvm_tensor(kernels, compiled, rng):
    fast = compiled()
    x = rng.standard_normal((128, 6)).astype(np.float32)
    strided = tvm_ffi.from_dlpack(make("torch", x, kernels).T)
    assert not strided.is_contiguous()
    if kernels.kind == "llvm":
        np.testing.assert_array_equal(fast.encode(strided).codes.numpy(), fast.encode(x.T).codes)
    else:
        with pytest.raises(UsageError, match="must be contiguous; pass a contiguous copy"):
            fast.encode(strided)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.float16])
def test_other_numbers_are_converted(compiled, rng, dtype):
    codec, fast = codec_of("rq3", 128), compiled()
    x = (8 * rng.standard_normal((5, 128))).astype(dtype)
    check_encoding(codec, x.astype(np.float32), fast.encode(x))
    check_encoding(codec, x.astype(np.float32), fast.encode(x.tolist()))


def test_torch_bfloat16_and_gradients(kernels, compiled):
    fast = compiled()
    x = torch.randn(5, 128, dtype=torch.bfloat16, device=str(kernels.device), requires_grad=True)
    y = fast.rotate(x)
    assert y.dtype == torch.float32 and not y.requires_grad and y.device.type == x.device.type
    expected = codec_of("rq3", 128).rotate(x.detach().float().cpu().numpy())
    np.testing.assert_allclose(y.cpu().numpy(), expected, atol=5e-6)


def test_awkward_values_have_the_defined_results(compiled):
    codec, fast = codec_of("rq3", 128), compiled()
    x = np.random.default_rng(0).standard_normal((6, 128))
    x[1], x[2], x[3, 4], x[4], x[5, 0] = 0, np.nan, np.inf, 1e300, -np.inf
    check_encoding(codec, x, fast.encode(x), ties=True)


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16"), torch.float16])
def test_decoding_to_half_precision(compiled, rng, dtype):
    fast = compiled()
    encoded = fast.encode(rng.standard_normal((4, 128)).astype(np.float32))
    half = fast.decode(encoded, dtype)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, fast.decode(encoded), rtol=1e-3, atol=1e-5)


def test_refusals(kernels, compiled):
    fast = compiled()
    for method in (fast.encode, fast.rotate, fast.unrotate, fast.roundtrip):
        for x in (np.zeros((2, 64)), torch.zeros(2, 64, device=str(kernels.device)), np.float32(3)):
            with pytest.raises(UsageError, match=r"x has shape .*its last axis must be head_dim 128"):
                method(x)
    codes, gain = np.zeros((2, 128), np.uint8), np.zeros((2, 1), np.float16)
    with pytest.raises(UsageError, match=r"codes are uint8 \[2, 64\]; they must be uint8 \[2, 128\]"):
        fast.decode(EncodedKV(codes[:, :64], gain))
    with pytest.raises(UsageError, match=r"codes are int64 .* must be uint8"):
        fast.decode(EncodedKV(codes.astype(np.int64), gain))
    with pytest.raises(UsageError, match=r"gains are float16 \[1, 1\]; they must be float16 \[2, 1\]"):
        fast.decode(EncodedKV(codes, gain[:1]))
    with pytest.raises(UsageError, match="cannot decode to float64; use float32 or float16"):
        fast.decode(EncodedKV(codes, gain), "float64")
    with pytest.raises(UsageError, match="TVM tensor of int32 cannot be converted"):
        fast.rotate(kernels.tensor(np.zeros((2, 128), np.int32)))
    with pytest.raises(UsageError, match="opencl"):
        codec_of("rq3", 128).compile("opencl")


def test_a_tensor_on_another_device_is_refused(compiled):
    x = torch.empty(2, 128, device="meta" if compiled().target.kind.name == "llvm" else "cpu")
    with pytest.raises(UsageError, match=r"the tensor is on .* and the codec was compiled for"):
        compiled().encode(x)


def test_it_describes_itself_as_the_codec_does(compiled):
    codec, fast = codec_of("rq3", 128), compiled()
    assert (fast.format, fast.head_dim, fast.bits_per_element) == (codec.format, 128, 3.125)
