"""Centres as they are stored."""

from __future__ import annotations

import numpy as np

from rotquant_tvm.formats.centre import centre_words, decode_centre, encode_centre


def test_a_centre_comes_back_within_half_a_step():
    mean = np.random.default_rng(1).standard_normal((3, 5, 80)) * 7
    words = encode_centre(mean)
    assert words.dtype == np.uint32 and words.shape == (3, 5, centre_words(80)) == (3, 5, 21)
    step = np.abs(mean).max(-1, keepdims=True) / 127
    assert (np.abs(decode_centre(words) - mean) <= step * (0.5 + 1e-5)).all()


def test_bytes_stand_in_order():
    mean = np.zeros(32, np.float32)
    mean[:6] = 127, -1, 2, -127, 64, 0
    words = encode_centre(mean)
    assert words[0] == 0x8102FF7F and words[1] == 64 and words[-1] == np.float32(1).view(np.uint32)


def test_zero():
    assert not decode_centre(encode_centre(np.zeros((2, 64)))).any()
