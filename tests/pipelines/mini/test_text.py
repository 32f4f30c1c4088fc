import numpy as np

from dit_accel.pipelines.mini.captions import caption
from dit_accel.pipelines.mini.text import MAX_LENGTH, build_tokenizer
from dit_accel.pipelines.mini.world import random_scene


def test_every_caption_fits_without_unknown_words():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    ids = tokenizer([caption(random_scene(rng), rng) for _ in range(300)]).input_ids
    assert max(map(len, ids)) <= MAX_LENGTH
    assert all(tokenizer.unk_token_id not in row for row in ids)


def test_two_builds_give_the_same_ids_and_case_does_not_matter():
    text = "A Red circle, moves LEFT"
    assert build_tokenizer()(text).input_ids == build_tokenizer()(text.lower()).input_ids


def test_unknown_words_and_the_end_are_marked():
    tokenizer = build_tokenizer()
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
