"""Data: an endless made-up spoken corpus, and a reader for recorded corpora.

The made-up corpus is English from a small grammar, spoken by a formant synthesiser in many voices, under three conditions: `clean`,
`hard` (noise, quick odd voices, unguessable text) and `ood` (echo, babble, long stretches without speech, voices out of the training
range; never trained on as such, one part of it alone by --domain). It needs no download and no disk: `utterance(split, index)` makes an
item whenever asked, the same every time.
Recorded corpora come in by `read_data(path)` and `load_audio(file)`.

    python data.py --listen DIR           write some utterances of each condition as wav, print a table
    python data.py --check PATH           print what a recorded corpus (manifest or LibriSpeech tree) holds

Letters in shape comments: n samples, T frames of 5 ms, K frequency bins, S segments (pieces of phones).
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

SAMPLE_RATE = 16000                          # Hz, everywhere in this repository
HOP = 80                                     # samples per synthesis frame: 5 ms
FFT = 6 * HOP                                # a frame of 2 hops plus 20 ms for the resonances to ring out
MAX_SECONDS = 8.0                            # longer utterances are drawn again
LONGEST_SECONDS = 60                         # of recorded speech: attention's memory grows with the square, half a GB here
SPLITS = ("train", "dev", "test")            # 80, 10 and 10% of all sentences; none is in two
VOICES = {"train": 400, "dev": 40, "test": 40, "ood": 40, "babble": 40}  # speakers; no voice is in two of these pools
HARD_SHARE = 0.7                             # share of hard items in train; the others are clean
SNR = {"clean": (20.0, 40.0), "ood": (6.0, 20.0), "hard": (-6.0, 8.0)}  # dB, where somebody speaks; hard's is the knob for how hard it is
STRETCH = {"hard": ((0.2, 0.8), 0.4), "ood": ((0.8, 2.5), 0.5), "pauses": ((0.8, 2.5), 1.0)}  # s without speech; chance at each of 3 places
VIEW = dict(speed=(0.88, 1.12), snr=(3.0, 25.0))                   # of recorded speech: times its speed; dB of the noise
HARD_VIEW = dict(speed=(0.8, 1.25), snr=(-5.0, 10.0))              # the same for GRPO and its control
LOOKED_UP = 100_000                          # audio files of a manifest that are looked up; a million would take minutes on a network disk
OOD_PARTS = ("far", "babble", "pauses")      # of ood, alone, in ordinary voices
CONDITIONS = (None, "clean", "hard", "ood", *OOD_PARTS)

# ---------------------------------------------------------------------------------------------------- text
def table(text):
    """Entries of a key and its values, divided by `;` or a line's end: {key: [value, ...]}."""
    return {key: values for key, *values in map(str.split, text.replace("\n", ";").split(";"))}


# word and phones (ARPAbet without stress, AX for the reduced vowel); the groups feed the grammar below.
LEXICON_TEXT = {
    "digits": """zero Z IH R OW;one W AH N;two T UW;three TH R IY;four F AO R;five F AY V;six S IH K S
        seven S EH V AX N;eight EY T;nine N AY N""",
    "numbers": """ten T EH N;thirteen TH ER T IY N;thirty TH ER T IY;fourteen F AO R T IY N;forty F AO R T IY
        fifteen F IH F T IY N;fifty F IH F T IY""",
    "letters": """a EY;b B IY;c S IY;d D IY;e IY;f EH F;k K EY;m EH M;n EH N;s EH S;t T IY;x EH K S""",
    "names": """ann AE N;dan D AE N;jan JH AE N;anna AE N AX;maria M AX R IY AX;mario M AA R IY OW
        mary M EH R IY;harry HH EH R IY;ben B EH N;ken K EH N;bill B IH L;will W IH L;tim T IH M;jim JH IH M
        tom T AA M""",
    "words": """turn T ER N;on AA N;off AO F;the DH AX;in IH N;for F AO R;at AE T;and AE N D;is IH Z
        light L AY T;lights L AY T S;night N AY T;fan F AE N;lamp L AE M P;heater HH IY T ER
        radio R EY D IY OW;kitchen K IH CH AX N;bedroom B EH D R UW M;garage G AX R AA ZH;office AO F AX S
        play P L EY;stop S T AA P;start S T AA R T;set S EH T;alarm AX L AA R M;timer T AY M ER
        minutes M IH N AX T S;hours AW ER Z;call K AO L;text T EH K S T;open OW P AX N;close K L OW Z
        door D AO R;window W IH N D OW;gate G EY T;what W AH T;weather W EH DH ER;today T AX D EY
        tomorrow T AX M AA R OW;next N EH K S T;song S AO NG;music M Y UW Z IH K;volume V AA L Y UW M;up AH P
        down D AW N;cancel K AE N S AX L;send S EH N D;message M EH S AX JH;read R IY D;news N UW Z;red R EH D
        green G R IY N;blue B L UW;black B L AE K;white W AY T;pin P IH N;pen P EH N;bat B AE T;cat K AE T
        sheep SH IY P;ship SH IH P;boy B OY;look L UH K"""}
LEXICON_TABLES = {group: table(text) for group, text in LEXICON_TEXT.items()}
GROUPS = {group: list(words) for group, words in LEXICON_TABLES.items()}
LEXICON = {word: phones for words in LEXICON_TABLES.values() for word, phones in words.items()}
RANDOM_WORDS = [w for w in LEXICON if w not in {"for", "the"}]       # not what sounds like another (four) or is weak
WEAK = set("the in for at and is".split())                         # spoken shorter, without a pitch accent
# Each command has 15 forms and more: of one with two, the form that falls to test would be a tenth of all test sentences.
# Beside it its German in up to three wordings, as translators differ: with one alone RL would have nothing to choose. There
# :FORM asks for a row of FORMS ("look at the red pen": COLOUR+OBJECT:A is FORMS["A"]["m"] with "rot", and "stift": "den roten stift");
# SWITCH and UPDOWN are verb prefixes; what follows ~ is written on to the word before ("SWITCH ~schalten": "einschalten").
COMMANDS = """turn SWITCH the DEVICE in the ROOM | schalte DEVICE:a ROOM:d SWITCH | DEVICE:a ROOM:d SWITCH ~schalten
        | kannst du DEVICE:a ROOM:d SWITCH ~schalten
    turn SWITCH the DEVICE for NAME | schalte DEVICE:a für NAME SWITCH | DEVICE:a für NAME SWITCH ~schalten
        | kannst du DEVICE:a für NAME SWITCH ~schalten
    set alarm for NUMBER | stelle den wecker auf NUMBER uhr | den wecker auf NUMBER uhr stellen | weck mich um NUMBER uhr
    set timer for NUMBER UNIT | stelle den timer auf NUMBER UNIT | den timer auf NUMBER UNIT stellen
        | kannst du den timer auf NUMBER UNIT stellen
    stop the timer in NUMBER UNIT | halte den timer in NUMBER UNIT an | den timer in NUMBER UNIT anhalten
        | stoppe den timer in NUMBER UNIT
    start timer for NUMBER UNIT | starte einen timer für NUMBER UNIT | einen timer für NUMBER UNIT starten
        | kannst du einen timer für NUMBER UNIT starten
    play THING for NAME | spiele THING:a für NAME | THING:a für NAME spielen | spiel NAME THING:a vor
    play the next song for NAME | spiele das nächste lied für NAME | das nächste lied für NAME spielen
        | spiel NAME das nächste lied vor
    play song NUMBER | spiele lied NUMBER | lied NUMBER spielen | spiel das lied NUMBER
    turn the volume UPDOWN in NUMBER minutes | dreh die lautstärke in NUMBER minuten UPDOWN
        | die lautstärke in NUMBER minuten UPDOWN ~drehen | dreh in NUMBER minuten die lautstärke UPDOWN
    volume NUMBER | lautstärke NUMBER | lautstärke auf NUMBER | stell die lautstärke auf NUMBER
    call NAME | ruf NAME an | NAME anrufen | kannst du NAME anrufen
    call NAME DAY | ruf NAME DAY an | NAME DAY anrufen | ruf DAY NAME an
    text NAME and NAME | schreibe NAME und NAME | NAME und NAME schreiben | schreib an NAME und NAME
    read the message for NAME | lies die nachricht für NAME vor | die nachricht für NAME vorlesen
        | kannst du die nachricht für NAME vorlesen
    send NAME the message DAY | sende NAME DAY die nachricht | NAME DAY die nachricht senden | schick NAME DAY die nachricht
    open the OPENING for NAME | öffne OPENING:a für NAME | OPENING:a für NAME öffnen | mach OPENING:a für NAME auf
    close the OPENING in the ROOM | schließe OPENING:a ROOM:d | OPENING:a ROOM:d schließen | mach OPENING:a ROOM:d zu
    open the OPENING and close the OPENING | öffne OPENING:a und schließe OPENING:a | OPENING:a öffnen und OPENING:a schließen
        | mach OPENING:a auf und OPENING:a zu
    what is the weather in NUMBER hours | wie ist das wetter in NUMBER stunden | wie wird das wetter in NUMBER stunden
        | wie sieht das wetter in NUMBER stunden aus
    read the news for NAME | lies NAME die nachrichten vor | NAME die nachrichten vorlesen | lies die nachrichten für NAME vor
    look at the COLOUR OBJECT | sieh dir COLOUR+OBJECT:A an | schau dir COLOUR+OBJECT:A an | COLOUR+OBJECT:A ansehen
    cancel the alarm at NUMBER DAY | lösche den wecker DAY um NUMBER uhr | den wecker DAY um NUMBER uhr löschen
        | stell den wecker DAY um NUMBER uhr ab
    is the OPENING in the ROOM open | ist OPENING:n ROOM:d offen | steht OPENING:n ROOM:d offen | ist OPENING:n ROOM:d auf
    COLOUR OBJECT and COLOUR OBJECT | COLOUR+OBJECT:N und COLOUR+OBJECT:N
    set the lights in the ROOM COLOUR | stelle die lichter ROOM:d auf COLOUR | die lichter ROOM:d auf COLOUR stellen
        | mach die lichter ROOM:d COLOUR"""
