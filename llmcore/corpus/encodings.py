"""Encodings: which one a file's bytes are in, and the text they stand for, a block at a time.

Many bytes are valid in several encodings: most GB18030 text is valid Big5, and Korean text is valid GB18030. But only
the right encoding gives text that somebody would write. So each language has a table of its frequent characters, with
a cost in bits: minus the logarithm (base 2) of the share that a character has in texts. The right encoding makes a text
cheap. A wrong one makes rare characters, and the text costs more than random bytes, which cost eight bits each. The
bits that are saved against random bytes decide. (This is a naive Bayes classifier.)
"""

from __future__ import annotations

import codecs
import functools
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

READ_BYTES = 1 << 16  # read at a time; the C library keeps the memory of larger blocks
SAMPLE_BYTES = 1 << 13  # that are not ASCII: enough to tell encodings apart without doubt
SAMPLE_LIMIT = 1 << 18  # of a sample with the ASCII in it

# How many byte sequences of a text may be broken. Three: a text that was cut out of a longer one, between any two
# bytes, has up to three at its ends. And one in a thousand bytes: that changes little of what a model learns, and a
# wrong encoding breaks more.
BROKEN_ALLOWED = 3
BYTES_PER_BROKEN = 1000
GOOD_PER_BROKEN = 3  # characters that are good UTF-8, before a text with a broken sequence is taken for UTF-8
CONTROLS = bytes({*range(0x20), 0x7F} - set(b"\t\n\f\r\x1a\x1b"))
CONTROLS_ALLOWED = 0.01  # of the bytes; images, programs and UTF-16 have more

BROKEN = "\udfff"  # stands for a broken sequence while a text is decoded; good bytes never give half a surrogate
MARK_BROKEN = "llmcore.mark_broken"
codecs.register_error(MARK_BROKEN, lambda error: (BROKEN, error.end))  # type: ignore[attr-defined]

USUAL = "utf-8, gb18030, big5, utf-16, shift_jis, euc_jp, euc_kr, cp1252"
# What people call an encoding, and what holds all its characters and those that programs have added.
SUPERSETS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "cp950": "big5hkscs",
    "shift_jis": "cp932",
    "euc_jp": "euc_jis_2004",
    "euc_kr": "cp949",
    "utf-8-sig": "utf-8",
}
# Python calls these text encodings, but no file is in them.
NO_FILES = {"idna", "punycode", "undefined", "utf-7", "unicode-escape", "raw-unicode-escape"}
# Windows in Taiwan shows these bytes of Big5 as other characters than Python's big5hkscs does.
BIG5_SIGNS = dict(zip("•､‾∼♁☉¥¢£￭", "‧﹑¯～⊕⊙￥￠￡▓", strict=True))


@dataclass
class Damage:
    """What is broken in a text.

    Attributes:
        count: byte sequences that are broken, each replaced by U+FFFD.
        first: the place of the first bad byte, from where the text begins; None if there is none.
    """

    count: int = 0
    first: int | None = None


def check_encoding(name: str) -> str:
    """A parameter `encoding` as `decoded_blocks` takes it: "auto", or the name of Python's codec.

    An encoding that others have extended becomes its extension: gb2312 and gbk become gb18030.

    Raises:
        ValueError: if Python has no text encoding of this name.
    """
    if name == "auto":
        return name
    try:
        codec = codecs.lookup(name)
        is_text = getattr(codec, "_is_text_encoding", True)  # Python's own mark; rot13 and hex are none
        if is_text and codec.name.replace("_", "-") not in NO_FILES:
            return SUPERSETS.get(codec.name, codec.name)
    except (LookupError, TypeError, ValueError):  # also: not a string, or one with a null character
        pass
    raise ValueError(f"encoding={name!r} is not an encoding of texts: choose auto, or one such as {USUAL}")


# Text


