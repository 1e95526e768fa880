"""Texts that tokenizers disagree on: what a device's implementation must split exactly as the original does.

No text holds NUL: device interfaces pass C strings.
"""

from __future__ import annotations

STRINGS = (
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "tab\tand\nnewline\n\nparagraph",
    "\r\nwindows\r\n",
    "It's we'll I'VE don't",
    "naïve café résumé",
    "Ünïcödé straße ŁÓDŹ",
    "中文字符测试。",
    "日本語のテキスト",
    "한국어 텍스트",
    "مرحبا بالعالم",
    "שלום עולם",
    "Привет, мир",
    "ภาษาไทย",
    "हिन्दी पाठ",
    "😀 emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "zero\u200bwidth\u200djoin",
    "e\u0301 combining vs é",
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < 10; ++i) { a[i] += i; }",
    '{"key": [1, 2.5, null, true]}',
    '<html><body class="x">&amp;</body></html>',
    "1234567890 3.14159 1,000,000 1e-10 0xFF",
    "https://example.com/a?b=c&d=%20#frag",
    "user@example.com",
    "ALL CAPS lower MiXeD",
    "...!!!???---___***",
    "a",
    "",
    "\n",
    " ",
    "   ",
    "\t\t",
    "a" * 64,
    "\u00a0nbsp\u2003em\u3000ideographic",
    "\ufeffbyte order mark",
    "\x01\x7f control",
    "ﬁ ligature ½ ² ™ Ⅷ",
    "𝒜𝓁𝓅𝒽𝒶 𐍈",
    "The quick brown fox jumps over the lazy dog. " * 40,
)

CONVERSATIONS = (
    ({"role": "user", "content": "What is the capital of France?"},),
    (
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Größer?\n  As a list:\n- 1 😀"},
    ),
)
"""Without a system message: some templates refuse one."""
