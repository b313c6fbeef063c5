"""Signs that a line is a web site's and not an author's: addresses, and words that such sites use.

The words come from general knowledge of Chinese and English sites. A sign alone says little: only lines that recur are
removed; see `llmcore.corpus.cleaning`.
"""

from __future__ import annotations

import functools
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

FIRST_WIDE, WIDE_WEIGHT = 0x2E80, 4  # from this code on, a character says as much as four letters of an alphabet


def _any_case(words: str) -> list[str]:
    """English words, separated by |, as they are mostly written."""
    forms = ((word, word.capitalize(), word.title(), word.upper()) for word in words.split("|"))
    return list(dict.fromkeys(form for group in forms for form in group))


# An address is a sign in speech too. The width and the case of its letters do not matter.
ADDRESS = r"https?:/|www\s?[.。·,]|(?<=[a-z0-9])[.。·](?:com|net|org|cc|cn|info|vip|xyz)(?![a-z])"

# One of these words is enough.
_STRONG_WORDS = """
小说网 中文网 阅读网 文学网 读书网 看书网 文学城 笔趣阁 追书神器 txt TXT 书友 本站 公众号 QQ群 qq群 Q群 交流群 群号
小說網 中文網 閱讀網 文學網 讀書網 筆趣閣 書友 公眾號 群號
纯手打 手打更新 手打会员 手打全文 手打版 更新最快 最快更新 更新更快 无弹窗 无广告 全文字 更多精彩 精彩小说 好看的小说
純手打 手打會員 無彈窗 無廣告 精彩小說 好看的小說
记住网址 最新网址 首发域名 一秒记住 手机用户 手机阅读 手机版 百度搜索
求收藏 求推荐 求月票 求订阅 推荐票 支持正版 支持作者
記住網址 最新網址 首發域名 一秒記住 手機用戶 手機閱讀 手機版 求推薦 求訂閱 推薦票
返回目录 返回书页 章节目录 章节列表 最新章节 加入书签 加入书架 本章未完 章节错误 章节内容 刷新页面 点此举报
在线阅读 全文阅读 免费阅读
返回目錄 返回書頁 章節目錄 章節列表 最新章節 加入書籤 加入書架 章節錯誤 線上閱讀 全文閱讀 免費閱讀
本书由 本文由 本电子书 小时内删除 仅供试读 仅供交流 仅供学习 版权归 版权所有 扫描校对 扫校 精校版
本書由 小時內刪除 僅供試讀 僅供交流 版權歸 版權所有
"""
STRONG = _STRONG_WORDS.split() + _any_case(
    "rights reserved|project gutenberg|gutenberg-tm|read more at|read more chapters|read the latest|read this book at|"
    "read novel|free ebook|free e-book|ebook converter|more free novels|visit us at|visit our website|subscribe to|"
    "sign up for|click here|follow us|join our|patreon|newsletter|latest chapter|if you find any errors|report chapter"
)
# Of these, three different ones; or two in a line that is not short.
_WEAK_WORDS = """
下载 论坛 收藏 首发 微信 QQ 网址 域名 登录 登陆 访问 转载 订阅 书架 章节 阅读 免费 更新 网站 正版
整理 上传 校对 制作 提供 小说 搜索 点击 注册 广告 扫码 二维码 浏览 网友 欢迎 关注 推荐 全文 全集 完本
作者 本书 喜欢 地址 请到 删除 手打 书库 书迷 电子书 目录 追书 看书 书源 换源 缓存 APP App 安卓 举报
下載 論壇 首發 網址 登錄 登陸 訪問 轉載 訂閱 書架 章節 閱讀 免費 網站 上傳 校對 製作 小說
點擊 註冊 廣告 瀏覽 網友 歡迎 推薦 本書 請到 書庫 電子書 目錄
上一章 下一章 上一页 下一页 上一頁 下一頁
"""
WEAK = _WEAK_WORDS.split() + _any_case(
    "download|translator:|editor:|uploaded|ebook|online|website|chapter|free|copyright|proofread|previous|next"
)
OPENING_QUOTES = tuple("“‘「『\"'")
_LONG_FOR_SIGNS = 40  # weight of a line for which two weak words are enough

_ADDRESS = re.compile(ADDRESS, re.IGNORECASE)
_STRONG = re.compile("|".join(map(re.escape, STRONG)))
_WEAK = re.compile("|".join(map(re.escape, WEAK)))
_DOMAINS = [dot + name for dot in ".。·" for name in _any_case("com|net|org|cc|cn|info|vip|xyz")]
_ADDRESSES = [*_any_case("www|http"), *_DOMAINS]
_TO_WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_HINTS = [*STRONG, *WEAK, *_ADDRESSES, *(address.translate(_TO_WIDE) for address in _ADDRESSES)]
_HINT = re.compile("|".join(map(re.escape, _HINTS)))


def has_web_signs(line: str) -> bool:
    """Whether a line has signs of a web site. Speech has none, unless there is an address in it."""
    if not line.lstrip().startswith(OPENING_QUOTES):
        if _STRONG.search(line):
            return True
        weak = {word.lower() for word in _WEAK.findall(line)}
        weight = sum(WIDE_WEIGHT if ord(letter) >= FIRST_WIDE else 1 for letter in line if letter.isalpha())
        if len(weak) >= 3 or (len(weak) == 2 and weight >= _LONG_FOR_SIGNS):
            return True
    return _ADDRESS.search(unicodedata.normalize("NFKC", line)) is not None


def is_verse_or_speech(line: str) -> bool:
    """Whether a line begins with a quotation mark, or has several clauses, all of three to seven characters."""
    if line.lstrip().startswith(OPENING_QUOTES):
        return True
    clauses = [clause for clause in re.split(r"[^\w\s]+", line) if clause.strip()]
    return len(clauses) > 1 and all(3 <= len(clause.strip()) <= 7 for clause in clauses)


# Finding the lines to ask about


@functools.cache
def _hint_tables() -> tuple[NDArray[np.bool_], list[NDArray[np.uint64]]]:
    """Whether a sign begins with a character; and which have it as their first, second and third.

    Signs that begin alike share a bit.
    """
    tables = [np.zeros(1 << 16, np.uint64) for _ in range(3)]
    beginnings = {(hint[0], len(hint) > 2): None for hint in _HINTS}
    bits = {beginning: np.uint64(1 << number % 64) for number, beginning in enumerate(beginnings)}
    for hint in _HINTS:
        bit = bits[hint[0], len(hint) > 2]
        tables[0][ord(hint[0])] |= bit
        tables[1][ord(hint[1])] |= bit
        tables[2][ord(hint[2]) if len(hint) > 2 else slice(None)] |= bit
    return tables[0] > 0, tables


def places_of_signs(text: str, codes: NDArray[np.uint16]) -> list[int]:
    """Where in a text a word begins that may be a sign.

    If three characters in a row have a bit in common, a sign may begin there. This is far quicker than a search for
    hundreds of words.

    Args:
        text: any text.
        codes: of its characters; 0xFFFF for those beyond the basic plane.
    """
    begins, (first, second, third) = _hint_tables()
    places = np.flatnonzero(begins.take(codes))
    codes = np.append(codes, np.zeros(2, np.uint16))
    alike = first[codes[places]] & second[codes[places + 1]] & third[codes[places + 2]]
    return [place for place in places[alike > 0].tolist() if _HINT.match(text, place)]