def decoded_blocks(raw: BinaryIO, encoding: str, name: str, damage: Damage | None = None) -> Iterator[str]:
    """A stream's text, 64 KiB of bytes at a time: no byte order mark, CRLF and CR turned into newlines.

    A few broken byte sequences are replaced by U+FFFD and counted. How many are a few, `broken_allowed` says, for the
    bytes so far and for each block. U+FFFD that stands in the file itself is not counted.

    Args:
        raw: the bytes, read from where the stream stands.
        encoding: as `find_encoding` or `check_encoding` gives it; not "auto".
        name: of the file, for an error.
        damage: filled in on the way.

    Raises:
        ValueError: if too much is broken.
    """
    damage = Damage() if damage is None else damage
    decoder = codecs.getincrementaldecoder(encoding)(MARK_BROKEN)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    place, started = 0, False
    while True:
        block = raw.read(READ_BYTES)
        state = decoder.getstate()
        text = decoder.decode(block, final=not block)

        if broken := text.count(BROKEN):
            damage.count += broken
            if damage.first is None:
                damage.first = place + _first_bad(encoding, state, block)
            if broken > broken_allowed(READ_BYTES) or damage.count > broken_allowed(place + len(block)):
                raise ValueError(
                    f"{name} is not {encoding}: {damage.count} byte sequences in its first {place + len(block)} bytes "
                    f"are broken, the first at byte {damage.first}. {_advice(block)}"
                )
            text = text.replace(BROKEN, "\ufffd")

        if text and not started:
            text, started = text.removeprefix("\ufeff"), True
        if encoding == "big5hkscs":
            for sign, sign_in_taiwan in BIG5_SIGNS.items():
                text = text.replace(sign, sign_in_taiwan)
        if text := newlines.decode(text, final=not block):
            yield text
        if not block:
            return
        place += len(block)


def broken_allowed(size: int) -> int:
    """How many byte sequences may be broken in so many bytes."""
    return BROKEN_ALLOWED + size // BYTES_PER_BROKEN


def _first_bad(encoding: str, state: tuple[bytes, int], block: bytes) -> int:
    """Where in a block the first bad byte is; below 0 if that is in the block before."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    decoder.setstate(state)
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        return error.start - len(error.object) + len(block)
    return 0


def _advice(block: bytes) -> str:
    """What to do about a file with a block that has too many broken sequences."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(block)
    if not text.isascii() and text.count("\ufffd") <= BROKEN_ALLOWED:
        return "There it is UTF-8: convert the whole file to UTF-8, or remove it"
    return "Give its encoding as encoding=, convert it to UTF-8, or remove it"


# Which encoding

MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def find_encoding(raw: BinaryIO, name: str) -> str:
    """The Python codec of a stream's text. Afterwards, the stream stands at its start.

    A text is UTF-8 if all of it is, apart from a few broken sequences (`broken_allowed`). Otherwise a sample decides:
    the first `SAMPLE_BYTES` that are not ASCII. Nothing at all is UTF-8.

    Args:
        raw: the bytes, at their start; sought back twice at most.
        name: of the file, for an error.

    Raises:
        ValueError: if it is not text, if its encoding is not known, or if a part of it is UTF-8 and another is not.
    """
    encoding, place = _mark_or_utf8(raw, name)
    if encoding is None:
        raw.seek(place)
        encoding = _guess(_sample(raw), name)
    raw.seek(0)
    return encoding


