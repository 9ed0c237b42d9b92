"""The configuration of Lighthouse Attention: its fields, its rules, the sizes that follow.

Every rule about shapes is checked here and nowhere else: `LighthouseConfig` checks its
own fields when it is made, `check_seq_len` checks them against a sequence length.
"""

from dataclasses import dataclass

from lighthouse.scorers import SCORERS

SELECTED_PER_STRATUM = 128
"""Entries selected per stratum and level: 64 by query score, then 64 by key score (paper, 3)."""


@dataclass(frozen=True)
class LighthouseConfig:
    """Fields of Lighthouse Attention (paper, section 3). Raises ValueError for an illegal one."""

    num_levels: int = 3
    """Levels of the pyramid, L >= 2; level 0 holds the tokens themselves."""

    pooling_factor: int = 4
    """Children per entry, p: a power of two, at least 2."""

    topk: int = 1536
    """Entries selected per level above the finest, k: a multiple of 128."""

    scorer: str = "norm"
    """What ranks the entries, by the L2 norm per token. `norm`: of q and of k. `dilated`: of what
    they get by attending to each other within residue classes of the tokens; its cost grows with
    N**2. `gla`: by gated linear attention."""

    dilation: int = 4
    """Stride of the residue classes of the `dilated` scorer, in tokens; others ignore it."""

    def __post_init__(self):
        for name in ("num_levels", "pooling_factor", "topk", "dilation"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}; write it as a number")
        if self.num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {self.num_levels}; use 2 or more")
        p = self.pooling_factor
        if p < 2 or p & (p - 1):
            nearest = _nearest(p, lambda n: n >= 2 and not n & (n - 1))
            raise ValueError(f"pooling_factor must be a power of two, got {p}; nearest: {nearest}")
        if self.topk < 1 or self.topk % SELECTED_PER_STRATUM:
            nearest = _nearest(self.topk, lambda n: n > 0 and n % SELECTED_PER_STRATUM == 0)
            raise ValueError(
                f"topk must be a positive multiple of {SELECTED_PER_STRATUM}, "
                f"got {self.topk}; nearest: {nearest}"
            )
        if self.scorer not in SCORERS:
            raise ValueError(
                f"scorer must be one of {', '.join(SCORERS)}, got {self.scorer!r}; choose one"
            )
        if self.dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {self.dilation}; use 1 or more")

    def check_seq_len(self, seq_len: int, num_chunks: int = 1) -> None:
        """Raise a one-line ValueError unless `seq_len` tokens are legal under these fields.

        The coarsest level must exist (`p**(L-1)` divides N) and divide evenly into T strata
        of at least 128 candidates each; so must it in each of the `num_chunks` equal chunks that
        context parallelism cuts the sequence into: T is a multiple of `num_chunks`.
        """
        span = self.span(self.num_levels - 1)
        least = self.num_strata * SELECTED_PER_STRATUM * span
        legal = self.num_strata * span
        is_aligned = self.num_strata % num_chunks == 0
        if seq_len >= least and seq_len % legal == 0 and is_aligned:
            return
        fields = f"num_levels={self.num_levels}, pooling_factor={self.pooling_factor}"
        if seq_len < 1 or seq_len % span:
            below, above = seq_len // span * span, -(-seq_len // span) * span
            nearest = " or ".join(str(n) for n in sorted({max(below, least), max(above, least)}))
            raise ValueError(
                f"seq_len must be a multiple of pooling_factor**(num_levels-1) = {span} ({fields}),"
                f" got {seq_len}; nearest: {nearest}"
            )
        nearest_topk = self.nearest_topk(seq_len, num_chunks)
        by_topk = f"topk {nearest_topk}" if nearest_topk else "fewer levels or a smaller factor"
        if not is_aligned:
            raise ValueError(
                f"topk must be a multiple of {SELECTED_PER_STRATUM * num_chunks}, which is "
                f"{SELECTED_PER_STRATUM} for each of the {num_chunks} chunks of context "
                f"parallelism, and divide the coarsest level of {seq_len // span} entries "
                f"({fields}, seq_len {seq_len}), got {self.topk}; nearest: {by_topk}"
            )
        by_len = max(least, round(seq_len / legal) * legal)
        raise ValueError(
            f"topk must divide the coarsest level of {seq_len // span} entries ({fields}, seq_len "
            f"{seq_len}) into topk/128 equal strata of at least 128, got topk {self.topk}; "
            f"nearest: {by_topk}, or seq_len {by_len}"
        )

    def nearest_topk(self, seq_len: int, num_chunks: int = 1) -> int | None:
        """The legal `topk` nearest to this one at `seq_len` tokens; None if there is none."""
        coarsest = seq_len // self.span(self.num_levels - 1)
        strata = range(num_chunks, coarsest // SELECTED_PER_STRATUM + 1, num_chunks)
        legal = [t * SELECTED_PER_STRATUM for t in strata if coarsest % t == 0]
        return min(legal, key=lambda k: abs(k - self.topk), default=None)

    @property
    def num_strata(self) -> int:
        """Strata T of a level; each selects 128 entries on its own."""
        return self.topk // SELECTED_PER_STRATUM

    def span(self, level: int) -> int:
        """Tokens covered by one entry of `level`."""
        return self.pooling_factor**level

    def level_len(self, level: int, seq_len: int) -> int:
        """Entries of `level` at `seq_len` tokens."""
        return seq_len // self.span(level)

    def level_offset(self, level: int, seq_len: int) -> int:
        """Flat id of the first entry of `level`: levels are numbered one after another,
        finest first, so that entry i of level l has the id `level_offset(l) + i`."""
        return sum(self.level_len(finer, seq_len) for finer in range(level))

    def num_entries(self, seq_len: int) -> int:
        """Entries E of all levels."""
        return self.level_offset(self.num_levels, seq_len)

    def sub_seq_len(self, seq_len: int) -> int:
        """Entries S of the sub-sequence: the coarsest level whole, and `p*k` below it each."""
        coarsest = self.level_len(self.num_levels - 1, seq_len)
        return coarsest + (self.num_levels - 1) * self.pooling_factor * self.topk


def _nearest(value: int, legal) -> int:
    """The legal integer nearest to `value`; the lower one of two."""
    return next(n for d in range(abs(value) + 1024) for n in (value - d, value + d) if legal(n))