COMMANDS = [[side.strip() for side in line.split("|")] for line in re.sub(r"\n +\|", " |", COMMANDS).splitlines()]
SLOTS = {k: v.split() for k, v in {
    "SWITCH": "on off", "DEVICE": "light lights lamp fan heater radio alarm", "UNIT": "minutes hours",
    "ROOM": "kitchen bedroom garage office", "THING": "music news song radio message", "UPDOWN": "up down",
    "DAY": "today tomorrow", "OPENING": "door window gate garage", "OBJECT": "pin pen bat cat sheep ship light",
    "COLOUR": "red green blue black white"}.items()} | {
    "NAME": GROUPS["names"], "NUMBER": GROUPS["digits"][1:] + GROUPS["numbers"]}


def sentence(rng, hard):
    """A sentence of lower-case lexicon words without punctuation. `hard`: mostly strings nobody can guess."""
    kind = rng.choice(5, p=(0.20, 0.25, 0.15, 0.15, 0.25) if hard else (0.56, 0.14, 0.08, 0.12, 0.10))
    if kind == 0:                            # a command; else digits, letters, names, or words at random
        words = COMMANDS[rng.integers(len(COMMANDS))][0].split()
        return " ".join(str(rng.choice(SLOTS[w])) if w in SLOTS else w for w in words)
    group, least, most = [(GROUPS["digits"], 3, 5), (GROUPS["letters"], 2, 4), (GROUPS["names"], 2, 4),
                          (RANDOM_WORDS, 2, 5)][kind - 1]
    return " ".join(rng.choice(group, rng.integers(least, most + 1)))


GERMAN_WORDS = dict(pair.split(":") for pair in """on:ein off:aus up:hoch down:herunter today:heute tomorrow:morgen zero:null
    one:eins two:zwei three:drei four:vier five:fünf six:sechs seven:sieben eight:acht nine:neun ten:zehn thirteen:dreizehn
    thirty:dreißig fourteen:vierzehn forty:vierzig fifteen:fünfzehn fifty:fünfzig red:rot green:grün blue:blau black:schwarz
    white:weiß minutes:minuten hours:stunden""".split())
GERMAN_NOUNS = table("""light n licht;lights p lichter;lamp f lampe;fan m ventilator;heater f heizung;radio n radio;alarm m wecker
    kitchen f küche;bedroom n schlafzimmer;garage f garage;office n büro;door f tür;window n fenster;gate n tor;pin f nadel
    pen m stift;bat m schläger;cat f katze;sheep n schaf;ship n schiff;music f musik;news p nachrichten;song n lied
    message f nachricht""")
# What stands before a noun, by its gender or p, plural. n, a, d: the article in the nominative, in the accusative, in the dative after
# "in"; with a colour, A: article and colour in the accusative, N: the colour alone in the nominative.
FORMS = {"n": dict(m="der", f="die", n="das", p="die"), "a": dict(m="den", f="die", n="das", p="die"),
         "d": dict(m="im", f="in der", n="im", p="in den"),
         "A": dict(m="den {}en", f="die {}e", n="das {}e"), "N": dict(m="{}er", f="{}e", n="{}es")}


def translations(text):
    """The German wordings of a command, a digit string or a string of names, as a synchronous grammar has them: with their own word
    order, articles, cases and endings. [] for what has no fluent translation: letters and words at random."""
    words = text.split()
    for english, *wordings in COMMANDS:
        names = english.split()
        if len(names) == len(words) and all(word in SLOTS.get(name, [name]) for name, word in zip(names, words)):
            return [german_command(wording, zip(names, words)) for wording in wordings]
    if any(set(words) <= set(GROUPS[group]) for group in ("digits", "names")):
        return [" ".join(GERMAN_WORDS.get(word, word) for word in words)]
    return []


def german(text):
    """One of the `translations`, by a hash of the sentence, so that no model can tell which; None where there is none."""
    wordings = translations(text)
    return wordings[zlib.crc32(f"{text} in German".encode()) % len(wordings)] if wordings else None


def german_command(template, spoken):
    """Fills the slots of a German command with what is spoken, (slot, English word) pairs, each word used once, in their order."""
    out, said = [], {}
    for name, word in spoken:
        said.setdefault(name, []).append(word)
    for token in template.split():
        names, _, form = token.partition(":")
        *colour, word = [said[name].pop(0) if name in SLOTS else name for name in names.split("+")]
        if form:
            gender, word = GERMAN_NOUNS[word]
            out.append(FORMS[form][gender].format(*(GERMAN_WORDS[c] for c in colour)))
        out.append(GERMAN_WORDS.get(word, word))
    text = " ".join(out).replace(" ~", "").replace("eins uhr", "ein uhr")
    return re.sub(r"\b(in )?eins (minute|stunde)n", lambda one: ("in einer " if one[1] else "eine ") + one[2], text)


TASKS = ("asr", "ast", "sqa")


def instruct(task, lang="de", question=None):
    """What a task's prompt says before the speech; None for ASR, whose words are the paper's (model.INSTRUCTION). 2509.16990 has the
    speech first; here all tasks have the order of 2509.01939, and so speech is heard with the question in mind."""
    return {"asr": None, "ast": f"translate into {lang}", "sqa": question and f"answer the question {question}"}[task]


def pose(item, task, lang="de"):
    """Adds to an item what a task asks of it: `prompt` (None: the paper's, for ASR) and `target`, the text that the model is to write.
    ast wants `translation`, a string or an object by language; sqa wants `question` and `answer`. None for an item without."""
    target = item.get({"asr": "text", "ast": "translation", "sqa": "answer"}[task])
    item["prompt"] = instruct(task, lang, item.get("question"))
    item["target"] = target.get(lang) if isinstance(target, dict) else target
    return item if item["target"] and (item["prompt"] or task == "asr") else None


