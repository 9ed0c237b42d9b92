"""The configuration of Lighthouse Attention: fields, rules and derived sizes.

Every rule about shapes is checked here and nowhere else. `LighthouseConfig` checks its own fields
on construction, and `check_seq_len` checks them against a sequence length.
"""

from dataclasses import dataclass, replace
from math import isqrt, lcm

SCORER_NAMES = ("norm", "dilated", "gla")
"""Names of the scorers in `scorers.py`."""

SELECTED_PER_STRATUM = 128
"""Entries selected per stratum and level: 64 by query score, then 64 by key score (paper, 3)."""

LONGEST = 2**30
"""The longest sequence, in tokens. Ids of up to twice as many entries fit into 32 bits."""


@dataclass(frozen=True)
class LighthouseConfig:
    """Settings of Lighthouse Attention (paper, section 3). An illegal value raises ValueError."""

    num_levels: int = 3
    """Levels of the pyramid, L, from 2 to 30. Level 0 holds the tokens themselves."""

    pooling_factor: int = 4
    """Children per entry, p: a power of two, at least 2."""

    topk: int = 1536
    """Entries selected per level above the finest, k: a multiple of 128."""

    scorer: str = "norm"
    """The scorer that ranks the entries. `norm` uses the L2 norms of q and k per token. `dilated`
    uses the L2 norms of the outputs of dilated attention; its cost grows with N**2. `gla` uses
    the L2 norms of the outputs of gated linear attention."""

    dilation: int = 4
    """Dilation of the `dilated` scorer, in tokens. Other scorers ignore it."""

    def __post_init__(self):
        for name in ("num_levels", "pooling_factor", "topk", "dilation"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}; use a whole number")
        if self.num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {self.num_levels}; use 2 or more")
        most = LONGEST.bit_length() - 1
        if self.num_levels > most:
            raise ValueError(
                f"num_levels must be at most {most}, got {self.num_levels}; use {most} or fewer"
            )
        p = self.pooling_factor
        if not 2 <= p <= LONGEST or p & (p - 1):
            limit = f" of at most {LONGEST}" * (p > LONGEST)
            raise ValueError(
                f"pooling_factor must be a power of two{limit}, got {p}; nearest: "
                f"{nearest_power_of_two(p)}"
            )
        if not 0 < self.topk <= LONGEST or self.topk % SELECTED_PER_STRATUM:
            limit = f" of at most {LONGEST}" * (self.topk > LONGEST)
            nearest = nearest_multiple(self.topk, SELECTED_PER_STRATUM, most=LONGEST)
            raise ValueError(
                f"topk must be a positive multiple of {SELECTED_PER_STRATUM}{limit}, "
                f"got {self.topk}; nearest: {nearest}"
            )
        if self.scorer not in SCORER_NAMES:
            raise ValueError(
                f"scorer must be one of {', '.join(SCORER_NAMES)}, got {self.scorer!r}; choose one"
            )
        if self.dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {self.dilation}; use 1 or more")

    def check_seq_len(self, seq_len: int, num_chunks: int = 1, multiple_of: int = 1) -> None:
        """Raise a one-line ValueError unless `seq_len` tokens are legal under these fields.

        `p**(L-1)` must divide N, and T must divide the coarsest level into strata of at least 128
        candidates. Context parallelism cuts the sequence into `num_chunks` equal chunks, so T must
        be a multiple of `num_chunks`.

        Args:
            multiple_of: the length that an error suggests is a multiple of this, in tokens.
        """
        span = self.span(self.num_levels - 1)
        step = self.num_strata * span
        is_aligned = self.num_strata % num_chunks == 0
        is_in_bounds = SELECTED_PER_STRATUM * step <= seq_len <= LONGEST
        if is_in_bounds and seq_len % step == 0 and is_aligned:
            return
        fields = f"num_levels={self.num_levels}, pooling_factor={self.pooling_factor}"
        by_len = self.nearest_seq_len(seq_len, num_chunks, multiple_of)
        if is_aligned and (seq_len < 1 or seq_len % span or seq_len > LONGEST):
            limit = f", at most {LONGEST}" * (seq_len > LONGEST)
            remedy = "fewer levels or a smaller factor" if by_len is None else f"{by_len}"
            raise ValueError(
                f"seq_len must be a multiple of pooling_factor**(num_levels-1) = {span}{limit} "
                f"({fields}), got {seq_len}; nearest with topk {self.topk}: {remedy}"
            )
        by_topk = self.nearest_topk(seq_len, num_chunks)
        nearest = [f"topk {by_topk}" if by_topk else "fewer levels or a smaller factor"]
        if is_aligned:
            nearest += [f"seq_len {by_len}"] if by_len else []
            raise ValueError(
                f"topk must divide the coarsest level of {seq_len // span} entries ({fields}, "
                f"seq_len {seq_len}) into topk/128 equal strata of at least 128, got topk "
                f"{self.topk}; nearest: {', or '.join(nearest)}"
            )
        per_chunk = SELECTED_PER_STRATUM * num_chunks
        if not by_topk:
            # Another length is needed as well.
            other = replace(self, topk=nearest_multiple(self.topk, per_chunk, most=LONGEST))
            if by_len := other.nearest_seq_len(seq_len, num_chunks, multiple_of):
                nearest.append(f"topk {other.topk} with seq_len {by_len}")
        raise ValueError(
            f"topk must be a multiple of {per_chunk}, which is {SELECTED_PER_STRATUM} for each "
            f"of the {num_chunks} chunks of context parallelism, and divide the coarsest level "
            f"of {seq_len // span} entries ({fields}, seq_len {seq_len}), got {self.topk}; "
            f"nearest: {', or '.join(nearest)}"
        )

    def nearest_seq_len(
        self, seq_len: int, num_chunks: int = 1, multiple_of: int = 1
    ) -> int | None:
        """The legal length nearest to `seq_len`, in tokens; None if there is none.

        Args:
            multiple_of: the length is also a multiple of this, in tokens.
        """
        if self.num_strata % num_chunks:
            return None
        step = self.num_strata * self.span(self.num_levels - 1)
        least = SELECTED_PER_STRATUM * step
        nearest = nearest_multiple(seq_len, lcm(step, multiple_of), least, LONGEST)
        return nearest if nearest <= LONGEST else None

    def nearest_topk(self, seq_len: int, num_chunks: int = 1) -> int | None:
        """The legal `topk` nearest to this one at `seq_len` tokens; None if there is none."""
        span = self.span(self.num_levels - 1)
        if seq_len < 1 or seq_len > LONGEST or seq_len % span:
            return None
        coarsest = seq_len // span
        strata = [
            t
            for divisor in range(1, isqrt(coarsest) + 1)
            if coarsest % divisor == 0
            for t in (divisor, coarsest // divisor)
            if t % num_chunks == 0 and t * SELECTED_PER_STRATUM <= coarsest
        ]
        legal = sorted(t * SELECTED_PER_STRATUM for t in strata)
        return min(legal, key=lambda k: abs(k - self.topk), default=None)

    @property
    def num_strata(self) -> int:
        """Number of strata per level, T. Each stratum selects 128 entries independently."""
        return self.topk // SELECTED_PER_STRATUM

    def span(self, level: int) -> int:
        """Tokens covered by one entry of `level`."""
        return self.pooling_factor**level

    def level_len(self, level: int, seq_len: int) -> int:
        """Number of entries of `level` at `seq_len` tokens."""
        return seq_len // self.span(level)

    def level_offset(self, level: int, seq_len: int) -> int:
        """Flat id of the first entry of `level`. Entry i of level l has the id
        `level_offset(l) + i`, with the finest level first."""
        return sum(self.level_len(finer, seq_len) for finer in range(level))

    def num_entries(self, seq_len: int) -> int:
        """Number of entries of all levels, E."""
        return self.level_offset(self.num_levels, seq_len)

    def sub_seq_len(self, seq_len: int) -> int:
        """Length of the sub-sequence, S: the whole coarsest level and `p*k` of each finer one."""
        coarsest = self.level_len(self.num_levels - 1, seq_len)
        return coarsest + (self.num_levels - 1) * self.pooling_factor * self.topk


def nearest_multiple(value: int, of: int, least: int = 1, most: int | None = None) -> int:
    """The multiple of `of` nearest to `value`, within the bounds if one is; ties go down."""
    first = -(-least // of)
    last = None if most is None else max(first, most // of)
    number = max(first, -(-(2 * value - of) // (2 * of)))
    return of * (number if last is None else min(last, number))


def nearest_power_of_two(value: int) -> int:
    """The power of two nearest to `value`, from 2 to `LONGEST`; ties go down."""
    value = min(max(value, 2), LONGEST)
    below = 1 << value.bit_length() - 1
    return below if value - below <= 2 * below - value else 2 * below
