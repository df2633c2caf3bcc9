"""Generation end to end over the compiled fake model, against greedy decoding in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.errors import KVCacheFull, UsageError
from rotquant_tvm.runtime import CompiledLibrary, TokenizerSpec, load_library
from rotquant_tvm.runtime.generation import GenerationConfig


@pytest.fixture(scope="module")
def library_with_eos(write, tmp_path_factory, fake_model):
    """A library whose EOS is the sixth or a later new token after "hello", the first that is new."""
    greedy = fake_model.reference_greedy(b"hello", 40)
    end = next(index for index in range(5, 40) if greedy[index] not in greedy[:index])
    path = tmp_path_factory.mktemp("eos") / "model.rq"
    return load_library(write(path, tokenizer=TokenizerSpec((greedy[end], 257), 258))), greedy[: end + 1]


def text_of(ids) -> str:
    return bytes(ids).decode()


def test_greedy_text_is_the_models(library, fake_model):
    session = library.session()
    result = session.generate("hello", 20)
    expected = fake_model.reference_greedy(b"hello", 20)
    assert list(result.ids) == expected and result.text == text_of(expected)
    assert result.prompt_ids == tuple(b"hello") and result.finish_reason == "length"
    assert session.lengths.tolist() == [5 + 19]  # the last token has not been fed
    assert session.generate(list(b"hello"), 20) == result  # the cache is reset by default


def test_several_prompts_at_once_equal_one_by_one(library, fake_model):
    prompts = ["a", "hello there", "xy" * 40]
    session = library.session()
    results = session.generate(prompts, 30)
    assert session.batch == 3
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.ids) == fake_model.reference_greedy(prompt.encode(), 30)
    assert session.lengths.tolist() == [len(prompt) + 29 for prompt in prompts]
    assert session.generate(prompts[1], 30) == results[1] and session.batch == 1
    assert session.generate([prompts[1]], 30) == [results[1]]


def test_sampled_text_does_not_depend_on_the_neighbours(library):
    session = library.session()
    together = session.generate(["a", "b"], 30, temperature=6.0, top_p=0.9, seed=5)
    assert session.generate("a", 30, temperature=6.0, top_p=0.9, seed=5) == together[0]
    assert session.generate("a", 30, temperature=6.0, top_p=0.9, seed=6) != together[0]
    greedy = session.generate("a", 30)
    assert greedy != together[0]
    assert session.generate("a", 30, temperature=6.0, top_p=1e-9) == greedy


def test_eos_ends_a_row_while_others_go_on(library_with_eos, fake_model):
    library, greedy = library_with_eos
    session = library.session(capacity=64)
    one, other = session.generate(["hello", "x"], 40)
    assert one.finish_reason == "eos" and list(one.ids) == greedy
    assert one.text == text_of(greedy[:-1])
    end = other.ids.index(greedy[-1]) + 1 if greedy[-1] in other.ids else 40
    assert list(other.ids) == fake_model.reference_greedy(b"x", end)
    assert (
        session.lengths.tolist()
        == [5 + len(greedy) - 1, 1 + end - 1]
        == session.cache.device_lengths().tolist()
    )
    held = [*b"hello", *greedy[:-1]]
    logits = session.decode([greedy[-1], 9])
    np.testing.assert_array_equal(logits[0], fake_model.reference_logits([*held, greedy[-1]]))


def test_rows_that_fill_the_cache_end_while_others_go_on(library, fake_model):
    session = library.session(batch=2, capacity=32)
    results = session.generate(["a" * 30, "b"], max_tokens=None)
    assert [len(result.ids) for result in results] == [3, 32]
    assert [result.finish_reason for result in results] == ["length", "length"]
    assert list(results[0].ids) == fake_model.reference_greedy(b"a" * 30, 3)
    assert list(results[1].ids) == fake_model.reference_greedy(b"b", 32)
    assert session.lengths.tolist() == [32, 32]
    session.crop([31, 32])
    seen = session.decode([7, 0], active=[True, False])[0]
    held = [*b"a" * 30, results[0].ids[0], 7]
    np.testing.assert_array_equal(seen, fake_model.reference_logits(held))


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_stop_strings_end_the_text_across_tokens(library, fake_model, length):
    greedy = text_of(fake_model.reference_greedy(b"hello", 60))
    stop = greedy[20 : 20 + length]
    expected = greedy[: greedy.index(stop)]
    chunks = []
    session = library.session()
    result = session.generate("hello", 60, stop=[stop, "\x00never"], stream=chunks.append)
    assert result.text == expected and result.finish_reason == "stop"
    assert text_of(result.ids) == expected + stop  # one byte per token: it ended with the string complete
    assert "".join(chunk.text for chunk in chunks) == expected
    assert session.lengths.tolist() == [5 + len(result.ids) - 1]
    assert session.generate("hello", 60, stop=stop) == result


def test_the_beginning_of_a_stop_string_is_shown_when_the_end_comes_first(library, fake_model):
    greedy = text_of(fake_model.reference_greedy(b"hello", 10))
    result = library.session().generate("hello", 10, stop=greedy[-2:] + "\x00")
    assert result.text == greedy and result.finish_reason == "length"


def test_stream_gives_every_token_once(library):
    session = library.session()
    expected = session.generate(["a", "bcd"], 12)
    stream = session.stream(["a", "bcd"], 12)
    with pytest.raises(UsageError, match="not ended"):
        _ = stream.results
    chunks = list(stream)
    assert stream.results == expected
    for index, result in enumerate(expected):
        mine = [chunk for chunk in chunks if chunk.sequence == index]
        assert [chunk.token for chunk in mine] == list(result.ids)
        assert "".join(chunk.text for chunk in mine) == result.text
        assert [chunk.finish_reason for chunk in mine] == [None] * 11 + ["length"]
    called = []
    assert session.generate(["a", "bcd"], 12, stream=called.append) == expected
    assert called == chunks


def test_hot_streams_show_whole_characters_only(library):
    # At this temperature all bytes are equally likely: mostly invalid UTF-8 and special tokens.
    for seed in range(5):
        stream = library.session().stream("é", 100, temperature=1e9, seed=seed)
        text = "".join(chunk.text for chunk in stream)
        assert text == stream.results[0].text
        text.encode()


def test_a_stream_left_early_leaves_a_usable_session(library, fake_model):
    session = library.session()
    stream = session.stream("hello", 50)
    taken = [next(stream).token for _ in range(4)]
    assert session.lengths.tolist() == [5 + 3]
    logits = session.decode([taken[-1]])
    np.testing.assert_array_equal(logits[0], fake_model.reference_logits([*b"hello", *taken]))


def test_a_conversation_goes_on_without_reset(library, fake_model):
    session = library.session()
    first = session.generate("hello", 5)
    second = session.generate([first.ids[-1], 65, 66], 5, reset=False)
    held = [*b"hello", *first.ids, 65, 66]
    assert list(second.ids) == fake_model.reference_greedy(held, 5)
    with pytest.raises(UsageError, match="2 prompts cannot continue the 1"):
        session.generate(["a", "b"], 5, reset=False)


def test_chat_goes_through_the_template(library, fake_model):
    session = library.session()
    ids = [256, *b"user\nhi", 257, *b"\n", 256, *b"assistant\n"]
    messages = [{"role": "user", "content": "hi"}]
    result = session.generate("hi", 5, chat=True)
    assert result.prompt_ids == tuple(ids)
    assert list(result.ids) == fake_model.reference_greedy(ids, 5)
    assert session.generate(max_tokens=5, chat=messages) == result
    assert session.generate(max_tokens=5, chat=[messages, messages]) == [result, result]
    assert session.generate(["hi", "hi"], 5, chat=True) == [result, result]


def test_what_does_not_fit_is_refused_before_anything_runs(library):
    session = library.session(batch=2, capacity=32)
    session.prefill([[1, 2], [3]])
    with pytest.raises(KVCacheFull) as full:
        session.generate("hello", 29)
    assert full.value.needed == 33
    with pytest.raises(KVCacheFull):
        session.stream([[1] * 31, [1]], 2, reset=False)
    with pytest.raises(KVCacheFull):
        session.generate("a" * 33, max_tokens=None)
    assert session.lengths.tolist() == [2, 1] and session.batch == 2
    assert len(session.generate("hello", 28).ids) == 28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "stop": ""}, "stop string"),
        ({"prompt": None}, "give a prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": [[1], []]}, "prompt 1 is empty"),
        ({"prompt": [1, 260]}, "token id 260"),
        ({"prompt": [[1, 2], "b"]}, "integers"),
        ({"prompt": 7}, "prompt 7: expected a text"),
        ({"prompt": b"a"}, "expected a text"),
        ({"prompt": [[[1]]]}, "flat"),
        ({"prompt": [1, 2], "chat": True}, "text, not token ids"),
        ({"prompt": "a", "chat": [{"role": "user", "content": "x"}]}, "not both"),
        ({"chat": []}, "list of messages"),
        ({"chat": "hello"}, "list of messages"),
        ({"chat": [{"content": "x"}]}, "message 0"),
    ],
)
def test_bad_arguments_are_refused(library, arguments, message):
    session = library.session()
    session.prefill([1, 2])
    with pytest.raises(UsageError, match=message):
        session.generate(**arguments)
    assert session.lengths.tolist() == [2]


def test_ids_work_without_a_tokenizer_and_text_says_what_is_missing(library, write, tmp_path, fake_model):
    eos = fake_model.reference_greedy([1, 2], 3)[2]
    path = write(tmp_path / "bare.rq", tokenizer_json=None, tokenizer=TokenizerSpec((eos,)))
    bare = load_library(path)
    assert bare.tokenizer is None
    result = bare.session().generate(np.array([1, 2]), 10)
    assert result.ids[-1] == eos and result.finish_reason == "eos" and result.text == ""
    for arguments in ({"prompt": "a"}, {"prompt": [1], "stop": "x"}, {"chat": [{"role": "user"}]}):
        with pytest.raises(UsageError, match="tokenizer"):
            bare.session().generate(**arguments)


def test_chat_without_a_template_is_refused(write, tmp_path):
    library = load_library(write(tmp_path / "plain.rq", tokenizer=TokenizerSpec((257,), 258)))
    with pytest.raises(UsageError, match="no chat template"):
        library.session().generate("hi", chat=True)


def test_an_empty_prompt_starts_from_the_bos_token(library, fake_model):
    result = library.session().generate("", 4)
    assert result.prompt_ids == (258,) and list(result.ids) == fake_model.reference_greedy([258], 4)


def test_config_checks_itself():
    with pytest.raises(UsageError, match="max_tokens"):
        GenerationConfig(max_tokens=-1)
    with pytest.raises(UsageError, match="stop string"):
        GenerationConfig(stop=("",))


def test_a_library_fresh_from_the_compiler_needs_no_artifact(fake_model):
    import tvm

    library = CompiledLibrary(fake_model.compile_library().jit(), fake_model.weights().values(), tvm.cpu())
    result = library.session(capacity=64).generate([1, 2], 5)
    assert list(result.ids) == fake_model.reference_greedy([1, 2], 5)
