"""Rewards of generated text, and the rates that evaluate it: word error rate, exact match, edits, BLEU, ROUGE, METEOR.

A reward is a plain function of two strings, reference `ref` and hypothesis `hyp`; higher is better. With S substitutions, D deletions,
I insertions that turn the N words of `ref` into those of `hyp`:

    wer    -(S + D + I) / N     arXiv 2509.01939 (GRPO for speech recognition)
    em     1[ref = hyp]         arXiv 2509.01939
    ed     -(S + D + I)         arXiv 2509.01939
    cer    as wer, in characters, spaces among them
    bleu, rouge1, rouge2, rougeL, meteor    2509.16990 (GRPO for speech translation and question answering)

The first four see normalised text, the same `normalize` that evaluation applies; the others the strings as given, which from eval.py and
grpo.py are a normalised reference and what the model wrote (for RBA's agreement, two answers). Error rates agree with jiwer 4.0, BLEU with
sacreBLEU 2.6, ROUGE with rouge-score 0.1, METEOR with NLTK 3 (given no stemmer and no WordNet); none of them is needed here.
"""
import functools
import math
import re
import unicodedata
from collections import Counter

# --------------------------------------------------------------------------------------------- normalisation
# What keyboards and web text use for an apostrophe: single quotes, modifier letter, acute, backtick.
APOSTROPHES = str.maketrans("’‘ʼ´`", "'''''")
# An apostrophe that lacks a letter, mark or number on one side: nothing else but apostrophes and spaces is left when this runs.
OUTER_APOSTROPHE = re.compile(r"(?<![^' ])'|'(?![^' ])")
PLAIN = re.compile("(?:[a-z0-9]+(?: [a-z0-9]+)*)?")  # what needs no rewriting, by normalize or by BLEU's tokeniser: nearly all transcripts


@functools.lru_cache(maxsize=None)
def _normalize_character(character):
    category = unicodedata.category(character)
    if category == "Pd" or character.isspace():  # hyphens and dashes separate words
        return " "
    # Marks (M) are kept with letters and numbers: Hindi vowel signs, for one, are marks and not letters.
    return character if character == "'" or category[0] in "LMN" else ""


def normalize(text):
    """Text as rewards and evaluation compare it: lower case, no punctuation, single spaces. Perhaps empty; idempotent.

    NFKC; lower case; hyphens and dashes become spaces; apostrophes stay inside words, curly ones made straight; other punctuation, symbols
    and control characters go and leave no space ("1,000" is "1000"). Letters, numbers and combining marks of every script stay.
    """
    if PLAIN.fullmatch(text):
        return text
    # Before NFKC for the acute, of which it makes space + combining mark; after it for ŉ, of which it makes modifier apostrophe + n.
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).translate(APOSTROPHES).lower()
    text = OUTER_APOSTROPHE.sub("", "".join(map(_normalize_character, text)))
    # Removals can bring a letter next to an accent ("e.\u0301"); composing them keeps normalize idempotent.
    return " ".join(unicodedata.normalize("NFKC", text).split())


# -------------------------------------------------------------------------------------------- edit alignment
# jiwer's: a plain space, or two or more whitespace characters of any kind, part words; a single tab, newline or no-break space does not.
WORD_SEPARATOR = re.compile(r"\s{2,}| ")


def _split_words(text):
    text = text.strip()
    return WORD_SEPARATOR.split(text) if text else []


def edit_counts(ref, hyp):
    """(substitutions, deletions, insertions), in words, of a minimal alignment that turns `ref` into `hyp`.

    Strings as given (no normalisation), split as jiwer does. Of the alignments with the fewest edits, the one that jiwer 4 (rapidfuzz)
    reports. Time and memory grow as the product of the lengths, by a bit an entry of the table of costs (see `_edits`).
    """
    return _edits(_split_words(ref), _split_words(hyp))


