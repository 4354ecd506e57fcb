"""Text as it may be shown: whole characters, stop texts never seen, nothing lost."""

import random

import pytest

from infer.text import TextStream


class Letters:
    """A tokenizer whose ids are the bytes of the text."""

    vocab_size, bos_id, eos_id, leading_space = 256, 0, 0, False

    def token_bytes(self, token_id):
        return bytes([token_id])


def shown(text, stops, step=1):
    stream = TextStream(Letters(), [], stops)
    ids = text.encode()
    pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    return stream, [*pieces, stream.flush()]


@pytest.mark.parametrize("step", [1, 3, 100])
def test_text_ends_before_the_first_stop_text(step):
    stream, pieces = shown("one two STOP three", ["STOP", "three"], step)
    assert "".join(pieces) == stream.text == "one two "
    assert stream.stopped
    assert bytes(stream.tokens).decode() == "one two STOP"


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_clear():
    _, pieces = shown("ab abc", ["abc"])
    assert pieces == ["", "", "ab ", "", "", "", ""]
    _, pieces = shown("ab abd", ["abc"])
    assert pieces == ["", "", "ab ", "", "", "abd", ""]


def test_what_was_held_back_is_shown_at_the_end():
    stream, pieces = shown("an end", ["end."])
    assert "".join(pieces) == "an end"
    assert pieces[-1] == "end"
    assert not stream.stopped


def test_the_earliest_of_overlapping_stop_texts_counts():
    assert shown("xaab", ["ab", "aab"])[0].text == "x"
    assert shown("aaab", ["aab"])[0].text == "a"


def test_characters_of_several_tokens_appear_whole():
    _, pieces = shown("né🦙!", [])
    assert [piece for piece in pieces if piece] == ["n", "é", "🦙", "!"]


def test_any_text_and_stops_agree_with_a_search_in_the_whole_text():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("abé") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("abé") for _ in range(rng.randrange(1, 4))) for _ in range(2)]
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        # The stop text that is complete first decides; of those complete at once, the longest.
        seen = text[: min(ends)] if ends else text
        expected = min((seen[: -len(s)] for s in stops if seen.endswith(s)), key=len, default=seen)
        assert shown(text, stops)[0].text == (expected if ends else text), (text, stops)