def _mark_or_utf8(raw: BinaryIO, name: str) -> tuple[str | None, int]:
    """The encoding if a byte order mark tells it or the text is UTF-8; else None, and the place of a sample's start.

    That is the first block with something else than ASCII: no character begins in the block before.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    size = good = broken = zeros = 0
    first = None
    while block := raw.read(READ_BYTES):
        if not size:
            for mark, encoding in MARKS.items():
                if block.startswith(mark):
                    return encoding, 0

        text = decoder.decode(block)
        zeros += block.count(0)
        if first is None and (zeros or not block.isascii()):
            first = size
        size += len(block)
        if not text.isascii():
            if bad := text.count("\ufffd"):
                bad = max(0, bad - block.count("\ufffd".encode()))  # the file may hold that character itself
            broken += bad
            if broken > broken_allowed(size):
                _refuse_mixture(text, good, broken, name)
                return None, first or 0
            good += _foreign(text) - bad
        if zeros > CONTROLS_ALLOWED * size:
            if size > len(block):  # UTF-16 has zeros from its start on
                raise ValueError(
                    f"{name} does not look like text: {zeros} of its {size} first bytes are zero: remove it"
                )
            return None, first or 0

    if good < GOOD_PER_BROKEN * broken:
        return None, first or 0
    return "utf-8", 0


def _foreign(text: str) -> int:
    """How many characters are not ASCII."""
    return len(text) - len(text.encode("ascii", "ignore"))


def _refuse_mixture(text: str, good: int, broken: int, name: str) -> None:
    """Raise an error if a part of the file is UTF-8.

    Args:
        text: a block that is not UTF-8, decoded as such, with U+FFFD for what is broken.
        good: characters in the blocks before that are not ASCII, and good UTF-8.
        broken: sequences so far that are not UTF-8.
        name: of the file.
    """
    # in other encodings, some bytes are good UTF-8 by chance, but six characters in a row hardly ever are
    rows = sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]{6,}", text)))
    single = _foreign(text) - text.count("\ufffd")
    if good + rows > broken / 10 or good + single >= broken >= 20:
        raise ValueError(
            f"a part of {name} is UTF-8, but {broken} byte sequences elsewhere are not: convert the whole file to "
            "UTF-8, or remove it"
        )


def _sample(raw: BinaryIO) -> bytes:
    """What comes next in a stream: lines that are not plain ASCII, until `SAMPLE_BYTES` of their bytes are not."""
    sample = b""
    while len(sample) < SAMPLE_LIMIT and (block := raw.read(SAMPLE_BYTES // 2)):
        sample += block
        if 0 not in sample:  # else a newline may have two bytes
            *lines, last = sample.split(b"\n")
            sample = b"\n".join([*(line for line in lines if not line.isascii()), last])
        if sample.count(0) + len(sample.translate(None, ASCII_BYTES)) >= SAMPLE_BYTES:
            break
    return sample[:SAMPLE_LIMIT]


def _guess(sample: bytes, name: str) -> str:
    """The encoding of a sample that is not UTF-8.

    Raises:
        ValueError: if it is not text, or its encoding is not known.
    """
    readings = []
    for encoding, languages in LANGUAGES.items():
        text = codecs.getincrementaldecoder(encoding)(MARK_BROKEN).decode(sample)  # its end may be half a character
        good = text.replace(BROKEN, "")
        says_something = good if encoding.startswith("utf-16") else not good.isascii()
        if says_something and text.count(BROKEN) <= broken_allowed(READ_BYTES):  # each costs much, too
            readings.append((_saved_bits(sample, text, languages), encoding, text))
    readings.sort(reverse=True)

    controls = len(sample) - len(sample.translate(None, CONTROLS))
    foreign = len(sample.translate(None, ASCII_BYTES))
    if readings and readings[0][0] > 0:
        saved, encoding, text = readings[0]
        rival = max((reading[0] for reading in readings if reading[2] != text), default=0)
        if saved - max(rival, 0) > AHEAD_AT_LEAST:
            return encoding
        likely = ", ".join(reading[1] for reading in readings if saved - reading[0] <= AHEAD_AT_LEAST)
        raise ValueError(
            f"{name} holds too little to tell its encoding (likely: {likely}): give it as encoding=, convert the file "
            "to UTF-8, or remove it"
        )

    if controls > CONTROLS_ALLOWED * len(sample):
        raise ValueError(f"{name} does not look like text: remove it, or give its encoding as encoding=")
    from charset_normalizer import from_bytes  # here, because few texts need it

    found = from_bytes(sample, cp_isolation=OTHER_ENCODINGS).best()
    words = sum(map(len, re.findall(rb"[\x80-\xff]{3,}", sample)))  # of other alphabets
    if found is None or words < max(WORDS_AT_LEAST, foreign / 2):
        raise ValueError(
            f"the encoding of {name} is not known: give it as encoding=, convert the file to UTF-8, or remove it"
        )
    return found.encoding


def _saved_bits(sample: bytes, text: str, languages: tuple[str, ...]) -> float:
    """How many bits a sample's text costs less than random bytes, in the language in which it costs least."""
    counts = Counter(text)
    cost = min(
        sum(count * costs.get(character, RARE_BITS) for character, count in counts.items())
        for costs in map(_costs, languages)
    )
    # no Western word has three accents in a row: such a text is Greek or Russian
    cost += RARE_BITS * len(re.findall("[À-ÿ]{3}", text))
    foreign = len(sample.translate(None, ASCII_BYTES))
    return 8 * foreign + ASCII_BITS * (len(sample) - foreign) - cost


# What characters cost