def _edits(ref, hyp):
    """edit_counts of two sequences of anything: words, or the characters of a string.

    Column j of the table of costs, of the first i items of ref against the first j of hyp, as two integers: bit i of `up` (`down`)
    says that cost[i + 1] is cost[i] plus (minus) 1.  A few operations on whole integers make the next column (Myers 1999, in the
    form of Hyyro 2003): rewards are what training waits for.
    """
    if ref == hyp:  # the commonest case late in training
        return 0, 0, 0
    # Some minimal alignment matches what is shared at both ends.  Leaving it out is faster and, at the end, part of
    # the tie-breaking: "c b e" -> "b e a e" is (2, 0, 1) with e and e matched, else (0, 1, 2).
    start, ref_end, hyp_end = 0, len(ref), len(hyp)
    while start < min(ref_end, hyp_end) and ref[start] == hyp[start]:
        start += 1
    while start < min(ref_end, hyp_end) and ref[ref_end - 1] == hyp[hyp_end - 1]:
        ref_end, hyp_end = ref_end - 1, hyp_end - 1
    ref, hyp = ref[start:ref_end], hyp[start:hyp_end]

    where, full = {}, (1 << len(ref)) - 1
    for i, word in enumerate(ref):
        where[word] = where.get(word, 0) | 1 << i  # bit i: word i of ref is this one
    up, down = full, 0                             # before the first word of hyp: costs 0, 1, 2 ..
    columns = [(up, down)]
    for word in hyp:
        same = where.get(word, 0)
        # `up` and `down` are still the column before. diagonal, bit i: cost[i + 1] is the column before's cost[i] (the sum's carry
        # runs on along `up`). more (less), bit i: cost[i] is the column before's cost[i] plus (minus) 1; row 0 always has more.
        diagonal = (((same & up) + up) ^ up) | same | down
        more, less = (down | full & ~(diagonal | up)) << 1 | 1, (up & diagonal) << 1
        up, down = full & (less | ~(diagonal | more)), more & diagonal
        columns.append((up, down))

    # Walk back from the end.  Ties, as rapidfuzz breaks them: a deletion wherever one is optimal; else an
    # insertion, unless a substitution costs the same (an insertion does beat a match); else the diagonal.
    substitutions = deletions = insertions = 0
    i, j = len(ref), len(hyp)
    while i and j:
        if columns[j][0] >> i - 1 & 1:             # cost[i - 1][j] < cost[i][j]
            deletions += 1
            i -= 1
        elif columns[j - 1][1] >> i - 1 & 1:       # cost[i][j - 1] < cost[i - 1][j - 1]
            insertions += 1
            j -= 1
        else:
            i, j = i - 1, j - 1
            substitutions += ref[i] != hyp[j]
    return substitutions, deletions + i, insertions + j


# ------------------------------------------------------------------------------------------- word error rate
def _as_lists(refs, hyps):
    refs, hyps = ([texts] if isinstance(texts, str) else list(texts) for texts in (refs, hyps))
    if len(refs) != len(hyps):
        raise ValueError(f"{len(refs)} references but {len(hyps)} hypotheses: they must pair up")
    return refs, hyps


def word_error_rate(refs, hyps):
    """Word error rate in percent: 100 * (all edits) / (all reference words), over the whole corpus.

    Lists of strings (or two strings), as given: `normalize` them first. Can exceed 100. An empty reference adds its hypothesis's words as
    insertions; without any reference words the divisor is 1, as in jiwer 4. ValueError if lengths differ.
    """
    refs, hyps = _as_lists(refs, hyps)
    errors = sum(sum(edit_counts(ref, hyp)) for ref, hyp in zip(refs, hyps))
    return 100 * (errors / max(1, sum(len(_split_words(ref)) for ref in refs)))


# ------------------------------------------------------------------------------------------------------ BLEU
MAX_ORDER = 4  # BLEU-4, as everywhere
# The 13a tokeniser (NIST's mteval-v13a.pl, sacreBLEU's default), as rewriting steps in their order.
LITERALS_13A = [("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")]
# Matches consume their neighbours, so that runs such as "..." split as in 13a; lookarounds would not.
PATTERNS_13A = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"([!-&(-+/:-@[-`{-~])", r" \1 "),  # ASCII punctuation, all but ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),      # period or comma, unless a digit precedes
    (r"([.,])([^0-9])", r" \1 \2"),      # period or comma, unless a digit follows
    (r"([0-9])-", r"\1 - "),             # hyphen after a digit
]]


