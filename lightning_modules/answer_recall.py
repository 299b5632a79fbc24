"""R@5kt of XOR-Retrieve: whether an answer stands among the first 5,000 tokens of what a query finds.

Source: the official evaluation of XOR-TyDi QA (Asai et al., arXiv 2010.11856; `evals/eval_xor_retrieve.py` of AkariAsai/XORQA):
passages are tokenised and joined by single spaces, cut after so many tokens, and an answer counts where it is a substring of
that, letter by letter. The answer itself is not tokenised, so one that holds `, ` or `'s` is not found there either.
It tokenises with nltk's `word_tokenize`, which needs nltk and a trained model of sentence ends; `tokens_of` follows its rules
for punctuation with a regular expression and differs at three places. A period ends a token where white space follows, but for
initials and the like (`J. Smith`, `the U.S. is`): nltk also keeps those of abbreviations that it knows (`Mr.`). Double
quotation marks stay what they are: nltk writes `` and ''. `cannot` and the like stay one token.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

MAX_TOKENS = 5000
APART = r"""\s;@#$%&?!()\[\]{}<>"“”«»„…,:.'"""  # what is no part of a word, unless a rule below says so
CLITIC = r"(?:s|m|d|ll|re|ve)\b"
TOKEN = re.compile(
    rf"""
      \.{{2,}} | -{{2,}}                                  # dots and dashes
    | n't\b | '{CLITIC}                                   # don't is do n't, Japan's is Japan 's
    | (?: [^\W\d_]\. )+ (?= [,;:] | \s+\S )               # initials, but at the end of a text
    | (?: (?! -- | n't\b ) [^{APART}]
        | \. (?= [^{APART}] ) | [,:] (?= \d ) | '(?! {CLITIC} ) (?= \w )  # 3.14, 1,234, 10:30, O'Neill
      )+
    | \S                                                  # whatever else, by itself
    """,
    re.VERBOSE | re.IGNORECASE,
)


def answer_recall(ranked_texts: Iterable[str], answers: Sequence[str], max_tokens: int = MAX_TOKENS) -> float:
    """1 if an answer stands in the first `max_tokens` tokens of the texts, else 0, for one query.

    Texts are taken one by one, the best first, until an answer is found or the tokens are used up.

    Args:
        ranked_texts: What was retrieved, in order, without titles.
        answers: Strings of which one is enough. The official evaluation leaves out `yes` and `no`, and queries that have no
            other answer.
        max_tokens: Where what was retrieved is cut.

    Raises:
        ValueError: There is no answer, one is empty, or `max_tokens` is below 1.
    """
    if not answers or not all(answers):
        raise ValueError(f"the answers are {list(answers)}; a query needs at least one, and none may be empty")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    longest = max(map(len, answers))
    room, before = max_tokens, ""
    for text in ranked_texts:
        tokens = _first(tokens_of(text), room)
        if tokens:
            seen = f"{before} {' '.join(tokens)}" if before else " ".join(tokens)
            if any(answer in seen for answer in answers):
                return 1.0
            before = seen[-longest:]  # an answer may reach over the end of a text
        room -= len(tokens)
        if not room:
            break
    return 0.0


def tokens_of(text: str) -> Iterator[str]:
    """Tokens of a text, nearly as nltk's `word_tokenize` has them."""
    return (found[0] for found in TOKEN.finditer(text))


def _first(tokens: Iterator[str], number: int) -> list[str]:
    return [token for token, _ in zip(tokens, range(number), strict=False)]