# What a command can be asked about: the words before a slot; the slot; the question; three wordings of the answer, _ for the word in it.
FACTS = [("", "NAME", "who is named", "the one who is named is _;_ is named;it is _ who is named"),
         ("in the", "ROOM", "which room is meant", "the room is the _;the _ is meant;it is the _"),
         ("", "NUMBER", "which number is said", "the number is _;_ is said;it is the number _"),
         ("", "DAY", "which day is meant", "it is meant for _;_ is meant;the day is _"),
         ("open the", "OPENING", "what is opened", "it is the _;the _ is opened;what is opened is the _"),
         ("close the", "OPENING", "what is closed", "it is the _;the _ is closed;what is closed is the _"),
         ("", "COLOUR", "which colour is named", "the colour is _;_ is named;it is _")]


def questions(text):
    """Questions about a sentence of the corpus with answers in full sentences: [(question, answer), ...], three at least. Answers are
    free-form, as LibriSQA's: a hash of sentence and question chooses one of three wordings, so that no model can tell which."""
    words = text.split()
    kind = next((group for group in ("digits", "letters", "names") if set(words) <= set(GROUPS[group])), "words")
    count = SLOTS["NUMBER"][len(words) - 1] if len(words) <= 10 else "many"    # they begin with one, two, .. ten
    asked = [(f"what is the {place} of the {kind}",
              f"the {place} of the {kind} is _;_ is the {place} of the {kind};the {place} one is _", word)
             for place, word in (("first", words[0]), ("last", words[-1]))]
    asked.append((f"how many {kind} are there", f"there are _ {kind};_ {kind} are there;it has _ {kind}", count))
    for before, slot, question, answers in FACTS if kind == "words" else ():
        lead = before.split()
        found = [word for i, word in enumerate(words) if word in SLOTS[slot] and words[i - len(lead):i] == lead]
        if len(found) == 1:
            asked.append((question, answers, found[0]))
    choice = lambda question: zlib.crc32(f"{text} {question}".encode()) % 3
    return [(question, answers.split(";")[choice(question)].replace("_", word)) for question, answers, word in asked]


def split_of(text):
    """The split a sentence belongs to, by a hash that no seed changes: the splits can share no sentence."""
    bucket = zlib.crc32(text.encode()) % 100
    return "train" if bucket < 80 else "dev" if bucket < 90 else "test"


def sentence_in(split, rng, hard, task="asr"):
    """`sentence`, drawn again until it belongs to `split` and, for translation, until it has one."""
    while split_of(text := sentence(rng, hard)) != split or task == "ast" and german(text) is None:
        pass
    return text


# --------------------------------------------------------------------------------------------- synthesiser
# Vowels: ms, F1-F3 at the start and at the end (Hz, a man's voice).
VOWELS = table("""IY 140 310 2150 2960 290 2250 3000;IH 100 410 1850 2570 450 1750 2570
    EY 170 480 1780 2520 330 2120 2650;EH 115 540 1750 2500 600 1640 2500
    AE 160 640 1700 2430 680 1580 2450;AA 160 720 1180 2550 720 1200 2550
    AO 160 590 900 2550 610 960 2550;AH 110 630 1220 2550 620 1240 2550
    AX 65 500 1420 2500 500 1420 2500;OW 170 540 1050 2350 420 820 2300
    UH 100 450 1080 2350 470 1120 2350;UW 150 330 1150 2250 310 950 2200
    ER 160 470 1270 1620 450 1300 1600;AY 210 700 1200 2550 380 2000 2600
    AW 210 700 1300 2550 420 900 2350;OY 210 530 880 2400 370 1900 2500""")
# Consonants: ms, F1-F3 to glide to, their widths; voice dB, breath dB, friction dB (against a vowel; 0 is none of it), centre and
# width of the friction's band; the dip that a nasal's closed mouth makes (Hz; 0: not a nasal). Of stops, it is the closure's ms and widths.
CONSONANTS = table("""W 85 290 620 2150 70 100 160 -6 0 0 0 0 0;Y 75 260 2150 3020 70 100 160 -6 0 0 0 0 0
    R 85 320 1080 1420 70 100 160 -6 0 0 0 0 0;L 80 330 1050 2850 70 100 160 -6 0 0 0 0 0
    M 110 300 1150 2150 100 200 250 -5 0 0 0 0 1000;N 105 300 1600 2600 100 200 250 -5 0 0 0 0 1600
    NG 95 300 2000 2700 100 200 250 -5 0 0 0 0 2800;HH 75 0 0 0 200 120 200 0 -17 0 0 0 0
    F 95 340 1100 2080 200 150 250 0 0 -27 5000 5000 0;V 70 270 1100 2080 90 120 200 -9 0 -32 5000 5000 0
    TH 95 320 1350 2540 200 150 250 0 0 -29 6500 3500 0;DH 50 290 1350 2540 90 120 200 -9 0 -34 6000 4000 0
    S 120 320 1500 2600 200 150 250 0 0 -11 6300 1400 0;Z 90 260 1500 2600 90 120 200 -14 0 -16 6300 1400 0
    SH 120 320 1850 2650 200 150 250 0 0 -10 3300 1100 0;ZH 90 270 1850 2650 90 120 200 -13 0 -15 3200 1100 0
    P 75 300 950 2150 80 200 300 0 -22 -20 1200 2500 0;B 70 220 950 2150 80 200 300 -20 0 -22 1000 2500 0
    T 65 300 1750 2700 80 200 300 0 -22 -10 5000 2200 0;D 60 220 1750 2700 80 200 300 -20 0 -15 4500 2200 0
    K 70 300 1990 2500 80 200 300 0 -21 -12 2000 700 0;G 65 220 1990 2500 80 200 300 -20 0 -16 2000 700 0
    CH 55 320 1850 2700 80 200 300 0 -30 -9 3400 1200 0;JH 50 240 1850 2700 80 200 300 -20 0 -13 3300 1200 0""")
VOT = {"P": 45, "T": 50, "K": 60, "B": 4, "D": 8, "G": 15, "CH": 75, "JH": 50}   # ms from burst to voice
VOWELS, CONSONANTS = ({phone: np.array(values, float) for phone, values in rows.items()} for rows in (VOWELS, CONSONANTS))
for values in CONSONANTS.values():
    values[7:10] = np.where(values[7:10] < 0, 10 ** (values[7:10] / 20), 0.0)
