"""The answer normalisers of the VQA family.

Two relatives share their tables: EvalAI's `EvalAIAnswerProcessor` (LLaVA `llava/eval/m4c_evaluator.py`) and the
VQA evaluator (GT-Vision-Lab/VQA `vqaEval.py`), which leaves out lower-casing and the comma, question mark and
possessive steps before punctuation.
"""

from __future__ import annotations

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(value)
    for value, words in enumerate(
        ["none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
    for word in words.split()
}
# A word without its apostrophe(s) stands for the word with them, e.g. cant for can't.
_REGULAR = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Entries that do not follow from their value: upstream lists half-way spellings, and some words that are already right.
_IRREGULAR = """
couldn'tve>couldn't've couldnt've>couldn't've hadnt've>hadn't've hadn'tve>hadn't've hed've>he'd've he'dve>he'd've
Id've>I'd've I'dve>I'd've itd've>it'd've it'dve>it'd've let's>let's mightnt've>mightn't've mightn'tve>mightn't've
ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at shed've>she'd've she'dve>she'd've she's>she's
shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've
somebody'dve>somebody'd've someoned've>someone'd've someone'dve>someone'd've somethingd've>something'd've
something'dve>something'd've thered've>there'd've there'dve>there'd've theyd've>they'd've they'dve>they'd've
wed've>we'd've we'dve>we'd've whod've>who'd've who'dve>who'd've wouldnt've>wouldn't've wouldn'tve>wouldn't've
yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've youd've>you'd've
you'dve>you'd've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _REGULAR.split()} | {
    spelling: word for spelling, _, word in (pair.partition(">") for pair in _IRREGULAR.split())
}

# The first group was meant as a look-behind and is a look-ahead that always holds; see `strip_punctuation`.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(\d)(\,)(\d)")
# Upstream passes re.UNICODE (32) where re.sub expects `count`.
_MAX_PERIODS = 32


def strip_punctuation(text: str) -> str:
    """Delete or blank punctuation, then periods that no digit follows (at most 32 of them).

    A mark is deleted when it touches a space anywhere in the text, or the text has a comma between digits; otherwise
    every occurrence becomes a space.
    """
    numeric_comma = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        delete = numeric_comma or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def map_words(text: str) -> str:
    """Lower-case, map number words, drop articles, then restore apostrophes of contractions, word by word."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def fold_case(text: str) -> str:
    """First step of `evalai_normalize`: lower case, without commas and question marks, possessives split off."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def fold_whitespace(text: str) -> str:
    """Newlines and tabs to spaces, then strip."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def evalai_normalize(text: str) -> str:
    """Normalise an answer as EvalAI's VQA servers and LLaVA's TextVQA scorer do.

    Args:
        text: Any answer.

    Returns:
        The normalised answer; equality of two of these is what counts as a match.
    """
    return map_words(strip_punctuation(fold_whitespace(fold_case(text))))


def vqa_normalize(text: str) -> str:
    """Normalise as the VQA evaluator does where annotators disagree (GT-Vision-Lab/VQA `vqaEval.py`)."""
    return map_words(strip_punctuation(fold_whitespace(text)))
