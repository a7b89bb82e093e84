"""Hash embeddings of byte n-grams, plain torch: int64 arithmetic wraps as in transformers' BLT."""
import torch
import torch.nn.functional as F

from .linear import acc_dtype

PRIMES = (1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313, 5463458053, 3367900313)


def byte_hash_ids(tokens, group_sizes, num_functions, vocab, cu_seqlens=None):
    """tokens (B, L) -> ids (B, L, num_functions * len(group_sizes)) int64, rows of the table."""
    if cu_seqlens is not None:
        rows = [byte_hash_ids(text, group_sizes, num_functions, vocab) for text in tokens.split(cu_seqlens.diff().tolist(), dim=1)]
        return torch.cat(rows, 1)
    found = []
    if tokens.shape[1] == 0:
        return tokens.new_empty((*tokens.shape, num_functions * len(group_sizes)), dtype=torch.int64)
    for prime in (PRIMES[f % len(PRIMES)] for f in range(num_functions)):
        for size in group_sizes:
            windows = F.pad(tokens.long(), (size - 1, 0)).unfold(1, size, 1)
            powers = torch.tensor(prime, device=tokens.device) ** torch.arange(size, device=tokens.device)
            found.append((windows * powers).sum(-1) % vocab + len(found) * vocab)
    return torch.stack(found, -1) if found else tokens.new_empty((*tokens.shape, 0), dtype=torch.int64)


def byte_hash_embedding(tokens, table, byte_embedding, group_sizes, num_functions, vocab, cu_seqlens, sparse_grad):
    """tokens (B, L), table (rows, D), byte_embedding (bytes, D) -> (B, L, D) in byte_embedding's dtype."""
    acc = acc_dtype(byte_embedding.dtype)
    total = F.embedding(tokens.long(), byte_embedding.to(acc))
    for ids in byte_hash_ids(tokens, group_sizes, num_functions, vocab, cu_seqlens).unbind(-1):
        total = total + F.embedding(ids, table if sparse_grad else table.to(acc), sparse=sparse_grad).to(acc)
    return total.to(byte_embedding.dtype)