Z = np.exp(-2j * np.pi * np.outer(np.arange(3), np.arange(FFT // 2 + 1)) / FFT).astype(np.complex64)  # (3, K): z**-k
BINS = np.arange(FFT // 2 + 1, dtype=np.float32) * SAMPLE_RATE / FFT                 # (K,) Hz
WINDOW = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)           # windows one hop apart add up to 1


def speaker_voice(pool, index, condition):
    """Voice `index` of a pool in VOICES, each of which has random streams of its own: f0 (Hz), range (of pitch, as a share of f0),
    tract (formants as a multiple of a man's), rate (of speech), breath (share of noise in the voice), tilt (Hz above which the voice
    falls off). Under clean and hard it is the same person, only quicker and odder under hard."""
    rng = np.random.default_rng([1000 + list(VOICES).index(pool), index])
    f0, tract = [(rng.uniform(85, 145), rng.uniform(0.93, 1.08)),
                 (rng.uniform(160, 250), rng.uniform(1.08, 1.22)),
                 (rng.uniform(230, 310), rng.uniform(1.2, 1.32))][rng.choice(3, p=(0.48, 0.46, 0.06))]
    v = dict(f0=f0, range=rng.uniform(0.08, 0.25), tract=tract, rate=rng.uniform(0.88, 1.12),
             breath=rng.uniform(0.003, 0.03), tilt=rng.uniform(2500, 5000))
    if condition == "hard":
        v.update(rate=v["rate"] * rng.uniform(1.05, 1.45), range=v["range"] * rng.uniform(0.3, 2.0),
                 breath=rng.uniform(0.02, 0.3), tilt=rng.uniform(900, 5000))
    if condition == "ood":                   # each of the three lies outside what training voices have
        low = rng.random() < 0.5
        v.update(f0=rng.uniform(66, 82) if low else rng.uniform(312, 350), range=rng.uniform(0.26, 0.5),
                 tract=rng.uniform(0.87, 0.92) if low else rng.uniform(1.33, 1.39),
                 rate=rng.uniform(0.74, 0.86) if rng.random() < 0.7 else rng.uniform(1.63, 1.7))
    return v


def segment(ms, formants, voiced=0.0):
    """A row as in CONSONANTS, open as a vowel: ms, F1-F3 (Hz), their widths, amplitudes of voice, breath and friction (0-1), centre
    and width of the friction's band, the frequency of a nasal's dip (0: not a nasal). (13,)"""
    return np.array([ms, *formants, 55, 80, 130, voiced, 0, 0, 3000, 2000, 0])


def changed(seg, ms, parts, widths=None):
    """A copy of a segment (13,) that lasts `ms`, with its three amplitudes times `parts` and, if given, other widths."""
    new = seg.copy()
    new[0], new[4:7], new[7:10] = ms, seg[4:7] if widths is None else widths, seg[7:10] * parts
    return new


def phone_segments(phones, i, stretch):
    """The segments of phone i of a word: vowels glide, stops are a closure, a burst and a breath."""
    p, before, last = phones[i], phones[i - 1] if i else "", i == len(phones) - 1
    after = next((q for q in phones[i + 1:] if q in VOWELS), None)
    if p in VOWELS:
        ms, start, end = VOWELS[p][0] * stretch, VOWELS[p][1:4], VOWELS[p][4:7]
        if not last and phones[i + 1] in {"P", "T", "K", "CH", "F", "S", "TH"}:
            ms *= 0.8                        # short before voiceless sounds: the main cue of bat against bad
        return [segment(ms / 5, start + (end - start) * g, a) for g, a in ((0.0, 0.7), (0.1, 1), (0.4, 1), (0.8, 0.9), (1.0, 0.7))]
    seg = CONSONANTS[p].copy()
    near = VOWELS[after][1:4] if after else VOWELS[before][4:7] if before in VOWELS else VOWELS["AX"][1:4]
    if p in ("K", "G", "NG"):                # the tongue meets the palate where the vowel wants it
        f2 = 0.7 * near[1] + 500
        seg[2], seg[3], seg[10] = f2, max(f2 + 350, 2200), f2 + 100
    if p not in VOT:
        if p == "HH":                        # breath in the shape of the next vowel
            seg[1:4] = near
        elif i == 0 and not seg[12]:
            seg[0] *= 0.85
        return [seg]
    closed = changed(seg, seg[0], (1, 0, 0))
    if p in ("CH", "JH"):
        return [closed, changed(seg, VOT[p], (2, 0, 1), (150, 150, 250))]
    burst = changed(seg, 12, (1, 1, 0.6 if last else 1), (200, 150, 250))
    breath = VOT[p] * (0.35 if before == "S" or (after is None and not last) else 0.7 if last else 1.0)
    puff = changed(seg, breath, (1, 1, 0.1), (200, 150, 250))
    puff[1:4], puff[8] = (seg[1:4] + near) / 2, seg[8] or 0.05
    return [closed, burst, puff]


def silence(segments, seconds):
    """A pause: what was voiced before dies away first, since a voice cut off short sounds like a t or a p."""
    fade = [changed(segments[-1], 55, 0.5), changed(segments[-1], 55, 0.15)] if segments and segments[-1][7] > 0.3 else []
    return fade + [segment(1000 * seconds, segments[-1][1:4] if segments else (500, 1500, 2500))]


def timeline(text, v, rng, pauses):
    """All segments of a sentence (S, 13) and the middles and sizes of its pitch accents [(s, share), ...]."""
    words, segments, accents = text.split(), [], []
    for w, word in enumerate(words):
        phones = LEXICON[word]
        if pauses[w] > 0:
            segments += silence(segments, pauses[w])
        first = next(i for i, p in enumerate(phones) if p in VOWELS)
        for i, p in enumerate(phones):
            stretch = rng.uniform(0.9, 1.1) * (0.75 if word in WEAK else 1.0 if i == first else 0.85)
            final = i >= len(phones) - 2 and p in VOWELS
            stretch *= (1.35 if w == len(words) - 1 else 1.1) if final and word not in WEAK else 1.0
            new = phone_segments(phones, i, stretch)
            if pauses[w] > 0 and i == 0 and (new[0][7] > 0.3 or new[0][9] > 0):
                new = [changed(new[0], 18, 0.15), changed(new[0], 18, 0.5)] + new
            for seg in new:
                seg[0] /= v["rate"]
            if i == first and word not in WEAK:
                accents.append((sum(seg[0] for seg in segments) / 1000 + 0.05, rng.uniform(0.2, 1.0)))
            segments += new
    segments += silence(segments, pauses[-1])
    return np.array(segments), accents


def smooth(x, taps):
    """Hann-weighted running mean over `taps` frames, column by column, ends held. (T, c) -> (T, c)"""
    h = np.hanning(taps + 2)[1:-1]
    x = np.concatenate([x[:1].repeat(taps // 2, 0), x, x[-1:].repeat(taps // 2, 0)])
    return sum(w * x[k:len(x) - taps + 1 + k] for k, w in enumerate(h / h.sum()))


def pulses(f0, n, rng):
    """Train of unit-power pulses at pitch f0 (T,) in Hz, shared by the two samples around each. (n,)"""
    step = np.interp(np.arange(n + 1), np.arange(len(f0)) * HOP, f0) / SAMPLE_RATE
    phase = np.cumsum(step)
    at = np.flatnonzero(np.floor(phase[1:]) > np.floor(phase[:-1]))
    late = (phase[at + 1] % 1.0) / step[at + 1]                     # samples since the pulse was due, 0-1
    size = np.sqrt(1 / step[at]) * (1 + 0.04 * rng.standard_normal(len(at)))
    out = np.zeros(n + 1)
    out[at + 1] += size * (1 - late)
    out[at] += size * late
    return out[:n]


def synthesise(text, voice, rng, pauses=None):
    """Speak `text` (lexicon words) in `voice`: float32 (n,) at SAMPLE_RATE, peak 1, without noise.
    pauses: s of silence before each word and after the last (words + 1 of them); None draws natural ones.
    Raises KeyError for a word that is not in the lexicon."""
    if pauses is None:
        pauses = natural_pauses(len(text.split()), rng)
    seg, accents = timeline(text, voice, rng, pauses)
    ends = np.cumsum(seg[:, 0]) / 5                                 # in frames
    count = int(ends[-1]) + 1
    track = seg[np.searchsorted(ends, np.arange(count)).clip(max=len(seg) - 1)]       # (T, 13)
    shape = smooth(track[:, 1:7], 13)                               # 65 ms: how fast the mouth moves
    av, ah, af = smooth(track[:, 7:10], 3).T                        # (T,) each
    bands = smooth(track[:, 10:12] * track[:, 9:10], 3)             # the band travels with its friction
    nasal = smooth((track[:, 12:] > 0) * 1.0, 15)[:, 0]
    frames = np.arange(count) / 200                                 # (T,) s
    accent = sum(a * np.exp(-0.5 * ((frames - t) / 0.09) ** 2) for t, a in accents)
    wander = smooth(rng.standard_normal((count, 1)), 9)[:, 0]
    f0 = voice["f0"] * (1 + voice["range"] * (accent + 0.5 - frames / frames[-1]) + 0.012 * wander)
    f0 = np.maximum(f0, 40.0)

    n = (count + 1) * HOP
    source = np.stack([pulses(f0, n, rng), rng.standard_normal(n)]).astype(np.float32).reshape(2, -1, HOP)
    on = np.flatnonzero(av + ah + af > 1e-4)                        # the rest is silence: (T', ) of the T frames
    source = np.concatenate([source[:, on], source[:, on + 1]], -1) * WINDOW          # (2, T', 2 HOP)
    shape, av, ah, af, bands, nasal = shape[on], av[on], ah[on], af[on], bands[on], nasal[on]

    tract = voice["tract"]
    # fp32 throughout, and products written out: at this size BLAS threads would cost more than they bring.
    column = lambda x: x.astype(np.float32)[:, None]                # (T',) -> (T', 1)

    def response(hz, width):                                        # 1 / resonance, or a dip: (T',), (T',) -> (T', K)
        r = np.exp(-np.pi * width / SAMPLE_RATE)
        return 1 - column(2 * r * np.cos(2 * np.pi * hz / SAMPLE_RATE)) * Z[1] + column(r * r) * Z[2]

    upper = np.arange(3500, 7600 / tract, 1000) * tract             # resonances nobody steers, from F4 on
    mouth = 1 / np.prod(response(upper, 0.06 * upper), axis=0, keepdims=True).repeat(len(on), 0)      # (T', K)
    hum = np.flatnonzero(nasal > 0)                                 # a dip that a wide resonance cancels elsewhere
    dip = np.where(track[on, 12] > 0, track[on, 12], 1000.0)[hum] * tract
    mouth[hum] *= response(dip, 90 + 2500 * (1 - nasal[hum])) / response(dip, np.full(len(hum), 2590.0))
    for k in range(3):                                              # one by one: their product would need fp64
        mouth /= response(np.minimum(shape[:, k] * tract, 6500), shape[:, 3 + k] * tract)
    mouth /= np.abs(mouth[:, :1])                                   # gain 1 at 0 Hz

    pole = lambda hz: 1 - math.exp(-2 * math.pi * hz / SAMPLE_RATE) * Z[1]
    glottis = (1 - 0.97 * Z[1]) / (pole(100) * pole(200 + voice["f0"]) * pole(voice["tilt"]))
    voiced = mouth * glottis
    rms = lambda h: np.sqrt(np.mean(h.real ** 2 + h.imag ** 2, 1))  # (T',)
    loud = rms(voiced)                                              # levels are meant at the lips, so the
    voiced *= column(av / (loud ** 0.8 * np.median(loud) ** 0.2))   # vowels nearly even out
    noise = mouth * column((ah + voice["breath"] * av) / rms(mouth))
    hiss = np.flatnonzero(af > 1e-4)
    centre, width = (bands[hiss] / af[hiss, None]).astype(np.float32).T[:, :, None]
    band = np.exp(-0.5 * ((BINS - centre * tract ** 0.5) / width) ** 2) * (BINS > 300)
    noise[hiss] += band * column(af[hiss] / np.sqrt(np.mean(band ** 2, 1)))

    spec = np.fft.rfft(source, FFT)                                 # (2, T', K)
    pieces = np.zeros((count, FFT), np.float32)
    pieces[on] = np.fft.irfft(spec[0] * voiced + spec[1] * noise, FFT)
    out = np.zeros((count + FFT // HOP - 1, HOP), np.float32)
    for k in range(FFT // HOP):
        out[k:k + count] += pieces[:, k * HOP:(k + 1) * HOP]
    out = out.reshape(-1)[:n]
    return (out / np.abs(out).max()).astype(np.float32)


def natural_pauses(words, rng):
    """s of silence before each word and after the last, mostly 0 between words. (words + 1,)"""
    pauses = np.where(rng.random(words + 1) < 0.3, rng.uniform(0.03, 0.15, words + 1), 0.0)
    pauses[[0, -1]] = rng.uniform(0.05, 0.25, 2)
    return pauses


# ---------------------------------------------------------------------------------------------- conditions
def coloured_noise(n, rng, colours=("white", "pink", "brown", "band")):
    """Noise of unit power, float32 (n,), of one of the colours ("band": little else than a band of it)."""
    size = -(-n // 4096) * 4096              # quick to transform, and less to throw away than of a power of two
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    colour = str(rng.choice(colours))
    if colour == "band":
        centre = np.exp(rng.uniform(math.log(300), math.log(4000)))
        gain = np.exp(-0.5 * (np.log(np.maximum(hz, 20) / centre) / rng.uniform(0.3, 0.8)) ** 2) + 0.03
    else:
        gain = np.maximum(hz, 60) ** {"white": 0.0, "pink": -0.5, "brown": -1.0}[colour]
    spec = rng.standard_normal((2, len(hz)), dtype=np.float32)
    noise = np.fft.irfft((spec[0] + 1j * spec[1]) * gain, size)[:n]
    return (noise / noise.std()).astype(np.float32)


def uneven_noise(n, rng):
    """Coloured noise whose level wanders by some dB a few times a second, with some bursts. float32 (n,)"""
    points = max(2, int(n / SAMPLE_RATE * 3))
    level = np.interp(np.arange(n), np.linspace(0, n, points), rng.normal(0, rng.uniform(0, 5), points))  # dB
    for _ in range(rng.poisson(0.5 * n / SAMPLE_RATE)):
        start, length = rng.integers(n), int(rng.uniform(0.02, 0.15) * SAMPLE_RATE)
        level[start:start + length] += rng.uniform(4, 12)
    noise = coloured_noise(n, rng) * 10 ** (level / 20)
    return (noise / noise.std()).astype(np.float32)


def reverberate(audio, rng):
    """Echo: convolve with a noise that falls by 60 dB in 0.2 to 0.5 s. float32 (n,) -> (n,)"""
    n = int(rng.uniform(0.2, 0.5) * SAMPLE_RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n) * rng.uniform(0.02, 0.05)
    tail[0] = 1.0                            # the direct sound
    size = 1 << (len(audio) + n - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)
    return wet[:len(audio)].astype(np.float32)


@functools.lru_cache(maxsize=2)
def babble_tracks(seed=0):
    """Tracks of one talker each, 8 s, to mix babble from: float32 (24, n). Training sentences in voices that
    speak nowhere else. Built once for a seed (a number, or a tuple of them), in about half a second."""
    rng, n, tracks = np.random.default_rng([*np.atleast_1d(seed), 7]), 8 * SAMPLE_RATE, []
    for _ in range(24):
        talker, track = speaker_voice("babble", int(rng.integers(VOICES["babble"])), "clean"), np.zeros(0, np.float32)
        while len(track) < n:
            track = np.append(track, synthesise(sentence_in("train", rng, True), talker, rng))
        tracks.append(track[:n] / track[:n].std())
    return np.stack(tracks)


def mix(speech, noise, snr):
    """Add noise (n,) to speech (n,) at `snr` dB, both powers taken where somebody speaks. float32 (n,)"""
    blocks = np.pad(speech, (0, -len(speech) % (4 * HOP))).reshape(-1, 4 * HOP)      # of 20 ms
    power = np.repeat(np.mean(blocks ** 2, 1), 4 * HOP)[:len(speech)]
    active = power > 1e-3 * power.max()      # within 30 dB of the loudest
    wanted = np.mean(speech[active] ** 2) / 10 ** (snr / 10)
    return speech + noise * np.sqrt(wanted / np.mean(noise[active] ** 2))


def degrade(audio, condition, rng, babble=None):
    """Put clean speech, float32 (n,), into a condition: "clean", "hard", "ood", or a part of ood alone, "far" (echo), "babble" or
    "pauses" (stretches without speech, noise and clicks). Same length, peak below 1.
    babble: tracks of single talkers (m, n')."""
    n = len(audio)
    if condition == "clean":
        noise = coloured_noise(n, rng, ("white", "pink", "brown"))
    elif condition == "hard":
        noise = uneven_noise(n, rng)
    else:
        kind = rng.choice(3, p=(0.45, 0.25, 0.3)) if condition == "ood" else int(condition != "babble")  # babble, noise, both
        noise = np.zeros(n, np.float32)
        if kind != 1:
            for k in rng.choice(len(babble), rng.integers(3, 7), replace=False):
                noise += np.resize(np.roll(babble[k], rng.integers(babble.shape[1])), n)
            noise /= noise.std()
        if kind != 0:
            noise += uneven_noise(n, rng)
        if rng.random() < {"ood": 0.3, "pauses": 1.0}.get(condition, 0.0):
            for _ in range(rng.poisson(0.4 * n / SAMPLE_RATE)):    # clicks
                noise[rng.integers(n)] += rng.uniform(5, 20)
        if condition in ("ood", "far"):
            audio = reverberate(audio, rng)
    audio = mix(audio, noise, rng.uniform(*SNR.get(condition, SNR["ood"])))
    return (audio * (rng.uniform(0.15, 0.95) / np.abs(audio).max())).astype(np.float32)


# -------------------------------------------------------------------------------------------------- corpus
def posed(text, task, which):
    """A sentence of the corpus as an item of a task; `which`, any number, picks the question of SQA."""
    pairs = questions(text)
    question, answer = pairs[which % len(pairs)]
    return pose({"text": text, "lang": "en", "translation": {"de": german(text)}, "question": question, "answer": answer}, task)


def utterance(split, index, seed=0, condition=None, task="asr", said=None, speaker=None):
    """Item `index` of `split` ("train", "dev", "test"): a dict of id, audio float32 (n,), text, lang, speaker, condition,
    translation, question, answer, prompt and target (see `pose`). The same arguments give the same item; indices never run out.
    condition: one of CONDITIONS; None is hard with probability HARD_SHARE, else clean. ood speaks the
    test split's sentences in voices of its own, so only split test may ask for it (AssertionError).
    said: an item without audio that is to be spoken, instead of a sentence drawn; speaker: number of a voice, likewise."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, CONDITIONS.index(condition)])
    if condition is None:
        condition = "hard" if rng.random() < HARD_SHARE else "clean"
    assert condition != "ood" or split == "test", "ood is never trained on: it belongs to split test"
    pool = "ood" if condition == "ood" else split
    k = int(rng.integers(VOICES[pool])) if speaker is None else speaker
    talker = speaker_voice(pool, k, condition)
    while True:
        text = said["text"] if said else sentence_in(split, rng, condition != "clean", task)
        words = len(text.split())
        pauses = natural_pauses(words, rng)
        stretch, p = STRETCH.get(condition, ((0, 0), 0.0))
        for place in (0, words, int(rng.integers(1, words)) if words > 1 else 0):
            if rng.random() < p:
                pauses[place] += rng.uniform(*stretch)
        audio = synthesise(text, talker, rng, pauses)
        if len(audio) <= MAX_SECONDS * SAMPLE_RATE or said:
            break
    tracks = babble_tracks(seed if split == "test" else (seed, 1)) if condition in ("ood", "babble") else None
    audio = degrade(audio, condition, rng, tracks)
    return dict(said or posed(text, task, index), id=f"{split}-{condition}-{seed}-{index}", audio=audio,
                speaker=f"{pool}-{k:03d}", condition=condition)


# ------------------------------------------------------------------------------- corpora as the stages see them
TAKES = 4  # voices in which RBA has each of its dialogues spoken
STREAMS = {"encoder": 0, "text": 1, "speech": 2, "grpo": 3, "read": 4}     # SFT continued draws GRPO's
CLEAN_START = 1600  # utterances: CTC finds the alignment sooner where there is no noise
GROUP = 12  # batches made together and sorted by length: 87% of a batch is speech, where 4 give 79%
SORTED = 32  # of recorded speech, whose lengths are known before it is read: 89% useful frames on speechocean762, where 4 give 64%


class Embedded:
    """The made-up corpus. `sets` names dev and the test sets with their sizes, `tests` those of a run's table; train has no end.
    domain: the condition of RL's and the control's audio, "hard" or one of OOD_PARTS, which then is a test set, and dev's.
    dialogues: items without audio that a teacher invented (RBA); with them train and dev are those and no other sentences."""

    def __init__(self, seed, test=300, task="asr", domain="hard"):
        self.seed, self.task, self.domain, self.dialogues = seed, task, domain, []
        self.sets = {"dev": 600, **dict.fromkeys(("clean", "hard", "ood", *OOD_PARTS, "voices"), test)}
        self.tests = ["clean", "hard", "ood"] + ([] if domain == "hard" else [domain])

    def item(self, name, i):
        """Utterance i of a set, with its audio. Dev is half clean, half hard; `voices` says each sentence in TAKES voices, clean."""
        if name == "dev":
            condition = ("hard", "clean")[i % 2] if self.domain == "hard" else self.domain
            return utterance("dev", i, self.seed, condition, self.task, self.dialogue("dev", i))
        if name == "voices":
            rng = np.random.default_rng([self.seed, 8, i // TAKES])
            said = posed(sentence_in("test", rng, True, self.task), self.task, i // TAKES)
            return utterance("test", 10**6 + i, self.seed, "clean", self.task, said, self.take("test", i))
        return utterance("test", i, self.seed, name, self.task)

    def dialogue(self, stream, number):
        """Dialogue of utterance `number` of a stream or of dev; None without a teacher. SFT has the first four fifths of them, dev the last
        twentieth, RL the rest, in TAKES voices each: no dialogue is in two, and two sentences at the most (sft.teach has them in order)."""
        if not self.dialogues:
            return None
        n = len(self.dialogues)
        first, end = {"grpo": (n * 4 // 5, n * 19 // 20), "dev": (n * 19 // 20, n)}.get(stream, (0, n * 4 // 5))
        place = number // TAKES if stream == "grpo" else number if stream == "dev" else STREAMS[stream] * 7919 + number
        return self.dialogues[first + place % (end - first)]

    def take(self, split, i):
        """The voice of take i, of TAKES of one text: a different one each."""
        return int(np.random.default_rng([self.seed, 9, i // TAKES]).permutation(VOICES[split])[i % TAKES])

    def train_batch(self, stream, k, size):
        """Batch k of a stream: utterances that no other stream holds and that never come again in this one; dialogues do."""
        return self.group(stream, k // GROUP, size)[k % GROUP]

    @functools.lru_cache(maxsize=1)
    def group(self, stream, group, size):
        """GROUP batches, made together and sorted by length; but the voices of a dialogue of RL's stay together."""
        first = group * GROUP * size
        condition = "clean" if stream == "encoder" and first < CLEAN_START else self.domain if stream == "grpo" else None
        takes = self.dialogues and stream == "grpo"
        items = [utterance("train", STREAMS[stream] * 10**7 + i, self.seed, condition, self.task, self.dialogue(stream, i),
                           self.take("train", i) if takes else None) for i in range(first, first + GROUP * size)]
        if not takes:
            items.sort(key=lambda item: len(item["audio"]))
        order = np.random.default_rng([self.seed, group]).permutation(GROUP)
        return [items[j * size:(j + 1) * size] for j in order]

    def texts(self, stream, k, size):
        """Batch k of sentences for the stages text and read, as items without audio."""
        if self.dialogues:
            return [self.dialogue(stream, k * size + i) for i in range(size)]
        rng = np.random.default_rng([self.seed, STREAMS[stream], k])
        return [posed(sentence_in("train", rng, rng.random() < HARD_SHARE, self.task), self.task, i) for i in range(size)]

    def spell(self, text):
        """What CTC spells: the phones of the lexicon. They are what is heard; English spelling is not."""
        return [phone for word in text.split() for phone in LEXICON[word]]

    def items_of(self, split):
        """Items without audio: of dev, or of train enough to hold every word and phone."""
        if split == "train":
            return self.dialogues or self.texts("text", 0, 4000)
        if self.dialogues:
            return [self.dialogue("dev", i) for i in range(self.sets["dev"])]
        rng = np.random.default_rng([self.seed, 9])
        return [posed(sentence_in("dev", rng, i % 2 == 0, self.task), self.task, i) for i in range(self.sets["dev"])]


# ------------------------------------------------------------------------------------------ recorded audio
def die(message):
    """Print `error: message` and leave with status 2: what every script here does about bad input. Under torchrun each process says so
    itself: the first to leave ends the others, perhaps before they could speak for it."""
    rank = os.environ.get("RANK", "0")
    tqdm.write(f"{f'[rank {rank}] ' * (rank != '0')}error: {message}", file=sys.stderr)  # not into a bar's line
    raise SystemExit(2)


@contextlib.contextmanager
def plain_errors():
    """Around a script's main: a file that the system refuses is bad input, too."""
    try:
        yield
    except OSError as e:
        if not e.filename:
            raise
        die(f"{e.filename}: {e.strerror}; look at the path, at your rights there and at the room on that disk, and call again")


def refuse(*rules):
    """Ends the program at the first rule (whether it is broken, what to say then) that is."""
    for broken, message in rules:
        if broken:
            die(message)


def resample(x, sr_in, sr_out):
    """Resample float (n,) from sr_in to sr_out Hz: float32 (round(n * sr_out / sr_in),). The spectrum ends at the lower Nyquist
    frequency, so that nothing folds back."""
    if sr_in == sr_out:
        return np.asarray(x, np.float32)
    seconds = len(x) // sr_in + 2            # whole ones, of whole samples at any rate; a silent one parts the end from the start
    y = np.fft.irfft(np.fft.rfft(x, seconds * sr_in), seconds * sr_out) * (sr_out / sr_in)
    return y[:round(len(x) * sr_out / sr_in)].astype(np.float32)


def load_audio(path):
    """Read wav, flac, ogg/opus or mp3 as float32 (n,), one channel (their mean) at SAMPLE_RATE.
    A file that is missing, broken or empty ends the program with a line that names it."""
    try:
        x, rate = sf.read(path, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError, RuntimeError) as e:
        if not os.path.exists(path):
            die(f"{path}: no such file; check the path")
        die(f"{path}: cannot be read as audio ({e}); convert it to wav or flac, or drop it from the manifest")
    if len(x) == 0 or not (np.abs(x) < 1e6).all():
        die(f"{path}: holds {'no samples' if len(x) == 0 else 'samples that are no sound (nan, or 1e6 and more)'}; "
            "convert it again, or take it out of the manifest")
    if len(x) / rate > LONGEST_SECONDS:      # and its manifest did not say so, or read_data would have left it out
        die(f"{path}: {len(x) / rate:.0f} s long; cut it into pieces of {LONGEST_SECONDS} s at the most, or take it out of the manifest")
    return resample(x.mean(1), rate, SAMPLE_RATE)


def lines_of(path, parse, form):
    """(FILE:LINE, parse(line)) of each line of a UTF-8 file that is not empty. form: what a line is to be, for whom it is not."""
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            if raw.strip():
                try:
                    yield where, parse(raw.decode("utf-8-sig").strip())
                except (ValueError, RecursionError) as e:
                    die(f"{where}: cannot be read ({e}); write {form} a line, in UTF-8")


def librispeech_lines(root):
    """(FILE:LINE, item) of each line `ID TRANSCRIPT` in the *.trans.txt files of a LibriSpeech tree; the audio is ID.flac beside it.
    A folder called train-*, dev-* or test-* (the root itself may be one) names the split. Prints how many recordings have no line."""
    def fail(error):                         # a folder that cannot be read: os.walk would pass over it
        raise error

    files, walked, seen = [], set(), {}
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True) if root.is_dir() else ():
        if (real := os.path.realpath(folder)) in walked:  # by another link
            below.clear()
            continue
        walked.add(real)
        below.sort()
        files += [Path(folder, name) for name in names]
    for file in sorted(files):
        if not file.name.endswith(".trans.txt"):
            continue
        folders = (root.resolve().name, *file.relative_to(root).parts)
        split = next((name for name in folders if name.startswith(("train-", "dev-", "test-"))), None)
        for where, (key, _, text) in lines_of(file, lambda line: line.partition(" "), "ID TRANSCRIPT"):
            if key in seen:
                die(f"{where}: {key} was already given in {seen[key]}; delete one of the two")
            seen[key] = where
            audio = str(file.resolve().parent / f"{key}.flac")
            item = {"id": key, "audio_filepath": audio, "text": text, "speaker": key.split("-")[0]}
            yield where, {**item, "split": split} if split else item
    silent = [file for file in sorted(files) if file.suffix == ".flac" and file.stem not in seen]
    if silent:
        print(f"{root}: {len(silent)} recordings are left out, {silent[0]} the first: no line in a *.trans.txt has them", file=sys.stderr)


def checked(item, where, folder, look):
    """An item as `read_data` gives it; anything wrong with it ends the program with a line that begins with `where` (FILE:LINE).
    folder: what audio_filepath is relative to. look: whether the audio file is looked up."""
    if not isinstance(item, dict):
        die(f"{where}: a JSON {type(item).__name__}, not an object; write one {{...}} a line")
    for key in ("audio_filepath", "text", "id", "lang", "split", "speaker", "translation", "question", "answer"):
        if key not in item and key not in ("audio_filepath", "text"):
            continue
        value = item.get(key, "")
        by_lang = key == "translation" and isinstance(value, dict)                 # {"de": "...", "fr": "..."}
        for string in value.values() if by_lang else [value]:
            if not isinstance(string, str):
                die(f"{where}: {key!r} is {json.dumps(string)[:40]}, not a string; put it in quotes")
        if key in ("audio_filepath", "text", "id", "lang", "split") and not value.strip():
            die(f"{where}: {key!r} is empty or missing; fill it in or drop the line")
    if not any(map(str.isalnum, item["text"])):
        die(f"{where}: 'text' has no letter and no digit; fill it in or drop the line")
    if {os.sep, "@"} & set(item.get("split", "")) or item.get("split") in (".", ".."):
        die(f"{where}: split {item['split']!r} is to name files; give it a name without {os.sep} and @")
    if item.get("offset"):
        die(f"{where}: has an offset, and files are read whole; cut the audio, or drop the line")
    path = os.path.normpath(os.path.join(folder, item["audio_filepath"]))
    if look and not os.path.isfile(path):
        die(f"{where}: audio file {path} does not exist; put it there, or correct or drop the line")
    try:
        seconds = item["duration"] if "duration" in item else sf.info(path).duration
    except (sf.LibsndfileError, OSError, RuntimeError):
        die(f"{where}: cannot read {path} as audio; convert it to wav or flac, or drop the line")
    if type(seconds) not in (int, float) or not 0 < seconds < 1e9:
        die(f"{where}: duration {json.dumps(seconds)} is not a positive number of seconds; "
            "correct it, or leave it out to have it read from the file")
    item = {"id": os.path.splitext(os.path.basename(path))[0], "lang": "en", "speaker": "", **item,
            "audio_filepath": path, "duration": float(seconds), "text": item["text"].strip()}
    # One string for all lines where json makes one for each: a million items fit into 0.6 GB, not 1.3.
    return {sys.intern(k): sys.intern(v) if k in ("lang", "speaker", "split") else v for k, v in item.items()}


def manifest_of(path):
    """The file manifest.jsonl of a folder that has one, else the path as it is."""
    inside = Path(path, "manifest.jsonl")
    return inside if inside.is_file() else Path(path)


def read_data(path, deal=True):
    """Read a recorded corpus: {split: [item, ...]}, items in file order. An item is a dict with id, audio_filepath (absolute),
    duration (s), text, lang, speaker, and whatever else its manifest line held; those over LONGEST_SECONDS are left out.
    path: a folder with manifest.jsonl, a .jsonl or .json file (one object a line), or a LibriSpeech tree.
    Splits come from the items' `split` or the tree's folders (train, dev, and every other name a test set);
    where there is none, 80/10/10 by a hash of the speaker, or of the id in corpora of under 20 speakers.
    Without a dev split, 5 % of train is set aside. All lines about one recording are dealt into one split; lines that put one into train
    and into another split, too, end the program. deal False: for testing alone; what has no split is "test".
    Bad input ends the program with a line saying where."""
    root, manifest = Path(path), manifest_of(path)
    if manifest.is_file() and manifest.suffix in (".jsonl", ".json"):
        lines = lines_of(manifest, json.loads, 'one {"audio_filepath": ..., "text": ...}')
    else:
        lines = librispeech_lines(root)
    folder = os.path.dirname(os.path.abspath(manifest))
    items = [checked(item, where, folder, i < LOOKED_UP) for i, (where, item) in enumerate(lines)]
    if not items:
        die(f"{path}: {'no utterances in it' if root.exists() else 'no such file or folder'}; "
            "give a manifest (.jsonl or .json), its folder or a LibriSpeech tree (with *.trans.txt), one line for each utterance")
    long = [item["audio_filepath"] for item in items if item["duration"] > LONGEST_SECONDS]
    if long:
        said = (f"{path}: {len(long)} of {len(items)} utterances are left out, {long[0]} the first: "
                f"over {LONGEST_SECONDS} s long; cut them into shorter pieces")
        print(said, file=sys.stderr) if len(long) < len(items) else die(said)
        items = [item for item in items if item["duration"] <= LONGEST_SECONDS]
    share = lambda key: zlib.crc32(key.encode(errors="replace")) / 2 ** 32          # in [0, 1), the same for ever
    by_speaker = len({i["speaker"] for i in items if i["speaker"]}) >= 20
    splits, put = {}, {}                     # put: recording -> split
    for item in items:
        name = item.get("split", None if deal else "test")
        if name is None:
            x = share(item["speaker"] if by_speaker and item["speaker"] else item["id"])
            name = put.get(item["audio_filepath"], "train" if x < 0.8 else "dev" if x < 0.9 else "test")
        name = "train" if name.startswith("train-") else "dev" if name.startswith("dev-") else name
        name = "dev" if name in ("validation", "valid") else name
        both = {name, put.setdefault(item["audio_filepath"], name)} if deal else ()
        if len(both) == 2 and "train" in both:
            die(f"{path}: {item['audio_filepath']} is in {' and in '.join(sorted(both))}; drop a line, or give all the same \"split\"")
        splits.setdefault(name, []).append(item)
    if deal and "dev" not in splits and len(splits.get("train", [])) > 1:
        train = sorted(splits["train"], key=lambda i: share(i["id"]))
        chosen = {i["audio_filepath"] for i in train[:math.ceil(0.05 * len(train))]}
        splits["dev"] = [i for i in splits["train"] if i["audio_filepath"] in chosen]
        splits["train"] = [i for i in splits["train"] if i["audio_filepath"] not in chosen]
    return splits


class Recorded:
    """Recorded speech, by `read_data`. Training hears each utterance in ever new noisy views (views 0: as it is), tests as it is.
    train False: all of it is for testing."""

    def __init__(self, path, seed, task="asr", lang="de", views=1, train=True):
        self.seed, self.task, self.views = seed, task, views
        found = read_data(path, deal=train)
        self.data = {name: [item for item in items if pose(item, task, lang)] for name, items in found.items()}
        total, kept = (sum(map(len, splits.values())) for splits in (found, self.data))
        need = {"ast": f'"translation" into {lang}', "sqa": '"question" and "answer"'}.get(task)
        if not kept:
            die(f"{path}: --task {task} needs {need}, and no utterance has it; add it to the manifest's lines")
        if kept < total:
            print(f"{path}: {total - kept} of {total} utterances are left out: --task {task} needs {need}", file=sys.stderr)
        self.sets = {name: len(items) for name, items in self.data.items() if items and not (train and name == "train")}
        self.tests = [name for name in self.sets if not (train and name == "dev")] or ["dev"]
        trained = self.data.setdefault("train", [])
        self.seconds = np.array([item["duration"] for item in trained])
        self.by_lexicon = all(word in LEXICON for item in trained for word in re.findall(r"[\w']+", item["text"].lower()))
        self.contents = 0                    # a number for what is in it: runs on other contents are other runs
        for name, items in self.data.items():
            for item in items:
                about = [item[k] for k in ("id", "duration", "text", "prompt", "target")]
                self.contents = zlib.crc32(f"{name} {about}".encode(), self.contents)

    def item(self, name, i):
        """Utterance i of a set as it is: audio None, for its features are kept on disk (eval.features)."""
        return {**self.data[name][i], "audio": None}

    @functools.lru_cache(maxsize=1)
    def shuffle(self, stream, epoch, size):
        """An epoch's batches of indices into train: shuffled, then sorted by length within SORTED batches."""
        rng = np.random.default_rng([self.seed, STREAMS[stream], epoch])
        order, batches = rng.permutation(len(self.seconds)), []
        for group in np.split(order, range(SORTED * size, len(order), SORTED * size)):
            group = group[np.argsort(self.seconds[group], kind="stable")]
            batches += np.split(group, range(size, len(group), size))
        return [batches[j] for j in rng.permutation(len(batches))]

    def train_batch(self, stream, k, size):
        """Batch k of a stage's own stream of shuffled epochs, each utterance in a view of its own, or as it is."""
        epoch, j = divmod(k, math.ceil(len(self.data["train"]) / size))
        rng = np.random.default_rng([self.seed, STREAMS[stream], k, 1])
        items = [self.item("train", i) for i in self.shuffle(stream, epoch, size)[j]]
        for item in items if self.views else ():
            item["audio"] = noisy_view(load_audio(item["audio_filepath"]), rng, stream == "grpo")
        return items

    def texts(self, stream, k, size):
        """Batch k of training items for the stages text and read."""
        rng = np.random.default_rng([self.seed, STREAMS[stream], k])
        return [self.data["train"][i] for i in rng.integers(len(self.data["train"]), size=size)]

    def items_of(self, split):
        """Every item of train or dev."""
        return self.data[split]

    def spell(self, text):
        """What CTC spells: phones if the lexicon has every training word, else characters and word ends."""
        words = text.lower().split()
        if self.by_lexicon:
            return [phone for word in words for phone in LEXICON.get(word, ())]
        return list("|".join(words))


def noisy_view(audio, rng, hard=False):
    """Another take of the same utterance: quicker or slower (pitch and formants move along, as from another speaker) and, two times in
    three, in noise, over the faint noise that all have. `hard` goes further in both, always with noise: GRPO learns nothing from an
    utterance whose transcripts are all alike. float32 (n,) -> (n',)"""
    if not audio.any():                      # digital silence has no level to set a noise against
        return audio
    view = HARD_VIEW if hard else VIEW
    n = max(2, int(len(audio) / rng.uniform(*view["speed"])))
    audio = np.interp(np.linspace(0, len(audio) - 1, n), np.arange(len(audio)), audio).astype(np.float32)
    if hard or rng.random() < 0.67:
        audio = mix(audio, uneven_noise(n, rng), rng.uniform(*view["snr"]))
    return degrade(audio, "clean", rng)


def name_of(path):
    """What runs on a recorded corpus are called; "embedded" without one."""
    folder, name = os.path.split(os.path.abspath(path)) if path else ("", "embedded")
    return os.path.basename(folder) if name.startswith("manifest.") else re.sub(r"\.jsonl?$", "", name)


def open_corpus(path, seed, test_size=300, task="asr", lang="de", domain="hard", views=1, train=True):
    """The recorded corpus at `path`, or the embedded one with test sets of `test_size` utterances, as a task poses it."""
    return Recorded(path, seed, task, lang, views, train) if path else Embedded(seed, test_size, task, domain)


@plain_errors()
def main():
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Listen to the made-up corpus, or check a recorded one.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--listen", metavar="DIR", help="write utterances of each condition to DIR as wav")
    what.add_argument("--check", metavar="PATH", help="manifest, its folder or LibriSpeech tree to summarise")
    parser.add_argument("--n", type=int, default=6, help="utterances of each condition (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the made-up corpus (default 0)")
    args = parser.parse_args()
    if args.n < 1 or args.seed < 0 or "" in (args.listen, args.check):
        parser.error("--n must be at least 1, --seed at least 0, and a path not empty")
    if args.check:
        splits = read_data(args.check)       # first: it may end the program
        print(f"{'split':16} {'utterances':>10} {'hours':>9} {'speakers':>8}")
        for name, items in splits.items():
            hours = sum(i["duration"] for i in items) / 3600
            print(f"{name:16} {len(items):10} {hours:9.2f} {len({i['speaker'] for i in items} - {''}):8}")
        return
    os.makedirs(args.listen, exist_ok=True)
    for condition in ("clean", "hard", "ood"):
        for i in range(args.n):
            item = utterance("test", i, args.seed, condition)
            file = f"{item['id']}.wav"
            with open(os.path.join(args.listen, file), "wb") as f:
                sf.write(f, item["audio"], SAMPLE_RATE, format="wav")
            print(f"{file:24} {condition:6} {len(item['audio']) / SAMPLE_RATE:5.2f} s  {item['text']}")


if __name__ == "__main__":
    main()