def _tokenize_13a(text):
    if PLAIN.fullmatch(text):
        return text.split()
    text = text.rstrip()
    for old, new in LITERALS_13A:
        text = text.replace(old, new)
    text = f" {text} "  # so that the first and last characters have neighbours
    for pattern, replacement in PATTERNS_13A:
        text = pattern.sub(replacement, text)
    return text.split()


@functools.lru_cache(maxsize=1024)  # the samples of a group share their reference
def _ngrams(text):
    """How many tokens a text has, and how often each of its n-grams, n = 1..4, is there; kept, so not to be changed."""
    tokens = _tokenize_13a(text)
    return len(tokens), Counter(gram for n in range(1, MAX_ORDER + 1) for gram in zip(*(tokens[i:] for i in range(n))))


def bleu_counts(ref, hyp):
    """[tokens of `ref`, tokens of `hyp`, m_1, t_1, m_2, t_2, m_3, t_3, m_4, t_4]: of the t_n n-grams of `hyp`, m_n are in `ref`, where an
    n-gram counts no more often than `ref` has it. These lists add up over a corpus."""
    (ref_length, wanted), tokens = _ngrams(ref), _tokenize_13a(hyp)
    left, matched = dict(wanted), [0] * MAX_ORDER
    for i in range(len(tokens)):
        for n in range(min(MAX_ORDER, len(tokens) - i)):
            gram = tuple(tokens[i:i + n + 1])
            if gram not in left:  # then none of the longer n-grams that begin here is in ref: most of a wrong hypothesis is skipped
                break
            if left[gram]:        # clipped: no more often than in the reference
                left[gram] -= 1
                matched[n] += 1
    return [ref_length, len(tokens), *(x for n, match in enumerate(matched) for x in (match, max(0, len(tokens) - n)))]


def bleu_of(counts, effective_order):
    """BLEU in [0, 1] of bleu_counts, or of sums of them. effective_order: orders that `hyp` is too short for are left out; else it is 0."""
    ref_length, hyp_length, matched, totals = counts[0], counts[1], counts[2::2], counts[3::2]
    if not any(matched):
        return 0.0
    log_precisions, smoothing = [], 1.0
    for match, total in zip(matched, totals):
        if total == 0:  # the hypothesis is too short for n-grams of this order
            break
        if match == 0:  # exponential smoothing: the k-th order without a match counts as 1 / 2**k matches
            smoothing /= 2
            match = smoothing
        log_precisions.append(math.log(match / total))
    if len(log_precisions) < MAX_ORDER and not effective_order:
        return 0.0
    log_brevity_penalty = min(0.0, 1 - ref_length / hyp_length)
    return math.exp(log_brevity_penalty + sum(log_precisions) / len(log_precisions))


def sentence_bleu(ref, hyp):
    """BLEU of one sentence against one reference, in [0, 1]: sacreBLEU's sentence_bleu(hyp, [ref]).score / 100; 0 if `hyp` is empty.

    13a tokens of the strings as given (case and punctuation count), orders 1-4 (Papineni et al. 2002), exponential smoothing of orders
    without a match (Chen and Cherry 2014, method 3), and effective order: orders longer than the hypothesis are left out of the mean.
    """
    return bleu_of(bleu_counts(ref, hyp), effective_order=True)


def corpus_bleu(refs, hyps):
    """BLEU of a corpus, one reference each, in [0, 100]: sacreBLEU's corpus_bleu(hyps, [refs]).score.

    As `sentence_bleu`, of summed counts, without effective order (no 4-grams: 0). ValueError if lengths differ or there are none.
    """
    refs, hyps = _as_lists(refs, hyps)
    if not refs:
        raise ValueError("corpus BLEU of no sentences is undefined")
    counts = [sum(column) for column in zip(*map(bleu_counts, refs, hyps))]
    return 100 * bleu_of(counts, effective_order=False)


# ------------------------------------------------------------------------------------------- ROUGE and METEOR
ROUGE_WORD = re.compile("[a-z0-9]+")  # rouge-score's: letters beyond ASCII separate words


