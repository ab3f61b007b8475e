"""What the tests of smartbird.hf share, and what goes wrong with attention in transformers.

Each trap and the tests that fall into it, in test_*.py here, where it is not told otherwise:

 1 no mask function: masks, test_without_its_mask_function_attention_refuses
 2 padding and masks of pairs: masks, test_padding_changes_nothing, test_masks_of_pairs_are_refused
 3 a static cache is longer than its keys: cache, test_other_caches_give_the_same
 4 generate drops masks of ones: cache, test_other_caches_give_the_same
 5 one query and chunks: masks, test_chunks_and_single_tokens_are_one_call
 6 masks are made twice: masks, test_a_mask_made_twice_is_made_once
 7 the layout of the result: convert, test_all_keys_are_dense_attention
 8 scaling: convert, the same of gemma2 and granite, test_sketches_are_scaled_as_the_heads_are
 9 is_causal: convert, test_contradicting_causality_is_refused; masks, test_later_tokens_*
10 softcap, s_aux, position_bias: convert, test_nothing_to_convert, test_unknown_arguments_*
11 sliding windows: convert, test_sliding_layers_stay; masks, test_windows_are_refused
12 shared keys: convert, test_all_keys_are_dense_attention of llama
13 dropout, weights: training, test_dropout_in_training_only; convert, test_weights_of_attention_*
14 packing: masks, test_packed_* and test_contradicting_packs_are_refused
15 draws follow the sequence: cache, test_generation_is_that_without_a_cache; masks, 2, 5, 14
16 sketches see positions: sketches, test_whole_sketches_score_as_the_heads_do
17 what is done to a cache: cache, test_sketches_go_with_their_keys, test_reset_takes_another_batch,
   test_offloaded_caches_give_the_same, test_quantised_caches_give_what_they_give_dense_attention
18 searches: cache, test_generation_is_that_without_a_cache, test_assisted_generation_is_greedy;
   contrastive search has left transformers
19 files: files
20 nothing to convert: convert, test_nothing_to_convert of no_interface
21 checkpointing: training, test_checkpointing_changes_no_gradient
22 precision, graphs, devices: training, test_half_precision, test_autocast, test_compiled,
   test_distributed; compiled; files, test_offloaded_weights
23 cross-attention: convert, test_cross_attention_*
24 releases of transformers: tools/test_versions.py
25 time of a token: cache, test_the_copies_of_a_token_are_bounded_in_the_mean
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
