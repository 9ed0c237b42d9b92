"""The configuration of Lighthouse Attention: its fields, its rules, the sizes that follow.

Every rule about shapes is checked here and nowhere else: `LighthouseConfig` checks its
own fields when it is made, `check_seq_len` checks them against a sequence length.
"""

from dataclasses import dataclass, replace
from math import isqrt, lcm

SCORER_NAMES = ("norm", "dilated", "gla")
"""Names of the scorers, which `scorers.py` implements."""

SELECTED_PER_STRATUM = 128
"""Entries selected per stratum and level: 64 by query score, then 64 by key score (paper, 3)."""

LONGEST = 2**30
"""Tokens of the longest sequence: up to twice as many entries are numbered in 32 bits."""


@dataclass(frozen=True)
class LighthouseConfig:
    """Fields of Lighthouse Attention (paper, section 3). Raises ValueError for an illegal one."""

    num_levels: int = 3
    """Levels of the pyramid, L from 2 to 30; level 0 holds the tokens themselves."""

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

        The coarsest level must exist (`p**(L-1)` divides N) and divide evenly into T strata
        of at least 128 candidates each; so must it in each of the `num_chunks` equal chunks that
        context parallelism cuts the sequence into: T is a multiple of `num_chunks`. The length
        that an error names is a multiple of `multiple_of`, too.
        """
        span = self.span(self.num_levels - 1)
        is_aligned = self.num_strata % num_chunks == 0
        if self._is_long_enough(seq_len) and seq_len % (self.num_strata * span) == 0 and is_aligned:
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
        if not by_topk:
            # Another length is needed as well.
            step = SELECTED_PER_STRATUM * num_chunks
            other = replace(self, topk=nearest_multiple(self.topk, step, most=LONGEST))
            if by_len := other.nearest_seq_len(seq_len, num_chunks, multiple_of):
                nearest.append(f"topk {other.topk} with seq_len {by_len}")
        raise ValueError(
            f"topk must be a multiple of {SELECTED_PER_STRATUM * num_chunks}, which is "
            f"{SELECTED_PER_STRATUM} for each of the {num_chunks} chunks of context "
            f"parallelism, and divide the coarsest level of {seq_len // span} entries "
            f"({fields}, seq_len {seq_len}), got {self.topk}; nearest: "
            f"{', or '.join(nearest)}"
        )

    def _is_long_enough(self, seq_len: int) -> bool:
        span = self.span(self.num_levels - 1)
        return self.num_strata * SELECTED_PER_STRATUM * span <= seq_len <= LONGEST

    def nearest_seq_len(
        self, seq_len: int, num_chunks: int = 1, multiple_of: int = 1
    ) -> int | None:
        """The legal length nearest to `seq_len` tokens; None if there is none.

        Args:
            multiple_of: what else must divide it.
        """
        span = self.span(self.num_levels - 1)
        least, step = self.num_strata * SELECTED_PER_STRATUM * span, self.num_strata * span
        if self.num_strata % num_chunks:
            return None
        nearest = nearest_multiple(seq_len, lcm(step, multiple_of), least, LONGEST)
        return nearest if self._is_long_enough(nearest) else None

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


def nearest_multiple(value: int, of: int, least: int = 1, most: int | None = None) -> int:
    """The multiple of `of` nearest to `value`, within the bounds if one is; the lower of two."""
    first = -(-least // of)
    last = None if most is None else max(first, most // of)
    number = max(first, -(-(2 * value - of) // (2 * of)))
    return of * (number if last is None else min(last, number))


def nearest_power_of_two(value: int) -> int:
    """The power of two nearest to `value`, from 2 to `LONGEST`; the lower of two."""
    value = min(max(value, 2), LONGEST)
    below = 1 << value.bit_length() - 1
    return below if value - below <= 2 * below - value else 2 * below