def rouge_n(ref, hyp, n):
    """ROUGE-n of one pair (Lin 2004), in [0, 1]: the F-measure of n-grams, 2 matched / (all of both), clipped as in BLEU."""
    ref, hyp = (Counter(zip(*(words[i:] for i in range(n)))) for words in (ROUGE_WORD.findall(t.lower()) for t in (ref, hyp)))
    return 2 * (ref & hyp).total() / max(1, ref.total() + hyp.total())


def rouge_l(ref, hyp):
    """ROUGE-L of one pair (Lin 2004), in [0, 1]: the F-measure of the longest common subsequence of words."""
    ref, hyp = (ROUGE_WORD.findall(text.lower()) for text in (ref, hyp))
    row = [0] * (len(hyp) + 1)  # row[j]: the longest of ref so far and of hyp[:j]
    for word in ref:
        diagonal = 0
        for j, other in enumerate(hyp, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / max(1, len(ref) + len(hyp))


def meteor(ref, hyp, alpha=0.9, beta=3.0, gamma=0.5):
    """METEOR of one pair (Banerjee and Lavie 2005; these weights: Lavie and Agarwal 2007), in [0, 1).

    Exact matches of lower-case words only, split at white space: no stems, no WordNet, so figures lie below published
    ones. F = P R / (alpha P + (1 - alpha) R), times 1 - gamma (chunks / matches) ** beta, where a chunk is a run of
    matches that are neighbours in both. Of equal words the last pair up first, as in NLTK: not always the fewest chunks.
    """
    ref, hyp = ref.lower().split(), hyp.lower().split()
    places = {}
    for i, word in enumerate(ref):
        places.setdefault(word, []).append(i)
    pairs = [(j, places[hyp[j]].pop()) for j in reversed(range(len(hyp))) if places.get(hyp[j])]
    if not pairs:
        return 0.0
    chunks = 1 + sum(a[0] - b[0] != 1 or a[1] - b[1] != 1 for a, b in zip(pairs, pairs[1:]))
    precision, recall = len(pairs) / len(hyp), len(pairs) / len(ref)
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    return mean * (1 - gamma * (chunks / len(pairs)) ** beta)


# --------------------------------------------------------------------------------------------------- REWARDS
def error_reward(ref, hyp):
    """-(S + D + I) / N of two sequences, lists of words or a string's characters, N = max(1, len(ref)). At most 0, not bounded below."""
    return -sum(_edits(ref, hyp)) / max(1, len(ref))


# Rewards by name.  To add one, write a function of (ref, hyp) that returns a float, higher for better, and
# name it here; for instance, one for hypotheses that start as the reference does:
#     "first": lambda ref, hyp: float(normalize(ref).split()[:1] == normalize(hyp).split()[:1]),
REWARDS = {
    "wer": lambda ref, hyp: error_reward(normalize(ref).split(), normalize(hyp).split()),
    "em": lambda ref, hyp: float(normalize(ref) == normalize(hyp)),
    "ed": lambda ref, hyp: float(-sum(_edits(normalize(ref).split(), normalize(hyp).split()))),
    "cer": lambda ref, hyp: error_reward(normalize(ref), normalize(hyp)),
    "bleu": sentence_bleu,
    "rouge1": lambda ref, hyp: rouge_n(ref, hyp, 1), "rouge2": lambda ref, hyp: rouge_n(ref, hyp, 2), "rougeL": rouge_l,
    "meteor": meteor,
}


def parse_reward(spec):
    """"wer+0.5*em" -> a function of (ref, hyp), the weighted sum. ValueError, naming the term, if it is none."""
    terms = []
    for term in spec.split("+"):
        weight, _, name = term.strip().rpartition("*")
        try:
            terms.append((float(weight or 1), REWARDS[name.strip()]))
            if not math.isfinite(terms[-1][0]):
                raise ValueError
        except (KeyError, ValueError):
            raise ValueError(f"{term.strip()!r} is no reward; there are {', '.join(REWARDS)} (rewards.py, REWARDS) and sums "
                             "such as wer+0.5*em") from None
    return lambda ref, hyp: sum(weight * reward(ref, hyp) for weight, reward in terms)
