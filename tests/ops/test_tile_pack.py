"""Tile packing, word by word: every bit of every code has one place, that of the documented layout."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.formats import HEAD_DIMS, code_pieces
from rotquant_tvm.ops.tile_access import CodeSection
from rotquant_tvm.ops.tile_pack import PERIOD, half_word_pieces, position, tail_pieces, word_pieces


def written_bits(section: CodeSection, lanes: list[int]):
    """What the packing writes for some lanes: (token, dim, bit of the code, bit of the section)."""
    words, groups = PERIOD[section.bits]
    periods = section.words // words

    def bits(pieces, first_group, lane, base):
        for piece in pieces:
            for half in range(piece.halves[0], sum(piece.halves)):
                for e in range(piece.elements[0], sum(piece.elements)):
                    token, dim = position(section, first_group + piece.group, half, e, lane)
                    for bit in range(piece.width):
                        yield token, dim, piece.code_bit + bit, base + piece.place(half, e) + bit

    for lane in lanes:
        for word in range(periods * words):
            base = 32 * section.word_index(word, lane)
            yield from bits(word_pieces(section.bits, word % words), word // words * groups, lane, base)
        if half := half_word_pieces(section):
            index, shift = section.half_word_index(lane)
            yield from bits(half, periods * groups, lane, 32 * index + shift)
            if section.bits == 3:
                base = 32 * section.word_index(section.words - 1, lane)
                yield from bits(tail_pieces(2, 2), periods * groups, lane, base)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("role", ["k", "v"])
def test_words_hold_what_the_layout_says(role, bits):
    for head_dim in (*HEAD_DIMS[:6], 128, 240, 256):
        section = CodeSection(role, bits, head_dim, 0)
        token, dim, bit, place = np.array(list(written_bits(section, [0, 13, 31]))).T
        np.testing.assert_array_equal(code_pieces(role, bits, head_dim)[token, dim, bit], place)
        assert len(set(place)) == len(place) == 3 * head_dim * bits


@pytest.mark.parametrize("role", ["k", "v"])
def test_position_inverts_element(role):
    section = CodeSection(role, 3, 80, 0)
    for token in range(32):
        for dim in range(80):
            assert position(section, *section.element(token, dim)) == (token, dim)
