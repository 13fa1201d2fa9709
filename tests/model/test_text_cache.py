"""Cached prompts: the ledger's decisions, and a cache that follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos3_core.model.text_cache import TextCache
from cosmos3_core.model.towers import TextKV
from cosmos3_core.prompt_ledger import PromptLedger, PromptOrders, text_key

BYTES_PER_TOKEN = 8


def prefill(text_ids: Tensor) -> TextKV:
    zeros = (torch.zeros(len(text_ids), 1, 1),)
    return TextKV(keys=zeros, values=zeros)


def test_the_least_recently_used_prompt_leaves() -> None:
    cache, ledger = TextCache(prefill), PromptLedger(2 * BYTES_PER_TOKEN, BYTES_PER_TOKEN)
    num_prefills = []
    a, b, c = ((number,) for number in range(3))
    for text_ids in (a, b, a, c, a, b):
        cache.fetch([text_ids], ledger.admit([text_ids]))
        num_prefills.append(cache.num_prefills)
        assert cache.num_bytes <= 2 * BYTES_PER_TOKEN
    assert num_prefills == [1, 2, 2, 3, 3, 4]
    assert cache.num_bytes == 2 * BYTES_PER_TOKEN
    cache.drop(ledger.forget())
    assert cache.num_bytes == 0


def test_a_prompt_larger_than_the_bound_is_used_and_not_kept() -> None:
    cache, ledger = TextCache(prefill), PromptLedger(2 * BYTES_PER_TOKEN, BYTES_PER_TOKEN)
    cache.fetch([(7,)], ledger.admit([(7,)]))
    large = tuple(range(3))
    (entry,) = cache.fetch([large], ledger.admit([large]))
    assert entry.num_tokens == 3
    assert cache.num_bytes == BYTES_PER_TOKEN, "what was there stays"


def test_a_request_uses_a_prompt_that_its_other_prompt_drives_out() -> None:
    cache, ledger = TextCache(prefill), PromptLedger(2 * BYTES_PER_TOKEN, BYTES_PER_TOKEN)
    first, second = (1,), (2, 3)
    cache.fetch([first], ledger.admit([first]))
    orders = ledger.admit([first, second])
    assert orders == PromptOrders(drop=(text_key(first),), keep=frozenset([text_key(second)]))
    one, two = cache.fetch([first, second], orders)
    assert (one.num_tokens, two.num_tokens) == (1, 2)
    assert cache.num_prefills == 2
    assert cache.num_bytes == 2 * BYTES_PER_TOKEN


def test_one_prompt_for_both_branches_is_prefilled_once() -> None:
    cache, ledger = TextCache(prefill), PromptLedger(0, BYTES_PER_TOKEN)
    one, two = cache.fetch([(1,), (1,)], ledger.admit([(1,), (1,)]))
    assert one is two
    assert cache.num_prefills == 1
    assert cache.num_bytes == 0


def test_the_ledger_knows_what_needs_no_computing() -> None:
    ledger = PromptLedger(2 * BYTES_PER_TOKEN, BYTES_PER_TOKEN)
    assert ledger.num_kept([(1,), (2,)]) == 0
    ledger.admit([(1,), (2,)])
    assert ledger.num_kept([(1,), (3,)]) == 1
    ledger.admit([(3,)])
    assert ledger.num_kept([(1,), (3,)]) == 1


def test_ranks_that_follow_one_ledger_hold_the_same_and_prefill_alike() -> None:
    """Ranks hold different bytes; all follow the ledger, which counts one rank's, not their own."""
    ledger = PromptLedger(3 * BYTES_PER_TOKEN, BYTES_PER_TOKEN)
    ranks = [TextCache(prefill), TextCache(lambda ids: prefill(ids.repeat(2)))]
    for number in (1, 2, 1, 3, 4, 1, 2):
        orders = ledger.admit([(number,), (0,)])
        for rank in ranks:
            rank.fetch([(number,), (0,)], orders)
    assert ranks[0].num_prefills == ranks[1].num_prefills
    assert ranks[0]._entries.keys() == ranks[1]._entries.keys()


def test_the_text_key_names_the_tokens() -> None:
    assert text_key((1, 2)) == text_key([1, 2])
    assert len({text_key(ids) for ids in ((1, 2), (2, 1), (12,), (1,), (1, 0))}) == 5
