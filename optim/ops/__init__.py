"""Operations on gradients besides a step: norms, sums, copies, int8 codes, selections, digests."""
