"""Corpora, packed to seq_len, resumable; corpora tokenized beforehand."""
