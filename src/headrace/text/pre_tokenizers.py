"""PRE_TOKENIZERS: how each family of byte-level vocabularies cuts a text into words before it joins bytes.

A GGUF file only names the family (tokenizer.ggml.pre); a tokenizer.json spells the patterns out. Each entry follows the
family's own published tokenizer.json. Knows nothing about files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True)
class PreTokenizer:
    """How one family of vocabularies cuts a text into words.

    Attributes:
        patterns: regular expressions, one after the other; each cuts every piece that the ones before made, and what
            it matches stands on its own.
        whole_words_first: a word that is a token becomes that token, whatever the joins would make of it.
        composes: the text is brought to Unicode's composed form (NFC) first.
        begins: a prompt begins with bos unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words_first: bool = False
    composes: bool = False
    begins: bool = False


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's pattern: a sign goes with the word behind it, signs take the line breaks behind them, and numbers come in
# threes; the others below say where they differ from it.
SIGNS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{SIGNS_AND_SPACE}"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
SEED_CODER_PATTERN = QWEN2_PATTERN.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
# A word is capitals, then small letters: camelCase is two words. A slash may follow signs.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
SIGNS_WITH_SLASH = SIGNS_AND_SPACE.replace(r"[\r\n]*", r"[\r\n/]*", 1)
TEKKEN_PATTERN = CASED.replace("%s", "") + rf"|\p{{N}}|{SIGNS_WITH_SLASH}"
GPT4O_PATTERN = CASED.replace("%s", CONTRACTIONS + "?") + rf"|\p{{N}}{{1,3}}|{SIGNS_WITH_SLASH}"
# DeepSeek's first vocabularies list letters of two cases, as an older Unicode had them (code points, hexadecimal); then
# signs, then Chinese and what stands near it in Unicode.
CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
CHINESE_AND_NEAR = r"[一-龥\x{800}-一가-\x{D7FF}]+"
ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _code_points(ranges: str) -> str:
    r""" "41-5A B5" → "\x{41}-\x{5A}\x{B5}", the inside of a character class."""
    return "".join("-".join(rf"\x{{{end}}}" for end in item.split("-")) for item in ranges.split())


DEEPSEEK_LLM_PATTERNS = (
    r"[\r\n]",
    rf"\s?[{_code_points(CASED_LETTERS)}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    CHINESE_AND_NEAR,
    r"\p{N}+",
)
DEEPSEEK_CODER_PATTERNS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE_AND_NEAR, r"\p{N}")
DEEPSEEK_V3_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    rf"{ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

GPT2, LLAMA3 = PreTokenizer((GPT2_PATTERN,)), PreTokenizer((LLAMA3_PATTERN,))
DIGITS_APART = PreTokenizer((r"\p{N}", GPT2_PATTERN))
LLAMA3_WHOLE_WORDS = replace(LLAMA3, whole_words_first=True, begins=True)
FALCON_SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"

# tokenizer.ggml.pre → how it cuts; "default" is llama.cpp's for files that name none.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "mpt": GPT2,
    "trillion": GPT2,
    "mellum": GPT2,
    "a.x-4.0": GPT2,
    "smollm": DIGITS_APART,
    "starcoder": DIGITS_APART,
    "refact": DIGITS_APART,
    "command-r": DIGITS_APART,
    "minerva-7b": DIGITS_APART,
    "llama-bpe": LLAMA3_WHOLE_WORDS,
    "llama3": LLAMA3_WHOLE_WORDS,
    "llama-v3": LLAMA3_WHOLE_WORDS,
    "falcon3": LLAMA3_WHOLE_WORDS,
    "pixtral": LLAMA3_WHOLE_WORDS,
    "midm-2.0": LLAMA3_WHOLE_WORDS,
    "smaug-bpe": LLAMA3,
    "qwen2": PreTokenizer((QWEN2_PATTERN,), composes=True),
    "deepseek-r1-qwen": PreTokenizer((QWEN2_PATTERN,), composes=True),
    "megrez": PreTokenizer((QWEN2_PATTERN,), composes=True),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}+")), whole_words_first=True),
    "seed-coder": PreTokenizer((SEED_CODER_PATTERN,)),
    "tekken": PreTokenizer((TEKKEN_PATTERN,), whole_words_first=True, begins=True),
    "gpt-4o": PreTokenizer((GPT4O_PATTERN,)),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM_PATTERNS),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER_PATTERNS),
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3_PATTERNS),
    "falcon": PreTokenizer((FALCON_SIGNS, GPT2_PATTERN, r"[0-9][0-9][0-9]")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
