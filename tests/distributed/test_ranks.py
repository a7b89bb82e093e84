"""All kinds of parallelism, and two at once, on four ranks, and on ranks of which one dies."""
import json

import pytest
import torch.multiprocessing as mp
from ranks import dying, spawn

EXPERTS = ["uneven", "a_rank_without_tokens", "sentinels", "chunked", "dbrx_of_ours", "experts_and_data", "bytes_are_the_formula"]
SEQUENCE = ["conv", "conv_of_short_stretches", "scan", "scan_of_short_stretches", "relay", "relay_of_short_stretches", "relay_for_inference",
            "blocks_follow_each_other", "threads_make_blocks_larger", "bytes_do_not_depend_on_the_length"]  # fmt: skip

ROWS = ["bamba", "bamba_of_packed_texts", "data_beside_context", "tensor_and_context", "tensor_and_context_of_blt", "keys_travel_once", "blt", "bytes_of_blt",
        "ranks_read_their_own_parts", "loaded_on_two_dimensions"]  # fmt: skip

TENSORS = ["blenderbot_split", "dbrx_split", "bamba_split", "bamba_with_few_groups", "blt_split", "split_with_odd_vocabularies", "generated_alike", "whole_again", "split_bytes_are_the_formula",
           "split_bad_input", "tensor_and_fsdp", "tensor_and_experts", "rules_on_two_dimensions"]  # fmt: skip


def test_four_ranks():
    spawn.run("ranks.everything", EXPERTS + SEQUENCE + ROWS + TENSORS, 4)


@pytest.mark.parametrize("dies", [True, False])
def test_a_rank_dies_or_never_comes(tmp_path, dies):
    processes = mp.start_processes(dying.rank, (3, str(tmp_path), dies), 3, join=False, start_method="spawn").processes
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 0, 0]
    for rank in (1, 2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == dying.KINDS.keys()
        for seconds, told in found.values():
            assert seconds < 2 * dying.SECONDS + 2, told
            assert f"failed on rank {rank}: another rank died, raised an error or never came to this call" in told
