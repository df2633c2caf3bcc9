import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.formats import HEAD_DIMS, KVFormat, known_formats, parse_pair, rotation_families

NAMES = sorted({kv_format.name for kv_format in known_formats().values()})


WITHOUT_RULES = ("half", "bfloat16", "linear", "sign")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["", ":raw", ":norm", ":mse", ":ip"])
def test_a_name_reads_back_as_its_format(name, suffix):
    if suffix and KVFormat.parse(name).codebook in WITHOUT_RULES and f"{name}{suffix}" != "qjl1:raw":
        message = f"unknown gain rule '{suffix[1:]}'; {re.escape(name)} takes none"
        with pytest.raises(FormatError, match=message):
            KVFormat.parse(name + suffix)
        return
    found = KVFormat.parse(name + suffix)
    assert KVFormat.parse(found.name) == found == KVFormat.parse(f"  {found.name.upper()} ")
    assert str(found) == found.name
    assert found.gain == (suffix[1:] or KVFormat.parse(name).gain)


@pytest.mark.parametrize(
    ("text", "rotation", "codebook", "bits", "gain"),
    [
        ("f16", "none", "half", 16, "none"),
        ("bf16", "none", "bfloat16", 16, "none"),
        ("q8_0", "none", "linear", 8, "block"),
        ("q4_0", "none", "linear", 4, "block"),
        ("turbo2.5", "turbo", "split", 2, "norm"),
        ("turbo3.5:mse", "turbo", "split", 3, "mse"),
        ("turbo3+qjl", "turbo", "sketched", 2, "raw"),
        ("dense2+qjl:mse", "dense", "sketched", 1, "mse"),
        ("qjl1", "gaussian", "sign", 1, "raw"),
        ("planar3", "planar", "lloyd", 3, "norm"),
        ("iso3", "iso", "lloyd", 3, "norm"),
        ("iso3-full", "iso-full", "lloyd", 3, "norm"),
        ("rotor2", "rotor", "lloyd", 2, "raw"),
        ("turbo4", "turbo", "lloyd", 4, "norm"),
        ("dense1", "dense", "lloyd", 1, "raw"),
        ("hurwitz3", "hurwitz", "lloyd", 3, "mse"),
        ("turbo3:ip", "turbo", "lloyd", 3, "ip"),
    ],
)
def test_spellings(text, rotation, codebook, bits, gain):
    found = KVFormat.parse(text)
    assert (found.name, found.rotation, found.codebook) == (text, rotation, codebook)
    assert (found.bits, found.gain) == (bits, gain)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("iso3-2d", "planar3"), ("iso1-2d", "planar1"), ("rq2", "hurwitz2+tcq"), ("rq4", "hurwitz4")],
)
def test_aliases_are_the_same_format(alias, name):
    assert KVFormat.parse(alias) == KVFormat.parse(name)
    assert KVFormat.parse(f"{name}:{KVFormat.parse(name).gain}") == KVFormat.parse(name)


def test_every_family_with_a_spelling_has_all_bit_widths():
    for family in rotation_families().values():
        for bits in (1, 2, 3, 4):
            if family.spelling:
                assert KVFormat.parse(family.spelling.format(bits=bits)).rotation == family.name


@given(st.text(max_size=12) | st.sampled_from(NAMES).map(lambda name: name[:-1]))
def test_any_other_text_is_refused(text):
    try:
        found = KVFormat.parse(text)
    except FormatError as error:
        assert text in str(error) and "Known: f16, bf16, q8_0" in str(error)
    else:
        assert KVFormat.parse(found.name) == found


@pytest.mark.parametrize(
    ("text", "near"),
    [("palnar3", "planar3"), ("q8_1", "q8_0"), ("fp16", "f16"), ("iso5", "iso"), ("hurwits3", "hurwitz3")],
)
def test_unknown_words_list_near_spellings(text, near):
    with pytest.raises(FormatError, match=f"unknown KV format '{text}'; did you mean .*{near}"):
        KVFormat.parse(text)


@pytest.mark.parametrize(
    ("text", "remedy"), [("turbo3+qjl", "turbo3:ip"), ("dense2+qjl:mse", "dense2:ip"), ("qjl1", "turbo1:ip")]
)
def test_sketches_are_refused_in_a_cache(text, remedy):
    for pair in (text, f"{text}/f16", f"f16/{text}"):
        with pytest.raises(FormatError, match=rf"{re.escape(text)} is a format for search.*use {remedy}"):
            parse_pair(pair)
    assert KVFormat.parse(remedy).bits_per_element(64) <= KVFormat.parse(text).bits_per_element(64)


