"""Texts that a byte tokenizer must return unchanged."""

TEXTS = {
    "empty": "",
    "ascii": "def f(x):\n\treturn x  # two  spaces \r\n",
    "utf8": "naïve ☃ 𝄞 漢字 \u00ad\u00a0\u2028\ufeff",
    "control": "".join(map(chr, range(32))) + "\x7f",
    "every_code_point_length": "".join(map(chr, [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10FFFF])),
}
