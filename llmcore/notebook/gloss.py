"""English beside the Chinese of the default text: the names and words that it uses most."""

from __future__ import annotations

import re

# Written by hand for 三国演义. Surnames come first; many persons have a second name, which the novel uses more often.
ENGLISH = {
    "且看下文分解": "see the next chapter",
    "且听下文分解": "hear it in the next chapter",
    "后人有诗叹曰": "a later poet sighed:",
    "后人有诗赞曰": "a later poet praised:",
    "后人有诗赞": "a later poem praises",
    "后人有诗曰": "a later poem says:",
    "后人有诗": "there is a later poem",
    "下文分解": "the next chapter tells",
    "如之奈何": "what is to be done?",
    "喊声大震": "great shouts arose",
    "如此如此": "thus and thus",
    "却说曹操": "now, Cao Cao",
    "却说孔明": "now, Kongming",
    "却说玄德": "now, Xuande",
    "孔明笑曰": "Kongming laughed:",
    "一声炮响": "a gun was heard",
    "推出斩之": "out with him, behead him",
    "木牛流马": "wooden oxen and horses",
    "玄德大喜": "Xuande was glad",
    "为首大将": "the general in front",
    "性命如何": "what of his life?",
    "孔明曰": "Kongming said",
    "玄德曰": "Xuande said",
    "司马懿": "Sima Yi",
    "诸葛亮": "Zhuge Liang",
    "夏侯惇": "Xiahou Dun",
    "司马昭": "Sima Zhao",
    "夏侯渊": "Xiahou Yuan",
    "大怒曰": "said in anger",
    "引一军": "led a troop",
    "大将军": "general-in-chief",
    "于马下": "off the horse",
    "为先锋": "as the vanguard",
    "大惊曰": "said in alarm",
    "从其言": "took his advice",
    "玄德": "Xuande (Liu Bei)",
    "孔明": "Kongming (Zhuge Liang)",
    "云长": "Yunchang (Guan Yu)",
    "翼德": "Yide (Zhang Fei)",
    "将军": "general",
    "曹操": "Cao Cao",
    "却说": "now it is told",
    "司马": "Sima",
    "不可": "must not",
    "二人": "the two",
    "丞相": "chancellor",
    "关公": "Lord Guan",
    "引兵": "led troops",
    "荆州": "Jingzhou, a province",
    "蜀兵": "troops of Shu",
    "魏兵": "troops of Wei",
    "不能": "cannot",
    "夏侯": "Xiahou",
    "如此": "thus",
    "大喜": "greatly pleased",
    "吕布": "Lü Bu",
    "张飞": "Zhang Fei",
    "诸葛": "Zhuge",
    "商议": "to take counsel",
    "大怒": "in great anger",
    "天下": "the realm",
    "如何": "how, what",
    "主公": "my lord",
    "一人": "one man",
    "孙权": "Sun Quan",
    "操曰": "Cao said",
    "魏延": "Wei Yan",
    "军马": "troops",
    "大惊": "in great alarm",
    "军士": "soldiers",
    "赵云": "Zhao Yun",
    "左右": "attendants",
    "刘备": "Liu Bei",
    "笑曰": "said with a laugh",
    "夫人": "lady",
    "次日": "the next day",
    "东吴": "Eastern Wu",
    "袁绍": "Yuan Shao",
    "周瑜": "Zhou Yu",
    "只见": "one saw",
    "温德殿": "the Wende Hall",
    "车驾": "the emperor's carriage",
    "太守": "governor",
    "引军": "led an army",
    "亲自": "in person",
    "出战": "came out to fight",
    "灵帝": "Emperor Ling",
    "天子": "the Son of Heaven",
    "先主": "the First Ruler",
    "英雄": "hero",
    "长江": "the Long River",
}
# Single characters, for pictures of what may come next. In a whole text they would be too many.
CHARACTERS = {
    **{"曰": "said", "之": "of, it", "不": "not", "人": "person", "兵": "troops", "来": "to come", "大": "great"},
    **{"于": "at, in", "在": "at", "与": "and, with", "为": "to be", "有": "to have", "无": "to lack", "将": "general"},
    **{"军": "army", "马": "horse", "破": "to defeat", "欲": "to want", "至": "to arrive", "回": "to return"},
    **{
        "自": "himself",
        "起": "to rise",
        "已": "already",
        "出": "to go out",
        "入": "to enter",
        "上": "up",
        "下": "down",
    },
    **{"中": "middle", "此": "this", "其": "his, its", "而": "and yet", "则": "then", "乃": "then, is", "遂": "so"},
    **{"见": "to see", "闻": "to hear", "知": "to know", "引": "to lead", "去": "to leave", "到": "to reach"},
    **{
        "操": "Cao",
        "孙": "Sun",
        "刘": "Liu",
        "曹": "Cao",
        "吾": "I, my",
        "汝": "you",
        "我": "I",
        "你": "you",
        "他": "he",
    },
    **{"众": "all, the crowd", "皆": "all", "后": "after", "先": "first", "急": "in haste"},
    **{
        "令": "to order",
        "使": "to send",
        "可": "can",
        "若": "if",
        "今": "now",
        "也": "(ends a sentence)",
        "矣": "(done)",
    },
}
_WORDS = re.compile("|".join(sorted(ENGLISH, key=len, reverse=True)))


def words_in(text: str, most: int = 12) -> dict[str, str]:
    """The words of a text that have a translation here, in the text's order, each once."""
    found = dict.fromkeys(_WORDS.findall(text))
    return {word: ENGLISH[word] for word in [*found][:most]}


def gloss(text: str) -> str:
    """The words of a text that have a translation here, each followed by it, in one line."""
    return " · ".join(f"{word} {meaning}" for word, meaning in words_in(text).items()) or "no word with a translation"


def beside_english(piece: str) -> str:
    """A token with its English after it, if it has a translation here."""
    meaning = ENGLISH.get(piece) or CHARACTERS.get(piece)
    return f"{piece} {meaning}" if meaning else piece