# Frequent characters of languages, from general knowledge; the most frequent ones first. Modern and classical Chinese.
SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同"
    "现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很"
    "最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走"
    "义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马"
    "科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运"
    "笑吧呢吗啊呀哦嗯您谁哪怎跟爱父母亲姐妹哥弟夫妻孩脸嘴脚腿胸背肩衣床屋窗街车站店飞跑坐躺哭叫喊喝吃睡醒怕忙快慢轻静忽突刚仿佛似乎竟居终始仅曾"
    "渐低沉默微冷热红黑黄绿蓝夜晚早晨星船球剑杀敌血拳龙魔仙灵丹境修炼宗派徒刀枪火风雷雪雨云石林河江湖岛城宫殿皇帝妃奴曰吾汝乃矣焉哉遂皆亦若故欲"
    "臣君卿侯州郡兵士卒贼降丞督奔投追退引斩骑营寨谋胜败拜赐诏诸众既未耳孰彼兹盖虽犹尚"
)
TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種事成方多經麼去法學如都同"
    "現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日軍者意無力它與長把機十民第公此已工使情明性知全三又關點正業外將兩高間由問很"
    "最重並物手應戰向頭文體政美相見被利什二等產或新己制身果加西斯月話合回特代內信表化老給世位次度門任常先海通教兒原東聲提立及比員解水名真論處走"
    "義各入幾口認條平系氣題活爾更別打女變四神總何電數安少報才結反受目太量再感建務做接必場件計管期市直德資命山金指克許統區保至隊形社便空決治展馬"
    "科司五基眼書非則聽白卻界達光放強即像難且權思王象完設式色路記南品住告類求據程北邊死張該交規萬取拉格望覺術領共確傳師觀清今切院讓識候帶導爭運"
    "笑吧呢嗎啊呀哦嗯您誰哪怎跟愛父母親姐妹哥弟夫妻孩臉嘴腳腿胸背肩衣床屋窗街車站店飛跑坐躺哭叫喊喝吃睡醒怕忙快慢輕靜忽突剛仿佛似乎竟居終始僅曾"
    "漸低沉默微冷熱紅黑黃綠藍夜晚早晨星船球劍殺敵血拳龍魔仙靈丹境修煉宗派徒刀槍火風雷雪雨雲石林河江湖島城宮殿皇帝妃奴曰吾汝乃矣焉哉遂皆亦若故欲"
    "臣君卿侯州郡兵士卒賊降丞督奔投追退引斬騎營寨謀勝敗拜賜詔諸眾既未耳孰彼茲蓋雖猶尚爲裏着妳衆祇纔"
)
JAPANESE = (
    "日一国人年大十二本中長出三時行見月分後前生五間上東四今金九入学高円子外八六下来気小七山話女北午百書先名川千水半男西電校語土木聞食車何南万毎白"
    "天母火右読友左休父雨会同事自社発者地業方新場員立開手力問代明動京目通言理体田主題意不作用度強公持野以思家世多正安院心界教文元重近考画海売知道"
    "集別物使品計死特私始朝運終台広住無真有口少町料工建空急止送切転研足究楽起着店病質待試族銀早映親験英医仕去味写字答夜音注帰古歌悪図室歩風紙黒花"
    "春赤青館屋色走秋夏習駅洋旅服夕借曜飲肉貸堂鳥飯勉冬昼茶弟牛魚兄犬妹姉漢彼々当然全部実現関表定部合情報法性的対相面結成果要約産"
)
HANGUL = (
    "이다는의에을가고하지은를사도기로한리대자아서니인나어부시수정과제그라만일해들장보스있것전주안구으여오상소조원동공성면적게국거중비서무유마위러었였했"
    "습당신때말생각람모두내우까더없않세계할던년월와관경분문방선야요진용물연행회학발간결현후실치타트발명체화입출심집손눈목길날바저히노르드음작난단개미려"
    "식업법규항또든데며네든버불산통된될됨않았겠므로써따같큰게록속본외민번업금건강교육권역차량급석설초최표필합피함"
)
LATIN = {  # letters of languages that write most of a word in ASCII
    "english": "’“”‘—–…\u00a0",
    "western": "éèàêçùâîôûëïœäöüßáíóúñãõåøæì¿¡ÉÀÇÈÊÄÖÜÁÍÓÚÑÅØÆ",
    "french": "éèàêçùâîôûïÉÀÇ",
    "german": "äöüßÄÖÜ",
    "spanish": "áéíóúñü¿¡",
    "portuguese": "ãáéçíóêõâôúà",
    "italian": "èàòùéì",
    "nordic": "åäöøæÅÄÖØÆ",
    "polish": "ąęłóżśćńźŚŻŁ",
    "czech": "áčďéěíňřšťúůýžôľäČŘŠŽ",  # and Slovak
    "hungarian": "áéíóöőúüűÁÉÖÜ",
    "turkish": "ışğçöüİŞÇÖÜ",
}
QUOTES = "’“”‘„—–…«»•·°§©®™£€½´ºª\u00a0"
CHINESE_MARKS = "，。、：；？！“”‘’《》「」『』（）—…　·─〈〉【】～﹏○□★☆※"
JAPANESE_MARKS = "、。「」・ー　！？『』（）々〜～…―─：○●◎□【】"
KANA = "".join(map(chr, range(0x3041, 0x3094)))
KATAKANA = "".join(map(chr, range(0x30A1, 0x30F7)))
FULL_WIDTH = "".join(map(chr, range(0xFF10, 0xFF5B)))  # digits and letters
ASCII = "".join(map(chr, range(0x20, 0x7F))) + "\t\n\r\f"
ASCII_BYTES = bytes(range(0x80))