def test_pairs():
    assert [found.name for found in parse_pair("q8_0/q4_0")] == ["q8_0", "q4_0"]
    assert parse_pair("turbo2.5/turbo3.5")[1].bits == 3
    assert parse_pair("iso3/planar3") == (KVFormat.parse("iso3"), KVFormat.parse("planar3"))
    assert parse_pair("q8_0") == (KVFormat.parse("q8_0"),) * 2
    assert parse_pair("turbo3:mse/f16")[0].gain == "mse"
    with pytest.raises(FormatError, match="names 3 formats"):
        parse_pair("f16/f16/f16")
    for bad in ("", "/", "iso3/", "/iso3"):
        with pytest.raises(FormatError, match="unknown KV format ''"):
            parse_pair(bad)


@pytest.mark.parametrize(
    ("text", "head_dim", "bits"),
    [
        ("f16", 128, 16.0),
        ("bf16", 80, 16.0),
        ("q8_0", 128, 8.5),
        ("q8_0", 80, 8.6),
        ("rq2", 128, 2.125),
        ("rq3", 128, 3.125),
        ("rq4", 128, 4.125),
        ("iso3", 64, 3.25),
        ("turbo3", 256, 3.0625),
        ("q4_0", 128, 4.5),
        ("q4_0", 80, 4.6),
        ("turbo2.5", 128, 2.625),
        ("turbo3.5", 64, 3.75),
        ("turbo3+qjl", 128, 3.25),
        ("turbo2+qjl", 64, 2.5),
        ("qjl1", 128, 1.125),
    ],
)
def test_true_bits_per_element(text, head_dim, bits):
    assert KVFormat.parse(text).bits_per_element(head_dim) == pytest.approx(bits)


@pytest.mark.parametrize("name", NAMES)
def test_check_takes_exactly_the_head_dims_that_a_codec_takes(name):
    kv_format = KVFormat.parse(name)
    for head_dim in (*range(0, 300, 8), 504, 512, 520, 1024):
        power = head_dim & (head_dim - 1) == 0
        fits = head_dim % 32 == 0 or kv_format.codebook != "split"
        fits = fits and (head_dim <= 256 or kv_format.codebook != "trellis")
        if head_dim in HEAD_DIMS and fits and (power or kv_format.rotation != "turbo"):
            kv_format.check(head_dim)
        else:
            with pytest.raises(FormatError, match=f"{re.escape(name)} cannot take head_dim {head_dim}"):
                kv_format.check(head_dim)
            with pytest.raises(UsageError):
                kv_format.codec(head_dim)


@pytest.mark.parametrize(
    ("text", "head_dim", "remedy"),
    [
        ("turbo3", 96, "use hurwitz or dense"),
        ("rq3", 72, "no format takes another"),
        ("f16", 24, "no format takes another"),
        ("iso3", 320, "no format takes another"),
        ("rq2:ip", 512, "trellises take 256 at most; use hurwitz2:ip"),
        ("dense2.5", 80, "half of it must be a multiple of 16; use dense2 or dense3"),
    ],
)
def test_refusals_say_what_to_use(text, head_dim, remedy):
    with pytest.raises(FormatError, match=remedy):
        KVFormat.parse(text).check(head_dim)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("x", "iso", "vector", 3, "raw"), "unknown codebook 'vector'"),
        (("x", "iso", "lloyd", 5, "raw"), "lloyd codebooks have 1, 2, 3, 4 bits, not 5"),
        (("x", "none", "half", 8, "none"), "half codebooks have 16 bits"),
        (("x", "iso", "lloyd", 3, "block"), "take gain raw, norm, mse, ip, not 'block'"),
        (("x", "none", "linear", 8, "raw"), "take gain block, not 'raw'"),
        (("x", "iso", "half", 16, "none"), "take no rotation"),
        (("x", "spin", "lloyd", 3, "raw"), "unknown rotation 'spin'"),
        (("x", "gaussian", "lloyd", 1, "raw"), "unknown rotation 'gaussian'"),
        (("x", "dense", "sign", 1, "raw"), "take the rotation 'gaussian', not 'dense'"),
        (("x", "turbo", "sketched", 4, "raw"), "sketched codebooks have 1, 2, 3 bits, not 4"),
        (("x", "turbo", "split", 1, "raw"), "split codebooks have 2, 3 bits, not 1"),
    ],
)
def test_combinations_that_do_not_exist(fields, message):
    with pytest.raises(FormatError, match=message):
        KVFormat(*fields)