# Costs in bits. ASCII costs the same in every language, so that English between the lines tells nothing.
ASCII_BITS, CONTROL_BITS, RARE_BITS, BROKEN_BITS = 6, 16, 19, 30
AHEAD_AT_LEAST = 4  # of the next encoding, and of random bytes: 16 times as likely
WORDS_AT_LEAST = 20  # bytes in words of other alphabets, for the general detector

LANGUAGES = {  # that are written in each encoding
    "gb18030": ("simplified", "traditional"),
    "big5hkscs": ("traditional",),
    "cp932": ("japanese",),
    "euc_jis_2004": ("japanese",),
    "cp949": ("korean",),
    "cp1252": ("english", "western", "french", "german", "spanish", "portuguese", "italian", "nordic"),
    "cp1250": ("polish", "czech", "hungarian"),
    "cp1254": ("turkish",),
    "utf-16-le": ("simplified", "traditional", "japanese", "korean", "western"),
    "utf-16-be": ("simplified", "traditional", "japanese", "korean", "western"),
}
OTHER_ENCODINGS = ["cp1251", "koi8_r", "cp866", "cp1253", "cp1255", "cp1256", "cp874"]  # of other alphabets


@functools.cache
def _costs(language: str) -> dict[str, float]:
    """The cost in bits of each character that is not rare in a language."""
    shares: dict[str, list[tuple[float, str]]] = {  # of a text, and the characters that have this share together
        "simplified": [
            (0.28, SIMPLIFIED[:80]),
            (0.32, SIMPLIFIED[80:]),
            (0.15, CHINESE_MARKS),
            (0.15, _first_level("gb2312", 0xB0, 0xD7)),
            (0.02, FULL_WIDTH),
        ],
        "traditional": [
            (0.28, TRADITIONAL[:80]),
            (0.32, TRADITIONAL[80:]),
            (0.15, CHINESE_MARKS),
            (0.15, _first_level("big5", 0xA4, 0xC6)),
            (0.02, FULL_WIDTH),
        ],
        "japanese": [
            (0.45, KANA),
            (0.12, KATAKANA),
            (0.15, JAPANESE_MARKS),
            (0.15, JAPANESE),
            (0.08, _first_level("euc_jp", 0xB0, 0xCF)),
            (0.02, FULL_WIDTH),
        ],
        "korean": [(0.75, HANGUL), (0.15, _first_level("euc_kr", 0xB0, 0xC8)), (0.02, JAPANESE_MARKS)],
        **{language: [(0.7, letters), (0.3, QUOTES)] for language, letters in LATIN.items()},
    }
    costs = dict.fromkeys(ASCII, float(ASCII_BITS)) | {BROKEN: BROKEN_BITS}
    for share, characters in shares[language]:
        for character in characters:
            costs.setdefault(character, math.log2(len(characters) / share))
    return dict.fromkeys(map(chr, range(0x20)), float(CONTROL_BITS)) | costs


def _first_level(codec: str, first: int, last: int) -> str:
    """The characters whose lead byte is one of these: national standards put the common characters first."""
    pairs = (bytes((lead, trail)) for lead in range(first, last + 1) for trail in range(0x40, 0xFF))
    return "".join(pair.decode(codec, "ignore") for pair in pairs)
